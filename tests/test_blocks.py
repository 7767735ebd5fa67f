"""What is done with large arrays, here with small ones: blocks of rows, NumPy's threads, after a fork."""

import importlib
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from shared import asked_for
from unilabel.backends import numpy as numpy_backend
from unilabel.conformance.cases import cases
from unilabel.conformance.oracle import expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.worker import answer

import unilabel as ul

CASES = [case for case in cases(("float32", "bfloat16"), 0) if len(case.logits.values) < 1000]


@pytest.fixture
def small(monkeypatch, request):
    """Everything is large, and a block has four elements, or a row."""
    for name in request.config.getoption("--backend") or ("numpy", "torch"):
        if name in ("numpy", "torch"):
            module = importlib.import_module(f"unilabel.backends.{name}")
            monkeypatch.setattr(module, "blockwise", module.blockwise._replace(large=1, block=4))


@pytest.fixture(scope="module")
def right():
    class Answers(dict):
        def __missing__(self, name):
            return self.setdefault(name, expected(next(case for case in CASES if case.id == name)))

    return Answers()


# Every so many of the conformance suite's cases: a few in a quick run.
SOME = pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.full)])


@SOME
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_every_case(name, step, small, right, request):
    backend = asked_for(name, request)
    for case in CASES[::step]:
        numbers = answer(backend, "cpu", case)["numbers"]
        for what, verdict in judge(case, right[case.id], numbers, name).items():
            assert not verdict.failed, f"{case.id}, {what}: {verdict}"


@SOME
def test_away_from_the_cpu(step, right, request, monkeypatch):
    """In eager PyTorch, as if the arrays were on a GPU: there nothing is known of the values."""
    backend = asked_for("torch", request)
    monkeypatch.setattr("unilabel.backends.torch._on_cpu", lambda x: False)
    for case in CASES[::step]:
        numbers = answer(backend, "cpu", case)["numbers"]
        for what, verdict in judge(case, right[case.id], numbers, "torch").items():
            assert not verdict.failed, f"{case.id}, {what}: {verdict}"


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_sums_of_equal_blocks(name, small, request):
    """Every rounding goes in one direction: 512 of them, one for each block, would not do."""
    backend = asked_for(name, request)
    x, z = np.full((2048, 1), 0.3), np.ones((2048, 1))
    for weight, reduction in ((None, "sum"), (z, "mean")):  # the mean divides by a sum of blocks, too
        value = ul.multilabel_logistic_loss(backend.asarray(x), z, weight=weight, reduction=reduction)
        right = math.log1p(math.exp(-0.3)) * (2048 if reduction == "sum" else 1)
        assert abs(float(value) - right) <= 8 * np.spacing(right)


@pytest.mark.full
def test_compiled_in_eager_tensorflow(right, request, monkeypatch):
    """A call that comes again, here the first one: some of the cases, as each compiles for a good part of a second."""
    backend = asked_for("tensorflow", request)
    module = importlib.import_module("unilabel.backends.tensorflow")
    monkeypatch.setattr(module, "_programs", calls := {})
    monkeypatch.setattr(module, "REPEATED", 0)
    for case in CASES[::20]:
        numbers = answer(backend, "/device:CPU:0", case)["numbers"]
        for what, verdict in judge(case, right[case.id], numbers, "tensorflow").items():
            assert not verdict.failed, f"{case.id}, {what}: {verdict}"
    assert all(callable(call) for call in calls.values())
    assert {key[0] for key in calls} >= {"value", "gradient", "value_and_gradient", "gradient_and_hessian"}


@SOME
def test_summed_apart_in_jax(step, right, request, monkeypatch):
    """The value of what is summed, where it is large: the same program at any size."""
    asked_for("jax", request)
    backend = ul.backend.backend_named("jax")
    module = importlib.import_module("unilabel.backends.jax")
    monkeypatch.setattr(module, "LARGE", 0)
    for program in (module._loss, module._closed_form):
        program.clear_cache()  # what was compiled for arrays that were small
    for case in CASES[::step]:
        summed = case.loss == "multilabel_logistic_loss" and case.options.get("reduction") != "none"
        if summed and case.dtype == "float32":
            numbers = answer(backend, backend.devices()[0], case)["numbers"]
            for what, verdict in judge(case, right[case.id], numbers, "jax").items():
                assert not verdict.failed, f"{case.id}, {what}: {verdict}"
    for program in (module._loss, module._closed_form):
        program.clear_cache()


def large(rows=900, classes=500):
    rng = np.random.default_rng(20261121)
    x = rng.normal(0, 5, (rows, classes)).astype("float32")
    assert x.size > numpy_backend.blockwise.block > numpy_backend.blockwise.large
    return x, rng.integers(0, 2, x.shape), rng.integers(0, classes, rows)


def results(x, z, y):
    return [
        *ul.value_and_grad(ul.multilabel_logistic_loss)(x, z, where=z == z[:1]),
        *ul.value_and_grad(ul.softmax_nll)(x, y, ignore_index=7),
        ul.softmax_nll(x, y, reduction="none"),
        *ul.grad_and_hess(ul.multilabel_logistic_loss)(x, z),
    ]


def test_odd_rows_among_many(framework):
    """Of long rows, which compilers sum in other ways than short ones."""
    rng = np.random.default_rng(20261121)
    x = rng.normal(0, 5, (300, 8192)).astype("float32")
    y = rng.integers(8, 8192, len(x))
    inf, nan, largest = np.inf, np.nan, np.finfo("float32").max
    odd = [
        ([inf, largest], 0, 0),
        ([inf, largest], 1, inf),
        ([inf, largest, inf], 2, np.log(2)),
        ([inf, -inf], 1, inf),
        ([largest, largest], 1, np.log(2)),
        ([largest, -largest], 1, inf),
        ([-inf], 0, inf),
        ([nan], 1, nan),
        ([nan, inf], 1, nan),
        ([-inf] * 8192, 3, nan),
        ([0.0], -1, nan),
        ([0.0], 8192, nan),
    ]
    for row, (start, target, _) in enumerate(odd):
        x[row, : len(start)], y[row] = start, target
    usual = np.float64(x[len(odd) :])
    targets = (np.arange(len(usual)), y[len(odd) :])
    others = np.exp(usual)
    others[targets] = 0
    right = [*(loss for *_, loss in odd), *np.log1p(others.sum(axis=1) / np.exp(usual[targets]))]
    logits = framework.array(x, "float32")
    with np.errstate(all="ignore"):  # array-api-strict warns as NumPy does
        alone = ul.softmax_nll(logits, y, reduction="none")
        value, gradient = ul.value_and_grad(ul.softmax_nll)(logits, y, reduction="none")
    for losses in (alone, value):
        np.testing.assert_allclose(framework.numpy(losses), right, rtol=24 * 2.0**-23)
    assert (np.isnan(framework.numpy(gradient)).any(axis=1) == np.isnan(right)).all()


def test_threads_change_no_number(monkeypatch):
    data = large()
    with_threads = results(*data)
    monkeypatch.setattr(numpy_backend, "_helpers", lambda: numpy_backend.blocks.Helpers(0))
    for a, b in zip(with_threads, results(*data), strict=True):
        assert (a == b).all()


def test_layout_changes_no_number():
    """Non-contiguous: of rows, of elements, and with the class axis first."""
    x, z, y = large()
    wide, tall = np.repeat(x, 2, axis=1)[:, ::2], np.ascontiguousarray(x.T)
    assert not wide.flags.c_contiguous
    for a, b in zip(results(x, z, y), results(wide, z, y), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    value, gradient = ul.value_and_grad(ul.softmax_nll)(x, y)
    again, expected = ul.value_and_grad(ul.softmax_nll)(tall, y, axis=0)
    np.testing.assert_allclose(value, again, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected.T, rtol=2e-6)


def in_child(queue):
    queue.put([array.tobytes() for array in results(*large())])


def fork():
    here = [array.tobytes() for array in results(*large())]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == here
    child.join(60)
    assert child.exitcode == 0


def test_after_a_fork():
    """The parent's threads are not in the child. In a process of its own: other frameworks may not be forked."""
    subprocess.run(
        [sys.executable, "-c", "import test_blocks; test_blocks.fork()"], cwd=Path(__file__).parent, check=True
    )


def test_byte_order_changes_no_number(small):
    x = np.random.default_rng(20261121).normal(0, 5, (6, 3))
    other = x.astype(x.dtype.newbyteorder("S"))
    for loss, targets in ((ul.multilabel_logistic_loss, x > 0), (ul.softmax_nll, [0, 1, 2, 0, 1, 2])):
        for a, b in zip(ul.value_and_grad(loss)(x, targets), ul.value_and_grad(loss)(other, targets), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def set_threads(monkeypatch):
    """Sets how many threads there are, until the test ends."""

    def set_them(count):
        monkeypatch.setenv("UNILABEL_NUM_THREADS", str(count))
        numpy_backend._helpers.cache_clear()

    yield set_them
    numpy_backend._helpers.cache_clear()


def test_number_of_threads(set_threads):
    for given, others in ((3, 2), (1, 0)):
        set_threads(given)
        assert numpy_backend._helpers().count == others


@pytest.mark.parametrize("given", ["abc", "", "0", "-1", "1.5"])
def test_what_is_no_number_of_threads(given, monkeypatch):
    """Is refused at the first call, of however small an array."""
    monkeypatch.setenv("UNILABEL_NUM_THREADS", given)
    monkeypatch.delitem(sys.modules, "unilabel.backends.numpy")
    with pytest.raises(ValueError, match=f"UNILABEL_NUM_THREADS to be .* from 1 up. Received: '{given}'"):
        importlib.import_module("unilabel.backends.numpy")


AT_THE_END = """
import atexit, sys, threading
import numpy as np
import unilabel as ul

x = np.zeros((4096, 1024), "float32")
if sys.argv[1] == "torch":
    import torch

    torch.set_num_threads(2)
    x = torch.from_numpy(x)

def call():
    print(round(float(ul.softmax_nll(x, [7] * 4096)), 5), flush=True)

def after_the_main_thread():
    threading.main_thread().join()
    call()

atexit.register(call)
threading.Thread(target=after_the_main_thread).start()
"""


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_while_the_interpreter_ends(name, request):
    """In a thread that outlives the main one, and in an atexit handler."""
    asked_for(name, request)
    environment = os.environ | {"UNILABEL_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, name], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [str(round(math.log(1024), 5))] * 2, "")


INTERRUPTED = """
import faulthandler, sys, threading
from unilabel.backends import numpy

class Stopped(Exception):
    pass

def stop_at(count):
    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count -= 1
            if count == 0:
                sys.settrace(None)
                raise Stopped
        return trace
    return trace

faulthandler.dump_traceback_later(120, exit=True)
meeting = threading.Barrier(4)
numpy._each(lambda row: meeting.wait(), range(4))
count, stopped = 0, True
while stopped:
    count, stopped = count + 1, False
    sys.settrace(stop_at(count))
    try:
        numpy._each(lambda row: row, range(4))
    except Stopped:
        stopped = True
    finally:
        sys.settrace(None)
assert count > 100, count
numpy._each(lambda row: meeting.wait(), range(4))
"""


def test_the_exception_of_a_signals_handler(tmp_path):
    """Wherever it is raised in the caller, it is what comes, and each thread still answers.

    It is raised before each instruction in turn; a handler runs between some of them.
    """
    environment = os.environ | {"UNILABEL_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_callers_own_exception_comes_first(set_threads):
    """Ctrl-C must not get lost in an error of a helper's."""
    set_threads(4)
    here, caller, helper = threading.get_ident(), threading.Event(), threading.Event()

    def fail(block):
        if threading.get_ident() == here:
            caller.set()
            assert helper.wait(60)
            raise KeyboardInterrupt
        assert caller.wait(60)
        helper.set()
        raise IndexError

    with pytest.raises(KeyboardInterrupt):
        numpy_backend._each(fail, [slice(i, i + 1) for i in range(20)])


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_an_error_in_any_block_is_the_callers(bad, set_threads):
    """Wherever it was computed, and no block is lost to it the next time."""
    set_threads(4)

    def double(block):
        if block.start == bad:
            raise ValueError(f"block {bad}")
        return 2 * block.start

    with pytest.raises(ValueError, match=f"block {bad}"):
        numpy_backend._each(double, [slice(i, i + 1) for i in range(20)])
    assert numpy_backend._each(double, [slice(i, i + 1) for i in range(100, 200)]) == [2 * i for i in range(100, 200)]


def blocks_of_torch(torch):
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(20261126)).requires_grad_()
    value = ul.softmax_nll(x, torch.arange(64))
    return value, *torch.autograd.grad(value, x)


def test_threads_of_torch(small, request, monkeypatch):
    """One for each block change no number, nor how many threads torch has, here or in a thread that starts later."""
    asked_for("torch", request)
    import torch
    from unilabel.backends import torch_threads

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = blocks_of_torch(torch)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *later] == [2, 2]
        monkeypatch.setattr(torch_threads, "_threads", lambda count: None)
        for a, b in zip(found, blocks_of_torch(torch), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "enable_grad"])
def test_modes_of_a_thread(mode, small, request):
    """In inference mode memory is made that may be written in that mode alone."""
    asked_for("torch", request)
    import torch

    with getattr(torch, mode)(), torch.device("meta"):
        x = torch.tensor(np.random.default_rng(20261126).normal(size=(64, 10)), device="cpu")
        targets = torch.arange(64, device="cpu") % 10
        losses = ul.softmax_nll(x, targets, reduction="none")
        value, gradient = ul.value_and_grad(ul.softmax_nll)(x, torch.eye(10, device="cpu")[targets])
        ones = torch.ones((), device="cpu")
        assert torch.isclose(value, losses.mean() * ones)
        assert gradient.sum(dim=1).abs().max() < 1e-12


def test_a_dispatch_mode_sees_each_block(small, request):
    asked_for("torch", request)
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        softmaxes = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            Counter.softmaxes += function is torch.ops.aten._softmax.default
            return function(*arguments, **(options or {}))

    with Counter():
        blocks_of_torch(torch)
    assert Counter.softmaxes == 64


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_masked_gradient_is_0_whatever_the_cotangent(reduction, small, request):
    """A scaler of gradients may overflow."""
    asked_for("torch", request)
    import torch

    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    where = torch.tensor([[True, False, True], [True, True, False]])
    calls = [
        (ul.multilabel_logistic_loss, torch.tensor([[0.0, 1, 1], [1, 0, 1]])),
        (ul.softmax_nll, torch.tensor([0, 1])),
    ]
    for loss, targets in calls:
        value = loss(x, targets, where=where, reduction=reduction)
        (gradient,) = torch.autograd.grad(value, x, torch.full_like(value, math.inf))
        assert (gradient[~where] == 0).all()
        assert not torch.isfinite(gradient[where]).all()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_computed_once(name, large, request, monkeypatch):
    """A masked target that is NaN, an example without classes, and an ignored one whose class is masked."""
    backend = asked_for(name, request)
    if large:
        request.getfixturevalue("small")
    blocks, runs = importlib.import_module("unilabel.backends.blocks"), []
    run = blocks._run
    monkeypatch.setattr(blocks, "_run", lambda *call: runs.append(call[1]) or run(*call))

    x = backend.asarray(np.linspace(-3, 3, 12).reshape(4, 3))
    where = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    labels = np.where(where, [1.0, 0.0, 1.0], np.nan)
    values = [
        ul.multilabel_logistic_loss(x, labels, where=where),
        ul.softmax_nll(x, np.where(where, 0.5, np.nan), where=where),
        ul.softmax_nll(x, [1, 1, -1, 2], where=where, ignore_index=-1),
        ul.softmax_nll(x, [1, 1, 0, 2], where=where, label_smoothing=0.1),
    ]
    assert all(math.isfinite(float(value)) for value in values)
    assert len(runs) == len(values)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_target_that_is_nan(name, large, request):
    """Where it is masked it may be; where not, the loss is NaN."""
    backend = asked_for(name, request)
    if large:
        request.getfixturevalue("small")
    x, where = backend.asarray(np.zeros((3, 2))), np.array([[1, 1], [1, 0], [1, 0]], bool)
    labels = np.array([[1.0, 0.0], [math.nan, math.nan], [1.0, math.nan]])
    losses = backend.to_numpy(ul.multilabel_logistic_loss(x, labels, where=where, reduction="none"))
    np.testing.assert_array_equal(np.isnan(losses), [[False, False], [True, False], [False, False]])
    losses = backend.to_numpy(ul.softmax_nll(x, labels, where=where, reduction="none"))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
