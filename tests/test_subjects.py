"""Anybody's loss through the same cases: the frameworks' own, and a function named on the command line."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from shared import asked_for
from test_conformance import command
from unilabel.conformance.cases import LINEAR_SOFTMAX, cases
from unilabel.conformance.cli import main
from unilabel.conformance.oracle import expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.worker import answer

import unilabel

OWN = """
import unilabel

def softmax_nll(logits, targets, *, axis=-1, reduction="mean"):
    return unilabel.softmax_nll(logits, targets, axis=axis, reduction=reduction)

def plain(logits, targets, *, reduction="mean"):
    return unilabel.softmax_nll(logits, targets, reduction=reduction) * 1.0001

def slow(logits, targets, *, reduction="mean"):
    import time
    time.sleep(60)
"""

# The command, but listening to SIGINT: a shell's background jobs, and so what they start, ignore it.
LISTENING = """
import os
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from unilabel.conformance import main
main()
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


# PEERS' failures, by the flags that they come under, on the frameworks that have them.
EVERYWHERE = {"confident", "offset", "excluded class", "infinite logit", "nothing takes part", "wrong index"}
KNOWN = {
    "numpy": EVERYWHERE,
    "torch": EVERYWHERE | {"soft saturated", "masked"},
    "jax": EVERYWHERE | {"second derivative"},
    "tensorflow": EVERYWHERE | {"zero logit", "unnormalised", "soft saturated"},
}


@pytest.mark.parametrize(
    "backend", [name if name == "torch" else pytest.param(name, marks=pytest.mark.full) for name in KNOWN]
)
def test_the_frameworks_own_losses(backend, tmp_path):
    families = [
        f"--case={name}" for name in ("confident", "zero", "infinite", "masked", "targets", "invalid", "shapes")
    ]
    file = tmp_path / "results.json"
    done = command(
        "conformance", "--subject", "native", "--backend", backend, "--dtype", "float32", *families, "--json", str(file)
    )
    assert done.returncode == 1
    (run,) = json.loads(file.read_text())["runs"]
    assert run["problem"] == ""
    failed = {flag for case in run["cases"] if case["status"] == "fail" for flag in case["flags"]}
    assert failed >= KNOWN[backend]
    assert f"native {backend}: offset: float32/confident/" in done.stdout
    assert "softmax_nll([[" in done.stdout  # the input, as one would write it
    for case in run["cases"]:  # what a framework does not have is neither passed nor failed
        if "sample_weight" in case["reason"] or "label_smoothing" in case["reason"]:
            assert case["status"] == "not applicable"


@pytest.mark.full
def test_half_precision_sums_of_the_frameworks(tmp_path):
    done = command("conformance", "--subject=native", "--backend=tensorflow", "--dtype=float16", "--case=*/sums/2")
    assert done.returncode == 1
    assert (
        "native tensorflow: half sum: float16/sums/2: value by the loss, element 0: 0.0, right is 0.474" in done.stdout
    )


@pytest.mark.full
def test_keras_computes_float64_in_float32():
    done = command("conformance", "--subject", "keras", "--dtype", "float64", "--case", "seed")
    assert done.returncode == 1
    assert "keras tensorflow: " in done.stdout
    assert "float32" in done.stdout


@pytest.mark.full
def test_somebodys_function(own):
    done = command(
        "conformance", "--subject", "own:softmax_nll", "--backend", "numpy", "--dtype", "float32", package=own
    )
    assert done.returncode == 0, done.stdout
    assert "not applicable" in done.stdout  # its other losses, and the options that it does not take
    done = command("conformance", "--subject", "own:plain", "--backend", "numpy", "--case", "seed", package=own)
    assert done.returncode == 2
    assert "'own:plain' has the name of no loss" in " ".join(done.stderr.split())
    named = ["--subject", "own:plain", "--loss", "softmax_nll", "--backend", "numpy", "--case", "seed"]
    done = command("conformance", *named, package=own)
    assert done.returncode == 1
    assert "own:plain numpy: " in done.stdout


@pytest.mark.parametrize("subject", ["nonsense", "no.such.module:f"])
def test_a_subject_that_is_not_there_is_a_wrong_call(own, subject):
    done = command("conformance", "--subject", subject, "--backend", "numpy", package=own)
    assert done.returncode == 2
    assert "is none of unilabel, native, keras, nor a package.module:function" in " ".join(done.stderr.split())


HERE = ["--subject=own:softmax_nll", "--backend=numpy", "--dtype=float32", "--case=*/seed/2"]
WAYS = {
    "command": [str(Path(sys.executable).parent / "unilabel"), "conformance"],
    "module": [sys.executable, "-m", "unilabel.conformance", "conformance"],
    "pytest": [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "unilabel.conformance"],
}


@pytest.mark.parametrize("way", WAYS)
def test_one_in_the_working_directory_is_found(way, own):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*WAYS[way], *HERE], cwd=own, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("2 passed" if way == "pytest" else "own:softmax_nll numpy: 1 pass") in done.stdout


def test_what_lies_in_the_working_directory_takes_no_place_of_what_is_installed(own):
    (own / "click.py").write_text("raise ImportError('not that one')")
    (own / "own.py").write_text("import click\n" + OWN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*WAYS["command"], *HERE], cwd=own, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_that_hangs_is_ended(own):
    hung = ["--subject", "own:slow", "--loss", "softmax_nll", "--backend", "numpy", "--case", "float32/seed/2"]
    done = command("conformance", *hung, "--timeout", "3", "--subject", "unilabel", package=own)
    assert done.returncode == 1
    assert "own:slow numpy: cotangent: float32/seed/2: no answer for 3 s" in done.stdout
    assert "numpy: 1 pass" in done.stdout


def test_interrupted_it_reports_what_there_is(own, tmp_path):
    file = tmp_path / "results.json"
    call = [
        "conformance",
        "--subject=unilabel",
        "--subject=own:slow",
        "--loss=softmax_nll",
        "--backend=numpy",
        "--case=seed",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, *call, "--json", str(file)],
        cwd=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(own), "PATH": ""},
    )  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("numpy: done"))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: " in output
    results = json.loads(file.read_text())
    assert results["interrupted"]
    assert {case["status"] for case in results["runs"][0]["cases"]} == {"pass"}
    assert "not run" in {case["status"] for case in results["runs"][1]["cases"]}


@pytest.mark.full
def test_saved_results_compare(own, tmp_path):
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    made = [("numpy", "unilabel"), ("array_api_strict", "unilabel"), ("numpy", "own:plain")]
    for file, (backend, subject) in zip(files, made, strict=True):
        command(
            "conformance", "--backend", backend, "--subject", subject, "--loss", "softmax_nll", "--case", "seed",
            "--json", file, package=own,
        )  # fmt: skip
    a, b, c = files
    assert command("conformance", "compare", a, a).returncode == 0
    same = command("conformance", "compare", a, b, "--ulp", "2")
    assert same.returncode == 0, same.stdout
    apart = command("conformance", "compare", a, c, "--ulp", "2")
    assert apart.returncode == 1, apart.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The results of NumPy in a few cases."""
    file = tmp_path_factory.mktemp("saved") / "a.json"
    command(
        "conformance", "--backend", "numpy", "--case", "float32/seed/[1-4]", "--case=float64/seed/1", "--json", file
    )
    return json.loads(file.read_text())


def compared(folder, a, b, *arguments):
    files = [folder / "a.json", folder / "b.json"]
    for file, data in zip(files, (a, b), strict=True):
        file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return CliRunner().invoke(main, ["conformance", "compare", *map(str, files), *arguments], terminal_width=200)


def only_one_case(found):
    found["runs"][0]["cases"] = found["runs"][0]["cases"][:1]


def no_numbers(found):
    found["runs"][0]["cases"][1]["numbers"] = {}


def no_values(found):
    found["runs"][0]["cases"][1]["numbers"]["value"]["the loss"] = []


def one_value_less(found):
    found["runs"][0]["cases"][0]["numbers"]["gradient"]["value_and_grad"].pop()


def no_gradient(found):
    del found["runs"][0]["cases"][1]["numbers"]["gradient"]


def no_way(found):
    del found["runs"][0]["cases"][1]["numbers"]["gradient"]["grad_and_hess"]


def another_column(found):
    found["runs"].append({**found["runs"][0], "title": "torch", "backend": "torch"})


def another_number(found):
    numbers = found["runs"][0]["cases"][0]["numbers"]["value"]["the loss"]
    numbers[0] = (float.fromhex(numbers[0]) + 2**-24).hex()


def not_run(found):
    """As of a large case, whose numbers are not kept."""
    found["runs"][0]["cases"][1] |= {"numbers": {}, "status": "not run"}


DIFFERENCES = [
    only_one_case, no_numbers, no_values, one_value_less, no_gradient, no_way, another_column, another_number, not_run,
]  # fmt: skip


@pytest.mark.parametrize("change", DIFFERENCES)
def test_what_is_missing_is_a_difference(saved, tmp_path, change):
    """On either side."""
    other = copy.deepcopy(saved)
    change(other)
    assert compared(tmp_path, saved, saved).exit_code == 0
    assert compared(tmp_path, other, other).exit_code == 0
    missing = change is not another_number
    for a, b in ((saved, other), (other, saved)):
        result = compared(tmp_path, a, b, "--ulp", "1000" if missing else "0")
        assert result.exit_code == 1
        assert bool(re.search(r"│ \d+ +│ [1-9]\d* +│ 0 +│", result.output)) == missing, result.output


def test_no_title_is_cut_off(saved, tmp_path):
    """Two subjects may differ at the ends of their names only."""
    title = f"their_package.losses:{'long_' * 20}name numpy"
    found = saved | {"runs": [saved["runs"][0] | {"title": title}]}
    result = compared(tmp_path, found, found)
    first = "".join(line.split("│")[1] for line in result.output.splitlines() if line.startswith("│"))
    assert first.replace(" ", "").startswith(title.replace(" ", ""))


def test_missing_everywhere(saved, tmp_path):
    """Nothing is compared, and so nothing is the same."""
    for found in (saved | {"runs": []}, saved | {"runs": [saved["runs"][0] | {"cases": []}]}):
        assert compared(tmp_path, found, found).exit_code == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 1}, "format 1, where this release has 2"),
        ({"format": "2"}, "format '2', where this release has 2"),
        ({"seed": 7}, "the seeds differ, and so do the cases: 0 and 7"),
        ({"runs": 3}, "not iterable"),
        ({"runs": [3]}, "expected two files that --json wrote"),
        ({"runs": [{}]}, "expected two files that --json wrote; received: KeyError: 'title'"),
        (b"", "JSONDecodeError"),
        (b"[]", "not a file that --json wrote"),
        (b"\xff" * 100_000, "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0"),
        ({"seed": "long" * 100_000}, "the seeds differ, and so do the cases: 0 and long"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"format": 2, "seed": 0, "runs": [{"title": "numpy", "cases": [[]]}]}', "expected two files"),
    ],
)
def test_files_that_cannot_be_compared(saved, tmp_path, change, reason):
    result = compared(tmp_path, saved, change if isinstance(change, bytes) else saved | change)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert reason in " ".join(result.output.split())
    assert len(result.output) < 1000  # not all that is wrong with it


def test_numbers_that_are_none(saved, tmp_path):
    for number in ("x", "0x1p9999999", 1, None):
        other = copy.deepcopy(saved)
        other["runs"][0]["cases"][0]["numbers"]["value"]["the loss"][0] = number
        assert compared(tmp_path, saved, other).exit_code == 2


@pytest.mark.full
def test_junit(tmp_path):
    file = tmp_path / "junit.xml"
    command("conformance", "--subject=native", "--backend=torch", "--case=float32/seed/*", "--junit", str(file))
    (suite,) = ElementTree.parse(file).getroot()
    assert suite.get("name") == "native torch"
    assert int(suite.get("tests") or 0) == 15
    failures = suite.findall("testcase/failure")
    assert len(failures) == int(suite.get("failures") or 0) == 1
    assert "right is" in (failures[0].get("message") or "")


# --- Failures of losses on a linear layer's inputs, each planted in one that is right ---------------------------------


def of_layer(features, linear_weight, targets, *, linear_bias=None, reduction="mean", ignore_index=None):
    """What is right: unilabel's loss of PyTorch's logits, in float32."""
    import torch

    wide = (None if array is None else array.float() for array in (features, linear_weight, linear_bias))
    logits = torch.nn.functional.linear(*wide)
    loss = unilabel.softmax_nll(logits, targets, reduction=reduction, ignore_index=ignore_index)
    return loss.to(features.dtype)


def frozen(features, linear_weight, *others, **options):
    """Liger: without a gradient of the features there is none of weight and bias."""
    if not features.requires_grad:
        linear_weight, options = linear_weight.detach(), {name: detached(given) for name, given in options.items()}
    return of_layer(features, linear_weight, *others, **options)


def detached(given):
    return given.detach() if hasattr(given, "detach") else given


def bias_in_each_block(features, *others, linear_bias=None, **options):
    """Cut Cross-Entropy #52."""
    blocks = -(-max(1, len(features)) // 4)
    return of_layer(features, *others, linear_bias=None if linear_bias is None else linear_bias * blocks, **options)


def padded_classes(features, linear_weight, *others, linear_bias=None, **options):
    """tokamax: classes up to a multiple of 32."""
    import torch

    more = max(0, len(linear_weight) - 32) and -len(linear_weight) % 32
    linear_weight = torch.nn.functional.pad(linear_weight, (0, 0, 0, more))
    linear_bias = None if linear_bias is None else torch.nn.functional.pad(linear_bias, (0, more))
    return of_layer(features, linear_weight, *others, linear_bias=linear_bias, **options)


def mean_of_nothing(*inputs, reduction="mean", **options):
    """PyTorch and Cut Cross-Entropy."""
    losses = of_layer(*inputs, reduction="none", **options)
    kept = len(losses) if options.get("ignore_index") is None else (inputs[2] != options["ignore_index"]).sum()
    return losses.sum() / kept if reduction == "mean" else of_layer(*inputs, reduction=reduction, **options)


def same_cotangent_for_all(*inputs, reduction="mean", **options):
    """Liger-Kernel #968: gradients formed in the forward pass, of the sum."""
    losses = of_layer(*inputs, reduction=reduction, **options)
    return losses.detach() + (losses.sum() - losses.sum().detach()) if reduction == "none" else losses


def summed_in_its_own_dtype(*inputs, reduction="mean", **options):
    """Liger-Kernel #512: in blocks, here of one example."""
    if reduction != "sum":
        return of_layer(*inputs, reduction=reduction, **options)
    total = 0
    for loss in of_layer(*inputs, reduction="none", **options):
        total = total + loss
    return total


def p_minus_1(features, linear_weight, targets, *, linear_bias=None, **options):
    """Liger-Kernel #1329, and PyTorch."""
    import torch

    ignored = options.pop("ignore_index", None)
    logits = torch.nn.functional.linear(features, linear_weight, linear_bias)
    targets = targets.long() if targets.ndim < logits.ndim else targets
    ignored = -7 if ignored is None else ignored
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignored, **options)


def difference_of_large_numbers(features, linear_weight, targets, *, linear_bias=None, reduction="mean"):
    import torch

    if reduction != "none":
        return of_layer(features, linear_weight, targets, linear_bias=linear_bias, reduction=reduction)
    logits = torch.nn.functional.linear(features, linear_weight, linear_bias)
    if targets.ndim == logits.ndim:
        return unilabel.softmax_nll(logits, targets, reduction="none")
    return logits.logsumexp(-1) - unilabel.nll(logits, targets, reduction="none").neg()


PLANTED = {
    "frozen": frozen,
    "blocks": bias_in_each_block,
    "blocks, long": padded_classes,
    "nothing takes part": mean_of_nothing,
    "cotangent": same_cotangent_for_all,
    "half sum": summed_in_its_own_dtype,
    "confident": p_minus_1,
    "offset": difference_of_large_numbers,
}


def wrong_cases(function, dtype, request, monkeypatch):
    """The cases of a linear loss that a function of PyTorch's tensors fails in."""
    backend = asked_for("torch", request)
    module = types.ModuleType("own_subject")
    module.loss = function
    monkeypatch.setitem(sys.modules, "own_subject", module)
    found = {}
    for case in cases((dtype,), 0):
        if case.loss == LINEAR_SOFTMAX and case.logits.shape != (2, 2, 2):
            got = answer(backend, "cpu", case, "own_subject:loss", LINEAR_SOFTMAX)
            if "numbers" in got:
                verdicts = judge(case, expected(case), got["numbers"], "torch").values()
                got = {"error": "; ".join(map(str, verdicts))} if any(v.failed for v in verdicts) else {}
            if "error" in got:
                found[case.id] = case, got["error"]
    return found


def test_what_is_right_is_right_for_all_cases_of_a_linear_layer(request, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        assert wrong_cases(of_layer, dtype, request, monkeypatch) == {}


@pytest.mark.parametrize(
    "flag", [flag if flag == "blocks" else pytest.param(flag, marks=pytest.mark.full) for flag in PLANTED]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_failures_of_linear_losses_are_found_by_their_flags(flag, request, monkeypatch):
    dtype = "bfloat16" if flag == "half sum" else "float32"
    found = wrong_cases(PLANTED[flag], dtype, request, monkeypatch)
    flags = {name for case, _ in found.values() for name in case.flags}
    assert flag.partition(",")[0] in flags, found
