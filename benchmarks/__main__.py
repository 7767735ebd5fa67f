"""How fast unilabel is, and how big, beside its peers: python -m benchmarks, from the root of a checkout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from . import linear as linear_cases
from . import measure, report
from . import options as option_cases
from .measure import Record
from .subjects import MODES, Case, Setup

WRITTEN = click.Path(dir_okay=False, path_type=Path)
SHAPES = [*option_cases.BY_NAME, *linear_cases.BY_NAME]
KINDS = (
    "speed", "options", "linear", "linear_memory", "memory", "growth", "traffic", "import", "first_call",
)  # fmt: skip
Job = tuple[str, str, Callable[..., Any], tuple[Any, ...]]  # backend, kind of record, function, arguments


@click.command()
@click.option("--backend", "backends", multiple=True, type=click.Choice(list(MODES)), help="Default: all installed.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16"]), help="Default: float32. Repeatable."
)
@click.option("--forward", is_flag=True, help="The loss alone, without its gradient.")
@click.option("--compiled", is_flag=True, help="By torch.compile, jax.jit, XLA: the peer too.")
@click.option("--options", is_flag=True, help="Each option of the losses, by shape, beside what users write for it.")
@click.option("--option", "named", multiple=True, type=click.Choice(option_cases.OPTIONS), help="Of --options: these.")
@click.option("--linear", is_flag=True, help="The losses on the last linear layer's inputs: time, and peak of memory.")
@click.option("--loss", "losses", multiple=True, type=click.Choice(list(linear_cases.OURS)), help="Of --linear.")
@click.option(
    "--shape", "shapes", multiple=True, type=click.Choice(SHAPES), help="Of --options and --linear: these shapes."
)
@click.option("--busy", is_flag=True, help="Beside one spinning process a core, as a data loader is.")
@click.option("--large", is_flag=True, help="8192x32000 and 4096x128000, float32 and bfloat16: for GPUs.")
@click.option("--memory", is_flag=True, help="Not time: the peak of memory, each in a process of its own.")
@click.option("--rows", default=8192, show_default=True, help="Of --memory.")
@click.option("--classes", default=8192, show_default=True, help="Of --memory.")
@click.option("--growth", is_flag=True, help="Not time: ns per element from a million elements up.")
@click.option("--largest", default=1e9, show_default=True, help="Elements of --growth, if they fit into memory.")
@click.option("--traffic", is_flag=True, help="Not time: the bytes that eager PyTorch moves on a GPU, counted without.")
@click.option("--import", "imports", is_flag=True, help="Not time: `import unilabel`, and the first call.")
@click.option("--seconds", default=5.0, show_default=True, help="For each case.")
@click.option("--seed", default=0, show_default=True, help="Of the random inputs.")
@click.option("--quick", is_flag=True, help="Small cases and few repetitions, to see whether it runs.")
@click.option("--json", "json_file", type=WRITTEN, metavar="FILE", help="Write everything there.")
@click.option("--plot", "plot_file", type=WRITTEN, metavar="FILE", help="Draw ratio by size: .png or .svg.")
def main(
    backends: tuple[str, ...],
    device: str,
    dtypes: tuple[str, ...],
    forward: bool,
    compiled: bool,
    options: bool,
    named: tuple[str, ...],
    linear: bool,
    losses: tuple[str, ...],
    shapes: tuple[str, ...],
    busy: bool,
    large: bool,
    memory: bool,
    rows: int,
    classes: int,
    growth: bool,
    largest: float,
    traffic: bool,
    imports: bool,
    seconds: float,
    seed: int,
    quick: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Time of value and gradient, unilabel over its peer, beside the bound that it shall keep.

    The exit code is 0 if everything could be measured, whatever the times; 1 if not; 2 for a wrong call.
    """
    timed = not (memory or growth or traffic or imports)
    names = _usable(backends, device, compiled)
    if forward and not timed:
        raise click.UsageError("--forward is timed: expected no --memory, --growth, --traffic or --import beside it.")
    if plot_file is not None and (options or linear or not timed):
        others = "--options, --linear, --memory, --growth, --traffic or --import"
        raise click.UsageError(f"--plot draws times: expected no {others} beside it.")
    if plot_file is not None and find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'unilabel[bench]'.")
    if memory and device == "cuda":
        raise click.UsageError("--memory measures the memory of a process: expected --device cpu.")
    if options and (not timed or forward or dtypes or large):
        others = "--forward, --dtype, --large, --memory, --growth, --traffic or --import"
        raise click.UsageError(f"--options times value and gradient in float32: expected no {others} beside it.")
    if linear and (not timed or forward or dtypes or large or options or device != "cpu"):
        others = "--forward, --dtype, --large, --options, --device, --memory, --growth, --traffic or --import"
        raise click.UsageError(f"--linear has cases of its own, in float32: expected no {others} beside it.")
    if losses and not linear:
        raise click.UsageError("--loss chooses from what --linear measures: expected --linear too.")
    if named and not options:
        raise click.UsageError("--option chooses from what --options measures: expected --options too.")
    choices = option_cases.BY_NAME if options else linear_cases.BY_NAME if linear else {}
    if not choices.keys() >= set(shapes):
        known = ", ".join(choices) or "none without --options or --linear"
        raise click.UsageError(f"Expected --shape to be one of those that are measured: {known}.")
    if traffic and "torch" not in names:
        raise click.UsageError("--traffic counts what PyTorch does: expected --backend torch.")
    dtypes = dtypes or (("float32", "bfloat16") if large else ("float32",))
    setups = [
        Setup(name, mode, dtype, device, forward, seed)
        for name in names
        for mode in (("compiled",) if compiled else MODES[name])
        for dtype in dict.fromkeys(dtypes)
    ]
    first = [next(setup for setup in setups if setup.backend == name) for name in names]
    if quick:
        seconds, rows, classes, largest = 0.02, min(rows, 512), min(classes, 512), min(largest, 1e4)

    jobs: list[Job] = []
    if timed and options:
        chosen = [option_cases.BY_NAME[name] for name in dict.fromkeys(shapes)]
        jobs += [
            (s.backend, "options", measure.option, (s, option, shape, seconds, busy))
            for s in first
            for shape in chosen or (option_cases.QUICK if quick else option_cases.SHAPES)
            for option in dict.fromkeys(named or option_cases.OPTIONS)
        ]
    elif timed and linear:
        some = [linear_cases.BY_NAME[name] for name in dict.fromkeys(shapes)]
        some = some or list(linear_cases.QUICK if quick else linear_cases.SHAPES)
        of_linear = [linear_cases.Case(loss, shape) for shape in some for loss in losses or linear_cases.OURS]
        jobs += [job for s in first for case in of_linear for job in _linear(s, case, seconds, busy)]
    elif timed:
        cases = measure.QUICK if quick else measure.LARGE if large else measure.CASES
        jobs += [(s.backend, "speed", measure.speed, (s, case, seconds, busy)) for s in setups for case in cases]
    if memory:
        big = [Case(loss, rows, classes) for loss in ("bce", "nll")]
        jobs += [("", "memory", measure.memory, (setup, case)) for setup in first for case in big]
    if growth:
        sizes = {name: measure.growth_sizes(1e3 if quick else 1e6, largest, name) for name in names}
        jobs += [
            (s.backend, "growth", measure.growth, (s, loss, sizes[s.backend], seconds))
            for s in first
            for loss in ("bce", "nll")
        ]
    if traffic:
        from .traffic import BOUNDS

        jobs += [("torch", "traffic", measure.traffic, (option,)) for option in BOUNDS]
    if imports:
        jobs += [("", "import", measure.import_time, (3 if quick else 11,))]
        jobs += [("", "first_call", measure.first_call, (setup, measure.QUICK[0])) for setup in first]

    found: Record = measure.machine() | {"seed": seed, "device": device, "forward": forward, "busy": busy, "failed": []}
    found |= {kind: [] for kind in KINDS}
    console = Console()
    print(report.header(found), flush=True)
    bar = track(_run(jobs), total=len(jobs), console=console, transient=True, disable=not console.is_terminal)
    for kind, record in bar:
        found[kind].append(record)
    report.show(console if console.is_terminal else Console(width=160), found)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None and found["speed"]:
        report.plot(plot_file, found)
    raise SystemExit(1 if found["failed"] else 0)


def _linear(setup: Setup, case: linear_cases.Case, seconds: float, busy: bool) -> list[Job]:
    if case.shape in linear_cases.FOR_MEMORY:
        return [("", "linear_memory", measure.linear_memory, (setup, case))]
    peers = linear_cases.peers(setup.backend, case.loss)[: 1 if busy else None]
    return [(setup.backend, "linear", measure.linear_loss, (setup, case, peer, seconds, busy)) for peer in peers]


def _usable(asked: tuple[str, ...], device: str, compiled: bool) -> list[str]:
    """The backends to run. One that was asked for and cannot run is an error."""
    missing = {name: f"{name} is not installed" for name in MODES if find_spec(name) is None}
    if find_spec("optax") is None:
        missing.setdefault("jax", "its peer, optax, is not installed: pip install 'unilabel[bench]'")
    if device != "cpu":
        missing["numpy"] = "NumPy has no other device than cpu"
    if compiled:
        missing["numpy"] = "NumPy compiles nothing"
    for name in asked:
        if name in missing:
            raise click.BadParameter(f"{missing[name]}.", param_hint="--backend")
    return list(dict.fromkeys(asked)) or [name for name in MODES if name not in missing]


def _run(jobs: list[Job]) -> Iterator[tuple[str, Record]]:
    """Each backend in one process, one after the other; jobs of no backend make their own. A crash ends one job."""
    for backend in dict.fromkeys(job[0] for job in jobs):
        worker = measure.process() if backend else None
        try:
            for name, kind, function, arguments in jobs:
                if name != backend:
                    continue
                try:
                    yield kind, worker.submit(function, *arguments).result() if worker else function(*arguments)
                except Exception as error:  # of any framework: the others go on
                    what = " ".join(map(str, (kind, *arguments)))
                    yield "failed", {"what": what, "error": f"{type(error).__name__}: {error}"}
                    if isinstance(error, BrokenProcessPool) and worker:
                        worker = measure.process()
        finally:
            if worker:
                worker.shutdown()


if __name__ == "__main__":
    main()
