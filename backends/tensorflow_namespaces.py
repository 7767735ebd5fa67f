"""TensorFlow's namespaces: functions of the array API standard over tf.*, right to the last digits and where x is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tensorflow as tf

from ..backend import Array
from ..formulas import Namespace
from ..namespace import Extended

SHORT = 128  # numbers: for so few, tf.reduce_sum is accurate enough
PARTS = 8


def _sum(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    """The sum along the last axis, or of all elements, without the digits that are lost in long rows.

    TensorFlow and XLA add the numbers of a row one after the other, or a few in turn, and of a million equal ones lose
    up to four digits. So the eighths of a row are added to each other, which makes it an eighth as long: in float32
    once, as float64 has digits enough for the rest, in float64 again and again. (XLA would undo a reshape to short
    rows; float64 from the start takes more time and memory.) All elements are not made one row, if it can be helped:
    XLA would divide each place in it by the number of classes to find what is broadcast.
    """
    n = x.shape.num_elements() if axis is None else x.shape[-1]
    if n is not None and n <= SHORT:
        return tf.reduce_sum(x, axis=axis, keepdims=keepdims)
    if axis is None and n is None:
        x = tf.reshape(x, [-1])
    rounds = 1 if x.dtype == tf.float32 else 4 if n is None else math.ceil(math.log(n / PARTS, PARTS))
    for _ in range(rounds):
        of = -1 if n is None or axis is not None else max(range(x.shape.rank), key=lambda i: x.shape[i])
        length = tf.shape(x)[-1] if x.shape[of] is None else x.shape[of]
        *parts, rest = tf.split(x, [length // PARTS] * PARTS + [length % PARTS], axis=of)
        x = tf.concat([tf.add_n(parts), rest], axis=of)
    return tf.cast(tf.reduce_sum(tf.cast(x, tf.float64), axis=axis, keepdims=keepdims), x.dtype)


def on_device_of(x: Array) -> Any:
    """A context that places eager operations on x's device: TensorFlow would choose one itself."""
    return contextlib.nullcontext() if tf.is_symbolic_tensor(x) else tf.device(x.device)


def _on_device(function: Callable[[Array], Array], inverse: Callable[[Array], Array], x: Array) -> Array:
    """function(x), which rearranges x, on x's device, and its gradient there too: TensorFlow's own would choose."""
    with on_device_of(x):
        if tf.is_symbolic_tensor(x) or len(tf.config.list_logical_devices()) == 1:
            return function(x)
        recorded = tf.custom_gradient(
            lambda x: (function(x), lambda cotangent: _on_device(inverse, function, cotangent))
        )
        return recorded(tf.convert_to_tensor(x))


# The functions of the standard that the formulas use, in the standard's words. Operators are TensorFlow's own.
STANDARD = SimpleNamespace(
    abs=tf.abs,
    any=tf.reduce_any,
    bool=tf.bool,
    broadcast_to=tf.broadcast_to,
    exp=tf.exp,
    expand_dims=tf.expand_dims,
    float32=tf.float32,
    isinf=tf.math.is_inf,
    log=tf.math.log,
    log1p=tf.math.log1p,
    logical_and=tf.logical_and,
    logical_or=tf.logical_or,
    matmul=tf.matmul,
    max=tf.reduce_max,
    maximum=tf.maximum,
    multiply=tf.multiply,
    ones_like=tf.ones_like,
    squeeze=tf.squeeze,
    stop_gradient=tf.stop_gradient,
    sum=_sum,
    zeros_like=tf.zeros_like,
)


class _Standard(Extended):
    """Where nothing is differentiated."""

    groups: tuple[str, ...] = ("indexing",)
    take = staticmethod(tf.gather)

    def arange(self, n: Any, device: Any = None) -> Array:
        return tf.range(tf.cast(n, tf.int64))

    def astype(self, x: Array, dtype: Any, copy: bool = True) -> Array:
        return tf.cast(x, dtype)

    def extent(self, x: Array, axis: int) -> Array:
        n = x.shape[axis]
        return tf.shape(x, out_type=tf.int64)[axis] if n is None else n

    def linear(self, features: Array, weight: Array, bias: Array | None) -> Array:
        x = tf.matmul(features, weight, transpose_b=True)
        return x if bias is None else x + bias

    def add_product(self, total: Array | None, x: Array, y: Array) -> Array:
        product = tf.matmul(x, y, transpose_a=True)
        return product if total is None else total + product

    def permute_dims(self, x: Array, axes: tuple[int, ...]) -> Array:
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return _on_device(lambda x: tf.transpose(x, axes), lambda y: tf.transpose(y, order), x)

    def reshape(self, x: Array, shape: Any) -> Array:
        return _on_device(lambda x: tf.reshape(x, shape), lambda y: tf.reshape(y, x.shape), x)

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        dtype = (a if isinstance(a, tf.Tensor) else b).dtype  # the other may be a Python scalar
        return tf.where(condition, tf.convert_to_tensor(a, dtype), tf.convert_to_tensor(b, dtype))

    def as_index(self, targets: Array, like: Array) -> Array:
        return tf.cast(targets, tf.int64)

    # The class axis is always the last here.

    def position(self, x: Array, index: Array, axis: int) -> tuple[Array, Array]:
        """An index to gather with, and a mask, as a scatter takes longer."""
        index = tf.cast(index, tf.int32)  # long integers take longer; by now they are class indices
        return index, tf.range(tf.shape(x)[-1]) == index

    def take_along_axis(self, x: Array, position: tuple[Array, Array], axis: int) -> Array:
        return tf.gather(x, position[0], axis=-1, batch_dims=x.shape.rank - 1)

    def put_along_axis(self, x: Array, position: tuple[Array, Array], values: Any, axis: int) -> Array:
        return self.where(position[1], values, x)

    def scatter(self, like: Array, index: Array, values: Array) -> Array:
        values = tf.reshape(tf.broadcast_to(values, tf.shape(index)), [-1])
        size = like.shape.num_elements()
        # tf.vectorized_map can scatter by int32 alone.
        dtype = tf.int32 if size is not None and size < 1 << 31 else tf.int64
        index, (n, classes) = tf.cast(index, dtype), (tf.size(index, dtype), tf.shape(like, dtype)[-1])
        n //= tf.shape(index, dtype)[-1]
        places = tf.reshape(index, [n, -1]) + classes * tf.range(n)[:, None]  # in all rows, one after the other
        found = tf.zeros([n * classes], values.dtype)  # of booleans, as a scatter's result is in memory
        found = tf.tensor_scatter_nd_update(found, tf.reshape(places, [-1, 1]), values)
        return tf.cast(tf.reshape(found, tf.shape(like)), like.dtype)


class _Differentiable(_Standard):
    groups = ("autodiff",)


class _Forward(_Differentiable):
    """Where a ForwardAccumulator watches.

    It adds to the derivative of x · c what a change of c would make, though c is constant: x · 0, NaN for an infinite
    x. Here 0 times infinity is 0.
    """

    def multiply(self, x: Array, y: Array) -> Array:
        return tf.where(tf.math.is_nan(x), x, tf.math.multiply_no_nan(x, y))


standard: Namespace = _Standard(STANDARD)
differentiable: Namespace = _Differentiable(STANDARD)
forward: Namespace = _Forward(STANDARD)
