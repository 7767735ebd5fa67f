"""A call in canonical form: operands of every kind, the class axis in any place, and the cache of checked calls."""

import functools

import numpy as np
import pytest
from shared import LOGITS, TARGETS, asked_for, close

import unilabel as ul


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


@pytest.mark.parametrize("loss", [ul.multilabel_logistic_loss, ul.softmax_nll])
def test_axes_in_any_place(framework, loss):
    x, z = np.random.default_rng(20260101).uniform(0, 1, (2, 2, 3, 4, 5))
    run = ul.value_and_grad(loss)
    for axis in (0, 1, 2, (0, 2), (2, 0), (-1, 1, 0), (0, 1, 2, 3)):
        axes = axis if isinstance(axis, tuple) else (axis,)
        rest = [i for i in range(4) if i not in [a % 4 for a in axes]]
        order = [*rest, *(a % 4 for a in axes)]
        batch = [x.shape[i] for i in rest]
        flat_x, flat_z = (np.transpose(a, order).reshape(*batch, -1) for a in (x, z))
        value, gradient = map(framework.numpy, run(framework.array(x, "float64"), z, axis=axis))
        right, flat = map(framework.numpy, run(framework.array(flat_x, "float64"), flat_z))
        close(value, right, "float64")
        gradient = np.transpose(gradient, order).reshape(flat.shape)
        np.testing.assert_allclose(gradient, flat, rtol=0, atol=8 * 2.0**-52)  # of terms of up to 1 that cancel


def test_a_call_like_one_that_was_right(framework):
    """Calls that were checked once are not checked again; only those."""
    x, y = framework.array(LOGITS), framework.integers([0, 2])
    right = [framework.numpy(ul.softmax_nll(x, y, axis=1)) for _ in range(3)]
    assert right[0] == right[1] == right[2]
    for error, options in (
        (TypeError, {"axis": True}),
        (TypeError, {"axis": 1.0}),
        (TypeError, {"axis": 1, "ignore_index": 1.0}),
        (TypeError, {"axis": 1, "ignore_index": True}),
        (ValueError, {"axis": 1, "reduction": "average"}),
        (ValueError, {"axis": 1, "label_smoothing": 2.0}),
        (ValueError, {"axis": 1, "weight": [1.0]}),
    ):
        with pytest.raises(error):
            ul.softmax_nll(x, y, **options)
    for error, targets in ((ValueError, framework.integers([0, 2, 1])), (TypeError, framework.array([0, 2]))):
        with pytest.raises(error):
            ul.softmax_nll(x, targets, axis=1)
    with pytest.raises(ValueError, match="class indices from 0 to 2"):
        ul.softmax_nll(x, framework.integers([0, 3]), axis=1, validate=True)
    with pytest.raises(TypeError):
        ul.softmax_nll(framework.integers(np.zeros((2, 3))), y, axis=1)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_checked_once(framework, monkeypatch, shape):
    """Features and logits with any number of axes, and what they are beside: the checks are not even called again."""
    logits, targets = framework.array(np.zeros(shape)), framework.integers(np.zeros(shape[:-1]), "int64")
    weight, bias = framework.array(np.zeros((5, 4))), framework.array(np.zeros(5))
    calls = [
        lambda: ul.softmax_nll(logits, targets, weight=framework.array(np.ones(4))),
        lambda: ul.linear_softmax_nll(logits, weight, targets, linear_bias=bias),
        lambda: ul.linear_multilabel_logistic_loss(logits, weight, framework.array(np.zeros((*shape[:-1], 5)))),
    ]
    expected = [framework.numpy(call()) for call in calls]
    seen, operand = [], ul.checks.operand
    monkeypatch.setattr(ul.checks, "operand", lambda *call: seen.append(call) or operand(*call))
    assert [framework.numpy(call()) for call in calls] == expected
    assert bool(seen) == (framework.name in ("jax", "array_api_strict"))  # those know no cache


def test_parameters_are_checked_once(request, monkeypatch):
    """PyTorch's, which are the weights of every model."""
    asked_for("torch", request)
    import torch

    from unilabel.layers.torch import LinearSoftmaxNLL, SoftmaxNLL

    y = torch.tensor([0, 2])
    calls = [
        functools.partial(LinearSoftmaxNLL(4, 3, weight=torch.nn.Parameter(torch.ones(3))), torch.ones(2, 4), y),
        functools.partial(SoftmaxNLL(weight=torch.ones(3)), torch.nn.Parameter(torch.ones(2, 3)), y),
    ]
    expected = [call() for call in calls]
    monkeypatch.setattr(ul.checks, "operand", lambda *_: pytest.fail("checked again"))
    assert [call() for call in calls] == expected
