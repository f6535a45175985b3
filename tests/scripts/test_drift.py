"""Tests of the drift report's comparisons, on small sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.upstream.source import SourceTree
from tests.support.commands import load_command

drift = load_command("drift")


def forward(directory: Path, source: str) -> Any:
    """The forward that ``source`` defines."""
    indented = "".join(f"    {line}\n" for line in source.splitlines())
    (directory / "module.py").write_text(f"class Backend:\n{indented}")
    return drift.Forward.of(SourceTree(directory), ("module", "Backend"), "forward_decode")


def test_comments_and_formatting_are_no_drift(tmp_path: Path) -> None:
    """Docstrings, comments and line breaks change nothing."""
    plain = forward(tmp_path, "def forward_decode(self, q):\n    return f(q)")
    other = forward(
        tmp_path,
        'def forward_decode(\n    self, q\n):\n    """Say."""\n    return f(\n    q)  # so',
    )
    assert plain == other


def test_changed_lines_are_those_of_a_diff() -> None:
    """One replaced line is one removed and one added; an unchanged forward has none."""
    assert drift.changed_lines(("a", "b", "c"), ("a", "x", "c")) == 2
    assert drift.changed_lines(("a", "b"), ("a", "b")) == 0


def test_what_the_copy_lacks_is_named(tmp_path: Path) -> None:
    """Parameters, calls and reads that only upstream has are listed; builtins are not."""
    upstream = forward(
        tmp_path, "def forward_decode(self, q, bias=None):\n    return run(int(q), self.swa)"
    )
    copy = forward(tmp_path, "def forward_decode(self, q):\n    return q")
    difference = drift.compare(upstream, copy, None)
    assert difference.missing == {"bias=", "run()", "self.swa"}
    assert difference.changed == 0


def test_missing_release_is_named(tmp_path: Path) -> None:
    """A release whose sources are not there stops the command, which says where it looked."""
    with pytest.raises(SystemExit, match=r"0\.5\.11 has no sglang"):
        drift.measure(tmp_path)
