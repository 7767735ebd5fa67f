"""Where the Keras losses were before they had a file of their own."""

from ..layers.keras import MultilabelLogisticLoss, SoftmaxNLL

__all__ = ["MultilabelLogisticLoss", "SoftmaxNLL"]
