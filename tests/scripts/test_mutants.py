"""The mutants of ``scripts/mutants`` are breaks of this package, and say so when they are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.lib.mutants.__main__ import PACKAGE, BrokenRun, Mutant, all_mutants, broken

MUTANT = Mutant("half as many", "file.py", "count = 2", "count = 1", "counted")


@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: mutant.name)
def test_a_mutant_is_another_program(mutant: Mutant, repository: Path) -> None:
    """Its text is in the source once, and the file can be imported without it."""
    text = (repository / PACKAGE / mutant.file).read_text()
    assert broken(mutant, text) != text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "count = 3"}, "'half as many': its text occurs 0 times in file.py"),
        ({"old": "="}, "occurs 2 times"),
        ({"new": "else:"}, "leaves no Python in file.py: invalid syntax"),
    ],
)
def test_a_mutant_that_proves_nothing_ends_the_run(change: dict[str, Any], message: str) -> None:
    """A text that is gone, that is there twice, or whose file no test could import."""
    text = "count = 2\nother = 2\n"
    assert broken(MUTANT, text) == "count = 1\nother = 2\n"
    with pytest.raises(BrokenRun, match=message):
        broken(replace(MUTANT, **change), text)
