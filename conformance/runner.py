"""Runs the cases in a process for each column and dtype, and judges each answer as it comes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from unilabel.backend import BUILT_IN, ENTRY_POINTS

from .cases import DTYPES, FAMILIES, LOSSES, Case
from .modes import MODES, has
from .oracle import expected
from .subjects import OURS, claimed, named
from .tolerances import Verdict, judge
from .worker import selected


class Job(NamedTuple):
    """What to run."""

    subjects: tuple[str, ...]
    backends: tuple[str, ...]
    device: str | None
    dtypes: tuple[str, ...]
    seed: int
    patterns: tuple[str, ...]
    loss: str | None = None  # the loss that a package.module:function claims to be
    modes: tuple[str, ...] = ("eager",)
    full: bool = False
    jobs: int = 2
    timeout: float = 300.0  # seconds to wait for an answer


class Column(NamedTuple):
    """Whose loss, on which backend, run in which of `modes.MODES`."""

    subject: str
    backend: str
    mode: str

    def __str__(self) -> str:
        named = self.backend if self.subject == "unilabel" else f"{self.subject} {self.backend}"
        return named if self.mode == "eager" else f"{named} {self.mode}"


class Run(NamedTuple):
    """The answers of a column. `problem` says why some are missing; empty if none is."""

    column: Column
    version: str
    device: str
    answers: dict[str, dict[str, Any]]  # by the case's id, as `worker.answer` has them
    verdicts: dict[str, dict[str, Verdict]]  # of the cases that have numbers
    problem: str

    def status(self, identity: str) -> str:
        """'pass', 'fail', 'not applicable' or 'not run'."""
        answer = self.answers.get(identity)
        if answer is None:
            return "not run"
        if "not applicable" in answer:
            return "not applicable"
        failed = "error" in answer or any(verdict.failed for verdict in self.verdicts[identity].values())
        return "fail" if failed else "pass"


Progress = Callable[[Column, int, int], None]


def installed() -> tuple[str, ...]:
    """The built-in backends whose framework is installed."""
    return tuple(filter(is_installed, BUILT_IN))


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # no module can have that name, or something blocks its import
        return False


def wrong(job: Job) -> tuple[str, str] | None:
    """A wrong option of a job and what is wrong with it, or None. A missing framework is a failure instead."""
    for dtype in set(job.dtypes) - set(DTYPES):
        return "--dtype", f"{dtype!r} is none of {', '.join(DTYPES)}."
    for name in set(job.backends) - set(BUILT_IN):
        if not is_installed(name) and not entry_points(group=ENTRY_POINTS, name=name):
            return "--backend", f"{name!r} is none of {', '.join(BUILT_IN)}, nor a module here."
    if job.loss not in (None, *LOSSES):
        return "--loss", f"{job.loss!r} is none of {', '.join(LOSSES)}."
    for subject in job.subjects:
        if subject in OURS:
            continue
        known = f"{subject!r} is none of {', '.join(OURS)}, nor a package.module:function here"
        try:
            (root, *_), _ = named(subject)
        except ValueError as error:
            return "--subject", f"{known} ({error})."
        if not is_installed(root):  # to know more, one would have to import it
            return "--subject", f"{known} (no module named {root!r})."
        if claimed(subject, job.loss) not in LOSSES:
            return "--loss", f"{subject!r} has the name of no loss. Say which it is: one of {', '.join(LOSSES)}."
    for pattern in job.patterns:
        if not selected(job.dtypes, job.seed, [pattern], job.full):
            return "--case", f"no case matches {pattern!r}. Families: {', '.join(FAMILIES)}."
    for mode in job.modes:
        if mode not in MODES:
            return "--mode", f"{mode!r} is none of {', '.join(MODES)}."
        if not any(column.mode == mode for column in columns(job)):
            return "--mode", f"{', '.join(job.backends)} has no {mode} mode."
    return None


def columns(job: Job) -> list[Column]:
    """The columns to run: Keras on its TensorFlow backend only, and each backend in the modes that it has."""
    found = [
        Column(subject, backend, mode)
        for subject in job.subjects
        for backend in (("tensorflow",) if subject == "keras" else job.backends)
        for mode in job.modes
        if has(backend, mode)
    ]
    return list(dict.fromkeys(found))


def run(job: Job, progress: Progress) -> tuple[list[Case], list[Run], bool]:
    """The cases, a Run for each column, and whether Ctrl-C interrupted it: then the Runs have what came before."""
    chosen = selected(job.dtypes, job.seed, job.patterns, job.full)
    exact = {case.id: expected(case) for case in chosen}
    done = dict.fromkeys(columns(job), 0)
    processes: set[subprocess.Popen[str]] = set()
    stopped = threading.Event()

    def part(column: Column, dtype: str) -> Run:
        backend = column.backend
        cases = {case.id: case for case in chosen if case.dtype == dtype}
        result = Run(column, "", "", {}, {}, "")
        if stopped.is_set():
            return result._replace(problem="not run: interrupted")
        if backend in BUILT_IN and not is_installed(backend):
            return result._replace(problem=f"not installed: pip install 'unilabel[{backend}]'")
        order = {**job._asdict(), **column._asdict(), "dtypes": [dtype]}
        for line in _process(order, dtype, job.timeout, processes):
            if "id" in line:
                identity = line.pop("id")
                result.answers[identity] = line
                if "numbers" in line:
                    verdicts = judge(cases[identity], exact[identity], line["numbers"], backend)
                    result.verdicts[identity] = verdicts
                done[column] += 1
                progress(column, done[column], len(chosen))
            elif "version" in line:
                result = result._replace(version=line["version"], device=line["device"])
            elif stopped.is_set():
                result = result._replace(problem="interrupted")
            elif line["code"]:
                result = result._replace(problem=f"{line['last']} (exit code {line['code']} before the end)")
        return result

    for column in done:
        progress(column, 0, len(chosen))
    with ThreadPoolExecutor(max_workers=job.jobs) as pool:
        parts = {column: [pool.submit(part, column, dtype) for dtype in job.dtypes] for column in done}
        try:
            for futures in parts.values():
                for future in futures:
                    future.result()
        except KeyboardInterrupt:
            stopped.set()
            for process in list(processes):
                process.kill()
        runs = [_joined([future.result() for future in futures]) for futures in parts.values()]
    return chosen, runs, stopped.is_set()


def describe(name: str) -> dict[str, Any]:
    """The version and devices of a backend's framework, or its last line of output if it fails; in its own process."""
    *said, end = _process({"backend": name, "describe": True}, "float32", 60.0, set())
    return said[0] if said else {"version": "does not load", "devices": [end["last"]]}


def _joined(parts: list[Run]) -> Run:
    """The Runs of a column in each dtype, as one."""
    first = next((part for part in parts if part.version), parts[0])
    answers: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, dict[str, Verdict]] = {}
    for part in parts:
        answers |= part.answers
        verdicts |= part.verdicts
    problems = dict.fromkeys(part.problem for part in parts if part.problem)
    return first._replace(answers=answers, verdicts=verdicts, problem="; ".join(problems))


def _process(
    order: dict[str, Any], dtype: str, timeout: float, processes: set[subprocess.Popen[str]]
) -> Iterator[dict[str, Any]]:
    """What a worker writes, line by line, and then how it ended: a crash is one line of the report, not its end."""
    # JAX has float64 only if this is set.
    environment = os.environ | ({"JAX_ENABLE_X64": "1"} if dtype == "float64" else {})
    # -P: import the installed unilabel, not one in the current folder.
    command = [sys.executable, "-P", "-m", f"{__package__}.worker", json.dumps(order)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        processes.add(process)
        assert process.stdout is not None
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            process.kill()

        while True:
            watch = threading.Timer(timeout, give_up)
            watch.start()
            line = process.stdout.readline()
            watch.cancel()
            if not line:
                break
            yield json.loads(line)
        code = process.wait()
        processes.discard(process)
        errors.seek(0)
        last = " ".join([line.strip() for line in errors if line.strip()][-1:])
        yield {"code": code, "last": f"no answer for {timeout:g} s" if hung.is_set() else last}
