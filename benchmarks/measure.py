"""How it is measured: times side by side, the peak of memory, growth with size, imports. Knows no framework."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from . import linear, options
from .subjects import Case, Setup, Step, build, plus_one, threads

Record = dict[str, Any]  # as it stands in the JSON

CASES = (
    Case("bce", 32, 10), Case("bce", 256, 1000), Case("bce", 4096, 4096),
    Case("nll", 32, 10), Case("nll", 65536, 10), Case("nll", 1024, 1000), Case("nll", 512, 32000),
)  # fmt: skip
LARGE = tuple(Case(loss, *shape) for loss in ("bce", "nll") for shape in ((8192, 32000), (4096, 128000)))
QUICK = (Case("bce", 32, 10), Case("nll", 32, 10), Case("nll", 64, 100))

# What unilabel's time over the peer's may come to, in the order of CASES: value and gradient, float32, on a CPU.
BOUNDS = {
    ("numpy", "eager"): (2.0, 0.6, 0.33, 2.0, 0.8, 0.9, 0.6),
    ("torch", "eager"): (1.35, 1.0, 0.5, 1.5, 0.6, 1.0, 0.4),
    ("jax", "jitted"): (1.1, 0.8, 0.55, 1.2, 1.1, 1.2, 0.9),
    ("jax", "eager"): (0.4,) * 7,
    ("tensorflow", "eager"): (0.9, 0.5, 0.5, 0.9, 0.6, 0.6, 0.7),
}
MEMORY_BOUND = 1.15  # times the gradient's size; for JAX and TensorFlow, what the peer takes
GROWTH_BOUND = 0.25  # from the median over the sizes
IMPORT_BOUND = 30.0  # ms


def bound(setup: Setup, case: Case) -> float | None:
    """None where none is stated."""
    if setup.dtype != "float32" or setup.device != "cpu" or case not in CASES:
        return None
    if setup.mode == "compiled":
        return 1.05
    if setup.forward:
        return 1.0 if case.rows * case.classes >= 256 * 1000 else None
    return BOUNDS[setup.backend, setup.mode][CASES.index(case)]


def process() -> ProcessPoolExecutor:
    """A process of its own, for one backend: thread pools and allocators of several get in each other's way."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process that does nothing else."""
    with process() as worker:
        return worker.submit(function, *arguments).result()


# --- Time -------------------------------------------------------------------------------------------------------------

BATCH = 2e-3  # seconds: what is shorter is called several times between two looks at the clock


def _timed(step: Step, number: int = 1) -> float:
    """Seconds for each call."""
    collects = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(number):
            step()
        return (time.perf_counter() - start) / number
    finally:
        if collects:
            gc.enable()


def _batch(step: Step) -> int:
    step()  # compiles
    first = _timed(step)
    return 1 if first >= BATCH else max(1, math.ceil(BATCH / min(first, _timed(step), _timed(step))))


def side_by_side(ours: Step, peer: Step, seconds: float) -> tuple[list[float], list[float]]:
    """Their times, taken in turn, so that what else the machine does comes to both."""
    number = max(_batch(peer), _batch(ours))  # for both, as the second of two calls in a row is faster
    gc.collect()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 200):
        for step, taken in zip((peer, ours), times, strict=True):
            taken.append(_timed(step, number))
    return times[1], times[0]


@contextlib.contextmanager
def spinning(busy: bool) -> Iterator[None]:
    """One process a core that never rests."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores() if busy else 0)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def option(setup: Setup, name: str, shape: options.Shape, seconds: float, busy: bool = False) -> Record:
    """unilabel's time over that of what users write, with one option."""
    what = {"option": name, "shape": str(shape)}
    return _beside(setup, what, options.build(setup, name, shape), options.bound(setup, name, shape), seconds, busy)


def linear_loss(setup: Setup, case: linear.Case, peer: str, seconds: float, busy: bool = False) -> Record:
    """unilabel's time over a peer's, of a loss on the last linear layer's inputs."""
    what = {"loss": case.loss, "shape": str(case.shape), "peer": peer}
    steps = (linear.build(setup, case, whose) for whose in ("ours", peer))
    return _beside(setup, what, steps, linear.bound(setup, peer, case.shape), seconds, busy)


def _beside(
    setup: Setup, what: Record, steps: Iterable[Step], limit: float | None, seconds: float, busy: bool
) -> Record:
    """What was found of two steps, ours and the peer's."""
    ours, peer = steps
    with spinning(busy):
        our_times, peer_times = side_by_side(ours, peer, seconds)
    ratios = sorted(a / b for a, b in zip(our_times, peer_times, strict=True))
    return {
        **setup._asdict(),
        **what,
        "busy": busy,
        "ratio": {"min": ratios[0], "median": median(ratios), "max": ratios[-1]},
        "bound": limit,
        "passed": None if limit is None else median(ratios) <= limit,
        "ours_ms": median(our_times) * 1e3,
        "peer_ms": median(peer_times) * 1e3,
        "rounds": len(ratios),
        "threads": threads(setup.backend),
    }


def speed(setup: Setup, case: Case, seconds: float, busy: bool = False) -> Record:
    """unilabel's time over the peer's."""
    steps = build(setup, case)
    with spinning(busy):
        ours, peer = side_by_side(*steps, seconds)
    ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
    size = case.rows * case.classes
    width = 2 if setup.dtype == "bfloat16" else 4
    # Read: the logits, and the targets of bce. Written: the gradient.
    moved = size * width * (1 + (case.loss == "bce") + (not setup.forward))
    limit = bound(setup, case)
    return {
        **setup._asdict(),
        **case._asdict(),
        "ratio": {"min": ratios[0], "median": median(ratios), "max": ratios[-1]},
        "bound": limit,
        "passed": None if limit is None else median(ratios) <= limit,
        "ours_ns": median(ours) / size * 1e9,
        "peer_ns": median(peer) / size * 1e9,
        "copy_share": moved / copy_bandwidth(setup) / median(ours),
        "rounds": len(ratios),
        "threads": threads(setup.backend),
    }


@functools.cache
def copy_bandwidth(setup: Setup) -> float:
    """Bytes read and written in a second by a copy of 128 MiB on all cores, or by x + 1 on the GPU; the best of 5."""
    size = 1 << 25
    if setup.device == "cuda":
        step = plus_one(setup, size)
        step()
        return 8 * size / min(_timed(step) for _ in range(5))
    from concurrent.futures import ThreadPoolExecutor

    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    parts = list(zip(np.array_split(target, cores()), np.array_split(source, cores()), strict=True))
    with ThreadPoolExecutor(cores()) as pool:
        return 8 * size / min(_timed(lambda: list(pool.map(lambda part: np.copyto(*part), parts))) for _ in range(5))


# --- Memory -----------------------------------------------------------------------------------------------------------


def memory(setup: Setup, case: Case) -> Record:
    """The peak of value and gradient above the inputs, as a multiple of the gradient's size: ours and the peer's."""
    ours, peer = (alone(_peak, setup, case, whose) for whose in ("ours", "peer"))
    limit = peer if setup.backend in ("jax", "tensorflow") else MEMORY_BOUND
    return {
        **setup._asdict(), **case._asdict(), "ours": ours, "peer": peer, "bound": limit, "passed": ours <= limit,
    }  # fmt: skip


def _peak(setup: Setup, case: Case, whose: str) -> float:
    step = getattr(build(setup, case), whose)
    # TensorFlow keeps what it frees, and would find it again: it starts its threads with a few rows. Others do so, and
    # compile, with all: compiling takes memory too.
    few = case._replace(rows=min(case.rows, 8))
    start = getattr(build(setup, few), whose) if setup.backend == "tensorflow" else step
    start()
    peak = rise(step)
    gradient = case.rows * case.classes * (2 if setup.dtype == "bfloat16" else 4)
    if gradient >= 1 << 25 and peak < 0.9 * gradient:
        raise RuntimeError(f"expected to see the gradient at least, {gradient} bytes; saw {peak}")
    return peak / gradient


def linear_memory(setup: Setup, case: linear.Case) -> Record:
    """The peak of a first call above its inputs and gradients, in MiB, compiling included: ours and the peers'."""
    peaks = {
        whose: alone(_peak_above_gradients, setup, case, whose) / (1 << 20)
        for whose in ("ours", *linear.peers(setup.backend, case.loss))
    }
    ours, limit = peaks.pop("ours"), linear.MEMORY_BOUND
    return {
        **setup._asdict(), "loss": case.loss, "shape": str(case.shape),
        "ours": ours, "peers": peaks, "bound": limit, "passed": ours <= limit,
    }  # fmt: skip


def _peak_above_gradients(setup: Setup, case: linear.Case, whose: str) -> int:
    linear.build(setup, linear.Case(case.loss, linear.Shape(8, 4, 16)), whose)()  # starts threads, loads libraries
    step = linear.build(setup, case, whose)
    rows, length, classes = case.shape
    return rise(step) - 4 * (rows * length + classes * (length + 1))


def rise(call: Callable[[], Any]) -> int:
    """The most bytes that a call takes beyond what this process holds."""
    gc.collect()
    ballast = _fill_up_to_the_mark()
    before = _high_water_mark()
    call()
    peak = _high_water_mark() - before
    del ballast
    return peak


def _high_water_mark() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fill_up_to_the_mark(chunk: int = 1 << 22) -> list[Any]:
    """Memory to hold on to, until the high-water mark rises: what is held from then on shows in it."""
    ballast: list[Any] = []
    start = _high_water_mark()
    while _high_water_mark() - start < 2 * chunk:
        ballast.append(np.ones(chunk, np.uint8))
        if len(ballast) * chunk > 1 << 36:
            raise RuntimeError("expected ru_maxrss to follow what is allocated; it does not on this system")
    return ballast


def available_memory() -> float:
    """Bytes, as the system estimates them."""
    info = Path("/proc/meminfo")
    if info.exists():
        found = dict(line.split(":") for line in info.read_text().splitlines() if ":" in line)
        if "MemAvailable" in found:
            return float(found["MemAvailable"].split()[0]) * 1024
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# --- Growth -----------------------------------------------------------------------------------------------------------


def growth_sizes(smallest: float, largest: float, backend: str) -> list[int]:
    """Two in each factor of 10, as far as inputs, gradient and a framework's temporaries fit into memory."""
    bytes_each = 20 if backend in ("numpy", "torch") else 64  # those keep no temporaries of this size
    fits = min(largest, available_memory() / bytes_each)
    count = math.floor(2 * math.log10(max(fits, smallest) / smallest) + 1e-9)
    return [round(smallest * 10 ** (i / 2)) for i in range(count + 1)]


def growth(setup: Setup, loss: str, sizes: list[int], seconds: float) -> Record:
    """unilabel's ns per element as the number of elements grows."""
    times = []
    for size in sizes:
        case = Case(loss, max(size // 1000, 1), 1000)
        step = build(setup, case).ours
        number = _batch(step)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 200):
            taken.append(_timed(step, number))
        times.append(median(taken) / (case.rows * case.classes) * 1e9)
    middle = median(times)
    return {
        **setup._asdict(),
        "loss": loss,
        "elements": sizes,
        "ns": times,
        "furthest": max((t / middle - 1 for t in times), key=abs),
        "bound": GROWTH_BOUND,
        "passed": all(abs(t / middle - 1) <= GROWTH_BOUND for t in times),
    }


# --- Traffic ----------------------------------------------------------------------------------------------------------


def traffic(option: str) -> Record:
    """What PyTorch's kernels move, in arrays of the logits' size, and how many there are: ours and the peer's."""
    from . import traffic as of

    ours, peer = of.count(option)
    array = 4 * of.ROWS * of.CLASSES
    ratio, kernel_ratio = ours.bytes / peer.bytes, ours.kernels / peer.kernels
    return {
        "option": option, "rows": of.ROWS, "classes": of.CLASSES,
        "ours": ours.bytes / array, "peer": peer.bytes / array, "ratio": ratio, "bound": of.BOUNDS[option],
        "ours_kernels": ours.kernels, "peer_kernels": peer.kernels,
        "kernel_ratio": kernel_ratio, "kernel_bound": of.KERNELS,
        "passed": ratio <= of.BOUNDS[option], "kernels_passed": kernel_ratio <= of.KERNELS,
    }  # fmt: skip


# --- Imports and first calls ------------------------------------------------------------------------------------------


def import_time(times: int = 11) -> Record:
    """Milliseconds that `import unilabel` takes above a bare Python."""

    def run(code: str) -> float:
        return _timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    run("import unilabel")  # compiles to bytecode
    above = sorted((run("import unilabel") - run("pass")) * 1e3 for _ in range(times))
    taken = median(above)
    return {"min": above[0], "median": taken, "max": above[-1], "bound": IMPORT_BOUND, "passed": taken <= IMPORT_BOUND}


def first_call(setup: Setup, case: Case, times: int = 5) -> Record:
    """Milliseconds of the first call, its inputs made, in processes of their own: ours and the peer's, medians."""
    taken = [[alone(_first, setup, case, whose) for whose in ("ours", "peer")] for _ in range(times)]
    ours, peers = zip(*taken, strict=True)
    return {**setup._asdict(), **case._asdict(), "ours_ms": median(ours), "peer_ms": median(peers)}


def _first(setup: Setup, case: Case, whose: str) -> float:
    return _timed(getattr(build(setup, case), whose)) * 1e3


# --- Where ------------------------------------------------------------------------------------------------------------


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> Record:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("unilabel", "numpy", "torch", "jax", "jaxlib", "optax", "tensorflow")
    return {
        "versions": {"python": platform.python_version()} | {p: v for p in packages if (v := _version(p))},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "capability": _capability(),
        "load": os.getloadavg()[0],  # what others do at the start; times beside much of it say little
        "thread_settings": {k: v for k, v in sorted(os.environ.items()) if k.endswith("_NUM_THREADS")},
    }


def _capability() -> str:
    """The vector instructions that PyTorch uses; ATEN_CPU_CAPABILITY chooses others."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
