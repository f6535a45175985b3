"""SGLang's releases: those that this package is tested with, and where a version stands to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class UpstreamVersionError(ValueError):
    """A SGLang version that cannot be ordered among the releases."""

    def __init__(self, version: str) -> None:
        self.version = version
        super().__init__(
            f"SGLang's version {version!r} cannot be read. Expected something like 0.5.21, "
            "0.5.15.post1 or 0.5.24.dev3+g1a2b3c4. Install a released SGLang, or name the version "
            "to check against."
        )


_VERSION = re.compile(
    r"v?(\d+)\.(\d+)\.(\d+)(?:\.?(a|b|rc)(\d+))?(?:\.post(\d+))?(?:\.dev(\d+))?(?:\+[a-z0-9.]+)?",
    re.IGNORECASE,
)
_NO_SUFFIX = "~"  # sorts after "a", "b" and "rc": a release comes after its candidates
_NOT_DEV = 2**31

_VersionKey = tuple[tuple[int, int, int], tuple[str, int], int, int]


def version_key(version: str) -> _VersionKey:
    """Return a key that orders SGLang's versions as PEP 440 does, local suffixes ignored.

    Raises:
        UpstreamVersionError: ``version`` has none of the forms that SGLang uses.
    """
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise UpstreamVersionError(version)
    major, minor, patch, letter, candidate, post, dev = match.groups()
    # 0.5.24.dev3 comes before 0.5.24rc1: an otherwise bare development version sorts as "".
    unnamed = "" if dev and not post else _NO_SUFFIX
    return (
        (int(major), int(minor), int(patch)),
        (letter.lower(), int(candidate)) if letter else (unnamed, 0),
        int(post) if post else -1,
        int(dev) if dev else _NOT_DEV,
    )


@dataclass(frozen=True)
class Release:
    """A SGLang release that this package is tested with, by its own metadata."""

    version: str
    requires_python: str
    torch: str
    """The PyTorch that the release pins; the vendor's build of it may carry a local suffix."""


SUPPORTED_RELEASES = (
    Release("0.5.11", ">=3.10", "2.11.0"),
    Release("0.5.12.post1", ">=3.10", "2.11.0"),
    Release("0.5.13.post1", ">=3.10", "2.11.0"),
    Release("0.5.14", ">=3.10", "2.11.0"),
    Release("0.5.15.post1", ">=3.10", "2.11.0"),
    Release("0.5.16", ">=3.10", "2.11.0"),
    Release("0.5.17", ">=3.10", "2.11.0"),
    Release("0.5.18", ">=3.10", "2.13.0"),
    Release("0.5.19", ">=3.10", "2.13.0"),
    Release("0.5.20", ">=3.10", "2.13.0"),
    Release("0.5.21", ">=3.10", "2.13.0"),
    Release("0.5.22", ">=3.11", "2.14.1"),
    Release("0.5.23", ">=3.11", "2.14.1"),
)
"""One row for each minor release, oldest first."""

OLDEST, NEWEST = SUPPORTED_RELEASES[0].version, SUPPORTED_RELEASES[-1].version


class Standing(Enum):
    """The place of a SGLang version relative to :data:`SUPPORTED_RELEASES`."""

    TOO_OLD = "too old"
    TESTED = "tested"
    BETWEEN = "inside the tested range"
    NEWER = "newer than tested"


@dataclass(frozen=True)
class Support:
    """The answer of :func:`classify_version`; ``message`` is empty if there is nothing to say."""

    version: str
    standing: Standing
    message: str = ""


def classify_version(version: str) -> Support:
    """Say whether ``version`` is too old, tested, inside the tested range, or newer than tested."""
    key = version_key(version)
    if key < version_key(OLDEST):
        return Support(version, Standing.TOO_OLD, _too_old(version))
    if key > version_key(NEWEST):
        return Support(version, Standing.NEWER, _newer(version))
    tested = any(key == version_key(release.version) for release in SUPPORTED_RELEASES)
    return Support(version, Standing.TESTED if tested else Standing.BETWEEN)


def _too_old(version: str) -> str:
    unknown = ""
    if version.startswith("0.0.0"):
        unknown = (
            "0.0.0 is what a checkout without tags calls itself: fetch its tags and reinstall it, "
            "or "
        )
    return (
        f"SGLang {version} is too old: expected {OLDEST} or newer, the first with a plugin loader. "
        f"To go on, {unknown}install a release from {OLDEST} to {NEWEST}."
    )


def _newer(version: str) -> str:
    return (
        f"SGLang {version} is newer than what sglang-musa-ext is tested with ({OLDEST} to "
        f"{NEWEST}). Every symbol it relies on was found, so it goes on; if something is wrong, "
        f"compare with SGLang {NEWEST}."
    )
