"""Host and device memory where both are one: nothing is pinned, and copies are plain.

SGLang keeps adapters and the host part of a hierarchical cache in pinned memory, whatever the
platform says of pinned memory, and moves cached pages with kernels that a CPU lacks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from sglang_musa_ext import patching

PINNING_MODULES = (
    "sglang.srt.lora.backend.torch_backend",
    "sglang.srt.lora.layers",
    "sglang.srt.managers.overlap_utils",
    "sglang.srt.managers.schedule_batch",
    "sglang.srt.managers.utils",
    "sglang.srt.model_executor.forward_batch_info",
    "sglang.srt.speculative.eagle_info_v2",
)
"""Modules of SGLang that ask for pinned memory unless they know the device for a CPU."""
PINNING_FACTORIES = ("arange", "empty", "tensor", "zeros")
"""PyTorch's functions that they ask."""
NIXL_MODULES = ("nixl_cu12._api", "nixl_cu13._api")
"""Modules behind ``nixl._api``, by the CUDA version of its wheel."""
MEMORY_METHODS = ("register_memory", "get_reg_descs", "get_xfer_descs", "prep_xfer_dlist")
"""Methods of NIXL's agent that are told the kind of memory."""
HOST_POOL_MODULES = (
    # One module holds the host pools up to 0.5.13, a package from 0.5.16 on, and both between.
    "sglang.srt.mem_cache.memory_pool_host",
    "sglang.srt.mem_cache.pool_host.common",
    "sglang.srt.mem_cache.pool_host.mha",
    "sglang.srt.mem_cache.pool_host.mla",
)


def pin_nothing() -> None:
    """Give SGLang ordinary memory where it asks for pinned memory, now and in later imports.

    PyTorch raises without an accelerator. On a CPU "pinned" would say no more than that a copy may
    be asynchronous. SGLang's modules get a view of PyTorch, and PyTorch's own functions stay as
    they are, because its device contexts know them by identity.
    """
    if torch.accelerator.is_available():
        return
    for name in PINNING_MODULES:
        patching.after_import(name, _show_unpinned_torch)
    torch.Tensor.pin_memory = _itself  # type: ignore[assignment]
    torch.Tensor.record_stream = _nothing_to_record  # type: ignore[assignment]


def _show_unpinned_torch(module: ModuleType) -> None:
    vars(module)["torch"] = UnpinnedTorch("torch")


class UnpinnedTorch(ModuleType):
    """PyTorch, whose functions give ordinary memory to who asks for pinned memory."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _unpinned(value) if name in PINNING_FACTORIES else value


def _unpinned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _itself(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    """Stand for ``Tensor.pin_memory``."""
    return tensor


def _nothing_to_record(tensor: torch.Tensor, stream: object) -> None:
    """Stand for ``Tensor.record_stream``: a CPU has one stream, and frees nothing early."""


def serve_host_pools(exists: Callable[[str], bool]) -> None:
    """Let SGLang's hierarchical cache keep its host part in ordinary memory, and copy in PyTorch.

    Args:
        exists: tells whether this release has a module.
    """
    for name in filter(exists, HOST_POOL_MODULES):
        module: Any = importlib.import_module(name)
        # Pools look their function up by the device of the cache.
        functions = getattr(module, "ALLOC_MEMORY_FUNCS", None)
        if functions is not None:
            functions["cpu"] = _allocate
        # Named at import where SGLang knows the device.
        module.transfer_kv_direct = transfer_kv_direct


def transfer_host_memory() -> None:
    """Let NIXL move the cache between servers: SGLang calls its memory that of a GPU."""
    for name in NIXL_MODULES:
        patching.after_import(name, _call_memory_the_host_s)


def _call_memory_the_host_s(module: ModuleType) -> None:
    agent: Any = vars(module)["nixl_agent"]
    for name in MEMORY_METHODS:
        setattr(agent, name, _in_host_memory(getattr(agent, name)))


def _in_host_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        named = {name: _of_host(value) for name, value in kwargs.items()}
        return method(*map(_of_host, args), **named)

    return call


def _of_host(value: Any) -> Any:
    return "DRAM" if isinstance(value, str) and value == "VRAM" else value


def _allocate(
    dims: Sequence[int], *, dtype: torch.dtype, device: str, **_pinning: Any
) -> torch.Tensor:
    """Return memory of a host pool; what SGLang says of pinning and registering has no meaning."""
    return torch.empty(dims, dtype=dtype, device=device)


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy slots of keys and values from one pool to another, layer by layer.

    Args:
        src_layers, dst_layers: one tensor a layer, each ``(slots, ...)`` of one dtype and row.
        src_indices, dst_indices: ``(n,)`` int64, the slots that are read and those written; whole
            pages, in order.
        page_size: slots in a page; not needed to copy slot by slot.
    """
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]
