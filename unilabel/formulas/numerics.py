"""Small steps that several modules share."""

from __future__ import annotations

from typing import Any

from ..namespace import Array, Namespace


def is_number(x: Any) -> bool:
    """Whether this is no array, but a number, which a compiler may have left open."""
    return isinstance(x, float) or not hasattr(x, "ndim")  # torch.SymFloat is a float to Dynamo alone


def weigh_logits(xp: Namespace, weight: Array, size: Array) -> Array:
    """weight · size, where size is infinite only if a logit is; then 0 if the weight is 0."""
    return xp.multiply(size, weight) if xp.assume_finite else xp.weigh(weight, size)
