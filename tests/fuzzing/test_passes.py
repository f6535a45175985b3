"""Random sequences of passes on upstream's backend: right output and own plans, in any order.

Here hypothesis chooses the sequences, from a fixed seed, and makes a failing one small;
``scripts/soak`` runs the same operations for as long as one likes.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.fuzzing.generation import EDGES, HAS_ENCODERS, random_case
from tests.fuzzing.oracle import InjectedFault, KernelWatch, Mismatch, Totals, require_own_plan
from tests.fuzzing.passes import Lane, Operation, World, case_from, run_case
from tests.support.backend import (
    Model,
    attention_layer,
    dispatch,
    mla_layer,
    recorded,
    replace_kernels,
)

PICKS = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
COUNTS = st.lists(st.sampled_from(EDGES) | st.integers(0, 40), min_size=1, max_size=3).map(tuple)
LAYER = {"heads": 4, "kv_heads": 2, "head_dim": 16}
WINDOW = LAYER | {"sliding_window_size": 40}
LANES: dict[str, tuple[Lane, ...]] = {
    "like layers": (Lane((LAYER, LAYER, LAYER)),),
    "windows": (Lane((LAYER, WINDOW, WINDOW), window=40, window_pages=True),),
    "latent": (Lane(({"heads": 4}, {"heads": 4}), mla=True, topk=1),),
    "tree of drafts": (Lane(({"heads": 4}, {"heads": 2}), mla=True, topk=2, drafts=True),),
    "tree": (Lane((LAYER, LAYER | {"heads": 8}), topk=2),),
    "two models": (Lane((LAYER, LAYER), topk=1), Lane((LAYER | {"heads": 8},) * 3, topk=1)),
    "cross attention": (
        Lane(
            (LAYER, LAYER | {"is_cross_attention": True}),
            page_size=1,
            context_len=256,
            encoder=True,
        ),
    ),
    "context parallel": (Lane((LAYER, LAYER), ranks=2), Lane((LAYER,), seed=3)),
    "fp8": (Lane((LAYER, WINDOW), window=40, fp8=True, scales=(0.5, 2.0)),),
    "inference": (Lane((LAYER, LAYER), inference_mode=True), Lane((LAYER,), seed=1)),
}
ONE_PASS = (
    "decode", "prefill", "extend", "mixed", "verify", "draft extend", "padded", "interleaved",
    "threads",
)  # fmt: skip
OTHER = (
    "draft", "replay", "again", "fault", "finish", "idle", "reload", "one shot", "prefix chunks",
)  # fmt: skip
CASES = sorted(Path(__file__).with_name("cases").glob("*.json"))
"""Small cases that went wrong once, in this package or in a copy that was broken on purpose."""


@pytest.fixture(scope="module", autouse=True)
def leaves_no_backend() -> Iterator[None]:
    """Collect backends that are cycles of references, and so free their workspace slots."""
    yield
    gc.collect()


class Serving(RuleBasedStateMachine):
    """A server's life, as a machine of hypothesis."""

    lanes: tuple[Lane, ...]

    @initialize(counts=COUNTS)
    def start(self, counts: tuple[int, ...]) -> None:
        """Build the backends, and have some requests."""
        self.world = World(self.lanes, Totals())
        for lane in range(len(self.lanes)):
            self.world.apply(Operation("prefill", lane, (1, 2), (*counts, 70)))

    @rule(
        kind=st.sampled_from(ONE_PASS), lane=st.integers(0, 1), picks=PICKS, counts=COUNTS,
        layers=st.sampled_from((0, 0, 0, 1)),
    )  # fmt: skip
    def run_pass(
        self, kind: str, lane: int, picks: tuple[int, ...], counts: tuple[int, ...], layers: int
    ) -> None:
        """A pass, or several at once, whole or cut short."""
        self.world.apply(Operation(kind, lane, picks, counts, layers))

    @rule(kind=st.sampled_from(OTHER), lane=st.integers(0, 1), picks=PICKS, counts=COUNTS)
    def do(self, kind: str, lane: int, picks: tuple[int, ...], counts: tuple[int, ...]) -> None:
        """Something that is no single pass."""
        self.world.apply(Operation(kind, lane, picks, counts, 1))

    def teardown(self) -> None:
        """End the threads."""
        if hasattr(self, "world"):
            self.world.__exit__()


@pytest.mark.parametrize("lanes", LANES)
def test_any_sequence_of_passes_is_right(lanes: str) -> None:
    """Whatever comes after whatever: every output is float64's, every plan is its own call's."""
    if LANES[lanes][0].encoder and not HAS_ENCODERS:
        pytest.skip("this SGLang serves one request with an encoder at a time")

    class Machine(Serving):
        pass

    Machine.lanes = LANES[lanes]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=6, stateful_step_count=16, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_random_cases_are_right(seed: int) -> None:
    """Cases as ``scripts/soak`` generates them, over models of every kind."""
    totals = run_case(random_case(seed, operations=25))
    assert totals.outputs > 0


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case_that_went_wrong_stays_right(path: Path) -> None:
    """The smallest one of its kind, as ``scripts/soak`` wrote it; its ``error`` says of what."""
    case = case_from(json.loads(path.read_text()))
    if any(lane.encoder for lane in case.lanes) and not HAS_ENCODERS:
        pytest.skip("this SGLang serves one request with an encoder at a time")
    assert run_case(case).calls > 0


# --- the oracle itself ----------------------------------------------------------------------------


def test_the_same_seed_is_the_same_case() -> None:
    """So that a seed in a report can be run again."""
    assert random_case(7) == random_case(7)
    assert random_case(7) != random_case(8)


def test_a_wrong_output_is_noticed() -> None:
    """One value of one row off by a thousandth of the largest."""
    with World((Lane((LAYER,)),), Totals()) as world:

        def wrap(name: str, function: Any) -> Any:
            def call(**arguments: Any) -> Any:
                out = function(**arguments)
                return out if name != "flash_attn_with_kvcache" else _bent(out)

            return call

        replace_kernels(world.served[0].backend, wrap)
        with pytest.raises(Mismatch, match=r"output of layer 0 is off by .* EXTEND, 1 requests"):
            world.apply(Operation("prefill", 0, (1,), (9,)))


def _bent(out: torch.Tensor) -> torch.Tensor:
    out[-1, -1] += 1e-3 * out.abs().max()
    return out


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_another_calls_plan_is_noticed_though_the_output_is_right(mla: bool) -> None:
    """A plan of other lengths under the same capacity launches all that is combined."""
    layers = [mla_layer(0), mla_layer(1)] if mla else [attention_layer(i) for i in range(2)]
    model = Model(layers, mla=mla)
    backend = model.backend()
    calls = recorded(backend)
    model.run_pass(backend, model.decode(model.requests(300, 5)))
    first, second = [call.arguments for call in calls if call.name == "flash_attn_with_kvcache"]
    require_own_plan(first)
    require_own_plan(second)
    second["cache_seqlens"] = second["cache_seqlens"].flip(0)
    with pytest.raises(Mismatch, match="another plan than its own"):
        require_own_plan(second)


def test_calls_that_need_no_adapter_are_counted_too() -> None:
    """On Hopper a call whose names the library has goes to the library's own function."""
    model, watch = Model([attention_layer(0), attention_layer(1)]), KernelWatch(Totals())
    backend, reached = model.backend(), []
    adapted = backend._kernels.flash_attn_with_kvcache
    # The library takes its arguments by position, too.
    names = dispatch._PAGED
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def unadapted(*tensors: Any, **arguments: Any) -> Any:
        reached.append(arguments)
        return adapted(**dict(zip(names, tensors, strict=False)), **arguments)

    parameters = [inspect.Parameter(name, kind) for name in names]
    unadapted.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    backend._kernels = dataclasses.replace(backend._kernels, unadapted=unadapted)
    watch.serve(backend)
    model.run_pass(backend, model.decode(model.requests(5)))
    assert (len(reached), watch.totals.calls) == (2, 2)


def test_a_kernel_fails_where_it_is_told_to() -> None:
    """Once, at the call that was named, and not again."""
    model = Model([attention_layer(0)])
    backend, watch = model.backend(), KernelWatch(Totals(), fails_in=2)
    watch.serve(backend)
    requests = model.requests(5)
    model.run_pass(backend, model.decode(requests))
    with pytest.raises(InjectedFault):
        model.run_pass(backend, model.decode(requests))
    model.run_pass(backend, model.decode(model.requests(7)))
    assert watch.totals.calls == 3
