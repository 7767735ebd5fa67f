"""Computes one subject's answers on one backend, in its own process: python -m unilabel.conformance.worker.

The argument says what to run, as JSON (see `runner`). The worker writes lines of JSON to standard output: the version
of the framework and the device; that the subject is "ready"; the answer to each case; and that this is the "end". In
place of the first two it may have a "problem". Whatever the framework or the subject prints goes to standard error.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

import unilabel
from unilabel.backend import Backend, backend_named, backend_of

from .calls import NotApplicable, Way
from .cases import GRADIENTS, MULTILABEL, Case, Tensor, cases
from .modes import put
from .subjects import OURS, find, imported


def main() -> None:
    answers, process = os.fdopen(os.dup(1), "w", buffering=1), os.getpid()
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        if os.getpid() != process:  # a subject has forked, and this is its child
            os._exit(0)
        print(json.dumps(message), file=answers)

    try:
        _work(json.loads(sys.argv[1]), say)
    except (Exception, SystemExit) as error:
        say(problem=_said(error))
    say(end=True)


def _work(job: dict[str, Any], say: Callable[..., None]) -> None:
    backend = backend_named(job["backend"])
    if "describe" in job:
        say(version=str(backend.version()), devices=backend.devices())
        return
    device = find_device(backend, job["device"])
    call, reduction, targets, axis = job["way"]
    way = Way(call, reduction, tuple(targets), axis)
    say(version=str(backend.version()), device=device)
    if job["subject"] not in OURS:
        sys.path.append(os.getcwd())  # last: nothing there takes the place of what is installed
        imported(job["subject"])
    say(ready=True)
    for case in selected(job["dtypes"], job["seed"], job["patterns"], job["full"])[job["first"] :]:
        say(id=case.id, **answer(backend, device, case, job["subject"], job["loss"], job["mode"], way))


def _said(error: BaseException) -> str:
    """An error in words, even if it has none."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, which cannot be shown"


def selected(dtypes: Sequence[str], seed: int, patterns: Sequence[str] = (), full: bool = False) -> list[Case]:
    """The cases whose id or family matches one of the patterns; all cases if there are no patterns."""

    def chosen(case: Case) -> bool:
        return not patterns or any(fnmatch.fnmatch(name, p) for p in patterns for name in (case.id, case.family))

    return list(filter(chosen, cases(tuple(dtypes), seed, full)))


def find_device(backend: Backend, wanted: str | None) -> str:
    """The device of that name, or the first whose name contains it: 'cuda' finds cuda:0 and TensorFlow's GPU:0."""
    devices = backend.devices()
    if wanted is None or wanted in devices:
        return wanted or devices[0]
    for device in devices:
        if wanted.lower().replace("gpu", "cuda") in device.lower().replace("gpu", "cuda"):
            return device
    raise ValueError(f"Expected a device of {backend.name}: {', '.join(devices)}. Received: {wanted}.")


def answer(
    backend: Backend,
    device: str,
    case: Case,
    subject: str = "unilabel",
    claims: str | None = None,
    mode: str = "eager",
    way: Way = Way(),  # noqa: B008  # it is a tuple
) -> dict[str, Any]:
    """{"numbers": {quantity: {how: values}}}, or {"error": …}, or {"not applicable": …}."""
    ours = subject == "unilabel"
    try:
        case, call = find(subject, case, claims, backend, way)
        with _short_blocks() if ours and "blocks" in case.flags else nullcontext():
            return {"numbers": _computed(backend, device, case, call, ours, mode)}
    except NotApplicable as reason:
        return {"not applicable": str(reason)}
    except BaseException as error:  # sys.exit() in a loss is wrong, too
        return {"error": _said(error)}


@contextmanager
def _short_blocks() -> Iterator[None]:
    """In it unilabel's blocks of examples, which have millions of logits, are as short as they get."""
    module: Any = importlib.import_module("unilabel.formulas.linear")
    whole, module.BLOCK = module.BLOCK, 1
    try:
        yield
    finally:
        module.BLOCK = whole


def _wrong_kind(backend: Backend, device: str, case: Case, result: Any, quantity: str) -> str:
    """What is wrong with the framework, dtype, shape or device of a result. Empty if all are right."""
    shapes = {GRADIENTS[name]: tensor.shape for name, tensor in case.inputs.items()}
    shapes |= {"value": case.cotangent.shape, "hessian": case.shape, "target_gradient": case.targets.shape}
    shape = shapes[quantity]
    right = (backend.name, case.dtype, shape, device)
    kind = (backend_of(result).name, backend.dtype(result), tuple(result.shape), backend.device(result))
    return "" if kind == right else f"Expected kind {right}. Received: {kind}."


def _computed(
    backend: Backend, device: str, case: Case, loss: Callable[..., Any], ours: bool, mode: str
) -> dict[str, dict[str, list[str]]]:
    """Value, gradients and Hessian diagonal, each in every way of computing it: the results of all calls."""

    def array(tensor: Tensor, empty: str) -> Any:
        """Floats in the case's dtype, integers in 32 bits (some devices have no more)."""
        data = np.asarray(tensor.values, dtype=None if tensor.values else empty).reshape(tensor.shape)
        if data.dtype.kind != "f":
            return backend.asarray(data.astype("int32") if data.dtype.kind == "i" else data, device=device)
        exact = data.astype("float64" if case.dtype == "float64" else "float32")
        return backend.cast(backend.asarray(exact, device=device), case.dtype)

    inputs = {name: array(tensor, "float64") for name, tensor in case.inputs.items()}
    targets = array(case.targets, "int32")
    if case.positives and ours:
        targets = unilabel.Positives(targets)
    options = {name: given for name, given in case.options.items() if not isinstance(given, Tensor)}
    arrays = {
        name: array(given, "bool" if name == "where" else "float64")
        for name, given in case.options.items()
        if isinstance(given, Tensor) and name not in inputs
    }
    unreduced = case.options.get("reduction") == "none"
    summed = options | ({"reduction": "sum"} if unreduced else {})

    def arguments(inputs: dict[str, Any], z: Any, arrays: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The bias of a linear layer is an option; what comes before the targets is not."""
        operands = [given for name, given in inputs.items() if name not in case.options]
        return [*operands, z], {name: given for name, given in inputs.items() if name in case.options} | arrays

    def called(*given: Any) -> Any:
        operands, more = arguments(*given)
        return loss(*operands, **options, **more)

    numbers: dict[str, dict[str, list[str]]] = {}

    def take(quantity: str, how: str, result: Any) -> None:
        """Keeps the numbers of a result, at once: a loss might write the next ones into the same array."""
        problem = _wrong_kind(backend, device, case, result, quantity)
        if problem:
            raise TypeError(f"{quantity} by {how}: {problem}")
        numbers.setdefault(quantity, {})[how] = _hex(backend, result)

    def take_gradients(how: str, gradients: dict[str, Any]) -> None:
        for name, gradient in gradients.items():
            take(GRADIENTS[name], how, gradient)

    run = put(called, backend.name, mode)
    if not ours or not backend.autodiff:  # the vjp needs a result of the right kind
        take("value", "the loss", run(inputs, targets, arrays))
    if backend.autodiff:
        cotangent = array(case.cotangent, "float64")
        by_one = case.linear_weight is None
        flat = inputs["logits"] if by_one else array(_end_to_end(case.inputs), "float64")

        def apart(flat: Any) -> dict[str, Any]:
            return {"logits": flat} if by_one else _apart(backend, case.inputs, flat)

        value, gradient = backend.vjp(lambda flat: run(apart(flat), targets, arrays), flat, cotangent)
        take("value", "the loss" if ours else "the loss, differentiated", value)
        take_gradients("autodiff", apart(gradient))
        for name in inputs if "frozen" in case.flags else ():
            of_one = functools.partial(lambda name, x: run(inputs | {name: x}, targets, arrays), name)
            take(GRADIENTS[name], "autodiff, the others frozen", backend.vjp(of_one, inputs[name], cotangent)[1])
        if ours and case.targets.values and all(isinstance(z, float) for z in case.targets.values):
            value, gradient = backend.vjp(lambda z: run(inputs, z, arrays), targets, cotangent)
            take("value", "the loss, differentiated by targets", value)
            take("target_gradient", "autodiff", gradient)
        if unreduced and mode == "eager" and case.loss == MULTILABEL:  # whose Hessian is diagonal
            ones = array(Tensor(case.shape, [1.0] * math.prod(case.shape)), "float64")

            def gradient_of_sum(x: Any) -> Any:
                return backend.vjp(lambda x: run({"logits": x}, targets, arrays), x, ones)[1]

            gradient, hessian = backend.vjp(gradient_of_sum, inputs["logits"], ones)
            take("gradient", "autodiff, to be differentiated", gradient)
            take("hessian", "autodiff", hessian)
    if ours:
        value_and_grad: Any = unilabel.value_and_grad(loss)
        linear = case.linear_weight is not None
        grad_and_hess: Any = unilabel.grad_and_hess(loss) if unreduced and not linear else None

        def closed_forms(*given: Any) -> Any:
            operands, more = arguments(*given)
            value, found = value_and_grad(*operands, **options, **more)
            return value, found if linear else (found,), grad_and_hess and grad_and_hess(*operands, **summed, **more)

        value, found, both = put(closed_forms, backend.name, mode)(inputs, targets, arrays)
        take("value", "value_and_grad", value)
        take_gradients("value_and_grad", dict(zip(inputs, found, strict=False)))  # it may have None for a bias
        if both is not None:
            gradient, hessian = both
            take("gradient", "grad_and_hess", gradient)
            take("hessian", "grad_and_hess", hessian)
    return numbers


def _end_to_end(tensors: dict[str, Tensor]) -> Tensor:
    """One tensor for all of them, so that one call differentiates by all of them."""
    values = [value for tensor in tensors.values() for value in tensor.values]
    return Tensor((len(values),), values)


def _apart(backend: Backend, tensors: dict[str, Tensor], flat: Any) -> dict[str, Any]:
    """Arrays of these shapes from one that holds them end to end."""
    xp, arrays, start = backend.namespace(flat), {}, 0
    for name, tensor in tensors.items():
        end = start + math.prod(tensor.shape)
        arrays[name], start = xp.reshape(flat[start:end], tensor.shape), end
    return arrays


def _hex(backend: Backend, array: Any) -> list[str]:
    return [float(x).hex() for x in np.asarray(backend.to_numpy(array), dtype="float64").ravel()]


if __name__ == "__main__":
    main()
