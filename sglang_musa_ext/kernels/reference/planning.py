"""Tiles, masks, splits and scheduler metadata: all that metadata and forward derive alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_musa_ext import policy
from sglang_musa_ext.kernels.reference.refusals import (
    check_index_vectors,
    check_release,
    head_ratio,
)

MULTIPROCESSORS = 56
"""Multiprocessors that the reference claims to have; splits and MLA parts depend on it."""


KEY_TILE = 64


MAX_SPLITS = 128


_L2_BYTES = 3 * 512 * 1024


_PACKED_ROWS_LIMIT = (
    256  # above this many query rows a key head, heads are no longer packed into tiles
)


_METADATA_GROUP = 31 * 32  # batches that one thread block sorts; splits are off beyond it


@dataclass(frozen=True)
class TileShape:
    """Rows and keys of a tile; ``packed`` puts one key head's query heads into the same tile."""

    query: int
    key: int
    packed: bool


@dataclass(frozen=True)
class MaskRule:
    """The rule of which keys a row sees, from its key position, aligned to the bottom right.

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
    """Return the tile that metadata and forward derive, each for itself, from the same numbers."""
    pair = policy.rounded_head_dims(headdim, headdim_v)
    packed = max_seqlen_q * head_ratio <= _PACKED_ROWS_LIMIT if pack_gqa is None else bool(pack_gqa)
    fixed = {256: 32 if packed else 192, 384: 64, 512: 32}
    rows = max_seqlen_q * head_ratio if packed else max_seqlen_q
    by_rows = next((size for size in (32, 64, 128, 192) if rows <= size), 256)
    return TileShape(fixed.get(pair[0], by_rows), KEY_TILE, packed)


def resolve_mask(
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_size: Sequence[int | None] | None,
    chunk: int,
) -> MaskRule:
    """Turn FA3's mask arguments into one rule, without bounds that these lengths never reach."""
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
    tile: TileShape,
    batch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_q: int,
    heads_kv: int,
    headdim: int,
    headdim_v: int,
    rule: MaskRule,
    multiprocessors: int = MULTIPROCESSORS,
) -> int:
    """Return how many splits are launched when the caller leaves it open."""
    keys = (
        min(max_seqlen_k, rule.left + rule.right + 1 + tile.query) if rule.local else max_seqlen_k
    )
    key_tiles = ceil_div(max(keys, 0), tile.key)
    query_tiles = ceil_div(max_seqlen_q * (heads_q // heads_kv), tile.query)
    total = batch * heads_kv * query_tiles
    if total >= 0.8 * multiprocessors:
        head_bytes = max_seqlen_k * (headdim + headdim_v) * 2
        revisited = query_tiles >= 2 * multiprocessors and not (rule.causal or rule.local)
        return (
            min(ceil_div(head_bytes, _L2_BYTES), MAX_SPLITS)
            if head_bytes > _L2_BYTES and revisited
            else 1
        )
    if key_tiles <= 4:
        return 1
    counts = range(1, min(MAX_SPLITS, multiprocessors, key_tiles) + 1)
    waves = [total * count / multiprocessors for count in counts]
    efficiency = [wave / math.ceil(wave) if wave else 0.0 for wave in waves]
    return next(
        n for n, value in zip(counts, efficiency, strict=True) if value >= 0.85 * max(efficiency)
    )


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
    release: policy.MateRelease = policy.NEWEST_MATE,
) -> Tensor:
    """Plan one forward as a release of MATE does.

    ``qkv_dtype``, ``page_size`` and ``has_softcap`` do not matter, as in MATE up to 0.2.4.
    ``cache_seqlens`` and ``cache_leftpad`` are ``(batch,)``, ``cu_seqlens_q`` and
    ``cu_seqlens_k_new`` ``(batch + 1,)``, all int32 and contiguous; ``cache_seqlens`` of ``None``
    means ``max_seqlen_k`` each, and ``cu_seqlens_k_new`` *adds* its lengths. ``max_seqlen_k`` must
    be the capacity the forward will see (``page_table.shape[1] * page_size``).

    Returns int32 beside ``cache_seqlens``, four vectors that are ordered by position:
    ``num_splits_dynamic``, ``batch_table`` (position to batch, most work first), ``num_m_blocks``
    (query tiles) and ``num_nheads_in_l2``. Each is ``(batch,)``, from MATE 0.2.4 on ``(batch``
    rounded up to ``4,)`` with whatever the memory held behind the batch.
    """
    headdim_v = headdim if headdim_v is None else headdim_v
    ratio = head_ratio(num_heads_q, num_heads_kv)
    vectors = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new}
    check_index_vectors({**vectors}, batch_size + 1)
    check_index_vectors(
        {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad}, batch_size
    )
    check_release(release, batch_size, headdim, headdim_v, {})
    rule = resolve_mask(max_seqlen_q, max_seqlen_k, causal, window_size, attention_chunk)
    tile = tile_shape(max_seqlen_q, ratio, headdim, headdim_v, pack_gqa)
    static = (
        num_splits
        if num_splits > 0
        else static_num_splits(
            tile,
            batch_size,
            max_seqlen_q,
            max_seqlen_k,
            num_heads_q,
            num_heads_kv,
            headdim,
            headdim_v,
            rule,
            MULTIPROCESSORS - sm_margin,
        )
    )
    rows = lengths(cu_seqlens_q, batch_size, max_seqlen_q)
    keys = as_list(cache_seqlens, batch_size, max_seqlen_k)
    new = lengths(cu_seqlens_k_new, batch_size, max_seqlen_k_new)
    pads = as_list(cache_leftpad, batch_size, 0)
    query_tiles = [ceil_div(count * (ratio if tile.packed else 1), tile.query) for count in rows]
    key_tiles = [
        _planned_key_tiles(k + n - pad, tile, rule)
        for k, n, pad in zip(keys, new, pads, strict=True)
    ]
    heads = num_heads_kv if tile.packed else num_heads_q
    plan = _plan(query_tiles, key_tiles, static, heads, tile, rule.causal)
    nheads = [
        _heads_in_l2(n, headdim + headdim_v, heads, 1 if tile.packed else ratio) for *_, n in plan
    ]

    def column(index: int) -> list[int]:
        return [entry[index] for entry in plan]

    columns = [column(0), column(1), column(2), nheads]
    device = next(
        (t.device for t in (cache_seqlens, cu_seqlens_q) if t is not None), torch.device("cpu")
    )
    contents = torch.tensor(columns, dtype=torch.int32, device=device)
    padding = policy.mate_plan_vector(release, batch_size) - batch_size
    # Another at every call: what a device's memory held before is not ours to know.
    return torch.nn.functional.pad(contents, (0, padding), value=next(_GARBAGE)).flatten()


_GARBAGE = itertools.count(-(2**30))


def _planned_key_tiles(keys: int, tile: TileShape, rule: MaskRule) -> int:
    loaded = min(keys, rule.left + rule.right + 1 + tile.query) if rule.local else keys
    return ceil_div(max(loaded, 0), tile.key)


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
    shares = [ceil_div(n, s) for n, s in zip(key_tiles, splits, strict=True)]

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
    splits = [max(min(ceil_div(n, per_multiprocessor), static), 1) for n in key_tiles]
    _shed_splits(splits, key_tiles, sum(splits) - MULTIPROCESSORS)
    return splits


def _shed_splits(splits: list[int], key_tiles: list[int], overflow: int) -> None:
    """Take splits back in place, cheapest requests first, until they fit the multiprocessors."""
    while overflow > 0:
        costs = [
            (ceil_div(n, s - 1) - ceil_div(n, s), batch)
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


def launched_splits(
    *,
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    headdim_v: int | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int = 0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    multiprocessors: int = MULTIPROCESSORS,
    caps_windows: bool = True,
    **unused: object,
) -> int:
    """Return how many splits a call launches, from the keywords of :func:`get_scheduler_metadata`.

    Args:
        multiprocessors: of the device.
        caps_windows: whether keys beyond a window are left out of the count: from MATE 0.2.1 on.
        unused: keywords that make no difference.
    """
    if num_splits > 0:
        return num_splits
    headdim_v = headdim if headdim_v is None else headdim_v
    tile = tile_shape(
        max_seqlen_q, head_ratio(num_heads_q, num_heads_kv), headdim, headdim_v, pack_gqa
    )
    rule = resolve_mask(max_seqlen_q, max_seqlen_k, causal, window_size, attention_chunk)
    if rule.local and not caps_windows:
        rule = replace(rule, left=max_seqlen_k, right=max_seqlen_q)
    return static_num_splits(
        tile,
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        headdim_v,
        rule,
        multiprocessors - sm_margin,
    )


def ceil_div(a: int, b: int) -> int:
    """Divide, and round up."""
    return -(-a // b)


def as_list(values: Tensor | None, batch: int, default: int) -> list[int]:
    """List the values of a vector; ``None`` stands for ``default`` each."""
    return [default] * batch if values is None else [int(value) for value in values.tolist()]


def lengths(cumulative: Tensor | None, batch: int, default: int) -> list[int]:
    """List the differences of ``cu_seqlens``; ``None`` stands for ``default`` each."""
    if cumulative is None:
        return [default] * batch
    ends = cumulative.tolist()
    return [end - start for start, end in itertools.pairwise(ends)]
