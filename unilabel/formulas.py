"""Value, gradient and Hessian diagonal of each loss, once, in pure array API: the page that unilabel exists for.

Every function takes the array namespace `xp` first, has the class axis last and never looks across rows (but to sum the
result), so that a backend may run it whole, in tiles or traced. A loss is computed in three steps:

    masses                     what targets, weights, smoothing and masks come to: each class's share of the loss
    terms                      what value, gradient and Hessian have in common (the exponentials)
    value, gradient, hessian   closed forms in these terms

The value is written so that plain autodiff of it is right too: no framework depends on the closed form. The namespace
of a framework that has autodiff offers `stop_gradient` beside the standard's functions. Products with what may be
infinite are written `multiply`, not `*`, for a framework whose autodiff needs more care there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from . import lengths

Array = Any
Namespace = Any


class Operands(NamedTuple):
    """The arrays beside the logits, in the logits' framework and on their device; None where the caller gave none."""

    targets: Array
    weight: Array | None = None
    pos_weight: Array | None = None
    sample_weight: Array | None = None
    where: Array | None = None
    label_smoothing: Array | None = None  # of no dimensions: traced, or to be learned; a plain number is an option


class Options(NamedTuple):
    """What is not an array: hashable, so that compilers can key on it."""

    reduction: str
    axes: tuple[int, ...] = (-1,)  # the class axes; more or others than the last only for losses per element
    indices: bool = False  # the targets are class indices, not a distribution
    ignore_index: int | None = None
    label_smoothing: float | None = None  # None: none, or an operand
    eps: float = 0.0
    half: bool = False  # float16 and bfloat16 are computed in float32 and rounded once
    by_autodiff: bool = False  # the framework will differentiate the very expression
    finite: bool = False  # no care for infinite logits and wrong indices: where a loss that is not finite or an
    # IndexError comes out of it, the caller computes it again without this


class Masses(NamedTuple):
    """The input with its masked positions made harmless, and how much of the loss each of its classes carries."""

    x: Array
    mass: Any  # per element: (negative, positive, their sum), None where that is 1 (less positive); per row: the
    # weighted target distribution
    keep: Array | None  # False where the input does not exist
    parts: Array | None  # what each element or row adds to the divisor of reduction="mean"; None: 1 each


class Loss(NamedTuple):
    """One loss: how its targets become masses, and its closed forms."""

    name: str
    per_row: bool  # one loss per row (classes that exclude each other), not one per element
    masses: Callable[[Namespace, Array, Operands, Options], Masses]
    terms: Callable[[Namespace, Masses, Options], Any]
    value: Callable[[Namespace, Any], Array]
    gradient: Callable[[Namespace, Any], Array]  # less a factor for each row, if there is `scale`
    hessian: Callable[[Namespace, Any], Array]  # its diagonal
    scale: Callable[[Namespace, Any], Array] | None = None  # that factor: rows are multiplied once, with all there is


# --- The multilabel logistic loss -------------------------------------------------------------------------------------
#
#     L = negative · log(1 + exp x) + positive · log(1 + exp -x),    negative = w (1 - z),    positive = w pos_weight z


class LogisticTerms(NamedTuple):
    x: Array
    up: Array  # 1 where x >= 0, else 0
    e: Array  # exp -|x|
    negative: Array | None  # None: 1 less positive
    positive: Array
    both: Array | None  # the sum of the two; None: 1
    by_autodiff: bool
    finite: bool


def logistic_terms(xp: Namespace, masses: Masses, options: Options) -> LogisticTerms:
    x, (negative, positive, both) = masses.x, masses.mass
    up = xp.step(x) if _has(xp, "step") else xp.astype(x >= 0, x.dtype)
    # Arithmetic costs less than a select. It also differentiates right at x = 0, which the functions for it do not.
    size = xp.multiply(x, 2 * up - 1) if options.by_autodiff else xp.abs(x)
    return LogisticTerms(x, up, xp.exp(-size), negative, positive, both, options.by_autodiff, options.finite)


def logistic_value(xp: Namespace, t: LogisticTerms) -> Array:
    near = xp.log1p(t.e)
    # What the loss grows by with x, far from 0: negative on the one side, less positive on the other.
    slope = t.up - t.positive if t.negative is None else t.up * t.negative - (1 - t.up) * t.positive
    far = _product(xp, slope, t.x, t.finite)
    return far + (near if t.both is None else near * t.both)


def logistic_gradient(xp: Namespace, t: LogisticTerms) -> Array:
    e_up, e_down = _sides(xp, t)
    negative = 1 - t.positive if t.negative is None else t.negative
    return (negative * e_up - t.positive * e_down) / (1 + t.e)


def _sides(xp: Namespace, t: LogisticTerms) -> tuple[Array, Array]:
    """exp min(x, 0) and exp min(-x, 0)."""
    down = 1 - t.up
    if t.by_autodiff:
        return t.up + down * t.e, t.up * t.e + down
    return xp.maximum(t.up, t.e), xp.maximum(down, t.e)


def logistic_hessian(xp: Namespace, t: LogisticTerms) -> Array:
    curvature = t.e / ((1 + t.e) * (1 + t.e))
    return curvature if t.both is None else t.both * curvature


# The same for a namespace that has log(1 + exp x), 1 / (1 + exp -x), max(x, 0) and a (1 - t) + b t, right to the last
# digits and each in one go. (The first and the third will do for the value.)


class FusedTerms(NamedTuple):
    x: Array
    minus: Array
    negative: Array | None
    positive: Array
    both: Array | None
    finite: bool


def fused_terms(xp: Namespace, masses: Masses, options: Options) -> FusedTerms:
    negative, positive, both = masses.mass
    return FusedTerms(masses.x, -masses.x, negative, positive, both, options.finite)


def fused_value(xp: Namespace, t: FusedTerms) -> Array:
    near = xp.softplus(xp.minimum(t.x, t.minus))
    above, below = xp.relu(t.x), xp.relu(t.minus)
    if t.negative is None and t.finite:
        return near + xp.lerp(above, below, t.positive)
    negative = 1 - t.positive if t.negative is None else t.negative
    far = _product(xp, negative, above, t.finite) + _product(xp, t.positive, below, t.finite)
    return far + (near if t.both is None else near * t.both)


def fused_gradient(xp: Namespace, t: FusedTerms) -> Array:
    p, q = xp.sigmoid(t.x), xp.sigmoid(t.minus)
    return xp.lerp(p, -q, t.positive) if t.negative is None else t.negative * p - t.positive * q


# --- Binary cross-entropy on probabilities ----------------------------------------------------------------------------
#
#     L = -negative · log max(1 - p, eps) - positive · log max(p, eps)


class BinaryTerms(NamedTuple):
    p: Array
    p_free: Array  # True where the clamp leaves p alone, and so has a derivative
    q_free: Array  # the same for 1 - p
    negative: Array
    positive: Array
    floor: float


def binary_terms(xp: Namespace, masses: Masses, options: Options) -> BinaryTerms:
    p, (negative, positive, _) = masses.x, masses.mass
    negative = 1 - positive if negative is None else negative
    return BinaryTerms(
        p,
        _free(xp, p, positive, options.eps),
        _free(xp, 1 - p, negative, options.eps),
        negative,
        positive,
        _log(options.eps),
    )


def binary_value(xp: Namespace, t: BinaryTerms) -> Array:
    log_p = _clamped_log(xp, t.p, t.p_free, t.floor)
    small = t.p < 0.25  # only there log1p is needed, and XLA's loses seven bits from -0.3 to -0.5 in float64
    log_q = xp.where(
        small,
        xp.log1p(-xp.where(small, t.p, 0.0)),
        _clamped_log(xp, xp.where(small, 1.0, 1 - t.p), t.q_free, t.floor),
    )
    return _product(xp, t.negative, -log_q) + _product(xp, t.positive, -log_p)


def binary_gradient(xp: Namespace, t: BinaryTerms) -> Array:
    return _quotient(xp, t.negative, 1 - t.p, t.q_free) - _quotient(xp, t.positive, t.p, t.p_free)


def binary_hessian(xp: Namespace, t: BinaryTerms) -> Array:
    q = 1 - t.p
    by_q = _quotient(xp, _quotient(xp, t.negative, q, t.q_free), q, t.q_free)
    return by_q + _quotient(xp, _quotient(xp, t.positive, t.p, t.p_free), t.p, t.p_free)


# --- Softmax + negative log-likelihood --------------------------------------------------------------------------------
#
#     L = -Σ_c z_c log p_c,    p = softmax x,    -log p_c = (m - x_c) + log(1 + s),    m = max x
#
# s sums exp(x_c - m) over all classes but the largest, whose 1 stands in the logarithm. So no digit is lost where one
# class has nearly all the probability, nor where the logits are large.


class SoftmaxTerms(NamedTuple):
    d: Array  # x - m
    e: Array  # exp d
    others: Array  # the sum of e over all classes but the largest
    s: Array  # the same, and 1 for each class that ties with the largest
    z: Array
    move: Array | None  # only for autodiff, see below


def softmax_terms(xp: Namespace, masses: Masses, options: Options) -> SoftmaxTerms:
    x, move = masses.x, None
    m = xp.max(x, axis=-1, keepdims=True)
    m = xp.where(m == math.inf, m, _constant(xp, m))  # an infinite logit takes all: then the others' loss is its own
    top = x == m
    d = xp.where(top & (m == math.inf), 0.0, x - m)
    e = xp.exp(d)
    others = xp.sum(xp.where(top, 0.0, e), axis=-1, keepdims=True)
    # How many are largest: with a derivative if there has to be one.
    tops = xp.where(top, e, 0.0) if options.by_autodiff else xp.astype(top, x.dtype)
    s = others + (xp.sum(tops, axis=-1, keepdims=True) - 1)
    if options.by_autodiff:
        # Moving one logit is moving all the others the other way. Where a class has more than half of the probability,
        # this is how it moves: by `move`, which is 0, and its own e has no derivative that p - 1 could cancel with.
        sure = _constant(xp, s) < 1
        move = xp.where(sure, xp.sum(xp.where(top, d, 0.0), axis=-1, keepdims=True), 0.0)
        others = others * xp.exp(-move)
        s = xp.where(sure, others, s)
    return SoftmaxTerms(d, e, others, s, masses.mass, move)


def _log_ratios(xp: Namespace, t: SoftmaxTerms) -> Array:
    """log p + log(1 + s)."""
    return t.d if t.move is None else xp.where(t.e > t.s, 0.0, t.d - t.move)


def _shares(xp: Namespace, t: SoftmaxTerms) -> tuple[Array, Array, Any]:
    """p and 1 - p, neither by way of the other where it is small, and what both are to be divided by."""
    if t.move is None:
        return t.e, (1 - t.e) + t.s, 1 + t.s
    # The same numbers; a derivative of the latter would cancel, and selecting takes longer.
    sure = t.e > t.s
    p = xp.where(sure, 1.0, t.e * xp.exp(-t.move)) / (1 + t.s)
    return p, xp.where(sure, t.others / (1 + t.s), 1 - p), 1


def softmax_value(xp: Namespace, t: SoftmaxTerms) -> Array:
    far = xp.sum(_product(xp, t.z, -_log_ratios(xp, t)), axis=-1)
    return far + xp.sum(t.z, axis=-1) * xp.squeeze(xp.log1p(t.s), axis=-1)


def softmax_gradient(xp: Namespace, t: SoftmaxTerms) -> Array:
    # p_c Σ_k z_k - z_c without the cancellation: p_c times the other targets, less z_c times the other probabilities.
    largest = xp.max(t.z, axis=-1, keepdims=True)
    top = t.z == largest
    ties = xp.sum(xp.astype(top, t.z.dtype), axis=-1, keepdims=True)
    rest = xp.sum(xp.where(top, 0.0, t.z), axis=-1, keepdims=True) + (ties - 1) * largest
    p, q, total = _shares(xp, t)
    return (p * ((largest - t.z) + rest) - t.z * q) / total


def softmax_hessian(xp: Namespace, t: SoftmaxTerms) -> Array:
    # Σ_k z_k · p_c (1 - p_c)
    p, q, total = _shares(xp, t)
    return xp.sum(t.z, axis=-1, keepdims=True) * (p / total) * (q / total)


# The same where one class, t, carries all of a row's loss, with nothing to derive again:
#
#     L = w log(1 + s / e_t),    s = Σ_{c≠t} e_c,    e_c = exp(x_c - m)


class IndexTerms(NamedTuple):
    t: Any  # as _pick and _put take it
    d_t: Array | None  # x_t - m; None: the e are probabilities
    e: Array  # exp(x - m), or a multiple of it, and 0 at t
    e_t: Array
    s: Array
    mass: Array | None  # one for each row; None: 1
    finite: bool


def index_terms(xp: Namespace, masses: Masses, options: Options) -> IndexTerms:
    x, (t, mass) = masses.x, masses.mass
    if options.finite and _has(xp, "softmax"):
        d_t, e = None, xp.softmax(x)
        e_t = _pick(xp, e, t)  # where it has lost more digits than a logarithm can do without, s / e_t is infinite
    else:
        m, x_t = xp.max(x, axis=-1, keepdims=True), xp.expand_dims(_pick(xp, x, t), axis=-1)
        if options.finite:
            d, d_t = x - m, x_t - m
        else:
            # inf - inf, which is NaN, is 0 here; -inf less -inf stays so: then no class can be.
            d, d_t = xp.where(x == math.inf, 0.0, x - m), xp.where(x_t == math.inf, 0.0, x_t - m)
        d_t = xp.squeeze(d_t, axis=-1)
        e, e_t = xp.exp(d), xp.exp(d_t)
    e = _put(xp, e, t, 0.0)
    return IndexTerms(t, d_t, e, e_t, xp.sum(e, axis=-1), mass, options.finite)


def index_value(xp: Namespace, t: IndexTerms) -> Array:
    # Of e: log(s + e_t) - d_t. If t is the largest, e_t is 1 and d_t is 0; if not, s is 1 or more.
    values = xp.log1p(t.s / t.e_t) if t.d_t is None else xp.log1p(t.s + (t.e_t - 1)) - t.d_t
    return values if t.mass is None else _product(xp, t.mass, values, t.finite)


def index_gradient(xp: Namespace, t: IndexTerms) -> Array:
    return _put(xp, t.e, t.t, -t.s)


def index_scale(xp: Namespace, t: IndexTerms) -> Array:
    # Probabilities add up to 1 but for the digits that a native softmax loses in long rows: these are put right, too.
    return (1 if t.mass is None else t.mass) / (t.s + t.e_t)


def _pick(xp: Namespace, x: Array, t: Array) -> Array:
    """x_t of each row. Where the namespace has no `pick`, t says of each class whether it is the one."""
    return xp.pick(x, t) if _has(xp, "pick") else xp.sum(xp.where(t, x, 0.0), axis=-1)


def _put(xp: Namespace, x: Array, t: Array, values: Any) -> Array:
    """x with the values in the place of x_t. The namespace's `replace`, which goes with `pick`, may write into x."""
    if _has(xp, "pick"):
        return xp.replace(x, t, values)
    return xp.where(t, values if isinstance(values, float) else xp.expand_dims(values, axis=-1), x)


# --- Cross-entropy on probabilities, and on log-probabilities ---------------------------------------------------------
#
#     L = -Σ_c z_c log max(p_c, eps)


class CategoricalTerms(NamedTuple):
    p: Array
    free: Array  # True where the clamp leaves p alone, and so has a derivative
    z: Array
    floor: float


def categorical_terms(xp: Namespace, masses: Masses, options: Options) -> CategoricalTerms:
    return CategoricalTerms(masses.x, _free(xp, masses.x, masses.mass, options.eps), masses.mass, _log(options.eps))


def categorical_value(xp: Namespace, t: CategoricalTerms) -> Array:
    log_p = _clamped_log(xp, t.p, t.free, t.floor)
    return xp.sum(_product(xp, t.z, -log_p), axis=-1)


def categorical_gradient(xp: Namespace, t: CategoricalTerms) -> Array:
    return -_quotient(xp, t.z, t.p, t.free)


def categorical_hessian(xp: Namespace, t: CategoricalTerms) -> Array:
    return _quotient(xp, _quotient(xp, t.z, t.p, t.free), t.p, t.free)


def nll_terms(xp: Namespace, masses: Masses, options: Options) -> Masses:
    return masses


def nll_value(xp: Namespace, t: Masses) -> Array:
    return xp.sum(_product(xp, t.mass, -t.x), axis=-1)


def nll_gradient(xp: Namespace, t: Masses) -> Array:
    return -t.mass


def nll_hessian(xp: Namespace, t: Masses) -> Array:
    return 0 * t.mass


# --- From targets to masses -------------------------------------------------------------------------------------------


def element_masses(xp: Namespace, x: Array, operands: Operands, options: Options) -> Masses:
    """Independent classes: each element's share of the loss of label 0 and of label 1."""
    targets, weight, pos_weight, _, keep, _ = operands
    z, smoothing = xp.astype(targets, x.dtype, copy=False), _smoothing(xp, x, operands, options)
    weight = None if weight is None else xp.astype(weight, x.dtype, copy=False)
    pos_weight = None if pos_weight is None else xp.astype(pos_weight, x.dtype, copy=False)
    parts = None
    if keep is not None:
        # Masked before the arithmetic: a NaN that stands there must not reach a derivative either.
        parts = xp.where(keep, xp.ones_like(x), 0.0)
        x, z = xp.where(keep, x, 0.0), xp.where(keep, z, 0.0)
        weight = parts if weight is None else xp.where(keep, weight, 0.0)
        pos_weight = None if pos_weight is None else xp.where(keep, pos_weight, 1.0)
    if weight is None and pos_weight is None and smoothing is None:
        return Masses(x, (None, z, None), keep, parts)
    negative, positive = 1 - z, z
    if smoothing is not None:
        negative = negative * (1 - smoothing) + smoothing / 2
        positive = positive * (1 - smoothing) + smoothing / 2
    if pos_weight is not None:
        positive = positive * pos_weight
    if weight is not None:
        negative, positive = negative * weight, positive * weight
    both = None if weight is None and pos_weight is None else negative + positive
    return Masses(x, (negative, positive, both), keep, parts)


def row_masses(xp: Namespace, x: Array, operands: Operands, options: Options, masked: float) -> Masses:
    """Classes that exclude each other: each class's share of the row's loss. A masked input is set to `masked`."""
    targets, weight, _, sample_weight, keep, _ = operands
    smoothing = _smoothing(xp, x, operands, options)
    ignored = wrong = None
    if options.indices:
        classes = _classes(xp, x)
        targets = xp.astype(targets, classes.dtype, copy=False)
        named = classes == xp.expand_dims(targets, axis=-1)
        if keep is not None:
            named = xp.logical_and(named, keep)
        z = xp.astype(named, x.dtype)
        wrong = ~xp.any(named, axis=-1)
        if options.ignore_index is not None:
            ignored = targets == options.ignore_index
    else:
        z = xp.astype(targets, x.dtype, copy=False)
        z = z if keep is None else xp.where(keep, z, 0.0)
    if keep is not None:
        empty = ~xp.any(keep, axis=-1)
        ignored = empty if ignored is None else xp.logical_or(ignored, empty)

    parts = None
    if weight is not None:
        weight = xp.astype(weight, x.dtype, copy=False)
        weight = weight if keep is None else xp.where(keep, weight, 0.0)
        if options.indices and smoothing is None:  # an infinite weight of a class that is not there
            weight = xp.where(named, weight, 0.0)
        parts = xp.sum(z * weight, axis=-1)
    if sample_weight is not None:
        sample_weight = xp.astype(sample_weight, x.dtype, copy=False)
        if ignored is not None:
            sample_weight = xp.where(ignored, 0.0, sample_weight)
        parts = sample_weight if parts is None else parts * sample_weight
    if ignored is not None:
        parts = xp.astype(~ignored, x.dtype) if parts is None else xp.where(ignored, 0.0, parts)

    if smoothing is not None:
        if keep is None:
            z = z * (1 - smoothing) + smoothing / lengths.count(xp, x, (-1,))
        else:
            count = xp.sum(xp.astype(keep, x.dtype), axis=-1, keepdims=True)
            uniform = xp.where(keep, smoothing / xp.where(count == 0, 1.0, count), 0.0)
            z = z * (1 - smoothing) + uniform
    if weight is not None:
        z = z * weight
    if sample_weight is not None:
        z = z * xp.expand_dims(sample_weight, axis=-1)
    if wrong is not None:
        if ignored is not None:  # not even NaN for a moment, which jax_debug_nans would report
            wrong = xp.logical_and(wrong, ~ignored)
        z = xp.where(xp.expand_dims(wrong, axis=-1), math.nan, z)
    if keep is not None:
        x = xp.where(keep, x, masked)
    if ignored is not None:
        gone = xp.expand_dims(ignored, axis=-1)
        x, z = xp.where(gone, 0.0, x), xp.where(gone, 0.0, z)
        keep = ~gone if keep is None else xp.logical_and(keep, ~gone)
    return Masses(x, z, keep, parts)


def index_masses(xp: Namespace, x: Array, operands: Operands, options: Options) -> Masses:
    """The class that carries a row's loss, and how much; for indices with neither smoothing nor masked classes."""
    targets, weight, _, sample_weight, _, _ = operands
    direct = _has(xp, "pick")
    classes: Any = None if direct else _classes(xp, x)
    targets = xp.as_index(targets) if direct else xp.astype(targets, classes.dtype, copy=False)
    ignored = None if options.ignore_index is None else targets == options.ignore_index
    wrong = None if options.finite else (targets < 0) | (targets >= lengths.extent(xp, x, -1))  # else `pick` raises
    off = ignored if wrong is None else wrong
    index = targets if off is None else xp.where(off, 0, targets)
    t = xp.position(x, index) if direct else classes == xp.expand_dims(index, axis=-1)

    mass = None
    if weight is not None:
        weight = xp.astype(weight, x.dtype, copy=False)
        mass = xp.take(weight, index) if direct else xp.sum(xp.where(t, weight, 0.0), axis=-1)
    if sample_weight is not None:
        sample_weight = xp.astype(sample_weight, x.dtype, copy=False)
        mass = sample_weight if mass is None else mass * sample_weight
    if ignored is not None:
        mass = xp.astype(~ignored, x.dtype) if mass is None else xp.where(ignored, 0.0, mass)
    parts = mass
    if wrong is not None:
        if weight is not None:
            parts = xp.where(wrong, 0.0, parts)
        wrong = wrong if ignored is None else xp.logical_and(wrong, ~ignored)
        mass = xp.where(wrong, math.nan, xp.astype(~wrong, x.dtype) if mass is None else mass)
    keep = None
    if ignored is not None:
        keep = xp.expand_dims(~ignored, axis=-1)
        x = x if options.finite else xp.where(keep, x, 0.0)
    return Masses(x, (t, mass), keep, parts)


def softmax_masses(xp: Namespace, x: Array, operands: Operands, options: Options) -> Masses:
    return row_masses(xp, x, operands, options, masked=-math.inf)  # out of the softmax


def probability_masses(xp: Namespace, x: Array, operands: Operands, options: Options) -> Masses:
    return row_masses(xp, x, operands, options, masked=0.0)


LOGISTIC = Loss(
    "multilabel_logistic_loss",
    False,
    element_masses,
    logistic_terms,
    logistic_value,
    logistic_gradient,
    logistic_hessian,
)
FUSED = LOGISTIC._replace(terms=fused_terms, value=fused_value, gradient=fused_gradient)
BINARY = Loss(
    "binary_cross_entropy", False, element_masses, binary_terms, binary_value, binary_gradient, binary_hessian
)
SOFTMAX = Loss("softmax_nll", True, softmax_masses, softmax_terms, softmax_value, softmax_gradient, softmax_hessian)
INDEX = SOFTMAX._replace(
    masses=index_masses, terms=index_terms, value=index_value, gradient=index_gradient, scale=index_scale
)
CATEGORICAL = Loss(
    "cross_entropy",
    True,
    probability_masses,
    categorical_terms,
    categorical_value,
    categorical_gradient,
    categorical_hessian,
)
NLL = Loss("nll", True, probability_masses, nll_terms, nll_value, nll_gradient, nll_hessian)


# --- The whole computation: what a backend calls ----------------------------------------------------------------------


def _shortest(xp: Namespace, loss: Loss, options: Options, operands: Operands) -> Loss:
    """The loss in the form whose value and gradient take the least work. (Only the first has a Hessian.)"""
    if loss == LOGISTIC and _has(xp, "softplus"):
        return FUSED
    smoothed = options.label_smoothing is not None or operands.label_smoothing is not None
    plain = options.indices and not smoothed and operands.where is None
    return INDEX if loss == SOFTMAX and plain and not options.by_autodiff else loss


def _prepared(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> tuple[Loss, Masses]:
    """The loss in its shortest form, and its masses, in the dtype that is computed in."""
    loss = _shortest(xp, loss, options, operands)
    return loss, loss.masses(xp, _working(xp, x, options), operands, options)


def value(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, *, by_autodiff: bool = False
) -> Array:
    """The reduced loss. `by_autodiff`: the framework will differentiate this very expression by the logits."""
    options = options._replace(by_autodiff=by_autodiff)
    loss, masses = _prepared(xp, loss, options, x, operands)
    values = loss.value(xp, loss.terms(xp, masses, options))
    return xp.astype(_reduced(xp, values, divided_by(xp, loss, masses, options), options), x.dtype, copy=False)


def gradient(
    xp: Namespace,
    loss: Loss,
    options: Options,
    x: Array,
    operands: Operands,
    cotangent: Array,
    *,
    by_autodiff: bool = False,
) -> Array:
    """The cotangent of the reduced loss times its derivative by the logits. `by_autodiff`: to differentiate again."""
    options = options._replace(by_autodiff=by_autodiff)
    loss, masses = _prepared(xp, loss, options, x, operands)
    slopes = _slopes(xp, loss, loss.terms(xp, masses, options))
    scale = xp.astype(cotangent, masses.x.dtype, copy=False)
    slopes = _scaled(xp, loss, options, slopes, scale, divided_by(xp, loss, masses, options), masses)
    return xp.astype(slopes, x.dtype, copy=False)


def value_and_gradient(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Array]:
    """The reduced loss and the derivative of its sum by the logits, the exponentials computed once."""
    total, slopes, divisor, masses = value_and_slopes(xp, loss, options, x, operands)
    slopes = _scaled(xp, loss, options, slopes, None, divisor, masses)
    return total, xp.astype(slopes, x.dtype, copy=False)


def value_and_slopes(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Slopes, Divisor | None, Masses]:
    """The reduced loss, and slopes and a divisor, which are its gradient once multiplied with a `factor`."""
    loss, masses = _prepared(xp, loss, options, x, operands)
    terms = loss.terms(xp, masses, options)
    divisor = divided_by(xp, loss, masses, options)
    total = _reduced(xp, loss.value(xp, terms), divisor, options)
    return xp.astype(total, x.dtype, copy=False), _slopes(xp, loss, terms), divisor, masses


def gradient_and_hessian(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Array, Array]:
    """The derivative of the sum of the losses by the logits, and the diagonal of the second derivative."""
    masses = loss.masses(xp, _working(xp, x, options), operands, options)
    terms = loss.terms(xp, masses, options)
    divisor = divided_by(xp, loss, masses, options)
    slopes, curvatures = (
        _scaled(xp, loss, options, Slopes(derivative(xp, terms)), None, divisor, masses)
        for derivative in (loss.gradient, loss.hessian)
    )
    return xp.astype(slopes, x.dtype, copy=False), xp.astype(curvatures, x.dtype, copy=False)


def slopes(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, *, by_autodiff: bool = False
) -> Array:
    """The derivative of each loss by its own logits, before the reduction. `by_autodiff`: to differentiate again."""
    options = options._replace(by_autodiff=by_autodiff)
    loss, masses = _prepared(xp, loss, options, x, operands)
    found, scale = _slopes(xp, loss, loss.terms(xp, masses, options))
    return found if scale is None else found * xp.expand_dims(scale, axis=-1)


def pushforward(
    xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands, slopes: Array, tangent: Array
) -> Array:
    """The derivative of the reduced loss in the direction of the logits' tangent."""
    loss, masses = _prepared(xp, loss, options, x, operands)
    tangent = xp.astype(tangent, masses.x.dtype, copy=False)
    change = slopes * (tangent if masses.keep is None else xp.where(masses.keep, tangent, 0.0))
    change = xp.sum(change, axis=-1) if loss.per_row else change
    return xp.astype(_reduced(xp, change, divided_by(xp, loss, masses, options), options), x.dtype, copy=False)


def parts(xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands) -> Array | None:
    """What the losses add to the divisor of reduction="mean"; None: 1 each."""
    _, masses = _prepared(xp, loss, options, x, operands)
    return None if masses.parts is None else xp.sum(masses.parts)


def _reduced(xp: Namespace, values: Array, divisor: Any, options: Options) -> Array:
    if options.reduction == "none":
        return values
    return xp.sum(values) if divisor is None else mean(xp, xp.sum(values), divisor)


class Slopes(NamedTuple):
    """The derivative of each loss by its own logits, once each row is multiplied with the scale (None: 1)."""

    array: Array
    scale: Array | None = None


def _slopes(xp: Namespace, loss: Loss, terms: Any) -> Slopes:
    return Slopes(loss.gradient(xp, terms), None if loss.scale is None else loss.scale(xp, terms))


def factor(
    xp: Namespace, loss: Loss, options: Options, slopes: Slopes, cotangent: Array | None, divisor: Divisor | None
) -> Any:
    """What slopes are multiplied with: the cotangent (None: 1) over the divisor; None: nothing."""
    scale = cotangent
    if divisor is not None:
        scale = mean(xp, 1.0 if scale is None else scale, divisor)
    if slopes.scale is not None:
        scale = slopes.scale if scale is None else slopes.scale * scale
    elif scale is None or not (loss.per_row and options.reduction == "none"):
        return scale
    return xp.expand_dims(scale, axis=-1)


def _scaled(
    xp: Namespace,
    loss: Loss,
    options: Options,
    slopes: Slopes,
    cotangent: Array | None,
    divisor: Divisor | None,
    masses: Masses,
) -> Array:
    scale = factor(xp, loss, options, slopes, cotangent, divisor)
    scaled = slopes.array if scale is None else slopes.array * scale
    # Masked here as well: the cotangent may be anything there.
    return scaled if masses.keep is None else xp.where(masses.keep, scaled, 0.0)


class Divisor(NamedTuple):
    """What a sum is divided by to be a mean: how many take part, 1 for none; or the sum of their parts, an array."""

    count: Any
    parts: Array | None = None


def divided_by(xp: Namespace, loss: Loss, masses: Masses, options: Options) -> Divisor | None:
    """None: by nothing."""
    if options.reduction not in ("mean", "batchmean"):
        return None
    if options.reduction == "mean" and masses.parts is not None:
        return Divisor(None, xp.sum(masses.parts))
    return counted(xp, loss, masses.x, options)


def counted(xp: Namespace, loss: Loss, x: Array, options: Options) -> Divisor:
    """All examples, or for the mean of a loss per element all elements."""
    out = options.axes if loss.per_row or options.reduction == "batchmean" else ()
    return Divisor(lengths.count(xp, x, [axis for axis in range(-x.ndim, 0) if axis not in out]))


def mean(xp: Namespace, total: Any, divisor: Divisor) -> Any:
    """total / divisor, and 0 where nothing takes part (NaN if the total is)."""
    if divisor.parts is None:
        return total / divisor.count
    nothing = divisor.parts == 0
    return xp.where(nothing, 0 * total, total / xp.where(nothing, 1.0, divisor.parts))


# --- Activations ------------------------------------------------------------------------------------------------------


def sigmoid(xp: Namespace, x: Array, by_autodiff: bool) -> Array:
    if _has(xp, "softplus"):
        return xp.sigmoid(x)
    t = logistic_terms(xp, Masses(x, (0.0, 1.0, None), None, None), Options("none", by_autodiff=by_autodiff))
    return _sides(xp, t)[0] / (1 + t.e)


def log_sigmoid(xp: Namespace, x: Array, by_autodiff: bool) -> Array:
    if _has(xp, "softplus"):
        return -xp.softplus(-x)
    masses = Masses(x, (0.0, 1.0, None), None, None)
    return -logistic_value(xp, logistic_terms(xp, masses, Options("none", by_autodiff=by_autodiff)))


def softmax(xp: Namespace, x: Array, by_autodiff: bool) -> Array:
    p, _, total = _shares(xp, softmax_terms(xp, Masses(x, None, None, None), Options("none", by_autodiff=by_autodiff)))
    return p / total


def log_softmax(xp: Namespace, x: Array, by_autodiff: bool) -> Array:
    t = softmax_terms(xp, Masses(x, None, None, None), Options("none", by_autodiff=by_autodiff))
    return _log_ratios(xp, t) - xp.log1p(t.s)


def activation(
    xp: Namespace, function: Callable[..., Array], x: Array, half: bool, *, by_autodiff: bool = False
) -> Array:
    """An activation of x in its own dtype, half precision by way of float32. `by_autodiff` as in `value`."""
    working = xp.astype(x, xp.float32) if half else x
    return xp.astype(function(xp, working, by_autodiff), x.dtype, copy=False)


# --- Small things -----------------------------------------------------------------------------------------------------


def _has(xp: Namespace, function: str) -> bool:
    """Whether the namespace has a function that is not the standard's."""
    return getattr(xp, function, None) is not None


def _smoothing(xp: Namespace, x: Array, operands: Operands, options: Options) -> Any:
    """ε: None, a number, or an array, which nobody has checked: NaN where it is not from 0 to 1."""
    smoothing = operands.label_smoothing
    if smoothing is None:
        return options.label_smoothing
    smoothing = xp.astype(smoothing, x.dtype, copy=False)
    return xp.where((smoothing < 0) | (smoothing > 1), math.nan, smoothing)


def _working(xp: Namespace, x: Array, options: Options) -> Array:
    return xp.astype(x, xp.float32) if options.half else x


def _product(xp: Namespace, mass: Array, size: Array, finite: bool = False) -> Array:
    """mass · size, and 0 where an infinite size carries no mass."""
    if _has(xp, "step"):  # of arithmetic alone, without comparisons and selections, and nothing to differentiate
        # `abs` keeps compilers from multiplying the two constants, which makes infinity, and that times 0 is NaN.
        large = float(xp.finfo(size.dtype).max)
        most = xp.abs(mass * large) * large
        return xp.maximum(xp.minimum(size, most), -most) * mass
    return xp.multiply(size if finite else xp.where(xp.logical_and(mass == 0, xp.isinf(size)), 0.0, size), mass)


def _free(xp: Namespace, p: Array, mass: Array, eps: float) -> Array:
    """Where the logarithm of p counts: neither clamped, nor of a 0 that carries no mass."""
    return ~xp.logical_or(p < eps, xp.logical_and(p == 0, mass == 0))


def _clamped_log(xp: Namespace, p: Array, free: Array, floor: float) -> Array:
    """log p where p is free, else the floor, whose derivative is 0 but for NaN, which a wrong index makes."""
    return xp.where(free, xp.log(xp.where(free, p, 1.0)), floor + 0 * p)


def _quotient(xp: Namespace, mass: Array, p: Array, free: Array) -> Array:
    """mass / p where p is free, else 0; NaN wherever mass is."""
    quotient = mass / xp.where(free, p, 1.0)
    return xp.where(free, quotient, 0 * quotient)


def _log(eps: float) -> float:
    return math.log(eps) if eps > 0 else -math.inf


def _constant(xp: Namespace, x: Array) -> Array:
    stop_gradient = getattr(xp, "stop_gradient", None)
    return x if stop_gradient is None else stop_gradient(x)


def _classes(xp: Namespace, x: Array) -> Array:
    return xp.arange(lengths.extent(xp, x, -1), device=getattr(x, "device", None))
