"""The checks and switches of the settings, and kernels that plan some calls alone."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention.calls import has_equal_queries
from sglang_musa_ext.attention.checks import StalePlanError, WrongOutputError
from tests.support.backend import (
    Model,
    attention_layer,
    counted,
    mixin,
    recorded,
)
from tests.support.layers import (
    SPEC,
    mla_model,
    uniform_layers,
)


@pytest.fixture(autouse=True)
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every prefill read the paged cache: plans are the subject here."""
    monkeypatch.setenv(envs.RAW_PREFILL, "off")


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
    with pytest.raises(StalePlanError) as caught:
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
    """The check's cost is paid under it alone: without, the plan is used as it is."""
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


def test_no_plan_is_computed_twice_without_the_check() -> None:
    """Layers whose calls differ, but not in what a plan depends on, share one plan, uncompared."""
    layers = [attention_layer(0), attention_layer(1)]
    layers[1].scaling *= 0.5
    model = Model(layers)
    backend, requests = model.backend(), model.requests(300, 5)
    calls = recorded(backend)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
    assert (counts.plans, counts.reuses) == (1, 1)
    assert [call.name for call in calls].count("get_scheduler_metadata") == 1


def test_a_wrong_output_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that return something else than the reference are named with their layer."""
    monkeypatch.setenv(envs.CHECK, "output")
    model = Model([attention_layer(5)])
    backend, requests = model.backend(), model.requests(300, 5)
    right = backend._kernels.flash_attn_with_kvcache
    object.__setattr__(
        backend._kernels, "flash_attn_with_kvcache", lambda **arguments: right(**arguments) * 1.01
    )
    with pytest.raises(WrongOutputError, match="layer 5, call 0"):
        model.run_pass(backend, model.decode(requests))


# --- kernels that plan some calls alone -----------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "planned"), [((5, 5), True), ((5, 3), False), ((1, 2), False), ((3,), True)]
)
def test_unequal_queries_get_no_plan_where_kernels_plan_none(
    new: tuple[int, ...], planned: bool
) -> None:
    """Such kernels plan an extend of unequal lengths for themselves; outputs are right anyway."""
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
    """With one captured call a pass, kernels that plan for themselves do so from the second on."""
    model = Model(uniform_layers(3))
    backend = model.backend()
    backend._kernels = dataclasses.replace(backend._kernels, plans_for_itself=by_itself)
    backend._plans._stream_state = lambda: (0, True)
    plans = []
    for layers in (model.layers[:1], model.layers[:1], model.layers, model.layers[:1]):
        with counted(backend) as counts:
            model.run_pass(backend, model.decode(model.requests(70)), layers)
        plans.append(counts.plans)
    # The third pass shows that there are more layers, and from then on every pass has its plan.
    assert plans == ([1, 0, 0, 1] if by_itself else [1, 1, 1, 1])


@pytest.mark.parametrize(
    ("by_itself", "setting", "capturing", "planned"),
    [
        (True, "auto", False, False),
        (True, "auto", True, True),
        (True, "always", False, True),
        (True, "always", True, True),
        (False, "auto", False, True),
        (False, "auto", True, True),
        (False, "always", False, True),
    ],
)
def test_kernels_that_plan_for_themselves_get_plans_in_graphs_alone(
    by_itself: bool,
    setting: str,
    capturing: bool,
    planned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outside of graphs the host takes longer to plan than it spares; MATE would split nothing."""
    monkeypatch.setenv(envs.PLANS, setting)
    model = Model(uniform_layers(3))
    backend = model.backend()
    backend._kernels = dataclasses.replace(backend._kernels, plans_for_itself=by_itself)
    backend._plans._stream_state = lambda: (0, capturing)
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(model.requests(70)))
    expected = (1, 2) if planned else (0, 0)
    assert (counts.plans, counts.reuses) == expected


@pytest.mark.parametrize(
    ("combines", "setting", "splits", "planned"),
    [
        (True, "auto", 1, False),
        (True, "auto", 2, True),
        (True, "auto", None, True),
        (True, "always", 1, True),
        (False, "auto", 1, True),
    ],
)
def test_a_call_that_is_not_split_gets_no_plan_where_that_costs_a_kernel(
    combines: bool,
    setting: str,
    splits: int | None,
    planned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked of the record, once a pass, and counted; an unknown number is planned."""
    monkeypatch.setenv(envs.PLANS, setting)
    model = Model(uniform_layers(3))
    backend = model.backend()
    asked = Mock(return_value=splits)
    backend._kernels = dataclasses.replace(
        backend._kernels, combines_unsplit=combines, static_num_splits=asked
    )
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(model.requests(70)))
    assert (counts.calls, counts.plans, counts.reuses) == ((3, 1, 2) if planned else (3, 0, 0))
    assert backend.musa_fa3_report()["statistics"]["unsplit_calls"] == (0 if planned else 3)
    assert asked.call_count == (combines and setting == "auto")


def test_queries_are_counted_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without a plan are remembered for the layers of one pass, as a plan is."""
    model = Model(uniform_layers(3))
    backend, requests = model.backend(), model.requests(300, 70)
    backend._kernels = dataclasses.replace(backend._kernels, plans_unequal_queries=False)
    equal = Mock(wraps=has_equal_queries)
    monkeypatch.setattr(mixin, "has_equal_queries", equal)
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
    """After an unplanned extend, a decode of other lengths has a plan of its own."""
    model = Model(uniform_layers(2))
    backend, requests = model.backend(), model.requests(300, 70)
    backend._kernels = dataclasses.replace(backend._kernels, plans_unequal_queries=False)
    model.run_pass(backend, model.decode(requests))
    model.run_pass(backend, model.extend(requests, (5, 3)))
    with counted(backend) as counts:
        model.run_pass(backend, model.decode(requests))
    assert (counts.passes, counts.plans, counts.reuses) == (1, 1, 1)
