"""A KV cache in fp8: upstream's backend on the reference kernels, beside attention in float64.

Float64 attends to the dequantised cache: the keys and values that the cache was given, rounded to
fp8 and multiplied by the layer's scales again, and queries that are rounded to fp8, as upstream
casts them. What is left to the kernels is the order of sums in float32 and one rounding of the
output to bfloat16, so tolerances are half a unit in its last place.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention.checks import WrongOutputError
from sglang_musa_ext.kernels.provider import UnsupportedByKernels, reference_kernels
from tests.support.backend import (
    Step,
    attention_layer,
    counted,
    recorded,
    replace_kernels,
)
from tests.support.fp8 import E4M3, LARGEST, OF_OUTPUT, OF_SUMS, Fp8Model
from tests.support.layers import SPEC, WINDOW, mla_model, uniform_layers

SCALES = [pytest.param(None, id="no scales"), pytest.param((0.25, 4.0), id="scales")]
LAYERS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window_size": WINDOW},
    "softcap": {"logit_cap": 3.0},
}


def pass_of(model: Fp8Model, mode: str) -> Step:
    """A step over requests of unequal lengths, some of them long enough to be split."""
    requests = model.requests(0, 0) if mode == "prefill" else model.requests(900, 20, 0)
    if mode == "decode":
        return model.decode(requests)
    return model.extend(requests, [150, 60, 30][: len(requests)])


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["decode", "prefill", "prefill with prefix"])
def test_output_is_attention_over_the_dequantised_cache(
    mode: str, kind: str, scales: tuple[float, float] | None
) -> None:
    """Each mode and mask, with a plan for all layers, and none of them over raw keys."""
    options = LAYERS[kind]
    model = Fp8Model(
        uniform_layers(2, **options),
        context_len=1152,
        window=options.get("sliding_window_size"),
        scales=scales,
    )
    backend = model.backend()
    with counted(backend) as counts:
        model.run_pass(backend, pass_of(model, mode))
    assert (counts.plans, counts.reuses) == (1, 1)
    report = backend.musa_fa3_report()
    assert (report["settings"]["raw_prefill"], report["statistics"]["raw_calls"]) == (True, 0)


def test_chunks_of_a_prompt_read_what_came_before_from_the_cache() -> None:
    """Prefill in chunks, then decode: every pass attends to all that is in fp8."""
    model = Fp8Model(uniform_layers(2), context_len=1152, scales=(0.5, 2.0))
    backend, requests = model.backend(), model.requests(0, 0)
    for _ in range(3):
        model.run_pass(backend, model.extend(requests, [128, 64]))
    for _ in range(2):
        model.run_pass(backend, model.decode(requests))


def test_sinks_beside_an_fp8_cache() -> None:
    """Sinks are bfloat16, whatever the cache is."""
    model = Fp8Model(uniform_layers(2))
    sinks = torch.tensor([0.5, 3.0, -1.0, 8.0], dtype=torch.bfloat16)
    model.run_pass(model.backend(), model.decode(model.requests(200, 5)), sinks=sinks)


def test_chunked_local_layers_have_scales_of_their_own_batch() -> None:
    """Attention in chunks cuts requests into several, and upstream expands scales to requests."""
    layers = [attention_layer(0, use_irope=True), attention_layer(1)]
    model = Fp8Model(layers, page_size=1, chunk=128, scales=(0.5, 2.0))
    backend, requests = model.backend(), model.requests(300, 20)
    model.run_pass(backend, model.extend(requests, [150, 60]))


@pytest.mark.parametrize("topk", [1, 4])
def test_drafts_are_verified_over_an_fp8_cache(topk: int) -> None:
    """A chain is one call a layer, and a tree a cascade of two, whose outputs are rounded apart."""
    arguments = SPEC | {"speculative_eagle_topk": topk}
    of_sums = OF_SUMS if topk == 1 else OF_OUTPUT * LARGEST
    model = Fp8Model(
        uniform_layers(2), page_size=1, arguments=arguments, scales=(0.5, 2.0), of_sums=of_sums
    )
    backend, requests = model.backend(), model.requests(200, 5)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    trees = None if topk == 1 else [tree, tree]
    model.run_pass(backend, model.verify(requests, 4, trees))


@pytest.mark.parametrize("scales", SCALES)
def test_queries_are_cast_and_scales_complete(scales: tuple[float, float] | None) -> None:
    """The kernels get one fp8 dtype, and three scales for each request and key head."""
    model = Fp8Model(uniform_layers(1), scales=scales)
    backend = model.backend()
    calls = recorded(backend)
    model.run_pass(backend, model.decode(model.requests(200, 5)))
    (call,) = [call.arguments for call in calls if call.name == "flash_attn_with_kvcache"]
    assert {call[name].dtype for name in ("q", "k_cache", "v_cache")} == {E4M3}
    passed = {name: call[name] for name in ("k_descale", "v_descale") if name in call}
    # Up to 0.5.15 upstream passes None, and later nothing.
    assert all((value is None) == (scales is None) for value in passed.values())


def test_dtypes_have_plans_of_their_own() -> None:
    """A plan may depend on the dtype (MATE 0.2.5 says so): half precision does not reuse fp8's."""
    model = Fp8Model(uniform_layers(2), context_len=1152)
    backend, requests = model.backend(), model.requests(900, 20)
    calls = recorded(backend)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    model.check(backend, step, model.layers[0])
    fp8 = next(call.arguments for call in calls if call.name == "flash_attn_with_kvcache")
    half = {name: value for name, value in fp8.items() if name != "scheduler_metadata"}
    for name in ("q", "k_cache", "v_cache"):
        half[name] = half[name].to(torch.bfloat16)
    backend.flash_attn_with_kvcache(**half)
    planned = [call.arguments for call in calls if call.name == "get_scheduler_metadata"]
    assert [call["qkv_dtype"] for call in planned] == [E4M3, torch.bfloat16]


# --- what is refused ------------------------------------------------------------------------------


def test_a_latent_cache_in_fp8_is_refused_at_start() -> None:
    """MLA's kernels read none: option, value and choices are named."""
    model = mla_model()
    runner = model.runner()
    runner.kv_cache_dtype = E4M3
    model.runner = lambda: runner  # type: ignore[method-assign]
    with pytest.raises(UnsupportedByKernels, match=r"--kv-cache-dtype float8_e4m3fn .* MLA"):
        model.backend()


def test_heads_that_upstream_casts_no_queries_for_are_refused_at_start() -> None:
    """Above 256 upstream leaves queries as they are, and kernels take one dtype."""
    with pytest.raises(UnsupportedByKernels, match=r"--kv-cache-dtype .* head dimension 512"):
        Fp8Model(uniform_layers(1, head_dim=512)).backend()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_model_in_another_type_is_refused_at_start(dtype: torch.dtype) -> None:
    """Kernels that read fp8 write bfloat16, which the model's next layer would not take."""
    with pytest.raises(UnsupportedByKernels, match=r"a model in float.*--dtype bfloat16"):
        Fp8Model(uniform_layers(1), dtype=dtype).backend()


# --- the check of outputs -------------------------------------------------------------------------


def off_by(backend: Any, wrong: Any) -> None:
    """Have the kernels of ``backend`` return ``wrong(output)``."""

    def wrap(name: str, function: Any) -> Any:
        if name != "flash_attn_with_kvcache":
            return function
        return lambda **arguments: wrong(function(**arguments))

    replace_kernels(backend, wrap)


@pytest.mark.parametrize(("share", "is_wrong"), [(1 / 17, False), (1 / 4, True)])
def test_rounded_probabilities_are_no_wrong_output(
    share: float, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels round probabilities to fp8, so outputs may be off by a sixteenth of the largest."""
    monkeypatch.setenv(envs.CHECK, "output")
    model = Fp8Model(uniform_layers(1))
    backend = model.backend()
    step = model.decode(model.requests(300, 5))
    backend.init_forward_metadata(step.batch)
    inputs = model.inputs(step, model.layers[0])
    off_by(backend, lambda out: out + share * out.abs().max())
    raised = pytest.raises(WrongOutputError, match="absolute") if is_wrong else nullcontext()
    with raised:
        model.forward(backend, step, model.layers[0], inputs)


def test_older_releases_refuse_fp8() -> None:
    """MATE reads it from 0.2.3 on."""
    assert E4M3 not in reference_kernels(release=(0, 2, 2)).dtypes
    assert E4M3 in reference_kernels(release=(0, 2, 3)).dtypes
