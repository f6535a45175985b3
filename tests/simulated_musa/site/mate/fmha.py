"""Attention over pages or packed rows, cut up as a plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mate.geometry import KEY_TILE, Geometry, read_plan, require_exact, write_plan


@dataclass(frozen=True)
class Options:
    """Arguments that change scores and masks."""

    softmax_scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Rows and where they are; ``None`` where a call has none."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets_q: list[int]
    lengths_q: list[int]
    lengths_k: list[int]
    offsets_k: list[int] | None = None
    page_table: torch.Tensor | None = None
    leftpad: list[int] | None = None
    rows: list[int] | None = None
    qv: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    scales: tuple[torch.Tensor | None, ...] = (None, None, None)

    def keys(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a request, ``(length, heads_kv, headdim)`` float32."""
        begin = 0 if self.leftpad is None else self.leftpad[request]
        end = self.lengths_k[request]
        if self.offsets_k is not None:
            first = self.offsets_k[request]
            parts = [tensor[first + begin : first + end] for tensor in (self.k, self.v)]
        elif self.page_table is not None:
            parts = [
                _paged(tensor, self.page_table[request], begin, end) for tensor in (self.k, self.v)
            ]
        else:
            row = request if self.rows is None else self.rows[request]
            parts = [tensor[row, begin:end] for tensor in (self.k, self.v)]
        scaled = [
            _scaled(part, scale, request)
            for part, scale in zip(parts, self.scales[1:], strict=True)
        ]
        return scaled[0], scaled[1]


def _scaled(rows: torch.Tensor, scale: torch.Tensor | None, request: int) -> torch.Tensor:
    return rows.float() if scale is None else rows.float() * scale[request].view(1, -1, 1)


def _paged(cache: torch.Tensor, pages: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    size = cache.shape[1]
    used = pages[: -(-end // size)].long()
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= cache.shape[0]):
        raise RuntimeError(
            "MUSA error: an illegal memory access (a page table names a page that is not there)"
        )
    return cache[used].flatten(0, 1)[begin:end]


def attend(
    out: torch.Tensor,
    lse: torch.Tensor,
    inputs: Inputs,
    options: Options,
    geometry: Geometry,
    plan: torch.Tensor | None,
) -> None:
    """Write attention's output ``(total_q, heads, headdim_v)`` and lse ``(heads, total_q)``.

    Without a plan, and with sinks, every request has one split. Where a plan is another call's,
    this goes wrong as it would on a GPU: query tiles that it does not name are not written, and
    splits that are not launched are missed.
    """
    batch = geometry.batch
    work = [
        (request, 1, geometry.query_tiles(length))
        for request, length in enumerate(inputs.lengths_q)
    ]
    launched = 1
    if plan is not None and inputs.sinks is None:
        work, launched = read_plan(plan, batch), geometry.splits
        require_exact(work, _planned(inputs, geometry, plan))
    for request, splits, tiles in work:
        rows = min(inputs.lengths_q[request], tiles * geometry.query_tile // geometry.ratio)
        if rows > 0:
            _attend_request(out, lse, inputs, options, request, rows, splits, launched)


def _planned(inputs: Inputs, geometry: Geometry, plan: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return the work of a plan that is made now, to be compared with ``plan``."""
    now = torch.empty_like(plan)
    before = inputs.leftpad or [0] * geometry.batch
    lengths = zip(inputs.lengths_k, before, strict=True)
    write_plan(now, geometry, inputs.lengths_q, [length - left for length, left in lengths])
    return read_plan(now, geometry.batch)


def _attend_request(
    out: torch.Tensor,
    lse: torch.Tensor,
    inputs: Inputs,
    options: Options,
    request: int,
    rows: int,
    splits: int,
    launched: int,
) -> None:
    first = inputs.offsets_q[request]
    q = inputs.q[first : first + rows].float()
    if inputs.scales[0] is not None:
        groups = q.shape[1] // inputs.scales[0].shape[1]
        q = q * inputs.scales[0][request].repeat_interleave(groups).view(1, -1, 1)
    k, v = inputs.keys(request)
    scores = _scores(q, k, options.softmax_scale)
    if inputs.qv is not None:
        scores = scores + _scores(inputs.qv[first : first + rows].float(), v, options.softmax_scale)
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    shift = k.shape[0] - inputs.lengths_q[request]
    scores = scores.masked_fill(~_visible(rows, k.shape[0], shift, options), -torch.inf)
    tiles = -(-k.shape[0] // KEY_TILE)
    width = max(1, -(-tiles // splits)) * KEY_TILE
    parts = []
    for split in range(min(splits, launched)):
        parts.append(
            _partial(
                scores[..., split * width : (split + 1) * width],
                v[split * width : (split + 1) * width],
            )
        )
    sinks = None if inputs.sinks is None else inputs.sinks.float()
    value, total = _combined(parts, sinks)
    out[first : first + rows] = value.transpose(0, 1).to(out.dtype)
    lse[:, first : first + rows] = total


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``(heads, rows, keys)``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.matmul(q.transpose(0, 1), k.permute(1, 2, 0)) * scale


def _visible(rows: int, keys: int, shift: int, options: Options) -> torch.Tensor:
    """Return which keys each row sees, ``(rows, keys)``; the last row is at the last key."""
    place = torch.arange(rows).unsqueeze(1) + shift
    key = torch.arange(keys).unsqueeze(0)
    left, right = options.window
    if options.causal:
        right = 0
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if right >= 0:
        seen &= key <= place + right
    if left >= 0:
        seen &= key >= place - left
    if options.attention_chunk > 0:
        seen &= (
            key
            >= place.div(options.attention_chunk, rounding_mode="floor") * options.attention_chunk
        )
    return seen


def _partial(scores: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp over some of the keys: ``(heads, rows, headdim_v)``, ``(heads,
    rows)``.
    """
    if scores.shape[-1] == 0:
        heads, rows = scores.shape[:2]
        return torch.zeros(heads, rows, v.shape[-1]), torch.full((heads, rows), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    v = v.repeat_interleave(scores.shape[0] // v.shape[1], dim=1)
    # A key that no row sees may hold anything.
    unseen = (scores == -torch.inf).all(dim=(0, 1))
    v = v.masked_fill(unseen.view(-1, 1, 1), 0.0)
    return torch.matmul(weights, v.transpose(0, 1)), lse


def _combined(parts: list[Any], sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.stack([value for value, _ in parts])
    each = torch.stack([lse for _, lse in parts])
    total = each.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.view(-1, 1).expand_as(total))
    shares = torch.exp(each - total).nan_to_num(0.0)
    return (values * shares.unsqueeze(-1)).sum(0), total
