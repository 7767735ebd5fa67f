"""JAX: its transformations, compiler, exporter and meshes on the losses of the last linear layer's inputs."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_in_jax  # asks for eight devices, before JAX starts
from crossed import LINEAR, OF_LINEAR
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_in_jax import check, mesh
from test_linear import close

import unilabel as ul

assert test_in_jax.jax is jax


pytestmark = pytest.mark.usefixtures("small_blocks")  # of two examples


@pytest.fixture
def sample(sample):
    """Five examples: two blocks, and a rest."""
    return sample.of(rows=5).beside(jnp.asarray)


def operands(sample):
    """All arrays of a call: the layer's inputs, the targets, the other operands by name, the cotangent."""
    inputs = tuple(map(jnp.asarray, sample.inputs))
    return inputs, jnp.asarray(sample.targets), sample.arrays, jnp.asarray(sample.cotangent)


def answers(sample):
    """All that a loss has to give, as a function of its `operands`, for a compiler to compile once."""

    def run(inputs, targets, arrays, cotangent):
        value, pullback = jax.vjp(lambda *inputs: sample(*inputs, targets=targets, **arrays), *inputs)
        return value, *pullback(cotangent), *sample.closed(*inputs, targets=targets, **arrays)

    return run


def right(sample):
    """What `answers` must give."""
    return sample.value, *sample.through(sample.pulled_back), sample.value, *sample.through(sample.gradient)


def check_all(results, sample):
    for got, numbers in zip(results, right(sample), strict=True):
        check(got, numbers)


def pulled(sample, loss=None):
    """A number whose gradients by the inputs are those of `pulled_back`; `loss` instead of the sample's own."""
    return lambda *inputs, **more: jnp.sum((loss or sample)(*inputs, **more) * sample.cotangent)


def alike(got, right):
    jax.tree.map(close, got, right)


@pytest.mark.capability("jax", "grad, value_and_grad", **OF_LINEAR)
def test_grad(sample):
    check_all(answers(sample)(*operands(sample)), sample)


@pytest.mark.capability("jax", "jit, with targets traced", **OF_LINEAR, pairs=True)
def test_jit(sample):
    check_all(jax.jit(answers(sample))(*operands(sample)), sample)


@pytest.mark.capability("jax", "jvp", **OF_LINEAR)
def test_jvp(sample):
    inputs, *_ = operands(sample)
    tangents = tuple(jnp.cos(array) for array in inputs)
    value, change = jax.jvp(sample, inputs, tangents)
    check(value, sample.value)
    alike(change, jax.jvp(sample.with_all_logits, inputs, tangents)[1])


@pytest.mark.capability("jax", "hessian, in all of its parts", **OF_LINEAR)
def test_hessian(sample):
    inputs, *_ = operands(sample)
    every = tuple(range(len(inputs)))
    found = (jax.jit(jax.hessian(pulled(sample, loss), every))(*inputs) for loss in (None, sample.with_all_logits))
    alike(*found)


@pytest.mark.capability("jax", "derivative by targets, weights and smoothing", **OF_LINEAR)
def test_other_derivatives(sample):
    inputs, targets, arrays, _ = operands(sample)
    given = arrays | {"targets": targets}
    floats = {name: array for name, array in given.items() if jnp.issubdtype(array.dtype, jnp.floating)}

    def of(loss):
        return jax.grad(lambda floats: pulled(sample, loss)(*inputs, **floats))(floats)

    alike(of(None), of(sample.with_all_logits))


def stacked(*samples):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(operands, samples))


@pytest.mark.capability("jax", "vmap", **OF_LINEAR)
def test_vmap(sample):
    other = sample.of(rows=5).beside(jnp.asarray)
    results = jax.jit(jax.vmap(answers(sample)))(*stacked(sample, other))
    for i, each in enumerate((sample, other)):
        check_all([got[i] for got in results], each)


@pytest.mark.capability("jax", "lax.scan", **OF_LINEAR)
def test_scan(sample):
    other = sample.of(rows=5).beside(jnp.asarray)

    def run(*stacks):
        return jax.lax.scan(lambda carry, operands: (carry, answers(sample)(*operands)), 0, stacks)[1]

    results = jax.jit(run)(*stacked(sample, other))
    for i, each in enumerate((sample, other)):
        check_all([got[i] for got in results], each)


@pytest.mark.capability("jax", "jax.export, any batch size", **OF_LINEAR)
def test_export(sample):
    """Blocks of as many examples as there will be, with a rest or none, and of fewer than a block has."""
    (n,) = export.symbolic_shape("n")

    def shape(array, axis):
        return jax.ShapeDtypeStruct([n if i == axis else m for i, m in enumerate(array.shape)], array.dtype)

    inputs, targets, arrays, cotangent = operands(sample)
    several = {"sample_weight", "pos_weight"} | ({"where"} if len(sample.arrays.get("where", ())) > 1 else set())
    layer = shape(inputs[0], 0), *(shape(array, None) for array in inputs[1:])
    others = {name: shape(array, 0 if name in several else None) for name, array in arrays.items()}
    shapes = layer, shape(targets, 0), others, shape(cotangent, 0 if cotangent.ndim else None)
    program = export.export(jax.jit(answers(sample)))(*shapes)
    assert "stablehlo.while" in program.mlir_module()
    for rows in (5, 4, 1):
        other = sample.of(rows=rows).beside(jnp.asarray)
        check_all(program.call(*operands(other)), other)


# --- Meshes -----------------------------------------------------------------------------------------------------------

PLACES = {"examples": ("rows", None), "classes": (None, "classes"), "both": ("rows", "classes")}
on_each_mesh = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
MESH = (4, 2)


def spread(sample, where, place):
    """The operands over eight devices."""
    rows, classes = place
    inputs, targets, arrays, cotangent = operands(sample)
    masked = len(sample.arrays.get("where", ())) > 1
    logits = P(rows, classes)
    at = {"weight": P(classes), "sample_weight": P(rows), "pos_weight": logits, "label_smoothing": P()}
    at["where"] = P(rows if masked else None, classes)
    layer = P(rows, None), P(classes, None), P(classes)
    of_value = P() if cotangent.ndim == 0 else P(rows) if sample.per_example else logits
    of_targets = P(rows) if sample.row["targets"] in ("indices", "positives") else logits
    specs = layer[: len(inputs)], of_targets, {name: at[name] for name in arrays}, of_value
    places = jax.tree.map(lambda spec: NamedSharding(where, spec), specs, is_leaf=lambda spec: isinstance(spec, P))
    return jax.device_put((inputs, targets, arrays, cotangent), places)


def all_reduced(program):
    """The shapes of what the devices add up among them."""
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program)
    return {
        tuple(map(int, filter(None, shape.split(","))))
        for kinds in found
        for shape in re.findall(r"\[([\d,]*)\]", kinds)
    }


@on_each_mesh
@pytest.mark.capability("jax", "sharded over a mesh by examples, classes or both, nothing gathered", **OF_LINEAR)
def test_sharded(sample, place, monkeypatch):
    """Blocks of four examples: of one for each device. No device has the logits, features or weights of another."""
    monkeypatch.setattr(sys.modules["unilabel.formulas.linear"], "BLOCK", 4 * 4)
    sample = sample.of(rows=12, classes=4).beside(jnp.asarray)
    arrays = spread(sample, mesh(AxisType.Auto), place)
    run = jax.jit(answers(sample)).lower(*arrays).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", run.as_text())
    results = run(*arrays)
    check_all(results, sample)
    for got, like in zip(results[1:], arrays[0], strict=False):
        assert got.sharding.is_equivalent_to(like.sharding, got.ndim)


@pytest.mark.parametrize("loss", LINEAR)
@pytest.mark.parametrize("place", [PLACES["classes"], PLACES["both"]], ids=["classes", "both"])
def test_traffic(loss, place, monkeypatch):
    """Of classes: a few numbers for each example, and the gradient of the features. Of examples: that of the weight."""
    n, length, classes = 64, 6, 40
    monkeypatch.setattr(sys.modules["unilabel.formulas.linear"], "BLOCK", 16 * classes)
    rows, columns = place
    rng = np.random.default_rng(0)
    where = mesh(AxisType.Auto)
    targets = rng.integers(0, classes, n) if loss == "linear_softmax_nll" else rng.integers(0, 2, (n, classes))
    features, weight = rng.uniform(-1, 1, (n, length)), rng.uniform(-1, 1, (classes, length))
    specs = P(rows, None), P(columns, None), P(rows, *(columns,) * (targets.ndim - 1))
    arrays = [
        jax.device_put(array, NamedSharding(where, spec))
        for array, spec in zip((features, weight, targets), specs, strict=True)
    ]
    run = jax.jit(jax.value_and_grad(getattr(ul, loss), (0, 1))).lower(*arrays).compile()
    own_rows, own_classes = 16 // (MESH[0] if rows else 1), classes // MESH[1]
    of_examples = {(own_rows,), (own_rows, 1), (own_rows, length), ()}
    assert all_reduced(run.as_text()) <= of_examples | ({(own_classes, length)} if rows else set())
    value, gradients = run(*arrays)
    logits_loss = getattr(ul, LINEAR[loss])
    expected = jax.value_and_grad(lambda *layer: logits_loss(layer[0] @ layer[1].T, targets), (0, 1))(features, weight)
    alike((value, gradients), expected)


@on_each_mesh
@pytest.mark.capability("jax", "sharding in types (AxisType.Explicit)", **OF_LINEAR)
def test_explicit_sharding(sample, place, monkeypatch):
    monkeypatch.setattr(sys.modules["unilabel.formulas.linear"], "BLOCK", 4 * 4)
    sample = sample.of(rows=12, classes=4).beside(jnp.asarray)
    where = mesh(AxisType.Explicit)
    with jax.set_mesh(where):
        inputs, *others = spread(sample, where, place)
        results = jax.jit(answers(sample))(inputs, *others)
        check_all(results, sample)
        for got, like in zip(results[1:], inputs, strict=False):
            assert jax.typeof(got) == jax.typeof(like)
