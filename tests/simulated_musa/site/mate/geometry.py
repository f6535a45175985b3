"""The division of work: query tiles, key tiles of 64, splits of the keys; and its plan.

A plan has four vectors of one value a request, in the order in which requests are worked on
(longest first): splits of the keys, the request, its query tiles, heads that share the cache (a
constant here).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mate._release import RELEASE

KEY_TILE = 64
MULTIPROCESSORS = 56
MOST_SPLITS = 128
PLANS = "SIMULATED_MATE_PLANS"
"""Set to ``exact``, has kernels refuse another plan than that of their call, where a GPU goes on:
with fewer splits it is only slower, and no output shows it.
"""
_FIELDS = 4
_PAIRS = [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (384, 384), (512, 512)]


@dataclass(frozen=True)
class Geometry:
    """The values that a plan depends on besides the lengths."""

    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    heads: int
    heads_kv: int
    headdim: int
    headdim_v: int
    causal: bool
    window: tuple[int, int]
    attention_chunk: int
    num_splits: int
    pack_gqa: bool | None

    @property
    def ratio(self) -> int:
        """Query heads that are packed into the rows of one tile."""
        ratio = self.heads // self.heads_kv
        packed = self.max_seqlen_q * ratio <= 256 if self.pack_gqa is None else self.pack_gqa
        return ratio if packed else 1

    @property
    def query_tile(self) -> int:
        """Rows of a query tile."""
        rows = self.max_seqlen_q * self.ratio
        few = rows <= 256
        if self.headdim > 192:
            return {256: 32 if few else 192, 384: 64, 512: 32}[_bucket(self.headdim)]
        return next((tile for tile in (32, 64, 128, 192) if rows <= tile), 256)

    def query_tiles(self, seqlen_q: int) -> int:
        """Tiles of a request's queries."""
        return -(-seqlen_q * self.ratio // self.query_tile)

    @property
    def splits(self) -> int:
        """The most splits of a request: what is launched, and what there are accumulators for."""
        keys = self.max_seqlen_k
        if RELEASE != (
            0,
            2,
            1,
        ):  # The release whose plans do not know that a window needs fewer keys.
            keys = min(keys, self._most_keys_in_sight())
        tiles = -(-keys // KEY_TILE)
        if tiles <= 4:
            return 1
        if self.num_splits > 0:
            return min(self.num_splits, MOST_SPLITS)
        units = self.query_tiles(self.max_seqlen_q) * self.batch * (self.heads // self.ratio)
        return max(1, min(MULTIPROCESSORS // max(units, 1), tiles, MOST_SPLITS))

    def _most_keys_in_sight(self) -> int:
        left, right = self.window
        right = 0 if self.causal else right
        sight = self.max_seqlen_k
        if left >= 0 and right >= 0:
            sight = left + right + self.query_tile + KEY_TILE
        if self.attention_chunk > 0:
            sight = min(sight, self.attention_chunk + self.query_tile)
        return sight

    def tiles_a_split(self) -> int:
        """Key tiles that one split reads."""
        tiles = -(-self.max_seqlen_k // KEY_TILE)
        return -(-tiles // self.splits)


def _bucket(headdim: int) -> int:
    return next(size for size in (64, 128, 192, 256, 384, 512) if headdim <= size)


def require_headdims(headdim: int, headdim_v: int) -> None:
    """Refuse head dims that no kernel is made for."""
    supported = [pair for pair in _PAIRS if pair != (192, 192) or RELEASE >= (0, 2, 0)]
    rounded = (_bucket(headdim), _bucket(headdim_v)) if max(headdim, headdim_v) <= 512 else None
    if rounded not in supported:
        raise AssertionError(f"Add config for headdim {headdim}, headdim_v {headdim_v}")


def plan_length(batch: int) -> int:
    """Return the length of a plan."""
    return _FIELDS * (-(-batch // 4) * 4 if RELEASE >= (0, 2, 4) else batch)


def write_plan(
    plan: torch.Tensor, geometry: Geometry, lengths_q: list[int], lengths_k: list[int]
) -> None:
    """Write the plan of these requests to ``plan``; what pads its vectors stays as it is."""
    vectors = plan.view(_FIELDS, -1)
    splits = []
    for length in lengths_k:
        tiles = -(-length // KEY_TILE)
        wanted = -(-tiles // geometry.tiles_a_split())
        splits.append(max(1, min(wanted, geometry.splits)))
    order = sorted(range(geometry.batch), key=lambda request: -lengths_k[request])
    for place, request in enumerate(order):
        vectors[0, place] = splits[request]
        vectors[1, place] = request
        vectors[2, place] = geometry.query_tiles(lengths_q[request])
        vectors[3, place] = 1


def require_exact(has: object, needs: object) -> None:
    """Refuse what a plan ``has`` unless it is what the lengths of its call need.

    Raises:
        RuntimeError: this process asks for exact plans, and it is not.
    """
    if has != needs and os.environ.get(PLANS) == "exact":
        raise RuntimeError(f"simulated MATE: a plan is not that of its call: {has}, not {needs}")


def read_plan(plan: torch.Tensor, batch: int) -> list[tuple[int, int, int]]:
    """Return request, splits and query tiles of each piece of work.

    A GPU would read past what it has been given, or what was never written; here that raises.
    """
    if plan.dtype != torch.int32 or plan.numel() != plan_length(batch):
        raise RuntimeError(
            f"MUSA error: an illegal memory access (plan of {plan.numel()} values, batch {batch})"
        )
    vectors = plan.view(_FIELDS, -1)[:, :batch].tolist()
    work = list(zip(vectors[1], vectors[0], vectors[2], strict=True))
    if any(not 0 <= request < batch for request, *_ in work):
        raise RuntimeError(
            "MUSA error: an illegal memory access (a plan names a request that is not there)"
        )
    return work
