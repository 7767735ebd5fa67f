"""The public functions. Each checks its call (arrange), then has the logits' framework run the formula (backend).

Which loss? It is part of the model, not of taste:

                        multilabel_logistic_loss              softmax_nll
    activation          sigmoid, one for each class           softmax, one for each example
    sums to 1?          no                                    yes
    labels per example  zero, one or many                     exactly one
    loss                a binary cross-entropy per class      -log of the label's probability
    target              0 or 1 (or between) for each class    a class index, or a distribution
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from . import formulas
from .arrange import Arranged, arrange, arrange_activation
from .compilers import as_it_is_in_autograph
from .formulas import Loss

Array = TypeVar("Array")


def multilabel_logistic_loss(
    logits: Array,
    targets: Any,
    *,
    weight: Any = None,
    pos_weight: Any = None,
    where: Any = None,
    label_smoothing: Any = 0.0,
    axis: int | tuple[int, ...] = -1,
    reduction: str = "batchmean",
    validate: bool = False,
) -> Array:
    """Multilabel logistic loss: a sigmoid and a binary cross-entropy for each class; zero, one or many labels.

    `L = -(1/N) Σ_n Σ_c w_nc [ pos_weight_nc · z_nc log σ(x_nc) + (1 - z_nc) log(1 - σ(x_nc)) ]`

    Args:
        logits: x, of any shape with a class axis: float16, bfloat16, float32 or float64, of any framework. They choose
            the framework, the device and the dtype of the result. Half precision is computed in float32. An array of
            no dimensions is one element.
        targets: z, in the logits' shape: bool, integer or float from 0 to 1 (a float between is a soft label). Like
            all other operands: an array of the logits' framework, or a NumPy array, a scalar or a list.
        weight: multiplies the elements; broadcasts to the logits.
        pos_weight: multiplies the term of the label 1; broadcasts to the logits. Above 1 it favours recall.
        where: bool, broadcasts to the logits. False is a missing label: no loss, zero gradient, whatever stands there.
        label_smoothing: ε from 0 to 1; the targets become z (1 - ε) + ε/2. A number, or an array of no dimensions of
            the logits' framework, traced or to be learned: there a value outside [0, 1] makes the loss NaN.
        axis: the class axis, or a tuple of axes read as one; only "batchmean" depends on it.
        reduction: "none", the loss of each element; "sum"; "mean", over the elements that `where` keeps (weights do
            not count); "batchmean", the sum over the number of examples. A mean over nothing is 0.
        validate: read the values first, and raise on targets outside [0, 1] and NaN logits.

    Returns:
        The loss in nats, differentiable by the logits' framework: a 0-d array, for "none" of the logits' shape.

    Raises:
        TypeError: dtypes or kinds of array that are not accepted; tensors of two frameworks.
        ValueError: shapes or options that do not fit; with `validate`, the first wrong value and its position.

    `reduction="mean"` is PyTorch's `BCEWithLogitsLoss` and `MultiLabelSoftMarginLoss`.

    >>> import numpy as np
    >>> logits = np.array([[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]])
    >>> loss = multilabel_logistic_loss(logits, [[1, 0, 1], [0, 1, 0]])
    >>> print(f"{loss:.6f}")
    2.023725
    """
    return _run(
        arrange(
            formulas.LOGISTIC,
            logits,
            targets,
            weight=weight,
            pos_weight=pos_weight,
            where=where,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )
    )


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
    reduction: str = "mean",
    validate: bool = False,
) -> Array:
    """Softmax and negative log-likelihood, in one: classes that exclude each other, exactly one label per example.

    `L = -(1/N) Σ_n log softmax(x_n)[y_n]`, or `-(1/N) Σ_n Σ_c z_nc log softmax(x_n)_c` for a distribution z.

    Args:
        logits: x, of any shape with a class axis: float16, bfloat16, float32 or float64, of any framework. They choose
            the framework, the device and the dtype of the result. Half precision is computed in float32. A logit of
            -inf is a class that cannot be.
        targets: class indices y of any integer dtype, in the logits' shape less the class axis; or distributions z in
            the logits' shape. An index outside [0, C) makes the loss and gradient of its example NaN. Like all other
            operands: an array of the logits' framework, or a NumPy array, a scalar or a list.
        weight: one for each class, of length C.
        sample_weight: one for each example, in the shape of class indices; in the sum and in the divisor of "mean".
        where: bool, broadcasts to the logits. A class where it is False is out of the softmax, and its target mass is
            dropped; a row without a class left is ignored.
        ignore_index: the class index of examples that do not count. For indices only.
        label_smoothing: ε from 0 to 1; the targets become z (1 - ε) + ε/K, K the classes that `where` keeps. A number,
            or an array of no dimensions, as in `multilabel_logistic_loss`.
        axis: the class axis, or a tuple of axes read as one.
        reduction: "none", the loss of each example; "sum"; "mean", over the examples not ignored, or with `weight`
            over the weight of their targets; "batchmean", over all examples. A mean over nothing is 0.
        validate: read the values first, and raise on wrong class indices, distributions that do not sum to 1 and NaN.

    Returns:
        The loss in nats, differentiable by the logits' framework: a 0-d array, for "none" of the shape of indices.

    Raises:
        TypeError: dtypes or kinds of array that are not accepted; tensors of two frameworks.
        ValueError: shapes or options that do not fit; with `validate`, the first wrong value and its position.

    For class indices this is PyTorch's `cross_entropy`, but that it ignores no index unless told to, and that a mean
    over nothing is 0.

    >>> import numpy as np
    >>> loss = softmax_nll(np.array([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]]), [0, 1])
    >>> print(f"{loss:.6f}")
    0.396378
    """
    return _run(
        arrange(
            formulas.SOFTMAX,
            logits,
            targets,
            weight=weight,
            sample_weight=sample_weight,
            where=where,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )
    )


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
    reduction: str = "batchmean",
    validate: bool = False,
) -> Array:
    """Binary cross-entropy on probabilities. From logits, `multilabel_logistic_loss` is the exact way.

    `L = -(1/N) Σ_n Σ_c w_nc [ pos_weight_nc · z_nc log max(p_nc, eps) + (1 - z_nc) log max(1 - p_nc, eps) ]`

    Args:
        probs: p, from 0 to 1, of any shape with a class axis and any floating dtype.
        targets: z, in the shape of p: bool, integer or float from 0 to 1.
        eps: p and 1 - p are clamped from below to it, where the derivative of the clamped term is 0. The default is
            the epsilon of p's dtype (1.2e-7 for float32), so that p of exactly 0 and 1 is finite.
        weight, pos_weight, where, label_smoothing, axis, reduction, validate: as in `multilabel_logistic_loss`.

    Returns:
        The loss in nats, differentiable by p's framework: a 0-d array, for "none" of the shape of p.

    Raises:
        TypeError, ValueError: as `multilabel_logistic_loss`.

    `reduction="mean"` is PyTorch's `BCELoss` with another clamp (it clamps the logarithms at -100).

    >>> import numpy as np
    >>> print(binary_cross_entropy(np.array([0.9, 0.2, 1.0]), [1, 0, 1], reduction="none").round(6))
    [0.105361 0.223144 0.      ]
    """
    return _run(
        arrange(
            formulas.BINARY,
            probs,
            targets,
            eps=eps,
            weight=weight,
            pos_weight=pos_weight,
            where=where,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )
    )


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
    reduction: str = "mean",
    validate: bool = False,
) -> Array:
    """Cross-entropy on probabilities of exclusive classes. From logits, `softmax_nll` is the exact way.

    `L = -(1/N) Σ_n Σ_c z_nc log max(p_nc, eps)`

    Args:
        probs: p, from 0 to 1, of any shape with a class axis and any floating dtype. They are not normalised.
        targets: class indices or distributions z, as in `softmax_nll`.
        eps: p is clamped from below to it, where its derivative is 0. The default is the epsilon of p's dtype.
        weight, sample_weight, where, ignore_index, label_smoothing, axis, reduction, validate: as in `softmax_nll`.

    Returns:
        The loss in nats, differentiable by p's framework: a 0-d array, for "none" of the shape of indices.

    Raises:
        TypeError, ValueError: as `softmax_nll`.

    Keras' `categorical_crossentropy` and `sparse_categorical_crossentropy` on probabilities, which normalise first.

    >>> import numpy as np
    >>> print(cross_entropy(np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]]), [0, 2], reduction="none").round(6))
    [0.356675 0.693147]
    """
    return _run(
        arrange(
            formulas.CATEGORICAL,
            probs,
            targets,
            eps=eps,
            weight=weight,
            sample_weight=sample_weight,
            where=where,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )
    )


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
    reduction: str = "mean",
    validate: bool = False,
) -> Array:
    """Negative log-likelihood on log-probabilities of exclusive classes. From logits, `softmax_nll` is the exact way.

    `L = -(1/N) Σ_n Σ_c z_nc log p_nc`

    Args:
        log_probs: log p, up to 0, of any shape with a class axis and any floating dtype. They are not normalised.
        targets: class indices or distributions z, as in `softmax_nll`.
        weight, sample_weight, where, ignore_index, label_smoothing, axis, reduction, validate: as in `softmax_nll`.

    Returns:
        The loss in nats, differentiable by the framework of `log_probs`: a 0-d array, for "none" of the shape of
        indices.

    Raises:
        TypeError, ValueError: as `softmax_nll`.

    For class indices this is PyTorch's `nll_loss`, but that it ignores no index unless told to.

    >>> import numpy as np
    >>> print(nll(np.log([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]), [0, 2], reduction="none").round(6))
    [0.356675 1.386294]
    """
    return _run(
        arrange(
            formulas.NLL,
            log_probs,
            targets,
            weight=weight,
            sample_weight=sample_weight,
            where=where,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            validate=validate,
        )
    )


def value_and_grad(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss and its gradient by the logits, in closed form: no tape, on every framework, NumPy among them.

    Args:
        loss: a loss of unilabel: `multilabel_logistic_loss`, `softmax_nll`, `binary_cross_entropy`, `cross_entropy`
            or `nll`.

    Returns:
        A function that is called like the loss, `(logits, targets, **options)`, and returns the loss and its
        derivative by the logits, in their shape, dtype and framework. With `reduction="none"`: the losses, and the
        gradient of their sum. Under `torch.autocast`, of half-precision logits: in float32, as PyTorch's own losses.

    Raises:
        TypeError: `loss` is not one of unilabel's.

    >>> import numpy as np
    >>> loss, gradient = value_and_grad(softmax_nll)(np.array([[2.0, 0.5, -1.0]]), [0])
    >>> print(f"{loss:.6f}", gradient.round(6))
    0.241311 [[-0.214403  0.17529   0.039113]]
    """

    return _found(loss, _WITH_GRADIENT)


def grad_and_hess(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient and the diagonal of the Hessian of a loss, per logit: what boosting libraries ask an objective for.

    `g = dL/dx_nc,  h = d²L/dx_nc²` of the summed loss L. Multilabel: `h = w σ(x) (1 - σ(x))`, with pos_weight in w
    where z is 1; softmax: `h = w p (1 - p)`.

    Args:
        loss: a loss of unilabel, as in `value_and_grad`.

    Returns:
        A function that is called like the loss, `(logits, targets, **options)`, and returns g and h, each in the
        logits' shape, dtype and framework. There is nothing to reduce: "sum" is the only `reduction` it takes.

    Raises:
        TypeError: `loss` is not one of unilabel's.

    The Hessian of a softmax is not diagonal. To make up for the rest, XGBoost doubles the diagonal, and LightGBM takes
    it times K / (K - 1) for K classes: do the same with h to train as they do.

    >>> import numpy as np
    >>> gradient, hessian = grad_and_hess(multilabel_logistic_loss)(np.array([0.0, 2.0, -50.0]), [1, 1, 0])
    >>> print(gradient.round(6), hessian.round(6))
    [-0.5      -0.119203  0.      ] [0.25     0.104994 0.      ]
    """

    return _found(loss, _WITH_HESSIAN)


def _found(loss: Any, functions: dict[Any, Callable[..., Any]]) -> Callable[..., Any]:
    if loss not in functions:
        names = ", ".join(function.__name__ for function in functions)
        raise TypeError(f"Expected a loss of unilabel: {names}. Received: {loss!r}.")
    return functions[loss]


def _with_gradient(loss: Callable[..., Any], formula: Loss) -> Callable[..., Any]:
    def run(logits: Any, targets: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        backend, _, settled, x, operands, restore, finish = arrange(formula, logits, targets, **options)
        value, gradient = backend.closed_form(formulas.value_and_gradient, formula, settled, x, operands)
        return value if finish is None else finish(value), restore(gradient)

    returns = "The loss and its gradient by the logits, in closed form."
    return _called_like(loss, "value_and_grad", returns, run)


def _with_hessian(loss: Callable[..., Any], formula: Loss) -> Callable[..., Any]:
    def run(logits: Any, targets: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        backend, _, settled, x, operands, restore, _ = arrange(formula, logits, targets, **options)
        gradient, hessian = backend.closed_form(formulas.gradient_and_hessian, formula, settled, x, operands)
        return restore(gradient), restore(hessian)

    returns = "The gradient and the diagonal of the Hessian of the summed loss, per logit, in closed form."
    return _called_like(loss, "grad_and_hess", returns, run, reduction="sum")


def _called_like(
    loss: Callable[..., Any], name: str, returns: str, run: Callable[..., Any], **fixed: Any
) -> Callable[..., Any]:
    """A function with the options of a loss and their defaults; those that are fixed have one choice."""
    defaults: dict[str, Any] = (loss.__kwdefaults__ or {}) | fixed

    def called(logits: Any, targets: Any, **options: Any) -> tuple[Any, Any]:
        if not options.keys() <= defaults.keys():
            choices, unknown = ", ".join(defaults), ", ".join(sorted(options.keys() - defaults.keys()))
            raise TypeError(f"Expected options of {loss.__name__}: {choices}. Received: {unknown}.")
        for option, value in fixed.items():
            if options.get(option, value) != value:
                raise ValueError(f"Expected {option} {value!r} for {name}. Received: {options[option]!r}.")
        return run(logits, targets, defaults | options)

    called.__name__ = called.__qualname__ = f"{name}({loss.__name__})"
    called.__doc__ = f"{returns} Arguments are those of `{loss.__name__}`."
    _, *others = inspect.signature(loss).parameters.values()
    others = [other.replace(default=fixed.get(other.name, other.default)) for other in others]
    logits, *_ = inspect.signature(called).parameters.values()
    called.__signature__ = inspect.Signature([logits, *others])  # type: ignore[attr-defined]
    globals()[called.__name__] = called  # where pickle looks for it
    as_it_is_in_autograph(called)
    return called


def sigmoid(x: Array) -> Array:
    """The logistic function, `1 / (1 + exp(-x))`, exact in both tails.

    Args:
        x: an array of any framework, shape and floating dtype.

    Returns:
        Values from 0 to 1, each for itself: they do not sum to 1. Of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.

    >>> import numpy as np
    >>> print(sigmoid(np.array([0.0, 2.0, -50.0])))
    [5.00000000e-01 8.80797078e-01 1.92874985e-22]
    """
    return _activation(formulas.sigmoid, x, None)


def log_sigmoid(x: Array) -> Array:
    """The logarithm of the logistic function, `-log(1 + exp(-x))`, without the loss of digits of `log(sigmoid(x))`.

    Args:
        x: an array of any framework, shape and floating dtype.

    Returns:
        Values up to 0, of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.

    >>> import numpy as np
    >>> print(log_sigmoid(np.array([0.0, 50.0, -1000.0])))
    [-6.93147181e-01 -1.92874985e-22 -1.00000000e+03]
    """
    return _activation(formulas.log_sigmoid, x, None)


def softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """The softmax, `exp(x_c) / Σ_k exp(x_k)` along the class axis.

    Args:
        x: an array of any framework and floating dtype. -inf is a class that cannot be.
        axis: the class axis, or a tuple of axes read as one.

    Returns:
        Values from 0 to 1 that sum to 1 along the axis, of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.
        ValueError: x has no such axis, or no class along it.

    >>> import numpy as np
    >>> print(softmax(np.array([1000.0, 1000.0, -np.inf])))
    [0.5 0.5 0. ]
    """
    return _activation(formulas.softmax, x, axis)


def log_softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """The logarithm of the softmax, `x_c - log Σ_k exp(x_k)` along the class axis, exact where p is close to 1.

    Args:
        x: an array of any framework and floating dtype. -inf is a class that cannot be.
        axis: the class axis, or a tuple of axes read as one.

    Returns:
        Values up to 0, of x's framework, dtype, shape and device.

    Raises:
        TypeError: x is not a floating-point array.
        ValueError: x has no such axis, or no class along it.

    >>> import numpy as np
    >>> print(log_softmax(np.array([17.0, 0.0])))
    [-4.13993763e-08 -1.70000000e+01]
    """
    return _activation(formulas.log_softmax, x, axis)


def _run(arranged: Arranged) -> Any:
    backend, loss, options, x, operands, _, finish = arranged
    value = backend.loss(loss, options, x, operands)
    return value if finish is None else finish(value)


def _activation(function: Any, x: Any, axis: Any) -> Any:
    backend, half, x, restore = arrange_activation(x, axis)
    return restore(backend.activation(function, x, half))


_FORMULAS: dict[Any, Loss] = {
    multilabel_logistic_loss: formulas.LOGISTIC,
    softmax_nll: formulas.SOFTMAX,
    binary_cross_entropy: formulas.BINARY,
    cross_entropy: formulas.CATEGORICAL,
    nll: formulas.NLL,
}

for _public in (*_FORMULAS, sigmoid, log_sigmoid, softmax, log_softmax):
    as_it_is_in_autograph(_public)

# Made once: the same function each time, so that compilers that key on it do not compile again.
_WITH_GRADIENT = {loss: _with_gradient(loss, formula) for loss, formula in _FORMULAS.items()}
_WITH_HESSIAN = {loss: _with_hessian(loss, formula) for loss, formula in _FORMULAS.items()}
