"""MLA decode over pages of 64 latent keys; the kernel writes its plan into a workspace.

The plan cuts the key tiles of all requests, one after another, into parts of about the same number,
one for each piece of the GPU: records of eight int32 (request and tile where it begins, request and
tile where it ends, unused), then the number of splits before each request.
"""

from __future__ import annotations

import torch

from mate.fmha import _combined, _partial, _scores
from mate.geometry import KEY_TILE, MULTIPROCESSORS, require_exact

LATENT, ROPE, PAGE = 512, 64, 64
_RECORD = 8


def attend_latent(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    qv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    workspace: torch.Tensor,
    *,
    max_seqlen_q: int,
    reuse: bool,
    softmax_scale: float,
    causal: bool,
) -> None:
    """Write output ``(total_q, heads, 512)`` and log-sum-exp ``(heads, total_q)`` by the plan in
    ``workspace``.
    """
    lengths, batch = cache_seqlens.tolist(), cache_seqlens.numel()
    parts = max(MULTIPROCESSORS // -(-max_seqlen_q * q.shape[1] // 128), 1)
    size = parts * _RECORD + batch + 1
    if workspace.numel() < 4 * size:
        raise RuntimeError(
            f"MUSA error: an illegal memory access (workspace of {workspace.numel()} bytes)"
        )
    plan = workspace[: 4 * size].view(torch.int32)
    if reuse:
        now = torch.empty_like(plan)
        _write_plan(now, lengths, parts)
        require_exact(plan.tolist(), now.tolist())
    else:
        _write_plan(plan, lengths, parts)
    bounds = cu_seqlens_q.tolist()
    pieces = _pieces(plan[: parts * _RECORD].view(parts, _RECORD).tolist(), batch)
    for request in range(batch):
        rows = slice(bounds[request], bounds[request + 1])
        pages = page_table[request, : -(-lengths[request] // PAGE)].long()
        keys = k_cache[pages].flatten(0, 1)[: lengths[request]].float()
        latent = v_cache[pages].flatten(0, 1)[: lengths[request]].float()
        scores = _scores(q[rows].float(), keys, softmax_scale) + _scores(
            qv[rows].float(), latent, softmax_scale
        )
        if causal:
            count = bounds[request + 1] - bounds[request]
            place = torch.arange(count).unsqueeze(1) + lengths[request] - count
            scores = scores.masked_fill(torch.arange(lengths[request]) > place, -torch.inf)
        split = [_partial(scores[..., part], latent[part]) for part in pieces.get(request, ())]
        if split:  # A request that no part works on is not written.
            value, total = _combined(split, None)
            out[rows] = value.transpose(0, 1).to(out.dtype)
            lse[:, rows] = total


def _write_plan(plan: torch.Tensor, lengths: list[int], parts: int) -> None:
    tiles = [max(1, -(-length // KEY_TILE)) for length in lengths]
    share = -(-sum(tiles) // parts) + 1
    plan.zero_()
    records = plan[: parts * _RECORD].view(parts, _RECORD)
    splits = [0] * len(lengths)
    request = tile = 0
    for part in range(parts):
        records[part, 0], records[part, 1] = request, tile
        left = share
        while left > 0 and request < len(lengths):
            step = min(left, tiles[request] - tile)
            splits[request] += 1
            left, tile = left - step, tile + step
            if tile == tiles[request]:
                request, tile = request + 1, 0
        records[part, 2], records[part, 3] = request, tile
    before = 0
    for number, count in enumerate([0, *splits]):
        before += count
        plan[parts * _RECORD + number] = before


def _pieces(records: list[list[int]], batch: int) -> dict[int, list[slice]]:
    """Return the keys that parts work on, by request; raise for a part of another batch."""
    pieces: dict[int, list[slice]] = {}
    for begin, tile, end, last, *_ in records:
        if not (0 <= begin <= end <= batch and tile >= 0 and last >= 0):
            raise RuntimeError(
                "MUSA error: an illegal memory access (an MLA plan names a request that is not "
                "there)"
            )
        for request in range(begin, end + 1):
            first = tile if request == begin else 0
            stop = last if request == end else None
            if request < batch and stop != 0:
                keys = slice(first * KEY_TILE, None if stop is None else stop * KEY_TILE)
                pieces.setdefault(request, []).append(keys)
    return pieces
