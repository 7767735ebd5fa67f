"""When a number is right: within a bound in ULP of the exact one, the ULP taken at the larger of result and terms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mpmath import mp

from .cases import DTYPES, GRADIENTS, LARGEST, LOSSES, Case, Tensor
from .oracle import Exact, Expected

# ULP for (value, gradient), as measured with each framework's exp and log1p. Other backends get NumPy's bounds.
ELEMENTS = {"numpy": (4, 4), "torch": (3, 3), "jax": (4, 3), "tensorflow": (6, 4)}
ELEMENTS_POS_WEIGHT = {"numpy": (6, 5), "torch": (4, 4), "jax": (6, 4), "tensorflow": (6, 4)}
PER_EXAMPLE = {"numpy": (5, 7), "torch": (5, 6), "jax": (5, 7), "tensorflow": (6, 7)}
FACTOR = 1  # more for each factor beside the loss: a weight, a sample weight, an incoming gradient
HESSIAN = 2  # more for the Hessian diagonal: its products have one factor more than the gradient's
SUM = 20  # more for a sum or a mean of many numbers, and for a row of more than LONG classes
LONG = 4096
HALF = 0.51  # the bound for float16 and bfloat16, which are computed in float32 and rounded once
SCALED = 2  # more for the gradients by a linear layer's inputs, which may be divided after they are added up
WITH_COTANGENT = ("autodiff", "autodiff, the others frozen")  # ways to a gradient; others have that of the sum
FLUSH = ("torch", "jax", "tensorflow")  # these may flush subnormal numbers to 0, intermediate results too


class Verdict(NamedTuple):
    """How one quantity compares: the worst error in ULP, what was allowed there, and where it failed, if it did."""

    ulp: float = 0.0
    bound: float = 0.0
    how: str = ""  # which computation of it failed
    element: int = -1
    got: str = ""
    right: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.how)

    def __str__(self) -> str:
        return f"{self.how}, element {self.element}: {self.got}, right is {self.right}" if self.failed else "right"


def judge(case: Case, exact: Expected, numbers: dict[str, dict[str, list[str]]], backend: str) -> dict[str, Verdict]:
    """A verdict on each quantity (value, gradients, hessian) that a backend computed, in one way or several."""
    per_example = LOSSES[case.loss].per_example
    shape, half = case.shape, case.dtype in ("float16", "bfloat16")
    table = PER_EXAMPLE if per_example else ELEMENTS_POS_WEIGHT if "pos_weight" in case.options else ELEMENTS
    value, gradient = table.get(backend, table["numpy"])
    factors = FACTOR * len({"weight", "sample_weight"} & case.options.keys())
    value, gradient = value + factors, gradient + factors + FACTOR
    long = SUM if per_example and math.prod(shape) > LONG else 0
    reduced = min(SUM, exact.summands - 1)
    bounds: dict[str, float] = {
        "value": value + long + reduced,
        "gradient": gradient + long,
        "hessian": gradient + long + HESSIAN,
        # With class weights the divisor depends on the targets, and so the mean is in their gradient.
        "target_gradient": value + long + FACTOR + (reduced if "weight" in case.options else 0),
    }
    sums: dict[str, float] = {}
    if case.linear_weight is not None:
        # Sums of products with the logits' gradients, which may be as far off as ever. In epsilons of the terms: each
        # of the n numbers that are added up is rounded n times or less, by half of one.
        by_class, by_example = (gradient + long + SCALED + n / 2 for n in (shape[-1], math.prod(shape[:-1])))
        sums = {"gradient": by_class, "linear_weight_gradient": by_example, "linear_bias_gradient": by_example}
        bounds |= dict.fromkeys(sums, 1)
    if half:
        bounds = dict.fromkeys(bounds, HALF)
    verdicts = {}
    for quantity, ways in numbers.items():
        compared = []
        for how, got in ways.items():
            of_sum = quantity in GRADIENTS.values() and how not in WITH_COTANGENT
            answers = getattr(exact, f"{quantity}_of_sum" if of_sum else quantity)
            if quantity == "target_gradient" and not answers:
                continue  # the loss is infinite
            compared.append(_compare(case, answers, got, bounds[quantity], sums.get(quantity, 0), backend, how))
        if compared:
            verdicts[quantity] = max(compared, key=lambda verdict: (verdict.failed, verdict.ulp))
    return verdicts


def _compare(
    case: Case, exact: list[Exact], got: list[str], bound: float, of_sum: float, backend: str, how: str
) -> Verdict:
    bits, low = DTYPES[case.dtype]
    worst = Verdict(bound=bound)
    seen = set()  # large cases repeat a few different numbers
    for i, (right, text) in enumerate(zip(exact, got, strict=True)):
        if (id(right), text) in seen:
            continue
        seen.add((id(right), text))
        with mp.workprec(200):
            ulp, limit = _error(right, mp.mpf(float.fromhex(text)), bits, low, LARGEST[case.dtype], bound, of_sum)
            if ulp > limit and not (backend in FLUSH and _flushed(case, right, float.fromhex(text), low)):
                if not worst.failed or ulp > worst.ulp:
                    answer = mp.nstr(right.value, 17)
                    worst = Verdict(float(ulp), float(limit), how, i, repr(float.fromhex(text)), answer)
            elif not worst.failed and limit >= ulp > worst.ulp:
                worst = Verdict(float(ulp), float(limit))
    return worst


def _error(right: Exact, got: Any, bits: int, low: int, largest: float, bound: float, of_sum: float) -> tuple[Any, Any]:
    """The error in ULP, and the largest that is allowed: `bound`, and `of_sum` epsilons of the computing dtype."""
    value, terms, shift = right
    limit = mp.mpf(bound)
    if mp.isnan(value) or mp.isnan(got):
        return (mp.mpf(0) if mp.isnan(value) and mp.isnan(got) else mp.inf), limit
    if mp.isinf(value) or mp.isinf(got):
        overflow = mp.isinf(got) and abs(value) > largest and mp.sign(got) == mp.sign(value)
        return (mp.mpf(0) if value == got or overflow else mp.inf), limit
    scale = max(abs(value), terms)
    if value != 0 and got == 0 and abs(value) >= mp.ldexp(1, low) and terms <= 2 * abs(value):
        return mp.inf, limit  # 0 in place of a normal number is wrong, whatever the bound in ULP
    exponent = max(int(mp.floor(mp.log(scale, 2))), low) if scale > 0 else low
    ulp = mp.ldexp(1, exponent - bits + 1)
    # Half precision is computed in float32, where the rounding of the shift is too small to see in the result.
    allowed = shift * mp.ldexp(scale, 1 - bits) if bits >= 24 else mp.mpf(0)
    allowed += of_sum * mp.ldexp(scale, 1 - max(bits, 24))
    return abs(got - value) / ulp, limit + allowed / ulp


def _flushed(case: Case, right: Exact, got: float, low: int) -> bool:
    """Whether subnormal numbers flushed to 0 explain the error."""
    weights = 1.0
    for name in ("weight", "pos_weight", "sample_weight"):
        given = case.options.get(name)
        if given is not None:
            weights *= max([1.0, *(given.values if isinstance(given, Tensor) else [given])])
    return bool(abs(got - right.value) <= 4 * weights * mp.ldexp(1, low))
