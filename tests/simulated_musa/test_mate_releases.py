"""Engines on stand-ins of MATE's older releases, each with what that release drops or refuses."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from sglang_musa_ext.engines.ports import held_port
from tests.simulated_musa import build, cases
from tests.simulated_musa.cases import CASES, MusaCase, run_case
from tests.support.engine import EngineFailed, EngineServer

pytestmark = pytest.mark.engine

RELEASES = (
    pytest.param("0.1.3", marks=pytest.mark.long),
    pytest.param("0.2.0", marks=pytest.mark.long),
    pytest.param("0.2.1", marks=pytest.mark.long),
    "0.2.2",
)
"""Those whose source the stand-in follows where they differ from the newest. Each takes another
process with SGLang; how each is called is tested in tests/kernels, too.
"""
ASKED = ("Gemma-2", "MLA")
"""Windows and softcap, paged and over raw keys; and plans in a workspace."""


@pytest.fixture(params=RELEASES, scope="module")
def older(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    musa_environment: dict[str, str],
) -> Iterator[tuple[str, EngineServer]]:
    """A release of MATE, and a process that has imported SGLang beside it."""
    release: str = request.param
    environment = build.environment(mate=release)
    server = EngineServer(tmp_path_factory.mktemp(f"mate-{release}"), environment)
    yield release, server
    server.close()


def _case(name: str) -> MusaCase:
    (case,) = (case for case in CASES if case.name == name)
    return case


@pytest.mark.parametrize("name", ASKED)
def test_tokens_are_transformers(older: tuple[str, EngineServer], name: str) -> None:
    """Every token is right on this release, and this package serves on it."""
    release, server = older
    case = _case(name)
    run = run_case(server, case)
    cases.require_right_tokens(server, case, run)
    cases.require_ours_on_mate(run)
    versions = {report["versions"]["mate"] for report in run.reports[-1]}
    assert versions == {release}


def test_nodes_with_two_releases_of_mate_stop(
    older: tuple[str, EngineServer], musa: EngineServer
) -> None:
    """Two nodes of different releases end before weights are loaded; both name the releases."""
    release, server = older
    with held_port() as port, ThreadPoolExecutor(2) as threads:
        nodes = [
            threads.submit(_end_of_node, which, rank, port)
            for rank, which in enumerate((musa, server))
        ]
        ends = [node.result() for node in nodes]
    for end in ends:
        assert isinstance(end, EngineFailed)
        assert "RanksDisagreeError" in end.log
        assert f"MATE: {build.NEWEST_MATE} (rank 0 on " in end.log
        assert f"{release} (rank 1 on " in end.log
        assert "Load weight begin" not in end.log


def _end_of_node(server: EngineServer, rank: int, port: int) -> Any:
    arguments = {
        "tp_size": 2,
        "nnodes": 2,
        "node_rank": rank,
        "dist_init_addr": f"127.0.0.1:{port}",
    }
    case = _case("Llama")
    asked = replace(case, arguments={**case.arguments, **arguments})
    try:
        return run_case(server, asked, environ={"SGLANG_MUSA_EXT": "on"})
    except EngineFailed as failure:
        return failure
