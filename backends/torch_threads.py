"""PyTorch: blocks of a large array, each computed by one thread."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from . import blocks
from .torch_internals import internals


@functools.cache
def _threads(count: int) -> blocks.Helpers | None:
    """Threads in which every operation of torch is computed by that thread alone; None where torch cannot do so."""
    if count == 1 or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None

    def start() -> None:
        torch.get_num_threads()  # the first call in a thread sets its number
        torch.set_num_threads(1)

    try:
        return blocks.Helpers(count, start)
    finally:
        torch.set_num_threads(count)  # again: threads that start later begin with the number that was set last


if hasattr(os, "register_at_fork"):  # threads are not forked
    os.register_at_fork(after_in_child=_threads.cache_clear)


def each(function: Any, rows: list[Any]) -> Any:
    """A block on each thread, which takes the next when it is done.

    In torch's own loops all threads share each operation, and wait for one whose core is busy with something else.
    """
    pool = _threads(torch.get_num_threads()) if internals.is_unwatched() else None
    if pool is None:
        return map(function, rows)
    mode = torch.inference_mode() if torch.is_inference_mode_enabled() else torch.no_grad()  # each thread has its own
    return pool.each(mode(function), rows, with_caller=False)
