"""docs/troubleshooting.md against the sources: an entry a message, and none is stale."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from sglang_musa_ext import envs

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: ROOT / "docs" / name for name in ("troubleshooting.md", "troubleshooting.zh-CN.md")}
SOURCES = sorted((ROOT / "sglang_musa_ext").rglob("*.py"))
PRINTED_BY_RETURN = {
    *("_too_old", "_newer", "_not_loaded", "_another_way", "reason_against_capability"),
}
"""Functions whose text is printed as it is."""
INNER = {"Unreadable"}
"""Errors that never leave the package."""
GAP = "…"
"""Stands in a page for what a message fills in."""


def layer_of(path: Path) -> str:
    """The folder of a module of the package, or the module itself beside the folders."""
    return path.relative_to(ROOT / "sglang_musa_ext").with_suffix("").parts[0]


def text_of(node: ast.AST) -> str | None:
    """Return an expression's text with gaps for what is filled in; None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("envs."):
        return str(getattr(envs, node.attr))
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [text_of(node.left), text_of(node.right)]
        return None if parts == [None, None] else "".join(part or GAP for part in parts)
    return None


def printed(tree: ast.AST) -> Iterator[str]:
    """The texts of errors, of warnings in a log, and of problems with MATE."""
    constants = {
        ast.unparse(x.targets[0]): x.value for x in ast.walk(tree) if isinstance(x, ast.Assign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _prints(node):
            first = node.args[0]
            if text_of(first) == "%s":  # A text that a log prints as it is may have a name.
                first = constants.get(ast.unparse(node.args[-1]), first)
            yield text_of(first) or ""
        elif isinstance(node, ast.FunctionDef) and node.name in PRINTED_BY_RETURN:
            yield from (
                text_of(x.value) or ""
                for x in ast.walk(node)
                if isinstance(x, ast.Return) and x.value
            )


def _prints(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    return (
        name in ("super().__init__", "Problem", "logger.warning", "logger.error")
        or name.endswith(
            ("Error", "Unavailable", "ByKernels", "KernelArgument", "Version", "Exhausted")
        )
    ) and name not in INNER


def pieces(message: str) -> list[str]:
    """Return a message's constant parts, of its first sentence if that has long ones."""
    sentence = re.split(r"(?<=[a-z0-9)…])[.:;] ", message.replace("\n", " "))[0]
    for text in (sentence, message):
        long_pieces = [
            piece.strip() for piece in re.split(f"{GAP}|%[sdr]", text) if len(piece.strip()) >= 12
        ]
        if long_pieces:
            return long_pieces
    return []


TEXTS = sorted(
    {(layer_of(path), text) for path in SOURCES for text in printed(ast.parse(path.read_text()))}
)
MESSAGES = [(module, text) for module, text in TEXTS if pieces(text)]


def quoted(page: str) -> list[str]:
    """The messages that a page has entries for: the code at the start of a row with three cells."""
    return re.findall(r"^\| `([^`]+)`[^|]*\|[^|]+\|[^|]+\|$", page, re.MULTILINE)


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> str:
    """Each language of the page."""
    return PAGES[request.param].read_text(encoding="utf-8")


def test_the_messages_are_found() -> None:
    """The sources have many messages, from each module that raises."""
    assert len(MESSAGES) > 40
    raising = {"attention", "envs", "guard", "kernels", "plugin", "upstream"}
    assert raising <= {module for module, _ in MESSAGES}


@pytest.mark.parametrize(
    ("module", "message"), MESSAGES, ids=[f"{name}: {text[:40]}" for name, text in MESSAGES]
)
def test_a_message_has_an_entry(page: str, module: str, message: str) -> None:
    """Each message of the package is in one line of the page, as far as it is always the same."""
    parts = pieces(message)
    assert any(has_all(line, parts) for line in page.splitlines()), parts


def test_no_entry_is_stale(page: str) -> None:
    """Each message that the page quotes is printed by something in the sources."""
    texts = [text.replace("\n", " ") for _, text in TEXTS]
    for entry in quoted(page):
        parts = [part.strip(" .") for part in entry.split(GAP)]
        assert any(has_all(text, parts) for text in texts), entry


def has_all(text: str, parts: Iterable[str]) -> bool:
    """Tell whether each of these parts is in a text."""
    return all(part in text for part in parts)


def test_the_languages_have_the_same_entries() -> None:
    """Both pages quote the same messages, in the same order."""
    english, chinese = (quoted(path.read_text(encoding="utf-8")) for path in PAGES.values())
    assert english == chinese


def test_each_language_leads_to_the_other() -> None:
    """Each page links to its translation."""
    english, chinese = (path.read_text(encoding="utf-8") for path in PAGES.values())
    assert "(troubleshooting.zh-CN.md)" in english
    assert "(troubleshooting.md)" in chinese


def test_a_message_without_an_entry_is_noticed() -> None:
    """The comparison can fail: a new error in the sources is found, and is in no page."""
    (message,) = printed(
        ast.parse(
            "raise PluginError(f'The moon at {place} is not made of cheese. Eat something else.')"
        )
    )
    assert pieces(message) == ["The moon at", "is not made of cheese"][1:]
    assert all(
        "is not made of cheese" not in path.read_text(encoding="utf-8") for path in PAGES.values()
    )
