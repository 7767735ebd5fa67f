"""Marks on functions that a framework's compiler looks for, set before anybody has imported the framework.

Each is what the framework's own decorator sets, which cannot be had without importing it. Without the mark the numbers
are the same, but a compiler may stop at the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_dynamo(function: Function) -> Function:
    """Have torch.compile call a function when it comes to it, and take what it returns, a plain value, for a constant.

    That is `torch.compiler.assume_constant_result`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_it_is_in_autograph(function: Function) -> Function:
    """Keep TensorFlow's AutoGraph from rewriting a function, and all that it calls, slowly and with warnings.

    That is `tf.autograph.experimental.do_not_convert`.
    """
    function.autograph_info__ = {}  # type: ignore[attr-defined]
    return function
