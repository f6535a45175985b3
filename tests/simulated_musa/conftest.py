"""The simulated GPU for this folder's tests, which skip with a reason where it is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulated_musa import build
from tests.support.engine import EngineServer


@pytest.fixture(scope="session")
def musa_environment() -> dict[str, str]:
    """The variables of a process on the simulated GPU, with nothing asked of this package."""
    try:
        return build.environment()
    except build.SimulationUnavailable as reason:
        pytest.skip(f"no simulated GPU here: {reason}")


@pytest.fixture(scope="session")
def musa(
    tmp_path_factory: pytest.TempPathFactory, musa_environment: dict[str, str]
) -> Iterator[EngineServer]:
    """A process with SGLang on the simulated GPU, which boots engines in forks of itself."""
    server = EngineServer(tmp_path_factory.mktemp("musa"), musa_environment)
    yield server
    server.close()
