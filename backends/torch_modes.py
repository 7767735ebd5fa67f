"""What a call to PyTorch is in the midst of: nothing, a compiler, a transform; and which tensors it is given."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .. import formulas
from ..backend import Array
from ..compilers import constant_in_dynamo
from ..formulas import Linear, Operands, Options
from .torch_internals import internals

ORDINARY = (torch.Tensor, torch.nn.Parameter)  # and no subclass

# A block's logits, times formulas/linear.py's own: 64 MiB in float32. From 32 MiB up, glibc gives memory back at once.
# What is smaller it keeps, in pieces that nothing fits into.
TIMES = 2


def is_ordinary(x: Array, operands: tuple[Any, ...]) -> bool:
    """Whether these are ordinary tensors in eager mode, and only the logits may need a gradient."""
    if not internals.is_eager():
        return False
    if not (type(x) in ORDINARY or is_sharded(x)):
        return False
    for array in operands:
        if array is not None and (array.requires_grad or not (type(array) in ORDINARY or is_sharded(array))):
            return False
    return True


def is_ordinary_layer(inputs: Linear, operands: Operands) -> bool:
    """The same of the last linear layer's inputs, each of which may need a gradient."""
    for array in inputs:
        if array is not None and not (type(array) in ORDINARY or is_sharded(array)):
            return False
    return is_ordinary(inputs.features, operands)


def needs_gradient(inputs: Linear) -> bool:
    features, weight, bias = inputs
    some = features.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return some and torch.is_grad_enabled()


def rows_of_blocks(inputs: Linear) -> int | None:
    """The number of examples in a block; None: all at once.

    Dynamo leaves lengths open that look like numbers. A block of a DTensor's examples would have to be gathered.
    """
    if torch.compiler.is_dynamo_compiling() or is_sharded(inputs.features):
        return None
    return formulas.rows_of_blocks(inputs, TIMES)


def is_only_compiled_layer(inputs: Linear, operands: Operands) -> bool:
    return is_only_compiled(inputs.features, operands) and all(a is None or type(a) in ORDINARY for a in inputs)


def is_only_compiled(x: Array, operands: tuple[Any, ...]) -> bool:
    """The same under torch.compile, and nothing but torch.compile: no export, no transform."""
    return (
        type(x) in ORDINARY
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not is_transformed()
        and not any(array is not None and (array.requires_grad or type(array) not in ORDINARY) for array in operands)
    )


@constant_in_dynamo
def goes_to_aot_autograd() -> bool:
    """Whether torch.compile's backend raises on second derivatives: others would silently drop those of _TracedLoss."""
    name = internals.compiler()
    return name == "inductor" or name.startswith("aot_")


@constant_in_dynamo
def is_transformed() -> bool:
    return internals.is_transformed()


def is_sharded(x: Array) -> bool:
    """Whether this is a DTensor. They are imported by those who have one."""
    return type(x) not in ORDINARY and hasattr(x, "device_mesh")


def as_autocast(x: Array, options: Options) -> tuple[Array, Options]:
    """Half-precision logits in float32 under autocast, as PyTorch's own losses, whose result is float32 there."""
    if options.half and is_autocast(x):
        return x.to(torch.float32), options._replace(half=False)
    return x, options


def layer_as_autocast(inputs: Linear) -> Linear:
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
    if not (torch.compiler.is_compiling() or internals.is_any_autocast()):  # the rest takes longer; Dynamo traces it
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not: "meta"
