"""Fuzz the attention backend and the engine for some minutes, and report runs and failures.

Backend: random sequences of forward passes on upstream's real backend; each output is compared with
float64, each plan with the plan that its call would get alone. Engine: random requests to random
engines, whose tokens are compared with those of SGLang's torch_native attention. Exit status: 0 if
nothing was wrong, 1 if something was, 2 if the run itself failed.

A case that went wrong is written, as small as it could be made, into the folder of --failures, and
`--case FILE` runs it again. Those in tests/fuzzing/cases are run by the tests. Reports of several
runs add up: `--add FILE...`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .report import Report, added, final_table, read_report, status_line

SECONDS_A_LINE = 30.0
"""Between two lines of a run whose output is no terminal."""


def main() -> int:
    """Run the command line."""
    options = _parser().parse_args()
    if options.add:
        print(final_table(added([read_report(path) for path in options.add])))
        return 0
    prepare_environment(options)
    from . import faults, run

    if options.mutants is not None:
        return faults.run(options.mutants, options.jobs, options.minutes * 60)
    if options.case:
        return run.run_file(options.case)
    report = Report.started(options.seed, options.kernels)
    display = _Display(options.minutes)
    for _ in run.soak(options, report):
        display.show(report)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(final_table(report))
    if options.report:
        options.report.write_text(report.as_json())
    return 1 if report.mismatches or report.failures else 0


class _Display:
    """A status line: renewed on a terminal, printed now and then elsewhere."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.printed = minutes, 0.0

    def show(self, report: Report) -> None:
        """Show where the run is."""
        line = status_line(report, self.minutes)
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif report.seconds - self.printed > SECONDS_A_LINE:
            self.printed = report.seconds
            print(line, file=sys.stderr, flush=True)


def prepare_environment(options: argparse.Namespace) -> None:
    """Set what must be set before torch and SGLang are imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("SGLANG_MUSA_EXT_KERNELS", options.kernels)
    os.environ["FUZZING_DEVICE"] = "cuda" if options.kernels == "hopper" else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--minutes", type=float, default=2.0, help="how long to run (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--engines", type=int, default=None, metavar="N",
        help="how many of the jobs run engines (default: a quarter of them; 0: none)")  # fmt: skip
    add("--seed", type=int, default=None, help="of the first case (default: from the clock)")
    add("--kernels", choices=("reference", "hopper"), default="reference",
        help="hopper: on an NVIDIA GPU, with its graphs")  # fmt: skip
    add("--models", nargs="+", default=(), metavar="NAME",
        help="kinds of models of the backend's cases, as tests/fuzzing/generation.py names them: "
        "encoder, ranks, fp8, latent, windows, ... (default: all)")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="write the totals there as JSON")
    add("--failures", type=Path, default=Path(".cache/soak"), metavar="FOLDER",
        help="where cases that went wrong are written (default: %(default)s)")  # fmt: skip
    add("--case", type=Path, metavar="FILE", help="run one written case again")
    add("--add", type=Path, nargs="+", metavar="FILE", help="add up reports of runs, and print")
    add("--mutants", nargs="*", metavar="NAME",
        help="instead, break the package as scripts/mutants does, and say how fast each is "
        "found")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
