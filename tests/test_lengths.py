"""Lengths of axes that are known, left open, or unknown before a call runs."""

import numpy as np
import pytest
from shared import close

import unilabel as ul
from unilabel.lengths import count, product, same
from unilabel.namespace import Extended


def test_unknown_lengths_fit_any():
    assert same((2, 3), (2, 3))
    assert same((None, 3), (2, None))
    assert not same((2, 3), (2, 4))
    assert not same((2, 3), (2, 3, 1))
    assert product((2, 3)) == 6
    assert product(()) == 1
    assert product((2, None)) is None


def test_count_is_a_divisor():
    """So it is 1 for no elements."""
    x = np.zeros((4, 0, 3))
    assert count(Extended(np), x, (0, 2)) == 12
    assert count(Extended(np), x, (0, 1)) == 1
    assert count(Extended(np), x, ()) == 1


def test_unknown_batch_size_under_tf_function():
    import tensorflow as tf

    spec = [tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 3], tf.float32)]

    @tf.function(input_signature=spec)
    def run(x, y, z):
        return ul.softmax_nll(x, y), ul.multilabel_logistic_loss(x, z), ul.softmax_nll(tf.transpose(x), y[:3], axis=0)

    x = np.random.default_rng(0).normal(size=(3, 3)).astype("float32")
    for result, expected in zip(
        run(x, np.array([0, 2, 1], "int32"), np.eye(3, dtype="float32")),
        (
            ul.softmax_nll(x, [0, 2, 1]),
            ul.multilabel_logistic_loss(x, np.eye(3)),
            ul.softmax_nll(x.T, [0, 2, 1], axis=0),
        ),
        strict=True,
    ):
        close(result.numpy(), expected)


def test_shapes_that_do_not_fit_when_it_runs():
    """Lengths that TensorFlow knows only then: an error, never a silent broadcast."""
    import tensorflow as tf

    pairs = tf.TensorSpec([None, 3]), tf.TensorSpec([None, 3])
    rows = tf.TensorSpec([None, 3]), tf.TensorSpec([None], tf.int64)
    x, z, y = np.ones((4, 3), "float32"), np.ones((1, 3), "float32"), np.ones(1, "int64")
    for jit in (False, True):
        for loss, signature, targets in ((ul.multilabel_logistic_loss, pairs, z), (ul.softmax_nll, rows, y)):
            with pytest.raises(tf.errors.InvalidArgumentError):
                tf.function(loss, input_signature=signature, jit_compile=jit)(x, targets)


def test_no_targets_for_logits_of_unknown_rank():
    import tensorflow as tf

    for loss in (ul.softmax_nll, ul.multilabel_logistic_loss):
        with pytest.raises(TypeError, match=r"Expected targets: an array. Received: None"):
            tf.function(lambda x, loss=loss: loss(x, None), input_signature=[tf.TensorSpec(None)])(
                np.zeros((2, 3), "f4")
            )


def test_nothing_known_but_the_rank():
    import tensorflow as tf

    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32"), np.array([[0, 2, 1, 1], [2, 2, 0, 1]])
    free = tf.TensorSpec([None] * 3), tf.TensorSpec([None] * 2, tf.int64)
    run = tf.function(lambda x, y: ul.softmax_nll(x, y, label_smoothing=0.1, axis=2), input_signature=free)
    close(run(x, y).numpy(), ul.softmax_nll(x, y, label_smoothing=0.1))
    run = tf.function(lambda x: ul.softmax(x, axis=(0, 2)), input_signature=free[:1])
    close(run(x).numpy(), ul.softmax(x, axis=(0, 2)))
