"""What the benchmark builds of SGLang to compare with."""

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
)
