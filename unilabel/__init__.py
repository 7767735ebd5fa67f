"""Multilabel logistic loss and softmax + NLL for NumPy, PyTorch, JAX and TensorFlow tensors: one implementation."""

from .activations import log_sigmoid, log_softmax, sigmoid, softmax
from .derivatives import grad_and_hess, value_and_grad
from .linear import linear_multilabel_logistic_loss, linear_softmax_nll
from .losses import binary_cross_entropy, cross_entropy, multilabel_logistic_loss, nll, softmax_nll
from .positives import Positives

__all__ = [
    "Positives",
    "binary_cross_entropy",
    "cross_entropy",
    "grad_and_hess",
    "linear_multilabel_logistic_loss",
    "linear_softmax_nll",
    "log_sigmoid",
    "log_softmax",
    "multilabel_logistic_loss",
    "nll",
    "sigmoid",
    "softmax",
    "softmax_nll",
    "value_and_grad",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """The public names, for completion: what else is here are the modules that they come from."""
    return sorted({*__all__, "__version__", "layers"} & globals().keys())
