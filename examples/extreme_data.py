"""Bags of words and the labels of each: a file or made up, and what predictions of labels are worth.

For examples/extreme.py, which trains what predicts them.
"""

from __future__ import annotations

import array
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

EACH = ("examples", "words", "labels")
LEAST = 10  # examples
LARGEST = float(np.finfo(np.float32).max)
KS = (1, 3, 5)
MOST = KS[-1]  # labels are predicted for each example
A, B = 0.55, 1.5  # of the propensities, as Jain et al. have them for most data sets
POPULARITY = "popularity"  # the labels that most examples have, for every example

Array = Any  # NumPy's; in extreme.py of any framework
Sparse = Any  # sparse.csr_array


class Data(NamedTuple):
    """Bags of words and labels, one row for each example. Each row of words adds up to 1."""

    words: Sparse  # examples x words
    labels: Sparse  # examples x labels


def read(file: Path) -> Data:
    """A line `examples words labels`, then one a line: `label,label word:value word:value`, all counted from 0.

    The line of an example without labels begins with a blank. ValueError names the first line that is not so.
    """
    words, values, labels = array.array("i"), array.array("f"), array.array("i")
    word_ends, label_ends = array.array("q", [0]), array.array("q", [0])
    with file.open(encoding="utf-8", errors="backslashreplace") as lines:
        position = 1
        try:
            header = lines.readline().split()
            if len(header) != 3:
                raise ValueError(f"expected 'examples words labels'; received {' '.join(header)!r}")
            counts = [whole(text, 1 << 31, f"the number of {what}") for text, what in zip(header, EACH, strict=True)]
            for position, line in enumerate(lines, 2):  # noqa: B007  # the error names it
                if len(label_ends) <= counts[0]:
                    of_line = parsed(line.rstrip("\r\n"), *counts[1:])
                    labels.extend(of_line[0])
                    words.extend(of_line[1])
                    values.extend(of_line[2])
                    label_ends.append(len(labels))
                    word_ends.append(len(words))
                elif line.strip():
                    raise ValueError(f"expected the end, after {counts[0]} examples; received {line[:40]!r}")
            if len(label_ends) <= counts[0]:
                raise ValueError(f"expected {counts[0]} examples; received the end after {len(label_ends) - 1}")
        except ValueError as error:
            raise ValueError(f"{file}, line {position}: {error}.") from None
    data, columns, ones = np.array(values), np.array(words), np.ones(len(labels), bool)
    bags = sparse.csr_array((data, columns, np.array(word_ends)), (counts[0], counts[1]))
    return weighed(bags, sparse.csr_array((ones, np.array(labels), np.array(label_ends)), (counts[0], counts[2])))


def parsed(line: str, words: int, labels: int) -> tuple[list[int], list[int], list[float]]:
    """The labels of an example, its words and their values."""
    names, _, rest = line.partition(" ")
    pairs = [pair.partition(":") for pair in rest.split()]
    return (
        [whole(name, labels, "a label") for name in names.split(",") if names],
        [whole(word, words, "a word") for word, _, _ in pairs],
        [number(value) for _, _, value in pairs],
    )


def whole(text: str, end: int, what: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < end:
        return int(text)
    hint = "; the line of an example without labels begins with a blank" if ":" in text else ""
    raise ValueError(f"expected {what}, a whole number below {end}{hint}; received {text!r}")


def number(text: str) -> float:
    try:
        if abs(value := float(text)) <= LARGEST:  # NaN is not
            return value
    except ValueError:
        pass
    raise ValueError(f"expected a word and its value, as 7:0.5; received the value {text!r}")


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
    """Each row of words over the sum of its absolute values; labels that are there or not."""
    words.sum_duplicates()
    labels.sum_duplicates()
    sums = np.asarray(abs(words).sum(axis=1)).ravel()
    words = sparse.diags_array(1 / np.where(sums > 0, sums, 1)) @ words
    return Data(words.tocsr().astype(np.float32), labels.astype(bool))


def held_out(data: Data, rng: np.random.Generator) -> tuple[Data, Data]:
    """What to learn from, and of the other tenth those to be tried on: the examples that have labels."""
    examples, labels = data.labels.shape
    if examples < LEAST or labels < MOST:
        least = f"{LEAST} examples or more, and {MOST} labels or more"
        raise ValueError(f"expected {least}; received {examples} and {labels}.")
    order = rng.permutation(examples)
    learned, tried = order[len(order) // 10 :], order[: len(order) // 10]
    tried = tried[np.diff(data.labels.indptr)[tried] > 0]
    if not len(tried):
        raise ValueError("expected a held-out example that has labels; none has.")
    return Data(data.words[learned], data.labels[learned]), Data(data.words[tried], data.labels[tried])


# --- What predictions are worth ---------------------------------------------------------------------------------------


def hits(best: Array, labels: Sparse) -> Array:
    """Whether each of the predicted labels, (n, k), is one of the example's."""
    rows = np.repeat(np.arange(len(best)), best.shape[1])
    return np.asarray(labels[rows, best.ravel()]).reshape(best.shape)


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
    """How often labels have been seen (never, once, 2 or 3 times, 4 to 7, ...), and the share that is predicted."""
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
