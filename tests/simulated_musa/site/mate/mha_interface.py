"""MATE's attention: what it asserts, what it drops in silence, and which kernel serves a call."""

from __future__ import annotations

from typing import Any

import torch
from torch_musa._launch import launch

from mate import fmha, mla
from mate._release import RELEASE
from mate.geometry import Geometry, plan_length, require_headdims, write_plan

HALF = (torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn,) if RELEASE < (0, 2, 5) else (torch.float8_e4m3fn, torch.float8_e5m2)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    arguments: dict[str, Any],
) -> Any:
    """Attend over a cache; ``arguments`` are the wrapper's other ones by name."""
    given = arguments
    _require_rows(q, k_cache, v_cache, given.get("qv"))
    batch, seqlen = _shape(q, given["cu_seqlens_q"])
    page_table, cache_seqlens = (
        given["page_table"],
        _lengths(given["cache_seqlens"], k_cache, batch),
    )
    _require_index("page_table", page_table, contiguous=False)
    for name in ("cu_seqlens_q", "cache_seqlens", "cu_seqlens_k_new"):
        _require_index(name, given[name] if name != "cache_seqlens" else cache_seqlens)
    rows = q if q.dim() == 3 else q.flatten(0, 1)
    heads, headdim = rows.shape[1:]
    headdim_v = v_cache.shape[-1]
    if given["cu_seqlens_q"] is not None and not given["max_seqlen_q"]:
        raise AssertionError("max_seqlen_q must be given with cu_seqlens_q")
    longest = int(given["max_seqlen_q"]) if given["cu_seqlens_q"] is not None else seqlen
    starts = given["cu_seqlens_q"]
    if starts is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen
    if given.get("qv") is not None and _takes_workspace(given["scheduler_metadata"]):
        return _attend_latent(q, k_cache, v_cache, rows, given, cache_seqlens, starts, longest)
    require_headdims(headdim, headdim_v)
    if RELEASE >= (0, 2, 0) and given["k"] is not None:
        _append(k_cache, v_cache, page_table, cache_seqlens, given)
        cache_seqlens = cache_seqlens + given["k"].shape[1]
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    options = _options(given, headdim if given.get("qv") is None else headdim + headdim_v)
    geometry = Geometry(
        batch, longest, capacity, heads, k_cache.shape[2], headdim, headdim_v, options.causal,
        options.window,
        options.attention_chunk, int(given["num_splits"] or 0), given["pack_gqa"],
    )  # fmt: skip
    dtype = q.dtype if q.dtype in HALF else torch.bfloat16
    out = torch.empty(rows.shape[0], heads, headdim_v, dtype=dtype, device=q.device)
    lse = torch.empty(heads, rows.shape[0], dtype=torch.float32, device=q.device)
    launch(
        _attend_cache, out, lse, rows, k_cache, v_cache, starts, cache_seqlens,
        _densely(page_table),
        _if_known(given["cache_leftpad"]), _if_known(given["cache_batch_idx"]), given.get("qv"),
        _sinks(given),
        (given.get("q_descale"), given.get("k_descale"), given.get("v_descale")), options, geometry,
        given["scheduler_metadata"],
    )  # fmt: skip
    return _result(q, out, lse, given["return_softmax_lse"])


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any]
) -> Any:
    """Attend over packed rows, or over pages from 0.2 on."""
    given = arguments
    page_table = given.get("page_table")
    _require_rows(q, k, v, given.get("qv"))
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        _require_index(name, given[name])
    batch = given["cu_seqlens_q"].numel() - 1
    require_headdims(q.shape[-1], v.shape[-1])
    options = _options(given, q.shape[-1])
    compiled = _is_compiled_in_advance(q, v, given, options)
    if compiled and RELEASE < (0, 2, 1):
        options = fmha.Options(options.softmax_scale, options.causal)
    # With one request the kernels that are compiled in advance take all rows for its.
    whole = compiled and batch == 1
    geometry = Geometry(
        batch, int(given["max_seqlen_q"]), int(given["max_seqlen_k"]), q.shape[1], k.shape[-2],
        q.shape[-1], v.shape[-1],
        options.causal, options.window, options.attention_chunk, int(given.get("num_splits") or 0),
        None,
    )  # fmt: skip
    out = given.get("out")
    if out is None:
        dtype = q.dtype if q.dtype in HALF else torch.bfloat16
        out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    launch(
        _attend_rows, out, lse, q, k, v, given["cu_seqlens_q"], given["cu_seqlens_k"],
        given["seqused_q"],
        given["seqused_k"], _densely(page_table), given.get("qv"), _sinks(given), options, geometry,
        whole,
        given.get("scheduler_metadata"),
    )  # fmt: skip
    return (out, lse) if given["return_attn_probs"] else out


def get_scheduler_metadata(arguments: dict[str, Any]) -> torch.Tensor:
    """Compute a plan."""
    given = arguments
    for name in ("cache_seqlens", "cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad"):
        _require_index(name, given[name])
    if given["attention_chunk"] and RELEASE < (0, 2, 2):
        raise AssertionError("attention_chunk is not supported")
    batch = given["batch_size"]
    geometry = Geometry(
        batch, given["max_seqlen_q"], given["max_seqlen_k"], given["num_heads_q"],
        given["num_heads_kv"],
        given["headdim"], given["headdim_v"] or given["headdim"], given["causal"],
        tuple(given["window_size"]),
        given["attention_chunk"] or 0, given["num_splits"] or 0, given["pack_gqa"],
    )  # fmt: skip
    plan = torch.empty(plan_length(batch), dtype=torch.int32, device=given["cache_seqlens"].device)
    lengths = (
        given["cache_seqlens"],
        given["cu_seqlens_q"],
        given["cu_seqlens_k_new"],
        given["cache_leftpad"],
    )
    launch(_plan, plan, geometry, *lengths)
    return plan


# --- what runs on the device ---------------------------------------------------------------------


def _plan(
    plan: torch.Tensor,
    geometry: Geometry,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
) -> None:
    lengths_k = cache_seqlens.clone()
    if cu_seqlens_k_new is not None:
        lengths_k = lengths_k + cu_seqlens_k_new.diff()
    if cache_leftpad is not None:
        lengths_k = lengths_k - cache_leftpad
    lengths_q = [geometry.max_seqlen_q] * geometry.batch
    if cu_seqlens_q is not None:
        lengths_q = cu_seqlens_q.diff().tolist()
    write_plan(plan, geometry, lengths_q, lengths_k.tolist())


def _attend_cache(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    rows: torch.Tensor | None,
    qv: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scales: tuple[torch.Tensor | None, ...],
    options: fmha.Options,
    geometry: Geometry,
    plan: torch.Tensor | None,
) -> None:
    inputs = fmha.Inputs(
        q, k_cache, v_cache, starts.tolist(), starts.diff().tolist(), cache_seqlens.tolist(),
        page_table=page_table, leftpad=_listed(leftpad), rows=_listed(rows), qv=qv, sinks=sinks,
        scales=scales,
    )  # fmt: skip
    fmha.attend(out, lse, inputs, options, geometry, plan)


def _attend_rows(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor | None,
    used_q: torch.Tensor | None,
    used_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    qv: torch.Tensor | None,
    sinks: torch.Tensor | None,
    options: fmha.Options,
    geometry: Geometry,
    whole: bool,
    plan: torch.Tensor | None,
) -> None:
    lengths_q = (starts_q.diff() if used_q is None else used_q).tolist()
    lengths_k = [] if starts_k is None else starts_k.diff().tolist()
    lengths_k = lengths_k if used_k is None else used_k.tolist()
    if whole:
        lengths_q, lengths_k = [q.shape[0]], [k.shape[0]]
    inputs = fmha.Inputs(
        q, k, v, starts_q.tolist(), lengths_q, lengths_k,
        offsets_k=None if page_table is not None else _listed(starts_k), page_table=page_table,
        qv=qv, sinks=sinks,
    )  # fmt: skip
    fmha.attend(out, lse, inputs, options, geometry, plan if page_table is not None else None)


def _attend_latent(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: torch.Tensor,
    given: dict[str, Any],
    cache_seqlens: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
) -> Any:
    """Decode over latent keys; window, softcap, splits and sinks are dropped without a word."""
    qv = given["qv"] if given["qv"].dim() == 3 else given["qv"].flatten(0, 1)
    metadata = given["scheduler_metadata"]
    if not isinstance(metadata, tuple):
        raise AssertionError("workspace must be provided")
    workspace, reuse = metadata
    if (rows.shape[-1], qv.shape[-1]) != (mla.ROPE, mla.LATENT) or k_cache.shape[1] != mla.PAGE:
        raise AssertionError(
            f"unsupported MLA: {rows.shape[-1]}, {qv.shape[-1]}, pages of {k_cache.shape[1]}"
        )
    scale = given["softmax_scale"] or (mla.ROPE + mla.LATENT) ** -0.5
    out = torch.empty(rows.shape[0], rows.shape[1], mla.LATENT, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows.shape[1], rows.shape[0], dtype=torch.float32, device=q.device)
    launch(
        mla.attend_latent, out, lse, rows, qv, k_cache, v_cache, _densely(given["page_table"]),
        cache_seqlens, starts,
        workspace, max_seqlen_q=longest, reuse=bool(reuse), softmax_scale=scale,
        causal=given["causal"],
    )  # fmt: skip
    if given["cu_seqlens_q"] is not None:
        return (out, lse) if given["return_softmax_lse"] else out
    padded = out.view(*q.shape[:2], rows.shape[1], mla.LATENT)
    by_row = lse.t().contiguous().view(*q.shape[:2], rows.shape[1])
    return (padded, by_row) if given["return_softmax_lse"] else padded


# --- what is asserted, dropped and chosen ---------------------------------------------------------


def _takes_workspace(metadata: Any) -> bool:
    return RELEASE < (0, 2, 3) or isinstance(metadata, tuple)


def _require_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv: torch.Tensor | None
) -> None:
    dtypes = {tensor.dtype for tensor in (q, k, v, qv) if tensor is not None}
    supported = HALF if RELEASE < (0, 2, 3) else HALF + FP8
    if len(dtypes) != 1 or dtypes.pop() not in supported:
        raise AssertionError(f"unsupported dtypes: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    for tensor in (q, k, v):
        if tensor.device.type != "musa":
            raise AssertionError(f"expected a MUSA tensor, got one on {tensor.device}")
        if tensor.stride(-1) != 1:
            raise AssertionError("the last dimension must be contiguous")
    if q.shape[-2] % k.shape[-2]:
        raise AssertionError(f"{q.shape[-2]} query heads on {k.shape[-2]} key heads")


def _require_index(name: str, tensor: torch.Tensor | None, *, contiguous: bool = True) -> None:
    if tensor is None:
        return
    if tensor.dtype != torch.int32 or tensor.device.type != "musa":
        raise AssertionError(
            f"{name} must be int32 on a MUSA device, got {tensor.dtype} on {tensor.device}"
        )
    if contiguous and not tensor.is_contiguous():
        raise AssertionError(f"{name} must be contiguous")


def _shape(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple[int, int]:
    if cu_seqlens_q is not None:
        return cu_seqlens_q.numel() - 1, 0
    return q.shape[0], q.shape[1]


def _lengths(cache_seqlens: Any, k_cache: torch.Tensor, batch: int) -> torch.Tensor:
    if isinstance(cache_seqlens, int):
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=k_cache.device)
    if cache_seqlens is None:
        return torch.full((batch,), k_cache.shape[1], dtype=torch.int32, device=k_cache.device)
    return cache_seqlens


def _densely(page_table: torch.Tensor | None) -> torch.Tensor | None:
    """Return the page table as a kernel reads it: rows one after another, whatever the strides."""
    if page_table is None or page_table.is_contiguous():
        return page_table
    last = page_table.storage_offset() + page_table.numel()
    if last * page_table.element_size() > page_table.untyped_storage().nbytes():
        raise RuntimeError(
            "MUSA error: an illegal memory access (a page table that is not contiguous)"
        )
    return page_table.as_strided(page_table.shape, (page_table.shape[1], 1))


def _if_known(tensor: Any) -> Any:
    """Drop, without a word, what releases before 0.2.1 do not read."""
    return tensor if RELEASE >= (0, 2, 1) else None


def _sinks(given: dict[str, Any]) -> torch.Tensor | None:
    names = [name for name in ("sinks", "s_aux", "learnable_sink") if given.get(name) is not None]
    if not names:
        return None
    if given[names[0]].dtype != torch.bfloat16:
        raise AssertionError(f"sinks must be bfloat16, got {given[names[0]].dtype}")
    return given[names[0]]


def _options(given: dict[str, Any], headdim: int) -> fmha.Options:
    scale = given["softmax_scale"] or headdim**-0.5
    causal, window = bool(given["causal"]), tuple(given["window_size"])
    chunk = int(given.get("attention_chunk") or 0)
    if chunk and RELEASE < (0, 2, 2):
        raise AssertionError("attention_chunk is not supported")
    if RELEASE < (0, 2, 0) and (causal or min(window) < 0):
        window = (-1, -1)  # This release reads windows with two sides, and none with causal.
    return fmha.Options(scale, causal, window, chunk, float(given["softcap"] or 0.0))


def _is_compiled_in_advance(
    q: torch.Tensor, v: torch.Tensor, given: dict[str, Any], options: fmha.Options
) -> bool:
    """Return whether kernels compiled in advance serve a call over packed rows."""
    if any(given.get(name) is not None for name in ("page_table", "seqused_q", "seqused_k", "qv")):
        return False
    if max(options.window) >= 0 or options.attention_chunk or _sinks(given) is not None:
        return False
    if options.softcap and RELEASE >= (0, 2, 1):
        return False
    dims = (q.shape[-1], v.shape[-1])
    return q.dtype in HALF and (dims == (192, 128) or (dims[0] == dims[1] and dims[0] <= 128))


def _append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor,
    given: dict[str, Any],
) -> None:
    if given["cu_seqlens_k_new"] is not None or given["rotary_cos"] is not None:
        raise NotImplementedError("the stand-in of MATE appends padded rows without rotation alone")
    launch(
        _write_rows, k_cache, v_cache, given["k"], given["v"], _densely(page_table), cache_seqlens
    )


def _write_rows(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    page_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor,
) -> None:
    size = k_cache.shape[1]
    for request, length in enumerate(cache_seqlens.tolist()):
        for new in range(k.shape[1]):
            place = length + new
            page = request if page_table is None else int(page_table[request, place // size])
            k_cache[page, place % size] = k[request, new]
            v_cache[page, place % size] = v[request, new]


def _listed(tensor: torch.Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


def _result(q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, with_lse: bool) -> Any:
    if q.dim() == 3:
        return (out, lse) if with_lse else out
    batch, seqlen = q.shape[:2]
    padded = out.view(batch, seqlen, *out.shape[1:])
    by_request = lse.view(-1, batch, seqlen).transpose(0, 1).contiguous()
    return (padded, by_request) if with_lse else padded
