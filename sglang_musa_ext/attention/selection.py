"""The selection points at which SGLang is made to build our attention backends, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from sglang.srt.layers.attention import flashattention_backend as upstream
from sglang.srt.layers.attention.flashattention_backend import (
    FlashAttentionBackend,
    FlashAttentionMultiStepBackend,
)

from sglang_musa_ext import patching
from sglang_musa_ext.attention.dispatch import install_kernel_dispatch
from sglang_musa_ext.attention.mixin import BACKENDS, CONSTRUCTION, MusaFA3Mixin
from sglang_musa_ext.upstream.names import IN_TREE_MODULE

__all__ = [
    "IN_TREE_MODULE",
    "MusaFA3Backend",
    "MusaFA3MultiStepDraftBackend",
    "install_class_names",
    "install_kernel_dispatch",
    "install_state_report",
    "upstream_builds_ours",
]  # what the plugin needs


class MusaFA3Backend(MusaFA3Mixin, FlashAttentionBackend):  # type: ignore[misc]
    """Upstream's FlashAttention backend on the kernels of this package.

    ``--attention-backend fa3`` builds it.
    """


class MusaFA3MultiStepDraftBackend(FlashAttentionMultiStepBackend):  # type: ignore[misc]
    """Upstream's multi-step draft backend, whose children are :class:`MusaFA3Backend`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of upstream's ``FlashAttentionMultiStepBackend``."""
        with upstream_builds_ours():
            super().__init__(*args, **kwargs)


@contextmanager
def upstream_builds_ours() -> Iterator[None]:
    """Give code of upstream that names an FA3 backend class ours meanwhile.

    Both names are covered: upstream's own class, and that of the in-tree MUSA backend.
    """
    ours = {
        "FlashAttentionBackend": MusaFA3Backend,
        "FlashAttentionMultiStepBackend": MusaFA3MultiStepDraftBackend,
    }
    in_tree: Any = ModuleType(IN_TREE_MODULE)
    in_tree.MusaFlashAttentionBackend = MusaFA3Backend
    in_tree.MusaFlashAttentionMultiStepBackend = MusaFA3MultiStepDraftBackend
    with ExitStack() as stack:
        stack.enter_context(CONSTRUCTION)
        for name, cls in ours.items():
            stack.callback(patching.replace(upstream, name, cls))
        stack.callback(patching.stand_in(IN_TREE_MODULE, in_tree))
        yield


def install_class_names() -> Callable[[], None]:
    """Add our backend to upstream's list of backends that need no custom mask in DFlash's verify.

    The list goes by class names. This imports a speculative-decoding module, so call it only where
    a model is speculated on.

    Returns:
        What undoes it.
    """
    from sglang.srt.speculative import dflash_utils

    name = "_DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS"
    names = getattr(dflash_utils, name) | {MusaFA3Backend.__name__}
    return patching.replace(dflash_utils, name, names)


def install_state_report() -> Callable[[], None]:
    """Add the reports of this process's backends to the scheduler's internal state.

    They are then in ``/server_info`` and ``Engine.get_server_info()``, as ``sglang_musa_ext``.

    Returns:
        What undoes it.
    """
    from sglang.srt.managers.scheduler import Scheduler

    return patching.wrap(Scheduler, "get_internal_state", _reporting)


def _reporting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_internal_state(self: Any, recv_req: Any) -> Any:
        reply = original(self, recv_req)
        reports = [backend.musa_fa3_report() for backend in BACKENDS]
        reply.internal_state["sglang_musa_ext"] = reports
        return reply

    return get_internal_state
