"""The processes of a soak: each runs cases until the time is over, and reports what it counted."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.fuzzing.generation import random_case
from tests.fuzzing.oracle import Totals
from tests.fuzzing.passes import Case, Lane, Operation, case_from, run_case

from .engines import engine_job
from .report import Report

BEAT = 2.0
"""Seconds between two messages of a process."""
SHRINKING_SECONDS = 60.0

Message = tuple[str, Any]
"""``("counts", dict)``, ``("wrong", path or text)`` or ``("ended", core seconds)``."""


def soak(options: argparse.Namespace, report: Report) -> Iterator[Report]:
    """Run the jobs for the time that ``options`` say; yields the report as it grows."""
    began = time.monotonic()
    deadline = began + options.minutes * 60
    engines = options.jobs // 4 if options.engines is None else options.engines
    if options.kernels == "hopper":
        engines = 0
    # SGLang was imported above, once; a forked process has it already. A GPU is not for forks.
    method = "spawn" if options.kernels == "hopper" else "fork"
    context: Any = multiprocessing.get_context(method)
    messages = context.Queue()
    folder = options.failures.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    work: list[Callable[..., None]] = [engine_job] * engines
    backend_job = functools.partial(_backend_job, options.models)
    work += [backend_job] * (options.jobs - engines)
    processes = [
        context.Process(
            target=job,
            args=(report.seeds[0] + number, options.jobs, deadline, folder, messages),
        )
        for number, job in enumerate(work)
    ]
    for process in processes:
        process.start()
    yield from _collect(report, processes, messages, began)


def _collect(
    report: Report, processes: Sequence[Any], messages: Any, began: float
) -> Iterator[Report]:
    running = len(processes)
    while running:
        try:
            kind, content = messages.get(timeout=1.0)
        except queue.Empty:
            kind, content = "", None
            dead = [process for process in processes if process.exitcode not in (None, 0)]
            if dead and all(process.exitcode is not None for process in processes):
                report.failures.append(f"{len(dead)} processes died")
                running = 0
        if kind == "counts":
            report.add_counts(content)
        elif kind == "wrong":
            report.failures.append(content)
        elif kind == "ended":
            report.core_seconds += content
            running -= 1
        report.seconds = time.monotonic() - began
        yield report
    for process in processes:
        process.join(timeout=10)


# --- backend --------------------------------------------------------------------------------------


def _backend_job(
    models: Sequence[str], first: int, stride: int, deadline: float, folder: Path, messages: Any
) -> None:
    began, seed = time.monotonic(), first
    while time.monotonic() < deadline:
        totals = Totals()
        beat = time.monotonic() + BEAT
        while time.monotonic() < min(beat, deadline):
            failure = run_seed(seed, totals, folder, models)
            if failure:
                totals.mismatches += 1
                messages.put(("wrong", failure))
            seed += stride
        messages.put(("counts", asdict(totals)))
    messages.put(("ended", time.monotonic() - began))


def run_seed(seed: int, totals: Totals, folder: Path, models: Sequence[str] = ()) -> str:
    """Run the case of a seed; the file that holds it, made small, if it went wrong."""
    case = random_case(seed, models=models)
    try:
        run_case(case, totals)
    except Exception:  # noqa: BLE001 - whatever a case raises is what is looked for
        error = traceback.format_exc()
        path = folder / f"case-{seed}.json"
        write_case(case, error, path)
        small = shrunk(case)
        write_case(small, error, path)
        return str(path)
    return ""


def shrunk(case: Case, seconds: float = SHRINKING_SECONDS) -> Case:
    """A case that still goes wrong, with as few operations as could be found in that time."""
    deadline = time.monotonic() + seconds
    size = max(len(case.operations) // 2, 1)
    while size and time.monotonic() < deadline:
        start = 0
        while start < len(case.operations) and time.monotonic() < deadline:
            kept = case.operations[:start] + case.operations[start + size :]
            smaller = replace(case, operations=kept)
            if goes_wrong(smaller):
                case = smaller
            else:
                start += size
        size //= 2
    return case


def goes_wrong(case: Case) -> bool:
    """Return whether ``case`` raises anything."""
    try:
        run_case(case, Totals())
    except Exception:  # noqa: BLE001 - as above
        return True
    return False


def write_case(case: Case, error: str, path: Path) -> None:
    """Write a case that :func:`run_file` can read, with the error that it led to."""
    path.write_text(json.dumps({"error": error, **asdict(case)}, indent=1, default=str) + "\n")


def run_file(path: Path) -> int:
    """Run a written case; its exit status."""
    case = case_from(json.loads(path.read_text()))
    totals = run_case(case)
    print(f"{path}: nothing is wrong; {totals}")
    return 0


__all__ = ["Case", "Lane", "Operation", "run_file", "run_seed", "shrunk", "soak"]
