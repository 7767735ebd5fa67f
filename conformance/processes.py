"""Worker processes: what they say, and that none is left behind, whatever the losses in them do.

A loss may crash, hang, write anything anywhere, and start processes of its own. So a worker is killed with all that it
started, and counts as done only if it said so.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL = 0.1  # seconds between two looks at a worker that says nothing
LEAVE = 5.0  # seconds for a worker to exit once it is done, and for a pipe to run dry
CHUNK = 1 << 16
SHOWN = 400  # characters of a worker's last words, or of an error that quotes a file


class Ended(Exception):
    """A worker crashed, hung or was stopped before it was done: the reason."""


class Processes:
    """The workers that run now. `stop` ends them, and lets no other start."""

    def __init__(self) -> None:
        self.stopped = False
        self._lock = threading.Lock()
        self._running: set[Worker] = set()

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.end()

    def messages(self, order: dict[str, Any], dtype: str, timeout: float) -> Generator[dict[str, Any]]:
        """What a worker says, as it comes, until it says that it is done. Ended if it does not come so far."""
        process = self._start(order, dtype)
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        words: deque[bytes] = deque(maxlen=4)  # of all that it and its framework print, the last
        _follow(process.stdout, lambda pipe: pipe.readline(), lines.put)
        reader = _follow(process.stderr, lambda pipe: pipe.read1(CHUNK), words.append)
        done = False
        try:
            while line := _line(process, lines, timeout):
                if line.endswith(b"\n"):  # else it died while it wrote
                    message = _read(line)
                    done = "end" in message
                    if done:
                        return
                    words.clear()  # they were about this
                    yield message
            reader.join(LEAVE)
            said = _last(b"".join(words))
            raise Ended(f"exit code {process.returncode} before the end" + f": {said}" * bool(said))
        except Ended as ended:
            raise (Ended("interrupted") if self.stopped else ended) from None
        finally:
            if done:
                with suppress(subprocess.TimeoutExpired):  # it may exit by itself
                    process.wait(LEAVE)
            process.end()
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE)
            with self._lock:
                self._running.discard(process)

    def _start(self, order: dict[str, Any], dtype: str) -> Worker:
        with self._lock:
            if self.stopped:
                raise Ended("interrupted")
            try:
                process = Worker(order, dtype)
            except OSError as error:
                raise Ended(f"no process can be started: {error}") from error
            self._running.add(process)
        return process


class Worker(subprocess.Popen[bytes]):
    """A worker's process, and all that it starts: the process group and, on Linux, what has left the group."""

    def __init__(self, order: dict[str, Any], dtype: str) -> None:
        self._mark = uuid.uuid4().hex  # in the environment, which children inherit
        environment = os.environ | {"UNILABEL_WORKER": self._mark}
        if dtype == "float64":
            environment |= {"JAX_ENABLE_X64": "1"}  # without it, JAX has no float64
        # -P: import the installed unilabel, not one in the current folder.
        command = [sys.executable, "-P", "-m", f"{__package__}.worker", json.dumps(order)]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        super().__init__(command, stdin=none, stdout=pipe, stderr=pipe, env=environment, start_new_session=True)

    def end(self) -> None:
        if not hasattr(os, "killpg"):
            return self.kill()
        with suppress(ProcessLookupError, PermissionError):  # all have ended; macOS says the second
            os.killpg(self.pid, signal.SIGKILL)
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or is not ours
                if self._mark.encode() in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)


def _follow(pipe: Any, read: Callable[[Any], bytes], put: Callable[[bytes], None]) -> threading.Thread:
    """Reads a pipe in a thread, which a process that keeps the pipe open cannot make anybody wait for."""

    def follow() -> None:
        with pipe:
            while data := read(pipe):
                put(data)
            put(b"")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    return thread


def _line(process: Worker, lines: queue.SimpleQueue[bytes], timeout: float) -> bytes:
    """The next line, or b"" if the worker has exited. Ended if neither comes in time."""
    deadline, closed = time.monotonic() + timeout, False
    while time.monotonic() < deadline:
        with suppress(queue.Empty):
            if line := lines.get(timeout=POLL):
                return line
            closed = True
        if process.poll() is not None:
            process.end()  # who else holds the pipe open
            with suppress(queue.Empty):
                return b"" if closed else lines.get(timeout=LEAVE)
            return b""
    raise Ended(f"no answer for {timeout:g} s")


def _read(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    raise Ended(f"no answer, but {_last(line)!r}")


def _last(words: bytes) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in words.decode("utf-8", "backslashreplace").splitlines() if line.strip()]
    return lines[-1][-SHOWN:] if lines else ""


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP as one KeyboardInterrupt, for the first of them: `number` says which.

    Any other is only noted, as all are once `raises` is False: what there is by then can be reported.
    """

    def __init__(self) -> None:
        self.number = 0
        self.raises = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # One that is ignored, as by nohup, stays so.
                if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, _: object) -> None:
        self.number = self.number or number
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt
