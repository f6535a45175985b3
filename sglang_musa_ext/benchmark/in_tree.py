"""SGLang's in-tree MUSA backend on an NVIDIA GPU, as a peer of the benchmark.

It imports MATE's ``flash_attn_interface``. Here a module of that name stands on NVIDIA's FA3, with
MATE's way to pass an MLA plan, ``(workspace, reuse)``. Nothing else of the in-tree backend is
touched: what it computes is its own.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

from sglang_musa_ext.kernels.provider import FA3Kernels, hopper_kernels


def serve_in_tree() -> None:
    """Have ``fa3`` and its draft backends be the in-tree MUSA classes in this process."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.speculative import draft_utils

    # This is how SGLang itself chooses the in-tree classes for draft models.
    draft_utils.is_musa = lambda: True
    ATTENTION_BACKENDS["fa3"] = create_in_tree
    sys.modules["flash_attn_interface"] = interface()


def create_in_tree(runner: Any) -> Any:
    """Build the in-tree MUSA backend: on MATE on a MUSA device, elsewhere on NVIDIA's FA3."""
    if runner.device != "musa":
        sys.modules.setdefault("flash_attn_interface", interface())
    from sglang.srt.hardware_backend.musa.attention.flashattention_backend import (
        MusaFlashAttentionBackend,
    )

    return MusaFlashAttentionBackend(runner)


class _Lazily:
    """NVIDIA's kernels, imported at the first call: in the process that has the device."""

    def __init__(self) -> None:
        self._kernels: FA3Kernels | None = None

    def __call__(self) -> FA3Kernels:
        self._kernels = self._kernels or hopper_kernels(torch.device("cuda"))
        return self._kernels


def interface() -> ModuleType:
    """A ``flash_attn_interface`` with the three functions that the in-tree backend imports."""
    kernels = _Lazily()
    module = ModuleType("flash_attn_interface")

    def flash_attn_with_kvcache(**arguments: Any) -> Any:
        metadata = arguments.pop("scheduler_metadata", None)
        if isinstance(metadata, tuple):
            metadata = _plan_in(metadata, arguments, kernels())
        return kernels().flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata)

    vars(module).update(
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=lambda **arguments: kernels().flash_attn_varlen_func(**arguments),
        get_scheduler_metadata=lambda **arguments: kernels().get_scheduler_metadata(**arguments),
    )
    return module


def _plan_in(
    metadata: tuple[torch.Tensor, bool], arguments: dict[str, Any], kernels: FA3Kernels
) -> torch.Tensor:
    """The plan that the workspace holds, computed into it first unless it is to be reused."""
    workspace, reuse = metadata
    # How long each plan is, kept on the host: a capture may not wait for the device.
    sizes: dict[int, int] = workspace.__dict__.setdefault("plan_bytes", {})
    batch_size = arguments["cu_seqlens_q"].shape[0] - 1
    if not reuse:
        plan = kernels.get_scheduler_metadata(
            batch_size=batch_size, max_seqlen_q=arguments["max_seqlen_q"],
            max_seqlen_k=arguments["page_table"].shape[1] * arguments["k_cache"].shape[1],
            num_heads_q=arguments["q"].shape[-2], num_heads_kv=arguments["k_cache"].shape[-2],
            headdim=arguments["q"].shape[-1], headdim_v=arguments["v_cache"].shape[-1],
            qkv_dtype=arguments["q"].dtype, cache_seqlens=arguments["cache_seqlens"],
            cu_seqlens_q=arguments["cu_seqlens_q"], page_size=arguments["k_cache"].shape[1],
            causal=arguments["causal"], num_splits=arguments["num_splits"],
        )  # fmt: skip
        sizes[batch_size] = plan.numel()
        workspace[: 4 * plan.numel()].view(torch.int32).copy_(plan)
    if batch_size not in sizes:
        raise RuntimeError(
            "The in-tree backend reuses an MLA plan of a batch size for which it computed none."
        )
    return workspace[: 4 * sizes[batch_size]].view(torch.int32)
