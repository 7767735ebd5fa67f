"""PyTorch's own samples: the inputs of its operator database give PyTorch's values and gradients on every backend.

PyTorch computes in float64, on the float32 samples too: its gradients from logits are p - 1 and p - z, which leaves
float32 too few digits to compare with. So the bounds for float32 are what unilabel rounds away, relative to results
that cancel (sums over weights or terms of both signs, targets close to p). Those for float64 are what PyTorch rounds
away from logits, and what unilabel does where the targets are close to the probabilities.
"""

import functools
from typing import Any

import numpy as np
import pytest
import torch

import unilabel as ul

pytestmark = pytest.mark.full
OPS: dict[str, tuple[Any, dict[str, int]]] = {  # the loss, and the bounds on the relative error, in ε of the dtype
    "binary_cross_entropy_with_logits": (ul.multilabel_logistic_loss, {"float32": 16, "float64": 4096}),
    "multilabel_soft_margin_loss": (ul.multilabel_logistic_loss, {"float32": 32, "float64": 16}),
    "binary_cross_entropy": (ul.binary_cross_entropy, {"float32": 16, "float64": 64}),
    "cross_entropy": (ul.softmax_nll, {"float32": 16, "float64": 16384}),
    "nll_loss": (ul.nll, {"float32": 64, "float64": 8}),
}


@functools.cache
def samples(name, dtype):
    """PyTorch's operator, and its samples, which it seeds itself."""
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (op for op in op_db if op.name == f"nn.functional.{name}")
    found = list(op.sample_inputs("cpu", getattr(torch, dtype)))
    assert found
    if name == "cross_entropy":  # it has no sample of label smoothing
        smoothed = [sample.transform(torch.clone) for sample in found if sample.input.ndim == 2]
        for sample in smoothed:
            sample.kwargs["label_smoothing"] = 0.1
        found += smoothed
    return op, found


def in_float64(tensor):
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor


def arguments(name, sample, array):
    """The arguments of the sample, in the words of unilabel."""
    x, (targets,) = sample.input, sample.args
    options = {key: array(value) if torch.is_tensor(value) else value for key, value in sample.kwargs.items()}
    options.setdefault("reduction", "mean")
    if name in ("cross_entropy", "nll_loss"):
        options["axis"] = min(1, x.ndim - 1)
        if targets.is_floating_point() and options["reduction"] == "mean":
            options["reduction"] = "batchmean"  # of distributions PyTorch divides by the examples, whatever the weight
    return array(x), {"targets": array(targets), **options}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(framework, name, dtype):
    loss, bounds = OPS[name]
    close = functools.partial(np.testing.assert_allclose, rtol=bounds[dtype] * float(np.finfo(dtype).eps), atol=0)
    op, found = samples(name, dtype)
    for sample in found:
        x, options = arguments(name, sample, lambda a: framework.backend.asarray(a.numpy()))
        if x.ndim == 0 and "axis" in options:  # unlike PyTorch's, a softmax of unilabel wants a class axis
            with pytest.raises(ValueError, match="with at least one axis"):
                loss(x, **options)
            continue
        peer = sample.transform(in_float64)
        peer_x = peer.input.requires_grad_()
        expected = op(peer_x, *peer.args, **peer.kwargs)
        if framework.backend.autodiff:
            cotangent = torch.arange(expected.numel(), dtype=torch.float64).reshape(expected.shape) - 1.5
            function = functools.partial(loss, **options)
            value, gradient = framework.backend.vjp(function, x, framework.array(cotangent, dtype))
        else:
            cotangent = torch.ones_like(expected)
            value, gradient = ul.value_and_grad(loss)(x, **options)
        close(framework.numpy(value), expected.detach())
        close(framework.numpy(gradient), torch.autograd.grad(expected, peer_x, cotangent)[0])


def test_mean_of_weighted_distributions(framework):
    """PyTorch divides by the examples, but for class indices by the weights of their classes. unilabel does so for
    distributions too, and so gives one-hot targets the mean of their indices."""
    op, found = samples("cross_entropy", "float64")
    found = [s for s in found if s.args[0].is_floating_point() and s.kwargs.keys() == {"weight", "reduction"}]
    (sample,) = (sample for sample in found if sample.kwargs["reduction"] == "mean")
    z, weight = sample.args[0].numpy(), sample.kwargs["weight"].numpy()
    expected = float(op(sample.input, *sample.args, **sample.kwargs)) * len(z) / (z * weight).sum()
    value = ul.softmax_nll(framework.array(sample.input, "float64"), z, weight=weight, reduction="mean", axis=1)
    np.testing.assert_allclose(framework.numpy(value), expected, rtol=1e-14, atol=0)
