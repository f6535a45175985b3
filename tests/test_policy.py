"""The one place that says which kernels serve what, and why not."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_musa_ext import policy
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.policy import choose_kernels, choose_service
from sglang_musa_ext.upstream.limits import Configuration


@pytest.mark.parametrize(
    ("settings", "on_musa", "kernels"),
    [
        ({"mode": "off"}, True, None),
        ({}, True, "mate"),
        ({}, False, None),
        ({"mode": "on"}, False, None),
        ({"mode": "on"}, True, "mate"),
        ({"kernels": "reference"}, True, "reference"),
        ({"kernels": "hopper"}, False, None),
        ({"mode": "on", "kernels": "hopper"}, False, "hopper"),
        ({"mode": "on", "kernels": "reference"}, False, "reference"),
        ({"mode": "on", "kernels": "mate"}, False, None),
        ({"platform": "musa_reference"}, False, "reference"),
        ({"platform": "musa_reference", "mode": "off"}, False, None),
        ({"platform": "another"}, False, None),
    ],
)
def test_which_kernels_serve_a_process(
    settings: dict[str, Any], on_musa: bool, kernels: str | None
) -> None:
    """Kernels serve where a device for them is or was named; elsewhere a reason says why not."""
    choice = choose_service(Settings(**settings), on_musa=on_musa)
    assert choice.kernels == kernels
    assert bool(choice.reasons) == (kernels is None)


def test_kernels_named_without_a_device_say_what_they_lack() -> None:
    """Naming kernels alone does not turn this package on, and the reasons say so."""
    choice = choose_service(Settings(kernels="hopper"), on_musa=False)
    assert "SGLANG_MUSA_EXT_KERNELS=hopper takes effect with SGLANG_MUSA_EXT=on" in choice.reasons


@pytest.mark.parametrize(
    ("named", "device", "kernels"),
    [
        ("auto", "musa", "mate"),
        ("auto", "cpu", "reference"),
        ("auto", "cuda", None),
        ("reference", "cuda", "reference"),
        ("hopper", "cpu", "hopper"),
    ],
)
def test_kernels_of_a_device(named: str, device: str, kernels: str | None) -> None:
    """``auto`` takes the device's own; a name is taken as it is, for the kernels to judge."""
    assert choose_kernels(Settings(kernels=named), device).kernels == kernels


FP8_CACHE: dict[str, Any] = {"kv_cache_dtype": "fp8_e4m3", "mate": (0, 2, 7)}
"""A cache that newer releases of MATE read."""


LATENT_FLOAT16: dict[str, Any] = {
    "dtype": "float16",
    "use_mla": True,
    "on_musa": True,
    "architectures": ("DeepseekV3ForCausalLM",),
}
"""A model whose first decode ends the server, on any backend."""
GEMMA_3: dict[str, Any] = {"architectures": ("Gemma3ForConditionalGeneration",)}


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"other_platform": True}, "platform plugin"),
        ({"architectures": ("WhisperForConditionalGeneration",)}, "Whisper"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "before 0.2.3, and its release is not known"),
        ({"kv_cache_dtype": "fp8_e4m3", "mate": (0, 2, 2)}, "before 0.2.3, and this is 0.2.2"),
        ({"kv_cache_dtype": "fp8_e5m2", "mate": (0, 2, 5)}, "triton in place of fa3"),
        (FP8_CACHE | {"use_mla": True}, "MLA"),
        (FP8_CACHE | {"dtype": "float16"}, "float16"),
        (FP8_CACHE | {"head_dims": frozenset({(128, 128), (512, 512)})}, "above 256"),
        ({"kv_cache_dtype": "mxfp8", "mate": (0, 2, 7)}, "--kv-cache-dtype mxfp8"),
        ({"dtype": "float32"}, "--dtype float32"),
        ({"use_mla": True, "page_size": 1}, "--page-size 1"),
        ({"use_mla": True, "topk": 4}, "--speculative-eagle-topk"),
        ({"has_sinks": True}, "sinks"),
        ({"head_dims": frozenset({(640, 640)})}, "640/640"),
        ({"head_dims": frozenset({(192, 192)}), "mate": (0, 1, 3)}, "192/192"),
        ({"is_encoder_decoder": True, "max_running_requests": 1}, "encoder-decoder"),
        ({"has_sliding_windows": True, "topk": 4}, "sliding windows"),
        ({"dtype": "float16", "kv_cache_dtype": "bfloat16"}, "float16"),
        (LATENT_FLOAT16, "in float16 on MUSA"),
        (GEMMA_3 | {"takes_images": True}, "both ways"),
        ({"architectures": ("InklingForConditionalGeneration",)}, "Inkling"),
        ({"capability": (2, 2)}, "2.2"),
    ],
)
def test_a_rule_against_fa3_names_what_it_is_about(asked: dict[str, Any], word: str) -> None:
    """Each rule speaks where it applies, and alone."""
    (reason,) = policy.reasons_against_fa3(Configuration(**asked))
    assert word in reason


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"page_size": 1},
        {"page_size": 1, "is_encoder_decoder": True, "max_running_requests": 1},
        {"page_size": 1, "has_sliding_windows": True, "topk": 4},
        {"has_sliding_windows": True},
        GEMMA_3,
        {"head_dims": frozenset({(192, 192), (80, 80)}), "mate": (0, 2, 0)},
        {"use_mla": True},
        {"use_mla": True, "page_size": 64, "topk": 1},
        {"topk": 4},
        # The limit of its drafts' graphs in two releases is less than what Triton lacks there.
        {"speculative_algorithm": "EAGLE", "topk": 1},
        FP8_CACHE,
        FP8_CACHE | {"head_dims": frozenset({(256, 256)}), "dtype": "bfloat16"},
        FP8_CACHE | {"mate": (0, 2, 3)},
        {"dtype": "bfloat16", "kv_cache_dtype": "auto", "capability": (3, 1)},
    ],
)
def test_fa3_is_the_default_where_no_rule_is_against_it(asked: dict[str, Any]) -> None:
    """The rules leave alone what they are not about."""
    assert policy.reasons_against_fa3(Configuration(**asked)) == ()


def test_every_reason_is_given() -> None:
    """A user who changes one option learns of the next before the next start."""
    asked = Configuration(dtype="float32", kv_cache_dtype="fp8_e5m2", capability=(2, 1))
    reasons = "; ".join(policy.reasons_against_fa3(asked))
    assert all(word in reasons for word in ("triton", "--dtype float32", "before 0.2.5", "2.1"))


@pytest.mark.parametrize(
    ("named", "architecture", "taken"),
    [
        ("triton", "Olmo2ForCausalLM", True),
        ("triton", "Llama4ForCausalLM", True),
        ("flashinfer", "Olmo2ForCausalLM", False),
        ("triton", "MiniMaxM3SparseForCausalLM", False),
        ("dsa", "DeepseekV32ForCausalLM", False),
    ],
)
def test_what_upstream_names_for_a_model_stays_but_where_it_means_no_device_of_ours(
    named: str, architecture: str, taken: bool
) -> None:
    """Triton gives way for models that upstream itself puts on fa3 where it has it."""
    asked = Configuration(architectures=(architecture,))
    reasons = policy.reasons_against_fa3_in_place_of(named, asked)
    assert (reasons == ()) == taken
    assert taken or named in reasons[0]


@pytest.mark.parametrize(
    ("kernels", "visible", "device"),
    [
        ("auto", "musa", "musa"),
        ("auto", "cuda", "cpu"),
        ("mate", "cuda", "musa"),
        ("hopper", "musa", "cuda"),
        ("reference", "musa", "cpu"),
    ],
)
def test_device_of_kernels(kernels: str, visible: str, device: str) -> None:
    """Named kernels say their device; others run where some serve unasked, a CPU at the last."""
    assert policy.device_for(kernels, lambda kind: kind == visible) == device
