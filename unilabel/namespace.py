"""What the formulas ask of an array namespace: functions of the array API standard, and a few beyond it.

A backend makes its namespace of a module that keeps to the standard (https://data-apis.org/array-api): a subclass of
`Extended` with what its framework does in another way, or faster.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

Array = Any
Position = Any  # where each example has its class: `position` gives it to the two functions after it


class Namespace(Protocol):
    """A namespace of arrays whose classes are along the last axis."""

    # Of the standard:
    bool: Any
    float32: Any
    float64: Any
    abs: Callable[[Array], Array]
    any: Callable[..., Array]
    arange: Callable[..., Array]
    astype: Callable[..., Array]
    exp: Callable[[Array], Array]
    expand_dims: Callable[..., Array]
    isinf: Callable[[Array], Array]
    log: Callable[[Array], Array]
    log1p: Callable[[Array], Array]
    logical_and: Callable[[Array, Array], Array]
    logical_or: Callable[[Array, Array], Array]
    max: Callable[..., Array]
    maximum: Callable[[Array, Array], Array]
    minimum: Callable[[Array, Array], Array]
    multiply: Callable[[Array, Array], Array]
    ones_like: Callable[..., Array]
    permute_dims: Callable[[Array, tuple[int, ...]], Array]
    reshape: Callable[[Array, tuple[int, ...]], Array]
    squeeze: Callable[..., Array]
    sum: Callable[..., Array]
    where: Callable[[Array, Any, Any], Array]

    # Beyond it, each with a default in `Extended`:
    groups: tuple[str, ...]  # the optional groups that it has, see below
    assume_finite: Any  # True: logits are finite, class indices in range; `position` may raise IndexError if not

    def heaviside(self, x: Array) -> Array:
        """1 where x >= 0, else 0."""

    def weigh(self, weight: Array, size: Array) -> Array:
        """weight · size, and 0 where an infinite size has weight 0."""

    def classes(self, x: Array) -> Array:
        """The classes of x: 0, 1, …"""

    def as_index(self, targets: Array, like: Array) -> Array:
        """Class indices in the dtype that the functions below take."""

    def take(self, weight: Array, index: Array) -> Array:
        """The elements of a vector at class indices."""

    def position(self, x: Array, index: Array) -> Position:
        """Where x has the classes of these indices."""

    def take_along_axis(self, x: Array, position: Position) -> Array:
        """The element of each example."""

    def put_along_axis(self, x: Array, position: Position, values: Any) -> Array:
        """x with other elements in their place; it may write into x."""

    def extent(self, x: Array, axis: int) -> Any:
        """The length of an axis whose length is not known before it runs, as an array of no dimensions."""

    def longest(self, a: Any, b: Any) -> Any:
        """The larger of two lengths, which a compiler may have left open."""

    # The group "autodiff": results may be differentiated by the framework.
    stop_gradient: Callable[[Array], Array]
    # The group "sigmoid": each in one go, right to the last digit.
    sigmoid: Callable[[Array], Array]
    softplus: Callable[[Array], Array]  # log(1 + exp x)
    relu: Callable[[Array], Array]
    lerp: Callable[[Array, Array, Array], Array]  # a (1 - t) + b t
    # The group "softmax":
    softmax: Callable[[Array], Array]


class Extended:
    """A module's functions, those that a subclass puts in their place, and defaults for those beyond the standard.

    The module may be given by its name: it is imported when it is first asked for a function, or by `load`.
    """

    groups: tuple[str, ...] = ()
    assume_finite = False

    def __init__(self, base: Any) -> None:
        self._base = base

    def load(self) -> None:
        """Take over all functions at once: a compiler that traces them may not write down one after the other."""
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
        if self.assume_finite:
            return self.multiply(size, weight)
        return self.multiply(self.where(self.logical_and(weight == 0, self.isinf(size)), 0.0, size), weight)

    def classes(self, x: Array) -> Array:
        n = x.shape[-1]
        return self.arange(self.extent(x, -1) if n is None else n, device=getattr(x, "device", None))

    # By masks, as the standard writes to no place, and reads from none that may be out of range.

    def as_index(self, targets: Array, like: Array) -> Array:
        return self.astype(targets, self.classes(like).dtype, copy=False)

    def take(self, weight: Array, index: Array) -> Array:
        return self.sum(self.where(self.position(weight, index), weight, 0.0), axis=-1)

    def position(self, x: Array, index: Array) -> Position:
        return self.classes(x) == self.expand_dims(index, axis=-1)

    def take_along_axis(self, x: Array, position: Position) -> Array:
        return self.sum(self.where(position, x, 0.0), axis=-1)

    def put_along_axis(self, x: Array, position: Position, values: Any) -> Array:
        return self.where(position, values if isinstance(values, float) else self.expand_dims(values, axis=-1), x)

    def longest(self, a: Any, b: Any) -> Any:
        return max(a, b)
