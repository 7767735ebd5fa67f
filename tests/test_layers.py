"""The losses as PyTorch modules and as Keras losses: thin, and at home there."""

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from shared import pattern

import unilabel as ul
from unilabel.layers.torch import MultilabelLogisticLoss, SoftmaxNLL

X = torch.tensor([[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]], dtype=torch.float64)
Z = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([2, -100])
W = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
V = torch.tensor([3.0, 0.5, 1.1], dtype=torch.float64)


class Pair(NamedTuple):
    """A module with the options that PyTorch's has, and PyTorch's."""

    ours: Callable[..., torch.nn.Module]
    theirs: Callable[..., torch.nn.Module]
    targets: torch.Tensor


SOFTMAX = Pair(functools.partial(SoftmaxNLL, ignore_index=-100), torch.nn.CrossEntropyLoss, Y)
MULTILABEL = Pair(functools.partial(MultilabelLogisticLoss, reduction="mean"), torch.nn.BCEWithLogitsLoss, Z)


def same(ours, theirs):
    """Dtype, device and values of tensors, to rounding; in lists, tuples and dicts too; all else is equal."""
    if isinstance(theirs, torch.Tensor):
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=0)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        same(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, (list, tuple)):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == theirs


def put(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied(copy):
    """A copy has what was set before, and not what is set after."""

    def both(make, x, t):
        module = put(make(W), reduction="sum")
        other = copy(module)
        return other(x, t), put(other, reduction="none", weight=V)(x, t), module(x, t)

    return both


def loaded(weight):
    def load(make, x, t):
        module = make(weight.clone())  # which is written to
        return str(module.load_state_dict(make(V).state_dict())), module.weight

    return load


# What users and trainers do with a loss that `make` makes, ours as PyTorch's, and what they then have.
DONE = {
    "weight by position": lambda make, x, t: make(W)(x, t),
    "arguments by name": lambda make, x, t: make(weight=W)(input=x, target=t),
    "reduction": lambda make, x, t: (make().reduction, [put(make(), reduction=r)(x, t) for r in ("none", "sum")]),
    "weight": lambda make, x, t: (make(W).weight, put(make(W), weight=V)(x, t), put(make(), weight=V)(x, t)),
    "no weight": lambda make, x, t: (make().weight, put(make(W), weight=None)(x, t)),
    "the weight itself": lambda make, x, t: make(W).weight is W,
    "copy.deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda module: pickle.loads(pickle.dumps(module))),
    "torch.save": copied(saved),
    "to": lambda make, x, t: (make(W.float()).to(torch.float64).weight, make(W).to("meta").weight.device),
    "half": lambda make, x, t: make(W).half().weight,
    "state_dict": lambda make, x, t: (dict(make(W).state_dict()), dict(make().state_dict())),
    "load_state_dict": loaded(W),
    "load_state_dict, in float32": loaded(W.float()),
    "parameter": lambda make, x, t: dict(put(make(W), weight=torch.nn.Parameter(V)).named_parameters()),
    "parameter, None": lambda make, x, t: put(make(torch.nn.Parameter(W)), weight=None)(x, t),
    "in a model": lambda make, x, t: list(torch.nn.Sequential(make(W)).state_dict()),
}
OF_SOFTMAX = {
    "label_smoothing": lambda make, x, t: (make().label_smoothing, put(make(), label_smoothing=0.1)(x, t)),
    "ignore_index": lambda make, x, t: (make().ignore_index, put(make(), ignore_index=2)(x, t.clamp(min=0))),
}
OF_MULTILABEL = {
    "pos_weight": lambda make, x, t: (put(make(W, pos_weight=W), pos_weight=V)(x, t), make().pos_weight),
    "both weights": lambda make, x, t: dict(make(W, pos_weight=V).state_dict()),
}


@pytest.mark.parametrize(
    ("pair", "do"),
    [
        pytest.param(pair, do, id=f"{pair.theirs.__name__}, {name}")
        for pair, more in ((SOFTMAX, OF_SOFTMAX), (MULTILABEL, OF_MULTILABEL))
        for name, do in (DONE | more).items()
    ],
)
def test_a_module_is_used_as_pytorchs_own(pair, do):
    ours, theirs = (do(make, X, pair.targets) for make in (pair.ours, pair.theirs))
    same(ours, theirs)


@pytest.mark.parametrize("pair", [SOFTMAX, MULTILABEL])
def test_an_option_of_the_call_wins(pair):
    module = pair.ours(W, label_smoothing=0.3, axis=0)
    call = module(X, pair.targets, weight=V, label_smoothing=0, axis=-1, reduction="sum", validate=True)
    same(call, pair.theirs(V, reduction="sum")(X, pair.targets))
    assert module.reduction == "mean"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("weight", [W.tolist(), [1, 2, 3], range(1, 4), np.array([1, 2, 3]), torch.tensor([1, 2, 3])])
def test_no_digit_of_a_weight_is_lost(weight, dtype):
    x, w = X.to(dtype), torch.tensor(list(map(float, weight)), dtype=torch.float64)
    for pair, name in ((SOFTMAX, "weight"), (MULTILABEL, "weight"), (MULTILABEL, "pos_weight")):
        module = pair.ours(**{name: weight})
        same(module.state_dict()[name], w)
        same(module(x, pair.targets), pair.theirs(**{name: w})(x.double(), pair.targets).to(dtype))
        state = {name: torch.tensor([0.5, 0.7, 1.2])}
        module.load_state_dict(state)
        same(getattr(module, name), state[name].double())


def test_a_numpy_array_is_not_written_to():
    array = W.numpy().copy()
    SoftmaxNLL(weight=array).load_state_dict({"weight": V})
    assert (array == W.numpy()).all()


def test_a_device_without_float64():
    def to_it(tensor):
        if tensor.dtype is torch.float64:
            raise TypeError("no float64")
        return tensor.clone()

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), SoftmaxNLL(W.tolist()))
    same(model._apply(to_it)[1].weight, W.float())


def test_weights_and_smoothing_can_be_learned():
    weight, pos_weight, smoothing = (torch.nn.Parameter(v) for v in (W, V, torch.tensor(0.1, dtype=torch.float64)))
    y = torch.tensor([2, 0])
    log_p = torch.log_softmax(X, -1)
    smooth = torch.nn.functional.one_hot(y, 3) * (1 - smoothing) + smoothing / 3
    log_1, log_0 = (torch.nn.functional.logsigmoid(sign * X) for sign in (1, -1))
    for module, x, t, expected, learned in (
        (SoftmaxNLL(weight), X, y, -(weight[y] * log_p[[0, 1], y]).sum() / weight[y].sum(), (weight,)),
        (SoftmaxNLL(label_smoothing=smoothing), X, y, -(smooth * log_p).sum(-1).mean(), (smoothing,)),
        (
            MultilabelLogisticLoss(weight, pos_weight=pos_weight, reduction="mean"),
            X,
            Z,
            -(weight * (pos_weight * Z * log_1 + (1 - Z) * log_0)).mean(),
            (weight, pos_weight),
        ),
    ):
        same(list(module.parameters()), list(learned))
        same(torch.autograd.grad(module(x, t), learned), torch.autograd.grad(expected, learned))


def test_label_smoothing_by_a_schedule():
    module = SoftmaxNLL(ignore_index=-100)
    for smoothing in (torch.tensor(0.3), torch.tensor(0.2), 0.1, torch.tensor(0.0), 0):
        module.label_smoothing = smoothing
        expected = torch.nn.CrossEntropyLoss(label_smoothing=float(smoothing))(X, Y)
        torch.testing.assert_close(module(X, Y), expected, rtol=1e-7, atol=0)
        assert list(module.state_dict()) == ["label_smoothing"] * isinstance(smoothing, torch.Tensor)


@pytest.mark.parametrize(
    ("option", "value", "error", "text"),
    [
        ("reduction", "average", ValueError, "reduction: 'none', 'sum', 'mean' or 'batchmean'. Received: 'average'"),
        ("axis", 1.0, TypeError, "axis: an integer or a tuple of integers. Received: 1.0"),
        ("axis", (1, 1), ValueError, "axis: an axis, or a tuple of distinct ones. Received: (1, 1)"),
        ("axis", (), ValueError, "axis: an axis, or a tuple of distinct ones. Received: ()"),
        ("label_smoothing", 1.5, ValueError, "label_smoothing: a number from 0 to 1.0. Received: 1.5"),
        ("label_smoothing", W, ValueError, "label_smoothing: a number, or an array of no dimensions. Received: .*(3,)"),
        ("ignore_index", 0.5, TypeError, "ignore_index: an integer. Received: 0.5"),
        ("ignore_index", 2**40, ValueError, "ignore_index: an integer between -2**31 and 2**31 - 1, .*Received: "),
        ("weight", [[1.0, 2.0]], ValueError, "weight: one weight for each class. Received: shape (1, 2)"),
        ("weight", [1.0, [2.0]], TypeError, "weight: an array. Received: a list that NumPy cannot convert"),
        ("weight", W * 1j, TypeError, "weight: dtype .*Received: complex128"),
    ],
)
def test_wrong_options_are_refused_when_made_and_when_set(option, value, error, text):
    with pytest.raises(error, match=pattern(f"Expected {text}")):
        SoftmaxNLL(**{option: value})
    module = SoftmaxNLL()
    with pytest.raises(error, match=pattern(f"Expected {text}")):
        setattr(module, option, value)
    assert repr(module) == "SoftmaxNLL()"
    with pytest.raises(TypeError, match="unexpected keyword argument 'pos_weights'"):
        MultilabelLogisticLoss(pos_weights=W)


def test_validate():
    wrong = torch.tensor([0, 3])
    for module in (SoftmaxNLL(validate=True), put(SoftmaxNLL(), validate=True)):
        with pytest.raises(ValueError, match=re.escape("class indices from 0 to 2. Received: 3 at (1,)")):
            module(X, wrong)
        assert module(X, wrong, validate=False).isnan()


def test_what_only_ours_have():
    where = torch.tensor([True, False, True])
    module = MultilabelLogisticLoss(W, pos_weight=[2.0], label_smoothing=0.1, axis=0, reduction="none")
    options = {"label_smoothing": 0.1, "axis": 0, "reduction": "none", "where": where}
    expected = ul.multilabel_logistic_loss(X, Z, weight=W, pos_weight=[2.0], **options)
    assert torch.equal(module(X, Z, where=where), expected)
    module = SoftmaxNLL(W, ignore_index=-100, label_smoothing=0.1)
    expected = ul.softmax_nll(X, Y, weight=W, ignore_index=-100, label_smoothing=0.1, sample_weight=[2, 3])
    assert torch.equal(module(X, Y, sample_weight=[2, 3]), expected)


def test_a_module_says_what_is_set():
    assert repr(MultilabelLogisticLoss()) == "MultilabelLogisticLoss()"
    module = SoftmaxNLL(weight=W, axis=(-2, 1), label_smoothing=0.1)
    assert repr(module) == "SoftmaxNLL(label_smoothing=0.1, axis=(-2, 1))"
    put(module, label_smoothing=torch.tensor(0.1), axis=-1, reduction="sum", validate=True)
    assert repr(module) == "SoftmaxNLL(reduction='sum', validate=True)"


def test_fastai_and_skorch():
    """fastai sets `reduction` for a while, and asks for `activation` and `decodes`; skorch asks for the class."""
    module = SoftmaxNLL()
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    p = module.activation(X)
    same(p, torch.softmax(X, -1))
    same(module.decodes(p), p.argmax(-1))
    assert module.y_int
    images = torch.stack([X, -X, 2 * X], 1)
    same(put(module, axis=1).activation(images), torch.softmax(images, 1))
    same(module.decodes(images), images.argmax(1))
    same(put(module, axis=(2, 0)).decodes(images), images.permute(1, 2, 0).flatten(1).argmax(1))

    module = MultilabelLogisticLoss()
    assert isinstance(module, torch.nn.BCEWithLogitsLoss)
    same(module.activation(X), torch.sigmoid(X))
    assert torch.equal(module.decodes(module.activation(X)), X > 0)


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3, dtype=torch.float64)
        torch.nn.init.eye_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.loss = loss

    def forward(self, x, y):
        return self.loss(self.linear(x), y)


@pytest.mark.parametrize("pair", [SOFTMAX, MULTILABEL])
def test_a_model_is_traced_by_fx(pair):
    graph = torch.fx.symbolic_trace(Model(pair.ours(W)))
    expected = pair.theirs(W)(X, pair.targets)
    for module in (graph, torch.fx.symbolic_trace(graph), pickle.loads(pickle.dumps(graph))):
        same(module(X, pair.targets), expected)
    graph.loss.weight = V
    same(graph(X, pair.targets), pair.theirs(V)(X, pair.targets))


@pytest.mark.parametrize("pair", [SOFTMAX, MULTILABEL])
def test_a_module_itself_is_traced_by_fx(pair):
    graph = torch.fx.symbolic_trace(pair.ours(W))
    same(graph(X, pair.targets), pair.theirs(W)(X, pair.targets))
    with pytest.raises(TypeError, match="reduction"):  # it has the options of the module
        graph(X, pair.targets, reduction="sum")


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"axis": 1}])
@pytest.mark.parametrize("pair", [SOFTMAX, MULTILABEL])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_model_is_traced_by_jit(pair, options):
    """For batches of other sizes too."""
    model = Model(pair.ours(**options))
    traced = torch.jit.trace(model, (X, pair.targets))
    x, t = torch.cat([X, 2 * X, -X]), torch.cat([pair.targets] * 3)
    same(traced(x, t), model(x, t))


@pytest.mark.parametrize("pair", [SOFTMAX, MULTILABEL])
def test_a_module_trains_under_compile(pair):
    model, theirs = Model(pair.ours(W)), Model(pair.theirs(W))
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for options in ({}, {"reduction": "sum"}, {"weight": V}, {"weight": None}):
        losses = []
        for module, call in ((model, step), (theirs, theirs)):
            put(module.loss, **options)
            module.zero_grad()
            losses.append(call(X, pair.targets))
            losses[-1].backward()
        same(*losses)
        torch.testing.assert_close(model.linear.weight.grad, theirs.linear.weight.grad, rtol=1e-14, atol=1e-16)


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
