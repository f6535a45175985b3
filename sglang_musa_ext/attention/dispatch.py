"""Upstream's kernel names, which lead to the backend whose layer runs on this thread.

Upstream's forwards call FA3 through names of their module. A function stands under each of them:
while a layer of our backend runs, the call is that backend's, otherwise the original's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sglang.srt.layers.attention import flashattention_backend as upstream

from sglang_musa_ext import patching
from sglang_musa_ext.attention.calls import (
    ABSENT,
    VARLEN_OPTIONS,
    VARLEN_TENSORS,
    KnownCall,
    KnownVarlenCall,
)
from sglang_musa_ext.upstream.names import KERNEL_PARAMETERS


class Backend(Protocol):
    """A handler of calls."""

    own_keys: Any
    """Keys and values of the running layer, where a call may be served from them."""

    def begin_call(self) -> Sequence[KnownCall]:
        """Note a call over a paged KV cache, and return those that it may be like."""

    def known_before(self, *call: Any) -> KnownCall | None:
        """Return a call of a pass that is over that this one is like, made one of this pass."""

    def call_unlike_others(self, arguments: dict[str, Any]) -> Any:
        """Serve a call over a paged KV cache that :meth:`begin_call` has noted."""

    def known_varlen(self) -> Sequence[KnownVarlenCall]:
        """Return the calls over raw keys and values of this pass that one may be like."""

    def varlen_known_before(self, *call: Any) -> KnownVarlenCall | None:
        """Return a call of a pass that is over that this one is like, made one of this pass."""

    def call_flash_attn_varlen_func(self, arguments: dict[str, Any]) -> Any:
        """Serve attention over raw keys and values."""


class _RunningLayers(threading.local):
    """The backends whose layers run on this thread, innermost last.

    Per thread, so that two engines in two threads do not meet. A ``ContextVar`` would do the same,
    but Dynamo cannot trace one (checked on torch 2.13), and upstream traces its models under
    ``--enable-torch-compile``.
    """

    def __init__(self) -> None:
        self.stack: list[Backend] = []


RUNNING = _RunningLayers()


def install_kernel_dispatch() -> Callable[[], None]:
    """Put a dispatcher under each kernel name of upstream's module.

    Names that have one already are left alone.

    Returns:
        What takes out again those that this call has put there.
    """
    with contextlib.ExitStack() as undo:
        for name in KERNEL_PARAMETERS:
            undo.callback(patching.wrap(upstream, name, _DISPATCHERS[name]))
        return undo.pop_all().close


_VARLEN = (*VARLEN_TENSORS, *VARLEN_OPTIONS)


def _varlen_dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in upstream's module for its function over raw keys and values.

    It has parameters for the same reason as :func:`_paged_dispatcher`'s.
    """
    parameters = KERNEL_PARAMETERS["flash_attn_varlen_func"]

    @functools.wraps(original)
    def flash_attn_varlen_func(
        *args: Any, q: Any = ABSENT, k: Any = ABSENT, v: Any = ABSENT, cu_seqlens_q: Any = ABSENT,
        cu_seqlens_k: Any = ABSENT, max_seqlen_q: Any = ABSENT, max_seqlen_k: Any = ABSENT,
        softmax_scale: Any = ABSENT, causal: Any = ABSENT, return_softmax_lse: Any = ABSENT,
        out: Any = ABSENT, ver: Any = ABSENT, **others: Any,
    ) -> Any:  # fmt: skip
        running = RUNNING.stack
        options = max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_softmax_lse, out, ver
        if running and not (args or others):
            backend, call = running[-1], (q, k, v, cu_seqlens_q, cu_seqlens_k, options)
            known: KnownVarlenCall | None
            for known in backend.known_varlen():
                if known.matches(*call):
                    known.uses += 1
                    break
            else:
                known = backend.varlen_known_before(*call)
            if known is not None:
                return known.function(q, k, v, **known.keywords)
        given = zip(_VARLEN, (q, k, v, cu_seqlens_q, cu_seqlens_k, *options), strict=True)
        arguments = {name: value for name, value in given if value is not ABSENT}
        arguments.update(others)
        if not running:
            return original(*args, **arguments)
        arguments.update(zip(parameters, args, strict=False))
        return running[-1].call_flash_attn_varlen_func(arguments)

    return flash_attn_varlen_func


_PAGED = (
    "q", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_q", "cu_seqlens_k_new",
    "max_seqlen_q", "softmax_scale", "causal", "window_size", "softcap", "return_softmax_lse",
    "num_splits", "out", "scheduler_metadata", "ver", "qv", "sinks", "k_descale", "v_descale",
)  # fmt: skip
"""The parameters below, in their order."""


def _paged_dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in upstream's module for its function over a paged KV cache.

    Every layer passes here, so what upstream's forwards pass has parameters of its own: Python then
    makes no dict of them. Whatever else a call has is in ``others``.
    """
    parameters = KERNEL_PARAMETERS["flash_attn_with_kvcache"]

    @functools.wraps(original)
    def flash_attn_with_kvcache(
        *args: Any, q: Any = ABSENT, k_cache: Any = ABSENT, v_cache: Any = ABSENT,
        page_table: Any = ABSENT, cache_seqlens: Any = ABSENT, cu_seqlens_q: Any = ABSENT,
        cu_seqlens_k_new: Any = ABSENT, max_seqlen_q: Any = ABSENT, softmax_scale: Any = ABSENT,
        causal: Any = ABSENT, window_size: Any = ABSENT, softcap: Any = ABSENT,
        return_softmax_lse: Any = ABSENT, num_splits: Any = ABSENT, out: Any = ABSENT,
        scheduler_metadata: Any = ABSENT, ver: Any = ABSENT, qv: Any = ABSENT,
        sinks: Any = ABSENT, k_descale: Any = ABSENT, v_descale: Any = ABSENT, **others: Any,
    ) -> Any:  # fmt: skip
        running = RUNNING.stack
        if running:
            backend = running[-1]
            options = (
                softmax_scale, causal, window_size, softcap, return_softmax_lse, num_splits, out,
                ver, qv, sinks, k_descale, v_descale,
            )  # fmt: skip
            own_keys = backend.own_keys
            known: KnownCall | None
            for known in backend.begin_call():
                if not args and known.matches(
                    q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q,
                    options, own_keys,
                ) and not others:  # fmt: skip
                    known.uses += 1
                    break
            else:
                known = None if others or args else backend.known_before(
                    q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q,
                    options, own_keys,
                )  # fmt: skip
            if known is not None:
                if known.raw:
                    k_cache, v_cache = own_keys
                elif own_keys is not None:
                    q = q.contiguous()
                if known.options is None:
                    return known.function(q, k_cache, v_cache, **known.keywords_with(options))
                return known.function(q, k_cache, v_cache, **known.keywords)
        values = (
            q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, cu_seqlens_k_new,
            max_seqlen_q, softmax_scale, causal, window_size, softcap, return_softmax_lse,
            num_splits, out, scheduler_metadata, ver, qv, sinks, k_descale, v_descale,
        )  # fmt: skip
        given = zip(_PAGED, values, strict=True)
        arguments = {name: value for name, value in given if value is not ABSENT}
        arguments.update(others)
        if not running:
            return original(*args, **arguments)
        arguments.update(zip(parameters, args, strict=False))
        return backend.call_unlike_others(arguments)

    return flash_attn_with_kvcache


_DISPATCHERS = {
    "flash_attn_with_kvcache": _paged_dispatcher,
    "flash_attn_varlen_func": _varlen_dispatcher,
}
