"""The results of a run: as data to keep (JSON), and as a table in the terminal; see also `html` and `junit`."""

from __future__ import annotations

import math
import platform
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import unilabel

from .cases import FAMILIES, FLAGS, GRADIENTS, Case, Tensor
from .runner import Job, Run
from .tolerances import Verdict

FAILURES_SHOWN = 5  # in full, for each column
KEPT = 4096  # logits: of larger cases, only the verdicts are kept
FORMAT = 2  # of the data
Results = dict[str, Any]


def results(job: Job, chosen: list[Case], runs: list[Run], interrupted: bool = False) -> Results:
    """Everything, ready for JSON: numbers as exact hexadecimal floats, so that two runs can be compared."""
    found: Results = {
        "format": FORMAT,
        "unilabel": unilabel.__version__,
        "python": platform.python_version(),
        "seed": job.seed,
        "dtypes": list(job.dtypes),
        "patterns": list(job.patterns),
        "modes": list(job.modes),
        "way": job.way._asdict(),
        "full": job.full,
        "interrupted": interrupted,
        "flags": FLAGS,
        "runs": [
            {
                **run.column._asdict(),
                "title": str(run.column),
                "version": run.version,
                "device": run.device,
                "problem": run.problem,
                "cases": [_case(case, run) for case in chosen],
            }
            for run in runs
        ],
    }
    for run in found["runs"]:
        run["problem"] = run["problem"] or _unchecked(run)
    return visible(found | {"passed": passed(found)})


def visible(data: Any) -> Any:
    """The data with what its texts hide written out: control characters, marks that reorder text, lone surrogates.

    A loss has a say in the texts of its errors. Ends of lines stay.
    """
    if isinstance(data, str) and not data.isprintable():
        shown = [c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in data]
        return "".join(shown)
    if isinstance(data, dict):
        return {key: visible(value) for key, value in data.items()}
    return list(map(visible, data)) if isinstance(data, list) else data


def _unchecked(run: dict[str, Any]) -> str:
    """Why nothing was checked in a column; empty if something was."""
    if checked(run):
        return ""
    reasons = Counter(case["reason"] or case["status"] for case in run["cases"])
    counts = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"nothing was checked, as no case applies: {counts}"


def _case(case: Case, run: Run) -> dict[str, Any]:
    answer = run.answers.get(case.id, {})
    status = run.status(case.id)
    return {
        "id": case.id,
        "family": case.family,
        "dtype": case.dtype,
        "loss": case.loss,
        "flags": list(case.flags),
        "size": math.prod(case.shape),
        "call": call(case) if status == "fail" else "",
        "status": status,
        "reason": str(answer.get("error", "") or answer.get("not applicable", "")),
        "verdicts": {name: _verdict(verdict) for name, verdict in run.verdicts.get(case.id, {}).items()},
        "numbers": {} if math.prod(case.shape) > KEPT else answer.get("numbers", {}),
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    ulp = verdict.ulp if math.isfinite(verdict.ulp) else "inf"
    failure = {"how": verdict.how, "element": verdict.element, "got": verdict.got, "right": verdict.right}
    return {"ulp": ulp, "bound": verdict.bound, **(failure if verdict.failed else {})}


def call(case: Case) -> str:
    """The case as one would write it."""
    options = "".join(f", {name}={_literal(value)}" for name, value in case.options.items())
    weight = "" if case.linear_weight is None else f"{_literal(case.linear_weight)}, "
    targets = f"Positives({_literal(case.targets)})" if case.positives else _literal(case.targets)
    return f"{case.loss}({_literal(case.logits)}, {weight}{targets}{options})"


def _literal(value: Any, most: int = 12) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if len(value.values) > most:
        return f"[{', '.join(map(_number, value.values[:3]))}, … {len(value.values)} numbers]"

    def nested(values: list[Any], shape: tuple[int, ...]) -> str:
        if not shape:
            return _number(values[0])
        step = math.prod(shape[1:])
        return "[" + ", ".join(nested(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])) + "]"

    return nested(value.values, value.shape)


def _number(x: Any) -> str:
    return f"{x:.9g}" if isinstance(x, float) else repr(x)


# --- Readings of the data ---------------------------------------------------------------------------------------------


def checked(run: dict[str, Any]) -> bool:
    """Whether any case of a column was judged."""
    return any(case["status"] in ("pass", "fail") for case in run["cases"])


def passed(found: Results) -> bool:
    """Whether in every column cases apply, and each that does was run and is right."""
    return bool(found["runs"]) and all(
        not run["problem"]
        and checked(run)
        and all(case["status"] in ("pass", "not applicable") for case in run["cases"])
        for run in found["runs"]
    )


def exit_code(found: Results) -> int:
    """0 if it passed; 1 if an answer is wrong, or a framework is missing; 2 if nothing was checked in a column."""
    if passed(found):
        return 0
    if any(case["status"] == "fail" for run in found["runs"] for case in run["cases"]):
        return 1
    return 2 if any(run["version"] and not checked(run) for run in found["runs"]) else 1


def left_out(run: dict[str, Any]) -> list[tuple[str, int]]:
    """Why cases of a column are not applicable, and how many, the most frequent reason first."""
    return Counter(case["reason"] for case in run["cases"] if case["status"] == "not applicable").most_common()


def only_values(run: dict[str, Any]) -> bool:
    """Whether no derivative was compared, as the framework has none."""
    return quantities(run) == ["value"] and any("value" in case["verdicts"] for case in run["cases"])


def quantities(run: dict[str, Any]) -> list[str]:
    """The quantities that a column computed for any case."""
    return [name for name in QUANTITIES if name == "value" or any(name in case["verdicts"] for case in run["cases"])]


def failure(case: dict[str, Any]) -> str:
    """The result and the right answer, in words: for the worst quantity of a case that failed."""
    failed = {name: verdict for name, verdict in case["verdicts"].items() if "how" in verdict}
    if not failed:
        return str(case["reason"])
    name, worst = max(failed.items(), key=lambda item: float(item[1]["ulp"]))
    return (
        f"{QUANTITIES[name]} by {worst['how']}, element {worst['element']}: {worst['got']}, right is {worst['right']} "
        f"({ulps(worst['ulp'])} ULP, allowed {ulps(worst['bound'])})"
    )


def smallest_failures(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each flag, and for "other", the failed case with the fewest numbers."""
    found: dict[str, dict[str, Any]] = {}
    for case in run["cases"]:
        if case["status"] == "fail":
            for flag in case["flags"] or ["other"]:
                if flag not in found or case["size"] < found[flag]["size"]:
                    found[flag] = case
    return {flag: found[flag] for flag in [*FLAGS, "other"] if flag in found}


def ulps(ulp: Any) -> str:
    ulp = float(ulp)
    return f"{ulp:.2f}" if ulp < 1 else f"{ulp:.1f}" if ulp < 1e4 else f"{ulp:.0e}" if math.isfinite(ulp) else "∞"


# --- The terminal -----------------------------------------------------------------------------------------------------


def console(width: int | None = None) -> Console:
    """Prints texts as they are: brackets and colons in a name or an error are no markup."""
    return Console(width=width, markup=False, emoji=False, highlight=False)


def show(console: Console, found: Results) -> None:
    """Prints the table family × column, then for each flag the failure with the smallest input."""
    runs = found["runs"]
    console.print("Worst error / bound, in ULP, of values, gradients and Hessian diagonals")
    table = Table()
    table.add_column("family", no_wrap=True)
    table.add_column("cases", justify="right", no_wrap=True)
    for run in runs:
        table.add_column(f"{run['title']}\n{run['version'] or '-'}", justify="right")
    for family in FAMILIES:
        columns = [[case for case in run["cases"] if case["family"] == family] for run in runs]
        if columns and columns[0]:
            table.add_row(family, str(len(columns[0])), *map(_cell, columns))
    console.print(table)
    for run in runs:
        if run["problem"]:
            _line(console, f"{run['title']}: {run['problem']}")
        failures = smallest_failures(run)
        for flag, case in list(failures.items())[: None if run["subject"] != "unilabel" else FAILURES_SHOWN]:
            _line(console, f"{run['title']}: {flag}: {case['id']}: {failure(case)}")
            console.print(f"    {case['call']}", soft_wrap=True)
            if flag in found["flags"]:
                console.print(f"    {found['flags'][flag]}", style="dim", soft_wrap=True)
    for run in runs:
        counts = {status: sum(case["status"] == status for case in run["cases"]) for status in STATUSES}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        only = " (values only: there is no gradient)" if only_values(run) else ""
        console.print(f"{run['title']}: {said}{only}", soft_wrap=True)
        for reason, count in left_out(run):
            text = f"    {count} not applicable: {reason}"
            console.print(text, style="dim", soft_wrap=True)
    verdict = "all match the oracle" if passed(found) else "NOT all match the oracle"
    verdict = verdict if any(map(checked, runs)) else "nothing was checked"
    stopped = "interrupted: " if found["interrupted"] else ""
    console.print(
        f"{stopped}{len(runs[0]['cases'])} cases on {', '.join(run['title'] for run in runs)}: {verdict}",
        soft_wrap=True,
    )


QUANTITIES = {
    "value": "value",
    "gradient": "gradient",
    "hessian": "Hessian",
    "linear_weight_gradient": "gradient by weight",
    "linear_bias_gradient": "gradient by bias",
    "target_gradient": "gradient by targets",
}
STATUSES = ("pass", "fail", "not applicable", "not run")


def _line(console: Console, text: str) -> None:
    console.print(text.replace("\n", "\n    "), style="red", soft_wrap=True)


def _cell(cases: list[dict[str, Any]]) -> Text:
    counts = {status: sum(case["status"] == status for case in cases) for status in STATUSES}
    if counts["not applicable"] == len(cases):
        return Text("n/a", style="dim")
    if counts["not run"]:
        return Text("not run", style="red")
    if counts["fail"]:
        return Text(f"{counts['fail']} of {len(cases) - counts['not applicable']} fail ✗", style="red")
    said = _closest(cases, "value"), _closest(cases, *GRADIENTS.values(), "target_gradient"), _closest(cases, "hessian")
    return Text(" ".join(said)) + Text(" ✓", style="green")


def _closest(cases: list[dict[str, Any]], *quantities: str) -> str:
    """The error that came closest to its bound, and the bound."""
    verdicts = [case["verdicts"][name] for case in cases for name in quantities if name in case["verdicts"]]
    found = max(verdicts, key=lambda verdict: float(verdict["ulp"]) / (verdict["bound"] or 1), default=None)
    return "-" if found is None else f"{_short(float(found['ulp']))}/{_short(found['bound'])}"


def _short(ulp: float) -> str:
    return f"{ulp:.2g}" if ulp < 10 else f"{ulp:.0f}"
