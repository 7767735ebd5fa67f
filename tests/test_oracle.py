"""The oracle is right: published values, exact values, identities, and numbers that do not come from unilabel."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf
from unilabel.conformance import oracle
from unilabel.conformance.cases import (
    DTYPES,
    LINEAR_MULTILABEL,
    LINEAR_SOFTMAX,
    LOSSES,
    MULTILABEL,
    SOFTMAX,
    Maker,
    cases,
    nearest,
)
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
    from unilabel.linear import LINEAR
    from unilabel.losses import FORMULAS

    takes = {"logits": "logits", "probs": "probabilities", "log_probs": "log-probabilities"}
    table = {loss.name: (loss.per_example, takes[loss.takes], "") for loss in FORMULAS.values()}
    table |= {function.__name__: (loss.per_example, "features", loss.name) for function, loss in LINEAR.items()}
    assert table == {name: tuple(loss) for name, loss in LOSSES.items()}


# --- The last linear layer --------------------------------------------------------------------------------------------

LAYER: dict[str, Any] = {"linear_weight": [[0.3, -1.7], [0.9, 0.2], [-0.6, 1.1]], "linear_bias": [0.7, -0.4, 0.1]}
FEATURES = [[0.8, 1.3], [-1.1, 0.6]]


def test_linear_losses_are_those_of_the_logits():
    """Of logits that are exact, and of which the gradient is known: 1/2, 1/4, 1/4, and their sums."""
    layer: dict[str, Any] = {"linear_weight": [[1.0, 0.0], [0.0, 2.0], [4.0, 0.0]], "linear_bias": [0.0, 0.5, 0.0]}
    made = expected(LINEAR_SOFTMAX, [[0.0, 0.25], [0.0, -0.25]], [1, 0], **layer, reduction="none")
    logits = expected(SOFTMAX, [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [1, 0], reduction="none")
    assert values(made.value) == values(logits.value)
    assert values(made.target_gradient) == values(made.hessian) == []
    (a, b, c), (d, e, f) = values(logits.gradient_of_sum)[:3], values(logits.gradient_of_sum)[3:]
    assert values(made.gradient_of_sum) == pytest.approx([a + 4 * c, 2 * b, d + 4 * f, 2 * e], rel=1e-15)
    assert values(made.linear_bias_gradient_of_sum) == pytest.approx([a + d, b + e, c + f], rel=1e-15)
    of_weight = [0, (a - d) / 4, 0, (b - e) / 4, 0, (c - f) / 4]
    assert values(made.linear_weight_gradient_of_sum) == pytest.approx(of_weight, rel=1e-15)


@pytest.mark.parametrize(
    ("loss", "targets", "options"),
    [
        (LINEAR_MULTILABEL, [[0, 1, 1], [1, 0, 0]], {"pos_weight": 7.0, "where": [[True, True, False], [True] * 3]}),
        (LINEAR_MULTILABEL, [[0.5, 1.0, 0.25], [1.0, 0.0, 0.5]], {"reduction": "none", "label_smoothing": 0.1}),
        (LINEAR_SOFTMAX, [1, 2], {"weight": [0.5, 2.0, 3.0], "sample_weight": [0.25, 4.0], "label_smoothing": 0.1}),
        (LINEAR_SOFTMAX, [[0.5, 0.25, 0.25], [0.1, 0.1, 0.2]], {"reduction": "none"}),
    ],
)
def test_gradients_of_a_linear_layer_are_derivatives_of_the_value(loss, targets, options):
    make, h = Maker("test", "float64", 0), mpf(2) ** -60
    case = make.case(loss, FEATURES, targets, **LAYER, **options)
    exact = oracle.expected(case)

    def replaced(name, tensor):
        if name == "linear_bias":
            return case._replace(options=case.options | {name: tensor})
        return case._replace(**{{"features": "logits"}.get(name, name): tensor})

    names = {"features": "gradient", "linear_weight": "linear_weight_gradient", "linear_bias": "linear_bias_gradient"}
    with mp.workprec(oracle.BITS):
        for name, tensor in case.inputs.items():
            gradient, of_sum = getattr(exact, names[name]), getattr(exact, f"{names[name]}_of_sum")
            assert len(gradient) == len(of_sum) == len(tensor.values)
            for i, x in enumerate(tensor.values):

                def at(x, name=name, tensor=tensor, i=i):
                    moved = tensor._replace(values=[*tensor.values[:i], x, *tensor.values[i + 1 :]])
                    return [number.value for number in oracle.expected(replaced(name, moved)).value]

                derivatives = [(a - b) / (2 * h) for a, b in zip(at(x + h), at(x - h), strict=True)]
                assert abs(sum(derivatives) - of_sum[i].value) < mpf(2) ** -100
                pulled_back = sum(c * d for c, d in zip(case.cotangent.values, derivatives, strict=True))
                assert abs(pulled_back - gradient[i].value) < mpf(2) ** -100


def test_exact_logits_are_exact():
    """In float32, in which half precision is computed, in one order and another. Those of `linear_rounded` are not."""
    exact = set()
    for case in cases(tuple(DTYPES), 0):
        if case.linear_weight is None:
            continue
        wide = {name: np.array(tensor.values, "float64").reshape(tensor.shape) for name, tensor in case.inputs.items()}
        f, w, b = wide["features"], wide["linear_weight"], wide.get("linear_bias", np.zeros(case.shape[-1]))
        dtype = "float64" if case.dtype == "float64" else "float32"
        terms = np.append(f[..., None, :] * w, np.broadcast_to(b[:, None], (*case.shape, 1)), axis=-1)
        right = terms.astype("longdouble").sum(-1)
        products = f[..., None, :].astype(dtype) * w.astype(dtype)
        narrow = np.append(products, np.broadcast_to(b.astype(dtype)[:, None], (*case.shape, 1)), axis=-1)
        sums = [np.cumsum(order, -1, dtype=dtype)[..., -1] for order in (narrow, narrow[..., ::-1])]
        if all(np.array_equal(x, right, equal_nan=True) for x in sums):
            exact.add((case.family, case.dtype))
        else:
            assert case.family == "linear_rounded", case.id
    assert {family for family, _ in exact} >= {"linear", "linear_limits", "linear_blocks"}
    assert ("linear_rounded", "float32") not in exact


def test_rounded_products_are_within_their_bound():
    """Of random ones, in several orders; and some come close enough to show that the bound says something."""
    rng, closest = np.random.default_rng(20261126), 0.0
    for _ in range(300):
        x, y = rng.normal(size=(2, 6)).astype("float32")
        terms = [mpf(float(a)) * mpf(float(b)) for a, b in zip(x, y, strict=True)]
        with mp.workprec(oracle.BITS):
            allowed = float(oracle._rounding(terms, 24)) * 2.0**-23
            right = mp.fsum(terms)
            for order in (slice(None), slice(None, None, -1), rng.permutation(6)):
                off = abs(float(mpf(float(np.cumsum((x * y)[order], dtype="float32")[-1])) - right))
                assert off <= allowed
                closest = max(closest, off / allowed)
    assert closest > 0.1
    assert oracle._rounding([mpf(3), mpf(0.25), mpf(0)], 24) == 0
    assert oracle._rounding([mpf(2) ** 30, mpf(1)], 24) > 0


def test_indices_of_labels_are_their_dense_targets():
    """In any order, one twice, none; along the class axis, wherever it is. A wrong one makes its example NaN."""
    logits, sparse = [[0.5, -1.0, 2.0], [0.0, 1.0, -0.5], [1.0, 1.0, 1.0]], [[2, 0, -1], [1, 1, 1], [-1, -1, -1]]
    dense = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    right = expected(MULTILABEL, logits, dense, reduction="none")
    got = expected(MULTILABEL, logits, sparse, positives=True, reduction="none")
    assert got == right
    columns = [list(column) for column in zip(*logits, strict=True)]
    got = expected(MULTILABEL, columns, sparse, positives=True, axis=0)
    assert got.value == expected(MULTILABEL, columns, [list(c) for c in zip(*dense, strict=True)], axis=0).value
    layer = LAYER | {"reduction": "none"}
    made = expected(LINEAR_MULTILABEL, FEATURES, sparse[:2], positives=True, **layer)
    assert made == expected(LINEAR_MULTILABEL, FEATURES, dense[:2], **layer)
    for wrong in (3, -2, -100):
        found = expected(MULTILABEL, logits[:2], [[0, wrong], [1, -1]], positives=True, reduction="none").value
        assert [math.isnan(value) for value in values(found)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("quantity", ["gradient", "linear_weight_gradient", "linear_bias_gradient"])
def test_gradients_of_a_linear_layer_are_judged_in_units_of_their_terms(quantity):
    """Three examples, two classes: 1 ULP and K + 2 + n/2 epsilons, K = 5 + 1 in PyTorch's row."""
    features, layer = [[1.0], [1.0], [1.0]], {"linear_weight": [[1.0], [0.5]], "linear_bias": [0.25, 0.5]}
    case = Maker("test", "float32", 0).case(LINEAR_SOFTMAX, features, [0, 0, 1], **layer, reduction="sum")
    exact = oracle.expected(case)
    answers, n = getattr(exact, f"{quantity}_of_sum"), 2 if quantity == "gradient" else 3
    with mp.workprec(oracle.BITS):
        limit = (6 + 1 + 2 + n / 2 + answers[0].shift) * answers[0].terms * 2.0**-23
        step = mp.ldexp(1, int(mp.floor(mp.log(answers[0].terms, 2))) - 23)
        for off, failed in [(0, False), (0.9, False), (1.1, True), (-1.1, True)]:
            got = [float(x.value + (off * (limit + step) if i == 0 else 0)).hex() for i, x in enumerate(answers)]
            assert judge(case, exact, {quantity: {"value_and_grad": got}}, "torch")[quantity].failed == failed
