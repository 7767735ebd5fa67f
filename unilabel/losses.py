"""The losses. Each brings its call into canonical form, then has the logits' framework run the formula.

Which loss? It is part of the model, not of taste:

                        multilabel_logistic_loss              softmax_nll
    activation          sigmoid, one for each class           softmax, one for each example
    sums to 1?          no                                    yes
    labels per example  zero, one or many                     exactly one
    loss                a binary cross-entropy per class      -log of the label's probability
    target              0 or 1 (or between) for each class    a class index, or a distribution
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .backend import AnyArray
from .canonical import Given, canonical
from .compilers import as_it_is_in_autograph
from .formulas import Loss, Operands, Reduction
from .formulas.logistic import LOGISTIC
from .formulas.probabilities import BINARY, CATEGORICAL, NLL
from .formulas.softmax import SOFTMAX

Array = TypeVar("Array", bound=AnyArray)


def multilabel_logistic_loss(
    logits: Array,
    targets: Any,
    *,
    weight: Any = None,
    pos_weight: Any = None,
    where: Any = None,
    label_smoothing: Any = 0.0,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "batchmean",
    validate: bool = False,
) -> Array:
    """Multilabel logistic loss: a sigmoid and a binary cross-entropy for each class; zero, one or many labels.

    `L = -(1/N) Σ_n Σ_c w_nc [ pos_weight_nc · z_nc log σ(x_nc) + (1 - z_nc) log(1 - σ(x_nc)) ]`

    Args:
        logits: x, of any shape with a class axis: float16, bfloat16, float32 or float64, of any framework. They choose
            the framework, the device and the dtype of the result. Half precision is computed in float32. A 0-d array is
            one element.
        targets: z, in the logits' shape: bool, integer or float from 0 to 1 (a float between is a soft label). Like
            all other operands: an array of the logits' framework, or a NumPy array, a scalar, a list, or a Series or
            DataFrame of pandas. Of many classes, `Positives`, which name the labels of each example; or a sparse array
            or matrix of the framework or of SciPy.
        weight: multiplies the elements; broadcasts to the logits.
        pos_weight: multiplies the term of the label 1; broadcasts to the logits. Above 1 it favours recall.
        where: bool, broadcasts to the logits. False is a missing label: no loss and zero gradient, whatever its value,
            NaN included.
        label_smoothing: ε from 0 to 1; the targets become z (1 - ε) + ε/2. A number, or a 0-d array of the logits'
            framework, traced or to be learned: there, a value outside [0, 1] makes the loss NaN.
        axis: the class axis, or a tuple of axes read as one; only "batchmean" depends on it.
        reduction: "none", the loss of each element; "sum"; "mean", over the elements that `where` keeps (weights do
            not count); "batchmean", the sum over the number of examples. A mean over nothing is 0.
        validate: read the values first, and raise on targets outside [0, 1] and NaN logits.

    Returns:
        The loss in nats, differentiable by the logits' framework: a 0-d array, or with "none" one of the logits' shape.

    Raises:
        TypeError: dtypes or kinds of array that are not accepted; tensors of two frameworks.
        ValueError: shapes or options that do not fit; with `validate`, the first wrong value and its position.

    `reduction="mean"` is PyTorch's `BCEWithLogitsLoss` and `MultiLabelSoftMarginLoss`.

    >>> import numpy as np
    >>> logits = np.array([[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]])
    >>> loss = multilabel_logistic_loss(logits, [[1, 0, 1], [0, 1, 0]])
    >>> print(f"{loss:.6f}")
    2.023725

    A binary model has one class. Its N logits, if they are of one dimension, would be one example of N classes, and the
    loss N times too large: give them and the targets a class axis, or `reduction="mean"`.

    >>> x, z = np.array([0.5, -1.0]), np.array([1, 0])
    >>> print(f"{multilabel_logistic_loss(x[:, None], z[:, None]):.6f}")
    0.393669
    >>> print(f"{multilabel_logistic_loss(x, z, reduction='mean'):.6f}")
    0.393669
    """
    operands = Operands(targets, weight=weight, pos_weight=pos_weight, where=where)
    given = Given(reduction, axis, label_smoothing, validate=validate)
    return _run(LOGISTIC, logits, operands, given)


def softmax_nll(
    logits: Array,
    targets: Any,
    *,
    weight: Any = None,
    sample_weight: Any = None,
    where: Any = None,
    ignore_index: int | None = None,
    label_smoothing: Any = 0.0,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "mean",
    validate: bool = False,
) -> Array:
    """Softmax and negative log-likelihood, in one: mutually exclusive classes, exactly one label per example.

    `L = -(1/N) Σ_n log softmax(x_n)[y_n]`, or `-(1/N) Σ_n Σ_c z_nc log softmax(x_n)_c` for a distribution z.

    Args:
        logits: x, of any shape with a class axis: float16, bfloat16, float32 or float64, of any framework. They choose
            the framework, the device and the dtype of the result. Half precision is computed in float32. A logit of
            -inf is a class of probability 0.
        targets: class indices y of any integer dtype, in the logits' shape less the class axis; or distributions z in
            the logits' shape. An index outside [0, C) makes the loss and gradient of its example NaN. Like all other
            operands: an array of the logits' framework, or a NumPy array, a scalar, a list, or a Series or DataFrame of
            pandas.
        weight: one for each class, of length C.
        sample_weight: one for each example, in the shape of class indices; in the sum and in the divisor of "mean".
        where: bool, broadcasts to the logits. A class where it is False is out of the softmax, and its target
            probability is dropped; an example with no class left is ignored.
        ignore_index: the class index of examples that do not count. For indices only.
        label_smoothing: ε from 0 to 1; the targets become z (1 - ε) + ε/K, K the classes that `where` keeps. A number,
            or a 0-d array, as in `multilabel_logistic_loss`.
        axis: the class axis, or a tuple of axes read as one.
        reduction: "none", the loss of each example; "sum"; "mean", over the examples not ignored, or with `weight`
            over the weight of their targets; "batchmean", over all examples. A mean over nothing is 0.
        validate: read the values first, and raise on wrong class indices, distributions that do not sum to 1 and NaN.

    Returns:
        The loss in nats, differentiable by the logits' framework: a 0-d array, or with "none" one of the shape of
        class indices.

    Raises:
        TypeError: dtypes or kinds of array that are not accepted; tensors of two frameworks.
        ValueError: shapes or options that do not fit; with `validate`, the first wrong value and its position.

    For class indices this is PyTorch's `cross_entropy`, except that no index is ignored by default, and that a mean
    over nothing is 0.

    >>> import numpy as np
    >>> loss = softmax_nll(np.array([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]]), [0, 1])
    >>> print(f"{loss:.6f}")
    0.396378
    """
    operands = Operands(targets, weight=weight, sample_weight=sample_weight, where=where)
    given = Given(reduction, axis, label_smoothing, ignore_index=ignore_index, validate=validate)
    return _run(SOFTMAX, logits, operands, given)


def binary_cross_entropy(
    probs: Array,
    targets: Any,
    *,
    eps: float | None = None,
    weight: Any = None,
    pos_weight: Any = None,
    where: Any = None,
    label_smoothing: Any = 0.0,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "batchmean",
    validate: bool = False,
) -> Array:
    """Binary cross-entropy on probabilities. If you have logits, `multilabel_logistic_loss` is more accurate.

    `L = -(1/N) Σ_n Σ_c w_nc [ pos_weight_nc · z_nc log max(p_nc, eps) + (1 - z_nc) log max(1 - p_nc, eps) ]`

    Args:
        probs: p, from 0 to 1, of any shape with a class axis and any floating dtype.
        targets: z, in the shape of p: bool, integer or float from 0 to 1, `Positives` or a sparse array or matrix.
        eps: p and 1 - p are clamped to at least eps, where the derivative of the clamped term is 0. The default is
            the epsilon of p's dtype (1.2e-7 for float32), so that p of exactly 0 and 1 is finite.
        weight, pos_weight, where, label_smoothing, axis, reduction, validate: as in `multilabel_logistic_loss`.

    Returns:
        The loss in nats, differentiable by p's framework: a 0-d array, or with "none" one of the shape of p.

    Raises:
        TypeError, ValueError: as `multilabel_logistic_loss`.

    `reduction="mean"` is PyTorch's `BCELoss` with another clamp (of the logarithms, at -100).

    >>> import numpy as np
    >>> print(binary_cross_entropy(np.array([0.9, 0.2, 1.0]), [1, 0, 1], reduction="none").round(6))
    [0.105361 0.223144 0.      ]
    """
    operands = Operands(targets, weight=weight, pos_weight=pos_weight, where=where)
    given = Given(reduction, axis, label_smoothing, eps=eps, validate=validate)
    return _run(BINARY, probs, operands, given)


def cross_entropy(
    probs: Array,
    targets: Any,
    *,
    eps: float | None = None,
    weight: Any = None,
    sample_weight: Any = None,
    where: Any = None,
    ignore_index: int | None = None,
    label_smoothing: Any = 0.0,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "mean",
    validate: bool = False,
) -> Array:
    """Cross-entropy on probabilities of mutually exclusive classes. If you have logits, `softmax_nll` is more accurate.

    `L = -(1/N) Σ_n Σ_c z_nc log max(p_nc, eps)`

    Args:
        probs: p, from 0 to 1, of any shape with a class axis and any floating dtype. They are not normalised here.
        targets: class indices or distributions z, as in `softmax_nll`.
        eps: p is clamped to at least eps, where its derivative is 0. The default is the epsilon of p's dtype.
        weight, sample_weight, where, ignore_index, label_smoothing, axis, reduction, validate: as in `softmax_nll`.

    Returns:
        The loss in nats, differentiable by p's framework: a 0-d array, or with "none" one of the shape of class
        indices.

    Raises:
        TypeError, ValueError: as `softmax_nll`.

    Keras' `categorical_crossentropy` and `sparse_categorical_crossentropy` on probabilities, which normalise first.

    >>> import numpy as np
    >>> print(cross_entropy(np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]]), [0, 2], reduction="none").round(6))
    [0.356675 0.693147]
    """
    operands = Operands(targets, weight=weight, sample_weight=sample_weight, where=where)
    given = Given(reduction, axis, label_smoothing, ignore_index=ignore_index, eps=eps, validate=validate)
    return _run(CATEGORICAL, probs, operands, given)


def nll(
    log_probs: Array,
    targets: Any,
    *,
    weight: Any = None,
    sample_weight: Any = None,
    where: Any = None,
    ignore_index: int | None = None,
    label_smoothing: Any = 0.0,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "mean",
    validate: bool = False,
) -> Array:
    """Negative log-likelihood on log-probabilities. If you have logits, `softmax_nll` is more accurate.

    `L = -(1/N) Σ_n Σ_c z_nc log p_nc`

    Args:
        log_probs: log p, up to 0, of any shape with a class axis and any floating dtype. They are not normalised here.
        targets: class indices or distributions z, as in `softmax_nll`.
        weight, sample_weight, where, ignore_index, label_smoothing, axis, reduction, validate: as in `softmax_nll`.

    Returns:
        The loss in nats, differentiable by the framework of `log_probs`: a 0-d array, or with "none" one of the shape
        of class indices.

    Raises:
        TypeError, ValueError: as `softmax_nll`.

    For class indices this is PyTorch's `nll_loss`, except that no index is ignored by default.

    >>> import numpy as np
    >>> print(nll(np.log([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]), [0, 2], reduction="none").round(6))
    [0.356675 1.386294]
    """
    operands = Operands(targets, weight=weight, sample_weight=sample_weight, where=where)
    given = Given(reduction, axis, label_smoothing, ignore_index=ignore_index, validate=validate)
    return _run(NLL, log_probs, operands, given)


def _run(loss: Loss, logits: Any, operands: Operands, given: Given) -> Any:
    backend, _, options, x, operands, _, finish = canonical(loss, logits, operands, given)
    value = backend.loss(loss, options, x, operands)
    return value if finish is None else finish(value)


FORMULAS: dict[Callable[..., Any], Loss] = {
    multilabel_logistic_loss: LOGISTIC,
    softmax_nll: SOFTMAX,
    binary_cross_entropy: BINARY,
    cross_entropy: CATEGORICAL,
    nll: NLL,
}

for _loss in FORMULAS:
    as_it_is_in_autograph(_loss)
