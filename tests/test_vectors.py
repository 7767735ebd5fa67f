"""The vectors: up to date, valid by their schema, and enough to judge a result by, with nothing but the files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator, ValidationError
from mpmath import mp
from unilabel.conformance import cli, oracle, vectors
from unilabel.conformance.cases import DTYPES, FAMILIES, FULL, LONG, Tensor, cases
from unilabel.conformance.oracle import Expected, expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.vectors import FOLDER, SCHEMA, load, stale, write
from unilabel.conformance.worker import answer

from unilabel.backend import backend_named

FILES = sorted(path for path in FOLDER.glob("*.json") if path.name != SCHEMA)
SMALLEST = mp.ldexp(1, vectors.SMALLEST)
pytestmark = pytest.mark.full
PAGE = Path(__file__).parent.parent / "docs" / "vectors.md"


@pytest.fixture(scope="module")
def right():
    return vectors.files()


@pytest.fixture
def folder(tmp_path, right, monkeypatch):
    """A copy that a test may break; the right files are computed once for all tests."""
    monkeypatch.setattr(vectors, "files", lambda: right)
    monkeypatch.setattr(cli, "files", lambda: right)
    return shutil.copytree(FOLDER, tmp_path / "vectors")


def vectors_command(*arguments):
    return CliRunner().invoke(cli.main, ["conformance", "vectors", *map(str, arguments)])


def test_up_to_date(right):
    assert stale(FOLDER, right) == {}, "run: unilabel conformance vectors --write"
    assert {path.stem for path in FILES} == FAMILIES.keys() - FULL - LONG
    assert sum(path.stat().st_size for path in FILES) < 6_000_000


# --- The schema -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema():
    schema = json.loads((FOLDER / SCHEMA).read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_schema_knows_every_key(schema):
    def objects(of):
        inner = of.values() if isinstance(of, dict) else of if isinstance(of, list) else []
        return [of] * (isinstance(of, dict) and of.get("type") == "object") + [x for y in inner for x in objects(y)]

    closed = [x for x in objects(schema.schema) if x["additionalProperties"] is False]
    assert len(closed) == len(objects(schema.schema)) - 1 == 7  # the names of flags are free


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_schema(file, schema):
    document = json.loads(file.read_text("utf-8"))
    schema.validate(document)
    used = {flag for test in document["tests"] for flag in test["flags"]}
    assert used == document["flags"].keys()
    assert {test["id"].split("/")[1] for test in document["tests"]} == {document["family"]} == {file.stem}


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ([], {"unknown": 1}),
        ([], {"format": 1}),
        (["tests", 0], {"unknown": 1}),
        (["tests", 0], {"loss": "hinge"}),
        (["tests", 0], {"summands": 1.5}),
        (["tests", 0, "options"], {"unknown": 1}),
        (["tests", 0, "options"], {"reduction": "sum"}),  # which has no Hessian
        (["tests", 0, "logits"], {"unknown": 1}),
        (["tests", 0, "logits"], {"values": [1.5]}),
        (["tests", 0, "logits"], {"values": ["1.5"]}),
        (["tests", 0, "targets"], {"values": [1, True]}),
        (["tests", 0, "value"], {"unknown": 1}),
        (["tests", 0, "value"], {"values": ["0x1p-1"]}),
        (["tests", 0, "value"], {"shift": [0]}),
    ],
)
def test_schema_refuses(place, wrong, schema):
    document = json.loads((FOLDER / "seed.json").read_text("utf-8"))
    inner = document
    for key in place:
        inner = inner[key]
    inner.update(wrong)
    with pytest.raises(ValidationError):
        schema.validate(document)


@pytest.mark.parametrize(
    ("without", "more"),
    [
        (["features"], {}),
        (["linear_weight"], {}),
        (["linear_weight_gradient"], {}),
        (["linear_bias_gradient_of_sum"], {}),
        (["options"], {"options": {}}),  # without the bias, of which there is a gradient
        ([], {"hessian": {"shape": [], "values": ["0"]}}),
        ([], {"logits": {"shape": [], "values": ["0x1p+0"]}}),
        ([], {"loss": "softmax_nll"}),
    ],
)
def test_schema_of_linear_losses_refuses(without, more, schema):
    document = json.loads((FOLDER / "linear.json").read_text("utf-8"))
    schema.validate(document)
    test = document["tests"][0]
    assert "linear_bias" in test["options"]
    document["tests"][0] = {key: given for key, given in test.items() if key not in without} | more
    with pytest.raises(ValidationError):
        schema.validate(document)


@pytest.mark.parametrize("change", [{"targets": {"shape": [1], "values": [0]}}, {"positives": None}])
def test_schema_has_either_targets_or_positives(change, schema):
    document = json.loads((FOLDER / "positives.json").read_text("utf-8"))
    schema.validate(document)
    test = document["tests"][0] | change
    document["tests"][0] = {key: given for key, given in test.items() if given is not None}
    with pytest.raises(ValidationError):
        schema.validate(document)


# --- Reading the files ------------------------------------------------------------------------------------------------


def plain(case):
    """A case as text, to compare: NaN equals NaN, 0 is not -0, True is not 1. Integers among floats are floats."""

    def of(x):
        return (x.shape, np.asarray(x.values).tolist()) if isinstance(x, Tensor) else x

    options = {name: of(given) for name, given in case.options.items()}
    return repr([*map(of, case._replace(options=None)), options])


def assert_digits(got, exact, digits):
    assert len(got) == len(exact)
    for a, b in zip(got, exact, strict=True):
        if mp.isfinite(b.value):
            assert abs(a.value - b.value) <= mp.mpf(10) ** (1 - digits) * max(abs(b.value), b.terms) + SMALLEST
            assert abs(a.terms - b.terms) <= mp.mpf(10) ** -8 * b.terms + SMALLEST
        else:
            assert a.value == b.value or (mp.isnan(a.value) and mp.isnan(b.value))
        assert digits == 20 or abs(a.shift - b.shift) <= b.shift / 100 + SMALLEST


@pytest.fixture(scope="module")
def loaded():
    return {case.id: (case, exact) for file in FILES for case, exact in load(file)}


def small(case):
    """Not one of the long sums, each of which takes the oracle a second."""
    return len(case.logits.values) < 1000


def test_load(loaded):
    made = [case for case in cases(tuple(DTYPES), 0) if case.id.split("/")[1] not in LONG]
    assert loaded.keys() == {case.id for case in made}
    for case in made:
        again, got = loaded[case.id]
        assert plain(again) == plain(case)
        assert len(got.gradient) == len(case.logits.values)
    for case in filter(small, made):
        got = loaded[case.id][1]
        exact = expected(case)
        assert got.summands == exact.summands
        with mp.workprec(oracle.BITS):
            digits = 40 if case.dtype == "float64" else 20
            for quantity in set(Expected._fields) - {"hessian", "summands"}:
                assert_digits(getattr(got, quantity), getattr(exact, quantity), digits)
            unreduced = case.options.get("reduction") == "none"
            assert_digits(got.hessian, exact.hessian if unreduced else [], digits)


def test_enough_to_judge_by(loaded):
    """The results of NumPy are right by the files, as they are by the oracle."""
    backend = backend_named("numpy")
    for case, exact in loaded.values():
        numbers = answer(backend, "cpu", case)["numbers"] if small(case) else {}
        verdicts = judge(case, exact, numbers, "numpy")
        assert not any(verdict.failed for verdict in verdicts.values()), (case.id, verdicts)


def test_digits_do_not_depend_on_the_precision(right, monkeypatch):
    monkeypatch.setattr(oracle, "BITS", 300)
    oracle.element.cache_clear()
    monkeypatch.setattr(vectors, "cases", lambda dtypes, seed: filter(small, cases(dtypes, seed)))
    again = vectors.files()
    oracle.element.cache_clear()
    del again["sums.json"]
    assert again == {name: text for name, text in right.items() if name in again}


# --- --write and --check ----------------------------------------------------------------------------------------------


def replace(file, old, new):
    text = file.read_text("utf-8")
    assert old in text
    file.write_bytes(text.replace(old, new, 1).encode())


def test_a_changed_digit_is_caught(folder):
    assert vectors_command("--check", "--to", folder).exit_code == 0
    replace(folder / "seed.json", '"0.693147180559945309', '"0.693147180559945308')
    result = vectors_command("--check", "--to", folder)
    assert result.exit_code == 1
    assert re.search(r"^seed.json: line \d+ in float16/seed/1: .*5308.* should be .*5309", result.output, re.MULTILINE)
    assert "NOT all" in result.output
    assert vectors_command("--write", "--to", folder).output == f"written: {folder / 'seed.json'}\n"
    assert vectors_command("--check", "--to", folder).exit_code == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"0x1.998p-4"', '"0x1.99cp-4"'),
        ("[1, 0, 1, 0, 1, 0]", "[1, 0, true, 0, 1, 0]"),
        ('"cotangent": "an', '"cotangent": "An'),
        ('"seed": 0', '"seed": 1'),
        ('"summands": 1\n', '"summands": 1 \n'),
        ("}\n ]\n}\n", "}\n ]\n}"),
        ("\n ]\n}\n", ""),
    ],
)
def test_a_change_is_caught(folder, right, old, new):
    replace(folder / "seed.json", old, new)
    assert stale(folder, right).keys() == {"seed.json"}


def test_files_too_few_and_too_many(folder, right):
    (folder / "zero.json").unlink()
    (folder / "old.json").write_text("{}")
    replace(folder / SCHEMA, "additionalProperties", "additional")
    assert stale(folder, right) == {
        "zero.json": "is not there",
        "old.json": "no family has this name",
        SCHEMA: stale(folder, right)[SCHEMA],
    }
    assert write(folder) == [SCHEMA, "zero.json"]
    assert stale(folder, right).keys() == {"old.json"}


def test_a_file_that_cannot_be_read(folder):
    (folder / "seed.json").write_bytes(b"\xff")
    (folder / "zero.json").unlink()
    (folder / "zero.json").mkdir()
    result = vectors_command("--check", "--to", folder)
    assert result.exit_code == 1
    assert "seed.json: cannot be read: 'utf-8' codec can't decode byte 0xff" in result.output
    assert "zero.json: cannot be read: [Errno 21] Is a directory" in result.output
    result = vectors_command("--write", "--to", folder / "tails.json" / "new")
    assert result.exit_code == 2
    assert "cannot be used: [Errno 20] Not a directory" in result.output


def test_writes_only_what_changed(folder):
    """A second run writes nothing; and a new version of unilabel alone changes no file."""
    replace(folder / "zero.json", '"generator": "unilabel ', '"generator": "unilabel 9.')
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert vectors_command("--check", "--to", folder).exit_code == 0
    assert vectors_command("--write", "--to", folder).output == "nothing has changed\n"
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_writes_a_new_folder(folder, right):
    new = folder / "new" / "one"
    assert vectors_command("--write", "--to", new).exit_code == 0
    assert {path.name: path.read_bytes().decode() for path in new.iterdir()} == right


def test_neither_write_nor_check():
    result = vectors_command()
    assert result.exit_code == 2
    assert "expected --write or --check" in result.output


# --- The page ---------------------------------------------------------------------------------------------------------


def read_as_the_page_does(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert "unilabel" not in code
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)


def test_reader_of_the_page(folder):
    done = read_as_the_page_does(FOLDER)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[1-9]\d* tests are right\n", done.stdout)
    text = (folder / "moderate.json").read_text("utf-8")
    before, test, after = text.partition('"float64/moderate/3"')
    (folder / "moderate.json").write_text(
        before + test + re.sub(r'("value": .*?"\d\.\d{9})\d', r"\g<1>X", after, count=1)
    )
    assert read_as_the_page_does(folder).returncode != 0


def test_page_names_every_key():
    page = PAGE.read_text("utf-8")
    tests = [test for file in FILES for test in json.loads(file.read_text("utf-8"))["tests"]]
    assert len({test["id"] for test in tests}) == len(tests)
    assert all(f"`{key}`" in page for test in tests for key in test)
