"""The cases: inputs of the losses as plain Python numbers, the same on every machine for a given seed.

The answers come from `oracle`.

To add a case, extend a function marked with @family, or write one: it is given a Maker and yields cases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Bits of the significand and the exponent of the smallest normal number.
DTYPES = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126), "float64": (53, -1022)}
LARGEST = {name: (2 - 2.0 ** (1 - bits)) * 2.0 ** (1 - low) for name, (bits, low) in DTYPES.items()}

MULTILABEL, SOFTMAX = "multilabel_logistic_loss", "softmax_nll"
LINEAR_MULTILABEL, LINEAR_SOFTMAX = "linear_multilabel_logistic_loss", "linear_softmax_nll"
REDUCTIONS = ("none", "sum", "mean", "batchmean")


class Loss(NamedTuple):
    """What a loss takes, and whether it has one value per example or one per element."""

    per_example: bool  # its classes are mutually exclusive; else there is a loss for each element
    takes: str
    on_logits: str = ""  # the loss of the logits, of one that takes what the last linear layer makes them from


LOSSES = {
    MULTILABEL: Loss(False, "logits"),
    SOFTMAX: Loss(True, "logits"),
    LINEAR_MULTILABEL: Loss(False, "features", MULTILABEL),
    LINEAR_SOFTMAX: Loss(True, "features", SOFTMAX),
    "binary_cross_entropy": Loss(False, "probabilities"),
    "cross_entropy": Loss(True, "probabilities"),
    "nll": Loss(True, "log-probabilities"),
}

# What is differentiated by each input, in an answer.
GRADIENTS = {"logits": "gradient", "features": "gradient"} | {
    name: f"{name}_gradient" for name in ("linear_weight", "linear_bias")
}


class Tensor(NamedTuple):
    """An array as data: its shape and its values, the last axis fastest."""

    shape: tuple[int, ...]
    values: list[Any]


# What a case is about: where losses are known to go wrong.
FLAGS = {
    "confident": "nearly all probability on one side: small losses and gradients keep their digits, and are not 0",
    "second derivative": "the second derivative of a confident prediction is small, not 0",
    "zero logit": "at a logit of exactly 0, where |x| has a kink, the gradient is 0.5 - z",
    "offset": "large logits that are equal, or nearly so: the loss is about log C, not 0",
    "unnormalised": "target distributions that do not sum to 1",
    "soft saturated": "soft targets and a confident prediction: x z and softplus x cancel",
    "excluded class": "a logit of -inf excludes its class: no NaN where the target gives that class no weight",
    "infinite logit": "a logit of +inf or -inf is a certain prediction: the loss is 0 if right, infinite if wrong",
    "nan logit": "a NaN logit makes its own loss NaN, and no other",
    "masked": "masked elements and ignored examples do not count, even where they are NaN or infinite",
    "nothing takes part": "every element is masked or ignored, or there is none: the mean is 0, with zero gradient",
    "wrong index": "a class index that is out of range, or that of a masked class, makes its example NaN",
    "half sum": "float16 and bfloat16 are summed in float32: no overflow, and no small term is lost",
    "long sum": "a sum of many equal numbers, whose rounding errors all have the same sign",
    "cotangent": "an incoming gradient that differs from element to element",
    "frozen": "one input of the linear layer is differentiated, and the others are not: its gradient is the same",
    "label twice": "a label that sparse targets name twice counts once",
    "blocks": "several blocks of examples, or of classes: each counts once, as does the bias, and padding does not",
}


class Case(NamedTuple):
    """One call of a loss, and the cotangent that its result is pulled back with."""

    id: str
    family: str
    flags: tuple[str, ...]
    dtype: str
    loss: str
    logits: (
        Tensor  # or what the loss takes in their place: probabilities, log-probabilities, features of shape (..., D)
    )
    targets: Tensor
    options: dict[str, Any]  # as the loss takes them; arrays as Tensor
    cotangent: Tensor
    linear_weight: Tensor | None = None  # (C, D), of a loss that takes features
    positives: bool = False  # the targets are those of unilabel.Positives: indices of labels, padded with -1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        weight = self.linear_weight
        return self.logits.shape if weight is None else (*self.logits.shape[:-1], weight.shape[0])

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the loss is differentiated by, besides targets: the logits, or the linear layer's inputs."""
        if self.linear_weight is None:
            return {"logits": self.logits}
        bias = self.options.get("linear_bias")
        layer = {"features": self.logits, "linear_weight": self.linear_weight}
        return layer if bias is None else layer | {"linear_bias": bias}


def class_axes(options: dict[str, Any], logits: Tensor) -> list[int]:
    """Where these options have the class axes of the logits, from the first axis on."""
    axis = options.get("axis", -1)
    return [i % max(1, len(logits.shape)) for i in (axis if isinstance(axis, tuple) else (axis,))]


Family = Callable[["Maker"], Iterator[Case]]
FAMILIES: dict[str, Family] = {}
FULL: set[str] = set()  # families of large cases, which only a full run has
LONG: set[str] = set()  # families of cases that are too long for the files of vectors


def family(make: Family) -> Family:
    FAMILIES[make.__name__] = make
    return make


def full(make: Family) -> Family:
    FULL.add(make.__name__)
    return make


def long(make: Family) -> Family:
    LONG.add(make.__name__)
    return make


def cases(dtypes: tuple[str, ...], seed: int, full: bool = False) -> list[Case]:
    """Every case, in a fixed order; the large ones in a full run."""
    return [
        case
        for dtype in dtypes
        for name, make in FAMILIES.items()
        if full or name not in FULL
        for case in make(Maker(name, dtype, seed))
    ]


def nearest(x: float, dtype: str) -> float:
    """The finite number of the dtype that is nearest to x; infinities and NaN stay."""
    bits, low = DTYPES[dtype]
    if x == 0 or not math.isfinite(x) or dtype == "float64":
        return x
    step = 2.0 ** (max(math.frexp(x)[1] - 1, low) - bits + 1)
    return min(max(round(x / step) * step, -LARGEST[dtype]), LARGEST[dtype])


class Maker:
    """Makes the cases of one family in one dtype."""

    def __init__(self, family: str, dtype: str, seed: int) -> None:
        self.family, self.dtype = family, dtype
        self.random = random.Random(f"{seed} {family} {dtype}")
        self.count = 0

    def case(self, loss: str, logits: Any, targets: Any, flag: str = "", **options: Any) -> Case:
        """A case of nested lists or Tensors, and a random cotangent. Flags are separated by commas."""
        self.count += 1
        linear_weight, positives = options.pop("linear_weight", None), options.pop("positives", False)
        weight = None if linear_weight is None else self.tensor(linear_weight)
        flags = tuple(filter(None, flag.split(", ")))
        assert all(name in FLAGS for name in flags), flags
        logits, targets = self.tensor(logits), self.tensor(targets)
        options = {
            name: self.tensor(value) if isinstance(value, list | Tensor) else value for name, value in options.items()
        }
        name = f"{self.dtype}/{self.family}/{self.count}"
        unknown = Tensor((), [])
        case = Case(name, self.family, flags, self.dtype, loss, logits, targets, options, unknown, weight, positives)
        shape: tuple[int, ...] = ()
        if options.get("reduction") == "none":
            axes = class_axes(options, logits)
            batch = tuple(n for i, n in enumerate(logits.shape) if i not in axes)
            shape = batch if LOSSES[loss].per_example else case.shape
        flags += ("cotangent",) if shape and not flags else ()
        return case._replace(cotangent=self.numbers(shape, 0.5, 2.0), flags=flags)

    def tensor(self, nested: Any) -> Tensor:
        """A nested list as a Tensor, its floats rounded to the dtype."""
        if isinstance(nested, Tensor):
            return nested
        shape, values = [], nested
        while isinstance(values, list):
            shape.append(len(values))
            values = values[0] if values else None
        values = nested if shape else [nested]
        for _ in shape[1:]:
            values = [value for row in values for value in row]
        return Tensor(tuple(shape), [nearest(v, self.dtype) if isinstance(v, float) else v for v in values])

    def numbers(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        """Uniform random numbers of the dtype."""
        return Tensor(shape, [nearest(self.random.uniform(low, high), self.dtype) for _ in range(math.prod(shape))])

    def chosen(self, shape: tuple[int, ...], *choices: Any) -> Tensor:
        """Random choices."""
        return Tensor(shape, [self.random.choice(choices) for _ in range(math.prod(shape))])

    def multiples(self, shape: tuple[int, ...], most: int, step: float) -> Tensor:
        """Random multiples of a step, a power of two."""
        return Tensor(shape, [self.random.randint(-most, most) * step for _ in range(math.prod(shape))])

    def distributions(self, rows: int, classes: int) -> Tensor:
        """Random rows that sum to 1 but for rounding."""
        values: list[float] = []
        for _ in range(rows):
            row = [math.prod([self.random.uniform(0, 1)] * 3) for _ in range(classes)]
            total = math.fsum(row)  # rounds once, where sum() depends on the version of Python
            values += [nearest(value / total, self.dtype) for value in row]
        return Tensor((rows, classes), values)

    def both(self, low: float, high: float, rows: int = 4, classes: int = 5, **options: Any) -> Iterator[Case]:
        """Random logits of a range with random targets of every kind."""
        shape = (rows, classes)
        yield self.case(MULTILABEL, self.numbers(shape, low, high), self.chosen(shape, 0, 1), **options)
        yield self.case(MULTILABEL, self.numbers(shape, low, high), self.numbers(shape, 0, 1), **options)
        yield self.case(SOFTMAX, self.numbers(shape, low, high), self.chosen((rows,), *range(classes)), **options)
        yield self.case(SOFTMAX, self.numbers(shape, low, high), self.distributions(rows, classes), **options)

    def layer(self, rows: int, classes: int, length: int = 2) -> tuple[Tensor, dict[str, Any]]:
        """Features, and a linear layer's weight and bias, whose logits are exact in every dtype: multiples of 1/4."""
        weight, bias = self.multiples((classes, length), 4, 0.5), self.multiples((classes,), 4, 0.5)
        return self.multiples((rows, length), 4, 0.5), {"linear_weight": weight, "linear_bias": bias}

    def rounded_layer(self, rows: int, classes: int, length: int) -> tuple[Tensor, dict[str, Any]]:
        """The same of any numbers, so that the logits are rounded."""
        weight, bias = self.numbers((classes, length), -1, 1), self.numbers((classes,), -1, 1)
        return self.numbers((rows, length), -2, 2), {"linear_weight": weight, "linear_bias": bias}

    def linear(self, layer: tuple[Tensor, dict[str, Any]], of: Any = range(4), **options: Any) -> Iterator[Case]:
        """A layer with random targets of every kind, the class indices some of these."""
        features, made = layer
        (rows, _), (classes, _) = features.shape, made["linear_weight"].shape
        shape, options = (rows, classes), made | options
        yield self.case(LINEAR_MULTILABEL, features, self.chosen(shape, 0, 1), **options)
        yield self.case(LINEAR_MULTILABEL, features, self.numbers(shape, 0, 1), **options)
        yield self.case(LINEAR_SOFTMAX, features, self.chosen((rows,), *of), **options)
        yield self.case(LINEAR_SOFTMAX, features, self.distributions(rows, classes), **options)


def one_hot(indices: Tensor, classes: int) -> Tensor:
    return Tensor((*indices.shape, classes), [float(y == c) for y in indices.values for c in range(classes)])


@family
def seed(make: Maker) -> Iterator[Case]:
    """The examples that the project began with."""
    logits, targets = [[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]], [[1, 0, 1], [0, 1, 0]]
    for reduction in REDUCTIONS:
        yield make.case(MULTILABEL, logits, targets, reduction=reduction)
        yield make.case(SOFTMAX, logits, [0, 1], reduction=reduction)
        yield make.case(SOFTMAX, logits, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], reduction=reduction)
    yield make.case(MULTILABEL, logits, targets)
    yield make.case(MULTILABEL, [50.0, 0.0006, 2.3], [1, 0, 1], reduction="none")
    yield make.case(MULTILABEL, [0.92, 0.35, 0.85], [True, False, True], reduction="none")


@family
def moderate(make: Maker) -> Iterator[Case]:
    """The logits of a model in training."""
    for reduction in REDUCTIONS:
        yield from make.both(-4, 4, reduction=reduction)
    yield from make.both(-4, 4, rows=1, classes=1)
    yield from make.both(-4, 4, rows=40, classes=3)
    yield from make.both(-4, 4, rows=2, classes=60)


@family
def confident(make: Maker) -> Iterator[Case]:
    """Logits far from 0, with nearly all the probability on one side: a small loss must keep its digits."""
    for reach in (20, 80, 200, 900):
        yield from make.both(-reach, reach, reduction="none", flag="confident")
    yield from make.both(-100, 100, rows=20, flag="confident")
    for x in (10.0, 14.56, 15.0, 16.66, 17.0, 30.0, 60.0, 80.0):
        flags = "confident, second derivative"
        yield make.case(MULTILABEL, [x, -x, x, -x], [1, 0, 0, 1], flag=flags, reduction="none")
        yield make.case(SOFTMAX, [[x, 0.0], [0.0, x], [-x, 0.0]], [0, 0, 1], flag="confident", reduction="none")
        yield make.case(SOFTMAX, [[x, 0.0, 1.0]], [[0.999, 0.001, 0.0]], flag="soft saturated", reduction="none")
        yield make.case(MULTILABEL, [x, -x], [0.999, 0.001], flag="soft saturated", reduction="none")
    for x in (1e4, 1e8):
        x = min(x, LARGEST[make.dtype])
        yield make.case(SOFTMAX, [[x] * 10, [x, *[0.0] * 9]], [3, 0], flag="offset", reduction="none")
        yield make.case(SOFTMAX, [[x, nearest(x * (1 - 2.0**-7), make.dtype)]], [0], flag="offset", reduction="none")
    huge = LARGEST[make.dtype]
    yield make.case(MULTILABEL, [huge, -huge], [1, 0], reduction="none")
    yield make.case(SOFTMAX, [[huge] * 3], [2], flag="offset", reduction="none")


@family
def tails(make: Maker) -> Iterator[Case]:
    """Results down to subnormal numbers, and logits up to the largest ones."""
    smallest = -math.log(2.0) * (DTYPES[make.dtype][1] - DTYPES[make.dtype][0] + 2)  # exp(-this) is the last above 0
    last = [smallest * share for share in (0.5, 0.8, 0.9, 0.96, 0.99)]
    for z in (0, 1):
        yield make.case(MULTILABEL, [x * (2 * z - 1) for x in last], [z] * 5, flag="confident", reduction="none")
    yield make.case(SOFTMAX, [[0.0, -x] for x in last], [0] * 5, flag="confident", reduction="none")
    yield make.case(SOFTMAX, [[0.0, -x] for x in last], [1] * 5, flag="confident", reduction="none")
    for pos_weight in (0.1, 30.0):
        x = make.numbers((6,), -smallest, smallest)
        yield make.case(MULTILABEL, x, make.chosen((6,), 0, 1), pos_weight=pos_weight, reduction="none")
        yield make.case(MULTILABEL, x, make.numbers((6,), 0, 1), pos_weight=pos_weight, reduction="none")
    large = [LARGEST[make.dtype] * share for share in (1.0, -1.0, 0.25, -0.5)]
    yield make.case(MULTILABEL, large, [0, 1, 0.5, 0.25], reduction="none")
    yield make.case(SOFTMAX, [[x, 0.0] for x in large], [0] * 4, reduction="none")
    wide = [[0.0, smallest, 1.0, -smallest, -1.0, 1e-3, -50.0]]
    for y in range(7):
        yield make.case(SOFTMAX, wide, [y], flag="confident", reduction="none")
    for share in (0.9, 0.96):  # the probability of the target has lost digits, the loss has not
        yield make.case(SOFTMAX, [[0.0, -smallest * share]], [1], flag="confident")


@family
def targets(make: Maker) -> Iterator[Case]:
    """Target distributions of every kind: a dominant class, ties, sums below and above 1, a single class."""
    x = make.numbers((1, 4), -5, 5)
    for z in ([0.9999, 0.0001, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]):
        yield make.case(SOFTMAX, x, [z], reduction="none")
        yield make.case(SOFTMAX, [[20.0, 0.0, -20.0, 1.0]], [z], flag="soft saturated", reduction="none")
    for z in ([0.25, 0.25, 0.0, 0.0], [0.0] * 4, [2.0, 1.0, 0.5, 0.0]):
        yield make.case(SOFTMAX, x, [z], flag="unnormalised", reduction="none")
        yield make.case(SOFTMAX, x, [z], flag="unnormalised")
    yield make.case(SOFTMAX, [[1.0, 2.0, 3.0]], [[0.25, 0.25, 0.0]], flag="unnormalised")
    for x_one in (0.0, 50.0, -1e4):
        yield make.case(SOFTMAX, [[x_one]], [0], reduction="none")
        yield make.case(SOFTMAX, [[x_one]], [[1.0]])
    for x_tie in (0.0, -3.0, 100.0):
        yield make.case(SOFTMAX, [[x_tie, x_tie, x_tie - 20]], [1], reduction="none")


@family
def zero(make: Maker) -> Iterator[Case]:
    """The logits of a zero-initialised head: the gradient is exactly 0.5 - z, where |x| has a kink."""
    for z in (0.0, -0.0):
        yield make.case(MULTILABEL, [[z] * 3] * 2, [[1, 0, 1], [0, 1, 0]], flag="zero logit")
        yield make.case(MULTILABEL, [z] * 3, [0.25, 0.5, 1.0], flag="zero logit", reduction="none")
        yield make.case(MULTILABEL, [z] * 2, [0, 1], flag="zero logit", pos_weight=3.0, reduction="none")
        yield make.case(MULTILABEL, [z], [0], flag="zero logit", pos_weight=1.0)
        yield make.case(SOFTMAX, [[z] * 4] * 2, [0, 3])
        yield make.case(SOFTMAX, [[z] * 4], [[0.5, 0.25, 0.25, 0.0]])


@family
def infinite(make: Maker) -> Iterator[Case]:
    """Infinite logits: certain predictions and excluded classes. Only an undefined result is NaN."""
    inf, nan = math.inf, math.nan
    certain, excluded = "infinite logit", "excluded class"
    yield make.case(MULTILABEL, [inf], [1], flag=certain, reduction="none")
    yield make.case(MULTILABEL, [-inf], [0], flag=certain, reduction="none")
    yield make.case(MULTILABEL, [inf, -inf], [0, 1], flag=certain, reduction="none")
    yield make.case(MULTILABEL, [[inf, 0.0], [-inf, 1.0]], [[1, 0], [0, 1]], flag=certain)
    yield make.case(MULTILABEL, [inf, -inf], [1, 0], flag=certain, label_smoothing=0.1, reduction="none")
    yield make.case(MULTILABEL, [inf, -inf], [1, 0], flag=certain, pos_weight=2.0, weight=3.0, reduction="none")
    yield make.case(MULTILABEL, [nan, 1.0], [1, 1], flag="nan logit", reduction="none")
    yield make.case(SOFTMAX, [[1.0, -inf, 2.0], [-inf, -inf, 3.0]], [0, 2], flag=excluded, reduction="none")
    yield make.case(SOFTMAX, [[1.0, -inf, 2.0]], [1], flag=excluded, reduction="none")
    yield make.case(SOFTMAX, [[1.0, -inf]], [[1.0, 0.0]], flag=excluded, reduction="none")
    yield make.case(SOFTMAX, [[inf, 0.0]], [0], flag=certain, reduction="none")
    yield make.case(SOFTMAX, [[inf, 0.0], [inf, -inf]], [1, 0], flag=certain, reduction="none")
    yield make.case(SOFTMAX, [[inf, 0.0, 1.0]], [[1.0, 0.0, 0.0]], flag=certain)
    yield make.case(SOFTMAX, [[-inf, -inf], [0.0, 1.0]], [0, 0], flag="nan logit", reduction="none")
    yield make.case(SOFTMAX, [[nan, 0.0], [0.0, 1.0]], [1, 0], flag="nan logit", reduction="none")
    yield make.case(MULTILABEL, [inf, -inf, 1.0], [1.0, 0.0, 0.25], flag=certain, reduction="none")
    smoothed: dict[str, Any] = {"label_smoothing": 0.1, "pos_weight": 3.0}
    yield make.case(MULTILABEL, [inf, -inf, 1.0, -2.0], [0, 1, 1, 0], flag=certain, reduction="none", **smoothed)
    yield make.case(SOFTMAX, [[1.0, -inf, 2.0], [1.0, inf, 2.0]], [0, 1], label_smoothing=0.1, reduction="none")
    no_class: dict[str, Any] = {"flag": "nan logit", "sample_weight": [1.0, 2.0], "reduction": "none"}
    yield make.case(SOFTMAX, [[-inf, -inf], [0.0, 1.0]], [[0.5, 0.5], [0.25, 0.75]], **no_class)


@family
def masked(make: Maker) -> Iterator[Case]:
    """Missing labels, classes masked out of the softmax, ignored examples: none counts, whatever its value."""
    inf, nan = math.inf, math.nan
    for reduction in REDUCTIONS:
        whole: dict[str, Any] = {"flag": "masked", "reduction": reduction}
        yield from make.both(-4, 4, where=make.chosen((4, 5), True, True, False), **whole)
        yield make.case(SOFTMAX, make.numbers((4, 3), -4, 4), [0, -100, 2, -100], ignore_index=-100, **whole)
        yield make.case(
            MULTILABEL,
            [[nan, 1.0, inf], [0.5, -inf, 2.0]],
            [[0, 1, 0], [1, 0, 1]],
            where=[[False, True, False], [True, False, True]],
            **whole,
        )
        yield make.case(
            SOFTMAX,
            [[nan, 1.0, 2.0], [0.5, inf, 2.0], [nan, nan, nan]],
            [1, 2, 0],
            where=[[False, True, True], [True, False, True], [False, False, False]],
            **whole,
        )
        yield make.case(SOFTMAX, [[nan, inf], [1.0, 2.0]], [-100, 1], ignore_index=-100, **whole)
        nothing: dict[str, Any] = {"flag": "nothing takes part", "reduction": reduction}
        yield make.case(SOFTMAX, make.numbers((2, 3), -4, 4), [-100, -100], ignore_index=-100, **nothing)
        yield make.case(MULTILABEL, make.numbers((2, 3), -4, 4), [[1] * 3] * 2, where=False, **nothing)
    yield make.case(SOFTMAX, [[1.0, 2.0, 3.0]], [[0.25, 0.25, 0.5]], flag="masked", where=[True, False, True])
    for reduction in REDUCTIONS:
        more: dict[str, Any] = {"flag": "masked", "reduction": reduction}
        mask = [[True, False, True], [False, True, False]]
        yield make.case(
            MULTILABEL,
            [[1.0, 2.0, -0.5], [nan, 0.25, -1.0]],
            [[1.0, nan, 0.25], [inf, 0.0, nan]],
            where=mask,
            weight=[[0.5, nan, 2.0], [inf, 3.0, 1.0]],
            pos_weight=[[2.0, inf, 0.5], [nan, 3.0, nan]],
            **more,
        )
        yield make.case(MULTILABEL, make.numbers((2, 3), -4, 4), [[1, 0, 1]] * 2, where=mask, weight=2.0, **more)
        x = make.numbers((4, 3), -4, 4)
        yield make.case(SOFTMAX, x, [0, 2, 2, 0], where=[True, False, True], weight=[0.5, nan, 2.0], **more)
        yield make.case(SOFTMAX, x, [0, -100, 1, 2], where=[[True] * 3] * 3 + [[False] * 3], ignore_index=-100, **more)
        yield make.case(SOFTMAX, x, [0, 1, 2, 1], ignore_index=1, **more)
        yield make.case(SOFTMAX, x, [0, 1, 2, 1], ignore_index=1, weight=[0.5, 1.0, 2.0], **more)
        yield make.case(SOFTMAX, x, [0, 1, 2, 1], ignore_index=1, sample_weight=[0.5, nan, 2.0, inf], **more)
    huge = min(1e10, LARGEST[make.dtype])
    yield make.case(SOFTMAX, [[-huge, 5.0, -huge]], [0], where=[True, False, True], flag="masked", reduction="none")
    yield make.case(SOFTMAX, [[nan, 1.0, 2.0]], [0], where=[True, False, True], flag="masked", reduction="none")
    out: dict[str, Any] = {"flag": "masked", "where": [True, False, True], "weight": [0.5, inf, 2.0]}
    yield make.case(SOFTMAX, [[1.0, 2.0, 3.0]], [[0.25, 0.25, 0.5]], **out)
    some: dict[str, Any] = {"flag": "masked", "where": [True, True, False]}
    yield make.case(MULTILABEL, [inf, 1.0, nan], [0, 1, 1], weight=[0.0, 2.0, 1.0], reduction="none", **some)
    yield make.case(MULTILABEL, make.numbers((2, 3), -4, 4), [[1, 0, 1], [0, 1, 0]], reduction="mean", **some)
    rows: dict[str, Any] = {"flag": "masked", "where": [[True, False, True], [False] * 3, [True] * 3, [True] * 3]}
    yield make.case(SOFTMAX, make.numbers((4, 3), -4, 4), make.distributions(4, 3), reduction="mean", **rows)
    rows |= {"ignore_index": 1, "weight": make.numbers((3,), 0.1, 3), "label_smoothing": 0.1}
    p_nan = [[0.25, 0.25, 0.5], [nan, 0.5, 0.5], [nan, inf, 0.5], [0.125, 0.25, 0.625]]
    for reduction in ("none", "mean"):
        yield make.case("cross_entropy", p_nan, [0, 2, 1, 2], reduction=reduction, **rows)


@family
def weighted(make: Maker) -> Iterator[Case]:
    """Weights of elements, of positives, of classes and of examples, and the divisors that go with them."""
    for reduction in REDUCTIONS:
        elements: dict[str, Any] = {"reduction": reduction, "weight": make.numbers((4, 5), 0.1, 3)}
        yield make.case(MULTILABEL, make.numbers((4, 5), -8, 8), make.chosen((4, 5), 0, 1), **elements)
        yield make.case(MULTILABEL, make.numbers((4, 5), -8, 8), make.numbers((4, 5), 0, 1), **elements)
        elements = {"reduction": reduction, "pos_weight": make.numbers((5,), 0.1, 30)}
        yield make.case(MULTILABEL, make.numbers((4, 5), -8, 8), make.chosen((4, 5), 0, 1), **elements)
        yield make.case(MULTILABEL, make.numbers((4, 5), -8, 8), make.numbers((4, 5), 0, 1), **elements)
        y = make.chosen((4,), *range(5))
        for name, weights in {"weight": (5,), "sample_weight": (4,)}.items():
            rows: dict[str, Any] = {"reduction": reduction, name: make.numbers(weights, 0.1, 3)}
            x = make.numbers((4, 5), -8, 8)
            yield make.case(SOFTMAX, x, y, **rows)
            yield make.case(SOFTMAX, x, one_hot(y, 5), **rows)
            yield make.case(SOFTMAX, x, make.distributions(4, 5), **rows)
    yield make.case(
        SOFTMAX,
        make.numbers((4, 5), -8, 8),
        [0, 1, -1, 4],
        weight=make.numbers((5,), 0.1, 3),
        sample_weight=make.numbers((4,), 0.1, 3),
        ignore_index=-1,
        label_smoothing=0.1,
    )
    for smoothing in (0.0, 0.5):  # the targets have weight 0, so there is nothing to average
        options: dict[str, Any] = {"weight": [0.0, 0.0, 1.0], "label_smoothing": smoothing}
        yield make.case(SOFTMAX, make.numbers((2, 3), -4, 4), [0, 1], **options)
    for reduction in REDUCTIONS:
        both: dict[str, Any] = {"weight": make.numbers((3,), 0.1, 3), "sample_weight": make.numbers((4,), 0.1, 3)}
        yield make.case(SOFTMAX, make.numbers((4, 3), -4, 4), [0, 1, 2, 1], reduction=reduction, **both)
    weight = make.numbers((3,), 0.1, 3)  # of a class that is ignored, too
    for smoothing in (0.0, 0.1):
        options = {"weight": weight, "ignore_index": 1, "label_smoothing": smoothing}
        yield make.case(SOFTMAX, make.numbers((4, 3), -4, 4), [0, 1, 2, 1], **options)


@family
def smoothed(make: Maker) -> Iterator[Case]:
    """Label smoothing, alone and with masks and weights."""
    for smoothing in (0.1, 0.5, 1.0):
        yield from make.both(-8, 8, label_smoothing=smoothing, reduction="none")
        yield from make.both(-40, 40, label_smoothing=smoothing)
    yield from make.both(-8, 8, label_smoothing=0.1, where=make.chosen((4, 5), True, True, False), reduction="none")
    yield make.case(
        MULTILABEL,
        make.numbers((4, 5), -8, 8),
        make.chosen((4, 5), 0, 1),
        label_smoothing=0.2,
        weight=make.numbers((4, 1), 0.1, 3),
        pos_weight=make.numbers((5,), 0.1, 30),
    )
    for reduction in ("none", "mean"):
        x, weights = make.numbers((4, 5), -8, 8), {"weight": make.numbers((5,), 0.1, 3)}
        weights |= {"sample_weight": make.numbers((4,), 0.1, 3)}
        more: dict[str, Any] = {"label_smoothing": 0.1, "reduction": reduction, **weights}
        yield make.case(SOFTMAX, x, [0, 2, 3, 4], where=[True, False, True, True, True], **more)
        yield make.case(SOFTMAX, x, make.distributions(4, 5), **more)
    out: dict[str, Any] = {"where": [True, False, True], "label_smoothing": 0.1, "reduction": "none"}
    yield make.case(SOFTMAX, make.numbers((2, 3), -4, 4), [0, 2], weight=[0.5, math.nan, 2.0], **out)


@family
def invalid(make: Maker) -> Iterator[Case]:
    """Class indices out of range, or of a masked class: NaN for their example, never a plausible number."""
    x = make.numbers((5, 3), -4, 4)
    for reduction in ("none", "mean"):
        wrong: dict[str, Any] = {"flag": "wrong index", "reduction": reduction}
        for index in (-1, 3, -100):
            yield make.case(SOFTMAX, [[1.0, 2.0, 3.0]] * 2, [0, index], **wrong)
        yield make.case(SOFTMAX, x, [0, -1, 3, 2, -100], **wrong)
        yield make.case(SOFTMAX, x, [0, 1, 2, 100, 0], weight=[0.5, 1.0, 2.0], **wrong)
    yield make.case(SOFTMAX, x, [0, -100, 2, 1, 4], flag="wrong index", ignore_index=-100, reduction="none")
    hidden: dict[str, Any] = {"flag": "wrong index", "where": [True, False, True], "reduction": "none"}
    yield make.case(SOFTMAX, [[1.0, 2.0, 3.0]] * 2, [0, 1], **hidden)
    more: dict[str, Any] = {"flag": "wrong index"}
    x = make.numbers((4, 3), -4, 4)
    yield make.case(SOFTMAX, x, [0, -1, 2, -100], ignore_index=-100, reduction="none", **more)
    yield make.case(SOFTMAX, x, [0, -1, 2, -100], ignore_index=-1, reduction="none", **more)
    yield make.case(SOFTMAX, [[1.0, 2.0, 3.0]], [3], weight=[0.5, 1.0, 2.0], reduction="mean", **more)
    yield make.case("cross_entropy", [[0.0, 0.25, 0.75]] * 2, [3, 1], reduction="none", **more)
    yield make.case("nll", [[-1.0, -2.0, -3.0]] * 2, [3, 1], reduction="none", **more)
    yield make.case("nll", [[-1.0, -2.0, -3.0]] * 2, [0, 1], **hidden)
    yield make.case("nll", [[-1.0, -2.0, -3.0]] * 2, [0, -1], label_smoothing=0.1, reduction="none", **more)


@family
def shapes(make: Maker) -> Iterator[Case]:
    """Another class axis, several class axes, more batch axes, a single example, no example."""
    for reduction in REDUCTIONS:
        yield make.case(MULTILABEL, make.numbers((2, 3, 4), -4, 4), make.chosen((2, 3, 4), 0, 1), axis=1)
        yield make.case(SOFTMAX, make.numbers((2, 3, 4), -4, 4), make.chosen((2, 4), 0, 1, 2), axis=1)
        yield make.case(SOFTMAX, make.numbers((2, 3, 4), -4, 4), make.chosen((4,), *range(6)), axis=(0, 1))
        yield make.case(SOFTMAX, make.numbers((3,), -4, 4), 1, reduction=reduction)
        yield make.case(MULTILABEL, make.numbers((), -4, 4), Tensor((), [1]), reduction=reduction)
        empty = "nothing takes part"
        yield make.case(SOFTMAX, Tensor((0, 3), []), Tensor((0,), []), flag=empty, reduction=reduction)
        yield make.case(MULTILABEL, Tensor((0, 3), []), Tensor((0, 3), []), flag=empty, reduction=reduction)
        yield make.case(MULTILABEL, Tensor((2, 0), []), Tensor((2, 0), []), flag=empty, reduction=reduction)
    x = make.numbers((2, 3, 4), -4, 4)
    inner: dict[str, Any] = {"axis": 1, "reduction": "none"}
    weights: dict[str, Any] = {"weight": make.numbers((3,), 0.1, 3), "sample_weight": make.numbers((2, 4), 0.1, 3)}
    yield make.case(SOFTMAX, x, make.chosen((2, 4), 0, 1, 2), label_smoothing=0.1, **inner, **weights)
    yield make.case(SOFTMAX, x, make.numbers((2, 3, 4), 0, 1), flag="unnormalised", **inner, **weights)
    sure: dict[str, Any] = {"flag": "confident", "axis": 0, "sample_weight": [1.0, 2.0], "reduction": "none"}
    yield make.case(SOFTMAX, [[20.0, 0.0], [0.0, -20.0]], [[1.0, 1.0], [0.0, 0.0]], **sure)


@family
def probabilities(make: Maker) -> Iterator[Case]:
    """The losses on probabilities, 0 and 1 among them, and on log-probabilities."""
    nan = math.nan
    for reduction in REDUCTIONS:
        p = make.numbers((4, 5), 0.01, 0.99)
        yield make.case("binary_cross_entropy", p, make.chosen((4, 5), 0, 1), reduction=reduction)
        yield make.case("binary_cross_entropy", p, make.numbers((4, 5), 0, 1), reduction=reduction)
        yield make.case("cross_entropy", p, make.chosen((4,), *range(5)), reduction=reduction)
        yield make.case("cross_entropy", p, make.distributions(4, 5), reduction=reduction, label_smoothing=0.1)
        log_p = make.numbers((4, 5), -9, -0.01)
        yield make.case("nll", log_p, make.chosen((4,), *range(5)), reduction=reduction)
        yield make.case("nll", log_p, make.distributions(4, 5), reduction=reduction, weight=make.numbers((5,), 0.1, 3))
    yield make.case("binary_cross_entropy", [0.0, 1.0, 0.0, 1.0], [0, 1, 1, 0], reduction="none")
    yield make.case("binary_cross_entropy", [0.0, 1.0, 0.0, 1.0], [0, 1, 1, 0], eps=0.015625, reduction="none")
    for q in (0.001, 0.015, 0.015625, 0.016, 0.02, 0.5):  # on both sides of the clamp, and on it
        yield make.case("binary_cross_entropy", [q, 1 - q], [0.5, 0.5], eps=0.015625, reduction="none")
        yield make.case("cross_entropy", [[q, 1 - q]], [[0.5, 0.5]], eps=0.015625, reduction="none")
    yield make.case("cross_entropy", [[0.0, 1.0], [0.0, 1.0]], [0, 1], reduction="none")
    yield make.case("cross_entropy", [[0.25, 0.75], [math.nan, 0.5]], [1, -1], ignore_index=-1)
    yield make.case("nll", [[-math.inf, 0.0], [-math.inf, 0.0]], [1, 0], reduction="none")
    yield make.case("nll", [[-1.0, -2.0, math.nan]], [1], where=[True, True, False])
    for eps in (0.0, 0.015625):  # without a clamp, and with one
        yield make.case("binary_cross_entropy", [0.0, 1.0, 0.25], [0, 1, 1], eps=eps, reduction="none")
        yield make.case("binary_cross_entropy", [0.0, 1.0], [1, 0], eps=eps, reduction="none")
        yield make.case("binary_cross_entropy", [0.0, 1.0], [1, 0], eps=eps, flag="masked", where=[False, False])
        yield make.case("cross_entropy", [[0.0, 1.0], [0.0, 1.0]], [1, 0], eps=eps, reduction="none")
    yield make.case("cross_entropy", [[0.25, nan]], [0], flag="nan logit", reduction="none")
    yield make.case("binary_cross_entropy", [0.25, nan], [0, 1], flag="nan logit", reduction="none")
    yield make.case("nll", [[-1.0, nan], [-1.0, -2.0]], [0, 1], flag="nan logit", reduction="none")
    for reduction in ("none", "mean"):
        rows: dict[str, Any] = {"weight": make.numbers((5,), 0.1, 3), "sample_weight": make.numbers((4,), 0.1, 3)}
        p, log_p = make.numbers((4, 5), 0.01, 0.99), make.numbers((4, 5), -9, -0.01)
        for loss, x in {"cross_entropy": p, "nll": log_p}.items():
            yield make.case(loss, x, make.chosen((4,), *range(5)), reduction=reduction, **rows)


@family
def sums(make: Maker) -> Iterator[Case]:
    """Sums and means that overflow in half precision, or stop growing."""
    for rows, classes in ((300, 1), (70_000, 1)):
        shape = (rows, classes)
        same = Tensor(shape, [0.5] * rows), Tensor(shape, [1] * rows)
        yield make.case(MULTILABEL, *same, flag="half sum, long sum", reduction="mean")
    yield make.case(SOFTMAX, Tensor((300, 2), [0.5, 0.25] * 300), Tensor((300,), [0] * 300), flag="half sum")


@family
@long
def flat(make: Maker) -> Iterator[Case]:
    """Long rows of equal numbers, where a sum's rounding errors all have the same sign; small ones beside a 1, too."""
    if make.dtype in ("float16", "bfloat16"):
        return  # computed in float32
    classes, flag = 6_000, "long sum"
    for low in (-17.3, -0.3):  # of all classes but the first
        row = make.tensor([[0.0] + [low] * (classes - 1)])
        yield make.case(SOFTMAX, row, [0], flag=flag, reduction="none")
        yield make.case(SOFTMAX, row, [classes - 1], flag=flag)
        yield make.case(SOFTMAX, row, [0], flag=flag, label_smoothing=0.1)
        yield make.case(SOFTMAX, row, Tensor(row.shape, [nearest(1 / classes, make.dtype)] * classes), flag=flag)
    share = make.tensor(1 / classes).values * classes
    same = make.tensor(0.3).values * classes
    yield make.case(MULTILABEL, Tensor((classes,), same), Tensor((classes,), [1] * classes), flag=flag)
    yield make.case("cross_entropy", Tensor((1, classes), share), Tensor((1, classes), share), flag=flag)
    log_p = make.tensor(math.log(1 / classes)).values * classes
    yield make.case("nll", Tensor((1, classes), log_p), Tensor((1, classes), share), flag=flag)


@family
def linear(make: Maker) -> Iterator[Case]:
    """The losses on the last linear layer's inputs, with every option. The logits are exact, the gradients are sums."""
    for reduction in REDUCTIONS:
        yield from make.linear(make.layer(3, 4), reduction=reduction)
    mask = [[True, False, True, True], [True, True, False, True], [True, False, False, True]]
    yield from make.linear(make.layer(3, 4), of=(0, 3), reduction="none", where=mask)
    yield from make.linear(make.layer(3, 4), reduction="mean", where=[[True], [False], [True]])
    features, layer = make.layer(3, 4)
    y, labels = make.chosen((3,), *range(4)), make.chosen((3, 4), 0, 1)
    weights: dict[str, Any] = {"weight": make.numbers((4,), 0.1, 3), "sample_weight": make.numbers((3,), 0.1, 3)}
    yield make.case(LINEAR_SOFTMAX, features, y, **layer, **weights, flag="frozen")
    yield make.case(LINEAR_SOFTMAX, features, y, **layer, **weights, label_smoothing=0.1, reduction="none")
    yield make.case(LINEAR_SOFTMAX, features, [0, -100, 3], **layer, **weights, ignore_index=-100, flag="masked")
    smoothed: dict[str, Any] = layer | {"label_smoothing": 0.1}
    row = make.tensor([True, True, False, True])
    yield make.case(LINEAR_SOFTMAX, features, [0, 1, 3], **smoothed, ignore_index=1, where=row, reduction="sum")
    weights = {"weight": make.numbers((3, 1), 0.1, 3), "pos_weight": make.numbers((4,), 0.1, 30)}
    yield make.case(LINEAR_MULTILABEL, features, labels, **smoothed, **weights, where=row, reduction="mean")
    weights = {"weight": make.numbers((4,), 0.1, 3), "pos_weight": make.numbers((3, 4), 0.1, 30)}
    yield make.case(LINEAR_MULTILABEL, features, make.numbers((3, 4), 0, 1), **layer, **weights, reduction="none")
    del layer["linear_bias"]
    yield make.case(LINEAR_SOFTMAX, features, y, **layer)
    yield make.case(LINEAR_MULTILABEL, features, labels, **layer, reduction="none")
    several = make.multiples((2, 2, 2), 4, 0.5)  # of examples, along two axes
    yield make.case(LINEAR_SOFTMAX, several, make.chosen((2, 2), *range(4)), **layer, reduction="none")
    keep = [[[True, False, True, True]], [[False, True, True, True]]]
    yield make.case(LINEAR_MULTILABEL, several, make.chosen((2, 2, 4), 0, 1), where=keep, **layer, reduction="none")
    one = make.multiples((2,), 4, 0.5)
    yield make.case(LINEAR_SOFTMAX, one, 2, **layer)
    yield make.case(LINEAR_MULTILABEL, one, make.chosen((4,), 0, 1), **layer, flag="frozen")
    of_one, single = make.layer(3, 1, 1)
    yield make.case(LINEAR_MULTILABEL, of_one, make.chosen((3, 1), 0, 1), **single)
    yield make.case(LINEAR_SOFTMAX, of_one, [0] * 3, **single)


@family
def linear_limits(make: Maker) -> Iterator[Case]:
    """Where the losses on logits go wrong, on the last linear layer's inputs."""
    unit, inf, nan = [[1.0, 0.0], [0.0, 1.0]], math.inf, math.nan
    for x in (17.0, 30.0, 80.0):
        sure: dict[str, Any] = {"linear_weight": [[x, 0.0], [0.0, x], [-x, 1.0]], "flag": "confident"}
        yield make.case(LINEAR_SOFTMAX, unit, [0, 1], **sure, reduction="none")
        yield make.case(LINEAR_MULTILABEL, unit, [[1, 0, 0], [0, 1, 0]], **sure, reduction="none")
    large: dict[str, Any] = {"linear_weight": [[32.0, 0.0], [0.0, 32.0], [-32.0, 1.0]], "reduction": "none"}
    far = [[1024.0, 0.0], [0.0, -1024.0]]
    yield make.case(LINEAR_SOFTMAX, far, [0, 1], **large)
    yield make.case(LINEAR_MULTILABEL, far, [[1, 0, 0], [0, 1, 0]], **large)
    features, layer = make.layer(3, 4)
    y, bias = make.chosen((3,), *range(4)), {"linear_bias": Tensor((4,), [4096.0] * 4)}
    yield make.case(LINEAR_SOFTMAX, features, y, **layer | bias, flag="offset", reduction="none")
    columns = {"linear_weight": [[1024.0, 0.5], [1024.0, -1.0], [1024.0, 2.0]]}
    yield make.case(LINEAR_SOFTMAX, [[4.0, 1.0], [8.0, -0.5]], [0, 2], **columns, flag="offset")
    zeros, weight = Tensor((3, 2), [0.0] * 6), layer["linear_weight"]
    yield make.case(LINEAR_SOFTMAX, zeros, y, linear_weight=weight, flag="zero logit", reduction="none")
    yield make.case(LINEAR_MULTILABEL, zeros, make.chosen((3, 4), 0, 1), linear_weight=weight, flag="zero logit")
    small, weight = make.multiples((2, 2), 4, 0.5), make.multiples((3, 2), 4, 0.5)

    def shifted(*bias: float) -> dict[str, Any]:
        return {"linear_weight": weight, "linear_bias": make.tensor([*bias])}

    yield make.case(LINEAR_SOFTMAX, small, [0, 2], **shifted(0.5, -inf, 1.0), flag="excluded class", reduction="none")
    yield make.case(LINEAR_SOFTMAX, small, [0, 0], **shifted(inf, 0.5, 1.0), flag="infinite logit")
    labels, certain = [[1, 0, 1], [1, 0, 0]], shifted(inf, -inf, 1.0)
    yield make.case(LINEAR_MULTILABEL, small, labels, **certain, flag="infinite logit", reduction="none")
    hidden: dict[str, Any] = shifted(0.5, nan, 1.0) | {"where": [True, False, True], "flag": "masked"}
    yield make.case(LINEAR_SOFTMAX, small, [0, 2], **hidden)
    yield make.case(LINEAR_MULTILABEL, small, labels, **hidden, reduction="none")
    yield make.case(LINEAR_SOFTMAX, small, [1, 2], **shifted(0.5, nan, 1.0), flag="nan logit", reduction="none")
    for reduction in ("none", "mean"):
        nothing: dict[str, Any] = shifted(0.5, 0.0, 1.0) | {"flag": "nothing takes part", "reduction": reduction}
        yield make.case(LINEAR_SOFTMAX, small, [-100, -100], **nothing, ignore_index=-100)
        yield make.case(LINEAR_MULTILABEL, small, labels, **nothing, where=False)
        yield make.case(LINEAR_SOFTMAX, Tensor((0, 2), []), Tensor((0,), []), **nothing)
        wrong: dict[str, Any] = shifted(0.5, 0.0, 1.0) | {"flag": "wrong index", "reduction": reduction}
        yield make.case(LINEAR_SOFTMAX, small, [3, 1], **wrong)
    yield make.case(LINEAR_MULTILABEL, Tensor((0, 2), []), Tensor((0, 3), []), **nothing)
    out = shifted(0.5, 0.0, 1.0) | {"flag": "wrong index", "where": [True, False, True], "reduction": "none"}
    yield make.case(LINEAR_SOFTMAX, small, [1, 2], **out)


@family
def linear_blocks(make: Maker) -> Iterator[Case]:
    """Several blocks of examples: of unilabel's own, which are shrunk here, or of whoever has them as short as this."""
    flag = "blocks"
    for reduction in REDUCTIONS:
        (features, layer), whole = make.layer(7, 4), {"reduction": reduction, "flag": flag}
        yield make.case(LINEAR_SOFTMAX, features, make.chosen((7,), *range(4)), **layer, **whole)
        yield make.case(LINEAR_MULTILABEL, features, make.chosen((7, 4), 0, 1), **layer, **whole)
    features, layer = make.layer(6, 4)
    ignored: dict[str, Any] = {"ignore_index": -100, "weight": make.numbers((4,), 0.1, 3)}
    ignored["sample_weight"] = make.numbers((6,), 0.1, 3)
    y = [-100] * 3 + [0, 1, 3]  # a block in which nobody takes part
    yield make.case(LINEAR_SOFTMAX, features, y, **layer, **ignored, flag="blocks, masked")
    mask, labels = Tensor((6, 4), [False] * 12 + [True, True, False] * 4), make.chosen((6, 4), 0, 1)
    yield make.case(LINEAR_MULTILABEL, features, labels, where=mask, **layer, reduction="mean", flag="blocks, masked")
    nobody: dict[str, Any] = {"reduction": "mean", "flag": "blocks, nothing takes part"}
    yield make.case(LINEAR_SOFTMAX, features, [-100] * 6, **layer, **ignored, **nobody)
    yield make.case(LINEAR_MULTILABEL, features, labels, where=[[False]] * 6, **layer, **nobody)
    soft: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none", "flag": flag}
    yield make.case(LINEAR_SOFTMAX, features, make.distributions(6, 4), **layer, **soft)
    below: dict[str, Any] = {
        "linear_bias": Tensor((37,), [-20.0] * 37),
        "flag": flag,
    }  # beside them a logit of 0 would be all there is
    features, layer = make.layer(3, 37, 1)
    yield make.case(LINEAR_SOFTMAX, features, [0, 36, 22], **layer | below)
    yield make.case(LINEAR_MULTILABEL, features, Tensor((3, 37), [0] * 111), **layer | below)
    n, flags = 300, "blocks, half sum, long sum"
    even: dict[str, Any] = {"linear_weight": [[0.0], [0.0]], "flag": flags, "reduction": "sum"}
    ones = Tensor((n, 1), [1.0] * n)
    yield make.case(LINEAR_SOFTMAX, ones, Tensor((n,), [0] * n), linear_bias=[0.0, 0.0], **even)
    yield make.case(LINEAR_MULTILABEL, ones, Tensor((n, 2), [1, 0] * n), linear_bias=[0.0, 0.0], **even)


@family
def linear_rounded(make: Maker) -> Iterator[Case]:
    """Any features and weights: the logits are rounded, and with them the losses."""
    for reduction in ("none", "mean"):
        yield from make.linear(make.rounded_layer(3, 4, 5), reduction=reduction)


@family
def positives(make: Maker) -> Iterator[Case]:
    """Multilabel targets as the indices of each example's labels, in any order, padded with -1."""
    sparse: dict[str, Any] = {"positives": True}
    labels = Tensor((4, 3), [2, 0, -1, -1, -1, -1, 4, -1, 1, 0, 1, 2])
    for reduction in REDUCTIONS:
        yield make.case(MULTILABEL, make.numbers((4, 5), -8, 8), labels, **sparse, reduction=reduction)
        features, layer = make.layer(4, 5)
        short = {"flag": "blocks"} if reduction in ("none", "mean") else {}
        yield make.case(LINEAR_MULTILABEL, features, labels, **layer, **sparse, **short, reduction=reduction)
    x = make.numbers((4, 5), -8, 8)
    twice = [[3, 3, -1, 3], [0, 1, 0, 1], [-1, 2, -1, -1], [4, 3, 2, 4]]
    yield make.case(MULTILABEL, x, twice, **sparse, flag="label twice", reduction="none")
    yield make.case(MULTILABEL, x, twice, **sparse, flag="label twice", pos_weight=3.0)
    for wrong in ([[5], [0], [-1], [4]], [[0, -2], [1, -1], [-1, -1], [3, -100]]):
        # Without pos_weight the second derivative does not depend on the targets.
        yield make.case(MULTILABEL, x, wrong, **sparse, flag="wrong index", pos_weight=2.0, reduction="none")
    yield make.case(LINEAR_MULTILABEL, features, [[5], [0], [-1], [4]], **layer, **sparse, flag="wrong index")
    weights: dict[str, Any] = {"weight": make.numbers((4, 1), 0.1, 3), "pos_weight": make.numbers((5,), 0.1, 30)}
    for smoothing in (0.0, 0.1):
        every = {**sparse, **weights, "label_smoothing": smoothing, "reduction": "mean"}
        keep = make.chosen((4, 5), True, True, False)
        yield make.case(MULTILABEL, x, labels, where=keep, **every)
        yield make.case(LINEAR_MULTILABEL, features, labels, where=keep, **layer, **every)
    inner = make.chosen((2, 4, 2), -1, 0, 1, 2)  # the class axis is in the middle
    yield make.case(MULTILABEL, make.numbers((2, 3, 4), -8, 8), inner, **sparse, axis=1, reduction="none")
    p = make.numbers((4, 5), 0.01, 0.99)
    yield make.case("binary_cross_entropy", p, labels, **sparse, reduction="none")
    nothing: dict[str, Any] = {**sparse, "flag": "nothing takes part"}
    yield make.case(MULTILABEL, Tensor((0, 5), []), Tensor((0, 3), []), **nothing)
    yield make.case(MULTILABEL, x, labels, **nothing, where=False, reduction="mean")
    sure = [[30.0, -30.0, 17.0], [-80.0, 80.0, -17.0]]
    yield make.case(MULTILABEL, sure, [[0, 2], [1, -1]], **sparse, flag="confident", reduction="none")


@family
@full
def large(make: Maker) -> Iterator[Case]:
    """Rows of 100,000 classes, and sums of a million."""
    row = make.numbers((1, 100_000), -8, 8)
    yield make.case(SOFTMAX, row, [77], reduction="none")
    yield make.case(SOFTMAX, Tensor((1, 100_000), [0.0] * 100_000), [0], reduction="none")
    flat = make.tensor([[0.0] + [-17.3] * 999_999])
    yield make.case(SOFTMAX, flat, [0], flag="long sum", reduction="none")
    for shape in ((1 << 20, 1), (1 << 18, 4)):
        same = Tensor(shape, [0.5] * (1 << 20)), Tensor(shape, [1] * (1 << 20))
        yield make.case(MULTILABEL, *same, flag="half sum, long sum", reduction="mean")
