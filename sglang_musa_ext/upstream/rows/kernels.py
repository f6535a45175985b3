"""The kernel names, how upstream's forwards reach them, and what they pass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sglang_musa_ext.upstream.names import FLASH_ATTENTION, KERNEL_PARAMETERS
from sglang_musa_ext.upstream.requirement import NONE_KNOWN, Requirement

_CLASS = "FlashAttentionBackend"
_UNTIL_PROVIDERS = (
    "Upstream offers a registry for FA3 kernel providers, so that no name needs replacing."
)


class PlanPart(Enum):
    """The way in which a keyword of a kernel call enters that call's plan."""

    TENSOR = "tensor"
    """By what the tensor holds: a plan is for this very tensor, unchanged since."""
    VALUE = "value"
    """By value."""
    NONE = "none"
    """Not at all, or through the shapes and dtypes of queries, keys and values alone."""


@dataclass(frozen=True)
class Keyword:
    """A keyword of FA3's functions, as this package understands it."""

    name: str
    plan: PlanPart = PlanPart.NONE
    since: str | None = None
    """The first release in which upstream passes it; ``None``: the oldest supported."""
    passed: bool = True
    """True if upstream passes it; FA3 has it in any case."""


KEYWORDS = (
    *(
        Keyword(name)
        for name in (
            *("q", "k", "v", "k_cache", "v_cache", "qv", "page_table", "cu_seqlens_k"),
            *("max_seqlen_k", "softmax_scale", "k_descale", "v_descale", "return_softmax_lse"),
            *("sinks", "scheduler_metadata", "out", "ver"),
        )
    ),
    Keyword("cache_seqlens", PlanPart.TENSOR),
    Keyword("cu_seqlens_q", PlanPart.TENSOR),
    Keyword("cu_seqlens_k_new", PlanPart.TENSOR),
    Keyword("cache_leftpad", PlanPart.TENSOR, passed=False),
    Keyword("max_seqlen_q", PlanPart.VALUE),
    Keyword("causal", PlanPart.VALUE),
    Keyword("window_size", PlanPart.VALUE),
    Keyword("softcap", PlanPart.VALUE),
    Keyword("num_splits", PlanPart.VALUE),
    Keyword("attention_chunk", PlanPart.VALUE, passed=False),
    Keyword("pack_gqa", PlanPart.VALUE, passed=False),
    Keyword("sm_margin", PlanPart.VALUE, passed=False),
    # These belong to FlashAttention 4, and the adapters refuse them by name.
    *(
        Keyword(name, since="0.5.16")
        for name in (
            *("score_mod", "aux_tensors", "rel_bias", "rel_bias_prep_cache"),
            *("sfq", "sfk", "sfv"),
        )
    ),
    Keyword("mask_mod", since="0.5.22"),
)
"""Every keyword that a call may have. A new one that plans depend on is one row here."""

PLANNED_TENSORS = tuple(item.name for item in KEYWORDS if item.plan is PlanPart.TENSOR)
"""The keywords whose tensors' contents a plan depends on."""
PLANNED_VALUES = tuple(item.name for item in KEYWORDS if item.plan is PlanPart.VALUE)
"""The keywords whose values a plan depends on."""


def _passed(since: str | None) -> tuple[str, ...]:
    return tuple(item.name for item in KEYWORDS if item.passed and item.since == since)


ROWS = (
    *(
        Requirement(
            "module_global",
            FLASH_ATTENTION,
            kernel,
            why=(
                "The dispatcher replaces this name, through which upstream's forwards call the "
                "kernel."
            ),
            remove_when=_UNTIL_PROVIDERS,
        )
        for kernel in KERNEL_PARAMETERS
    ),
    Requirement(
        "kernel_calls",
        FLASH_ATTENTION,
        _CLASS,
        (
            "forward_extend: flash_attn_with_kvcache",
            "forward_extend: flash_attn_varlen_func",
            "forward_decode: flash_attn_with_kvcache",
        ),
        why=(
            "A kernel reached any other way, or outside the two forwards, would bypass the "
            "dispatcher."
        ),
        remove_when=_UNTIL_PROVIDERS,
    ),
    Requirement(
        "kernel_calls",
        FLASH_ATTENTION,
        _CLASS,
        ("forward_extend: merge_suffix_attention_in_place",),
        "0.5.20",
        why=(
            "UNO's fused suffix attention is upstream's own Triton kernel; it needs no FA3 "
            "provider."
        ),
        remove_when="Upstream drops the fused suffix attention of UNO.",
    ),
    Requirement(
        "kernel_calls",
        FLASH_ATTENTION,
        _CLASS,
        ("forward_extend: self.flash_attn_varlen_func",),
        "0.5.23",
        why=(
            "Attention without a KV cache calls the instance attribute, under whose name the mixin "
            "has a method."
        ),
        remove_when=(
            "Upstream calls the module global again, and the mixin's methods may have any name."
        ),
    ),
    Requirement(
        "kernel_keywords",
        FLASH_ATTENTION,
        _CLASS,
        _passed(None),
        why=(
            "Plans depend on what a call asks for, so a new keyword must be understood before it "
            "is served."
        ),
        remove_when=_UNTIL_PROVIDERS,
    ),
    *(
        Requirement(
            "kernel_keywords",
            FLASH_ATTENTION,
            _CLASS,
            _passed(since),
            since,
            why="These belong to FlashAttention 4 alone, and the adapters refuse them by name.",
            remove_when="Upstream no longer passes them.",
        )
        for since in ("0.5.16", "0.5.22")
    ),
    Requirement(
        "forward_imports",
        FLASH_ATTENTION,
        _CLASS,
        why="A local import inside a forward could bring a kernel past the dispatcher.",
        remove_when=_UNTIL_PROVIDERS,
    ),
    Requirement(
        "forward_imports",
        FLASH_ATTENTION,
        _CLASS,
        ("forward_extend: sglang.kernels.ops.attention.flash_attention_v4.make_image_mask_mod",),
        "0.5.22",
        why="This import inside a forward is the mask callback of FlashAttention 4, not a kernel.",
        remove_when="Upstream no longer imports it there.",
    ),
    *(
        Requirement(
            "query_uses",
            FLASH_ATTENTION,
            _CLASS,
            uses,
            since,
            until,
            why=(
                "In a prefill without a prefix something stands for the queries that lets the "
                "forward ask for a copy in one piece, and makes none."
            ),
            remove_when="Upstream's forward no longer copies queries.",
        )
        for uses, since, until in (
            (("q.contiguous", "q.dtype", "q.view"), None, None),
            (("q.to",), None, "0.5.18"),
            (("q.shape",), "0.5.14", None),
            # It casts them for an fp8 cache, and returns them.
            (("self.prepare_paged_mha_query(q)",), "0.5.19", None),
            # In a verify alone.
            (("can_use_fused_suffix_attention_merge(q)",), "0.5.20", None),
        )
    ),
    Requirement(
        "imports_from",
        FLASH_ATTENTION,
        "sgl_kernel.flash_attn",
        (*KERNEL_PARAMETERS, "get_scheduler_metadata"),
        why=(
            "sgl_kernel may be built without it, so a stand-in with these names serves while the "
            "constructor runs."
        ),
        remove_when="Upstream's constructor no longer imports sgl_kernel.flash_attn.",
        fault=NONE_KNOWN,
    ),
    Requirement(
        "imports_from",
        FLASH_ATTENTION,
        "sgl_kernel",
        ("merge_state_v2",),
        used_by="cpu",
        why=(
            "Cascade attention merges its parts with it; the CPU platform's stand-in for "
            "sgl_kernel has this name."
        ),
        remove_when="Upstream merges states without sgl_kernel.",
    ),
)
