"""The release that is stood in for; the site folder's build writes its version here."""

from __future__ import annotations

__version__ = "0.2.7"

RELEASE = tuple(int(part) for part in __version__.split("."))
