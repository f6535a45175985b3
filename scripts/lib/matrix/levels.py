"""Fetch a release's sources once, and run each level of it in a process of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from pathlib import Path

from scripts.lib.locks.read import ALONE, OPTIONS, only
from sglang_musa_ext.upstream.check import check_upstream
from sglang_musa_ext.upstream.rows import REQUIREMENTS

from .data import LevelResult, MatrixError, MatrixRow

ROOT = Path(__file__).resolve().parents[3]
TESTS = {
    # The first test of test_release.py checks that it is this release that is tested.
    "backend": [
        "tests/engine/test_release.py",
        "tests/attention",
        "-m",
        "not engine",
    ],
    "engine": ["tests/engine/test_release.py"],
    "musa": ["tests/simulated_musa/test_release.py"],
    "limits": [
        "tests/engine/test_release.py::test_release_is_the_expected_one",
        "tests/engine/test_release.py::test_engine_is_of_the_expected_release",
        "tests/engine/test_limits.py",
        "tests/simulated_musa/test_limits.py",
        "tests/simulated_musa/test_sglang_alone.py::test_what_sglang_cannot_do[MLA, with us]",
        "tests/simulated_musa/test_sglang_alone.py::test_what_sglang_cannot_do[MLA, fa3 named]",
    ],
}
ON_SIMULATED_GPU = ("musa", "limits")
"""Levels that boot engines there, which is written in C++."""
IMPORTED_BY_TESTS = ("tests/engine/test_engine_modes.py",)
"""Test files that other test files import, so that they belong to every level."""
CELL_SECONDS = 1800.0
"""More than any level takes on a machine that is busy with other work."""


def fingerprint(level: str) -> str:
    """Hash what a result of ``level`` depends on: package, the level's tests, environment."""
    sources = sorted((ROOT / "sglang_musa_ext").rglob("*.py"))
    tests = sorted(path for path in (ROOT / "tests").rglob("*.py") if _is_used_by(path, level))
    tests += sorted((ROOT / "tests").rglob("*.cpp")) if level in ON_SIMULATED_GPU else []
    digest = hashlib.sha256()
    for path in [*sources, *tests, ROOT / ".venv" / "dev-env.stamp"]:
        if path.is_file():
            digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_used_by(path: Path, level: str) -> bool:
    """Return True for a test of ``level`` and for what tests import."""
    if not path.name.startswith("test_"):
        return True
    used = (*TESTS.get(level, ()), *IMPORTED_BY_TESTS)
    return any(path.is_relative_to(ROOT / name.partition("::")[0]) for name in used)


def fetch(version: str, directory: Path) -> Path:
    """Return the directory that holds the release's ``sglang/``; download it if it is missing."""
    target = directory / version
    if (target / "sglang").is_dir():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{version}-") as temporary:
        wheel = _download(version, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target


def _download(version: str, directory: Path) -> Path:
    """Download the wheel alone, without the dependencies, which would be some GiB."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    try:
        with only(ALONE, f"sglang=={version}") as lock:
            what = ["--ignore-requires-python", *OPTIONS, str(lock)]
            command = [*pip, "--dest", str(directory), *what]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    except KeyError as error:
        raise MatrixError(f"{error.args[0]}. scripts/locks adds a new release.") from error
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise MatrixError(
            f"SGLang {version} could not be downloaded "
            f"({' '.join(command)}):\n{done.stderr.strip()}"
        )
    return wheels[0]


def run_level(row: MatrixRow, level: str, sources: Path, logs: Path) -> LevelResult:
    """Run ``level`` against the release in ``sources``; its output goes to a file in ``logs``."""
    start = time.monotonic()
    is_contract = level == "contract"
    result = _check_contract(row, sources) if is_contract else _run_tests(row, level, sources, logs)
    return replace(result, seconds=round(time.monotonic() - start, 1))


def _check_contract(row: MatrixRow, sources: Path) -> LevelResult:
    """Take each row of the contract that holds in this release for a case."""
    failed = {}
    for violation in check_upstream(sources, row.version):
        requirement = violation.requirement
        failed[f"{requirement.kind} {requirement.symbol}"] = str(violation)
    in_force = [requirement for requirement in REQUIREMENTS if requirement.holds_in(row.version)]
    cases = [f"{requirement.kind} {requirement.symbol}" for requirement in in_force]
    return LevelResult([case for case in cases if case not in failed], failed)


def _run_tests(row: MatrixRow, level: str, sources: Path, logs: Path) -> LevelResult:
    """Run the level's tests in a Python that imports the release, not the installed SGLang."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{row.version}-{level}.log"
    report = logs / f"{row.version}-{level}.xml"
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {
        "PYTHONPATH": str(sources),
        "SGLANG_EXPECTED_RELEASE": row.version,
        "OMP_NUM_THREADS": "1",
        # An unpacked wheel has no bytecode: each process would compile SGLang anew.
        "PYTHONDONTWRITEBYTECODE": "",
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*pytest, f"--junitxml={report}", *TESTS[level]],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        ending = _wait(process)
    error = f"{ending}; its output ends with:\n{_last_lines(log)}" if ending else ""
    if not report.is_file():
        return LevelResult(error=error or "no report was written")
    return parse_report(report.read_text(), error)


def _wait(process: subprocess.Popen[bytes]) -> str:
    """Wait for pytest; say how it ended, or return an empty string if all its tests ran."""
    try:
        status = process.wait(CELL_SECONDS)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"took more than {CELL_SECONDS:.0f} s"
    return "" if status in (0, 1) else f"pytest ended with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    # An interrupted pytest ends the engines that it started; a killed one leaves them running.
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def parse_report(text: str, error: str = "") -> LevelResult:
    """Read a JUnit report; a test that failed in any of its parts, its teardown too, has failed."""
    passed: list[str] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for case in ET.fromstring(text).iter("testcase"):
        name = case.get("name", "")
        messages = {child.tag: child.get("message", "").strip() for child in case}
        failure = messages.get("failure", messages.get("error"))
        if failure is not None:
            failed.setdefault(name, failure.partition("\n")[0] or "no message")
        elif "skipped" in messages:
            skipped[name] = messages["skipped"].partition("\n")[0]
        else:
            passed.append(name)
    unique = dict.fromkeys(passed)
    return LevelResult([name for name in unique if name not in failed], failed, skipped, error)
