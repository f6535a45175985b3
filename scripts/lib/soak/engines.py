"""Random engines."""

from typing import Any


def engine_job(*arguments: Any) -> None:
    """Nothing yet."""
