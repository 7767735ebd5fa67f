"""NumPy: no autodiff, floating-point warnings kept quiet, ml_dtypes' bfloat16."""

from __future__ import annotations

import functools
import math
import os
import sys
from typing import Any

import numpy as np

from .. import formulas
from ..backend import Array, Backend, dtypes_of
from ..formulas import Linear, Loss, Namespace, Operands, Options
from ..namespace import Extended, Finite
from . import blocks


class _Numpy(Extended):
    """NumPy's own functions, but where they are slow, or lose digits."""

    groups: tuple[str, ...] = ("indexing", "argmax")

    def astype(self, x: Array, dtype: Any, copy: bool = True) -> Array:
        return x.astype(dtype, copy=copy)

    def expand_dims(self, x: Array, axis: int) -> Array:
        return x[..., None] if axis == -1 else np.expand_dims(x, axis)

    def squeeze(self, x: Array, axis: int) -> Array:
        return x[..., 0] if axis == -1 else np.squeeze(x, axis)

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        if axis == -1 and _has_few(x):
            return _by_columns(np.maximum.reduce, x, keepdims)
        return np.maximum.reduce(x, axis=axis, keepdims=keepdims)  # type: ignore[call-overload]  # it is no literal

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        # NumPy adds pairwise only along memory; along other axes it loses a digit for each ten numbers.
        if axis == -1:
            if _has_few(x):
                return _by_columns(_sum_first, x, keepdims)
            x = np.ascontiguousarray(x)
        elif axis is not None:
            total = _sum_first(np.moveaxis(x, axis, 0))
            return np.expand_dims(total, axis) if keepdims else total
        return np.add.reduce(x, axis=axis, keepdims=keepdims)  # type: ignore[call-overload]

    def zeros_like(self, x: Array) -> Array:
        return np.zeros(x.shape, x.dtype)

    def as_index(self, targets: Array, like: Array) -> Array:
        return targets.astype(np.int64, copy=False)

    def take(self, weight: Array, index: Array) -> Array:
        return weight[index]

    def scatter(self, like: Array, index: Array, values: Array) -> Array:
        found = np.zeros(like.shape, like.dtype)
        np.put_along_axis(found, index, values, -1)
        return found

    def scale(self, x: Array, factor: Any) -> Array:
        return np.multiply(x, factor, out=x) if x.ndim else x * factor

    def linear(self, features: Array, weight: Array, bias: Array | None) -> Array:
        x = features @ weight.T
        return x if bias is None else np.add(x, bias, out=x)

    def add_product(self, total: Array | None, x: Array, y: Array) -> Array:
        if total is None:
            return x.T @ y
        step = max(1, (1 << 20) // y.shape[1])  # a product that stays in the cache: new memory takes longer
        for start in range(0, len(total), step):
            total[start : start + step] += x[:, start : start + step].T @ y
        return total

    def position(self, x: Array, index: Array, axis: int) -> tuple[Any, ...]:
        if index.size and index.min() < 0:
            raise IndexError("expected class indices from 0 up")
        index = self.squeeze(index, axis)
        if index.ndim == 1 and axis == -1:
            return np.arange(len(index)), index
        places = list(np.indices(index.shape, sparse=True))
        places.insert(x.ndim + axis, index)
        return tuple(places)

    def take_along_axis(self, x: Array, position: tuple[Any, ...], axis: int) -> Array:
        return self.expand_dims(x[position], axis)

    def put_along_axis(self, x: Array, position: tuple[Any, ...], values: Any, axis: int) -> Array:
        x[position] = values if isinstance(values, float) else self.squeeze(values, axis)
        return x


def _has_few(x: Array) -> bool:
    """Whether the rows are short and many: NumPy reduces one after the other, which takes as long as 20 numbers do."""
    return bool(x.shape[-1] <= 16 and x.size >= 1000)


def _by_columns(reduce: Any, x: Array, keepdims: bool) -> Array:
    """A reduction of the last axis by one of the first."""
    reduced = reduce(np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T))
    return reduced.reshape((*x.shape[:-1], 1) if keepdims else x.shape[:-1])


def _sum_first(x: Array) -> Array:
    """The sum along the first axis, in halves that are added to each other: as exact as pairwise, and as fast."""
    while len(x) > 8:
        half = len(x) // 2
        folded = x[:half] + x[half : 2 * half]
        if len(x) % 2:
            folded[0] += x[-1]
        x = folded
    return np.add.reduce(x, axis=0)


class _Finite(Finite, _Numpy):
    pass


xp: Namespace = _Numpy(np)


def _number_of_threads() -> int:
    """For large arrays, the caller's included: what UNILABEL_NUM_THREADS says, or one for each core."""
    said = os.environ.get("UNILABEL_NUM_THREADS")
    if said is None:
        return os.cpu_count() or 1
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"Expected UNILABEL_NUM_THREADS to be a number of threads from 1 up. Received: {said!r}.")
    return int(said)


_number_of_threads()  # raises now, and not when the first large array comes


@functools.cache
def _helpers() -> blocks.Helpers:
    return blocks.Helpers(_number_of_threads() - 1)


if hasattr(os, "register_at_fork"):  # threads are not forked
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def _each(function: Any, rows: list[Any]) -> Any:
    # The state of floating-point errors belongs to a thread.
    return _helpers().each(np.errstate(all="ignore")(function), rows, with_caller=True)


blockwise = blocks.Blockwise(
    xp,
    _Finite(np),
    lambda shape, x: np.empty(shape, x.dtype),
    lambda x: x.flags.c_contiguous,
    _each,
    lambda x: bool(np.isfinite(x).all()) if x.ndim else math.isfinite(x),
    np.multiply,
    large=1 << 17,
    block=1 << 18,
)
# After a product OpenBLAS's own threads wait for the next one, for a while without rest: another thread gains nothing
# beside them. So large blocks, of few products, are faster.
after_product, TIMES = blockwise._replace(large=1 << 21), 2


class NumpyBackend(Backend):
    name = "numpy"

    def namespace(self, x: Array) -> Namespace:
        return xp

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        ma = sys.modules.get("numpy.ma")  # importing it takes longer than the first loss
        other = isinstance(x, np.matrix) or (ma is not None and isinstance(x, ma.MaskedArray))
        return None if isinstance(x, (np.ndarray, np.generic)) and not other else f"numpy {type(x).__name__}"

    def keeps_axis(self, x: Array) -> bool:
        return True

    def cache_key(self, x: Array, operands: tuple[Any, ...]) -> Any:
        return dtypes_of(np.ndarray, (x, *operands))

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
    # all elements comes as a scalar from NumPy, in the native byte order: an array is the kind that went in.

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(blocks.run(blockwise, formulas.value, loss, options, np.asarray(x), operands)[0], x.dtype)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        with np.errstate(all="ignore"):
            first, second = blocks.run(blockwise, formula, loss, options, np.asarray(x), operands)[0]
            return np.asarray(first, x.dtype), np.asarray(second, x.dtype)

    def linear_closed_form(
        self, loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear
    ) -> tuple[Array, Linear]:
        def run(formula: Any, *call: Any) -> Any:
            return blocks.run(after_product, formula, *call)[0]

        rows = formulas.rows_of_blocks(inputs, TIMES)
        with np.errstate(all="ignore"):
            value, gradients = formulas.in_blocks(xp, run, rows, loss, options, inputs, operands, needed)
            return np.asarray(value, inputs.features.dtype), formulas.rounded(xp, gradients, inputs)

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(super().activation(function, np.asarray(x), half))


backend = NumpyBackend()
