"""The workspace of a device and its slots."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from sglang_musa_ext.attention import workspace as workspace_module
from sglang_musa_ext.attention.workspace import (
    SLOT_ALIGNMENT,
    MLAWorkspace,
    MLAWorkspaceExhausted,
)

CPU = torch.device("cpu")


class Thing:
    """An owner: something with an identity and weak references."""


@pytest.fixture
def often_switching() -> Iterator[None]:
    """Let threads alternate after a few instructions, so that a race shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def span(slot: torch.Tensor) -> range:
    """The addresses of a slot's bytes."""
    return range(slot.data_ptr(), slot.data_ptr() + slot.numel())


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    return max(span(first).start, span(second).start) < min(span(first).stop, span(second).stop)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_a_slot_is_large_enough_and_aligned(size: int) -> None:
    """Every slot holds what was asked for and begins where a device allocator would begin."""
    workspace = MLAWorkspace(CPU, 8192)
    owner = Thing()
    for role in range(3):
        slot = workspace.slot(owner, role, size)
        assert slot.numel() >= size
        assert (slot.data_ptr() - workspace.buffer.data_ptr()) % SLOT_ALIGNMENT == 0
        assert slot.dtype == torch.uint8
        assert slot.is_contiguous()


def test_a_slot_stays_where_it_is() -> None:
    """An owner's role gets the same memory, also for a smaller plan: a graph holds its address."""
    workspace = MLAWorkspace(CPU, 4096)
    owner = Thing()
    slot = workspace.slot(owner, 0, 512)
    for size in (512, 1, 300):
        assert span(workspace.slot(owner, 0, size)) == span(slot)


def test_slots_of_owners_and_roles_never_overlap() -> None:
    """Each pair of owner and role has memory of its own."""
    workspace = MLAWorkspace(CPU, 8192)
    owners = [Thing(), Thing(), Thing()]
    slots = [workspace.slot(owner, role, 300) for owner in owners for role in range(3)]
    assert not any(overlap(slot, other) for i, slot in enumerate(slots) for other in slots[:i])


def test_a_slot_that_grows_leaves_the_old_one_reserved() -> None:
    """A captured graph still writes to the smaller slot, so nobody else may have it."""
    workspace = MLAWorkspace(CPU, 8192)
    owner, other = Thing(), Thing()
    small = workspace.slot(owner, 0, 256)
    large = workspace.slot(owner, 0, 257)
    assert large.numel() >= 2 * small.numel()
    later = [workspace.slot(other, role, 256) for role in range(4)]
    assert not any(overlap(small, slot) for slot in (large, *later))
    assert span(workspace.slot(owner, 0, 1)) == span(large)


def test_growth_reserves_at_most_twice_the_largest_slot() -> None:
    """A plan that grows by a little each time does not use the workspace up."""
    workspace = MLAWorkspace(CPU, 16384)
    owner = Thing()
    for size in range(256, 4097, 64):
        workspace.slot(owner, 0, size)
    assert workspace.slot(Thing(), 0, 16384 - 2 * 4096).numel() == 8192


def test_a_slot_grows_into_what_is_free() -> None:
    """A plan that fits is not refused because twice the old slot would not fit."""
    workspace = MLAWorkspace(CPU, 2560)
    owner = Thing()
    workspace.slot(owner, 0, 1024)
    assert workspace.slot(owner, 0, 1280).numel() >= 1280


def test_the_memory_of_a_dead_owner_is_given_to_another() -> None:
    """When a backend dies, its slots of all roles and sizes are free again."""
    workspace = MLAWorkspace(CPU, 1024)
    owner = Thing()
    workspace.slot(owner, 0, 256)
    workspace.slot(owner, 1, 512)
    del owner
    assert workspace.slot(Thing(), 0, 1024).numel() == 1024


def test_a_new_owner_at_the_address_of_a_dead_one_inherits_nothing() -> None:
    """Owners are told apart although Python gives their address away."""
    workspace = MLAWorkspace(CPU, 1024)
    survivor = Thing()
    for _ in range(50):
        owner = Thing()
        workspace.slot(owner, 0, 256)
        assert not overlap(workspace.slot(owner, 0, 256), workspace.slot(survivor, 0, 512))
        assert workspace.slot(owner, 0, 1).numel() == 256
        del owner


def test_an_owner_may_die_while_a_slot_is_being_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer that runs inside ``slot`` neither waits for its lock forever nor disturbs it."""
    workspace = MLAWorkspace(CPU, 1024)
    dying = [Thing()]
    workspace.slot(dying[0], 0, 256)
    aligned = workspace_module._aligned

    def aligned_while_an_owner_dies(size: int) -> int:
        assert workspace._lock.locked()
        dying.clear()
        return aligned(size)

    monkeypatch.setattr(workspace_module, "_aligned", aligned_while_an_owner_dies)
    living = Thing()
    results: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: results.append(workspace.slot(living, 0, 256)), daemon=True
    )
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "slot() waits for a lock that it holds"
    assert not dying
    later = [workspace.slot(living, 1, 512), workspace.slot(living, 2, 256)]
    assert not any(overlap(results[0], slot) for slot in later)


def test_exhaustion_names_numbers_and_the_remedy() -> None:
    """The error says what was needed, free and there in all, and which variable enlarges it."""
    workspace = MLAWorkspace(CPU, 1024)
    owner = Thing()
    workspace.slot(owner, 0, 512)
    with pytest.raises(MLAWorkspaceExhausted) as caught:
        workspace.slot(owner, 1, 700)
    error = caught.value
    assert (error.device, error.needed, error.free, error.capacity) == (CPU, 768, 512, 1024)
    for part in ("cpu", "768", "512", "1024", "1 slots", "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"):
        assert part in str(error)
    assert isinstance(error, MemoryError)


def test_exhaustion_leaves_the_workspace_as_it_was() -> None:
    """After a refusal, the slots that exist still do, and what fits is still given."""
    workspace = MLAWorkspace(CPU, 1024)
    owner = Thing()
    slot = workspace.slot(owner, 0, 512)
    with pytest.raises(MLAWorkspaceExhausted):
        workspace.slot(Thing(), 0, 1024)
    assert span(workspace.slot(owner, 0, 512)) == span(slot)
    assert workspace.slot(owner, 1, 512).numel() == 512


def test_backends_of_a_device_share_a_workspace() -> None:
    """Backends that ask for the same device get one workspace, and another device has another."""
    cpu, again = (MLAWorkspace.of_device(CPU, 1024) for _ in range(2))
    meta = MLAWorkspace.of_device(torch.device("meta"), 1024)
    assert cpu is again
    assert meta is not cpu
    assert (cpu.buffer.device.type, meta.buffer.device.type) == ("cpu", "meta")


def test_workspaces_of_two_devices_have_slots_of_their_own() -> None:
    """A full workspace of one device says nothing of another's."""
    cpu, meta = MLAWorkspace.of_device(CPU, 512), MLAWorkspace.of_device(torch.device("meta"), 512)
    owner = Thing()
    assert cpu.slot(owner, 0, 512).device.type == "cpu"
    assert meta.slot(owner, 0, 512).device.type == "meta"


def test_an_unused_workspace_is_freed() -> None:
    """When no backend has the workspace any more, its memory goes back to the device."""
    workspace = MLAWorkspace.of_device(CPU, 2048)
    owner = Thing()
    workspace.slot(owner, 0, 256)
    held = weakref.ref(workspace)
    buffer = weakref.ref(workspace.buffer)
    del workspace
    gc.collect()
    assert held() is None
    assert buffer() is None
    assert MLAWorkspace.of_device(CPU, 2048).slot(owner, 0, 2048).numel() == 2048


def test_threads_never_get_overlapping_slots(often_switching: None) -> None:
    """Micro-batches on threads, whose backends come and go, keep their bytes to themselves."""
    workspace = MLAWorkspace(CPU, 1 << 16)
    clashes: list[int] = []
    start = threading.Barrier(4)

    def hammer(mark: int) -> None:
        pick = random.Random(mark)
        start.wait()
        for _ in range(60):
            owner = Thing()
            slots = [workspace.slot(owner, role, pick.randrange(1, 3000)) for role in range(2)]
            for role, slot in enumerate(slots):
                slot.fill_(2 * mark + role)
            again = [workspace.slot(owner, role, 1) for role in range(2)]
            clashes.extend(
                mark for role, slot in enumerate(again) if not bool((slot == 2 * mark + role).all())
            )
            del owner

    threads = [threading.Thread(target=hammer, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert workspace.slot(Thing(), 0, 1 << 16).numel() == 1 << 16
