"""Start-up, which the simulated device does not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _lazy_init() -> None:
    pass


def _lazy_call(function: Callable[[], Any], **_: Any) -> None:
    function()
