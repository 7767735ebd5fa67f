"""The sigmoid, the softmax and their logarithms, of tensors of any framework."""

from __future__ import annotations

from typing import Any, TypeVar

from . import formulas
from .backend import AnyArray
from .canonical import canonical_activation
from .compilers import as_it_is_in_autograph

Array = TypeVar("Array", bound=AnyArray)


def sigmoid(x: Array) -> Array:
    """The logistic function, `1 / (1 + exp(-x))`, exact in both tails.

    Args:
        x: an array of any framework, shape and floating dtype.

    Returns:
        Values from 0 to 1, each for itself: they do not sum to 1. Of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.

    >>> import numpy as np
    >>> print(sigmoid(np.array([0.0, 2.0, -50.0])))
    [5.00000000e-01 8.80797078e-01 1.92874985e-22]
    """
    return _activation(formulas.sigmoid, x, None)


def log_sigmoid(x: Array) -> Array:
    """The logarithm of the logistic function, `-log(1 + exp(-x))`, without the loss of digits of `log(sigmoid(x))`.

    Args:
        x: an array of any framework, shape and floating dtype.

    Returns:
        Values up to 0, of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.

    >>> import numpy as np
    >>> print(log_sigmoid(np.array([0.0, 50.0, -1000.0])))
    [-6.93147181e-01 -1.92874985e-22 -1.00000000e+03]
    """
    return _activation(formulas.log_sigmoid, x, None)


def softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """The softmax, `exp(x_c) / Σ_k exp(x_k)` along the class axis.

    Args:
        x: an array of any framework and floating dtype. -inf is a class that cannot be.
        axis: the class axis, or a tuple of axes read as one.

    Returns:
        Values from 0 to 1 that sum to 1 along the axis, of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.
        ValueError: x has no such axis, or no class along it.

    >>> import numpy as np
    >>> print(softmax(np.array([1000.0, 1000.0, -np.inf])))
    [0.5 0.5 0. ]
    """
    return _activation(formulas.softmax, x, axis)


def log_softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """The logarithm of the softmax, `x_c - log Σ_k exp(x_k)` along the class axis, exact where p is close to 1.

    Args:
        x: an array of any framework and floating dtype. -inf is a class that cannot be.
        axis: the class axis, or a tuple of axes read as one.

    Returns:
        Values up to 0, of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.
        ValueError: x has no such axis, or no class along it.

    >>> import numpy as np
    >>> print(log_softmax(np.array([17.0, 0.0])))
    [-4.13993763e-08 -1.70000000e+01]
    """
    return _activation(formulas.log_softmax, x, axis)


def _activation(function: Any, x: Any, axis: Any) -> Any:
    backend, half, x, restore = canonical_activation(x, axis)
    return restore(backend.activation(function, x, half))


for _function in (sigmoid, log_sigmoid, softmax, log_softmax):
    as_it_is_in_autograph(_function)
