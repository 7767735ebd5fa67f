"""What a run found: a table for people, JSON for programs."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from .cases import FAMILIES, Case
from .compare import Verdict
from .runner import Job, Run

FAILURES_SHOWN = 5  # of each backend; --json has all


def passed(runs: list[Run]) -> bool:
    return all(not run.problem and not any(_failures(run)) for run in runs)


def show(console: Console, chosen: list[Case], runs: list[Run]) -> None:
    """The table family × backend, then what failed."""
    console.print("Worst error in ULP: of values, of gradients")
    table = Table()
    table.add_column("family", no_wrap=True)
    table.add_column("cases", justify="right")
    for run in runs:
        table.add_column(f"{run.backend}\n{run.version or '-'}", justify="right", no_wrap=True)
    for family in FAMILIES:
        cases = [case for case in chosen if case.family == family]
        if cases:
            table.add_row(family, str(len(cases)), *(_cell(cases, run) for run in runs))
    console.print(table)
    by_id = {case.id: case for case in chosen}
    for run in runs:
        if run.problem:
            console.print(f"{run.backend}: {run.problem}", style="red", markup=False, soft_wrap=True)
        failures = list(_failures(run))
        for identity, what, verdict in failures[:FAILURES_SHOWN]:
            options = ", ".join(f"{k}={_plain(v)}" for k, v in by_id[identity].options.items())
            console.print(
                f"{run.backend}: {identity} {by_id[identity].loss}({options}) {what}: {verdict.failure} "
                f"({_number(verdict.ulp)} ULP, allowed {_number(verdict.bound)})",
                style="red", markup=False, soft_wrap=True,
            )  # fmt: skip
        if len(failures) > FAILURES_SHOWN:
            console.print(f"{run.backend}: and {len(failures) - FAILURES_SHOWN} failures more", style="red")
    verdict = "all match the oracle" if passed(runs) else "NOT all match the oracle"
    console.print(f"{len(chosen)} cases on {', '.join(run.backend for run in runs)}: {verdict}")


def as_json(job: Job, chosen: list[Case], runs: list[Run]) -> str:
    """The results, values as exact hexadecimal floats."""
    return json.dumps(
        {
            "seed": job.seed,
            "dtypes": job.dtypes,
            "passed": passed(runs),
            "backends": [
                {
                    "backend": run.backend,
                    "version": run.version,
                    "device": run.device,
                    "problem": run.problem,
                    "cases": [
                        {
                            "id": identity,
                            **answer,
                            **{f"{what} verdict": _fields(v) for what, v in run.verdicts[identity].items()},
                        }
                        for identity, answer in run.answers.items()
                    ],
                }
                for run in runs
            ],
        },
        indent=1,
    )


def _failures(run: Run) -> Any:
    for identity, verdicts in run.verdicts.items():
        for what, verdict in verdicts.items():
            if verdict.failure:
                yield identity, what, verdict


def _cell(cases: list[Case], run: Run) -> str:
    verdicts = [run.verdicts.get(case.id) for case in cases]
    if None in verdicts:
        return "[red]not run[/red]"
    cells = []
    for what in ("value", "gradient"):
        of_what = [v[what] for v in verdicts if v is not None]
        failed = sum(bool(v.failure) for v in of_what)
        worst = _number(max(v.ulp for v in of_what))
        cells.append(f"[red]{failed} fail[/red]" if failed else worst)
    return f"{cells[0]}, {cells[1]} " + ("[red]✗[/red]" if "fail" in "".join(cells) else "[green]✓[/green]")


def _fields(verdict: Verdict) -> dict[str, Any]:
    return {
        "ulp": verdict.ulp if math.isfinite(verdict.ulp) else "inf",
        "bound": verdict.bound,
        "failure": verdict.failure,
    }


def _number(ulp: float) -> str:
    return f"{ulp:.1f}" if ulp < 1e4 else f"{ulp:.0e}" if math.isfinite(ulp) else "∞"


def _plain(value: Any) -> str:
    return f"[{len(value.values)} values]" if hasattr(value, "values") else repr(value)
