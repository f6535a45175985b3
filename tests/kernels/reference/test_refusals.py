"""The reference refuses by name what MATE refuses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_musa_ext.kernels.reference import (
    KernelRefusal,
    RefusedFeature,
    RefusedType,
    RefusedValue,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from tests.support.mate_signatures import SIGNATURES
from tests.support.paged_batch import (
    Batch,
    Latent,
    int32,
    ragged_call,
)


def fp8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


SMALL = Batch([1, 3], [9, 70])


WIDE = torch.zeros(2, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(q=fp8(SMALL.q)), RefusedType, "k_cache.dtype"),
        (dict(q=fp8(SMALL.q), release=(0, 2, 2)), RefusedType, "fp8"),
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
        (
            dict(scheduler_metadata=int32([1, 1, 0, 2, 1, 1, 1, 1]), release=(0, 2, 3)),
            RefusedValue,
            "batch table",
        ),
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
    """Arguments that MATE's kernels do not take are refused by name, with what was expected."""
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
    """Arguments of upstream's wrapper that MATE's has not are unknown here, too."""
    with pytest.raises(TypeError, match=name):
        SMALL.call(**{name: None})


@pytest.mark.parametrize(
    "function",
    [flash_attn_with_kvcache, flash_attn_varlen_func, get_scheduler_metadata],
    ids=lambda function: function.__name__,
)
def test_signatures_are_those_of_mate(function: Any) -> None:
    """Names, order and defaults are those of MATE's wrapper, and the last keyword is ours."""
    *parameters, release = inspect.signature(function).parameters.values()
    seen = [
        p.name if p.default is p.empty else f"{p.name}={p.default}".replace(" ", "")
        for p in parameters
    ]
    assert " ".join(seen) == SIGNATURES["0.2.2"][function.__name__]
    assert release.name == "release"
