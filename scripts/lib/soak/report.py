"""The totals of soaks, which add up over processes and runs, and how they are shown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

COUNTS = {
    "cases": "cases of the backend", "passes": "passes that took plans", "calls": "attention calls",
    "raw_calls": "of them over raw keys", "outputs": "outputs compared", "plans": "plans computed",
    "reuses": "plans reused", "replays": "graph replays", "engines": "engine workloads",
    "engine_requests": "requests to engines", "engine_tokens": "tokens compared",
    "engine_calls": "attention calls of engines", "engine_plans": "plans computed in engines",
    "engine_reuses": "plans reused in engines", "aborted": "talks aborted",
    "retracted": "retractions",
    "near_ties": "near ties", "mismatches": "mismatches",
}  # fmt: skip
"""The counts of a report, and what the table calls them."""


@dataclass
class Report:
    """The counts of a run, and on what it ran."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    failures: list[str] = field(default_factory=list)
    """Files with the cases that went wrong, or the errors of the run itself."""
    seeds: list[int] = field(default_factory=list)
    """The first seed of each run."""
    seconds: float = 0.0
    core_seconds: float = 0.0
    began: str = ""
    machine: dict[str, str] = field(default_factory=dict)

    @classmethod
    def started(cls, seed: int | None, kernels: str) -> Report:
        """An empty report of a run that begins now."""
        chosen = int(time.time()) % 1_000_000_007 if seed is None else seed
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(seeds=[chosen], began=began, machine=_machine(kernels))

    @property
    def mismatches(self) -> int:
        """Outputs, plans or tokens that were wrong."""
        return self.counts["mismatches"]

    def add_counts(self, counts: dict[str, int]) -> None:
        """Add what a process has done."""
        for name, value in counts.items():
            self.counts[name] += value

    def as_json(self) -> str:
        """The report for a file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_report(path: Path) -> Report:
    """The report that :meth:`Report.as_json` wrote."""
    return Report(**json.loads(path.read_text()))


def added(reports: Sequence[Report]) -> Report:
    """The sum of several runs."""
    total = Report(machine=reports[0].machine, began=min(report.began for report in reports))
    for report in reports:
        total.add_counts(report.counts)
        total.failures += report.failures
        total.seeds += report.seeds
        total.seconds += report.seconds
        total.core_seconds += report.core_seconds
    return total


def _machine(kernels: str) -> dict[str, str]:
    names = {"kernels": kernels, "python": platform.python_version(), "cores": str(os.cpu_count())}
    for package in ("torch", "sglang", "sglang-musa-ext"):
        try:
            names[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            names[package] = "not installed as a distribution"
    return names


def status_line(report: Report, minutes: float) -> str:
    """One line while it runs."""
    counts = report.counts
    rate = counts["calls"] / report.seconds if report.seconds else 0.0
    return (
        f"{report.seconds / 60:5.1f} of {minutes:g} min | {counts['cases']} cases, "
        f"{counts['calls']:,} calls ({rate:,.0f}/s), {counts['reuses']:,} reuses | "
        f"{counts['engines']} engines, {counts['engine_tokens']:,} tokens | "
        f"{counts['mismatches']} mismatches, {len(report.failures)} failures"
    )


def final_table(report: Report) -> str:
    """The table at the end."""
    seeds = ", ".join(map(str, report.seeds))
    lines = [
        f"soak of {report.seconds / 60:.1f} minutes from {report.began}, seeds {seeds}",
        ", ".join(f"{name} {value}" for name, value in report.machine.items()),
        "",
    ]
    width = max(map(len, COUNTS.values()))
    lines += [f"{text:{width}}  {report.counts[name]:>12,}" for name, text in COUNTS.items()]
    if report.core_seconds:
        rate = report.counts["calls"] / report.core_seconds
        lines += [f"{'attention calls a second and process':{width}}  {rate:>12,.0f}"]
    lines += [f"wrong: {failure}" for failure in report.failures]
    return "\n".join(lines)
