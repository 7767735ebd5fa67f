"""TensorFlow: its tapes, functions, loops, devices, saved models and Keras' fit, on these losses as on its own."""

import importlib
import os
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported

import keras
import numpy as np
import pytest
import tensorflow as tf
from capabilities import LOSSES, close
from tensorflow.python.eager import context
from unilabel.backends.keras import MultilabelLogisticLoss, SoftmaxNLL
from unilabel.conformance.cases import Maker
from unilabel.conformance.oracle import expected

import unilabel as ul

two_losses = pytest.mark.parametrize("sample", ["multilabel_logistic_loss", "softmax_nll"], indirect=True)


def value_and_pullback(sample, x, targets=None, cotangent=None):
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = sample(x, targets, reduction="none")
    return values, tape.gradient(values, x, tf.constant(sample.cotangent) if cotangent is None else cotangent)


def gradient_of_sum(sample, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = sample(x, reduction="none")
    return tape.gradient(values, x)


def right(sample, values, gradient):
    for tensor, numbers in ((values, sample.values), (gradient, sample.pulled_back)):
        assert tf.is_tensor(tensor)
        assert tensor.dtype == tf.float64
        assert tensor.shape == numbers.shape
        close(tensor, numbers)


def answer(name, x, targets, **options):
    """The oracle's losses, their sum's gradient and its Hessian diagonal."""
    maker = Maker("transforms", "float64", 0)
    found = expected(maker.case(name, x, targets, **{"reduction": "none"} | options))
    value, gradient, hessian = (
        np.array([float(number.value) for number in numbers])
        for numbers in (found.value, found.gradient_of_sum, found.hessian)
    )
    return value, gradient.reshape(np.shape(x)), hessian.reshape(np.shape(x))


def diagonal(hessian):
    return np.einsum("ncnc->nc", hessian)


def unit_tangents(shape):
    """The directions of a gradient's elements, one after the other."""
    return [tf.constant(e.reshape(shape)) for e in np.eye(np.prod(shape))]


# --- Tapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.capability("tensorflow", "GradientTape")
def test_gradient_tape(sample):
    right(sample, *value_and_pullback(sample, tf.constant(sample.x)))


@pytest.mark.capability("tensorflow", "tf.Variable as the logits")
def test_variable(sample):
    x = tf.Variable(sample.x)
    with tf.GradientTape() as tape:  # watches variables by itself
        values = sample(x, reduction="none")
    right(sample, values, tape.gradient(values, x, tf.constant(sample.cotangent)))


@pytest.mark.capability("tensorflow", "persistent GradientTape")
def test_persistent_tape(sample):
    x = tf.constant(sample.x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        values = sample(x, reduction="none")
        total = tf.reduce_sum(values)
    right(sample, values, tape.gradient(values, x, tf.constant(sample.cotangent)))
    right(sample, values, tape.gradient(values, x, tf.constant(sample.cotangent)))
    close(tape.gradient(total, x), sample.gradient)


@pytest.mark.capability("tensorflow", "nested tapes, jacobian")
@pytest.mark.parametrize("compiled", [False, True])
def test_nested_tapes(sample, compiled):
    @tf.function(autograph=False) if compiled else lambda function: function
    def hessian(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            gradient = gradient_of_sum(sample, x)
        return gradient, outer.jacobian(gradient, x, unconnected_gradients="zero")

    gradient, second = hessian(tf.constant(sample.x))
    close(gradient, sample.gradient)
    close(diagonal(second), sample.hessian)


@pytest.mark.capability("tensorflow", "batch_jacobian")
@pytest.mark.parametrize("pfor", [True, False])
def test_batch_jacobian(sample, pfor):
    x = tf.constant(sample.x)
    with tf.GradientTape(persistent=not pfor) as tape:
        tape.watch(x)
        gradient = gradient_of_sum(sample, x)
    jacobian = tape.batch_jacobian(gradient, x, unconnected_gradients="zero", experimental_use_pfor=pfor)
    close(np.einsum("ncc->nc", jacobian), sample.hessian)


@pytest.mark.parametrize("compiled", [False, True])
def test_cotangents_of_gathered_rows(sample, compiled):
    """They are tf.IndexedSlices. The fourth of equal eager calls is compiled, and takes tensors alone."""

    def gathered(x, **options):
        return tf.gather(sample(x, **options), [0, 2])

    @tf.function(autograph=False) if compiled else lambda function: function
    def derivatives(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            gradient = gradient_of_sum(gathered, x)
            column = tf.gather(gradient, [0, 2])[:, 0]
        return gradient, outer.gradient(column, x, unconnected_gradients="zero")

    x, right = tf.constant(sample.x), np.zeros_like(sample.x)
    right[[0, 2]] = sample.gradient[[0, 2]]
    for _ in range(5):
        close(gradient_of_sum(gathered, x), right)
        gradient, second = derivatives(x)
        close(gradient, right)
        close(second.numpy()[[0, 2], 0], sample.hessian[[0, 2], 0])


@pytest.mark.capability("tensorflow", "gradient by float targets")
@two_losses
def test_gradient_by_targets(sample):
    """A loss is linear in its targets: the derivative by one is the loss with it less the loss without it."""
    x, z = tf.constant(sample.x), tf.constant(sample.distributions)
    with tf.GradientTape() as tape:
        tape.watch(z)
        values = sample(x, z, reduction="none")
    by_z = tape.gradient(values, z)
    if sample.name == "softmax_nll":  # a loss for each class, and none without
        right = np.stack([answer(sample.name, sample.x.tolist(), [c] * len(x))[0] for c in range(x.shape[1])], -1)
    else:
        zeros = np.zeros(x.shape, int)
        one, none = (answer(sample.name, sample.x.tolist(), z.tolist())[0] for z in (zeros + 1, zeros))
        right = (one - none).reshape(x.shape)
    close(by_z, right)


@pytest.mark.capability("tensorflow", "recompute_grad")
def test_recompute_grad(sample):
    x = tf.constant(sample.x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = tf.recompute_grad(lambda x: sample(x, reduction="none"))(x)
    right(sample, values, tape.gradient(values, x, tf.constant(sample.cotangent)))


# --- Forward mode -----------------------------------------------------------------------------------------------------


def forward(function, x, tangent):
    with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
        result = function(x)
    return accumulator.jvp(result)


@pytest.mark.capability("tensorflow", "ForwardAccumulator")
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode(sample, compiled):
    """The transposed pullback: its products with the same vectors are the same."""

    def jvp(x, tangent):
        return forward(lambda x: sample(x, reduction="none"), x, tangent)

    jvp = tf.function(jvp, autograph=False) if compiled else jvp
    x, weight = tf.constant(sample.x), sample.cotangent
    per_element = [np.sum(jvp(x, tangent) * weight) for tangent in unit_tangents(sample.x.shape)]
    close(np.reshape(per_element, sample.x.shape), sample.pulled_back)


@pytest.mark.capability("tensorflow", "forward over reverse")
def test_forward_over_reverse(sample):
    x = tf.constant(sample.x)
    products = [forward(lambda x: gradient_of_sum(sample, x), x, v) for v in unit_tangents(x.shape)]
    products = [tf.zeros_like(x) if product is None else product for product in products]  # nll's is None
    close(diagonal(np.reshape(products, 2 * sample.x.shape)), sample.hessian)


@pytest.mark.capability("tensorflow", "reverse over forward")
def test_reverse_over_forward(sample):
    x, second = tf.constant(sample.x), []
    for v in unit_tangents(x.shape):
        with tf.GradientTape() as tape:
            tape.watch(x)
            slope = forward(lambda x: sample(x, reduction="sum"), x, v)
        second.append(tape.gradient(slope, x, unconnected_gradients="zero"))
    close(diagonal(np.reshape(second, 2 * sample.x.shape)), sample.hessian, ulp=64)


INFINITE = [
    ("multilabel_logistic_loss", [[np.inf, -np.inf, 0.5]], [[1, 0, 1]]),
    ("multilabel_logistic_loss", [[np.inf, -np.inf, 0.5]], [[0, 1, 0]]),
    ("softmax_nll", [[np.inf, 0.0, 1.0]], [0]),
    ("softmax_nll", [[np.inf, 0.0, 1.0]], [2]),
    ("softmax_nll", [[-np.inf, 0.0, 1.0]], [1]),
    ("softmax_nll", [[-np.inf, 0.0, 1.0]], [0]),
]


@pytest.mark.capability("tensorflow", "ForwardAccumulator at ±inf", losses=("multilabel_logistic_loss", "softmax_nll"))
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "x", "targets"), INFINITE)
def test_forward_mode_at_infinity(name, x, targets, compiled):
    """No 0 · inf comes of the derivatives that nobody asked for."""
    _, gradient, _ = answer(name, x, targets)

    def jvp(x, tangent):
        return forward(lambda x: getattr(ul, name)(x, targets, reduction="sum"), x, tangent)

    jvp = tf.function(jvp, autograph=False) if compiled else jvp
    slopes = [jvp(tf.constant(x, tf.float64), v) for v in unit_tangents(np.shape(x))]
    close(np.reshape(slopes, np.shape(x)), gradient)


def test_forward_mode_of_activations_at_infinity():
    x, v = tf.constant([[np.inf, -np.inf, 0.0]]), tf.ones((1, 3))
    assert forward(ul.sigmoid, x, v).numpy().tolist() == [[0, 0, 0.25]]
    assert forward(ul.log_sigmoid, x, v).numpy().tolist() == [[0, 1, 0.5]]
    assert forward(ul.softmax, x, v).numpy().tolist() == [[0, 0, 0]]


# --- Digits of the second derivatives ---------------------------------------------------------------------------------

CONFIDENT = [
    ([[60.0, 0.0]], [0]),
    ([[60.0, 0.0]], [1]),
    ([[60.0, 0.0]], [[0.25, 0.75]]),
    ([[60.0, 0.0, 59.0]], [1]),
    ([[0.0, 0.0, 37.0]], [2]),
    ([[0.0] * 40], [0]),  # nobody has much
]


def second_derivative(function, x):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = function(x)
        gradient = inner.gradient(value, x)
    return gradient, outer.jacobian(gradient, x)


@pytest.mark.capability("tensorflow", "second derivatives to the last digits", losses=["softmax_nll"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("x", "targets"), CONFIDENT)
def test_second_derivatives_of_confident_logits(x, targets, compiled):
    *_, right = answer("softmax_nll", x, targets)
    twice = tf.function(second_derivative, autograph=False) if compiled else second_derivative
    _, hessian = twice(lambda x: ul.softmax_nll(x, targets, reduction="sum"), tf.constant(x, tf.float64))
    close(diagonal(hessian), right, ulp=64)
    np.testing.assert_allclose(hessian, np.einsum("ncmd->mdnc", hessian), rtol=64 * 2.0**-52, atol=0)


@pytest.mark.parametrize("c", [0, 1])
def test_mixed_derivative_of_confident_logits(c):
    """By the target of a class, then by the logits: the gradient of the loss of that class."""
    x, z = tf.constant([[60.0, 0.0]], tf.float64), tf.constant([[0.25, 0.75]], tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(z)
            loss = ul.softmax_nll(x, z, reduction="sum")
        by_target = inner.gradient(loss, z)[0, c]
    close(outer.gradient(by_target, x), answer("softmax_nll", [[60.0, 0.0]], [c])[1])


@pytest.mark.parametrize(("x", "y"), [(x, y) for x, y in CONFIDENT if np.ndim(y) == 1])
def test_log_softmax_keeps_the_digits_of_its_derivatives(x, y):
    """It is minus the loss, class by class."""
    _, gradient, hessian = answer("softmax_nll", x, y)
    by_tape = second_derivative(lambda x: -ul.log_softmax(x)[0, y[0]], tf.constant(x, tf.float64))
    close(by_tape[0], gradient, ulp=64)
    close(diagonal(by_tape[1]), hessian, ulp=64)


def test_softmax_keeps_the_digits_of_its_derivative():
    """p (1 - p) is the Hessian diagonal of the loss."""
    x = [[60.0, 0.0]]
    for c in (0, 1):
        *_, hessian = answer("softmax_nll", x, [c])
        array = tf.constant(x, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(array)
            p = ul.softmax(array)[0, c]
        close(tape.gradient(p, array)[0, c], hessian[0, c], ulp=64)


# --- tf.function ------------------------------------------------------------------------------------------------------


@pytest.mark.capability("tensorflow", "tf.function")
def test_function(sample):
    step = tf.function(lambda x, y: value_and_pullback(sample, x, y))
    right(sample, *step(tf.constant(sample.x), tf.constant(sample.targets)))


@pytest.mark.capability("tensorflow", "tf.function(jit_compile=True)")
def test_jit_compile(sample):
    step = tf.function(lambda x, y: value_and_pullback(sample, x, y), jit_compile=True)
    right(sample, *step(tf.constant(sample.x), tf.constant(sample.targets)))


@pytest.mark.capability("tensorflow", "tf.function differentiated from outside")
@pytest.mark.parametrize("jit", [False, True])
def test_tape_around_a_function(sample, jit):
    function = tf.function(lambda x: sample(x, reduction="none"), jit_compile=jit)
    x = tf.constant(sample.x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = function(x)
    right(sample, values, tape.gradient(values, x, tf.constant(sample.cotangent)))


def spec(numbers, shape):
    return tf.TensorSpec(shape, tf.as_dtype(numbers.dtype))


@pytest.mark.capability("tensorflow", "unknown batch size")
def test_unknown_batch_size(sample):
    signature = [spec(a, [None, *a.shape[1:]]) for a in (sample.x, sample.targets, sample.cotangent)]
    step = tf.function(lambda *arrays: value_and_pullback(sample, *arrays), input_signature=signature)
    right(sample, *step(sample.x, sample.targets, sample.cotangent))


@pytest.mark.capability("tensorflow", "unknown shape of known rank")
def test_unknown_shape(sample):
    signature = [spec(a, [None] * a.ndim) for a in (sample.x, sample.targets, sample.cotangent)]
    step = tf.function(lambda *arrays: value_and_pullback(sample, *arrays), input_signature=signature)
    right(sample, *step(sample.x, sample.targets, sample.cotangent))


@pytest.mark.capability("tensorflow", "unknown rank")
@pytest.mark.parametrize("jit", [False, True])
def test_unknown_rank(sample, jit):
    signature = [spec(a, None) for a in (sample.x, sample.targets, sample.cotangent)]
    step = tf.function(lambda *arrays: value_and_pullback(sample, *arrays), input_signature=signature, jit_compile=jit)
    right(sample, *step(sample.x, sample.targets, sample.cotangent))
    one_more = [array[:, None] for array in (sample.x, sample.targets, sample.cotangent)]
    right(sample, *(tf.squeeze(result, 1) for result in step(*one_more)))


def test_unknown_rank_with_options():
    """What is given beside the logits broadcasts, or has to fit, as it does where the rank is known."""
    x = np.random.default_rng(0).normal(size=(2, 2, 3))
    z, y = (x > 0).astype("float64"), np.array([[0, 2], [1, -1]])
    where, weight, rows = [True, True, False], [0.5, 1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]]
    for loss, targets, options in (
        (ul.multilabel_logistic_loss, z, {"weight": weight, "pos_weight": 3.0, "where": where, "reduction": "mean"}),
        (
            ul.multilabel_logistic_loss,
            z,
            {"weight": [[[1.0], [2.0]]], "label_smoothing": 0.1, "reduction": "batchmean"},
        ),
        (ul.softmax_nll, y, {"weight": weight, "sample_weight": rows, "ignore_index": -1, "reduction": "mean"}),
        (ul.softmax_nll, z, {"where": where, "reduction": "batchmean"}),
        (ul.softmax_nll, y, {"reduction": "none", "ignore_index": -1}),
    ):
        unknown = tf.TensorSpec(None, tf.float64), tf.TensorSpec(None, tf.as_dtype(targets.dtype))
        run = ul.value_and_grad(loss)
        traced = tf.function(lambda x, z, run=run, options=options: run(x, z, **options), input_signature=unknown)
        value, gradient, _ = answer(loss.__name__, x.tolist(), targets.tolist(), **options)
        losses, slopes = traced(x, targets)
        close(losses, value.reshape(losses.shape))
        close(slopes, gradient, ulp=64)
        with pytest.raises(tf.errors.InvalidArgumentError):
            traced(x, targets.reshape(4, 1, *targets.shape[2:]))  # as many, but others


def test_unknown_rank_of_activations():
    x = np.random.default_rng(0).normal(size=(2, 2, 3))
    p, sigma = np.exp(x) / np.exp(x).sum(-1, keepdims=True), 1 / (1 + np.exp(-x))
    for activation, right in (
        (ul.sigmoid, sigma),
        (ul.log_sigmoid, np.log(sigma)),
        (ul.softmax, p),
        (ul.log_softmax, np.log(p)),
    ):
        close(tf.function(activation, input_signature=[tf.TensorSpec(None, tf.float64)])(x), right)


def test_unknown_rank_and_another_axis():
    spec = tf.TensorSpec(None, tf.float64)
    for call in (lambda x: ul.softmax_nll(x, x, axis=0), lambda x: ul.softmax(x, axis=(-2, -1))):
        with pytest.raises(
            ValueError, match=r"Expected axis: -1, as the rank .* is not known \(tf.ensure_shape sets it"
        ):
            tf.function(call, autograph=False).get_concrete_function(spec)
    known = tf.function(lambda x: ul.softmax(tf.ensure_shape(x, [None, None]), axis=0), input_signature=[spec])
    close(known(np.zeros((2, 2))), [[0.5, 0.5], [0.5, 0.5]])


def test_options_as_python_scalars_retrace_and_no_more():
    traces = []

    @tf.function
    def step(x, y, smoothing):
        traces.append(smoothing)
        return ul.softmax_nll(x, y, label_smoothing=smoothing)

    x, y = tf.zeros((2, 3)), tf.constant([0, 1])
    for smoothing in (0.0, 0.1, 0.0, 0.1, 0.1):
        step(x, y, smoothing)
    assert traces == [0.0, 0.1]


def test_no_more_than_a_thousand_calls_are_kept(monkeypatch):
    module = importlib.import_module("unilabel.backends.tensorflow")
    for limit in (module.LARGE, 1):
        monkeypatch.setattr(module, "LARGE", limit)
        monkeypatch.setattr(module, "_calls", dict.fromkeys(range(1000), 1))
        ul.softmax_nll(tf.zeros((2, 3)), tf.constant([0, 1]))
        assert len(module._calls) == 1


def test_eager_calls_leave_no_functions_behind():
    def calls(numbers):
        for i in numbers:
            x = tf.zeros((2 + i % 5, 3))
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = ul.softmax_nll(x, [0] * x.shape[0], label_smoothing=i / 1000)
            tape.gradient(loss, x)
            ul.value_and_grad(ul.softmax_nll)(x, [0] * x.shape[0], label_smoothing=i / 1000)
        return len(context.context().list_function_names())

    assert calls(range(3)) == calls(range(3, 20))


# --- Loops, maps and data ---------------------------------------------------------------------------------------------


def example_by_example(sample, map_over):
    """Values and gradients, an example at a time."""

    def one(arguments):
        x, y, cotangent = arguments
        return value_and_pullback(sample, x, y, cotangent)

    dtypes = (tf.TensorSpec(sample.cotangent.shape[1:], tf.float64), tf.TensorSpec(sample.x.shape[1:], tf.float64))
    return map_over(one, (sample.x, sample.targets, sample.cotangent), dtypes)


@pytest.mark.capability("tensorflow", "vectorized_map")
def test_vectorized_map(sample):
    right(sample, *example_by_example(sample, lambda one, elems, _: tf.vectorized_map(one, elems)))


@pytest.mark.capability("tensorflow", "map_fn")
def test_map_fn(sample):
    right(
        sample,
        *example_by_example(sample, lambda one, elems, specs: tf.map_fn(one, elems, fn_output_signature=specs)),
    )


@pytest.mark.capability("tensorflow", "Dataset.map")
def test_dataset_map(sample):
    def through_data(one, elems, _):
        data = tf.data.Dataset.from_tensor_slices(elems).map(lambda *arguments: one(arguments))
        return (tf.stack(results) for results in zip(*data, strict=True))

    right(sample, *example_by_example(sample, through_data))


@pytest.mark.capability("tensorflow", "while_loop")
@pytest.mark.parametrize("compiled", [False, True])
def test_while_loop(sample, compiled):
    """The sum over the examples, differentiated through the loop."""

    def total(x):
        y, weight = tf.constant(sample.targets), tf.constant(sample.cotangent)

        def body(i, total):
            return i + 1, total + tf.reduce_sum(sample(x[i], y[i], reduction="none") * weight[i])

        return tf.while_loop(lambda i, _: i < x.shape[0], body, (0, tf.constant(0.0, tf.float64)))[1]

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = total(x)
        return tape.gradient(value, x)

    step = tf.function(step) if compiled else step
    close(step(tf.constant(sample.x)), sample.pulled_back)


@pytest.mark.capability("tensorflow", "tf.cond")
@two_losses
def test_cond(sample):
    @tf.function
    def step(x, wanted):
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = tf.cond(wanted, lambda: sample(x, reduction="none"), lambda: tf.zeros_like(sample.values))
        return values, tape.gradient(values, x, tf.constant(sample.cotangent))

    x = tf.constant(sample.x)
    right(sample, *step(x, tf.constant(True)))
    assert not np.any(step(x, tf.constant(False))[1])


def test_graph_of_compat_v1():
    """x == y is False there, for any two tensors: a formula would be wrong without a word."""
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 3])
        assert (x == x + 0) is False
        for call in (lambda: ul.softmax_nll(x, [0]), lambda: ul.multilabel_logistic_loss(x, x), lambda: ul.softmax(x)):
            with pytest.raises(TypeError, match=r"Received: a tensor of a tf.compat.v1 graph"):
                call()


# --- Saved models -----------------------------------------------------------------------------------------------------


@pytest.mark.capability("tensorflow", "SavedModel")
@two_losses
def test_saved_model(sample, tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[spec(sample.x, [None, 3])])
        def values(self, x):
            return sample(x, reduction="none", targets=tf.constant(sample.targets))

        @tf.function(input_signature=[spec(sample.x, [None, 3])])
        def step(self, x):
            return value_and_pullback(sample, x)

    tf.saved_model.save(Module(), str(tmp_path), options=tf.saved_model.SaveOptions(experimental_custom_gradients=True))
    loaded = tf.saved_model.load(str(tmp_path))
    right(sample, *loaded.step(sample.x))
    x = tf.constant(sample.x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        values = loaded.values(x)
    right(sample, values, tape.gradient(values, x, tf.constant(sample.cotangent)))


# --- What is no dense tensor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("RaggedTensor", lambda: tf.ragged.constant([[1.0, 2.0], [3.0]])),
        ("SparseTensor", lambda: tf.sparse.from_dense([[1.0, 0.0]])),
        ("IndexedSlices", lambda: tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]))),
    ],
)
def test_not_dense(kind, make):
    x, message = tf.ones((1, 2)), f"a plain array.*Received: a tensorflow {kind}"
    for call in (
        lambda: ul.multilabel_logistic_loss(make(), [[1, 0]]),
        lambda: ul.softmax_nll(make(), [0]),
        lambda: ul.multilabel_logistic_loss(x, make()),
        lambda: ul.softmax_nll(x, [0], weight=make()),
        lambda: ul.log_softmax(make()),
    ):
        with pytest.raises(TypeError, match=message):
            call()


# --- Keras ------------------------------------------------------------------------------------------------------------

# Of each loss: Keras' activation before it, and how Keras is given it.
FITTED = {
    "multilabel_logistic_loss": (None, lambda y, x: ul.multilabel_logistic_loss(x, y)),
    "softmax_nll": (None, lambda y, x: ul.softmax_nll(x, tf.cast(y, tf.int32))),
    "binary_cross_entropy": ("sigmoid", lambda y, x: ul.binary_cross_entropy(x, y)),
    "cross_entropy": ("softmax", lambda y, x: ul.cross_entropy(x, tf.cast(y, tf.int32))),
    "nll": ("log_softmax", lambda y, x: ul.nll(x, tf.cast(y, tf.int32))),
    "multilabel_logistic_loss, object": (None, MultilabelLogisticLoss()),
    "softmax_nll, object": (None, SoftmaxNLL()),
}


def fitted(name, y, jit_compile="auto", policy=None, run_eagerly=False):
    """Two steps of gradient descent of a linear model: the inputs, its first weights, the losses that Keras saw."""
    activation, loss = FITTED[name]
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    inputs = keras.layers.Input((4,))
    layer = keras.layers.Dense(3, activation, kernel_initializer=keras.initializers.RandomNormal(seed=1), dtype=policy)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), loss=loss, jit_compile=jit_compile, run_eagerly=run_eagerly)
    before = layer.kernel.numpy().astype("float64")
    history = model.fit(x, np.array(y), batch_size=6, epochs=2, verbose=0).history["loss"]
    return x, before, history, model


INDICES, LABELS = [0, 2, 1, 1, 0, 2], [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0]]


@pytest.mark.capability("tensorflow", "Keras model.fit", losses=LOSSES)
@pytest.mark.parametrize("jit_compile", ["auto", True])
@pytest.mark.parametrize("name", FITTED)
def test_keras_fit(name, jit_compile):
    """The loss that Keras reports is the oracle's for the logits that the weights make."""
    of = name.removesuffix(", object")
    indices = of in ("softmax_nll", "cross_entropy", "nll")
    y = INDICES if indices else LABELS
    x, before, history, _ = fitted(name, y, jit_compile)
    logits = (x @ before).tolist()
    values, *_ = answer("softmax_nll" if indices else "multilabel_logistic_loss", logits, y)
    np.testing.assert_allclose(history[0], values.sum() / len(x), rtol=1e-5)
    assert history[1] < history[0]


@pytest.mark.capability("tensorflow", "Keras mixed_bfloat16", losses=("multilabel_logistic_loss", "softmax_nll"))
@pytest.mark.parametrize("name", ["multilabel_logistic_loss", "softmax_nll"])
def test_keras_mixed_precision(name):
    """A function gets the model's bfloat16 and returns it, the objects get float32, as Keras' own losses do."""
    y = INDICES if name == "softmax_nll" else LABELS
    losses = []
    for given in (name, f"{name}, object"):
        x, before, history, model = fitted(given, y, policy="mixed_bfloat16", run_eagerly=True)
        result = model.loss(tf.constant(y), model(x))
        assert model(x).dtype == tf.bfloat16
        assert result.dtype == (tf.bfloat16 if given == name else tf.float32)
        losses.append(history[0])
    values, *_ = answer(name, (x @ before).tolist(), y)
    np.testing.assert_allclose(losses, values.sum() / len(x), rtol=2.0**-6)


# --- Processes of their own: logical devices are configured before anything runs --------------------------------------

DEVICES = """
import numpy as np, tensorflow as tf
from capabilities import LOSSES, Sample, close
import unilabel as ul

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def on_the_second(*results):
    for result in results:
        assert result.device.endswith("CPU:1"), [result.device for result in results]


for name in LOSSES:
    sample = Sample(name)
    with tf.device("/CPU:1"):
        x = tf.constant(sample.x)
        second = tf.Variable(sample.x)
    with tf.device("/CPU:0"):
        first = tf.constant(sample.targets)
    for targets in (sample.targets, sample.targets.tolist(), first):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            values = sample(x, targets, reduction="none")
            from_variable = sample(second, targets, reduction="none")
        by_x = tape.gradient(values, x, tf.constant(sample.cotangent))
        by_variable = tape.gradient(from_variable, second, tf.constant(sample.cotangent))
        on_the_second(values, by_x, from_variable, by_variable, *ul.value_and_grad(sample.loss)(x, targets))
        on_the_second(*ul.grad_and_hess(sample.loss)(x, targets))
        close(by_x, sample.pulled_back)
        close(by_variable, sample.pulled_back)
on_the_second(ul.sigmoid(x), ul.log_sigmoid(x), ul.softmax(x), ul.log_softmax(x))

strategy = tf.distribute.MirroredStrategy(["/CPU:0", "/CPU:1"])
for name in LOSSES:
    sample = Sample(name)
    halves = [np.split(a, 2) for a in (sample.x, sample.targets, sample.cotangent)]
    with strategy.scope():
        zero = tf.Variable(tf.zeros(sample.x.shape[1:], tf.float64))

    @tf.function
    def step(x, y, cotangent):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            values = sample(x + zero, y, reduction="none")
        total = tape.gradient(values, zero, cotangent)
        total = tf.distribute.get_replica_context().all_reduce("sum", total)
        return values, tape.gradient(values, x, cotangent), total

    @tf.function
    def run():
        def piece(of):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(of[context.replica_id_in_sync_group])
            )

        return strategy.run(step, [piece(of) for of in halves])

    values, gradient, total = (strategy.experimental_local_results(result) for result in run())
    close(tf.concat(values, 0), sample.values)
    close(tf.concat(gradient, 0), sample.pulled_back)
    assert len(values) == 2
    for replica in total:
        np.testing.assert_allclose(replica, sample.pulled_back.sum(0), rtol=1e-13)
"""


@pytest.mark.capability("tensorflow", "on the second device; MirroredStrategy on both", losses=LOSSES)
def test_devices(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
