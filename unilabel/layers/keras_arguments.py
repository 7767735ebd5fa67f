"""Keras: options that a config holds, and targets as unilabel takes them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from .. import checks
from ..backend import backend_of, is_of_pandas, pandas_values
from ..positives import Positives

Array = Any
HELD = (-(2**31), 2**31 - 1)  # what every Keras backend holds of an integer; neither is an ignore_index

CHECKED = ("weight", "pos_weight", "ignore_index", "label_smoothing", "axis")


def checked(label: str, given: Any) -> Any:
    """An option as an attribute, and as the config can hold it."""
    if label not in ("weight", "pos_weight"):
        return checks.option(label, tuple(given) if isinstance(given, list) else given)  # JSON makes a list of a tuple
    if given is None:
        return None
    if keras.ops.is_tensor(given):
        given = backend_of(given).to_numpy(given)  # it may be on a GPU, or require a gradient
    elif hasattr(given, "__array__"):
        given = np.asarray(given)
    like = np.zeros(())
    return checks.operand(backend_of(like), label, given, checks.NUMBERS, like, "float64")[0].tolist()


class WithOptions:
    """Options are attributes, checked whenever they are set, and in the config."""

    def _set(self, options: dict[str, Any]) -> None:
        self.option_names = tuple(options)
        for option, given in options.items():
            setattr(self, option, given)

    def __setattr__(self, name: str, given: Any) -> None:
        super().__setattr__(name, checked(name, given) if name in CHECKED else given)

    @property
    def options(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in self.option_names}
        # A layer of Keras keeps lists as lists of its own.
        return {name: np.asarray(value).tolist() if isinstance(value, list) else value for name, value in given.items()}


def as_array(given: Any) -> Any:
    """Lists, pandas and all else that has no dtype as an array, of NumPy if no tensor is in it."""
    if isinstance(given, Positives):
        return Positives(as_array(given.indices))
    if is_of_pandas(given):
        given = pandas_values(given)
    elif not hasattr(given, "dtype"):
        tensors = any(map(keras.ops.is_tensor, keras.tree.flatten(given)))
        given = keras.ops.convert_to_tensor(given) if tensors else np.asarray(given)
    if isinstance(given, np.ndarray) and given.dtype in ("int64", "uint64"):
        # JAX would cut off the upper half of the bits, so that an index out of range became one in range.
        given = np.clip(given, *HELD if given.dtype == "int64" else (0, HELD[1])).astype("int32")
    return given


def class_indices(y_true: Array, shape: tuple[int | None, ...], axes: tuple[int, ...]) -> Array:
    """Class indices for logits of this shape as unilabel takes them; distributions as they are."""
    if len(y_true.shape) == len(shape) and all(y_true.shape[i] == 1 != shape[i] for i in axes):
        y_true = keras.ops.squeeze(y_true, axis=axes)
    if len(y_true.shape) < len(shape) and not keras.backend.is_int_dtype(y_true.dtype):
        y_true = keras.ops.cast(y_true, "int32")  # class indices that came as floats
    return y_true


def labelled(y_true: Array, ignore_index: int | None) -> Array | None:
    """Which examples do not have the index that is ignored. None: all, as far as is known without a look."""
    if ignore_index is None:
        return None
    held = np.iinfo(keras.backend.standardize_dtype(y_true.dtype))
    return keras.ops.not_equal(y_true, ignore_index) if held.min <= ignore_index <= held.max else None
