"""Computes one subject's answers on one backend, in its own process: python -m unilabel.conformance.worker.

The argument says what to run, as JSON (see `runner`). The worker writes lines of JSON to standard output: the version
of the framework and the device; that the subject is "ready"; the answer to each case; and that this is the "end". In
place of the first two it may have a "problem". Whatever the framework or the subject prints goes to standard error.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import unilabel
from unilabel.backend import Backend, backend_named, backend_of

from .calls import NotApplicable, Way
from .cases import Case, Tensor, cases
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
    try:
        case, call = find(subject, case, claims, backend, way)
        return {"numbers": _computed(backend, device, case, call, subject == "unilabel", mode)}
    except NotApplicable as reason:
        return {"not applicable": str(reason)}
    except BaseException as error:  # sys.exit() in a loss is wrong, too
        return {"error": _said(error)}


def _wrong_kind(backend: Backend, device: str, case: Case, result: Any, quantity: str) -> str:
    """What is wrong with the framework, dtype, shape or device of a result. Empty if all are right."""
    shape = case.cotangent.shape if quantity == "value" else case.logits.shape
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

    logits, targets = array(case.logits, "float64"), array(case.targets, "int32")
    options = {name: given for name, given in case.options.items() if not isinstance(given, Tensor)}
    arrays = {
        name: array(given, "bool" if name == "where" else "float64")
        for name, given in case.options.items()
        if isinstance(given, Tensor)
    }
    unreduced = case.options.get("reduction") == "none"
    summed = options | ({"reduction": "sum"} if unreduced else {})

    def called(x: Any, z: Any, arrays: dict[str, Any]) -> Any:
        return loss(x, z, **options, **arrays)

    numbers: dict[str, dict[str, list[str]]] = {}

    def take(quantity: str, how: str, result: Any) -> None:
        """Keeps the numbers of a result, at once: a loss might write the next ones into the same array."""
        problem = _wrong_kind(backend, device, case, result, quantity)
        if problem:
            raise TypeError(f"{quantity} by {how}: {problem}")
        numbers.setdefault(quantity, {})[how] = _hex(backend, result)

    run = put(called, backend.name, mode)
    if not ours or not backend.autodiff:  # the vjp needs a result of the right kind
        take("value", "the loss", run(logits, targets, arrays))
    if backend.autodiff:
        cotangent = array(case.cotangent, "float64")
        value, gradient = backend.vjp(lambda x: run(x, targets, arrays), logits, cotangent)
        take("value", "the loss" if ours else "the loss, differentiated", value)
        take("gradient", "autodiff", gradient)
        if ours and all(isinstance(z, float) for z in case.targets.values) and case.targets.values:
            value, gradient = backend.vjp(lambda z: run(logits, z, arrays), targets, cotangent)
            take("value", "the loss, differentiated by targets", value)
            take("target_gradient", "autodiff", gradient)
        if unreduced and mode == "eager" and case.loss == "multilabel_logistic_loss":  # whose Hessian is diagonal
            ones = array(Tensor(case.logits.shape, [1.0] * len(case.logits.values)), "float64")
            gradient, hessian = backend.vjp(
                lambda x: backend.vjp(lambda x: run(x, targets, arrays), x, ones)[1], logits, ones
            )
            take("gradient", "autodiff, to be differentiated", gradient)
            take("hessian", "autodiff", hessian)
    if ours:
        value_and_grad, grad_and_hess = unilabel.value_and_grad(loss), unilabel.grad_and_hess(loss)

        def closed_forms(x: Any, z: Any, arrays: dict[str, Any]) -> Any:
            first = value_and_grad(x, z, **options, **arrays)
            return first + (grad_and_hess(x, z, **summed, **arrays) if unreduced else ())

        value, gradient, *more = put(closed_forms, backend.name, mode)(logits, targets, arrays)
        take("value", "value_and_grad", value)
        take("gradient", "value_and_grad", gradient)
        if unreduced:
            gradient, hessian = more
            take("gradient", "grad_and_hess", gradient)
            take("hessian", "grad_and_hess", hessian)
    return numbers


def _hex(backend: Backend, array: Any) -> list[str]:
    return [float(x).hex() for x in np.asarray(backend.to_numpy(array), dtype="float64").ravel()]


if __name__ == "__main__":
    main()
