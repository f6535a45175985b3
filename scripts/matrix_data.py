"""The release matrix as data: what is expected of a release, what a run showed, and whether the one
holds the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

LEVELS = ("contract", "backend", "engine")


class MatrixError(Exception):
    """The matrix cannot be run as asked; the text says what was seen, expected and can be done."""


@dataclass(frozen=True)
class Known:
    """A case of one level that is expected to fail on a release, and why."""

    level: str
    case: str
    """A test's name; without ``[...]`` it stands for the test with all its parameters."""
    reason: str

    def covers(self, case: str) -> bool:
        """Whether ``case`` is meant."""
        return case == self.case or case.startswith(f"{self.case}[")


@dataclass(frozen=True)
class Release:
    """A row of ``tests/releases.toml``."""

    version: str
    requires_python: str
    torch: str
    expected: Mapping[str, str]
    """Level -> ``pass``, or ``pending`` where nothing is claimed."""
    exceptions: tuple[Known, ...] = ()


@dataclass(frozen=True)
class Run:
    """What one level of one release showed."""

    passed: Sequence[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Case -> what went wrong, in a line."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Case -> why it does not apply to this release."""
    error: str = ""
    """Why the level did not run to its end; empty where it did."""
    seconds: float = 0.0


class Status(Enum):
    """A cell of the table."""

    PASS = "pass"
    FAIL = "FAIL"
    PENDING = "pending"


@dataclass(frozen=True)
class Verdict:
    """Whether a run is what was expected."""

    status: Status
    problems: tuple[str, ...]
    """Every difference from what was expected."""
    known: tuple[Known, ...]
    """The exceptions that failed as expected."""

    @property
    def held(self) -> bool:
        """Whether the expectation held; where nothing is claimed, nothing is broken."""
        return self.status is not Status.FAIL


def read_releases(path: Path) -> list[Release]:
    """The rows of ``path``, oldest release first.

    Raises:
        MatrixError: if this Python has no TOML reader, or a row states what cannot be.
    """
    try:
        # Named in a string, because the type checker goes by the oldest Python, which has no such
        # module.
        tomllib = importlib.import_module("tomllib")
    except ImportError:
        raise MatrixError(
            "The matrix needs Python 3.11 or newer: releases.toml is read with tomllib, and SGLang "
            "0.5.22 and newer "
            "need it too. Run it with another Python, for instance: PYTHON=python3.11 "
            "scripts/matrix"
        ) from None
    return [_release(row, path) for row in tomllib.loads(path.read_text())["release"]]


def _release(row: Mapping[str, Any], path: Path) -> Release:
    expected = {level: row[level] for level in LEVELS}
    for level, value in expected.items():
        if value not in ("pass", "pending"):
            raise MatrixError(
                f"{path.name}: {level} of {row['version']} is {value!r}; expected 'pass' or "
                "'pending'."
            )
    known = tuple(Known(one["level"], one["case"], one["reason"]) for one in row["exceptions"])
    for one in known:
        if one.level not in LEVELS:
            raise MatrixError(
                f"{path.name}: {row['version']} excepts level {one.level!r}; there are "
                f"{list(LEVELS)}."
            )
    return Release(row["version"], row["requires-python"], row["torch"], expected, known)


def select(releases: Sequence[Release], wanted: str) -> list[Release]:
    """The releases of a comma-separated list of versions, ``oldest`` and ``newest``; all of them if
    it is empty.
    """
    versions = [release.version for release in releases]
    names = {"oldest": versions[0], "newest": versions[-1]}
    chosen = [names.get(name, name) for name in _split(wanted)] or versions
    if unknown := [name for name in chosen if name not in versions]:
        raise MatrixError(
            f"No such release: {', '.join(unknown)}. There are oldest, newest, "
            f"{', '.join(versions)}."
        )
    return [release for release in releases if release.version in chosen]


def select_levels(wanted: str) -> list[str]:
    """The levels of a comma-separated list, in their order; all of them if it is empty."""
    chosen = _split(wanted) or LEVELS
    if unknown := [name for name in chosen if name not in LEVELS]:
        raise MatrixError(f"No such level: {', '.join(unknown)}. There are {', '.join(LEVELS)}.")
    return [level for level in LEVELS if level in chosen]


def _split(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def judge(release: Release, level: str, run: Run) -> Verdict:
    """Compare ``run`` with what ``release`` is expected to show at ``level``."""
    known = [one for one in release.exceptions if one.level == level]
    covered = {case for one in known for case in run.failed if one.covers(case)}
    problems = [f"{case}: {message}" for case, message in run.failed.items() if case not in covered]
    if run.error:
        problems.append(run.error)
    else:
        problems += [problem for one in known if (problem := _misplaced(one, run))]
        if not run.passed:
            problems.append("no case passed: nothing was checked")
    status = Status.FAIL if problems else Status.PASS
    if release.expected[level] == "pending":
        status = Status.PENDING
    return Verdict(
        status, tuple(problems), tuple(one for one in known if any(map(one.covers, covered)))
    )


def _misplaced(known: Known, run: Run) -> str:
    """Why an exception is not what the run showed; empty where it is."""
    if passing := [case for case in run.passed if known.covers(case)]:
        return f"{', '.join(passing)} passes, though releases.toml excepts it: that row can go"
    if any(known.covers(case) for case in run.failed):
        return ""
    return (
        f"releases.toml excepts {known.case}, which no case that ran is called: "
        "that row can go, or its name is wrong"
    )
