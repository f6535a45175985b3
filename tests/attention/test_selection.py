"""With the plugin on, every way of upstream to an FA3 backend leads to ours, or is refused.

The ways are those of SGLang's own code in the installed release. That there is no other is checked
on the sources of every release: the rows of kind ``constructors`` in
:mod:`sglang_musa_ext.upstream` list the modules that may construct a ``FlashAttentionBackend``, and
a release with one more violates the contract.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from sglang_musa_ext import patching, plugin, policy
from sglang_musa_ext.guard import NotServedByUsError
from sglang_musa_ext.upstream import check
from sglang_musa_ext.upstream.names import DRAFT_METHODS, KERNEL_PARAMETERS
from tests.support.backend import (
    LinearStandIn,
    Model,
    PretrainedConfig,
    SpeculativeAlgorithm,
    attention,
    attention_layer,
    counted,
    upstream,
)

SPEC = {
    "speculative_algorithm": "EAGLE",
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


@pytest.fixture(scope="module")
def contract() -> Callable[..., Any]:
    """``check_upstream`` with a memory: it reads SGLang's sources, which stay as they are."""
    return functools.cache(check.check_upstream)


@pytest.fixture
def plugin_on(monkeypatch: pytest.MonkeyPatch, contract: Callable[..., Any]) -> Iterator[None]:
    """Register the plugin in this process, and take out afterwards what it put into upstream."""
    with warnings.catch_warnings():
        # From 0.5.22 on its import says that Triton has no driver here.
        warnings.simplefilter("ignore")
        from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.speculative import dflash_utils
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    monkeypatch.setenv("SGLANG_PLATFORM", policy.REFERENCE_PLATFORM)
    monkeypatch.setattr(check, "check_upstream", contract)
    places: list[tuple[Any, str]] = [
        (upstream.FlashAttentionBackend, "__init__"), (Scheduler, "get_internal_state"),
        (dflash_utils, "_DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS"),
    ]  # fmt: skip
    places += [(upstream, name) for name in KERNEL_PARAMETERS]
    places += [(DraftBackendFactory, name) for name in DRAFT_METHODS]
    finders = [x for x in sys.meta_path if type(x).__module__ != patching.__name__]
    monkeypatch.setattr(sys, "meta_path", finders)
    before = [(place, name, getattr(place, name)) for place, name in places]
    registry = dict(ATTENTION_BACKENDS)
    plugin.register()
    yield
    ATTENTION_BACKENDS.clear()
    ATTENTION_BACKENDS.update(registry)
    for place, name, value in before:
        setattr(place, name, value)


def ready_runner(**arguments: Any) -> Any:
    """A stand-in runner with what the factories read beside the backend."""
    runner = Model([attention_layer(0)], arguments=arguments).runner()
    runner.spec_algorithm = SpeculativeAlgorithm.from_string("EAGLE" if arguments else None)
    return runner


@pytest.mark.usefixtures("plugin_on")
def test_the_registry_builds_ours() -> None:
    """``--attention-backend fa3``, which PD-multiplexing and overlap children ask for too."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    backend = ATTENTION_BACKENDS["fa3"](ready_runner())
    assert type(backend) is attention.MusaFA3Backend
    assert isinstance(backend, upstream.FlashAttentionBackend)


@pytest.mark.usefixtures("plugin_on")
@pytest.mark.parametrize("musa", [False, True], ids=["no MUSA", "MUSA"])
@pytest.mark.parametrize("phase", ["decode", "extend"])
def test_draft_factories_build_ours(
    musa: bool, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft decode and draft-extend, where upstream would take in-tree classes and elsewhere."""
    from sglang.srt.speculative import draft_utils

    if hasattr(draft_utils, "is_musa"):
        monkeypatch.setattr(draft_utils, "is_musa", lambda: musa)
    factory = object.__new__(draft_utils.DraftBackendFactory)
    factory.draft_model_runner, factory.topk, factory.speculative_num_steps = (
        ready_runner(**SPEC),
        1,
        4,
    )
    factory.server_args = factory.draft_model_runner.server_args
    create = (
        factory._create_fa3_decode_backend
        if phase == "decode"
        else factory._create_fa3_prefill_backend
    )
    made = create()
    backend = made[1] if isinstance(made, tuple) else made
    if phase == "extend":
        assert type(backend) is attention.MusaFA3Backend
    else:
        assert type(backend) is attention.MusaFA3MultiStepDraftBackend
        assert {type(child) for child in backend.attn_backends} == {attention.MusaFA3Backend}
    assert upstream.FlashAttentionBackend is not attention.MusaFA3Backend


@pytest.mark.usefixtures("plugin_on")
def test_a_foreign_fa3_backend_is_refused_once_ours_serves() -> None:
    """A way to upstream's class that this package does not know is an error, not a fallback."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    runner = ready_runner()
    ATTENTION_BACKENDS["fa3"](runner)
    with pytest.raises(NotServedByUsError, match="in place of MusaFA3Backend"):
        upstream.FlashAttentionBackend(runner)


@pytest.mark.usefixtures("plugin_on")
def test_dflash_knows_our_class_by_name() -> None:
    """DFlash skips the custom mask for backends that are on a list of class names."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.speculative import dflash_utils

    backend = ATTENTION_BACKENDS["fa3"](ready_runner(**SPEC))
    assert type(backend).__name__ in dflash_utils._DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS


def test_registering_twice_is_registering_once(plugin_on: None) -> None:
    """SGLang loads plugins more than once in some processes."""
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    methods = [patching.original_of(getattr(DraftBackendFactory, name)) for name in DRAFT_METHODS]
    plugin.register()
    assert [
        patching.original_of(getattr(DraftBackendFactory, name)) for name in DRAFT_METHODS
    ] == methods


# --- upstream's own set-up of a model runner's backends -------------------------------------------


def upstream_runner(
    layers: tuple[int, ...] = (0,), config: Any = None, **arguments: Any
) -> tuple[Any, Model]:
    """A runner of upstream's own class, as far as the set-up of attention reads it, and its model.

    ``layers`` are the numbers of its attention layers, ``config`` its model's configuration.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.configs.linear_attn_model_registry import get_linear_attn_config
        from sglang.srt.model_executor.model_runner import ModelRunner

    model = Model(
        [attention_layer(index) for index in layers],
        arguments={"attention_backend": "fa3", **arguments},
    )
    runner = object.__new__(ModelRunner)
    vars(runner).update(vars(model.runner()))
    runner.spec_algorithm = SpeculativeAlgorithm.from_string(None)
    runner.use_mla_backend, runner.draft_attention_backend = False, None
    runner.prefill_attention_backend_str = arguments.get("prefill_attention_backend", "fa3")
    runner.decode_attention_backend_str = arguments.get("decode_attention_backend", "fa3")
    config = PretrainedConfig() if config is None else config
    config.num_attention_heads = model.layers[0].tp_q_head_num
    runner.model_config.hf_config = runner.model_config.hf_text_config = config
    # Upstream's own look-up, of its runner or, from 0.5.16 on, of its model's configuration.
    runner.model_config.linear_attn_registry_result = get_linear_attn_config(config)
    runner.model_config.full_attention_layer_ids = getattr(config, "full_attention_layer_ids", None)
    runner._linear_attn_registry_cache = runner.model_config.linear_attn_registry_result
    return runner, model


def backends_of(runner: Any) -> tuple[Any, list[Any]]:
    """Return upstream's backend for ``runner``, and those of PD-multiplexing's groups."""
    try:
        from sglang.srt.model_executor.model_runner_components import attention_backend_setup
    except ImportError:  # Up to 0.5.15.
        runner.init_attention_backend()
        return runner.attn_backend, getattr(runner, "decode_attn_backend_group", [])
    made = attention_backend_setup.build_attention_backends(model_runner=runner)
    return made.attn_backend, made.decode_attn_backend_group


@pytest.mark.usefixtures("plugin_on")
def test_a_model_runner_gets_ours() -> None:
    """The plain way: one backend for prefill and decode."""
    backend, _ = backends_of(upstream_runner()[0])
    assert type(backend) is attention.MusaFA3Backend


@pytest.mark.usefixtures("plugin_on")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_split_of_prefill_and_decode_gets_ours(phase: str) -> None:
    """Of the backends for prefill and for decode, the one that says fa3 is ours."""
    other = "decode" if phase == "prefill" else "prefill"
    split: dict[str, Any] = {f"{other}_attention_backend": "torch_native"}
    backend, _ = backends_of(upstream_runner(**split)[0])
    assert type(backend).__name__ == "HybridAttnBackend"
    assert type(getattr(backend, f"{phase}_backend")) is attention.MusaFA3Backend
    assert type(getattr(backend, f"{other}_backend")).__name__ == "TorchNativeAttnBackend"


@pytest.mark.usefixtures("plugin_on")
def test_two_batch_overlap_gets_ours() -> None:
    """``--enable-two-batch-overlap``: the primary and both children."""
    backend, _ = backends_of(upstream_runner(enable_two_batch_overlap=True)[0])
    assert [type(each) for each in (backend.primary, *backend.children)] == [
        attention.MusaFA3Backend
    ] * 3


@pytest.mark.usefixtures("plugin_on")
def test_pd_multiplexing_groups_get_ours() -> None:
    """``--enable-pdmux``: prefill's backend, and one for each decoding group of processors."""
    backend, groups = backends_of(
        upstream_runner(
            enable_pdmux=True,
            sm_group_num=3,
            chunked_prefill_size=-1,
            disable_overlap_schedule=True,
        )[0]
    )
    assert [type(each) for each in (backend, *groups)] == [attention.MusaFA3Backend] * 4
    assert len({id(each) for each in (backend, *groups)}) == 4


# --- hybrid models --------------------------------------------------------------------------------


class HybridConfig(PretrainedConfig):  # type: ignore[misc]
    """A model whose layers attend by softmax here and linearly elsewhere."""

    full_attention_layer_ids: tuple[int, ...] = ()


@pytest.fixture
def linear_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's registry of hybrid models knows ours, and runs its linear layers on a stand-in."""
    from sglang.srt.configs import linear_attn_model_registry as registry

    name = f"{LinearStandIn.__module__}.{LinearStandIn.__name__}"
    spec = registry.LinearAttnModelSpec(config_class=HybridConfig, backend_class_name=name)
    monkeypatch.setattr(registry, "_LINEAR_ATTN_MODEL_REGISTRY", [spec])


@pytest.mark.usefixtures("plugin_on", "linear_models")
# Upstream's linear attention says while it is imported that Triton has no driver here.
@pytest.mark.filterwarnings("ignore:Triton is not supported")
@pytest.mark.parametrize(
    ("interval", "attending"),
    [
        pytest.param(4, (3, 7, 11), id="full_attention_interval"),
        pytest.param(None, (2, 3, 9), id="no full_attention_interval"),
    ],
)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_full_attention_layers_of_a_hybrid_model_run_on_ours(
    interval: int | None, attending: tuple[int, ...], mode: str
) -> None:
    """Upstream's wrapper keeps ours for layers that attend by softmax; layer 0 is none."""
    config = HybridConfig()
    config.full_attention_layer_ids = attending
    if interval is not None:
        config.full_attention_interval = interval
    runner, model = upstream_runner(attending, config)
    hybrid, _ = backends_of(runner)
    assert type(hybrid).__name__ == "HybridLinearAttnBackend"
    assert type(hybrid.full_attn_backend) is attention.MusaFA3Backend
    requests = model.requests(100, 5, 300)
    with counted(hybrid.full_attn_backend) as counts:
        for _ in range(2):
            step = (
                model.decode(requests) if mode == "decode" else model.extend(requests, [30, 1, 9])
            )
            hybrid.init_forward_metadata(step.batch)
            for number in range(max(attending) + 1):
                _run_layer(hybrid, model, step, number)
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 4)
    assert hybrid.linear_attn_backend.layers == 2 * [
        i for i in range(max(attending) + 1) if i not in attending
    ]


def _run_layer(hybrid: Any, model: Model, step: Any, number: int) -> None:
    """One layer of a hybrid model, its output checked where it attends by softmax."""
    attending = {layer.layer_id: layer for layer in model.layers}
    if number not in attending:
        hybrid.forward(
            layer=attention_layer(number), forward_batch=step.batch, q=None, k=None, v=None
        )
        return
    layer = attending[number]
    inputs = model.inputs(step, layer)
    model.require(
        hybrid.forward(layer=layer, forward_batch=step.batch, **inputs), step, layer, inputs
    )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.usefixtures("plugin_on")
@pytest.mark.parametrize("kernels", ["minicpm_flashattn", "minicpm_flashinfer"])
def test_minicpm_s_own_backend_is_refused(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniCPM's sparse attention builds upstream's backend for itself."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if kernels not in ATTENTION_BACKENDS:
        pytest.skip("this SGLang has no backend for MiniCPM")
    for name in ("infllmv2_attn_stage1", "max_pooling_1d_varlen"):
        monkeypatch.setattr(import_module("sgl_kernel"), name, None, raising=False)
    ATTENTION_BACKENDS["fa3"](ready_runner())
    with pytest.raises(NotServedByUsError, match="in place of MusaFA3Backend"):
        ATTENTION_BACKENDS[kernels](ready_runner())


@pytest.mark.usefixtures("plugin_on")
def test_fa4_is_refused() -> None:
    """``--attention-backend fa4`` says what to choose, through upstream's own set-up."""
    runner, _ = upstream_runner(
        attention_backend="fa4", prefill_attention_backend="fa4", decode_attention_backend="fa4"
    )
    with pytest.raises(plugin.PluginError, match="--attention-backend fa3"):
        backends_of(runner)


@pytest.mark.usefixtures("plugin_on")
def test_the_in_tree_musa_classes_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that constructs upstream's MUSA backend is refused as for any other foreign one."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS["fa3"](ready_runner())
    interface: Any = ModuleType("flash_attn_interface")
    for name in (
        "flash_attn_varlen_func",
        "flash_attn_with_kvcache",
        "get_scheduler_metadata",
        "flash_attn_func",
    ):
        setattr(interface, name, None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    package = attention.IN_TREE_MODULE.rpartition(".")[0]
    for name in (package, attention.IN_TREE_MODULE):
        # Imported for this test alone, and forgotten after it.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    module = import_module(attention.IN_TREE_MODULE)
    with pytest.raises(NotServedByUsError, match="MusaFlashAttentionBackend was about to serve"):
        module.MusaFlashAttentionBackend(ready_runner())
    with pytest.raises(NotServedByUsError, match="MusaFlashAttentionBackend was about to serve"):
        module.MusaFlashAttentionMultiStepBackend(ready_runner(**SPEC), 1, 4)
