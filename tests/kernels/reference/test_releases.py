"""The reference follows MATE's releases; the provider is right where MATE alone is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_musa_ext.kernels.mate import plan_contents
from sglang_musa_ext.kernels.provider import reference_kernels
from sglang_musa_ext.kernels.reference import (
    RefusedFeature,
    RefusedType,
    RefusedValue,
    flash_attn_varlen_func,
    get_scheduler_metadata,
)
from sglang_musa_ext.validation.attention_float64 import attention
from tests.support.paged_batch import Batch, assert_close, int32, offsets

FP8 = torch.float8_e4m3fn


# --- one request over raw keys ---


def one_request(padded_q: int, padded_k: int, causal: bool) -> tuple[dict[str, Any], Any]:
    """Return a call of 5 queries and 9 keys with rows behind them, and its float64 attention."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(5 + padded_q, 4, 64, generator=generator)
    k, v = (torch.randn(9 + padded_k, 2, 64, generator=generator) for _ in range(2))
    call = dict(
        q=q, k=k, v=v, cu_seqlens_q=offsets([5]), cu_seqlens_k=offsets([9]), max_seqlen_q=5,
        max_seqlen_k=9,
        causal=causal, return_softmax_lse=True,
    )  # fmt: skip
    return call, attention(q[:5], k[:9], v[:9], causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 4), (3, 4)], ids=str)
def test_one_request_with_padded_rows_is_attention(padding: tuple[int, int], causal: bool) -> None:
    """Through the provider, rows behind a request take no part in it."""
    call, (expected, expected_lse) = one_request(*padding, causal)
    out, lse = reference_kernels().flash_attn_varlen_func(**call)
    torch.testing.assert_close(out[:5].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse[:, :5].double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("padding", "causal"), [((0, 4), False), ((3, 0), True), ((3, 4), True)])
def test_one_request_with_padded_rows_is_wrong_without_the_provider(
    padding: tuple[int, int], causal: bool
) -> None:
    """As in MATE, all rows of the tensors are the request's, so that other keys take part."""
    call, (expected, _) = one_request(*padding, causal)
    out, _ = flash_attn_varlen_func(**call)
    assert ((out[:5].double() - expected).abs().amax((1, 2)) > 1e-3).all()


def test_two_requests_are_read_by_their_offsets() -> None:
    """Only a batch of one is taken by its rows."""
    call, (expected, _) = one_request(3, 4, causal=True)
    call |= dict(cu_seqlens_q=offsets([5, 3]), cu_seqlens_k=offsets([9, 4]))
    out, _ = flash_attn_varlen_func(**call)
    torch.testing.assert_close(out[:5].double(), expected, rtol=0, atol=1e-5)


# --- fp8 ---


def fp8_batch(**how: Any) -> Batch:
    """A batch whose tensors hold numbers that e4m3 has, so that rounding them changes nothing."""
    batch = Batch([3, 1, 8], [70, 9, 130], **how)
    batch.q = batch.q.to(FP8).float()
    batch.k = [keys.to(FP8).float() for keys in batch.k]
    batch.v = [values.to(FP8).float() for values in batch.v]
    return batch


def fp8_tensors(batch: Batch) -> dict[str, Tensor]:
    return dict(q=batch.q.to(FP8), k_cache=batch.k_cache.to(FP8), v_cache=batch.v_cache.to(FP8))


@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "window": (20, 0)}, {"softcap": 5.0}], ids=str
)
def test_fp8_is_attention_of_the_numbers_it_holds(options: dict[str, Any], page: int) -> None:
    """Attention of an fp8 cache is float64 attention of what it holds, rounded to bfloat16."""
    batch = fp8_batch(page=page)
    passed = {"window_size" if name == "window" else name: o for name, o in options.items()}
    out, lse = batch.call(**fp8_tensors(batch), **passed)
    assert out.dtype == torch.bfloat16
    expected, expected_lse = batch.expected(**options)
    plain, plain_lse = batch.expected(torch.float32, **options)
    assert_close(out, expected, plain, torch.bfloat16)
    assert_close(lse, expected_lse, plain_lse, torch.float32)


def test_fp8_scales_multiply_what_they_are_of() -> None:
    """Each request and key head has its own scale of queries, keys and values."""
    batch = fp8_batch()
    scales = {name: torch.rand(3, 2) + 0.5 for name in ("q_descale", "k_descale", "v_descale")}
    out, _ = batch.call(**fp8_tensors(batch), **scales)
    rows, parts = torch.split(out, batch.rows), []
    for index, (q, k, v) in enumerate(zip(batch.split_rows(), batch.k, batch.v, strict=True)):
        own = {name: scale[index] for name, scale in scales.items()}
        wide = own["q_descale"].repeat_interleave(2)[:, None]
        parts.append(
            attention(q * wide, k * own["k_descale"][:, None], v * own["v_descale"][:, None])[0]
        )
    for row, part in zip(rows, parts, strict=True):
        torch.testing.assert_close(row.double(), part, rtol=2**-7, atol=2**-7)


def test_fp8_over_raw_keys_is_attention() -> None:
    """The varlen function takes fp8 as well, with rows behind one request."""
    call, _ = one_request(3, 4, causal=True)
    call |= {name: call[name].to(FP8) for name in ("q", "k", "v")}
    out, _ = reference_kernels().flash_attn_varlen_func(**call)
    q, k, v = (call[name].float() for name in ("q", "k", "v"))
    expected, _ = attention(q[:5], k[:9], v[:9], causal=True)
    torch.testing.assert_close(out[:5].double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("scale", "match"),
    [(torch.ones(1, 2), "q_descale"), (torch.ones(3, 2).half(), "q_descale")],
    ids=["shape", "dtype"],
)
def test_fp8_scales_must_fit(scale: Tensor, match: str) -> None:
    """A scale of another shape or type is refused."""
    batch = fp8_batch()
    with pytest.raises(RefusedValue, match=match):
        batch.call(**fp8_tensors(batch), q_descale=scale)


# --- by release ---


def test_plans_are_padded_from_0_2_4_on() -> None:
    """Before, a plan has no padding; from then on what is in it differs from call to call."""
    batch = Batch([1, 1, 1], [64, 1500, 700])
    old = batch.plan(release=(0, 2, 3))
    assert torch.equal(old, batch.plan(release=(0, 2, 3)))
    new, again = (batch.plan(release=(0, 2, 4)) for _ in range(2))
    assert (old.numel(), new.numel()) == (12, 16)
    assert not torch.equal(new, again)
    assert torch.equal(plan_contents(new, 3), plan_contents(again, 3))
    assert torch.equal(plan_contents(new, 3), plan_contents(old, 3))


@pytest.mark.parametrize("release", [(0, 1, 3), (0, 2, 3), (0, 2, 4), (0, 2, 7)], ids=str)
def test_a_release_reads_its_own_plans(release: tuple[int, ...]) -> None:
    """Whatever its layout, a plan schedules the call that it was computed for."""
    batch = Batch([1, 1, 1], [64, 1500, 700])
    plan = batch.plan(release=release)
    out, _ = batch.call(scheduler_metadata=plan, release=release)
    expected, _ = batch.expected()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("until", "first", "changes"),
    [
        ((0, 2, 1), (0, 2, 2), {"attention_chunk": 64}),
        ((0, 1, 3), (0, 2, 0), {"cache_batch_idx": int32([0, 1])}),
        ((0, 2, 0), (0, 2, 1), {"cache_leftpad": int32([0, 0])}),
    ],
    ids=["chunk", "index", "padding"],
)
def test_arguments_come_with_their_release(
    until: tuple[int, ...], first: tuple[int, ...], changes: dict[str, Any]
) -> None:
    """An argument that a release asserts to be unused is refused; the next release takes it."""
    batch = Batch([1, 3], [9, 70])
    with pytest.raises(RefusedFeature, match=next(iter(changes))):
        batch.call(**changes, release=until)
    assert batch.call(**changes, release=first)[0].isfinite().all()


def test_head_dims_and_batches_come_with_their_release() -> None:
    """0.1.3 has no kernel for 192/192, and plans no more than 992 requests."""
    wide = Batch([1, 3], [9, 70], dim=192, dim_v=192)
    with pytest.raises(RefusedValue, match="head dimensions"):
        wide.call(release=(0, 1, 3))
    assert wide.call(release=(0, 2, 0))[0].isfinite().all()
    many = dict(max_seqlen_q=1, max_seqlen_k=64, num_heads_q=4, num_heads_kv=2, headdim=64)
    lengths = torch.full((993,), 5, dtype=torch.int32)
    with pytest.raises(RefusedValue, match="at most 992"):
        get_scheduler_metadata(993, cache_seqlens=lengths, release=(0, 1, 3), **many)  # type: ignore[arg-type]
    assert get_scheduler_metadata(993, cache_seqlens=lengths, **many).numel() == 4 * 996  # type: ignore[arg-type]


def test_fp8_comes_with_its_release() -> None:
    """e4m3 is read from 0.2.3 on, e5m2 from 0.2.5 on."""
    batch = fp8_batch()
    with pytest.raises(RefusedType, match=r"q\.dtype"):
        batch.call(**fp8_tensors(batch), release=(0, 2, 2))
    wider = {name: tensor.to(torch.float8_e5m2) for name, tensor in fp8_tensors(batch).items()}
    with pytest.raises(RefusedType, match=r"q\.dtype"):
        batch.call(**wider, release=(0, 2, 4))
    assert batch.call(**wider, release=(0, 2, 5))[0].isfinite().all()
