"""What unilabel asks of PyTorch by private names: each is looked up once, here, and nowhere else.

Where one is missing, the answer is the one that has the loss computed by its differentiable expression: right, slower.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

import torch


def find(path: str) -> Any:
    """What torch has by that name; None if there is nothing."""
    try:
        return pkgutil.resolve_name(f"torch.{path}")
    except (ImportError, AttributeError):
        return None


def _yes(*_: Any) -> bool:
    return True


class Internals:
    """PyTorch's state, in the words of the backend. `find` is another one where tests take a name away."""

    def __init__(self, find: Callable[[str], Any] = find) -> None:
        self._has_transforms = find("_C._are_functorch_transforms_active") or _yes
        self._is_legacy_batched = find("_C._functorch.is_legacy_batchedtensor") or _yes
        self._forward_ad = torch.autograd.forward_ad if find("autograd.forward_ad._current_level") is not None else None
        self._dispatch_modes = find("_C._len_torch_dispatch_stack") or _yes
        self._dispatch_mode = find("_C._get_dispatch_mode")
        self._tracing_modes = [find(f"_C._TorchDispatchModeKey.{name}") for name in ("PROXY", "FAKE", "FUNCTIONAL")]
        self._function_modes = find("_C._len_torch_function_stack") or _yes
        self._function_mode_stack = find("overrides._get_current_function_mode_stack")
        self._device_context = find("utils._device.DeviceContext")
        self.is_any_autocast = find("_C._is_any_autocast_enabled") or _yes
        self.is_tracing = find("_C._is_tracing") or torch.jit.is_tracing
        self._find = find

    def is_eager(self) -> bool:
        """Whether operations run one by one, as they are called, and nothing but a tape watches."""
        if self.is_transformed() or self.is_tracing():
            return False
        return not (self._dispatch_modes() and self._is_traced()) and not (
            self._function_modes() and self._is_overridden()
        )

    def is_unwatched(self) -> bool:
        """Whether no dispatch mode is there, which would see the operations of its own thread alone."""
        return not self._dispatch_modes()

    def is_transformed(self) -> bool:
        """Whether a transformation of torch.func or forward mode is at work."""
        return self._has_transforms() or self._forward_ad is None or self._forward_ad._current_level >= 0

    def has_dual_numbers(self) -> bool:
        """Whether forward mode is at work without torch.func, which alone can be in itself once more."""
        return self._forward_ad is None or (self._forward_ad._current_level >= 0 and not self._has_transforms())

    def is_batched(self, cotangent: Any) -> bool:
        """Whether a backward pass is for several cotangents at once: then nothing may be written into an array."""
        return self._is_legacy_batched(cotangent) or self._has_transforms()

    def _is_traced(self) -> bool:
        """Whether a dispatch mode makes a graph of what runs. Others count or print: they see what runs anyway."""
        if self._dispatch_mode is None or None in self._tracing_modes:
            return True
        return any(self._dispatch_mode(mode) is not None for mode in self._tracing_modes)

    def _is_overridden(self) -> bool:
        """Whether a function mode may change what runs. A default device is a function mode too, and does not."""
        if self._function_mode_stack is None or self._device_context is None:
            return True
        return any(type(mode) is not self._device_context for mode in self._function_mode_stack())

    def compiler(self) -> str:
        """The name of the backend of the torch.compile that is at work; "" if that cannot be told."""
        translator = self._find("_dynamo.symbolic_convert.InstructionTranslator")  # loaded by then
        try:
            return str(translator.current_tx().output.compiler_fn.__name__)
        except AttributeError:
            return ""


internals = Internals()
