"""The sources of SGLang's releases, where ``SGLANG_RELEASES`` says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def find_release(version: str) -> Path | None:
    """Return the folder that holds a release's ``sglang/``; ``None``: it is not at hand."""
    given = os.environ.get("SGLANG_RELEASES")
    if not given or not (Path(given) / version / "sglang").is_dir():
        return None
    return Path(given) / version


def require_release(version: str) -> Path:
    """Return the folder that holds a release's ``sglang/``, or skip the test."""
    folder = find_release(version)
    if folder is None:
        pytest.skip(f"SGLANG_RELEASES names no directory with {version}/sglang")
    return folder
