"""Softmax and negative log-likelihood: a loss of mutually exclusive classes.

    L = -Σ_c z_c log p_c,    p = softmax x,    -log p_c = (m - x_c) + log(1 + s),    m = max x
    dL/dx_c = p_c Σ_k z_k - z_c
    d²L/dx_c² = p_c (1 - p_c) Σ_k z_k

x are the logits, z the target weights (targets.py: targets times weights). s sums exp(x_c - m) over all classes but the
largest; that one is the 1 in log(1 + s). So nothing overflows, and no digit is lost where one class has nearly all the
probability, nor where the logits are large. (Blanchard, Higham and Higham 2021, "Accurately computing the log-sum-exp
and softmax functions".)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import lengths
from ..namespace import Array, Namespace, Position
from .numerics import is_number, weigh_logits
from .targets import ClassIndex, Distribution, class_index, distribution
from .types import Form, Loss, Scaled


class Terms(NamedTuple):
    d: Array  # x - m
    e: Array  # exp d
    s: Array  # the sum of e over all classes but one of the largest


def terms(xp: Namespace, x: Array, weights: Distribution, *_: Any) -> Terms:
    return _terms(xp, x, weights.axis)


def _terms(xp: Namespace, x: Array, axis: int) -> Terms:
    is_max, d, e, others = _shifted(xp, x, xp.max(x, axis=axis, keepdims=True), axis)
    ties = xp.sum(xp.astype(is_max, x.dtype), axis=axis, keepdims=True) - 1
    return Terms(d, e, others + ties)


def _shifted(xp: Namespace, x: Array, m: Array, axis: int) -> tuple[Array, Array, Array, Array]:
    """Which x are the largest, x - m, its exponential, and the sum of that over the others."""
    is_max = x == m
    d = xp.where(is_max & (m == math.inf), 0.0, x - m)
    e = xp.exp(d)
    return is_max, d, e, xp.sum(xp.where(is_max, 0.0, e), axis=axis, keepdims=True)


def value(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    return _value(xp, weights, t.d, t.s)


def _value(xp: Namespace, weights: Distribution, log_ratio: Array, s: Array) -> Array:
    """`log_ratio` is log p + log(1 + s)."""
    z, axis = weights.z, weights.axis
    linear_term = xp.sum(xp.weigh(z, -log_ratio), axis=axis, keepdims=True)
    return linear_term + xp.sum(z, axis=axis, keepdims=True) * xp.log1p(s)


def gradient(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    # 1 - p directly: from p it would lose its digits where p is close to 1.
    return _gradient(xp, weights, t.e, (1 - t.e) + t.s) / (1 + t.s)


def _gradient(xp: Namespace, weights: Distribution, p: Array, q: Array) -> Array:
    """p_c Σ_k z_k - z_c without the cancellation: p_c times the other targets, less z_c times q_c = 1 - p_c."""
    z, axis = weights.z, weights.axis
    largest = xp.max(z, axis=axis, keepdims=True)
    is_max = z == largest
    ties = xp.sum(xp.astype(is_max, z.dtype), axis=axis, keepdims=True)
    rest = xp.sum(xp.where(is_max, 0.0, z), axis=axis, keepdims=True) + (ties - 1) * largest
    return p * ((largest - z) + rest) - z * q


def hessian(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    return _hessian(xp, weights, t.e / (1 + t.s), ((1 - t.e) + t.s) / (1 + t.s))


def _hessian(xp: Namespace, weights: Distribution, p: Array, q: Array) -> Array:
    return xp.sum(weights.z, axis=weights.axis, keepdims=True) * p * q


# Where elements can be looked up: both p_j and z_j may be close to 1 for the class of the largest logit, j, and there
# p Σ z - z would cancel: the gradient is p_j Σ_{k≠j} z_k - z_j s / (1 + s).


class LookedUpTerms(NamedTuple):
    d: Array
    e: Array  # exp d, and 0 at j
    s: Array
    at: Position  # of j
    z_j: Array
    rest: Array  # Σ_{k≠j} z_k


def looked_up_terms(xp: Namespace, x: Array, weights: Distribution, *_: Any) -> LookedUpTerms:
    z, axis = weights.z, weights.axis
    at = xp.position(x, xp.argmax(x, axis=axis, keepdims=True), axis)
    m = xp.take_along_axis(x, at, axis)
    d = xp.shifted(x, m)
    e = xp.put_along_axis(xp.exp(d), at, 0.0, axis)
    s, rest = (xp.sum(array, axis=axis, keepdims=True) for array in (e, xp.put_along_axis(z * 1, at, 0.0, axis)))
    if not xp.assume_finite:
        s = xp.where(~(m > -math.inf), math.nan, s)
    return LookedUpTerms(d, e, s, at, xp.take_along_axis(z, at, axis), rest)


def looked_up_value(xp: Namespace, t: LookedUpTerms, weights: Distribution) -> Array:
    return (t.z_j + t.rest) * xp.log1p(t.s) - xp.weighted_sum(weights.z, t.d, weights.axis)


def looked_up_gradient(xp: Namespace, t: LookedUpTerms, weights: Distribution) -> Array:
    p = xp.scale(t.e, (t.z_j + t.rest) / (1 + t.s))
    return xp.put_along_axis(p - weights.z, t.at, (t.rest - t.z_j * t.s) / (1 + t.s), weights.axis)


# For autodiff. A softmax stays the same if all logits are shifted by the same amount. So for a class that has more than
# half of the probability (confident), the others are shifted instead of it: `move` is 0, but carries its derivative,
# and p - 1 does not cancel.


class DifferentiableTerms(NamedTuple):
    d: Array
    e: Array
    others: Array  # the sum of e over all classes but the largest
    s: Array
    move: Array


def differentiable_terms(xp: Namespace, x: Array, weights: Distribution, *_: Any) -> DifferentiableTerms:
    return _differentiable_terms(xp, x, weights.axis)


def _differentiable_terms(xp: Namespace, x: Array, axis: int) -> DifferentiableTerms:
    m = xp.max(x, axis=axis, keepdims=True)
    m = xp.where(m == math.inf, m, xp.stop_gradient(m))  # all depends on an infinite logit: its derivative stays
    is_max, d, e, others = _shifted(xp, x, m, axis)
    # The number of ties less 1, as a sum of e, which has a derivative.
    s = others + (xp.sum(xp.where(is_max, e, 0.0), axis=axis, keepdims=True) - 1)
    confident = xp.stop_gradient(s) < 1
    move = xp.where(confident, xp.sum(xp.where(is_max, d, 0.0), axis=axis, keepdims=True), 0.0)
    others = others * xp.exp(-move)
    return DifferentiableTerms(d, e, others, xp.where(confident, others, s), move)


def differentiable_value(xp: Namespace, t: DifferentiableTerms, weights: Distribution) -> Array:
    return _value(xp, weights, _log_ratio(xp, t), t.s)


def _log_ratio(xp: Namespace, t: DifferentiableTerms) -> Array:
    return xp.where(t.e > t.s, 0.0, t.d - t.move)


def differentiable_gradient(xp: Namespace, t: DifferentiableTerms, weights: Distribution) -> Array:
    return _gradient(xp, weights, *_probabilities(xp, t))


def differentiable_hessian(xp: Namespace, t: DifferentiableTerms, weights: Distribution) -> Array:
    return _hessian(xp, weights, *_probabilities(xp, t))


def _probabilities(xp: Namespace, t: DifferentiableTerms) -> tuple[Array, Array]:
    """p and 1 - p, each computed directly where it is small."""
    confident = t.e > t.s
    p = xp.where(confident, 1.0, t.e * xp.exp(-t.move)) / (1 + t.s)
    return p, xp.where(confident, t.others / (1 + t.s), 1 - p)


# For class indices, where nothing is differentiated again. A class y of weight w, and u_c for all with smoothing:
#
#     L = w (m - x_y) + Σ_c u_c (m - x_c) + (w + U) log total,    total = Σ_c e_c,    e_c = exp(x_c - m),    U = Σ_c u_c
#     dL/dx_c = (w + U) e_c / total - u_c,    dL/dx_y = (U e_y - w rest) / total - u_y,    rest = total - e_y


class IndexTerms(NamedTuple):
    e: Array  # exp(x - m), and 0 at y
    e_y: Array
    rest: Array
    d_y: Array  # x_y - m
    apart: Array | None = None  # Σ u_c (m - x_c)
    share: Any = None  # Σ u_c


def index_terms(xp: Namespace, x: Array, weights: ClassIndex, *_: Any) -> IndexTerms:
    at, uniform, axis = weights.position, weights.uniform, weights.axis
    m, x_y = xp.max(x, axis=axis, keepdims=True), xp.take_along_axis(x, at, axis)
    d, d_y = xp.shifted(x, m), x_y - m
    if not xp.assume_finite:
        # inf - inf counts as 0. It stays NaN if m is NaN, or -inf: then no class is possible.
        d_y = xp.where((x_y == m) & (m == math.inf), 0.0, d_y)
    apart = share = None
    if uniform is not None:
        apart, share = _shared(xp, weights, d)
    e, e_y = xp.put_along_axis(xp.exp(d), at, 0.0, axis), xp.exp(d_y)
    return IndexTerms(e, e_y, xp.sum(e, axis=axis, keepdims=True), d_y, apart, share)


def _shared(xp: Namespace, weights: ClassIndex, d: Array) -> tuple[Array, Any]:
    """Σ u_c (m - x_c) and Σ u_c."""
    uniform, where, axis = weights.uniform, weights.where, weights.axis
    if where is not None:
        d = xp.where(where, d, 0.0)
    if is_number(uniform) or uniform.ndim == 0:
        share = uniform * lengths.count(xp, d, (axis,))
        if xp.assume_finite or is_number(uniform):  # not 0
            return -uniform * xp.sum(d, axis=axis, keepdims=True), share
        return xp.sum(xp.weigh(uniform * xp.ones_like(d), -d), axis=axis, keepdims=True), share
    return -xp.weighted_sum(uniform, d, axis), xp.sum(uniform, axis=axis, keepdims=True)


class NativeIndexTerms(NamedTuple):  # the same, of probabilities
    e: Array
    e_y: Array
    rest: Array


def native_index_terms(xp: Namespace, x: Array, weights: ClassIndex, *_: Any) -> NativeIndexTerms:
    at, axis = weights.position, weights.axis
    e = xp.softmax(x, axis)
    e_y = xp.take_along_axis(e, at, axis)
    e = xp.put_along_axis(e, at, 0.0, axis)
    return NativeIndexTerms(e, e_y, xp.sum(e, axis=axis, keepdims=True))


def index_value(xp: Namespace, t: IndexTerms, weights: ClassIndex) -> Array:
    # log(rest + e_y) - d_y. If y is the largest, e_y is 1 and d_y is 0; if not, rest is 1 or more.
    log_total = xp.log1p(t.rest + (t.e_y - 1))
    values = _weighted(xp, weights.weight, log_total - t.d_y)
    if t.apart is not None:
        values = _weighted(xp, weights.example, values + (t.apart + t.share * log_total))
    return values


def native_index_value(xp: Namespace, t: NativeIndexTerms, weights: ClassIndex) -> Array:
    # Where e_y is so small that its rounding would count, the quotient is infinite, and blocks.run computes again.
    return _weighted(xp, weights.weight, xp.log1p(t.rest / t.e_y))


def _weighted(xp: Namespace, weight: Array | None, values: Array) -> Array:
    return values if weight is None else weigh_logits(xp, weight, values)


def index_gradient(xp: Namespace, t: IndexTerms, weights: ClassIndex, scaled: Scaled) -> Array:
    weight, at, axis, total = weights.weight, weights.position, weights.axis, t.rest + t.e_y
    if t.apart is None:
        return xp.scale(xp.put_along_axis(t.e, at, -t.rest, axis), scaled(weight) / total)
    array = xp.scale(t.e, weight + t.share) - total * weights.uniform
    array = xp.put_along_axis(array, at, t.e_y * t.share - weight * t.rest - total * weights.uniform_y, axis)
    return xp.scale(array, scaled(weights.example) / total)


def index_hessian(xp: Namespace, t: IndexTerms, weights: ClassIndex) -> Array:
    """(w + U) p (1 - p). Of a class with more than half of the probability, 1 - p is the sum of others."""
    axis, total = weights.axis, t.rest + t.e_y
    major = xp.astype(t.e > total / 2, t.e.dtype)
    e = t.e - major  # 0 there, as it is the largest, and exp 0 is 1
    others = (xp.sum(e, axis=axis, keepdims=True) + t.e_y) / total
    array = xp.put_along_axis(e * (1 - e / total) + major * others, weights.position, t.e_y * (t.rest / total), axis)
    if t.apart is None:
        return xp.scale(array, (1.0 if weights.weight is None else weights.weight) / total)
    weight = weights.weight + t.share
    return xp.scale(array, (weight if weights.example is None else weight * weights.example) / total)


def native_index_gradient(xp: Namespace, t: NativeIndexTerms, weights: ClassIndex, scaled: Scaled) -> Array:
    array, factor = xp.put_along_axis(t.e, weights.position, -t.rest, weights.axis), scaled(weights.weight)
    # In long rows a native softmax does not sum to 1 exactly: the division puts that right.
    return xp.scale(array, factor if xp.extent(t.e, weights.axis) <= SHORT else factor / (t.rest + t.e_y))


SHORT = 64  # classes


SOFTMAX = Loss(
    "softmax_nll",
    per_example=True,
    takes="logits",
    fill=-math.inf,  # out of the softmax
    forms=(
        Form(
            distribution,
            differentiable_terms,
            differentiable_value,
            differentiable_gradient,
            differentiable_hessian,
            needs="autodiff",
        ),
        Form(
            class_index,
            native_index_terms,
            native_index_value,
            native_index_gradient,
            scales=True,
            needs="softmax",
            of_one_class=True,
        ),
        Form(class_index, index_terms, index_value, index_gradient, index_hessian, scales=True, of_indices=True),
        Form(distribution, looked_up_terms, looked_up_value, looked_up_gradient, needs="argmax"),
        Form(distribution, terms, value, gradient, hessian),
    ),
)


def softmax(xp: Namespace, x: Array) -> Array:
    if "autodiff" in xp.groups:
        return _probabilities(xp, _differentiable_terms(xp, x, -1))[0]
    _, e, s = _terms(xp, x, -1)
    return e / (1 + s)


def log_softmax(xp: Namespace, x: Array) -> Array:
    if "autodiff" in xp.groups:
        t = _differentiable_terms(xp, x, -1)
        return _log_ratio(xp, t) - xp.log1p(t.s)
    d, _, s = _terms(xp, x, -1)
    return d - xp.log1p(s)
