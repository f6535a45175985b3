"""Compare SGLang's sources with the contract."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_musa_ext.upstream.allowances import ALLOWANCES
from sglang_musa_ext.upstream.needs import NEEDS
from sglang_musa_ext.upstream.releases import (
    NEWEST,
    OLDEST,
    Standing,
    Support,
    UpstreamVersionError,
    classify_version,
)
from sglang_musa_ext.upstream.requirement import Requirement
from sglang_musa_ext.upstream.rows import PLUGIN_SUPPORT, REQUIREMENTS
from sglang_musa_ext.upstream.source import SourceTree, Unreadable, collector_paused, listed

SERVING = ("plugin", "attention")
"""Users of the rows that ``fa3`` cannot be served without; others break for themselves."""


@dataclass(frozen=True)
class Violation:
    """One difference between the contract and a SGLang source."""

    requirement: Requirement
    version: str
    seen: str

    def __str__(self) -> str:
        row = self.requirement
        return (
            f"{row.symbol}: needed {_needed(row)}; SGLang {self.version} has {self.seen}. {row.why}"
        )


def _needed(row: Requirement) -> str:
    names = ", ".join(row.parameters)
    only = "nothing but" if row.kind in ALLOWANCES else "with"
    return f"as {row.kind}" + (f" {only} {names}" if names else "")


class UpstreamContractError(RuntimeError):
    """The SGLang at hand is not one that this package can compose with; carries every violation."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        lines = [f"  {number}. {violation}" for number, violation in enumerate(violations, 1)]
        listing = "\n".join(lines)
        super().__init__(
            f"SGLang does not have what sglang-musa-ext relies on ({len(self.violations)} "
            f"differences):\n{listing}\n"
            f"Install a SGLang from {OLDEST} to {NEWEST}, or a newer sglang-musa-ext, or set "
            "SGLANG_MUSA_EXT=off."
        )


def check_upstream(
    source_root: Path | None = None,
    version: str | None = None,
    *,
    used_by: Iterable[str] | None = None,
) -> list[Violation]:
    """Compare a SGLang source with the contract, and return every difference.

    Args:
        source_root: The directory that holds ``sglang/`` (or ``python/sglang/``, as a checkout
            does); ``None``: the installed SGLang, which is found but not imported.
        version: The version the source is taken for; ``None``: what the source or its metadata
            says.
        used_by: Check only the rows of these users; ``None``: all of them.
    """
    package = find_package(source_root)
    if package is None:
        where = "in this environment" if source_root is None else f"below {source_root}"
        return [Violation(PLUGIN_SUPPORT, "?", f"no package sglang {where}")]
    version = read_version(package) if version is None else version
    if classify_version(version).standing is Standing.TOO_OLD:
        # Every row would differ; the version alone says what is wrong.
        seen = f"version {version}, where {OLDEST} or newer is needed"
        return [Violation(PLUGIN_SUPPORT, version, seen)]
    rows = [row for row in REQUIREMENTS if row.holds_in(version)]
    if used_by is not None:
        users = frozenset(used_by)
        rows = [row for row in rows if row.used_by in users]
    with collector_paused():
        return check_rows(rows, SourceTree(package.parent), version)


def require_upstream(
    source_root: Path | None = None, version: str | None = None, *, used_by: Iterable[str] = SERVING
) -> Support:
    """Raise all that :func:`check_upstream` returns at once, else say where the version stands.

    Returns:
        The version's standing; its ``message``, if any, is a warning to be logged.

    Raises:
        UpstreamContractError: carrying every violation.
    """
    violations = check_upstream(source_root, version, used_by=used_by)
    if violations:
        raise UpstreamContractError(violations)
    package = find_package(source_root)
    assert package is not None  # its absence is a violation
    return classify_version(version or read_version(package))


def find_package(source_root: Path | None = None) -> Path | None:
    """Return the directory of the package ``sglang``, or ``None`` if there is none.

    Args:
        source_root: where to look, as in :func:`check_upstream`; ``None``: as installed.
    """
    if source_root is not None:
        candidates = (source_root / "sglang", source_root / "python" / "sglang")
        return next((path for path in candidates if path.is_dir()), None)
    spec = importlib.util.find_spec("sglang")  # a top-level name: finding it imports nothing
    locations = spec.submodule_search_locations if spec is not None else None
    return next((Path(location) for location in locations or ()), None)


def installed_version() -> str | None:
    """Return the version of the SGLang that this process would import; ``None``: not known."""
    try:
        package = find_package()
    except ValueError:  # A module without a spec stands in for SGLang.
        return None
    return None if package is None else read_version(package)


def read_version(package: Path) -> str:
    """Return the version of the SGLang in ``package``, from its source before any metadata.

    Metadata may belong to another copy than the imported one, for example under ``PYTHONPATH``.

    Raises:
        UpstreamVersionError: neither source nor metadata names one.
    """
    written = package / "_version.py"
    if written.is_file():
        for node in ast.parse(written.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = {ast.unparse(target) for target in node.targets}
                if "__version__" in names and isinstance(node.value.value, str):
                    return node.value.value
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise UpstreamVersionError("none found") from None


def check_rows(rows: Iterable[Requirement], tree: SourceTree, version: str) -> list[Violation]:
    """Compare ``rows``, all taken to hold in ``version``, with the sources in ``tree``."""
    violations = []
    for row in _joined(rows):
        seen = _seen(row, tree)
        if seen is not None:
            violations.append(Violation(row, version, seen))
    return violations


def _joined(rows: Iterable[Requirement]) -> list[Requirement]:
    """Return the rows, with the allowances of one symbol added up into its first row."""
    joined: dict[object, Requirement] = {}
    for row in rows:
        key = (row.kind, row.module, row.name) if row.kind in ALLOWANCES else id(row)
        first = joined.get(key, replace(row, parameters=()))
        joined[key] = replace(first, parameters=first.parameters + row.parameters)
    return list(joined.values())


def _seen(row: Requirement, tree: SourceTree) -> str | None:
    """Return what the source has instead of what ``row`` says; ``None`` if they agree."""
    try:
        if row.kind in NEEDS:
            return NEEDS[row.kind](tree, row)
        excess = ALLOWANCES[row.kind](tree, row.module, row.name) - set(row.parameters)
    except Unreadable as error:
        return str(error)
    return f"also {listed(excess)}" if excess else None
