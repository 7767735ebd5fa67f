"""What the formulas ask of an array namespace: functions of the array API standard, and a few beyond it.

A backend makes its namespace of a module that keeps to the standard (https://data-apis.org/array-api): a subclass of
`Extended` with what its framework does in another way, or faster.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Protocol


class Array(Protocol):
    """What the formulas do with an array themselves, beside giving it to functions of the namespace."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> tuple[Any, ...]: ...
    @property
    def ndim(self) -> int: ...

    def __neg__(self) -> Array: ...
    def __add__(self, other: Array | float, /) -> Array: ...
    def __radd__(self, other: Array | float, /) -> Array: ...
    def __sub__(self, other: Array | float, /) -> Array: ...
    def __rsub__(self, other: Array | float, /) -> Array: ...
    def __mul__(self, other: Array | float, /) -> Array: ...
    def __rmul__(self, other: Array | float, /) -> Array: ...
    def __truediv__(self, other: Array | float, /) -> Array: ...
    def __rtruediv__(self, other: Array | float, /) -> Array: ...

    def __eq__(self, other: Array | float, /) -> Array: ...  # type: ignore[override]  # object's is a bool
    def __lt__(self, other: Array | float, /) -> Array: ...
    def __gt__(self, other: Array | float, /) -> Array: ...
    def __ge__(self, other: Array | float, /) -> Array: ...
    def __ne__(self, other: Array | float, /) -> Array: ...  # type: ignore[override]
    def __getitem__(self, key: Any, /) -> Array: ...
    def __invert__(self) -> Array: ...
    def __and__(self, other: Array, /) -> Array: ...
    def __or__(self, other: Array, /) -> Array: ...


Position = Any  # what `position` returns, for `take_along_axis` and `put_along_axis`


class Namespace(Protocol):
    """A namespace of arrays whose classes are along the last axis."""

    # Of the standard:

    @property
    def bool(self) -> Any: ...
    @property
    def float32(self) -> Any: ...
    @property
    def float64(self) -> Any: ...

    def abs(self, x: Array, /) -> Array: ...
    def any(self, x: Array, /, *, axis: int, keepdims: Any = False) -> Array: ...
    def argmax(self, x: Array, /, *, axis: int, keepdims: Any = False) -> Array: ...
    def arange(self, n: Any, /, *, device: Any) -> Array: ...
    def asarray(self, x: Any, /, *, dtype: Any) -> Array: ...
    def broadcast_to(self, x: Array, shape: tuple[Any, ...], /) -> Array: ...
    def concat(self, arrays: list[Array], /) -> Array: ...
    def astype(self, x: Array, dtype: Any, /, *, copy: Any = True) -> Array: ...
    def exp(self, x: Array, /) -> Array: ...
    def expand_dims(self, x: Array, /, *, axis: int) -> Array: ...
    def finfo(self, dtype: Any, /) -> Any: ...
    def isinf(self, x: Array, /) -> Array: ...
    def log(self, x: Array, /) -> Array: ...
    def log1p(self, x: Array, /) -> Array: ...
    def logical_and(self, x: Array, y: Array, /) -> Array: ...
    def logical_or(self, x: Array, y: Array, /) -> Array: ...
    def matmul(self, x: Array, y: Array, /) -> Array: ...
    def max(self, x: Array, /, *, axis: int, keepdims: Any = False) -> Array: ...
    def maximum(self, x: Array, y: Array, /) -> Array: ...
    def minimum(self, x: Array, y: Array, /) -> Array: ...
    def multiply(self, x: Array, y: Array, /) -> Array: ...
    def zeros_like(self, x: Array, /) -> Array: ...
    def ones_like(self, x: Array, /, *, dtype: Any = None) -> Array: ...
    def permute_dims(self, x: Array, axes: tuple[int, ...], /) -> Array: ...
    def reshape(self, x: Array, shape: tuple[Any, ...], /) -> Array: ...
    def squeeze(self, x: Array, /, *, axis: int) -> Array: ...
    def sum(self, x: Array, /, *, axis: int | None = None, keepdims: Any = False) -> Array: ...
    def where(self, condition: Array, x: Any, y: Any, /) -> Array: ...

    # Beyond it, each with a default in `Extended`:

    @property
    def groups(self) -> tuple[str, ...]:
        """The optional groups that it has, see below."""

    @property
    def assume_finite(self) -> Any:
        """True: logits are taken to be finite and indices in range. If not, a loss is not finite, or IndexError."""

    def load(self) -> None:
        """Import the functions: a compiler that traces the formulas cannot."""

    def heaviside(self, x: Array, /) -> Array:
        """1 where x >= 0, else 0."""

    def weigh(self, weight: Array, size: Array, /) -> Array:
        """weight · size, and 0 where an infinite size has weight 0."""

    def log_complement(self, p: Array, /) -> Array:
        """log(1 - p)"""

    def has_nan(self, x: Array, axis: int, /) -> Array:
        """True for an example with a NaN, and maybe for one with infinities of both signs; the axis stays."""

    def weigh_beside(self, weight: Array, size: Array, /) -> Array:
        """The same, and maybe 0 where the size is NaN and has weight 0."""

    def weighted_sum(self, weight: Array, size: Array, axis: int, /) -> Array:
        """The sum of the same along the axis, and what is NaN may be left out."""

    def shifted(self, x: Array, m: Array, /) -> Array:
        """x - m, and 0 where both are infinity; anything where m is NaN or -infinity."""

    def masked(self, x: Array, keep: Array, fill: float, /) -> Array:
        """x, and `fill`, which is not more, where it is masked."""

    def flipped(self, x: Array, z: Array, /) -> Array:
        """x for the label 0, -x for the label 1."""

    def flip(self, x: Array, z: Array, /) -> Array:
        """The same; it may write into x."""

    def classes(self, x: Array, axis: int, /) -> Array:
        """The classes of x: 0, 1, … along the axis, to broadcast to x."""

    def as_index(self, targets: Array, like: Array, /) -> Array:
        """Class indices in the dtype that the functions below take."""

    def take(self, weight: Array, index: Array, /) -> Array:
        """The elements of a vector at class indices."""

    def position(self, x: Array, index: Array, axis: int, /) -> Position:
        """Where x has the classes of these indices, which have the class axis too, with length 1."""

    def take_along_axis(self, x: Array, position: Position, axis: int, /) -> Array:
        """The element of each example that is there; the axis stays, with length 1."""

    def put_along_axis(self, x: Array, position: Position, values: Any, axis: int, /) -> Array:
        """x with other elements there, a number or as `take_along_axis` returns them; it may write into x."""

    def scatter(self, like: Array, index: Array, values: Array, /) -> Array:
        """Zeros, of the shape and dtype of `like`, with values at the classes of these indices, (..., K) or (..., 1).

        Where an example has an index twice, its values are the same.
        """

    def scale(self, x: Array, factor: Array | float, /) -> Array:
        """x · factor; it may write into x."""

    def linear(self, features: Array, weight: Array, bias: Array | None, /) -> Array:
        """features · weightᵀ + bias, of matrices and a vector."""

    def add_product(self, total: Array | None, x: Array, y: Array, /) -> Array:
        """total + xᵀ · y, of matrices, a missing total being 0; it may write into the total."""

    def add_sum(self, total: Array | None, x: Array, features: Array, /) -> Array:
        """total + the sum over the rows of x, as one column; it may write into the total. Features have those rows."""

    def after(self, x: Array, earlier: list[Array], /) -> Array:
        """x, to be computed with after the earlier arrays are there, by a library that computes late."""

    def extent(self, x: Array, axis: int, /) -> Any:
        """The length of an axis, as an array of no dimensions if it is not known at trace time."""

    def longest(self, a: Any, b: Any, /) -> Any:
        """The larger of two lengths, which a compiler may have left open."""

    # The group "autodiff", where a framework differentiates the results:

    def stop_gradient(self, x: Array, /) -> Array: ...

    # The group "sigmoid", each in one go and right to the last digit:

    def sigmoid(self, x: Array, /) -> Array: ...
    def sigmoid_into(self, x: Array, /) -> Array:
        """The same; it may write into x."""

    def softplus(self, x: Array, /) -> Array:
        """log(1 + exp x)"""

    def relu(self, x: Array, /) -> Array: ...
    def lerp(self, a: Array, b: Array, t: Array, /) -> Array:
        """a (1 - t) + b t"""

    # The group "indexing", of no functions: what class indices name is looked up, or found as fast as that.
    # The group "argmax", of none either: the place of the largest is found faster than all are compared with it.

    # The group "softmax":

    def softmax(self, x: Array, axis: int, /) -> Array: ...


class Extended:
    """A module's functions, those that a subclass puts in their place, and defaults for those beyond the standard.

    The module may be given by its name: it is imported when it is first asked for a function, or by `load`.
    """

    groups: tuple[str, ...] = ()
    assume_finite = False

    def __init__(self, base: Any) -> None:
        self._base = base

    def load(self) -> None:
        """Copy all functions now: torch.compile cannot trace `__getattr__`, which keeps one after the other."""
        if isinstance(self._base, str):
            self._base = importlib.import_module(self._base)
            more = {name: found for name, found in vars(self._base).items() if not hasattr(type(self), name)}
            self.__dict__.update(more | self.__dict__)

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__["_base"]
        if isinstance(base, str):
            self.load()
            return getattr(self, name)
        found = self.__dict__[name] = getattr(base, name)
        return found

    def heaviside(self, x: Array) -> Array:
        return self.astype(x >= 0, x.dtype)

    def weigh(self, weight: Array, size: Array) -> Array:
        return self.multiply(self.where(self.logical_and(weight == 0, self.isinf(size)), 0.0, size), weight)

    def log_complement(self, p: Array) -> Array:
        small = p < 0.25  # only there log1p is needed, and XLA's loses seven bits from -0.3 to -0.5 in float64
        of_small, of_large = self.where(small, p, 0.0), self.where(small, 1.0, 1 - p)
        return self.where(small, self.log1p(-of_small), self.log(of_large))

    def has_nan(self, x: Array, axis: int) -> Array:
        total = self.sum(x, axis=axis, keepdims=True)
        return total != total

    def weigh_beside(self, weight: Array, size: Array) -> Array:
        return self.weigh(weight, size)

    def weighted_sum(self, weight: Array, size: Array, axis: int) -> Array:
        return self.sum(self.weigh(weight, size), axis=axis, keepdims=True)

    def shifted(self, x: Array, m: Array) -> Array:
        return self.where(x == math.inf, 0.0, x - m)

    def masked(self, x: Array, keep: Array, fill: float) -> Array:
        return self.where(keep, x, fill)

    def flipped(self, x: Array, z: Array) -> Array:
        return x * (1 - 2 * z)

    def flip(self, x: Array, z: Array) -> Array:
        return self.flipped(x, z)

    def classes(self, x: Array, axis: int) -> Array:
        numbers = self.arange(self.extent(x, axis), device=getattr(x, "device", None))
        for _ in range(-1 - axis):
            numbers = self.expand_dims(numbers, axis=-1)
        return numbers

    def sigmoid_into(self, x: Array) -> Array:
        return self.sigmoid(x)

    # By masks: the standard has no scatter, and leaves indices out of range undefined.

    def as_index(self, targets: Array, like: Array) -> Array:
        return self.astype(targets, self.classes(like, -1).dtype, copy=False)

    def take(self, weight: Array, index: Array) -> Array:
        return self.sum(self.where(self.position(weight, self.expand_dims(index, axis=-1), -1), weight, 0.0), axis=-1)

    def position(self, x: Array, index: Array, axis: int) -> Position:
        return self.classes(x, axis) == index

    def take_along_axis(self, x: Array, position: Position, axis: int) -> Array:
        return self.sum(self.where(position, x, 0.0), axis=axis, keepdims=True)

    def put_along_axis(self, x: Array, position: Position, values: Any, axis: int) -> Array:
        return self.where(position, values, x)

    def scatter(self, like: Array, index: Array, values: Array) -> Array:
        found, classes = self.zeros_like(like), self.classes(like, -1)
        values = self.broadcast_to(self.astype(values, like.dtype), index.shape)
        for k in range(index.shape[-1]):
            found = self.where(classes == index[..., k : k + 1], values[..., k : k + 1], found)
        return found

    def scale(self, x: Array, factor: Array | float) -> Array:
        return x * factor

    def linear(self, features: Array, weight: Array, bias: Array | None) -> Array:
        x = self.matmul(features, self.permute_dims(weight, (1, 0)))
        return x if bias is None else x + bias

    def add_product(self, total: Array | None, x: Array, y: Array) -> Array:
        product = self.matmul(self.permute_dims(x, (1, 0)), y)
        return product if total is None else total + product

    def add_sum(self, total: Array | None, x: Array, features: Array) -> Array:
        return self.add_product(total, x, self.ones_like(features[:, :1]))  # the classes of x may be sharded

    def after(self, x: Array, earlier: list[Array]) -> Array:
        return x

    def extent(self, x: Array, axis: int) -> Any:
        return x.shape[axis]

    def longest(self, a: Any, b: Any) -> Any:
        return max(a, b)


class Finite(Extended):
    """For finite values, in arrays that can be written into, where a selection takes longer than arithmetic."""

    assume_finite = True

    def weigh_beside(self, weight: Array, size: Array) -> Array:
        return self.multiply(size, weight)

    def weighted_sum(self, weight: Array, size: Array, axis: int) -> Array:
        return self.sum(self.multiply(weight, size), axis=axis, keepdims=True)

    def shifted(self, x: Array, m: Array) -> Array:
        return x - m

    def masked(self, x: Array, keep: Array, fill: float) -> Array:
        if fill != -math.inf:
            return self.where(keep, x, fill)
        bound = self.astype(keep, x.dtype)
        bound -= 0.5
        bound *= math.inf
        return self.minimum(x, bound)
