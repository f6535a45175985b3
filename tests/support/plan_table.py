"""The table of plans per engine: what the engines of a test run computed, in docs/plans.md."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
"""Between them stands the table in a page of the documentation."""
COUNTS = ("passes", "calls", "planned_calls", "plans", "reuses")
HEAD = ["case", "geometries", *(name.replace("_", " ") for name in COUNTS), "passes by plans"]


@dataclass(frozen=True)
class PlanCounts:
    """The computations of one engine."""

    case: str
    geometries: int
    """Different plans that a pass of this model needs, derived from the model."""
    statistics: Mapping[str, Any]
    test_file: str = ""
    """The test file that ran it, by which the table is ordered however the files are run."""


NOTED: list[PlanCounts] = []
"""The notes of this process's tests."""


def note_plans(case: str, geometries: int, statistics: Mapping[str, Any]) -> None:
    """Keep what an engine computed for the table at the end of the test run."""
    test_file = os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]
    NOTED.append(PlanCounts(case, geometries, statistics, test_file))


def plan_table(noted: Iterable[PlanCounts]) -> list[str]:
    """Return the lines of the table, or none if no engine ran."""
    rows = [_cells(counts) for counts in sorted(noted, key=lambda counts: counts.test_file)]
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    head, *lines = [_line(row, widths) for row in [HEAD, *rows]]
    return [head, "-|-".join("-" * width for width in widths), *lines]


def replace_table(page: Path, lines: Sequence[str]) -> None:
    """Put ``lines`` of a table into ``page``, between the markers there."""
    before, begin, after_begin = page.read_text().partition(BEGIN)
    _, end, after = after_begin.partition(END)
    if not (begin and end):
        raise ValueError(
            f"{page} has no line {BEGIN!r} with {END!r} below it, where the table goes."
        )
    table = "\n".join(f"| {line.rstrip()} |" for line in lines)
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


def _cells(counts: PlanCounts) -> list[str]:
    numbers = [str(counts.statistics[name]) for name in COUNTS]
    by_plans = counts.statistics["passes_by_plans"].items()
    listed = ", ".join(f"{passes} x {plans}" for plans, passes in by_plans)
    return [counts.case, str(counts.geometries), *numbers, listed]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
