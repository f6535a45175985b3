"""On an NVIDIA GPU, SGLang is exactly upstream unless ``SGLANG_MUSA_EXT=on``: installing this
package changes nothing.

Two environments differ in nothing but this package: a folder of links to every installed library,
and in one of them the unpacked wheel of this package beside it. A process in each
(:mod:`tests.nvidia_state`) imports torch, lets SGLang load its plugins, builds the FA3 backends
that a server with EAGLE builds, and describes them together with the code of every module of SGLang
that this package may touch. The descriptions must be equal.

On a machine with a Hopper GPU that is all of it. What stands in for one elsewhere, in both alike,
once torch is imported: ``torch.cuda`` describes an H100 that it does not have, and
``torch.version.cuda`` has a value, so SGLang takes its branches for CUDA; ``sgl_kernel``,
``flashinfer`` and ``torchvision`` are modules with any name in them. The model runner has what FA3
backends read. No kernel runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.upstream.rows import REQUIREMENTS
from tests.support import nvidia_state
from tests.support.isolation import NAME, differences, install_package, link_libraries

WITHOUT = "without"
IDLE = {"unset": {}, "auto": {envs.MODE: "auto"}, "off": {envs.MODE: "off"}}
"""Settings under which NVIDIA's users get upstream."""
ON = {envs.MODE: "on", envs.KERNELS: "hopper"}
UNLOADED = (
    "attention.selection", "attention.plans", "cpu.platform", "cpu.stand_ins", "cpu.trees",
    "kernels.provider",
    "kernels.reference",
)  # fmt: skip
"""Modules of ours that load torch or the attention of SGLang."""


@dataclass(frozen=True)
class State:
    """The state that a process reports, and what it printed."""

    answer: dict[str, Any]
    printed: str

    def at(self, *path: str) -> Any:
        """The part of the description under these keys."""
        value = self.answer
        for key in path:
            value = value[key]
        return value


def has_hopper() -> bool:
    """Return whether this machine has the GPU that is stood in for elsewhere."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def touched_modules() -> list[str]:
    """The importable modules that the contract names for the installed release."""
    version = importlib.metadata.version("sglang")
    modules = {
        row.module
        for row in REQUIREMENTS
        if row.holds_in(version) and row.module.startswith("sglang.")
    }
    return sorted(modules | {"sglang.srt.server_args"})


def run_process(scratch: Path, path: list[Path], settings: dict[str, str]) -> State:
    """One process that imports from ``path`` alone, under ``settings``."""
    scratch.mkdir()
    request = {
        "path": list(map(str, path)), "modules": touched_modules(), "stand_ins": not has_hopper(),
        "output": str(scratch / "answer.json"),
    }  # fmt: skip
    (scratch / "request.json").write_text(json.dumps(request))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SGLANG", "PYTHON", "TORCH"))
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", nvidia_state.__file__, scratch / "request.json"],
        env=inherited | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return State(json.loads((scratch / "answer.json").read_text()), done.stdout + done.stderr)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, State]:
    """Processes without the package, with it for each of :data:`IDLE`, and turned on."""
    root = tmp_path_factory.mktemp("nvidia")
    libraries, ours, nothing = root / "libraries", root / "ours", root / "nothing"
    nothing.mkdir()
    link_libraries(libraries, repository)
    install_package(ours, repository, tmp_path_factory.mktemp("sources"))
    runs = {
        WITHOUT: (nothing, {}),
        "on": (ours, ON),
        **{name: (ours, settings) for name, settings in IDLE.items()},
    }
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(run_process, root / name, [libraries, package], settings)
            for name, (package, settings) in runs.items()
        }
        return {name: run.result() for name, run in started.items()}


def compared(state: State) -> dict[str, Any]:
    return {key: value for key, value in state.answer.items() if key != "ours"}


@pytest.mark.parametrize("settings", IDLE)
def test_nvidia_users_get_upstream(states: dict[str, State], settings: str) -> None:
    """Classes, code, hooks, imports and environment are as in a process without the package."""
    assert list(differences(compared(states[WITHOUT]), compared(states[settings]))) == []


@pytest.mark.parametrize("settings", ["unset", "off"])
def test_nvidia_users_read_what_upstream_says(states: dict[str, State], settings: str) -> None:
    """Users who asked for nothing, or for ``off``, read the same lines as without the package."""
    assert states[settings].printed == states[WITHOUT].printed


def test_who_asks_is_answered_in_one_line(states: dict[str, State]) -> None:
    """A user of this package's variables reads why nothing changes, and nothing else."""
    without, lines = states[WITHOUT].printed.splitlines(), states["auto"].printed.splitlines()
    (line,) = [line for line in lines if NAME in line]
    assert "stays idle" in line
    assert [line for line in lines if NAME not in line] == without


def test_the_environments_differ_by_the_package(states: dict[str, State]) -> None:
    """One process lacks the package; in the others its entry points were really called."""
    assert states[WITHOUT].at("ours") == []
    for name in IDLE:
        assert {f"{NAME}.plugin", f"{NAME}.guard"} <= set(states[name].at("ours"))
        assert not {f"{NAME}.{module}" for module in UNLOADED} & set(states[name].at("ours"))


def test_what_is_compared_is_upstreams_path_for_nvidia(states: dict[str, State]) -> None:
    """The stand-ins lead to what an NVIDIA GPU gets: FA3, for target and drafts."""
    upstream = "sglang.srt.layers.attention.flashattention_backend"
    backends = {name: made["classes"][0] for name, made in states[WITHOUT].at("backends").items()}
    many = backends.pop("draft decode")
    assert many == f"{upstream}.FlashAttentionMultiStepBackend"
    assert set(backends.values()) == {f"{upstream}.FlashAttentionBackend"}
    assert len(backends) == 2 + nvidia_state.SPECULATIVE_STEPS - 1
    assert "sgl_kernel.flash_attn" in states[WITHOUT].at("imported")


def test_the_comparison_sees_the_package_at_work(states: dict[str, State]) -> None:
    """With ``SGLANG_MUSA_EXT=on``, every backend is ours, and each changed place shows."""
    backends = {name: made["classes"][0] for name, made in states["on"].at("backends").items()}
    assert (
        backends.pop("draft decode") == f"{NAME}.attention.selection.MusaFA3MultiStepDraftBackend"
    )
    assert set(backends.values()) == {f"{NAME}.attention.selection.MusaFA3Backend"}
    lines = list(differences(compared(states[WITHOUT]), compared(states["on"])))
    attention = "/modules/sglang.srt.layers.attention"
    for place in (
        f"{attention}.attention_registry/ATTENTION_BACKENDS/\"'fa3'\"",
        f"{attention}.attention_registry/ATTENTION_BACKENDS/\"'fa4'\"",
        f"{attention}.flashattention_backend/flash_attn_with_kvcache",
        f"{attention}.flashattention_backend/flash_attn_varlen_func",
        f"{attention}.flashattention_backend/FlashAttentionBackend/members/__init__",
        "/modules/sglang.srt.speculative.draft_utils/DraftBackendFactory/members/_create_fa_decode_backend",
        "/modules/sglang.srt.speculative.draft_utils/DraftBackendFactory/members/_create_fa_prefill_backend",
        "/modules/sglang.srt.speculative.dflash_utils/_DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS",
        "/modules/sglang.srt.managers.scheduler/Scheduler/members/get_internal_state",
        "/backends/target/attributes/flash_attn_with_kvcache",
        "/meta path",
    ):
        assert any(line.startswith(f"{place}:") for line in lines), place
