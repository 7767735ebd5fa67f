"""Runs the cases in a process for each column and dtype, and judges each answer as it comes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from unilabel.backend import BUILT_IN, ENTRY_POINTS

from . import calls
from .cases import DTYPES, FAMILIES, FULL, LOSSES, Case
from .modes import MODES, has
from .oracle import Expected, expected
from .processes import Ended, Processes
from .subjects import OURS, claimed, named
from .tolerances import Verdict, judge
from .worker import selected

CRASHES = 3  # of the processes of a column, in a dtype: after so many the rest is given up


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
    way: calls.Way = calls.Way()  # how a package.module:function is called


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
    """Whether there is a module of that name, which has no dots: to look behind one would import what is before it."""
    try:
        return "." not in name and importlib.util.find_spec(name) is not None
    except ValueError:  # no module can have that name, or something blocks its import
        return False


def _is_here(name: str) -> bool:
    """Whether there is a module of that name, installed or in the working directory, where workers look last."""
    return is_installed(name) or importlib.machinery.PathFinder.find_spec(name, [os.getcwd()]) is not None


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
        if not _is_here(root):  # to know more, one would have to import it
            return "--subject", f"{known} (no module named {root!r}, installed or in {os.getcwd()})."
        if claimed(subject, job.loss) not in LOSSES:
            return "--loss", f"{subject!r} has the name of no loss. Say which it is: one of {', '.join(LOSSES)}."
        refused = calls.wrong(job.way, claimed(subject, job.loss))
        if refused:
            return refused
    if job.way != calls.Way() and not any(":" in subject for subject in job.subjects):
        return "--subject", "expected a package.module:function beside --call, --reduction, --targets and --axis."
    for pattern in job.patterns:
        if not selected(job.dtypes, job.seed, [pattern], job.full):
            families = [f"{name} (with --full)" if name in FULL and not job.full else name for name in FAMILIES]
            return "--case", f"no case matches {pattern!r}. Families: {', '.join(families)}."
    for mode in job.modes:
        if mode not in MODES:
            return "--mode", f"{mode!r} is none of {', '.join(MODES)}."
        if not any(column.mode == mode for column in columns(job)):
            return "--mode", f"{', '.join(job.backends)} has no {mode} mode."
    if not 0 < job.timeout < math.inf:  # NaN is neither
        return "--timeout", f"expected a positive number of seconds, received {job.timeout:g}."
    if job.jobs < 1:
        return "--jobs", f"expected 1 or more processes, received {job.jobs}."
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
    chosen: list[Case] = []
    processes = Processes()
    counts = {column: itertools.count() for column in columns(job)}

    def part(column: Column, dtype: str) -> Run:
        cases = [case for case in chosen if case.dtype == dtype]
        result, left, crashes = Run(column, "", "", {}, {}, ""), deque(cases), 0

        def answered(answer: dict[str, Any]) -> None:
            case = left.popleft()
            answer, result.verdicts[case.id] = _judged(case, exact[case.id], answer, column.backend)
            result.answers[case.id] = answer
            progress(column, next(counts[column]), len(chosen))

        if column.backend in BUILT_IN and not is_installed(column.backend):
            return result._replace(problem=f"not installed: pip install 'unilabel[{column.backend}]'")
        while left and not result.problem:
            order = {**job._asdict(), **column._asdict(), "dtypes": [dtype], "first": len(cases) - len(left)}
            ready = False
            try:
                with closing(processes.messages(order, dtype, job.timeout)) as messages:
                    for message in messages:
                        if "problem" in message:
                            raise Ended(message["problem"])
                        if "version" in message and not ready:
                            device = str(message.get("device"))
                            result = result._replace(version=str(message["version"]), device=device)
                        elif "ready" in message:
                            ready = True
                        elif left and message.get("id") == left[0].id:
                            answered(message)
                        else:
                            raise Ended(f"an answer to no case: {message.get('id')!r}")
                if left:
                    raise Ended("it is done, it says, before the last case")
            except Ended as ended:
                if processes.stopped or not (ready and left):
                    whose = f"{column.subject} cannot be used: " if result.version and not ready else ""
                    return result._replace(problem=f"{whose}{ended}")
                crashes += 1
                answered({"error": f"{ended}"})
                if crashes == CRASHES and left:
                    result = result._replace(problem=f"given up in {dtype} after {CRASHES} crashes, the last: {ended}")
        while left and not processes.stopped:
            answered({"error": result.problem})
        return result

    parts: dict[Column, list[Future[Run]]] = {column: [] for column in counts}
    with ThreadPoolExecutor(max_workers=job.jobs) as pool:
        try:
            chosen = selected(job.dtypes, job.seed, job.patterns, job.full)
            exact = {case.id: expected(case) for case in chosen}
            for column in counts:
                progress(column, next(counts[column]), len(chosen))
            dtypes = list(dict.fromkeys(case.dtype for case in chosen))
            for column, futures in parts.items():
                for dtype in dtypes:
                    futures.append(pool.submit(part, column, dtype))
            for futures in parts.values():
                for future in futures:
                    future.result()
        except KeyboardInterrupt:
            processes.stop()
        runs = [
            _joined([future.result() for future in futures] or [Run(column, "", "", {}, {}, "interrupted")])
            for column, futures in parts.items()
        ]
    return chosen, runs, processes.stopped


def _judged(
    case: Case, exact: Expected, answer: dict[str, Any], backend: str
) -> tuple[dict[str, Any], dict[str, Verdict]]:
    """An answer and its verdicts: of one that has no value, or cannot be read, an error."""
    if "error" in answer or "not applicable" in answer:
        return answer, {}
    try:
        verdicts = judge(case, exact, answer["numbers"], backend)
        if "value" in verdicts:
            return answer, verdicts
        return {"error": "no value"}, {}
    except Exception as error:  # a worker wrote what it should not
        return {"error": f"no numbers to compare: {type(error).__name__}: {error}"}, {}


def describe(name: str) -> dict[str, Any]:
    """The version and devices of a backend's framework, or why it does not load; in its own process."""
    try:
        with closing(Processes().messages({"backend": name, "describe": True}, "float32", 60.0)) as messages:
            found = next(messages)
    except Ended as ended:
        found = {"problem": str(ended)}
    return {"version": "does not load", "devices": [found["problem"]]} if "problem" in found else found


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
