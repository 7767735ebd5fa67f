"""Compares two saved results number by number: how far apart two machines, backends or releases are."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .cases import DTYPES


class Difference(NamedTuple):
    """How far apart one column of a and one of b are, and in which case."""

    a: str
    b: str
    cases: int
    ulp: float
    where: str


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Compares the columns that have the same title in both; if none has, each column of a with each of b."""
    pairs = [(x, y) for x in a["runs"] for y in b["runs"]]
    same = [(x, y) for x, y in pairs if x["title"] == y["title"]]
    return [_difference(x, y) for x, y in same or pairs]


def _difference(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    theirs = {case["id"]: case for case in b["cases"] if case["numbers"]}
    worst, where, cases = 0.0, "", 0
    for case in a["cases"]:
        other = theirs.get(case["id"])
        if other is None or not case["numbers"]:
            continue
        cases += 1
        for quantity in case["numbers"].keys() & other["numbers"].keys():
            ways, their_ways = case["numbers"][quantity], other["numbers"][quantity]
            for how in ways.keys() & their_ways.keys():
                for x, y in zip(ways[how], their_ways[how], strict=True):
                    ulp = apart(float.fromhex(x), float.fromhex(y), case["dtype"])
                    if ulp > worst:
                        worst, where = ulp, f"{case['id']} {quantity} by {how}"
    return Difference(_name(a), _name(b), cases, worst, where)


def apart(x: float, y: float, dtype: str) -> float:
    """|x - y| in ULP of the larger; 0 for two NaN or equal infinities, infinite where only one is NaN or infinite."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.inf
    bits, low = DTYPES[dtype]
    return abs(x - y) / 2.0 ** (max(math.frexp(max(abs(x), abs(y)))[1] - 1, low) - bits + 1)


def _name(run: dict[str, Any]) -> str:
    return f"{run['title']} {run['version']} {run['device']}"
