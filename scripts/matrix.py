"""Check this package with every SGLang release that it supports, and say whether all is as
tests/releases.toml expects.

Three levels: "contract" compares the release's sources with sglang_musa_ext/upstream; "backend"
runs the tests of the attention backend over the release's own; "engine" boots the release's engine
on the CPU. The release's wheel is downloaded without its dependencies and unpacked into
.cache/releases (or found below SGLANG_RELEASES), and all releases run in the one environment of
scripts/dev-env. A result holds until this package, its tests or the environment change, so a run
that was interrupted goes on where it was. Results, logs and matrix.json are in .cache/matrix.
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

from matrix_data import (
    LEVELS,
    MatrixError,
    Release,
    Run,
    judge,
    read_releases,
    select,
    select_levels,
)
from matrix_levels import ROOT, fetch, fingerprint, run_level
from matrix_report import (
    Cell,
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

Runner = Callable[[Release, str], Run]


@dataclass(frozen=True)
class Results:
    """The results of former runs, one file each."""

    directory: Path
    fingerprints: Mapping[str, str]
    """Of each level's sources, as they were before the first cell ran."""
    fresh: bool = False

    def load(self, release: Release, level: str) -> Run | None:
        """The result of the same sources, if there is one that is as expected; others may be the
        machine's fault.
        """
        path = self._path(release, level)
        if self.fresh or not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text())
            run = Run(**stored["run"])
        except (ValueError, KeyError, TypeError):
            return None  # It was written by another version of this script.
        if stored["fingerprint"] != self.fingerprints[level] or judge(release, level, run).problems:
            return None
        return run

    def store(self, release: Release, level: str, run: Run) -> None:
        """Keep ``run`` for the next time."""
        write(
            self._path(release, level),
            json.dumps({"fingerprint": self.fingerprints[level], "run": asdict(run)}),
        )

    def _path(self, release: Release, level: str) -> Path:
        return self.directory / f"{release.version}-{level}.json"


def run_matrix(
    releases: Sequence[Release],
    levels: Sequence[str],
    results: Results,
    runner: Runner,
    *,
    jobs: int,
) -> Iterator[tuple[Cell, bool]]:
    """Every cell as it is finished, and whether its result is a former one.

    A result is stored where it is made: an interrupt loses none that was finished, whether it was
    shown or not.
    """

    def run_and_store(release: Release, level: str) -> Run:
        run = runner(release, level)
        results.store(release, level, run)
        return run

    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Run], tuple[Release, str]] = {}
        for level in levels:
            for release in releases:
                former = results.load(release, level)
                if former is not None:
                    yield Cell(release, level, former, judge(release, level, former)), True
                else:
                    running[pool.submit(run_and_store, release, level)] = (release, level)
        try:
            for future in as_completed(running):
                release, level = running[future]
                run = future.result()
                yield Cell(release, level, run, judge(release, level, run)), False
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collect(cells: Iterator[tuple[Cell, bool]], total: int) -> dict[str, dict[str, Cell]]:
    """Print each cell as it comes, and return the table."""
    table: dict[str, dict[str, Cell]] = {}
    for done, (cell, reused) in enumerate(cells, 1):
        print(progress(cell, done, total, reused), flush=True)
        table.setdefault(cell.release.version, {})[cell.level] = cell
    return table


def ordered(
    table: dict[str, dict[str, Cell]], releases: Sequence[Release], levels: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """The same table in the order of releases and levels, not that in which cells were finished."""
    return {one.version: {level: table[one.version][level] for level in levels} for one in releases}


def environment() -> dict[str, str]:
    """What all releases run in here."""
    names = ("torch", "transformers", "triton")
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
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
        help="write docs/releases.md; needs all releases and levels",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 if every expectation held, 1 if not, 2 if it could not be run."""
    options = parse_options(arguments)
    try:
        return check(options)
    except MatrixError as error:
        print(f"scripts/matrix: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> int:
    """Run the selected cells, show them, and say by the exit status whether all are as expected."""
    start = time.monotonic()
    every = read_releases(RELEASES)
    releases, levels = select(every, options.releases), select_levels(options.level)
    if options.write_docs and (len(releases), len(levels)) != (len(every), len(LEVELS)):
        raise MatrixError(
            "--write-docs needs all releases and levels; leave --releases and --level out."
        )
    sources = {release.version: fetched(release) for release in releases}

    def runner(release: Release, level: str) -> Run:
        return run_level(release, level, sources[release.version], CACHE)

    results = Results(
        CACHE / "results", {level: fingerprint(level) for level in levels}, options.fresh
    )
    cells = run_matrix(releases, levels, results, runner, jobs=options.jobs)
    table = ordered(collect(cells, len(releases) * len(levels)), releases, levels)
    write(CACHE / "matrix.json", as_json(table, environment()))
    if options.write_docs:
        write(DOCS, markdown(table, environment()))
    print(
        "",
        *terminal_table(table, levels),
        *details(table),
        closing_line(table, time.monotonic() - start),
        sep="\n",
    )
    return 0 if all(cell.verdict.held for cells in table.values() for cell in cells.values()) else 1


def fetched(release: Release) -> Path:
    """The sources of ``release``; says so when they have to be downloaded."""
    given = os.environ.get("SGLANG_RELEASES")
    if given and (Path(given) / release.version / "sglang").is_dir():
        return Path(given) / release.version
    directory = ROOT / ".cache" / "releases"
    if not (directory / release.version / "sglang").is_dir():
        print(f"downloading SGLang {release.version}", flush=True)
    return fetch(release, directory)


if __name__ == "__main__":
    sys.exit(main())
