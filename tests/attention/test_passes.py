"""One plan a geometry and pass, in every mode; and what a pass is."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.upstream.rows.passes import PASS_METHODS
from tests.support.backend import (
    ForwardMode,
    Model,
    Queries,
    Request,
    Step,
    attention,
    attention_layer,
    counted,
    dense_attention,
    recorded,
    upstream,
)
from tests.support.layers import (
    WINDOW,
    mla_model,
    uniform_layers,
    widen,
)


@pytest.fixture(autouse=True)
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every prefill read the paged cache: plans are the subject here."""
    monkeypatch.setenv(envs.RAW_PREFILL, "off")


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
    """Requests of a prefill batch share the layers' plan, with cached tokens or without."""
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
    """One request with many keys has a plan of more than one split, and the result is right."""
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
    """Decode sees the prompt and a window of what came after, by a shorter page table."""
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
    """Llama-4's local layers run on virtual batches, whose plan fits no global layer."""
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
    """Hybrid models' passes are told apart though no layer 0 begins them, at any interval."""
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
    exact = Model([layer])
    exact.exact.k[7][:tokens], exact.exact.v[7][:tokens] = k.double(), v.double()
    alone = Step(step.batch, [Queries(torch.arange(tokens), torch.arange(tokens))])
    exact.require(out, alone, layer, {"q": q})


def test_chunked_prefix_of_mla_returns_its_log_sum_exp() -> None:
    """MLA's prefill merges new keys and prefix keys by their log-sum-exps, without a plan."""
    model = mla_model(1)
    backend = model.backend()
    step = model.extend(model.requests(90, 20), [30, 7])
    backend.init_forward_metadata(step.batch)
    layer = attention_layer(7, 4, 4, 192, v_head_dim=128)
    fields = {
        "mha_return_lse": True, "mha_one_shot": False, "prefix_chunk_idx": 0,
        "prefix_chunk_cu_seq_lens": torch.tensor([[0, 90, 110]], dtype=torch.int32),
        "prefix_chunk_max_seq_lens": [90],
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


@pytest.mark.parametrize("padding", [(0, 10), (5, 0), (5, 10)], ids=str)
@pytest.mark.parametrize("one_shot", [False, True], ids=["chunk of fixed capacity", "one shot"])
def test_one_request_of_mla_sees_no_padded_rows(padding: tuple[int, int], one_shot: bool) -> None:
    """MATE takes all rows of one request for its own: queries and keys that pad it among them."""
    model = mla_model(1)
    backend = model.backend()
    step = model.extend(model.requests(90), [30])
    backend.init_forward_metadata(step.batch)
    layer = attention_layer(7, 4, 4, 192, v_head_dim=128)
    fields = {
        "mha_return_lse": True, "mha_one_shot": one_shot, "prefix_chunk_idx": 0,
        "prefix_chunk_cu_seq_lens": torch.tensor([[0, 90]], dtype=torch.int32),
        "prefix_chunk_max_seq_lens": [90], "attn_attend_prefix_cache": not one_shot,
    }  # fmt: skip
    vars(step.batch).update(fields)
    keys = 120 if one_shot else 90
    q = model.normal(30 + padding[0], 4 * 192)
    k, v = (model.normal(keys + padding[1], 4, dim) for dim in (192, 128))
    out, lse = backend.forward_extend(q, k, v, layer, step.batch, save_kv_cache=False)
    visible = torch.ones(30, keys, dtype=torch.bool)
    if one_shot:
        visible = visible.tril(90)
    queries = q[:30].view(-1, 4, 192).double()
    exact = dense_attention(queries, k[:keys].double(), v[:keys].double(), visible, layer.scaling)
    for got, wanted in zip((out, lse), exact, strict=True):
        seen = got[:30].view(wanted.shape).double()
        torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-5)


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
    """Padded batches, passes in which this rank is idle, and batches of other sizes are right.

    A padded batch has more requests in its metadata than it has real ones, with rows that nobody
    reads. The plan is computed from the very tensors that the call passes, so it covers them.
    """
    model = mla_model(table_rows=8) if mla else Model(uniform_layers(2), table_rows=8)
    backend, requests = model.backend(), model.requests(300, 5, 64)
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE, batch_size=0)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
        # An idle rank runs its layers without attention, as RadixAttention does for an idle batch.
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
    """A graph's warm-up and capture share metadata and batch; each computes its own plan."""
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
    """Upstream may refill its tensors for the next pass and keep batch and metadata objects.

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
            widen(backend, model)
            model.check(backend, step, model.layers[0])
            _refill(backend, step, later, model)
            model.check(backend, step, model.layers[1])
    assert backend.forward_metadata is before
    assert before.page_table.shape[1] > width
    assert (counts.passes, counts.plans, counts.reuses) == (2, 2, 0)


def _refill(backend: Any, step: Step, later: Step, model: Model) -> None:
    """Put ``later``'s lengths and pages into ``step``'s tensors, within a metadata method."""
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
    """Each method of upstream's that prepares metadata, by its name, voids earlier plans."""
    named = {
        name
        for name in dir(upstream.FlashAttentionBackend)
        if name.startswith("init_forward_metadata")
    }
    assert named <= set(PASS_METHODS)
    backend = Model(uniform_layers(1)).backend()
    for name in PASS_METHODS:
        if not hasattr(upstream.FlashAttentionBackend, name):
            assert not hasattr(backend, name)
            continue
        backend._plans._ended = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upstream.FlashAttentionBackend, name, lambda *_, **__: None)
            getattr(backend, name)()
        assert backend._plans._ended, name


def test_the_batch_alone_tells_passes_apart() -> None:
    """Another batch under the same metadata object is another pass, as in micro-batches."""
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
