"""Scheduler metadata of the reference; what a plan of another call does shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_musa_ext.kernels.mate import plan_contents
from sglang_musa_ext.kernels.reference import (
    KernelRefusal,
    planning,
)
from tests.support.paged_batch import (
    Batch,
    assert_attention,
    int32,
)


def test_metadata_layout() -> None:
    """Four vectors: splits, batches by falling work, query tiles, heads in L2."""
    batch = Batch([1, 1, 1], [64, 1500, 700])
    plan = batch.plan()
    assert plan.dtype == torch.int32
    splits, table, tiles, nheads = plan_contents(plan, 3).tolist()
    assert sorted(table) == [0, 1, 2]
    assert table[-1] == 0
    assert tiles == [1, 1, 1]
    assert splits[table.index(1)] > splits[table.index(0)] == 1
    assert all(1 <= count <= 2 for count in nheads)


@pytest.mark.parametrize(
    ("rows", "ratio", "dims", "query", "packed"),
    [
        (1, 8, (128, 128), 32, True),
        (9, 4, (64, 64), 64, True),
        (20, 4, (128, 128), 128, True),
        (48, 4, (192, 128), 192, True),
        (64, 4, (128, 128), 256, True),
        (65, 4, (128, 128), 128, False),
        (5000, 1, (128, 128), 256, False),
        (64, 4, (256, 256), 32, True),
        (65, 4, (256, 256), 192, False),
        (65, 4, (320, 320), 64, False),
        (65, 4, (512, 512), 32, False),
    ],
)
def test_tile_shapes(
    rows: int, ratio: int, dims: tuple[int, int], query: int, packed: bool
) -> None:
    """Query tiles follow rows and heads up to 256, then rows; large heads have fixed tiles."""
    assert planning.tile_shape(rows, ratio, *dims) == planning.TileShape(query, 64, packed)


def test_what_metadata_does_not_depend_on() -> None:
    """Page size, dtype and softcap leave the plan as it is."""
    batch = Batch([1, 1], [1500, 64])
    other = batch.plan(page_size=16, qkv_dtype=torch.float16, has_softcap=True)
    assert torch.equal(plan_contents(batch.plan(), 2), plan_contents(other, 2))


def test_four_key_tiles_are_never_split() -> None:
    """256 keys are one split, 257 may be more."""
    assert Batch([1], [256]).plan()[0] == 1
    assert Batch([1], [257]).plan()[0] > 1


def test_splits_stay_within_the_multiprocessors() -> None:
    """A batch's planned splits outnumber the multiprocessors at most by its requests."""
    batch = Batch([1] * 20, [1300] * 20, heads=1, heads_kv=1)
    splits = batch.plan()[:20]
    assert splits.sum() <= planning.MULTIPROCESSORS
    assert splits.max() > 1


def unequal_rows(swapped: bool) -> Batch:
    return Batch([1, 300] if swapped else [300, 1], [310, 310])


def assert_shows(batch: Batch, plan: Tensor, **options: Any) -> None:
    """The plan gives an error or NaN rows; without it, or with its own, the batch has none."""
    own = {name: options[name] for name in ("window_size",) if name in options}
    assert batch.call(**options, scheduler_metadata=batch.plan(**own))[0].isfinite().all()
    try:
        out, _ = batch.call(**options, scheduler_metadata=plan)
    except KernelRefusal:
        return
    assert out.isnan().any()


@pytest.mark.parametrize(
    ("foreign", "batch", "options"),
    [
        pytest.param(Batch([1], [2000]).plan, Batch([1], [200]), {}, id="more keys and capacity"),
        pytest.param(
            Batch([1, 1], [310, 310]).plan,
            unequal_rows(False),
            {},
            id="decode's plan for a prefill",
        ),
        pytest.param(unequal_rows(True).plan, unequal_rows(False), {}, id="another batch order"),
        pytest.param(
            Batch([1], [2000]).plan,
            Batch([1], [2000]),
            {"window_size": (63, 0)},
            id="another window",
        ),
        pytest.param(
            Batch([1] * 4, [400] * 4, heads_kv=1).plan,
            Batch([1] * 4, [400] * 4, heads=16, heads_kv=16),
            {},
            id="other head counts",
        ),
        pytest.param(
            Batch([60], [60], heads_kv=4, dim=256, dim_v=256).plan,
            Batch([60], [60], heads_kv=1, dim=256, dim_v=256),
            {},
            id="another head ratio",
        ),
        pytest.param(
            Batch([60], [60], dim=64, dim_v=64).plan,
            Batch([60], [60], dim=512, dim_v=512),
            {},
            id="other head dims",
        ),
        pytest.param(Batch([1], [900]).plan, Batch([1, 1], [900, 900]), {}, id="a smaller batch"),
        pytest.param(
            Batch([1] * 5, [900] * 5).plan, Batch([1, 1], [900, 900]), {}, id="a larger batch"
        ),
    ],
)
def test_a_foreign_plan_shows(foreign: Any, batch: Batch, options: dict[str, Any]) -> None:
    """A plan of another geometry gives NaN rows or an error, never a quiet wrong answer."""
    assert_shows(batch, foreign(), **options)


def test_a_plan_for_larger_tiles_shows() -> None:
    """A plan for a larger ``max_seqlen_q`` counts larger tiles and so leaves rows out."""
    batch = Batch([60, 9], [60, 9], heads=4, heads_kv=1, dim=256, dim_v=256)
    assert_shows(batch, batch.plan(max_seqlen_q=300))


def test_a_plan_for_a_smaller_capacity_loses_its_splits() -> None:
    """A plan bounded by one key, as a graph capture might make it, is right but never splits."""
    batch = Batch([1], [2000])
    plan = batch.plan(max_seqlen_k=1)
    assert plan[0] == 1
    assert_attention(batch, batch.call(scheduler_metadata=plan))


def test_too_small_a_max_seqlen_q_leaves_rows_unwritten() -> None:
    """Without a plan, too, only the tiles that ``max_seqlen_q`` calls for are run."""
    batch = Batch([300], [300])
    out, _ = batch.call(max_seqlen_q=1)
    assert out[16:].isnan().all()
    assert out[:16].isfinite().all()


def test_tiles_follow_the_batch_table() -> None:
    """Positions are not batches: the plan's tiles belong to the batch that the table names."""
    batch = Batch([1, 300], [30, 310])
    plan = batch.plan()
    table = plan_contents(plan, 2)[1]
    assert table.tolist() == [1, 0]
    assert_attention(batch, batch.call(scheduler_metadata=plan))
    table.copy_(int32([0, 1]))
    assert batch.call(scheduler_metadata=plan)[0].isnan().any()


def test_stale_lengths_within_the_same_bounds_are_harmless() -> None:
    """Key lengths choose splits alone; the forward reads its own, and the output is right."""
    batch = Batch([1, 1], [1500, 64])
    stale = batch.plan(cache_seqlens=int32([64, 1500]))
    assert_attention(batch, batch.call(scheduler_metadata=stale))


def test_a_good_plan_writes_every_row() -> None:
    """Over many random geometries a plan made for the call leaves no NaN."""
    generator = torch.Generator().manual_seed(7)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for seed in range(40):
        size = pick(1, 2, 5)
        rows = [1] * size if pick(True, False) else [pick(0, 1, 3, 40, 270) for _ in range(size)]
        keys = [count + pick(0, 1, 64, 300, 900) for count in rows]
        heads_kv, dim = pick(1, 2), pick(64, 80, 128, 256, 512)
        batch = Batch(
            rows,
            keys,
            heads_kv * pick(1, 3, 8),
            heads_kv,
            dim,
            dim,
            pick(16, 64),
            pick(0, 40),
            seed=seed,
        )
        mask = dict(causal=pick(True, False), window_size=pick((-1, -1), (100, 0), (5, 5)))
        mask |= dict(num_splits=pick(0, 0, 1, 3))
        if sum(rows):
            out, lse = batch.call(**mask, scheduler_metadata=batch.plan(**mask))
            assert not out.isnan().any(), (seed, batch.rows, batch.keys)
            assert not lse.isnan().any(), (seed, batch.rows, batch.keys)
