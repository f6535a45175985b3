"""The time that the host takes for a layer's attention, measured without a GPU.

Every backend runs over kernels that return at once, so what remains is Python: upstream's own
forward, and the time that this package or SGLang's in-tree MUSA backend adds to it. The backends
take turns, pass by pass, on one core, and each time is compared with upstream's of the same turn.

Upstream is measured bare: its forward calls the library's functions, without the two Python
functions that upstream has between them, and without its own plans. The KV pool is SGLang's, but
for the kernel that stores; ``--pool none`` has one that does nothing.

Beside them runs a backend that only composes: its forwards note it and run upstream's, and what
stands under the kernels' names passes each call on as it is. No backend that serves by composing
takes less, whatever it decides.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

LAYERS = 32
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
MATE_RELEASE = (0, 2, 7)
"""The release of MATE whose rules the adapter applies: the newest known one."""
IN_TREE = "sglang.srt.hardware_backend.musa.attention.flashattention_backend"
KERNEL_NAMES = ("flash_attn_with_kvcache", "flash_attn_varlen_func")
UPSTREAM, COMPOSED, OVER_MATE, OVER_HOPPER, UNPLANNED, SAMPLED = (
    "upstream",
    "composing alone",
    "ours over MATE",
    "ours over Hopper",
    "ours over MATE without plans",
    "ours over MATE, sampling outputs",
)
IN_TREE_NAME, WRAPPED = "in-tree", "upstream with its wrappers"
SHARE = 1e-9
"""Of the outputs, so few that none is compared: what is left is the time of choosing them."""
WARM_UP = 20
"""Passes of each backend that are not timed."""
PASS_KINDS = ("decode", "prefill with a prefix", "prefill without a prefix")
MLA_KINDS = tuple(f"MLA {kind}" for kind in PASS_KINDS)
"""Decode and prefill with a prefix attend to the latent cache, prefill without one to raw keys."""
LATENT_DIM, ROPE_DIM, NOPE_DIM, MLA_HEADS = 512, 64, 128, 16


class _NoKernels:
    """FA3's three functions, which do nothing and return ``output``.

    A function's parameters are those of the real one, because matching keywords to them takes time.
    """

    def __init__(self) -> None:
        self.output = torch.empty(0)
        self.plan = torch.zeros(4, dtype=torch.int32)


def mate_kernels_that_do_nothing() -> Any:
    """Return a module with the functions of MATE's ``flash_attn_interface`` 0.2.2."""
    state = _NoKernels()

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None,
        rotary_cos: Any = None, rotary_sin: Any = None, cache_seqlens: Any = None,
        cache_batch_idx: Any = None, cache_leftpad: Any = None, page_table: Any = None,
        cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: Any = None,
        rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, softmax_scale: Any = None, causal: Any = False,
        window_size: Any = (-1, -1), attention_chunk: Any = 0, softcap: Any = 0.0,
        rotary_interleaved: Any = True, scheduler_metadata: Any = None, num_splits: Any = 0,
        pack_gqa: Any = None, sm_margin: Any = 0, return_softmax_lse: Any = False,
        sinks: Any = None, s_aux: Any = None, cp_world_size: Any = 1, cp_rank: Any = 0,
        cp_tot_seqused_k: Any = None,
    ) -> Any:  # fmt: skip
        return state.output

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, seqused_q: Any = None,
        seqused_k: Any = None, softmax_scale: Any = None, causal: Any = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Any = (-1, -1), attention_chunk: Any = 0, softcap: Any = 0.0,
        num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, sm_margin: Any = 0,
        return_attn_probs: Any = False, sinks: Any = None, s_aux: Any = None, out: Any = None,
        page_table: Any = None, block_table: Any = None, scheduler_metadata: Any = None,
        return_softmax_lse: Any = False, cp_world_size: Any = 1, cp_rank: Any = 0,
        cp_tot_seqused_k: Any = None,
    ) -> Any:  # fmt: skip
        return state.output

    def get_scheduler_metadata(
        batch_size: Any, max_seqlen_q: Any, max_seqlen_k: Any, num_heads_q: Any,
        num_heads_kv: Any, headdim: Any, cache_seqlens: Any, qkv_dtype: Any = torch.bfloat16,
        headdim_v: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None,
        cache_leftpad: Any = None, page_size: Any = None, max_seqlen_k_new: Any = 0,
        causal: Any = False, window_size: Any = (-1, -1), attention_chunk: Any = 0,
        has_softcap: Any = False, num_splits: Any = 0, pack_gqa: Any = None, sm_margin: Any = 0,
    ) -> Any:  # fmt: skip
        return state.plan

    return _module(
        "flash_attn_interface",
        state,
        flash_attn_with_kvcache,
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )


def upstream_kernels_that_do_nothing() -> Any:
    """Return a module with the functions of upstream's ``sgl_kernel.flash_attn``."""
    state = _NoKernels()

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None,
        rotary_cos: Any = None, rotary_sin: Any = None, cache_seqlens: Any = None,
        cache_batch_idx: Any = None, cache_leftpad: Any = None, page_table: Any = None,
        cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: Any = None,
        rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, softmax_scale: Any = None, causal: Any = False,
        window_size: Any = (-1, -1), attention_chunk: Any = None, softcap: Any = 0.0,
        rotary_interleaved: Any = True, scheduler_metadata: Any = None, num_splits: Any = 0,
        pack_gqa: Any = None, only_qv: Any = False, sm_margin: Any = 0,
        return_softmax_lse: Any = False, sinks: Any = None, score_mod: Any = None,
        aux_tensors: Any = None, ver: Any = 3, out: Any = None,
    ) -> Any:  # fmt: skip
        return state.output

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any = None,
        max_seqlen_k: Any = None, seqused_q: Any = None, seqused_k: Any = None,
        page_table: Any = None, softmax_scale: Any = None, causal: Any = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Any = (-1, -1), attention_chunk: Any = 0, softcap: Any = 0.0,
        num_splits: Any = 1, pack_gqa: Any = None, only_qv: Any = False, sm_margin: Any = 0,
        return_softmax_lse: Any = False, sinks: Any = None, score_mod: Any = None,
        aux_tensors: Any = None, ver: Any = 3, out: Any = None,
    ) -> Any:  # fmt: skip
        return state.output

    def get_scheduler_metadata(
        batch_size: Any, max_seqlen_q: Any, max_seqlen_k: Any, num_heads: Any, num_heads_k: Any,
        headdim: Any, cache_seqlens: Any, qkv_dtype: Any = torch.bfloat16, headdim_v: Any = None,
        cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, cache_leftpad: Any = None,
        page_size: Any = None, max_seqlen_k_new: Any = 0, causal: Any = False,
        window_size: Any = (-1, -1), attention_chunk: Any = 0, has_softcap: Any = False,
        num_splits: Any = 0, pack_gqa: Any = None, sm_margin: Any = 0,
    ) -> Any:  # fmt: skip
        return state.plan

    return _module(
        "sgl_kernel.flash_attn",
        state,
        flash_attn_with_kvcache,
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )


def _module(name: str, state: _NoKernels, *functions: Callable[..., Any]) -> Any:
    module: Any = ModuleType(name)
    module.state = state
    for function in functions:
        setattr(module, function.__name__, function)
    return module


# --- what upstream's backends read ----------------------------------------------------------------


class _NoPool:
    """A KV pool that does nothing at all."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        shape = (8 * PAGE_SIZE, KV_HEADS, HEAD_DIM)
        self._buffers = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of any layer."""
        return self._buffers

    def set_kv_buffer(self, *arguments: Any, **options: Any) -> None:
        """Write nothing."""


class _NoLatentPool:
    """Likewise for MLA, whose layers have one latent vector a token."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self._buffer = torch.zeros(8 * PAGE_SIZE, 1, LATENT_DIM + ROPE_DIM, dtype=self.dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Return the latent vectors of any layer."""
        return self._buffer

    def set_mla_kv_buffer(self, *arguments: Any, **options: Any) -> None:
        """Write nothing."""


def _sglang_pool() -> Any:
    """Return SGLang's own KV pool, whose kernel for storing does nothing from here on."""
    from sglang.srt.mem_cache import memory_pool

    from sglang_musa_ext import patching

    patching.replace(memory_pool, "_set_kv_buffer_impl", lambda *_, **__: None)
    return memory_pool.MHATokenToKVPool(
        size=7 * PAGE_SIZE,
        page_size=PAGE_SIZE,
        dtype=torch.bfloat16,
        head_num=KV_HEADS,
        head_dim=HEAD_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


POOLS: dict[str, Callable[[], Any]] = {"sglang": _sglang_pool, "none": _NoPool}


def _runner(pool: str = "sglang") -> Any:
    """Return what upstream's backends read of a ``ModelRunner``."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(model_path="dummy", device="cpu", page_size=PAGE_SIZE)
    if hasattr(arguments, "resolve_once"):
        arguments.resolve_once()
    set_global_server_args_for_scheduler(arguments)
    config = SimpleNamespace(
        attention_arch=AttentionArch.MHA,
        dtype=torch.bfloat16,
        context_len=8192,
        head_dim=HEAD_DIM,
        hf_text_config=SimpleNamespace(num_attention_heads=HEADS),
        hf_config=SimpleNamespace(),
        get_num_kv_heads=lambda _: KV_HEADS,
        is_encoder_decoder=False,
        is_local_attention_model=False,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=None,
        full_attention_interval=None,
    )
    table = torch.zeros(16, 8192, dtype=torch.int32)
    return SimpleNamespace(
        server_args=arguments,
        model_config=config,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=16),
        token_to_kv_pool=POOLS[pool](),
        token_to_kv_pool_allocator=SimpleNamespace(),
        kv_index_translator=SimpleNamespace(
            is_translating=False,
            reads_are_translated=False,
            sliding_window_write_loc_for=lambda loc: None,
            write_ids=lambda batch, kind=None: None,
        ),
        device="cpu",
        dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16,
        kv_cache_dtype_str="auto",
        page_size=PAGE_SIZE,
        sliding_window_size=None,
        attention_chunk_size=None,
        is_draft_worker=False,
        attn_cp_size=1,
        tp_size=1,
        ps=SimpleNamespace(tp_size=1, attn_tp_size=1, attn_cp_size=1),
    )


def _mla_runner() -> Any:
    """Return the same of a model with MLA, over a pool that does nothing."""
    from sglang.srt.configs.model_config import AttentionArch

    runner = _runner("none")
    vars(runner.model_config).update(
        attention_arch=AttentionArch.MLA,
        head_dim=LATENT_DIM + ROPE_DIM,
        kv_lora_rank=LATENT_DIM,
        qk_rope_head_dim=ROPE_DIM,
        qk_nope_head_dim=NOPE_DIM,
        v_head_dim=NOPE_DIM,
        hf_text_config=SimpleNamespace(num_attention_heads=MLA_HEADS),
        get_num_kv_heads=lambda _: 1,
    )
    runner.token_to_kv_pool = _NoLatentPool()
    return runner


@dataclass
class _Pass:
    """A forward pass: upstream's batch, the layers, and what each of them is called with."""

    batch: Any
    layers: Sequence[Any]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor
    """What the kernels return."""
    stores: bool = True
    """False: the layer's keys are in the cache already."""
    more: dict[str, torch.Tensor] = field(default_factory=dict)


def _pass(mode: str, runner: Any) -> _Pass:
    """Return a decode of eight requests, or a prefill of one."""
    tokens = 8 if mode.endswith("decode") else 512
    batch = _batch(mode.removeprefix("MLA "), runner, tokens)
    if mode not in MLA_KINDS:
        q, output = _zeros(tokens, HEADS * HEAD_DIM), _zeros(tokens, HEADS, HEAD_DIM)
        k, v = (_zeros(tokens, KV_HEADS, HEAD_DIM) for _ in range(2))
        return _Pass(batch, _layers(HEADS, HEAD_DIM, KV_HEADS, HEAD_DIM), q, k, v, output)
    heads, dim = MLA_HEADS, NOPE_DIM + ROPE_DIM
    if mode == "MLA prefill without a prefix":
        batch.attn_attend_prefix_cache = batch.mha_return_lse = batch.mha_one_shot = False
        q, k, v = (_zeros(tokens, heads, size) for size in (dim, dim, NOPE_DIM))
        layers = _layers(heads, dim, heads, NOPE_DIM)
        return _Pass(batch, layers, q.flatten(1), k, v, torch.zeros_like(v), stores=False)
    q, k = _zeros(tokens, heads, LATENT_DIM), _zeros(tokens, 1, LATENT_DIM)
    more = {"q_rope": _zeros(tokens, heads, ROPE_DIM), "k_rope": _zeros(tokens, 1, ROPE_DIM)}
    layers = _layers(heads, LATENT_DIM + ROPE_DIM, 1, LATENT_DIM)
    return _Pass(batch, layers, q, k, k, torch.zeros_like(q), more=more)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _layers(heads: int, head_dim: int, kv_heads: int, v_head_dim: int) -> list[Any]:
    from sglang.srt.layers.radix_attention import RadixAttention

    scale = head_dim**-0.5
    return [
        RadixAttention(heads, head_dim, scale, kv_heads, index, v_head_dim=v_head_dim)
        for index in range(LAYERS)
    ]


def _batch(mode: str, runner: Any, tokens: int) -> Any:
    """Return upstream's batch of a pass."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    decoding = mode == "decode"
    requests = tokens if decoding else 1
    prefix = 0 if mode == "prefill without a prefix" else 1024
    lengths = [prefix + tokens // requests] * requests
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if decoding else ForwardMode.EXTEND,
        batch_size=requests,
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        req_pool_indices=torch.arange(requests),
        seq_lens=torch.tensor(lengths),
        out_cache_loc=torch.zeros(tokens, dtype=torch.int64),
        seq_lens_sum=sum(lengths),
    )
    fields = {
        "seq_lens_cpu": torch.tensor(lengths),
        "positions": torch.arange(tokens),
        "spec_algorithm": SpeculativeAlgorithm.NONE,
        # Up to 0.5.12 the forwards take the pools from the batch.
        "req_to_token_pool": runner.req_to_token_pool,
        "token_to_kv_pool": runner.token_to_kv_pool,
    }
    if not decoding:
        fields |= {
            "extend_seq_lens": torch.tensor([tokens], dtype=torch.int32),
            "extend_seq_lens_cpu": [tokens],
            "extend_prefix_lens": torch.tensor([prefix], dtype=torch.int32),
            "extend_prefix_lens_cpu": [prefix],
            "extend_num_tokens": tokens,
        }
    for name, value in fields.items():
        setattr(batch, name, value)
    return batch


# --- the backends ---------------------------------------------------------------------------------


@dataclass
class HostPeer:
    """A backend over kernels that do nothing, and what upstream's names are while it runs."""

    name: str
    backend: Any
    library: Any
    names: dict[str, Any]
    """The module globals of upstream's module through which its forwards call FA3."""


def _upstream_peer(name: str, runner: Any, *, wrappers: bool = False) -> HostPeer:
    """Return upstream's own backend over do-nothing kernels.

    Between its forwards and the library stand two Python functions of upstream's, ``wrappers``,
    which check the call and pass it on. This package calls the library in their place.
    """
    from sglang.srt.layers.attention import flashattention_backend as upstream

    library = upstream_kernels_that_do_nothing()
    with _module_named("sgl_kernel.flash_attn", library):
        backend = upstream.FlashAttentionBackend(runner)
    # Upstream computes its plan for a pass with the metadata, and only forwards are timed.
    backend._get_scheduler_metadata = None
    names = {name: getattr(library, name) for name in KERNEL_NAMES}
    if wrappers:
        names = {name: getattr(upstream, name) for name in KERNEL_NAMES}
        _put_below_wrappers(names["flash_attn_with_kvcache"], library)
    return HostPeer(name, backend, library, names)


def _put_below_wrappers(wrapper: Callable[..., Any], library: Any) -> None:
    """Let upstream's wrappers call ``library``, as on a GPU that has FA3."""
    import importlib

    inner: Any = importlib.import_module(f"{wrapper.__module__}_v3")
    functions = {name: getattr(library, name) for name in KERNEL_NAMES}
    inner._is_fa3_supported = lambda: True
    inner._load_fa3_kernels = lambda: functions


def _in_tree_peer(runner: Any) -> HostPeer:
    import importlib

    library = mate_kernels_that_do_nothing()
    with (
        _module_named("flash_attn_interface", library),
        _module_named("sgl_kernel.flash_attn", upstream_kernels_that_do_nothing()),
    ):
        module: Any = importlib.import_module(IN_TREE)
        backend = module.MusaFlashAttentionBackend(runner)
    # It asks every call for the pipeline's group, by one of two names.
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    module.get_pp_group = lambda: group
    module.get_parallel = lambda: SimpleNamespace(pp_group=group)
    return HostPeer(IN_TREE_NAME, backend, library, {})


def _composed_peer(runner: Any) -> HostPeer:
    """Return a backend that runs upstream's forwards and passes their calls on, and no more."""
    import threading

    from sglang.srt.layers.attention import flashattention_backend as upstream

    class Running(threading.local):
        def __init__(self) -> None:
            self.stack: list[Any] = []

    running_layers = Running()

    class Composed(upstream.FlashAttentionBackend):  # type: ignore[misc]
        def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
            running = running_layers.stack
            running.append(library)
            try:
                return super().forward_extend(*args, **kwargs)
            finally:
                running.pop()

        def forward_decode(self, *args: Any, **kwargs: Any) -> Any:
            running = running_layers.stack
            running.append(library)
            try:
                return super().forward_decode(*args, **kwargs)
            finally:
                running.pop()

    def flash_attn_with_kvcache(**arguments: Any) -> Any:
        return running_layers.stack[-1].flash_attn_with_kvcache(**arguments)

    def flash_attn_varlen_func(**arguments: Any) -> Any:
        return running_layers.stack[-1].flash_attn_varlen_func(**arguments)

    library = upstream_kernels_that_do_nothing()
    with _module_named("sgl_kernel.flash_attn", library):
        backend = Composed(runner)
    backend._get_scheduler_metadata = None
    names = {each.__name__: each for each in (flash_attn_with_kvcache, flash_attn_varlen_func)}
    return HostPeer(COMPOSED, backend, library, names)


def _our_peer(name: str, runner: Any) -> HostPeer:
    from sglang.srt.layers.attention import flashattention_backend as upstream

    from sglang_musa_ext import patching
    from sglang_musa_ext.attention import mixin, selection
    from sglang_musa_ext.attention.dispatch import install_kernel_dispatch
    from sglang_musa_ext.envs import Settings

    library, record = _record(name)
    check = f"output:{SHARE}" if name == SAMPLED else "off"
    settings = dataclasses.replace(Settings.from_environ(), check=check)
    with ExitStack() as stack:
        stack.callback(patching.replace(mixin, "select_kernels", lambda *_: record))
        stack.callback(
            patching.replace(mixin, "Settings", SimpleNamespace(from_environ=lambda: settings))
        )
        backend = selection.MusaFA3Backend(runner)
    undo = install_kernel_dispatch()
    names = {name: getattr(upstream, name) for name in KERNEL_NAMES}
    undo()
    return HostPeer(name, backend, library, names)


def _record(name: str) -> tuple[Any, Any]:
    from sglang_musa_ext.kernels.hopper import hopper_record
    from sglang_musa_ext.kernels.mate import mate_record

    if name == OVER_HOPPER:
        library = upstream_kernels_that_do_nothing()
        return library, hopper_record(library, plans_unequal_queries=False)
    library = mate_kernels_that_do_nothing()
    record = mate_record(library, MATE_RELEASE)
    # The number of splits, and the room of a plan, are matters of the device; there is none here.
    record = dataclasses.replace(
        record, static_num_splits=lambda **geometry: 2, mla_plan_bytes=lambda *_: 4096
    )
    if name == UNPLANNED:
        record = dataclasses.replace(record, drops_plan=lambda arguments: True)
    return library, record


@contextmanager
def _module_named(name: str, module: ModuleType) -> Iterator[None]:
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


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Times:
    """Microseconds of the host for a pass of each peer, turn by turn."""

    first: dict[str, list[float]] = field(default_factory=dict)
    """Of the first layer's forward, which plans the pass."""
    further: dict[str, list[float]] = field(default_factory=dict)
    """Of all the others'."""

    def forward(self, peer: str) -> list[float]:
        """Return the time of a layer's forward, the mean over a pass."""
        both = zip(self.first[peer], self.further[peer], strict=True)
        return [(first + further) / LAYERS for first, further in both]

    def ratio(self, peer: str, other: str = UPSTREAM) -> tuple[float, float]:
        """Return the median of a peer's times over another's of the same turns, and the spread.

        The spread is half the distance between the quartiles.
        """
        pairs = zip(self.forward(peer), self.forward(other), strict=True)
        ratios = sorted(time / base for time, base in pairs)
        low, _, high = statistics.quantiles(ratios, n=4)
        return statistics.median(ratios), (high - low) / 2


def measure(peers: Sequence[HostPeer], mode: str, runner: Any, turns: int) -> Times:
    """Time ``turns`` passes of every peer, in turns, each after an untimed one of the same peer.

    So each finds its own code in the processor's caches, as a server's only backend does.
    """
    names = [peer.name for peer in peers]
    first_times: dict[str, list[float]] = {name: [] for name in names}
    further_times: dict[str, list[float]] = {name: [] for name in names}
    times = Times(first_times, further_times)
    made = _pass(mode, runner)
    for turn in range(-WARM_UP, turns):
        start = turn % len(peers)
        for peer in [*peers[start:], *peers[:start]]:
            _time_pass(peer, made)
            first, further = _time_pass(peer, made)
            if turn >= 0:
                times.first[peer.name].append(1e6 * first)
                times.further[peer.name].append(1e6 * further)
    return times


def _time_pass(peer: HostPeer, made: _Pass) -> tuple[float, float]:
    """Return the seconds of the first layer's forward, and of all others'."""
    from sglang.srt.layers.attention import flashattention_backend as upstream

    peer.library.state.output = made.output
    before = {name: getattr(upstream, name) for name in peer.names}
    vars(upstream).update(peer.names)
    try:
        backend, q, k, v, batch = peer.backend, made.q, made.k, made.v, made.batch
        stores, more = made.stores, made.more
        backend.init_forward_metadata(batch)
        began = time.perf_counter()
        backend.forward(q, k, v, made.layers[0], batch, stores, **more)
        planned = time.perf_counter()
        for layer in made.layers[1:]:
            backend.forward(q, k, v, layer, batch, stores, **more)
        return planned - began, time.perf_counter() - planned
    finally:
        vars(upstream).update(before)


# --- where the time goes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a forward, as the difference of two backends that differ in it alone."""

    name: str
    peer: str
    less: str | None
    """``None``: all of the time is this part."""


PARTS = (
    Part("upstream's forward", UPSTREAM, None),
    Part("composing alone", COMPOSED, UPSTREAM),
    Part("recognising the call", OVER_HOPPER, COMPOSED),
    Part("MATE's adapter", UNPLANNED, OVER_HOPPER),
    Part("the plan", OVER_MATE, UNPLANNED),
)
"""They add up to the time of :data:`OVER_MATE`."""


def part(times: dict[str, list[float]], which: Part) -> float:
    """Return the median of the microseconds that a part takes in the same turn."""
    if which.less is None:
        return statistics.median(times[which.peer])
    pairs = zip(times[which.peer], times[which.less], strict=True)
    return statistics.median([more - less for more, less in pairs])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(prog="sglang-musa-ext bench host", description=__doc__)
    parser.add_argument("--turns", type=int, default=300, help="passes of each backend")
    parser.add_argument(
        "--pool", choices=sorted(POOLS), default="sglang", help="what keys and values go to"
    )
    options = parser.parse_args(arguments)
    from sglang_musa_ext.cpu.stand_ins import prepare_process

    prepare_process()
    torch.set_num_threads(1)
    os.environ.setdefault("SGLANG_PLATFORM", "musa_reference")
    with torch.inference_mode():
        runner = _runner(options.pool)
        peers = _peers(runner)
        measured = {mode: measure(peers, mode, runner, options.turns) for mode in PASS_KINDS}
        runner = _mla_runner()
        peers = _mla_peers(runner)
        measured |= {mode: measure(peers, mode, runner, options.turns) for mode in MLA_KINDS}
    _print_tables(measured, options)
    return 0


def _peers(runner: Any) -> list[HostPeer]:
    """Return what is measured."""
    peers = [_upstream_peer(UPSTREAM, runner)]
    peers += [_our_peer(name, runner) for name in (OVER_MATE, OVER_HOPPER, UNPLANNED, SAMPLED)]
    peers += [_composed_peer(runner), _upstream_peer(f"{UPSTREAM} again", runner)]
    try:
        peers.append(_in_tree_peer(runner))
    except ImportError as error:
        print(f"{IN_TREE_NAME}: {error}", file=sys.stderr)
    # Last, because it has upstream's wrappers call its kernels from here on.
    return [*peers, _upstream_peer(WRAPPED, runner, wrappers=True)]


def _mla_peers(runner: Any) -> list[HostPeer]:
    """Return what is measured of MLA, whose plans come from a workspace and cannot be left out."""
    peers = [_upstream_peer(UPSTREAM, runner)]
    peers += [_our_peer(name, runner) for name in (OVER_MATE, OVER_HOPPER)]
    peers += [_composed_peer(runner), _upstream_peer(f"{UPSTREAM} again", runner)]
    return [*peers, _upstream_peer(WRAPPED, runner, wrappers=True)]


# --- tables ---------------------------------------------------------------------------------------


def _print_tables(measured: dict[str, Times], options: argparse.Namespace) -> None:
    """Print tables whose rows begin with the release, so that those of several can be joined."""
    import sglang

    pool = {"sglang": "SGLang's KV pool", "none": "a KV pool that does nothing"}[options.pool]
    release = sglang.__version__
    print(
        f"SGLang {release}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {LAYERS} layers, {pool}, {options.turns} passes, CPU."
    )
    names = [name for name in measured[PASS_KINDS[0]].first if name != UPSTREAM]
    rows = []
    for mode, times in measured.items():
        forward = statistics.median(times.forward(UPSTREAM))
        ratios = [
            "{:.2f} ± {:.2f}".format(*times.ratio(name)) if name in times.first else "–"
            for name in names
        ]
        rows.append((release, mode, f"{forward:.1f}", *ratios))
    columns = ("SGLang", "Pass", "upstream, µs", *names)
    _print_table("A forward, as ratios to upstream's bare one", columns, rows)
    rows = []
    for mode, times in measured.items():
        ratios = [f"{times.ratio(name, WRAPPED)[0]:.2f}" for name in (OVER_MATE, OVER_HOPPER)]
        rows.append((release, mode, *ratios))
    columns = ("SGLang", "Pass", OVER_MATE, OVER_HOPPER)
    _print_table("The same, as ratios to upstream with its wrappers", columns, rows)
    rows, parts = [], (*PARTS, Part(OVER_MATE, OVER_MATE, None))
    for mode, times in measured.items():
        spent = [
            f"{part(times.first, each):.1f}, {part(times.further, each) / (LAYERS - 1):.2f}"
            if {each.peer, each.less or each.peer} <= times.first.keys()
            else "–"
            for each in parts
        ]
        rows.append((release, mode, *spent))
    columns = ("SGLang", "Pass", *[each.name for each in parts])
    heading = "Where the time goes, µs: the first forward of a pass, and the mean of the others"
    _print_table(heading, columns, rows)


def _print_table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{heading}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |")
