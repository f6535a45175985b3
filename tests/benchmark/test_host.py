"""``bench host``: the time of the host, measured without a GPU."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

from sglang_musa_ext.__main__ import main
from sglang_musa_ext.benchmark import host
from tests.support.engine import EngineServer

COMMAND = ("bench", "host", "--turns", "4")

PEERS = (
    "upstream", "ours over mate", "ours over hopper", "upstream again", "in-tree",
    "upstream with its wrappers",
)  # fmt: skip


def test_the_command_runs_anywhere() -> None:
    """It needs no setting, and has a row for each backend in each mode."""
    command = (sys.executable, "-m", "sglang_musa_ext", *COMMAND)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    require_every_backend(ran.stdout)


def table(*options: str) -> str:
    """Return what the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*COMMAND, *options]) == 0
    return printed.getvalue()


def test_a_pool_that_does_nothing_is_measured_too(engines: EngineServer) -> None:
    """With ``--pool none`` the table has the same rows."""
    require_every_backend(engines.call(table, "--pool", "none"))


def require_every_backend(printed: str) -> None:
    """Fail unless each backend was compared with upstream's own bare forward in every mode."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()]
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
