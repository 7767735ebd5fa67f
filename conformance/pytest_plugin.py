"""The options of `pytest --pyargs unilabel.conformance`, and the job that they ask for; the tests are in `test_cases`.

pytest parses its options before it reads the conftest.py of a package that --pyargs names. So this is a plugin: every
run of pytest loads it where unilabel is installed. It imports little, and adds its options only if the suite is named.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .runner import Job

SUITE = "unilabel.conformance"
REPEATABLE: dict[str, Any] = {"action": "append", "metavar": "NAME"}
OPTIONS: dict[str, dict[str, Any]] = {
    "--subject": REPEATABLE
    | {"help": "unilabel (default); native: the framework's own; keras; package.module:function"},
    "--backend": REPEATABLE | {"help": "repeatable; default: all installed"},
    "--dtype": REPEATABLE | {"help": "repeatable; default: float32 and float64"},
    "--case": REPEATABLE | {"metavar": "PATTERN", "help": "families or case ids; * and ? match"},
    "--device": {"metavar": "NAME", "help": "'cpu', 'cuda', or a name that `unilabel backends` lists"},
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "seed of the random cases; default: 0"},
    "--loss": {"metavar": "NAME", "help": "the loss that package.module:function claims to be; default: its name"},
    "--call": {"metavar": "CALL", "help": "how that is called: 'f(targets, logits, weight=weight)'"},
    "--reduction": {"metavar": "NAME", "help": "what that returns, if it takes no reduction: none, mean, …"},
    "--targets": REPEATABLE
    | {"metavar": "KIND", "help": "targets that it takes: int64, float, onehot, positives; repeatable"},
    "--axis": {"type": int, "metavar": "N", "help": "its class axis, if it takes no axis; default: the last"},
    "--mode": REPEATABLE | {"help": "eager (default), graph, compiled; repeatable"},
    "--timeout": {"type": float, "metavar": "SECONDS", "help": "to wait for an answer of a process; default: 300"},
    "--full": {"action": "store_true", "help": "the large cases too, and all modes"},
}


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None]:
    yield
    if not _named([*args, *early_config.getini("testpaths")]):
        return
    group = parser.getgroup(SUITE)
    absent = object()
    for name, how in OPTIONS.items():
        # If the project's own conftest.py has an option of that name, that one is read.
        if early_config.getoption(name, absent) is absent:
            group.addoption(name, **how)


def pytest_configure(config: pytest.Config) -> None:
    if _named(config.args):
        job_of(config)  # here a wrong option is a usage error


def _named(arguments: list[str]) -> bool:
    return any(argument.startswith(SUITE) for argument in arguments)


def job_of(config: pytest.Config) -> Job:
    """What the options ask for."""
    try:
        from .calls import Way
        from .modes import MODES
        from .runner import Job, installed, wrong
    except ModuleNotFoundError as missing:
        if missing.name != "mpmath":
            raise
        raise pytest.UsageError(f"{SUITE} needs {missing.name}: pip install 'unilabel[conformance]'") from None

    def given(name: str) -> tuple[str, ...]:
        value = config.getoption(name, None) or ()
        return tuple(dict.fromkeys([value] if isinstance(value, str) else value))

    full, timeout = bool(config.getoption("--full", False)), config.getoption("--timeout", None)
    job = Job(
        subjects=given("--subject") or ("unilabel",),
        backends=given("--backend") or installed(),
        device=config.getoption("--device", None),
        dtypes=given("--dtype") or ("float32", "float64"),
        seed=config.getoption("--seed", None) or 0,
        patterns=given("--case"),
        loss=config.getoption("--loss", None),
        modes=given("--mode") or (tuple(MODES) if full else ("eager",)),
        full=full,
        jobs=os.cpu_count() or 1,
        timeout=300.0 if timeout is None else float(timeout),
        way=Way(
            config.getoption("--call", None),
            config.getoption("--reduction", None),
            given("--targets"),
            config.getoption("--axis", None),
        ),
    )
    refused = wrong(job)
    if refused:
        raise pytest.UsageError(": ".join(refused))
    return job
