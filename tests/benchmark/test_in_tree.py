"""The in-tree MUSA backend on NVIDIA's kernels, as a peer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sglang_musa_ext.benchmark import in_tree as bench_in_tree
from sglang_musa_ext.kernels.provider import FA3Kernels, reference_kernels


def planning(plans: list[Any], calls: list[Any]) -> FA3Kernels:
    """Kernels that number their plans, and note what calls come with."""

    def plan(**arguments: Any) -> torch.Tensor:
        plans.append(arguments)
        return torch.full((6,), len(plans), dtype=torch.int32)

    def call(**arguments: Any) -> str:
        calls.append(arguments)
        return "output"

    return dataclasses.replace(
        reference_kernels(), get_scheduler_metadata=plan, flash_attn_with_kvcache=call
    )


def test_an_mla_plan_is_kept_in_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim treats ``(workspace, reuse)`` as MATE does: it computes into it, or reuses it."""
    plans: list[Any] = []
    calls: list[Any] = []
    monkeypatch.setattr(bench_in_tree, "hopper_kernels", lambda device: planning(plans, calls))
    call = bench_in_tree.interface().flash_attn_with_kvcache
    workspace = torch.zeros(1 << 10, dtype=torch.uint8)
    arguments = {
        "q": torch.zeros(2, 16, 64), "qv": torch.zeros(2, 16, 512),
        "k_cache": torch.zeros(4, 64, 1, 64),
        "v_cache": torch.zeros(4, 64, 1, 512), "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.ones(2, dtype=torch.int32),
        "cu_seqlens_q": torch.arange(3, dtype=torch.int32),
        "max_seqlen_q": 1, "causal": True, "num_splits": 0,
    }  # fmt: skip
    with pytest.raises(
        RuntimeError, match="reuses an MLA plan of a batch size for which it computed none"
    ):
        call(**arguments, scheduler_metadata=(workspace, True))
    for reuse in (False, True, False):
        call(**arguments, scheduler_metadata=(workspace, reuse))
    assert [call["scheduler_metadata"].tolist() for call in calls] == [
        [2] * 6
    ] * 3  # All see the workspace's last.
    assert len(plans) == 2
    assert (plans[0]["headdim"], plans[0]["headdim_v"], plans[0]["max_seqlen_k"]) == (64, 512, 192)
