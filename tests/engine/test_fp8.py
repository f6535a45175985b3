"""The real engine with a KV cache in fp8, beside ``torch_native`` over the same cache dequantised.

``torch_native`` reads an fp8 cache by turning it into the dtype of its queries. Here it attends in
float32, with queries rounded to fp8 as upstream's FA3 backend casts them, and rounds its output to
bfloat16 once: attention over the dequantised cache, of another implementation. Both engines run the
same model in bfloat16, so what may differ is the order of sums, and the last bit of an output with
it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext import envs
from tests.engine.test_engine import requests
from tests.engine.test_engine_modes import CHUNKS
from tests.engine.test_release import UNCAPPED
from tests.support.engine import (
    TORCH_NATIVE,
    EngineCase,
    EngineFailed,
    EngineRun,
    EngineServer,
    Request,
)
from tests.support.tiny_models import llama, tokens

pytestmark = pytest.mark.engine

FP8: Mapping[str, Any] = {**CHUNKS, "dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"}
SHARED = tokens(200, seed=1)
PHASES = (
    requests(5, 70, 300),
    (Request(SHARED),),
    (Request(SHARED + tokens(30, 2)), Request(SHARED[:192] + tokens(400, 4))),
)
"""Prompts in chunks of 128, and then some whose first pages are cached."""


def attend_to_the_dequantised_cache() -> None:
    """Have ``torch_native`` round its queries to fp8, and attend in float32."""
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def in_float32(attend: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(attend)
        def run(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            return attend(self, query.to(torch.float8_e4m3fn).float(), *args, **kwargs)

        return run

    for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        setattr(TorchNativeAttnBackend, name, in_float32(getattr(TorchNativeAttnBackend, name)))


MODELS = {"dense": llama(), "sliding window": UNCAPPED}
LOGPROB_TOLERANCE = 2.0**-5
"""Two units in the last place of bfloat16 logits between 2 and 4, the largest that occur here."""


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest, engines: EngineServer) -> Path:
    """The checkpoint of one of ``MODELS``."""
    return engines.model(MODELS[request.param])


@pytest.fixture(scope="module")
def ours(engines: EngineServer, model: Path) -> EngineRun:
    """Return the composed backend's answers, with prefill over raw keys allowed."""
    return engines.run(EngineCase(model, PHASES, FP8, {envs.RAW_PREFILL: "on"}))


def test_tokens_equal_torch_native_over_the_dequantised_cache(
    engines: EngineServer, model: Path, ours: EngineRun
) -> None:
    """Tokens are the same, and log-probabilities within the last bits of bfloat16."""
    arguments = {**FP8, **TORCH_NATIVE}
    case = EngineCase(model, PHASES, arguments, before_boot=attend_to_the_dequantised_cache)
    theirs = engines.run(case)
    assert ours.tokens == theirs.tokens
    for output, other in zip(ours.outputs, theirs.outputs, strict=True):
        assert output.logprobs == pytest.approx(other.logprobs, abs=LOGPROB_TOLERANCE)


def test_the_cache_is_fp8(engines: EngineServer, model: Path, ours: EngineRun) -> None:
    """A cache in bfloat16 gives other tokens, so that the test above can fail."""
    half = engines.run(EngineCase(model, PHASES, {**FP8, "kv_cache_dtype": "auto"}))
    assert half.tokens != ours.tokens


def test_every_call_reads_the_cache_by_a_plan(ours: EngineRun) -> None:
    """No call goes over raw keys, which are not fp8, and prefixes are read from the cache."""
    statistics = ours.statistics()
    assert statistics["raw_calls"] == 0
    assert statistics["planned_calls"] == statistics["calls"] > 0
    assert [output.cached_tokens for output in ours.phases[-1]] == [192, 192]


def test_a_model_in_another_type_is_refused(engines: EngineServer) -> None:
    """Attention of fp8 is bfloat16, which layers of float32 do not take."""
    case = EngineCase(engines.model(llama()), (), {**FP8, "dtype": "float32"})
    with pytest.raises(EngineFailed) as failure:
        engines.run(case)
    words = ["--kv-cache-dtype float8_e4m3fn", "float32", "--dtype bfloat16"]
    assert [word for word in words if word not in failure.value.log] == []
