"""PyTorch: an autograd.Function with the closed-form gradient in eager mode, the plain expression everywhere else.

`MultilabelLogisticLoss` and `SoftmaxNLL` are the losses as modules.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as compat
import numpy as np
import torch

from .. import formulas
from ..backend import Backend, Extended
from ..formulas import Array, Loss, Namespace, Operands, Options
from ..losses import multilabel_logistic_loss, softmax_nll

xp = Extended(compat, stop_gradient=torch.Tensor.detach)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Loss, options: Options, x: Array, *operands: Array | None) -> Array:
        ctx.loss, ctx.options = loss, options
        ctx.save_for_backward(x, *operands)
        return formulas.value(xp, loss, options, x, Operands(*operands))

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Any, ...]:
        x, *operands = ctx.saved_tensors
        # Under create_graph these operations are recorded, and so differentiable again.
        gradient = formulas.gradient(xp, ctx.loss, ctx.options, x, Operands(*operands), cotangent)
        return None, None, gradient, *(None for _ in operands)


class TorchBackend(Backend):
    name = "torch"
    install = "pip install torch"
    autodiff = True

    def devices(self) -> list[str]:
        return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]

    def device(self, x: Array) -> str:
        return str(x.device)

    def namespace(self, x: Array) -> Namespace:
        return xp

    def problem(self, x: Array) -> str | None:
        if not isinstance(x, torch.Tensor):
            return f"torch {type(x).__name__}"
        return "a nested tensor" if x.is_nested else f"layout {x.layout}" if x.layout is not torch.strided else None

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
        return data.to(place)

    def to_numpy(self, x: Array) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            raise ValueError("Expected values to read. Received: a tensor that torch traces, which has none yet.")
        x = x.detach().cpu()
        return x.float().numpy() if x.dtype is torch.bfloat16 else x.numpy()

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        if not _plain(x, operands):
            return formulas.value(xp, loss, options, x, operands, by_autodiff=True)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Loss.apply(loss, options, x, *operands)
        return formulas.value(xp, loss, options, x, operands)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        with torch.no_grad():
            return super().closed_form(formula, loss, options, x, operands)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        nested = x.requires_grad  # then the gradient will be differentiated again
        x = x if nested else x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x, cotangent, create_graph=nested)
        return value if nested else value.detach(), gradient


def _plain(x: Array, operands: Operands) -> bool:
    """Whether these are ordinary tensors in eager mode, where only the logits may need a gradient."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._get_tracing_state()
        and not any(array is not None and array.requires_grad for array in operands)
    )


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
