"""Every check of a call, and every error text: what was expected, what came, and the choices."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn, get_args

from .backend import EXCHANGED, Array, Backend, backend_of, is_of_pandas, is_plain_data
from .formulas import Linear, Loss, Operands, Options, Reduction
from .lengths import Shape, product, same

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NUMBERS = (*INTEGERS, *FLOATS, "bool")
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def fail(kind: type[Exception], label: str, expected: str, received: Any) -> NoReturn:
    raise kind(f"Expected {label}: {expected}. Received: {received}.")


def shape_text(shape: Any) -> str:
    return "(" + ", ".join("?" if n is None else f"{n}" for n in shape) + ("," if len(shape) == 1 else "") + ")"


def choices(names: Any) -> str:
    *head, tail = names
    return f"{', '.join(head)} or {tail}" if head else str(tail)


def check_array(backend: Backend, x: Array, label: str) -> str:
    """The name of the dtype of a floating-point array."""
    problem = backend.problem(x)
    if problem is not None:
        fail(TypeError, label, f"a plain array of {backend.name}", problem)
    name = backend.dtype(x)
    if name not in FLOATS:
        exchanged = EXCHANGED if label == "logits" and name in (*INTEGERS, "bool") else ""
        fail(TypeError, label, "dtype " + choices(FLOATS), name + exchanged)
    return name


def option(label: str, given: Any) -> Any:
    """An option as an object keeps it, checked as far as can be without logits: a plain value."""
    if label == "reduction":
        check_reduction(given)
    elif label == "label_smoothing":
        return fraction(label, given, 1.0)
    elif label == "ignore_index" and given is not None:
        return check_ignore_index(given)
    elif label == "axis":
        axes = _integers(given)
        if not axes or len(set(axes)) < len(axes):
            fail(ValueError, label, "an axis, or a tuple of distinct ones", str(given))
        return axes if isinstance(given, tuple) else axes[0]
    return given


def check_reduction(reduction: Any) -> None:
    if reduction not in REDUCTIONS:
        fail(ValueError, "reduction", choices(map(repr, REDUCTIONS)), repr(reduction))


def check_ignore_index(given: Any) -> int:
    index = integer("ignore_index", given)
    if not -(2**31) < index < 2**31 - 1:
        fail(ValueError, "ignore_index", "an integer between -2**31 and 2**31 - 1, which are not included", index)
    return index


def _integers(axis: Any) -> tuple[int, ...]:
    return tuple(integer("axis", i) for i in (axis if isinstance(axis, tuple) else (axis,)))


def class_axes(axis: Any, ndim: int, what: str, per_example: bool) -> tuple[int, ...]:
    """The class axes, negative and in the order given. One element of a loss per element has none."""
    axes = _integers(axis)
    if ndim == 0 and not per_example and axes in ((-1,), (0,)):
        return ()
    if not axes or not all(-ndim <= i < ndim for i in axes):
        which = f"one of the {what}' axes, {-ndim} to {ndim - 1}" if ndim else f"{what} with at least one axis"
        fail(ValueError, "axis", f"{which}, or a tuple of them", f"{axis} for {ndim} dimensions")
    axes = tuple(i - ndim if i >= 0 else i for i in axes)
    if len(set(axes)) < len(axes):
        fail(ValueError, "axis", "distinct axes", str(axis))
    return axes


def only_last_axis(axis: Any, what: str) -> None:
    if axis not in (-1, (-1,)):
        fail(ValueError, "axis", f"-1, as the rank of the {what} is not known (tf.ensure_shape sets it)", axis)


def operand(
    backend: Backend, label: str, data: Any, dtypes: tuple[str, ...], logits: Array, name: str
) -> tuple[Array, str]:
    """An operand as an array of the logits' framework, beside them, and the dtype that it came in.

    Plain floats come in the dtype that is computed in.
    """
    import numpy

    array, dtype, plain = _read(backend, label, data, logits)
    if isinstance(data, (list, tuple, range)) and 0 in array.shape:
        dtype = dtypes[0]  # an empty list fits any dtype
        array = array.astype(dtype) if plain else backend.cast(array, dtype)
    if dtype not in dtypes:
        missing = " with missing values (fillna)" if is_of_pandas(data) and data.isna().any(axis=None) else ""
        fail(TypeError, label, "dtype " + choices(dtypes), dtype + missing)
    if plain and dtype in FLOATS:
        with numpy.errstate(all="ignore"):  # a masked label may be any number
            array = array.astype("float32" if name in HALVES else name, copy=False)
    return backend.asarray(array, like=logits), dtype


def _read(backend: Backend, label: str, data: Any, logits: Array) -> tuple[Array, str, bool]:
    """An operand as an array, its dtype, and whether the array is NumPy's."""
    import numpy

    if not is_plain_data(data):
        own = backend_of(data)
        problem = own.problem(data, logits if own is backend else None)
        if problem is not None:
            fail(TypeError, label, "a plain array", problem)
    try:
        array = backend.read(data)
    except Exception as error:  # whatever the objects in a list raise
        fail(TypeError, label, "an array", f"a {type(data).__name__} that NumPy cannot convert ({error})")
    plain = isinstance(array, numpy.ndarray)
    return array, array.dtype.name if plain else backend.dtype(array), plain


def linear_inputs(backend: Backend, inputs: Linear) -> tuple[Linear, str]:
    """The last linear layer's inputs as arrays of the features' framework, and the name of their dtype."""
    features, weight, bias = inputs
    if backend.rankless(features):
        fail(ValueError, "features", "a known number of dimensions (tf.ensure_shape sets it)", "an unknown one")
    if weight is None:
        fail(TypeError, "linear_weight", "an array", "None")
    problem = backend.problem(features)
    if problem is not None:
        fail(TypeError, "features", f"a plain array of {backend.name}", problem)
    weight = _layer_array(backend, "linear_weight", weight, features)
    bias = None if bias is None else _layer_array(backend, "linear_bias", bias, features)
    inputs = backend.linear_inputs(Linear(features, weight, bias))
    name = check_array(backend, inputs.features, "features")
    for label, array in inputs._asdict().items():
        if array is not None and backend.dtype(array) != name:
            fail(TypeError, label, f"the dtype of the features, {name}", backend.dtype(array))

    features, weight, bias = inputs
    if len(features.shape) == 0 or features.shape[-1] == 0:
        fail(ValueError, "features", "shape (..., D), with at least one feature", shape_text(features.shape))
    length = features.shape[-1:]
    if len(weight.shape) != 2 or not same(weight.shape[1:], length):
        turned = len(weight.shape) == 2 and same(weight.shape[:1], length)
        hint = "is it transposed? one row for each class, as torch.nn.Linear has it; or are the features logits?"
        expected = f"shape (C, {shape_text(length)[1:-2]}), as the features have {shape_text(features.shape)}"
        fail(ValueError, "linear_weight", expected, shape_text(weight.shape) + (f" ({hint})" if turned else ""))
    classes = class_count("linear_weight", weight.shape, (0,), 0)
    has_shape("linear_bias", bias, weight.shape[:1], lambda: f"one number for each of {classes} classes")
    return inputs, name


def _layer_array(backend: Backend, label: str, data: Any, features: Array) -> Array:
    """An array of the linear layer beside the features. Lists come in their dtype; arrays have to have it."""
    array, dtype, _ = _read(backend, label, data, features)
    if is_plain_data(data) and dtype in NUMBERS:
        return backend.cast(backend.asarray(array, like=features), backend.dtype(features))
    if dtype not in FLOATS:
        fail(TypeError, label, "dtype " + choices(FLOATS), dtype)
    return backend.asarray(array, like=features)


def has_shape(
    label: str, array: Array | None, shape: Shape, expected: Callable[[], str], hint: Callable[[], str] = str
) -> None:
    """The texts are asked for on failure only: compilers trace what is called, and cannot make text of a length."""
    if array is not None and not same(array.shape, shape):
        fail(ValueError, label, expected(), f"shape {shape_text(array.shape)}{hint()}")


def has_no_axis(label: str, array: Array | None) -> None:
    has_shape(label, array, (), lambda: "a number, or an array of no dimensions")


def has_one_axis(label: str, array: Array) -> None:
    if len(array.shape) != 1:
        fail(ValueError, label, "one weight for each class", f"shape {shape_text(array.shape)}")


def broadcasts(label: str, array: Array | None, shape: Shape, what: str) -> None:
    if array is None:
        return
    own = tuple(array.shape)
    tail = shape[len(shape) - len(own) :]
    if len(own) > len(shape) or not same([n if n != 1 else m for n, m in zip(own, tail, strict=True)], tail):
        fail(ValueError, label, f"a shape that broadcasts to that of the {what}, {shape_text(shape)}", shape_text(own))


def fraction(label: str, number: Any, high: float) -> float:
    try:
        converted = -1.0 if _is_bool_or_text(number) else float(number)
    except (TypeError, ValueError):
        converted = -1.0
    if not 0 <= converted <= high:
        fail(ValueError, label, f"a number from 0 to {high}", repr(number))
    return converted


def _is_bool_or_text(given: Any) -> bool:
    """A bool or text, of Python or NumPy, which `float` would convert."""
    if isinstance(given, (int, float)):  # a compiler's open number too, which is not to be asked for attributes
        return isinstance(given, bool)
    return isinstance(given, (str, bytes)) or getattr(getattr(given, "dtype", None), "kind", "") in tuple("bSU")


def integer(label: str, number: Any) -> int:
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        fail(TypeError, label, "an integer" + (" or a tuple of integers" if label == "axis" else ""), repr(number))


def takes_positives(loss: Loss, received: str) -> None:
    if loss.per_example:
        takers = "multilabel_logistic_loss, binary_cross_entropy and linear_multilabel_logistic_loss"
        expected = f"class indices or a distribution, as the classes of {loss.name} exclude each other"
        fail(TypeError, "targets", expected, f"{received}, for which there are {takers}")


def sparse_shape(loss: Loss, own: Shape | None, shape: Shape | None, axis: Any, in_positives: bool) -> None:
    """A sparse array of this shape; None: a ragged one, of indices."""
    if own is None:
        return
    if in_positives:
        fail(TypeError, "targets", "Positives of indices, or a sparse array as it is", "Positives of a sparse array")
    if shape is None:
        return
    if class_axes(axis, len(shape), loss.takes, True) != (-1,):
        fail(ValueError, "axis", "-1 for sparse targets (Positives take any axis)", axis)
    if not same(own, shape):
        fail(ValueError, "targets", f"the shape of the {loss.takes}, {shape_text(shape)}", f"shape {shape_text(own)}")


def elementwise_shapes(loss: Loss, shape: Shape, axes: tuple[int, ...], operands: Operands, positives: bool) -> None:
    """The operands of an elementwise loss."""
    if positives:
        batch: Shape = tuple(n for i, n in enumerate(shape, -len(shape)) if i not in axes)
        labels, takes = (*batch, *operands.targets.shape[-1:]), (*batch, "K")
        text = "labels of shape {}, for {} of shape {}"
        has_shape(
            "targets", operands.targets, labels, lambda: text.format(shape_text(takes), loss.takes, shape_text(shape))
        )
    else:
        has_shape("targets", operands.targets, shape, lambda: f"the shape of the {loss.takes}, {shape_text(shape)}")
    broadcasts("weight", operands.weight, shape, loss.takes)
    broadcasts("pos_weight", operands.pos_weight, shape, loss.takes)


def per_example_shapes(
    loss: Loss,
    shape: Shape,
    axes: tuple[int, ...],
    operands: Operands,
    dtype: str,
    options: Options,
    axis: Any,
    ignore_index: Any,
) -> Options:
    """The operands of a loss of mutually exclusive classes; the options with the kind of its targets."""
    batch: Shape = tuple(n for i, n in enumerate(shape, -len(shape)) if i not in axes)
    classes = class_count(loss.takes, shape, axes, axis)

    def kinds() -> str:
        return f"integer class indices of shape {shape_text(batch)} or a distribution of shape {shape_text(shape)}"

    def hint() -> str:
        if dtype in FLOATS and same(operands.targets.shape[:-1], shape):
            return EXCHANGED
        fits = len(shape) > 2 and same(operands.targets.shape, (shape[0], *shape[2:]))
        return " (did you mean axis=1?)" if fits else ""

    indices = len(operands.targets.shape) == len(batch)
    has_shape("targets", operands.targets, batch if indices else shape, kinds, hint)
    if indices and dtype not in INTEGERS:
        convert = " (convert class indices held as floats: .astype(int))" if dtype in FLOATS else ""
        fail(TypeError, "targets", kinds(), f"{dtype} of shape {shape_text(batch)}{convert}")
    if ignore_index is not None:
        if not indices:
            fail(ValueError, "ignore_index", "None, as the targets are a distribution (mask with where)", ignore_index)
        ignore_index = check_ignore_index(ignore_index)
        bits = int(dtype.removeprefix("u").removeprefix("int"))
        low, high = (0, 2**bits) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        ignore_index = ignore_index if low <= ignore_index < high else None  # the targets' dtype cannot hold it
    has_shape("weight", operands.weight, (classes,), lambda: f"one weight for each of {classes} classes")
    has_shape("sample_weight", operands.sample_weight, batch, lambda: f"one weight per example, {shape_text(batch)}")
    return options._replace(indices=indices, ignore_index=ignore_index)


def class_count(label: str, shape: Shape, axes: tuple[int, ...], axis: Any) -> Any:
    """The number of classes, at least one."""
    classes = product(shape[i] for i in axes)
    if classes == 0:
        fail(ValueError, label, "at least one class", f"shape {shape_text(shape)} with class axis {axis}")
    return classes


def values(
    backend: Backend,
    loss: Loss,
    logits: Array,
    operands: Operands,
    options: Options,
    axes: tuple[int, ...],
    dtype: str,
) -> None:
    """validate=True: read the values, and raise ValueError that names the first wrong one and its position."""
    import numpy as np

    what = loss.takes
    x = np.asarray(backend.to_numpy(logits), dtype="float64")
    keep = target_values(backend, loss, x.shape, backend.dtype(logits), operands, options, axes, dtype)
    valid = {"logits": ~np.isnan(x), "probs": (x >= 0) & (x <= 1), "log_probs": x <= 0}[what]
    expected = {"logits": "no NaN", "probs": "values from 0 to 1", "log_probs": "values of at most 0"}[what]
    _first(x, keep & ~valid, what, expected)


def linear_values(backend: Backend, inputs: Linear) -> None:
    """The same of the last linear layer's inputs."""
    import numpy as np

    for label, array in inputs._asdict().items():
        if array is not None:
            values = np.asarray(backend.to_numpy(array), dtype="float64")
            _first(values, np.isnan(values), label, "no NaN")


def target_values(
    backend: Backend,
    loss: Loss,
    shape: Shape,
    name: str,
    operands: Operands,
    options: Options,
    axes: tuple[int, ...],
    dtype: str,
) -> Any:
    """The same of the operands, for logits of this shape and dtype: where elements of the logits take part."""
    import numpy as np

    if operands.label_smoothing is not None:
        smoothing = np.asarray(backend.to_numpy(operands.label_smoothing), dtype="float64")
        _first(smoothing, ~((smoothing >= 0) & (smoothing <= 1)), "label_smoothing", "a number from 0 to 1")
    z = backend.to_numpy(operands.targets)
    keep = np.broadcast_to(True if operands.where is None else backend.to_numpy(operands.where), shape)
    if options.indices:
        classes = math.prod(shape[i] for i in axes)
        kept = np.moveaxis(keep, axes, range(-len(axes), 0)).reshape(*z.shape, classes)
        inside = (z >= 0) & (z < classes)
        index_kept = np.take_along_axis(kept, np.where(inside, z, 0).astype("int64")[..., None], axis=-1)[..., 0]
        taken = kept.any(axis=-1)  # a row with no class left is ignored
        expected = f"class indices from 0 to {classes - 1}"
        if options.ignore_index is not None:
            taken = taken & (z != options.ignore_index)
            expected += f", or ignore_index={options.ignore_index}"
        _first(z, taken & ~inside, "targets", expected)
        _first(z, taken & inside & ~index_kept, "targets", "class indices where `where` is True")
        return keep & np.expand_dims(taken, tuple(axes))
    if options.positives:
        classes = math.prod(shape[i] for i in axes)
        taken = np.expand_dims(keep.any(axis=axes), -1)
        outside = (z < -1) | (z >= classes)
        _first(z, taken & outside, "targets", f"labels from 0 to {classes - 1}, or -1, which pads")
        if operands.values is not None:
            values = np.asarray(backend.to_numpy(operands.values), dtype="float64")
            _first(values, taken & ~((values >= 0) & (values <= 1)), "targets", "values from 0 to 1")
        return keep
    z = np.asarray(z, dtype="float64")
    _first(z, keep & ~((z >= 0) & (z <= 1)), "targets", "values from 0 to 1")
    if loss.per_example:  # to half the digits of the dtype that they came in or that is computed in
        working = "float32" if options.half else name
        total, tolerance = np.where(keep, z, 0).sum(axis=axes), max(EPSILON.get(dtype, 0), EPSILON[working]) ** 0.5
        wrong = (total > 1 + tolerance) | (keep.all(axis=axes) & (total < 1 - tolerance))
        _first(total, wrong, "targets", "distributions that sum to 1")
    return keep


def _first(values: Any, wrong: Any, label: str, expected: str) -> None:
    import numpy

    if wrong.any():
        position = tuple(int(i) for i in numpy.argwhere(wrong)[0])
        fail(ValueError, label, expected, f"{values[position]} at {shape_text(position)}")
