"""Large arrays in blocks of rows that fit into the cache: no temporary is as large as the logits.

For backends whose operations run one after the other, NumPy's and eager PyTorch's. The formulas never look across rows,
so a block is computed as if it were all there is; only the sums of the blocks are put together here.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from .. import formulas
from ..backend import Array
from ..formulas import Loss, Namespace, Operands, Options

# The C library gives memory from 128 kB up back to the system when it is freed, and the system clears it each time that
# it is taken again, which takes longer than to compute. Once an array of this size has been freed, glibc reuses it.
np.empty(1 << 24, np.uint8)


class Helpers:
    """Threads that compute blocks for whoever calls.

    They and their callers wait in C alone: where the handler of a signal raises, `threading` and `concurrent.futures`
    may keep a lock for ever, or release it twice. They are daemons: the threads of `concurrent.futures` end with the
    main one, but atexit handlers and other threads may still call.
    """

    def __init__(self, count: int, start: Callable[[], object] = lambda: None) -> None:
        """`start` is called in each thread first."""
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.count = 0  # fewer if the system gives no more, as while the interpreter ends
        started: SimpleQueue[object] = SimpleQueue()
        with contextlib.suppress(RuntimeError):
            while self.count < count:
                _thread.start_new_thread(_serve, (self._jobs, start, started))
                self.count += 1
        for _ in range(self.count):
            started.get()

    def each(self, function: Callable[[Any], Any], rows: list[Any], with_caller: bool) -> Iterable[Any]:
        """Each thread takes the next block, the caller's too if it is said; that begins before the others wake up."""
        if not self.count or sys.is_finalizing():
            return map(function, rows)
        left, done = deque(enumerate(rows)), [None] * len(rows)

        def work() -> None:
            while left:
                try:
                    i, some = left.popleft()
                except IndexError:  # another thread has taken the last
                    return
                try:
                    done[i] = function(some)
                except BaseException:
                    left.clear()  # the call fails: no more of it is needed
                    raise

        # A helper takes a ticket to begin. What it finds in its queue later than that must not keep arrays in memory.
        tickets = [work] * min(self.count, len(rows) - with_caller)
        begun, ended = len(tickets), SimpleQueue[BaseException | None]()
        try:
            for _ in range(begun):
                self._jobs.put(functools.partial(_help, tickets, ended))
            if with_caller:
                work()
            else:
                ended.put(ended.get())  # once one has ended, no block is left
        finally:
            left.clear()
            with contextlib.suppress(IndexError):
                while True:
                    tickets.pop()
                    begun -= 1
            errors = [ended.get() for _ in range(begun)]
        while errors:
            error = errors.pop()
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # its traceback has this frame
        return done


def _serve(jobs: SimpleQueue[Callable[[], None]], start: Callable[[], object], started: SimpleQueue[object]) -> None:
    started.put(start())
    while True:
        jobs.get()()


def _help(tickets: list[Callable[[], None]], ended: SimpleQueue[BaseException | None]) -> None:
    try:
        work = tickets.pop()
    except IndexError:  # too late
        return
    try:
        work()
    except BaseException as error:
        ended.put(error)
    else:
        ended.put(None)


class Block(NamedTuple):
    """Where it is: in an array of the logits' shape, and in one without the class axis."""

    full: tuple[slice, ...]
    batch: tuple[slice, ...]


def directly(formula: Callable[..., Any], *call: Any) -> Any:
    return formula(*call)


class Blockwise(NamedTuple):
    """What `run` and `gradient` need of a framework."""

    xp: Namespace
    finite: Namespace  # the same, for finite logits and class indices in range
    empty: Callable[[tuple[int, ...], Array], Array]  # memory of a shape, for an array's dtype
    is_contiguous: Callable[[Array], bool]
    each: Callable[[Callable[[Block], Any], list[Block]], Iterable[Any]]  # maps, on several threads or on one
    all_finite: Callable[[Array], bool]
    multiply: Callable[..., Any]  # of two factors, and of `out`, into which it writes
    large: int  # elements: smaller arrays are computed whole
    block: int
    are_labels: Callable[[Array], bool] | None = None  # whether float targets are all 0 or 1, where it pays to look
    whole: Callable[..., Any] = directly  # runs a formula, given before its arguments, on arrays that are not cut


class Call(NamedTuple):
    """A call with its arrays in a shape that can be cut into blocks, whose class axis is `axes`."""

    blockwise: Blockwise
    xp: Namespace
    loss: Loss
    options: Options
    x: Array
    operands: Operands
    axes: tuple[int, ...]
    blocks: list[Block]

    def each(self, formula: Callable[..., Any], write: Callable[[Block, Any], Any], cotangent: Any = None) -> list[Any]:
        """Run a formula on each block (half precision in float32), and return what `write` makes of the results."""
        xp = self.xp
        unreduced = self.options.reduction == "none"
        options = self.options._replace(half=False, reduction="none" if unreduced else "sum", axes=self.axes)

        def one(block: Block) -> Any:
            x = xp.astype(self.x[block.full], _working(xp, self.x), copy=False)
            operands = Operands(*(self._of(name, block) for name in Operands._fields))
            more = () if cotangent is None else (cotangent[self.losses(block)] if unreduced else cotangent,)
            known, operands = seen(self.blockwise, self.loss, options, operands)
            return write(block, formula(xp, self.loss, known, x, operands, *more))

        return list(self.blockwise.each(one, self.blocks))

    def losses(self, block: Block) -> tuple[slice, ...]:
        """Where the losses of a block are."""
        return block.batch if self.loss.per_example else block.full

    def _of(self, name: str, block: Block) -> Any:
        array = getattr(self.operands, name)
        if array is None or array.ndim == 0 or (self.loss.per_example and name == "weight"):
            return array
        if self.loss.per_example:
            return array[block.full if array.ndim == self.x.ndim else block.batch]
        cuts = (*block.full, *[slice(None)] * (self.x.ndim - len(block.full)))
        if self.options.positives and name in ("targets", "values"):
            rows = array[cuts[:-1]]
            return rows if cuts[-1] == slice(None) else self._labels(rows, cuts[-1])
        cuts = cuts[self.x.ndim - array.ndim :]
        return array[tuple(slice(None) if n == 1 else cut for n, cut in zip(array.shape, cuts, strict=True))]

    def _labels(self, labels: Array, part: slice) -> Array:
        """Labels that count from the first class of a part; wrong ones stay wrong."""
        classes, labels = self.x.shape[-1], self.xp.as_index(labels, self.x)
        stop = min(part.stop, classes)
        right, inside = (labels >= -1) & (labels < classes), (labels >= part.start) & (labels < stop)
        return self.xp.where(inside, labels - part.start, self.xp.where(right, -1, stop - part.start))

    def divide(self, total: Any, whole: Array) -> Any:
        """A total over the divisor of the reduction. `whole` are the logits in the caller's shape."""
        if self.options.reduction not in ("mean", "batchmean"):
            return total
        xp, counts = self.xp, [None]
        if self.options.reduction == "mean" and not formulas.count_alike(self.options, self.operands):
            counts = self.each(formulas.counts, lambda _, count: None if count is None else float(count))
        if counts[0] is None:
            return total / formulas.counted(xp, self.loss, self.options, whole)
        return total / formulas.or_infinity(xp, xp.asarray(_added(counts), dtype=_working(xp, whole)))

    def summed(self, values: list[float], whole: Array) -> Array:
        """The reduced loss, of the sums of the blocks: Python floats, as small arrays would fragment the memory."""
        return self.xp.asarray(self.divide(_added(values), whole), dtype=whole.dtype)

    def memory(self, whole: Array, per_example: bool) -> tuple[Array, Array]:
        """For a result of the logits' shape, or with a number for each row: as it is returned, and as it is written."""
        drop = self.options.axes if per_example else ()
        out = self.blockwise.empty(_without(whole.shape, drop), whole)
        return out, out.reshape(_without(self.x.shape, self.axes if per_example else ()))


def _without(shape: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape, -len(shape)) if i not in axes)


def seen(blockwise: Blockwise, loss: Loss, options: Options, operands: Operands) -> tuple[Options, Operands]:
    """Options that know whether the targets are 0 or 1, and targets that are finite if only masked ones are not.

    Such as NaN for a missing label: the fast namespace takes all for finite, and multiplies it by 0.
    """
    z, where = operands.targets, operands.where
    if options.positives:
        return options, operands
    floats = not (options.indices or options.binary)
    if where is not None and floats and not blockwise.all_finite(blockwise.xp.sum(z)):
        operands = operands._replace(targets=blockwise.xp.where(where, z, 0.0))
    if loss.per_example or options.binary or blockwise.are_labels is None:
        return options, operands
    return options._replace(binary=blockwise.are_labels(operands.targets)), operands


def _added(sums: list[Any]) -> float:
    """The sum, in pairs: one after the other, thousands of roundings may go in one direction."""
    with np.errstate(all="ignore"):
        return float(np.sum(sums))


def run(
    blockwise: Blockwise, formula: Any, loss: Loss, options: Options, x: Array, operands: Operands, *more: Any
) -> tuple[Any, Namespace]:
    """The result of `value`, `value_and_gradient`, … of `formulas`, and the namespace that it was computed with.

    `more`: what else a formula of one's own takes, whose x is too small for blocks.

    First with the fast namespace, which assumes finite logits and class indices in range. If that is wrong, a loss is
    infinite or NaN, or a gradient NaN, or there is an IndexError: then again with the safe one. (But a gradient is
    finite where the class is masked, and only the loss is not.)
    """
    call = loss, options, x, operands, *more
    if formula is not formulas.gradient_and_hessian or operands.where is None:
        try:
            result = _run(blockwise, blockwise.finite, formula, *call)
            if blockwise.all_finite(result[0] if isinstance(result, tuple) else result):
                return result, blockwise.finite
        except IndexError:
            pass
    return _run(blockwise, blockwise.xp, formula, *call), blockwise.xp


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
        known, operands = seen(blockwise, loss, options, operands)
        return blockwise.whole(formulas.gradient, xp, loss, known, x, operands, cotangent)
    out, flat = call.memory(x, False)
    if options.reduction == "none":
        cotangent = cotangent.reshape(_without(call.x.shape, call.axes if loss.per_example else ()))
    else:
        cotangent = call.divide(xp.astype(cotangent, _working(xp, x), copy=False), x)
    call.each(formulas.gradient, lambda block, part: flat.__setitem__(block.full, part), cotangent)
    return out


def _run(blockwise: Blockwise, xp: Namespace, formula: Any, *arguments: Any) -> Any:
    loss, options, x, operands, *more = arguments
    call = _in_blocks(blockwise, xp, loss, options, x, operands, formula is formulas.gradient_and_hessian)
    if call is None:
        known, operands = seen(blockwise, loss, options, operands)
        return blockwise.whole(formula, xp, loss, known, x, operands, *more)
    assert not more  # they would not be cut
    return _value(call, x) if formula is formulas.value else _pair(call, formula, x)


def _value(call: Call, x: Array) -> Array:
    if call.options.reduction == "none":
        out, flat = call.memory(x, call.loss.per_example)
        call.each(formulas.value, lambda block, part: flat.__setitem__(call.losses(block), part))
        return out
    return call.summed(call.each(formulas.value, lambda _, part: float(part)), x)


def _pair(call: Call, formula: Any, x: Array) -> tuple[Array, Array]:
    has_value = formula is formulas.value_and_gradient
    scale = call.divide(1.0, x)
    second, flat_second = call.memory(x, False)
    unreduced = call.options.reduction == "none" or not has_value
    first, flat_first = call.memory(x, has_value and call.loss.per_example) if unreduced else (None, None)

    def write(block: Block, pair: tuple[Array, Array]) -> float | None:
        _scale_into(call.blockwise, flat_second[block.full], pair[1], scale)
        if flat_first is not None:
            flat_first[call.losses(block) if has_value else block.full] = pair[0]
            return None
        return float(pair[0])

    values = call.each(formula, write)
    return call.summed(values, x) if first is None else first, second


def _scale_into(blockwise: Blockwise, out: Array, array: Array, scale: Any) -> None:
    if isinstance(scale, float) and scale == 1.0:
        out[...] = array
    elif out.dtype == array.dtype:
        blockwise.multiply(array, scale, out=out)
    else:
        out[...] = array * scale


def _in_blocks(
    blockwise: Blockwise,
    xp: Namespace,
    loss: Loss,
    options: Options,
    x: Array,
    operands: Operands,
    hessian: bool = False,
) -> Call | None:
    """None if it is too small for that, or makes no large array but the gradient."""
    size = math.prod(x.shape)
    if size < blockwise.large or ((loss.per_example or options.positives) and x.ndim == 1):
        return None
    if formulas.form_of(xp, loss, options, operands, hessian).sparse and not options.half:
        return None
    axes, contiguous = options.axes, blockwise.is_contiguous
    if loss.per_example:
        if contiguous(x):  # as few axes as can be, where that takes no copy
            axis = x.ndim + axes[0]
            lead, classes, trail = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
            rows = {name: _by_rows(name, array, x, lead, classes, trail) for name, array in operands._asdict().items()}
            x, operands = x.reshape((lead, classes, trail) if trail > 1 else (lead, classes)), Operands(**rows)
            axes = (-2,) if trail > 1 else (-1,)
        return Call(blockwise, xp, loss, options, x, operands, axes, _cut(x.shape, x.ndim + axes[0], blockwise.block))
    sparse = operands[:2] if options.positives else ()  # they have rows, but not the classes
    dense = [a for a in operands[len(sparse) :] if a is not None and a.ndim > 0]
    if contiguous(x) and all(a.shape == x.shape and contiguous(a) for a in dense):
        operands = Operands(*(_flat(a, keeps_last=options.positives) for a in operands))
        x = _flat(x, keeps_last=options.positives) if x.ndim else x.reshape(1)
    step = max(1, min(blockwise.block, size // 2) * x.shape[0] // size)
    cuts: list[tuple[slice, ...]] = [(slice(start, start + step),) for start in range(0, x.shape[0], step)]
    if options.positives and operands.values is None and x.ndim == 2 and x.shape[1] > blockwise.block:
        classes = x.shape[1]  # rows that the cache does not hold
        step = math.ceil(classes / math.ceil(classes / blockwise.block))
        cuts = [(*row, slice(start, start + step)) for row in cuts for start in range(0, classes, step)]
    return Call(blockwise, xp, loss, options, x, operands, axes, [Block(cut, cut) for cut in cuts])


def _cut(shape: tuple[int, ...], axis: int, block: int) -> list[Block]:
    """Blocks of whole rows, cut along the longest axis that is not the class axis, and along the next if need be."""
    size, ends = math.prod(shape), list(shape)
    steps = list(shape)
    block = min(block, size // 2)
    for i in sorted((i for i in range(len(shape)) if i != axis), key=lambda i: (-shape[i], i)):
        rest = math.prod(steps) // steps[i]
        steps[i] = max(1, min(steps[i], block // rest))
        if math.prod(steps) <= block:
            break
    cuts = [[slice(start, start + step) for start in range(0, n, step)] for n, step in zip(ends, steps, strict=True)]
    return [Block(full, full[:axis] + full[axis + 1 :]) for full in itertools.product(*cuts)]


def _working(xp: Namespace, x: Array) -> Any:
    """The dtype to compute in. (NumPy's float64 may be of another byte order.)"""
    return xp.float64 if x.dtype.itemsize == 8 else xp.float32


def _flat(array: Array, keeps_last: bool) -> Any:
    if array is None or array.ndim == 0:
        return array
    return array.reshape((math.prod(array.shape[:-1]), array.shape[-1]) if keeps_last else -1)


def _by_rows(name: str, array: Array, x: Array, lead: int, classes: int, trail: int) -> Any:
    if array is None or array.ndim == 0 or name == "weight":
        return array
    tail = (trail,) if trail > 1 else ()
    return array.reshape((lead, *tail) if array.ndim < x.ndim else (lead, classes, *tail))
