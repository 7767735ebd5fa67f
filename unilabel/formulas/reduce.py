"""The reduced loss and its derivatives, of any loss: what a backend calls.

Examples meet only in the final sum, so that a backend may run all of this on whole arrays, in blocks, or traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import lengths
from ..namespace import Array, Namespace
from .targets import TargetWeights
from .types import Form, Loss, Operands, Options


class Divisor(NamedTuple):
    """The divisor of a mean: the number of losses, 1 for none; or the sum of their weights, an array."""

    count: Any
    weight: Array | None = None


class Gradient(NamedTuple):
    """The gradient of each loss with respect to its own logits, but for the scale of its example (None: 1)."""

    array: Array
    scale: Array | None = None


class Prepared(NamedTuple):
    """A call with its weights and terms computed."""

    form: Form
    weights: TargetWeights
    terms: Any
    divisor: Divisor | None


def _prepare(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, hessian: bool = False
) -> Prepared:
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
    form, weights, terms, divisor = _prepare(xp, loss, options, x, operands)
    return xp.astype(_reduced(xp, options, form.value(xp, terms, weights), divisor), x.dtype, copy=False)


def gradient(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, cotangent: Array) -> Array:
    """The cotangent of the reduced loss times its derivative with respect to the logits."""
    form, weights, terms, divisor = _prepare(xp, loss, options, x, operands)
    found = _gradient(xp, form, terms, weights)
    cotangent = xp.astype(cotangent, found.array.dtype, copy=False)
    return xp.astype(_scaled(xp, loss, options, found, weights, cotangent, divisor), x.dtype, copy=False)


def value_and_gradient(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Array]:
    """The reduced loss and the gradient of its sum, which share the exponentials."""
    form, weights, terms, divisor = _prepare(xp, loss, options, x, operands)
    total = _reduced(xp, options, form.value(xp, terms, weights), divisor)
    found = _scaled(xp, loss, options, _gradient(xp, form, terms, weights), weights, None, divisor)
    return xp.astype(total, x.dtype, copy=False), xp.astype(found, x.dtype, copy=False)


def value_and_unscaled_gradient(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Gradient, Divisor | None]:
    """The reduced loss, and its gradient before it is multiplied by `factor`; nothing may be masked."""
    form, weights, terms, divisor = _prepare(xp, loss, options, x, operands)
    total = _reduced(xp, options, form.value(xp, terms, weights), divisor)
    return xp.astype(total, x.dtype, copy=False), _gradient(xp, form, terms, weights), divisor


def gradient_and_hessian(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Array]:
    """The gradient of the sum of the losses with respect to the logits, and the diagonal of its Hessian."""
    form, weights, terms, divisor = _prepare(xp, loss, options, x, operands, hessian=True)
    assert form.hessian is not None
    first, second = (
        _scaled(xp, loss, options, Gradient(derivative(xp, terms, weights)), weights, None, divisor)
        for derivative in (form.gradient, form.hessian)
    )
    return xp.astype(first, x.dtype, copy=False), xp.astype(second, x.dtype, copy=False)


def unreduced_gradient(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    """The gradient of each loss with respect to its own logits, before the reduction, in the compute dtype."""
    form, weights, terms, _ = _prepare(xp, loss, options, x, operands)
    array, scale = _gradient(xp, form, terms, weights)
    return array if scale is None else array * xp.expand_dims(scale, axis=options.axes[0])


def jvp(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, unreduced: Array, tangent: Array
) -> Array:
    """The derivative of the reduced loss along the tangent of the logits, from the unreduced gradient."""
    weights, divisor = _weights(xp, loss, options, x, operands)
    tangent = xp.astype(tangent, unreduced.dtype, copy=False)
    change = unreduced * (tangent if weights.keep is None else xp.where(weights.keep, tangent, 0.0))
    change = xp.sum(change, axis=options.axes[0]) if loss.per_example else change
    return xp.astype(_reduced(xp, options, change, divisor), x.dtype, copy=False)


def counts(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> Array | None:
    """What the losses add to the divisor of reduction="mean"; None: 1 each."""
    weights, _ = _weights(xp, loss, options, x, operands)
    return None if weights.counts is None else xp.sum(weights.counts)


def _weights(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[TargetWeights, Divisor | None]:
    x = working(xp, options, x)
    weights = form_of(xp, loss, options, operands).weights(xp, x, operands, options)
    return weights, divisor(xp, loss, options, x, weights)


# --- Reductions -------------------------------------------------------------------------------------------------------


def _reduced(xp: Namespace, options: Options, values: Array, divisor: Divisor | None) -> Array:
    if options.reduction == "none":
        return values
    return xp.sum(values) if divisor is None else mean(xp, xp.sum(values), divisor)


def divisor(xp: Namespace, loss: Loss, options: Options, x: Array, weights: TargetWeights) -> Divisor | None:
    """What the reduction divides by; None if it does not divide."""
    if options.reduction not in ("mean", "batchmean"):
        return None
    if options.reduction == "mean" and weights.counts is not None:
        return Divisor(None, xp.sum(weights.counts))
    return counted(xp, loss, options, x)


def counted(xp: Namespace, loss: Loss, options: Options, x: Array) -> Divisor:
    """The number of all examples, or for the mean of an elementwise loss of all elements."""
    of_one = options.axes if loss.per_example or options.reduction == "batchmean" else ()
    return Divisor(lengths.count(xp, x, [axis for axis in range(-x.ndim, 0) if axis not in of_one]))


def mean(xp: Namespace, total: Any, divisor: Divisor) -> Any:
    """total / divisor, and 0 where nothing takes part (NaN if the total is)."""
    if divisor.weight is None:
        return total / divisor.count
    nothing = divisor.weight == 0
    return xp.where(nothing, 0 * total, total / xp.where(nothing, 1.0, divisor.weight))


# --- From the gradient of each loss to that of all --------------------------------------------------------------------


def _gradient(xp: Namespace, form: Form, terms: Any, weights: TargetWeights) -> Gradient:
    return Gradient(form.gradient(xp, terms, weights), None if form.scale is None else form.scale(xp, terms, weights))


def factor(
    xp: Namespace, loss: Loss, options: Options, found: Gradient, cotangent: Array | None, divisor: Divisor | None
) -> Any:
    """What to multiply a gradient by: scale · cotangent / divisor, a missing one being 1; None if all are missing."""
    scale = cotangent
    if divisor is not None:
        scale = mean(xp, 1.0 if scale is None else scale, divisor)
    if found.scale is not None:
        scale = found.scale if scale is None else found.scale * scale
    elif scale is None or not (loss.per_example and options.reduction == "none"):
        return scale
    return xp.expand_dims(scale, axis=options.axes[0])


def _scaled(
    xp: Namespace,
    loss: Loss,
    options: Options,
    found: Gradient,
    weights: TargetWeights,
    cotangent: Array | None,
    divisor: Divisor | None,
) -> Array:
    scale = factor(xp, loss, options, found, cotangent, divisor)
    scaled = found.array if scale is None else xp.scale(found.array, scale)
    # Masked here as well: the cotangent may be anything there.
    return scaled if weights.keep is None else xp.where(weights.keep, scaled, 0.0)


def activation(xp: Namespace, function: Callable[[Namespace, Array], Array], x: Array, half: bool) -> Array:
    """An activation of x in its own dtype, half precision by way of float32."""
    return xp.astype(function(xp, xp.astype(x, xp.float32) if half else x), x.dtype, copy=False)
