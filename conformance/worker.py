"""One backend's answers, in a process of its own: python -m unilabel.conformance.worker, started by `runner`.

Its argument says what to run, as JSON. It writes a line of JSON for each case to the standard output that it was given;
what the framework itself prints goes to standard error.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

import unilabel
from unilabel.backend import Backend, backend_named, backend_of

from .cases import Case, Tensor, cases


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    backend = backend_named(job["backend"])
    if "describe" in job:
        print(json.dumps({"version": backend.version(), "devices": backend.devices()}), file=answers)
        return
    device = find_device(backend, job["device"])
    print(json.dumps({"version": backend.version(), "device": device}), file=answers)
    for case in selected(job["dtypes"], job["seed"], job["patterns"]):
        print(json.dumps({"id": case.id, **answer(backend, device, case)}), file=answers)


def selected(dtypes: Sequence[str], seed: int, patterns: Sequence[str]) -> list[Case]:
    """The cases whose id, or family, one of the patterns matches; no patterns are all cases."""

    def chosen(case: Case) -> bool:
        return not patterns or any(fnmatch.fnmatch(name, p) for p in patterns for name in (case.id, case.family))

    return list(filter(chosen, cases(tuple(dtypes), seed)))


def find_device(backend: Backend, wanted: str | None) -> str:
    """The device of that name, or the first whose name has it in it: 'cuda' finds cuda:0 and TensorFlow's GPU:0."""
    devices = backend.devices()
    if wanted is None or wanted in devices:
        return wanted or devices[0]
    for device in devices:
        if wanted.lower().replace("gpu", "cuda") in device.lower().replace("gpu", "cuda"):
            return device
    raise SystemExit(f"Expected a device of {backend.name}: {', '.join(devices)}. Received: {wanted}.")


def answer(backend: Backend, device: str, case: Case) -> dict[str, Any]:
    """Value and gradient, in closed form and by autodiff with the case's cotangent; or what went wrong."""

    def array(tensor: Tensor, empty: str) -> Any:
        """Floats in the case's dtype, integers in 32 bits (there are devices that have no more)."""
        data = np.asarray(tensor.values, dtype=None if tensor.values else empty).reshape(tensor.shape)
        if data.dtype.kind != "f":
            return backend.asarray(data.astype("int32") if data.dtype.kind == "i" else data, device=device)
        exact = data.astype("float64" if case.dtype == "float64" else "float32")
        return backend.cast(backend.asarray(exact, device=device), case.dtype)

    try:
        loss = getattr(unilabel, case.loss)
        value_and_grad = unilabel.value_and_grad(loss)
        logits, targets = array(case.logits, "float64"), array(case.targets, "int32")
        options = {
            name: array(given, "bool" if name == "where" else "float64") if isinstance(given, Tensor) else given
            for name, given in case.options.items()
        }
        results = dict(zip(("value", "closed_form"), value_and_grad(logits, targets, **options), strict=True))
        if backend.autodiff:
            cotangent = array(case.cotangent, "float64")
            recorded = backend.vjp(lambda x: loss(x, targets, **options), logits, cotangent)
            results |= zip(("value_recorded", "gradient"), recorded, strict=True)
        else:
            results["value_recorded"] = loss(logits, targets, **options)
        for name, result in results.items():
            kind = (backend_of(result).name, backend.dtype(result), tuple(result.shape), backend.device(result))
            shape = case.cotangent.shape if name.startswith("value") else case.logits.shape
            right = (backend.name, case.dtype, shape, backend.device(logits))
            if kind != right:
                return {"error": f"Expected {name} of kind {right}. Received: {kind}."}
        return {name: _hex(backend, result) for name, result in results.items()}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _hex(backend: Backend, array: Any) -> list[str]:
    return [float(x).hex() for x in np.asarray(backend.to_numpy(array), dtype="float64").ravel()]


if __name__ == "__main__":
    main()
