"""PyTorch: an autograd.Function with the closed-form gradient, eager or compiled; else a differentiable expression."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from .. import formulas, lengths
from ..backend import Array, Backend
from ..compilers import constant_in_dynamo
from ..formulas import NOTHING, Linear, Loss, Namespace, Operands, Options
from ..losses import FORMULAS
from ..sparse import Padded
from . import blocks
from .torch_internals import internals
from .torch_linear import LOSSES, LinearLoss, aligned, at_once, in_expression, operator, recomputing, space_of
from .torch_modes import (
    ORDINARY,
    TIMES,
    as_autocast,
    goes_to_aot_autograd,
    is_only_compiled,
    is_only_compiled_layer,
    is_ordinary,
    is_ordinary_layer,
    is_sharded,
    is_transformed,
    layer_as_autocast,
    needs_gradient,
    rows_of_blocks,
    without_autocast,
)
from .torch_namespaces import differentiable, eager, finite, replicated, sharded_like, standard, traced
from .torch_replay import replayed
from .torch_sparse import is_sparse, of_tensor
from .torch_threads import each


def _empty(shape: tuple[int, ...], like: Array) -> Array:
    """Memory from NumPy: it asks the system for huge pages. Most of torch's time with new memory is page faults."""
    if like.dtype is torch.bfloat16:
        return torch.from_numpy(np.empty(shape, np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.empty(shape, str(like.dtype).removeprefix("torch.")))


def _are_labels(z: Array) -> bool:
    """Whether z is z², to the last digit; not worth the look if there are few."""
    if z.numel() < 1 << 13:
        return False
    least, most = torch.aminmax(torch.addcmul(z, z, z, value=-1))
    return least.item() == 0 == most.item()


blockwise = blocks.Blockwise(
    eager,
    finite,
    _empty,
    torch.Tensor.is_contiguous,
    each,
    lambda x: bool(torch.isfinite(x).all()) if x.ndim else math.isfinite(x.item()),
    torch.mul,
    large=1 << 21,
    block=1 << 19,
    are_labels=_are_labels,
    whole=replayed,
)


class _Loss(torch.autograd.Function):
    """On a CPU, forward computes the gradient too where that saves time: from the same exponentials, in the same block.

    Elsewhere it keeps the exponentials: to multiply a gradient by the cotangent, maybe 1, would take a pass more.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Loss, Options, Operands], x: Array) -> Array:
        loss, options, operands = call
        ctx.loss, ctx.options, ctx.gradient, ctx.prepared = loss, options, None, None
        keeps = not (options.half or is_sharded(x))  # else backward computes all again, and nothing is kept
        if keeps and not _on_cpu(x):
            ctx.xp, ctx.prepared = eager, formulas.prepare(eager, loss, options, x, operands)
            value = formulas.value_of(eager, loss, options, x.dtype, ctx.prepared)
        elif keeps and (options.reduction != "none" or _is_light(options, x, operands)):
            (value, ctx.gradient), ctx.xp = _run(formulas.value_and_gradient, loss, options, x, operands)
        else:
            value, ctx.xp = _run(formulas.value, loss, options, x, operands)
        ctx.save_for_backward(x, *operands)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        # Of these, one is given away, and the other written into: a second backward computes again.
        (gradient, prepared), ctx.gradient, ctx.prepared = (ctx.gradient, ctx.prepared), None, None
        again, batched = torch.is_grad_enabled(), internals.is_batched(cotangent)  # again: under create_graph
        if gradient is not None and not (again or batched):
            scale = _scale(ctx.loss, ctx.options, cotangent)
            if scale is not None:
                return None, gradient if isinstance(scale, float) and scale == 1 else gradient.mul_(scale)
        x, *operands = ctx.saved_tensors
        call = ctx.loss, ctx.options, x, Operands(*operands), cotangent
        if again:
            gradient = formulas.gradient(_space(x, autodiff=True), *call)
            # A function of x even where it is constant: its derivative is 0, not missing.
            gradient = torch.where(torch.ones_like(x, dtype=torch.bool), gradient, x)
        elif batched:
            gradient = formulas.gradient(standard, *call)
        elif prepared is not None:
            gradient = formulas.gradient_of(eager, ctx.loss, ctx.options, x.dtype, prepared, cotangent)
        elif _on_cpu(x):
            gradient = blocks.gradient(blockwise, ctx.xp, *call)
        else:
            gradient = formulas.gradient(_space(x), *call)
        return None, gradient


def _is_light(options: Options, x: Array, operands: Operands) -> bool:
    """Whether a gradient can wait for the cotangents of all losses: small, and 0 nowhere whatever they are."""
    return operands.where is None and options.ignore_index is None and x.numel() < blockwise.large


def _scale(loss: Loss, options: Options, cotangent: Array) -> Any:
    """What a gradient is multiplied by that was computed without; None: compute it again, so that masks are kept."""
    if options.reduction == "none":
        return cotangent.unsqueeze(options.axes[0]) if loss.per_example else cotangent
    scale = cotangent.item()
    return scale if math.isfinite(scale) else None


class _TracedLoss(torch.autograd.Function):
    """For torch.compile, which traces forward and backward as they are, and differentiates neither."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, options: Options, x: Array, *operands: Any) -> Array:
        ctx.loss, ctx.options = loss, options
        ctx.save_for_backward(x, *operands)
        return formulas.value(traced, loss, options, x, Operands(*operands))

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        x, *operands = ctx.saved_tensors
        gradient = formulas.gradient(traced, ctx.loss, ctx.options, x, Operands(*operands), cotangent)
        return None, None, gradient, *(None for _ in operands)


def _in_graph(name: str, options: tuple[Any, ...], x: Array, *operands: Any) -> Array:
    """The loss as one node of Dynamo's graph, which takes arrays and plain values alone.

    What Dynamo looks into, it guards, and each call checks every guard.
    """
    loss = next(loss for loss in FORMULAS.values() if loss.name == name)
    if torch.is_grad_enabled() and x.requires_grad:
        return _TracedLoss.apply(loss, Options(*options), x, *operands)
    return formulas.value(traced, loss, Options(*options), x, Operands(*operands))


def _run(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> tuple[Any, Namespace]:
    """The formula's result, where nothing is differentiated, and the namespace that it was computed with."""
    if _on_cpu(x):
        return blocks.run(blockwise, formula, loss, options, x, operands)
    if is_sharded(x):
        xp = _space(x)
        return formula(xp, loss, options, x, operands), xp
    return replayed(formula, eager, loss, options, x, operands), eager


def _in_block(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands, *cotangent: Array) -> Any:
    """The formula's result of a block of the last linear layer's logits."""
    if not cotangent:
        return _run(formula, loss, options, x, operands)[0]
    if _on_cpu(x):
        return blocks.gradient(blockwise, eager, loss, options, x, operands, *cotangent)
    return formula(eager, loss, options, x, operands, *cotangent)


def _in_blocks(
    loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Array | None = None
) -> tuple[Array | None, Linear]:
    """The loss and its gradients in the compute dtype; nothing is recorded for autodiff."""
    if is_sharded(inputs.features):
        return in_expression(loss, options, inputs, operands, needed, cotangent)
    features, weight, _ = inputs
    rows, size = formulas.rows_of_blocks(inputs, TIMES), features.shape[0] * max(features.shape[1], weight.shape[0])
    if rows is None and cotangent is None and size < blockwise.large and _on_cpu(features):
        (value, found), _ = blocks.run(blockwise, at_once(needed), loss, options, features, operands, *inputs[1:])
        return value, Linear(*found)
    return formulas.in_blocks(eager, _in_block, rows, loss, options, inputs, operands, needed, cotangent)


def _traced_at_once(
    loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Array | None = None
) -> tuple[Array | None, Linear]:
    """As `_in_blocks`, for compilers, which see all of it."""
    with without_autocast(inputs.features):  # of the whole program, in which they trace the backward pass
        call = loss, options, inputs, operands, needed, cotangent
        return formulas.in_blocks(traced, formulas.directly(traced), None, *call)


def _linear_in_graph(
    name: str, options: tuple[Any, ...], needed: tuple[bool, ...] | None, may_trace: bool, *arrays: Any
) -> Any:
    """As `_in_graph`, of the last linear layer's inputs: the loss, or with those needed a list of it and gradients.

    Compilers see an operator; if they may trace, all of a loss of few logits.
    """
    loss, given, inputs, operands = LOSSES[name], Options(*options), Linear(*arrays[:3]), Operands(*arrays[3:])
    closed = _traced_at_once if may_trace and _are_few(inputs) else _linear_operator
    if needed is None and needs_gradient(inputs):
        return LinearLoss.apply((closed, loss, given, operands), *inputs)
    value, found = closed(loss, given, inputs, operands, NOTHING if needed is None else Linear(*needed))
    return value if needed is None else [value, *(array for array in found if array is not None)]


def _are_few(inputs: Linear) -> bool:
    """Whether no length of the logits is open, and a compiler may have all of them in memory."""
    n, classes = inputs.features.shape[0], inputs.linear_weight.shape[0]
    return lengths.are_known(n, classes) and n * classes < blockwise.large


def _on_cpu(x: Array) -> bool:
    """Whether blocks are faster, and reading a value does not wait for a device. (A DTensor may be on a CPU, too.)"""
    return x.is_cpu and not is_sharded(x)


def _space(x: Array, autodiff: bool = False) -> Namespace:
    if is_sharded(x):
        return sharded_like(x, autodiff)
    return differentiable if autodiff else eager


class TorchBackend(Backend):
    name = "torch"
    autodiff = True

    def devices(self) -> list[str]:
        return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]

    def device(self, x: Array) -> str:
        return str(x.device)

    def namespace(self, x: Array) -> Namespace:
        return sharded_like(x) if is_sharded(x) else standard

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        if torch.compiler.is_compiling():
            _load()
        if not isinstance(x, torch.Tensor):
            return f"torch {type(x).__name__}"
        if type(x).__name__ == "MaskedTensor":
            return "a torch MaskedTensor (give its data, and its mask as where)"
        if x.is_nested:
            return "a nested tensor"
        if x.layout is not torch.strided:
            return f"layout {x.layout}"
        if beside is not None and is_sharded(x) and not is_sharded(beside):
            return (
                "a DTensor beside a plain tensor (DTensor.from_local makes one of that; or give full_tensor() of this)"
            )
        if beside is not None and x.is_meta and not beside.is_meta:
            return "a tensor on the meta device, which has no values, beside one that has"
        return None

    def keeps_axis(self, x: Array) -> bool:
        return type(x) in ORDINARY

    def cache_key(self, x: Array, operands: tuple[Any, ...]) -> Any:
        is_traced = torch.compiler.is_compiling() or internals.is_tracing() or not internals.is_unwatched()
        if is_traced or type(x) not in ORDINARY:
            return None
        device, found = x.device, []
        for array in (x, *operands):
            if array is not None and (type(array) not in ORDINARY or array.is_nested or array.device != device):
                return None
            found.append(None if array is None else (array.dtype, array.layout))
        return tuple(found)

    def dtype(self, x: Array) -> str:
        return str(x.dtype).removeprefix("torch.")

    def read(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) or not torch.compiler.is_compiling():
            return super().read(data)
        array = torch.as_tensor(data)  # NumPy is traced as torch here; Python's floats are float64, as they are there
        plain_float = not isinstance(data, (np.ndarray, np.generic)) and array.is_floating_point()
        return torch.as_tensor(data, dtype=torch.float64) if plain_float else array

    def sparse(self, targets: Any) -> Padded | None:
        return of_tensor(targets) if is_sparse(targets) else super().sparse(targets)

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        place = device if like is None else like.device
        if not isinstance(data, torch.Tensor):
            if data.dtype.name == "bfloat16":  # ml_dtypes' own, which torch does not read
                return torch.from_numpy(data.astype(np.float32)).to(place, torch.bfloat16)
            # A copy: torch takes no negative strides, no foreign byte order, and warns of read-only memory.
            data = torch.from_numpy(np.array(data, dtype=data.dtype.newbyteorder("="), order="C"))
        data = data.to(place)
        return replicated(data, like) if is_sharded(like) and not is_sharded(data) else data

    def to_numpy(self, x: Array) -> Any:
        if torch.compiler.is_compiling() or is_transformed():
            raise ValueError("Expected values to read. Received: a tensor that torch traces, which has none yet.")
        try:
            x = (x.full_tensor() if is_sharded(x) else x).detach().cpu()
            return x.float().numpy() if x.dtype is torch.bfloat16 else x.numpy()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            text = f"Expected values to read. Received: a {type(x).__name__} on {x.device}, which has none yet."
            raise ValueError(text) from error

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        x, options = as_autocast(x, options) if options.half else (x, options)
        compiling = torch.compiler.is_compiling()
        if compiling and is_only_compiled(x, operands) and goes_to_aot_autograd():
            return _in_graph(loss.name, tuple(options), x, *operands)
        if compiling or not is_ordinary(x, operands):
            return formulas.value(_space(x, autodiff=True), loss, options, x, operands)
        if x.requires_grad and torch.is_grad_enabled():
            return _Loss.apply((loss, options, operands), x)  # PyTorch looks at each argument
        return _run(formulas.value, loss, options, x, operands)[0]

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        constant = not (torch.is_grad_enabled() and x.requires_grad) and is_ordinary(x, Operands(x))
        return formulas.activation(_space(x, autodiff=not constant), function, x, half)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        x, options = as_autocast(x, options)
        with torch.no_grad():
            if not torch.compiler.is_compiling() and is_ordinary(x, operands):
                return _run(formula, loss, options, x, operands)[0]
            return super().closed_form(formula, loss, options, x, operands)

    def linear_inputs(self, inputs: Linear) -> Linear:
        return layer_as_autocast(aligned(inputs))

    def linear_loss(self, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
        compiling = torch.compiler.is_compiling()
        with without_autocast(inputs.features):
            if compiling and is_only_compiled_layer(inputs, operands):
                may_trace = goes_to_aot_autograd()
                return _linear_in_graph(loss.name, tuple(options), None, may_trace, *inputs, *operands)
            if compiling or not is_ordinary_layer(inputs, operands):
                xp, rows = space_of(inputs, autodiff=True), rows_of_blocks(inputs)
                call = functools.partial(formulas.value, xp), loss, options, inputs, operands
                return formulas.expression(xp, *call, rows, recomputing(loss, options))
            if needs_gradient(inputs):
                return LinearLoss.apply((_in_blocks, loss, options, operands), *inputs)
            return self.linear_closed_form(loss, options, inputs, operands, NOTHING)[0]

    def linear_closed_form(
        self, loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear
    ) -> tuple[Array, Linear]:
        compiling = torch.compiler.is_compiling()
        with torch.no_grad(), without_autocast(inputs.features):
            if compiling and is_only_compiled_layer(inputs, operands):
                call = loss.name, tuple(options), tuple(needed), goes_to_aot_autograd()
                value, *some = _linear_in_graph(*call, *inputs, *operands)
                left = iter(some)
                found = Linear(*(next(left) if need else None for need in needed))
            else:
                closed = in_expression if compiling or not is_ordinary_layer(inputs, operands) else _in_blocks
                value, found = closed(loss, options, inputs, operands, needed)
            return value, formulas.rounded(eager, found, inputs)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        nested = x.requires_grad  # then the gradient will be differentiated again
        x = x if nested else x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x, cotangent, create_graph=nested)
        return value if nested else value.detach(), gradient


_linear_operator: Any = None  # `_in_blocks` as an operator of PyTorch, which `_load` makes


@constant_in_dynamo
def _load() -> None:
    global _linear_operator
    for xp in (standard, differentiable):
        xp.load()
    for function in (_in_graph, _linear_in_graph):
        torch.compiler.allow_in_graph(function)  # here, as it imports Dynamo
    if _linear_operator is None:
        _linear_operator = operator(_in_blocks)


backend = TorchBackend()


def __getattr__(name: str) -> Any:
    """The layers, where they were before they had a file of their own."""
    if name in ("MultilabelLogisticLoss", "SoftmaxNLL"):
        from ..layers import torch as layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
