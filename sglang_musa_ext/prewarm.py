"""The command ``sglang-musa-ext prewarm``: have MATE compile a model's kernels before a request.

MATE compiles most kernels when they are first called, and keeps them on disk. This command makes
the calls that a server of the model will make, over a few tokens: MATE compiles for head
dimensions, the ratio of heads, query tiles, masks, options and each 31 requests of a batch, not for
lengths. It goes through the same functions as a server, so that it fits every release;
``mate.jit.prewarm_modules`` wants the parameters of one release's templates instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_musa_ext import policy

if TYPE_CHECKING:
    import torch

    from sglang_musa_ext.kernels.provider import FA3Kernels

CACHE_DTYPES = {
    "auto": "bfloat16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
}
"""PyTorch's names of what ``--kv-cache-dtype`` may say here."""
QUERY_TILES = (32, 64, 128, 192, 256)
"""Rows that MATE has query tiles for."""
PACKED_ROWS = 256
"""Up to so many query rows a key head, MATE packs query heads into tiles."""
PLAN_GROUP, MOST_GROUPS = 31, 32
"""MATE plans with a warp for each 31 requests, and 32 warps at most."""
CAPACITY = 8192
"""Keys that a call's table has room for, at least: a server's has room for contexts that are split.
"""


@dataclass(frozen=True)
class LayerKind:
    """The attributes of attention layers of one kind that kernels depend on."""

    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    has_sinks: bool = False
    dtype: str = "bfloat16"
    """PyTorch's name of the type of the KV cache, and so of the queries."""


class Call(NamedTuple):
    """One call to make."""

    kind: LayerKind
    batch_size: int
    max_seqlen_q: int
    over_raw_keys: bool = False
    has_plan: bool = False
    """False for a call that is not split, which a server makes without a plan."""

    def __str__(self) -> str:
        where = "raw keys" if self.over_raw_keys else "paged cache"
        where += ", planned" if self.has_plan else ""
        kind = self.kind
        return (
            f"{where}, {kind.dtype}, heads {kind.num_heads_q}/{kind.num_heads_kv}, head dimensions "
            f"{kind.headdim}/{kind.headdim_v}, window {kind.window_size[0]}, {self.batch_size} "
            f"requests of {self.max_seqlen_q} queries"
        )


class UnknownModel(ValueError):
    """A model's ``config.json`` does not say what its attention layers are."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 some call failed, 2 it cannot."""
    options = _parser().parse_args(arguments)
    try:
        config = json.loads((options.model / "config.json").read_text())
        kinds = layer_kinds(config, options.tp, CACHE_DTYPES[options.kv_cache_dtype])
        kernels, device = _kernels()
        _require(kernels, kinds)
    except (OSError, ValueError, ImportError) as error:
        print(f"Nothing was compiled: {error}", file=sys.stderr)
        return 2
    failed = 0
    for call in calls(kinds, options.max_running_requests):
        started = time.perf_counter()
        try:
            make(kernels, device, call)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            failed += 1
            print(f"failed: {call}: {type(error).__name__}: {error}")
            continue
        print(f"{time.perf_counter() - started:8.2f} s  {call}", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext prewarm",
        description="Have MATE compile the kernels that a model needs, before its first request.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder with config.json")
    parser.add_argument("--tp", type=int, default=1, help="the server's --tp-size (default: 1)")
    parser.add_argument(
        "--max-running-requests", type=int, default=256, help="the server's (default: 256)"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="the server's; auto is taken for bfloat16 (default: auto)",
    )
    return parser


def _kernels() -> tuple[FA3Kernels, torch.device]:
    import torch

    from sglang_musa_ext.envs import Settings
    from sglang_musa_ext.kernels.provider import select_kernels

    settings = Settings.from_environ()
    kind = policy.DEVICE_OF_KERNELS.get(settings.kernels, "musa")
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)
    return select_kernels(settings, device), device


def _require(kernels: FA3Kernels, kinds: list[LayerKind]) -> None:
    """Refuse layers that the kernels cannot serve, as a server's start does."""
    import torch

    kernels.require(
        page_size=policy.PAGE_SIZE,
        kv_cache_dtype=getattr(torch, kinds[0].dtype),
        use_mla=False,
        head_dims=[(kind.headdim, kind.headdim_v) for kind in kinds],
    )


# --- which calls ----------------------------------------------------------------------------------


def layer_kinds(config: dict[str, Any], tp: int, dtype: str = "bfloat16") -> list[LayerKind]:
    """Read the kinds of attention layers off a model's ``config.json``.

    Args:
        config: its contents; a model of several modalities has its text part in ``text_config``.
        tp: the number of ranks that heads are shared out to.
        dtype: of the KV cache, as PyTorch names it.

    Raises:
        UnknownModel: it has MLA, whose kernels MATE compiled in advance, or lacks head counts.
    """
    text = config.get("text_config") or config
    if text.get("kv_lora_rank"):
        raise UnknownModel("MATE's MLA kernels are compiled in advance: there is nothing to do.")
    heads = text.get("num_attention_heads")
    if not heads:
        raise UnknownModel("config.json has no num_attention_heads; is this a text model?")
    headdim = text.get("head_dim") or text["hidden_size"] // heads
    heads_kv = text.get("num_key_value_heads") or heads
    full = LayerKind(
        num_heads_q=heads // tp,
        num_heads_kv=max(heads_kv // tp, 1),
        headdim=headdim,
        headdim_v=text.get("v_head_dim") or headdim,
        softcap=text.get("attn_logit_softcapping") or 0.0,
        has_sinks="GptOss" in "".join(config.get("architectures") or ()),
        dtype=dtype,
    )
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return [full]
    return [full, replace(full, window_size=(window - 1, 0))]


def calls(kinds: list[LayerKind], largest_batch: int) -> Iterator[Call]:
    """List the calls that make MATE compile all that these layers need.

    Decode plans once for every 31 requests; prefill has a query tile for each range of rows. No
    layer's own keys are fp8, so that a server with such a cache makes no calls over them.
    """
    groups = min(-(-largest_batch // PLAN_GROUP), MOST_GROUPS)
    for kind in kinds:
        for group in range(1, groups + 1):
            yield Call(kind, min(group * PLAN_GROUP, largest_batch), 1, has_plan=True)
        yield Call(kind, 1, 1, has_plan=True)
        yield Call(kind, 1, 1)
        for rows in _query_rows(kind.num_heads_q // kind.num_heads_kv):
            yield Call(kind, 1, rows, has_plan=True)
            yield Call(kind, 1, rows)
            if kind.dtype in policy.HALF_DTYPES:
                yield Call(kind, 1, rows, over_raw_keys=True)


def _query_rows(ratio: int) -> list[int]:
    """Return a ``max_seqlen_q`` for each query tile, of packed heads and of others."""
    packed = [rows // ratio for rows in QUERY_TILES if rows >= ratio]
    smallest = PACKED_ROWS // ratio + 1
    others = [max(rows, smallest) for rows in (*QUERY_TILES, 2 * PACKED_ROWS)]
    return sorted({*packed, *others} - {0})


# --- making them ----------------------------------------------------------------------------------


def make(kernels: FA3Kernels, device: torch.device, call: Call) -> None:
    """Make one call, with its plan, over as many keys as it has queries, and wait for it."""
    if call.over_raw_keys:
        _attend_raw_keys(kernels, device, call)
    else:
        _attend_cache(kernels, device, call)
    _wait(device)


def _attend_raw_keys(kernels: FA3Kernels, device: torch.device, call: Call) -> None:
    import torch

    kind, rows = call.kind, call.max_seqlen_q
    offsets = torch.tensor([0, rows], dtype=torch.int32, device=device)
    kernels.flash_attn_varlen_func(
        q=_zeros(device, kind, rows, kind.num_heads_q, kind.headdim),
        k=_zeros(device, kind, rows, kind.num_heads_kv, kind.headdim),
        v=_zeros(device, kind, rows, kind.num_heads_kv, kind.headdim_v),
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=rows,
        max_seqlen_k=rows,
        **_options(device, kind),
    )


def _attend_cache(kernels: FA3Kernels, device: torch.device, call: Call) -> None:
    import torch

    kind, batch, rows = call.kind, call.batch_size, call.max_seqlen_q
    pages, held = _capacity(call), -(-rows // policy.PAGE_SIZE)
    table = torch.arange(pages, dtype=torch.int32, device=device) % held
    lengths = torch.full((batch,), rows, dtype=torch.int32, device=device)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
    arguments: dict[str, Any] = dict(
        q=_zeros(device, kind, batch * rows, kind.num_heads_q, kind.headdim),
        k_cache=_zeros(device, kind, held, policy.PAGE_SIZE, kind.num_heads_kv, kind.headdim),
        v_cache=_zeros(device, kind, held, policy.PAGE_SIZE, kind.num_heads_kv, kind.headdim_v),
        page_table=table.repeat(batch, 1),
        cache_seqlens=lengths,
        cu_seqlens_q=offsets,
        max_seqlen_q=rows,
        **_options(device, kind),
    )
    if call.has_plan and not kernels.drops_plan(arguments):
        arguments["scheduler_metadata"] = kernels.get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=rows,
            max_seqlen_k=pages * policy.PAGE_SIZE,
            num_heads_q=kind.num_heads_q,
            num_heads_kv=kind.num_heads_kv,
            headdim=kind.headdim,
            headdim_v=kind.headdim_v,
            qkv_dtype=arguments["q"].dtype,
            cache_seqlens=lengths,
            cu_seqlens_q=offsets,
            causal=True,
            window_size=kind.window_size,
        )
    kernels.flash_attn_with_kvcache(**arguments)


def _capacity(call: Call) -> int:
    """Return the pages of a call's table. MATE forgets a window as long as the table's keys."""
    keys = max(call.max_seqlen_q, call.kind.window_size[0] + 2, CAPACITY)
    return -(-keys // policy.PAGE_SIZE)


def _options(device: torch.device, kind: LayerKind) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        causal=True, window_size=kind.window_size, softcap=kind.softcap, return_softmax_lse=False
    )
    if kind.has_sinks:
        options["sinks"] = _zeros(device, replace(kind, dtype="bfloat16"), kind.num_heads_q)
    return options


def _zeros(device: torch.device, kind: LayerKind, *shape: int) -> torch.Tensor:
    import torch

    return torch.zeros(shape, dtype=getattr(torch, kind.dtype), device=device)


def _wait(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
