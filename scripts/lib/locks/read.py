"""Read the locks: which release of a public package developers get, and the SHA-256 of its wheels.

A lock is a requirements file of pip's. ``py3.N.txt`` has what ``scripts/dev-env`` installs under
that Python, ``torch-py3.N.txt`` PyTorch's default build with the CUDA packages that it needs,
``tools-py3.N.txt`` the tools that make and check the locks, and ``alone.txt`` what is installed one
by one under any Python: SGLang's releases, and torchada.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
THIS_PYTHON = "{}.{}".format(*sys.version_info)
OPTIONS = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement")
"""Pip's, before the path of a lock: it has every dependency, and nothing of it is built here."""


ALONE = FOLDER / "alone.txt"
TORCHADA = "torchada==0.1.103"
"""The release that the simulated MUSA device of the tests uses."""


def lock_of(python: str = THIS_PYTHON, part: str = "") -> Path:
    """Return the lock for a Python, such as ``3.11``, of a part: ``torch-``, ``tools-`` or none."""
    return FOLDER / f"{part}py{python}.txt"


def read_lines(lock: Path) -> dict[str, str]:
    """Return the lines of a lock by their requirement, ``name==version``."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return {line.split()[0]: line for line in lines if re.match(r"[\w.-]+==\S+ --hash=", line)}


@contextlib.contextmanager
def only(lock: Path, requirement: str) -> Iterator[Path]:
    """Yield a lock of one package of ``lock``, ``name`` or ``name==version``.

    Raises:
        KeyError: the lock does not have it.
    """
    lines = read_lines(lock)
    found = [line for each, line in lines.items() if requirement in (each, each.split("==")[0])]
    if not found:
        raise KeyError(f"{requirement} is not in {lock}; expected one of {', '.join(lines)}")
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "lock.txt"
        single.write_text(f"{found[0]}\n", encoding="utf-8")
        yield single
