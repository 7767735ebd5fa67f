"""The losses do what the documentation says, on every backend. Accuracy in ULP is the conformance suite's business."""

import math
from typing import Any

import numpy as np
import pytest
from shared import LOGITS, TARGETS, close, compiled
from unilabel.conformance import oracle
from unilabel.conformance.cases import Maker, Tensor

import unilabel as ul
from unilabel.losses import FORMULAS

ALL = list(FORMULAS)


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


def test_probabilities_of_0_and_1_are_finite(framework):
    probs = framework.array([[0.0, 1.0], [1.0, 0.0]])
    for loss, targets in [(ul.binary_cross_entropy, [[1, 0], [1, 0]]), (ul.cross_entropy, [0, 1])]:
        value, gradient = ul.value_and_grad(loss)(probs, targets)
        assert np.isfinite(framework.numpy(value)).all()
        assert np.isfinite(framework.numpy(gradient)).all()


@pytest.mark.parametrize("loss", ALL)
def test_result_is_of_the_logits_kind(framework, loss):
    targets = framework.integers([0, 1] if FORMULAS[loss].per_example else TARGETS)
    for dtype in framework.dtypes:
        x = framework.array(np.full((2, 3), 0.25), dtype)
        value, gradient = ul.value_and_grad(loss)(x, targets)
        for result, shape in [(loss(x, targets), ()), (value, ()), (gradient, (2, 3))]:
            assert type(result) is type(x)
            assert framework.backend.dtype(result) == dtype
            assert tuple(result.shape) == shape
            assert framework.backend.device(result) == framework.backend.device(x)


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
    targets = [0, 1] if FORMULAS[loss].per_example else TARGETS

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

    def gradient(x):
        return recorder.numpy(ul.value_and_grad(loss)(recorder.array(x, "float64"), targets)[1])

    expected = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
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
        (_, gradient), (mean, of_mean) = summed(x), compiled(recorder, total)(x)
        gradient, values = recorder.numpy(gradient), ul.softmax_nll(x, y, reduction="none")
        assert np.isnan(recorder.numpy(of_mean)).any(axis=1).tolist() == [False, True, True, False, True, False]
    assert np.isnan(recorder.numpy(values)).tolist() == [False, True, True, False, True, False]
    assert np.isnan(gradient).tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3, [True] * 3, [False] * 3]
    assert np.isnan(recorder.numpy(mean))


def test_weight_0_of_an_infinite_loss(framework):
    logits = framework.array([[0.0, np.inf], [1.0, 0.0]])
    with np.errstate(all="ignore"):  # array-api-strict warns as NumPy does
        losses = ul.softmax_nll(logits, [0, 0], sample_weight=[0.0, 1.0], reduction="none")
    close(framework.numpy(losses), [0.0, 0.31326168751822286])


@pytest.mark.parametrize("name", ["targets", "weight", "pos_weight or sample_weight"])
@pytest.mark.parametrize("loss", ALL)
def test_nan_in_an_operand_is_nan_in_its_losses(framework, loss, name, monkeypatch):
    """In PyTorch also as if the arrays were on a GPU, where nothing is known of the values."""
    per_example = FORMULAS[loss].per_example
    if "or" in name:
        name = "sample_weight" if per_example else "pos_weight"
    x = np.array([[0.3, 0.2, 0.5], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    z = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    ones = np.ones(3) if per_example else np.ones((3, 3))
    given = {"targets": z, name: z.copy() if name == "targets" else ones.copy()}
    given[name].flat[0] = np.nan
    right = np.zeros((3, 3), bool)
    right.flat[0] = True
    if per_example:
        right = np.ones(3, bool) if name == "weight" else right[:, 0]  # the weight of a class is part of each example
    for on_cpu in (True, False) if framework.name == "torch" else (True,):
        if not on_cpu:
            monkeypatch.setattr("unilabel.backends.torch._on_cpu", lambda x: False)
        losses = framework.numpy(loss(framework.array(x), **given, reduction="none"))
        assert np.isnan(losses).tolist() == right.tolist()
