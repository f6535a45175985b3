"""Attention of one sequence, densely, by its definition: the reference for the kernels.

It shares nothing with the package. In float64 it is exact; in another dtype it is PyTorch's own
plain computation there, whose error says how much error is fair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_keys(
    rows: int, keys: int, causal: bool, window: tuple[int, int] = (-1, -1), chunk: int = 0
) -> Tensor:
    """Return the keys that rows see, bool ``(rows, keys)``; the last row is at the last key."""
    own = torch.arange(keys - rows, keys).reshape(rows, 1)
    key = torch.arange(keys).reshape(1, keys)
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    if causal:
        hidden |= key > own
    if window[0] >= 0:
        hidden |= own - key > window[0]
    if window[1] >= 0:
        hidden |= key - own > window[1]
    if chunk:
        hidden |= (key / chunk).floor() != (own / chunk).floor()
    return ~hidden


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
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``(rows, heads, dim_v)`` and natural log-sum-exp ``(heads, rows)`` in ``dtype``.

    ``q`` is ``(rows, heads, dim)``, ``k`` and ``v`` ``(keys, heads_kv, dim)``, ``sinks``
    ``(heads,)``. A row that sees nothing has output 0 and LSE -inf, or its sink where there are
    keys at all. ``weights_dtype`` is what the exponentials of the scores, at most 1, are rounded to
    before they multiply the values, as kernels that read fp8 do.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (rows, heads, dim), (keys, heads_kv) = q.shape, k.shape[:2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # The g query heads that share a key head n are beside one another.
    q = q.reshape(rows, heads_kv, heads // heads_kv, dim)
    logits = torch.einsum("qngd,knd->ngqk", q, k).reshape(heads, rows, keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.where(visible_keys(rows, keys, causal, window, chunk), -math.inf)
    if sinks is not None and keys:
        logits = torch.cat(
            [logits, sinks.to(dtype).reshape(heads, 1, 1).expand(heads, rows, 1)], dim=-1
        )
    # The softmax of nothing at all is 0 / 0; such a row takes nothing of any value.
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)[..., :keys]
    if weights_dtype is not None and keys:
        largest = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        weights = (weights / largest).to(weights_dtype).to(dtype) * largest
    weights = weights.reshape(heads_kv, heads // heads_kv, rows, keys)
    output = torch.einsum("ngqk,knd->qngd", weights, v).reshape(rows, heads, v.shape[-1])
    return output, torch.logsumexp(logits, dim=-1)
