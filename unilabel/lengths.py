"""Lengths of axes: the one place that knows their kinds, and all that is ever asked of them.

A length is an int; or an int that a compiler or exporter leaves open (torch.SymInt, a dimension of jax.export), which
takes part in arithmetic, but whose type and attributes must not be asked for: that breaks the compiler's graph, or
closes what was to stay open; or None, where TensorFlow does not know it at trace time: then the namespace's `extent`
gives it as an array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Length = Any
Shape = tuple[Length, ...]


def same(a: Sequence[Length], b: Sequence[Length]) -> bool:
    """Whether two shapes are equal, as far as their lengths are known."""
    return len(a) == len(b) and all(n is None or m is None or n == m for n, m in zip(a, b, strict=True))


def are_known(*lengths: Length) -> bool:
    """Whether these are plain numbers. Not for what a compiler traces, which would close an open length."""
    return {int}.issuperset(map(type, lengths))


def product(lengths: Iterable[Length]) -> Length:
    """The product of lengths; None if one of them is unknown."""
    result: Length = 1
    for n in lengths:
        if n is None:
            return None
        result = result * n
    return result


def count(xp: Any, x: Any, axes: Iterable[int]) -> Any:
    """How many elements these axes have, 1 for none: a number to divide by, or an array in the dtype of x."""
    known, unknown = 1, []
    for axis in axes:
        n = x.shape[axis]
        if n is None:
            unknown.append(xp.astype(xp.extent(x, axis), x.dtype))
        else:
            known = known * n
    if unknown:
        return xp.maximum(math.prod(unknown, start=known), 1)
    return xp.longest(known, 1)
