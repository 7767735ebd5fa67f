"""The records of a computation: a loss and its forms, what it is computed from, and with which options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..namespace import Array, Namespace

Reduction = Literal["none", "sum", "mean", "batchmean"]


class Operands(NamedTuple):
    """The arrays other than the logits, in the logits' framework and on their device; None where the caller gave none.

    Before `canonical` they are what the caller gave.
    """

    targets: Any
    values: Array | None = None  # of sparse targets: those at the indices that `targets` holds; None: 1
    weight: Array | None = None
    pos_weight: Array | None = None
    sample_weight: Array | None = None
    where: Array | None = None
    label_smoothing: Array | None = None  # 0-d: traced or learned; a number is an option


class Options(NamedTuple):
    """What is not an array: hashable, so that compilers can key on it."""

    reduction: Reduction
    axes: tuple[int, ...] = (-1,)  # the class axes; more or others than the last only for elementwise losses
    indices: bool = False  # the targets are class indices, not a distribution
    positives: bool = False  # the targets are indices of labels, (..., K), of an elementwise loss
    binary: bool = False  # the targets are known to be 0 or 1, of an elementwise loss
    ignore_index: int | None = None
    label_smoothing: float | None = None  # None: none, or an operand
    eps: float = 0.0
    half: bool = False  # float16 and bfloat16 are computed in float32 and rounded once


Formula = Callable[[Namespace, Any, Any], Array]  # of the namespace, the terms and the target weights
Scaled = Callable[
    [Any], Any
]  # a weight, to broadcast to the logits, times the cotangent, over the divisor; of None: of 1


class Form(NamedTuple):
    """One way to compute a loss: target weights and terms, and from these value and derivatives.

    Autodiff is right through value and gradient of a form that needs "autodiff", and of a loss that has no such form.
    """

    weights: Callable[[Namespace, Array, Operands, Options], Any]  # how much of the loss each class carries
    terms: Callable[[Namespace, Array, Any, Options], Any]  # what value, gradient and Hessian have in common
    value: Formula
    gradient: Callable[..., Array]  # a Formula, see `scales`
    hessian: Formula | None = None  # its diagonal
    scales: bool = False  # the gradient takes a Scaled too, to write an array of the logits' size once
    needs: str = ""  # an optional group of functions (namespace.py)
    of_labels: bool = False  # for targets that are 0 or 1 alone
    of_indices: bool = False  # for class indices alone
    of_one_class: bool = False  # for class indices with neither smoothing nor masked classes
    sparse: bool = False  # the gradient is 0 but once in each example, and all else is smaller


class Loss(NamedTuple):
    """A loss, and its forms, the fastest first."""

    name: str
    per_example: bool  # one loss for each example (its classes are mutually exclusive), not one for each element
    takes: str  # "logits", "probs" or "log_probs"
    fill: float  # what an input is set to where it is masked
    forms: tuple[Form, ...]
