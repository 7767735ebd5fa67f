"""Predicts the next word of Python's own sources: a vocabulary of tens of thousands, and no logits in memory.

A log-bilinear language model (Mnih and Hinton, 2007): the vectors of the words before are turned and added up, and
compared with the vector of every word. `ul.linear_softmax_nll` takes that sum and the table of vectors, which is the
last linear layer's weight as well. Each framework trains the model in its own way; the loss curves are the same.

    python examples/words.py --backend torch  # or numpy, jax, tensorflow; all: each in turn, and compares the curves

The memory is that of a step beyond what is held before it, at its peak: with this loss, and with logits.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import unilabel as ul

sys.path.append(str(Path(__file__).parent.parent))  # for benchmarks.measure
CONTEXT, WIDTH, BATCH, RATE, MOMENTUM = 3, 64, 1024, 4.0, 0.9
NOT_READ = ("site-packages", "test", "encodings")
RARE = 2  # words that occur less often are one word
TOLERANCE = 1e-5  # between the loss curves, relative; a few float32 roundings (5e-7) are usual

Array = Any  # of any framework
Step = Callable[[Array, Array], float]  # takes the words before, (n, CONTEXT), and the words, (n,); gives the loss


def loss_on(weights: list[Array], contexts: Array, words: Array, take: Any, product: Any = None) -> Array:
    """The loss; with the product of the framework, by way of the logits.

    `take(table, indices)` gives rows of the table.
    """
    table, turns, bias = weights
    features = sum(take(table, contexts[:, i]) @ turns[i] for i in range(CONTEXT))
    if product is None:
        return ul.linear_softmax_nll(features, table, words, linear_bias=bias)
    return ul.softmax_nll(product("nd,cd->nc", features, table) + bias, words)


def numpy_step(start: list[Array], with_logits: bool = False) -> Step:
    """No autodiff: `ul.value_and_grad` gives the gradients of the loss, and the chain rule is written out by hand."""
    weights = [w.copy() for w in start]
    velocities = [np.zeros_like(w) for w in weights]

    def gradients(features: Array, words: Array) -> tuple[Array, Array, Array, Array]:
        table, _, bias = weights
        if not with_logits:
            loss, found = ul.value_and_grad(ul.linear_softmax_nll)(features, table, words, linear_bias=bias)
            return loss, *found
        loss, d_logits = ul.value_and_grad(ul.softmax_nll)(features @ table.T + bias, words)
        return loss, d_logits @ table, d_logits.T @ features, d_logits.sum(0)

    def step(contexts: Array, words: Array) -> float:
        table, turns, _ = weights
        before = [table[contexts[:, i]] for i in range(CONTEXT)]
        loss, d_features, d_table, d_bias = gradients(sum(map(np.matmul, before, turns)), words)
        for i in range(CONTEXT):
            np.add.at(d_table, contexts[:, i], d_features @ turns[i].T)
        d_turns = np.stack([vectors.T @ d_features for vectors in before])
        for w, v, gradient in zip(weights, velocities, (d_table, d_turns, d_bias), strict=True):
            v[:] = MOMENTUM * v + gradient
            w -= RATE * v
        return float(loss)

    return step


def torch_step(start: list[Array], with_logits: bool = False) -> Step:
    import torch

    weights = [torch.tensor(w, requires_grad=True) for w in start]
    optimizer = torch.optim.SGD(weights, RATE, MOMENTUM)
    product = torch.einsum if with_logits else None

    def step(contexts: Array, words: Array) -> float:
        optimizer.zero_grad()
        before, following = torch.from_numpy(contexts), torch.from_numpy(words)
        loss = loss_on(weights, before, following, lambda table, indices: table[indices], product)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def jax_step(start: list[Array], with_logits: bool = False) -> Step:
    import jax

    product = jax.numpy.einsum if with_logits else None

    def loss(weights: list[Array], contexts: Array, words: Array) -> Array:
        return loss_on(weights, contexts, words, lambda table, indices: table[indices], product)

    @jax.jit
    def update(weights: list[Array], velocities: list[Array], *batch: Array) -> tuple[Array, list[Array], list[Array]]:
        value, gradients = jax.value_and_grad(loss)(weights, *batch)
        velocities = jax.tree.map(lambda v, gradient: MOMENTUM * v + gradient, velocities, gradients)
        return value, jax.tree.map(lambda w, v: w - RATE * v, weights, velocities), velocities

    weights = jax.tree.map(jax.numpy.asarray, start)
    velocities = jax.tree.map(jax.numpy.zeros_like, weights)

    def step(*batch: Array) -> float:
        nonlocal weights, velocities
        with jax.default_matmul_precision("float32"):  # on a GPU too
            value, weights, velocities = update(weights, velocities, *batch)
        return float(value)

    return step


def tensorflow_step(start: list[Array], with_logits: bool = False) -> Step:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # errors only
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # full float32 on a GPU too
    weights = [tf.Variable(w) for w in start]
    optimizer = tf.keras.optimizers.SGD(RATE, MOMENTUM)
    product = tf.einsum if with_logits else None

    @tf.function
    def update(contexts: Array, words: Array) -> Array:
        with tf.GradientTape() as tape:
            loss = loss_on(weights, contexts, words, tf.gather, product)
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, weights)]
        optimizer.apply(gradients, weights)
        return loss

    return lambda *batch: float(update(*map(tf.constant, batch)))


STEPS = {"numpy": numpy_step, "torch": torch_step, "jax": jax_step, "tensorflow": tensorflow_step}


def text() -> tuple[Array, list[str]]:
    """The words of the standard library, as indices into the vocabulary, and the vocabulary."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for pattern in ("*.py", "*/*.py") for file in sorted(library.glob(pattern))]
    sources = [file.read_text("utf-8", "ignore") for file in files if file.parent.name not in NOT_READ]
    words = [word for source in sources for word in re.findall(r"[^\W\d]\w*", source)]
    often = [word for word, times in collections.Counter(words).most_common() if times >= RARE]
    index = {word: i for i, word in enumerate(often)}
    return np.array([index.get(word, len(often)) for word in words], np.int32), [*often, "?"]


def initial(vocabulary: int, rng: np.random.Generator) -> list[Array]:
    """The weights that every framework starts from: vectors of the words, what turns them, biases."""
    table = rng.normal(0, WIDTH**-0.5, (vocabulary, WIDTH))
    turns = rng.normal(0, (CONTEXT * WIDTH) ** -0.5, (CONTEXT, WIDTH, WIDTH))
    return [w.astype(np.float32) for w in (table, turns, np.zeros(vocabulary))]


def batches(words: Array, steps: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    for _ in range(steps):
        places = rng.integers(CONTEXT, len(words), BATCH)
        yield words[places[:, None] + np.arange(-CONTEXT, 0)], words[places].astype(np.int64)


def peak(backend: str, vocabulary: int, with_logits: bool) -> float:
    """MiB that a step takes beyond what is held before it, after one on a few examples."""
    from benchmarks.measure import rise

    rng = np.random.default_rng(0)
    step = STEPS[backend](initial(vocabulary, rng), with_logits)
    words = rng.integers(0, vocabulary, 10 * BATCH).astype(np.int32)
    [(contexts, following)] = batches(words, 1, rng)
    step(contexts[:8], following[:8])
    return rise(lambda: step(contexts, following)) / 2**20


def run(backend: str, words: Array, vocabulary: int, steps: int, seed: int) -> list[float]:
    """Trains with a progress bar, prints a line, and returns the losses."""
    from rich.progress import track

    from benchmarks.measure import alone

    rng = np.random.default_rng(seed)
    step = STEPS[backend](initial(vocabulary, rng))
    start = time.perf_counter()
    some = track(batches(words, steps, rng), backend, steps, transient=True, disable=not sys.stdout.isatty())
    losses = [step(*batch) for batch in some]
    seconds = time.perf_counter() - start
    ours, theirs = (alone(peak, backend, vocabulary, with_logits) for with_logits in (False, True))
    print(
        f"{backend:10}  loss {losses[0]:.4f} to {losses[-1]:.7f} in {seconds:.0f} s   "
        f"memory {ours:.0f} MiB, with logits {theirs:.0f} MiB"
    )
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicts the next word, trained by the framework of your choice.")
    parser.add_argument("--backend", choices=[*STEPS, "all"], default="numpy", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; default: %(default)s")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"expected one step or more; received: {args.steps}")

    words, vocabulary = text()
    print(f"{len(words)} words, {len(vocabulary)} different ones; {BATCH} in a step, whose logits would be ", end="")
    print(f"{4 * BATCH * len(vocabulary) / 2**20:.0f} MiB")
    backends = STEPS if args.backend == "all" else [args.backend]
    try:
        curves = [run(backend, words, len(vocabulary), args.steps, args.seed) for backend in backends]
    except ModuleNotFoundError as missing:
        sys.exit(f"This example needs {missing.name}: pip install {missing.name}")
    if len(curves) > 1:
        difference = np.max(np.ptp(curves, axis=0) / np.min(curves, axis=0))
        print(f"largest relative difference of the loss curves: {difference:.1e} (at most {TOLERANCE:.0e} allowed)")
        sys.exit(0 if difference <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
