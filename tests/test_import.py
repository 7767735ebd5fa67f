"""Importing unilabel, or using it with one framework, imports no other."""

import importlib
import pydoc
import subprocess
import sys
from pathlib import Path

import unilabel

FRAMEWORKS = {"jax", "jaxlib", "keras", "tensorflow", "torch"}
COMMAND = {"click", "mpmath", "rich"}
LOADED_LATER = {"unilabel.backends", "unilabel.conformance", "inspect", "numpy"}


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


def test_completion_shows_public_names_only():
    importlib.import_module("unilabel.layers")
    assert set(dir(unilabel)) == {*unilabel.__all__, "__version__", "layers"}


def test_help_shows_the_functions():
    page = pydoc.plain(pydoc.render_doc(unilabel))
    missing = [name for name in unilabel.__all__ if f"    {name}(" not in page and f"    class {name}(" not in page]
    assert not missing
