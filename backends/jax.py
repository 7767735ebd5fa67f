"""JAX: custom_jvp with the closed-form derivative, inside a jit of its own."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas, lengths
from ..backend import Array, Backend
from ..checks import fail
from ..formulas import NOTHING, Linear, Loss, Namespace, Operands, Options
from ..sparse import Padded, of_coordinates
from .jax_namespaces import differentiable, standard, summing


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


# --- The last linear layer's inputs: a scan over blocks of examples ---------------------------------------------------


def _length(inputs: Linear) -> int | None:
    """The number of examples in a block, also of as many as an exporter leaves open; None: all at once."""
    known = lengths.are_known(inputs.features.shape[0])
    return formulas.rows_of_blocks(inputs) if known else formulas.most_rows(inputs)


def _scanned(body: Any, length: int | None, totals: Any, rows: Any, by_autodiff: bool) -> tuple[Any, Any]:
    """The totals, and what the body leaves behind, of all blocks of that length and then of the rest.

    Of `count` blocks, the first has rows 0, count, 2 count, …: where each device has its share of the examples, it has
    its share of each block, and nothing of them moves.
    """
    if length is None:
        return body(totals, rows)
    n = rows.features.shape[0]
    count = n // length
    end = count * length
    if lengths.are_known(n):
        dealt = jax.tree.map(lambda a: a[:end].reshape(length, count, *a.shape[1:]), rows)
        if by_autodiff:  # the gradient of a slice would be an array of all rows for each block
            totals, parts = jax.lax.scan(body, totals, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), dealt))
        else:

            def of_block(totals: Any, i: Array) -> tuple[Any, Any]:
                return body(totals, jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 1, False), dealt))

            totals, parts = jax.lax.scan(of_block, totals, jnp.arange(count))
    else:
        totals, parts = _scanned_if_any(body, length, count, totals, rows)
    parts = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), parts)
    if lengths.same((end,), (n,)):
        return totals, parts
    totals, rest = body(totals, jax.tree.map(lambda a: a[end:], rows))
    return totals, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts, rest)


def _scanned_if_any(body: Any, length: int, count: Any, totals: Any, rows: Any) -> tuple[Any, Any]:
    """The same where an exporter leaves the count open: JAX asks for one block, which may count for nothing."""
    n = rows.features.shape[0]
    if jax.core.max_dim(n, 1) != n:  # and it gathers from no empty array
        rows = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a, shape=(1, *a.shape[1:]))]), rows)

    def of_block(totals: Any, i: Array) -> tuple[Any, Any]:
        places = jnp.arange(length) * count + i
        some = jax.tree.map(lambda a: a.at[places].get(mode="promise_in_bounds"), rows)
        _, parts = jax.eval_shape(body, totals, some)
        nothing = totals, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), parts)
        return jax.lax.cond(i < count, body, lambda *_: nothing, totals, some)

    totals, parts = jax.lax.scan(of_block, totals, jnp.arange(jax.core.max_dim(count, 1)))
    return totals, jax.tree.map(lambda a: a[:count], parts)


@_broadcasting
def _linear(
    loss: Loss, options: Options, length: int | None, needed: Linear, inputs: Linear, operands: Operands
) -> tuple[Array, Linear]:
    """The reduced loss, and its gradients in the compute dtype, in closed form."""
    if length is None:
        return formulas.in_blocks(standard, formulas.directly(standard), None, loss, options, inputs, operands, needed)
    rows, shared = formulas.cut(standard, options, inputs, operands)
    weight = shared.linear_weight
    of_weight = jnp.zeros_like(weight) if needed.linear_weight else None
    of_bias = jnp.zeros_like(weight[:, :1]) if needed.linear_bias else None
    body = functools.partial(formulas.block, standard, formulas.directly(standard), loss, options, needed, shared)
    totals, parts = _scanned(body, length, formulas.Totals(of_weight, of_bias), rows, by_autodiff=False)
    return formulas.reduced(standard, loss, options, inputs, totals, parts)


@_broadcasting
def _linear_by_autodiff(loss: Loss, options: Options, length: int | None, inputs: Linear, operands: Operands) -> Array:
    """The reduced loss as an expression: backward makes the logits of each block again."""

    def run(_: Any, *call: Any) -> Array:
        return _value(*call)

    rows, shared = formulas.cut(differentiable, options, inputs, operands)
    body = functools.partial(formulas.block, differentiable, run, loss, options, NOTHING)
    if length is not None:
        body = jax.checkpoint(body, prevent_cse=False)
    totals, parts = _scanned(functools.partial(body, shared), length, formulas.Totals(), rows, by_autodiff=True)
    return formulas.reduced(differentiable, loss, options, inputs, totals, parts)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _linear_value(loss: Loss, options: Options, length: int | None, inputs: Linear, operands: Operands) -> Array:
    return _linear(loss, options, length, NOTHING, inputs, operands)[0]


@_broadcasting
def _linear_value_jvp(
    loss: Loss, options: Options, length: int | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    (inputs, operands), dots = primals, tangents[0]
    needed = Linear(*(dot is not None and not _is_zero(dot) for dot in dots))
    change = None
    if any(needed):
        value, found = _linear_gradients(loss, options, length, needed, inputs, operands)
        of_each = zip(found, dots, formulas.taking_part(standard, options, operands), strict=True)
        change = sum(_change(*each) for each in of_each if each[0] is not None).astype(value.dtype)
    else:
        value = _linear_value(loss, options, length, inputs, operands)
    by_operands = functools.partial(_linear_by_autodiff, loss, options, length, inputs)
    more = _jvp_where_moved(by_operands, (operands,), tangents[1:])
    if more is not None:
        change = more[1] if change is None else change + more[1]
    return value, jnp.zeros_like(value) if change is None else change


def _change(gradient: Array, tangent: Array, keep: Array | None) -> Array:
    moved = gradient * tangent.astype(gradient.dtype)
    # What is masked has a gradient of 0 under an infinite cotangent too.
    return jnp.sum(moved if keep is None else jnp.where(keep, moved, 0.0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _linear_gradients(
    loss: Loss, options: Options, length: int | None, needed: Linear, inputs: Linear, operands: Operands
) -> tuple[Array, Linear]:
    return _linear(loss, options, length, needed, inputs, operands)


def _linear_gradients_jvp(
    loss: Loss, options: Options, length: int | None, needed: Linear, primals: Any, tangents: Any
) -> Any:
    def again(inputs: Linear, operands: Operands) -> tuple[Array, Linear]:
        wide = Linear(*(None if a is None else formulas.working(standard, options, a) for a in inputs))
        chosen = {name: array for name, array in wide._asdict().items() if getattr(needed, name)}

        def value(chosen: dict[str, Array]) -> Array:
            return _linear_by_autodiff(loss, options, length, wide._replace(**chosen), operands)

        found, pullback = jax.vjp(value, chosen)
        gradients = dict.fromkeys(Linear._fields) | pullback(jnp.ones_like(found))[0]
        return found.astype(inputs.features.dtype), Linear(**gradients)

    found = _jvp_where_moved(again, primals, tangents)
    if found is None:
        result = _linear_gradients(loss, options, length, needed, *primals)
        return result, jax.tree.map(jnp.zeros_like, result)
    return found


def _jvp_where_moved(function: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """The function and its derivative along those tangents that are not zero; None if there are none."""
    arrays, tree = jax.tree.flatten(primals)
    dots = tree.flatten_up_to(tangents)
    moved = [i for i, dot in enumerate(dots) if not _is_zero(dot)]

    def run(some: list[Array]) -> Any:
        every = dict(enumerate(arrays)) | dict(zip(moved, some, strict=True))
        return function(*tree.unflatten(every.values()))

    return jax.jvp(run, ([arrays[i] for i in moved],), ([dots[i] for i in moved],)) if moved else None


_linear_value.defjvp(_linear_value_jvp, symbolic_zeros=True)
_linear_gradients.defjvp(_linear_gradients_jvp, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _linear_loss(loss: Loss, options: Options, length: int | None, inputs: Linear, operands: Operands) -> Array:
    # With "none" the gradients depend on all cotangents.
    run = _linear_by_autodiff if options.reduction == "none" else _linear_value
    return run(loss, options, length, inputs, operands)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _linear_closed_form(
    loss: Loss, options: Options, length: int | None, needed: Linear, inputs: Linear, operands: Operands
) -> tuple[Array, Linear]:
    value, found = _linear(loss, options, length, needed, inputs, operands)
    return value, formulas.rounded(standard, found, inputs)


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

    def sparse(self, targets: Any) -> Padded | None:
        sparse = sys.modules.get("jax.experimental.sparse")  # without it nobody has such an array
        if sparse is None or not isinstance(targets, sparse.JAXSparse):
            return super().sparse(targets)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(targets)):
            fail(TypeError, "targets", "unilabel.Positives, which transforms take", f"a {targets!r} that JAX traces")
        coo = targets.to_bcoo() if isinstance(targets, sparse.BCSR) else targets
        if not isinstance(coo, sparse.BCOO) or coo.n_dense:
            fail(TypeError, "targets", "a BCOO or BCSR array all of whose axes are sparse", repr(targets))
        coo = coo.update_layout(n_batch=0) if coo.n_batch else coo
        indices, values = np.asarray(coo.indices), np.asarray(coo.data)
        there = (indices < np.asarray(coo.shape)).all(axis=1)  # indices out of range pad
        return of_coordinates(indices[there].T, values[there], coo.shape)

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

    def linear_loss(self, loss: Loss, options: Options, inputs: Linear, operands: Operands) -> Array:
        options, _, operands = _jit_arguments(options, inputs.features, operands)
        return _linear_loss(loss, options, _length(inputs), inputs, operands)

    def linear_closed_form(
        self, loss: Loss, options: Options, inputs: Linear, operands: Operands, needed: Linear
    ) -> tuple[Array, Linear]:
        options, _, operands = _jit_arguments(options, inputs.features, operands)
        return _linear_closed_form(loss, options, _length(inputs), needed, inputs, operands)

    def activation(self, function: Any, x: Array, half: bool) -> Array:
        return _activation(function, x, half)

    def vjp(self, function: Any, x: Array, cotangent: Array) -> tuple[Array, Array]:
        value, pullback = jax.vjp(function, x)
        return value, pullback(cotangent)[0]


backend = JaxBackend()
