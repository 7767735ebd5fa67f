"""MLX: a custom function with the closed-form gradient; exp and sums that keep their digits."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from typing import Any

import mlx.core as mx
import numpy as np

from .. import formulas
from ..backend import Array, Backend
from ..formulas import Linear, Loss, Namespace, Operands, Options
from ..namespace import Extended
from .array_api import sum_in_blocks


@mx.custom_function
def _exp(x: Array) -> Array:
    """exp of numbers up to 0, which are all that the formulas ask for.

    On CPUs MLX's own loses six bits in float32, and more than half of them in float64; its expm1 loses none.
    https://github.com/ml-explore/mlx/issues/1341 https://github.com/ml-explore/mlx/issues/3047
    """
    low = 708.0 if x.dtype == mx.float64 else 87.0
    far = x < -low  # there exp(-x) overflows, or 1 over it is subnormal
    e = 1 / (1 + mx.expm1(-mx.where(far, x + low, x)))
    return mx.where(far, math.exp(-low) * e, e)


@_exp.vjp
def _exp_vjp(x: Array, cotangent: Array, value: Array) -> Array:
    return cotangent * _exp(x)  # of the quotient above it would square the overflow


@_exp.jvp
def _exp_jvp(x: Array, tangent: Array) -> Array:
    return tangent * _exp(x)


class _Standard(Extended):
    bool = mx.bool_
    exp: Any = staticmethod(_exp)

    # Else MLX computes all products first, and then holds them. No number is below -inf, nor is NaN: x stays as it is.
    # (Transforms do not go through mx.depends.)
    def after(self, x: Array, earlier: list[Array]) -> Array:
        for array in earlier:
            never = mx.reshape(array, (-1,))[:1] < -math.inf
            x = mx.where(never, 0, x)
        return x

    # In 64 bits: a class index that 32 do not hold must not wrap around to a class that exists.
    def arange(self, n: int, device: Any = None) -> Array:
        return mx.arange(n, dtype=mx.int64)

    def astype(self, x: Array, dtype: Any, copy: Any = True) -> Array:
        return x.astype(dtype)

    # On CPUs MLX adds one number after the other: https://github.com/ml-explore/mlx/issues/4379
    def sum(self, x: Array, axis: int | None = None, keepdims: Any = False) -> Array:
        return sum_in_blocks(mx, x, axis, keepdims)


class _Differentiable(_Standard):
    groups: tuple[str, ...] = ("autodiff",)


standard: Namespace = _Standard(mx)
differentiable: Namespace = _Differentiable(mx)


class MlxBackend(Backend):
    name = "mlx"
    autodiff = True

    def version(self) -> str:
        return importlib.metadata.version("mlx")

    # Arrays are on no device: all devices share their memory, and each operation is told where to run.

    def devices(self) -> list[str]:
        return [str(mx.default_device())]

    def device(self, x: Array) -> str:
        return str(mx.default_device())

    def namespace(self, x: Array) -> Namespace:
        return standard

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        return None if isinstance(x, mx.array) else f"mlx {type(x).__name__}"

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if isinstance(data, mx.array):
            return data
        # MLX makes float32 of NumPy's float64, unless told, and takes no foreign byte order.
        data = data.astype(data.dtype.newbyteorder("="), copy=False)
        return mx.array(data, dtype=mx.bool_ if data.dtype == bool else getattr(mx, data.dtype.name))

    def to_numpy(self, x: Array) -> Any:
        try:
            mx.eval(x)
        except ValueError:
            text = "Expected values to read. Received: an array that MLX traces, which has none yet."
            raise ValueError(text) from None
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        given = {name: array for name, array in operands._asdict().items() if array is not None}

        def put(arrays: Any) -> Operands:
            return Operands(**dict(zip(given, arrays, strict=True)))

        @mx.custom_function
        def run(x: Array, *arrays: Array) -> Array:
            return formulas.value(differentiable, loss, options, x, put(arrays))

        @run.vjp
        def pullback(primals: Any, cotangent: Array, _: Array) -> list[Array]:
            x, *arrays = primals

            # Targets and weights: by autodiff of the value.
            def of_operands(*arrays: Array) -> Array:
                return formulas.value(standard, loss, options, x, put(arrays))

            first = formulas.gradient(differentiable, loss, options, x, put(arrays), cotangent)
            return [first, *_by_autodiff(of_operands, arrays, cotangent)]

        return run(x, *given.values())

    def linear_loss(self, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
        given = {name: array for name, array in (inputs._asdict() | operands._asdict()).items() if array is not None}

        def put(arrays: Any) -> tuple[Linear, Operands]:
            named = dict(zip(given, arrays, strict=True))
            layer = Linear(**{name: named.pop(name) for name in Linear._fields if name in named})
            return layer, Operands(**named)

        @mx.custom_function
        def run(*arrays: Array) -> Array:
            return Backend.linear_loss(self, loss, options, *put(arrays))

        @run.vjp
        def pullback(primals: Any, cotangent: Array, _: Array) -> list[Array]:
            inputs, operands = put(primals)
            needed = Linear(*(array is not None for array in inputs))
            unreduced = options.reduction == "none"
            call = loss, options, inputs, operands, needed, cotangent if unreduced else None
            rows = formulas.rows_of_blocks(inputs)
            _, found = formulas.in_blocks(differentiable, formulas.directly(differentiable), rows, *call)
            if not unreduced:
                found = Linear(*(None if a is None else formulas.scaled(standard, a, cotangent) for a in found))
            layer = [array for array in formulas.rounded(standard, found, inputs) if array is not None]

            # Targets and weights: by autodiff of the value.
            def of_operands(*arrays: Array) -> Array:
                value = functools.partial(formulas.value, standard)
                return formulas.expression(standard, value, loss, options, *put([*primals[: len(layer)], *arrays]))

            return [*layer, *_by_autodiff(of_operands, primals[len(layer) :], cotangent)]

        return run(*given.values())

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        return formulas.activation(differentiable, function, x, half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        (value,), (gradient,) = mx.vjp(function, [x], [cotangent])
        return value, gradient


def _by_autodiff(function: Any, arrays: Any, cotangent: Array) -> list[Array]:
    """The derivatives of a function by its arrays, times a cotangent: 0 by integers, through which MLX cannot go."""
    moved = [i for i, array in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]

    def run(*some: Array) -> Array:
        every = dict(enumerate(arrays)) | dict(zip(moved, some, strict=True))
        return function(*every.values())

    found = mx.vjp(run, [arrays[i] for i in moved], [cotangent])[1] if moved else []
    gradients = dict(zip(moved, found, strict=True))
    return [gradients[i] if i in gradients else mx.zeros_like(array) for i, array in enumerate(arrays)]


backend = MlxBackend()
