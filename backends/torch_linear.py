"""PyTorch: the losses on the last linear layer's inputs, in blocks, as an autograd.Function."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from .. import formulas
from ..backend import Array
from ..formulas import NOTHING, Linear, Operands
from .torch_internals import internals
from .torch_namespaces import differentiable, eager, standard


class LinearLoss(torch.autograd.Function):
    """Forward computes the gradients too, of what needs them: a block's logits are there but once.

    With reduction="none" they depend on all cotangents: then backward makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *inputs: Any) -> Array:
        run, loss, options, operands = call
        ctx.call, given = (run, loss, options), Linear(*inputs)
        needed = NOTHING if options.reduction == "none" else Linear(*ctx.needs_input_grad[1:])
        rows = formulas.rows_of_blocks(given)
        value, found = formulas.in_blocks(eager, run, rows, loss, options, given, operands, needed)
        ctx.gradients = None if needed is NOTHING else found
        ctx.save_for_backward(*inputs, *operands)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        # They are given away: a second backward computes them again.
        found, ctx.gradients = ctx.gradients, None
        run, loss, options = ctx.call
        inputs, operands = Linear(*ctx.saved_tensors[:3]), Operands(*ctx.saved_tensors[3:])
        needed = Linear(*ctx.needs_input_grad[1:])
        call = loss, options, inputs, operands, needed
        batched = internals.is_batched(cotangent)
        if torch.is_grad_enabled():  # under create_graph
            return None, *formulas.gradients(differentiable, *call, cotangent)
        unreduced = options.reduction == "none"
        scale = cotangent.item() if cotangent.device.type == "cpu" and not (unreduced or batched) else cotangent
        if batched or (isinstance(scale, float) and not math.isfinite(scale)):  # what is masked stays 0
            return None, *formulas.gradients(standard, *call, cotangent)
        if found is None:
            rows = formulas.rows_of_blocks(inputs)
            _, found = formulas.in_blocks(eager, run, rows, *call, cotangent if unreduced else None)
        if not (unreduced or (isinstance(scale, float) and scale == 1)):
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(scale)
        return None, *formulas.rounded(eager, found, inputs)


def in_expression(formula: Any, *call: Any) -> Any:
    return formula(standard, *call)


def as_autocast(inputs: Linear) -> Linear:
    """Under autocast: rounded to its dtype, as `torch.nn.functional.linear` has them, but multiplied in float32."""
    if not is_autocast(inputs.features):
        return inputs
    low = torch.get_autocast_dtype(inputs.features.device.type)
    fits = (a is not None and a.is_floating_point() and a.dtype is not torch.float64 for a in inputs)
    return Linear(*(a.to(low).to(torch.float32) if fit else a for a, fit in zip(inputs, fits, strict=True)))


def without_autocast(x: Array) -> Any:
    """A context in which products are in the dtype of what is multiplied."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else contextlib.nullcontext()


def is_autocast(x: Array) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not: "meta"
