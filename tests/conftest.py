"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext import envs
from tests.support.engine import EngineServer
from tests.support.plan_table import NOTED, PlanCounts, plan_table, replace_table
from tests.support.warm import WarmPython
from tests.support.wheels import build_wheel

_SETTINGS = (
    envs.MODE,
    envs.KERNELS,
    envs.MLA_WORKSPACE_MB,
    envs.CHECK,
    envs.FORCE_UPDATE_METADATA,
    "SGLANG_PLATFORM",
    "SGLANG_PLUGINS",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the engine tests write the table in docs/plans.md, or run under a check."""
    parser.addoption(
        "--write-plans",
        metavar="FILE",
        type=Path,
        help="put the table of plans per engine into FILE",
    )
    parser.addoption(
        "--engine-check", metavar="CHECK", help=f"run every engine under {envs.CHECK}=CHECK"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Forget the settings of the shell that started the tests: a test chooses its own."""
    for variable in _SETTINGS:
        os.environ.pop(variable, None)
    # Tensors are small, and every core has a process of its own: PyTorch's threads would only wait
    # for one another, in this process and in those that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if check := config.getoption("--engine-check"):
        os.environ[envs.CHECK] = check


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that boot engines, the largest first, then those of fewest tests, which
    are the ones that start processes. The last ones are quick, so that no process is left with a
    long one when the others have nothing to do.
    """
    booting = {item.path for item in items if item.get_closest_marker("engine")}
    counts = Counter(item.path for item in items)

    def turn(item: pytest.Item) -> tuple[bool, int, Path]:
        is_quick = item.path not in booting
        return is_quick, counts[item.path] * (1 if is_quick else -1), item.path

    items.sort(key=turn)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(
        repository, tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    )


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """A process that has imported SGLang and boots engines in forks of itself."""
    server = EngineServer(tmp_path_factory.mktemp("engines"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """A Python that runs commands without importing SGLang's libraries again for each."""
    python = WarmPython(tmp_path_factory.mktemp("warm"))
    yield python
    python.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what the engines of this worker computed to the process that reports."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["plans"] = [asdict(counts) for counts in NOTED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what the engines of a worker computed; one that died has sent nothing."""
    sent = getattr(node, "workeroutput", {}).get("plans", [])
    NOTED.extend(PlanCounts(**counts) for counts in sent)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what the engines computed, if any ran; keep it where ``--write-plans`` says."""
    lines = plan_table(NOTED)
    if not lines:
        return
    terminalreporter.section("plans per engine")
    for line in lines:
        terminalreporter.write_line(line)
    if kept := config.getoption("--write-plans"):
        replace_table(kept, lines)
