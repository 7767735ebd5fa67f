"""The command: what it prints, how it ends, and that it sees a planted bug."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from unilabel.conformance import runner
from unilabel.conformance.cli import main
from unilabel.conformance.modes import MODES

ROOT = Path(__file__).parent.parent


def command(*arguments, package=None):
    """`unilabel ARGUMENTS` in a process of its own, of the installed package or of one in a folder."""
    environment = os.environ | ({} if package is None else {"PYTHONPATH": str(package)})
    return subprocess.run(
        [sys.executable, "-m", "unilabel.conformance", *arguments],
        cwd=package or ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.full
def test_all_match(framework):
    done = command(
        "conformance", "--backend", framework.name, "--dtype", "float32", "--case", "seed", "--case", "infinite"
    )
    assert done.returncode == 0, done.stdout
    assert f"cases on {framework.name}: all match the oracle" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("device", ["device1", "no_float64", "no_x64"])
def test_every_device_of_the_strict_namespace(device):
    done = command("conformance", "--backend", "array_api_strict", "--device", device, "--dtype", "float32")
    assert done.returncode == 0, done.stdout


@pytest.mark.full
def test_modes(recorder):
    """Traced and compiled, every way to have a number; here of a few cases."""
    cases = ("float32/seed/1", "float32/confident/38", "float32/masked/5", "float32/invalid/4")
    chosen = [argument for case in cases for argument in ("--case", case)]
    modes = [argument for mode, backends in MODES.items() if recorder.name in backends for argument in ("--mode", mode)]
    assert modes
    done = command("conformance", "--backend", recorder.name, "--dtype", "float32", *modes, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"4 cases on {recorder.name} " in done.stdout


def test_a_mode_that_a_backend_does_not_have():
    done = command("conformance", "--backend", "numpy", "--mode", "graph")
    assert done.returncode == 2
    assert "numpy has no graph mode" in done.stderr


BUGS = {  # each in its file, and the cases that show it
    "sign": ("formulas/logistic.py", "(t.nonneg - positive) + minor", "(t.nonneg - positive) - minor", "seed"),
    "clamp": ("formulas/probabilities.py", "clamped = p < eps", "clamped = p < 2 * eps", "probabilities"),
    "gradient at 0": ("formulas/logistic.py", "minor = (1 -", "minor = (t.x != 0) * (1 -", "zero"),
    "mean for sum": (
        "formulas/reduce.py",
        'options.reduction not in ("mean", "batchmean")',
        'options.reduction == "none"',
        "seed",
    ),
    "sum for mean": (
        "formulas/reduce.py",
        "return xp.sum(values) if divisor is None else xp.sum(values) / divisor",
        "return xp.sum(values)",
        "seed",
    ),
    "digits": ("formulas/softmax.py", "xp.log1p(t.rest + (t.e_y - 1))", "xp.log(t.rest + t.e_y)", "confident"),
    "mask": (
        "formulas/targets.py",
        "None if options.ignore_index is None else index != options.ignore_index",
        "None if options.ignore_index is None else index == options.ignore_index",
        "masked",
    ),
    "infinity": (
        "namespace.py",
        "self.where(self.logical_and(weight == 0, self.isinf(size)), 0.0, size)",
        "size",
        "infinite",
    ),
}


@pytest.mark.parametrize("bug", [bug if bug == "sign" else pytest.param(bug, marks=pytest.mark.full) for bug in BUGS])
def test_planted_bug(tmp_path, bug):
    """A bug in a formula makes the command exit with 1 and name the case."""
    file, right, wrong, family = BUGS[bug]
    for folder, place in {"unilabel": "", "backends": "backends", "conformance": "conformance"}.items():
        shutil.copytree(ROOT / folder, tmp_path / "unilabel" / place, dirs_exist_ok=True)
    formulas = tmp_path / "unilabel" / file
    text = formulas.read_text()
    assert right in text
    formulas.write_text(text.replace(right, wrong))
    done = command("conformance", "--backend", "numpy", "--case", family, package=tmp_path)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"│ {family} .* fail ✗", done.stdout), done.stdout
    assert "numpy: " in done.stdout
    assert ": float32/" in done.stdout
    assert "NOT all match the oracle" in done.stdout


def test_json(tmp_path):
    file = tmp_path / "results.json"
    done = command("conformance", "--backend", "numpy", "--case", "float64/seed/1", "--seed", "7", "--json", str(file))
    assert done.returncode == 0, done.stdout
    results = json.loads(file.read_text())
    assert (results["seed"], results["dtypes"], results["passed"]) == (7, ["float32", "float64"], True)
    (backend,) = results["runs"]
    assert (backend["backend"], backend["device"]) == ("numpy", "cpu")
    (case,) = backend["cases"]
    assert (case["id"], case["status"]) == ("float64/seed/1", "pass")
    value = case["numbers"]["value"]["the loss"]
    assert [round(float.fromhex(x), 4) for x in value] == [0.6444, 0.5981, 0.6931, 0.9130, 0.6444, 0.5544]


def test_same_seed_same_cases():
    from unilabel.conformance.cases import cases

    assert cases(("float32",), 3) == cases(("float32",), 3)
    assert cases(("float32",), 3) != cases(("float32",), 4)
    identities = [case.id for case in cases(("float16", "bfloat16", "float32", "float64"), 0)]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "numbers_"], "'numbers_' is none of numpy, torch, jax, tensorflow, nor a module here"),
        (["--dtype", "float8"], "'float8' is not one of 'float16', 'bfloat16', 'float32', 'float64'"),
        (["--backend", "numpy.linalg"], "'numpy.linalg' is none of numpy, torch, jax, tensorflow, nor a module here"),
        (["--backend", "no_such.module"], "'no_such.module' is none of"),
        (["--backend", ""], "'' is none of"),
        (["--subject", "no_such:my_loss"], "nor a package.module:function here (no module named 'no_such', "),
        (["--subject", ".m:f"], "nor a package.module:function here (expected package.module:function)"),
        (["--subject", "json:"], "nor a package.module:function here (expected package.module:function)"),
        (["--subject", "json:dumps"], "Say which it is: one of multilabel_logistic_loss, softmax_nll, "),
        (["--loss", "softmax"], "'softmax' is none of multilabel_logistic_loss, softmax_nll, "),
        (["--case", "nonsense"], "no case matches 'nonsense'. Families: seed, "),
        (["--case", "large"], "positives, large (with --full)."),
        (["--seed", "one"], "'one' is not a valid integer"),
        *(
            (["--timeout", x], f"expected a positive number of seconds, received {x}.")
            for x in ("0", "-1", "nan", "inf")
        ),
        (["--jobs", "0"], "expected 1 or more processes, received 0"),
        (["--json", "no/such/folder/results.json"], "there is no folder"),
        (["--json", ""], "cannot be written: Is a directory"),
        (["--junit", "/proc/junit.xml"], "'/proc/junit.xml' cannot be written: "),
        (["--html", f"{'long' * 99}.html"], "cannot be written: File name too long"),
        (["--json", "same", "--html", "../tests/same"], "expected a file for each report; received the same one twice"),
        (["--quick"], "No such option"),
    ],
)
def test_wrong_call_exits_with_2(arguments, text, monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    before = set(os.listdir())
    result = CliRunner().invoke(main, ["conformance", *arguments], terminal_width=200)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert text in result.output
    assert set(os.listdir()) == before


def test_what_is_asked_for_twice_runs_once(tmp_path):
    """And a report may be a pipe."""
    twice = ["--backend=numpy", "--dtype=float32", "--case=float32/seed/1", "--subject=unilabel", "--mode=eager"] * 2
    done = command("conformance", *twice, "--json", "/dev/stdout")
    assert done.returncode == 0
    assert "numpy: 1 pass" in done.stdout
    found = json.loads("{" + done.stdout.partition("\n{")[2].partition("\n}")[0] + "}")
    assert (found["dtypes"], len(found["runs"]), len(found["runs"][0]["cases"])) == (["float32"], 1, 1)


def test_backend_asked_for_and_missing_is_a_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # find_spec and import find none, here and nowhere else
    monkeypatch.setenv("PYTHONPATH", "")
    result = CliRunner().invoke(main, ["conformance", "--backend", "torch", "--case", "seed"])
    assert result.exit_code == 1
    assert "not installed: pip install 'unilabel[torch]'" in result.output


def test_device_that_is_not_there_is_a_failure():
    done = command("conformance", "--backend", "numpy", "--device", "cuda", "--case", "seed")
    assert done.returncode == 1
    assert "numpy: ValueError: Expected a device of numpy: cpu. Received: cuda." in done.stdout


def test_a_backend_that_dies_is_a_line_in_the_report(tmp_path):
    (tmp_path / "mortal.py").write_text("import os, signal\n__version__ = '1'\nos.kill(os.getpid(), signal.SIGKILL)\n")
    done = command("conformance", "--backend", "mortal", "--backend", "numpy", "--case", "seed", package=tmp_path)
    assert done.returncode == 1
    assert "exit code -9" in done.stdout
    assert "not run" in done.stdout
    assert "numpy: 30 pass" in done.stdout


def test_backends_lists_what_is_here_and_how_to_get_the_rest(monkeypatch):
    monkeypatch.setattr(runner, "is_installed", lambda name: name == "numpy")
    result = CliRunner().invoke(main, ["backends"])
    assert result.exit_code == 0
    assert "cpu" in result.output
    assert "pip install 'unilabel[jax]'" in result.output


def test_backends_lists_registered_ones(monkeypatch, tmp_path):
    """One that does not load is a line, and not the end."""
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    registered = (
        "[unilabel.backends]\nbroken_one = broken_module\nmissing_one = no_such_module\ntheir_one = their_module\n"
    )
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text(registered)
    (tmp_path / "broken_module.py").write_text("import sys\nsys.exit('I am broken')\n")
    (tmp_path / "their_module.py").write_text(
        "from unilabel.backend import Backend\n"
        "class Theirs(Backend):\n    version = lambda self: '7.8.9'\n    devices = lambda self: ['their device']\n"
        "backend = Theirs()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "is_installed", lambda name: name == "numpy")
    result = CliRunner().invoke(main, ["backends"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    lines = {line.split()[1]: line for line in result.output.splitlines() if line.startswith("│")}
    assert "does not load" in lines["broken_one"]
    assert "I am broken" in lines["broken_one"]
    assert "No module named 'no_such_module'" in lines["missing_one"]
    assert "7.8.9" in lines["their_one"]
    assert "their device" in lines["their_one"]
    assert "not installed" in lines["torch"]


def test_command_without_its_needs_says_what_to_install(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module named rich', name='rich')")
    done = command("backends", package=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "The command needs rich: pip install 'unilabel[conformance]'\n"
