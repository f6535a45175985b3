"""Providers of FA3 kernels, and which of them serves.

A provider is a :class:`~sglang_musa_ext.kernels.record.FA3Kernels`: ``mate`` (Moore Threads),
``hopper`` (NVIDIA, to validate on) or ``reference`` (PyTorch, on any device). The attention backend
does not know which one it has; an adapter settles what differs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sglang_musa_ext import envs, policy
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.adapter import adapt
from sglang_musa_ext.kernels.hopper import hopper_kernels
from sglang_musa_ext.kernels.mate import mate_kernels
from sglang_musa_ext.kernels.record import (
    HALF,
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
    versions_of,
)

__all__ = [
    "FA3Kernels",
    "KernelsUnavailable",
    "UnsupportedByKernels",
    "UnsupportedKernelArgument",
    "hopper_kernels",
    "mate_kernels",
    "reference_kernels",
    "select_kernels",
]


def select_kernels(settings: Settings, device: torch.device) -> FA3Kernels:
    """Return the kernels that ``settings`` name, or with ``auto`` those of ``device``.

    Args:
        settings: ``kernels`` is ``auto``, ``mate``, ``hopper`` or ``reference``.
        device: where the KV cache is.

    Raises:
        KernelsUnavailable: the library is missing, is another one, or does not serve ``device``.
    """
    choice = policy.choose_kernels(settings, device.type)
    if choice.kernels is None:
        raise KernelsUnavailable(
            f"The KV cache is on {device}, and {'; '.join(choice.reasons)}. Set "
            f"{envs.KERNELS}=hopper to run on an NVIDIA Hopper GPU, or {envs.MODE}=off to leave "
            "SGLang alone."
        )
    return _PROVIDERS[choice.kernels](device)


def reference_kernels(device: torch.device | None = None) -> FA3Kernels:
    """PyTorch kernels that behave like MATE, on any device; slow, and exact enough to compare with."""
    from sglang_musa_ext.kernels import reference

    return FA3Kernels(
        name="reference",
        flash_attn_with_kvcache=adapt(reference.flash_attn_with_kvcache, dense_page_table=True),
        flash_attn_varlen_func=adapt(reference.flash_attn_varlen_func),
        get_scheduler_metadata=reference.get_scheduler_metadata,
        dtypes=HALF | {torch.float32},
        mla_plan_bytes=lambda batch, seqlen, heads, _: reference.mla_plan_bytes(
            batch, seqlen, heads
        ),
        mla_page_sizes=(64,),
        versions=versions_of("torch"),
    )


_PROVIDERS: Mapping[str, Callable[[torch.device], FA3Kernels]] = {
    "mate": mate_kernels,
    "hopper": hopper_kernels,
    "reference": reference_kernels,
}
