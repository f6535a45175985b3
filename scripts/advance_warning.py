"""Say which rows of the upstream contract a SGLang source tree breaks, before there is a release of
it.

The tree is a checkout (with python/sglang), or what a wheel contains (with sglang). It is read and
never imported, so nothing has to be installed. The exit status is 1 if a row is broken, 2 if there
is no SGLang to read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_musa_ext.upstream import (
    NEWEST,
    SERVING,
    Violation,
    check_upstream,
    find_package,
    read_version,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every broken row; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/advance-warning", description=__doc__)
    parser.add_argument("source", type=Path, help="a checkout of SGLang, or an unpacked wheel")
    parser.add_argument(
        "--version", help="the version to take it for (default: its own, else the newest tested)"
    )
    options = parser.parse_args(arguments)
    package = find_package(options.source)
    if package is None:
        print(
            f"scripts/advance-warning: no sglang/ or python/sglang/ in {options.source}",
            file=sys.stderr,
        )
        return 2
    version, reason = (options.version, "as asked") if options.version else own_version(package)
    violations = check_upstream(options.source, version)
    print(
        f"SGLang in {options.source}, taken for {version} ({reason}): {len(violations)} broken "
        "rows of the contract"
    )
    for number, violation in enumerate(violations, 1):
        print(described(number, violation))
    return 1 if violations else 0


def own_version(package: Path) -> tuple[str, str]:
    """The version that the tree states, and that it does; a checkout that was never built states
    none.
    """
    if (package / "_version.py").is_file():
        return read_version(package), "as it says"
    return (
        NEWEST,
        "it names no version, and what comes next has to keep what the newest tested release has",
    )


def described(number: int, violation: Violation) -> str:
    """A broken row: both sides, and what breaks with it."""
    row = violation.requirement
    serving = "fa3 is refused" if row.used_by in SERVING else f"only {row.used_by} is affected"
    return f"{number}. {violation}\n   Until it is followed, {serving}. Remove the row when: {row.remove_when}"


if __name__ == "__main__":
    sys.exit(main())
