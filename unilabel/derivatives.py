"""A loss with its gradient, and the gradient with the diagonal of the Hessian, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, overload

from . import formulas
from .canonical import Canonical, Given, canonical, canonical_linear
from .compilers import as_it_is_in_autograph
from .formulas import Linear, Operands
from .linear import LINEAR
from .losses import FORMULAS, Array

Options = ParamSpec("Options")


class LikeLoss(Protocol[Options]):
    """What type checkers take a `Derivative` for, as it has no way to say which options its loss takes."""

    __name__: str

    def __call__(
        self, logits: Array, targets: Any, *args: Options.args, **options: Options.kwargs
    ) -> tuple[Array, Array]: ...


class LikeLinear(NamedTuple, Generic[Array]):
    """What type checkers take a `Linear` of gradients for: the bias's is None if no bias was given."""

    features: Array
    linear_weight: Array
    linear_bias: Any


class LikeLinearLoss(Protocol[Options]):
    """The same for a loss on the last linear layer's inputs."""

    __name__: str

    def __call__(
        self, features: Array, linear_weight: Any, targets: Any, *args: Options.args, **options: Options.kwargs
    ) -> tuple[Array, LikeLinear[Array]]: ...


class Derivative:
    """A function that is called like a loss: `(logits, targets, **options)`."""

    first = "logits"  # the name of the first argument

    def __init__(self, maker: Callable[..., Any], loss: Callable[..., Any], returns: str, **fixed: Any) -> None:
        self.maker, self.loss, self.fixed = maker, loss, fixed
        self.defaults: dict[str, Any] = (loss.__kwdefaults__ or {}) | fixed
        self.__name__ = self.__qualname__ = f"{maker.__name__}({loss.__name__})"
        self.__doc__ = f"{returns} Arguments are those of `{loss.__name__}`."

    def __getattr__(self, name: str) -> Any:
        if name != "__signature__":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.", name=name, obj=self)
        from inspect import Signature, signature  # importing it takes as long as all of unilabel

        first, *others = signature(self.loss).parameters.values()
        others = [other.replace(default=self.defaults.get(other.name, other.default)) for other in others]
        return Signature([first.replace(name=self.first), *others])

    def __reduce__(self) -> tuple[Any, ...]:
        return self.maker, (self.loss,)

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, logits: Any, targets: Any, **options: Any) -> tuple[Any, Any]:
        return self.run(canonical(FORMULAS[self.loss], logits, *self.read(targets, options)))

    def read(self, targets: Any, options: dict[str, Any]) -> tuple[Operands, Given]:
        """The operands and options of a call."""
        if not options.keys() <= self.defaults.keys():
            choices = ", ".join(self.loss.__kwdefaults__ or {})
            unknown = ", ".join(sorted(options.keys() - self.defaults.keys()))
            raise TypeError(f"Expected options of {self.loss.__name__}: {choices}. Received: {unknown}.")
        for option, value in self.fixed.items():
            if options.get(option, value) != value:
                name = self.maker.__name__
                raise ValueError(f"Expected {option} {value!r} for {name}. Received: {options[option]!r}.")
        options = self.defaults | options
        return Operands(targets, None, *map(options.pop, OPERANDS, repeat(None))), Given(**options)

    def run(self, call: Canonical) -> tuple[Any, Any]:
        raise NotImplementedError


OPERANDS = Operands._fields[2:-1]  # the first are the targets; the last is smoothing, an option that may be an array
as_it_is_in_autograph(Derivative)


class ValueAndGradient(Derivative):
    def run(self, call: Canonical) -> tuple[Any, Any]:
        backend, loss, options, x, operands, restore, finish = call
        value, gradient = backend.closed_form(formulas.value_and_gradient, loss, options, x, operands)
        return value if finish is None else finish(value), restore(gradient)


class LinearValueAndGradients(Derivative):
    """The same of a loss on the last linear layer's inputs: `(features, linear_weight, targets, **options)`."""

    first = "features"

    def __init__(self, maker: Callable[..., Any], loss: Callable[..., Any], returns: str) -> None:
        super().__init__(maker, loss, returns)
        del self.defaults["linear_bias"]  # an argument of its own, and no option of a loss on logits

    def __call__(  # type: ignore[override]  # it takes one array more
        self, features: Any, linear_weight: Any, targets: Any, *, linear_bias: Any = None, **options: Any
    ) -> tuple[Any, Linear]:
        inputs = Linear(features, linear_weight, linear_bias)
        call = canonical_linear(LINEAR[self.loss], inputs, *self.read(targets, options))
        backend, loss, options_of_loss, inputs, operands, restore, finish = call
        needed = Linear(True, True, inputs.linear_bias is not None)
        value, gradients = backend.linear_closed_form(loss, options_of_loss, inputs, operands, needed)
        return finish(value), gradients._replace(features=restore(gradients.features))


class GradientAndHessian(Derivative):
    def run(self, call: Canonical) -> tuple[Any, Any]:
        backend, loss, options, x, operands, restore, _ = call
        gradient, hessian = backend.closed_form(formulas.gradient_and_hessian, loss, options, x, operands)
        return restore(gradient), restore(hessian)


@overload
def value_and_grad(loss: Callable[Concatenate[Array, Any, Any, Options], Array]) -> LikeLinearLoss[Options]: ...
@overload
def value_and_grad(loss: Callable[Concatenate[Array, Any, Options], Array]) -> LikeLoss[Options]: ...
def value_and_grad(loss: Any) -> Any:
    """A loss and its gradient with respect to the logits, in closed form: no tape, on every framework, NumPy too.

    Args:
        loss: a loss of unilabel: `multilabel_logistic_loss`, `softmax_nll`, `binary_cross_entropy`, `cross_entropy`
            or `nll`; or `linear_multilabel_logistic_loss` or `linear_softmax_nll`.

    Returns:
        A function that is called like the loss, `(logits, targets, **options)`, and returns the loss and its
        gradient, in the logits' shape, dtype and framework. With `reduction="none"`: the losses, and the gradient of
        their sum. Under `torch.autocast`, half-precision logits give float32 results, as with PyTorch's own losses.
        For a loss on the last linear layer's inputs, `(features, linear_weight, targets, **options)`, a named tuple of
        gradients, `features`, `linear_weight` and `linear_bias`, which is None if no bias was given.

    Raises:
        TypeError: `loss` is not one of unilabel's.

    >>> import numpy as np
    >>> from unilabel import softmax_nll
    >>> loss, gradient = value_and_grad(softmax_nll)(np.array([[2.0, 0.5, -1.0]]), [0])
    >>> print(f"{loss:.6f}", gradient.round(6))
    0.241311 [[-0.214403  0.17529   0.039113]]
    """
    return _derivative(loss, _WITH_GRADIENT)


def grad_and_hess(loss: Callable[Concatenate[Array, Any, Options], Array]) -> LikeLoss[Options]:
    """The gradient and the diagonal of the Hessian of a loss, per logit, as boosting libraries need them.

    `g = dL/dx_nc,  h = d²L/dx_nc²` of the summed loss L. Multilabel: `h = w σ(x) (1 - σ(x))`, with pos_weight in w
    where z is 1; softmax: `h = w p (1 - p)`.

    Args:
        loss: a loss of unilabel, as in `value_and_grad`.

    Returns:
        A function that is called like the loss, `(logits, targets, **options)`, and returns g and h, each in the
        logits' shape, dtype and framework. There is nothing to reduce: "sum" is the only `reduction` it takes.

    Raises:
        TypeError: `loss` is not one of unilabel's.

    The Hessian of a softmax is not diagonal. To make up for the rest, XGBoost doubles the diagonal, and LightGBM
    multiplies it by K / (K - 1) for K classes: do the same with h to train as they do.

    >>> import numpy as np
    >>> from unilabel import multilabel_logistic_loss
    >>> gradient, hessian = grad_and_hess(multilabel_logistic_loss)(np.array([0.0, 2.0, -50.0]), [1, 1, 0])
    >>> print(gradient.round(6), hessian.round(6))
    [-0.5      -0.119203  0.      ] [0.25     0.104994 0.      ]
    """
    return _derivative(loss, _WITH_HESSIAN)


for _maker in (value_and_grad, grad_and_hess):
    as_it_is_in_autograph(_maker)


def _derivative(loss: Any, derivatives: dict[Any, Derivative]) -> Any:
    if loss not in derivatives:
        names = ", ".join(function.__name__ for function in derivatives)
        raise TypeError(f"Expected a loss of unilabel: {names}. Received: {loss!r}.")
    return derivatives[loss]


# Made once: the same object each time, so that compilers that key on it do not compile again.
_WITH_GRADIENT: dict[Any, Derivative] = {
    loss: ValueAndGradient(
        value_and_grad, loss, "The loss and its gradient with respect to the logits, in closed form."
    )
    for loss in FORMULAS
} | {
    loss: LinearValueAndGradients(
        value_and_grad, loss, "The loss and its gradients with respect to the last linear layer's inputs."
    )
    for loss in LINEAR
}
_WITH_HESSIAN: dict[Any, Derivative] = {
    loss: GradientAndHessian(
        grad_and_hess,
        loss,
        "The gradient and the diagonal of the Hessian of the summed loss, per logit, in closed form.",
        reduction="sum",
    )
    for loss in FORMULAS
}
