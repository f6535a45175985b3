"""Check this package with every SGLang release that it supports, against tests/releases.toml.

There are five levels. "contract" compares the release's sources with sglang_musa_ext/upstream;
"backend" runs the tests of the attention backend over the release's own backend; "engine" boots the
release's engine on the CPU; "musa" boots it on a simulated Moore Threads GPU; "limits" shows in
running servers what sglang_musa_ext/upstream/limits.py says of the release. The release's wheel is
downloaded without its dependencies and unpacked into .cache/releases (or found below
SGLANG_RELEASES), and all releases run in the one environment of scripts/dev-env. A result holds
until this package, its tests or the environment change, so an interrupted run continues where it
stopped. Results, logs and matrix.json are in .cache/matrix.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from .data import (
    LEVELS,
    LevelResult,
    MatrixError,
    MatrixRow,
    judge,
    read_rows,
    select_levels,
    select_rows,
    split_by_python,
)
from .levels import ROOT, fetch, fingerprint, run_level
from .report import (
    Cell,
    Page,
    all_cells,
    as_json,
    closing_line,
    details,
    markdown,
    progress,
    terminal_table,
    write,
)

CACHE = ROOT / ".cache" / "matrix"
DOCS = ROOT / "docs" / "releases.md"
RELEASES = ROOT / "tests" / "releases.toml"

LevelRunner = Callable[[MatrixRow, str], LevelResult]


@dataclass(frozen=True)
class StoredResults:
    """The results of former runs, one file each."""

    directory: Path
    fingerprints: Mapping[str, str]
    """Of each level's sources, as they were before the first cell ran."""
    fresh: bool = False

    def load(self, row: MatrixRow, level: str) -> LevelResult | None:
        """Return the result of the same sources, or None.

        A result that is not as expected is not returned: it may have been the machine's fault.
        """
        path = self._path(row, level)
        if self.fresh or not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text())
            result = LevelResult(**stored["run"])
        except (ValueError, KeyError, TypeError):
            return None  # It was written by another version of this script.
        same_sources = stored["fingerprint"] == self.fingerprints[level]
        return result if same_sources and not judge(row, level, result).problems else None

    def store(self, row: MatrixRow, level: str, result: LevelResult) -> None:
        """Keep ``result`` for the next time."""
        content = {"fingerprint": self.fingerprints[level], "run": asdict(result)}
        write(self._path(row, level), json.dumps(content))

    def _path(self, row: MatrixRow, level: str) -> Path:
        return self.directory / f"{row.version}-{level}.json"


def run_matrix(
    rows: Sequence[MatrixRow],
    levels: Sequence[str],
    stored: StoredResults,
    run: LevelRunner,
    *,
    jobs: int,
) -> Iterator[tuple[Cell, bool]]:
    """Yield every cell as it is finished, and True if its result is a former one.

    A result is stored where it is made, so an interrupt loses none that was finished.
    """

    def run_and_store(row: MatrixRow, level: str) -> LevelResult:
        result = run(row, level)
        stored.store(row, level, result)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[LevelResult], tuple[MatrixRow, str]] = {}
        for level in levels:
            for row in rows:
                former = stored.load(row, level)
                if former is not None:
                    yield judged(row, level, former), True
                else:
                    running[pool.submit(run_and_store, row, level)] = (row, level)
        try:
            for future in as_completed(running):
                yield judged(*running[future], future.result()), False
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def judged(row: MatrixRow, level: str, result: LevelResult) -> Cell:
    """Return the cell of ``result``, compared with its expectation."""
    return Cell(row, level, result, judge(row, level, result))


def collect(cells: Iterator[tuple[Cell, bool]], total: int) -> dict[str, dict[str, Cell]]:
    """Print each cell as it comes, and return them by version and level."""
    table: dict[str, dict[str, Cell]] = {}
    for done, (cell, reused) in enumerate(cells, 1):
        print(progress(cell, done, total, reused), flush=True)
        table.setdefault(cell.row.version, {})[cell.level] = cell
    return table


def in_order(
    table: dict[str, dict[str, Cell]], rows: Sequence[MatrixRow], levels: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """Return the table in the order of releases and levels, not that of finishing."""
    ordered: dict[str, dict[str, Cell]] = {}
    for row in rows:
        cells = table[row.version]
        ordered[row.version] = {level: cells[level] for level in levels}
    return ordered


def environment() -> dict[str, str]:
    """Return the versions that all releases run with here."""
    versions = {"Python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        versions[name] = importlib.metadata.version(name)
    return versions


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--releases", default="", metavar="LIST", help="such as 0.5.21,newest (default: all)"
    )
    parser.add_argument(
        "--level", default="", metavar="LIST", help=f"of {', '.join(LEVELS)} (default: all)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="cells at once (%(default)s here)",
    )
    parser.add_argument("--fresh", action="store_true", help="run what has a result already, too")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write docs/releases.md; needs all releases, and keeps its levels that did not run",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 0 if all is as expected, 1 if not, 2 if it cannot be run."""
    options = parse_options(arguments)
    try:
        return check(options)
    except MatrixError as error:
        print(f"scripts/matrix: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> int:
    """Run and show the selected cells; return 0 if all are as expected, else 1."""
    start = time.monotonic()
    every, left_out = split_by_python(read_rows(RELEASES), platform.python_version())
    for row in left_out:
        print(f"left out: SGLang {row.version}, which needs Python {row.requires_python}")
    rows, levels = select_rows(every, options.releases), select_levels(options.level)
    if options.write_docs and (left_out or len(rows) != len(every)):
        raise MatrixError(
            "--write-docs needs all releases: leave --releases out, and take Python 3.11 or newer."
        )
    sources = {row.version: sources_of(row.version) for row in rows}

    def run(row: MatrixRow, level: str) -> LevelResult:
        return run_level(row, level, sources[row.version], CACHE)

    fingerprints = {level: fingerprint(level) for level in levels}
    stored = StoredResults(CACHE / "results", fingerprints, options.fresh)
    cells = run_matrix(rows, levels, stored, run, jobs=options.jobs)
    table = in_order(collect(cells, len(rows) * len(levels)), rows, levels)
    write(CACHE / "matrix.json", as_json(table, environment()))
    if options.write_docs:
        former = Page.parse(DOCS.read_text()) if DOCS.is_file() else Page()
        write(DOCS, markdown(table, environment(), former))
    last = closing_line(table, time.monotonic() - start)
    print("", *terminal_table(table, levels), *details(table), last, sep="\n")
    return 0 if all(cell.verdict.as_expected for cell in all_cells(table)) else 1


def sources_of(version: str) -> Path:
    """Return the directory with the release's ``sglang/``; say so if it must be downloaded."""
    given = os.environ.get("SGLANG_RELEASES")
    if given and (Path(given) / version / "sglang").is_dir():
        return Path(given) / version
    directory = ROOT / ".cache" / "releases"
    if not (directory / version / "sglang").is_dir():
        print(f"downloading SGLang {version}", flush=True)
    return fetch(version, directory)


if __name__ == "__main__":
    sys.exit(main())
