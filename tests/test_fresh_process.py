"""What can only be seen in a new process: the very first call, and several devices."""

import os
import subprocess
import sys

import pytest

COMPILED = """
import numpy as np, torch, unilabel as ul

def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)

x, y = torch.zeros(1, 2), torch.tensor([0])
assert compiled(lambda x: ul.softmax_nll(x, y))(x) == ul.softmax_nll(x, y)
ones = {"weight": (1, 1.0), "pos_weight": np.float64(1), "where": np.True_}
parameter = torch.nn.Parameter(x)
loss = compiled(lambda x: ul.multilabel_logistic_loss(x, [(0, 1)], **ones))(parameter)
assert loss == 2 * np.log(2).astype("f4")
for dynamic in (None, True):
    step = compiled(lambda x, y: ul.softmax_nll(x, y) + ul.multilabel_logistic_loss(x, x > 0), dynamic=dynamic)
    for rows in (3, 5, 8):
        x, y = torch.randn(rows, 4), torch.zeros(rows, dtype=torch.int64)
        torch.testing.assert_close(step(x, y), ul.softmax_nll(x, y) + ul.multilabel_logistic_loss(x, x > 0))
"""

JAX_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, unilabel as ul
first, second = jax.devices()
x, y = jax.device_put(jnp.ones((2, 3)), second), jax.device_put(jnp.array([0, 1]), first)
for targets in (y, [0, 1], np.array([0, 1])):
    for result in (ul.softmax_nll(x, targets), *ul.value_and_grad(ul.softmax_nll)(x, targets), ul.softmax(x)):
        assert result.devices() == {second}
assert jax.grad(ul.softmax_nll)(x, [0, 1]).devices() == {second}
"""

TENSORFLOW_DEVICES = """
import tensorflow as tf, unilabel as ul
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.device("/CPU:1"):
    x = tf.ones((2, 3))
with tf.GradientTape() as tape:
    tape.watch(x)
    loss = ul.softmax_nll(x, [0, 1])
results = [loss, tape.gradient(loss, x), *ul.value_and_grad(ul.multilabel_logistic_loss)(x, x), ul.softmax(x)]
assert [result.device.rpartition("/")[2] for result in results] == ["device:CPU:1"] * 5
"""

TENSORFLOW_FUNCTION = """
import tensorflow as tf, unilabel as ul
specs = [tf.TensorSpec(shape) for shape in ((4, 3), (5, 3), (None,))]

@tf.function(input_signature=specs)
def loss(features, weight, bias):
    return ul.linear_softmax_nll(features, weight, [0, 1, 2, 3], linear_bias=bias)

features, weight, bias = tf.ones((4, 3)), tf.ones((5, 3)), tf.constant([0.0, 1, 2, 3, 4])
x = features @ tf.transpose(weight) + bias
tf.debugging.assert_near(loss(features, weight, bias), ul.softmax_nll(x, [0, 1, 2, 3]))
try:
    loss(features, weight, bias[:1])
except tf.errors.InvalidArgumentError:
    pass
else:
    raise AssertionError("one number is a bias of all classes")
"""


@pytest.mark.parametrize(
    "code",
    [
        JAX_DEVICES,
        *(pytest.param(code, marks=pytest.mark.full) for code in (COMPILED, TENSORFLOW_DEVICES, TENSORFLOW_FUNCTION)),
    ],
    ids=["jax", "compiled", "tensorflow", "tensorflow in a function"],
)
def test_fresh(code, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
