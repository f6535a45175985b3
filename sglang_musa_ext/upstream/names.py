"""Names in SGLang's sources that more than one module of this package needs."""

from __future__ import annotations

FLASH_ATTENTION = "sglang.srt.layers.attention.flashattention_backend"
"""The module of upstream's FlashAttention backend, and of the kernel names that it calls."""
FLASH_ATTENTION_CLASS = "FlashAttentionBackend"
"""Upstream's backend, which both the in-tree MUSA one and ours derive from."""
IN_TREE_MODULE = "sglang.srt.hardware_backend.musa.attention.flashattention_backend"
"""The module of SGLang's in-tree MUSA backend."""
VISION = "sglang.srt.layers.attention.vision"
"""The module of the vision tower's attention."""

MODEL_RUNNER = "sglang.srt.model_executor.model_runner"
"""The module of the class that joins a rank to its process group and then loads weights."""

KERNEL_PARAMETERS = {
    "flash_attn_with_kvcache": ("q", "k_cache", "v_cache"),
    "flash_attn_varlen_func": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
}
"""Kernels that forwards call in :data:`FLASH_ATTENTION`, with their positional parameters."""
DRAFT_METHODS = ("_create_fa_decode_backend", "_create_fa_prefill_backend")
"""Methods of upstream's ``DraftBackendFactory`` that choose an FA3 class by themselves."""
