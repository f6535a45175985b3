"""MATE's stand-in against float64 and the package's reference kernels, which share no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.engine import EngineServer

PAGE = 64


@dataclass(frozen=True)
class Call:
    """A call over a paged cache."""

    name: str
    lengths_q: tuple[int, ...] = (1, 1, 1)
    lengths_k: tuple[int, ...] = (1500, 70, 400)
    headdim: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True
    sinks: bool = False


CALLS = [
    Call("decode, several splits"),
    Call("decode, no plan", planned=False),
    Call("prefill behind a prefix", (200, 33, 1), (900, 600, 64)),
    Call("window", (1, 5, 90), (1500, 300, 800), options={"window_size": (127, 0)}),
    Call("softcap", options={"softcap": 5.0}),
    Call("sinks", sinks=True),
    Call("head dim 256", headdim=256),
    Call("attention chunk", (40, 1, 3), options={"attention_chunk": 128}),
]


def outputs(call: Call) -> dict[str, list[Any]]:
    """Return a call's results of float64, stand-in and reference, and its number of splits."""
    import torch

    from sglang_musa_ext.kernels import provider
    from sglang_musa_ext.validation import attention_float64

    torch.manual_seed(0)
    heads, heads_kv, batch = 4, 2, len(call.lengths_q)
    pages = [-(-length // PAGE) for length in call.lengths_k]
    caches = [torch.randn(sum(pages), PAGE, heads_kv, call.headdim).half() for _ in range(2)]
    page_table = torch.zeros(batch, max(pages), dtype=torch.int32)
    order = torch.randperm(sum(pages)).int()
    for request, numbers in enumerate(torch.split(order, pages)):
        page_table[request, : len(numbers)] = numbers
    q = torch.randn(sum(call.lengths_q), heads, call.headdim).half()
    sinks = torch.randn(heads).bfloat16() if call.sinks else None
    exact = []
    for request, rows in enumerate(torch.split(q, list(call.lengths_q))):
        used = page_table[request, : pages[request]].long()
        k, v = (cache[used].flatten(0, 1)[: call.lengths_k[request]] for cache in caches)
        options = {
            name.partition("_size")[0].removeprefix("attention_"): value
            for name, value in call.options.items()
        }
        out, _ = attention_float64.attention(rows, k, v, causal=True, sinks=sinks, **options)
        exact.append(out)
    starts = torch.tensor([0, *call.lengths_q]).cumsum(0).int()
    arguments = {
        "q": q, "k_cache": caches[0], "v_cache": caches[1], "page_table": page_table,
        "sinks": sinks,
        "cache_seqlens": torch.tensor(call.lengths_k).int(), "cu_seqlens_q": starts,
        "max_seqlen_q": max(call.lengths_q), "causal": True, **call.options,
    }  # fmt: skip
    results: dict[str, list[Any]] = {"exact": torch.cat(exact).tolist()}
    for name, device in (("mate", "musa"), ("reference", "cpu")):
        kernels = getattr(provider, f"{name}_kernels")(torch.device(device))
        moved = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        plan = _plan(kernels, moved, heads_kv) if call.planned else None
        results[name] = (
            kernels.flash_attn_with_kvcache(**moved, scheduler_metadata=plan).float().cpu().tolist()
        )
        results[f"{name} plan"] = [] if plan is None else plan.cpu().tolist()
    return results


def _plan(kernels: Any, arguments: Mapping[str, Any], heads_kv: int) -> Any:
    q, table = arguments["q"], arguments["page_table"]
    given = {
        name: arguments[name]
        for name in ("cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "causal")
    }
    more = {
        name: arguments[name] for name in ("window_size", "attention_chunk") if name in arguments
    }
    return kernels.get_scheduler_metadata(
        batch_size=table.shape[0],
        max_seqlen_k=table.shape[1] * PAGE,
        num_heads_q=q.shape[1],
        num_heads_kv=heads_kv,
        headdim=q.shape[2],
        headdim_v=q.shape[2],
        qkv_dtype=q.dtype,
        **given,
        **more,
    )


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_stand_in_and_reference_equal_float64(musa: EngineServer, call: Call) -> None:
    """Both are within half precision of attention's definition, each on a plan of its own."""
    import torch

    results = musa.call(outputs, call)
    exact = torch.tensor(results["exact"], dtype=torch.float64)
    for name in ("mate", "reference"):
        assert (torch.tensor(results[name], dtype=torch.float64) - exact).abs().max() < 4e-3, name
    if call.name == "decode, several splits":
        assert max(results["mate plan"][:3]) > 1


def stale_plan(swapped: bool) -> list[list[float]]:
    """Return MATE's output for two requests, on their plan or on that of swapped ones."""
    import torch

    from sglang_musa_ext.kernels import provider

    torch.manual_seed(0)
    kernels = provider.mate_kernels(torch.device("musa"))
    pages = torch.arange(64, device="musa").int().view(2, 32)
    k, v = (torch.randn(64, PAGE, 1, 64, device="musa").half() for _ in range(2))
    q = torch.randn(2, 1, 4, 64, device="musa").half()
    lengths = torch.tensor([2000, 100], device="musa").int()
    plan = kernels.get_scheduler_metadata(
        batch_size=2, max_seqlen_q=1, max_seqlen_k=2048, num_heads_q=4, num_heads_kv=1, headdim=64,
        headdim_v=64,
        qkv_dtype=q.dtype, cache_seqlens=lengths.flip(0).contiguous() if swapped else lengths,
        causal=True,
    )  # fmt: skip
    if swapped:
        plan.view(4, -1)[2, 0] = 0  # As a plan that was made for fewer queries.
    out = kernels.flash_attn_with_kvcache(
        q=q, k_cache=k, v_cache=v, page_table=pages, cache_seqlens=lengths, causal=True,
        scheduler_metadata=plan,
    )  # fmt: skip
    return [row.flatten().float().tolist() for row in out.cpu()]


def test_rows_that_a_plan_leaves_out_are_not_written(musa: EngineServer) -> None:
    """A plan of other queries leaves memory at NaN; its own plan does not."""
    right, wrong = musa.call(stale_plan, False), musa.call(stale_plan, True)
    assert all(value == value for row in right for value in row)
    assert any(value != value for row in wrong for value in row)
