"""The command ``sglang-musa-ext``: what it says, and that it works from an installed wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_musa_ext import __version__
from sglang_musa_ext.__main__ import COMMANDS, main
from tests.support import fake_bench

CONFIGURATION = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
"""A model's ``config.json``, as far as kernels depend on it."""


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


def command(
    python: Path, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the installed command in ``folder``."""
    return run(folder, python.parent / "sglang-musa-ext", *arguments, **variables)


def run(folder: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder``, with nothing of this checkout on Python's search path."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SGLANG_"))
    }
    return subprocess.run(
        words,
        cwd=folder,
        env=environ | variables,
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


@pytest.mark.parametrize(
    ("name", "missing"), [("bench", "needs torch, which"), ("prewarm", "No module named 'torch'")]
)
def test_a_command_says_what_it_lacks(
    name: str, missing: str, installed: Path, tmp_path: Path
) -> None:
    """Without torch nothing is measured or compiled, with exit status 2 and one line."""
    options = ("--model", str(tmp_path)) if name == "prewarm" else ()
    (tmp_path / "config.json").write_text(json.dumps(CONFIGURATION))
    done = command(installed, tmp_path, name, *options)
    assert done.returncode == 2
    assert missing in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def beside_torch(installed: Path) -> Iterator[Path]:
    """The same interpreter, which also finds the packages of this one."""
    import torch

    packages = next((installed.parents[1] / "lib").glob("python*/site-packages"))
    link = packages / "beside.pth"
    link.write_text(f"{Path(torch.__file__).parents[1]}\n")
    yield installed
    link.unlink()


def test_the_benchmark_reports_from_the_wheel(beside_torch: Path, tmp_path: Path) -> None:
    """Results of an earlier run become a page in an empty folder."""
    (tmp_path / "bench.json").write_text(json.dumps(fake_bench.result()))
    done = command(beside_torch, tmp_path, "bench", "--report", "bench.json", "--out", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# Benchmark on a GPU" in (tmp_path / "report" / "README.md").read_text()


def test_kernels_are_warmed_from_the_wheel(beside_torch: Path, tmp_path: Path) -> None:
    """The calls of a model's layers are made, here on the reference kernels."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGURATION))
    options = ("--model", str(tmp_path), "--max-running-requests", "1")
    kernels = {"SGLANG_MUSA_EXT_KERNELS": "reference"}
    done = command(beside_torch, tmp_path, "prewarm", *options, **kernels)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " s  " in done.stdout


FEW_CASES = """
import sys
from sglang_musa_ext.validation import command, numerics
cases = numerics.cases()[:3]
numerics.cases, numerics.fp8_cases, command.PROGRAM = lambda: cases, list, (__file__,)
sys.exit(command.main())
"""


def test_the_kit_runs_from_the_wheel_in_an_empty_folder(beside_torch: Path, tmp_path: Path) -> None:
    """Beside a torch it compares the kernels, a few of its cases, with its reference from the
    wheel.
    """
    program = tmp_path / "few.py"
    program.write_text(FEW_CASES)
    options = ("--kernels", "reference", "--device", "cpu", "--only", "numerics", "--quick")
    done = run(tmp_path, beside_torch, program, *options, "--out", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["outcomes"]) == 3
    assert {outcome["status"] for outcome in report["outcomes"]} == {"pass"}
