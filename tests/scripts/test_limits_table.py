"""Tests of scripts/limits-table: the page of the docs is what the rows say."""

from __future__ import annotations

from pathlib import Path

from sglang_musa_ext.upstream.limits import UPSTREAM_LIMITS
from tests.support.commands import load_command

limits_table = load_command("limits-table")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "limits.md"


def test_the_page_is_up_to_date() -> None:
    """scripts/limits-table --docs would change nothing."""
    assert PAGE.read_text(encoding="utf-8") == limits_table.page()


def test_every_limit_has_a_row() -> None:
    """A row has five cells, and names the condition that an error names."""
    rows = [line for line in limits_table.page().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(UPSTREAM_LIMITS)
    for row, limit in zip(rows, UPSTREAM_LIMITS, strict=True):
        assert row.count(" | ") == 4
        assert limit.condition in row
