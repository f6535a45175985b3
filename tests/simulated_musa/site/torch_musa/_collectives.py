"""MCCL, the vendor's collectives, stood in for by Gloo over the same memory."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def register_mccl() -> None:
    """Make ``mccl`` a backend of process groups for the device and for the host."""
    if dist.is_available() and "mccl" not in dist.Backend.backend_list:
        dist.Backend.register_backend("mccl", _gloo, devices=["cpu", "musa"])


def _gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
