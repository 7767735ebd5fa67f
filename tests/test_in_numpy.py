"""NumPy: every kind of array, no warning, processes, pools and more elements than 32 bits count."""

import concurrent.futures
import copy
import inspect
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from crossed import LOSSES, close

import unilabel as ul


def answers(sample, x=None, targets=None, **arrays):
    """The value; value and gradient; gradient and Hessian diagonal of the sum: as the sample's call gives them."""
    x = sample.x if x is None else x
    pair = sample.closed(ul.value_and_grad)(x, targets, **arrays)
    return sample(x, targets, **arrays), *pair, *sample.closed(ul.grad_and_hess)(x, targets, reduction="sum", **arrays)


def compare(results, sample):
    value, value_beside, gradient, gradient_of_sum, diagonal = results
    divided = np.abs(sample.gradient).max() / np.abs(sample.gradient_of_sum).max()
    close(value, sample.value)
    close(value_beside, sample.value)
    close(gradient, sample.gradient)
    close(gradient_of_sum, sample.gradient_of_sum)
    close(diagonal * divided, sample.hessian)


def check(sample, x=None, targets=None):
    """All that the loss has to give: plain arrays in the logits' dtype, and the right numbers."""
    results = answers(sample, x, targets)
    for result in results:
        assert type(result) is np.ndarray
        assert result.dtype == (sample.x if x is None else np.asarray(x)).dtype
    compare(results, sample)


def check_all(sample, convert):
    """With logits, targets and operands each converted, none of which is written to."""
    x, targets, converted = convert(sample.x), convert(sample.targets), sample.beside(convert)
    before = [array.copy() for array in (x, targets, *converted.arrays.values())]
    check(converted, x, targets)
    check(converted, sample.x, targets)
    check(sample, x)
    for array, same in zip((x, targets, *converted.arrays.values()), before, strict=True):
        np.testing.assert_array_equal(array, same)


# --- Floating-point errors --------------------------------------------------------------------------------------------

WILD = [-np.inf, -1e308, -800.0, -1e-310, -0.0, 0.0, 5e-324, 1.0, 800.0, 1e308, np.inf, np.nan]


def call_wildly(*samples):
    """With logits and targets that may be anything."""
    for one in samples:
        for dtype in ("float16", "float32", "float64"):
            with np.errstate(all="ignore"):
                x = np.resize(WILD, one.x.shape).astype(dtype)
            wrong = [np.full(one.targets.shape, -7)]
            if one.row["targets"] not in ("indices", "positives"):
                wrong = [np.full(one.x.shape, number) for number in (np.nan, 1e300)]
            for targets in (one.targets, *wrong):
                one(x, targets)
                one.closed(ul.value_and_grad)(x, targets)
                one.closed(ul.grad_and_hess)(x, targets, reduction="sum")


@pytest.mark.capability("numpy", "np.errstate(all='raise')")
def test_nothing_is_raised_and_nothing_warned_of(sample):
    """filterwarnings=error makes a warning a failure as well."""
    before, longer, wider = np.geterr(), sample.of(rows=12), sample.of(rows=2, classes=12)
    with np.errstate(all="raise"):
        check(sample)
        call_wildly(sample, longer, wider)
        assert set(np.geterr().values()) == {"raise"}
    assert np.geterr() == before


@pytest.mark.capability("numpy", "np.seterrcall, np.errstate(all='call')")
def test_no_error_handler_is_called(sample):
    def handler(kind, flag):
        raise AssertionError(kind)

    with np.errstate(all="call", call=handler):
        check(sample)
        call_wildly(sample)


@pytest.mark.parametrize("function", [ul.sigmoid, ul.log_sigmoid, ul.softmax, ul.log_softmax])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_activations_raise_nothing(function, dtype):
    with np.errstate(all="ignore"):
        x = np.resize(WILD, (4, 3)).astype(dtype)
    with np.errstate(all="raise"):
        function(x)


# --- Kinds of array ---------------------------------------------------------------------------------------------------


@pytest.mark.capability("numpy", "ndarray, lists and scalars", pairs=True)
def test_arrays(sample):
    check(sample)
    check(sample.beside(np.ndarray.tolist), targets=sample.targets.tolist())
    if sample.targets.dtype.kind in "bi":
        soft = sample.row["targets"] in ("integer", "bool")
        for dtype in ("int8", "int16", "int32", *(["float16", "float32"] if soft else [])):
            check(sample, targets=sample.targets.astype(dtype))


def fortran(x):
    return np.array(x, order="F")


def negative_strides(x):
    backwards = (slice(None, None, -1),) * x.ndim
    return x[backwards].copy()[backwards]


def every_other(x):
    wide = np.zeros([3 * n for n in x.shape], x.dtype)
    some = (slice(None, None, 3),) * x.ndim
    wide[some] = x
    return wide[some]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    array = np.empty(x.nbytes + 1, "uint8")[1:].view(x.dtype).reshape(x.shape)
    array[...] = x
    assert not array.flags.aligned or x.dtype.alignment == 1
    return array


LAYOUTS = [fortran, negative_strides, every_other, read_only, unaligned]


@pytest.mark.capability("numpy", "Fortran order, strides, read-only, unaligned")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(sample, layout):
    check_all(sample, layout)


@pytest.mark.capability("numpy", "big-endian")
def test_big_endian(sample):
    def swapped(x):
        return x.astype(x.dtype.newbyteorder(">"))

    assert swapped(sample.x).dtype.byteorder == ">"
    check_all(sample, swapped)


@pytest.mark.capability("numpy", "np.memmap")
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_memory_mapped(sample, tmp_path, mode):
    def mapped(x):
        np.save(tmp_path / "array.npy", x)
        (tmp_path / "array.npy").rename(path := tmp_path / f"{len(list(tmp_path.iterdir()))}.npy")
        return np.load(path, mmap_mode=mode)

    assert isinstance(mapped(sample.x), np.memmap)
    check_all(sample, mapped)


class Labelled(np.ndarray):
    pass


@pytest.mark.capability("numpy", "subclasses of ndarray, read as plain arrays")
@pytest.mark.parametrize("kind", [Labelled, np.recarray])
def test_subclasses(sample, kind):
    check_all(sample, lambda x: x.view(kind))


@pytest.mark.parametrize("sample", LOSSES, indirect=True)
@pytest.mark.parametrize("kind", [np.matrix, np.ma.MaskedArray])
def test_arrays_that_mean_other_things_are_refused(sample, kind):
    with pytest.raises(TypeError, match=f"Received: numpy {kind.__name__}"):
        sample(sample.x.view(kind))
    for name, array in {"targets": sample.targets, "weight": np.ones(3), "where": np.ones((1, 3), bool)}.items():
        with pytest.raises(TypeError, match=f"Expected {name}: .* Received: numpy {kind.__name__}"):
            sample(sample.x, **{name: array.view(kind)})


def operands_of(sample, rows):
    """The operands that some of the examples have: with a slice of their axis, or with the first alone, and no axis."""
    found = {}
    for name, array in sample.arrays.items():
        if name == "sample_weight" or array.ndim == sample.x.ndim:
            found[name] = array[rows] if len(array) > 1 or rows == 0 else array
    return found


@pytest.mark.capability("numpy", "one example, and none")
def test_no_batch_axis_and_no_example(sample):
    def first(axis, rows, **options):
        given = operands_of(sample, rows) | axis | options
        return sample.closed(ul.value_and_grad)(sample.x[rows], sample.targets[rows], **given)

    right = sample.gradient_of_sum[:1]
    right.terms = sample.gradient_of_sum.terms[:1]
    close(first({}, slice(1), reduction="sum")[1], right)
    axis = {"middle": {"axis": 0}, "two": {"axis": (0, 1)}}.get(sample.row["axis"], {})
    for alone, one in zip(first(axis, 0), first({}, slice(1)), strict=True):
        assert type(alone) is np.ndarray
        np.testing.assert_array_equal(alone, one[0] if one.ndim else one)

    value, gradient = first({}, slice(0))
    assert (value == 0).all()
    assert value.shape == (sample.value[:0].shape if sample.row["reduction"] == "none" else ())
    assert gradient.shape == sample.x[:0].shape


NUMBERS = [int, float, np.float64, np.float32, np.int8, np.array]


@pytest.mark.capability("numpy", "NumPy scalars as options, which do not promote float32")
@pytest.mark.parametrize("kind", NUMBERS)
def test_scalars_do_not_promote(sample, kind):
    def call(two, one, integer):
        """With weights, label smoothing and class index of these kinds."""
        weight = [two(2)] * (sample.x.size // (sample.owners.max() + 1)) if sample.per_example else two(2)
        options = {"weight": weight, "label_smoothing": one(1)}
        if "ignore_index" in sample.options:
            options["ignore_index"] = integer(-100)
        return sample.closed(ul.value_and_grad)(sample.x.astype("float32"), **options)

    integer = {np.int8: np.int8, np.array: np.array}.get(kind, int)
    for got, right in zip(call(kind, kind, integer), call(float, float, int), strict=True):
        assert got.dtype == "float32"
        np.testing.assert_array_equal(got, right)


# --- Functions as values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", LOSSES, indirect=True)
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


def elsewhere(sample):
    """In another process."""
    return os.getpid(), answers(sample)


def check_elsewhere(results, sample):
    for process, found in results:
        assert process != os.getpid()
        compare(found, sample)


@pytest.mark.capability("numpy", "forked workers, after use in the parent")
# Python warns of a fork with threads running: those of other tests' frameworks.
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_fork(sample):
    check(sample)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        check_elsewhere(pool.map(elsewhere, [sample] * 4, chunksize=1), sample)


@pytest.fixture(scope="module")
def spawned():
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.capability("numpy", "spawned workers")
def test_spawn(sample, spawned):
    check_elsewhere([spawned.submit(elsewhere, sample).result()], sample)
    # The function itself travels, and gives what it gives here.
    options = sample.arrays | sample.options
    there = spawned.submit(ul.value_and_grad(sample.loss), sample.x, sample.as_targets(), **options).result()
    for got, right in zip(there, sample.closed(ul.value_and_grad)(sample.x), strict=True):
        np.testing.assert_array_equal(got, right)


@pytest.mark.capability("numpy", "concurrent.futures threads")
def test_thread_pool(sample):
    """Of threads whose np.errstate is their own."""

    def strict():
        np.seterr(all="raise")

    with concurrent.futures.ThreadPoolExecutor(8, initializer=strict) as pool:
        for results in pool.map(answers, [sample] * 64):
            compare(results, sample)


# --- More elements than 32 bits count ---------------------------------------------------------------------------------


ROWS, CLASSES = 2**20 + 1, 2**11


@pytest.mark.slow  # a minute, and 21 bytes for each logit: 42 GiB
@pytest.mark.parametrize("sample", ["softmax_nll"], indirect=True)
def test_huge(sample):
    """All zeros (which take no memory until they are written) but for the last row, which lies beyond 2³¹."""
    needed, free = 48 << 30, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if ROWS * CLASSES > 2**31 and free < needed:
        pytest.skip(f"takes {needed >> 30} GiB, and {free >> 30} are free")
    x, targets = np.zeros((ROWS, CLASSES), "float32"), np.zeros(ROWS, "uint8")
    x[-1], targets[-1] = -np.inf, sample.targets[0]
    x[-1, :3] = sample.x[0]
    values = sample(x, targets)
    assert values.shape == (ROWS,)
    close(values[-1], sample.value[0], "float32")
    close(values[:-1].min(), np.log(CLASSES), "float32")
    close(values[:-1].max(), np.log(CLASSES), "float32")


def test_numpy_warns_of_nothing_and_raises_nothing():
    x = np.array([[np.inf, -np.inf, 1e30], [-1e30, 0, np.nan]])
    with np.errstate(all="raise"):
        ul.value_and_grad(ul.multilabel_logistic_loss)(x, [[1, 0, 1], [0, 1, 0]])
        ul.value_and_grad(ul.softmax_nll)(x, [0, 1])
        ul.value_and_grad(ul.binary_cross_entropy)(np.array([0.0, 1.0]), [1, 0])
        ul.softmax(x)
        ul.log_sigmoid(x)
