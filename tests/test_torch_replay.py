"""Small calls in eager PyTorch, from the third of a kind on: the operations that were recorded in the second."""

import importlib

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
