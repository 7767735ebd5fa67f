"""Anybody's loss through the same cases: the frameworks' own, and a function named on the command line."""

import json
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
from test_conformance import command

OWN = """
import unilabel

def softmax_nll(logits, targets, *, axis=-1, reduction="mean"):
    return unilabel.softmax_nll(logits, targets, axis=axis, reduction=reduction)

def plain(logits, targets, *, reduction="mean"):
    return unilabel.softmax_nll(logits, targets, reduction=reduction) * 1.0001

def slow(logits, targets, *, reduction="mean"):
    import time
    time.sleep(60)
"""

# The command, but listening to SIGINT: a shell's background jobs, and so what they start, ignore it.
LISTENING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from unilabel.conformance import main
main()
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


# PEERS' failures, by the flags that they come under, on the frameworks that have them.
EVERYWHERE = {"confident", "offset", "excluded class", "infinite logit", "nothing takes part", "wrong index"}
KNOWN = {
    "numpy": EVERYWHERE,
    "torch": EVERYWHERE | {"soft saturated", "masked"},
    "jax": EVERYWHERE | {"second derivative"},
    "tensorflow": EVERYWHERE | {"zero logit", "unnormalised", "soft saturated"},
}


@pytest.mark.parametrize(
    "backend", [name if name == "torch" else pytest.param(name, marks=pytest.mark.full) for name in KNOWN]
)
def test_the_frameworks_own_losses(backend, tmp_path):
    families = [
        f"--case={name}" for name in ("confident", "zero", "infinite", "masked", "targets", "invalid", "shapes")
    ]
    file = tmp_path / "results.json"
    done = command(
        "conformance", "--subject", "native", "--backend", backend, "--dtype", "float32", *families, "--json", str(file)
    )
    assert done.returncode == 1
    (run,) = json.loads(file.read_text())["runs"]
    assert run["problem"] == ""
    failed = {flag for case in run["cases"] if case["status"] == "fail" for flag in case["flags"]}
    assert failed >= KNOWN[backend]
    assert f"native {backend}: offset: float32/confident/" in done.stdout
    assert "softmax_nll([[" in done.stdout  # the input, as one would write it
    for case in run["cases"]:  # what a framework does not have is neither passed nor failed
        if "sample_weight" in case["reason"] or "label_smoothing" in case["reason"]:
            assert case["status"] == "not applicable"


@pytest.mark.full
def test_half_precision_sums_of_the_frameworks(tmp_path):
    done = command("conformance", "--subject=native", "--backend=tensorflow", "--dtype=float16", "--case=*/sums/2")
    assert done.returncode == 1
    assert (
        "native tensorflow: half sum: float16/sums/2: value by the loss, element 0: 0.0, right is 0.474" in done.stdout
    )


@pytest.mark.full
def test_keras_computes_float64_in_float32():
    done = command("conformance", "--subject", "keras", "--dtype", "float64", "--case", "seed")
    assert done.returncode == 1
    assert "keras tensorflow: " in done.stdout
    assert "float32" in done.stdout


@pytest.mark.full
def test_somebodys_function(own):
    done = command(
        "conformance", "--subject", "own:softmax_nll", "--backend", "numpy", "--dtype", "float32", package=own
    )
    assert done.returncode == 0, done.stdout
    assert "not applicable" in done.stdout  # its other losses, and the options that it does not take
    done = command("conformance", "--subject", "own:plain", "--backend", "numpy", "--case", "seed", package=own)
    assert "0 pass" not in done.stdout
    assert "60 not applicable" in done.stdout or "30 not applicable" in done.stdout  # it claims to be no loss of ours
    named = ["--subject", "own:plain", "--loss", "softmax_nll", "--backend", "numpy", "--case", "seed"]
    done = command("conformance", *named, package=own)
    assert done.returncode == 1
    assert "own:plain numpy: " in done.stdout


@pytest.mark.parametrize("subject", ["nonsense", "own:missing", "no.such.module:f"])
def test_a_subject_that_is_not_there_is_a_wrong_call(own, subject):
    done = command("conformance", "--subject", subject, "--backend", "numpy", package=own)
    assert done.returncode == 2
    assert "is none of unilabel, native, keras, nor a package.module:function" in " ".join(done.stderr.split())


def test_one_that_hangs_is_ended(own):
    hung = ["--subject", "own:slow", "--loss", "softmax_nll", "--backend", "numpy", "--case", "float32/seed/2"]
    done = command("conformance", *hung, "--timeout", "3", "--subject", "unilabel", package=own)
    assert done.returncode == 1
    assert "own:slow numpy: no answer for 3 s" in done.stdout
    assert "numpy: 1 pass" in done.stdout


def test_interrupted_it_reports_what_there_is(own, tmp_path):
    file = tmp_path / "results.json"
    call = [
        "conformance",
        "--subject=unilabel",
        "--subject=own:slow",
        "--loss=softmax_nll",
        "--backend=numpy",
        "--case=seed",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, *call, "--json", str(file)],
        cwd=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(own), "PATH": ""},
    )  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("numpy: done"))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: " in output
    results = json.loads(file.read_text())
    assert results["interrupted"]
    assert {case["status"] for case in results["runs"][0]["cases"]} == {"pass"}
    assert "not run" in {case["status"] for case in results["runs"][1]["cases"]}


@pytest.mark.full
def test_saved_results_compare(own, tmp_path):
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    made = [("numpy", "unilabel"), ("array_api_strict", "unilabel"), ("numpy", "own:plain")]
    for file, (backend, subject) in zip(files, made, strict=True):
        command(
            "conformance", "--backend", backend, "--subject", subject, "--loss", "softmax_nll", "--case", "seed",
            "--json", file, package=own,
        )  # fmt: skip
    a, b, c = files
    assert command("conformance", "compare", a, a).returncode == 0
    same = command("conformance", "compare", a, b, "--ulp", "2")
    assert same.returncode == 0, same.stdout
    apart = command("conformance", "compare", a, c, "--ulp", "2")
    assert apart.returncode == 1, apart.stdout
    (tmp_path / "other.json").write_text("[]")
    assert command("conformance", "compare", a, str(tmp_path / "other.json")).returncode == 2


@pytest.mark.full
def test_junit(tmp_path):
    file = tmp_path / "junit.xml"
    command("conformance", "--subject=native", "--backend=torch", "--case=float32/seed/*", "--junit", str(file))
    (suite,) = ElementTree.parse(file).getroot()
    assert suite.get("name") == "native torch"
    assert int(suite.get("tests") or 0) == 15
    failures = suite.findall("testcase/failure")
    assert len(failures) == int(suite.get("failures") or 0) == 1
    assert "right is" in (failures[0].get("message") or "")
