"""Functions of other projects as they are: their own order and names, targets and reductions."""

import re
import shlex
from collections import Counter
from pathlib import Path

from unilabel.conformance.calls import Way
from unilabel.conformance.cases import cases
from unilabel.conformance.cli import main
from unilabel.conformance.oracle import expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.worker import answer

from unilabel.backend import backend_named

DOCUMENT = (Path(__file__).parent.parent / "docs" / "conformance.md").read_text()


def documented():
    """The commands of docs/conformance.md that run a function of another project, by its name."""
    block = re.search(r"<!-- tested -->\n```sh\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    return {command[command.index("--subject") + 1]: command for command in commands}


def parsed(command):
    """The backend, the subject, its loss and the way to call it, as the command line reads them."""
    given = main.commands["conformance"].make_context("conformance", command[2:]).params
    way = Way(given["call"], given["reduction"], given["targets"], given["axis"])
    return *given["backends"], *given["subjects"], given["loss"], way


# By function: the number of cases that apply, of those in float32 of the families below; and PEERS' failures, by flag.
FAMILIES = ("seed", "zero", "infinite", "masked", "targets", "shapes", "probabilities", "confident", "smoothed")
KNOWN = {
    "torch.nn.functional:cross_entropy": {"confident", "offset", "excluded class", "infinite logit", "masked"},
    "optax:softmax_cross_entropy_with_integer_labels": {"confident", "offset"},
    "optax:sigmoid_binary_cross_entropy": {"infinite logit", "second derivative"},
    "keras.losses:binary_crossentropy": {"infinite logit"},
    "keras.losses:sparse_categorical_crossentropy": {"confident", "infinite logit"},
    "tensorflow.nn:sigmoid_cross_entropy_with_logits": {"infinite logit", "soft saturated"},
    "sklearn.metrics:log_loss": {"nan logit"},
}
if __name__ == "__main__":
    import sys
    import time

    for name, command in documented().items():
        if not any(a in name for a in sys.argv[1:]):
            continue
        backend, subject, loss, way = parsed(command)
        backend = backend_named(backend)
        start = time.time()
        status, flags, reasons = Counter(), Counter(), Counter()
        for case in cases(("float32",), 0):
            if case.family not in FAMILIES or case.loss != loss or len(case.logits.values) > 200:
                continue
            found = answer(backend, backend.devices()[0], case, subject, loss, "eager", way)
            if "not applicable" in found:
                status["na"] += 1
                reasons[found["not applicable"]] += 1
            elif "error" in found or any(
                v.failed for v in judge(case, expected(case), found["numbers"], backend.name).values()
            ):
                status["fail"] += 1
                for f in case.flags or ("other",):
                    flags[f] += 1
                if "error" in found or not case.flags or case.flags == ("cotangent",):
                    print(
                        case.id,
                        found.get(
                            "error",
                            judge(case, expected(case), found["numbers"], backend.name) if "error" not in found else "",
                        ),
                        case.options.keys(),
                    )
            else:
                status["pass"] += 1
        print(name, dict(status), dict(flags), dict(reasons), round(time.time() - start, 1))
