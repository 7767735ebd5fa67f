"""What the formulas ask of a namespace: all of it, and nothing else, is in the Protocol. (mypy checks the backends.)"""

import re
from pathlib import Path

import numpy as np
import pytest

from unilabel.namespace import Extended, Namespace

ROOT = Path(__file__).parent.parent
MEMBERS = {name for name in vars(Namespace) if not name.startswith("_")}


def subclasses(kind):
    return [kind, *(further for one in kind.__subclasses__() for further in subclasses(one))]


def test_nothing_is_missing_and_nothing_unused():
    files = [*(ROOT / "unilabel").rglob("*.py"), *(ROOT / "backends").glob("*.py")]
    used = {
        name for file in files for name in re.findall(r"\b(?:xp|self|standard)\.([a-z]\w*)", file.read_text("utf-8"))
    }
    assert MEMBERS - used == {"load"} - used  # which torch calls of each of its namespaces
    asked = {
        name
        for file in (ROOT / "unilabel" / "formulas").glob("*.py")
        for name in re.findall(r"\bxp\.([a-z]\w*)", file.read_text("utf-8"))
    }
    assert asked - MEMBERS == set()


def test_a_backend_gives_nothing_else(framework):
    for kind in subclasses(Extended):
        assert {name for name in vars(kind) if not name.startswith("_")} - MEMBERS == set(), kind


class Own(Extended):
    def exp(self, x):
        return -x


@pytest.mark.parametrize("base", [np, "numpy"], ids=["module", "name"])
def test_what_a_subclass_has_comes_first(base):
    xp = Own(base)
    assert xp.exp(1.0) == -1
    assert xp.log1p(0.0) == 0
    xp.load()
    assert xp.exp(1.0) == -1
    with pytest.raises(AttributeError, match="nothing"):
        _ = xp.nothing


def test_defaults():
    xp, x = Extended(np), np.array([[0.0, -1.0, 2.0], [np.inf, 1.0, -np.inf]])
    assert xp.heaviside(x).tolist() == [[1, 0, 1], [1, 1, 0]]
    assert xp.weigh(np.array([0.0, 2.0, 0.0, 1.0]), np.array([np.inf, 3.0, 5.0, np.inf])).tolist() == [0, 6, 0, np.inf]
    at = xp.position(x, np.array([[2], [0]]), -1)
    assert xp.take_along_axis(x, at, -1).tolist() == [[2], [np.inf]]
    assert xp.put_along_axis(x, at, 7.0, -1).tolist() == [[0, -1, 7], [7, 1, -np.inf]]
    assert xp.put_along_axis(x, at, np.array([[7.0], [8.0]]), -1).tolist() == [[0, -1, 7], [8, 1, -np.inf]]
    assert xp.take(np.array([5.0, 6.0, 7.0]), np.array([[2], [0]])).tolist() == [[7], [5]]
