"""Importing unilabel, or using it with one framework, imports no other."""

import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = {"jax", "jaxlib", "keras", "tensorflow", "torch"}
COMMAND = {"click", "mpmath", "rich"}
LOADED_LATER = {"unilabel.backends", "unilabel.conformance"}


def imported(statements: str, folder: Path) -> set[str]:
    """The names in sys.modules after the statements ran in a new process, in that folder."""
    report = "; import sys; print(*sys.modules, sep='\\n')"
    process = subprocess.run(
        [sys.executable, "-c", statements + report], cwd=folder, capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def test_import_brings_nothing_along(tmp_path):
    modules = imported("import unilabel", tmp_path)
    assert "unilabel.losses" in modules
    assert not modules & (FRAMEWORKS | COMMAND | LOADED_LATER)


def test_numpy_arrays_bring_no_other_framework(tmp_path):
    modules = imported("import numpy, unilabel; unilabel.softmax_nll(numpy.zeros((1, 2)), [0])", tmp_path)
    assert "unilabel.backends.numpy" in modules
    assert not modules & (FRAMEWORKS | COMMAND)


def test_an_eager_call_of_torch_needs_no_other_namespace(tmp_path):
    call = "unilabel.softmax_nll(torch.zeros((1, 2), requires_grad=True), torch.tensor([0])).backward()"
    modules = imported(f"import torch, unilabel; {call}", tmp_path)
    assert "unilabel.backends.torch" in modules
    assert "array_api_compat" not in modules


def test_the_check_sees_what_a_module_imports(tmp_path):
    (tmp_path / "stand_in.py").write_text("import unilabel\nimport mpmath\n")
    assert imported("import stand_in", tmp_path) & (FRAMEWORKS | COMMAND) == {"mpmath"}


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
