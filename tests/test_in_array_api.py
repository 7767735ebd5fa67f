"""Libraries that come in by the array API: array-api-strict, Dask, MLX and CuPy, each through the same door."""

import subprocess
import sys

import numpy as np
import pytest
from capabilities import close
from conftest import Framework

import unilabel as ul
from unilabel.backend import backend_of

LIBRARIES = {"array_api_strict": "array-api-strict", "dask": "Dask", "mlx": "MLX", "cupy": "CuPy"}


def libraries(transform, *names):
    """The test once for each library, and a row of the table for each."""
    marked = []
    for name in names or LIBRARIES:
        marks = [pytest.mark.capability("array API", f"{LIBRARIES[name]}: {transform}")]
        marks += [pytest.mark.cuda] if name == "cupy" else []
        marked.append(pytest.param(name, marks=marks, id=name))
    return pytest.mark.parametrize("library", marked, indirect=True)


@pytest.fixture
def library(request):
    return Framework(request.param)


def same_kind(library, result, like, shape):
    assert type(result) is type(like)
    assert backend_of(result) is library.backend
    assert library.backend.dtype(result) == library.backend.dtype(like)
    assert library.backend.device(result) == library.backend.device(like)
    assert tuple(result.shape) == shape


def right(library, sample, x, targets, dtype="float64"):
    value, gradient = ul.value_and_grad(sample.loss)(x, targets, reduction="none")
    slope, hessian = ul.grad_and_hess(sample.loss)(x, targets)
    for got, numbers in (
        (sample(x, targets, reduction="none"), sample.values),
        (value, sample.values),
        (gradient, sample.gradient),
        (slope, sample.gradient),
        (hessian, sample.hessian),
    ):
        same_kind(library, got, x, numbers.shape)
        close(library.numpy(got), numbers, dtype)


# --- Every library ----------------------------------------------------------------------------------------------------


@libraries("losses, value_and_grad, grad_and_hess")
def test_losses(library, sample):
    x = library.array(sample.x, "float64")
    right(library, sample, x, library.backend.asarray(sample.targets))
    right(library, sample, x, library.array(sample.distributions, "float64"))


@libraries("NumPy arrays and lists beside its own")
def test_plain_operands(library, sample):
    x = library.array(sample.x, "float64")
    right(library, sample, x, sample.targets)
    right(library, sample, x, sample.targets.tolist())
    right(library, sample, x, sample.distributions)
    per_row = sample.name in ("softmax_nll", "cross_entropy", "nll")
    weights = {"sample_weight": np.full(4, 2.0)} if per_row else {"weight": 2, "pos_weight": [1.0, 1, 1]}
    value = sample(x, reduction="none", where=np.ones(3, bool), **weights)
    same_kind(library, value, x, sample.values.shape)
    close(library.numpy(value), 2 * sample.values)


@libraries("reductions")
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_reductions(library, sample, reduction):
    x = library.array(sample.x, "float64")
    divisor = {"sum": 1, "mean": sample.values.size, "batchmean": 4}[reduction]
    value, gradient = ul.value_and_grad(sample.loss)(x, sample.targets, reduction=reduction)
    same_kind(library, value, x, ())
    close(library.numpy(value), sample.values.sum() / divisor)
    close(library.numpy(gradient), sample.gradient / divisor)


@libraries("float32")
def test_float32(library, sample):
    """Rounding of the inputs counts up to a hundredfold, where the loss is of a probability close to 1."""
    x = library.array(sample.x, "float32")
    value, gradient = ul.value_and_grad(sample.loss)(x, sample.targets, reduction="none")
    for got, numbers in ((value, sample.values), (gradient, sample.gradient)):
        same_kind(library, got, x, numbers.shape)
        close(library.numpy(got), numbers, "float32", ulp=128)


@libraries("sigmoid, log_sigmoid, softmax, log_softmax")
@pytest.mark.parametrize("sample", ["multilabel_logistic_loss", "softmax_nll"], indirect=True)
def test_activations(library, sample):
    """The loss of the label is -log of its probability."""
    x = library.array(sample.x, "float64")
    if sample.name == "softmax_nll":
        probs, logs, label = ul.softmax(x), ul.log_softmax(x), sample.distributions == 1
        other = ul.softmax(library.array(sample.x.T, "float64"), axis=0)
        close(library.numpy(other).T, library.numpy(probs))
        values = sample.values
    else:
        probs, logs, label = ul.sigmoid(x), ul.log_sigmoid(x), sample.targets == 1
        values = sample.values[label]
    for got in (probs, logs):
        same_kind(library, got, x, sample.x.shape)
    close(-library.numpy(logs)[label], values)
    np.testing.assert_allclose(library.numpy(probs)[label], np.exp(-values), rtol=1e-14)


@libraries("no and one example, axis=0, two class axes")
def test_shapes(library, sample):
    x = library.array(sample.x.T, "float64")
    targets = sample.targets if sample.targets.ndim == 1 else sample.targets.T
    value, gradient = ul.value_and_grad(sample.loss)(x, targets, axis=0, reduction="none")
    close(library.numpy(value), sample.values if sample.values.ndim == 1 else sample.values.T)
    close(library.numpy(gradient), sample.gradient.T)
    x = library.array(sample.x.reshape(4, 1, 3), "float64")
    targets = sample.targets.reshape(4, 1, 3) if sample.targets.ndim > 1 else sample.targets
    _, gradient = ul.value_and_grad(sample.loss)(x, targets, axis=(1, 2), reduction="sum")
    close(library.numpy(gradient).reshape(4, 3), sample.gradient)
    value, gradient = ul.value_and_grad(sample.loss)(library.array(sample.x[1], "float64"), sample.targets[1])
    close(library.numpy(gradient), sample.gradient[1])
    value, gradient = ul.value_and_grad(sample.loss)(library.array(sample.x[:0], "float64"), sample.targets[:0])
    assert library.numpy(value) == 0
    assert tuple(gradient.shape) == (0, 3)


@libraries("a wrong class index is NaN")
@pytest.mark.parametrize("sample", ["softmax_nll", "cross_entropy", "nll"], indirect=True)
def test_wrong_indices(library, sample):
    """2³² would wrap around to class 0 in 32 bits."""
    x = library.array(sample.x, "float64")
    wrong = np.array([2**32, sample.targets[1], -1, 3])
    for targets in (wrong, library.backend.asarray(wrong)):
        values = library.numpy(sample(x, targets, reduction="none"))
        assert np.isnan(values).tolist() == [True, False, True, True]
        close(values[1], sample.values[1])


@libraries("validate=True")
def test_validate(library, sample):
    x = library.array(sample.x, "float64")
    close(library.numpy(sample(x, reduction="none", validate=True)), sample.values)
    wrong = sample.targets.copy()
    wrong.flat[2] = 7
    with pytest.raises(ValueError, match=r"Expected targets: .* Received: 7(\.0)? at"):
        sample(x, wrong, validate=True)


@libraries("the oracle's cases", "dask", "mlx")
@pytest.mark.parametrize("sample", ["multilabel_logistic_loss", "softmax_nll"], indirect=True)
def test_conformance(library, sample, tmp_path):
    """Some of them; array-api-strict has its own test."""
    family = {"multilabel_logistic_loss": "tails", "softmax_nll": "infinite"}[sample.name]
    command = [
        "-m",
        "unilabel.conformance",
        "conformance",
        "--backend",
        library.name,
        "--case",
        family,
        "--case",
        "seed",
    ]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert f"cases on {library.name}: all match the oracle" in done.stdout


# --- array-api-strict -------------------------------------------------------------------------------------------------


@pytest.mark.capability("array API", "array-api-strict: api_version 2024.12 and newer, no dynamic shapes")
@pytest.mark.parametrize("version", ["2024.12", "2025.12"])
def test_strict_flags(sample, version):
    import array_api_strict as xp

    strict = Framework("array_api_strict")
    with xp.ArrayAPIStrictFlags(
        api_version=version, boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    ):
        x = xp.asarray(sample.x)
        right(strict, sample, x, xp.asarray(sample.targets))
        sample(x, where=np.ones(3, bool), label_smoothing=0.1)
        ul.log_softmax(ul.sigmoid(x))


@pytest.mark.capability("array API", "array-api-strict: on each of its devices")
def test_strict_devices(sample):
    import array_api_strict as xp

    for device in xp.__array_namespace_info__().devices():
        dtype = "float32" if "no_" in str(device) else "float64"
        x = xp.asarray(sample.x.astype(dtype), device=device)
        targets = [sample.targets, xp.asarray(sample.targets.astype("int32"), device=device), sample.targets.tolist()]
        for z in targets:
            value, gradient = ul.value_and_grad(sample.loss)(x, z, reduction="none", where=np.ones(3, bool))
            for result in (sample(x, z), value, gradient, *ul.grad_and_hess(sample.loss)(x, z), ul.softmax(x)):
                assert result.device == device
                assert result.dtype == x.dtype
        if sample.targets.ndim == 1:  # 2³² would wrap around to class 0 in 32 bits
            assert np.isnan(np.from_dlpack(sample(x, np.full(4, 2**32), reduction="none"))).all()


# --- Dask -------------------------------------------------------------------------------------------------------------

CHUNKS = {"the batch": (2, 3), "the classes": (4, 2), "batch and classes": (2, 1)}


def nothing_is_computed(*arguments, **options):
    raise AssertionError("computed")


@pytest.mark.capability("array API", "Dask: nothing computed before .compute()")
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_dask_is_lazy(sample, chunks):
    import dask
    import dask.array as da

    dask_ = Framework("dask")
    x = da.from_array(sample.x, chunks=chunks)
    targets = [sample.targets, da.from_array(sample.targets, chunks=chunks[: sample.targets.ndim])]
    targets.append(da.from_array(sample.distributions, chunks=chunks))
    for z in targets:
        with dask.config.set(scheduler=nothing_is_computed):
            value, gradient = ul.value_and_grad(sample.loss)(x, z, reduction="none")
            mean = sample(x, z, reduction="mean", where=np.ones(3, bool))
        for result in (value, gradient, mean):
            assert isinstance(result, da.Array)
            assert result.dtype == "float64"
        assert gradient.chunks == x.chunks or sample.name == "nll"  # its gradient is of the targets alone
        with dask.config.set(scheduler="synchronous"):
            close(dask_.numpy(value), sample.values)
            close(dask_.numpy(gradient), sample.gradient)
            close(dask_.numpy(mean), sample.values.mean())


@pytest.mark.capability("array API", "Dask: a cluster of two workers")
@pytest.mark.parametrize("sample", ["multilabel_logistic_loss", "softmax_nll"], indirect=True)
def test_dask_cluster(sample):
    """Blocks of the batch and of the classes in two processes."""
    distributed = pytest.importorskip("dask.distributed")
    import dask.array as da

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        x = da.from_array(sample.x, chunks=(2, 2))
        z = da.from_array(sample.targets, chunks=2)
        for targets in (sample.targets, z):
            value, gradient = ul.value_and_grad(sample.loss)(x, targets, reduction="none")
            close(value.compute(), sample.values)
            close(gradient.compute(), sample.gradient)
            close(sample(x, targets, reduction="sum").compute(), sample.values.sum())


@pytest.mark.capability("array API", "Dask: unknown chunk sizes are refused")
def test_dask_unknown_lengths(sample):
    import dask.array as da

    x, z = da.from_array(sample.x, chunks=(2, 3)), da.from_array(sample.targets, chunks=2)
    some = x[x[:, 0] < np.inf]
    assert np.isnan(some.shape[0])
    for call in (sample, ul.value_and_grad(sample.loss), ul.grad_and_hess(sample.loss)):
        for targets in (sample.targets, z, some):
            with pytest.raises(ValueError, match=r"compute_chunk_sizes\(\) finds them\. Received: \(nan, 3\)"):
                call(some, targets)
        with pytest.raises(ValueError, match=r"Expected targets: .* Received: shape \(nan"):
            call(x, z[x[:, 0] < np.inf])
    some.compute_chunk_sizes()
    close(sample(some, z, reduction="none").compute(), sample.values)


# --- MLX --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mx():
    return pytest.importorskip("mlx.core")


def mlx_inputs(sample, mx, dtype="float64"):
    return mx.array(sample.x, getattr(mx, dtype)), mx.array(sample.targets), mx.array(sample.cotangent, mx.float64)


@pytest.mark.capability("array API", "MLX: mx.vjp, mx.grad, mx.value_and_grad")
def test_mlx_autodiff(sample, mx):
    x, z, cotangent = mlx_inputs(sample, mx)
    (values,), (pulled_back,) = mx.vjp(lambda x: sample(x, z, reduction="none"), [x], [cotangent])
    close(values, sample.values)
    close(pulled_back, sample.pulled_back)
    value, gradient = mx.value_and_grad(lambda x: sample(x, z, reduction="sum"))(x)
    close(value, sample.values.sum())
    close(gradient, sample.gradient)
    assert gradient.dtype == mx.float64


@pytest.mark.capability("array API", "MLX: mx.jvp")
def test_mlx_jvp(sample, mx):
    x, z, _ = mlx_inputs(sample, mx)
    units = mx.array(np.eye(12).reshape(12, 4, 3), mx.float64)
    total = [float(mx.jvp(lambda x: sample(x, z, reduction="sum"), [x], [unit])[1][0]) for unit in units]
    close(np.reshape(total, (4, 3)), sample.gradient)


@pytest.mark.capability("array API", "MLX: mx.grad of mx.grad")
def test_mlx_twice(sample, mx):
    x, z, _ = mlx_inputs(sample, mx)
    slope = mx.grad(lambda x: sample(x, z, reduction="sum"))
    units = mx.array(np.eye(12).reshape(12, 4, 3), mx.float64)
    rows = mx.vmap(lambda unit: mx.grad(lambda x: (slope(x) * unit).sum())(x))(units)
    diagonal = np.array(rows).reshape(12, 12).diagonal().reshape(4, 3)
    np.testing.assert_allclose(diagonal, sample.hessian, rtol=1e-13)  # p (1 - p) as the difference of its terms


@pytest.mark.capability("array API", "MLX: mx.vmap, over mx.grad too")
def test_mlx_vmap(sample, mx):
    x, z, cotangent = mlx_inputs(sample, mx)

    def one(x, z):
        return sample(x, z, reduction="none")

    def pulled_back(x, z, cotangent):
        return mx.vjp(lambda x: one(x, z), [x], [cotangent])[1][0]

    close(mx.vmap(one)(x, z), sample.values)
    close(mx.vmap(pulled_back)(x, z, cotangent), sample.pulled_back)


@pytest.mark.capability("array API", "MLX: mx.compile")
def test_mlx_compile(sample, mx):
    x, z, _ = mlx_inputs(sample, mx)
    step = mx.compile(mx.value_and_grad(lambda x, z: sample(x, z, reduction="sum")))
    for rows in (4, 2, 4):  # a new length is a new compilation
        value, gradient = step(x[:rows], z[:rows])
        close(value, sample.values[:rows].sum())
        close(gradient, sample.gradient[:rows])
    with pytest.raises(ValueError, match="an array that MLX traces"):
        mx.compile(lambda x: sample(x, z, validate=True))(x)


def test_mlx_shapeless_compile_is_refused(mx):
    """By MLX, which cannot do it with custom functions: an error, never the numbers of the first shape."""
    step = mx.compile(lambda x: ul.softmax_nll(x, x), shapeless=True)
    with pytest.raises(ValueError, match="cannot infer output shapes"):
        [step(mx.ones((rows, 3))).item() for rows in (4, 2)]


@pytest.mark.capability("array API", "MLX: mx.checkpoint")
def test_mlx_checkpoint(sample, mx):
    x, z, _ = mlx_inputs(sample, mx)
    close(mx.grad(mx.checkpoint(lambda x: sample(x, z, reduction="sum")))(x), sample.gradient)


def test_mlx_exp_and_sum_keep_their_digits(mx):
    """What MLX's own lose: the reason for those of unilabel.backends.mlx. Off, they can go."""
    from unilabel.backends.mlx import xp

    x = np.linspace(-87, 0, 1001)
    close(xp.exp(mx.array(x, mx.float64)), np.exp(x), ulp=4)
    close(xp.exp(mx.array(x, mx.float32)), np.exp(x.astype("float32").astype("float64")), "float32", ulp=4)
    np.testing.assert_array_equal(xp.exp(mx.array([-np.inf, -800.0, -0.0, np.nan])), [0, 0, 1, np.nan])
    many = mx.full((1 << 20,), 0.1)
    close(xp.sum(many), np.float64(np.float32(0.1)) * (1 << 20), "float32")
    assert abs(float(mx.exp(mx.array(-62.4))) / np.exp(np.float64(np.float32(-62.4))) - 1) > 1e-6
