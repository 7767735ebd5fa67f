"""Keras' own tests, as they are installed, with unilabel in the place of Keras' losses, on TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported

import re
import unittest
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest
import tensorflow as tf
from keras.src.losses import losses, losses_test

import unilabel as ul

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
