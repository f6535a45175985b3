"""The kind of device that this process has, told by PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def import_vendor_modules() -> None:
    """Import what gives PyTorch its ``musa`` device, where it is installed.

    PyTorch comes first: it loads ``torch_musa`` by an entry point, which it would not find in a
    module that is still being imported, and end there.
    """
    importlib.import_module("torch")
    for name in ("torch_musa", "torchada"):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def is_available(kind: str) -> bool:
    """Return whether PyTorch sees a device of this kind, ``musa`` or ``cuda``."""
    import torch

    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def device_kind() -> str:
    """Return ``musa``, ``cuda`` or ``cpu``: the first of these that PyTorch sees."""
    import_vendor_modules()
    return next((kind for kind in ("musa", "cuda") if is_available(kind)), "cpu")


def device_module(kind: str) -> Any:
    """Return ``torch.musa`` or ``torch.cuda``; ``None`` for a CPU, which has no streams."""
    import torch

    return None if kind == "cpu" else getattr(torch, kind)
