"""JAX's namespaces: jax.numpy, with what lets XLA compile well and shard."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..backend import Array
from ..formulas import Namespace
from ..namespace import Extended


class _Standard(Extended):
    """Where nothing is differentiated."""

    groups: tuple[str, ...] = ("indexing",)
    longest = staticmethod(jax.core.max_dim)
    ones_like = staticmethod(jax.jit(jnp.ones_like, static_argnames="dtype"))  # else 1 is a transfer to the device

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        if a is math.nan or b is math.nan:  # on purpose: outside of jit, jax_debug_nans would raise
            with jax.debug_nans(False):
                a, b = (jnp.full_like(b, a), b) if a is math.nan else (a, jnp.full_like(a, b))
        return jnp.where(condition, a, b)

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
        """Also along axes of length 1: if one stays, XLA's CPU compiler makes a sum of products a dot product.

        The error of that grows with its length.
        """
        ones = [] if axis is None else [i for i, n in enumerate(x.shape) if n == 1 and not _is_sharded(x, i)]
        if not ones:
            return jnp.sum(x, axis=axis, keepdims=keepdims)
        total = jnp.sum(x, axis=tuple({axis % x.ndim, *ones}), keepdims=True)
        return total if keepdims else jnp.squeeze(total, axis)

    def has_nan(self, x: Array, axis: int) -> Array:
        if axis != -1 or any(_is_sharded(x, i) for i in range(x.ndim)):
            return super().has_nan(x, axis)
        # On a CPU a sum wakes threads up, for a few thousand numbers too; a product only where that pays.
        total = jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype))[..., None]
        return total != total

    def matmul(self, x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, out_sharding=_place_of_product(x, y))

    def add_sum(self, total: Array | None, x: Array, features: Array) -> Array:
        if total is not None:  # in a loop, where XLA would hold one block more than with a product
            return super().add_sum(total, x, features)
        return self.sum(x, axis=0)[:, None]

    def as_index(self, targets: Array, like: Array) -> Array:
        return targets.astype(jax.dtypes.canonicalize_dtype(np.int64))

    def take(self, weight: Array, index: Array) -> Array:
        if _is_sharded(weight, -1):
            here = self.position(weight, index[..., None], -1)[1]
            return jnp.sum(jnp.where(here, weight, 0), axis=-1)
        place = jax.typeof(index).sharding  # JAX asks for the result's, if the indices are sharded explicitly
        options = {"out_sharding": place} if any(_is_sharded(index, i) for i in range(index.ndim)) else {}
        return weight.at[index].get(mode="promise_in_bounds", **options)

    def position(self, x: Array, index: Array, axis: int) -> tuple[Array, Array]:
        """An index to gather with, and a mask, as a scatter takes longer."""
        return index, jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim + axis) == index

    def take_along_axis(self, x: Array, position: tuple[Array, Array], axis: int) -> Array:
        # JAX gathers nothing along a sharded axis, nor from what may be empty (an exporter's length of n - 1).
        if _is_sharded(x, axis) or any(jax.core.max_dim(n, 1) != n for n in x.shape):
            return jnp.sum(jnp.where(position[1], x, 0), axis=axis, keepdims=True)
        return jnp.take_along_axis(x, position[0], axis, mode="promise_in_bounds")

    def put_along_axis(self, x: Array, position: tuple[Array, Array], values: Any, axis: int) -> Array:
        return jnp.where(position[1], values, x)

    def scatter(self, like: Array, index: Array, values: Array) -> Array:
        if any(_is_sharded(like, i) for i in range(like.ndim)):
            return super().scatter(like, index, values)
        found = jnp.zeros(like.shape, values.dtype)  # of booleans, as a scatter's result is in memory

        def write(found: Array, index: Array, values: Array) -> Array:
            return found.at[index].set(values, mode="promise_in_bounds")

        for _ in range(like.ndim - 1):  # a row of its own for each example, as a mesh that shards them wants to know
            write = jax.vmap(write)
        return write(found, index, jnp.broadcast_to(values, index.shape)).astype(like.dtype)


def _is_sharded(x: Array, axis: int) -> bool:
    """Whether an axis is explicitly sharded over devices."""
    return jax.typeof(x).sharding.spec[axis] is not None


def _place_of_product(x: Array, y: Array) -> Any:
    """Where JAX is to put a product of matrices; None: it knows, as what is summed is not explicitly sharded."""
    places = jax.typeof(x).sharding, jax.typeof(y).sharding
    if not any(_is_sharded(array, axis) for array, axis in ((x, -1), (y, -2))):
        return None
    return jax.sharding.NamedSharding(places[0].mesh, jax.P(places[0].spec[-2], places[1].spec[-1]))


class _Differentiable(_Standard):
    groups = ("autodiff",)
    stop_gradient = staticmethod(jax.lax.stop_gradient)


class _Summing(_Standard):
    """For full sums: XLA's CPU compiler fuses arithmetic into the sum, but writes the result of a select to memory."""

    def heaviside(self, x: Array) -> Array:
        return jnp.maximum(jnp.sign(x), 0)

    def weigh(self, weight: Array, size: Array) -> Array:
        # `abs` keeps compilers from multiplying the two constants, which makes infinity, and that times 0 is NaN.
        large = float(jnp.finfo(size.dtype).max)
        most = jnp.abs(weight * large) * large
        return jnp.maximum(jnp.minimum(size, most), -most) * weight


standard: Namespace = _Standard(jnp)
differentiable: Namespace = _Differentiable(jnp)
summing: Namespace = _Summing(jnp)
