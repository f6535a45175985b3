"""Graph capture: every graph computes its plans itself, from the buffers that replay refills;
nothing leaks in or out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch

from sglang_musa_ext import envs, policy
from tests.support.backend import (
    Draft,
    ForwardMode,
    Model,
    Step,
    attention_layer,
    counted,
    mla_layer,
    upstream,
)
from tests.support.graphs import CpuGraphs, GraphRunner

Tensor = torch.Tensor


MODELS: dict[str, Callable[[], Model]] = {
    "mha": lambda: Model(list(map(attention_layer, range(2))), context_len=2048),
    "mla": lambda: Model(list(map(mla_layer, range(2))), mla=True, context_len=1024),
    "hybrid": lambda: Model(list(map(attention_layer, (3, 7))), context_len=2048),
}
SIZES = (4, 2, 1)


@pytest.fixture
def graphs() -> CpuGraphs:
    """The way to capture."""
    return CpuGraphs()


def captured(
    model: Model, graphs: CpuGraphs, sizes: Sequence[int] = SIZES, tokens: int = 1
) -> GraphRunner:
    """A runner with its graphs captured."""
    backend = model.backend()
    graphs.serve(backend)
    return GraphRunner(model, backend, graphs, sizes, tokens)


# --- cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_graphs_from_large_to_small_replay_right(kind: str, graphs: CpuGraphs) -> None:
    """Every graph works from its own plan, in any order of replays and with lengths of any kind."""
    model = MODELS[kind]()
    runner = captured(model, graphs)
    long = 900 if model.mla else 1900
    requests = model.requests(5, long, 64, 300)
    for chosen in (requests, requests[:2], requests[1:2], requests[2:], requests, requests[3:]):
        runner.replay(model.decode(chosen))


@pytest.mark.parametrize("kind", ["mha", "hybrid"])
def test_each_graph_contains_its_plan_from_static_buffers(kind: str, graphs: CpuGraphs) -> None:
    """One plan a graph, computed inside it before its use, from lengths that replay refills."""
    runner = captured(MODELS[kind](), graphs)
    seen = set()
    for size, graph in runner.graphs.items():
        plan, *calls = graph.kernels()
        assert plan.name == "get_scheduler_metadata"
        assert [call.name for call in calls] == ["flash_attn_with_kvcache"] * 2
        assert all(call.kwargs["scheduler_metadata"] is plan.result for call in calls)
        assert plan.kwargs["batch_size"] == size
        assert plan.kwargs["cache_seqlens"] is calls[0].kwargs["cache_seqlens"]
        seen.add(plan.result.data_ptr())
    assert len(seen) == len(SIZES)


def test_each_graph_of_an_mla_model_writes_its_plan_once(graphs: CpuGraphs) -> None:
    """The first layer of each graph plans into the slot, the others reuse what it wrote."""
    runner = captured(MODELS["mla"](), graphs)
    for graph in runner.graphs.values():
        assert [call.kwargs["scheduler_metadata"][1] for call in graph.kernels()] == [False, True]


@pytest.mark.parametrize("kind", ["mha", "hybrid"])
def test_replay_at_long_context_is_split(kind: str, graphs: CpuGraphs) -> None:
    """A graph captured with lengths 1 has room for splits, used once contexts are long."""
    model = MODELS[kind]()
    runner = captured(model, graphs, sizes=(1,))
    [plan] = runner.graphs[1].kernels("get_scheduler_metadata")
    assert plan.kwargs["max_seqlen_k"] == model.context_len
    short, long = model.requests(5, 1900)
    runner.replay(model.decode([short]))
    assert plan.result[0] == 1
    runner.replay(model.decode([long]))
    assert plan.result[0] > 1


@pytest.mark.parametrize("window_pages", [False, True], ids=["one pool", "window pool"])
def test_window_and_full_layers_have_plans_of_their_own_in_a_graph(
    window_pages: bool, graphs: CpuGraphs
) -> None:
    """Every graph has two plans for two geometries, also with window layers on their own pages."""
    layers = [attention_layer(i, sliding_window_size=40 if i % 2 else -1) for i in range(4)]
    model = Model(layers, window=40, window_pages=window_pages, context_len=1024)
    runner = captured(model, graphs, sizes=(2, 1))
    for graph in runner.graphs.values():
        assert len(graph.kernels("get_scheduler_metadata")) == 2
    requests = model.requests(900, 7)
    runner.replay(model.decode(requests))
    runner.replay(model.decode(requests[:1]))


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_target_verify_in_graphs(kind: str, graphs: CpuGraphs) -> None:
    """Verify of four draft tokens a request, captured and replayed."""
    arguments = {
        "speculative_algorithm": "EAGLE",
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    model = MODELS[kind]()
    model.arguments = arguments
    runner = captured(model, graphs, sizes=(2, 1), tokens=4)
    requests = model.requests(800, 7)
    runner.replay(model.verify(requests, 4))
    runner.replay(model.verify(requests[:1], 4))


@pytest.mark.skipif(
    not hasattr(upstream, "draft_extend_set_metadata"),
    reason="this SGLang prepares every graph's metadata outside of it",
)
def test_draft_extend_prepares_its_metadata_inside_the_graph(
    graphs: CpuGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of the graph writes draft-extend's lengths and pages; its plan comes after that."""
    model = MODELS["mha"]()
    model.arguments = {
        "speculative_algorithm": "EAGLE",
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    backend = model.backend(skip_prefill=False)
    graphs.serve(backend)
    name = "draft_extend_set_metadata"
    monkeypatch.setattr(upstream, name, graphs.as_kernel(name, getattr(upstream, name)))
    backend.init_cuda_graph_state(2, 8)
    step = _draft_extend(model, 5, 5)
    inputs = [model.inputs(step, layer) for layer in model.layers]

    def run() -> list[Tensor]:
        backend.init_forward_metadata_in_graph(step.batch)
        return [
            model.forward(backend, step, *pair) for pair in zip(model.layers, inputs, strict=True)
        ]

    backend.init_forward_metadata_out_graph(step.batch, in_capture=True)
    for _ in range(2):
        run()
        backend.on_after_cuda_graph_warmup()
    graph, outputs = graphs.capture(run)
    assert [kernel.name for kernel in graph.kernels()] == ["get_scheduler_metadata"] + [
        "flash_attn_with_kvcache"
    ] * 2
    later = _draft_extend(model, 1500, 64)
    for what in ("seq_lens", "req_pool_indices", "extend_seq_lens", "out_cache_loc"):
        getattr(step.batch, what).copy_(getattr(later.batch, what))
    for layer, buffers in zip(model.layers, inputs, strict=True):
        for name, value in model.inputs(later, layer).items():
            cast(Tensor, buffers[name]).copy_(cast(Tensor, value))
    graph.replay()
    for layer, buffers, output in zip(model.layers, inputs, outputs, strict=True):
        model.require(output, later, layer, buffers)


def _draft_extend(model: Model, *lengths: int) -> Step:
    """A draft model's reading of four tokens for each of new requests."""
    step = model.extend(model.requests(*lengths), [4] * len(lengths), ForwardMode.DRAFT_EXTEND_V2)
    step.batch.spec_info = Draft(
        num_tokens_per_req=4, num_accepted_tokens=None, num_accepted_tokens_cpu=None
    )
    return step


@pytest.mark.parametrize("kind", MODELS)
def test_eager_passes_between_replays(kind: str, graphs: CpuGraphs) -> None:
    """Prefill runs between replays of graphs on the same backend; neither disturbs the other."""
    model = MODELS[kind]()
    runner = captured(model, graphs, sizes=(2, 1))
    first, second = model.request(0), model.request(600)
    model.run_pass(runner.backend, model.extend([first], [100]))
    runner.replay(model.decode([first, second]))
    model.run_pass(runner.backend, model.extend([first], [30]))
    runner.replay(model.decode([second]))
    model.run_pass(runner.backend, model.decode([first, second]))
    runner.replay(model.decode([first, second]))


def test_a_capture_takes_no_plan_from_before_it(graphs: CpuGraphs) -> None:
    """An eager layer's plan is not for the captured layer that comes next in the pass."""
    model, backend, step = _eager_pass(graphs)
    model.check(backend, step, model.layers[0])
    inputs = model.inputs(step, model.layers[1])
    graph, out = graphs.capture(lambda: model.forward(backend, step, model.layers[1], inputs))
    model.require(out, step, model.layers[1], inputs)
    assert len(graph.kernels("get_scheduler_metadata")) == 1


def test_a_capture_leaves_no_plan_behind(graphs: CpuGraphs) -> None:
    """An eager layer plans for itself after a captured one, whose plan exists only at replay."""
    model, backend, step = _eager_pass(graphs)
    inputs = model.inputs(step, model.layers[0])
    graphs.capture(lambda: model.forward(backend, step, model.layers[0], inputs))
    with counted(backend) as counts:
        model.check(backend, step, model.layers[1])
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 0)


def test_two_captures_in_a_row_share_no_plan(graphs: CpuGraphs) -> None:
    """Two graphs captured one after the other, for two layers of one pass, replay by themselves."""
    model, backend, step = _eager_pass(graphs)
    made = []
    for layer in model.layers:
        inputs = model.inputs(step, layer)
        graph, _ = graphs.capture(partial(model.forward, backend, step, layer, inputs))
        made.append(graph)
        getattr(backend, "on_after_cuda_graph_warmup", backend._plans.end_pass)()
    assert [len(graph.kernels("get_scheduler_metadata")) for graph in made] == [1, 1]


def test_another_stream_computes_its_own_plan(graphs: CpuGraphs) -> None:
    """Work on another stream may run before the plan of the first one is there."""
    model, backend, step = _eager_pass(graphs)
    with counted(backend) as counts:
        model.check(backend, step, model.layers[0])
        graphs.stream = 1
        model.check(backend, step, model.layers[1])
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 0)


def _eager_pass(graphs: CpuGraphs) -> tuple[Model, Any, Step]:
    """A model, its backend, and a decode step whose metadata is ready."""
    model = MODELS["mha"]()
    backend = model.backend()
    graphs.serve(backend)
    step = model.decode(model.requests(300, 5))
    backend.init_forward_metadata(step.batch)
    return model, backend, step


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_checks_do_not_disturb_a_capture(
    kind: str, graphs: CpuGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture compares nothing, since that waits for the device; its graph is the same."""
    monkeypatch.setenv(envs.CHECK, "metadata")
    model = MODELS[kind]()
    runner = captured(model, graphs, sizes=(2, 1))
    expected = 2 if model.mla else 3
    assert [len(graph.kernels()) for graph in runner.graphs.values()] == [expected] * 2
    runner.replay(model.decode(model.requests(300, 5)))


def test_force_update_plans_every_layer_of_a_graph(
    graphs: CpuGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's switch holds inside captures."""
    monkeypatch.setenv(envs.FORCE_UPDATE_METADATA, "1")
    model = MODELS["mha"]()
    runner = captured(model, graphs, sizes=(2,))
    assert len(runner.graphs[2].kernels("get_scheduler_metadata")) == 2
    runner.replay(model.decode(model.requests(1900, 5)))


def test_captures_leave_no_more_than_one_pass_in_the_cache(graphs: CpuGraphs) -> None:
    """A graph keeps its own plan alive; the backend holds those of the last pass alone."""
    runner = captured(MODELS["mha"](), graphs, sizes=range(1, 9))
    assert len(runner.backend._plans.current.plans) == 1
    plans = [graph.kernels("get_scheduler_metadata")[0].result for graph in runner.graphs.values()]
    vectors = [policy.mate_plan_vector(policy.NEWEST_MATE, size) for size in runner.graphs]
    sizes = [4 * vector for vector in vectors]
    assert [plan.numel() for plan in plans] == sizes


def test_graphs_of_an_mla_model_share_one_slot(graphs: CpuGraphs) -> None:
    """From large to small, all graphs plan into one slot, so memory does not grow with graphs."""
    runner = captured(MODELS["mla"](), graphs, sizes=range(1, 9))
    assert runner.backend.musa_fa3_report()["held"]["mla_slots"] == 1
    addresses = {
        call.kwargs["scheduler_metadata"][0].data_ptr()
        for g in runner.graphs.values()
        for call in g.kernels()
    }
    assert len(addresses) == 1


# --- the stand-in itself --------------------------------------------------------------------------


def test_the_stand_in_replays_on_changed_buffers() -> None:
    """A captured operation runs again on what its tensors hold now, and writes where it wrote."""
    graphs, static = CpuGraphs(), torch.ones(3)
    graph, (double, view) = graphs.capture(lambda: (static.clone().mul_(2), static.view(3, 1) + 1))
    static.fill_(10)
    graph.replay()
    assert double.tolist() == [20, 20, 20]
    assert view.flatten().tolist() == [11, 11, 11]


def test_the_stand_in_forbids_reading_on_the_host() -> None:
    """As a device does."""
    with pytest.raises(AssertionError, match="read on the host"):
        CpuGraphs().capture(lambda: torch.ones(1).item())
