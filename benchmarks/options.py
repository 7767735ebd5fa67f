"""What is measured with --options and --traffic: each option of the losses, beside what users write for it.

The functions are named by option. Their parameters are named as the fields of Inputs that they are called with, and
they return the mean loss, which is differentiated by the first; NumPy's return the gradient too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

import unilabel as ul

from .subjects import ARRAY, STEP, Array, Setup, Steps, textbook_bce, textbook_nll

Functions = dict[str, Callable[..., Any]]
SMOOTHING, IGNORED = 0.1, -100


class Shape(NamedTuple):
    shape: tuple[int, ...]
    axis: int = -1

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


SHAPES = (
    Shape((8, 10)),
    Shape((64, 1000)),
    Shape((512, 32000)),
    Shape((65536, 21)),
    Shape((4, 21, 256, 256), 1),
)
QUICK = (Shape((8, 10)), Shape((2, 3, 4, 5), 1))
BY_NAME = {str(shape): shape for shape in SHAPES + QUICK}

# Of each option: what unilabel's time over the peer's may come to, and the same for the first of the shapes; of eager
# PyTorch on a CPU. BOUND is that of all others.
INDEX, SOFT, FLOAT, OTHER = (1.0, 2.0), (1.5, 3.0), (1.0, 2.0), (2.0, 4.0)
BOUNDS = {
    "indices": INDEX,
    "ignore_index": INDEX,
    "smoothing": INDEX,
    "smoothing, ignore_index": INDEX,
    "weight": INDEX,
    "weight, smoothing": INDEX,
    "sample_weight": INDEX,
    "distributions": SOFT,
    "where": SOFT,
    "multilabel": FLOAT,
    "multilabel, bool": FLOAT,
    "multilabel, integers": FLOAT,
    "multilabel, pos_weight": FLOAT,
    "multilabel, where": FLOAT,
    "multilabel, integers, smoothing": SOFT,
    "binary_cross_entropy": OTHER,
    "cross_entropy": OTHER,
    "nll": OTHER,
}
BOUND = 1.2
OPTIONS = tuple(BOUNDS)


def bound(setup: Setup, option: str, shape: Shape) -> float | None:
    """None where none is stated."""
    if setup.device != "cpu":
        return None
    return BOUNDS[option][shape == SHAPES[0]] if (setup.backend, setup.mode) == ("torch", "eager") else BOUND


class Inputs(NamedTuple):
    x: Array
    y: Array  # class indices
    ignored: Array  # the same, of a tenth of the examples IGNORED
    z: Array  # distributions
    labels: Array  # 0 or 1, as floats
    integers: Array  # the same
    booleans: Array  # the same
    weight: Array  # of each class
    pos_weight: Array  # of each class, to broadcast
    sample_weight: Array
    where: Array  # no target is masked
    p: Array  # probabilities
    log_p: Array


@lru_cache(maxsize=1)  # for one option after the other: to make the largest takes longer than to measure
def inputs(shape: Shape, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    full, axis = shape.shape, shape.axis % len(shape.shape)
    classes, batch = full[axis], full[:axis] + full[axis + 1 :]
    x = rng.standard_normal(full, dtype=np.float32) * 3
    y = rng.integers(0, classes, batch)
    z = rng.random(full, dtype=np.float32)
    one = [1] * len(full)
    one[axis] = classes
    where = rng.random(full, dtype=np.float32) < 0.9
    np.put_along_axis(where, np.expand_dims(y, axis), True, axis)
    labels = rng.random(full, dtype=np.float32) < 0.5
    e = np.exp(x - x.max(axis, keepdims=True))
    p = e / e.sum(axis, keepdims=True)
    return Inputs(
        x=x,
        y=y,
        ignored=np.where(rng.random(batch) < 0.1, IGNORED, y),
        z=z / z.sum(axis, keepdims=True),
        labels=labels.astype(np.float32),
        integers=labels.astype(np.int64),
        booleans=labels,
        weight=rng.uniform(0.5, 2, classes).astype(np.float32),
        pos_weight=rng.uniform(0.5, 2, one).astype(np.float32),
        sample_weight=rng.uniform(0.5, 2, batch).astype(np.float32),
        where=where,
        p=p,
        log_p=np.log(p),
    )


def build(setup: Setup, option: str, shape: Shape) -> Steps:
    """The two on the same random inputs."""
    functions, of = pair(setup.backend, option, shape.axis), inputs(shape, setup.seed)._asdict()
    arrays = {name: ARRAY[setup.backend](setup, of[name]) for function in functions for name in parameters(function)}
    return Steps(*(STEP[setup.backend](setup, f, *(arrays[name] for name in parameters(f))) for f in functions))


def pair(backend: str, option: str, axis: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """unilabel's function, and its peer."""
    return ours(axis, ul.value_and_grad if backend == "numpy" else None)[option], PEERS[backend](axis)[option]


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(function).parameters)


def ours(axis: int, derivative: Callable[..., Any] | None = None) -> Functions:
    losses = ul.softmax_nll, ul.multilabel_logistic_loss, ul.binary_cross_entropy, ul.cross_entropy, ul.nll
    softmax, multilabel, binary, categorical, nll = (
        partial(derivative(loss) if derivative else loss, axis=axis, reduction="mean") for loss in losses
    )
    skip, eps = IGNORED, SMOOTHING
    return {
        "indices": lambda x, y: softmax(x, y),
        "ignore_index": lambda x, ignored: softmax(x, ignored, ignore_index=skip),
        "smoothing": lambda x, y: softmax(x, y, label_smoothing=eps),
        "smoothing, ignore_index": lambda x, ignored: softmax(x, ignored, ignore_index=skip, label_smoothing=eps),
        "weight": lambda x, y, weight: softmax(x, y, weight=weight),
        "weight, smoothing": lambda x, y, weight: softmax(x, y, weight=weight, label_smoothing=eps),
        "sample_weight": lambda x, y, sample_weight: softmax(x, y, sample_weight=sample_weight),
        "distributions": lambda x, z: softmax(x, z),
        "where": lambda x, y, where: softmax(x, y, where=where),
        "multilabel": lambda x, labels: multilabel(x, labels),
        "multilabel, bool": lambda x, booleans: multilabel(x, booleans),
        "multilabel, integers": lambda x, integers: multilabel(x, integers),
        "multilabel, pos_weight": lambda x, labels, pos_weight: multilabel(x, labels, pos_weight=pos_weight),
        "multilabel, where": lambda x, labels, where: multilabel(x, labels, where=where),
        "multilabel, integers, smoothing": lambda x, integers: multilabel(x, integers, label_smoothing=eps),
        "binary_cross_entropy": lambda p, labels: binary(p, labels),
        "cross_entropy": lambda p, y: categorical(p, y),
        "nll": lambda log_p, y: nll(log_p, y),
    }


def numpy(axis: int) -> Functions:
    """Textbook formulas, stable ones, for rows of classes."""
    eps = SMOOTHING

    def smoothed(x: Array, y: Array) -> Array:
        z = np.full_like(x, eps / x.shape[1])
        z[np.arange(len(x)), y] += 1 - eps
        return z

    def soft(x: Array, z: Array, share: Any, mass: Any = 1.0) -> Any:
        """`share`: of an example in the mean. `mass`: what z sums to."""
        shifted = x - np.max(x, axis=1, keepdims=True)
        e = np.exp(shifted)
        total = np.sum(e, axis=1, keepdims=True)
        return -np.sum(share * z * (shifted - np.log(total))), share * (mass * (e / total) - z)

    def indices(x: Array, y: Array) -> Any:
        return textbook_nll(x, y)

    def ignore_index(x: Array, ignored: Array) -> Any:
        kept = ignored != IGNORED
        return textbook_nll(x, np.where(kept, ignored, 0), weight=kept.astype(x.dtype))

    def smoothing(x: Array, y: Array) -> Any:
        return soft(x, smoothed(x, y), 1 / len(x))

    def smoothing_ignore_index(x: Array, ignored: Array) -> Any:
        kept = (ignored != IGNORED).astype(x.dtype)
        return soft(x, smoothed(x, np.maximum(ignored, 0)), (kept / np.sum(kept))[:, None])

    def weight_smoothing(x: Array, y: Array, weight: Array) -> Any:
        z = smoothed(x, y) * weight
        return soft(x, z, 1 / np.sum(weight[y]), np.sum(z, axis=1, keepdims=True))

    def pos_weight(x: Array, labels: Array, pos_weight: Array) -> Any:
        e = np.exp(-np.abs(x))
        factor = 1 + (pos_weight - 1) * labels
        value = np.mean((1 - labels) * x + factor * (np.log1p(e) + np.maximum(-x, 0)))
        return value, (factor * (np.where(x >= 0, 1, e) / (1 + e)) - pos_weight * labels) / x.size

    def where(x: Array, labels: Array, where: Array) -> Any:
        e = np.exp(-np.abs(x))
        value = np.mean(np.maximum(x, 0) - x * labels + np.log1p(e), where=where)
        return value, np.where(where, np.where(x >= 0, 1, e) / (1 + e) - labels, 0) / float(np.sum(where))

    def binary(p: Array, labels: Array) -> Any:
        value = -np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p))
        return value, (p - labels) / (p * (1 - p)) / p.size

    def picked(p: Array, y: Array, logarithm: bool) -> Any:
        rows = np.arange(len(p))
        chosen, gradient = p[rows, y], np.zeros_like(p)
        gradient[rows, y] = -1 / len(p) if logarithm else -1 / len(p) / chosen
        return -np.mean(chosen if logarithm else np.log(chosen)), gradient

    def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
        """With the classes moved last, and back; whoever has them there does not."""

        def rows(array: Array, ndim: int) -> Array:
            moved = np.moveaxis(array, axis, -1) if array.ndim == ndim else array
            return moved.reshape(-1, moved.shape[-1]) if array.ndim == ndim else array.reshape(-1)

        @wraps(function)
        def run(x: Array, *others: Array) -> Any:
            value, gradient = function(*(rows(array, x.ndim) for array in (x, *others)))
            return value, np.moveaxis(gradient.reshape(np.moveaxis(x, axis, -1).shape), -1, axis)

        return function if axis == -1 else run

    per_example: Functions = {
        "indices": indices,
        "ignore_index": ignore_index,
        "smoothing": smoothing,
        "smoothing, ignore_index": smoothing_ignore_index,
        "weight": lambda x, y, weight: textbook_nll(x, y, weight=weight[y]),
        "weight, smoothing": weight_smoothing,
        "sample_weight": lambda x, y, sample_weight: textbook_nll(x, y, weight=sample_weight),
        "distributions": lambda x, z: soft(x, z, 1 / len(x)),
        "where": lambda x, y, where: textbook_nll(np.where(where, x, -np.inf), y),
        "cross_entropy": lambda p, y: picked(p, y, False),
        "nll": lambda log_p, y: picked(log_p, y, True),
    }
    return {name: by_rows(function) for name, function in per_example.items()} | {
        "multilabel": lambda x, labels: textbook_bce(x, labels),
        "multilabel, bool": lambda x, booleans: textbook_bce(x, booleans),
        "multilabel, integers": lambda x, integers: textbook_bce(x, integers.astype(x.dtype)),
        "multilabel, pos_weight": pos_weight,
        "multilabel, where": where,
        "multilabel, integers, smoothing": lambda x, integers: textbook_bce(
            x, integers.astype(x.dtype) * (1 - eps) + eps / 2
        ),
        "binary_cross_entropy": binary,
    }


def torch(axis: int) -> Functions:
    """Of shapes whose axis is 1, the one that PyTorch's losses take for the classes."""
    import torch
    from torch.nn import functional as F  # as its users write

    bce, skip, eps = F.binary_cross_entropy_with_logits, IGNORED, SMOOTHING
    return {
        "indices": lambda x, y: F.cross_entropy(x, y),
        "ignore_index": lambda x, ignored: F.cross_entropy(x, ignored, ignore_index=skip),
        "smoothing": lambda x, y: F.cross_entropy(x, y, label_smoothing=eps),
        "smoothing, ignore_index": lambda x, ignored: F.cross_entropy(
            x, ignored, ignore_index=skip, label_smoothing=eps
        ),
        "weight": lambda x, y, weight: F.cross_entropy(x, y, weight=weight),
        "weight, smoothing": lambda x, y, weight: F.cross_entropy(x, y, weight=weight, label_smoothing=eps),
        "sample_weight": lambda x, y, sample_weight: (
            (F.cross_entropy(x, y, reduction="none") * sample_weight).sum() / sample_weight.sum()
        ),
        "distributions": lambda x, z: F.cross_entropy(x, z),
        "where": lambda x, y, where: F.cross_entropy(x.masked_fill(~where, -torch.inf), y),
        "multilabel": lambda x, labels: bce(x, labels),
        "multilabel, bool": lambda x, booleans: bce(x, booleans.float()),
        "multilabel, integers": lambda x, integers: bce(x, integers.float()),
        "multilabel, pos_weight": lambda x, labels, pos_weight: bce(x, labels, pos_weight=pos_weight),
        "multilabel, where": lambda x, labels, where: (
            bce(x, labels, reduction="none").masked_fill(~where, 0.0).sum() / where.sum()
        ),
        "multilabel, integers, smoothing": lambda x, integers: bce(x, integers.float() * (1 - eps) + eps / 2),
        "binary_cross_entropy": lambda p, labels: F.binary_cross_entropy(p, labels),
        "cross_entropy": lambda p, y: F.nll_loss(p.log(), y),
        "nll": lambda log_p, y: F.nll_loss(log_p, y),
    }


def jax(axis: int) -> Functions:
    import jax
    import jax.numpy as jnp
    import optax

    bce, eps = optax.sigmoid_binary_cross_entropy, SMOOTHING
    nll = partial(optax.softmax_cross_entropy_with_integer_labels, axis=axis)
    soft = partial(optax.softmax_cross_entropy, axis=axis)

    def smoothed(x: Array, y: Array) -> Array:
        return optax.smooth_labels(jax.nn.one_hot(y, x.shape[axis], axis=axis), eps, axis=axis)

    def weight_smoothing(x: Array, y: Array, weight: Array) -> Array:
        of_class = weight.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
        return soft(x, smoothed(x, y) * of_class).sum() / weight[y].sum()

    def pos_weight(x: Array, labels: Array, pos_weight: Array) -> Array:
        losses = pos_weight * labels * jax.nn.log_sigmoid(x) + (1 - labels) * jax.nn.log_sigmoid(-x)
        return -losses.mean()

    def picked(p: Array, y: Array) -> Array:
        return jnp.take_along_axis(p, jnp.expand_dims(y, axis), axis)

    return {
        "indices": lambda x, y: nll(x, y).mean(),
        "ignore_index": lambda x, ignored: nll(x, jnp.maximum(ignored, 0)).mean(where=ignored != IGNORED),
        "smoothing": lambda x, y: soft(x, smoothed(x, y)).mean(),
        "smoothing, ignore_index": lambda x, ignored: soft(x, smoothed(x, ignored)).mean(where=ignored != IGNORED),
        "weight": lambda x, y, weight: (nll(x, y) * weight[y]).sum() / weight[y].sum(),
        "weight, smoothing": weight_smoothing,
        "sample_weight": lambda x, y, sample_weight: (nll(x, y) * sample_weight).sum() / sample_weight.sum(),
        "distributions": lambda x, z: soft(x, z).mean(),
        "where": lambda x, y, where: nll(x, y, where=where).mean(),
        "multilabel": lambda x, labels: bce(x, labels).mean(),
        "multilabel, bool": lambda x, booleans: bce(x, booleans).mean(),
        "multilabel, integers": lambda x, integers: bce(x, integers).mean(),
        "multilabel, pos_weight": pos_weight,
        "multilabel, where": lambda x, labels, where: bce(x, labels).mean(where=where),
        "multilabel, integers, smoothing": lambda x, integers: bce(x, integers * (1 - eps) + eps / 2).mean(),
        "binary_cross_entropy": lambda p, labels: -(labels * jnp.log(p) + (1 - labels) * jnp.log1p(-p)).mean(),
        "cross_entropy": lambda p, y: -jnp.log(picked(p, y)).mean(),
        "nll": lambda log_p, y: -picked(log_p, y).mean(),
    }


def tensorflow(axis: int) -> Functions:
    import tensorflow as tf

    eps, mean, total = SMOOTHING, tf.reduce_mean, tf.reduce_sum

    def last(x: Array) -> Array:
        return x if axis == -1 else tf.transpose(x, [*(i for i in range(x.shape.rank) if i != axis), axis])

    def nll(x: Array, y: Array) -> Array:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, last(x))

    def soft(x: Array, z: Array) -> Array:
        return tf.nn.softmax_cross_entropy_with_logits(z, x, axis=axis)

    def bce(x: Array, labels: Array) -> Array:
        return tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(labels, x.dtype), x)

    def smoothed(x: Array, y: Array) -> Array:
        classes = x.shape[axis]
        return tf.one_hot(y, classes, axis=axis) * (1 - eps) + eps / classes

    def average(losses: Array, weight: Array) -> Array:
        weight = tf.cast(weight, losses.dtype)
        return total(losses * weight) / total(weight)

    def weight_smoothing(x: Array, y: Array, weight: Array) -> Array:
        of_class = tf.reshape(weight, [-1 if i == axis % x.shape.rank else 1 for i in range(x.shape.rank)])
        return -total(smoothed(x, y) * of_class * tf.nn.log_softmax(x, axis)) / total(tf.gather(weight, y))

    def binary(p: Array, labels: Array) -> Array:
        return -mean(labels * tf.math.log(p) + (1 - labels) * tf.math.log1p(-p))

    def picked(p: Array, y: Array) -> Array:
        return tf.gather(last(p), y, batch_dims=y.shape.rank)

    return {
        "indices": lambda x, y: mean(nll(x, y)),
        "ignore_index": lambda x, ignored: average(nll(x, tf.maximum(ignored, 0)), ignored != IGNORED),
        "smoothing": lambda x, y: mean(soft(x, smoothed(x, y))),
        "smoothing, ignore_index": lambda x, ignored: average(soft(x, smoothed(x, ignored)), ignored != IGNORED),
        "weight": lambda x, y, weight: average(nll(x, y), tf.gather(weight, y)),
        "weight, smoothing": weight_smoothing,
        "sample_weight": lambda x, y, sample_weight: average(nll(x, y), sample_weight),
        "distributions": lambda x, z: mean(soft(x, z)),
        "where": lambda x, y, where: mean(nll(tf.where(where, x, -1e9), y)),
        "multilabel": lambda x, labels: mean(bce(x, labels)),
        "multilabel, bool": lambda x, booleans: mean(bce(x, booleans)),
        "multilabel, integers": lambda x, integers: mean(bce(x, integers)),
        "multilabel, pos_weight": lambda x, labels, pos_weight: mean(
            tf.nn.weighted_cross_entropy_with_logits(labels, x, pos_weight)
        ),
        "multilabel, where": lambda x, labels, where: average(bce(x, labels), where),
        "multilabel, integers, smoothing": lambda x, integers: mean(
            bce(x, tf.cast(integers, x.dtype) * (1 - eps) + eps / 2)
        ),
        "binary_cross_entropy": binary,
        "cross_entropy": lambda p, y: -mean(tf.math.log(picked(p, y))),
        "nll": lambda log_p, y: -mean(picked(log_p, y)),
    }


PEERS: dict[str, Callable[[int], Functions]] = {"numpy": numpy, "torch": torch, "jax": jax, "tensorflow": tensorflow}
