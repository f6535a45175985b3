"""Vision's FA3 on the simulated GPU: SGLang's own layer, on MATE's stand-in."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.support.engine import EngineServer

pytestmark = pytest.mark.engine

LENGTHS = (70, 300, 1)
"""Tokens of three images."""


def attend(mode: str) -> tuple[list[Any], list[Any]]:
    """Return SGLang's layer's and float64's outputs of three images, in ``mode``."""
    os.environ["SGLANG_MUSA_EXT"] = mode
    import torch
    from sglang.srt.layers.attention import vision
    from sglang.srt.plugins import load_plugins

    from sglang_musa_ext.validation import attention_float64

    load_plugins()
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 4, 80).half() for _ in range(3))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    layer = vision.VisionFlash3Attention(use_data_parallel=True)
    moved = (rows.to("musa") for rows in (q, k, v))
    out = layer(*moved, starts.to("musa"), bsz=len(LENGTHS), seq_len=max(LENGTHS))
    images = zip(*(torch.split(rows, list(LENGTHS)) for rows in (q, k, v)), strict=True)
    exact = [attention_float64.attention(*image, causal=False)[0] for image in images]
    return out.float().cpu().tolist(), torch.cat(exact).tolist()


def chosen() -> str:
    """Return SGLang's choice for images where no backend is named."""
    from types import SimpleNamespace

    from sglang.srt.layers.attention import vision

    vision.get_mm = lambda: SimpleNamespace(mm_attention_backend=None)
    backend: str = vision.VisionAttention._determine_attention_backend(None, None)
    return backend


def test_sglang_chooses_it_unasked(musa: EngineServer) -> None:
    """The layer below is that which SGLang takes on this device by itself."""
    assert musa.call(chosen) == "fa3"


def test_images_equal_float64(musa: EngineServer) -> None:
    """With this package the layer attends within each image, both ways."""
    import torch

    out, exact = (torch.tensor(rows).double() for rows in musa.call(attend, "auto"))
    assert torch.allclose(out, exact, atol=4e-3)


def test_sglang_alone_fails(musa: EngineServer) -> None:
    """Without it the name that the layer calls is not there."""
    with pytest.raises(Exception, match="flash_attn_func"):
        musa.call(attend, "off")
