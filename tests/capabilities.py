"""The table of docs/transforms.md, made of the tests' results: what each framework can do with each loss.

A test marked `capability("torch", "vmap")` fills a cell for the loss that it takes by the fixture `sample`, or for
those that the mark names: `losses=(...)`. The framework None is the one of the fixture `framework`. A run of all tests
compares the page with what it saw, or writes it: `pytest -m "capability and not slow and not cuda" --write-transforms`.
"""

from pathlib import Path

import numpy as np
import pytest
from unilabel.conformance.cases import Maker
from unilabel.conformance.oracle import expected

import unilabel as ul

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
LOSSES = ("multilabel_logistic_loss", "softmax_nll", "binary_cross_entropy", "cross_entropy", "nll")
TITLES = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow", "array API": "Array API"}
LIBRARIES = {"array_api_strict": ("array API", "array-api-strict: "), "mlx": ("array API", "MLX: ")}
SEED = 20261121


class Sample:
    """A loss with float64 inputs, and what is right for them by the oracle, as NumPy arrays."""

    def __init__(self, name, rows=4, classes=3, **options):
        self.name, self.loss, self.options = name, getattr(ul, name), options
        maker = Maker("transforms", "float64", SEED)
        per_row = name in ("softmax_nll", "cross_entropy", "nll")
        ranges = {"multilabel_logistic_loss": (-6, 6), "softmax_nll": (-6, 6), "nll": (-6, -0.01)}
        low, high = ranges.get(name, (0.01, 0.99))
        shape = (rows, classes)
        case = maker.case(
            name,
            maker.numbers(shape, low, high),
            maker.chosen((rows,), *range(classes)) if per_row else maker.chosen(shape, 0, 1),
            reduction="none",
            **options,
        )
        answer = expected(case)
        self.x = np.array(case.logits.values).reshape(shape)
        self.targets = np.array(case.targets.values).reshape(case.targets.shape)
        self.distributions = (
            np.eye(classes)[self.targets] if per_row else self.targets.astype(float)
        )  # the same targets
        self.cotangent = np.array(case.cotangent.values).reshape(case.cotangent.shape)
        self.values, self.gradient, self.pulled_back, self.hessian = (
            np.array([float(number.value) for number in numbers])
            for numbers in (answer.value, answer.gradient_of_sum, answer.gradient, answer.hessian)
        )  # of reduction="none": gradient and Hessian diagonal of the sum, and the gradient times the cotangent
        self.values = self.values.reshape(self.cotangent.shape)
        self.gradient, self.pulled_back, self.hessian = (
            numbers.reshape(shape) for numbers in (self.gradient, self.pulled_back, self.hessian)
        )

    def __call__(self, x, targets=None, **options):
        return self.loss(x, self.targets if targets is None else targets, **self.options | options)


def close(got, right, dtype="float64", ulp=16):
    """Equal but for rounding, in units of the dtype's precision."""
    got, right = np.asarray(got, "float64"), np.asarray(right, "float64")
    assert got.shape == right.shape
    eps = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    np.testing.assert_allclose(got, right, rtol=ulp * eps, atol=0)


@pytest.fixture(params=LOSSES)
def sample(request):
    return Sample(request.param)


# --- The table --------------------------------------------------------------------------------------------------------

START, END = "<!-- table: written by pytest --write-transforms -->\n", "<!-- end of table -->\n"
RANK = ("✓", "no", "not run", "✗")  # the worst result of a cell's tests counts


class Table:
    """(framework, transform, loss) -> what came of the tests that are about it."""

    def __init__(self, page):
        self.page, self.cells, self.ran, self.left_out = page, {}, set(), False

    def collected(self, items):
        """All that there are, before any is left out."""
        for item in items:
            for cell in cells(item):
                marker = next((name for name in ("cuda", "slow") if item.get_closest_marker(name)), "")
                self.cells[cell] = f"`pytest -m {marker}`" if marker else "not run"

    def ended(self, item, report):
        if report.when == "call" or report.failed:
            links = [word for word in getattr(report, "wasxfail", "").split() if word.startswith("http")]
            result = f"[no]({links[0]})" if links else "✓" if report.passed else "✗"
            for cell in cells(item):
                before = self.cells.get(cell, "")
                self.cells[cell] = result if cell not in self.ran or rank(result) > rank(before) else before
                self.ran.add(cell)

    def text(self):
        lines = []
        for framework, title in TITLES.items():
            rows = dict.fromkeys(transform for of, transform, _ in self.cells if of == framework)
            if rows:
                lines += [f"## {title}", "", f"| | {' | '.join(f'`{loss}`' for loss in LOSSES)} |", "|---" * 6 + "|"]
                for row in rows:
                    lines.append(f"| {row} | {' | '.join(self.cells.get((framework, row, x), '') for x in LOSSES)} |")
                lines.append("")
        return "\n".join(lines)

    def with_page(self):
        """The page as it is, and as it should be."""
        page = self.page.read_text()
        before, rest = page.split(START)
        return page, before + START + "\n" + self.text() + END + rest.split(END)[1]


def cells(item):
    mark = item.get_closest_marker("capability")
    if mark is None:
        return []
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    losses = mark.kwargs.get("losses") or [parameters["sample"]]
    framework, transform = mark.args
    if framework is None:  # the one of the fixture `framework`
        framework = parameters["framework"]
        framework, library = LIBRARIES.get(framework, (framework, ""))
        transform = library + transform
    return [(framework, transform, loss) for loss in losses]


def rank(result):
    return next(i for i, kind in enumerate(RANK) if kind in result)


def pytest_addoption(parser):
    parser.addoption("--write-transforms", action="store_true", help="write the table of docs/transforms.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "capability(framework, transform, losses): a row of docs/transforms.md")
    config.stash[TABLE] = Table(PAGE)


TABLE = pytest.StashKey[Table]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[TABLE].collected(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    item.config.stash[TABLE].ended(item, report)
    return report


def whole(config):
    """Whether all files were run, and nothing of the table left out."""
    all_files = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    all_backends = not config.getoption("--backend")
    return all_files and all_backends and "not run" not in config.stash[TABLE].cells.values()


def pytest_sessionfinish(session):
    table = session.config.stash[TABLE]
    if not whole(session.config):
        return
    page, right = table.with_page()
    if session.config.getoption("--write-transforms"):
        table.page.write_text(right)
    elif page != right and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[TABLE]
    if whole(config):
        page, right = table.with_page()
        if page != right:
            terminalreporter.write_line(
                f"{table.page} is not what the tests saw: --write-transforms writes it", red=True
            )
