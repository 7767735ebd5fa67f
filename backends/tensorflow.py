"""TensorFlow: an array API namespace over tf.*, custom gradients with the closed form, eager calls compiled by XLA."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record

from .. import formulas
from ..backend import Backend
from ..formulas import Array, Loss, Namespace, Operands, Options


def _where(condition: Array, a: Any, b: Any) -> Array:
    dtype = (a if isinstance(a, tf.Tensor) else b).dtype  # the other may be a Python scalar
    return tf.where(condition, tf.convert_to_tensor(a, dtype), tf.convert_to_tensor(b, dtype))


ROW = 4096  # numbers that float32 may add one after the other


def _sum(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    if x.dtype != tf.float32 or (tf.executing_eagerly() and (axis == -1 or x.shape.num_elements() <= 1 << 16)):
        return tf.reduce_sum(x, axis=axis, keepdims=keepdims)
    n = x.shape[-1] if x.shape.rank else None
    if axis is None and n is not None and x.shape.rank > 1 and n <= ROW:
        x = tf.reduce_sum(x, axis=-1)
    if axis != -1 or n is None:
        # TensorFlow loses digits in sums over all elements or along other axes than the last; float64 has more.
        return tf.cast(tf.reduce_sum(tf.cast(x, tf.float64), axis=axis, keepdims=keepdims), tf.float32)
    odd = None
    while n > ROW:  # XLA loses digits in long rows, and float64 takes twice the memory: the halves are added first
        if n % 2:
            odd = x[..., -1:] if odd is None else odd + x[..., -1:]
        n //= 2
        x = x[..., :n] + x[..., n : 2 * n]
    total = tf.reduce_sum(x, axis=-1, keepdims=True)
    total = total if odd is None else total + odd
    return total if keepdims else total[..., 0]


def _position(x: Array, t: Array) -> tuple[Array, Array]:
    """Where each row has its class: to gather it, and as a mask, as replacing by a scatter takes longer."""
    t = tf.cast(t, tf.int32)  # long integers take longer; by now they are class indices
    return t, tf.range(tf.shape(x)[-1]) == tf.expand_dims(t, -1)


def _replace(x: Array, position: tuple[Array, Array], values: Any) -> Array:
    values = tf.zeros_like(x) if isinstance(values, float) else tf.expand_dims(values, -1)
    return tf.where(position[1], values, x)


# The functions of the standard that the formulas use, in the standard's words. Operators are TensorFlow's own.
xp = SimpleNamespace(
    abs=tf.abs,
    as_index=lambda t: tf.cast(t, tf.int64),
    arange=lambda n, device=None: tf.range(tf.cast(n, tf.int64)),
    any=tf.reduce_any,
    astype=lambda x, dtype, copy=True: tf.cast(x, dtype),
    bool=tf.bool,
    exp=tf.exp,
    expand_dims=tf.expand_dims,
    extent=lambda x, axis: tf.shape(x, out_type=tf.int64)[axis],
    float32=tf.float32,
    isfinite=tf.math.is_finite,
    isinf=tf.math.is_inf,
    log=tf.math.log,
    log1p=tf.math.log1p,
    max=tf.reduce_max,
    maximum=tf.maximum,
    multiply=tf.multiply,
    ones_like=tf.ones_like,
    permute_dims=tf.transpose,
    pick=lambda x, position: tf.gather(x, position[0], axis=-1, batch_dims=x.shape.rank - 1),
    position=_position,
    replace=_replace,
    reshape=tf.reshape,
    squeeze=tf.squeeze,
    stop_gradient=tf.stop_gradient,
    sum=_sum,
    take=tf.gather,
    where=_where,
)


EAGER = type(tf.constant(0))


def _on_device_of(x: Array) -> Any:
    """Eager operations go where TensorFlow likes best, not where their input is."""
    return contextlib.nullcontext() if tf.is_symbolic_tensor(x) else tf.device(x.device)


def _fit(array: Array, shape: Array) -> Array:
    """The array, of this shape as it runs, or an error."""
    with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(array), shape)]):
        return tf.reshape(array, shape)  # XLA drops assertions, and does not reshape to another size


def _fitted(options: Options, x: Array, operands: Operands) -> Operands:
    """Operands whose shapes are checked when it runs if they were not known before: nothing must broadcast silently."""
    if x.shape.is_fully_defined():
        return operands

    per_row = tf.shape(x)[:-1]
    targets = _fit(operands.targets, per_row if options.indices else tf.shape(x))
    sample_weight = None if operands.sample_weight is None else _fit(operands.sample_weight, per_row)
    return operands._replace(targets=targets, sample_weight=sample_weight)


def _multiply_to_0(x: Array, y: Array) -> Array:
    return tf.where(tf.math.is_nan(x), x, tf.math.multiply_no_nan(x, y))


# ForwardAccumulator adds to the derivative of x · c what a change of c would make, though c is constant: x · 0, NaN for
# an infinite x. Here 0 times infinity is 0.
forward_xp = SimpleNamespace(**vars(xp) | {"multiply": _multiply_to_0})


def _space(*arrays: Array) -> Namespace:
    """The namespace to compute in: another one if a ForwardAccumulator watches one of these arrays."""
    return forward_xp if forwardprop_util.pack_tangents(list(arrays)).tangents else xp


def _recorded_loss(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    given = operands._asdict()
    moving = {name: array for name, array in given.items() if array is not None and array.dtype.is_floating}
    space = _space(x, *moving.values())
    forward = space is forward_xp  # a ForwardAccumulator sees no custom gradients: it differentiates the expressions

    def put(arrays: Any) -> Operands:
        return Operands(**given | dict(zip(moving, arrays, strict=True)))

    @tf.custom_gradient
    def gradient(x: Array, cotangent: Array, *arrays: Array) -> tuple[Array, Any]:
        def pullback(second: Array) -> list[Array]:
            with _on_device_of(x), tf.GradientTape() as tape:
                copies = [tf.identity(array) for array in (x, cotangent, *arrays)]
                tape.watch(copies)
                again, *others = copies
                first = formulas.gradient(space, loss, options, again, put(others[1:]), others[0], by_autodiff=True)
            seconds: list[Array] = tape.gradient(first, copies, second, unconnected_gradients="zero")
            return seconds

        return formulas.gradient(space, loss, options, x, put(arrays), cotangent, by_autodiff=forward), pullback

    @tf.custom_gradient
    def run(x: Array, *arrays: Array) -> tuple[Array, Any]:
        def pullback(cotangent: Array) -> list[Array]:
            cotangent = tf.convert_to_tensor(cotangent)  # of gathered losses it is tf.IndexedSlices
            with _on_device_of(x):
                gradients = [gradient(x, cotangent, *arrays)]
                if arrays:  # targets and weights: by the plain expression
                    # Copies: they may be the logits themselves.
                    copies = [tf.identity(array) for array in arrays]
                    with tf.GradientTape() as tape:
                        tape.watch(copies)
                        value = formulas.value(space, loss, options, x, put(copies), by_autodiff=True)
                    gradients += tape.gradient(value, copies, cotangent, unconnected_gradients="zero")
            return gradients

        return formulas.value(space, loss, options, x, put(arrays), by_autodiff=forward), pullback

    return run(x, *moving.values())


def _is_eager(x: Array, operands: Operands) -> bool:
    """Whether all have values, and no ForwardAccumulator watches one of them."""
    arrays = [x, *(array for array in operands if array is not None)]
    return (
        tf.executing_eagerly() and not any(tf.is_symbolic_tensor(array) for array in arrays) and _space(*arrays) is xp
    )


# In eager mode TensorFlow runs one operation after the other. A call like a few earlier ones is compiled by XLA, which
# takes a good part of a second: too long for what does not come again, and no longer than to compute large arrays
# once, which would take a lot of memory too.
REPEATED = 3
LARGE = 1 << 22  # elements
_calls: dict[Any, Any] = {}  # how often a call came, or what it was compiled to
_counting = threading.Lock()  # of several threads with the same call, one compiles it


def _eagerly(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands, *more: Array) -> Any:
    """The formula's result, in eager mode, where nothing but the logits' own gradient is asked for."""
    given = [(name, array) for name, array in operands._asdict().items() if array is not None]
    names, arrays = tuple(name for name, _ in given), (x, *(array for _, array in given), *more)
    key = (formula.__name__, loss.name, options, names, *((array.dtype, array.shape) for array in arrays))
    with record.stop_recording(), tf.device(x.device):
        program = _calls.get(key, 0)
        if isinstance(program, int):
            program = _counted(key, formula, loss, options, names, arrays)
        return formula(xp, loss, options, x, operands, *more) if program is None else program(*arrays)


def _counted(key: Any, formula: Any, loss: Loss, options: Options, names: tuple[str, ...], arrays: Any) -> Any:
    """The program for a call that came before, or is for a large array; for another None, and it is counted."""
    with _counting:
        found = _calls.get(key, 0)
        if not isinstance(found, int):
            return found
        if len(_calls) >= 1000:  # shapes that never come again
            _calls.clear()
        if found < REPEATED and arrays[0].shape.num_elements() < LARGE:
            _calls[key] = found + 1
            return None

        @tf.function(autograph=False, jit_compile=True)
        def run(x: Array, *arrays: Array) -> Any:
            operands = Operands(**dict(zip(names, arrays, strict=False)))
            return formula(xp, loss, options, x, operands, *arrays[len(names) :])

        traced = run.get_concrete_function(*arrays)

        def program(*arrays: Array) -> Any:
            # Past its __call__, which fits arguments to a signature: for longer than a small program runs.
            return traced.inference_fn.call_preflattened([*arrays, *traced.captured_inputs])

        _calls[key] = program
        return program


SMALL = 1 << 20  # elements


def _recorded_eagerly(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    """The loss, with its gradient left on the tapes: of a small array computed with it, of a large one when needed."""
    gradient = None
    masked = operands.where is not None or options.ignore_index is not None  # 0 there, whatever the cotangent is
    # Of half precision, the gradient is rounded once, with its cotangent.
    if x.shape.num_elements() < SMALL and options.reduction != "none" and not masked and not options.half:
        value, gradient = _eagerly(formulas.value_and_gradient, loss, options, x, operands)
    else:
        value = _eagerly(formulas.value, loss, options, x, operands)

    def pullback(cotangent: Array) -> list[Array]:
        cotangent = tf.convert_to_tensor(cotangent)
        if not tf.executing_eagerly() or record.could_possibly_record() or tf.is_symbolic_tensor(cotangent):
            return [formulas.gradient(xp, loss, options, x, operands, cotangent, by_autodiff=True)]
        if gradient is not None:
            with tf.device(x.device):
                return [tf.multiply(gradient, cotangent)]
        return [_eagerly(formulas.gradient, loss, options, x, operands, cotangent)]

    record.record_operation("unilabel", [value], [x], pullback)
    return value


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

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        if not isinstance(x, (tf.Tensor, tf.Variable)):
            return f"a tensorflow {type(x).__name__}"
        if tf.is_symbolic_tensor(x) and not tf.compat.v1.executing_eagerly_outside_functions():
            return "a tensor of a tf.compat.v1 graph, where == compares identities"
        return None

    def rankless(self, x: Array) -> bool:
        return x.shape.rank is None

    def rows(self, per_row: bool, x: Array, operands: Operands) -> tuple[Array, Operands, Any, Any]:
        shape = tf.shape(x)
        two = tf.stack([-1, shape[-1]])

        def tensor(data: Any) -> Array:
            return data if isinstance(data, (tf.Tensor, tf.Variable)) else tf.convert_to_tensor(self.read(data))

        def full(data: Any) -> Array:
            return None if data is None else tf.reshape(tf.broadcast_to(tensor(data), shape), two)

        def each(data: Any) -> Array:
            return None if data is None else tf.reshape(_fit(tensor(data), shape[:-1]), [-1])

        if per_row:  # integers are class indices, though they might be distributions if the rank were known
            indices = operands.targets is not None and tensor(operands.targets).dtype.is_integer
            targets, weight = each(operands.targets) if indices else None, operands.weight
        else:
            indices, weight = False, full(operands.weight)
        if not indices and operands.targets is not None:
            targets = tf.reshape(_fit(tensor(operands.targets), shape), two)
        operands = Operands(
            targets, weight, full(operands.pos_weight), each(operands.sample_weight), full(operands.where)
        )

        def finish(losses: Array) -> Array:
            return tf.reshape(losses, shape[:-1] if per_row else shape)

        return tf.reshape(x, two), operands, lambda array: tf.reshape(array, shape), finish

    def settled(self, x: Array, targets: Any) -> Any:
        if type(x) is not EAGER or type(targets) is not EAGER:
            return None
        return x.dtype, targets.dtype

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if device is not None:
            with tf.device(device):
                return tf.identity(tf.convert_to_tensor(data))
        x = tf.convert_to_tensor(data)
        # TensorFlow compares and casts few of the integer types.
        odd = x.dtype.is_integer and x.dtype not in (tf.int32, tf.int64)
        return tf.cast(x, tf.int64) if like is not None and odd else x

    def cast(self, x: Array, dtype: str) -> Array:
        return tf.cast(x, dtype)

    def to_numpy(self, x: Array) -> Any:
        if tf.is_symbolic_tensor(x):
            raise ValueError("Expected values to read. Received: a tensor of a tf.function, which has none yet.")
        return np.asarray(tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x)

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        x = tf.convert_to_tensor(x)
        if _is_eager(x, operands):
            if not record.could_possibly_record():
                return _eagerly(formulas.value, loss, options, x, operands)
            others = [array for array in operands if array is not None and array.dtype.is_floating]
            if not (others and record.should_record_backprop(others)):
                return _recorded_eagerly(loss, options, x, operands)
        with _on_device_of(x):
            return _recorded_loss(loss, options, x, _fitted(options, x, operands))

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        x = tf.convert_to_tensor(x)
        if _is_eager(x, operands):
            return tuple(_eagerly(formula, loss, options, x, operands))
        with _on_device_of(x):
            return super().closed_form(formula, loss, options, x, _fitted(options, x, operands))

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        x = tf.convert_to_tensor(x)
        with _on_device_of(x):
            return formulas.activation(_space(x), function, x, half, by_autodiff=True)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x, cotangent)


backend = TensorflowBackend()
