"""Upstream's kernel names, which lead to the backend whose layer runs on this thread.

Upstream's forwards call FA3 through names of their module. A function stands under each of them:
while a layer of our backend runs, the call is that backend's, otherwise the original's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

from sglang.srt.layers.attention import flashattention_backend as upstream

from sglang_musa_ext import patching
from sglang_musa_ext.upstream.names import KERNEL_PARAMETERS


class Backend(Protocol):
    """A handler of calls: it gets the arguments as one dict, because every ``**`` copies them."""

    def call_flash_attn_with_kvcache(self, arguments: dict[str, Any]) -> Any:
        """Serve attention over a paged KV cache."""

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
            undo.callback(patching.wrap(upstream, name, functools.partial(_dispatcher, name)))
        return undo.pop_all().close


def _dispatcher(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands in upstream's module for ``original``."""
    parameters, method = KERNEL_PARAMETERS[name], f"call_{name}"

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        running = RUNNING.stack
        if not running:
            return original(*args, **kwargs)
        if args:
            kwargs.update(zip(parameters, args, strict=False))
        return getattr(running[-1], method)(kwargs)

    return dispatch
