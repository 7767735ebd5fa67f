"""Target weights: how much of the loss each class carries, from targets, weights, smoothing and masks.

They do not depend on the logits: `like` gives shape, device and compute dtype alone. Numbers of an example keep the
class axis, with length 1, so that they broadcast to the logits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import lengths
from ..namespace import Array, Namespace, Position
from .types import Operands, Options


class Elementwise(NamedTuple):
    """For independent classes: the weights of label 0 and label 1 of each element."""

    negative: Array | None  # None: 1 - positive
    positive: Array
    total: Array | None  # the sum of the two; None: 1
    where: Array | None  # False where masked
    counts: Array | None  # what each element adds to the divisor of the mean; None: 1

    def keep(self, xp: Namespace) -> Array | None:
        """False where an element of the logits is left out; None: nowhere."""
        return self.where

    def masked(self, xp: Namespace, x: Array, fill: float) -> Array:
        """x, with `fill` where it is masked."""
        return _where_kept(xp, self.where, x, fill)


class Distribution(NamedTuple):
    """For mutually exclusive classes: how much of an example's loss each class carries."""

    z: Array
    axis: int
    where: Array | None  # False for a masked class
    exists: Array | None  # False for an ignored example
    counts: Array | None  # what each example adds to the divisor of the mean; None: 1

    def keep(self, xp: Namespace) -> Array | None:
        return _kept(xp, self.where, self.exists)

    def masked(self, xp: Namespace, x: Array, fill: float) -> Array:
        if self.where is not None:
            x = xp.masked(x, _possible(xp, self), fill)
            if xp.assume_finite:  # 0 of -inf would be NaN
                x = xp.maximum(x, xp.asarray(float(xp.finfo(x.dtype).min), dtype=x.dtype))
        return x if self.exists is None else xp.where(self.exists, x, 0.0)


class ClassIndex(NamedTuple):
    """For mutually exclusive classes: one class y, and with smoothing a share for all others too.

    An example's loss is `example · (weight · loss_y + Σ_c uniform_c · loss_c)`.
    """

    position: Position
    axis: int
    weight: Any  # of the class y, one for each example; None: 1, and there is no smoothing
    uniform: Any  # one for all, one for each class, or one for each logit; None: 0
    uniform_y: Any  # that of the class y
    example: Array | None  # one for each example; None: 1
    where: Array | None  # False for a masked class
    exists: Array | None  # False for an ignored example
    counts: Array | None

    def keep(self, xp: Namespace) -> Array | None:
        return _kept(xp, self.where, self.exists)

    def masked(self, xp: Namespace, x: Array, fill: float) -> Array:
        """x, with `fill` for masked classes. Ignored examples are masked in what comes out, once for all classes."""
        return x if self.where is None else xp.masked(x, _possible(xp, self), fill)


class Labels(NamedTuple):
    """For independent classes whose targets are 0 or 1: the weights of an element's label, and of the other label."""

    z: Array  # the labels
    total: Array | None  # the sum of the two weights; None: 1
    other: Any  # None: 0
    where: Array | None  # False where masked
    counts: Array | None  # what each element adds to the divisor of the mean; None: 1

    def keep(self, xp: Namespace) -> Array | None:
        return self.where

    def masked(self, xp: Namespace, x: Array, fill: float) -> Array:
        return _where_kept(xp, self.where, x, fill)


def _where_kept(xp: Namespace, where: Array | None, x: Array, fill: float) -> Array:
    """An element that is finite stays where it is masked, as its weight is 0."""
    return x if where is None or xp.assume_finite else xp.where(where, x, fill)


def _possible(xp: Namespace, weights: Distribution | ClassIndex) -> Array:
    """False for a masked class, but not of an ignored example, in which no class might be left."""
    assert weights.where is not None
    assert weights.exists is not None
    return xp.logical_or(weights.where, ~weights.exists)


def _kept(xp: Namespace, where: Array | None, exists: Array | None) -> Array | None:
    if where is None or exists is None:
        return exists if where is None else where
    return xp.logical_and(where, exists)


TargetWeights = Labels | Elementwise | Distribution | ClassIndex


def elementwise(xp: Namespace, like: Array, operands: Operands, options: Options) -> Elementwise:
    """`negative = w (1 - z)` and `positive = w · pos_weight · z`, where smoothing makes z (1 - ε) + ε/2 of z."""
    z, weight, pos_weight, counts = _each(xp, like, operands, options)
    where, smoothing = operands.where, _smoothing(xp, like, operands, options)
    if weight is None and pos_weight is None and smoothing is None:
        return Elementwise(None, z, None, where, counts)
    negative, positive = 1 - z, z
    if smoothing is not None:
        negative = negative * (1 - smoothing) + smoothing / 2
        positive = positive * (1 - smoothing) + smoothing / 2
    if pos_weight is not None:
        positive = positive * pos_weight
    if weight is not None:
        negative, positive = negative * weight, positive * weight
    total = None if weight is None and pos_weight is None else negative + positive
    return Elementwise(negative, positive, total, where, counts)


def labels(xp: Namespace, like: Array, operands: Operands, options: Options) -> Labels:
    """`w`, and with the label 1 `w · pos_weight`. With smoothing the two labels have 1 - ε/2 and ε/2 of theirs."""
    z, weight, pos_weight, counts = _each(xp, like, operands, options)
    where, smoothing = operands.where, _smoothing(xp, like, operands, options)
    total, other = None, None if smoothing is None else smoothing / 2
    if pos_weight is not None:
        one = xp.ones_like(pos_weight)
        total = _by_label(xp, z, one, pos_weight)
        if smoothing is not None:
            other = smoothing / 2 * _by_label(xp, z, pos_weight, one)
            total = total * (1 - smoothing / 2) + other
    if weight is not None:
        total = weight if total is None else total * weight
        other = None if other is None else other * weight
    return Labels(z, total, other, where, counts)


def _by_label(xp: Namespace, z: Array, of_0: Array, of_1: Array) -> Array:
    return xp.lerp(of_0, of_1, z) if xp.assume_finite else xp.where(z > 0, of_1, of_0)


def _each(
    xp: Namespace, like: Array, operands: Operands, options: Options
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Targets, weight, pos_weight of each element, and what it counts in the mean, with the mask."""
    if options.positives:
        z = _of_positives(xp, like, operands.targets, _like(xp, operands.values, like))
    else:
        z = xp.astype(operands.targets, like.dtype, copy=False)
    weight, pos_weight = _like(xp, operands.weight, like), _like(xp, operands.pos_weight, like)
    keep = operands.where
    if keep is None:
        return z, weight, pos_weight, None
    if xp.assume_finite and lengths.same(keep.shape, like.shape):
        counts = xp.astype(keep, like.dtype)
        return z, counts if weight is None else weight * counts, pos_weight, counts
    # Masked before the arithmetic: a masked NaN must not reach a derivative either.
    counts = xp.where(keep, xp.ones_like(like), 0.0)
    weight = counts if weight is None else xp.where(keep, weight, 0.0)
    pos_weight = None if pos_weight is None else xp.where(keep, pos_weight, 1.0)
    return xp.where(keep, z, 0.0), weight, pos_weight, counts


def _of_positives(xp: Namespace, like: Array, index: Array, values: Array | None) -> Array:
    """The targets that are 1, or the values, at these classes of each example, and else 0.

    An index that is no class, nor the -1 that pads, makes the targets of its example NaN.
    """
    if 0 in (index.shape[-1], like.shape[-1]):
        return xp.zeros_like(like)
    index = xp.as_index(index, like)
    outside = (index < 0) | (index >= xp.extent(like, -1))
    wrong = xp.any(xp.logical_and(outside, index != -1), axis=-1, keepdims=True)
    last = xp.max(xp.where(outside, -1, index), axis=-1, keepdims=True)
    # Padding writes again what the last label writes; in an example without labels, a 0.
    index = xp.where(outside, xp.where(last < 0, 0, last), index)
    values = last >= 0 if values is None else values
    if xp.assume_finite:
        return xp.scatter(like, index, xp.where(wrong, math.nan, xp.astype(values, like.dtype)))
    return xp.where(wrong, math.nan, xp.scatter(like, index, values))


def distribution(xp: Namespace, like: Array, operands: Operands, options: Options) -> Distribution:
    """`w_c z_c`, where smoothing makes z_c (1 - ε) + ε/K of z_c, K the classes of the example.

    A class index out of range, or of a masked class, makes the weights of its example, and so the loss, NaN.
    """
    targets, _, weight, _, sample_weight, where, _ = operands
    (axis,) = options.axes
    smoothing = _smoothing(xp, like, operands, options)
    exists = in_range = one_hot = None
    if options.indices:
        index = xp.expand_dims(xp.as_index(targets, like), axis=axis)
        one_hot = xp.classes(like, axis) == index
        if where is not None:
            one_hot = xp.logical_and(one_hot, where)
        z = xp.astype(one_hot, like.dtype)
        in_range = xp.any(one_hot, axis=axis, keepdims=True)
        if options.ignore_index is not None:
            exists = index != options.ignore_index
    else:
        z = xp.astype(targets, like.dtype, copy=False)
        z = z if where is None else xp.where(where, z, 0.0)
    if where is not None:
        exists = _and(xp, exists, xp.any(where, axis=axis, keepdims=True))

    counts = None
    if weight is not None:
        weight = along(xp, xp.astype(weight, like.dtype, copy=False), axis)
        weight = weight if where is None else xp.where(where, weight, 0.0)
        if one_hot is not None and smoothing is None:  # an infinite weight of another class
            weight = xp.where(one_hot, weight, 0.0)
        counts = xp.sum(z * weight, axis=axis, keepdims=True)
    if sample_weight is not None:
        sample_weight = _of_examples(xp, sample_weight, like, axis)
        if exists is not None:
            sample_weight = xp.where(exists, sample_weight, 0.0)
        counts = sample_weight if counts is None else counts * sample_weight
    if exists is not None:
        counts = xp.astype(exists, like.dtype) if counts is None else xp.where(exists, counts, 0.0)

    if smoothing is not None:
        if where is None:
            z = z * (1 - smoothing) + smoothing / lengths.count(xp, like, (axis,))
        else:
            k = xp.sum(xp.astype(where, like.dtype), axis=axis, keepdims=True)
            uniform = xp.where(where, smoothing / xp.where(k == 0, 1.0, k), 0.0)
            z = z * (1 - smoothing) + uniform
    if weight is not None:
        z = z * weight
    if sample_weight is not None:
        z = z * sample_weight
    if in_range is not None:
        if exists is not None:  # not even NaN for a moment, which jax_debug_nans would report
            in_range = xp.logical_or(in_range, ~exists)
        z = xp.where(in_range, z, math.nan)
    if exists is not None:
        z = xp.where(exists, z, 0.0)
    return Distribution(z, axis, where, exists, counts)


def _and(xp: Namespace, a: Array | None, b: Array) -> Array:
    return b if a is None else xp.logical_and(a, b)


def _of_examples(xp: Namespace, array: Array, like: Array, axis: int) -> Array:
    return xp.expand_dims(xp.astype(array, like.dtype, copy=False), axis=axis)


def class_index(xp: Namespace, like: Array, operands: Operands, options: Options) -> ClassIndex:
    """`w_y (1 - ε)` for the class y of an example, and `w_c ε/K` for all, K the classes of the example.

    A class index out of range, or of a masked class, makes the weight of its example, and so the loss, NaN.
    """
    targets, _, weight, _, sample_weight, where, _ = operands
    (axis,) = options.axes
    smoothing = _smoothing(xp, like, operands, options)
    index = xp.expand_dims(xp.as_index(targets, like), axis=axis)
    exists = None if options.ignore_index is None else index != options.ignore_index
    # If not looked for here, IndexError or a loss that is not finite shows it (blocks.run).
    in_range = None if xp.assume_finite else (index >= 0) & (index < xp.extent(like, axis))
    # 0 in place of what cannot be looked up; an ignored index in range can.
    is_class = exists if in_range is None else in_range
    if is_class is not None:
        index = xp.multiply(index, is_class) if xp.assume_finite else xp.where(is_class, index, 0)
    position = xp.position(like, index, axis)
    if where is not None:
        if in_range is not None:
            kept = xp.take_along_axis(xp.astype(where, like.dtype), position, axis)
            in_range = xp.logical_and(in_range, kept != 0)
        exists = _and(xp, exists, xp.any(where, axis=axis, keepdims=True))

    of_y = None
    if weight is not None:
        weight = xp.astype(weight, like.dtype, copy=False)
        of_y, weight = xp.take(weight, index), along(xp, weight, axis)
    example = None if sample_weight is None else _of_examples(xp, sample_weight, like, axis)
    if exists is not None:
        example = xp.astype(exists, like.dtype) if example is None else xp.where(exists, example, 0.0)
    counts = example if of_y is None else of_y if example is None else of_y * example
    if in_range is not None:
        if weight is not None:
            counts = xp.where(in_range, counts, 0.0)
        if exists is not None:  # as above
            in_range = xp.logical_or(in_range, ~exists)
        example = xp.where(in_range, xp.astype(in_range, like.dtype) if example is None else example, math.nan)
    uniform = uniform_y = None
    if smoothing is None:
        of_y, example = (example if of_y is None else of_y if example is None else of_y * example), None
    else:
        uniform, uniform_y = _uniform(xp, like, smoothing, weight, of_y, where, axis)
        of_y = (1 - smoothing) * (xp.ones_like(index, dtype=like.dtype) if of_y is None else of_y)
    return ClassIndex(position, axis, of_y, uniform, uniform_y, example, where, exists, counts)


def _uniform(
    xp: Namespace,
    like: Array,
    smoothing: Any,
    weight: Array | None,
    of_y: Array | None,
    where: Array | None,
    axis: int,
) -> tuple[Any, Any]:
    """`w_c ε/K` for all classes, and for the class y."""
    if where is None:
        share = smoothing / lengths.count(xp, like, (axis,))
        return (share, share) if weight is None else (share * weight, share * of_y)
    k = xp.sum(xp.astype(where, like.dtype), axis=axis, keepdims=True)
    share = smoothing / xp.where(k == 0, 1.0, k)
    uniform = xp.where(where, share, 0.0)
    return (uniform, share) if weight is None else (uniform * xp.where(where, weight, 0.0), share * of_y)


def along(xp: Namespace, vector: Array, axis: int) -> Array:
    """One number for each class, with axes of length 1 behind the class axis, to broadcast to the logits."""
    for _ in range(-1 - axis):
        vector = xp.expand_dims(vector, axis=-1)
    return vector


def _like(xp: Namespace, array: Array | None, like: Array) -> Array | None:
    return None if array is None else xp.astype(array, like.dtype, copy=False)


def _smoothing(xp: Namespace, like: Array, operands: Operands, options: Options) -> Any:
    """ε: None, a number, or an array, whose value nobody has checked: NaN outside of [0, 1]."""
    if operands.label_smoothing is None:
        return options.label_smoothing
    smoothing = xp.astype(operands.label_smoothing, like.dtype, copy=False)
    return xp.where((smoothing < 0) | (smoothing > 1), math.nan, smoothing)
