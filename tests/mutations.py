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
JAX = ("--backend", "jax", "--dtype", "float32", "--case", "seed", "--case", "masked")  # all would compile for minutes
# Has the native functions. A Hessian, and a gradient by targets, are by autodiff.
EAGER = ("--backend", "torch", "--dtype", "float32")
STRICT = ("--backend", "array_api_strict", "--dtype", "float32")  # has the namespace's defaults


class Mutation(NamedTuple):
    file: str  # under unilabel/
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
            "weigh_logits(xp, weight, t.x) + (log_term if total is None else log_term * total)",
            "weigh_logits(xp, weight, t.x) + log_term",
        ),
        "logistic: exponent clamped": ("xp.exp(-xp.abs(x))", "xp.exp(-xp.minimum(xp.abs(x), xp.asarray(20.0)))"),
        "logistic: gradient, sign": ("(t.nonneg - positive) + minor", "(t.nonneg - positive) - minor"),
        "logistic: gradient, weighted, sign": ("(1 - t.nonneg) - minor", "(1 - t.nonneg) + minor"),
        "logistic: gradient as sigmoid - z": ("(t.nonneg - positive) + minor", "(t.nonneg + minor) - positive"),
        "logistic: gradient at 0": ("minor = (1 - 2 * t.nonneg)", "minor = (t.x != 0) * (1 - 2 * t.nonneg)"),
        "logistic: Hessian, square left out": ("(total * total)", "total"),
        "logistic: Hessian as p (1 - p)": ("t.e / (total * total)", "(1 / total) * (1 - 1 / total)"),
        "differentiable: |x| at 0": ("xp.multiply(x, 2 * nonneg - 1)", "xp.abs(x)", EAGER),
        "native: softplus of x": ("xp.softplus(xp.minimum(t.x, t.neg_x))", "xp.softplus(t.x)", EAGER),
        "native: the labels' ramps swapped": ("xp.lerp(above, below,", "xp.lerp(below, above,", EAGER),
        "native: 0·inf": ("if negative is None and xp.assume_finite:", "if negative is None:", EAGER),
        "native: weights of the logarithm left out": (
            "linear_term + (log_term if total is None else log_term * total)",
            "linear_term + log_term",
            EAGER,
        ),
        "native: gradient with 1 - p": ("xp.sigmoid(t.x), xp.sigmoid(t.neg_x)", "(p := xp.sigmoid(t.x)), 1 - p", EAGER),
        "native: gradient, sign": ("xp.lerp(p, -q,", "xp.lerp(p, q,", EAGER),
        "native: gradient with weights, sign": ("negative * p - positive * q", "negative * p + positive * q", EAGER),
    },
    "formulas/probabilities.py": {
        "clamp: at eps too": ("logical_or(p < eps,", "logical_or(p <= eps,"),
        "clamp: half of eps": ("logical_or(p < eps,", "logical_or(p < eps / 2,"),
        "clamp: none": ("~xp.logical_or(p < eps, ", "~xp.logical_or(p < 0, "),
        "clamp: log 0 without weight": (", xp.logical_and(p == 0, weight == 0))", ", p < eps)"),
        "clamp: a wrong index is 0 there": ("quotient, 0 * quotient)", "quotient, 0.0)"),
        "quotient: NaN weights where clamped": ("quotient, 0 * quotient)", "quotient, quotient)"),
        "binary: log1p written out": ("xp.log1p(-xp.where(small, t.p, 0.0))", "xp.log(1 - xp.where(small, t.p, 0.0))"),
        "binary: value, negative left out": ("xp.weigh(t.negative, -log_q) + ", ""),
        "binary: gradient, sign": ("t.q_free) - _quotient(", "t.q_free) + _quotient("),
        "binary: gradient, p for 1 - p": (
            "_quotient(xp, t.negative, 1 - t.p, t.q_free)",
            "_quotient(xp, t.negative, t.p, t.q_free)",
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
    },
    "formulas/softmax.py": {
        "softmax: no maximum": ("(m == math.inf), 0.0, x - m)", "(m == math.inf), 0.0, x)"),
        "softmax: infinity less infinity": ("xp.where(is_max & (m == math.inf), 0.0, x - m)", "x - m"),
        "softmax: d = 0 for every largest": ("is_max & (m == math.inf), 0.0", "is_max, 0.0"),
        "softmax: ties": ("Terms(d, e, others + ties)", "Terms(d, e, others)"),
        "softmax: ties, differentiable": (
            "others + (xp.sum(xp.where(is_max, e, 0.0), axis=-1, keepdims=True) - 1)",
            "others",
            EAGER,
        ),
        "softmax: the largest in s": ("xp.sum(xp.where(is_max, 0.0, e)", "xp.sum(xp.where(is_max, e, e)"),
        "softmax: log1p written out": ("xp.squeeze(xp.log1p(s), axis=-1)", "xp.squeeze(xp.log(1 + s), axis=-1)"),
        "softmax: targets taken to sum to 1": ("xp.sum(z, axis=-1) * xp.squeeze(", "xp.squeeze("),
        "softmax: gradient as p - z": (
            "p * ((largest - z) + rest) - z * q",
            "xp.sum(z, axis=-1, keepdims=True) * p - z * (p + q)",
        ),
        "softmax: gradient, tied targets": (" + (ties - 1) * largest", ""),
        "softmax: gradient, the largest target left out": ("((largest - z) + rest)", "rest"),
        "softmax: gradient, the target is the largest": ("t.e, (1 - t.e) + t.s)", "t.e, t.s)"),
        "softmax: Hessian, every class is the largest": ("((1 - t.e) + t.s)", "t.s"),
        "softmax: Hessian as p (1 - p)": ("keepdims=True) * p * q", "keepdims=True) * p * (1 - p)"),
        "index: Hessian, no class is apart": ("e = t.e - major", "e, major = t.e, 0 * major"),
        "index: Hessian, the class y as the others": ("t.e_y * (t.rest / total)", "t.e_y * (1 - t.e_y / total)"),
        "softmax: Hessian, weight left out": ("xp.sum(z, axis=-1, keepdims=True) * p * q", "p * q"),
        "softmax: masked by -1e9": ("fill=-math.inf", "fill=-1e9"),
        "index: log1p written out": ("xp.log1p(t.rest + (t.e_y - 1))", "xp.log(t.s + t.e_y)"),
        "index: log1p written out, native": ("xp.log1p(t.rest / t.e_y)", "xp.log(1 + t.rest / t.e_y)", EAGER),
        "index: the target among the others": (
            "xp.put_along_axis(xp.exp(d), at, 0.0), xp.exp(d_y)",
            "xp.exp(d), xp.exp(d_y)",
        ),
        "index: the target among the others, native": ("e = xp.put_along_axis(e, at, 0.0)", "pass", EAGER),
        "index: the target not in the sum": ("xp.log1p(t.rest + (t.e_y - 1))", "xp.log1p(t.s)"),
        "index: the target's distance left out": ("(t.e_y - 1)) - t.d_y", "(t.e_y - 1))"),
        "index: infinity less infinity": (
            "xp.where(x == math.inf, 0.0, x - m), xp.where(x_y == math.inf, 0.0, x_y - m)",
            "x - m, x_y - m",
        ),
        "index: infinity less infinity, at the target": ("xp.where(x_y == math.inf, 0.0, x_y - m)", "x_y - m"),
        "index: every class at -inf": (
            "xp.where(x == math.inf, 0.0, x - m), xp.where(x_y == math.inf, 0.0, x_y - m)",
            "xp.where(x == m, 0.0, x - m), xp.where(x_y == m, 0.0, x_y - m)",
        ),
        "index: value, weight left out": ("return values if weights.weight is None else", "return values if True else"),
        "index: gradient, sign": ("weights.position, -t.rest)", "weights.position, t.rest)"),
        "index: gradient, weight left out": ("(1 if weights.weight is None else weights.weight) /", "1 /"),
        "index: gradient, the target not in the sum": ("/ (t.rest + t.e_y)", "/ t.rest"),
        "index: gradient, shares that add up to less": (
            "/ (t.rest + t.e_y)",
            "/ (t.rest + t.e_y) ** (len(t) > 3)",
            EAGER,
        ),
    },
    "formulas/targets.py": {
        "index: ignore_index, the others": (
            "is None else targets == options.ignore_index",
            "is None else targets != options.ignore_index",
        ),
        "index: ignore_index, every negative one": (
            "is None else targets == options.ignore_index",
            "is None else targets < 0",
        ),
        "index: weight of the class before": ("like.dtype, copy=False), index)", "like.dtype, copy=False), index - 1)"),
        "index: sample_weight left out": ("total * sample_weight", "total"),
        "index: weight left out": ("total * sample_weight", "sample_weight"),
        "index: the ignored carry a loss": ("xp.where(ignored, 0.0, total)", "total"),
        "index: an ignored example's logits leak": (
            "x if self.keep is None or xp.assume_finite else xp.where(self.keep, x, 0.0)",
            "x",
        ),
        "index: a wrong index is 0": (
            "xp.where(out_of_range, math.nan, xp.astype(~out_of_range",
            "xp.where(out_of_range, 0.0, xp.astype(~out_of_range",
        ),
        "index: a wrong index in the divisor": ("counts = xp.where(out_of_range, 0.0, counts)", "pass"),
        "index: a wrong index is ignored": (
            "out_of_range if ignored is None else xp.logical_and(out_of_range, ~ignored)",
            "out_of_range & False",
        ),
        "index: of a mask, above the classes": (" | (targets >= xp.extent(like, -1))", "", STRICT),
        "index: of a mask, negative": ("(targets < 0) | ", "", STRICT),
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
        "elementwise: a masked logit leaks": ("x if self.keep is None else xp.where(self.keep, x, fill)", "x"),
        "elementwise: a masked target leaks": ("z = xp.where(keep, z, 0.0)", "pass"),
        "elementwise: a masked weight leaks": (
            "weight = counts if weight is None else xp.where(keep, weight, 0.0)",
            "weight = counts if weight is None else weight",
        ),
        "elementwise: a masked pos_weight leaks": ("xp.where(keep, pos_weight, 1.0)", "pos_weight"),
        "elementwise: the mask left out": ("xp.where(keep, xp.ones_like(like), 0.0)", "xp.ones_like(like)"),
        "elementwise: weights taken to sum to 1": ("else negative + positive", "else None"),
        "distribution: an index of a masked class": ("one_hot = xp.logical_and(one_hot, where)", "pass"),
        "distribution: a wrong index is 0": (
            "xp.expand_dims(out_of_range, axis=-1), math.nan, z",
            "xp.expand_dims(out_of_range, axis=-1), 0.0, z",
        ),
        "distribution: a negative index counts from the end": (
            "index = xp.as_index(targets, like)",
            "index = xp.where(targets < 0, targets + like.shape[-1], targets)",
        ),
        "distribution: ignore_index, the others": (
            "ignored = index == options.ignore_index",
            "ignored = index != options.ignore_index",
        ),
        "distribution: ignore_index, every negative one": (
            "ignored = index == options.ignore_index",
            "ignored = index < 0",
        ),
        "distribution: ignore_index, a class is never ignored": (
            "ignored = index == options.ignore_index",
            "ignored = out_of_range & (index == options.ignore_index)",
        ),
        "distribution: weight of masked classes": ("z if where is None else xp.where(where, z, 0.0)", "z"),
        "distribution: ignored by any mask": ("empty = ~xp.any(where", "empty = ~xp.all(where"),
        "distribution: ignore_index forgets empty examples": (
            "empty if ignored is None else xp.logical_or(ignored, empty)",
            "empty if ignored is None else ignored",
        ),
        "distribution: weights not in the divisor": (
            "counts = xp.sum(z * weight, axis=-1)",
            "counts = xp.sum(z, axis=-1)",
        ),
        "distribution: divisor of smoothed targets": (
            "counts = xp.sum(z * weight, axis=-1)",
            "ε = options.label_smoothing or 0.0; counts = xp.sum((z * (1 - ε) + ε / like.shape[-1]) * weight, axis=-1)",
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
            "xp.astype(~ignored, like.dtype) if counts is None",
            "None if counts is None",
        ),
        "distribution: the ignored's weight in the divisor": ("xp.where(ignored, 0.0, counts)", "counts"),
        "distribution: smoothing ε/2": ("smoothing / lengths.count(xp, like, (-1,))", "smoothing / 2"),
        "distribution: smoothing ε/K, masked classes counted": ("xp.where(k == 0, 1.0, k)", "like.shape[-1]"),
        "distribution: smoothing of masked classes": (
            "xp.where(where, smoothing / xp.where(k == 0, 1.0, k), 0.0)",
            "smoothing / xp.where(k == 0, 1.0, k)",
        ),
        "distribution: smoothing adds": ("z * (1 - smoothing) + uniform", "z + uniform"),
        "distribution: weight left out": ("z = z * weight\n", "pass\n"),
        "distribution: sample_weight left out": ("z = z * xp.expand_dims(sample_weight, axis=-1)", "pass"),
        "distribution: a masked logit leaks": ("x if self.where is None else xp.where(self.where, x, fill)", "x"),
        "distribution: an ignored example's logits leak": (
            "x if self.ignored is None else xp.where(xp.expand_dims(self.ignored, axis=-1), 0.0, x)",
            "x",
        ),
        "distribution: an ignored example has no class": (
            "xp.where(xp.expand_dims(self.ignored, axis=-1), 0.0, x)",
            "xp.where(xp.expand_dims(self.ignored, axis=-1), fill, x)",
        ),
        "distribution: an ignored example's targets leak": (
            "z = xp.where(xp.expand_dims(ignored, axis=-1), 0.0, z)",
            "pass",
        ),
    },
    "formulas/reduce.py": {
        "form: of one class, though smoothed": ("options.indices and not smoothed and", "options.indices and"),
        "form: of one class, though classes are masked": (" and operands.where is None", ""),
        "sum for mean": ("else mean(xp, xp.sum(values), divisor)", "else xp.sum(values)"),
        "gradient of the sum for the mean": ("if divisor is not None:\n        scale", "if False:\n        scale"),
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
            "xp.where(nothing, 0 * total, total / xp.where(nothing, 1.0, divisor.weight))",
            "total / divisor.weight",
        ),
        "mean of nothing, a wrong index among it": ("nothing, 0 * total,", "nothing, 0.0,"),
        "gradient outside the mask": ("scaled if weights.keep is None else xp", "scaled if True else xp"),
        "Hessian for gradient": (
            "for derivative in (form.gradient, form.hessian)",
            "for derivative in (form.hessian, form.gradient)",
        ),
        "half: computed in itself": ("xp.astype(x, xp.float32) if options.half else x", "x", HALF),
        "half: rounded before the sum": (
            "xp.astype(_reduced(xp, options, form.value(xp, terms, weights)",
            "xp.astype(_reduced(xp, options, xp.astype(xp.astype(form.value(xp, terms, weights), x.dtype), xp.float32)",
            HALF,
        ),
        "half: summed in itself": (
            "xp.astype(_reduced(xp, options, form.value(xp, terms, weights)",
            "xp.astype(_reduced(xp, options, xp.astype(form.value(xp, terms, weights), x.dtype)",
            HALF,
        ),
        "half: gradient rounded before the mean": (
            "return Gradient(form.gradient(xp, terms, weights),",
            "return Gradient(xp.astype(xp.astype(form.gradient(xp, terms, weights), xp.float16), xp.float32),",
            HALF,
        ),
        "cotangent left out": (
            "cotangent = xp.astype(cotangent, found.array.dtype, copy=False)",
            "cotangent = None",
            TORCH,
        ),
        "cotangent of a mean left out": ("1.0 if scale is None else scale, divisor)", "1.0, divisor)", TORCH),
        "by targets: the divisor is constant": (
            "return Divisor(None, xp.sum(weights.counts))",
            "c = xp.sum(weights.counts); return Divisor(None, xp.stop_gradient(c) if 'autodiff' in xp.groups else c)",
            ("--backend", "torch", "--dtype", "float32", "--case", "weighted"),
        ),
        "tangent: divisor left out": (
            "_reduced(xp, options, change, divisor)",
            "_reduced(xp, options, change, None)",
            JAX,
        ),
        "tangent: outside the mask": ("xp.where(weights.keep, tangent, 0.0)", "tangent", JAX),
    },
    "lengths.py": {
        "mean of no examples": ("xp.longest(known, 1)", "(known or math.nan)"),
    },
    "namespace.py": {
        "heaviside: of the other side": ("self.astype(x >= 0, x.dtype)", "self.astype(x <= 0, x.dtype)"),
        "guard of 0·inf left out": (
            "self.where(self.logical_and(weight == 0, self.isinf(size)), 0.0, size), weight)",
            "size, weight)",
        ),
        "guard of 0·inf takes NaN": ("self.logical_and(weight == 0, self.isinf(size))", "weight == 0"),
        "by a mask: weight": (
            "self.where(self.position(weight, index), weight, 0.0)",
            "self.where(self.position(weight, index), 0 * weight + 1, 0.0)",
            STRICT,
        ),
        "by a mask: the class before": (
            "self.classes(x) == self.expand_dims(index, axis=-1)",
            "self.classes(x) == self.expand_dims(index - 1, axis=-1)",
            STRICT,
        ),
        "by a mask: 0·inf": ("self.where(position, x, 0.0)", "self.astype(position, x.dtype) * x", STRICT),
        "by a mask: put over all": (
            "self.where(position, values if isinstance(values, float) else self.expand_dims(values, axis=-1), x)",
            "values + 0 * x if isinstance(values, float) else self.expand_dims(values, axis=-1) + 0 * x",
            STRICT,
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
    mutated = tree / "unilabel" / mutation.file
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
