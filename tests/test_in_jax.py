"""JAX: its transformations, compiler, exporter, devices and strict modes, on these losses as on its own.

Eight CPU devices are asked for here, before JAX starts: all test modules are imported before any of them runs.
"""

import functools
import gc
import importlib
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossed import ELEMENTWISE, PER_EXAMPLE, Exact, Row, Sample, close, tensor
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mpmath import mp
from unilabel.conformance.cases import Maker
from unilabel.conformance.oracle import expected

import unilabel as ul

jax.config.update("jax_num_cpu_devices", 8)

FULL = pytest.mark.full
SEVERAL = ("multilabel_logistic_loss", "softmax_nll")
OTHERS = [pytest.param(loss, marks=FULL) for loss in (*ELEMENTWISE, *PER_EXAMPLE) if loss not in SEVERAL]
ELEMENTS = {"targets": ("integer", "bool", "float")}  # one for each logit
PLAIN = pytest.mark.parametrize("sample", [*SEVERAL, *OTHERS], indirect=True)  # calls without options


@pytest.fixture
def sample(sample):
    return sample.beside(jnp.asarray)


def check(got, right, dtype="float64", device=None, ulp=16):
    """Kind, dtype, shape and device, then the numbers."""
    assert isinstance(got, jax.Array)
    assert got.dtype == dtype
    assert got.shape == np.shape(right)
    assert device is None or got.devices() == {device}
    finite = np.isfinite(right)
    if not finite.all():
        got, right = np.asarray(got), np.asarray(right)
        np.testing.assert_array_equal(got[~finite], right[~finite])
        got, right = got[finite], right[finite]
    close(got, right, dtype, ulp)


def exactly(numbers, terms):
    """Right numbers, and the sizes of what each was added up from."""
    found = np.array(numbers).view(Exact)
    found.terms = np.array(terms)
    return found


def operands(sample):
    """All arrays of a call: the logits, the targets, the other operands by name, the cotangent."""
    return jnp.array(sample.x), jnp.array(sample.targets), sample.arrays, jnp.array(sample.cotangent)


def pulled(sample):
    """A number whose gradient by the logits is `sample.pulled_back`."""
    return lambda x, targets=None, arrays={}, cotangent=sample.cotangent: jnp.sum(
        sample(x, targets, **arrays) * cotangent
    )


def answers(sample):
    """All that a loss has to give, as a function of its `operands`, for a compiler to compile once."""

    def run(x, targets, arrays, cotangent):
        value, pullback = jax.vjp(lambda x: sample(x, targets, **arrays), x)
        value_beside, gradient = sample.closed(ul.value_and_grad)(x, targets, **arrays)
        of_sum = sample.closed(ul.grad_and_hess)(x, targets, **arrays, reduction="sum")
        return value, *pullback(cotangent), value_beside, gradient, *of_sum

    return run


def right(sample):
    """What `answers` must give."""
    divided = np.abs(sample.gradient).max() / np.abs(sample.gradient_of_sum).max()
    hessian = sample.hessian.scaled(1 / divided)
    return sample.value, sample.pulled_back, sample.value, sample.gradient, sample.gradient_of_sum, hessian


def check_all(results, sample, **how):
    for got, numbers in zip(results, right(sample), strict=True):
        check(got, numbers, **how)


def total(sample):
    """The value of `pulled`."""
    return np.vdot(sample.value, sample.cotangent)


def exact(sample, dtype="float64", **arrays):
    """The oracle's answers to the same call with other operands: x, targets, weight, ..."""
    given = {"x": sample.x, "targets": sample.dense, "cotangent": sample.cotangent, **sample.arrays} | arrays
    given = {name: tensor(np.asarray(array)) for name, array in given.items()}
    if "label_smoothing" in given:
        (given["label_smoothing"],) = given["label_smoothing"].values
    x, targets, cotangent = (given.pop(name) for name in ("x", "targets", "cotangent"))
    case = Maker("given", dtype, 0).case(sample.name, x, targets, **sample.options, **given)
    return expected(case._replace(cotangent=cotangent))


def oracle(name, logits, targets, dtype="float64"):
    """The logits as an array; values, gradient and Hessian diagonal of their sum."""
    case = Maker("given", dtype, 0).case(name, logits, targets, reduction="none")
    answer = expected(case)
    value, gradient, hessian = (
        np.array([float(number.value) for number in numbers])
        for numbers in (answer.value, answer.gradient_of_sum, answer.hessian)
    )
    x = np.array(case.logits.values, dtype).reshape(case.logits.shape)
    return x, value.reshape(case.cotangent.shape), gradient.reshape(x.shape), hessian.reshape(x.shape)


def diagonal(hessian, shape):
    return np.reshape([hessian[i + i] for i in itertools.product(*map(range, shape))], shape)


# --- Derivatives by the logits ----------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "grad, value_and_grad", brief=True)
def test_grad(sample):
    x = jnp.array(sample.x)
    check(jax.grad(pulled(sample))(x), sample.pulled_back)
    value, gradient = jax.value_and_grad(pulled(sample))(x)
    check(value, total(sample))
    check(gradient, sample.pulled_back)


@pytest.mark.capability("jax", "vjp")
def test_vjp(sample):
    value, pullback = jax.vjp(sample, jnp.array(sample.x))
    check(value, sample.value)
    check(pullback(jnp.array(sample.cotangent))[0], sample.pulled_back)


@pytest.mark.capability("jax", "jvp, linearize", brief=True)
def test_jvp(sample):
    sizes = np.linspace(0.5, 2, sample.x.size).reshape(sample.x.shape)
    tangent = np.copysign(sizes, sample.gradient)  # so that nothing cancels
    sums = (
        np.tensordot(part, to, to.ndim) for part, to in ((sample.jacobian, tangent), (sample.jacobian.terms, sizes))
    )
    change = exactly(*sums)
    x, tangent = jnp.array(sample.x), jnp.array(tangent)
    values, got = jax.jvp(sample, (x,), (tangent,))
    check(values, sample.value)
    check(got, change)
    values, push = jax.linearize(sample, x)
    check(values, sample.value)
    check(push(tangent), change)


@pytest.mark.parametrize("sample", PER_EXAMPLE, indirect=True)
def test_jvp_of_an_ignored_example(sample):
    """Whatever its logits: NaN in them leaves value, change and gradient as they are."""
    x, targets = jnp.array(sample.x), jnp.array(sample.targets).at[0].set(-1)
    answers = []
    for number in (0.5, math.nan):
        loss = functools.partial(sample.loss, targets=targets, ignore_index=-1)
        inputs = x.at[0].set(number)
        answers.append((*jax.jvp(loss, (inputs,), (x,)), jax.grad(loss)(inputs)))
    for got, right in zip(*answers, strict=True):
        np.testing.assert_array_equal(got, right)
        assert np.isfinite(got).all()


@pytest.mark.capability("jax", "hessian", brief=True)
def test_hessian(sample):
    """Forward over reverse, as `jax.hessian` does, and reverse over reverse; and the Jacobian both ways."""

    def run(x):
        hessians = [outer(jax.jacrev(lambda x: jnp.sum(sample(x)))) for outer in (jax.jacfwd, jax.jacrev)]
        return [hessian(x) for hessian in hessians], [mode(sample)(x) for mode in (jax.jacfwd, jax.jacrev)]

    hessians, jacobians = jax.jit(run)(jnp.array(sample.x))
    for hessian in hessians:
        assert hessian.dtype == "float64"
        sample.check_hessian(hessian)
    for jacobian in jacobians:
        check(jacobian, sample.jacobian)


@pytest.mark.capability(
    "jax", "vmap of grad over single logits, of no dimensions", losses=ELEMENTWISE, fixed=ELEMENTS, brief=True
)
def test_single_logits(sample):
    """Each is one example with one class: whatever the reduction, there is one loss."""
    each = Sample(Row(sample.name, sample.row.levels | {"reduction": "none"}))
    spread = {name: jnp.broadcast_to(array, each.x.shape) for name, array in each.arrays.items()}
    options = {name: option for name, option in sample.options.items() if name != "axis"}

    def one(x, targets, arrays):
        def loss(form=lambda loss: loss, **more):
            return lambda x: form(sample.loss)(x, sample.as_targets(targets), **arrays | options | more)

        value, gradient = jax.value_and_grad(loss())(x)
        return value, gradient, *loss(ul.value_and_grad)(x), *loss(ul.grad_and_hess, reduction="sum")(x)

    for _ in each.x.shape:
        one = jax.vmap(one)
    results = jax.jit(one)(jnp.array(each.x), jnp.array(each.targets), spread)
    for got, numbers in zip(results, (each.value, each.gradient) * 2 + (each.gradient, each.hessian), strict=True):
        check(got, numbers)


@functools.cache
def second_derivatives():
    """Hessians of the loss and of log_softmax, forward and backward, and all that is equal to them; gradients."""

    def loss(x, y):
        return ul.softmax_nll(x, y, reduction="sum")

    def minus_log_p(x, y):
        return -ul.log_softmax(x)[y]

    modes = (jax.jacfwd, jax.jacrev)
    hessians = [
        outer(inner(function))
        for function in (loss, minus_log_p)
        for outer, inner in itertools.product(modes, repeat=2)
    ]
    hessians += [mode(lambda x, y: ul.softmax(x)) for mode in modes]
    gradients = [mode(function) for function in (loss, minus_log_p) for mode in modes]
    return jax.jit(lambda x, y: ([f(x, y) for f in hessians], [f(x, y) for f in gradients]))


@pytest.mark.parametrize("logits", [[60.0, 0.0, -5.0], [0.0, 17.0, 0.0], [2.0, 2.0, 2.0], [1.0, 1.0, -30.0]])
def test_second_derivatives_keep_their_digits(logits):
    """All of p_i (δ_ij - p_j), where 1 - p would lose all digits, whichever class is the target."""
    x = jnp.array(logits)
    # The gradient by the logit of a class that is not the target is its probability.
    p = [oracle("softmax_nll", [logits], [(y + 1) % 3])[2][0, y] for y in range(3)]
    for y in range(3):
        _, _, gradient, hessian = oracle("softmax_nll", [logits], [y])
        right = np.where(np.eye(3, dtype=bool), hessian, -np.outer(p, p))
        hessians, gradients = second_derivatives()(x, y)
        for got in hessians:
            check(got, right)
        for got in gradients:
            check(got, gradient[0])


def test_infinite_logits():
    inf = math.inf
    targets = [[1, 0, 0, 1, 1, 1]]
    x, values, gradient, hessian = oracle("multilabel_logistic_loss", [[inf, -inf, inf, -inf, 0.0, 60.0]], targets)

    def loss(x):
        return ul.multilabel_logistic_loss(x, targets, reduction="none")

    check(loss(jnp.array(x)), values)
    for tangent in (1.0, -1.0):
        _, change = jax.jvp(loss, (jnp.array(x),), (jnp.full(x.shape, tangent),))
        check(change, tangent * gradient)
    for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)):
        whole = jax.jit(outer(inner(lambda x: loss(x).sum())))(jnp.array(x))
        assert np.isfinite(whole).all()
        close(diagonal(whole, x.shape), hessian)


@pytest.mark.parametrize("logits", [[0.5, -math.inf, 60.0], pytest.param([math.inf, 0.0, 0.0], marks=FULL)])
def test_excluded_classes(logits):
    x, values, gradient, hessian = oracle("softmax_nll", [logits], [0])

    def loss(x):
        return ul.softmax_nll(x, [0], reduction="sum")

    tangent = np.copysign(np.ones(x.shape), gradient)
    value, change = jax.jvp(loss, (jnp.array(x),), (jnp.array(tangent),))
    check(value, values.sum())
    check(change, np.abs(gradient).sum())
    for mode in (jax.jacfwd, jax.jacrev):
        gradients, whole = jax.jit(lambda x, mode=mode: (mode(loss)(x), mode(jax.jacrev(loss))(x)))(jnp.array(x))
        check(gradients, gradient)
        assert np.isfinite(whole).all()
        close(diagonal(whole, x.shape), hessian)


# --- Derivatives by the other operands --------------------------------------------------------------------------------


def difference(up, down, like, share=1.0):
    """Between two of the oracle's numbers, whose digits do not cancel there. `share`: of their terms, what may move."""
    with mp.workprec(200):
        found = [float(a.value - b.value) for a, b in zip(up, down, strict=True)]
    terms = [share * float(max(a.terms, b.terms)) for a, b in zip(up, down, strict=True)]
    return exactly(np.reshape(found, like.shape), np.reshape(terms, like.shape))


@pytest.mark.capability("jax", "derivative by targets and weights", brief=True)
def test_other_operands(sample):
    """Of the value and of its gradient, as all other operands move at once: by the oracle, over a very short step."""
    given = {"targets": sample.targets, **sample.arrays}
    given = {name: np.asarray(array) for name, array in given.items()}
    given = {name: array for name, array in given.items() if array.dtype == "float64"}
    if not given:
        classes = sample.x.size // (sample.owners.max() + 1)
        given["weight"] = np.ones(classes if sample.per_example else sample.x.shape)
    drawn = np.random.default_rng(0)
    steps = {name: 2.0**-30 * drawn.choice([-3, -2, -1, 1, 2, 3], array.shape) for name, array in given.items()}
    above, below = ({name: array + way * steps[name] for name, array in given.items()} for way in (1, -1))
    step = {name: above[name] - below[name] for name in given}
    share = sum(np.max(np.abs(step[name] / given[name])) for name in given)

    up, down = exact(sample, **above), exact(sample, **below)
    change = difference(up.value, down.value, sample.value, share)
    change_of_gradient = difference(up.gradient, down.gradient, sample.x, share)

    def run(x, given, step):
        def value_and_pulled_back(given):
            value, pullback = jax.vjp(lambda x: sample(x, **given), x)
            return value, *pullback(jnp.array(sample.cotangent))

        def loss(x, given):
            return jnp.sum(sample(x, **given) * sample.cotangent)

        return jax.jvp(value_and_pulled_back, (given,), (step,)), jax.grad(loss, (0, 1))(x, given)

    results, (by_x, by_given) = jax.jit(run)(jnp.array(sample.x), given, step)
    (value, gradient), (moved, moved_gradient) = results
    here = exact(sample, **given)
    check(value, Exact.of(here.value, sample.value.shape))
    check(moved, change, ulp=32)
    check(moved_gradient, change_of_gradient, ulp=32)
    for pulled_back in (gradient, by_x):
        check(pulled_back, Exact.of(here.gradient, sample.x.shape))
    products = np.concatenate([np.ravel(by_given[name] * step[name]) for name in given])
    whole = exactly(np.vdot(change, sample.cotangent), np.vdot(change.terms, sample.cotangent))
    close(math.fsum(products), whole, ulp=32)


@pytest.mark.capability("jax", "derivative by label smoothing", fixed={"label_smoothing": "array"}, brief=True)
def test_label_smoothing(sample):
    """The loss is affine in it: the derivative is what it grows by from 0 to 1. Given as an array or traced."""
    none, all_of_it = (exact(sample, label_smoothing=end).value for end in (0.0, 1.0))
    change = difference(all_of_it, none, sample.value)
    x, smoothing = jnp.array(sample.x), sample.arrays["label_smoothing"]
    derivative = exactly(np.vdot(change, sample.cotangent), np.vdot(change.terms, sample.cotangent))

    def loss(smoothing):
        return sample(x, label_smoothing=smoothing)

    def number(smoothing):
        return jnp.sum(loss(smoothing) * sample.cotangent)

    def run(smoothing):
        several = jnp.array([0.0, 0.1, 1.0])
        derivatives = jax.grad(number)(smoothing), *jax.vmap(jax.grad(number))(several)
        return jax.jvp(loss, (smoothing,), (jnp.ones_like(smoothing),)), derivatives, jax.vmap(loss)(several)

    check(jax.grad(number)(smoothing), derivative)
    (value, moved), derivatives, values = jax.jit(run)(0.1)
    check(value, sample.value)
    check(moved, change)
    for got in derivatives:
        check(got, derivative)
    for got, numbers in zip(values, (none, None, all_of_it), strict=True):
        check(got, sample.value if numbers is None else Exact.of(numbers, sample.value.shape))


# --- Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "jit, with targets traced", pairs=True)
def test_jit(sample):
    """And all other operands; of value_and_grad and grad_and_hess as well."""
    check_all(jax.jit(answers(sample))(*operands(sample)), sample)


@pytest.mark.capability("jax", "jit that donates the logits", brief=True)
def test_donated(sample):
    x = jnp.array(sample.x)
    value, gradient = jax.jit(jax.value_and_grad(pulled(sample)), donate_argnums=0)(x)
    check(value, total(sample))
    check(gradient, sample.pulled_back)
    assert x.is_deleted()


def stacked(*samples):
    """The operands of several calls, along a first axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(operands, samples))


def check_stacked(results, *samples):
    for i, sample in enumerate(samples):
        check_all([got[i] for got in results], sample)


@pytest.mark.capability("jax", "vmap", brief=True)
def test_vmap(sample):
    """Over everything; over the logits alone; over the targets alone."""
    other = sample.of()
    x, *others = stacked(sample, other)
    results = jax.jit(jax.vmap(answers(sample), (-1, 0, 0, 0)))(jnp.moveaxis(x, 0, -1), *others)
    check_stacked(results, sample, other)

    def alone(x, targets, *others):
        function = jax.value_and_grad(pulled(sample))
        by_x = jax.vmap(function, (0, None, None, None))(jnp.stack([x, x]), targets, *others)
        return by_x, jax.vmap(function, (None, 0, None, None))(x, jnp.stack([targets, targets]), *others)

    for values, gradients in jax.jit(alone)(*operands(sample)):
        for value, gradient in zip(values, gradients, strict=True):
            check(value, total(sample))
            check(gradient, sample.pulled_back)


def examples_axes(sample):
    """Of the operands: 0 if the first axis is one of examples, else None."""
    several = {"sample_weight", "pos_weight"} | ({"where"} if len(sample.arrays.get("where", ())) > 1 else set())
    return 0, 0, {name: 0 if name in several else None for name in sample.arrays}, 0 if sample.cotangent.ndim else None


@pytest.mark.capability("jax", "vmap over examples: the gradient of each", fixed={"reduction": "none"}, brief=True)
def test_gradient_of_each_example(sample):
    axes = examples_axes(sample)

    def one(x, targets, arrays, cotangent):
        arrays = {name: array if axes[2][name] is None else array[None] for name, array in arrays.items()}
        return answers(sample)(x[None], targets[None], arrays, cotangent[None])

    results = jax.jit(jax.vmap(one, axes))(*operands(sample))
    check_all([got[:, 0] for got in results], sample)


@pytest.mark.capability("jax", "vmap over weights", fixed={"weight": "yes"}, brief=True)
def test_vmap_over_weights(sample):
    """Weights twice as large make a loss twice as large, unless it is divided by them."""
    divided = sample.per_example and sample.row["reduction"] in ("default", "mean")
    weight = sample.arrays["weight"]
    once, twice = jax.vmap(lambda weight: sample(jnp.array(sample.x), weight=weight))(jnp.stack([weight, 2 * weight]))
    check(once, sample.value)
    check(twice, sample.value if divided else 2 * sample.value)


@pytest.mark.capability("jax", "lax.scan, lax.map", brief=True)
def test_loops(sample):
    other = sample.of()

    def step(carry, operands):
        return carry + pulled(sample)(*operands), None

    def run(x, *others):
        whole = jax.value_and_grad(lambda x: jax.lax.scan(step, 0.0, (x, *others))[0])(x)
        return *whole, jax.lax.map(lambda operands: answers(sample)(*operands), (x, *others))

    value, gradient, results = jax.jit(run)(*stacked(sample, other))
    check(value, total(sample) + total(other))
    for got, each in zip(gradient, (sample, other), strict=True):
        check(got, each.pulled_back)
    check_stacked(results, sample, other)


@pytest.mark.capability("jax", "checkpoint (remat)", brief=True)
def test_checkpoint(sample):
    def run(*operands):
        policies = jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable
        return [jax.grad(jax.checkpoint(pulled(sample), policy=policy))(*operands) for policy in policies]

    for gradient in jax.jit(run)(*operands(sample)):
        check(gradient, sample.pulled_back)


@pytest.mark.capability("jax", "eval_shape, make_jaxpr")
def test_shapes_alone(sample):
    other = sample.of(rows=7, classes=5).beside(jnp.asarray)
    x, targets, arrays, cotangent = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands(other))
    x, cotangent = x.update(dtype="bfloat16"), cotangent.update(dtype="bfloat16")
    results = jax.eval_shape(answers(sample), x, targets, arrays, cotangent)
    jaxpr = jax.make_jaxpr(answers(sample))(x, targets, arrays, cotangent)
    for got, typed, numbers in zip(results, jaxpr.out_avals, right(other), strict=True):
        assert (got.shape, got.dtype) == (typed.shape, typed.dtype) == (numbers.shape, "bfloat16")


# --- Export -----------------------------------------------------------------------------------------------------------


def symbolic(sample, other):
    """The operands' shapes, with a name for each length that is another one in the other call."""
    batch, classes = export.symbolic_shape("batch, classes")
    names = {(5, 7): batch, (3, 4): classes, (6, 8): 2 * classes}

    def common(a, b):
        lengths = [n if n == m else names[n, m] for n, m in zip(a.shape, b.shape, strict=True)]
        return jax.ShapeDtypeStruct(lengths, a.dtype)

    return jax.tree.map(common, operands(sample), operands(other))


@pytest.mark.parametrize("lengths", [(7, 3), (5, 4), (7, 4)], ids=["batch", "classes", "batch and classes"])
@pytest.mark.capability("jax", "jax.export, any batch size, any number of classes", brief=True)
def test_export(sample, lengths):
    other = sample.of(*lengths).beside(jnp.asarray)
    shapes = symbolic(sample.of(rows=5), other)
    check_all(export.export(jax.jit(answers(sample)))(*shapes).call(*operands(other)), other)


@pytest.mark.capability("jax", "jax.export to a file, with its gradient", brief=True)
def test_serialized(sample):
    other = sample.of(rows=7, classes=4).beside(jnp.asarray)
    *shapes, _ = symbolic(sample.of(rows=5), other)
    exported = export.export(jax.jit(lambda x, targets, arrays: sample(x, targets, **arrays)))(*shapes)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    x, *others, cotangent = operands(other)
    value, pullback = jax.vjp(lambda x: loaded.call(x, *others), x)
    check(value, other.value)
    check(pullback(cotangent)[0], other.pulled_back)


@PLAIN
def test_export_of_all_but_the_last(sample):
    """As a language model's logits are shifted: there may be none left, and then the loss is 0."""
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 3), "float64")
    targets = jax.ShapeDtypeStruct((batch, *sample.targets.shape[1:]), "int64")
    run = export.export(jax.jit(jax.value_and_grad(lambda x, targets: sample.loss(x[:-1], targets[1:]))))(x, targets)
    for rows in (4, 2, 1):
        x, targets = jnp.array(sample.x[:rows]), jnp.array(sample.targets[:rows])
        value, gradient = run.call(x, targets)
        if rows == 1:
            assert value == 0
            assert (gradient == 0).all()
            continue
        each = exact(sample, x=sample.x[: rows - 1], targets=sample.targets[1:rows])
        value_of_sum = sum(number.value for number in each.value)
        check(value, np.float64(value_of_sum / (rows - 1)))
        check(gradient[:-1], Exact.of(each.gradient_of_sum, (rows - 1, 3)).scaled(1 / (rows - 1)))
        assert (gradient[-1] == 0).all()


# --- Devices ----------------------------------------------------------------------------------------------------------

PLACES = {"batch": P("rows"), "batch and class": P("rows", "classes")}


def mesh(kind):
    return jax.make_mesh((4, 2), ("rows", "classes"), axis_types=(kind,) * 2)


def spread(sample, where, place):
    """The operands over eight devices: each where its logits are."""
    rows, classes = (*place, None)[:2]
    x, targets, arrays, cotangent = operands(sample)
    masked = len(sample.arrays.get("where", ())) > 1
    at = {"weight": P(classes), "sample_weight": P(rows), "pos_weight": place, "label_smoothing": P()}
    at["where"] = P(rows if masked else None, classes)
    logits = P(rows, classes)
    of_value = P() if cotangent.ndim == 0 else P(rows) if sample.per_example else logits
    of_targets = P(rows) if sample.row["targets"] in ("indices", "positives") else logits
    specs = (logits, of_targets, {name: at[name] for name in arrays}, of_value)
    places = jax.tree.map(lambda spec: NamedSharding(where, spec), specs, is_leaf=lambda spec: isinstance(spec, P))
    return jax.device_put((x, targets, arrays, cotangent), places)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.capability("jax", "sharded over a mesh, no logits gathered", brief=True)
def test_sharded(sample, place):
    sample = sample.of(rows=8, classes=4).beside(jnp.asarray)
    arrays = spread(sample, mesh(AxisType.Auto), place)
    assert len(arrays[0].addressable_shards) == 8
    run = jax.jit(answers(sample)).lower(*arrays).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", run.as_text())
    results = run(*arrays)
    check_all(results, sample)
    if sample.name != "nll":  # its gradient has nothing of the logits in it, and so not their places
        assert results[1].sharding.is_equivalent_to(arrays[0].sharding, arrays[0].ndim)


@pytest.mark.capability("jax", "sharded over a mesh, without jit and with NumPy operands", brief=True)
def test_sharded_eagerly(sample):
    sample = sample.of(rows=8, classes=4)
    x, *_ = spread(sample.beside(jnp.asarray), mesh(AxisType.Auto), P("rows", "classes"))
    results = answers(sample)(x, sample.targets, sample.arrays, jnp.array(sample.cotangent))
    check_all(results, sample)
    assert sample.name == "nll" or results[1].sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.capability("jax", "sharding in types (AxisType.Explicit)", brief=True)
def test_explicit_sharding(sample, place):
    sample = sample.of(rows=8, classes=4).beside(jnp.asarray)
    where = mesh(AxisType.Explicit)
    with jax.set_mesh(where):
        x, *others = spread(sample, where, place)
        results = jax.jit(answers(sample))(x, *others)
        check_all(results, sample)
        value, pulled_back, *_ = results
        assert jax.typeof(pulled_back) == jax.typeof(x)
        assert value.ndim == 0 or jax.typeof(value).sharding.spec[0] == place[0]


@pytest.mark.capability("jax", "shard_map", brief=True)
def test_shard_map(sample):
    """Each device with a call of its own; and all with the same other operands, which only one of them holds."""
    other = sample.of()
    rows = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def own(*shards):
        return [got[None] for got in answers(sample)(*jax.tree.map(lambda shard: shard[0], shards))]

    def mean(x, *others):
        return jax.lax.pmean(pulled(sample)(x[0], *others), "rows")

    each = jax.shard_map(own, mesh=rows, in_specs=P("rows"), out_specs=P("rows"))
    whole = jax.shard_map(mean, mesh=rows, in_specs=(P("rows"), P(), P(), P()), out_specs=P())
    check_stacked(jax.jit(each)(*stacked(sample, other)), sample, other)
    x, *others = operands(sample)
    value, gradient = jax.jit(jax.value_and_grad(whole))(jnp.stack([x, x]), *others)
    check(value, total(sample))
    for got in gradient:
        check(got, sample.pulled_back.scaled(1 / 2))


@pytest.mark.capability("jax", "abstract mesh")
def test_abstract_mesh(sample):
    sample = sample.of(rows=8).beside(jnp.asarray)
    where = jax.sharding.AbstractMesh((4,), ("rows",), axis_types=(AxisType.Explicit,))

    def shape(axis, array):
        place = NamedSharding(where, P() if axis is None else P("rows"))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    axes = examples_axes(sample)
    arrays = jax.tree.map(shape, axes, operands(sample), is_leaf=lambda axis: axis is None)
    value, gradient, *_ = jax.eval_shape(answers(sample), *arrays)
    assert (gradient.shape, gradient.dtype) == (sample.x.shape, "float64")
    assert gradient.sharding.spec[0] == "rows"
    assert (value.shape, value.dtype) == (sample.value.shape, "float64")


@pytest.mark.capability("jax", "on any device", brief=True)
def test_device(sample):
    third, first = jax.devices()[3], jax.devices()[0]
    x = jax.device_put(sample.x, third)

    for convert in (np.asarray, lambda array: jax.device_put(array, first)):
        there, targets = sample.beside(convert), convert(sample.targets)
        check(there(x, targets), sample.value, device=third)
        value, gradient = there.closed(ul.value_and_grad)(x, targets)
        check(value, sample.value, device=third)
        check(gradient, sample.gradient, device=third)
    check(jax.grad(pulled(sample.beside(np.asarray)))(x), sample.pulled_back, device=third)
    there = sample.beside(functools.partial(jax.device_put, device=third))
    check(jax.grad(pulled(there))(x, jax.device_put(sample.targets, third)), sample.pulled_back, device=third)
    with pytest.raises(ValueError, match="incompatible devices"):  # JAX's own: a tracer does not say where it is
        jax.grad(pulled(sample))(x, jax.device_put(sample.targets, first))


@PLAIN
def test_uncommitted(sample):
    """Plain operands bind the result to no device."""
    x = jnp.array(sample.x)
    value = sample(x, weight=[1.0, 1.0, 1.0], label_smoothing=0.1)
    assert not value.committed
    assert (value + jax.device_put(1.0, jax.devices()[3])).devices() == {jax.devices()[3]}


# --- Modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.capability("jax", "jax_enable_x64 off and on", brief=True)
@pytest.mark.parametrize("x64", [False, True])
def test_precision(sample, x64):
    """float32 stays float32, and as right, whatever JAX's default is."""

    def single(array):
        array = np.asarray(array)
        return array.astype("float32") if array.dtype == "float64" else array

    sample = sample.beside(single)
    x, targets, cotangent = single(sample.x), single(sample.targets), single(sample.cotangent)
    answer = exact(sample, "float32", x=x, targets=single(sample.dense), cotangent=cotangent)
    with jax.enable_x64(x64):
        shapes = jax.eval_shape(answers(sample), jnp.array(x), targets, sample.arrays, cotangent)
        results = jax.jit(answers(sample))(jnp.array(x), targets, sample.arrays, cotangent) if not x64 else ()
    assert {(shape.dtype, shape.weak_type) for shape in shapes} == {(jnp.dtype("float32"), False)}
    value = Exact.of(answer.value, sample.value.shape)
    pulled_back, gradient = (Exact.of(found, x.shape) for found in (answer.gradient, answer.gradient_of_sum))
    for got, numbers in zip(results, (value, pulled_back, value, gradient), strict=False):
        check(got, numbers, "float32")


@pytest.mark.capability("jax", 'jax_numpy_rank_promotion="raise", jax_numpy_dtype_promotion="strict"', brief=True)
def test_strict_promotion(sample):
    """Neither is asked of the caller's operands either."""
    x, targets, arrays, cotangent = operands(sample)
    narrow = targets if targets.dtype == "float64" else targets.astype("int8")
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        check_all(jax.jit(answers(sample))(x, narrow, arrays, cotangent), sample)
        jax.eval_shape(jax.hessian(pulled(sample)), x, narrow, arrays, cotangent)


def test_strict_promotion_of_activations():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for activation in (ul.softmax, ul.log_softmax, ul.sigmoid, ul.log_sigmoid):
            activation(jnp.ones((2, 3)))


@pytest.mark.capability("jax", "jax_debug_nans", brief=True)
def test_debug_nans(sample):
    with jax.debug_nans(True):
        check_all(jax.jit(answers(sample))(*operands(sample)), sample)


EDGES = {
    "multilabel_logistic_loss": ([[math.inf, -math.inf, 0.0]], [[1, 0, 1]]),
    "softmax_nll": ([[-math.inf, 1.0, 2.0], [-math.inf, 40.0, -40.0]], [1, 1]),
    "binary_cross_entropy": ([[0.0, 1.0, 0.5]], [[1, 0, 1]]),
    "cross_entropy": ([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]], [1, 2]),
    "nll": ([[-math.inf, 0.0, -1.0]], [1]),
}


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=FULL)])
@PLAIN
def test_debug_nans_at_the_edges(sample, compiled):
    """At infinite logits, and at probabilities of 0 and 1."""
    x, targets = EDGES[sample.name]
    with jax.debug_nans(True), jax.disable_jit(not compiled):
        value, gradient = jax.value_and_grad(sample.loss)(jnp.array(x), targets)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        jax.jvp(jax.grad(lambda x: sample.loss(x, targets)), (jnp.array(x),), (jnp.ones(np.shape(x)),))


@pytest.mark.parametrize("sample", PER_EXAMPLE, indirect=True)
def test_debug_nans_finds_what_is_wrong(sample):
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        sample(jnp.array(sample.x), [3, 0, 0, 0])


@pytest.mark.capability("jax", "disable_jit", brief=True)
def test_disable_jit(sample):
    """With every operation looked at for NaN."""
    with jax.disable_jit(), jax.debug_nans(True):
        check_all(answers(sample)(*operands(sample)), sample)


def test_disable_jit_without_a_class():
    """An example whose classes are all masked is no NaN on the way either."""
    with jax.disable_jit(), jax.debug_nans(True):
        gradient = jax.grad(lambda x: ul.softmax_nll(x, [0, 1], where=[[True, True], [False, False]]))(jnp.ones((2, 2)))
    np.testing.assert_array_equal(gradient, [[-0.5, 0.5], [0, 0]])


@pytest.mark.capability("jax", "checking_leaks", brief=True)
def test_no_leaks(sample):
    gc.freeze()  # JAX collects garbage to find what is left: not that of earlier tests
    with jax.checking_leaks():
        gradient = jax.jit(jax.grad(pulled(sample)))(*operands(sample))
    gc.unfreeze()
    check(gradient, sample.pulled_back)


@pytest.mark.capability("jax", 'transfer_guard("disallow")', brief=True)
def test_no_transfers(sample):
    """Python's numbers among the formulas are constants of the compiled programs; the options' are moved explicitly.

    `jax.grad` outside of jit makes a transfer of its own, of any function. Plain operands are moved explicitly, too.
    """
    x, targets, *_ = operands(sample)

    def run(call, given):
        of_sum = call.closed(ul.grad_and_hess)(x, given, reduction="sum")
        return call(x, given), *call.closed(ul.value_and_grad)(x, given), *of_sum

    calls = (sample, targets), (sample.beside(np.asarray), sample.targets)
    for call in calls:
        run(*call)
    with jax.transfer_guard("disallow"):
        found = [run(*call) for call in calls]
    value, _, *others = right(sample)
    for results in found:
        for got, numbers in zip(results, (value, *others), strict=True):
            check(got, numbers)


def test_no_transfers_of_activations():
    x = jnp.ones((2, 3))
    calls = [ul.softmax, ul.log_softmax, ul.sigmoid, ul.log_sigmoid, functools.partial(ul.log_softmax, axis=0)]
    for guard in ("allow", "disallow"):
        with jax.transfer_guard(guard):
            for call in calls:
                call(x)


# --- Long rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 20_000), *(pytest.param(*shape, marks=FULL) for shape in ((2, 20_000), (1, 1_000_000)))]
)
@pytest.mark.parametrize(
    "kind",
    [
        "smoothed",
        "nll",
        *(pytest.param(kind, marks=FULL) for kind in ("indices", "distribution", "cross_entropy", "multilabel")),
    ],
)
def test_long_rows_of_equal_numbers(kind, rows, classes):
    """The error of a sum must not grow with its length: added up one by one, all would be rounded the same way."""
    x, z = np.full((rows, classes), -0.3, "float32"), np.full((rows, classes), 1 / classes, "float32")
    x[:, 7] = -0.1
    loss, targets, options = ul.softmax_nll, z, {}
    weights, wide = z.astype("float64"), x.astype("float64")
    if kind in ("indices", "smoothed"):
        targets, smoothing = np.full(rows, 7), 0.1 * (kind == "smoothed")
        weights = np.broadcast_to(smoothing / classes + (1 - smoothing) * (np.arange(classes) == 7), x.shape)
        options = {"label_smoothing": smoothing}
    shares = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    losses, up, down = weights * -np.log(shares), shares * weights.sum(-1, keepdims=True), weights
    if kind == "nll":
        loss, losses, up, down = ul.nll, weights * -wide, 0 * weights, weights
    if kind == "cross_entropy":
        x = np.exp(x)
        wide = x.astype("float64")
        loss, losses, up, down = ul.cross_entropy, weights * -np.log(wide), 0 * weights, weights / wide
    if kind == "multilabel":
        loss, targets = ul.multilabel_logistic_loss, np.ones(x.shape, "int8")
        losses, up, down = np.log1p(np.exp(-wide)), 0 * wide, 1 / (1 + np.exp(wide))
    call = functools.partial(loss, reduction="sum", **options)
    closed = functools.partial(ul.value_and_grad(loss), reduction="sum", **options)
    for run in (jax.jit(jax.value_and_grad(call)), closed):
        value, gradient = run(jnp.array(x), targets)
        check(value, np.float64(math.fsum(losses.ravel())), "float32", ulp=25)
        check(gradient, exactly(up - down, up + down), "float32", ulp=28)


# --- Large arrays, whose value is computed apart from the gradient ----------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "target", "weight", "adds"),
    [
        (math.inf, 1, 1, 0),
        (-math.inf, 0, 1, 0),
        (math.inf, 0, 1, math.inf),
        (-math.inf, 1, 1, math.inf),
        (math.nan, 0, 1, math.nan),
        (math.nan, 1, 0, math.nan),
        (math.inf, 0, 0, 0),
        (-math.inf, 1, 0, 0),
        (math.inf, 0, -1, -math.inf),
        (math.inf, 0, 1e-30, math.inf),
        (3e38, 0, 1e-30, 3e8),
        (3e38, 0, -1e-30, -3e8),
    ],
)
def test_one_odd_logit_among_a_million(logit, target, weight, adds):
    rng = np.random.default_rng(20261121)
    x = rng.normal(0, 5, (1024, 1025)).astype("float32")
    z, w = rng.integers(0, 2, x.shape), rng.uniform(0.5, 2, x.shape).astype("float32")
    away = np.float64(np.where(z, -x, x))  # from the target
    losses, derivatives = w * np.logaddexp(0, away), w * np.where(z, -1, 1) / (1 + np.exp(-away))
    place = tuple(rng.integers(0, x.shape))
    x[place], z[place], w[place] = logit, target, weight
    losses[place] = adds
    derivatives[place] = logit if math.isnan(logit) else weight * ((logit > 0) - target)

    loss = functools.partial(ul.multilabel_logistic_loss, reduction="sum")
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x), z, weight=w)
    also, gradient_too = ul.value_and_grad(ul.multilabel_logistic_loss)(jnp.asarray(x), z, weight=w, reduction="sum")
    for total in (value, also, loss(jnp.asarray(x), z, weight=w)):
        check(total, losses.sum(), "float32", ulp=24)
    for pulled_back in (gradient, gradient_too):
        check(pulled_back, derivatives, "float32", ulp=4)


def test_shard_map_with_weights_that_all_have(monkeypatch):
    """Logits differ between the devices, and weights do not."""
    module = importlib.import_module("unilabel.backends.jax")
    monkeypatch.setattr(module, "LARGE", 0)
    x, z, w = np.linspace(-5, 5, 104).reshape(8, 13), np.arange(104).reshape(8, 13) % 2, np.linspace(0.5, 2, 13)

    def mean(x, z, w):
        return jax.lax.pmean(ul.multilabel_logistic_loss(x, z, pos_weight=w, reduction="mean"), "rows")

    eight = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    whole = jax.shard_map(mean, mesh=eight, in_specs=(P("rows"), P("rows"), P()), out_specs=P())
    value = jax.jit(whole)(x, z, w)
    check(value, np.where(z, w * np.logaddexp(0, -x), np.logaddexp(0, x)).mean())


# --- The compiled programs --------------------------------------------------------------------------------------------


@pytest.fixture
def programs():
    """What XLA compiles from here on."""
    compiled = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


@PLAIN
def test_label_smoothing_compiles_once(sample, programs):
    x, seen = jnp.array(sample.x), set()
    programs.clear()
    for step in range(50):
        seen.add(float(sample.loss(x, sample.targets, label_smoothing=step / 49)))
    assert len(seen) == 50
    assert len(programs) <= 2  # without smoothing, and with
    for step in range(50):
        ul.value_and_grad(sample.loss)(x, sample.targets, label_smoothing=step / 49)
    assert len(programs) <= 4


@pytest.mark.parametrize("sample", SEVERAL, indirect=True)
def test_equal_calls_compile_once(sample, programs):
    def call(rows, dtype, **options):
        programs.clear()
        x = jnp.array(np.tile(sample.x, (5, 1))[:rows], dtype)
        programs.clear()  # of making it
        sample(x, np.tile(sample.targets, (5, *[1] * (sample.targets.ndim - 1)))[:rows], **options)
        return len(programs)

    assert call(11, "float32") == 1  # shapes that no other test has
    assert call(11, "float32") == 0
    assert call(11, "float32", label_smoothing=0.0) == 0  # the default, spelt out
    assert call(11, "float64") == 1
    assert call(13, "float32") == 1
    assert call(13, "float32", reduction="sum") == 1
    assert [call(rows, "float32") for rows in (11, 13, 11)] == [0, 0, 0]
    assert call(13, "float32", reduction="sum") == 0
