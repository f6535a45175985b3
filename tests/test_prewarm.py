"""The command that has a model's kernels compiled before its first request."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs, policy, prewarm
from sglang_musa_ext.kernels.provider import FA3Kernels, reference_kernels
from sglang_musa_ext.kernels.reference.planning import launched_splits, resolve_mask, tile_shape

QWEN = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the calls that the command makes on the reference kernels."""
    monkeypatch.setenv(envs.KERNELS, "reference")
    seen: list[dict[str, Any]] = []
    kernels = reference_kernels()

    def recording(name: str) -> Any:
        function = getattr(kernels, name)

        def call(**arguments: Any) -> Any:
            seen.append(arguments)
            return function(**arguments)

        return call

    names = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata")
    record = dataclasses.replace(kernels, **{name: recording(name) for name in names})
    monkeypatch.setattr(prewarm, "_kernels", lambda: (record, prewarm_device()))
    return seen


def prewarm_device() -> Any:
    import torch

    return torch.device("cpu")


def test_every_query_tile_is_called(recorded: list[dict[str, Any]], tmp_path: Path) -> None:
    """Decode, prefill over a cache and over raw keys are called for each tile that MATE has."""
    assert prewarm.main(["--model", str(write_model(tmp_path, SMALL))]) == 0
    for function in ("k_cache", "k"):
        tiles = {
            (tile.query, tile.packed)
            for call in recorded
            if function in call
            for tile in [tile_shape(call["max_seqlen_q"], 2, 64, 64)]
        }
        packed = {(rows, True) for rows in prewarm.QUERY_TILES}
        # Below 129 rows two heads of a key head are packed, so that smaller tiles have none.
        assert tiles == packed | {(192, False), (256, False)}


def test_every_size_of_a_plan_is_called(recorded: list[dict[str, Any]], tmp_path: Path) -> None:
    """MATE compiles a planning kernel for each 31 requests."""
    model = str(write_model(tmp_path, SMALL))
    assert prewarm.main(["--model", model, "--max-running-requests", "100"]) == 0
    batches = {call["batch_size"] for call in recorded if "batch_size" in call}
    assert {-(-batch // 31) for batch in batches} == {1, 2, 3, 4}
    assert max(batches) == 100


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN, [prewarm.LayerKind(8, 4, 128, 128)]),
        ({"text_config": SMALL}, [prewarm.LayerKind(2, 1, 64, 64)]),
        (QWEN | {"num_key_value_heads": 1}, [prewarm.LayerKind(8, 1, 128, 128)]),
        (
            QWEN | {"sliding_window": 128, "architectures": ["GptOssForCausalLM"]},
            [
                prewarm.LayerKind(8, 4, 128, 128, has_sinks=True),
                prewarm.LayerKind(8, 4, 128, 128, window_size=(127, 0), has_sinks=True),
            ],
        ),
        (
            QWEN | {"sliding_window": 128, "use_sliding_window": False},
            [prewarm.LayerKind(8, 4, 128, 128)],
        ),
        (
            QWEN | {"attn_logit_softcapping": 50.0},
            [prewarm.LayerKind(8, 4, 128, 128, softcap=50.0)],
        ),
    ],
    ids=["plain", "text part", "one key head", "sinks", "unused window", "softcap"],
)
def test_layers_are_read_off_a_models_configuration(
    config: dict[str, Any], expected: list[prewarm.LayerKind]
) -> None:
    """Heads are those of one of two ranks; each window has layers of its own."""
    assert prewarm.layer_kinds(config, tp=2) == expected


def test_an_fp8_cache_has_kernels_of_its_own(
    recorded: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Queries, cache and plans are fp8, and nothing goes over raw keys, which are half."""
    model = str(write_model(tmp_path, SMALL))
    assert prewarm.main(["--model", model, "--kv-cache-dtype", "fp8_e4m3"]) == 0
    paged = [call for call in recorded if "k_cache" in call]
    plans = [call for call in recorded if "batch_size" in call]
    assert len(paged) + len(plans) == len(recorded)
    dtypes = {call[name].dtype for call in paged for name in ("q", "k_cache", "v_cache")}
    assert dtypes == {call["qkv_dtype"] for call in plans} == {torch.float8_e4m3fn}


def test_calls_are_made_with_and_without_a_plan(
    recorded: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A server plans calls that are split, and leaves out the plan of others."""
    assert prewarm.main(["--model", str(write_model(tmp_path, SMALL))]) == 0
    paged = [call for call in recorded if "k_cache" in call]
    rows: dict[bool, set[int]] = {True: set(), False: set()}
    for call in paged:
        rows["scheduler_metadata" in call].add(call["max_seqlen_q"])
    assert rows[True] == rows[False]
    plans = [call for call in recorded if call.get("batch_size") == 1]
    assert {call["max_seqlen_q"] for call in plans if launched_splits(**call) > 1} >= {1}


@pytest.mark.parametrize("window", [128, 4096, 40000])
def test_a_window_is_no_wider_than_what_there_is_room_for(
    recorded: list[dict[str, Any]], tmp_path: Path, window: int
) -> None:
    """MATE has kernels for windows, and takes those without where no key can be outside."""
    config = SMALL | {"sliding_window": window}
    model = str(write_model(tmp_path, config))
    assert prewarm.main(["--model", model, "--max-running-requests", "1"]) == 0
    paged = [call for call in recorded if "k_cache" in call]
    narrow = [call for call in paged if call["window_size"] != (-1, -1)]
    assert 2 * len(narrow) == len(paged)
    for call in narrow:
        room = call["page_table"].shape[1] * call["k_cache"].shape[1]
        assert resolve_mask(call["max_seqlen_q"], room, True, call["window_size"], 0).local


def test_a_call_with_sinks_has_no_plan(recorded: list[dict[str, Any]], tmp_path: Path) -> None:
    """MATE ignores a plan there, so that planning kernels are not compiled for it."""
    config = SMALL | {"architectures": ["GptOssForCausalLM"]}
    assert prewarm.main(["--model", str(write_model(tmp_path, config))]) == 0
    assert not any("batch_size" in call for call in recorded)


@pytest.mark.parametrize(
    ("config", "match"),
    [({"kv_lora_rank": 512}, "compiled in advance"), ({}, "num_attention_heads")],
    ids=["MLA", "no text"],
)
def test_a_model_that_it_cannot_serve_is_named(
    tmp_path: Path, config: dict[str, Any], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 2, and the reason is said."""
    assert prewarm.main(["--model", str(write_model(tmp_path, config))]) == 2
    assert match in capsys.readouterr().err


def test_a_missing_mate_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the kernels there is nothing to compile."""
    monkeypatch.setenv(envs.KERNELS, "hopper")
    monkeypatch.setattr(policy, "DEVICE_OF_KERNELS", {"hopper": "cpu"})
    assert prewarm.main(["--model", str(write_model(tmp_path, SMALL))]) == 2
    assert "'hopper' kernels run on an NVIDIA GPU" in capsys.readouterr().err


def test_a_call_that_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each failure is named, and the exit status is 1."""
    monkeypatch.setenv(envs.KERNELS, "reference")

    def make(kernels: FA3Kernels, device: Any, call: prewarm.Call) -> None:
        if call.over_raw_keys:
            raise RuntimeError("mcc ended with 1")

    monkeypatch.setattr(prewarm, "make", make)
    assert prewarm.main(["--model", str(write_model(tmp_path, SMALL))]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("failed: raw keys")]
    assert failed
    assert len(failed) < len(lines)
    assert "RuntimeError: mcc ended with 1" in failed[0]
