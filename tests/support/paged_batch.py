"""Batches over a paged cache, of FA3 and MLA, with float64 attention to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_musa_ext.kernels.reference import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    mla_plan_bytes,
)
from sglang_musa_ext.validation.attention_float64 import attention


@dataclass
class Batch:
    """A batch of ``rows`` new queries a request over ``keys`` tokens in shuffled pages."""

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
            cache_seqlens=self.cache_seqlens, cu_seqlens_q=self.cu_seqlens_q,
            max_seqlen_q=max(self.rows),
        )  # fmt: skip
        out, lse, *_ = flash_attn_with_kvcache(
            **{**arguments, "return_softmax_lse": True, **changes}
        )
        return out, lse

    def plan(self, **changes: Any) -> Tensor:
        arguments: dict[str, Any] = dict(
            batch_size=len(self.rows), max_seqlen_q=max(self.rows), max_seqlen_k=self.capacity,
            num_heads_q=self.heads, num_heads_kv=self.heads_kv, headdim=self.dim,
            headdim_v=self.dim_v,
            cache_seqlens=self.cache_seqlens, cu_seqlens_q=self.cu_seqlens_q,
        )  # fmt: skip
        return get_scheduler_metadata(**{**arguments, **changes})

    def split_rows(self) -> list[Tensor]:
        return list(torch.split(self.q, self.rows))

    def expected(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
        parts = [
            attention(q, k, v, dtype=dtype, **options)
            for q, k, v in zip(self.split_rows(), self.k, self.v, strict=True)
        ]
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(lses, dim=1)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths: list[int]) -> Tensor:
    return int32([sum(lengths[:index]) for index in range(len(lengths) + 1)])


def assert_close(result: Tensor, expected: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Require an error of at most twice PyTorch's own in this dtype, and two roundings."""
    finite = expected.isfinite()
    assert torch.equal(result.double()[~finite], expected[~finite])
    fair = 2 * (plain.double() - expected)[finite].abs().max() if finite.any() else 0.0
    rounding = 2 * torch.finfo(dtype).eps * expected[finite].abs().max() if finite.any() else 0.0
    torch.testing.assert_close(
        result.double()[finite], expected[finite], rtol=0, atol=float(fair + rounding)
    )


def assert_attention(batch: Batch, result: tuple[Tensor, Tensor], **options: Any) -> None:
    expected, plain = batch.expected(**options), batch.expected(batch.dtype, **options)
    assert_close(result[0], expected[0], plain[0], batch.dtype)
    # LSE is float32 whatever the inputs are, so it earns no tolerance from a coarser dtype.
    plain32 = batch.expected(torch.float32, **options) if batch.dtype != torch.float32 else plain
    assert_close(result[1], expected[1], plain32[1], torch.float32)


def kernel_options(options: dict[str, Any]) -> dict[str, Any]:
    names = dict(window="window_size", chunk="attention_chunk", scale="softmax_scale")
    return {names.get(name, name): value for name, value in options.items()}


def ragged_call(batch: Batch, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        q=batch.q, k=torch.cat(batch.k), v=torch.cat(batch.v), cu_seqlens_q=batch.cu_seqlens_q,
        cu_seqlens_k=offsets(batch.keys), max_seqlen_q=max(batch.rows),
        max_seqlen_k=max(batch.keys),
    )  # fmt: skip
    return flash_attn_varlen_func(**{**arguments, "return_softmax_lse": True, **changes})


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

    def expected(self, dtype: torch.dtype, causal: bool) -> tuple[Tensor, Tensor]:
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
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(lses, dim=1)

    def check(self, result: tuple[Tensor, Tensor], causal: bool) -> None:
        expected = self.expected(torch.float64, causal)
        assert_close(result[0], expected[0], self.expected(self.dtype, causal)[0], self.dtype)
        assert_close(result[1], expected[1], self.expected(torch.float32, causal)[1], torch.float32)
