"""The real engine with prefill over raw keys, as users have it: right, and where it is exact alone.

Other engine tests count plans, which such prefill takes none of, and turn it off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.upstream.check import find_package
from tests.engine.test_engine import requests
from tests.engine.test_engine_modes import (
    BERT,
    CHUNKS,
    GEMMA_2,
    GEMMA_3,
    GPT_OSS,
    ONE_POOL,
    OPT,
    STEPWISE,
)
from tests.engine.test_release import UNCAPPED
from tests.support import tiny_models
from tests.support.answers import require_tokens_of_another, require_tokens_of_transformers
from tests.support.engine import (
    TORCH_NATIVE,
    EngineCase,
    EngineRun,
    EngineServer,
    Request,
    embed,
)
from tests.support.tiny_models import TinyModel, llama, tokens

pytestmark = pytest.mark.engine

SHARED = tokens(200, seed=1)
PHASES = (
    # One prefill without any prefix, for both: a chunk of 128 is two whole pages to the scheduler.
    requests(60, 40),
    # Chunks of 128, 128 and 44 tokens, of which the first has no prefix.
    requests(300),
    # A chunk without a prefix, and one with.
    (Request(SHARED),),
    # 192 tokens are cached, and the other prompt is new: one prefill, in which one has a prefix.
    (Request(SHARED + tokens(30, 2)), Request(tokens(40, 3))),
    # A prompt without a prefix after all of these.
    (Request(tokens(64, 4)),),
)
RAW_PASSES = 1 + 1 + 1 + 0 + 1
PASSES = (1 + 7) + (3 + 7) + (2 + 7) + (1 + 7) + (1 + 7)
"""A request has its first token from its last prefill, and the other seven from decodes."""


def serve_every_kind_over_raw_keys() -> None:
    """Have the reference kernels, which are like MATE's, serve over raw keys all that they can."""
    from sglang_musa_ext.kernels import provider

    provider._serves_raw_keys = lambda release, **call: True


@dataclass(frozen=True)
class Kind:
    """A kind of layers, and a model that has them."""

    name: str
    model: TinyModel
    layers: int
    arguments: dict[str, Any] = field(default_factory=lambda: dict(CHUNKS))
    like_torch_native: bool = True
    """True if SGLang's ``torch_native`` has what these layers need."""
    before_boot: Callable[[], None] | None = None
    goes_raw: bool = True


EVERY_KIND = serve_every_kind_over_raw_keys
KINDS = [
    Kind("full", llama(), 2),
    Kind("full, many heads", OPT, 2),
    Kind("window", UNCAPPED, 4, before_boot=EVERY_KIND),
    Kind("window and softcap", GEMMA_2, 4, like_torch_native=False, before_boot=EVERY_KIND),
    Kind("sinks", GPT_OSS, 4, ONE_POOL, like_torch_native=False, before_boot=EVERY_KIND),
    # MATE's kernels that are compiled in advance have no windows and no softcap.
    Kind("window and softcap of MATE", GEMMA_2, 4, like_torch_native=False, goes_raw=False),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name, scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    """One of ``KINDS``."""
    kind: Kind = request.param
    return kind


@pytest.fixture(scope="module")
def ours(engines: EngineServer, kind: Kind) -> EngineRun:
    """Return the composed backend's answers."""
    model = engines.model(kind.model)
    environ = {envs.RAW_PREFILL: "on"}
    return engines.run(EngineCase(model, PHASES, kind.arguments, environ, kind.before_boot))


def test_tokens_equal_transformers(engines: EngineServer, kind: Kind, ours: EngineRun) -> None:
    """Tokens are those of transformers' greedy search, with prefixes before and after."""
    asked = [request for phase in PHASES for request in phase]
    require_tokens_of_transformers(engines, ours.outputs, asked, kind.model)


def test_tokens_equal_torch_native(engines: EngineServer, kind: Kind, ours: EngineRun) -> None:
    """Tokens are those of SGLang's own backend in float32."""
    if not kind.like_torch_native:
        pytest.skip("torch_native leaves out what these layers need; transformers is the judge")
    arguments = {**kind.arguments, **TORCH_NATIVE}
    theirs = engines.run(EngineCase(engines.model(kind.model), PHASES, arguments))
    require_tokens_of_another(ours, theirs)


def test_prefills_without_any_prefix_go_raw(kind: Kind, ours: EngineRun) -> None:
    """Each layer of a pass in which no request has a prefix, and no other; the report says it."""
    statistics = ours.statistics()
    assert statistics["calls"] == PASSES * kind.layers
    assert statistics["raw_calls"] == RAW_PASSES * kind.layers * kind.goes_raw
    assert [output.cached_tokens for output in ours.phases[3]] == [192, 0]


def test_an_encoder_goes_raw(engines: EngineServer) -> None:
    """Attention that looks both ways: embeddings are transformers', and every layer went raw."""
    model, prompts = engines.model(BERT), requests(5, 70, 200)
    arguments = {**STEPWISE, "is_embedding": True}
    case = EngineCase(model, (prompts,), arguments, {envs.RAW_PREFILL: "on"})
    vectors, (report,) = engines.call(embed, case)
    asked = [each.prompt for each in prompts]
    for vector, other in zip(
        vectors, engines.call(tiny_models.embeddings, model, asked, 0), strict=True
    ):
        assert vector == pytest.approx(other, abs=1e-5)
    statistics = report["statistics"]
    assert (statistics["calls"], statistics["raw_calls"], statistics["plans"]) == (2, 2, 0)


BOTH_WAYS = TinyModel(
    "Gemma3TextConfig",
    {**GEMMA_3.fields, "use_bidirectional_attention": True, "sliding_window": 31},
    "Gemma3TextModel",
)
"""EmbeddingGemma: a decoder's layers, full and windowed, that look both ways."""


def test_a_decoder_looking_both_ways_attends_to_its_own_keys(engines: EngineServer) -> None:
    """Embeddings are transformers'; SGLang gives such a model no cache, so that all calls are raw.

    It calls the function over raw keys itself, and no paged call is replaced.
    """
    package = find_package()
    assert package is not None
    if "is_embedding_gemma" not in (package / "srt/configs/model_config.py").read_text():
        pytest.skip("this SGLang serves no decoder that looks both ways")
    model, prompts = engines.model(BOTH_WAYS), requests(5, 70, 200)
    case = EngineCase(model, (prompts,), dict(STEPWISE), {envs.RAW_PREFILL: "on"})
    vectors, (report,) = engines.call(embed, case)
    asked = [each.prompt for each in prompts]
    expected = engines.call(tiny_models.embeddings, model, asked, None)
    for vector, other in zip(vectors, expected, strict=True):
        assert vector == pytest.approx(other, abs=1e-5)
    statistics = report["statistics"]
    assert (statistics["calls"], statistics["planned_calls"], statistics["raw_calls"]) == (4, 0, 0)
