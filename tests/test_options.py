"""Every option with every other, drawn at random, on every backend, against the oracle; and what must hold for all.

UNILABEL_EXAMPLES=10000 draws that many combinations instead of a few; `-m full` draws 60 more.
"""

import itertools
import math
import os
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unilabel.conformance.cases import LOSSES as KINDS
from unilabel.conformance.cases import MULTILABEL, REDUCTIONS, SOFTMAX, Case, Maker, Tensor
from unilabel.conformance.oracle import expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.worker import answer

import unilabel as ul

EXAMPLES = int(os.environ.get("UNILABEL_EXAMPLES", 10))
DRAWN = itertools.count()
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
EACH_REDUCTION = pytest.mark.parametrize(  # in a quick run the mean alone
    "reduction", [name if name == "mean" else pytest.param(name, marks=pytest.mark.full) for name in REDUCTIONS]
)


@st.composite
def calls(draw: Any) -> Case:
    """A loss with any of its options, of small shapes (few, so that compilers see them again)."""
    maker = Maker("options", "float64", draw(st.integers(0, 2**20)))
    loss = draw(st.sampled_from([name for name, kind in KINDS.items() if not kind.on_logits]))
    per_example = KINDS[loss].per_example
    low, high = {MULTILABEL: (-9, 9), SOFTMAX: (-9, 9), "nll": (-9, 0)}.get(loss, (0, 1))
    shape, axis = draw(
        st.sampled_from(
            [((3,), -1), ((0, 3), -1), ((2, 3), 1), ((4, 3), -1), ((3, 2), 0), ((2, 3, 2), 1), ((2, 3, 2), (0, -1))]
        )
    )
    axes = [i % len(shape) for i in (axis if isinstance(axis, tuple) else (axis,))]
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    classes = math.prod(shape[i] for i in axes)
    options: dict[str, Any] = {"axis": axis, "reduction": draw(st.sampled_from(REDUCTIONS))}
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.1, 1.0]))
    logits = maker.numbers(shape, low, high)
    if draw(st.booleans()):
        whole = draw(st.booleans())  # a mask of the logits' shape, under which there is garbage, or one that broadcasts
        keep = options["where"] = maker.chosen(shape if whole else shape[-1:], True, True, False)
        if whole:
            values = [x if k else maker.random.choice(GARBAGE) for x, k in zip(logits.values, keep.values, strict=True)]
            logits = Tensor(shape, values)
    if per_example:
        for name, size in (("weight", (classes,)), ("sample_weight", batch)):
            if draw(st.booleans()):
                options[name] = maker.numbers(size, 0.1, 3)
        if draw(st.booleans()):
            targets = maker.chosen(batch, *range(classes), -100, *draw(st.sampled_from([(), (-1, classes)])))
            if draw(st.booleans()):
                options["ignore_index"] = draw(st.sampled_from([-100, 0]))
        else:
            targets = maker.numbers(shape, 0, 0.5)  # need not sum to 1
    else:
        for name in ("weight", "pos_weight"):
            if draw(st.booleans()):
                options[name] = maker.numbers(draw(st.sampled_from([(), (1,), shape[-1:], shape])), 0.1, 3)
        targets = maker.chosen(shape, 0, 1) if draw(st.booleans()) else maker.numbers(shape, 0, 1)
    return maker.case(loss, logits, targets, **options)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, print_blob=True)
@given(case=calls())
def test_any_options(frameworks, case):
    check(frameworks, case)


@pytest.mark.full
@settings(max_examples=60, deadline=None, derandomize=True, print_blob=True)
@given(case=calls())
def test_more_options(frameworks, case):
    check(frameworks, case)


def check(frameworks, case):
    right = expected(case)
    if next(DRAWN) % 500 == 499 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()  # XLA crashes with ten thousand programs in one process
    for framework in frameworks:
        backend = framework.backend
        got = answer(backend, backend.devices()[0], case)
        assert "numbers" in got, f"{framework.name}: {got}"
        for what, verdict in judge(case, right, got["numbers"], framework.name).items():
            assert not verdict.failed, f"{framework.name}, {what}: {verdict}"


# --- What must hold for all -------------------------------------------------------------------------------------------

SEED = 20260101
LOSSES: list[Any] = [ul.multilabel_logistic_loss, ul.softmax_nll]


def data(rows=6, classes=4):
    rng = np.random.default_rng(SEED)
    return rng.uniform(-5, 5, (rows, classes)), rng.integers(0, classes, rows), rng.dirichlet(np.ones(classes), rows)


def run(framework, loss, x, targets, **options):
    """Value and gradient in float64, as NumPy's."""
    value, gradient = ul.value_and_grad(loss)(framework.array(x, "float64"), targets, **options)
    return framework.numpy(value), framework.numpy(gradient)


def same(a, b, ulp=32):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=ulp * 2.0**-52, atol=ulp * 2.0**-52)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_index_is_one_hot(framework, reduction):
    """Though it is looked up, and no matrix is made."""
    x, y, _ = data()
    options = {
        "weight": [0.5, 1, 2, 3],
        "label_smoothing": 0.1,
        "sample_weight": [1, 2, 3, 4, 5, 6],
        "reduction": reduction,
    }
    same(run(framework, ul.softmax_nll, x, y, **options), run(framework, ul.softmax_nll, x, np.eye(4)[y], **options), 2)


def test_offset_changes_nothing(framework):
    x, y, z = data()
    x = np.round(x * 2**20) / 2**20  # so that adding a power of two is exact
    for targets in (y, z):
        same(run(framework, ul.softmax_nll, x + 2**24, targets), run(framework, ul.softmax_nll, x, targets), 0)


def test_labels_mirror(framework):
    x, _, z = data()
    value, gradient = run(framework, ul.multilabel_logistic_loss, x, 1 - z, reduction="none")
    mirrored, other = run(framework, ul.multilabel_logistic_loss, -x, z, reduction="none")
    same((value, gradient), (mirrored, -other))


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": [0.5, 1, 2, 3]}, {"where": [True, True, False, True]}]
)
def test_softmax_gradients_sum_to_0(framework, options):
    x, y, z = data()
    for targets in (np.minimum(y, 1), z):
        _, gradient = run(framework, ul.softmax_nll, x, targets, **options)
        assert np.abs(gradient.sum(-1)).max() <= 4 * 2.0**-52


def test_masking_is_leaving_out(framework):
    x, y, z = data()
    keep = np.array([True, False, True, True])
    classes = np.array([0, -1, 1, 2])
    y = np.where(y == 1, 0, y)
    for smoothing in (0.0, 0.1):
        for whole, part in ((y, classes[y]), (z, z[:, keep])):
            value, gradient = run(framework, ul.softmax_nll, x, whole, where=keep, label_smoothing=smoothing)
            assert (gradient[:, ~keep] == 0).all()
            same(
                (value, gradient[:, keep]), run(framework, ul.softmax_nll, x[:, keep], part, label_smoothing=smoothing)
            )
        for reduction in ("mean", "sum"):
            options = {"label_smoothing": smoothing, "reduction": reduction}
            value, gradient = run(framework, ul.multilabel_logistic_loss, x, z, where=keep, **options)
            assert (gradient[:, ~keep] == 0).all()
            left = run(framework, ul.multilabel_logistic_loss, x[:, keep], z[:, keep], **options)
            same((value, gradient[:, keep]), left)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignoring_is_leaving_out(framework, reduction):
    x, y, _ = data()
    y[[1, 4]] = -1
    left = y >= 0
    options = {"weight": [0.5, 1, 2, 3], "label_smoothing": 0.1, "reduction": reduction}
    value, gradient = run(framework, ul.softmax_nll, x, y, ignore_index=-1, **options)
    expected, right = run(framework, ul.softmax_nll, x[left], y[left], **options)
    if reduction == "batchmean":  # over all examples, the ignored ones too
        expected, right = expected * left.mean(), right * left.mean()
    same((value[left] if reduction == "none" else value, gradient[left]), (expected, right))
    assert (gradient[~left] == 0).all()


@EACH_REDUCTION
def test_weights_of_1_are_none(framework, reduction):
    x, y, z = data()
    for targets in (y, z):
        plain = run(framework, ul.softmax_nll, x, targets, reduction=reduction)
        for options in ({"weight": np.ones(4)}, {"sample_weight": np.ones(6)}, {"where": True}, {"label_smoothing": 0}):
            same(run(framework, ul.softmax_nll, x, targets, reduction=reduction, **options), plain)
    plain = run(framework, ul.multilabel_logistic_loss, x, z, reduction=reduction)
    for options in ({"weight": 1.0}, {"pos_weight": [1.0] * 4}, {"where": True}, {"label_smoothing": 0}):
        same(run(framework, ul.multilabel_logistic_loss, x, z, reduction=reduction, **options), plain)


def test_order_of_classes_does_not_matter(framework):
    x, y, z = data()
    order = np.array([2, 0, 3, 1])
    moved = np.argsort(order)
    for loss, targets, reordered in (
        (ul.softmax_nll, y, moved[y]),
        (ul.softmax_nll, z, z[:, order]),
        (ul.multilabel_logistic_loss, z, z[:, order]),
    ):
        value, gradient = run(framework, loss, x, targets)
        same(run(framework, loss, x[:, order], reordered), (value, gradient[:, order]))


@pytest.mark.parametrize("loss", LOSSES)
def test_none_summed_is_sum(framework, loss):
    x, _, z = data()
    value, gradient = run(framework, loss, x, z, reduction="none")
    same((value.sum(), gradient), run(framework, loss, x, z, reduction="sum"))


@pytest.mark.parametrize("loss", LOSSES)
@EACH_REDUCTION
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"where": [True, False, True, True]}, {"weight": [1, 2, 3, 4]}]
)
def test_soft_targets_gradient(recorder, loss, reduction, options):
    """Loss and divisor are linear in z: their derivatives are the changes from z = 0 to 1, whatever the other z."""
    x, _, z = data(2)
    logits = recorder.array(x, "float64")
    cotangent = np.ones(())
    if reduction == "none":
        cotangent = np.random.default_rng(SEED).uniform(0.5, 2, x.shape if loss is LOSSES[0] else x.shape[:1])

    def call(z, reduction):
        return loss(logits, z, reduction=reduction, **options)

    def at(z):
        """The loss before it is divided, and the divisor."""
        summed = (recorder.numpy(call(z, "none")) * cotangent).sum()
        if loss is ul.softmax_nll and reduction == "mean" and "weight" in options:
            return summed, (z * options["weight"]).sum()
        return summed, divisor

    kept = np.mean(options.get("where", [True]))
    divisor = {"mean": 2 if loss is ul.softmax_nll else 8 * kept, "batchmean": 2}.get(reduction, 1)
    gradient = recorder.gradient(lambda z: call(z, reduction), recorder.array(z, "float64"), cotangent)
    total, over = at(z)
    for position in itertools.product(range(2), range(4)):
        one, zero = z.copy(), z.copy()
        one[position], zero[position] = 1, 0
        rise, wider = np.subtract(at(one), at(zero))
        np.testing.assert_allclose(gradient[position], rise / over - total * wider / over**2, rtol=1e-12, atol=1e-14)
