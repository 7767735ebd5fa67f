"""examples/extreme.py: what it reads, what predictions are worth, and that each framework trains the same model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from shared import asked_for, pattern
from sklearn.datasets import load_svmlight_file
from sklearn.metrics import precision_score

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))
import extreme  # noqa: E402
import extreme_data  # noqa: E402

TEXT = "5 6 9\n3,1 0:1 5:0.5\n 2:2.0\n8 \n\n7,7,0 1:1e1 1:-2 4:0 3:-8\n"


@pytest.fixture(scope="module")
def data():
    return extreme_data.made_up(0, examples=600, words=50, labels=40)


# --- The file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), TEXT.rstrip("\n"), TEXT + "\n \n"])
def test_read(text, tmp_path):
    """Examples without labels, without words and without both; a label or a word twice; blank lines after the last."""
    file = tmp_path / "data.txt"
    file.write_bytes(text.encode())
    words, labels = extreme_data.read(file)
    right = [[2 / 3, 0, 0, 0, 0, 1 / 3], [0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6, [0, 0.5, 0, -0.5, 0, 0]]
    np.testing.assert_array_equal(words.toarray(), np.float32(right))
    assert [np.flatnonzero(row).tolist() for row in labels.toarray()] == [[1, 3], [], [8], [], [0, 7]]
    assert (words.dtype, labels.dtype) == ("float32", bool)


def test_it_reads_what_scikit_learn_reads(data, tmp_path):
    """Which has no header, and no example without words."""
    lines = [
        ",".join(map(str, labels)) + " " + " ".join(f"{word}:{word + 0.25}" for word in words)
        for labels, words in zip(
            np.split(data.labels.indices, data.labels.indptr[1:-1]),
            np.split(data.words.indices, data.words.indptr[1:-1]),
            strict=True,
        )
        if len(words)
    ]
    file, body = tmp_path / "data.txt", tmp_path / "body.txt"
    body.write_text("\n".join(lines))
    file.write_text(f"{len(lines)} 50 40\n" + "\n".join(lines))
    found = extreme_data.read(file)
    words, labels = load_svmlight_file(body, n_features=50, multilabel=True, zero_based=True)
    words = words.toarray() / words.sum(axis=1)
    np.testing.assert_allclose(found.words.toarray(), np.asarray(words), rtol=1e-6)
    assert [tuple(np.flatnonzero(row)) for row in found.labels.toarray()] == labels


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("", 1, "expected 'examples words labels'; received ''"),
        ("5 6\n", 1, "expected 'examples words labels'; received '5 6'"),
        ("3,1 0:1 5:0.5\n", 1, "expected the number of examples, a whole number below 2147483648; received '3,1'"),
        (
            "5 6 2147483648\n",
            1,
            "expected the number of labels, a whole number below 2147483648; received '2147483648'",
        ),
        ("-5 6 9\n", 1, "expected the number of examples, a whole number below 2147483648; received '-5'"),
        (TEXT.replace("3,1", "3,9"), 2, "expected a label, a whole number below 9; received '9'"),
        (TEXT.replace("3,1", "3,-1"), 2, "expected a label, a whole number below 9; received '-1'"),
        (TEXT.replace("3,1", "3,,1"), 2, "expected a label, a whole number below 9; received ''"),
        (TEXT.replace("3,1", "3,1_0"), 2, "expected a label, a whole number below 9; received '1_0'"),
        (TEXT.replace("3,1", "3,²"), 2, "expected a label, a whole number below 9; received '²'"),
        (
            TEXT.replace(" 2:2", "2:2"),
            3,
            ".*; the line of an example without labels begins with a blank; received '2:2.0'",
        ),
        (TEXT.replace("2:2", "6:2"), 3, "expected a word, a whole number below 6; received '6'"),
        (TEXT.replace("2:2.0", "2"), 3, "expected a word and its value, as 7:0.5; received the value ''"),
        (TEXT.replace("2:2.0", "2:2:0"), 3, "expected a word and its value, as 7:0.5; received the value '2:0'"),
        (TEXT.replace("2:2.0", "2:nan"), 3, "expected a word and its value, as 7:0.5; received the value 'nan'"),
        (TEXT.replace("2:2.0", "2:1e39"), 3, "expected a word and its value, as 7:0.5; received the value '1e39'"),
        (TEXT.replace("5 6 9", "6 6 9"), 6, "expected 6 examples; received the end after 5"),
        (TEXT.replace("5 6 9", "4 6 9"), 6, "expected the end, after 4 examples; received '7,7,0 1:1e1 "),
    ],
)
def test_what_is_wrong_with_a_line(text, line, why, tmp_path):
    file = tmp_path / "data.txt"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=pattern(f"data.txt, line {line}: {why}")):
        extreme_data.read(file)


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "data.txt"
    file.write_bytes(b"2 3 4\n1 0:1\n\xff 0:1\n")
    with pytest.raises(ValueError, match=r"line 3: expected a label, a whole number below 4; received '\\\\xff'"):
        extreme_data.read(file)


# --- The measures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(data):
    """Five labels for each example, in an order that is right more often than not."""
    noise = np.random.default_rng(1).random(data.labels.shape)
    return np.argsort(-noise - 0.6 * data.labels.toarray(), axis=1)[:, :5]


def test_precision_is_scikit_learns(data, ranked):
    for k, found in zip(extreme_data.KS, extreme_data.precisions(ranked, data.labels), strict=True):
        chosen = np.zeros(data.labels.shape)
        np.put_along_axis(chosen, ranked[:, :k], 1, axis=1)
        right = precision_score(data.labels.toarray(), chosen, average="samples", zero_division=0)
        assert found == pytest.approx(right, rel=1e-12)
        assert 0.1 < found < 0.9


def test_propensity():
    """Of a label of 100 in 1000 examples: 1 / (1 + (ln 1000 - 1) 2.5^0.55 101.5^-0.55), by hand; of more, higher."""
    labels = sparse.csr_array(np.arange(1000)[:, None] < [100, 0, 1000])
    found = extreme_data.propensities(labels)
    assert found[0] == pytest.approx(1 / (1 + 5.907755 * 1.655246 * 0.078785), rel=1e-5)
    assert found[1] < found[0] < found[2] < 1


def test_scored_precision(data, ranked):
    """By its definition, an example at a time; the best order has 1, also where an example has no label."""
    propensity = extreme_data.propensities(data.labels)
    truth = data.labels.toarray()
    for k, found in zip(extreme_data.KS, extreme_data.scored_precisions(ranked, data.labels, propensity), strict=True):
        scored = sum(
            sum(1 / propensity[c] for c in row[:k] if true[c]) for row, true in zip(ranked, truth, strict=True)
        )
        best = sum(sum(sorted(1 / propensity[true], reverse=True)[:k]) for true in truth)
        assert found == pytest.approx(scored / best, rel=1e-12)
    best = np.argsort(-(truth / propensity), axis=1)[:, :5]
    assert extreme_data.scored_precisions(best, data.labels, propensity) == pytest.approx([1, 1, 1])


def test_recall_by_frequency():
    """Counts of 1; of 2 and 3; of 4 to 7, which no example here has; of 8."""
    labels = sparse.csr_array([[1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=bool)
    best = np.array([[0, 1, 2, 3, 5], [0, 1, 3, 4, 5]])
    middles, found = extreme_data.recalls(best, labels, np.array([1, 2, 3, 4, 8, 0]))
    np.testing.assert_allclose(middles, [2**0.5, 2**1.5, 2**3.5])
    np.testing.assert_allclose(found, [1, 2 / 3, 0])


def test_predictions_are_the_highest_logits(data):
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=shape) for shape in ((50, extreme.WIDTH), (40, extreme.WIDTH), (40,))]
    found = np.concatenate([*extreme.predicted(weights, data.words)])
    logits = data.words.toarray() @ weights[0] @ weights[1].T + weights[2]
    np.testing.assert_array_equal(found, np.argsort(-logits, axis=1)[:, :5])
    assert len(found) > extreme.BATCH


# --- The training -----------------------------------------------------------------------------------------------------


def test_an_epoch_has_each_example_once():
    """600 examples with a word and a label of their own, in 3072 rows: five epochs, and the beginning of a sixth."""
    own = sparse.eye_array(600, dtype="float32", format="csr")
    data = extreme_data.Data(own, own.astype(bool))
    batches = [*extreme.batches(data, 6, np.random.default_rng(0))]
    for batch in batches:
        np.testing.assert_array_equal(batch.words, batch.labels[:, 0])
        np.testing.assert_array_equal(batch.rows, np.arange(extreme.BATCH))
    words = np.concatenate([batch.words for batch in batches])
    epochs = [words[i : i + 600] for i in range(0, 3000, 600)]
    assert all(sorted(epoch) == list(range(600)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_is_padded(data):
    """With values of 0 and labels of -1, to few lengths; the words of an example follow each other, in its row."""
    for batch in extreme.batches(data, 3, np.random.default_rng(0)):
        assert len(batch.words) == len(batch.values) == len(batch.rows)
        for length in (len(batch.words), batch.labels.shape[1]):
            assert length & (length - 1) == 0
        assert (np.diff(batch.rows) >= 0).all()
        some = np.isin(np.arange(extreme.BATCH), batch.rows[batch.values > 0])  # the others have no words
        np.testing.assert_allclose(np.bincount(batch.rows, batch.values), 1 * some)
        assert {len(set(row[row >= 0])) - sum(row >= 0) for row in batch.labels} == {0}


def test_a_tenth_is_held_out(data):
    learned, tried = extreme_data.held_out(data, np.random.default_rng(0))
    assert learned.words.shape == (540, 50)
    assert 50 < len(tried.labels.sum(axis=1)) <= 60
    assert tried.labels.sum(axis=1).min() > 0


def reference(start, batches, labels):
    """The losses and the last weights, by PyTorch's own loss on all logits, and its Adam, in float64."""
    import torch

    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in start]
    optimizer = torch.optim.Adam(weights, extreme.RATE, eps=extreme.EPSILON)
    losses = []
    for batch in batches:
        bags, targets = np.zeros((extreme.BATCH, len(start[0]))), np.zeros((extreme.BATCH, labels + 1))
        np.add.at(bags, (batch.rows, batch.words), batch.values)
        np.put_along_axis(targets, np.where(batch.labels < 0, labels, batch.labels), 1, axis=1)
        logits = torch.tensor(bags) @ weights[0] @ weights[1].T + weights[2]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.tensor(targets[:, :labels]), reduction="sum"
        )
        optimizer.zero_grad()
        (loss / extreme.BATCH).backward()
        optimizer.step()
        losses.append(float(loss.detach()) / extreme.BATCH)
    return losses, [w.detach().numpy() for w in weights]


@pytest.mark.parametrize("backend", extreme.MODELS)
def test_each_framework_trains_the_same(backend, data, request):
    asked_for(backend, request)
    rng = np.random.default_rng(0)
    start = extreme.initial(data, rng)
    batches = [*extreme.batches(data, 3, rng)]
    losses, last = reference(start, batches, 40)
    step, weights = extreme.MODELS[backend](start)
    np.testing.assert_allclose([step(batch) for batch in batches], losses, rtol=1e-6)
    for ours, theirs, before in zip(weights(), last, start, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert (ours != before).any()


def command(*arguments):
    line = [sys.executable, ROOT / "examples" / "extreme.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


def test_command(tmp_path):
    """A small file, its precision beside that of the popular labels, and a picture."""
    (tmp_path / "data.txt").write_text("40 3 6\n" + "1,0 0:1\n5 1:1\n2,1 2:1\n 1:2\n" * 10)
    done = command("--data", tmp_path / "data.txt", "--epochs", 2, "--picture", tmp_path / "picture.png")
    assert done.returncode == 0, done.stderr
    assert "36 examples, and 2 held out; 3 words, 6 labels" in done.stdout
    assert "numpy       loss " in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["popularity", "numpy"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "no_such_file"], "Error: [Errno 2] No such file or directory: 'no_such_file'"),
        (["--data", "wrong.txt"], "Error: wrong.txt, line 2: expected a label, a whole number below 6; received '7'."),
        (["--data", "few.txt"], "Error: expected 10 examples or more, and 5 labels or more; received 2 and 4."),
        (["--steps", "0"], "expected --steps to be 1 or more; received: 0"),
    ],
)
def test_wrong_calls(arguments, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong.txt").write_text("1 2 6\n7 0:1\n")
    (tmp_path / "few.txt").write_text("2 2 4\n3 0:1\n2 0:1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["extreme.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        extreme.main()
    assert text in f"{ended.value}" + capsys.readouterr().err
