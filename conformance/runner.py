"""Runs the cases: a process for each backend, a verdict on each answer as it comes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from unilabel.backend import BUILT_IN

from .cases import Case
from .compare import Verdict, judge
from .oracle import expected
from .worker import selected


class Job(NamedTuple):
    """What to run."""

    backends: tuple[str, ...]
    device: str | None
    dtypes: tuple[str, ...]
    seed: int
    patterns: tuple[str, ...]


class Run(NamedTuple):
    """What one backend answered. `problem` is why it did not answer all; empty if it did."""

    backend: str
    version: str
    device: str
    answers: dict[str, dict[str, Any]]  # by the case's id
    verdicts: dict[str, dict[str, Verdict]]
    problem: str


def installed() -> tuple[str, ...]:
    """The built-in backends whose framework is here."""
    return tuple(filter(is_installed, BUILT_IN))


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # no module can be of that name, or this one is kept from being imported
        return False


def run(job: Job, progress: Callable[[str, int, int], None]) -> tuple[list[Case], list[Run]]:
    """All cases on all backends, two processes at a time; `progress` is told (backend, done, total)."""
    chosen = selected(job.dtypes, job.seed, job.patterns)
    exact = {case.id: expected(case) for case in chosen}
    done = dict.fromkeys(job.backends, 0)

    def part(name: str, dtype: str) -> Run:
        cases = {case.id: case for case in chosen if case.dtype == dtype}
        answers: dict[str, dict[str, Any]] = {}
        verdicts: dict[str, dict[str, Verdict]] = {}
        version, device, problem = "", "", ""
        if name in BUILT_IN and not is_installed(name):
            return Run(name, version, device, answers, verdicts, f"not installed: pip install 'unilabel[{name}]'")
        for line in _process({**job._asdict(), "backend": name, "dtypes": [dtype]}, dtype):
            if "id" in line:
                identity = line.pop("id")
                answers[identity] = line
                verdicts[identity] = judge(cases[identity], exact[identity], line, name)
                done[name] += 1
                progress(name, done[name], len(chosen))
            elif "version" in line:
                version, device = line["version"], line["device"]
            elif line["code"]:
                problem = f"{line['last']} (exit code {line['code']} before the end)"
        return Run(name, version, device, answers, verdicts, problem)

    with ThreadPoolExecutor(max_workers=2) as pool:
        for name in job.backends:
            progress(name, 0, len(chosen))
        parts = {name: [pool.submit(part, name, dtype) for dtype in job.dtypes] for name in job.backends}
        return chosen, [_joined([future.result() for future in futures]) for futures in parts.values()]


def _joined(parts: list[Run]) -> Run:
    """What a backend answered in all dtypes."""
    answers: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, dict[str, Verdict]] = {}
    for part in parts:
        answers |= part.answers
        verdicts |= part.verdicts
    return parts[0]._replace(
        answers=answers, verdicts=verdicts, problem="; ".join({part.problem: None for part in parts if part.problem})
    )


def describe(name: str) -> dict[str, Any]:
    """The version and the devices of a backend's framework, or its last words, asked for in a process of its own."""
    *said, end = _process({"backend": name, "describe": True}, "float32")
    return said[0] if said else {"version": "does not load", "devices": [end["last"]]}


def _process(order: dict[str, Any], dtype: str) -> Iterator[dict[str, Any]]:
    """What a worker says, line by line, and at last how it ended: a crash is one line of the report, not its end."""
    # JAX has float64 only where this is set.
    environment = os.environ | ({"JAX_ENABLE_X64": "1"} if dtype == "float64" else {})
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                f"{__package__}.worker",
                json.dumps(order),
            ],  # -P: not what lies in this folder
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
        code = process.wait()
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()][-1:]
        yield {"code": code, "last": " ".join(last)}
