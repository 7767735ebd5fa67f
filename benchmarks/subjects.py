"""What is timed: unilabel's losses, and beside each what its users would call otherwise, the peer.

Both are built as functions without arguments that return when their results are there: the mean loss and its gradient
by the logits, or with `forward` the loss alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import unilabel as ul

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors only

Array = Any
Step = Callable[[], Any]


class Case(NamedTuple):
    loss: str  # "bce", with float targets, or "nll", with class indices
    rows: int
    classes: int

    def __str__(self) -> str:
        return f"{self.loss} {self.rows}x{self.classes}"


class Setup(NamedTuple):
    """How a case is run."""

    backend: str
    mode: str  # "eager"; "jitted", by the user, JAX only; "compiled"
    dtype: str = "float32"
    device: str = "cpu"
    forward: bool = False
    seed: int = 0


class Steps(NamedTuple):
    ours: Step
    peer: Step


MODES = {"numpy": ("eager",), "torch": ("eager",), "jax": ("jitted", "eager"), "tensorflow": ("eager",)}
OURS = {
    "bce": partial(ul.multilabel_logistic_loss, reduction="mean"),
    "nll": partial(ul.softmax_nll, reduction="mean"),
}


def build(setup: Setup, case: Case) -> Steps:
    """The two on the same random inputs."""
    return BUILD[setup.backend](setup, case.loss, *_inputs(case, setup.seed))


def _inputs(case: Case, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shape = (case.rows, case.classes)
    logits = rng.standard_normal(shape, dtype=np.float32)
    logits *= 3
    if case.loss == "nll":
        return logits, rng.integers(0, case.classes, case.rows)
    return logits, (rng.random(shape, dtype=np.float32) < 0.5).astype(np.float32)


# --- NumPy ------------------------------------------------------------------------------------------------------------


def textbook_bce(x: Array, z: Array, forward: bool = False) -> Any:
    e = np.exp(-np.abs(x))
    value = np.mean(np.maximum(x, 0) - x * z + np.log1p(e))
    return value if forward else (value, (np.where(x >= 0, 1, e) / (1 + e) - z) / x.size)


def textbook_nll(x: Array, y: Array, forward: bool = False, weight: Array | None = None) -> Any:
    """`weight`: of each example."""
    rows = np.arange(len(x))
    shifted = x - np.max(x, axis=1, keepdims=True)
    e = np.exp(shifted)
    total = np.sum(e, axis=1, keepdims=True)
    losses = np.log(total[:, 0]) - shifted[rows, y]
    value = np.mean(losses) if weight is None else np.average(losses, weights=weight)
    if forward:
        return value
    gradient = e / total
    gradient[rows, y] -= 1
    return value, gradient / len(x) if weight is None else gradient * (weight / np.sum(weight))[:, None]


def _numpy(setup: Setup, loss: str, x: Array, targets: Array) -> Steps:
    textbooks: dict[str, Callable[..., Any]] = {"bce": textbook_bce, "nll": textbook_nll}
    textbook = textbooks[loss]
    if setup.dtype == "bfloat16":
        import ml_dtypes

        half = np.dtype(ml_dtypes.bfloat16)
        x = x.astype(half)

    def peer() -> Any:
        if setup.dtype == "float32":
            return textbook(x, targets, setup.forward)
        result = textbook(x.astype(np.float32), targets, setup.forward)  # NumPy is slow in bfloat16, and inexact
        return result if setup.forward else (result[0], result[1].astype(half))

    ours = OURS[loss] if setup.forward else partial(ul.value_and_grad(OURS[loss].func), **OURS[loss].keywords)
    return Steps(partial(ours, x, targets), peer)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _torch(setup: Setup, loss: str, x: Array, targets: Array) -> Steps:
    import torch
    from torch.nn import functional

    theirs: dict[str, Callable[..., Any]] = {
        "bce": functional.binary_cross_entropy_with_logits,
        "nll": functional.cross_entropy,
    }
    dtype = getattr(torch, setup.dtype)
    x, targets = (torch_array(setup, array) for array in (x, targets))
    x, targets = x.to(dtype), targets.to(dtype) if loss == "bce" else targets
    return Steps(torch_step(setup, OURS[loss], x, targets), torch_step(setup, theirs[loss], x, targets))


def torch_array(setup: Setup, array: Array) -> Array:
    import torch

    return torch.from_numpy(array).to(setup.device)


def torch_step(setup: Setup, function: Callable[..., Any], *arrays: Array, by: int = 1) -> Step:
    import torch

    inputs = arrays[:by]
    for x in inputs:
        x.requires_grad_(not setup.forward)
    torch._dynamo.reset()  # what was compiled for other shapes would make this one's sizes symbols
    chosen = torch.compile(function) if setup.mode == "compiled" else function

    def run() -> Any:
        value = chosen(*arrays)
        gradients = []
        if not setup.forward:
            value.backward()
            for x in inputs:
                gradients.append(x.grad)
                x.grad = None  # given away: kept, it would count as memory that was there before
        if setup.device == "cuda":
            torch.cuda.synchronize()
        return value if setup.forward else (value, *gradients)

    return run


# --- JAX --------------------------------------------------------------------------------------------------------------


def _jax(setup: Setup, loss: str, x: Array, targets: Array) -> Steps:
    import jax.numpy as jnp
    import optax

    theirs: dict[str, Callable[..., Any]] = {
        "bce": lambda x, z: optax.sigmoid_binary_cross_entropy(x, z).mean(),
        "nll": lambda x, y: optax.softmax_cross_entropy_with_integer_labels(x, y).mean(),
    }
    dtype = jnp.dtype(setup.dtype)
    x = jax_array(setup, x.astype(dtype))
    targets = jax_array(setup, targets.astype(dtype) if loss == "bce" else targets)
    return Steps(jax_step(setup, OURS[loss], x, targets), jax_step(setup, theirs[loss], x, targets))


def jax_array(setup: Setup, array: Array) -> Array:
    import jax

    array = array.astype(np.int32) if array.dtype == np.int64 else array
    return jax.block_until_ready(jax.device_put(array, jax.devices(setup.device)[0]))


def jax_step(setup: Setup, function: Callable[..., Any], *arrays: Array, by: int = 1) -> Step:
    import jax

    function = function if setup.forward else jax.value_and_grad(function, tuple(range(by)))
    function = function if setup.mode == "eager" else jax.jit(function)

    def run() -> Any:
        result = jax.block_until_ready(function(*arrays))
        return result if setup.forward else (result[0], *result[1])

    return run


# --- TensorFlow -------------------------------------------------------------------------------------------------------


def _tensorflow(setup: Setup, loss: str, x: Array, targets: Array) -> Steps:
    import tensorflow as tf

    theirs: dict[str, Callable[..., Any]] = {
        "bce": lambda x, z: tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(z, x)),
        "nll": lambda x, y: tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, x)),
    }
    x, targets = (tensorflow_array(setup, array) for array in (x, targets))
    x, targets = tf.cast(x, setup.dtype), tf.cast(targets, setup.dtype if loss == "bce" else tf.int64)
    return Steps(tensorflow_step(setup, OURS[loss], x, targets), tensorflow_step(setup, theirs[loss], x, targets))


def tensorflow_array(setup: Setup, array: Array) -> Array:
    import tensorflow as tf

    if setup.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    with tf.device("/GPU:0" if setup.device == "cuda" else "/CPU:0"):
        return tf.constant(array)


def tensorflow_step(setup: Setup, function: Callable[..., Any], *arrays: Array, by: int = 1) -> Step:
    import tensorflow as tf

    def both(*arrays: Array) -> Any:
        inputs = arrays[:by]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*arrays)
        return value, *tape.gradient(value, inputs)

    chosen = function if setup.forward else both
    if setup.mode == "compiled":
        chosen = tf.function(chosen, jit_compile=True, autograph=False)
    if setup.device == "cpu":
        return lambda: chosen(*arrays)

    def run() -> Any:
        result = chosen(*arrays)
        tf.test.experimental.sync_devices()
        return result

    return run


BUILD: dict[str, Callable[[Setup, str, Array, Array], Steps]] = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "tensorflow": _tensorflow,
}
ARRAY: dict[str, Callable[[Setup, Array], Array]] = {
    "numpy": lambda setup, array: array,
    "torch": torch_array,
    "jax": jax_array,
    "tensorflow": tensorflow_array,
}
# Of a function of arrays that returns the loss, and is differentiated `by` so many of them, the first; NumPy's returns
# the gradients too.
STEP: dict[str, Callable[..., Step]] = {
    "numpy": lambda setup, function, *arrays, by=1: partial(function, *arrays),
    "torch": torch_step,
    "jax": jax_step,
    "tensorflow": tensorflow_step,
}


def threads(backend: str) -> Any:
    """How many threads the framework says it computes with, where it says so; 0 is TensorFlow's "as many as cores"."""
    if backend == "torch":
        import torch

        return torch.get_num_threads()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.config.threading.get_intra_op_parallelism_threads()
    return None


def plus_one(setup: Setup, size: int) -> Step:
    """Reads and writes that many float32 on the setup's GPU, and hardly computes."""
    if setup.backend == "torch":
        import torch

        x = torch.zeros(size, device=setup.device)

        def run() -> Any:
            result = x + 1
            torch.cuda.synchronize()
            return result

        return run
    if setup.backend == "jax":
        import jax
        import jax.numpy as jnp

        ones = jax.device_put(jnp.zeros(size), jax.devices(setup.device)[0])
        return lambda: jax.block_until_ready(ones + 1)
    import tensorflow as tf

    with tf.device("/GPU:0"):
        zeros = tf.zeros(size)

    def run_tf() -> Any:
        result = zeros + 1
        tf.test.experimental.sync_devices()
        return result

    return run_tf
