"""TensorFlow: the losses on the last linear layer's inputs, in blocks, by a loop that graphs and XLA know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from .. import formulas
from ..backend import Array
from ..formulas import NOTHING, Linear, Loss, Namespace, Operands, Options, Parts, Rows, Shared, Totals
from .tensorflow_internals import internals
from .tensorflow_loops import recomputed, scanned, there
from .tensorflow_namespaces import differentiable, on_device_of, standard


def fitted(
    fit: Callable[[Array, Any], Array], loss: Loss, options: Options, inputs: Linear, operands: Operands
) -> tuple[Linear, Operands]:
    """Bias and operands whose shapes `fit` checks when it runs if they were not known before."""
    arrays: list[Any] = [*inputs, *operands]
    if all(array is None or array.shape.is_fully_defined() for array in arrays):
        return inputs, operands
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
    bias = inputs.linear_bias
    if bias is not None and None in (bias.shape[0], inputs.linear_weight.shape[0]):  # mostly the batch alone is open
        inputs = inputs._replace(linear_bias=fit(bias, tf.stack([classes])))
    return inputs, operands._replace(**given)


def in_loop(
    loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear, cotangent: Array | None = None
) -> tuple[Array | None, Linear]:
    """The reduced loss, and its gradients in the compute dtype."""
    rows, shared = formulas.cut(standard, options, inputs, operands)
    unreduced = options.reduction == "none"

    def block(rows: Rows) -> tuple[Any, Any, Any]:
        totals, (values, counts, features) = formulas.block(
            standard, formulas.directly(standard), loss, options, needed, shared, Totals(), rows
        )
        return totals, (None if unreduced else values, counts), (values if unreduced else None, features)

    totals, (of_block, counts), (of_row, features) = scanned(block, _length(inputs), rows._replace(cotangent=cotangent))
    parts = Parts(of_row if unreduced else of_block, counts, features)
    return formulas.reduced(standard, loss, options, inputs, totals, parts)


def by_autodiff(
    loss: Loss,
    options: Options,
    inputs: Linear,
    operands: Operands,
    needed: Linear,
    cotangent: Array | None,
    moving: tuple[Linear, Operands],
) -> tuple[Array | None, Linear]:
    """The same as an expression of what moves: each of its derivatives makes the logits of each block again."""
    rows, shared = formulas.cut(differentiable, options, inputs, operands)
    unreduced = options.reduction == "none"
    layer, others = moving
    all_moving: Any = True

    def block(shared: Shared, rows: Rows) -> tuple[Any, Any]:
        totals, (values, counts, features) = formulas.block(
            differentiable, formulas.directly(differentiable), loss, options, needed, shared, Totals(), rows
        )
        return (totals, None if unreduced else values, counts), (values if unreduced else None, features)

    (totals, value, counts), (values, features) = recomputed(
        block,
        _length(inputs),
        shared,
        rows._replace(cotangent=cotangent),
        (Shared(layer.linear_weight, layer.linear_bias, others), Rows(layer.features, others, all_moving)),
    )
    parts = Parts(values if unreduced else value, counts, features)
    return formulas.reduced(differentiable, loss, options, inputs, totals, parts)


def _length(inputs: Linear) -> int | None:
    return formulas.most_rows(inputs) if inputs.features.shape[0] is None else formulas.rows_of_blocks(inputs)


@functools.cache
def formula(names: tuple[str, ...], needed: Linear, length: int | None) -> Any:
    """`in_loop` as a formula of arrays, whose result is a list without what is None, under a name of its own."""

    def run(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, *more: Array) -> list[Array]:
        given = dict(zip(names, (x, *more), strict=True))
        cotangent = given.pop("cotangent", None)
        return there(in_loop(loss, options, Linear(**given), operands, needed, cotangent))

    run.__name__ = f"linear {names} {needed} {length}"
    return run


def recorded(closed: Any, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
    """The reduced loss with its gradients on the tapes; `closed` computes both, outside of them."""
    eager, unreduced = tf.executing_eagerly(), options.reduction == "none"
    given = [*inputs, *operands]

    def is_watched(array: Any) -> bool:
        return array is not None and (internals.is_watched([array]) or internals.has_tangents([array]))

    watched = Linear(*map(is_watched, inputs))
    # A tape outside of a graph is not seen from within.
    wanted = watched if eager else Linear(*(array is not None for array in inputs))
    floating: Any = (a is not None and a.dtype.is_floating and (not eager or is_watched(a)) for a in operands)
    others = Operands(*floating)
    moved = [i for i, moves in enumerate((*wanted, *others)) if moves]

    def put(arrays: Any) -> tuple[Linear, Operands]:
        every = dict(enumerate(given)) | dict(zip(moved, arrays, strict=True))
        return Linear(*(every[i] for i in range(3))), Operands(*(every[i] for i in range(3, len(given))))

    def of_operands(arrays: Any, cotangent: Array | None, layer: Linear) -> list[Array]:
        """Of targets and weights, in the compute dtype, by autodiff of the expression. `layer`: what else moves."""
        if not any(others):
            return []
        first = len(moved) - sum(others)
        copies = [formulas.working(differentiable, options, tf.identity(array)) for array in arrays[first:]]
        with internals.taping(), tf.GradientTape() as tape:
            tape.watch(copies)
            value, _ = by_autodiff(loss, options, *put([*arrays[:first], *copies]), NOTHING, None, (layer, others))
        result: list[Array] = tape.gradient(value, copies, cotangent, unconnected_gradients="zero")
        return result

    @tf.custom_gradient
    def run(*arrays: Array) -> tuple[Array, Any]:
        at_once = NOTHING if unreduced else watched  # in the same loop as the value
        value, found = closed(loss, options, *put(map(tf.stop_gradient, arrays)), at_once)

        @tf.custom_gradient
        def gradients(*arrays: Array) -> tuple[list[Array], Any]:
            """Of the reduced loss; of the losses, times the cotangents that come last."""
            arrays, cotangents = arrays[: len(moved)], arrays[len(moved) :]
            constant, (cotangent,) = [*map(tf.stop_gradient, arrays)], [*map(tf.stop_gradient, cotangents)] or [None]
            missing = Linear(*(want and a is None for want, a in zip(wanted, found, strict=True)))
            more = closed(loss, options, *put(constant), missing, cotangent)[1] if any(missing) else found
            both = [b if a is None else a for a, b in zip(found, more, strict=True)]

            def pullback(*seconds: Array) -> list[Array]:
                with on_device_of(arrays[0]), internals.taping(), tf.GradientTape() as tape:
                    copies = [tf.identity(array) for array in (*arrays, *cotangents)]
                    tape.watch(copies)
                    again, (cotangent,) = copies[: len(moved)], copies[len(moved) :] or [None]
                    _, found = by_autodiff(loss, options, *put(again), wanted, cotangent, (wanted, others))
                    first = there(found) + of_operands(again, cotangent, wanted)
                result: list[Array] = tape.gradient(first, copies, list(seconds), unconnected_gradients="zero")
                return result

            return there(both) + of_operands(constant, cotangent, NOTHING), pullback

        def pullback(cotangent: Array) -> list[Array]:
            cotangent = tf.convert_to_tensor(cotangent)  # of gathered losses it is tf.IndexedSlices
            with on_device_of(arrays[0]):
                if unreduced:
                    found = gradients(*arrays, cotangent)
                else:
                    found = [formulas.scaled(standard, a, cotangent) for a in gradients(*arrays)]
                return [tf.cast(a, b.dtype) for a, b in zip(found, arrays, strict=True)]

        return value, pullback

    return run(*(given[i] for i in moved)) if moved else closed(loss, options, inputs, operands, NOTHING)[0]
