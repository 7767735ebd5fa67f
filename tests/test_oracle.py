"""The oracle is right: published values, exact values, identities, and numbers that do not come from unilabel."""

import math
import subprocess
import sys
from typing import Any

import pytest
from mpmath import mp, mpf
from unilabel.conformance import oracle
from unilabel.conformance.cases import LOSSES, MULTILABEL, SOFTMAX, Maker, nearest
from unilabel.conformance.tolerances import judge


def expected(loss, logits, targets, **options):
    return oracle.expected(Maker("test", "float64", 0).case(loss, logits, targets, **options))


def values(exact):
    return [float(number.value) for number in exact]


def test_imports_neither_unilabel_nor_a_framework():
    """The file runs alone, with nothing but its one import beside it."""
    code = """
import importlib.util, sys, types
package = types.ModuleType("alone"); package.__path__ = [sys.argv[1]]; sys.modules["alone"] = package
import importlib; importlib.import_module("alone.oracle")
print(*sorted({"unilabel", "numpy", "torch", "jax", "tensorflow"} & set(sys.modules)))
"""
    folder = oracle.__file__.removesuffix("oracle.py")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_published_values():
    """PyTorch's documentation prints 0.6745749... for its MultiLabelSoftMarginLoss of these."""
    logits, targets = [[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]], [[1, 0, 1], [0, 1, 0]]
    assert values(expected(MULTILABEL, logits, targets, reduction="mean").value)[0] == pytest.approx(
        0.6745749711990356, rel=2**-23
    )
    # log 2 and log(1 + e), from their digits in the OEIS: A002162, and A001113 for e
    assert values(expected(MULTILABEL, [0.0, 1.0], [1, 0], reduction="none").value) == [
        0.6931471805599453,
        1.3132616875182228,
    ]


def test_exact_rationals():
    """Probabilities 1/2, 1/4, 1/4 and their powers of two: gradients that are fractions."""
    half = float(mp.log(2))
    exact = expected(SOFTMAX, [[0.0, 0.0, 0.0, 0.0]], [1], reduction="none")
    assert values(exact.gradient_of_sum) == [0.25, -0.75, 0.25, 0.25]
    assert values(exact.value) == [2 * half]
    assert values(expected(MULTILABEL, [0.0], [0.25], reduction="none").gradient_of_sum) == [0.25]
    assert values(expected("nll", [[-1.0, -2.0]], [1], reduction="none").value) == [2.0]
    assert values(expected("cross_entropy", [[0.5, 0.5]], [[0.0, 1.0]]).gradient_of_sum) == [0.0, -2.0]
    assert values(expected("binary_cross_entropy", [0.25], [1], reduction="none").gradient_of_sum) == [-4.0]


def test_tails():
    """log(1 + exp -x) and -log softmax are exp -x, up to its square: also where 1 + exp -x rounds to 1."""
    for x in (17.0, 80.0, 700.0):
        tail = float(mp.exp(-mpf(x)))
        assert values(expected(MULTILABEL, [x], [1], reduction="none").value)[0] == pytest.approx(tail, rel=1e-7)
        exact = expected(SOFTMAX, [[x, 0.0]], [0], reduction="none")
        assert values(exact.value)[0] == pytest.approx(tail, rel=1e-7)
        assert values(exact.gradient_of_sum) == [pytest.approx(-tail, rel=1e-7), pytest.approx(tail, rel=1e-7)]


def test_limits():
    inf, nan = math.inf, math.nan
    assert values(expected(MULTILABEL, [inf, -inf, inf], [1, 0, 0], reduction="none").value) == [0.0, 0.0, inf]
    assert values(expected(MULTILABEL, [inf, -inf, inf], [1, 0, 0], reduction="none").gradient_of_sum) == [
        0.0,
        0.0,
        1.0,
    ]
    assert values(expected(SOFTMAX, [[inf, 0.0], [0.0, -inf]], [0, 0], reduction="none").value) == [0.0, 0.0]
    assert all(
        math.isnan(v) for v in values(expected(SOFTMAX, [[nan, 0.0], [-inf, -inf]], [0, 0], reduction="none").value)
    )
    assert all(math.isnan(v) for v in values(expected(SOFTMAX, [[0.0, 0.0]], [2], reduction="none").gradient_of_sum))


def test_gradient_is_the_derivative_of_the_value():
    """Central differences at 200 bits, for every loss with every option at once."""
    make, h = Maker("test", "float64", 0), mpf(2) ** -60
    weights = {"where": make.chosen((2, 3), True, True, False), "label_smoothing": 0.1}
    cases: list[Any] = [
        (MULTILABEL, [[0, 1, 1], [1, 0, 0]], weights | {"weight": [0.5, 2.0, 3.0], "pos_weight": 7.0}),
        (SOFTMAX, [1, 2], {"weight": [0.5, 2.0, 3.0], "sample_weight": [0.25, 4.0], "label_smoothing": 0.1}),
        (SOFTMAX, [[0.5, 0.25, 0.25], [0.1, 0.1, 0.2]], weights),
        ("binary_cross_entropy", [[0, 1, 1], [1, 0, 0]], weights),
        ("cross_entropy", [1, 2], {"weight": [0.5, 2.0, 3.0]}),
        ("nll", [1, 2], {"weight": [0.5, 2.0, 3.0]}),
    ]
    logits = [0.5, 0.25, 0.75, 0.125, 0.625, 0.375]
    with mp.workprec(oracle.BITS):
        for loss, targets, options in cases:
            case = make.case(loss, [logits[:3], logits[3:]], targets, **options)
            exact = oracle.expected(case)
            for i in range(6):

                def at(x, case=case, i=i):
                    moved = case.logits._replace(values=[*logits[:i], x, *logits[i + 1 :]])
                    return oracle.expected(case._replace(logits=moved)).value[0].value

                derivative = (at(logits[i] + h) - at(logits[i] - h)) / (2 * h)
                assert abs(derivative - exact.gradient_of_sum[i].value) < mpf(2) ** -100
                assert exact.gradient[i].value == exact.gradient_of_sum[i].value * case.cotangent.values[0]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (MULTILABEL, {"pos_weight": 7.0, "weight": [0.5, 2.0, 3.0], "label_smoothing": 0.1}),
        (SOFTMAX, {"weight": [0.5, 2.0, 3.0], "sample_weight": [2.0, 5.0], "label_smoothing": 0.1}),
        (SOFTMAX, {"weight": [0.5, 2.0, 3.0], "where": [[True, True, False], [True, True, True]]}),
        (SOFTMAX, {"weight": [0.5, 2.0, 3.0], "reduction": "batchmean"}),
        ("binary_cross_entropy", {"where": [True, False, True], "reduction": "mean"}),
        ("cross_entropy", {"weight": [0.5, 2.0, 3.0], "reduction": "sum"}),
        ("nll", {"weight": [0.5, 2.0, 3.0]}),
    ],
)
def test_gradient_by_targets_is_the_derivative_of_the_value(loss, options):
    h = mpf(2) ** -60
    targets = [0.5, 0.25, 0.75, 0.125, 0.625, 0.375]
    logits = [[0.5, 0.25, 0.75], [0.125, 0.625, 0.375]]
    with mp.workprec(oracle.BITS):
        case = Maker("test", "float64", 0).case(loss, logits, [targets[:3], targets[3:]], **options)
        exact = oracle.expected(case)
        for i in range(6):

            def at(z, i=i):
                moved = case.targets._replace(values=[*targets[:i], z, *targets[i + 1 :]])
                return oracle.expected(case._replace(targets=moved)).value[0].value * case.cotangent.values[0]

            derivative = (at(targets[i] + h) - at(targets[i] - h)) / (2 * h)
            assert abs(derivative - exact.target_gradient[i].value) < mpf(2) ** -100


def test_a_case_is_judged_in_ulp_of_its_dtype():
    case = Maker("test", "float32", 0).case(MULTILABEL, [1.0], [0], reduction="none")
    exact = oracle.expected(case)
    right = nearest(float(exact.value[0].value), "float32")
    of_sum = nearest(float(exact.gradient_of_sum[0].value), "float32")
    gradient = {"autodiff": [(of_sum * case.cotangent.values[0]).hex()], "value_and_grad": [of_sum.hex()]}
    for off, failed in [(0, False), (3, False), (6, True), (-6, True)]:
        value = {"the loss": [(right + off * 2.0**-23).hex()], "value_and_grad": [right.hex()]}  # the ULP at 1.3
        verdict = judge(case, exact, {"value": value, "gradient": gradient}, "numpy")["value"]
        assert verdict.failed == failed
        assert abs(verdict.ulp - abs(off)) <= 0.5


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf, -1e-12])
def test_no_digit_is_excused(wrong):
    """0 for a small normal number, NaN, infinity and a wrong sign are failures however small the right number is."""
    case = Maker("test", "float32", 0).case(MULTILABEL, [-20.0], [0], reduction="none")
    exact = oracle.expected(case)
    for backend in ("numpy", "torch", "jax", "tensorflow"):
        assert judge(case, exact, {"value": {"the loss": [wrong.hex()]}}, backend)["value"].failed


def test_hessian_is_the_derivative_of_the_gradient():
    make, h = Maker("test", "float64", 0), mpf(2) ** -60
    cases = [
        (MULTILABEL, [[0, 1, 1], [1, 0, 0]], {"pos_weight": 7.0, "label_smoothing": 0.1}),
        (SOFTMAX, [1, 2], {"weight": [0.5, 2.0, 3.0], "where": [[True, True, False], [True, True, True]]}),
        (SOFTMAX, [[0.5, 0.25, 0.25], [0.1, 0.1, 0.2]], {}),
        ("binary_cross_entropy", [[0, 1, 1], [1, 0, 0]], {}),
        ("cross_entropy", [1, 2], {"weight": [0.5, 2.0, 3.0]}),
        ("nll", [1, 2], {}),
    ]
    logits = [0.5, 0.25, 0.75, 0.125, 0.625, 0.375]
    with mp.workprec(oracle.BITS):
        for loss, targets, options in cases:
            case = make.case(loss, [logits[:3], logits[3:]], targets, reduction="sum", **options)
            exact = oracle.expected(case)
            for i in range(6):

                def at(x, case=case, i=i):
                    moved = case.logits._replace(values=[*logits[:i], x, *logits[i + 1 :]])
                    return oracle.expected(case._replace(logits=moved)).gradient_of_sum[i].value

                derivative = (at(logits[i] + h) - at(logits[i] - h)) / (2 * h)
                assert abs(derivative - exact.hessian[i].value) < mpf(2) ** -100


def test_the_table_of_losses_is_unilabels():
    """The suite has its own table, as the oracle shares nothing with the code that it judges."""
    from unilabel.losses import FORMULAS

    takes = {"logits": "logits", "probs": "probabilities", "log_probs": "log-probabilities"}
    table = {loss.name: (loss.per_example, takes[loss.takes]) for loss in FORMULAS.values()}
    assert table == {name: tuple(loss) for name, loss in LOSSES.items()}
