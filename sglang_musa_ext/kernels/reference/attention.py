"""Attention as a plan schedules it: query tiles, splits of the keys, and what combines them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_musa_ext import policy
from sglang_musa_ext.kernels.reference.planning import (
    KEY_TILE,
    MULTIPROCESSORS,
    MaskRule,
    TileShape,
    as_list,
    ceil_div,
    lengths,
    static_num_splits,
    tile_shape,
)
from sglang_musa_ext.kernels.reference.refusals import RefusedValue, check_index_vectors

_SCORE_BUDGET = 1 << 24  # scores held at once; bounds memory in long prefills


@dataclass(frozen=True)
class KeyStore:
    """Where a batch's keys are: pages, one dense row a batch, or one ragged run.

    ``offsets`` are per batch: what to skip before the first key (left padding), or the start of its
    run.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None
    rows: list[int]
    offsets: list[int]
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    def gather(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[start, stop)`` of a batch, float32 ``(heads, keys, dim)``."""
        first, last = self.offsets[batch] + start, self.offsets[batch] + stop
        k = self._read(self.k, self.rows[batch], first, last).float().transpose(0, 1)
        v = self._read(self.v, self.rows[batch], first, last).float().transpose(0, 1)
        return _scaled(k, self.k_scales, batch), _scaled(v, self.v_scales, batch)

    def _read(self, cache: Tensor, row: int, first: int, last: int) -> Tensor:
        if cache.dim() == 3:
            return cache[first:last]
        if self.page_table is None:
            return cache[row, first:last]
        size = cache.shape[1]
        pages = self.page_table[row, first // size : ceil_div(last, size)]
        skipped = first - first // size * size
        return _select(cache, pages).flatten(0, 1)[skipped : skipped + last - first]

    def write(self, batch: int, at: int, k_new: Tensor, v_new: Tensor) -> None:
        """Put new keys and values ``(new, heads, dim)`` at position ``at`` of a batch, in place."""
        row, count = self.rows[batch], k_new.shape[0]
        where = torch.arange(
            self.offsets[batch] + at, self.offsets[batch] + at + count, device=self.k.device
        )
        for cache, new in ((self.k, k_new), (self.v, v_new)):
            if self.page_table is None:
                cache[row, where] = new
            else:
                size = cache.shape[1]
                cache[self.page_table[row].long()[where // size], where % size] = new


def _scaled(values: Tensor, scales: Tensor | None, batch: int) -> Tensor:
    """Multiply ``(heads_kv, n, dim)`` by a batch's scales of each key head."""
    return values if scales is None else values * scales[batch][:, None, None]


def _select(cache: Tensor, pages: Tensor) -> Tensor:
    """Return these pages of a cache. PyTorch selects no fp8 on a CPU, so that goes as bytes."""
    if cache.element_size() > 1:
        return cache.index_select(0, pages)
    return cache.view(torch.uint8).index_select(0, pages).view(cache.dtype)


@dataclass(frozen=True)
class AttentionProblem:
    """One call, all forms made one: ``q`` is ``(total_q, heads, dim)``; lists are per batch."""

    q: Tensor
    heads_kv: int
    headdim_v: int
    store: KeyStore
    row_starts: list[int]
    row_counts: list[int]
    key_counts: list[int]
    rule: MaskRule
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    q_scales: Tensor | None = None
    release: policy.MateRelease = policy.NEWEST_MATE

    @property
    def ratio(self) -> int:
        """Query heads of one key head."""
        return self.q.shape[1] // self.heads_kv

    def packed_queries(self, batch: int) -> Tensor:
        """Pack a batch's queries, float32 ``(heads_kv, rows * ratio, dim)``, heads in a row."""
        start, count = self.row_starts[batch], self.row_counts[batch]
        q = self.q[start : start + count].float()
        grouped = q.view(count, self.heads_kv, self.ratio, q.shape[-1]).transpose(0, 1)
        packed = grouped.reshape(self.heads_kv, count * self.ratio, q.shape[-1])
        return _scaled(packed, self.q_scales, batch)


@dataclass(frozen=True)
class Queries:
    """Where each batch's query rows are in ``(total_q, heads, dim)``, and ``max_seqlen_q``."""

    starts: list[int]
    counts: list[int]
    longest: int


def find_queries(
    q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, used: Tensor | None
) -> Queries:
    """Find each batch's rows, by ``cu_seqlens_q`` or by padded queries; refuse misfits."""
    if cu_seqlens_q is None:
        if q.dim() != 4:
            raise RefusedValue(
                "q.shape", tuple(q.shape), "(batch, seqlen_q, heads, dim)", "Or pass cu_seqlens_q."
            )
        batch, length = q.shape[:2]
        return Queries([b * length for b in range(batch)], as_list(used, batch, length), length)
    if q.dim() != 3:
        raise RefusedValue(
            "q.shape", tuple(q.shape), "(total_q, heads, dim)", "cu_seqlens_q is given."
        )
    if max_seqlen_q is None:
        raise RefusedValue("max_seqlen_q", None, "a number", "cu_seqlens_q needs it.")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise RefusedValue(
            "cu_seqlens_q.shape", tuple(cu_seqlens_q.shape), "(batch + 1,)", "Pass offsets."
        )
    batch = cu_seqlens_q.shape[0] - 1
    check_index_vectors({"cu_seqlens_q": cu_seqlens_q}, batch + 1)
    starts = cu_seqlens_q.tolist()
    if starts[-1] > q.shape[0] or sorted(starts) != starts or starts[0] < 0:
        raise RefusedValue(
            "cu_seqlens_q", starts, f"rising offsets up to {q.shape[0]}", "It must fit q."
        )
    counts = lengths(cu_seqlens_q, batch, 0) if used is None else as_list(used, batch, 0)
    return Queries(starts[:-1], counts, int(max_seqlen_q))


def unwritten(flat_q: Tensor, headdim_v: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and LSE buffers of NaN, or the caller's output as it is."""
    total, heads = flat_q.shape[:2]
    lse = flat_q.new_full((heads, total), math.nan, dtype=torch.float32)
    # Attention of fp8 is bfloat16, as in FA3.
    dtype = torch.bfloat16 if flat_q.element_size() == 1 else flat_q.dtype
    empty = flat_q.new_full((total, heads, headdim_v), math.nan, dtype=dtype)
    return empty if out is None else out, lse


def forward(
    problem: AttentionProblem,
    queries: Queries,
    capacity: int,
    metadata: Tensor | None,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one call by its plan; return ``(total_q, heads, dim)`` and LSE ``(heads, total_q)``."""
    batch, heads, dim = len(queries.counts), problem.q.shape[1], problem.q.shape[2]
    tile = tile_shape(queries.longest, problem.ratio, dim, problem.headdim_v, pack_gqa)
    launched = ceil_div(queries.longest * (problem.ratio if tile.packed else 1), tile.query)
    static = 1
    if metadata is not None:
        static = (
            num_splits
            if num_splits > 0
            else static_num_splits(
                tile,
                batch,
                queries.longest,
                capacity,
                heads,
                problem.heads_kv,
                dim,
                problem.headdim_v,
                problem.rule,
                MULTIPROCESSORS - sm_margin,
            )
        )
    flat_out, lse = unwritten(problem.q, problem.headdim_v, out)
    _run(problem, tile, _visits(metadata, batch, launched, problem.release), static, flat_out, lse)
    return flat_out, lse


@dataclass(frozen=True)
class _Visit:
    """The query tiles of a batch that the schedule runs, and the splits of its keys."""

    batch: int
    query_tiles: int
    splits: int


def _visits(
    metadata: Tensor | None, batch: int, launched_tiles: int, release: policy.MateRelease
) -> list[_Visit]:
    """Read the metadata; without any, every batch runs in one split, in natural order."""
    if metadata is None:
        return [_Visit(index, launched_tiles, 1) for index in range(batch)]
    length = policy.mate_plan_vector(release, batch)
    splits, table, tiles, _ = metadata[: 4 * length].view(4, length)[:, :batch].tolist()
    for index in table:
        if not 0 <= index < batch:
            raise RefusedValue(
                "scheduler_metadata",
                f"a batch table naming batch {index}",
                f"batches below {batch}",
                "This metadata was computed for another batch.",
            )
    return [
        _Visit(b, min(m, launched_tiles), s) for b, m, s in zip(table, tiles, splits, strict=True)
    ]


def _run(
    problem: AttentionProblem,
    tile: TileShape,
    visits: list[_Visit],
    static: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill ``out`` ``(total_q, heads, dim)`` and ``lse`` ``(heads, total_q)`` by the schedule."""
    tile_rows = tile.query if tile.packed else tile.query * problem.ratio
    for visit in visits:
        q = problem.packed_queries(visit.batch)[:, : visit.query_tiles * tile_rows]
        if q.shape[1]:
            write_rows(problem, visit.batch, *_visit(problem, visit, q, static), out, lse)


def _visit(
    problem: AttentionProblem, visit: _Visit, q: Tensor, static: int
) -> tuple[Tensor, Tensor]:
    tiles, keys = _key_tiles(problem, visit.batch), problem.key_counts[visit.batch]
    if visit.splits <= 1:
        return attend(problem, visit.batch, q, tile_keys(tiles, keys))
    # Accumulators start as NaN, and only the splits that the forward launches are ever written.
    outs = q.new_full((visit.splits, *q.shape[:2], problem.headdim_v), math.nan)
    lses = q.new_full((visit.splits, *q.shape[:2]), math.nan)
    share = ceil_div(len(tiles), visit.splits)
    whole = tile_keys(tiles, keys)
    # One gather serves all splits, for speed; each still sees its own keys alone.
    k, v = problem.store.gather(visit.batch, whole.start, whole.stop)
    for split in range(min(visit.splits, static)):
        part = tile_keys(tiles[split * share : (split + 1) * share], keys)
        at = slice(part.start - whole.start, part.stop - whole.start)
        outs[split], lses[split] = attend(problem, visit.batch, q, part, (k[:, at], v[:, at]))
    return combine(outs, lses)


def tile_keys(tiles: range, keys: int) -> range:
    """Turn key tiles into the keys that there are in them."""
    return range(
        tiles.start * KEY_TILE, max(min(tiles.stop * KEY_TILE, keys), tiles.start * KEY_TILE)
    )


def _key_tiles(problem: AttentionProblem, batch: int) -> range:
    """The key tiles that any row of a batch can see; the rest are never read, as on the device."""
    keys, rows, rule = problem.key_counts[batch], problem.row_counts[batch], problem.rule
    first = max(keys - rows - rule.left, 0) // KEY_TILE if rule.local else 0
    return range(first, max(ceil_div(keys, KEY_TILE), first))


def attend(
    problem: AttentionProblem,
    batch: int,
    q: Tensor,
    keys: range,
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to one run of keys; return ``(heads_kv, n, dim)`` and LSE ``(heads_kv, n)``.

    ``held`` are these keys and values where the caller has them already.
    """
    if not len(keys):
        lse = q.new_full(q.shape[:2], -math.inf)
        return q.new_zeros((*q.shape[:2], problem.headdim_v)), lse
    k, v = held or problem.store.gather(batch, keys.start, keys.stop)
    budget = max(_SCORE_BUDGET // (q.shape[0] * len(keys)), 1)
    parts = [
        _softmax_rows(problem, batch, q[:, at : at + budget], at, keys, k, v)
        for at in range(0, q.shape[1], budget)
    ]
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _softmax_rows(
    problem: AttentionProblem,
    batch: int,
    q: Tensor,
    first_row: int,
    keys: range,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.transpose(1, 2)).mul_(problem.scale)
    if problem.softcap:
        scores = torch.tanh(scores / problem.softcap) * problem.softcap
    visible = _visible(problem, batch, first_row, q.shape[1], keys)
    if visible is not None:
        scores = scores.masked_fill_(~visible, -math.inf)
    peak = scores.amax(-1)
    sinks = _packed_sinks(problem, first_row, q.shape[1])
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = scores.sub_(peak[..., None]).exp_()
    total = weights.sum(-1)
    if sinks is not None:
        total = total + (sinks - peak).exp()
    # A row that sees no key weighs nothing: output 0 and LSE -inf, not 0 / 0.
    out = torch.matmul(weights, v) / total.masked_fill(total == 0, 1.0)[..., None]
    return out, peak + total.log()


def _packed_sinks(problem: AttentionProblem, first_row: int, count: int) -> Tensor | None:
    """Return packed rows' sinks ``(heads_kv, count)``: logits, neither scaled nor capped."""
    if problem.sinks is None:
        return None
    heads = torch.arange(first_row, first_row + count, device=problem.q.device) % problem.ratio
    return problem.sinks.float().view(problem.heads_kv, problem.ratio)[:, heads]


def _visible(
    problem: AttentionProblem, batch: int, first_row: int, count: int, keys: range
) -> Tensor | None:
    """Return the ``keys`` that packed rows see, bool ``(count, keys)``; ``None`` for all."""
    rule, ratio = problem.rule, problem.ratio
    shift = problem.key_counts[batch] - problem.row_counts[batch]
    if not rule.local and (not rule.causal or first_row // ratio + shift >= keys.stop - 1):
        return None
    device = problem.q.device
    row = torch.arange(first_row, first_row + count, device=device)
    anchor = (row.div(ratio, rounding_mode="floor") + shift)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    if rule.causal:
        return key <= anchor
    seen = (key >= anchor - rule.left) & (key <= anchor + rule.right)
    if rule.chunk:
        start = anchor.div(rule.chunk, rounding_mode="floor") * rule.chunk
        seen &= (key >= start) & (key < start + rule.chunk)
    return seen


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results along dimension 0 by their log-sum-exp; NaN in any makes NaN."""
    peak = lses.amax(0)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = (lses - peak).exp()
    total = weights.sum(0)
    out = (weights[..., None] * outs).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return out, peak + total.log()


def write_rows(
    problem: AttentionProblem, batch: int, part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Write packed results of a batch's first packed rows; absent rows stay as they were."""
    start, count, ratio = problem.row_starts[batch], problem.row_counts[batch], problem.ratio
    missing = count * ratio - part.shape[1]
    if missing:
        part = torch.nn.functional.pad(part, (0, 0, 0, missing), value=math.nan)
        part_lse = torch.nn.functional.pad(part_lse, (0, missing), value=math.nan)
    rows = part.view(problem.heads_kv, count, ratio, -1).transpose(0, 1)
    out[start : start + count] = rows.reshape(count, problem.heads_kv * ratio, -1).to(out.dtype)
    heads = part_lse.view(problem.heads_kv, count, ratio).transpose(1, 2)
    lse[:, start : start + count] = heads.reshape(-1, count)
