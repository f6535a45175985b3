"""How long a plan lives: scheduler metadata per forward pass, and the workspace that holds MLA
plans.

A *plan* is FlashAttention-3's scheduler metadata: how the work of one call geometry is split and
ordered. It is a function of the *values* of ``cache_seqlens`` and ``cu_seqlens_q``, which change
with every forward pass, so a plan is valid for one pass of one backend instance and one geometry.
Reusing it any further gives wrong output without any error; computing it once too often costs one
small kernel. Every rule below errs on that side.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

SLOT_ALIGNMENT = 256
"""Bytes; what device allocators align to, so that a slot can hold any kernel's records."""


class CallGeometry(NamedTuple):
    """What a plan depends on besides the contents of tensors; field names are FA3's."""

    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    """Capacity of the page table in tokens: the bound that the kernel itself uses, so that splits
    never exceed it.
    """
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int
    qkv_dtype: torch.dtype
    page_size: int | None
    causal: bool
    window_size: tuple[int, int]
    attention_chunk: int
    has_softcap: bool
    num_splits: int
    pack_gqa: bool | None
    sm_margin: int
    has_qv: bool
    device: torch.device


class TensorIdentity(NamedTuple):
    """Stands for a tensor's contents in a key: the same storage, unchanged since.

    The version is -1 for tensors made under ``inference_mode``, which count no versions; a change
    of their contents within a pass is then visible only through the pass rules of
    :class:`SchedulerMetadataCache`.
    """

    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorIdentity:
        """The identity of ``tensor`` now; whoever stores it must keep ``tensor`` alive."""
        version = -1 if tensor.is_inference() else tensor._version
        # Tensors without storage (meta, empty) all have pointer 0: there the object itself is the
        # identity.
        return cls(tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride(), version)


class PlanKey(NamedTuple):
    """Everything a plan depends on within a pass, which is of one stream."""

    geometry: CallGeometry
    tensors: tuple[TensorIdentity | None, ...]


class StreamState(NamedTuple):
    """Where work is being issued: the current stream's id, and whether a graph is capturing it."""

    stream: int
    capturing: bool


def stream_probe(device: torch.device) -> Callable[[], tuple[int, bool]]:
    """A call that returns the :class:`StreamState` of ``device`` for the calling thread.

    A CPU has one stream and captures nothing.
    """
    if device.type in ("cpu", "meta"):
        return functools.partial(StreamState, 0, False)
    module = torch.get_device_module(device)
    stream, capturing = _stream_id(device, module), module.is_current_stream_capturing
    # Every layer asks, and a plain tuple takes half as long to make.
    return lambda: (stream(), capturing())


def _stream_id(device: torch.device, module: Any) -> Callable[[], int]:
    """A call that returns what tells the current stream of ``device`` from its other streams.

    PyTorch's own name for it, where it has one, as for CUDA: every layer asks, and making a
    ``Stream`` object takes longer than everything else that is asked here.
    """
    raw = getattr(torch._C, f"_{device.type}_getCurrentRawStream", None)
    if raw is None or device.index is None:
        return lambda: int(module.current_stream(device).stream_id)
    return functools.partial(raw, device.index)


@dataclass
class PlanStatistics:
    """Counts since the backend was built; what the server's report and the tests read."""

    calls: int = 0
    """Attention kernel calls of any kind."""
    plans: int = 0
    """Plans computed."""
    reuses: int = 0
    """Planned calls served by a plan computed earlier in the same pass."""
    passes_by_plans: Counter[int] = field(default_factory=Counter)
    """Number of passes by how many plans each computed; a pass is counted from its first plan on.
    """

    @property
    def planned_calls(self) -> int:
        """Calls that take a plan; attention over raw keys and values needs none, and some calls no
        kernels can plan.
        """
        return self.plans + self.reuses

    @property
    def passes(self) -> int:
        """Forward passes in which at least one planned call was made."""
        return self.passes_by_plans.total()

    def report(self) -> dict[str, Any]:
        """The counts as plain data that JSON can carry."""
        counts = {
            name: getattr(self, name)
            for name in ("passes", "calls", "planned_calls", "plans", "reuses")
        }
        return counts | {
            "passes_by_plans": {
                str(n): passes for n, passes in sorted((+self.passes_by_plans).items())
            }
        }


@dataclass(frozen=True)
class _Plan:
    """One plan of the current pass. ``keeps_alive`` holds the tensors that ``key`` names by
    address.
    """

    key: PlanKey
    value: Any
    keeps_alive: tuple[torch.Tensor | None, ...]


NOT_REMEMBERED = object()
"""What a pass gives for a signature that it does not know; ``None`` says that a call takes no plan.
"""


class SchedulerMetadataCache:
    """The plans of one backend instance, for its current forward pass only.

    Lifetime: everything here is dropped when the next pass begins, and with the backend that owns
    the cache. A pass begins at the first call over a paged cache after any of these:

    * :meth:`end_pass` was called (upstream prepared new metadata);
    * upstream's metadata object, the forward batch, the stream or the capture state is another one;
    * a layer comes again for the same call role. Identity of the metadata is not enough: the two
      warm-up runs of a graph and its capture share one metadata object and one forward batch.

    Not thread-safe, as upstream's backend is not: a backend belongs to the thread that runs its
    model.
    """

    def __init__(self, stream_state: Callable[[], tuple[int, bool]]) -> None:
        """``stream_state`` tells where work is being issued; see :func:`stream_probe`."""
        self.statistics = PlanStatistics()
        self.layer: object = None
        """The layer that is running, or ran last; ``None`` where no layer makes the call."""
        self.role = -1
        """The ordinal of the running call among the layer's (0 prefix, 1 suffix of a cascade)."""
        self.most_calls = 0
        """The most calls over a paged cache that a pass has made, of those that are over."""
        self._stream_state = stream_state
        # Where the current pass stands; compared at every layer.
        self._forward_batch: Callable[[], object] = lambda: None
        self._forward_metadata: object = None
        self._state: tuple[int, bool] = StreamState(0, False)
        # What the current pass has; dropped by _begin_pass.
        self._ended = True
        self._plans: dict[PlanKey, _Plan] = {}
        self._remembered: list[tuple[object, Any, tuple[torch.Tensor | None, ...]]] = []
        self._places: dict[int, _Plan] = {}
        self._seen: dict[tuple[int, int], object] = {}
        self._computed = 0

    @property
    def capturing(self) -> bool:
        """Whether the calls of the current layer are being captured into a graph."""
        return self._state[1]

    def end_pass(self) -> None:
        """Say that whatever comes next belongs to another pass."""
        self._ended = True

    def begin_layer(self, layer: object, forward_batch: object, forward_metadata: object) -> None:
        """Note which layer, forward batch and upstream metadata the next calls belong to."""
        self.layer, self.role = layer, -1
        state = self._stream_state()
        if (
            self._forward_batch() is not forward_batch
            or self._forward_metadata is not forward_metadata
            or self._state != state
        ):
            self._forward_batch, self._forward_metadata = _holder(forward_batch), forward_metadata
            self._state = state
            self._ended = True

    def begin_call(self, signature: object = None) -> Any:
        """Note the layer's next call over a paged cache, and give what this pass remembers for
        ``signature``.

        Returns:
            What was given to :meth:`remember`, or :data:`NOT_REMEMBERED`.
        """
        self.role += 1
        call = (id(self.layer), self.role)
        if self._ended or call in self._seen:
            self._begin_pass()
        self._seen[call] = self.layer
        # A pass has few of them, and comparing takes less time than hashing.
        for known, plan, _ in self._remembered:
            if known == signature:
                if plan is not None:
                    self.statistics.reuses += 1
                return plan
        return NOT_REMEMBERED

    def plan(
        self,
        geometry: CallGeometry,
        tensors: tuple[torch.Tensor | None, ...],
        compute: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, bool]:
        """The plan of this pass for ``geometry`` and the contents of ``tensors``; and whether it is
        a reuse.

        Args:
            geometry: what the plan depends on besides tensor contents.
            tensors: the tensors whose contents it depends on; ``None`` where a call passes none.
            compute: makes the plan, if this pass has none yet.
        """
        key = self._key(geometry, tensors)
        known = self._plans.get(key)
        if known is None:
            known = self._plans[key] = self._computed_plan(key, compute(), tensors)
            return known.value, False
        self.statistics.reuses += 1
        return known.value, True

    def plan_in_place(
        self, place: int, geometry: CallGeometry, tensors: tuple[torch.Tensor | None, ...]
    ) -> bool:
        """Whether the plan that ``place`` holds is this pass's for ``geometry`` and ``tensors``.

        For plans that the kernel writes where it is told to: when the answer is ``False``, the
        caller's kernel writes one now, and ``place`` holds that from here on.
        """
        key = self._key(geometry, tensors)
        held = self._places.get(place)
        if held is None or held.key != key:
            self._places[place] = self._computed_plan(key, None, tensors)
            return False
        self.statistics.reuses += 1
        return True

    def remember(
        self, signature: object, plan: Any, tensors: tuple[torch.Tensor | None, ...]
    ) -> None:
        """Have :meth:`begin_call` give ``plan`` for ``signature`` until the pass ends.

        Args:
            signature: says of a call everything that its plan depends on; ``None``: of a call that
                has none.
            plan: its plan; ``None``: it takes none.
            tensors: what ``signature`` names by address, which is kept alive as long.
        """
        if signature is not None:
            self._remembered.append((signature, plan, tensors))

    def forget_plans(self) -> None:
        """Drop the plans of this pass, so that the next call computes its own."""
        self._plans.clear()
        self._remembered.clear()
        self._places.clear()

    def _key(self, geometry: CallGeometry, tensors: tuple[torch.Tensor | None, ...]) -> PlanKey:
        identities = tuple(
            None if tensor is None else TensorIdentity.of(tensor) for tensor in tensors
        )
        return PlanKey(geometry, identities)

    def _computed_plan(
        self, key: PlanKey, value: Any, tensors: tuple[torch.Tensor | None, ...]
    ) -> _Plan:
        self.statistics.plans += 1
        passes = self.statistics.passes_by_plans
        if self._computed:
            passes[self._computed] -= 1
        self._computed += 1
        passes[self._computed] += 1
        return _Plan(key, value, tensors)

    def _begin_pass(self) -> None:
        self.most_calls = max(self.most_calls, len(self._seen))
        self.forget_plans()
        self._seen.clear()
        self._ended = False
        self._computed = 0


def _holder(batch: object) -> Callable[[], object]:
    """A call that returns ``batch`` while it lives: weak where possible, because a batch may hold
    images.
    """
    try:
        return weakref.ref(batch)
    except TypeError:  # A SimpleNamespace view of a batch (graph replay) has no weak references.
        return lambda: batch


class MLAWorkspaceExhausted(MemoryError):
    """The workspace of a device has no room for one more MLA plan."""

    def __init__(
        self, device: torch.device, needed: int, free: int, capacity: int, slots: int
    ) -> None:
        self.device, self.needed, self.free, self.capacity = device, needed, free, capacity
        super().__init__(
            f"The MLA workspace of {device} has no room for one more plan: {needed} bytes are "
            "needed, the largest "
            f"free piece has {free} of {capacity} bytes, and {slots} slots are in use (a slot "
            "belongs to one backend "
            "and one call role, and is never shared). Set SGLANG_MUSA_EXT_MLA_WORKSPACE_MB to a "
            "larger number."
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

    def _grown(self, owner: object, old: _Slot | None, size: int) -> _Slot:
        """A slot of at least ``size`` bytes in place of ``old``: twice as large where there is room
        for that.
        """
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
