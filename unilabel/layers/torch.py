"""The losses as PyTorch modules."""

from __future__ import annotations

from typing import Any

import torch

from ..losses import multilabel_logistic_loss, softmax_nll

Array = Any


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
