"""Labels as targets: what the dense targets give that they stand for, in every loss that takes them."""

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from shared import asked_for, compiled, pattern
from unilabel.conformance.cases import REDUCTIONS

import unilabel as ul
from unilabel.backend import backend_named

SEED = 20261127
N, C, K = 7, 11, 5
RNG = np.random.default_rng(SEED)
LABELS = RNG.integers(-1, C, (N, K))  # in any order, with padding and duplicates among them
LABELS[2, :2], LABELS[3], LABELS[4] = 6, -1, range(K)
LOGITS, KEEP = RNG.uniform(-6, 6, (N, C)), RNG.uniform(size=(N, C)) < 0.7
KEEP[5] = False
PER_CLASS, PER_EXAMPLE = RNG.uniform(0.5, 2, C), RNG.uniform(0.5, 2, (N, 1))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"weight": PER_CLASS},
    {"pos_weight": PER_CLASS},
    {"where": KEEP},
    {"weight": PER_EXAMPLE, "pos_weight": PER_CLASS, "where": KEEP, "label_smoothing": 0.2},
]
CALLS = list(itertools.product(OPTIONS, REDUCTIONS))
# Compilers take a second for each: with every option every reduction once, in turn.
SOME = [(options, REDUCTIONS[i % len(REDUCTIONS)]) for i, options in enumerate(OPTIONS)]


def dense(labels, classes=C):
    """The targets that they stand for, by the definition."""
    return np.array([[c in row for c in range(classes)] for row in labels.reshape(-1, labels.shape[-1])]).reshape(
        *labels.shape[:-1], classes
    )


def close(got, right):
    np.testing.assert_allclose(got, right, rtol=1e-12, atol=1e-14)


def calls(framework):
    return CALLS if framework.name in ("numpy", "torch") else SOME


@pytest.mark.parametrize("loss", [ul.multilabel_logistic_loss, ul.binary_cross_entropy])
def test_equal_the_dense_targets(framework, loss):
    x = LOGITS if loss is ul.multilabel_logistic_loss else 1 / (1 + np.exp(-LOGITS))
    given = ul.Positives(framework.integers(LABELS))
    for options, reduction in calls(framework):
        got = ul.value_and_grad(loss)(framework.array(x, "float64"), given, reduction=reduction, **options)
        right = ul.value_and_grad(loss)(x, dense(LABELS), reduction=reduction, **options)
        for a, b in zip(got, right, strict=True):
            close(framework.numpy(a), b)


def test_equal_the_dense_targets_by_autodiff(recorder):
    given = ul.Positives(recorder.integers(LABELS, "int32"))
    for options, reduction in calls(recorder):
        cotangent = PER_CLASS if reduction == "none" else np.array(3.0)

        def loss(x, options=options, reduction=reduction):
            return ul.multilabel_logistic_loss(x, given, reduction=reduction, **options)

        got = recorder.gradient(
            loss, recorder.array(LOGITS, "float64"), np.broadcast_to(cotangent, loss_shape(reduction))
        )
        of_each = ul.value_and_grad(ul.multilabel_logistic_loss)(LOGITS, dense(LABELS), reduction=reduction, **options)[
            1
        ]
        close(got, of_each * cotangent)


def loss_shape(reduction):
    return (N, C) if reduction == "none" else ()


def test_of_the_linear_loss(framework):
    features, weight, bias = RNG.uniform(-2, 2, (N, 3)), RNG.uniform(-2, 2, (C, 3)), RNG.uniform(-2, 2, C)
    arrays = [framework.array(a, "float64") for a in (features, weight)]
    function = ul.value_and_grad(ul.linear_multilabel_logistic_loss)
    for options, reduction in calls(framework):
        options = options | {"reduction": reduction}
        own = framework.array(bias, "float64")
        value, gradients = function(*arrays, ul.Positives(framework.integers(LABELS)), linear_bias=own, **options)
        right, right_gradients = function(features, weight, dense(LABELS), linear_bias=bias, **options)
        for a, b in zip((value, *gradients), (right, *right_gradients), strict=True):
            close(framework.numpy(a), b)


def test_gradient_and_hessian(framework):
    for options in OPTIONS:
        got = ul.grad_and_hess(ul.multilabel_logistic_loss)(
            framework.array(LOGITS, "float64"), ul.Positives(LABELS), **options
        )
        right = ul.grad_and_hess(ul.multilabel_logistic_loss)(LOGITS, dense(LABELS), **options)
        for a, b in zip(got, right, strict=True):
            close(framework.numpy(a), b)


@pytest.mark.parametrize("axis", [0, 1, (0, 2)])
def test_with_the_class_axis_elsewhere(framework, axis):
    """The labels of several axes count them as one, in the order given; so do operands that broadcast."""
    x, keep, weight = RNG.uniform(-6, 6, (3, 4, 2)), RNG.uniform(size=(4, 2)) < 0.7, RNG.uniform(0.5, 2, (4, 1))
    axes = axis if isinstance(axis, tuple) else (axis,)
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    batch = moved.shape[: -len(axes)]
    labels = RNG.integers(-1, x.size // int(np.prod(batch)), (*batch, 3))
    z = np.moveaxis(dense(labels, x.size // int(np.prod(batch))).reshape(moved.shape), range(-len(axes), 0), axes)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"axis": axis, "where": keep, "weight": weight, "reduction": reduction}
        array = framework.array(x, "float64")
        got = ul.value_and_grad(ul.multilabel_logistic_loss)(array, ul.Positives(labels), **options)
        right = ul.value_and_grad(ul.multilabel_logistic_loss)(x, z, **options)
        for a, b in zip(got, right, strict=True):
            close(framework.numpy(a), b)
        close(framework.numpy(ul.multilabel_logistic_loss(array, ul.Positives(labels), **options)), right[0])


@pytest.mark.parametrize("wrong", [C, -2, 2**31 - 1])
def test_a_wrong_label_makes_its_example_nan(framework, wrong):
    labels = LABELS.copy()
    labels[1, 2] = wrong
    for options in ({}, {"label_smoothing": 0.1, "pos_weight": PER_CLASS}):
        value, gradient = ul.value_and_grad(ul.multilabel_logistic_loss)(
            framework.array(LOGITS), ul.Positives(framework.integers(labels)), reduction="none", **options
        )
        for array in map(framework.numpy, (value, gradient)):
            assert np.isnan(array).all(axis=1).tolist() == np.isnan(array).any(axis=1).tolist()
            assert np.flatnonzero(np.isnan(array).any(axis=1)).tolist() == [1]
    assert np.isnan(framework.numpy(ul.multilabel_logistic_loss(framework.array(LOGITS), ul.Positives(labels))))
    text = f"Expected targets: labels from 0 to 10, or -1, which pads. Received: {wrong} at (1, 2)."
    with pytest.raises(ValueError, match=pattern(text)):
        ul.multilabel_logistic_loss(framework.array(LOGITS), ul.Positives(labels), validate=True)
    keep = np.arange(N)[:, None] != 1
    ul.multilabel_logistic_loss(framework.array(LOGITS), ul.Positives(labels), where=keep, validate=True)


@pytest.mark.parametrize("labels", [np.full((N, K), -1), np.zeros((N, 0), int), np.zeros((0, K), int)], ids=str)
def test_without_labels(framework, labels):
    x = LOGITS[: len(labels)]
    got = ul.value_and_grad(ul.multilabel_logistic_loss)(framework.array(x, "float64"), ul.Positives(labels))
    right = ul.value_and_grad(ul.multilabel_logistic_loss)(x, np.zeros(x.shape))
    for a, b in zip(got, right, strict=True):
        close(framework.numpy(a), b)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_dtypes_and_lists(framework, dtype):
    right = ul.multilabel_logistic_loss(LOGITS, dense(LABELS))
    for labels in (LABELS.astype(dtype), LABELS.tolist(), framework.integers(LABELS, dtype)):
        close(
            framework.numpy(ul.multilabel_logistic_loss(framework.array(LOGITS, "float64"), ul.Positives(labels))),
            right,
        )


def test_half_precision(framework):
    for dtype in set(framework.dtypes) - {"float64"}:
        x = framework.array(LOGITS, dtype)
        got = ul.value_and_grad(ul.multilabel_logistic_loss)(x, ul.Positives(LABELS), pos_weight=2.0)
        right = ul.value_and_grad(ul.multilabel_logistic_loss)(x, framework.integers(dense(LABELS)), pos_weight=2.0)
        for a, b in zip(got, right, strict=True):
            np.testing.assert_array_equal(framework.numpy(a), framework.numpy(b))


def test_losses_of_exclusive_classes_do_not_take_them(framework):
    features = framework.array(np.ones((N, 3)))
    text = "Expected targets: class indices or a distribution, as the classes of .* exclude .* Received: Positives, for"
    for loss in (ul.softmax_nll, ul.cross_entropy, ul.nll, ul.value_and_grad(ul.softmax_nll)):
        with pytest.raises(TypeError, match=pattern(text)):
            loss(framework.array(LOGITS), ul.Positives(LABELS))
    with pytest.raises(TypeError, match=pattern(text)):
        ul.linear_softmax_nll(features, framework.array(np.ones((C, 3))), ul.Positives(LABELS))


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (LABELS[:3], ValueError, "labels of shape (7, K), for logits of shape (7, 11). Received: shape (3, 5)"),
        (LABELS[0], ValueError, "labels of shape (7, K), for logits of shape (7, 11). Received: shape (5,)"),
        (LABELS * 1.0, TypeError, "Expected labels: dtype int8, .* or uint32. Received: float64"),
        (LABELS.astype("uint64"), TypeError, "Expected labels: dtype int8, .* or uint32. Received: uint64"),
        ([[1, 2], [3]], TypeError, "Expected labels: an array. Received: a list that NumPy cannot convert"),
        (None, TypeError, "Expected targets: an array. Received: None"),
    ],
)  # fmt: skip
def test_what_is_refused(framework, labels, error, text):
    with pytest.raises(error, match=pattern(text)):
        ul.multilabel_logistic_loss(framework.array(LOGITS), ul.Positives(labels))


def test_one_element_has_no_labels():
    with pytest.raises(ValueError, match="with at least one axis"):
        ul.multilabel_logistic_loss(np.array(0.5), ul.Positives([0]))


# --- From CSR ---------------------------------------------------------------------------------------------------------


def test_from_csr():
    indptr, indices = np.array([0, 2, 2, 5]), np.array([4, 1, 3, 0, 2], "int32")
    got = ul.Positives.from_csr(indptr, indices).indices
    assert got.tolist() == [[4, 1, -1], [-1, -1, -1], [3, 0, 2]]
    assert got.dtype == "int32"
    assert ul.Positives.from_csr(indptr, indices, rows=[2, 0, 2]).indices.tolist() == [[3, 0, 2], [4, 1, -1], [3, 0, 2]]
    assert ul.Positives.from_csr(indptr, indices, rows=np.array([1])).indices.tolist() == [[]]
    assert ul.Positives.from_csr(indptr, indices, rows=[0], length=4).indices.tolist() == [[4, 1, -1, -1]]
    assert ul.Positives.from_csr(indptr, indices, rows=[]).indices.shape == (0, 0)
    assert ul.Positives.from_csr([0, 0], []).indices.shape == (1, 0)
    assert ul.Positives.from_csr([0, 0], [], length=2).indices.tolist() == [[-1, -1]]
    assert ul.Positives.from_csr([0, 1], np.array([200], "uint8"), length=2).indices.tolist() == [[200, -1]]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 2, 1], [0, 1]), ValueError, "Expected indptr: ascending positions from 0 to 2"),
        (([0, 3], [0, 1]), ValueError, "Expected indptr: ascending positions from 0 to 2"),
        (([], []), ValueError, "Expected indptr"),
        (([-1, 0], [0]), ValueError, "Expected indptr"),
        (([0, 1], [0.5]), TypeError, "Expected indices: one axis of integers. Received: float64"),
        (([[0, 1]], [0]), TypeError, "Expected indptr: one axis of integers"),
        (([0, 2], [0, 1], None, 1), ValueError, "Expected length: at least 2, the most labels of a row. Received: 1"),
    ],
)
def test_from_csr_refuses(arguments, error, text):
    *arguments, length = arguments if len(arguments) == 4 else (*arguments, None)
    with pytest.raises(error, match=pattern(text)):
        ul.Positives.from_csr(*arguments, length=length)
    with pytest.raises(IndexError):
        ul.Positives.from_csr([0, 1], [0], rows=[3])


# --- Blocks, memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("options", [{}, {"where": True, "pos_weight": 3.0}], ids=["plain", "options"])
@pytest.mark.parametrize("shape", [(64, 3000), (2, 32, 3000), (9, 12_345)], ids=str)
def test_in_blocks(name, options, shape, monkeypatch):
    backend = backend_named(name)
    module = __import__(f"unilabel.backends.{name}", fromlist=["blockwise"])
    monkeypatch.setattr(module, "blockwise", module.blockwise._replace(large=1000, block=5000))
    rng = np.random.default_rng(SEED)
    x, labels = rng.uniform(-6, 6, shape), rng.integers(-1, shape[-1], (*shape[:-1], 4))
    options = options | ({"where": rng.uniform(size=shape) < 0.7} if options else {})
    for wrong in (None, shape[-1]):
        z: Any = dense(labels, shape[-1]).astype("float64")
        if wrong is not None:
            labels[..., 7, 0], z[..., 7, :] = wrong, np.nan
        for reduction in REDUCTIONS:
            given = ul.Positives(backend.asarray(labels))
            got = ul.value_and_grad(ul.multilabel_logistic_loss)(
                backend.asarray(x), given, reduction=reduction, **options
            )
            monkeypatch.undo()
            right = ul.value_and_grad(ul.multilabel_logistic_loss)(x, z, reduction=reduction, **options)
            monkeypatch.setattr(module, "blockwise", module.blockwise._replace(large=1000, block=5000))
            for a, b in zip(got, right, strict=True):
                close(backend.to_numpy(a), b)


def test_no_targets_of_the_logits_shape_are_made():
    """Of 64 examples and 100,000 classes: a gradient is 25.6 MB, and so would targets be."""
    rng = np.random.default_rng(SEED)
    x, labels = rng.normal(size=(64, 100_000)).astype("float32"), rng.integers(0, 100_000, (64, 5))
    ul.value_and_grad(ul.multilabel_logistic_loss)(x, ul.Positives(labels))  # starts the threads
    tracemalloc.start()
    ul.value_and_grad(ul.multilabel_logistic_loss)(x, ul.Positives(labels))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        peak < x.nbytes + 32 * 4 * 100_000 * 2
    )  # the gradient, and a few blocks of two examples for each of two threads


# --- Modules and layers -----------------------------------------------------------------------------------------------


def test_modules_of_torch_take_them(request):
    asked_for("torch", request)
    import torch

    from unilabel.layers.torch import LinearMultilabelLogisticLoss, MultilabelLogisticLoss

    given, z = ul.Positives(torch.tensor(LABELS)), dense(LABELS)
    right = ul.multilabel_logistic_loss(LOGITS, z, pos_weight=2.0)
    close(MultilabelLogisticLoss(pos_weight=2.0)(torch.tensor(LOGITS), given), right)
    head, features = LinearMultilabelLogisticLoss(3, C).double(), torch.tensor(LOGITS[:, :3])
    close(head(features, given).detach(), head(features, torch.tensor(z)).detach())


def test_layers_of_keras_take_them(request):
    asked_for("tensorflow", request)
    import os

    os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported
    import keras

    from unilabel.layers.keras import LinearMultilabelLogisticLoss, MultilabelLogisticLoss

    right = ul.multilabel_logistic_loss(LOGITS, dense(LABELS))
    for loss, targets in (
        (MultilabelLogisticLoss(dtype="float64"), ul.Positives(LABELS)),
        (MultilabelLogisticLoss(dtype="float64"), ul.Positives(LABELS.tolist())),
        (MultilabelLogisticLoss(dtype="float64", positives=True), LABELS),
    ):
        close(loss(targets, LOGITS), right)
    features, labels = keras.Input((3,)), keras.Input((K,), dtype="int32")
    head = LinearMultilabelLogisticLoss(C)
    model = keras.Model([features, labels], head(features, ul.Positives(labels)))
    x = np.random.default_rng(SEED).normal(size=(N, 3)).astype("float32")
    got, right = model([x, LABELS]), head(x, dense(LABELS))
    np.testing.assert_allclose(got, right, rtol=1e-6)


# --- Compilers, transforms, data loaders ------------------------------------------------------------------------------


def test_compiled(recorder):
    labels = ul.Positives(recorder.integers(LABELS))
    for options, reduction in SOME[1:4]:
        options = options | {"reduction": reduction}

        def loss(x, options=options):
            return ul.multilabel_logistic_loss(x, labels, **options)

        value, gradient = compiled(recorder, loss)(recorder.array(LOGITS, "float64"))
        right = ul.value_and_grad(ul.multilabel_logistic_loss)(LOGITS, dense(LABELS), **options)
        close(recorder.numpy(value), right[0])
        close(recorder.numpy(gradient), right[1])


def test_jax_takes_them_as_a_tree(request):
    asked_for("jax", request)
    import jax

    x, labels = jax.numpy.asarray(LOGITS), ul.Positives(jax.numpy.asarray(LABELS))
    right, right_gradient = ul.value_and_grad(ul.multilabel_logistic_loss)(LOGITS, dense(LABELS))
    value, gradient = jax.jit(jax.value_and_grad(ul.multilabel_logistic_loss))(x, labels)
    close(value, right)
    close(gradient, right_gradient)
    close(jax.vmap(ul.multilabel_logistic_loss)(x, labels).mean(), right)
    hessian = jax.hessian(ul.multilabel_logistic_loss)(x[:1], ul.Positives(labels.indices[:1]))
    close(
        np.diagonal(np.asarray(hessian)[0, :, 0]),
        ul.grad_and_hess(ul.multilabel_logistic_loss)(LOGITS[:1], dense(LABELS[:1]))[1][0],
    )
    n, k, c = jax.export.symbolic_shape("n, k, c")
    shapes = jax.ShapeDtypeStruct((n, c), x.dtype), ul.Positives(jax.ShapeDtypeStruct((n, k), labels.indices.dtype))
    close(jax.export.export(jax.jit(ul.multilabel_logistic_loss))(*shapes).call(x, labels), right)


def test_torch_compiles_transforms_and_collates_them(request):
    asked_for("torch", request)
    import torch

    x, labels = torch.tensor(LOGITS), torch.tensor(LABELS)
    right, right_gradient = ul.value_and_grad(ul.multilabel_logistic_loss)(LOGITS, dense(LABELS))
    for dynamic in (False, True):
        torch._dynamo.reset()
        function = torch.compile(ul.multilabel_logistic_loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for n in (7, 5):
            close(function(x[:n], ul.Positives(labels[:n])), ul.multilabel_logistic_loss(LOGITS[:n], dense(LABELS[:n])))
    own = torch.func.grad(lambda x: ul.multilabel_logistic_loss(x, ul.Positives(labels)))
    close(own(x), right_gradient)
    each = torch.func.vmap(lambda x, row: ul.multilabel_logistic_loss(x, ul.Positives(row)))
    close(each(x, labels).mean(), right)

    examples = [(x[i], ul.Positives(labels[i])) for i in range(N)]
    ((batch, positives),) = torch.utils.data.DataLoader(examples, batch_size=N)
    assert type(positives) is ul.Positives
    close(ul.multilabel_logistic_loss(batch, positives), right)


def test_tensorflow_takes_unknown_lengths_and_ragged_labels(request):
    asked_for("tensorflow", request)
    import tensorflow as tf

    x, labels = tf.constant(LOGITS), tf.constant(LABELS)
    right = ul.multilabel_logistic_loss(LOGITS, dense(LABELS))
    ragged = tf.RaggedTensor.from_tensor(labels, padding=-1)
    unknown = tf.TensorSpec([None, None], tf.float64)
    for given, spec in (
        (labels, tf.TensorSpec([None, None], tf.int64)),
        (ragged, tf.RaggedTensorSpec([None, None], tf.int64)),
    ):
        close(ul.multilabel_logistic_loss(x, ul.Positives(given)), right)
        function = tf.function(ul.multilabel_logistic_loss, input_signature=[unknown, ul.Positives(spec)])
        close(function(x, ul.Positives(given)), right)
    rankless = [tf.TensorSpec(None, tf.float64), ul.Positives(tf.TensorSpec(None, tf.int64))]
    close(tf.function(ul.multilabel_logistic_loss, input_signature=rankless)(x, ul.Positives(labels)), right)
    wrong = tf.function(
        ul.multilabel_logistic_loss, input_signature=[unknown, ul.Positives(tf.TensorSpec([None, None], tf.int64))]
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        wrong(x, ul.Positives(labels[:3]))
    with pytest.raises(TypeError, match="RaggedTensor"):
        ul.multilabel_logistic_loss(x, ragged)
