"""sigmoid, softmax and their logarithms, on every backend."""

import math

import numpy as np
import pytest
from shared import close

import unilabel as ul


@pytest.mark.parametrize(
    ("x", "printed"),
    [([50, 0.0006, 2.3], [1.0, 0.5002, 0.9089]), ([0.92, 0.35, 0.85], [0.7150, 0.5866, 0.7006])],
)
def test_sigmoid(framework, x, printed):
    result = framework.numpy(ul.sigmoid(framework.array(x)))
    np.testing.assert_allclose(result, printed, rtol=0, atol=1e-4)  # one unit of the last digit printed
    close(result, [1 / (1 + math.exp(-v)) for v in x])


def test_activations(framework):
    x = np.array([[-1000.0, -3.0, 0.0, 2.5, 1000.0], [1.0, 2.0, 3.0, 4.0, -np.inf]])
    array = framework.array(x, "float64")
    e = np.exp(x - x.max(-1, keepdims=True))
    close(framework.numpy(ul.softmax(array)), e / e.sum(-1, keepdims=True), "float64")
    close(framework.numpy(ul.softmax(array, axis=0))[:, 1], [1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))], "float64")
    log_p = framework.numpy(ul.log_softmax(array))
    close(log_p, x - x.max(-1, keepdims=True) - np.log(e.sum(-1, keepdims=True)), "float64")
    log_sigmoid = framework.numpy(ul.log_sigmoid(array))
    close(
        log_sigmoid[0], [-1000.0, -math.log1p(math.exp(3)), -math.log(2), -math.log1p(math.exp(-2.5)), 0.0], "float64"
    )
    close(framework.numpy(ul.sigmoid(array))[0, 1:4], 1 / (1 + np.exp([3.0, 0.0, -2.5])), "float64")
    assert log_sigmoid[1, 4] == -np.inf
