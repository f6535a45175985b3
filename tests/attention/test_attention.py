"""The composed backend over upstream's real one: right output, and one plan a geometry and pass, in
every mode.

Each expected count of plans is derived by hand from the layers of its test.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention.plans import MLAWorkspace, MLAWorkspaceExhausted
from sglang_musa_ext.kernels import provider as kernels
from tests.support.backend import (
    AttentionType,
    Draft,
    ForwardMode,
    Model,
    Queries,
    Request,
    Step,
    attention,
    attention_layer,
    counted,
    dense_attention,
    mla_layer,
    recorded,
    replace_kernels,
    upstream,
)

WINDOW = 40
FORWARD_PARAMETERS = inspect.signature(upstream.FlashAttentionBackend.forward_extend).parameters


def needs_keyword(name: str) -> pytest.MarkDecorator:
    """Skip a test where this release's forwards have no such keyword."""
    return pytest.mark.skipif(
        name not in FORWARD_PARAMETERS, reason=f"this SGLang has no {name}= in its forwards"
    )


def uniform_layers(count: int = 3, **options: Any) -> list[Any]:
    """Layers that are all alike."""
    return [attention_layer(index, **options) for index in range(count)]


def mla_model(layers: int = 2, **options: Any) -> Model:
    """A small model with multi-head latent attention."""
    return Model([mla_layer(index) for index in range(layers)], mla=True, **options)


# --- plans of a pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_decode_of_uniform_layers_computes_one_plan_a_pass(mla: bool) -> None:
    """Three like layers share one plan; the next token's pass computes its own."""
    model = mla_model(3) if mla else Model(uniform_layers())
    backend, requests = model.backend(), model.requests(100, 5, 300)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
        model.run_pass(backend, model.decode(requests))
    assert (counts.passes, counts.planned_calls, counts.plans, counts.reuses) == (2, 6, 2, 4)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("prefixes", [(0, 0), (64, 0), (100, 30)])
def test_prefill_is_right_with_and_without_prefix(mla: bool, prefixes: tuple[int, ...]) -> None:
    """Requests of a prefill batch may or may not have cached tokens; layers share the plan in any
    case.
    """
    model = mla_model() if mla else Model(uniform_layers(2))
    backend = model.backend()
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(model.requests(*prefixes), [70, 9]))
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 1)


def test_prefill_and_decode_alternate() -> None:
    """Nothing of a pass remains in the next one, whatever its mode and batch."""
    model = Model(uniform_layers(2))
    backend = model.backend()
    first, second = model.request(0), model.request(0)
    with counted(backend) as counts:
        model.run_pass(backend, model.extend([first], [200]))
        model.run_pass(backend, model.decode([first]))
        model.run_pass(backend, model.extend([second], [30]))
        model.run_pass(backend, model.decode([first, second]))
        model.run_pass(backend, model.extend([second], [90]))
    assert (counts.passes, counts.plans, counts.reuses) == (5, 5, 5)


def test_long_context_decode_is_split() -> None:
    """One request with many keys: its plan has more than one split, and the result is still right."""
    model = Model(uniform_layers(2), context_len=2048)
    backend = model.backend()
    calls = recorded(backend)
    model.run_pass(backend, model.decode(model.requests(1500)))
    plans = [call.result for call in calls if call.name == "get_scheduler_metadata"]
    assert len(plans) == 1
    assert plans[0][0] > 1


@pytest.mark.parametrize("window_pages", [False, True], ids=["one pool", "window pool"])
@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("order", ["full first", "window first"])
def test_window_layers_and_full_layers_have_plans_of_their_own(
    mode: str, order: str, window_pages: bool
) -> None:
    """A plan made for one window is not used under another, in whichever order the layers come.

    With a pool of their own, upstream translates the page table of window layers.
    """
    windows = [-1, WINDOW, -1, WINDOW] if order == "full first" else [WINDOW, -1, WINDOW, -1]
    layers = [attention_layer(i, sliding_window_size=window) for i, window in enumerate(windows)]
    model = Model(layers, window=WINDOW, window_pages=window_pages, context_len=1024)
    backend, requests = model.backend(), model.requests(900, 3)
    assert backend.use_sliding_window_kv_pool is window_pages
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 2)


@pytest.mark.skipif(
    "prefill_aware_swa" not in inspect.getsource(upstream),
    reason="this SGLang has no prefill-aware windows",
)
def test_prefill_aware_windows() -> None:
    """Decode sees the whole prompt and a window of what came after: a shorter page table with its
    own lengths.
    """
    model = Model(uniform_layers(2), page_size=1, window=WINDOW, context_len=256)
    attention.install_kernel_dispatch()
    runner = model.runner()
    runner.prefill_aware_swa = True
    backend = attention.MusaFA3Backend(runner)
    requests, prompts = model.requests(0, 0), [100, 9]
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(requests, prompts))
        for _ in range(WINDOW + 10):
            step = model.decode(requests)
            for queries, prompt in zip(step.queries, prompts, strict=True):
                keys = torch.arange(len(queries.slots))
                narrow = (keys < prompt) | (keys >= len(keys) - WINDOW)
                queries.mask = narrow[None]
            model.run_pass(backend, step)
    assert not narrow.all()
    assert (counts.passes, counts.plans, counts.reuses) == (51, 51, 51)


@pytest.mark.parametrize(
    ("shapes", "plans"),
    [
        pytest.param([(8, 2, 64), (8, 2, 256), (8, 2, 64), (8, 2, 256)], 2, id="head dim"),
        pytest.param([(4, 2, 64), (16, 2, 64), (4, 2, 64)], 2, id="query heads"),
        pytest.param([(8, 8, 64), (8, 1, 64), (8, 8, 64)], 2, id="key heads"),
        pytest.param([(8, 2, 64), (8, 2, 512), (8, 1, 256)], 3, id="all at once"),
    ],
)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_layers_of_different_shapes_have_plans_of_their_own(
    shapes: list[tuple[int, int, int]], plans: int, mode: str
) -> None:
    """Layers whose heads or head dimensions differ, as Gemma-4's do, never share a plan."""
    layers = [attention_layer(i, *shape) for i, shape in enumerate(shapes)]
    model = Model(layers, context_len=1024)
    backend, requests = model.backend(), model.requests(700, 20)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [130, 40])
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.passes, counts.plans, counts.reuses) == (1, plans, len(shapes) - plans)


def test_layers_with_another_value_head_dim_have_plans_of_their_own() -> None:
    """Keys of 192 with values of 128, beside keys and values of 192."""
    layers = [attention_layer(0, head_dim=192, v_head_dim=128), attention_layer(1, head_dim=192)]
    model = Model(layers, context_len=1024)
    backend = model.backend()
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(model.requests(700, 20)))
    assert counts.plans == 2


def test_chunked_local_layers_then_a_global_one() -> None:
    """Llama-4: local layers run on virtual batches, so their plan fits no global layer, nor the
    reverse.
    """
    layers = [attention_layer(i, use_irope=i % 2 == 0) for i in range(4)]
    # Up to 0.5.19 upstream's virtual batches take token slots for pages, which is right for pages
    # of one token alone.
    source = inspect.getsource(sys.modules[upstream.FlashAttentionBackend.__module__])
    paged = "local_attn_builder" in source or "[:, :: self.page_size] // self.page_size" in source
    model = Model(layers, chunk=128, page_size=64 if paged else 1)
    backend = model.backend()
    requests = model.requests(0, 0)
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(requests, [300, 40]))
        model.run_pass(backend, model.decode(requests))
    assert (counts.passes, counts.plans, counts.reuses) == (2, 4, 4)


def test_first_attention_layer_need_not_be_layer_0() -> None:
    """Hybrid models: passes are told apart though no layer 0 announces them, and whatever the
    interval.
    """
    model = Model([attention_layer(index) for index in (3, 4, 9)])
    backend, requests = model.backend(), model.requests(100, 5, 300)
    with counted(backend) as counts:
        for _ in range(3):
            model.run_pass(backend, model.decode(requests))
            requests = requests[:-1] or requests
    assert (counts.passes, counts.plans, counts.reuses) == (3, 3, 6)


def test_mixed_kernels_of_one_pass_do_not_disturb_its_plan() -> None:
    """A layer over raw keys and values takes no plan and leaves the others' alone."""
    model = mla_model()
    backend, requests = model.backend(), model.requests(64)
    step = model.extend(requests, [20])
    backend.init_forward_metadata(step.batch)
    model.check(backend, step, model.layers[0])
    with counted(backend) as counts:
        _one_shot_prefill(model, backend, step)
        model.check(backend, step, model.layers[1])
    assert (counts.calls, counts.planned_calls, counts.plans, counts.reuses) == (2, 1, 0, 1)


def _one_shot_prefill(model: Model, backend: Any, step: Step) -> None:
    """MLA's prefill over decompressed keys and values, which upstream runs on the varlen kernel."""
    layer = attention_layer(7, 4, 4, 192, v_head_dim=128)
    tokens = step.rows
    shapes = [(tokens, layer.tp_q_head_num * 192), (tokens, 4, 192), (tokens, 4, 128)]
    q, k, v = (model.normal(*shape) for shape in shapes)
    fields = {"attn_attend_prefix_cache": False, "mha_return_lse": False, "mha_one_shot": False}
    for name, value in fields.items():
        setattr(step.batch, name, value)
    out = backend.forward_extend(q, k, v, layer, step.batch, save_kv_cache=False)
    step.batch.attn_attend_prefix_cache = None
    truth = Model([layer])
    truth.truth.k[7][:tokens], truth.truth.v[7][:tokens] = k.double(), v.double()
    alone = Step(step.batch, [Queries(torch.arange(tokens), torch.arange(tokens))])
    truth.require(out, alone, layer, {"q": q})


def test_chunked_prefix_of_mla_returns_its_log_sum_exp() -> None:
    """MLA's prefill in pieces: new keys, then prefix keys, each with a log-sum-exp to merge by;
    none takes a plan.
    """
    model = mla_model(1)
    backend = model.backend()
    step = model.extend(model.requests(90, 20), [30, 7])
    backend.init_forward_metadata(step.batch)
    layer = attention_layer(7, 4, 4, 192, v_head_dim=128)
    fields = {
        "mha_return_lse": True, "mha_one_shot": False, "prefix_chunk_idx": 0,
        "prefix_chunk_cu_seq_lens": torch.tensor([[0, 90, 110]], dtype=torch.int32), "prefix_chunk_max_seq_lens": [90],
    }  # fmt: skip
    vars(step.batch).update(fields)
    rows, prefixes = [30, 7], [90, 20]
    q = model.normal(37, 4 * 192)
    with counted(backend) as counts:
        for prefix, keys in ((False, rows), (True, prefixes)):
            step.batch.attn_attend_prefix_cache = prefix
            k, v = model.normal(sum(keys), 4, 192), model.normal(sum(keys), 4, 128)
            result = backend.forward_extend(q, k, v, layer, step.batch, save_kv_cache=False)
            _require_pieces(result, layer, q, k, v, rows, keys, causal=not prefix)
    assert (counts.calls, counts.planned_calls, counts.plans) == (2, 0, 0)


def _require_pieces(
    result: Any, layer: Any, q: Any, k: Any, v: Any, rows: list[int], keys: list[int], causal: bool
) -> None:
    """Output and log-sum-exp of attention over the requests' own raw keys, against float64."""
    parts = [
        tensor.double().split(sizes)
        for tensor, sizes in ((q.view(-1, 4, 192), rows), (k, keys), (v, keys))
    ]
    wanted = []
    for queries, piece, values in zip(*parts, strict=True):
        visible = torch.ones(len(queries), len(piece), dtype=torch.bool)
        wanted.append(
            dense_attention(
                queries, piece, values, visible.tril() if causal else visible, layer.scaling
            )
        )
    for got, exact in zip(result, map(torch.cat, zip(*wanted, strict=True)), strict=True):
        torch.testing.assert_close(got.view(exact.shape).double(), exact, rtol=1e-5, atol=1e-5)


# --- data-parallel attention ----------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_passes_of_a_rank_of_data_parallel_attention(mla: bool) -> None:
    """Batches padded to another rank's size, passes in which this rank is idle, and batches of
    other sizes.

    A padded batch has more requests in its metadata than it has real ones, with rows that nobody
    reads. The plan is computed from the very tensors that the call passes, so it covers them.
    """
    model = mla_model(table_rows=8) if mla else Model(uniform_layers(2), table_rows=8)
    backend, requests = model.backend(), model.requests(300, 5, 64)
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE, batch_size=0)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
        # An idle rank runs its layers without attention, as RadixAttention's backend does for an
        # idle batch.
        for layer in model.layers:
            backend.forward(model.normal(0, 4 * layer.head_dim), None, None, layer, idle)
        model.run_pass(backend, _padded(model, requests[:1], 4))
        model.run_pass(backend, model.decode(requests[1:]))
        model.run_pass(backend, _padded(model, requests, 4))
    assert (counts.passes, counts.plans, counts.reuses) == (4, 4, 4)


def _padded(model: Model, requests: list[Request], size: int) -> Step:
    """A decode step with requests of length 1 behind the real ones, as upstream pads a batch."""
    return model.decode([*requests, *model.requests(*[0] * (size - len(requests)))])


# --- what a pass is -------------------------------------------------------------------------------


def test_passes_that_reuse_one_metadata_object_are_passes_of_their_own() -> None:
    """A graph's warm-up runs and its capture share metadata and batch; each computes its own plan."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(100, 5)
    step = model.decode(requests)
    with counted(backend) as counts:
        model.run_pass(backend, step)
        for _ in range(2):
            for layer in model.layers:
                model.check(backend, step, layer)
    assert (counts.passes, counts.plans, counts.reuses) == (3, 3, 3)


def test_the_same_layer_object_twice_is_right() -> None:
    """A layer that a model runs twice in a pass costs a second plan and gives no wrong output."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(100, 5)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests), [model.layers[0]] * 2)
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 0)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_metadata_rewritten_in_place_after_an_init_method(inference_mode: bool, mla: bool) -> None:
    """Upstream may refill its tensors for the next pass while batch and metadata objects stay the
    same.

    The second pass runs another layer than the first, so that nothing but the method tells them
    apart; and under ``inference_mode`` tensors count no versions.
    """
    model = mla_model() if mla else Model(uniform_layers(2), context_len=2048)
    with torch.inference_mode(inference_mode):
        backend = model.backend()
        short, long = model.requests(5, 500 if mla else 1500)
        step = model.decode([short])
        backend.init_forward_metadata(step.batch)
        before = backend.forward_metadata
        width = before.page_table.shape[1]
        later = model.decode([long])
        with counted(backend) as counts:
            _widen(backend, model)
            model.check(backend, step, model.layers[0])
            _refill(backend, step, later, model)
            model.check(backend, step, model.layers[1])
    assert backend.forward_metadata is before
    assert before.page_table.shape[1] > width
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 0)


def _widen(backend: Any, model: Model) -> None:
    """Give the metadata a page table of the full context, as a graph's static one has."""
    metadata = backend.forward_metadata
    table = torch.zeros(
        metadata.page_table.shape[0], model.context_len // model.page_size, dtype=torch.int32
    )
    table[:, : metadata.page_table.shape[1]] = metadata.page_table
    metadata.page_table = table


def _refill(backend: Any, step: Step, later: Step, model: Model) -> None:
    """Put the lengths and pages of ``later`` into the tensors of ``step``, within a method that
    prepares metadata.
    """
    metadata = backend.forward_metadata
    metadata.cache_seqlens_int32.copy_(later.batch.seq_lens)
    pages = model.table[later.batch.req_pool_indices] // model.page_size
    metadata.page_table.copy_(pages[:, :: model.page_size])
    step.batch.out_cache_loc.copy_(later.batch.out_cache_loc)
    step.queries = later.queries
    prepare = getattr(backend, "on_after_cuda_graph_warmup", None)
    if prepare is None:
        backend._plans.end_pass()
    else:
        prepare()


def test_every_init_method_of_this_release_ends_the_pass() -> None:
    """Each method of upstream's backend that prepares metadata, by its name, voids the plans there
    are.
    """
    named = {
        name
        for name in dir(upstream.FlashAttentionBackend)
        if name.startswith("init_forward_metadata")
    }
    assert named <= set(attention.PASS_METHODS)
    backend = Model(uniform_layers(1)).backend()
    for name in attention.PASS_METHODS:
        if not hasattr(upstream.FlashAttentionBackend, name):
            assert not hasattr(backend, name)
            continue
        backend._plans._ended = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upstream.FlashAttentionBackend, name, lambda *_, **__: None)
            getattr(backend, name)()
        assert backend._plans._ended, name


def test_the_batch_alone_tells_passes_apart() -> None:
    """Another forward batch under the same metadata object, as a pipeline's micro-batches may be."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(100, 5)
    step = model.decode(requests)
    model.run_pass(backend, step, model.layers[:1])
    with counted(backend) as counts:
        model.check(backend, Step(_copy_of(step.batch), step.queries), model.layers[1])
    assert (counts.passes, counts.plans) == (1, 1)


def test_the_metadata_object_alone_tells_passes_apart() -> None:
    """Other metadata under the same batch, set without one of the methods that prepare it."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(100, 5)
    step = model.decode(requests)
    model.run_pass(backend, step, model.layers[:1])
    backend.forward_metadata = _copy_of(backend.forward_metadata)
    with counted(backend) as counts:
        model.check(backend, step, model.layers[1])
    assert (counts.passes, counts.plans) == (1, 1)


def _copy_of(thing: Any) -> Any:
    """Another object with the same contents."""
    other = object.__new__(type(thing))
    vars(other).update(vars(thing))
    return other


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_everything_runs_under_inference_mode(mla: bool) -> None:
    """Upstream serves under ``inference_mode``, whose tensors have no version counter."""
    model = mla_model() if mla else Model(uniform_layers(2))
    with torch.inference_mode():
        backend = model.backend()
        requests = model.requests(0, 0)
        with counted(backend) as counts:
            model.run_pass(backend, model.extend(requests, [70, 9]))
            for _ in range(3):
                model.run_pass(backend, model.decode(requests))
    assert (counts.passes, counts.plans, counts.reuses) == (4, 4, 4)


# --- speculative decoding -------------------------------------------------------------------------


def draft_of(model: Model, steps: int = 4, topk: int = 1) -> Any:
    """Our multi-step draft backend over a one-layer draft model with the page size of ``model``."""
    layers = [mla_layer(0)] if model.mla else uniform_layers(1, heads=2, kv_heads=1)
    draft = Model(
        layers,
        mla=model.mla,
        draft_worker=True,
        arguments=model.arguments,
        context_len=model.context_len,
    )
    return draft, attention.MusaFA3MultiStepDraftBackend(draft.runner(), topk, steps)


SPEC = {
    "speculative_algorithm": "EAGLE",
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("mode", ["verify", "chunked prefill"])
def test_target_verify_after_draft_backend_exists(mla: bool, mode: str) -> None:
    """The backend built last, a draft model's, has no part in what the target model's computes."""
    model = mla_model(arguments=SPEC) if mla else Model(uniform_layers(2), arguments=SPEC)
    backend = model.backend()
    draft_model, draft = draft_of(model)
    requests, draft_requests = model.requests(100, 5, 300), draft_model.requests(7)
    drafting = draft_model.draft_decode(draft_requests, 0)
    draft.init_forward_metadata(drafting.batch)
    draft_model.check(draft.attn_backends[0], drafting, draft_model.layers[0])
    with counted(backend) as counts:
        step = (
            model.verify(requests, 4) if mode == "verify" else model.extend(requests, [70, 1, 20])
        )
        model.run_pass(backend, step)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 1)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_multi_step_draft_decodes_with_backends_of_ours(mla: bool) -> None:
    """Three draft steps of a chain, each on its own child, each a pass with a plan of its own."""
    arguments = SPEC
    model = (
        mla_model(1, arguments=arguments) if mla else Model(uniform_layers(1), arguments=arguments)
    )
    attention.install_kernel_dispatch()
    draft: Any = attention.MusaFA3MultiStepDraftBackend(model.runner(), 1, 4)
    assert [type(child) for child in draft.attn_backends] == [attention.MusaFA3Backend] * 3
    children: list[Any] = draft.attn_backends
    assert getattr(draft, "attn_backend_list", children) is children
    requests = model.requests(100, 63)
    draft.init_forward_metadata(model.draft_decode(requests, 0).batch)
    for step, child in enumerate(children):
        made = model.draft_decode(requests, step)
        with counted(child) as counts:
            model.check(child, made, model.layers[0])
        assert (counts.passes, counts.plans) == (1, 1)


TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
TOPK = {**SPEC, "speculative_eagle_topk": 2}


def test_mha_cascade_verify_with_topk_above_one() -> None:
    """Verify of a draft tree: prefix and tree are two calls a layer, each with a plan that all
    layers share.
    """
    model = Model(uniform_layers(3), arguments=TOPK)
    backend, requests = model.backend(), model.requests(100, 5, 300)
    with counted(backend) as counts:
        model.run_pass(backend, model.verify(requests, 4, [TREE, TREE.flip(0).flip(1).T, TREE]))
    assert (counts.passes, counts.planned_calls, counts.plans, counts.reuses) == (1, 6, 2, 4)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("step", [0, 2])
def test_cascade_draft_decode_keeps_prefix_and_suffix_apart(mla: bool, step: int) -> None:
    """Draft of a tree: two calls a layer; MLA plans, written in place, must not overwrite one
    another.
    """
    model = (
        mla_model(3, table_rows=10, arguments=TOPK, draft_worker=True)
        if mla
        else Model(uniform_layers(3), table_rows=10, arguments=TOPK)
    )
    attention.install_kernel_dispatch()
    draft = attention.MusaFA3MultiStepDraftBackend(model.runner(), 2, 4)
    made = model.draft_tree(model.requests(300, 70), topk=2, steps=4, step=step)
    draft.init_forward_metadata(made.batch)
    model.enter_step(made)
    child = draft.attn_backends[step]
    with counted(child) as counts:
        for layer in model.layers:
            model.check(child, made, layer)
    assert (counts.passes, counts.planned_calls, counts.plans, counts.reuses) == (1, 6, 2, 4)


def test_a_tree_over_pages_of_a_latent_cache_is_refused() -> None:
    """Upstream's verify of an MLA model passes a table of tokens for one of pages, so only chains
    can be verified.
    """
    with pytest.raises(
        kernels.UnsupportedByKernels, match=r"--speculative-eagle-topk 2 .* --page-size 64"
    ):
        mla_model(1, arguments=TOPK).backend()


def test_draft_extend_without_lengths_on_the_host() -> None:
    """Draft-extend v2: upstream's overlap scheduler leaves the host copies of the lengths unset."""
    # From 0.5.16 on upstream takes the number of draft tokens where there are no lengths on the
    # host.
    if "GPU-only" not in inspect.getsource(upstream.FlashAttentionBackend.init_forward_metadata):
        pytest.skip("this SGLang reads the host copies of the lengths")
    model = Model(uniform_layers(1), arguments=SPEC)
    backend, requests = model.backend(skip_prefill=False), model.requests(100, 5, 300)
    step = model.extend(requests, [4, 4, 4], ForwardMode.DRAFT_EXTEND_V2)
    step.batch.spec_info = Draft(
        num_tokens_per_req=4, num_accepted_tokens=None, num_accepted_tokens_cpu=None
    )
    step.batch.extend_prefix_lens_cpu = step.batch.extend_seq_lens_cpu = None
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.passes, counts.plans) == (1, 1)


# --- two-batch overlap, draft and target, threads -------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_two_batch_overlap_with_unequal_halves(mla: bool, mode: str) -> None:
    """Children interleave layer by layer, on batches of other sizes, and keep their own plans."""
    from importlib import import_module

    model = mla_model(3) if mla else Model(uniform_layers())
    attention.install_kernel_dispatch()
    overlap = import_module("sglang.srt.layers.attention.tbo_backend").TboAttnBackend
    # Up to some releases the constructor reads nothing of the primary, later ones its pools.
    whole = overlap.init_new(lambda: attention.MusaFA3Backend(model.runner()))
    assert {type(one) for one in (whole.primary, *whole.children)} == {attention.MusaFA3Backend}
    halves = [model.requests(300, 5, 40), model.requests(120)]
    new = [[20, 3, 70], [9]]
    steps = [
        model.decode(half) if mode == "decode" else model.extend(half, count)
        for half, count in zip(halves, new, strict=True)
    ]
    for child, step in zip(whole.children, steps, strict=True):
        child.init_forward_metadata(step.batch)
    with counted(whole.children[0]) as first, counted(whole.children[1]) as second:
        for layer in model.layers:
            for child, step in zip(whole.children, steps, strict=True):
                model.check(child, step, layer)
    for counts in (first, second):
        assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 2)


@pytest.fixture
def often_switching() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("often_switching")
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_two_models_in_two_threads(mla: bool) -> None:
    """Two engines of one process, layer by layer at the same time: neither sees the other's plan or
    kernels.
    """
    models = (
        [mla_model(4, seed=1), mla_model(4, seed=2)]
        if mla
        else [Model(uniform_layers(4, heads=heads)) for heads in (4, 8)]
    )
    work = [(model, model.backend(), model.decode(model.requests(*lengths)))
            for model, lengths in zip(models, [(100, 5, 300), (400,)], strict=True)]  # fmt: skip
    barrier = threading.Barrier(2, timeout=30)
    for _, backend, _ in work:
        _meet_inside_kernels(backend, barrier)
    counts = _in_threads([partial(_count_pass, *one) for one in work])
    assert [(one.plans, one.reuses) for one in counts] == [(1, 3), (1, 3)]


def _meet_inside_kernels(backend: Any, barrier: threading.Barrier) -> None:
    """Make each forward of ``backend`` wait, before its kernel call, for a forward of the other
    thread.
    """
    prepare = backend._plans.begin_layer

    def begin_layer(*arguments: Any) -> None:
        prepare(*arguments)
        barrier.wait()

    backend._plans.begin_layer = begin_layer
    buffers = backend.token_to_kv_pool if hasattr(backend, "token_to_kv_pool") else None
    if buffers is None:
        return
    for name in ("get_kv_buffer", "get_key_buffer"):
        setattr(buffers, name, _after_meeting(getattr(buffers, name), barrier))


def _after_meeting(function: Callable[..., Any], barrier: threading.Barrier) -> Callable[..., Any]:
    def met(*arguments: Any) -> Any:
        barrier.wait()
        return function(*arguments)

    return met


def _count_pass(model: Model, backend: Any, step: Step) -> Any:
    with counted(backend) as counts:
        model.run_pass(backend, step)
    return counts


def _in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of ``jobs``, each run in a thread of its own; raises what one of them raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


# --- kinds of attention ---------------------------------------------------------------------------


BIDIRECTIONAL = {"attn_type": AttentionType.DECODER_BIDIRECTIONAL}
needs_both_ways = pytest.mark.skipif(
    "DECODER_BIDIRECTIONAL" not in inspect.getsource(upstream),
    reason="this SGLang's decoders look back alone",
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sliding_window_size": WINDOW}, id="window"),
        pytest.param({"logit_cap": 3.0}, id="softcap"),
        pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, id="encoder-only"),
        pytest.param({"sliding_window_size": WINDOW, "logit_cap": 3.0}, id="window and softcap"),
        pytest.param(BIDIRECTIONAL, id="bidirectional decoder", marks=needs_both_ways),
        pytest.param(
            BIDIRECTIONAL | {"sliding_window_size": WINDOW},
            id="bidirectional window",
            marks=needs_both_ways,
        ),
    ],
)
@pytest.mark.parametrize("mode", ["decode", "prefill without prefix", "prefill with prefix"])
def test_mask_and_softcap_reach_the_kernels(options: dict[str, Any], mode: str) -> None:
    """Windows, softcap and encoder-only attention act in prefill without a prefix as in every other
    mode.
    """
    if mode == "decode" and options.get("attn_type") == AttentionType.ENCODER_ONLY:
        pytest.skip("encoder-only layers do not decode")
    model = Model(uniform_layers(2, **options), window=options.get("sliding_window_size"))
    backend = model.backend()
    requests = model.requests(0, 0) if mode == "prefill without prefix" else model.requests(200, 20)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [150, 60])
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.plans, counts.reuses) == (1, 1)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_causal_and_full_layers_have_plans_of_their_own(mode: str) -> None:
    """A causal layer and one that sees all keys, in one pass."""
    layers = [
        attention_layer(0),
        attention_layer(1, attn_type=AttentionType.ENCODER_ONLY),
        attention_layer(2),
    ]
    model = Model(layers, context_len=1024)
    backend, requests = model.backend(), model.requests(500, 3)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [150, 60])
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert (counts.plans, counts.reuses) == (2, 1)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_layers_that_share_keys_and_values(mode: str) -> None:
    """Gemma-3n's later layers have no keys of their own: ``k`` is None, and the cache of another
    layer is read.
    """
    model = Model([attention_layer(0), attention_layer(1), attention_layer(1)])
    backend, requests = model.backend(), model.requests(100, 0)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [40, 90])
    backend.init_forward_metadata(step.batch)
    with counted(backend) as counts:
        for layer, shared in zip(model.layers, (False, False, True), strict=True):
            model.check(backend, step, layer, share_kv=shared)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 2)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_cross_attention_beside_self_attention(mode: str) -> None:
    """Encoder keys have lengths and pages of their own, hence a plan of their own."""
    layers = [attention_layer(0), attention_layer(1, is_cross_attention=True), attention_layer(2)]
    # Upstream reads encoder pages of one token only.
    model = Model(layers, page_size=1, context_len=128, encoder_decoder=True)
    backend = model.backend()
    several = "Only encoder size 1" not in inspect.getsource(
        upstream.FlashAttentionBackend.init_forward_metadata
    )
    count = 2 if several else 1
    step = _with_encoder(
        model, mode, encoder_lens=[20, 7][:count], prefixes=[30, 3][:count], new=[10, 20][:count]
    )
    backend.init_forward_metadata(step.batch)
    with counted(backend) as counts:
        model.check(backend, step, layers[0])
        model.check(backend, step, layers[1], share_kv=True)
        model.check(backend, step, layers[2])
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 1)


def _with_encoder(
    model: Model, mode: str, encoder_lens: list[int], prefixes: list[int], new: list[int]
) -> Step:
    """A step of requests whose rows in the table begin with the encoder's tokens."""
    requests = [
        model.request(length + prefix)
        for length, prefix in zip(encoder_lens, prefixes, strict=True)
    ]
    step = model.decode(requests) if mode == "decode" else model.extend(requests, new)
    for queries, length in zip(step.queries, encoder_lens, strict=True):
        queries.encoder_slots, queries.slots = queries.slots[:length], queries.slots[length:]
        queries.positions = queries.positions - length
    step.batch.encoder_lens = torch.tensor(encoder_lens)
    step.batch.seq_lens -= step.batch.encoder_lens
    step.batch.seq_lens_cpu = step.batch.seq_lens.clone()
    return step


def test_embedding_without_a_kv_cache_runs_on_raw_keys_and_values() -> None:
    """``fa_skip_kv_cache``: upstream's varlen kernel, with windows and masks, and no plan."""
    arguments = {"is_embedding": True, "chunked_prefill_size": -1, "disable_radix_cache": True}
    model = Model(uniform_layers(2, sliding_window_size=WINDOW), window=WINDOW, arguments=arguments)
    backend = model.backend()
    assert backend.fa_skip_kv_cache
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(model.requests(0, 0), [100, 30]))
    assert (counts.calls, counts.planned_calls, counts.plans) == (2, 0, 0)


def test_deterministic_inference_uses_one_split() -> None:
    """Upstream's ``num_splits=1`` reaches plan and kernel."""
    model = Model(
        uniform_layers(1), context_len=2048, arguments={"enable_deterministic_inference": True}
    )
    backend = model.backend()
    calls = recorded(backend)
    model.run_pass(backend, model.decode(model.requests(1500)))
    assert [call.arguments["num_splits"] for call in calls] == [1, 1]
    assert calls[0].result[0] == 1


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_sinks_reach_the_kernels(mode: str) -> None:
    """GPT-OSS: each head's sink takes its share of the softmax."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    model.run_pass(backend, step, sinks=torch.tensor([0.5, 3.0, -1.0, 8.0]))


@needs_keyword("q_descale")
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_models_may_pass_the_newer_keywords_as_none(mode: str) -> None:
    """Every keyword that this release's forwards take, given as what stands for "not used"."""
    known = (
        "q_descale",
        "k_descale",
        "v_descale",
        "score_mod",
        "aux_tensors",
        "rel_bias",
        "rel_bias_event",
    )
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    model.run_pass(backend, step, **{name: None for name in known if name in FORWARD_PARAMETERS})


@needs_keyword("return_lse")
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_return_lse_gives_the_log_sum_exp(mode: str) -> None:
    """Output and log-sum-exp, both right."""
    model = Model(uniform_layers(2), context_len=2048)
    backend, requests = model.backend(), model.requests(1500, 5)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    backend.init_forward_metadata(step.batch)
    for layer in model.layers:
        inputs = model.inputs(step, layer)
        result = model.forward(backend, step, layer, inputs, return_lse=True)
        assert len(result) == 2
        model.require(result, step, layer, inputs)


def test_an_output_buffer_of_the_batch_is_written() -> None:
    """Upstream's ``out=`` lands in the buffer that the model gave it."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(200, 5)
    step = model.extend(requests, [30, 60])
    step.batch._attn_output = torch.full((90, 256), float("nan"))
    model.run_pass(backend, step)
    inputs = model.inputs(step, model.layers[0])
    model.forward(backend, step, model.layers[0], inputs)
    if "_attn_output" in inspect.getsource(upstream.FlashAttentionBackend.forward_extend):
        model.require(step.batch._attn_output, step, model.layers[0], inputs)


def test_a_strided_page_table_is_made_dense() -> None:
    """MATE reads a page table as if it were dense, so the adapter copies one that is not."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(200, 5, 300)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    table = backend.forward_metadata.page_table
    wide = torch.zeros(table.shape[0], 2 * table.shape[1], dtype=torch.int32)
    wide[:, ::2] = table
    backend.forward_metadata.page_table = wide[:, ::2]
    for layer in model.layers:
        model.check(backend, step, layer)


# --- context parallelism --------------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_context_parallel_calls_a_layer_twice(mla: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's zigzag strategy: the rank's two pieces of the prompt are two calls, each with its
    own plan.
    """
    if mla and not hasattr(upstream, "get_cp_strategy"):
        pytest.skip("this SGLang has no context parallelism for MLA here")
    from sglang.srt.layers.utils import cp_utils

    model = mla_model(3, context_len=1024) if mla else Model(uniform_layers(3), context_len=1024)
    request = model.request(600)
    step = model.extend([request], [80])
    # Of four pieces of 20 tokens, rank 0 of 2 has the first and the last.
    mine = torch.cat([torch.arange(600, 620), torch.arange(660, 680)])
    step.queries[0].positions = mine
    backend = _context_parallel(model, step, monkeypatch, piece=20, ends=(620, 680))
    with counted(backend) as counts:
        model.run_pass(backend, step)
    assert counts.passes == 1
    assert counts.planned_calls == 6
    # Up to 0.5.12 each layer makes its tensors of offsets anew, and new tensors are new lengths.
    anew = not hasattr(
        upstream, "get_cp_strategy"
    ) and "cu_seqlens_q_prev_tensor" not in inspect.getsource(cp_utils)
    assert (counts.plans, counts.reuses) == ((6, 0) if anew else (2, 4))


def _context_parallel(
    model: Model, step: Step, monkeypatch: pytest.MonkeyPatch, piece: int, ends: tuple[int, int]
) -> Any:
    """A backend that believes to be rank 0 of 2; gathering from the other rank is left out,
    attention is upstream's.
    """
    backend = model.backend()
    backend.attn_cp_size = 2
    offsets = [torch.tensor([0, piece], dtype=torch.int32) for _ in ends]
    lengths = [torch.tensor([end], dtype=torch.int32) for end in ends]
    step.batch.attn_cp_metadata = SimpleNamespace(
        total_q_prev_tokens=piece, total_q_next_tokens=piece, actual_seq_q_prev=piece, actual_seq_q_next=piece,
        cu_seqlens_q_prev_tensor=offsets[0], cu_seqlens_q_next_tensor=offsets[1],
        kv_len_prev_tensor=lengths[0], kv_len_next_tensor=lengths[1],
        max_seqlen_q_prev=piece, max_seqlen_q_next=piece,
    )  # fmt: skip
    if not hasattr(upstream, "get_cp_strategy"):
        write = model.pool.set_kv_buffer
        monkeypatch.setattr(
            upstream, "cp_allgather_and_save_kv_cache",
            lambda batch, layer, k, v, *_, **__: write(layer, batch.out_cache_loc, k, v),
        )  # fmt: skip
        return backend
    from sglang.srt.layers.cp.zigzag import ZigzagCPStrategy

    strategy = ZigzagCPStrategy(2)
    strategy.materialize_full_kv = lambda batch, layer, k, v, **_: model.pool.set_kv_buffer(
        layer, batch.out_cache_loc, k, v
    )
    strategy.materialize_full_mla_kv = lambda batch, layer, k, k_rope: model.pool.set_mla_kv_buffer(
        layer, batch.out_cache_loc, k, k_rope
    )
    for name in ("is_cp_active", "is_cp_v2_active"):
        if hasattr(upstream, name):
            monkeypatch.setattr(upstream, name, lambda _: True)
    monkeypatch.setattr(upstream, "get_cp_strategy", lambda: strategy)
    return backend


# --- other versions of FlashAttention -------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_of_flash_attention_is_refused(version: int) -> None:
    """The choice by ``fa_impl_ver`` is kept, also for who constructs the class by itself: there is
    FA3 alone.
    """
    with pytest.raises(
        attention.UnsupportedAttentionVersion,
        match=f"fa_impl_ver={version}.*--attention-backend fa3",
    ):
        Model(uniform_layers(1)).backend(fa_impl_ver=version)


# --- what reaches the kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("mode", ["decode", "prefill", "verify"])
def test_no_call_counts_its_keys_twice(mla: bool, mode: str) -> None:
    """``cu_seqlens_k_new`` goes on only with new keys, which upstream's forwards never pass."""
    model = mla_model(arguments=SPEC) if mla else Model(uniform_layers(2), arguments=SPEC)
    backend, requests = model.backend(), model.requests(200, 5)
    calls = recorded(backend)
    steps = {
        "decode": lambda: model.decode(requests),
        "prefill": lambda: model.extend(requests, [30, 60]),
        "verify": lambda: model.verify(requests, 4),
    }
    model.run_pass(backend, steps[mode]())
    assert calls
    assert not [call for call in calls if call.arguments.get("cu_seqlens_k_new") is not None]


def test_new_keys_keep_their_offsets() -> None:
    """A call that does append keys keeps ``cu_seqlens_k_new``, and its plan counts them."""
    model = Model(uniform_layers(1))
    backend = model.backend()
    calls = recorded(backend)
    table = (model.table[:1, ::64] // 64).contiguous()
    pages = [buffer.view(-1, 64, 2, 64) for buffer in model.pool.get_kv_buffer(0)]
    model.request(100)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    backend.flash_attn_with_kvcache(
        q=model.normal(3, 4, 64), k_cache=pages[0], v_cache=pages[1], k=model.normal(3, 2, 64),
        v=model.normal(3, 2, 64), cache_seqlens=torch.tensor([100], dtype=torch.int32), page_table=table,
        cu_seqlens_q=offsets, cu_seqlens_k_new=offsets, max_seqlen_q=3, causal=True,
    )  # fmt: skip
    assert [call.arguments["cu_seqlens_k_new"] is offsets for call in calls] == [True, True]


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_plan_is_bounded_by_the_capacity_of_the_page_table(mode: str) -> None:
    """``max_seqlen_k`` is what the kernel derives for itself, not a length that upstream may leave
    unset.
    """
    model = Model(uniform_layers(1), context_len=1024)
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests) if mode == "decode" else model.extend(requests, [30, 60])
    backend.init_forward_metadata(step.batch)
    _widen(backend, model)
    backend.forward_metadata.max_seq_len_k = 1
    model.check(backend, step, model.layers[0])
    planned = [
        call.arguments["max_seqlen_k"] for call in calls if call.name == "get_scheduler_metadata"
    ]
    assert planned == [1024]


def test_upstreams_own_precompute_is_off() -> None:
    """Upstream's metadata, which knows plain decode layers alone, is neither computed nor used."""
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    assert not calls
    assert getattr(backend.forward_metadata, "scheduler_metadata", None) is None
    # Even one that is there does not reach the kernels.
    backend.forward_metadata.scheduler_metadata = torch.full((8,), 99, dtype=torch.int32)
    model.check(backend, step, model.layers[0])
    plan, call = calls
    assert call.arguments["scheduler_metadata"] is plan.result


def test_a_call_outside_of_any_layer_is_a_pass_of_its_own() -> None:
    """Whoever calls the backend's kernel by itself gets a fresh plan each time."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    model.run_pass(backend, model.decode(requests), model.layers[:1])
    arguments = {**calls[-1].arguments}
    with counted(backend) as counts:
        backend.flash_attn_with_kvcache(**arguments)
        backend.flash_attn_with_kvcache(**arguments)
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 0)


def test_a_call_outside_of_any_layer_leaves_no_plan_to_layers() -> None:
    """The pass of such a call is over when it returns."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests)
    model.run_pass(backend, step, model.layers[:1])
    backend.flash_attn_with_kvcache(**calls[-1].arguments)
    with counted(backend) as counts:
        model.check(backend, step, model.layers[1])
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 0)


def test_a_failing_layer_leaves_no_trace() -> None:
    """An exception inside a forward takes its layer off the stack, so that the next call is not
    its.
    """
    model = Model(uniform_layers(1))
    backend, requests = model.backend(), model.requests(300, 5)
    step = model.decode(requests)
    backend.init_forward_metadata(step.batch)
    with pytest.raises(RuntimeError):
        model.forward(
            backend,
            step,
            model.layers[0],
            {**model.inputs(step, model.layers[0]), "q": torch.zeros(3)},
        )
    assert not attention._RUNNING.stack
    model.check(backend, step, model.layers[0])


# --- the dispatcher -------------------------------------------------------------------------------


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Upstream's kernel names with recorders under them, and no dispatcher yet; the calls by name."""
    calls: dict[str, list[Any]] = {name: [] for name in attention.KERNEL_PARAMETERS}
    for name, seen in calls.items():
        monkeypatch.setattr(
            upstream, name, lambda *args, seen=seen, **kwargs: seen.append((args, kwargs))
        )
    return calls


@pytest.mark.parametrize("name", attention.KERNEL_PARAMETERS)
def test_other_users_of_upstreams_module_are_untouched(
    name: str, originals: dict[str, list[Any]]
) -> None:
    """With no layer of ours running, a kernel name is upstream's function."""
    undo = attention.install_kernel_dispatch()
    getattr(upstream, name)(1, causal=True)
    undo()
    assert originals[name] == [((1,), {"causal": True})]


def test_installing_twice_is_installing_once(originals: dict[str, list[Any]]) -> None:
    """A second installation finds the first; undoing it changes nothing, undoing the first restores
    upstream.
    """
    before = upstream.flash_attn_with_kvcache
    undo = attention.install_kernel_dispatch()
    installed = upstream.flash_attn_with_kvcache
    again = attention.install_kernel_dispatch()
    assert upstream.flash_attn_with_kvcache is installed
    again()
    assert upstream.flash_attn_with_kvcache is installed
    undo()
    assert upstream.flash_attn_with_kvcache is before


def test_another_thread_reaches_upstream_while_a_layer_runs(
    originals: dict[str, list[Any]],
) -> None:
    """Which backend runs is known per thread."""
    undo = attention.install_kernel_dispatch()
    attention._RUNNING.stack.append(Model(uniform_layers(1)).backend())
    try:
        _in_threads([lambda: upstream.flash_attn_varlen_func(1)])
    finally:
        attention._RUNNING.stack.pop()
        undo()
    assert originals["flash_attn_varlen_func"] == [((1,), {})]


# --- checks and switches --------------------------------------------------------------------------


def test_force_update_computes_a_plan_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's switch keeps its meaning: nothing is reused."""
    monkeypatch.setenv(envs.FORCE_UPDATE_METADATA, "1")
    for model in (Model(uniform_layers()), mla_model(3)):
        backend = model.backend()
        with counted(backend) as counts:
            model.run_pass(backend, model.decode(model.requests(300, 5)))
        assert (counts.planned_calls, counts.plans, counts.reuses) == (3, 3, 0)


@pytest.mark.parametrize("check", ["metadata", "output"])
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_the_checks_pass_what_is_right(
    check: str, mla: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, decode and verify under each check: no complaint, and the same counts as without."""
    monkeypatch.setenv(envs.CHECK, check)
    model = mla_model(arguments=SPEC) if mla else Model(uniform_layers(2), arguments=SPEC)
    backend, requests = model.backend(), model.requests(0, 0)
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(requests, [70, 9]))
        model.run_pass(backend, model.decode(requests))
        model.run_pass(backend, model.verify(requests, 4))
    assert (counts.passes, counts.plans, counts.reuses) == (3, 3, 3)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_a_corrupted_plan_is_caught_before_it_is_reused(
    mla: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names layer, call, key and both plans."""
    monkeypatch.setenv(envs.CHECK, "metadata")
    model = mla_model() if mla else Model([attention_layer(3), attention_layer(17)])
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests)
    model.run_pass(backend, step, model.layers[:1])
    plan = calls[-1].arguments["scheduler_metadata"]
    (plan[0].view(torch.int32) if mla else plan)[0] += 1
    layer = model.layers[1]
    with pytest.raises(attention.StalePlanError) as caught:
        model.check(backend, step, layer)
    text = str(caught.value)
    for part in (
        f"layer {layer.layer_id}",
        "call 0",
        "CallGeometry(batch_size=2",
        "reused: [",
        "fresh:  [",
    ):
        assert part in text


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_a_stale_plan_is_not_caught_without_the_check(mla: bool) -> None:
    """What the check costs is paid only under it: without, the plan is used as it is."""
    model = mla_model() if mla else Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    step = model.decode(requests)
    model.run_pass(backend, step, model.layers[:1])
    if mla:
        calls[-1].arguments["scheduler_metadata"][0].zero_()
    else:
        tiles = backend._kernels.plan_contents(calls[0].result, 2)[2]
        tiles[:] = 0  # no query tiles: nothing is computed
    with pytest.raises(AssertionError, match="2 of 2 rows are wrong"):
        model.check(backend, step, model.layers[1])


def test_a_wrong_output_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that return something else than the reference are named with their layer."""
    monkeypatch.setenv(envs.CHECK, "output")
    model = Model([attention_layer(5)])
    backend, requests = model.backend(), model.requests(300, 5)
    right = backend._kernels.flash_attn_with_kvcache
    object.__setattr__(
        backend._kernels, "flash_attn_with_kvcache", lambda **arguments: right(**arguments) * 1.01
    )
    with pytest.raises(attention.WrongOutputError, match="layer 5, call 0"):
        model.run_pass(backend, model.decode(requests))


# --- kernels that plan some calls alone -----------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "planned"), [((5, 5), True), ((5, 3), False), ((1, 2), False), ((3,), True)]
)
def test_unequal_queries_get_no_plan_where_kernels_plan_none(
    new: tuple[int, ...], planned: bool
) -> None:
    """Such kernels plan an extend for themselves if its requests differ in length, and outputs are
    right either way.
    """
    model = Model(uniform_layers(2))
    backend = model.backend()
    backend._kernels = dataclasses.replace(backend._kernels, plans_unequal_queries=False)
    calls, requests = recorded(backend), model.requests(300, 70)[: len(new)]
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(requests, new))
    attended = [
        call.arguments["scheduler_metadata"]
        for call in calls
        if call.name == "flash_attn_with_kvcache"
    ]
    assert [plan is not None for plan in attended] == [planned, planned]
    assert (counts.calls, counts.planned_calls, counts.plans, counts.reuses) == (
        2,
        2 * planned,
        planned,
        planned,
    )


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_plan_that_nothing_reuses_is_left_to_kernels_that_make_it(by_itself: bool) -> None:
    """Where passes make one call, kernels that plan for themselves do so from the second pass on;
    others never do.
    """
    model = Model(uniform_layers(3))
    backend = model.backend()
    backend._kernels = dataclasses.replace(backend._kernels, plans_for_itself=by_itself)
    plans = []
    for layers in (model.layers[:1], model.layers[:1], model.layers, model.layers[:1]):
        with counted(backend) as counts:
            model.run_pass(backend, model.decode(model.requests(70)), layers)
        plans.append(counts.plans)
    # The third pass shows that there are more layers, and from then on every pass has its plan.
    assert plans == ([1, 0, 0, 1] if by_itself else [1, 1, 1, 1])


def test_queries_are_counted_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """That calls take no plan is remembered as a plan is: for the layers of one pass, whose lengths
    are the same.
    """
    model = Model(uniform_layers(3))
    backend, requests = model.backend(), model.requests(300, 70)
    backend._kernels = dataclasses.replace(backend._kernels, plans_unequal_queries=False)
    equal = Mock(wraps=attention._has_equal_queries)
    monkeypatch.setattr(attention, "_has_equal_queries", equal)
    for new, judged, plans in (((5, 3), 1, 0), ((4, 4), 2, 1), ((2, 3), 3, 0)):
        with counted(backend) as counts:
            model.run_pass(backend, model.extend(requests, new))
        assert (equal.call_count, counts.plans, counts.reuses) == (judged, plans, 2 * plans)


def test_every_call_has_a_plan_where_kernels_plan_all() -> None:
    """With MATE's semantics an extend of unequal requests is planned as any other."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 70)
    with counted(backend) as counts:
        model.run_pass(backend, model.extend(requests, (5, 3)))
    assert (counts.planned_calls, counts.plans, counts.reuses) == (2, 1, 1)


def test_a_pass_without_plans_leaves_none_to_the_next() -> None:
    """An unplanned extend between two decodes: the second decode has other lengths, and a plan of
    its own.
    """
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 70)
    backend._kernels = dataclasses.replace(backend._kernels, plans_unequal_queries=False)
    model.run_pass(backend, model.decode(requests))
    model.run_pass(backend, model.extend(requests, (5, 3)))
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 1)


# --- lifetime and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_dropping_a_backend_frees_what_it_held(mla: bool) -> None:
    """A model reload: cache, planned tensors, batch and workspace slots of the old backend are
    gone.
    """
    model = mla_model() if mla else Model(uniform_layers(2))
    backend = model.backend()
    step = model.decode(model.requests(300, 5))
    model.run_pass(backend, step)
    lengths = weakref.ref(backend.forward_metadata.cache_seqlens_int32)
    held = [weakref.ref(backend), weakref.ref(backend._plans), weakref.ref(step.batch), lengths]
    workspace = weakref.ref(backend._workspace) if mla else None
    del backend, step
    gc.collect()
    assert [ref() for ref in held] == [None] * 4
    assert workspace is None or workspace() is None


def test_slots_of_a_dropped_backend_serve_the_next() -> None:
    """While another backend keeps the workspace, a reloaded model takes over the room of the old
    one.
    """
    model = mla_model()
    keeper, old = model.backend(), model.backend()
    requests = model.requests(300)
    model.run_pass(keeper, model.decode(requests))
    model.run_pass(old, model.decode(requests))
    taken = [slot.start for slots in keeper._workspace._taken.values() for slot in slots]
    del old
    gc.collect()
    new = model.backend()
    assert new._workspace is keeper._workspace
    model.run_pass(new, model.decode(requests))
    assert sorted(
        slot.start for slots in keeper._workspace._taken.values() for slot in slots
    ) == sorted(taken)


def test_an_exhausted_workspace_is_an_error_and_never_a_shared_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend that finds no room refuses, naming the setting; the one that has a slot goes on."""
    model = mla_model()
    small = MLAWorkspace(torch.device("cpu"), 4096)
    monkeypatch.setattr(MLAWorkspace, "of_device", classmethod(lambda *_: small))
    first, second, third = model.backend(), model.backend(), model.backend()
    requests = model.requests(300, 5)
    model.run_pass(first, model.decode(requests))
    model.run_pass(second, model.decode(requests))
    with pytest.raises(MLAWorkspaceExhausted, match="SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"):
        model.run_pass(third, model.decode(model.requests(40)))
    model.run_pass(first, model.decode(requests))


def test_a_workspace_belongs_to_one_device() -> None:
    """Models on two devices of one process plan in memory of their own."""
    here, there = (MLAWorkspace.of_device(torch.device(kind), 1 << 20) for kind in ("cpu", "meta"))
    assert (here.buffer.device.type, there.buffer.device.type) == ("cpu", "meta")
    assert MLAWorkspace.of_device(torch.device("cpu"), 1 << 20) is here


# --- geometry -------------------------------------------------------------------------------------

BASE_CALL = {
    "q": torch.zeros(6, 8, 64), "k_cache": torch.zeros(9, 16, 2, 64), "v_cache": torch.zeros(9, 16, 2, 64),
    "page_table": torch.zeros(3, 5, dtype=torch.int32), "cu_seqlens_q": torch.zeros(4), "max_seqlen_q": 2,
    "causal": True, "window_size": (7, 0), "num_splits": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({}, "batch_size", 3),
        ({"q": torch.zeros(3, 2, 8, 64), "cu_seqlens_q": None}, "batch_size", 3),
        ({"q": torch.zeros(3, 7, 8, 64), "cu_seqlens_q": None}, "max_seqlen_q", 7),
        ({}, "max_seqlen_q", 2),
        ({}, "max_seqlen_k", 80),
        ({"page_table": None}, "max_seqlen_k", 16),
        ({}, "num_heads_q", 8),
        ({}, "num_heads_kv", 2),
        ({}, "headdim", 64),
        ({"v_cache": torch.zeros(9, 16, 2, 32)}, "headdim_v", 32),
        ({}, "qkv_dtype", torch.float32),
        ({}, "page_size", 16),
        ({"page_table": None}, "page_size", None),
        ({}, "causal", True),
        ({"causal": None}, "causal", False),
        ({}, "window_size", (7, 0)),
        ({"window_size": None}, "window_size", (-1, -1)),
        ({"window_size": [3, 4]}, "window_size", (3, 4)),
        ({"attention_chunk": 64}, "attention_chunk", 64),
        ({}, "attention_chunk", 0),
        ({}, "num_splits", 1),
        ({"pack_gqa": True}, "pack_gqa", True),
        ({"sm_margin": 4}, "sm_margin", 4),
        ({"qv": torch.zeros(1)}, "has_qv", True),
        ({}, "has_qv", False),
    ],
)
def test_geometry_is_read_off_the_call(change: dict[str, Any], field: str, value: Any) -> None:
    """Every field of the key comes from what the kernel itself gets."""
    assert (
        getattr(attention._geometry(BASE_CALL | change, kernels.reference_kernels()), field)
        == value
    )


@pytest.mark.parametrize("uses", [False, True])
def test_softcap_is_part_of_the_geometry_only_where_plans_depend_on_it(uses: bool) -> None:
    """NVIDIA's metadata depends on ``has_softcap``, MATE's does not."""
    provider = dataclasses.replace(kernels.reference_kernels(), metadata_uses_softcap=uses)
    assert attention._geometry(BASE_CALL | {"softcap": 30.0}, provider).has_softcap is uses


OTHER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "batch size": {"q": torch.zeros(6, 1, 8, 64), "cu_seqlens_q": None},
    "max_seqlen_q": {"max_seqlen_q": 3},
    "capacity": {"page_table": torch.zeros(3, 6, dtype=torch.int32)},
    "query heads": {"q": torch.zeros(6, 16, 64)},
    "key heads": {"k_cache": torch.zeros(9, 16, 4, 64)},
    "head dim": {"q": torch.zeros(6, 8, 128)},
    "value head dim": {"v_cache": torch.zeros(9, 16, 2, 32)},
    "dtype": {"q": torch.zeros(6, 8, 64, dtype=torch.bfloat16)},
    "page size": {
        "k_cache": torch.zeros(9, 80, 2, 64),
        "page_table": torch.zeros(3, 1, dtype=torch.int32),
    },
    "causal": {"causal": False},
    "window": {"window_size": (8, 0)},
    "chunk": {"attention_chunk": 64},
    "splits": {"num_splits": 2},
    "softcap": {"softcap": 30.0},
    "packing": {"pack_gqa": True},
    "margin": {"sm_margin": 1},
    "qv": {"qv": torch.zeros(1)},
    "device": {"q": torch.zeros(6, 8, 64, device="meta")},
    "lengths": {"cache_seqlens": torch.ones(3, dtype=torch.int32)},
    "offsets": {"cu_seqlens_q": torch.zeros(4)},
    "padding": {"cache_leftpad": torch.zeros(3, dtype=torch.int32)},
    "new keys": {"k": torch.zeros(1), "cu_seqlens_k_new": torch.zeros(4)},
}
NEUTRAL: dict[str, Any] = {
    "softcap": 0.0,
    "sm_margin": 0,
    "k": torch.zeros(1),
    "cu_seqlens_k_new": torch.ones(4),
}
"""What a call without these changes has under their names, where that is not ``None``; names tell
calls apart, too.
"""


def in_layer(backend: Any, batch: Any, calls: Callable[[], None]) -> None:
    """Run ``calls`` as one layer's of ``backend``."""
    backend._plans.begin_layer(object(), batch, backend.forward_metadata)
    attention._RUNNING.stack.append(backend)
    try:
        calls()
    finally:
        attention._RUNNING.stack.pop()


@pytest.mark.parametrize("what", OTHER_ARGUMENTS)
def test_calls_of_a_layer_that_differ_in_one_thing_have_plans_of_their_own(what: str) -> None:
    """Each thing that a plan depends on is enough, alone, to tell two calls of a pass apart; and
    likeness to share.
    """
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    backend._kernels = dataclasses.replace(backend._kernels, metadata_uses_softcap=True)
    neutral = {name: NEUTRAL.get(name) for name in OTHER_ARGUMENTS[what]}
    first = {**neutral, **BASE_CALL, "cache_seqlens": torch.zeros(3, dtype=torch.int32)}

    def calls() -> None:
        for change in ({}, {}, OTHER_ARGUMENTS[what], {}):
            upstream.flash_attn_with_kvcache(**first | change)

    batch = SimpleNamespace()
    with counted(backend) as counts:
        in_layer(backend, batch, calls)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 2)


def test_calls_with_equal_values_under_other_names_are_told_apart() -> None:
    """One asks for a single split, another, without such an argument, for packed heads: 1 and
    ``True`` are equal.
    """
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    first = {**BASE_CALL, "cache_seqlens": torch.zeros(3, dtype=torch.int32)}
    second = {name: value for name, value in first.items() if name != "num_splits"} | {
        "pack_gqa": True
    }

    def calls() -> None:
        for arguments in (first, second, first, second):
            upstream.flash_attn_with_kvcache(**arguments)

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.passes, counts.plans, counts.reuses) == (1, 2, 2)


@pytest.mark.parametrize(
    "second", ["another view", "an equal view after a change", "the same tensor after a change"]
)
def test_lengths_of_a_pass_are_told_apart_by_their_contents(second: str) -> None:
    """Lengths that are changed in place between two calls, or that only look alike, are other
    lengths.
    """
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    lengths = torch.zeros(6, dtype=torch.int32)

    first = lengths[:3]

    def calls() -> None:
        upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=first)
        if "change" in second:
            lengths.add_(1)
        views = {"another view": lengths[::2], "an equal view after a change": lengths[:3]}
        upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=views.get(second, first))

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.plans, counts.reuses) == (2, 0)


def test_equal_lengths_in_other_tensors_have_nothing_remembered_and_share_a_plan() -> None:
    """Two views of the same lengths look different, and are the same contents."""
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    lengths = torch.zeros(6, dtype=torch.int32)

    def calls() -> None:
        for view in (lengths[:3], lengths[:3]):
            upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=view)

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.plans, counts.reuses) == (1, 1)


def test_a_plan_is_recalled_without_its_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call looks like is enough to find the plan of one before it; its geometry is worked
    out once.
    """
    backend = Model(uniform_layers(1)).backend()
    replace_kernels(backend, lambda *_: lambda **arguments: torch.zeros(1))
    geometry = Mock(wraps=attention._geometry)
    monkeypatch.setattr(attention, "_geometry", geometry)
    lengths = torch.zeros(3, dtype=torch.int32)

    def calls() -> None:
        for _ in range(4):
            upstream.flash_attn_with_kvcache(**BASE_CALL, cache_seqlens=lengths)

    with counted(backend) as counts:
        in_layer(backend, SimpleNamespace(), calls)
    assert (counts.plans, counts.reuses, geometry.call_count) == (1, 3, 1)
