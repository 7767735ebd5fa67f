"""The losses on probabilities and on log-probabilities. Probabilities are clamped from below by eps.

Binary cross-entropy, of independent classes:

    L = -negative · log max(1 - p, eps) - positive · log max(p, eps)
    dL/dp = negative / (1 - p) - positive / p
    d²L/dp² = negative / (1 - p)² + positive / p²

Cross-entropy, of mutually exclusive classes, and the same on log-probabilities:

    L = -Σ_c z_c log max(p_c, eps)        L = -Σ_c z_c l_c
    dL/dp_c = -z_c / p_c                  dL/dl_c = -z_c
    d²L/dp_c² = z_c / p_c²                d²L/dl_c² = 0

A derivative is 0 where p is clamped.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..namespace import Array, Namespace
from .numerics import is_number
from .targets import ClassIndex, Distribution, Elementwise, class_index, distribution, elementwise
from .types import Form, Loss, Options, Scaled


class BinaryTerms(NamedTuple):
    p: Array
    q: Array  # 1 - p
    p_free: Array  # True where the clamp leaves p alone, and so has a derivative
    q_free: Array  # the same for q
    negative: Array
    floor: float


def binary_terms(xp: Namespace, p: Array, weights: Elementwise, options: Options) -> BinaryTerms:
    negative, positive, *_ = weights
    negative = 1 - positive if negative is None else negative
    q = 1 - p
    p_free, q_free = _free(xp, p, positive, options.eps), _free(xp, q, negative, options.eps)
    return BinaryTerms(p, q, p_free, q_free, negative, _log(options.eps))


def binary_value(xp: Namespace, t: BinaryTerms, weights: Elementwise) -> Array:
    if xp.assume_finite:
        floor = xp.asarray(t.floor, dtype=t.p.dtype)
        log_p, log_q = xp.maximum(xp.log(t.p), floor), xp.maximum(xp.log1p(-t.p), floor)
        return 0.0 - (xp.multiply(log_q, t.negative) + xp.multiply(log_p, weights.positive))  # not -0
    log_p = _clamped_log(xp, t.p, t.p_free, t.floor)
    log_q = xp.where(t.q_free, xp.log_complement(xp.where(t.q_free, t.p, 0.0)), t.floor + 0 * t.p)
    return xp.weigh(t.negative, -log_q) + xp.weigh(weights.positive, -log_p)


def binary_gradient(xp: Namespace, t: BinaryTerms, weights: Elementwise) -> Array:
    return _quotient(xp, t.negative, t.q, t.q_free) - _quotient(xp, weights.positive, t.p, t.p_free)


def binary_hessian(xp: Namespace, t: BinaryTerms, weights: Elementwise) -> Array:
    by_q = _quotient(xp, _quotient(xp, t.negative, t.q, t.q_free), t.q, t.q_free)
    return by_q + _quotient(xp, _quotient(xp, weights.positive, t.p, t.p_free), t.p, t.p_free)


class Terms(NamedTuple):
    p: Array
    free: Array  # True where the clamp leaves p alone, and so has a derivative
    floor: float


def terms(xp: Namespace, p: Array, weights: Distribution, options: Options) -> Terms:
    return Terms(p, _free(xp, p, weights.z, options.eps), _log(options.eps))


def value(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    log_p = _clamped_log(xp, t.p, t.free, t.floor)
    return xp.sum(xp.weigh(weights.z, -log_p), axis=weights.axis, keepdims=True)


def gradient(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    return -_quotient(xp, weights.z, t.p, t.free)


def hessian(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    return _quotient(xp, _quotient(xp, weights.z, t.p, t.free), t.p, t.free)


def log_terms(xp: Namespace, log_p: Array, *_: Any) -> Array:
    return log_p


def log_value(xp: Namespace, log_p: Array, weights: Distribution) -> Array:
    return xp.sum(xp.weigh(weights.z, -log_p), axis=weights.axis, keepdims=True)


def log_gradient(xp: Namespace, log_p: Array, weights: Distribution) -> Array:
    return -weights.z


def log_hessian(xp: Namespace, log_p: Array, weights: Distribution) -> Array:
    return 0 * weights.z


# For class indices, neither smoothed nor masked: of each example one number is looked up.


class IndexTerms(NamedTuple):
    p: Array
    p_y: Array
    free: Array  # True where the clamp leaves p_y alone
    weight: Array
    floor: float


def index_terms(xp: Namespace, p: Array, weights: ClassIndex, options: Options) -> IndexTerms:
    p_y = xp.take_along_axis(p, weights.position, weights.axis)
    weight = xp.ones_like(p_y) if weights.weight is None else weights.weight
    return IndexTerms(p, p_y, _free(xp, p_y, weight, options.eps), weight, _log(options.eps))


def index_value(xp: Namespace, t: IndexTerms, weights: ClassIndex) -> Array:
    values = xp.weigh(t.weight, -_clamped_log(xp, t.p_y, t.free, t.floor))
    return _nan_like(xp, values, t.p, weights)


def index_gradient(xp: Namespace, t: IndexTerms, weights: ClassIndex, scaled: Scaled) -> Array:
    zeros = xp.zeros_like(t.p) if xp.assume_finite else t.p - t.p  # not 0 * p, which inductor takes for 0
    return _at_index(xp, zeros, weights, scaled(-_quotient(xp, t.weight, t.p_y, t.free)))


class LogIndexTerms(NamedTuple):
    log_p: Array
    log_p_y: Array


def log_index_terms(xp: Namespace, log_p: Array, weights: ClassIndex, *_: Any) -> LogIndexTerms:
    return LogIndexTerms(log_p, xp.take_along_axis(log_p, weights.position, weights.axis))


def log_index_value(xp: Namespace, t: LogIndexTerms, weights: ClassIndex) -> Array:
    values = -t.log_p_y if weights.weight is None else xp.weigh(weights.weight, -t.log_p_y)
    return _nan_like(xp, values, t.log_p, weights)


def log_index_gradient(xp: Namespace, t: LogIndexTerms, weights: ClassIndex, scaled: Scaled) -> Array:
    at_y = -scaled(weights.weight)
    if not (is_number(at_y) or at_y.ndim):  # one for all examples
        at_y = at_y * xp.ones_like(t.log_p_y)
    return _at_index(xp, xp.zeros_like(t.log_p), weights, at_y)


def _at_index(xp: Namespace, zeros: Array, weights: ClassIndex, at_y: Any) -> Array:
    """The gradient, of which this is the number at the class y."""
    if not (weights.weight is None or xp.assume_finite):  # NaN for an example whose weight is
        zeros = zeros + (weights.weight - weights.weight)
    return xp.put_along_axis(zeros, weights.position, at_y, weights.axis)


def _nan_like(xp: Namespace, values: Array, x: Array, weights: ClassIndex) -> Array:
    """NaN where an example has a NaN in any class, as with the same targets one-hot."""
    if xp.assume_finite:
        return values + 0 * xp.sum(x)
    return xp.where(xp.has_nan(x, weights.axis), math.nan, values)


def _free(xp: Namespace, p: Array, weight: Array, eps: float) -> Array:
    """Where the logarithm of p counts: neither clamped, nor of a 0 that has no weight."""
    clamped = p < eps
    return ~(clamped if eps > 0 else xp.logical_or(clamped, xp.logical_and(p == 0, weight == 0)))


def _clamped_log(xp: Namespace, p: Array, free: Array, floor: float) -> Array:
    """log p where p is free, else the floor, whose derivative is 0 but for NaN, which a wrong index makes."""
    return xp.where(free, xp.log(xp.where(free, p, 1.0)), floor + 0 * p)


def _quotient(xp: Namespace, weight: Array, p: Array, free: Array) -> Array:
    """weight / p where p is free, else 0; NaN wherever the weight is."""
    return weight / xp.where(free, p, math.inf)


def _log(eps: float) -> float:
    return math.log(eps) if eps > 0 else -math.inf


BINARY = Loss(
    "binary_cross_entropy",
    per_example=False,
    takes="probs",
    fill=0.0,
    forms=(Form(elementwise, binary_terms, binary_value, binary_gradient, binary_hessian),),
)
CATEGORICAL = Loss(
    "cross_entropy",
    per_example=True,
    takes="probs",
    fill=0.0,
    forms=(
        Form(
            class_index,
            index_terms,
            index_value,
            index_gradient,
            scales=True,
            needs="indexing",
            of_one_class=True,
            sparse=True,
        ),
        Form(distribution, terms, value, gradient, hessian),
    ),
)
NLL = Loss(
    "nll",
    per_example=True,
    takes="log_probs",
    fill=0.0,
    forms=(
        Form(
            class_index,
            log_index_terms,
            log_index_value,
            log_index_gradient,
            scales=True,
            needs="indexing",
            of_one_class=True,
            sparse=True,
        ),
        Form(distribution, log_terms, log_value, log_gradient, log_hessian),
    ),
)
