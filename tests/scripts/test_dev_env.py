"""scripts/dev-env, with a stand-in for the Python of the environment that plays pip."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lib.dev_env import __main__ as dev_env
from scripts.lib.dev_env.pip import (
    ChangedPackageError,
    DiskFullError,
    InstallError,
    NoSuchVersionError,
    Pip,
    SilentIndexError,
    explain,
    require_room,
)
from scripts.lib.locks.read import OPTIONS, lock_of

NO_CPU_BUILD = f"ERROR: No matching distribution found for torch=={dev_env.TORCH}+cpu"
SILENCE = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
    "ERROR: No matching distribution found for setuptools>=77"
)
FULL = "Installing collected packages: torch\nERROR: OSError: [Errno 28] No space left on device"


def play_pip(venv: Path, script: str) -> Pip:
    """Make a virtual environment whose Python is the shell script ``script``, which notes calls."""
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> "{venv}/calls"\n{script}\n')
    python.chmod(0o755)
    return Pip(venv)


def calls(venv: Path) -> list[str]:
    """Return what the stand-in was asked to install."""
    prefix = "-m pip install --disable-pip-version-check "
    return [line.removeprefix(prefix) for line in (venv / "calls").read_text().splitlines()]


# Python and SGLang
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["Python 2.7.18", "Python 3.9.18", "Python 3.13.0"])
def test_another_python_is_refused(repository: Path, tmp_path: Path, version: str) -> None:
    """The message says what was named, what is expected and what to type; the status is 2."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo "{version}" && exit\nexit 1\n')
    python.chmod(0o755)
    done = refuse(repository, python)
    assert f"'{python}' is {version}; expected Python 3.10, 3.11 or 3.12" in done


def test_a_python_that_is_not_there_is_refused(repository: Path, tmp_path: Path) -> None:
    """A name that cannot be run is no Python, and no traceback of the shell's."""
    assert "is no Python that runs; expected" in refuse(repository, tmp_path / "python3.11")


def refuse(repository: Path, python: Path) -> str:
    """Return the message with which scripts/dev-env refuses ``python``."""
    done = subprocess.run(
        [repository / "scripts" / "dev-env"],
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    return message


@pytest.mark.parametrize(
    ("wanted", "python", "expected"),
    [
        ("0.5.21", (3, 10), "0.5.21"),
        ("0.5.23", (3, 11), "0.5.23"),
        # From 0.5.22 on SGLang states >=3.11.
        ("0.5.23", (3, 10), "0.5.21"),
        ("0.5.99", (3, 10), "0.5.99"),
    ],
)
def test_a_python_gets_the_newest_sglang_that_it_has(
    wanted: str, python: tuple[int, int], expected: str
) -> None:
    """A release that does not run on this Python is replaced; one that is not known is kept."""
    assert dev_env.release_for(wanted, python) == expected


# What pip says
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "error", "status"),
    [
        (NO_CPU_BUILD, NoSuchVersionError, 1),
        # So it ends where pip has a file of constraints that names torch.
        ("ERROR: ResolutionImpossible: for help visit", NoSuchVersionError, 1),
        # Pip ends with the same words where the index was never reached.
        (SILENCE, SilentIndexError, 4),
        (FULL, DiskFullError, 3),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", ChangedPackageError, 1),
        ("ERROR: [Errno 27] File too large", DiskFullError, 3),
        ("ERROR: [Errno 122] Disk quota exceeded", DiskFullError, 3),
        ("error: metadata-generation-failed", InstallError, 1),
    ],
)
def test_failures_are_told_apart(
    tmp_path: Path, output: str, error: type[InstallError], status: int
) -> None:
    """Each cause has its error, its exit status, and what pip said last."""
    explained = explain(output, "pip install x", tmp_path)
    assert type(explained) is error
    assert explained.status == status
    assert output in str(explained)


def test_too_little_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    """Where the file system has not the space that is needed, the message says how much it has."""
    with pytest.raises(DiskFullError, match=r"About 1000000000 GB are needed") as error:
        require_room(tmp_path, 1e9)
    assert f"({tmp_path}: " in str(error.value)
    require_room(tmp_path, 0)


# Half-made environments
# ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "usable"),
    [("exit 0", True), (f"echo '{NO_CPU_BUILD}'; exit 1", True), (f"echo '{FULL}'; exit 1", False)],
    ids=["all well", "not found", "disk full"],
)
def test_an_environment_that_was_being_written_is_not_used_again(
    tmp_path: Path, answer: str, usable: bool
) -> None:
    """A failure before the first package is written does no harm; after that it does."""
    pip = play_pip(tmp_path, f"[ $3 = --version ] || {{ {answer}; }}")
    with contextlib.suppress(InstallError):
        pip.install("torch")
    assert pip.is_usable() is usable


def test_an_environment_whose_installation_was_killed_is_not_used_again(tmp_path: Path) -> None:
    """Whoever is killed while pip runs says nothing, and is seen by the next run."""
    pip = play_pip(tmp_path, "[ $3 = --version ] || kill -9 $PPID")
    code = f"from scripts.lib.dev_env.pip import *; Pip(Path({str(tmp_path)!r})).install('torch')"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not pip.is_usable()


def test_an_environment_without_pip_is_not_used(tmp_path: Path) -> None:
    """One that was interrupted before it had pip is made again."""
    assert not play_pip(tmp_path, "exit 1").is_usable()
    assert not Pip(tmp_path / "none").is_usable()


# What is installed
# ---------------------------------------------------------------------------------


def test_all_but_torch_is_locked(tmp_path: Path) -> None:
    """Each call of pip has a lock, but for this package itself and a release that none has."""
    made = environment(tmp_path, OFFERED, "auto")
    made.install_lock()
    made.install_sglang()
    made.release = "0.5.99"
    made.install_sglang()
    options = " ".join(OPTIONS)
    own = f"--no-deps --no-build-isolation --editable {dev_env.ROOT}"
    lines = [line for line in calls(tmp_path) if line != own]
    assert lines[0] == f"{options} {lock_of()}"
    assert lines[1].startswith(options)
    assert lines[2:] == ["--no-deps sglang==0.5.99"]


# Torch
# ---------------------------------------------------------------------------------------------


def environment(folder: Path, script: str, build: str) -> dev_env.Environment:
    """Return an environment in ``folder`` whose pip is ``script``."""
    play_pip(folder, script)
    return dev_env.Environment(folder, "0.5.21", build)


OFFERED, NOT_OFFERED = "exit 0", f'case "$*" in *+cpu) echo "{NO_CPU_BUILD}"; exit 1;; esac'
CPU = f"--no-deps torch=={dev_env.TORCH}+cpu"
DEFAULT = " ".join([*OPTIONS, str(lock_of(part="torch-"))])


@pytest.mark.parametrize(
    ("script", "build", "expected"),
    [
        (OFFERED, "auto", [CPU]),
        (NOT_OFFERED, "auto", [CPU, DEFAULT]),
        (OFFERED, "cpu", [CPU]),
        (OFFERED, "default", [DEFAULT]),
    ],
)
def test_the_cpu_build_of_torch_is_taken_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, build: str, expected: list[str]
) -> None:
    """The default build is asked for only where the indexes have no other, or on demand."""
    monkeypatch.setattr(dev_env, "LARGE", 0)
    environment(tmp_path, script, build).install_torch()
    assert calls(tmp_path) == expected


def test_an_index_for_torch_may_have_builds_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user's index has under the pinned version is taken, though no lock has seen it."""
    monkeypatch.setattr(dev_env, "LARGE", 0)
    monkeypatch.setenv("SGLANG_MUSA_EXT_TORCH_INDEX", "URL")
    environment(tmp_path, OFFERED, "default").install_torch()
    assert calls(tmp_path) == [f"--index-url URL torch=={dev_env.TORCH},!={dev_env.TORCH}+cpu"]


def test_a_cpu_build_that_was_asked_for_is_not_replaced(tmp_path: Path) -> None:
    """SGLANG_MUSA_EXT_TORCH_BUILD=cpu fails where no index has that build."""
    with pytest.raises(NoSuchVersionError):
        environment(tmp_path, NOT_OFFERED, "cpu").install_torch()


def test_an_index_that_is_silent_about_torch_is_no_reason_for_another_build(tmp_path: Path) -> None:
    """Without an answer nothing is known of the builds that there are."""
    with pytest.raises(SilentIndexError):
        environment(tmp_path, f'echo "{SILENCE}"; exit 1', "auto").install_torch()


@pytest.mark.parametrize(
    ("cuda", "parts"),
    [
        (None, ["build for CPUs", "SGLANG_MUSA_EXT_TORCH_BUILD=default"]),
        ("13.0", ["build for CUDA 13.0", "SGLANG_MUSA_EXT_TORCH_INDEX=URL"]),
    ],
)
def test_the_build_is_named_with_the_way_to_the_other(
    tmp_path: Path, cuda: str | None, parts: list[str]
) -> None:
    """The installed build is read off torch itself."""
    made = environment(tmp_path, OFFERED, "auto")
    version = made.packages / "torch" / "version.py"
    version.parent.mkdir(parents=True)
    version.write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")
    assert [part for part in parts if part not in made.advice()] == []
