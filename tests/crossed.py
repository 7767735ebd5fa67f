"""What every transform is crossed with: losses, reductions, kinds of targets, options, places of the class axis.

`planned(framework, transform)` lists the calls of one row of docs/transforms.md: one with all defaults for each loss,
and others with options that hold every level of every factor. They are drawn for each row anew; one row of each
framework, marked `pairs=True`, has every pair of levels besides (test_crossed.py looks).
`Sample` makes such a call, with what is right for it by the oracle.
"""

import itertools
import random

import numpy as np
from unilabel.conformance import cases
from unilabel.conformance.cases import Maker, Tensor
from unilabel.conformance.oracle import expected

import unilabel as ul

SEED = 20261125
LOSSES = {name: loss for name, loss in cases.LOSSES.items() if loss.takes != "features"}
LINEAR = {f"linear_{name}": name for name in ("multilabel_logistic_loss", "softmax_nll")}  # and the loss of its logits
OF_LINEAR = {"losses": tuple(LINEAR), "brief": True}  # of a row of docs/transforms.md
PER_EXAMPLE = tuple(name for name, loss in LOSSES.items() if loss.per_example)
ELEMENTWISE = tuple(name for name in LOSSES if name not in PER_EXAMPLE)
RANGES = {"multilabel_logistic_loss": (-6, 6), "softmax_nll": (-6, 6), "nll": (-6, -0.01)}

# The levels of each factor. The first is what a call without options has.
COMMON = {
    "reduction": ("default", "none", "sum", "mean", "batchmean"),
    "label_smoothing": ("no", "number", "array"),
    "weight": ("no", "yes"),
    "where": ("no", "of classes", "of each"),
    "axis": ("last", "middle", "two"),
}
FACTORS = {
    True: COMMON
    | {"targets": ("indices", "distribution"), "sample_weight": ("no", "yes"), "ignore_index": ("no", "yes")},
    False: COMMON | {"targets": ("integer", "bool", "float", "positives"), "pos_weight": ("no", "yes")},
}


class Row:
    """One planned call: a loss, and a level of each factor."""

    def __init__(self, loss, levels):
        self.loss, self.levels = loss, levels

    def __getitem__(self, factor):
        return self.levels.get(factor, "no")

    @property
    def touches(self):
        """The loss, and the levels of its kind."""
        return {self.loss} | {(is_per_example(self.loss), *level) for level in self.levels.items()}

    def __str__(self):
        """What is not as in a call without options."""
        first = {factor: levels[0] for factor, levels in factors(self.loss).items()}
        named = [f"{factor} {level}" for factor, level in self.levels.items() if level != first[factor]]
        return ", ".join([self.loss, *named]).replace(" yes", "")


def is_per_example(loss):
    return LINEAR.get(loss, loss) in PER_EXAMPLE


def factors(loss):
    found = FACTORS[is_per_example(loss)]
    if loss not in LINEAR:
        return found
    return {factor: levels for factor, levels in found.items() if factor != "axis"} | {"linear_bias": ("no", "yes")}


def allowed(loss, fixed=None):
    """The levels of each factor, less those that a transform cannot do with."""
    found = {factor: (fixed or {}).get(factor, levels) for factor, levels in factors(loss).items()}
    return {factor: (levels,) if isinstance(levels, str) else levels for factor, levels in found.items()}


def possible(levels):
    return (levels.get("targets"), levels.get("ignore_index")) != ("distribution", "yes")


def combined(levels, size):
    """Each level (size 1) or pair of levels (2) of a call."""
    return set(itertools.combinations(sorted(levels.items()), size))


def rows(framework, transform, losses, fixed=None, pairs=False):
    """The calls that a transform is tried with, for losses of one kind: all levels, and for each loss the defaults.

    `fixed` holds the level that the transform cannot do without, or those that it can do with: {"reduction": "none"}.
    """
    choices, size = allowed(losses[0], fixed), 2 if pairs else 1
    plan = [Row(loss, {factor: levels[0] for factor, levels in choices.items()}) for loss in losses]
    drawn = random.Random(f"{SEED} {framework} {transform} {losses}")
    missing = set()
    for some in itertools.combinations(choices, size):
        every = itertools.product(*(choices[factor] for factor in some))
        found = (dict(zip(some, levels, strict=True)) for levels in every)
        missing |= set().union(*(combined(levels, size) for levels in found if possible(levels)))
    turn = itertools.cycle(losses)
    while missing or len(plan) < 2 * len(losses):
        candidates = [{factor: drawn.choice(levels) for factor, levels in choices.items()} for _ in range(50)]
        candidates = [levels for levels in candidates if possible(levels) and levels != plan[0].levels]
        best = max(candidates, key=lambda levels: len(missing & combined(levels, size)))
        missing -= combined(best, size)
        plan.append(Row(next(turn), best))
    return plan


def planned(framework, transform, losses=LOSSES, fixed=None, brief=False, pairs=False):
    """The calls that a transform is tried with.

    Each loss is tried with every level; where a call takes seconds (`brief`), the losses of one kind share them out.
    """
    kinds = [[loss for loss in losses if is_per_example(loss) == kind] for kind in (True, False)]
    groups = [kind for kind in kinds if kind] if brief else [[loss] for loss in losses]
    return [row for group in groups for row in rows(framework, transform, group, fixed, pairs)]


def quick(plans):
    """One call of each plan, for a quick run: together they touch every loss and level, if that many can."""
    touched, chosen = set(), []
    for plan in plans:
        chosen.append(max(plan, key=lambda row: len(row.touches - touched)))
        touched |= chosen[-1].touches
    return chosen


class Exact(np.ndarray):
    """What is right, and for each number the sum of the sizes of what it was added up from: cancelling costs digits."""

    terms = None

    @classmethod
    def of(cls, numbers, shape):
        found = np.array([float(number.value) for number in numbers]).reshape(shape).view(cls)
        found.terms = np.array([float(number.terms) for number in numbers]).reshape(shape)
        return found

    def scaled(self, factor):
        found = (np.asarray(self) * factor).view(Exact)
        found.terms = self.terms * np.abs(factor)
        return found


class Sample:
    """A planned call in float64, of 4 examples with 3 classes (6 on two axes), as NumPy arrays, and what is right.

    The first axis is always one of examples. `arrays` are the operands beside logits and targets, by name; `options`
    all else. `targets` of `ul.Positives` are their indices, and `dense` what they stand for. Right by the oracle:
    `value`; `gradient`, of the value's sum by the logits; `pulled_back`, the same with the value's `cotangent`;
    `hessian`, the diagonal of the second derivative of the value's sum; and `gradient_of_sum`, the gradient if the
    reduction were "sum".
    """

    def __init__(self, row, rows=4, classes=3, seed=0):
        self.row, self.name, self.loss = row, LINEAR.get(row.loss, row.loss), getattr(ul, row.loss)
        self.per_example = self.name in PER_EXAMPLE
        drawn = np.random.default_rng((SEED, seed))
        two, middle = row["axis"] == "two", row["axis"] == "middle"
        classes = 2 * classes if two else classes
        batch = (rows, 2) if middle else (rows,)
        shape = (rows, 2, classes // 2) if two else (rows, classes, 2) if middle else (rows, classes)

        def placed(array):
            """An array with its classes last, as the logits have theirs."""
            return np.moveaxis(array, -1, 1) if middle else array.reshape(shape)

        keep, arrays = np.ones((*batch, classes), bool), {}
        if row["where"] == "of classes":
            keep[..., drawn.integers(classes)] = False
        elif row["where"] == "of each":
            keep = drawn.uniform(size=keep.shape) < 0.7
            keep[..., drawn.integers(classes)] = True  # each example has a class
        options = {"axis": {"middle": 1, "two": (1, 2)}[row["axis"]]} if two or middle else {}
        if row["reduction"] != "default":
            options["reduction"] = row["reduction"]
        of_each = drawn.uniform(0.05, 1, keep.shape)
        if row["targets"] == "indices":
            targets = np.argmax(keep * of_each, -1)
            if row["ignore_index"] == "yes":
                targets.flat[-1] = options["ignore_index"] = -100
        elif row["targets"] == "distribution":
            targets = placed(of_each / of_each.sum(-1, keepdims=True))
        else:
            kind = {"bool": lambda z: z < 0.5, "float": lambda z: z}
            targets = kind.get(row["targets"], lambda z: (z < 0.5).astype("int64"))(placed(of_each))
        of_classes = (2, classes // 2) if two and not self.per_example else (classes,)
        of_classes += (1,) if middle and not self.per_example else ()
        sizes = {"weight": of_classes, "sample_weight": batch, "pos_weight": shape}
        arrays = {name: drawn.uniform(0.5, 2, size) for name, size in sizes.items() if row[name] == "yes"}
        if row["where"] != "no":
            arrays["where"] = placed(keep) if row["where"] == "of each" else placed(keep)[:1]
        x = self.inputs_of(drawn, shape)
        smoothing = {} if row["label_smoothing"] == "no" else {"label_smoothing": 0.1}

        case = Maker("crossed", "float64", SEED + seed).case(
            self.name, tensor(x), tensor(targets), **options, **smoothing,
            **{name: tensor(array) for name, array in arrays.items()},
        )  # fmt: skip
        right = expected(case)
        self.cotangent = np.array(case.cotangent.values).reshape(case.cotangent.shape)
        self.value = Exact.of(right.value, self.cotangent.shape)
        self.gradient, self.pulled_back = (Exact.of(found, shape) for found in (right.gradient_of_sum, right.gradient))
        summed = expected(case._replace(options=case.options | {"reduction": "sum"}, cotangent=tensor(1.0)))
        self.gradient_of_sum = Exact.of(summed.gradient, shape)
        largest = np.argmax(np.abs(self.gradient_of_sum))
        of_sum = self.gradient_of_sum.flat[largest]  # 0 if no example takes part
        divided = float(self.gradient.flat[largest] / of_sum) if of_sum else 1.0
        self.hessian = Exact.of(right.hessian, shape).scaled(divided)

        if row["label_smoothing"] == "array":
            arrays["label_smoothing"] = np.array(0.1)
            smoothing = {}
        self.dense, self.targets = targets, padded(of_each < 0.5) if row["targets"] == "positives" else targets
        self.x, self.arrays, self.options = x, arrays, options | smoothing

    def inputs_of(self, drawn, shape):
        """What the oracle's loss takes."""
        low, high = RANGES.get(self.name, (0.01, 0.99))
        return drawn.uniform(low, high, shape)

    @property
    def owners(self):
        """For each logit, the number of the loss that it belongs to, if each had its own (reduction="none")."""
        if not self.per_example:
            return np.arange(self.x.size).reshape(self.x.shape)
        examples = np.arange(len(self.x) * (2 if self.row["axis"] == "middle" else 1))
        if self.row["axis"] == "middle":
            return np.broadcast_to(examples.reshape(-1, 1, 2), self.x.shape)
        return np.broadcast_to(examples.reshape(-1, *[1] * (self.x.ndim - 1)), self.x.shape)

    @property
    def jacobian(self):
        """The derivative of the value by the logits, in full: no loss has a part in another's."""
        if self.value.ndim == 0:
            return self.gradient
        own = np.arange(self.value.size).reshape(*self.value.shape, *[1] * self.x.ndim) == self.owners
        full = (np.asarray(self.gradient) * own).view(Exact)
        full.terms = self.gradient.terms * own
        return full

    def check_hessian(self, got, ulp=16):
        """The second derivative of the value's sum, in full: its diagonal, and 0 where there is no mixed derivative."""
        got, size = np.asarray(got), self.x.size
        assert got.shape == self.x.shape * 2
        got = got.reshape(size, size)
        close(np.diag(got).reshape(self.x.shape), self.hessian, ulp=ulp)
        owners = self.owners.ravel()
        assert (got[owners[:, None] != owners] == 0).all()
        if self.name == "softmax_nll":  # moving all logits of an example moves nothing
            np.testing.assert_allclose(got.sum(1), 0, atol=1e-15)
        else:
            assert (got[~np.eye(size, dtype=bool)] == 0).all()

    def of(self, rows=4, classes=3, seed=1):
        """The same call with other lengths and numbers."""
        return type(self)(self.row, rows, classes, seed)

    def beside(self, convert):
        """The same call with its operands, but logits and targets, converted to the framework's arrays."""
        found = object.__new__(type(self))
        found.__dict__ = self.__dict__ | {"arrays": {name: convert(array) for name, array in self.arrays.items()}}
        return found

    def as_targets(self, targets=None):
        """These targets, or else its own, as the loss takes them."""
        targets = self.targets if targets is None else targets
        return ul.Positives(targets) if self.row["targets"] == "positives" else targets

    def __call__(self, x, targets=None, **more):
        return self.loss(x, self.as_targets(targets), **self.arrays | self.options | more)

    def closed(self, form):
        """The call of `ul.value_and_grad` or `ul.grad_and_hess` of the loss."""
        return lambda x, targets=None, **more: form(self.loss)(
            x, self.as_targets(targets), **self.arrays | self.options | more
        )


class LinearSample(Sample):
    """The same of a loss on the last linear layer's inputs, whose products are exact: its logits are the oracle's.

    `inputs`: features, weight and maybe a bias. `through(gradient)` are their gradients, by that of the logits.
    """

    def inputs_of(self, drawn, shape):
        def numbers(*shape):
            return drawn.integers(-24, 25, shape) / 16

        self.features, self.weight = numbers(shape[0], 2), numbers(shape[1], 2)
        self.bias = (numbers(shape[1]),) if self.row["linear_bias"] == "yes" else ()
        return self.on_logits(*self.inputs)

    @property
    def inputs(self):
        return self.features, self.weight, *self.bias

    @staticmethod
    def on_logits(features, weight, bias=0.0):
        return features @ weight.T + bias

    def through(self, gradient):
        def product(a, b):
            found = (np.asarray(a) @ np.asarray(b)).view(Exact)
            found.terms = getattr(a, "terms", np.abs(a)) @ getattr(b, "terms", np.abs(b))
            return found

        turned = np.asarray(gradient).T.view(Exact)
        turned.terms = gradient.terms.T
        of_bias = product(turned, np.ones(len(self.features))) if self.bias else None
        found = product(gradient, self.weight), product(turned, self.features), of_bias
        return found if self.bias else found[:2]

    def __call__(self, features, linear_weight, *bias, targets=None, **more):
        given = self.arrays | self.options | dict(zip(("linear_bias",), bias, strict=False)) | more
        return self.loss(features, linear_weight, self.as_targets(targets), **given)

    def closed(self, features, linear_weight, *bias, targets=None, **more):
        """Of `ul.value_and_grad`: the value and each gradient, without that of a bias that is not there."""
        given = self.arrays | self.options | dict(zip(("linear_bias",), bias, strict=False)) | more
        value, found = ul.value_and_grad(self.loss)(features, linear_weight, self.as_targets(targets), **given)
        assert (found.linear_bias is None) == (not bias)
        return value, *found[: 2 + len(bias)]

    def materialised(self, x, targets=None, **more):
        """The loss of the logits."""
        return getattr(ul, self.name)(x, self.as_targets(targets), **self.arrays | self.options | more)

    def with_all_logits(self, *inputs, **more):
        """The same loss of the inputs, by way of all logits."""
        return self.materialised(self.on_logits(*inputs), **more)


def padded(targets):
    """The labels of each example, the last one first and, if there is room, twice; then -1, to as many as classes."""
    length = targets.shape[-1]
    rows = (np.flatnonzero(labels)[::-1] for labels in targets.reshape(-1, length))
    rows = [np.append(row, [*row[:1], *[-1] * length])[:length] for row in rows]
    return np.reshape(rows, targets.shape)


def tensor(array):
    return Tensor(np.shape(array), np.ravel(array).tolist())


def close(got, right, dtype="float64", ulp=16):
    """Equal but for rounding, in units of the dtype's precision, of the number or of what it was added up from."""
    got, terms = np.asarray(got, "float64"), getattr(right, "terms", None)
    right = np.asarray(right, "float64")
    assert got.shape == right.shape
    eps = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    scale = np.abs(right) if terms is None else np.maximum(np.abs(right), terms)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(right))
    assert (got[scale == 0] == 0).all()  # there is nothing to round
    error = np.abs(got - right) / np.where(scale > 0, scale, 1) / eps
    assert (error <= ulp).all(), f"off by {error.max():.3g} ULP, {ulp} allowed:\ngot {got}\nright {right}"
