"""The conformance suite as pytest tests, in other people's projects: pytest --pyargs unilabel.conformance"""

import re
import subprocess
import sys

import pytest

SUITE = ["--pyargs", "unilabel.conformance", "--backend", "numpy", "--dtype", "float32"]
THEIRS = """
import numpy

def loss(logits, targets):
    m = logits.max(-1, keepdims=True)
    log_p = logits - m - numpy.log(numpy.exp(logits - m).sum(-1, keepdims=True))
    if targets.ndim < logits.ndim:
        targets = numpy.eye(logits.shape[-1], dtype=logits.dtype)[targets]
    return -(targets * log_p).sum(-1).mean()
"""


def run_pytest(folder, *arguments):
    """pytest in a process of its own, in a folder; and how many tests passed, failed and were skipped."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    return done, *(counts.get(word, 0) for word in ("passed", "failed", "skipped"))


def test_unilabel_passes(tmp_path):
    done, passed, failed, skipped = run_pytest(tmp_path, *SUITE, "--case", "seed", "--case", "zero")
    assert done.returncode == 0, done.stdout
    assert passed > 25
    assert (failed, skipped) == (0, 0)


@pytest.mark.full
def test_native_fails_and_says_why(tmp_path):
    families = ["--case", "confident", "--case", "weighted"]
    done, passed, failed, skipped = run_pytest(tmp_path, *SUITE, "--subject", "native", "-v", *families)
    assert done.returncode == 1, done.stdout
    assert passed
    assert failed
    assert skipped
    assert re.search(r"test_case\[native-numpy-float32/confident/\d+\] FAILED", done.stdout)
    assert "value by the loss, element 0: -0.0, right is 4.1399" in done.stdout
    assert "ULP, allowed 5.0)" in done.stdout
    assert "softmax_nll([[17, 0], [0, 17], [-17, 0]], [0, 0, 1], reduction='none')" in done.stdout
    assert "confident: nearly all probability on one side" in done.stdout
    assert "takes no pos_weight" in run_pytest(tmp_path, *SUITE, "--subject", "native", "-rs", *families)[0].stdout


def test_in_the_tests_of_a_project(tmp_path):
    """Its loss is where its own tests find it, its pytest.ini names the suite, and its conftest.py has a --seed."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "theirs.py").write_text(THEIRS)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_own.py").write_text("def test_own():\n    pass\n")
    (tmp_path / "tests" / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--seed')\n")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = source\ntestpaths = tests unilabel.conformance\nfilterwarnings = error\naddopts = "
        "--pyargs --backend numpy --dtype float32 --case moderate --case infinite "
        "--subject theirs:loss --loss softmax_nll\n"
    )
    done, passed, failed, skipped = run_pytest(tmp_path, "-v", "-rs")
    assert done.returncode == 1, done.stdout
    assert re.search(r"tests/test_own.py::test_own PASSED", done.stdout)
    assert re.search(r"test_runs_to_its_end\[theirs:loss-numpy\] PASSED", done.stdout)
    assert re.search(r"test_case\[theirs:loss-numpy-float32/moderate/\d+\] PASSED", done.stdout)
    assert "value by the loss, element 0: nan, right is 0.0 (" in done.stdout
    assert "softmax_nll([[inf, 0, 1]], [[1, 0, 0]])" in done.stdout
    assert "theirs:loss claims to be softmax_nll" in done.stdout
    assert "takes no reduction" in done.stdout
    assert (passed > 5, failed, skipped > 10) == (True, 1, True)


def test_a_function_as_it_is(tmp_path):
    """In the working directory, with an order of its own, and no reduction."""
    (tmp_path / "theirs.py").write_text(
        "import numpy\n\ndef loss(labels, scores):\n"
        "    return (labels * numpy.logaddexp(0, -scores) + (1 - labels) * numpy.logaddexp(0, scores)).mean()\n"
    )
    way = ["--call", "f(targets, logits)", "--targets", "float", "--reduction", "mean"]
    named = ["--subject", "theirs:loss", "--loss", "multilabel_logistic_loss", "--case", "seed", "-rs"]
    done, passed, failed, skipped = run_pytest(tmp_path, *SUITE, *named, *way)
    assert done.returncode == 0, done.stdout
    assert (passed, failed, skipped) == (5, 0, 11)  # one of which says that it ran to its end
    assert "returns the mean, not none" in done.stdout
    done, *_ = run_pytest(tmp_path, *SUITE, *named, "--call", "f(targets)")
    assert done.returncode == 4
    assert "--call: expected a call such as" in done.stderr


def test_a_backend_that_dies_fails(tmp_path):
    (tmp_path / "mortal.py").write_text("import os, signal\n__version__ = '1'\nos.kill(os.getpid(), signal.SIGKILL)\n")
    arguments = ["-o", "pythonpath=.", "--pyargs", "unilabel.conformance", "--case", "seed", "--backend", "mortal"]
    done, passed, failed, skipped = run_pytest(tmp_path, *arguments)
    assert done.returncode == 1, done.stdout
    assert (passed, skipped) == (0, 0)
    assert failed > 25
    assert "exit code -9" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--subject", "no_such:loss"], "--subject: 'no_such:loss' is none of unilabel, native, keras, nor a package"),
        (["--backend", "no_such"], "--backend: 'no_such' is none of numpy, torch, jax, tensorflow, nor a module here"),
        (["--dtype", "float8"], "--dtype: 'float8' is none of float16, bfloat16, float32, float64"),
        (["--case", "nonsense"], "--case: no case matches 'nonsense'. Families: seed, "),
        (["--timeout", "nan"], "--timeout: expected a positive number of seconds, received nan"),
        (["--loss", "softmax"], "--loss: 'softmax' is none of multilabel_logistic_loss, softmax_nll, "),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_wrong_option_is_a_usage_error(tmp_path, arguments, text):
    done, *_ = run_pytest(tmp_path, "--pyargs", "unilabel.conformance", *arguments)
    assert done.returncode == 4, done.stdout
    assert text in done.stderr


def test_other_runs_do_not_have_the_options(tmp_path):
    assert "--subject" not in run_pytest(tmp_path, "--help")[0].stdout
    assert "--subject" in run_pytest(tmp_path, "--pyargs", "unilabel.conformance", "--help")[0].stdout


def test_the_command_does_not_import_pytest(tmp_path):
    code = "import sys, unilabel.conformance.cli, unilabel.conformance.worker; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
