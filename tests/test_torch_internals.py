"""PyTorch's private names: the right numbers without each of them."""

import numpy as np
import pytest
import torch
from crossed import close
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, grad
from torch.overrides import TorchFunctionMode
from unilabel.backends import torch as backend
from unilabel.backends import torch_modes as modes
from unilabel.backends.torch_internals import Internals, find

import unilabel as ul
import unilabel.backend


def names():
    """All that are looked up, as the file itself does it."""
    seen = []
    Internals(lambda name: seen.append(name) or find(name)).compiler()
    return seen


def without(name):
    return Internals(lambda other: None if other == name else find(other))


def test_names_are_there():
    """Of this version of PyTorch, so that nothing is slower than it need be. One that is gone is to be replaced."""
    assert [name for name in names() if find(name) is None] == []


@pytest.mark.full
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sample", ["softmax_nll", "multilabel_logistic_loss"], indirect=True)
def test_without_a_name(name, sample, monkeypatch):
    for attribute, found in vars(without(name)).items():  # several files have the object
        monkeypatch.setattr(modes.internals, attribute, found)
    x, targets = torch.tensor(sample.x, requires_grad=True), torch.tensor(sample.targets)
    cotangent, tangent = torch.tensor(sample.cotangent), torch.ones_like(x).detach()

    def loss(x):
        return sample(x, targets)

    def total(x):
        return loss(x).sum()

    value = loss(x)
    check(value, sample.value)
    check(grad(value, x, cotangent, retain_graph=True)[0], sample.pulled_back)
    both = torch.stack([cotangent, 2 * cotangent])
    (pulled,) = grad(value, x, both, is_grads_batched=True)
    check(pulled[1], sample.pulled_back.scaled(2))
    check(torch.func.grad(total)(x.detach()), sample.gradient)
    check(torch.vmap(loss)(torch.stack([x.detach()] * 2))[1], sample.value)
    sample.check_hessian(torch.func.hessian(total)(x.detach()))
    with forward_ad.dual_level():
        change = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), tangent))).tangent
    np.testing.assert_allclose(change.sum(), np.sum(sample.gradient), rtol=1e-13, atol=1e-14)
    (gradient,) = grad(total(x), x, create_graph=True)
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    second = torch.stack([grad(gradient, x, unit, retain_graph=True)[0] for unit in units])
    sample.check_hessian(second.reshape(*x.shape, *x.shape))
    value, gradient = ul.value_and_grad(sample.loss)(x.detach(), targets, reduction="none")
    check(value, sample.value)
    check(gradient, sample.gradient)
    torch.compiler.reset()
    for compiler in ("aot_eager", "eager"):
        compiled = torch.compile(loss, backend=compiler, fullgraph=True)
        check(grad(compiled(x), x, cotangent)[0], sample.pulled_back)
    with Negated():
        check(torch.relu(x), -np.maximum(sample.x, 0))  # the mode is at work
        check(loss(x), sample.value)
    mode = FakeTensorMode()
    fake = mode.from_tensor(x.detach())
    with mode:
        assert sample(fake).shape == sample.value.shape
    with torch.device("cpu"):
        check(loss(x), sample.value)


class Negated(TorchFunctionMode):
    """Changes a function that no loss calls."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return -function(*args, **kwargs or {}) if function is torch.relu else function(*args, **kwargs or {})


def check(got, right):
    close(got.detach(), right)


def test_dynamo_looks_into_no_formula(sample):
    """Its graph has one node for the loss: of what it looks into, each call would check that it is still the same."""
    seen = []

    def aot_and_look(graph, inputs):
        seen.extend({node.target for node in graph.graph.nodes if node.op == "call_function"} - {getattr})
        return lookup_backend("aot_eager")(graph, inputs)

    x = torch.tensor(sample.x, requires_grad=True)
    compiled = torch.compile(sample, backend=aot_and_look, fullgraph=True)
    check(compiled(x, torch.tensor(sample.targets)), sample.value)
    assert seen == [backend._in_graph]
    torch.compiler.reset()


@pytest.mark.full
def test_marks_for_the_compiler(sample):
    """What `torch.compiler.assume_constant_result` sets; without it, once a tensor was seen, the same numbers."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    functions = [unilabel.backend._name_of, backend._load, modes.is_transformed, modes.goes_to_aot_autograd]
    for function in functions:
        assert marked.__dict__.items() <= function.__dict__.items()
    x = torch.tensor(sample.x)
    marks = [function.__dict__.copy() for function in functions]
    try:
        for function in functions:
            function.__dict__.clear()
        torch.compiler.reset()
        check(torch.compile(sample, backend="aot_eager")(x), sample.value)
    finally:
        for function, mark in zip(functions, marks, strict=True):
            function.__dict__.update(mark)
        torch.compiler.reset()
