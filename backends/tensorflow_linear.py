"""TensorFlow: the losses on the last linear layer's inputs, in blocks, by a loop that graphs and XLA know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from .. import formulas
from ..backend import Array
from ..formulas import NOTHING, Linear, Loss, Namespace, Operands, Options, Parts, Rows, Totals
from .tensorflow_internals import internals
from .tensorflow_namespaces import differentiable, on_device_of, standard


def fitted(
    fit: Callable[[Array, Any], Array], loss: Loss, options: Options, inputs: Linear, operands: Operands
) -> Operands:
    """Operands whose shapes `fit` checks when it runs if they were not known before."""
    arrays: list[Any] = [*inputs, *operands]
    if all(array is None or array.shape.is_fully_defined() for array in arrays):
        return operands
    n, classes = tf.shape(inputs.features)[0], tf.shape(inputs.linear_weight)[0]
    each = tf.shape(operands.targets)[-1] if options.positives else classes
    wanted = {"targets": [n] if options.indices else [n, each], "values": [n, each], "sample_weight": [n]}
    if loss.per_example:
        wanted["weight"] = [classes]
    given = {name: array for name, array in operands._asdict().items() if array is not None and array.shape.rank > 0}
    for name, array in given.items():
        if name in wanted:
            given[name] = fit(array, tf.stack(wanted[name]))
        elif array.shape.rank == 2 and array.shape[0] != 1:
            given[name] = tf.broadcast_to(array, tf.stack([n, array.shape[1] or classes]))
    return operands._replace(**given)


def in_loop(
    loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Array | None = None
) -> tuple[Array | None, Linear]:
    """The reduced loss, and its gradients in the compute dtype."""
    rows, shared = formulas.cut(standard, options, inputs, operands)
    rows = rows._replace(cotangent=cotangent)
    body = functools.partial(formulas.block, standard, _run, loss, options, needed, shared)
    n, length = inputs.features.shape[0], formulas.most_rows(inputs)
    if n is not None:
        length = formulas.rows_of_blocks(inputs)
    if length is None:
        totals, parts = body(Totals(), rows)
        return formulas.reduced(standard, loss, options, inputs, totals, parts)

    # The last block first, which may be shorter, and says which totals and parts there are.
    n = tf.shape(inputs.features)[0] if n is None else n
    count = tf.maximum(n - 1, 0) // length if tf.is_tensor(n) else (n - 1) // length
    totals, last = body(Totals(), _cut(rows, count * length, n - count * length))
    sizes = (length if options.reduction == "none" else 1, 1, length)  # of Parts, from a whole block
    held = [
        tf.TensorArray(a.dtype, count, element_shape=[size, *a.shape[1:]])
        for a, size in zip(last, sizes, strict=True)
        if a is not None
    ]

    def step(i: Array, totals: list[Array], held: list[Any]) -> tuple[Array, list[Array], list[Any]]:
        sums, parts = body(put(totals), of_block(i))
        written = (array.write(i, part) for array, part in zip(held, _there(parts), strict=True))
        return i + 1, _there(sums), list(written)

    def of_block(i: Array) -> Rows:
        if not tf.is_tensor(n):
            return _cut(rows, i * length, length)
        # XLA compiles this loop where there are fewer examples, too, and would refuse to slice them.
        places = tf.range(length) + i * length
        return tf.nest.map_structure(lambda a: None if a is None else tf.gather(a, places), rows)

    def put(sums: list[Array]) -> Totals:
        left = iter(sums)
        return Totals(*(None if a is None else next(left) for a in totals))

    _, sums, held = tf.while_loop(lambda i, *_: i < count, step, (0, _there(totals), held), parallel_iterations=1)
    first = iter(held)
    parts = Parts(*(None if a is None else _joined(next(first).stack(), a) for a in last))
    return formulas.reduced(standard, loss, options, inputs, put(sums), parts)


def _run(formula: Any, *call: Any) -> Any:
    return formula(standard, *call)


def _there(arrays: Any) -> list[Array]:
    return [array for array in arrays if array is not None]


def _cut(rows: Rows, start: Any, size: Any) -> Rows:
    def cut(array: Any) -> Any:
        if array is None:
            return None
        lengths = [standard.extent(array, axis) for axis in range(1, array.shape.rank)]
        return tf.slice(array, [start, *[0] * len(lengths)], [size, *lengths])

    return Rows(cut(rows.features), Operands(*map(cut, rows.operands)), cut(rows.cotangent))


def _joined(blocks: Array, last: Array) -> Array:
    return tf.concat([tf.reshape(blocks, [-1, *blocks.shape[2:]]), last], axis=0)


@functools.cache
def formula(names: tuple[str, ...], needed: Linear, length: int | None) -> Any:
    """`in_loop` as a formula of arrays, whose result is a list without what is None, under a name of its own."""

    def run(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, *more: Array) -> list[Array]:
        given = dict(zip(names, (x, *more), strict=True))
        cotangent = given.pop("cotangent", None)
        value, found = in_loop(loss, options, Linear(**given), operands, needed, cotangent)
        return _there([value, *found])

    run.__name__ = f"linear {names} {needed} {length}"
    return run


def recorded(closed: Any, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
    """The reduced loss with its gradients on the tapes; `closed` computes both, outside of them."""
    eager, given = tf.executing_eagerly(), operands._asdict()
    watched = Linear(*(array is not None and internals.is_watched([array]) for array in inputs))
    every = Linear(*(array is not None for array in inputs))
    wanted = watched if eager else every  # a tape outside of a graph is not seen from within
    at_once = NOTHING if options.reduction == "none" else watched  # in the same loop as the value
    names = [name for name in Linear._fields if getattr(every, name)]
    floating = [
        name
        for name, array in given.items()
        if array is not None and array.dtype.is_floating and (not eager or internals.is_watched([array]))
    ]

    def put(arrays: Any) -> tuple[Linear, Operands]:
        layer, others = arrays[: len(names)], arrays[len(names) :]
        return Linear(**dict(zip(names, layer, strict=True))), Operands(
            **given | dict(zip(floating, others, strict=True))
        )

    @tf.custom_gradient
    def run(*arrays: Array) -> tuple[Array, Any]:
        value, found = closed(loss, options, *put(arrays), at_once)

        @tf.custom_gradient
        def gradients(cotangent: Array, *arrays: Array) -> tuple[list[Array], Any]:
            def pullback(*seconds: Array) -> list[Array]:
                with on_device_of(arrays[0]), tf.GradientTape() as tape:
                    copies = [tf.identity(array) for array in (cotangent, *arrays)]
                    tape.watch(copies)
                    again = formulas.gradients(differentiable, loss, options, *put(copies[1:]), wanted, copies[0])
                result: list[Array] = tape.gradient(_there(again), copies, list(seconds), unconnected_gradients="zero")
                return result

            if eager and tf.is_symbolic_tensor(cotangent):  # of a jacobian, which does not take loops of loops
                return _there(
                    formulas.gradients(differentiable, loss, options, *put(arrays), wanted, cotangent)
                ), pullback
            every_loss = cotangent if options.reduction == "none" else None
            factor = 1.0 if every_loss is not None else cotangent
            missing = Linear(*(want and a is None for want, a in zip(wanted, found, strict=True)))
            more = closed(loss, options, *put(arrays), missing, every_loss)[1] if any(missing) else found
            both = (b if a is None else a for a, b in zip(found, more, strict=True))
            scaled = Linear(*(None if a is None else a * tf.cast(factor, a.dtype) for a in both))
            return _there(formulas.rounded(standard, scaled, inputs)), pullback

        def pullback(cotangent: Array) -> list[Any]:
            cotangent = tf.convert_to_tensor(cotangent)  # of gathered losses it is tf.IndexedSlices
            with on_device_of(arrays[0]):
                results = iter(gradients(cotangent, *arrays) if any(wanted) else [])
                of_inputs = [next(results) if getattr(wanted, name) else None for name in names]
                return of_inputs + (_of_operands(cotangent, arrays) if floating else [])

        return value, pullback

    def _of_operands(cotangent: Array, arrays: Any) -> list[Array]:
        """Targets and weights: by autodiff of the expression."""
        layer, others = arrays[: len(names)], [tf.identity(array) for array in arrays[len(names) :]]
        with tf.GradientTape() as tape:
            tape.watch(others)
            value = formulas.expression(
                differentiable, _value, loss, options, *put([*map(tf.stop_gradient, layer), *others])
            )
        result: list[Array] = tape.gradient(value, others, cotangent, unconnected_gradients="zero")
        return result

    return run(*_there(inputs), *(given[name] for name in floating))


def _value(*call: Any) -> Array:
    return formulas.value(differentiable, *call)
