"""docs/cluster.md beside the kit: each command of the page is a server of the mode it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.validation import several
from sglang_musa_ext.validation.modes import COMMON, MODES, UNFUSED

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("cluster.md", "cluster.zh-CN.md")
SERVER = ["python", "-m", "sglang.launch_server"]
PLACES = (
    "model_path",
    "speculative_draft_model_path",
    "dist_init_addr",
    "port",
    "disaggregation_bootstrap_port",
)
"""Options that differ on every machine."""


def commands(page: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the mode, the engine of it, and the words of each command of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        named = re.match(r"# mode: ([\w-]+)(?:, engine (\d))?\n", block)
        assert named is not None, f"a command without its mode: {block}"
        words = shlex.split(block[named.end() :].replace("\\\n", " "))
        yield named[1], int(named[2] or 0), words


def options_of(words: list[str]) -> dict[str, Any]:
    """Return a command's options as an engine's arguments: numbers, and True without a value."""
    assert words[: len(SERVER)] == SERVER
    found: dict[str, Any] = {}
    name = ""
    for word in words[len(SERVER) :]:
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            found[name] = True
        else:
            found[name] = int(word) if word.isdigit() else word
    return {name: value for name, value in found.items() if name not in PLACES}


ALL = [(page, *command) for page in PAGES for command in commands(page)]
OWN_COMMANDS = {"sglang-musa-ext validate --modes NAME", "sglang-musa-ext doctor -- OPTIONS"}
"""Commands in the text, which ``test_validate.py`` and ``tests/doctor`` run."""


@pytest.mark.parametrize("page", PAGES)
def test_no_command_escapes(page: str) -> None:
    """Every block of the page is one of those above, and the text names our own commands alone."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```([^\n]*)\n.*?^```", text, re.DOTALL | re.MULTILINE)
    assert blocks == ["sh"] * len(list(commands(page)))
    assert len(blocks) > 10
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`((?:sglang-musa-ext|python|sglang)\b[^`]+)`", prose)
    assert set(named) == OWN_COMMANDS


@pytest.mark.parametrize(
    ("page", "name", "engine", "words"), ALL, ids=lambda value: value if str(value) else None
)
def test_a_command_is_what_the_kit_runs(
    page: str, name: str, engine: int, words: list[str]
) -> None:
    """All options of the command are the mode's, and the other way round, but for places and for a
    fusion that has nothing to do with attention.
    """
    mode = MODES[name]
    part = several.parts(mode.nodes, 0, apart=mode.apart)[engine]
    expected = {"attention_backend": COMMON["attention_backend"], **mode.arguments, **part}
    left_out = (*PLACES, *UNFUSED)
    assert options_of(words) == {
        key: value for key, value in expected.items() if key not in left_out
    }
    drafts = "--speculative-draft-model-path" in words
    assert drafts == bool(mode.draft)


def test_every_mode_of_several_engines_is_whole_on_the_page() -> None:
    """A mode of two engines has a command for each."""
    for page in PAGES:
        shown = [(name, engine) for name, engine, _ in commands(page)]
        assert len(set(shown)) == len(shown)
        for name, _ in shown:
            parts = several.parts(MODES[name].nodes, 0, apart=MODES[name].apart)
            assert {engine for other, engine in shown if other == name} == set(range(len(parts)))


@pytest.mark.parametrize("page", PAGES)
def test_modes_that_the_page_names_exist(page: str) -> None:
    """The table names every mode that takes several cards and overlaps no batches, and no other."""
    text = (DOCS / page).read_text(encoding="utf-8")
    table = [line.split("|")[4] for line in text.splitlines() if line.startswith("| ")][1:]
    named = {name for cell in table for name in re.findall(r"`([\w-]+)`", cell)}
    several_cards = {name for name, mode in MODES.items() if mode.gpus > 1}
    drafts = {name for name in several_cards if MODES[name].draft or name == "tp2-mla-mtp"}
    assert named == several_cards - drafts - {"two-batch-overlap"}
