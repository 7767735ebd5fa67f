"""The losses on the last linear layer's inputs, without its logits in memory.

The logits of a large vocabulary are the largest array of a training step: 8192 tokens and 128256 classes are 4 GiB in
float32, their gradient as much again. Here only a block of them exists at a time (formulas/linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .canonical import Given, canonical_linear
from .compilers import as_it_is_in_autograph
from .formulas import Linear, Loss, Operands, Reduction
from .formulas.logistic import LOGISTIC
from .formulas.softmax import SOFTMAX
from .losses import Array


def linear_multilabel_logistic_loss(
    features: Array,
    linear_weight: Any,
    targets: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    pos_weight: Any = None,
    where: Any = None,
    label_smoothing: Any = 0.0,
    reduction: Reduction = "batchmean",
    validate: bool = False,
) -> Array:
    """`multilabel_logistic_loss` of the logits `features · linear_weightᵀ + linear_bias`, without them in memory.

    Args:
        features: what the last linear layer takes, of shape (..., D): float16, bfloat16, float32 or float64, of any
            framework. They choose the framework, the device and the dtype of the result. Half precision is computed and
            summed in float32.
        linear_weight: one row for each class, (C, D), as `torch.nn.Linear` and embedding tables have it: an array of
            the features' dtype.
        targets: z, of shape (..., C): bool, integer or float from 0 to 1, as in `multilabel_logistic_loss`; for many
            classes, `Positives` or a sparse array or matrix, whose zeros are never in memory.
        linear_bias: one number for each class, (C,), of the features' dtype. None: no bias.
        weight, pos_weight, where, label_smoothing: as in `multilabel_logistic_loss`; arrays broadcast to (..., C).
        reduction: "none", the loss of each element, which is an array of the logits' shape; "sum"; "mean";
            "batchmean", the sum over the number of examples.
        validate: read the values first, and raise on targets outside [0, 1] and NaN in what makes the logits.

    Returns:
        The loss in nats, differentiable by the features' framework with respect to features, linear_weight and
        linear_bias: a 0-d array, or with "none" one of shape (..., C).

    Raises:
        TypeError: dtypes or kinds of array that are not accepted, or that differ; tensors of two frameworks.
        ValueError: shapes or options that do not fit; with `validate`, the first wrong value and its position.

    >>> import numpy as np
    >>> features, weight = np.array([[1.0, 0.5], [0.0, -1.0]]), np.array([[0.2, 0.4], [0.1, -0.3], [0.0, 0.6]])
    >>> loss = linear_multilabel_logistic_loss(features, weight, [[1, 0, 1], [0, 1, 0]], linear_bias=[0.1, 0.0, -0.1])
    >>> print(f"{loss:.6f}")
    1.626286
    """
    operands = Operands(targets, weight=weight, pos_weight=pos_weight, where=where)
    given = Given(reduction, -1, label_smoothing, validate=validate)
    return _run(LOGISTIC, Linear(features, linear_weight, linear_bias), operands, given)


def linear_softmax_nll(
    features: Array,
    linear_weight: Any,
    targets: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    sample_weight: Any = None,
    where: Any = None,
    ignore_index: int | None = None,
    label_smoothing: Any = 0.0,
    reduction: Reduction = "mean",
    validate: bool = False,
) -> Array:
    """`softmax_nll` of the logits `features · linear_weightᵀ + linear_bias`, without them in memory.

    Args:
        features, linear_weight, linear_bias: as in `linear_multilabel_logistic_loss`.
        targets: class indices y of any integer dtype, of shape (...); or distributions z, of shape (..., C). An index
            outside [0, C) makes the loss of its example NaN, and so all that it is added to.
        weight, sample_weight, where, ignore_index, label_smoothing: as in `softmax_nll`; where broadcasts to (..., C).
        reduction: "none", the loss of each example; "sum"; "mean", over the examples not ignored, or with `weight`
            over the weight of their targets; "batchmean", over all examples. A mean over nothing is 0.
        validate: read the values first, and raise on wrong class indices, distributions that do not sum to 1, and NaN
            in what makes the logits.

    Returns:
        The loss in nats, differentiable by the features' framework with respect to features, linear_weight and
        linear_bias: a 0-d array, or with "none" one of shape (...).

    Raises:
        TypeError, ValueError: as `linear_multilabel_logistic_loss`.

    For class indices this is PyTorch's `linear_cross_entropy`, except that no index is ignored by default, and that a
    mean over nothing is 0.

    >>> import numpy as np
    >>> features, weight = np.array([[1.0, 0.5], [0.0, -1.0]]), np.array([[0.2, 0.4], [0.1, -0.3], [0.0, 0.6]])
    >>> print(f"{linear_softmax_nll(features, weight, [0, 1]):.6f}")
    0.788324
    """
    operands = Operands(targets, weight=weight, sample_weight=sample_weight, where=where)
    given = Given(reduction, -1, label_smoothing, ignore_index=ignore_index, validate=validate)
    return _run(SOFTMAX, Linear(features, linear_weight, linear_bias), operands, given)


def _run(loss: Loss, inputs: Linear, operands: Operands, given: Given) -> Any:
    backend, _, options, inputs, operands, _, finish = canonical_linear(loss, inputs, operands, given)
    return finish(backend.linear_loss(loss, options, inputs, operands))


LINEAR: dict[Callable[..., Any], Loss] = {
    linear_multilabel_logistic_loss: LOGISTIC,
    linear_softmax_nll: SOFTMAX,
}

for _loss in LINEAR:
    as_it_is_in_autograph(_loss)
