"""The oracle of the fuzzing: the outputs of every layer, and the plan of every kernel call.

Both are worked out anew for each call, from the call alone: no pass, no plan and no earlier call is
known here. The output is attention in float64 over the keys and values that the test handed out.
The plan is that of the reference kernels for the arguments that the call has, because a plan that
is another one's may still give a right output.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_musa_ext.kernels import reference
from sglang_musa_ext.kernels.reference import mla
from tests.support.backend import (
    Model,
    Queries,
    Step,
    attention_layer,
    dense_attention,
    replace_kernels,
)
from tests.support.fp8 import Fp8Model

Tensor = torch.Tensor

UNITS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 4}
"""Units in the last place of the largest output that a kernel may be off by. Half-precision kernels
round the weights once more; a wrong plan leaves rows unwritten or whole runs of keys out.
"""


class Mismatch(AssertionError):
    """A call got another output or another plan than the oracle's."""


@dataclass
class Totals:
    """Counts of what was run, which add up over processes and runs."""

    cases: int = 0
    passes: int = 0
    calls: int = 0
    """Calls of an attention kernel, each with its plan or without one."""
    raw_calls: int = 0
    """Those over raw keys and values."""
    outputs: int = 0
    """Outputs of layers that were compared with the oracle's."""
    plans: int = 0
    reuses: int = 0
    replays: int = 0
    """Graphs that were replayed."""
    mismatches: int = 0

    def add(self, other: Totals) -> None:
        """Add the counts of ``other``."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class JudgedModel(Model):
    """A model whose outputs are compared with dense attention over all requests of a step at once.

    No row may be NaN, which is what nobody wrote; :data:`JUDGED_ROWS` a request are compared.
    """

    totals: Totals

    def require(
        self,
        result: Any,
        step: Step,
        layer: Any,
        inputs: dict[str, Any],
        sinks: Tensor | None = None,
    ) -> None:
        """Compare ``result`` of a layer with float64 over the keys that were handed out."""
        wanted = padded_attention(self, step, layer, self.as_read(inputs["q"]), sinks)
        seen = result if isinstance(result, tuple) else (result,)
        self.totals.outputs += 1
        judged = _padded(step, layer.is_cross_attention).judged
        for what, got, exact in zip(("output", "log-sum-exp"), seen, wanted, strict=False):
            if bool(got.isnan().any()):
                raise Mismatch(f"{what} of layer {layer.layer_id} has rows that nobody wrote")
            error = (got.reshape(step.rows, -1)[judged].double() - exact).abs().amax()
            allowed = UNITS[self.dtype] * torch.finfo(self.dtype).eps * exact.abs().amax()
            if not bool(error <= allowed + 1e-30):
                raise Mismatch(
                    f"{what} of layer {layer.layer_id} is off by {float(error):.3g}, where "
                    f"{float(allowed):.3g} is allowed: {step.batch.forward_mode.name}, "
                    f"{len(step.queries)} requests, lengths {_lengths(step)}"
                )

    def as_read(self, q: Tensor) -> Tensor:
        """Queries as the kernels read them."""
        return q

    def check_decompressed(
        self, backend: Any, step: Step, layer: Any, chunk: int | None = None
    ) -> None:
        """Run an MLA layer of ``step`` over decompressed keys, as upstream's models may.

        Its cache is written as before, for later passes. ``chunk``: keys of a request's prefix in
        one call of those over the prefix, beside one over the new keys; ``None``: one call has all.
        """
        heads, batch = layer.tp_q_head_num, step.batch
        wide = attention_layer(layer.layer_id, heads, heads, 192, v_head_dim=128)
        self.hand_out(layer, batch.out_cache_loc, store=True)
        rows = [len(queries.positions) for queries in step.queries]
        prefixes = [
            len(queries.slots) - count for queries, count in zip(step.queries, rows, strict=True)
        ]
        q = self.normal(sum(rows), heads * 192)
        batch.mha_one_shot, batch.mha_return_lse = chunk is None, True
        pieces = _Pieces(rows, prefixes, chunk)
        vars(batch).update(pieces.fields())
        for index, keys in pieces.calls():
            batch.attn_attend_prefix_cache = index is not None
            batch.prefix_chunk_idx = index
            k, v = (self.normal(sum(keys), heads, dim) for dim in (192, 128))
            result = backend.forward_extend(q, k, v, wide, batch, save_kv_cache=False)
            self.totals.outputs += 1
            pieces.require(result, wide, (q, k, v), keys, causal=index is None)
        batch.attn_attend_prefix_cache = None


@dataclass
class _Pieces:
    """The calls of an MLA layer over decompressed keys, and what each must return."""

    rows: list[int]
    prefixes: list[int]
    chunk: int | None

    def calls(self) -> Iterator[tuple[int | None, list[int]]]:
        """The number of the prefix's chunk, ``None`` for the new keys, and keys a request."""
        if self.chunk is None:
            yield None, [prefix + new for prefix, new in zip(self.prefixes, self.rows, strict=True)]
            return
        yield None, self.rows
        yield from enumerate(self._chunks())

    def _chunks(self) -> list[list[int]]:
        if self.chunk is None:
            return []
        starts = range(0, max(self.prefixes), self.chunk)
        return [[min(max(p - start, 0), self.chunk) for p in self.prefixes] for start in starts]

    def fields(self) -> dict[str, Any]:
        """The batch's, that say where chunks of the prefix end."""
        chunks = self._chunks()
        ends = [[0, *itertools.accumulate(keys)] for keys in chunks]
        return {
            "prefix_chunk_cu_seq_lens": torch.tensor(ends, dtype=torch.int32),
            "prefix_chunk_max_seq_lens": [max(keys) for keys in chunks],
        }

    def require(
        self, result: Any, layer: Any, tensors: Sequence[Tensor], keys: list[int], causal: bool
    ) -> None:
        """Compare the judged rows' output and log-sum-exp with float64, request by request."""
        heads, (q, k, v) = layer.tp_q_head_num, tensors
        shapes = (q.view(-1, heads, 192), self.rows), (k, keys), (v, keys)
        split = [torch.split(tensor.double(), sizes) for tensor, sizes in shapes]
        start = 0
        for queries, keys_of, values in zip(*split, strict=True):
            judged = _judged_rows(len(queries))
            at = judged + start
            start += len(queries)
            if not len(keys_of):
                continue
            visible = torch.ones(len(queries), len(keys_of), dtype=torch.bool)
            visible = visible.tril(len(keys_of) - len(queries)) if causal else visible
            exact = dense_attention(
                queries[judged], keys_of, values, visible[judged], layer.scaling
            )
            for got, wanted in zip(result, exact, strict=True):
                error = (got[at].double().view(wanted.shape) - wanted).abs().amax()
                allowed = UNITS[q.dtype] * torch.finfo(q.dtype).eps * wanted.abs().amax()
                if not bool(error <= allowed):
                    raise Mismatch(
                        f"layer {layer.layer_id} over decompressed keys is off by "
                        f"{float(error):.3g}, where {float(allowed):.3g} is allowed: rows "
                        f"{self.rows}, keys {keys}"
                    )


class JudgedFp8Model(JudgedModel, Fp8Model):
    """The same over a cache in fp8; float64 attends to what fp8 keeps of keys and queries."""

    def as_read(self, q: Tensor) -> Tensor:
        """Upstream casts them to the cache's type, without a scale."""
        read: Tensor = self.rounded(q)
        return read


def _lengths(step: Step, cross: bool = False) -> list[int]:
    return [len(_keys(queries, cross)) for queries in step.queries]


def _keys(queries: Queries, cross: bool) -> Tensor:
    """The slots that a request's rows attend to: the encoder's in cross attention."""
    if not cross:
        return queries.slots
    assert queries.encoder_slots is not None
    return queries.encoder_slots


JUDGED_ROWS = 24
"""Of a request with more query rows, its first and last ones and some between are compared."""


@dataclass
class _Padded:
    """A step's judged rows and its keys as rectangles over the requests."""

    judged: Tensor
    """Index of each judged row among the step's."""
    rows: Tensor
    """The same as a rectangle, ``(requests, longest)``; padding repeats row 0."""
    slots: Tensor
    """KV slots, ``(requests, most keys)``; padding repeats the request's first slot."""
    there: Tensor
    """The ``slots`` that are no padding."""
    positions: Tensor
    """Of each row, ``(requests, longest)``."""
    kept: Tensor
    """The ``rows`` that are no padding."""
    masks: Tensor | None
    """The mask of draft trees, ``(requests, longest, most keys)``."""


def _padded(step: Step, cross: bool) -> _Padded:
    known: dict[bool, _Padded] = vars(step).setdefault("padded", {})
    if cross not in known:
        known[cross] = _pad(step, cross)
    return known[cross]


def _pad(step: Step, cross: bool) -> _Padded:
    chosen = [_judged_rows(len(queries.positions)) for queries in step.queries]
    counts = [len(rows) for rows in chosen]
    keys = _lengths(step, cross)
    shape = len(counts), max(counts), max(keys)
    rows = torch.zeros(shape[:2], dtype=torch.long)
    positions = torch.zeros(shape[:2], dtype=torch.long)
    slots = torch.zeros(shape[0], shape[2], dtype=torch.long)
    masks = None
    if any(queries.mask is not None for queries in step.queries):
        masks = torch.ones(shape, dtype=torch.bool)
    start = 0
    for index, queries in enumerate(step.queries):
        count, own = counts[index], chosen[index]
        rows[index, :count] = own + start
        positions[index, :count] = queries.positions[own]
        slots[index] = _keys(queries, cross)[0]
        slots[index, : keys[index]] = _keys(queries, cross)
        if masks is not None and queries.mask is not None:
            masks[index, :count, : keys[index]] = queries.mask[own]
        start += len(queries.positions)
    kept = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    there = torch.arange(shape[2]) < torch.tensor(keys)[:, None]
    return _Padded(rows[kept], rows, slots, there, positions, kept, masks)


def _judged_rows(count: int) -> Tensor:
    if count <= JUDGED_ROWS:
        return torch.arange(count)
    return torch.linspace(0, count - 1, JUDGED_ROWS).long()


def padded_attention(
    model: Model, step: Step, layer: Any, q: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the judged rows' ``(rows, heads * dim)`` and LSE ``(rows, heads)``, in float64."""
    padded = _padded(step, layer.is_cross_attention)
    k_pool, v_pool = model.exact.get_kv_buffer(layer.layer_id)
    k, v = k_pool[padded.slots], v_pool[padded.slots]
    heads, heads_kv = layer.tp_q_head_num, k.shape[2]
    queries = q.view(-1, heads_kv, heads // heads_kv, layer.head_dim).double()[padded.rows]
    scores = layer.scaling * torch.einsum("brhgd,bkhd->bhgrk", queries, k)
    if layer.logit_cap:
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
    visible = _visible(model, layer, padded)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        grouped = sinks.double().view(heads_kv, -1)[None, :, :, None]
        lse = torch.logaddexp(lse, grouped.expand_as(lse))
    weights = (scores - lse[..., None]).exp()
    out = torch.einsum("bhgrk,bkhd->brhgd", weights, v)
    lse = lse.permute(0, 3, 1, 2)
    return out[padded.kept].flatten(1), lse[padded.kept].flatten(1)


def _visible(model: Model, layer: Any, padded: _Padded) -> Tensor:
    """Return the keys that each row sees, ``(requests, longest, most keys)``."""
    key = torch.arange(padded.slots.shape[1])
    row = padded.positions[..., None]
    both_ways = layer.attn_type.name in ("ENCODER_ONLY", "DECODER_BIDIRECTIONAL")
    seen = padded.there[:, None, :].expand(-1, row.shape[1], -1)
    if layer.is_cross_attention:
        return seen
    if not both_ways:
        seen = seen & (key <= row)
    if layer.sliding_window_size > -1:
        seen = seen & (key >= row - layer.sliding_window_size)
        if both_ways:
            seen = seen & (key <= row + layer.sliding_window_size)
    if model.chunk is not None and layer.use_irope:
        seen = seen & (key // model.chunk == row // model.chunk)
    return seen if padded.masks is None else seen & padded.masks


# --- plans ----------------------------------------------------------------------------------------


class InjectedFault(RuntimeError):
    """Raised by a kernel where the fuzzing makes it fail."""


@dataclass
class KernelWatch:
    """Watches a backend's kernels: counts calls, compares plans, and fails where told to."""

    totals: Totals
    compares_plans: bool = True
    """Off where plans are of another library than the reference's, or inside a device's graph."""
    fails_in: int | None = None
    """The number of attention calls after which one raises :class:`InjectedFault`, once."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, backend: Any) -> None:
        """Stand around the kernels of ``backend``."""
        replace_kernels(backend, self._wrap)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name == "get_scheduler_metadata":
            return function

        def call(**arguments: Any) -> Any:
            self._count(name)
            if self.compares_plans and name == "flash_attn_with_kvcache":
                require_own_plan(arguments)
            return function(**arguments)

        return call

    def _count(self, name: str) -> None:
        with self.lock:
            self.totals.calls += 1
            if name == "flash_attn_varlen_func":
                self.totals.raw_calls += 1
            if self.fails_in is None:
                return
            self.fails_in -= 1
            if self.fails_in > 0:
                return
            self.fails_in = None
        raise InjectedFault("out of memory, as the fuzzing asked for")


def require_own_plan(arguments: dict[str, Any]) -> None:
    """Require that a call's plan is the one that the reference makes for this very call.

    A call without a plan runs in one split and natural order, which is always right.
    """
    plan = arguments.get("scheduler_metadata")
    if isinstance(plan, tuple):
        _require_own_latent_plan(arguments, *plan)
    elif plan is not None and arguments.get("sinks") is None:
        fresh = _plan_of(arguments)
        used, wanted = (_vectors(each, _batch_size(arguments)) for each in (plan, fresh))
        if used != wanted:
            raise Mismatch(
                f"a call has another plan than its own:\n{used}\ninstead of\n{wanted}\n"
                f"{_shapes(arguments)}"
            )


def _vectors(plan: Tensor, batch_size: int) -> list[list[int]]:
    """The four vectors of a plan, without what pads a batch and is never written."""
    vectors: list[list[int]] = plan.view(4, -1)[:, :batch_size].tolist()
    return vectors


def _batch_size(arguments: dict[str, Any]) -> int:
    cu_seqlens_q = arguments.get("cu_seqlens_q")
    return len(arguments["q"]) if cu_seqlens_q is None else len(cu_seqlens_q) - 1


def _plan_of(arguments: dict[str, Any]) -> Tensor:
    """The reference's plan of a call, from the meaning of FA3's arguments."""
    q, k_cache, table = arguments["q"], arguments["k_cache"], arguments["page_table"]
    cu_seqlens_q = arguments.get("cu_seqlens_q")
    if cu_seqlens_q is None:
        batch_size, max_seqlen_q = q.shape[:2]
    else:
        batch_size, max_seqlen_q = cu_seqlens_q.shape[0] - 1, arguments["max_seqlen_q"]
    options: dict[str, Any] = {}
    for name in ("causal", "window_size", "attention_chunk", "num_splits", "pack_gqa", "sm_margin"):
        if arguments.get(name) is not None:
            options[name] = arguments[name]
    if arguments.get("k") is not None:
        options["cu_seqlens_k_new"] = arguments.get("cu_seqlens_k_new")
    return reference.get_scheduler_metadata(
        batch_size=batch_size, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=table.shape[1] * k_cache.shape[1],
        num_heads_q=q.shape[-2], num_heads_kv=k_cache.shape[-2], headdim=q.shape[-1],
        headdim_v=arguments["v_cache"].shape[-1], cache_seqlens=arguments["cache_seqlens"],
        cu_seqlens_q=cu_seqlens_q, cache_leftpad=arguments.get("cache_leftpad"), **options,
    )  # fmt: skip


def _require_own_latent_plan(arguments: dict[str, Any], workspace: Tensor, reuse: bool) -> None:
    """The same for MLA, where the plan is in the workspace if the call reuses it."""
    if not reuse:
        return
    heads, longest = arguments["q"].shape[-2], arguments.get("max_seqlen_q")
    if arguments.get("cu_seqlens_q") is None:
        longest = arguments["q"].shape[1]
    assert longest is not None
    keys = arguments["cache_seqlens"].tolist()
    fresh = mla._mla_plan(keys, mla.mla_parts(longest, heads))
    held = workspace.view(torch.int32)[: len(fresh)].tolist()
    if held != fresh:
        raise Mismatch(
            f"an MLA call reuses another plan than its own:\n{held}\ninstead of\n{fresh}\n"
            f"{_shapes(arguments)}"
        )


def _shapes(arguments: dict[str, Any]) -> str:
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if value is not None and name != "scheduler_metadata"
    }
    return f"cache_seqlens {arguments['cache_seqlens'].tolist()}, {shapes}"
