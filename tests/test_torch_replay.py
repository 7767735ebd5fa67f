"""Small calls in eager PyTorch, from the third of a kind on: the operations that were recorded in the second."""

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import asked_for
from unilabel.conformance.cases import cases
from unilabel.conformance.oracle import expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.worker import answer

import unilabel as ul

CASES = [case for case in cases(("float32", "bfloat16"), 0) if len(case.logits.values) < 1000]


@pytest.fixture
def programs(request, monkeypatch):
    asked_for("torch", request)
    module = importlib.import_module("unilabel.backends.torch_replay")
    monkeypatch.setattr(module, "_programs", found := {})
    return found


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.full)])
def test_every_case(step, programs, request):
    """Many have the same shapes and options, and so the same recording, but other values."""
    backend = asked_for("torch", request)
    for case in CASES[::step]:
        for _ in range(2):
            answer(backend, "cpu", case)
        numbers = answer(backend, "cpu", case)["numbers"]
        for what, verdict in judge(case, expected(case), numbers, "torch").items():
            assert not verdict.failed, f"{case.id}, {what}: {verdict}"
    assert all(program is not False for program in programs.values())
    assert {key[0].__name__ for key, program in programs.items() if callable(program)} >= {
        "value",
        "value_and_gradient",
        "gradient_and_hessian",
        "linear",
    }


def test_an_array_in_two_places(programs, request):
    """And then others: each operation takes its own."""
    asked_for("torch", request)
    import torch

    torch.manual_seed(0)
    a, b, c, d = torch.rand(4, 6, 6).unbind()
    target = torch.arange(6)
    for x, y in ((a, a), (b, b), (c, c), (a, b), (b, c), (c, d), (d, d)):
        found = ul.linear_softmax_nll(x, y, target), ul.multilabel_logistic_loss(x, y)
        right = torch.nn.functional.cross_entropy(x @ y.T, target), (torch.nn.functional.softplus(x) - x * y).sum() / 6
        torch.testing.assert_close(found, right)


class Heads:
    """Calls of one shape, each with other values: a linear loss, and PyTorch's own of the logits."""

    def __init__(self, loss, reduction):
        import torch

        self.loss, self.reduction, self.torch = loss, reduction, torch
        self.new = torch.Generator().manual_seed(0)

    def inputs(self, strides="contiguous"):
        if strides == "transposed":
            return [self.rand(3, 5).t(), self.rand(3, 4).t(), self.rand(4, 2)[:, 0]]
        if strides == "expanded":
            return [self.rand(5, 1).expand(5, 3), self.rand(1, 3).expand(4, 3), self.rand(1).expand(4)]
        return [self.rand(5, 3), self.rand(4, 3), self.rand(4)]

    def rand(self, *shape):
        return self.torch.randn(shape, generator=self.new, dtype=self.torch.float64)

    def targets(self):
        if self.loss is ul.linear_softmax_nll:
            return self.torch.randint(0, 4, (5,), generator=self.new)
        return self.torch.rand(5, 4, generator=self.new, dtype=self.torch.float64)

    def value(self, inputs, targets):
        features, weight, *bias = inputs
        return self.loss(features, weight, targets, linear_bias=bias[0] if bias else None, reduction=self.reduction)

    def right(self, inputs, targets):
        functional = self.torch.nn.functional
        x = functional.linear(*inputs)
        if self.loss is ul.linear_softmax_nll:
            return functional.cross_entropy(x, targets, reduction=self.reduction)
        return functional.binary_cross_entropy_with_logits(x, targets, reduction=self.reduction)

    def check(self, differentiated, strides="contiguous", bias=True, twice=False):
        inputs, targets = self.inputs(strides)[: 3 if bias else 2], self.targets()
        found = []
        for of in (self.value, self.right):
            leaves = [x.detach().requires_grad_(d) for x, d in zip(inputs, differentiated, strict=False)]
            value = of(leaves, targets)
            found.append([value.detach()])
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if wanted:
                total = (value**2).sum()
                gradients = self.torch.autograd.grad(total, wanted, retain_graph=True, create_graph=twice)
                again = self.torch.autograd.grad(total, wanted, retain_graph=True)
                found[-1] += [*gradients, *again]
                if twice:
                    found[-1] += self.torch.autograd.grad(sum((g**2).sum() for g in gradients), wanted)
        self.torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


EACH_LINEAR = pytest.mark.parametrize("loss", [ul.linear_softmax_nll, ul.linear_multilabel_logistic_loss])


@EACH_LINEAR
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_calls(programs, request, loss, reduction):
    """Of one shape, but with other values, strides, derivatives and modes."""
    asked_for("torch", request)
    heads, torch = Heads(loss, reduction), importlib.import_module("torch")
    every = (True, True, True)
    for _ in range(4):
        for differentiated in (every, (True, False, False), (False, True, False), (False, False, True)):
            heads.check(differentiated)
        for strides in ("transposed", "expanded"):
            heads.check(every, strides)
        heads.check((True, True), bias=False)
        heads.check(every, twice=True)
        heads.check((False,) * 3)
        with torch.no_grad():
            heads.check((False,) * 3)
        with torch.inference_mode():
            heads.check((False,) * 3)
    recorded = {(key[0].__name__, callable(program)) for key, program in programs.items()}
    assert ("linear", True) in recorded
    assert ("linear", False) not in recorded


@EACH_LINEAR
def test_linear_calls_in_threads(programs, request, loss):
    """Which record and replay the same calls at the same time."""
    asked_for("torch", request)

    def call(number):
        heads = Heads(loss, "mean")
        heads.new.manual_seed(number)
        for _ in range(20):
            heads.check((True, True, True))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(16)))
    assert any(callable(program) for program in programs.values())


def test_what_looks_at_values(programs, request):
    """Such a formula runs each time, and one with an array of its own."""
    asked_for("torch", request)
    import torch
    from unilabel.backends.torch_replay import replayed

    from unilabel.formulas import Operands, Options
    from unilabel.losses import FORMULAS

    loss, own = FORMULAS[ul.softmax_nll], []

    def chooses(xp, loss, options, x, operands):
        return x * 2 if x.sum() > 0 else x * 3

    def multiplies(xp, loss, options, x, operands):
        return x * x.sum().item()

    def stores(xp, loss, options, x, operands):
        x = x * 1
        x[0] = 7
        return x

    def adds(xp, loss, options, x, operands):
        return x + own[-1]

    for formula in (chooses, multiplies, stores, adds):
        for number in (1.0, -1.0, 2.0, -2.0):
            call = formula, None, loss, Options("none"), torch.full((3,), number), Operands(None)
            own.append(torch.full((3,), number))
            torch.testing.assert_close(replayed(*call), formula(*call[1:]), rtol=0, atol=0)
    assert list(programs.values()) == [False] * 4


def test_shapes_that_never_come_again(programs, request):
    asked_for("torch", request)
    import torch

    for n in range(1, 1200):
        ul.softmax_nll(torch.zeros(1, n), torch.zeros(1, dtype=torch.int64))
    assert 0 < len(programs) <= 1000
