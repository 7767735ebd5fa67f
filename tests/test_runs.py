"""Runs of losses that are wrong, crash, hang, lie, babble or fork: never passed, never lost, none left behind."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_pytest_plugin import run_pytest
from test_subjects import LISTENING
from unilabel.conformance.cases import SOFTMAX, cases
from unilabel.conformance.runner import CRASHES

# What a loss does in the case whose first logit is that of a key, beside being right.
SUBJECT = """
import ctypes, os, signal, sys, time
import numpy, unilabel

def note():
    with open({pids!r}, "a") as file:
        file.write(str(os.getpid()) + "\\n")

def fork(then):
    if os.fork() == 0:
        note()
        then()

def sleep():
    time.sleep(600)

class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no words")

class Liar:
    shape, dtype, ndim = (), numpy.dtype("float32"), 0
    def __float__(self):
        return 0.0

def fail(error):
    raise error

def babble():
    for _ in range(20):
        os.write(1, b"\\xff\\xfe\\x1b[31m {{}} \\n" * 1000)
        os.write(2, b"\\xff\\x00 no end" * 1000)
    print("\\x1b]0;title\\x07", flush=True)

def write_anywhere(text):
    for descriptor in range(3, 12):
        try:
            os.write(descriptor, text)
        except OSError:
            pass

HARMLESS = {{
    "babbles": babble,
    "changes the folder": lambda: os.chdir("/"),
    "has a child that sleeps": lambda: fork(sleep),
    "has a child in a session of its own": lambda: fork(lambda: (os.setsid(), sleep())),
    "has a child that goes on": lambda: fork(lambda: None),
    "has a child that fails": lambda: fork(lambda: fail(ValueError())),
    "closes its streams": lambda: (sys.stdout.close(), os.close(0)),
    "is deaf": lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)],
}}
WRONG = {{
    "is off": lambda right: right * numpy.float32(1.0001),
    "is NaN": lambda right: right * numpy.float32("nan"),
    "is nothing": lambda right: None,
    "is a number": float,
    "is a list": lambda right: right.tolist(),
    "is wide": lambda right: right.astype("float64"),
    "is long": lambda right: numpy.stack([right, right]),
    "lies": lambda right: Liar(),
    "is a stranger": lambda right: memoryview(right),
    "raises": lambda right: fail(ValueError("\\x1b[31m\\x07 \\udc80 [red] ]]> \\x00\\u202e\\nall match the oracle")),
    "raises in silence": lambda right: fail(Silent()),
    "exits": lambda right: sys.exit(0),
    "stops": lambda right: fail(KeyboardInterrupt()),
    "recurses": lambda right: (lambda f: f(f))(lambda f: f(f)),
}}
CRASH = {{
    "exits at once": lambda: os._exit(0),
    "exits with 3": lambda: os._exit(3),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "has a segmentation fault": lambda: ctypes.string_at(0),
    "leaves a child behind": lambda: (fork(sleep), os._exit(0)),
    "closes every descriptor": lambda: os.closerange(3, 64),
    "forges": lambda: write_anywhere(b"[]\\n"),
    "forges half": lambda: (write_anywhere(b'{{"id": "x", '), os._exit(0)),
    "forges a version": lambda: write_anywhere(b'{{"version": []}}\\n'),
    "forges an answer": lambda: write_anywhere(b'{{"id": "float32/moderate/1", "numbers": {{}}}}\\n'),
    "forges an end": lambda: write_anywhere(b'{{"end": true}}\\n'),
}}
HANG = {{
    "sleeps": sleep,
    "is busy": lambda: [None for _ in iter(int, 1)],
    "sleeps with a child": lambda: (fork(sleep), sleep()),
}}

note()
{imported}

def softmax_nll(logits, targets, *, axis=-1, reduction="mean"):
    right = unilabel.softmax_nll(logits, targets, axis=axis, reduction=reduction)
    does = {plan!r}.get(float(logits.ravel()[0]))
    if does in WRONG:
        return WRONG[does](numpy.asarray(right))
    if does:
        (HARMLESS | CRASH | HANG)[does]()
    return right
"""
kinds = {}
for kind in ("HARMLESS", "WRONG", "CRASH", "HANG"):
    text = SUBJECT.partition(f"\n{kind} = {{{{")[2].partition("\n}}")[0]
    kinds[kind] = re.findall(r'^    "(.*?)": ', text, re.MULTILINE)
WHICH = ["--subject", "fuzzed:softmax_nll", "--backend", "numpy", "--case", "moderate"]
APPLY = {
    dtype: [case for case in cases((dtype,), 0) if case.family == "moderate" and case.loss == SOFTMAX]
    for dtype in ("float32", "float64")
}
FIRST = APPLY["float32"]


class Reports:
    """What a run of the command wrote."""

    def __init__(self, folder):
        self.found = json.loads((folder / "results.json").read_text())
        (self.run,) = self.found["runs"]
        self.statuses = {case["id"]: case["status"] for case in self.run["cases"]}
        (self.suite,) = ElementTree.parse(folder / "junit.xml").getroot()
        self.page = (folder / "page.html").read_text("utf-8")


def subject(folder, plan=(), imported="", name="fuzzed"):
    """A module that does what is planned for each case, and where it and its children note their process ids."""
    by_logit = {case.logits.values[0]: does for case, does in plan}
    (folder / "pids").touch()
    text = SUBJECT.format(pids=str(folder / "pids"), plan=by_logit, imported=imported)
    (folder / f"{name}.py").write_text(text)


def run(folder, *arguments, timeout="20", **environment):
    """The command in that folder, with all its reports."""
    files = ["--json", "results.json", "--junit", "junit.xml", "--html", "page.html"]
    return subprocess.run(
        [sys.executable, "-m", "unilabel.conformance", "conformance", *arguments, "--timeout", timeout, *files],
        cwd=folder, capture_output=True, env=os.environ | {"PYTHONPATH": str(folder)} | environment,
    )  # fmt: skip


def alive(process):
    """Whether it runs; a process that has ended may still be listed, until its parent looks."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def assert_none_is_left(folder):
    processes = [int(line) for line in (folder / "pids").read_text().split()]
    assert processes
    deadline = time.monotonic() + 10
    while any(map(alive, processes)):
        assert time.monotonic() < deadline, [process for process in processes if alive(process)]
        time.sleep(0.05)


def assert_agree(done, reports, expected):
    """All reports say what is expected of each case, and nothing that a terminal obeys."""
    output = done.stdout.decode()
    failed = {name for name, status in expected.items() if status == "fail"}
    assert {name: reports.statuses[name] for name in expected} == expected
    assert done.returncode == bool(failed), output
    assert reports.found["passed"] == (not failed)
    assert ("\n56 cases on fuzzed:softmax_nll numpy: all match the oracle" in output) == (not failed)
    assert ("<title>✗" in reports.page) == bool(failed)
    assert {test.get("name") for test in reports.suite if test.find("failure") is not None} == failed
    assert int(reports.suite.get("failures")) == len(failed)
    for case in reports.run["cases"]:
        assert case["status"] != "fail" or case["reason"] or any("how" in v for v in case["verdicts"].values())
    texts = [output, done.stderr.decode(), reports.page, ElementTree.tostring(reports.suite, "unicode")]
    for text in texts:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
        assert "Traceback" not in text


def planned(rounds):
    """Everything that a loss may do in some case of some round, and what has to come of each case."""
    draw = random.Random(0)
    decks = kinds["HARMLESS"], kinds["WRONG"], kinds["CRASH"] + kinds["HANG"]
    plans = [[] for _ in range(rounds)]
    for deck in decks:
        for i, does in enumerate(draw.sample(deck, len(deck))):
            plans[i % rounds].append(does)
    for plan in plans:
        places = [draw.sample(of_dtype, len(of_dtype)) for of_dtype in APPLY.values()]
        plan[:] = [(places[i % 2].pop(), does) for i, does in enumerate(plan)]
        bad = {case.id for case, does in plan if does not in kinds["HARMLESS"]}
        yield plan, {case.id: "fail" if case.id in bad else "pass" for of in APPLY.values() for case in of}


# --- The fuzz ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.full) for number in (1, 2, 3))])
def test_fuzz(tmp_path, number):
    """Whatever it does in a case, that case alone is wrong, in every report, with a reason; the next one goes on."""
    plan, expected = list(planned(4))[number]
    subject(tmp_path, plan)
    done = run(tmp_path, *WHICH, timeout="10")
    reports = Reports(tmp_path)
    assert reports.run["problem"] == ""
    assert_agree(done, reports, expected)
    assert_none_is_left(tmp_path)


@pytest.mark.full
def test_fuzz_of_the_plugin(tmp_path):
    plan, expected = next(planned(4))
    subject(tmp_path, plan)
    arguments = ["-o", "pythonpath=.", "--pyargs", "unilabel.conformance", *WHICH, "--timeout", "10"]
    done, *_ = run_pytest(tmp_path, *arguments, "-v")
    said = dict(re.findall(r"test_case\[.*?numpy-(\S+)\] (PASSED|FAILED)", done.stdout))
    assert said == {name: f"{status}ed".upper() for name, status in expected.items()}
    assert done.returncode == 1
    assert_none_is_left(tmp_path)


def test_crash_after_crash_is_given_up(tmp_path):
    """And what was not run is wrong."""
    subject(tmp_path, [(case, "exits at once") for case in FIRST[2:]])
    done = run(tmp_path, *WHICH, "--dtype", "float32")
    reports = Reports(tmp_path)
    assert done.returncode == 1
    assert [reports.statuses[case.id] for case in FIRST] == ["pass"] * 2 + ["fail"] * (len(FIRST) - 2)
    assert reports.suite.find("testcase/error").get("message") == reports.run["problem"]
    reasons = {case["id"]: case["reason"] for case in reports.run["cases"]}
    assert {reasons[case.id] for case in FIRST[2 : 2 + CRASHES]} == {"exit code 0 before the end"}
    assert {reasons[case.id] for case in FIRST[2 + CRASHES :]} == {reports.run["problem"]}
    assert reports.run["problem"] == "given up in float32 after 3 crashes, the last: exit code 0 before the end"
    assert len((tmp_path / "pids").read_text().split()) == CRASHES


# --- Nothing checked --------------------------------------------------------------------------------------------------

IMPORTED = {
    "sys.exit(0)": "SystemExit: 0",
    "os._exit(0)": "exit code 0 before the end",
    "fork(sleep); os._exit(0)": "exit code 0 before the end",
    "os.kill(os.getpid(), 9)": "exit code -9 before the end",
    "this is no Python": "SyntaxError: invalid syntax",
    "raise Silent": "Silent, which cannot be shown",
    "raise KeyboardInterrupt": "exit code",
    "sleep()": "no answer for 10 s",
}


@pytest.mark.parametrize(
    "imported",
    [code if code == "os._exit(0)" else pytest.param(code, marks=pytest.mark.full) for code in IMPORTED],
)
def test_import(tmp_path, imported):
    """Whatever a subject does where it is imported, it does to a worker: the reason is in every report."""
    subject(tmp_path, imported=imported)
    done = run(tmp_path, *WHICH, "--dtype", "float32", timeout="10" if imported == "sleep()" else "60")
    assert_unchecked(tmp_path, done, f"fuzzed:softmax_nll cannot be used: {IMPORTED[imported]}")
    if imported != "this is no Python":
        assert_none_is_left(tmp_path)


def assert_unchecked(folder, done, reason):
    output = done.stdout.decode()
    assert done.returncode == 2, output
    assert "nothing was checked\n" in output
    assert "all match" not in output
    reports = Reports(folder)
    assert not reports.found["passed"]
    (error,) = reports.suite.findall("testcase/error")
    assert reports.suite.get("errors") == "1"
    assert "<title>✗" in reports.page
    for text in (" ".join(output.split()), reports.run["problem"], error.get("message"), unescape(reports.page)):
        assert reason in text


def test_import_that_changes_the_folder(tmp_path):
    subject(tmp_path, imported="os.chdir('/')")
    done = run(tmp_path, *WHICH)
    assert_agree(done, Reports(tmp_path), {case.id: "pass" for of in APPLY.values() for case in of})


NONE = "def softmax_nll(logits, targets):\n    return 42\n\nnumber = 1\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "softmax_nll",
            "nothing was checked, as no case applies: takes no reduction (8); none:softmax_nll claims",
        ),
        ("other", "none:other cannot be used: AttributeError: module 'none' has no attribute 'other'"),
        ("number", "none:number cannot be used: TypeError: expected a function, received int"),
    ],
)
def test_nothing_applies(tmp_path, name, reason):
    (tmp_path / "none.py").write_text(NONE)
    which = ["--subject", f"none:{name}", "--loss", "softmax_nll", "--backend", "numpy", "--dtype", "float32"]
    done = run(tmp_path, *which, "--case=seed")
    assert_unchecked(tmp_path, done, reason)


def test_plugin_of_nothing(tmp_path):
    """Skipped tests alone would be green."""
    (tmp_path / "none.py").write_text(NONE)
    which = ["--subject", "none:softmax_nll", "--backend", "numpy", "--dtype", "float32", "--case", "seed"]
    done, passed, failed, skipped = run_pytest(
        tmp_path, "-o", "pythonpath=.", "--pyargs", "unilabel.conformance", *which
    )
    assert done.returncode == 1
    assert (passed, failed, skipped) == (0, 1, 15)
    assert "nothing was checked, as no case applies: takes no reduction (8); " in done.stdout


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, marks=pytest.mark.full),
    ],
)
def test_signals(tmp_path, number):
    """What there is by then is reported, and the workers and their children end."""
    subject(tmp_path, [(FIRST[2], "sleeps with a child")])
    process = listening(tmp_path, "", *WHICH, "--jobs", "1")
    while len((tmp_path / "pids").read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    process.send_signal(number)  # an impatient user
    output, errors = end_of(process)
    assert (process.returncode, errors) == (128 + number, b"")
    assert b"interrupted: 56 cases" in output
    reports = Reports(tmp_path)
    assert reports.found["interrupted"]
    assert [reports.statuses[case.id] for case in FIRST[:4]] == ["pass", "pass", "not run", "not run"]
    assert_none_is_left(tmp_path)


@pytest.mark.full
def test_terminal_that_goes_away(tmp_path):
    """Nothing can be printed, in the middle of the bars."""
    subject(tmp_path, [(FIRST[2], "sleeps with a child")])
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    process = listening(tmp_path, "", *WHICH, "--dtype", "float32", stdout=theirs)
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 120
    while len((tmp_path / "pids").read_text().split()) < 2 or b"6/28" not in shown:
        assert process.poll() is None
        assert time.monotonic() < deadline, shown
        with suppress(BlockingIOError):
            shown += os.read(ours, 1 << 16)
        time.sleep(0.1)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    _, errors = end_of(process)
    assert process.returncode == 128 + signal.SIGHUP, errors.decode()
    assert b"Traceback" not in errors
    assert [Reports(tmp_path).statuses[case.id] for case in FIRST[:3]] == ["pass", "pass", "not run"]
    assert_none_is_left(tmp_path)


@pytest.mark.parametrize("where", ["the oracle", "the cases", "the report"])
def test_ctrl_c_at_any_moment(tmp_path, where):
    """Even where no worker runs."""
    name = {"the oracle": "runner.expected", "the cases": "runner.selected", "the report": "cli.results"}[where]
    code = f"""
import os, signal
from unilabel.conformance import cli, runner
before = {name}
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return before(*arguments)
{name} = interrupted
"""
    process = listening(tmp_path, code, "--backend", "numpy", "--case", "float32/seed/1")
    _, errors = end_of(process)
    assert (process.returncode, errors) == (130, b"")
    if where != "the cases":  # which are made first to see whether --case is right
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["interrupted"] == (where == "the oracle")
        assert found["passed"] == (where == "the report")


def end_of(process):
    try:
        return process.communicate(timeout=120)
    finally:
        process.kill()


def listening(folder, code, *arguments, stdout=subprocess.PIPE):
    """The command, listening to signals, whatever this process does."""
    code += "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    files = ["--json", "results.json", "--junit", "junit.xml", "--html", "page.html"]
    return subprocess.Popen(
        [sys.executable, "-c", code + LISTENING, "conformance", *arguments, *files],
        cwd=folder, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip


# --- Output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["ascii", pytest.param("closed", marks=pytest.mark.full), "full", "gone"])
def test_output_that_takes_nothing(tmp_path, output):
    """Files are written all the same, and there is no traceback."""
    line = {
        "ascii": "PYTHONIOENCODING=ascii {} > printed",
        "closed": "{} >&-",
        "full": "{} > /dev/full",
        "gone": "{{ {}; echo $? > code; }} | true",
    }[output]
    command = f"{sys.executable} -m unilabel.conformance conformance --backend numpy --case float32/seed/1"
    line = line.format(f"{command} --json results.json --html page.html")
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    code = int((tmp_path / "code").read_text()) if output == "gone" else done.returncode
    assert code == (output == "full")  # a report that was asked for is lost
    assert json.loads((tmp_path / "results.json").read_text())["passed"]
    assert "<title>✓" in (tmp_path / "page.html").read_text("utf-8")
    assert ("cannot print: " in done.stderr) == (output == "full")
    assert done.stderr.count("\n") == (output == "full")
    if output == "ascii":
        assert "1 cases on numpy: all match the oracle" in (tmp_path / "printed").read_text("ascii")


def test_brackets_in_a_name_are_no_markup(tmp_path):
    (tmp_path / "[red].py").write_text(NONE)
    done = run(tmp_path, "--subject=[red]:softmax_nll", "--backend=numpy", "--dtype=float32", "--case=seed")
    assert "15 cases on [red]:softmax_nll numpy: nothing was checked" in done.stdout.decode()
    assert "[red]:softmax_nll numpy: nothing was checked, as" in done.stdout.decode()


def test_each_call_and_kind_of_tensor_is_judged(tmp_path):
    """A loss that is wrong only the first time it is called in a case; and results that are no tensors of its kind."""
    (tmp_path / "calls.py").write_text(
        "import unilabel\n"
        "calls = []\n"
        "does = [lambda x: x * 2, lambda x: x, lambda x: x, lambda x: x,\n"
        "        lambda x: x.to_sparse(), lambda x: x.detach().numpy()]\n"
        "def softmax_nll(logits, targets, *, reduction='mean'):\n"
        "    calls.append(1)\n"
        "    return does[len(calls) - 1](unilabel.softmax_nll(logits, targets, reduction=reduction))\n"
    )
    done = run(tmp_path, "--subject=calls:softmax_nll", "--backend=torch", "--case=float32/seed/[2356]")
    assert done.returncode == 1
    cases = {case["id"]: case for case in Reports(tmp_path).run["cases"]}
    assert [case["status"] for case in cases.values()] == ["fail", "pass", "fail", "fail"]
    assert cases["float32/seed/2"]["verdicts"]["value"]["how"] == "the loss"
    assert "ValueError: Expected values to read." in cases["float32/seed/5"]["reason"]
    assert "Received: ('numpy', 'float32', (), 'cpu')" in cases["float32/seed/6"]["reason"]
