"""stub"""
from __future__ import annotations
from collections.abc import Mapping
from pathlib import Path
from typing import Any
def write_report(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Nothing yet."""
    return []
