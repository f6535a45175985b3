"""Graphs of the simulated device, under the names of the vendor's."""

from __future__ import annotations

import itertools
from typing import Any

import torch_musa
from torch_musa import _MUSAC

_handles = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    """Return the name of a new pool of memory."""
    return (0, next(_handles))


def is_current_stream_capturing() -> bool:
    """Return whether this thread captures a graph."""
    return _MUSAC.capturing()


class MUSAGraph:
    """Work that was captured once and can be done again."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._graph = _MUSAC.Graph()
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Capture what this thread does from here on."""
        self._pool = graph_pool_handle() if pool is None else pool
        self._graph.begin_capture()

    def capture_end(self) -> None:
        """Capture no more."""
        self._graph.end_capture()

    def instantiate(self) -> None:
        """Make the captured graph ready; it is."""

    def replay(self) -> None:
        """Do the captured work again."""
        self._graph.replay()

    def reset(self) -> None:
        """Forget the captured work."""
        self._graph.reset()

    def pool(self) -> Any:
        """Return the name of this graph's pool."""
        return self._pool

    def __len__(self) -> int:
        return len(self._graph)


class graph:  # noqa: N801
    """Capture what a block does into a graph, on a stream of its own."""

    default_capture_stream: Any = None

    def __init__(
        self,
        musa_graph: MUSAGraph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "thread_local",
    ) -> None:
        if stream is None and graph.default_capture_stream is None:
            graph.default_capture_stream = torch_musa.Stream()
        self._graph, self._mode = musa_graph, capture_error_mode
        self._pool = pool
        self._stream = torch_musa.stream(graph.default_capture_stream if stream is None else stream)

    def __enter__(self) -> None:
        torch_musa.synchronize()
        self._stream.__enter__()
        self._graph.capture_begin(self._pool, self._mode)

    def __exit__(self, *exception: Any) -> None:
        self._graph.capture_end()
        self._stream.__exit__(*exception)
