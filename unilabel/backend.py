"""What unilabel asks of a framework (the class Backend), and how it finds the one that a tensor belongs to.

Nothing here imports a framework: whoever has a tensor has imported its framework already, and the tensor's class names
the module that it comes from. Only then is the one file of `unilabel.backends` that knows the framework loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any, Protocol

from . import formulas
from .compilers import constant_in_dynamo
from .formulas import NOTHING, Linear, Loss, Operands, Options
from .namespace import Extended, Namespace
from .sparse import Padded, is_of_scipy, of_scipy

Array = Any  # of any framework: what it has besides what the formulas ask, its own backend knows
ENTRY_POINTS = "unilabel.backends"
BUILT_IN = ("numpy", "torch", "jax", "tensorflow")
ON_REQUEST = ("mlx",)  # have a file too, but `unilabel conformance` runs them only if they are named
EXCHANGED = " (are logits and targets exchanged?)"  # ends what was received, where it looks like it


class AnyArray(Protocol):
    """What type checkers ask of logits, as frameworks need not be installed: lists and Python's scalars are none."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> Any: ...


class Backend:
    """One framework: how it holds arrays, how it differentiates, and how it runs a formula fast.

    The methods here serve any library that keeps to the array API standard; a framework's backend overrides what its
    framework does in another way, or better. None of them holds mathematics of a loss.
    """

    name: str  # of the framework's root module
    autodiff = False  # whether there is a `vjp`

    def version(self) -> str:
        """The framework's version."""
        return str(sys.modules[self.name].__version__)

    def devices(self) -> list[str]:
        """The names of the devices that are here, the default one first."""
        return ["cpu"]

    def device(self, x: Array) -> str:
        """The name of the array's device, as in `devices`."""
        return "cpu"

    def namespace(self, x: Array) -> Namespace:
        """The namespace that the formulas run in where nothing is differentiated."""
        return _extended(x.__array_namespace__())

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        """Why an object of this framework is no array to compute with; None if it is one.

        `beside`: the logits, if they are of this framework too and the object is another operand.
        """
        return None

    def keeps_axis(self, x: Array) -> bool:
        """Whether the formulas are fast, and right, with the class axis of x in its place; if not, it is moved last."""
        return False

    def cache_key(self, x: Array, operands: tuple[Any, ...]) -> Any:
        """A hashable key of the logits and operands (None: not given) on one device, or None.

        Calls with equal keys, shapes and options need the same checks, so that only the first is checked. None: check
        each time.
        """
        return None

    def rankless(self, x: Array) -> bool:
        """Whether the number of dimensions is not known at trace time; then there is `rows`."""
        return False

    def rows(
        self, per_example: bool, x: Array, operands: Operands | None, positives: bool = False
    ) -> tuple[Array, Any, Any, Any]:
        """x as rows and its last axis, operands to match, and what reshapes a gradient and the losses back."""
        raise NotImplementedError

    def dtype(self, x: Array) -> str:
        """The dtype's name in the array API: 'float32', 'bool', …"""
        return getattr(x.dtype, "name", None) or str(x.dtype).rpartition(".")[2]

    def read(self, data: Any) -> Any:
        """An operand as an array: one of this framework stays, plain data becomes NumPy's."""
        if _of_type(type(data)) is self:
            return data
        if is_of_pandas(data):
            return pandas_values(data)
        import numpy

        ma = sys.modules.get("numpy.ma")  # without it nobody has such an array
        if ma is not None and _holds(data, ma.MaskedArray):
            raise TypeError("it holds a numpy MaskedArray, whose mask would be lost")
        return numpy.asarray(data)

    def sparse(self, targets: Any) -> Padded | None:
        """Sparse targets as the formulas take them; None if they are not sparse."""
        return of_scipy(targets) if is_of_scipy(targets) else None

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        """A NumPy array, or an array of this framework, in the same dtype, beside `like` or on a device by name."""
        raise NotImplementedError

    def cast(self, x: Array, dtype: str) -> Array:
        """The array in the dtype of that name."""
        xp = self.namespace(x)
        return xp.astype(x, getattr(xp, dtype), copy=False)

    def to_numpy(self, x: Array) -> Any:
        """The values as a NumPy array; ValueError where there are none yet, under tracing."""
        raise NotImplementedError

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        """The reduced loss, differentiable by the framework's autodiff if it has one."""
        return formulas.value(self.namespace(x), loss, options, x, operands)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        """`formulas.value_and_gradient` or `gradient_and_hessian`; nothing is recorded for autodiff."""
        return formula(self.namespace(x), loss, options, x, operands)

    def linear_inputs(self, inputs: Linear) -> Linear:
        """The last linear layer's inputs as the framework's own layer would take them here."""
        return inputs

    def linear_loss(self, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
        """The reduced loss of the logits of the last linear layer, differentiable if the framework has autodiff."""
        return self.linear_closed_form(loss, options, inputs, operands, NOTHING)[0]

    def linear_closed_form(
        self, loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear
    ) -> tuple[Array, Linear]:
        """The reduced loss, and the needed gradients of its sum; nothing is recorded for autodiff."""
        xp, rows = self.namespace(inputs.features), formulas.rows_of_blocks(inputs)
        call = loss, options, inputs, operands, needed
        value, gradients = formulas.in_blocks(xp, formulas.directly(xp), rows, *call)
        return value, formulas.rounded(xp, gradients, inputs)

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        """One of the activations of `formulas`, differentiable by the framework's autodiff if it has one."""
        return formulas.activation(self.namespace(x), function, x, half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        """function(x), and its derivative times the cotangent by the framework's own autodiff."""
        raise TypeError(f"{self.name} has no autodiff: use unilabel.value_and_grad.")


def dtypes_of(kind: Any, arrays: tuple[Any, ...]) -> Any:
    """The arrays' dtypes (None: not given); None if one is not of just this class, but of another or a subclass."""
    found = []
    for array in arrays:
        if array is not None and type(array) is not kind:
            return None
        found.append(None if array is None else array.dtype)
    return tuple(found)


@functools.cache
def _extended(library: Any) -> Namespace:
    return Extended(library)


def backend_of(logits: Any, *others: Any, label: str = "logits") -> Backend:
    """The backend of the logits, or of what `label` names instead.

    TypeError if they are of no known framework, or if others are of another one.

    The others, targets first, may be plain data as well: NumPy arrays, Python scalars, lists, None, pandas' Series and
    DataFrames.
    """
    backend = _of_type(type(logits))
    if backend is None:
        exchanged = EXCHANGED if label == "logits" and others and _of_type(type(others[0])) else ""
        raise TypeError(
            f"Expected {'' if label == 'logits' else f'{label}: '}an array of {', '.join(BUILT_IN)} or of another "
            f"library with the array API. Received: {type_name(logits)}{exchanged}."
        )
    for other in others:
        found = backend if other is None or type(other) is type(logits) else _of_type(type(other))
        if found is not backend and not is_plain_data(other) and (found is None or found.name != "numpy"):
            may_be = label == "logits" and other is others[0] and backend.name == "numpy" and found
            exchanged = EXCHANGED if may_be else ""
            raise TypeError(
                f"Expected arrays of one framework, and NumPy arrays, scalars or lists beside the {label}. Received: "
                f"{backend.name} {label} with {f'a {found.name} array' if found else type_name(other)}{exchanged}."
            )
    return backend


def type_name(x: Any) -> str:
    """As an error names it."""
    name = type(x).__name__
    is_of_keras = name == "Variable" and type(x).__module__.partition(".")[0] == "keras"
    return "Variable of Keras (give its value)" if is_of_keras else name


def is_plain_data(data: Any) -> bool:
    """Whether this is a scalar of Python's or NumPy's, a sequence of Python's, or of pandas or SciPy."""
    if type(data) in (bool, int, float, list, tuple, range):
        return True
    return (type(data).__module__ == "numpy" and data.ndim == 0) or is_of_pandas(data) or is_of_scipy(data)


def is_of_pandas(data: Any) -> bool:
    """Whether this is a Series, a DataFrame, an index or an array of pandas, which is told by its name alone."""
    return _is_named_pandas(type(data))


@constant_in_dynamo  # it cannot trace a method of a name
def _is_named_pandas(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "pandas"


def pandas_values(data: Any) -> Any:
    """What a Series or DataFrame holds, its index left aside; where a number is missing (NA), NaN."""
    array = data.to_numpy()
    dtypes = data.dtypes if data.ndim == 2 else [data.dtype]
    if array.dtype == object and all(dtype.kind in "biuf" for dtype in dtypes):  # NA, or columns of several dtypes
        return data.to_numpy("float64", na_value=float("nan"))
    return array


def _holds(data: Any, kind: type) -> bool:
    return isinstance(data, (list, tuple)) and any(isinstance(item, kind) or _holds(item, kind) for item in data)


def is_number(option: Any) -> bool:
    """Whether an option is for Python to read: no array of a framework that traces or differentiates."""
    if type(option) is float or option is None or is_plain_data(option):
        return True
    backend = _of_type(type(option))
    return backend is None or backend.name == "numpy"


def backend_named(name: str) -> Backend:
    """The backend of that name, its framework imported: ModuleNotFoundError if it is not installed.

    A name that is neither built in nor registered is taken for a module of arrays that keep to the array API standard.
    """
    module = _module_of(name)
    if module is not None:
        backend: Backend = importlib.import_module(module).backend
        return backend
    importlib.import_module(name)
    return _array_api(name)


_names: dict[type, str] = {}  # which attribute of _loaded is the backend of a type
MOST_TYPES = 256  # in _names: they would be kept for ever, and programs make types as they run
_loaded: Any = types.SimpleNamespace(none=None)


def _of_type(kind: type) -> Backend | None:
    found: Backend | None = getattr(_loaded, _name_of(kind))
    return found


@constant_in_dynamo  # it could not trace an import
def _name_of(kind: type) -> str:
    """Where in _loaded the backend of a type is; it is there by then. (A name, as a constant has to be a plain one.)"""
    name = _names.get(kind)
    if name is None:
        backend = _search(kind)
        name = "none" if backend is None else backend.name
        setattr(_loaded, name, backend)
        if len(_names) >= MOST_TYPES:
            _names.clear()
        _names[kind] = name  # last: another thread that finds it here looks into _loaded
    return name


def _search(kind: type) -> Backend | None:
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__ if base.__module__ != "builtins"]
    for root in roots:
        module = _module_of(root)
        if module is not None:
            backend: Backend = importlib.import_module(module).backend
            return backend
    if hasattr(kind, "__array_namespace__") or "dask" in roots:
        return _array_api(roots[0])
    return None


def _module_of(root: str) -> str | None:
    """The module with the backend of a framework: of our own files, or one registered as an entry point."""
    if root in BUILT_IN or root in ON_REQUEST:
        return f"{__package__}.backends.{root}"
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS, name=root):
        return entry.value
    return None


_others: dict[str, Backend] = {}


def _array_api(root: str) -> Backend:
    if root not in _others:
        # Of two threads that come here at once the first wins: backends are told apart by identity.
        _others.setdefault(root, importlib.import_module(f"{__package__}.backends.array_api").ArrayAPIBackend(root))
    return _others[root]
