"""The results of the validation kit and their report: Markdown for people, JSON for machines."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

PASS, FAIL, SKIP, ABSENT = "pass", "fail", "skip", "could not run"
NOTICE = (
    "Nothing of sglang-musa-ext had been run on a Moore Threads GPU when this kit was written: its "
    "expectations come from MATE's public source, and from the PyTorch kernels that stand in for "
    "it. On such a GPU this report is news, whatever it says. Please attach it to an issue."
)
ELSEWHERE = (
    "This run was not on a Moore Threads GPU, and says nothing of one: nothing of sglang-musa-ext "
    "had been run there when this kit was written."
)
NOTICES = {
    "cuda": "On an NVIDIA GPU sglang-musa-ext shows its logic under real streams, graphs and "
    f"memory. {ELSEWHERE}",
    "cpu": "On a CPU sglang-musa-ext shows its logic on PyTorch kernels that stand in for MATE. "
    f"{ELSEWHERE}",
}
"""Notices of a report from a device that is no Moore Threads GPU."""
DISTRIBUTIONS = (
    "sglang-musa-ext", "sglang", "torch", "torch_musa", "torchada", "mate", "mate-mubin",
    "flash_attn_3",
    "mate-flash-attention", "sglang-kernel", "sgl-kernel", "deep-gemm", "triton", "apache-tvm-ffi",
    "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case."""

    part: str
    name: str
    status: str
    """``pass``, ``fail`` or ``skip``."""
    reason: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Report:
    """Everything one run of the kit found."""

    started: str
    settings: Mapping[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    """Parts that could not run at all, and why."""
    device: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    doctor: Mapping[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """Return ``fail`` if a case failed, ``pass`` if all parts ran and one passed."""
        statuses = {outcome.status for outcome in self.outcomes}
        if FAIL in statuses:
            return FAIL
        return PASS if PASS in statuses and not self.broken else ABSENT

    @property
    def exit_code(self) -> int:
        """0 everything that could run passed, 1 a case failed, 2 the kit could not do its work."""
        return {PASS: 0, FAIL: 1, ABSENT: 2}[self.verdict]

    @property
    def notice(self) -> str:
        """Return what a reader must know of the device that this ran on."""
        return NOTICES.get(str(self.device.get("device", "")).partition(":")[0], NOTICE)

    def of(self, part: str) -> list[Outcome]:
        """The outcomes of one part."""
        return [outcome for outcome in self.outcomes if outcome.part == part]

    @property
    def parts(self) -> list[str]:
        """The parts that ran or should have, in order."""
        return list(dict.fromkeys([*(outcome.part for outcome in self.outcomes), *self.broken]))

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json`` into ``directory``; returns their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        pages = directory / "report.md", directory / "report.json"
        pages[0].write_text(self.as_markdown(), encoding="utf-8")
        pages[1].write_text(self.as_json(), encoding="utf-8")
        return pages

    def as_json(self) -> str:
        """The report for machines."""
        content = asdict(self) | {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "notice": self.notice,
        }
        return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"

    def as_markdown(self) -> str:
        """The report for people, failures first."""
        facts = {
            "started": self.started,
            "system": platform.platform(),
            "Python": platform.python_version(),
        }
        lines = [
            f"# Validation of sglang-musa-ext: {self.verdict}", "", f"> {self.notice}", "",
            *table(("Part", *(PASS, FAIL, SKIP), "Could not run"), map(self._counts, self.parts)),
            "",
            *self._failures(),
            "## Machine and versions", "",
            *table(("What", "Value"), (facts | dict(self.device)).items()), "",
            *table(("Distribution", "Version"), self.versions.items()), "",
            "## Settings", "", *table(("Setting", "Value"), self.settings.items()), "",
        ]  # fmt: skip
        for part in self.parts:
            rows = [
                (o.name, o.status, numbers(o.numbers), o.reason, f"{o.seconds:.1f} s")
                for o in self.of(part)
            ]
            lines += [
                f"## {part}",
                "",
                *table(("Case", "Result", "Numbers", "Reason", "Time"), rows),
                "",
            ]
        return "\n".join(lines)

    def _counts(self, part: str) -> list[str]:
        statuses = [outcome.status for outcome in self.of(part)]
        return [
            part,
            *(str(statuses.count(status)) for status in (PASS, FAIL, SKIP)),
            self.broken.get(part, ""),
        ]

    def _failures(self) -> list[str]:
        failed = [outcome for outcome in self.outcomes if outcome.status == FAIL]
        rows = [
            (outcome.part, outcome.name, numbers(outcome.numbers), outcome.reason)
            for outcome in failed
        ]
        return (
            ["## Failures", "", *table(("Part", "Case", "Numbers", "Reason"), rows), ""]
            if rows
            else []
        )


class ReportsDifferError(ValueError):
    """Reports are of different machines or versions, and cannot be one."""


def read(path: Path) -> Report:
    """Read a report from its ``report.json``, or from the folder that holds it."""
    file = path / "report.json" if path.is_dir() else path
    content = json.loads(file.read_text(encoding="utf-8"))
    known = {each.name: content[each.name] for each in fields(Report)}
    return Report(**known | {"outcomes": [Outcome(**outcome) for outcome in known["outcomes"]]})


def merged(reports: Mapping[str, Report]) -> Report:
    """Return one report of several, which have some of the cases each.

    A case that failed in one of them has failed; a part that could not run in one could not run.

    Args:
        reports: by where each was read from; at least one.

    Raises:
        ReportsDifferError: they are of other devices or versions.
    """
    (first, report), *others = reports.items()
    for name, other in others:
        _require_the_same(first, report, name, other)
    outcomes: dict[tuple[str, str], Outcome] = {}
    for other in reports.values():
        for outcome in other.outcomes:
            case = (outcome.part, outcome.name)
            outcomes[case] = max(outcomes.get(case, outcome), outcome, key=_weight)
    names = sorted({name for other in reports.values() for name in other.settings})
    settings = {name: _all_values(name, reports.values()) for name in names}
    broken = {
        part: f"in {name}: {reason}"
        for name, other in reports.items()
        for part, reason in other.broken.items()
    }
    started = "; ".join(other.started for other in reports.values())
    doctor = next((other.doctor for other in reports.values() if other.doctor), None)
    return replace(
        report,
        started=started,
        settings=settings,
        outcomes=list(outcomes.values()),
        broken=broken,
        doctor=doctor,
    )


def _weight(outcome: Outcome) -> int:
    """Return how much a result says: a failure most, and a skipped case least."""
    return (SKIP, PASS, FAIL).index(outcome.status)


def _all_values(name: str, reports: Iterable[Report]) -> str:
    """Return a setting of several reports: one value if all have the same."""
    values = [str(report.settings.get(name, "")) for report in reports]
    return " | ".join(dict.fromkeys(values))


def _require_the_same(first: str, report: Report, name: str, other: Report) -> None:
    differences = [
        f"{fact}: {mine.get(fact)} in {first}, {theirs.get(fact)} in {name}"
        for mine, theirs in ((report.device, other.device), (report.versions, other.versions))
        for fact in sorted({*mine, *theirs})
        if mine.get(fact) != theirs.get(fact)
    ]
    if differences:
        raise ReportsDifferError(
            "Reports of different machines or versions are not merged: "
            f"{'; '.join(differences)}. Merge reports of one installation on one kind of GPU."
        )


def total(reports: Iterable[Mapping[str, Any]], name: str) -> int:
    """Return the sum of a statistic over backends' reports."""
    return sum(report["statistics"][name] for report in reports)


def versions() -> dict[str, str]:
    """The distributions that matter here, with the version of each or that it is absent."""
    installed = {}
    for name in DISTRIBUTIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "absent"
    return installed


def numbers(values: Mapping[str, Any]) -> str:
    """Named numbers in one short line."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[object]) -> str:
    return (
        "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"
    )
