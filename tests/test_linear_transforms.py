"""The losses on the last linear layer's inputs, under each framework's transforms: as those of the logits are there."""

import math
import sys

import numpy as np
import pytest
from shared import asked_for
from test_linear import OF, Layer, close

import unilabel as ul

EACH_LOSS = pytest.mark.parametrize("loss", list(OF))
REDUCTIONS = pytest.mark.parametrize(
    "reduction", ["none", "mean", *(pytest.param(name, marks=pytest.mark.full) for name in ("sum", "batchmean"))]
)
QUICK = (ul.softmax_nll, "none"), (ul.multilabel_logistic_loss, "batchmean")
CASES = pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        pytest.param(loss, reduction, marks=() if (loss, reduction) in QUICK else pytest.mark.full)
        for loss in OF
        for reduction in ("none", "sum", "mean", "batchmean")
    ],
)
OPTIONS = {"label_smoothing": 0.1, "where": [True, True, True, False, True]}


pytestmark = pytest.mark.usefixtures("small_blocks")  # of three examples


def sample(loss, reduction):
    """A layer, targets that no mask of OPTIONS meets, and a cotangent for each loss."""
    layer = Layer()
    targets = layer.indices % 3 if loss is ul.softmax_nll else layer.labels
    shape = () if reduction != "none" else (7,) if loss is ul.softmax_nll else (7, 5)
    return layer, targets, np.random.default_rng(1).uniform(-2, 2, shape)


class Torch:
    def __init__(self, loss, reduction):
        import torch

        layer, targets, cotangent = sample(loss, reduction)
        self.inputs = tuple(map(torch.from_numpy, layer.inputs))
        self.targets, self.cotangent = torch.from_numpy(targets), torch.from_numpy(cotangent)
        where = torch.tensor(OPTIONS["where"])

        def linear(features, weight, bias):
            losses = OF[loss](
                features, weight, self.targets, linear_bias=bias, reduction=reduction, **OPTIONS | {"where": where}
            )
            return (losses * self.cotangent).sum()

        def on_logits(features, weight, bias):
            logits = torch.nn.functional.linear(features, weight, bias)
            losses = loss(logits, self.targets, reduction=reduction, **OPTIONS | {"where": where})
            return (losses * self.cotangent).sum()

        self.both = linear, on_logits

    def leaves(self):
        return [array.clone().requires_grad_() for array in self.inputs]

    def gradients(self, function, **options):
        import torch

        leaves = self.leaves()
        return torch.autograd.grad(function(*leaves), leaves, **options), leaves


def torch_close(got, right):
    import torch

    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)


@CASES
def test_torch_transforms(request, loss, reduction):
    """Double backward, and torch.func's grad, jvp and hessian."""
    asked_for("torch", request)
    import torch

    case = Torch(loss, reduction)
    found = []
    for function in case.both:
        gradients, leaves = case.gradients(function, create_graph=True)
        second = torch.autograd.grad(sum((array**2).sum() for array in gradients), leaves)
        found.append((*(array.detach() for array in gradients), *second))
    torch_close(*found)
    tangents = tuple(torch.ones_like(array) for array in case.inputs)
    torch_close(*(torch.func.jvp(function, case.inputs, tangents) for function in case.both))
    for i in range(3):
        torch_close(*(torch.func.grad(function, i)(*case.inputs) for function in case.both))
    torch_close(*(torch.func.hessian(function, (0, 2))(*case.inputs) for function in case.both))


@REDUCTIONS
def test_torch_backward_twice_is_scaled_once(request, reduction):
    asked_for("torch", request)
    import torch

    case = Torch(ul.softmax_nll, reduction)
    leaves = case.leaves()
    value = case.both[0](*leaves) * 3
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    torch_close(torch.autograd.grad(value, leaves, retain_graph=True), first)
    torch_close(first, tuple(3 * array for array in case.gradients(case.both[1])[0]))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2)])
@REDUCTIONS
def test_torch_frozen(request, monkeypatch, frozen, reduction):
    """What needs no gradient costs no product, and the others have theirs."""
    asked_for("torch", request)
    import torch

    eager, products = sys.modules["unilabel.backends.torch_namespaces"].eager, []
    add, add_sum = eager.add_product, eager.add_sum
    monkeypatch.setattr(eager, "matmul", lambda x, y: products.append("features") or x @ y)
    monkeypatch.setattr(eager, "add_product", lambda *arrays: products.append("weight") or add(*arrays))
    monkeypatch.setattr(eager, "add_sum", lambda *arrays: products.append("bias") or add_sum(*arrays))
    case = Torch(ul.softmax_nll, reduction)
    leaves = [array.detach() if i in frozen else array for i, array in enumerate(case.leaves())]
    wanted = [array for array in leaves if array.requires_grad]
    found = torch.autograd.grad(case.both[0](*leaves), wanted)
    assert ("features" in products) == (0 not in frozen)
    for i, name in ((1, "weight"), (2, "bias")):  # of three blocks
        assert products.count(name) == 3 * (i not in frozen)
    right = case.gradients(case.both[1])[0]
    torch_close(found, tuple(array for i, array in enumerate(right) if i not in frozen))


def test_torch_gradients_per_example(request):
    asked_for("torch", request)
    import torch

    layer = Layer()
    features, weight, _ = map(torch.from_numpy, layer.inputs)
    targets = torch.from_numpy(layer.indices)

    def linear(weight, features, target):
        return ul.linear_softmax_nll(features, weight, target)

    def on_logits(weight, features, target):
        return ul.softmax_nll(weight @ features, target)

    found = (torch.func.vmap(torch.func.grad(f), (None, 0, 0))(weight, features, targets) for f in (linear, on_logits))
    torch_close(*found)
    units = torch.eye(7, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    values = ul.linear_softmax_nll(features, leaf, targets, reduction="none")
    (rows,) = torch.autograd.grad(values, leaf, units, is_grads_batched=True)
    logits = torch.nn.functional.linear(features, leaf)
    values = ul.softmax_nll(logits, targets, reduction="none")
    torch_close(rows, torch.autograd.grad(values, leaf, units, is_grads_batched=True)[0])


@CASES
def test_torch_compiled(request, loss, reduction):
    asked_for("torch", request)
    import torch

    case = Torch(loss, reduction)
    compiled = torch.compile(case.both[0], backend="aot_eager", fullgraph=True, dynamic=True)
    torch_close(case.gradients(compiled)[0], case.gradients(case.both[1])[0])


def test_torch_exported(request):
    asked_for("torch", request)
    import torch

    class Model(torch.nn.Module):
        def forward(self, features, weight, bias, targets):
            return ul.linear_softmax_nll(features, weight, targets, linear_bias=bias)

    layer, (n,) = Layer(), torch.export.dims("n")
    arrays = *map(torch.from_numpy, layer.inputs), torch.from_numpy(layer.indices)
    program = torch.export.export(Model(), arrays, dynamic_shapes=({0: n}, None, None, {0: n})).module()
    for rows in (7, 4):
        features, weight, bias, targets = arrays
        features, targets = features[:rows], targets[:rows]
        right = ul.softmax_nll(torch.nn.functional.linear(features, weight, bias), targets)
        torch_close(program(features, weight, bias, targets), right)


@EACH_LOSS
def test_torch_autocast(request, loss):
    """Operands are rounded as F.linear has them; logits stay in float32; gradients come in each operand's dtype."""
    asked_for("torch", request)
    import torch

    layer = Layer()
    targets = torch.from_numpy(layer.targets(loss))
    features, weight, bias = (torch.from_numpy(array).float() for array in layer.inputs)
    leaves = [features.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        value = OF[loss](leaves[0], leaves[1], targets, linear_bias=leaves[2])
    rounded = [array.detach().bfloat16().float().requires_grad_() for array in leaves]
    right = loss(torch.nn.functional.linear(*rounded), targets)
    torch.testing.assert_close(value, right, rtol=1e-6, atol=0)
    found, expected = torch.autograd.grad(value, leaves), torch.autograd.grad(right, rounded)
    assert [array.dtype for array in found] == [torch.bfloat16, torch.float32, torch.float32]
    for array, other in zip(found, expected, strict=True):
        torch.testing.assert_close(array.float(), other.bfloat16().float(), rtol=2.0**-7, atol=1e-6)


@EACH_LOSS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_torch_compiled_cotangent_that_is_not_finite(request, loss, backend):
    """A masked class keeps its gradient of 0."""
    asked_for("torch", request)
    import torch

    torch.compiler.reset()
    case = Torch(loss, "mean")
    compiled = torch.compile(case.both[0], backend=backend, fullgraph=True)
    leaves = case.leaves()
    _, weight, bias = torch.autograd.grad(compiled(*leaves) * math.inf, leaves)
    for gradient in (weight, bias):
        assert (gradient[3] == 0).all()
        assert not torch.isfinite(gradient[0]).any()


# --- Gradients that are 0, of which second derivatives are not -------------------------------------------------------


@pytest.mark.parametrize("zero", ["weight", "a feature"])
@EACH_LOSS
def test_second_derivatives_where_a_gradient_is_zero(recorder, loss, zero):
    """By features and weight, which no rule for gradients of 0 may leave out."""
    layer = Layer()
    features, weight = layer.features.copy(), layer.weight.copy()
    if zero == "weight":
        weight[:] = 0
    else:
        features[:, 0] = 0
    x, w = recorder.array(features, "float64"), recorder.array(weight, "float64")
    targets = layer.targets(loss)
    if recorder.name == "torch":
        w.requires_grad_()  # else backend.vjp differentiates once
    direction = recorder.array(np.random.default_rng(0).uniform(1, 2, weight.shape), "float64")

    def transposed(w):
        return sys.modules["tensorflow"].transpose(w) if recorder.name == "tensorflow" else w.T

    def of_features(function):
        def slope(x):
            return recorder.backend.vjp(lambda w: function(x, w), w, recorder.array(1.0, "float64"))[1]

        return recorder.numpy(recorder.backend.vjp(slope, x, direction)[1])

    found = of_features(lambda x, w: OF[loss](x, w, targets))
    close(found, of_features(lambda x, w: loss(x @ transposed(w), targets)))


# --- JAX --------------------------------------------------------------------------------------------------------------


def of_jax(loss, reduction):
    import jax.numpy as jnp

    layer, targets, cotangent = sample(loss, reduction)
    options = OPTIONS | {"where": jnp.asarray(OPTIONS["where"]), "reduction": reduction}
    inputs, targets = tuple(map(jnp.asarray, layer.inputs)), jnp.asarray(targets)

    def linear(features, weight, bias, smoothing=0.1):
        more = options | {"label_smoothing": smoothing, "linear_bias": bias}
        return (OF[loss](features, weight, targets, **more) * cotangent).sum()

    def on_logits(features, weight, bias, smoothing=0.1):
        logits = features @ weight.T + bias
        return (loss(logits, targets, **options | {"label_smoothing": smoothing}) * cotangent).sum()

    return inputs, linear, on_logits


def jax_close(got, right):
    import jax

    jax.tree.map(close, got, right)


@CASES
def test_jax_transforms(request, loss, reduction):
    """grad, jvp and hessian, of the layer's inputs and of what smooths the targets."""
    asked_for("jax", request)
    import jax
    import jax.numpy as jnp

    inputs, *both = of_jax(loss, reduction)
    smoothing = jnp.asarray(0.1)
    jax_close(*(jax.value_and_grad(function, (0, 1, 2, 3))(*inputs, smoothing) for function in both))
    tangents = tuple(map(jnp.ones_like, inputs))
    jax_close(*(jax.jvp(function, inputs, tangents) for function in both))
    jax_close(*(jax.jit(jax.hessian(function, (1, 2)))(*inputs) for function in both))


@REDUCTIONS
def test_jax_vmap(request, reduction):
    asked_for("jax", request)
    import jax
    import jax.numpy as jnp

    (features, weight, bias), *both = of_jax(ul.softmax_nll, reduction)
    weights = jnp.stack([weight, weight + 1])
    jax_close(*(jax.vmap(jax.grad(function, 1), (None, 0, None))(features, weights, bias) for function in both))


def test_jax_needs_no_more_than_is_asked_for(request):
    """A frozen weight: no array of the weight's shape is summed in the program."""
    asked_for("jax", request)
    import jax

    inputs, linear, _ = of_jax(ul.softmax_nll, "mean")
    products = {
        wanted: str(jax.make_jaxpr(jax.grad(linear, wanted))(*inputs)).count("dot_general") for wanted in (0, 1, (0, 1))
    }
    assert products[0] == products[1] < products[0, 1]


def test_jax_exported(request):
    asked_for("jax", request)
    import jax
    import jax.numpy as jnp
    from jax import export

    layer = Layer()
    features, weight, bias = map(jnp.asarray, layer.inputs)
    targets = jnp.asarray(layer.indices)

    def gradients(features, weight, bias, targets):
        return jax.grad(lambda *x: ul.linear_softmax_nll(*x[:2], targets, linear_bias=x[2]), (0, 1, 2))(
            features, weight, bias
        )

    (n,) = export.symbolic_shape("n")
    shapes = [(n, 3), weight.shape, bias.shape, (n,)]
    arrays = features, weight, bias, targets
    given = [jax.ShapeDtypeStruct(shape, array.dtype) for shape, array in zip(shapes, arrays, strict=True)]
    program = export.export(jax.jit(gradients))(*given)
    jax_close(program.call(*arrays), gradients(*arrays))


# --- TensorFlow -------------------------------------------------------------------------------------------------------


def of_tensorflow(loss, reduction):
    import tensorflow as tf

    layer, targets, cotangent = sample(loss, reduction)
    inputs, targets = tuple(map(tf.constant, layer.inputs)), tf.constant(targets)

    def linear(features, weight, bias):
        losses = OF[loss](features, weight, targets, linear_bias=bias, reduction=reduction, **OPTIONS)
        return tf.reduce_sum(losses * cotangent)

    def on_logits(features, weight, bias):
        logits = tf.matmul(features, weight, transpose_b=True) + bias
        return tf.reduce_sum(loss(logits, targets, reduction=reduction, **OPTIONS) * cotangent)

    return inputs, linear, on_logits


def taped(function):
    import tensorflow as tf

    @tf.autograph.experimental.do_not_convert
    def run(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            value = function(*arrays)
        return value, *tape.gradient(value, arrays)

    return run


def twice(function):
    import tensorflow as tf

    def total(*arrays):
        return tf.add_n([tf.reduce_sum(array**2) for array in taped(function)(*arrays)[1:]])

    return taped(total)


def tensorflow_close(got, right):
    for array, expected in zip(got, right, strict=True):
        close(array.numpy(), expected.numpy())


@CASES
def test_tensorflow_transforms(request, loss, reduction):
    """Tapes, nested tapes, a tape outside of a graph, one in it, XLA, forward mode."""
    asked_for("tensorflow", request)
    import tensorflow as tf

    inputs, linear, on_logits = of_tensorflow(loss, reduction)
    right = taped(on_logits)(*inputs)
    tensorflow_close(taped(linear)(*inputs), right)
    tensorflow_close(twice(linear)(*inputs), twice(on_logits)(*inputs))
    outside = tf.function(linear, autograph=False)
    tensorflow_close(taped(outside)(*inputs), right)
    compiled = tf.function(taped(linear), autograph=False, jit_compile=True)
    tensorflow_close(compiled(*inputs), right)
    found = []
    for function in (linear, on_logits):
        with tf.autodiff.ForwardAccumulator(inputs, tuple(map(tf.ones_like, inputs))) as accumulator:
            value = function(*inputs)
        found.append([value, accumulator.jvp(value)])
    tensorflow_close(*found)


@pytest.mark.full
@REDUCTIONS
def test_tensorflow_nested_tapes_in_a_graph(request, reduction):
    asked_for("tensorflow", request)
    import tensorflow as tf

    inputs, linear, on_logits = of_tensorflow(ul.softmax_nll, reduction)
    tensorflow_close(tf.function(twice(linear), autograph=False)(*inputs), twice(on_logits)(*inputs))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensorflow_unknown_batch(request, reduction, jit):
    """More examples than a block has, fewer, and none."""
    asked_for("tensorflow", request)
    import tensorflow as tf

    layer = Layer()
    features, weight, bias = map(tf.constant, layer.inputs)
    targets = tf.constant(layer.indices)
    shapes = [[None, 3], weight.shape, bias.shape]
    signature = [tf.TensorSpec(shape, tf.float64) for shape in shapes] + [tf.TensorSpec([None], tf.int64)]

    def gradients(loss, targets):
        return taped(lambda *inputs: loss(*inputs, targets))

    def linear(features, weight, bias, targets):
        return tf.reduce_sum(ul.linear_softmax_nll(features, weight, targets, linear_bias=bias, reduction=reduction))

    def on_logits(features, weight, bias, targets):
        logits = tf.matmul(features, weight, transpose_b=True) + bias
        return tf.reduce_sum(ul.softmax_nll(logits, targets, reduction=reduction))

    @tf.function(autograph=False, jit_compile=jit, input_signature=signature)
    def run(features, weight, bias, targets):
        return gradients(linear, targets)(features, weight, bias)

    for rows in (7, 2, 0):
        right = gradients(on_logits, targets[:rows])(features[:rows], weight, bias)
        tensorflow_close(run(features[:rows], weight, bias, targets[:rows]), right)


@REDUCTIONS
def test_tensorflow_jacobian(request, reduction):
    asked_for("tensorflow", request)
    import tensorflow as tf

    layer = Layer()
    features, weight, bias = map(tf.constant, layer.inputs)

    def jacobian(function):
        with tf.GradientTape() as tape:
            tape.watch(weight)
            value = function()
        return [tape.jacobian(value, weight)]

    def linear():
        return ul.linear_softmax_nll(features, weight, layer.indices, linear_bias=bias, reduction=reduction)

    def on_logits():
        logits = tf.matmul(features, weight, transpose_b=True) + bias
        return ul.softmax_nll(logits, layer.indices, reduction=reduction)

    tensorflow_close(jacobian(linear), jacobian(on_logits))


def test_tensorflow_a_frozen_layer_is_not_differentiated(request, monkeypatch):
    """Nor is what no tape watches."""
    asked_for("tensorflow", request)
    import tensorflow as tf

    inputs, linear, _ = of_tensorflow(ul.softmax_nll, "mean")
    asked, module = [], sys.modules["unilabel.backends.tensorflow"]
    closed = module._linear
    monkeypatch.setattr(module, "_linear", lambda *call: asked.append(tuple(call[4])) or closed(*call))
    with tf.GradientTape() as tape:
        tape.watch(inputs[0])
        value = linear(*inputs)
    assert tape.gradient(value, inputs[0]).shape == inputs[0].shape
    linear(*inputs)
    assert asked == [(True, False, False), (False, False, False)]
