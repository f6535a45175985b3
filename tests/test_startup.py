"""A process that this package leaves alone starts as fast as without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_musa_ext import envs
from tests.support.commands import clean_environment

MOST = 1.01
"""Of the time that the same process takes without the package."""


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_an_idle_package_costs_no_start(mode: str, repository: Path) -> None:
    """Entry points found, loaded and called add at most a hundredth to what SGLang imports."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.startup"],
        cwd=repository, env=clean_environment(**{envs.MODE: mode}), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) <= MOST, done.stdout
