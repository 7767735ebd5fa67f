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
from torch.nn.utils import prune

import unilabel as ul
from unilabel.layers.torch import (
    LinearMultilabelLogisticLoss,
    LinearSoftmaxNLL,
    MultilabelLogisticLoss,
    SoftmaxNLL,
)

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


class LinearFirst(torch.nn.Module):
    """PyTorch's loss on the logits of a linear layer that it holds."""

    def __init__(self, *options, **named):
        super().__init__(*options, **named)
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, input, target):
        return super().forward(self.linear(input), target)

    def logits(self, input):
        return self.linear(input)


class LinearCrossEntropy(LinearFirst, torch.nn.CrossEntropyLoss):
    pass


class LinearBCEWithLogits(LinearFirst, torch.nn.BCEWithLogitsLoss):
    pass


def seeded(head, **options):
    def make(weight=None, **more):
        torch.manual_seed(0)
        return head(3, 3, dtype=torch.float64, weight=weight, **options, **more)

    return make


LINEAR_SOFTMAX = Pair(seeded(LinearSoftmaxNLL, ignore_index=-100), LinearCrossEntropy, Y)
LINEAR_MULTILABEL = Pair(seeded(LinearMultilabelLogisticLoss, reduction="mean"), LinearBCEWithLogits, Z)
PAIRS = (SOFTMAX, MULTILABEL, LINEAR_SOFTMAX, LINEAR_MULTILABEL)


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
        for pair, more in zip(PAIRS, (OF_SOFTMAX, OF_MULTILABEL, OF_SOFTMAX, OF_MULTILABEL), strict=True)
        for name, do in (DONE | more).items()
    ],
)
def test_a_module_is_used_as_pytorchs_own(pair, do):
    ours, theirs = (do(make, X, pair.targets) for make in (pair.ours, pair.theirs))
    same(ours, theirs)


@pytest.mark.parametrize("pair", PAIRS)
def test_an_option_of_the_call_wins(pair):
    axis, own = ({"axis": 0}, {"axis": -1}) if pair in (SOFTMAX, MULTILABEL) else ({}, {})
    module = pair.ours(W, label_smoothing=0.3, **axis)
    call = module(X, pair.targets, weight=V, label_smoothing=0, **own, reduction="sum", validate=True)
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


@pytest.mark.parametrize("pair", [LINEAR_SOFTMAX, LINEAR_MULTILABEL])
@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_module_trains_its_layer(pair, tied):
    """As the model whose last layer it holds, alone or tied to the embedding that its input comes from."""
    ends = []
    for make in (pair.ours, pair.theirs):
        head, table = make(W), torch.nn.Embedding.from_pretrained(X[[0, 1, 1]].clone(), freeze=False)
        if tied:
            head.linear.weight = table.weight
        model = torch.nn.ModuleDict({"table": table, "head": head})
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            head(table(torch.tensor([0, 2])), pair.targets).backward()
            optimizer.step()
        ends.append(model.state_dict())
        ends[-1]["logits"] = head.logits(X).detach()
    assert list(ends[0]) == list(ends[1])
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-12, atol=0)


def test_a_linear_module_beside_pytorchs_own():
    """The same start, the same names in the state, the same loss and gradients."""
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is None:
        pytest.skip("PyTorch has LinearCrossEntropyLoss from 2.13 on")
    for bias in (False, True):
        torch.manual_seed(0)
        own = theirs(3, 4, bias=bias, dtype=torch.float64, label_smoothing=0.1)
        torch.manual_seed(0)
        ours = LinearSoftmaxNLL(3, 4, bias=bias, dtype=torch.float64, label_smoothing=0.1, ignore_index=-100)
        same(dict(ours.state_dict()), dict(own.state_dict()))
        ours.load_state_dict(own.state_dict())
        x = X.clone().requires_grad_()
        gradients = [torch.autograd.grad(head(x, Y), [x, *head.parameters()]) for head in (ours, own)]
        same(ours(X, Y), own(X, Y))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("kind", [LinearSoftmaxNLL, LinearMultilabelLogisticLoss])
@pytest.mark.parametrize("name", ["linear_weight", "linear_bias", "bias", "weight"])
def test_a_linear_module_takes_no_parameter_that_it_would_not_use(kind, name):
    """Least of all an embedding to tie as its weights of the classes, which broadcast if there are as many of all."""
    head = kind(5, 5)
    with pytest.raises(AttributeError, match=f"Set module.linear.{name.rpartition('_')[2]}, not module.{name}."):
        setattr(head, name, torch.nn.Parameter(torch.zeros(5, 5)))
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    head.weight, head.bias, head.linear_weight = torch.ones(5), None, True  # as a subclass of somebody's
    assert list(head.state_dict()) == ["weight", "linear.weight", "linear.bias"]


class _Scaled(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("changed", "received"),
    [
        (lambda linear: _Scaled(3, 5), "_Scaled'> with its own forward"),
        (lambda linear: torch.nn.Sequential(linear), "Sequential'> with its own forward"),
        (lambda linear: torch.nn.Embedding(5, 3), "Embedding'> with its own forward"),
        (torch.nn.utils.spectral_norm, "Linear'> with weight_orig"),
        (lambda linear: prune.random_unstructured(linear, "weight", 2), "Linear'> with weight_orig"),
        (lambda linear: prune.random_unstructured(linear, "bias", 2), "Linear'> with bias_orig"),
    ],
)
def test_a_linear_module_reads_no_weight_that_its_layer_would_not_use(changed, received):
    """They would be trained without what the layer does beside, and predict with it."""
    head = LinearSoftmaxNLL(3, 5, dtype=torch.float64)
    head.linear = changed(head.linear)
    for run in (head, torch.compile(head, backend="eager")):
        with pytest.raises(TypeError, match=f"module.linear: a torch.nn.Linear, .* Received: .*{received}"):
            run(X, torch.tensor([0, 4]))
    torch.compiler.reset()  # what failed once is not compiled again


@pytest.mark.parametrize("kind", [None, "weight_norm", "spectral_norm", "orthogonal"])
def test_a_linear_module_trains_what_its_weight_is_made_of(kind):
    torch.manual_seed(20261127)
    head = LinearSoftmaxNLL(3, 5, dtype=torch.float64)
    if kind:
        getattr(torch.nn.utils.parametrizations, kind)(head.linear)
    head.eval()  # spectral_norm changes its vectors in each call while it trains
    y, parameters = torch.tensor([0, 4]), list(head.parameters())
    right = torch.nn.functional.cross_entropy(head.logits(X), y)
    for run in (head, torch.compile(head, backend="aot_eager", fullgraph=True)):
        value = run(X, y)
        torch.testing.assert_close(value, right, rtol=1e-12, atol=0)
        pairs = [torch.autograd.grad(each, parameters, retain_graph=True) for each in (value, right)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_linear_module_holds_any_linear_layer():
    """Of its device and dtype, parametrized or not; what only its loss has is given in the call."""
    head = LinearSoftmaxNLL(3, 5, bias=False, dtype=torch.float64, device="cpu", weight=[1, 2, 3, 4, 5], validate=True)
    assert head.linear.bias is None
    assert head.logits(X[None]).shape == (1, 2, 5)
    assert LinearSoftmaxNLL(3, 5, device="meta").linear.weight.device.type == "meta"
    torch.nn.utils.parametrizations.weight_norm(head.linear)
    y, where = torch.tensor([0, 4]), torch.tensor([True, True, False, True, True])
    options = {"sample_weight": [2, 3], "where": where, "weight": [1, 2, 3, 4, 5]}
    loss = head(X, y, sample_weight=[2, 3], where=where)
    torch.testing.assert_close(loss, ul.softmax_nll(head.linear(X), y, **options), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=re.escape("class indices from 0 to 4. Received: 5 at (1,)")):
        head(X, torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        head(X, y, axis=0)
    where = Z > 0
    head = LinearMultilabelLogisticLoss(3, 3, dtype=torch.float64)
    expected = ul.multilabel_logistic_loss(head.logits(X), Z, where=where)
    torch.testing.assert_close(head(X, Z, where=where), expected, rtol=1e-14, atol=0)
    assert repr(LinearMultilabelLogisticLoss(3, 2, reduction="sum")).splitlines()[:2] == [
        "LinearMultilabelLogisticLoss(",
        "  reduction='sum'",
    ]


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


@pytest.mark.parametrize("pair", PAIRS)
def test_a_model_is_traced_by_fx(pair):
    graph = torch.fx.symbolic_trace(Model(pair.ours(W)))
    expected = pair.theirs(W)(X, pair.targets)
    for module in (graph, torch.fx.symbolic_trace(graph), pickle.loads(pickle.dumps(graph))):
        same(module(X, pair.targets), expected)
    graph.loss.weight = V
    same(graph(X, pair.targets), pair.theirs(V)(X, pair.targets))


@pytest.mark.parametrize("pair", PAIRS)
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


@pytest.mark.parametrize("pair", PAIRS)
def test_a_module_trains_under_compile(pair):
    torch.compiler.reset()  # it counts how often a class is compiled
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


def run_keras(code, backend, folder):
    environment = {"KERAS_BACKEND": backend, "PATH": "", "HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{backend} trained\n", done.stderr


KERAS = """
import keras, numpy as np
import unilabel as ul
from unilabel.layers.keras import MultilabelLogisticLoss, SoftmaxNLL

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 4)).astype("float32")
truth = rng.normal(size=(4, 3))
scores = x @ truth
labels, attributes = scores.argmax(1), scores > 0


def of_positives(x, y, **options):
    return ul.multilabel_logistic_loss(x, attributes, **options)


for y, loss, direct in [
    (labels, SoftmaxNLL(weight=np.array([0.5, 1, 2]), label_smoothing=0.1), ul.softmax_nll),
    (labels[:, None], SoftmaxNLL(ignore_index=0), ul.softmax_nll),
    (np.eye(3)[labels], SoftmaxNLL(), ul.softmax_nll),
    (attributes, MultilabelLogisticLoss(pos_weight=[2.0, 1.0, 1.0]), ul.multilabel_logistic_loss),
    (np.where(attributes, [0, 1, 2], -1), MultilabelLogisticLoss(positives=True), of_positives),
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
    run_keras(KERAS, backend, tmp_path)


KERAS_LINEAR = """
import keras, numpy as np, unilabel as ul
from unilabel.layers.keras import LinearMultilabelLogisticLoss, LinearSoftmaxNLL, MultilabelLogisticLoss, SoftmaxNLL

rng = np.random.default_rng(0)
x, s = rng.normal(size=(64, 4)).astype("float32"), rng.uniform(0.5, 2, 64).astype("float32")
scores = x @ rng.normal(size=(4, 3))
y, z = scores.argmax(1), (scores > 0).astype("float32")
SGD, CrossEntropy = keras.optimizers.SGD, keras.losses.SparseCategoricalCrossentropy


def start():
    return keras.initializers.GlorotUniform(seed=1)


def close(a, b, rtol=1e-6):
    a, b = (keras.ops.convert_to_numpy(each) for each in (a, b))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# The loss is that of Dense and the loss on its logits, however targets and weights come.
for head, loss, targets, options in [
    (LinearSoftmaxNLL, CrossEntropy(from_logits=True), y, {}),
    (LinearSoftmaxNLL, CrossEntropy(from_logits=True, ignore_class=1), y, {"ignore_index": 1}),
    (LinearSoftmaxNLL, keras.losses.CategoricalCrossentropy(from_logits=True), np.eye(3)[y], {}),
    (LinearSoftmaxNLL, SoftmaxNLL(weight=[1, 2, 3], reduction="sum"), y[:, None].astype("float32"),
     {"weight": [1, 2, 3], "reduction": "sum"}),
    (LinearSoftmaxNLL, SoftmaxNLL(label_smoothing=0.1, ignore_index=-100), y,
     {"label_smoothing": 0.1, "ignore_index": -100}),
    (LinearMultilabelLogisticLoss, MultilabelLogisticLoss(), z, {}),
    (LinearMultilabelLogisticLoss, MultilabelLogisticLoss(weight=[1, 2, 3], pos_weight=[2, 1, 1]), z,
     {"weight": [1, 2, 3], "pos_weight": [2, 1, 1]}),
]:
    layer, dense = head(3, kernel_initializer=start(), **options), keras.layers.Dense(3, kernel_initializer=start())
    logits = dense(x)
    for weights in (None, s):
        close(layer(x, targets, sample_weight=weights), loss(targets, logits, weights))
    close(layer.logits(x), logits)
    close(layer.kernel, keras.ops.transpose(dense.kernel), 0)
    again = head.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    for low in ("mixed_bfloat16", "mixed_float16"):
        layer, dense = head(3, dtype=low, **options), keras.layers.Dense(3, dtype=low)
        layer.kernel_initializer, dense.kernel_initializer = start(), start()
        logits = layer.logits(x)
        assert keras.backend.standardize_dtype(logits.dtype) == low[6:]
        close(logits, dense(x), 0)
        value = layer(x, targets)
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        features, kernel = (keras.ops.cast(keras.ops.cast(a, low[6:]), "float32") for a in (x, layer.kernel))
        full = head(3, kernel_initializer=lambda shape, dtype: keras.ops.transpose(kernel), **options)
        close(value, full(features, targets))

# An endpoint trains as Dense in a model that is compiled with the loss.
inputs, labels = keras.Input((4,)), keras.Input((), dtype="int32")
layer, dense = LinearSoftmaxNLL(3, kernel_initializer=start()), keras.layers.Dense(3, kernel_initializer=start())
model, other = keras.Model([inputs, labels], layer(inputs, labels)), keras.Model(inputs, dense(inputs))
model.compile(SGD(0.5))
other.compile(SGD(0.5), loss=SoftmaxNLL())
kept = {"batch_size": 32, "epochs": 3, "shuffle": False, "verbose": 0}
close(model.fit([x, y], **kept).history["loss"], other.fit(x, y, **kept).history["loss"], 1e-5)
close(layer.kernel, keras.ops.transpose(dense.kernel), 1e-5)
close(keras.Model(inputs, layer(inputs)).predict(x, verbose=0), other.predict(x, verbose=0), 1e-5)

# Tied to an embedding, whose mask it heeds; the tie is there in the loaded model too.
words, following = keras.Input((7,), dtype="int32"), keras.Input((7,), dtype="int32")
embedding = keras.layers.Embedding(11, 4, mask_zero=True)
layer = LinearSoftmaxNLL(11, use_bias=False, embedding=embedding)
model = keras.Model([words, following], layer(embedding(words), following))
model.compile(SGD(0.5))
data = rng.integers(0, 11, (2, 8, 7)).astype("int32")
model.fit(list(data), epochs=2, verbose=0)
vectors, mask = embedding(data[0]), data[0] != 0
logits = keras.ops.matmul(vectors, keras.ops.transpose(embedding.embeddings))
expected = CrossEntropy(from_logits=True)(data[1], logits, mask.astype("float32"))
close(model.evaluate(list(data), verbose=0), expected * mask.size / mask.sum())
assert [v.path for v in model.trainable_variables] == ["embedding/embeddings"]
model.save("tied.keras")
loaded = keras.saving.load_model("tied.keras")
assert [v.path for v in loaded.trainable_variables] == ["embedding/embeddings"]
for each in (model, loaded):
    each.fit(list(data), epochs=1, verbose=0)
close(loaded.evaluate(list(data), verbose=0), model.evaluate(list(data), verbose=0))

# Weights of the examples, as an input.
weights, w = keras.Input((1,)), rng.random((8, 1)).astype("float32")
for head, dense_loss, targets in (
    (LinearSoftmaxNLL, SoftmaxNLL, rng.integers(0, 3, 8)),
    (LinearMultilabelLogisticLoss, MultilabelLogisticLoss, rng.integers(0, 2, (8, 3))),
):
    labels = keras.Input(targets.shape[1:], dtype="int32")
    layer = head(3)
    model = keras.Model([inputs, labels, weights], layer(inputs, labels, weights))
    model.compile(SGD(0.5))
    expected = dense_loss()(targets, layer(x[:8]), sample_weight=w)
    close(model.evaluate([x[:8], targets.astype("int32"), w], verbose=0), expected)

for call in (
    lambda table: ul.linear_softmax_nll(vectors[0], table, data[1, 0]),
    lambda table: ul.softmax_nll(vectors[0], data[1, 0] % 4, weight=table[0]),
    lambda table: ul.softmax_nll(table, data[1, 0]),
):
    try:
        call(embedding.embeddings)
    except TypeError as error:
        assert "Variable of Keras (give its value)" in str(error), error

for make, text in [
    (lambda: LinearSoftmaxNLL(3)(x[:8], y[:8], np.ones((8, 2))), "sample_weight: one for each example, (8,)."),
    (lambda: LinearSoftmaxNLL(3, reduction="mean"), "reduction: 'sum_over_batch_size' or 'sum'. Received: 'mean'"),
    (lambda: LinearSoftmaxNLL(3, label_smoothing=2), "label_smoothing: a number from 0 to 1.0. Received: 2"),
    (lambda: LinearSoftmaxNLL(9, embedding=embedding)(vectors, data[1]), "embedding: a table of shape (9, 4)"),
]:
    try:
        make()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)
print(keras.backend.backend(), "trained")
"""


@pytest.mark.parametrize(
    "backend", ["tensorflow", *(pytest.param(name, marks=pytest.mark.full) for name in ("torch", "jax"))]
)
def test_keras_linear_layers(backend, tmp_path):
    run_keras(KERAS_LINEAR, backend, tmp_path)


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
