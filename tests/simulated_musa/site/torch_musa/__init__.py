"""A stand-in of Moore Threads' PyTorch backend: the device ``musa`` over host memory.

It has what SGLang and torchada read of ``torch.musa``, and is nothing of the vendor's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from torch_musa import _MUSAC, _interpreter

__version__ = "2.11.0.post2+musa5.2.0"

CAPABILITY = (3, 1)
TOTAL_MEMORY = 80 << 30


def _autoload() -> None:
    """Be imported with torch, as the vendor's backend is: torch calls this entry point."""


def _register() -> None:
    pytorch: Any = torch
    pytorch.utils.rename_privateuse1_backend("musa")
    pytorch._register_device_module("musa", sys.modules[__name__])
    pytorch.utils.generate_methods_for_privateuse1_backend(
        for_tensor=True, for_module=True, for_storage=True
    )
    pytorch.version.musa = "5.2.0"


_register()

from torch_musa import memory, random  # noqa: E402
from torch_musa._collectives import register_mccl  # noqa: E402
from torch_musa._swiglu import SwishGLU  # noqa: E402
from torch_musa.core.stream import (  # noqa: E402
    Event,
    ExternalStream,
    Stream,
    StreamContext,
    current_stream,
    default_stream,
    set_stream,
    stream,
)
from torch_musa.graphs import (  # noqa: E402
    MUSAGraph,
    graph,
    graph_pool_handle,
    is_current_stream_capturing,
)
from torch_musa.memory import (  # noqa: E402
    MemPool,
    caching_allocator_alloc,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_snapshot,
    memory_stats,
    reset_peak_memory_stats,
    use_mem_pool,
)
from torch_musa.random import (  # noqa: E402
    default_generators,
    get_rng_state,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    set_rng_state,
)

vars(torch.nn)["SwishGLU"] = SwishGLU
OutOfMemoryError = torch.OutOfMemoryError
FloatTensor = torch.FloatTensor


class DeviceProperties(NamedTuple):
    """The properties of a GPU that a program reads."""

    name: str = "MTT S5000 (simulated)"
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    total_memory: int = TOTAL_MEMORY
    multi_processor_count: int = 56
    warp_size: int = 32
    max_threads_per_block: int = 1024
    max_threads_per_multi_processor: int = 2048
    shared_memory_per_block: int = 192 << 10
    shared_memory_per_block_optin: int = 192 << 10
    shared_memory_per_multiprocessor: int = 192 << 10
    regs_per_multiprocessor: int = 65536
    is_integrated: int = 0
    L2_cache_size: int = 64 << 20
    uuid: str = "00000000-0000-0000-0000-000000000000"


def is_available() -> bool:
    """Return whether there is a device."""
    return device_count() > 0


def is_initialized() -> bool:
    """Return whether the device is in use; the simulated one always is."""
    return True


def init() -> None:
    """Make the device ready; it is."""


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Return whether the device computes in bfloat16."""
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    pass


def device_count() -> int:
    """Return the number of devices."""
    return _MUSAC.device_count()


def current_device() -> int:
    """Return the index of this thread's device."""
    return _MUSAC.current_device()


def set_device(device: Any) -> None:
    """Make ``device`` this thread's."""
    index = _index(device)
    if index >= 0:
        _MUSAC.set_device(index)


def _index(device: Any) -> int:
    """Return the index that ``device`` names; the current one where it names none."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


class device:  # noqa: N801
    """Make another device this thread's for a while."""

    def __init__(self, device: Any) -> None:
        self.idx = _index(device)

    def __enter__(self) -> None:
        self.prev_idx = current_device()
        set_device(self.idx)

    def __exit__(self, *_: object) -> None:
        set_device(self.prev_idx)


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Return the MP version."""
    return CAPABILITY


def get_device_name(device: Any = None) -> str:
    """Return what the device is called."""
    return DeviceProperties().name


def get_device_properties(device: Any = None) -> DeviceProperties:
    """Return what the device is."""
    return DeviceProperties()


def can_device_access_peer(device: Any, peer: Any) -> bool:
    """Return whether one device reads another's memory directly; these do not."""
    return False


def get_arch_list() -> list[str]:
    """Return the architectures that kernels are built for."""
    return ["mp_31"]


def synchronize(device: Any = None) -> None:
    """Wait for the device's work, which is done."""
    _MUSAC.refuse_in_capture("synchronizing a device")


def ipc_collect() -> None:
    """Release what other processes no longer use of this one's memory; there is none."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes that autocast may choose."""
    return [torch.float16, torch.bfloat16]


class _Runtime:
    """The functions of the MUSA runtime that are reached by ``torch.cuda.cudart()``."""

    @staticmethod
    def musaHostRegister(*_: object) -> int:  # noqa: N802
        return 0

    @staticmethod
    def musaHostUnregister(*_: object) -> int:  # noqa: N802
        return 0


def musart() -> type[_Runtime]:
    """Return the MUSA runtime."""
    return _Runtime


@contextlib.contextmanager
def _device_type_is(kind: str) -> Iterator[None]:
    yield


register_mccl()
_interpreter.install()
