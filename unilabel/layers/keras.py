"""Keras 3: the losses as `keras.losses.Loss`, on any Keras backend, whose framework's arrays they are given.

Keras imports no module when it loads a model, for safety: `import unilabel.layers.keras` before
`keras.saving.load_model` of a model that was compiled with one of them, or load it with `compile=False`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np

from .. import checks
from ..backend import backend_of, is_of_pandas, pandas_values
from ..losses import multilabel_logistic_loss, softmax_nll

try:
    from keras.src.backend import set_keras_mask
except ImportError:  # Keras 3.5 has no such function, and does this

    def set_keras_mask(x: Any, mask: Any) -> None:
        with contextlib.suppress(AttributeError):
            x._keras_mask = mask


Array = Any
HELD = (-(2**31), 2**31 - 1)  # what every Keras backend holds of an integer; neither is an ignore_index

CHECKED = ("weight", "pos_weight", "ignore_index", "label_smoothing", "axis")


def _checked(label: str, given: Any) -> Any:
    """An option as an attribute, and as the config can hold it."""
    if label not in ("weight", "pos_weight"):
        return checks.option(label, tuple(given) if isinstance(given, list) else given)  # JSON makes a list of a tuple
    if given is None:
        return None
    if keras.ops.is_tensor(given):
        given = backend_of(given).to_numpy(given)  # it may be on a GPU, or require a gradient
    elif hasattr(given, "__array__"):
        given = np.asarray(given)
    like = np.zeros(())
    return checks.operand(backend_of(like), label, given, checks.NUMBERS, like, "float64")[0].tolist()


class _Loss(keras.losses.Loss):
    """The loss of each example; Keras weights and reduces them. Options are attributes, and in the config."""

    def __init__(self, name: str | None, reduction: str | None, dtype: Any, **options: Any) -> None:
        # Class indices that come as floats would be rounded in half precision; so float32, and float64 if Keras is.
        dtype = dtype or ("float64" if keras.config.floatx() == "float64" else "float32")
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"Expected dtype 'float32' or 'float64', for half precision too. Received: {dtype!r}.")
        self.option_names = tuple(options)
        for option, given in options.items():
            setattr(self, option, given)

    def __setattr__(self, name: str, given: Any) -> None:
        super().__setattr__(name, _checked(name, given) if name in CHECKED else given)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.option_names}

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"dtype": self.dtype} | self.options

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Array:
        return _Call(self, _array(y_true))((), _array(y_pred), sample_weight)


class _Call(keras.losses.Loss):
    """One call of a loss. The targets go past Keras' cast to float, which rounds class indices above 2**24."""

    def __init__(self, loss: _Loss, y_true: Any) -> None:
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss, self.y_true = loss, y_true

    def call(self, y_true: Any, y_pred: Any) -> Array:
        integers = keras.backend.is_int_dtype(self.y_true.dtype)
        y_true = keras.ops.convert_to_tensor(self.y_true, dtype=None if integers else self.dtype)
        return self.loss.call(y_true, y_pred)


def _array(given: Any) -> Any:
    """Lists, pandas and all else that has no dtype as an array, of NumPy if no tensor is in it."""
    if is_of_pandas(given):
        given = pandas_values(given)
    elif not hasattr(given, "dtype"):
        tensors = any(map(keras.ops.is_tensor, keras.tree.flatten(given)))
        given = keras.ops.convert_to_tensor(given) if tensors else np.asarray(given)
    if isinstance(given, np.ndarray) and given.dtype in ("int64", "uint64"):
        # JAX would cut off the upper half of the bits, so that an index out of range became one in range.
        given = np.clip(given, *HELD if given.dtype == "int64" else (0, HELD[1])).astype("int32")
    return given


@keras.saving.register_keras_serializable(package="unilabel")
class MultilabelLogisticLoss(_Loss):
    """`unilabel.multilabel_logistic_loss` for `model.compile(loss=…)`: summed over classes, averaged over examples.

    Args:
        weight, pos_weight, label_smoothing: as in `unilabel.multilabel_logistic_loss`; numbers, which the config holds.
        axis: the class axis, or a tuple of axes read as one.
        name, reduction, dtype: as in `keras.losses.Loss`; dtype is "float32" or "float64".

    `keras.losses.BinaryCrossentropy(from_logits=True)` averages over the classes as well. As there, targets (N,) fit
    logits (N, 1), and the reverse.

    >>> loss = MultilabelLogisticLoss(pos_weight=[1.0, 2.0])
    >>> f"{float(loss([[1, 1]], [[0.5, -1.0]])):.6f}"
    '3.100600'
    """

    def __init__(
        self,
        *,
        weight: Any = None,
        pos_weight: Any = None,
        label_smoothing: float = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "multilabel_logistic_loss",
        dtype: Any = None,
    ) -> None:
        options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": label_smoothing, "axis": axis}
        super().__init__(name, reduction, dtype, **options)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        if len(y_true.shape) == 1 and tuple(y_pred.shape[1:]) == (1,):
            y_true = keras.ops.expand_dims(y_true, -1)
        elif len(y_pred.shape) == 1 and tuple(y_true.shape[1:]) == (1,):
            y_pred = keras.ops.expand_dims(y_pred, -1)
        losses = multilabel_logistic_loss(y_pred, y_true, reduction="none", **self.options)
        return keras.ops.sum(losses, axis=self.axis)


@keras.saving.register_keras_serializable(package="unilabel")
class SoftmaxNLL(_Loss):
    """`unilabel.softmax_nll` for `model.compile(loss=…)`, on class indices or distributions.

    Args:
        weight, label_smoothing: as in `unilabel.softmax_nll`; numbers, which the config holds.
        ignore_index: the class index of examples that do not count. As with `ignore_class` of Keras' own
            `SparseCategoricalCrossentropy`, "sum_over_batch_size" divides by the number of the others (not by their
            weights), and is 0 if there are none.
        axis: the class axis, or a tuple of axes read as one.
        name, reduction, dtype: as in `keras.losses.Loss`; dtype is "float32" or "float64".

    Class indices may have the class axis with length 1, as Keras' own data sets do: (N, 1) for logits (N, C).

    >>> loss = SoftmaxNLL(label_smoothing=0.1)
    >>> f"{float(loss([0], [[2.0, 0.5, -1.0]])):.6f}"
    '0.391311'
    """

    def __init__(
        self,
        *,
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        axis: int | tuple[int, ...] = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "softmax_nll",
        dtype: Any = None,
    ) -> None:
        options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "axis": axis}
        super().__init__(name, reduction, dtype, **options)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        axes = checks.class_axes(self.axis, len(y_pred.shape), "logits", True)
        if len(y_true.shape) == len(y_pred.shape) and all(y_true.shape[i] == 1 != y_pred.shape[i] for i in axes):
            y_true = keras.ops.squeeze(y_true, axis=axes)
        if len(y_true.shape) < len(y_pred.shape) and not keras.backend.is_int_dtype(y_true.dtype):
            y_true = keras.ops.cast(y_true, "int32")  # class indices that came as floats
        losses = softmax_nll(y_pred, y_true, reduction="none", **self.options)
        if self.ignore_index is not None:
            held = np.iinfo(keras.backend.standardize_dtype(y_true.dtype))
            if held.min <= self.ignore_index <= held.max:
                set_keras_mask(losses, keras.ops.not_equal(y_true, self.ignore_index))
        return losses
