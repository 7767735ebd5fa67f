"""The command line: `unilabel conformance` and `unilabel backends`."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import unilabel
from unilabel.backend import BUILT_IN, ENTRY_POINTS

from .calls import KINDS, RETURNED, Way
from .cases import DTYPES
from .compare_runs import differences, read
from .html import html
from .junit import junit
from .modes import MODES
from .processes import SHOWN, Signals
from .report import Results, console, exit_code, results, show, visible
from .runner import Column, Job, columns, describe, installed, run, wrong
from .vectors import FOLDER, files, stale, write


class Group(click.Group):
    """A group whose commands end with 128 + the number of a signal, at any moment. Its object says whether one came."""

    def invoke(self, context: click.Context) -> Any:
        with Signals() as context.obj:
            try:
                return super().invoke(context)
            except KeyboardInterrupt:
                sys.exit(128 + (context.obj.number or signal.SIGINT))


class Output:
    """Prints and writes what it can: a full disk, or a reader that has gone, ends nothing. `lost` has the reasons."""

    def __init__(self) -> None:
        self.lost: list[str] = []

    def print(self, what: str | Table) -> None:
        if isinstance(what, Table):
            to = console()
            with to.capture() as captured:
                to.print(what)
            what = captured.get()
        with self.printing():
            print(what.removesuffix("\n"))

    @contextmanager
    def printing(self) -> Iterator[None]:
        try:
            yield
            print(end="", flush=True)
        except (OSError, ValueError) as error:
            if not isinstance(error, BrokenPipeError):
                self.lost.append(f"cannot print: {error}")
            with suppress(OSError, ValueError):  # what is left in the buffer would fail again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def write(self, file: Path, text: str) -> None:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            self.lost.append(f"cannot write {file}: {error}")

    def progress(self, column: Column, done: int, total: int) -> None:
        if done in (0, total):
            self.print(f"{column}: {'started' if not done else 'done'}, {done} of {total} cases")

    def exit(self, code: int) -> None:
        for reason in self.lost:
            with suppress(OSError):
                click.echo(f"Error: {reason}", err=True)
        sys.exit(code or bool(self.lost))


@click.group(cls=Group)
@click.version_option(unilabel.__version__, prog_name="unilabel")
def main() -> None:
    """Losses for every framework's tensors, and the checks that they are right."""
    with suppress(AttributeError):  # no stream, or none that encodes
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _file(_: object, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A file to write, which must be possible before the work begins."""
    if value is None:
        return None
    file = value.absolute()
    try:
        if not file.parent.is_dir():
            raise click.BadParameter(f"there is no folder {str(file.parent)!r}.")
        if not file.exists():
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        elif not file.is_fifo():
            with file.open("ab"):
                pass
    except OSError as error:
        raise click.BadParameter(f"{str(file)!r} cannot be written: {error.strerror}.") from error
    return file


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
    "--call",
    metavar="CALL",
    help="How package.module:function is called: 'f(targets, logits, weight=weight)'. Default: as unilabel's losses.",
)
@click.option(
    "--reduction",
    type=click.Choice(RETURNED),
    help="What it returns, if it takes no reduction: none is a loss for each example or element.",
)
@click.option(
    "--targets",
    multiple=True,
    type=click.Choice(KINDS),
    help="What targets it takes: integers as int64; floats; class indices as one-hot rows; the indices of an example's "
    "labels, padded with -1, as positives. Repeatable. Default: all but positives.",
)
@click.option("--axis", type=int, help="Its class axis, if it takes no axis. Default: the last.")
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
    call: str | None,
    reduction: str | None,
    targets: tuple[str, ...],
    axis: int | None,
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

    The exit code is 0 if all match; 1 if any does not, or a backend asked for is missing; 2 for a wrong call, or if
    nothing was checked in a column; 130 after Ctrl-C, and 128 + its number after another signal.
    """
    if context.invoked_subcommand is not None:
        return
    job = Job(
        subjects=tuple(dict.fromkeys(subjects)) or ("unilabel",),
        backends=tuple(dict.fromkeys(backends)) or installed(),
        device=device,
        dtypes=tuple(dict.fromkeys(dtypes)) or ("float32", "float64"),
        seed=seed,
        patterns=patterns,
        loss=loss,
        modes=tuple(dict.fromkeys(modes)) or (tuple(MODES) if full else ("eager",)),
        full=full,
        jobs=jobs,
        timeout=timeout,
        way=Way(call, reduction, targets, axis),
    )
    refused = wrong(job)
    if refused:
        raise click.BadParameter(refused[1], param_hint=refused[0])
    texts: dict[Callable[[Results], str], Path | None] = {_json: json_file, junit: junit_file, html: html_file}
    reports = {text: file for text, file in texts.items() if file is not None}
    if len({os.path.realpath(file) for file in reports.values()}) < len(reports):
        raise click.UsageError("expected a file for each report; received the same one twice.")
    output, to = Output(), console()
    if not to.is_terminal:
        to = console(width=40 + 26 * len(columns(job)))
    output.print(f"seed {seed}, {', '.join(job.dtypes)}")
    ran = _with_bars(job, output) if to.is_terminal else run(job, output.progress)
    signals: Signals = context.obj
    signals.raises = False  # from here on it is short
    found = results(job, *ran)
    for text, file in reports.items():
        output.write(file, text(found))
    with to.capture() as shown:
        show(to, found)
    output.print(shown.get())
    output.exit(128 + signals.number if signals.number else exit_code(found))


def _with_bars(job: Job, output: Output) -> Any:
    """Runs it, with a bar for each column."""
    shown = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    bars = Progress(*shown, console=console(), transient=True, redirect_stdout=False)
    tasks = {column: bars.add_task(str(column), total=None) for column in columns(job)}
    with output.printing():
        bars.start()
    try:
        return run(job, lambda column, done, total: bars.update(tasks[column], completed=done, total=total))
    finally:
        with output.printing():
            bars.stop()


@conformance.command()
@click.argument("a", type=READ)
@click.argument("b", type=READ)
@click.option("--ulp", default=0.0, show_default=True, help="The largest difference that is allowed, in ULP.")
def compare(a: Path, b: Path, ulp: float) -> None:
    """Compare two saved results number by number: a GPU's with a CPU's, this release's with the last one's.

    The exit code is 0 if they differ nowhere by more than --ulp; 1 if they do, or one has a case or a column that the
    other lacks; 2 if they are not results, or of different seeds, whose cases differ too.
    """
    try:
        worst = differences(read(a), read(b))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:SHOWN]  # not all that such a file may hold
        raise click.UsageError(f"expected two files that --json wrote; received: {why}") from error
    table = Table()
    for header in ("a", "b", "cases in both", "missing in one", "largest difference, ULP", "in"):
        table.add_column(header, overflow="fold")
    for row in worst:
        table.add_row(row.a, row.b, str(row.cases), str(row.missing), f"{row.ulp:.4g}", row.where)
    output = Output()
    output.print(table)
    output.exit(0 if worst and all(row.ulp <= ulp and row.cases and not row.missing for row in worst) else 1)


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
    output = Output()
    try:
        if action == "write":
            output.print("\n".join(f"written: {folder / name}" for name in write(folder)) or "nothing has changed")
            output.exit(0)
        wrong = stale(folder, files())
    except OSError as error:
        raise click.UsageError(f"{str(folder)!r} cannot be used: {error}") from error
    lines = [f"{name}: {why}" for name, why in wrong.items()]
    output.print("\n".join([*lines, f"{folder}: {'NOT all' if wrong else 'all'} as the cases and the oracle say"]))
    output.exit(bool(wrong))


@main.command()
def backends() -> None:
    """List the frameworks, their versions and devices, and how to install what is missing.

    Backends that packages register as entry points are listed too.
    """
    table = Table("backend", "version", "devices", "install with")
    here, registered = installed(), sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)})
    for name in dict.fromkeys([*BUILT_IN, *registered]):
        if name in here or name in registered:
            found = visible(describe(name))
            table.add_row(name, found["version"], ", ".join(map(str, found["devices"])), "")
        else:
            table.add_row(name, "not installed", "", f"pip install 'unilabel[{name}]'")
    output = Output()
    output.print(table)
    output.exit(0)


def _json(found: Results) -> str:
    return json.dumps(found, indent=1)
