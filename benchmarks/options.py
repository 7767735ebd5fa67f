"""What is timed with --options: each option of the losses, beside what users of the framework write for it.

Every step computes the mean loss and its gradient by the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import unilabel as ul

from .subjects import Array, Step, Steps

SMOOTHING, IGNORED = 0.1, -100


class Shape(NamedTuple):
    shape: tuple[int, ...]
    axis: int = -1

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + (f" axis={self.axis}" if self.axis != -1 else "")


SHAPES = (
    Shape((8, 10)),
    Shape((64, 1000)),
    Shape((512, 32000)),
    Shape((65536, 21)),
    Shape((4, 21, 256, 256), 1),
)
QUICK = (Shape((8, 10)), Shape((2, 3, 4, 5), 1))

# Of each option: what unilabel's time over the peer's may come to, and the same for the first of the shapes.
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
    "multilabel, pos_weight": FLOAT,
    "multilabel, where": FLOAT,
    "multilabel, integers, smoothing": SOFT,
    "binary_cross_entropy": OTHER,
    "cross_entropy": OTHER,
    "nll": OTHER,
}
OPTIONS = tuple(BOUNDS)


class Inputs(NamedTuple):
    x: Array
    y: Array  # class indices
    ignored: Array  # the same, of a tenth of the examples IGNORED
    z: Array  # distributions
    labels: Array  # 0 or 1, as floats
    weight: Array  # of each class
    pos_weight: Array  # of each class, to broadcast
    sample_weight: Array
    where: Array  # no target is masked
    p: Array  # probabilities


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
    e = np.exp(x - x.max(axis, keepdims=True))
    return Inputs(
        x=x,
        y=y,
        ignored=np.where(rng.random(batch) < 0.1, IGNORED, y),
        z=z / z.sum(axis, keepdims=True),
        labels=(rng.random(full, dtype=np.float32) < 0.5).astype(np.float32),
        weight=rng.uniform(0.5, 2, classes).astype(np.float32),
        pos_weight=rng.uniform(0.5, 2, one).astype(np.float32),
        sample_weight=rng.uniform(0.5, 2, batch).astype(np.float32),
        where=where,
        p=e / e.sum(axis, keepdims=True),
    )


def torch(option: str, shape: Shape, seed: int) -> Steps:
    import torch
    from torch.nn import functional as F  # as its users write

    of = Inputs(*map(torch.from_numpy, inputs(shape, seed)))
    axis, eps = shape.axis, SMOOTHING
    integers = of.labels.to(torch.int64)
    log_p = of.p.log()
    calls: dict[str, tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]] = {
        "indices": (of.x, lambda x: ul.softmax_nll(x, of.y, axis=axis), lambda x: F.cross_entropy(x, of.y)),
        "ignore_index": (
            of.x,
            lambda x: ul.softmax_nll(x, of.ignored, axis=axis, ignore_index=IGNORED),
            lambda x: F.cross_entropy(x, of.ignored, ignore_index=IGNORED),
        ),
        "smoothing": (
            of.x,
            lambda x: ul.softmax_nll(x, of.y, axis=axis, label_smoothing=eps),
            lambda x: F.cross_entropy(x, of.y, label_smoothing=eps),
        ),
        "smoothing, ignore_index": (
            of.x,
            lambda x: ul.softmax_nll(x, of.ignored, axis=axis, ignore_index=IGNORED, label_smoothing=eps),
            lambda x: F.cross_entropy(x, of.ignored, ignore_index=IGNORED, label_smoothing=eps),
        ),
        "weight": (
            of.x,
            lambda x: ul.softmax_nll(x, of.y, axis=axis, weight=of.weight),
            lambda x: F.cross_entropy(x, of.y, weight=of.weight),
        ),
        "weight, smoothing": (
            of.x,
            lambda x: ul.softmax_nll(x, of.y, axis=axis, weight=of.weight, label_smoothing=eps),
            lambda x: F.cross_entropy(x, of.y, weight=of.weight, label_smoothing=eps),
        ),
        "sample_weight": (
            of.x,
            lambda x: ul.softmax_nll(x, of.y, axis=axis, sample_weight=of.sample_weight),
            lambda x: (F.cross_entropy(x, of.y, reduction="none") * of.sample_weight).sum() / of.sample_weight.sum(),
        ),
        "distributions": (of.x, lambda x: ul.softmax_nll(x, of.z, axis=axis), lambda x: F.cross_entropy(x, of.z)),
        "where": (
            of.x,
            lambda x: ul.softmax_nll(x, of.y, axis=axis, where=of.where),
            lambda x: F.cross_entropy(x.masked_fill(~of.where, -torch.inf), of.y),
        ),
        "multilabel": (
            of.x,
            lambda x: ul.multilabel_logistic_loss(x, of.labels, axis=axis, reduction="mean"),
            lambda x: F.binary_cross_entropy_with_logits(x, of.labels),
        ),
        "multilabel, pos_weight": (
            of.x,
            lambda x: ul.multilabel_logistic_loss(x, of.labels, axis=axis, pos_weight=of.pos_weight, reduction="mean"),
            lambda x: F.binary_cross_entropy_with_logits(x, of.labels, pos_weight=of.pos_weight),
        ),
        "multilabel, where": (
            of.x,
            lambda x: ul.multilabel_logistic_loss(x, of.labels, axis=axis, where=of.where, reduction="mean"),
            lambda x: (
                F.binary_cross_entropy_with_logits(x, of.labels, reduction="none").masked_fill(~of.where, 0.0).sum()
                / of.where.sum()
            ),
        ),
        "multilabel, integers, smoothing": (
            of.x,
            lambda x: ul.multilabel_logistic_loss(x, integers, axis=axis, label_smoothing=eps, reduction="mean"),
            lambda x: F.binary_cross_entropy_with_logits(x, integers.float() * (1 - eps) + eps / 2),
        ),
        "binary_cross_entropy": (
            of.p,
            lambda p: ul.binary_cross_entropy(p, of.labels, axis=axis, reduction="mean"),
            lambda p: F.binary_cross_entropy(p, of.labels),
        ),
        "cross_entropy": (
            of.p,
            lambda p: ul.cross_entropy(p, of.y, axis=axis),
            lambda p: F.nll_loss(p.log(), of.y),
        ),
        "nll": (log_p, lambda p: ul.nll(p, of.y, axis=axis), lambda p: F.nll_loss(p, of.y)),
    }
    x, ours, peer = calls[option]
    x = x.requires_grad_()

    def step(function: Callable[[Array], Array]) -> Step:
        def run() -> Any:
            value = function(x)
            value.backward()
            gradient, x.grad = x.grad, None
            return value, gradient

        return run

    return Steps(step(ours), step(peer))


BUILD: dict[str, Callable[[str, Shape, int], Steps]] = {"torch": torch}


def bound(option: str, shape: Shape) -> float:
    return BOUNDS[option][shape == SHAPES[0]]
