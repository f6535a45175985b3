"""The two attention functions, with the signatures of MATE's wrapper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_musa_ext import policy
from sglang_musa_ext.kernels.reference.attention import (
    AttentionProblem,
    KeyStore,
    Queries,
    find_queries,
    forward,
)
from sglang_musa_ext.kernels.reference.mla import mla_decode
from sglang_musa_ext.kernels.reference.planning import as_list, lengths, resolve_mask
from sglang_musa_ext.kernels.reference.refusals import (
    FP8_DTYPES,
    RefusedValue,
    check_cache_strides,
    check_capacity,
    check_descales,
    check_devices,
    check_dtypes,
    check_index_vectors,
    check_keys,
    check_metadata,
    check_page_table,
    check_release,
    check_sinks,
    head_ratio,
    refuse_context_parallelism,
    refuse_set,
)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | tuple[Tensor, bool] | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    release: policy.MateRelease = policy.NEWEST_MATE,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over a KV cache, as a release of MATE has it.

    ``q``: ``(batch, seqlen_q, heads, dim)``, or ``(total_q, heads, dim)`` with int32
    ``cu_seqlens_q`` ``(batch + 1,)`` and ``max_seqlen_q``. ``k_cache``, ``v_cache``: ``(pages,
    page_size, heads_kv, dim)`` with a contiguous int32 ``page_table`` ``(batch, pages)``, else
    ``(batch, capacity, heads_kv, dim)``. ``cache_seqlens``: int32 ``(batch,)`` keys in use,
    ``None`` for all. ``k``, ``v``: new keys, ``(batch, new, heads_kv, dim)`` or ``(total_new,
    heads_kv, dim)`` with ``cu_seqlens_k_new``, written into the cache at ``cache_seqlens`` in
    place; without them ``cu_seqlens_k_new`` is ignored. Masks are aligned to the bottom right; -1
    in ``window_size`` is unbounded. ``scheduler_metadata``: from :func:`get_scheduler_metadata`, or
    ``None`` for one split; ignored with ``sinks`` (also called ``s_aux``), ``(heads,)``, an extra
    logit in each row's denominator.

    With ``qv`` (MLA decode: q 64, qv and v 512, pages of 64, one key head) ``scheduler_metadata``
    is ``(workspace, reuse)``: the plan is written into the uint8 workspace unless ``reuse`` says
    that it is there; windows, softcap, sinks and ``num_splits`` are ignored.

    Returns the output, like ``q`` with v's head dimension; with ``return_softmax_lse`` ``(out,
    softmax_lse, *rest)``: natural logarithm, float32, ``(heads, total_q)`` or ``(batch, heads,
    seqlen_q)`` (MLA: ``(batch, seqlen_q, heads)``). ``rest`` are MATE's accumulators, of no splits
    here. A row that sees no key gives 0 and -inf (with sinks: the sink, if there are keys at all);
    rows beyond ``cu_seqlens_q[-1]`` are unwritten, hence NaN.
    """
    refuse_set(dict(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_seqlens=rotary_seqlens))
    refuse_context_parallelism(cp_world_size, cp_rank)
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full(
            (k_cache.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device
        )
    sinks = sinks if sinks is not None else s_aux
    tensors = dict(k_cache=k_cache, v_cache=v_cache, k=k, v=v, qv=qv)
    check_cache_strides(k_cache, v_cache)
    check_dtypes(q, tensors, release)
    per_batch = dict(
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad
    )
    offsets = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new)
    check_devices(q, {**tensors, **per_batch, **offsets, "page_table": page_table, "sinks": sinks})
    queries = find_queries(q, cu_seqlens_q, max_seqlen_q, None)
    batch = len(queries.counts)
    check_index_vectors({**per_batch}, batch)
    scale = softmax_scale
    if scale is None:
        scale = (q.shape[-1] + (qv.shape[-1] if qv is not None else 0)) ** -0.5
    if qv is not None:
        refuse_set(dict(k=k, v=v, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad))
        out, lse = mla_decode(
            q,
            qv,
            k_cache,
            v_cache,
            cache_seqlens,
            page_table,
            queries,
            scale,
            causal,
            scheduler_metadata,
        )
        return (out, lse) if return_softmax_lse else out
    check_keys(k_cache, v_cache, q, 4)
    check_sinks(sinks, q)
    store, keys, capacity = _cached_keys(k_cache, v_cache, page_table, batch, *per_batch.values())
    keys = _append(store, keys, capacity, k, v, cu_seqlens_k_new, cache_seqlens)
    rule = resolve_mask(queries.longest, capacity, causal, window_size, attention_chunk or 0)
    heads_kv, headdim_v = k_cache.shape[2], v_cache.shape[3]
    head_ratio(q.shape[-2], heads_kv)
    gated = dict(per_batch, attention_chunk=attention_chunk, k=k, v=v)
    check_release(release, batch, q.shape[-1], headdim_v, gated)
    descales = dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    q_scales, k_scales, v_scales = check_descales(q, descales, (batch, heads_kv))
    metadata = check_metadata(scheduler_metadata, batch, release) if sinks is None else None
    problem = AttentionProblem(
        q.reshape(-1, *q.shape[-2:]),
        heads_kv,
        headdim_v,
        replace(store, k_scales=k_scales, v_scales=v_scales),
        queries.starts,
        queries.counts,
        keys,
        rule,
        scale,
        softcap,
        sinks,
        q_scales,
        release,
    )
    out, lse = forward(problem, queries, capacity, metadata, num_splits, pack_gqa, sm_margin)
    out = out.view(*q.shape[:-1], headdim_v)
    no_splits = lse.new_empty((1, lse.shape[0], 0, lse.shape[1]))
    accumulators = no_splits[..., None].expand(-1, -1, -1, -1, headdim_v), no_splits
    return (out, _shaped_lse(lse, q), *accumulators) if return_softmax_lse else out


def _cached_keys(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    batch: int,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
) -> tuple[KeyStore, list[int], int]:
    """Return the store, each batch's key count past its padding, and a batch's capacity."""
    check_page_table(page_table, batch if cache_batch_idx is None else None)
    rows_held = k_cache.shape[0] if page_table is None else page_table.shape[0]
    if cache_batch_idx is None and rows_held != batch:
        raise RefusedValue(
            "k_cache.shape[0]", rows_held, f"the batch of {batch}", "Or pass cache_batch_idx."
        )
    capacity = k_cache.shape[1] if page_table is None else page_table.shape[1] * k_cache.shape[1]
    used = as_list(cache_seqlens, batch, capacity)
    check_capacity("cache_seqlens", used, capacity)
    pads = as_list(cache_leftpad, batch, 0)
    rows = list(range(batch)) if cache_batch_idx is None else cache_batch_idx.tolist()
    store = KeyStore(k_cache, v_cache, page_table, rows, pads)
    return store, [count - pad for count, pad in zip(used, pads, strict=True)], capacity


def _append(
    store: KeyStore,
    keys: list[int],
    capacity: int,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    cache_seqlens: Tensor | None,
) -> list[int]:
    """Write new keys behind the cached ones, in place; returns the key counts with them."""
    if cu_seqlens_k_new is not None:
        check_index_vectors({"cu_seqlens_k_new": cu_seqlens_k_new}, len(keys) + 1)
    if k is None and v is None:
        return keys
    if k is None or v is None or cache_seqlens is None:
        raise RefusedValue(
            "k, v and cache_seqlens", "not all given", "all three, to append new keys", "Pass them."
        )
    batch, dims = len(keys), 4 if cu_seqlens_k_new is None else 3
    if k.dim() != dims or k.shape[:-1] != v.shape[:-1] or (dims == 4 and k.shape[0] != batch):
        raise RefusedValue(
            "k.shape and v.shape",
            (tuple(k.shape), tuple(v.shape)),
            f"{dims} dimensions each",
            "See k.",
        )
    counts = lengths(cu_seqlens_k_new, batch, k.shape[1])
    total = [old + new for old, new in zip(keys, counts, strict=True)]
    ends = [count + pad for count, pad in zip(total, store.offsets, strict=True)]
    check_capacity("cache_seqlens with the new keys", ends, capacity)
    if dims == 3 and sum(counts) != k.shape[0]:
        raise RefusedValue(
            "cu_seqlens_k_new[-1]", sum(counts), f"k's {k.shape[0]} rows", "It must fit k."
        )
    start = 0
    for index, count in enumerate(counts):
        rows = slice(start, start + count)
        store.write(index, keys[index], *((t[index] if dims == 4 else t[rows]) for t in (k, v)))
        start += count
    return total


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    release: policy.MateRelease = policy.NEWEST_MATE,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of ragged queries over ragged, dense or paged keys, as a release of MATE has it.

    ``k``, ``v``: ``(total_k, heads_kv, dim)`` with int32 ``cu_seqlens_k`` ``(batch + 1,)``, or
    ``(batch, seqlen_k, heads_kv, dim)``, or pages with ``page_table`` (also called ``block_table``)
    and ``seqused_k`` ``(batch,)``. ``seqused_q``: rows in use of each batch. ``out``: like ``q``
    with v's head dimension, written in place and returned; its padding rows stay as they are.

    As in MATE, one request over raw keys takes all rows of the tensors for its own, whatever
    ``cu_seqlens_q`` and ``cu_seqlens_k`` say, where MATE has a kernel compiled in advance: no
    ``seqused_*``, window, softcap or sinks, and head dimensions up to 128, or 192 and 128. All else
    as in :func:`flash_attn_with_kvcache`, but without ``qv``. Returns ``out``, or ``(out,
    softmax_lse)`` with ``return_softmax_lse`` or ``return_attn_probs``.
    """
    refuse_set(dict(qv=qv))
    refuse_context_parallelism(cp_world_size, cp_rank)
    sinks = sinks if sinks is not None else s_aux
    table = page_table if page_table is not None else block_table
    check_dtypes(q, dict(k=k, v=v), release)
    indices = dict(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
    )
    check_devices(q, {**indices, "k": k, "v": v, "page_table": table, "sinks": sinks})
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    check_index_vectors(dict(seqused_q=seqused_q, seqused_k=seqused_k), batch)
    options = dict(softcap=softcap, attention_chunk=attention_chunk, window_size=window_size)
    others = dict(page_table=table, seqused_q=seqused_q, seqused_k=seqused_k, sinks=sinks)
    if batch == 1 and _is_precompiled(q, v, cu_seqlens_q, cu_seqlens_k, options, others):
        (cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k) = _all_rows(q), _all_rows(k)
    queries = find_queries(q, cu_seqlens_q, max_seqlen_q, seqused_q)
    check_keys(k, v, q, 4 if cu_seqlens_k is None else 3)
    check_sinks(sinks, q)
    store, keys, span, capacity = _varlen_keys(
        k, v, cu_seqlens_k, max_seqlen_k, seqused_k, table, batch
    )
    rule = resolve_mask(queries.longest, span, causal, window_size, attention_chunk or 0)
    heads_kv, headdim_v = k.shape[-2], v.shape[-1]
    head_ratio(q.shape[-2], heads_kv)
    check_release(release, batch, q.shape[-1], headdim_v, dict(attention_chunk=attention_chunk))
    descales = dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    q_scales, k_scales, v_scales = check_descales(q, descales, (batch, heads_kv))
    metadata = check_metadata(scheduler_metadata, batch, release) if sinks is None else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    flat, flat_out = q.reshape(-1, *q.shape[-2:]), _checked_out(out, q, headdim_v, queries)
    problem = AttentionProblem(
        flat,
        heads_kv,
        headdim_v,
        replace(store, k_scales=k_scales, v_scales=v_scales),
        queries.starts,
        queries.counts,
        keys,
        rule,
        scale,
        softcap,
        sinks,
        q_scales,
        release,
    )
    written, lse = forward(
        problem, queries, capacity, metadata, num_splits, pack_gqa, sm_margin, flat_out
    )
    result = written.view(*q.shape[:-1], headdim_v) if out is None else out
    return (result, _shaped_lse(lse, q)) if return_softmax_lse or return_attn_probs else result


def _all_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the offsets of one request that has all rows of a tensor, and its length."""
    rows = tensor.shape[0]
    return torch.tensor([0, rows], dtype=torch.int32, device=tensor.device), rows


def _is_precompiled(
    q: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: dict[str, Any],
    others: dict[str, Tensor | None],
) -> bool:
    """Return whether MATE gives a call over raw keys to kernels that it compiled in advance."""
    if cu_seqlens_q is None or cu_seqlens_k is None or q.dtype in FP8_DTYPES:
        return False
    window = options.pop("window_size") or (-1, -1)
    if any(options.values()) or any(value is not None for value in others.values()):
        return False
    if max(-1 if side is None else side for side in window) >= 0:
        return False
    head_dims = (q.shape[-1], v.shape[-1])
    return head_dims == (192, 128) or head_dims[0] == head_dims[1] <= 128


def _varlen_keys(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    batch: int,
) -> tuple[KeyStore, list[int], int, int]:
    """Return store, key counts, the length that bounds windows, and that which bounds splits."""
    if cu_seqlens_k is None:
        store, keys, capacity = _cached_keys(k, v, page_table, batch, seqused_k, None, None)
        return store, keys, capacity, capacity
    if page_table is not None:
        raise RefusedValue(
            "page_table", "given with cu_seqlens_k", "one of the two", "Pages go with seqused_k."
        )
    if max_seqlen_k is None:
        raise RefusedValue("max_seqlen_k", None, "a number", "cu_seqlens_k needs it.")
    check_index_vectors({"cu_seqlens_k": cu_seqlens_k}, batch + 1)
    starts = cu_seqlens_k.tolist()
    if starts[-1] > k.shape[0] or sorted(starts) != starts or starts[0] < 0:
        raise RefusedValue(
            "cu_seqlens_k", starts, f"rising offsets up to {k.shape[0]}", "It must fit k."
        )
    keys = lengths(cu_seqlens_k, batch, 0) if seqused_k is None else as_list(seqused_k, batch, 0)
    return (
        KeyStore(k, v, None, list(range(batch)), starts[:-1]),
        keys,
        k.shape[0],
        int(max_seqlen_k),
    )


def _checked_out(out: Tensor | None, q: Tensor, headdim_v: int, queries: Queries) -> Tensor | None:
    """Return the caller's buffer as ``(total_q, heads, dim)``, with NaN where rows are due."""
    if out is None:
        return None
    expected = (*q.shape[:-1], headdim_v)
    dtype = torch.bfloat16 if q.dtype in FP8_DTYPES else q.dtype
    if tuple(out.shape) != expected or out.dtype != dtype or out.device != q.device:
        seen = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise RefusedValue("out", seen, f"{expected} {dtype} on {q.device}", "Allocate it like q.")
    flat = out.flatten(0, 1) if out.dim() == 4 else out
    for start, count in zip(queries.starts, queries.counts, strict=True):
        flat[start : start + count] = math.nan
    return flat


def _shaped_lse(lse: Tensor, q: Tensor) -> Tensor:
    """Lay ``(heads, total_q)`` out as kernels do: 4-d queries have ``(batch, heads, seqlen_q)``."""
    return (
        lse
        if q.dim() == 3
        else lse.view(q.shape[2], q.shape[0], q.shape[1]).transpose(0, 1).contiguous()
    )
