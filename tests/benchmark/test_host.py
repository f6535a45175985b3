"""``bench host``: the time of the host, measured without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sglang_musa_ext.benchmark import host

PEERS = (
    "upstream", "ours over mate", "ours over hopper", "upstream again", "in-tree",
    "upstream with its wrappers",
)  # fmt: skip


@pytest.mark.parametrize("pool", host.POOLS)
def test_every_backend_is_measured_in_every_mode(pool: str) -> None:
    """The command runs anywhere, and compares each backend with upstream's own bare forward."""
    command = (sys.executable, "-m", "sglang_musa_ext", "bench", "host", "--turns", "4")
    ran = subprocess.run(
        (*command, "--pool", pool), capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    rows = [line.strip("| ").split(" | ") for line in ran.stdout.splitlines()]
    seen = {(row[0], row[1]): row for row in rows if row[0] in host.PASS_KINDS}
    assert set(seen) == {(mode, peer) for mode in host.PASS_KINDS for peer in PEERS}
    assert all(seen[mode, "upstream"][3:5] == ["1.00", "0.00"] for mode in host.PASS_KINDS)
    assert all(float(row[2]) > 0 for row in seen.values())


def test_a_ratio_is_of_the_same_turn() -> None:
    """A turn in which all were slow says what the others say."""
    first = {"upstream": [32.0, 320.0, 32.0], "ours": [64.0, 640.0, 64.0]}
    times = host.Times(first, {name: [0.0, 0.0, 0.0] for name in first})
    assert times.forward("ours") == [2.0, 20.0, 2.0]
    assert times.ratio("ours") == (2.0, 0.0)
