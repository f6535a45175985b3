"""The unmodified SGLang engine through the composed backend, on a CPU, with tiny random models.

What is right is known from two others: transformers' own greedy search, and SGLang's
``torch_native`` backend. How many forward passes an engine needs, and how many plans a pass needs,
is derived here from requests and model. The kernels are the reference ones, in which a plan of
another pass or geometry leaves rows at NaN.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.engines.ports import held_port
from tests.engine.test_engine_modes import MLA_DENSE
from tests.support import tiny_models
from tests.support.answers import require_tokens_of_another, require_tokens_of_transformers
from tests.support.engine import (
    OURS,
    TORCH_NATIVE,
    EngineCase,
    EngineFailed,
    EngineRun,
    EngineServer,
    Request,
    post,
    started,
)
from tests.support.plan_table import note_plans
from tests.support.tiny_models import TinyModel, llama, tokens

pytestmark = pytest.mark.engine

STEPWISE = {"disable_overlap_schedule": True}
"""Without overlap no pass runs whose tokens are dropped, so passes can be counted by hand."""


@dataclass(frozen=True)
class DenseCase:
    """A model of uniform layers, and requests of which it is known how many passes they take."""

    name: str
    phases: tuple[tuple[Request, ...], ...]
    passes: int | None
    """Forward passes, derived by hand; ``None`` where the arrival of requests decides."""
    model: TinyModel = field(default_factory=llama)
    layers: int = 2
    arguments: Mapping[str, Any] = field(default_factory=lambda: STEPWISE)
    cached: tuple[int, ...] | None = None
    """Tokens that each request of the last phase finds in the prefix cache: whole pages of 64."""


def requests(*lengths: int, new_tokens: int = 8) -> tuple[Request, ...]:
    """A request of each length, with nothing in common."""
    return tuple(Request(tokens(length, seed=length), new_tokens) for length in lengths)


SHARED = tokens(200, seed=1)
CHUNKS = STEPWISE | {"chunked_prefill_size": 128}
MIXED = CHUNKS | {"enable_mixed_chunk": True}

REVERSED = DenseCase(
    "batch reversed",
    (requests(60, 500), (Request(tokens(500, 8)), Request(tokens(60, 9)))),
    passes=2 * (1 + 7),
)
"""Both phases have the same geometries, and neither's plans are right for the other."""

CASES = [
    # One prefill of all prompts together, then a decode for each token after the first.
    DenseCase("GQA", (requests(5, 70, 200),), passes=1 + 7),
    DenseCase("MQA", (requests(5, 70, 200),), passes=1 + 7, model=llama(num_key_value_heads=1)),
    DenseCase(
        "MHA, head dim 64",
        (requests(5, 70, 200),),
        passes=1 + 7,
        model=llama(num_key_value_heads=4, head_dim=64),
    ),
    DenseCase(
        "three layers", (requests(5, 70),), passes=1 + 7, model=llama(num_hidden_layers=3), layers=3
    ),
    DenseCase("page boundaries", (requests(63), requests(64), requests(65)), passes=3 * (1 + 7)),
    REVERSED,
    # The scheduler runs one decode ahead, so each phase ends with a pass whose tokens are dropped.
    DenseCase("overlap schedule", (requests(5, 70, 200),), passes=1 + 7 + 1, arguments={}),
    # 700 tokens in chunks of 128 are 6 passes; keys beyond 256 are enough to be split.
    DenseCase(
        "chunked prefill",
        (requests(700), requests(300)),
        passes=(6 + 7) + (3 + 7),
        arguments=CHUNKS,
    ),
    DenseCase(
        "chunked prefill, three prompts", (requests(300, 520, 700),), passes=None, arguments=CHUNKS
    ),
    DenseCase(
        "shared prefix",
        ((Request(SHARED),), (Request(SHARED + tokens(30, 2)), Request(SHARED + tokens(100, 3)))),
        passes=2 * (1 + 7),
        cached=(192, 192),
    ),
    # 192 tokens are cached, so 400 of 592 come in chunks: 4 passes.
    DenseCase(
        "shared prefix, then chunks",
        ((Request(SHARED),), (Request(SHARED[:192] + tokens(400, 4)),)),
        passes=(2 + 7) + (4 + 7),
        arguments=CHUNKS,
        cached=(192,),
    ),
    DenseCase(
        "arrival while others decode",
        (
            (
                Request(tokens(90, 5), 24),
                Request(tokens(300, 6), 8, after=4),
                Request(tokens(20, 7), 8, after=9),
            ),
        ),
        passes=None,
        arguments=CHUNKS,
    ),
    DenseCase(
        "arrival in mixed chunks",
        (
            (
                Request(tokens(90, 5), 24),
                Request(tokens(300, 6), 8, after=4),
                Request(tokens(20, 7), 8, after=9),
            ),
        ),
        passes=None,
        arguments=MIXED,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request: pytest.FixtureRequest) -> DenseCase:
    """One of ``CASES``; module-scoped, so that its engines boot once for all tests."""
    case: DenseCase = request.param
    return case


@pytest.fixture(scope="module")
def ours(engines: EngineServer, case: DenseCase) -> EngineRun:
    """Return the composed backend's answers."""
    run = engines.run(
        EngineCase(engines.model(case.model), case.phases, {**OURS, **case.arguments})
    )
    note_plans(case.name, 1, run.statistics())
    return run


@pytest.fixture(scope="module")
def torch_native(engines: EngineServer, case: DenseCase) -> EngineRun:
    """Return the answers of SGLang's own ``torch_native`` backend."""
    return engines.run(
        EngineCase(engines.model(case.model), case.phases, {**case.arguments, **TORCH_NATIVE})
    )


def test_tokens_equal_torch_native(ours: EngineRun, torch_native: EngineRun) -> None:
    """Tokens are those of SGLang's own backend, and log-probabilities are close to its."""
    require_tokens_of_another(ours, torch_native)


def test_tokens_equal_transformers(ours: EngineRun, engines: EngineServer, case: DenseCase) -> None:
    """Tokens are those of transformers' greedy search, and log-probabilities are close to its."""
    require_tokens_of_transformers(engines, ours.outputs, all_requests(case), case.model)


def test_one_plan_per_pass(ours: EngineRun, case: DenseCase) -> None:
    """The composed backend makes every call, and a pass computes the one plan its layers share."""
    report, statistics = ours.report(), ours.statistics()
    assert (report["backend"], report["kernels"], report["page_size"]) == (
        "MusaFA3Backend",
        "reference",
        64,
    )
    passes = statistics["passes"]
    if case.passes is not None:
        assert passes == case.passes
    assert statistics == {
        "passes": passes,
        "calls": passes * case.layers,
        "raw_calls": 0,
        "unsplit_calls": 0,
        "planned_calls": passes * case.layers,
        "plans": passes,
        "reuses": passes * (case.layers - 1),
        "passes_by_plans": {"1": passes},
    }
    assert passes >= max(request.new_tokens for request in all_requests(case))


def test_prefix_cache_is_hit(ours: EngineRun, case: DenseCase) -> None:
    """A prompt whose beginning was seen before reads those pages instead of computing them."""
    if case.cached is not None:
        assert tuple(output.cached_tokens for output in ours.phases[-1]) == case.cached


def all_requests(case: DenseCase) -> list[Request]:
    return [request for phase in case.phases for request in phase]


# The tests can fail
# ---------------------------------------------------------------------------------


def keep_plans_for_ever() -> None:
    """Make the mistake that this package avoids: a plan serves every pass of its geometry."""
    from sglang_musa_ext.attention.plans import Pass, SchedulerMetadataCache

    def end_pass(self: Any) -> None:
        former, self.current = self.current, Pass([], [])
        self.current.plans, self.current.in_place = former.plans, former.in_place
        self._ended = True

    def key(_self: Any, geometry: Any, tensors: Any) -> Any:
        return geometry

    cache: Any = SchedulerMetadataCache
    cache.end_pass, cache._key = end_pass, key


def test_stale_plans_are_noticed(engines: EngineServer) -> None:
    """An engine that keeps plans across passes gives other tokens: these tests are not blind."""
    model = engines.model(REVERSED.model)
    unchecked = {envs.CHECK: "off"}
    sabotaged = EngineCase(
        model, REVERSED.phases, STEPWISE, unchecked, before_boot=keep_plans_for_ever
    )
    expected = [tokens for tokens, _ in engines.greedy_all(model, all_requests(REVERSED))]
    assert engines.run(sabotaged).tokens != expected


def test_stale_plans_are_refused_under_check(engines: EngineServer) -> None:
    """With SGLANG_MUSA_EXT_CHECK=metadata the same engine stops, and says that a plan is stale."""
    model = engines.model(REVERSED.model)
    environ = {envs.CHECK: "metadata"}
    sabotaged = EngineCase(
        model, REVERSED.phases, STEPWISE, environ, before_boot=keep_plans_for_ever
    )
    with pytest.raises(EngineFailed, match="A reused plan is not the plan of its call"):
        engines.run(sabotaged)


# Bad input
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        pytest.param(
            {"attention_backend": "fa4"},
            {},
            ["--attention-backend fa4", "--attention-backend fa3"],
            id="fa4",
        ),
        pytest.param(
            {},
            {envs.KERNELS: "cuda"},
            [envs.KERNELS, "'cuda'", "mate, hopper, reference"],
            id="kernels",
        ),
        pytest.param(
            {},
            {envs.KERNELS: "mate"},
            ["'mate'", "MUSA device", f"{envs.KERNELS}=auto"],
            id="no MATE",
        ),
        pytest.param(
            {}, {envs.CHECK: "all"}, [envs.CHECK, "'all'", "off, metadata, output"], id="check"
        ),
    ],
)
def test_engine_refuses_to_start(
    engines: EngineServer, arguments: dict[str, Any], environ: dict[str, str], words: list[str]
) -> None:
    """An option that cannot be served stops the engine early; the message names the choices."""
    with pytest.raises(EngineFailed) as failure:
        engines.run(EngineCase(engines.model(llama()), (), arguments, environ))
    assert [word for word in words if word not in failure.value.log] == []


def test_engine_refuses_a_latent_cache_in_fp8(engines: EngineServer) -> None:
    """MLA's kernels do not read fp8: the engine stops, and names option, value and choices."""
    case = EngineCase(engines.model(MLA_DENSE), (), {"kv_cache_dtype": "fp8_e4m3"})
    with pytest.raises(EngineFailed) as failure:
        engines.run(case)
    words = ["--kv-cache-dtype", "float8_e4m3fn", "bfloat16"]
    assert [word for word in words if word not in failure.value.log] == []


# Fresh processes
# ------------------------------------------------------------------------------------


def test_http_server(engines: EngineServer, tmp_path: Path) -> None:
    """``sglang.launch_server``, whose processes start Python anew, finds the plugin in each, and
    answers a chat request and raw tokens as transformers does.
    """
    model, (request,) = engines.model(llama()), requests(70)
    engines.call(tiny_models.add_tokenizer, model)
    log = tmp_path / "server.log"
    with ExitStack() as stack:
        port, nccl_port = stack.enter_context(held_port()), stack.enter_context(held_port())
        options = ["--attention-backend", "fa3", "--dtype", "float32", "--model-path", str(model)]
        options += ["--host", "127.0.0.1", "--port", str(port), "--nccl-port", str(nccl_port)]
        command = [sys.executable, "-m", "sglang.launch_server", *options]
        process = stack.enter_context(started(command, log))
        url = f"http://127.0.0.1:{port}"
        while "ready to roll" not in log.read_text():
            if process.poll() is not None:
                raise EngineFailed("The server ended.", log)
            time.sleep(0.2)
        sampling = {"temperature": 0, "max_new_tokens": request.new_tokens, "ignore_eos": True}
        raw = post(f"{url}/generate", {"input_ids": request.prompt, "sampling_params": sampling})
        question = "What is attention?"
        chat = post(
            f"{url}/v1/chat/completions",
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": 8,
                "ignore_eos": True,
            },
        )
        with urllib.request.urlopen(f"{url}/server_info", timeout=120) as response:
            (state,) = json.load(response)["internal_states"]
    (report,) = state["sglang_musa_ext"]
    assert report["backend"] == "MusaFA3Backend"
    assert raw["output_ids"] == engines.greedy(model, request)[0]
    assert chat["choices"][0]["message"]["content"] == engines.call(
        tiny_models.chat, model, question, 8
    )
