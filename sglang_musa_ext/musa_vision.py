"""Vision's FA3 on MUSA: upstream calls a function there that it defines for CUDA alone."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from sglang_musa_ext import patching
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.upstream.names import VISION


def install_vision() -> patching.Undo:
    """Give upstream's vision attention the function that it lacks, now or once it is imported."""
    return patching.after_import(VISION, _give_flash_attn_func)


def _give_flash_attn_func(vision: ModuleType) -> None:
    called = vision.VisionFlash3Attention.forward.__code__.co_names
    if "flash_attn_func" in called and not hasattr(vision, "flash_attn_func"):
        vision.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]


def flash_attn_func(q: Any, k: Any, v: Any, **arguments: Any) -> Any:
    """Compute varlen attention, with the name and the arguments of upstream's vision attention.

    MATE has a function of this name too, over padded sequences; upstream passes cumulative lengths.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``.
        v: ``(total_k, nheads_k, headdim_v)``.
        arguments: further keywords of FA3's ``flash_attn_varlen_func``.
    """
    return _kernels_of(q.device).flash_attn_varlen_func(q=q, k=k, v=v, **arguments)


@functools.cache
def _kernels_of(device: Any) -> Any:
    from sglang_musa_ext.kernels import provider as kernels

    return kernels.select_kernels(Settings.from_environ(), device)
