"""NumPy: no autodiff, floating-point warnings kept quiet, ml_dtypes' bfloat16."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as compat
import numpy as np

from ..backend import Backend, Extended
from ..formulas import Array, Loss, Namespace, Operands, Options


def _sum(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    # NumPy adds pairwise only along memory; along other axes it loses a digit for each ten numbers.
    return np.sum(np.ascontiguousarray(x) if axis == -1 else x, axis=axis, keepdims=keepdims)


xp = Extended(compat, sum=_sum)


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
            return np.asarray(super().loss(loss, options, np.asarray(x), operands))

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        with np.errstate(all="ignore"):
            return tuple(map(np.asarray, super().closed_form(formula, loss, options, np.asarray(x), operands)))

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(super().activation(function, np.asarray(x), half))


backend = NumpyBackend()
