"""The table of MATE's limits in the docs is that of the rows in the package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext import policy

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = runpy.run_path(str(ROOT / "scripts" / "mate-table"))


@pytest.fixture(params=COMMAND["LANGUAGES"], ids=lambda language: language.page.name)
def language(request: pytest.FixtureRequest) -> Any:
    """Each language of the page."""
    return request.param


def test_the_page_has_the_table_of_the_rows(language: Any) -> None:
    """scripts/mate-table --docs would change nothing."""
    page = language.page.read_text(encoding="utf-8")
    assert COMMAND["page_with"](page, COMMAND["table"](language)) == page


def test_every_limit_is_in_the_table(language: Any) -> None:
    """Each row of the package is a row of one of the two tables, with a known effect."""
    assert list(language.effects) == list(policy.EFFECTS)
    assert set(language.limits) == {limit.name for limit in policy.KERNEL_LIMITS}
    table = COMMAND["table"](language)
    for limit in policy.KERNEL_LIMITS:
        assert table.count(f"| {language.limits[limit.name][0]} |") == 1
        assert limit.effect in policy.EFFECTS


def test_limits_have_names_of_their_own_and_arguments_where_they_refuse_some() -> None:
    """A name finds one limit; arguments are refused until a release that has them."""
    names = [limit.name for limit in policy.KERNEL_LIMITS]
    assert len(names) == len(set(names))
    for limit in policy.KERNEL_LIMITS:
        if limit.arguments:
            assert limit.effect == "refused"
            assert limit.until in policy.MATE_RELEASES


def test_a_limit_holds_from_one_release_to_another() -> None:
    """The first release counts, and the one that lifts it does not."""
    limit = policy.KernelLimit(
        "name", "feature", "refused", "why", since=(0, 2, 0), until=(0, 2, 2)
    )
    held = [release for release in policy.MATE_RELEASES if limit.holds(release)]
    assert held == [(0, 2, 0), (0, 2, 1)]
    assert not limit.holds((0, 2, 2, 1))
