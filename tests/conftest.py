"""One fixture for every backend. A framework that is asked for and missing is a failure, never a skip."""

import os
import sys

os.environ["JAX_ENABLE_X64"] = "1"  # before JAX is imported: float64 is tested on it too

import numpy as np
import pytest

from unilabel.backend import backend_named

pytest_plugins = ["capabilities"]

BACKENDS = ("numpy", "torch", "jax", "tensorflow", "array_api_strict")
MORE = ("mlx",)  # only if asked for


def pytest_addoption(parser):
    choices = BACKENDS + MORE
    parser.addoption(
        "--backend", action="append", choices=choices, help="test this one; repeatable. Default: all but mlx"
    )
    parser.addoption("--write-api", action="store_true", help="write docs/api.md")


def pytest_generate_tests(metafunc):
    wanted = metafunc.config.getoption("--backend") or BACKENDS
    for fixture in ("framework", "recorder"):  # a recorder is a framework that has autodiff
        if fixture in metafunc.fixturenames:
            names = [name for name in wanted if fixture == "framework" or name not in ("numpy", "array_api_strict")]
            none = pytest.param("", marks=pytest.mark.skip(reason="none of --backend has autodiff"))
            metafunc.parametrize(fixture, names or [none], indirect=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """XLA maps memory for each program that it has compiled; of Linux a process gets 65,530 pieces, or it crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def small_blocks(monkeypatch):
    """A linear loss's blocks have as many examples as there are features."""
    monkeypatch.setattr(sys.modules["unilabel.formulas.linear"], "BLOCK", 1)


class Framework:
    """A backend, with what tests need of it in one word."""

    def __init__(self, name):
        self.backend = backend_named(name)
        self.name = name
        self.dtypes = ["float32", "float64"]
        if name != "array_api_strict":  # the standard has no half precision
            self.dtypes += ["float16", "bfloat16"]

    def array(self, data, dtype="float32"):
        wide = np.asarray(data, dtype="float64" if dtype == "float64" else "float32")
        return self.backend.cast(self.backend.asarray(wide), dtype)

    def integers(self, data, dtype="int64"):
        return self.backend.asarray(np.asarray(data, dtype=dtype))

    def numpy(self, array):
        return self.backend.to_numpy(array)

    def gradient(self, function, x, cotangent=None):
        """By the framework's own autodiff."""
        value = function(x)
        ones = np.ones(tuple(value.shape)) if cotangent is None else cotangent
        _, gradient = self.backend.vjp(function, x, self.array(ones, self.backend.dtype(value)))
        return self.numpy(gradient)


@pytest.fixture(scope="session")
def frameworks(request):
    """All that are tested, for tests that draw one input for all."""
    return [Framework(name) for name in request.config.getoption("--backend") or BACKENDS]


@pytest.fixture
def framework(request):
    return Framework(request.param)


@pytest.fixture
def recorder(request):
    framework = Framework(request.param)
    assert framework.backend.autodiff
    return framework
