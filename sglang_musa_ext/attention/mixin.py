"""Composition: upstream's ``FlashAttentionBackend`` on the kernels of this package.

``MusaFA3Backend(MusaFA3Mixin, FlashAttentionBackend)`` runs upstream's own forwards. While one of
them runs, the kernel names that it calls lead here, where each call gets the plan of its pass and
geometry and goes to the selected kernels. No forward and no metadata method of upstream is copied
or re-implemented.
"""

from __future__ import annotations

import functools
import logging
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import ModuleType
from typing import Any, NamedTuple

import sglang
import torch
from sglang.srt.layers.attention import flashattention_backend as upstream
from sglang.srt.layers.attention.flashattention_backend import (
    FlashAttentionBackend,
    FlashAttentionMultiStepBackend,
)

from sglang_musa_ext.attention.plans import (
    NOT_REMEMBERED,
    CallGeometry,
    MLAWorkspace,
    SchedulerMetadataCache,
    stream_probe,
)
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    UnsupportedByKernels,
    reference_kernels,
    select_kernels,
)

logger = logging.getLogger(__name__)

KERNEL_PARAMETERS = {
    "flash_attn_with_kvcache": ("q", "k_cache", "v_cache"),
    "flash_attn_varlen_func": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
}
"""The module globals through which upstream's forwards call FA3, with the parameters they may pass
by position.
"""

PASS_METHODS = (
    "init_forward_metadata",
    "init_forward_metadata_capture_cuda_graph",
    "init_forward_metadata_replay_cuda_graph",
    "init_forward_metadata_out_graph",
    "init_forward_metadata_in_graph",
    "stage_draft_extend_metadata",
    "on_after_cuda_graph_warmup",
    "init_forward_metadata_for_breakable_cuda_graph_capture",
    "prepare_forward_metadata_for_breakable_cuda_graph_replay",
    "prepare_full_cuda_graph_chunked_prefix",
)
"""Upstream methods that prepare metadata for a forward pass, over all releases: none of a pass's
plans outlives one.
"""

IN_TREE_MODULE = "sglang.srt.hardware_backend.musa.attention.flashattention_backend"
"""Upstream's own MUSA backend, which the draft factory imports by this name on a MUSA device."""


class UnsupportedAttentionVersion(ValueError):
    """Another attention version than FA3 was asked for."""


class _RunningLayers(threading.local):
    """The backends whose layers run on this thread, innermost last.

    Per thread, so that two engines in two threads do not meet. A ``ContextVar`` would do the same,
    but Dynamo cannot trace one (checked on torch 2.13), and upstream traces its models under
    ``--enable-torch-compile``.
    """

    def __init__(self) -> None:
        self.stack: list[MusaFA3Mixin] = []


_RUNNING = _RunningLayers()
_CONSTRUCTION = threading.RLock()
"""Held while names of upstream's modules stand for ours; see :func:`upstream_builds_ours`."""


class MusaFA3Mixin:
    """Puts the selected kernels, and plans that live for one pass, under upstream's forwards."""

    _OUTSIDE = object()
    """Stands for the forward batch of a kernel call that no layer makes."""

    use_mla: bool
    topk: int
    page_size: int
    kv_cache_dtype: torch.dtype
    forward_metadata: object

    def __init__(self, model_runner: Any, *args: Any, fa_impl_ver: int = 3, **kwargs: Any) -> None:
        """Build upstream's backend for ``model_runner``, then put it on the kernels that the
        settings select.

        Takes the arguments of upstream's ``FlashAttentionBackend``.

        Raises:
            UnsupportedAttentionVersion: ``fa_impl_ver`` is not 3.
            KernelsUnavailable: the kernel library is missing, or is another one.
            UnsupportedByKernels: page size, KV-cache dtype or speculative tree are not for these
                kernels.
        """
        if fa_impl_ver != 3:
            raise UnsupportedAttentionVersion(
                f"FlashAttention {fa_impl_ver} was asked for (fa_impl_ver={fa_impl_ver}), and this "
                "backend has "
                "FlashAttention 3 alone. Start the server with --attention-backend fa3."
            )
        self._settings = Settings.from_environ()
        # Read off the pool because the runner's own device name carries no index.
        self._pool_device: torch.device = model_runner.req_to_token_pool.req_to_token.device
        self._kernels = select_kernels(self._settings, self._pool_device)
        with _importable_fa3(self._kernels):
            super().__init__(model_runner, *args, fa_impl_ver=fa_impl_ver, **kwargs)  # type: ignore[call-arg]
        self._kernels.require(
            page_size=self.page_size, kv_cache_dtype=self.kv_cache_dtype, use_mla=self.use_mla
        )
        if not model_runner.is_draft_worker:
            self._refuse_trees_over_latent_pages()
        self._replace_upstream_kernels()
        self._plans = SchedulerMetadataCache(stream_probe(self._pool_device))
        self._workspace = self._mla_workspace()
        self._sites: dict[tuple[str, ...], _CallSite] = {}
        # A check sees every call, a plan for every call reuses none, and a plan in a workspace is
        # its slot's.
        self._recalls = (
            self._settings.check == "off"
            and not self._settings.force_update_metadata
            and self._workspace is None
        )
        _BACKENDS.add(self)
        logger.info("sglang_musa_ext serves attention: %s", self._configuration())

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Upstream's forward for prefill, verify and draft-extend, on the selected kernels."""
        self._plans.begin_layer(layer, forward_batch, self.forward_metadata)
        running = _RUNNING.stack
        running.append(self)
        try:
            return super().forward_extend(q, k, v, layer, forward_batch, *args, **kwargs)  # type: ignore[misc]
        finally:
            running.pop()

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Upstream's forward for decode, on the selected kernels."""
        self._plans.begin_layer(layer, forward_batch, self.forward_metadata)
        running = _RUNNING.stack
        running.append(self)
        try:
            return super().forward_decode(q, k, v, layer, forward_batch, *args, **kwargs)  # type: ignore[misc]
        finally:
            running.pop()

    def flash_attn_with_kvcache(self, **arguments: Any) -> Any:
        """FA3's function of this name over a paged KV cache, with the plan of this pass."""
        if not (_RUNNING.stack and _RUNNING.stack[-1] is self):
            self._begin_outside()
        return self._call_flash_attn_with_kvcache(arguments)

    def flash_attn_varlen_func(self, **arguments: Any) -> Any:
        """FA3's function of this name over raw keys and values; it takes no plan, as upstream
        passes none.
        """
        return self._call_flash_attn_varlen_func(arguments)

    def _call_flash_attn_with_kvcache(self, arguments: dict[str, Any]) -> Any:
        plans = self._plans
        plans.statistics.calls += 1
        if arguments.get("k") is None:
            # Upstream passes the cumulative lengths of all keys under this name. FA3 reads it as
            # lengths of keys still to be appended, which a plan then counts twice, so it goes only
            # where new keys go.
            arguments.pop("cu_seqlens_k_new", None)
        names = tuple(arguments)
        site = self._sites.get(names) or self._new_site(names)
        signature = _signature(arguments, site) if self._recalls else None
        metadata = plans.begin_call(signature)
        if metadata is NOT_REMEMBERED:
            metadata = self._scheduler_metadata(arguments, signature)
        arguments["scheduler_metadata"] = metadata
        result = site.attention(**arguments)
        if self._settings.check == "output" and not plans.capturing:
            _require_reference_output(result, arguments, self._pool_device, plans)
        return result

    def _call_flash_attn_varlen_func(self, arguments: dict[str, Any]) -> Any:
        self._plans.statistics.calls += 1
        return self._kernels.flash_attn_varlen_func(**arguments)

    def musa_fa3_report(self) -> dict[str, Any]:
        """What this backend is and has done, as plain data: for logs, ``/server_info`` and tests."""
        return {
            "backend": type(self).__name__,
            "kernels": self._kernels.name,
            "sglang": sglang.__version__,
            "versions": dict(self._kernels.versions),
            "device": str(self._pool_device),
            "page_size": self.page_size,
            "settings": asdict(self._settings),
            "statistics": self._plans.statistics.report(),
        }

    def _configuration(self) -> str:
        """What this backend serves with, as one line for a log."""
        versions = ", ".join(
            f"{name} {version}" for name, version in self._kernels.versions.items()
        )
        workspace = "none" if self._workspace is None else f"{self._settings.mla_workspace_mb} MiB"
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (
            f"{type(self).__name__} on {self._kernels.name} kernels ({versions}), rank "
            f"{torch.distributed.get_rank() if distributed else 0}, device {self._pool_device}, "
            "page size "
            f"{self.page_size}, MLA workspace {workspace}, checks {self._settings.check}, plans "
            f"{'for every call' if self._settings.force_update_metadata else 'reused within a pass'}, "
            f"SGLang {sglang.__version__}"
        )

    def _begin_outside(self) -> None:
        """Have the next kernel call be a pass of its own, which no layer makes."""
        # No layer has this batch, so that what comes before and after is another pass.
        self._plans.begin_layer(None, self._OUTSIDE, None)
        self._plans.end_pass()

    def _new_site(self, names: tuple[str, ...]) -> _CallSite:
        """The site of the first call with these names."""
        attention = self._kernels.attention((*names, "scheduler_metadata"))
        site = self._sites[names] = _CallSite(names, attention, _values_getter(names))
        return site

    def _scheduler_metadata(self, arguments: dict[str, Any], signature: object) -> Any:
        """The ``scheduler_metadata`` of a call: a tensor, for MLA on MATE ``(workspace, reuse)``,
        or ``None``.
        """
        tensors = tuple(arguments.get(name) for name in _PLANNED_TENSORS)
        if not self._takes_plan(arguments):
            self._plans.remember(signature, None, tensors)
            return None
        geometry = _geometry(arguments, self._kernels)
        if self._settings.force_update_metadata:
            self._plans.forget_plans()
        if geometry.has_qv and self._workspace is not None:
            return self._mla_plan(geometry, tensors, arguments)
        compute = functools.partial(self._compute_plan, geometry, arguments)
        plan, reused = self._plans.plan(geometry, tensors, compute)
        if reused and self._checking:
            used, fresh = (
                self._kernels.plan_contents(p, geometry.batch_size) for p in (plan, compute())
            )
            _require_same_plan(used, fresh, geometry, self._plans)
        self._plans.remember(signature, plan, tensors)
        return plan

    def _takes_plan(self, arguments: dict[str, Any]) -> bool:
        """Whether a call gets a plan: where the kernels have one for it, and where theirs would not
        do as well.
        """
        if self._kernels.plans_for_itself and self._plans.most_calls == 1:
            # A draft model of one layer, say: nothing would reuse a plan, and the host takes long
            # to compute one.
            return False
        return self._kernels.plans_unequal_queries or _has_equal_queries(arguments)

    @property
    def _checking(self) -> bool:
        """Whether reused plans are to be recomputed. A comparison waits for the device, which a
        capture forbids.
        """
        return self._settings.check != "off" and not self._plans.capturing

    def _compute_plan(self, geometry: CallGeometry, arguments: dict[str, Any]) -> torch.Tensor:
        fields = geometry._asdict()
        del fields["has_qv"], fields["device"]
        tensors = {
            name: arguments[name] for name in _PLANNED_TENSORS if arguments.get(name) is not None
        }
        return self._kernels.get_scheduler_metadata(**fields, **tensors)

    def _mla_plan(
        self,
        geometry: CallGeometry,
        tensors: tuple[torch.Tensor | None, ...],
        arguments: dict[str, Any],
    ) -> tuple[torch.Tensor, bool]:
        assert self._workspace is not None and self._kernels.mla_plan_bytes is not None
        role = self._plans.role
        size = self._kernels.mla_plan_bytes(
            geometry.batch_size, geometry.max_seqlen_q, geometry.num_heads_q, geometry.device
        )
        slot = self._workspace.slot(self, role, size)
        reuse = self._plans.plan_in_place(role, geometry, tensors)
        if reuse and self._checking:
            # The kernel writes its plan itself, so a fresh one takes a call. Bytes it leaves alone
            # stay equal.
            fresh = slot.clone()
            self._kernels.flash_attn_with_kvcache(
                **arguments | {"scheduler_metadata": (fresh, False), "out": None}
            )
            _require_same_plan(
                slot.view(torch.int32), fresh.view(torch.int32), geometry, self._plans
            )
        return slot, reuse

    def _mla_workspace(self) -> MLAWorkspace | None:
        """Taken now because a graph capture must not be the first to allocate it."""
        if not self.use_mla or self._kernels.mla_plan_bytes is None:
            return None
        return MLAWorkspace.of_device(self._pool_device, self._settings.mla_workspace_mb << 20)

    def _refuse_trees_over_latent_pages(self) -> None:
        """Refuse what upstream's verify of an MLA model gets wrong: a table of tokens over pages of
        many tokens.
        """
        if self.use_mla and self.topk > 1 and self.page_size > 1:
            raise UnsupportedByKernels(
                f"--speculative-eagle-topk {self.topk} does not work with an MLA model at "
                "--page-size "
                f"{self.page_size}: to verify a tree, SGLang passes a table of tokens for one of "
                "pages, and kernels "
                "then read elsewhere. Start the server with --speculative-eagle-topk 1."
            )

    def _replace_upstream_kernels(self) -> None:
        """Let the methods above be found under the names of upstream's instance attributes, and
        turn off its plans.

        Upstream precomputes metadata for plain decode layers alone, with its own kernels; ours
        covers every call.
        """
        self._get_scheduler_metadata = None
        for name in KERNEL_PARAMETERS:
            vars(self).pop(name, None)


class MusaFA3Backend(MusaFA3Mixin, FlashAttentionBackend):  # type: ignore[misc]
    """Upstream's FlashAttention backend on the kernels of this package; what
    ``--attention-backend fa3`` builds.
    """


class MusaFA3MultiStepDraftBackend(FlashAttentionMultiStepBackend):  # type: ignore[misc]
    """Upstream's multi-step draft backend, whose children are :class:`MusaFA3Backend`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of upstream's ``FlashAttentionMultiStepBackend``."""
        with upstream_builds_ours():
            super().__init__(*args, **kwargs)


_BACKENDS: weakref.WeakSet[MusaFA3Mixin] = weakref.WeakSet()
"""The live backends of this process, for reports alone: nothing is served from here."""

_PLANNED_TENSORS = ("cache_seqlens", "cu_seqlens_q", "cache_leftpad", "cu_seqlens_k_new")
"""The tensors whose contents a plan depends on."""
_PLANNED_VALUES = (
    "max_seqlen_q", "causal", "window_size", "softcap", "attention_chunk", "num_splits", "pack_gqa", "sm_margin",
)  # fmt: skip
"""What a plan depends on that is no tensor."""


class _CallSite(NamedTuple):
    """What ``flash_attn_with_kvcache`` calls with the same argument names share, worked out once a
    backend.
    """

    names: tuple[str, ...]
    attention: Callable[..., Any]
    """What serves them."""
    values: Callable[[dict[str, Any]], Any]
    """Gets those of :data:`_PLANNED_VALUES` that they have."""


def _values_getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
    present = [name for name in _PLANNED_VALUES if name in names]
    return operator.itemgetter(*present) if present else lambda arguments: ()


def _geometry(arguments: dict[str, Any], kernels: FA3Kernels) -> CallGeometry:
    """What the plan of a ``flash_attn_with_kvcache`` call depends on besides tensor contents."""
    q, k_cache, page_table = arguments["q"], arguments["k_cache"], arguments.get("page_table")
    cu_seqlens_q = arguments.get("cu_seqlens_q")
    return CallGeometry(
        batch_size=q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        max_seqlen_q=q.shape[1] if cu_seqlens_q is None else arguments["max_seqlen_q"],
        max_seqlen_k=k_cache.shape[1] * (page_table.shape[1] if page_table is not None else 1),
        num_heads_q=q.shape[-2],
        num_heads_kv=k_cache.shape[-2],
        headdim=q.shape[-1],
        headdim_v=arguments["v_cache"].shape[-1],
        qkv_dtype=q.dtype,
        page_size=k_cache.shape[1] if page_table is not None else None,
        causal=bool(arguments.get("causal", False)),
        window_size=tuple(arguments.get("window_size") or (-1, -1)),
        attention_chunk=arguments.get("attention_chunk") or 0,
        has_softcap=kernels.metadata_uses_softcap and arguments.get("softcap", 0.0) > 0.0,
        num_splits=arguments.get("num_splits", 0),
        pack_gqa=arguments.get("pack_gqa"),
        sm_margin=arguments.get("sm_margin", 0),
        has_qv=arguments.get("qv") is not None,
        device=q.device,
    )


def _signature(arguments: dict[str, Any], site: _CallSite) -> tuple[Any, ...] | None:
    """What is equal for two calls of a pass only if their plans are; ``None`` for calls that are
    told apart otherwise.

    The geometry and the tensors' identities say the same, and are worked out where no call before
    had this signature. Doing so for every layer would take the host longer than the kernel that
    reuse spares.
    """
    get = arguments.get
    cache_seqlens, cu_seqlens_q, page_table = (
        get("cache_seqlens"),
        get("cu_seqlens_q"),
        get("page_table"),
    )
    if cache_seqlens is None or cu_seqlens_q is None or page_table is None:
        return None
    if get("cache_leftpad") is not None or get("cu_seqlens_k_new") is not None:
        return None
    q = arguments["q"]
    return (
        # A call that has these alive can have no others at their addresses.
        id(cache_seqlens), -1 if cache_seqlens.is_inference() else cache_seqlens._version,
        id(cu_seqlens_q), -1 if cu_seqlens_q.is_inference() else cu_seqlens_q._version,
        q.shape, q.dtype, q.device, arguments["k_cache"].shape, arguments["v_cache"].shape, page_table.shape,
        get("qv") is None, site.names, site.values(arguments),
    )  # fmt: skip


def _has_equal_queries(arguments: dict[str, Any]) -> bool:
    """Whether every request of a call has as many queries as the one with the most: known without
    the device.
    """
    cu_seqlens_q = arguments.get("cu_seqlens_q")
    if cu_seqlens_q is None:
        return True
    return bool(arguments["q"].size(0) == (cu_seqlens_q.size(0) - 1) * arguments["max_seqlen_q"])


def _place(plans: SchedulerMetadataCache) -> str:
    """Which call of which layer is running, for an error."""
    return f"layer {getattr(plans.layer, 'layer_id', plans.layer)}, call {plans.role}"


class StalePlanError(RuntimeError):
    """``SGLANG_MUSA_EXT_CHECK`` found a reused plan that differs from the one the call should have."""


def _require_same_plan(
    used: torch.Tensor, fresh: torch.Tensor, geometry: CallGeometry, plans: SchedulerMetadataCache
) -> None:
    if not torch.equal(used, fresh):
        raise StalePlanError(
            f"A reused plan is not the plan of its call: {_place(plans)}, {geometry}.\nreused: "
            f"{used.tolist()}\n"
            f"fresh:  {fresh.tolist()}\nThis is a fault of sglang-musa-ext. Please report it; "
            "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA=1 serves without reuse."
        )


class WrongOutputError(RuntimeError):
    """``SGLANG_MUSA_EXT_CHECK=output`` found an output that differs from the reference's."""


_OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative and absolute; a few units in the last place of each dtype."""


def _require_reference_output(
    result: Any, arguments: dict[str, Any], device: torch.device, plans: SchedulerMetadataCache
) -> None:
    """Compare the output of a layer's call with the PyTorch kernels', which plan for themselves."""
    kernels = reference_kernels()
    plan: Any = None
    if arguments.get("qv") is not None:
        assert kernels.mla_plan_bytes is not None
        geometry = _geometry(arguments, kernels)
        size = kernels.mla_plan_bytes(
            geometry.batch_size, geometry.max_seqlen_q, geometry.num_heads_q, device
        )
        plan = (torch.zeros(size, dtype=torch.uint8, device=device), False)
    expected = kernels.flash_attn_with_kvcache(
        **arguments | {"scheduler_metadata": plan, "out": None}
    )
    expected, output = (
        value[0] if isinstance(value, tuple) else value for value in (expected, result)
    )
    tolerance = _OUTPUT_TOLERANCE[output.dtype]
    # Rows that no query owns are NaN in the reference.
    wrong = ~torch.isclose(output, expected, rtol=tolerance, atol=tolerance) & ~expected.isnan()
    if wrong.any():
        raise WrongOutputError(
            f"The output of {_place(plans)} differs from the reference in "
            f"{int(wrong.sum())} of {wrong.numel()} values (tolerance {tolerance}): "
            f"{_geometry(arguments, kernels)}. "
            "Please report this with the model and the versions of the kernels."
        )


class _KernelDispatcher:
    """Stands in upstream's module for one FA3 function.

    While a layer of our backend runs on this thread, the call is that backend's; otherwise it is
    the original's, so that other users of the module notice nothing.
    """

    def __init__(self, name: str, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self._parameters, self._method = KERNEL_PARAMETERS[name], f"_call_{name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = _RUNNING.stack
        if not running:
            return self.original(*args, **kwargs)
        if args:
            kwargs.update(zip(self._parameters, args, strict=False))
        # The arguments as one dict, because every "**" on the way copies some twenty of them.
        return getattr(running[-1], self._method)(kwargs)


def install_kernel_dispatch() -> Callable[[], None]:
    """Put a dispatcher under each kernel name of upstream's module; returns what takes this call's
    back out.

    Names that have one already are left alone.
    """
    originals = {
        name: function
        for name in KERNEL_PARAMETERS
        if not isinstance(function := getattr(upstream, name), _KernelDispatcher)
    }
    for name, original in originals.items():
        setattr(upstream, name, _KernelDispatcher(name, original))
    return functools.partial(_restore, upstream, originals)


def _restore(module: ModuleType, originals: dict[str, Any]) -> None:
    for name, original in originals.items():
        setattr(module, name, original)


def _ends_pass(name: str) -> Callable[..., Any]:
    """An override of the upstream method ``name`` that also ends the pass, whose plans are void
    from here on.
    """

    @functools.wraps(getattr(FlashAttentionBackend, name))
    def method(self: MusaFA3Mixin, *args: Any, **kwargs: Any) -> Any:
        self._plans.end_pass()
        return getattr(super(MusaFA3Mixin, self), name)(*args, **kwargs)

    return method


for _name in PASS_METHODS:
    # Only what this release has: upstream asks backends which of these methods they define.
    if hasattr(FlashAttentionBackend, _name):
        setattr(MusaFA3Mixin, _name, _ends_pass(_name))


@contextmanager
def _importable_fa3(kernels: FA3Kernels) -> Iterator[None]:
    """Let ``from sgl_kernel.flash_attn import ...`` succeed while upstream's constructor runs.

    Public MUSA builds of ``sgl_kernel`` come without it. The constructor only stores what it
    imports, and :meth:`MusaFA3Mixin._replace_upstream_kernels` removes that again.
    """
    module: Any = ModuleType("sgl_kernel.flash_attn")
    module.flash_attn_with_kvcache = kernels.flash_attn_with_kvcache
    module.flash_attn_varlen_func = kernels.flash_attn_varlen_func
    module.get_scheduler_metadata = kernels.get_scheduler_metadata
    with _CONSTRUCTION, _module_as("sgl_kernel.flash_attn", module):
        yield


@contextmanager
def upstream_builds_ours() -> Iterator[None]:
    """While active, code of upstream that names an FA3 backend class, its own or the in-tree MUSA
    one, gets ours.
    """
    ours = {
        "FlashAttentionBackend": MusaFA3Backend,
        "FlashAttentionMultiStepBackend": MusaFA3MultiStepDraftBackend,
    }
    in_tree: Any = ModuleType(IN_TREE_MODULE)
    in_tree.MusaFlashAttentionBackend = MusaFA3Backend
    in_tree.MusaFlashAttentionMultiStepBackend = MusaFA3MultiStepDraftBackend
    with ExitStack() as stack:
        stack.enter_context(_CONSTRUCTION)
        stack.callback(_restore, upstream, {name: getattr(upstream, name) for name in ours})
        for name, cls in ours.items():
            setattr(upstream, name, cls)
        stack.enter_context(_module_as(IN_TREE_MODULE, in_tree))
        yield


@contextmanager
def _module_as(name: str, module: ModuleType) -> Iterator[None]:
    """Have ``import name`` find ``module`` meanwhile."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def install_class_names() -> Callable[[], None]:
    """Add our backend to upstream's list, by class name, of backends that need no custom mask in
    DFlash's verify.

    Returns what undoes it. Imports a speculative-decoding module, so call it only where a model is
    speculated on.
    """
    from sglang.srt.speculative import dflash_utils

    names = dflash_utils._DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS
    dflash_utils._DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS = names | {MusaFA3Backend.__name__}
    return functools.partial(
        setattr, dflash_utils, "_DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS", names
    )


def install_state_report() -> Callable[[], None]:
    """Add the reports of this process's backends to the scheduler's internal state; returns what
    undoes it.

    They are then part of ``/server_info`` and of ``Engine.get_server_info()``, as
    ``sglang_musa_ext``.
    """
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.get_internal_state
    if getattr(original, "_reports_musa_ext", False):
        return lambda: None

    @functools.wraps(original)
    def get_internal_state(self: Any, recv_req: Any) -> Any:
        reply = original(self, recv_req)
        reply.internal_state["sglang_musa_ext"] = [
            backend.musa_fa3_report() for backend in _BACKENDS
        ]
        return reply

    get_internal_state._reports_musa_ext = True  # type: ignore[attr-defined]
    Scheduler.get_internal_state = get_internal_state
    return functools.partial(setattr, Scheduler, "get_internal_state", original)
