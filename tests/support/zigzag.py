"""Upstream's context parallelism without other ranks: a rank's two pieces of a prompt.

Gathering keys and values from the other ranks is left out: the test hands out all of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.support.backend import Queries, Step, upstream

HAS_STRATEGIES = hasattr(upstream, "get_cp_strategy")
"""True if this SGLang has context parallelism for MLA in this backend, too."""


def metadata(piece: int, ends: tuple[int, int]) -> Any:
    """What upstream says of a pass to a rank: two pieces, and where in the prompt each ends."""
    offsets = [torch.tensor([0, piece], dtype=torch.int32) for _ in ends]
    lengths = [torch.tensor([end], dtype=torch.int32) for end in ends]
    return SimpleNamespace(
        total_q_prev_tokens=piece, total_q_next_tokens=piece, actual_seq_q_prev=piece,
        actual_seq_q_next=piece,
        cu_seqlens_q_prev_tensor=offsets[0], cu_seqlens_q_next_tensor=offsets[1],
        kv_len_prev_tensor=lengths[0], kv_len_next_tensor=lengths[1],
        max_seqlen_q_prev=piece, max_seqlen_q_next=piece,
    )  # fmt: skip


def take_part(step: Step, piece: int, rank: int) -> None:
    """Make a step of one request, whose last ``4 * piece`` tokens are new, that of a rank of 2."""
    queries: Queries = step.queries[0]
    start = len(queries.slots) - 4 * piece
    first, last = start + rank * piece, start + (3 - rank) * piece
    queries.positions = torch.cat([torch.arange(at, at + piece) for at in (first, last)])
    step.batch.attn_cp_metadata = metadata(piece, (first + piece, last + piece))


def stand_ins() -> dict[str, Any]:
    """What stands for names of upstream's module, and serves passes without ranks as before."""
    if not HAS_STRATEGIES:
        return {"cp_allgather_and_save_kv_cache": _store}
    from sglang.srt.layers.cp.zigzag import ZigzagCPStrategy

    strategy = ZigzagCPStrategy(2)
    strategy.materialize_full_kv = _store
    strategy.materialize_full_mla_kv = _store_latent
    names = ("is_cp_active", "is_cp_v2_active")
    active = {name: _is_active for name in names if hasattr(upstream, name)}
    return {**active, "get_cp_strategy": lambda: strategy}


def _is_active(batch: Any) -> bool:
    return getattr(batch, "attn_cp_metadata", None) is not None


def _store(batch: Any, layer: Any, k: Any, v: Any, *_: Any, **__: Any) -> None:
    batch.token_to_kv_pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)


def _store_latent(batch: Any, layer: Any, k: Any, k_rope: Any) -> None:
    batch.token_to_kv_pool.set_mla_kv_buffer(layer, batch.out_cache_loc, k, k_rope)
