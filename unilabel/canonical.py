"""A call in canonical form, which is what the formulas take, and a cache of calls that passed all checks.

All arrays are of the logits' framework and on their device, mutually exclusive classes are along the last axis, and the
options are resolved and hashable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from . import checks, lengths
from .backend import Array, Backend, backend_of, is_number
from .checks import EPSILON, FLOATS, HALVES, INTEGERS, NUMBERS, fail
from .formulas import Loss, Operands, Options, Reduction
from .lengths import Shape
from .namespace import Namespace


class Given(NamedTuple):
    """Every option of a loss that is not an operand, as the caller gave it."""

    reduction: Reduction
    axis: int | tuple[int, ...] = -1
    label_smoothing: Any = 0.0
    ignore_index: int | None = None
    eps: float | None = None
    validate: bool = False


class Canonical(NamedTuple):
    """A call, ready to run. `restore` brings an array in the layout of `x` back into that of the caller's logits.

    `finish` does so for the losses of reduction="none"; None: nothing to do.
    """

    backend: Backend
    loss: Loss
    options: Options
    x: Array
    operands: Operands
    restore: Callable[[Array], Array]
    finish: Callable[[Array], Array] | None = None


def as_it_is(array: Array) -> Array:
    return array


def canonical(loss: Loss, logits: Array, operands: Operands, given: Given) -> Canonical:
    """Check a call of a loss and bring it into canonical form."""
    # A number is an option; an array, traced or to be learned, is an operand.
    if not is_number(given.label_smoothing):
        operands, given = operands._replace(label_smoothing=given.label_smoothing), given._replace(label_smoothing=0.0)
    backend = backend_of(logits, *operands)
    key = _key(backend, loss, logits, operands, given)
    found = None if key is None else _checked.get(key)
    if found is not None:
        return Canonical(backend, loss, found, logits, operands, as_it_is)
    call = _canonical(backend, loss, logits, operands, given)
    same = all(a is b for a, b in zip(call.operands, operands, strict=True))
    if key is not None and same and call.restore is as_it_is:
        if len(_checked) >= 1000:  # shapes that never come again
            _checked.clear()
        _checked[key] = call.options
    return call


_checked: dict[Any, Options] = {}  # options of calls that passed all checks and needed no conversion
_HASHABLE = {int, float, bool, str, type(None)}


def _key(backend: Backend, loss: Loss, logits: Array, operands: Operands, given: Given) -> Any:
    """The key of a call: calls with the same key need the same checks. None: check each time."""
    if given.validate or operands.targets is None:
        return None
    kinds = tuple(map(type, given))  # 1 == 1.0 == True: the key needs the types
    if not _HASHABLE.issuperset(kinds):
        return None
    arrays: list[Any] = []
    for array in operands:
        key = None if array is None else backend.cache_key(logits, array)
        if key is None and array is not None:
            return None
        arrays.append(None if array is None else (key, array.shape))
    return loss.name, given, kinds, logits.shape, *arrays


def _canonical(backend: Backend, loss: Loss, logits: Array, operands: Operands, given: Given) -> Canonical:
    name = checks.check_array(backend, logits, loss.takes)
    if operands.targets is None:
        fail(TypeError, "targets", "an array", "None")
    if backend.rankless(logits):
        checks.only_last_axis(given.axis, loss.takes)
        smoothing = operands.label_smoothing
        logits, operands, restore, finish = backend.rows(loss.per_example, logits, operands)
        call = _canonical(backend, loss, logits, operands._replace(label_smoothing=smoothing), given)
        return call._replace(restore=restore, finish=finish if given.reduction == "none" else None)
    reduction, axis, label_smoothing, ignore_index, eps, validate = given  # raises if one is forgotten here
    shape: Shape = tuple(logits.shape)
    axes = checks.class_axes(axis, len(shape), loss.takes, loss.per_example)
    checks.check_reduction(reduction)
    options = Options(
        reduction=reduction,
        axes=axes if not loss.per_example or _stays(backend, axes, logits) else (-1,),
        label_smoothing=checks.fraction("label_smoothing", label_smoothing, 1.0) or None,
        eps=EPSILON[name] if eps is None else checks.fraction("eps", eps, 0.5),
        half=name in HALVES,
    )
    if 0 < options.eps < (2.0**-1022 if name == "float64" else 2.0**-126):
        fail(ValueError, "eps", "0 or a normal number of the dtype that is computed in", repr(eps))
    dtypes = {}
    for label, data in operands._asdict().items():
        if data is not None:
            array, dtypes[label] = checks.operand(backend, label, data, TAKES[label], logits, name)
            operands = operands._replace(**{label: array})
    checks.has_no_axis("label_smoothing", operands.label_smoothing)
    checks.broadcasts("where", operands.where, shape, loss.takes)
    if not loss.per_example:
        checks.elementwise_shapes(loss, shape, operands)
        options = options._replace(binary=dtypes["targets"] not in FLOATS)
    else:
        options = checks.per_example_shapes(loss, shape, axes, operands, dtypes["targets"], options, axis, ignore_index)
    if validate:
        checks.values(backend, loss, logits, operands, options, axes, dtypes["targets"])
    if not loss.per_example:
        return Canonical(backend, loss, options, logits, operands, as_it_is)

    xp = backend.namespace(logits)
    keep = operands.where
    if keep is not None and not _is_full(keep, shape):  # broadcast by logical_and: a length may be unknown, if traced
        for _ in range(len(keep.shape), len(shape)):  # JAX can be told to refuse ranks that differ
            keep = xp.expand_dims(keep, axis=0)
        operands = operands._replace(where=xp.logical_and(keep, xp.ones_like(logits, dtype=xp.bool)))
    if options.axes == axes:
        return Canonical(backend, loss, options, logits, operands, as_it_is)
    last, restore = _class_axis_last(xp, axes, logits)
    z, where = operands.targets, operands.where
    operands = operands._replace(
        targets=z if options.indices else last(z), where=None if where is None else last(where)
    )
    return Canonical(backend, loss, options, last(logits), operands, restore)


def _is_full(array: Array, shape: Shape) -> bool:
    """Whether it is known to be of this shape."""
    return all(n is not None for n in (*array.shape, *shape)) and lengths.same(array.shape, shape)


def _stays(backend: Backend, axes: tuple[int, ...], logits: Array) -> bool:
    return axes == (-1,) or (len(axes) == 1 and backend.keeps_axis(logits))


TAKES = dict.fromkeys(Operands._fields, NUMBERS) | {"where": ("bool",), "label_smoothing": (*INTEGERS, *FLOATS)}


def canonical_activation(x: Array, axis: int | tuple[int, ...] | None) -> tuple[Backend, bool, Array, Any]:
    """The backend, whether x is of half precision, x with its class axis (None: none) last, and what restores it."""
    backend = backend_of(x)
    half = checks.check_array(backend, x, "x") in HALVES
    if axis is None:
        return backend, half, x, as_it_is
    if backend.rankless(x):
        checks.only_last_axis(axis, "x")
        x, _, restore, _ = backend.rows(True, x, None)
        return backend, half, x, restore
    axes = checks.class_axes(axis, len(x.shape), "x", True)
    checks.class_count("x", x.shape, axes, axis)
    last, restore = _class_axis_last(backend.namespace(x), axes, x)
    return backend, half, last(x), restore


def _class_axis_last(
    xp: Namespace, axes: tuple[int, ...], x: Array
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """How to move the class axes of arrays of this shape to the end, as one, and how to move them back."""
    ndim = len(x.shape)
    if axes == (-1,):
        return as_it_is, as_it_is
    order = [i for i in range(ndim) if i - ndim not in axes] + [i + ndim for i in axes]
    back = [order.index(i) for i in range(ndim)]
    moved = [xp.extent(x, i) for i in order]
    flat = [*moved[: ndim - len(axes)], math.prod(moved[ndim - len(axes) :])]

    def last(array: Array) -> Array:
        array = xp.permute_dims(array, tuple(order))
        return array if len(axes) == 1 else xp.reshape(array, tuple(flat))

    def restore(array: Array) -> Array:
        array = array if len(axes) == 1 else xp.reshape(array, tuple(moved))
        return xp.permute_dims(array, tuple(back))

    return last, restore
