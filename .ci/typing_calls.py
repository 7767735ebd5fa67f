"""Compare what mypy and pyright say of tests/typing_calls.py with what is written there; .ci/types runs it.

They are to see an installed unilabel, as its users do (so py.typed has to be there): give its folder in PYTHONPATH.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CALLS = ROOT / "tests" / "typing_calls.py"
Found = Iterator[tuple[int, str]]  # the lines with an error, from 1, and the messages


def output(*command: str) -> str:
    """Of a checker, in an empty folder: in the tree it would find unilabel/ itself."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, "-m", *command, str(CALLS)], cwd=folder, stdout=subprocess.PIPE, text=True
        )
    return process.stdout


def mypy() -> Found:
    config = str(ROOT / "pyproject.toml")
    for line in output("mypy", "--strict", "--config-file", config, "--output", "json").splitlines():
        error = json.loads(line)
        if error["severity"] == "error":
            yield error["line"], error["message"]


def pyright() -> Found:
    for error in json.loads(output("pyright", "--pythonpath", sys.executable, "--outputjson"))["generalDiagnostics"]:
        if error["severity"] == "error":
            yield error["range"]["start"]["line"] + 1, error["message"]


def main() -> int:
    lines = enumerate(CALLS.read_text().splitlines(), 1)
    expected = {number: text[1] for number, line in lines if (text := re.search(r"# error: (.+)", line))}
    differences = []
    for checker in mypy, pyright:
        found = list(checker())
        missing = expected.keys() - {number for number, _ in found}
        for number, message in sorted([*found, *((number, "nothing") for number in missing)]):
            if number not in expected or expected[number] not in message:
                right = expected.get(number, "nothing")
                differences.append(f"{CALLS.name}:{number}: expected {right}, {checker.__name__} says: {message}")
    print(*differences, f"{CALLS.name}: {len(expected)} wrong calls, {len(differences)} differences", sep="\n")
    return bool(differences or not expected)


if __name__ == "__main__":
    sys.exit(main())
