"""A harness: upstream's backend classes over small models, against dense float64.

A :class:`Model` is layers over one KV cache and one table of requests, with what upstream's
backends read of a model runner. It makes the batches of a forward pass (:class:`Step`), runs single
layers through a backend, and knows what each must return: attention in float64 over the keys and
values that it handed out itself, so that neither the KV cache that the backend wrote nor the
kernels that read it are believed.

Everything follows what the installed SGLang has: the same tests run on every release.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

# Upstream compiles a metadata helper: this takes longer than all tests, and is not tested.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

# Tests take `attention` and `upstream` from here, because what this module prepares must come
# before their import.
__all__ = [
    "DEVICE",
    "AttentionType",
    "Call",
    "Counts",
    "Draft",
    "ForwardMode",
    "LinearStandIn",
    "Model",
    "PretrainedConfig",
    "Queries",
    "Request",
    "SpeculativeAlgorithm",
    "Step",
    "attention",
    "attention_layer",
    "counted",
    "dense_attention",
    "dispatch",
    "mixin",
    "mla_layer",
    "raw_keys",
    "recorded",
    "replace_kernels",
    "upstream",
]  # fmt: skip

from sglang_musa_ext.cpu.stand_ins import prepare_process


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


DEVICE = os.environ.get("FUZZING_DEVICE", "cpu")
"""The device of models and KV caches: a CPU, or a GPU for ``scripts/soak --kernels hopper``."""
if DEVICE == "cpu":
    prepare_process()
else:
    # A default device costs each operation of torch as much as a small operation takes.
    torch.set_default_device(DEVICE)
# All tensors are small, and threads that wait for one another take longer than the work.
torch.set_num_threads(1)
# SGLang looks for its platform once, while it is imported; the tests choose their own settings
# afterwards. It also warns of the quantizations that a CPU does not have.
_PLATFORM = {"SGLANG_PLATFORM": "musa_reference"} if DEVICE == "cpu" else {}
with warnings.catch_warnings(), environment(**_PLATFORM):
    warnings.simplefilter("ignore")
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.layers.attention import flashattention_backend as upstream
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from transformers import PretrainedConfig

    from sglang_musa_ext.attention import dispatch, mixin, raw_keys
    from sglang_musa_ext.attention import selection as attention

Tensor = torch.Tensor

MLA_LATENT, MLA_ROPE = 512, 64
"""Head dimensions of MLA's cache, latent part first: the only ones that the kernels know."""


def attention_layer(
    layer_id: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **options: Any
) -> RadixAttention:
    """An attention layer of upstream's own class; ``options`` are its parameters."""
    return RadixAttention(heads, head_dim, head_dim**-0.5, kv_heads, layer_id, **options)


def mla_layer(layer_id: int, heads: int = 4) -> RadixAttention:
    """A layer of absorbed multi-head latent attention."""
    return attention_layer(layer_id, heads, 1, MLA_LATENT + MLA_ROPE, v_head_dim=MLA_LATENT)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, in the dtype of the arguments.

    ``q``: ``(rows, heads, dim)``. ``k``, ``v``: ``(keys, kv_heads, dim)``. ``visible``: bool
    ``(rows, keys)``. ``sinks``: ``(heads,)``, one more logit a row that has no value. Returns the
    output and its log-sum-exp ``(rows, heads)``.
    """
    ratio = q.shape[1] // k.shape[1]
    scores = scale * torch.einsum("rhd,khd->hrk", q, k.repeat_interleave(ratio, 1))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        extra = sinks.to(scores)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, extra], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)[..., : k.shape[0]]
    return torch.einsum("hrk,khd->rhd", weights, v.repeat_interleave(ratio, 1)), lse.T


class KVPool:
    """The part of upstream's KV pools that its backend uses; layers may differ in shape.

    Slots are filled with ``fill`` until they are written. NaN shows reads of unwritten ones.
    """

    def __init__(
        self,
        layers: Sequence[RadixAttention],
        slots: int,
        dtype: torch.dtype,
        mla: bool,
        fill: float,
    ) -> None:
        self.dtype, self.mla = dtype, mla
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        for layer in layers:
            self.k[layer.layer_id] = torch.full(
                (slots, layer.tp_k_head_num, layer.head_dim), fill, dtype=dtype
            )
            if mla:
                self.v[layer.layer_id] = self.k[layer.layer_id][..., : layer.v_head_dim]
            else:
                self.v[layer.layer_id] = torch.full(
                    (slots, layer.tp_v_head_num, layer.v_head_dim), fill, dtype=dtype
                )

    def place(self, layer: RadixAttention, loc: Any) -> Any:
        """Where a layer's keys and values for the tokens at ``loc`` are."""
        return getattr(loc, "loc", loc)

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.k[layer_id], self.v[layer_id]

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k[layer_id]

    def set_kv_buffer(
        self, layer: Any, loc: Any, k: Tensor, v: Tensor, *_scales: Any, **_options: Any
    ) -> None:
        loc = self.place(layer, loc)
        self.k[layer.layer_id][loc] = k.view(-1, layer.tp_k_head_num, layer.head_dim)
        self.v[layer.layer_id][loc] = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)

    def set_mla_kv_buffer(self, layer: Any, loc: Any, k: Tensor, k_rope: Tensor) -> None:
        loc = self.place(layer, loc)
        self.k[layer.layer_id][loc] = torch.cat([k, k_rope], -1).view(-1, 1, layer.head_dim)


class WindowPool(KVPool, SWAKVPool):  # type: ignore[misc]
    """A pool like upstream's for hybrid windows, whose layers have pages of their own."""

    swa_layer_nums = 1

    def __init__(
        self,
        layers: Sequence[RadixAttention],
        slots: int,
        dtype: torch.dtype,
        fill: float,
        page: int,
    ) -> None:
        KVPool.__init__(self, layers, slots, dtype, False, fill)
        # Page 0 stays upstream's padding page, and so do the places within a page.
        pages = torch.arange(slots).view(-1, page)
        self.full_to_swa_index_mapping = torch.cat([pages[:1], pages[1:].flip(0)]).flatten()

    def translate_loc_from_full_to_swa(self, loc: Tensor) -> Tensor:
        return self.full_to_swa_index_mapping[loc.long()].to(torch.int32)

    def place(self, layer: RadixAttention, loc: Any) -> Any:
        if layer.sliding_window_size < 0:
            return super().place(layer, loc)
        # Later releases say where; up to some release the pool translates.
        said = getattr(loc, "swa_loc", None)
        return (
            self.full_to_swa_index_mapping[super().place(layer, loc)]
            if said is None
            else said.long()
        )


class LinearStandIn:
    """Stands for a linear-attention backend of upstream's, which a hybrid model has beside ours."""

    needs_cpu_seq_lens = False

    def __init__(self, _runner: Any) -> None:
        self.layers: list[int] = []

    def init_forward_metadata(self, _batch: Any) -> None:
        """Nothing: linear layers have no page table."""

    def forward_decode(self, **arguments: Any) -> None:
        self.layers.append(arguments["layer"].layer_id)

    forward_extend = forward = forward_decode


@dataclass
class Queries:
    """One request's query rows in a step, and which keys they see before layers narrow it.

    ``slots``: KV slots in order of position. ``positions``: each row's own position among them.
    ``mask``: bool ``(rows, keys)`` where a draft tree says more than order; ``None`` elsewhere.
    """

    slots: Tensor
    positions: Tensor
    mask: Tensor | None = None
    encoder_slots: Tensor | None = None


@dataclass
class Step:
    """One forward pass: upstream's batch, and what each request's rows are."""

    batch: Any
    queries: list[Queries]

    @property
    def rows(self) -> int:
        return sum(len(query.positions) for query in self.queries)


@dataclass
class Request:
    """A request in the table: its row, and how many of its tokens are in the KV cache."""

    row: int
    length: int


class Draft(SimpleNamespace):
    """Stands for upstream's ``EagleDraftInput`` or ``EagleVerifyInput``, as attention sees it."""

    def is_draft_input(self) -> bool:
        return True


@dataclass
class Model:
    """Layers over one KV cache; ``arguments`` are fields of ``ServerArgs`` for the backend."""

    layers: Sequence[RadixAttention]
    page_size: int = 64
    context_len: int = 512
    table_rows: int = 6
    mla: bool = False
    window: int | None = None
    window_pages: bool = False
    """True if layers with a window have pages of their own."""
    chunk: int | None = None
    encoder_decoder: bool = False
    draft_worker: bool = False
    dtype: torch.dtype = torch.float32
    fill: float = math.nan
    seed: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = torch.Generator(DEVICE).manual_seed(self.seed)
        pages_a_row = -(-self.context_len // self.page_size)
        # Page 0 is upstream's padding page; the others are dealt out in no order, as after some
        # hours of serving.
        order = (
            torch.randperm(self.table_rows * pages_a_row, generator=self.random).view(
                self.table_rows, -1
            )
            + 1
        )
        tokens = order[..., None] * self.page_size + torch.arange(self.page_size)
        self.table = tokens.view(self.table_rows, -1).to(torch.int32)
        slots = (self.table_rows * pages_a_row + 1) * self.page_size
        self.pool = (
            WindowPool(self.layers, slots, self.dtype, self.fill, self.page_size)
            if self.window_pages
            else KVPool(self.layers, slots, self.dtype, self.mla, self.fill)
        )
        self.exact = KVPool(self.layers, slots, torch.float64, self.mla, math.nan)
        self._free_rows = list(range(self.table_rows))

    # --- what upstream's backends are built from --------------------------------------------------

    def runner(self) -> Any:
        """The stand-in for upstream's ``ModelRunner``."""
        first = self.layers[0]
        config = SimpleNamespace(
            attention_arch=AttentionArch.MLA if self.mla else AttentionArch.MHA,
            context_len=self.context_len,
            dtype=self.dtype,
            head_dim=first.head_dim,
            hf_text_config=SimpleNamespace(num_attention_heads=first.tp_q_head_num),
            hf_config=SimpleNamespace(),
            get_num_kv_heads=lambda _: first.tp_k_head_num,
            is_encoder_decoder=self.encoder_decoder,
            is_local_attention_model=self.chunk is not None,
        )
        return SimpleNamespace(
            server_args=self.publish(),
            model_config=config,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table, size=self.table_rows),
            token_to_kv_pool=self.pool,
            # Up to 0.5.18 upstream looks for hooks of a unified pool here, which ours has not.
            token_to_kv_pool_allocator=SimpleNamespace(),
            kv_index_translator=self._translator(),
            device=DEVICE,
            kv_cache_dtype=self.dtype,
            kv_cache_dtype_str="auto",
            page_size=self.page_size,
            sliding_window_size=self.window,
            attention_chunk_size=self.chunk,
            is_draft_worker=self.draft_worker,
            attn_cp_size=1,
            tp_size=1,
            ps=SimpleNamespace(tp_size=1, attn_tp_size=1, attn_cp_size=1),
        )

    def _translator(self) -> Any:
        """The stand-in for upstream's ``KVIndexTranslator`` over an ordinary pool."""

        def window_ids(loc: Tensor) -> Tensor | None:
            return (
                self.pool.translate_loc_from_full_to_swa(loc)
                if isinstance(self.pool, WindowPool)
                else None
            )

        def write_ids(batch: Any, kind: Any = None) -> Tensor | None:
            return (
                window_ids(batch.out_cache_loc)
                if getattr(kind, "name", "") == "SLIDING_WINDOW"
                else None
            )

        return SimpleNamespace(
            is_translating=False, reads_are_translated=False,
            # Where window layers write, up to 0.5.21 and after.
            sliding_window_write_loc_for=window_ids, write_ids=write_ids,
            # Asked by the graphs of 0.5.19 alone.
            build_index_table=lambda req_pool_indices, **_: SimpleNamespace(
                ids=self.table, row_ids=req_pool_indices, is_translated=False,
                sliding_window_ids=window_ids(self.table),
            ),
        )  # fmt: skip

    def publish(self) -> Any:
        """Make this model's server arguments the process's, through upstream's own setter."""
        arguments = ServerArgs(
            model_path="dummy", device=DEVICE, page_size=self.page_size, **self.arguments
        )
        if hasattr(arguments, "resolve_once"):
            arguments.resolve_once()
        set_global_server_args_for_scheduler(arguments)
        return arguments

    def backend(self, **options: Any) -> Any:
        """A backend of ours for this model, with the kernel dispatch installed."""
        attention.install_kernel_dispatch()
        return attention.MusaFA3Backend(self.runner(), **options)

    # --- requests and batches ---------------------------------------------------------------------

    def request(self, length: int, layers: Sequence[RadixAttention] | None = None) -> Request:
        """A new request with ``length`` tokens in the KV cache of every layer."""
        row = self._free_rows.pop(0)
        for layer in self.layers if layers is None else layers:
            self.hand_out(layer, self.table[row, :length].long(), store=True)
        return Request(row, length)

    def requests(self, *lengths: int) -> list[Request]:
        """New requests of these lengths."""
        return [self.request(length) for length in lengths]

    def release(self, request: Request) -> None:
        """Give back a request's row of the table, whose slots keep what was in them."""
        self._free_rows.append(request.row)

    def hand_out(
        self, layer: RadixAttention, slots: Tensor, store: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw keys and values for ``slots``, note them, and with ``store`` cache them too."""
        k = self.normal(len(slots), layer.tp_k_head_num, layer.head_dim)
        v = (
            k[..., : layer.v_head_dim]
            if self.mla
            else self.normal(len(slots), layer.tp_v_head_num, layer.v_head_dim)
        )
        for pool in (self.exact, self.pool) if store else (self.exact,):
            place = pool.place(layer, slots)
            pool.k[layer.layer_id][place] = k.to(pool.dtype)
            pool.v[layer.layer_id][place] = v.to(pool.dtype)
        return k, v

    def normal(self, *shape: int) -> Tensor:
        """Random numbers in the model's dtype."""
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def extend(
        self, requests: Sequence[Request], new: Sequence[int], mode: Any = ForwardMode.EXTEND
    ) -> Step:
        """A prefill, or its continuation: ``new`` tokens of each request after those there."""
        prefixes = [request.length for request in requests]
        for request, count in zip(requests, new, strict=True):
            request.length += count
        return self._step(
            mode, requests, new,
            extend_seq_lens=torch.tensor(new, dtype=torch.int32), extend_seq_lens_cpu=list(new),
            extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
            extend_prefix_lens_cpu=prefixes,
            extend_num_tokens=sum(new),
        )  # fmt: skip

    def decode(self, requests: Sequence[Request]) -> Step:
        """One more token of each request."""
        for request in requests:
            request.length += 1
        return self._step(ForwardMode.DECODE, requests, [1] * len(requests))

    def draft_decode(self, requests: Sequence[Request], step: int) -> Step:
        """Step ``step`` of a draft chain: upstream adds ``step + 1`` to each length itself."""
        made = self._step(ForwardMode.DECODE, requests, [1] * len(requests), spec_info=Draft())
        for queries, request in zip(made.queries, requests, strict=True):
            queries.slots = self.slots(request, request.length + step + 1)
            queries.positions = torch.tensor([request.length + step])
        made.batch.out_cache_loc = torch.cat([queries.slots[-1:] for queries in made.queries])
        return made

    def verify(
        self, requests: Sequence[Request], count: int, trees: Sequence[Tensor] | None = None
    ) -> Step:
        """Verify ``count`` draft tokens a request; lengths are those before the draft.

        ``trees``: bool ``(count, count)`` for each request, which draft token sees which; ``None``
        for a chain.
        """
        masks = None if trees is None else [
            torch.cat([torch.ones(count, request.length, dtype=torch.bool), tree], 1)
            for request, tree in zip(requests, trees, strict=True)
        ]  # fmt: skip
        custom = None if masks is None else torch.cat([mask.flatten() for mask in masks])
        positions = torch.cat(
            [torch.arange(request.length, request.length + count) for request in requests]
        )
        spec_info = Draft(custom_mask=custom, positions=positions, draft_token_num=count)
        made = self._step(
            ForwardMode.TARGET_VERIFY, requests, [0] * len(requests), spec_info=spec_info
        )
        for index, request in enumerate(requests):
            rows = torch.arange(request.length, request.length + count)
            mask = None if masks is None else masks[index]
            made.queries[index] = Queries(self.slots(request, request.length + count), rows, mask)
        made.batch.out_cache_loc = torch.cat([queries.slots[-count:] for queries in made.queries])
        made.batch.positions = positions
        return made

    def draft_tree(self, requests: Sequence[Request], topk: int, steps: int, step: int) -> Step:
        """Step ``step`` of ``topk`` branches a request, each on its own pages, as upstream has it.

        A branch begins with a copy of its request's last, partly filled page. The batch's
        ``out_cache_loc`` is that of all steps, which upstream's metadata wants; :meth:`enter_step`
        narrows it to this step's.
        """
        branches = [self.branch(request, steps) for request in requests for _ in range(topk)]
        for drafted in branches:
            for layer in self.layers:
                self.hand_out(layer, drafted[:step], store=True)
        made = self._step(ForwardMode.DECODE, requests, [0] * len(requests), spec_info=Draft())
        made.queries = []
        for index, drafted in enumerate(branches):
            request = requests[index // topk]
            slots = torch.cat([self.slots(request, request.length), drafted[: step + 1]])
            made.queries.append(Queries(slots, torch.tensor([request.length + step])))
        made.batch.out_cache_loc = torch.cat(branches)
        return made

    def branch(self, request: Request, steps: int) -> Tensor:
        """Slots for ``steps`` draft tokens, behind a copy of the last, partly filled page."""
        pages = self.table[self._free_rows.pop(0)].long()
        last = request.length % self.page_size
        copied = self.slots(request, request.length)[request.length - last :]
        for pool in (self.exact, self.pool):
            for layer in self.layers:
                for buffer in pool.get_kv_buffer(layer.layer_id):
                    buffer[pages[:last]] = buffer[copied]
        return pages[last : last + steps]

    @staticmethod
    def enter_step(made: Step) -> None:
        """Let a draft step's batch write where its tokens go, as upstream's draft worker does."""
        made.batch.out_cache_loc = torch.cat([queries.slots[-1:] for queries in made.queries])

    def slots(self, request: Request, length: int) -> Tensor:
        """The KV slots of the first ``length`` tokens of a request."""
        return self.table[request.row, :length].long()

    def _step(
        self, mode: Any, requests: Sequence[Request], new: Sequence[int], **fields: Any
    ) -> Step:
        lengths = [request.length for request in requests]
        queries = [
            Queries(
                self.slots(request, request.length),
                torch.arange(request.length - count, request.length),
            )
            for request, count in zip(requests, new, strict=True)
        ]
        written = torch.cat([query.slots[query.positions] for query in queries])
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(requests),
            input_ids=torch.zeros(len(written), dtype=torch.int64),
            req_pool_indices=torch.tensor([request.row for request in requests]),
            seq_lens=torch.tensor(lengths),
            out_cache_loc=written,
            seq_lens_sum=sum(lengths),
        )
        extra = {
            "seq_lens_cpu": torch.tensor(lengths, device="cpu"),
            "positions": torch.cat([query.positions for query in queries]),
            "spec_algorithm": SpeculativeAlgorithm.NONE,
            # Up to 0.5.12 the forwards take the pools from the batch.
            "req_to_token_pool": SimpleNamespace(req_to_token=self.table),
            "token_to_kv_pool": self.pool,
        }
        for name, value in (extra | fields).items():
            setattr(batch, name, value)
        return Step(batch, queries)

    # --- running and checking ---------------------------------------------------------------------

    def inputs(
        self, step: Step, layer: RadixAttention, share_kv: bool = False
    ) -> dict[str, Tensor | None]:
        """Arguments ``q``, ``k``, ``v`` (MLA: and ``k_rope``) of a layer's forward in ``step``."""
        # A slice of what one projection makes of the hidden states, as models pass it.
        columns = layer.tp_q_head_num * layer.head_dim
        q = self.normal(step.rows, columns + layer.head_dim)[:, :columns]
        if share_kv:
            return {"q": q, "k": None, "v": None}
        loc = (
            step.batch.encoder_out_cache_loc
            if layer.is_cross_attention
            else step.batch.out_cache_loc
        )
        k, v = self.hand_out(layer, loc)
        if not self.mla:
            return {"q": q, "k": k, "v": v}
        return {"q": q, "k": k[..., :MLA_LATENT], "v": v, "k_rope": k[..., MLA_LATENT:]}

    def forward(
        self,
        backend: Any,
        step: Step,
        layer: RadixAttention,
        inputs: dict[str, Tensor | None],
        **options: Any,
    ) -> Any:
        """Return what ``backend`` returns for one layer of ``step``."""
        decoding = step.batch.forward_mode.is_decode_or_idle()
        run = backend.forward_decode if decoding else backend.forward_extend
        arguments = {"layer": layer, "forward_batch": step.batch, **inputs, **options}
        return run(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)

    def expected(
        self,
        step: Step,
        layer: RadixAttention,
        q: Tensor,
        dtype: torch.dtype = torch.float64,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return exact output ``(rows, heads * dim)`` and log-sum-exp ``(rows, heads)``."""
        outputs, start = [], 0
        for queries in step.queries:
            rows = q.view(-1, layer.tp_q_head_num, layer.head_dim)[
                start : start + len(queries.positions)
            ]
            slots = queries.encoder_slots if layer.is_cross_attention else queries.slots
            assert slots is not None
            k, v = (buffer[slots].to(dtype) for buffer in self.exact.get_kv_buffer(layer.layer_id))
            visible = self.visible(queries, layer, len(slots))
            outputs.append(
                dense_attention(
                    rows.to(dtype), k, v, visible, layer.scaling, layer.logit_cap, sinks
                )
            )
            start += len(queries.positions)
        out, lse = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return out.flatten(1), lse

    def visible(self, queries: Queries, layer: RadixAttention, keys: int) -> Tensor:
        """Return the keys that each row sees in ``layer``: bool ``(rows, keys)``."""
        key, row = torch.arange(keys), queries.positions[:, None]
        if layer.is_cross_attention:
            return torch.ones(len(row), keys, dtype=torch.bool)
        both_ways = layer.attn_type in (
            AttentionType.ENCODER_ONLY,
            AttentionType.DECODER_BIDIRECTIONAL,
        )
        seen = torch.ones(len(row), keys, dtype=torch.bool) if both_ways else key <= row
        if layer.sliding_window_size > -1:
            seen = seen & (key >= row - layer.sliding_window_size)
            if both_ways:
                seen = seen & (key <= row + layer.sliding_window_size)
        if self.chunk is not None and layer.use_irope:
            seen = seen & (key // self.chunk == row // self.chunk)
        return seen if queries.mask is None else seen & queries.mask

    def check(
        self,
        backend: Any,
        step: Step,
        layer: RadixAttention,
        share_kv: bool = False,
        **options: Any,
    ) -> None:
        """Run one layer and require the right output, and log-sum-exp if it returns one."""
        inputs = self.inputs(step, layer, share_kv)
        self.require(
            self.forward(backend, step, layer, inputs, **options),
            step,
            layer,
            inputs,
            options.get("sinks"),
        )

    def require(
        self,
        result: Any,
        step: Step,
        layer: RadixAttention,
        inputs: dict[str, Any],
        sinks: Tensor | None = None,
    ) -> None:
        """Require at most twice the error of the same formula in the model's dtype."""
        wanted = self.expected(step, layer, inputs["q"], sinks=sinks)
        plain = self.expected(step, layer, inputs["q"], self.dtype, sinks=sinks)
        seen = result if isinstance(result, tuple) else (result,)
        for what, got, exact, rough in zip(
            ("output", "log-sum-exp"), seen, wanted, plain, strict=False
        ):
            floor = 32 * torch.finfo(self.dtype).eps * exact.abs().max().item()
            tolerance = 2 * (rough - exact).abs().max().item() + floor
            error = (got.view(exact.shape).double() - exact).abs().amax(-1)
            bad = ~(error <= tolerance)
            assert not bad.any(), (
                f"{what} of layer {layer.layer_id}: {int(bad.sum())} of {len(bad)} rows are wrong, "
                f"first row {int(bad.nonzero()[0])}, error {error.max().item():.3g} where "
                f"{tolerance:.3g} is allowed"
            )

    def run_pass(
        self,
        backend: Any,
        step: Step,
        layers: Sequence[RadixAttention] | None = None,
        **options: Any,
    ) -> None:
        """One whole forward pass: upstream's metadata, then every layer, each checked."""
        backend.init_forward_metadata(step.batch)
        for layer in self.layers if layers is None else layers:
            self.check(backend, step, layer, **options)


@dataclass
class Counts:
    """The counts that a piece of work added to a backend's statistics."""

    passes: int = 0
    calls: int = 0
    planned_calls: int = 0
    plans: int = 0
    reuses: int = 0


@contextmanager
def counted(backend: Any) -> Iterator[Counts]:
    """Count the plans of ``backend`` inside; the counts are there when the block ends."""
    before = backend.musa_fa3_report()["statistics"]
    counts = Counts()
    yield counts
    after = backend.musa_fa3_report()["statistics"]
    for name in vars(counts):
        setattr(counts, name, after[name] - before[name])


@dataclass
class Call:
    """One call of a kernel function: its name, its arguments, and what it returned."""

    name: str
    arguments: dict[str, Any]
    result: Any


def recorded(backend: Any) -> list[Call]:
    """A list that grows with every kernel function that ``backend`` calls from now on."""
    calls: list[Call] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            result = function(**arguments)
            calls.append(Call(name, arguments, result))
            return result

        return call

    replace_kernels(backend, wrap)
    return calls


def replace_kernels(
    backend: Any, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Let ``wrap`` make ``backend``'s kernel functions from their names and the former ones."""
    kernels = backend._kernels
    names = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata")
    wrapped = {name: wrap(name, getattr(kernels, name)) for name in names}
    if kernels.unadapted is not None:
        wrapper = wrap("flash_attn_with_kvcache", kernels.unadapted)
        wrapped["unadapted"] = _as_called(kernels.unadapted, wrapper)
    backend._kernels = dataclasses.replace(kernels, **wrapped)


def _as_called(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``wrapper``, which takes keywords alone, with the signature of ``function``.

    The signature says which calls reach it, and whether they pass queries and keys by position.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def called(*tensors: Any, **keywords: Any) -> Any:
        return wrapper(**dict(zip(names, tensors, strict=False)), **keywords)

    return called
