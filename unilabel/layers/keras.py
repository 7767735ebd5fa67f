"""Keras 3: the losses as `keras.losses.Loss`, on any Keras backend, whose framework's arrays they are given."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from ..losses import multilabel_logistic_loss, softmax_nll

Array = Any


class _Loss(keras.losses.Loss):
    """The loss of each example; Keras weights and reduces them. Options are in the config, arrays as lists."""

    def __init__(self, name: str | None, reduction: str, dtype: str | None, **options: Any) -> None:
        # In half precision class indices would be rounded before they came here; so float32, and float64 if Keras is.
        dtype = dtype or ("float64" if keras.config.floatx() == "float64" else "float32")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"Expected dtype 'float32' or 'float64', for half precision too. Received: {dtype!r}.")
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.options = {k: np.asarray(v).tolist() if hasattr(v, "__array__") else v for k, v in options.items()}

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"dtype": self.dtype} | self.options


@keras.saving.register_keras_serializable(package="unilabel")
class MultilabelLogisticLoss(_Loss):
    """`unilabel.multilabel_logistic_loss` for `model.compile(loss=…)`: summed over classes, averaged over examples.

    Args:
        weight, pos_weight, label_smoothing: as in `unilabel.multilabel_logistic_loss`.
        axis: the class axis, or a tuple of axes read as one.
        name, reduction, dtype: as in `keras.losses.Loss`; dtype is "float32" or "float64".

    `keras.losses.BinaryCrossentropy(from_logits=True)` averages over the classes as well.

    >>> loss = MultilabelLogisticLoss(pos_weight=[1.0, 2.0])
    >>> f"{float(loss(np.array([[1, 1]]), np.array([[0.5, -1.0]]))):.6f}"
    '3.100600'
    """

    def __init__(
        self,
        *,
        weight: Any = None,
        pos_weight: Any = None,
        label_smoothing: float = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: str = "sum_over_batch_size",
        name: str | None = "multilabel_logistic_loss",
        dtype: str | None = None,
    ) -> None:
        options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": label_smoothing, "axis": axis}
        super().__init__(name, reduction, dtype, **options)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        losses = multilabel_logistic_loss(y_pred, y_true, reduction="none", **self.options)
        return keras.ops.sum(losses, axis=self.options["axis"])


@keras.saving.register_keras_serializable(package="unilabel")
class SoftmaxNLL(_Loss):
    """`unilabel.softmax_nll` for `model.compile(loss=…)`, on class indices or distributions.

    Args:
        weight, ignore_index, label_smoothing: as in `unilabel.softmax_nll`. Keras' "sum_over_batch_size" divides by all
            examples, the ignored ones too, and by their number, not their weights.
        axis: the class axis, or a tuple of axes read as one.
        name, reduction, dtype: as in `keras.losses.Loss`; dtype is "float32" or "float64".

    Class indices may have the class axis with length 1, as Keras' own data sets do: (N, 1) for logits (N, C).

    >>> loss = SoftmaxNLL(label_smoothing=0.1)
    >>> f"{float(loss(np.array([0]), np.array([[2.0, 0.5, -1.0]]))):.6f}"
    '0.391311'
    """

    def __init__(
        self,
        *,
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: str = "sum_over_batch_size",
        name: str | None = "softmax_nll",
        dtype: str | None = None,
    ) -> None:
        options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "axis": axis}
        super().__init__(name, reduction, dtype, **options)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        axis = self.options["axis"]
        same_rank = len(y_true.shape) == len(y_pred.shape)
        if same_rank and isinstance(axis, int) and y_true.shape[axis] == 1 and y_pred.shape[axis] != 1:
            y_true = keras.ops.squeeze(y_true, axis=axis)
        if len(y_true.shape) < len(y_pred.shape):
            y_true = keras.ops.cast(y_true, "int32")  # Keras has cast the class indices to float
        return softmax_nll(y_pred, y_true, reduction="none", **self.options)
