"""The command line: `unilabel conformance` and `unilabel backends`."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import unilabel
from unilabel.backend import BUILT_IN, ENTRY_POINTS

from .cases import DTYPES, FAMILIES
from .report import as_json, passed, show
from .runner import Job, describe, installed, is_installed, run
from .worker import selected


@click.group()
@click.version_option(unilabel.__version__, prog_name="unilabel")
def main() -> None:
    """Losses for every framework's tensors, and the proof that they are right."""


@main.command()
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Run this backend; repeatable. Default: all installed."
)
@click.option("--device", metavar="NAME", help="Run there: 'cpu', 'cuda', or a name that `unilabel backends` lists.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    help="Repeatable. Default: float32 and float64.",
)
@click.option(
    "--case",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help=f"Run these families or case ids (* and ? match); repeatable. Families: {', '.join(FAMILIES)}.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random cases.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the results there."
)
def conformance(
    backends: tuple[str, ...],
    device: str | None,
    dtypes: tuple[str, ...],
    patterns: tuple[str, ...],
    seed: int,
    file: Path | None,
) -> None:
    """Check values and gradients of every loss on every backend against the oracle.

    The exit code is 0 if all match, 1 if any does not (or a backend asked for is missing), 2 for a wrong call.
    """  # fmt: skip
    for name in set(backends) - set(BUILT_IN):
        if not is_installed(name) and not entry_points(group=ENTRY_POINTS, name=name):
            known = ", ".join(BUILT_IN)
            raise click.BadParameter(f"{name!r} is none of {known}, nor a module here.", param_hint="--backend")
    job = Job(tuple(dict.fromkeys(backends)) or installed(), device, dtypes or ("float32", "float64"), seed, patterns)
    for pattern in patterns:
        if not selected(job.dtypes, seed, [pattern]):
            raise click.BadParameter(
                f"no case matches {pattern!r}. Families: {', '.join(FAMILIES)}.", param_hint="--case"
            )
    if file is not None and not file.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(file.absolute().parent)!r}.", param_hint="--json")
    console = Console()
    print(f"seed {seed}, {', '.join(job.dtypes)}")
    if console.is_terminal:
        bars = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        with Progress(*bars, console=console, transient=True) as progress:
            tasks = {name: progress.add_task(name, total=None) for name in job.backends}
            chosen, runs = run(job, lambda name, done, total: progress.update(tasks[name], completed=done, total=total))
    else:
        chosen, runs = run(job, _plain_progress)
        console = Console(width=40 + 20 * len(runs))
    show(console, chosen, runs)
    if file is not None:
        file.write_text(as_json(job, chosen, runs))
    sys.exit(0 if passed(runs) else 1)


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


def _plain_progress(name: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{name}: {'started' if not done else 'done'}, {done} of {total} cases", flush=True)
