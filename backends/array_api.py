"""Any other library that keeps to the array API standard: array-api-strict, CuPy, Dask, …"""

from __future__ import annotations

import importlib
from typing import Any

import array_api_compat
import numpy as np

from ..backend import Backend, Extended
from ..formulas import Array, Namespace

MODULES = {"cupy": "array_api_compat.cupy"}  # where the standard's functions are, if not in the library itself


def _dask() -> Namespace:
    import array_api_compat.dask.array as compat
    import dask.array

    def maximum(x: Array, axis: int, keepdims: bool = False) -> Array:
        # Dask's own fails on blocks without a row: https://github.com/dask/dask/pull/9268
        return dask.array.reduction(x, np.max, np.max, axis=axis, keepdims=keepdims, dtype=x.dtype)

    return Extended(compat, max=maximum)


class ArrayAPIBackend(Backend):
    def __init__(self, name: str) -> None:
        self.name = name
        self.install = f"pip install {name}"
        self.library = _dask() if name == "dask" else importlib.import_module(MODULES.get(name, name))

    def devices(self) -> list[str]:
        return [str(device) for device in self._devices()]

    def device(self, x: Array) -> str:
        return str(array_api_compat.device(x))

    def namespace(self, x: Array) -> Namespace:
        return self.library if self.name == "dask" else array_api_compat.array_namespace(x)

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        return None if array_api_compat.is_array_api_obj(x) else f"{self.name} {type(x).__name__}"

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if like is not None:
            if any(n != n for n in like.shape):
                raise ValueError(f"Expected known lengths: compute_chunk_sizes() finds them. Received: {like.shape}.")
            place = array_api_compat.device(like)
        else:
            place = {str(d): d for d in self._devices()}[device] if device is not None else None
        xp = self.library if like is None else self.namespace(like)
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
