"""Whose losses are run: unilabel's, a framework's own ("native", "keras"), or yours ("package.module:function").

For each loss of unilabel a subject may have a function with the same signature, `f(logits, targets, **options)` or
`f(features, linear_weight, targets, **options)`, or one that is called in another way (see `calls`). Where it does not
take an option, it raises NotApplicable: the case is reported as not applicable, never as passed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import unilabel
from unilabel.backend import Backend

from .calls import Array, LossFunction, NotApplicable, Way, adapted
from .cases import Case

OURS = ("unilabel", "native", "keras")  # any other subject is package.module:function


def find(subject: str, case: Case, claims: str | None, backend: Backend, way: Way) -> tuple[Case, LossFunction]:
    """The function to run for a case, and the case as it takes it.

    `claims` names the loss that a package.module:function claims to be, and `way` says how it is called.
    """
    if case.positives and subject != "unilabel" and "positives" not in way.targets:
        raise NotApplicable("takes no indices of labels, padded with -1")
    if ":" not in subject:
        return case, _ours(subject, case.loss, backend.name)
    loss = claimed(subject, claims)
    if case.loss != loss:
        raise NotApplicable(f"{subject} claims to be {loss}")
    function = imported(subject)
    return (case, _only_options(function)) if way == Way() else adapted(way, function, case, backend)


def _ours(subject: str, loss: str, backend: str) -> LossFunction:
    if subject == "unilabel":
        found: LossFunction = getattr(unilabel, loss)
        return found
    table = _keras() if subject == "keras" else NATIVE.get(backend, dict)()
    if loss not in table:
        raise NotApplicable(f"{subject} on {backend} has no {loss}")
    return _only_options(table[loss])


def named(subject: str) -> tuple[list[str], list[str]]:
    """The parts of package.module:function before and after the colon. ValueError if it is not of that form."""
    module, _, function = subject.partition(":")
    parts = module.split("."), function.split(".")
    if not all([*parts[0], *parts[1]]):
        raise ValueError("expected package.module:function")
    return parts


def imported(subject: str) -> LossFunction:
    """The function of package.module:function. Only a worker calls it: whatever an import does, it does there."""
    module, function = named(subject)
    found: Any = importlib.import_module(".".join(module))
    for part in function:
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"expected a function, received {type(found).__name__}")
    return found


def claimed(subject: str, claims: str | None) -> str:
    """The loss that package.module:function claims to be: that of --loss, or the one of its name."""
    return claims or named(subject)[1][-1]


def _only_options(function: LossFunction) -> LossFunction:
    """The function, which raises NotApplicable when it is called with an option that it does not have."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}

    def call(*operands: Array, **options: Any) -> Array:
        unknown = [] if takes_all else [name for name in options if name not in names]
        if unknown:
            raise NotApplicable(f"takes no {', '.join(unknown)}")
        return function(*operands, **options)

    return call


# --- The frameworks' own losses ---------------------------------------------------------------------------------------


def _examples(x: Array, axis: int) -> int:
    total = 1
    for i, n in enumerate(x.shape):
        total *= 1 if i == axis % len(x.shape) else n
    return max(total, 1)


def _one_axis(axis: int | tuple[int, ...]) -> int:
    if isinstance(axis, tuple):
        raise NotApplicable("has one class axis")
    return axis


def _reduced(sum_: Any, mean: Any, losses: Array, reduction: str, examples: int) -> Array:
    """The reduction that users of the framework write: its own sum or mean of its own losses."""
    if reduction == "none":
        return losses
    return mean(losses) if reduction == "mean" else sum_(losses) / (examples if reduction == "batchmean" else 1)


def _torch() -> dict[str, LossFunction]:
    import torch
    from torch.nn import functional

    def multilabel_logistic_loss(
        x: Array,
        z: Array,
        *,
        weight: Array = None,
        pos_weight: Array = None,
        axis: Any = -1,
        reduction: str = "batchmean",
    ) -> Array:
        own = "sum" if reduction == "batchmean" else reduction
        weight = None if weight is None else torch.as_tensor(weight, dtype=x.dtype)
        pos_weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=x.dtype)
        loss = functional.binary_cross_entropy_with_logits(
            x, z.to(x.dtype), weight, reduction=own, pos_weight=pos_weight
        )
        return loss / _examples(x, _one_axis(axis)) if reduction == "batchmean" else loss

    def softmax_nll(
        x: Array,
        y: Array,
        *,
        weight: Array = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        axis: Any = -1,
        reduction: str = "mean",
    ) -> Array:
        axis = _one_axis(axis) % x.ndim
        index = y.ndim < x.ndim
        if not index and reduction == "mean" and weight is not None:
            raise NotApplicable("divides distributions by the number of examples")
        target = y.long() if index else torch.movedim(y.to(x.dtype), axis, 1 if x.ndim > 1 else 0)
        own = "sum" if reduction == "batchmean" else reduction
        loss = functional.cross_entropy(
            torch.movedim(x, axis, 1 if x.ndim > 1 else 0),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=own,
            label_smoothing=label_smoothing,
        )
        return loss / _examples(x, axis) if reduction == "batchmean" else loss

    def binary_cross_entropy(
        p: Array, z: Array, *, weight: Array = None, axis: Any = -1, reduction: str = "batchmean"
    ) -> Array:
        own = "sum" if reduction == "batchmean" else reduction
        loss = functional.binary_cross_entropy(p, z.to(p.dtype), weight, reduction=own)
        return loss / _examples(p, _one_axis(axis)) if reduction == "batchmean" else loss

    def nll(
        log_p: Array, y: Array, *, weight: Array = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> Array:
        if y.ndim == log_p.ndim:
            raise NotApplicable("takes class indices only")
        own = "sum" if reduction == "batchmean" else reduction
        loss = functional.nll_loss(log_p, y.long(), weight, ignore_index=ignore_index, reduction=own)
        return loss / _examples(log_p, -1) if reduction == "batchmean" else loss

    def linear_softmax_nll(
        features: Array,
        linear_weight: Array,
        y: Array,
        *,
        linear_bias: Array = None,
        weight: Array = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Array:
        index = y.ndim < features.ndim
        if features.ndim > 2:
            raise NotApplicable("takes one axis of examples")
        if not index and reduction == "mean" and weight is not None:
            raise NotApplicable("divides distributions by the number of examples")
        loss = functional.linear_cross_entropy(
            features,
            linear_weight,
            y.long() if index else y,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignore_index,
            reduction="sum" if reduction == "batchmean" else reduction,
            label_smoothing=label_smoothing,
        )
        return loss / _examples(features, -1) if reduction == "batchmean" else loss

    own = multilabel_logistic_loss, softmax_nll, binary_cross_entropy, nll, linear_softmax_nll
    return {function.__name__: function for function in own}


def _optax() -> dict[str, LossFunction]:
    import jax.numpy as jnp
    import optax

    def multilabel_logistic_loss(x: Array, z: Array, *, axis: Any = -1, reduction: str = "batchmean") -> Array:
        losses = optax.sigmoid_binary_cross_entropy(x, z.astype(x.dtype))
        return _reduced(jnp.sum, jnp.mean, losses, reduction, _examples(x, _one_axis(axis)))

    def softmax_nll(x: Array, y: Array, *, where: Array = None, axis: Any = -1, reduction: str = "mean") -> Array:
        if where is not None and reduction == "mean":
            raise NotApplicable("leaves the mean over what is not masked to its user")
        if y.ndim < x.ndim:
            losses = optax.softmax_cross_entropy_with_integer_labels(x, y, axis=axis, where=where)
        else:
            losses = optax.softmax_cross_entropy(x, y.astype(x.dtype), axis=axis, where=where)
        return _reduced(jnp.sum, jnp.mean, losses, reduction, losses.size or 1)

    return {function.__name__: function for function in (multilabel_logistic_loss, softmax_nll)}


def _tensorflow() -> dict[str, LossFunction]:
    import tensorflow as tf

    def multilabel_logistic_loss(
        x: Array, z: Array, *, pos_weight: Array = None, axis: Any = -1, reduction: str = "batchmean"
    ) -> Array:
        z = tf.cast(z, x.dtype)
        if pos_weight is None:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(z, x)
        else:
            losses = tf.nn.weighted_cross_entropy_with_logits(z, x, pos_weight)
        return _reduced(tf.reduce_sum, tf.reduce_mean, losses, reduction, _examples(x, _one_axis(axis)))

    def softmax_nll(x: Array, y: Array, *, axis: Any = -1, reduction: str = "mean") -> Array:
        if len(y.shape) < len(x.shape):
            if _one_axis(axis) % len(x.shape) != len(x.shape) - 1:
                raise NotApplicable("has the class axis last")
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, x)
        else:
            losses = tf.nn.softmax_cross_entropy_with_logits(tf.cast(y, x.dtype), x, axis=_one_axis(axis))
        return _reduced(tf.reduce_sum, tf.reduce_mean, losses, reduction, _examples(x, _one_axis(axis)))

    return {function.__name__: function for function in (multilabel_logistic_loss, softmax_nll)}


def _keras() -> dict[str, LossFunction]:
    import keras

    sum_, mean = keras.ops.sum, keras.ops.mean

    def multilabel_logistic_loss(
        x: Array, z: Array, *, label_smoothing: float = 0.0, axis: Any = -1, reduction: str = "batchmean"
    ) -> Array:
        if reduction == "none":
            raise NotApplicable("averages over the classes")
        axis = _one_axis(axis)
        loss = keras.losses.BinaryCrossentropy(
            from_logits=True, label_smoothing=label_smoothing, axis=axis, reduction=None
        )
        means = loss(z, x)
        if reduction == "mean":
            return mean(means)
        return sum_(means) * x.shape[axis] / (_examples(x, axis) if reduction == "batchmean" else 1)

    def softmax_nll(
        x: Array,
        y: Array,
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        axis: Any = -1,
        reduction: str = "mean",
    ) -> Array:
        axis = _one_axis(axis)
        if len(y.shape) < len(x.shape):
            if label_smoothing or (ignore_index is not None and reduction == "mean"):
                raise NotApplicable("takes class indices without smoothing, and has its own mean over what is left")
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=ignore_index, axis=axis, reduction=None
            )
        elif ignore_index is not None:
            raise NotApplicable("ignores class indices only")
        else:
            loss = keras.losses.CategoricalCrossentropy(
                from_logits=True, label_smoothing=label_smoothing, axis=axis, reduction=None
            )
        return _reduced(sum_, mean, loss(y, x), reduction, _examples(x, axis))

    return {function.__name__: function for function in (multilabel_logistic_loss, softmax_nll)}


def _scipy() -> dict[str, LossFunction]:
    """What NumPy users write with SciPy's functions."""
    import numpy as np
    from scipy import special

    def multilabel_logistic_loss(x: Array, z: Array, *, axis: Any = -1, reduction: str = "batchmean") -> Array:
        losses = np.asarray(-(z * special.log_expit(x) + (1 - z) * special.log_expit(-x)), x.dtype)
        return np.asarray(_reduced(np.sum, np.mean, losses, reduction, _examples(x, _one_axis(axis))), x.dtype)

    def softmax_nll(x: Array, y: Array, *, axis: Any = -1, reduction: str = "mean") -> Array:
        log_p = special.log_softmax(x, axis=axis)
        if y.ndim < x.ndim:
            losses = -np.take_along_axis(log_p, np.expand_dims(y, axis), axis=axis).squeeze(axis)
        else:
            losses = -np.sum(y * log_p, axis=axis)
        losses = np.asarray(losses, x.dtype)
        return np.asarray(_reduced(np.sum, np.mean, losses, reduction, losses.size or 1), x.dtype)

    return {function.__name__: function for function in (multilabel_logistic_loss, softmax_nll)}


NATIVE: dict[str, Callable[[], dict[str, LossFunction]]] = {
    "numpy": _scipy,
    "torch": _torch,
    "jax": _optax,
    "tensorflow": _tensorflow,
}
