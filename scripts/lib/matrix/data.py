"""The release matrix as data: expectations, results, and the comparison of the two."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES

LEVELS = ("contract", "backend", "engine", "musa", "limits")


class MatrixError(Exception):
    """The matrix cannot be run as asked; the text says what was seen and what to do."""


@dataclass(frozen=True)
class ExpectedFailure:
    """A case of one level that is expected to fail on a release, and why."""

    level: str
    case: str
    """A test's name; without ``[...]`` it stands for the test with all its parameters."""
    reason: str

    def covers(self, case: str) -> bool:
        """Return True if ``case`` is this test, or this test with some parameters."""
        return case == self.case or case.startswith(f"{self.case}[")


@dataclass(frozen=True)
class MatrixRow:
    """A row of ``tests/releases.toml``: one SGLang release."""

    version: str
    requires_python: str
    torch: str
    expected: Mapping[str, str]
    """Level -> ``pass``, or ``pending`` where nothing is claimed."""
    exceptions: tuple[ExpectedFailure, ...] = ()


@dataclass(frozen=True)
class LevelResult:
    """The outcome of one level on one release."""

    passed: Sequence[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Case -> what went wrong, in a line."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Case -> why it does not apply to this release."""
    error: str = ""
    """The reason that the level did not run to its end; empty where it did."""
    seconds: float = 0.0


class CellStatus(Enum):
    """The word that a cell of the table begins with."""

    PASS = "pass"
    FAIL = "FAIL"
    PENDING = "pending"


@dataclass(frozen=True)
class Verdict:
    """A result compared with its expectation."""

    status: CellStatus
    problems: tuple[str, ...]
    """Every difference from what was expected."""
    excepted: tuple[ExpectedFailure, ...]
    """The exceptions that failed as expected."""

    @property
    def as_expected(self) -> bool:
        """False if the expectation broke; where nothing is claimed, nothing can break."""
        return self.status is not CellStatus.FAIL


def read_rows(path: Path) -> list[MatrixRow]:
    """Read the rows of ``path``, oldest release first.

    Raises:
        MatrixError: if a row has a value that it cannot have.
    """
    return [_parse_row(entry, path) for entry in read_toml(path)["release"]]


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file, on Python 3.10 too."""
    # Named in a string, because the type checker assumes the oldest Python, which lacks tomllib.
    reader = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    content: dict[str, Any] = reader.loads(path.read_text(encoding="utf-8"))
    return content


def _parse_row(entry: Mapping[str, Any], path: Path) -> MatrixRow:
    version = entry["version"]
    expected = {level: entry[level] for level in LEVELS}
    for level, value in expected.items():
        if value not in ("pass", "pending"):
            raise MatrixError(
                f"{path.name}: {level} of {version} is {value!r}; expected 'pass' or 'pending'."
            )
    exceptions = tuple(ExpectedFailure(**fields) for fields in entry.get("exceptions", ()))
    for exception in exceptions:
        if exception.level not in LEVELS:
            raise MatrixError(
                f"{path.name}: {version} excepts level {exception.level!r}; there are "
                f"{list(LEVELS)}."
            )
    release = {row.version: row for row in SUPPORTED_RELEASES}.get(version)
    if release is None:
        raise MatrixError(
            f"{path.name}: {version} is no release of sglang_musa_ext/upstream/releases.py; "
            f"expected one of {', '.join(row.version for row in SUPPORTED_RELEASES)}."
        )
    return MatrixRow(version, release.requires_python, release.torch, expected, exceptions)


def select_rows(rows: Sequence[MatrixRow], wanted: str) -> list[MatrixRow]:
    """Return the rows of a comma-separated list of versions, ``oldest`` and ``newest``.

    An empty list means all rows. The order is that of ``rows``.
    """
    versions = [row.version for row in rows]
    aliases = {"oldest": versions[0], "newest": versions[-1]}
    chosen = [aliases.get(name, name) for name in _split(wanted)] or versions
    unknown = [name for name in chosen if name not in versions]
    if unknown:
        raise MatrixError(
            f"No such release: {', '.join(unknown)}. There are oldest, newest, "
            f"{', '.join(versions)}."
        )
    return [row for row in rows if row.version in chosen]


def split_by_python(
    rows: Sequence[MatrixRow], python_version: str
) -> tuple[list[MatrixRow], list[MatrixRow]]:
    """Return the rows of the releases that this Python can run, and the rows that are left out."""
    from packaging.specifiers import SpecifierSet  # The environment has it; --help runs without.

    fitting = [row for row in rows if SpecifierSet(row.requires_python).contains(python_version)]
    return fitting, [row for row in rows if row not in fitting]


def select_levels(wanted: str) -> list[str]:
    """Return the levels of a comma-separated list, in their order; all of them if it is empty."""
    chosen = _split(wanted) or LEVELS
    unknown = [name for name in chosen if name not in LEVELS]
    if unknown:
        raise MatrixError(f"No such level: {', '.join(unknown)}. There are {', '.join(LEVELS)}.")
    return [level for level in LEVELS if level in chosen]


def _split(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def judge(row: MatrixRow, level: str, result: LevelResult) -> Verdict:
    """Compare ``result`` with what ``row`` expects of ``level``."""
    exceptions = [exception for exception in row.exceptions if exception.level == level]
    failed_as_expected = _covered(result.failed, exceptions)
    problems = [
        f"{case}: {message}"
        for case, message in result.failed.items()
        if case not in failed_as_expected
    ]
    problems += _problems_of_the_run(result, exceptions)
    status = CellStatus.FAIL if problems else CellStatus.PASS
    if row.expected[level] == "pending":
        status = CellStatus.PENDING
    excepted = [
        exception for exception in exceptions if any(map(exception.covers, failed_as_expected))
    ]
    return Verdict(status, tuple(problems), tuple(excepted))


def _covered(cases: Mapping[str, str], exceptions: Sequence[ExpectedFailure]) -> set[str]:
    return {case for exception in exceptions for case in cases if exception.covers(case)}


def _problems_of_the_run(result: LevelResult, exceptions: Sequence[ExpectedFailure]) -> list[str]:
    if result.error:
        return [result.error]
    problems = [_misplaced(exception, result) for exception in exceptions]
    if not result.passed:
        problems.append("no case passed: nothing was checked")
    return [problem for problem in problems if problem]


def _misplaced(exception: ExpectedFailure, result: LevelResult) -> str:
    """Say why ``exception`` does not fit ``result``; an empty string means that it does."""
    passing = [case for case in result.passed if exception.covers(case)]
    if passing:
        return f"{', '.join(passing)} passes, though releases.toml excepts it: that row can go"
    if any(map(exception.covers, result.failed)):
        return ""
    return (
        f"releases.toml excepts {exception.case}, which no case that ran is called: "
        "that row can go, or its name is wrong"
    )
