"""Streams and events: labels, since work is done by the time its call returns."""

from __future__ import annotations

import time
from typing import Any

import torch

import torch_musa
from torch_musa import _MUSAC


def _device(device: Any) -> torch.device:
    return torch.device("musa", torch_musa._index(device))


class Stream(torch.Stream):
    """A queue of work on a device."""

    def __new__(cls, device: Any = None, priority: int = 0, **ids: Any) -> Stream:
        """Make a stream, or name the one that ``stream_id`` says."""
        if ids:
            return super().__new__(cls, **ids)
        return super().__new__(cls, device=_device(device), priority=priority)

    @property
    def musa_stream(self) -> int:
        """The runtime's handle."""
        return self.stream_id

    priority = 0

    def wait_event(self, event: Any) -> None:
        """Do what comes next after ``event``."""
        event.wait(self)

    def wait_stream(self, stream: Any) -> None:
        """Do what comes next after the work of ``stream`` so far."""

    def record_event(self, event: Any = None) -> Any:
        """Mark where this stream stands."""
        event = Event() if event is None else event
        event.record(self)
        return event


class ExternalStream(Stream):
    """A stream that another library made."""

    def __new__(cls, stream_ptr: int, device: Any = None, **_: Any) -> ExternalStream:
        """Name the stream with this handle."""
        return _named(cls, _device(device), stream_ptr)


class Event:
    """A mark in a stream."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        **_: Any,
    ) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        """Mark where ``stream`` stands."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Let ``stream`` wait; all work is done already."""

    def query(self) -> bool:
        """Return whether the work before this mark is done."""
        return True

    def synchronize(self) -> None:
        """Wait for the work before this mark."""
        _MUSAC.refuse_in_capture("synchronizing an event")

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds from this mark to ``end``."""
        if self._time is None or end._time is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._time - self._time) * 1e3


class StreamContext:
    """Issue work on another stream for a while."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is None:
            return
        self._device = torch_musa.current_device()
        self._before = current_stream(self.stream.device)
        set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self.stream is None:
            return
        set_stream(self._before)
        torch_musa.set_device(self._device)


def stream(stream: Any) -> StreamContext:
    """Issue work on ``stream`` for a while."""
    return StreamContext(stream)


def set_stream(stream: Any) -> None:
    """Issue work on ``stream`` from here on."""
    if stream is not None:
        torch_musa.set_device(stream.device_index)
        _MUSAC.set_stream(stream.device_index, stream.stream_id)


def current_stream(device: Any = None) -> Stream:
    """Return the stream that this thread issues work on."""
    where = _device(device)
    return _named(Stream, where, _MUSAC.current_stream(where.index))


def default_stream(device: Any = None) -> Stream:
    """Return a device's first stream."""
    return _named(Stream, _device(device), 0)


def _named(cls: Any, device: torch.device, number: int) -> Any:
    kind = torch.Stream(device=device).device_type
    return Stream.__new__(cls, stream_id=number, device_index=device.index, device_type=kind)
