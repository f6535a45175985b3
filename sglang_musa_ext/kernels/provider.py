"""Providers of FA3 kernels, and which of them serves.

A provider is a :class:`~sglang_musa_ext.kernels.record.FA3Kernels`: ``mate`` (Moore Threads),
``hopper`` (NVIDIA, to validate on) or ``reference`` (PyTorch, on any device). The attention backend
does not know which one it has; an adapter settles what differs between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_musa_ext import envs, policy
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.adapter import DENSE_PAGE_TABLE, AdaptedFunction
from sglang_musa_ext.kernels.hopper import hopper_kernels
from sglang_musa_ext.kernels.mate import (
    DESCALES,
    ONE_REQUEST,
    call_traits,
    has_sinks,
    head_dims_in_words,
    mate_kernels,
    plan_contents,
    serves_raw_keys,
)
from sglang_musa_ext.kernels.record import (
    HALF,
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
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


def reference_kernels(
    device: torch.device | None = None, release: policy.MateRelease = policy.NEWEST_MATE
) -> FA3Kernels:
    """Return PyTorch kernels that behave like a release of MATE, on any device.

    They are slow, and exact enough to compare with.

    Args:
        device: makes no difference.
        release: of MATE, as numbers.
    """
    from sglang_musa_ext.kernels import reference

    mate_dtypes = frozenset(getattr(torch, name) for name in policy.mate_dtypes(release))
    with_cache = functools.partial(reference.flash_attn_with_kvcache, release=release)
    varlen = functools.partial(reference.flash_attn_varlen_func, release=release)
    return FA3Kernels(
        name="reference",
        flash_attn_with_kvcache=AdaptedFunction(
            with_cache, steps=[DENSE_PAGE_TABLE, DESCALES], traits=call_traits
        ),
        flash_attn_varlen_func=AdaptedFunction(
            varlen, steps=[DESCALES, ONE_REQUEST], traits=call_traits
        ),
        get_scheduler_metadata=functools.partial(reference.get_scheduler_metadata, release=release),
        dtypes=mate_dtypes | {torch.float32},
        mla_dtypes=HALF | {torch.float32},
        mla_plan_bytes=lambda batch, seqlen, heads, _: reference.mla_plan_bytes(
            batch, seqlen, heads
        ),
        mla_page_sizes=(policy.PAGE_SIZE,),
        serves_head_dims=functools.partial(policy.mate_serves_head_dims, release),
        head_dims=head_dims_in_words(release),
        largest_batch=policy.mate_largest_batch(release),
        drops_plan=has_sinks,
        static_num_splits=reference.launched_splits,
        serves_raw_keys=functools.partial(_serves_raw_keys, release),
        plan_contents=plan_contents,
        # Checks make this record for each call, and the distribution's metadata is a file.
        versions={"torch": torch.__version__},
    )


def _serves_raw_keys(release: policy.MateRelease, *, dtype: torch.dtype, **call: Any) -> bool:
    """Answer as MATE does, for float32 as for half precision."""
    like = torch.bfloat16 if dtype == torch.float32 else dtype
    return serves_raw_keys(release, dtype=like, **call)


_PROVIDERS: Mapping[str, Callable[[torch.device], FA3Kernels]] = {
    "mate": mate_kernels,
    "hopper": hopper_kernels,
    "reference": reference_kernels,
}
