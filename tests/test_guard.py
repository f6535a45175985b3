"""With ``SGLANG_MUSA_EXT=on``, FA3 is ours or refused, also if SGLang loads no plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from sglang_musa_ext import guard, patching, plugin
from sglang_musa_ext.guard import NotServedByUsError, arm, guard_class
from sglang_musa_ext.upstream.names import FLASH_ATTENTION
from tests.support.warm import WarmPython

# One process imports SGLang, as a scheduler does, and forks for each case, so that each loads
# plugins for the first time. The device claims to be one that upstream's own factory would serve
# with FA3.
SCHEDULERS = """
import json, os, sys
from sglang_musa_ext.cpu.stand_ins import prepare_process
prepare_process()
import types
from sglang.srt.layers.attention import attention_registry, flashattention_backend
attention_registry.get_device_capability = lambda *_: (9, 0)
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

runner = types.SimpleNamespace(
    use_mla_backend=False, spec_algorithm=types.SimpleNamespace(is_none=lambda: True)
)

def serve(case, model):
    os.environ.update(case["environment"])
    if case.get("resolve_first"):
        args = ServerArgs(
            model_path=model, device="cpu", attention_backend="fa3", skip_tokenizer_init=True
        )
    if case.get("unguarded"):
        backend = flashattention_backend.FlashAttentionBackend
        backend.__init__ = getattr(backend.__init__, "__wrapped__", backend.__init__)
    if case.get("broken"):
        sys.modules["sglang_musa_ext.plugin"] = None
    if case.get("loads", True):
        load_plugins()
    result = {"fa3": ATTENTION_BACKENDS["fa3"].__module__}
    if case.get("resolve_first"):
        result["attention_backend"] = args.attention_backend
    if case.get("resolve_first"):
        from sglang_musa_ext.attention.mixin import MusaFA3Mixin
        kernels = types.SimpleNamespace(
            name="mate", versions={"mate": "0.2.7", "flash_attn_3": "0.2.7+musa"}
        )
        settings = types.SimpleNamespace(
            check="metadata", mla_workspace_mb=3, force_update_metadata=False
        )
        backend = types.SimpleNamespace(
            _kernels=kernels, _settings=settings, _workspace=object(), _pool_device="musa:1",
            page_size=64,
        )
        result["line"] = MusaFA3Mixin._configuration(backend)
    for name, build in {
        "registry": lambda: ATTENTION_BACKENDS["fa3"](runner),
        "class": lambda: flashattention_backend.FlashAttentionBackend(runner),
    }.items():
        try:
            build()
            result[name] = "built"
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}"
    return result

for case in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print("RESULT" + json.dumps(serve(case, sys.argv[2])), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""
CASES: dict[str, dict[str, Any]] = {
    "filtered by SGLANG_PLUGINS": {"environment": {"SGLANG_PLUGINS": "another"}},
    "excluded by SGLANG_PLATFORM": {"environment": {"SGLANG_PLATFORM": "another"}},
    "broken": {"environment": {}, "broken": True},
    "never loaded": {"environment": {}, "loads": False},
    "without the guard": {"environment": {}, "loads": False, "unguarded": True},
    "loaded": {"environment": {}},
    "loaded late": {"environment": {}, "resolve_first": True},
}
MISSED = ["filtered by SGLANG_PLUGINS", "excluded by SGLANG_PLATFORM", "broken", "never loaded"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 128,
}


@pytest.fixture(scope="module")
def schedulers(
    warm: WarmPython, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """Return the answer of each case's process under ``SGLANG_MUSA_EXT=on``."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SGLANG")
    }
    environment |= {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "reference"}
    command = [sys.executable, "-c", SCHEDULERS, json.dumps(list(CASES.values())), str(folder)]
    done = warm.run(command, env=environment, cwd=folder)
    lines = [
        line.removeprefix("RESULT")
        for line in done.stdout.splitlines()
        if line.startswith("RESULT")
    ]
    assert len(lines) == len(CASES), done.stdout + done.stderr
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("way", ["registry", "class"])
@pytest.mark.parametrize("case", MISSED)
def test_a_scheduler_without_the_plugin_refuses_fa3(
    schedulers: dict[str, dict[str, str]], case: str, way: str
) -> None:
    """A scheduler that never called the plugin builds no FA3 backend, by registry or class."""
    assert schedulers[case][way].startswith("NotServedByUsError: SGLANG_MUSA_EXT=on")


@pytest.mark.parametrize(
    ("case", "hint"),
    [
        ("filtered by SGLANG_PLUGINS", "SGLANG_PLUGINS=another may have left it out"),
        ("excluded by SGLANG_PLATFORM", "SGLANG_PLATFORM=another may have left it out"),
        ("broken", "Failed to load plugin musa_ext"),
        ("never loaded", "this process loads no plugins"),
    ],
)
def test_the_refusal_says_why_and_what_to_do(
    schedulers: dict[str, dict[str, str]], case: str, hint: str
) -> None:
    """The error names what kept the plugin out, and the doctor."""
    assert hint in schedulers[case]["class"]
    assert "sglang-musa-ext doctor" in schedulers[case]["class"]


def test_without_the_guard_upstreams_backend_would_be_built(
    schedulers: dict[str, dict[str, str]],
) -> None:
    """The guard stops the cases above: without it, upstream's constructor runs."""
    assert schedulers["without the guard"]["registry"].startswith("AttributeError: ")


@pytest.mark.parametrize("case", ["loaded", "loaded late"])
def test_a_loaded_plugin_serves(schedulers: dict[str, dict[str, str]], case: str) -> None:
    """The registry is asked when a model is built: a plugin after ServerArgs is in time."""
    assert schedulers[case]["fa3"] == "sglang_musa_ext.plugin"
    assert "NotServedByUsError" not in schedulers[case]["registry"]


def test_late_is_after_the_arguments_are_resolved(schedulers: dict[str, dict[str, str]]) -> None:
    """The late case is one: its arguments had chosen fa3 before the plugin was loaded."""
    assert schedulers["loaded late"]["attention_backend"] == "fa3"


@pytest.mark.parametrize(
    "part",
    [
        "mate kernels (mate 0.2.7, flash_attn_3 0.2.7+musa)",
        "rank 0",
        "device musa:1",
        "page size 64",
        "MLA workspace 3 MiB",
        "checks metadata",
        "plans reused within a pass",
        "SGLang ",
    ],
)
def test_a_backend_says_in_one_line_what_it_serves_with(
    schedulers: dict[str, dict[str, str]], part: str
) -> None:
    """The log has the effective configuration, for people, in one line."""
    assert part in schedulers["loaded late"]["line"]
    assert "\n" not in schedulers["loaded late"]["line"]


# The guard by itself ------------------------------------------------------------------------------


@pytest.fixture
def meta_path(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The import system's finders without a guard, and as they were afterwards."""
    others = [x for x in sys.meta_path if type(x).__module__ != patching.__name__]
    monkeypatch.setattr(sys, "meta_path", others)
    return sys.meta_path


@pytest.mark.parametrize("value", [None, "", "auto", "off", "maybe"])
def test_the_guard_is_armed_by_on_alone(
    meta_path: list[Any], monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """For any other mode, importing torch changes nothing."""
    before = list(meta_path)
    if value is not None:
        monkeypatch.setenv("SGLANG_MUSA_EXT", value)
    arm()
    assert meta_path == before


def test_arming_twice_is_arming_once(meta_path: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call adds nothing."""
    monkeypatch.setenv("SGLANG_MUSA_EXT", " ON ")
    before = list(meta_path)
    arm()
    first = list(meta_path)
    assert len(first) == len(before) + 1
    arm()
    assert meta_path == first


def a_backend() -> tuple[type, Callable[[str], type]]:
    """A guarded class, and what makes a subclass of it in a module of the given name."""

    class Backend:
        def __init__(self, runner: int, *, step: int = 0) -> None:
            self.built = (runner, step)

    guard_class(Backend, lambda cls: f"{cls.__module__}.{cls.__qualname__} is not ours")
    return Backend, lambda module: type("Derived", (Backend,), {"__module__": module})


def test_ours_pass_the_guard() -> None:
    """A class of ours, or one made from it, is built with the arguments it was given."""
    _, derive = a_backend()
    ours: Any = derive("sglang_musa_ext.attention.mixin")
    theirs: Any = type("Theirs", (ours,), {"__module__": "elsewhere"})
    assert ours(1, step=2).built == theirs(1, step=2).built == (1, 2)


@pytest.mark.parametrize(
    "module", ["sglang.srt.hardware_backend.musa.attention.flashattention_backend", "elsewhere"]
)
def test_others_do_not_pass_the_guard(module: str) -> None:
    """Upstream's class, and one made from it as in the tree, is named and refused."""
    base, derive = a_backend()
    for backend in (base, derive(module)):
        with pytest.raises(
            NotServedByUsError, match=f"{backend.__module__}.{backend.__qualname__}"
        ):
            backend(1)


@pytest.mark.parametrize("armed", [True, False])
def test_where_ours_serves_the_guard_names_the_option(
    meta_path: list[Any], monkeypatch: pytest.MonkeyPatch, armed: bool
) -> None:
    """A backend beside ours is refused in any mode, and nobody is sent to SGLANG_PLUGINS."""
    module: Any = ModuleType(FLASH_ATTENTION)
    module.FlashAttentionBackend = type("FlashAttentionBackend", (), {"__module__": "upstream"})
    monkeypatch.setitem(sys.modules, FLASH_ATTENTION, module)
    if armed:
        monkeypatch.setenv("SGLANG_MUSA_EXT", "on")
        arm()
    guard.refuse_others()
    with pytest.raises(NotServedByUsError, match="in place of MusaFA3Backend") as caught:
        module.FlashAttentionBackend()
    assert "SGLANG_PLUGINS" not in str(caught.value)


def test_torch_finds_the_guard() -> None:
    """The installed entry point of torch's group leads to the guard."""
    code = (
        "import os, sys; os.environ['SGLANG_MUSA_EXT'] = 'on'; import torch; "
        "print(sum(type(x).__module__ == 'sglang_musa_ext.patching' for x in sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


# One line a process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "reference"},
            "sglang_musa_ext is active in process",
        ),
        ({"SGLANG_MUSA_EXT": "auto"}, "sglang_musa_ext stays idle in process"),
        ({"SGLANG_MUSA_EXT": "off"}, None),
        ({}, None),
    ],
    ids=["active", "idle", "off", "idle and not asked for"],
)
def test_a_process_says_once_what_it_does(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    line: str | None,
) -> None:
    """The line is seen though SGLang's log comes later; off, or idle unasked, says nothing."""
    names = ("_take_over", "_take_over_drafts", "_have_ranks_agree", "_require_unclaimed")
    for name in names:
        monkeypatch.setattr(plugin, name, lambda *_: None)
    monkeypatch.setattr(plugin, "_on_musa", lambda: False)
    monkeypatch.setattr(plugin.logger, "isEnabledFor", lambda level: level >= 30)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plugin.register()
    lines = [x for x in capfd.readouterr().err.splitlines() if "sglang_musa_ext" in x]
    assert len(lines) == (line is not None)
    assert line is None or line in lines[0]


def test_a_log_that_is_set_up_gets_the_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Where a log takes it, the line is there, and is not printed beside it."""
    with caplog.at_level("INFO", "sglang_musa_ext"):
        plugin._announce("what it does")
    assert caplog.text.count("what it does") == 1
    assert "what it does" not in capfd.readouterr().err
