"""The lifetime of a plan: scheduler metadata per forward pass.

A *plan* is FlashAttention-3's scheduler metadata: how the work of one call geometry is split and
ordered. It is a function of the *values* of ``cache_seqlens`` and ``cu_seqlens_q``, which change
with every forward pass, so a plan is valid for one pass of one backend instance and one geometry.
Reusing it any further gives wrong output without any error; computing it once too often costs one
small kernel. Every rule below errs on that side.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from sglang_musa_ext.attention.calls import CallGeometry, KnownCall, KnownVarlenCall

_MOST_EARLIER = 4
"""Calls of passes that are over that the next ones may make again: a model has a few kinds."""
_MOST_VARLEN = 2
"""Kinds of calls over raw keys that a pass remembers, its first ones."""

_Known = TypeVar("_Known", KnownCall, KnownVarlenCall)
Tensors = dict[str, torch.Tensor]
"""The tensors of a call whose contents its plan depends on, by name."""


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
        """Return the identity of ``tensor`` now; whoever stores it must keep ``tensor`` alive."""
        version = -1 if tensor.is_inference() else tensor._version
        # Tensors without storage (meta, empty) all have pointer 0: the object is the identity.
        return cls(tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), version)


class PlanKey(NamedTuple):
    """Everything a plan depends on within a pass, which is of one stream."""

    geometry: CallGeometry
    tensors: tuple[tuple[str, TensorIdentity], ...]


class StreamState(NamedTuple):
    """Where work is being issued: the current stream's id, and whether a graph is capturing it."""

    stream: int
    capturing: bool


def stream_probe(device: torch.device) -> Callable[[], tuple[int, bool]]:
    """Return a function that tells the :class:`StreamState` of ``device`` for the calling thread.

    A CPU has one stream and captures nothing.
    """
    # Every layer asks: a plain tuple takes half as long to make, and the CPU's is made once.
    if device.type in ("cpu", "meta"):
        state = (0, False)
        return lambda: state
    module = torch.get_device_module(device)
    stream, capturing = _stream_id(device, module), module.is_current_stream_capturing
    return lambda: (stream(), capturing())


def _stream_id(device: torch.device, module: Any) -> Callable[[], int]:
    """Return a function that tells the current stream of ``device`` from its other streams.

    It is PyTorch's own where PyTorch has one, as for CUDA: making a ``Stream`` object for every
    layer takes longer than everything else that is asked here.
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
    raw_calls: int = 0
    """Calls over a paged KV cache that were served from the layer's own keys instead."""
    unsplit_calls: int = 0
    """Calls that got no plan because the kernels would not split them."""
    plans: int = 0
    """Plans computed."""
    reuses: int = 0
    """Planned calls served by a plan computed earlier in the same pass."""
    passes_by_plans: Counter[int] = field(default_factory=Counter)
    """Number of passes by how many plans each computed; a pass is counted from its first plan on.
    """

    @property
    def planned_calls(self) -> int:
        """Calls that take a plan: neither those over raw keys nor those that no kernels plan."""
        return self.plans + self.reuses

    @property
    def passes(self) -> int:
        """Forward passes in which at least one plan was computed."""
        return self.passes_by_plans.total()

    def report(self) -> dict[str, Any]:
        """Return the counts as plain data that JSON can carry."""
        names = (
            "passes",
            "calls",
            "raw_calls",
            "unsplit_calls",
            "planned_calls",
            "plans",
            "reuses",
        )
        by_plans = sorted((+self.passes_by_plans).items())
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        counts["passes_by_plans"] = {str(plans): passes for plans, passes in by_plans}
        return counts


class _Plan(NamedTuple):
    """One plan of a pass. ``keeps_alive`` holds the tensors that ``key`` names by address."""

    key: PlanKey
    value: Any
    keeps_alive: Tensors


class Pass:
    """One forward pass: what its calls over a paged cache have so far, which ends with it."""

    __slots__ = (
        "computed",
        "earlier",
        "earlier_varlen",
        "in_place",
        "known",
        "known_varlen",
        "layers",
        "plans",
    )

    def __init__(self, earlier: list[KnownCall], earlier_varlen: list[KnownVarlenCall]) -> None:
        self.earlier = earlier
        """Calls of passes that are over, without their tensors, that this pass may make again."""
        self.earlier_varlen = earlier_varlen
        """Likewise, over raw keys."""
        self.plans: list[_Plan] = []
        """A pass has few of them, and comparing keys takes less time than hashing them."""
        self.known: list[KnownCall] = []
        """Calls that later ones of this pass may be like."""
        self.known_varlen: list[KnownVarlenCall] = []
        """Likewise, over raw keys."""
        self.in_place: dict[int, _Plan] = {}
        """The plan that each call role's slot of the workspace holds."""
        self.layers: dict[Any, object] = {}
        """The layer of each call, by its identity and, from the second call on, role; so an entry
        is one call, and an identity cannot be given to another layer.
        """
        self.computed = 0
        """Plans computed in this pass."""


class SchedulerMetadataCache:
    """The plans of one backend instance, for its current forward pass only.

    Lifetime: a :class:`Pass` goes when it ends, at the latest when the next one begins, or with the
    backend that owns the cache. A pass begins at the first call over a paged cache after any of
    these:

    * :meth:`end_pass` was called (upstream prepared new metadata);
    * upstream's metadata object, the forward batch, the stream or the capture state is another one;
    * a layer comes again for the same call role. Identity of the metadata is not enough: the two
      warm-up runs of a graph and its capture share one metadata object and one forward batch.

    Not thread-safe, as upstream's backend is not: a backend belongs to its model's thread.
    """

    def __init__(self, stream_state: Callable[[], tuple[int, bool]]) -> None:
        """``stream_state`` tells where work is being issued; see :func:`stream_probe`."""
        self._statistics = PlanStatistics()
        self.current = Pass([], [])
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
        self._state: tuple[int, bool] = (0, False)
        self._ended = True
        """True if the current pass has made no call yet."""
        self._unsplit = False
        """True from when a call got no plan because it is not split until it is remembered."""

    @property
    def statistics(self) -> PlanStatistics:
        """The counts, up to the last call."""
        self._count_uses()
        return self._statistics

    def held(self) -> dict[str, int]:
        """Return how much of the pass that runs or ran last is held, as plain data."""
        current = self.current
        return {
            "plans": len(current.plans) + len(current.in_place),
            "known_calls": len(current.known) + len(current.known_varlen),
        }

    @property
    def capturing(self) -> bool:
        """Return whether the current layer's calls are being captured into a graph."""
        return self._state[1]

    def end_pass(self) -> None:
        """Say that whatever comes next belongs to another pass; let go of what this one held."""
        if self._ended:
            return
        self._count_uses()
        self.most_calls = max(self.most_calls, len(self.current.layers))
        current = self.current
        # The slots of plans in a workspace go on to others.
        ended = [known for known in current.known if known.in_place is None]
        self.current = Pass(
            _known_again(ended, current.earlier),
            _known_again(current.known_varlen, current.earlier_varlen),
        )
        self._ended = True

    @property
    def forward_batch(self) -> object:
        """The batch of the layer that is running or ran last, while it lives."""
        return self._forward_batch()

    def begin_layer(self, layer: object, forward_batch: object, forward_metadata: object) -> bool:
        """Note which layer, forward batch and upstream metadata the next calls belong to.

        Returns:
            Whether they may be the first of another pass than the calls before.
        """
        self.layer, self.role = layer, -1
        state = self._stream_state()
        if (
            self._forward_batch() is not forward_batch
            or self._forward_metadata is not forward_metadata
            or self._state != state
        ):
            self._forward_batch, self._forward_metadata = _holder(forward_batch), forward_metadata
            self._state = state
            self.end_pass()
        return self._ended

    def begin_call(self) -> Sequence[KnownCall]:
        """Note the layer's next call over a paged cache.

        Returns:
            The calls of this pass that it may be like. Whoever serves it as one of them adds to its
            ``uses``, and calls :meth:`count_call` otherwise.
        """
        role = self.role = self.role + 1
        layer, current = self.layer, self.current
        call = (id(layer), role) if role else id(layer)
        if call in current.layers:
            self.end_pass()
            current = self.current
        self._ended = False
        current.layers[call] = layer
        if not current.in_place:
            return current.known
        held = current.in_place.get(role)
        # A plan in a workspace must be there still, and the running role's.
        return [
            known
            for known in current.known
            if known.in_place is None or (known.in_place is held and known.role == role)
        ]

    def count_call(self, *, raw: bool = False) -> None:
        """Count a call that is none of those that :meth:`begin_call` returned.

        Args:
            raw: whether it is over a paged cache and served from the layer's own keys.
        """
        self._statistics.calls += 1
        self._statistics.raw_calls += raw
        self._unsplit = False

    def count_unsplit(self) -> None:
        """Count a call that gets no plan because it is not split, and those that are like it."""
        self._statistics.unsplit_calls += 1
        self._unsplit = True

    def _count_uses(self) -> None:
        """Bring calls that were served as known ones into the statistics."""
        statistics = self._statistics
        for known in self.current.known:
            statistics.calls += known.uses
            if known.raw:
                statistics.raw_calls += known.uses
            elif known.plan is not None:
                statistics.reuses += known.uses
            elif known.unsplit:
                statistics.unsplit_calls += known.uses
            known.uses = 0
        for varlen in self.current.known_varlen:
            statistics.calls += varlen.uses
            varlen.uses = 0

    def plan(
        self, geometry: CallGeometry, tensors: Tensors, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, bool]:
        """Return the plan of this pass for a call; and whether it is a reuse.

        Args:
            geometry: what the plan depends on besides tensor contents.
            tensors: the tensors whose contents it depends on.
            compute: makes the plan, if this pass has none yet.
        """
        key = self._key(geometry, tensors)
        for plan in self.current.plans:
            if plan.key == key:
                self._statistics.reuses += 1
                return plan.value, True
        plan = self._computed_plan(key, compute(), tensors)
        self.current.plans.append(plan)
        return plan.value, False

    def plan_in_place(self, role: int, geometry: CallGeometry, tensors: Tensors) -> bool:
        """Tell whether the plan in the slot of ``role`` is this pass's for a call.

        For plans that the kernel writes where it is told to: when the answer is ``False``, the
        caller's kernel writes one now, and the slot holds that from here on.
        """
        key = self._key(geometry, tensors)
        held = self.current.in_place.get(role)
        if held is None or held.key != key:
            self.current.in_place[role] = self._computed_plan(key, None, tensors)
            return False
        self._statistics.reuses += 1
        return True

    def remember(self, known: KnownCall, plan: Any, *, in_place: bool = False) -> None:
        """Have :meth:`begin_call` return ``known`` until the pass ends.

        Args:
            known: describes a call.
            plan: what calls like it get as ``scheduler_metadata``; ``None``: no plan.
            in_place: the plan is in the slot of the running call role.
        """
        known.plan, known.unsplit = plan, self._unsplit
        self._unsplit = False
        if in_place:
            known.role, known.in_place = self.role, self.current.in_place[self.role]
        self.current.known.append(known)

    @property
    def has_room_for_varlen(self) -> bool:
        """Tell whether one more call over raw keys is remembered in this pass.

        A chunk of a prefix has lengths of its own in every layer, so that no call is like it.
        """
        return len(self.current.known_varlen) < _MOST_VARLEN

    def remember_varlen(self, known: KnownVarlenCall) -> None:
        """Have ``known`` found by later calls over raw keys, until the pass ends."""
        self.current.known_varlen.append(known)
        # What ends a pass lets go of it.
        self._ended = False

    def forget_plans(self) -> None:
        """Drop the plans of this pass, so that the next call computes its own."""
        self._count_uses()
        self.current.plans.clear()
        self.current.known.clear()
        self.current.earlier.clear()
        self.current.in_place.clear()

    def _key(self, geometry: CallGeometry, tensors: Tensors) -> PlanKey:
        identities = [(name, TensorIdentity.of(tensor)) for name, tensor in tensors.items()]
        return PlanKey(geometry, tuple(identities))

    def _computed_plan(self, key: PlanKey, value: Any, tensors: Tensors) -> _Plan:
        self._statistics.plans += 1
        passes, current = self._statistics.passes_by_plans, self.current
        if current.computed:
            passes[current.computed] -= 1
        current.computed += 1
        passes[current.computed] += 1
        return _Plan(key, value, tensors)


def _known_again(ended: list[_Known], earlier: list[_Known]) -> list[_Known]:
    """Return the calls that the next pass may make again, without tensors of the one that ends."""
    for known in ended:
        known.release()
    return (ended + earlier)[:_MOST_EARLIER]


def _holder(batch: object) -> Callable[[], object]:
    """Return a function that returns ``batch`` while it lives.

    It is a weak reference where possible, because a batch may hold images.
    """
    try:
        return weakref.ref(batch)
    except TypeError:  # A SimpleNamespace view of a batch (graph replay) has no weak references.
        return lambda: batch
