"""Sparse arrays as multilabel targets: the columns of their elements, one row for each example."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .compilers import constant_in_dynamo


class Padded(NamedTuple):
    """A sparse array as the formulas take it: columns in ascending order, padded with -1, or the row's last one again.

    Padding has the value of the row's last column, or 0 where there is none.
    """

    indices: Any  # (..., K)
    values: Any | None  # (..., K); None: 1, all of them
    shape: tuple[Any, ...] | None = None  # None: not known, it has indices alone


def places(xp: Any, starts: Any, counts: Any, length: int) -> Any:
    """Where the elements of rows are that begin there, (N, length); what is over is a row's last element again."""
    last = xp.minimum(xp.arange(length, device=counts.device)[None, :], counts[:, None] - 1)
    return xp.where(last < 0, 0, starts[:, None] + last)


def padded(xp: Any, counts: Any, columns: Any, values: Any, shape: tuple[int, ...], are_ones: bool) -> Padded:
    """Of rows that lie one after the other, each of them with so many columns, and of their values."""
    length = int(xp.max(counts)) if counts.shape[0] else 0
    within = places(xp, xp.cumulative_sum(counts) - counts, counts, length)
    empty, batch = counts[:, None] == 0, (*shape[:-1], length)

    def of_rows(array: Any, fill: int) -> Any:
        return xp.reshape(xp.where(empty, fill, array[within]), batch)

    return Padded(of_rows(columns, -1), None if are_ones else of_rows(values, 0), shape)


def of_coordinates(coordinates: Any, values: Any, shape: tuple[int, ...]) -> Padded:
    """Of NumPy arrays, one for each axis. What is there twice is added."""
    import numpy as np

    *batch, columns = coordinates
    rows = np.ravel_multi_index(batch, shape[:-1]) if batch else np.zeros_like(columns)
    order = np.lexsort((columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    first = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(columns, prepend=-1))
    rows, columns, values = rows[first], columns[first], np.add.reduceat(values, first) if len(first) else values
    are_ones = bool((values == (values != 0)).all())
    if are_ones:  # a 0 that is there is no label
        rows, columns = rows[values != 0], columns[values != 0]
    counts = np.bincount(rows, minlength=math.prod(shape[:-1]))
    return padded(np, counts, columns, values, shape, are_ones)


def is_of_scipy(data: Any) -> bool:
    """Whether this is a sparse array or matrix of SciPy, which is told by its name alone."""
    return _is_named_scipy(type(data))


@constant_in_dynamo  # it cannot trace a method of a name
def _is_named_scipy(kind: type) -> bool:
    return kind.__module__.startswith("scipy.sparse")


def of_scipy(data: Any) -> Padded:
    """A sparse array or matrix of SciPy."""
    coo = data.tocoo()
    coordinates = coo.coords if hasattr(coo, "coords") else (coo.row, coo.col)
    return of_coordinates(coordinates, coo.data, tuple(data.shape))
