"""Show the matrix: as a table in the terminal, as a page of the docs, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data import (
    LEVELS,
    CellStatus,
    ExpectedFailure,
    LevelResult,
    MatrixError,
    MatrixRow,
    Verdict,
)


@dataclass(frozen=True)
class Cell:
    """One level of one release."""

    row: MatrixRow
    level: str
    result: LevelResult
    verdict: Verdict

    @property
    def text(self) -> str:
        """Status and counts, as the tables show them."""
        counts = {
            "passed": len(self.result.passed),
            "wrong": len(self.verdict.problems),
            "excepted": len(self.verdict.excepted),
            "not applicable": len(self.result.skipped),
        }
        shown = [f"{n} {what}" for what, n in counts.items() if n or what == "passed"]
        return f"{self.verdict.status.value} ({', '.join(shown)})"


Table = Mapping[str, Mapping[str, Cell]]
"""Version -> level -> cell."""


def all_cells(table: Table) -> Iterator[Cell]:
    """Iterate over the cells of every release."""
    for cells in table.values():
        yield from cells.values()


def progress(cell: Cell, done: int, total: int, reused: bool) -> str:
    """Return the line of a finished cell."""
    counter = f"[{done:>{len(str(total))}}/{total}]"
    duration = "as before" if reused else f"{cell.result.seconds:.0f} s"
    return f"{counter} {cell.row.version} {cell.level}: {cell.text}, {duration}"


def terminal_table(table: Table, levels: Sequence[str]) -> list[str]:
    """Return lines: one for each release, with one column for each level."""
    lines = [["SGLang", *levels]]
    lines += [[version, *_texts(cells, levels)] for version, cells in table.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [map(str.ljust, line, widths) for line in lines]
    head, *body = (" | ".join(line).rstrip() for line in padded)
    return [head, "-|-".join("-" * width for width in widths), *body]


def _texts(cells: Mapping[str, Cell], levels: Sequence[str]) -> list[str]:
    return [cells[level].text if level in cells else "-" for level in levels]


def details(table: Table) -> list[str]:
    """Return lines: every problem, and the reason of every exception."""
    lines = []
    for cell in all_cells(table):
        status, place = cell.verdict.status.value, f"{cell.row.version} {cell.level}"
        lines += [f"{status} {place}: {problem}" for problem in cell.verdict.problems]
        lines += [
            f"excepted {place}: {exception.case}: {exception.reason}"
            for exception in cell.verdict.excepted
        ]
    return lines


def closing_line(table: Table, seconds: float) -> str:
    """Count the cells that are as expected, in the words of pytest."""
    statuses = [cell.verdict.status for cell in all_cells(table)]
    counts = {
        "failed": statuses.count(CellStatus.FAIL),
        "passed": statuses.count(CellStatus.PASS),
        "pending": statuses.count(CellStatus.PENDING),
    }
    shown = [f"{n} {what}" for what, n in counts.items() if n or what == "passed"]
    return f"matrix: {', '.join(shown)} in {seconds:.0f}s"


def as_json(table: Table, environment: Mapping[str, str]) -> str:
    """Return everything, for other programs."""
    releases = {}
    for version, cells in table.items():
        releases[version] = {level: _as_json(cell) for level, cell in cells.items()}
    return json.dumps({"environment": environment, "releases": releases}, indent=1)


def _as_json(cell: Cell) -> dict[str, Any]:
    return {
        "status": cell.verdict.status.value,
        "expected": cell.row.expected[cell.level],
        "seconds": cell.result.seconds,
        "passed": len(cell.result.passed),
        "failed": dict(cell.result.failed),
        "not applicable": dict(cell.result.skipped),
        "excepted": {exception.case: exception.reason for exception in cell.verdict.excepted},
        "problems": list(cell.verdict.problems),
    }


INTRODUCTION = """# The SGLang releases that this package is checked with

Written by `scripts/matrix --write-docs` from its results; `tests/releases.toml` holds what is
expected.

* **contract**: every row of `sglang_musa_ext/upstream` that holds in the release, checked in its
  sources.
* **backend**: the tests of the attention backend and of graph capture, over the release's own
  `FlashAttentionBackend`.
* **engine**: the release's own engine on a CPU with pages of 64 tokens, serving a dense model, one
  with sliding windows and one with multi-head latent attention. Tokens equal those of transformers
  and of the release's own `torch_native` backend, and one plan is computed for each geometry and
  pass.
* **musa**: the release's own engine on a [simulated Moore Threads GPU](simulated-musa.md), with
  decode graphs and nothing else named: a dense model, the same with prefill graphs, sliding
  windows in two models, multi-head latent attention, the same with experts, and a chain of drafts.
  Tokens are transformers', and this package serves on a stand-in of MATE.
* **limits**: servers that are started although a row of [limits](limits.md) names them end, or
  answer wrongly, as the row says. A row that upstream has corrected fails here. Rows that a CPU
  cannot show are looked for in the sources of each release, by `tests/upstream/test_limits.py`.

All of it runs on a CPU, and with the reference kernels but for the column musa and two rows of
limits, which the simulated GPU shows, in one environment:
{environment}.
All of the tests under other Pythons: [pythons](pythons.md).
A test is not applicable where the release lacks the feature that it tests.
"""


@dataclass
class Page:
    """The former docs/releases.md, whose text stays for levels that were not run now."""

    environment: str = ""
    cells: dict[tuple[str, str], str] = field(default_factory=dict)
    """By version and level."""
    exceptions: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Page:
        """Read a page that :func:`markdown` wrote."""
        page = cls()
        levels: list[str] = []
        for line in text.splitlines():
            if line.startswith("Python "):
                page.environment = line.rstrip(".")
            elif line.startswith("| "):
                version, _, _, *texts = [cell.strip() for cell in line.strip("|").split("|")]
                levels = levels or texts
                for level, cell in zip(levels, texts, strict=False):
                    page.cells[version, level] = cell
            elif _level_of_exception(line) in LEVELS:
                page.exceptions.append(line)
        return page

    def texts(self, version: str, cells: Mapping[str, Cell]) -> list[str]:
        """Return the text of each level: of ``cells``, or what this page says.

        Raises:
            MatrixError: neither has one of the levels.
        """
        known = {level: cell for (of, level), cell in self.cells.items() if of == version}
        known |= {level: cell.text for level, cell in cells.items()}
        if missing := [level for level in LEVELS if level not in known]:
            raise MatrixError(
                f"--write-docs needs {', '.join(missing)} of {version}, which neither ran now nor "
                "is in docs/releases.md: leave --level out."
            )
        return [known[level] for level in LEVELS]


def _level_of_exception(line: str) -> str:
    return line.removeprefix("* ").partition(", ")[0]


def markdown(table: Table, environment: Mapping[str, str], former: Page | None = None) -> str:
    """Return the page of the docs.

    It holds no seconds and no date, so that it changes with its facts alone.

    Args:
        table: of this run.
        environment: versions of what all releases run with.
        former: has the levels that were not run now.

    Raises:
        MatrixError: a level is in neither, or the other levels ran in another environment.
    """
    former = former or Page()
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    ran = {cell.level for cell in all_cells(table)}
    if len(ran) < len(LEVELS) and former.environment != versions:
        raise MatrixError(
            f"--write-docs with some levels keeps the others, which ran with {former.environment}; "
            f"here is {versions}. Leave --level out."
        )
    lines = [INTRODUCTION.format(environment=versions)]
    lines.append(f"| SGLang | Python | its PyTorch | {' | '.join(LEVELS)} |")
    lines.append("|---" * (3 + len(LEVELS)) + "|")
    for version, cells in table.items():
        row = next(iter(cells.values())).row
        texts = [version, row.requires_python, row.torch, *former.texts(version, cells)]
        lines.append(f"| {' | '.join(texts)} |")
    exceptions = [line for line in former.exceptions if _level_of_exception(line) not in ran]
    exceptions += _exceptions(table)
    if exceptions:
        lines += ["", "Excepted, each because of the release itself:", "", *exceptions]
    return "\n".join(lines) + "\n"


def _exceptions(table: Table) -> list[str]:
    """Return a line for each exception, with all releases that it is of."""
    versions: dict[tuple[str, ExpectedFailure], list[str]] = {}
    for cell in all_cells(table):
        for exception in cell.verdict.excepted:
            versions.setdefault((cell.level, exception), []).append(cell.row.version)
    return [
        f"* {level}, {', '.join(listed)}: `{exception.case}`. {exception.reason}"
        for (level, exception), listed in versions.items()
    ]


def write(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
