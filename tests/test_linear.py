"""The losses on the last linear layer's inputs: those of the logits, whatever blocks these come in."""

import gc
import math
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from shared import pattern
from unilabel.conformance.cases import REDUCTIONS

import unilabel as ul

SEED = 20261126
LINEAR = sys.modules["unilabel.formulas.linear"]
LENGTH = 3  # of features: then a block has three examples, with the fixture `small_blocks`
OF = {ul.softmax_nll: ul.linear_softmax_nll, ul.multilabel_logistic_loss: ul.linear_multilabel_logistic_loss}
EACH_LOSS = pytest.mark.parametrize("loss", list(OF))


class Layer:
    """A linear layer's inputs, and a loss of its logits in NumPy's float64 with all logits in memory."""

    def __init__(self, batch=(7,), classes=5, length=LENGTH, seed=SEED):
        rng = np.random.default_rng(seed)
        self.features = rng.uniform(-2, 2, (*batch, length))
        self.weight = rng.uniform(-2, 2, (classes, length))
        self.bias = rng.uniform(-2, 2, classes)
        self.batch, self.classes = batch, classes
        self.indices = rng.integers(0, classes, batch)
        self.labels = rng.integers(0, 2, (*batch, classes))
        self.soft = rng.dirichlet(np.ones(classes), batch)

    @property
    def inputs(self):
        return self.features, self.weight, self.bias

    @property
    def logits(self):
        return self.features @ self.weight.T + self.bias

    def targets(self, loss):
        return self.indices if loss is ul.softmax_nll else self.labels

    def through(self, gradient):
        """The gradients of the inputs, from that of the logits."""
        rows = gradient.reshape(-1, self.classes)
        return (
            gradient @ self.weight,
            rows.T @ self.features.reshape(-1, self.features.shape[-1]),
            rows.sum(0),
        )


def close(got, right, rtol=1e-12, atol=1e-13):
    assert np.shape(got) == np.shape(right)
    np.testing.assert_allclose(got, right, rtol=rtol, atol=atol)


def closed(framework, loss, layer, targets, dtype="float64", **options):
    """Value and gradients of `value_and_grad`, as NumPy's."""
    features, weight, bias = (framework.array(array, dtype) for array in layer.inputs)
    value, gradients = ul.value_and_grad(OF[loss])(features, weight, targets, linear_bias=bias, **options)
    assert gradients._fields == ("features", "linear_weight", "linear_bias")
    kinds = {type(array) for array in (value, *gradients)}
    assert kinds == {type(features)}
    assert {framework.backend.dtype(array) for array in (value, *gradients)} == {dtype}
    return framework.numpy(value), tuple(map(framework.numpy, gradients))


def recorded(recorder, loss, layer, targets, cotangent=None, dtype="float64", **options):
    """The gradients by the framework's own autodiff, one input after the other."""
    arrays = [recorder.array(array, dtype) for array in layer.inputs]

    def of(i):
        def value(x):
            features, weight, bias = (*arrays[:i], x, *arrays[i + 1 :])
            return OF[loss](features, weight, targets, linear_bias=bias, **options)

        return value

    return tuple(recorder.gradient(of(i), arrays[i], cotangent) for i in range(3))


def calls():
    """Every option with every reduction, of both losses."""
    layer = Layer()
    n, c = 7, layer.classes
    keep = np.random.default_rng(SEED).uniform(size=(n, c)) < 0.7
    keep[:, 1], keep[2] = True, False
    ignored = np.where(np.arange(n) % 3 == 0, -100, layer.indices)
    weight, sample_weight = np.linspace(0.5, 2, c), np.linspace(0.25, 3, n)
    of_both: list[Any] = [{}, {"label_smoothing": 0.1}, {"where": keep}, {"where": keep[0]}, {"where": keep[:, :1]}]
    for options in of_both:
        yield ul.softmax_nll, np.ones(n, int), options
        yield ul.softmax_nll, layer.soft, options
        yield ul.multilabel_logistic_loss, layer.labels, options
        yield ul.multilabel_logistic_loss, layer.soft, options
    per_example = {"weight": weight, "sample_weight": sample_weight}
    yield ul.softmax_nll, layer.indices, {"weight": weight}
    yield ul.softmax_nll, ignored, {"ignore_index": -100, "sample_weight": sample_weight}
    yield ul.softmax_nll, ignored, {"ignore_index": -100, "label_smoothing": 0.1, **per_example}
    yield ul.softmax_nll, layer.soft, per_example
    for shape in ((), (c,), (1, c), (n, 1), (n, c)):
        numbers = np.random.default_rng(SEED).uniform(0.5, 3, shape)
        yield ul.multilabel_logistic_loss, layer.labels, {"weight": numbers, "pos_weight": numbers + 1}
    yield ul.multilabel_logistic_loss, layer.soft, {"pos_weight": weight, "label_smoothing": 0.2, "where": keep}
    for mask in (np.True_, keep[:1]):
        yield ul.softmax_nll, np.ones(n, int), {"where": mask}
        yield ul.multilabel_logistic_loss, layer.labels, {"where": mask}


CALLS = list(calls())

# Each call with two of the reductions, its neighbour with the other two, as compilers take seconds for each.
# A quick run has a few of them.
EACH_CALL = pytest.mark.parametrize(
    ("call", "reduction"),
    [
        pytest.param(i, reduction, marks=() if i % 10 == 0 and reduction in ("none", "mean") else pytest.mark.full)
        for i in range(len(CALLS))
        for reduction in REDUCTIONS[i % 2 :: 2]
    ],
)
EACH_REDUCTION = pytest.mark.parametrize(
    "reduction", [pytest.param(r, marks=() if r in ("none", "mean") else pytest.mark.full) for r in REDUCTIONS]
)


@EACH_CALL
def test_every_option_is_as_on_logits(small_blocks, framework, call, reduction):
    loss, targets, options = CALLS[call]
    layer = Layer()
    value, gradient = ul.value_and_grad(loss)(layer.logits, targets, reduction=reduction, **options)
    got, gradients = closed(framework, loss, layer, targets, reduction=reduction, **options)
    close(got, value)
    for array, right in zip(gradients, layer.through(gradient), strict=True):
        close(array, right)
    features, weight, bias = (framework.array(array, "float64") for array in layer.inputs)
    again = OF[loss](features, weight, targets, linear_bias=bias, reduction=reduction, **options)
    close(framework.numpy(again), value)


@EACH_CALL
def test_autodiff_is_as_on_logits(small_blocks, recorder, call, reduction):
    """With a cotangent for each loss."""
    loss, targets, options = CALLS[call]
    layer = Layer()
    values, _ = ul.value_and_grad(loss)(layer.logits, targets, reduction=reduction, **options)
    cotangent = np.random.default_rng(SEED).uniform(-2, 2, values.shape)
    if reduction == "none":
        each = cotangent[:, None] if loss is ul.softmax_nll else cotangent
        gradient = ul.value_and_grad(loss)(layer.logits, targets, reduction="none", **options)[1] * each
    else:
        gradient = ul.value_and_grad(loss)(layer.logits, targets, reduction=reduction, **options)[1] * cotangent
    found = recorded(recorder, loss, layer, targets, cotangent, reduction=reduction, **options)
    for array, right in zip(found, layer.through(gradient), strict=True):
        close(array, right)


# One example without an axis, no examples, one class, one feature, several axes, blocks that fit and do not.
SHAPES = [
    ((), 4, 3),
    ((0,), 4, 3),
    ((4, 3), 1, 2),
    *(pytest.param(*shape, marks=pytest.mark.full) for shape in (((1,), 1, 1), ((2, 0), 4, 3), ((2, 3, 2), 5, 3))),
]


@EACH_LOSS
@pytest.mark.parametrize(("batch", "classes", "length"), SHAPES)
@EACH_REDUCTION
def test_every_shape(small_blocks, framework, loss, batch, classes, length, reduction):
    layer = Layer(batch, classes, length)
    options: dict[str, Any] = {"where": np.ones((*[1] * (len(batch) - 1), *batch[-1:], 1), bool)} if batch else {}
    targets = layer.targets(loss)
    value, gradient = ul.value_and_grad(loss)(layer.logits, targets, reduction=reduction, **options)
    got, gradients = closed(framework, loss, layer, targets, reduction=reduction, **options)
    close(got, value)
    for array, right in zip(gradients, layer.through(gradient), strict=True):
        close(array, right)


@EACH_LOSS
def test_without_bias(small_blocks, framework, loss):
    layer = Layer()
    layer.bias = np.zeros(layer.classes)
    features, weight = framework.array(layer.features, "float64"), framework.array(layer.weight, "float64")
    value, gradients = ul.value_and_grad(OF[loss])(features, weight, layer.targets(loss))
    right, gradient = ul.value_and_grad(loss)(layer.logits, layer.targets(loss))
    assert gradients.linear_bias is None
    close(framework.numpy(value), right)
    for array, expected in zip(gradients[:2], layer.through(gradient), strict=False):
        close(framework.numpy(array), expected)


@EACH_LOSS
def test_blocks_change_nothing_but_rounding(framework, loss, monkeypatch):
    """A bias is added once for each logit, and no class is padded: as many blocks as there are examples, or one."""
    layer = Layer((40,), 9, 1)
    found = []
    for block in (1, 1 << 23):
        monkeypatch.setattr(LINEAR, "BLOCK", block)
        found.append(closed(framework, loss, layer, layer.targets(loss)))
    (value, gradients), (other, others) = found
    close(value, other)
    for array, right in zip(gradients, others, strict=True):
        close(array, right)


@EACH_LOSS
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.full)])
def test_a_hundred_thousand_classes(small_blocks, framework, loss, reduction):
    """As many as words of a vocabulary, in blocks of four examples and one of three."""
    layer = Layer((7,), 100_000, 4)
    targets = layer.targets(loss)
    value, gradient = ul.value_and_grad(loss)(layer.logits, targets, reduction=reduction)
    got, gradients = closed(framework, loss, layer, targets, reduction=reduction)
    close(got, value)
    for array, right in zip(gradients, layer.through(gradient), strict=True):
        close(array, right)


def test_the_number_of_examples_in_a_block():
    def rows(n, classes, length):
        return LINEAR.rows_of_blocks(LINEAR.Linear(np.empty((n, length)), np.empty((classes, length))))

    assert rows(256, 1000, 64) is None  # 2^23 logits and less
    assert rows(2048, 32768, 256) == 256
    assert rows(4096, 65536, 64) == 128
    assert rows(1000, 65536, 64) == 125  # equal blocks
    assert rows(1009, 65536, 64) == 128  # a prime
    assert rows(1 << 12, 1 << 20, 64) == 64  # no larger than the weight


# --- Failures of others -----------------------------------------------------------------------------------------------


@EACH_LOSS
def test_half_precision_is_summed_in_float32(small_blocks, framework, loss):
    """In half precision, 1 more is nothing beside 2048 (float16) or 256 (bfloat16)."""
    if "float16" not in framework.dtypes:
        pytest.skip("the standard has no half precision")
    n = 600
    layer = Layer((n,), 2, 1)
    layer.features, layer.weight, layer.bias = np.ones((n, 1)), np.array([[0.0], [0.0]]), np.array([0.0, 0.0])
    targets = np.zeros(n, int) if loss is ul.softmax_nll else np.tile([1, 0], (n, 1))
    for dtype in ("float16", "bfloat16"):
        value, gradients = closed(framework, loss, layer, targets, dtype, reduction="sum")
        losses = n * math.log(2) * (1 if loss is ul.softmax_nll else 2)
        step = 2.0 ** (math.floor(math.log2(losses)) - (10 if dtype == "float16" else 7))
        assert abs(float(value) - losses) <= step / 2
        assert np.abs(gradients[1].astype("float64")).ravel().tolist() == [n / 2, n / 2]


def test_gradient_of_a_confident_class_does_not_vanish(small_blocks, framework):
    """p - 1 is 0 in bfloat16, and in float32 as well; the gradient is minus the sum of the others."""
    layer = Layer((4,), 3, 1)
    layer.features, layer.weight, layer.bias = np.ones((4, 1)), np.array([[40.0], [0.0], [0.0]]), np.zeros(3)
    for dtype in framework.dtypes:
        _, gradients = closed(framework, ul.softmax_nll, layer, [0] * 4, dtype)
        right = -2 * math.exp(-40)
        np.testing.assert_allclose(float(gradients[2][0]), right, rtol=2.0**-7 if "float16" not in dtype else 1)
        if dtype == "float16":  # below its range
            continue
        assert gradients[2][0] < 0


def test_a_common_offset_changes_nothing(small_blocks, framework):
    """`logsumexp - x_y` would be a difference of numbers about 2^24."""
    layer = Layer((6,), 4, 2)
    layer.features, layer.weight = np.round(layer.features * 4) / 4, np.round(layer.weight * 4) / 4  # exact products
    layer.bias = np.zeros(4)
    right = closed(framework, ul.softmax_nll, layer, layer.indices, "float64", reduction="none")[0]
    layer.bias = np.full(4, 2.0**24)
    close(closed(framework, ul.softmax_nll, layer, layer.indices, "float64", reduction="none")[0], right, atol=0)


@EACH_REDUCTION
def test_nothing_takes_part(small_blocks, framework, reduction):
    """All ignored, or masked: 0, with gradients of 0."""
    layer = Layer()
    nobody = np.full(7, -100)
    for loss, targets, options in (
        (ul.softmax_nll, nobody, {"ignore_index": -100}),
        (ul.softmax_nll, layer.indices, {"where": False}),
        (ul.multilabel_logistic_loss, layer.labels, {"where": [[False]] * 7}),
    ):
        value, gradients = closed(framework, loss, layer, targets, reduction=reduction, **options)
        for array in (value, *gradients):
            assert (array == 0).all()


def test_a_wrong_index_is_nan_in_its_own_example(small_blocks, framework):
    layer = Layer()
    targets = layer.indices.copy()
    targets[[1, 5]] = [5, -1]
    wrong = np.isin(np.arange(7), [1, 5])
    value, gradients = closed(framework, ul.softmax_nll, layer, targets, reduction="none")
    assert np.isnan(value).tolist() == wrong.tolist()
    assert np.isnan(gradients[0]).tolist() == np.broadcast_to(wrong[:, None], (7, LENGTH)).tolist()
    assert np.isnan(gradients[1]).all()


def test_garbage_where_masked_or_ignored(small_blocks, framework):
    """A logit of NaN under the mask: neither the loss nor the gradient of another class has it."""
    layer = Layer()
    layer.bias[2] = math.nan
    keep = np.arange(5) != 2
    for loss, targets in ((ul.softmax_nll, np.ones(7, int)), (ul.multilabel_logistic_loss, layer.labels)):
        value, (_, weight, bias) = closed(framework, loss, layer, targets, where=keep)
        assert np.isfinite(value)
        assert (weight[2] == 0).all()
        assert bias[2] == 0
        assert np.isfinite(weight).all()


@pytest.mark.parametrize("cotangent", [math.inf, math.nan])
@pytest.mark.parametrize("masked", ["a class", "a class and an example"])
@EACH_REDUCTION
def test_a_cotangent_that_is_not_finite(small_blocks, recorder, cotangent, masked, reduction):
    """What is masked or ignored has a gradient of 0."""
    layer, keep, without = Layer(), np.arange(5) != 2, []
    if masked != "a class":
        keep, without = keep & (np.arange(7) != 5)[:, None], [5]
    for loss, targets, more in (
        (ul.softmax_nll, np.array([0, 1, 3, -100, 4, 0, 1]), {"ignore_index": -100}),
        (ul.multilabel_logistic_loss, layer.labels, {}),
    ):
        options = {"where": keep, "reduction": reduction, **more}
        values, _ = ul.value_and_grad(loss)(layer.logits, targets, **options)
        found = recorded(recorder, loss, layer, targets, np.full(values.shape, cotangent), **options)
        for of_classes in found[1:]:
            assert (of_classes[2] == 0).all()
            assert not np.isfinite(of_classes[[0, 1, 3, 4]]).any()
        nothing = [*without, 3] if more else without
        assert (found[0][nothing] == 0).all()
        assert not np.isfinite(np.delete(found[0], nothing, 0)).any()


# --- Memory -----------------------------------------------------------------------------------------------------------


@EACH_LOSS
def test_numpy_has_no_array_of_the_logits_size(loss, monkeypatch):
    """Value and gradients take what they return and a few blocks."""
    monkeypatch.setattr(LINEAR, "BLOCK", 1 << 16)
    n, length, classes = 1 << 11, 8, 1 << 11
    layer = Layer((2,), 2, 2)
    rng = np.random.default_rng(SEED)
    features, weight = (rng.standard_normal(shape, dtype="float32") for shape in ((n, length), (classes, length)))
    targets = np.zeros(n, int) if loss is ul.softmax_nll else np.ones((n, 1), bool) & np.zeros(classes, bool)
    call = ul.value_and_grad(OF[loss])
    call(layer.features, layer.weight, layer.targets(loss))  # whatever is made once
    gc.collect()
    tracemalloc.start()
    call(features, weight, targets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * classes * 4 / 4  # the logits' bytes over 4


# --- Wrong calls ------------------------------------------------------------------------------------------------------

X, W, B = np.ones((4, 3)), np.ones((5, 3)), np.ones(5)
WRONG: list[Any] = [
    ((X, W.T, [0] * 4), {}, ValueError, "shape (C, 3), .*(4, 3). Received: (3, 5) (is it transposed?"),
    ((X @ W.T, W, [0] * 4), {}, ValueError, "shape (C, 5), .*(4, 5). Received: (5, 3) .*are the features logits?)."),
    ((X, W[:, :2], [0] * 4), {}, ValueError, "linear_weight: shape (C, 3).*Received: (5, 2)"),
    ((X, W[0], [0] * 4), {}, ValueError, "linear_weight: shape (C, 3).*Received: (3,)"),
    ((X, W[:0], [0] * 4), {}, ValueError, "linear_weight: at least one class. Received: shape (0, 3)"),
    ((X[:, :0], W[:, :0], [0] * 4), {}, ValueError, "features: .*at least one feature. Received: (4, 0)"),
    ((np.ones(()), W, 0), {}, ValueError, "features: shape (..., D)"),
    ((X, W, [0] * 4), {"linear_bias": B[:4]}, ValueError, "linear_bias: .*5 classes. Received: .*(4,)"),
    ((X, W.astype("float32"), [0] * 4), {}, TypeError, "linear_weight: .*the features, float64. Received: float32"),
    ((X, W, [0] * 4), {"linear_bias": B.astype("float32")}, TypeError, "linear_bias: .*float64. Received: float32"),
    ((X.astype(int), W, [0] * 4), {}, TypeError, "features: dtype float16, .*Received: int64"),
    ((X, W.astype(int), [0] * 4), {}, TypeError, "linear_weight: dtype float16, .*Received: int64"),
    ((X.tolist(), W, [0] * 4), {}, TypeError, "Expected features: an array of numpy, .*Received: list."),
    ((X, None, [0] * 4), {}, TypeError, "linear_weight: an array. Received: None"),
    ((X, W, None), {}, TypeError, "targets: an array. Received: None"),
    ((X, W, [0] * 3), {}, ValueError, "of shape (4,) or a distribution of shape (4, 5). Received: shape (3,)"),
    ((X, W, [0] * 4), {"where": np.ones((4, 4), bool)}, ValueError, "where: .*(4, 5). Received: (4, 4)"),
    ((X, W, [0] * 4), {"weight": [1.0] * 4}, ValueError, "one weight for each of 5 classes. Received: shape (4,)"),
    ((X, W, [0] * 4), {"reduction": "max"}, ValueError, "'none', 'sum', 'mean' or 'batchmean'. Received: 'max'"),
    ((X, W, [0, 1, 5, 2]), {"validate": True}, ValueError, "targets: class indices from 0 to 4. Received: 5 at (2,)"),
    ((X * math.nan, W, [0] * 4), {"validate": True}, ValueError, "features: no NaN. Received: nan at (0, 0)"),
    ((X, W, [0] * 4), {"linear_bias": B * math.nan, "validate": True}, ValueError, "linear_bias: no NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "options", "error", "text"), WRONG)
def test_wrong_calls(framework, arrays, options, error, text):
    def convert(array):
        return framework.backend.asarray(array) if isinstance(array, np.ndarray) else array

    features, weight, targets = map(convert, arrays)
    options = {name: convert(option) for name, option in options.items()}
    with pytest.raises(error, match=pattern(text)):
        ul.linear_softmax_nll(features, weight, targets, **options)
    with pytest.raises(error, match=pattern(text)):
        ul.value_and_grad(ul.linear_softmax_nll)(features, weight, targets, **options)


def test_plain_operands(framework):
    """Lists come in the features' dtype. NumPy's arrays beside a tensor need to have it."""
    features = framework.array(X[:, :2])
    value = ul.linear_softmax_nll(features, [[1.0, 0], [0, 1]], [0] * 4, linear_bias=[0, 0])
    assert framework.backend.dtype(value) == "float32"
    close(framework.numpy(value), np.float32(math.log(2)), 1e-6)
    value = ul.linear_softmax_nll(features, W[:2, :2].astype("float32"), [0] * 4)
    close(framework.numpy(value), np.float32(math.log(2)), 1e-6)


def test_no_hessian():
    with pytest.raises(TypeError, match=r"a loss of unilabel: multilabel_logistic_loss, .*linear_softmax_nll"):
        ul.grad_and_hess(ul.linear_softmax_nll)


def test_two_frameworks_in_one_call():
    import torch

    with pytest.raises(TypeError, match="Received: numpy features with a torch array"):
        ul.linear_softmax_nll(X, torch.ones(5, 3), [0] * 4)
