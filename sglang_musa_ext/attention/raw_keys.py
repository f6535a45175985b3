"""Prefill over a layer's own keys and values, where the paged cache holds nothing else.

A prompt without a prefix attends to the keys that its layers have just computed. Upstream writes
them to the paged cache and reads them back from there; FA3's ``flash_attn_varlen_func`` reads them
as they are, which is faster, on MATE above all. The cache is written as before.

Nor are the queries copied: a model's are often a slice of one projection's output, upstream makes a
copy in one piece of them for every call, and kernels read them by their strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_musa_ext.attention.calls import Arguments, OwnKeys
from sglang_musa_ext.kernels.record import FA3Kernels

_SAME = (
    "q", "cu_seqlens_q", "max_seqlen_q", "softmax_scale", "causal", "window_size", "softcap",
    "return_softmax_lse", "sinks", "out", "ver",
)  # fmt: skip
"""Arguments that both functions have, with the same meaning."""
_OF_THE_CACHE = (
    "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_k_new", "scheduler_metadata",
    "num_splits",
)  # fmt: skip
"""Arguments that say where the keys are and how a read of the cache is split."""


class UncopiedQueries:
    """A layer's queries, whose copy in one piece is left out until something is known to need it.

    It stands for a slice ``(tokens, heads * head_dim)`` in upstream's forward. Asked for a copy in
    one piece, it is one, and its view is the slice's. All else that the forward does with queries,
    which the contract with SGLang lists, is done with the slice.
    """

    __slots__ = ("_slice",)

    def __init__(self, q: torch.Tensor) -> None:
        self._slice = q

    def contiguous(self) -> UncopiedQueries:
        """Make no copy."""
        return self

    def view(self, *shape: int) -> torch.Tensor:
        """Return a view of the slice, which is in as many pieces."""
        return self._slice.view(*shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)


def uncopied(q: torch.Tensor) -> Any:
    """Return what upstream's forward is to take for ``q``, so that it makes no copy of it."""
    # A kernel reads queries by the strides of rows and heads, and elements must follow each other.
    if q.ndim != 2 or q.is_contiguous() or q.stride(1) != 1:
        return q
    return UncopiedQueries(q)


def new_rows(forward_batch: Any) -> int | None:
    """Return the number of tokens of a prefill whose requests have no prefix, else ``None``.

    Verifying and extending drafts are other modes, as is a batch that mixes prefill and decode.
    """
    prefixes = forward_batch.extend_prefix_lens_cpu
    lengths = forward_batch.extend_seq_lens_cpu
    if forward_batch.forward_mode != ForwardMode.EXTEND or prefixes is None or lengths is None:
        return None
    return None if any(prefixes) else int(sum(lengths))


def raw_arguments(
    arguments: Mapping[str, Any], own_keys: OwnKeys, metadata: Any, kernels: FA3Kernels | None
) -> Arguments | None:
    """Return the arguments of ``flash_attn_varlen_func`` that stand for a call over a paged cache.

    Args:
        arguments: of the ``flash_attn_with_kvcache`` call.
        own_keys: the layer's keys and values ``(tokens, ...)``, which the cache holds and nothing
            else.
        metadata: upstream's, of the pass.
        kernels: that would serve it; ``None``: a call with these names and options was served.

    Returns:
        ``None`` where the call attends to something else than these keys, or where the kernels have
        no such function for it.
    """
    if not attends_to_the_batch(arguments, metadata):
        return None
    k, v = own_keys
    dtypes = {tensor.dtype for tensor in (k, v, arguments["q"])}
    if dtypes != {arguments["k_cache"].dtype} or dtypes != {arguments["v_cache"].dtype}:
        return None
    raw = over_raw_keys(arguments, k, v)
    if kernels is not None and not (_asks_for_no_more(arguments) and _serves(kernels, raw)):
        return None
    return raw


def _serves(kernels: FA3Kernels, raw: Mapping[str, Any]) -> bool:
    """Tell whether the kernels have a function over raw keys for such a call."""
    return kernels.serves_raw_keys(
        dtype=raw["q"].dtype,
        headdim=raw["k"].shape[-1],
        headdim_v=raw["v"].shape[-1],
        window_size=raw.get("window_size") or (-1, -1),
        softcap=raw.get("softcap") or 0.0,
        attention_chunk=0,
        has_sinks=raw.get("sinks") is not None,
    )


def over_raw_keys(arguments: Mapping[str, Any], k: torch.Tensor, v: torch.Tensor) -> Arguments:
    """Return the arguments of a call over ``k`` and ``v`` in place of the cache that has them."""
    raw = {name: arguments[name] for name in _SAME if name in arguments}
    raw["k"] = k if k.ndim == 3 else k.view(-1, *arguments["k_cache"].shape[2:])
    raw["v"] = v if v.ndim == 3 else v.view(-1, *arguments["v_cache"].shape[2:])
    raw["cu_seqlens_k"] = arguments["cu_seqlens_q"]
    raw["max_seqlen_k"] = arguments["max_seqlen_q"]
    return raw


def attends_to_the_batch(arguments: Mapping[str, Any], metadata: Any) -> bool:
    """Tell whether a call's queries and keys are the whole batch's.

    Chunked-local layers, context-parallel ranks and cross attention have lengths of their own.
    """
    return (
        arguments.get("cu_seqlens_q") is metadata.cu_seqlens_q
        and arguments.get("cache_seqlens") is metadata.cache_seqlens_int32
    )


def _asks_for_no_more(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a call has nothing beside what the other function does alike.

    A number of splits that is set asks for one and the same order of sums (deterministic
    inference), whether there is a prefix or not.
    """
    if arguments.get("num_splits", 0) != 0:
        return False
    others = set(arguments).difference(_SAME, _OF_THE_CACHE)
    return all(arguments[name] is None or arguments[name] is False for name in others)
