"""A KV cache whose pages the ranks share out (``--enable-kv-cache-sharding``, from 0.5.22 on).

Upstream's own pool is a rank's part of the cache. It assembles each layer's prefix in a scratch
memory, to whose rows upstream's backend turns the page table. In place of the other rank, the
test's own record of keys and values answers what the pool gathers.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs
from tests.support import zigzag
from tests.support.backend import Model, Request, counted, upstream
from tests.support.layers import uniform_layers

pools: Any = pytest.importorskip(
    "sglang.srt.mem_cache.page_interleave_pool", reason="this SGLang shares out no KV cache"
)

PAGE = 64
LAYERS = 3


class Pool(pools.PageInterleaveMHATokenToKVPool):  # type: ignore[misc]
    """Notes which layer's prefix is being gathered."""

    gathered = 0

    def _gather_pairs(self, local_layer: int) -> Any:
        self.gathered = local_layer
        return super()._gather_pairs(local_layer)


class OtherRank:
    """Stands for the communicator through which the other rank sends its pages."""

    def __init__(self, model: Model, rank: int) -> None:
        self._model, self._rank = model, rank
        self.pages = 0
        """How many it has sent."""

    def change_state(self, enable: bool) -> Any:
        return contextlib.nullcontext()

    def all_gather(self, out: torch.Tensor, send: torch.Tensor) -> None:
        """Put the other rank's pages behind or before ``send``, where the pool expects them."""
        pool: Any = self._model.pool
        exact = self._model.exact
        (name,) = (
            name
            for slot in pool._slots
            for name, rows in slot.tensors.items()
            if rows.data_ptr() == out.data_ptr()
        )
        kept = getattr(exact, name)[pool.gathered]
        block = len(send) // PAGE
        theirs = (1 - self._rank) * block
        for page, place in enumerate(pool._page_pos.tolist()):
            if theirs <= place < theirs + block:
                out[place * PAGE : (place + 1) * PAGE] = kept[page * PAGE : (page + 1) * PAGE]
                self.pages += 1


def sharded(rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, OtherRank]:
    """Return a model whose cache is that of a rank of two, and the other rank."""
    model = Model(uniform_layers(LAYERS), context_len=512, table_rows=3)
    other = OtherRank(model, rank)
    monkeypatch.setattr(pools, "PyNcclCommunicator", lambda **_: other)
    # Pages that follow one another belong to the ranks in turn; the first two are for padding.
    used = torch.arange(2 * PAGE, 2 * PAGE + 2 * model.context_len, dtype=torch.int32)
    model.table[:] = 0
    model.table[:2] = used.view(2, -1)
    model.exact = type(model.exact)(
        model.layers, 2 * PAGE + len(used), torch.float64, False, torch.nan
    )
    first = model.layers[0]
    from sglang.srt.mem_cache.page_interleave import PageShardSpec

    model.pool = Pool(
        len(used), PAGE, model.dtype, first.tp_k_head_num, first.head_dim, LAYERS, "cpu", False,
        shard_spec=PageShardSpec(
            shard_rank=rank, shard_size=2, page_size=PAGE, max_prefix_tokens=1024,
            chunk_tokens=512,
        ),
        shard_group=SimpleNamespace(
            world_size=2, rank_in_group=rank, cpu_group=None, device=torch.device("cpu")
        ),
    )  # fmt: skip
    for buffer in (*model.pool.k_buffer, *model.pool.v_buffer):
        buffer.fill_(torch.nan)
    return model, other


def cached(model: Model, length: int) -> Request:
    """Return a request of which this rank has its part in the cache."""
    request = Request(model._free_rows.pop(0), length)
    for layer in model.layers if length else ():
        slots = model.slots(request, length)
        model.pool.set_kv_buffer(layer, slots, *model.hand_out(layer, slots))
    return request


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("raw", ["off", "on"])
def test_prefixes_are_read_where_they_were_assembled(
    rank: int, raw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with and without a prefix are right, over the cache and over raw keys, and all layers
    use one plan.
    """
    monkeypatch.setenv(envs.RAW_PREFILL, raw)
    model, other = sharded(rank, monkeypatch)
    backend = model.backend()
    new = [cached(model, 0), cached(model, 0)]
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(new, [4 * PAGE, PAGE]))
    assert (counts.calls, counts.plans) == (LAYERS, 0 if raw == "on" else 1)
    assert other.pages == 0
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(new, [40, 70]))
    assert (counts.plans, counts.reuses) == (1, LAYERS - 1)
    assert other.pages > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_context_parallel_ranks_share_the_cache_out(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's two pieces of a prompt attend to a prefix of which it has every second page."""
    monkeypatch.setenv(envs.RAW_PREFILL, "off")
    model, other = sharded(rank, monkeypatch)
    step = model.extend([cached(model, 4 * PAGE)], [80])
    zigzag.take_part(step, 20, rank)
    backend = model.backend()
    backend.attn_cp_size = 2
    for name, value in zigzag.stand_ins().items():
        monkeypatch.setattr(upstream, name, value)
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.plans, counts.reuses) == (2, 2 * LAYERS - 2)
    assert other.pages > 0
