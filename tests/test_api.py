"""docs/api.md is made of the docstrings: `pytest tests/test_api.py --write-api` writes it."""

import inspect
import operator
import os
import re
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported

import pytest

import unilabel as ul
import unilabel.layers.keras
import unilabel.layers.torch

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# API

Every public function and class, with its formula, arguments, errors and an example. This page is made of the
docstrings, by `pytest tests/test_api.py --write-api`; `help(unilabel.softmax_nll)` shows the same.
"""
FUNCTIONS = (
    "multilabel_logistic_loss", "softmax_nll", "binary_cross_entropy", "cross_entropy", "nll",
    "linear_multilabel_logistic_loss", "linear_softmax_nll",
    "Positives", "Positives.from_csr",
    "value_and_grad", "grad_and_hess", "sigmoid", "log_sigmoid", "softmax", "log_softmax",
)  # fmt: skip
LAYERS = ("MultilabelLogisticLoss", "SoftmaxNLL", "LinearMultilabelLogisticLoss", "LinearSoftmaxNLL")
GROUPS = {
    "unilabel": [(f"unilabel.{name}", operator.attrgetter(name)(ul)) for name in FUNCTIONS],
    "unilabel.layers.torch": [(f"unilabel.layers.torch.{n}", getattr(unilabel.layers.torch, n)) for n in LAYERS],
    "unilabel.layers.keras": [(f"unilabel.layers.keras.{n}", getattr(unilabel.layers.keras, n)) for n in LAYERS],
}
SECTION = re.compile(r"(Args|Returns|Raises):\n")


def call(name, thing):
    """How it is called: names and defaults, without annotations."""
    signature = inspect.signature(thing)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    line = name + str(signature.replace(parameters=bare, return_annotation=signature.empty)).replace("'", '"')
    if len(line) <= 100:
        return line
    inside = line.removeprefix(name + "(").removesuffix(")")
    return f"{name}(\n    " + ",\n    ".join(re.split(r", (?=[a-z*])", inside)) + ",\n)"


def paragraph(text):
    """A paragraph of a docstring in Markdown."""
    if text.startswith(">>>"):
        return f"```python\n{text}\n```"
    section = SECTION.match(text)
    if not section:
        return text
    body = inspect.cleandoc(text[section.end() :])
    if section[1] == "Returns":
        return f"**Returns** {body}"
    items = re.sub(r"^(\w[\w, ]*): ", r"- `\1`: ", body, flags=re.MULTILINE).replace("\n    ", "\n  ")
    return f"**{section[1]}**\n\n{items}"


def markdown(docstring):
    return "\n\n".join(paragraph(text) for text in inspect.cleandoc(docstring).split("\n\n"))


def page():
    contents, entries = [], []
    for module, things in GROUPS.items():
        contents.append(f"**`{module}`**\n")
        for name, thing in things:
            first = inspect.cleandoc(thing.__doc__).partition("\n")[0]
            anchor = name.replace(".", "").lower()
            contents.append(f"- [`{name.rpartition('.')[2]}`](#{anchor}): {first}")
            entries.append(f"## {name}\n\n```python\n{call(name, thing)}\n```\n\n{markdown(thing.__doc__)}\n")
        contents.append("")
    return "\n".join([HEAD, *contents, *entries])


def test_page(request):
    if request.config.getoption("--write-api"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "docs/api.md is not what the docstrings say: pytest --write-api writes it"


def test_nothing_is_missing():
    assert sorted(name for name in FUNCTIONS if "." not in name) == sorted(ul.__all__)
    for name, thing in (entry for things in GROUPS.values() for entry in things):
        text = page().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"`[^`\n]*\b{parameter}\b[^`\n]*`", text.partition("\n```\n")[2]), (name, parameter)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">>> 1 + 1\n2", "```python\n>>> 1 + 1\n2\n```"),
        (
            "Args:\n    a, b: one,\n        or two.\n    c: three.",
            "**Args**\n\n- `a, b`: one,\n  or two.\n- `c`: three.",
        ),
        ("Returns:\n    What\n    it does.", "**Returns** What\nit does."),
        ("Note: this is `x`.", "Note: this is `x`."),
    ],
)
def test_paragraph(text, expected):
    assert paragraph(text) == expected
