"""TensorFlow: an array API namespace over tf.*, and one flat custom gradient with the closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from .. import formulas
from ..backend import Backend
from ..formulas import Array, Loss, Namespace, Operands, Options


def _where(condition: Array, a: Any, b: Any) -> Array:
    dtype = (a if isinstance(a, tf.Tensor) else b).dtype  # the other may be a Python scalar
    return tf.where(condition, tf.convert_to_tensor(a, dtype), tf.convert_to_tensor(b, dtype))


# The functions of the standard that the formulas use, in the standard's words. Operators are TensorFlow's own.
xp = SimpleNamespace(
    arange=lambda n, device=None: tf.range(tf.cast(n, tf.int64)),
    argmax=tf.argmax,
    any=tf.reduce_any,
    astype=lambda x, dtype, copy=True: tf.cast(x, dtype),
    bool=tf.bool,
    exp=tf.exp,
    expand_dims=tf.expand_dims,
    extent=lambda x, axis: tf.shape(x)[axis],
    float32=tf.float32,
    isfinite=tf.math.is_finite,
    isinf=tf.math.is_inf,
    isnan=tf.math.is_nan,
    log=tf.math.log,
    log1p=tf.math.log1p,
    max=tf.reduce_max,
    ones_like=tf.ones_like,
    permute_dims=tf.transpose,
    reshape=tf.reshape,
    squeeze=tf.squeeze,
    stop_gradient=tf.stop_gradient,
    sum=tf.reduce_sum,
    where=_where,
)


class TensorflowBackend(Backend):
    name = "tensorflow"
    install = "pip install tensorflow"
    autodiff = True

    def devices(self) -> list[str]:
        return [device.name for device in tf.config.list_logical_devices() if device.device_type in ("CPU", "GPU")]

    def device(self, x: Array) -> str:
        return "/device:" + str(x.device).rpartition("device:")[2]

    def namespace(self, x: Array) -> Namespace:
        return xp

    def problem(self, x: Array) -> str | None:
        return None if isinstance(x, (tf.Tensor, tf.Variable)) else f"a tensorflow {type(x).__name__}"

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if device is not None:
            with tf.device(device):
                return tf.identity(tf.convert_to_tensor(data))
        x = tf.convert_to_tensor(data)
        # TensorFlow compares and casts few of the integer types.
        return tf.cast(x, tf.int64) if like is not None and x.dtype.is_integer else x

    def cast(self, x: Array, dtype: str) -> Array:
        return tf.cast(x, dtype)

    def to_numpy(self, x: Array) -> Any:
        if tf.is_symbolic_tensor(x):
            raise ValueError("Expected values to read. Received: a tensor of a tf.function, which has none yet.")
        return np.asarray(tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x)

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        given = operands._asdict()
        moving = {name: array for name, array in given.items() if array is not None and array.dtype.is_floating}

        @tf.custom_gradient
        def run(x: Array, *arrays: Array) -> tuple[Array, Any]:
            def put(arrays: Any) -> Operands:
                return Operands(**given | dict(zip(moving, arrays, strict=True)))

            def pullback(cotangent: Array) -> list[Array]:
                gradients = [formulas.gradient(xp, loss, options, x, put(arrays), cotangent)]
                if arrays:  # targets and weights: by the plain expression. Copies: they may be the logits themselves
                    copies = [tf.identity(array) for array in arrays]
                    with tf.GradientTape() as tape:
                        tape.watch(copies)
                        value = formulas.value(xp, loss, options, x, put(copies))
                    gradients += tape.gradient(value, copies, cotangent, unconnected_gradients="zero")
                return gradients

            return formulas.value(xp, loss, options, x, put(arrays), by_autodiff=True), pullback

        return run(tf.convert_to_tensor(x), *moving.values())

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        return super().closed_form(formula, loss, options, tf.convert_to_tensor(x), operands)

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        return super().activation(function, tf.convert_to_tensor(x), half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x, cotangent)


backend = TensorflowBackend()
