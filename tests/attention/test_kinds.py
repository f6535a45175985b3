"""Masks, windows, softcaps, sinks, shared and encoder keys, context parallelism: right output."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from sglang_musa_ext import envs
from tests.support import zigzag
from tests.support.backend import (
    AttentionType,
    Model,
    Step,
    attention_layer,
    counted,
    mixin,
    recorded,
    upstream,
)
from tests.support.layers import (
    FORWARD_PARAMETERS,
    WINDOW,
    mla_model,
    needs_keyword,
    uniform_layers,
)


@pytest.fixture(autouse=True)
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every prefill read the paged cache: plans are the subject here."""
    monkeypatch.setenv(envs.RAW_PREFILL, "off")


# --- kinds of attention ---------------------------------------------------------------------------

BIDIRECTIONAL = {"attn_type": AttentionType.DECODER_BIDIRECTIONAL}
needs_both_ways = pytest.mark.skipif(
    "DECODER_BIDIRECTIONAL" not in inspect.getsource(upstream),
    reason="this SGLang's decoders look back alone",
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sliding_window_size": WINDOW}, id="window"),
        pytest.param({"logit_cap": 3.0}, id="softcap"),
        pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, id="encoder-only"),
        pytest.param({"sliding_window_size": WINDOW, "logit_cap": 3.0}, id="window and softcap"),
        pytest.param(BIDIRECTIONAL, id="bidirectional decoder", marks=needs_both_ways),
        pytest.param(
            BIDIRECTIONAL | {"sliding_window_size": WINDOW},
            id="bidirectional window",
            marks=needs_both_ways,
        ),
    ],
)
@pytest.mark.parametrize("mode", ["decode", "prefill without prefix", "prefill with prefix"])
def test_mask_and_softcap_reach_the_kernels(options: dict[str, Any], mode: str) -> None:
    """Windows, softcap and encoder-only attention also act in prefill without a prefix."""
    if mode == "decode" and options.get("attn_type") == AttentionType.ENCODER_ONLY:
        pytest.skip("encoder-only layers do not decode")
    model = Model(uniform_layers(2, **options), window=options.get("sliding_window_size"))
    backend = model.backend()
    requests = model.requests(0, 0) if mode == "prefill without prefix" else model.requests(200, 20)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [150, 60])
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.plans, counts.reuses) == (1, 1)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_causal_and_full_layers_have_plans_of_their_own(mode: str) -> None:
    """A causal layer and one that sees all keys, in one pass."""
    layers = [
        attention_layer(0),
        attention_layer(1, attn_type=AttentionType.ENCODER_ONLY),
        attention_layer(2),
    ]
    model = Model(layers, context_len=1024)
    backend, requests = model.backend(), model.requests(500, 3)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [150, 60])
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.plans, counts.reuses) == (2, 1)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_layers_that_share_keys_and_values(mode: str) -> None:
    """Gemma-3n's later layers have no own keys: ``k`` is None, another layer's cache is read."""
    model = Model([attention_layer(0), attention_layer(1), attention_layer(1)])
    backend, requests = model.backend(), model.requests(100, 0)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [40, 90])
    backend.init_forward_metadata(step.batch)
    with counted(backend) as counts:
        for layer, shared in zip(model.layers, (False, False, True), strict=True):
            model.check(backend, step, layer, share_kv=shared)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 2)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_cross_attention_beside_self_attention(mode: str) -> None:
    """Encoder keys have lengths and pages of their own, hence a plan of their own."""
    layers = [attention_layer(0), attention_layer(1, is_cross_attention=True), attention_layer(2)]
    # Upstream reads encoder pages of one token only.
    model = Model(layers, page_size=1, context_len=128, encoder_decoder=True)
    backend = model.backend()
    several = "Only encoder size 1" not in inspect.getsource(
        upstream.FlashAttentionBackend.init_forward_metadata
    )
    count = 2 if several else 1
    step = _with_encoder(
        model, mode, encoder_lens=[20, 7][:count], prefixes=[30, 3][:count], new=[10, 20][:count]
    )
    backend.init_forward_metadata(step.batch)
    with counted(backend) as counts:
        model.check(backend, step, layers[0])
        model.check(backend, step, layers[1], share_kv=True)
        model.check(backend, step, layers[2])
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 1)


def _with_encoder(
    model: Model, mode: str, encoder_lens: list[int], prefixes: list[int], new: list[int]
) -> Step:
    """A step of requests whose rows in the table begin with the encoder's tokens."""
    requests = [
        model.request(length + prefix)
        for length, prefix in zip(encoder_lens, prefixes, strict=True)
    ]
    step = model.decode(requests) if mode == "decode" else model.extend(requests, new)
    for queries, length in zip(step.queries, encoder_lens, strict=True):
        queries.encoder_slots, queries.slots = queries.slots[:length], queries.slots[length:]
        queries.positions = queries.positions - length
    step.batch.encoder_lens = torch.tensor(encoder_lens)
    step.batch.seq_lens -= step.batch.encoder_lens
    step.batch.seq_lens_cpu = step.batch.seq_lens.clone()
    return step


def test_embedding_without_a_kv_cache_runs_on_raw_keys_and_values() -> None:
    """``fa_skip_kv_cache``: upstream's varlen kernel, with windows and masks, and no plan."""
    arguments = {"is_embedding": True, "chunked_prefill_size": -1, "disable_radix_cache": True}
    model = Model(uniform_layers(2, sliding_window_size=WINDOW), window=WINDOW, arguments=arguments)
    backend = model.backend()
    assert backend.fa_skip_kv_cache
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(model.requests(0, 0), [100, 30]))
    assert (counts.calls, counts.planned_calls, counts.plans) == (2, 0, 0)


def test_deterministic_inference_uses_one_split() -> None:
    """Upstream's ``num_splits=1`` reaches plan and kernel."""
    model = Model(
        uniform_layers(1), context_len=2048, arguments={"enable_deterministic_inference": True}
    )
    backend = model.backend()
    calls = recorded(backend)
    model.run_pass(backend, model.decode(model.requests(1500)))
    assert [call.arguments["num_splits"] for call in calls] == [1, 1]
    assert calls[0].result[0] == 1


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_sinks_reach_the_kernels(mode: str) -> None:
    """GPT-OSS: each head's sink takes its share of the softmax."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    model.run_pass(backend, step, sinks=torch.tensor([0.5, 3.0, -1.0, 8.0]))


@needs_keyword("q_descale")
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_models_may_pass_the_newer_keywords_as_none(mode: str) -> None:
    """Every keyword that this release's forwards take, given as what stands for "not used"."""
    known = (
        "q_descale",
        "k_descale",
        "v_descale",
        "score_mod",
        "aux_tensors",
        "rel_bias",
        "rel_bias_event",
    )
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    model.run_pass(backend, step, **{name: None for name in known if name in FORWARD_PARAMETERS})


@needs_keyword("rel_bias")
@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["score_mod", "rel_bias"])
def test_a_bias_of_scores_is_refused_by_upstream(mode: str, name: str) -> None:
    """Upstream's forwards, and so ours, say that FA4 alone takes what Inkling's layers pass."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    with pytest.raises(RuntimeError, match=f"{name} .*only supported by the FA4 backend"):
        model.run_pass(backend, step, None, **{name: torch.zeros(1)})


@needs_keyword("rel_bias")
def test_a_layer_of_inkling_takes_no_fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's own layer stops before it asks its backend; a row of the limits says so."""
    from sglang.srt.model_executor import forward_context

    inkling = _layers_of_inkling(monkeypatch)
    model = Model(uniform_layers(1), arguments={"attention_backend": "fa3"})
    backend = model.backend()
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = "fa3"
    monkeypatch.setattr(forward_context, "get_attn_backend", lambda: backend)
    layer = inkling.InklingAttention.__new__(inkling.InklingAttention)
    torch.nn.Module.__init__(layer)
    layer.d_rel, layer.is_local = 1, False
    layer._project_qkvr = lambda rows: (rows,) * 4
    step = model.decode(model.requests(5))
    with pytest.raises(AssertionError) as failure:
        layer(torch.zeros(1, 1), step.batch.positions, step.batch)
    assert str(failure.traceback[-1].path) == inkling.__file__


def _layers_of_inkling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Upstream's module, beside a stand-in for FA4, whose libraries are not installed here."""
    folder = "sglang.kernels.ops.attention.flash_attn.cute"
    for name in (folder, f"{folder}.batch_invariance", f"{folder}.seqlen_info"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    name = "sglang.srt.models.inkling_common.attn"
    module = importlib.import_module(name)
    # Whoever imports it later gets one without stand-ins.
    del sys.modules[name]
    return module


@needs_keyword("return_lse")
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_return_lse_gives_the_log_sum_exp(mode: str) -> None:
    """Output and log-sum-exp, both right."""
    model = Model(uniform_layers(2), context_len=2048)
    backend, requests = model.backend(), model.requests(1500, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    backend.init_forward_metadata(step.batch)
    for layer in model.layers:
        inputs = model.inputs(step, layer)
        result = model.forward(backend, step, layer, inputs, return_lse=True)
        assert len(result) == 2
        model.require(result, step, layer, inputs)


def test_an_output_buffer_of_the_batch_is_written() -> None:
    """Upstream's ``out=`` lands in the buffer that the model gave it."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.extend(requests, [30, 60])
    step.batch._attn_output = torch.full((90, 256), float("nan"))
    model.run_pass(backend, step)
    inputs = model.inputs(step, model.layers[0])
    model.forward(backend, step, model.layers[0], inputs)
    if "_attn_output" in inspect.getsource(upstream.FlashAttentionBackend.forward_extend):
        model.require(step.batch._attn_output, step, model.layers[0], inputs)


def test_a_strided_page_table_is_made_dense() -> None:
    """MATE reads a page table as if it were dense, so the adapter copies one that is not."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(200, 5, 300)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    table = backend.forward_metadata.page_table
    wide = torch.zeros(table.shape[0], 2 * table.shape[1], dtype=torch.int32)
    wide[:, ::2] = table
    backend.forward_metadata.page_table = wide[:, ::2]
    for layer in model.layers:
        model.check(backend, step, layer)


# --- context parallelism --------------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_context_parallel_calls_a_layer_twice(mla: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's zigzag: a rank's two pieces of the prompt are two calls, each with its plan."""
    if mla and not hasattr(upstream, "get_cp_strategy"):
        pytest.skip("this SGLang has no context parallelism for MLA here")
    from sglang.srt.layers.utils import cp_utils

    model = mla_model(3, context_len=1024) if mla else Model(uniform_layers(3), context_len=1024)
    request = model.request(600)
    step = model.extend([request], [80])
    # Of four pieces of 20 tokens, rank 0 of 2 has the first and the last.
    mine = torch.cat([torch.arange(600, 620), torch.arange(660, 680)])
    step.queries[0].positions = mine
    backend = _context_parallel(model, step, monkeypatch, piece=20, ends=(620, 680))
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert counts.passes == 1
    assert counts.planned_calls == 6
    # Up to 0.5.12 each layer makes its tensors of offsets anew, and new tensors are new lengths.
    anew = not hasattr(
        upstream, "get_cp_strategy"
    ) and "cu_seqlens_q_prev_tensor" not in inspect.getsource(cp_utils)
    assert (counts.plans, counts.reuses) == ((6, 0) if anew else (2, 4))


def _context_parallel(
    model: Model, step: Step, monkeypatch: pytest.MonkeyPatch, piece: int, ends: tuple[int, int]
) -> Any:
    """A backend that believes to be rank 0 of 2."""
    backend = model.backend()
    backend.attn_cp_size = 2
    step.batch.attn_cp_metadata = zigzag.metadata(piece, ends)
    for name, value in zigzag.stand_ins().items():
        monkeypatch.setattr(upstream, name, value)
    return backend


# --- other versions of FlashAttention -------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_of_flash_attention_is_refused(version: int) -> None:
    """The choice by ``fa_impl_ver`` is kept, for direct construction too: there is FA3 alone."""
    with pytest.raises(
        mixin.UnsupportedAttentionVersion,
        match=f"fa_impl_ver={version}.*--attention-backend fa3",
    ):
        Model(uniform_layers(1)).backend(fa_impl_ver=version)
