"""What was measured, as tables for people, as JSON, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
SPREAD = ("min", "median", "max", "bound", "")


def header(found: Record) -> str:
    """What it was measured with, and on."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    capability = f", PyTorch by {found['capability']}" if found["capability"] else ""
    busy = ", all of them busy" if found["busy"] else ""
    settings = "".join(f", {name}={value}" for name, value in found["thread_settings"].items())
    where = f"{found['cpu']}, {found['cores']} cores{busy} (load {found['load']:.1f}){capability}{settings}"
    return f"{versions}\n{where}, {found['platform']}, seed {found['seed']}"


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
    linear_peers = ("materialised", "chunked")
    case = {"backend": "left", "mode": "left", "case": "left"}
    run: dict[str, Any] = {"backend": "left", "mode": "left", "dtype": "left", "case": "left"}
    return [
        (
            f"Time of {what}, unilabel / peer, {found['device']}",
            run | dict.fromkeys((*SPREAD, "ns/element", "peer's", "of copy speed"), "right"),
            [_run(row) + _speed(row) for row in found["speed"]],
        ),
        *_options(found["options"]),
        (
            "Losses on the last linear layer's inputs: time of value and all gradients, unilabel / peer",
            case | dict.fromkeys(("peer", *SPREAD, "ms", "peer's"), "right"),
            [
                [*_case(row), row["peer"], *_ratio(row), f"{row['ours_ms']:.4g}", f"{row['peer_ms']:.4g}"]
                for row in found["linear"]
            ],
        ),
        (
            "The same: peak of memory above inputs and gradients in a first call, MiB",
            case | dict.fromkeys(("unilabel", *linear_peers, "bound", ""), "right"),
            [
                [
                    *_case(row), f"{row['ours']:.0f}",
                    *(f"{row['peers'][peer]:.0f}" if peer in row["peers"] else "" for peer in linear_peers),
                    f"{row['bound']:.0f}", _mark(row),
                ]
                for row in found["linear_memory"]
            ],
        ),
        *_traffic(found["traffic"]),
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


def _options(rows: list[Record]) -> list[tuple[str, dict[str, Any], list[list[str]]]]:
    """For each backend a table of options by shapes."""
    tables = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        shapes = list(dict.fromkeys(row["shape"] for row in mine))
        cells: dict[str, dict[str, str]] = {}
        for row in mine:
            cells.setdefault(row["option"], {})[row["shape"]] = (
                f"{row['ratio']['median']:.2f} / {_limit(row)} {_mark(row)}"
            )
        lines = [[option, *(of.get(shape, "") for shape in shapes)] for option, of in cells.items()]
        title = f"Options: time of value and gradient, unilabel / peer, and its bound, {backend} {mine[0]['mode']}"
        tables.append((title, {"option": "left"} | dict.fromkeys(shapes, "right"), lines))
    return tables


def _traffic(rows: list[Record]) -> list[tuple[str, dict[str, Any], list[list[str]]]]:
    """One table of the bytes, in arrays, and of the kernels."""
    if not rows:
        return []
    size = f"{rows[0]['rows']}x{rows[0]['classes']}"
    columns = ("arrays", "peer's", "ratio", "bound", "", "kernels", "peer's ", "ratio ", "bound ", " ")
    lines = [
        [
            row["option"], f"{row['ours']:.2f}", f"{row['peer']:.2f}", f"{row['ratio']:.2f}", _limit(row), _mark(row),
            str(row["ours_kernels"]), str(row["peer_kernels"]), f"{row['kernel_ratio']:.2f}",
            f"{row['kernel_bound']:.2f}", "✓" if row["kernels_passed"] else "✗",
        ]
        for row in rows
    ]  # fmt: skip
    title = f"Traffic of value and gradient, eager PyTorch away from the CPU, in arrays as large as the logits, {size}"
    return [(title, {"case": "left"} | dict.fromkeys(columns, "right"), lines)]


def _run(row: Record) -> list[str]:
    return [row["backend"], row["mode"], row["dtype"], f"{row['loss']} {row['rows']}x{row['classes']}"]


def _case(row: Record) -> list[str]:
    return [row["backend"], row["mode"], f"{row['loss']} {row['shape']}"]


def _speed(row: Record) -> list[str]:
    return [*_ratio(row), f"{row['ours_ns']:.3g}", f"{row['peer_ns']:.3g}", f"{row['copy_share']:.1%}"]


def _ratio(row: Record) -> list[str]:
    return [*(f"{row['ratio'][name]:.2f}" for name in ("min", "median", "max")), _limit(row), _mark(row)]


def _limit(row: Record) -> str:
    return "–" if row["bound"] is None else f"{row['bound']:.2f}"


def _mark(row: Record) -> str:
    return {True: "✓", False: "✗", None: ""}[row["passed"]]


NAMES = {"bce": "multilabel", "nll": "softmax + NLL"}
TICKS = (0.1, 0.25, 0.5, 1, 2, 4)


def plot(file: Path, found: Record) -> None:
    """A panel for each framework and mode: each case's ratio, a dot on the line from the least to the largest."""
    from matplotlib.figure import Figure

    rows = found["speed"]
    runs = list(dict.fromkeys((row["backend"], row["mode"], row["dtype"]) for row in rows))
    cases = list(dict.fromkeys((row["loss"], row["rows"], row["classes"]) for row in rows))
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(1.5 + 2.8 * columns, 0.9 + lines * (0.6 + 0.24 * len(cases))), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, run in zip(panels, runs, strict=False):
        for row in rows:
            if (row["backend"], row["mode"], row["dtype"]) == run:
                place, ratio = cases.index((row["loss"], row["rows"], row["classes"])), row["ratio"]
                color = {"bce": "C0", "nll": "C1"}[row["loss"]]
                panel.plot([ratio["min"], ratio["max"]], [place, place], color=color, alpha=0.35, linewidth=4)
                panel.plot(ratio["median"], place, "o", color=color)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_title(" ".join(run), fontsize=10)
        panel.set(xscale="log", xticks=TICKS, yticks=range(len(cases)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.tick_params(axis="x", labelsize=8)
        panel.minorticks_off()
        panel.grid(axis="x", alpha=0.3)
    for above, panel in zip(panels[len(runs) - columns :], panels[len(runs) :], strict=False):
        above.tick_params(labelbottom=True)
        panel.set_axis_off()
    panels[0].set_yticklabels([f"{NAMES[loss]} {rows}×{classes}" for loss, rows, classes in cases])
    panels[0].invert_yaxis()
    figure.supxlabel("time, unilabel / peer: left of the line unilabel is faster", fontsize=9)
    figure.suptitle(header(found), fontsize=6, x=0.01, ha="left")
    figure.savefig(file, dpi=150)
