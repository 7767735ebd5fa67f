"""What is measured with --linear: the losses on the last linear layer's inputs, beside that layer and its loss.

The peers hold all logits in memory ("materialised": the framework's product and its loss), but PyTorch's own
`linear_cross_entropy` in chunks, which has no counterpart for several labels. All return the mean loss, and its
gradients with respect to features, weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import unilabel as ul

from .subjects import ARRAY, STEP, Array, Setup, Step, textbook_bce, textbook_nll

Function = Callable[..., Any]


class Shape(NamedTuple):
    rows: int
    length: int  # of an example's features
    classes: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Case(NamedTuple):
    loss: str  # "bce", with float targets, or "nll", with class indices
    shape: Shape

    def __str__(self) -> str:
        return f"{self.loss} {self.shape}"


TIMED = (Shape(2048, 256, 32768), Shape(256, 64, 1000))
FOR_MEMORY = (Shape(4096, 64, 65536), Shape(1024, 16, 32768))  # logits of 1 GiB, and of an eighth
SHAPES = (*TIMED, FOR_MEMORY[0])
QUICK = (Shape(6, 3, 5), FOR_MEMORY[1])
BY_NAME = {str(shape): shape for shape in SHAPES + QUICK}

# What unilabel's time may come to, times that of the materialised loss, at the first of these shapes and at the other.
BOUNDS = {"numpy": (0.9, 1.2), "torch": (1.0, 1.2), "jax": (1.05, 1.2), "tensorflow": (1.05, 1.2)}
MEMORY_BOUND = 256.0  # MiB

OURS: dict[str, Function] = {"bce": ul.linear_multilabel_logistic_loss, "nll": ul.linear_softmax_nll}


def bound(setup: Setup, peer: str, shape: Shape) -> float | None:
    """None where none is stated."""
    stated = setup.device == "cpu" and setup.mode != "compiled" and peer == "materialised" and shape in TIMED
    return BOUNDS[setup.backend][TIMED.index(shape)] if stated else None


def peers(backend: str, loss: str) -> tuple[str, ...]:
    return ("materialised", "chunked") if (backend, loss) == ("torch", "nll") else ("materialised",)


def build(setup: Setup, case: Case, whose: str) -> Step:
    """The step of unilabel, "ours", or of a peer, on the same random inputs."""
    function = _ours(setup.backend, OURS[case.loss]) if whose == "ours" else PEERS[setup.backend](case.loss, whose)
    arrays = (ARRAY[setup.backend](setup, array) for array in inputs(case, setup.seed))
    return STEP[setup.backend](setup, function, *arrays, by=3)


def inputs(case: Case, seed: int) -> tuple[Array, Array, Array, Array]:
    """Features, weight, bias and targets; logits as large as those of the other measurements."""
    rng, (n, length, classes) = np.random.default_rng(seed), case.shape
    features = rng.standard_normal((n, length), dtype=np.float32)
    weight = rng.standard_normal((classes, length), dtype=np.float32) * np.float32(3 / length**0.5)
    bias = rng.standard_normal(classes, dtype=np.float32)
    if case.loss == "nll":
        return features, weight, bias, rng.integers(0, classes, n)
    return features, weight, bias, (rng.random((n, classes), dtype=np.float32) < 0.5).astype(np.float32)


def _ours(backend: str, loss: Function) -> Function:
    if backend != "numpy":
        return lambda features, weight, bias, y: loss(features, weight, y, linear_bias=bias, reduction="mean")

    def run(features: Array, weight: Array, bias: Array, y: Array) -> Any:
        value, gradients = ul.value_and_grad(loss)(features, weight, y, linear_bias=bias, reduction="mean")
        return value, *gradients

    return run


def numpy(loss: str, peer: str) -> Function:
    textbooks: dict[str, Function] = {"bce": textbook_bce, "nll": textbook_nll}

    def run(features: Array, weight: Array, bias: Array, y: Array) -> Any:
        value, gradient = textbooks[loss](features @ weight.T + bias, y)
        return value, gradient @ weight, gradient.T @ features, np.sum(gradient, axis=0)

    return run


def torch(loss: str, peer: str) -> Function:
    from torch.nn import functional as F

    if peer == "chunked":
        from torch.nn import LinearCrossEntropyOptions  # of version 2.13

        chunks = LinearCrossEntropyOptions()
        return lambda features, weight, bias, y: F.linear_cross_entropy(
            features, weight, y, linear_bias=bias, options=chunks
        )
    functions: dict[str, Function] = {"bce": F.binary_cross_entropy_with_logits, "nll": F.cross_entropy}
    return lambda features, weight, bias, y: functions[loss](F.linear(features, weight, bias), y)


def jax(loss: str, peer: str) -> Function:
    import jax.numpy as jnp
    import optax

    functions: dict[str, Function] = {
        "bce": optax.sigmoid_binary_cross_entropy,
        "nll": optax.softmax_cross_entropy_with_integer_labels,
    }
    return lambda features, weight, bias, y: functions[loss](jnp.dot(features, weight.T) + bias, y).mean()


def tensorflow(loss: str, peer: str) -> Function:
    import tensorflow as tf

    functions: dict[str, Function] = {
        "bce": tf.nn.sigmoid_cross_entropy_with_logits,
        "nll": tf.nn.sparse_softmax_cross_entropy_with_logits,
    }

    def run(features: Array, weight: Array, bias: Array, y: Array) -> Any:
        return tf.reduce_mean(functions[loss](y, tf.matmul(features, weight, transpose_b=True) + bias))

    return run


PEERS: dict[str, Callable[[str, str], Function]] = {
    "numpy": numpy,
    "torch": torch,
    "jax": jax,
    "tensorflow": tensorflow,
}
