from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sglang_musa_ext import musa_defaults
from sglang_musa_ext.kernels.mate_identity import MateIdentity
from sglang_musa_ext.musa_defaults import install_defaults
from sglang_musa_ext.upstream.check import find_package, read_version
from sglang_musa_ext.upstream.releases import NEWEST, OLDEST, SUPPORTED_RELEASES
from tests.support.releases import find_release, require_release
from tests.support.warm import WarmPython

OVERRIDES = ("sglang.srt.arg_groups.model_override_base", "sglang.srt.arg_groups.overrides")
LLAMA = SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
WHISPER = SimpleNamespace(
    hf_config=SimpleNamespace(architectures=["WhisperForConditionalGeneration"])
)


class ServerArgs:
    """Arguments as upstream has them, as far as a default depends on them."""

    def __init__(self, **given: Any) -> None:
        self.attention_backend = None
        self.page_size = None
        self.kv_cache_dtype = self.dtype = "auto"
        self.speculative_eagle_topk = self.speculative_algorithm = None
        self.enable_mixed_chunk = False
        vars(self).update(given)

    def settle(self) -> None:
        """Choose as upstream does: ask for a default only where nothing was chosen."""
        if self.attention_backend is None:
            self.attention_backend = self.default(self, use_mla_backend=False, model_config=LLAMA)

    @staticmethod
    def default(server_args: Any, **call: Any) -> Any:
        raise NotImplementedError


class Early(ServerArgs):
    """Up to 0.5.18: the default is a method, and construction settles the arguments."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.__post_init__()

    def __post_init__(self) -> None:
        self.settle()

    def _get_default_attn_backend(self, use_mla_backend: bool, model_config: Any) -> str:
        return "triton"

    @staticmethod
    def default(server_args: Any, **call: Any) -> Any:
        return server_args._get_default_attn_backend(**call)


class Late(ServerArgs):
    """From 0.5.19: the default is a function, and settling is a step of its own, done once."""

    def __post_init__(self) -> None:
        """Leave the arguments as they were given."""

    def resolve_once(self) -> None:
        if not getattr(self, "_resolution_finished", False):
            self.settle()
            self._resolution_finished = True

    @staticmethod
    def default(server_args: Any, **call: Any) -> Any:
        return sys.modules[OVERRIDES[1]].get_default_attn_backend(server_args, **call)


def flashinfer_or_triton(server_args: Any, use_mla_backend: bool, model_config: Any) -> str:
    return "triton" if use_mla_backend else "flashinfer"


class Musa:
    """A SGLang that believes in a MUSA device, with the names that the defaults touch."""

    def __init__(self, kind: type[ServerArgs], monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self.capability = (3, 1)
        self.out_of_tree = False
        self.backends: dict[str, Callable[[Any], Any]] = {
            name: functools.partial(self.build, name)
            for name in ("triton", "flashinfer", "torch_native")
        }
        self._monkeypatch = monkeypatch
        platform = SimpleNamespace(is_out_of_tree=lambda: self.out_of_tree)
        self.module("sglang.srt.server_args", ServerArgs=kind)
        self.module("sglang.srt.platforms", current_platform=platform)
        self.module("sglang.srt.utils", get_device_capability=lambda: self.capability)
        self.module(
            "sglang.srt.layers.attention.attention_registry", ATTENTION_BACKENDS=self.backends
        )
        if issubclass(kind, Late):
            for name in OVERRIDES:
                self.module(name, get_default_attn_backend=flashinfer_or_triton)

    @staticmethod
    def build(name: str, runner: Any) -> str:
        return name

    def module(self, name: str, **contents: Any) -> ModuleType:
        """Put a module with these contents, and its parents, where imports look first."""
        if name in sys.modules:
            vars(sys.modules[name]).update(contents)
            return sys.modules[name]
        module = ModuleType(name)
        vars(module).update({"__path__": [], **contents})
        self._monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(self.module(parent), child, module)
        return module

    def settled(self, **given: Any) -> Any:
        """Arguments, settled as upstream's launcher does it."""
        arguments: Any = self.kind(**given)
        if isinstance(arguments, Late):
            arguments.resolve_once()
        return arguments

    def choice(
        self, *, use_mla_backend: bool = False, model_config: Any = LLAMA, **given: Any
    ) -> Any:
        """Return what is chosen for these arguments where nothing was."""
        arguments = self.kind(attention_backend="other", **given)
        return arguments.default(
            arguments, use_mla_backend=use_mla_backend, model_config=model_config
        )


@pytest.fixture(params=[Early, Late], ids=["up to 0.5.18", "from 0.5.19"])
def musa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Musa]:
    """SGLang on MUSA, in both forms of its arguments; what is installed is undone."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    # A subclass of its own, because installing replaces methods of the class.
    methods = {
        name: vars(request.param)[name]
        for name in vars(request.param)
        if not name.startswith("__w")
    }
    yield Musa(type(request.param.__name__, (request.param,), methods), monkeypatch)
    musa_defaults._warn_of_lateness.cache_clear()
    musa_defaults._say_once.cache_clear()
    musa_defaults._mate_release.cache_clear()


# The attention backend ---------------------------------------------------------------------------


def test_fa3_is_chosen_where_nothing_was(musa: Musa) -> None:
    """A server that names no attention backend gets fa3 on MUSA."""
    assert musa.settled().attention_backend in ("triton", "flashinfer")
    install_defaults()
    assert musa.settled().attention_backend == "fa3"


@pytest.mark.parametrize("chosen", ["triton", "torch_native", "fa3"])
def test_the_users_choice_wins(musa: Musa, chosen: str) -> None:
    """A backend that was named stays."""
    install_defaults()
    assert musa.settled(attention_backend=chosen).attention_backend == chosen


def test_a_default_can_be_taken_out_again(musa: Musa) -> None:
    """Calling what installing returns undoes it."""
    before = musa.settled().attention_backend, dict(musa.backends)
    install_defaults()()
    assert (musa.settled().attention_backend, dict(musa.backends)) == before
    assert not hasattr(musa.settled(), musa_defaults._SETTLED_WITH_US)


def test_installing_twice_changes_nothing(musa: Musa) -> None:
    """SGLang may load plugins more than once in a process."""
    install_defaults()
    backends, finders = dict(musa.backends), list(sys.meta_path)
    install_defaults()
    assert dict(musa.backends) == backends
    assert sys.meta_path == finders


@pytest.mark.parametrize(
    ("given", "use_mla_backend"),
    [
        ({}, False), ({}, True), ({"page_size": 64}, True), ({"page_size": 1}, False),
        ({"dtype": "bfloat16"}, False),
        ({"dtype": "half"}, True), ({"kv_cache_dtype": "bf16"}, False),
    ],
)  # fmt: skip
def test_fa3_is_chosen_for_what_it_serves(
    musa: Musa, given: dict[str, Any], use_mla_backend: bool
) -> None:
    """Half precision, any page size, and MLA on pages of 64 tokens."""
    install_defaults()
    assert musa.choice(use_mla_backend=use_mla_backend, **given) == "fa3"


@pytest.mark.parametrize(
    ("given", "use_mla_backend", "reason"),
    [
        ({"kv_cache_dtype": "fp8_e4m3"}, False, "before 0.2.3, and its release is not known"),
        ({"kv_cache_dtype": "fp8_e5m2"}, False, "with triton in place of fa3"),
        ({"dtype": "float32"}, False, "--dtype float32"),
        ({"page_size": 1}, True, "--page-size 1"),
        ({"model_config": WHISPER}, False, "Whisper"),
        ({"speculative_eagle_topk": 4}, True, "--speculative-eagle-topk"),
    ],
    ids=["fp8", "e5m2", "float32", "page", "whisper", "tree"],
)
def test_what_fa3_cannot_serve_is_left_to_sglang(
    musa: Musa,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, Any],
    use_mla_backend: bool,
    reason: str,
) -> None:
    """A default must not turn a server that starts into one that refuses; the log says why."""
    caplog.set_level(logging.INFO)
    before = musa.choice(use_mla_backend=use_mla_backend, **given)
    install_defaults()
    assert musa.choice(use_mla_backend=use_mla_backend, **given) == before
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("release", "chosen"), [("0.2.2", False), ("0.2.3", True), ("0.2.7+musa", True)]
)
def test_an_fp8_cache_is_served_by_releases_that_read_it(
    musa: Musa, monkeypatch: pytest.MonkeyPatch, release: str, chosen: bool
) -> None:
    """The MATE that is installed decides."""
    monkeypatch.setattr(
        "sglang_musa_ext.kernels.mate_identity.identify_mate", lambda: MateIdentity(version=release)
    )
    install_defaults()
    assert (musa.choice(kv_cache_dtype="fp8_e4m3") == "fa3") == chosen


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2"}, 1),
        ({"attention_backend": "fa3", "kv_cache_dtype": "fp8_e4m3"}, 0),
        ({"attention_backend": "triton", "kv_cache_dtype": "fp8_e5m2"}, 0),
    ],
)
def test_fa3_that_sglang_itself_replaces_is_one_line(
    musa: Musa, caplog: pytest.LogCaptureFixture, given: dict[str, str], lines: int
) -> None:
    """SGLang takes triton in place of fa3 for fp8_e5m2, and says nothing of who serves no more."""
    caplog.set_level(logging.INFO)
    install_defaults()
    for _ in range(2):
        musa.settled(**given)
    said = [text for text in caplog.messages if "takes triton in place of" in text]
    assert len(said) == lines


@pytest.mark.parametrize("capability", [(2, 1), (2, 2), (3, 0)])
def test_an_older_device_is_left_to_sglang(musa: Musa, capability: tuple[int, int]) -> None:
    """MATE has no kernels below MP 3.1."""
    musa.capability = capability
    install_defaults()
    assert musa.choice() in ("triton", "flashinfer")


def test_another_platform_plugin_keeps_its_choice(musa: Musa) -> None:
    """An out-of-tree platform names its own default."""
    musa.out_of_tree = True
    install_defaults()
    assert musa.choice() in ("triton", "flashinfer")


# What came too late ------------------------------------------------------------------------------


def build(musa: Musa, name: str, arguments: Any) -> Any:
    return musa.backends[name](SimpleNamespace(server_args=arguments))


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_lateness_is_said_once(musa: Musa, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Arguments settled before the plugin was there are pointed out, and the server runs."""
    arguments = musa.settled()
    install_defaults()
    assert build(musa, name, arguments) == build(musa, name, arguments) == name
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (repr(name), "--attention-backend fa3", "load_plugins()"):
        assert part in record.getMessage()


def test_a_choice_made_in_time_is_no_lateness(musa: Musa, caplog: pytest.LogCaptureFixture) -> None:
    """A user who chose triton, with the plugin there, reads nothing of it."""
    install_defaults()
    assert build(musa, "triton", musa.settled(attention_backend="triton")) == "triton"
    assert not caplog.records


def test_settling_again_is_no_settling(musa: Musa) -> None:
    """A child process asks again for what its parent settled without this package."""
    if musa.kind.__name__ != "Late":
        pytest.skip("Up to 0.5.18 construction is the only time")
    arguments = musa.settled()
    install_defaults()
    arguments.resolve_once()
    assert not hasattr(arguments, musa_defaults._SETTLED_WITH_US)


# Real releases -----------------------------------------------------------------------------------

# The reference platform needs no GPU. Then every module is made to believe in MUSA.
CHILD = """
import importlib, json, os, pickle, sys, warnings
warnings.simplefilter("ignore")
from sglang_musa_ext.cpu.stand_ins import prepare_process
prepare_process()
import torch
implement = torch.library.Library.impl
torch.library.Library.impl = lambda self, name, function, key="", **more: implement(
    self, name, function, "PrivateUse1" if key == "MUSA" else key, **more
)
os.environ["SGLANG_PLATFORM"] = "musa_reference"
for name in (
    "server_args", "layers.attention.attention_registry", "configs.model_config", "model_loader",
    "speculative.draft_utils", "arg_groups.overrides", "arg_groups.pipeline",
):
    try:
        importlib.import_module(f"sglang.srt.{name}")
    except ModuleNotFoundError as error:
        assert "arg_groups" in str(error), error
del os.environ["SGLANG_PLATFORM"]
from sglang.srt import platforms
from sglang.srt.platforms.interface import SRTPlatform
platforms._current_platform = SRTPlatform()
beliefs = {
    "current_platform": platforms._current_platform,
    "is_musa": lambda: True,
    "get_device_capability": lambda *_: (3, 1),
    "get_device_name": lambda *_: "MTT S5000",
}
for module in list(sys.modules.values()):
    if module is not None and module.__name__.startswith("sglang."):
        known = {name: value for name, value in beliefs.items() if name in vars(module)}
        vars(module).update(known)
try:
    from sglang.srt.runtime_context import override_platform
except ImportError:
    pass
else:
    override_platform(is_musa=True).__enter__()
from sglang_musa_ext import plugin
plugin.register()
from sglang.srt.server_args import ServerArgs

def settled(model, **given):
    arguments = ServerArgs(model_path=model, device="cuda", **given)
    if hasattr(arguments, "resolve_once"):
        arguments.resolve_once()
    try:
        from sglang.srt.arg_groups.overrides import resolved_view
    except ImportError:
        view = arguments
    else:
        view = resolved_view(arguments)
    carried = getattr(pickle.loads(pickle.dumps(arguments)), "_musa_ext_present", False)
    return view.attention_backend, view.page_size, carried

def outcome(model, given):
    try:
        return settled(model, **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

for name, model, given in json.loads(sys.argv[1]):
    print("KIND", name, file=sys.stderr, flush=True)
    print("RESULT", json.dumps([name, outcome(model, given)]), flush=True)
"""
_SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
DRAFT = "speculative_draft_model_path"
_TREE = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 4,
    "speculative_num_draft_tokens": 8,
}
_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip


def model(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    """The configuration file of a small model."""
    return {"architectures": [architecture], "model_type": model_type, **_SHAPE, **fields}


LLAMA_FILE = model("LlamaForCausalLM", "llama")
MLA_FILE = model("DeepseekV2ForCausalLM", "deepseek_v2", **_LATENT)
GEMMA_3_IMAGES = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "mm_tokens_per_image": 16,
    "text_config": model("Gemma3ForCausalLM", "gemma3_text", head_dim=16, sliding_window=64),
    "vision_config": _VISION,
}


@dataclass(frozen=True)
class Kind:
    """A model, and what it gets on MUSA."""

    config: dict[str, Any]
    backend: str
    """Of the server."""
    reason: str
    """A word of the one line of the log that says why; empty: nobody needs to be told."""
    given: dict[str, Any] = field(default_factory=dict)
    """Options of the server."""


CHOSEN = "chooses the attention backend fa3 for"
KINDS = {
    "Llama": Kind(LLAMA_FILE, "fa3", CHOSEN),
    "Llama, named": Kind(
        LLAMA_FILE, "triton", "", {"attention_backend": "triton", "page_size": 32}
    ),
    "OLMo-3": Kind(
        model("Olmo3ForCausalLM", "olmo3", sliding_window=64, head_dim=16), "fa3", CHOSEN
    ),
    "GPT-OSS": Kind(
        model("GptOssForCausalLM", "gpt_oss", head_dim=16, num_local_experts=4, sliding_window=64),
        "triton",
        "with attention sinks",
    ),
    "MLA": Kind(MLA_FILE, "fa3", CHOSEN),
    # No backend decodes it on MUSA, but what starts without being asked for fa3 goes on starting.
    "MLA in float16": Kind(
        model("DeepseekV3ForCausalLM", "deepseek_v3", **_LATENT | {"torch_dtype": "float16"}),
        "",
        "in float16 on MUSA",
    ),
    "MLA, a tree": Kind(MLA_FILE, "", "of an MLA model", _TREE),
    "Gemma-3, text alone": Kind(GEMMA_3_IMAGES, "fa3", CHOSEN),
    "Gemma-3 with images": Kind(GEMMA_3_IMAGES, "", "both ways", {"enable_multimodal": True}),
    "Llama, fp8, named": Kind(
        LLAMA_FILE,
        "triton",
        "takes triton in place of",
        {"attention_backend": "fa3", "kv_cache_dtype": "fp8_e5m2"},
    ),
    "float16 beside bfloat16": Kind(
        LLAMA_FILE | {"torch_dtype": "float16"},
        "",
        "a float16 model",
        {"kv_cache_dtype": "bfloat16"},
    ),
}


def settled_kinds(
    warm: WarmPython, version: str, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The choices of a release for each kind, and what it logs meanwhile."""
    package = find_package()
    is_installed = package is not None and read_version(package) == version
    path = find_release(version) if is_installed else require_release(version)
    asked = []
    for number, (name, kind) in enumerate(KINDS.items()):
        place = folder / str(number)
        place.mkdir()
        (place / "config.json").write_text(json.dumps(kind.config))
        draft = {DRAFT: str(place)} if "speculative_algorithm" in kind.given else {}
        asked.append((name, str(place), kind.given | draft))
    environment = {name: value for name, value in os.environ.items() if "MUSA" not in name}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = warm.run([sys.executable, "-c", CHILD, json.dumps(asked)], env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(KINDS), done.stderr[-2000:]
    logs = re.split(r"^KIND (.*)$", done.stderr, flags=re.MULTILINE)
    return (
        dict(json.loads(line.removeprefix("RESULT ")) for line in lines),
        dict(zip(logs[1::2], logs[2::2], strict=True)),
    )


QUICK = (OLDEST, "0.5.17", NEWEST)
"""Releases that every run of the tests asks, as each imports SGLang anew."""


def releases_to_ask() -> Iterator[Any]:
    """Every release; those that are not ``QUICK`` are asked by ``scripts/test -m long``."""
    for release in SUPPORTED_RELEASES:
        marks = [] if release.version in QUICK else [pytest.mark.long]
        yield pytest.param(release.version, marks=marks)


@pytest.mark.parametrize("version", list(releases_to_ask()))
def test_a_release_gets_the_defaults(warm: WarmPython, version: str, tmp_path: Path) -> None:
    """On MUSA a real release settles each kind of model on what serves it, with pages of 64, says
    so in one line, keeps what was chosen, and carries the mark along.
    """
    results, logs = settled_kinds(warm, version, tmp_path)
    assert results["Llama"] == ["fa3", 64, True]
    assert results["Llama, named"] == ["triton", 32, True]
    for name, kind in KINDS.items():
        backend = results[name][0] if isinstance(results[name], list) else results[name]
        assert backend == kind.backend if kind.backend else backend != "fa3", name
        ours = [line for line in logs[name].splitlines() if "sglang_musa_ext" in line]
        assert len(ours) == bool(kind.reason), (name, ours)
        assert all(kind.reason in line for line in ours)
