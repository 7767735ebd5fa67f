"""Keras 3: the losses as `keras.losses.Loss`, on any Keras backend, whose framework's arrays they are given.
Those on the last linear layer's inputs are layers, which hold its weights and add the loss: endpoints of a model.

Keras imports no module when it loads a model, for safety: `import unilabel.layers.keras` before
`keras.saving.load_model` of a model that was compiled with one of them, or load it with `compile=False`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np

from .. import checks
from ..linear import linear_multilabel_logistic_loss, linear_softmax_nll
from ..losses import multilabel_logistic_loss, softmax_nll
from ..positives import Positives
from .keras_arguments import WithOptions, as_array, class_indices, labelled

try:
    from keras.src.backend import set_keras_mask
except ImportError:  # Keras 3.5 has no such function, and does this

    def set_keras_mask(x: Any, mask: Any) -> None:
        with contextlib.suppress(AttributeError):
            x._keras_mask = mask


Array = Any


class _Loss(WithOptions, keras.losses.Loss):
    """The loss of each example; Keras weights and reduces them."""

    def __init__(self, name: str | None, reduction: str | None, dtype: Any, **options: Any) -> None:
        # Class indices that come as floats would be rounded in half precision; so float32, and float64 if Keras is.
        dtype = dtype or ("float64" if keras.config.floatx() == "float64" else "float32")
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"Expected dtype 'float32' or 'float64', for half precision too. Received: {dtype!r}.")
        self._set(options)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"dtype": self.dtype} | self.options

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Array:
        return _Call(self, as_array(y_true))((), as_array(y_pred), sample_weight)


class _Call(keras.losses.Loss):
    """One call of a loss. The targets go past Keras' cast to float, which rounds class indices above 2**24."""

    def __init__(self, loss: _Loss, y_true: Any) -> None:
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss, self.y_true = loss, y_true

    def call(self, y_true: Any, y_pred: Any) -> Array:
        y_true = self.y_true
        if not isinstance(y_true, Positives):
            integers = keras.backend.is_int_dtype(y_true.dtype)
            y_true = keras.ops.convert_to_tensor(y_true, dtype=None if integers else self.dtype)
        return self.loss.call(y_true, y_pred)


@keras.saving.register_keras_serializable(package="unilabel")
class MultilabelLogisticLoss(_Loss):
    """`unilabel.multilabel_logistic_loss` for `model.compile(loss=…)`: summed over classes, averaged over examples.

    Args:
        weight, pos_weight, label_smoothing: as in `unilabel.multilabel_logistic_loss`; numbers, which the config holds.
        axis: the class axis, or a tuple of axes read as one.
        positives: whether targets are labels, (N, K), as in `unilabel.Positives`; `model.fit` hands over arrays alone.
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
        positives: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "multilabel_logistic_loss",
        dtype: Any = None,
    ) -> None:
        options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": label_smoothing, "axis": axis}
        super().__init__(name, reduction, dtype, **options)
        self.positives = positives

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"positives": self.positives}

    def call(self, y_true: Array, y_pred: Array) -> Array:
        if self.positives or isinstance(y_true, Positives):
            y_true = y_true if isinstance(y_true, Positives) else Positives(y_true)
        elif len(y_true.shape) == 1 and tuple(y_pred.shape[1:]) == (1,):
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
        y_true = class_indices(y_true, y_pred.shape, axes)
        losses = softmax_nll(y_pred, y_true, reduction="none", **self.options)
        counted = labelled(y_true, self.ignore_index)
        if counted is not None:
            set_keras_mask(losses, counted)
        return losses


REDUCTIONS = ("sum_over_batch_size", "sum")


class _LinearLayer(WithOptions, keras.layers.Layer):
    """The last layer of a model and its loss: `layer(features, targets)` adds the loss, `layer(features)` predicts."""

    def __init__(
        self,
        num_classes: int,
        use_bias: bool,
        initializers: tuple[Any, Any],
        embedding: Any,
        reduction: str,
        keywords: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        super().__init__(autocast=False, **keywords)  # which would round the targets too
        if reduction not in REDUCTIONS:
            checks.fail(ValueError, "reduction", " or ".join(map(repr, REDUCTIONS)), repr(reduction))
        self.num_classes, self.use_bias, self.embedding, self.reduction = num_classes, use_bias, embedding, reduction
        self.kernel_initializer, self.bias_initializer = map(keras.initializers.get, initializers)
        self.supports_masking = True
        self._set(options)

    def get_config(self) -> dict[str, Any]:
        names = ("num_classes", "use_bias", "kernel_initializer", "bias_initializer", "embedding", "reduction")
        own = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in names}
        return super().get_config() | own | self.options

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config | {"embedding": keras.saving.deserialize_keras_object(config["embedding"])})

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (self.num_classes, input_shape[-1])
        if self.embedding is None:
            self._kernel = self.add_weight(shape, self._rows, name="kernel")
        elif tuple(self.kernel.shape) != shape:
            checks.fail(ValueError, "embedding", f"a table of shape {shape}", str(tuple(self.kernel.shape)))
        self.bias = self.add_weight(shape[:1], self.bias_initializer, name="bias") if self.use_bias else None

    def _rows(self, shape: tuple[int, int], dtype: Any = None) -> Array:
        """What the kernel of Dense starts from, transposed."""
        return keras.ops.transpose(self.kernel_initializer(shape[::-1], dtype=dtype))

    @property
    def kernel(self) -> Any:
        """The weights, one row for each class: those of the embedding, if there is one."""
        return self._kernel if self.embedding is None else self.embedding.embeddings

    def logits(self, features: Array) -> Array:
        """The logits of all classes, to predict with; the same as a call without targets."""
        return self(features)

    def call(
        self,
        features: Any,
        targets: Any = None,
        sample_weight: Any = None,
        where: Any = None,
        features_mask: Any = None,
    ) -> Array:
        def cast(arrays: Any, dtype: str) -> list[Any]:
            return [None if array is None else keras.ops.cast(array, dtype) for array in arrays]

        layer = cast((features, self.kernel, self.bias), self.compute_dtype)
        if targets is None:
            features, kernel, bias = layer
            logits = keras.ops.matmul(features, keras.ops.transpose(kernel))
            return logits if bias is None else logits + bias

        features, kernel, bias = cast(layer, self._loss_dtype)
        each = keras.ops.ones_like(features[..., 0])
        if sample_weight is not None:  # one for each example, or for the first axes of them, as Keras has it
            if len(sample_weight.shape) == len(each.shape) + 1 and sample_weight.shape[-1] == 1:
                sample_weight = keras.ops.squeeze(sample_weight, -1)
            if len(sample_weight.shape) > len(each.shape):
                expected = f"one for each example, {checks.shape_text(each.shape)}"
                checks.fail(ValueError, "sample_weight", expected, f"shape {checks.shape_text(sample_weight.shape)}")
            missing = range(len(sample_weight.shape), len(each.shape))
            sample_weight = each * keras.ops.cast(keras.ops.expand_dims(sample_weight, tuple(missing)), each.dtype)
        if features_mask is not None:
            mask = keras.ops.expand_dims(features_mask, -1)
            where = mask if where is None else keras.ops.logical_and(where, mask)
        targets, options, counted = self._of_examples(targets, (*features.shape[:-1], self.num_classes), sample_weight)
        loss = self._loss(features, kernel, targets, linear_bias=bias, where=where, reduction="sum", **options)
        if self.reduction != "sum":
            for counts in (features_mask, counted):
                each = each if counts is None else each * keras.ops.cast(counts, each.dtype)
            loss = loss / keras.ops.maximum(keras.ops.sum(each), 1)
        self.add_loss(loss)
        return loss

    def compute_output_spec(self, features: Any, targets: Any = None, *_: Any, **__: Any) -> keras.KerasTensor:
        if targets is None:
            return keras.KerasTensor((*features.shape[:-1], self.num_classes), self.compute_dtype)
        return keras.KerasTensor((), self._loss_dtype)

    @property
    def _loss_dtype(self) -> str:
        """Half precision is rounded as Dense rounds it, then multiplied in float32."""
        return "float64" if self.compute_dtype == "float64" else "float32"


@keras.saving.register_keras_serializable(package="unilabel")
class LinearMultilabelLogisticLoss(_LinearLayer):
    """`Dense(num_classes)` and `MultilabelLogisticLoss` as one layer, without the logits in memory.

    `layer(features, targets, sample_weight=None, where=None)` adds the loss to the model, as `add_loss` does, and
    returns it; `layer.logits(features)`, or a call without targets, predicts. Compile the model without a loss.

    Args:
        num_classes: units of `Dense`.
        use_bias, kernel_initializer, bias_initializer: as in `Dense`; `kernel` is its transpose, (num_classes, D).
        embedding: a `keras.layers.Embedding` whose table is the kernel: tied weights, in a saved model
            too; in one that `clone_model` makes, this layer has a copy of its own.
        weight, pos_weight, label_smoothing: as in `MultilabelLogisticLoss`.
        reduction: "sum_over_batch_size", a mean over the examples that are not masked, or "sum".
        keywords: of `keras.layers.Layer`: name, dtype, trainable.

    A training loop of your own uses the loss that it returns, or `model.losses`, in which it is. In Keras the
    `sample_weight` and `class_weight` of `fit` change no loss that a layer adds: make weights an input, as targets are.

    >>> layer = LinearMultilabelLogisticLoss(3, kernel_initializer="zeros")
    >>> f"{float(layer(np.ones((2, 4)), np.array([[1, 0, 1], [0, 0, 0]]))):.6f}"
    '2.079442'
    """

    _loss = staticmethod(linear_multilabel_logistic_loss)

    def __init__(
        self,
        num_classes: int,
        *,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        embedding: Any = None,
        weight: Any = None,
        pos_weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "sum_over_batch_size",
        **keywords: Any,
    ) -> None:
        options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": label_smoothing}
        initializers = kernel_initializer, bias_initializer
        super().__init__(num_classes, use_bias, initializers, embedding, reduction, keywords, options)

    def _of_examples(self, targets: Array, shape: Any, sample_weight: Any) -> tuple[Array, dict[str, Any], None]:
        options = self.options
        if sample_weight is not None:
            own = 1.0 if self.weight is None else np.asarray(self.weight, self._loss_dtype)
            options["weight"] = keras.ops.expand_dims(sample_weight, -1) * own
        return targets, options, None


@keras.saving.register_keras_serializable(package="unilabel")
class LinearSoftmaxNLL(_LinearLayer):
    """`Dense(num_classes)` and `SoftmaxNLL` as one layer, without the logits in memory.

    It is called as `LinearMultilabelLogisticLoss` is, and predicts as that does.

    Args:
        num_classes, use_bias, kernel_initializer, bias_initializer, embedding: as in `LinearMultilabelLogisticLoss`.
        weight, ignore_index, label_smoothing: as in `SoftmaxNLL`.
        reduction: "sum_over_batch_size", a mean over the examples that are not masked or ignored, or "sum".
        keywords: of `keras.layers.Layer`: name, dtype, trainable.

    >>> features, targets = keras.Input((4,)), keras.Input((), dtype="int32")
    >>> layer = LinearSoftmaxNLL(3, kernel_initializer="zeros")
    >>> model = keras.Model([features, targets], layer(features, targets))
    >>> model.compile("sgd")
    >>> f"{model.fit([np.ones((2, 4)), np.array([0, 2])], verbose=0).history['loss'][0]:.6f}"
    '1.098612'
    >>> keras.Model(features, layer(features)).predict(np.ones((5, 4)), verbose=0).shape
    (5, 3)
    """

    _loss = staticmethod(linear_softmax_nll)

    def __init__(
        self,
        num_classes: int,
        *,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        embedding: Any = None,
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "sum_over_batch_size",
        **keywords: Any,
    ) -> None:
        options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        initializers = kernel_initializer, bias_initializer
        super().__init__(num_classes, use_bias, initializers, embedding, reduction, keywords, options)

    def _of_examples(self, targets: Array, shape: Any, sample_weight: Any) -> tuple[Array, dict[str, Any], Any]:
        targets = class_indices(targets, shape, (-1,))
        return targets, self.options | {"sample_weight": sample_weight}, labelled(targets, self.ignore_index)
