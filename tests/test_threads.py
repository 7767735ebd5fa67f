"""Many threads at once, from the first call on, and nothing of a process or a framework changed by any call."""

import itertools
import os
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from crossed import OF_LINEAR, close
from unilabel.backends.array_api import ArrayAPIBackend

import unilabel as ul
import unilabel.backend
from unilabel.backend import backend_of

THREADS = 8


def jobs(framework, sample):
    """What the threads are to compute, each a function without arguments that returns NumPy arrays."""
    x, targets, cotangent = map(framework.backend.asarray, (sample.x, sample.targets, sample.cotangent))
    sample, narrow = sample.beside(framework.backend.asarray), framework.array(sample.x)

    def job(function, *arguments, **options):
        def run():
            results = function(*arguments, **options)
            return [framework.numpy(result) for result in (results if isinstance(results, tuple) else (results,))]

        return run

    closed = sample.closed(ul.value_and_grad)
    found = [job(function, logits, targets) for logits in (x, narrow) for function in (sample, closed)]
    found.append(job(sample.closed(ul.grad_and_hess), x, targets, reduction="sum"))
    found += [job(ul.log_softmax, x), job(ul.sigmoid, narrow)]
    if framework.backend.autodiff:
        found.append(job(framework.backend.vjp, sample, x, cotangent))
    return found


def in_threads(functions):
    """The results of all functions, computed by every thread, each beginning with another one."""
    results, start = [None] * THREADS, threading.Barrier(THREADS)

    def work(i):
        order = [(i * len(functions) // THREADS + k) % len(functions) for k in range(len(functions))]
        start.wait()
        answers = {k: functions[k]() for k in order}
        results[i] = [answers[k] for k in range(len(functions))]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.capability(None, "eight threads at once", brief=True)
def test_as_many_threads_so_one(framework, sample):
    """Threads first: whatever is compiled or cached on the way is not there yet."""
    functions = jobs(framework, sample)
    many = in_threads(functions)
    # In eager TensorFlow a call that comes again is compiled: from then on, the last digit may be another.
    if framework.name == "tensorflow":
        sys.modules["unilabel.backends.tensorflow"]._programs.clear()
    alone = [[function() for function in functions] for _ in range(5)]
    (value,), (value_beside, gradient), _, _, (gradient_of_sum, _), *_ = alone[0]
    close(value, sample.value)
    close(value_beside, sample.value)
    close(gradient, sample.gradient)
    close(gradient_of_sum, sample.gradient_of_sum)
    if framework.backend.autodiff:
        close(alone[0][-1][1], sample.pulled_back)
    for answers in many:
        assert answers is not None
        for got, *right in zip(itertools.chain(*answers), *(itertools.chain(*a) for a in alone), strict=True):
            assert {one.dtype for one in right} == {got.dtype}
            assert any(np.array_equal(got, one, equal_nan=True) for one in right)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.capability(None, "eight threads at once", **OF_LINEAR)
def test_linear_losses_in_many_threads(framework, sample):
    inputs = tuple(map(framework.backend.asarray, sample.inputs))
    targets, given = framework.backend.asarray(sample.targets), sample.beside(framework.backend.asarray)
    right = sample.value, sample.value, *sample.through(sample.gradient)

    def call():
        results = given(*inputs, targets=targets), *given.closed(*inputs, targets=targets)
        return list(map(framework.numpy, results))

    def by_autodiff():
        cotangent = framework.backend.asarray(sample.cotangent)
        pair = framework.backend.vjp(lambda x: given(x, *inputs[1:], targets=targets), inputs[0], cotangent)
        return list(map(framework.numpy, pair))

    functions = [call, call, *([by_autodiff, by_autodiff] if framework.backend.autodiff else [])]
    for found in in_threads(functions):
        for results in found:
            numbers = right if len(results) > 2 else (sample.value, sample.through(sample.pulled_back)[0])
            for got, expected in zip(results, numbers, strict=True):
                close(got, expected)


# --- From the very first call -----------------------------------------------------------------------------------------

COLD = """
import importlib, sys, threading
import numpy as np

arrays = {
    "numpy": lambda x: np.asarray(x),
    "torch": lambda x: importlib.import_module("torch").tensor(x, dtype=importlib.import_module("torch").float64),
    "jax": lambda x: importlib.import_module("jax.numpy").asarray(x, dtype="float64"),
    "tensorflow": lambda x: importlib.import_module("tensorflow").constant(x, dtype="float64"),
    "array_api_strict": lambda x: importlib.import_module("array_api_strict").asarray(x),
    "mlx": lambda x: importlib.import_module("mlx.core").array(x, importlib.import_module("mlx.core").float64),
}
names = sys.argv[1:]
if "tensorflow" in names:  # the first function that it traces may not be traced while other threads take turns so often
    tf = importlib.import_module("tensorflow")
    tf.function(lambda x: x + 1, autograph=False, jit_compile=True)(1.0)
inputs = [arrays[names[i % len(names)]]([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]]) for i in range(8)]
start, failed, results = threading.Barrier(8), [], [None] * 8
sys.setswitchinterval(1e-6)

def work(i):
    start.wait()
    try:
        import unilabel as ul
        x = inputs[i]
        value, gradient = ul.value_and_grad(ul.softmax_nll)(x, [0, 1])
        ul.multilabel_logistic_loss(x, ul.sigmoid(x))
        results[i] = [float(value), float(ul.softmax_nll(x, [0, 1])), *np.asarray(gradient).ravel().tolist()]
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
p = np.exp(np.array([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]]))
p /= p.sum(1, keepdims=True)
value = -np.log(p[[0, 1], [0, 1]]).mean()
right = [value, value, *((p - np.eye(3)[:2]) / 2).ravel()]
np.testing.assert_allclose(results, [right] * 8, rtol=1e-14)
"""


class Slow(types.SimpleNamespace):
    """Lets other threads run before anything is stored."""

    def __setattr__(self, name, value):
        time.sleep(0.02)
        super().__setattr__(name, value)


def test_the_first_call_finds_one_backend(framework, monkeypatch):
    """All threads find the same one, though each looks for it; tensors are told apart by their backends' identity."""
    x = framework.array([[2.0, 0.5, -1.0]])
    made = ArrayAPIBackend.__init__

    def slow(self, name):
        made(self, name)
        time.sleep(0.02)

    monkeypatch.setattr(ArrayAPIBackend, "__init__", slow)
    for name, empty in (("_names", {}), ("_others", {}), ("_loaded", Slow(none=None))):
        monkeypatch.setattr(unilabel.backend, name, empty)
    found = in_threads([lambda: backend_of(x, x), lambda: (time.sleep(0.01), backend_of(x, x))[1]])
    assert None not in found
    assert len({id(backend) for backends in found for backend in backends}) == 1


def run_fresh(code, *arguments, cwd):
    environment = os.environ | {"JAX_ENABLE_X64": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_cold_start_of_numpy(tmp_path):
    """unilabel and the backend imported, and found, by eight threads at once."""
    run_fresh(COLD, "numpy", cwd=tmp_path)


@pytest.mark.full
def test_cold_start(framework, tmp_path):
    for _ in range(5 if framework.name in ("numpy", "array_api_strict") else 1):
        run_fresh(COLD, framework.name, cwd=tmp_path)


@pytest.mark.full
def test_cold_start_of_all_frameworks_at_once(frameworks, tmp_path):
    run_fresh(COLD, *(framework.name for framework in frameworks), cwd=tmp_path)


# --- Global state -----------------------------------------------------------------------------------------------------

STATE = """
import gc, importlib, locale, logging, os, random, signal, sys, threading, warnings
import numpy as np

name = sys.argv[1]
module = importlib.import_module("mlx.core" if name == "mlx" else name)

def process():
    import decimal
    return {
        "np.errstate": np.geterr(), "np.printoptions": np.get_printoptions(),
        "np.random": np.random.get_state()[1].tobytes(), "np.bufsize": np.getbufsize(),
        "warnings.filters": list(warnings.filters), "showwarning": warnings.showwarning,
        "os.environ": dict(os.environ), "locale": locale.setlocale(locale.LC_ALL), "sys.path": list(sys.path),
        "meta_path": list(map(str, sys.meta_path)), "handlers": logging.root.handlers, "level": logging.root.level,
        "logging": [(n, logging.getLogger(n).handlers, logging.getLogger(n).level) for n in loggers],
        "threads": threading.active_count(), "random": random.getstate(), "cwd": os.getcwd(), "gc": gc.get_threshold(),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook), "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(), "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "decimal": decimal.getcontext(), "streams": (sys.stdout, sys.stderr), "umask": os.umask(os.umask(0o22)),
    }

def torch(t):
    x = t.ones(2, requires_grad=True)
    t.autograd.grad(x * 1, x, t.ones(2))  # imports SymPy, which adds a filter of warnings
    return {
        "threads": (t.get_num_threads(), t.get_num_interop_threads()), "dtype": t.get_default_dtype(),
        "device": t.get_default_device(), "rng": t.get_rng_state().numpy().tobytes(),
        "deterministic": (t.are_deterministic_algorithms_enabled(), t.is_deterministic_algorithms_warn_only_enabled()),
        "grad": (t.is_grad_enabled(), t.is_inference_mode_enabled(), t.is_anomaly_enabled()),
        "autocast": t.is_autocast_enabled("cpu"), "matmul": t.get_float32_matmul_precision(),
        "mkldnn": t.backends.mkldnn.enabled,
        "flush": (t.tensor([1e-40]) * 1).item(), "warn": t.is_warn_always_enabled(),
        "modes": (t._C._len_torch_dispatch_stack(), t._C._len_torch_function_stack()),
    }

def jax(j):
    return {"config": dict(j.config.values), "devices": j.devices(), "dtype": j.numpy.zeros(1).dtype}

def tensorflow(tf):
    from tensorflow.python.eager import context
    from tensorflow.python.framework import config, ops
    return {
        "eager": (tf.executing_eagerly(), tf.config.functions_run_eagerly()), "rng": context.context()._seed,
        "placement": tf.config.get_soft_device_placement(),
        "numpy": (hasattr(tf.constant(1), "reshape"), hasattr(tf.Tensor, "astype")),
        "promotion": (ops.is_auto_dtype_conversion_enabled(), ops.is_numpy_style_type_promotion()),
        "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "more threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "jit": tf.config.optimizer.get_jit(), "options": tf.config.optimizer.get_experimental_options(),
        "device": tf.constant(1).device, "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
        "deterministic": config.is_op_determinism_enabled(), "log": tf.get_logger().level,
        "default graph": tf.compat.v1.get_default_graph().as_graph_def().SerializeToString(),
        "floatx": sys.modules["keras"].config.floatx() if "keras" in sys.modules else None,
    }

def array_api_strict(xp):
    return xp.get_array_api_strict_flags()

def mlx(mx):
    device = mx.default_device()
    return {"device": str(device), "stream": str(mx.default_stream(device)), "rng": str(mx.random.state)}

of_framework = {f.__name__: f for f in (torch, jax, tensorflow, array_api_strict, mlx)}.get(name, lambda module: {})

def state():
    return {k: repr(v) for k, v in (process() | {f"{name}: {k}": v for k, v in of_framework(module).items()}).items()}

loggers = [n for n, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
state()  # asking may itself begin something
before = state()

import unilabel as ul
from unilabel.backend import backend_named
from unilabel.losses import FORMULAS

backend = backend_named(name)
LABELS, INDICES = [[1, 0, 1], [0, 1, 0]], [2, 0]
for dtype in ("float64",) + (("bfloat16",) if name != "array_api_strict" else ()):
    x = backend.cast(backend.asarray(np.array([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])), dtype)
    for loss, formula in FORMULAS.items():
        z = INDICES if formula.per_example else LABELS
        for options in ({}, {"where": [True] * 3, "weight": [1, 2.0, 3], "label_smoothing": 0.1}):
            loss(x, z, **options)
            ul.value_and_grad(loss)(x, z, **options)
        if loss is not ul.nll:
            loss(x, z, validate=True)
        ul.grad_and_hess(loss)(x, z)
        if backend.autodiff:
            backend.vjp(lambda x: loss(x, z), x, backend.cast(backend.asarray(np.ones(())), dtype))
        for wrong in ({"axis": 7}, {"reduction": "max"}, {"weight": "heavy"}):
            try:
                loss(x, z, **wrong)
            except (TypeError, ValueError):
                pass
    for activation in (ul.sigmoid, ul.log_sigmoid, ul.softmax, ul.log_softmax):
        activation(x)

after = state()
changed = [f"{k}: {before[k][:300]} -> {after[k][:300]}" for k in before if before[k] != after[k]]
assert not changed, changed
"""


def test_no_state_is_changed_by_numpy(tmp_path):
    """In a process of its own: there is no second first call."""
    run_fresh(STATE, "numpy", cwd=tmp_path)


@pytest.mark.full
def test_no_state_is_changed(framework, tmp_path):
    run_fresh(STATE, framework.name, cwd=tmp_path)
