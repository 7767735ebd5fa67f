"""Learns which of many labels an example has, from its bag of words: no examples x labels array of targets or logits.

The mean of an example's word vectors, weighted by the words' values, is what a linear layer with one row for each label
takes. `ul.linear_multilabel_logistic_loss` goes through that layer a block at a time, and `ul.Positives` names the few
labels that each example has. Each framework trains the model in its own way; the loss curves are the same.

    python examples/extreme.py --backend torch  # or numpy, jax, tensorflow; all: each in turn, and compares the curves
    python examples/extreme.py --data FILE      # in the text format of the extreme classification repository

Without a file the data is made up: labels whose frequencies follow Zipf's law, and words that go with them. A tenth of
the examples is held out. Precision at k is the share of right ones among the k labels of highest logit; the
propensity-scored one weighs a label by how seldom it is seen (Jain et al., 2016), over the best that can be reached.
The memory is that of a step beyond what is held before it, at its peak.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import extreme_data as shared
import numpy as np
from extreme_data import KS, MOST, Array, Data, Sparse
from scipy import sparse

import unilabel as ul

sys.path.append(str(Path(__file__).parent.parent))  # for benchmarks.measure
WIDTH, BATCH, RATE = 128, 512, 0.01
DECAY, DECAY_OF_SQUARES, EPSILON = 0.9, 0.999, 1e-15  # of Adam; no gradient is so small that EPSILON counts
TOLERANCE = 1e-4  # between the loss curves of the first epoch, relative; 2e-6 was seen after 112 steps


class Batch(NamedTuple):
    """What is not zero in the words of some examples, padded with values of 0; and their labels, padded with -1."""

    words: Array
    values: Array
    rows: Array  # of each word, in order
    labels: Array


Step = Callable[[Batch], float]  # takes a step, and gives the loss
Weights = list[Array]  # the words' vectors; one row for each label; one bias for each label


# --- The frameworks ---------------------------------------------------------------------------------------------------


def loss_on(weights: Weights, batch: Batch, mean: Callable[[Array, Batch], Array]) -> Array:
    table, head, bias = weights
    return ul.linear_multilabel_logistic_loss(mean(table, batch), head, ul.Positives(batch.labels), linear_bias=bias)


def adam(weights: Weights, gradients: Weights, state: tuple[Weights, Weights], count: Any) -> tuple[Any, Any]:
    """The next weights and state (Kingma and Ba, 2015), of NumPy's or JAX's arrays. `count` is 1 at first."""
    means = [DECAY * m + (1 - DECAY) * g for m, g in zip(state[0], gradients, strict=True)]
    squares = [DECAY_OF_SQUARES * s + (1 - DECAY_OF_SQUARES) * g * g for s, g in zip(state[1], gradients, strict=True)]
    rate, scale = RATE / (1 - DECAY**count), (1 - DECAY_OF_SQUARES**count) ** 0.5
    moved = [w - rate * m / (s**0.5 / scale + EPSILON) for w, m, s in zip(weights, means, squares, strict=True)]
    return moved, (means, squares)


def numpy_model(start: Weights) -> tuple[Step, Callable[[], Weights]]:
    """No autodiff: `ul.value_and_grad` gives the gradients of the loss, and those of the vectors are a product."""
    weights, state, count = start, (list(map(np.zeros_like, start)),) * 2, 0
    closed = ul.value_and_grad(ul.linear_multilabel_logistic_loss)

    def step(batch: Batch) -> float:
        nonlocal weights, state, count
        table, head, bias = weights
        bags = sparse.csr_array((batch.values, (batch.rows, batch.words)), (len(batch.labels), len(table)))
        loss, found = closed(bags @ table, head, ul.Positives(batch.labels), linear_bias=bias)
        gradients = [bags.T @ found.features, found.linear_weight, found.linear_bias]
        count += 1
        weights, state = adam(weights, gradients, state, count)
        return float(loss)

    return step, lambda: weights


def torch_model(start: Weights) -> tuple[Step, Callable[[], Weights]]:
    import torch

    weights = [torch.tensor(w, requires_grad=True) for w in start]
    optimizer = torch.optim.Adam(weights, RATE, (DECAY, DECAY_OF_SQUARES), EPSILON)

    def mean(table: Array, batch: Batch) -> Array:
        sums = table.new_zeros(len(batch.labels), WIDTH)
        return sums.index_add(0, batch.rows, batch.values[:, None] * table[batch.words])

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = loss_on(weights, Batch(*map(torch.from_numpy, batch)), mean)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, lambda: [w.detach().numpy() for w in weights]


def jax_model(start: Weights) -> tuple[Step, Callable[[], Weights]]:
    import jax

    def mean(table: Array, batch: Batch) -> Array:
        parts = batch.values[:, None] * table[batch.words]
        return jax.ops.segment_sum(parts, batch.rows, len(batch.labels), indices_are_sorted=True)

    @jax.jit(donate_argnums=(0, 1))
    def update(weights: Weights, state: Any, count: Array, batch: Batch) -> tuple[Array, Weights, Any]:
        loss, gradients = jax.value_and_grad(loss_on)(weights, batch, mean)
        return loss, *adam(weights, gradients, state, count)

    weights, count = jax.tree.map(jax.numpy.asarray, start), 0
    state = jax.tree.map(jax.numpy.zeros_like, (weights, weights))

    def step(batch: Batch) -> float:
        nonlocal weights, state, count
        count += 1
        with jax.default_matmul_precision("float32"):  # on a GPU too
            loss, weights, state = update(weights, state, np.float32(count), batch)
        return float(loss)

    return step, lambda: list(map(np.asarray, weights))


def tensorflow_model(start: Weights) -> tuple[Step, Callable[[], Weights]]:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # errors only
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # full float32 on a GPU too
    weights = [tf.Variable(w) for w in start]
    optimizer = tf.keras.optimizers.Adam(RATE, DECAY, DECAY_OF_SQUARES, EPSILON)

    def mean(table: Array, batch: Batch) -> Array:
        parts = batch.values[:, None] * tf.gather(table, batch.words)
        return tf.math.unsorted_segment_sum(parts, batch.rows, tf.shape(batch.labels)[0])

    @tf.function(reduce_retracing=True)
    def update(batch: Batch) -> Array:
        with tf.GradientTape() as tape:
            loss = loss_on(weights, batch, mean)
        optimizer.apply([tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, weights)], weights)
        return loss

    return lambda batch: float(update(Batch(*map(tf.constant, batch)))), lambda: [w.numpy() for w in weights]


MODELS = {"numpy": numpy_model, "torch": torch_model, "jax": jax_model, "tensorflow": tensorflow_model}


# --- The run ----------------------------------------------------------------------------------------------------------


def batches(data: Data, steps: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Each example once in an epoch; few lengths, as compilers make a program for each."""
    left = np.zeros(0, int)
    for _ in range(steps):
        while len(left) < BATCH:
            left = np.concatenate([left, rng.permutation(data.words.shape[0])])
        rows, left = left[:BATCH], left[BATCH:]
        bags, most = data.words[rows].tocoo(), data.labels.indptr[rows + 1] - data.labels.indptr[rows]
        pad, length = (0, power_of_two(bags.nnz) - bags.nnz), power_of_two(most.max())
        positives = ul.Positives.from_csr(data.labels.indptr, data.labels.indices, rows, length=length)
        yield Batch(
            np.pad(bags.coords[1], pad).astype(np.int32),
            np.pad(bags.data, pad),
            np.pad(bags.coords[0], pad, constant_values=BATCH - 1).astype(np.int32),
            positives.indices.astype(np.int32),
        )


def power_of_two(least: int) -> int:
    return 1 << (int(least) - 1).bit_length() if least else 1


def initial(data: Data, rng: np.random.Generator) -> Weights:
    """The weights that every framework starts from; the biases are the labels' log-odds."""
    (examples, words), labels = data.words.shape, data.labels.shape[1]
    odds = (data.labels.sum(axis=0) + 0.5) / (examples - data.labels.sum(axis=0) + 0.5)
    table, head = rng.normal(0, WIDTH**-0.5, (words, WIDTH)), np.zeros((labels, WIDTH))
    return [w.astype(np.float32) for w in (table, head, np.log(odds))]


def predicted(weights: Weights, words: Sparse) -> Iterator[Array]:
    """The labels of the highest logits, highest first, of a block of examples at a time."""
    table, head, bias = weights
    for i in range(0, words.shape[0], BATCH):
        logits = words[i : i + BATCH] @ table @ head.T + bias
        best = np.argpartition(logits, -MOST)[:, -MOST:]
        yield np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), 1), 1)


def peak(backend: str, start: Weights, batch: Batch) -> float:
    """MiB that a step takes beyond what is held before it, after one."""
    from benchmarks.measure import rise

    step, _ = MODELS[backend](start)
    step(batch)
    return rise(lambda: step(batch)) / 2**20


def run(backend: str, data: Data, steps: int, seed: int) -> tuple[list[float], Weights]:
    """Trains with a progress bar, prints a line, and returns the losses and the weights."""
    from rich.progress import track

    from benchmarks.measure import alone

    rng = np.random.default_rng(seed)
    start = initial(data, rng)
    memory = alone(peak, backend, start, next(batches(data, 1, np.random.default_rng(seed))))
    step, weights = MODELS[backend](start)
    begun = time.perf_counter()
    some = track(batches(data, steps, rng), backend, steps, transient=True, disable=not sys.stdout.isatty())
    losses = [step(batch) for batch in some]
    seconds = (time.perf_counter() - begun) / steps * epoch(data)
    print(f"{backend:10}  loss {losses[0]:.4f} to {losses[-1]:.4f}, {seconds:.0f} s an epoch, {memory:.0f} MiB a step")
    return losses, weights()


def epoch(data: Data) -> int:
    """The steps of an epoch."""
    return -(-data.words.shape[0] // BATCH)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learns many labels, trained by the framework of your choice.")
    parser.add_argument("--data", type=Path, metavar="FILE", help="in the extreme classification repository's format")
    parser.add_argument("--backend", choices=[*MODELS, "all"], default="numpy", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="stop after so many; default: after the epochs")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random; default: %(default)s")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw how well seldom labels are found, there")
    args = parser.parse_args()
    for name in ("epochs", "steps"):
        given = getattr(args, name)
        if given is not None and given < 1:
            parser.error(f"expected --{name} to be 1 or more; received: {given}")
    return args


def main() -> None:
    args = arguments()
    try:
        data = shared.made_up(args.seed) if args.data is None else shared.read(args.data)
        learned, tried = shared.held_out(data, np.random.default_rng(args.seed))
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    counts = learned.labels.sum(axis=0)
    (examples, words), labels = learned.words.shape, len(counts)
    print(f"{examples} examples, and {tried.words.shape[0]} held out; {words} words, {labels} labels; ", end="")
    print(f"the logits of a step would be {4 * BATCH * labels / 2**20:.0f} MiB, as would its targets")
    steps = args.steps or args.epochs * epoch(learned)
    backends = MODELS if args.backend == "all" else [args.backend]
    try:
        if args.picture:
            import matplotlib  # noqa: F401  # what is missing is said before the work
        ran = {backend: run(backend, learned, steps, args.seed) for backend in backends}
    except ModuleNotFoundError as missing:
        sys.exit(f"This example needs {missing.name}: pip install {missing.name}")
    best = {shared.POPULARITY: np.tile(np.argsort(-counts, kind="stable")[:MOST], (tried.words.shape[0], 1))}
    best |= {backend: np.concatenate([*predicted(weights, tried.words)]) for backend, (_, weights) in ran.items()}
    print(f"{'precision, in %':16}" + "".join(f"     at {k}" for k in KS) + "".join(f"  scored at {k}" for k in KS))
    for name, chosen in best.items():
        plain = shared.precisions(chosen, tried.labels)
        scored = shared.scored_precisions(chosen, tried.labels, shared.propensities(learned.labels))
        print(f"{name:16}" + "".join(f"{100 * p:9.1f}" for p in plain) + "".join(f"{100 * p:13.1f}" for p in scored))
    if args.picture:
        shared.draw(args.picture, {name: shared.recalls(chosen, tried.labels, counts) for name, chosen in best.items()})
    if len(ran) > 1:
        curves = [losses[: epoch(learned)] for losses, _ in ran.values()]
        difference = np.max(np.ptp(curves, axis=0) / np.min(curves, axis=0))
        print(f"largest relative difference of the loss curves: {difference:.1e} (at most {TOLERANCE:.0e} allowed)")
        sys.exit(0 if difference <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
