"""PyTorch: an autograd.Function with the closed-form gradient, eager or compiled; the plain expression everywhere else.

`MultilabelLogisticLoss` and `SoftmaxNLL` are the losses as modules.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch

from .. import formulas
from ..backend import Backend, Extended
from ..compilers import constant_in_dynamo
from ..formulas import Array, Loss, Namespace, Operands, Options
from ..losses import multilabel_logistic_loss, softmax_nll
from . import tiles
from .torch_internals import internals

COMPAT = "array_api_compat.torch"  # whose import takes longer than a small call, and which eager ones can do without
xp = Extended(COMPAT, stop_gradient=torch.Tensor.detach, sym_max=torch.sym_max)


def _sum(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    return torch.sum(x) if axis is None else torch.sum(x, axis, keepdims)


def _pick(x: Array, position: Array) -> Array:
    try:
        return x.gather(-1, position).squeeze(-1)
    except RuntimeError as error:
        raise IndexError(*error.args) from None


def _replace(x: Array, position: Array, values: Any) -> Array:
    return x.scatter_(-1, position, values if isinstance(values, float) else values.unsqueeze(-1))


def _softmax(x: Array) -> Array:
    if x.shape[-1] >= 16 or x.numel() < 1000:
        return torch.softmax(x, -1)
    e = torch.exp(x - torch.amax(x, -1, True))  # torch's own is slow where rows are shorter than its vectors
    return e.div_(torch.sum(e, -1, True))


# Where nothing is differentiated: torch's own functions, and kernels that do several steps at once.
eager = Extended(
    torch,
    astype=lambda x, dtype, copy=True: x if x.dtype is dtype else x.to(dtype),
    as_index=lambda t: t.to(torch.int64),
    expand_dims=torch.unsqueeze,
    max=torch.amax,
    multiply=torch.mul,
    pick=_pick,
    position=lambda x, t: t.unsqueeze(-1),
    replace=_replace,
    sigmoid=torch.sigmoid,
    softmax=_softmax,
    softplus=lambda x: torch.nn.functional.softplus(x, 1, 60.0),  # beyond, it is x to the last digit
    sum=_sum,
    take=operator.getitem,
)


def _position(x: Array, t: Array) -> tuple[Array, Array]:
    """Where each row has its class: to gather it, and as a mask, which a compiler does with all else in one loop."""
    classes = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    return t.unsqueeze(-1), classes == t.unsqueeze(-1).to(torch.int32)


# Where a compiler traces what has its derivative beside it.
traced = Extended(
    COMPAT,
    as_index=lambda t: t.to(torch.int64),
    pick=lambda x, position: x.gather(-1, position[0]).squeeze(-1),
    position=_position,
    replace=lambda x, position, values: xp.where(
        position[1], values if isinstance(values, float) else values.unsqueeze(-1), x
    ),
    sym_max=torch.sym_max,
    take=operator.getitem,
)


def _empty(shape: tuple[int, ...], like: Array) -> Array:
    """Memory from NumPy: it asks the system for huge pages. Most of torch's time with new memory is page faults."""
    if like.dtype is torch.bfloat16:
        return torch.from_numpy(np.empty(shape, np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.empty(shape, str(like.dtype).removeprefix("torch.")))


machine = tiles.Machine(
    eager,
    _empty,
    torch.Tensor.is_contiguous,
    map,  # torch has threads of its own
    lambda x: bool(torch.isfinite(x).all()) if x.ndim else math.isfinite(x.item()),
    large=1 << 21,
    block=1 << 19,
)

ORDINARY = (torch.Tensor, torch.nn.Parameter)  # and no subclass


class _Loss(torch.autograd.Function):
    """Small arrays are differentiated on the way: the slopes are kept. Of large ones, only what came in is kept."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, options: Options, x: Array, *operands: Array | None) -> Array:
        given, ctx.slopes = Operands(*operands), None
        large = x.numel() >= machine.large or not _on_cpu(x)
        if large or given.where is not None or options.ignore_index is not None:
            value, options = _run(formulas.value, loss, options, x, given)
        else:
            (value, ctx.slopes, ctx.divisor, _), options = _run(formulas.value_and_slopes, loss, options, x, given)
        ctx.loss, ctx.options = loss, options
        ctx.save_for_backward(x, *operands)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        x, *operands = ctx.saved_tensors
        call = ctx.loss, ctx.options, x, Operands(*operands), cotangent
        if torch.is_grad_enabled():  # under create_graph
            gradient = formulas.gradient(backend.namespace(x), *call, by_autodiff=True)
            # Derived from x even where it is constant.
            gradient = torch.where(torch.ones_like(x, dtype=torch.bool), gradient, x)
        elif not _on_cpu(x) or internals.is_batched(cotangent):
            gradient = formulas.gradient(_space(x), *call)
        elif ctx.slopes is not None:
            slopes, ctx.slopes = ctx.slopes, None  # written over: the next time, it is computed again
            scale = eager.astype(cotangent, slopes.array.dtype)
            slopes.array.mul_(formulas.factor(eager, ctx.loss, ctx.options, slopes, scale, ctx.divisor))
            gradient = eager.astype(slopes.array, x.dtype)
        else:
            gradient = tiles.gradient(machine, *call)
        return None, None, gradient, *(None for _ in operands)


class _TracedLoss(torch.autograd.Function):
    """For a compiler: it makes one program of both, and differentiates neither."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, options: Options, x: Array, *operands: Array | None) -> Array:
        ctx.loss, ctx.options = loss, options
        ctx.save_for_backward(x, *operands)
        return formulas.value(traced, loss, options, x, Operands(*operands))

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        x, *operands = ctx.saved_tensors
        gradient = formulas.gradient(traced, ctx.loss, ctx.options, x, Operands(*operands), cotangent)
        return None, None, gradient, *(None for _ in operands)


def _run(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> tuple[Any, Options]:
    """The formula's result, where nothing is differentiated, and the options that it was computed with."""
    if _on_cpu(x):
        return tiles.run(machine, formula, loss, options, x, operands)
    return formula(_space(x), loss, options, x, operands), options


def _on_cpu(x: Array) -> bool:
    """Whether blocks are faster, and looking at the values keeps nobody waiting. (A DTensor is on a device too.)"""
    return x.device.type == "cpu" and not _is_sharded(x)


def _space(x: Array) -> Namespace:
    return _sharded_like(x) if _is_sharded(x) else eager


class TorchBackend(Backend):
    name = "torch"
    install = "pip install torch"
    autodiff = True

    def devices(self) -> list[str]:
        return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]

    def device(self, x: Array) -> str:
        return str(x.device)

    def namespace(self, x: Array) -> Namespace:
        return _sharded_like(x) if _is_sharded(x) else xp

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
        if beside is not None and _is_sharded(x) and not _is_sharded(beside):
            return "a DTensor beside logits that are none (its .full_tensor() or .to_local() is a plain one)"
        if beside is not None and x.is_meta and not beside.is_meta:
            return "a tensor on the meta device, which has no values, beside logits that have"
        return None

    def settled(self, x: Array, targets: Any) -> Any:
        if torch.compiler.is_compiling() or not (type(x) in ORDINARY and type(targets) is torch.Tensor):
            return None
        if x.is_nested or targets.is_nested or torch.jit.is_tracing() or x.device != targets.device:
            return None
        return x.dtype, targets.dtype, x.layout, targets.layout

    def dtype(self, x: Array) -> str:
        return str(x.dtype).removeprefix("torch.")

    def read(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) or not torch.compiler.is_compiling():
            return super().read(data)
        array = torch.as_tensor(data)  # NumPy is traced as torch here; Python's floats are float64, as they are there
        plain_float = not isinstance(data, (np.ndarray, np.generic)) and array.is_floating_point()
        return torch.as_tensor(data, dtype=torch.float64) if plain_float else array

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        place = device if like is None else like.device
        if not isinstance(data, torch.Tensor):
            if data.dtype.name == "bfloat16":  # ml_dtypes' own, which torch does not read
                return torch.from_numpy(data.astype(np.float32)).to(place, torch.bfloat16)
            # A copy: torch takes no negative strides, no foreign byte order, and warns of read-only memory.
            data = torch.from_numpy(np.array(data, dtype=data.dtype.newbyteorder("="), order="C"))
        data = data.to(place)
        return _replicated(data, like) if _is_sharded(like) and not _is_sharded(data) else data

    def to_numpy(self, x: Array) -> Any:
        if torch.compiler.is_compiling() or _is_transformed():
            raise ValueError("Expected values to read. Received: a tensor that torch traces, which has none yet.")
        try:
            x = (x.full_tensor() if _is_sharded(x) else x).detach().cpu()
            return x.float().numpy() if x.dtype is torch.bfloat16 else x.numpy()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            text = f"Expected values to read. Received: a {type(x).__name__} on {x.device}, which has none yet."
            raise ValueError(text) from error

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        x, options = _autocast(x, options)
        if torch.compiler.is_compiling() and _is_only_compiled(x, operands):
            if torch.is_grad_enabled() and x.requires_grad:
                return _TracedLoss.apply(loss, options, x, *operands)
            return formulas.value(traced, loss, options, x, operands)
        if torch.compiler.is_compiling() or not _plain(x, operands):
            return formulas.value(self.namespace(x), loss, options, x, operands, by_autodiff=True)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Loss.apply(loss, options, x, *operands)
        return _run(formulas.value, loss, options, x, operands)[0]

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        constant = not (torch.is_grad_enabled() and x.requires_grad) and _plain(x, Operands(x))
        space = _space(x) if constant else self.namespace(x)
        return formulas.activation(space, function, x, half, by_autodiff=not constant)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        x, options = _autocast(x, options)
        with torch.no_grad():
            if not torch.compiler.is_compiling() and _plain(x, operands):
                return _run(formula, loss, options, x, operands)[0]
            return super().closed_form(formula, loss, options, x, operands)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        nested = x.requires_grad  # then the gradient will be differentiated again
        x = x if nested else x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x, cotangent, create_graph=nested)
        return value if nested else value.detach(), gradient


def _plain(x: Array, operands: Operands) -> bool:
    """Whether these are ordinary tensors in eager mode, and only the logits may need a gradient."""
    return (
        (type(x) in ORDINARY or _is_sharded(x))
        and not internals.is_transformed()
        and not internals.is_traced()
        and not internals.is_overridden()
        and not torch.jit.is_tracing()
        and not any(
            array is not None and (array.requires_grad or not (type(array) in ORDINARY or _is_sharded(array)))
            for array in operands
        )
    )


def _is_only_compiled(x: Array, operands: Operands) -> bool:
    """The same under torch.compile, where whatever else is to be done with the losses is in the program, too."""
    return (
        type(x) in ORDINARY
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and _goes_to_aot_autograd()
        and not _is_transformed()
        and not any(array is not None and (array.requires_grad or type(array) not in ORDINARY) for array in operands)
    )


@constant_in_dynamo
def _goes_to_aot_autograd() -> bool:
    """Whether the backend of torch.compile refuses second derivatives. Others would leave those of _TracedLoss out."""
    name = internals.compiler()
    return name == "inductor" or name.startswith("aot_")


@constant_in_dynamo
def _load() -> None:
    xp.load()
    traced.load()


@constant_in_dynamo
def _is_transformed() -> bool:
    return internals.is_transformed()


def _autocast(x: Array, options: Options) -> tuple[Array, Options]:
    """Half-precision logits in float32 under autocast, which so runs PyTorch's own losses, whose result is float32."""
    device = x.device.type
    if options.half and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not: "meta"
        return x.to(torch.float32), options._replace(half=False)
    return x, options


def _is_sharded(x: Array) -> bool:
    """Whether this is a DTensor. They are imported by those who have one."""
    return type(x) not in ORDINARY and hasattr(x, "device_mesh")


def _replicated(data: Array, like: Array) -> Array:
    """Data that every process has, beside a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(data, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _sharded_like(x: Array) -> Namespace:
    """The namespace for a DTensor, whose classes may be spread over processes: they exchange rows, never logits."""
    from torch.distributed.tensor import Replicate, Shard

    mine = [Shard(0) if place.is_shard(x.ndim - 1) else Replicate() for place in x.placements]

    def arange(n: int, device: Any = None) -> Array:  # each process makes the numbers of its own classes
        return _replicated(torch.arange(n, device=device), x).redistribute(placements=mine)

    def at_once(reduce: Any) -> Any:
        """The reduction with its result exchanged. Left for later, it would be when it has met all logits of a row."""

        def reduced(x: Array, *, axis: int | None = None, **options: Any) -> Array:
            rows = reduce(x, axis=axis, **options)
            done = [Replicate() if place.is_partial() else place for place in rows.placements]
            return rows if axis is None else rows.redistribute(placements=done)

        return reduced

    reductions = {name: at_once(getattr(xp, name)) for name in ("any", "max", "sum")}
    return Extended(xp, arange=arange, **reductions)


class _Module(torch.nn.Module):
    """A loss with its options set; weights among them are buffers, so that they move and are saved with the module."""

    loss: Any
    buffer_names: tuple[str, ...]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in self.buffer_names:
            given = options.pop(name)
            self.register_buffer(name, None if given is None else torch.as_tensor(given))
        self.options = options

    def forward(self, logits: Array, targets: Array, **options: Any) -> Array:
        buffers = {name: getattr(self, name) for name in self.buffer_names}
        return type(self).loss(logits, targets, **self.options, **buffers, **options)

    def extra_repr(self) -> str:
        defaults = type(self).loss.__kwdefaults__
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value != defaults[name])


class MultilabelLogisticLoss(_Module):
    """`unilabel.multilabel_logistic_loss` as a module: `module(logits, targets, where=None)`.

    >>> loss = MultilabelLogisticLoss(pos_weight=[1.0, 2.0], reduction="mean")
    >>> loss
    MultilabelLogisticLoss(reduction='mean')
    >>> f"{loss(torch.tensor([[0.5, -1.0]]), torch.tensor([[1, 1]])):.6f}"
    '1.550300'
    """

    loss = staticmethod(multilabel_logistic_loss)
    buffer_names = ("weight", "pos_weight")

    def __init__(
        self,
        *,
        weight: Any = None,
        pos_weight: Any = None,
        label_smoothing: float = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(
            weight=weight, pos_weight=pos_weight, label_smoothing=label_smoothing, axis=axis, reduction=reduction
        )


class SoftmaxNLL(_Module):
    """`unilabel.softmax_nll` as a module: `module(logits, targets, sample_weight=None, where=None)`.

    Its class axis is the last, where `torch.nn.CrossEntropyLoss` has `axis=1`.

    >>> loss = SoftmaxNLL(ignore_index=-100)
    >>> loss
    SoftmaxNLL(ignore_index=-100)
    >>> f"{loss(torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 0.0]]), torch.tensor([0, -100])):.6f}"
    '0.241311'
    """

    loss = staticmethod(softmax_nll)
    buffer_names = ("weight",)

    def __init__(
        self,
        *,
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, axis=axis, reduction=reduction
        )


backend = TorchBackend()
