from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext.attention.calls import PLANNED_OPTIONS, CallGeometry
from sglang_musa_ext.attention.plans import (
    PlanStatistics,
    SchedulerMetadataCache,
    StreamState,
    TensorIdentity,
    stream_probe,
)

CPU = torch.device("cpu")
DECODE = CallGeometry(
    batch_size=2,
    max_seqlen_q=1,
    max_seqlen_k=512,
    num_heads_q=8,
    num_heads_kv=2,
    headdim=64,
    headdim_v=64,
    qkv_dtype=torch.bfloat16,
    page_size=64,
    has_softcap=False,
    has_qv=False,
    device=CPU,
    options=tuple(PLANNED_OPTIONS.values()),
)
OTHER_VALUES: dict[str, Any] = {
    "batch_size": 3,
    "max_seqlen_q": 2,
    "max_seqlen_k": 576,
    "num_heads_q": 16,
    "num_heads_kv": 8,
    "headdim": 128,
    "headdim_v": 128,
    "qkv_dtype": torch.float16,
    "page_size": 128,
    "causal": True,
    "window_size": (127, 0),
    "attention_chunk": 8192,
    "has_softcap": True,
    "num_splits": 1,
    "pack_gqa": True,
    "sm_margin": 8,
    "has_qv": True,
    "device": torch.device("meta"),
}


def changed(name: str) -> CallGeometry:
    """Return the geometry of a decode that differs in one field or option."""
    value = OTHER_VALUES[name]
    if name not in PLANNED_OPTIONS:
        return DECODE._replace(**{name: value})
    options = dict(zip(PLANNED_OPTIONS, DECODE.options, strict=True)) | {name: value}
    return DECODE._replace(options=tuple(options.values()))


class Thing:
    """A batch, metadata, layer or owner: an object with an identity and weak references."""


class Alike:
    """Stands for a known call: the calls that are like it say so."""

    def __init__(self, arguments: str, *holds: object) -> None:
        self.arguments, self.holds = arguments, holds
        self.plan: Any = None
        self.in_place: Any = None
        self.role = -1
        self.raw, self.unsplit, self.uses = False, False, 0

    def release(self) -> None:
        """Let go of what it holds."""
        self.holds = ()


@dataclass
class Server:
    """A cache with what surrounds it: where work is issued, and what one forward pass runs on."""

    state: StreamState = field(default_factory=lambda: StreamState(0, False))
    batch: Any = field(default_factory=Thing)
    metadata: Any = field(default_factory=Thing)
    lengths: torch.Tensor = field(default_factory=lambda: torch.tensor([3, 5], dtype=torch.int32))
    cache: SchedulerMetadataCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = SchedulerMetadataCache(lambda: self.state)

    def call(
        self, layer: object, role: int = 0, geometry: CallGeometry = DECODE
    ) -> tuple[torch.Tensor, bool]:
        """One planned call of ``layer`` in the current surroundings."""
        self.begin(layer, role)
        return self.cache.plan(geometry, {"cache_seqlens": self.lengths}, lambda: torch.zeros(1))

    def begin(self, layer: object, role: int = 0, arguments: Any = None) -> Any:
        """Begin a call of ``layer`` as its ``role``-th: all that comes before a plan."""
        self.cache.begin_layer(layer, self.batch, self.metadata)
        self.cache.role += role
        for known in self.cache.begin_call():
            if known.arguments == arguments:  # type: ignore[attr-defined]
                known.uses += 1
                return known
        return None

    @property
    def passes(self) -> int:
        return self.cache.statistics.passes


# TensorIdentity ----------------------------------------------------------------------------------


def test_an_unchanged_tensor_keeps_its_identity() -> None:
    """Asking twice about an untouched tensor gives the same identity."""
    tensor = torch.arange(4)
    assert TensorIdentity.of(tensor) == TensorIdentity.of(tensor)


def test_an_in_place_write_changes_the_identity() -> None:
    """The same storage with other contents is not the same identity."""
    tensor = torch.arange(4)
    before = TensorIdentity.of(tensor)
    tensor.add_(1)
    assert TensorIdentity.of(tensor) != before


def test_a_write_through_another_view_changes_the_identity() -> None:
    """A view shares its base's version, so a write to the base shows in it."""
    base = torch.arange(8)
    view = base[:4]
    before = TensorIdentity.of(view)
    base[0] = 7
    assert TensorIdentity.of(view) != before


def test_a_write_in_inference_mode_changes_the_identity_of_a_normal_tensor() -> None:
    """Upstream's static buffers are normal tensors that are written to under inference mode."""
    tensor = torch.arange(4)
    before = TensorIdentity.of(tensor)
    with torch.inference_mode():
        tensor.copy_(torch.ones(4, dtype=torch.int64))
        assert TensorIdentity.of(tensor) != before


def test_an_inference_tensor_has_an_identity_without_a_version() -> None:
    """Tensors made under inference mode count no versions, and asking for one must not raise."""
    with torch.inference_mode():
        tensor = torch.arange(4)
    assert TensorIdentity.of(tensor) == TensorIdentity.of(tensor)
    assert TensorIdentity.of(tensor).version == -1


@pytest.mark.parametrize(
    "other",
    [lambda t: t[:4], lambda t: t[2:6], lambda t: t[::2], lambda t: t.view(2, 4)],
    ids=["shorter", "shifted", "strided", "shaped"],
)
def test_another_view_is_another_identity(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Views of one storage that differ in start, shape or stride hold different lengths."""
    tensor = torch.arange(8)
    assert TensorIdentity.of(other(tensor)) != TensorIdentity.of(tensor)


def test_two_views_of_the_same_elements_are_one_identity() -> None:
    """Upstream slices its static buffer anew for each pass; the slices have the same contents."""
    tensor = torch.arange(8)
    assert TensorIdentity.of(tensor[:4]) == TensorIdentity.of(tensor[:4])


@pytest.mark.parametrize(
    "make", [lambda: torch.empty(0), lambda: torch.empty(2, device="meta")], ids=["empty", "meta"]
)
def test_tensors_without_storage_differ_as_objects(make: Callable[[], torch.Tensor]) -> None:
    """Two tensors whose address is 0 are told apart all the same."""
    first, second = make(), make()
    assert TensorIdentity.of(first) == TensorIdentity.of(first)
    assert TensorIdentity.of(first) != TensorIdentity.of(second)


# Passes ------------------------------------------------------------------------------------------


def test_layers_of_one_pass_share_a_plan() -> None:
    """Layers with one geometry, one batch and one metadata object compute one plan."""
    server = Server()
    plans = [server.call(Thing()) for _ in range(3)]
    assert [reused for _, reused in plans] == [False, True, True]
    assert all(plan is plans[0][0] for plan, _ in plans)
    assert server.passes == 1


def test_end_pass_begins_another() -> None:
    """After upstream prepared new metadata, nothing computed before is reused."""
    server = Server()
    server.call(Thing())
    server.cache.end_pass()
    assert not server.call(Thing())[1]
    assert server.passes == 2


def test_another_forward_batch_begins_a_pass() -> None:
    """Two batches with one metadata object and the same lengths share no plan."""
    server = Server()
    server.call(Thing())
    server.batch = Thing()
    assert not server.call(Thing())[1]


def test_a_forward_batch_at_the_address_of_a_dead_one_begins_a_pass() -> None:
    """A batch is not taken for its predecessor because it was given the same memory."""
    server = Server()
    server.call(Thing())
    address = id(server.batch)
    server.batch = None
    server.batch = Thing()
    if id(server.batch) != address:
        pytest.skip("The allocator did not reuse the address.")
    assert not server.call(Thing())[1]


def test_a_batch_is_not_kept_alive() -> None:
    """The cache holds a forward batch weakly, because a batch may hold images."""
    server = Server()
    server.call(Thing())
    batch = weakref.ref(server.batch)
    server.batch = None
    assert batch() is None


def test_a_batch_without_weak_references_is_known_again() -> None:
    """A ``SimpleNamespace`` view of a batch, as graph replay makes, serves like any other batch."""
    server = Server(batch=SimpleNamespace())
    server.call(Thing())
    assert server.call(Thing())[1]
    server.batch = SimpleNamespace()
    assert not server.call(Thing())[1]


def test_equal_batches_are_still_two() -> None:
    """Batches are compared by identity: equal contents are no licence to reuse."""
    server = Server(batch=SimpleNamespace(size=1))
    server.call(Thing())
    server.batch = SimpleNamespace(size=1)
    assert not server.call(Thing())[1]


def test_another_metadata_object_begins_a_pass() -> None:
    """Upstream replaces its ``forward_metadata`` when it prepares another pass."""
    server = Server()
    server.call(Thing())
    server.metadata = Thing()
    assert not server.call(Thing())[1]


def test_a_metadata_object_is_not_confused_with_a_dead_one() -> None:
    """The cache holds the metadata it compares with, so its address cannot be given away."""
    server = Server()
    server.call(Thing())
    first = weakref.ref(server.metadata)
    server.metadata = None
    assert first() is not None


@pytest.mark.parametrize(
    "state", [StreamState(7, False), StreamState(0, True)], ids=["stream", "capture"]
)
def test_another_stream_or_capture_state_begins_a_pass(state: StreamState) -> None:
    """A plan made on another stream, or outside a capture, is not used on this side."""
    server = Server()
    server.call(Thing())
    server.state = state
    assert not server.call(Thing())[1]


def test_leaving_a_capture_begins_a_pass() -> None:
    """A plan that lives in a graph's memory does not leak out of the capture."""
    server = Server(state=StreamState(0, True))
    server.call(Thing())
    assert server.cache.capturing
    server.state = StreamState(0, False)
    assert not server.call(Thing())[1]
    assert not server.cache.capturing


def test_the_same_layer_again_begins_a_pass() -> None:
    """A graph's warm-up and capture share batch and metadata; the layers tell them apart."""
    server = Server()
    first, last = Thing(), Thing()
    reuses = [server.call(layer)[1] for layer in (first, last, first, last)]
    assert reuses == [False, True, False, True]
    assert server.passes == 2


def test_another_role_of_the_same_layer_stays_in_the_pass() -> None:
    """Prefix and suffix of a cascade belong to one pass of their layer."""
    server = Server()
    first, last = Thing(), Thing()
    reuses = [server.call(layer, role)[1] for layer in (first, last) for role in (0, 1)]
    assert reuses == [False, True, True, True]
    assert server.passes == 1


@pytest.mark.parametrize(
    ("roles", "expected"),
    [((0, 1, 0, 1), [False, True, False, True]), ((1, 1), [False, False])],
    ids=str,
)
def test_the_same_role_of_the_same_layer_begins_a_pass(
    roles: tuple[int, ...], expected: list[bool]
) -> None:
    """A call that is run twice is two passes, whichever of its layer's calls it is."""
    server = Server()
    layer = Thing()
    assert [server.call(layer, role)[1] for role in roles] == expected


def test_a_layer_at_the_address_of_a_dead_one_cannot_be() -> None:
    """The cache keeps its pass's layers alive, so no other layer can take the address of one."""
    server = Server()
    layer = Thing()
    server.call(layer)
    held = weakref.ref(layer)
    del layer
    assert held() is not None
    server.cache.end_pass()
    server.call(Thing())
    assert held() is None


def test_a_layer_without_planned_calls_begins_no_pass() -> None:
    """Attention over raw keys and values takes no plan and is no sign of a pass."""
    server = Server()
    layer = Thing()
    server.call(layer)
    server.cache.begin_layer(layer, server.batch, server.metadata)
    assert server.call(Thing())[1]


# Plans -------------------------------------------------------------------------------------------


def test_the_other_values_are_those_of_every_field() -> None:
    """The table of the next test covers each field of a geometry, with a value of its own."""
    assert OTHER_VALUES.keys() == {*CallGeometry._fields, *PLANNED_OPTIONS} - {"options"}
    assert all(changed(name) != DECODE for name in OTHER_VALUES)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_another_geometry_gets_its_own_plan(name: str) -> None:
    """A call of another geometry in any field reuses no plan, and finds its own again later."""
    server = Server()
    other = changed(name)
    geometries = (DECODE, other, DECODE, other)
    plans = [server.call(Thing(), geometry=geometry) for geometry in geometries]
    assert [reused for _, reused in plans] == [False, False, True, True]
    assert plans[0][0] is plans[2][0]
    assert plans[1][0] is plans[3][0]
    assert plans[0][0] is not plans[1][0]


def test_changed_lengths_get_their_own_plan() -> None:
    """An in-place change of the lengths within a pass is seen."""
    server = Server()
    server.call(Thing())
    server.lengths += 1
    assert not server.call(Thing())[1]
    assert server.passes == 1


def test_lengths_are_known_by_their_place_among_the_tensors() -> None:
    """One tensor passed as another argument is another plan, and an absent one is none of them."""
    server = Server()
    first, second = torch.tensor([1]), torch.tensor([1])
    server.call(Thing())
    keys = [
        {"cache_seqlens": first, "cu_seqlens_q": second},
        {"cache_seqlens": second, "cu_seqlens_q": first},
        {"cache_seqlens": first},
        {"cu_seqlens_q": first},
    ]
    assert [server.cache.plan(DECODE, tensors, lambda: torch.zeros(1))[1] for tensors in keys] == [
        False
    ] * 4


def test_the_tensors_of_a_plan_outlive_their_owner() -> None:
    """A plan keeps alive what its key names by address, so no other tensor gets the address."""
    server = Server()
    server.call(Thing())
    lengths = weakref.ref(server.lengths)
    server.lengths = torch.tensor([3, 5], dtype=torch.int32)
    assert lengths() is not None
    assert not server.call(Thing())[1]


@pytest.mark.parametrize("in_place", [False, True])
def test_the_next_pass_releases_what_the_last_one_held(in_place: bool) -> None:
    """Plans and their tensors are gone when the next pass begins, so memory does not grow."""
    server = Server()
    held: list[weakref.ref[torch.Tensor]] = []
    for _ in range(5):
        server.lengths = torch.tensor([3, 5], dtype=torch.int32)
        held.append(weakref.ref(server.lengths))
        server.cache.end_pass()
        if in_place:
            server.begin(Thing())
            server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})
        else:
            plan, _ = server.call(Thing())
            held.append(weakref.ref(plan))
            del plan
    alive = sum(ref() is not None for ref in held)
    assert alive == (1 if in_place else 2)


def test_a_plan_that_fails_to_compute_is_not_kept() -> None:
    """After a failed computation the next call computes, and the failure counts as no plan."""
    server = Server()
    server.begin(Thing())

    def fail() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        server.cache.plan(DECODE, {"cache_seqlens": server.lengths}, fail)
    assert not server.call(Thing())[1]
    assert server.cache.statistics.plans == 1


def test_forget_plans_makes_the_next_call_compute() -> None:
    """Plans of either kind are dropped, and the pass goes on."""
    server = Server()
    server.call(Thing())
    server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})
    server.cache.forget_plans()
    assert not server.call(Thing())[1]
    assert not server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})
    assert server.passes == 1


def test_a_place_reports_reuse_of_what_it_holds() -> None:
    """A place holds one plan, and says so to calls with the same geometry and lengths."""
    server = Server()
    server.begin(Thing())
    answers = [
        server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths}) for _ in range(3)
    ]
    assert answers == [False, True, True]


def test_alternating_geometries_in_one_place_never_report_reuse() -> None:
    """A place holds the last plan written into it, whatever it held before."""
    server = Server()
    server.begin(Thing())
    other = DECODE._replace(batch_size=3)
    geometries = (DECODE, other, DECODE, other)
    assert not any(
        server.cache.plan_in_place(0, geometry, {"cache_seqlens": server.lengths})
        for geometry in geometries
    )


def test_places_hold_plans_of_their_own() -> None:
    """Prefix and suffix of a cascade alternate without disturbing each other."""
    server = Server()
    server.begin(Thing())
    suffix = changed("causal")
    calls = [(0, DECODE), (1, suffix)] * 3
    answers = [
        server.cache.plan_in_place(place, geometry, {"cache_seqlens": server.lengths})
        for place, geometry in calls
    ]
    assert answers == [False, False, True, True, True, True]


def test_places_forget_when_the_lengths_change() -> None:
    """The plan in a place is not that of lengths which were written since."""
    server = Server()
    server.begin(Thing())
    server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})
    server.lengths += 1
    assert not server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})


def test_places_forget_when_a_pass_begins() -> None:
    """The plan that a place holds from an earlier pass is not reported as this pass's."""
    server = Server()
    layer = Thing()
    for _ in range(2):
        server.begin(layer)
        assert not server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})


def test_nothing_outlives_the_cache() -> None:
    """Plans, lengths, metadata and layers all die with the cache that held them."""
    server = Server()
    layer = Thing()
    plan, _ = server.call(layer)
    server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})
    held = [
        weakref.ref(thing) for thing in (plan, server.lengths, server.metadata, layer, server.cache)
    ]
    del server, layer, plan
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


# Statistics --------------------------------------------------------------------------------------


def test_statistics_count_passes_by_their_plans() -> None:
    """A pass is counted once, under the number of plans it computed so far."""
    server = Server()
    other = changed("window_size")
    for geometries in ((DECODE, DECODE), (DECODE, other, other, DECODE), (DECODE,)):
        server.cache.end_pass()
        for geometry in geometries:
            server.call(Thing(), geometry=geometry)
    report = server.cache.statistics.report()
    assert report["passes_by_plans"] == {"1": 2, "2": 1}
    assert (report["passes"], report["planned_calls"], report["plans"], report["reuses"]) == (
        3,
        7,
        4,
        3,
    )


def test_statistics_count_plans_in_place_alike() -> None:
    """A plan that the kernel writes is a plan, and its reuse a reuse."""
    server = Server()
    for _ in range(3):
        server.begin(Thing())
        server.cache.plan_in_place(0, DECODE, {"cache_seqlens": server.lengths})
    assert (server.cache.statistics.plans, server.cache.statistics.reuses) == (1, 2)


def test_a_pass_without_a_plan_is_none() -> None:
    """Calls that take no plan count as no pass, and do not end a pass of calls that do."""
    server = Server()
    server.begin(Thing())
    known: Any = Alike("like this")
    server.cache.remember(known, None)
    assert server.begin(Thing(), arguments="like this") is known
    assert server.cache.statistics.report() == {
        "passes": 0, "calls": 1, "raw_calls": 0, "unsplit_calls": 0, "planned_calls": 0,
        "plans": 0, "reuses": 0, "passes_by_plans": {},
    }  # fmt: skip
    server.call(Thing())
    assert server.begin(Thing(), arguments="like this") is known, "a plan ended the pass"
    assert server.cache.statistics.report()["passes_by_plans"] == {"1": 1}


@pytest.mark.parametrize("statistics", [PlanStatistics(), None], ids=["fresh", "used"])
def test_the_report_is_plain_data(statistics: PlanStatistics | None) -> None:
    """The report comes back unchanged from JSON."""
    server = Server()
    server.call(Thing())
    report = (statistics or server.cache.statistics).report()
    assert json.loads(json.dumps(report)) == report


# What is remembered
# ----------------------------------------------------------------------------------


def test_a_remembered_plan_is_recalled_and_counted() -> None:
    """A plan comes back for calls like its own alone, and counts as a reuse."""
    server = Server()
    server.begin(Thing())
    known: Any = Alike("like this")
    server.cache.remember(known, "the plan")
    recalled = [server.begin(Thing(), arguments=each) for each in ("like this", "like that", None)]
    assert recalled == [known, None, None]
    assert (known.plan, server.cache.statistics.reuses) == ("the plan", 1)


def test_the_next_pass_forgets_what_was_remembered() -> None:
    """A call that looks like one of the pass before is a call of this pass."""
    server = Server()
    layer, known = Thing(), Alike("like this")
    server.call(layer)
    server.cache.remember(known, "the plan")  # type: ignore[arg-type]
    server.call(layer)
    assert server.begin(Thing(), arguments="like this") is None


def test_a_remembered_call_is_kept_until_plans_are_forgotten() -> None:
    """Objects by which a call is known stay alive as long as it is known."""
    cache, tensor = Server().cache, torch.zeros(3)
    alive = weakref.ref(tensor)
    cache.remember(Alike("like this", tensor), "the plan")  # type: ignore[arg-type]
    del tensor
    assert alive() is not None
    cache.forget_plans()
    assert alive() is None


@pytest.mark.parametrize("change", ["another role", "another plan", "nothing"])
def test_a_plan_in_a_workspace_is_recalled_while_it_is_there(change: str) -> None:
    """A remembered plan is its own role's, and gone once its slot holds another."""
    server = Server()
    server.begin(Thing())
    lengths = {"cache_seqlens": server.lengths}
    server.cache.plan_in_place(0, DECODE, lengths)
    known: Any = Alike("like this")
    server.cache.remember(known, "the slot", in_place=True)
    if change == "another plan":
        server.cache.plan_in_place(0, changed("window_size"), lengths)
    recalled = server.begin(Thing(), int(change == "another role"), "like this")
    assert recalled is (known if change == "nothing" else None)


# Streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_a_device_without_streams_has_one_state(kind: str) -> None:
    """A CPU issues work in one place and captures nothing."""
    assert stream_probe(torch.device(kind))() == StreamState(0, False)


def test_a_device_with_streams_is_asked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe reads its own device's current stream and capture state when it is called."""
    device = torch.device("cuda", 1)
    streams, captures, asked = [11, 22], [False, True], []

    def current_stream(which: torch.device) -> SimpleNamespace:
        asked.append(which)
        return SimpleNamespace(stream_id=streams.pop(0))

    module = SimpleNamespace(
        current_stream=current_stream, is_current_stream_capturing=lambda: captures.pop(0)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda which: {device: module}[which])
    # A build of torch for CUDA has a quicker way to ask, which is the next test's; it would ask
    # CUDA's driver here.
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    probe = stream_probe(device)
    assert [probe(), probe()] == [StreamState(11, False), StreamState(22, True)]
    assert asked == [device, device]


def test_a_stream_is_told_by_its_handle_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own function for a device's current stream is taken where there is one."""
    handles = {1: 55}
    module = SimpleNamespace(is_current_stream_capturing=lambda: False)
    monkeypatch.setattr(torch, "get_device_module", lambda which: module)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", handles.__getitem__, raising=False)
    probe = stream_probe(torch.device("cuda", 1))
    assert probe() == StreamState(55, False)
    handles[1] = 66
    assert probe() == StreamState(66, False)
