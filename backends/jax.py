"""JAX: custom_jvp with the closed-form derivative, inside a jit of its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas
from ..backend import Backend, Extended
from ..formulas import Array, Loss, Namespace, Operands, Options


@jax.custom_jvp
def _differentiated_as(value: Array, form: Array) -> Array:
    return value  # XLA drops the form where there is no second derivative


_differentiated_as.defjvp(lambda primals, tangents: (_differentiated_as(*primals), tangents[1]))

xp = Extended(jnp, stop_gradient=jax.lax.stop_gradient, differentiated_as=_differentiated_as)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value(loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
    return formulas.value(xp, loss, options, x, operands)


def _jvp(loss: Loss, options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    x, operands = primals
    x_dot, operands_dot = tangents
    value, change = _value(loss, options, x, operands), None
    if not _is_zero(x_dot):
        change = formulas.pushforward(xp, loss, options, x, operands, x_dot)
    # Targets and weights are seldom differentiated: the plain expression is good enough for them, for those alone.
    moving = {name: dot for name, dot in operands_dot._asdict().items() if dot is not None and not _is_zero(dot)}
    if moving:
        at = {name: getattr(operands, name) for name in moving}
        _, more = jax.jvp(
            lambda some: formulas.value(xp, loss, options, x, operands._replace(**some)), (at,), (moving,)
        )
        change = more if change is None else change + more
    return value, jnp.zeros_like(value) if change is None else change


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_value.defjvp(_jvp, symbolic_zeros=True)

_loss = functools.partial(jax.jit, static_argnums=(0, 1))(_value)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _closed_form(formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
    return formula(xp, loss, options, x, operands)


_activation = functools.partial(jax.jit, static_argnums=(0, 2))(functools.partial(formulas.activation, xp))


class JaxBackend(Backend):
    name = "jax"
    install = "pip install jax"
    autodiff = True

    def devices(self) -> list[str]:
        return [str(device) for device in jax.devices()]

    def device(self, x: Array) -> str:
        return ", ".join(sorted(str(device) for device in x.devices()))

    def namespace(self, x: Array) -> Namespace:
        return xp

    def problem(self, x: Array) -> str | None:
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
        place = like.sharding
        if not isinstance(place, jax.sharding.SingleDeviceSharding):  # over several devices: jit finds the way
            return data if isinstance(data, jax.Array) else jnp.asarray(data)
        return jax.device_put(data, place)

    def to_numpy(self, x: Array) -> Any:
        if isinstance(x, jax.core.Tracer):
            raise ValueError("Expected values to read. Received: a JAX tracer, which has none yet.")
        return np.asarray(x)

    def loss(self, loss: Loss, options: Options, x: Array, operands: Operands) -> Array:
        return _loss(loss, options, x, operands)

    def closed_form(self, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands) -> Any:
        return _closed_form(formula, loss, options, x, operands)

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        return _activation(function, x, half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        value, pullback = jax.vjp(function, x)
        return value, pullback(cotangent)[0]


backend = JaxBackend()
