"""The doctor on stand-in machines: folders with the vendor's names, versions and wheel tags."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.doctor import command as doctor
from sglang_musa_ext.doctor import surroundings
from sglang_musa_ext.doctor.command import CHECKS, main, run_checks
from sglang_musa_ext.doctor.packages import pinned_torch
from sglang_musa_ext.doctor.results import EXIT_CODES, CheckResult, CheckStatus
from sglang_musa_ext.doctor.surroundings import Check, Surroundings
from sglang_musa_ext.upstream import check, releases

BY_NAME = {check.name: check for check in CHECKS}
TORCH = """
import types
version = types.SimpleNamespace(musa="5.2.0")
DEVICES = [("MTT S5000", (3, 1), 60 << 30, 80 << 30)]
musa = types.SimpleNamespace(
    device_count=lambda: len(DEVICES),
    get_device_name=lambda index: DEVICES[index][0],
    get_device_capability=lambda index: DEVICES[index][1],
    mem_get_info=lambda index: DEVICES[index][2:],
)
"""
MATE_SUMMARY = "MUSA AI Tensor Engine"


class Machine:
    """A folder in front of the search path that holds what a machine has installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ: dict[str, str] = {
            "PATH": str(folder / "bin"),
            "MUSA_HOME": str(folder / "musa"),
        }

    def write(self, path: str, text: str = "") -> None:
        """Write a file of the machine."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        importlib.invalidate_caches()

    def install(
        self,
        name: str,
        version: str,
        files: dict[str, str] | None = None,
        tag: str = "py3-none-any",
    ) -> None:
        """Install a distribution with its files, in place of another version of it."""
        self.uninstall(name)
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        for path, text in (files or {}).items():
            self.write(path, text)
        self.write(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.write(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        self.write(
            f"{info}/RECORD",
            "".join(f"{path},,\n" for path in [*(files or {}), f"{info}/METADATA"]),
        )

    def uninstall(self, name: str) -> None:
        """Remove the distribution's metadata."""
        for info in self.folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            for path in info.iterdir():
                path.unlink()
            info.rmdir()
        importlib.invalidate_caches()

    def tool(self, text: str) -> None:
        """Install the driver's tool."""
        self.write("bin/mthreads-gmi", f"#!/bin/sh\n{text}\n")
        (self.folder / "bin/mthreads-gmi").chmod(0o755)

    def ask(self, check: str, *command: str) -> CheckResult:
        """The answer of one check; with ``command``, the arguments of a server."""
        surroundings = Surroundings(dict(self.environ), list(command) or None)
        return run_checks(surroundings, [BY_NAME[check]])[0]


SUBJECTS = ("sglang", "sglang-musa-ext")
"""Distributions of the environment that the doctor is to see: the ones under test."""
NEIGHBOURS = ("nvidia-nccl-cu13", "torch_musa", "mate-flash-attention", "deep-gemm")
"""Distributions that an environment may hold, which no check of a machine made here may notice."""


@pytest.fixture(autouse=True)
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put distributions on the search path that stand for whatever else is installed here."""
    environment = Machine(tmp_path_factory.mktemp("environment"))
    for name in NEIGHBOURS:
        environment.install(name, "0.0.1")
    # Not by monkeypatch, which restores a path that a test prepends to as it was with this folder.
    sys.path.append(str(environment.folder))
    yield
    sys.path.remove(str(environment.folder))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with the public torch of the installed SGLang, and nothing of the vendor's."""
    discover = importlib.metadata.Distribution.discover

    def discover_here(**wanted: Any) -> Iterator[importlib.metadata.Distribution]:
        """Find the distributions of the machine's folder, and those under test."""
        for distribution in discover(**wanted):
            is_of_machine = Path(str(distribution.locate_file(""))) == tmp_path
            if is_of_machine or distribution.metadata["Name"] in SUBJECTS:
                yield distribution

    monkeypatch.setattr(importlib.metadata.Distribution, "discover", discover_here)
    # What other tests imported would be found where it is, not on this machine's path.
    for name in ("sglang", "triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    machine = Machine(tmp_path)
    machine.install("torch", f"{pinned_torch()}")
    return machine


@pytest.fixture
def musa(machine: Machine) -> Machine:
    """A machine with a complete MUSA stack, of the torch of the installed SGLang."""
    torch = f"{pinned_torch()}.post2+musa5.2.0"
    machine.install("torch", torch, {"torch/__init__.py": TORCH})
    machine.install("torch_musa", torch, {"torch_musa/__init__.py": ""})
    machine.install("torchada", "0.1.81", {"torchada/__init__.py": ""})
    machine.install("torchvision", "0.26.0.post2+musa5.2.0")
    machine.install("apache-tvm-ffi", "0.1.11.post1+musa.1")
    machine.install("deep-gemm", "0.2.7+musa")
    machine.install(
        "triton", "3.2.0", {"triton/__init__.py": "", "triton/backends/mtgpu/driver.py": ""}
    )
    files = dict.fromkeys(("mate/__init__.py", "mate/mha_interface.py", "mate/jit/__init__.py"), "")
    machine.install("mate", "0.2.7", files)
    machine.install("flash_attn_3", "0.2.7+musa", {"flash_attn_interface.py": "import mate\n"})
    machine.write("musa/include/musa.h", "#define MUSA_VERSION 50200\n")
    machine.tool("echo 'Driver Version: 3.3.1'")
    return machine


def change_devices(machine: Machine, devices: str) -> None:
    machine.write(
        "torch/__init__.py", TORCH.replace('[("MTT S5000", (3, 1), 60 << 30, 80 << 30)]', devices)
    )


# The checks, each on a machine with one thing wrong
# ------------------------------------------------------


@pytest.mark.parametrize("check", [name for name in BY_NAME if name != "python"])
def test_a_complete_machine_passes(musa: Machine, check: str) -> None:
    """Every check passes where all is as the vendor publishes it."""
    result = musa.ask(check)
    assert (result.status, result.next_step) == (CheckStatus.PASS, ""), result.finding


Change = Callable[[Machine], None]
WRONG: dict[str, tuple[str, CheckStatus, Change, list[str]]] = {
    "driver tool missing": (
        "driver",
        CheckStatus.WARN,
        lambda m: (m.folder / "bin/mthreads-gmi").unlink(),
        ["mthreads-gmi"],
    ),
    "driver broken": ("driver", CheckStatus.FAIL, lambda m: m.tool("exit 9"), ["status 9"]),
    "driver tool crashes": (
        "driver",
        CheckStatus.FAIL,
        lambda m: m.tool("kill -9 $$"),
        ["mthreads-gmi"],
    ),
    "toolkit too old": (
        "toolkit",
        CheckStatus.FAIL,
        lambda m: m.write("musa/include/musa.h", "#define MUSA_VERSION 40305\n"),
        ["4.3.5", "4.3.6"],
    ),
    "toolkit without chunks": (
        "toolkit",
        CheckStatus.WARN,
        lambda m: m.write("musa/include/musa.h", "#define MUSA_VERSION 40306\n"),
        ["4.3.6", "chunks"],
    ),
    "toolkit missing": (
        "toolkit",
        CheckStatus.WARN,
        lambda m: m.environ.update(MUSA_HOME="/nowhere"),
        ["/nowhere"],
    ),
    "toolkit unreadable": (
        "toolkit",
        CheckStatus.WARN,
        lambda m: m.write("musa/include/musa.h", "\n"),
        ["musa.h"],
    ),
    "no device": ("device", CheckStatus.FAIL, lambda m: change_devices(m, "[]"), ["no device"]),
    "old device": (
        "device",
        CheckStatus.FAIL,
        lambda m: change_devices(m, '[("MTT S4000", (2, 2), 1 << 30, 1 << 30)]'),
        ["MTT S4000", "MP 2.2", "3.1"],
    ),
    "device in use": (
        "device",
        CheckStatus.WARN,
        lambda m: change_devices(m, '[("MTT S5000", (3, 1), 1 << 30, 80 << 30)]'),
        ["1024 MiB of 81920 MiB free"],
    ),
    "torch crashes": (
        "device",
        CheckStatus.FAIL,
        lambda m: m.write("torch/__init__.py", "import os\nos.abort()\n"),
        ["does not answer"],
    ),
    "torch_musa does not import": (
        "device",
        CheckStatus.FAIL,
        lambda m: m.write("torch_musa/__init__.py", "raise OSError('libmusa.so: cannot open')\n"),
        ["libmusa.so"],
    ),
    "another torch": (
        "torch",
        CheckStatus.FAIL,
        lambda m: m.install("torch", "2.7.0+musa5.2.0"),
        ["different releases"],
    ),
    "public torch": (
        "torch",
        CheckStatus.FAIL,
        lambda m: m.install("torch", f"{pinned_torch()}"),
        ["torch_musa is the vendor's build"],
    ),
    "public triton": (
        "triton",
        CheckStatus.FAIL,
        lambda m: (m.folder / "triton/backends/mtgpu/driver.py").rename(
            m.folder / "triton/driver.py"
        ),  # type: ignore[dict-item]
        ["none for MUSA"],
    ),
    "squatting mate": (
        "mate",
        CheckStatus.FAIL,
        lambda m: (m.folder / "mate/mha_interface.py").unlink(),
        ["mate", "not Moore Threads' MATE", "0.2.7"],
    ),
    "no wrapper": (
        "mate",
        CheckStatus.FAIL,
        lambda m: (m.folder / "flash_attn_interface.py").unlink(),
        ["flash_attn_interface"],
    ),
    "two generations of the wrapper": (
        "mate",
        CheckStatus.WARN,
        lambda m: m.install("mate-flash-attention", "0.1.3"),
        ["mate-flash-attention"],
    ),
    "public deep-gemm": (
        "collisions",
        CheckStatus.FAIL,
        lambda m: m.install("deep-gemm", "1.0.0"),
        ["deep-gemm 1.0.0"],
    ),
    "public tvm-ffi": (
        "collisions",
        CheckStatus.FAIL,
        lambda m: m.install("apache-tvm-ffi", "0.1.11"),
        ["apache-tvm-ffi 0.1.11"],
    ),
    "CUDA packages": (
        "collisions",
        CheckStatus.WARN,
        lambda m: m.install("nvidia-cudnn-cu12", "9.1"),
        ["nvidia-cudnn-cu12"],
    ),
    "wheel of another python": (
        "python",
        CheckStatus.FAIL,
        lambda m: m.install("mate", "0.2.7", tag="cp39-cp39-linux_x86_64"),
        ["mate"],
    ),
    "unknown value": (
        "settings",
        CheckStatus.FAIL,
        lambda m: m.environ.update(SGLANG_MUSA_EXT_KERNELS="cutlass"),
        ["cutlass", "auto, mate, hopper, reference"],
    ),
    "misspelt variable": (
        "settings",
        CheckStatus.FAIL,
        lambda m: m.environ.update(SGLANG_MUSA_EXT_KERNEL="mate"),
        ["SGLANG_MUSA_EXT_KERNEL=", "SGLANG_MUSA_EXT_KERNELS?"],
    ),
    "filtered": (
        "plugin",
        CheckStatus.FAIL,
        lambda m: m.environ.update(SGLANG_PLUGINS="a, b"),
        ["SGLANG_PLUGINS=a,b", "Set SGLANG_PLUGINS=a,b,musa_ext"],
    ),
    "platform filtered": (
        "plugin",
        CheckStatus.FAIL,
        lambda m: m.environ.update(SGLANG_PLUGINS="musa_ext", SGLANG_PLATFORM="musa_reference"),
        ["musa_reference"],
    ),
    "another platform": (
        "plugin",
        CheckStatus.FAIL,
        lambda m: m.environ.update(SGLANG_PLATFORM="kunlun"),
        ["SGLANG_PLATFORM=kunlun"],
    ),
    "off": (
        "plugin",
        CheckStatus.WARN,
        lambda m: m.environ.update(SGLANG_MUSA_EXT="off"),
        ["SGLANG_MUSA_EXT=off"],
    ),
    "guard turned off": (
        "plugin",
        CheckStatus.WARN,
        lambda m: m.environ.update(SGLANG_MUSA_EXT="on", TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        ["TORCH_DEVICE_BACKEND_AUTOLOAD=0"],
    ),
}


@pytest.mark.parametrize(("check", "status", "change", "parts"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(
    musa: Machine, check: str, status: CheckStatus, change: Change, parts: list[str]
) -> None:
    """One change to a complete machine is found, named, and has a next step."""
    change(musa)
    result = musa.ask(check)
    assert result.status is status, result.finding
    assert result.next_step
    for part in parts:
        assert part in f"{result.finding} {result.next_step}"


def test_torchada_is_missed(musa: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchada SGLang takes no device for MUSA."""
    musa.uninstall("torchada")
    result = musa.ask("torch")
    assert result.status is CheckStatus.FAIL
    assert "torchada is missing" in result.finding


def test_a_torch_of_another_release_than_sglangs_is_mentioned(musa: Machine) -> None:
    """The vendor's torch may be older than the one SGLang is released with; that may work."""
    for name in ("torch", "torch_musa"):
        musa.install(name, "2.9.1.post1+musa5.2.0")
    result = musa.ask("torch")
    assert result.status is CheckStatus.WARN
    assert f"released with torch {pinned_torch()}" in result.finding


@pytest.mark.parametrize(("mode", "status"), [("auto", CheckStatus.WARN), ("on", CheckStatus.FAIL)])
def test_a_machine_without_the_stack(machine: Machine, mode: str, status: CheckStatus) -> None:
    """Without torch_musa the package stays idle, which is an error where it is told to be on."""
    machine.environ["SGLANG_MUSA_EXT"] = mode
    result = machine.ask("device")
    assert result.status is status
    assert "SGLANG_PLATFORM=musa_reference" in result.next_step


def test_a_squatting_mate_is_mentioned_where_it_does_no_harm_yet(machine: Machine) -> None:
    """On a machine without MUSA the public mate is a warning."""
    machine.install("mate", "0.2.0", {"mate/__init__.py": ""})
    result = machine.ask("mate")
    assert result.status is CheckStatus.WARN
    assert "'mate'" in result.finding


def test_the_cpu_platform_needs_no_device(machine: Machine) -> None:
    """The reference platform passes without anything of the vendor's."""
    machine.environ["SGLANG_PLATFORM"] = "musa_reference"
    assert {check: machine.ask(check).status for check in BY_NAME} == dict.fromkeys(
        BY_NAME, CheckStatus.PASS
    )


# SGLang
# --------------------------------------------------------------------------------------------------


def release_folder(machine: Machine, version: str) -> None:
    machine.write("sglang/__init__.py")
    machine.write("sglang/_version.py", f"__version__ = {version!r}\n")


@pytest.mark.parametrize(
    ("version", "status", "part"),
    [
        ("0.5.10", CheckStatus.FAIL, "no plugin loader"),
        ("0.5.9.post1", CheckStatus.FAIL, "0.5.9.post1"),
        (releases.OLDEST, CheckStatus.PASS, "is tested"),
        (releases.NEWEST, CheckStatus.PASS, "is tested"),
        ("0.6.0", CheckStatus.WARN, "newer"),
        ("nonsense", CheckStatus.FAIL, "nonsense"),
    ],
)
def test_a_release_of_sglang_is_judged(
    machine: Machine, version: str, status: CheckStatus, part: str
) -> None:
    """Too old or unreadable is a failure, tested passes, and newer is a warning."""
    release_folder(machine, version)
    result = machine.ask("sglang")
    assert result.status is status
    assert part in result.finding


def test_a_release_without_what_is_relied_on(machine: Machine) -> None:
    """An empty SGLang of a good version fails the contract, with each difference in the details."""
    release_folder(machine, releases.NEWEST)
    result = machine.ask("contract")
    assert result.status is CheckStatus.FAIL
    assert len(result.details["violations"]) > 10


def test_sglang_may_be_missing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SGLang its checks fail, and no other raises."""
    monkeypatch.setattr(check, "find_package", lambda *_: None)
    statuses = {check: machine.ask(check).status for check in BY_NAME}
    assert {name for name, status in statuses.items() if status is CheckStatus.FAIL} == {
        "sglang",
        "contract",
    }


def test_a_checkout_on_the_search_path_is_no_installation(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without entry points SGLang cannot find the plugin, however importable it is."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    result = machine.ask("plugin")
    assert result.status is CheckStatus.FAIL
    assert "pip install" in result.next_step


def test_settings_say_where_they_come_from(machine: Machine) -> None:
    """Each effective setting has its value and its source."""
    machine.environ["SGLANG_MUSA_EXT_CHECK"] = "Output"
    settings = machine.ask("settings").details["settings"]
    assert settings["SGLANG_MUSA_EXT_CHECK"] == {"value": "output", "source": "environment"}
    assert settings["SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"] == {"value": 1, "source": "default"}


# Command lines
# -------------------------------------------------------------------------------------------

REFERENCE = {"SGLANG_PLATFORM": "musa_reference"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([], {"prefill attention": "fa3", "decode attention": "fa3", "page size": 64}),
        (
            ["--attention-backend", "fa3", "--page-size=16"],
            {"decode attention": "fa3", "page size": 16},
        ),
        (
            ["--attention-backend", "triton"],
            {"prefill attention": "triton", "decode attention": "triton"},
        ),
        (
            ["--decode-attention-backend", "triton"],
            {"prefill attention": "fa3", "decode attention": "triton"},
        ),
        (["--speculative-draft-attention-backend", "fa3"], {"draft attention": "fa3"}),
    ],
)
@pytest.mark.parametrize("machine_name", ["musa", "reference"])
def test_a_command_line_is_resolved(
    request: pytest.FixtureRequest,
    command: list[str],
    expected: dict[str, object],
    machine_name: str,
) -> None:
    """A named option wins; the others are the defaults of MUSA and of the CPU platform."""
    machine: Machine = request.getfixturevalue("musa" if machine_name == "musa" else "machine")
    if machine_name == "reference":
        machine.environ |= REFERENCE
    details = machine.ask("command", "--model-path", "some/model", *command).details
    assert {name: details[name]["value"] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        (["--attention-backend", "fa4"], CheckStatus.FAIL, "fa4"),
        (["--attention-backend", "triton"], CheckStatus.WARN, "would not be used"),
        (["--kv-cache-dtype", "fp8_e4m3", "--attention-backend", "fa3"], CheckStatus.PASS, "fa3"),
        (["--kv-cache-dtype", "fp8_e4m3"], CheckStatus.PASS, "fa3"),
        (["--kv-cache-dtype", "mxfp8", "--attention-backend", "fa3"], CheckStatus.FAIL, "mxfp8"),
        (
            ["--kv-cache-dtype", "fp8_e4m3", "--dtype", "half", "--attention-backend", "fa3"],
            CheckStatus.FAIL,
            "float16",
        ),
        (
            ["--kv-cache-dtype", "fp8_e5m2", "--attention-backend", "fa3"],
            CheckStatus.WARN,
            "takes triton in place of fa3",
        ),
        (["--kv-cache-dtype", "fp8_e5m2"], CheckStatus.WARN, "with triton in place of fa3"),
        (["--dtype", "float32"], CheckStatus.WARN, "MATE cannot read --dtype float32"),
        (["--page-size", "many"], CheckStatus.FAIL, "page-size"),
        (["--page-size", "32"], CheckStatus.PASS, "page size 32"),
    ],
)
def test_a_command_line_that_cannot_serve(
    musa: Machine, options: list[str], status: CheckStatus, part: str
) -> None:
    """The doctor refuses what the kernels or the plugin would refuse."""
    result = musa.ask("command", *options)
    assert result.status is status
    assert part in result.finding


GEMMA_3 = {"architectures": ["Gemma3ForConditionalGeneration"]}
LATENT = {"architectures": ["DeepseekV2ForCausalLM"], "kv_lora_rank": 512}
FLOAT16 = LATENT | {"dtype": "float16"}
LIMITS = [
    ({}, ["--speculative-algorithm", "NGRAM"], CheckStatus.WARN, "leak of its pool"),
    (
        {"sliding_window": 64},
        ["--speculative-eagle-topk", "4"],
        CheckStatus.FAIL,
        "draft tree",
    ),
    (
        {"architectures": ["Llama4ForConditionalGeneration"], "attention_chunk_size": 100},
        [],
        CheckStatus.FAIL,
        "attention in chunks",
    ),
    ({"sliding_window": 64}, ["--speculative-eagle-topk", "1"], CheckStatus.PASS, "fa3"),
    (GEMMA_3, [], CheckStatus.PASS, "fa3"),
    (GEMMA_3, ["--enable-multimodal"], CheckStatus.WARN, "both ways"),
    (GEMMA_3, ["--model-impl", "transformers"], CheckStatus.WARN, "both ways"),
    (GEMMA_3, ["--enable-multimodal", "--language-model-only"], CheckStatus.PASS, "fa3"),
    (LATENT, ["--dtype", "float16"], CheckStatus.FAIL, "float16 on MUSA"),
    (FLOAT16, [], CheckStatus.FAIL, "float16 on MUSA"),
    (LATENT | {"dtype": "float32"}, [], CheckStatus.FAIL, "float16 on MUSA"),
    (FLOAT16, ["--dtype", "bfloat16"], CheckStatus.PASS, "fa3"),
    (LATENT, ["--dtype", "float16", "--quantization", "fp8"], CheckStatus.PASS, "fa3"),
]


@pytest.mark.parametrize(("config", "options", "status", "part"), LIMITS)
def test_a_command_line_that_sglangs_own_fa3_cannot_serve(
    musa: Machine, config: dict[str, Any], options: list[str], status: CheckStatus, part: str
) -> None:
    """The doctor says what would end the server later, and what to set instead."""
    musa.write("model/config.json", json.dumps(config))
    named = ["--attention-backend", "fa3", "--model-path", str(musa.folder / "model")]
    result = musa.ask("command", *named, *options)
    assert result.status is status
    assert part in result.finding
    assert bool(result.next_step) == (status is not CheckStatus.PASS)


@pytest.mark.parametrize(
    ("rank", "options", "status"),
    [
        (512, ["--attention-backend", "fa3"], CheckStatus.FAIL),
        (512, [], CheckStatus.WARN),
        (None, ["--attention-backend", "fa3"], CheckStatus.PASS),
        (None, [], CheckStatus.PASS),
    ],
)
def test_mla_models_take_one_page_size(
    musa: Machine, rank: int | None, options: list[str], status: CheckStatus
) -> None:
    """A model on this machine says whether it is MLA, or gets no fa3 by default."""
    musa.write("model/config.json", json.dumps({"kv_lora_rank": rank}))
    model = str(musa.folder / "model")
    assert musa.ask("command", "--model", model, "--page-size", "32", *options).status is status


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None),
        ({"architectures": ["GptOssForCausalLM"]}, "attention sinks"),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "Whisper"),
        ({"architectures": ["MllamaForConditionalGeneration"]}, "encoder-decoder"),
        (GEMMA_3, None),
        ({"architectures": ["InklingForConditionalGeneration"]}, "Inkling"),
        ({"architectures": ["X"], "text_config": {"learnable_sink": True}}, "attention sinks"),
        ({"architectures": ["Gemma4ForConditionalGeneration"]}, "Gemma-4"),
        ({"architectures": ["X"], "head_dim": 576}, "head dimensions 576/576"),
        (FLOAT16, "float16 on MUSA"),
    ],
    ids=[
        "dense",
        "sinks",
        "Whisper",
        "encoder-decoder",
        "images that nobody asks about",
        "a bias of scores",
        "sinks of a text part",
        "SGLang's own list",
        "head dimensions",
        "latent float16",
    ],
)
def test_a_model_that_keeps_sglangs_choice_is_known(
    musa: Machine, config: dict[str, object], reason: str | None
) -> None:
    """A model on this machine is resolved as its server would be, by the same rules."""
    musa.write("model/config.json", json.dumps(config))
    result = musa.ask("command", "--model-path", str(musa.folder / "model"))
    chosen = result.details["decode attention"]
    if reason is None:
        assert chosen["value"] == "fa3"
    else:
        assert result.status is CheckStatus.WARN
        assert chosen["value"] == "SGLang's choice"
        assert reason in chosen["because"]


def test_other_kernels_on_musa_change_no_default(musa: Machine) -> None:
    """The defaults on MUSA ask the same rules whichever kernels are named."""
    musa.environ |= {"SGLANG_MUSA_EXT_KERNELS": "reference"}
    chosen = musa.ask("command", "--dtype", "float32").details["decode attention"]
    assert chosen["value"] == "SGLang's choice"


def test_kernels_on_a_foreign_device_bring_no_defaults(machine: Machine) -> None:
    """For validation on another device SGLang chooses as ever, and fa3 has to be named."""
    machine.environ |= {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "reference"}
    assert (
        machine.ask("command", "--model", "m").details["decode attention"]["value"]
        == "SGLang's choice"
    )
    assert machine.ask("command", "--attention-backend", "fa3").status is CheckStatus.PASS


def test_without_a_device_nothing_is_promised(machine: Machine) -> None:
    """Where the package stays idle, SGLang chooses."""
    result = machine.ask("command", "--model-path", "some/model")
    assert result.status is CheckStatus.WARN
    assert result.details["decode attention"]["value"] == "SGLang's choice"


# The report
# ----------------------------------------------------------------------------------------------


def give_up(_: Surroundings) -> CheckResult:
    raise SystemExit(3)


def trip(_: Surroundings) -> CheckResult:
    raise ZeroDivisionError("by nothing")


@pytest.mark.parametrize(
    ("probe", "part"), [(trip, "ZeroDivisionError: by nothing"), (give_up, "SystemExit: 3")]
)
def test_a_failing_probe_is_a_result(probe: Any, part: str) -> None:
    """Whatever a probe raises, the others are asked too."""
    results = run_checks(Surroundings({}), [Check("bad", "?", probe), BY_NAME["command"]])
    assert [result.name for result in results] == ["bad", "command"]
    assert results[0].status is CheckStatus.FAIL
    assert part in results[0].finding


def test_a_device_that_hangs_is_a_result(musa: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not answer costs the time limit, and no more."""
    monkeypatch.setattr(surroundings, "DEVICE_TIMEOUT", 0.5)
    musa.write("torch/__init__.py", "import time\ntime.sleep(60)\n")
    result = musa.ask("device")
    assert result.status is CheckStatus.FAIL
    assert "TimeoutExpired" in result.finding


@pytest.mark.parametrize(
    "statuses", [["pass"], ["pass", "warn"], ["warn", "fail", "pass"], ["fail"]]
)
def test_the_exit_code_is_the_worst_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], statuses: list[str]
) -> None:
    """0: all passed; 1: a warning; 2: a failure."""
    probes = [
        lambda _, s=status: CheckResult(CheckStatus(s), "seen", "do this") for status in statuses
    ]
    monkeypatch.setattr(
        doctor.run_checks, "__defaults__", ([Check("c", "?", probe) for probe in probes],)
    )
    assert main([]) == (2 if "fail" in statuses else 1 if "warn" in statuses else 0)
    assert capsys.readouterr().out.count("-> do this") == len(statuses)


def test_every_check_has_its_row_and_stays_in_width() -> None:
    """The text has a row a check, each with its verdict, and no line is longer than asked for."""
    results = [
        CheckResult(CheckStatus.WARN, "word " * 60, "step " * 60, name=check.name)
        for check in CHECKS
    ]
    lines = doctor.as_text(results, 80).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("WARN")] == list(BY_NAME)
    assert max(map(len, lines)) <= 80


@pytest.fixture(scope="module")
def report() -> tuple[dict[str, Any], float, int]:
    """The JSON of the doctor's own process here, the seconds it took, and its exit code."""
    environment = {**os.environ, "SGLANG_PLATFORM": "musa_reference"}
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "sglang_musa_ext",
        "doctor",
        "--json",
        "--",
        "--page-size",
        "64",
    ]
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    content: dict[str, Any] = json.loads(done.stdout)
    content["imported"] = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return content, seconds, done.returncode


def test_the_report_is_json(report: tuple[dict[str, Any], float, int]) -> None:
    """Programs get each check's status, finding and next step, and the supported releases."""
    content, _, code = report
    assert [check["name"] for check in content["checks"]] == list(BY_NAME)
    assert {"status", "finding", "next_step", "details"} <= set(content["checks"][0])
    assert content["supported_sglang"][0] == releases.OLDEST
    assert code == EXIT_CODES[CheckStatus(content["status"])]


def test_nothing_heavy_is_imported(report: tuple[dict[str, Any], float, int]) -> None:
    """Without a device to ask there is no need for torch or SGLang, and it is quick."""
    content, seconds, _ = report
    assert not {"torch", "sglang", "numpy", "transformers", "triton", "mate"} & content["imported"]
    assert seconds < 10  # three on an idle machine; a busy one gets some room


def test_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    """The help is enough to use it in a script."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "0 all passed, 1 there is a warning, 2 there is a failure" in " ".join(
        capsys.readouterr().out.split()
    )
