"""Every row of docs/coming-from.md runs: both expressions, and they agree, or differ as the page says."""

import functools
import importlib
import os
import re
from pathlib import Path
from typing import NamedTuple

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported

import mpmath
import numpy as np
import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
PEERS = ("PyTorch", "TensorFlow", "Keras", "Optax", "scikit-learn", "SciPy", "ONNX")
DIFFERENT = "Where the numbers differ on purpose"
EXACT = {name: getattr(mpmath, name) for name in ("exp", "log", "nan")}


class Section(NamedTuple):
    code: str  # what its python block says
    rows: list[list[str]]  # the cells of its tables, below their heads


def read(page):
    """The sections of the page by title; "" is what stands before the first."""
    sections = {}
    for text in re.split(r"^## ", "\n" + page, flags=re.MULTILINE):
        title, _, body = text.partition("\n")
        code = re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        tables = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", body, re.MULTILINE)
        lines = "".join(tables).splitlines()
        sections[title] = Section("".join(code), [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines])
    return sections


SECTIONS = read(PAGE)


@functools.cache
def names(title):
    """What the expressions of a section can name: what the page's first block and the section's own make."""
    namespace: dict[str, object] = {}
    for code in (SECTIONS[""].code, SECTIONS[title].code):
        exec(code, namespace)
    return namespace


def value(cell, namespace):
    assert cell[0] == cell[-1] == "`", f"no expression: {cell}"
    return eval(cell[1:-1], namespace)


def number(value):
    return f"{float(value) + 0.0:.3g}"  # + 0: the sign of a zero tells nothing here


def agree(title, theirs, ours):
    a, b = (np.asarray(value(cell, names(title))) for cell in (theirs, ours))
    assert a.dtype == b.dtype
    np.testing.assert_allclose(b, a, rtol=8 * float(np.finfo(a.dtype).eps), atol=0, strict=True)


def differ(theirs, theirs_gives, ours, ours_gives, exactly):
    try:
        given = number(value(theirs, names(DIFFERENT)))
    except Exception as error:
        given = type(error).__name__
    assert given == theirs_gives
    assert number(value(ours, names(DIFFERENT))) == ours_gives
    with mpmath.workdps(50):
        assert number(value(exactly, EXACT)) == ours_gives
    assert theirs_gives != ours_gives


@pytest.mark.parametrize(
    ("title", "theirs", "ours"),
    [
        pytest.param(title, *row[:2], id=f"{title}: {row[0][1:-1]}")
        for title in PEERS
        for row in SECTIONS.get(title, Section("", [])).rows
    ],
)
def test_they_agree(title, theirs, ours):
    agree(title, theirs, ours)


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0][1:-1]) for row in SECTIONS[DIFFERENT].rows])
def test_they_differ(row):
    differ(*row)


def test_the_model_for_torch_jit_script(tmp_path, monkeypatch):
    (tmp_path / "from_pytorch.py").write_text(SECTIONS[""].code + SECTIONS["PyTorch"].code)  # it reads the source
    monkeypatch.syspath_prepend(tmp_path)
    page = importlib.import_module("from_pytorch")
    model = page.Scriptable()
    expected = page.F.cross_entropy(model.linear(page.x), page.y, label_smoothing=0.1)
    page.torch.testing.assert_close(page.torch.jit.script(model)(page.x, page.y), expected)


# --- These checks can fail --------------------------------------------------------------------------------------------


def test_no_row_is_missing():
    """As many as there are; whoever adds one raises the number."""
    count = {title: len(section.rows) for title, section in SECTIONS.items()}
    assert count == {
        "": 0, "PyTorch": 31, "TensorFlow": 13, "Keras": 16, "Optax": 19, "scikit-learn": 10, "SciPy": 10, "ONNX": 6,
        DIFFERENT: 45, "Their own tests": 4,
    }  # fmt: skip
    assert all(len(row) == 3 for title in PEERS for row in SECTIONS[title].rows)
    assert PAGE.count("\n| `") == sum(count.values())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("`ul.multilabel_logistic_loss(x, z)`", "Not equal to tolerance"),
        ("`ul.multilabel_logistic_loss(x, z, reduction='mean') * (1 + 1e-5)`", "Not equal to tolerance"),
        ("`ul.multilabel_logistic_loss(x, z, reduction='mean')[None]`", "shape"),
        ("`ul.multilabel_logistic_loss(x.double(), z, reduction='mean')`", "float64"),
        ("ul.multilabel_logistic_loss(x, z, reduction='mean')", "no expression"),
    ],
)
def test_a_wrong_row_fails(wrong, complaint):
    theirs = "`F.binary_cross_entropy_with_logits(x, z)`"
    agree("PyTorch", theirs, "`ul.multilabel_logistic_loss(x, z, reduction='mean')`")
    with pytest.raises(AssertionError, match=complaint):
        agree("PyTorch", theirs, wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        ["`T(0.0)`", "1", "`T(2.0)`", "2", "`2`"],  # theirs gives something else
        ["`T(0.0)`", "0", "`T(3.0)`", "2", "`2`"],  # ours does
        ["`T(0.0)`", "0", "`T(2.0)`", "2", "`exp(2)`"],  # ours is not exact
        ["`T(2.0)`", "2", "`T(2.0)`", "2", "`2`"],  # the two agree
    ],
)
def test_a_wrong_difference_fails(wrong):
    differ("`T(0.0)`", "0", "`T(2.0)`", "2", "`2`")
    with pytest.raises(AssertionError):
        differ(*wrong)
