"""Kernels that are written in Python: they run on host tensors over the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_musa import _MUSAC


def on_host(value: Any) -> Any:
    """Return ``value`` with host tensors over the memory of the device's tensors."""
    if isinstance(value, torch.Tensor):
        return _MUSAC.alias_on_host(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(on_host, value))
    return value


def launch(kernel: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run ``kernel`` on the arguments' memory, also at each replay of a graph in capture.

    It returns nothing: what it computes it writes to tensors among its arguments.
    """
    args, kwargs = on_host(args), {name: on_host(value) for name, value in kwargs.items()}

    def step() -> None:
        with torch.inference_mode():
            kernel(*args, **kwargs)

    step()
    if _MUSAC.capturing():
        _MUSAC.record(step)
