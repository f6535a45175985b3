"""MLA decode: a plan in a workspace, which deals key blocks of all requests to parts."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_musa_ext.kernels.reference.attention import (
    AttentionProblem,
    KeyStore,
    Queries,
    attend,
    combine,
    tile_keys,
    unwritten,
    write_rows,
)
from sglang_musa_ext.kernels.reference.planning import (
    KEY_TILE,
    MULTIPROCESSORS,
    ceil_div,
    resolve_mask,
)
from sglang_musa_ext.kernels.reference.refusals import (
    RefusedFeature,
    RefusedType,
    RefusedValue,
    check_capacity,
    check_devices,
    check_keys,
    check_page_table,
)

MLA_ROPE_DIM, MLA_LATENT_DIM, MLA_PAGE_SIZE = 64, 512, 64


MLA_QUERY_TILE = 128


MLA_RECORD_INTS = 8
"""int32 values of a tile-scheduler record: first batch and block, last batch, end, split."""


MLA_OVERHEAD_BLOCKS = 5
"""Cost of starting on a request, for a part, in key blocks."""


class _LatentStore(KeyStore):
    """MLA's cache: ``k`` the rotary part, ``v`` the latent, which is key and value alike.

    One product serves both score terms: q k + qv v is the product of their concatenations.
    """

    def gather(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rope, latent = super().gather(batch, start, stop)
        return torch.cat([rope, latent], -1), latent


def mla_parts(max_seqlen_q: int, num_heads_q: int, num_heads_kv: int = 1) -> int:
    """Return the number of parts of an MLA decode's work: one record of the plan each."""
    tiles = ceil_div(max_seqlen_q * num_heads_q // num_heads_kv, MLA_QUERY_TILE)
    return max(MULTIPROCESSORS // num_heads_kv // max(tiles, 1), 1)


def mla_plan_bytes(batch: int, max_seqlen_q: int, num_heads_q: int, num_heads_kv: int = 1) -> int:
    """Bytes of workspace that the plan of one MLA geometry takes."""
    return 4 * (MLA_RECORD_INTS * mla_parts(max_seqlen_q, num_heads_q, num_heads_kv) + batch + 1)


def mla_decode(
    q: Tensor,
    qv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    page_table: Tensor | None,
    queries: Queries,
    scale: float,
    causal: bool,
    metadata: object,
) -> tuple[Tensor, Tensor]:
    """Return the output and its LSE; for 4-d queries ``(batch, seqlen_q, heads)``, as in MATE."""
    if cache_seqlens is None or page_table is None:
        raise RefusedValue(
            "cache_seqlens and page_table", "not both given", "both for MLA", "Pass them."
        )
    k_cache, v_cache = (c.unsqueeze(2) if c.dim() == 3 else c for c in (k_cache, v_cache))
    check_keys(k_cache, v_cache, q, 4)
    _check_mla(q, qv, k_cache, v_cache)
    batch, heads = len(queries.counts), q.shape[-2]
    check_page_table(page_table, batch)
    parts = mla_parts(queries.longest, heads)
    needed = mla_plan_bytes(batch, queries.longest, heads)
    workspace, reuse = _mla_workspace(metadata, needed, q)
    keys = cache_seqlens.tolist()
    check_capacity("cache_seqlens", keys, page_table.shape[1] * MLA_PAGE_SIZE)
    plan = workspace[:needed].view(torch.int32)
    if not reuse:
        plan.copy_(torch.tensor(_mla_plan(keys, parts), dtype=torch.int32))
    rule = resolve_mask(queries.longest, page_table.shape[1] * MLA_PAGE_SIZE, causal, None, 0)
    store = _LatentStore(k_cache, v_cache, page_table, list(range(batch)), [0] * batch)
    flat = torch.cat([q, qv], -1).reshape(-1, heads, MLA_ROPE_DIM + MLA_LATENT_DIM)
    problem = AttentionProblem(
        flat, 1, MLA_LATENT_DIM, store, queries.starts, queries.counts, keys, rule, scale
    )
    out, lse = unwritten(flat, MLA_LATENT_DIM)
    _mla_run(
        problem, plan.tolist(), parts, ceil_div(queries.longest * heads, MLA_QUERY_TILE), out, lse
    )
    if q.dim() == 3:
        return out, lse
    return out.view(*q.shape[:-1], MLA_LATENT_DIM), lse.T.reshape(q.shape[:-1])


def _mla_workspace(metadata: object, plan_bytes: int, q: Tensor) -> tuple[Tensor, bool]:
    if not (isinstance(metadata, tuple) and len(metadata) == 2 and isinstance(metadata[0], Tensor)):
        raise RefusedType(
            "scheduler_metadata",
            type(metadata).__name__,
            "(workspace, reuse)",
            "MLA needs a workspace to plan in.",
        )
    workspace, reuse = metadata
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        seen = f"{workspace.dtype} {tuple(workspace.shape)}"
        raise RefusedType("workspace", seen, "contiguous 1-d uint8", "Allocate it as bytes.")
    check_devices(q, {"workspace": workspace})
    if workspace.numel() < plan_bytes:
        raise RefusedValue(
            "workspace.numel()",
            workspace.numel(),
            f"at least {plan_bytes} bytes",
            "The workspace is too small.",
        )
    return workspace, bool(reuse)


def _check_mla(q: Tensor, qv: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    dims = (q.shape[-1], qv.shape[-1], v_cache.shape[-1])
    if dims != (MLA_ROPE_DIM, MLA_LATENT_DIM, MLA_LATENT_DIM):
        raise RefusedFeature(
            "qv", f"given with head dimensions {dims} of q, qv, v", "64, 512, 512", "qv is for MLA."
        )
    if q.shape[:-1] != qv.shape[:-1]:
        raise RefusedValue(
            "qv.shape",
            tuple(qv.shape),
            f"q's {tuple(q.shape)} but for dim",
            "Split one query tensor.",
        )
    if k_cache.shape[1] != MLA_PAGE_SIZE:
        raise RefusedValue(
            "the page size", k_cache.shape[1], "64 for MLA", "Start the server with --page-size 64."
        )
    if k_cache.shape[-2] != 1:
        raise RefusedValue(
            "k_cache's head count", k_cache.shape[-2], "1 for MLA", "Pass the latent cache."
        )


def _mla_plan(key_counts: list[int], parts: int) -> list[int]:
    """Deal key blocks of all requests to the parts: records, then the running count of splits."""
    blocks = [max(ceil_div(count, KEY_TILE), 1) for count in key_counts]
    batch, payload = len(blocks), ceil_div(sum(blocks) + MLA_OVERHEAD_BLOCKS * len(blocks), parts)
    payload += MLA_OVERHEAD_BLOCKS
    records: list[int] = []
    counts = [0] * (batch + 1)
    index = block = split = 0
    for _ in range(parts):
        first, room = [index, block], payload
        first_split = split
        while index < batch and room >= blocks[index] - block + MLA_OVERHEAD_BLOCKS:
            counts[index + 1] = counts[index] + split + 1
            room -= blocks[index] - block + MLA_OVERHEAD_BLOCKS
            index, block, split = index + 1, 0, 0
        if index < batch and room > MLA_OVERHEAD_BLOCKS:
            block, split = block + room - MLA_OVERHEAD_BLOCKS, split + 1
        end = (
            [index, block]
            if block
            else [index - 1, ceil_div(key_counts[index - 1], KEY_TILE) if index else 0]
        )
        records += [*first, *end, first_split, 0, 0, 0]
    return records + counts


def _mla_run(
    problem: AttentionProblem, plan: list[int], parts: int, tiles: int, out: Tensor, lse: Tensor
) -> None:
    """Run an MLA decode as its plan says; a batch whose plan does not fit its keys stays NaN.

    A device would combine what the parts wrote with what nobody wrote; here nothing of that is
    passed on.
    """
    counts = plan[parts * MLA_RECORD_INTS :]
    for batch, pieces in enumerate(_mla_pieces(plan, parts, problem.key_counts)):
        keys = problem.key_counts[batch]
        q = problem.packed_queries(batch)[:, : tiles * MLA_QUERY_TILE]
        if not q.shape[1] or not _mla_pieces_fit(pieces, counts[batch + 1] - counts[batch], keys):
            continue
        results = [attend(problem, batch, q, tile_keys(piece, keys)) for piece in pieces]
        outs, lses = zip(*results, strict=True)
        merged = combine(torch.stack(outs), torch.stack(lses))
        write_rows(problem, batch, *(results[0] if len(results) == 1 else merged), out, lse)


def _mla_pieces(plan: list[int], parts: int, key_counts: list[int]) -> list[list[range]]:
    """Decode a plan: by batch, the runs of key blocks that some part works on."""
    pieces: list[list[range]] = [[] for _ in key_counts]
    for part in range(parts):
        first, first_block, last, end_block = plan[
            part * MLA_RECORD_INTS : part * MLA_RECORD_INTS + 4
        ]
        for batch in range(max(first, 0), min(last + 1, len(key_counts))):
            start = first_block if batch == first else 0
            stop = end_block if batch == last else ceil_div(key_counts[batch], KEY_TILE)
            pieces[batch].append(range(start, stop))
    return pieces


def _mla_pieces_fit(pieces: list[range], splits: int, keys: int) -> bool:
    """Return whether the pieces are the splits to combine, and all keys once, in order."""
    ends = [piece.stop for piece in pieces]
    starts = [piece.start for piece in pieces]
    return (
        len(pieces) == splits
        and starts == [0, *ends[:-1]]
        and ends[-1:] == [ceil_div(keys, KEY_TILE)]
    )
