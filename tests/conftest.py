"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_musa_ext import envs

from .engine import EngineServer, summary_table

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


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """A process that has imported SGLang and boots engines in forks of itself."""
    server = EngineServer(tmp_path_factory.mktemp("engines"))
    yield server
    server.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the engines computed, if any ran."""
    if lines := summary_table():
        terminalreporter.section("plans per engine")
        for line in lines:
            terminalreporter.write_line(line)
