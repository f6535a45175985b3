"""Child processes of the demo: started with a log, watched with a line of progress, ended whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 5
SHOWN_LOG_LINES = 25

# No proxy of the environment may stand between this machine and itself.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoError(Exception):
    """The demo did not come out as it must; the message is for the person who ran it."""


class Progress:
    """A line that says what is waited for, since when: rewritten on a terminal, rare elsewhere."""

    QUIET_S = 15
    """Seconds between lines where they cannot be overwritten."""

    def __init__(self, title: str, started: float) -> None:
        self._title, self._started, self._shown = title, started, 0.0
        self._terminal = sys.stdout.isatty()

    def update(self, detail: str = "") -> None:
        """Say that it is still going on, and what ``detail`` it is at."""
        seconds = time.monotonic() - self._started
        line = f"{self._title} ... {seconds:.0f} s  {detail}".rstrip()
        if self._terminal:
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif seconds - self._shown >= self.QUIET_S:
            self._shown = seconds
            print(line[:120], flush=True)

    def done(self, outcome: str = "done") -> None:
        """Leave the final line."""
        start = "\r\x1b[K" if self._terminal else ""
        print(
            f"{start}{self._title}: {outcome} after {time.monotonic() - self._started:.0f} s",
            flush=True,
        )

    def broken_off(self) -> None:
        """Leave the line as it is, and let what follows begin on its own."""
        if self._terminal:
            print(flush=True)


class Child:
    """A process in its own session: all it starts ends with it, and Ctrl-C reaches us alone."""

    def __init__(
        self, title: str, command: Sequence[str], log: Path, environ: Mapping[str, str]
    ) -> None:
        self.title, self.command, self.log, self.environ = title, list(command), log, dict(environ)
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    def start(self) -> None:
        """Start it; what it prints goes to the log alone."""
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End it and all that it started, if it runs."""
        if self.process is None:
            return
        process, self.process = self.process, None
        _signal_group(process.pid, signal.SIGTERM)
        try:
            # The last to go is Python's resource tracker, which removes the others' semaphores.
            _wait_for(
                lambda: process.poll() is not None and not _signal_group(process.pid, 0),
                STOP_TIMEOUT_S,
            )
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    def exit_status(self) -> int | None:
        """The exit status, or ``None`` while it runs; a signal's number is negative."""
        assert self.process is not None
        return self.process.poll()

    def require_alive(self) -> None:
        """Raise with the end of the log if it has ended."""
        if (status := self.exit_status()) is not None:
            how = (
                f"was ended by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with exit status {status}"
            )
            raise DemoError(f"{self.title} {how}. {self.log_tail()}")

    def finish(self) -> None:
        """Wait until it ends by itself, and raise with the end of the log unless it succeeded."""
        progress = Progress(self.title, self.started)
        while self.exit_status() is None:
            progress.update()
            time.sleep(0.25)
        if self.exit_status() != 0:
            progress.broken_off()
            self.require_alive()
        progress.done()

    def log_tail(self) -> str:
        """The last lines of the log, with its path."""
        lines = [line for line in self._log_text().splitlines() if line.strip()][-SHOWN_LOG_LINES:]
        return f"The last lines of {self.log}:\n  " + "\n  ".join(lines or ["(empty)"])

    def last_message(self) -> str:
        """The last line of the log that carries a time, without it: what SGLang is doing."""
        # Its list of all arguments says nothing of that.
        messages = re.findall(
            r"^\[\d{4}-[^\]]*\] (?!server_args=)(.+)$", self._log_text(), flags=re.MULTILINE
        )
        return messages[-1] if messages else "importing SGLang"

    def _log_text(self) -> str:
        """The log without the lines that our own waiting leaves there."""
        lines = self.log.read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if '"GET /health ' not in line)


class Server(Child):
    """An SGLang server on loopback."""

    def __init__(
        self, title: str, port: int, arguments: Sequence[str], log: Path, environ: Mapping[str, str]
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--host",
            LOOPBACK,
            "--port",
            str(port),
            *arguments,
        ]
        super().__init__(title, command, log, environ)
        self.url = f"http://{LOOPBACK}:{port}"

    def wait_until_ready(self) -> None:
        """Show what the server is doing until it answers."""
        progress = Progress(self.title, self.started)
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while not self._is_ready():
                self.require_alive()
                if time.monotonic() > deadline:
                    raise DemoError(
                        f"{self.title} was not ready after {START_TIMEOUT_S} s. {self.log_tail()}"
                    )
                progress.update(self.last_message())
                time.sleep(0.5)
        except BaseException:
            progress.broken_off()
            raise
        progress.done(f"ready on {self.url}")

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that ``path`` answers to a GET, or to a POST of ``body``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with _OPENER.open(request, timeout=START_TIMEOUT_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")
            raise DemoError(
                f"{self.title} refused {path}: {error}: {detail}. {self.log_tail()}"
            ) from error
        except (OSError, ValueError) as error:
            raise self.broken(path, error) from error

    def broken(self, what: str, error: Exception) -> DemoError:
        """Return the error to raise when ``error`` ended ``what``: the server is gone, if so."""
        time.sleep(1)  # A server that has just been killed may not have been seen to end.
        try:
            self.require_alive()
        except DemoError as gone:
            return gone
        return DemoError(f"{self.title} did not answer {what}: {error!r}. {self.log_tail()}")

    def _is_ready(self) -> bool:
        try:
            with _OPENER.open(self.url + "/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


def free_port(wanted: int | None) -> int:
    """The port ``wanted`` on loopback, which must be free, or any free one for ``None``."""
    with socket.socket() as probe:
        # Without this, a port that was in use a minute ago counts as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted or 0))
        except OSError as error:
            raise DemoError(
                f"port {wanted} of {LOOPBACK} cannot be used ({error.strerror}). Choose another "
                "--port, or none."
            ) from error
        port: int = probe.getsockname()[1]
        return port


def _signal_group(group: int, number: int) -> bool:
    """Send the signal (0: none) to a process group; whether there is such a group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Return when ``condition`` holds, or after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
