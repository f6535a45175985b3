"""Vision's FA3 on the simulated GPU, on MATE's stand-in: SGLang's own layer, and an engine with a
model that sees images.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from tests.simulated_musa import cases, stand_ins
from tests.simulated_musa.cases import MusaCase, run_case
from tests.support import image_models
from tests.support.engine import EngineFailed, EngineRun, EngineServer, Request

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


# --- an engine with images ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> MusaCase:
    """Requests about no image, one and two, whose windows are not full."""
    folder = tmp_path_factory.mktemp("images")
    wide = str(image_models.write_image(folder / "wide.png", 9, 4, seed=1))
    tall = str(image_models.write_image(folder / "tall.png", 3, 11, seed=2))
    both = Request(image_models.prompt("Compare", 2), image=(wide, tall))
    phases = (
        (both, Request(image_models.prompt("Nothing", 0))),
        (Request(image_models.prompt("Describe"), image=(tall,)),),
        (both,),
    )
    model = image_models.qwen_2_5_vl()
    return MusaCase("Qwen2.5-VL", model, phases, {"disable_fast_image_processor": True})


@pytest.fixture(scope="module")
def log_and_run(musa: EngineServer, case: MusaCase) -> tuple[str, EngineRun]:
    """What the engine logs, and its answers."""
    run = run_case(musa, case, before_boot=stand_ins.collectives_and_noted_images)
    return musa.last_log.read_text(), run


@pytest.fixture(scope="module")
def run(log_and_run: tuple[str, EngineRun]) -> EngineRun:
    """The engine's answers."""
    return log_and_run[1]


def worst(musa: EngineServer, case: MusaCase, run: EngineRun, *, backwards: bool = False) -> float:
    """Return how much less probable the worst token is than transformers' own after the same text
    and images; ``backwards``: after the images in the other order.
    """
    order = -1 if backwards else 1
    answers = [
        (request.prompt, (request.image or ())[::order], output.tokens)
        for request, output in zip(case.requests, run.outputs, strict=True)
    ]
    gaps: list[float] = musa.call(image_models.shortfalls, musa.model(case.model), answers)
    return max(gaps)


def test_answers_about_images_are_transformers(
    musa: EngineServer, case: MusaCase, run: EngineRun
) -> None:
    """Every token is transformers' choice after the same text and images, or as good as it."""
    assert [len(output.tokens) for output in run.outputs] == [8, 8, 8, 8]
    assert worst(musa, case, run) <= case.limit


def test_answers_depend_on_the_images(musa: EngineServer, case: MusaCase, run: EngineRun) -> None:
    """The same answers are wrong about the same images in another order."""
    assert worst(musa, case, run, backwards=True) > 3 * case.limit


def test_images_and_text_are_served_by_ours(log_and_run: tuple[str, EngineRun]) -> None:
    """Each image's layers attend on MATE's kernels, and the text is served by this package."""
    log, run = log_and_run
    cases.require_ours_on_mate(run)
    assert log.count("vision attention on mate, musa:0") >= 2
    assert log.count("vision attention on ") == log.count("vision attention on mate, musa:0")


@pytest.mark.long
def test_sglang_alone_answers_nothing_about_images(musa: EngineServer, case: MusaCase) -> None:
    """Without this package the first image ends the server."""
    with pytest.raises(EngineFailed) as failure:
        run_case(musa, replace(case, phases=case.phases[1:2]), environ={"SGLANG_MUSA_EXT": "off"})
    assert "NameError: name 'flash_attn_func' is not defined" in failure.value.log
