"""A loss of the last linear layer's logits, `x = features · weightᵀ + bias`, a block of examples at a time.

The formulas never look across examples, so the logits of a block are all that is ever in memory. With g = dL/dx:

    dL/dfeatures = g · weight        dL/dweight = gᵀ · features        dL/dbias = Σ_n g_n

A backend has a loop of its own (in Python, or one that its compiler knows), which runs `block` on one block after the
other, and gives the totals and the parts to `reduced`. `in_blocks` is the loop in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .. import lengths
from ..namespace import Array, Namespace
from . import reduce
from .types import Loss, Operands, Options

BLOCK = 1 << 23  # logits in a block
ROWS = 128  # examples in a block, at least: with fewer, reading and writing the weight's gradient takes the time


class Linear(NamedTuple):
    """The last linear layer's inputs, or the gradients with respect to them: None for what is not there."""

    features: Any  # (N, D)
    linear_weight: Any  # (C, D)
    linear_bias: Any = None  # (C,)


EACH = ("targets", "values", "sample_weight")  # operands that have a row for each example
NOTHING = Linear(False, False, False)  # of which gradients are needed


class Rows(NamedTuple):
    """What is cut into blocks of examples."""

    features: Array
    operands: Operands  # those with a row for each example
    cotangent: Array | None = None  # for each loss, or one for the sum of a block's


class Shared(NamedTuple):
    """What all blocks share."""

    linear_weight: Array  # in the compute dtype, as all blocks' part of its gradient is
    linear_bias: Array | None
    operands: Operands


class Totals(NamedTuple):
    """Sums over the blocks so far, in the compute dtype: None before the first, and where nobody asks."""

    linear_weight: Array | None = None  # (C, D)
    linear_bias: Array | None = None  # (C, 1)


class Parts(NamedTuple):
    """What blocks leave behind, one after the other along the first axis."""

    values: Array | None  # the sum of each block's losses, or with reduction="none" all losses
    counts: Array | None  # what each block adds to the divisor of reduction="mean"; None: 1 for each loss
    features: Array | None  # the gradient


Run = Callable[..., Any]  # of a formula of reduce.py, and its arguments after the namespace
Recomputed = Callable[..., Any]  # of a function and its arguments: its result, which backward computes again


def directly(xp: Namespace) -> Run:
    """The `run` of a backend that has no other way for the logits of a block than the formula, in this namespace."""
    return functools.partial(_in, xp)


def _in(xp: Namespace, formula: Any, *call: Any) -> Any:
    return formula(xp, *call)


def rows_of_blocks(inputs: Linear, times: int = 1) -> int | None:
    """The number of examples in a block; None: all at once, as they are few or their number is not known.

    `times`: how often `BLOCK` logits it may have. If they can be, all blocks are equally long: some compilers copy what
    is over.
    """
    n, rows = inputs.features.shape[0], most_rows(inputs, times)
    if rows is None or not lengths.are_known(n) or n <= rows:
        return None
    return next((size for size in range(rows, rows // 2, -1) if n % size == 0), rows)


def most_rows(inputs: Linear, times: int = 1) -> int | None:
    """The number of examples of a block that is no larger than the weight, or holds `BLOCK` logits; None: not known."""
    classes, length = inputs.linear_weight.shape
    return max(times * BLOCK // classes, min(length, ROWS), 1) if lengths.are_known(classes, length) else None


def cut(xp: Namespace, options: Options, inputs: Linear, operands: Operands) -> tuple[Rows, Shared]:
    """What has a row for each example, and what all examples share."""
    rows = by_row(operands)
    shared = (array if row is None else None for array, row in zip(operands, rows, strict=True))
    return Rows(inputs.features, rows), Shared(*_layer(xp, options, inputs), Operands(*shared))


def by_row(operands: Operands) -> Operands:
    """Those with a row for each example; None for the others."""

    def has_rows(name: str, array: Any) -> bool:
        return name in EACH or (array is not None and array.ndim == 2 and array.shape[0] != 1)

    return Operands(*(array if has_rows(name, array) else None for name, array in operands._asdict().items()))


def _layer(xp: Namespace, options: Options, inputs: Linear) -> tuple[Array, Array | None]:
    """Weight and bias in the compute dtype."""
    _, weight, bias = inputs
    return reduce.working(xp, options, weight), None if bias is None else reduce.working(xp, options, bias)


def whole(xp: Namespace, loss: Loss, options: Options, rows: Rows, shared: Shared) -> tuple[Linear, Array, Operands]:
    """The inputs in the compute dtype, their logits, and the other operands as the formulas take them."""
    weight, bias, operands = shared
    features = xp.astype(rows.features, weight.dtype, copy=False)
    x = xp.linear(features, weight, bias)
    operands = Operands(*(b if a is None else a for a, b in zip(rows.operands, operands, strict=True)))
    if loss.per_example and operands.where is not None:
        operands = operands._replace(where=xp.logical_and(operands.where, xp.ones_like(x, dtype=xp.bool)))
    return Linear(features, weight, bias), x, operands


def contracted(xp: Namespace, gradient: Array, inputs: Linear, needed: Linear, totals: Totals) -> tuple[Totals, Any]:
    """The totals and the gradient of the features, from the gradient of the logits."""
    weight, bias = totals
    if needed.linear_weight:
        weight = xp.add_product(weight, gradient, inputs.features)
    if needed.linear_bias:
        bias = xp.add_sum(bias, gradient, inputs.features)
    return Totals(weight, bias), xp.matmul(gradient, inputs.linear_weight) if needed.features else None


def block(
    xp: Namespace,
    run: Run,
    loss: Loss,
    options: Options,
    needed: Linear,
    shared: Shared,
    totals: Totals,
    rows: Rows,
    alone: bool = False,
) -> tuple[Totals, Parts]:
    """A block of examples: totals that it is added to, and its own parts. `needed`: which gradients, of the sum.

    With a cotangent, the gradients are of the losses times it, and the losses are left out. A block that is alone has
    all examples: its value is the reduced loss, and the gradients are of that.
    """
    final = alone or options.reduction == "none"
    of_block = options._replace(half=False, reduction=options.reduction if final else "sum")
    inputs, x, operands = whole(xp, loss, options, rows, shared)
    counts = None
    if options.reduction == "mean" and not alone:
        counts = reduce.counts(xp, loss, of_block, x, operands)
        counts = None if counts is None else xp.reshape(counts, (1,))
    values = gradient = None
    if rows.cotangent is not None:
        cotangent = xp.astype(rows.cotangent, x.dtype, copy=False)
        gradient = run(reduce.gradient, loss, of_block, x, operands, cotangent)
    elif any(needed):
        values, gradient = run(reduce.value_and_gradient, loss, of_block, x, operands)
    else:
        values = run(reduce.value, loss, of_block, x, operands)
    if values is not None:
        values = xp.astype(values, rows.features.dtype, copy=False) if final else xp.reshape(values, (1,))
    of_features = None
    if gradient is not None:
        totals, of_features = contracted(xp, gradient, inputs, needed, totals)
    return totals, Parts(values, counts, of_features)


def reduced(
    xp: Namespace, loss: Loss, options: Options, inputs: Linear, totals: Totals, parts: Parts
) -> tuple[Array | None, Linear]:
    """The reduced loss, and the gradients in the compute dtype, of all blocks."""
    value, found = parts.values, _of_inputs(xp, totals, parts.features)
    if options.reduction == "none":
        return value, found
    divisor = _divisor(xp, loss, options, inputs, parts.counts)
    value = None if value is None else xp.sum(value)
    if divisor is not None:
        value = None if value is None else value / divisor
        found = Linear(*(None if a is None else xp.scale(a, 1 / divisor) for a in found))
    return None if value is None else xp.astype(value, inputs.features.dtype, copy=False), found


def _of_inputs(xp: Namespace, totals: Totals, features: Array | None) -> Linear:
    weight, bias = totals
    return Linear(features, weight, None if bias is None else xp.squeeze(bias, axis=-1))


def _divisor(xp: Namespace, loss: Loss, options: Options, inputs: Linear, counts: Array | None) -> Any:
    if options.reduction == "sum":
        return None
    if counts is not None:
        return reduce.or_infinity(xp, xp.sum(counts))
    n = lengths.count(xp, inputs.features, (0,))
    per_element = options.reduction == "mean" and not loss.per_example
    return n * lengths.count(xp, inputs.linear_weight, (0,)) if per_element else n


def scaled(xp: Namespace, gradient: Array, cotangent: Array) -> Array:
    """A gradient times the cotangent of the reduced loss. Times infinity 0 stays 0, not NaN, as it may be masked.

    Only there: elsewhere the product has a derivative by the gradient even where that is 0.
    """
    cotangent = xp.astype(cotangent, gradient.dtype, copy=False)
    masked = xp.logical_and(gradient == 0, cotangent - cotangent != 0)
    return xp.where(masked, 0.0, gradient * cotangent)


def taking_part(xp: Namespace, options: Options, operands: Operands) -> Linear:
    """Where the gradients are not 0 by what is masked or ignored, to broadcast to them; None: anywhere.

    For a framework that transposes the loss's derivative: that has to be linear, and so cannot look for 0 · infinity.
    """
    keep = operands.where
    if options.ignore_index is not None:
        exists = xp.expand_dims(operands.targets != options.ignore_index, axis=-1)
        keep = exists if keep is None else xp.logical_and(keep, exists)
    if keep is None:
        return Linear(None, None)
    while keep.ndim < 2:
        keep = xp.expand_dims(keep, axis=0)
    classes = xp.any(keep, axis=0)
    return Linear(xp.any(keep, axis=1, keepdims=True), xp.expand_dims(classes, axis=-1), classes)


def rounded(xp: Namespace, found: Linear, inputs: Linear) -> Linear:
    """The gradients, each in the dtype of its input."""
    pairs = zip(found, inputs, strict=True)
    return Linear(*(None if a is None else xp.astype(a, b.dtype, copy=False) for a, b in pairs))


def in_blocks(
    xp: Namespace,
    run: Run,
    length: int | None,
    loss: Loss,
    options: Options,
    inputs: Linear,
    operands: Operands,
    needed: Linear,
    cotangent: Array | None = None,
    recomputed: Recomputed | None = None,
) -> tuple[Array | None, Linear]:
    """The reduced loss and its gradients in the compute dtype, by a loop in Python over blocks of that length.

    With a cotangent of the reduced loss, or of each loss, the gradients times it alone.
    """
    of_block = functools.partial(block, xp, run, loss, options, needed)
    if length is None:  # the logits' gradient can be that of the mean: nothing is scaled after
        shared = Shared(*_layer(xp, options, inputs), operands)
        totals, parts = of_block(shared, Totals(), Rows(inputs.features, operands, cotangent), alone=True)
        return parts.values, _of_inputs(xp, totals, parts.features)
    rows, shared = cut(xp, options, inputs, operands)
    rows = rows._replace(cotangent=cotangent)
    totals = Totals()
    each: list[Parts] = []
    for some in _blocks(rows, length):
        if each:
            done = [array for array in (*totals, *each[-1]) if array is not None]
            some = some._replace(features=xp.after(some.features, done))
        if recomputed is None:
            totals, parts = of_block(shared, totals, some)
        else:  # without the totals, which would all be kept for the backward pass
            more, parts = recomputed(of_block, shared, Totals(), some)
            totals = Totals(*(b if a is None else a + b for a, b in zip(totals, more, strict=True)))
        each.append(parts)
    joined = (_joined(xp, arrays) for arrays in zip(*each, strict=True))
    return reduced(xp, loss, options, inputs, totals, Parts(*joined))


def _joined(xp: Namespace, arrays: Any) -> Any:
    return arrays[0] if arrays[0] is None or len(arrays) == 1 else xp.concat(list(arrays))


def _blocks(rows: Rows, length: int) -> Iterator[Rows]:
    features, operands, cotangent = rows
    n = features.shape[0]
    for start in range(0, n, length):
        part = slice(start, min(start + length, n))
        yield Rows(
            features[part, ...],
            Operands(*(None if a is None else a[part, ...] for a in operands)),
            cotangent if cotangent is None or cotangent.ndim == 0 else cotangent[part, ...],
        )


# As an expression that a framework transforms, exports or differentiates. A block that is not alone may be called by
# `recomputed`, whose backward pass computes all of it again: else all logits would be kept.


def expression(
    xp: Namespace,
    run: Callable[..., Array],
    loss: Loss,
    options: Options,
    inputs: Linear,
    operands: Operands,
    length: int | None = None,
    recomputed: Recomputed | None = None,
) -> Array:
    """The reduced loss; `run` computes that of given logits."""
    call = loss, options, inputs, operands, NOTHING
    value, _ = in_blocks(xp, lambda _, *call: run(*call), length, *call, recomputed=recomputed)
    assert value is not None
    return value


def gradients(
    xp: Namespace,
    loss: Loss,
    options: Options,
    inputs: Linear,
    operands: Operands,
    needed: Linear,
    cotangent: Array,
    length: int | None = None,
    recomputed: Recomputed | None = None,
) -> Linear:
    """The cotangent of the reduced loss times its derivatives, each in the dtype of its input."""
    call = loss, options, inputs, operands, needed
    return rounded(xp, in_blocks(xp, directly(xp), length, *call, cotangent, recomputed)[1], inputs)


def block_gradients(xp: Namespace, loss: Loss, options: Options, needed: Linear, shared: Shared, rows: Rows) -> Linear:
    """The same of one block, with the cotangent of its values."""
    totals, parts = block(xp, directly(xp), loss, options, needed, shared, Totals(), rows)
    return rounded(xp, _of_inputs(xp, totals, parts.features), Linear(rows.features, *shared[:2]))
