"""The benchmark's probe in the processes of an engine: who serves, how long, and by what kernels.

SGLang loads it as a plugin, through an entry point that ``peers.py`` writes into a folder of its
own. It measures all peers alike, and changes nothing of what they compute: two device events around
each forward of a model, and a clock around each attention call that Python makes. Where it is told
to, it has the backends of several peers serve one engine's passes in turn.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_musa_ext.engines.devices import device_kind, device_module
from sglang_musa_ext.engines.process import FORCE_UPDATE

PEER = "MUSA_EXT_BENCH_PEER"
"""The environment variable that says which peer this engine is."""
GATE = "MUSA_EXT_BENCH_GATE"
"""The variable that names a file; until it is there, a scheduler stops after its imports."""
DEVICE = "MUSA_EXT_BENCH_DEVICE"
"""The variable that says which kind of device is measured: ``cuda``, ``musa`` or ``cpu``."""
UPSTREAM, OURS, IN_TREE, TRITON, NO_REUSE = (
    "upstream",
    "ours",
    "in-tree",
    "triton",
    "ours without reuse",
)
"""The peers."""
AGAIN, UNPLANNED = "upstream again", "ours without plans"
"""Companions of the peers where they take turns in one engine: a second backend of the
baseline's shows what two of the same differ by, and ours without plans what plans do.
"""
FORWARD_MODES = {
    "decode": "DECODE",
    "verify": "TARGET_VERIFY",
    "prefill": "EXTEND",
    "eager": "DECODE",
}
"""SGLang's names of the passes of each kind of place."""


@dataclass
class Forward:
    """One forward of a model, while its events may still lie ahead of the device."""

    peer: str
    turn: int
    mode: str
    batch: int
    tokens: int
    draft: bool
    start: Any
    end: Any
    host: float
    attention_calls: int
    attention_host: float


class Clock:
    """Events of the device, or on a CPU the time itself."""

    def __init__(self) -> None:
        kind = os.environ.get(DEVICE, "")
        self._device = device_module(kind or device_kind())

    def now(self) -> Any:
        """Return a point in the current stream's work."""
        if self._device is None:
            return time.perf_counter()
        event = self._device.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the time from one point to another, once :meth:`settle` has returned."""
        return float(start.elapsed_time(end)) if self._device is not None else 1e3 * (end - start)

    def settle(self) -> None:
        """Wait until the device has done everything."""
        if self._device is not None:
            self._device.synchronize()

    def capturing(self) -> bool:
        """Return whether the current stream is being captured, where no event can be timed."""
        return self._device is not None and self._device.is_current_stream_capturing()

    def activities(self) -> list[Any]:
        """Return what a profiler traces here: the device's kernels, or on a CPU its operators."""
        import torch

        kinds = torch.profiler.ProfilerActivity
        if self._device is None:
            return [kinds.CPU]
        # PyTorch's module of the device has the name of its activity.
        return [getattr(kinds, self._device.__name__.rpartition(".")[2].upper(), kinds.CUDA)]

    def memory(self) -> dict[str, int]:
        """Return the bytes that PyTorch's allocator has given out and holds, with graph pools."""
        if self._device is None:
            return {}
        return {
            "allocated": self._device.memory_allocated(),
            "reserved": self._device.memory_reserved(),
        }


class Turns:
    """Attention backends of several peers in one engine, which serve its passes in turn.

    Where the host limits a pass, or the place of its tensors in memory counts, two processes of the
    same code differ by more than the peers do. In one process they have the same processor, the
    same tensors and the same moment. Each round of turns has another order, so that none always
    comes after the same one. Passes under graphs stay those of the backend that they were captured
    with.
    """

    def __init__(self, runner: Any, own: str) -> None:
        """``own`` is the peer whose backend ``runner``, a ``ModelRunner``, has."""
        self._runner, self._own = runner, own
        self._backends = {own: runner.attn_backend}
        self._peers: list[str] = []
        self._mode: str | None = None
        self._left: list[str] = []
        self.rounds = 0
        """Rounds of turns that have begun."""
        self._order = random.Random(0)
        self._leave: Callable[[], None] = lambda: None

    def among(self, peers: Sequence[str], mode: str | None) -> None:
        """Have these peers take turns from the next pass of ``mode`` on, or with ``None`` of any.

        The engine's own backend serves the other passes; without any peers, all, as before.
        """
        self._serve(self._own)
        for name in peers:
            if name not in self._backends:
                self._backends[name] = BACKENDS[name](self._runner)
        self._peers, self._mode, self._left = list(peers), mode, []

    def next(self, batch: Any) -> str:
        """Give the pass of a ``ForwardBatch`` to the peer whose turn it is, and say who it is."""
        name = self._own
        if self._peers and self._mode in (None, batch.forward_mode.name):
            if not self._left:
                self._left = self._order.sample(self._peers, len(self._peers))
                self.rounds += 1
            name = self._left.pop()
        self._serve(name)
        if hasattr(batch, "attn_backend"):  # As in 0.5.11, where layers ask the batch for it.
            batch.attn_backend = self._runner.attn_backend
        return name

    def _serve(self, name: str) -> None:
        self._leave()
        self._leave = _dispatched() if name in OF_THIS_PACKAGE else lambda: None
        self._runner.attn_backend = self._backends[name]


def _dispatched() -> Callable[[], None]:
    """Lead the kernels that upstream's forwards call to our backend; return the undo."""
    from sglang_musa_ext.attention import selection as attention

    return attention.install_kernel_dispatch()


def _ours(runner: Any, **settings: str) -> Any:
    from sglang_musa_ext import envs
    from sglang_musa_ext.attention import selection as attention

    # Where this package is off, as in the baseline's engine, it reads none of its other settings.
    with _environment({envs.MODE: "on", **settings}):
        return attention.MusaFA3Backend(runner)


def _without_reuse(runner: Any) -> Any:
    """Build our backend with a plan for every call."""
    return _ours(runner, **{FORCE_UPDATE: "1"})


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Have these variables set, and afterwards be as they were."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _unplanned(runner: Any) -> Any:
    """Build our backend with all that it does but plan: kernel calls plan for themselves."""
    backend = _ours(runner)
    backend._scheduler_metadata = lambda *_: None
    return backend


def _again(runner: Any) -> Any:
    return type(runner.attn_backend)(runner)


def _in_tree(runner: Any) -> Any:
    from sglang_musa_ext.benchmark.in_tree import create_in_tree

    return create_in_tree(runner)


BACKENDS: Mapping[str, Callable[[Any], Any]] = {
    OURS: _ours, NO_REUSE: _without_reuse, IN_TREE: _in_tree, AGAIN: _again, UNPLANNED: _unplanned,
}  # fmt: skip
"""Builders of a backend in an engine of the baseline's, whose own one serves meanwhile."""
OF_THIS_PACKAGE = (OURS, NO_REUSE, UNPLANNED)
"""Those of them that need the kernels of upstream's forwards led to them."""


class Probe:
    """The measurements of one process."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.forwards: list[Forward] = []
        self.calls, self.attention_host = 0, 0.0
        self.traces: list[dict[str, Any]] = []
        self._wanted: tuple[str, int] | None = None
        self.runner: Any = None
        self._peer = os.environ.get(PEER, "")
        self._turns: Turns | None = None
        self._server: Any = None

    def forward(
        self, original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """``ModelRunner.forward``, measured."""
        run = functools.partial(original, runner, batch, *args, **kwargs)
        if self.clock.capturing():
            return run()
        if not runner.is_draft_worker:
            self.runner = runner
        mode = batch.forward_mode.name
        if self._wanted and self._wanted[0] == mode and not runner.is_draft_worker:
            return self._traced(mode, run)
        peer = self._peer if self._turns is None else self._turns.next(batch)
        self.calls, self.attention_host, self._server = 0, 0.0, None
        start, began = self.clock.now(), time.perf_counter()
        result = run()
        host, end = time.perf_counter() - began, self.clock.now()
        tokens = 0 if batch.input_ids is None else batch.input_ids.numel()
        if self._turns and self._server not in (None, runner.attn_backend):
            raise RuntimeError(
                f"{type(self._server).__name__} served where it was the turn of {peer}."
            )
        counts = self.calls, self.attention_host
        draft = runner.is_draft_worker
        turn = self._turns.rounds if self._turns else 0
        self.forwards.append(
            Forward(peer, turn, mode, batch.batch_size, tokens, draft, start, end, host, *counts)
        )
        return result

    def attend(self, original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> Any:
        """``AttentionBackend.forward``, with the host's time in it counted."""
        began = time.perf_counter()
        result = original(backend, *args, **kwargs)
        self.calls += 1
        self.attention_host += time.perf_counter() - began
        self._server = backend
        return result

    def take_turns(self, peers: Sequence[str], mode: str | None = None) -> None:
        """Have backends of these peers serve target passes in turn; see :class:`Turns`."""
        self._turns = self._turns or Turns(self.runner, self._peer)
        self._turns.among(peers, mode)

    def want_trace(self, mode: str, passes: int) -> None:
        """Trace the kernels of the next ``passes`` forwards of ``mode``."""
        self._wanted = (mode, passes)

    def _traced(self, mode: str, run: Callable[[], Any]) -> Any:
        import torch

        assert self._wanted is not None
        left = self._wanted[1] - 1
        self._wanted = (mode, left) if left else None
        self.clock.settle()
        with torch.profiler.profile(activities=self.clock.activities()) as trace:
            result = run()
            self.clock.settle()
        kernels: dict[str, list[float]] = {}
        for entry in trace.key_averages():
            # Names of kernels differ in what comes later, too.
            sums = kernels.setdefault(entry.key[:160], [0, 0.0])
            sums[0] += entry.count
            sums[1] += float(getattr(entry, "self_device_time_total", 0.0))
        self.traces.append({"mode": mode, "kernels": kernels})
        return result

    def drain(self) -> dict[str, Any]:
        """Return all since the last call as plain data: times in ms, the host's in µs."""
        self.clock.settle()
        rows: list[dict[str, Any]] = []
        before: Any = None
        for forward in self.forwards:
            since = None if before is None else self.clock.milliseconds(before, forward.end)
            rows.append(
                {
                    "peer": forward.peer, "turn": forward.turn, "mode": forward.mode,
                    "batch": forward.batch, "tokens": forward.tokens,
                    "draft": forward.draft, "since": since,
                    "forward": self.clock.milliseconds(forward.start, forward.end),
                    "host_us": 1e6 * forward.host,
                    "calls": forward.attention_calls, "attention_us": 1e6 * forward.attention_host,
                }
            )  # fmt: skip
            if not forward.draft:
                before = forward.end
        drained = {
            "forwards": rows,
            "traces": self.traces,
            "backend": self._backend(),
            "memory": self.clock.memory(),
        }
        self.forwards, self.traces = [], []
        return drained

    def _backend(self) -> str:
        backend = getattr(self.runner, "attn_backend", None)
        return "none" if backend is None else type(backend).__name__


def register() -> None:
    """SGLang's plugin: put the probe into this process, and the in-tree backend if that is due."""
    if multiprocessing.parent_process() is not None:
        # Imports take longer than all the rest, so engines of all models do them at the same time.
        _wait_for(Path(os.environ[GATE]))
    # On a MUSA device SGLang serves its in-tree backend by itself, on MATE.
    if os.environ.get(PEER) == IN_TREE and os.environ.get(DEVICE) != "musa":
        from sglang_musa_ext.benchmark.in_tree import serve_in_tree

        serve_in_tree()
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    probe = _Lazy()
    _wrap(
        ModelRunner,
        "forward",
        lambda original, *args, **kwargs: probe().forward(original, *args, **kwargs),
    )
    _wrap(
        AttentionBackend,
        "forward",
        lambda original, *args, **kwargs: probe().attend(original, *args, **kwargs),
    )

    def with_measurements(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reply = original(*args, **kwargs)
        # As text, because a scheduler's state takes plain values alone.
        reply.internal_state["bench"] = json.dumps(probe().drain())
        return reply

    _wrap(Scheduler, "get_internal_state", with_measurements)
    Scheduler.bench_trace = lambda self, mode, passes: probe().want_trace(mode, passes)
    Scheduler.bench_turns = lambda self, peers, mode: probe().take_turns(peers, mode)


def _wait_for(page: Path) -> None:
    parent = multiprocessing.parent_process()
    while not page.exists():
        if parent is None or not parent.is_alive():
            raise SystemExit("The benchmark ended before this engine's turn.")
        time.sleep(0.1)


class _Lazy:
    """The probe of this process, made when the first forward has chosen the device."""

    def __init__(self) -> None:
        self._probe: Probe | None = None

    def __call__(self) -> Probe:
        self._probe = self._probe or Probe()
        return self._probe


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, method)


def measurements(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a scheduler's state says of the forwards since it was last asked.

    Raises:
        RuntimeError: the probe is not in that process; SGLang only logs what a plugin raises.
    """
    if "bench" not in state:
        raise RuntimeError(
            "The engine runs without the benchmark's probe: its log says why SGLang did not load "
            "it."
        )
    measured: dict[str, Any] = json.loads(state["bench"])
    return measured
