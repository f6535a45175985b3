"""The plugin in SGLang's own processes: its loader, and servers that exit before they serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import clean_environment
from tests.support.warm import WarmPython

# SGLang's own loader -----------------------------------------------------------------------------

# One process imports SGLang and forks for each environment: each loads plugins afresh.
LOADER = """
import json, os, sys
from sglang_musa_ext.cpu.stand_ins import prepare_process
prepare_process()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins

def load(environment):
    os.environ.update(environment)
    before = set(sys.modules)
    load_plugins()
    fa3 = ATTENTION_BACKENDS["fa3"]
    name = f"{getattr(fa3, '__module__', '')}.{getattr(fa3, '__name__', '')}"
    result = {"fa3": name, "new": sorted(set(sys.modules) - before)}
    try:
        fa3(None)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return result

for environment in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        print("RESULT" + json.dumps(load(environment)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
LOADED: dict[str, dict[str, str]] = {
    "ours": {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "reference"},
    "idle": {"SGLANG_MUSA_EXT": "auto"},
    "off": {"SGLANG_MUSA_EXT": "off"},
    "bad": {"SGLANG_MUSA_EXT": "maybe"},
    "absent": {"SGLANG_MUSA_EXT": "on"},
}


@pytest.fixture(scope="module")
def loaded(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the installed entry point did in ``load_plugins``, by case of ``LOADED``."""
    command = [sys.executable, "-c", LOADER, json.dumps(list(LOADED.values()))]
    folder = tmp_path_factory.mktemp("loader")  # so that the checkout is not importable by chance
    done = warm.run(command, env=clean_environment(), cwd=folder, check=True)
    lines = [
        line.removeprefix("RESULT")
        for line in done.stdout.splitlines()
        if line.startswith("RESULT")
    ]
    return dict(zip(LOADED, map(json.loads, lines), strict=True))


def test_the_loader_finds_our_factory(loaded: dict[str, Any]) -> None:
    """The entry point is found by SGLang's own loader, in a process of its own."""
    assert loaded["ours"]["fa3"] == "sglang_musa_ext.plugin.create_musa_fa3_backend"


@pytest.mark.parametrize("case", ["idle", "off"])
def test_the_loader_leaves_fa3_alone(loaded: dict[str, Any], case: str) -> None:
    """Idle or off, upstream's own factory answers."""
    assert loaded[case]["fa3"].endswith("attention_registry.create_flashattention_v3_backend")


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("bad", ["SGLANG_MUSA_EXT='maybe'", "auto, on, off"]),
        ("absent", ["no MUSA device", "torchada"]),
    ],
)
def test_a_refusal_survives_the_loader(loaded: dict[str, Any], case: str, parts: list[str]) -> None:
    """SGLang swallows what a plugin raises; fa3 refuses all the same."""
    assert loaded[case]["error"].startswith("PluginError: ")
    for part in parts:
        assert part in loaded[case]["error"]


@pytest.mark.parametrize("case", LOADED)
def test_registering_imports_no_kernels(loaded: dict[str, Any], case: str) -> None:
    """Plugins load in the HTTP process too, which must not pull in attention kernels."""
    new = set(loaded[case]["new"])
    assert not {
        name
        for name in new
        if name.partition(".")[0] in ("sgl_kernel", "mate", "flash_attn_interface")
    }
    assert not {name for name in new if name.endswith("flashattention_backend")}
    assert "sglang_musa_ext.attention.selection" not in new
    assert "sglang_musa_ext.kernels.provider" not in new


# A real server -----------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    """A tiny random Llama, written where a server can load it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a tiny model."""
    return make_model(tmp_path_factory.mktemp("model"))


# Each costs a server start, so these are the two that differ in where they are found out;
# test_engine.py has more.
BAD_SERVERS = [
    pytest.param(
        {"SGLANG_MUSA_EXT": "maybe"},
        [],
        ["SGLANG_MUSA_EXT='maybe'", "auto, on, off"],
        id="bad-value",
    ),
    pytest.param(
        {},
        ["--attention-backend", "fa4"],
        ["--attention-backend fa4", "--attention-backend fa3"],
        id="fa4",
    ),
]


@pytest.mark.engine
@pytest.mark.parametrize(("variables", "options", "parts"), BAD_SERVERS)
def test_a_server_with_bad_input_exits_before_it_serves(
    warm: WarmPython,
    model: Path,
    tmp_path: Path,
    variables: dict[str, str],
    options: list[str],
    parts: list[str],
) -> None:
    """SGLang's server exits with an error that says what is wrong, and answers nothing."""
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model),
        "--skip-tokenizer-init",
    ]
    command += [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *options,
    ]
    environment = clean_environment(SGLANG_PLATFORM="musa_reference", **variables)
    done = warm.run(command, env=environment, cwd=tmp_path, timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    for part in parts:
        assert part in output
    assert "The server is fired up and ready to roll" not in output
