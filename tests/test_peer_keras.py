"""Keras' own tests, as they are installed, with unilabel in the place of Keras' losses, on TensorFlow.

And unilabel's Keras losses beside Keras' own: what they take and give, how they are saved and loaded. On TensorFlow,
and on the other Keras backends each in a process of its own.
"""

import os

os.environ["KERAS_BACKEND"] = os.environ.get("UNILABEL_TESTED_IN_KERAS_ON", "tensorflow")  # before Keras is imported

import copy
import json
import pickle
import re
import subprocess
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

import jax
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend import set_keras_mask
from keras.src.losses import losses, losses_test

import unilabel as ul
from unilabel.backend import backend_of
from unilabel.layers.keras import MultilabelLogisticLoss, SoftmaxNLL

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()

# --- unilabel in Keras' words: targets come first, indices as floats, nothing is reduced ------------------------------


def binary_crossentropy(y_true, y_pred, from_logits=False, label_smoothing=0.0, axis=-1):
    loss = ul.multilabel_logistic_loss if from_logits else ul.binary_cross_entropy
    return tf.reduce_mean(loss(y_pred, y_true, label_smoothing=label_smoothing, reduction="none"), axis)


def categorical_crossentropy(y_true, y_pred, from_logits=False, label_smoothing=0.0, axis=-1, ignore_index=None):
    options = {"label_smoothing": label_smoothing, "axis": axis, "ignore_index": ignore_index, "reduction": "none"}
    if from_logits:
        return ul.softmax_nll(y_pred, y_true, **options)
    return ul.cross_entropy(y_pred / tf.reduce_sum(y_pred, axis, keepdims=True), y_true, **options)


def sparse_categorical_crossentropy(y_true, y_pred, from_logits=False, ignore_class=None, axis=-1):
    indices, y_pred = tf.cast(y_true, tf.int64), tf.convert_to_tensor(y_pred)
    if len(indices.shape) == len(y_pred.shape):
        indices = tf.squeeze(indices, axis)
    return categorical_crossentropy(indices, y_pred, from_logits, axis=axis, ignore_index=ignore_class)


LOSSES = {
    "binary_crossentropy": binary_crossentropy,
    "categorical_crossentropy": categorical_crossentropy,
    "sparse_categorical_crossentropy": sparse_categorical_crossentropy,
}

# --- Their tests ------------------------------------------------------------------------------------------------------

OWN = {
    "binary_crossentropy": "BinaryCrossentropyTest",
    "categorical_crossentropy": "CategoricalCrossentropyTest",
    "sparse_categorical_crossentropy": "SparseCategoricalCrossentropyTest",
}
SAME_SHAPE = "must have the same shape"  # so Keras says; unilabel says it in its own words
# What cannot pass, and how it fails
DEVIATIONS = {
    "BinaryCrossentropyTest.test_shape_mismatch": f'"{SAME_SHAPE}" does not match "Expected targets',
    "CategoricalCrossentropyTest.test_shape_mismatch": f'"{SAME_SHAPE}" does not match "Expected targets',
    "SparseCategoricalCrossentropyTest.test_binary_segmentation_different_axis": "DID NOT RAISE ValueError",
    "SparseCategoricalCrossentropyTest.test_multi_class_segmentation_different_axis": "DID NOT RAISE ValueError",
}


CASES = {
    name: list(unittest.defaultTestLoader.loadTestsFromTestCase(getattr(losses_test, name))) for name in OWN.values()
}
TESTS = {test.id().rpartition("_test.")[2]: test for tests in CASES.values() for test in tests}


@pytest.fixture
def run(monkeypatch):
    """Runs a test of Keras with other losses in the place of its own; an exception is its failure."""
    assert keras.backend.backend() == "tensorflow"

    def run(test, functions):
        for name, function in functions.items():
            monkeypatch.setattr(losses, name, function)
        test.debug()

    return run


@pytest.mark.parametrize("name", [name for name in TESTS if name not in DEVIATIONS])
def test_of_keras(name, run):
    run(TESTS[name], LOSSES)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviation(name, run):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=re.escape(DEVIATIONS[name])):
        run(TESTS[name], LOSSES)
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", [name for name in DEVIATIONS if name.endswith("different_axis")])
def test_any_axis_is_right_here(name, run, monkeypatch):
    """Keras expects a refusal on TensorFlow, and values on PyTorch: unilabel gives these values on TensorFlow."""
    monkeypatch.setattr(losses_test, "backend", SimpleNamespace(backend=lambda: "torch"))
    run(TESTS[name], LOSSES)


def test_none_is_missing():
    assert len(TESTS) >= 32  # of Keras 3.15.1; a later one may bring more


@pytest.mark.parametrize("name", OWN)
def test_they_notice_a_loss_that_is_one_percent_off(name, run):
    def off(*args, **options):
        return 1.01 * LOSSES[name](*args, **options)

    def run_all():
        for test in CASES[OWN[name]]:
            run(test, LOSSES | {name: off})

    with pytest.raises(AssertionError):
        run_all()


# --- unilabel's Keras losses beside Keras' own ------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5, 3))
Y = np.array([[0, -1, 2, 1, -1], [1, 1, -1, 0, 2], [2, 2, 2, 2, -1], [-1] * 5])
Z = RNG.integers(0, 2, X.shape)
WEIGHTS, MASK = RNG.uniform(0.5, 2, Y.shape), np.arange(20).reshape(Y.shape) % 3 > 0
REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none", None)

# Ours; Keras' own; targets; how many times Keras' own ours is
PAIRS = {
    "binary": (MultilabelLogisticLoss, keras.losses.BinaryCrossentropy, Z, 3),
    "categorical": (SoftmaxNLL, keras.losses.CategoricalCrossentropy, np.eye(3)[Y], 1),
    "sparse": (SoftmaxNLL, keras.losses.SparseCategoricalCrossentropy, np.abs(Y), 1),
}


def tensor(data, dtype=None):
    return keras.ops.convert_to_tensor(data, dtype=dtype)


def numbers(result):
    return backend_of(result).to_numpy(result)


def same(ours, keras_own, times=1):
    """Equal, but for Keras' own sums: on PyTorch and JAX it reduces float64 in float32."""
    assert ours.shape == keras_own.shape
    np.testing.assert_allclose(numbers(ours), times * numbers(keras_own), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_object_calls(name, reduction):
    """By position and by name; lists, arrays and tensors, of any dtype."""
    ours, keras_own, targets, times = PAIRS[name]
    ours, keras_own = ours(reduction=reduction, dtype="float64"), keras_own(True, reduction=reduction, dtype="float64")
    for weights in (None, WEIGHTS):
        right = keras_own(targets, X, weights)
        same(ours(targets, X, weights), right, times)
        same(ours(y_true=targets, y_pred=X, sample_weight=weights), right, times)
    right = keras_own(targets, X, WEIGHTS)
    for given in (targets.tolist(), tensor(targets), [tensor(row) for row in targets], targets.astype("float32")):
        for logits in (X.tolist(), tensor(X, "float64"), [tensor(row, "float64") for row in X]):
            same(ours(given, logits, WEIGHTS.tolist()), right, times)
    for dtype in ("int8", "uint8", "int32", "uint64", "bool" if name == "binary" else "uint16"):
        same(ours(targets.astype(dtype), X, WEIGHTS), right, times)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_object_divides_by_the_labelled(reduction):
    """As `ignore_class` of Keras' own: sample weights, masks and a batch without a label included."""
    options = {"reduction": reduction, "dtype": "float64"}
    ours, keras_own = (
        SoftmaxNLL(ignore_index=-1, **options),
        keras.losses.SparseCategoricalCrossentropy(True, -1, **options),
    )
    for rows in (slice(None), slice(0, 1), slice(3, 4)):  # the last has no label: 0
        for weights in (None, WEIGHTS[rows]):
            for mask in (None, MASK[rows]):
                x = tensor(X[rows], "float64")
                set_keras_mask(x, None if mask is None else tensor(mask))
                for y in (Y[rows], Y[rows, :, None], Y[rows].astype("float32"), Y[rows].tolist()):
                    result = ours(y, x, weights)
                    same(result, keras_own(np.array(y), x, weights))
                    assert rows != slice(3, 4) or not numbers(result).any()
    unsigned = np.abs(Y).astype("uint8")  # which cannot hold -1
    same(ours(unsigned, X), keras_own(unsigned.astype("int64"), X))


def test_object_fits_as_ignore_class():
    """In a compiled training step."""
    history = []
    for loss in (SoftmaxNLL(ignore_index=-1), keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-1)):
        model = keras.Sequential([keras.layers.Input((5, 3)), keras.layers.Dense(3, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.1), loss=loss)
        how = {"sample_weight": WEIGHTS, "batch_size": 3, "epochs": 3, "shuffle": False, "verbose": 0}
        history.append(model.fit(X, Y, **how).history["loss"])
    np.testing.assert_allclose(*history, rtol=1e-5)


def test_object_class_indices_above_two_to_the_24th():
    classes, index = 2**24 + 3, 2**24 + 1  # which float32 does not have
    logits = np.zeros((1, classes), "float32")
    logits[0, index] = 10
    right = np.log(classes - 1 + np.exp(10.0)) - 10
    for y in ([index], np.array([index]), np.array([[index]], "uint32"), tensor([index])):
        np.testing.assert_allclose(numbers(SoftmaxNLL()(y, logits)), right, rtol=1e-6)
    model = keras.Sequential([keras.layers.Input((classes,)), keras.layers.Activation("linear")])
    model.compile(loss=SoftmaxNLL())
    np.testing.assert_allclose(model.evaluate(logits, np.array([index]), verbose=0), right, rtol=1e-6)


def test_object_class_indices_above_two_to_the_32nd():
    """Where integers have 32 bits, as on JAX, they must not become classes."""
    loss, logits = SoftmaxNLL(reduction=None, ignore_index=-1), np.zeros((3, 4), "float32")
    with jax.enable_x64(False):  # JAX's default
        for index in (2**32, 2**32 + 1, 2**31, 2**31 - 1, -(2**31), 2**33 - 1, 2**63 - 1):
            for dtype in ("int64", "uint64") if index > 0 else ("int64",):
                y = np.array([index, 0, -1 if dtype == "int64" else 3], dtype)
                right = [np.nan, np.log(4), 0 if dtype == "int64" else np.log(4)]
                np.testing.assert_allclose(numbers(loss(y, logits)), right, rtol=1e-6)
        np.testing.assert_allclose(numbers(loss([2**32, 0, -1], logits)), [np.nan, np.log(4), 0], rtol=1e-6)


@pytest.mark.parametrize(("targets", "logits"), [([0, 1, 1], [[0.3], [0.4], [-1]]), ([[0], [1], [1]], [0.3, 0.4, -1])])
def test_object_of_a_binary_model(targets, logits):
    """N examples of one class, whichever of the two has the class axis."""
    options = {"reduction": "none", "dtype": "float64"}
    right = keras.losses.BinaryCrossentropy(True, **options)(np.array(targets), np.array(logits))
    same(MultilabelLogisticLoss(**options)(targets, logits), right)


@pytest.mark.parametrize("axis", [1, -2, (1,), (1, 2), [2, 1]])
def test_object_class_axes(axis):
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    last = np.moveaxis(X, axes, range(-len(axes), 0))
    last = last.reshape(*last.shape[: -len(axes)], -1)
    indices = RNG.integers(0, last.shape[-1], last.shape[:-1])
    options = {"reduction": "none", "dtype": "float64"}
    right = keras.losses.SparseCategoricalCrossentropy(True, **options)(indices, last)
    ours = SoftmaxNLL(axis=axis, **options)
    for y in (indices, np.expand_dims(indices, axes)):
        same(ours(y, X), right)
    right = keras.ops.sum(keras.ops.convert_to_tensor(np.logaddexp(0, X) - X * Z), tuple(axes))
    same(MultilabelLogisticLoss(axis=axis, **options)(Z, X), right)


# What is given; how it reads
OPTIONS = {
    "weight": [
        ([0.5, 1, 2], [0.5, 1, 2]),
        (np.array([1, 2, 3]), [1, 2, 3]),
        (tensor([0.5, 1, 2]), [0.5, 1, 2]),
        (tensor([0.5, 1, 2], "bfloat16"), [0.5, 1, 2]),
        (keras.Variable([0.5, 1, 2]).value, [0.5, 1, 2]),  # on PyTorch it requires a gradient
        (None, None),
    ],
    "label_smoothing": [(0, 0), (np.float64(0.1), 0.1), (1, 1)],
    "axis": [(1, 1), ((1,), (1,)), ((1, 2), (1, 2)), ([1, -1], (1, -1)), (np.int64(1), 1)],
    "reduction": [(reduction, reduction) for reduction in REDUCTIONS],
    "name": [("mine", "mine")],
    "dtype": [("float64", "float64"), (keras.DTypePolicy("float64"), "float64"), (None, "float32")],
}
ONLY = {
    MultilabelLogisticLoss: {"pos_weight": [(tensor([[0.5, 1, 2]]), [[0.5, 1, 2]]), (np.float32(2), 2)]},
    SoftmaxNLL: {"ignore_index": [(-1, -1), (np.int32(255), 255), (None, None)]},
}
ROWS = [
    (kind, option, given, read)
    for kind, only in ONLY.items()
    for option, rows in (OPTIONS | only).items()
    for given, read in rows
]
COMMON = ("name", "reduction", "dtype")  # to Keras' own losses as well


@pytest.mark.parametrize(("kind", "option", "given", "read"), ROWS)
def test_object_options(kind, option, given, read):
    """Each is an attribute and in the config, from which the same loss comes, through JSON too."""
    loss, config = kind(**{option: given}), kind().get_config()
    assert getattr(loss, option) == read
    assert loss.get_config() == config | {option: read}
    if option in COMMON:
        keras_own = keras.losses.SparseCategoricalCrossentropy(**{option: given})
        assert getattr(keras_own, option) == read
        assert option == "dtype" or keras_own.get_config()[option] == read
    for again in (
        kind.from_config(loss.get_config()),
        kind.from_config(json.loads(json.dumps(loss.get_config()))),
        keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))),
        keras.losses.deserialize(keras.losses.serialize(loss)),
    ):
        assert type(again) is kind
        assert again.get_config() == loss.get_config()
    if option != "dtype":  # Keras' dtype is for reading only
        later = kind()
        setattr(later, option, given)
        assert later.get_config() == loss.get_config()


def test_object_options_act_when_set():
    loss = SoftmaxNLL(dtype="float64")
    loss.label_smoothing, loss.reduction = 0.1, "sum"
    right = keras.losses.CategoricalCrossentropy(True, 0.1, reduction="sum", dtype="float64")(np.eye(3)[Y], X)
    same(loss(np.eye(3)[Y], X), right)
    with pytest.raises(ValueError, match=re.escape("Expected label_smoothing: a number from 0 to 1.0. Received: 2.")):
        loss.label_smoothing = 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"label_smoothing": 2}, ValueError, "Expected label_smoothing: a number from 0 to 1.0. Received: 2."),
        ({"label_smoothing": "0.1"}, ValueError, "Expected label_smoothing: a number from 0 to 1.0. Received: '0.1'."),
        ({"axis": "x"}, TypeError, "Expected axis: an integer or a tuple of integers. Received: 'x'."),
        ({"axis": 1.0}, TypeError, "Expected axis: an integer or a tuple of integers. Received: 1.0."),
        ({"axis": (1, 1)}, ValueError, "Expected axis: an axis, or a tuple of distinct ones. Received: (1, 1)."),
        ({"axis": []}, ValueError, "Expected axis: an axis, or a tuple of distinct ones. Received: ()."),
        ({"weight": [[1], [1, 2]]}, TypeError, "Expected weight: an array. Received: a list that NumPy cannot convert"),
        ({"weight": [1j]}, TypeError, "Expected weight: dtype int8, "),
        ({"ignore_index": 1.5}, TypeError, "Expected ignore_index: an integer. Received: 1.5."),
        ({"ignore_index": 2**31}, ValueError, "Expected ignore_index: an integer between -2**31 and 2**31 - 1, "),
        ({"dtype": "bfloat16"}, ValueError, "Expected dtype 'float32' or 'float64', for half precision too."),
        ({"reduction": "batchmean"}, ValueError, "Invalid value for argument `reduction`."),
        ({"dtype": "x"}, ValueError, "Cannot convert 'x' to a mixed precision DTypePolicy."),
        ({"from_logits": True}, TypeError, "unexpected keyword argument 'from_logits'"),
    ],
)
def test_object_refuses_wrong_options(options, error, text):
    """When it is made; in Keras' words where Keras' own loss refuses them."""
    with pytest.raises(error, match=re.escape(text)):
        SoftmaxNLL(**options)
    if text.startswith(("Invalid", "Cannot")):
        with pytest.raises(error, match=re.escape(text)):
            keras.losses.SparseCategoricalCrossentropy(**options)


def test_object_refuses_an_axis_that_the_logits_do_not_have():
    for loss, targets in ((SoftmaxNLL(axis=5), Y), (SoftmaxNLL(axis=5), Z), (MultilabelLogisticLoss(axis=5), Z)):
        with pytest.raises(ValueError, match=r"Expected axis: one of the logits' axes, -3 to 2.* Received: 5"):
            loss(targets, X)


# What saves or copies a loss and gives it back
RETURNS = {
    "copy": lambda loss, path: copy.copy(loss),
    "deepcopy": lambda loss, path: copy.deepcopy(loss),
    "pickle": lambda loss, path: pickle.loads(pickle.dumps(loss)),
    "model.keras": lambda loss, path: through(loss, path),
    "model.h5": lambda loss, path: through(loss, path),
}
LOADED = [
    keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, name="theirs"),
    SoftmaxNLL(weight=[0.5, 1.0, 2.0], ignore_index=-1, axis=(2,), label_smoothing=0.1, reduction="sum", name="mine"),
    MultilabelLogisticLoss(pos_weight=np.array([[0.5, 1.0, 2.0]]), axis=(1, 2), reduction=None),
]


def through(loss, path):
    model = keras.Sequential([keras.layers.Input((5, 3)), keras.layers.Dense(3)])
    model.compile("sgd", loss)
    model.save(path)
    return keras.saving.load_model(path).loss


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own, on PyTorch
@pytest.mark.parametrize("way", RETURNS)
@pytest.mark.parametrize("loss", LOADED, ids=["keras", "softmax", "multilabel"])
def test_object_comes_back(loss, way, tmp_path):
    again = RETURNS[way](loss, tmp_path / way)
    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()
    targets = Z if type(loss) is MultilabelLogisticLoss else Y
    np.testing.assert_array_equal(numbers(again(targets, X)), numbers(loss(targets, X)))


LOAD = """
import sys
import keras

path, module = sys.argv[1:]
keras.saving.load_model(path, compile=False)
try:
    keras.saving.load_model(path)
except TypeError as error:
    assert f"'module': '{module}'" in str(error), error
else:
    raise AssertionError("it knew the class")
__import__(module)
print(keras.saving.load_model(path).loss.get_config())
"""


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own, on PyTorch
def test_object_in_a_fresh_process(tmp_path):
    """The error names the module to import, as the docstring does; without the loss nothing is needed."""
    path, loss = tmp_path / "model.keras", LOADED[1]
    through(loss, path)
    module = SoftmaxNLL.__module__
    assert f"`import {module}` before `keras.saving.load_model`" in " ".join(sys.modules[module].__doc__.split())
    done = subprocess.run([sys.executable, "-c", LOAD, path, module], capture_output=True, text=True)
    assert done.stdout == f"{loss.get_config()}\n", done.stderr


@pytest.mark.full
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_on_other_keras_backends(backend):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_object", __file__]
    environment = os.environ | {"UNILABEL_TESTED_IN_KERAS_ON": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
