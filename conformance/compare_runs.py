"""Compares two saved results number by number: how far apart two machines, backends or releases are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .cases import DTYPES
from .report import FORMAT, Results, visible

Run = dict[str, Any]
NONE: dict[str, Any] = {"status": "missing", "numbers": {}}  # in place of a case


class Difference(NamedTuple):
    """How far apart one column of a and one of b are, and in which case."""

    a: str
    b: str
    cases: int  # that both have
    missing: int  # cases of which one has something that the other lacks
    ulp: float
    where: str


def read(file: Path) -> Results:
    """What --json wrote. ValueError if it is not that, or of another format."""
    found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, dict) or not {"format", "seed", "runs"} <= found.keys():
        raise ValueError("not a file that --json wrote")
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']!r}, where this release has {FORMAT}: write it again")
    return visible(found)


def differences(a: Results, b: Results) -> list[Difference]:
    """Compares the columns that have the same title in both; if none has, each column of a with each of b."""
    if a["seed"] != b["seed"]:
        raise ValueError(f"the seeds differ, and so do the cases: {a['seed']} and {b['seed']}")
    ours, theirs = ({run["title"]: run for run in found["runs"]} for found in (a, b))
    if ours.keys() & theirs.keys():
        return [_difference(ours.get(title), theirs.get(title)) for title in ours | theirs]
    return [_difference(x, y) for x in a["runs"] for y in b["runs"]]


def _difference(a: Run | None, b: Run | None) -> Difference:
    ours, theirs = ({case["id"]: case for case in run["cases"]} if run else {} for run in (a, b))
    same = a and b and (a["subject"], a["backend"]) == (b["subject"], b["backend"])
    worst, where, cases, missing = 0.0, "", 0, 0
    for name in ours | theirs:
        ends = ours.get(name, NONE), theirs.get(name, NONE)
        x, y = map(_numbers, ends)
        if not (x and y):
            missing += bool(x or y or ends[0]["status"] != ends[1]["status"])
            continue
        cases += 1
        # Not every backend has every way to a number: NumPy has no autodiff.
        ways = sorted(x.keys() | y.keys() if same else x.keys() & y.keys())
        missing += any(way not in x or way not in y or len(x[way]) != len(y[way]) for way in ways)
        for way in ways:
            for p, q in zip(x.get(way, []), y.get(way, []), strict=False):
                ulp = apart(p, q, ends[0]["dtype"])
                if ulp > worst:
                    worst, where = ulp, f"{name} {way}"
    return Difference(_name(a), _name(b), cases, missing, worst, where)


def _numbers(case: dict[str, Any]) -> dict[str, list[float]]:
    """The numbers of a case, by their quantity and way."""
    return {
        f"{quantity} by {how}": [float.fromhex(text) for text in texts]
        for quantity, ways in case["numbers"].items()
        for how, texts in ways.items()
    }


def apart(x: float, y: float, dtype: str) -> float:
    """|x - y| in ULP of the larger; 0 for two NaN or equal infinities, infinite where only one is NaN or infinite."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    bits, low = DTYPES[dtype]
    return abs(x - y) / 2.0 ** (max(math.frexp(max(abs(x), abs(y)))[1] - 1, low) - bits + 1)


def _name(run: Run | None) -> str:
    return f"{run['title']} {run['version']} {run['device']}" if run else "missing"
