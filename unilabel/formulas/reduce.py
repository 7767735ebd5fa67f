"""The reduced loss and its derivatives, of any loss: what a backend calls.

Examples meet only in the final sum, so that a backend may run all of this on whole arrays, in blocks, or traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import lengths
from ..namespace import Array, Namespace
from .targets import ClassIndex, TargetWeights
from .types import Form, Loss, Operands, Options


class Prepared(NamedTuple):
    """A call with its weights and terms computed."""

    form: Form
    weights: TargetWeights
    terms: Any
    divisor: Any  # a number or an array, infinite in place of 0; None: nothing is divided


def prepare(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, hessian: bool = False
) -> Prepared:
    """What `value_of` and `gradient_of` share. The latter may write into it, so it is for one gradient."""
    form = form_of(xp, loss, options, operands, hessian)
    x = working(xp, options, x)
    weights = form.weights(xp, x, operands, options)
    terms = form.terms(xp, weights.masked(xp, x, loss.fill), weights, options)
    return Prepared(form, weights, terms, divisor(xp, loss, options, x, weights))


def form_of(xp: Namespace, loss: Loss, options: Options, operands: Operands, hessian: bool = False) -> Form:
    """The fastest form that there is for this namespace and call."""
    smoothed = options.label_smoothing is not None or operands.label_smoothing is not None
    one_class = options.indices and not smoothed and operands.where is None
    for form in loss.forms:
        available = form.needs == "" or form.needs in xp.groups
        fits = (options.indices or not form.of_indices) and (options.binary or not form.of_labels)
        fits = fits and (one_class or not form.of_one_class)
        if available and fits and (form.hessian is not None or not hessian):
            return form
    raise NotImplementedError(loss.name)


def working(xp: Namespace, options: Options, x: Array) -> Array:
    """x in the compute dtype."""
    return xp.astype(x, xp.float32) if options.half else x


def value(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    """The reduced loss."""
    return value_of(xp, loss, options, x.dtype, prepare(xp, loss, options, x, operands))


def value_of(xp: Namespace, loss: Loss, options: Options, dtype: Any, call: Prepared) -> Array:
    return xp.astype(_reduced(xp, loss, options, _losses(xp, call), call.divisor), dtype, copy=False)


def gradient(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, cotangent: Array) -> Array:
    """The cotangent of the reduced loss times its derivative with respect to the logits."""
    return gradient_of(xp, loss, options, x.dtype, prepare(xp, loss, options, x, operands), cotangent)


def gradient_of(xp: Namespace, loss: Loss, options: Options, dtype: Any, call: Prepared, cotangent: Array) -> Array:
    cotangent = xp.astype(cotangent, xp.float32 if options.half else dtype, copy=False)
    found = _gradient(xp, loss, options, call, cotangent)
    # Masked here as well: the cotangent may be anything there.
    keep = call.weights.keep(xp)
    found = found if keep is None else xp.where(keep, found, 0.0)
    return xp.astype(found, dtype, copy=False)


def value_and_gradient(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Array]:
    """The reduced loss and the gradient of its sum, which share the exponentials."""
    call = prepare(xp, loss, options, x, operands)
    total = value_of(xp, loss, options, x.dtype, call)
    found = _of_sum(xp, call, _gradient(xp, loss, options, call))
    return total, xp.astype(found, x.dtype, copy=False)


def gradient_and_hessian(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Array]:
    """The gradient of the sum of the losses with respect to the logits, and the diagonal of its Hessian."""
    call = prepare(xp, loss, options, x, operands, hessian=True)
    assert call.form.hessian is not None
    # The Hessian first: the gradient may be written into one of the terms.
    second = _of_sum(xp, call, call.form.hessian(xp, call.terms, call.weights))
    first = _of_sum(xp, call, _gradient(xp, loss, options, call))
    return xp.astype(first, x.dtype, copy=False), xp.astype(second, x.dtype, copy=False)


def unreduced_gradient(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    """The gradient of each loss with respect to its own logits, before the reduction, in the compute dtype."""
    call = prepare(xp, loss, options._replace(reduction="sum"), x, operands)
    return _of_sum(xp, call, _gradient(xp, loss, options, call))


def jvp(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, unreduced: Array, tangent: Array
) -> Array:
    """The derivative of the reduced loss along the tangent of the logits, from the unreduced gradient."""
    weights, divisor = _weights(xp, loss, options, x, operands)
    tangent = xp.astype(tangent, unreduced.dtype, copy=False)
    keep = weights.keep(xp)
    change = unreduced * (tangent if keep is None else xp.where(keep, tangent, 0.0))
    change = xp.sum(change, axis=options.axes[0], keepdims=True) if loss.per_example else change
    return xp.astype(_reduced(xp, loss, options, change, divisor), x.dtype, copy=False)


def counts(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> Array | None:
    """What the losses add to the divisor of reduction="mean"; None: 1 each."""
    if count_alike(options, operands):
        return None
    weights, _ = _weights(xp, loss, options, x, operands)
    return None if weights.counts is None else xp.sum(weights.counts)


def count_alike(options: Options, operands: Operands) -> bool:
    """Whether each loss is known to add 1 to the divisor of reduction="mean"."""
    return options.ignore_index is None and all(array is None for array in operands[2:])


def _weights(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> tuple[TargetWeights, Any]:
    x = working(xp, options, x)
    weights = form_of(xp, loss, options, operands).weights(xp, x, operands, options)
    return weights, divisor(xp, loss, options, x, weights)


# --- Reductions -------------------------------------------------------------------------------------------------------


def _losses(xp: Namespace, call: Prepared) -> Array:
    """The loss of each example or element, 0 if ignored. (Where all is finite, a weight of 0 has seen to that.)"""
    weights = call.weights
    values = call.form.value(xp, call.terms, weights)
    if not isinstance(weights, ClassIndex) or weights.exists is None or xp.assume_finite:
        return values
    return xp.where(weights.exists, values, 0.0)


def _reduced(xp: Namespace, loss: Loss, options: Options, values: Array, divisor: Any) -> Array:
    if options.reduction == "none":
        return xp.squeeze(values, axis=options.axes[0]) if loss.per_example else values
    return xp.sum(values) if divisor is None else xp.sum(values) / divisor


def divisor(xp: Namespace, loss: Loss, options: Options, x: Array, weights: TargetWeights) -> Any:
    """What the reduction divides by; None if it does not divide."""
    if options.reduction not in ("mean", "batchmean"):
        return None
    if options.reduction == "mean" and weights.counts is not None:
        return or_infinity(xp, xp.sum(weights.counts))
    return counted(xp, loss, options, x)


def or_infinity(xp: Namespace, weight: Array) -> Array:
    """The sum of the weights as a divisor: where nothing takes part the mean is 0, or NaN if a loss is.

    Where all is assumed to be finite, 0 / 0 tells that something does not take part (blocks.run).
    """
    return weight if xp.assume_finite else xp.where(weight == 0, math.inf, weight)


def counted(xp: Namespace, loss: Loss, options: Options, x: Array) -> Any:
    """The number of all examples, or for the mean of an elementwise loss of all elements; 1 for none."""
    of_one = options.axes if loss.per_example or options.reduction == "batchmean" else ()
    return lengths.count(xp, x, [axis for axis in range(-x.ndim, 0) if axis not in of_one])


# --- From the gradient of each loss to that of all --------------------------------------------------------------------


def _gradient(xp: Namespace, loss: Loss, options: Options, call: Prepared, cotangent: Array | None = None) -> Array:
    """The gradient of each loss times cotangent / divisor, a missing one being 1."""
    form, weights, terms, divisor = call
    if cotangent is not None and loss.per_example and options.reduction == "none":
        cotangent = xp.expand_dims(cotangent, axis=options.axes[0])

    def scaled(weight: Any) -> Any:
        if cotangent is not None:
            weight = cotangent if weight is None else weight * cotangent
        weight = 1.0 if weight is None else weight
        return weight if divisor is None else weight / divisor

    if form.scales:
        return form.gradient(xp, terms, weights, scaled)
    array = form.gradient(xp, terms, weights)
    return array if cotangent is None and divisor is None else xp.scale(array, scaled(None))


def _of_sum(xp: Namespace, call: Prepared, derivative: Array) -> Array:
    """The derivative, 0 where it is masked. (Where all is finite, a weight of 0 has seen to that.)"""
    keep = None if xp.assume_finite else call.weights.keep(xp)
    return derivative if keep is None else xp.where(keep, derivative, 0.0)


def activation(xp: Namespace, function: Callable[[Namespace, Array], Array], x: Array, half: bool) -> Array:
    """An activation of x in its own dtype, half precision by way of float32."""
    return xp.astype(function(xp, xp.astype(x, xp.float32) if half else x), x.dtype, copy=False)
