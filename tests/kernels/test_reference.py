"""The reference kernels: float64 attention where the plan is good, NaN or an error where it is not."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_musa_ext.kernels import reference
from sglang_musa_ext.kernels.reference import (
    KernelRefusal,
    RefusedFeature,
    RefusedType,
    RefusedValue,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    mla_parts,
    mla_plan_bytes,
)
from tests.support.attention_float64 import attention


@dataclass
class Batch:
    """A paged batch: ``rows`` new queries of each request over ``keys`` cached tokens, in shuffled
    pages.
    """

    rows: list[int]
    keys: list[int]
    heads: int = 4
    heads_kv: int = 2
    dim: int = 64
    dim_v: int = 64
    page: int = 64
    pages: int = 0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        width = max([self.pages, *(-(-keys // self.page) for keys in self.keys)])
        count = width * len(self.keys) + 1
        order = torch.randperm(count, generator=generator)[: width * len(self.keys)]
        self.page_table = order.view(len(self.keys), width).to(torch.int32).contiguous()
        self.q = randn(sum(self.rows), self.heads, self.dim)
        # Slots that hold no key are NaN: reading one shows.
        self.k_cache = torch.full(
            (count, self.page, self.heads_kv, self.dim), math.nan, dtype=self.dtype
        )
        self.v_cache = torch.full(
            (count, self.page, self.heads_kv, self.dim_v), math.nan, dtype=self.dtype
        )
        self.k = [randn(keys, self.heads_kv, self.dim) for keys in self.keys]
        self.v = [randn(keys, self.heads_kv, self.dim_v) for keys in self.keys]
        for index, keys in enumerate(self.keys):
            at = torch.arange(keys)
            page, slot = self.page_table[index].long()[at // self.page], at % self.page
            self.k_cache[page, slot], self.v_cache[page, slot] = self.k[index], self.v[index]
        self.cache_seqlens = int32(self.keys)
        self.cu_seqlens_q = offsets(self.rows)

    @property
    def capacity(self) -> int:
        return self.page_table.shape[1] * self.page

    def call(self, **changes: Any) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = dict(
            q=self.q, k_cache=self.k_cache, v_cache=self.v_cache, page_table=self.page_table,
            cache_seqlens=self.cache_seqlens, cu_seqlens_q=self.cu_seqlens_q, max_seqlen_q=max(self.rows),
        )  # fmt: skip
        out, lse, *_ = flash_attn_with_kvcache(
            **{**arguments, "return_softmax_lse": True, **changes}
        )
        return out, lse

    def plan(self, **changes: Any) -> Tensor:
        arguments: dict[str, Any] = dict(
            batch_size=len(self.rows), max_seqlen_q=max(self.rows), max_seqlen_k=self.capacity,
            num_heads_q=self.heads, num_heads_kv=self.heads_kv, headdim=self.dim, headdim_v=self.dim_v,
            cache_seqlens=self.cache_seqlens, cu_seqlens_q=self.cu_seqlens_q,
        )  # fmt: skip
        return get_scheduler_metadata(**{**arguments, **changes})

    def split_rows(self) -> list[Tensor]:
        return list(torch.split(self.q, self.rows))

    def truth(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
        parts = [
            attention(q, k, v, dtype=dtype, **options)
            for q, k, v in zip(self.split_rows(), self.k, self.v, strict=True)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths: list[int]) -> Tensor:
    return int32([sum(lengths[:index]) for index in range(len(lengths) + 1)])


def assert_close(result: Tensor, truth: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """No further from the truth than twice PyTorch's own error in this dtype, and two roundings."""
    finite = truth.isfinite()
    assert torch.equal(result.double()[~finite], truth[~finite])
    fair = 2 * (plain.double() - truth)[finite].abs().max() if finite.any() else 0.0
    rounding = 2 * torch.finfo(dtype).eps * truth[finite].abs().max() if finite.any() else 0.0
    torch.testing.assert_close(
        result.double()[finite], truth[finite], rtol=0, atol=float(fair + rounding)
    )


def assert_attention(batch: Batch, result: tuple[Tensor, Tensor], **options: Any) -> None:
    truth, plain = batch.truth(**options), batch.truth(batch.dtype, **options)
    assert_close(result[0], truth[0], plain[0], batch.dtype)
    # LSE is float32 whatever the inputs are, so it earns no tolerance from a coarser dtype.
    plain32 = batch.truth(torch.float32, **options) if batch.dtype != torch.float32 else plain
    assert_close(result[1], truth[1], plain32[1], torch.float32)


RAGGED: dict[str, Any] = dict(rows=[1, 37, 0, 13], keys=[70, 37, 5, 150])


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_paged_attention_is_attention(
    page: int, heads: tuple[int, int], causal: bool, planned: bool
) -> None:
    """Pages of any size, any grouping of heads, causal or not, planned or not: attention as
    defined.
    """
    batch = Batch(**RAGGED, heads=heads[0], heads_kv=heads[1], page=page)
    plan = batch.plan(causal=causal) if planned else None
    assert_attention(batch, batch.call(causal=causal, scheduler_metadata=plan), causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [*reference.HEAD_DIM_PAIRS, (80, 80), (40, 56)])
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


def kernel_options(options: dict[str, Any]) -> dict[str, Any]:
    names = dict(window="window_size", chunk="attention_chunk", scale="softmax_scale")
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_masks_and_scores(options: dict[str, Any], planned: bool) -> None:
    """Windows, chunks, softcap and scale mean what they say, with fewer, equal and more keys than
    rows.
    """
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
    monkeypatch.setattr(reference, "_SCORE_BUDGET", 2000)
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
        batch.q, batch.k_cache, batch.v_cache, page_table=batch.page_table, cache_seqlens=batch.cache_seqlens,
        cu_seqlens_q=batch.cu_seqlens_q, max_seqlen_q=1,
    )  # fmt: skip
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, batch.call()[0])


def ragged_call(batch: Batch, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        q=batch.q, k=torch.cat(batch.k), v=torch.cat(batch.v), cu_seqlens_q=batch.cu_seqlens_q,
        cu_seqlens_k=offsets(batch.keys), max_seqlen_q=max(batch.rows), max_seqlen_k=max(batch.keys),
    )  # fmt: skip
    return flash_attn_varlen_func(**{**arguments, "return_softmax_lse": True, **changes})


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
    truth, _ = attention(batch.q[:2], batch.k[0][:5], batch.v[0][:5])
    torch.testing.assert_close(out[:2].double(), truth, rtol=0, atol=1e-5)
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
    """New keys go into the cache behind the old ones and are attended to; nothing else is touched."""
    batch = Batch([3, 3], [20, 40], page=page)
    before = batch.k_cache.clone()
    new = int32([20 - 3, 40 - 3])
    k, v = (torch.stack([part[-3:] for part in parts]) for parts in (batch.k, batch.v))
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


# --- MLA ---


@dataclass
class Latent:
    """An MLA batch: 64 rotary and 512 latent dimensions, one key head, pages of 64."""

    rows: list[int]
    keys: list[int]
    heads: int = 8
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.rope = Batch(self.rows, self.keys, self.heads, 1, 64, 64, dtype=self.dtype, seed=1)
        self.latent = Batch(self.rows, self.keys, self.heads, 1, 512, 512, dtype=self.dtype, seed=1)
        self.latent.v_cache, self.latent.v = self.latent.k_cache, self.latent.k
        # The same seed shuffles the same pages, so one table serves both caches.
        assert torch.equal(self.rope.page_table, self.latent.page_table)
        needed = mla_plan_bytes(len(self.rows), max(self.rows), self.heads)
        self.workspace = torch.full((needed,), 255, dtype=torch.uint8)

    def call(
        self, reuse: bool = False, workspace: Tensor | None = None, **changes: Any
    ) -> tuple[Tensor, Tensor]:
        space = self.workspace if workspace is None else workspace
        arguments = dict(
            qv=self.latent.q, v_cache=self.latent.k_cache, scheduler_metadata=(space, reuse)
        )
        return self.rope.call(**{**arguments, **changes})

    def truth(self, dtype: torch.dtype, causal: bool) -> tuple[Tensor, Tensor]:
        parts = [
            attention(torch.cat([q, qv], -1), torch.cat([k, c], -1), c, dtype=dtype, causal=causal)
            for q, qv, k, c in zip(
                self.rope.split_rows(),
                self.latent.split_rows(),
                self.rope.k,
                self.latent.k,
                strict=True,
            )
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)

    def check(self, result: tuple[Tensor, Tensor], causal: bool) -> None:
        truth = self.truth(torch.float64, causal)
        assert_close(result[0], truth[0], self.truth(self.dtype, causal)[0], self.dtype)
        assert_close(result[1], truth[1], self.truth(torch.float32, causal)[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "case", [([1, 1], [700, 10]), ([3, 1, 2], [130, 0, 64]), ([20], [65])], ids=str
)
def test_mla_is_attention(
    case: tuple[list[int], list[int]], causal: bool, dtype: torch.dtype
) -> None:
    """MLA scores rotary and latent parts together, planned and from its own plan once more."""
    batch = Latent(*case, dtype=dtype)
    first = batch.call(causal=causal)
    batch.check(first, causal)
    again = batch.call(causal=causal, reuse=True)
    assert torch.equal(first[0], again[0])


def test_mla_ignores_window_softcap_and_splits() -> None:
    """MLA has no window, softcap or number of splits to give, as in MATE."""
    batch = Latent([1, 1], [200, 10])
    plain = batch.call()
    assert torch.equal(batch.call(window_size=(3, 0), softcap=2.0, num_splits=7)[0], plain[0])


def test_mla_plans_really_split() -> None:
    """One long request is dealt to several parts."""
    batch = Latent([1], [1000])
    batch.call()
    plan = batch.workspace.view(torch.int32)
    assert plan[8 * mla_parts(1, 8) + 1] > 1


def test_dense_mla_queries_give_an_lse_like_the_queries() -> None:
    """Of 4-d queries MLA's LSE is ``(batch, seqlen_q, heads)``."""
    batch = Latent([2, 2], [100, 30])
    dense: dict[str, Any] = {
        "q": batch.rope.q.view(2, 2, 8, 64),
        "qv": batch.latent.q.view(2, 2, 8, 512),
    }
    out, lse = batch.call(**dense, cu_seqlens_q=None, max_seqlen_q=None, causal=True)
    assert lse.shape == (2, 2, 8)
    batch.check((out.flatten(0, 1), lse.flatten(0, 1).T), causal=True)


@pytest.mark.parametrize(
    ("planned", "used"),
    [
        (([1, 1], [700, 10]), ([1, 1], [10, 700])),
        (([1], [100]), ([1], [900])),
        (([1], [900]), ([1], [100])),
        (([1, 1], [300, 300]), ([1, 1, 1], [300, 300, 300])),
        (([1, 1], [300, 300]), ([64, 64], [300, 300])),
    ],
    ids=["other order", "more keys", "fewer keys", "larger batch", "more rows"],
)
def test_reusing_a_foreign_mla_plan_shows(planned: Any, used: Any) -> None:
    """A plan of another geometry gives NaN where the device would give garbage."""
    workspace = torch.full((4096,), 255, dtype=torch.uint8)
    Latent(*planned).call(workspace=workspace)
    out, _ = Latent(*used).call(workspace=workspace, reuse=True)
    assert out.isnan().any()


def test_reusing_an_unwritten_workspace_shows() -> None:
    """A workspace that nobody planned in gives nothing but NaN."""
    assert Latent([1, 1], [100, 10]).call(reuse=True)[0].isnan().all()


def test_mla_plan_size_follows_parts_and_batch() -> None:
    """32 bytes a part and 4 bytes a request and one more; parts fall with query tiles of 128."""
    assert mla_plan_bytes(3, 1, 128) == 32 * reference.MULTIPROCESSORS + 4 * 4
    assert mla_plan_bytes(3, 2, 128) == 32 * (reference.MULTIPROCESSORS // 2) + 4 * 4
    assert mla_parts(1000, 128) == 1


# --- metadata ---


def test_metadata_layout() -> None:
    """Four vectors: splits, batches by falling work, query tiles, heads in L2."""
    batch = Batch([1, 1, 1], [64, 1500, 700])
    plan = batch.plan()
    assert plan.dtype == torch.int32
    splits, table, tiles, nheads = plan.view(4, 3).tolist()
    assert sorted(table) == [0, 1, 2]
    assert table[-1] == 0
    assert tiles == [1, 1, 1]
    assert splits[table.index(1)] > splits[table.index(0)] == 1
    assert all(1 <= count <= 2 for count in nheads)


@pytest.mark.parametrize(
    ("rows", "ratio", "dims", "query", "packed"),
    [
        (1, 8, (128, 128), 32, True),
        (9, 4, (64, 64), 64, True),
        (20, 4, (128, 128), 128, True),
        (48, 4, (192, 128), 192, True),
        (64, 4, (128, 128), 256, True),
        (65, 4, (128, 128), 128, False),
        (5000, 1, (128, 128), 256, False),
        (64, 4, (256, 256), 32, True),
        (65, 4, (256, 256), 192, False),
        (65, 4, (320, 320), 64, False),
        (65, 4, (512, 512), 32, False),
    ],
)
def test_tile_shapes(
    rows: int, ratio: int, dims: tuple[int, int], query: int, packed: bool
) -> None:
    """Query tiles follow rows and heads while these fit 256, then rows alone; large heads have
    fixed tiles.
    """
    assert reference.tile_shape(rows, ratio, *dims) == reference.TileShape(query, 64, packed)


def test_what_metadata_does_not_depend_on() -> None:
    """Page size, dtype and softcap leave the plan as it is."""
    batch = Batch([1, 1], [1500, 64])
    other = batch.plan(page_size=16, qkv_dtype=torch.float16, has_softcap=True)
    assert torch.equal(batch.plan(), other)


def test_four_key_tiles_are_never_split() -> None:
    """256 keys are one split, 257 may be more."""
    assert Batch([1], [256]).plan()[0] == 1
    assert Batch([1], [257]).plan()[0] > 1


def test_splits_stay_within_the_multiprocessors() -> None:
    """The planned splits of a batch never outnumber the multiprocessors by more than its requests
    do.
    """
    batch = Batch([1] * 20, [1300] * 20, heads=1, heads_kv=1)
    splits = batch.plan()[:20]
    assert splits.sum() <= reference.MULTIPROCESSORS
    assert splits.max() > 1


# --- stale and foreign plans ---


def unequal_rows(swapped: bool) -> Batch:
    return Batch([1, 300] if swapped else [300, 1], [310, 310])


def assert_shows(batch: Batch, plan: Tensor, **options: Any) -> None:
    """The plan gives an error or NaN rows; without it, or with its own, the batch has none."""
    own = {name: options[name] for name in ("window_size",) if name in options}
    assert batch.call(**options, scheduler_metadata=batch.plan(**own))[0].isfinite().all()
    try:
        out, _ = batch.call(**options, scheduler_metadata=plan)
    except KernelRefusal:
        return
    assert out.isnan().any()


@pytest.mark.parametrize(
    ("foreign", "batch", "options"),
    [
        pytest.param(Batch([1], [2000]).plan, Batch([1], [200]), {}, id="more keys and capacity"),
        pytest.param(
            Batch([1, 1], [310, 310]).plan,
            unequal_rows(False),
            {},
            id="decode's plan for a prefill",
        ),
        pytest.param(unequal_rows(True).plan, unequal_rows(False), {}, id="another batch order"),
        pytest.param(
            Batch([1], [2000]).plan,
            Batch([1], [2000]),
            {"window_size": (63, 0)},
            id="another window",
        ),
        pytest.param(
            Batch([1] * 4, [400] * 4, heads_kv=1).plan,
            Batch([1] * 4, [400] * 4, heads=16, heads_kv=16),
            {},
            id="other head counts",
        ),
        pytest.param(
            Batch([60], [60], heads_kv=4, dim=256, dim_v=256).plan,
            Batch([60], [60], heads_kv=1, dim=256, dim_v=256),
            {},
            id="another head ratio",
        ),
        pytest.param(
            Batch([60], [60], dim=64, dim_v=64).plan,
            Batch([60], [60], dim=512, dim_v=512),
            {},
            id="other head dims",
        ),
        pytest.param(Batch([1], [900]).plan, Batch([1, 1], [900, 900]), {}, id="a smaller batch"),
        pytest.param(
            Batch([1] * 5, [900] * 5).plan, Batch([1, 1], [900, 900]), {}, id="a larger batch"
        ),
    ],
)
def test_a_foreign_plan_shows(foreign: Any, batch: Batch, options: dict[str, Any]) -> None:
    """A plan of another geometry gives NaN rows or an error, never a quiet wrong answer."""
    assert_shows(batch, foreign(), **options)


def test_a_plan_for_larger_tiles_shows() -> None:
    """A plan for a larger ``max_seqlen_q`` counts larger tiles and so leaves rows out."""
    batch = Batch([60, 9], [60, 9], heads=4, heads_kv=1, dim=256, dim_v=256)
    assert_shows(batch, batch.plan(max_seqlen_q=300))


def test_a_plan_for_a_smaller_capacity_loses_its_splits() -> None:
    """A plan bounded by one key, as a graph capture might make it, is right but never splits."""
    batch = Batch([1], [2000])
    plan = batch.plan(max_seqlen_k=1)
    assert plan[0] == 1
    assert_attention(batch, batch.call(scheduler_metadata=plan))


def test_too_small_a_max_seqlen_q_leaves_rows_unwritten() -> None:
    """Without a plan, too, only the tiles that ``max_seqlen_q`` calls for are run."""
    batch = Batch([300], [300])
    out, _ = batch.call(max_seqlen_q=1)
    assert out[16:].isnan().all()
    assert out[:16].isfinite().all()


def test_tiles_follow_the_batch_table() -> None:
    """Positions are not batches: the plan's tiles belong to the batch that the table names."""
    batch = Batch([1, 300], [30, 310])
    plan = batch.plan()
    assert plan[2:4].tolist() == [1, 0]
    assert_attention(batch, batch.call(scheduler_metadata=plan))
    plan[2:4] = int32([0, 1])
    assert batch.call(scheduler_metadata=plan)[0].isnan().any()


def test_stale_lengths_within_the_same_bounds_are_harmless() -> None:
    """Key lengths only choose how many splits run; the forward reads its own, so the output stays
    right.
    """
    batch = Batch([1, 1], [1500, 64])
    stale = batch.plan(cache_seqlens=int32([64, 1500]))
    assert_attention(batch, batch.call(scheduler_metadata=stale))


def test_a_good_plan_writes_every_row() -> None:
    """Over many random geometries a plan made for the call leaves no NaN."""
    generator = torch.Generator().manual_seed(7)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for seed in range(40):
        size = pick(1, 2, 5)
        rows = [1] * size if pick(True, False) else [pick(0, 1, 3, 40, 270) for _ in range(size)]
        keys = [count + pick(0, 1, 64, 300, 900) for count in rows]
        heads_kv, dim = pick(1, 2), pick(64, 80, 128, 256, 512)
        batch = Batch(
            rows,
            keys,
            heads_kv * pick(1, 3, 8),
            heads_kv,
            dim,
            dim,
            pick(16, 64),
            pick(0, 40),
            seed=seed,
        )
        mask = dict(causal=pick(True, False), window_size=pick((-1, -1), (100, 0), (5, 5)))
        mask |= dict(num_splits=pick(0, 0, 1, 3))
        if sum(rows):
            out, lse = batch.call(**mask, scheduler_metadata=batch.plan(**mask))
            assert not out.isnan().any(), (seed, batch.rows, batch.keys)
            assert not lse.isnan().any(), (seed, batch.rows, batch.keys)


# --- refusals ---


def fp8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


SMALL = Batch([1, 3], [9, 70])
WIDE = torch.zeros(2, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(q=fp8(SMALL.q)), RefusedType, "fp8"),
        (dict(k_cache=fp8(SMALL.k_cache)), RefusedType, "k_cache.dtype"),
        (dict(q=SMALL.q.double()), RefusedType, "float64"),
        (dict(v_cache=SMALL.v_cache.bfloat16()), RefusedType, "q's own"),
        (
            dict(q=torch.zeros(4, 4, 520), k_cache=torch.zeros(5, 64, 2, 520)),
            RefusedValue,
            "at most 512",
        ),
        (
            dict(q=torch.zeros(4, 4, 128), k_cache=torch.zeros(5, 64, 2, 128)),
            RefusedValue,
            "pair of head dim",
        ),
        (dict(q=torch.zeros(4, 4, 32)), RefusedValue, "k's head dimension"),
        (dict(q=torch.zeros(4, 3, 64)), RefusedValue, "multiple of the key heads"),
        (dict(cache_seqlens=SMALL.cache_seqlens.long()), RefusedType, r"cache_seqlens\.dtype"),
        (dict(cache_seqlens=int32([1, 0, 1, 0])[::2]), RefusedValue, r"cache_seqlens\.contiguous"),
        (dict(cache_seqlens=int32([1])), RefusedValue, r"cache_seqlens\.shape"),
        (dict(cache_seqlens=int32([9, 129])), RefusedValue, "capacity 128"),
        (dict(cu_seqlens_q=SMALL.cu_seqlens_q.long()), RefusedType, r"cu_seqlens_q\.dtype"),
        (
            dict(cu_seqlens_q=int32([0, 0, 1, 0, 4, 0])[::2]),
            RefusedValue,
            r"cu_seqlens_q\.contiguous",
        ),
        (dict(cu_seqlens_q=int32([0, 1, 2, 4])), RefusedValue, r"\.shape"),
        (dict(cu_seqlens_q=int32([0, 1, 40])), RefusedValue, "rising offsets"),
        (dict(max_seqlen_q=None), RefusedValue, "max_seqlen_q"),
        (dict(page_table=SMALL.page_table.long()), RefusedType, r"page_table\.dtype"),
        (dict(page_table=WIDE[:, :2]), RefusedValue, "never copy the KV cache"),
        (dict(page_table=WIDE[:, ::4]), RefusedValue, "never copy the KV cache"),
        (dict(page_table=WIDE[:1]), RefusedValue, r"page_table\.shape"),
        (
            dict(k_cache=SMALL.k_cache.transpose(1, 3).contiguous().transpose(1, 3)),
            RefusedValue,
            "stride",
        ),
        (
            dict(scheduler_metadata=torch.zeros(7, dtype=torch.int32)),
            RefusedValue,
            "metadata buffer",
        ),
        (dict(scheduler_metadata=torch.zeros(8)), RefusedType, "scheduler_metadata"),
        (dict(scheduler_metadata=(torch.zeros(8), False)), RefusedType, "for MLA"),
        (dict(scheduler_metadata=int32([1, 1, 0, 2, 1, 1, 1, 1])), RefusedValue, "batch table"),
        (dict(qv=torch.zeros(4, 4, 64)), RefusedFeature, "qv is for MLA"),
        (dict(sinks=torch.zeros(2, dtype=torch.bfloat16)), RefusedValue, r"sinks\.shape"),
        (dict(sinks=torch.zeros(4, dtype=torch.float16)), RefusedType, r"sinks\.dtype"),
        (dict(cp_world_size=2), RefusedFeature, "cp_world_size"),
        (dict(rotary_cos=torch.zeros(1)), RefusedFeature, "rotary_cos"),
        (dict(k_descale=torch.ones(1)), RefusedFeature, "k_descale"),
        (dict(k=torch.zeros(2, 1, 2, 64)), RefusedValue, "not all given"),
        (
            dict(k=torch.zeros(2, 90, 2, 64), v=torch.zeros(2, 90, 2, 64)),
            RefusedValue,
            "with the new keys",
        ),
        (dict(cu_seqlens_k_new=torch.zeros(3)), RefusedType, "cu_seqlens_k_new"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[KernelRefusal], match: str) -> None:
    """What MATE's kernels do not take is refused by name, with what was expected."""
    with pytest.raises(error, match=match):
        SMALL.call(**changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bf16_queries_want_bf16_sinks(dtype: torch.dtype) -> None:
    """Sinks of another dtype are refused with bfloat16 queries, as in MATE."""
    with pytest.raises(RefusedType, match="sinks"):
        Batch([1], [5], dtype=torch.bfloat16).call(sinks=torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(scheduler_metadata=None), RefusedType, "needs a workspace"),
        (dict(scheduler_metadata=(torch.zeros(9999), False)), RefusedType, "uint8"),
        (
            dict(scheduler_metadata=(torch.zeros(100, dtype=torch.uint8), False)),
            RefusedValue,
            "too small",
        ),
        (dict(cache_seqlens=None), RefusedValue, "both for MLA"),
        (dict(q=torch.zeros(2, 8, 128)), RefusedValue, "head dimension"),
        (
            dict(k=torch.zeros(2, 1, 1, 64), v=torch.zeros(2, 1, 1, 512)),
            RefusedFeature,
            "does not implement k",
        ),
    ],
)
def test_mla_refusals(changes: dict[str, Any], error: type[KernelRefusal], match: str) -> None:
    """MLA asks for its workspace, its cache and its head dimensions."""
    with pytest.raises(error, match=match):
        Latent([1, 1], [5, 9]).call(**changes)


def test_mla_wants_pages_of_64() -> None:
    """MLA over other pages is refused with the option to set."""
    batch = Latent([1, 1], [5, 9])
    pages: dict[str, Any] = {
        "k_cache": torch.zeros(9, 32, 1, 64),
        "v_cache": torch.zeros(9, 32, 1, 512),
    }
    with pytest.raises(RefusedValue, match="--page-size 64"):
        batch.call(**pages)


def test_out_must_fit() -> None:
    """An output buffer of another shape or dtype is refused."""
    batch = Batch([1, 3], [9, 70])
    with pytest.raises(RefusedValue, match="out is"):
        ragged_call(batch, out=torch.zeros(4, 4, 32))


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_seqlen_k=None),
        dict(cu_seqlens_k=int32([0, 9, 500])),
        dict(page_table=WIDE),
        dict(v=torch.zeros(3, 2, 64)),
    ],
    ids=str,
)
def test_varlen_refusals(changes: dict[str, Any]) -> None:
    """Ragged keys need offsets that fit and a bound, and are not pages."""
    with pytest.raises(RefusedValue):
        ragged_call(Batch([1, 3], [9, 70]), **changes)


@pytest.mark.parametrize(
    "name", ["ver", "out", "only_qv", "max_seqlen_k", "score_mod", "mask_mod", "rel_bias"]
)
def test_an_unknown_keyword_is_a_type_error(name: str) -> None:
    """What upstream's wrapper has and MATE's has not is unknown here, too."""
    with pytest.raises(TypeError, match=name):
        SMALL.call(**{name: None})


MATE_SIGNATURES = {
    flash_attn_with_kvcache: (
        "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
        "cache_seqlens=None "
        "cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
        "cu_seqlens_k_new=None "
        "max_seqlen_q=None rotary_seqlens=None q_descale=None k_descale=None v_descale=None "
        "softmax_scale=None "
        "causal=False window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True "
        "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False "
        "sinks=None "
        "s_aux=None cp_world_size=1 cp_rank=0 cp_tot_seqused_k=None"
    ),
    flash_attn_varlen_func: (
        "q k v cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
        "seqused_q=None "
        "seqused_k=None page_table=None block_table=None softmax_scale=None causal=False qv=None "
        "q_descale=None "
        "k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 softcap=0.0 "
        "scheduler_metadata=None "
        "num_splits=0 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False "
        "return_softmax_lse=False sinks=None s_aux=None cp_world_size=1 cp_rank=0 "
        "cp_tot_seqused_k=None out=None"
    ),
    get_scheduler_metadata: (
        "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens "
        "qkv_dtype=torch.bfloat16 headdim_v=None cu_seqlens_q=None cu_seqlens_k_new=None "
        "cache_leftpad=None "
        "page_size=None max_seqlen_k_new=0 causal=False window_size=(-1,-1) attention_chunk=0 "
        "has_softcap=False "
        "num_splits=0 pack_gqa=None sm_margin=0"
    ),
}


@pytest.mark.parametrize("function", MATE_SIGNATURES, ids=lambda function: function.__name__)
def test_signatures_are_those_of_mate(function: Any) -> None:
    """Names, order and defaults are those of MATE 0.2.2's wrapper."""
    parameters = inspect.signature(function).parameters.values()
    seen = [
        p.name if p.default is p.empty else f"{p.name}={p.default}".replace(" ", "")
        for p in parameters
    ]
    assert " ".join(seen) == MATE_SIGNATURES[function]
