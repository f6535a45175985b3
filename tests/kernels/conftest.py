"""A folder in which tests of the kernels install stand-ins of libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_musa_ext.kernels import record
from tests.support.kernel_libraries import (
    LIBRARIES,
    set_gpu,
)


@pytest.fixture(autouse=True)
def silent_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test be the first to be warned of anything."""
    monkeypatch.setattr(record, "_SAID", set())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a folder first on the path; the libraries in question are nowhere else.

    The GPU, if one is asked, is an H100.
    """
    set_gpu(monkeypatch)
    before = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES
    }
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]:
        del sys.modules[name]
    sys.modules.update(before)
