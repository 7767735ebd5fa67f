"""The multilabel logistic loss: a sigmoid and a binary cross-entropy for each class.

    L = negative · log(1 + exp x) + positive · log(1 + exp -x),    negative = w (1 - z),    positive = w pos_weight z
    dL/dx = negative · σ(x) - positive · σ(-x)
    d²L/dx² = (negative + positive) · σ(x) σ(-x)

Both logarithms have the term log(1 + exp -|x|), which neither overflows nor loses digits, and besides the larger of
two numbers: log(1 + exp x) = max(x, 0) + log1p(exp -|x|). Likewise σ(x) = exp min(x, 0) / (1 + exp -|x|).
(Mächler 2012, "Accurately computing log(1 - exp(-|a|))", section 3, does it by cases; one form serves them all.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..namespace import Array, Namespace
from .numerics import weigh_logits
from .targets import Elementwise, elementwise
from .types import Form, Loss


class Terms(NamedTuple):
    x: Array
    up: Array  # 1 where x >= 0, else 0
    e: Array  # exp -|x|


def terms(xp: Namespace, x: Array, *_: Any) -> Terms:
    return Terms(x, xp.heaviside(x), xp.exp(-xp.abs(x)))


def value(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    negative, positive, total, *_ = weights
    log_term = xp.log1p(t.e)
    # negative · max(x, 0) + positive · max(-x, 0)
    weight = t.up - positive if negative is None else t.up * negative - (1 - t.up) * positive
    return weigh_logits(xp, weight, t.x) + (log_term if total is None else log_term * total)


def gradient(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    return _gradient(t, weights, xp.maximum(t.up, t.e), xp.maximum(1 - t.up, t.e))  # 1 on one side, e on the other


def _gradient(t: Terms, weights: Elementwise, e_up: Array, e_down: Array) -> Array:
    """`e_up` and `e_down` are exp min(x, 0) and exp min(-x, 0)."""
    negative, positive, *_ = weights
    return ((1 - positive if negative is None else negative) * e_up - positive * e_down) / (1 + t.e)


def hessian(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    product = t.e / ((1 + t.e) * (1 + t.e))  # σ(x) σ(-x)
    return product if weights.total is None else weights.total * product


# For autodiff: of arithmetic alone, which differentiates right at x = 0, where abs and maximum do not.


def differentiable_terms(xp: Namespace, x: Array, *_: Any) -> Terms:
    up = xp.heaviside(x)
    return Terms(x, up, xp.exp(-xp.multiply(x, 2 * up - 1)))


def differentiable_gradient(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    down = 1 - t.up
    return _gradient(t, weights, t.up + down * t.e, t.up * t.e + down)


# With the namespace's own sigmoid, softplus and lerp.


class NativeTerms(NamedTuple):
    x: Array
    minus: Array


def native_terms(xp: Namespace, x: Array, *_: Any) -> NativeTerms:
    return NativeTerms(x, -x)


def native_value(xp: Namespace, t: NativeTerms, weights: Elementwise) -> Array:
    negative, positive, total, *_ = weights
    log_term = xp.softplus(xp.minimum(t.x, t.minus))
    above, below = xp.relu(t.x), xp.relu(t.minus)
    if negative is None and xp.assume_finite:
        return log_term + xp.lerp(above, below, positive)
    negative = 1 - positive if negative is None else negative
    linear_term = weigh_logits(xp, negative, above) + weigh_logits(xp, positive, below)
    return linear_term + (log_term if total is None else log_term * total)


def native_gradient(xp: Namespace, t: NativeTerms, weights: Elementwise) -> Array:
    negative, positive, *_ = weights
    p, q = xp.sigmoid(t.x), xp.sigmoid(t.minus)
    return xp.lerp(p, -q, positive) if negative is None else negative * p - positive * q


LOGISTIC = Loss(
    "multilabel_logistic_loss",
    per_example=False,
    takes="logits",
    masked=0.0,
    forms=(
        Form(elementwise, native_terms, native_value, native_gradient, needs="sigmoid"),
        Form(elementwise, differentiable_terms, value, differentiable_gradient, hessian, needs="autodiff"),
        Form(elementwise, terms, value, gradient, hessian),
    ),
)


def sigmoid(xp: Namespace, x: Array) -> Array:
    """σ(x) = exp min(x, 0) / (1 + exp -|x|)"""
    if "sigmoid" in xp.groups:
        return xp.sigmoid(x)
    _, up, e = _terms(xp, x)
    return (up + (1 - up) * e) / (1 + e)


def log_sigmoid(xp: Namespace, x: Array) -> Array:
    """log σ(x) = min(x, 0) - log(1 + exp -|x|)"""
    if "sigmoid" in xp.groups:
        return -xp.softplus(-x)
    _, up, e = _terms(xp, x)
    return xp.weigh(1 - up, x) - xp.log1p(e)


def _terms(xp: Namespace, x: Array) -> Terms:
    return (differentiable_terms if "autodiff" in xp.groups else terms)(xp, x)
