"""Run the pip of a virtual environment, and say in plain words why it failed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from scripts.lib.locks.read import OPTIONS


class InstallError(Exception):
    """The environment cannot be made; the message is for the person who wanted it."""

    status = 1
    """The exit status of the command."""


class NoSuchVersionError(InstallError):
    """The indexes answered, and have no such distribution for this Python and machine."""


class DiskFullError(InstallError):
    """There is no room for what has to be written."""

    status = 3


class ChangedPackageError(InstallError):
    """A file of an index is not the one that was locked."""


class SilentIndexError(InstallError):
    """A package index does not answer."""

    status = 4


DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
SILENT_INDEX = re.compile(
    r"WARNING: Retrying \(|Could not fetch URL|Read timed out|Connection refused"
    r"|Name or service not known|Temporary failure in name resolution"
)
CHANGED = re.compile(r"DO NOT MATCH THE HASHES")
NOT_FOUND = re.compile(r"No matching distribution found for|ResolutionImpossible")
"""Pip says the second where a constraint names a version that no index has either."""
WRITING = "Installing collected packages"
"""Pip prints it when everything has been downloaded and the environment is about to change."""


class Pip:
    """The pip of one virtual environment."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self._unfinished = venv / "dev-env.unfinished"

    def is_usable(self) -> bool:
        """Return whether pip runs, and was not interrupted while it wrote packages."""
        if self._unfinished.exists() or not self.python.exists():
            return False
        command = [str(self.python), "-m", "pip", "--version"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def install_locked(self, lock: Path, *options: str) -> None:
        """Install what a lock of ``scripts/lib/locks`` names: these very files.

        Raises:
            InstallError: pip failed, or an index has other files.
        """
        self.install(*options, *OPTIONS, str(lock))

    def install(self, *arguments: str) -> None:
        """Install what ``arguments`` name.

        Raises:
            InstallError: pip failed. An environment that it had begun to write is not usable then.
        """
        self._unfinished.touch()
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        status, output = run([*command, *arguments])
        if status == 0 or WRITING not in output:
            self._unfinished.unlink()
        if status != 0:
            raise explain(output, f"pip install {' '.join(arguments)}", self.venv)


def run(command: list[str]) -> tuple[int, str]:
    """Run ``command``; return its exit status and all that it printed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def explain(output: str, command: str, folder: Path) -> InstallError:
    """Return the error that says why ``command`` failed, with the end of what it printed."""
    tail = "\n".join(output.splitlines()[-20:])
    if DISK_FULL.search(output):
        return DiskFullError(f"{command}\n{tail}\n{no_room(folder)}")
    if CHANGED.search(output):
        return ChangedPackageError(
            f"{command}\n{tail}\nAn index has another file than scripts/lib/locks names, so it was "
            "not installed. Find out which index, by 'pip config list', and why; scripts/locks "
            "writes the locks anew."
        )
    if SILENT_INDEX.search(output):
        return SilentIndexError(
            f"{command}\n{tail}\nA package index did not answer. Check the network and "
            "'pip config list', and run this again: what has been installed is kept."
        )
    if NOT_FOUND.search(output):
        return NoSuchVersionError(
            f"{command}\n{tail}\nNo configured index has it for this Python and machine, or a "
            "constraint forbids it: see 'pip config list'."
        )
    return InstallError(f"{command}\n{tail}\nThe command failed.")


def require_room(folder: Path, gigabytes: float) -> None:
    """Raise unless the file system of ``folder`` has that much space left.

    Raises:
        DiskFullError: it has less.
    """
    if shutil.disk_usage(folder).free < gigabytes * 1e9:
        raise DiskFullError(f"About {gigabytes:.0f} GB are needed. {no_room(folder)}")


def no_room(folder: Path) -> str:
    """Return what is free in ``folder`` and for temporary files, and what to do about it."""
    places = [folder if folder.exists() else folder.parent, Path(tempfile.gettempdir())]
    free = [f"{place}: {shutil.disk_usage(place).free / 1e9:.1f} GB" for place in places]
    return (
        f"There is too little room ({', '.join(free)} free), or a limit of sizes ('ulimit -f', a "
        "quota). Make room and run this again; TMPDIR and PIP_CACHE_DIR may name other disks."
    )
