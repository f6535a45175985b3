"""Several simulated GPUs: data-parallel attention, two nodes, prefill and decode apart."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_musa_ext.engines.ports import held_port
from tests.engine import test_apart, test_nodes
from tests.simulated_musa import cases, stand_ins
from tests.simulated_musa.cases import BF16, CHUNKS, LIMIT, MusaCase, run_case
from tests.support.apart import serve_apart
from tests.support.engine import EngineFailed, EngineServer, Request
from tests.support.tiny_models import tokens

pytestmark = pytest.mark.engine

DP_ATTENTION = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}


def phase(*lengths: int) -> tuple[Request, ...]:
    """Return a request of each length."""
    return tuple(Request(tokens(length, seed=length), 6) for length in lengths)


def test_data_parallel_attention_with_idle_and_unequal_ranks(musa: EngineServer) -> None:
    """One request leaves a rank idle; two of different lengths, and then three, are unequal."""
    case = MusaCase(
        "data-parallel attention",
        cases.MLA_DENSE,
        (phase(40), phase(70, 9), phase(30, 100, 5)),
        CHUNKS | BF16 | DP_ATTENTION,
        limit=8 * LIMIT,
    )
    run = run_case(musa, case)
    cases.require_right_tokens(musa, case, run)
    cases.require_ours_on_mate(run)
    assert len(run.reports[-1]) == 2
    assert all(report["statistics"]["passes"] > 0 for report in run.reports[-1])


def test_two_nodes_answer(musa: EngineServer) -> None:
    """Tokens are right, whatever the second node ends with, and both ranks agreed before."""
    both = {"tp_size": 2, "nnodes": 2}
    case = MusaCase("two nodes", cases.LLAMA, (cases.prompts(40, 900),))
    with held_port() as port:
        nodes = []
        for rank in range(2):
            own = {"node_rank": rank, "dist_init_addr": f"127.0.0.1:{port}"}
            node = replace(case, arguments={**case.arguments, **both, **own})
            nodes.append(cases.engine_case(musa, node, environ=test_nodes.ON))
        run, _ = test_nodes.boot(musa, *nodes)
    assert not isinstance(run, EngineFailed), run
    cases.require_right_tokens(musa, case, run)
    cases.require_ours_on_mate(run)


@pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="NIXL, which moves keys and values between servers, is not installed",
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(MusaCase("dense", cases.LLAMA, test_apart.PHASES), marks=pytest.mark.long),
        MusaCase("MLA", cases.MLA_DENSE, test_apart.PHASES, CHUNKS | BF16, limit=8 * LIMIT),
    ],
    ids=["dense", "MLA"],
)
def test_what_one_server_prefills_another_decodes(
    musa: EngineServer, case: MusaCase, tmp_path: Path
) -> None:
    """Tokens are transformers'; both servers are ours, and the second one decodes what it got."""
    asked = cases.engine_case(musa, case, before_boot=stand_ins.collectives_and_transfers)
    runs = serve_apart(musa, asked, tmp_path)
    cases.require_right_tokens(musa, case, runs["decode"])
    for run in runs.values():
        cases.require_ours_on_mate(run)
