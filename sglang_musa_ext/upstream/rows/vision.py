"""The vision tower's FA3 on MUSA, a fault of upstream's that is repaired where it is there."""

from __future__ import annotations

from sglang_musa_ext.upstream.names import VISION
from sglang_musa_ext.upstream.requirement import NONE_KNOWN, Requirement

_USER = "musa_vision"

ROWS = (
    Requirement(
        "bound_only_under",
        VISION,
        "flash_attn_func",
        ("_is_cuda",),
        "0.5.16",
        used_by=_USER,
        why=(
            "VisionFlash3Attention calls it on MUSA too, where it is a NameError; it is defined "
            "for MUSA instead."
        ),
        remove_when=(
            "Upstream defines it on MUSA: this row is violated then, and the repair is not applied."
        ),
        fault=NONE_KNOWN,
    ),
    Requirement(
        "calls",
        VISION,
        "VisionFlash3Attention",
        ("flash_attn_func",),
        "0.5.16",
        used_by=_USER,
        why="The vision tower's FA3 reaches its kernel through this module global.",
        remove_when="Upstream's vision attention runs on MUSA unaided.",
        fault=NONE_KNOWN,
    ),
    Requirement(
        "calls",
        VISION,
        "VisionFlash3Attention.forward",
        ("flash_attn_func",),
        "0.5.16",
        used_by=_USER,
        why="The repair looks for the call in this method.",
        remove_when="Upstream defines the function on MUSA, or asks its attention registry.",
        fault=NONE_KNOWN,
    ),
)
