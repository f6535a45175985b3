"""Attention of one sequence, row by row from its definition: the truth that kernels are compared with.

It shares nothing with the package. In float64 it is the truth; in another dtype it is PyTorch's own plain
computation there, whose error says how much error is fair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_keys(
    row: int, rows: int, keys: int, causal: bool, window: tuple[int, int] = (-1, -1), chunk: int = 0
) -> list[int]:
    """The keys that query ``row`` of ``rows`` sees; the last row is aligned with the last key."""
    own = row + keys - rows
    seen = []
    for key in range(keys):
        beyond_causal = causal and key > own
        beyond_left = window[0] >= 0 and key < own - window[0]
        beyond_right = window[1] >= 0 and key > own + window[1]
        other_chunk = chunk > 0 and math.floor(key / chunk) != math.floor(own / chunk)
        if not (beyond_causal or beyond_left or beyond_right or other_chunk):
            seen.append(key)
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output ``(rows, heads, dim_v)`` and natural log-sum-exp ``(heads, rows)`` in ``dtype``.

    ``q`` is ``(rows, heads, dim)``, ``k`` and ``v`` ``(keys, heads_kv, dim)``, ``sinks`` ``(heads,)``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, heads = q.shape[:2]
    group = heads // k.shape[1]
    out = torch.zeros(rows, heads, v.shape[-1], dtype=dtype)
    lse = torch.full((heads, rows), -math.inf, dtype=dtype)
    for row in range(rows):
        seen = visible_keys(row, rows, k.shape[0], causal, window, chunk)
        if not seen:
            if sinks is not None and k.shape[0]:
                lse[:, row] = sinks.to(dtype)
            continue
        for head in range(heads):
            logits = (k[seen, head // group].to(dtype) @ q[row, head].to(dtype)) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].to(dtype)])
            weights = torch.softmax(logits, dim=0)[: len(seen)]
            out[row, head] = weights @ v[seen, head // group].to(dtype)
            lse[head, row] = torch.logsumexp(logits, dim=0)
    return out, lse
