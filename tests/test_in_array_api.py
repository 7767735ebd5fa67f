"""Libraries that come in by the array API: array-api-strict, Dask, MLX and CuPy, each through the same door."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import Framework
from crossed import PER_EXAMPLE, close
from test_in_numpy import answers, compare

import unilabel as ul
from unilabel.backend import backend_of

EVERY = "array-api-strict, Dask, MLX; CuPy by `pytest -m cuda`"
of_dask, of_mlx, of_strict = (
    pytest.mark.parametrize("library", [name], indirect=True) for name in ("dask", "mlx", "array_api_strict")
)


@pytest.fixture(params=["array_api_strict", "dask", "mlx", pytest.param("cupy", marks=pytest.mark.cuda)])
def library(request):
    return Framework(request.param)


@pytest.fixture
def sample(sample, library):
    """With operands that are the library's arrays."""
    return sample.beside(library.backend.asarray)


def same_kind(library, result, like, shape):
    assert type(result) is type(like)
    assert backend_of(result) is library.backend
    assert library.backend.dtype(result) == library.backend.dtype(like)
    assert library.backend.device(result) == library.backend.device(like)
    assert tuple(result.shape) == shape


def check(library, sample, x=None, targets=None):
    """All that the loss has to give: arrays of the logits' kind, and the right numbers."""
    x = library.backend.asarray(sample.x) if x is None else x
    results = answers(sample, x, library.backend.asarray(sample.targets) if targets is None else targets)
    for result, right in zip(results, [sample.value] * 2 + [sample.gradient] * 3, strict=True):
        same_kind(library, result, x, right.shape)
    compare(map(library.numpy, results), sample)


# --- Every library ----------------------------------------------------------------------------------------------------


@pytest.mark.capability("array API", f"{EVERY}: losses, value_and_grad, grad_and_hess")
def test_losses(library, sample):
    check(library, sample)


@pytest.mark.capability("array API", f"{EVERY}: NumPy arrays and lists beside its own")
def test_plain_operands(library, sample):
    plain = sample.beside(library.numpy)
    check(library, plain, targets=sample.targets)
    check(library, plain.beside(np.ndarray.tolist), targets=sample.targets.tolist())


@pytest.mark.capability("array API", f"{EVERY}: float32")
def test_float32(library, sample):
    """Rounding of the inputs counts up to a hundredfold, where the loss is of a probability close to 1."""
    x = library.array(sample.x)
    value, gradient = sample.closed(ul.value_and_grad)(x)
    for got, right in ((sample(x), sample.value), (value, sample.value), (gradient, sample.gradient)):
        same_kind(library, got, x, right.shape)
        close(library.numpy(got), right, "float32", ulp=128)


@pytest.mark.parametrize("function", [ul.sigmoid, ul.log_sigmoid, ul.softmax, ul.log_softmax])
def test_activations(library, function):
    x = np.random.default_rng(0).uniform(-6, 6, (4, 3))
    array = library.backend.asarray(x)
    got = function(array)
    same_kind(library, got, array, x.shape)
    close(library.numpy(got), function(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_long_rows_keep_their_digits(library, axis):
    """Of equal numbers, added one after the other as NumPy does across memory, 20 000 are off by a thousand ULP."""
    classes, low = 20_000, float(np.float32(-0.3))
    x = np.full((2, classes), low)
    x[:, 0] = 0
    x = library.array(x if axis else x.T)
    close(library.numpy(ul.softmax_nll(x, [0, 0], axis=axis)), np.log1p((classes - 1) * np.exp(low)), "float32", ulp=25)
    summed = library.numpy(ul.multilabel_logistic_loss(x, x == x, axis=axis, reduction="sum"))
    close(summed, 2 * (np.log(2) + (classes - 1) * np.log1p(np.exp(-low))), "float32", ulp=24)


@pytest.mark.capability(
    "array API", f"{EVERY}: a wrong class index is NaN", losses=PER_EXAMPLE, fixed={"targets": "indices"}
)
@pytest.mark.parametrize("wrong", [2**32, -1, 6])  # the first would wrap around to class 0 in 32 bits
def test_wrong_indices(library, sample, wrong):
    """In the losses and gradients that it has a part in, and where no class is masked."""
    targets = sample.targets.copy()
    targets.flat[0] = wrong
    keep = np.broadcast_to(library.numpy(sample.arrays["where"]) if "where" in sample.arrays else True, sample.x.shape)
    part = (sample.owners == 0) & keep
    for given in (targets, library.backend.asarray(targets)):
        value, gradient = sample.closed(ul.value_and_grad)(library.backend.asarray(sample.x), given)
        assert np.isnan(library.numpy(value)).ravel().tolist() == [i == 0 for i in range(sample.value.size)]
        np.testing.assert_array_equal(np.isnan(library.numpy(gradient)), part)


@pytest.mark.capability("array API", f"{EVERY}: validate=True")
def test_validate(library, sample):
    x = library.backend.asarray(sample.x)
    close(library.numpy(sample(x, validate=True)), sample.value)
    wrong = sample.targets.astype("int64" if sample.row["targets"] == "bool" else sample.targets.dtype)
    wrong[:-1] = 7  # the last may be ignored
    with pytest.raises(ValueError, match=r"Expected targets: .* Received: 7(\.0)? at"):
        sample(x, wrong, validate=True)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("mlx", "tails"),
        *(pytest.param(*more, marks=pytest.mark.full) for more in (("mlx", "infinite"), ("dask", "tails"))),
    ],
)
def test_conformance(name, family, tmp_path):
    """Some of the oracle's cases; array-api-strict has its own test."""
    command = f"-m unilabel.conformance conformance --backend {name} --case seed --case {family}"
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert f"cases on {name}: all match the oracle" in done.stdout


# --- array-api-strict -------------------------------------------------------------------------------------------------


@of_strict
@pytest.mark.capability("array API", "array-api-strict: api_version 2024.12 and newer, no dynamic shapes", pairs=True)
@pytest.mark.parametrize("version", ["2024.12", "2025.12"])
def test_strict_flags(library, sample, version):
    import array_api_strict

    options = {"boolean_indexing": False, "data_dependent_shapes": False, "enabled_extensions": ()}
    with array_api_strict.ArrayAPIStrictFlags(api_version=version, **options):
        check(library, sample)


@of_strict
@pytest.mark.capability("array API", "array-api-strict: on each of its devices")
def test_strict_devices(library, sample):
    import array_api_strict as xp

    for device in xp.__array_namespace_info__().devices():
        narrow = "no_" in str(device)  # of 64 bits

        def placed(array, device=device, narrow=narrow):
            dtype = (
                {"float64": "float32", "int64": "int32"}.get(array.dtype.name, array.dtype) if narrow else array.dtype
            )
            return xp.asarray(array.astype(dtype), device=device)

        x, plain = placed(sample.x), sample.beside(np.from_dlpack)
        for one, targets in ((plain.beside(placed), placed(sample.targets)), (plain, sample.targets)):
            for result in answers(one, x, targets):
                assert result.device == device
                assert result.dtype == x.dtype
            close(np.from_dlpack(one(x, targets)), sample.value, "float32", ulp=128)
        if sample.row["targets"] == "indices":  # 2³² would wrap around to class 0 in 32 bits
            assert np.isnan(np.from_dlpack(plain(x, np.full(sample.targets.shape, 2**32)))).all()


# --- Dask -------------------------------------------------------------------------------------------------------------

CHUNKS = {"examples": (2, -1, -1), "classes": (-1, 2, 1), "both": (2, 1, 1)}


def chunked(array, chunks=(2, 2, 2)):
    import dask.array

    return dask.array.from_array(array, chunks=chunks[: array.ndim])


def nothing_is_computed(*arguments, **options):
    raise AssertionError("computed")


@of_dask
@pytest.mark.capability("array API", "Dask: nothing computed before .compute()", brief=True)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_dask_is_lazy(library, sample, chunks):
    import dask

    x, sample = chunked(sample.x, chunks), sample.beside(library.numpy).beside(chunked)
    for targets in (sample.targets, chunked(sample.targets)):
        with dask.config.set(scheduler=nothing_is_computed):
            results = answers(sample, x, targets)
        for result, right in zip(results, [sample.value] * 2 + [sample.gradient] * 3, strict=True):
            same_kind(library, result, x, right.shape)
        with dask.config.set(scheduler="synchronous"):
            compare(dask.compute(*results), sample)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("dask.distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        yield


@of_dask
@pytest.mark.capability("array API", "Dask: a cluster of two workers", brief=True)
def test_dask_cluster(library, sample, cluster):
    """Blocks of the batch and of the classes in two processes."""
    import dask

    sample = sample.beside(library.numpy).beside(chunked)
    compare(dask.compute(*answers(sample, chunked(sample.x), chunked(sample.targets))), sample)


@of_dask
@pytest.mark.capability("array API", "Dask: unknown chunk sizes are refused", brief=True)
def test_dask_unknown_lengths(library, sample):
    x, targets = chunked(sample.x), chunked(sample.targets)
    every = chunked(np.ones(4, bool))
    assert np.isnan(x[every].shape[0])
    for call in (sample, sample.closed(ul.value_and_grad)):
        with pytest.raises(ValueError, match=r"compute_chunk_sizes\(\) finds them\. Received: \(nan, "):
            call(x[every], targets)
        with pytest.raises(ValueError, match=r"Expected targets: .* Received: shape \(nan"):
            call(x, targets[every])
    known = x[every]
    known.compute_chunk_sizes()
    close(sample(known, targets).compute(), sample.value)


# --- MLX --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mx():
    return importlib.import_module("mlx.core")


def called(sample, loss=None):
    """The call as a function of all its arrays."""
    loss = loss or sample.loss
    return lambda x, targets, arrays: loss(x, sample.as_targets(targets), **arrays, **sample.options)


def arrays_of(library, sample):
    """What that function is called with."""
    return library.backend.asarray(sample.x), library.backend.asarray(sample.targets), sample.arrays


def other(library, sample, **lengths):
    """The same call with other lengths and numbers."""
    return sample.of(**lengths).beside(library.backend.asarray)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.vjp, mx.grad, mx.value_and_grad")
def test_mlx_autodiff(library, sample, mx):
    x, cotangent = library.backend.asarray(sample.x), library.backend.asarray(sample.cotangent)
    (value,), (pulled_back,) = mx.vjp(sample, [x], [cotangent])
    close(value, sample.value)
    close(pulled_back, sample.pulled_back)
    value, gradient = mx.value_and_grad(lambda x: sample(x).sum())(x)
    close(value, np.sum(sample.value))
    close(gradient, sample.gradient)
    assert gradient.dtype == mx.float64


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.grad by targets, weights and smoothing")
def test_mlx_other_gradients(library, sample, mx):
    """As difference quotients have it."""
    soft = {"targets": sample.targets} if sample.row["targets"] in ("float", "distribution") else {}
    for name, array in (soft | sample.beside(library.numpy).arrays).items():
        if name != "where":
            direction, h = np.random.default_rng(0).uniform(0.5, 1, array.shape), 1e-5

            def total(array, name=name):
                return sample(library.backend.asarray(sample.x), **{name: array}).sum()

            gradient = library.numpy(mx.grad(total)(library.backend.asarray(array)))
            up, down = (total(library.backend.asarray(array + step * direction)).item() for step in (h, -h))
            np.testing.assert_allclose((gradient * direction).sum(), (up - down) / (2 * h), rtol=1e-7)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.jvp")
def test_mlx_jvp(library, sample, mx):
    x, size = library.backend.asarray(sample.x), sample.x.size
    units = np.eye(size).reshape(size, *sample.x.shape)
    changes = [mx.jvp(sample, [x], [library.backend.asarray(unit)])[1][0] for unit in units]
    changes = np.stack(list(map(library.numpy, changes)), -1)
    close(changes.reshape(*sample.value.shape, *sample.x.shape), sample.jacobian)


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.grad of mx.grad")
def test_mlx_twice(library, sample, mx):
    x, size = library.backend.asarray(sample.x), sample.x.size
    gradient = mx.grad(lambda x: sample(x).sum())
    units = library.backend.asarray(np.eye(size).reshape(size, *sample.x.shape))
    rows = mx.vmap(lambda unit: mx.grad(lambda x: (gradient(x) * unit).sum())(x))(units)
    sample.check_hessian(rows.reshape(*sample.x.shape * 2))


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.vmap, over mx.grad too")
def test_mlx_vmap(library, sample, mx):
    """Of two calls at once, over all arrays; and of two times the logits alone."""
    two = [sample, other(library, sample)]
    x, targets, arrays = (list(given) for given in zip(*(arrays_of(library, one) for one in two), strict=True))
    given = mx.stack(x), mx.stack(targets), {name: mx.stack([one[name] for one in arrays]) for name in arrays[0]}
    values = mx.vmap(called(sample))(*given)
    gradients = mx.vmap(mx.grad(lambda *given: called(sample)(*given).sum()))(*given)
    same = mx.stack([x[0], x[0]])
    twice = mx.vmap(sample)(same), mx.vmap(mx.grad(lambda x: sample(x).sum()))(same)
    for calls, value, gradient in ((two, values, gradients), ([sample] * 2, *twice)):
        for i, one in enumerate(calls):
            close(value[i], one.value)
            close(gradient[i], one.gradient)


@of_mlx
@pytest.mark.capability(
    "array API", "MLX: mx.compile, of mx.value_and_grad, ul.value_and_grad and ul.grad_and_hess", brief=True
)
def test_mlx_compile(library, sample, mx):
    """A new length is a new compilation."""

    def both(x, targets, arrays):
        by_autodiff = mx.value_and_grad(lambda x: sample(x, targets, **arrays).sum())(x)
        return *by_autodiff, answers(sample, x, targets, **arrays)

    compiled = mx.compile(both)
    for one in (sample, other(library, sample, rows=7, classes=6), sample):
        value, gradient, closed_forms = compiled(*arrays_of(library, one))
        close(value, np.sum(one.value))
        close(gradient, one.gradient)
        compare(closed_forms, one)
    with pytest.raises(ValueError, match="an array that MLX traces"):
        mx.compile(lambda x: sample(x, validate=True))(library.backend.asarray(sample.x))


def test_mlx_shapeless_compile_is_refused(mx):
    """By MLX, which cannot do it with custom functions: an error, never the numbers of the first shape."""
    step = mx.compile(lambda x: ul.softmax_nll(x, x), shapeless=True)
    with pytest.raises(ValueError, match="cannot infer output shapes"):
        [step(mx.ones((rows, 3))).item() for rows in (4, 2)]


@of_mlx
@pytest.mark.capability("array API", "MLX: mx.checkpoint")
def test_mlx_checkpoint(library, sample, mx):
    x = library.backend.asarray(sample.x)
    close(mx.grad(mx.checkpoint(lambda x: sample(x).sum()))(x), sample.gradient)


def test_mlx_exp_and_sum_keep_their_digits(mx):
    """What MLX's own lose: the reason for those of unilabel.backends.mlx. Off, they can go."""
    from unilabel.backends.mlx import standard as xp

    x = np.linspace(-87, 0, 1001)
    close(xp.exp(mx.array(x, mx.float64)), np.exp(x), ulp=4)
    close(xp.exp(mx.array(x, mx.float32)), np.exp(x.astype("float32").astype("float64")), "float32", ulp=4)
    np.testing.assert_array_equal(xp.exp(mx.array([-np.inf, -800.0, -0.0, np.nan])), [0, 0, 1, np.nan])
    many = mx.full((1 << 20,), 0.1)
    close(xp.sum(many), np.float64(np.float32(0.1)) * (1 << 20), "float32")
    assert abs(float(mx.exp(mx.array(-62.4))) / np.exp(np.float64(np.float32(-62.4))) - 1) > 1e-6
