"""The arguments that reach the kernels, and what tells two calls of a pass apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from sglang_musa_ext.attention.calls import CallGeometry, CallSite
from sglang_musa_ext.kernels import provider as kernels
from tests.support.backend import (
    Model,
    counted,
    dispatch,
    recorded,
    replace_kernels,
    upstream,
)
from tests.support.layers import (
    SPEC,
    mla_model,
    uniform_layers,
    widen,
)

# --- what reaches the kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("mode", ["decode", "prefill", "verify"])
def test_no_call_counts_its_keys_twice(mla: bool, mode: str) -> None:
    """``cu_seqlens_k_new`` goes on only with new keys, which upstream's forwards never pass."""
    model = mla_model(arguments=SPEC) if mla else Model(uniform_layers(2), arguments=SPEC)
    backend, requests = model.backend(), model.requests(200, 5)
    calls = recorded(backend)
    steps = {
        "decode": lambda: model.decode(requests),
        "prefill": lambda: model.extend(requests, [30, 60]),
        "verify": lambda: model.verify(requests, 4),
    }
    model.run_pass(backend, steps[mode]())
    assert calls
    assert not [call for call in calls if call.arguments.get("cu_seqlens_k_new") is not None]


def test_new_keys_keep_their_offsets() -> None:
    """A call that does append keys keeps ``cu_seqlens_k_new``, and its plan counts them."""
    model = Model(uniform_layers(1))
    backend = model.backend()
    calls = recorded(backend)
    table = (model.table[:1, ::64] // 64).contiguous()
    pages = [buffer.view(-1, 64, 2, 64) for buffer in model.pool.get_kv_buffer(0)]
    model.request(100)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    backend.flash_attn_with_kvcache(
        q=model.normal(3, 4, 64), k_cache=pages[0], v_cache=pages[1], k=model.normal(3, 2, 64),
        v=model.normal(3, 2, 64), cache_seqlens=torch.tensor([100], dtype=torch.int32),
        page_table=table,
        cu_seqlens_q=offsets, cu_seqlens_k_new=offsets, max_seqlen_q=3, causal=True,
    )  # fmt: skip
    assert [call.arguments["cu_seqlens_k_new"] is offsets for call in calls] == [True, True]


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_plan_is_bounded_by_the_capacity_of_the_page_table(mode: str) -> None:
    """``max_seqlen_k`` is what the kernel derives, not a length that upstream may leave unset."""
    model = Model(uniform_layers(1), context_len=1024)
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    backend.init_forward_metadata(step.batch)
    widen(backend, model)
    backend.forward_metadata.max_seq_len_k = 1
    model.check(backend, step, model.layers[0])
    planned = [
        call.arguments["max_seqlen_k"] for call in calls if call.name == "get_scheduler_metadata"
    ]
    assert planned == [1024]


def test_upstreams_own_precompute_is_off() -> None:
    """Upstream's metadata, which knows plain decode layers alone, is neither computed nor used."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    assert not calls
    assert getattr(backend.forward_metadata, "scheduler_metadata", None) is None
    # Even one that is there does not reach the kernels.
    backend.forward_metadata.scheduler_metadata = torch.full((8,), 99, dtype=torch.int32)
    model.check(backend, step, model.layers[0])
    plan, call = calls
    assert call.arguments["scheduler_metadata"] is plan.result


def test_a_call_outside_of_any_layer_is_a_pass_of_its_own() -> None:
    """Whoever calls the backend's kernel by itself gets a fresh plan each time."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    model.run_pass(backend, model.decode(requests), model.layers[:1])
    arguments = {**calls[-1].arguments}
    with counted(backend) as counts:
        backend.flash_attn_with_kvcache(**arguments)
        backend.flash_attn_with_kvcache(**arguments)
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 0)


def test_a_call_outside_of_any_layer_leaves_no_plan_to_layers() -> None:
    """The pass of such a call is over when it returns."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests)
    model.run_pass(backend, step, model.layers[:1])
    backend.flash_attn_with_kvcache(**calls[-1].arguments)
    with counted(backend) as counts:
        model.check(backend, step, model.layers[1])
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 0)


def test_a_failing_layer_leaves_no_trace() -> None:
    """An exception inside a forward takes its layer off the stack, so the next call is not its."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(300, 5)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    with pytest.raises(RuntimeError):
        model.forward(
            backend,
            step,
            model.layers[0],
            {**model.inputs(step, model.layers[0]), "q": torch.zeros(3)},
        )
    assert not dispatch.RUNNING.stack
    model.check(backend, step, model.layers[0])


# --- geometry -------------------------------------------------------------------------------------

BASE_CALL = {
    "q": torch.zeros(6, 8, 64), "k_cache": torch.zeros(9, 16, 2, 64),
    "v_cache": torch.zeros(9, 16, 2, 64),
    "page_table": torch.zeros(3, 5, dtype=torch.int32), "cu_seqlens_q": torch.zeros(4),
    "max_seqlen_q": 2,
    "causal": True, "window_size": (7, 0), "num_splits": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({}, "batch_size", 3),
        ({"q": torch.zeros(3, 2, 8, 64), "cu_seqlens_q": None}, "batch_size", 3),
        ({"q": torch.zeros(3, 7, 8, 64), "cu_seqlens_q": None}, "max_seqlen_q", 7),
        ({}, "max_seqlen_q", 2),
        ({}, "max_seqlen_k", 80),
        ({"page_table": None}, "max_seqlen_k", 16),
        ({}, "num_heads_q", 8),
        ({}, "num_heads_kv", 2),
        ({}, "headdim", 64),
        ({"v_cache": torch.zeros(9, 16, 2, 32)}, "headdim_v", 32),
        ({}, "qkv_dtype", torch.float32),
        ({}, "page_size", 16),
        ({"page_table": None}, "page_size", None),
        ({}, "causal", True),
        ({"causal": None}, "causal", False),
        ({}, "window_size", (7, 0)),
        ({"window_size": None}, "window_size", (-1, -1)),
        ({"window_size": [3, 4]}, "window_size", (3, 4)),
        ({"attention_chunk": 64}, "attention_chunk", 64),
        ({}, "attention_chunk", 0),
        ({}, "num_splits", 1),
        ({"pack_gqa": True}, "pack_gqa", True),
        ({"sm_margin": 4}, "sm_margin", 4),
        ({"qv": torch.zeros(1)}, "has_qv", True),
        ({}, "has_qv", False),
    ],
)
def test_geometry_is_read_off_the_call(change: dict[str, Any], field: str, value: Any) -> None:
    """Every field of the key comes from what the kernel itself gets."""
    geometry = CallGeometry.of(BASE_CALL | change, kernels.reference_kernels())
    assert (geometry._asdict() | geometry.keywords())[field] == value


@pytest.mark.parametrize("uses", [False, True])
def test_softcap_is_part_of_the_geometry_only_where_plans_depend_on_it(uses: bool) -> None:
    """NVIDIA's metadata depends on ``has_softcap``, MATE's does not."""
    provider = dataclasses.replace(kernels.reference_kernels(), metadata_uses_softcap=uses)
    assert CallGeometry.of(BASE_CALL | {"softcap": 30.0}, provider).has_softcap is uses


OTHER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "batch size": {"q": torch.zeros(6, 1, 8, 64), "cu_seqlens_q": None},
    "max_seqlen_q": {"max_seqlen_q": 3},
    "capacity": {"page_table": torch.zeros(3, 6, dtype=torch.int32)},
    "query heads": {"q": torch.zeros(6, 16, 64)},
    "key heads": {"k_cache": torch.zeros(9, 16, 4, 64)},
    "head dim": {"q": torch.zeros(6, 8, 128)},
    "value head dim": {"v_cache": torch.zeros(9, 16, 2, 32)},
    "dtype": {"q": torch.zeros(6, 8, 64, dtype=torch.bfloat16)},
    "page size": {
        "k_cache": torch.zeros(9, 80, 2, 64),
        "page_table": torch.zeros(3, 1, dtype=torch.int32),
    },
    "causal": {"causal": False},
    "window": {"window_size": (8, 0)},
    "chunk": {"attention_chunk": 64},
    "splits": {"num_splits": 2},
    "softcap": {"softcap": 30.0},
    "packing": {"pack_gqa": True},
    "margin": {"sm_margin": 1},
    "qv": {"qv": torch.zeros(1)},
    "device": {"q": torch.zeros(6, 8, 64, device="meta")},
    "lengths": {"cache_seqlens": torch.ones(3, dtype=torch.int32)},
    "offsets": {"cu_seqlens_q": torch.zeros(4)},
    "padding": {"cache_leftpad": torch.zeros(3, dtype=torch.int32)},
    "new keys": {"k": torch.zeros(1), "cu_seqlens_k_new": torch.zeros(4)},
}
NEUTRAL: dict[str, Any] = {
    "softcap": 0.0,
    "sm_margin": 0,
    "k": torch.zeros(1),
    "cu_seqlens_k_new": torch.ones(4),
}
"""Values of a call without these changes, where that is not ``None``; names count, too."""


def in_layer(backend: Any, batch: Any, calls: Callable[[], None]) -> None:
    """Run ``calls`` as one layer's of ``backend``."""
    backend._plans.begin_layer(object(), batch, backend.forward_metadata)
    dispatch.RUNNING.stack.append(backend)
    try:
        calls()
    finally:
        dispatch.RUNNING.stack.pop()


@pytest.mark.parametrize("what", OTHER_ARGUMENTS)
def test_calls_of_a_layer_that_differ_in_one_thing_have_plans_of_their_own(what: str) -> None:
    """Any one thing that a plan depends on tells two calls of a pass apart; equal calls share."""
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    backend._kernels = dataclasses.replace(backend._kernels, metadata_uses_softcap=True)
    neutral = {name: NEUTRAL.get(name) for name in OTHER_ARGUMENTS[what]}
    first = {**neutral, **BASE_CALL, "cache_seqlens": torch.zeros(3, dtype=torch.int32)}

    def calls() -> None:
        for change in ({}, {}, OTHER_ARGUMENTS[what], {}):
            upstream.flash_attn_with_kvcache(**first | change)

    batch = SimpleNamespace()
    with counted(backend) as counts:
        in_layer(backend, batch, calls)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 2)


def test_calls_with_equal_values_under_other_names_are_told_apart() -> None:
    """A single split in one call and packed heads in another are told apart: 1 equals ``True``."""
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    first = {**BASE_CALL, "cache_seqlens": torch.zeros(3, dtype=torch.int32)}
    second = {name: value for name, value in first.items() if name != "num_splits"} | {
        "pack_gqa": True
    }

    def calls() -> None:
        for arguments in (first, second, first, second):
            upstream.flash_attn_with_kvcache(**arguments)

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 2)


@pytest.mark.parametrize(
    "second", ["another view", "an equal view after a change", "the same tensor after a change"]
)
def test_lengths_of_a_pass_are_told_apart_by_their_contents(second: str) -> None:
    """Lengths changed in place between two calls, or that only look alike, are other lengths."""
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    lengths = torch.zeros(6, dtype=torch.int32)

    first = lengths[:3]

    def calls() -> None:
        upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=first)
        if "change" in second:
            lengths.add_(1)
        views = {"another view": lengths[::2], "an equal view after a change": lengths[:3]}
        upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=views.get(second, first))

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.plans, counts.reuses) == (2, 0)


def test_equal_lengths_in_other_tensors_have_nothing_remembered_and_share_a_plan() -> None:
    """Two views of the same lengths look different, and are the same contents."""
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    lengths = torch.zeros(6, dtype=torch.int32)

    def calls() -> None:
        for view in (lengths[:3], lengths[:3]):
            upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=view)

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.plans, counts.reuses) == (1, 1)


def test_a_plan_is_recalled_without_its_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's looks are enough to find an earlier plan; its geometry is worked out once."""
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    geometry = Mock(side_effect=CallSite.geometry_of)
    monkeypatch.setattr(CallSite, "geometry_of", lambda *arguments: geometry(*arguments))
    lengths = torch.zeros(3, dtype=torch.int32)

    def calls() -> None:
        for _ in range(4):
            upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=lengths)

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.plans, counts.reuses, geometry.call_count) == (1, 3, 1)
