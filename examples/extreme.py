"""Learns which of many labels an example has, from its bag of words: no examples x labels array of targets or logits.

The mean of an example's word vectors, weighted by the words' values, is what a linear layer with one row for each label
takes. `ul.linear_multilabel_logistic_loss` goes through that layer a block at a time, and `ul.Positives` names the few
labels that each example has. Each framework trains the model in its own way; the loss curves are the same.

    python examples/extreme.py --backend torch  # or numpy, jax, tensorflow; all: each in turn, and compares the curves
    python examples/extreme.py --data FILE      # in the text format of the extreme classification repository

Without a file the data is made up: labels whose frequencies follow Zipf's law, and words that go with them. A tenth of
the examples is held out. Precision at k is the share of right ones among the k labels of highest logit; the
propensity-scored one weighs a label by how seldom it is seen (Jain et al., 2016), over the best that can be reached.
"""

from __future__ import annotations

import argparse
import array
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

import unilabel as ul

sys.path.append(str(Path(__file__).parent.parent))  # for benchmarks.measure
WIDTH, BATCH, RATE = 128, 512, 0.005
DECAY, DECAY_OF_SQUARES, EPSILON = 0.9, 0.999, 1e-15  # of Adam; no gradient is so small that EPSILON counts
KS = (1, 3, 5)
MOST = KS[-1]  # labels are predicted for each example
POPULARITY = "popularity"  # the labels that most examples have, for every example
EACH = ("examples", "words", "labels")
A, B = 0.55, 1.5  # of the propensities, as Jain et al. have them for most data sets
TOLERANCE = 1e-3  # between the loss curves of the first epoch, relative

Array = Any  # of any framework
Sparse = Any  # sparse.csr_array


class Data(NamedTuple):
    """Bags of words and labels, one row for each example. Each row of words adds up to 1."""

    words: Sparse  # examples x words
    labels: Sparse  # examples x labels


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


def adam(weights: Weights, gradients: Weights, state: tuple[Weights, Weights], time: Any) -> tuple[Any, Any]:
    """The next weights and state (Kingma and Ba, 2015), of NumPy's or JAX's arrays. `time` counts from 1."""
    means = [DECAY * m + (1 - DECAY) * g for m, g in zip(state[0], gradients, strict=True)]
    squares = [DECAY_OF_SQUARES * s + (1 - DECAY_OF_SQUARES) * g * g for s, g in zip(state[1], gradients, strict=True)]
    rate, scale = RATE / (1 - DECAY**time), (1 - DECAY_OF_SQUARES**time) ** 0.5
    moved = [w - rate * m / (s**0.5 / scale + EPSILON) for w, m, s in zip(weights, means, squares, strict=True)]
    return moved, (means, squares)


def numpy_model(start: Weights) -> tuple[Step, Callable[[], Weights]]:
    """No autodiff: `ul.value_and_grad` gives the gradients of the loss, and those of the vectors are a product."""
    weights, state, time = start, (list(map(np.zeros_like, start)),) * 2, 0
    closed = ul.value_and_grad(ul.linear_multilabel_logistic_loss)

    def step(batch: Batch) -> float:
        nonlocal weights, state, time
        table, head, bias = weights
        bags = sparse.csr_array((batch.values, (batch.rows, batch.words)), (len(batch.labels), len(table)))
        loss, found = closed(bags @ table, head, ul.Positives(batch.labels), linear_bias=bias)
        gradients = [bags.T @ found.features, found.linear_weight, found.linear_bias]
        time += 1
        weights, state = adam(weights, gradients, state, time)
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
    def update(weights: Weights, state: Any, time: Array, batch: Batch) -> tuple[Array, Weights, Any]:
        loss, gradients = jax.value_and_grad(loss_on)(weights, batch, mean)
        return loss, *adam(weights, gradients, state, time)

    weights, time = jax.tree.map(jax.numpy.asarray, start), 0
    state = jax.tree.map(jax.numpy.zeros_like, (weights, weights))

    def step(batch: Batch) -> float:
        nonlocal weights, state, time
        time += 1
        with jax.default_matmul_precision("float32"):  # on a GPU too
            loss, weights, state = update(weights, state, np.float32(time), batch)
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


# --- The data ---------------------------------------------------------------------------------------------------------


def read(file: Path) -> Data:
    """A line `examples words labels`, then one a line: `label,label word:value word:value`, all counted from 0.

    The line of an example without labels begins with a blank. ValueError names the first line that is not so.
    """

    def whole(text: str, end: float, what: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) < end):
            below = f" below {end}" if end < math.inf else ""
            hint = "; the line of an example without labels begins with a blank" if ":" in text else ""
            raise ValueError(f"expected {what}, a whole number{below}{hint}; received {text!r}")
        return int(text)

    def number(text: str) -> float:
        try:
            if math.isfinite(float(text)):
                return float(text)
        except ValueError:
            pass
        raise ValueError(f"expected a word and its value, as 7:0.5; received the value {text!r}")

    words, values, labels = array.array("i"), array.array("f"), array.array("i")
    word_ends, label_ends = array.array("q", [0]), array.array("q", [0])
    with file.open(encoding="utf-8", errors="backslashreplace") as lines:
        position = 1
        try:
            header = lines.readline().split()
            if len(header) != 3:
                raise ValueError(f"expected 'examples words labels'; received {' '.join(header)!r}")
            counts = [whole(text, math.inf, f"the number of {what}") for text, what in zip(header, EACH, strict=True)]
            for position, line in enumerate(lines, 2):
                if len(label_ends) > counts[0]:
                    if line.strip():
                        raise ValueError(f"expected the end, after {counts[0]} examples; received {line[:40]!r}")
                    continue
                names, _, pairs = line.rstrip("\r\n").partition(" ")
                labels.extend(whole(name, counts[2], "a label") for name in names.split(",") if names)
                for pair in pairs.split():
                    word, _, value = pair.partition(":")
                    words.append(whole(word, counts[1], "a word"))
                    values.append(number(value))
                word_ends.append(len(words))
                label_ends.append(len(labels))
            if len(label_ends) <= counts[0]:
                raise ValueError(f"expected {counts[0]} examples; received the end after {len(label_ends) - 1}")
        except ValueError as error:
            raise ValueError(f"{file}, line {position}: {error}.") from None
    parts = [np.frombuffer(part, part.typecode) if part else np.zeros(0, part.typecode) for part in (words, labels)]
    ones = np.ones(len(labels), np.float32)
    return weighed(
        sparse.csr_array((np.array(values, np.float32), parts[0], word_ends), (counts[0], counts[1])),
        sparse.csr_array((ones, parts[1], label_ends), (counts[0], counts[2])),
    )


def made_up(seed: int, examples: int = 8000, words: int = 4000, labels: int = 5000) -> Data:
    """Each example has labels drawn by Zipf's law, some of the four words of each, and as many words of no meaning."""
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(3, labels + 3)
    example = np.repeat(np.arange(examples), rng.poisson(3, examples))
    label = rng.choice(labels, len(example), p=zipf / zipf.sum())
    told = rng.integers(0, words, (labels, 4))[label]
    word = np.where(rng.random(told.shape) < 0.5, told, (words * rng.random(told.shape) ** 4).astype(int))
    bags = sparse.csr_array((np.ones(word.size), (np.repeat(example, 4), word.ravel())), (examples, words))
    return weighed(bags, sparse.csr_array((np.ones(len(label)), (example, label)), (examples, labels)))


def weighed(words: Sparse, labels: Sparse) -> Data:
    """Each row of words over the sum of its absolute values, and 1 for each label."""
    words.sum_duplicates()
    labels.sum_duplicates()
    labels.data[:] = 1
    sums = np.asarray(abs(words).sum(axis=1)).ravel()
    words = sparse.diags_array(1 / np.where(sums > 0, sums, 1)) @ words
    return Data(words.tocsr().astype(np.float32), labels.astype(np.float32))


def held_out(data: Data, rng: np.random.Generator) -> tuple[Data, Data]:
    """What to learn from, and of the other tenth those to be tried on: the examples that have labels."""
    order = rng.permutation(data.words.shape[0])
    learned, tried = order[len(order) // 10 :], order[: len(order) // 10]
    tried = tried[np.diff(data.labels.indptr)[tried] > 0]
    return Data(data.words[learned], data.labels[learned]), Data(data.words[tried], data.labels[tried])


def batches(data: Data, steps: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Each example once in an epoch; few lengths, as compilers make a program for each."""
    left = np.zeros(0, int)
    for _ in range(steps):
        while len(left) < BATCH:
            left = np.concatenate([left, rng.permutation(data.words.shape[0])])
        rows, left = left[:BATCH], left[BATCH:]
        bags, most = data.words[rows].tocoo(), data.labels.indptr[rows + 1] - data.labels.indptr[rows]
        pad, length = (0, power_of_two(bags.nnz) - bags.nnz), power_of_two(most.max())
        yield Batch(
            np.pad(bags.coords[1], pad).astype(np.int32),
            np.pad(bags.data, pad),
            np.pad(bags.coords[0], pad, constant_values=BATCH - 1).astype(np.int32),
            ul.Positives.from_csr(data.labels.indptr, data.labels.indices, rows, length=length).indices,
        )


def power_of_two(least: int) -> int:
    return 1 << (int(least) - 1).bit_length() if least else 1


# --- What it is worth -------------------------------------------------------------------------------------------------


def predicted(weights: Weights, words: Sparse) -> Iterator[Array]:
    """The labels of the highest logits, highest first, of a block of examples at a time."""
    table, head, bias = weights
    for i in range(0, words.shape[0], BATCH):
        logits = words[i : i + BATCH] @ table @ head.T + bias
        best = np.argpartition(logits, -MOST)[:, -MOST:]
        yield np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), 1), 1)


def hits(best: Array, labels: Sparse) -> Array:
    """Whether each of the predicted labels, (n, k), is one of the example's."""
    rows = np.repeat(np.arange(len(best)), best.shape[1])
    return np.asarray(labels[rows, best.ravel()]).reshape(best.shape) > 0


def propensities(labels: Sparse) -> Array:
    """How likely a label that is true has been seen, by its count among the examples learned from."""
    n, counts = labels.shape[0], labels.sum(axis=0)
    return 1 / (1 + (math.log(n) - 1) * (B + 1) ** A * (counts + B) ** -A)


def precisions(best: Array, labels: Sparse) -> list[float]:
    return [float(hits(best, labels)[:, :k].mean()) for k in KS]


def scored_precisions(best: Array, labels: Sparse, propensity: Array) -> list[float]:
    """As `precisions`, with 1 / propensity for each right label, over what the best order comes to."""
    found, there = hits(best, labels) / propensity[best], labels.multiply(1 / propensity).tocsr()
    rows = [np.sort(there.data[i:j])[::-1] for i, j in zip(there.indptr[:-1], there.indptr[1:], strict=True)]
    return [float(found[:, :k].sum() / max(sum(row[:k].sum() for row in rows), 1e-9)) for k in KS]


def recalls(best: Array, labels: Sparse, counts: Array) -> tuple[Array, Array]:
    """How often labels have been seen, from 1 to 2, 2 to 4 and so on, and the share of these that is predicted."""
    group = np.ceil(np.log2(counts + 1)).astype(int)
    found = np.bincount(group[best[hits(best, labels)]], minlength=group.max() + 1)
    there = np.bincount(group, labels.sum(axis=0), minlength=group.max() + 1)
    some = there > 0
    return 2.0 ** (np.flatnonzero(some) - 0.5), found[some] / there[some]


def draw(file: Path, lines: dict[str, tuple[Array, Array]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        axes.semilogx(*line, label=name, marker=".", linestyle="--" if name == POPULARITY else "-")
    axes.set(xlabel="examples with the label, of those learned from", ylabel=f"recall among {MOST}, held-out examples")
    axes.legend()
    figure.savefig(file)


# --- The run ----------------------------------------------------------------------------------------------------------


def initial(data: Data, rng: np.random.Generator) -> Weights:
    """The weights that every framework starts from; the biases are the labels' log-odds."""
    (examples, words), labels = data.words.shape, data.labels.shape[1]
    odds = (data.labels.sum(axis=0) + 0.5) / (examples - data.labels.sum(axis=0) + 0.5)
    table, head = rng.normal(0, WIDTH**-0.5, (words, WIDTH)), np.zeros((labels, WIDTH))
    return [w.astype(np.float32) for w in (table, head, np.log(odds))]


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
        if (getattr(args, name) or 1) < 1:
            parser.error(f"expected --{name} to be 1 or more; received: {getattr(args, name)}")
    return args


def main() -> None:
    args = arguments()
    try:
        data = made_up(args.seed) if args.data is None else read(args.data)
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    learned, tried = held_out(data, np.random.default_rng(args.seed))
    counts = learned.labels.sum(axis=0)
    (examples, words), labels = learned.words.shape, len(counts)
    print(f"{examples} examples, and {tried.words.shape[0]} held out; {words} words, {labels} labels; ", end="")
    print(f"the logits of a step would be {4 * BATCH * labels / 2**20:.0f} MiB, as would its targets")
    steps = args.steps or args.epochs * epoch(learned)
    backends = MODELS if args.backend == "all" else [args.backend]
    try:
        ran = {backend: run(backend, learned, steps, args.seed) for backend in backends}
    except ModuleNotFoundError as missing:
        sys.exit(f"This example needs {missing.name}: pip install {missing.name}")
    best = {POPULARITY: np.tile(np.argsort(-counts, kind="stable")[:MOST], (tried.words.shape[0], 1))}
    best |= {backend: np.concatenate([*predicted(weights, tried.words)]) for backend, (_, weights) in ran.items()}
    print(f"{'precision, in %':16}" + "".join(f"     at {k}" for k in KS) + "".join(f"  scored at {k}" for k in KS))
    for name, chosen in best.items():
        plain, scored = precisions(chosen, tried.labels), scored_precisions(chosen, tried.labels, propensities(learned.labels))
        print(f"{name:16}" + "".join(f"{100 * p:9.1f}" for p in plain) + "".join(f"{100 * p:13.1f}" for p in scored))
    if args.picture:
        draw(args.picture, {name: recalls(chosen, tried.labels, counts) for name, chosen in best.items()})
    if len(ran) > 1:
        curves = [losses[: epoch(learned)] for losses, _ in ran.values()]
        difference = np.max(np.ptp(curves, axis=0) / np.min(curves, axis=0))
        print(f"largest relative difference of the loss curves: {difference:.1e} (at most {TOLERANCE:.0e} allowed)")
        sys.exit(0 if difference <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
