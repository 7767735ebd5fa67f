"""The formulas keep their digits: at 0, in long sums, and beside what is masked. (In ULP: the conformance suite.)"""

import math

import numpy as np
import pytest
from shared import LOGITS, TARGETS, close, compiled

import unilabel as ul


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
