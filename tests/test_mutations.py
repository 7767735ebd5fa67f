"""A few of the mutations, and that their check can fail. All of them: python tests/mutations.py"""

import mutations
import pytest
from mutations import BUGS, MUTATIONS, NOTHING, Mutation, failing

SEED = NOTHING._replace(arguments=("--case", "seed", *NOTHING.arguments))
pytestmark = pytest.mark.full
FEW = {
    "logistic: log1p written out": "confident",
    "softmax: ties": "zero",
    "softmax: gradient as p - z": "confident",
    "clamp: at eps too": "probabilities",
    "elementwise: a masked logit leaks": "masked",
    "distribution: sample_weight not in the divisor": "weighted",
    "half: rounded before the sum": "moderate",
}


@pytest.mark.parametrize("name", FEW)
def test_caught(name, tmp_path):
    mutation = MUTATIONS[name]
    mutation = mutation._replace(arguments=(*mutation.arguments, "--case", FEW[name]))
    assert failing(mutation, tmp_path) == [FEW[name]]


def test_nothing_fails_without_a_mutation(tmp_path, capsys):
    assert failing(NOTHING, tmp_path) == []
    assert mutations.check("none", SEED)
    # Where nothing is wrong, nothing is caught: a mutation that changes no result is reported.
    assert not mutations.check("same", SEED._replace(wrong="import math  # the same\n"))
    assert "SURVIVED  same: no case" in capsys.readouterr().out


@pytest.mark.parametrize(("right", "times"), [("no such text", 0), ("xp.where(", "[1-9][0-9]+")])
def test_text_that_is_not_there_once(right, times, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"expected once in formulas/softmax.py, found {times} times"):
        failing(NOTHING._replace(right=right), tmp_path)
    assert not mutations.check("gone", NOTHING._replace(right=right))
    assert "BROKEN    gone: expected once" in capsys.readouterr().out


def test_a_formula_that_does_not_run_is_not_caught(tmp_path):
    with pytest.raises(RuntimeError, match="NameError"):
        failing(Mutation("formulas/logistic.py", "xp.log1p(t.e)", "no_such_name", SEED.arguments), tmp_path)


def test_every_text_is_in_its_file_once():
    assert len(MUTATIONS) == sum(map(len, BUGS.values()))  # no name twice
    for mutation in MUTATIONS.values():
        text = (mutations.ROOT / "unilabel" / mutation.file).read_text()
        assert mutations.mutate(text, mutation) != text


def test_unknown_name(capsys):
    assert mutations.main(["nonsense"]) == 2
    assert "no mutation nonsense. Known: logistic: " in capsys.readouterr().out
