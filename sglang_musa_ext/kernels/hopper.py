"""NVIDIA's FA3, to validate this package on a Hopper GPU."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sglang_musa_ext import envs
from sglang_musa_ext.kernels import mate_identity
from sglang_musa_ext.kernels.adapter import AdaptedFunction
from sglang_musa_ext.kernels.record import (
    HALF,
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedByKernels,
    import_library,
    versions_of,
)

logger = logging.getLogger(__name__)


class _Library(NamedTuple):
    """A library that has the functions of FA3."""

    module: str
    distributions: tuple[str, ...]
    """The names that it was released under."""
    plans_unequal_queries: bool
    """See :class:`FA3Kernels`."""
    remedy: str


_HOPPER_LIBRARIES = (
    _Library(
        "sgl_kernel.flash_attn",
        ("sglang-kernel", "sgl-kernel"),
        False,
        "Install SGLang's kernel package for this GPU, built with FlashAttention-3, as this SGLang "
        "pins it.",
    ),
    _Library(
        mate_identity.CURRENT.module,
        ("flash_attn_3",),
        True,
        "Install FlashAttention-3 from the folder 'hopper' of Dao-AILab/flash-attention, for this "
        "torch.",
    ),
)
"""The libraries of the ``hopper`` kernels, in the order in which they are tried."""


_FA3_CAPABILITIES = (8, 9)
"""Major compute capabilities that FA3 has kernels for, as in SGLang's ``is_fa3_supported``."""


def hopper_kernels(device: torch.device) -> FA3Kernels:
    """NVIDIA's FA3, to validate this package on a Hopper GPU.

    It is SGLang's build, ``sgl_kernel.flash_attn``; where that cannot be had, FlashAttention's own,
    ``flash_attn_interface``. ``versions`` says which library serves.

    MLA calls (``qv``) take scheduler metadata like any other call, computed for head dimensions 64
    and 512. Read in FlashAttention's ``hopper/flash_api.cpp`` and ``flash_fwd_launch_template.h``
    (v2.8.3, and 0251105a of 2026-08-15): the forward settles paging by TMA, the number of splits,
    GQA packing and the size of the plan before it looks at ``qv``, and tile sizes depend on head
    dimensions, mask, dtype, paging and softcap. So ``get_scheduler_metadata``, which has no ``qv``,
    decides as the forward does.

    SGLang's build plans no calls whose requests have different numbers of queries. Seen on an H100
    with sglang-kernel 0.4.5: ``get_scheduler_metadata`` bounds the number of splits by the longest
    query, the forward by the average one. A plan can then have more splits than the forward has
    accumulators for, and another last bit where it has fewer.

    Raises:
        KernelsUnavailable: the device is none that FA3 serves, or both libraries were rejected,
            with each one's reason.
    """
    if device.type != "cuda":
        raise KernelsUnavailable(
            f"The 'hopper' kernels run on an NVIDIA GPU, and the KV cache is on {device}. Set "
            f"{envs.KERNELS}=auto, or start the server on a machine with a Hopper GPU."
        )
    _require_fa3_device(device)
    candidate, library = _import_hopper_library()
    versions = {"library": candidate.module, **versions_of(*candidate.distributions)}
    return hopper_record(library, candidate.plans_unequal_queries, versions)


def hopper_record(
    library: Any, plans_unequal_queries: bool, versions: Mapping[str, str] | None = None
) -> FA3Kernels:
    """Return the record of a library with the functions of NVIDIA's FA3.

    Args:
        library: has the three functions of FA3.
        plans_unequal_queries: see :class:`FA3Kernels`.
        versions: likewise.
    """
    return FA3Kernels(
        name="hopper",
        flash_attn_with_kvcache=AdaptedFunction(library.flash_attn_with_kvcache),
        flash_attn_varlen_func=AdaptedFunction(library.flash_attn_varlen_func),
        get_scheduler_metadata=AdaptedFunction(library.get_scheduler_metadata),
        dtypes=HALF | {torch.float8_e4m3fn},
        mla_dtypes=HALF,
        metadata_uses_softcap=True,
        plans_unequal_queries=plans_unequal_queries,
        plans_for_itself=True,
        serves_raw_keys=functools.partial(
            _serves_raw_keys, AdaptedFunction(library.flash_attn_varlen_func)
        ),
        plan_contents=_hopper_plan_contents,
        unadapted=library.flash_attn_with_kvcache,
        versions=versions or {},
    )


def _serves_raw_keys(
    function: AdaptedFunction,
    *,
    dtype: torch.dtype,
    attention_chunk: int = 0,
    has_sinks: bool = False,
    **_: Any,
) -> bool:
    """Tell whether ``function``, over raw keys, serves a call: all but chunks and fp8."""
    if has_sinks and function.lacks("sinks"):
        return False
    return dtype in HALF and attention_chunk == 0


def _require_fa3_device(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability[0] not in _FA3_CAPABILITIES:
        raise KernelsUnavailable(
            f"{device} is {torch.cuda.get_device_name(device)!r}, capability "
            f"{'.'.join(map(str, capability))}, and the "
            "'hopper' kernels run on NVIDIA GPUs of compute capability 9.0 (Hopper) or 8.x. Set "
            f"{envs.MODE}=off, and start the server with another --attention-backend."
        )


def _import_hopper_library() -> tuple[_Library, ModuleType]:
    """Return the first usable one of :data:`_HOPPER_LIBRARIES`; warn why earlier ones are not.

    Raises:
        KernelsUnavailable: none can be had; with the reason and the remedy of each.
    """
    rejected: list[KernelsUnavailable] = []
    for candidate in _HOPPER_LIBRARIES:
        try:
            library = _import_hopper_candidate(candidate)
        except KernelsUnavailable as reason:
            rejected.append(reason)
            continue
        if rejected:
            reasons = "; ".join(map(str, rejected))
            logger.warning(
                "The 'hopper' kernels come from %r, since SGLang's own: %s",
                candidate.module,
                reasons,
            )
        return candidate, library
    raise KernelsUnavailable(
        "No library has the 'hopper' kernels. Each of these was tried, and one is enough:\n"
        + "\n".join(f"* {reason}" for reason in rejected)
    ) from rejected[0]


def _import_hopper_candidate(candidate: _Library) -> ModuleType:
    if candidate.module == mate_identity.CURRENT.module and mate_identity.is_wrapper(
        candidate.module
    ):
        raise KernelsUnavailable(
            f"{candidate.module!r} is Moore Threads' wrapper of MATE, whose kernels run on MUSA "
            "alone. Uninstall its "
            f"distribution, {mate_identity.CURRENT.distribution}. {candidate.remedy}"
        )
    library = import_library(candidate.module, candidate.remedy)
    parameters = inspect.signature(library.flash_attn_varlen_func).parameters
    if not {"return_softmax_lse", "return_attn_probs"} & set(parameters):
        # FlashAttention up to v2.8.2 returned two results, v2.8.3 one: nothing tells them apart.
        raise KernelsUnavailable(
            f"{candidate.module!r} at {library.__file__} is too old: expected a "
            "flash_attn_varlen_func that can be "
            "asked for softmax_lse, as in FlashAttention-3 from 30 August 2025 on. "
            f"{candidate.remedy}"
        )
    return library


def _hopper_plan_contents(plan: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return a plan without what is never written, and without the forward's counter.

    Read in ``hopper/flash_api.cpp`` and ``flash_prepare_scheduler.cu`` of
    Dao-AILab/flash-attention:

    * from 199401d3 (2025-08-21) to 0251105a (2026-08-15), and in sgl-project/sgl-attn, the origin
      of SGLang's: three vectors, four under a causal mask, of the batch size rounded up to 4, whose
      padding is not written. Then, always on compute capability 9.0 and with several splits on 8.x,
      the counter that each forward uses up and clears.
    * before, as in v2.8.3: the place of that counter, and one value a request; from 993 requests
      on, none.

    Args:
        plan: int32 ``(n,)``. Neither layout has a length of the other: the later one is three times
            the batch size at least, the earlier one is one more than the batch size at most.
        batch_size: number of requests.

    Raises:
        UnsupportedByKernels: for a length that neither layout has. Comparing it as it is could
            report a difference where there is none, and leaving parts out could hide one.
    """
    padded = max(-(-batch_size // 4) * 4, 4)
    vectors, values = divmod(plan.numel(), padded)
    if vectors in (3, 4) and values <= 1:
        return plan[: vectors * padded].view(vectors, padded)[:, :batch_size]
    if plan.numel() <= batch_size + 1:
        return plan[1:]
    raise UnsupportedByKernels(
        f"A plan of FA3 has {plan.numel()} values for a batch of {batch_size}, which {envs.CHECK} "
        f"cannot compare. Expected 3 or 4 vectors of {padded} and a counter, or at most "
        f"{batch_size + 1} values. Unset {envs.CHECK}, and report this with the version of the "
        "kernels."
    )
