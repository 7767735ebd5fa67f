"""What was measured, as tables for people, as JSON, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
SPREAD = ("min", "median", "max", "bound", "")


def header(found: Record) -> str:
    """What it was measured with, and on."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    settings = "".join(f", {name}={value}" for name, value in found["thread_settings"].items())
    where = f"{found['cpu']}, {found['cores']} cores (load {found['load']:.1f}){settings}, {found['platform']}"
    return f"{versions}\n{where}, seed {found['seed']}"


def show(console: Console, found: Record) -> None:
    for title, columns, rows in _tables(found):
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for name, justify in columns.items():
            table.add_column(name, justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for failure in found["failed"]:
        console.print(f"{failure['what']}: {failure['error']}", markup=False)


def _tables(found: Record) -> list[tuple[str, dict[str, Any], list[list[str]]]]:
    what = "forward alone" if found["forward"] else "value and gradient"
    run: dict[str, Any] = {"backend": "left", "mode": "left", "dtype": "left", "case": "left"}
    return [
        (
            f"Time of {what}, unilabel / peer, {found['device']}",
            run | dict.fromkeys((*SPREAD, "ns/element", "peer's", "of copy speed"), "right"),
            [_run(row) + _speed(row) for row in found["speed"]],
        ),
        (
            "Peak of memory above the inputs, value and gradient, times the gradient's size",
            run | dict.fromkeys(("unilabel", "peer", "bound", ""), "right"),
            [
                [*_run(row), f"{row['ours']:.2f}", f"{row['peer']:.2f}", f"{row['bound']:.2f}", _mark(row)]
                for row in found["memory"]
            ],
        ),
        (
            "Growth: unilabel's ns per element of value and gradient, by elements",
            {"backend": "left", "mode": "left", "loss": "left", "ns, by elements": "left"}
            | dict.fromkeys(("furthest from the median", "bound", ""), "right"),
            [
                [
                    row["backend"], row["mode"], row["loss"],
                    "  ".join(f"{n:.1e}: {ns:.2f}" for n, ns in zip(row["elements"], row["ns"], strict=True)),
                    f"{row['furthest']:+.0%}", f"±{row['bound']:.0%}", _mark(row),
                ]
                for row in found["growth"]
            ],
        ),
        (
            "import unilabel, above bare Python, ms",
            dict.fromkeys(SPREAD, "right"),
            [
                [f"{row['min']:.1f}", f"{row['median']:.1f}", f"{row['max']:.1f}", f"{row['bound']:.0f}", _mark(row)]
                for row in found["import"]
            ],
        ),
        (
            "First call of value and gradient in a process, ms",
            run | dict.fromkeys(("unilabel", "peer"), "right"),
            [[*_run(row), f"{row['ours_ms']:.1f}", f"{row['peer_ms']:.1f}"] for row in found["first_call"]],
        ),
    ]  # fmt: skip


def _run(row: Record) -> list[str]:
    return [row["backend"], row["mode"], row["dtype"], f"{row['loss']} {row['rows']}x{row['classes']}"]


def _speed(row: Record) -> list[str]:
    limit = "–" if row["bound"] is None else f"{row['bound']:.2f}"
    ratios = [f"{row['ratio'][name]:.2f}" for name in ("min", "median", "max")]
    return [
        *ratios, limit, _mark(row), f"{row['ours_ns']:.3g}", f"{row['peer_ns']:.3g}", f"{row['copy_share']:.1%}",
    ]  # fmt: skip


def _mark(row: Record) -> str:
    return {True: "✓", False: "✗", None: ""}[row["passed"]]


def plot(file: Path, found: Record) -> None:
    """Ratio by size for each backend, from min to max, both axes logarithmic; the line is the peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    rows = found["speed"]
    runs = list(dict.fromkeys((row["backend"], row["mode"], row["dtype"]) for row in rows))
    for color, run in enumerate(runs):
        for loss, marker, line in (("bce", "o", "-"), ("nll", "s", "--")):
            mine = [r for r in rows if (r["backend"], r["mode"], r["dtype"]) == run and r["loss"] == loss]
            mine.sort(key=lambda row: row["rows"] * row["classes"])
            middle = [row["ratio"]["median"] for row in mine]
            low = [row["ratio"]["median"] - row["ratio"]["min"] for row in mine]
            high = [row["ratio"]["max"] - row["ratio"]["median"] for row in mine]
            sizes = [row["rows"] * row["classes"] for row in mine]
            style: dict[str, Any] = {"color": f"C{color}", "marker": marker, "linestyle": line, "capsize": 2}
            axes.errorbar(sizes, middle, yerr=(low, high), label=f"{' '.join(run)}, {loss}", **style)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="logits", ylabel="time, unilabel / peer")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.set_title(header(found), fontsize=6, loc="left")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(file, dpi=150)
