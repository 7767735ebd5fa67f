"""PyTorch: the losses on the last linear layer's inputs, in blocks, as an autograd.Function."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import torch

from .. import formulas
from ..backend import Array
from ..checks import fail
from ..formulas import NOTHING, Linear, Loss, Namespace, Operands, Options, Parts, Rows, Shared, Totals
from ..linear import LINEAR
from .torch_internals import internals
from .torch_modes import TIMES, is_sharded, rows_of_blocks
from .torch_namespaces import differentiable, eager, sharded_like, standard

LOSSES = {loss.name: loss for loss in LINEAR.values()}


class LinearLoss(torch.autograd.Function):
    """Forward computes the gradients too, of what needs them: a block's logits are there but once.

    With reduction="none" they depend on all cotangents: then backward makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *inputs: Any) -> Array:
        closed, loss, options, operands = call
        ctx.call, given = (closed, loss, options), Linear(*inputs)
        needed = NOTHING if options.reduction == "none" else Linear(*ctx.needs_input_grad[1:])
        value, found = closed(loss, options, given, operands, needed)
        ctx.gradients = None if needed is NOTHING else found
        ctx.save_for_backward(*inputs, *operands)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        # They are given away: a second backward computes them again.
        found, ctx.gradients = ctx.gradients, None
        closed, loss, options = ctx.call
        is_recorded = torch.is_grad_enabled()  # create_graph
        is_plain = not is_recorded and not internals.is_batched(cotangent)
        if found is not None and is_plain and not options.half:  # whatever was written into the inputs since
            return None, *_scaled(found, cotangent)
        saved = ctx.saved_tensors  # read once: checkpoints allow no more
        inputs, operands = Linear(*saved[:3]), Operands(*saved[3:])
        needed = Linear(*ctx.needs_input_grad[1:])
        call = loss, options, inputs, operands, needed
        if not is_plain:
            xp, rows = space_of(inputs, autodiff=is_recorded), rows_of_blocks(inputs)
            recomputed = recomputing(loss, options, needed) if is_recorded else None
            return None, *formulas.gradients(xp, *call, cotangent, rows, recomputed)
        unreduced = options.reduction == "none"
        if found is None:
            _, found = closed(*call, cotangent if unreduced else None)
        return None, *formulas.rounded(eager, found if unreduced else _scaled(found, cotangent), inputs)


def _scaled(found: Linear, cotangent: Array) -> Linear:
    """`formulas.scaled` of each, in place: the weight's gradient may be most of the memory."""
    is_number = type(cotangent) is torch.Tensor and cotangent.is_cpu
    scale = cotangent.item() if is_number else cotangent
    if is_number and scale == 1:
        return found
    for gradient in found:
        if gradient is not None:
            zero = None if is_number and math.isfinite(scale) else gradient == 0
            gradient.mul_(scale)
            if zero is not None:
                gradient.masked_fill_(zero, 0.0)
    return found


def operator(closed: Any) -> Any:
    """The same function as an operator of PyTorch, into which compilers do not look.

    To them it is one call, however many blocks there are; and their number may be unknown until it runs.
    """

    def run(name: str, options: str, smoothing: Any, needed: list[bool], *arrays: Any) -> list[Array]:
        call = _called(name, options, smoothing, arrays)
        value, found = closed(*call, Linear(*needed), arrays[-1])
        return [array for array in (value, *found) if array is not None]

    def shapes(name: str, options: str, smoothing: Any, needed: list[bool], *arrays: Any) -> list[Array]:
        """Arrays without values, but else as those of `run`."""
        loss, given, (features, weight, bias), _ = _called(name, options, smoothing, arrays)
        of_losses = (features.shape[0], *([] if loss.per_example else [weight.shape[0]]))
        value = features.new_empty(of_losses if given.reduction == "none" else ())
        dtype = torch.float32 if given.half else features.dtype
        found = (
            torch.empty_like(array, dtype=dtype, memory_format=torch.contiguous_format)
            for array, need in zip((features, weight, bias), needed, strict=True)
            if need
        )
        return [*([] if arrays[-1] is not None else [value]), *found]

    arrays = (*Linear._fields, *(f"{name}_array" for name in Operands._fields), "cotangent")
    schema = (
        f"(str loss, str options, float? label_smoothing, bool[] needed, {', '.join(f'Tensor? {a}' for a in arrays)})"
    )
    defined = torch.library.custom_op("unilabel::linear_loss", run, mutates_args=(), schema=f"{schema} -> Tensor[]")
    defined.register_fake(shapes)

    def call(
        loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Any = None
    ) -> tuple[Array | None, Linear]:
        text = json.dumps(options._replace(label_smoothing=None, eps=0.0))  # floats may be traced; eps is of no logits
        found = iter(defined(loss.name, text, options.label_smoothing, list(needed), *inputs, *operands, cotangent))
        value = next(found) if cotangent is None else None
        return value, Linear(*(next(found) if need else None for need in needed))

    return call


def _called(name: str, options: str, smoothing: Any, arrays: Any) -> tuple[Loss, Options, Linear, Operands]:
    reduction, axes, *others = json.loads(options)
    given = Options(reduction, tuple(axes), *others)._replace(label_smoothing=smoothing)
    return LOSSES[name], given, Linear(*arrays[:3]), Operands(*arrays[3:-1])


class Recomputed(torch.autograd.Function):
    """A function of arrays, of which autograd keeps these alone: every derivative computes again what it needs.

    `closed` has the gradients by some of the arrays in closed form, or returns None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Any, closed: Any, *arrays: Any) -> tuple[Array, ...]:
        return function(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.closed, *arrays = inputs
        ctx.save_for_backward(*arrays)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        arrays, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        wanted = tuple(i for i, need in enumerate(needed) if need)
        pulled = ctx.closed and ctx.closed(wanted)
        pulled = pulled or functools.partial(_pulled_back, ctx.function, len(arrays), wanted)
        found = iter(Recomputed.apply(pulled, None, *arrays, *cotangents))
        return None, None, *(next(found) if need else None for need in needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        moved = tuple(i for i, tangent in enumerate(tangents[2:]) if tangent is not None)
        function, some = _of_some(ctx.function, moved, ctx.saved_tensors)
        some = tuple(a.contiguous() for a in some)  # of an expanded one, such as a sum's cotangent, it makes no dual
        return torch.func.jvp(function, some, tuple(tangents[2 + i] for i in moved))[1]


def _of_some(function: Any, chosen: tuple[int, ...], arrays: Any) -> tuple[Any, tuple[Any, ...]]:
    """The function of those arrays alone whose numbers are chosen, and these."""

    def run(*some: Any) -> Any:
        return function(*(dict(enumerate(arrays)) | dict(zip(chosen, some, strict=True))).values())

    return run, tuple(arrays[i] for i in chosen)


def _pulled_back(function: Any, count: int, wanted: tuple[int, ...], *arrays: Any) -> tuple[Array, ...]:
    """The function's derivative by the wanted arrays times the cotangents, which come after its own arrays."""
    function, some = _of_some(function, wanted, arrays[:count])
    return torch.func.vjp(function, *some)[1](arrays[count:])


def recomputing(loss: Loss, options: Options, needed: Linear = NOTHING) -> Any:
    """What runs each block of `formulas.expression`, or of `formulas.gradients` with those needed, as `Recomputed`."""
    if internals.has_dual_numbers():
        return None

    def recomputed(of_block: Any, shared: Shared, _: Totals, rows: Rows) -> tuple[Totals, Parts]:
        is_value = rows.cotangent is None
        closed = functools.partial(_closed, loss, options) if is_value else None
        arrays = (*shared[:2], rows.features, *shared.operands, *rows.operands, rows.cotangent)
        found = iter(Recomputed.apply(functools.partial(_block, of_block), closed, *arrays))
        weight, bias, features, values = (next(found) if there else None for there in (*of_layer(needed), is_value))
        return Totals(weight, bias), Parts(values, next(found, None), features)

    return recomputed


def of_layer(inputs: Linear) -> tuple[Any, Any, Any]:
    """What all blocks share comes first."""
    return inputs.linear_weight, inputs.linear_bias, inputs.features


FIELDS = len(Operands._fields)
COUNT = 4 + 2 * FIELDS  # arrays of a block


def _nested(arrays: Any) -> tuple[Shared, Rows]:
    weight, bias, features, *operands, cotangent = arrays
    shared, rows = (Operands(*some) for some in (operands[:FIELDS], operands[FIELDS:]))
    return Shared(weight, bias, shared), Rows(features, rows, cotangent)


def _block(of_block: Any, *arrays: Any) -> tuple[Array, ...]:
    shared, rows = _nested(arrays)
    totals, (values, counts, features) = of_block(shared, Totals(), rows)
    return tuple(array for array in (*totals, features, values, counts) if array is not None)


def _closed(loss: Loss, options: Options, wanted: tuple[int, ...]) -> Any:
    """The same with the wanted gradients, in closed form."""
    needed = Linear(2 in wanted, 0 in wanted, 1 in wanted)
    return functools.partial(_gradients, loss, options, needed) if wanted[-1] <= 2 else None  # not of targets, weights


def _gradients(loss: Loss, options: Options, needed: Linear, *arrays: Any) -> tuple[Array, ...]:
    shared, rows = _nested(arrays[:COUNT])
    cotangent = arrays[COUNT] if options.reduction == "none" else arrays[COUNT].reshape(())
    rows = rows._replace(cotangent=cotangent)
    found = formulas.block_gradients(differentiable, loss, options, needed, shared, rows)
    return tuple(array for array in of_layer(found) if array is not None)


def in_expression(
    loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Array | None = None
) -> tuple[Array | None, Linear]:
    """The loss and its gradients in the compute dtype, of tensors that torch's own blocks are not for."""
    xp, call = space_of(inputs), (loss, options, inputs, operands, needed)
    sharded = is_sharded(inputs.features)
    rows = _rows_of_sharded(inputs, operands, cotangent) if sharded else rows_of_blocks(inputs)
    value, found = formulas.in_blocks(xp, formulas.directly(xp), rows, *call, cotangent)
    if sharded:  # each summed over the processes now
        pairs = zip(found, inputs, strict=True)
        found = Linear(*(None if a is None else a.redistribute(placements=b.placements) for a, b in pairs))
    return value, found


def _rows_of_sharded(inputs: Linear, operands: Operands, cotangent: Array | None) -> int | None:
    """As `rows_of_blocks`, of DTensors: on each process its part of the classes counts.

    All at once where examples are sharded, too: a block of them would have to be gathered.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    features, weight, _ = inputs
    arrays: list[Any] = [features, cotangent, *formulas.by_row(operands)]
    places = [place for array in arrays for place in getattr(array, "placements", ())]
    # Of (B, T, D) sharded along T, the placement of the rows is a Shard of another kind.
    if not all(place.is_replicate() or place.is_partial() or place.is_shard(1) for place in places):
        return None
    parts = [weight.device_mesh.size(axis) for axis, place in enumerate(weight.placements) if place.is_shard()]
    return formulas.rows_of_blocks(inputs, TIMES * math.prod(parts))


@functools.cache
def at_once(needed: Linear) -> Any:
    """The loss of few logits and its gradients, as a formula that is recorded and replayed: always the same object."""

    def linear(xp: Namespace, loss: Loss, options: Options, features: Array, operands: Operands, *layer: Any) -> Any:
        call = loss, options, Linear(features, *layer), operands, needed
        return formulas.in_blocks(xp, formulas.directly(xp), None, *call)

    return linear


def aligned(inputs: Linear) -> Linear:
    """DTensors as their product is to have them: whoever has some of the classes has all features of its examples.

    So nothing of the logits' size is exchanged, nor a weight.
    """
    if not is_sharded(inputs.features):
        return inputs
    from torch.distributed.tensor import Replicate, Shard

    features, weight, bias = inputs
    of_weight, all_of_it = weight.placements, Replicate()
    if not all(place == all_of_it or (type(place) is Shard and place.dim == 0) for place in of_weight):
        fail(ValueError, "linear_weight", "placements Shard(0), by classes, or Replicate()", str(of_weight))
    batch = [Shard(axis) for axis in range(features.ndim - 1)]
    pairs = zip(features.placements, of_weight, strict=True)
    mine = [own if own in batch and place == all_of_it else all_of_it for own, place in pairs]
    features, weight = features.redistribute(placements=mine), weight.redistribute(placements=of_weight)
    return Linear(features, weight, None if bias is None else bias.redistribute(placements=of_weight))


def space_of(inputs: Linear, autodiff: bool = False) -> Namespace:
    if is_sharded(inputs.features):
        return sharded_like(inputs.linear_weight, autodiff, axis=0)
    return differentiable if autodiff else standard
