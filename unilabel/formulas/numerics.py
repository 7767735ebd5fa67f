"""Small steps that several modules share."""

from __future__ import annotations

from ..namespace import Array, Namespace


def weigh_logits(xp: Namespace, weight: Array, size: Array) -> Array:
    """weight · size, where size is infinite only if a logit is; then 0 if the weight is 0."""
    return xp.multiply(size, weight) if xp.assume_finite else xp.weigh(weight, size)


def weigh_beside(xp: Namespace, weight: Array, size: Array) -> Array:
    """The same, where another term of the loss is NaN if size is: this one need not be."""
    return xp.multiply(size, weight) if xp.assume_finite else xp.weigh_beside(weight, size)
