"""``bench host``: the time of the host, measured without a GPU."""

from __future__ import annotations

import contextlib
import io
import sys

from sglang_musa_ext.__main__ import main
from sglang_musa_ext.benchmark import host
from tests.support.engine import EngineServer
from tests.support.warm import WarmPython

COMMAND = ("bench", "host", "--turns", "4")

PEERS = (
    "ours over MATE", "ours over Hopper", "ours over MATE without plans",
    "ours over MATE, sampling outputs", "composing alone",
    "upstream again", "in-tree", "upstream with its wrappers",
)  # fmt: skip


def test_the_command_runs_anywhere(warm: WarmPython) -> None:
    """It needs no setting, and has a row for each backend in each mode."""
    ran = warm.run([sys.executable, "-m", "sglang_musa_ext", *COMMAND])
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
    tables = [row for row in rows if len(row) > 1 and row[1] in host.PASS_KINDS]
    assert [row[1] for row in tables] == [*host.PASS_KINDS] * 3
    ratios, wrapped, parts = tables[:3], tables[3:6], tables[6:]
    assert {len(row) for row in ratios} == {3 + len(PEERS)}
    assert rows[rows.index(["SGLang", "Pass", "upstream, µs", *PEERS]) + 2] == ratios[0]
    for row in ratios:
        assert all(float(cell.split(" ± ")[0]) > 0 for cell in row[2:])
    assert {len(row) for row in wrapped} == {4}
    # Upstream's forward takes time, and so does all of it; the parts between are differences.
    for row in parts:
        upstream, *_, whole = [[float(each) for each in cell.split(", ")] for cell in row[2:]]
        assert (len(upstream), len(whole)) == (2, 2)
        assert min(*upstream, *whole) > 0


def test_a_ratio_is_of_the_same_turn() -> None:
    """A turn in which all were slow says what the others say."""
    first = {"upstream": [32.0, 320.0, 32.0], "ours": [64.0, 640.0, 64.0]}
    times = host.Times(first, {name: [0.0, 0.0, 0.0] for name in first})
    assert times.forward("ours") == [2.0, 20.0, 2.0]
    assert times.ratio("ours") == (2.0, 0.0)


def test_parts_are_differences_within_a_turn_and_add_up() -> None:
    """A turn in which all were slow moves no part."""
    times = {
        host.UPSTREAM: [10.0, 100.0, 10.0],
        host.COMPOSED: [12.0, 102.0, 12.0],
        host.OVER_HOPPER: [13.0, 103.0, 13.0],
        host.UNPLANNED: [13.5, 103.5, 13.5],
        host.OVER_MATE: [20.0, 110.0, 20.0],
    }
    parts = [host.part(times, each) for each in host.PARTS]
    assert parts == [10.0, 2.0, 1.0, 0.5, 6.5]
    assert sum(parts) == 20.0
