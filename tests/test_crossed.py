"""What transforms are crossed with is complete, `Sample` is right, and the table says no more than was run."""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from capabilities import END, START, Table, marks_of, plan_of
from crossed import (
    FACTORS,
    LINEAR,
    LOSSES,
    PER_EXAMPLE,
    Row,
    Sample,
    allowed,
    close,
    factors,
    is_per_example,
    planned,
    possible,
    quick,
)

FRAMEWORKS = {name: name for name in ("numpy", "torch", "jax", "tensorflow")} | {"array_api_strict": "array API"}


def marks_of_framework(name):
    """The capability marks of a framework's tests, less of those that not every machine can run."""
    file = f"in_{name.lower().replace(' ', '_')}"
    files = [f"test_{file}", f"test_linear_{file}", "test_threads"]
    return [mark for file in files for mark in marks_of(importlib.import_module(file)).values()]


def pytest_generate_tests(metafunc):
    """As tests are collected: once JAX has run, its own cannot be imported any more."""
    if "marks" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--backend") or FRAMEWORKS
        found = [
            pytest.param(marks_of_framework(name), id=name) for backend, name in FRAMEWORKS.items() if backend in wanted
        ]
        none = pytest.param([], marks=pytest.mark.skip(reason="none of --backend has a table"))
        metafunc.parametrize("marks", found or [none])


# --- The plan ---------------------------------------------------------------------------------------------------------


def pairs(levels):
    return set(itertools.combinations(sorted(levels.items()), 2))


@pytest.mark.full
def test_every_pair_of_levels_is_tried(marks):
    """Of each loss, somewhere in the framework's tables."""
    for loss in (*LOSSES, *LINEAR):
        tried = set().union(*(pairs(row.levels) for mark in marks for row in plan_of(mark) if row.loss == loss))
        every = [dict(zip(factors(loss), levels, strict=True)) for levels in itertools.product(*factors(loss).values())]
        missing = set().union(*(pairs(levels) for levels in every if possible(levels))) - tried
        assert not missing, f"{loss}: {sorted(missing)}"


def test_a_quick_run_touches_every_loss_and_level(marks):
    plans = [plan_of(mark) for mark in marks]
    calls = quick([plan for plan in plans if plan[0].loss in LOSSES])
    assert {row.loss for row in calls} == set(LOSSES)
    for per_example, every in FACTORS.items():
        for factor, levels in every.items():
            tried = {row[factor] for row in calls if (row.loss in PER_EXAMPLE) == per_example}
            assert tried == set(levels), f"{factor} of losses {'per example' if per_example else 'per element'}"


def test_every_cell_has_the_defaults_and_every_level_with_options(marks):
    """Of each loss; where a call takes seconds, all but the defaults of the losses of one kind together."""
    for mark in marks:
        cells = {}
        for row in plan_of(mark):
            assert possible(row.levels)
            cells.setdefault(is_per_example(row.loss) if mark.kwargs.get("brief") else row.loss, []).append(row)
        for rows in cells.values():
            choices = allowed(rows[0].loss, mark.kwargs.get("fixed"))
            first = {factor: levels[0] for factor, levels in choices.items()}
            with_options = [row for row in rows if row.levels != first]
            assert {row.loss for row in rows if row.levels == first} == {row.loss for row in rows}, mark
            assert any(row["reduction"] == first["reduction"] for row in with_options), mark
            for factor, levels in choices.items():
                assert {row[factor] for row in rows} == set(levels), (mark, factor)


# --- The sample -------------------------------------------------------------------------------------------------------


def textbook(sample, x, **changed):
    """The reduced loss as books have it, of logits that may be complex: nothing but sums, exp and log."""
    options, shape = sample.arrays | sample.options | changed, x.shape
    smoothing, keep = options.get("label_smoothing", 0.0), np.broadcast_to(options.get("where", True), x.shape)
    reduction = options.get("reduction", "mean" if sample.per_example else "batchmean")
    axes = np.atleast_1d(options.get("axis", -1)) % x.ndim
    examples = x.size / np.prod([x.shape[axis] for axis in axes])

    def last(array):
        """The class axes as one, the last."""
        batch = [n for axis, n in enumerate(shape) if axis not in axes]
        return np.moveaxis(array, axes, range(-len(axes), 0)).reshape(*batch, -1)

    if sample.per_example:
        x, keep = last(x), last(keep)
        taking_part = np.ones(x.shape[:-1])
        if sample.row["targets"] == "indices":
            taking_part = taking_part * (sample.targets != options.get("ignore_index"))
            z = np.arange(x.shape[-1]) == sample.targets[..., None]
        else:
            z = last(sample.targets)
        z, weight = z * keep, np.broadcast_to(options.get("weight", 1.0), x.shape[-1:])
        of_example = options.get("sample_weight", 1.0) * taking_part
        share = of_example * ((z * weight).sum(-1) if "weight" in options else 1.0)
        z = z * (1 - smoothing) + smoothing * keep / keep.sum(-1, keepdims=True)
        normaliser = np.log((np.exp(x) * keep).sum(-1, keepdims=True))
        log_p = {"softmax_nll": lambda: x - normaliser, "cross_entropy": lambda: np.log(x), "nll": lambda: x}[
            sample.name
        ]()
        losses = -(weight * z * log_p).sum(-1) * of_example
    else:
        z = sample.dense * (1 - smoothing) + smoothing / 2
        p = 1 / (1 + np.exp(-x)) if sample.name == "multilabel_logistic_loss" else x
        losses = -(options.get("pos_weight", 1.0) * z * np.log(p) + (1 - z) * np.log(1 - p))
        losses, share = options.get("weight", 1.0) * losses * keep, keep * 1.0
    if reduction == "none":
        return losses
    return losses.sum() / {"sum": 1.0, "mean": np.sum(share), "batchmean": examples}[reduction]


def near(got, right, relative=1e-7):
    assert np.shape(got) == np.shape(right)
    np.testing.assert_allclose(got, right, rtol=relative, atol=relative * np.abs(right).max())


ROWS = planned("test_crossed", "textbook")
SOME = [pytest.param(row, id=str(row), marks=() if i % 4 == 0 else pytest.mark.full) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("sample", SOME, indirect=True)
@pytest.mark.parametrize("lengths", [{}, {"rows": 3, "classes": 5}], ids=["as it is", "of other lengths"])
def test_samples_are_right_by_the_textbook(sample, lengths):
    sample = sample.of(**lengths) if lengths else sample

    def of_elements(function):
        """Of each logit, with nothing in the others' place."""
        units = np.eye(sample.x.size).reshape(sample.x.size, *sample.x.shape)
        return np.array([function(unit) for unit in units])

    def gradient_of(function, x=sample.x):
        """The derivative of the sum, by each logit: the step is so small as to be exact, and imaginary."""
        return of_elements(lambda unit: np.sum(function(x + 1e-30j * unit)).imag / 1e-30).reshape(x.shape)

    def value(x):
        return textbook(sample, x)

    near(sample.value, value(sample.x))
    near(sample.gradient, gradient_of(value))
    near(sample.pulled_back, gradient_of(lambda x: value(x) * sample.cotangent))
    near(sample.gradient_of_sum, gradient_of(lambda x: textbook(sample, x, reduction="sum")))
    each = [gradient_of(lambda x, i=i: np.ravel(value(x))[i]) for i in range(sample.value.size)]
    near(sample.jacobian, np.reshape(each, (*sample.value.shape, *sample.x.shape)))
    h = 1e-6
    second = of_elements(
        lambda unit: ((gradient_of(value, sample.x + h * unit) - gradient_of(value, sample.x - h * unit)) * unit).sum()
    )
    near(sample.hessian, second.reshape(sample.x.shape) / (2 * h), 1e-6)


@pytest.mark.parametrize("sample", SOME, indirect=True)
def test_every_operand_of_a_sample_counts(sample):
    """A transform that lost one would be found out."""
    # A class that is out changes nothing for the others where there is no softmax, and no share of the smoothing.
    idle = sample.name in ("cross_entropy", "nll") and sample.row["targets"] == "indices"
    idle = {"where"} if idle and sample.row["label_smoothing"] == "no" else set()
    for name in (sample.arrays.keys() | sample.options.keys() & {"label_smoothing", "ignore_index"}) - idle:
        without = sample.beside(np.asarray)
        without.arrays, without.options = (
            {key: given for key, given in all_of.items() if key != name} for all_of in (sample.arrays, sample.options)
        )
        assert np.abs(textbook(without, sample.x) - sample.value).max() > 1e-4, name


def test_close_can_fail():
    right = Sample(
        Row("softmax_nll", {factor: levels[0] for factor, levels in factors("softmax_nll").items()})
    ).gradient
    close(right, right)
    close(right * (1 + 15 * 2.0**-52), right)
    for wrong in (
        right * (1 + 40 * 2.0**-52),
        -right,
        right[:1],
        np.where(right == right.max(), np.nan, right),
        0 * right,
    ):
        with pytest.raises(AssertionError):
            close(wrong, right)
    with pytest.raises(AssertionError):  # a masked position has nothing that could be rounded
        close([1e-18], [0.0])


# --- The table --------------------------------------------------------------------------------------------------------


def cells(results, plan):
    """The cells of a table with one row, of these results of the tests of a plan."""
    table = Table(None)
    table.planned = {str(row): [(["numpy", "made up", row.loss], row.levels, "")] for row in plan}
    table.results = results
    *_, line, _ = table.text().split("\n")
    name, *found = [cell.strip() for cell in line.strip("|").split("|")]
    assert name == "made up"
    return dict(zip(LOSSES, found, strict=True))


PLAN = planned("numpy", "made up")
PASSED = {str(row): "✓" for row in PLAN}


def test_a_tick_says_that_every_call_of_the_plan_passed():
    assert cells(PASSED, PLAN) == dict.fromkeys(LOSSES, "✓")
    for row in PLAN:
        others = {test: result for test, result in PASSED.items() if test != str(row)}
        right = dict.fromkeys(LOSSES, "✓")
        assert cells(others, PLAN) == right | {row.loss: "not run"}
        for result in ("✗", "[no](https://example.com)"):
            assert cells(others | {str(row): result}, PLAN) == right | {row.loss: result}


def test_a_tick_tells_what_was_never_planned():
    """A level, which is then missing among those that are named, or the call without any option."""
    for per_example, every in FACTORS.items():
        kind = [loss for loss in LOSSES if (loss in PER_EXAMPLE) == per_example]
        for factor, levels in every.items():
            for level in levels:
                plan = [row for row in PLAN if row.loss not in kind or row[factor] != level]
                left = " or ".join(other for other in levels if other != level)
                for loss in kind:
                    assert f"{factor.replace('_', ' ')} {left}" in cells(PASSED, plan)[loss], (factor, level)
    with_options = [
        row for row in PLAN if row.levels != {factor: levels[0] for factor, levels in factors(row.loss).items()}
    ]
    assert "✓" not in cells(PASSED, with_options).values()


def test_a_tick_of_losses_that_share_out_the_levels_tells_which_failed():
    plan = planned("numpy", "made up", brief=True)
    failed = {row.loss for row in plan if row["axis"] == "two"}
    results = {str(row): "✗" if row["axis"] == "two" else "✓" for row in plan}
    assert cells({str(row): "✓" for row in plan}, plan) == dict.fromkeys(LOSSES, "✓")
    assert failed < set(LOSSES)
    for loss, cell in cells(results, plan).items():
        assert cell == "✗" if loss in failed else "axis last or middle" in cell


PROJECT = {
    "pytest.ini": """
[pytest]
testpaths = tests
addopts = -m "not slow" -p no:cacheprovider
markers =
    full
    slow
""",
    "conftest.py": f"""
import pathlib
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
import capabilities

capabilities.PAGE = pathlib.Path(__file__).with_name("page.md")
pytest_plugins = ["capabilities"]

def pytest_addoption(parser):
    parser.addoption("--backend")
""",
    "tests/test_all.py": """
import pytest

@pytest.mark.capability("numpy", "passes", brief=True)
def test_passes(sample):
    pass

@pytest.mark.capability("numpy", "passes but for two axes")
def test_fails(sample):
    assert sample.row["axis"] != "two"

@pytest.mark.capability("numpy", "fails before and after", losses=("nll", "softmax_nll"), brief=True)
def test_errors(sample, request):
    if sample.name == "nll":
        request.getfixturevalue("none")
    request.addfinalizer(lambda: 1 / 0)

@pytest.mark.capability("jax", "known", losses=("nll",), fixed={"reduction": "none", "axis": "last"})
@pytest.mark.xfail(reason="one day: https://example.com/1")
def test_known(sample):
    assert sample.row["weight"] == "no"

@pytest.mark.capability("jax", "unreduced", losses=("nll",), fixed={"reduction": "none"})
def test_fixed(sample):
    pass

@pytest.mark.capability("jax", "of features", losses=("linear_softmax_nll",), brief=True)
def test_linear(sample):
    pass

@pytest.mark.slow
@pytest.mark.capability("jax", "slow", looped=True)
def test_slow():
    pass
""",
}
RIGHT = """
## NumPy

| | `multilabel_logistic_loss` | `softmax_nll` | `binary_cross_entropy` | `cross_entropy` | `nll` |
|---|---|---|---|---|---|
| passes | ✓ | ✓ | ✓ | ✓ | ✓ |
| passes but for two axes | ✗ | ✗ | ✗ | ✗ | ✗ |
| fails before and after |  | ✗ |  |  | ✗ |

## JAX

| | `multilabel_logistic_loss` | `softmax_nll` | `binary_cross_entropy` | `cross_entropy` | `nll` |
|---|---|---|---|---|---|
| known |  |  |  |  | [no](https://example.com/1) |
| unreduced |  |  |  |  | ✓ (reduction none) |
| slow | `pytest -m slow` | `pytest -m slow` | `pytest -m slow` | `pytest -m slow` | `pytest -m slow` |

| | `linear_multilabel_logistic_loss` | `linear_softmax_nll` |
|---|---|---|
| of features |  | ✓ |
"""


@pytest.mark.parametrize("processes", ["2", pytest.param("0", marks=pytest.mark.full)])
def test_the_page_that_is_written(tmp_path, processes):
    """By one process, and by those of pytest-xdist."""
    (tmp_path / "tests").mkdir()
    for name, text in (PROJECT | {"page.md": f"Before\n{START}{END}After\n"}).items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "--write-transforms", "-n", processes]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert (tmp_path / "page.md").read_text() == f"Before\n{START}{RIGHT}{END}After\n", done.stdout[-1000:]
