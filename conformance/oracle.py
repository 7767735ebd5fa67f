"""The right answers: each loss and its gradient from its definition, in 200-bit arithmetic (mpmath).

It imports neither unilabel nor a framework, and shares no formula with either: σ, log and exp are written as in a
textbook, and precision takes the place of stable formulas. Beside each number stands the sum of its terms' magnitudes:
where terms cancel, no computation can do better than a few rounding errors of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mpmath import mp

from .cases import LOSSES, Case, Tensor, class_axes

BITS = 200
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

Number = Any  # mpf


class Exact(NamedTuple):
    """A number, the sum of its terms' magnitudes, and the error that rounding x - max x before exp may cause."""

    value: Number
    terms: Number
    shift: Number = 0  # in units of the dtype's epsilon, relative to the number; of rounded products, theirs too


class Expected(NamedTuple):
    """The answers to a case: the reduced loss and its derivatives, each a list of Exact in row-major order."""

    value: list[Exact]
    gradient: list[Exact]  # with respect to the logits, or the features, times the case's cotangent
    gradient_of_sum: list[Exact]  # the same with a cotangent of ones
    hessian: list[Exact]  # the diagonal, for the sum of the unreduced losses; empty for a linear layer's inputs
    target_gradient: list[Exact]  # by float targets, times the cotangent; empty without them, or if a loss is infinite
    summands: int  # how many numbers the reduction adds up
    linear_weight_gradient: Sequence[Exact] = ()
    linear_weight_gradient_of_sum: Sequence[Exact] = ()
    linear_bias_gradient: Sequence[Exact] = ()
    linear_bias_gradient_of_sum: Sequence[Exact] = ()


class Parts(NamedTuple):
    """The unreduced loss of an element or of a row, and its derivatives: each an Exact, or for a row a list of them."""

    value: Any
    gradient: Any
    hessian: Any  # its diagonal: the second derivatives
    label_losses: Any  # the loss of each label at a target weight of 1: of labels 0 and 1, or of each class of a row


def expected(case: Case) -> Expected:
    with mp.workprec(BITS):
        if case.positives:
            case = case._replace(targets=_dense(case), positives=False)
        if case.linear_weight is not None:
            return _of_layer(case, case.linear_weight)
        return _per_example(case) if LOSSES[case.loss].per_example else _elementwise(case)


# --- The definitions --------------------------------------------------------------------------------------------------


def softplus(x: Number) -> Number:
    """log(1 + exp x)"""
    return mp.log1p(mp.exp(x)) if x < 0 else x + mp.log1p(mp.exp(-x))


def logistic(x: Number) -> Number:
    """σ(x) = 1 / (1 + exp -x)"""
    return 1 / (1 + mp.exp(-x)) if x > 0 else mp.exp(x) / (1 + mp.exp(x))


def times(a: Number, b: Number) -> Number:
    """a b with 0 · ∞ = 0: a label of weight 0 adds no loss."""
    return mp.mpf(0) if (a == 0 and mp.isinf(b)) or (b == 0 and mp.isinf(a)) else a * b


def binary_on_logits(x: Number, negative: Number, positive: Number, *_: Number) -> Parts:
    if mp.isnan(x):
        return Parts(_nan(), _nan(), _nan(), (_nan(), _nan()))
    losses = softplus(x), softplus(-x)
    gradient = _sum([times(negative, logistic(x)), -times(positive, logistic(-x))])
    hessian = _sum([(negative + positive) * logistic(x) * logistic(-x)])
    return _element(losses, negative, positive, gradient, hessian)


def binary_on_probabilities(p: Number, negative: Number, positive: Number, eps: Number) -> Parts:
    if mp.isnan(p):
        return Parts(_nan(), _nan(), _nan(), (_nan(), _nan()))
    q = 1 - p
    losses = -_log(max(q, eps)), -_log(max(p, eps))
    by_q = _quotient(negative, q) if negative and q >= eps else mp.mpf(0)
    by_p = _quotient(positive, p) if positive and p >= eps else mp.mpf(0)
    hessian = _sum([_quotient(by_q, q) if by_q else mp.mpf(0), _quotient(by_p, p) if by_p else mp.mpf(0)])
    return _element(losses, negative, positive, _sum([by_q, -by_p]), hessian)


def _element(losses: Any, negative: Number, positive: Number, gradient: Exact, hessian: Exact) -> Parts:
    weights = negative, positive
    value = _sum([times(weight, loss) for weight, loss in zip(weights, losses, strict=True)])
    return Parts(value, gradient, hessian, [_label(loss, weight) for loss, weight in zip(losses, weights, strict=True)])


def softmax_of_row(x: list[Number], z: list[Number], *_: Number) -> Parts:
    """-Σ z log softmax x. A logit of -inf excludes its class; one of +inf takes all the probability."""
    if any(map(mp.isnan, [*x, *z])) or all(v == -mp.inf for v in x):
        nothing = [_nan() for _ in x]
        return Parts(_nan(), nothing, nothing, nothing)
    top = max(x)
    d = [mp.mpf(0) if v == top else v - top for v in x]
    e = [mp.exp(v) for v in d]
    # With logits in the thousands 1 - p would need thousands of bits: use the sums over the other classes.
    total, others_e = _leave_one_out(e)
    total_weight, others_z = _leave_one_out(z)
    largest = e.index(max(e))
    rest = others_e[largest]
    log_total = mp.log1p(rest)
    # If d is rounded, exp(d) is off by up to |d|/2 epsilons; a sum of them by their average, weighted by each exp(d).
    average = mp.fsum(times(w, -v) for w, v in zip(e, d, strict=True)) / (2 * rest) if rest else mp.mpf(0)
    in_total = average * rest / total
    terms = [times(w, log_total - v) for w, v in zip(z, d, strict=True)]
    loss = Exact(mp.fsum(terms), mp.fsum(map(abs, terms)), average)
    found: tuple[list[Exact], list[Exact], list[Exact]] = [], [], []  # gradient, Hessian diagonal, label losses
    done: dict[Any, tuple[Exact, Exact, Exact]] = {}  # long rows repeat a few different numbers
    for i in range(len(x)):
        same = d[i], z[i], others_e[i], others_z[i], i == largest
        if same not in done:
            up, down = e[i] / total * others_z[i], z[i] * others_e[i] / total
            own = -d[i] / 2 if mp.isfinite(d[i]) else mp.mpf(0)
            left = average if i == largest else mp.mpf(0)
            gradient = Exact(up - down, abs(up) + abs(down), (own if up else 0) + (left if down else 0) + in_total)
            second = total_weight * e[i] / total * others_e[i] / total
            hessian = Exact(second, abs(second), own + left + 2 * in_total)
            done[same] = gradient, hessian, _label(log_total - d[i], z[i], average)
        for exacts, exact in zip(found, done[same], strict=True):
            exacts.append(exact)
    return Parts(loss, *found)


def _leave_one_out(numbers: list[Number]) -> tuple[Number, list[Number]]:
    """The sum, and for each number the sum of the others: for the largest, added up, as a difference would cancel."""
    total = mp.fsum(numbers)
    largest = max(range(len(numbers)), key=lambda i: abs(numbers[i]))
    others = [total - number for number in numbers]
    others[largest] = mp.fsum(numbers[:largest] + numbers[largest + 1 :])
    return total, others


def categorical_on_probabilities(p: list[Number], z: list[Number], eps: Number) -> Parts:
    losses = [-_log(max(v, eps)) for v in p]
    value = _sum(times(w, loss) for w, loss in zip(z, losses, strict=True))
    free = [not (v < eps or (v == 0 and w == 0)) for v, w in zip(p, z, strict=True)]  # clamped, but not NaN
    gradient = [_quotient(-w, v) if f else 0 * w for v, w, f in zip(p, z, free, strict=True)]
    hessian = [_quotient(-g, v) if f else g for g, v, f in zip(gradient, p, free, strict=True)]
    labels = [_label(loss, w) for w, loss in zip(z, losses, strict=True)]
    return Parts(value, _each_once(gradient), _each_once(hessian), labels)


def nll_of_row(log_p: list[Number], z: list[Number], *_: Number) -> Parts:
    value = _sum(times(w, -v) for v, w in zip(log_p, z, strict=True))
    labels = [_label(-v, w) for v, w in zip(log_p, z, strict=True)]
    return Parts(value, _each_once([-w for w in z]), _each_once([0 * w for w in z]), labels)


def _label(loss: Number, weight: Number, shift: Number = 0) -> Exact:
    """The loss of a label at weight 1, the derivative of the value by its weight: 0 where the value has 0 · ∞ = 0."""
    return _zero() if weight == 0 and mp.isinf(loss) else _sum([loss])._replace(shift=shift)


# Of an element: its input, its weights of the labels 0 and 1, eps. Of a row: its inputs, its target weights, eps.
DEFINITIONS: dict[str, Callable[..., Parts]] = {
    "multilabel_logistic_loss": binary_on_logits,
    "softmax_nll": softmax_of_row,
    "binary_cross_entropy": binary_on_probabilities,
    "cross_entropy": categorical_on_probabilities,
    "nll": nll_of_row,
}


# --- Targets, weights, masks, reductions ------------------------------------------------------------------------------


def _elementwise(case: Case) -> Expected:
    options = case.options
    smoothing = mp.mpf(options.get("label_smoothing", 0.0))
    eps = mp.mpf(EPS[case.dtype] if options.get("eps") is None else options["eps"])
    values: list[Exact] = []
    gradient: list[Exact] = []
    hessian: list[Exact] = []
    by_target: list[Exact] = []
    counted = 0
    for index in _indices(case.logits.shape):
        if not _at(options.get("where"), index, True):
            for numbers in (values, gradient, hessian, by_target):
                numbers.append(_zero())
            continue
        counted += 1
        weights = _at(options.get("weight"), index, 1), _at(options.get("pos_weight"), index, 1)
        answers = element(case.loss, _at(case.logits, index), _at(case.targets, index), *weights, smoothing, eps)
        for numbers, number in zip((values, gradient, hessian, by_target), answers, strict=True):
            numbers.append(number)
    axes = class_axes(case.options, case.logits)
    examples = math.prod(n for i, n in enumerate(case.logits.shape) if i not in axes)
    divisor = {"mean": counted, "batchmean": examples}.get(options.get("reduction", "batchmean"), 1)
    owner = list(range(len(gradient)))
    reduction = options.get("reduction", "batchmean")
    return _reduced(case, reduction, values, gradient, hessian, by_target, owner, divisor)


@functools.lru_cache(maxsize=1 << 16)  # large cases repeat a few different numbers
def element(
    loss: str, x: float, z: float, weight: float, pos_weight: float, smoothing: Number, eps: Number
) -> tuple[Exact, Exact, Exact, Exact]:
    """The value, its first and second derivative by the logit, and its derivative by the target."""
    x, z, weight, pos_weight = map(mp.mpf, (x, z, weight, pos_weight))
    z = z * (1 - smoothing) + smoothing / 2
    negative, positive = weight * (1 - z), weight * pos_weight * z
    value, gradient, hessian, (of_0, of_1) = DEFINITIONS[loss](x, negative, positive, eps)
    change = weight * (1 - smoothing)
    return value, gradient, hessian, _added(_scaled(of_0, -change), _scaled(of_1, change * pos_weight))


def _per_example(case: Case) -> Expected:
    options, axes = case.options, class_axes(case.options, case.logits)
    smoothing = mp.mpf(options.get("label_smoothing", 0.0))
    eps = mp.mpf(EPS[case.dtype] if options.get("eps") is None else options["eps"])
    shape = case.logits.shape
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    positions = list(_indices(tuple(shape[i] for i in axes)))
    flat = {index: i for i, index in enumerate(_indices(shape))}
    values: list[Exact] = []
    gradient, hessian, by_target = ([_zero() for _ in flat] for _ in range(3))
    owner = [0] * len(gradient)
    divisor = mp.mpf(0)
    share: dict[int, Number] = {}  # the derivative of the divisor by each target
    for row, example in enumerate(_indices(batch)):
        places = [_insert(example, axes, position) for position in positions]
        for place in places:
            owner[flat[place]] = row
        keep = [_at(options.get("where"), place, True) for place in places]
        weights = [mp.mpf(_at(options.get("weight"), (c,), 1)) for c in range(len(places))]
        sample_weight = mp.mpf(_at(options.get("sample_weight"), example, 1))
        wrong = ignored = False
        if len(case.targets.shape) == len(batch):
            y = _at(case.targets, example)
            ignored = y == options.get("ignore_index")
            wrong = not (0 <= y < len(places) and keep[y])
            z = [mp.mpf(c == y) for c in range(len(places))]
        else:
            z = [mp.mpf(_at(case.targets, place)) for place in places]
        if ignored or not any(keep):
            values.append(_zero())
            continue
        z = [v if k else mp.mpf(0) for v, k in zip(z, keep, strict=True)]
        divisor += sample_weight * (
            mp.fsum(w * v for w, v, k in zip(weights, z, keep, strict=True) if k) if "weight" in options else 1
        )
        uniform = smoothing / sum(keep)
        z = [v * (1 - smoothing) + uniform for v in z]
        chosen = [i for i, k in enumerate(keep) if k]
        x = [mp.mpf(_at(case.logits, places[i])) for i in chosen]
        target_weights = [mp.nan if wrong else sample_weight * weights[i] * z[i] for i in chosen]
        value, *parts = DEFINITIONS[case.loss](x, target_weights, eps)
        values.append(value)
        scaled: dict[Any, Exact] = {}
        for i, first, second, label in zip(chosen, *parts, strict=True):
            at, same = flat[places[i]], (id(label), weights[i])
            if same not in scaled:
                scaled[same] = _scaled(label, sample_weight * weights[i] * (1 - smoothing))
            gradient[at], hessian[at], by_target[at] = first, second, scaled[same]
            share[at] = sample_weight * weights[i]
    reduction = options.get("reduction", "mean")
    if reduction == "mean" and "weight" in options and divisor:  # sum / divisor: both depend on the targets
        mean = _scaled(_total(values), -1 / divisor)
        for at, part in share.items():
            by_target[at] = _added(by_target[at], _scaled(mean, part))
    divisor = {"mean": divisor, "batchmean": len(values)}.get(reduction, 1)
    return _reduced(case, reduction, values, gradient, hessian, by_target, owner, divisor)


def _reduced(
    case: Case,
    reduction: str,
    values: list[Exact],
    gradient: list[Exact],
    hessian: list[Exact],
    by_target: list[Exact],
    owner: list[int],
    divisor: Number,
) -> Expected:
    """The answers, from those of the unreduced losses. `owner`: for each logit, the loss that it belongs to."""
    soft = case.targets.shape == case.logits.shape and all(isinstance(z, float) for z in case.targets.values)
    if not soft or any(mp.isinf(v.value) for v in values):
        by_target = []

    def pulled_back(numbers: list[Exact]) -> list[Exact]:
        if reduction != "none":
            return _all_scaled(numbers, mp.mpf(case.cotangent.values[0]))
        scaled: dict[Any, Exact] = {}
        for x, i in zip(numbers, owner[: len(numbers)], strict=True):
            if (id(x), i) not in scaled:
                scaled[id(x), i] = _scaled(x, mp.mpf(case.cotangent.values[i]))
        return [scaled[id(x), i] for x, i in zip(numbers, owner[: len(numbers)], strict=True)]

    if reduction == "none":
        return Expected(values, pulled_back(gradient), gradient, hessian, pulled_back(by_target), 1)
    factor = 1 / mp.mpf(divisor) if divisor else mp.mpf(0)  # a mean over nothing is 0
    of_sum, by_target = _all_scaled(gradient, factor), _all_scaled(by_target, factor)
    total = _scaled(_total(values), factor)
    return Expected([total], pulled_back(of_sum), of_sum, hessian, pulled_back(by_target), len(values))


def _dense(case: Case) -> Tensor:
    """The targets that are 1 at the labels of each example; with an index that is neither a label nor -1, NaN."""
    (axis,) = class_axes(case.options, case.logits)
    shape = case.shape
    values: list[Any] = []
    for *batch, c in ((*place[:axis], *place[axis + 1 :], place[axis]) for place in _indices(shape)):
        labels = [_at(case.targets, (*batch, k)) for k in range(case.targets.shape[-1])]
        wrong = any(not -1 <= label < shape[axis] for label in labels)
        values.append(math.nan if wrong else int(c in labels))
    return Tensor(shape, values)


# --- The last linear layer --------------------------------------------------------------------------------------------


def _of_layer(case: Case, weight: Tensor) -> Expected:
    """The answers of the logits x = f · Wᵀ + b; with g = dL/dx, dL/df = g · W, dL/dW = gᵀ · f and dL/db = Σ g."""
    features, weights = _rows(case.logits), _rows(weight)
    bias = case.options.get("linear_bias")
    biases = [mp.mpf(0)] * len(weights) if bias is None else list(map(mp.mpf, bias.values))
    sums = [[[*map(mp.fmul, f, w), b] for w, b in zip(weights, biases, strict=True)] for f in features]
    loss = LOSSES[case.loss]
    options = {name: given for name, given in case.options.items() if name != "linear_bias"}
    logits = Tensor(case.shape, [mp.fsum(terms) for row in sums for terms in row])
    answers = expected(case._replace(loss=loss.on_logits, logits=logits, options=options, linear_weight=None))

    # If a logit is off by e, p and 1 - p are off by e p (1 - p), and -log p by e (1 - p), which is at most -log p: each
    # by e relative to itself or less. In a softmax the others' error comes on top of its own.
    bits = 53 if case.dtype == "float64" else 24
    errors = [[_rounding(terms, bits) for terms in row] for row in sums]
    if loss.per_example:
        errors = [[2 * max(row)] * len(row) for row in errors]
    flat = [error for row in errors for error in row]
    largest = max(flat, default=mp.mpf(0))
    if case.options.get("reduction") != "none":
        of_values = [largest]
    else:
        of_values = [row[0] for row in errors] if loss.per_example else flat

    def moved(numbers: list[Exact], errors: list[Number]) -> list[Exact]:
        pairs = zip(numbers, errors, strict=True)
        return [number._replace(shift=number.shift + error) for number, error in pairs]

    answers = answers._replace(
        value=moved(answers.value, of_values),
        hessian=[],
        target_gradient=moved(answers.target_gradient, [largest] * len(answers.target_gradient)),
    )
    found: dict[str, Any] = {}
    for name in ("gradient", "gradient_of_sum"):
        of_logits = iter(moved(getattr(answers, name), flat))
        by_example = [[next(of_logits) for _ in weights] for _ in features]
        by_class = list(zip(*by_example, strict=True)) or [()] * len(weights)
        found[name] = [_weighted(g, w) for g in by_example for w in zip(*weights, strict=True)]
        columns = list(zip(*features, strict=True)) or [()] * weight.shape[1]
        found[f"linear_weight_{name}"] = [_weighted(g, f) for g in by_class for f in columns]
        if bias is not None:
            found[f"linear_bias_{name}"] = [_weighted(g, [mp.mpf(1)] * len(g)) for g in by_class]
    return answers._replace(**found)


def _rows(matrix: Tensor) -> list[list[Number]]:
    """The rows along the last axis."""
    n, length = math.prod(matrix.shape[:-1]), matrix.shape[-1]
    return [list(map(mp.mpf, matrix.values[i * length : (i + 1) * length])) for i in range(n)]


def _rounding(terms: list[Number], bits: int) -> Number:
    """How far rounded products, and a rounded sum of them in any order, may be off, in units of 2^(1 - bits)."""
    terms = [abs(x) for x in terms if x]
    total = mp.fsum(terms)
    if not terms or not mp.isfinite(total):
        return mp.mpf(0)
    step = mp.ldexp(1, min(x.man_exp[1] for x in terms))  # each product is a multiple of it
    return mp.mpf(0) if total <= mp.ldexp(step, bits) else total * len(terms) / 2


def _weighted(gradients: Sequence[Exact], factors: Sequence[Number]) -> Exact:
    """Σ g f"""
    pairs = list(zip(gradients, factors, strict=True))
    sizes = [g.terms * abs(f) for g, f in pairs]
    terms = mp.fsum(sizes)
    shifts = mp.fsum(g.shift * size for (g, _), size in zip(pairs, sizes, strict=True))
    shift = shifts / terms if terms and mp.isfinite(terms) else mp.mpf(0)
    return Exact(mp.fsum(g.value * f for g, f in pairs), terms, shift)


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _sum(terms: Any) -> Exact:
    terms = list(terms)
    return Exact(mp.fsum(terms), mp.fsum(map(abs, terms)))


def _each_once(numbers: list[Number]) -> list[Exact]:
    """Each number as an Exact: equal numbers share one object, as long rows repeat a few different numbers."""
    done = {x: _sum([x]) for x in numbers if not mp.isnan(x)}
    return [done[x] if x in done else _sum([x]) for x in numbers]


def _total(values: list[Exact]) -> Exact:
    value, terms = mp.fsum(v.value for v in values), mp.fsum(v.terms for v in values)
    return Exact(value, terms, max([v.shift for v in values], default=mp.mpf(0)))


def _added(a: Exact, b: Exact) -> Exact:
    return Exact(a.value + b.value, a.terms + b.terms, max(a.shift, b.shift))


def _scaled(exact: Exact, factor: Number) -> Exact:
    return Exact(exact.value * factor, exact.terms * abs(factor), exact.shift)


def _all_scaled(numbers: list[Exact], factor: Number) -> list[Exact]:
    """Each object scaled once: in a large case the same object stands in many places."""
    done = {id(x): _scaled(x, factor) for x in {id(x): x for x in numbers}.values()}
    return [done[id(x)] for x in numbers]


def _zero() -> Exact:
    return Exact(mp.mpf(0), mp.mpf(0))


def _nan() -> Exact:
    return Exact(mp.nan, mp.nan)


def _quotient(a: Number, b: Number) -> Number:
    return a / b if b else mp.sign(a) * mp.inf


def _log(p: Number) -> Number:
    return -mp.inf if p == 0 else mp.log(p)


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def _insert(example: tuple[int, ...], axes: list[int], position: tuple[int, ...]) -> tuple[int, ...]:
    """The index of a class of an example: its positions on the class axes, put among those on the batch axes."""
    rest = iter(example)
    chosen = dict(zip(axes, position, strict=True))
    return tuple(chosen[i] if i in chosen else next(rest) for i in range(len(example) + len(axes)))


def _at(tensor: Any, index: tuple[int, ...], default: Any = None) -> Any:
    """The element at an index, where a tensor broadcasts to it; a plain number has every index."""
    if tensor is None:
        return default
    if not isinstance(tensor, Tensor):
        return tensor
    place = 0
    for n, i in zip(tensor.shape, index[len(index) - len(tensor.shape) :], strict=True):
        place = place * n + (0 if n == 1 else i)
    return tensor.values[place]
