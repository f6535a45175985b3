"""Composition: upstream's ``FlashAttentionBackend`` on the kernels of this package.

:class:`MusaFA3Mixin` runs upstream's own forwards. While one of them runs, the kernel names that it
calls lead here, where each call gets the plan of its pass and geometry and goes to the selected
kernels. No forward and no metadata method of upstream is copied or re-implemented.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import ModuleType
from typing import Any

import sglang
import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

from sglang_musa_ext import patching, policy
from sglang_musa_ext.attention import checks
from sglang_musa_ext.attention.calls import (
    Arguments,
    CallGeometry,
    CallSite,
    KnownCall,
    KnownRawCall,
    KnownVarlenCall,
    OwnKeys,
    dims_of,
    has_equal_queries,
    is_upstreams,
    is_upstreams_varlen,
    options_of,
    planned_tensors,
)
from sglang_musa_ext.attention.dispatch import RUNNING
from sglang_musa_ext.attention.metrics import export
from sglang_musa_ext.attention.plans import SchedulerMetadataCache, Tensors, stream_probe
from sglang_musa_ext.attention.raw_keys import (
    attends_to_the_batch,
    new_rows,
    raw_arguments,
    uncopied,
)
from sglang_musa_ext.attention.sampling import OutputSampler
from sglang_musa_ext.attention.workspace import MLAWorkspace
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import FA3Kernels, select_kernels
from sglang_musa_ext.upstream.limits import head_dims_of
from sglang_musa_ext.upstream.names import KERNEL_PARAMETERS
from sglang_musa_ext.upstream.rows.passes import PASS_METHODS

logger = logging.getLogger(__name__)

_MOST_SITES = 64
"""Kinds of calls with the same names that a backend remembers: a model has a few."""
_MOST_GEOMETRIES = 1024
"""Geometries of which a backend remembers whether their calls are split: decodes have few, prompts
have one for each length.
"""

CONSTRUCTION = threading.RLock()
"""Held while names of upstream's modules stand for ours: constructors of two threads take turns."""

Attention = Callable[[Arguments], Any]
"""Serves a kernel call from all its arguments, which it may change."""


class UnsupportedAttentionVersion(ValueError):
    """Another attention version than FA3 was asked for."""


class MusaFA3Mixin:
    """Puts the selected kernels, and plans that live for one pass, under upstream's forwards."""

    default_page_size = policy.PAGE_SIZE
    """Tokens in a page of the KV cache where nobody chose: 64. It stands in ``policy``, because the
    process that resolves a server's arguments imports no attention.
    """

    _OUTSIDE = object()
    """Stands for the forward batch of a kernel call that no layer makes."""

    use_mla: bool
    page_size: int
    kv_cache_dtype: torch.dtype
    forward_metadata: Any

    def __init__(self, model_runner: Any, *args: Any, fa_impl_ver: int = 3, **kwargs: Any) -> None:
        """Build upstream's backend for ``model_runner``, and put it on the selected kernels.

        Takes the arguments of upstream's ``FlashAttentionBackend``.

        Raises:
            UnsupportedAttentionVersion: ``fa_impl_ver`` is not 3.
            KernelsUnavailable: the kernel library is missing, or is another one.
            UnsupportedByKernels: page size, KV-cache dtype, head dimensions or batches are not for
                these kernels.
        """
        if fa_impl_ver != 3:
            raise UnsupportedAttentionVersion(
                f"FlashAttention {fa_impl_ver} was asked for (fa_impl_ver={fa_impl_ver}), and this "
                "backend has FlashAttention 3 alone. "
                "Start the server with --attention-backend fa3."
            )
        self._settings = Settings.from_environ()
        # Read off the pool because the runner's own device name carries no index.
        self._pool_device: torch.device = model_runner.req_to_token_pool.req_to_token.device
        self._kernels = select_kernels(self._settings, self._pool_device)
        with _importable_fa3(self._kernels):
            super().__init__(model_runner, *args, fa_impl_ver=fa_impl_ver, **kwargs)  # type: ignore[call-arg]
        self._kernels.require(
            page_size=self.page_size,
            kv_cache_dtype=self.kv_cache_dtype,
            use_mla=self.use_mla,
            dtype=model_runner.model_config.dtype,
            head_dims=head_dims_of(model_runner.model_config, self.use_mla),
            largest_batch=model_runner.req_to_token_pool.size,
        )
        self._replace_upstream_kernels()
        self._plans = SchedulerMetadataCache(stream_probe(self._pool_device))
        self.begin_call = self._plans.begin_call
        self._workspace = self._mla_workspace()
        self._sites: dict[tuple[str, ...], list[CallSite]] = {}
        """The kinds of paged calls that this backend has served, by their names."""
        self._functions: dict[tuple[str, tuple[str, ...]], Attention] = {}
        """The functions that serve calls, by function called and names."""
        self._unsplit: dict[CallGeometry, bool] = {}
        """The geometries that were asked for, and whether the kernels do not split their calls."""
        self._new_rows: int | None = None
        """The rows of the running pass, where its layers attend to nothing but their own keys."""
        self.own_keys: OwnKeys | None = None
        """Keys and values of the running layer, where a call may be served from them."""
        # A check sees every call, and a plan for every call reuses none.
        self._check = "off" if self._settings.check_share else self._settings.check
        self._remembers = self._check == "off" and not self._settings.force_update_metadata
        self._raw_prefill = self._settings.raw_prefill and not self.use_mla
        self._sampler: OutputSampler | None = None
        if self._settings.check_share:
            self._sample_outputs(self._settings.check_share)
        if model_runner.server_args.enable_metrics:
            export().add(self)
        BACKENDS.add(self)
        logger.info("sglang_musa_ext serves attention: %s", self._configuration())

    def forward_extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run upstream's forward for prefill, verify and draft-extend on the selected kernels."""
        if self._plans.begin_layer(layer, forward_batch, self.forward_metadata):
            self._new_rows = new_rows(forward_batch) if self._raw_prefill else None
        # Keys that this forward does not write to the cache may be others than the cache's.
        if self._new_rows is not None and k is not None and save_kv_cache:
            self.own_keys = k, v
            q = uncopied(q)
        running = RUNNING.stack
        running.append(self)
        # Python calls faster where it has no dict of arguments to unpack.
        try:
            if kwargs:
                return super().forward_extend(  # type: ignore[misc]
                    q, k, v, layer, forward_batch, save_kv_cache, **kwargs
                )
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)  # type: ignore[misc]
        finally:
            running.pop()
            self.own_keys = None

    def forward_decode(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run upstream's forward for decode on the selected kernels."""
        self._plans.begin_layer(layer, forward_batch, self.forward_metadata)
        running = RUNNING.stack
        running.append(self)
        try:
            if kwargs:
                return super().forward_decode(  # type: ignore[misc]
                    q, k, v, layer, forward_batch, save_kv_cache, **kwargs
                )
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)  # type: ignore[misc]
        finally:
            running.pop()

    def flash_attn_with_kvcache(self, **arguments: Any) -> Any:
        """Run FA3's function of this name over a paged KV cache, with the plan of this pass."""
        if not (RUNNING.stack and RUNNING.stack[-1] is self):
            self._begin_outside()
        self.begin_call()
        return self.call_unlike_others(arguments)

    def flash_attn_varlen_func(self, **arguments: Any) -> Any:
        """Run FA3's function of this name over raw keys and values, without a plan, as upstream."""
        return self.call_flash_attn_varlen_func(arguments)

    def call_flash_attn_varlen_func(self, arguments: Arguments) -> Any:
        """Serve a call over raw keys and values; ``arguments`` may be changed."""
        plans = self._plans
        plans.count_call()
        remembers = self._remembers and self._sampler is None and plans.has_room_for_varlen
        if not (remembers and is_upstreams_varlen(arguments)):
            return self._prepared("flash_attn_varlen_func", arguments)(arguments)
        settled = self._kernels.settling("flash_attn_varlen_func", arguments)(arguments)
        known = KnownVarlenCall(arguments, settled)
        result = known.function(arguments["q"], arguments["k"], arguments["v"], **known.keywords)
        plans.remember_varlen(known)
        return result

    def known_varlen(self) -> Sequence[KnownVarlenCall]:
        """Return the calls over raw keys of this pass, which later ones may be like."""
        return self._plans.current.known_varlen

    def varlen_known_before(self, *call: Any) -> KnownVarlenCall | None:
        """Return a call of an earlier pass that this one is like, as one of this pass."""
        earlier = self._plans.current.earlier_varlen
        for index, known in enumerate(earlier):
            if known.begin(*call):
                del earlier[index]
                self._plans.count_call()
                self._plans.remember_varlen(known)
                return known
        return None

    def call_unlike_others(self, arguments: Arguments) -> Any:
        """Serve a call over a paged KV cache that is like none before it in its pass.

        Those that are like this one find their way without it; ``arguments`` may be changed.
        """
        if arguments.get("k") is None:
            # Upstream passes the cumulative lengths of all keys under this name. FA3 reads it as
            # lengths of keys still to be appended, which a plan then counts twice, so it goes only
            # where new keys go.
            arguments.pop("cu_seqlens_k_new", None)
        # Upstream's own plans are turned off.
        arguments["scheduler_metadata"] = None
        paged = dict(arguments) if self._check == "output" else None
        site, own_keys = self._site(arguments), self.own_keys
        raw = None if own_keys is None else self._raw_arguments(arguments, own_keys, site)
        if own_keys is not None and raw is not None:
            result = self._call_over_raw_keys(arguments, site, raw, own_keys)
        else:
            if own_keys is not None:
                # The copy that `uncopied` has kept upstream's forward from making.
                arguments["q"] = arguments["q"].contiguous()
            result = self._call_with_plan(arguments, site)
        if paged is not None and not self._plans.capturing:
            checks.require_reference_output(result, paged, self._pool_device, self._place())
        return result

    def known_before(
        self, q: Any, k_cache: Any, v_cache: Any, page_table: Any, cache_seqlens: Any,
        cu_seqlens_q: Any, max_seqlen_q: Any, options: tuple[Any, ...], own_keys: OwnKeys | None,
    ) -> KnownCall | None:  # fmt: skip
        """Return a call of an earlier pass that this one is like, as one of this pass.

        New are its lengths and its plan; all else was settled then, and is compared.
        """
        earlier = self._plans.current.earlier
        lengths = page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q
        for index, known in enumerate(earlier):
            if not known.begin(q, *lengths):
                continue
            if known.matches(q, k_cache, v_cache, *lengths, options, own_keys):
                # Here, because one that is not like this call may be like the next one.
                del earlier[index]
                is_served = self._settle_raw if known.raw else self._settle_planned
                return known if is_served(known, q, k_cache, v_cache) else None
            known.release()
        return None

    def _settle_raw(self, known: KnownCall, q: Any, *_: Any) -> bool:
        """Serve a call of an earlier pass from the raw keys of this one, where they do."""
        assert self.own_keys is not None
        lengths = {"cu_seqlens_q": known.cu_seqlens_q, "cache_seqlens": known.cache_seqlens}
        if not self._is_whole_batch(q) or not attends_to_the_batch(lengths, self.forward_metadata):
            return False
        arguments = known.continues(q, *self.own_keys)
        if arguments is None:
            return False
        self._plans.count_call(raw=True)
        known.settle(arguments)
        self._plans.remember(known, None)
        return True

    def _settle_planned(self, known: KnownCall, q: Any, k_cache: Any, v_cache: Any) -> bool:
        """Serve a call of an earlier pass with a plan of this one."""
        if self.own_keys is not None:
            # Raw keys may serve it now.
            return False
        arguments = known.continues(q, k_cache, v_cache)
        if arguments is None:
            return False
        self._plans.count_call()
        plan = self._scheduler_metadata(arguments, known.site)
        arguments["scheduler_metadata"] = plan
        known.settle(arguments)
        self._plans.remember(known, plan)
        return True

    def _call_over_raw_keys(
        self, arguments: Arguments, site: CallSite | None, raw: Arguments, own_keys: OwnKeys
    ) -> Any:
        """Serve a call with ``raw`` in place of ``arguments``, and remember that."""
        self._plans.count_call(raw=True)
        k, v = own_keys
        # Keys that are to be viewed in another shape first are viewed anew each time.
        if site is None or raw["k"] is not k or raw["v"] is not v:
            return self._prepared("flash_attn_varlen_func", raw)(raw)
        if site.settle_raw is None or site.raw_dims != dims_of(own_keys):
            site.raw_dims = dims_of(own_keys)
            site.settle_raw = self._kernels.settling(
                "flash_attn_varlen_func", raw, site.tensor_options
            )
        known = KnownRawCall(site, arguments, site.settle_raw(raw), own_keys)
        result = known.function(raw["q"], k, v, **known.keywords_with(options_of(arguments)))
        self._plans.remember(known, None)
        return result

    def _call_with_plan(self, arguments: Arguments, site: CallSite | None) -> Any:
        """Serve a call with its plan, and have calls like it get both again."""
        self._plans.count_call()
        if site is None:
            arguments["scheduler_metadata"] = self._scheduler_metadata(arguments, None)
            return self._prepared("flash_attn_with_kvcache", arguments)(arguments)
        plan = self._scheduler_metadata(arguments, site)
        in_place = isinstance(plan, tuple)
        # Whether this call writes the plan of its slot or found it there, those like it find it.
        again = (plan[0], True) if in_place else plan
        arguments["scheduler_metadata"] = again
        if site.settle is None:
            site.settle = self._kernels.settling(
                "flash_attn_with_kvcache", arguments, site.tensor_options
            )
        known = KnownCall(site, arguments, site.settle(arguments), self.own_keys)
        keywords = known.keywords_with(options_of(arguments))
        if in_place:
            keywords["scheduler_metadata"] = plan
        q, k_cache, v_cache = arguments["q"], arguments["k_cache"], arguments["v_cache"]
        result = known.function(q, k_cache, v_cache, **keywords)
        self._plans.remember(known, again, in_place=in_place)
        return result

    def _site(self, arguments: Arguments) -> CallSite | None:
        """Return the kind of a call; ``None`` for calls that upstream's layers do not make."""
        if not self._remembers:
            return None
        names = tuple(arguments)
        sites = self._sites.get(names, ())
        for site in sites:
            if site.is_of(arguments):
                return site
        if not is_upstreams(arguments):
            return None
        return self._new_site(names, arguments)

    def _new_site(self, names: tuple[str, ...], arguments: Arguments) -> CallSite:
        geometry = CallGeometry.of(arguments, self._kernels)
        drops_plan = self._kernels.drops_plan(arguments)
        site = CallSite(arguments, geometry, drops_plan=drops_plan)
        sites = self._sites.setdefault(names, [])
        if len(sites) >= _MOST_SITES:
            sites.clear()
        sites.append(site)
        return site

    def _raw_arguments(
        self, arguments: Arguments, own_keys: OwnKeys, site: CallSite | None
    ) -> Arguments | None:
        """Return the arguments over raw keys that stand for a call, or ``None`` if none do."""
        if not self._is_whole_batch(arguments["q"]):
            return None
        settled = site is not None and site.raw_dims == dims_of(own_keys)
        kernels = None if settled else self._kernels
        return raw_arguments(arguments, own_keys, self.forward_metadata, kernels)

    def _is_whole_batch(self, q: torch.Tensor) -> bool:
        """Tell whether queries and the layer's own keys are what a pass without prefixes adds."""
        assert self.own_keys is not None
        k, v = self.own_keys
        # Rows that only pad the batch belong to no request.
        rows = q.shape[0] == k.shape[0] == v.shape[0] == self._new_rows
        return rows and not self._plans.capturing

    def _prepared(self, function: str, arguments: Arguments) -> Attention:
        """Return what serves calls of ``function`` with the names of this one."""
        key = function, tuple(arguments)
        attention = self._functions.get(key)
        if attention is None:
            attention = self._functions[key] = self._kernels.prepare(*key)
        return attention

    # --- plans ------------------------------------------------------------------------------------

    def _scheduler_metadata(self, arguments: Arguments, site: CallSite | None) -> Any:
        """Return the ``scheduler_metadata`` of a call: a tensor, or ``None``.

        For MLA on MATE it is ``(workspace, reuse)``.

        Args:
            arguments: of the call; if it has a ``site``, those alone that a pass has of its own.
            site: the kind of the call, if it is one of upstream's.
        """
        drops_plan = self._kernels.drops_plan(arguments) if site is None else site.drops_plan
        if drops_plan or not self._takes_plan(arguments):
            return None
        geometry, keywords = self._geometry_of(arguments, site)
        tensors = planned_tensors(arguments)
        if self._settings.force_update_metadata:
            self._plans.forget_plans()
        if geometry.has_qv and self._workspace is not None:
            return self._mla_plan(geometry, tensors, arguments)
        if self._is_unsplit(geometry, keywords):
            self._plans.count_unsplit()
            return None
        compute = functools.partial(self._compute_plan, keywords, tensors)
        plan, reused = self._plans.plan(geometry, tensors, compute)
        if reused and self._checking:
            used, fresh = (
                self._kernels.plan_contents(each, geometry.batch_size) for each in (plan, compute())
            )
            checks.require_same_plan(used, fresh, geometry, self._place())
        return plan

    def _geometry_of(
        self, arguments: Arguments, site: CallSite | None
    ) -> tuple[CallGeometry, dict[str, Any]]:
        """Return the geometry of a call, and as keywords."""
        if site is not None:
            return site.geometry_of(arguments)
        geometry = CallGeometry.of(arguments, self._kernels)
        return geometry, geometry.keywords()

    def _takes_plan(self, arguments: Arguments) -> bool:
        """Tell whether a call would not do as well without a plan."""
        alone = self._settings.plans != "always" and self._kernels.plans_for_itself
        # Outside of graphs the host takes longer to plan than the device does. And in a draft model
        # of one layer, say, nothing would reuse a plan.
        if alone and (not self._plans.capturing or self._plans.most_calls == 1):
            return False
        return self._kernels.plans_unequal_queries or has_equal_queries(arguments)

    def _is_unsplit(self, geometry: CallGeometry, keywords: dict[str, Any]) -> bool:
        """Tell whether the kernels are known not to split a call, so that a plan says nothing."""
        if self._settings.plans == "always" or not self._kernels.combines_unsplit:
            return False
        unsplit = self._unsplit.get(geometry)
        if unsplit is None:
            if len(self._unsplit) >= _MOST_GEOMETRIES:
                self._unsplit.clear()
            unsplit = self._kernels.static_num_splits(**keywords) == 1
            self._unsplit[geometry] = unsplit
        return unsplit

    @property
    def _checking(self) -> bool:
        """Return whether reused plans are to be recomputed.

        A comparison waits for the device, which a capture forbids.
        """
        return self._check != "off" and not self._plans.capturing

    def _compute_plan(self, keywords: dict[str, Any], tensors: Tensors) -> torch.Tensor:
        return self._kernels.get_scheduler_metadata(**keywords, **tensors)

    def _mla_plan(
        self, geometry: CallGeometry, tensors: Tensors, arguments: Arguments
    ) -> tuple[torch.Tensor, bool]:
        assert self._workspace is not None and self._kernels.mla_plan_bytes is not None
        role = self._plans.role
        size = self._kernels.mla_plan_bytes(
            geometry.batch_size, geometry.max_seqlen_q, geometry.num_heads_q, geometry.device
        )
        slot = self._workspace.slot(self, role, size)
        reuse = self._plans.plan_in_place(role, geometry, tensors)
        if reuse and self._checking:
            # The kernel writes its plan itself, so a fresh one takes a call. Other bytes are equal.
            fresh = slot.clone()
            self._kernels.flash_attn_with_kvcache(
                **arguments | {"scheduler_metadata": (fresh, False), "out": None}
            )
            used, fresh = (bytes_.view(torch.int32) for bytes_ in (slot, fresh))
            checks.require_same_plan(used, fresh, geometry, self._place())
        return slot, reuse

    def _mla_workspace(self) -> MLAWorkspace | None:
        """Take the workspace now, because a graph capture must not be the first to allocate it."""
        if not self.use_mla or self._kernels.mla_plan_bytes is None:
            return None
        return MLAWorkspace.of_device(self._pool_device, self._settings.mla_workspace_mb << 20)

    def _begin_outside(self) -> None:
        """Have the next kernel call be a pass of its own, which no layer makes."""
        # No layer has this batch, so that what comes before and after is another pass.
        self._plans.begin_layer(None, self._OUTSIDE, None)
        self._plans.end_pass()

    def _place(self) -> str:
        """Say which call of which layer is running, for an error."""
        layer = self._plans.layer
        return f"layer {getattr(layer, 'layer_id', layer)}, call {self._plans.role}"

    # --- construction and reports -----------------------------------------------------------------

    def _sample_outputs(self, share: float) -> None:
        """Have some calls compared: this object's methods are replaced, those of others are not."""
        self._sampler = sampler = OutputSampler(share, self._plans, self._pool_device)
        vars(self).update(
            begin_call=sampler.choosing(self.begin_call),
            call_unlike_others=sampler.of_chosen(
                "flash_attn_with_kvcache", self.call_unlike_others
            ),
            call_flash_attn_varlen_func=sampler.around(
                "flash_attn_varlen_func", self.call_flash_attn_varlen_func
            ),
        )
        logger.info("sglang_musa_ext compares a share of %g of the outputs", share)

    def musa_fa3_report(self) -> dict[str, Any]:
        """Return what this backend is and has done, as plain data.

        It is for logs, ``/server_info`` and tests. ``held`` is what is kept now; ``output_check``
        is ``None`` unless a share of the outputs is compared.
        """
        return {
            "backend": type(self).__name__,
            "kernels": self._kernels.name,
            "sglang": sglang.__version__,
            "versions": dict(self._kernels.versions),
            "device": str(self._pool_device),
            "page_size": self.page_size,
            "settings": asdict(self._settings),
            "statistics": self._plans.statistics.report(),
            "held": self._held(),
            "output_check": None if self._sampler is None else self._sampler.report(),
        }

    def _held(self) -> dict[str, int]:
        """Return how much this backend keeps: what no number of requests may let grow."""
        slots = 0 if self._workspace is None else self._workspace.slots_of(self)
        sites = sum(map(len, self._sites.values()))
        return self._plans.held() | {"kinds_of_calls": sites, "mla_slots": slots}

    def _configuration(self) -> str:
        """Say what this backend serves with, as one line for a log."""
        versions = ", ".join(
            f"{name} {version}" for name, version in self._kernels.versions.items()
        )
        workspace = "none" if self._workspace is None else f"{self._settings.mla_workspace_mb} MiB"
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        every = self._settings.force_update_metadata
        plans = "for every call" if every else "reused within a pass"
        return (
            f"{type(self).__name__} on {self._kernels.name} kernels ({versions}), rank {rank}, "
            f"device {self._pool_device}, page size {self.page_size}, MLA workspace {workspace}, "
            f"checks {self._settings.check}, plans {plans}, SGLang {sglang.__version__}"
        )

    def _replace_upstream_kernels(self) -> None:
        """Let the methods above be found under upstream's instance attributes; turn off its plans.

        Upstream precomputes metadata for plain decode layers alone, with its own kernels; ours
        covers every call.
        """
        self._get_scheduler_metadata = None
        for name in KERNEL_PARAMETERS:
            vars(self).pop(name, None)


BACKENDS: weakref.WeakSet[MusaFA3Mixin] = weakref.WeakSet()
"""The live backends of this process, for reports alone: nothing is served from here."""


def _ends_pass(name: str) -> Callable[..., Any]:
    """Return an override of the upstream method ``name`` that also ends the pass."""

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
    with CONSTRUCTION:
        undo = patching.stand_in("sgl_kernel.flash_attn", module)
        try:
            yield
        finally:
            undo()
