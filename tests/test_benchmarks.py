"""The measuring tool measures the same thing on both sides, and runs. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shared import asked_for

from unilabel.backend import backend_named

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import linear, measure, options, subjects  # noqa: E402
from benchmarks.subjects import Case, Setup, build  # noqa: E402

CASES = [Case("bce", 6, 5), Case("nll", 6, 5)]
RUNS = [(backend, mode) for backend, modes in subjects.MODES.items() for mode in modes]


def numbers(setup, result):
    """Value and gradient, as float64."""
    backend = backend_named(setup.backend)
    return [np.asarray(backend.to_numpy(array)).astype(np.float64) for array in result]


def assert_same(setup, case, tolerance):
    ours, peer = build(setup, case)
    (value, gradient), (their_value, their_gradient) = numbers(setup, ours()), numbers(setup, peer())
    assert gradient.shape == their_gradient.shape == (case.rows, case.classes)
    assert np.ptp(gradient) > 0.01
    np.testing.assert_allclose(value, their_value, rtol=tolerance)
    np.testing.assert_allclose(gradient, their_gradient, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "mode"), RUNS)
def test_both_sides_compute_the_same(backend, mode, case):
    assert_same(Setup(backend, mode), case, 1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_compiled_too(backend, case):
    assert_same(Setup(backend, "compiled"), case, 1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", subjects.MODES)
def test_in_bfloat16_too(backend, case):
    assert_same(Setup(backend, "eager", "bfloat16"), case, 2e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "mode"), RUNS)
def test_forward_alone_is_the_same_loss(backend, mode, case):
    alone = Setup(backend, mode, forward=True)
    expected, _ = numbers(alone, build(Setup(backend, mode), case).peer())
    for step in build(alone, case):
        np.testing.assert_allclose(numbers(alone, [step()]), [expected], rtol=1e-4)


def test_the_backends_have_the_same_inputs():
    values = [numbers(setup, build(setup, CASES[0]).peer())[0] for setup in (Setup(b, m) for b, m in RUNS)]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_steps_are_timed_in_turn():
    called = []
    ours, peer = measure.side_by_side(lambda: called.append("ours"), lambda: called.append("peer"), 0)
    assert len(ours) == len(peer) == 3
    order = [name for name, before in zip(called, [None, *called], strict=False) if name != before]
    assert order == ["peer", "ours"] * 4  # once to see how often to call them, and three times


def test_a_bound_for_each_case_of_each_backend():
    for run in RUNS:
        bounds = [measure.bound(Setup(*run), case) for case in measure.CASES]
        assert all(0 < bound <= 2 for bound in bounds)
    assert measure.bound(Setup("torch", "eager"), CASES[0]) is None
    assert measure.bound(Setup("torch", "eager", "bfloat16"), measure.CASES[0]) is None
    assert measure.bound(Setup("torch", "eager", forward=True), measure.CASES[0]) is None
    assert measure.bound(Setup("torch", "eager", forward=True), measure.CASES[1]) == 1.0
    assert measure.bound(Setup("torch", "compiled"), measure.CASES[0]) == 1.05


@pytest.mark.full
def test_memory_that_is_held_for_a_moment_counts():
    assert measure.alone(held_for_a_moment) == pytest.approx(1 << 26, rel=0.1)


def held_for_a_moment():
    np.ones(1 << 27, np.uint8)  # more than what follows, before it is looked at
    ballast = measure._fill_up_to_the_mark()
    before = measure._high_water_mark()
    np.ones(1 << 26, np.uint8)
    assert ballast
    return measure._high_water_mark() - before


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", "--quick", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})


@pytest.mark.full
def test_the_command_prints_a_table_and_writes_what_it_found(tmp_path):
    done = run("--backend", "numpy", "--backend", "torch", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"numpy {np.__version__}" in done.stdout
    assert f"{measure.cores()} cores" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] == []
    assert [(row["backend"], Case(row["loss"], row["rows"], row["classes"])) for row in found["speed"]] == [
        (backend, case) for backend in ("numpy", "torch") for case in measure.QUICK
    ]
    for row in found["speed"]:
        assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert f"{row['loss']} {row['rows']}x{row['classes']}" in done.stdout


def assert_same_with(option, shape, setup):
    ours, peer = options.build(setup, option, shape)
    (value, gradient), (their_value, their_gradient) = (numbers(setup, step()) for step in (ours, peer))
    assert gradient.shape == their_gradient.shape == shape.shape
    np.testing.assert_allclose(value, their_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", options.QUICK, ids=str)
@pytest.mark.parametrize("option", options.OPTIONS)
@pytest.mark.parametrize("backend", subjects.MODES)
def test_with_an_option_both_sides_compute_the_same(backend, option, shape):
    assert_same_with(option, shape, Setup(backend, subjects.MODES[backend][0]))


@pytest.mark.full
@pytest.mark.parametrize("option", ["weight, smoothing", "where", "multilabel, pos_weight"])
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_with_an_option_compiled_too(backend, option):
    assert_same_with(option, options.QUICK[1], Setup(backend, "compiled"))


def test_a_bound_for_each_option():
    compiled, first, other = Setup("torch", "compiled"), *options.SHAPES[:2]
    assert options.bound(Setup("torch", "eager"), "indices", first) == 2.0
    assert options.bound(Setup("torch", "eager"), "indices", other) == 1.0
    assert options.bound(compiled, "indices", first) == options.bound(Setup("numpy", "eager"), "nll", other) == 1.2
    assert options.bound(Setup("torch", "eager", device="cuda"), "indices", first) is None


@pytest.mark.parametrize("loss", linear.OURS)
@pytest.mark.parametrize("backend", subjects.MODES)
def test_on_the_last_linear_layers_inputs_all_compute_the_same(backend, loss):
    setup, case = Setup(backend, subjects.MODES[backend][0]), linear.Case(loss, linear.QUICK[0])
    ours, *theirs = (
        numbers(setup, linear.build(setup, case, whose)()) for whose in ("ours", *linear.peers(backend, loss))
    )
    rows, length, classes = case.shape
    assert [array.shape for array in ours] == [(), (rows, length), (classes, length), (classes,)]
    for found in theirs:
        for array, expected in zip(ours, found, strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-6)


def test_a_bound_for_each_linear_case_beside_the_materialised_loss():
    for backend in subjects.MODES:
        bounds = [linear.bound(Setup(backend, "eager"), "materialised", shape) for shape in linear.SHAPES]
        assert 0.9 <= bounds[0] <= 1.05
        assert bounds[1:] == [1.2, None]
    assert linear.bound(Setup("torch", "eager"), "chunked", linear.TIMED[0]) is None
    assert linear.bound(Setup("torch", "compiled"), "materialised", linear.TIMED[0]) is None


@pytest.mark.full
def test_the_linear_losses_are_measured(tmp_path):
    done = run("--backend", "numpy", "--backend", "torch", "--linear", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    of_both = [("bce", "materialised"), ("nll", "materialised")]
    assert [(row["backend"], row["loss"], row["peer"]) for row in found["linear"]] == [
        *(("numpy", *of) for of in of_both), *(("torch", *of) for of in (*of_both, ("nll", "chunked"))),
    ]  # fmt: skip
    assert [(row["backend"], row["loss"]) for row in found["linear_memory"]] == [
        (backend, loss) for backend in ("numpy", "torch") for loss in linear.OURS
    ]
    logits = 4 * 1024 * 32768 / (1 << 20)
    for row in found["linear_memory"]:
        assert row["ours"] < row["peers"]["materialised"]
        assert row["peers"]["materialised"] > 1.9 * logits  # and their gradient


# By hand, in arrays as large as the logits, read + written, of one kernel each:
# forward  log σ(x) 1+1, a new array of ones 0+1, less the labels 2+1, times x 2+1, less log σ(x) 2+1, mean 1+0;
# backward the cotangent 1 (one number), σ(x) 1+1, less the labels 2+1, times the cotangent 1+1, over the number 1+1.
# Labels that are not floats yet: one kernel more, which reads them and writes an array.
# Of indices: log-softmax 1+1, the loss (a number of each row), the cotangent; zeros 0+1, log-softmax 2+1.
BCE = 13 + 9
BY_HAND = {
    "multilabel": (BCE, 11),
    "multilabel, bool": (BCE + 1 / 4 + 1, 12),
    "multilabel, integers": (BCE + 2 + 1, 12),
    "indices": (2 + 1 + 3, 5),
}


@pytest.mark.parametrize("option", BY_HAND)
def test_the_traffic_of_pytorchs_own_losses_is_known(option):
    found = measure.traffic(option)
    assert (found["peer"], found["peer_kernels"]) == (pytest.approx(BY_HAND[option][0], rel=1e-3), BY_HAND[option][1])


def counted(function):
    from benchmarks.traffic import Counter

    with Counter() as counter:
        function()
    return counter.bytes, counter.kernels


def test_only_what_is_moved_counts(request):
    asked_for("torch", request)
    import torch

    x, y = torch.empty(6, 4, device="meta"), torch.empty(6, 1, dtype=torch.int64, device="meta")
    for view in (
        lambda: x[1:, 2].unsqueeze(0).expand(3, 5).t().detach(),
        lambda: x.view(4, 6).permute(1, 0).reshape(6, 4, 1).squeeze(2),
        lambda: torch.empty_like(x),
        lambda: torch.zeros(9) + 1,  # on a CPU
    ):
        assert counted(view) == (0, 0)
    assert counted(lambda: x + x[:1].expand(6, 4)) == (4 * (24 + 4 + 24), 1)  # what is repeated, once
    assert counted(lambda: x.mul_(2)) == (4 * (24 + 24), 1)
    assert counted(lambda: x.clone()) == (4 * (24 + 24), 1)
    assert counted(lambda: torch.zeros_like(x)) == (4 * 24, 1)
    assert counted(lambda: x.gather(1, y)) == (4 * (6 + 6) + 8 * 6, 1)
    assert counted(lambda: x.scatter_(1, y, 0.0)) == (4 * 6 + 8 * 6, 1)
    assert counted(lambda: x.scatter_add_(1, y, x[:, :1])) == (4 * (12 + 6) + 8 * 6, 1)


def test_unilabel_takes_its_way_without_a_trace_while_it_is_counted(request):
    asked_for("torch", request)
    import torch

    from benchmarks.traffic import Counter

    x, y = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(6, dtype=torch.int64, device="meta")
    plain = options.ours(-1)["indices"](x, y).grad_fn
    with Counter():
        assert type(options.ours(-1)["indices"](x, y).grad_fn) is type(plain)


def test_others_spin_beside_what_is_timed_on_busy_cores():
    with measure.spinning(True):
        assert len(children()) == measure.cores()
    assert not children()


def children():
    return [
        line
        for line in subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
        ).stdout.splitlines()
        if "while True" in line
    ]


@pytest.mark.full
def test_the_options_are_measured(tmp_path):
    done = run("--backend", "numpy", "--backend", "torch", "--options", "--busy", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["backend"] for row in found["options"]] == [
        backend for backend in ("numpy", "torch") for _ in range(len(options.OPTIONS) * len(options.QUICK))
    ]
    assert "all of them busy" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "chosen", [*(["--backend", name] for name in subjects.MODES), ["--backend", "torch", "--compiled"]], ids=" ".join
)
def test_a_single_option_is_measured(chosen, tmp_path):
    chosen = [*chosen, "--options", "--option", "smoothing", "--shape", "64x1000", "--json", tmp_path / "found.json"]
    done = run(*chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())["options"]
    assert (row["option"], row["shape"], row["bound"]) == (
        "smoothing", "64x1000", 1.0 if (row["backend"], row["mode"]) == ("torch", "eager") else 1.2,
    )  # fmt: skip


@pytest.mark.full
def test_the_traffic_is_counted(tmp_path):
    done = run("--traffic", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arrays as large as the logits, 8192x32000" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["traffic"]) == 8
    for row in found["traffic"]:
        assert row["passed"] == (row["ours"] / row["peer"] <= row["bound"])
        assert row["kernels_passed"] == (row["ours_kernels"] / row["peer_kernels"] <= 1.5)


@pytest.mark.full
def test_the_other_measurements_run(tmp_path):
    done = run("--backend", "numpy", "--memory", "--growth", "--import", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    counts = {kind: len(records) for kind, records in found.items() if isinstance(records, list) and kind != "failed"}
    assert counts == {
        "speed": 0, "options": 0, "linear": 0, "linear_memory": 0, "memory": 2, "growth": 2, "traffic": 0, "import": 1,
        "first_call": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "numpy", "--compiled"), "NumPy compiles nothing"),
        (("--memory", "--plot", "ratios.png"), "--plot draws times"),
        (("--memory", "--device", "cuda"), "expected --device cpu"),
        (("--options", "--option", "smoothness"), "is not one of 'indices', 'ignore_index'"),
        (("--options", "--shape", "64x1001"), "is not one of '8x10', '64x1000'"),
        (("--shape", "64x1000"), "none without --options or --linear"),
        (("--linear", "--shape", "64x1000"), "measured: 2048x256x32768, 256x64x1000"),
        (("--option", "smoothing"), "expected --options too"),
        (("--loss", "bce"), "expected --linear too"),
        (("--linear", "--forward"), "in float32"),
        (("--options", "--dtype", "bfloat16"), "in float32"),
        (("--traffic", "--backend", "numpy"), "expected --backend torch"),
    ],
)
def test_a_wrong_call(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
