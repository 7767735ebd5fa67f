"""Every example in a docstring and in README.md runs, and prints what is written below it."""

import doctest
import importlib
import re
from pathlib import Path

import jax
import pytest

PACKAGES = ("unilabel", "unilabel.formulas", "unilabel.layers", "unilabel.backends", "unilabel.conformance")
README = (Path(__file__).parent.parent / "README.md").read_text()


def docstrings():
    """The docstrings with examples, of all modules."""
    names = [
        package if file.stem == "__init__" else f"{package}.{file.stem}"
        for package in PACKAGES
        for folder in importlib.import_module(package).__path__
        for file in sorted(Path(folder).glob("*.py"))
        if ">>> " in file.read_text()
    ]
    return [test for name in names for test in doctest.DocTestFinder().find(importlib.import_module(name))]


def run(test):
    """How many examples of a doctest ran, all of them right."""
    report = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append, clear_globs=False)
    assert results.failed == 0, "".join(report)
    return results.attempted


@pytest.mark.parametrize("test", [pytest.param(test, id=test.name) for test in docstrings() if test.examples])
def test_docstring(test):
    assert run(test) > 0


def test_readme():
    names = {}  # the snippets run in one namespace, one after the other, as they are read
    ran = 0
    for snippet in re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        line = README.count("\n", 0, snippet.start(1))
        if ">>> " in snippet[1]:
            test = doctest.DocTestParser().get_doctest(snippet[1], {}, "README.md", "README.md", line)
            test.globs = names
            with jax.enable_x64(False):  # JAX's default, and the reader's
                ran += run(test)
        else:
            compile("\n" * line + snippet[1], "README.md", "exec")
    assert ran > 0


def test_an_example_that_prints_something_else_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(AssertionError, match=r"Got:\n +2"):
        run(test)
