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
from .formulas import Linear, Loss, Operands, Options, Reduction
from .lengths import Shape
from .namespace import Namespace
from .positives import Positives


class Given(NamedTuple):
    """Every option of a loss that is not an operand, as the caller gave it."""

    reduction: Reduction
    axis: int | tuple[int, ...] = -1
    label_smoothing: Any = 0.0
    ignore_index: int | None = None
    eps: float | None = None
    validate: bool = False
    positives: bool = False  # the targets are those of Positives


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
    operands, given = _apart(loss, operands, given)
    backend = backend_of(logits, *operands)
    key = _key(backend, loss, logits, operands, given)
    found = None if key is None else _checked.get(key)
    if found is not None:
        return Canonical(backend, loss, found, logits, operands, as_it_is)
    call = _canonical(backend, loss, logits, operands, given)
    if call.restore is as_it_is and _are_same(call.operands, operands):
        _keep(key, call.options)
    return call


def _apart(loss: Loss, operands: Operands, given: Given) -> tuple[Operands, Given]:
    """Arrays and options, where the caller gave the one in the other's place or within it.

    Label smoothing that is a number is an option, an array, traced or to be learned, an operand.
    """
    if isinstance(operands.targets, Positives):
        checks.takes_positives(loss, "Positives")
        operands, given = operands._replace(targets=operands.targets.indices), given._replace(positives=True)
    if is_number(given.label_smoothing):
        return operands, given
    return operands._replace(label_smoothing=given.label_smoothing), given._replace(label_smoothing=0.0)


_checked: dict[Any, Options] = {}  # options of calls that passed all checks and needed no conversion
_HASHABLE = {int, float, bool, str, type(None)}


def _keep(key: Any, options: Options) -> None:
    if key is not None:
        if len(_checked) >= 1000:  # shapes that never come again
            _checked.clear()
        _checked[key] = options


def _are_same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(a is b for a, b in zip(some, others, strict=True))


def _key(backend: Backend, loss: Loss, logits: Array, operands: tuple[Any, ...], given: Given) -> Any:
    """The key of a call, whose targets come first: calls with the same key need the same checks. None: each time."""
    if given.validate or operands[0] is None:
        return None
    kinds = tuple(map(type, given))  # 1 == 1.0 == True: the key needs the types
    if not _HASHABLE.issuperset(kinds):
        return None
    key = backend.cache_key(logits, operands)
    if key is None:
        return None
    return loss.name, given, kinds, key, logits.shape, *[None if array is None else array.shape for array in operands]


def _canonical(backend: Backend, loss: Loss, logits: Array, operands: Operands, given: Given) -> Canonical:
    name = checks.check_array(backend, logits, loss.takes)
    if operands.targets is None:
        fail(TypeError, "targets", "an array", "None")
    operands, given = _padded(backend, loss, None if backend.rankless(logits) else logits.shape, operands, given)
    if backend.rankless(logits):
        checks.only_last_axis(given.axis, loss.takes)
        smoothing = operands.label_smoothing
        logits, operands, restore, finish = backend.rows(loss.per_example, logits, operands, given.positives)
        call = _canonical(backend, loss, logits, operands._replace(label_smoothing=smoothing), given)
        return call._replace(restore=restore, finish=finish if given.reduction == "none" else None)
    shape: Shape = tuple(logits.shape)
    one_axis = loss.per_example or given.positives
    axes = checks.class_axes(given.axis, len(shape), loss.takes, one_axis)
    options, operands, dtype = _checked_operands(backend, loss, name, logits, shape, axes, operands, given)
    if one_axis and not (loss.per_example and _stays(backend, axes, logits)):
        options = options._replace(axes=(-1,))
    if given.validate:
        checks.values(backend, loss, logits, operands, options, axes, dtype)
    if not one_axis:
        return Canonical(backend, loss, options, logits, operands, as_it_is)

    xp = backend.namespace(logits)
    if loss.per_example:
        operands = operands._replace(where=_in_full(xp, operands.where, logits))
    if options.axes == axes:
        return Canonical(backend, loss, options, logits, operands, as_it_is)
    last, restore = _class_axis_last(xp, axes, logits)
    finish = None
    if options.positives:
        whole = tuple(xp.extent(logits, i) for i in range(len(shape)))
        moved = {name: getattr(operands, name) for name in ("weight", "pos_weight", "where")}
        moved = {name: None if array is None else xp.broadcast_to(array, whole) for name, array in moved.items()}
        finish = restore if options.reduction == "none" else None
    else:
        moved = {"targets": None if options.indices else operands.targets, "where": operands.where}
    operands = operands._replace(**{name: last(array) for name, array in moved.items() if array is not None})
    return Canonical(backend, loss, options, last(logits), operands, restore, finish)


def _checked_operands(
    backend: Backend,
    loss: Loss,
    name: str,
    like: Array,
    shape: Shape,
    axes: tuple[int, ...],
    operands: Operands,
    given: Given,
) -> tuple[Options, Operands, str]:
    """Options and operands of a call whose logits have this shape and a dtype of this name, and the targets' own dtype.

    The operands are arrays beside `like`.
    """
    reduction, axis, label_smoothing, ignore_index, eps, _, positives = given  # raises if one is forgotten here
    checks.check_reduction(reduction)
    options = Options(
        reduction=reduction,
        axes=axes,
        label_smoothing=checks.fraction("label_smoothing", label_smoothing, 1.0) or None,
        eps=EPSILON[name] if eps is None else checks.fraction("eps", eps, 0.5),
        half=name in HALVES,
        positives=positives,
    )
    if 0 < options.eps < (2.0**-1022 if name == "float64" else 2.0**-126):
        fail(ValueError, "eps", "0 or a normal number of the dtype that is computed in", repr(eps))
    dtypes = {}
    for label, data in operands._asdict().items():
        if data is not None:
            text, takes = ("labels", LABELS) if positives and label == "targets" else (label, TAKES[label])
            array, dtypes[label] = checks.operand(backend, text, data, takes, like, name)
            operands = operands._replace(**{label: array})
    checks.has_no_axis("label_smoothing", operands.label_smoothing)
    checks.broadcasts("where", operands.where, shape, loss.takes)
    if not loss.per_example:
        checks.elementwise_shapes(loss, shape, axes, operands, positives)
        options = options._replace(binary=dtypes["targets"] not in FLOATS and operands.values is None)
    else:
        options = checks.per_example_shapes(loss, shape, axes, operands, dtypes["targets"], options, axis, ignore_index)
    return options, operands, dtypes["targets"]


def _padded(
    backend: Backend, loss: Loss, shape: Shape | None, operands: Operands, given: Given
) -> tuple[Operands, Given]:
    """Sparse targets by the indices of their elements, and their values unless all are 1."""
    found = backend.sparse(operands.targets)
    if found is None or (found.shape is None and not given.positives):
        return operands, given
    checks.takes_positives(loss, "a sparse array")
    checks.sparse_shape(loss, found.shape, shape, given.axis, given.positives)
    return operands._replace(targets=found.indices, values=found.values), given._replace(positives=True)


def _in_full(xp: Namespace, keep: Array | None, logits: Array) -> Array | None:
    """A mask in the shape of the logits."""
    shape = tuple(logits.shape)
    if keep is None or (all(n is not None for n in (*keep.shape, *shape)) and lengths.same(keep.shape, shape)):
        return keep
    for _ in range(len(keep.shape), len(shape)):  # JAX can be told to refuse ranks that differ
        keep = xp.expand_dims(keep, axis=0)
    return xp.logical_and(keep, xp.ones_like(logits, dtype=xp.bool))  # which broadcasts to unknown lengths too


def _stays(backend: Backend, axes: tuple[int, ...], logits: Array) -> bool:
    return axes == (-1,) or (len(axes) == 1 and backend.keeps_axis(logits))


class CanonicalLinear(NamedTuple):
    """A call of a loss on the last linear layer's inputs, ready to run, its examples along one axis.

    `restore` brings the features' gradient into their own shape, `finish` the losses of reduction="none" into that of
    the caller's logits, less the class axis if they are per example.
    """

    backend: Backend
    loss: Loss
    options: Options
    inputs: Linear
    operands: Operands
    restore: Callable[[Array], Array] = as_it_is
    finish: Callable[[Array], Array] = as_it_is


def canonical_linear(loss: Loss, inputs: Linear, operands: Operands, given: Given) -> CanonicalLinear:
    """Check a call of a loss on the last linear layer's inputs and bring it into canonical form."""
    operands, given = _apart(loss, operands, given)
    backend = backend_of(inputs.features, *operands, *inputs[1:], label="features")
    key = _key(backend, loss, inputs.features, (*operands, *inputs[1:]), given)
    options = None if key is None else _checked.get(key)
    if options is None or backend.linear_inputs(inputs) is not inputs:
        arrays = (*operands, *inputs)  # as given
        options, inputs, operands = _checked_layer(backend, loss, inputs, operands, given)
        if _are_same((*operands, *inputs), arrays):
            _keep(key, options)
    if len(inputs.features.shape) == 2:
        return CanonicalLinear(backend, loss, options, inputs, operands)
    return _in_rows(backend, loss, options, inputs, operands)


def _checked_layer(
    backend: Backend, loss: Loss, inputs: Linear, operands: Operands, given: Given
) -> tuple[Options, Linear, Operands]:
    """Options, and arrays of the features' framework."""
    if operands.targets is None:
        fail(TypeError, "targets", "an array", "None")
    inputs, name = checks.linear_inputs(backend, inputs)
    features, weight, _ = inputs
    shape: Shape = (*features.shape[:-1], weight.shape[0])
    operands, given = _padded(backend, loss, shape, operands, given)
    options, operands, dtype = _checked_operands(backend, loss, name, features, shape, (-1,), operands, given)
    if given.validate:
        checks.target_values(backend, loss, shape, name, operands, options, (-1,), dtype)
        checks.linear_values(backend, inputs)
    return options, inputs, operands


def _in_rows(backend: Backend, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> CanonicalLinear:
    """The call with its examples along one axis."""
    features, weight, _ = inputs
    xp = backend.namespace(features)
    batch = tuple(xp.extent(features, i) for i in range(len(features.shape) - 1))
    whole, own = (*batch, xp.extent(weight, 0)), (*batch, xp.extent(features, -1))

    def rows(array: Array) -> Array:
        return xp.reshape(array, (-1, xp.extent(array, -1)))

    def rows_if_any(array: Array | None) -> Array | None:
        """Of what broadcasts to the logits: as it is if it is the same for all examples."""
        if array is None or len(array.shape) < 2:
            return array
        if any(n != 1 for n in array.shape[:-1]):
            array = xp.broadcast_to(array, (*batch, xp.extent(array, -1)))
        return rows(array)

    def each(array: Array | None) -> Array | None:
        return None if array is None else xp.reshape(array, (-1,))

    operands = operands._replace(
        targets=each(operands.targets) if options.indices else rows(operands.targets),
        weight=operands.weight if loss.per_example else rows_if_any(operands.weight),
        pos_weight=rows_if_any(operands.pos_weight),
        sample_weight=each(operands.sample_weight),
        where=rows_if_any(operands.where),
    )

    def restore(gradient: Array) -> Array:
        return xp.reshape(gradient, own)

    def finish(losses: Array) -> Array:
        return xp.reshape(losses, batch if loss.per_example else whole)

    inputs = inputs._replace(features=rows(features))
    return CanonicalLinear(
        backend, loss, options, inputs, operands, restore, finish if options.reduction == "none" else as_it_is
    )


LABELS = tuple(name for name in INTEGERS if name != "uint64")  # of which int64 holds all
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
