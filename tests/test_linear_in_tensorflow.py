"""TensorFlow: its tapes, accumulators, functions and XLA on the losses of the last linear layer's inputs."""

import weakref

import numpy as np
import pytest
import tensorflow as tf
from crossed import OF_LINEAR
from test_in_tensorflow import check, traced
from test_linear import close
from unilabel.backends import tensorflow
from unilabel.backends.tensorflow_namespaces import differentiable, standard

import unilabel as ul

pytestmark = pytest.mark.usefixtures("small_blocks")  # of two examples


@pytest.fixture
def sample(sample):
    """Five examples: two blocks, and a rest."""
    return sample.of(rows=5).beside(tf.constant)


def operands(sample):
    """All arrays of a call: the layer's inputs, the targets, the other operands by name, the cotangent."""
    inputs = tuple(map(tf.constant, sample.inputs))
    return inputs, tf.constant(sample.targets), sample.arrays, tf.constant(sample.cotangent)


def answers(sample):
    """All that a loss has to give, as a function of its `operands`, for a tf.function to trace once."""

    def run(inputs, targets, arrays, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = sample(*inputs, targets=targets, **arrays)
        pulled_back = tape.gradient(value, inputs, cotangent)
        return value, *pulled_back, *sample.closed(*inputs, targets=targets, **arrays)

    return run


def check_all(results, sample):
    numbers = sample.value, *sample.through(sample.pulled_back), sample.value, *sample.through(sample.gradient)
    for got, right in zip(results, numbers, strict=True):
        check(got, right)


def on_logits(sample):
    """The same loss with all logits in memory."""

    def run(features, linear_weight, *bias, **more):
        logits = tf.matmul(features, linear_weight, transpose_b=True)
        return sample.materialised(logits + bias[0] if bias else logits, **more)

    return run


def alike(sample, transform):
    """Of the loss, and of the one with all logits in memory: the same numbers."""
    inputs, *_ = operands(sample)
    found = [tf.nest.flatten(transform(loss)(*inputs)) for loss in (sample, on_logits(sample))]
    for got, right in zip(*found, strict=True):
        close(got.numpy(), right.numpy())


def total(sample, loss):
    return lambda *inputs, **more: tf.reduce_sum(loss(*inputs, **more) * sample.cotangent)


def gradients(function):
    def run(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*inputs)
        return tape.gradient(value, inputs)

    return run


def sum_of_squares(function):
    return lambda *inputs: tf.add_n([tf.reduce_sum(array**2) for array in tf.nest.flatten(function(*inputs))])


def along(function):
    """Of forward mode, along tangents that are not all alike."""

    def run(*inputs):
        with tf.autodiff.ForwardAccumulator(inputs, tuple(map(tf.cos, inputs))) as accumulator:
            results = function(*inputs)
        return accumulator.jvp(results)

    return run


@pytest.mark.capability("tensorflow", "GradientTape, value_and_grad", **OF_LINEAR, pairs=True)
def test_gradient_tape(sample):
    check_all(answers(sample)(*operands(sample)), sample)


@pytest.mark.capability("tensorflow", "nested tapes", **OF_LINEAR)
def test_nested_tapes(sample):
    alike(sample, lambda loss: gradients(sum_of_squares(gradients(total(sample, loss)))))


@pytest.mark.capability("tensorflow", "gradient by targets, weights and smoothing, nested tapes too", **OF_LINEAR)
def test_other_gradients(sample):
    """Also their derivative by the features."""
    _, targets, arrays, _ = operands(sample)
    given = arrays | {"targets": targets}
    floats = {name: array for name, array in given.items() if array.dtype.is_floating}

    def mixed(loss):
        def run(features, *others):
            with tf.GradientTape() as outer:
                outer.watch(features)
                with tf.GradientTape() as tape:
                    tape.watch(floats)
                    value = total(sample, loss)(features, *others, **floats)
                first = tape.gradient(value, floats)
                squares = sum_of_squares(lambda: first)() if floats else tf.zeros([], tf.float64)
            return first, outer.gradient(squares, features, unconnected_gradients="zero")

        return run

    alike(sample, mixed)


@pytest.mark.capability("tensorflow", "GradientTape.jacobian", **OF_LINEAR)
def test_jacobian(sample):
    def jacobian(loss):
        def run(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = loss(*inputs)
            return tape.jacobian(value, inputs)

        return run

    alike(sample, jacobian)


@pytest.mark.capability("tensorflow", "ForwardAccumulator", **OF_LINEAR)
def test_forward(sample):
    alike(sample, along)


@pytest.mark.capability("tensorflow", "forward over reverse", **OF_LINEAR)
def test_forward_over_reverse(sample):
    alike(sample, lambda loss: along(gradients(total(sample, loss))))


@pytest.mark.capability("tensorflow", "reverse over forward", **OF_LINEAR)
def test_reverse_over_forward(sample):
    alike(sample, lambda loss: gradients(sum_of_squares(along(loss))))


@pytest.mark.capability("tensorflow", "tf.function, of value_and_grad too", **OF_LINEAR)
def test_function(sample):
    check_all(traced(answers(sample))(*operands(sample)), sample)


@pytest.mark.capability("tensorflow", "tf.function(jit_compile=True), the same", **OF_LINEAR)
def test_xla(sample):
    check_all(traced(answers(sample), jit_compile=True)(*operands(sample)), sample)


@pytest.mark.capability("tensorflow", "nested tapes, ForwardAccumulator in a tf.function", **OF_LINEAR)
def test_derivatives_in_a_function(sample):
    """The accumulator sees no custom gradients there: it has all logits in memory."""
    alike(sample, lambda loss: traced(gradients(sum_of_squares(gradients(total(sample, loss))))))
    alike(sample, lambda loss: traced(along(loss)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.capability("tensorflow", "unknown batch size, with and without jit_compile=True", **OF_LINEAR)
def test_unknown_batch(sample, compiled):
    """Blocks of as many examples as there are, with a rest or none, of fewer than a block has, and of none."""
    several = {"sample_weight", "pos_weight"} | ({"where"} if len(sample.arrays.get("where", ())) > 1 else set())
    inputs, targets, arrays, cotangent = operands(sample)

    def spec(array, opened):
        shape = array.shape.as_list()
        return tf.TensorSpec([None, *shape[1:]] if opened else shape, array.dtype)

    layer = (spec(inputs[0], True), *(spec(array, False) for array in inputs[1:]))
    others = {name: spec(array, name in several) for name, array in arrays.items()}
    signature = layer, spec(targets, True), others, spec(cotangent, cotangent.shape.rank > 0)
    run = traced(answers(sample), jit_compile=compiled, input_signature=signature)
    for rows in (5, 4, 1):
        other = sample.of(rows=rows).beside(tf.constant)
        check_all(run(*operands(other)), other)

    def none(array, opened):
        return array[:0] if opened else array

    empty = tf.nest.map_structure(
        none, operands(sample), tf.nest.map_structure(lambda s: s.shape[:1] == [None], signature)
    )
    for got in tf.nest.flatten(run(*empty)):
        np.testing.assert_array_equal(got, np.zeros(got.shape))


@pytest.mark.parametrize("opened", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_unknown_length_of_the_bias(opened, compiled):
    """A bias of one number is not that of all classes."""
    features, weight, bias = tf.ones((4, 3)), tf.ones((5, 3)), tf.constant([0.0, 1, 2, 3, 4])
    of_weight, of_bias = (None if is_open else 5 for is_open in opened)
    layer = tf.TensorSpec((of_weight, 3)), tf.TensorSpec((of_bias,))

    def loss(weight, bias):
        return ul.linear_softmax_nll(features, weight, [0, 1, 2, 3], linear_bias=bias)

    run = traced(loss, jit_compile=compiled, input_signature=layer)
    np.testing.assert_allclose(run(weight, bias), loss(weight, bias), rtol=1e-6)
    if of_bias is None:
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            run(weight, bias[:1])
    else:
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            run(weight[:1], bias)


@pytest.mark.parametrize("loss", [ul.linear_softmax_nll, ul.linear_multilabel_logistic_loss])
def test_one_block_of_logits_at_a_time(loss, monkeypatch):
    """Of second derivatives, forward mode, derivatives by targets and weights: no tape keeps those of all blocks."""
    alive, most = [], []

    def watching(linear):
        def run(*arrays):
            logits = linear(*arrays)
            alive.append(weakref.ref(logits))
            most.append((logits.shape[0], sum(found() is not None for found in alive)))
            return logits

        return run

    for namespace in (standard, differentiable):
        monkeypatch.setattr(namespace, "linear", watching(namespace.linear))
    monkeypatch.setattr(tensorflow, "REPEATED", 10**6)
    rng = np.random.default_rng(0)
    features, weight, soft, of_classes = (
        tf.constant(rng.uniform(size=shape)) for shape in ((9, 2), (4, 2), (9, 4), (4,))
    )
    layer = features, weight
    for reduction in ("mean", "none"):

        def value(*layer, reduction=reduction):
            return tf.reduce_sum(loss(*layer, soft, weight=of_classes, reduction=reduction) ** 2)

        gradients(sum_of_squares(gradients(value)))(*layer)
        along(value)(*layer)
        along(gradients(value))(*layer)
        with tf.GradientTape() as tape:
            tape.watch((soft, of_classes))
            total = value(*layer)
        tape.gradient(total, (soft, of_classes))
    assert len(most) > 100
    assert {rows for rows, _ in most} == {1, 2}
    assert max(kept for _, kept in most) <= 2  # of a block, and of the one before it
