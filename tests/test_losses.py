"""The losses do what the documentation says, on every backend. Accuracy in ULP is the conformance suite's business."""

import math
from typing import Any

import numpy as np
import pytest
from unilabel.conformance import oracle
from unilabel.conformance.cases import Maker, Tensor

import unilabel as ul

LOGITS = [[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]]
TARGETS = [[1, 0, 1], [0, 1, 0]]
ALL: list[Any] = [ul.multilabel_logistic_loss, ul.softmax_nll, ul.binary_cross_entropy, ul.cross_entropy, ul.nll]


def close(actual, expected, dtype="float32"):
    np.testing.assert_allclose(actual, expected, rtol=8 * float(np.finfo(dtype).eps), atol=0)


# --- The figures that the project began with --------------------------------------------------------------------------


def test_mean_is_what_multilabel_soft_margin_loss_prints(framework):
    loss = ul.multilabel_logistic_loss(framework.array(LOGITS), TARGETS, reduction="mean")
    close(framework.numpy(loss), 0.6745749711990356)


def test_default_sums_classes_and_averages_examples(framework):
    loss = ul.multilabel_logistic_loss(framework.array(LOGITS), TARGETS)
    close(framework.numpy(loss), 3 * 0.6745749711990356)


def test_binary_cross_entropy_of_sigmoid(framework):
    probs = ul.sigmoid(framework.array(LOGITS))
    losses = framework.numpy(ul.binary_cross_entropy(probs, TARGETS, reduction="none"))
    np.testing.assert_array_equal(
        losses.round(4), np.array([[0.6444, 0.5981, 0.6931], [0.9130, 0.6444, 0.5544]], "float32")
    )
    close(framework.numpy(ul.binary_cross_entropy(probs, TARGETS, reduction="mean")), 0.67457503)


@pytest.mark.parametrize(
    ("x", "printed"),
    [([50, 0.0006, 2.3], [1.0, 0.5002, 0.9089]), ([0.92, 0.35, 0.85], [0.7150, 0.5866, 0.7006])],
)
def test_sigmoid(framework, x, printed):
    result = framework.numpy(ul.sigmoid(framework.array(x)))
    np.testing.assert_allclose(result, printed, rtol=0, atol=1e-4)  # one unit of the last digit printed
    close(result, [1 / (1 + math.exp(-v)) for v in x])


def test_gradient_is_sigmoid_minus_target(framework):
    _, gradient = ul.value_and_grad(ul.multilabel_logistic_loss)(framework.array(LOGITS), TARGETS)
    close(framework.numpy(gradient), (1 / (1 + np.exp(-np.array(LOGITS))) - TARGETS) / 2)


def test_softmax_gradient_is_probability_minus_one_hot(framework):
    e = np.exp(LOGITS)
    expected = (e / e.sum(-1, keepdims=True) - np.eye(3)[[0, 2]]) / 2
    _, gradient = ul.value_and_grad(ul.softmax_nll)(framework.array(LOGITS), [0, 2])
    close(framework.numpy(gradient), expected)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gradient_at_zero_is_exactly_half_minus_target(framework, zero):
    targets = np.array([0.0, 0.25, 1.0])
    x = framework.array([zero] * 3)
    _, gradient = ul.value_and_grad(ul.multilabel_logistic_loss)(x, targets, reduction="sum")
    np.testing.assert_array_equal(framework.numpy(gradient), 0.5 - targets)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("options", [{}, {"weight": [0.5, 1, 2]}, {"label_smoothing": 0.1}])
def test_indices_and_one_hot_agree(framework, reduction, options):
    x = framework.array(LOGITS)
    run = ul.value_and_grad(ul.softmax_nll)
    by_index = run(x, [2, 0], reduction=reduction, **options)
    by_one_hot = run(x, [[0, 0, 1], [1, 0, 0]], reduction=reduction, **options)
    for a, b in zip(by_index, by_one_hot, strict=True):
        np.testing.assert_array_max_ulp(framework.numpy(a), framework.numpy(b), maxulp=4)


def test_probabilities_of_0_and_1_are_finite(framework):
    probs = framework.array([[0.0, 1.0], [1.0, 0.0]])
    for loss, targets in [(ul.binary_cross_entropy, [[1, 0], [1, 0]]), (ul.cross_entropy, [0, 1])]:
        value, gradient = ul.value_and_grad(loss)(probs, targets)
        assert np.isfinite(framework.numpy(value)).all()
        assert np.isfinite(framework.numpy(gradient)).all()


# --- Kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
def test_result_is_of_the_logits_kind(framework, loss):
    targets = framework.integers(TARGETS if loss in (ul.multilabel_logistic_loss, ul.binary_cross_entropy) else [0, 1])
    for dtype in framework.dtypes:
        x = framework.array(np.full((2, 3), 0.25), dtype)
        value, gradient = ul.value_and_grad(loss)(x, targets)
        for result, shape in [(loss(x, targets), ()), (value, ()), (gradient, (2, 3))]:
            assert type(result) is type(x)
            assert framework.backend.dtype(result) == dtype
            assert tuple(result.shape) == shape
            assert framework.backend.device(result) == framework.backend.device(x)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_targets_of_any_integer_dtype(framework, dtype):
    x = framework.array(LOGITS)
    for loss, targets in [(ul.softmax_nll, [2, 0]), (ul.multilabel_logistic_loss, TARGETS)]:
        expected = framework.numpy(loss(x, targets))
        assert framework.numpy(loss(x, framework.integers(targets, dtype))) == expected
        assert framework.numpy(loss(x, np.array(targets, dtype))) == expected


def test_bool_targets(framework):
    x = framework.array(LOGITS)
    boolean = framework.backend.asarray(np.array(TARGETS, dtype=bool))
    expected = framework.numpy(ul.multilabel_logistic_loss(x, TARGETS))
    assert framework.numpy(ul.multilabel_logistic_loss(x, boolean)) == expected


def test_unsigned_index_does_not_wrap_around_to_the_ignored_one(framework):
    targets = framework.integers([0, 156], "uint8")  # 156 is -100 in eight bits
    losses = framework.numpy(ul.softmax_nll(framework.array(LOGITS), targets, ignore_index=-100, reduction="none"))
    assert np.isnan(losses).tolist() == [False, True]


def test_index_beyond_32_bits_does_not_wrap_around_to_a_class(framework):
    losses = framework.numpy(ul.softmax_nll(framework.array(LOGITS), np.array([0, 2**32 + 1]), reduction="none"))
    assert np.isnan(losses).tolist() == [False, True]


def test_activations(framework):
    x = np.array([[-1000.0, -3.0, 0.0, 2.5, 1000.0], [1.0, 2.0, 3.0, 4.0, -np.inf]])
    array = framework.array(x, "float64")
    e = np.exp(x - x.max(-1, keepdims=True))
    close(framework.numpy(ul.softmax(array)), e / e.sum(-1, keepdims=True), "float64")
    close(framework.numpy(ul.softmax(array, axis=0))[:, 1], [1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))], "float64")
    log_p = framework.numpy(ul.log_softmax(array))
    close(log_p, x - x.max(-1, keepdims=True) - np.log(e.sum(-1, keepdims=True)), "float64")
    log_sigmoid = framework.numpy(ul.log_sigmoid(array))
    close(
        log_sigmoid[0], [-1000.0, -math.log1p(math.exp(3)), -math.log(2), -math.log1p(math.exp(-2.5)), 0.0], "float64"
    )
    close(framework.numpy(ul.sigmoid(array))[0, 1:4], 1 / (1 + np.exp([3.0, 0.0, -2.5])), "float64")
    assert log_sigmoid[1, 4] == -np.inf


# --- Of no dimensions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight": 2.0, "pos_weight": 3.0, "where": True, "label_smoothing": 0.125}])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("loss", [ul.multilabel_logistic_loss, ul.binary_cross_entropy])
def test_one_element(framework, loss, reduction, options):
    """As gradients of each example of a binary model have it."""
    one = Maker("one element", "float64", 0).case
    right = oracle.expected(one(loss.__name__, Tensor((), [0.3]), Tensor((), [0.25]), reduction=reduction, **options))
    x = framework.array(0.3, "float64")
    results = [loss(x, 0.25, reduction=reduction, **options)]
    results += ul.value_and_grad(loss)(x, 0.25, reduction=reduction, **options)
    results += ul.grad_and_hess(loss)(x, 0.25, **options)
    exact = [right.value, right.value, right.gradient_of_sum, right.gradient_of_sum, right.hessian]
    if framework.backend.autodiff:
        one = framework.array(1.0, "float64")
        results += framework.backend.vjp(lambda x: loss(x, 0.25, reduction=reduction, **options), x, one)
        exact += [right.value, right.gradient_of_sum]
    for got, (number,) in zip(results, exact, strict=True):
        assert tuple(got.shape) == ()
        close(framework.numpy(got), float(number.value), "float64")


@pytest.mark.parametrize("loss", ALL)
def test_smoothing_as_an_array(framework, loss):
    """It may be traced, or learned: nobody reads it, unless asked to. NumPy's are numbers."""
    x = framework.array(np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]) - (loss is ul.nll), "float64")
    targets = TARGETS if loss in (ul.multilabel_logistic_loss, ul.binary_cross_entropy) else [0, 1]

    def run(smoothing, **options):
        results = ul.value_and_grad(loss)(x, targets, label_smoothing=smoothing, **options)
        return list(map(framework.numpy, (loss(x, targets, label_smoothing=smoothing), *results)))

    for got, right in zip(run(framework.array(0.1, "float64")), run(0.1), strict=True):
        close(got, right, "float64")
    for wrong in (-0.1, 1.5, math.nan):
        smoothing = framework.array(wrong, "float64")
        if framework.name != "numpy":
            assert all(np.isnan(result).all() for result in run(smoothing))
        with pytest.raises(ValueError, match="Expected label_smoothing: a number from 0 to 1"):
            run(smoothing, validate=True)
    for wrong in (True, np.array(True), np.array("0.1"), [0.1], np.array([0.1]), framework.array([0.1], "float64")):
        with pytest.raises(ValueError, match="Expected label_smoothing: a number"):
            run(wrong)


# --- Autodiff ---------------------------------------------------------------------------------------------------------

SMOOTH: list[Any] = [
    (ul.multilabel_logistic_loss, TARGETS),
    (ul.multilabel_logistic_loss, [[0.3, 0.0, 1.0], [0.5, 0.9, 0.2]]),
    (ul.softmax_nll, [2, 0]),
    (ul.softmax_nll, [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]),
]


def test_gradients_of_float_targets(recorder):
    """The losses are linear in the targets: the derivative by z is the loss of 1 less the loss of 0, or -log p."""
    x = np.array(LOGITS)
    z = recorder.array([[0.3, 0.0, 1.0], [0.2, 0.3, 0.5]], "float64")
    logits = recorder.array(x, "float64")
    by_z = recorder.gradient(lambda z: ul.multilabel_logistic_loss(logits, z, reduction="sum", pos_weight=2.0), z)
    close(by_z, 2 * np.log1p(np.exp(-x)) - np.log1p(np.exp(x)), "float64")
    by_z = recorder.gradient(lambda z: ul.softmax_nll(logits, z), z)
    close(by_z, (np.log(np.exp(x).sum(-1, keepdims=True)) - x) / 2, "float64")


def test_both_operands_at_once(recorder):
    """Logits that are targets as well: the derivative has both parts."""
    x = recorder.array([[0.2, 0.3, 0.5]], "float64")
    p = np.exp([0.2, 0.3, 0.5]) / np.exp([0.2, 0.3, 0.5]).sum()
    close(recorder.gradient(lambda x: ul.softmax_nll(x, x), x)[0], p - [0.2, 0.3, 0.5] - np.log(p), "float64")


@pytest.mark.parametrize(("loss", "targets"), SMOOTH)
def test_second_derivatives(recorder, loss, targets):
    """The Hessian times a vector, by autodiff twice, is the difference quotient of the gradient."""
    x, v, h = np.array(LOGITS), np.array([[1.0, -0.5, 0.25], [0.5, 2.0, -1.0]]), 1e-5

    def slope(x):
        return recorder.numpy(ul.value_and_grad(loss)(recorder.array(x, "float64"), targets)[1])

    expected = (slope(x + h * v) - slope(x - h * v)) / (2 * h)
    product = hessian_times(recorder, lambda x: loss(x, targets), x, v)
    np.testing.assert_allclose(product, expected, rtol=1e-8, atol=1e-10)


def hessian_times(recorder, function, x, v):
    x, v = recorder.array(x, "float64"), recorder.array(v, "float64")
    if recorder.name == "torch":
        import torch

        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        return recorder.numpy(torch.autograd.grad((gradient * v).sum(), x)[0])
    if recorder.name == "jax":
        import jax

        return recorder.numpy(jax.jvp(jax.grad(function), (x,), (v,))[1])
    if recorder.name == "mlx":
        import mlx.core as mx

        return recorder.numpy(mx.grad(lambda x: (mx.grad(function)(x) * v).sum())(x))
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = function(x)
        product = tf.reduce_sum(inner.gradient(value, x) * v)
    return recorder.numpy(outer.gradient(product, x))


def compiled(recorder, function):
    """The function, and its gradient, as the framework compiles them."""
    if recorder.name == "torch":
        import torch

        forward = torch.compile(function, backend="aot_eager", fullgraph=True)

        def with_grad(x):
            x = x.detach().requires_grad_()
            value = forward(x)
            return value, torch.autograd.grad(value, x)[0]

        return with_grad
    if recorder.name == "jax":
        import jax

        return jax.jit(jax.value_and_grad(function))
    if recorder.name == "mlx":
        import mlx.core as mx

        return mx.compile(mx.value_and_grad(function))
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def taped(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x)

    return taped


@pytest.mark.full
@pytest.mark.parametrize(("loss", "targets"), SMOOTH)
@pytest.mark.parametrize("options", [{}, {"where": [True, True, False]}])
def test_compiled(recorder, loss, targets, options):
    x = recorder.array([[0.1, -30.0, 20.0], [17.0, 0.1, -0.3]], "float64")
    value, gradient = compiled(recorder, lambda x: loss(x, targets, **options))(x)
    expected = ul.value_and_grad(loss)(x, targets, **options)
    close(recorder.numpy(value), recorder.numpy(expected[0]), "float64")
    close(recorder.numpy(gradient), recorder.numpy(expected[1]), "float64")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_wrong_index_is_nan(recorder, mode):
    """For its example alone, in value and gradient; it is not clamped, wrapped around or ignored on any path."""
    x, y = recorder.array(LOGITS * 3), recorder.integers([0, -1, 3, 2, -100, 1])

    def loss(x):
        return ul.softmax_nll(x, y, reduction="none")

    def total(x):
        return ul.softmax_nll(x, y, weight=[0.5, 1.0, 2.0])

    if mode == "eager":
        values, gradient, mean = loss(x), recorder.gradient(loss, x), total(x)
    else:
        summed = compiled(recorder, lambda x: ul.softmax_nll(x, y, reduction="sum"))
        (_, gradient), (mean, slope) = summed(x), compiled(recorder, total)(x)
        gradient, values = recorder.numpy(gradient), ul.softmax_nll(x, y, reduction="none")
        assert np.isnan(recorder.numpy(slope)).any(axis=1).tolist() == [False, True, True, False, True, False]
    assert np.isnan(recorder.numpy(values)).tolist() == [False, True, True, False, True, False]
    assert np.isnan(gradient).tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3, [True] * 3, [False] * 3]
    assert np.isnan(recorder.numpy(mean))


def test_unknown_batch_size_under_tf_function():
    import tensorflow as tf

    spec = [tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 3], tf.float32)]

    @tf.function(input_signature=spec)
    def run(x, y, z):
        return ul.softmax_nll(x, y), ul.multilabel_logistic_loss(x, z), ul.softmax_nll(tf.transpose(x), y[:3], axis=0)

    x = np.random.default_rng(0).normal(size=(3, 3)).astype("float32")
    for result, expected in zip(
        run(x, np.array([0, 2, 1], "int32"), np.eye(3, dtype="float32")),
        (
            ul.softmax_nll(x, [0, 2, 1]),
            ul.multilabel_logistic_loss(x, np.eye(3)),
            ul.softmax_nll(x.T, [0, 2, 1], axis=0),
        ),
        strict=True,
    ):
        close(result.numpy(), expected)


def test_shapes_that_do_not_fit_when_it_runs():
    """Lengths that TensorFlow knows only then: an error, never a silent broadcast."""
    import tensorflow as tf

    pairs = tf.TensorSpec([None, 3]), tf.TensorSpec([None, 3])
    rows = tf.TensorSpec([None, 3]), tf.TensorSpec([None], tf.int64)
    x, z, y = np.ones((4, 3), "float32"), np.ones((1, 3), "float32"), np.ones(1, "int64")
    for jit in (False, True):
        for loss, signature, targets in ((ul.multilabel_logistic_loss, pairs, z), (ul.softmax_nll, rows, y)):
            with pytest.raises(tf.errors.InvalidArgumentError):
                tf.function(loss, input_signature=signature, jit_compile=jit)(x, targets)


def test_nothing_known_but_the_rank():
    import tensorflow as tf

    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32"), np.array([[0, 2, 1, 1], [2, 2, 0, 1]])
    free = tf.TensorSpec([None] * 3), tf.TensorSpec([None] * 2, tf.int64)
    run = tf.function(lambda x, y: ul.softmax_nll(x, y, label_smoothing=0.1, axis=2), input_signature=free)
    close(run(x, y).numpy(), ul.softmax_nll(x, y, label_smoothing=0.1))
    run = tf.function(lambda x: ul.softmax(x, axis=(0, 2)), input_signature=free[:1])
    close(run(x).numpy(), ul.softmax(x, axis=(0, 2)))


LARGE = [(1 << 24, 1), (4_000_000, 4), (4, 4_000_000)]


@pytest.mark.parametrize("shape", [(1 << 16, 1), *(pytest.param(shape, marks=pytest.mark.full) for shape in LARGE)])
def test_sums_keep_their_digits(framework, shape):
    """Of equal numbers, where every rounding is in one direction: 20 ULP more than a loss alone, eager and compiled."""

    def multilabel(x):
        return ul.multilabel_logistic_loss(x, x, reduction="mean")

    def softmax(x):
        return ul.softmax_nll(x, x + 1 / shape[1])

    zeros = framework.array(np.zeros(shape))
    for loss, right in ((multilabel, math.log(2)), (softmax, math.log(shape[1]))):
        results = [loss(zeros)]
        if framework.backend.autodiff:
            results.append(compiled(framework, loss)(zeros)[0])
        for result in results:
            np.testing.assert_allclose(framework.numpy(result), right, rtol=26 * 2.0**-23, atol=0)


# --- Inputs of every make ---------------------------------------------------------------------------------------------


def test_numpy_views_and_byte_orders():
    x = np.array(LOGITS)
    expected = ul.value_and_grad(ul.softmax_nll)(x, [2, 0])
    wide = np.zeros((4, 6))
    wide[::2, ::2] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    for same in (wide[::2, ::2], np.asfortranarray(x), x[::-1][::-1], read_only, x.astype(">f8")):
        value, gradient = ul.value_and_grad(ul.softmax_nll)(same, [2, 0])
        assert value == expected[0]
        np.testing.assert_array_equal(gradient, expected[1])
        assert gradient.dtype == same.dtype


@pytest.mark.parametrize("kind", ["negative strides", "read-only", "foreign byte order", "scalar", "empty list"])
def test_plain_operands_of_every_make(framework, kind):
    x = framework.array(LOGITS)
    weight = np.array([0.5, 1.0, 2.0])
    expected = framework.numpy(ul.softmax_nll(x, [2, 0], weight=weight))
    if kind == "negative strides":
        weight = np.ascontiguousarray(weight[::-1])[::-1]
    elif kind == "read-only":
        weight.flags.writeable = False
    elif kind == "foreign byte order":
        weight = weight.astype(">f8")
    elif kind == "scalar":
        one = ul.multilabel_logistic_loss(x, TARGETS, weight=2, pos_weight=3.0, where=True)
        many = ul.multilabel_logistic_loss(x, TARGETS, weight=[2.0] * 3, pos_weight=[[3.0]], where=[True] * 3)
        assert framework.numpy(one) == framework.numpy(many)
    else:
        assert framework.numpy(ul.softmax_nll(framework.array(np.zeros((0, 3))), [])) == 0
    assert framework.numpy(ul.softmax_nll(x, [2, 0], weight=weight)) == expected


def test_numpy_warns_of_nothing_and_raises_nothing():
    x = np.array([[np.inf, -np.inf, 1e30], [-1e30, 0, np.nan]])
    with np.errstate(all="raise"):
        ul.value_and_grad(ul.multilabel_logistic_loss)(x, TARGETS)
        ul.value_and_grad(ul.softmax_nll)(x, [0, 1])
        ul.value_and_grad(ul.binary_cross_entropy)(np.array([0.0, 1.0]), [1, 0])
        ul.softmax(x)
        ul.log_sigmoid(x)


def test_infinite_cotangent_reaches_no_masked_gradient(recorder):
    """As a loss scale makes one that is too large."""
    x = recorder.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    calls = [
        lambda x: ul.softmax_nll(x, [0, -1], ignore_index=-1),
        lambda x: ul.multilabel_logistic_loss(x, [[0, 0, 0]] * 2, where=[[True], [False]]),
    ]
    for call in calls:
        assert recorder.gradient(call, x, cotangent=math.inf)[1].tolist() == [0, 0, 0]


def test_weights_of_classes_that_are_not_there(framework):
    """A class without examples, weighted by one over their number."""
    x = framework.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], "float64")
    right = framework.numpy(ul.softmax_nll(x, [0, 2]))
    for weight in ([1.0, math.inf, 1.0], [1.0, math.nan, 1.0]):
        for options in ({}, {"where": True}):
            got = framework.numpy(ul.softmax_nll(x, [0, 2], weight=weight, **options))
            np.testing.assert_allclose(got, right, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masked_nan_reaches_no_gradient(recorder, dtype):
    nan, inf = math.nan, math.inf
    x = recorder.array([[nan, 1.0, inf], [0.5, nan, 2.0]], dtype)
    where = [[False, True, False], [True, False, True]]
    gradient = recorder.gradient(lambda x: ul.multilabel_logistic_loss(x, TARGETS, where=where), x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient == 0, ~np.array(where))
    gradient = recorder.gradient(lambda x: ul.softmax_nll(x, [1, 2], where=where), x)
    assert np.isfinite(gradient).all()
