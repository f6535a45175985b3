from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import sglang_musa_ext.attention
from sglang_musa_ext import patching, plugin
from sglang_musa_ext.plugin import PluginError, activate_platform, create_musa_fa3_backend, register
from sglang_musa_ext.upstream import check, releases
from sglang_musa_ext.upstream.names import DRAFT_METHODS
from tests.support.commands import clean_environment

NONSENSE = {
    "SGLANG_MUSA_EXT_KERNELS": "nonsense",
    "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB": "-1",
    "SGLANG_MUSA_EXT_CHECK": "nonsense",
    "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA": "perhaps",
}
OURS = [
    {"SGLANG_PLATFORM": "musa_reference"},
    {"SGLANG_PLATFORM": "musa_reference", "SGLANG_MUSA_EXT": "on"},
    {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "reference"},
    {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "hopper"},
]
BAD = [
    ("SGLANG_MUSA_EXT", "maybe", "auto, on, off"),
    ("SGLANG_MUSA_EXT_KERNELS", "cutlass", "auto, mate, hopper, reference"),
    ("SGLANG_MUSA_EXT_MLA_WORKSPACE_MB", "0", "a whole number of MiB from 1 up"),
    ("SGLANG_MUSA_EXT_CHECK", "yes", "off, metadata, output"),
    ("SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA", "perhaps", "true"),
]

# A model runner without speculative decoding, as far as this package's factory looks at one.
RUNNER: Any = SimpleNamespace(
    spec_algorithm=SimpleNamespace(is_none=lambda: True),
    server_args=SimpleNamespace(
        dtype="auto",
        kv_cache_dtype="auto",
        page_size=None,
        speculative_eagle_topk=None,
        speculative_algorithm=None,
        enable_mixed_chunk=False,
    ),
    model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"])),
)
BACKEND = {"page_size": 64, "topk": 0, "kv_cache_dtype": "torch.bfloat16", "use_mla": False}
"""The report of a backend of upstream's."""


class Upstream:
    """The names of SGLang that this package may replace."""

    def __init__(self) -> None:
        from sglang.srt.layers.attention import attention_registry
        from sglang.srt.speculative import draft_utils

        self.backends: dict[str, Callable[[Any], Any]] = attention_registry.ATTENTION_BACKENDS
        self.factory: Any = draft_utils.DraftBackendFactory
        self.draft_utils: Any = draft_utils
        self.fa3 = attention_registry.create_flashattention_v3_backend
        self.fa4 = attention_registry.create_flashattention_v4_backend

    def names(self) -> list[object]:
        """Everything that serving FA3 goes through, to be compared by identity."""
        modules = [
            vars(module)
            for name, module in sorted(sys.modules.items())
            if name in REPLACEABLE_MODULES
        ]
        values = [value for module in modules for _, value in sorted(module.items())]
        return [*values, *self.backends.values(), *vars(self.factory).values()]

    def draft(self, method: str, ver: int = 3) -> Any:
        """Return what the draft factory's ``method`` builds for a runner."""
        factory = self.factory.__new__(self.factory)
        vars(factory).update(draft_model_runner=RUNNER, topk=1, speculative_num_steps=3)
        return getattr(factory, method)(ver)

    def refusals(self) -> list[str]:
        """The messages with which FA3 is refused, each way that it can be asked for."""
        ways: list[Callable[[], Any]] = [
            lambda: self.backends["fa3"](None),
            lambda: self.backends["fa4"](None),
        ]
        ways += [functools.partial(self.draft, method) for method in DRAFT_METHODS]
        return [str(refused(way)) for way in ways]


REPLACEABLE_MODULES = (
    "sglang.srt.layers.attention.attention_registry",
    "sglang.srt.layers.attention.flashattention_backend",
    "sglang.srt.speculative.draft_utils",
)


def refused(ask: Callable[[], Any]) -> PluginError:
    """The error with which this package refuses."""
    with pytest.raises(PluginError) as caught:
        ask()
    return caught.value


@pytest.fixture(scope="session")
def imported() -> Upstream:
    """SGLang's names, imported as its own processes do on a CPU."""
    from sglang_musa_ext.cpu.stand_ins import prepare_process

    prepare_process()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns of quantization that a CPU does not have.
        return Upstream()


@pytest.fixture(scope="session")
def support() -> Any:
    """Where the installed SGLang stands; checked once, since it reads sources."""
    return check.require_upstream()


@pytest.fixture
def sglang(imported: Upstream, support: Any, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    """SGLang as it is without this package; what a test replaces is put back."""
    monkeypatch.setattr(check, "require_upstream", lambda: support)
    monkeypatch.setitem(imported.backends, "fa3", imported.fa3)
    monkeypatch.setitem(imported.backends, "fa4", imported.fa4)
    for name in DRAFT_METHODS:
        method = vars(imported.factory)[name]
        monkeypatch.setattr(imported.factory, name, patching.original_of(method))
    return imported


@pytest.fixture
def set_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets variables for one test."""

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def musa(imported: Upstream, monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Make SGLang believe that there is a MUSA device of the given MP version."""

    def believe(capability: tuple[int, int]) -> None:
        monkeypatch.setattr("sglang.srt.utils.is_musa", lambda: True)
        monkeypatch.setattr("sglang.srt.utils.get_device_capability", lambda: capability)
        # They reach further into SGLang than is undone here: see tests/test_musa_defaults.py.
        monkeypatch.setattr("sglang_musa_ext.musa_defaults.install_defaults", lambda: None)
        monkeypatch.setattr("sglang_musa_ext.ranks.install_agreement", lambda: None)

    return believe


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand in for this package's attention module; what it builds records how it was asked for."""
    module: Any = ModuleType("sglang_musa_ext.attention.selection")
    module.installed = []
    for name in (
        "install_kernel_dispatch",
        "install_state_report",
        "install_class_names",
    ):
        setattr(module, name, functools.partial(module.installed.append, name))
    module.MusaFA3Backend = lambda runner: SimpleNamespace(runner=runner, **BACKEND)
    monkeypatch.setitem(sys.modules, "sglang_musa_ext.attention.selection", module)
    monkeypatch.setattr(sglang_musa_ext.attention, "selection", module, raising=False)
    return module


# Off and idle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others", [{}, NONSENSE, {"SGLANG_PLUGINS": "musa_ext"}], ids=["alone", "nonsense", "named"]
)
def test_off_imports_nothing_and_costs_nothing(others: dict[str, str]) -> None:
    """``off`` loads no torch or sglang, reads no other variable, and takes under a second."""
    script = (
        "import sys, time\nfrom sglang_musa_ext.plugin import register\nregister()\n"
        "heavy = {'torch', 'sglang', 'triton', 'numpy'} & sys.modules.keys()\n"
        "print(sorted(heavy), time.process_time() < 1)"
    )
    environment = clean_environment(**others, SGLANG_MUSA_EXT="off")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] True"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SGLANG_MUSA_EXT": "auto"},
        {"SGLANG_MUSA_EXT": "off"},
        {"SGLANG_MUSA_EXT": "off", **NONSENSE},
        {"SGLANG_MUSA_EXT_KERNELS": "hopper"},
        {"SGLANG_PLATFORM": "another_platform"},
    ],
    ids=str,
)
def test_without_a_musa_device_sglang_stays_as_it_is(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None], environment: dict[str, str]
) -> None:
    """Idle or off, every name that serving goes through is the very object it was."""
    set_environment(environment)
    before = sglang.names()
    register()
    after = sglang.names()
    assert len(before) == len(after)
    assert all(first is second for first, second in zip(before, after, strict=True))
    assert sglang.backends["fa3"] is sglang.fa3


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ("auto", ["stays idle", "no MUSA device"]),
        ("hopper", ["no MUSA device", "SGLANG_MUSA_EXT_KERNELS=hopper", "SGLANG_MUSA_EXT=on"]),
        ("reference", ["SGLANG_MUSA_EXT_KERNELS=reference", "SGLANG_MUSA_EXT=on"]),
    ],
)
def test_idle_says_why(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    caplog: pytest.LogCaptureFixture,
    kernels: str,
    expected: list[str],
) -> None:
    """The log says why nothing is done, and what a setting that has no effect is waiting for."""
    set_environment({"SGLANG_MUSA_EXT_KERNELS": kernels})
    with caplog.at_level(logging.INFO, "sglang_musa_ext"):
        register()
    for part in expected:
        assert part in caplog.text


# On ----------------------------------------------------------------------------------------------


def test_a_release_outside_the_tested_range_is_warned_of(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A newer SGLang that meets the contract is served; a warning names the tested range."""
    support = releases.classify_version("0.99.0")
    assert support.message
    monkeypatch.setattr(check, "require_upstream", lambda: support)
    set_environment(OURS[0])
    register()
    assert sglang.backends["fa3"] is create_musa_fa3_backend
    assert [
        record.levelname for record in caplog.records if support.message in record.getMessage()
    ] == ["WARNING"]


def test_speculative_decoding_makes_our_class_names_known(
    sglang: Upstream, musa: Callable[[tuple[int, int]], None], attention: Any
) -> None:
    """Our class names join upstream's lists, where it decodes speculatively, and only there."""
    create_musa_fa3_backend(RUNNER)
    assert "install_class_names" not in attention.installed
    speculating = {"spec_algorithm": SimpleNamespace(is_none=lambda: False)}
    create_musa_fa3_backend(SimpleNamespace(**(vars(RUNNER) | speculating)))
    assert "install_class_names" in attention.installed


@pytest.mark.parametrize("environment", OURS, ids=str)
def test_fa3_is_ours_where_it_was_asked_for(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None], environment: dict[str, str]
) -> None:
    """The reference platform, or kernels asked for by name, put our factory under ``fa3``."""
    set_environment(environment)
    register()
    assert sglang.backends["fa3"] is create_musa_fa3_backend


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_fa3_is_ours_on_a_musa_device(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    musa: Callable[[tuple[int, int]], None],
    mode: str,
) -> None:
    """A MUSA device needs no other setting."""
    musa((3, 1))
    set_environment({"SGLANG_MUSA_EXT": mode})
    register()
    assert sglang.backends["fa3"] is create_musa_fa3_backend


def test_only_fa3_fa4_and_its_drafts_are_replaced(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None]
) -> None:
    """Every other backend of the registry and method of the draft factory stays upstream's."""
    set_environment(OURS[0])
    backends, methods = dict(sglang.backends), dict(vars(sglang.factory))
    register()
    assert {name for name, create in sglang.backends.items() if create is not backends[name]} == {
        "fa3",
        "fa4",
    }
    changed = {name for name, value in vars(sglang.factory).items() if value is not methods[name]}
    assert changed == set(DRAFT_METHODS)


def test_registering_twice_changes_nothing(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None]
) -> None:
    """A second call leaves our factory, and wraps upstream's methods, not our wrappers."""
    originals = [vars(sglang.factory)[name] for name in DRAFT_METHODS]
    set_environment(OURS[0])
    register()
    backends = dict(sglang.backends)
    register()
    assert sglang.backends == backends
    assert [patching.original_of(vars(sglang.factory)[name]) for name in DRAFT_METHODS] == originals


def test_a_refusal_is_taken_back_when_the_cause_is_gone(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Registering again after the environment was corrected serves, drafts included."""
    set_environment(OURS[0] | {"SGLANG_MUSA_EXT": "maybe"})
    register()
    refused(lambda: sglang.backends["fa3"](None))
    monkeypatch.delenv("SGLANG_MUSA_EXT")
    register()
    assert sglang.backends["fa3"] is create_musa_fa3_backend
    monkeypatch.setattr(
        plugin, "_ready_attention", lambda: (_ for _ in ()).throw(RuntimeError("ours was asked"))
    )
    with pytest.raises(RuntimeError, match="ours was asked"):
        sglang.draft(DRAFT_METHODS[0])


def test_fa4_is_refused_by_name(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None]
) -> None:
    """``--attention-backend fa4`` is an error that names it and what to use."""
    set_environment(OURS[0])
    register()
    message = str(refused(lambda: sglang.backends["fa4"](None)))
    for part in ("--attention-backend fa4", "--attention-backend fa3", "SGLANG_MUSA_EXT=off"):
        assert part in message


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "mate"])
def test_on_without_a_musa_device_is_refused(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None], kernels: str
) -> None:
    """``on`` turns the absence of a device into an error: seen, expected, remedy."""
    set_environment({"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": kernels})
    register()
    message = str(refused(lambda: sglang.backends["fa3"](None)))
    for part in (
        "SGLANG_MUSA_EXT=on",
        "no MUSA device",
        "Install torch_musa and torchada",
        "SGLANG_MUSA_EXT_KERNELS=hopper",
        "SGLANG_MUSA_EXT=auto",
        "SGLANG_MUSA_EXT=off",
    ):
        assert part in message


@pytest.mark.parametrize(("variable", "value", "choices"), BAD)
def test_a_bad_value_is_refused_when_a_server_asks(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    variable: str,
    value: str,
    choices: str,
) -> None:
    """A bad value of a variable stops FA3, with variable, value and choices, device or not."""
    set_environment({variable: value})
    register()
    message = str(refused(lambda: sglang.backends["fa3"](None)))
    for part in (f"{variable}={value!r}", choices, "SGLANG_MUSA_EXT=off"):
        assert part in message


def broken_contract(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the contract is broken")


def test_a_broken_contract_refuses_every_way_to_fa3(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a SGLang that we cannot compose with, fa3, fa4 and both draft methods say so."""
    set_environment(OURS[0])
    monkeypatch.setattr(check, "require_upstream", broken_contract)
    register()
    messages = sglang.refusals()
    assert len(messages) == 4
    assert all("sglang-musa-ext" in message for message in messages)
    assert all("the contract is broken" in message for message in (messages[0], *messages[2:]))


def test_a_refusal_carries_its_cause(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first error is the cause of the one that stops the server, with its traceback."""
    set_environment(OURS[0])
    monkeypatch.setattr(check, "require_upstream", broken_contract)
    register()
    cause = refused(lambda: sglang.backends["fa3"](None)).__cause__
    assert isinstance(cause, RuntimeError)
    assert cause.__traceback__ is not None


def test_a_problem_is_logged_as_an_error(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever reads the log of a server that was given another backend still sees the problem."""
    set_environment({"SGLANG_MUSA_EXT": "maybe"})
    register()
    assert [record.levelname for record in caplog.records if "maybe" in record.getMessage()] == [
        "ERROR"
    ]


def test_a_broken_contract_is_nothing_where_it_stays_idle(
    sglang: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without MUSA, a SGLang that is too new is served as it is."""
    monkeypatch.setattr(check, "require_upstream", broken_contract)
    register()
    assert sglang.backends["fa3"] is sglang.fa3


def test_a_problem_on_a_musa_device_leaves_nothing_half_installed(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When taking over stops half way, what was taken over refuses too."""
    set_environment(OURS[0])
    take_over, calls = plugin._take_over, []

    def stops_half_way(*creators: Any) -> None:
        calls.append(creators)
        take_over(*creators)
        if len(calls) == 1:
            raise RuntimeError("half way")

    monkeypatch.setattr(plugin, "_take_over", stops_half_way)
    register()
    assert "half way" in str(refused(lambda: sglang.backends["fa3"](None)))
    assert "half way" in str(refused(lambda: sglang.draft(DRAFT_METHODS[0])))


@pytest.mark.parametrize("missing", ["module", "class", "method"])
def test_a_draft_factory_that_is_gone_does_not_let_fa3_through(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    """Nothing escapes ``register``, and fa3 refuses, even if upstream moved something."""
    set_environment(OURS[0])
    if missing == "module":
        monkeypatch.setitem(sys.modules, "sglang.srt.speculative.draft_utils", None)
    elif missing == "class":
        monkeypatch.delattr(sglang.draft_utils, "DraftBackendFactory")
    else:
        monkeypatch.delattr(sglang.factory, DRAFT_METHODS[1])
    register()
    refused(lambda: sglang.backends["fa3"](None))


# Devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(2, 1), (2, 2), (3, 0)])
def test_an_old_musa_device_is_refused(
    sglang: Upstream,
    musa: Callable[[tuple[int, int]], None],
    attention: Any,
    capability: tuple[int, int],
) -> None:
    """A GPU without MATE kernels is refused with its version, the least, and another backend."""
    musa(capability)
    message = str(refused(lambda: create_musa_fa3_backend(RUNNER)))
    for part in (".".join(map(str, capability)), "3.1", "--attention-backend triton"):
        assert part in message
    assert not attention.installed


@pytest.mark.parametrize("capability", [(3, 1), (3, 2), (4, 0), (10, 0)])
def test_a_new_enough_musa_device_is_served(
    musa: Callable[[tuple[int, int]], None], attention: Any, capability: tuple[int, int]
) -> None:
    """MP31 and up get our backend, for the runner that asked."""
    musa(capability)
    assert create_musa_fa3_backend(RUNNER).runner is RUNNER


def test_an_old_musa_device_is_refused_for_drafts(
    sglang: Upstream,
    set_environment: Callable[[dict[str, str]], None],
    musa: Callable[[tuple[int, int]], None],
    attention: Any,
) -> None:
    """A draft model on such a GPU gets the same answer."""
    musa((2, 2))
    set_environment({"SGLANG_MUSA_EXT": "on"})
    register()
    for method in DRAFT_METHODS:
        assert "2.2" in str(refused(functools.partial(sglang.draft, method)))


def test_the_capability_of_other_devices_is_not_asked_for(
    sglang: Upstream, monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    """Without a MUSA device other kernels are served; a CPU has no capability to compare."""
    monkeypatch.setattr("sglang.srt.utils.get_device_capability", lambda: (None, None))
    assert create_musa_fa3_backend(RUNNER).runner is RUNNER


def test_building_a_backend_installs_what_it_needs_first(sglang: Upstream, attention: Any) -> None:
    """Dispatch and report are in place before the first backend exists."""
    attention.MusaFA3Backend = lambda runner: SimpleNamespace(
        installed_before=list(attention.installed), **BACKEND
    )
    before = create_musa_fa3_backend(RUNNER).installed_before
    assert {"install_kernel_dispatch", "install_state_report"} <= set(before)


@pytest.mark.parametrize(
    ("options", "chunk", "fatal"),
    [
        ({"speculative_algorithm": "NGRAM"}, 128, False),
        ({}, 100, True),
    ],
)
def test_what_upstream_cannot_serve_is_said_at_start(
    sglang: Upstream,
    attention: Any,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    chunk: int,
    fatal: bool,
) -> None:
    """A limit of upstream's stops a server that it would end later, or warns."""
    server_args = SimpleNamespace(**(vars(RUNNER.server_args) | options))
    hf_config = SimpleNamespace(
        architectures=["Llama4ForConditionalGeneration"], attention_chunk_size=chunk
    )
    changed = {"server_args": server_args, "model_config": SimpleNamespace(hf_config=hf_config)}
    runner = SimpleNamespace(**(vars(RUNNER) | changed))
    if fatal:
        with pytest.raises(PluginError, match="fa3 does not serve attention in chunks"):
            create_musa_fa3_backend(runner)
    else:
        assert create_musa_fa3_backend(runner).runner is runner
        assert "NGRAM" in caplog.text


@pytest.mark.parametrize(("on_musa", "stops"), [(True, True), (False, False)])
def test_what_upstream_cannot_serve_on_musa_is_refused_there(
    sglang: Upstream, attention: Any, monkeypatch: pytest.MonkeyPatch, on_musa: bool, stops: bool
) -> None:
    """The same model runs where SGLang does not take the device for a MUSA one."""
    monkeypatch.setattr("sglang.srt.utils.is_musa", lambda: on_musa)
    monkeypatch.setattr("sglang.srt.utils.get_device_capability", lambda: (3, 1))
    latent = BACKEND | {"use_mla": True, "kv_cache_dtype": "torch.float16"}
    attention.MusaFA3Backend = lambda runner: SimpleNamespace(runner=runner, **latent)
    hf_config = SimpleNamespace(architectures=["DeepseekV3ForCausalLM"])
    model_config = SimpleNamespace(hf_config=hf_config, dtype="torch.float16")
    runner = SimpleNamespace(**(vars(RUNNER) | {"model_config": model_config}))
    if stops:
        with pytest.raises(PluginError, match="--dtype bfloat16"):
            create_musa_fa3_backend(runner)
    else:
        assert create_musa_fa3_backend(runner).runner is runner


# Draft models ------------------------------------------------------------------------------------


class Built(SimpleNamespace):
    """A stand-in of a backend that keeps the arguments it is built with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(args=args, kwargs=kwargs)


@pytest.fixture
def our_classes(sglang: Upstream, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The attention module with classes that build nothing, of which nothing stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real: Any = importlib.import_module("sglang_musa_ext.attention.selection")
    for name in ("install_kernel_dispatch", "install_state_report"):
        monkeypatch.setattr(real, name, lambda: None)
    for name in ("MusaFA3Backend", "MusaFA3MultiStepDraftBackend"):
        monkeypatch.setattr(real, name, type(name, (Built,), {}))
    before = (real.upstream.FlashAttentionBackend, real.upstream.FlashAttentionMultiStepBackend)
    yield real
    assert (
        real.upstream.FlashAttentionBackend,
        real.upstream.FlashAttentionMultiStepBackend,
    ) == before
    assert real.IN_TREE_MODULE not in sys.modules


@pytest.mark.parametrize("on_musa", [False, True], ids=["upstream", "in-tree"])
@pytest.mark.parametrize(
    ("method", "cls"),
    [(DRAFT_METHODS[0], "MusaFA3MultiStepDraftBackend"), (DRAFT_METHODS[1], "MusaFA3Backend")],
)
def test_drafts_are_ours_and_returned_as_upstream_returns_them(
    sglang: Upstream,
    our_classes: Any,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
    on_musa: bool,
    method: str,
    cls: str,
) -> None:
    """The draft factory returns a name and our class, in place of any of its own."""
    monkeypatch.setattr(sglang.draft_utils, "is_musa", lambda: on_musa)
    set_environment(OURS[0])
    register()
    name, backend = sglang.draft(method)
    assert name == "fa3"
    assert type(backend) is getattr(our_classes, cls)
    assert backend.args[0] is RUNNER
    assert backend.kwargs["fa_impl_ver"] == 3


def test_a_draft_that_fails_puts_upstreams_names_back(
    sglang: Upstream,
    our_classes: Any,
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error while a draft backend is built leaves upstream's module as it was."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(our_classes, "MusaFA3Backend", fail)
    set_environment(OURS[0])
    register()
    with pytest.raises(RuntimeError, match="no memory"):
        sglang.draft("_create_fa_prefill_backend")
    assert our_classes.upstream.FlashAttentionBackend is our_classes.FlashAttentionBackend


def test_a_draft_method_keeps_its_name_and_signature(
    sglang: Upstream, set_environment: Callable[[dict[str, str]], None]
) -> None:
    """Whoever looks at the draft factory sees upstream's methods."""
    set_environment(OURS[0])
    register()
    for name in DRAFT_METHODS:
        assert getattr(sglang.factory, name).__name__ == name
        assert getattr(sglang.factory, name).__wrapped__ is patching.original_of(
            getattr(sglang.factory, name)
        )


# The platform ------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", [None, "", "another_platform", "MUSA_REFERENCE"])
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_platform_is_inactive_unless_named(
    monkeypatch: pytest.MonkeyPatch, platform: str | None, mode: str
) -> None:
    """This platform waits to be named: two that activate themselves are a start-up error."""
    monkeypatch.setenv("SGLANG_MUSA_EXT", mode)
    if platform is not None:
        monkeypatch.setenv("SGLANG_PLATFORM", platform)
    assert activate_platform() is None


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_the_platform_is_found_by_the_name_it_returns(
    imported: Upstream, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """SGLang gets the name of a class of its own platform interface."""
    from sglang.srt.platforms.interface import SRTPlatform

    monkeypatch.setenv("SGLANG_PLATFORM", "musa_reference")
    monkeypatch.setenv("SGLANG_MUSA_EXT", mode)
    name = activate_platform()
    assert name is not None
    assert issubclass(pkgutil.resolve_name(name), SRTPlatform)


def test_the_platform_and_off_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the platform of a package that is turned off names both variables."""
    monkeypatch.setenv("SGLANG_PLATFORM", "musa_reference")
    monkeypatch.setenv("SGLANG_MUSA_EXT", "off")
    message = str(refused(activate_platform))
    for part in ("SGLANG_PLATFORM=musa_reference", "SGLANG_MUSA_EXT=off", "Unset one"):
        assert part in message


def test_the_platform_refuses_bad_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang raises what activation raises, so a bad value needs no detour here."""
    monkeypatch.setenv("SGLANG_PLATFORM", "musa_reference")
    monkeypatch.setenv("SGLANG_MUSA_EXT", "maybe")
    with pytest.raises(ValueError, match="SGLANG_MUSA_EXT='maybe'"):
        activate_platform()


# Defaults on MUSA --------------------------------------------------------------------------------


def test_a_musa_device_gets_the_defaults(
    sglang: Upstream, musa: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registering beside a MUSA device puts its defaults in place."""
    installed: list[bool] = []
    musa((3, 1))
    monkeypatch.setattr(
        "sglang_musa_ext.musa_defaults.install_defaults", lambda: installed.append(True)
    )
    register()
    assert installed


def test_a_broken_contract_of_defaults_costs_them_alone(
    sglang: Upstream,
    musa: Callable[[tuple[int, int]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where upstream chooses its backend in another way, fa3 serves those who ask for it."""
    installed: list[bool] = []
    musa((3, 1))
    monkeypatch.setattr(
        "sglang_musa_ext.musa_defaults.install_defaults", lambda: installed.append(True)
    )
    monkeypatch.setattr(check, "check_upstream", lambda *, used_by: [f"moved: {used_by}"])
    register()
    assert not installed
    assert sglang.backends["fa3"] is create_musa_fa3_backend
    assert "moved: ('musa_defaults',)" in caplog.text
    assert "--attention-backend fa3" in caplog.text


def test_ranks_that_cannot_be_compared_are_an_error_where_it_was_asked_for(
    sglang: Upstream,
    musa: Callable[[tuple[int, int]], None],
    set_environment: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLANG_MUSA_EXT=on promises ranks that are alike, and does not serve without knowing."""
    musa((3, 1))
    monkeypatch.setattr(check, "check_upstream", lambda *, used_by: [f"moved: {used_by}"])
    support = releases.Support("0.5.99", releases.Standing.NEWER)
    monkeypatch.setattr(check, "require_upstream", lambda: support)
    set_environment({"SGLANG_MUSA_EXT": "on"})
    register()
    with pytest.raises(PluginError, match=r"moved: \('ranks',\)"):
        sglang.backends["fa3"](None)
