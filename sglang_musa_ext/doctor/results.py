"""The results of the doctor's checks, and how a check is written."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class CheckStatus(enum.Enum):
    """The outcome of a check, from best to worst."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


EXIT_CODES = {CheckStatus.PASS: 0, CheckStatus.WARN: 1, CheckStatus.FAIL: 2}


@dataclass(frozen=True)
class CheckResult:
    """The finding of a probe."""

    status: CheckStatus
    finding: str
    """The facts as seen, and what was expected where that differs."""
    next_step: str = ""
    """The remedy; empty if none is needed."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The same as plain data, for ``--json``."""
    name: str = ""
    """The check's, set when it ran."""


def passed(finding: str, **details: Any) -> CheckResult:
    """All is well."""
    return CheckResult(CheckStatus.PASS, finding, details=details)


def warned(finding: str, next_step: str, **details: Any) -> CheckResult:
    """It may work, or not as meant."""
    return CheckResult(CheckStatus.WARN, finding, next_step, details)


def failed(finding: str, next_step: str, **details: Any) -> CheckResult:
    """It cannot work."""
    return CheckResult(CheckStatus.FAIL, finding, next_step, details)
