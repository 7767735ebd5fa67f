"""Sparse arrays and matrices as targets: what their dense form gives, on every framework."""

import warnings

import numpy as np
import pytest
import scipy.sparse
from shared import asked_for, pattern

import unilabel as ul
from unilabel.backend import backend_named

SEED = 20261128
N, C = 6, 9
RNG = np.random.default_rng(SEED)
LOGITS, KEEP, WEIGHT = RNG.uniform(-6, 6, (N, C)), RNG.uniform(size=(N, C)) < 0.7, RNG.uniform(0.5, 2, C)
SOFT = np.where(RNG.uniform(size=(N, C)) < 0.3, RNG.uniform(size=(N, C)), 0.0)
SOFT[2], SOFT[4, 3], SOFT[4, 5] = 0.0, 0.5, 0.0  # a row with nothing in it; and see `coordinates`
DENSE = {"soft": SOFT, "float": 1.0 * (SOFT > 0), "int": 1 * (SOFT > 0), "bool": SOFT > 0, "empty": 0 * SOFT}


def coordinates(z):
    """Rows, columns and values in no order, with a 0 that is there and, of soft labels, one that is there twice."""
    row, column = np.nonzero(z)
    value = z[row, column]
    row, column, value = np.append(row, 4), np.append(column, 5), np.append(value, value.dtype.type(0))
    if ((z > 0) & (z < 1)).any():
        value[(row == 4) & (column == 3)] = 0.25
        row, column, value = np.append(row, 4), np.append(column, 3), np.append(value, 0.25)
    order = np.random.default_rng(SEED).permutation(len(row))
    return row[order], column[order], value[order]


def of_scipy(z):
    row, column, value = coordinates(z)
    kinds = ("coo_array", "csr_array", "csc_array", "coo_matrix", "csr_matrix", "csc_matrix")
    return [getattr(scipy.sparse, kind)((value, (row, column)), shape=z.shape) for kind in kinds]


def of_torch(z):
    import torch

    row, column, value = coordinates(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is in beta, and that invariants are not checked
        coo = torch.sparse_coo_tensor(np.stack([row, column]), torch.tensor(value), z.shape)
        return [coo, torch.tensor(z).to_sparse_csr(), torch.tensor(z).to_sparse_csc()]


def of_jax(z):
    import jax.numpy as jnp
    from jax.experimental import sparse

    row, column, value = coordinates(z)
    coo = sparse.BCOO((jnp.asarray(value), jnp.asarray(np.stack([row, column], axis=1))), shape=z.shape)
    x = jnp.asarray(z)
    return [coo, sparse.BCOO.fromdense(x, nse=50), sparse.BCOO.fromdense(x, n_batch=1), sparse.BCSR.fromdense(x)]


def of_tensorflow(z):
    import tensorflow as tf

    row, column, value = coordinates(z)
    return [tf.SparseTensor(np.stack([row, column], axis=1), value, z.shape)]


def close(got, right):
    np.testing.assert_allclose(got, right, rtol=1e-12, atol=1e-14)


def same_as_dense(framework, matrix, z, **options):
    array = framework.array(LOGITS, "float64")
    got = ul.value_and_grad(ul.multilabel_logistic_loss)(array, matrix, **options)
    right = ul.value_and_grad(ul.multilabel_logistic_loss)(LOGITS, z, **options)
    for a, b in zip(got, right, strict=True):
        close(framework.numpy(a), b)


@pytest.mark.parametrize("kind", DENSE)
def test_matrices_of_scipy(framework, kind):
    matrices = of_scipy(DENSE[kind])
    for matrix in matrices if framework.name in ("numpy", "torch") else matrices[:1]:
        same_as_dense(framework, matrix, DENSE[kind], where=KEEP, label_smoothing=0.1)
        same_as_dense(framework, matrix, DENSE[kind], reduction="none")
    features, weight = np.random.default_rng(SEED).uniform(-2, 2, (N, 2)), np.linspace(-1, 1, 2 * C).reshape(C, 2)
    right = ul.linear_multilabel_logistic_loss(features, weight, DENSE[kind])
    arrays = framework.array(features, "float64"), framework.array(weight, "float64")
    close(framework.numpy(ul.linear_multilabel_logistic_loss(*arrays, matrices[0], validate=True)), right)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
def test_arrays_of_the_framework(name, kind, request):
    from conftest import Framework

    asked_for(name, request)
    for array in globals()[f"of_{name}"](DENSE[kind]):
        same_as_dense(Framework(name), array, DENSE[kind], pos_weight=WEIGHT)


def test_of_one_and_of_three_dimensions():
    z = np.zeros((2, 3, 5))
    z[0, 1, 2] = z[1, 2, 4] = z[1, 2, 0] = 1
    x = np.random.default_rng(SEED).normal(size=z.shape)
    close(ul.multilabel_logistic_loss(x, scipy.sparse.coo_array(z)), ul.multilabel_logistic_loss(x, z))
    close(
        ul.multilabel_logistic_loss(x[1, 2], scipy.sparse.coo_array(z[1, 2])),
        ul.multilabel_logistic_loss(x[1, 2], z[1, 2]),
    )


def test_a_matrix_is_left_as_it_is():
    matrix = of_scipy(SOFT)[1]
    before = matrix.copy()
    ul.multilabel_logistic_loss(LOGITS, matrix)
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(matrix, name), getattr(before, name))


def test_gradients_of_values(request):
    """dL/dz = log(1 - σ(x)) - log σ(x) = -x, whatever pads the shorter rows."""
    row, column = np.nonzero(SOFT)
    wanted = request.config.getoption("--backend") or ("torch", "tensorflow")
    if "torch" in wanted:
        import torch

        values = torch.tensor(SOFT[row, column], requires_grad=True)
        matrix = torch.sparse_coo_tensor(np.stack([row, column]), values, SOFT.shape, check_invariants=True)
        ul.multilabel_logistic_loss(torch.tensor(LOGITS), matrix, reduction="sum").backward()
        close(values.grad, -LOGITS[row, column])
    if "tensorflow" in wanted:
        import tensorflow as tf

        values = tf.constant(SOFT[row, column])
        with tf.GradientTape() as tape:
            tape.watch(values)
            matrix = tf.SparseTensor(np.stack([row, column], axis=1), values, SOFT.shape)
            loss = ul.multilabel_logistic_loss(tf.constant(LOGITS), matrix, reduction="sum")
        close(tf.convert_to_tensor(tape.gradient(loss, values)), -LOGITS[row, column])


def test_in_a_function_of_tensorflow(request):
    asked_for("tensorflow", request)
    import tensorflow as tf

    spec = tf.TensorSpec([None, None], tf.float64), tf.SparseTensorSpec([None, None], tf.float64)
    function = tf.function(ul.multilabel_logistic_loss, input_signature=spec)
    close(function(LOGITS, of_tensorflow(SOFT)[0]), ul.multilabel_logistic_loss(LOGITS, SOFT))
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(LOGITS, tf.sparse.from_dense(SOFT[:3]))
    with pytest.raises(Exception, match=r"XLA_takes_unilabel\.Positives"):
        tf.function(ul.multilabel_logistic_loss, jit_compile=True)(LOGITS, of_tensorflow(SOFT)[0])


def test_what_compilers_do_not_take(request):
    asked_for("jax", request)
    import jax

    with pytest.raises(TypeError, match=pattern("Expected targets: unilabel.Positives, which transforms take.")):
        jax.jit(ul.multilabel_logistic_loss)(LOGITS, of_jax(SOFT)[0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a[:3], ValueError, "Expected targets: the shape of the logits, (6, 9). Received: shape (3, 9)"),
        (lambda a: a.T, ValueError, "Expected targets: the shape of the logits, (6, 9). Received: shape (9, 6)"),
        (ul.Positives, TypeError, "Expected targets: Positives of indices, or a sparse array as it is."),
        (lambda a: a * 2.0, ValueError, "Expected targets: values from 0 to 1. Received:"),
    ],
)
def test_what_is_refused(framework, change, error, text):
    with pytest.raises(error, match=pattern(text)):
        ul.multilabel_logistic_loss(framework.array(LOGITS), change(of_scipy(SOFT + (SOFT > 0))[1]), validate=True)


def test_where_they_do_not_belong(framework):
    matrix, x = of_scipy(SOFT)[1], framework.array(LOGITS)
    with pytest.raises(TypeError, match=pattern("exclude each other. Received: a sparse array, for which there are")):
        ul.softmax_nll(x, matrix)
    with pytest.raises(ValueError, match=pattern("Expected axis: -1 for sparse targets (Positives take any axis)")):
        ul.multilabel_logistic_loss(x, matrix, axis=0)
    with pytest.raises(TypeError, match="Expected weight"):
        ul.multilabel_logistic_loss(x, SOFT, weight=matrix)


def test_nobody_else_s_array_is_taken_for_sparse():
    assert backend_named("numpy").sparse(LOGITS) is None
