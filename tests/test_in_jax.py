"""JAX: its transformations, compiler, exporter, devices and strict modes, on these losses as on its own.

Eight CPU devices are asked for here, before JAX starts: all test modules are imported before any of them runs.
"""

import functools
import importlib
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capabilities import Sample, close
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from unilabel.conformance.cases import Maker
from unilabel.conformance.oracle import expected

import unilabel as ul

jax.config.update("jax_num_cpu_devices", 8)

SEVERAL = pytest.mark.parametrize("sample", ["multilabel_logistic_loss", "softmax_nll"], indirect=True)


def check(got, right, dtype="float64", device=None, ulp=16):
    """Kind, dtype, shape and device, then the numbers."""
    assert isinstance(got, jax.Array)
    assert got.dtype == dtype
    assert got.shape == np.shape(right)
    assert device is None or got.devices() == {device}
    close(got, right, dtype, ulp)


def losses_of(sample, **options):
    """The losses of each example as a function of the logits."""
    return functools.partial(sample, reduction="none", **options)


def pulled(sample, **options):
    """A number whose gradient by the logits is `sample.pulled_back`."""
    return lambda x, *targets: jnp.sum(sample(x, *targets, reduction="none", **options) * sample.cotangent)


def diagonal(hessian, shape):
    return np.reshape([hessian[i + i] for i in itertools.product(*map(range, shape))], shape)


def oracle(name, logits, targets, dtype="float64"):
    """The logits as an array; values, gradient and Hessian diagonal of their sum."""
    case = Maker("given", dtype, 0).case(name, logits, targets, reduction="none")
    answer = expected(case)
    value, gradient, hessian = (
        np.array([float(number.value) for number in numbers])
        for numbers in (answer.value, answer.gradient_of_sum, answer.hessian)
    )
    x = np.array(case.logits.values, dtype).reshape(case.logits.shape)
    return x, value.reshape(case.cotangent.shape), gradient.reshape(x.shape), hessian.reshape(x.shape)


# --- Derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "grad, value_and_grad")
def test_grad(sample):
    x = jnp.array(sample.x)
    check(losses_of(sample)(x), sample.values)
    check(jax.grad(pulled(sample))(x), sample.pulled_back)
    value, gradient = jax.value_and_grad(lambda x: sample(x, reduction="sum"))(x)
    check(value, sample.values.sum())
    check(gradient, sample.gradient)


@pytest.mark.capability("jax", "vjp")
def test_vjp(sample):
    values, pullback = jax.vjp(losses_of(sample), jnp.array(sample.x))
    check(values, sample.values)
    check(pullback(jnp.array(sample.cotangent))[0], sample.pulled_back)


@pytest.mark.capability("jax", "jvp, linearize")
def test_jvp(sample):
    sizes = np.linspace(0.5, 2, sample.x.size).reshape(sample.x.shape)
    tangent = np.copysign(sizes, sample.gradient)  # so that nothing cancels
    change = (sample.gradient * tangent).reshape(*sample.values.shape, -1).sum(-1)
    values, got = jax.jvp(losses_of(sample), (jnp.array(sample.x),), (jnp.array(tangent),))
    check(values, sample.values)
    check(got, change)
    values, push = jax.linearize(losses_of(sample), jnp.array(sample.x))
    check(values, sample.values)
    check(push(jnp.array(tangent)), change)


@pytest.mark.parametrize(
    "modes", [(jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacrev)], ids=["hessian", "reverse twice"]
)
@pytest.mark.capability("jax", "hessian")
def test_hessian(sample, modes):
    outer, inner = modes
    hessian = jax.jit(outer(inner(lambda x: sample(x, reduction="sum"))))(jnp.array(sample.x))
    assert hessian.dtype == "float64"
    close(diagonal(hessian, sample.x.shape), sample.hessian)


@functools.cache
def second_derivatives():
    """Hessians of the loss and of log_softmax, forward and backward, and all that is equal to them; gradients."""

    def loss(x, y):
        return ul.softmax_nll(x, y, reduction="sum")

    def minus_log_p(x, y):
        return -ul.log_softmax(x)[y]

    modes = (jax.jacfwd, jax.jacrev)
    hessians = [
        outer(inner(function))
        for function in (loss, minus_log_p)
        for outer, inner in itertools.product(modes, repeat=2)
    ]
    hessians += [mode(lambda x, y: ul.softmax(x)) for mode in modes]
    gradients = [mode(function) for function in (loss, minus_log_p) for mode in modes]
    return jax.jit(lambda x, y: ([f(x, y) for f in hessians], [f(x, y) for f in gradients]))


@pytest.mark.parametrize("sample", ["softmax_nll"], indirect=True)
@pytest.mark.parametrize("logits", [[60.0, 0.0, -5.0], [0.0, 17.0, 0.0], [2.0, 2.0, 2.0], [1.0, 1.0, -30.0]])
@pytest.mark.capability("jax", "hessian of a sure model, no digit lost")
def test_second_derivatives_keep_their_digits(sample, logits):
    """All of p_i (δ_ij - p_j), where 1 - p would lose all digits, whichever class is the target."""
    x = jnp.array(logits)
    p = [oracle(sample.name, [logits], [(y + 1) % 3])[2][0, y] for y in range(3)]  # the slope if y is not the target
    for y in range(3):
        _, _, gradient, hessian = oracle(sample.name, [logits], [y])
        right = np.where(np.eye(3, dtype=bool), hessian, -np.outer(p, p))
        hessians, gradients = second_derivatives()(x, y)
        for got in hessians:
            check(got, right)
        for got in gradients:
            check(got, gradient[0])


@pytest.mark.parametrize("sample", ["multilabel_logistic_loss"], indirect=True)
@pytest.mark.capability("jax", "jvp and hessian at ±inf")
def test_infinite_logits(sample):
    inf = math.inf
    x, values, gradient, hessian = oracle(sample.name, [[inf, -inf, inf, -inf, 0.0, 60.0]], [[1, 0, 0, 1, 1, 1]])
    targets = [[1, 0, 0, 1, 1, 1]]

    def loss(x):
        return sample(x, targets, reduction="none")

    check(loss(jnp.array(x)), values)
    for tangent in (1.0, -1.0):
        _, change = jax.jvp(loss, (jnp.array(x),), (jnp.full(x.shape, tangent),))
        check(change, tangent * gradient)
    for modes in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)):
        total = modes[0](modes[1](lambda x: loss(x).sum()))(jnp.array(x))
        assert np.isfinite(total).all()
        close(diagonal(total, x.shape), hessian)


@pytest.mark.parametrize("sample", ["softmax_nll"], indirect=True)
@pytest.mark.parametrize("logits", [[1.0, 2.0, -math.inf], [0.5, -math.inf, 60.0], [math.inf, 0.0, 0.0]])
@pytest.mark.capability("jax", "jvp and hessian at ±inf")
def test_excluded_classes(sample, logits):
    x, values, gradient, hessian = oracle(sample.name, [logits], [0])

    def loss(x):
        return sample(x, [0], reduction="sum")

    tangent = np.copysign(np.ones(x.shape), gradient)
    value, change = jax.jvp(loss, (jnp.array(x),), (jnp.array(tangent),))
    check(value, values.sum())
    check(change, np.abs(gradient).sum())
    for mode in (jax.jacfwd, jax.jacrev):
        gradients, total = jax.jit(lambda x, mode=mode: (mode(loss)(x), mode(jax.jacrev(loss))(x)))(jnp.array(x))
        check(gradients, gradient)
        assert np.isfinite(total).all()
        close(diagonal(total, x.shape), hessian)


# --- Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "jit, with targets traced")
def test_jit(sample):
    function = jax.jit(jax.value_and_grad(pulled(sample)))
    value, gradient = function(jnp.array(sample.x), jnp.array(sample.targets))
    check(value, np.vdot(sample.values, sample.cotangent))
    check(gradient, sample.pulled_back)


@pytest.mark.capability("jax", "jit that donates the logits")
def test_donated(sample):
    x = jnp.array(sample.x)
    value, gradient = jax.jit(jax.value_and_grad(pulled(sample)), donate_argnums=0)(x)
    check(value, np.vdot(sample.values, sample.cotangent))
    check(gradient, sample.pulled_back)
    assert x.is_deleted()


@pytest.mark.capability("jax", "vmap")
def test_vmap(sample):
    """Over examples, and so over logits and targets; over logits alone; over targets alone."""
    x, targets = jnp.array(sample.x), jnp.array(sample.targets)
    check(jax.vmap(losses_of(sample))(x, targets), sample.values)
    row = jax.vmap(jax.grad(lambda x, y: sample(x, y, reduction="sum")))
    check(row(x, targets), sample.gradient)
    both = jax.vmap(losses_of(sample))(jnp.stack([x, x[::-1]]), jnp.stack([targets, targets[::-1]]))
    check(both, np.stack([sample.values, sample.values[::-1]]))
    check(jax.vmap(losses_of(sample), (0, None))(jnp.stack([x] * 2), targets), np.stack([sample.values] * 2))
    check(jax.vmap(losses_of(sample), (None, 0))(x, jnp.stack([targets] * 2)), np.stack([sample.values] * 2))


@pytest.mark.capability("jax", "vmap over weights")
def test_vmap_over_weights(sample):
    """One weight for each class; of an example with one label, it is the label's that counts."""
    weights = np.array([[0.5, 1.0, 2.0], [3.0, 0.25, 1.0]])
    each = weights[:, None] if sample.targets.ndim == 2 else weights[:, sample.targets]
    got = jax.vmap(lambda weight: losses_of(sample, weight=weight)(jnp.array(sample.x)))(jnp.array(weights))
    check(got, sample.values * each)


@pytest.mark.capability("jax", "derivative by targets and weights")
def test_other_operands(sample):
    """The losses are linear in float targets and in weights: the derivative is a loss."""
    x, ones = jnp.array(sample.x), jnp.ones(sample.values.shape)
    name = "weight" if sample.targets.ndim == 2 else "sample_weight"
    by_weight = jax.grad(lambda weight: pulled(sample, **{name: weight})(x))(ones)
    check(by_weight, sample.values * sample.cotangent)
    (by_x, by_z) = jax.grad(pulled(sample), (0, 1))(x, jnp.array(sample.distributions))
    check(by_x, sample.pulled_back)
    if sample.targets.ndim == 2:  # the loss of label 1 less that of label 0
        ones = oracle(sample.name, sample.x.tolist(), [[1] * 3] * 4)[1]
        zeros = oracle(sample.name, sample.x.tolist(), [[0] * 3] * 4)[1]
        np.testing.assert_allclose(by_z, (ones - zeros) * sample.cotangent, rtol=1e-14, atol=1e-14)
    else:
        each = [oracle(sample.name, sample.x.tolist(), [y] * 4)[1] for y in range(3)]
        check(by_z, np.stack(each, axis=1) * sample.cotangent[:, None])


@pytest.mark.capability("jax", "lax.scan, lax.map")
def test_loops(sample):
    x, targets = jnp.array(sample.x), jnp.array(sample.targets)

    def step(carry, row):
        values = sample(*row, reduction="none")
        return carry + values.sum(), values

    total, values = jax.lax.scan(step, 0.0, (x, targets))
    check(total, sample.values.sum())
    check(values, sample.values)
    check(jax.grad(lambda x: jax.lax.scan(step, 0.0, (x, targets))[0])(x), sample.gradient)
    check(jax.lax.map(lambda row: sample(*row, reduction="none"), (x, targets)), sample.values)


@pytest.mark.parametrize("policy", ["everything_saveable", "nothing_saveable"])
@pytest.mark.capability("jax", "checkpoint (remat)")
def test_checkpoint(sample, policy):
    function = jax.checkpoint(pulled(sample), policy=getattr(jax.checkpoint_policies, policy))
    check(jax.grad(function)(jnp.array(sample.x)), sample.pulled_back)
    check(jax.jit(jax.grad(function))(jnp.array(sample.x), jnp.array(sample.targets)), sample.pulled_back)


@pytest.mark.capability("jax", "eval_shape, make_jaxpr")
def test_shapes_alone(sample):
    x = jax.ShapeDtypeStruct((7, *sample.x.shape[1:]), "bfloat16")
    targets = jax.ShapeDtypeStruct((7, *sample.targets.shape[1:]), "int8")
    shape = jax.eval_shape(losses_of(sample), x, targets)
    assert (shape.shape, shape.dtype) == ((7, *sample.values.shape[1:]), "bfloat16")
    value, gradient = jax.eval_shape(jax.value_and_grad(sample), x, targets)
    assert [(a.shape, a.dtype) for a in (value, gradient)] == [((), "bfloat16"), (x.shape, "bfloat16")]
    (out,) = jax.make_jaxpr(losses_of(sample))(x, targets).out_avals
    assert (out.shape, out.dtype) == (shape.shape, "bfloat16")


# --- Export -----------------------------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "jax.export, any batch size, with its gradient")
def test_export(sample):
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *sample.x.shape[1:]), "float64")
    targets = jax.ShapeDtypeStruct((batch, *sample.targets.shape[1:]), "int64")
    data = export.export(jax.jit(losses_of(sample)))(x, targets).serialize(vjp_order=1)
    loaded = export.deserialize(data)
    for rows in (4, 2):
        x, targets = jnp.array(sample.x[:rows]), jnp.array(sample.targets[:rows])
        values, pullback = jax.vjp(lambda x, y=targets: loaded.call(x, y), x)
        check(values, sample.values[:rows])
        check(pullback(jnp.array(sample.cotangent[:rows]))[0], sample.pulled_back[:rows])


# --- Devices ----------------------------------------------------------------------------------------------------------

PLACES = {"batch": P("rows"), "class": P(None, "classes"), "batch and class": P("rows", "classes")}


def mesh(kind):
    return jax.make_mesh((4, 2), ("rows", "classes"), axis_types=(kind,) * 2)


def spread(sample, where, place):
    """The logits and the targets over eight devices: each target where its logits are."""
    x = jax.device_put(sample.x, NamedSharding(where, place))
    targets = jax.device_put(sample.targets, NamedSharding(where, P(*place[: sample.targets.ndim])))
    return x, targets


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.capability("jax", "sharded over a mesh, no logits gathered")
def test_sharded(sample, place):
    sample = Sample(sample.name, rows=8, classes=4)
    x, targets = spread(sample, mesh(AxisType.Auto), place)
    assert len(x.addressable_shards) == 8
    run = jax.jit(lambda x, y: (sample(x, y), losses_of(sample)(x, y), jax.grad(pulled(sample))(x, y)))
    text = run.lower(x, targets).compile().as_text()
    mean, values, gradient = run(x, targets)
    close(mean, sample.values.sum() / 8)  # "mean" and "batchmean", both over the examples
    check(values, sample.values)
    check(gradient, sample.pulled_back)
    if sample.name != "nll":  # its gradient has nothing of the logits in it, and so not their places
        assert gradient.sharding.is_equivalent_to(x.sharding, 2)
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


@SEVERAL
@pytest.mark.capability("jax", "sharded over a mesh, without jit and with NumPy targets")
def test_sharded_eagerly(sample):
    sample = Sample(sample.name, rows=8, classes=4)
    x, _ = spread(sample, mesh(AxisType.Auto), P("rows", "classes"))
    check(losses_of(sample)(x), sample.values)
    gradient = jax.grad(pulled(sample))(x)
    check(gradient, sample.pulled_back)
    assert gradient.sharding.is_equivalent_to(x.sharding, 2)
    _, gradient = ul.value_and_grad(sample.loss)(x, sample.targets, reduction="sum", label_smoothing=0.0)
    check(gradient, sample.gradient)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.capability("jax", "sharding in types (AxisType.Explicit)")
def test_explicit_sharding(sample, place):
    sample = Sample(sample.name, rows=8, classes=4)
    where = mesh(AxisType.Explicit)
    with jax.set_mesh(where):
        x, targets = spread(sample, where, place)
        values, gradient = jax.jit(lambda x, y: (losses_of(sample)(x, y), jax.grad(pulled(sample))(x, y)))(x, targets)
        check(values, sample.values)
        check(gradient, sample.pulled_back)
        assert jax.typeof(gradient) == jax.typeof(x)
        assert jax.typeof(values).sharding.spec[0] == place[0]


@pytest.mark.capability("jax", "shard_map")
def test_shard_map(sample):
    rows = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    x, targets = jnp.array(sample.x), jnp.array(sample.targets)
    each = jax.shard_map(losses_of(sample), mesh=rows, in_specs=(P("rows"), P("rows")), out_specs=P("rows"))
    check(jax.jit(each)(x, targets), sample.values)
    check(jax.jit(jax.grad(lambda x: jnp.vdot(each(x, targets), sample.cotangent)))(x), sample.pulled_back)

    def mean(x, y):
        return jax.lax.pmean(sample(x, y), "rows")

    whole = jax.shard_map(mean, mesh=rows, in_specs=(P("rows"), P("rows")), out_specs=P())
    value, gradient = jax.jit(jax.value_and_grad(whole))(x, targets)
    check(value, sample.values.sum() / 4)
    check(gradient, sample.gradient / 4)


@pytest.mark.capability("jax", "abstract mesh")
def test_abstract_mesh(sample):
    where = jax.sharding.AbstractMesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    place = NamedSharding(where, P("rows"))
    x = jax.ShapeDtypeStruct((8, 3), "float32", sharding=place)
    targets = jax.ShapeDtypeStruct((8, *sample.targets.shape[1:]), "int32", sharding=place)
    gradient = jax.eval_shape(jax.grad(sample), x, targets)
    assert (gradient.shape, gradient.dtype) == ((8, 3), "float32")
    assert gradient.sharding.spec == P("rows", None)


@pytest.mark.capability("jax", "on any device")
def test_device(sample):
    third, first = jax.devices()[3], jax.devices()[0]
    x = jax.device_put(sample.x, third)
    for targets in (sample.targets, sample.targets.tolist(), jax.device_put(sample.targets, first)):
        check(losses_of(sample)(x, targets), sample.values, device=third)
        value, gradient = ul.value_and_grad(sample.loss)(x, targets, reduction="sum", label_smoothing=0)
        check(value, sample.values.sum(), device=third)
        check(gradient, sample.gradient, device=third)
    for targets in (sample.targets, jax.device_put(sample.targets, third)):
        check(jax.grad(pulled(sample))(x, targets), sample.pulled_back, device=third)
    smoothed = jax.value_and_grad(lambda x: sample(x, label_smoothing=0.1))(x)
    assert [result.devices() for result in smoothed] == [{third}] * 2
    with pytest.raises(ValueError, match="incompatible devices"):  # JAX's own: a tracer does not say where it is
        jax.grad(pulled(sample))(x, jax.device_put(sample.targets, first))


@pytest.mark.capability("jax", "plain operands bind the result to no device")
def test_uncommitted(sample):
    x = jnp.array(sample.x)
    value = sample(x, weight=[1.0, 1.0, 1.0], label_smoothing=0.1)
    assert not value.committed
    assert (value + jax.device_put(1.0, jax.devices()[3])).devices() == {jax.devices()[3]}


# --- Modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "jax_enable_x64 off and on")
@pytest.mark.parametrize("x64", [False, True])
def test_precision(sample, x64):
    """float32 stays float32, and as right, whatever JAX's default is."""
    x, values, gradient, _ = oracle(sample.name, sample.x.tolist(), sample.targets.tolist(), "float32")
    with jax.enable_x64(x64):
        x, targets = jnp.array(x), sample.targets
        check(losses_of(sample)(x), values, "float32")
        check(jax.grad(lambda x: sample(x, reduction="sum"))(x), gradient, "float32")
        check(ul.value_and_grad(sample.loss)(x, targets, reduction="sum")[1], gradient, "float32")
        weighted = sample(x, weight=np.ones(3), label_smoothing=0.1)
        assert (weighted.dtype, weighted.weak_type) == ("float32", False)


OPTIONS = {
    "plain": {},
    "weighted": {"weight": np.array([0.5, 1.0, 2.0]), "label_smoothing": 0.1},
    "masked": {"where": np.array([True, False, True])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.capability("jax", 'jax_numpy_rank_promotion="raise", jax_numpy_dtype_promotion="strict"')
def test_strict_promotion(sample, options):
    """Neither is asked of the caller's operands either; the numbers are those without the modes."""
    x, targets = jnp.array(sample.x), np.array(sample.targets, "uint8")
    if "where" in options:
        targets = np.zeros_like(targets)
    more = {"pos_weight": 1} if sample.targets.ndim == 2 else {"sample_weight": [1, 1, 1, 1], "ignore_index": -1}
    run = functools.partial(jax.value_and_grad(sample), x, targets, **options | more)
    right = run()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        check(losses_of(sample)(x), sample.values)
        for a, b in zip(run(), right, strict=True):
            np.testing.assert_array_equal(a, b)
        jax.jit(jax.hessian(lambda x: sample(x, targets, **options)))(x)
        ul.value_and_grad(sample.loss)(x.astype("bfloat16"), targets, **options)
        for activation in (ul.softmax, ul.log_softmax, ul.sigmoid, ul.log_sigmoid):
            activation(x)


@pytest.mark.capability("jax", "jax_debug_nans")
def test_debug_nans(sample):
    x = jnp.array(sample.x)
    with jax.debug_nans(True):
        check(losses_of(sample)(x), sample.values)
        check(jax.grad(pulled(sample))(x), sample.pulled_back)
        with jax.disable_jit():  # every operation is looked at
            check(losses_of(sample)(x), sample.values)
            check(jax.grad(pulled(sample))(x), sample.pulled_back)


EDGES = {
    "multilabel_logistic_loss": ([[math.inf, -math.inf, 0.0]], [[1, 0, 1]]),
    "softmax_nll": ([[-math.inf, 1.0, 2.0], [-math.inf, 40.0, -40.0]], [1, 1]),
    "binary_cross_entropy": ([[0.0, 1.0, 0.5]], [[1, 0, 1]]),
    "cross_entropy": ([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]], [1, 2]),
    "nll": ([[-math.inf, 0.0, -1.0]], [1]),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.capability("jax", "jax_debug_nans at infinite logits, and at probabilities of 0 and 1")
def test_debug_nans_at_the_edges(sample, compiled):
    x, targets = EDGES[sample.name]
    with jax.debug_nans(True), jax.disable_jit(not compiled):
        value, gradient = jax.value_and_grad(sample)(jnp.array(x), targets)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        jax.jvp(jax.grad(lambda x: sample(x, targets)), (jnp.array(x),), (jnp.ones(np.shape(x)),))


@pytest.mark.parametrize("sample", ["softmax_nll", "cross_entropy", "nll"], indirect=True)
@pytest.mark.capability("jax", "jax_debug_nans")
def test_debug_nans_finds_what_is_wrong(sample):
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        sample(jnp.array(sample.x), [3, 0, 0, 0])


@pytest.mark.capability("jax", "disable_jit")
def test_disable_jit(sample):
    with jax.disable_jit():
        check(losses_of(sample)(jnp.array(sample.x)), sample.values)
        check(jax.grad(pulled(sample))(jnp.array(sample.x)), sample.pulled_back)


@pytest.mark.capability("jax", "checking_leaks")
def test_no_leaks(sample):
    with jax.checking_leaks():
        check(jax.jit(jax.grad(pulled(sample)))(jnp.array(sample.x), jnp.array(sample.targets)), sample.pulled_back)
        jax.jit(lambda x: sample(x, label_smoothing=0.1))(jnp.array(sample.x))


@pytest.mark.capability("jax", 'transfer_guard("disallow")')
def test_no_transfers(sample):
    """Python's numbers among the formulas are constants of the compiled programs; the options' are moved explicitly.

    `jax.grad` outside of jit makes a transfer of its own, of any function.
    """
    x, targets, weight = jnp.array(sample.x), jnp.array(sample.targets), jnp.array([0.5, 1.0, 2.0])
    calls = [
        losses_of(sample),
        sample,
        functools.partial(sample, weight=weight, label_smoothing=0.1),
        functools.partial(sample, where=jnp.array([True, True, False])),
        functools.partial(sample, axis=0) if sample.targets.ndim == 2 else functools.partial(sample, ignore_index=0),
        ul.value_and_grad(sample.loss),
        ul.grad_and_hess(sample.loss),
        jax.jit(jax.grad(sample)),
        lambda x, _: ul.softmax(x),
        lambda x, _: ul.log_softmax(x, axis=0),
    ]
    for call in calls:
        call(x, targets)
    with jax.transfer_guard("disallow"):
        for call in calls:
            call(x, targets)
        check(losses_of(sample)(x, targets), sample.values)
        losses_of(sample, weight=np.ones(3), label_smoothing=0.25)(x, sample.targets)  # plain data: explicitly too


# --- Large arrays, whose value is computed apart from the gradient ----------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "target", "weight", "adds"),
    [
        (math.inf, 1, 1, 0),
        (-math.inf, 0, 1, 0),
        (math.inf, 0, 1, math.inf),
        (-math.inf, 1, 1, math.inf),
        (math.nan, 0, 1, math.nan),
        (math.nan, 1, 0, math.nan),
        (math.inf, 0, 0, 0),
        (-math.inf, 1, 0, 0),
        (math.inf, 0, -1, -math.inf),
        (math.inf, 0, 1e-30, math.inf),
        (3e38, 0, 1e-30, 3e8),
        (3e38, 0, -1e-30, -3e8),
    ],
)
def test_one_odd_logit_among_a_million(logit, target, weight, adds):
    rng = np.random.default_rng(20261121)
    x = rng.normal(0, 5, (1024, 1025)).astype("float32")
    z, w = rng.integers(0, 2, x.shape), rng.uniform(0.5, 2, x.shape).astype("float32")
    away = np.float64(np.where(z, -x, x))  # from the target
    losses, slopes = w * np.logaddexp(0, away), w * np.where(z, -1, 1) / (1 + np.exp(-away))
    place = tuple(rng.integers(0, x.shape))
    x[place], z[place], w[place] = logit, target, weight
    losses[place] = adds
    slopes[place] = logit if math.isnan(logit) else weight * ((logit > 0) - target)

    loss = functools.partial(ul.multilabel_logistic_loss, reduction="sum")
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x), z, weight=w)
    also, slopes_too = ul.value_and_grad(ul.multilabel_logistic_loss)(jnp.asarray(x), z, weight=w, reduction="sum")
    for total in (value, also, loss(jnp.asarray(x), z, weight=w)):
        check(total, losses.sum(), "float32", ulp=24)
    for pulled_back in (gradient, slopes_too):
        check(pulled_back, slopes, "float32", ulp=4)


def test_shard_map_with_weights_that_all_have(monkeypatch):
    """Logits differ between the devices, and weights do not."""
    module = importlib.import_module("unilabel.backends.jax")
    monkeypatch.setattr(module, "LARGE", 0)
    x, z, w = np.linspace(-5, 5, 104).reshape(8, 13), np.arange(104).reshape(8, 13) % 2, np.linspace(0.5, 2, 13)

    def mean(x, z, w):
        return jax.lax.pmean(ul.multilabel_logistic_loss(x, z, pos_weight=w, reduction="mean"), "rows")

    eight = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    whole = jax.shard_map(mean, mesh=eight, in_specs=(P("rows"), P("rows"), P()), out_specs=P())
    value = jax.jit(whole)(x, z, w)
    check(value, np.where(z, w * np.logaddexp(0, -x), np.logaddexp(0, x)).mean())


# --- The compiled programs --------------------------------------------------------------------------------------------


@pytest.fixture
def programs():
    """What XLA compiles from here on."""
    compiled = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.capability("jax", "a schedule of label smoothing compiles once")
def test_label_smoothing_compiles_once(sample, programs):
    x, seen = jnp.array(sample.x), set()
    programs.clear()
    for step in range(50):
        seen.add(float(sample(x, label_smoothing=step / 49)))
    assert len(seen) == 50
    assert len(programs) <= 2  # without smoothing, and with
    for step in range(50):
        ul.value_and_grad(sample.loss)(x, sample.targets, label_smoothing=step / 49)
    assert len(programs) <= 4


@SEVERAL
@pytest.mark.capability("jax", "each shape and dtype compiles once")
def test_equal_calls_compile_once(sample, programs):
    def call(rows, dtype, **options):
        programs.clear()
        x = jnp.array(np.tile(sample.x, (5, 1))[:rows], dtype)
        programs.clear()  # of making it
        sample(x, np.tile(sample.targets, (5, *[1] * (sample.targets.ndim - 1)))[:rows], **options)
        return len(programs)

    assert call(11, "float32") == 1  # shapes that no other test has
    assert call(11, "float32") == 0
    assert call(11, "float32", label_smoothing=0.0) == 0  # the default, spelt out
    assert call(11, "float64") == 1
    assert call(13, "float32") == 1
    assert call(13, "float32", reduction="sum") == 1
    assert [call(rows, "float32") for rows in (11, 13, 11)] == [0, 0, 0]
    assert call(13, "float32", reduction="sum") == 0
