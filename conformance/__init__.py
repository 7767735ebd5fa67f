"""The conformance suite: the same cases on every backend, against a high-precision oracle; and the command line."""

import sys


def main() -> None:
    """The command `unilabel`; says what to install where its own needs are missing."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich", "mpmath"):
            raise
        sys.exit(f"The command needs {missing.name}: pip install 'unilabel[conformance]'")
    except KeyboardInterrupt:
        sys.exit(130)
    run(prog_name="unilabel")
