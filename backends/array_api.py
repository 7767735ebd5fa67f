"""Any other library that keeps to the array API standard: array-api-strict, CuPy, Dask, MLX, …"""

from __future__ import annotations

import importlib
from typing import Any

import array_api_compat

from ..backend import Backend
from ..formulas import Array, Namespace


class ArrayAPIBackend(Backend):
    def __init__(self, name: str) -> None:
        self.name = name
        self.install = f"pip install {name}"
        self.library = importlib.import_module(name)

    def devices(self) -> list[str]:
        return [str(device) for device in self._devices()]

    def device(self, x: Array) -> str:
        return str(array_api_compat.device(x))

    def namespace(self, x: Array) -> Namespace:
        return array_api_compat.array_namespace(x)

    def problem(self, x: Array) -> str | None:
        return None if array_api_compat.is_array_api_obj(x) else f"{self.name} {type(x).__name__}"

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if like is not None:
            place = array_api_compat.device(like)
        else:
            place = {str(d): d for d in self._devices()}[device] if device is not None else None
        xp = self.library if like is None else self.namespace(like)
        if array_api_compat.is_array_api_obj(data) and not array_api_compat.is_numpy_array(data):
            return array_api_compat.to_device(data, place)
        return xp.asarray(data, device=place)

    def to_numpy(self, x: Array) -> Any:
        import numpy as np

        return np.from_dlpack(x)

    def _devices(self) -> list[Any]:
        info = getattr(self.library, "__array_namespace_info__", None)
        return ["cpu"] if info is None else list(info().devices())
