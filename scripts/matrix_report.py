"""How the matrix is shown: as a table in the terminal, as a page of the docs, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix_data import LEVELS, Known, Release, Run, Status, Verdict


@dataclass(frozen=True)
class Cell:
    """One level of one release."""

    release: Release
    level: str
    run: Run
    verdict: Verdict

    @property
    def text(self) -> str:
        """Status and counts, as the tables show them."""
        counts = [f"{len(self.run.passed)} passed"]
        if unexpected := len(self.verdict.problems):
            counts.append(f"{unexpected} wrong")
        if self.verdict.known:
            counts.append(f"{len(self.verdict.known)} excepted")
        if self.run.skipped:
            counts.append(f"{len(self.run.skipped)} not applicable")
        return f"{self.verdict.status.value} ({', '.join(counts)})"


Table = Mapping[str, Mapping[str, Cell]]
"""Version -> level -> cell."""


def progress(cell: Cell, done: int, total: int, reused: bool) -> str:
    """The line of a finished cell."""
    seconds = "as before" if reused else f"{cell.run.seconds:.0f} s"
    return f"[{done:>{len(str(total))}}/{total}] {cell.release.version} {cell.level}: {cell.text}, {seconds}"


def terminal_table(table: Table, levels: Sequence[str]) -> list[str]:
    """Lines: one for each release, one column for each level."""
    rows = [
        ["SGLang", *levels],
        *([version, *_cells(cells, levels)] for version, cells in table.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]


def _cells(cells: Mapping[str, Cell], levels: Sequence[str]) -> list[str]:
    return [cells[level].text if level in cells else "-" for level in levels]


def details(table: Table) -> list[str]:
    """Lines: every problem, and the reason of every exception."""
    lines = []
    for version, cells in table.items():
        for level, cell in cells.items():
            lines += [
                f"{cell.verdict.status.value} {version} {level}: {text}"
                for text in cell.verdict.problems
            ]
            lines += [
                f"excepted {version} {level}: {known.case}: {known.reason}"
                for known in cell.verdict.known
            ]
    return lines


def closing_line(table: Table, seconds: float) -> str:
    """How many cells are as expected, in the words of pytest."""
    verdicts = [cell.verdict for cells in table.values() for cell in cells.values()]
    failed = sum(not verdict.held for verdict in verdicts)
    pending = sum(verdict.status is Status.PENDING for verdict in verdicts)
    words = [f"{failed} failed"] if failed else []
    words.append(f"{len(verdicts) - failed - pending} passed")
    words += [f"{pending} pending"] if pending else []
    return f"matrix: {', '.join(words)} in {seconds:.0f}s"


def as_json(table: Table, environment: Mapping[str, str]) -> str:
    """Everything, for other programs."""
    return json.dumps(
        {"environment": environment, "releases": {v: _json(cells) for v, cells in table.items()}},
        indent=1,
    )


def _json(cells: Mapping[str, Cell]) -> dict[str, Any]:
    return {
        level: {
            "status": cell.verdict.status.value,
            "expected": cell.release.expected[level],
            "seconds": cell.run.seconds,
            "passed": len(cell.run.passed),
            "failed": dict(cell.run.failed),
            "not applicable": dict(cell.run.skipped),
            "excepted": {known.case: known.reason for known in cell.verdict.known},
            "problems": list(cell.verdict.problems),
        }
        for level, cell in cells.items()
    }


INTRODUCTION = """# The SGLang releases this package is checked with

Written by `scripts/matrix --write-docs`, from what it found; what is expected stands in `tests/releases.toml`.

* **contract**: every row of `sglang_musa_ext/upstream` that holds in the release, checked in its sources.
* **backend**: the tests of the attention backend and of graph capture, over the release's own `FlashAttentionBackend`.
* **engine**: the release's own engine on a CPU with pages of 64 tokens, serving a dense model, one with sliding windows
  and one with multi-head latent attention. Tokens equal those of transformers and of the release's own `torch_native`
  backend, and one plan is computed for each geometry and pass.

All of it runs on a CPU with the reference kernels, in one environment:
{environment}.
A test is not applicable where the release lacks what it is about.
"""


def markdown(table: Table, environment: Mapping[str, str]) -> str:
    """The page of the docs. It holds no seconds and no date, so that it changes with its facts
    alone.
    """
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    lines = [
        "| SGLang | Python | its PyTorch | contract | backend | engine |",
        "|---|---|---|---|---|---|",
    ]
    reasons: dict[tuple[str, Known], list[str]] = {}
    for version, cells in table.items():
        release = next(iter(cells.values())).release
        about = [version, release.requires_python, release.torch, *_cells(cells, LEVELS)]
        lines.append(f"| {' | '.join(about)} |")
        for level, cell in cells.items():
            for known in cell.verdict.known:
                reasons.setdefault((level, known), []).append(version)
    page = [INTRODUCTION.format(environment=versions), *lines]
    if reasons:
        page += ["", "Excepted, each because of the release itself:", ""]
        page += [
            f"* {level}, {', '.join(found)}: `{known.case}`. {known.reason}"
            for (level, known), found in reasons.items()
        ]
    return "\n".join(page) + "\n"


def write(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
