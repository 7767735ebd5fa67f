"""Reads handwritten digits, with two heads on one small model, in the framework that you choose.

One head says which digit it is: ten mutually exclusive classes, `ul.softmax_nll`. The other says what is true of
it: four attributes, any number of them at once, `ul.multilabel_logistic_loss`. The model and the loss below are written
once, for all frameworks; each framework then trains them in its own way, and the four loss curves are the same.

    python examples/digits.py --backend torch  # or numpy, jax, tensorflow; all: each in turn, and compares the curves
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import unilabel as ul

ATTRIBUTES = {"even": {0, 2, 4, 6, 8}, "prime": {2, 3, 5, 7}, "above 4": {5, 6, 7, 8, 9}, "loop": {0, 4, 6, 8, 9}}
HIDDEN, BATCH, RATE, MOMENTUM = 64, 32, 0.2, 0.9
TOLERANCE = 1e-5  # between the loss curves, relative; a few float32 roundings (5e-7) are usual

Array = Any  # of any framework
Batch = tuple[Array, Array, Array]  # scans (n, 64), digits (n,), attributes (n, 4)
Trained = tuple[list[float], list[Array]]  # the loss of each step, the weights


def model(weights: list[Array], scans: Array) -> tuple[Array, Array]:
    """The logits of the digits and those of the attributes."""
    w1, b1, w2, b2 = weights
    output = ul.sigmoid(scans @ w1 + b1) @ w2 + b2
    return output[:, :10], output[:, 10:]


def total_loss(weights: list[Array], scans: Array, digits: Array, attributes: Array) -> Array:
    """Both heads' losses, added."""
    digit_logits, attribute_logits = model(weights, scans)
    return ul.softmax_nll(digit_logits, digits) + ul.multilabel_logistic_loss(attribute_logits, attributes)


def train_numpy(start: list[Array], batches: Iterable[Batch]) -> Trained:
    """No autodiff: `ul.value_and_grad` gives the gradients of the losses, and the chain rule is written out by hand."""
    digit_loss = ul.value_and_grad(ul.softmax_nll)
    attribute_loss = ul.value_and_grad(ul.multilabel_logistic_loss)
    weights = [w.copy() for w in start]
    velocities = [np.zeros_like(w) for w in weights]
    losses = []
    for scans, digits, attributes in batches:
        w1, b1, w2, b2 = weights
        hidden = ul.sigmoid(scans @ w1 + b1)
        output = hidden @ w2 + b2
        loss1, d_digits = digit_loss(output[:, :10], digits)
        loss2, d_attributes = attribute_loss(output[:, 10:], attributes)
        d_output = np.hstack([d_digits, d_attributes])
        d_hidden = d_output @ w2.T * hidden * (1 - hidden)
        gradients = [scans.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_output, d_output.sum(0)]
        for w, v, gradient in zip(weights, velocities, gradients, strict=True):
            v[:] = MOMENTUM * v + gradient
            w -= RATE * v
        losses.append(float(loss1 + loss2))
    return losses, weights


def train_torch(start: list[Array], batches: Iterable[Batch]) -> Trained:
    import torch

    torch.set_num_threads(1)  # more threads only slow down such small matrices
    weights = [torch.tensor(w, requires_grad=True) for w in start]
    optimizer = torch.optim.SGD(weights, RATE, MOMENTUM)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = total_loss(weights, *map(torch.from_numpy, batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [w.detach().numpy() for w in weights]


def train_jax(start: list[Array], batches: Iterable[Batch]) -> Trained:
    import jax

    @jax.jit
    def step(weights: list[Array], velocities: list[Array], batch: Batch) -> tuple[Array, list[Array], list[Array]]:
        loss, gradients = jax.value_and_grad(total_loss)(weights, *batch)
        velocities = jax.tree.map(lambda v, gradient: MOMENTUM * v + gradient, velocities, gradients)
        weights = jax.tree.map(lambda w, v: w - RATE * v, weights, velocities)
        return loss, weights, velocities

    weights = jax.tree.map(jax.numpy.asarray, start)
    velocities = jax.tree.map(jax.numpy.zeros_like, weights)
    losses = []
    with jax.default_matmul_precision("float32"):  # on a GPU too
        for batch in batches:
            loss, weights, velocities = step(weights, velocities, batch)
            losses.append(float(loss))
    return losses, [np.asarray(w) for w in weights]


def train_tensorflow(start: list[Array], batches: Iterable[Batch]) -> Trained:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # errors only
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # full float32 on a GPU too
    weights = [tf.Variable(w) for w in start]
    optimizer = tf.keras.optimizers.SGD(RATE, MOMENTUM)

    @tf.function
    def step(scans: Array, digits: Array, attributes: Array) -> Array:
        with tf.GradientTape() as tape:
            loss = total_loss(weights, scans, digits, attributes)
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    losses = [float(step(*map(tf.constant, batch))) for batch in batches]
    return losses, [w.numpy() for w in weights]


TRAIN = {"numpy": train_numpy, "torch": train_torch, "jax": train_jax, "tensorflow": train_tensorflow}


def load(rng: np.random.Generator) -> tuple[Batch, Batch]:
    """The 1,797 scans of scikit-learn, 8 by 8 grey pixels each: two thirds to train on, one third to test on."""
    from sklearn.datasets import load_digits

    scans, digits = load_digits(return_X_y=True)
    truth = np.array([[digit in attribute for attribute in ATTRIBUTES.values()] for digit in range(10)])
    order = rng.permutation(len(digits))
    train, test = order[len(digits) // 3 :], order[: len(digits) // 3]
    scans = (scans / 16).astype(np.float32)
    return (scans[train], digits[train], truth[digits[train]]), (scans[test], digits[test], truth[digits[test]])


def initial(rng: np.random.Generator) -> list[Array]:
    """The weights that every framework starts from."""
    w1 = rng.normal(0, 64**-0.5, (64, HIDDEN))
    w2 = rng.normal(0, HIDDEN**-0.5, (HIDDEN, 10 + len(ATTRIBUTES)))
    return [w.astype(np.float32) for w in (w1, np.zeros(HIDDEN), w2, np.zeros(w2.shape[1]))]


def shuffled(data: Batch, epochs: int, seed: int) -> Iterator[Batch]:
    """Batches of one size, in an order that depends on the seed only; the incomplete last batch is dropped."""
    scans, digits, attributes = data
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(scans))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[first : first + BATCH]
            yield scans[rows], digits[rows], attributes[rows]


def run(backend: str, epochs: int, seed: int) -> list[float]:
    """Trains with a progress bar, prints a line, and returns the mean loss of each epoch."""
    from rich.progress import track

    rng = np.random.default_rng(seed)
    train, (scans, digits, attributes) = load(rng)
    steps = epochs * (len(train[0]) // BATCH)
    batches = track(shuffled(train, epochs, seed), backend, steps, transient=True, disable=not sys.stdout.isatty())
    losses, weights = TRAIN[backend](initial(rng), batches)
    curve: list[float] = np.reshape(losses, (epochs, -1)).mean(axis=1).tolist()

    digit_logits, attribute_logits = model(weights, scans)
    digits_right = np.mean(digit_logits.argmax(axis=1) == digits)
    attributes_right = np.mean((attribute_logits > 0) == attributes)
    print(f"{backend:10}  loss {curve[-1]:.7f}   digits {digits_right:.2%}   attributes {attributes_right:.2%}")
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads handwritten digits, trained by the framework of your choice.")
    parser.add_argument("--backend", choices=[*TRAIN, "all"], default="numpy", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and batches; default: %(default)s")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="write the mean loss of each epoch to it, as JSON")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"expected one epoch or more; received: {args.epochs}")

    backends = TRAIN if args.backend == "all" else [args.backend]
    try:
        curves = {backend: run(backend, args.epochs, args.seed) for backend in backends}
    except ModuleNotFoundError as missing:
        name = str(missing.name).partition(".")[0]
        sys.exit(f"This example needs {name}: pip install {name.replace('sklearn', 'scikit-learn')}")
    if args.curve:
        args.curve.write_text(json.dumps(curves, indent=1) + "\n")
    if len(curves) > 1:
        every = np.array(list(curves.values()))
        difference = np.max(np.ptp(every, axis=0) / every.min(axis=0))
        print(f"largest relative difference of the loss curves: {difference:.1e} (at most {TOLERANCE:.0e} allowed)")
        sys.exit(0 if difference <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
