"""Small bugs, planted in the formulas or beside them one at a time: the conformance suite has to see every one.

python tests/mutations.py          all, two at a time (a few minutes)
python tests/mutations.py NAME …   these

Exits with 1 if one is not seen, or its text is not in the file exactly once. The activations, and second derivatives
of a softmax, are for other tests: the suite calls the losses, and differentiates once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent

NUMPY = ("--backend", "numpy", "--dtype", "float32")
HALF = ("--backend", "numpy", "--dtype", "float16", "--dtype", "bfloat16")
# NumPy has no autodiff: what pulls a cotangent back, or pushes a tangent forward, runs on torch and JAX only.
TORCH = ("--backend", "torch", "--dtype", "float32", "--case", "seed", "--case", "masked")
WIDE = ("--backend", "torch", "--dtype", "float64", "--case", "confident")
TORCH_HALF = ("--backend", "torch", "--dtype", "float16", "--case", "seed")
JAX = ("--backend", "jax", "--dtype", "float32", "--case", "seed", "--case", "masked")  # all would compile for minutes
# Has the native functions. A Hessian, and a gradient by targets, are by autodiff.
EAGER = ("--backend", "torch", "--dtype", "float32")
STRICT = ("--backend", "array_api_strict", "--dtype", "float32")  # has the namespace's defaults
LINEAR = (*NUMPY, "--case", "linear*")
LINEAR_HALF = (*HALF, "--case", "linear*")
POSITIVES = (*NUMPY, "--case", "positives")
POSITIVES_STRICT = (*STRICT, "--case", "positives")
LINEAR_TORCH = (*EAGER, "--case", "linear*")
LINEAR_JAX = ("--backend", "jax", "--dtype", "float32", "--case", "linear")
LINEAR_MLX = ("--backend", "mlx", "--dtype", "float32", "--case", "linear*")


class Mutation(NamedTuple):
    file: str  # from unilabel/
    right: str
    wrong: str
    arguments: tuple[str, ...] = NUMPY


NOTHING = Mutation("formulas/softmax.py", "import math\n", "import math\n")

# Of each file: right, wrong, and the arguments if they are not NUMPY.
BUGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "formulas/logistic.py": {
        "logistic: value, weights swapped": (
            "t.nonneg * negative - (1 - t.nonneg) * positive",
            "t.nonneg * positive - (1 - t.nonneg) * negative",
        ),
        "logistic: value, plain, targets as they are": ("t.nonneg - positive if", "t.nonneg + positive if"),
        "logistic: value, plain, without the side": ("t.nonneg - positive if", "0.5 - positive if"),
        "logistic: log1p written out": ("log_term = xp.log1p(t.e)", "log_term = xp.log(1 + t.e)"),
        "logistic: weights of the logarithm left out": (
            "xp.weigh_beside(weight, t.x) + (log_term if total is None else log_term * total)",
            "xp.weigh_beside(weight, t.x) + log_term",
        ),
        "logistic: exponent clamped": ("xp.exp(-xp.abs(x))", "xp.exp(-xp.minimum(xp.abs(x), xp.asarray(20.0)))"),
        "logistic: gradient, sign": ("(t.nonneg - positive) + minor", "(t.nonneg - positive) - minor"),
        "logistic: gradient, weighted, sign": ("(1 - t.nonneg) - minor", "(1 - t.nonneg) + minor"),
        "logistic: gradient as sigmoid - z": ("(t.nonneg - positive) + minor", "(t.nonneg + minor) - positive"),
        "logistic: gradient at 0": ("minor = (1 - 2 * t.nonneg)", "minor = (t.x != 0) * (1 - 2 * t.nonneg)"),
        "logistic: Hessian, square left out": ("(total * total)", "total"),
        "logistic: Hessian as p (1 - p)": ("t.e / (total * total)", "(1 / total) * (1 - 1 / total)"),
        "differentiable: |x| at 0": ("xp.multiply(x, 2 * nonneg - 1)", "xp.abs(x)", EAGER),
        "native: softplus of x": ("xp.softplus(-xp.abs(t.x))", "xp.softplus(t.x)", EAGER),
        "native: the labels' ramps swapped": ("xp.lerp(above, below,", "xp.lerp(below, above,", EAGER),
        "native: 0·inf": ("if negative is None and not xp.assume_finite:", "if False:", EAGER),
        "native: weights of the logarithm left out": (
            "linear_term + (log_term if total is None else log_term * total)",
            "linear_term + log_term",
            EAGER,
        ),
        "native: gradient with 1 - p": ("xp.sigmoid(t.x), xp.sigmoid(t.neg_x)", "(p := xp.sigmoid(t.x)), 1 - p", EAGER),
        "native: gradient, sign": ("xp.lerp(p, -q,", "xp.lerp(p, q,", EAGER),
        "native: gradient with weights, sign": ("negative * p - positive * q", "negative * p + positive * q", EAGER),
        "labels: the sign": ("LabelTerms(xp.flipped(x,", "LabelTerms(xp.flipped(-x,", EAGER),
        "labels: value, weight left out": (
            "return values if total is None else weigh_logits(xp, total, values)",
            "return values",
            EAGER,
        ),
        "labels: value, 0·inf": ("weigh_logits(xp, total, values)", "xp.multiply(total, values)", EAGER),
        "labels: value, smoothed, weight left out": (
            "(values if total is None else values * total) - t.u * other",
            "values - t.u * other",
            EAGER,
        ),
        "labels: value, of the other label, sign": ("- t.u * other", "+ t.u * other", EAGER),
        "labels: value, inf - inf": (
            "if xp.assume_finite:\n        return (values",
            "if True:\n        return (values",
            EAGER,
        ),
        "labels: value, infinite, the label's weight": ("else total) - other +", "else total) +", EAGER),
        "labels: value, infinite, the other label left out": (
            " + xp.weigh(other + 0 * weights.z, xp.softplus(-t.u))",
            "",
            EAGER,
        ),
        "labels: gradient, weight left out": (
            "p if weights.total is None else xp.scale(p, weights.total)",
            "p",
            EAGER,
        ),
        "labels: gradient, the other label left out": (
            "p if weights.other is None else p - weights.other",
            "p",
            EAGER,
        ),
        "labels: gradient, sign": ("p - weights.other, weights.z)", "p - weights.other, 0 * weights.z)", EAGER),
    },
    "formulas/probabilities.py": {
        "clamp: at eps too": ("clamped = p < eps", "clamped = p <= eps"),
        "clamp: half of eps": ("clamped = p < eps", "clamped = p < eps / 2"),
        "clamp: none": ("clamped = p < eps", "clamped = p < 0"),
        "clamp: log 0 without weight": (", xp.logical_and(p == 0, weight == 0))", ", p < eps)"),
        "quotient: where clamped": ("weight / xp.where(free, p, math.inf)", "weight / p"),
        "binary: finite, log1p written out": ("xp.log1p(-t.p), floor)", "xp.log(t.q), floor)"),
        "binary: finite, no clamp of p": ("xp.maximum(xp.log(t.p), floor)", "xp.log(t.p)"),
        "binary: finite, the logarithms swapped": (
            "xp.multiply(log_q, t.negative) + xp.multiply(log_p, weights.positive)",
            "xp.multiply(log_p, t.negative) + xp.multiply(log_q, weights.positive)",
        ),
        "binary: value, negative left out": ("xp.weigh(t.negative, -log_q) + ", ""),
        "binary: gradient, sign": ("t.q_free) - _quotient(", "t.q_free) + _quotient("),
        "binary: gradient, p for 1 - p": (
            "return _quotient(xp, t.negative, t.q, t.q_free)",
            "return _quotient(xp, t.negative, t.p, t.q_free)",
        ),
        "binary: Hessian, sign": ("by_q + _quotient(", "by_q - _quotient("),
        "categorical: floor": (
            "t.floor)\n    return xp.sum(xp.weigh(weights.z, -log_p)",
            "0.0)\n    return xp.sum(xp.weigh(weights.z, -log_p)",
        ),
        "categorical: gradient, sign": ("return -_quotient(", "return _quotient("),
        "categorical: Hessian, square left out": (
            "_quotient(xp, _quotient(xp, weights.z, t.p, t.free), t.p, t.free)",
            "_quotient(xp, weights.z, t.p, t.free)",
        ),
        "nll: gradient, sign": ("return -weights.z", "return weights.z"),
        "nll: Hessian": ("return 0 * weights.z", "return weights.z"),
        "nll: Hessian, a wrong index is 0 there": (
            "return 0 * weights.z",
            "return xp.zeros_like(weights.z)",
        ),
        "of one class: clamp left out": ("_free(xp, p_y, weight, options.eps)", "_free(xp, p_y, weight, 0.0)"),
        "of one class: value, weight left out": (
            "xp.weigh(t.weight, -_clamped_log(xp, t.p_y, t.free, t.floor))",
            "-_clamped_log(xp, t.p_y, t.free, t.floor)",
        ),
        "of one class: gradient, sign": ("scaled(-_quotient(", "scaled(_quotient("),
        "of one class: gradient, weight left out": ("-_quotient(xp, t.weight, ", "-_quotient(xp, 1 + 0 * t.weight, "),
        "of one class: gradient, NaN of another class left out": (
            "assume_finite else t.p - t.p",
            "assume_finite else xp.zeros_like(t.p)",
        ),
        "of one class: NaN in the wrong class is missed": (
            "xp.where(xp.has_nan(x, weights.axis), math.nan, values)",
            "values",
        ),
        "of one class: gradient of the sum for the mean": (
            "scaled(-_quotient(xp, t.weight, t.p_y, t.free))",
            "-_quotient(xp, t.weight, t.p_y, t.free)",
        ),
        "of one class: gradient, NaN at the class alone": (
            "if not (weights.weight is None or xp.assume_finite):",
            "if False:",
        ),
        "nll, of one class: value, sign": (
            "xp.weigh(weights.weight, -t.log_p_y)",
            "xp.weigh(weights.weight, t.log_p_y)",
        ),
        "nll, of one class: value, weight left out": (
            "-t.log_p_y if weights.weight is None else xp.weigh(weights.weight, -t.log_p_y)",
            "-t.log_p_y",
        ),
        "nll, of one class: gradient, sign": ("at_y = -scaled(weights.weight)", "at_y = scaled(weights.weight)"),
        "nll, of one class: gradient, weight left out": (
            "at_y = -scaled(weights.weight)",
            "at_y = -scaled(None)",
        ),
    },
    "formulas/softmax.py": {
        "softmax: no maximum": ("(m == math.inf), 0.0, x - m)", "(m == math.inf), 0.0, x)"),
        "softmax: infinity less infinity": ("xp.where(is_max & (m == math.inf), 0.0, x - m)", "x - m"),
        "softmax: d = 0 for every largest": ("is_max & (m == math.inf), 0.0", "is_max, 0.0"),
        "softmax: ties": ("Terms(d, e, others + ties)", "Terms(d, e, others)", STRICT),
        "softmax: ties, differentiable": (
            "others + (xp.sum(xp.where(is_max, e, 0.0), axis=axis, keepdims=True) - 1)",
            "others",
            EAGER,
        ),
        "softmax: the largest in s": ("xp.sum(xp.where(is_max, 0.0, e)", "xp.sum(xp.where(is_max, e, e)"),
        "softmax: log1p written out": ("keepdims=True) * xp.log1p(s)", "keepdims=True) * xp.log(1 + s)", STRICT),
        "softmax: targets taken to sum to 1": (
            "xp.sum(z, axis=axis, keepdims=True) * xp.log1p(s)",
            "xp.log1p(s)",
            STRICT,
        ),
        "softmax: gradient as p - z": (
            "p * ((largest - z) + rest) - z * q",
            "xp.sum(z, axis=axis, keepdims=True) * p - z * (p + q)",
        ),
        "softmax: gradient, tied targets": (" + (ties - 1) * largest", ""),
        "softmax: gradient, the largest target left out": ("((largest - z) + rest)", "rest"),
        "softmax: gradient, the target is the largest": ("t.e, (1 - t.e) + t.s)", "t.e, t.s)"),
        "softmax: Hessian, every class is the largest": ("((1 - t.e) + t.s)", "t.s"),
        "softmax: Hessian as p (1 - p)": ("keepdims=True) * p * q", "keepdims=True) * p * (1 - p)"),
        "softmax: Hessian, weight left out": (
            "xp.sum(weights.z, axis=weights.axis, keepdims=True) * p * q",
            "p * q",
        ),
        "softmax: masked by -1e9": ("fill=-math.inf", "fill=-1e9"),
        "looked up: the smallest for the largest": (
            "xp.argmax(x, axis=axis, keepdims=True)",
            "xp.argmax(-x, axis=axis, keepdims=True)",
        ),
        "looked up: infinity less infinity": ("d = xp.shifted(x, m)\n", "d = x - m\n"),
        "looked up: every class at -inf": ("xp.where(~(m > -math.inf), math.nan, s)", "s", EAGER),
        "looked up: the largest in s": ("e = xp.put_along_axis(xp.exp(d), at, 0.0, axis)\n", "e = xp.exp(d)\n"),
        "looked up: value, sign": ("xp.log1p(t.s) - xp.weighted_sum(", "xp.log1p(t.s) + xp.weighted_sum("),
        "looked up: log1p written out": ("(t.z_j + t.rest) * xp.log1p(t.s)", "(t.z_j + t.rest) * xp.log(1 + t.s)"),
        "looked up: targets taken to sum to 1": ("(t.z_j + t.rest) * xp.log1p(t.s)", "xp.log1p(t.s)"),
        "looked up: writes into the targets": ("z * 1, at", "z, at"),
        "looked up: gradient, the largest's target left out": ("(t.z_j + t.rest) / (1 + t.s))", "t.rest / (1 + t.s))"),
        "looked up: gradient, the other targets left out": ("(t.z_j + t.rest) / (1 + t.s))", "t.z_j / (1 + t.s))"),
        "looked up: gradient, sign": ("t.rest - t.z_j * t.s)", "t.rest + t.z_j * t.s)"),
        "looked up: gradient as p - z": (
            "(t.rest - t.z_j * t.s) / (1 + t.s)",
            "(t.rest + t.z_j) / (1 + t.s) - t.z_j",
        ),
        "index: Hessian, no class is apart": ("e = t.e - major", "e, major = t.e, 0 * major"),
        "index: Hessian, the class y as the others": ("t.e_y * (t.rest / total)", "t.e_y * (1 - t.e_y / total)"),
        "index: Hessian, weight left out": (
            "(1.0 if weights.weight is None else weights.weight) / total",
            "1.0 / total",
        ),
        "index: log1p written out": ("xp.log1p(t.rest + (t.e_y - 1))", "xp.log(t.rest + t.e_y)"),
        "index: log1p written out, native": ("xp.log1p(t.rest / t.e_y)", "xp.log(1 + t.rest / t.e_y)", EAGER),
        "index: the target among the others": (
            "xp.put_along_axis(xp.exp(d), at, 0.0, axis), xp.exp(d_y)",
            "xp.exp(d), xp.exp(d_y)",
        ),
        "index: the target among the others, native": ("e = xp.put_along_axis(e, at, 0.0, axis)", "pass", EAGER),
        "index: the target not in the sum": ("xp.log1p(t.rest + (t.e_y - 1))", "xp.log1p(t.rest)"),
        "index: the target not in the sum, native": ("xp.log1p(t.rest / t.e_y)", "xp.log1p(t.rest)", EAGER),
        "index: the target's distance left out": ("log_total - t.d_y", "log_total"),
        "index: infinity less infinity": ("d, d_y = xp.shifted(x, m), x_y - m", "d, d_y = x - m, x_y - m"),
        "index: infinity less infinity, at the target": ("xp.where((x_y == m) & (m == math.inf), 0.0, d_y)", "d_y"),
        "index: every class at -inf": ("(x_y == m) & (m == math.inf)", "x_y == m", EAGER),
        "index: value, weight left out": (
            "return values if weight is None else weigh_logits",
            "return values if True else weigh_logits",
        ),
        "index: smoothed, value, sign": ("return -uniform * xp.sum(d", "return uniform * xp.sum(d"),
        "index: smoothed, value, sign, not finite": (
            "xp.weigh(uniform * xp.ones_like(d), -d)",
            "xp.weigh(uniform * xp.ones_like(d), d)",
            STRICT,
        ),
        "index: smoothed, value, the share of one class": ("uniform * lengths.count(xp, d, (axis,))", "uniform"),
        "index: smoothed, value, by weight, sign": (
            "-xp.weighted_sum(uniform, d, axis)",
            "xp.weighted_sum(uniform, d, axis)",
        ),
        "index: smoothed, value, the logits left out": (
            "values + (t.apart + t.share * log_total)",
            "values + t.share * log_total",
        ),
        "index: smoothed, value, the total left out": ("values + (t.apart + t.share * log_total)", "values + t.apart"),
        "index: smoothed, value, sample_weight left out": (
            "_weighted(xp, weights.example, values + (t.apart + t.share * log_total))",
            "values + (t.apart + t.share * log_total)",
        ),
        "index: gradient, sign": (
            "xp.put_along_axis(t.e, at, -t.rest, axis)",
            "xp.put_along_axis(t.e, at, t.rest, axis)",
        ),
        "index: gradient, weight left out": (
            "scaled(weight) / total",
            "scaled(None) / total",
        ),
        "index: gradient, the target not in the sum": (
            "weights.position, weights.axis, t.rest + t.e_y\n    if t.apart is None:\n        return xp.scale(xp.put",
            "weights.position, weights.axis, t.rest\n    if t.apart is None:\n        return xp.scale(xp.put",
        ),
        "index: gradient, sign, native": (
            "weights.position, -t.rest, weights.axis)",
            "weights.position, t.rest, weights.axis)",
            EAGER,
        ),
        "index: gradient, weight left out, native": (
            "scaled(weights.weight)",
            "scaled(None)",
            EAGER,
        ),
        "index: gradient, shares that add up to less": (
            "factor if xp.extent(t.e, weights.axis) <= SHORT else factor / (t.rest + t.e_y)",
            "factor",
            EAGER,
        ),
        "index: smoothed, gradient, the share left out": ("weight + t.share) - total", "weight + 0 * t.share) - total"),
        "index: smoothed, gradient, the targets left out": (" - total * weights.uniform\n", "\n"),
        "index: smoothed, gradient at the class, the share left out": (
            "t.e_y * t.share - weight * t.rest",
            "-weight * t.rest",
        ),
        "index: smoothed, gradient at the class, sign": (
            "t.e_y * t.share - weight * t.rest",
            "t.e_y * t.share + weight * t.rest",
        ),
        "index: smoothed, gradient at the class, its target left out": (" - total * weights.uniform_y,", ","),
        "index: smoothed, gradient, sample_weight left out": (
            "scaled(weights.example)",
            "scaled(None)",
        ),
    },
    "formulas/targets.py": {
        "index: ignore_index, the others": (
            "exists = None if options.ignore_index is None else index != options.ignore_index",
            "exists = None if options.ignore_index is None else index == options.ignore_index",
        ),
        "index: ignore_index, every negative one": (
            "exists = None if options.ignore_index is None else index != options.ignore_index",
            "exists = None if options.ignore_index is None else index >= 0",
        ),
        "index: weight of the class before": ("xp.take(weight, index)", "xp.take(weight, index - 1)"),
        "index: sample_weight left out": (
            "else of_y if example is None else of_y * example), None",
            "else of_y), None",
        ),
        "index: weight left out": (
            "(example if of_y is None else of_y if example is None else of_y * example), None",
            "example, None",
        ),
        "index: weight not in the divisor": (
            "counts = example if of_y is None else of_y if example is None else of_y * example",
            "counts = example if of_y is None else xp.ones_like(of_y) if example is None else example",
        ),
        "index: sample_weight not in the divisor": (
            "counts = example if of_y is None else of_y if example is None else of_y * example",
            "counts = example if of_y is None else of_y",
        ),
        "index: the ignored carry a loss": (
            "xp.astype(exists, like.dtype) if example is None else xp.where(exists",
            "None if example is None else xp.where(exists",
        ),
        "index: the ignored's sample_weight": ("else xp.where(exists, example, 0.0)", "else example"),
        "index: ignored by any mask": (
            "kept != 0)\n        exists = _and(xp, exists, xp.any(where",
            "kept != 0)\n        exists = _and(xp, exists, xp.all(where",
        ),
        "index: ignore_index forgets empty examples": (
            "exists = _and(xp, exists, xp.any(where, axis=axis, keepdims=True))\n\n    of_y",
            "exists = xp.any(where, axis=axis, keepdims=True) if exists is None else exists\n\n    of_y",
        ),
        "index: a masked logit leaks": (
            "return x if self.where is None else xp.masked(x, _possible(xp, self), fill)\n",
            "return x\n",
        ),
        "index: a wrong index is 0": (
            "if example is None else example, math.nan)",
            "if example is None else example, 0.0)",
        ),
        "index: a wrong index in the divisor": ("counts = xp.where(in_range, counts, 0.0)", "pass"),
        "index: a wrong index is ignored": (
            "xp.where(in_range, xp.astype(in_range",
            "xp.where(in_range | True, xp.astype(in_range",
        ),
        "index: of a masked class": ("in_range = xp.logical_and(in_range, kept != 0)", "pass"),
        "index: sample_weight left out where a loss is NaN": (
            "xp.astype(in_range, like.dtype) if example is None else example, math.nan)",
            "xp.astype(in_range, like.dtype), math.nan)",
            STRICT,
        ),
        "index: of a mask, above the classes": (" & (index < xp.extent(like, axis))", "", STRICT),
        "index: of a mask, negative": ("(index >= 0) & ", "", STRICT),
        "index: smoothed, the class keeps all": ("(1 - smoothing) * (xp.ones_like", "1.0 * (xp.ones_like"),
        "index: smoothed, weight left out": (
            "xp.ones_like(index, dtype=like.dtype) if of_y is None else of_y",
            "xp.ones_like(index, dtype=like.dtype)",
        ),
        "index: smoothing ε/2": ("share = smoothing / lengths.count(xp, like, (axis,))", "share = smoothing / 2"),
        "index: smoothed, weight of the others left out": (
            "(share * weight, share * of_y)",
            "(share + 0 * weight, share * of_y)",
        ),
        "index: smoothed, weight of the class's share left out": (
            "(share * weight, share * of_y)",
            "(share * weight, share + 0 * of_y)",
        ),
        "index: smoothing ε/K, masked classes counted": (
            "share = smoothing / xp.where(k == 0, 1.0, k)",
            "share = smoothing / (like.shape[axis] + 0 * k)",
        ),
        "index: smoothing of masked classes": (
            "xp.where(where, share, 0.0)",
            "share + xp.zeros_like(like)",
        ),
        "index: masked and smoothed, weight of the others left out": (
            "(uniform * xp.where(where, weight, 0.0), share * of_y)",
            "(uniform, share * of_y)",
        ),
        "index: masked and smoothed, weight of the class's share left out": (
            "(uniform * xp.where(where, weight, 0.0), share * of_y)",
            "(uniform * xp.where(where, weight, 0.0), share)",
        ),
        "labels: pos_weight of negatives": (
            "_by_label(xp, z, one, pos_weight)",
            "_by_label(xp, z, pos_weight, one)",
            EAGER,
        ),
        "labels: pos_weight of negatives, finite": ("xp.lerp(of_0, of_1, z)", "xp.lerp(of_1, of_0, z)", EAGER),
        "labels: pos_weight of negatives, not finite": (
            "xp.where(z > 0, of_1, of_0)",
            "xp.where(z > 0, of_0, of_1)",
            EAGER,
        ),
        "labels: smoothing ε": ("None if smoothing is None else smoothing / 2", "smoothing", EAGER),
        "labels: smoothing, pos_weight of the other label left out": (
            "smoothing / 2 * _by_label(xp, z, pos_weight, one)",
            "smoothing / 2",
            EAGER,
        ),
        "labels: smoothing, pos_weight of the same label": (
            "smoothing / 2 * _by_label(xp, z, pos_weight, one)",
            "smoothing / 2 * total",
            EAGER,
        ),
        "labels: smoothing adds": ("total * (1 - smoothing / 2) + other", "total + other", EAGER),
        "labels: the other label not in the total": (
            "total * (1 - smoothing / 2) + other",
            "total * (1 - smoothing / 2)",
            EAGER,
        ),
        "labels: weight for pos_weight": ("weight if total is None else total * weight", "weight", EAGER),
        "labels: weight left out": ("total = weight if total is None else total * weight", "pass", EAGER),
        "labels: weight of the other label left out": ("None if other is None else other * weight", "other", EAGER),
        "elementwise: labels swapped": ("negative, positive = 1 - z, z", "negative, positive = z, 1 - z"),
        "elementwise: smoothing ε/K": (
            "positive * (1 - smoothing) + smoothing / 2",
            "positive * (1 - smoothing) + smoothing / like.shape[-1]",
        ),
        "elementwise: smoothing of positives only": ("negative * (1 - smoothing) + smoothing / 2", "negative"),
        "elementwise: pos_weight left out": ("positive * pos_weight", "positive"),
        "elementwise: pos_weight of negatives": (
            "positive = positive * pos_weight",
            "negative = negative * pos_weight",
        ),
        "elementwise: pos_weight before smoothing": (
            "negative, positive = 1 - z, z\n",
            "negative, positive = 1 - z, z if pos_weight is None else z * pos_weight\n    pos_weight = None\n",
        ),
        "elementwise: weight of negatives only": (
            "negative * weight, positive * weight",
            "negative * weight, positive",
        ),
        "elementwise: a masked logit leaks": (
            "x if where is None or xp.assume_finite else xp.where(where, x, fill)",
            "x",
        ),
        "labels: a masked logit leaks": (
            "x if where is None or xp.assume_finite else xp.where(where, x, fill)",
            "x",
            EAGER,
        ),
        "elementwise: a masked target leaks": ("return xp.where(keep, z, 0.0), weight", "return z, weight"),
        "elementwise: a masked weight leaks": (
            "weight = counts if weight is None else xp.where(keep, weight, 0.0)",
            "weight = counts if weight is None else weight",
        ),
        "elementwise: a masked pos_weight leaks": ("xp.where(keep, pos_weight, 1.0)", "pos_weight"),
        "elementwise: the mask left out": ("xp.where(keep, xp.ones_like(like), 0.0)", "xp.ones_like(like)"),
        "elementwise: the mask left out, finite": ("xp.astype(keep, like.dtype)", "xp.ones_like(like)"),
        "elementwise: a masked weight counts, finite": (
            "weight is None else weight * counts",
            "weight is None else weight",
        ),
        "elementwise: the mask for the weight, finite": ("counts if weight is None else weight * counts", "counts"),
        "elementwise: a mask of one row counts once": (
            "xp.assume_finite and lengths.same(keep.shape, like.shape)",
            "xp.assume_finite",
        ),
        "elementwise: weights taken to sum to 1": ("else negative + positive", "else None"),
        "distribution: an index of a masked class": ("one_hot = xp.logical_and(one_hot, where)", "pass"),
        "distribution: a wrong index is 0": (
            "xp.where(in_range, z, math.nan)",
            "xp.where(in_range, z, 0.0)",
        ),
        "distribution: a negative index counts from the end": (
            "one_hot = xp.classes(like, axis) == index",
            "one_hot = xp.classes(like, axis) == xp.where(index < 0, index + like.shape[-1], index)",
        ),
        "distribution: ignore_index, the others": (
            "            exists = index != options.ignore_index",
            "            exists = index == options.ignore_index",
        ),
        "distribution: ignore_index, every negative one": (
            "            exists = index != options.ignore_index",
            "            exists = index >= 0",
        ),
        "distribution: ignore_index, a class is never ignored": (
            "            exists = index != options.ignore_index",
            "            exists = in_range | (index != options.ignore_index)",
        ),
        "distribution: weight of masked classes": ("z if where is None else xp.where(where, z, 0.0)", "z"),
        "distribution: ignored by any mask": (
            "where is not None:\n        exists = _and(xp, exists, xp.any(where",
            "where is not None:\n        exists = _and(xp, exists, xp.all(where",
        ),
        "positives: padding is the last class": (
            "index = xp.where(outside, xp.where(last < 0, 0, last), index)",
            "index = xp.where(outside, like.shape[-1] - 1, index)",
            POSITIVES,
        ),
        "positives: padding is the class 0": (
            "index = xp.where(outside, xp.where(last < 0, 0, last), index)",
            "index = xp.where(outside, 0, index)",
            POSITIVES,
        ),
        "positives: an example without labels has the class 0": (
            "values = last >= 0 if values is None",
            "values = last >= -1 if values is None",
            POSITIVES,
        ),
        "positives: an index out of range is none": (
            "xp.any(xp.logical_and(outside, index != -1), axis=-1, keepdims=True)",
            "xp.any(outside, axis=-1, keepdims=True) & False",
            POSITIVES,
        ),
        "positives: padding makes it NaN": ("xp.logical_and(outside, index != -1)", "outside", POSITIVES),
        "positives: C is an index": ("(index < 0) | (index >= xp.extent(like, -1))", "index < 0", POSITIVES_STRICT),
        "positives: what is below -1 is padding": ("index != -1), axis=-1", "index >= 0), axis=-1", POSITIVES),
        "distribution: ignore_index forgets empty examples": (
            "exists = _and(xp, exists, xp.any(where, axis=axis, keepdims=True))\n\n    counts",
            "exists = xp.any(where, axis=axis, keepdims=True) if exists is None else exists\n\n    counts",
        ),
        "distribution: weights not in the divisor": (
            "counts = xp.sum(z * weight, axis=axis, keepdims=True)",
            "counts = xp.sum(z, axis=axis, keepdims=True)",
        ),
        "distribution: divisor of smoothed targets": (
            "counts = xp.sum(z * weight, axis=axis, keepdims=True)",
            "ε = options.label_smoothing or 0.0; k = like.shape[axis]\n"
            "        counts = xp.sum((z * (1 - ε) + ε / k) * weight, axis=axis, keepdims=True)",
        ),
        "distribution: a masked class's weight leaks": (
            "weight = weight if where is None else xp.where(where, weight, 0.0)",
            "pass",
        ),
        "distribution: sample_weight not in the divisor": (
            "sample_weight if counts is None else counts * sample_weight",
            "counts",
        ),
        "distribution: sample_weight for weight in the divisor": ("counts * sample_weight", "sample_weight"),
        "distribution: the ignored in the divisor": (
            "xp.astype(exists, like.dtype) if counts is None",
            "None if counts is None",
        ),
        "distribution: the ignored's weight in the divisor": ("else xp.where(exists, counts, 0.0)", "else counts"),
        "distribution: smoothing ε/2": ("+ smoothing / lengths.count(xp, like, (axis,))", "+ smoothing / 2"),
        "distribution: smoothing ε/K, masked classes counted": (
            "where, smoothing / xp.where(k == 0, 1.0, k)",
            "where, smoothing / like.shape[axis]",
        ),
        "distribution: smoothing of masked classes": (
            "xp.where(where, smoothing / xp.where(k == 0, 1.0, k), 0.0)",
            "smoothing / xp.where(k == 0, 1.0, k)",
        ),
        "distribution: smoothing adds": ("z * (1 - smoothing) + uniform", "z + uniform"),
        "distribution: weight left out": ("z = z * weight\n", "pass\n"),
        "distribution: sample_weight left out": ("z = z * sample_weight", "pass"),
        "distribution: a masked logit leaks": (
            "x = xp.masked(x, _possible(xp, self), fill)\n",
            "pass\n",
        ),
        "distribution: an ignored example's logits leak": (
            "x if self.exists is None else xp.where(self.exists, x, 0.0)",
            "x",
        ),
        "distribution: an ignored example has no class": (
            "else xp.where(self.exists, x, 0.0)",
            "else xp.where(self.exists, x, fill)",
        ),
        "distribution: an ignored example's targets leak": (
            "z = xp.where(exists, z, 0.0)",
            "pass",
        ),
    },
    "formulas/reduce.py": {
        "form: of one class, though smoothed": ("options.indices and not smoothed and", "options.indices and", EAGER),
        "form: of one class, though classes are masked": (" and operands.where is None", ""),
        "form: of labels, though they are not 0 or 1": (" and (options.binary or not form.of_labels)", "", EAGER),
        "sum for mean": ("else xp.sum(values) / divisor", "else xp.sum(values)"),
        "gradient of the sum for the mean": (
            "return weight if divisor is None else weight / divisor",
            "return weight",
        ),
        "mean for sum": ('options.reduction not in ("mean", "batchmean")', 'options.reduction == "none"'),
        "sum for batchmean": ('not in ("mean", "batchmean")', 'not in ("mean",)'),
        "batchmean over what takes part": ('options.reduction == "mean" and weights.counts', "weights.counts"),
        "mean over examples": (
            'options.axes if loss.per_example or options.reduction == "batchmean" else ()',
            "options.axes",
        ),
        "mean over elements": (
            'options.axes if loss.per_example or options.reduction == "batchmean" else ()',
            "options.axes if loss.per_example else ()",
        ),
        "batchmean, the class axis last": ("of_one = options.axes if", "of_one = (-1,) if"),
        "mean of nothing": (
            "xp.where(weight == 0, math.inf, weight)",
            "weight",
        ),
        "mean of what weighs nothing": (
            "xp.where(weight == 0, math.inf, weight)",
            "xp.where(weight == 0, 1.0, weight)",
        ),
        "gradient outside the mask": (
            "derivative if keep is None else xp",
            "derivative if True else xp",
        ),
        "gradient outside the mask, by a cotangent": (
            "found if keep is None else xp",
            "found if True else xp",
            EAGER,
        ),
        "Hessian for gradient": (
            "first = _of_sum(xp, call, _gradient(xp, loss, options, call))",
            "first = second",
        ),
        "half: computed in itself": ("xp.astype(x, xp.float32) if options.half else x", "x", HALF),
        "index: an ignored example's logits leak": ("xp.where(weights.exists, values, 0.0)", "values"),
        "half: rounded before the sum": (
            "xp.astype(_reduced(xp, loss, options, _losses(xp, call)",
            "xp.astype(_reduced(xp, loss, options, xp.astype(xp.astype(_losses(xp, call), dtype), xp.float32)",
            HALF,
        ),
        "half: summed in itself": (
            "xp.astype(_reduced(xp, loss, options, _losses(xp, call)",
            "xp.astype(_reduced(xp, loss, options, xp.astype(_losses(xp, call), dtype)",
            HALF,
        ),
        "half: gradient rounded before the mean": (
            "array = form.gradient(xp, terms, weights)",
            "array = xp.astype(xp.astype(form.gradient(xp, terms, weights), xp.float16), xp.float32)",
            HALF,
        ),
        "cotangent left out": (
            "cotangent = xp.astype(cotangent, xp.float32 if options.half else dtype, copy=False)",
            "cotangent = None",
            TORCH,
        ),
        "cotangent of a mean left out": (
            "weight = cotangent if weight is None else weight * cotangent",
            "pass",
            TORCH_HALF,
        ),
        "by targets: the divisor is constant": (
            "return or_infinity(xp, xp.sum(weights.counts))",
            "c = xp.sum(weights.counts); return or_infinity(xp, xp.stop_gradient(c) if 'autodiff' in xp.groups else c)",
            ("--backend", "torch", "--dtype", "float32", "--case", "weighted"),
        ),
        "tangent: divisor left out": (
            "_reduced(xp, loss, options, change, divisor)",
            "_reduced(xp, loss, options, change, None)",
            JAX,
        ),
        "tangent: outside the mask": ("xp.where(keep, tangent, 0.0)", "tangent", JAX),
    },
    "formulas/linear.py": {
        "linear: bias left out": ("xp.linear(features, weight, bias)", "xp.linear(features, weight, None)", LINEAR),
        "linear: bias twice": (
            "x = xp.linear(features, weight, bias)",
            "x = xp.linear(features, weight, bias) + (0.0 if bias is None else bias)",
            LINEAR,
        ),
        "linear: features, gradient, sign of the weight": (
            "xp.matmul(gradient, inputs.linear_weight)",
            "xp.matmul(gradient, xp.abs(inputs.linear_weight))",
            LINEAR,
        ),
        "linear: weight, gradient, of the last block": (
            "xp.add_product(weight, gradient, inputs.features)",
            "xp.add_product(None, gradient, inputs.features)",
            LINEAR,
        ),
        "linear: bias, gradient, of the last block": (
            "xp.add_sum(bias, gradient, ",
            "xp.add_sum(None, gradient, ",
            LINEAR,
        ),
        "linear: gradient, the cotangent left out": (
            "of_block, x, operands, cotangent)",
            "of_block, x, operands, 0 * cotangent + 1)",
            LINEAR_TORCH,
        ),
        "linear: blocks, each with its own mean": (
            'reduction=options.reduction if final else "sum"',
            "reduction=options.reduction",
            LINEAR,
        ),
        "linear: blocks, the divisor of one": (
            "reduce.or_infinity(xp, xp.sum(counts))",
            "counts[0, ...]",
            LINEAR,
        ),
        "linear: blocks, mean of nothing": ("reduce.or_infinity(xp, xp.sum(counts))", "xp.sum(counts)", LINEAR),
        "linear: blocks, what is left out counts": (
            "n * lengths.count(xp, inputs.linear_weight, (0,)) if per_element else n",
            "n",
            LINEAR,
        ),
        "linear: blocks, sum for batchmean": (
            'if options.reduction == "sum":\n        return None',
            'if options.reduction in ("sum", "batchmean"):\n        return None',
            LINEAR,
        ),
        "linear: blocks, value, sum for mean": ("None if value is None else value / divisor", "value", LINEAR),
        "linear: blocks, gradients of the sum for the mean": (
            "found = Linear(*(None if a is None else xp.scale(a, 1 / divisor) for a in found))",
            "pass",
            LINEAR,
        ),
        "linear: blocks, value of the last": ("None if value is None else xp.sum(value)", "value[-1, ...]", LINEAR),
        "linear: blocks, the first repeated": (
            "features[part, ...],",
            "features[: part.stop - part.start, ...],",
            LINEAR,
        ),
        "linear: cotangent of a reduced loss left out": (
            "xp.where(masked, 0.0, gradient * cotangent)",
            "xp.where(masked, 0.0, gradient)",
            LINEAR_MLX,
        ),
        "linear: an example without one of its classes takes no part": (
            "xp.any(keep, axis=1, keepdims=True)",
            "xp.all(keep, axis=1, keepdims=True)",
            LINEAR_JAX,
        ),
        "linear: a class that one example leaves out takes no part": (
            "xp.any(keep, axis=0)",
            "xp.all(keep, axis=0)",
            LINEAR_JAX,
        ),
        "linear: half, blocks rounded before the sum": (
            "copy=False) if final else xp.reshape(values, (1,))",
            "copy=False) if final else xp.astype(xp.reshape(xp.astype(values, rows.features.dtype), (1,)), xp.float32)",
            LINEAR_HALF,
        ),
        "linear: half, logits rounded": (
            "    x = xp.linear(features, weight, bias)\n",
            "    x = xp.astype(xp.astype(xp.linear(features, weight, bias), rows.features.dtype), weight.dtype)\n",
            LINEAR_HALF,
        ),
        "linear: half, multiplied in itself": (
            "return reduce.working(xp, options, weight), None if bias is None else reduce.working(xp, options, bias)",
            "return weight, bias",
            LINEAR_HALF,
        ),
    },
    "linear.py": {
        "linear multilabel: bias not passed on": (
            "_run(LOGISTIC, Linear(features, linear_weight, linear_bias)",
            "_run(LOGISTIC, Linear(features, linear_weight, None)",
            LINEAR,
        ),
        "linear softmax: bias not passed on": (
            "_run(SOFTMAX, Linear(features, linear_weight, linear_bias)",
            "_run(SOFTMAX, Linear(features, linear_weight, None)",
            LINEAR,
        ),
        "linear multilabel: pos_weight not passed on": ("pos_weight=pos_weight, ", "", LINEAR),
        "linear multilabel: smoothing not passed on": (
            "Given(reduction, -1, label_smoothing, validate=validate)",
            "Given(reduction, -1, validate=validate)",
            LINEAR,
        ),
        "linear softmax: sample_weight not passed on": ("sample_weight=sample_weight, ", "", LINEAR),
        "linear softmax: weight not passed on": ("weight=weight, sample_weight=", "sample_weight=", LINEAR),
        "linear softmax: ignore_index not passed on": ("ignore_index=ignore_index, ", "", LINEAR),
    },
    "lengths.py": {
        "mean of no examples": ("xp.longest(known, 1)", "(known or math.nan)"),
    },
    "namespace.py": {
        "heaviside: of the other side": ("self.astype(x >= 0, x.dtype)", "self.astype(x <= 0, x.dtype)"),
        "an infinity is a NaN": ("return total != total", "return ~self.isfinite(total)"),
        "scatter: a label twice counts twice": (
            "found = self.where(classes == index[..., k : k + 1], values[..., k : k + 1], found)",
            "found = found + self.where(classes == index[..., k : k + 1], values[..., k : k + 1], 0.0)",
            POSITIVES_STRICT,
        ),
        "guard of 0·inf left out": (
            "self.where(self.logical_and(weight == 0, self.isinf(size)), 0.0, size), weight)",
            "size, weight)",
        ),
        "guard of 0·inf takes NaN": ("self.logical_and(weight == 0, self.isinf(size))", "weight == 0", STRICT),
        "by a mask: weight": (
            "self.expand_dims(index, axis=-1), -1), weight, 0.0)",
            "self.expand_dims(index, axis=-1), -1), 0 * weight + 1, 0.0)",
            STRICT,
        ),
        "by a mask: the class before": (
            "self.classes(x, axis) == index",
            "self.classes(x, axis) == index - 1",
            STRICT,
        ),
        "by a mask: 0·inf": ("self.where(position, x, 0.0)", "self.astype(position, x.dtype) * x", STRICT),
        "by a mask: put over all": (
            "self.where(position, values, x)",
            "values + 0 * x",
            STRICT,
        ),
        "log(1 - p): log1p written out": ("self.log1p(-of_small)", "self.log(1 - of_small)", STRICT),
        "guard of 0·inf left out beside another term": (
            "-> Array:\n        return self.weigh(weight, size)\n",
            "-> Array:\n        return self.multiply(size, weight)\n",
        ),
        "a masked logit leaks": ("-> Array:\n        return self.where(keep, x, fill)", "-> Array:\n        return x"),
        "scale: as it was": ("return x * factor", "return x", STRICT),
        "sum of rows, times the first feature": ("self.ones_like(features[:, :1])", "features[:, :1]", LINEAR),
        "masked by -1e9, finite": ("bound *= math.inf", "bound *= 2e9"),
    },
    "../backends/torch_namespaces.py": {
        "torch: the softplus of x is x from 20 on": ("softplus(x, 1, 60.0)", "softplus(x, 1, 20.0)", WIDE),
        "torch: the sign of the label 1": ("torch.mul(x, torch.rsub(z, 1, alpha=2))", "torch.mul(x, 1 - z)", EAGER),
        "torch: the sign of the label 1, gradient": ("x.mul_(torch.rsub(z, 1, alpha=2))", "x.mul_(1 - z)", EAGER),
        "torch: the sign of the label 1, finite": ("torch.addcmul(x, x, z, value=-2)", "x - x * z", EAGER),
        "torch: the sign of the label 1, finite gradient": ("x.addcmul_(x, z, value=-2)", "x.sub_(x * z)", EAGER),
        "torch: scale, as it was": ("return x.mul_(factor)", "return x", EAGER),
        "torch: products, of the last block": (
            "total.addmm_(x.t(), y)",
            "torch.mm(x.t(), y)",
            LINEAR_TORCH,
        ),
        "torch: sums of rows, of the last block": ("total.add_(column)", "column", LINEAR_TORCH),
        "torch: argmax, the last class": ("alpha=classes, out", "alpha=0, out", EAGER),
    },
    "../backends/torch_linear.py": {
        "torch: linear, cotangent of a reduced loss left out": ("gradient.mul_(scale)", "gradient", LINEAR_TORCH),
        "torch: linear, cotangents left out": ("cotangent if unreduced else None)", "None)", LINEAR_TORCH),
    },
    "../backends/mlx.py": {
        "mlx: linear, what waits is lost": (
            "never = mx.reshape(array, (-1,))[:1] < -math.inf",
            "never = True",
            LINEAR_MLX,
        ),
    },
}
MUTATIONS = {name: Mutation(file, *bug) for file, bugs in BUGS.items() for name, bug in bugs.items()}


def mutate(text: str, mutation: Mutation) -> str:
    count = text.count(mutation.right)
    if count != 1:
        raise ValueError(f"expected once in {mutation.file}, found {count} times: {mutation.right!r}")
    return text.replace(mutation.right, mutation.wrong)


def copy_package(tree: Path) -> None:
    """The package as it installs, in tree/unilabel."""
    for folder, place in {"unilabel": "", "backends": "backends", "conformance": "conformance"}.items():
        shutil.copytree(
            ROOT / folder,
            tree / "unilabel" / place,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "vectors"),
        )


def failing(mutation: Mutation, tree: Path) -> list[str]:
    """The families of cases that fail with the mutation, and with it alone, on a copy of the package in this folder."""
    copy_package(tree)
    mutated = tree / "unilabel" / mutation.file.removeprefix("../")  # the backends are installed inside unilabel/
    mutated.write_text(mutate(mutated.read_text(), mutation))
    report = tree / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "unilabel.conformance", "conformance", "--json", str(report), *mutation.arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        raise RuntimeError(done.stdout + done.stderr)
    (run,) = json.loads(report.read_text())["runs"]
    cases = [case for case in run["cases"] if case["status"] == "fail"]
    broken = next((case["reason"] for case in cases if case["reason"]), run["problem"])
    if broken:  # it did not compute wrong numbers, it did not compute
        raise RuntimeError(broken)
    if done.returncode != bool(cases):
        raise RuntimeError(f"{len(cases)} cases fail, and the exit code is {done.returncode}")
    return list(dict.fromkeys(case["family"] for case in cases))


def check(name: str, mutation: Mutation) -> bool:
    """Runs it, prints a line, and says whether it went as it has to: caught, or for no mutation, all right."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            families = failing(mutation, Path(folder))
    except (RuntimeError, ValueError) as error:
        print(f"BROKEN    {name}: {error}", flush=True)
        return False
    good = bool(families) != (mutation.right == mutation.wrong)
    seen = ", ".join(families) or "no case"
    print(f"{'ok' if good else 'SURVIVED':9} {name}: {seen} ({time.monotonic() - start:.0f} s)", flush=True)
    return good


def main(names: list[str]) -> int:
    if unknown := set(names) - set(MUTATIONS):
        print(f"no mutation {', '.join(sorted(unknown))}. Known: {', '.join(MUTATIONS)}")
        return 2
    chosen = {name: MUTATIONS[name] for name in names or MUTATIONS}
    # Unmutated nothing may fail, or "caught" says nothing.
    settings = dict.fromkeys(mutation.arguments for mutation in chosen.values())
    controls = {f"unmutated, {' '.join(setting)}": NOTHING._replace(arguments=setting) for setting in settings}
    with ThreadPoolExecutor(2) as pool:
        good = list(pool.map(check, *zip(*(controls | chosen).items(), strict=True)))
    print(f"{sum(good[len(controls) :])} of {len(chosen)} mutations caught")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
