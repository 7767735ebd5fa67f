"""JAX: custom_jvp with the closed-form derivative, inside a jit of its own."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas
from ..backend import Array, Backend
from ..formulas import Loss, Namespace, Operands, Options
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

    def as_index(self, targets: Array, like: Array) -> Array:
        return targets.astype(jax.dtypes.canonicalize_dtype(np.int64))

    def take(self, weight: Array, index: Array) -> Array:
        if _is_sharded(weight, -1):
            return super().take(weight, index)
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


def _is_sharded(x: Array, axis: int) -> bool:
    """Whether an axis is explicitly sharded over devices."""
    return jax.typeof(x).sharding.spec[axis] is not None


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


def _broadcasting(function: Any) -> Any:
    """Let the formulas broadcast, whatever jax_numpy_rank_promotion says: shapes were checked."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments)

    return traced


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@_broadcasting
def _value(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    if _is_large_sum(loss, options, x, operands):
        return formulas.value(summing, loss, options, *_apart(x, operands))
    return formulas.value(standard, loss, options, x, operands)


LARGE = 1 << 20  # elements: from here on, memory takes more time than computing


def _is_large_sum(loss: Loss, options: Options, x: Array, operands: Operands) -> bool:
    """Whether the value is one sum over many elements, none of them masked: faster apart from the gradient."""
    elementwise = not loss.per_example and loss.takes == "logits"
    summed = elementwise and options.reduction != "none" and operands.where is None
    return summed and all(isinstance(n, int) for n in x.shape) and x.size >= LARGE


def _apart(*arrays: Any) -> Any:
    """Copies behind an optimization barrier, so that XLA on a CPU keeps nothing in memory for both loss and gradient.

    They have one axis more, so that not even constants are shared.
    """
    arrays = jax.tree.map(lambda x: x[None], arrays)
    # One by one: together, shard_map would take them to differ between devices as soon as one of them does.
    return jax.lax.platform_dependent(
        *arrays,
        cpu=lambda *arrays: jax.tree.map(jax.lax.optimization_barrier, arrays),
        default=lambda *arrays: arrays,
    )


@_broadcasting
def _jvp(loss: Loss, options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    x, operands = primals
    value, change = _value(loss, options, *primals), None
    if not _is_zero(tangents[0]):
        unreduced = _unreduced_gradient(loss, options, *primals)
        change = formulas.jvp(standard, loss, options, x, operands, unreduced, tangents[0])
    # Targets and weights are seldom differentiated: autodiff is good enough, for those alone.
    more = _jvp_by_autodiff(formulas.value, loss, options, primals, (None, *tangents[1:]))
    if more is not None:
        change = more[1] if change is None else change + more[1]
    return value, jnp.zeros_like(value) if change is None else change


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@_broadcasting
def _unreduced_gradient(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    return formulas.unreduced_gradient(standard, loss, options, x, operands)


@_broadcasting
def _unreduced_gradient_jvp(loss: Loss, options: Options, primals: tuple[Any, ...], tangents: Any) -> Any:
    found = _jvp_by_autodiff(formulas.unreduced_gradient, loss, options, primals, tangents)
    if found is None:
        gradient = _unreduced_gradient(loss, options, *primals)
        return gradient, jnp.zeros_like(gradient)
    return found


def _jvp_by_autodiff(formula: Any, loss: Loss, options: Options, primals: tuple[Any, ...], tangents: Any) -> Any:
    """A formula in the form for autodiff, and its derivative along the tangents; None if there are none."""
    x, operands = primals
    given = {"x": x, **operands._asdict()}
    tangents_of = {"x": tangents[0], **tangents[1]._asdict()}
    with_tangent = {name: dot for name, dot in tangents_of.items() if dot is not None and not _is_zero(dot)}

    def run(differentiated: dict[str, Array]) -> Array:
        arrays = given | differentiated
        return formula(differentiable, loss, options, arrays.pop("x"), Operands(**arrays))

    return jax.jvp(run, ({name: given[name] for name in with_tangent},), (with_tangent,)) if with_tangent else None


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_value.defjvp(_jvp, symbolic_zeros=True)
_unreduced_gradient.defjvp(_unreduced_gradient_jvp, symbolic_zeros=True)

_loss = jax.jit(_value, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@_broadcasting
def _closed_form(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
    if formula is formulas.value_and_gradient and _is_large_sum(loss, options, x, operands):
        value = _value(loss, options, x, operands)
        return value, formulas.gradient(standard, loss, options, x, operands, jnp.ones_like(value))
    return formula(standard, loss, options, x, operands)


def _jit_arguments(options: Options, x: Array, operands: Operands) -> tuple[Options, Array, Operands]:
    """Arguments for the jitted functions. Smoothing is an array, so that a schedule does not compile again."""
    smoothing = options.label_smoothing
    if smoothing is None:
        return options, x, operands
    place = None if isinstance(x, jax.core.Tracer) else _place(x)
    smoothing = jax.device_put(smoothing, place)  # explicitly, so that a transfer guard lets it pass
    return options._replace(label_smoothing=None), x, operands._replace(label_smoothing=smoothing)


def _place(x: Array) -> Any:
    """The sharding for data that is used with x; None, any, if x is uncommitted or on several devices."""
    return x.sharding if x.committed and isinstance(x.sharding, jax.sharding.SingleDeviceSharding) else None


_activation = jax.jit(_broadcasting(functools.partial(formulas.activation, differentiable)), static_argnums=(0, 2))


class JaxBackend(Backend):
    name = "jax"
    autodiff = True

    def devices(self) -> list[str]:
        return [str(device) for device in jax.devices()]

    def device(self, x: Array) -> str:
        return ", ".join(sorted(str(device) for device in x.devices()))

    def namespace(self, x: Array) -> Namespace:
        return standard

    def problem(self, x: Array, beside: Array | None = None) -> str | None:
        return None if isinstance(x, jax.Array) else f"jax {type(x).__name__}"

    def dtype(self, x: Array) -> str:
        return str(x.dtype.name)

    def asarray(self, data: Any, like: Array | None = None, device: str | None = None) -> Array:
        if like is None:
            place = None if device is None else {str(d): d for d in jax.devices()}[device]
            return jnp.asarray(data, device=place)
        if isinstance(data, np.ndarray):
            wide = data.dtype.kind in "iu" and data.dtype.itemsize == 8 and not jax.config.jax_enable_x64
            if wide:  # what does not fit 32 bits must not wrap around to a class that exists
                data = np.clip(data, -(2**31), 2**31 - 1).astype(np.int32)
            data = data.astype(data.dtype.newbyteorder("="), copy=False)
        if isinstance(like, jax.core.Tracer) or isinstance(data, jax.core.Tracer):
            return jnp.asarray(data)
        if not isinstance(data, jax.Array):
            return jax.device_put(data, _place(like))
        several = not isinstance(like.sharding, jax.sharding.SingleDeviceSharding)
        return data if several else jax.device_put(data, like.sharding)  # over several devices: jit finds the way

    def to_numpy(self, x: Array) -> Any:
        if isinstance(x, jax.core.Tracer):
            raise ValueError("Expected values to read. Received: a JAX tracer, which has none yet.")
        return np.asarray(x)

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        return _loss(loss, *_jit_arguments(options, x, operands))

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        return _closed_form(formula, loss, *_jit_arguments(options, x, operands))

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        return _activation(function, x, half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        value, pullback = jax.vjp(function, x)
        return value, pullback(cotangent)[0]


backend = JaxBackend()
