"""Optax's own tests, as they are installed, with unilabel in the place of Optax's losses. All of them pass."""

import unittest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.losses import _classification, _classification_test

import unilabel as ul

# --- unilabel in Optax's words: JAX arrays come out, nothing is reduced, `where` may be one bool for an example -------


def unreduced(loss):
    def run(logits, labels, axis=-1, where=None):
        logits = jnp.asarray(logits)
        if where is not None and where.ndim < logits.ndim:
            where = jnp.expand_dims(where, axis)
        return loss(logits, labels, axis=axis, where=where, reduction="none")

    return run


nll = unreduced(ul.nll)


def kl_divergence(log_predictions, targets, axis=-1, where=None):
    """The cross-entropy less the entropy, which is the cross-entropy of the targets with themselves."""
    return nll(log_predictions, targets, axis, where) - nll(jnp.log(targets), targets, axis, where)


def kl_divergence_with_log_targets(log_predictions, log_targets, axis=-1, where=None):
    return kl_divergence(log_predictions, jnp.exp(log_targets), axis, where)


pytestmark = pytest.mark.full
LOSSES = {
    "sigmoid_binary_cross_entropy": unreduced(ul.multilabel_logistic_loss),
    "softmax_cross_entropy": unreduced(ul.softmax_nll),
    "safe_softmax_cross_entropy": unreduced(ul.softmax_nll),
    "softmax_cross_entropy_with_integer_labels": unreduced(ul.softmax_nll),
    "kl_divergence": kl_divergence,
    "kl_divergence_with_log_targets": kl_divergence_with_log_targets,
}

# --- The tests of these losses, and of those that Optax builds on them ------------------------------------------------

OWN = {
    "sigmoid_binary_cross_entropy": "SigmoidCrossEntropyTest",
    "softmax_cross_entropy": "SoftmaxCrossEntropyTest",
    "safe_softmax_cross_entropy": "SafeSoftmaxCrossEntropyTest",
    "softmax_cross_entropy_with_integer_labels": "SoftmaxCrossEntropyWithIntegerLabelsTest",
    "kl_divergence": "KLDivergenceTest",
    "kl_divergence_with_log_targets": "KLDivergenceWithLogTargetsTest",
}
BUILT_ON_THEM = ("SigmoidFocalLossTest", "PolyLossTest", "GeneralizedKLDivergenceTest")


CASES = {
    name: list(unittest.defaultTestLoader.loadTestsFromTestCase(getattr(_classification_test, name)))
    for name in (*OWN.values(), *BUILT_ON_THEM)
}
TESTS = [test for tests in CASES.values() for test in tests]


@pytest.fixture
def run(monkeypatch):
    """Runs a test of Optax with other losses in the place of its own; an exception is its failure."""
    random_state = np.random.get_state()
    np.random.seed(0)  # their draws are unseeded

    def run(test, losses):
        for name, loss in losses.items():
            monkeypatch.setattr(_classification, name, loss)
        with jax.enable_x64(False):  # JAX's default, and theirs
            test.debug()

    yield run
    np.random.set_state(random_state)


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.id().rpartition("_test.")[2])
def test_of_optax(test, run):
    run(test, LOSSES)


def test_none_is_missing():
    assert len(TESTS) >= 94  # of Optax 0.2.8; a later one may bring more


@pytest.mark.parametrize("name", OWN)
def test_they_notice_a_loss_that_is_one_percent_off(name, run):
    def off(*args, **options):
        return 1.01 * LOSSES[name](*args, **options)

    def run_all():
        for test in CASES[OWN[name]]:
            run(test, LOSSES | {name: off})

    with pytest.raises(AssertionError):
        run_all()
