"""Upstream's backend class, where upstream constructs it, and what a process says of itself."""

from __future__ import annotations

from sglang_musa_ext.upstream.names import FLASH_ATTENTION
from sglang_musa_ext.upstream.requirement import Requirement
from sglang_musa_ext.upstream.rows.plugin import REGISTRY
from sglang_musa_ext.upstream.rows.speculation import DRAFT

BASE = "sglang.srt.layers.attention.base_attn_backend"
"""The module of the class that all attention backends of upstream derive from."""
NEVER = "Never: composition rests on it; adapt the mixin if upstream renames it."
"""The ``remove_when`` of rows that composition itself needs."""
_FORWARD_PARAMETERS = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")

ROWS = (
    Requirement(
        "method",
        FLASH_ATTENTION,
        "FlashAttentionBackend.__init__",
        (
            *("self", "model_runner", "skip_prefill", "speculative_step_id", "topk"),
            *("speculative_num_steps", "fa_impl_ver"),
        ),
        why="The mixin's constructor has the same parameters and refuses fa_impl_ver 4.",
        remove_when=NEVER,
    ),
    *(
        Requirement(
            "method",
            FLASH_ATTENTION,
            f"FlashAttentionBackend.{forward}",
            _FORWARD_PARAMETERS,
            why="The mixin opens its scope around this forward, and reads the layer and the batch.",
            remove_when=NEVER,
        )
        for forward in ("forward_extend", "forward_decode")
    ),
    Requirement(
        "method",
        BASE,
        "AttentionBackend.forward",
        _FORWARD_PARAMETERS,
        why="It dispatches to the two forwards that the mixin overrides.",
        remove_when=NEVER,
    ),
    Requirement(
        "class",
        FLASH_ATTENTION,
        "FlashAttentionBackend",
        ("AttentionBackend",),
        why="MusaFA3Backend derives from it, and AttentionBackend.forward dispatches for it.",
        remove_when=NEVER,
    ),
    *(
        Requirement(
            "attribute",
            FLASH_ATTENTION,
            f"FlashAttentionBackend.{attribute}",
            why=why,
            remove_when=NEVER,
        )
        for attribute, why in (
            ("forward_metadata", "A new object in it begins a new pass."),
            ("page_size", "The page table's capacity in pages of this size bounds the key length."),
            ("use_mla", "MLA plans live in a workspace, others in a tensor of their own."),
            ("kv_cache_dtype", "The kernels refuse an fp8 KV cache by its name."),
            (
                "flash_attn_with_kvcache",
                "The instance attribute is removed, so that the mixin's method is found.",
            ),
            (
                "flash_attn_varlen_func",
                "The instance attribute is removed, so that the mixin's method is found.",
            ),
        )
    ),
    Requirement(
        "attribute",
        FLASH_ATTENTION,
        "FlashAttentionBackend._get_scheduler_metadata",
        why=(
            "Set to None, it turns off upstream's own precomputation, which serves plain decode "
            "only."
        ),
        remove_when="Upstream no longer precomputes scheduler metadata.",
        fault="sgl-project/sglang#24632",
    ),
    Requirement(
        "attribute",
        "sglang.srt.mem_cache.memory_pool",
        "ReqToTokenPool.req_to_token",
        why=(
            "The device of the kernels is read off this tensor, because the runner's device name "
            "has no index."
        ),
        remove_when="The runner's device names its index in every release.",
    ),
    # Each place where upstream constructs the backend is covered, or known not to be served.
    Requirement(
        "constructors",
        "sglang.srt",
        "FlashAttentionBackend",
        (REGISTRY, FLASH_ATTENTION, DRAFT),
        used_by="attention.selection",
        why="A backend constructed elsewhere would not be ours; these places are covered.",
        remove_when="Upstream lets a platform name its attention backend class.",
    ),
    Requirement(
        "constructors",
        "sglang.srt",
        "FlashAttentionBackend",
        ("sglang.srt.layers.attention.minicpm.backend",),
        "0.5.19",
        used_by="attention.selection",
        why=(
            "MiniCPM's sparse backend calls its kernels itself; it is not served, and refused when "
            "constructed."
        ),
        remove_when="MiniCPM's sparse backend is served too, or gone.",
    ),
    Requirement(
        "class",
        "sglang.srt.model_executor.forward_batch_info",
        "ForwardMode",
        ("IntEnum",),
        why="Prefill over raw keys is for batches of its member EXTEND alone.",
        remove_when="Upstream itself prefills over raw keys where a batch has no prefix.",
    ),
    Requirement(
        "method",
        "sglang.srt.managers.scheduler",
        "Scheduler.get_internal_state",
        ("self", "recv_req"),
        why=(
            "The effective configuration and the plan counters are added to the state it returns."
        ),
        remove_when="Upstream lets plugins add to the server's state.",
    ),
    Requirement(
        "attribute",
        "sglang.srt.managers.io_struct",
        "GetInternalStateReqOutput.internal_state",
        why="The report goes into this dictionary of the reply.",
        remove_when="Upstream lets plugins add to the server's state.",
    ),
)
