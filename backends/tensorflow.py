"""TensorFlow: custom gradients with the closed form; eager calls that come again are compiled by XLA."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import tensorflow as tf

from .. import formulas
from ..backend import Array, Backend, dtypes_of, type_name
from ..formulas import NOTHING, Linear, Loss, Namespace, Operands, Options
from ..sparse import Padded
from . import tensorflow_linear, tensorflow_sparse
from .tensorflow_internals import internals
from .tensorflow_namespaces import differentiable, forward, on_device_of, standard

with tf.init_scope():  # this may be imported within a tf.function
    EAGER = type(tf.constant(0))


def _fit(array: Array, shape: Array) -> Array:
    """The array, of this shape as it runs, or an error."""
    with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(array), shape)]):
        # XLA drops assertions; and Grappler a reshape to a shape that it knows, with the assertion. There is no slice
        # of what is shorter, and no reshape of what is longer.
        array = tf.slice(array, tf.zeros_like(shape), tf.maximum(shape, tf.shape(array)))
    return tf.reshape(array, shape)


def _fitted(loss: Loss, options: Options, x: Array, operands: Operands) -> Operands:
    """Operands whose shapes are checked when it runs if they were not known before: nothing must broadcast silently."""
    shape = tf.shape(x)
    whole = shape
    if options.positives:
        whole = tf.concat([shape[:-1], tf.shape(operands.targets)[-1:]], 0)
    wanted = {
        "targets": shape[:-1] if options.indices else whole,
        "values": whole,
        "sample_weight": shape[:-1],
        "label_smoothing": shape[:0],
    }
    if loss.per_example:  # else these broadcast
        wanted |= {"weight": shape[-1:], "where": shape}
    fitted = {}
    for name, array in operands._asdict().items():
        if array is None or array.shape.rank == 0 or (array.shape.is_fully_defined() and x.shape.is_fully_defined()):
            continue
        fitted[name] = _fit(array, wanted[name]) if name in wanted else tf.broadcast_to(array, shape)
    return operands._replace(**fitted)


def _recorded_loss(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    given = operands._asdict()
    floating = {name: array for name, array in given.items() if array is not None and array.dtype.is_floating}
    # A ForwardAccumulator sees no custom gradients: it differentiates the expressions.
    watched = internals.has_tangents((x, *floating.values()))
    closed, derived = (forward, forward) if watched else (standard, differentiable)

    def put(arrays: Any) -> Operands:
        return Operands(**given | dict(zip(floating, arrays, strict=True)))

    @tf.custom_gradient
    def gradient(x: Array, cotangent: Array, *arrays: Array) -> tuple[Array, Any]:
        def pullback(second: Array) -> list[Array]:
            with on_device_of(x), tf.GradientTape() as tape:
                copies = [tf.identity(array) for array in (x, cotangent, *arrays)]
                tape.watch(copies)
                again, *others = copies
                first = formulas.gradient(derived, loss, options, again, put(others[1:]), others[0])
            seconds: list[Array] = tape.gradient(first, copies, second, unconnected_gradients="zero")
            return seconds

        return formulas.gradient(closed, loss, options, x, put(arrays), cotangent), pullback

    @tf.custom_gradient
    def run(x: Array, *arrays: Array) -> tuple[Array, Any]:
        def pullback(cotangent: Array) -> list[Array]:
            cotangent = tf.convert_to_tensor(cotangent)  # of gathered losses it is tf.IndexedSlices
            with on_device_of(x):
                gradients = [gradient(x, cotangent, *arrays)]
                if arrays:  # targets and weights: by autodiff of the differentiable expression
                    # Copies: they may be the logits themselves.
                    copies = [tf.identity(array) for array in arrays]
                    with tf.GradientTape() as tape:
                        tape.watch(copies)
                        value = formulas.value(derived, loss, options, x, put(copies))
                    gradients += tape.gradient(value, copies, cotangent, unconnected_gradients="zero")
            return gradients

        return formulas.value(closed, loss, options, x, put(arrays)), pullback

    return run(x, *floating.values())


def _is_eager(x: Array, operands: tuple[Any, ...]) -> bool:
    """Whether all have values, no ForwardAccumulator watches them, and tapes can be kept from recording."""
    arrays = [x, *(array for array in operands if array is not None)]
    return (
        tf.executing_eagerly()
        and not any(tf.is_symbolic_tensor(array) for array in arrays)
        and not internals.has_tangents(arrays)
        and internals.can_pause()
    )


# In eager mode TensorFlow runs one operation after the other. XLA compiles in a good part of a second: that pays for a
# call that comes again and again, and for large arrays, which eager operations would take as long for, and much memory.
REPEATED = 3
LARGE = 1 << 22  # elements
_programs: dict[Any, Any] = {}  # how often a call has come, or its compiled program
_compile_lock = threading.Lock()  # of several threads with the same call, one compiles it


def _run_cached(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands, *more: Array) -> Any:
    """The formula's result in eager mode, by a compiled program if the call has come a few times."""
    given = [(name, array) for name, array in operands._asdict().items() if array is not None]
    names, arrays = tuple(name for name, _ in given), (x, *(array for _, array in given), *more)
    key = (formula.__name__, loss.name, options, names, *((array.dtype, array.shape) for array in arrays))
    with internals.pause(), tf.device(x.device):
        program = _programs.get(key, 0)
        if isinstance(program, int):
            size = max(array.shape.num_elements() for array in arrays)
            if formula.__name__.startswith("linear"):  # of features and weight
                size = max(size, x.shape[0] * more[0].shape[0])  # their logits
            program = _compile_if_repeated(key, formula, loss, options, names, arrays, size >= LARGE)
        return formula(standard, loss, options, x, operands, *more) if program is None else program(*arrays)


def _compile_if_repeated(
    key: Any, formula: Any, loss: Loss, options: Options, names: tuple[str, ...], arrays: Any, large: bool
) -> Any:
    """The program of a call that has come a few times, or is large; else None, and the call is counted."""
    with _compile_lock:
        found = _programs.get(key, 0)
        if not isinstance(found, int):
            return found
        if len(_programs) >= 1000:  # shapes that never come again
            _programs.clear()
        if found < REPEATED and not large:
            _programs[key] = found + 1
            return None

        @tf.function(autograph=False, jit_compile=True)
        def run(x: Array, *arrays: Array) -> Any:
            operands = Operands(**dict(zip(names, arrays, strict=False)))
            return formula(standard, loss, options, x, operands, *arrays[len(names) :])

        _programs[key] = program = internals.program(run.get_concrete_function(*arrays))
        return program


def _linear(
    loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Array | None = None
) -> tuple[Array | None, Linear]:
    """The reduced loss of the last linear layer's logits, and gradients in the compute dtype; not for tapes to see."""
    if not _is_eager(inputs.features, (*operands, *inputs[1:], cotangent)):
        return tensorflow_linear.in_loop(loss, options, inputs, operands, needed, cotangent)
    names = tuple(name for name, array in (*inputs._asdict().items(), ("cotangent", cotangent)) if array is not None)
    formula = tensorflow_linear.formula(names, needed, formulas.most_rows(inputs))
    more = (array for array in (*inputs[1:], cotangent) if array is not None)
    found = iter(_run_cached(formula, loss, options, inputs.features, operands, *more))
    value = next(found) if cotangent is None else None
    return value, Linear(*(next(found) if need else None for need in needed))


SMALL = 1 << 20  # elements


def _recorded_eagerly(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    """The loss, with its gradient left on the tapes: of a small array computed with it, of a large one when needed."""
    gradient = None
    masked = operands.where is not None or options.ignore_index is not None  # 0 there, whatever the cotangent is
    # Of half precision, the gradient is rounded once, with its cotangent.
    if x.shape.num_elements() < SMALL and options.reduction != "none" and not masked and not options.half:
        value, gradient = _run_cached(formulas.value_and_gradient, loss, options, x, operands)
    else:
        value = _run_cached(formulas.value, loss, options, x, operands)

    def pullback(cotangent: Array) -> list[Array]:
        cotangent = tf.convert_to_tensor(cotangent)
        if not tf.executing_eagerly() or internals.is_recording() or tf.is_symbolic_tensor(cotangent):
            return [formulas.gradient(differentiable, loss, options, x, operands, cotangent)]
        if gradient is not None:
            with tf.device(x.device):
                return [tf.multiply(gradient, cotangent)]
        return [_run_cached(formulas.gradient, loss, options, x, operands, cotangent)]

    return internals.recorded(value, x, pullback)


class TensorflowBackend(Backend):
    name = "tensorflow"
    autodiff = True

    def devices(self) -> list[str]:
        return [device.name for device in tf.config.list_logical_devices() if device.device_type in ("CPU", "GPU")]

    def device(self, x: Array) -> str:
        return "/device:" + str(x.device).rpartition("device:")[2]

    def namespace(self, x: Array) -> Namespace:
        return standard

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        if not isinstance(x, (tf.Tensor, tf.Variable)):
            return f"a tensorflow {type_name(x)}"
        if tf.is_symbolic_tensor(x) and not tf.compat.v1.executing_eagerly_outside_functions():
            return "a tensor of a tf.compat.v1 graph, where == compares identities"
        return None

    def rankless(self, x: Array) -> bool:
        return x.shape.rank is None

    def rows(
        self, per_example: bool, x: Array, operands: Operands | None, positives: bool = False
    ) -> tuple[Array, Any, Any, Any]:
        shape = tf.shape(x)
        two = tf.stack([-1, shape[-1]])

        def finish(losses: Array) -> Array:
            return tf.reshape(losses, shape[:-1] if per_example else shape)

        def restore(array: Array) -> Array:
            return tf.reshape(array, shape)

        if operands is None:
            return tf.reshape(x, two), None, restore, finish

        def tensor(data: Any) -> Array:
            return data if isinstance(data, (tf.Tensor, tf.Variable)) else tf.convert_to_tensor(self.read(data))

        def full(data: Any) -> Any:
            return None if data is None else tf.reshape(tf.broadcast_to(tensor(data), shape), two)

        def each(data: Any) -> Any:
            return None if data is None else tf.reshape(_fit(tensor(data), shape[:-1]), [-1])

        def labels(data: Any) -> Any:
            if data is None:
                return None
            own = tf.shape(tensor(data))
            return tf.reshape(_fit(tensor(data), tf.concat([shape[:-1], own[-1:]], 0)), tf.stack([-1, own[-1]]))

        targets, values, weight, pos_weight, sample_weight, where, _ = operands
        # Integers are class indices, though they might be distributions if the rank were known.
        if positives:
            targets, values = labels(targets), labels(values)
        elif per_example and tensor(targets).dtype.is_integer:
            targets = each(targets)
        else:
            targets = tf.reshape(_fit(tensor(targets), shape), two)
        weight = weight if per_example else full(weight)
        operands = Operands(targets, values, weight, full(pos_weight), each(sample_weight), full(where))
        return tf.reshape(x, two), operands, restore, finish

    def cache_key(self, x: Array, operands: tuple[Any, ...]) -> Any:
        return dtypes_of(EAGER, (x, *operands))

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def sparse(self, targets: Any) -> Padded | None:
        if isinstance(targets, tf.RaggedTensor):
            return Padded(targets.to_tensor(-1), None)
        if not isinstance(targets, tf.SparseTensor):
            return super().sparse(targets)
        return tensorflow_sparse.of_tensor(targets)

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
            if not internals.is_recording():
                return _run_cached(formulas.value, loss, options, x, operands)
            others = [array for array in operands if array is not None and array.dtype.is_floating]
            if not (others and internals.is_watched(others)):
                return _recorded_eagerly(loss, options, x, operands)
        with on_device_of(x):
            return _recorded_loss(loss, options, x, _fitted(loss, options, x, operands))

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        x = tf.convert_to_tensor(x)
        if _is_eager(x, operands):
            return tuple(_run_cached(formula, loss, options, x, operands))
        # No tape may see these expressions: they are not written to be differentiated.
        x = tf.stop_gradient(x)
        operands = Operands(*(None if a is None else tf.stop_gradient(a) for a in operands))
        with on_device_of(x):
            return super().closed_form(formula, loss, options, x, _fitted(loss, options, x, operands))

    def linear_inputs(self, inputs: Linear) -> Linear:
        if dtypes_of(EAGER, inputs) is not None:
            return inputs
        return Linear(*(None if array is None else tf.convert_to_tensor(array) for array in inputs))

    def linear_loss(self, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
        with on_device_of(inputs.features):
            inputs, operands = tensorflow_linear.fitted(_fit, loss, options, inputs, operands)
            arrays = [array for array in (*inputs, *operands) if array is not None and array.dtype.is_floating]
            # A ForwardAccumulator sees no custom gradients within a graph.
            taped = tf.executing_eagerly() and internals.can_tape_within()
            if internals.has_tangents(arrays) and not taped:
                at_once = differentiable, lambda _, *call: _recorded_loss(*call), None
                value, _ = formulas.in_blocks(*at_once, loss, options, inputs, operands, NOTHING)
                return value
            if not internals.is_recording() and tf.executing_eagerly():
                return _linear(loss, options, inputs, operands, NOTHING)[0]
            return tensorflow_linear.recorded(_linear, loss, options, inputs, operands)

    def linear_closed_form(
        self, loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear
    ) -> tuple[Array, Linear]:
        inputs = Linear(*(None if a is None else tf.stop_gradient(a) for a in inputs))
        operands = Operands(*(None if a is None else tf.stop_gradient(a) for a in operands))
        with on_device_of(inputs.features):
            inputs, operands = tensorflow_linear.fitted(_fit, loss, options, inputs, operands)
            value, found = _linear(loss, options, inputs, operands, needed)
            return value, formulas.rounded(standard, found, inputs)

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        x = tf.convert_to_tensor(x)
        with on_device_of(x):
            space = forward if internals.has_tangents((x,)) else differentiable
            return formulas.activation(space, function, x, half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x, cotangent)


backend = TensorflowBackend()
