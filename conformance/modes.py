"""How a call is run: eagerly, traced into a graph of the framework's own operations, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def _torch(backend: str) -> Callable[[Function], Function]:
    def run(function: Function) -> Function:
        import torch

        torch.compiler.reset()  # there is a limit to how often it compiles a function again
        found: Function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        return found

    return run


def _jax(function: Function) -> Function:
    import jax

    found: Function = jax.jit(function)
    return found


def _mlx(function: Function) -> Function:
    import mlx.core as mx

    found: Function = mx.compile(function)
    return found


def _tensorflow(xla: bool) -> Callable[[Function], Function]:
    def run(function: Function) -> Function:
        import tensorflow as tf

        found: Function = tf.function(function, jit_compile=xla)
        return found

    return run


# By mode and backend. A mode that a backend does not have is not run on it.
MODES: dict[str, dict[str, Callable[[Function], Function]]] = {
    "eager": {},
    "graph": {"torch": _torch("aot_eager"), "tensorflow": _tensorflow(xla=False)},
    "compiled": {"torch": _torch("inductor"), "jax": _jax, "tensorflow": _tensorflow(xla=True), "mlx": _mlx},
}


def has(backend: str, mode: str) -> bool:
    return mode == "eager" or backend in MODES[mode]


def put(function: Function, backend: str, mode: str) -> Function:
    """The function, as it runs in that mode."""
    return function if mode == "eager" else MODES[mode][backend](function)
