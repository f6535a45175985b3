"""The reference's MLA decode gives the attention that float64 gives, if its plan is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_musa_ext.kernels.reference import (
    mla_plan_bytes,
    planning,
)
from sglang_musa_ext.kernels.reference.mla import mla_parts
from tests.support.paged_batch import (
    Latent,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "case", [([1, 1], [700, 10]), ([3, 1, 2], [130, 0, 64]), ([20], [65])], ids=str
)
def test_mla_is_attention(
    case: tuple[list[int], list[int]], causal: bool, dtype: torch.dtype
) -> None:
    """MLA scores rotary and latent parts together, planned and from its own plan once more."""
    batch = Latent(*case, dtype=dtype)
    first = batch.call(causal=causal)
    batch.check(first, causal)
    again = batch.call(causal=causal, reuse=True)
    assert torch.equal(first[0], again[0])


def test_mla_ignores_window_softcap_and_splits() -> None:
    """MLA has no window, softcap or number of splits to give, as in MATE."""
    batch = Latent([1, 1], [200, 10])
    plain = batch.call()
    assert torch.equal(batch.call(window_size=(3, 0), softcap=2.0, num_splits=7)[0], plain[0])


def test_mla_plans_really_split() -> None:
    """One long request is dealt to several parts."""
    batch = Latent([1], [1000])
    batch.call()
    plan = batch.workspace.view(torch.int32)
    assert plan[8 * mla_parts(1, 8) + 1] > 1


def test_dense_mla_queries_give_an_lse_like_the_queries() -> None:
    """Of 4-d queries MLA's LSE is ``(batch, seqlen_q, heads)``."""
    batch = Latent([2, 2], [100, 30])
    dense: dict[str, Any] = {
        "q": batch.rope.q.view(2, 2, 8, 64),
        "qv": batch.latent.q.view(2, 2, 8, 512),
    }
    out, lse = batch.call(**dense, cu_seqlens_q=None, max_seqlen_q=None, causal=True)
    assert lse.shape == (2, 2, 8)
    batch.check((out.flatten(0, 1), lse.flatten(0, 1).T), causal=True)


@pytest.mark.parametrize(
    ("planned", "used"),
    [
        (([1, 1], [700, 10]), ([1, 1], [10, 700])),
        (([1], [100]), ([1], [900])),
        (([1], [900]), ([1], [100])),
        (([1, 1], [300, 300]), ([1, 1, 1], [300, 300, 300])),
        (([1, 1], [300, 300]), ([64, 64], [300, 300])),
    ],
    ids=["other order", "more keys", "fewer keys", "larger batch", "more rows"],
)
def test_reusing_a_foreign_mla_plan_shows(planned: Any, used: Any) -> None:
    """A plan of another geometry gives NaN where the device would give garbage."""
    workspace = torch.full((4096,), 255, dtype=torch.uint8)
    Latent(*planned).call(workspace=workspace)
    out, _ = Latent(*used).call(workspace=workspace, reuse=True)
    assert out.isnan().any()


def test_reusing_an_unwritten_workspace_shows() -> None:
    """A workspace that nobody planned in gives nothing but NaN."""
    assert Latent([1, 1], [100, 10]).call(reuse=True)[0].isnan().all()


def test_mla_plan_size_follows_parts_and_batch() -> None:
    """32 bytes a part and 4 bytes a request and one more; parts fall with query tiles of 128."""
    assert mla_plan_bytes(3, 1, 128) == 32 * planning.MULTIPROCESSORS + 4 * 4
    assert mla_plan_bytes(3, 2, 128) == 32 * (planning.MULTIPROCESSORS // 2) + 4 * 4
    assert mla_parts(1000, 128) == 1
