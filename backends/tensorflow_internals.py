"""What unilabel asks of TensorFlow by private names: each is looked up once, here, and nowhere else.

Where one is missing, the answer is the one for which the loss is computed in a public way: right, and slower.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def find(path: str) -> Any:
    """What tensorflow.python has by that name; None if there is nothing."""
    try:
        return pkgutil.resolve_name(f"tensorflow.python.{path}")
    except (ImportError, AttributeError):
        return None


def _yes(*_: Any) -> bool:
    return True


class Internals:
    """TensorFlow's tapes and programs, in the backend's words. `find` is another one where tests take names away."""

    def __init__(self, find: Callable[[str], Any] = find) -> None:
        self._could_record = find("eager.record.could_possibly_record") or _yes
        self._should_record = find("eager.record.should_record_backprop") or _yes
        self._stop_recording = find("eager.record.stop_recording")
        self._record_operation = find("eager.record.record_operation")
        self._pack_tangents = find("eager.forwardprop_util.pack_tangents")
        self._push_state = find("eager.forwardprop_util.push_forwardprop_state")
        program = find("eager.polymorphic_function.concrete_function.ConcreteFunction.inference_fn")
        call = find("eager.polymorphic_function.atomic_function.AtomicFunction.call_preflattened")
        self._has_program = program is not None and call is not None

    def is_recording(self) -> bool:
        """Whether any GradientTape or ForwardAccumulator is at work."""
        return bool(self._could_record())

    def is_watched(self, arrays: Sequence[Any]) -> bool:
        """Whether a GradientTape watches one of these arrays."""
        return bool(self._should_record(arrays))

    def has_tangents(self, arrays: Sequence[Any]) -> bool:
        """Whether a ForwardAccumulator watches one of these arrays."""
        return self._pack_tangents is None or bool(self._pack_tangents(list(arrays)).tangents)

    def can_tape_within(self) -> bool:
        """Whether a tape works in a custom gradient that a ForwardAccumulator asks for; then `taping` is around it."""
        return self._push_state is not None

    def taping(self) -> Any:
        """A context in which a GradientTape works, as far as `can_tape_within` says so."""
        return contextlib.nullcontext() if self._push_state is None else self._push_state()

    def can_pause(self) -> bool:
        """Whether what runs under `pause` is left out of all tapes."""
        return self._stop_recording is not None or not self.is_recording()

    def pause(self) -> Any:
        """A context in which nothing is recorded, as far as `can_pause` says so."""
        return contextlib.nullcontext() if self._stop_recording is None else self._stop_recording()

    def recorded(self, value: Any, x: Any, pullback: Callable[[Any], list[Any]]) -> Any:
        """The value, which was computed from x outside of all tapes, and now has its derivative on them."""
        if self._record_operation is None:
            return tf.custom_gradient(lambda _: (value, pullback))(x)
        self._record_operation("unilabel", [value], [x], pullback)
        return value

    def program(self, function: Any) -> Callable[..., Any]:
        """A ConcreteFunction of tensors, without its __call__, which takes longer than a small program runs.

        Nothing may be recorded when it is called.
        """
        if not self._has_program:
            return function
        run, captured = function.inference_fn.call_preflattened, function.captured_inputs
        return lambda *arrays: run([*arrays, *captured])


internals = Internals()
