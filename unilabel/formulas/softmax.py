"""Softmax and negative log-likelihood: a loss of mutually exclusive classes.

    L = -Σ_c z_c log p_c,    p = softmax x,    -log p_c = (m - x_c) + log(1 + s),    m = max x
    dL/dx_c = p_c Σ_k z_k - z_c
    d²L/dx_c² = p_c (1 - p_c) Σ_k z_k

s sums exp(x_c - m) over all classes but the largest, whose 1 stands in the logarithm. So nothing overflows, and no
digit is lost where one class has nearly all the probability, nor where the logits are large. (Blanchard, Higham and
Higham 2021, "Accurately computing the log-sum-exp and softmax functions".)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..namespace import Array, Namespace
from .numerics import weigh_logits
from .targets import ClassIndex, Distribution, class_index, distribution
from .types import Form, Loss


class Terms(NamedTuple):
    d: Array  # x - m
    e: Array  # exp d
    s: Array  # the sum of e over all classes but one of the largest


def terms(xp: Namespace, x: Array, *_: Any) -> Terms:
    top, d, e, others = _shifted(xp, x, xp.max(x, axis=-1, keepdims=True))
    ties = xp.sum(xp.astype(top, x.dtype), axis=-1, keepdims=True) - 1
    return Terms(d, e, others + ties)


def _shifted(xp: Namespace, x: Array, m: Array) -> tuple[Array, Array, Array, Array]:
    """Which x are the largest, x - m, its exponential, and the sum of that over the others."""
    top = x == m
    d = xp.where(top & (m == math.inf), 0.0, x - m)
    e = xp.exp(d)
    return top, d, e, xp.sum(xp.where(top, 0.0, e), axis=-1, keepdims=True)


def value(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    return _value(xp, weights.z, t.d, t.s)


def _value(xp: Namespace, z: Array, log_ratio: Array, s: Array) -> Array:
    """`log_ratio` is log p + log(1 + s)."""
    linear_term = xp.sum(xp.weigh(z, -log_ratio), axis=-1)
    return linear_term + xp.sum(z, axis=-1) * xp.squeeze(xp.log1p(s), axis=-1)


def gradient(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    # 1 - p not by way of p, which is close to 1 where it is small.
    return _gradient(xp, weights.z, t.e, (1 - t.e) + t.s) / (1 + t.s)


def _gradient(xp: Namespace, z: Array, p: Array, q: Array) -> Array:
    """p_c Σ_k z_k - z_c without the cancellation: p_c times the other targets, less z_c times q_c = 1 - p_c."""
    largest = xp.max(z, axis=-1, keepdims=True)
    top = z == largest
    ties = xp.sum(xp.astype(top, z.dtype), axis=-1, keepdims=True)
    rest = xp.sum(xp.where(top, 0.0, z), axis=-1, keepdims=True) + (ties - 1) * largest
    return p * ((largest - z) + rest) - z * q


def hessian(xp: Namespace, t: Terms, weights: Distribution) -> Array:
    return _hessian(xp, weights.z, t.e / (1 + t.s), ((1 - t.e) + t.s) / (1 + t.s))


def _hessian(xp: Namespace, z: Array, p: Array, q: Array) -> Array:
    return xp.sum(z, axis=-1, keepdims=True) * p * q


# For autodiff. Moving one logit is moving all the others the other way. Where a class has more than half of the
# probability (it is confident), this is how it moves: by `move`, which is 0, and its own e has no derivative that p - 1
# could cancel with.


class DifferentiableTerms(NamedTuple):
    d: Array
    e: Array
    others: Array  # the sum of e over all classes but the largest
    s: Array
    move: Array


def differentiable_terms(xp: Namespace, x: Array, *_: Any) -> DifferentiableTerms:
    m = xp.max(x, axis=-1, keepdims=True)
    m = xp.where(m == math.inf, m, xp.stop_gradient(m))  # an infinite logit takes all: the others' loss is its own
    top, d, e, others = _shifted(xp, x, m)
    s = others + (xp.sum(xp.where(top, e, 0.0), axis=-1, keepdims=True) - 1)  # how many are largest, with a derivative
    confident = xp.stop_gradient(s) < 1
    move = xp.where(confident, xp.sum(xp.where(top, d, 0.0), axis=-1, keepdims=True), 0.0)
    others = others * xp.exp(-move)
    return DifferentiableTerms(d, e, others, xp.where(confident, others, s), move)


def differentiable_value(xp: Namespace, t: DifferentiableTerms, weights: Distribution) -> Array:
    return _value(xp, weights.z, _log_ratio(xp, t), t.s)


def _log_ratio(xp: Namespace, t: DifferentiableTerms) -> Array:
    return xp.where(t.e > t.s, 0.0, t.d - t.move)


def differentiable_gradient(xp: Namespace, t: DifferentiableTerms, weights: Distribution) -> Array:
    return _gradient(xp, weights.z, *_probabilities(xp, t))


def differentiable_hessian(xp: Namespace, t: DifferentiableTerms, weights: Distribution) -> Array:
    return _hessian(xp, weights.z, *_probabilities(xp, t))


def _probabilities(xp: Namespace, t: DifferentiableTerms) -> tuple[Array, Array]:
    """p and 1 - p, neither by way of the other where it is small."""
    confident = t.e > t.s
    p = xp.where(confident, 1.0, t.e * xp.exp(-t.move)) / (1 + t.s)
    return p, xp.where(confident, t.others / (1 + t.s), 1 - p)


# Where one class, t, carries all of an example's loss, with nothing to derive again:
#
#     L = w log(1 + s / e_t),    s = Σ_{c≠t} e_c,    e_c = exp(x_c - m)
#     dL/dx = w (e_c, and -s at t) / (s + e_t)


class IndexTerms(NamedTuple):
    e: Array  # exp(x - m), or a multiple of it, and 0 at t
    e_t: Array
    s: Array
    d_t: Array  # x_t - m


def index_terms(xp: Namespace, x: Array, weights: ClassIndex, *_: Any) -> IndexTerms:
    at = weights.position
    m, x_t = xp.max(x, axis=-1, keepdims=True), xp.expand_dims(xp.take_along_axis(x, at), axis=-1)
    if xp.assume_finite:
        d, d_t = x - m, x_t - m
    else:
        # inf - inf, which is NaN, is 0 here; -inf less -inf stays so: then no class can be.
        d, d_t = xp.where(x == math.inf, 0.0, x - m), xp.where(x_t == math.inf, 0.0, x_t - m)
    d_t = xp.squeeze(d_t, axis=-1)
    e, e_t = xp.put_along_axis(xp.exp(d), at, 0.0), xp.exp(d_t)
    return IndexTerms(e, e_t, xp.sum(e, axis=-1), d_t)


class NativeIndexTerms(NamedTuple):  # the same, of probabilities
    e: Array
    e_t: Array
    s: Array


def native_index_terms(xp: Namespace, x: Array, weights: ClassIndex, *_: Any) -> NativeIndexTerms:
    at, e = weights.position, xp.softmax(x)
    e_t = xp.take_along_axis(e, at)
    e = xp.put_along_axis(e, at, 0.0)
    return NativeIndexTerms(e, e_t, xp.sum(e, axis=-1))


def index_value(xp: Namespace, t: IndexTerms, weights: ClassIndex) -> Array:
    # log(s + e_t) - d_t. If t is the largest, e_t is 1 and d_t is 0; if not, s is 1 or more.
    return _weighted(xp, weights, xp.log1p(t.s + (t.e_t - 1)) - t.d_t)


def native_index_value(xp: Namespace, t: NativeIndexTerms, weights: ClassIndex) -> Array:
    # Where e_t has lost more digits than a logarithm can do without, s / e_t is infinite.
    return _weighted(xp, weights, xp.log1p(t.s / t.e_t))


def _weighted(xp: Namespace, weights: ClassIndex, values: Array) -> Array:
    return values if weights.weight is None else weigh_logits(xp, weights.weight, values)


def index_gradient(xp: Namespace, t: IndexTerms | NativeIndexTerms, weights: ClassIndex) -> Array:
    return xp.put_along_axis(t.e, weights.position, -t.s)


def index_scale(xp: Namespace, t: IndexTerms | NativeIndexTerms, weights: ClassIndex) -> Array:
    # Probabilities add up to 1 but for the digits that a native softmax loses in long rows: these are put right, too.
    return (1 if weights.weight is None else weights.weight) / (t.s + t.e_t)


SOFTMAX = Loss(
    "softmax_nll",
    per_example=True,
    takes="logits",
    masked=-math.inf,  # out of the softmax
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
            index_gradient,
            scale=index_scale,
            needs="softmax",
            of_one_class=True,
        ),
        Form(class_index, index_terms, index_value, index_gradient, scale=index_scale, of_one_class=True),
        Form(distribution, terms, value, gradient, hessian),
    ),
)


def softmax(xp: Namespace, x: Array) -> Array:
    if "autodiff" in xp.groups:
        return _probabilities(xp, differentiable_terms(xp, x))[0]
    _, e, s = terms(xp, x)
    return e / (1 + s)


def log_softmax(xp: Namespace, x: Array) -> Array:
    if "autodiff" in xp.groups:
        t = differentiable_terms(xp, x)
        return _log_ratio(xp, t) - xp.log1p(t.s)
    d, _, s = terms(xp, x)
    return d - xp.log1p(s)
