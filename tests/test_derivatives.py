"""value_and_grad and grad_and_hess: against autodiff twice, and in a boosting library against its own objectives."""

import inspect
import itertools
import pickle
from typing import Any

import lightgbm
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine

import unilabel as ul

X = np.array([[0.1, -3.0, 2.0], [1.7, 0.1, -0.3]])
P = np.array([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25]])
LABELS, SOFT = [[1, 0, 1], [0, 1, 0]], np.array([[0.5, 0.0, 0.25], [0.125, 1.0, 0.5]])
ROW = {
    "label_smoothing": 0.1,
    "weight": [0.5, 1, 2],
    "sample_weight": [3, 0.25],
    "where": [[True] * 3, [True, True, False]],
}
CALLS: list[Any] = [
    (ul.multilabel_logistic_loss, X, LABELS, {}),
    (ul.multilabel_logistic_loss, X, SOFT, {"label_smoothing": 0.1, "weight": [0.5, 1, 2], "pos_weight": 7}),
    (ul.multilabel_logistic_loss, X, SOFT, {"pos_weight": 7, "where": ROW["where"]}),
    (ul.softmax_nll, X, [2, 0], {}),
    (ul.softmax_nll, X, [2, 1], ROW),
    (ul.softmax_nll, X, SOFT, ROW),
    (ul.softmax_nll, X, [1, 0, 1], {"axis": 0}),
    (ul.softmax_nll, X, [2, -1], {"ignore_index": -1}),
    (ul.binary_cross_entropy, P, SOFT, {"pos_weight": 7}),
    (ul.binary_cross_entropy, P, LABELS, {"eps": 0.25}),
    (ul.cross_entropy, P, SOFT, ROW),
    (ul.nll, np.log(P), [2, 0], {"weight": [0.5, 1, 2]}),
]  # fmt: skip


def hessian_diagonal(recorder, function, x):
    """Of a function of a matrix, by differentiating its gradient once more, an element at a time."""
    x = recorder.array(x, "float64")
    positions = list(itertools.product(*map(range, x.shape)))
    if recorder.name == "jax":
        import jax

        hessian = np.asarray(jax.hessian(function)(x))
        return np.reshape([hessian[p + p] for p in positions], x.shape)
    if recorder.name == "torch":
        import torch

        hessian = torch.autograd.functional.hessian(function, x).numpy()
        return np.reshape([hessian[p + p] for p in positions], x.shape)
    if recorder.name == "mlx":
        import mlx.core as mx

        def row(unit):
            return mx.grad(lambda x: (mx.grad(function)(x) * unit).sum())(x)

        units = recorder.array(np.eye(len(positions)).reshape(-1, *x.shape), "float64")
        hessian = recorder.numpy(mx.vmap(row)(units))
        return np.reshape([hessian[i][p] for i, p in enumerate(positions)], x.shape)
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = function(x)
        gradient = inner.gradient(value, x)
    hessian = outer.jacobian(gradient, x, unconnected_gradients="zero").numpy()
    return np.reshape([hessian[p + p] for p in positions], x.shape)


@pytest.mark.full
@pytest.mark.parametrize(("loss", "x", "targets", "options"), CALLS)
def test_autodiff_twice(recorder, loss, x, targets, options):
    def total(x):
        return loss(x, targets, reduction="sum", **options)

    array = recorder.array(x, "float64")
    gradient, hessian = ul.grad_and_hess(loss)(array, targets, **options)
    for result in (gradient, hessian):
        assert type(result) is type(array)
        assert tuple(result.shape) == x.shape
    close = {"rtol": 1e-13, "atol": 1e-15}
    np.testing.assert_allclose(recorder.numpy(gradient), recorder.gradient(total, array), **close)
    np.testing.assert_allclose(recorder.numpy(hessian), hessian_diagonal(recorder, total, x), **close)


@pytest.mark.parametrize(("loss", "x", "targets", "options"), CALLS)
def test_every_backend_is_numpy(framework, loss, x, targets, options):
    expected = ul.grad_and_hess(loss)(x, targets, **options)
    for result, right in zip(
        ul.grad_and_hess(loss)(framework.array(x, "float64"), targets, **options), expected, strict=True
    ):
        np.testing.assert_allclose(framework.numpy(result), right, rtol=1e-14, atol=1e-16)


def test_tails_keep_their_digits(framework):
    """σ(x) σ(-x) and p (1 - p) where 1 - p is lost: exp(-|x|), up to its square."""
    x = np.array([20.0, -20.0, 40.0])
    _, hessian = ul.grad_and_hess(ul.multilabel_logistic_loss)(framework.array(x), [1, 1, 0])
    np.testing.assert_allclose(framework.numpy(hessian), np.exp(-np.abs(x)), rtol=1e-6)
    _, hessian = ul.grad_and_hess(ul.softmax_nll)(framework.array([[20.0, 0.0]]), [0])
    np.testing.assert_allclose(framework.numpy(hessian), np.exp([[-20.0, -20.0]]), rtol=1e-6)


def test_what_stands_under_a_mask_does_not_count(framework):
    x = framework.array([[np.nan, 1.0, 2.0], [np.inf, np.nan, -np.inf]])
    where = [[False, True, True], [False] * 3]
    for loss, targets in ((ul.softmax_nll, [1, 0]), (ul.multilabel_logistic_loss, LABELS)):
        for result in ul.grad_and_hess(loss)(x, targets, where=where):
            result = framework.numpy(result)
            assert (result[~np.array(where)] == 0).all()
            assert np.isfinite(result).all()


def test_wrong_index_is_nan(framework):
    for result in ul.grad_and_hess(ul.softmax_nll)(framework.array(X), [3, 0]):
        assert np.isnan(framework.numpy(result)).tolist() == [[True] * 3, [False] * 3]


def test_only_the_sum_has_an_elementwise_gradient():
    ul.grad_and_hess(ul.softmax_nll)(X, [2, 0], reduction="sum")
    with pytest.raises(ValueError, match=r"Expected reduction 'sum' for grad_and_hess. Received: 'mean'"):
        ul.grad_and_hess(ul.softmax_nll)(X, [2, 0], reduction="mean")


def test_value_and_grad_of_something_else():
    with pytest.raises(
        TypeError, match=r"a loss of unilabel: multilabel_logistic_loss, .*Received: <built-in function sum>"
    ):
        ul.value_and_grad(sum)
    with pytest.raises(TypeError, match=r"options of softmax_nll: weight, .*Received: pos_weight"):
        ul.value_and_grad(ul.softmax_nll)(X, [0, 1], pos_weight=1.0)


@pytest.mark.parametrize("maker", [ul.value_and_grad, ul.grad_and_hess])
def test_a_derivative_is_an_object_of_its_loss(maker):
    """The same each time, so that compilers know it again; pickled by reference; called like the loss."""
    function = maker(ul.softmax_nll)
    assert maker(ul.softmax_nll) is function
    assert pickle.loads(pickle.dumps(function)) is function
    assert repr(function) == function.__name__ == f"{maker.__name__}(softmax_nll)"
    of_loss = inspect.signature(ul.cross_entropy).parameters
    parameters = inspect.signature(maker(ul.cross_entropy)).parameters
    assert list(parameters) == ["logits", *list(of_loss)[1:]]
    reduction = "sum" if maker is ul.grad_and_hess else "mean"
    assert parameters["reduction"].default == reduction
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = function.nothing


# --- As the objective of LightGBM ------------------------------------------------------------------------------------

SETTINGS = {"num_leaves": 7, "learning_rate": 0.3, "verbose": -1, "deterministic": True, "num_threads": 1, "seed": 0}


def boosted(x, y, weight, objective, **more):
    """The raw scores of a booster; all of them start from 0, as a custom objective does."""
    data = lightgbm.Dataset(x, y, weight=weight, params={"verbose": -1})
    parameters = SETTINGS | more | {"objective": objective, "boost_from_average": False}
    return lightgbm.train(parameters, data, num_boost_round=20).predict(x, raw_score=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_lightgbm_binary(weighted):
    x, y = load_breast_cancer(return_X_y=True)
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else None

    def objective(scores, data):
        return ul.grad_and_hess(ul.multilabel_logistic_loss)(scores, data.get_label(), weight=data.get_weight())

    expected = boosted(x, y, weight, "binary")
    np.testing.assert_allclose(boosted(x, y, weight, objective), expected, rtol=1e-5, atol=1e-6)
    assert np.mean((expected > 0) == y) > 0.98


@pytest.mark.parametrize("weighted", [False, True])
def test_lightgbm_softmax(weighted):
    x, y = load_wine(return_X_y=True)
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else None

    def objective(scores, data):
        labels = data.get_label().astype(int)  # LightGBM holds them as floats
        gradient, hessian = ul.grad_and_hess(ul.softmax_nll)(scores, labels, sample_weight=data.get_weight())
        return gradient, hessian * 3 / 2  # K / (K - 1): LightGBM's convention, for what the diagonal leaves out

    expected = boosted(x, y, weight, "multiclass", num_class=3)
    np.testing.assert_allclose(boosted(x, y, weight, objective, num_class=3), expected, rtol=1e-5, atol=1e-6)
    assert np.mean(expected.argmax(1) == y) > 0.98
