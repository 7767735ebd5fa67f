"""The losses as PyTorch modules and as Keras losses: thin, and at home there."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import unilabel as ul
from unilabel.layers.torch import MultilabelLogisticLoss, SoftmaxNLL

X = torch.tensor([[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]])
Z = torch.tensor([[1, 0, 1], [0, 1, 0]])
Y = torch.tensor([2, -1])
WEIGHT = torch.tensor([0.5, 1.0, 2.0])


def test_modules_are_the_functions():
    where = torch.tensor([True, False, True])
    module = MultilabelLogisticLoss(weight=WEIGHT, pos_weight=[2.0], label_smoothing=0.1, axis=0, reduction="none")
    options = {"label_smoothing": 0.1, "axis": 0, "reduction": "none", "where": where}
    expected = ul.multilabel_logistic_loss(X, Z, weight=WEIGHT, pos_weight=[2.0], **options)
    assert torch.equal(module(X, Z, where=where), expected)
    module = SoftmaxNLL(weight=WEIGHT, ignore_index=-1, label_smoothing=0.1)
    expected = ul.softmax_nll(X, Y, weight=WEIGHT, ignore_index=-1, label_smoothing=0.1, sample_weight=[2, 3])
    assert torch.equal(module(X, Y, sample_weight=[2, 3]), expected)


def test_weights_are_buffers():
    module = SoftmaxNLL(weight=[0.5, 1, 2])
    assert list(module.parameters()) == []
    other = SoftmaxNLL(weight=torch.ones(3))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(X, Y.abs()), module(X, Y.abs()))
    assert module.to(torch.float64).weight.dtype == torch.float64
    assert module.to("meta").weight.device.type == "meta"
    assert MultilabelLogisticLoss().state_dict() == {}


def test_a_module_says_what_is_set():
    assert repr(MultilabelLogisticLoss()) == "MultilabelLogisticLoss()"
    assert repr(SoftmaxNLL(weight=WEIGHT, axis=1, label_smoothing=0.1)) == "SoftmaxNLL(label_smoothing=0.1, axis=1)"


def test_a_module_trains_under_compile():
    model = torch.nn.Linear(3, 3)
    module = SoftmaxNLL(weight=[0.5, 1, 2])
    step = torch.compile(lambda x, y: module(model(x), y), backend="aot_eager", fullgraph=True)
    step(X, Y.abs()).backward()
    compiled = model.weight.grad.clone()
    model.zero_grad()
    module(model(X), Y.abs()).backward()
    torch.testing.assert_close(model.weight.grad, compiled, rtol=1e-6, atol=1e-8)


KERAS = """
import keras, numpy as np
import unilabel as ul
from unilabel.layers.keras import MultilabelLogisticLoss, SoftmaxNLL

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 4)).astype("float32")
truth = rng.normal(size=(4, 3))
scores = x @ truth
labels, attributes = scores.argmax(1), scores > 0

for y, loss, direct in [
    (labels, SoftmaxNLL(weight=np.array([0.5, 1, 2]), label_smoothing=0.1), ul.softmax_nll),
    (labels[:, None], SoftmaxNLL(ignore_index=0), ul.softmax_nll),
    (np.eye(3)[labels], SoftmaxNLL(), ul.softmax_nll),
    (attributes, MultilabelLogisticLoss(pos_weight=[2.0, 1.0, 1.0]), ul.multilabel_logistic_loss),
]:
    again = type(loss).from_config(loss.get_config())
    assert again.get_config() == loss.get_config()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(again) is type(loss)

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=again)
    targets = y[:, 0] if y.shape[1:] == (1,) else y
    labelled = 64 - np.count_nonzero(labels == loss.options.get("ignore_index"))
    expected = float(direct(model.predict(x, verbose=0), targets, reduction="sum", **loss.options)) / labelled
    first = model.evaluate(x, y, batch_size=64, verbose=0)
    assert abs(first - expected) <= 1e-6 * expected, (first, expected)
    history = model.fit(x, y, batch_size=24, epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.7 * first, history
    weights = rng.uniform(0.5, 2, 64).astype("float32")
    weighted = model.evaluate(x, y, sample_weight=weights, batch_size=64, verbose=0)
    losses = direct(model.predict(x, verbose=0), targets, reduction="none", **loss.options)
    losses = losses.sum(-1) if losses.ndim > 1 else losses
    expected = float((losses * weights).sum()) / labelled
    assert abs(weighted - expected) <= 1e-6 * expected, (weighted, expected)
print(keras.backend.backend(), "trained")
"""


@pytest.mark.parametrize(
    "backend", ["tensorflow", *(pytest.param(name, marks=pytest.mark.full) for name in ("torch", "jax"))]
)
def test_keras_compile_and_fit(backend, tmp_path):
    environment = {"KERAS_BACKEND": backend, "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KERAS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{backend} trained\n", done.stderr


def test_keras_half_precision_would_round_class_indices():
    from unilabel.backends import keras

    with pytest.raises(ValueError, match=r"Expected dtype 'float32' or 'float64', .*Received: 'bfloat16'"):
        keras.SoftmaxNLL(dtype="bfloat16")
    loss = keras.SoftmaxNLL()
    index = np.array([257])  # 256 in bfloat16
    logits = np.zeros((1, 300), "float32")
    logits[0, 257] = 100
    assert float(loss(index, logits)) == 0


def test_where_they_were_before():
    from unilabel.backends import keras, torch

    from unilabel.layers import keras as keras_layers
    from unilabel.layers import torch as torch_layers

    for old, new in ((torch, torch_layers), (keras, keras_layers)):
        assert old.MultilabelLogisticLoss is new.MultilabelLogisticLoss
        assert old.SoftmaxNLL is new.SoftmaxNLL
    with pytest.raises(AttributeError, match="no attribute 'HingeLoss'"):
        _ = torch.HingeLoss
