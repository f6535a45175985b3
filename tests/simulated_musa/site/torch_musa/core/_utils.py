"""Helpers that others import."""

from __future__ import annotations

from typing import Any

import torch_musa


def _get_musa_device_index(device: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    return torch_musa._index(device)
