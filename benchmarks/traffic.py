"""What PyTorch's kernels read and write: counted on meta tensors, which have no values and take the way of a GPU's.

Away from the CPU, eager PyTorch is bound by that. Caches are not seen: an array that two kernels read counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import options
from .options import Shape
from .subjects import Array

ROWS, CLASSES = 8192, 32000

# What unilabel may come to, times what PyTorch's own loss does: in bytes, by option; in kernels.
BOUNDS = {
    "multilabel, bool": 0.95,
    "multilabel, integers": 0.95,
    "multilabel": 1.2,
    "multilabel, pos_weight": 1.2,
    "indices": 1.2,
    "smoothing": 1.5,
    "distributions": 1.5,
    "where": 1.6,
}
KERNELS = 1.5

COMPOSITE = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")  # made of other operators, on all devices
NO_KERNEL = ("empty", "empty_strided")
PICKS = ("gather", "index", "index_select", "take", "nll_loss_forward")  # from the first, as many as the others hold
PUTS = ("scatter_", "scatter_add_", "index_put_", "_index_put_impl_", "index_add_")  # into the first, as many
WRITE_ONLY = ("fill_", "zero_", "copy_", "scatter_", "index_put_")
UNREAD = {"nll_loss_backward": "self"}
UNWRITTEN = {"log_sigmoid_forward": 1}  # a GPU's has no buffer


class Traffic(NamedTuple):
    bytes: int
    kernels: int


def count(option: str) -> tuple[Traffic, Traffic]:
    """Of value and gradient in float32: unilabel's and PyTorch's own."""
    few = options.inputs(Shape((2, 3)), 0)._asdict()  # for their shapes and dtypes

    def meta(name: str) -> Array:
        like = torch.from_numpy(few[name])
        return like.new_empty([{2: ROWS, 3: CLASSES}.get(n, n) for n in like.shape], device="meta")

    found = []
    for function in options.pair("torch", option, -1):
        x, *others = map(meta, options.parameters(function))
        x.requires_grad_()
        with Counter() as counter:
            torch.autograd.grad(function(x, *others), x)
        found.append(Traffic(counter.bytes, counter.kernels))
    return found[0], found[1]


class Counter(TorchDispatchMode):
    """Each operator that is not made of others is one kernel, but for views and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if name != "copy_" and not has(func.name(), "CPU"):
            for key in COMPOSITE:
                if has(func.name(), key):
                    with self:
                        return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        result = func(*args, **kwargs)
        moved = list(_moved(func, name, args, kwargs, result))
        if name not in NO_KERNEL and any(tensor.is_meta for tensor, _ in moved):
            self.kernels += 1
            self.bytes += sum(tensor.itemsize * number for tensor, number in moved if tensor.is_meta)
        return result


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> Iterable[tuple[Array, int]]:
    """Tensors, and how many of their elements the kernel reads or writes."""
    given = [
        (spec, tensor)
        for spec, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]
        for tensor in _tensors(value)
    ]
    new = [] if func._schema.is_mutable else list(_tensors(result))
    if name in UNWRITTEN:
        del new[UNWRITTEN[name]]
    others = [tensor for _, tensor in given[1:]] + new
    for i, (spec, tensor) in enumerate(given):
        if spec.name == UNREAD.get(name):
            continue
        number = max(map(_elements, others)) if i == 0 and name in PICKS + PUTS else _elements(tensor)
        written = spec.alias_info is not None and spec.alias_info.is_write
        read = not (written and (spec.is_out or name in WRITE_ONLY))
        yield tensor, number * (written + read)
    for tensor in new:
        yield tensor, _elements(tensor)


def _named(func: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    return [(spec, kwargs[spec.name]) for spec in func._schema.arguments if spec.name in kwargs]


def _tensors(value: Any) -> list[Array]:
    """Those in an argument or a result, which may be a list of them, with gaps."""
    return [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, torch.Tensor)]


def _elements(tensor: Array) -> int:
    """Those in memory: what an expanded tensor repeats is there once."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
