"""Tests of scripts/limits-table: the page of the docs is what the rows say."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_musa_ext.upstream.limits import UPSTREAM_LIMITS
from tests.support.commands import load_command

OPTION = re.compile(r"--[a-z][a-z-]+\w")
limits_table = load_command("limits-table")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    """scripts/limits-table --docs would change nothing."""
    assert (DOCS / "limits.md").read_text(encoding="utf-8") == limits_table.page()
    assert (DOCS / "limits.zh-CN.md").read_text(encoding="utf-8") == limits_table.chinese_page()


def test_every_limit_is_said_in_chinese() -> None:
    """No entry is missing or left over, and options and numbers are those of the English words."""
    assert set(limits_table.CHINESE) == {limit.condition for limit in UPSTREAM_LIMITS}
    for limit in UPSTREAM_LIMITS:
        english = f"{limit.condition} {limit.happens} {limit.instead}"
        chinese = " ".join(limits_table.CHINESE[limit.condition])
        assert set(OPTION.findall(chinese)) == set(OPTION.findall(english))


def test_every_limit_has_a_row() -> None:
    """A row has five cells, and names the condition that an error names."""
    rows = [line for line in limits_table.page().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(UPSTREAM_LIMITS)
    for row, limit in zip(rows, UPSTREAM_LIMITS, strict=True):
        assert row.count(" | ") == 4
        assert limit.condition in row
