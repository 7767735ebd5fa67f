"""Small bugs, planted in formulas.py or beside it one at a time: the conformance suite has to see every one of them.

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
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    right: str
    wrong: str
    arguments: tuple[str, ...] = ("--backend", "numpy", "--dtype", "float32")
    file: str = "formulas.py"


HALF = ("--backend", "numpy", "--dtype", "float16", "--dtype", "bfloat16")
# NumPy has no autodiff: what pulls a cotangent back, or pushes a tangent forward, runs on torch and JAX only.
TORCH = ("--backend", "torch", "--dtype", "float32", "--case", "seed", "--case", "masked")
JAX = ("--backend", "jax", "--dtype", "float32", "--case", "seed", "--case", "masked")  # all would compile for minutes
EAGER = ("--backend", "torch", "--dtype", "float32")  # has the fused functions
STRICT = ("--backend", "array_api_strict", "--dtype", "float32")  # knows a class index by a mask
ROW_IGNORED = "\n            ignored = targets == options.ignore_index"

MUTATIONS = {
    # The multilabel logistic loss
    "logistic: value, masses swapped": Mutation(
        "t.up * t.negative - (1 - t.up) * t.positive", "t.up * t.positive - (1 - t.up) * t.negative"
    ),
    "logistic: value, plain, targets as they are": Mutation("t.up - t.positive if", "t.up + t.positive if"),
    "logistic: value, plain, without the side": Mutation("t.up - t.positive if", "0.5 - t.positive if"),
    "logistic: log1p written out": Mutation("near = xp.log1p(t.e)", "near = xp.log(1 + t.e)"),
    "logistic: masses of the logarithm left out": Mutation(
        "t.x, t.finite)\n    return far + (near if t.both is None else near * t.both)",
        "t.x, t.finite)\n    return far + near",
    ),
    "logistic: exponent clamped": Mutation("xp.exp(-size)", "xp.exp(-xp.minimum(size, xp.asarray(20.0)))"),
    "logistic: gradient, sign": Mutation("- t.positive * e_down", "+ t.positive * e_down"),
    "logistic: gradient as sigmoid - z": Mutation(
        "(negative * e_up - t.positive * e_down) / (1 + t.e)",
        "(negative + t.positive) * (e_up / (1 + t.e)) - t.positive",
    ),
    "logistic: gradient at 0": Mutation("(negative * e_up", "(negative * (t.x != 0) * e_up"),
    "logistic: Hessian, square left out": Mutation("((1 + t.e) * (1 + t.e))", "(1 + t.e)"),
    "logistic: Hessian as p (1 - p)": Mutation(
        "t.e / ((1 + t.e) * (1 + t.e))", "(1 / (1 + t.e)) * (1 - 1 / (1 + t.e))"
    ),
    "fused: softplus of x": Mutation("xp.softplus(xp.minimum(t.x, t.minus))", "xp.softplus(t.x)", EAGER),
    "fused: the labels' ramps swapped": Mutation("xp.lerp(above, below,", "xp.lerp(below, above,", EAGER),
    "fused: 0·inf": Mutation("if t.negative is None and t.finite:", "if t.negative is None:", EAGER),
    "fused: masses of the logarithm left out": Mutation(
        "below, t.finite)\n    return far + (near if t.both is None else near * t.both)",
        "below, t.finite)\n    return far + near",
        EAGER,
    ),
    "fused: gradient with 1 - p": Mutation(
        "xp.sigmoid(t.x), xp.sigmoid(t.minus)", "(p := xp.sigmoid(t.x)), 1 - p", EAGER
    ),
    "fused: gradient, sign": Mutation("xp.lerp(p, -q,", "xp.lerp(p, q,", EAGER),
    "fused: gradient with masses, sign": Mutation(
        "t.negative * p - t.positive * q", "t.negative * p + t.positive * q", EAGER
    ),
    "guard of 0·inf left out": Mutation(
        "xp.where(xp.logical_and(mass == 0, xp.isinf(size)), 0.0, size), mass)", "size, mass)"
    ),
    "guard of 0·inf takes NaN": Mutation("xp.logical_and(mass == 0, xp.isinf(size))", "mass == 0"),
    # On probabilities
    "clamp: at eps too": Mutation("logical_or(p < eps,", "logical_or(p <= eps,"),
    "clamp: half of eps": Mutation("logical_or(p < eps,", "logical_or(p < eps / 2,"),
    "clamp: none": Mutation("~xp.logical_or(p < eps, ", "~xp.logical_or(p < 0, "),
    "clamp: log 0 without mass": Mutation(", xp.logical_and(p == 0, mass == 0))", ", p < eps)"),
    "clamp: a wrong index is 0 there": Mutation("quotient, 0 * quotient)", "quotient, 0.0)"),
    "quotient: NaN masses where clamped": Mutation("quotient, 0 * quotient)", "quotient, quotient)"),
    "binary: log1p written out": Mutation(
        "xp.log1p(-xp.where(small, t.p, 0.0))", "xp.log(1 - xp.where(small, t.p, 0.0))"
    ),
    "binary: value, negative left out": Mutation("_product(xp, t.negative, -log_q) + ", ""),
    "binary: gradient, sign": Mutation("t.q_free) - _quotient(", "t.q_free) + _quotient("),
    "binary: gradient, p for 1 - p": Mutation(
        "_quotient(xp, t.negative, 1 - t.p, t.q_free)", "_quotient(xp, t.negative, t.p, t.q_free)"
    ),
    "binary: Hessian, sign": Mutation("by_q + _quotient(", "by_q - _quotient("),
    "categorical: floor": Mutation(
        "t.floor)\n    return xp.sum(_product(xp, t.z, -log_p)", "0.0)\n    return xp.sum(_product(xp, t.z, -log_p)"
    ),
    "categorical: gradient, sign": Mutation("return -_quotient(", "return _quotient("),
    "categorical: Hessian, square left out": Mutation(
        "_quotient(xp, _quotient(xp, t.z, t.p, t.free), t.p, t.free)", "_quotient(xp, t.z, t.p, t.free)"
    ),
    "nll: gradient, sign": Mutation("return -t.mass", "return t.mass"),
    "nll: Hessian": Mutation("return 0 * t.mass", "return t.mass"),
    "nll: Hessian, a wrong index is 0 there": Mutation("return 0 * t.mass", "return xp.zeros_like(t.mass)"),
    # Softmax
    "softmax: no maximum": Mutation("(m == math.inf), 0.0, x - m)", "(m == math.inf), 0.0, x)"),
    "softmax: infinity less infinity": Mutation("xp.where(top & (m == math.inf), 0.0, x - m)", "x - m"),
    "softmax: d = 0 for every largest": Mutation("top & (m == math.inf), 0.0", "top, 0.0"),
    "softmax: ties": Mutation(" + (xp.sum(tops, axis=-1, keepdims=True) - 1)", ""),
    "softmax: the largest in s": Mutation(
        "others = xp.sum(xp.where(top, 0.0, e)", "others = xp.sum(xp.where(top, e, e)"
    ),
    "softmax: log1p written out": Mutation(
        "xp.squeeze(xp.log1p(t.s), axis=-1)", "xp.squeeze(xp.log(1 + t.s), axis=-1)"
    ),
    "softmax: targets taken to sum to 1": Mutation("xp.sum(t.z, axis=-1) * xp.squeeze(", "xp.squeeze("),
    "softmax: gradient as p - z": Mutation(
        "p * ((largest - t.z) + rest) - t.z * q", "xp.sum(t.z, axis=-1, keepdims=True) * p - t.z * total"
    ),
    "softmax: gradient, tied targets": Mutation(" + (ties - 1) * largest", ""),
    "softmax: gradient, the largest target left out": Mutation("((largest - t.z) + rest)", "rest"),
    "softmax: gradient, the target is the largest": Mutation("(1 - t.e) + t.s, 1 + t.s", "t.s, 1 + t.s"),
    "softmax: Hessian as p (1 - p)": Mutation("(p / total) * (q / total)", "(p / total) * (1 - p / total)"),
    "softmax: Hessian, mass left out": Mutation("xp.sum(t.z, axis=-1, keepdims=True) * (p / total)", "(p / total)"),
    # Softmax with class indices
    "index: log1p written out": Mutation("xp.log1p(t.s + (t.e_t - 1))", "xp.log(t.s + t.e_t)"),
    "index: log1p written out, of shares": Mutation("xp.log1p(t.s / t.e_t)", "xp.log(1 + t.s / t.e_t)", EAGER),
    "index: the target among the others": Mutation("e = _put(xp, e, t, 0.0)", "pass"),
    "index: the target not in the sum": Mutation("xp.log1p(t.s + (t.e_t - 1))", "xp.log1p(t.s)"),
    "index: the target's distance left out": Mutation("(t.e_t - 1)) - t.d_t", "(t.e_t - 1))"),
    "index: infinity less infinity": Mutation(
        "xp.where(x == math.inf, 0.0, x - m), xp.where(x_t == math.inf, 0.0, x_t - m)", "x - m, x_t - m"
    ),
    "index: infinity less infinity, at the target": Mutation("xp.where(x_t == math.inf, 0.0, x_t - m)", "x_t - m"),
    "index: every class at -inf": Mutation(
        "xp.where(x == math.inf, 0.0, x - m), xp.where(x_t == math.inf, 0.0, x_t - m)",
        "xp.where(x == m, 0.0, x - m), xp.where(x_t == m, 0.0, x_t - m)",
    ),
    "index: value, mass left out": Mutation("return values if t.mass is None else", "return values if True else"),
    "index: gradient, sign": Mutation("t.t, -t.s)", "t.t, t.s)"),
    "index: gradient, mass left out": Mutation("(1 if t.mass is None else t.mass) / (t.s", "1 / (t.s"),
    "index: gradient, the target not in the sum": Mutation("t.mass) / (t.s + t.e_t)", "t.mass) / t.s"),
    "index: gradient, shares that add up to less": Mutation(
        "t.mass) / (t.s + t.e_t)", "t.mass) / (t.s + t.e_t) ** (t.d_t is not None)", EAGER
    ),
    "index: ignore_index, the others": Mutation(
        "is None else targets == options.ignore_index", "is None else targets != options.ignore_index"
    ),
    "index: ignore_index, every negative one": Mutation(
        "is None else targets == options.ignore_index", "is None else targets < 0"
    ),
    "index: weight of the class before": Mutation(
        "xp.take(weight, index) if direct", "xp.take(weight, index - 1) if direct"
    ),
    "index: sample_weight left out": Mutation("mass * sample_weight", "mass"),
    "index: weight left out": Mutation("mass * sample_weight", "sample_weight"),
    "index: the ignored carry a loss": Mutation("xp.where(ignored, 0.0, mass)", "mass"),
    "index: an ignored row's logits leak": Mutation("x if options.finite else xp.where(keep, x, 0.0)", "x"),
    "index: a wrong index is 0": Mutation(
        "xp.where(wrong, math.nan, xp.astype(~wrong", "xp.where(wrong, 0.0, xp.astype(~wrong"
    ),
    "index: a wrong index in the divisor": Mutation("parts = xp.where(wrong, 0.0, parts)", "pass"),
    "index: a wrong index is ignored": Mutation(
        "wrong if ignored is None else xp.logical_and(wrong, ~ignored)", "wrong & False"
    ),
    "index: of a mask, above the classes": Mutation(" | (targets >= lengths.extent(xp, x, -1))", "", STRICT),
    "index: of a mask, negative": Mutation("(targets < 0) | ", "", STRICT),
    "index: of a mask, weight": Mutation(
        "xp.sum(xp.where(t, weight, 0.0)", "xp.sum(xp.where(t, 0 * weight + 1, 0.0)", STRICT
    ),
    # Masses of elements
    "element: labels swapped": Mutation("negative, positive = 1 - z, z", "negative, positive = z, 1 - z"),
    "element: smoothing ε/K": Mutation(
        "positive * (1 - smoothing) + smoothing / 2",
        "positive * (1 - smoothing) + smoothing / x.shape[-1]",
    ),
    "element: smoothing of positives only": Mutation("negative * (1 - smoothing) + smoothing / 2", "negative"),
    "element: pos_weight left out": Mutation("positive * pos_weight", "positive"),
    "element: pos_weight of negatives": Mutation(
        "positive = positive * pos_weight", "negative = negative * pos_weight"
    ),
    "element: pos_weight before smoothing": Mutation(
        "negative, positive = 1 - z, z\n",
        "negative, positive = 1 - z, z if pos_weight is None else z * pos_weight\n    pos_weight = None\n",
    ),
    "element: weight of negatives only": Mutation(
        "negative * weight, positive * weight", "negative * weight, positive"
    ),
    "element: a masked logit leaks": Mutation("x, z = xp.where(keep, x, 0.0), xp", "x, z = x, xp"),
    "element: a masked target leaks": Mutation(
        "xp.where(keep, x, 0.0), xp.where(keep, z, 0.0)", "xp.where(keep, x, 0.0), z"
    ),
    "element: a masked weight leaks": Mutation(
        "weight = parts if weight is None else xp.where(keep, weight, 0.0)",
        "weight = parts if weight is None else weight",
    ),
    "element: a masked pos_weight leaks": Mutation("xp.where(keep, pos_weight, 1.0)", "pos_weight"),
    "element: the mask left out": Mutation("xp.where(keep, xp.ones_like(x), 0.0)", "xp.ones_like(x)"),
    "element: masses taken to sum to 1": Mutation("else negative + positive", "else None"),
    # Masses of rows
    "row: an index of a masked class": Mutation("named = xp.logical_and(named, keep)", "pass"),
    "row: a wrong index is 0": Mutation(
        "xp.expand_dims(wrong, axis=-1), math.nan, z", "xp.expand_dims(wrong, axis=-1), 0.0, z"
    ),
    "row: a negative index counts from the end": Mutation(
        "targets = xp.astype(targets, classes.dtype, copy=False)",
        "targets = xp.where(targets < 0, targets + x.shape[-1], targets)",
    ),
    "row: ignore_index, the others": Mutation(ROW_IGNORED, ROW_IGNORED.replace("==", "!=")),
    "row: ignore_index, every negative one": Mutation(ROW_IGNORED, "\n            ignored = targets < 0"),
    "row: ignore_index, a class is never ignored": Mutation(
        ROW_IGNORED, "\n            ignored = wrong & (targets == options.ignore_index)"
    ),
    "row: mass of masked classes": Mutation("xp.where(keep, z, 0.0)\n    if", "z\n    if"),
    "row: ignored by any mask": Mutation("empty = ~xp.any(keep", "empty = ~xp.all(keep"),
    "row: ignore_index forgets empty rows": Mutation(
        "empty if ignored is None else xp.logical_or(ignored, empty)", "empty if ignored is None else ignored"
    ),
    "row: weights not in the divisor": Mutation("parts = xp.sum(z * weight, axis=-1)", "parts = xp.sum(z, axis=-1)"),
    "row: divisor of smoothed targets": Mutation(
        "parts = xp.sum(z * weight, axis=-1)",
        "ε = options.label_smoothing or 0.0; parts = xp.sum((z * (1 - ε) + ε / x.shape[-1]) * weight, axis=-1)",
    ),
    "row: a masked class's weight leaks": Mutation(
        "weight = weight if keep is None else xp.where(keep, weight, 0.0)", "pass"
    ),
    "row: sample_weight not in the divisor": Mutation(
        "sample_weight if parts is None else parts * sample_weight", "parts"
    ),
    "row: sample_weight for weight in the divisor": Mutation("parts * sample_weight", "sample_weight"),
    "row: the ignored in the divisor": Mutation(
        "xp.astype(~ignored, x.dtype) if parts is None", "None if parts is None"
    ),
    "row: the ignored's weight in the divisor": Mutation("xp.where(ignored, 0.0, parts)", "parts"),
    "row: smoothing ε/2": Mutation("smoothing / lengths.count(xp, x, (-1,))", "smoothing / 2"),
    "row: smoothing ε/K, masked classes counted": Mutation("xp.where(count == 0, 1.0, count)", "x.shape[-1]"),
    "row: smoothing of masked classes": Mutation(
        "xp.where(keep, smoothing / xp.where(count == 0, 1.0, count), 0.0)",
        "smoothing / xp.where(count == 0, 1.0, count)",
    ),
    "row: smoothing adds": Mutation("z * (1 - smoothing) + uniform", "z + uniform"),
    "row: weight left out": Mutation("z = z * weight\n", "pass\n"),
    "row: sample_weight left out": Mutation("z = z * xp.expand_dims(sample_weight, axis=-1)", "pass"),
    "row: a masked logit leaks": Mutation("x = xp.where(keep, x, masked)", "pass"),
    "row: masked by -1e9": Mutation("masked=-math.inf", "masked=-1e9"),
    "row: an ignored row's logits leak": Mutation("x, z = xp.where(gone, 0.0, x), xp", "x, z = x, xp"),
    "row: an ignored row's targets leak": Mutation(
        "xp.where(gone, 0.0, x), xp.where(gone, 0.0, z)", "xp.where(gone, 0.0, x), z"
    ),
    # Reductions
    "sum for mean": Mutation("else mean(xp, xp.sum(values), divisor)", "else xp.sum(values)"),
    "gradient of the sum for the mean": Mutation("if divisor is not None:\n        scale", "if False:\n        scale"),
    "mean for sum": Mutation('options.reduction not in ("mean", "batchmean")', 'options.reduction == "none"'),
    "sum for batchmean": Mutation('not in ("mean", "batchmean")', 'not in ("mean",)'),
    "batchmean over what takes part": Mutation('options.reduction == "mean" and masses.parts', "masses.parts"),
    "mean over examples": Mutation(
        'options.axes if loss.per_row or options.reduction == "batchmean" else ()', "options.axes"
    ),
    "mean over elements": Mutation(
        'options.axes if loss.per_row or options.reduction == "batchmean" else ()',
        "options.axes if loss.per_row else ()",
    ),
    "batchmean, the class axis last": Mutation("out = options.axes if", "out = (-1,) if"),
    "mean of no rows": Mutation("else max(known, 1)", "else (known or math.nan)", file="lengths.py"),
    "mean of nothing": Mutation(
        "xp.where(nothing, 0 * total, total / xp.where(nothing, 1.0, divisor.parts))", "total / divisor.parts"
    ),
    "mean of nothing, a wrong index among it": Mutation("nothing, 0 * total,", "nothing, 0.0,"),
    "gradient outside the mask": Mutation("scaled if masses.keep is None else xp", "scaled if True else xp"),
    "Hessian for gradient": Mutation(
        "for derivative in (loss.gradient, loss.hessian)", "for derivative in (loss.hessian, loss.gradient)"
    ),
    # Half precision
    "half: computed in itself": Mutation(
        "xp.astype(x, xp.float32) if options.half else x\n\n\ndef _product", "x\n\n\ndef _product", HALF
    ),
    "half: rounded before the sum": Mutation(
        "values = loss.value(xp, loss.terms(xp, masses, options))\n",
        "values = xp.astype(xp.astype(loss.value(xp, loss.terms(xp, masses, options)), x.dtype), masses.x.dtype)\n",
        HALF,
    ),
    "half: summed in itself": Mutation(
        "values = loss.value(xp, loss.terms(xp, masses, options))\n",
        "values = xp.astype(loss.value(xp, loss.terms(xp, masses, options)), x.dtype)\n",
        HALF,
    ),
    "half: gradient rounded before the mean": Mutation(
        "return Slopes(loss.gradient(xp, terms),",
        "return Slopes(xp.astype(xp.astype(loss.gradient(xp, terms), xp.float16), xp.float32),",
        HALF,
    ),
    # Incoming gradients
    "cotangent left out": Mutation("scale = xp.astype(cotangent, masses.x.dtype, copy=False)", "scale = None", TORCH),
    "cotangent of a mean left out": Mutation("1.0 if scale is None else scale, divisor)", "1.0, divisor)", TORCH),
    "by targets: the divisor is constant": Mutation(
        "return Divisor(None, xp.sum(masses.parts))",
        "return Divisor(None, _constant(xp, xp.sum(masses.parts)))",
        ("--backend", "torch", "--dtype", "float32", "--case", "weighted"),
    ),
    "tangent: divisor left out": Mutation(
        "_reduced(xp, change, divided_by(xp, loss, masses, options), options)",
        "_reduced(xp, change, None, options)",
        JAX,
    ),
    "tangent: outside the mask": Mutation("xp.where(masses.keep, tangent, 0.0)", "tangent", JAX),
}


def mutate(text: str, mutation: Mutation) -> str:
    count = text.count(mutation.right)
    if count != 1:
        raise ValueError(f"expected once in {mutation.file}, found {count} times: {mutation.right!r}")
    return text.replace(mutation.right, mutation.wrong)


def failing(mutation: Mutation, tree: Path) -> list[str]:
    """The families of cases that fail with the mutation, and with it alone, on a copy of the package in this folder."""
    for folder, place in {"unilabel": "", "backends": "backends", "conformance": "conformance"}.items():
        shutil.copytree(
            ROOT / folder,
            tree / "unilabel" / place,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "vectors"),
        )
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
    line = "import math\n"
    settings = dict.fromkeys(mutation.arguments for mutation in chosen.values())
    controls = {f"unmutated, {' '.join(setting)}": Mutation(line, line, setting) for setting in settings}
    with ThreadPoolExecutor(2) as pool:
        good = list(pool.map(check, *zip(*(controls | chosen).items(), strict=True)))
    print(f"{sum(good[len(controls) :])} of {len(chosen)} mutations caught")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
