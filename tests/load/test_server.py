"""The HTTP server under load, for a minute; ``scripts/load`` takes 200 requests at once."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.load.server import Kept, LoadReport, load_server, random_asks
from tests.support.engine import EngineServer

pytest.importorskip("prometheus_client")


@pytest.mark.engine
def test_a_server_under_load_loses_nothing(engines: EngineServer) -> None:
    """Every finished answer is that of the request alone; no request, token, file, plan is left."""
    report = load_server(engines, requests=24, waves=2)
    report.require_nothing_lost()
    assert (report.asked, report.finished + report.left) == (48, 48)
    assert report.left > 0


@pytest.mark.long
@pytest.mark.engine
def test_the_command_runs(repository: Path) -> None:
    """A short run of it, by itself."""
    command = ["scripts/load", "--requests", "24", "--waves", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("24 requests, ")
    assert done.stdout.endswith("nothing was lost\n")


KEPT = Kept(0, 0, open_files=9, resident=1000, backend={"plans": 1, "mla_slots": 0})
SOUND = LoadReport(
    statuses={"bad JSON": "400", "unknown model": "200"},
    before=KEPT,
    after=[KEPT, replace(KEPT, resident=2000), replace(KEPT, resident=2100)],
    counted_calls=1.0,
)


def test_what_is_sound_raises_nothing() -> None:
    """Memory may grow in the second wave, and by a twentieth in the third."""
    SOUND.require_nothing_lost()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"wrong": ["wave 1, request 3: [5], alone [6]"]}, "request 3"),
        ({"after": [replace(KEPT, tokens=64)]}, "wave 1 left 0 requests, 64 tokens"),
        ({"after": [KEPT, replace(KEPT, requests=1)]}, "wave 2 left 1 requests"),
        ({"after": [replace(KEPT, open_files=10)]}, "wave 1 left 10 files open"),
        (
            {"after": [KEPT, replace(KEPT, backend={"plans": 2, "mla_slots": 0})]},
            r"wave 2 left 2 plans: .*'plans': 1",
        ),
        ({"after": [KEPT, KEPT, replace(KEPT, resident=1051)]}, "grew from 1,000 to 1,051"),
        ({"statuses": {"bad JSON": "500"}}, "bad JSON: the answer was 500"),
        ({"statuses": {"huge prompt": "200"}}, "huge prompt: the answer was 200"),
        ({"counted_calls": 0.0}, "no sglang_musa_ext:calls_total"),
    ],
)
def test_what_is_lost_is_named(fault: dict[str, object], named: str) -> None:
    """Each kind of loss alone fails the run."""
    with pytest.raises(AssertionError, match=named):
        replace(SOUND, **fault).require_nothing_lost()  # type: ignore[arg-type]


def test_asks_are_of_all_kinds() -> None:
    """Among 200 there are those that stay, that leave and that say so; the same for a seed."""
    asks = random_asks(200, seed=1)
    assert asks == random_asks(200, seed=1)
    kinds = {(bool(ask.leaves_after), ask.aborts) for ask in asks}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
