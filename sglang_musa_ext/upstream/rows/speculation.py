"""Draft models, for which upstream chooses an attention backend by itself."""

from __future__ import annotations

from sglang_musa_ext.upstream.names import DRAFT_METHODS, FLASH_ATTENTION, IN_TREE_MODULE
from sglang_musa_ext.upstream.requirement import NONE_KNOWN, Requirement

DRAFT = "sglang.srt.speculative.draft_utils"
"""The module of upstream's factory of draft backends."""
_DECODE, _PREFILL = (f"DraftBackendFactory.{method}" for method in DRAFT_METHODS)
_UNTIL_THE_REGISTRY_IS_ASKED = "Upstream asks the attention registry for draft backends too."
_IMPORTED_WHEN_CALLED = (
    "It imports the class when called, from one of these two modules, so the class can be ours."
)

ROWS = (
    Requirement(
        "method",
        FLASH_ATTENTION,
        "FlashAttentionMultiStepBackend.__init__",
        ("self", "model_runner", "topk", "speculative_num_steps", "fa_impl_ver"),
        why=(
            "The multi-step draft backend runs this constructor while our child class stands for "
            "upstream's."
        ),
        remove_when="Upstream lets a platform name its attention backend class.",
    ),
    Requirement(
        "calls",
        FLASH_ATTENTION,
        "FlashAttentionMultiStepBackend.__init__",
        ("FlashAttentionBackend",),
        why="Its children become ours because it constructs them through the module global.",
        remove_when="Upstream lets the child class be named.",
    ),
    *(
        Requirement(
            "method",
            DRAFT,
            method,
            ("self", "fa_impl_ver"),
            why="It picks the FA3 class of the draft worker.",
            remove_when=_UNTIL_THE_REGISTRY_IS_ASKED,
        )
        for method in (_DECODE, _PREFILL)
    ),
    Requirement(
        "imports",
        DRAFT,
        _DECODE,
        (
            f"{FLASH_ATTENTION}.FlashAttentionMultiStepBackend",
            f"{IN_TREE_MODULE}.MusaFlashAttentionMultiStepBackend",
        ),
        why=_IMPORTED_WHEN_CALLED,
        remove_when=_UNTIL_THE_REGISTRY_IS_ASKED,
    ),
    Requirement(
        "imports",
        DRAFT,
        _PREFILL,
        (
            f"{FLASH_ATTENTION}.FlashAttentionBackend",
            f"{IN_TREE_MODULE}.MusaFlashAttentionBackend",
        ),
        why=_IMPORTED_WHEN_CALLED,
        remove_when=_UNTIL_THE_REGISTRY_IS_ASKED,
    ),
    Requirement(
        "imports_from",
        DRAFT,
        IN_TREE_MODULE,
        ("MusaFlashAttentionBackend", "MusaFlashAttentionMultiStepBackend"),
        why=(
            "A stand-in with these two names takes the in-tree MUSA module's place while a draft "
            "factory runs."
        ),
        remove_when=_UNTIL_THE_REGISTRY_IS_ASKED,
        fault=NONE_KNOWN,
    ),
    Requirement(
        "strings",
        "sglang.srt.speculative.dflash_utils",
        "_DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS",
        ("FlashAttentionBackend",),
        why=(
            "DFlash goes by class name to skip a mask that FA3 ignores; our class's name is added "
            "to this set."
        ),
        remove_when="Upstream asks the backend instead of its name.",
        fault=NONE_KNOWN,
    ),
)
