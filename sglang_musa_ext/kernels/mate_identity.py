"""Identify the installed MATE from metadata and files on disk, without importing any of it.

Public package indexes have an unrelated distribution called ``mate``, and NVIDIA's FlashAttention-3
has the distribution name and the module name of Moore Threads' wrapper. So a name or a version
proves nothing here: ``mate`` has to contain MATE's attention interface, and the wrapper has to be
written on top of ``mate``.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution
from pathlib import Path
from typing import NamedTuple

from sglang_musa_ext.policy import MATE_RELEASES, NEWEST_MATE, NEWEST_READ_MATE, OLDEST_MATE

INSTALL = (
    "Install MATE and its flash_attn_3 wrapper of the same version from Moore Threads' own package "
    "index, with --no-deps (never 'mate' from a public index, which is another project)."
)

_VENDOR = re.compile(r"moore\s*threads|\bmusa\b", re.IGNORECASE)
_VENDOR_FIELDS = (
    "Summary",
    "Author",
    "Author-email",
    "Maintainer",
    "Maintainer-email",
    "Home-page",
    "Project-URL",
)


class Generation(NamedTuple):
    """One generation of the FlashAttention-3 wrapper over MATE."""

    distribution: str
    module: str
    """The module that has the functions of FA3."""


CURRENT = Generation("flash_attn_3", "flash_attn_interface")
LEGACY = Generation("mate-flash-attention", "flash_attn")
GENERATIONS = (CURRENT, LEGACY)


class Problem(NamedTuple):
    """One fault of an installation."""

    seen: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen} Expected: {self.expected} {self.remedy}"


@dataclass(frozen=True)
class MateIdentity:
    """The packages installed under the names of MATE and of its wrapper."""

    distribution: str | None = None
    """The distribution of the module ``mate``; ``None`` without a module or an owner."""
    version: str | None = None
    location: str | None = None
    """The file or folder of the module ``mate``."""
    wrapper: str | None = None
    """The wrapper's generation: ``flash_attn_3``, ``mate-flash-attention`` or ``None``."""
    wrapper_module: str | None = None
    """The module to import the functions from."""
    wrapper_distribution: str | None = None
    """The distribution that the wrapper's module belongs to."""
    wrapper_version: str | None = None
    wrapper_location: str | None = None
    problems: tuple[Problem, ...] = ()
    """Reasons against using these; empty if they are Moore Threads'."""
    warnings: tuple[Problem, ...] = ()
    """Unusual facts, with which it may still work."""

    @property
    def release(self) -> tuple[int, ...]:
        """Return MATE's release, or if unknown the first or newest with this wrapper."""
        return self.known_release or NEWEST_MATE

    @property
    def known_release(self) -> tuple[int, ...] | None:
        """Return MATE's release, the first one for its old wrapper, or ``None`` if unknown."""
        known = _release(self.version)
        if known is None and self.wrapper == LEGACY.distribution:
            return OLDEST_MATE
        return known


def identify_mate() -> MateIdentity:
    """Identify ``mate`` and its wrapper; import neither, and raise for nothing that is there."""
    mate = _find("mate")
    generation, wrapper = _find_wrapper()
    owner = _owner("mate", mate)
    wrapper_owner = _owner(generation.module, wrapper) if generation else None
    problems = [
        *_problems_of_mate(mate, owner),
        *_problems_of_wrapper(generation, wrapper, wrapper_owner),
    ]
    version, wrapper_version = _version(owner), _version(wrapper_owner)
    warnings: list[Problem] = []
    if not problems:
        problems += _misfits(generation, version)
        warnings += _oddities(generation, version, wrapper_version)
    return MateIdentity(
        distribution=_name(owner),
        version=version,
        location=_location(mate),
        wrapper=generation.distribution if generation else None,
        wrapper_module=generation.module if generation else None,
        wrapper_distribution=_name(wrapper_owner),
        wrapper_version=wrapper_version,
        wrapper_location=_location(wrapper),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def is_wrapper(module: str) -> bool:
    """Return whether a top-level module is there and written on ``mate``, without importing it."""
    spec = _find(module)
    return spec is not None and _is_over_mate(spec)


# --- what is right --------------------------------------------------------------------------------


def _problems_of_mate(spec: ModuleSpec | None, owner: Distribution | None) -> Iterator[Problem]:
    if spec is None:
        yield Problem(
            "MATE is not installed: there is no module 'mate'.", "Moore Threads' MATE.", INSTALL
        )
        return
    missing = [name for name in ("mate.mha_interface", "mate.jit") if _inside(spec, name) is None]
    # MATE says whose it is in its metadata, or shows it by its just-in-time compiler; its interface
    # it always has.
    if "mate.mha_interface" in missing or (missing and not _is_vendors(owner)):
        yield Problem(
            f"The module 'mate' at {_location(spec)} is not Moore Threads' MATE: it has no "
            f"{_quoted(missing)}. {_said(owner)}",
            "a 'mate' with MATE's attention interface, 'mate.mha_interface'.",
            f"Uninstall it (pip uninstall {_name(owner) or 'mate'}). {INSTALL}",
        )


def _problems_of_wrapper(
    generation: Generation | None, spec: ModuleSpec | None, owner: Distribution | None
) -> Iterator[Problem]:
    if generation is None or spec is None:
        yield Problem(
            "MATE's FlashAttention-3 wrapper is not installed: there is no module "
            "'flash_attn_interface'.",
            "the module 'flash_attn_interface' of Moore Threads' distribution flash_attn_3.",
            INSTALL,
        )
    elif not _is_over_mate(spec):
        yield Problem(
            f"The module {generation.module!r} at {_location(spec)} is not Moore Threads' wrapper: "
            f"nothing in it imports 'mate'. {_said(owner)}",
            "a wrapper that calls MATE's kernels.",
            f"Uninstall it (pip uninstall {_name(owner) or generation.distribution}). {INSTALL}",
        )


def _misfits(generation: Generation | None, version: str | None) -> Iterator[Problem]:
    """Releases that cannot work, for what their sources say."""
    release = _release(version)
    if release is None:
        return
    if release < OLDEST_MATE:
        yield Problem(
            f"MATE {version} is too old.", f"MATE {_dotted(OLDEST_MATE)} or newer.", INSTALL
        )
    elif generation == LEGACY and release >= (0, 2):
        # It passes an argument that MATE 0.2 removed: each call of varlen attention is a TypeError.
        yield Problem(
            f"MATE {version} is installed with the wrapper of MATE 0.1, {LEGACY.distribution}.",
            f"the wrapper {CURRENT.distribution}.",
            f"pip uninstall {LEGACY.distribution}. {INSTALL}",
        )
    elif generation == CURRENT and release <= (0, 1, 3):
        # It passes MATE's varlen attention page_table and out, which MATE 0.1.3 does not have.
        yield Problem(
            f"MATE {version} is installed with the wrapper of MATE 0.2, {CURRENT.distribution}.",
            "MATE 0.2 or newer with this wrapper.",
            INSTALL,
        )


def _oddities(
    generation: Generation | None, version: str | None, wrapper_version: str | None
) -> Iterator[Problem]:
    """Yield what to mention of an installation that is Moore Threads' and may work."""
    release, wrapper = _release(version), _release(wrapper_version)
    if release is None:
        yield Problem(
            "No distribution says which version of MATE this is.",
            f"a version from {_dotted(OLDEST_MATE)} to {_dotted(NEWEST_MATE)}.",
            "Install MATE as a package rather than by a search path, so that its version can be "
            "checked.",
        )
    elif release[:3] > NEWEST_MATE:
        yield Problem(
            f"MATE {version} is newer than what this package knows.",
            f"a version from {_dotted(OLDEST_MATE)} to {_dotted(NEWEST_MATE)} (the sources "
            f"of {sources_read()} were read).",
            "Check its numbers with sglang-musa-ext validate before you rely on it.",
        )
    # From 0.2.1 on the wrapper is released with MATE and asks for the very same version.
    if (
        release
        and wrapper
        and generation == CURRENT
        and wrapper >= (0, 2, 1)
        and wrapper[:3] != release[:3]
    ):
        yield Problem(
            f"MATE {version} is installed with the wrapper {CURRENT.distribution} "
            f"{wrapper_version}.",
            "the same version of both.",
            INSTALL,
        )
    if generation == CURRENT and _distribution(LEGACY.distribution) is not None:
        yield Problem(
            f"The wrapper of MATE 0.1, {LEGACY.distribution}, is installed beside "
            f"{CURRENT.distribution}.",
            f"{CURRENT.distribution} alone.",
            f"pip uninstall {LEGACY.distribution}.",
        )


def _is_vendors(owner: Distribution | None) -> bool:
    """Return whether a distribution's own metadata name Moore Threads or MUSA."""
    if owner is None:
        return False
    return any(
        _VENDOR.search(value)
        for field in _VENDOR_FIELDS
        for value in owner.metadata.get_all(field) or ()
    )


def _is_over_mate(spec: ModuleSpec) -> bool:
    """Return whether the module, or one of its package that it imports, imports ``mate``."""
    pending, seen = [spec], set[str]()
    while pending:
        module = pending.pop()
        if module.name in seen:
            continue
        seen.add(module.name)
        for name in _imported(module):
            root = name.partition(".")[0]
            if root == "mate":
                return True
            if root in (spec.name, CURRENT.distribution):
                pending += _chain(name)
    return False


# --- what is there --------------------------------------------------------------------------------


def _find_wrapper() -> tuple[Generation | None, ModuleSpec | None]:
    """Return the newest generation whose module is there, preferably one over MATE."""
    candidates = [(item, spec) for item in GENERATIONS if (spec := _find(item.module)) is not None]
    ours = [(item, spec) for item, spec in candidates if _is_over_mate(spec)]
    # NVIDIA's FlashAttention-2 is called flash_attn too: without MATE in it, it does not count.
    foreign = [(item, spec) for item, spec in candidates if item != LEGACY]
    return next(iter([*ours, *foreign]), (None, None))


def _find(name: str) -> ModuleSpec | None:
    """The top-level module ``name``, as an import would find it."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # Something put a module there by hand: it has no file to judge it by.
        return None


def _inside(package: ModuleSpec, name: str) -> ModuleSpec | None:
    """Return the module ``name`` directly inside ``package``, importing neither."""
    places = package.submodule_search_locations
    return PathFinder.find_spec(name, list(places)) if places else None


def _chain(name: str) -> Iterator[ModuleSpec]:
    """Yield the modules along the dotted ``name``, up to what is an attribute and no module."""
    first, *parts = name.split(".")
    spec = _find(first)
    for part in parts:
        if spec is None:
            return
        yield spec
        spec = _inside(spec, f"{spec.name}.{part}")
    if spec is not None:
        yield spec


def _imported(spec: ModuleSpec) -> Iterator[str]:
    """Dotted names of what the module imports; nothing where its source cannot be read."""
    if not spec.origin or not spec.origin.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    package = spec.name if spec.submodule_search_locations else spec.name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            origin = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _location(spec: ModuleSpec | None) -> str | None:
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _owner(module: str, spec: ModuleSpec | None) -> Distribution | None:
    """The distribution that the module's files belong to."""
    place = _location(spec)
    if place is None:
        return None
    usual = {"mate": "mate", **{item.module: item.distribution for item in GENERATIONS}}[module]
    path = Path(place).resolve()
    named = [item for item in importlib.metadata.distributions(name=usual) if _name(item)]
    for distribution in named:
        if _contains(distribution, path) or _checkout(distribution) in path.parents:
            return distribution
    # Some installers leave no list of files behind.
    unlisted = (
        item for item in named if item.read_text("RECORD") is None and _root(item) in path.parents
    )
    # Most are elsewhere, which is known sooner than their names.
    anybody = (
        item for item in importlib.metadata.distributions() if _contains(item, path) and _name(item)
    )
    return next(unlisted, None) or next(anybody, None)


def _contains(distribution: Distribution, path: Path) -> bool:
    """Return whether a distribution's list of files has ``path``, or a file in that folder."""
    root = _root(distribution)
    if root not in path.parents:
        return False
    relative = path.relative_to(root).as_posix()
    record = distribution.read_text("RECORD") or ""
    return any(line.startswith((f"{relative},", f"{relative}/")) for line in record.splitlines())


def _root(distribution: Distribution) -> Path:
    return Path(str(distribution.locate_file(""))).resolve()


def _checkout(distribution: Distribution) -> Path | None:
    """The folder that an editable installation points to."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    editable = origin.get("dir_info", {}).get("editable")
    return Path(origin["url"].removeprefix("file://")).resolve() if editable else None


def _distribution(name: str) -> Distribution | None:
    return next(iter(importlib.metadata.distributions(name=name)), None)


def _name(distribution: Distribution | None) -> str | None:
    return next(iter(distribution.metadata.get_all("Name") or ()), None) if distribution else None


def _version(distribution: Distribution | None) -> str | None:
    return distribution.version if distribution else None


def _said(owner: Distribution | None) -> str:
    if owner is None:
        return "No installed distribution claims it."
    return f"It belongs to the distribution {_name(owner)!r}, version {owner.version!r}."


def _release(version: str | None) -> tuple[int, ...] | None:
    """The numbers of a version: ``(0, 2, 7)`` of ``0.2.7+musa``; ``None`` where it has none."""
    numbers = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, numbers.group().split("."))) if numbers else None


def sources_read() -> str:
    """List the releases whose sources the adapter was written against."""
    return ", ".join(_dotted(release) for release in MATE_RELEASES if release <= NEWEST_READ_MATE)


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _quoted(names: list[str]) -> str:
    return " and no ".join(map(repr, names))
