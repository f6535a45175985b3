"""The refusals of a backend at start, by the model's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_musa_ext import policy
from sglang_musa_ext.kernels.provider import UnsupportedByKernels, reference_kernels
from sglang_musa_ext.upstream.limits import head_dims_of
from tests.support import backend
from tests.support.backend import Model
from tests.support.layers import uniform_layers

MLA = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}


@pytest.mark.parametrize(
    ("config", "use_mla", "pairs"),
    [
        ({"head_dim": 128, "v_head_dim": 128}, False, {(128, 128)}),
        (
            {"head_dim": 192, "v_head_dim": 128, "swa_head_dim": 64, "swa_v_head_dim": 64},
            False,
            {(192, 128), (64, 64)},
        ),
        ({"head_dim": 80}, False, {(80, 80)}),
        ({"head_dim": 0, "v_head_dim": 0}, False, set()),
        (MLA | {"head_dim": 256}, True, {(192, 128)}),
        ({"head_dim": 128, "qk_rope_head_dim": 64, "kv_lora_rank": 512}, True, set()),
        (MLA | {"head_dim": 256}, False, set()),
    ],
    ids=["plain", "windows", "no values", "no attention", "MLA", "MLA alone", "MLA in full"],
)
def test_head_dims_are_read_off_the_models_configuration(
    config: dict[str, Any], use_mla: bool, pairs: set[tuple[int, int]]
) -> None:
    """Placeholders are left out, and each kind of layer has a pair of its own."""
    assert head_dims_of(SimpleNamespace(**config), use_mla) == pairs


def test_head_dims_without_a_kernel_are_refused_at_start() -> None:
    """The server does not start, rather than fail at its first forward."""
    model = Model(uniform_layers(1))
    runner = model.runner()
    runner.model_config.head_dim, runner.model_config.v_head_dim = 64, 256
    with pytest.raises(UnsupportedByKernels, match=r"64/256.*--attention-backend"):
        backend.attention.MusaFA3Backend(runner)


def test_batches_that_cannot_be_planned_are_refused_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MATE 0.1.3 plans for 992 requests; a pool of more is refused with the option."""
    old = reference_kernels(release=(0, 1, 3))
    monkeypatch.setattr(backend.mixin, "select_kernels", lambda settings, device: old)
    runner = Model(uniform_layers(1)).runner()
    runner.req_to_token_pool.size = 992
    backend.attention.MusaFA3Backend(runner)
    runner.req_to_token_pool.size = 993
    with pytest.raises(UnsupportedByKernels, match="--max-running-requests 992"):
        backend.attention.MusaFA3Backend(runner)


def test_the_mixin_says_the_page_size() -> None:
    """It is the one that ``policy`` holds for the processes that import no attention."""
    assert backend.mixin.MusaFA3Mixin.default_page_size == policy.PAGE_SIZE == 64
