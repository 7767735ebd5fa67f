"""What the tests of several modules share."""

import re

import numpy as np
import pytest

from unilabel.backend import backend_named

LOGITS = [[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]]
TARGETS = [[1, 0, 1], [0, 1, 0]]


def close(actual, expected, dtype="float32"):
    np.testing.assert_allclose(actual, expected, rtol=8 * float(np.finfo(dtype).eps), atol=0)


def pattern(text):
    """A regular expression for a text in which .* alone is one."""
    return ".*".join(re.escape(part) for part in text.split(".*"))


def compiled(recorder, function):
    """The function, and its gradient, as the framework compiles them."""
    if recorder.name == "torch":
        import torch

        forward = torch.compile(function, backend="aot_eager", fullgraph=True)

        def with_grad(x):
            x = x.detach().requires_grad_()
            value = forward(x)
            return value, torch.autograd.grad(value, x)[0]

        return with_grad
    if recorder.name == "jax":
        import jax

        return jax.jit(jax.value_and_grad(function))
    if recorder.name == "mlx":
        import mlx.core as mx

        return mx.compile(mx.value_and_grad(function))
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def taped(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x)

    return taped


def asked_for(name, request):
    """The backend of that name, an error if it is missing; a run of other backends alone skips the test."""
    if name not in (request.config.getoption("--backend") or (name,)):
        pytest.skip(f"{name} is not asked for")
    return backend_named(name)
