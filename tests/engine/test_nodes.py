"""Two nodes on one machine, over gloo: an engine on each, and what stops them before weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext import envs, ranks
from sglang_musa_ext.engines.ports import held_port
from tests.support.answers import require_tokens_of_transformers
from tests.support.engine import EngineCase, EngineFailed, EngineServer, Request
from tests.support.tiny_models import llama, tokens

pytestmark = pytest.mark.engine

PROMPT = Request(tokens(100, seed=3))
ON = {envs.MODE: "on"}
WAITS = 8.0
"""Seconds for the notes of other ranks, where a rank stays silent on purpose."""


def wait_briefly() -> None:
    ranks.SECONDS["on"] = WAITS


def be_another_version() -> None:
    vars(ranks)["__version__"] = "0.0.1"


def have_another_mate() -> None:
    original = ranks.own_note

    def own_note(runner: Any, settings: Any) -> ranks.Note:
        note = original(runner, settings)
        return replace(note, facts={**note.facts, "MATE": "0.2.2"})

    vars(ranks)["own_note"] = own_note


def node(model: Path, rank: int, address: str, arguments: Mapping[str, Any]) -> EngineCase:
    both = {"tp_size": 2, "nnodes": 2, "node_rank": rank, "dist_init_addr": address}
    return EngineCase(
        model,
        phases=((PROMPT,),),
        arguments=both | dict(arguments),
        environ=ON | {"SGLANG_CPU_OMP_THREADS_BIND": str(rank)},
        before_boot=wait_briefly,
    )


def boot(engines: EngineServer, first: EngineCase, second: EngineCase) -> list[Any]:
    """Boot both nodes at once; returns what each gave, a run or a failure."""

    def run(case: EngineCase) -> Any:
        try:
            return engines.run(case, timeout=90)
        except EngineFailed as failure:
            return failure

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, [first, second]))


def pair(engines: EngineServer, port: int, **second: Any) -> tuple[EngineCase, EngineCase]:
    """Two nodes that differ in what ``second`` says: fields of the second's case."""
    model = engines.model(llama())
    address = f"127.0.0.1:{port}"
    arguments = second.pop("arguments", {})
    return node(model, 0, address, {}), replace(node(model, 1, address, arguments), **second)


def test_two_nodes_answer_like_transformers(engines: EngineServer) -> None:
    """Alike, they serve: tokens equal transformers', whatever the second node ends with."""
    with held_port() as port:
        first, second = pair(engines, port)
        run, _ = boot(engines, first, second)
    assert not isinstance(run, EngineFailed), run
    require_tokens_of_transformers(engines, run.outputs, [PROMPT], llama())


NOT_LOADED = {"SGLANG_PLUGINS": "musa_reference", envs.MODE: "auto"}
"""The platform alone, so that there is a device: SGLang then serves the node without this package.
"""

SILENT = "rank 1 (--node-rank 1; its host is not known here)"


@pytest.mark.parametrize(
    ("second", "expected", "speaking"),
    [
        ({"arguments": {"page_size": 128}}, "--page-size: 64 (rank 0 on ", 2),
        ({"before_boot": be_another_version}, "sglang-musa-ext: ", 2),
        ({"before_boot": have_another_mate}, "MATE: none (rank 0 on ", 2),
        ({"environ": NOT_LOADED}, SILENT, 1),
        ({"environ": {envs.MODE: "off"}}, SILENT, 1),
    ],
    ids=[
        "another page size",
        "another version",
        "another MATE",
        "missing on one",
        "off on one",
    ],
)
def test_nodes_that_differ_stop_before_weights(
    engines: EngineServer, second: dict[str, Any], expected: str, speaking: int
) -> None:
    """Every rank with this package says which rank differs in what; none loads weights."""
    second = dict(second)
    with held_port() as port:
        if environ := second.get("environ"):
            second["environ"] = environ | {"SGLANG_CPU_OMP_THREADS_BIND": "1"}
        started = time.monotonic()
        ends = boot(engines, *pair(engines, port, **second))[:speaking]
    assert time.monotonic() - started < 80
    for end in ends:
        assert isinstance(end, EngineFailed)
        assert "RanksDisagreeError" in end.log
        assert expected in end.log
        assert "Load weight begin" not in end.log
