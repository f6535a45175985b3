"""What the documents name must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_musa_ext import envs
from tests.engine.test_engine_modes import NOT_ON_A_CPU

DOCUMENTS = ("README.md", "README.zh-CN.md")
OURS = {envs.MODE, envs.KERNELS, envs.MLA_WORKSPACE_MB, envs.CHECK, envs.FORCE_UPDATE_METADATA}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_a_readme_names_exist(repository: Path, document: str) -> None:
    """A row of the support table points at a test file that is there, and a command at its script."""
    named = re.findall(
        r"(?<![\w/.])(?:tests|scripts|docs)/[\w.-]*\w", (repository / document).read_text()
    )
    assert named
    assert sorted({name for name in named if not (repository / name).exists()}) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_readme_documents_every_variable(repository: Path, document: str) -> None:
    """Each variable that the package reads stands in the table of settings."""
    text = (repository / document).read_text()
    assert [variable for variable in sorted(OURS) if f"| `{variable}` |" not in text] == []


def test_both_readmes_have_the_same_table_rows(repository: Path) -> None:
    """The translation has the rows of the original, in the same order, with the same marks and
    code.
    """
    rows = [table_marks((repository / document).read_text()) for document in DOCUMENTS]
    assert rows[0] == rows[1]


def test_the_readme_says_what_no_engine_runs_on_a_cpu(repository: Path) -> None:
    """What the engine's tests leave out stands in the README, with what covers it instead."""
    text = (repository / "README.md").read_text()
    assert [what for what in NOT_ON_A_CPU if f"| {what} |" not in text] == []


def table_marks(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"`tests/[^`]+`|`SGLANG_[^`]+`|✓|–", line)) for line in lines]
