"""The losses as PyTorch modules, for whatever takes PyTorch's own. The class axis is the last, and not 1 as there.

Each loss on logits is a subclass of PyTorch's with the same activation: by the class, skorch and others choose how to
predict. The losses on the last linear layer's inputs hold that layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
import torch.fx

from .. import checks
from ..activations import sigmoid, softmax
from ..backend import backend_of, is_number
from ..canonical import TAKES
from ..formulas import Reduction
from ..linear import linear_multilabel_logistic_loss, linear_softmax_nll
from ..losses import multilabel_logistic_loss, softmax_nll

for _name in ("multilabel_logistic_loss", "softmax_nll", "linear_multilabel_logistic_loss", "linear_softmax_nll"):
    torch.fx.wrap(_name)  # symbolic_trace has neither shapes nor dtypes, which they ask for: one call in its graph

WEIGHTS = ("weight", "pos_weight")
PER_CALL = ("sample_weight", "where", "linear_bias")


class _Options(TypedDict, total=False):
    """Of a call, for type checkers."""

    weight: Any
    label_smoothing: Any
    axis: int | tuple[int, ...]
    reduction: Reduction
    validate: bool


class _OptionsOfMultilabel(_Options, total=False):
    pos_weight: Any


class _OptionsOfSoftmax(_Options, total=False):
    ignore_index: int | None


def _kept(loss: Any) -> dict[str, Any]:
    """The options of a loss that its module keeps, with their defaults."""
    return {name: default for name, default in loss.__kwdefaults__.items() if name not in PER_CALL}


class _Module(torch.nn.Module):
    """A loss whose options are attributes, and checked whenever they are set; arrays are buffers or parameters."""

    defaults: dict[str, Any]  # of the options
    per_class: bool  # whether weights have one dimension

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.defaults:
            value = self._checked(name, value)
            if name not in WEIGHTS and not isinstance(value, torch.Tensor):
                self._buffers.pop(name, None)  # a number where a tensor was
            elif not (name in self._buffers or name in self._parameters or isinstance(value, torch.nn.Parameter)):
                self.__dict__.pop(name, None)
                self.register_buffer(name, None)
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        if name not in WEIGHTS and (name != "label_smoothing" or is_number(value)):
            return checks.option(name, value)
        if value is None:
            return None
        # In float64 if it is no floating tensor already: no digit of a list is lost, and integers can become floats.
        like = value if isinstance(value, torch.Tensor) else torch.empty(0, dtype=torch.float64)
        array, _ = checks.operand(backend_of(like, value), name, value, TAKES[name], like, "float64")
        if name not in WEIGHTS:
            checks.has_no_axis(name, array)
        elif self.per_class:
            checks.has_one_axis(name, array)
        return array if array.is_floating_point() else array.to(torch.float64)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        try:
            return super()._apply(fn, recurse)
        except TypeError:  # the device has no float64, as Apple's
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.dtype is torch.float64:
                    self._buffers[name] = buffer.to(torch.float32)
            return super()._apply(fn, recurse)

    def _with(self, options: Any) -> dict[str, Any]:
        """The module's options, and those of a call, which win."""
        own = {name: getattr(self, name) for name in self.defaults}
        if isinstance(options, torch.fx.Proxy):  # symbolic_trace of the module itself: its graph is to take none
            options.tracer.graph.erase_node(options.node)
            return own
        return own | options

    def extra_repr(self) -> str:
        own = {name: getattr(self, name) for name in self.defaults}
        plain = {name: value for name, value in own.items() if not isinstance(value, torch.Tensor)}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items() if value != self.defaults[name])


class MultilabelLogisticLoss(_Module, torch.nn.BCEWithLogitsLoss):
    """`unilabel.multilabel_logistic_loss` as a module: `module(input, target, *, where=None)`.

    The class axis is the last: for logits of shape (N, C, H, W) give `axis=1`. With `reduction="mean"` this is
    `torch.nn.BCEWithLogitsLoss`; the default sums over the classes, and takes logits of one dimension for one example.

    Args:
        weight, pos_weight: as in the function: buffers, or parameters if they are a `torch.nn.Parameter`. A tensor of
            floats keeps its dtype, all else becomes float64, so that no digit is lost.
        label_smoothing, axis, reduction, validate: as in the function.

    They are attributes that can be set, and a call can have its own: `module(input, target, reduction="none")`.

    Returns:
        What the function returns.

    Raises:
        TypeError, ValueError: as the function; of an option, when it is given or set.

    >>> loss = MultilabelLogisticLoss(pos_weight=[1.0, 2.0], reduction="mean")
    >>> loss
    MultilabelLogisticLoss(reduction='mean')
    >>> f"{loss(torch.tensor([[0.5, -1.0]]), torch.tensor([[1, 1]])):.6f}"
    '1.550300'
    """

    defaults = _kept(multilabel_logistic_loss)
    per_class = False

    def __init__(
        self,
        weight: Any = None,
        *,
        pos_weight: Any = None,
        label_smoothing: Any = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: Reduction = "batchmean",
        validate: bool = False,
    ) -> None:
        super().__init__(
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )

    def forward(
        self, input: torch.Tensor, target: Any, *, where: Any = None, **options: Unpack[_OptionsOfMultilabel]
    ) -> torch.Tensor:
        return multilabel_logistic_loss(input, target, where=where, **self._with(options))

    if TYPE_CHECKING:
        # PyTorch's takes and returns Any.
        def __call__(
            self, input: torch.Tensor, target: Any, *, where: Any = None, **options: Unpack[_OptionsOfMultilabel]
        ) -> torch.Tensor: ...

    def activation(self, input: torch.Tensor) -> torch.Tensor:
        """The probability of each class. fastai asks the loss for it."""
        return sigmoid(input)

    def decodes(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Whether each class is a label, from its probability."""
        return probabilities > 0.5


class SoftmaxNLL(_Module, torch.nn.CrossEntropyLoss):
    """`unilabel.softmax_nll` as a module: `module(input, target, *, sample_weight=None, where=None)`.

    The class axis is the last: for logits of shape (N, C, H, W) give `axis=1`. And no index is ignored unless you say
    so: `torch.nn.CrossEntropyLoss()` is `SoftmaxNLL(axis=1, ignore_index=-100)`.

    Args:
        weight: one for each class, a buffer or a parameter, as in `MultilabelLogisticLoss`.
        ignore_index, label_smoothing, axis, reduction, validate: as in the function.

    They are attributes that can be set, and a call can have its own: `module(input, target, reduction="none")`.

    Returns:
        What the function returns.

    Raises:
        TypeError, ValueError: as the function; of an option, when it is given or set.

    >>> loss = SoftmaxNLL(ignore_index=-100)
    >>> loss
    SoftmaxNLL(ignore_index=-100)
    >>> f"{loss(torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 0.0]]), torch.tensor([0, -100])):.6f}"
    '0.241311'
    """

    defaults = _kept(softmax_nll)
    per_class = True
    y_int = True  # fastai's MixUp is to mix the losses, not the class indices

    def __init__(
        self,
        weight: Any = None,
        *,
        ignore_index: int | None = None,
        label_smoothing: Any = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: Reduction = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )

    def forward(
        self,
        input: torch.Tensor,
        target: Any,
        *,
        sample_weight: Any = None,
        where: Any = None,
        **options: Unpack[_OptionsOfSoftmax],
    ) -> torch.Tensor:
        return softmax_nll(input, target, sample_weight=sample_weight, where=where, **self._with(options))

    if TYPE_CHECKING:

        def __call__(
            self,
            input: torch.Tensor,
            target: Any,
            *,
            sample_weight: Any = None,
            where: Any = None,
            **options: Unpack[_OptionsOfSoftmax],
        ) -> torch.Tensor: ...

    def activation(self, input: torch.Tensor) -> torch.Tensor:
        """The distribution over the classes. fastai asks the loss for it."""
        return softmax(input, axis=self.axis)

    def decodes(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The index of the most probable class."""
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        last = tuple(range(-len(axes), 0))
        return probabilities.movedim(axes, last).flatten(-len(axes)).argmax(-1)


class _LinearModule(_Module):
    """A loss that holds the model's last linear layer, as its submodule `linear`."""

    linear: torch.nn.Linear
    __call__: Callable[..., torch.Tensor]

    def __init__(self, *layer: Any, **options: Any) -> None:
        super().__init__(**options)
        self.linear = torch.nn.Linear(*layer)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and name in ("weight", "bias", "linear_weight", "linear_bias"):
            size = [getattr(getattr(self, "linear", None), f"{end}_features", None) for end in ("out", "in")]
            if name != "weight" or list(value.shape) == size:  # nothing would train it, or it would weigh the classes
                raise AttributeError(f"Set module.linear.{name.removeprefix('linear_')}, not module.{name}.")
        super().__setattr__(name, value)

    def _of_layer(self, loss: Any, input: torch.Tensor, target: Any, options: dict[str, Any]) -> torch.Tensor:
        linear: Any = self.linear  # not called: that would make the logits
        made = [name for name in ("weight_g", "bias_g", "weight_orig", "bias_orig") if hasattr(linear, name)]  # hooks'
        if made or type(linear).forward is not torch.nn.Linear.forward:
            only = "a torch.nn.Linear, whose weight and bias alone are read (else: a loss of module.logits(input))"
            checks.fail(TypeError, "module.linear", only, f"{type(linear)} with {', '.join(made) or 'its own forward'}")
        return loss(input, linear.weight, target, linear_bias=linear.bias, **options)

    def logits(self, input: torch.Tensor) -> torch.Tensor:
        """The logits of all classes, to predict with."""
        return self.linear(input)


class LinearMultilabelLogisticLoss(_LinearModule):
    """The last linear layer and `unilabel.linear_multilabel_logistic_loss`, called as `MultilabelLogisticLoss` is.

    It takes the place of `torch.nn.Linear(in_features, num_classes)` and `MultilabelLogisticLoss()`, without the logits
    in memory. `module.linear` is that layer, and `module.logits(input)` predicts. Of it the loss reads weight and bias,
    which `torch.nn.utils.parametrize` may make (as for LoRA); it calls none of its hooks.

    Args:
        in_features, num_classes, bias, device, dtype: of the linear layer, as in `torch.nn.Linear`.
        weight, pos_weight: as in `MultilabelLogisticLoss`.
        label_smoothing, reduction, validate: as in `unilabel.linear_multilabel_logistic_loss`.

    Options are attributes that can be set, and a call can have its own: `module(input, target, reduction="none")`.

    Returns:
        What the function returns.

    Raises:
        TypeError, ValueError: as the function; of an option, when it is given or set.

    >>> head = LinearMultilabelLogisticLoss(4, 3)
    >>> loss = head(torch.ones(2, 4), torch.tensor([[1, 0, 1], [0, 0, 0]]))
    >>> loss.backward()
    >>> head.linear.weight.grad.shape
    torch.Size([3, 4])
    """

    defaults = _kept(linear_multilabel_logistic_loss)
    per_class = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Any = None,
        pos_weight: Any = None,
        label_smoothing: Any = 0.0,
        reduction: Reduction = "batchmean",
        validate: bool = False,
    ) -> None:
        options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": label_smoothing}
        options |= {"reduction": reduction, "validate": validate}
        super().__init__(in_features, num_classes, bias, device, dtype, **options)

    def forward(self, input: torch.Tensor, target: Any, *, where: Any = None, **options: Any) -> torch.Tensor:
        options = self._with(options) | {"where": where}
        return self._of_layer(linear_multilabel_logistic_loss, input, target, options)


class LinearSoftmaxNLL(_LinearModule):
    """The last linear layer and `unilabel.linear_softmax_nll`, called as `SoftmaxNLL` is.

    It takes the place of `torch.nn.Linear(in_features, num_classes)` and `SoftmaxNLL()`, as the multilabel one does.
    `module.linear.weight = embedding.weight` ties its layer to an embedding.

    Args:
        in_features, num_classes, bias, device, dtype: of the linear layer, as in `torch.nn.Linear`.
        weight: one for each class, a buffer or a parameter, as in `SoftmaxNLL`.
        ignore_index, label_smoothing, reduction, validate: as in `unilabel.linear_softmax_nll`.

    Options are attributes and arguments of a call, as there. `torch.nn.LinearCrossEntropyLoss(D, C)` is
    `LinearSoftmaxNLL(D, C, bias=False, ignore_index=-100)`, with the same names in its state.

    Returns:
        What the function returns.

    Raises:
        TypeError, ValueError: as the function; of an option, when it is given or set.

    >>> head = LinearSoftmaxNLL(4, 3, ignore_index=-100)
    >>> head
    LinearSoftmaxNLL(
      ignore_index=-100
      (linear): Linear(in_features=4, out_features=3, bias=True)
    )
    >>> head(torch.ones(2, 4), torch.tensor([0, -100])).backward()
    >>> head.logits(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    defaults = _kept(linear_softmax_nll)
    per_class = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: Any = 0.0,
        reduction: Reduction = "mean",
        validate: bool = False,
    ) -> None:
        options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        options |= {"reduction": reduction, "validate": validate}
        super().__init__(in_features, num_classes, bias, device, dtype, **options)

    def forward(
        self, input: torch.Tensor, target: Any, *, sample_weight: Any = None, where: Any = None, **options: Any
    ) -> torch.Tensor:
        options = self._with(options) | {"sample_weight": sample_weight, "where": where}
        return self._of_layer(linear_softmax_nll, input, target, options)
