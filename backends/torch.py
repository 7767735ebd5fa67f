"""PyTorch: an autograd.Function with the closed-form gradient, eager or compiled; else a differentiable expression."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import formulas
from ..backend import Array, Backend
from ..compilers import constant_in_dynamo
from ..formulas import Loss, Namespace, Operands, Options
from . import blocks
from .torch_internals import internals
from .torch_namespaces import differentiable, eager, finite, replicated, sharded_like, standard, traced


def _empty(shape: tuple[int, ...], like: Array) -> Array:
    """Memory from NumPy: it asks the system for huge pages. Most of torch's time with new memory is page faults."""
    if like.dtype is torch.bfloat16:
        return torch.from_numpy(np.empty(shape, np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.empty(shape, str(like.dtype).removeprefix("torch.")))


def _are_labels(z: Array) -> bool:
    if z.numel() < 1 << 13:  # it takes as long as it saves
        return False
    low, high = torch.aminmax(z)
    return low.item() >= 0 and high.item() <= 1 and torch.frac(z).sum().item() == 0


blockwise = blocks.Blockwise(
    eager,
    finite,
    _empty,
    torch.Tensor.is_contiguous,
    map,  # torch has threads of its own
    lambda x: bool(torch.isfinite(x).all()) if x.ndim else math.isfinite(x.item()),
    large=1 << 21,
    block=1 << 19,
    are_labels=_are_labels,
)

ORDINARY = (torch.Tensor, torch.nn.Parameter)  # and no subclass


class _Loss(torch.autograd.Function):
    """Of a reduced loss, forward computes the gradient too: the exponentials are the same, and backward needs it soon.

    Else a small array's is computed but for the cotangent; a large one's, and that of half precision, in backward.
    """

    @staticmethod
    def forward(ctx: Any, loss: Loss, options: Options, x: Array, *operands: Any) -> Array:
        given, ctx.gradient, ctx.unscaled = Operands(*operands), None, None
        masked = given.where is not None or options.ignore_index is not None
        if _on_cpu(x) and options.reduction != "none" and not options.half:
            (value, ctx.gradient), ctx.xp = _run(formulas.value_and_gradient, loss, options, x, given)
        elif masked or x.numel() >= blockwise.large or not _on_cpu(x):
            value, ctx.xp = _run(formulas.value, loss, options, x, given)
        else:
            (value, ctx.unscaled, ctx.divisor), ctx.xp = _run(
                formulas.value_and_unscaled_gradient, loss, options, x, given
            )
        ctx.loss, ctx.options = loss, options
        ctx.save_for_backward(x, *operands)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        x, *operands = ctx.saved_tensors
        call = ctx.loss, ctx.options, x, Operands(*operands), cotangent
        if torch.is_grad_enabled():  # under create_graph
            gradient = formulas.gradient(_space(x, autodiff=True), *call)
            # A function of x even where it is constant: its derivative is 0, not missing.
            gradient = torch.where(torch.ones_like(x, dtype=torch.bool), gradient, x)
        elif not _on_cpu(x) or internals.is_batched(cotangent):
            gradient = formulas.gradient(_space(x), *call)
        elif ctx.gradient is not None and math.isfinite(scale := cotangent.item()):
            gradient, ctx.gradient = ctx.gradient, None  # given away: a second backward computes it again
            if scale != 1:
                gradient.mul_(scale)
        elif ctx.unscaled is not None:
            found, ctx.unscaled = ctx.unscaled, None
            scale = eager.astype(cotangent, found.array.dtype)
            found.array.mul_(formulas.factor(eager, ctx.loss, ctx.options, found, scale, ctx.divisor))
            gradient = eager.astype(found.array, x.dtype)
        else:
            gradient = blocks.gradient(blockwise, ctx.xp, *call)
        return None, None, gradient, *(None for _ in operands)


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


def _run(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> tuple[Any, Namespace]:
    """The formula's result, where nothing is differentiated, and the namespace that it was computed with."""
    if _on_cpu(x):
        return blocks.run(blockwise, formula, loss, options, x, operands)
    xp = _space(x)
    return formula(xp, loss, options, x, operands), xp


def _on_cpu(x: Array) -> bool:
    """Whether blocks are faster, and reading a value does not wait for a device. (A DTensor may be on a CPU, too.)"""
    return x.device.type == "cpu" and not _is_sharded(x)


def _space(x: Array, autodiff: bool = False) -> Namespace:
    if _is_sharded(x):
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
        return sharded_like(x) if _is_sharded(x) else standard

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
            return "a DTensor, but the logits are none (give its .full_tensor() or .to_local())"
        if beside is not None and x.is_meta and not beside.is_meta:
            return "a tensor on the meta device, which has no values, but the logits have"
        return None

    def keeps_axis(self, x: Array) -> bool:
        return type(x) in ORDINARY and not torch.compiler.is_compiling()

    def cache_key(self, x: Array, targets: Any) -> Any:
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
        return replicated(data, like) if _is_sharded(like) and not _is_sharded(data) else data

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
        if torch.compiler.is_compiling() or not _is_ordinary(x, operands):
            return formulas.value(_space(x, autodiff=True), loss, options, x, operands)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Loss.apply(loss, options, x, *operands)
        return _run(formulas.value, loss, options, x, operands)[0]

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        constant = not (torch.is_grad_enabled() and x.requires_grad) and _is_ordinary(x, Operands(x))
        return formulas.activation(_space(x, autodiff=not constant), function, x, half)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        x, options = _autocast(x, options)
        with torch.no_grad():
            if not torch.compiler.is_compiling() and _is_ordinary(x, operands):
                return _run(formula, loss, options, x, operands)[0]
            return super().closed_form(formula, loss, options, x, operands)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        nested = x.requires_grad  # then the gradient will be differentiated again
        x = x if nested else x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x, cotangent, create_graph=nested)
        return value if nested else value.detach(), gradient


def _is_ordinary(x: Array, operands: tuple[Any, ...]) -> bool:
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


def _is_only_compiled(x: Array, operands: tuple[Any, ...]) -> bool:
    """The same under torch.compile, and nothing but torch.compile: no export, no transform."""
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
    """Whether torch.compile's backend raises on second derivatives: others would silently drop those of _TracedLoss."""
    name = internals.compiler()
    return name == "inductor" or name.startswith("aot_")


@constant_in_dynamo
def _load() -> None:
    for xp in (standard, differentiable, traced):
        xp.load()


@constant_in_dynamo
def _is_transformed() -> bool:
    return internals.is_transformed()


def _autocast(x: Array, options: Options) -> tuple[Array, Options]:
    """Half-precision logits in float32 under autocast, as PyTorch's own losses, whose result is float32 there."""
    device = x.device.type
    if options.half and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not: "meta"
        return x.to(torch.float32), options._replace(half=False)
    return x, options


def _is_sharded(x: Array) -> bool:
    """Whether this is a DTensor. They are imported by those who have one."""
    return type(x) not in ORDINARY and hasattr(x, "device_mesh")


backend = TorchBackend()


def __getattr__(name: str) -> Any:
    """The layers, where they were before they had a file of their own."""
    if name in ("MultilabelLogisticLoss", "SoftmaxNLL"):
        from ..layers import torch as layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
