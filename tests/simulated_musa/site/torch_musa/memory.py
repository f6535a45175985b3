"""Memory of the simulated devices, and the pools that a program may ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch_musa
from torch_musa import _MUSAC


def memory_allocated(device: Any = None) -> int:
    """Return the bytes that tensors hold."""
    return _MUSAC.allocated_bytes(torch_musa._index(device))


def max_memory_allocated(device: Any = None) -> int:
    """Return the most bytes that tensors held at once."""
    return _MUSAC.most_allocated_bytes(torch_musa._index(device))


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Return the bytes that are free, and all."""
    total = torch_musa.TOTAL_MEMORY
    return total - memory_allocated(device), total


def empty_cache() -> None:
    """Return memory that no tensor holds; none is kept."""


def reset_peak_memory_stats(device: Any = None) -> None:
    """Begin a new measurement of the most memory; it is not kept apart here."""


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return counts of memory."""
    return {
        "allocated_bytes.all.current": memory_allocated(device),
        "allocated_bytes.all.peak": max_memory_allocated(device),
        "reserved_bytes.all.current": memory_reserved(device),
        "num_alloc_retries": 0,
    }


def memory_snapshot(*_: Any) -> list[Any]:
    """Return the allocator's segments; there are none."""
    return []


def caching_allocator_alloc(*_: Any) -> int:
    """Allocate raw memory, which nothing here does."""
    raise NotImplementedError("the simulated device has no raw allocations")


class MUSAPluggableAllocator:
    """An allocator out of a shared library, which nothing here loads."""

    def __init__(self, *_: Any) -> None:
        raise NotImplementedError("the simulated device has no pluggable allocators")


class MemPool:
    """A pool of memory: a name alone."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.id = torch_musa.graph_pool_handle()

    def use_count(self) -> int:
        """Return the number of users."""
        return 1


@contextlib.contextmanager
def use_mem_pool(pool: MemPool, device: Any = None) -> Iterator[None]:
    """Allocate from ``pool`` for a while."""
    yield


def _cuda_beginAllocateCurrentThreadToPool(*_: Any) -> None:  # noqa: N802
    pass


_cuda_beginAllocateToPool = _cuda_endAllocateToPool = _cuda_beginAllocateCurrentThreadToPool  # noqa: N816
_cuda_releasePool = _cuda_endAllocateCurrentStreamToPool = _cuda_beginAllocateCurrentThreadToPool  # noqa: N816
