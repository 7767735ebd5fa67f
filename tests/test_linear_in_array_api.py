"""Libraries that come in by the array API, on the losses on the last linear layer's inputs."""

import importlib
import sys

import numpy as np
import pytest
from crossed import OF_LINEAR, close
from test_in_array_api import EVERY, library, mx, nothing_is_computed, of_dask, of_mlx, same_kind
from test_linear_in_numpy import answers, compare

import unilabel as ul

assert library, mx  # fixtures
pytestmark = pytest.mark.usefixtures("small_blocks")  # of two examples


@pytest.fixture
def sample(sample, library):
    """Five examples: two blocks, and a rest; with operands that are the library's arrays."""
    return sample.of(rows=5).beside(library.backend.asarray)


def inputs_of(library, sample):
    return tuple(map(library.backend.asarray, sample.inputs))


def check(library, results, sample):
    features = library.backend.asarray(sample.features)
    shapes = [sample.value.shape] * 2 + [array.shape for array in sample.inputs]
    for result, shape in zip(results, shapes, strict=True):
        same_kind(library, result, features, shape)
    compare(map(library.numpy, results), sample)


# --- Every library ----------------------------------------------------------------------------------------------------


@pytest.mark.capability("array API", f"{EVERY}: losses, value_and_grad", **OF_LINEAR, pairs=True)
def test_losses(library, sample):
    targets = library.backend.asarray(sample.targets)
    check(library, answers(sample, inputs_of(library, sample), targets), sample)


@pytest.mark.capability("array API", f"{EVERY}: NumPy arrays and lists beside its own", **OF_LINEAR)
def test_plain_operands(library, sample):
    features, *layer = sample.inputs
    plain = sample.beside(library.numpy)
    check(library, answers(plain, (library.backend.asarray(features), *layer)), sample)
    listed = library.backend.asarray(features), *map(np.ndarray.tolist, layer)
    check(library, answers(plain.beside(np.ndarray.tolist), listed, sample.targets.tolist()), sample)


# --- Dask -------------------------------------------------------------------------------------------------------------

CHUNKS = {"examples": (2, -1), "classes and features": (-1, 1), "both": (2, 1)}


@of_dask
@pytest.mark.capability("array API", "Dask: nothing computed before .compute()", **OF_LINEAR)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_dask_is_lazy(library, sample, chunks):
    import dask.array

    def chunked(array, chunks=chunks):
        return dask.array.from_array(array, chunks=chunks[: array.ndim])

    features, weight, *bias = sample.inputs
    inputs = chunked(features), chunked(weight, chunks[::-1]), *map(chunked, bias)
    sample = sample.beside(library.numpy).beside(chunked)
    for targets in (sample.targets, chunked(sample.targets)):
        with dask.config.set(scheduler=nothing_is_computed):
            results = answers(sample, inputs, targets)
        with dask.config.set(scheduler="synchronous"):
            compare(dask.compute(*results), sample)


EACH_LOSS = pytest.mark.parametrize("loss", [ul.linear_softmax_nll, ul.linear_multilabel_logistic_loss])


@EACH_LOSS
@pytest.mark.parametrize("chunk", [-1, pytest.param(4, marks=pytest.mark.full)])
def test_dask_never_has_all_logits_at_once(loss, chunk, monkeypatch):
    """But what each block adds to the weight's gradient, until all have."""
    monkeypatch.setattr(sys.modules["unilabel.formulas.linear"], "BLOCK", 8 << 10)
    dask = importlib.import_module("dask")
    from_array = importlib.import_module("dask.array").from_array
    from dask.callbacks import Callback

    n, length, classes = 256, 1, 1 << 10
    targets = np.zeros(n, np.int64) if loss is ul.linear_softmax_nll else ul.Positives(np.zeros((n, 1), np.int64))
    call = from_array(np.ones((n, length)), chunks=(chunk, -1)), from_array(np.ones((classes, length))), targets
    held = []

    def count(key, result, graph, state, worker):
        arrays = [array for array in state["cache"].values() if isinstance(array, np.ndarray)]
        own = [array if array.base is None else array.base for array in arrays]
        held.append(sum({id(array): array.nbytes for array in own}.values()))

    parts = 32 * classes * length / (n * classes)
    for results, bound in ((loss(*call), 0.1), (ul.value_and_grad(loss)(*call), parts + 0.2)):  # of 32 blocks
        held.clear()
        with dask.config.set(scheduler="synchronous"), Callback(posttask=count):
            dask.compute(results)
        assert max(held) / (8 * n * classes) < bound


# --- MLX --------------------------------------------------------------------------------------------------------------


def of_arrays(sample):
    """The call as a function of all its arrays."""

    def run(inputs, targets, arrays):
        return sample(*inputs, targets=targets, **arrays)

    return run


def arrays_of(library, sample):
    """What that function is called with."""
    return inputs_of(library, sample), library.backend.asarray(sample.targets), sample.arrays


def total(loss, cotangent):
    return lambda *inputs: (loss(*inputs) * cotangent).sum()


def alike(got, right):
    for array, expected in zip(got, right, strict=True):
        np.testing.assert_allclose(np.array(array), np.array(expected), rtol=1e-12, atol=1e-13)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.vjp, mx.grad, mx.value_and_grad", **OF_LINEAR)
def test_mlx_autodiff(library, sample, mx):
    inputs, cotangent = inputs_of(library, sample), library.backend.asarray(sample.cotangent)
    (value,), gradients = mx.vjp(sample, list(inputs), [cotangent])
    close(value, sample.value)
    for got, right in zip(gradients, sample.through(sample.pulled_back), strict=True):
        close(got, right)
    value, gradients = mx.value_and_grad(lambda *inputs: sample(*inputs).sum(), tuple(range(len(inputs))))(*inputs)
    close(value, np.sum(sample.value))
    for got, right in zip(gradients, sample.through(sample.gradient), strict=True):
        close(got, right)
        assert got.dtype == mx.float64


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.grad by targets, weights and smoothing", **OF_LINEAR)
def test_mlx_other_gradients(library, sample, mx):
    soft = {"targets": sample.targets} if sample.row["targets"] in ("float", "distribution") else {}
    inputs, cotangent = inputs_of(library, sample), library.backend.asarray(sample.cotangent)
    for name, array in (soft | sample.beside(library.numpy).arrays).items():
        if name != "where":
            of_name = [
                total(lambda array, loss=loss: loss(*inputs, **{name: array}), cotangent)  # noqa: B023
                for loss in (sample, sample.with_all_logits)
            ]
            alike(*([mx.grad(function)(library.backend.asarray(array))] for function in of_name))


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.jvp", **OF_LINEAR)
def test_mlx_jvp(library, sample, mx):
    inputs = list(inputs_of(library, sample))
    tangents = list(map(mx.cos, inputs))
    alike(
        *(
            [*values, *changes]
            for values, changes in (mx.jvp(f, inputs, tangents) for f in (sample, sample.with_all_logits))
        )
    )


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.grad of mx.grad", **OF_LINEAR)
def test_mlx_twice(library, sample, mx):
    inputs, cotangent = inputs_of(library, sample), library.backend.asarray(sample.cotangent)
    every, found = tuple(range(len(inputs))), []
    for loss in (sample, sample.with_all_logits):

        def of_gradient(*inputs):
            return sum((array**2).sum() for array in mx.grad(total(loss, cotangent), every)(*inputs))  # noqa: B023

        found.append(mx.grad(of_gradient, every)(*inputs))
    alike(*found)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.vmap, over mx.grad too", **OF_LINEAR)
def test_mlx_vmap(library, sample, mx):
    """Of two calls at once, over all arrays; and over layers alone, of the same features."""
    two = [sample, sample.of(rows=5, seed=2).beside(library.backend.asarray)]
    every = [arrays_of(library, one) for one in two]
    inputs = [mx.stack(pair) for pair in zip(*(given[0] for given in every), strict=True)]
    others = (
        mx.stack([given[1] for given in every]),
        {name: mx.stack([given[2][name] for given in every]) for name in sample.arrays},
    )
    run, numbers = of_arrays(sample), tuple(range(len(inputs)))

    def gradients(*call):
        return mx.grad(lambda *inputs: run(inputs, *call[len(inputs) :]).sum(), numbers)(*call[: len(inputs)])

    values, found = mx.vmap(run)(tuple(inputs), *others), mx.vmap(gradients)(*inputs, *others)
    for i, one in enumerate(two):
        close(values[i], one.value)
        for got, right in zip(found, one.through(one.gradient), strict=True):
            close(got[i], right)
    features, *layers = every[0][0][0], *inputs[1:]
    axes = None, *[0] * len(layers)
    several = mx.vmap(lambda *inputs: run(inputs, *every[0][1:]), axes)(features, *layers)
    close(several[0], sample.value)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.compile, of mx.value_and_grad and ul.value_and_grad", **OF_LINEAR)
def test_mlx_compile(library, sample, mx):
    """A new length is a new compilation."""

    def both(inputs, targets, arrays):
        by_autodiff = mx.value_and_grad(
            lambda *inputs: of_arrays(sample)(inputs, targets, arrays).sum(), tuple(range(len(inputs)))
        )(*inputs)
        return *by_autodiff, sample.closed(*inputs, targets=targets, **arrays)

    compiled = mx.compile(both)
    for one in (sample, sample.of(rows=7, classes=6).beside(library.backend.asarray)):
        value, gradients, (again, *closed) = compiled(*arrays_of(library, one))
        close(value, np.sum(one.value))
        close(again, one.value)
        for found in (gradients, closed):
            for got, right in zip(found, one.through(one.gradient), strict=True):
                close(got, right)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.checkpoint", **OF_LINEAR)
def test_mlx_checkpoint(library, sample, mx):
    inputs = inputs_of(library, sample)
    gradients = mx.grad(mx.checkpoint(lambda *inputs: sample(*inputs).sum()), tuple(range(len(inputs))))(*inputs)
    for got, right in zip(gradients, sample.through(sample.gradient), strict=True):
        close(got, right)


@EACH_LOSS
@pytest.mark.parametrize("compiled", [False, True])
def test_mlx_never_has_all_logits_at_once(mx, loss, compiled):
    """MLX computes when it is asked for a result, and then in an order of its own."""
    n, length, classes = 256, 2, 1 << 12
    features, weight = mx.ones((n, length)), mx.ones((classes, length))
    targets = mx.zeros((n,) if loss is ul.linear_softmax_nll else (n, 1), mx.int32)
    targets = targets if loss is ul.linear_softmax_nll else ul.Positives(targets)
    steps = {
        "loss": lambda *layer: loss(*layer, targets),
        "closed": lambda *layer: ul.value_and_grad(loss)(*layer, targets),
        "autodiff": mx.value_and_grad(lambda *layer: loss(*layer, targets), (0, 1)),
    }
    for name, step in steps.items():
        step = mx.compile(step) if compiled else step
        mx.eval(step(features, weight))  # what is made once
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(features, weight))
        logits = 4 * n * classes
        assert (mx.get_peak_memory() - before) / logits < 0.25, name  # of 128 blocks
