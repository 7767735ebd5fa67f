"""NumPy: its kinds of array and its errors, on the losses on the last linear layer's inputs."""

import numpy as np
import pytest
from crossed import OF_LINEAR, close
from test_in_numpy import LAYOUTS, NUMBERS, WILD

import unilabel as ul

pytestmark = pytest.mark.usefixtures("small_blocks")  # of two examples


@pytest.fixture
def sample(sample):
    """Five examples: two blocks, and a rest."""
    return sample.of(rows=5)


def answers(sample, inputs=None, targets=None):
    """The value; value and gradients: as the sample's call gives them."""
    inputs = sample.inputs if inputs is None else inputs
    return sample(*inputs, targets=targets), *sample.closed(*inputs, targets=targets)


def compare(results, sample):
    for got, right in zip(results, (sample.value, sample.value, *sample.through(sample.gradient)), strict=True):
        close(got, right)


def check(sample, inputs=None, targets=None):
    """All that the loss has to give: plain arrays in the features' dtype, and the right numbers."""
    results = answers(sample, inputs, targets)
    for result in results:
        assert type(result) is np.ndarray
        assert result.dtype == (sample.inputs if inputs is None else inputs)[0].dtype
    compare(results, sample)


@pytest.mark.capability("numpy", "np.errstate(all='raise')", **OF_LINEAR)
def test_nothing_is_raised_and_nothing_warned_of(sample):
    def wild(array):
        with np.errstate(all="ignore"):
            return np.resize(WILD, array.shape)

    with np.errstate(all="raise"):
        check(sample)
        for targets in (sample.targets, np.full(sample.targets.shape, -7)):
            if targets is sample.targets or sample.row["targets"] in ("indices", "positives"):
                answers(sample, tuple(map(wild, sample.inputs)), targets)
    assert "raise" not in np.geterr().values()


@pytest.mark.capability("numpy", "ndarray, lists and scalars", **OF_LINEAR, pairs=True)
def test_arrays(sample):
    check(sample)
    features, *layer = sample.inputs
    listed = (features, *map(np.ndarray.tolist, layer))
    check(sample.beside(np.ndarray.tolist), listed, sample.targets.tolist())


@pytest.mark.capability("numpy", "Fortran order, strides, read-only, unaligned", **OF_LINEAR)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(sample, layout):
    inputs, targets, given = tuple(map(layout, sample.inputs)), layout(sample.targets), sample.beside(layout)
    before = [array.copy() for array in (*inputs, targets, *given.arrays.values())]
    check(given, inputs, targets)
    for array, same in zip((*inputs, targets, *given.arrays.values()), before, strict=True):
        np.testing.assert_array_equal(array, same)


@pytest.mark.capability("numpy", "big-endian", **OF_LINEAR)
def test_big_endian(sample):
    def swapped(x):
        return x.astype(x.dtype.newbyteorder(">"))

    check(sample.beside(swapped), tuple(map(swapped, sample.inputs)), swapped(sample.targets))


@pytest.mark.capability("numpy", "one example, and none", **OF_LINEAR)
def test_no_batch_axis_and_no_example(sample):
    def some(rows):
        features, *layer = sample.inputs
        each = {name: a for name, a in sample.arrays.items() if name == "sample_weight" or a.ndim == 2}
        each = {name: array[rows] if len(array) > 1 or rows == 0 else array for name, array in each.items()}
        return sample.closed(features[rows], *layer, targets=sample.targets[rows], **each)

    for alone, one in zip(some(0), some(slice(1)), strict=True):
        assert type(alone) is np.ndarray
        close(alone, one if one.shape == alone.shape else one[0])
    value, features, *layer = some(slice(0))
    assert (value == 0).all()
    assert value.shape == (sample.value[:0].shape if sample.row["reduction"] == "none" else ())
    assert features.shape == (0, 2)
    for array, like in zip(layer, sample.inputs[1:], strict=True):
        assert array.shape == like.shape
        assert (array == 0).all()


@pytest.mark.capability("numpy", "NumPy scalars as options, which do not promote float32", **OF_LINEAR)
@pytest.mark.parametrize("kind", NUMBERS)
def test_scalars_do_not_promote(sample, kind):
    inputs = tuple(array.astype("float32") for array in sample.inputs)

    def call(two, one, integer):
        options = {"weight": [two(2)] * 3 if sample.per_example else two(2), "label_smoothing": one(1)}
        if "ignore_index" in sample.options:
            options["ignore_index"] = integer(-100)
        return sample.closed(*inputs, **options)

    integer = {np.int8: np.int8, np.array: np.array}.get(kind, int)
    for got, right in zip(call(kind, kind, integer), call(float, float, int), strict=True):
        assert got.dtype == "float32"
        np.testing.assert_array_equal(got, right)


def test_subclasses_that_mean_other_things_are_refused():
    features, weight = np.ones((4, 2)), np.ones((3, 2))
    for kind in (np.matrix, np.ma.MaskedArray):
        with pytest.raises(TypeError, match=f"Received: numpy {kind.__name__}"):
            ul.linear_softmax_nll(features.view(kind), weight, [0] * 4)
        with pytest.raises(TypeError, match=f"Expected linear_weight: .* Received: numpy {kind.__name__}"):
            ul.linear_softmax_nll(features, weight.view(kind), [0] * 4)
