"""FlashAttention-3 in plain PyTorch, behaving like MATE 0.2.2: the kernels of tests, the demo and
checks.

The public functions have MATE's signatures, so an unknown keyword is a ``TypeError``; they refuse
what MATE refuses; and they *use* the scheduler metadata: batch order, query tiles and splits come
from it. What the metadata leaves out is NaN here where a device would leave whatever the memory
held, so that a stale or foreign plan shows.

Differences from MATE, all on purpose:

* float32 is accepted beside bfloat16 and float16, because only float32 makes a token-for-token
  comparison with another attention implementation possible. Everything is computed in float32.
* Any device will do. :data:`MULTIPROCESSORS` stands in for the device's own count.
* MATE's second path for unpaged prefill has no metadata; here metadata counts wherever it is given.
* A strided page table, rotary embedding, fp8 descales, context parallelism and new keys in the MLA
  form are refused by name.

A plan that is stale but still launches what the forward combines (say, other key lengths under the
same capacity) gives right output, here as on the device: only comparing plans can find that one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPROCESSORS = 56
"""How many multiprocessors the reference pretends to have; splits and MLA parts depend on it."""

KEY_TILE = 64
MAX_SPLITS = 128
HEAD_DIM_BUCKETS = (64, 128, 192, 256, 384, 512)
HEAD_DIM_PAIRS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (384, 384), (512, 512))
"""Bucketed (query, value) head dimensions that MATE has a kernel for."""

MLA_ROPE_DIM, MLA_LATENT_DIM, MLA_PAGE_SIZE = 64, 512, 64
MLA_QUERY_TILE = 128
MLA_RECORD_INTS = 8
"""int32 values in one tile-scheduler record: first batch, first block, last batch, end block, first
split.
"""
MLA_OVERHEAD_BLOCKS = 5
"""What starting on a request costs a part, in key blocks."""

_L2_BYTES = 3 * 512 * 1024
_PACKED_ROWS_LIMIT = (
    256  # above this many query rows a key head, heads are no longer packed into tiles
)
_METADATA_GROUP = 31 * 32  # batches that one thread block sorts; splits are off beyond it
_SCORE_BUDGET = 1 << 24  # scores held at once; bounds memory in long prefills
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KernelRefusal(Exception):
    """The kernels do not take this call; ``argument`` names what is wrong and ``seen`` holds what
    was passed.
    """

    def __init__(self, argument: str, seen: object, expected: str, remedy: str) -> None:
        self.argument, self.seen = argument, seen
        super().__init__(f"{argument} is {seen}; expected {expected}. {remedy}")


class RefusedType(KernelRefusal, TypeError):
    """An argument has a dtype or type the kernels do not take."""


class RefusedValue(KernelRefusal, ValueError):
    """An argument has a shape, layout, device or value the kernels do not take."""


class RefusedFeature(KernelRefusal, NotImplementedError):
    """An argument asks for something the kernels, or this reference, cannot do."""


@dataclass(frozen=True)
class TileShape:
    """Rows and keys of one tile; ``packed`` puts the query heads of one key head into the same
    tile.
    """

    query: int
    key: int
    packed: bool


@dataclass(frozen=True)
class MaskRule:
    """Which keys a row sees. A row's anchor is its own key position, aligned to the bottom right.

    ``local`` keys lie in ``[anchor - left, anchor + right]`` and, with ``chunk``, in the anchor's
    chunk. With neither ``causal`` nor ``local`` every key is seen.
    """

    causal: bool
    local: bool
    left: int
    right: int
    chunk: int


def tile_shape(
    max_seqlen_q: int, head_ratio: int, headdim: int, headdim_v: int, pack_gqa: bool | None = None
) -> TileShape:
    """The tile that metadata and forward derive, each for itself, from the same four numbers."""
    pair = _head_dim_pair(headdim, headdim_v)
    packed = max_seqlen_q * head_ratio <= _PACKED_ROWS_LIMIT if pack_gqa is None else bool(pack_gqa)
    fixed = {256: 32 if packed else 192, 384: 64, 512: 32}
    rows = max_seqlen_q * head_ratio if packed else max_seqlen_q
    by_rows = next((size for size in (32, 64, 128, 192) if rows <= size), 256)
    return TileShape(fixed.get(pair[0], by_rows), KEY_TILE, packed)


def _head_dim_pair(headdim: int, headdim_v: int) -> tuple[int, int]:
    for name, size in (("head dimension", headdim), ("value head dimension", headdim_v)):
        if size > HEAD_DIM_BUCKETS[-1]:
            raise RefusedValue(
                name, size, "at most 512", "Use another attention backend for this model."
            )
    pair = (_bucket(headdim), _bucket(headdim_v))
    if pair not in HEAD_DIM_PAIRS:
        known = ", ".join(f"{qk}/{v}" for qk, v in HEAD_DIM_PAIRS)
        raise RefusedValue(
            "the pair of head dimensions",
            f"{headdim}/{headdim_v} (rounded up {pair[0]}/{pair[1]})",
            f"one that rounds up to one of {known}",
            "Use another attention backend for this model.",
        )
    return pair


def _bucket(size: int) -> int:
    return next(bucket for bucket in HEAD_DIM_BUCKETS if size <= bucket)


def resolve_mask(
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_size: Sequence[int | None] | None,
    chunk: int,
) -> MaskRule:
    """Turn FA3's mask arguments into one rule; bounds that cannot bite under these lengths are
    dropped.
    """
    left, right = (-1, -1) if window_size is None else window_size
    left = -1 if left is None or left >= max_seqlen_k - 1 else left
    right = -1 if right is None or right >= max_seqlen_q - 1 else right
    if causal:
        right = 0
    is_causal = left < 0 and right == 0 and chunk == 0
    is_local = not is_causal and (left >= 0 or right >= 0 or chunk > 0)
    left = max_seqlen_k - 1 if left < 0 else left
    right = max_seqlen_q - 1 if right < 0 else right
    if chunk > 0:
        left, right = min(left, chunk - 1), min(right, chunk - 1)
    return MaskRule(is_causal, is_local, left, right, chunk)


def static_num_splits(
    tile: TileShape, batch: int, max_seqlen_q: int, max_seqlen_k: int, heads_q: int, heads_kv: int,
    headdim: int, headdim_v: int, rule: MaskRule, multiprocessors: int = MULTIPROCESSORS,
) -> int:  # fmt: skip
    """How many splits are launched, and so how many accumulators exist, when the caller leaves it
    open.
    """
    keys = (
        min(max_seqlen_k, rule.left + rule.right + 1 + tile.query) if rule.local else max_seqlen_k
    )
    key_tiles = _ceil_div(max(keys, 0), tile.key)
    query_tiles = _ceil_div(max_seqlen_q * (heads_q // heads_kv), tile.query)
    total = batch * heads_kv * query_tiles
    if total >= 0.8 * multiprocessors:
        head_bytes = max_seqlen_k * (headdim + headdim_v) * 2
        revisited = query_tiles >= 2 * multiprocessors and not (rule.causal or rule.local)
        return (
            min(_ceil_div(head_bytes, _L2_BYTES), MAX_SPLITS)
            if head_bytes > _L2_BYTES and revisited
            else 1
        )
    if key_tiles <= 4:
        return 1
    counts = range(1, min(MAX_SPLITS, multiprocessors, key_tiles) + 1)
    efficiency = [
        waves / math.ceil(waves) if waves else 0.0
        for waves in (total * n / multiprocessors for n in counts)
    ]
    return next(
        n for n, value in zip(counts, efficiency, strict=True) if value >= 0.85 * max(efficiency)
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- Scheduler metadata ---------------------------------------------------------------------------


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor | None,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Plan one forward; ``qkv_dtype``, ``page_size`` and ``has_softcap`` do not matter, as in MATE.

    ``cache_seqlens`` and ``cache_leftpad`` are ``(batch,)``, ``cu_seqlens_q`` and ``cu_seqlens_k_new``
    ``(batch + 1,)``, all int32 and contiguous; ``cache_seqlens`` of ``None`` means ``max_seqlen_k`` each, and
    ``cu_seqlens_k_new`` *adds* its lengths. ``max_seqlen_k`` must be the capacity the forward will see
    (``page_table.shape[1] * page_size``).

    Returns int32 ``(4 * batch,)`` beside ``cache_seqlens``: ``num_splits_dynamic``, ``batch_table`` (position
    to batch, most work first), ``num_m_blocks`` (query tiles), ``num_nheads_in_l2``, ordered by position.
    """
    headdim_v = headdim if headdim_v is None else headdim_v
    ratio = _head_ratio(num_heads_q, num_heads_kv)
    vectors = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new}
    _check_index_vectors({**vectors}, batch_size + 1)
    _check_index_vectors(
        {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad}, batch_size
    )
    rule = resolve_mask(max_seqlen_q, max_seqlen_k, causal, window_size, attention_chunk)
    tile = tile_shape(max_seqlen_q, ratio, headdim, headdim_v, pack_gqa)
    static = num_splits if num_splits > 0 else static_num_splits(
        tile, batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, rule,
        MULTIPROCESSORS - sm_margin,
    )  # fmt: skip
    rows = _lengths(cu_seqlens_q, batch_size, max_seqlen_q)
    keys = _listed(cache_seqlens, batch_size, max_seqlen_k)
    new = _lengths(cu_seqlens_k_new, batch_size, max_seqlen_k_new)
    pads = _listed(cache_leftpad, batch_size, 0)
    query_tiles = [_ceil_div(count * (ratio if tile.packed else 1), tile.query) for count in rows]
    key_tiles = [
        _planned_key_tiles(k + n - pad, tile, rule)
        for k, n, pad in zip(keys, new, pads, strict=True)
    ]
    heads = num_heads_kv if tile.packed else num_heads_q
    plan = _plan(query_tiles, key_tiles, static, heads, tile, rule.causal)
    nheads = [
        _heads_in_l2(n, headdim + headdim_v, heads, 1 if tile.packed else ratio) for *_, n in plan
    ]
    columns = [[p[0] for p in plan], [p[1] for p in plan], [p[2] for p in plan], nheads]
    device = next(
        (t.device for t in (cache_seqlens, cu_seqlens_q) if t is not None), torch.device("cpu")
    )
    return torch.tensor(columns, dtype=torch.int32, device=device).flatten()


def _planned_key_tiles(keys: int, tile: TileShape, rule: MaskRule) -> int:
    loaded = min(keys, rule.left + rule.right + 1 + tile.query) if rule.local else keys
    return _ceil_div(max(loaded, 0), tile.key)


def _plan(
    query_tiles: list[int],
    key_tiles: list[int],
    static: int,
    heads: int,
    tile: TileShape,
    causal: bool,
) -> list[tuple[int, int, int, int]]:
    """Rows of (splits, batch, query tiles, key tiles a split), each sort group by falling work."""
    splits = _dynamic_splits(query_tiles, key_tiles, static, heads)
    shares = [_ceil_div(n, s) for n, s in zip(key_tiles, splits, strict=True)]

    def work(batch: int) -> int:
        # Under a causal mask a batch's last rows see all keys and its first rows almost none.
        return (
            shares[batch] * tile.key - query_tiles[batch] * tile.query if causal else shares[batch]
        )

    order: list[int] = []
    for start in range(0, len(splits), _METADATA_GROUP):
        group = range(start, min(start + _METADATA_GROUP, len(splits)))
        order += sorted(group, key=work, reverse=True)
    return [(splits[b], b, query_tiles[b], shares[b]) for b in order]


def _dynamic_splits(
    query_tiles: list[int], key_tiles: list[int], static: int, heads: int
) -> list[int]:
    if static == 1 or len(key_tiles) > _METADATA_GROUP:
        return [1] * len(key_tiles)
    total = sum(m * n for m, n in zip(query_tiles, key_tiles, strict=True))
    per_multiprocessor = max(math.ceil(total * 1.1 * heads / MULTIPROCESSORS), 1)
    splits = [max(min(_ceil_div(n, per_multiprocessor), static), 1) for n in key_tiles]
    _shed_splits(splits, key_tiles, sum(splits) - MULTIPROCESSORS)
    return splits


def _shed_splits(splits: list[int], key_tiles: list[int], overflow: int) -> None:
    """Take splits back in rounds, cheapest requests first, until they fit the multiprocessors; in place."""
    while overflow > 0:
        costs = [
            (_ceil_div(n, s - 1) - _ceil_div(n, s), batch)
            for batch, (n, s) in enumerate(zip(key_tiles, splits, strict=True))
            if s > 1
        ]
        if not costs:
            return
        chosen = sorted(costs)[:overflow]
        for _, batch in chosen:
            splits[batch] -= 1
        overflow -= len(chosen)


def _heads_in_l2(key_tiles: int, headdims: int, heads: int, ratio: int) -> int:
    fitting = _L2_BYTES // (KEY_TILE * headdims * 2)
    count = next((n for n in (16, 8, 4, 2) if max(key_tiles, 1) * n <= fitting), 1)
    return min(count * ratio, heads)


def _listed(values: Tensor | None, batch: int, default: int) -> list[int]:
    return [default] * batch if values is None else [int(value) for value in values.tolist()]


def _lengths(cumulative: Tensor | None, batch: int, default: int) -> list[int]:
    if cumulative is None:
        return [default] * batch
    ends = cumulative.tolist()
    return [end - start for start, end in itertools.pairwise(ends)]


# --- Refusals


def _head_ratio(heads_q: int, heads_kv: int) -> int:
    if heads_kv < 1 or heads_q % heads_kv:
        raise RefusedValue(
            "the number of query heads", f"{heads_q} for {heads_kv} key heads", "a multiple of the key heads",
            "Check the head counts and the tensor-parallel size.",
        )  # fmt: skip
    return heads_q // heads_kv


def _check_index_vectors(vectors: dict[str, Tensor | None], length: int) -> None:
    """int32, contiguous, ``(length,)``: what MATE asks of every vector of lengths or offsets."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype != torch.int32:
            raise RefusedType(
                f"{name}.dtype", vector.dtype, "torch.int32", f"Pass {name}.to(torch.int32)."
            )
        if tuple(vector.shape) != (length,):
            raise RefusedValue(
                f"{name}.shape", tuple(vector.shape), f"({length},)", "It must fit the batch."
            )
        if not vector.is_contiguous():
            raise RefusedValue(
                f"{name}.stride()", vector.stride(), "(1,)", f"Pass {name}.contiguous()."
            )


def _check_dtypes(q: Tensor, others: dict[str, Tensor | None]) -> None:
    if q.dtype not in _DTYPES:
        raise RefusedType(
            "q.dtype", q.dtype, "torch.bfloat16 or torch.float16 (and, in this reference, torch.float32)",
            "fp8 attention does not exist here: set the KV cache to auto or bf16.",
        )  # fmt: skip
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != q.dtype:
            raise RefusedType(
                f"{name}.dtype",
                tensor.dtype,
                f"q's own {q.dtype}",
                "Set the KV cache to auto or bf16.",
            )


def _check_devices(q: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise RefusedValue(
                f"{name}.device", tensor.device, f"q's device {q.device}", "Move it there."
            )


def _check_page_table(page_table: Tensor | None, batch: int | None) -> None:
    """``(batch, pages)`` int32; ``batch`` of ``None`` where ``cache_batch_idx`` picks the rows."""
    if page_table is None:
        return
    if page_table.dtype != torch.int32:
        raise RefusedType(
            "page_table.dtype", page_table.dtype, "torch.int32", "Pass page_table.to(torch.int32)."
        )
    if page_table.dim() != 2 or (batch is not None and page_table.shape[0] != batch):
        rows = "any" if batch is None else batch
        raise RefusedValue(
            "page_table.shape", tuple(page_table.shape), f"({rows}, pages)", "One row a request."
        )
    if not page_table.is_contiguous():
        raise RefusedValue(
            "page_table.stride()", page_table.stride(), "a contiguous page table",
            "Pass page_table.contiguous(); never copy the KV cache for it.",
        )  # fmt: skip


def _check_cache_strides(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise RefusedValue(
                f"{name}.stride(-1)", cache.stride(-1), "1", "Keep head dimensions contiguous."
            )


def _check_keys(k: Tensor, v: Tensor, q: Tensor, dims: int) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise RefusedValue(
                f"{name}.dim()", tensor.dim(), f"{dims} dimensions", "See the docstring for shapes."
            )
    if k.shape[:-1] != v.shape[:-1]:
        raise RefusedValue(
            "v.shape",
            tuple(v.shape),
            f"k's {tuple(k.shape)} but for dim",
            "Pass one layer's tensors.",
        )
    if k.shape[-1] != q.shape[-1]:
        raise RefusedValue(
            "k's head dimension", k.shape[-1], f"q's {q.shape[-1]}", "Pass one layer's tensors."
        )


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    if tuple(sinks.shape) != (q.shape[-2],):
        raise RefusedValue(
            "sinks.shape",
            tuple(sinks.shape),
            f"({q.shape[-2]},)",
            "Shard the sinks like the heads.",
        )
    if sinks.dtype != torch.bfloat16 and not (sinks.dtype == q.dtype == torch.float32):
        raise RefusedType(
            "sinks.dtype", sinks.dtype, "torch.bfloat16 (or torch.float32 with float32 q)",
            "Convert them once, when the model loads.",
        )  # fmt: skip


def _check_metadata(metadata: object, batch: int) -> Tensor | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Tensor) or metadata.dtype != torch.int32:
        seen = metadata.dtype if isinstance(metadata, Tensor) else type(metadata).__name__
        raise RefusedType(
            "scheduler_metadata",
            seen,
            "an int32 tensor from get_scheduler_metadata",
            "(workspace, reuse) is for MLA.",
        )
    if metadata.dim() != 1 or metadata.shape[0] < 4 * batch:
        raise RefusedValue(
            "scheduler_metadata.shape", tuple(metadata.shape), f"a metadata buffer of at least 4 * {batch} values",
            "The metadata buffer is too small: it was computed for a smaller batch.",
        )  # fmt: skip
    return metadata


def _refuse_set(arguments: dict[str, object]) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise RefusedFeature(name, "given", "None", f"The reference does not implement {name}.")


def _refuse_context_parallelism(world_size: int, rank: int) -> None:
    if world_size != 1 or rank != 0:
        raise RefusedFeature(
            "cp_world_size", f"{world_size} (cp_rank {rank})", "1 (cp_rank 0)",
            "The reference does not implement interleaved context parallelism.",
        )  # fmt: skip


# --- The forward


@dataclass(frozen=True)
class _KeyStore:
    """Where a batch's keys are: pages, one dense row a batch, or one ragged run.

    ``offsets`` are per batch: what to skip before the first key (left padding), or the start of its run.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None
    rows: list[int]
    offsets: list[int]

    def gather(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[start, stop)`` of a batch, float32 ``(heads, keys, dim)``."""
        first, last = self.offsets[batch] + start, self.offsets[batch] + stop
        return tuple(  # type: ignore[return-value]
            self._read(cache, self.rows[batch], first, last).float().transpose(0, 1)
            for cache in (self.k, self.v)
        )

    def _read(self, cache: Tensor, row: int, first: int, last: int) -> Tensor:
        if cache.dim() == 3:
            return cache[first:last]
        if self.page_table is None:
            return cache[row, first:last]
        size = cache.shape[1]
        pages = self.page_table[row, first // size : _ceil_div(last, size)]
        skipped = first - first // size * size
        return cache.index_select(0, pages).flatten(0, 1)[skipped : skipped + last - first]

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


class _LatentStore(_KeyStore):
    """MLA's cache: ``k`` the rotary part, ``v`` the latent, which is key and value alike.

    One product serves both score terms: q k + qv v is the product of their concatenations.
    """

    def gather(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rope, latent = super().gather(batch, start, stop)
        return torch.cat([rope, latent], -1), latent


@dataclass(frozen=True)
class _Problem:
    """One call, all forms made one: ``q`` is ``(total_q, heads, dim)``; lists are per batch."""

    q: Tensor
    heads_kv: int
    headdim_v: int
    store: _KeyStore
    row_starts: list[int]
    row_counts: list[int]
    key_counts: list[int]
    rule: MaskRule
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def ratio(self) -> int:
        return self.q.shape[1] // self.heads_kv

    def packed_queries(self, batch: int) -> Tensor:
        """A batch's queries, float32 ``(heads_kv, rows * ratio, dim)``: query heads side by side in a row."""
        start, count = self.row_starts[batch], self.row_counts[batch]
        q = self.q[start : start + count].float()
        grouped = q.view(count, self.heads_kv, self.ratio, q.shape[-1]).transpose(0, 1)
        return grouped.reshape(self.heads_kv, count * self.ratio, q.shape[-1])


def _partial(
    problem: _Problem, batch: int, q: Tensor, keys: range, held: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of packed rows ``q`` over one run of keys: output ``(heads_kv, n, dim)``, LSE ``(heads_kv, n)``.

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
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _softmax_rows(
    problem: _Problem, batch: int, q: Tensor, first_row: int, keys: range, k: Tensor, v: Tensor
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


def _packed_sinks(problem: _Problem, first_row: int, count: int) -> Tensor | None:
    """Sinks of packed rows, ``(heads_kv, count)``; they are logits already, neither scaled nor capped."""
    if problem.sinks is None:
        return None
    heads = torch.arange(first_row, first_row + count, device=problem.q.device) % problem.ratio
    return problem.sinks.float().view(problem.heads_kv, problem.ratio)[:, heads]


def _visible(
    problem: _Problem, batch: int, first_row: int, count: int, keys: range
) -> Tensor | None:
    """Which of ``keys`` each packed row sees, bool ``(count, keys)``; ``None`` where it is all of them."""
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


def _key_tiles(problem: _Problem, batch: int) -> range:
    """The key tiles that any row of a batch can see; the rest are never read, as on the device."""
    keys, rows, rule = problem.key_counts[batch], problem.row_counts[batch], problem.rule
    first = max(keys - rows - rule.left, 0) // KEY_TILE if rule.local else 0
    return range(first, max(_ceil_div(keys, KEY_TILE), first))


@dataclass(frozen=True)
class _Visit:
    """What the schedule says of one batch: how many of its query tiles run, in how many splits of the keys."""

    batch: int
    query_tiles: int
    splits: int


def _visits(metadata: Tensor | None, batch: int, launched_tiles: int) -> list[_Visit]:
    """Read the metadata; without any, every batch runs in one split, in natural order."""
    if metadata is None:
        return [_Visit(index, launched_tiles, 1) for index in range(batch)]
    splits, table, tiles, _ = metadata[: 4 * batch].view(4, batch).tolist()
    for index in table:
        if not 0 <= index < batch:
            raise RefusedValue(
                "scheduler_metadata", f"a batch table naming batch {index}", f"batches below {batch}",
                "This metadata was computed for another batch.",
            )  # fmt: skip
    return [
        _Visit(b, min(m, launched_tiles), s) for b, m, s in zip(table, tiles, splits, strict=True)
    ]


def _run(
    problem: _Problem, tile: TileShape, visits: list[_Visit], static: int, out: Tensor, lse: Tensor
) -> None:
    """Fill ``out`` ``(total_q, heads, dim)`` and ``lse`` ``(heads, total_q)`` where the schedule says so."""
    tile_rows = tile.query if tile.packed else tile.query * problem.ratio
    for visit in visits:
        q = problem.packed_queries(visit.batch)[:, : visit.query_tiles * tile_rows]
        if q.shape[1]:
            _store(problem, visit.batch, *_visit(problem, visit, q, static), out, lse)


def _visit(problem: _Problem, visit: _Visit, q: Tensor, static: int) -> tuple[Tensor, Tensor]:
    tiles, keys = _key_tiles(problem, visit.batch), problem.key_counts[visit.batch]
    if visit.splits <= 1:
        return _partial(problem, visit.batch, q, _tile_keys(tiles, keys))
    # Accumulators start as NaN, and only the splits that the forward itself launches are ever written.
    outs = q.new_full((visit.splits, *q.shape[:2], problem.headdim_v), math.nan)
    lses = q.new_full((visit.splits, *q.shape[:2]), math.nan)
    share = _ceil_div(len(tiles), visit.splits)
    whole = _tile_keys(tiles, keys)
    # One gather serves all splits, for speed; each still sees its own keys alone.
    k, v = problem.store.gather(visit.batch, whole.start, whole.stop)
    for split in range(min(visit.splits, static)):
        part = _tile_keys(tiles[split * share : (split + 1) * share], keys)
        at = slice(part.start - whole.start, part.stop - whole.start)
        outs[split], lses[split] = _partial(problem, visit.batch, q, part, (k[:, at], v[:, at]))
    return _combine(outs, lses)


def _tile_keys(tiles: range, keys: int) -> range:
    return range(
        tiles.start * KEY_TILE, max(min(tiles.stop * KEY_TILE, keys), tiles.start * KEY_TILE)
    )


def _combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results along dimension 0 by their log-sum-exp; NaN in any makes NaN."""
    peak = lses.amax(0)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = (lses - peak).exp()
    total = weights.sum(0)
    out = (weights[..., None] * outs).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return out, peak + total.log()


def _store(
    problem: _Problem, batch: int, part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Write packed results of a batch's first packed rows; rows that are not there stay as they were."""
    start, count, ratio = problem.row_starts[batch], problem.row_counts[batch], problem.ratio
    missing = count * ratio - part.shape[1]
    if missing:
        part = torch.nn.functional.pad(part, (0, 0, 0, missing), value=math.nan)
        part_lse = torch.nn.functional.pad(part_lse, (0, missing), value=math.nan)
    rows = part.view(problem.heads_kv, count, ratio, -1).transpose(0, 1)
    out[start : start + count] = rows.reshape(count, problem.heads_kv * ratio, -1).to(out.dtype)
    heads = part_lse.view(problem.heads_kv, count, ratio).transpose(1, 2)
    lse[:, start : start + count] = heads.reshape(-1, count)


# --- MLA decode


def mla_parts(max_seqlen_q: int, num_heads_q: int, num_heads_kv: int = 1) -> int:
    """How many parts the work of an MLA decode is cut into: one record of the plan each."""
    tiles = _ceil_div(max_seqlen_q * num_heads_q // num_heads_kv, MLA_QUERY_TILE)
    return max(MULTIPROCESSORS // num_heads_kv // max(tiles, 1), 1)


def mla_plan_bytes(batch: int, max_seqlen_q: int, num_heads_q: int, num_heads_kv: int = 1) -> int:
    """Bytes of workspace that the plan of one MLA geometry takes."""
    return 4 * (MLA_RECORD_INTS * mla_parts(max_seqlen_q, num_heads_q, num_heads_kv) + batch + 1)


def _mla_plan(key_counts: list[int], parts: int) -> list[int]:
    """Deal key blocks of all requests to the parts: the records, then the running count of splits."""
    blocks = [max(_ceil_div(count, KEY_TILE), 1) for count in key_counts]
    batch, payload = len(blocks), _ceil_div(sum(blocks) + MLA_OVERHEAD_BLOCKS * len(blocks), parts)
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
            else [index - 1, _ceil_div(key_counts[index - 1], KEY_TILE) if index else 0]
        )
        records += [*first, *end, first_split, 0, 0, 0]
    return records + counts


def _mla_pieces(plan: list[int], parts: int, key_counts: list[int]) -> list[list[range]]:
    """Decode a plan against the keys there are: per batch, the runs of key blocks that some part works on."""
    pieces: list[list[range]] = [[] for _ in key_counts]
    for part in range(parts):
        first, first_block, last, end_block = plan[
            part * MLA_RECORD_INTS : part * MLA_RECORD_INTS + 4
        ]
        for batch in range(max(first, 0), min(last + 1, len(key_counts))):
            start = first_block if batch == first else 0
            stop = end_block if batch == last else _ceil_div(key_counts[batch], KEY_TILE)
            pieces[batch].append(range(start, stop))
    return pieces


def _mla_pieces_fit(pieces: list[range], splits: int, keys: int) -> bool:
    """Whether the pieces are the splits that will be combined, and are all the keys, once and in order."""
    ends = [piece.stop for piece in pieces]
    starts = [piece.start for piece in pieces]
    return (
        len(pieces) == splits
        and starts == [0, *ends[:-1]]
        and ends[-1:] == [_ceil_div(keys, KEY_TILE)]
    )


def _mla_run(
    problem: _Problem, plan: list[int], parts: int, tiles: int, out: Tensor, lse: Tensor
) -> None:
    """Run an MLA decode as its plan says; a batch whose plan does not fit its keys stays NaN.

    A device would combine what the parts wrote with what nobody wrote; here nothing of that is passed on.
    """
    counts = plan[parts * MLA_RECORD_INTS :]
    for batch, pieces in enumerate(_mla_pieces(plan, parts, problem.key_counts)):
        keys = problem.key_counts[batch]
        q = problem.packed_queries(batch)[:, : tiles * MLA_QUERY_TILE]
        if not q.shape[1] or not _mla_pieces_fit(pieces, counts[batch + 1] - counts[batch], keys):
            continue
        results = [_partial(problem, batch, q, _tile_keys(piece, keys)) for piece in pieces]
        merged = _combine(
            torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
        )
        _store(problem, batch, *(results[0] if len(results) == 1 else merged), out, lse)


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
    _check_devices(q, {"workspace": workspace})
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


def _mla_decode(
    q: Tensor, qv: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None, page_table: Tensor | None,
    queries: _Queries, scale: float, causal: bool, metadata: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the output and its LSE; of 4-d queries the LSE is ``(batch, seqlen_q, heads)``, as in MATE."""
    if cache_seqlens is None or page_table is None:
        raise RefusedValue(
            "cache_seqlens and page_table", "not both given", "both for MLA", "Pass them."
        )
    k_cache, v_cache = (c.unsqueeze(2) if c.dim() == 3 else c for c in (k_cache, v_cache))
    _check_keys(k_cache, v_cache, q, 4)
    _check_mla(q, qv, k_cache, v_cache)
    batch, heads = len(queries.counts), q.shape[-2]
    _check_page_table(page_table, batch)
    parts = mla_parts(queries.longest, heads)
    needed = mla_plan_bytes(batch, queries.longest, heads)
    workspace, reuse = _mla_workspace(metadata, needed, q)
    keys = cache_seqlens.tolist()
    _check_capacity("cache_seqlens", keys, page_table.shape[1] * MLA_PAGE_SIZE)
    plan = workspace[:needed].view(torch.int32)
    if not reuse:
        plan.copy_(torch.tensor(_mla_plan(keys, parts), dtype=torch.int32))
    rule = resolve_mask(queries.longest, page_table.shape[1] * MLA_PAGE_SIZE, causal, None, 0)
    store = _LatentStore(k_cache, v_cache, page_table, list(range(batch)), [0] * batch)
    flat = torch.cat([q, qv], -1).reshape(-1, heads, MLA_ROPE_DIM + MLA_LATENT_DIM)
    problem = _Problem(
        flat, 1, MLA_LATENT_DIM, store, queries.starts, queries.counts, keys, rule, scale
    )
    out, lse = _unwritten(flat, MLA_LATENT_DIM)
    _mla_run(
        problem, plan.tolist(), parts, _ceil_div(queries.longest * heads, MLA_QUERY_TILE), out, lse
    )
    if q.dim() == 3:
        return out, lse
    return out.view(*q.shape[:-1], MLA_LATENT_DIM), lse.T.reshape(q.shape[:-1])


# --- What both public forwards share


@dataclass(frozen=True)
class _Queries:
    """Where each batch's query rows are in ``(total_q, heads, dim)``, and ``max_seqlen_q``."""

    starts: list[int]
    counts: list[int]
    longest: int


def _queries(
    q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, used: Tensor | None
) -> _Queries:
    if cu_seqlens_q is None:
        if q.dim() != 4:
            raise RefusedValue(
                "q.shape", tuple(q.shape), "(batch, seqlen_q, heads, dim)", "Or pass cu_seqlens_q."
            )
        batch, length = q.shape[:2]
        return _Queries([b * length for b in range(batch)], _listed(used, batch, length), length)
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
    _check_index_vectors({"cu_seqlens_q": cu_seqlens_q}, batch + 1)
    starts = cu_seqlens_q.tolist()
    if starts[-1] > q.shape[0] or sorted(starts) != starts or starts[0] < 0:
        raise RefusedValue(
            "cu_seqlens_q", starts, f"rising offsets up to {q.shape[0]}", "It must fit q."
        )
    counts = _lengths(cu_seqlens_q, batch, 0) if used is None else _listed(used, batch, 0)
    return _Queries(starts[:-1], counts, int(max_seqlen_q))


def _check_capacity(name: str, counts: list[int], capacity: int) -> None:
    if any(not 0 <= count <= capacity for count in counts):
        raise RefusedValue(
            name, counts, f"lengths within the capacity {capacity}", "Check the page table's width."
        )


def _unwritten(flat_q: Tensor, headdim_v: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and LSE buffers of NaN, or the caller's output as it is."""
    total, heads = flat_q.shape[:2]
    lse = flat_q.new_full((heads, total), math.nan, dtype=torch.float32)
    return flat_q.new_full((total, heads, headdim_v), math.nan) if out is None else out, lse


def _checked_out(out: Tensor | None, q: Tensor, headdim_v: int, queries: _Queries) -> Tensor | None:
    """The caller's buffer as ``(total_q, heads, dim)``, NaN where rows are due, its padding rows untouched."""
    if out is None:
        return None
    expected = (*q.shape[:-1], headdim_v)
    if tuple(out.shape) != expected or out.dtype != q.dtype or out.device != q.device:
        seen = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise RefusedValue(
            "out", seen, f"{expected} {q.dtype} on {q.device}", "Allocate it like q."
        )
    flat = out.flatten(0, 1) if out.dim() == 4 else out
    for start, count in zip(queries.starts, queries.counts, strict=True):
        flat[start : start + count] = math.nan
    return flat


def _forward(
    problem: _Problem, queries: _Queries, capacity: int, metadata: Tensor | None, num_splits: int,
    pack_gqa: bool | None, sm_margin: int, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, dim = len(queries.counts), problem.q.shape[1], problem.q.shape[2]
    tile = tile_shape(queries.longest, problem.ratio, dim, problem.headdim_v, pack_gqa)
    launched = _ceil_div(queries.longest * (problem.ratio if tile.packed else 1), tile.query)
    static = 1
    if metadata is not None:
        static = num_splits if num_splits > 0 else static_num_splits(
            tile, batch, queries.longest, capacity, heads, problem.heads_kv, dim, problem.headdim_v, problem.rule,
            MULTIPROCESSORS - sm_margin,
        )  # fmt: skip
    flat_out, lse = _unwritten(problem.q, problem.headdim_v, out)
    _run(problem, tile, _visits(metadata, batch, launched), static, flat_out, lse)
    return flat_out, lse


def _shaped_lse(lse: Tensor, q: Tensor) -> Tensor:
    """``(heads, total_q)`` as the kernels return it: ``(batch, heads, seqlen_q)`` of 4-d queries."""
    return (
        lse
        if q.dim() == 3
        else lse.view(q.shape[2], q.shape[0], q.shape[1]).transpose(0, 1).contiguous()
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
) -> Tensor | tuple[Tensor, ...]:
    """Attention over a KV cache, with MATE's interface.

    ``q``: ``(batch, seqlen_q, heads, dim)``, or ``(total_q, heads, dim)`` with int32 ``cu_seqlens_q``
    ``(batch + 1,)`` and ``max_seqlen_q``. ``k_cache``, ``v_cache``: ``(pages, page_size, heads_kv, dim)`` with
    a contiguous int32 ``page_table`` ``(batch, pages)``, else ``(batch, capacity, heads_kv, dim)``.
    ``cache_seqlens``: int32 ``(batch,)`` keys in use, ``None`` for all. ``k``, ``v``: new keys,
    ``(batch, new, heads_kv, dim)`` or ``(total_new, heads_kv, dim)`` with ``cu_seqlens_k_new``, written into the
    cache at ``cache_seqlens`` in place; without them ``cu_seqlens_k_new`` is ignored. Masks are aligned to the
    bottom right; -1 in ``window_size`` is unbounded. ``scheduler_metadata``: from
    :func:`get_scheduler_metadata`, or ``None`` for one split; ignored with ``sinks`` (also called ``s_aux``),
    ``(heads,)``, an extra logit in each row's denominator.

    With ``qv`` (MLA decode: q 64, qv and v 512, pages of 64, one key head) ``scheduler_metadata`` is
    ``(workspace, reuse)``: the plan is written into the uint8 workspace unless ``reuse`` says that it is there;
    windows, softcap, sinks and ``num_splits`` are ignored.

    Returns the output, like ``q`` with v's head dimension; with ``return_softmax_lse``
    ``(out, softmax_lse, *rest)``: natural logarithm, float32, ``(heads, total_q)`` or
    ``(batch, heads, seqlen_q)`` (MLA: ``(batch, seqlen_q, heads)``). ``rest`` are MATE's accumulators, of no
    splits here. A row that sees no key gives 0 and -inf (with sinks: the sink, if there are keys at all);
    rows beyond ``cu_seqlens_q[-1]`` are unwritten, hence NaN.
    """
    _refuse_set(dict(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_seqlens=rotary_seqlens))
    _refuse_set(dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale))
    _refuse_context_parallelism(cp_world_size, cp_rank)
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full(
            (k_cache.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device
        )
    sinks = sinks if sinks is not None else s_aux
    tensors = dict(k_cache=k_cache, v_cache=v_cache, k=k, v=v, qv=qv)
    _check_cache_strides(k_cache, v_cache)
    _check_dtypes(q, tensors)
    per_batch = dict(
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad
    )
    offsets = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new)
    _check_devices(q, {**tensors, **per_batch, **offsets, "page_table": page_table, "sinks": sinks})
    queries = _queries(q, cu_seqlens_q, max_seqlen_q, None)
    batch = len(queries.counts)
    _check_index_vectors({**per_batch}, batch)
    scale = softmax_scale
    if scale is None:
        scale = (q.shape[-1] + (qv.shape[-1] if qv is not None else 0)) ** -0.5
    if qv is not None:
        _refuse_set(dict(k=k, v=v, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad))
        out, lse = _mla_decode(
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
    _check_keys(k_cache, v_cache, q, 4)
    _check_sinks(sinks, q)
    store, keys, capacity = _cached_keys(k_cache, v_cache, page_table, batch, *per_batch.values())
    keys = _append(store, keys, capacity, k, v, cu_seqlens_k_new, cache_seqlens)
    rule = resolve_mask(queries.longest, capacity, causal, window_size, attention_chunk or 0)
    heads_kv, headdim_v = k_cache.shape[2], v_cache.shape[3]
    _head_ratio(q.shape[-2], heads_kv)
    metadata = _check_metadata(scheduler_metadata, batch) if sinks is None else None
    flat = q.reshape(-1, *q.shape[-2:])
    problem = _Problem(
        flat,
        heads_kv,
        headdim_v,
        store,
        queries.starts,
        queries.counts,
        keys,
        rule,
        scale,
        softcap,
        sinks,
    )
    out, lse = _forward(problem, queries, capacity, metadata, num_splits, pack_gqa, sm_margin)
    out = out.view(*q.shape[:-1], headdim_v)
    no_splits = lse.new_empty((1, lse.shape[0], 0, lse.shape[1]))
    rest = no_splits[..., None].expand(-1, -1, -1, -1, headdim_v), no_splits
    return (out, _shaped_lse(lse, q), *rest) if return_softmax_lse else out


def _cached_keys(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None, batch: int, cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None,
) -> tuple[_KeyStore, list[int], int]:  # fmt: skip
    """The store, each batch's key count past its left padding, and the capacity in keys of one batch."""
    _check_page_table(page_table, batch if cache_batch_idx is None else None)
    rows_held = k_cache.shape[0] if page_table is None else page_table.shape[0]
    if cache_batch_idx is None and rows_held != batch:
        raise RefusedValue(
            "k_cache.shape[0]", rows_held, f"the batch of {batch}", "Or pass cache_batch_idx."
        )
    capacity = k_cache.shape[1] if page_table is None else page_table.shape[1] * k_cache.shape[1]
    used = _listed(cache_seqlens, batch, capacity)
    _check_capacity("cache_seqlens", used, capacity)
    pads = _listed(cache_leftpad, batch, 0)
    rows = list(range(batch)) if cache_batch_idx is None else cache_batch_idx.tolist()
    store = _KeyStore(k_cache, v_cache, page_table, rows, pads)
    return store, [count - pad for count, pad in zip(used, pads, strict=True)], capacity


def _append(
    store: _KeyStore, keys: list[int], capacity: int, k: Tensor | None, v: Tensor | None,
    cu_seqlens_k_new: Tensor | None, cache_seqlens: Tensor | None,
) -> list[int]:  # fmt: skip
    """Write new keys behind the cached ones, in place; returns the key counts with them."""
    if cu_seqlens_k_new is not None:
        _check_index_vectors({"cu_seqlens_k_new": cu_seqlens_k_new}, len(keys) + 1)
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
    counts = _lengths(cu_seqlens_k_new, batch, k.shape[1])
    total = [old + new for old, new in zip(keys, counts, strict=True)]
    ends = [count + pad for count, pad in zip(total, store.offsets, strict=True)]
    _check_capacity("cache_seqlens with the new keys", ends, capacity)
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
) -> Tensor | tuple[Tensor, ...]:
    """Attention of ragged queries over ragged, dense or paged keys, with MATE's interface.

    ``k``, ``v``: ``(total_k, heads_kv, dim)`` with int32 ``cu_seqlens_k`` ``(batch + 1,)``, or
    ``(batch, seqlen_k, heads_kv, dim)``, or pages with ``page_table`` (also called ``block_table``) and
    ``seqused_k`` ``(batch,)``. ``seqused_q``: rows in use of each batch. ``out``: like ``q`` with v's head
    dimension, written in place and returned; its padding rows stay as they are. All else as in
    :func:`flash_attn_with_kvcache`, but without ``qv``. Returns ``out``, or ``(out, softmax_lse)`` with
    ``return_softmax_lse`` or ``return_attn_probs``.
    """
    _refuse_set(dict(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale))
    _refuse_context_parallelism(cp_world_size, cp_rank)
    sinks = sinks if sinks is not None else s_aux
    table = page_table if page_table is not None else block_table
    _check_dtypes(q, dict(k=k, v=v))
    indices = dict(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
    )
    _check_devices(q, {**indices, "k": k, "v": v, "page_table": table, "sinks": sinks})
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    _check_index_vectors(dict(seqused_q=seqused_q, seqused_k=seqused_k), batch)
    queries = _queries(q, cu_seqlens_q, max_seqlen_q, seqused_q)
    _check_keys(k, v, q, 4 if cu_seqlens_k is None else 3)
    _check_sinks(sinks, q)
    store, keys, span, capacity = _varlen_keys(
        k, v, cu_seqlens_k, max_seqlen_k, seqused_k, table, batch
    )
    rule = resolve_mask(queries.longest, span, causal, window_size, attention_chunk or 0)
    heads_kv, headdim_v = k.shape[-2], v.shape[-1]
    _head_ratio(q.shape[-2], heads_kv)
    metadata = _check_metadata(scheduler_metadata, batch) if sinks is None else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    flat, flat_out = q.reshape(-1, *q.shape[-2:]), _checked_out(out, q, headdim_v, queries)
    problem = _Problem(
        flat,
        heads_kv,
        headdim_v,
        store,
        queries.starts,
        queries.counts,
        keys,
        rule,
        scale,
        softcap,
        sinks,
    )
    written, lse = _forward(
        problem, queries, capacity, metadata, num_splits, pack_gqa, sm_margin, flat_out
    )
    result = written.view(*q.shape[:-1], headdim_v) if out is None else out
    return (result, _shaped_lse(lse, q)) if return_softmax_lse or return_attn_probs else result


def _varlen_keys(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor | None, max_seqlen_k: int | None, seqused_k: Tensor | None,
    page_table: Tensor | None, batch: int,
) -> tuple[_KeyStore, list[int], int, int]:  # fmt: skip
    """The store, key counts, the length that bounds windows, and the capacity that bounds splits."""
    if cu_seqlens_k is None:
        store, keys, capacity = _cached_keys(k, v, page_table, batch, seqused_k, None, None)
        return store, keys, capacity, capacity
    if page_table is not None:
        raise RefusedValue(
            "page_table", "given with cu_seqlens_k", "one of the two", "Pages go with seqused_k."
        )
    if max_seqlen_k is None:
        raise RefusedValue("max_seqlen_k", None, "a number", "cu_seqlens_k needs it.")
    _check_index_vectors({"cu_seqlens_k": cu_seqlens_k}, batch + 1)
    starts = cu_seqlens_k.tolist()
    if starts[-1] > k.shape[0] or sorted(starts) != starts or starts[0] < 0:
        raise RefusedValue(
            "cu_seqlens_k", starts, f"rising offsets up to {k.shape[0]}", "It must fit k."
        )
    keys = _lengths(cu_seqlens_k, batch, 0) if seqused_k is None else _listed(seqused_k, batch, 0)
    return (
        _KeyStore(k, v, None, list(range(batch)), starts[:-1]),
        keys,
        k.shape[0],
        int(max_seqlen_k),
    )
