"""TensorFlow: its tapes, functions, loops, devices, saved models and Keras' fit, on these losses as on its own."""

import importlib
import math
import os
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported

import keras
import numpy as np
import pytest
import tensorflow as tf
from crossed import ELEMENTWISE, LOSSES, Exact, close, tensor
from mpmath import mp
from tensorflow.python.eager import context
from unilabel.conformance.cases import Maker
from unilabel.conformance.oracle import expected

import unilabel as ul
from unilabel.layers.keras import MultilabelLogisticLoss, SoftmaxNLL

UNREDUCED = {"reduction": "none"}
defaults = pytest.mark.parametrize("sample", LOSSES, indirect=True)
either_way = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])


@pytest.fixture
def sample(sample):
    """With operands that are tensors."""
    return sample.beside(tf.constant)


def operands(sample):
    """All arrays of a call: the logits, the targets, the other operands by name, the cotangent."""
    return tf.constant(sample.x), tf.constant(sample.targets), sample.arrays, tf.constant(sample.cotangent)


def pulled_back(function, x, cotangent):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value, tape.gradient(value, x, cotangent)


def answers(sample):
    """All that a loss has to give, as a function of its `operands`, for a tf.function to trace once."""

    def run(x, targets, arrays, cotangent):
        pulled = pulled_back(lambda x: sample(x, targets, **arrays), x, cotangent)
        closed = sample.closed(ul.value_and_grad)(x, targets, **arrays)
        of_sum = sample.closed(ul.grad_and_hess)(x, targets, **arrays, reduction="sum")
        return *pulled, *closed, *of_sum

    return run


def right(sample):
    """What `answers` must give."""
    divided = np.abs(sample.gradient).max() / np.abs(sample.gradient_of_sum).max()
    hessian = sample.hessian.scaled(1 / divided)
    return sample.value, sample.pulled_back, sample.value, sample.gradient, sample.gradient_of_sum, hessian


def check(got, numbers, **how):
    assert tf.is_tensor(got)
    assert got.dtype == tf.float64
    close(got, numbers, **how)


def check_all(results, sample):
    for got, numbers in zip(results, right(sample), strict=True):
        check(got, numbers)


def check_pulled(results, sample):
    value, gradient = results
    check(value, sample.value)
    check(gradient, sample.pulled_back)


def gradient_of_sum(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


def answer(name, x, targets, **options):
    """The oracle's losses, their sum's gradient and its Hessian diagonal."""
    maker = Maker("transforms", "float64", 0)
    found = expected(maker.case(name, x, targets, **{"reduction": "none"} | options))
    value, gradient, hessian = (
        np.array([float(number.value) for number in numbers])
        for numbers in (found.value, found.gradient_of_sum, found.hessian)
    )
    return value, gradient.reshape(np.shape(x)), hessian.reshape(np.shape(x))


def diagonal(hessian):
    return np.einsum("ncnc->nc", hessian)


def units(shape):
    """The directions of the elements, one after the other."""
    return [tf.constant(e.reshape(shape)) for e in np.eye(math.prod(shape))]


def traced(function, **how):
    return tf.function(function, autograph=False, **how)


# --- Tapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.capability("tensorflow", "GradientTape, value_and_grad, grad_and_hess", pairs=True)
def test_gradient_tape(sample):
    check_all(answers(sample)(*operands(sample)), sample)


@pytest.mark.capability("tensorflow", "calls that come again, which are compiled", brief=True)
def test_repeated_calls(sample):
    for _ in range(5):
        results = answers(sample)(*operands(sample))
    check_all(results, sample)


@pytest.mark.capability("tensorflow", "tf.Variable as the logits")
def test_variable(sample):
    x = tf.Variable(sample.x)
    with tf.GradientTape() as tape:  # watches variables by itself
        value = sample(x)
    check_pulled((value, tape.gradient(value, x, tf.constant(sample.cotangent))), sample)
    check(sample.closed(ul.value_and_grad)(x)[1], sample.gradient)


@pytest.mark.capability("tensorflow", "persistent GradientTape")
def test_persistent_tape(sample):
    x, _, _, cotangent = operands(sample)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        value = sample(x)
        total = tf.reduce_sum(value)
    for _ in range(2):
        check_pulled((value, tape.gradient(value, x, cotangent)), sample)
    check(tape.gradient(total, x), sample.gradient)


@pytest.mark.capability("tensorflow", "GradientTape.jacobian", brief=True)
def test_jacobian(sample):
    x = tf.constant(sample.x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = sample(x)
    check(tape.jacobian(value, x), sample.jacobian)


@pytest.mark.capability("tensorflow", "nested tapes, jacobian", brief=True)
@pytest.mark.parametrize("compiled", [False, True])
def test_nested_tapes(sample, compiled):
    def hessian(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            gradient = gradient_of_sum(sample, x)
        return gradient, outer.jacobian(gradient, x, unconnected_gradients="zero")

    gradient, second = (traced(hessian) if compiled else hessian)(tf.constant(sample.x))
    check(gradient, sample.gradient)
    sample.check_hessian(second)


@pytest.mark.capability("tensorflow", "batch_jacobian", brief=True)
@pytest.mark.parametrize("pfor", [True, False])
def test_batch_jacobian(sample, pfor):
    x = tf.constant(sample.x)
    with tf.GradientTape(persistent=not pfor) as tape:
        tape.watch(x)
        gradient = gradient_of_sum(sample, x)
    got = tape.batch_jacobian(gradient, x, unconnected_gradients="zero", experimental_use_pfor=pfor)
    full = np.zeros(sample.x.shape * 2)
    for i, block in enumerate(got.numpy()):
        full[(i, *[slice(None)] * (x.ndim - 1), i)] = block
    sample.check_hessian(full)


@defaults
@either_way
def test_cotangents_of_gathered_rows(sample, compiled):
    """They are tf.IndexedSlices. The fourth of equal eager calls is compiled, and takes tensors alone."""

    def gathered(x, **options):
        return tf.gather(sample(x, **options), [0, 2])

    def derivatives(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            gradient = gradient_of_sum(gathered, x)
            column = tf.gather(gradient, [0, 2])[:, 0]
        return gradient, outer.gradient(column, x, unconnected_gradients="zero")

    derivatives = traced(derivatives) if compiled else derivatives
    x, right = tf.constant(sample.x), np.zeros_like(sample.x)
    right[[0, 2]] = sample.gradient[[0, 2]]
    for _ in range(5):
        close(gradient_of_sum(gathered, x), right)
        gradient, second = derivatives(x)
        close(gradient, right)
        close(second.numpy()[[0, 2], 0], sample.hessian[[0, 2], 0])


def exact(sample, **arrays):
    """The oracle's answers to the same call with other operands."""
    given = {"x": sample.x, "targets": sample.dense, **sample.arrays} | arrays
    given = {name: tensor(np.asarray(array)) for name, array in given.items()}
    if "label_smoothing" in given:
        (given["label_smoothing"],) = given["label_smoothing"].values
    x, targets = given.pop("x"), given.pop("targets")
    case = Maker("given", "float64", 0).case(sample.name, x, targets, **sample.options, **given)
    return expected(case).value


def difference(up, down, like, share=1.0):
    """Between the oracle's numbers, whose digits do not cancel. `share`: of their terms, what may move."""
    with mp.workprec(200):
        found = np.array([float(a.value - b.value) for a, b in zip(up, down, strict=True)]).reshape(like.shape)
    right = found.view(Exact)
    right.terms = np.array([share * float(max(a.terms, b.terms)) for a, b in zip(up, down, strict=True)])
    right.terms = right.terms.reshape(like.shape)
    return right


def weighed(change, cotangent):
    """The product of a change of the value with the cotangent."""
    whole = np.asarray(np.vdot(change, cotangent)).view(Exact)
    whole.terms = np.vdot(change.terms, np.abs(cotangent))
    return whole


@pytest.mark.capability("tensorflow", "gradient by targets, weights and smoothing", brief=True)
def test_gradient_by_other_operands(sample):
    """As all of them move at once: by the oracle, over a very short step."""
    given = {"targets": sample.targets, **sample.arrays}
    given = {name: np.asarray(array) for name, array in given.items()}
    given = {name: array for name, array in given.items() if array.dtype == "float64"}
    drawn = np.random.default_rng(0)
    steps = {name: 2.0**-30 * drawn.choice([-3, -2, -1, 1, 2, 3], array.shape) for name, array in given.items()}
    above, below = ({name: array + way * steps[name] for name, array in given.items()} for way in (1, -1))
    moved = {name: above[name] - below[name] for name in given}
    tensors = {name: tf.constant(array) for name, array in given.items()}
    x = tf.constant(sample.x)
    with tf.GradientTape() as tape:
        tape.watch([x, *tensors.values()])
        value = sample(x, **tensors)
    by_x, by_given = tape.gradient(value, (x, tensors), tf.constant(sample.cotangent))
    check_pulled((value, by_x), sample)
    if given:
        share = sum(np.max(np.abs(moved[name] / given[name])) for name in given)
        change = difference(exact(sample, **above), exact(sample, **below), sample.value, share)
        products = np.concatenate([np.ravel(by_given[name] * moved[name]) for name in given])
        close(math.fsum(products), weighed(change, sample.cotangent), ulp=32)


@pytest.mark.capability("tensorflow", "learned label smoothing", fixed={"label_smoothing": "array"}, brief=True)
def test_label_smoothing(sample):
    """The loss is affine in it: the derivative is the loss with 1 less the loss with 0."""
    ends = [exact(sample, label_smoothing=end) for end in (1.0, 0.0)]
    derivative = weighed(difference(*ends, sample.value), sample.cotangent)
    x, cotangent = tf.constant(sample.x), tf.constant(sample.cotangent)

    def run(smoothing):
        return pulled_back(lambda smoothing: sample(x, label_smoothing=smoothing), smoothing, cotangent)

    smoothing = sample.arrays["label_smoothing"]
    for step in (run, traced(run), traced(run, jit_compile=True)):
        value, by_smoothing = step(smoothing)
        check(value, sample.value)
        check(by_smoothing, derivative)
    learned = tf.Variable(0.1, dtype=tf.float64)
    with tf.GradientTape() as tape:
        value = sample(x, label_smoothing=learned)
    check(tape.gradient(value, learned, cotangent), derivative)


@pytest.mark.parametrize("name", [ELEMENTWISE[0], pytest.param(ELEMENTWISE[1], marks=pytest.mark.full)])
def test_one_element(name):
    """Logits of no dimensions, as per-example gradients of a binary model have them: each reduction is the same."""
    each, z = {"multilabel_logistic_loss": [-2.0, 0.0, 17.0], "binary_cross_entropy": [0.1, 0.5, 0.9]}[name], [0, 1, 1]
    loss, (value, gradient, hessian) = getattr(ul, name), answer(name, each, z)

    def one(operands):
        x, z = operands
        found = list(ul.grad_and_hess(loss)(x, z))
        for reduction in ("none", "sum", "mean", "batchmean"):
            found += pulled_back(lambda x, reduction=reduction: loss(x, z, reduction=reduction), x, None)
            found += ul.value_and_grad(loss)(x, z, reduction=reduction)
        return found

    x, targets = tf.constant(each, tf.float64), tf.constant(z)
    mapped = [
        map(tf.stack, zip(*[step((x[i], targets[i])) for i in range(3)], strict=True))
        for step in (one, traced(one), traced(one, jit_compile=True))
    ]
    for results in (*mapped, tf.vectorized_map(one, (x, targets))):
        for got, numbers in zip(results, [gradient, hessian, *[value, gradient] * 8], strict=True):
            check(got, numbers)


@pytest.mark.capability("tensorflow", "recompute_grad", brief=True)
def test_recompute_grad(sample):
    x, _, _, cotangent = operands(sample)
    check_pulled(pulled_back(tf.recompute_grad(sample), x, cotangent), sample)


@pytest.mark.parametrize("compiled", [False, True])
def test_closed_forms_leave_nothing_on_a_tape(compiled):
    """They are not written to be differentiated: |x| has no derivative at 0."""

    def run(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            value, gradient = ul.value_and_grad(ul.multilabel_logistic_loss)(x, tf.constant([1.0]))
        assert tape.gradient(value, x) is None
        assert tape.gradient(gradient, x) is None
        return value

    (traced(run) if compiled else run)(tf.constant([0.0]))


# --- Forward mode -----------------------------------------------------------------------------------------------------


def forward(function, x, tangent):
    with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
        result = function(x)
    return accumulator.jvp(result, unconnected_gradients="zero")


@pytest.mark.capability("tensorflow", "ForwardAccumulator", brief=True)
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode(sample, compiled):
    def jvp(x, tangent):
        return forward(sample, x, tangent)

    jvp, step = (traced(jvp), 1) if compiled else (jvp, 5)
    x, size = tf.constant(sample.x), sample.x.size
    right = np.asarray(sample.jacobian).reshape(-1, size)[:, ::step].view(Exact)
    right.terms = sample.jacobian.terms.reshape(-1, size)[:, ::step]
    columns = [jvp(x, tangent) for tangent in units(x.shape)[::step]]
    close(np.reshape(columns, right.shape[::-1]).T, right)


@pytest.mark.capability("tensorflow", "forward over reverse", brief=True)
def test_forward_over_reverse(sample):
    x = tf.constant(sample.x)
    step = traced(lambda x, v: forward(lambda x: gradient_of_sum(sample, x), x, v))
    sample.check_hessian(np.reshape([step(x, v) for v in units(x.shape)], 2 * sample.x.shape))


@pytest.mark.capability("tensorflow", "reverse over forward", brief=True)
def test_reverse_over_forward(sample):
    """The products of one accumulator with a tape are added up in another order: hence the tolerance."""

    def step(x, v):
        with tf.GradientTape() as tape:
            tape.watch(x)
            derivative = forward(lambda x: tf.reduce_sum(sample(x)), x, v)
        return tape.gradient(derivative, x, unconnected_gradients="zero")

    x, step = tf.constant(sample.x), traced(step)
    second = np.reshape([step(x, v) for v in units(x.shape)], 2 * sample.x.shape)
    size = sample.x.size
    close(np.diag(second.reshape(size, size)).reshape(sample.x.shape), sample.hessian, ulp=64)


INFINITE = [
    ("multilabel_logistic_loss", [[np.inf, -np.inf, 0.5]], [[1, 0, 1]]),
    ("multilabel_logistic_loss", [[np.inf, -np.inf, 0.5]], [[0, 1, 0]]),
    ("softmax_nll", [[np.inf, 0.0, 1.0]], [0]),
    ("softmax_nll", [[np.inf, 0.0, 1.0]], [2]),
    ("softmax_nll", [[-np.inf, 0.0, 1.0]], [1]),
    ("softmax_nll", [[-np.inf, 0.0, 1.0]], [0]),
]


@either_way
@pytest.mark.parametrize(("name", "x", "targets"), INFINITE)
def test_forward_mode_at_infinity(name, x, targets, compiled):
    """No 0 · inf comes of the derivatives that nobody asked for."""
    _, gradient, _ = answer(name, x, targets)

    def jvp(x, tangent):
        return forward(lambda x: getattr(ul, name)(x, targets, reduction="sum"), x, tangent)

    jvp = traced(jvp) if compiled else jvp
    derivatives = [jvp(tf.constant(x, tf.float64), v) for v in units(np.shape(x))]
    close(np.reshape(derivatives, np.shape(x)), gradient)


def test_forward_mode_of_activations_at_infinity():
    x, v = tf.constant([[np.inf, -np.inf, 0.0]]), tf.ones((1, 3))
    assert forward(ul.sigmoid, x, v).numpy().tolist() == [[0, 0, 0.25]]
    assert forward(ul.log_sigmoid, x, v).numpy().tolist() == [[0, 1, 0.5]]
    assert forward(ul.softmax, x, v).numpy().tolist() == [[0, 0, 0]]


# --- Digits of the second derivatives ---------------------------------------------------------------------------------

CONFIDENT = [
    ([[60.0, 0.0]], [0]),
    ([[60.0, 0.0]], [1]),
    ([[60.0, 0.0]], [[0.25, 0.75]]),
    ([[60.0, 0.0, 59.0]], [1]),
    ([[0.0, 0.0, 37.0]], [2]),
    ([[0.0] * 40], [0]),  # nobody has much
]


def second_derivative(function, x):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = function(x)
        gradient = inner.gradient(value, x)
    return gradient, outer.jacobian(gradient, x)


@either_way
@pytest.mark.parametrize(("x", "targets"), CONFIDENT)
def test_second_derivatives_of_confident_logits(x, targets, compiled):
    *_, right = answer("softmax_nll", x, targets)
    twice = tf.function(second_derivative, autograph=False) if compiled else second_derivative
    _, hessian = twice(lambda x: ul.softmax_nll(x, targets, reduction="sum"), tf.constant(x, tf.float64))
    close(diagonal(hessian), right, ulp=64)
    np.testing.assert_allclose(hessian, np.einsum("ncmd->mdnc", hessian), rtol=64 * 2.0**-52, atol=0)


@pytest.mark.parametrize("c", [0, 1])
def test_mixed_derivative_of_confident_logits(c):
    """By the target of a class, then by the logits: the gradient of the loss of that class."""
    x, z = tf.constant([[60.0, 0.0]], tf.float64), tf.constant([[0.25, 0.75]], tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(z)
            loss = ul.softmax_nll(x, z, reduction="sum")
        by_target = inner.gradient(loss, z)[0, c]
    close(outer.gradient(by_target, x), answer("softmax_nll", [[60.0, 0.0]], [c])[1])


@pytest.mark.parametrize(("x", "y"), [(x, y) for x, y in CONFIDENT if np.ndim(y) == 1])
def test_log_softmax_keeps_the_digits_of_its_derivatives(x, y):
    """It is minus the loss, class by class."""
    _, gradient, hessian = answer("softmax_nll", x, y)
    by_tape = second_derivative(lambda x: -ul.log_softmax(x)[0, y[0]], tf.constant(x, tf.float64))
    close(by_tape[0], gradient, ulp=64)
    close(diagonal(by_tape[1]), hessian, ulp=64)


def test_softmax_keeps_the_digits_of_its_derivative():
    """p (1 - p) is the Hessian diagonal of the loss."""
    x = [[60.0, 0.0]]
    for c in (0, 1):
        *_, hessian = answer("softmax_nll", x, [c])
        array = tf.constant(x, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(array)
            p = ul.softmax(array)[0, c]
        close(tape.gradient(p, array)[0, c], hessian[0, c], ulp=64)


# --- tf.function ------------------------------------------------------------------------------------------------------


@pytest.mark.capability("tensorflow", "tf.function, of value_and_grad and grad_and_hess too", brief=True)
def test_function(sample):
    check_all(tf.function(answers(sample))(*operands(sample)), sample)


@pytest.mark.capability("tensorflow", "tf.function(jit_compile=True), the same", brief=True)
def test_jit_compile(sample):
    check_all(traced(answers(sample), jit_compile=True)(*operands(sample)), sample)


@pytest.mark.capability("tensorflow", "tf.function differentiated from outside", brief=True)
@pytest.mark.parametrize("jit", [False, True])
def test_tape_around_a_function(sample, jit):
    x, _, _, cotangent = operands(sample)
    check_pulled(pulled_back(traced(sample, jit_compile=jit), x, cotangent), sample)


def spec(array, shape):
    return tf.TensorSpec(shape, tf.as_dtype(array.dtype))


def check_lengths(sample, *others, jit=False):
    """One function for calls of several lengths, which are not known when it is traced."""
    calls = [operands(one.beside(tf.constant)) for one in (sample, *others)]

    def common(*arrays):
        lengths = [n if all(n == m for m in ns) else None for n, *ns in zip(*(a.shape for a in arrays), strict=True)]
        return spec(arrays[0], lengths)

    signature = tf.nest.map_structure(common, *calls)
    run = traced(answers(sample), input_signature=signature, jit_compile=jit)
    for arrays, one in zip(calls, (sample, *others), strict=True):
        check_all(run(*arrays), one)


@pytest.mark.capability("tensorflow", "unknown batch size", brief=True)
def test_unknown_batch_size(sample):
    check_lengths(sample, sample.of(rows=7))


@pytest.mark.capability("tensorflow", "unknown batch size and number of classes", brief=True)
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.full), True])
def test_unknown_shape(sample, jit):
    check_lengths(sample, sample.of(rows=7, classes=5), jit=jit)


@pytest.mark.capability("tensorflow", "unknown rank", fixed={"axis": "last"}, brief=True)
@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.full)])
def test_unknown_rank(sample, jit):
    """Of all arrays but those that have one rank only."""

    def unknown(name, array):
        known = {"label_smoothing": [], "weight": [None]} if sample.per_example else {"label_smoothing": []}
        return spec(array, known.get(name))

    x, targets, arrays, cotangent = operands(sample)
    specs = {name: unknown(name, array) for name, array in arrays.items()}
    signature = spec(x, None), spec(targets, None), specs, spec(cotangent, None)
    run = traced(answers(sample), input_signature=signature, jit_compile=jit)
    for one in (sample, sample.of(rows=7, classes=5)):
        check_all(run(*operands(one.beside(tf.constant))), one)


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("softmax_nll", [0], {"weight": np.ones(5)}),
        ("softmax_nll", [0], {"weight": np.ones(1), "label_smoothing": 0.1}),
        ("softmax_nll", [0], {"sample_weight": np.ones(5)}),
        ("softmax_nll", [0], {"where": np.ones((5, 3), bool)}),
        ("softmax_nll", [0, 2], {}),
        ("multilabel_logistic_loss", [[1, 0, 1]] * 2, {}),
        ("multilabel_logistic_loss", [[1, 0, 1]], {"weight": np.ones((5, 3))}),
        ("multilabel_logistic_loss", [[1, 0, 1]], {"pos_weight": np.ones((5, 3))}),
        ("multilabel_logistic_loss", [[1, 0, 1]], {"where": np.ones((5, 3), bool)}),
    ],
)
def test_wrong_lengths_are_found_when_it_runs(name, targets, options, jit):
    """Nothing broadcasts that would not if the lengths were known."""
    x, targets = np.zeros((1, 3)), np.array(targets)
    arrays = {"x": x, "targets": targets} | {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
    others = {k: v for k, v in options.items() if k not in arrays}

    def run(x, targets, **arrays):
        return getattr(ul, name)(x, targets, **arrays, **others)

    specs = {k: spec(v, [None] * v.ndim) for k, v in arrays.items()}
    step = traced(run, jit_compile=jit).get_concrete_function(**specs)
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(**{k: tf.constant(v) for k, v in arrays.items()})


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("name", "good"),
    [("targets", [0, 1]), ("targets", np.eye(2, 3)), ("sample_weight", [1.0, 2.0]), ("weight", [1.0, 2.0, 3.0])],
)
def test_unknown_lengths_beside_known_logits(name, good, jit):
    """One number is not that of all: graphs are rewritten where shapes are known, checks among them."""
    x, good = tf.constant(np.random.default_rng(0).normal(size=(2, 3))), tf.constant(good)

    def loss(x, array):
        return ul.softmax_nll(x, **{"targets": tf.constant([0, 1])} | {name: array})

    spec = tf.TensorSpec([None] * len(good.shape), good.dtype)
    run = traced(lambda array: loss(x, array), jit_compile=jit, input_signature=[spec])
    inner = traced(loss, jit_compile=jit, input_signature=[tf.TensorSpec([None, None], x.dtype), spec])
    outer = traced(lambda array: inner(x, array), input_signature=[spec])  # it knows more than what it calls
    for each in (run, outer):
        np.testing.assert_allclose(each(good), loss(x, good), rtol=1e-12)
        for bad in (good[:1], tf.concat([good, good], 0), tf.transpose(good)):
            if bad.shape != good.shape:
                with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
                    each(bad)


def test_accumulator_beside_unknown_lengths():
    """What the check of a length returns has tangents."""
    x, y = tf.constant(np.random.default_rng(0).normal(size=(2, 3))), tf.constant([0, 1])
    features, weight = x[:, :2], tf.ones((3, 2), x.dtype)
    for loss, array in (
        (lambda a: ul.softmax_nll(x, y, sample_weight=a), tf.constant([1.0, 2], x.dtype)),
        (lambda a: ul.softmax_nll(x, a), tf.nn.softmax(x)),
        (lambda a: ul.linear_softmax_nll(features, weight, y, linear_bias=a), tf.constant([3.0, 1, 2], x.dtype)),
    ):

        def along(array, loss=loss):
            with tf.autodiff.ForwardAccumulator(array, array) as accumulator:
                value = loss(array)
            return accumulator.jvp(value)

        run = traced(along).get_concrete_function(tf.TensorSpec([None] * len(array.shape), x.dtype))
        np.testing.assert_allclose(run(array), along(array), rtol=1e-12)


def test_unknown_rank_with_options():
    """What is given beside the logits broadcasts, or has to fit, as it does where the rank is known."""
    x = np.random.default_rng(0).normal(size=(2, 2, 3))
    z, y = (x > 0).astype("float64"), np.array([[0, 2], [1, -1]])
    where, weight, rows = [True, True, False], [0.5, 1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]]
    for loss, targets, options in (
        (ul.multilabel_logistic_loss, z, {"weight": weight, "pos_weight": 3.0, "where": where, "reduction": "mean"}),
        (
            ul.multilabel_logistic_loss,
            z,
            {"weight": [[[1.0], [2.0]]], "label_smoothing": 0.1, "reduction": "batchmean"},
        ),
        (ul.softmax_nll, y, {"weight": weight, "sample_weight": rows, "ignore_index": -1, "reduction": "mean"}),
        (ul.softmax_nll, z, {"where": where, "reduction": "batchmean"}),
        (ul.softmax_nll, y, {"reduction": "none", "ignore_index": -1}),
    ):
        unknown = tf.TensorSpec(None, tf.float64), tf.TensorSpec(None, tf.as_dtype(targets.dtype))
        run = ul.value_and_grad(loss)
        traced = tf.function(lambda x, z, run=run, options=options: run(x, z, **options), input_signature=unknown)
        value, right, _ = answer(loss.__name__, x.tolist(), targets.tolist(), **options)
        losses, gradient = traced(x, targets)
        close(losses, value.reshape(losses.shape))
        close(gradient, right, ulp=64)
        with pytest.raises(tf.errors.InvalidArgumentError):
            traced(x, targets.reshape(4, 1, *targets.shape[2:]))  # as many, but others


def test_unknown_rank_of_activations():
    x = np.random.default_rng(0).normal(size=(2, 2, 3))
    p, sigma = np.exp(x) / np.exp(x).sum(-1, keepdims=True), 1 / (1 + np.exp(-x))
    for activation, right in (
        (ul.sigmoid, sigma),
        (ul.log_sigmoid, np.log(sigma)),
        (ul.softmax, p),
        (ul.log_softmax, np.log(p)),
    ):
        close(tf.function(activation, input_signature=[tf.TensorSpec(None, tf.float64)])(x), right)


def test_unknown_rank_and_another_axis():
    spec = tf.TensorSpec(None, tf.float64)
    for call in (lambda x: ul.softmax_nll(x, x, axis=0), lambda x: ul.softmax(x, axis=(-2, -1))):
        with pytest.raises(
            ValueError, match=r"Expected axis: -1, as the rank .* is not known \(tf.ensure_shape sets it"
        ):
            tf.function(call, autograph=False).get_concrete_function(spec)
    known = tf.function(lambda x: ul.softmax(tf.ensure_shape(x, [None, None]), axis=0), input_signature=[spec])
    close(known(np.zeros((2, 2))), [[0.5, 0.5], [0.5, 0.5]])


def test_options_as_python_scalars_retrace_and_no_more():
    traces = []

    @tf.function
    def step(x, y, smoothing):
        traces.append(smoothing)
        return ul.softmax_nll(x, y, label_smoothing=smoothing)

    x, y = tf.zeros((2, 3)), tf.constant([0, 1])
    for smoothing in (0.0, 0.1, 0.0, 0.1, 0.1):
        step(x, y, smoothing)
    assert traces == [0.0, 0.1]


def test_no_more_than_a_thousand_calls_are_kept(monkeypatch):
    module = importlib.import_module("unilabel.backends.tensorflow")
    for limit in (module.LARGE, 1):
        monkeypatch.setattr(module, "LARGE", limit)
        monkeypatch.setattr(module, "_programs", dict.fromkeys(range(1000), 1))
        ul.softmax_nll(tf.zeros((2, 3)), tf.constant([0, 1]))
        assert len(module._programs) == 1


def test_eager_calls_leave_no_functions_behind():
    def calls(numbers):
        for i in numbers:
            x = tf.zeros((2 + i % 5, 3))
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = ul.softmax_nll(x, [0] * x.shape[0], label_smoothing=i / 1000)
            tape.gradient(loss, x)
            ul.value_and_grad(ul.softmax_nll)(x, [0] * x.shape[0], label_smoothing=i / 1000)
        return len(context.context().list_function_names())

    assert calls(range(3)) == calls(range(3, 20))


QUICK = [("float32", "eager"), ("float64", "function")]
ALL = [(dtype, way) for dtype in ("float32", "float64") for way in ("eager", "repeated", "function", "jit")]


@pytest.mark.parametrize(
    ("dtype", "way"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.full) for case in ALL]
)
def test_long_rows_keep_their_digits(dtype, way):
    """Sums of many equal numbers, whose rounding errors all have one sign. The bound is the conformance suite's."""
    n, eps, ulp = 20_000, 2.0 ** (-23 if dtype == "float32" else -52), 26
    rest, p = np.dtype(dtype).type(-0.3), np.dtype(dtype).type(0.4)
    x = np.full(n, rest)
    x[0] = 0
    with mp.workprec(200):
        e, log_p, smoothing = mp.exp(mp.mpf(float(rest))), mp.log(mp.mpf(float(p))), mp.mpf(0.1)
        log_sum = mp.log(1 + (n - 1) * e)
        rights = [
            (ul.softmax_nll, x, 0, log_sum + smoothing / n * (n - 1) * -mp.mpf(float(rest)), {"label_smoothing": 0.1}),
            (ul.softmax_nll, x, 0, log_sum, {}),
            (ul.cross_entropy, np.full(n, p), 0, -log_p, {"label_smoothing": 0.1}),
            (ul.nll, x + rest, 0, -rest - smoothing / n * (n - 1) * mp.mpf(float(rest)), {"label_smoothing": 0.1}),
            (
                ul.multilabel_logistic_loss,
                np.full(n, rest),
                np.zeros(n, "int64"),
                n * mp.log1p(e),
                {"reduction": "sum"},
            ),
        ]
        gradient = (1 - smoothing) + smoothing / n
        gradients = [(1 / (1 + (n - 1) * e) - gradient, gradient), (1 / (1 + (n - 1) * e) - 1, 1)]
        rights = [(*found[:3], float(found[3]), found[4]) for found in rights]
        gradients = [(float(a), float(b)) for a, b in gradients]
    for i, (loss, logits, targets, right, options) in enumerate(rights):

        def both(x, loss=loss, targets=targets, options=options):
            return pulled_back(lambda x: loss(x, targets, **options), x, None)

        step = {"function": traced(both), "jit": traced(both, jit_compile=True)}.get(way, both)
        for _ in range(5 if way == "repeated" else 1):
            value, by_x = step(tf.constant(logits))
        assert abs(float(value) - right) <= ulp * eps * abs(right)
        if i < len(gradients):
            assert abs(float(by_x[0]) - gradients[i][0]) <= ulp * eps * gradients[i][1]


# --- Loops, maps and data ---------------------------------------------------------------------------------------------


def of_examples(sample):
    """The names of the operands that have a row for each example."""
    where = sample.arrays.get("where")
    return {"sample_weight", "pos_weight"} & sample.arrays.keys() | (
        {"where"} if where is not None and len(where) > 1 else set()
    )


def example_by_example(sample, map_over):
    """The answers, an example at a time."""
    x, targets, arrays, cotangent = operands(sample)
    each = {name: arrays[name] for name in of_examples(sample)}

    def one(elements):
        x, targets, arrays, cotangent = tf.nest.map_structure(lambda array: array[None], elements)
        return [result[0] for result in answers(sample)(x, targets, arrays, cotangent)]

    specs = [tf.TensorSpec(numbers.shape[1:], tf.float64) for numbers in right(sample)]
    return map_over(one, (x, targets, each, cotangent), specs)


@pytest.mark.capability("tensorflow", "vectorized_map", fixed=UNREDUCED, brief=True)
def test_vectorized_map(sample):
    check_all(example_by_example(sample, lambda one, elems, _: tf.vectorized_map(one, elems)), sample)


@pytest.mark.capability("tensorflow", "map_fn", fixed=UNREDUCED, brief=True)
def test_map_fn(sample):
    mapped = example_by_example(sample, lambda one, elems, specs: tf.map_fn(one, elems, fn_output_signature=specs))
    check_all(mapped, sample)


@pytest.mark.capability("tensorflow", "Dataset.map", fixed=UNREDUCED, brief=True)
def test_dataset_map(sample):
    def through_data(one, elems, _):
        data = tf.data.Dataset.from_tensor_slices(elems).map(lambda *elements: tuple(one(elements)))
        return [tf.stack(results) for results in zip(*data, strict=True)]

    check_all(example_by_example(sample, through_data), sample)


@pytest.mark.capability("tensorflow", "while_loop", brief=True)
@pytest.mark.parametrize("compiled", [False, True])
def test_while_loop(sample, compiled):
    """The loss twice, differentiated through the loop."""
    cotangent = tf.constant(sample.cotangent)

    def step(x):
        def total(x):
            def body(i, total):
                return i + 1, total + tf.reduce_sum(sample(x) * cotangent)

            return tf.while_loop(lambda i, _: i < 2, body, (0, tf.constant(0.0, tf.float64)))[1]

        return pulled_back(total, x, None)[1]

    check((traced(step) if compiled else step)(tf.constant(sample.x)), sample.pulled_back.scaled(2))


@pytest.mark.capability("tensorflow", "tf.cond", brief=True)
def test_cond(sample):
    run = answers(sample)

    @traced
    def step(wanted, *operands):
        return tf.cond(wanted, lambda: run(*operands), lambda: tuple(map(tf.zeros_like, right(sample))))

    check_all(step(tf.constant(True), *operands(sample)), sample)
    assert not any(np.any(result) for result in step(tf.constant(False), *operands(sample)))


def test_graph_of_compat_v1():
    """x == y is False there, for any two tensors: a formula would be wrong without a word."""
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 3])
        assert (x == x + 0) is False
        for call in (lambda: ul.softmax_nll(x, [0]), lambda: ul.multilabel_logistic_loss(x, x), lambda: ul.softmax(x)):
            with pytest.raises(TypeError, match=r"Received: a tensor of a tf.compat.v1 graph"):
                call()


# --- Saved models -----------------------------------------------------------------------------------------------------


@pytest.mark.capability("tensorflow", "SavedModel", brief=True)
def test_saved_model(sample, tmp_path):
    """Of any batch size, differentiated inside and from outside."""
    calls = [operands(one.beside(tf.constant)) for one in (sample, sample.of(rows=7))]

    def common(a, b):
        return spec(a, [n if n == m else None for n, m in zip(a.shape, b.shape, strict=True)])

    x, targets, arrays, cotangent = tf.nest.map_structure(common, *calls)
    module = tf.Module()
    module.answers = traced(answers(sample), input_signature=[x, targets, arrays, cotangent])
    module.value = traced(lambda x, targets, arrays: sample(x, targets, **arrays), input_signature=[x, targets, arrays])
    tf.saved_model.save(module, str(tmp_path), options=tf.saved_model.SaveOptions(experimental_custom_gradients=True))
    loaded = tf.saved_model.load(str(tmp_path))
    for given, one in zip(calls, (sample, sample.of(rows=7)), strict=True):
        check_all(loaded.answers(*given), one)
        x, *others, cotangent = given
        check_pulled(pulled_back(lambda x, others=others: loaded.value(x, *others), x, cotangent), one)


# --- What is no dense tensor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("RaggedTensor", lambda: tf.ragged.constant([[1.0, 2.0], [3.0]])),
        ("SparseTensor", lambda: tf.sparse.from_dense([[1.0, 0.0]])),
        ("IndexedSlices", lambda: tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]))),
    ],
)
def test_not_dense(kind, make):
    x, message = tf.ones((1, 2)), f"a plain array.*Received: a tensorflow {kind}"
    for call in (
        lambda: ul.multilabel_logistic_loss(make(), [[1, 0]]),
        lambda: ul.softmax_nll(make(), [0]),
        lambda: ul.multilabel_logistic_loss(x, [[1, 0]] if kind == "SparseTensor" else make(), weight=make()),
        lambda: ul.softmax_nll(x, [0], weight=make()),
        lambda: ul.log_softmax(make()),
    ):
        with pytest.raises(TypeError, match=message):
            call()


# --- Keras ------------------------------------------------------------------------------------------------------------

# Of each loss: Keras' activation before it, and how Keras is given it.
FITTED = {
    "multilabel_logistic_loss": (None, lambda y, x: ul.multilabel_logistic_loss(x, y)),
    "softmax_nll": (None, lambda y, x: ul.softmax_nll(x, tf.cast(y, tf.int32))),
    "binary_cross_entropy": ("sigmoid", lambda y, x: ul.binary_cross_entropy(x, y)),
    "cross_entropy": ("softmax", lambda y, x: ul.cross_entropy(x, tf.cast(y, tf.int32))),
    "nll": ("log_softmax", lambda y, x: ul.nll(x, tf.cast(y, tf.int32))),
    "multilabel_logistic_loss, object": (None, MultilabelLogisticLoss()),
    "softmax_nll, object": (None, SoftmaxNLL()),
}


def fitted(name, y, jit_compile="auto", policy=None, run_eagerly=False):
    """Two steps of gradient descent of a linear model: the inputs, its first weights, the losses that Keras saw."""
    activation, loss = FITTED[name]
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    inputs = keras.layers.Input((4,))
    layer = keras.layers.Dense(3, activation, kernel_initializer=keras.initializers.RandomNormal(seed=1), dtype=policy)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), loss=loss, jit_compile=jit_compile, run_eagerly=run_eagerly)
    before = layer.kernel.numpy().astype("float64")
    history = model.fit(x, np.array(y), batch_size=6, epochs=2, verbose=0).history["loss"]
    return x, before, history, model


INDICES, LABELS = [0, 2, 1, 1, 0, 2], [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0]]


@keras.saving.register_keras_serializable("unilabel_tests")
class Shift(keras.layers.Layer):
    """Adds a number to learn to each logit."""

    def build(self, shape):
        self.shift = self.add_weight(shape=shape[1:], initializer="zeros")

    def call(self, x):
        return x + self.shift


@pytest.mark.capability("tensorflow", "Keras model.fit", brief=True)
def test_keras_fit(sample):
    """A step of gradient descent: the loss that Keras reports, averaged if it is not reduced, and what is learned."""
    inputs = keras.layers.Input(sample.x.shape[1:])
    layer = Shift()
    indices = sample.row["targets"] in ("indices", "positives")
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y, x: sample(x, tf.cast(y, tf.int64) if indices else y))
    targets = sample.targets.astype("int64" if indices else "float32")
    x, whole = sample.x.astype("float32"), {"batch_size": len(sample.x), "shuffle": False}
    loss = model.fit(x, targets, **whole, verbose=0).history["loss"][0]
    np.testing.assert_allclose(loss, np.mean(sample.value), rtol=1e-5)
    gradient = np.sum(sample.gradient, 0) / sample.value.size
    np.testing.assert_allclose(-layer.shift.numpy(), gradient, rtol=1e-4, atol=1e-6 * np.abs(sample.gradient).max())


@pytest.mark.parametrize("jit_compile", ["auto", pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", FITTED)
def test_keras_fit_of_a_dense_layer(name, jit_compile):
    """The loss that Keras reports is the oracle's for the logits that the weights make."""
    of = name.removesuffix(", object")
    indices = of in ("softmax_nll", "cross_entropy", "nll")
    y = INDICES if indices else LABELS
    x, before, history, _ = fitted(name, y, jit_compile)
    logits = (x @ before).tolist()
    values, *_ = answer("softmax_nll" if indices else "multilabel_logistic_loss", logits, y)
    np.testing.assert_allclose(history[0], values.sum() / len(x), rtol=1e-5)
    assert history[1] < history[0]


@pytest.mark.parametrize("name", ["multilabel_logistic_loss", "softmax_nll"])
def test_keras_mixed_precision(name):
    """A function gets the model's bfloat16 and returns it, the objects get float32, as Keras' own losses do."""
    y = INDICES if name == "softmax_nll" else LABELS
    losses = []
    for given in (name, f"{name}, object"):
        x, before, history, model = fitted(given, y, policy="mixed_bfloat16", run_eagerly=True)
        result = model.loss(tf.constant(y), model(x))
        assert model(x).dtype == tf.bfloat16
        assert result.dtype == (tf.bfloat16 if given == name else tf.float32)
        losses.append(history[0])
    values, *_ = answer(name, (x @ before).tolist(), y)
    np.testing.assert_allclose(losses, values.sum() / len(x), rtol=2.0**-6)


# --- Processes of their own: logical devices are configured before anything runs --------------------------------------

DEVICES = """
import sys
import numpy as np, tensorflow as tf
from capabilities import samples
from crossed import close
import unilabel as ul

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""

SECOND = """
def on_the_second(*results):
    for result in results:
        assert result.device.endswith("CPU:1"), [result.device for result in results]


for sample in samples("tensorflow", "on the second device")[: int(sys.argv[1])]:
    with tf.device("/CPU:1"):
        x, second, cotangent = tf.constant(sample.x), tf.Variable(sample.x), tf.constant(sample.cotangent)
    with tf.device("/CPU:0"):
        first, sample = tf.constant(sample.targets), sample.beside(tf.constant)
    for targets in (sample.targets, sample.targets.tolist(), first):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            value, from_variable = sample(x, targets), sample(second, targets)
        by_x, by_variable = tape.gradient(value, x, cotangent), tape.gradient(from_variable, second, cotangent)
        closed = sample.closed(ul.value_and_grad)(x, targets)
        of_sum = sample.closed(ul.grad_and_hess)(x, targets, reduction="sum")
        on_the_second(value, by_x, from_variable, by_variable, *closed, *of_sum)
        for got, right in zip((value, by_x, by_variable, *closed),
                              (sample.value, sample.pulled_back, sample.pulled_back, sample.value, sample.gradient)):
            close(got, right)
on_the_second(ul.sigmoid(x), ul.log_sigmoid(x), ul.softmax(x), ul.log_softmax(x))
on_the_second(*ul.value_and_grad(ul.softmax_nll)(x, tf.ones_like(x), axis=0), ul.softmax(x, axis=0))
"""

MIRRORED = """
strategy = tf.distribute.MirroredStrategy(["/CPU:0", "/CPU:1"])
for sample in samples("tensorflow", "MirroredStrategy", fixed={"reduction": "none"})[: int(sys.argv[1])]:
    where = sample.arrays.get("where")
    of_examples = {"sample_weight", "pos_weight"} | ({"where"} if where is not None and len(where) > 1 else set())
    each = {name: np.split(a, 2) for name, a in sample.arrays.items() if name in of_examples}
    of_all = {name: tf.constant(a) for name, a in sample.arrays.items() if name not in of_examples}
    halves = [np.split(a, 2) for a in (sample.x, sample.targets, sample.cotangent)]
    with strategy.scope():
        zero = tf.Variable(tf.zeros(sample.x.shape[1:], tf.float64))

    @tf.function
    def step(x, y, cotangent, arrays):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            values = sample.loss(x + zero, sample.as_targets(y), **arrays, **of_all, **sample.options)
        total = tape.gradient(values, zero, cotangent)
        total = tf.distribute.get_replica_context().all_reduce("sum", total)
        return values, tape.gradient(values, x, cotangent), total

    @tf.function
    def run():
        def piece(of):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(of[context.replica_id_in_sync_group])
            )

        return strategy.run(step, [*map(piece, halves), {name: piece(of) for name, of in each.items()}])

    values, gradient, total = (strategy.experimental_local_results(result) for result in run())
    assert len(values) == 2
    close(tf.concat(values, 0), sample.value)
    close(tf.concat(gradient, 0), sample.pulled_back)
    for replica in total:
        np.testing.assert_allclose(replica, np.sum(sample.pulled_back, 0), rtol=1e-12, atol=1e-14)
"""


def alone(code, count, folder):
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES + code, str(count)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.capability("tensorflow", "on the second device", looped=True)
def test_second_device(tmp_path):
    alone(SECOND, 1000, tmp_path)


@pytest.mark.full
@pytest.mark.capability("tensorflow", "MirroredStrategy", looped=True, fixed={"reduction": "none"})
def test_mirrored(tmp_path):
    alone(MIRRORED, 1000, tmp_path)


def test_devices(tmp_path):
    alone(SECOND + MIRRORED, 1, tmp_path)
