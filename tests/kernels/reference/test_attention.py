"""The reference kernels give the attention that float64 gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_musa_ext import policy
from sglang_musa_ext.kernels.reference import attention as attention_of_reference
from sglang_musa_ext.kernels.reference import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from sglang_musa_ext.validation.attention_float64 import attention
from tests.support.paged_batch import (
    Batch,
    assert_attention,
    int32,
    kernel_options,
    offsets,
    ragged_call,
)

RAGGED: dict[str, Any] = dict(rows=[1, 37, 0, 13], keys=[70, 37, 5, 150])


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_paged_attention_is_attention(
    page: int, heads: tuple[int, int], causal: bool, planned: bool
) -> None:
    """Attention is as defined, for any pages and heads, causal or not, planned or not."""
    batch = Batch(**RAGGED, heads=heads[0], heads_kv=heads[1], page=page)
    plan = batch.plan(causal=causal) if planned else None
    assert_attention(batch, batch.call(causal=causal, scheduler_metadata=plan), causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "dims", [*policy.mate_head_dim_pairs(policy.NEWEST_MATE), (80, 80), (40, 56)]
)
def test_head_dimensions_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Every bucket of head dimensions, and some between, in every dtype."""
    batch = Batch([1, 20], [40, 70], dim=dims[0], dim_v=dims[1], dtype=dtype)
    out, lse = batch.call(causal=True, scheduler_metadata=batch.plan(causal=True))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_attention(batch, (out, lse), causal=True)


MASKS = [
    dict(window=(10, 0), causal=True),
    dict(window=(10, -1), causal=True),
    dict(window=(0, 0)),
    dict(window=(10, 5)),
    dict(window=(-1, 3)),
    dict(window=(100, -1)),
    dict(window=(1000, 1000)),
    dict(chunk=16, causal=True),
    dict(chunk=16),
    dict(chunk=16, window=(5, 2)),
    dict(chunk=1000, causal=True),
    dict(softcap=3.0, causal=True),
    dict(softcap=3.0, window=(20, 0), causal=True),
    dict(scale=0.3),
]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_masks_and_scores(options: dict[str, Any], planned: bool) -> None:
    """Windows, chunks, softcap and scale act for fewer, equal and more keys than rows."""
    batch = Batch([1, 37, 20, 13], [70, 37, 5, 150])
    known = {
        k: v
        for k, v in kernel_options(options).items()
        if k in ("causal", "window_size", "attention_chunk")
    }
    plan = batch.plan(**known) if planned else None
    assert_attention(
        batch, batch.call(**kernel_options(options), scheduler_metadata=plan), **options
    )


@pytest.mark.parametrize("name", ["sinks", "s_aux"])
@pytest.mark.parametrize("window", [(-1, -1), (20, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks_join_the_denominator(dtype: torch.dtype, window: tuple[int, int], name: str) -> None:
    """A sink is one more logit of each row, without a value."""
    batch = Batch(**RAGGED, dtype=dtype)
    sinks = torch.tensor([0.5, -1.0, 4.0, 12.0], dtype=torch.bfloat16)
    result = batch.call(causal=True, window_size=window, **{name: sinks})
    assert_attention(batch, result, causal=True, window=window, sinks=sinks)


def test_sinks_may_be_float32_with_float32_queries() -> None:
    """float32 sinks are taken where q is float32, and not rounded."""
    batch = Batch(**RAGGED)
    sinks = torch.tensor([0.123456789, -1.0, 4.0, 12.0])
    assert_attention(batch, batch.call(causal=True, sinks=sinks), causal=True, sinks=sinks)


def test_sinks_switch_splits_off() -> None:
    """With sinks the metadata is ignored, however wrong it is."""
    batch = Batch([1, 1], [700, 30])
    sinks = torch.zeros(4, dtype=torch.bfloat16)
    foreign = torch.full((1,), 99, dtype=torch.int32)
    assert_attention(batch, batch.call(sinks=sinks, scheduler_metadata=foreign), sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, dict(window=(600, 0)), dict(softcap=5.0)], ids=str)
def test_long_contexts_are_split_and_combined(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Decoding long contexts really runs in splits, and their combination is attention."""
    batch = Batch([1, 1, 1], [1500, 700, 64], dtype=dtype)
    window = options.get("window", (-1, -1))
    plan = batch.plan(causal=True, window_size=window)
    assert plan[:3].max() > 1
    result = batch.call(causal=True, **kernel_options(options), scheduler_metadata=plan)
    assert_attention(batch, result, causal=True, **options)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_a_given_number_of_splits_is_kept(num_splits: int) -> None:
    """With ``num_splits`` given to both, no more splits are planned than that."""
    batch = Batch([1], [1000])
    plan = batch.plan(num_splits=num_splits)
    assert 1 <= plan[0] <= num_splits
    assert_attention(batch, batch.call(num_splits=num_splits, scheduler_metadata=plan))


def test_long_prefill_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken in pieces where the scores would not fit, without a change in the output."""
    monkeypatch.setattr(attention_of_reference, "_SCORE_BUDGET", 2000)
    batch = Batch(**RAGGED)
    assert_attention(batch, batch.call(causal=True), causal=True)


def test_dense_queries_give_a_batched_lse() -> None:
    """Queries of four dimensions give ``(batch, seqlen_q, heads, dim)`` and
    ``(batch, heads, seqlen_q)``.
    """
    batch = Batch([3, 3], [70, 9])
    out, lse = batch.call(
        q=batch.q.view(2, 3, 4, 64), cu_seqlens_q=None, max_seqlen_q=None, causal=True
    )
    assert out.shape == (2, 3, 4, 64)
    assert lse.shape == (2, 4, 3)
    assert_attention(batch, (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), causal=True)


def test_the_kv_cache_call_returns_the_output_alone_unless_asked() -> None:
    """Without ``return_softmax_lse`` there is one tensor, with it MATE's four."""
    batch = Batch([1], [5])
    alone = flash_attn_with_kvcache(
        batch.q, batch.k_cache, batch.v_cache, page_table=batch.page_table,
        cache_seqlens=batch.cache_seqlens,
        cu_seqlens_q=batch.cu_seqlens_q, max_seqlen_q=1,
    )  # fmt: skip
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, batch.call()[0])


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_ragged_keys(options: dict[str, Any]) -> None:
    """The varlen function over ragged keys is attention, under every mask."""
    batch = Batch([1, 37, 20, 13], [70, 37, 5, 90])
    assert_attention(batch, ragged_call(batch, **kernel_options(options)), **options)


@pytest.mark.parametrize("name", ["page_table", "block_table"])
def test_varlen_over_pages(name: str) -> None:
    """The varlen function takes pages under both of its names for a page table."""
    batch = Batch(**RAGGED)
    result = ragged_call(
        batch, k=batch.k_cache, v=batch.v_cache, cu_seqlens_k=None, seqused_k=batch.cache_seqlens,
        **{name: batch.page_table},
    )  # fmt: skip
    assert_attention(batch, result)


def test_varlen_over_dense_tensors() -> None:
    """Without offsets the varlen function takes dense batches."""
    batch = Batch([3, 3], [20, 20])
    out, lse = flash_attn_varlen_func(
        batch.q.view(2, 3, 4, 64),
        torch.stack(batch.k),
        torch.stack(batch.v),
        causal=True,
        return_softmax_lse=True,
    )
    assert_attention(batch, (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), causal=True)


def test_used_lengths_shorten_ragged_sequences() -> None:
    """``seqused_q`` and ``seqused_k`` cut each sequence short; rows past them are not written."""
    batch = Batch([4, 6], [9, 12])
    out, _ = ragged_call(batch, seqused_q=int32([2, 6]), seqused_k=int32([5, 12]))
    expected, _ = attention(batch.q[:2], batch.k[0][:5], batch.v[0][:5])
    torch.testing.assert_close(out[:2].double(), expected, rtol=0, atol=1e-5)
    assert out[2:4].isnan().all()


def test_out_is_written_in_place_and_returned() -> None:
    """``out=`` is the tensor that comes back, and its padding rows stay as they were."""
    batch = Batch([2, 5], [10, 20])
    padded = torch.cat([batch.q, torch.zeros(3, 4, 64)])
    out = torch.full((10, 4, 64), 7.0)
    result, lse = ragged_call(batch, q=padded, out=out)
    assert result is out
    assert (out[7:] == 7.0).all()
    assert_attention(batch, (out[:7], lse[:, :7]))


def test_padding_rows_are_not_written() -> None:
    """Rows beyond the last offset are nobody's: NaN in output and LSE."""
    batch = Batch([2, 5], [10, 20])
    out, lse = batch.call(q=torch.cat([batch.q, torch.zeros(3, 4, 64)]))
    assert out[7:].isnan().all()
    assert lse[:, 7:].isnan().all()
    assert_attention(batch, (out[:7], lse[:, :7]))


@pytest.mark.parametrize("planned", [False, True])
def test_an_empty_cache_gives_zero_and_minus_infinity(planned: bool) -> None:
    """A request without keys gives output 0 and LSE -inf, beside requests that have some."""
    batch = Batch([1, 3, 2], [0, 9, 0])
    out, lse = batch.call(scheduler_metadata=batch.plan() if planned else None)
    assert (out[0] == 0).all()
    assert (lse[:, 0] == -math.inf).all()
    assert_attention(batch, (out, lse))


def test_a_batch_without_rows_gives_nothing() -> None:
    """No query rows at all are no error."""
    batch = Batch([0, 0], [5, 9])
    assert batch.call()[0].shape == (0, 4, 64)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("ragged", [False, True])
def test_new_keys_are_appended_in_place(ragged: bool, page: int) -> None:
    """New keys go into the cache behind the old ones and are attended to; nothing else changes."""
    batch = Batch([3, 3], [20, 40], page=page)
    before = batch.k_cache.clone()
    new = int32([20 - 3, 40 - 3])
    k = torch.stack([part[-3:] for part in batch.k])
    v = torch.stack([part[-3:] for part in batch.v])
    for cache in (batch.k_cache, batch.v_cache):
        for index, keys in enumerate(batch.keys):
            for at in range(keys - 3, keys):
                cache[batch.page_table[index, at // page], at % page] = math.nan
    changes: dict[str, Any] = dict(k=k, v=v)
    if ragged:
        changes = dict(k=k.flatten(0, 1), v=v.flatten(0, 1), cu_seqlens_k_new=offsets([3, 3]))
    result = batch.call(cache_seqlens=new, causal=True, **changes)
    assert torch.equal(batch.k_cache.nan_to_num(99), before.nan_to_num(99))
    assert_attention(batch, result, causal=True)


def test_offsets_of_new_keys_mean_nothing_without_new_keys() -> None:
    """``cu_seqlens_k_new`` without ``k`` is ignored by the forward, but *adds* keys to a plan."""
    batch = Batch([1], [300], pages=20)
    assert_attention(batch, batch.call(cu_seqlens_k_new=offsets([300])))
    doubled = batch.plan(cu_seqlens_k_new=offsets([900]))
    assert doubled[0] > batch.plan()[0]


def test_left_padding_and_batch_indices() -> None:
    """``cache_leftpad`` skips keys at the front and ``cache_batch_idx`` picks rows of the cache."""
    batch = Batch([2, 2], [30, 50])
    dense = torch.full((3, 64, 2, 64), math.nan), torch.full((3, 64, 2, 64), math.nan)
    for cache, parts in zip(dense, (batch.k, batch.v), strict=True):
        cache[2, 4:34], cache[0, :50] = parts[0], parts[1]
    result = batch.call(
        k_cache=dense[0], v_cache=dense[1], page_table=None, cache_seqlens=int32([34, 50]),
        cache_leftpad=int32([4, 0]), cache_batch_idx=int32([2, 0]), causal=True,
    )  # fmt: skip
    assert_attention(batch, result, causal=True)
