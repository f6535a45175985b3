"""The memory that MATE writes MLA plans into."""

from __future__ import annotations

import contextlib
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch

SLOT_ALIGNMENT = 256
"""Bytes; what device allocators align to, so that a slot can hold any kernel's records."""


class MLAWorkspaceExhausted(MemoryError):
    """The workspace of a device has no room for one more MLA plan."""

    def __init__(
        self, device: torch.device, needed: int, free: int, capacity: int, slots: int
    ) -> None:
        self.device, self.needed, self.free, self.capacity = device, needed, free, capacity
        super().__init__(
            f"The MLA workspace of {device} has no room for one more plan: {needed} bytes are "
            f"needed, the largest free piece has {free} of {capacity} bytes, and {slots} slots are "
            "in use (a slot belongs to one backend and one call role, and is never shared). Set "
            "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB to a larger number."
        )


@dataclass(frozen=True)
class _Slot:
    start: int
    size: int


class MLAWorkspace:
    """One device's memory for MLA plans, carved into slots.

    MATE writes an MLA plan *into* the tensor it is given, so two plans that are alive at once need
    two places. A slot belongs to one backend and one call role: prefix and suffix of a cascade, the
    micro-batches of an overlap, target and draft each have their own.

    Lifetime: the workspace lives as long as a backend that uses it (:meth:`of_device`); a slot
    lives as long as its owner, because a captured graph holds its address. A slot that must grow
    stays reserved for the same reason, and is replaced by one twice as large where that fits, so
    that growth wastes less than what it gains.
    """

    # Weak: a workspace is kept by the backends that use it, and by nothing else.
    _by_device: ClassVar[weakref.WeakValueDictionary[tuple[torch.device, int], MLAWorkspace]] = (
        weakref.WeakValueDictionary()
    )
    _by_device_lock = threading.Lock()

    def __init__(self, device: torch.device, capacity: int) -> None:
        """Reserve ``capacity`` bytes (uint8) on ``device``."""
        self.device, self.capacity = device, capacity
        self.buffer = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._taken: dict[int, list[_Slot]] = {}
        # Ids of owners that died. A finalizer can run anywhere, also inside a method that holds the
        # lock, so it only appends here; the next slot() returns what they held before it looks
        # anything up by id.
        self._dead: list[int] = []

    @classmethod
    def of_device(cls, device: torch.device, capacity: int) -> MLAWorkspace:
        """The workspace of ``device`` that backends share; keep it, since nothing else does."""
        with cls._by_device_lock:
            workspace = cls._by_device.get((device, capacity))
            if workspace is None:
                workspace = cls._by_device[device, capacity] = cls(device, capacity)
            return workspace

    def slot(self, owner: object, role: int, size: int) -> torch.Tensor:
        """The uint8 tensor of at least ``size`` bytes that belongs to ``owner`` and ``role`` alone.

        Raises:
            MLAWorkspaceExhausted: no free piece is large enough.
        """
        key = (id(owner), role)
        with self._lock:
            self._release_dead()
            slot = self._slots.get(key)
            if slot is None or slot.size < size:
                slot = self._slots[key] = self._grown(owner, slot, _aligned(size))
        return self.buffer[slot.start : slot.start + slot.size]

    def slots_of(self, owner: object) -> int:
        """Return how many slots ``owner`` has, those that it has outgrown among them."""
        with self._lock:
            self._release_dead()
            return len(self._taken.get(id(owner), ()))

    def _grown(self, owner: object, old: _Slot | None, size: int) -> _Slot:
        """Replace ``old`` by a slot of ``size`` bytes, or of twice as many if there is room."""
        if old is not None and 2 * old.size > size:
            with contextlib.suppress(MLAWorkspaceExhausted):
                return self._reserve(owner, 2 * old.size)
        return self._reserve(owner, size)

    def _reserve(self, owner: object, size: int) -> _Slot:
        start = self._first_fit(size)
        slot = _Slot(start, size)
        if id(owner) not in self._taken:
            self._taken[id(owner)] = []
            weakref.finalize(owner, self._dead.append, id(owner)).atexit = False
        self._taken[id(owner)].append(slot)
        return slot

    def _first_fit(self, size: int) -> int:
        end, largest = 0, 0
        taken = sorted(
            (slot for slots in self._taken.values() for slot in slots), key=lambda slot: slot.start
        )
        for slot in [*taken, _Slot(self.capacity, 0)]:
            if slot.start - end >= size:
                return end
            largest, end = max(largest, slot.start - end), slot.start + slot.size
        raise MLAWorkspaceExhausted(self.device, size, largest, self.capacity, len(taken))

    def _release_dead(self) -> None:
        while self._dead:
            owner_id = self._dead.pop()
            del self._taken[owner_id]
            self._slots = {key: slot for key, slot in self._slots.items() if key[0] != owner_id}


def _aligned(size: int) -> int:
    return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
