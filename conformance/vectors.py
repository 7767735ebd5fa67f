"""The cases and their answers as JSON files, which any language can read; docs/vectors.md describes the format.

There is one file for each family, and schema.json. `unilabel conformance vectors` writes all but the schema.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mpmath import mp

import unilabel

from .cases import DTYPES, FAMILIES, FLAGS, FULL, GRADIENTS, LONG, LOSSES, Case, Tensor, cases
from .oracle import BITS, Exact, Expected, expected

FOLDER = Path(__file__).parent / "vectors"
SCHEMA = "schema.json"
FORMAT = 2  # of the files: raised when readers have to change
SEED = 0
DIGITS = {"float64": 40}  # 20 for the other dtypes; counted from the first digit of the number or its terms
SMALLEST = -16_000  # binary exponent: a number closer to 0 is written as 0
ABOUT = "Losses to be computed, and their exact values and gradients. docs/vectors.md of unilabel explains the format."


def files() -> dict[str, str]:
    """The text of each file."""
    tests: dict[str, list[dict[str, Any]]] = {name: [] for name in FAMILIES if name not in FULL | LONG}
    with mp.workprec(BITS):
        for case in cases(tuple(DTYPES), SEED):
            if case.family in tests:
                tests[case.family].append(_test(case))
    written = {f"{family}.json": _text(_header(family, of_family), of_family) for family, of_family in tests.items()}
    return written | {SCHEMA: (FOLDER / SCHEMA).read_text("utf-8")}


def stale(folder: Path, right: dict[str, str]) -> dict[str, str]:
    """The files of a folder that are not up to date, each with its first difference."""
    found = {path.name: "no family has this name" for path in folder.glob("*.json") if path.name not in right}
    for name, text in right.items():
        try:
            there = (folder / name).read_text("utf-8")
        except FileNotFoundError:
            found[name] = "is not there"
            continue
        except (OSError, UnicodeDecodeError) as error:
            found[name] = f"cannot be read: {error}"
            continue
        difference = _difference(there, text)
        if difference:
            found[name] = difference
    return found


def write(folder: Path) -> list[str]:
    """Writes the files that are not up to date, and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    right = files()
    wrong = sorted(right.keys() & stale(folder, right))
    for name in wrong:
        (folder / name).write_bytes(right[name].encode())
    return wrong


def load(file: Path) -> list[tuple[Case, Expected]]:
    """The cases of a file and their answers, in the digits that it has; not every test has all answers."""
    document = json.loads(file.read_text("utf-8"))
    loaded = []
    for test in document["tests"]:
        case = Case(
            id=test["id"],
            family=document["family"],
            flags=tuple(test["flags"]),
            dtype=test["dtype"],
            loss=test["loss"],
            logits=_given(test["features" if "features" in test else "logits"]),
            targets=_given(test["positives" if "positives" in test else "targets"]),
            positives="positives" in test,
            options={name: x if name == "reduction" else _given(x) for name, x in test["options"].items()},
            cotangent=_given(test["cotangent"]),
            linear_weight=_given(test.get("linear_weight")),
        )
        with mp.workprec(BITS):
            names = set(Expected._fields) - {"summands"}
            answers = {name: _exact(test[name]) if name in test else [] for name in names}
        loaded.append((case, Expected(**answers, summands=test["summands"])))
    return loaded


# --- A file -----------------------------------------------------------------------------------------------------------


def _header(family: str, tests: list[dict[str, Any]]) -> dict[str, Any]:
    used = {flag for test in tests for flag in test["flags"]}
    return {
        "$schema": SCHEMA,
        "format": FORMAT,
        "about": ABOUT,
        "generator": f"unilabel {unilabel.__version__}",
        "family": family,
        "comment": FAMILIES[family].__doc__,
        "seed": SEED,
        "flags": {flag: text for flag, text in FLAGS.items() if flag in used},
    }


def _text(header: dict[str, Any], tests: list[dict[str, Any]]) -> str:
    """JSON with a line for each key of a test, so that a diff shows what changed."""

    def lines(of: dict[str, Any], indent: str) -> str:
        return ",\n".join(f"{indent}{json.dumps(key)}: {json.dumps(of[key], ensure_ascii=False)}" for key in of)

    blocks = ",\n".join(f"  {{\n{lines(test, '   ')}\n  }}" for test in tests)
    return f'{{\n{lines(header, " ")},\n "tests": [\n{blocks}\n ]\n}}\n'


def _difference(there: str, right: str) -> str:
    """Where two texts first differ, the generator aside: a new version of unilabel alone changes no file."""
    test = ""
    for number, (a, b) in enumerate(zip_longest(there.split("\n"), right.split("\n")), 1):
        if b is not None and b.startswith('   "id": '):
            test = " in " + b.split('"')[3]
        if a != b and not (a and b and all(line.startswith(' "generator": ') for line in (a, b))):
            a, b = a or "nothing", b or "nothing"
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            start = max(same - 40, 0)
            return f"line {number}{test}: …{a[start : start + 80]}… should be …{b[start : start + 80]}…"
    return ""


# --- A test -----------------------------------------------------------------------------------------------------------


def _test(case: Case) -> dict[str, Any]:
    exact = expected(case)
    inputs = {name: _written(tensor) for name, tensor in case.inputs.items() if name not in case.options}
    test: dict[str, Any] = {
        "id": case.id,
        "comment": _comment(case),
        "flags": list(case.flags),
        "dtype": case.dtype,
        "loss": case.loss,
        **inputs,
        "positives" if case.positives else "targets": _written(case.targets),
        "options": {name: _written(given) for name, given in case.options.items()},
        "cotangent": _written(case.cotangent),
        "value": _answers(exact.value, case.cotangent.shape, case.dtype),
    }
    for name, tensor in case.inputs.items():
        for answer in (GRADIENTS[name], f"{GRADIENTS[name]}_of_sum"):
            test[answer] = _answers(getattr(exact, answer), tensor.shape, case.dtype)
    if exact.target_gradient:
        test["target_gradient"] = _answers(exact.target_gradient, case.targets.shape, case.dtype)
    if case.linear_weight is None and case.options.get("reduction") == "none":  # other reductions add nothing new
        test["hessian"] = _answers(exact.hessian, case.logits.shape, case.dtype)
    return test | {"summands": exact.summands}


def _comment(case: Case) -> str:
    """'4×5 logits, class indices; reduction none, where', or '4×3 features, 5 classes, labels'"""
    loss = LOSSES[case.loss]
    soft = any(isinstance(z, float) for z in case.targets.values)
    kinds = ("class indices", "distributions") if loss.per_example else ("labels", "soft labels")
    targets = "indices of labels" if case.positives else kinds[soft]
    shape = "×".join(map(str, case.logits.shape))
    options = [name if isinstance(given, Tensor) else f"{name} {given}" for name, given in case.options.items()]
    if case.linear_weight is not None:
        targets = f"{case.shape[-1]} classes, {targets}"
    return f"{shape} {loss.takes}, {targets}" + "; " * bool(options) + ", ".join(options)


def _written(given: Any) -> Any:
    """An array or an option, as JSON. Floats are written in hexadecimal, which keeps every bit."""
    if isinstance(given, Tensor):
        floats = any(isinstance(x, float) for x in given.values)  # an array has one type
        return _array(given.shape, [_written(float(x) if floats else x) for x in given.values])
    if isinstance(given, float):
        return re.sub(r"\.?0*p", "p", given.hex())
    return given


def _array(shape: tuple[int, ...], values: list[Any]) -> dict[str, Any]:
    return {"shape": shape, "values": _short(values)}


def _short(values: list[Any]) -> list[Any]:
    """A single element if all are the same."""
    return values[:1] if len(set(values)) == 1 else values


def _answers(exact: list[Exact], shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    exact = _short(exact)
    answers = _array(shape, [_decimal(x.value, DIGITS.get(dtype, 20), x.terms) for x in exact])
    # These two are only factors in bounds: a few digits are enough.
    terms = [_decimal(x.terms, 9) for x in exact]
    if terms != [_decimal(abs(x.value), 9) for x in exact]:
        answers["terms"] = _short(terms)
    shift = [_decimal(mp.mpf(x.shift), 3) for x in exact]
    if DTYPES[dtype][0] >= 24 and any(x != "0" for x in shift):  # too small to see in half precision
        answers["shift"] = _short(shift)
    return answers


@functools.lru_cache(maxsize=1 << 12)
def _decimal(x: Any, digits: int, terms: Any = None) -> str:
    """The number with so many digits, counted from the first digit of its terms.

    It is rounded twice, so that the last bits of the oracle never decide a tie between two decimals.
    """
    if not mp.isfinite(x):
        return str(mp.nstr(x)).replace("+", "")
    with mp.workprec(4 * digits + 10):
        size, terms = abs(x), abs(x if terms is None else terms)
    if size and terms > size:
        digits -= int((mp.mag(terms) - mp.mag(size)) * math.log10(2))
    if not size or digits <= 0 or mp.mag(size) < SMALLEST:
        return "0"
    with mp.workprec(4 * digits + 10):
        return str(mp.nstr(+x, digits))


# --- Reading a file ---------------------------------------------------------------------------------------------------


def _given(given: Any) -> Any:
    if isinstance(given, dict):
        return Tensor(tuple(given["shape"]), _long(given, "values", _given))
    if isinstance(given, list):
        return tuple(given)
    return float.fromhex(given) if isinstance(given, str) else given


def _long(array: dict[str, Any], key: str, read: Callable[[Any], Any]) -> list[Any]:
    values = [read(x) for x in array[key]]
    return values * math.prod(array["shape"]) if len(values) == 1 else values


def _exact(answers: dict[str, Any]) -> list[Exact]:
    values = _long(answers, "values", mp.mpf)
    terms = _long(answers, "terms", mp.mpf) if "terms" in answers else map(abs, values)
    shift = _long(answers, "shift", mp.mpf) if "shift" in answers else [0] * len(values)
    return list(map(Exact, values, terms, shift))
