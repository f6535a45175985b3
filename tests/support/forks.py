"""Processes that import once and fork for each task, which the tests' engines and commands are.

Such a process computes nothing itself: PyTorch's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
IMPORT_SECONDS = 300.0
"""The imports take 10 to 60 seconds, according to the machine's load."""


class TaskFailed(AssertionError):
    """A task raised, died or took too long; the text ends with the end of its log."""

    def __init__(self, what: str, log: Path) -> None:
        self.log = log.read_text(errors="replace") if log.exists() else ""
        super().__init__(f"{what}\n--- end of its log ---\n{self.log[-6000:]}")


class ForkServer:
    """A process that forks one for each task, which comes over a connection of its own."""

    failure: ClassVar[type[TaskFailed]] = TaskFailed
    """Raised if it does not come up."""

    def __init__(self, module: str, directory: Path, environ: Mapping[str, str]) -> None:
        """Start it.

        Args:
            module: its main program, which listens at the address that is its one argument.
            directory: where logs go.
            environ: its whole environment.
        """
        self._directory = directory
        # A socket's path is limited to some hundred characters: not every directory will do.
        self._address = str(Path(tempfile.mkdtemp(prefix="forks-")) / "socket")
        self._log = directory / "server.log"
        self._process = start([sys.executable, "-m", module, self._address], self._log, environ)

    def close(self) -> None:
        """End it; every task of it has been ended already."""
        kill_group(self._process.pid)
        self._process.wait()

    def _connect(self) -> Connection[Any, Any]:
        """A connection to the process, as soon as it has imported what its forks need."""
        deadline = time.monotonic() + IMPORT_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Client(self._address)
            time.sleep(0.1)
        raise self.failure("The process that imports for others did not come up.", self._log)


def start(command: Sequence[str], log: Path, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start ``command`` in the checkout, as the leader of a group, its output in ``log``."""
    with log.open("w") as stream:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def kill_group(leader: int) -> None:
    """End a process and those that it has started, if there are any left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


# --- in the process that forks --------------------------------------------------------------------


def use_one_thread_in_forks() -> None:
    """Have PyTorch's thread pool made where there is one thread.

    PyTorch makes it anew at the first use after a fork, and not under a lock: an engine whose
    loader's threads are that first use now and then dies of "Invalid thread pool!".
    """
    import torch

    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def freeze_imports() -> None:
    """Keep what was imported: a fork's collector neither looks at it nor copies its pages."""
    gc.collect()
    gc.freeze()


def fork_always() -> None:
    """Let SGLang's processes be forks of the one that starts them; it asks for spawned ones."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None
