"""Any other library that keeps to the array API standard: array-api-strict, CuPy, Dask, …"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import array_api_compat
import numpy as np

from ..backend import Array, Backend
from ..namespace import Extended, Namespace

MODULES = {
    "cupy": "array_api_compat.cupy",
    "dask": "array_api_compat.dask.array",
}  # where the standard's functions are, if not in the library itself
BLOCK = 16


def sum_in_blocks(xp: Any, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """The sum along the last axis, or of all elements, block by block.

    Many libraries add one number after the other, NumPy too across memory. Equal numbers are then rounded in one
    direction for long: a million of them cost three digits.
    """
    x = xp.reshape(x, (math.prod(x.shape),)) if axis is None else x
    while x.shape[-1] > BLOCK:
        blocks = x.shape[-1] // BLOCK
        whole, rest = x[..., : blocks * BLOCK], x[..., blocks * BLOCK :]
        summed = xp.sum(xp.reshape(whole, (*x.shape[:-1], blocks, BLOCK)), axis=-1)
        x = xp.concat([summed, rest], axis=-1)
    return xp.sum(x, axis=-1, keepdims=keepdims)


class _InBlocks(Extended):
    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return sum_in_blocks(self._base, x, axis, keepdims)


class _Dask(Extended):
    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        import dask.array

        # Dask's own fails on blocks without a row: https://github.com/dask/dask/pull/9268
        return dask.array.reduction(x, np.max, np.max, axis=axis, keepdims=keepdims, dtype=x.dtype)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        import dask.array

        return dask.array.reduction(x, _total, _total, axis=axis, keepdims=keepdims, dtype=x.dtype)


def _total(block: Array, axis: Any, keepdims: bool) -> Any:
    # Only along memory it is added pairwise.
    return np.sum(block.astype(block.dtype, order="C", copy=False), axis=axis, keepdims=keepdims)


@functools.cache
def _extended(library: Any) -> Namespace:
    name = library.__name__
    if "dask" in name:
        return _Dask(library)
    return Extended(library) if "cupy" in name else _InBlocks(library)  # a GPU adds in parallel


class ArrayAPIBackend(Backend):
    def __init__(self, name: str) -> None:
        self.name = name
        self.library: Any = importlib.import_module(MODULES.get(name, name))

    def devices(self) -> list[str]:
        return [str(device) for device in self._devices()]

    def device(self, x: Array) -> str:
        return str(array_api_compat.device(x))

    def namespace(self, x: Array) -> Namespace:
        return _extended(array_api_compat.array_namespace(x))

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        return None if array_api_compat.is_array_api_obj(x) else f"{self.name} {type(x).__name__}"

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if like is not None:
            if any(n != n for n in like.shape):
                raise ValueError(f"Expected known lengths: compute_chunk_sizes() finds them. Received: {like.shape}.")
            place = array_api_compat.device(like)
        else:
            place = {str(d): d for d in self._devices()}[device] if device is not None else None
        xp: Any = self.library if like is None else self.namespace(like)
        if array_api_compat.is_array_api_obj(data) and not array_api_compat.is_numpy_array(data):
            return array_api_compat.to_device(data, place)
        if data.dtype.kind in "iu" and data.dtype.itemsize == 8 and not self._holds_int64(place):
            # What does not fit 32 bits must not wrap around to a class that exists.
            data = np.clip(data, -(2**31), 2**31 - 1).astype(np.int32)
        return xp.asarray(data, device=place)

    def to_numpy(self, x: Array) -> Any:
        if array_api_compat.is_dask_array(x):
            return np.asarray(x.compute())
        if array_api_compat.is_cupy_array(x):
            return array_api_compat.to_device(x, "cpu")
        return np.from_dlpack(x)

    def _devices(self) -> list[Any]:
        info = getattr(self.library, "__array_namespace_info__", None)
        return ["cpu"] if info is None else list(info().devices())

    def _holds_int64(self, place: Any) -> bool:
        info = getattr(self.library, "__array_namespace_info__", None)
        return info is None or place is None or "int64" in info().dtypes(device=place)
