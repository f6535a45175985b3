"""Rows of what the benchmark builds of SGLang to compare with."""

from __future__ import annotations

from sglang_musa_ext.upstream.names import IN_TREE_MODULE
from sglang_musa_ext.upstream.requirement import Requirement

ROWS = (
    Requirement(
        "module_global",
        IN_TREE_MODULE,
        "MusaFlashAttentionBackend",
        used_by="benchmark",
        why="SGLang's in-tree MUSA backend is measured beside ours.",
        remove_when="Upstream has no MUSA backend of its own.",
    ),
    Requirement(
        "module_global",
        "sglang.srt.model_executor.model_runner",
        "ModelRunner",
        used_by="benchmark",
        why="Its passes are timed in a server's own process.",
        remove_when="Upstream reports the times of its passes.",
    ),
    *(
        Requirement(
            "module_global",
            module,
            name,
            used_by="benchmark",
            why="The host's time of a forward is measured without a server around it.",
            remove_when="Upstream has a benchmark of its forwards without a device.",
        )
        for module, name in (
            ("sglang.srt.configs.model_config", "AttentionArch"),
            ("sglang.srt.layers.radix_attention", "RadixAttention"),
            ("sglang.srt.mem_cache.memory_pool", "MHATokenToKVPool"),
            ("sglang.srt.mem_cache.memory_pool", "_set_kv_buffer_impl"),
            ("sglang.srt.model_executor.forward_batch_info", "ForwardBatch"),
            ("sglang.srt.server_args", "set_global_server_args_for_scheduler"),
            ("sglang.srt.speculative.spec_info", "SpeculativeAlgorithm"),
        )
    ),
)
