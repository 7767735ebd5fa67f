"""Large arrays in blocks of rows that fit into the cache: no temporary is as large as the logits.

For backends whose operations run one after the other, NumPy's and eager PyTorch's. The formulas never look across rows,
so a block is computed as if it were all there is; only the sums of the blocks are put together here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .. import formulas
from ..backend import Array
from ..formulas import Divisor, Loss, Namespace, Operands, Options

# The C library gives memory from 128 kB up back to the system when it is freed, and the system clears it each time that
# it is taken again, which takes longer than to compute. Once an array of this size has been freed, glibc reuses it.
np.empty(1 << 24, np.uint8)


class Blockwise(NamedTuple):
    """What `run` and `gradient` need of a framework."""

    xp: Namespace
    finite: Namespace  # the same, for finite logits and class indices in range
    empty: Callable[[tuple[int, ...], Array], Array]  # memory of a shape, for an array's dtype
    is_contiguous: Callable[[Array], bool]
    each: Callable[[Callable[[slice], Any], list[slice]], Iterable[Any]]  # maps, on several threads or on one
    all_finite: Callable[[Array], bool]
    large: int  # elements: smaller arrays are computed whole
    block: int


class Call(NamedTuple):
    """A call whose arrays have the rows (of a loss per element: or the elements) along the first axis."""

    blockwise: Blockwise
    xp: Namespace
    loss: Loss
    options: Options
    x: Array
    operands: Operands
    rows: list[slice]

    def each(self, formula: Callable[..., Any], write: Callable[[slice, Any], Any], cotangent: Any = None) -> list[Any]:
        """Run a formula on each block (half precision in float32), and return what `write` makes of the results."""
        xp = self.xp
        unreduced = self.options.reduction == "none"
        options = self.options._replace(half=False, reduction="none" if unreduced else "sum")

        def one(rows: slice) -> Any:
            x = xp.astype(self.x[rows], _working(xp, self.x), copy=False)
            operands = Operands(*(self._of(name, rows) for name in Operands._fields))
            more = () if cotangent is None else (cotangent[rows] if unreduced else cotangent,)
            return write(rows, formula(xp, self.loss, options, x, operands, *more))

        return list(self.blockwise.each(one, self.rows))

    def _of(self, name: str, rows: slice) -> Any:
        array = getattr(self.operands, name)
        if array is None or array.ndim == 0 or (self.loss.per_example and name == "weight"):
            return array
        broadcasts = not self.loss.per_example and (array.ndim < self.x.ndim or array.shape[0] == 1)
        return array if broadcasts else array[rows]

    def divide(self, total: Any, whole: Array) -> Any:
        """A total over the divisor of the reduction. `whole` are the logits in the caller's shape."""
        if self.options.reduction not in ("mean", "batchmean"):
            return total
        xp, counts = self.xp, [None]
        chosen = self.options.ignore_index is not None or any(array is not None for array in self.operands[1:])
        if self.options.reduction == "mean" and chosen:
            counts = self.each(formulas.counts, lambda _, count: None if count is None else float(count))
        if counts[0] is None:
            divisor = formulas.counted(xp, self.loss, self.options, whole)
        else:
            divisor = Divisor(None, xp.asarray(_added(counts), dtype=_working(xp, whole)))
        return formulas.mean(xp, total, divisor)

    def summed(self, values: list[float], whole: Array) -> Array:
        """The reduced loss, of the sums of the blocks: Python floats, as small arrays would fragment the memory."""
        return self.xp.asarray(self.divide(_added(values), whole), dtype=whole.dtype)

    def memory(self, whole: Array, per_example: bool) -> tuple[Array, Array]:
        """For a result of the logits' shape, or with a number for each row: as it is returned, and as it is written."""
        out = self.blockwise.empty(tuple(whole.shape)[: -1 if per_example else None], whole)
        return out, out.reshape(tuple(self.x.shape)[: -1 if per_example else None])


def _added(sums: list[Any]) -> float:
    """The sum, in pairs: one after the other, thousands of roundings may go in one direction."""
    with np.errstate(all="ignore"):
        return float(np.sum(sums))


def run(
    blockwise: Blockwise, formula: Callable[..., Any], loss: Loss, options: Options, x: Array, operands: Operands
) -> tuple[Any, Namespace]:
    """The result of `value`, `value_and_gradient`, … of `formulas`, and the namespace that it was computed with.

    First with the fast namespace, which assumes finite logits and class indices in range. If that is wrong, a loss is
    infinite or NaN, or there is an IndexError: then again with the safe one.
    """
    if formula is not formulas.gradient_and_hessian:
        try:
            result = _run(blockwise, blockwise.finite, formula, loss, options, x, operands)
            if blockwise.all_finite(result[0] if isinstance(result, tuple) else result):
                return result, blockwise.finite
        except IndexError:
            pass
    return _run(blockwise, blockwise.xp, formula, loss, options, x, operands), blockwise.xp


def gradient(
    blockwise: Blockwise,
    xp: Namespace,
    loss: Loss,
    options: Options,
    x: Array,
    operands: Operands,
    cotangent: Array,
) -> Array:
    """As `formulas.gradient`, with the namespace that the loss was computed with."""
    call = _in_blocks(blockwise, xp, loss, options, x, operands)
    if call is None:
        return formulas.gradient(xp, loss, options, x, operands, cotangent)
    out, flat = call.memory(x, False)
    if options.reduction == "none":
        cotangent = cotangent.reshape(tuple(call.x.shape)[: -1 if loss.per_example else None])
    else:
        cotangent = call.divide(xp.astype(cotangent, _working(xp, x), copy=False), x)
    call.each(formulas.gradient, flat.__setitem__, cotangent)
    return out


def _run(
    blockwise: Blockwise, xp: Namespace, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands
) -> Any:
    call = _in_blocks(blockwise, xp, loss, options, x, operands)
    if call is None:
        return formula(xp, loss, options, x, operands)
    return _value(call, x) if formula is formulas.value else _pair(call, formula, x)


def _value(call: Call, x: Array) -> Array:
    if call.options.reduction == "none":
        out, flat = call.memory(x, call.loss.per_example)
        call.each(formulas.value, flat.__setitem__)
        return out
    return call.summed(call.each(formulas.value, lambda _, part: float(part)), x)


def _pair(call: Call, formula: Any, x: Array) -> tuple[Array, Array]:
    has_value = formula is formulas.value_and_gradient
    scale = call.divide(1.0, x)
    second, flat_second = call.memory(x, False)
    unreduced = call.options.reduction == "none" or not has_value
    first, flat_first = call.memory(x, has_value and call.loss.per_example) if unreduced else (None, None)

    def write(rows: slice, pair: tuple[Array, Array]) -> float | None:
        flat_second[rows] = pair[1] if isinstance(scale, float) and scale == 1.0 else pair[1] * scale
        if flat_first is not None:
            flat_first[rows] = pair[0]
            return None
        return float(pair[0])

    values = call.each(formula, write)
    return call.summed(values, x) if first is None else first, second


def _in_blocks(
    blockwise: Blockwise, xp: Namespace, loss: Loss, options: Options, x: Array, operands: Operands
) -> Call | None:
    """None if it is too small for that."""
    size = math.prod(x.shape)
    if size < blockwise.large or (loss.per_example and x.ndim == 1):
        return None
    contiguous = blockwise.is_contiguous
    if contiguous(x):  # make the first axis longer, where that takes no copy
        if loss.per_example:
            rows = {name: _by_rows(name, array, x) for name, array in operands._asdict().items()}
            x, operands = x.reshape(-1, x.shape[-1]), Operands(**rows)
        elif all(a is None or a.ndim == 0 or (a.shape == x.shape and contiguous(a)) for a in operands):
            operands = Operands(*map(_flat, operands))
            x = x.reshape(-1)
    step = max(1, min(blockwise.block, size // 2) * x.shape[0] // size)
    blocks = [slice(start, start + step) for start in range(0, x.shape[0], step)]
    return Call(blockwise, xp, loss, options, x, operands, blocks)


def _working(xp: Namespace, x: Array) -> Any:
    """The dtype to compute in. (NumPy's float64 may be of another byte order.)"""
    return xp.float64 if x.dtype.itemsize == 8 else xp.float32


def _flat(array: Array) -> Any:
    return array if array is None or array.ndim == 0 else array.reshape(-1)


def _by_rows(name: str, array: Array, x: Array) -> Any:
    if array is None or array.ndim == 0 or name == "weight":
        return array
    return array.reshape(-1) if array.ndim < x.ndim else array.reshape(-1, x.shape[-1])
