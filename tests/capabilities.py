"""The table of docs/transforms.md, made of the tests' results: what each framework can do with each loss.

A test marked `capability("torch", "vmap")` fills a row of it. It takes the fixture `sample`, and is run with each call
that `crossed.py` plans for that row: one of them in a quick run, the others under the marker `full`. The mark may name
the losses that it is about (`losses=(...)`), and levels that the transform cannot do without (`fixed={"reduction":
"none"}`), which then stand in the cell. Where a call takes seconds, `brief=True` has the losses of one kind share out
the levels; `pairs=True` has every pair of levels. A test that loops over `samples(...)` itself is marked `looped=True`.
The framework None is the one of the fixture `framework`.

A run of all of them compares the page with what it saw, or writes it:
`pytest -m "capability and not slow and not cuda" --write-transforms`, with `-n 2` on two cores.
"""

import functools
import itertools
from collections import defaultdict
from pathlib import Path

import pytest
from crossed import LINEAR, LOSSES, LinearSample, Row, Sample, factors, is_per_example, planned, quick

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
TITLES = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow", "array API": "Array API"}
LIBRARIES = {"array_api_strict": ("array API", "array-api-strict: "), "mlx": ("array API", "MLX: ")}


def plain(loss):
    """A call with all defaults, unreduced."""
    return Row(loss, {factor: levels[0] for factor, levels in factors(loss).items()} | {"reduction": "none"})


@pytest.fixture
def sample(request):
    return sample_of(request.param if isinstance(request.param, Row) else plain(request.param))


def sample_of(row):
    return (LinearSample if row.loss in LINEAR else Sample)(row)


def samples(framework, transform, **options):
    """The calls that a test marked with `looped=True` has to make."""
    return [sample_of(row) for row in planned(framework, transform, **options)]


def plan_of(mark):
    return planned(*mark.args, **{name: given for name, given in mark.kwargs.items() if name != "looped"})


def marks_of(module):
    """The marks of the tests that fill a row of the table, by test name, without those that no quick run has."""
    found = {}
    for name, test in vars(module).items():
        marks = {mark.name: mark for mark in getattr(test, "pytestmark", [])}
        if "capability" in marks and not marks.keys() & {"cuda", "slow", "full"}:
            found[name] = marks["capability"]
    return found


@functools.cache
def quick_calls(module):
    """For each test, by name, the call that a quick run makes."""
    marks = marks_of(module)
    return dict(zip(marks, quick([plan_of(mark) for mark in marks.values()]), strict=True))


def pytest_generate_tests(metafunc):
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "sample" not in metafunc.fixturenames or "sample" in given:
        return
    mark = metafunc.definition.get_closest_marker("capability")
    if mark is None:
        metafunc.parametrize("sample", LOSSES, indirect=True)
        return
    chosen = str(quick_calls(metafunc.module).get(metafunc.function.__name__))
    calls = [
        pytest.param(row, id=str(row), marks=() if str(row) == chosen else pytest.mark.full) for row in plan_of(mark)
    ]
    metafunc.parametrize("sample", calls, indirect=True)


# --- The table --------------------------------------------------------------------------------------------------------

START, END = "<!-- table: written by pytest --write-transforms -->\n", "<!-- end of table -->\n"
RANK = ("✓", "no", "✗")  # the worst result of a cell's tests counts


class Table:
    """A plugin of pytest: what came of each cell (framework, transform, loss), and the page that says so."""

    def __init__(self, page):
        self.page, self.results = page, {}
        self.planned = {}  # test -> the cells that it is about, as they were collected, before any is left out

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        self.planned = {item.nodeid: found for item in items if (found := cells(item))}
        if hasattr(config, "workeroutput"):  # pytest-xdist: its workers collect, and here is what they tell
            config.workeroutput["cells"] = self.planned

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.planned = self.planned or getattr(node, "workeroutput", {}).get("cells", {})

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            links = [word for word in getattr(report, "wasxfail", "").split() if word.startswith("http")]
            self.results[report.nodeid] = f"[no]({links[0]})" if links else "✓" if report.passed else "✗"

    def whole(self, config):
        """Whether all tests of the table were run, except those that need special hardware."""
        everywhere = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("--backend")
        return everywhere and all(test in self.results or found[0][2] for test, found in self.planned.items())

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput") or not self.planned or not self.whole(session.config):
            return
        page, right = self.with_page()
        if session.config.getoption("--write-transforms"):
            self.page.write_text(right)
        elif page != right and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, config):
        if self.planned and self.whole(config):
            page, right = self.with_page()
            if page != right:
                text = f"{self.page} is not what the tests saw: --write-transforms writes it"
                terminalreporter.write_line(text, red=True)

    def text(self):
        tests = defaultdict(list)
        for test, found in self.planned.items():
            for cell, levels, marker in found:
                tests[tuple(cell)].append((self.results.get(test, "not run"), levels, marker))
        lines = []
        for framework, title in TITLES.items():
            tables = [self.of_losses(tests, framework, losses) for losses in (tuple(LOSSES), tuple(LINEAR))]
            if any(tables):
                lines += [f"## {title}", "", *itertools.chain(*tables)]
        return "\n".join(lines)

    @staticmethod
    def of_losses(tests, framework, losses):
        """The lines of a table; none if it has no rows."""
        transforms = dict.fromkeys(transform for of, transform, loss in tests if of == framework and loss in losses)
        if not transforms:
            return []
        lines = [f"| | {' | '.join(f'`{loss}`' for loss in losses)} |", "|---" * (1 + len(losses)) + "|"]
        for row in transforms:
            of = {loss: tests.get((framework, row, loss), []) for loss in losses}
            kinds = [[loss for loss in losses if is_per_example(loss) == kind] for kind in (False, True)]
            together = [[test for loss in kind for test in of[loss]] for kind in kinds]
            found = [entry(loss, of[loss], together[is_per_example(loss)]) for loss in losses]
            lines.append(f"| {row} | {' | '.join(found)} |")
        return [*lines, ""]

    def with_page(self):
        """The page as it is, and as it should be."""
        page = self.page.read_text()
        before, rest = page.split(START)
        return page, before + START + "\n" + self.text() + END + rest.split(END)[1]


def entry(loss, tests, row):
    """A cell: its worst result; after a tick, the levels that its row was tried with, if those are not all.

    `row`: the tests of losses of the same kind in that row.
    """
    if not tests:
        return ""
    markers = [marker for _, _, marker in tests if marker]
    if len(markers) == len(tests):
        return f"`pytest -m {markers[0]}`"
    result = max((result for result, _, marker in tests if not marker), key=rank)
    only, defaults = [], {}
    for factor, levels in factors(loss).items():
        seen = {tried[factor] for of, tried, marker in row if not marker and of == "✓"}
        if seen != set(levels):
            only.append(f"{factor.replace('_', ' ')} {' or '.join(level for level in levels if level in seen)}")
        defaults[factor] = next(level for level in levels if level in seen or not seen)
    if not any(tried == defaults for _, tried, _ in tests):
        only.append("with options")
    return " ".join([result, *([f"({', '.join(only)})"] if only and result == "✓" else [])])


def cells(item):
    """The cells that a test fills, the levels that it tries there, and its marker if it needs special hardware."""
    mark = item.get_closest_marker("capability")
    if mark is None:
        return []
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    framework, transform = mark.args
    if framework is None:  # the one of the fixture `framework`
        framework = parameters["framework"]
        framework, library = LIBRARIES.get(framework, (framework, ""))
        transform = library + transform
    marker = next((name for name in ("cuda", "slow") if item.get_closest_marker(name)), "")
    looped = plan_of(mark) if "looped" in mark.kwargs else [parameters["sample"]]
    return [([framework, transform, row.loss], row.levels, marker) for row in looped]


def rank(result):
    return next(i for i, kind in enumerate(RANK) if kind in result) if result != "not run" else len(RANK)


def pytest_addoption(parser):
    parser.addoption("--write-transforms", action="store_true", help="write the table of docs/transforms.md")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "capability(framework, transform, losses, fixed, brief, pairs, looped): a row of docs/transforms.md"
    )
    config.pluginmanager.register(Table(PAGE))
