"""A provider's kernels, called as the backend calls them, against attention in float64.

The reference is ``attention_float64.py`` beside this module, computed on the CPU: it shares nothing
with the kernels, nor with the rest of the package. A result may be off by twice what PyTorch's own
plain computation in the same dtype is off by, and by two roundings of the largest value.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
)
from sglang_musa_ext.validation.attention_float64 import attention
from sglang_musa_ext.validation.device import Emit, kernels_for, run_cases
from sglang_musa_ext.validation.report import FAIL, PASS, SKIP, Outcome

Tensor = torch.Tensor

UNWRITTEN = 50.0
"""The value of slots without a key, which kernels must mask; NaN would survive a correct mask."""
LATENT, ROPE = 512, 64
PART = "numerics"


# --- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A result of the kernels beside float64 and PyTorch's plain computation, all on the CPU."""

    what: str
    seen: Tensor
    exact: Tensor
    plain: Tensor
    dtype: torch.dtype

    @property
    def error(self) -> float:
        """Return the largest error; infinite where a row is NaN, or infinite on one side."""
        finite = self.exact.isfinite()
        seen = self.seen.double()
        if (
            seen.shape != self.exact.shape
            or seen[finite].isnan().any()
            or not seen[~finite].equal(self._infinite)
        ):
            return float("inf")
        return _largest(seen[finite] - self.exact[finite])

    @property
    def allowed(self) -> float:
        """Twice PyTorch's own error in the dtype, and two roundings of the largest value."""
        finite = self.exact.isfinite()
        own = _largest((self.plain.double() - self.exact)[finite])
        return 2 * own + 2 * torch.finfo(self.dtype).eps * _largest(self.exact[finite])

    @property
    def _infinite(self) -> Tensor:
        return self.exact[~self.exact.isfinite()]


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


# --- the inputs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A batch: ``rows`` new queries of each request, the last of its ``keys``; heads and pages."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int = 8
    heads_kv: int = 2
    dim: int = 128
    dim_v: int = 128
    page: int = 64
    capacity: int = 0
    """Tokens that a row of the page table has room for, at least."""


class Batch:
    """The tensors of a :class:`Shape`: float values on the CPU, and the kernels' on the device."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        # Not the default of any kernel, so that dropping it shows.
        self.scale = 0.75 * shape.dim**-0.5
        self.random = torch.Generator().manual_seed(seed)
        self.q = [self.normal(rows, shape.heads, shape.dim) for rows in shape.rows]
        self.k = [self.normal(keys, shape.heads_kv, shape.dim) for keys in shape.keys]
        self.v = [self.normal(keys, shape.heads_kv, shape.dim_v) for keys in shape.keys]
        width = max(-(-max(*shape.keys, shape.capacity, 1) // shape.page), 1)
        # Page 0 belongs to nobody; the others are dealt out in no order, as after hours of serving.
        order = torch.randperm(width * len(shape.keys), generator=self.random) + 1
        self.page_table = order.view(-1, width).to(torch.int32).to(device)
        self.capacity = width * shape.page

    @property
    def sequences(self) -> Sequences:
        """q, k and v of each request."""
        return list(zip(self.q, self.k, self.v, strict=True))

    def normal(self, *size: int) -> Tensor:
        """Random values of the dtype, on the CPU."""
        return torch.randn(size, generator=self.random).to(self.dtype)

    def cached(self, values: Sequence[Tensor]) -> Tensor:
        """``values`` of each request in pages ``(pages, page, heads, dim)``, on the device."""
        table, page = self.page_table.cpu().long(), self.shape.page
        cache = torch.full(
            (int(table.max()) + 1, page, *values[0].shape[1:]), UNWRITTEN, dtype=self.dtype
        )
        for row, tokens in zip(table, values, strict=True):
            at = torch.arange(len(tokens))
            cache[row[at // page], at % page] = tokens
        return cache.to(self.device)

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as layers pass them, on the device.

        Where there is a key for each query they are slices of what one projection makes.
        """
        tensors = [torch.cat(each) for each in (self.q, self.k, self.v)]
        if self.shape.rows != self.shape.keys:
            q, k, v = (tensor.to(self.device) for tensor in tensors)
            return q, k, v
        columns = [tensor[0].numel() for tensor in tensors]
        made = torch.cat([tensor.flatten(1) for tensor in tensors], 1).to(self.device)
        slices = zip(torch.split(made, columns, 1), tensors, strict=True)
        q, k, v = (each.view(tensor.shape) for each, tensor in slices)
        return q, k, v

    def arguments(self, **options: Any) -> dict[str, Any]:
        """Return arguments of ``flash_attn_with_kvcache`` as upstream passes them."""
        return dict(
            q=torch.cat(self.q).to(self.device), k_cache=self.cached(self.k),
            v_cache=self.cached(self.v),
            page_table=self.page_table, cache_seqlens=self.int32(self.shape.keys),
            cu_seqlens_q=self.offsets(self.shape.rows), max_seqlen_q=max(self.shape.rows),
            softmax_scale=self.scale, ver=3, **options,
        )  # fmt: skip

    def plan(
        self, kernels: FA3Kernels, lengths: dict[str, Tensor] | None = None, **options: Any
    ) -> Tensor | None:
        """Return scheduler metadata as the backend asks for it, or ``None`` if it does not.

        ``lengths`` are ``cache_seqlens`` and ``cu_seqlens_q`` that are on the device already: a
        capture forbids to bring them there.
        """
        shape, softcap = self.shape, options.get("softcap", 0.0)
        if len(set(shape.rows)) > 1 and not kernels.plans_unequal_queries:
            return None
        return kernels.get_scheduler_metadata(
            batch_size=len(shape.rows), max_seqlen_q=max(shape.rows), max_seqlen_k=self.capacity,
            num_heads_q=shape.heads, num_heads_kv=shape.heads_kv, headdim=shape.dim,
            headdim_v=shape.dim_v,
            qkv_dtype=self.dtype, page_size=shape.page, causal=options.get("causal", False),
            window_size=options.get("window_size", (-1, -1)), attention_chunk=0,
            has_softcap=kernels.metadata_uses_softcap and softcap > 0.0, num_splits=0,
            pack_gqa=None, sm_margin=0,
            cache_seqlens=self.int32(shape.keys) if lengths is None else lengths["cache_seqlens"],
            cu_seqlens_q=self.offsets(shape.rows) if lengths is None else lengths["cu_seqlens_q"],
        )  # fmt: skip

    def int32(self, values: Sequence[int]) -> Tensor:
        """``values`` on the device, as the kernels want lengths."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def offsets(self, lengths: Sequence[int]) -> Tensor:
        """Where each of these lengths begins, and where the last one ends."""
        return self.int32([sum(lengths[:index]) for index in range(len(lengths) + 1)])


Sequences = Sequence[tuple[Tensor, Tensor, Tensor]]
"""q, k and v of each request, on the CPU."""


def compare(
    result: Any, sequences: Sequences, dtype: torch.dtype, **options: Any
) -> list[Comparison]:
    """A call's output, and its log-sum-exp where it returned one, beside what they should be.

    ``sequences`` are q, k, v of each request; ``options`` are those of float64 attention.
    """
    exact = [attention(*tensors, dtype=torch.float64, **options) for tensors in sequences]
    plain = [attention(*tensors, dtype=dtype, **options) for tensors in sequences]
    seen = (result[0], result[1]) if isinstance(result, tuple) else (result,)
    return [
        Comparison(what, value.detach().cpu(), _joined(exact, index), _joined(plain, index), dtype)
        for index, (what, value) in enumerate(zip(("output", "LSE"), seen, strict=False))
    ]


def _joined(pairs: Sequence[tuple[Tensor, Tensor]], index: int) -> Tensor:
    """Join all requests' outputs (0) or log-sum-exps (1) along that dimension, their tokens."""
    return torch.cat([pair[index] for pair in pairs], dim=index)


# --- the ways to call -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The surroundings of a case: kernels, dtype and device."""

    kernels: FA3Kernels
    device: torch.device
    dtype: torch.dtype


Procedure = Callable[[Setting, Shape, dict[str, Any]], list[Comparison]]


def float64_options(batch: Batch, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of float64 attention for a call of ``batch`` with ``options``."""
    own = {
        "scale": batch.scale,
        "causal": options.get("causal", False),
        "softcap": options.get("softcap", 0.0),
    }
    sinks = options.get("sinks")
    return own | {
        "window": options.get("window_size", (-1, -1)),
        "sinks": None if sinks is None else sinks.cpu(),
    }


def _with_sinks(setting: Setting, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` with a tensor of sinks if they say so, bfloat16 as SGLang loads them."""
    if not options.get("sinks"):
        return options
    values = torch.linspace(-1.0, 2.0, shape.heads).to(torch.bfloat16)
    return options | {"sinks": values.to(setting.device)}


def paged(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """A planned call over a paged KV cache, with its log-sum-exp."""
    batch = Batch(shape, setting.dtype, setting.device)
    options = _with_sinks(setting, shape, options)
    plan = batch.plan(setting.kernels, **options)
    arguments = batch.arguments(**options)
    result = setting.kernels.flash_attn_with_kvcache(
        **arguments, scheduler_metadata=plan, return_softmax_lse=True
    )
    return compare(
        result,
        batch.sequences,
        setting.dtype,
        **float64_options(batch, options),
    )


def into_given_output(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """A planned call that returns its output alone, written where ``out=`` says."""
    batch = Batch(shape, setting.dtype, setting.device)
    plan, arguments = batch.plan(setting.kernels, **options), batch.arguments(**options)
    out = torch.full_like(arguments["q"][..., : shape.dim_v], UNWRITTEN)
    setting.kernels.flash_attn_with_kvcache(**arguments, scheduler_metadata=plan, out=out)
    return compare(
        out,
        batch.sequences,
        setting.dtype,
        **float64_options(batch, options),
    )


def second_layer(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Two layers of one pass on one plan: other queries, keys and values, same lengths."""
    first, second = (Batch(shape, setting.dtype, setting.device, seed) for seed in (0, 1))
    plan, comparisons = first.plan(setting.kernels, **options), []
    for batch in (first, second, first):
        result = setting.kernels.flash_attn_with_kvcache(
            **batch.arguments(**options), scheduler_metadata=plan
        )
        comparisons += compare(
            result, batch.sequences, setting.dtype, **float64_options(batch, options)
        )
    return comparisons


def strided_table(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """A page table that is a view with gaps, as slices of SGLang's tables are."""
    batch = Batch(shape, setting.dtype, setting.device)
    wide = torch.zeros(*batch.page_table.shape, 2, dtype=torch.int32, device=setting.device)
    wide[..., 0] = batch.page_table
    arguments = batch.arguments(**options) | {"page_table": wide[..., 0]}
    result = setting.kernels.flash_attn_with_kvcache(
        **arguments, scheduler_metadata=batch.plan(setting.kernels, **options)
    )
    return compare(
        result,
        batch.sequences,
        setting.dtype,
        **float64_options(batch, options),
    )


def varlen(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Ragged attention over raw keys and values, which takes no plan."""
    batch = Batch(shape, setting.dtype, setting.device)
    options = _with_sinks(setting, shape, options)
    q, k, v = batch.raw()
    result = setting.kernels.flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=batch.offsets(shape.rows),
        cu_seqlens_k=batch.offsets(shape.keys), max_seqlen_q=max(shape.rows),
        max_seqlen_k=max(shape.keys),
        softmax_scale=batch.scale, return_softmax_lse=True, ver=3, **options,
    )  # fmt: skip
    return compare(
        result,
        batch.sequences,
        setting.dtype,
        **float64_options(batch, options),
    )


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys by their log-sum-exp, in float32."""
    lses = torch.stack([lse.float() for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total).transpose(1, 2)[..., None]
    return (weights * torch.stack([out.float() for out, _ in parts])).sum(0), total


def cascade(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Attend from draft branches to a shared prefix and to their own suffixes, and merge."""
    topk, suffix = options["topk"], options["suffix"]
    batch = Batch(replace(shape, rows=(topk,) * len(shape.keys)), setting.dtype, setting.device)
    branches = len(shape.keys) * topk
    own = Batch(
        replace(shape, rows=(1,) * branches, keys=(suffix,) * branches),
        setting.dtype,
        setting.device,
        seed=1,
    )
    queries = torch.cat(batch.q)
    own.q = list(torch.split(queries, 1))
    parts = []
    for each in (batch, own):
        plan = each.plan(setting.kernels)
        result = setting.kernels.flash_attn_with_kvcache(
            **each.arguments(), scheduler_metadata=plan, return_softmax_lse=True
        )
        parts.append((result[0], result[1]))
    sequences = [
        (
            own.q[i],
            torch.cat([batch.k[i // topk], own.k[i]]),
            torch.cat([batch.v[i // topk], own.v[i]]),
        )
        for i in range(branches)
    ]
    return compare(merged(parts), sequences, setting.dtype, scale=batch.scale)


# --- fp8 ------------------------------------------------------------------------------------------


class ScaledBatch(Batch):
    """A batch in fp8, whose keys and values count ``key_scale`` and ``value_scale`` times."""

    key_scale = value_scale = 1.0

    def cached(self, values: Sequence[Tensor]) -> Tensor:
        """Return ``values`` in pages, as bytes until the end: not every PyTorch indexes fp8."""
        table, page = self.page_table.cpu().long(), self.shape.page
        unwritten = torch.tensor(UNWRITTEN).to(self.dtype).view(torch.uint8)
        size = (int(table.max()) + 1, page, *values[0].shape[1:])
        cache = unwritten.expand(size).contiguous()
        for row, tokens in zip(table, values, strict=True):
            at = torch.arange(len(tokens))
            cache[row[at // page], at % page] = tokens.view(torch.uint8)
        return cache.to(self.device).view(self.dtype)

    def scales(self) -> dict[str, Tensor]:
        """Return the scales of a layer as upstream passes them; none where they are 1."""
        if self.key_scale == self.value_scale == 1.0:
            return {}
        shape = len(self.shape.rows), self.shape.heads_kv
        values = {"k_descale": self.key_scale, "v_descale": self.value_scale}
        return {
            name: torch.tensor(value, device=self.device).expand(shape)
            for name, value in values.items()
        }

    @property
    def sequences(self) -> Sequences:
        """q, k and v of each request, as they count."""
        return [
            (q.float(), k.float() * self.key_scale, v.float() * self.value_scale)
            for q, k, v in super().sequences
        ]


def fp8(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Two planned calls over a KV cache in fp8, on one plan; outputs are bfloat16.

    They may be off by what rounding the weights to fp8 makes, as PyTorch computes it.
    """
    options = dict(options)
    batch = ScaledBatch(shape, setting.dtype, setting.device)
    batch.key_scale, batch.value_scale = options.pop("scales", (1.0, 1.0))
    plan, comparisons = batch.plan(setting.kernels, **options), []
    exact_options = float64_options(batch, options)
    rounded = {"dtype": torch.float32, "weights_dtype": setting.dtype}
    ways = [exact_options | {"dtype": torch.float64}, exact_options | rounded]
    for _ in range(2):
        result = setting.kernels.flash_attn_with_kvcache(
            **batch.arguments(**options), **batch.scales(), scheduler_metadata=plan
        )
        outputs: list[Tensor] = []
        for how in ways:
            parts = [attention(q, k, v, **how)[0] for q, k, v in batch.sequences]
            outputs.append(torch.cat(parts))
        seen = result.detach().cpu()
        comparisons.append(Comparison("output", seen, outputs[0], outputs[1], torch.bfloat16))
    return comparisons


# --- MLA ------------------------------------------------------------------------------------------


class Latent(Batch):
    """An MLA batch: a latent key head of 512 and a rotary part of 64, in SGLang's one buffer."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        super().__init__(
            replace(shape, heads_kv=1, dim=LATENT + ROPE, dim_v=1), dtype, device, seed
        )

    def arguments(self, **options: Any) -> dict[str, Any]:
        """Return arguments of an absorbed MLA call: ``q``, ``k_cache`` rotary, others latent."""
        both, buffer = torch.cat(self.q).to(self.device), self.cached(self.k)
        own = {"q": both[..., LATENT:], "qv": both[..., :LATENT]}
        caches = {"k_cache": buffer[..., LATENT:], "v_cache": buffer[..., :LATENT]}
        lengths = {
            "cache_seqlens": self.int32(self.shape.keys),
            "cu_seqlens_q": self.offsets(self.shape.rows),
        }
        fixed = {"max_seqlen_q": max(self.shape.rows), "softmax_scale": self.scale, "ver": 3}
        return own | caches | lengths | fixed | {"page_table": self.page_table} | options

    @property
    def sequences(self) -> Sequences:
        """q, k and v of each request: the values are the latent part of the keys."""
        return [(q, k, k[..., :LATENT]) for q, k in zip(self.q, self.k, strict=True)]


class Slots:
    """The place of MLA plans: slots of a workspace that kernels write, or returned tensors."""

    def __init__(self, kernels: FA3Kernels) -> None:
        self.kernels = kernels
        self._workspace: Tensor | None = None
        self._plans: dict[int, Any] = {}

    def metadata(self, batch: Latent, slot: int, *, reuse: bool = False, **options: Any) -> Any:
        """``scheduler_metadata`` for a call of ``batch`` whose plan is, or comes, in ``slot``."""
        if self.kernels.mla_plan_bytes is not None:
            return self._slot(batch.device, slot), reuse
        if not reuse:
            absorbed = Batch.__new__(Batch)
            vars(absorbed).update(
                vars(batch) | {"shape": replace(batch.shape, dim=ROPE, dim_v=LATENT)}
            )
            self._plans[slot] = absorbed.plan(self.kernels, **options)
        return self._plans[slot]

    def _slot(self, device: torch.device, slot: int, size: int = 1 << 18) -> Tensor:
        if self._workspace is None:
            self._workspace = torch.full((4 * size,), 255, dtype=torch.uint8, device=device)
        return self._workspace[slot * size : (slot + 1) * size]


def mla(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Absorbed MLA: planned, then once more on the same plan."""
    batch, slots, comparisons = (
        Latent(shape, setting.dtype, setting.device),
        Slots(setting.kernels),
        [],
    )
    for reuse in (False, True):
        plan = slots.metadata(batch, 0, reuse=reuse, **options)
        result = setting.kernels.flash_attn_with_kvcache(
            **batch.arguments(**options), scheduler_metadata=plan, return_softmax_lse=True
        )
        comparisons += compare(
            result, batch.sequences, setting.dtype, **float64_options(batch, options)
        )
    return comparisons


def mla_slots(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Plan two geometries in two slots, then reuse both: neither overwrites the other's plan."""
    other = replace(shape, rows=tuple(2 for _ in shape.rows), keys=shape.keys[::-1])
    batches = [
        Latent(each, setting.dtype, setting.device, seed)
        for seed, each in enumerate((shape, other))
    ]
    slots, comparisons = Slots(setting.kernels), []
    for reuse in (False, True):
        for slot, batch in enumerate(batches):
            plan = slots.metadata(batch, slot, reuse=reuse, **options)
            result = setting.kernels.flash_attn_with_kvcache(
                **batch.arguments(**options), scheduler_metadata=plan
            )
            comparisons += compare(
                result, batch.sequences, setting.dtype, **float64_options(batch, options)
            )
    return comparisons


def mla_cascade(setting: Setting, shape: Shape, options: dict[str, Any]) -> list[Comparison]:
    """Attend from MLA draft branches to prefix and suffixes, each call in a slot of its own."""
    topk, suffix = options["topk"], options["suffix"]
    batch = Latent(replace(shape, rows=(topk,) * len(shape.keys)), setting.dtype, setting.device)
    branches = len(shape.keys) * topk
    own = Latent(
        replace(shape, rows=(1,) * branches, keys=(suffix,) * branches),
        setting.dtype,
        setting.device,
        seed=1,
    )
    own.q = list(torch.split(torch.cat(batch.q), 1))
    slots, parts = Slots(setting.kernels), []
    for slot, each in enumerate((batch, own)):
        plan = slots.metadata(each, slot)
        result = setting.kernels.flash_attn_with_kvcache(
            **each.arguments(), scheduler_metadata=plan, return_softmax_lse=True
        )
        parts.append((result[0], result[1]))
    keys = [torch.cat([batch.k[i // topk], own.k[i]]) for i in range(branches)]
    sequences = [(own.q[i], keys[i], keys[i][..., :LATENT]) for i in range(branches)]
    return compare(merged(parts), sequences, setting.dtype, scale=batch.scale)


# --- the cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call, or a few that belong together."""

    name: str
    procedure: Procedure
    shape: Shape
    options: dict[str, Any] = field(default_factory=dict)


PREFILL = Shape((200, 77, 1), (200, 77, 1))
PREFIXED = Shape((64, 33, 5), (300, 33, 200))
DECODE = Shape((1, 1, 1, 1), (700, 5, 64, 129))
LONG = Shape((1,), (6000,), capacity=8192)
VERIFY = Shape((4, 4, 4), (300, 64, 7))
HITS = Shape((17, 15, 15, 15), (17, 73, 703, 3003), heads=16, heads_kv=4, dim=64, dim_v=64)
"""The rest of prompts that were found in the prefix cache. Kernels that bound the number of
splits by the average query in one place and by the longest in another have accumulators for 7 parts
of the longest keys, and plan 14.
"""
SHAPES = {
    "prefill": PREFILL,
    "chunked prefill with prefix": PREFIXED,
    "decode": DECODE,
    "verify of 4": VERIFY,
}
CAUSAL: dict[str, Any] = {"causal": True}
WINDOW: dict[str, Any] = {"causal": True, "window_size": (40, 0)}
SOFTCAP: dict[str, Any] = {"causal": True, "softcap": 2.0}
SINKS: dict[str, Any] = {"causal": True, "sinks": True}
LATENT_DECODE = Shape((1, 1, 1), (700, 10, 128), heads=16)


def cases() -> list[Case]:
    """Every case, for one dtype."""
    return [*_modes(), *_shapes(), *_special(), *_varlen(), *_mla()]


def _modes() -> Iterator[Case]:
    kinds: dict[str, dict[str, Any]] = {
        "": CAUSAL,
        ", window": WINDOW,
        ", softcap": SOFTCAP,
        ", sinks": SINKS,
    }
    kinds |= {", window and softcap": WINDOW | SOFTCAP, ", window and sinks": WINDOW | SINKS}
    for mode, shape in SHAPES.items():
        for kind, options in kinds.items():
            yield Case(mode + kind, paged, shape, options)
    yield Case("long decode with splits", paged, LONG, CAUSAL)
    yield Case("long decode with splits, softcap", paged, LONG, SOFTCAP)
    yield Case(
        "long and short decode", paged, replace(LONG, rows=(1, 1, 1), keys=(4000, 3, 64)), CAUSAL
    )
    yield Case("prefill, not causal", paged, PREFILL)
    yield Case("prefill, window on both sides", paged, PREFILL, {"window_size": (30, 20)})


def _shapes() -> Iterator[Case]:
    for mode in ("chunked prefill with prefix", "decode"):
        shape = SHAPES[mode]
        for heads, heads_kv, kind in ((8, 8, "MHA"), (14, 2, "GQA"), (8, 1, "MQA")):
            yield Case(
                f"{mode}, {kind} {heads}/{heads_kv}",
                paged,
                replace(shape, heads=heads, heads_kv=heads_kv),
                CAUSAL,
            )
        for dim, dim_v in ((64, 64), (96, 96), (192, 128), (256, 256)):
            yield Case(
                f"{mode}, head dim {dim}/{dim_v}",
                paged,
                replace(shape, dim=dim, dim_v=dim_v),
                CAUSAL,
            )
        for page in (1, 16, 128):
            yield Case(f"{mode}, page size {page}", paged, replace(shape, page=page), CAUSAL)


def _special() -> Iterator[Case]:
    for mode in ("chunked prefill with prefix", "decode"):
        yield Case(f"{mode}, strided page table", strided_table, SHAPES[mode], CAUSAL)
        yield Case(f"{mode}, one plan for two layers", second_layer, SHAPES[mode], CAUSAL)
        yield Case(f"{mode}, into a given output", into_given_output, SHAPES[mode], CAUSAL)
    yield Case("prefill of equal requests", paged, Shape((200, 200), (200, 200)), CAUSAL)
    yield Case(
        "chunked prefill of equal requests", paged, replace(PREFIXED, rows=(33, 33, 33)), CAUSAL
    )
    yield Case("prefix hits of unequal lengths", paged, HITS, CAUSAL)
    yield Case("decode of an empty request", paged, Shape((1, 1, 1), (100, 0, 64)), CAUSAL)
    branches = {"topk": 3, "suffix": 2}
    yield Case("cascade: prefix and suffix merged", cascade, Shape((1,), (300, 70)), branches)
    yield Case("cascade: long prefix", cascade, Shape((1,), (4000,), capacity=4096), branches)


def _varlen() -> Iterator[Case]:
    kinds: dict[str, dict[str, Any]] = {
        "causal": CAUSAL,
        "not causal": {},
        "window": WINDOW,
        "softcap": SOFTCAP,
        "sinks": SINKS,
    }
    for kind, options in kinds.items():
        yield Case(f"varlen, {kind}", varlen, PREFILL, options)
    yield Case("varlen, more keys than queries", varlen, PREFIXED, CAUSAL)
    yield Case("varlen, head dim 192/128", varlen, replace(PREFILL, heads_kv=8, dim=192), CAUSAL)


def _mla() -> Iterator[Case]:
    yield Case("MLA decode, planned and reused", mla, LATENT_DECODE, CAUSAL)
    yield Case("MLA decode, 128 heads", mla, replace(LATENT_DECODE, heads=128), CAUSAL)
    yield Case("MLA verify of 4", mla, replace(LATENT_DECODE, rows=(4, 4, 4)), CAUSAL)
    yield Case("MLA long decode", mla, Shape((1,), (5000,), heads=16, capacity=8192), CAUSAL)
    yield Case("MLA, two slots", mla_slots, LATENT_DECODE, CAUSAL)
    yield Case(
        "MLA cascade", mla_cascade, replace(LATENT_DECODE, keys=(300, 70)), {"topk": 3, "suffix": 2}
    )


def fp8_cases() -> list[Case]:
    """Every case over a KV cache in fp8."""
    kinds = {"": CAUSAL, ", window": WINDOW, ", softcap": SOFTCAP}
    cases = [
        Case(mode + kind, fp8, shape, options)
        for mode, shape in SHAPES.items()
        for kind, options in kinds.items()
    ]
    for mode, shape in SHAPES.items():
        cases.append(Case(f"{mode}, scales", fp8, shape, CAUSAL | {"scales": (0.5, 3.0)}))
    for dim in (64, 256):
        cases.append(Case(f"decode, head dim {dim}", fp8, replace(DECODE, dim=dim, dim_v=dim)))
    return [*cases, Case("long decode with splits", fp8, LONG, CAUSAL)]


def dtypes(kernels: FA3Kernels) -> list[torch.dtype]:
    """The dtypes that the kernels take, bfloat16 first."""
    return [
        dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype in kernels.dtypes
    ]


def named_cases(kernels: FA3Kernels, quick: bool) -> dict[str, tuple[Case, torch.dtype]]:
    """Every case by a name that says its dtype too; ``quick``: bfloat16 and fp8 alone."""
    chosen = dtypes(kernels)[: 1 if quick else None]
    named = {f"{_short(dtype)}: {case.name}": (case, dtype) for dtype in chosen for case in cases()}
    e4m3 = torch.float8_e4m3fn
    if e4m3 in kernels.dtypes:
        named |= {f"{_short(e4m3)}: {case.name}": (case, e4m3) for case in fp8_cases()}
    return named


def run_case(name: str, case: Case, setting: Setting) -> Outcome:
    """Return the outcome of one case; whatever it raises is an outcome too."""
    started = time.perf_counter()
    try:
        comparisons = case.procedure(setting, case.shape, case.options)
    except (UnsupportedKernelArgument, UnsupportedByKernels) as error:
        return Outcome(
            PART, name, SKIP, f"refused by name: {error}", {}, time.perf_counter() - started
        )
    except Exception as error:  # noqa: BLE001  # A case that raises is a result like any other.
        reason = f"{type(error).__name__}: {error}"
        return Outcome(PART, name, FAIL, reason[:2000], {}, time.perf_counter() - started)
    return judged(PART, name, comparisons, time.perf_counter() - started)


def judged(part: str, name: str, comparisons: Sequence[Comparison], seconds: float) -> Outcome:
    """Judge whether every comparison of a case is within its limit."""
    measured = [(each.error, each.allowed, each.what) for each in comparisons]
    error, allowed, what = max(measured, key=lambda each: each[0] / max(each[1], 1e-30))
    values = {"error": error, "allowed": allowed, "in": what}
    if all(error <= allowed for error, allowed, _ in measured):
        return Outcome(part, name, PASS, "", values, seconds)
    wrong = next(each for each in comparisons if not each.error <= each.allowed)
    return Outcome(part, name, FAIL, f"{wrong.what} is wrong: {_where(wrong)}", values, seconds)


def _where(wrong: Comparison) -> str:
    """Say which rows are wrong, and how."""
    if wrong.seen.shape != wrong.exact.shape:
        return f"its shape is {tuple(wrong.seen.shape)}, expected {tuple(wrong.exact.shape)}"
    off = ~((wrong.seen.double() - wrong.exact).abs() <= wrong.allowed) & ~(
        wrong.seen.double() == wrong.exact
    )
    rows = off.flatten(1).any(1) if wrong.what == "output" else off.any(0)
    first, unwritten = int(rows.nonzero()[0]), int(wrong.seen.isnan().sum())
    count = f"{int(rows.sum())} of {len(rows)} rows"
    return f"{count}, the first is {first}; {unwritten} values are NaN"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(options: argparse.Namespace, done: Collection[str], emit: Emit) -> None:
    """Run every case on the kernels that were asked for."""
    kernels, device = kernels_for(options)
    named = named_cases(kernels, options.quick)
    run_cases(
        (
            (name, functools.partial(run_case, name, case, Setting(kernels, device, dtype)))
            for name, (case, dtype) in named.items()
        ),
        device,
        done,
        emit,
    )
