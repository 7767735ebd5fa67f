"""The multilabel logistic loss: a sigmoid and a binary cross-entropy for each class.

    L = negative · log(1 + exp x) + positive · log(1 + exp -x),    negative = w (1 - z),    positive = w pos_weight z
    dL/dx = negative · σ(x) - positive · σ(-x)
    d²L/dx² = (negative + positive) · σ(x) σ(-x)

x are the logits, z the targets, w the weights. Both logarithms are max(±x, 0) plus log1p(exp -|x|), which neither
overflows nor loses digits: log(1 + exp x) = max(x, 0) + log1p(exp -|x|).
Likewise σ(x) = exp min(x, 0) / (1 + exp -|x|).
(Mächler 2012, "Accurately computing log(1 - exp(-|a|))", section 3, does it by cases; one form serves them all.)

Of the forms listed at the end, the first whose functions the namespace has is computed (reduce.form_of).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..namespace import Array, Namespace
from .numerics import weigh_logits
from .targets import Elementwise, Labels, elementwise, labels
from .types import Form, Loss


class Terms(NamedTuple):
    x: Array
    nonneg: Array  # 1 where x >= 0, else 0
    e: Array  # exp -|x|


def terms(xp: Namespace, x: Array, *_: Any) -> Terms:
    return Terms(x, xp.heaviside(x), xp.exp(-xp.abs(x)))


def value(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    negative, positive, total, *_ = weights
    log_term = xp.log1p(t.e)
    # negative · max(x, 0) + positive · max(-x, 0)
    weight = t.nonneg - positive if negative is None else t.nonneg * negative - (1 - t.nonneg) * positive
    return xp.weigh_beside(weight, t.x) + (log_term if total is None else log_term * total)


def gradient(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    negative, positive, *_ = weights
    minor = (1 - 2 * t.nonneg) * (t.e / (1 + t.e))  # σ(x) is this if it is below 1/2, and else 1 and this
    if negative is None:
        return (t.nonneg - positive) + minor
    return negative * (t.nonneg + minor) - positive * ((1 - t.nonneg) - minor)


def hessian(xp: Namespace, t: Terms, weights: Elementwise) -> Array:
    total = 1 + t.e
    product = t.e / (total * total)  # σ(x) σ(-x)
    return product if weights.total is None else weights.total * product


# For autodiff: arithmetic alone, as the derivative of abs is wrong at x = 0.


def differentiable_terms(xp: Namespace, x: Array, *_: Any) -> Terms:
    nonneg = xp.heaviside(x)
    return Terms(x, nonneg, xp.exp(-xp.multiply(x, 2 * nonneg - 1)))


# With the namespace's own sigmoid, softplus and lerp.


class NativeTerms(NamedTuple):
    x: Array
    neg_x: Array


def native_terms(xp: Namespace, x: Array, *_: Any) -> NativeTerms:
    return NativeTerms(x, -x)


def native_value(xp: Namespace, t: NativeTerms, weights: Elementwise) -> Array:
    negative, positive, total, *_ = weights
    log_term = xp.softplus(-xp.abs(t.x))
    if negative is None and not xp.assume_finite:
        return log_term + xp.weigh_beside(xp.heaviside(t.x) - positive, t.x)
    above, below = xp.relu(t.x), xp.relu(t.neg_x)
    if negative is None:
        return log_term + xp.lerp(above, below, positive)
    linear_term = xp.weigh_beside(negative, above) + xp.weigh_beside(positive, below)
    return linear_term + (log_term if total is None else log_term * total)


def native_gradient(xp: Namespace, t: NativeTerms, weights: Elementwise) -> Array:
    negative, positive, *_ = weights
    p, q = xp.sigmoid(t.x), xp.sigmoid(t.neg_x)
    return xp.lerp(p, -q, positive) if negative is None else negative * p - positive * q


# For labels that are 0 or 1, with the same. The weights of a label and of the other one are w and v, u = ±x:
#
#     L = w log(1 + exp u) + v log(1 + exp -u) = (w + v) log(1 + exp u) - v u


class LabelTerms(NamedTuple):
    u: Array


def label_terms(xp: Namespace, x: Array, weights: Labels, *_: Any) -> LabelTerms:
    return LabelTerms(xp.flipped(x, weights.z))


def label_value(xp: Namespace, t: LabelTerms, weights: Labels) -> Array:
    total, other = weights.total, weights.other
    values = xp.softplus(t.u)
    if other is None:
        return values if total is None else weigh_logits(xp, total, values)
    if xp.assume_finite:
        return (values if total is None else values * total) - t.u * other
    # inf - inf is NaN
    weight = (1.0 if total is None else total) - other + 0 * weights.z
    return xp.weigh(weight, values) + xp.weigh(other + 0 * weights.z, xp.softplus(-t.u))


def label_gradient(xp: Namespace, t: LabelTerms, weights: Labels) -> Array:
    p = xp.sigmoid_into(t.u)
    p = p if weights.total is None else xp.scale(p, weights.total)
    return xp.flip(p if weights.other is None else p - weights.other, weights.z)


LOGISTIC = Loss(
    "multilabel_logistic_loss",
    per_example=False,
    takes="logits",
    fill=0.0,
    forms=(
        Form(labels, label_terms, label_value, label_gradient, needs="sigmoid", of_labels=True),
        Form(elementwise, native_terms, native_value, native_gradient, needs="sigmoid"),
        Form(elementwise, differentiable_terms, value, gradient, hessian, needs="autodiff"),
        Form(elementwise, terms, value, gradient, hessian),
    ),
)


def sigmoid(xp: Namespace, x: Array) -> Array:
    """σ(x) = exp min(x, 0) / (1 + exp -|x|)"""
    if "sigmoid" in xp.groups:
        return xp.sigmoid(x)
    _, nonneg, e = _terms(xp, x)
    return (nonneg + (1 - nonneg) * e) / (1 + e)


def log_sigmoid(xp: Namespace, x: Array) -> Array:
    """log σ(x) = min(x, 0) - log(1 + exp -|x|)"""
    if "sigmoid" in xp.groups:
        return -xp.softplus(-x)
    _, nonneg, e = _terms(xp, x)
    return xp.weigh(1 - nonneg, x) - xp.log1p(e)


def _terms(xp: Namespace, x: Array) -> Terms:
    return (differentiable_terms if "autodiff" in xp.groups else terms)(xp, x)
