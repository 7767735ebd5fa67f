"""The suite as pytest tests, one for each case and column: pytest --pyargs unilabel.conformance --subject ….

Imports are absolute: in a checkout pytest finds this file in a folder outside the package.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from unilabel.conformance.cases import FLAGS
from unilabel.conformance.processes import Signals
from unilabel.conformance.pytest_plugin import job_of
from unilabel.conformance.report import failure, results
from unilabel.conformance.runner import Column, columns, run
from unilabel.conformance.worker import selected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    job = job_of(metafunc.config)
    titles = {column: str(column).replace(" ", "-") for column in columns(job)}
    if "identity" in metafunc.fixturenames:
        chosen = selected(job.dtypes, job.seed, job.patterns, job.full)
        cases = [
            pytest.param(column, case.id, id=f"{titles[column]}-{case.id}") for column in titles for case in chosen
        ]
        metafunc.parametrize(("column", "identity"), cases)
    else:
        metafunc.parametrize("column", list(titles), ids=titles.values())


@pytest.fixture(scope="session")
def found(pytestconfig: pytest.Config) -> dict[Column, dict[str, Any]]:
    """The answers of each subject on each backend: the first test that asks runs them all."""
    job = job_of(pytestconfig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the workers import from where pytest does
        with Signals() as signals:
            chosen, runs, interrupted = run(job, lambda pair, done, total: None)
    if interrupted:
        pytest.exit("interrupted", returncode=128 + signals.number)
    found = results(job, chosen, runs)["runs"]
    return {
        ran.column: {**run, "cases": {case["id"]: case for case in run["cases"]}}
        for ran, run in zip(runs, found, strict=True)
    }


def test_runs_to_its_end(found: dict[Column, dict[str, Any]], column: Column) -> None:
    problem = found[column]["problem"]
    if problem:
        pytest.fail(problem, pytrace=False)


def test_case(found: dict[Column, dict[str, Any]], column: Column, identity: str) -> None:
    case = found[column]["cases"][identity]
    if case["status"] == "not applicable":
        pytest.skip(case["reason"])
    if case["status"] == "not run":
        pytest.fail(f"not run: {found[column]['problem']}", pytrace=False)
    if case["status"] == "fail":
        flags = [f"{flag}: {FLAGS[flag]}" for flag in case["flags"]]
        pytest.fail("\n".join([failure(case), case["call"], *flags]), pytrace=False)
