"""A new loss touches five files and a new option four, as docs/architecture.md says; each that is forgotten fails."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mutations import copy_package

import unilabel as ul
from unilabel.losses import FORMULAS

# What is added to which file of the package: in the place of a line of it, or at its end.
BRIER = {
    "formulas/probabilities.py": {
        "": """

def brier_terms(xp: Namespace, p: Array, *_: Any) -> Array:
    return p


def brier_value(xp: Namespace, p: Array, weights: Elementwise) -> Array:
    return _negative(weights) * p * p + weights.positive * (1 - p) * (1 - p)


def brier_gradient(xp: Namespace, p: Array, weights: Elementwise) -> Array:
    return 2 * (_negative(weights) * p - weights.positive * (1 - p))


def brier_hessian(xp: Namespace, p: Array, weights: Elementwise) -> Array:
    return 2 * (_negative(weights) + weights.positive) + 0 * p


def _negative(weights: Elementwise) -> Array:
    return 1 - weights.positive if weights.negative is None else weights.negative


BRIER = Loss(
    "brier_score",
    per_example=False,
    takes="probs",
    fill=0.0,
    forms=(Form(elementwise, brier_terms, brier_value, brier_gradient, brier_hessian),),
)
"""
    },
    "losses.py": {
        "from .formulas.probabilities import ": "from .formulas.probabilities import BRIER, ",
        "def _run(": """def brier_score(probs, targets, *, where=None, axis=-1, reduction="batchmean"):
    return _run(BRIER, probs, Operands(targets, where=where), Given(reduction, axis))


def _run(""",
        "    nll: NLL,\n": "    nll: NLL,\n    brier_score: BRIER,\n",
    },
    "__init__.py": {"from .losses import ": "from .losses import brier_score, "},
    "conformance/cases.py": {
        "LOSSES = {\n": 'LOSSES = {\n    "brier_score": Loss(False, "probabilities"),\n',
        "": """

@family
def brier(make: Maker) -> Iterator[Case]:
    for reduction in REDUCTIONS:
        yield make.case("brier_score", [[0.1, 0.9], [1.0, 0.0]], [[0.0, 1.0], [0.25, 1.0]], reduction=reduction)
    where = Tensor((2, 2), [True, False, True, True])
    yield make.case("brier_score", [[0.1, math.nan], [0.5, 0.75]], [[0, 1], [1, 0]], where=where, reduction="none")
""",
    },
    "conformance/oracle.py": {
        "# Of an element: its input": """def brier(p: Number, negative: Number, positive: Number, *_: Number) -> Parts:
    losses, gradient = (p * p, (1 - p) ** 2), _sum([2 * negative * p, -2 * positive * (1 - p)])
    return _element(losses, negative, positive, gradient, _sum([2 * negative, 2 * positive]))


# Of an element: its input""",
        "DEFINITIONS: dict[str, Callable[..., Parts]] = {\n": """DEFINITIONS: dict[str, Callable[..., Parts]] = {
    "brier_score": brier,
""",
    },
}
POWER = {
    "losses.py": {
        # of softmax_nll alone, the first loss with class indices
        "    ignore_index: int | None = None,\n": "    ignore_index: int | None = None,\n    power: float = 1.0,\n",
        "ignore_index=ignore_index, validate": "ignore_index=ignore_index, power=power, validate",
    },
    "canonical.py": {
        "    validate: bool = False\n": "    validate: bool = False\n    power: float = 1.0\n",
        "ignore_index, eps, _, positives = given": "ignore_index, eps, _, power, positives = given",
        "        half=name in HALVES,\n": """        half=name in HALVES,
        power=checks.fraction("power", power, 8.0),
""",
    },
    "formulas/types.py": {"    eps: float = 0.0\n": "    eps: float = 0.0\n    power: float = 1.0\n"},
    "formulas/targets.py": {
        "        z = z if where is None else": "        z = z**options.power if where is None else"
    },
}
CONFORMANCE = "-m", "unilabel.conformance", "conformance", "--backend", "numpy", "--dtype", "float32", "--case", "brier"
OPTIONS = "-c", "import test_extending as tests; tests.TELLING['power'] = 2.0; tests.check_options()"

# Of each option, what changes the loss.
TELLING = {
    "weight": [1.0, 2.0, 3.0],
    "pos_weight": 2.0,
    "sample_weight": [1.0, 3.0],
    "where": [True, True, False],
    "ignore_index": 1,
    "label_smoothing": 0.1,
    "axis": 0,
    "reduction": "sum",
    "eps": 0.4,
    "validate": True,
}


def check_options():
    """Every option of every loss is told apart from its default: passed on, acted on, and in the cache's key."""
    options = {option for loss in FORMULAS for option in loss.__kwdefaults__}
    assert options == set(TELLING), options ^ set(TELLING)
    p = np.array([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7]])
    for loss in FORMULAS:
        for option in loss.__kwdefaults__:
            x, targets = p, np.array([[0.5, 0.0, 0.5], [0.25, 0.75, 0.0]])
            if option == "ignore_index":
                targets = np.array([0, 1])
            if option == "validate":
                x = p * math.nan

            def results(loss=loss, x=x, targets=targets, **options):
                return loss(x, targets, **options), ul.value_and_grad(loss)(x, targets, **options)[0]

            before = results()
            if option == "validate":
                with pytest.raises(ValueError, match="Expected"):
                    results(validate=True)
            else:
                changed = results(**{option: TELLING[option]})
                assert np.not_equal(changed, before).all(), f"{option} of {loss.__name__} changes nothing"
            np.testing.assert_array_equal(results(), before)


def test_every_option_counts():
    check_options()


def run(tree, files, *command):
    """How a command ends that runs with these additions to the package."""
    copy_package(tree)
    for name, additions in files.items():
        file = tree / "unilabel" / name
        text = file.read_text()
        for before, after in additions.items():
            assert before in text, before
            text = text.replace(before, after, 1) if before else text + after
        file.write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tree), str(Path(__file__).parent)))}
    return subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)


def without(files, name, before):
    return files | {name: {text: after for text, after in files[name].items() if text != before}}


def each(files):
    return [(name, before) for name, additions in files.items() for before in additions]


def test_a_loss(tmp_path):
    assert len(BRIER) <= 5
    done = run(tmp_path, BRIER, *CONFORMANCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 cases on numpy: all match" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize(("name", "before"), each(BRIER))
def test_a_loss_half_added(name, before, tmp_path):
    done = run(tmp_path, without(BRIER, name, before), *CONFORMANCE)
    assert done.returncode != 0
    assert any(word in done.stdout + done.stderr for word in ("brier", "BRIER")), done.stdout + done.stderr


def test_an_option(tmp_path):
    assert len(POWER) <= 4
    done = run(tmp_path, POWER, *OPTIONS)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.parametrize(("name", "before"), each(POWER))
def test_an_option_half_added(name, before, tmp_path):
    done = run(tmp_path, without(POWER, name, before), *OPTIONS)
    assert done.returncode != 0
    assert "power" in done.stderr or "unpack" in done.stderr, done.stderr
