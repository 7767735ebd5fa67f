"""NumPy: no autodiff, floating-point warnings kept quiet, ml_dtypes' bfloat16."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import array_api_compat.numpy as compat
import numpy as np

from ..backend import Backend, Extended
from ..formulas import Array, Loss, Namespace, Operands, Options
from . import tiles


def _sum(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    # NumPy adds pairwise only along memory; along other axes it loses a digit for each ten numbers.
    return np.sum(np.ascontiguousarray(x) if axis == -1 else x, axis=axis, keepdims=keepdims)


xp = Extended(compat, sum=_sum)


@functools.cache
def _pool() -> ThreadPoolExecutor | None:
    """The threads for large arrays: UNILABEL_NUM_THREADS of them, or one for each core; None for one."""
    count = int(os.environ.get("UNILABEL_NUM_THREADS", 0)) or (os.cpu_count() or 1)
    return ThreadPoolExecutor(count, "unilabel") if count > 1 else None


if hasattr(os, "register_at_fork"):  # threads are not forked
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _each(function: Any, rows: list[slice]) -> Any:
    pool = _pool()
    if pool is None:
        return map(function, rows)

    def quietly(rows: slice) -> Any:
        with np.errstate(all="ignore"):  # which belongs to a thread
            return function(rows)

    return pool.map(quietly, rows)


machine = tiles.Machine(
    xp,
    lambda shape, x: np.empty(shape, x.dtype),
    lambda x: x.flags.c_contiguous,
    _each,
)


class NumpyBackend(Backend):
    name = "numpy"
    install = "pip install numpy"

    def namespace(self, x: Array) -> Namespace:
        return xp

    def problem(self, x: Array) -> str | None:
        plain = isinstance(x, (np.ndarray, np.generic)) and not isinstance(x, (np.matrix, np.ma.MaskedArray))
        return None if plain else f"numpy {type(x).__name__}"

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        return np.asarray(data)

    def cast(self, x: Array, dtype: str) -> Array:
        if dtype == "bfloat16":
            import ml_dtypes

            return np.asarray(x).astype(ml_dtypes.bfloat16)
        return np.asarray(x).astype(dtype)

    def to_numpy(self, x: Array) -> Any:
        return np.asarray(x)

    # Infinities and zeros are right inputs here; what they raise inside a formula is no news to the caller. A sum of
    # all elements comes as a scalar from NumPy: an array is the kind that went in.

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(tiles.value(machine, loss, options, np.asarray(x), operands))

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        with np.errstate(all="ignore"):
            return tuple(map(np.asarray, tiles.closed_form(machine, formula, loss, options, np.asarray(x), operands)))

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(super().activation(function, np.asarray(x), half))


backend = NumpyBackend()
