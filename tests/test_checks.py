"""Wrong calls: an error at once that says what was expected and what came, the same on every backend."""

import re
from typing import Any

import numpy as np
import pytest
from shared import pattern

import unilabel as ul

X = np.arange(6.0).reshape(2, 3) / 4
Z = [[1, 0, 1], [0, 1, 0]]

# (loss, targets, options, error, what its text must have in it)
WRONG: list[Any] = [
    # shapes
    (
        ul.multilabel_logistic_loss,
        [[1], [0]],
        {},
        ValueError,
        "targets: .*shape of the logits, (2, 3). Received: shape (2, 1)",
    ),
    (ul.multilabel_logistic_loss, [1, 0, 1], {}, ValueError, "Received: shape (3,)"),
    (
        ul.multilabel_logistic_loss,
        Z,
        {"weight": [1.0, 2.0]},
        ValueError,
        "weight: .*broadcasts.* (2, 3). Received: (2,)",
    ),
    (ul.multilabel_logistic_loss, Z, {"pos_weight": [[[1.0]]]}, ValueError, "pos_weight: .*Received: (1, 1, 1)"),
    (ul.multilabel_logistic_loss, Z, {"where": [[True]] * 3}, ValueError, "where: .*Received: (3, 1)"),
    (
        ul.softmax_nll,
        [0, 1, 2],
        {},
        ValueError,
        "class indices of shape (2,) or a distribution of shape (2, 3). Received: shape (3,)",
    ),
    (ul.softmax_nll, [[0], [1]], {}, ValueError, "Received: shape (2, 1)"),
    (
        ul.softmax_nll,
        [0, 1],
        {"weight": [1.0, 2.0]},
        ValueError,
        "one weight for each of 3 classes. Received: shape (2,)",
    ),
    (
        ul.softmax_nll,
        [0, 1],
        {"sample_weight": [1.0] * 3},
        ValueError,
        "one weight per example, (2,). Received: shape (3,)",
    ),
    # dtypes and kinds
    (
        ul.softmax_nll,
        [0.0, 1.0],
        {},
        TypeError,
        "integer class indices .*Received: float64 of shape (2,) (convert class indices held as floats: .astype(int)).",
    ),
    (ul.softmax_nll, [True, False], {}, TypeError, "integer class indices .*Received: bool"),
    (ul.softmax_nll, ["a", "b"], {}, TypeError, "targets: dtype int8, .*Received: str"),
    (ul.softmax_nll, [[1], [0, 1]], {}, TypeError, "targets: an array. Received: a list"),
    (ul.softmax_nll, None, {}, TypeError, "targets: an array. Received: None"),
    (ul.softmax_nll, "cat", {}, TypeError, "Received: .*str"),
    (ul.multilabel_logistic_loss, np.array(Z) * 1j, {}, TypeError, "targets: dtype .*Received: complex128"),
    (ul.multilabel_logistic_loss, np.ma.masked_array(Z), {}, TypeError, "plain array. Received: numpy MaskedArray"),
    (ul.multilabel_logistic_loss, Z, {"where": [[1, 0, 1]]}, TypeError, "where: dtype bool. Received: int64"),
    # options
    (
        ul.multilabel_logistic_loss,
        Z,
        {"reduction": "average"},
        ValueError,
        "'none', 'sum', 'mean' or 'batchmean'. Received: 'average'",
    ),
    (
        ul.multilabel_logistic_loss,
        Z,
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing: a number from 0 to 1.0. Received: 1.5",
    ),
    (ul.multilabel_logistic_loss, Z, {"label_smoothing": "much"}, ValueError, "Received: 'much'"),
    (ul.binary_cross_entropy, Z, {"eps": 0.7}, ValueError, "eps: a number from 0 to 0.5. Received: 0.7"),
    (ul.multilabel_logistic_loss, Z, {"axis": 2}, ValueError, "axis: .*-2 to 1, .*Received: 2 for 2 dimensions"),
    (ul.multilabel_logistic_loss, Z, {"axis": (0, -2)}, ValueError, "distinct axes. Received: (0, -2)"),
    (ul.multilabel_logistic_loss, Z, {"axis": ()}, ValueError, "axis: .*tuple of them. Received: ()"),
    (
        ul.multilabel_logistic_loss,
        Z,
        {"axis": 1.0},
        TypeError,
        "axis: an integer or a tuple of integers. Received: 1.0",
    ),
    (ul.softmax_nll, [0, 1], {"ignore_index": 0.5}, TypeError, "ignore_index: an integer. Received: 0.5"),
    (ul.softmax_nll, X, {"ignore_index": 1}, ValueError, "ignore_index: None, .*Received: 1"),
    (
        ul.softmax_nll,
        [0, 1],
        {"ignore_index": 2**40},
        ValueError,
        "an integer between -2**31 and 2**31 - 1, which are not included. Received: ",
    ),
    (ul.binary_cross_entropy, Z, {"eps": 1e-310}, ValueError, "eps: 0 or a normal number .*Received: 1e-310"),
    # values, on demand
    (ul.softmax_nll, [0, 3], {"validate": True}, ValueError, "class indices from 0 to 2. Received: 3 at (1,)"),
    (
        ul.softmax_nll,
        [-1, 3],
        {"validate": True, "ignore_index": -1},
        ValueError,
        "or ignore_index=-1. Received: 3 at (1,)",
    ),
    (
        ul.softmax_nll,
        [0, 1],
        {"validate": True, "where": [True, False, True]},
        ValueError,
        "where `where` is True. Received: 1 at (1,)",
    ),
    (ul.softmax_nll, [[0.5, 0.5, 0], [0.5, 0, 0]], {"validate": True}, ValueError, "sum to 1. Received: 0.5 at (1,)"),
    (
        ul.softmax_nll,
        [[1.5, -0.5, 0], [1, 0, 0]],
        {"validate": True},
        ValueError,
        "from 0 to 1. Received: 1.5 at (0, 0)",
    ),
    (
        ul.multilabel_logistic_loss,
        [[0, 0, 2], [0, 1, 0]],
        {"validate": True},
        ValueError,
        "from 0 to 1. Received: 2.0 at (0, 2)",
    ),
    (
        ul.cross_entropy,
        [0, 1],
        {"validate": True},
        ValueError,
        "probs: values from 0 to 1. Received: 1.25 at (1, 2)",
    ),
    (ul.nll, [0, 1], {"validate": True}, ValueError, "log_probs: values of at most 0. Received: 0.25 at (0, 1)"),
]


@pytest.mark.parametrize(("loss", "targets", "options", "error", "text"), WRONG)
def test_wrong_call(framework, loss, targets, options, error, text):
    x = framework.array(X)
    with pytest.raises(error, match=pattern(text)):
        loss(x, targets, **options)
    with pytest.raises(error, match=pattern(text)):
        ul.value_and_grad(loss)(x, targets, **options)


def test_right_values_pass_validation(framework):
    x = framework.array(X)
    where = [[True, True, False], [False] * 3]
    ul.multilabel_logistic_loss(x, Z, validate=True)
    ul.softmax_nll(x, [1, 9], where=where, validate=True)
    ul.softmax_nll(x, [[0.25, 0.75, np.nan], [np.nan] * 3], where=where, validate=True)
    ul.softmax_nll(framework.array(X.T), [[0.1, 0.6], [0.2, 0.2], [0.7, 0.2]], axis=0, validate=True)
    ul.softmax_nll(x, [-100, 2], ignore_index=-100, validate=True)
    ul.softmax_nll(framework.array(np.zeros((0, 3))), [], validate=True)
    ul.softmax_nll(x, np.full((2, 3), 1 / 3, "float16"), validate=True)


def test_nan_logits_do_not_pass_validation(framework):
    x = framework.array([[0.0, np.nan, 1.0]])
    for loss, targets in [(ul.multilabel_logistic_loss, [[0, 1, 1]]), (ul.softmax_nll, [0])]:
        with pytest.raises(ValueError, match=re.escape("logits: no NaN. Received: nan at (0, 1)")):
            loss(x, targets, validate=True)
        loss(x, targets, where=[True, False, True], validate=True)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integer_logits(framework, dtype):
    with pytest.raises(TypeError, match=pattern(f"logits: dtype float16, .*float64. Received: {dtype}")):
        ul.softmax_nll(framework.integers(X, dtype), [0, 1])
    with pytest.raises(TypeError, match=pattern(f"x: dtype float16, .*Received: {dtype}")):
        ul.softmax(framework.integers(X, dtype))


EXCHANGED = " (are logits and targets exchanged?)."


def test_logits_and_targets_exchanged(framework):
    x = framework.array(X)
    integers = "logits: dtype float16, .*float64. Received: int64" + EXCHANGED
    for loss, targets in ((ul.softmax_nll, [0, 1]), (ul.multilabel_logistic_loss, Z)):
        with pytest.raises(TypeError, match=pattern(integers)):
            loss(framework.integers(targets), x)
        with pytest.raises(TypeError, match=pattern("Expected an array of .*Received: list" + EXCHANGED)):
            loss(targets, x)
        in_numpy = integers if framework.name == "numpy" else f"numpy logits with a {framework.name} array{EXCHANGED}"
        with pytest.raises(TypeError, match=pattern(in_numpy)):
            loss(np.array(targets), x)
    with pytest.raises(ValueError, match=pattern("targets: .*Received: shape (2, 3)" + EXCHANGED)):
        ul.softmax_nll(framework.array([0.0, 1.0]), x)


def test_what_does_not_look_exchanged(framework):
    for logits, targets in ((X.tolist(), [0, 1]), (framework.array(X), framework.array(X[..., None] * 0))):
        with pytest.raises((TypeError, ValueError), match=r"Received: .*") as raised:
            ul.multilabel_logistic_loss(logits, targets)
        assert "exchanged" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["complex64", "longdouble", "object"])
def test_numpy_dtypes_that_no_loss_is_for(dtype):
    with pytest.raises(TypeError, match=pattern("logits: dtype float16, bfloat16, float32 or float64. Received:")):
        ul.multilabel_logistic_loss(X.astype(dtype), Z)


def test_no_class(framework):
    with pytest.raises(ValueError, match=pattern("logits: at least one class. Received: shape (2, 0)")):
        ul.softmax_nll(framework.array(np.zeros((2, 0))), [0, 0])
    with pytest.raises(ValueError, match=pattern("x: at least one class. Received: shape (2, 0)")):
        ul.softmax(framework.array(np.zeros((2, 0))))


def test_no_class_axis(framework):
    with pytest.raises(ValueError, match=pattern("axis: logits with at least one axis, .*Received: -1")):
        ul.softmax_nll(framework.array(1.0), 0)


@pytest.mark.parametrize("axis", [-1, 3, (2, 3)])
def test_targets_that_fit_the_class_axis_of_pytorch(framework, axis):
    x = framework.array(np.zeros((2, 3, 4, 5)))
    with pytest.raises(ValueError, match=pattern("targets: .*. Received: shape (2, 4, 5) (did you mean axis=1?).")):
        ul.softmax_nll(x, np.zeros((2, 4, 5), int), axis=axis)
    for shape in ((2, 4, 4), (3, 4, 5)):
        with pytest.raises(ValueError, match=pattern(f"targets: .*. Received: shape {shape}.") + "$"):
            ul.softmax_nll(x, np.zeros(shape, int), axis=axis)


def test_validation_cannot_read_what_is_traced(recorder):
    def loss(x):
        return ul.softmax_nll(x, [0, 1], validate=True)

    if recorder.name == "torch":
        import torch

        traced, error = torch.compile(loss, backend="eager", fullgraph=True), Exception
    elif recorder.name == "jax":
        import jax

        traced, error = jax.jit(loss), ValueError
    else:
        import tensorflow as tf

        traced, error = tf.function(loss), ValueError
    with pytest.raises(error, match=r"Expected values to read. Received: a .*, which has none yet"):
        traced(recorder.array(X))
