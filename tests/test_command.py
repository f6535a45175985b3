"""The command ``sglang-musa-ext``: what it says, and that it works from an installed wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_musa_ext import __version__
from sglang_musa_ext.__main__ import COMMANDS, main


def test_its_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A newcomer sees what there is, and where to ask next."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "COMMAND --help" in text


@pytest.mark.parametrize("arguments", [[], ["validat"]])
def test_an_unknown_command_is_an_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names what was typed and what there is, with the exit status of a usage error."""
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert repr(arguments[0] if arguments else "") in text
    assert "doctor" in text


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` prints the version alone."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def command(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in ``folder``, with nothing of this checkout on its search path."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SGLANG_"))
    }
    return subprocess.run(
        [python.parent / "sglang-musa-ext", *arguments],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel alone: no torch, no pip."""
    import venv

    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "venv", symlinks=True)
    python = root / "venv" / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-index",
            "--no-deps",
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    return python


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_without_torch(name: str, installed: Path, tmp_path: Path) -> None:
    """A command's purpose can be read before anything is installed that it needs."""
    done = command(installed, tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: sglang-musa-ext {name}" in done.stdout


def test_the_doctor_runs_without_torch(installed: Path, tmp_path: Path) -> None:
    """It says what is missing, in its report and by its exit status."""
    done = command(installed, tmp_path, "doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["status"]) == (2, "fail")
    assert {check["name"] for check in report["checks"] if check["status"] == "fail"} >= {"sglang"}


def test_the_installer_runs_without_torch(installed: Path, tmp_path: Path) -> None:
    """The constraints are in the wheel: a dry run prints what it would install."""
    done = command(installed, tmp_path, "install", "--index", "URL", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "mate==" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_kit_reports_without_torch(installed: Path, tmp_path: Path) -> None:
    """Where nothing can run there is a report that says so, with exit status 2."""
    done = command(installed, tmp_path, "validate", "--only", "numerics", "--out", "report")
    assert done.returncode == 2, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "No module named 'torch'" in report["broken"]["device"]


def test_the_kit_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Beside a torch it compares the kernels, with its reference from the wheel."""
    import torch

    environment = Path(torch.__file__).parents[1]
    packages = next((installed.parents[1] / "lib").glob("python*/site-packages"))
    link = packages / "beside.pth"
    link.write_text(f"{environment}\n")
    try:
        options = ("--kernels", "reference", "--device", "cpu", "--only", "numerics", "--quick")
        done = command(installed, tmp_path, "validate", *options, "--out", "report")
    finally:
        link.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {outcome["status"] for outcome in report["outcomes"]} == {"pass"}
