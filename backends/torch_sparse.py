"""PyTorch: sparse tensors as targets, by the columns of their elements."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..checks import fail
from ..sparse import Padded, padded


def is_sparse(targets: Any) -> bool:
    return isinstance(targets, torch.Tensor) and targets.layout not in (torch.strided, torch.jagged)


def of_tensor(targets: Any) -> Padded:
    """A tensor of any sparse layout. What is there twice is added."""
    if torch.compiler.is_compiling() or targets.is_meta:
        fail(TypeError, "targets", "unilabel.Positives, which compilers take", f"layout {targets.layout}")
    import array_api_compat.torch as xp  # which takes longer than a small call

    coo = targets if targets.layout is torch.sparse_coo else targets.to_sparse_coo()
    if coo.dense_dim():
        fail(TypeError, "targets", "a tensor all of whose axes are sparse", f"{coo.dense_dim()} dense axes")
    coo = coo.coalesce()
    *batch, columns = coo.indices()
    values, shape = coo.values(), tuple(coo.shape)
    rows = torch.zeros_like(columns)
    for n, row in zip(shape, batch, strict=False):
        rows = rows * n + row
    are_ones = not values.requires_grad and bool((values == (values != 0)).all())
    if are_ones:  # a 0 that is there is no label
        rows, columns = rows[values != 0], columns[values != 0]
    counts = torch.bincount(rows, minlength=math.prod(shape[:-1]))
    found = padded(xp, counts, columns, values, shape, are_ones)
    if found.values is None or not values.requires_grad:
        return found
    pads = torch.arange(found.indices.shape[-1], device=counts.device) >= counts[:, None]
    pads = pads.reshape(found.indices.shape)  # what repeats an element is not differentiated
    return found._replace(values=torch.where(pads, found.values.detach(), found.values))
