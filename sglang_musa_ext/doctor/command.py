"""The doctor's command: all checks in their order, and the report of them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sglang_musa_ext import __version__
from sglang_musa_ext.doctor.machine import probe_device, probe_driver, probe_python, probe_toolkit
from sglang_musa_ext.doctor.packages import probe_collisions, probe_mate, probe_torch, probe_triton
from sglang_musa_ext.doctor.results import EXIT_CODES, CheckResult, CheckStatus, failed
from sglang_musa_ext.doctor.server_arguments import probe_command
from sglang_musa_ext.doctor.sglang import probe_contract, probe_plugin, probe_settings, probe_sglang
from sglang_musa_ext.doctor.surroundings import Check, Surroundings
from sglang_musa_ext.upstream import releases

CHECKS = (
    Check("sglang", "Is there a SGLang release that this package works with?", probe_sglang),
    Check("contract", "Does SGLang have what this package relies on?", probe_contract),
    Check("settings", "Which settings are effective, and where do they come from?", probe_settings),
    Check("plugin", "Will SGLang load this plugin?", probe_plugin),
    Check(
        "command",
        "What attention backend and page size does a command line lead to?",
        probe_command,
    ),
    Check("python", "Do interpreter and wheels fit?", probe_python),
    Check("device", "Is there a device with the needed version and free memory?", probe_device),
    Check("driver", "Does the driver answer?", probe_driver),
    Check("toolkit", "Is the MUSA toolkit new enough for MATE?", probe_toolkit),
    Check("torch", "Do torch, torch_musa and torchada belong together?", probe_torch),
    Check("triton", "Does Triton have a backend for MUSA?", probe_triton),
    Check("mate", "Is MATE Moore Threads', and does its wrapper fit?", probe_mate),
    Check(
        "collisions", "Does a public package stand in the place of a vendor's?", probe_collisions
    ),
)


def run_checks(surroundings: Surroundings, checks: Sequence[Check] = CHECKS) -> list[CheckResult]:
    """The answers to ``checks``, in their order; none of them raises."""
    return [replace(_guarded(check, surroundings), name=check.name) for check in checks]


def _guarded(check: Check, surroundings: Surroundings) -> CheckResult:
    try:
        return check.probe(surroundings)
    except (Exception, SystemExit) as error:
        finding = f"This could not be found out: {type(error).__name__}: {error}"
        return failed(finding, "Fix what it names; if it names nothing of yours, please report it.")


def worst(results: Sequence[CheckResult]) -> CheckStatus:
    """The worst status among ``results``."""
    order = list(CheckStatus)
    return max((result.status for result in results), key=order.index, default=CheckStatus.PASS)


def as_json(results: Sequence[CheckResult]) -> str:
    """The report for programs."""
    checks = [
        {
            "name": result.name,
            "status": result.status.value,
            "finding": result.finding,
            "next_step": result.next_step,
            "details": dict(result.details),
        }
        for result in results
    ]
    report = {
        "sglang_musa_ext": __version__,
        "status": worst(results).value,
        "supported_sglang": [release.version for release in releases.SUPPORTED_RELEASES],
        "checks": checks,
    }
    return json.dumps(report, indent=2, ensure_ascii=False, default=str)


def as_text(results: Sequence[CheckResult], width: int = 110) -> str:
    """The report for people: a row for each check, with the next step below what needs one."""
    counts = Counter(result.status for result in results)
    supported = ", ".join(release.version for release in releases.SUPPORTED_RELEASES)
    lines = [
        f"sglang-musa-ext {__version__}: "
        + ", ".join(f"{counts[status]} {status.value}" for status in CheckStatus),
        *textwrap.wrap(
            f"SGLang releases it is tested with: {supported}", width, break_on_hyphens=False
        ),
        "",
    ]
    for result in results:
        lines += _row(f"{result.status.value.upper():<5}{result.name:<11}", result.finding, width)
        if result.next_step:
            lines += _row(" " * 16 + "-> ", result.next_step, width)
    return "\n".join(lines)


def _row(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print them, and return 0 if all passed, 1 for a warning, 2 for a failure."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext doctor",
        usage="%(prog)s [--json] [-- SERVER ARGUMENTS]",
        description="What this environment would serve, and what stands in its way.",
        epilog="Exit status: 0 all passed, 1 there is a warning, 2 there is a failure. Example: "
        "sglang-musa-ext doctor -- --model-path Qwen/Qwen3-8B --attention-backend fa3",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(given[:split])
    command = given[split + 1 :] if split < len(given) else None
    results = run_checks(Surroundings(dict(os.environ), command))
    print(
        as_json(results)
        if options.json
        else as_text(results, min(shutil.get_terminal_size().columns, 120))
    )
    return EXIT_CODES[worst(results)]
