"""The command line: `unilabel conformance` and `unilabel backends`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import unilabel
from unilabel.backend import BUILT_IN

from .cases import DTYPES
from .compare_runs import differences
from .modes import MODES
from .report import passed, results, show
from .runner import Column, Job, columns, describe, installed, run, wrong
from .vectors import FOLDER, files, stale, write


@click.group()
@click.version_option(unilabel.__version__, prog_name="unilabel")
def main() -> None:
    """Losses for every framework's tensors, and the checks that they are right."""


def _file(_: object, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A file to write: its folder must exist before the work begins."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.absolute().parent)!r}.")
    return value


WRITTEN = click.Path(dir_okay=False, path_type=Path)
FOLDERS = click.Path(file_okay=False, path_type=Path)
READ = click.Path(exists=True, dir_okay=False, path_type=Path)


@main.group(invoke_without_command=True)
@click.option("--backend", "backends", multiple=True, metavar="NAME", help="Repeatable. Default: all installed.")
@click.option("--device", metavar="NAME", help="'cpu', 'cuda', or a name that `unilabel backends` lists.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: float32 and float64.")
@click.option("--case", "patterns", multiple=True, metavar="PATTERN", help="Families or case ids; * and ? match.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random cases.")
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    metavar="NAME",
    help="unilabel (default); native: the framework's own; keras; or package.module:function. Repeatable.",
)
@click.option("--loss", metavar="NAME", help="The loss that package.module:function claims to be. Default: its name.")
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(list(MODES)),
    help="eager (default); graph: traced; compiled: by torch.compile, jax.jit, XLA. Repeatable.",
)
@click.option("--full", is_flag=True, help="The large cases too, and all modes (hours, for torch.compile).")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Processes at a time.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds to wait for an answer of a process.")
@click.option("--json", "json_file", type=WRITTEN, callback=_file, metavar="FILE", help="Write the results there.")
@click.option("--junit", "junit_file", type=WRITTEN, callback=_file, metavar="FILE", help="Write a JUnit report there.")
@click.option("--html", "html_file", type=WRITTEN, callback=_file, metavar="FILE", help="Write a web page there.")
@click.pass_context
def conformance(
    context: click.Context,
    backends: tuple[str, ...],
    device: str | None,
    dtypes: tuple[str, ...],
    patterns: tuple[str, ...],
    seed: int,
    subjects: tuple[str, ...],
    loss: str | None,
    modes: tuple[str, ...],
    full: bool,
    jobs: int,
    timeout: float,
    json_file: Path | None,
    junit_file: Path | None,
    html_file: Path | None,
) -> None:
    """Check values, gradients and Hessian diagonals of every loss on every backend against the oracle.

    The gradients are those with respect to logits and float targets.

    The exit code is 0 if all match, 1 if any does not (or a backend asked for is missing), 2 for a wrong call.
    """
    if context.invoked_subcommand is not None:
        return
    job = Job(
        subjects=tuple(dict.fromkeys(subjects)) or ("unilabel",),
        backends=tuple(dict.fromkeys(backends)) or installed(),
        device=device,
        dtypes=dtypes or ("float32", "float64"),
        seed=seed,
        patterns=patterns,
        loss=loss,
        modes=tuple(dict.fromkeys(modes)) or (tuple(MODES) if full else ("eager",)),
        full=full,
        jobs=max(jobs, 1),
        timeout=timeout,
    )
    refused = wrong(job)
    if refused:
        raise click.BadParameter(refused[1], param_hint=refused[0])
    console = Console()
    print(f"seed {seed}, {', '.join(job.dtypes)}", flush=True)
    if console.is_terminal:
        bars = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        with Progress(*bars, console=console, transient=True) as progress:
            tasks = {column: progress.add_task(str(column), total=None) for column in columns(job)}
            ran = run(job, lambda column, done, total: progress.update(tasks[column], completed=done, total=total))
    else:
        ran = run(job, _plain_progress)
        console = Console(width=40 + 26 * len(columns(job)))
    found = results(job, *ran)
    show(console, found)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if junit_file is not None:
        from .junit import junit

        junit_file.write_text(junit(found), encoding="utf-8")
    if html_file is not None:
        from .html import html

        html_file.write_text(html(found), encoding="utf-8")
    sys.exit(130 if found["interrupted"] else 0 if passed(found) else 1)


@conformance.command()
@click.argument("a", type=READ)
@click.argument("b", type=READ)
@click.option("--ulp", default=0.0, show_default=True, help="The largest difference that is allowed, in ULP.")
def compare(a: Path, b: Path, ulp: float) -> None:
    """Compare two saved results number by number: a GPU's with a CPU's, this release's with the last one's.

    The exit code is 0 if they differ nowhere by more than --ulp, 1 if they do, 2 if they are not results.
    """
    try:
        worst = differences(json.loads(a.read_text()), json.loads(b.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise click.UsageError(f"expected two files that --json wrote; received: {error!r}") from error
    table = Table("a", "b", "cases in both", "largest difference, ULP", "in")
    for row in worst:
        table.add_row(row.a, row.b, str(row.cases), f"{row.ulp:.4g}", row.where)
    Console().print(table)
    sys.exit(0 if worst and all(row.ulp <= ulp and row.cases for row in worst) else 1)


@conformance.command()
@click.option("--write", "action", flag_value="write", help="Write the files that are not up to date.")
@click.option("--check", "action", flag_value="check", help="List the outdated files, and where each first differs.")
@click.option("--to", "folder", type=FOLDERS, metavar="FOLDER", default=FOLDER, help="Default: the package's own.")
def vectors(action: str | None, folder: Path) -> None:
    """Write the cases and their answers as JSON files for other languages, or check that the files are up to date.

    The exit code of --check is 0 if they are, 1 if not.
    """
    if action is None:
        raise click.UsageError("expected --write or --check; received neither.")
    if action == "write":
        print("\n".join(f"written: {folder / name}" for name in write(folder)) or "nothing has changed")
        return
    wrong = stale(folder, files())
    for name, why in wrong.items():
        print(f"{name}: {why}")
    print(f"{folder}: {'NOT all' if wrong else 'all'} as the cases and the oracle say")
    sys.exit(bool(wrong))


@main.command()
def backends() -> None:
    """List the frameworks, their versions and devices, and how to install what is missing."""
    table = Table("backend", "version", "devices", "install with")
    here = installed()
    for name in BUILT_IN:
        if name in here:
            found = describe(name)
            table.add_row(name, found["version"], ", ".join(found["devices"]), "")
        else:
            table.add_row(name, "not installed", "", f"pip install 'unilabel\\[{name}]'")
    Console().print(table)


def _plain_progress(column: Column, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{column}: {'started' if not done else 'done'}, {done} of {total} cases", flush=True)
