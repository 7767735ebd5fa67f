"""Value, gradient and Hessian diagonal of each loss, once, in pure array API: what unilabel exists for.

Each family of losses has a module: logistic.py, softmax.py, probabilities.py. Every function takes the array namespace
`xp` first and has the class axis last. A loss is computed in three steps:

    target weights             how much of the loss each class carries, whatever the kind of targets (targets.py)
    terms                      what value, gradient and Hessian have in common (the exponentials)
    value, gradient, hessian   closed forms, which reduce.py reduces

linear.py computes a loss of the logits that the last linear layer makes, a block of them at a time.
A loss has several forms of these (types.py): for any namespace, for autodiff, with a framework's native functions.
"""

from ..namespace import Array, Namespace
from .linear import (
    NOTHING,
    Linear,
    Parts,
    Rows,
    Shared,
    Totals,
    block,
    block_gradients,
    by_row,
    cut,
    directly,
    expression,
    gradients,
    in_blocks,
    most_rows,
    reduced,
    rounded,
    rows_of_blocks,
    scaled,
    taking_part,
)
from .logistic import log_sigmoid, sigmoid
from .reduce import (
    activation,
    count_alike,
    counted,
    counts,
    form_of,
    gradient,
    gradient_and_hessian,
    gradient_of,
    jvp,
    or_infinity,
    prepare,
    unreduced_gradient,
    value,
    value_and_gradient,
    value_of,
    working,
)
from .softmax import log_softmax, softmax
from .types import Form, Loss, Operands, Options, Reduction

__all__ = [
    "NOTHING",
    "Array",
    "Form",
    "Linear",
    "Loss",
    "Namespace",
    "Operands",
    "Options",
    "Parts",
    "Reduction",
    "Rows",
    "Shared",
    "Totals",
    "activation",
    "block",
    "block_gradients",
    "by_row",
    "count_alike",
    "counted",
    "counts",
    "cut",
    "directly",
    "expression",
    "form_of",
    "gradient",
    "gradient_and_hessian",
    "gradient_of",
    "gradients",
    "in_blocks",
    "jvp",
    "log_sigmoid",
    "log_softmax",
    "most_rows",
    "or_infinity",
    "prepare",
    "reduced",
    "rounded",
    "rows_of_blocks",
    "scaled",
    "sigmoid",
    "softmax",
    "taking_part",
    "unreduced_gradient",
    "value",
    "value_and_gradient",
    "value_of",
    "working",
]
