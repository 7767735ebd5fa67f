"""Right and wrong calls, for type checkers alone: .ci/types has mypy and pyright read this file; nothing runs it.

They have to find an error in each line with a comment `error: TEXT`, with that text in its message, and in no other.
mypy takes what is of torch, jax and tensorflow for Any (pyproject.toml); pyright does not.
"""

from typing import Any, assert_type

import jax
import numpy as np
import tensorflow as tf
import torch
from numpy.typing import NDArray

import unilabel as ul
from unilabel.layers.torch import MultilabelLogisticLoss, SoftmaxNLL

Floats = NDArray[np.float32]


def arrays_in_the_same_out(x: Floats, t: torch.Tensor, j: jax.Array, k: tf.Tensor, anything: Any) -> None:
    assert_type(ul.softmax_nll(x, [0, 1]), Floats)
    assert_type(ul.softmax_nll(t, torch.tensor([0, 1])), torch.Tensor)
    assert_type(ul.multilabel_logistic_loss(j, x), jax.Array)
    assert_type(ul.binary_cross_entropy(k, x), tf.Tensor)
    assert_type(ul.cross_entropy(x, [0, 1]), Floats)
    assert_type(ul.nll(logits := ul.log_softmax(t), [0, 1]), torch.Tensor)
    assert_type(logits, torch.Tensor)
    assert_type(ul.sigmoid(ul.log_sigmoid(ul.softmax(x, (1, 2)))), Floats)
    assert_type(ul.softmax_nll(anything, anything), Any)
    assert_type(ul.softmax_nll(x, [0, 1]), float)  # error: "float"


def options_of_a_loss(x: Floats) -> None:
    ul.softmax_nll(x, x, weight=[1.0, 2.0], sample_weight=x, where=x > 0, ignore_index=-1, axis=(0, 1), validate=True)
    ul.multilabel_logistic_loss(targets=x, logits=x, pos_weight=2, label_smoothing=0.1, reduction="none")
    ul.cross_entropy(x, x, eps=1e-6, reduction="batchmean")
    ul.multilabel_logistic_loss(x, x, reduction="average")  # error: Literal['average']
    ul.softmax_nll(x, x, reduction="batch_mean")  # error: Literal['batch_mean']
    ul.binary_cross_entropy(x, x, reduction=None)  # error: None
    ul.cross_entropy(x, x, ignore_indx=0)  # error: "ignore_indx"
    ul.softmax_nll(x, x, pos_weight=[1.0, 2.0])  # error: "pos_weight"
    ul.softmax_nll(x, x, [1.0, 2.0])  # error: positional
    ul.softmax_nll(x, x, axis=None)  # error: None
    ul.nll(x)  # error: "targets"
    ul.softmax_nll([[0.5, 1.0]], [0])  # error: list[list[float]]
    ul.softmax(0.5)  # error: float
    ul.multilabel_loss(x, x)  # error: multilabel_loss


def options_of_a_derivative(x: Floats, t: torch.Tensor, anything: Any) -> None:
    value_and_grad = ul.value_and_grad(ul.softmax_nll)
    assert_type(value_and_grad(x, [0, 1]), tuple[Floats, Floats])
    assert_type(value_and_grad(t, [0, 1], weight=[1.0, 2.0], reduction="none"), tuple[torch.Tensor, torch.Tensor])
    assert_type(ul.grad_and_hess(ul.binary_cross_entropy)(logits=t, targets=x), tuple[torch.Tensor, torch.Tensor])
    one_of_two = ul.nll if anything else ul.softmax_nll
    assert_type(ul.value_and_grad(one_of_two)(x, [0, 1], ignore_index=0), tuple[Floats, Floats])
    ul.value_and_grad(anything)(x, [0, 1], reduction="sum")
    value_and_grad(x, [0, 1], wieght=[1.0, 2.0])  # error: "wieght"
    value_and_grad(x, [0, 1], pos_weight=2.0)  # error: "pos_weight"
    value_and_grad(x, [0, 1], reduction="avg")  # error: Literal['avg']
    value_and_grad(x, [0, 1], [1.0, 2.0])  # error: positional
    value_and_grad(x)  # error: "targets"
    value_and_grad([[0.5, 1.0]], [0])  # error: list[list[float]]
    ul.grad_and_hess(ul.multilabel_logistic_loss)(x, x, ignore_index=0)  # error: "ignore_index"
    ul.value_and_grad(0.5)  # error: value_and_grad
    _, _, _ = ul.grad_and_hess(ul.softmax_nll)(x, [0, 1])  # error: 3


def losses_of_a_linear_layer(x: Floats, t: torch.Tensor) -> None:
    assert_type(ul.linear_softmax_nll(x, x, [0, 1], linear_bias=[0.0, 1.0], ignore_index=-1), Floats)
    assert_type(ul.linear_multilabel_logistic_loss(t, t, t, reduction="none"), torch.Tensor)
    value, gradients = ul.value_and_grad(ul.linear_softmax_nll)(t, t, [0, 1], linear_bias=t)
    assert_type(value, torch.Tensor)
    assert_type(gradients.features, torch.Tensor)
    ul.linear_softmax_nll(x, [0, 1])  # error: "targets"
    ul.linear_softmax_nll(x, x, [0, 1], axis=1)  # error: "axis"


def modules(t: torch.Tensor) -> None:
    loss = SoftmaxNLL([1.0, 2.0], ignore_index=-100, label_smoothing=0.1, axis=1, reduction="sum")
    assert_type(loss(t, t, reduction="none"), torch.Tensor)
    assert_type(MultilabelLogisticLoss(pos_weight=t)(t, t, where=t > 0), torch.Tensor)
    assert_type(loss.forward(input=t, target=t), torch.Tensor)
    assert_type(loss.decodes(loss.activation(t)), torch.Tensor)
    assert_type(loss(t, t, weight=[1.0, 2.0], sample_weight=t, where=t > 0, axis=(1, 2), validate=True), torch.Tensor)
    loss(t, t, wieght=[1.0, 2.0])  # error: "wieght"
    loss(t, t, reduction="average")  # error: Literal['average']
    loss(t, t, pos_weight=t)  # error: "pos_weight"
    loss(t, t, t)  # error: positional
    MultilabelLogisticLoss()(t, t, ignore_index=0)  # error: "ignore_index"
    SoftmaxNLL(ignore_indx=-100)  # error: "ignore_indx"
    SoftmaxNLL(pos_weight=t)  # error: "pos_weight"
    MultilabelLogisticLoss(reduction="average")  # error: Literal['average']
    MultilabelLogisticLoss(None, t)  # error: positional
