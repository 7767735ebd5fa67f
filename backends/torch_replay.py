"""A formula's operations, recorded once for each kind of call and replayed: for small arrays its Python is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..backend import Array
from ..formulas import Loss, Namespace, Operands, Options

_programs: dict[Any, Any] = {}  # by kind of call; True: seen once; False: cannot be recorded


def replayed(
    formula: Callable[..., Any],
    xp: Namespace,
    loss: Loss,
    options: Options,
    x: Array,
    operands: Operands,
    *more: Array | None,
) -> Any:
    """formula(xp, loss, options, x, operands, *more), for one that looks at shapes and dtypes, not at values.

    Recorded the second time, as a shape may come once only.
    """
    arrays = x, *operands, *more
    kinds = [None if array is None else (array.shape, array.dtype) for array in arrays]
    key = formula, xp, loss.name, options, x.device, *kinds
    program = _programs.get(key)
    if program is None or program is False:
        if program is None:
            if len(_programs) >= 1000:  # shapes that never come again
                _programs.clear()
            _programs[key] = True
        return formula(xp, loss, options, x, operands, *more)
    if program is True:
        given = [id(array) for array in arrays if array is not None]
        if len(set(given)) < len(given):  # one array in two places: which of them an operation takes could not be told
            return formula(xp, loss, options, x, operands, *more)
        with _Recording(arrays) as recording:
            result = formula(xp, loss, options, x, operands, *more)
        _programs[key] = recording.program(result)
        return result
    try:
        return program(*arrays)
    except RuntimeError:  # what the formula does about an error is not recorded
        return formula(xp, loss, options, x, operands, *more)


METADATA = {"__get__", "dim", "is_contiguous", "numel", "size", "stride"}  # the same for each call of a kind


class _Recording(TorchFunctionMode):
    """What is called while it is active, as lines of a function of these arrays."""

    def __init__(self, arrays: tuple[Array | None, ...]) -> None:
        super().__init__()
        self.arrays = list(arrays)  # kept: the id of one that is gone would be given to another
        self.names = {id(array): f"in_{i}" for i, array in enumerate(arrays) if array is not None}
        self.parameters = ", ".join(f"in_{i}" for i in range(len(arrays)))
        self.objects: dict[str, Any] = {}
        self.lines: list[str] = []
        self.is_complete = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            given = [self.text(a) for a in args] + [f"{name}={self.text(a)}" for name, a in kwargs.items()]
            call = f"{self.constant(function)}({', '.join(given)})"
            if id(result) not in self.names:  # else it was written into
                self.names[id(result)] = f"array_{len(self.arrays)}"
                self.arrays.append(result)
            self.lines.append(f"{self.names[id(result)]} = {call}")
        elif function.__name__ not in METADATA:
            self.is_complete = False
        return result

    def text(self, argument: Any) -> str:
        if isinstance(argument, torch.Tensor):
            self.is_complete &= id(argument) in self.names
            return self.names.get(id(argument), "")
        if isinstance(argument, (tuple, list)):
            return "(" + "".join(f"{self.text(part)}, " for part in argument) + ")"
        return self.constant(argument)

    def constant(self, thing: Any) -> str:
        self.objects[name := f"constant_{len(self.objects)}"] = thing
        return name

    def program(self, result: Any) -> Any:
        """The function, which returns this result; False if there is none."""
        self.lines.append(f"return {self.text(result)}")
        if not self.is_complete:
            return False
        exec("\n    ".join([f"def program({self.parameters}):", *self.lines]), self.objects)
        return self.objects["program"]
