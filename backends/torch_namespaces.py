"""PyTorch's functions for the formulas: eager, for a compiler, for autodiff, and for DTensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..backend import Array
from ..namespace import Extended, Finite, Namespace

COMPAT = "array_api_compat.torch"  # whose import takes longer than a small call, and which eager ones can do without


class _Standard(Extended):
    """Functions of the standard alone, where torch does not differentiate: DTensors have few other kernels."""

    stop_gradient = staticmethod(torch.Tensor.detach)
    concat = staticmethod(torch.cat)  # torch.concat cannot be batched

    def scatter(self, like: Array, index: Array, values: Array) -> Array:
        return torch.zeros_like(like).scatter(-1, index, values.to(like.dtype).expand(index.shape))

    def longest(self, a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor):  # torch.jit.trace makes tensors of lengths
            return torch.clamp(a, min=b)
        return torch.sym_max(a, b)


class _Differentiable(_Standard):
    """The same where torch differentiates, transforms or exports what it sees."""

    groups: tuple[str, ...] = ("autodiff",)


class _Traced(_Standard):
    """For torch.compile, where forward and backward are both formulas.

    Inductor makes loops of vectors of them, but not of what is looked up by an index, and slow ones where dtypes have
    other widths than the logits': so class indices are masks, of int32.
    """

    groups = ("indexing",)

    def isinf(self, x: Array) -> Array:
        return torch.abs(x) == math.inf

    def any(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return torch.sum(x.to(torch.float32), axis, keepdims) > 0

    def log_complement(self, p: Array) -> Array:
        return torch.log1p(-p)

    def classes(self, x: Array, axis: int) -> Array:
        return torch.arange(x.shape[axis], dtype=torch.int32, device=x.device).view(-1, *[1] * (-1 - axis))

    def as_index(self, targets: Array, like: Array) -> Array:
        return targets.to(torch.int64)  # until it is known to be in range

    def position(self, x: Array, index: Array, axis: int) -> Array:
        return self.classes(x, axis) == index.to(torch.int32)


class _Eager(Extended):
    """Torch's own functions, and kernels that do several steps at once."""

    groups: tuple[str, ...] = ("sigmoid", "indexing", "argmax")
    sigmoid = staticmethod(torch.sigmoid)
    sigmoid_into = staticmethod(torch.sigmoid_)
    expand_dims = staticmethod(torch.unsqueeze)
    max = staticmethod(torch.amax)
    argmax = staticmethod(torch.argmax)
    multiply = staticmethod(torch.mul)
    take = staticmethod(torch.take)
    linear = staticmethod(torch.nn.functional.linear)

    def add_product(self, total: Array | None, x: Array, y: Array) -> Array:
        return torch.mm(x.t(), y) if total is None else total.addmm_(x.t(), y)

    def add_sum(self, total: Array | None, x: Array, features: Array) -> Array:
        column = torch.sum(x, 0).unsqueeze(1)
        return column if total is None else total.add_(column)

    def asarray(self, x: Any, dtype: Any) -> Array:
        return torch.asarray(x, dtype=dtype, device="cpu")  # for blocks, whatever the default device is

    def softplus(self, x: Array) -> Array:
        return torch.nn.functional.softplus(x, 1, 60.0)  # beyond, it is x to the last digit

    def astype(self, x: Array, dtype: Any, copy: bool = True) -> Array:
        return x if x.dtype is dtype else x.to(dtype)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        return torch.sum(x) if axis is None else torch.sum(x, axis, keepdims)

    def zeros_like(self, x: Array) -> Array:
        if not x.is_cpu or x.numel() < 1 << 19:
            return torch.zeros_like(x)
        return torch.from_numpy(np.zeros(x.shape, str(x.dtype).removeprefix("torch.")))  # zero without being written

    def weigh_beside(self, weight: Array, size: Array) -> Array:
        return torch.mul(weight, size.masked_fill(weight == 0, 0.0))

    def weighted_sum(self, weight: Array, size: Array, axis: int) -> Array:
        return torch.nansum(torch.mul(weight, size), axis, True)

    def shifted(self, x: Array, m: Array) -> Array:
        d = x - m
        return torch.fmin(d, torch.zeros((), dtype=x.dtype, device="cpu"), out=d)  # the other one where one is NaN

    def flipped(self, x: Array, z: Array) -> Array:
        return torch.mul(x, torch.rsub(z, 1, alpha=2))

    def flip(self, x: Array, z: Array) -> Array:
        return x.mul_(torch.rsub(z, 1, alpha=2))

    def scale(self, x: Array, factor: Any) -> Array:
        return x.mul_(factor)

    def scatter(self, like: Array, index: Array, values: Array) -> Array:
        return self.zeros_like(like).scatter_(-1, index, values.to(like.dtype).expand(index.shape))

    def as_index(self, targets: Array, like: Array) -> Array:
        return targets if targets.dtype is torch.int64 else targets.to(torch.int64)

    def position(self, x: Array, index: Array, axis: int) -> Array:
        return index

    def take_along_axis(self, x: Array, position: Array, axis: int) -> Array:
        try:
            return x.gather(axis, position)
        except RuntimeError as error:
            raise IndexError(*error.args) from None

    def put_along_axis(self, x: Array, position: Array, values: Any, axis: int) -> Array:
        return x.scatter_(axis, position, values)


class _Finite(Finite, _Eager):
    groups: tuple[str, ...] = (*_Eager.groups, "softmax")

    def flipped(self, x: Array, z: Array) -> Array:
        return torch.addcmul(x, x, z, value=-2)

    def flip(self, x: Array, z: Array) -> Array:
        return x.addcmul_(x, z, value=-2)

    def argmax(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        classes = x.shape[axis]
        if (axis == -1 and classes < 64) or classes >= 1 << 24:
            return torch.argmax(x, axis, keepdims)
        # Elsewhere torch.argmax takes longer than arithmetic: 0 where x is the largest, and -1 where not.
        behind = torch.sub(x, torch.amax(x, axis, True)).sign_()
        numbers = torch.arange(classes, dtype=x.dtype, device=x.device).view(-1, *[1] * (-1 - axis))
        return torch.amax(torch.add(numbers, behind, alpha=classes, out=behind), axis, keepdims).to(torch.int64)

    def softmax(self, x: Array, axis: int) -> Array:
        if axis != -1 or x.shape[-1] >= 16 or x.numel() < 1000:
            return torch.softmax(x, axis)
        e = torch.exp(x - torch.amax(x, -1, True))  # torch's own is slow where rows are shorter than its vectors
        return e.div_(torch.sum(e, -1, True))


standard: Namespace = _Standard(COMPAT)
differentiable: Namespace = _Differentiable(COMPAT)
traced: Namespace = _Traced(COMPAT)
eager: Namespace = _Eager(torch)
finite: Namespace = _Finite(torch)


def replicated(data: Array, like: Array) -> Array:
    """Data that every process has, beside a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(data, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def sharded_like(x: Array, autodiff: bool = False, axis: int = -1) -> Namespace:
    """The namespace for a DTensor, maybe with sharded classes: processes exchange a number per example, no logits.

    `axis` is that of the classes in x.
    """
    from torch.distributed.tensor import Replicate, Shard

    mine = [Shard(0) if place.is_shard(axis % x.ndim) else Replicate() for place in x.placements]

    class Sharded(_Standard):
        groups = differentiable.groups if autodiff else ()

        def arange(self, n: int, device: Any = None) -> Array:  # each process makes the numbers of its own classes
            return replicated(torch.arange(n, device=device), x).redistribute(placements=mine)

        scatter = Extended.scatter  # by masks: each process has its own classes

        def any(self, x: Array, **options: Any) -> Array:
            return self._at_once(standard.any, x, **options)

        def max(self, x: Array, **options: Any) -> Array:
            return self._at_once(standard.max, x, **options)

        def sum(self, x: Array, **options: Any) -> Array:
            return self._at_once(standard.sum, x, **options)

        def _at_once(self, reduce: Any, x: Array, *, axis: int | None = None, **options: Any) -> Array:
            """The reduction, all-reduced at once: later, an array of the logits' size would be."""
            rows = reduce(x, axis=axis, **options)
            done = [Replicate() if place.is_partial() else place for place in rows.placements]
            return rows if axis is None else rows.redistribute(placements=done)

    return Sharded(COMPAT)
