"""Environments that differ in nothing but this package, and what processes of them differ in."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.wheels import build_wheel

NAME = "sglang_musa_ext"


def link_libraries(target: Path, repository: Path) -> None:
    """Link into ``target`` every installed library but this package."""
    target.mkdir()
    for folder in map(Path, filter(None, sys.path)):
        own = folder.resolve() in (repository, repository / "tests")
        if own or not any(folder.glob("*.dist-info")):
            continue
        for entry in folder.iterdir():
            # Of two releases of one library, the one that would be imported is the first.
            clash = entry.suffix == ".dist-info" and any(
                target.glob(f"{entry.name.partition('-')[0]}-*.dist-info")
            )
            if (
                NAME not in entry.name
                and entry.suffix != ".pth"
                and not clash
                and not (target / entry.name).exists()
            ):
                (target / entry.name).symlink_to(entry.resolve())


def install_package(target: Path, repository: Path, scratch: Path) -> None:
    """Unpack this package's wheel into ``target``, which is what installing it does."""
    with zipfile.ZipFile(build_wheel(repository, scratch, scratch / "wheel")) as archive:
        archive.extractall(target)


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Where two descriptions differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted({*first, *second}):
            yield from differences(first.get(key), second.get(key), f"{path}/{key}")
    elif first != second:
        yield f"{path}: {first} != {second}"
