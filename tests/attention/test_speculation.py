"""Drafts and their verification, and backends that run beside one another."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.support.backend import (
    Draft,
    ForwardMode,
    Model,
    Step,
    attention,
    counted,
    upstream,
)
from tests.support.layers import (
    SPEC,
    TOPK,
    TREE,
    draft_of,
    in_threads,
    mla_model,
    uniform_layers,
)

# --- speculative decoding -------------------------------------------------------------------------


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


def test_mha_cascade_verify_with_topk_above_one() -> None:
    """Verify of a draft tree makes two calls a layer, each with a plan that all layers share."""
    model = Model(uniform_layers(3), arguments=TOPK)
    backend, requests = model.backend(), model.requests(100, 5, 300)
    with counted(backend) as counts:
        model.run_pass(backend, model.verify(requests, 4, [TREE, TREE.flip(0).flip(1).T, TREE]))
    assert (counts.passes, counts.planned_calls, counts.plans, counts.reuses) == (1, 6, 2, 4)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("step", [0, 2])
def test_cascade_draft_decode_keeps_prefix_and_suffix_apart(mla: bool, step: int) -> None:
    """Draft of a tree makes two calls a layer; MLA plans in place do not overwrite one another."""
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


def test_draft_extend_without_lengths_on_the_host() -> None:
    """Draft-extend v2: upstream's overlap scheduler leaves the host copies of the lengths unset."""
    # From 0.5.16 on upstream takes the number of draft tokens where the host has no lengths.
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
    assert {type(each) for each in (whole.primary, *whole.children)} == {attention.MusaFA3Backend}
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
    """Two engines in two threads, layer by layer, do not see the other's plan or kernels."""
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
    counts = in_threads([partial(_count_pass, *each) for each in work])
    assert [(each.plans, each.reuses) for each in counts] == [(1, 3), (1, 3)]


def _meet_inside_kernels(backend: Any, barrier: threading.Barrier) -> None:
    """Make each forward of ``backend`` wait at its kernel call for one of the other thread."""
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
