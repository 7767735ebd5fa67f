"""How a tensor finds its backend, and what is no array of one."""

import gc
import weakref

import numpy as np
import pytest
from shared import LOGITS, TARGETS, pattern

import unilabel as ul
import unilabel.backend


@pytest.mark.parametrize("logits", [LOGITS, 1.0, None, "logits", {"a": 1}])
def test_logits_that_are_no_array(logits):
    with pytest.raises(TypeError, match=f"numpy, torch, jax, tensorflow or .*Received: {type(logits).__name__}"):
        ul.softmax_nll(logits, [0, 1])


def test_other_things_of_a_framework_are_no_arrays():
    import jax
    import tensorflow as tf
    import torch

    for thing, name in (
        (np.dtype("f4"), "numpy Float32DType"),
        (torch.nn.Linear(2, 2), "torch Linear"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (jax.ShapeDtypeStruct((2,), "float32"), "jax ShapeDtypeStruct"),
        (tf.ragged.constant([[1.0], []]), "a tensorflow RaggedTensor"),
    ):
        with pytest.raises(TypeError, match=pattern(f"logits: a plain array of .*Received: {name}")):
            ul.softmax_nll(thing, [0, 1])
    with pytest.raises(TypeError, match=r"targets: a plain array. Received: torch max"):  # forgot .indices
        ul.softmax_nll(torch.eye(2), torch.eye(2).max(1))


def test_lists_that_make_no_array():
    """Nothing is dropped on the way: no mask, no gradient."""
    import torch

    x = torch.tensor(LOGITS)
    for weight, text in (
        ([np.ma.masked_array([1.0, 2.0, 3.0], [0, 1, 0])] * 2, "it holds a numpy MaskedArray"),
        ([[np.ma.masked_array(1.0, True)] * 3] * 2, "it holds a numpy MaskedArray"),
        ([torch.nn.Parameter(torch.tensor(1.0)), 2.0, 3.0], "Can't call numpy() on Tensor"),
    ):
        with pytest.raises(
            TypeError, match=pattern(f"weight: an array. Received: a list that NumPy cannot convert ({text}")
        ):
            ul.multilabel_logistic_loss(x, TARGETS, weight=weight)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_tensors_that_do_not_go_together():
    import torch
    from torch.masked import masked_tensor

    x, masked = torch.tensor(LOGITS), masked_tensor(torch.tensor(LOGITS), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=pattern("logits: a plain array of torch. Received: a torch MaskedTensor")):
        ul.softmax_nll(masked, [0, 1])
    for targets, text in (
        (masked, "a torch MaskedTensor"),
        (torch.tensor([0, 1], device="meta"), "a tensor on the meta"),
    ):
        with pytest.raises(TypeError, match=pattern(f"targets: a plain array. Received: {text}")):
            ul.softmax_nll(x, targets)
    with pytest.raises(ValueError, match=pattern("values to read. Received: a Tensor on meta, which has none")):
        ul.softmax_nll(x.to("meta"), [0, 1], validate=True)
    assert ul.softmax_nll(x.to("meta"), torch.tensor([0, 1])).is_meta


@pytest.mark.parametrize("kind", [np.matrix, np.ma.masked_array])
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_subclasses_with_other_arithmetic(kind):
    with pytest.raises(TypeError, match=r"logits: a plain array of numpy. Received: numpy (matrix|MaskedArray)"):
        ul.multilabel_logistic_loss(kind(LOGITS), TARGETS)


def test_frameworks_do_not_mix(framework):
    from unilabel.backend import backend_named

    other = "jax" if framework.name == "torch" else "torch"
    targets = backend_named(other).asarray(np.array(TARGETS))
    with pytest.raises(TypeError, match=pattern(f"Received: {framework.name} logits with a {other} array")):
        ul.multilabel_logistic_loss(framework.array(LOGITS), targets)


def test_types_are_not_kept_for_ever(monkeypatch):
    """Those that a program makes as it runs; arrays are still found."""
    monkeypatch.setattr(unilabel.backend, "MOST_TYPES", 8)
    made = weakref.WeakSet()
    for i in range(20):
        made.add(kind := type(f"Logits{i}", (), {}))
        with pytest.raises(TypeError, match=f"Received: Logits{i}"):
            ul.softmax_nll(kind(), [0, 1])
    del kind
    gc.collect()
    assert len(made) <= 8
    assert ul.softmax_nll(np.zeros((1, 1)), [0]) == 0
