"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_musa_ext import envs

_SETTINGS = (
    envs.MODE,
    envs.KERNELS,
    envs.MLA_WORKSPACE_MB,
    envs.CHECK,
    envs.FORCE_UPDATE_METADATA,
    "SGLANG_PLATFORM",
    "SGLANG_PLUGINS",
)


def pytest_configure() -> None:
    """Forget the settings of the shell that started the tests: a test chooses its own."""
    for variable in _SETTINGS:
        os.environ.pop(variable, None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
