"""NumPy: every kind of array, no warning, processes, pools and more elements than 32 bits count."""

import concurrent.futures
import copy
import inspect
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from capabilities import close

import unilabel as ul

WHOLE = ["multilabel_logistic_loss", "softmax_nll"]
some = pytest.mark.parametrize("sample", WHOLE, indirect=True)


def right(sample, x, targets=None, dtype="float64"):
    """All that the loss has to give, kind and shape before numbers."""
    targets = sample.targets if targets is None else targets
    value, gradient = ul.value_and_grad(sample.loss)(x, targets, reduction="none")
    slope, hessian = ul.grad_and_hess(sample.loss)(x, targets)
    for got, numbers in (
        (sample(x, targets, reduction="none"), sample.values),
        (value, sample.values),
        (gradient, sample.gradient),
        (slope, sample.gradient),
        (hessian, sample.hessian),
    ):
        assert type(got) is np.ndarray
        assert got.dtype == np.asarray(x).dtype
        close(got, numbers, dtype)


# --- Floating-point errors --------------------------------------------------------------------------------------------

WILD = [-np.inf, -1e308, -800.0, -1e-310, -0.0, 0.0, 5e-324, 1.0, 800.0, 1e308, np.inf, np.nan]


@pytest.mark.capability("numpy", "np.errstate(all='raise')")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(12, 1), (4, 3), (1, 12), (0, 3), (12,)])
def test_nothing_is_raised_and_nothing_warned_of(sample, dtype, shape):
    """filterwarnings=error makes a warning a failure as well."""
    with np.errstate(all="ignore"):
        x = np.resize(WILD, shape).astype(dtype)
    per_row = sample.name in ("softmax_nll", "cross_entropy", "nll")
    weight = np.full(x.shape[-1], 1e30)
    options = [{}, {"label_smoothing": 0.1}, {"where": x == x}, {"weight": weight}, {"reduction": "sum"}]
    targets = [np.zeros(shape), np.full(shape, np.nan), np.full(shape, 1e300)]
    targets += [np.zeros(shape[:-1], int), np.full(shape[:-1], -7)] if per_row else [np.ones(shape, bool)]
    before = np.geterr()
    with np.errstate(all="raise"):
        for given in options:
            for z in targets:
                sample(x, z, **given)
                ul.value_and_grad(sample.loss)(x, z, **given)
                ul.grad_and_hess(sample.loss)(x, z, **{**given, "reduction": "sum"})
        for activation in (ul.sigmoid, ul.log_sigmoid, ul.softmax, ul.log_softmax):
            activation(x)
        assert set(np.geterr().values()) == {"raise"}
    assert np.geterr() == before


@pytest.mark.capability("numpy", "np.seterrcall, np.errstate(all='call')")
def test_no_error_handler_is_called(sample):
    def handler(kind, flag):
        raise AssertionError(kind)

    with np.errstate(all="call", call=handler):
        right(sample, sample.x)
        sample(np.full_like(sample.x, np.inf))


# --- Kinds of array ---------------------------------------------------------------------------------------------------


@pytest.mark.capability("numpy", "ndarray and scalars")
def test_arrays(sample):
    right(sample, sample.x)
    right(sample, sample.x, sample.distributions)
    right(sample, sample.x, sample.targets.tolist())
    right(sample, sample.x, sample.distributions.astype("float16"))


def fortran(x):
    return np.asfortranarray(x)


def negative_strides(x):
    return np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]


def every_other(x):
    wide = np.full((2 * x.shape[0], 3 * x.shape[1]), np.nan)
    wide[::2, ::3] = x
    return wide[::2, ::3]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    raw = np.empty(x.nbytes + 1, "uint8")[1:]
    array = raw.view(x.dtype).reshape(x.shape)
    array[...] = x
    assert not array.flags.aligned
    return array


LAYOUTS = [fortran, negative_strides, every_other, read_only, unaligned]


@pytest.mark.capability("numpy", "Fortran order, strides, read-only, unaligned")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(sample, layout):
    x = layout(sample.x)
    before = x.copy()
    right(sample, x)
    right(sample, x, layout(sample.distributions))
    np.testing.assert_array_equal(x, before)  # nothing is written into what is given


@pytest.mark.capability("numpy", "big-endian")
def test_big_endian(sample):
    x, targets = sample.x.astype(">f8"), sample.targets.astype(">i8")
    assert x.dtype.byteorder == ">"
    right(sample, x, targets)
    right(sample, sample.x, targets)
    right(sample, x, sample.distributions.astype(">f8"))


@pytest.mark.capability("numpy", "np.memmap")
def test_memory_mapped(sample, tmp_path):
    np.save(tmp_path / "x.npy", sample.x)
    np.save(tmp_path / "targets.npy", sample.targets)
    for mode in ("r", "c", "r+"):
        x, targets = (np.load(tmp_path / name, mmap_mode=mode) for name in ("x.npy", "targets.npy"))
        assert isinstance(x, np.memmap)
        right(sample, x, targets)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), sample.x)


class Labelled(np.ndarray):
    pass


@pytest.mark.capability("numpy", "subclasses of ndarray, read as plain arrays")
def test_subclasses(sample):
    """As np.asarray reads them. np.matrix and masked arrays mean other things, and are refused."""
    right(sample, sample.x.view(Labelled), sample.targets.view(Labelled))
    right(sample, sample.x.view(np.recarray))
    for kind in (np.matrix, np.ma.MaskedArray):
        with pytest.raises(TypeError, match=f"Received: numpy {kind.__name__}"):
            sample(sample.x.view(kind))
        with pytest.raises(TypeError, match=f"Expected targets: .* Received: numpy {kind.__name__}"):
            sample(sample.x, sample.targets.view(kind))


@pytest.mark.capability("numpy", "one example, and none")
def test_no_batch_axis_and_no_example(sample):
    """Class axis alone: the batch is 0-d."""
    value, gradient = ul.value_and_grad(sample.loss)(sample.x[1], sample.targets[1], reduction="none")
    assert type(value) is np.ndarray
    assert value.shape == sample.values[1].shape
    close(value, sample.values[1])
    close(gradient, sample.gradient[1])
    value, gradient = ul.value_and_grad(sample.loss)(sample.x[:0], sample.targets[:0])
    assert (value.shape, value.item()) == ((), 0.0)
    assert gradient.shape == (0, 3)


@pytest.mark.capability("numpy", "Python and NumPy scalars as options")
@pytest.mark.parametrize("two", [2, 2.0, np.float64(2), np.float32(2), np.int8(2), np.array(2)])
def test_scalars_do_not_promote(sample, two):
    x = sample.x.astype("float32")
    per_row = sample.name in ("softmax_nll", "cross_entropy", "nll")
    options = {"sample_weight": [two] * 4} if per_row else {"weight": two}
    value, gradient = ul.value_and_grad(sample.loss)(x, sample.targets, reduction="none", **options)
    assert (value.dtype, gradient.dtype) == ("float32", "float32")
    once, slope = ul.value_and_grad(sample.loss)(x, sample.targets, reduction="none")
    np.testing.assert_array_equal(value, 2 * once)
    np.testing.assert_array_equal(gradient, 2 * slope)


# --- Functions as values ----------------------------------------------------------------------------------------------


@pytest.mark.capability("numpy", "pickle, copy and inspect of value_and_grad(loss)")
def test_functions_are_pickled_and_copied(sample):
    for function in (sample.loss, ul.value_and_grad(sample.loss), ul.grad_and_hess(sample.loss)):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(function, protocol)) is function
        assert copy.deepcopy(function) is function
        assert function.__doc__
        options = set(inspect.signature(function).parameters) - {"logits", "probs", "log_probs", "targets"}
        assert options == set(sample.loss.__kwdefaults__)
    assert ul.value_and_grad(sample.loss) is ul.value_and_grad(sample.loss)  # what is compiled is found again
    assert inspect.signature(ul.grad_and_hess(sample.loss)).parameters["reduction"].default == "sum"
    assert inspect.signature(ul.value_and_grad(sample.loss)).bind(sample.x, targets=1, axis=0)


# --- Processes and pools ----------------------------------------------------------------------------------------------


def answers(name, x, targets):
    """In another process: what `right` looks at, and its pid."""
    loss = getattr(ul, name)
    return *ul.value_and_grad(loss)(x, targets, reduction="none"), ul.grad_and_hess(loss)(x, targets)[1], os.getpid()


def compare(sample, results, forked=True):
    for value, gradient, hessian, pid in results:
        assert (pid != os.getpid()) == forked
        close(value, sample.values)
        close(gradient, sample.gradient)
        close(hessian, sample.hessian)


@some
@pytest.mark.capability("numpy", "forked workers, after use in the parent")
# Python warns of a fork with threads running: those of other tests' frameworks.
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_fork(sample):
    right(sample, sample.x)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        compare(sample, pool.starmap(answers, [(sample.name, sample.x, sample.targets)] * 4))


@some
@pytest.mark.capability("numpy", "spawned workers")
def test_spawn(sample):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        compare(sample, [pool.submit(answers, sample.name, sample.x, sample.targets).result()])
        # The function itself travels, and gives what it gives here.
        value, gradient = pool.submit(ul.value_and_grad(sample.loss), sample.x, sample.targets).result()
        here = ul.value_and_grad(sample.loss)(sample.x, sample.targets)
        np.testing.assert_array_equal(gradient, here[1])
        assert value == here[0]


@pytest.mark.capability("numpy", "concurrent.futures threads")
def test_thread_pool(sample):
    """Of threads whose np.errstate is their own."""

    def strict():
        np.seterr(all="raise")

    with concurrent.futures.ThreadPoolExecutor(8, initializer=strict) as pool:
        jobs = [pool.submit(answers, sample.name, sample.x, sample.targets) for _ in range(64)]
        compare(sample, [job.result() for job in jobs], forked=False)


# --- More elements than 32 bits count ---------------------------------------------------------------------------------


ROWS, CLASSES = 2**20 + 1, 2**11


@pytest.mark.slow  # a minute, and 21 bytes for each logit: 42 GiB
@pytest.mark.parametrize("sample", ["softmax_nll"], indirect=True)
@pytest.mark.capability("numpy", "more than 2³¹ logits in one call")
def test_huge(sample):
    """All zeros (which take no memory until they are written) but for the last row, which lies beyond 2³¹."""
    needed, free = 48 << 30, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if ROWS * CLASSES > 2**31 and free < needed:
        pytest.skip(f"takes {needed >> 30} GiB, and {free >> 30} are free")
    x, targets = np.zeros((ROWS, CLASSES), "float32"), np.zeros(ROWS, "uint8")
    x[-1], targets[-1] = -np.inf, sample.targets[0]
    x[-1, :3] = sample.x[0]
    values = sample(x, targets, reduction="none")
    assert values.shape == (ROWS,)
    close(values[-1], sample.values[0], "float32")
    close(values[:-1].min(), np.log(CLASSES), "float32")
    close(values[:-1].max(), np.log(CLASSES), "float32")
