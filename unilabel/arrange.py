"""Operands into canonical form: every check, and every error text, of the public functions.

What comes out (an Arranged) is what the formulas take: all arrays of the logits' framework and on their device, the
class axis last where classes exclude each other, the options resolved and hashable.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .backend import Backend, backend_of, is_number, is_plain
from .formulas import Array, Loss, Operands, Options
from .lengths import Shape, extent, product, same
from .namespace import Namespace

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NUMBERS = (*INTEGERS, *FLOATS, "bool")
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
REDUCTIONS = ("none", "sum", "mean", "batchmean")


class Arranged(NamedTuple):
    """A call, ready to run. `restore` gives an array laid out like `x` the layout of the caller's logits.

    `finish` does so for what reduction="none" returns; None: nothing to do.
    """

    backend: Backend
    loss: Loss
    options: Options
    x: Array
    operands: Operands
    restore: Callable[[Array], Array]
    finish: Callable[[Array], Array] | None = None


def arrange(
    loss: Loss,
    logits: Array,
    targets: Any,
    *,
    reduction: str,
    axis: int | tuple[int, ...] = -1,
    weight: Any = None,
    pos_weight: Any = None,
    sample_weight: Any = None,
    where: Any = None,
    ignore_index: int | None = None,
    label_smoothing: Any = 0.0,
    eps: float | None = None,
    validate: bool = False,
) -> Arranged:
    """Check a call of a loss and bring it into canonical form."""
    smoothing = None if is_number(label_smoothing) else label_smoothing  # an array, traced or to be learned
    backend = backend_of(logits, targets, weight, pos_weight, sample_weight, where, smoothing)
    key = None
    if (
        weight is pos_weight is sample_weight is where is eps is None
        and not validate
        and type(axis) is int
        and type(label_smoothing) is float
        and type(reduction) is str
        and (ignore_index is None or type(ignore_index) is int)
    ):
        checked = backend.settled(logits, targets)
        if checked is not None:
            key = loss.name, checked, logits.shape, targets.shape, reduction, axis, label_smoothing, ignore_index
            found = _settled.get(key)
            if found is not None:
                return Arranged(backend, loss, found, logits, Operands(targets), _as_it_is)
    what = loss.takes
    name = check_array(backend, logits, what)
    if backend.rankless(logits):
        _only_last(axis, what)
        given = Operands(targets, weight, pos_weight, sample_weight, where)
        logits, given, restore, finish = backend.rows(loss.per_example, logits, given)
        options_given = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "eps": eps}
        arranged = arrange(loss, logits, reduction=reduction, validate=validate, **given._asdict() | options_given)
        return arranged._replace(restore=restore, finish=finish if reduction == "none" else None)
    shape: Shape = tuple(logits.shape)
    axes = class_axes(axis, len(shape), what, loss.per_example)
    if reduction not in REDUCTIONS:
        _fail(ValueError, "reduction", _choices(map(repr, REDUCTIONS)), repr(reduction))
    options = Options(
        reduction=reduction,
        axes=(-1,) if loss.per_example else axes,
        label_smoothing=(_fraction("label_smoothing", label_smoothing, 1.0) or None) if smoothing is None else None,
        eps=EPSILON[name] if eps is None else _fraction("eps", eps, 0.5),
        half=name in HALVES,
    )
    if 0 < options.eps < (2.0**-1022 if name == "float64" else 2.0**-126):
        _fail(ValueError, "eps", "0 or a normal number of the dtype that is computed in", repr(eps))

    def operand(label: str, data: Any, dtypes: tuple[str, ...] = NUMBERS) -> Array:
        return None if data is None else _operand(backend, label, data, dtypes, logits, name)[0]

    if targets is None:
        _fail(TypeError, "targets", "an array", "None")
    z, dtype = _operand(backend, "targets", targets, NUMBERS, logits, name)
    operands = Operands(
        z,
        operand("weight", weight),
        operand("pos_weight", pos_weight),
        operand("sample_weight", sample_weight),
        operand("where", where, ("bool",)),
        operand("label_smoothing", smoothing, (*INTEGERS, *FLOATS)),
    )
    _has_shape("label_smoothing", operands.label_smoothing, (), lambda: "a number, or an array of no dimensions")
    _broadcasts("where", operands.where, shape, what)
    if not loss.per_example:
        _has_shape("targets", z, shape, lambda: f"the shape of the {what}, {_text(shape)}")
        _broadcasts("weight", operands.weight, shape, what)
        _broadcasts("pos_weight", operands.pos_weight, shape, what)
        if validate:
            _validate(backend, loss, what, logits, operands, options, axes, dtype)
        return _settle(key, targets, Arranged(backend, loss, options, logits, operands, _as_it_is))

    batch: Shape = tuple(n for i, n in enumerate(shape, -len(shape)) if i not in axes)
    classes = product(shape[i] for i in axes)
    if classes == 0:
        _fail(ValueError, what, "at least one class", f"shape {_text(shape)} with class axis {axis}")

    def kinds() -> str:
        return f"integer class indices of shape {_text(batch)} or a distribution of shape {_text(shape)}"

    indices = len(z.shape) == len(batch)
    _has_shape("targets", z, batch if indices else shape, kinds)
    if indices and dtype not in INTEGERS:
        _fail(TypeError, "targets", kinds(), f"{dtype} of shape {_text(batch)}")
    if ignore_index is not None:
        if not indices:
            _fail(ValueError, "ignore_index", "None, as the targets are a distribution (mask with where)", ignore_index)
        ignore_index = _index("ignore_index", ignore_index)
        if not -(2**31) < ignore_index < 2**31 - 1:
            _fail(ValueError, "ignore_index", "an integer of 32 bits", ignore_index)
        bits = int(dtype.removeprefix("u").removeprefix("int"))
        low, high = (0, 2**bits) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        ignore_index = ignore_index if low <= ignore_index < high else None  # the targets' dtype cannot hold it
    _has_shape("weight", operands.weight, (classes,), lambda: f"one weight for each of {classes} classes")
    _has_shape("sample_weight", operands.sample_weight, batch, lambda: f"one weight per example, {_text(batch)}")
    options = options._replace(indices=indices, ignore_index=ignore_index)
    if validate:
        _validate(backend, loss, what, logits, operands, options, axes, dtype)

    xp = backend.namespace(logits)
    if operands.where is not None:  # broadcast by arithmetic: a length may be unknown before it runs
        keep = operands.where
        for _ in range(len(keep.shape), len(shape)):  # JAX can be told to refuse ranks that differ
            keep = xp.expand_dims(keep, axis=0)
        operands = operands._replace(where=xp.logical_and(keep, xp.ones_like(logits, dtype=xp.bool)))
    last, restore = _class_axis_last(xp, axes, logits)
    operands = operands._replace(
        targets=z if indices else last(z), where=None if operands.where is None else last(operands.where)
    )
    return _settle(key, targets, Arranged(backend, loss, options, last(logits), operands, restore))


_settled: dict[Any, Options] = {}  # the options of calls that came through all checks with nothing to convert


def _settle(key: Any, targets: Any, arranged: Arranged) -> Arranged:
    if key is not None and arranged.operands.targets is targets and arranged.restore is _as_it_is:
        if len(_settled) >= 1000:  # shapes that never come again
            _settled.clear()
        _settled[key] = arranged.options
    return arranged


def _as_it_is(array: Array) -> Array:
    return array


def arrange_activation(x: Array, axis: int | tuple[int, ...] | None) -> tuple[Backend, bool, Array, Any]:
    """The backend, whether x is of half precision, x with its class axis (None: it has none) last, and the way back."""
    backend = backend_of(x)
    half = check_array(backend, x, "x") in HALVES
    if axis is None:
        return backend, half, x, _as_it_is
    if backend.rankless(x):
        _only_last(axis, "x")
        x, _, restore, _ = backend.rows(True, x, Operands(None))
        return backend, half, x, restore
    axes = class_axes(axis, len(x.shape), "x", True)
    classes = product(x.shape[i] for i in axes)
    if classes == 0:
        _fail(ValueError, "x", "at least one class", f"shape {_text(x.shape)} with class axis {axis}")
    last, restore = _class_axis_last(backend.namespace(x), axes, x)
    return backend, half, last(x), restore


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_array(backend: Backend, x: Array, label: str) -> str:
    """The name of the dtype of a floating-point array."""
    problem = backend.problem(x)
    if problem is not None:
        _fail(TypeError, label, f"a plain array of {backend.name}", problem)
    name = backend.dtype(x)
    if name not in FLOATS:
        _fail(TypeError, label, "dtype " + _choices(FLOATS), name)
    return name


def class_axes(axis: Any, ndim: int, what: str, per_example: bool) -> tuple[int, ...]:
    """The class axes, negative and in the order given. One element of a loss per element has none."""
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(_index("axis", i) for i in given)
    if ndim == 0 and not per_example and axes in ((-1,), (0,)):
        return ()
    if not axes or not all(-ndim <= i < ndim for i in axes):
        choices = f"one of the {what}' axes, {-ndim} to {ndim - 1}" if ndim else f"{what} that have an axis"
        _fail(ValueError, "axis", f"{choices}, or a tuple of them", f"{axis} for {ndim} dimensions")
    axes = tuple(i - ndim if i >= 0 else i for i in axes)
    if len(set(axes)) < len(axes):
        _fail(ValueError, "axis", "axes that differ", str(axis))
    return axes


def _only_last(axis: Any, what: str) -> None:
    if axis not in (-1, (-1,)):
        _fail(ValueError, "axis", f"-1, as the rank of the {what} is not known (tf.ensure_shape sets it)", axis)


def _operand(
    backend: Backend, label: str, data: Any, dtypes: tuple[str, ...], logits: Array, name: str
) -> tuple[Array, str]:
    """An operand as an array of the logits' framework, beside them, and the dtype that it came in.

    Plain floats come in the dtype that is computed in.
    """
    import numpy

    if not is_plain(data):
        own = backend_of(data)
        problem = own.problem(data, logits if own is backend else None)
        if problem is not None:
            _fail(TypeError, label, "a plain array", problem)
    try:
        array = backend.read(data)
    except Exception as error:  # whatever the objects in a list raise
        _fail(TypeError, label, "an array", f"a {type(data).__name__} that makes none ({error})")
    plain = isinstance(array, numpy.ndarray)
    dtype = array.dtype.name if plain else backend.dtype(array)
    if isinstance(data, (list, tuple, range)) and 0 in array.shape:
        dtype = dtypes[0]  # an empty list fits any dtype
        array = array.astype(dtype) if plain else backend.cast(array, dtype)
    if dtype not in dtypes:
        _fail(TypeError, label, "dtype " + _choices(dtypes), dtype)
    if plain and dtype in FLOATS:
        with numpy.errstate(all="ignore"):  # a masked label may be any number
            array = array.astype("float32" if name in HALVES else name, copy=False)
    return backend.asarray(array, like=logits), dtype


def _has_shape(label: str, array: Array | None, shape: Shape, expected: Callable[[], str]) -> None:
    """`expected` is called on failure only: compilers trace what is called, and cannot make text of a length."""
    if array is not None and not same(array.shape, shape):
        _fail(ValueError, label, expected(), f"shape {_text(array.shape)}")


def _broadcasts(label: str, array: Array | None, shape: Shape, what: str) -> None:
    if array is None:
        return
    own = tuple(array.shape)
    tail = shape[len(shape) - len(own) :]
    if len(own) > len(shape) or not same([n if n != 1 else m for n, m in zip(own, tail, strict=True)], tail):
        _fail(ValueError, label, f"a shape that broadcasts to that of the {what}, {_text(shape)}", _text(own))


def _fraction(label: str, number: Any, high: float) -> float:
    try:
        converted = -1.0 if _is_no_number(number) else float(number)
    except (TypeError, ValueError):
        converted = -1.0
    if not 0 <= converted <= high:
        _fail(ValueError, label, f"a number from 0 to {high}", repr(number))
    return converted


def _is_no_number(given: Any) -> bool:
    """A truth value or text, either also as NumPy's: `float` would read them."""
    if isinstance(given, (int, float)):  # a compiler's open number too, which is not to be asked for attributes
        return isinstance(given, bool)
    return isinstance(given, (str, bytes)) or getattr(getattr(given, "dtype", None), "kind", "") in tuple("bSU")


def _index(label: str, number: Any) -> int:
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        _fail(TypeError, label, "an integer" + (" or a tuple of integers" if label == "axis" else ""), repr(number))


def _validate(
    backend: Backend,
    loss: Loss,
    what: str,
    logits: Array,
    operands: Operands,
    options: Options,
    axes: tuple[int, ...],
    dtype: str,
) -> None:
    """validate=True: read the values, and raise ValueError that names the first wrong one and its position."""
    import numpy as np

    x = np.asarray(backend.to_numpy(logits), dtype="float64")
    if operands.label_smoothing is not None:
        smoothing = np.asarray(backend.to_numpy(operands.label_smoothing), dtype="float64")
        _first(smoothing, ~((smoothing >= 0) & (smoothing <= 1)), "label_smoothing", "a number from 0 to 1")
    z = backend.to_numpy(operands.targets)
    keep = np.broadcast_to(True if operands.where is None else backend.to_numpy(operands.where), x.shape)
    if options.indices:
        classes = math.prod(x.shape[i] for i in axes)
        kept = np.moveaxis(keep, axes, range(-len(axes), 0)).reshape(*z.shape, classes)
        inside = (z >= 0) & (z < classes)
        names = np.take_along_axis(kept, np.where(inside, z, 0).astype("int64")[..., None], axis=-1)[..., 0]
        taken = kept.any(axis=-1)  # a row with no class left is ignored
        expected = f"class indices from 0 to {classes - 1}"
        if options.ignore_index is not None:
            taken = taken & (z != options.ignore_index)
            expected += f", or ignore_index={options.ignore_index}"
        _first(z, taken & ~inside, "targets", expected)
        _first(z, taken & inside & ~names, "targets", "class indices that where does not mask")
        keep = keep & np.expand_dims(taken, tuple(axes))
    else:
        z = np.asarray(z, dtype="float64")
        _first(z, keep & ~((z >= 0) & (z <= 1)), "targets", "values from 0 to 1")
        if loss.per_example:  # to half the digits of the dtype that they came in or that is computed in
            working = "float32" if options.half else backend.dtype(logits)
            total, tolerance = np.where(keep, z, 0).sum(axis=axes), max(EPSILON.get(dtype, 0), EPSILON[working]) ** 0.5
            wrong = (total > 1 + tolerance) | (keep.all(axis=axes) & (total < 1 - tolerance))
            _first(total, wrong, "targets", "distributions that sum to 1")
    valid = {"logits": ~np.isnan(x), "probs": (x >= 0) & (x <= 1), "log_probs": x <= 0}[what]
    expected = {"logits": "no NaN", "probs": "values from 0 to 1", "log_probs": "values up to 0"}[what]
    _first(x, keep & ~valid, what, expected)


def _first(values: Any, wrong: Any, label: str, expected: str) -> None:
    import numpy

    if wrong.any():
        position = tuple(int(i) for i in numpy.argwhere(wrong)[0])
        _fail(ValueError, label, expected, f"{values[position]} at {_text(position)}")


# --- Layout -----------------------------------------------------------------------------------------------------------


def _class_axis_last(
    xp: Namespace, axes: tuple[int, ...], x: Array
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """How to move the class axes of arrays of this shape to the end, as one, and how to move them back."""
    ndim = len(x.shape)
    if axes == (-1,):
        return _as_it_is, _as_it_is
    order = [i for i in range(ndim) if i - ndim not in axes] + [i + ndim for i in axes]
    back = [order.index(i) for i in range(ndim)]
    moved = [extent(xp, x, i) for i in order]
    flat = [*moved[: ndim - len(axes)], math.prod(moved[ndim - len(axes) :])]

    def last(array: Array) -> Array:
        array = xp.permute_dims(array, tuple(order))
        return array if len(axes) == 1 else xp.reshape(array, tuple(flat))

    def restore(array: Array) -> Array:
        array = array if len(axes) == 1 else xp.reshape(array, tuple(moved))
        return xp.permute_dims(array, tuple(back))

    return last, restore


# --- Error texts ------------------------------------------------------------------------------------------------------


def _fail(kind: type[Exception], label: str, expected: str, received: Any) -> NoReturn:
    raise kind(f"Expected {label}: {expected}. Received: {received}.")


def _text(shape: Any) -> str:
    return "(" + ", ".join("?" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def _choices(names: Any) -> str:
    *head, tail = names
    return f"{', '.join(head)} or {tail}" if head else str(tail)
