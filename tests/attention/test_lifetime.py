"""The memory that a backend holds, and when it goes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention.workspace import MLAWorkspace, MLAWorkspaceExhausted
from tests.support.backend import (
    Model,
)
from tests.support.layers import (
    mla_model,
    uniform_layers,
)


@pytest.fixture
def own_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends share a workspace of a size that no other test asks for.

    Backends of other tests may be there for good: modules of SGLang keep the error of an import
    that they can do without (``torch_memory_saver``), and with it every frame of whatever test
    imported them first.
    """
    monkeypatch.setenv(envs.MLA_WORKSPACE_MB, "7")


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_dropping_a_backend_frees_what_it_held(mla: bool, own_workspace: None) -> None:
    """After a model reload the old backend's cache, tensors, batch and slots are gone."""
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


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_passes_leave_nothing_behind(mla: bool) -> None:
    """After many batches a backend keeps the plans, calls and slots of one, and says so."""
    model = mla_model() if mla else Model(uniform_layers(2))
    backend = model.backend()
    requests = model.requests(300, 5, 40)
    held = []
    for count in (1, 2, 3) * 4:
        # Each adds a token, so no two batches have the same lengths.
        model.run_pass(backend, model.decode(requests[:count]))
        held.append(backend.musa_fa3_report()["held"])
    slots = {"mla_slots": 1 if mla else 0}
    assert held[0] == {"plans": 1, "known_calls": 1, "kinds_of_calls": 1} | slots
    assert held[-1] | slots == held[0]
    # A slot that must grow stays reserved, for the graphs that hold its address.
    assert held[-1]["mla_slots"] <= 2 * slots["mla_slots"]


def test_slots_of_a_dropped_backend_serve_the_next(own_workspace: None) -> None:
    """While another backend keeps the workspace, a reloaded model takes the old one's room."""
    # Backends of tests before, which nothing holds any more, would go in the middle of this one.
    gc.collect()
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
    """A backend without room refuses and names the setting; the one that has a slot goes on."""
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
