"""Functions of other projects as they are: their own order and names, targets and reductions."""

import json
import re
import shlex
import sys
import types
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from shared import asked_for
from unilabel.conformance.calls import Way
from unilabel.conformance.cases import cases
from unilabel.conformance.cli import main
from unilabel.conformance.oracle import expected
from unilabel.conformance.tolerances import judge
from unilabel.conformance.worker import answer

import unilabel as ul

DOCUMENT = (Path(__file__).parent.parent / "docs" / "conformance.md").read_text(encoding="utf-8")


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


FAMILIES = ("seed", "confident", "zero", "infinite", "masked", "targets", "shapes", "smoothed", "probabilities")
FAMILIES += ("linear", "linear_limits")
# By function: the options it takes, and PEERS' failures that it has, by flag.
THEIRS = {
    "torch.nn.functional:cross_entropy": (
        {"weight", "ignore_index", "label_smoothing"},
        {"confident", "soft saturated", "offset", "excluded class", "infinite logit", "masked", "nothing takes part"},
    ),
    "torch.nn.functional:linear_cross_entropy": (
        {"linear_bias", "weight", "ignore_index", "label_smoothing"},
        {"confident", "infinite logit", "nothing takes part", "wrong index"},
    ),
    "optax:softmax_cross_entropy_with_integer_labels": ({"where"}, {"confident", "offset", "infinite logit"}),
    "optax:sigmoid_binary_cross_entropy": (set(), {"second derivative", "infinite logit"}),
    "keras.losses:binary_crossentropy": ({"label_smoothing"}, {"infinite logit", "nothing takes part"}),
    "keras.losses:sparse_categorical_crossentropy": ({"ignore_index"}, {"confident", "offset", "infinite logit"}),
    "tensorflow.nn:sigmoid_cross_entropy_with_logits": (set(), {"soft saturated", "infinite logit"}),
    "sklearn.metrics:log_loss": ({"sample_weight"}, set()),
}


def applies(name, case):
    """Whether a function takes a case, from its documentation."""
    options = case.options.keys() - {"reduction", "axis"}
    is_index, axis = len(case.targets.shape) < len(case.logits.shape), case.options.get("axis", -1)
    is_float = any(isinstance(z, float) for z in case.targets.values)
    last = axis in (-1, len(case.logits.shape) - 1)
    kind = {
        "torch.nn.functional:cross_entropy": axis == 1 or (last and len(case.logits.shape) < 3),
        "torch.nn.functional:linear_cross_entropy": True,
        "optax:softmax_cross_entropy_with_integer_labels": is_index,
        "keras.losses:binary_crossentropy": case.logits.shape and last and case.options.get("reduction") != "none",
        "keras.losses:sparse_categorical_crossentropy": is_index and last,
        "sklearn.metrics:log_loss": is_index and case.options.get("reduction") != "none",
    }.get(name, not is_index or not is_float)
    return bool(kind) and options <= THEIRS[name][0]


def one_of_each_kind(loss, backend):
    """A case of each kind; all that are confident, where that is fast."""
    kinds = {}
    for case in cases(("float32",), 0):
        if case.family in FAMILIES and case.loss == loss:
            shapes = case.logits.shape, case.targets.shape, *map(type, case.targets.values[:1])
            other = case.id if case.family == "confident" and backend != "jax" else case.flags
            kinds[other, shapes, *case.options, case.options.get("reduction")] = case
    return kinds.values()


def test_each_is_documented():
    assert documented().keys() == THEIRS.keys()


@pytest.mark.parametrize(
    "name",
    [name if "torch" in name or "sklearn" in name else pytest.param(name, marks=pytest.mark.full) for name in THEIRS],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of scikit-learn's and JAX's own
def test_functions_of_other_projects(name, request):
    """From the documented line: which cases run, and that their known failures are found."""
    backend_name, subject, loss, way = parsed(documented()[name])
    backend = asked_for(backend_name, request)
    ran, applied, flags = set(), set(), set()
    for case in one_of_each_kind(loss, backend_name):
        if applies(name, case):
            applied.add(case.id)
        found = answer(backend, backend.devices()[0], case, subject, loss, "eager", way)
        if "not applicable" in found:
            assert found["not applicable"]
            continue
        ran.add(case.id)
        verdicts = {} if "error" in found else judge(case, expected(case), found["numbers"], backend_name)
        if "error" in found or any(verdict.failed for verdict in verdicts.values()):
            flags.update(case.flags)
    assert ran == applied
    assert len(ran) > 2
    assert flags >= THEIRS[name][1]
    assert "zero logit" not in flags  # where none of them is wrong


# --- What a function returns ------------------------------------------------------------------------------------------


def own(framework, monkeypatch, function):
    """The function as the module own_subject's, and the backend with its first device."""
    module = types.ModuleType("own_subject")
    module.loss = function
    monkeypatch.setitem(sys.modules, "own_subject", module)
    return framework.backend, framework.backend.devices()[0]


def judged(backend, device, case, way, loss=None):
    """'pass', 'fail', or why it is not applicable."""
    found = answer(backend, device, case, "own_subject:loss", loss or case.loss, "eager", way)
    if "not applicable" in found:
        return found["not applicable"]
    assert "error" not in found, found
    verdicts = judge(case, expected(case), found["numbers"], backend.name)
    return "fail" if any(verdict.failed for verdict in verdicts.values()) else "pass"


def few(loss):
    chosen = [case for case in cases(("float32",), 0) if case.family in ("seed", "moderate") and case.loss == loss]
    return [case for case in chosen if len(case.logits.values) < 60]


@pytest.mark.parametrize("loss", ["multilabel_logistic_loss", "softmax_nll"])
@pytest.mark.parametrize("returned", ["none", "sum", "mean", "batchmean", "classmean"])
def test_whatever_it_returns_each_reduction_is_compared(returned, loss, framework, monkeypatch):
    if returned == "classmean" and loss == "softmax_nll":
        return  # refused, see below
    xp = framework.backend.namespace(framework.array([0.0]))

    def function(y, x):
        if returned == "classmean":
            return xp.sum(ul.multilabel_logistic_loss(x, y, reduction="none"), axis=-1) / x.shape[-1]
        return getattr(ul, loss)(x, y, reduction=returned)

    backend, device = own(framework, monkeypatch, function)
    way = Way("f(targets, logits)", returned)
    reductions = Counter()
    for case in few(loss):
        reduction = case.options.get("reduction", "default")
        result = judged(backend, device, case, way)
        if reduction == "none" and returned != "none":
            assert result == f"returns the {returned}, not none"
        else:
            assert result == "pass", case
            reductions[reduction] += 1
    assert reductions.keys() >= {"sum", "mean", "batchmean", "default"}
    other = Way("f(targets, logits)", "sum" if returned != "sum" else "mean")  # and it fails if that is not so
    if returned not in ("none", "classmean"):
        assert "fail" in {judged(backend, device, case, other) for case in few(loss)}


def test_a_mean_is_over_what_takes_part(framework, monkeypatch):
    """Of losses that are not reduced: over what `where` keeps, and what is not ignored."""
    for loss, options in (("multilabel_logistic_loss", {"where"}), ("softmax_nll", {"where", "ignore_index"})):
        backend, device = own(
            framework, monkeypatch, lambda x, y, loss=loss, **given: getattr(ul, loss)(x, y, reduction="none", **given)
        )
        passed = Counter()
        for case in cases(("float32",), 0):
            if case.family == "masked" and case.loss == loss and case.options.keys() <= {*options, "reduction"}:
                way = Way(f"f(logits, targets, {', '.join(f'{name}={name}' for name in sorted(options))})", "none")
                assert judged(backend, device, case, way) == "pass", case
                passed[case.options.get("reduction")] += 1
        assert passed["mean"] > 2


def test_a_function_that_takes_a_reduction_is_asked_for_a_sum_in_place_of_a_batchmean(framework, monkeypatch):
    asked = set()

    def function(x, y, how):
        asked.add(how)
        return ul.softmax_nll(x, y, reduction=how)

    backend, device = own(framework, monkeypatch, function)
    for case in few("softmax_nll"):
        assert judged(backend, device, case, Way("f(logits, targets, how=reduction)")) == "pass"
    assert asked == {"none", "sum", "mean"}


@pytest.mark.parametrize("kinds", [("int64",), ("float",), ("onehot",), ("int64", "float"), ("onehot", "float")])
def test_targets_are_what_it_takes(kinds, framework, monkeypatch):
    taken = set()

    def function(x, y):
        kind = framework.backend.dtype(y)
        taken.add((kind, len(y.shape) == len(x.shape)))
        return ul.softmax_nll(x, y, reduction="mean")

    backend, device = own(framework, monkeypatch, function)
    results = Counter(
        judged(backend, device, case, Way(reduction="mean", targets=kinds)) for case in few("softmax_nll")
    )
    assert results.keys() <= {"pass", "returns the mean, not none", "takes no class indices", "takes no float targets"}
    assert results["pass"] > 2
    integers = "int64" if framework.name != "jax" or taken & {("int64", False)} else "int32"  # JAX's, without its x64
    wanted = {"int64": {(integers, False)}, "float": {("float32", True)}, "onehot": {("float32", True)}}
    assert taken == set().union(*(wanted[kind] for kind in kinds))


def test_indices_of_labels_are_for_who_takes_them(framework, monkeypatch):
    """As they are, padded with -1; whoever does not say so is never given them."""
    losses = "multilabel_logistic_loss", "linear_multilabel_logistic_loss"
    chosen = [case for case in cases(("float32",), 0) if case.family in ("seed", "positives") and case.loss in losses]

    def function(*operands, **options):
        *first, y = operands
        return (ul.linear_multilabel_logistic_loss if len(first) > 1 else ul.multilabel_logistic_loss)(
            *first, ul.Positives(y), **options
        )

    backend, device = own(framework, monkeypatch, function)
    for case in chosen:
        result = judged(backend, device, case, Way(targets=("positives",)))
        assert result == ("pass" if case.positives else "takes no labels that are 0 or 1"), case
        for way in (Way(), Way(targets=("int64", "float"))):
            if case.positives:
                assert judged(backend, device, case, way) == "takes no indices of labels, padded with -1"


def test_what_is_not_applicable(framework, monkeypatch):
    backend, device = own(framework, monkeypatch, lambda x, y: ul.softmax_nll(x, y, reduction="none"))
    found = {}
    for case in cases(("float32", "float16") if framework.name != "array_api_strict" else ("float32",), 0):
        if case.family in ("seed", "shapes", "invalid", "weighted") and case.loss == "softmax_nll":
            found.setdefault(judged(backend, device, case, Way(reduction="none", targets=("onehot",))), case)
    assert found.keys() >= {
        "takes no weight",
        "takes no float targets",
        "has its class axis at -1",
        "takes one-hot rows, and a class index out of range has none",
    }
    if framework.name != "array_api_strict":
        assert found["in float16 the losses would be rounded before they are added up"].dtype == "float16"


# --- The command ------------------------------------------------------------------------------------------------------


def run_command(*arguments):
    return CliRunner().invoke(main, ["conformance", "--backend", "numpy", *arguments], terminal_width=400)


LOG_LOSS = ["--subject", "sklearn.metrics:log_loss", "--loss", "cross_entropy"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--call", "f(probs, targets"],
            '--call: expected a call such as "f(probs, targets, reduction=reduction)", of ',
        ),
        (["--call", "f(probs, targets"], "received 'f(probs, targets': '(' was never closed"),
        (["--call", "g(probs, targets)"], "it is no call of f"),
        (["--call", "f(probs, targets).sum()"], "it is no call of f"),
        (["--call", "f(logits, targets)"], "cross_entropy has no logits"),
        (["--call", "f(probs, targets, w=pos_weight)"], "cross_entropy has no pos_weight"),
        (["--call", "f(probs, targets, w=-weight)"], "'-weight' is neither a name of these nor a literal"),
        (
            ["--call", "f(probs, targets, __import__('os'))"],
            "\"__import__('os')\" is neither a name of these nor a literal",
        ),
        (["--call", "f(probs, targets, weight)"], "weight is no keyword, so that it could not be left out"),
        (["--call", "f(probs, **targets)"], "it has a **, or"),
        (["--call", "f(probs)"], "it has no targets"),
        (["--loss", "linear_softmax_nll", "--call", "f(features, targets)"], "it has no linear_weight"),
        (["--loss", "linear_softmax_nll", "--call", "f(logits, targets)"], "linear_softmax_nll has no logits"),
        (["--call", "f(probs, targets, reduction=reduction)", "--reduction", "none"], "expected one of both"),
        (["--call", "f(probs, targets, axis=axis)", "--axis", "1"], "expected one of both"),
        (["--reduction", "classmean"], "is one number for all classes of an example, and has no classmean"),
        (["--reduction", "max"], "'max' is not one of 'none', 'sum', 'mean', 'batchmean', 'classmean'"),
        (["--targets", "int8"], "'int8' is not one of 'int64', 'float', 'onehot'"),
    ],
)
def test_a_wrong_way_to_call_it_exits_with_2(arguments, text):
    result = run_command(*LOG_LOSS, *arguments)
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.output.split())


def test_a_way_to_call_nothing():
    result = run_command("--call", "f(logits, targets)")
    assert result.exit_code == 2
    assert "expected a package.module:function beside --call" in " ".join(result.output.split())


def test_each_report_counts_what_is_not_applicable(tmp_path):
    """By reason; and says that there were values only."""
    files = [tmp_path / f"results.{kind}" for kind in ("json", "xml", "html")]
    written = [
        argument
        for flag, file in zip(("--json", "--junit", "--html"), files, strict=True)
        for argument in (flag, str(file))
    ]
    result = run_command(
        *documented()["sklearn.metrics:log_loss"][4:], "--dtype", "float32", "--case", "probabilities", *written
    )
    assert result.exit_code == 0, result.output
    (run,) = json.loads(files[0].read_text())["runs"]
    counts = Counter(case["reason"] for case in run["cases"] if case["status"] == "not applicable")
    assert len(counts) > 4
    ran = len(run["cases"]) - counts.total()
    assert f"{ran} pass, {counts.total()} not applicable (values only: there is no gradient)" in result.output
    (suite,) = ElementTree.parse(files[1]).getroot()
    listed = {item.get("name"): int(item.get("value")) for item in suite.iter("property")}
    page = files[2].read_text()
    assert f"{counts.total()} answers are not applicable" in page
    assert "Only values were compared" in page
    for reason, count in counts.items():
        assert f"    {count} not applicable: {reason}" in result.output
        assert listed[f"not applicable: {reason}"] == count
        assert f"<li>{count}: {reason}</li>" in page


def test_the_example_of_a_workflow(tmp_path, monkeypatch):
    """Another project's loss, from the working directory, by the command of the documentation."""
    code, workflow = re.search(
        r"`mylib/losses.py`.*?```python\n(.*?)```.*?```yaml\n(.*?)```", DOCUMENT, re.DOTALL
    ).groups()
    command = shlex.split(re.search(r"unilabel (conformance .*?)\n- ", workflow, re.DOTALL)[1])
    (tmp_path / "mylib").mkdir()
    (tmp_path / "mylib" / "losses.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "conformance.xml").exists()
    (tmp_path / "mylib" / "losses.py").write_text(code.replace("losses.mean()", "losses.sum()"))
    assert CliRunner().invoke(main, command).exit_code == 1
