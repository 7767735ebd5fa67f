"""TensorFlow: a function of a block of rows, run on one block after the other by a loop that graphs and XLA know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ..backend import Array
from .tensorflow_internals import internals

Nest = Any  # tuples of arrays and None, as tf.nest knows them


def there(arrays: Nest) -> list[Array]:
    """The arrays of a nest, without what is None."""
    return [array for array in tf.nest.flatten(arrays) if array is not None]


def mapped(function: Callable[..., Any], *nests: Nest) -> Nest:
    """The nest of what the function makes of each array; None stays."""
    return tf.nest.map_structure(lambda a, *others: None if a is None else function(a, *others), *nests)


def scanned(function: Callable[[Nest], tuple[Nest, Nest, Nest]], length: int | None, rows: Nest) -> Any:
    """What the function returns of blocks of this many rows; None: of all at once.

    It returns arrays that are summed over all blocks; arrays with one row for each block; and with one for each row.
    """
    if length is None:
        return function(rows)

    # The last block first, which may be shorter, and says which arrays there are.
    (first, *_), some = there(rows), rows
    n = first.shape[0]
    if n is None:
        n = tf.shape(first)[0]
        some = mapped(functools.partial(_with_a_row, n), rows)
    count = tf.maximum(n - 1, 0) // length if tf.is_tensor(n) else (n - 1) // length
    sums, *last = function(mapped(lambda a: _cut(a, count * length, n - count * length), rows))
    held = [
        tf.TensorArray(a.dtype, count, element_shape=[size, *a.shape[1:]])
        for size, arrays in zip((1, length), last, strict=True)
        for a in there(arrays)
    ]

    def step(i: Array, sums: list[Array], held: list[Any]) -> tuple[Array, list[Array], list[Any]]:
        more, *parts = function(of_block(i))
        written = (array.write(i, part) for array, part in zip(held, there(parts), strict=True))
        return i + 1, [a + b for a, b in zip(sums, there(more), strict=True)], list(written)

    def of_block(i: Array) -> Nest:
        if not tf.is_tensor(n):
            return mapped(lambda a: _cut(a, i * length, length), rows)
        # XLA compiles this loop where there are fewer rows, too, and would refuse to slice them.
        places = tf.range(length) + i * length
        return mapped(lambda a: tf.gather(a, places), some)

    _, totals, held = tf.while_loop(lambda i, *_: i < count, step, (0, there(sums), held), parallel_iterations=1)
    stacks = iter(held)
    parts = mapped(lambda a: _joined(next(stacks).stack(), a), last)
    return put(sums, totals), *parts


def put(nest: Nest, arrays: Any) -> Nest:
    """The nest with these arrays in the place of its own."""
    left = iter(arrays)
    return mapped(lambda _: next(left), nest)


def _cut(array: Array, start: Any, size: Any) -> Array:
    lengths = [tf.shape(array)[axis] if n is None else n for axis, n in enumerate(array.shape)]
    return tf.slice(array, [start, *[0] * (len(lengths) - 1)], [size, *lengths[1:]])


def _with_a_row(n: Array, array: Array) -> Array:
    """The array itself, or with a row of zeros if it has none: XLA gathers from no empty ones."""
    return tf.pad(array, [[0, 1 - tf.minimum(n, 1)], *[[0, 0]] * (array.shape.rank - 1)])


def _joined(blocks: Array, last: Array) -> Array:
    return tf.concat([tf.reshape(blocks, [-1, *blocks.shape[2:]]), last], axis=0)


def recomputed(
    function: Callable[[Nest, Nest], tuple[Nest, Nest]], length: int | None, shared: Nest, rows: Nest, moving: Nest
) -> Any:
    """What a function of arrays that all blocks share, and of a block of rows, returns: its sums, and one row for each.

    Each derivative, of any order, is a loop over blocks too, which makes again what the function makes of a block: one
    block at a time is in memory. `moving`, a nest like (shared, rows), tells which arrays these derivatives are by.
    """
    leaves = tf.nest.flatten((shared, rows))
    floating = [array is not None and array.dtype.is_floating for array in leaves]
    moved = [i for i, moves in enumerate(tf.nest.flatten(moving)) if moves and floating[i]]

    def whole(arrays: Any) -> Nest:
        every = dict(enumerate(leaves)) | dict(zip(moved, arrays, strict=True))
        return tf.nest.pack_sequence_as((shared, rows), list(every.values()))

    @tf.custom_gradient
    def run(*arrays: Array) -> tuple[list[Array], Any]:
        # No tape sees these, nor a ForwardAccumulator: they would keep what is in the loop.
        shared, rows = mapped(tf.stop_gradient, whole(arrays))
        sums, _, each = scanned(lambda rows: _without_blocks(function(shared, rows)), length, rows)
        nests.append((sums, each))

        def pullback(*cotangents: Array) -> list[Array]:
            of_sums, of_each = put((sums, each), cotangents)
            shared, rows = whole(arrays)
            all_move = tf.nest.map_structure(lambda _: True, (of_sums, of_each))
            found = recomputed(
                derivative,
                length,
                (shared, of_sums),
                (rows, of_each),
                ((moving[0], all_move[0]), (moving[1], all_move[1])),
            )
            return there(found)

        return there((sums, each)), pullback

    def derivative(shared: Nest, rows: Nest) -> tuple[Nest, Nest]:
        """The cotangents of what moves."""
        (shared, of_sums), (rows, of_each) = shared, rows
        flat = tf.nest.flatten((shared, rows))
        with internals.taping(), tf.GradientTape() as tape:
            copies = [tf.identity(flat[i]) for i in moved]
            tape.watch(copies)
            every = dict(enumerate(flat)) | dict(zip(moved, copies, strict=True))
            values = there(function(*tf.nest.pack_sequence_as((shared, rows), list(every.values()))))
        gradients = tape.gradient(values, copies, there((of_sums, of_each)), unconnected_gradients="zero")
        of_shared = len(tf.nest.flatten(shared))
        return [g for i, g in zip(moved, gradients, strict=True) if i < of_shared], [
            g for i, g in zip(moved, gradients, strict=True) if i >= of_shared
        ]

    nests: list[Nest] = []
    found = run(*(leaves[i] for i in moved))
    return put(nests[-1], found)


def _without_blocks(found: tuple[Nest, Nest]) -> tuple[Nest, Nest, Nest]:
    sums, each = found
    return sums, [], each
