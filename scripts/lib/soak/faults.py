"""Prove that the fuzzing finds faults: break the package in one way at a time, and fuzz it.

The ways are those of scripts/mutants. Each is a copy of the package, imported in a forked process
that fuzzes it until a case goes wrong or the time for it is over.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.lib.mutants import __main__ as mutant_command
from tests.support import backend  # noqa: F401 - SGLang is imported once, and forks have it then

OURS = ("sglang_musa_ext", "tests")


@dataclass(frozen=True)
class Verdict:
    """The result of fuzzing one mutant."""

    name: str
    case: int
    """The number of the case that went wrong; 0: none did."""
    calls: int
    seconds: float
    error: str


def run(names: Sequence[str], jobs: int, seconds: float) -> int:
    """Fuzz the mutants with one of ``names`` in theirs (none: all); return 1 if one survives."""
    command: Any = mutant_command
    mutants = command.selected(names)
    verdicts = []
    for verdict in _fuzzed(command, mutants, jobs, seconds):
        verdicts.append(verdict)
        print(_line(verdict), flush=True)
    alive = [each for each in verdicts if not each.case]
    print(f"{len(verdicts) - len(alive)} of {len(verdicts)} faults found")
    return 1 if alive else 0


def _line(verdict: Verdict) -> str:
    if not verdict.case:
        lived = f"NOT FOUND in {verdict.calls:7,} calls, {verdict.seconds:6.1f} s  {verdict.name}"
        return f"{lived} {verdict.error}".rstrip()
    return (
        f"found after  {verdict.calls:7,} calls, {verdict.seconds:6.1f} s  {verdict.name}: "
        f"{verdict.error}"
    )


def _fuzzed(command: Any, mutants: Sequence[Any], jobs: int, seconds: float) -> Iterator[Verdict]:
    waiting, running = list(mutants), dict[int, tuple[Any, Path]]()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop(0)
                place = Path(tempfile.mkdtemp(dir=folder))
                try:
                    process = _start(command, mutant, place, seconds)
                except command.BrokenRun as reason:
                    yield Verdict(mutant.name, 0, 0, 0.0, str(reason).splitlines()[0])
                else:
                    running[process] = mutant, place
            if not running:
                continue
            process, _ = os.wait()
            mutant, place = running.pop(process)
            yield _verdict(mutant.name, place)
            shutil.rmtree(place)


def _start(command: Any, mutant: Any, place: Path, seconds: float) -> int:
    """Fuzz a mutant in a forked process; returns its id."""
    command.mutated(mutant, place)
    process = os.fork()
    if process:
        return process
    try:
        _fuzz_copy(place, seconds)
    finally:
        os._exit(0)


def _fuzz_copy(place: Path, seconds: float) -> None:
    """Import the copy in ``place`` in place of the package, and fuzz it."""
    sys.path.insert(0, str(place))
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    from tests.fuzzing.generation import random_case
    from tests.fuzzing.oracle import Totals
    from tests.fuzzing.passes import run_case

    totals, began, number, error = Totals(), time.monotonic(), 0, ""
    while not error and time.monotonic() - began < seconds:
        number += 1
        try:
            run_case(random_case(number), totals)
        except Exception as wrong:  # noqa: BLE001 - whatever a case raises is a fault found
            error = (
                f"{type(wrong).__name__}: {str(wrong).splitlines()[0][:90] if str(wrong) else ''}"
            )
    took = time.monotonic() - began
    lines = [str(number if error else 0), str(totals.calls), f"{took:.1f}", error]
    (place / "verdict").write_text("\n".join(lines))


def _verdict(name: str, place: Path) -> Verdict:
    path = place / "verdict"
    if not path.exists():
        return Verdict(name, 0, 0, 0.0, "the copy could not be imported")
    case, calls, seconds, error = path.read_text().split("\n", 3)
    return Verdict(name, int(case), int(calls), float(seconds), error)
