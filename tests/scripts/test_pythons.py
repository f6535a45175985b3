"""scripts/pythons, on stand-ins of interpreters and of a repository."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import load_command

pythons: Any = load_command("pythons")
SUITE = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'


def interpreter(path: Path, answer: str) -> Path:
    """Write an executable that answers ``answer`` whatever it is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a Python: its search path is ``bin``, and pyenv's folder ``pyenv``."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(pythons.shutil, "which", lambda name: find(tmp_path / "bin" / name))
    return tmp_path


def find(path: Path) -> str | None:
    return str(path) if path.exists() else None


def test_a_python_of_the_search_path_is_taken(machine: Path) -> None:
    """The one that the user gets is the one that is tried."""
    wanted = interpreter(machine / "bin" / "python3.12", "echo 3.12")
    interpreter(machine / "pyenv" / "versions" / "3.12.1" / "bin" / "python", "echo 3.12")
    assert pythons.find_python("3.12") == wanted


def test_a_name_that_refuses_to_run_is_passed_over(machine: Path) -> None:
    """Pyenv puts names on the search path that run no Python; its newest version is taken then."""
    interpreter(machine / "bin" / "python3.12", "echo 'not found' >&2; exit 127")
    folder = machine / "pyenv" / "versions"
    for version in ("3.12.9", "3.12.10"):
        interpreter(folder / version / "bin" / "python", "echo 3.12")
    assert pythons.find_python("3.12") == folder / "3.12.10" / "bin" / "python"


def test_another_python_under_the_name_is_none(machine: Path) -> None:
    """A program that answers with another version is not the one that was looked for."""
    interpreter(machine / "bin" / "python3.12", "echo 3.13")
    assert pythons.find_python("3.12") is None


def test_counts_are_pytests(tmp_path: Path) -> None:
    """Failures and errors both count as failed; without a report nothing is claimed."""
    report = tmp_path / "tests.xml"
    assert pythons.read_counts(report) == (0, 0, 0)
    report.write_text(SUITE.format(20, 3, 2, 5))
    assert pythons.read_counts(report) == (10, 5, 5)


def repository(folder: Path, test: str) -> Path:
    """Make a repository whose scripts/test is ``test``, and whose environment needs no making."""
    interpreter(folder / "scripts" / "dev-env", "mkdir -p .venv/bin .cache")
    interpreter(folder / "scripts" / "test", test)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@invalid"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(("status", "result"), [(0, "passed"), (1, "failed: exit status 1")])
def test_the_last_commit_is_tested_in_a_clone(
    machine: Path, monkeypatch: pytest.MonkeyPatch, status: int, result: str
) -> None:
    """The verdict is that of scripts/test in the clone, and arguments are handed on to it."""
    report = SUITE.format(4, status, 0, 1)
    source = repository(
        machine / "source",
        f'echo \'{report}\' > "${{2#--junitxml=}}"; echo "$1" > "$0.asked"; exit {status}',
    )
    monkeypatch.setattr(pythons, "ROOT", source)
    monkeypatch.setattr(pythons, "CLONES", machine / "clones")
    contents = pythons.Contents("3.12.1", "0.5.21", "2.13.0", "13.0")
    monkeypatch.setattr(pythons, "read_contents", lambda clone: contents)
    outcome = pythons.run_under("3.12", Path("/nowhere"), ["-x"], prepare=False)
    assert outcome.result.startswith(result)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (3 - status, status, 1)
    assert (machine / "clones/3.12/scripts/test.asked").read_text() == "-x\n"
    assert outcome.cells()[:4] == ("3.12.1", "0.5.21", "2.13.0", "for CUDA 13.0")


def test_a_python_that_is_not_there_has_a_row(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that was not run is mentioned, and is no failure."""
    assert pythons.main(["--only", "3.12"]) == 0
    assert "| 3.12 |" in capsys.readouterr().out


def test_other_pythons_run_the_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lint and types are left to this Python, whose verdict is that of all."""
    asked = []

    def run_under(minor: str, _: Path, arguments: list[str], *, prepare: bool) -> Any:
        asked.append((minor, arguments, prepare))
        return pythons.Outcome(minor, "passed")

    monkeypatch.setattr(pythons, "find_python", lambda minor: Path("/nowhere"))
    monkeypatch.setattr(pythons, "run_under", run_under)
    assert pythons.main(["--others", "-x"]) == 0
    others = [minor for minor in pythons.SUPPORTED if minor != pythons.THIS]
    assert asked == [(minor, ["--tests-only", "-x"], False) for minor in others]
