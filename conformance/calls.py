"""How somebody's function is called: in its own order and names, with its own targets, and what it returns.

What a function cannot be asked is NotApplicable, with the reason: never passed, and never silent.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import unilabel
from unilabel.backend import Backend

from .cases import LOSSES, REDUCTIONS, Case, Tensor, class_axes

Array = Any
LossFunction = Callable[..., Array]
KINDS = ("int64", "float", "onehot", "positives")
RETURNED = (*REDUCTIONS, "classmean")
# The names of what comes before the targets.
FIRST = {
    "logits": ("logits",),
    "probabilities": ("probs",),
    "log-probabilities": ("log_probs",),
    "features": ("features", "linear_weight"),
}


class NotApplicable(Exception):
    """The subject does not have this loss, or does not take these options."""


class Way(NamedTuple):
    """How a package.module:function is called. Without a template, as unilabel's: f(logits, targets, **options)."""

    call: str | None = None  # a template
    reduction: str | None = None  # what it returns, one of RETURNED; None: what the option `reduction` asks for
    targets: tuple[str, ...] = ()  # the KINDS that it takes; empty: all, as the cases have them
    axis: int | None = None  # its class axis, if the template has no axis; None: the last


class Template(NamedTuple):
    """A call: the names (of operands and options) and literals that it is given."""

    arguments: list[ast.expr]
    keywords: dict[str, ast.expr]

    def names(self) -> set[str]:
        return {node.id for node in [*self.arguments, *self.keywords.values()] if isinstance(node, ast.Name)}

    def __call__(self, function: LossFunction, given: dict[str, Any]) -> Array:
        """A keyword that is given an option which the case does not have is left out."""

        def value(node: ast.expr) -> Any:
            return given[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

        keywords = {
            name: value(node)
            for name, node in self.keywords.items()
            if not isinstance(node, ast.Name) or node.id in given
        }
        return function(*map(value, self.arguments), **keywords)


def template(text: str, loss: str) -> Template:
    """Reads "f(targets, logits, weight=weight)". ValueError, with what is expected, if it is no such call."""
    names, options = (*FIRST[LOSSES[loss].takes], "targets"), _options(loss)

    def refuse(why: str) -> ValueError:
        first = ", ".join(names)
        return ValueError(
            f'expected a call such as "f({first}, reduction=reduction)", of {first}, literals, and '
            f"as keywords the options {', '.join(options)}; received {text!r}: {why}"
        )

    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise refuse(f"{error.args[0]}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "f":
        raise refuse("it is no call of f")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if len(keywords) < len(call.keywords):
        raise refuse("it has a **, or a keyword twice")
    found = Template(call.args, keywords)
    for node in [*found.arguments, *keywords.values()]:
        if isinstance(node, ast.Name):
            if node.id not in (*names, *options):
                raise refuse(f"{loss} has no {node.id}")
            continue
        try:
            ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise refuse(f"{ast.unparse(node)!r} is neither a name of these nor a literal") from None
    for node in found.arguments:
        if isinstance(node, ast.Name) and node.id in options:
            raise refuse(f"{node.id} is no keyword, so that it could not be left out where a case has none")
    for name in names:
        if name not in found.names():
            raise refuse(f"it has no {name}")
    return found


def _options(loss: str) -> list[str]:
    parameters = inspect.signature(getattr(unilabel, loss)).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "validate"]


def wrong(way: Way, loss: str) -> tuple[str, str] | None:
    """A wrong part of a way to call a loss, and what is wrong with it, or None."""
    taken: set[str] = set()
    if way.call is not None:
        try:
            taken = template(way.call, loss).names()
        except ValueError as error:
            return "--call", f"{error}."
    if way.reduction not in (None, *RETURNED):
        return "--reduction", f"{way.reduction!r} is none of {', '.join(RETURNED)}."
    if way.reduction == "classmean" and LOSSES[loss].per_example:
        return "--reduction", f"{loss} is one number for all classes of an example, and has no classmean."
    for name in ("reduction", "axis"):
        if name in taken and getattr(way, name) is not None:
            return f"--{name}", f"the call {way.call!r} says that the function is given a {name}: expected one of both."
    for kind in way.targets:
        if kind not in KINDS:
            return "--targets", f"{kind!r} is none of {', '.join(KINDS)}."
    return None


def adapted(way: Way, function: LossFunction, case: Case, backend: Backend) -> tuple[Case, LossFunction]:
    """The case as the function takes it, and the function as the case calls it."""
    call = None if way.call is None else template(way.call, case.loss)
    taken = _parameters(function, case.loss) if call is None else call.names()
    options, per_example = dict(case.options), LOSSES[case.loss].per_example
    axes = class_axes(case.options, case.logits)
    wanted = options.pop("reduction", "mean" if per_example else "batchmean")
    returned = way.reduction
    if returned is None and "reduction" in taken:  # frameworks have no batchmean
        returned = options["reduction"] = "sum" if wanted == "batchmean" else wanted
    elif returned is None:
        if "reduction" in case.options:
            raise NotApplicable("takes no reduction")
        returned = wanted
    if (way.axis is not None or "axis" not in taken) and (per_example or returned in ("batchmean", "classmean")):
        _check_axis(way, case, axes)
    if way.axis is not None or "axis" not in taken:
        options.pop("axis", None)
    missing = [name for name in options if name not in taken]
    if missing:
        raise NotApplicable(f"takes no {', '.join(missing)}")
    if returned != wanted:
        _check_reduction(case, returned, wanted)
    case, cast = _targets(way, case, axes)

    def called(*operands: Array, **given: Any) -> Array:
        chosen = {name: option if name == "reduction" else given[name] for name, option in options.items()}
        *first, z = operands
        z = z if cast is None else backend.cast(z, cast)
        named = dict(zip(FIRST[LOSSES[case.loss].takes], first, strict=True)) | {"targets": z}
        result = function(*first, z, **chosen) if call is None else call(function, chosen | named)
        if backend.name == "numpy" and type(result) is float:  # scikit-learn's
            result = backend.cast(np.asarray(result), case.dtype)
        return result if returned == wanted else _reduced(backend, case, axes, result, returned, wanted)

    return case, called


def _parameters(function: LossFunction, loss: str) -> set[str]:
    """The names of a function's parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # one written in C does not say
        return set()
    return set(_options(loss) if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters])


def _check_axis(way: Way, case: Case, axes: list[int]) -> None:
    """That the function's class axis is the case's. Of logits with one axis, it is that one."""
    own, count = -1 if way.axis is None else way.axis, len(case.logits.shape)
    if not count:
        raise NotApplicable("has a class axis, where these logits have none")
    if axes != [0 if count == 1 else own + count if own < 0 else own]:
        raise NotApplicable(f"has its class axis at {own}")


def _check_reduction(case: Case, returned: str, wanted: str) -> None:
    """That what the case asks for can be had from what the function returns."""
    if wanted == "none":
        raise NotApplicable(f"returns the {returned}, not {wanted}")
    if case.dtype in ("float16", "bfloat16"):
        raise NotApplicable(f"in {case.dtype} the losses would be rounded before they are added up")
    if returned == "classmean" and "where" in case.options:
        raise NotApplicable("returns the classmean, of masked classes too")
    weighted = {"weight", "sample_weight"} & case.options.keys()
    if "mean" in (wanted, returned) and weighted and LOSSES[case.loss].per_example:
        raise NotApplicable("does not divide by weights")


def _targets(way: Way, case: Case, axes: list[int]) -> tuple[Case, str | None]:
    """The case with the targets that the function takes, and the dtype to cast them to."""
    targets, kinds = case.targets, way.targets
    if not kinds or case.positives:
        return case, None
    if LOSSES[case.loss].per_example and len(targets.shape) == len(case.logits.shape) - len(axes):
        if "onehot" in kinds:
            return _onehot(case, axes), case.dtype
        if "int64" in kinds:
            return case, "int64"
        raise NotApplicable("takes no class indices")
    if any(isinstance(z, float) for z in targets.values):
        if "float" in kinds:
            return case, case.dtype
        raise NotApplicable("takes no float targets")
    for kind in kinds:
        if kind in ("int64", "float"):
            return case, "int64" if kind == "int64" else case.dtype
    raise NotApplicable("takes no labels that are 0 or 1")


def _onehot(case: Case, axes: list[int]) -> Case:
    if len(axes) > 1:
        raise NotApplicable("has one class axis")
    (axis,), classes = axes, case.shape[axes[0]]
    if not all(0 <= y < classes for y in case.targets.values):
        raise NotApplicable("takes one-hot rows, and a class index out of range has none")
    indices = np.asarray(case.targets.values, dtype=int).reshape(case.targets.shape)
    rows = np.moveaxis(np.eye(classes)[indices], -1, axis)
    return case._replace(targets=Tensor(case.shape, rows.ravel().tolist()))


def _reduced(backend: Backend, case: Case, axes: list[int], result: Array, returned: str, wanted: str) -> Array:
    """The reduction that the case asks for."""
    shape = case.shape
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    reduced = returned not in ("none", "classmean")
    whole = shape if returned == "none" and not LOSSES[case.loss].per_example else batch
    right, received = () if reduced else whole, tuple(getattr(result, "shape", ()))
    if received != right:
        kinds = {"none": "losses, not reduced", "classmean": "the means over the classes"}
        said = f"{kinds.get(returned, f'the {returned}')}, of shape {right}"
        raise TypeError(f"Expected {said}. Received: {type(result).__name__} of shape {received}.")
    classes = math.prod(shape[i] for i in axes) if shape else 1
    counts = {"mean": _taking_part(case, axes), "batchmean": math.prod(batch), "classmean": classes}
    total = result if reduced else backend.namespace(result).sum(result)
    if returned in counts:
        total = total * counts[returned]
    total = total / max(counts.get(wanted, 1), 1)
    return backend.cast(total, case.dtype) if backend.name == "numpy" else total  # else a sum of NumPy's is no array


def _taking_part(case: Case, axes: list[int]) -> int:
    """How many elements, or examples, a mean is over."""
    where = case.options.get("where", True)
    mask = np.asarray(where.values, bool).reshape(where.shape) if isinstance(where, Tensor) else np.asarray(where)
    keep: Any = np.broadcast_to(mask, case.shape)
    if not LOSSES[case.loss].per_example:
        return int(keep.sum())
    keep = keep.any(axis=tuple(axes))
    if "ignore_index" in case.options and len(case.targets.shape) == keep.ndim:
        indices = np.asarray(case.targets.values, dtype=int).reshape(case.targets.shape)
        keep = keep & (indices != case.options["ignore_index"])
    return int(keep.sum())
