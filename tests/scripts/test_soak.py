"""``scripts/soak``: what it counts, how it makes a failing case small, and what it hands back."""

from __future__ import annotations

import json
import os
import queue
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.lib.soak import engines, run
from scripts.lib.soak.report import Report, added, final_table, read_report
from tests.fuzzing.generation import random_case
from tests.fuzzing.oracle import Totals
from tests.fuzzing.passes import Case, Operation, case_from
from tests.support.engine import EngineFailed


def fails_with(kind: str, at_least: int) -> object:
    """Stands for running a case that goes wrong if it has so many operations of a kind."""

    def run_case(case: Case, totals: Totals | None = None) -> Totals:
        if [operation.kind for operation in case.operations].count(kind) >= at_least:
            raise AssertionError("wrong")
        return Totals() if totals is None else totals

    return run_case


def test_a_failing_case_is_written_with_as_few_operations_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of forty operations made it fail; the file holds these two and the error."""
    case = random_case(3)
    pair = (Operation("decode", 1, (2,), (3,)), Operation("decode", 0, (1, 4), (65,), 1))
    others = [operation for operation in case.operations if operation.kind != "decode"]
    case = replace(case, operations=(*others[:10], pair[0], *others[10:], pair[1]))
    monkeypatch.setattr(run, "random_case", lambda seed, models: case)
    monkeypatch.setattr(run, "run_case", fails_with("decode", 2))
    written = Path(run.run_seed(3, Totals(), tmp_path))
    data = json.loads(written.read_text())
    assert "AssertionError: wrong" in data.pop("error")
    assert case_from(data) == replace(case, operations=pair)


def test_a_case_that_is_right_writes_nothing(tmp_path: Path) -> None:
    """The name of no file, and none there."""
    assert run.run_seed(5, Totals(), tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_reports_of_runs_add_up(tmp_path: Path) -> None:
    """Counts, seeds, failures and time of two runs, through their files."""
    paths = []
    for seed, calls in ((1, 10), (2, 32)):
        report = Report.started(seed, "reference")
        report.add_counts({"calls": calls, "mismatches": seed - 1})
        report.seconds = 60.0
        paths.append(tmp_path / f"{seed}.json")
        paths[-1].write_text(report.as_json())
    total = added([read_report(path) for path in paths])
    assert (total.counts["calls"], total.mismatches, total.seeds, total.seconds) == (
        42, 1, [1, 2], 120.0,
    )  # fmt: skip
    assert "42" in final_table(total)


def test_the_command_runs_and_reports(repository: Path, tmp_path: Path) -> None:
    """A few seconds of it: status 0, a table, and a report with the same counts."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        ["scripts/soak", "--minutes", "0.05", "--jobs", "1", "--engines", "0", "--seed", "1",
         "--report", report, "--failures", tmp_path],
        cwd=repository, capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = read_report(report).counts
    assert counts["calls"] > 0
    assert f"{counts['calls']:,}" in done.stdout


@pytest.mark.parametrize(("said", "runs"), [("EADDRINUSE", 2), ("CUDA error", 1)])
def test_an_engine_whose_port_was_taken_is_started_again(
    said: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: it has answered nothing; any other failure is what is looked for."""
    log, began = tmp_path / "log", list[int]()
    log.write_text(said)

    def run_workload(*_: object) -> dict[str, int]:
        began.append(1)
        raise EngineFailed("The engine died.", log)

    monkeypatch.setattr(engines, "run_workload", run_workload)
    messages: queue.Queue[tuple[str, object]] = queue.Queue()
    engines._run_seed(None, 3, tmp_path, messages)  # type: ignore[arg-type]
    assert len(began) == runs
    assert messages.get_nowait()[0] == "wrong"
