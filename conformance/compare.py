"""When a number is right: within so many ULP of the exact one, the ULP taken at the larger of result and terms."""

from __future__ import annotations

from typing import Any, NamedTuple

from mpmath import mp

from .cases import DTYPES, LARGEST, Case, Tensor
from .oracle import Exact, Expected

# ULP for (value, gradient), as measured for each framework's exp and log1p. Others are held to NumPy's.
ELEMENTS = {"numpy": (4, 4), "torch": (3, 3), "jax": (4, 3), "tensorflow": (6, 4)}
ELEMENTS_POS_WEIGHT = {"numpy": (6, 5), "torch": (4, 4), "jax": (6, 4), "tensorflow": (6, 4)}
ROWS = {"numpy": (5, 7), "torch": (5, 6), "jax": (5, 7), "tensorflow": (6, 7)}
SUM = 20  # more for a sum or a mean of many numbers
FLUSH = ("torch", "jax", "tensorflow")  # these may take a subnormal number, on the way too, for 0


class Verdict(NamedTuple):
    """How one array compares: the worst error in ULP, what was allowed there, and the first failure in words."""

    ulp: float = 0.0
    bound: float = 0.0
    failure: str = ""


def judge(case: Case, exact: Expected, result: dict[str, Any], backend: str) -> dict[str, Verdict]:
    """A verdict on the values and one on the gradients of what a backend answered to a case."""
    if result.get("error"):
        failed = Verdict(mp.inf, 0.0, result["error"])
        return {"value": failed, "gradient": failed}
    by_row = case.loss not in ("multilabel_logistic_loss", "binary_cross_entropy")
    table = ROWS if by_row else ELEMENTS_POS_WEIGHT if "pos_weight" in case.options else ELEMENTS
    for_value, for_gradient = table.get(backend, table["numpy"])
    in_sum = min(SUM, exact.summands - 1)
    return {
        "value": _worse(
            _compare(case, exact.value, result["value"], for_value + in_sum, backend, "value_and_grad"),
            _compare(case, exact.value, result["value_recorded"], for_value + in_sum, backend, "the loss"),
        ),
        "gradient": _worse(
            _compare(case, exact.gradient_of_sum, result["closed_form"], for_gradient, backend, "value_and_grad"),
            _compare(case, exact.gradient, result["gradient"], for_gradient, backend, "autodiff")
            if "gradient" in result
            else Verdict(),
        ),
    }


def _worse(*verdicts: Verdict) -> Verdict:
    return max(verdicts, key=lambda verdict: (bool(verdict.failure), verdict.ulp))


def _compare(case: Case, exact: list[Exact], got: list[str], bound: float, backend: str, how: str) -> Verdict:
    bits, low = DTYPES[case.dtype]
    worst = Verdict(bound=bound)
    for i, (right, text) in enumerate(zip(exact, got, strict=True)):
        with mp.workprec(200):
            ulp, limit = _error(right, mp.mpf(float.fromhex(text)), bits, low, LARGEST[case.dtype], bound)
            if ulp > limit and not (backend in FLUSH and _flushed(case, right, float.fromhex(text), low)):
                failure = f"{how}, element {i}: {float.fromhex(text)!r}, right is {mp.nstr(right.value, 17)}"
                if not worst.failure or ulp > worst.ulp:
                    worst = Verdict(float(ulp), float(limit), failure)
            elif not worst.failure and limit > 0 and limit >= ulp > worst.ulp:
                worst = Verdict(float(ulp), float(limit))
    return worst


def _error(right: Exact, got: Any, bits: int, low: int, largest: float, bound: float) -> tuple[Any, Any]:
    """The error in ULP, and what is allowed."""
    value, terms, shift = right
    limit = mp.mpf(bound)
    if mp.isnan(value) or mp.isnan(got):
        return (mp.mpf(0) if mp.isnan(value) and mp.isnan(got) else mp.inf), limit
    if mp.isinf(value) or mp.isinf(got):
        overflow = mp.isinf(got) and abs(value) > largest and mp.sign(got) == mp.sign(value)
        return (mp.mpf(0) if value == got or overflow else mp.inf), limit
    scale = max(abs(value), terms)
    if value != 0 and got == 0 and abs(value) >= mp.ldexp(1, low) and terms <= 2 * abs(value):
        return mp.inf, limit  # a normal number that became 0: no bound in ULP excuses it
    exponent = max(int(mp.floor(mp.log(scale, 2))), low) if scale > 0 else low
    ulp = mp.ldexp(1, exponent - bits + 1)
    return abs(got - value) / ulp, limit + shift * mp.ldexp(scale, 1 - bits) / ulp


def _flushed(case: Case, right: Exact, got: float, low: int) -> bool:
    """Whether subnormal numbers taken for 0 explain the error."""
    masses = 1.0
    for name in ("weight", "pos_weight", "sample_weight"):
        given = case.options.get(name)
        if given is not None:
            masses *= max(1.0, *given.values) if isinstance(given, Tensor) and given.values else 1.0
    return bool(abs(got - right.value) <= 4 * masses * mp.ldexp(1, low))
