"""Prefill over a layer's own keys: where it is exact, and nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention.checks import WrongOutputError
from tests.support.backend import (
    AttentionType,
    Model,
    Step,
    attention_layer,
    counted,
    mixin,
    raw_keys,
    recorded,
    upstream,
)
from tests.support.layers import SPEC, WINDOW, mla_model, needs_keyword, uniform_layers

needs_both_ways = pytest.mark.skipif(
    "DECODER_BIDIRECTIONAL" not in inspect.getsource(upstream),
    reason="this SGLang's decoders look back alone",
)
BOTH_WAYS = {"attn_type": getattr(AttentionType, "DECODER_BIDIRECTIONAL", None)}
KINDS = [
    pytest.param({}, id="full"),
    pytest.param({"sliding_window_size": WINDOW}, id="window"),
    pytest.param({"logit_cap": 3.0}, id="softcap"),
    pytest.param({"sliding_window_size": WINDOW, "logit_cap": 3.0}, id="window and softcap"),
    pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, id="encoder-only"),
    pytest.param(BOTH_WAYS, id="bidirectional", marks=needs_both_ways),
    pytest.param(
        BOTH_WAYS | {"sliding_window_size": WINDOW},
        id="bidirectional window",
        marks=needs_both_ways,
    ),
    pytest.param({"head_dim": 192, "v_head_dim": 128}, id="another value head dim"),
]


def counts_of(model: Model, backend: Any, step: Step, **options: Any) -> tuple[int, int]:
    """Run a pass, each layer checked; return its calls over raw keys and its plans."""
    before = backend.musa_fa3_report()["statistics"]
    model.run_pass(backend, step, **options)
    after = backend.musa_fa3_report()["statistics"]
    return after["raw_calls"] - before["raw_calls"], after["plans"] - before["plans"]


# --- where it is exact ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_a_prefill_without_prefix_attends_to_the_layers_own_keys(options: dict[str, Any]) -> None:
    """Every kind of layer: the output is right, no plan is made, and the cache is written.

    A second chunk and a decode read what the first one wrote.
    """
    model = Model(uniform_layers(3, **options), window=options.get("sliding_window_size"))
    backend, requests = model.backend(), model.requests(0, 0, 0)
    serve(backend, lambda **_: True)
    assert counts_of(model, backend, model.extend(requests, [150, 60, 1])) == (3, 0)
    assert counts_of(model, backend, model.extend(requests, [30, 9, 70])) == (0, 1)
    if options.get("attn_type") != AttentionType.ENCODER_ONLY:
        assert counts_of(model, backend, model.decode(requests)) == (0, 1)


def test_one_request_attends_to_its_own_keys() -> None:
    """MATE reads the lengths of a single request off the tensors, which hold its rows alone."""
    model = Model(uniform_layers(2))
    backend = model.backend()
    calls = recorded(backend)
    assert counts_of(model, backend, model.extend([model.request(0)], [100])) == (2, 0)
    assert {call.name for call in calls} == {"flash_attn_varlen_func"}
    assert {len(call.arguments[name]) for call in calls for name in "qkv"} == {100}


def queries_seen(serves: bool) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each layer's kernel call, the queries that it got, and those that the layer had."""
    model = Model(uniform_layers(2))
    backend, step = model.backend(), model.extend(model.requests(0, 0), [70, 9])
    serve(backend, lambda **_: serves)
    calls = recorded(backend)
    backend.init_forward_metadata(step.batch)
    for layer in model.layers:
        inputs = model.inputs(step, layer)
        assert inputs["q"] is not None
        assert not inputs["q"].is_contiguous()
        model.require(model.forward(backend, step, layer, inputs), step, layer, inputs)
        attention = [call for call in calls if call.name != "get_scheduler_metadata"]
        yield attention[-1].name, attention[-1].arguments["q"], inputs["q"]
    assert len(attention) == len(model.layers)


def test_queries_are_read_where_the_layer_has_them() -> None:
    """No copy is made of a slice, in the first call of a pass as in those like it."""
    for name, q, own in queries_seen(serves=True):
        assert name == "flash_attn_varlen_func"
        assert q.data_ptr() == own.data_ptr()
        assert q.stride(0) == own.stride(0)


def test_queries_of_calls_over_the_cache_are_in_one_piece() -> None:
    """Where a prefill without prefix reads the cache, its kernels get what upstream gives them."""
    for name, q, _ in queries_seen(serves=False):
        assert name == "flash_attn_with_kvcache"
        assert q.is_contiguous()


@pytest.mark.parametrize(
    "q",
    [torch.zeros(3, 8), torch.zeros(3, 16)[:, ::2], torch.zeros(3, 8, 4).transpose(1, 2)],
    ids=["in one piece", "every other element", "heads innermost"],
)
def test_other_queries_are_upstreams_to_copy(q: torch.Tensor) -> None:
    """Nothing stands for queries that need no copy, or that could not be viewed by heads."""
    assert raw_keys.uncopied(q) is q


def test_what_stands_for_queries_is_them_in_all_else() -> None:
    """Upstream asks for their dtype and shape, and casts them for an fp8 cache."""
    q = torch.arange(24.0).view(3, 8)[:, :6]
    stands = raw_keys.uncopied(q)
    assert stands is not q
    assert stands.contiguous().view(-1, 2, 3).equal(q.reshape(-1, 2, 3))
    assert (stands.dtype, stands.shape) == (q.dtype, q.shape)
    assert stands.to(torch.float64).equal(q.double())


def test_sinks_reach_the_kernels_of_raw_keys() -> None:
    """Each head's sink takes its share of the softmax."""
    model = Model(uniform_layers(2))
    step = model.extend(model.requests(0, 0), [30, 60])
    sinks, backend = torch.tensor([0.5, 3.0, -1.0, 8.0]), model.backend()
    serve(backend, lambda **_: True)
    assert counts_of(model, backend, step, sinks=sinks) == (2, 0)


@needs_keyword("return_lse")
def test_the_log_sum_exp_of_raw_keys_is_right() -> None:
    """A layer that asks for the log-sum-exp gets it over raw keys, too."""
    model = Model(uniform_layers(2))
    backend, step = model.backend(), model.extend(model.requests(0, 0), [30, 60])
    backend.init_forward_metadata(step.batch)
    for layer in model.layers:
        inputs = model.inputs(step, layer)
        result = model.forward(backend, step, layer, inputs, return_lse=True)
        assert len(result) == 2
        model.require(result, step, layer, inputs)
    assert backend.musa_fa3_report()["statistics"]["raw_calls"] == 2


def test_layers_of_different_shapes_attend_to_their_own_keys() -> None:
    """Layers that differ take turns, and none is served as another."""
    shapes = [(8, 2, 64), (8, 2, 128), (8, 8, 64), (4, 2, 64)] * 2
    layers = [attention_layer(index, *shape) for index, shape in enumerate(shapes)]
    model = Model(layers)
    step = model.extend(model.requests(0, 0), [30, 60])
    assert counts_of(model, model.backend(), step) == (8, 0)


# --- where the cache is read ----------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [(64, 0), (0, 30), (100, 30)])
def test_a_prefix_anywhere_in_the_batch_is_read_from_the_cache(prefixes: tuple[int, ...]) -> None:
    """One request with a prefix is enough."""
    model = Model(uniform_layers(2))
    step = model.extend(model.requests(*prefixes), [70, 9])
    assert counts_of(model, model.backend(), step) == (0, 1)


def test_unknown_prefixes_are_read_from_the_cache() -> None:
    """Without lengths on the host nobody knows whether there is a prefix."""
    model = Model(uniform_layers(2))
    backend = model.backend()
    step = model.extend(model.requests(0, 0), [70, 9])
    backend.init_forward_metadata(step.batch)
    step.batch.extend_prefix_lens_cpu = None
    for layer in model.layers:
        model.check(backend, step, layer)
    assert backend.musa_fa3_report()["statistics"]["raw_calls"] == 0


def test_unknown_lengths_are_read_from_the_cache() -> None:
    """Without the number of new tokens nobody knows which rows are padding."""
    model = Model(uniform_layers(2))
    backend = model.backend()
    step = model.extend(model.requests(0, 0), [70, 9])
    backend.init_forward_metadata(step.batch)
    step.batch.extend_seq_lens_cpu = None
    for layer in model.layers:
        model.check(backend, step, layer)
    assert backend.musa_fa3_report()["statistics"]["raw_calls"] == 0


def test_a_verify_reads_the_cache() -> None:
    """Drafts attend to what was there before them, whatever the batch says of prefixes."""
    model = Model(uniform_layers(2), arguments=SPEC)
    backend = model.backend()
    step = model.verify(model.requests(100, 5), 4)
    step.batch.extend_prefix_lens_cpu, step.batch.extend_seq_lens_cpu = [0, 0], [4, 4]
    assert counts_of(model, backend, step) == (0, 1)


def test_chunked_local_layers_read_the_cache() -> None:
    """Llama-4's local layers see chunks of their own; the global one among them does not."""
    paged = "local_attn_builder" in inspect.getsource(upstream) or (
        "[:, :: self.page_size] // self.page_size" in inspect.getsource(upstream)
    )
    layers = [attention_layer(index, use_irope=index % 2 == 0) for index in range(4)]
    model = Model(layers, chunk=128, page_size=64 if paged else 1)
    step = model.extend(model.requests(0, 0), [300, 40])
    assert counts_of(model, model.backend(), step) == (2, 1)


@pytest.mark.parametrize("name", ["cache_seqlens", "cu_seqlens_q"])
def test_a_call_with_other_lengths_reads_the_cache(name: str) -> None:
    """Encoder keys have lengths of their own, and a rank of context parallelism other queries."""
    model = Model(uniform_layers(1))
    backend = model.backend()
    step = model.extend(model.requests(0), [20])
    backend.init_forward_metadata(step.batch)
    own = backend._raw_arguments
    seen: list[Any] = []
    layer = model.layers[0]
    metadata = backend.forward_metadata
    usual = {"cache_seqlens": metadata.cache_seqlens_int32, "cu_seqlens_q": metadata.cu_seqlens_q}
    lengths = usual[name].clone()

    def with_other_lengths(arguments: dict[str, Any], own_keys: Any, site: Any) -> Any:
        seen.append(own(arguments | {name: lengths}, own_keys, site))
        return own(arguments, own_keys, site)

    backend._raw_arguments = with_other_lengths
    model.check(backend, step, layer)
    assert seen == [None]


def test_layers_that_share_keys_read_the_cache() -> None:
    """A layer without keys of its own reads another layer's."""
    model = Model([attention_layer(0), attention_layer(0)])
    backend, step = model.backend(), model.extend(model.requests(0, 0), [40, 90])
    backend.init_forward_metadata(step.batch)
    model.check(backend, step, model.layers[0])
    model.check(backend, step, model.layers[1], share_kv=True)
    assert backend.musa_fa3_report()["statistics"]["raw_calls"] == 1


def test_keys_that_are_not_written_are_not_attended_to() -> None:
    """``save_kv_cache=False``: what the cache has may be something else."""
    model = Model(uniform_layers(1))
    backend, step = model.backend(), model.extend(model.requests(0), [40])
    backend.init_forward_metadata(step.batch)
    layer = model.layers[0]
    inputs = model.inputs(step, layer)
    model.require(model.forward(backend, step, layer, inputs), step, layer, inputs)
    assert inputs["k"] is not None
    others = inputs | {"k": torch.zeros_like(inputs["k"])}
    result = model.forward(backend, step, layer, others, save_kv_cache=False)
    model.require(result, step, layer, inputs)


def test_mla_reads_its_latent_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed attention has no keys of its own heads, so no pass is asked for its new rows."""
    monkeypatch.setattr(mixin, "new_rows", Mock(side_effect=AssertionError))
    model = mla_model()
    step = model.extend(model.requests(0, 0), [70, 9])
    assert counts_of(model, model.backend(), step) == (0, 1)


def test_deterministic_inference_reads_the_cache() -> None:
    """One order of sums, whether there is a prefix or not."""
    model = Model(uniform_layers(2), arguments={"enable_deterministic_inference": True})
    step = model.extend(model.requests(0, 0), [70, 9])
    assert counts_of(model, model.backend(), step) == (0, 1)


def test_padded_rows_read_the_cache() -> None:
    """Rows beyond the last request are nobody's queries, and MATE would take them for some."""
    model = Model(uniform_layers(1))
    backend, step = model.backend(), model.extend(model.requests(0), [40])
    backend.init_forward_metadata(step.batch)
    layer = model.layers[0]
    inputs = model.inputs(step, layer)
    real = {name: tensor[:40] for name, tensor in inputs.items() if tensor is not None}
    padded = dict(inputs)
    padded["q"] = torch.cat([real["q"], real["q"][:8]])
    result = model.forward(backend, step, layer, padded)
    model.require(result[:40], step, layer, real)
    assert backend.musa_fa3_report()["statistics"]["raw_calls"] == 0


def test_a_capture_reads_the_cache() -> None:
    """A graph is replayed on other lengths, and with other keys in the cache."""
    model = Model(uniform_layers(2))
    backend = model.backend()
    backend._plans._stream_state = lambda: (0, True)
    step = model.extend(model.requests(0, 0), [70, 9])
    assert counts_of(model, backend, step) == (0, 1)


def test_keys_of_another_dtype_than_the_cache_read_the_cache() -> None:
    """Attention must not see in full what the cache rounds."""
    model = Model(uniform_layers(1))
    backend, step = model.backend(), model.extend(model.requests(0), [40])
    backend.init_forward_metadata(step.batch)
    layer = model.layers[0]
    inputs = model.inputs(step, layer)
    assert inputs["k"] is not None
    others = inputs | {"k": inputs["k"].double()}
    write = model.pool.set_kv_buffer
    model.pool.set_kv_buffer = lambda at, loc, k, v, *_, **__: write(at, loc, k.float(), v)  # type: ignore[method-assign]
    model.require(model.forward(backend, step, layer, others), step, layer, inputs)
    assert backend.musa_fa3_report()["statistics"]["raw_calls"] == 0


@pytest.mark.parametrize(
    ("without", "options"),
    [
        ("window_size", {"sliding_window_size": WINDOW}),
        ("softcap", {"logit_cap": 3.0}),
        ("headdim", {"head_dim": 64}),
        ("headdim_v", {"head_dim": 192, "v_head_dim": 128}),
    ],
)
def test_kernels_without_such_a_function_read_the_cache(
    without: str, options: dict[str, Any]
) -> None:
    """The record says before a call what its function over raw keys serves."""
    model = Model(uniform_layers(2, **options), window=options.get("sliding_window_size"))
    backend = model.backend()
    asked: list[dict[str, Any]] = []

    def serves(**facts: Any) -> bool:
        asked.append(facts)
        return False

    serve(backend, serves)
    step = model.extend(model.requests(0, 0), [70, 9])
    assert counts_of(model, backend, step) == (0, 1)
    wanted = {
        "window_size": (WINDOW, 0), "softcap": 3.0, "headdim": 64, "headdim_v": 128,
    }[without]  # fmt: skip
    assert {facts[without] for facts in asked} == {wanted}


def serve(backend: Any, serves: Callable[..., bool]) -> None:
    """Let ``serves`` say what the kernels of ``backend`` serve over raw keys."""
    backend._kernels = dataclasses.replace(backend._kernels, serves_raw_keys=serves)


@pytest.mark.parametrize("name", ["k_descale", "score_mod", "attention_chunk"])
def test_an_argument_that_only_paged_calls_have_reads_the_cache(name: str) -> None:
    """No argument must be asked for that the other function would not be told."""
    model = Model(uniform_layers(1))
    backend, step = model.backend(), model.extend(model.requests(0), [40])
    backend.init_forward_metadata(step.batch)
    calls = recorded(backend)
    own = backend._raw_arguments
    answers: list[Any] = []

    def asking_for_more(arguments: dict[str, Any], own_keys: Any, site: Any) -> Any:
        answers.append(own(arguments | {name: torch.ones(1)}, own_keys, site))
        return own(arguments, own_keys, site)

    backend._raw_arguments = asking_for_more
    model.check(backend, step, model.layers[0])
    assert answers == [None]
    assert [call.name for call in calls] == ["flash_attn_varlen_func"]


# --- switches -------------------------------------------------------------------------------------


def test_the_setting_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, every prefill reads the cache."""
    monkeypatch.setenv(envs.RAW_PREFILL, "off")
    model = Model(uniform_layers(2))
    step = model.extend(model.requests(0, 0), [70, 9])
    assert counts_of(model, model.backend(), step) == (0, 1)


def test_outputs_over_raw_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """``SGLANG_MUSA_EXT_CHECK=output`` sees these calls as it sees paged ones."""
    monkeypatch.setenv(envs.CHECK, "output")
    model = Model([attention_layer(5), attention_layer(6)])
    backend = model.backend()
    assert counts_of(model, backend, model.extend(model.requests(0, 0), [30, 9])) == (2, 0)
    right = backend._kernels.flash_attn_varlen_func
    object.__setattr__(
        backend._kernels, "flash_attn_varlen_func", lambda **arguments: right(**arguments) * 1.01
    )
    backend._functions.clear()
    with pytest.raises(WrongOutputError, match="layer 5, call 0"):
        model.run_pass(backend, model.extend(model.requests(0, 0), [30, 9]))


def test_passes_over_raw_keys_leave_plans_to_the_others() -> None:
    """A raw prefill between two decodes: each decode has its own plan."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 5)
    new = model.request(0)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
        model.run_pass(backend, model.extend([new], [70]))
        model.run_pass(backend, model.decode([*requests, new]))
    assert (counts.passes, counts.plans, counts.reuses, counts.calls) == (2, 2, 2, 6)
