"""Marks for compilers: those that the frameworks' own decorators set, and what they are for."""

import subprocess
import sys

import pytest

import unilabel as ul
from unilabel.compilers import as_it_is_in_autograph, constant_in_dynamo


def test_marks_are_those_of_the_decorators():
    import tensorflow as tf
    import torch

    def ours():
        return 1

    def theirs():
        return 1

    assert vars(constant_in_dynamo(ours)) == vars(torch.compiler.assume_constant_result(theirs))
    for marked in (as_it_is_in_autograph(ours), tf.autograph.experimental.do_not_convert(theirs)):
        assert "autograph_info__" in vars(marked)


def test_every_public_function_is_left_as_it_is():
    for name in ul.__all__:
        assert hasattr(getattr(ul, name), "autograph_info__")


@pytest.mark.full
def test_autograph_leaves_unilabel_alone(tmp_path):
    """The first call of a loss inside tf.function: AutoGraph would rewrite the import system below it, and warn."""
    code = """
import tensorflow as tf, unilabel as ul
@tf.function
def step(x):
    gradient = ul.value_and_grad(ul.softmax_nll)(x, [0])[1]
    return ul.softmax_nll(x, [0]) + ul.multilabel_logistic_loss(ul.sigmoid(x), [[0, 1]]) + tf.reduce_sum(gradient)
step(tf.constant([[1.0, 2.0]]))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "AutoGraph" not in process.stderr
