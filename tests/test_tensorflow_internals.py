"""TensorFlow's private names: the right numbers without each of them."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from crossed import close
from unilabel.backends import tensorflow as backend
from unilabel.backends.tensorflow_internals import Internals, find

import unilabel as ul


def names():
    """All that are looked up, as the file itself does it."""
    seen = []
    Internals(lambda name: seen.append(name) or find(name))
    return seen


def test_names_are_there():
    """Of this version of TensorFlow, so that nothing is slower than it need be. One that is gone is to be replaced."""
    assert len(names()) > 1
    assert [name for name in names() if find(name) is None] == []


def test_no_other_file_has_private_names():
    assert "tensorflow.python" not in Path(backend.__file__).read_text()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("missing", ["all", *(pytest.param(name, marks=pytest.mark.full) for name in names())])
@pytest.mark.parametrize("sample", ["softmax_nll", "multilabel_logistic_loss"], indirect=True)
def test_without_a_name(missing, sample, compiled, monkeypatch):
    without = Internals(lambda name: None if missing in (name, "all") else find(name))
    monkeypatch.setattr(backend, "internals", without)
    monkeypatch.setattr(backend, "_programs", {})
    x, cotangent = tf.constant(sample.x), tf.constant(sample.cotangent)
    targets = tf.constant(sample.targets)

    def loss(x):
        return sample(x, targets)

    def derivatives(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(x)
                value = loss(x)
                total = tf.reduce_sum(value)
            gradient = tape.gradient(total, x)
            closed = sample.closed(ul.value_and_grad)(x, targets)  # on the tapes' watch, too
        hessian = outer.jacobian(gradient, x)
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            pushed = accumulator.jvp(loss(x))
        return value, tape.gradient(value, x, cotangent), gradient, hessian, pushed, *closed, loss(x)

    step = tf.function(derivatives, autograph=False) if compiled else derivatives
    for _ in range(1 if compiled else 5):  # the fourth of equal eager calls is compiled
        value, pulled, gradient, hessian, pushed, closed_value, closed_gradient, again = step(x)
        for got, right in ((value, sample.value), (again, sample.value), (closed_value, sample.value)):
            close(got, right)
        close(pulled, sample.pulled_back)
        for got in (gradient, closed_gradient):
            close(got, sample.gradient)
        sample.check_hessian(hessian)
        np.testing.assert_allclose(np.sum(pushed), np.sum(sample.gradient), rtol=1e-13, atol=1e-14)
