"""Validate sglang-musa-ext on the machine that has the GPU, and write a report for an issue.

It needs the installed stack alone: torch, sglang and sglang-musa-ext. Its parts are

  doctor    what is installed, and what stands in the way
  numerics  the kernels, called as the backend calls them, against attention in float64
  graphs    plans and kernels in the device's graphs, replayed with other lengths, against float64
  memcheck  NVIDIA's compute-sanitizer over each kind of these calls; on NVIDIA GPUs alone
  engine    a tiny random Llama served by SGLang with this package, against SGLang's torch_native
  modes     models without weights in every mode, against SGLang's own fa3, or on MUSA against this
            package without reuse of plans; on GPUs alone
  bench     decode step time with plans reused within a pass and without; equal tokens come first
  model     your own model (--model), served with this package and with another backend of SGLang's

Every part runs in a process of its own, and what a case does to it (a crash, a hang) is a result:
the case failed, and the rest goes on in another process. Exit status: 0 all that could run passed,
1 a case failed, 2 a part could not run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_musa_ext.validation.report import (
    FAIL,
    PASS,
    SKIP,
    Outcome,
    Report,
    ReportsDifferError,
    merged,
    numbers,
    read,
)

PROGRAM = ("-m", "sglang_musa_ext.validation.command")
"""Python's arguments in a part's process, before the part's own."""
PARTS = ("doctor", "numerics", "graphs", "memcheck", "engine", "modes", "bench", "model")
UNASKED = PARTS[:-1]
"""The parts that run where none is named; with --model, the last one too."""
SILENCE = {
    "numerics": 300.0, "graphs": 300.0, "memcheck": 600.0, "engine": 900.0, "modes": 900.0,
    "bench": 1200.0,
    "model": 1800.0,
    "probe": 300.0,
}  # fmt: skip
"""Seconds that one case of a part may take."""
DEATHS = 20
"""Processes of one part that may die before the rest of it is given up."""
Emit = Callable[[Mapping[str, Any]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for and write the report; returns the exit status."""
    options = _options(arguments)
    if options.child:
        return _child(options)
    out = Path(
        options.out or f"musa-validation-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}"
    )
    out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        return _merge(options.merge, out)
    run = Run(options, out)
    # Being told to end must end the parts' processes too, and leave a report.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.probe()
        print(run.report.notice, end="\n\n")
        for part in options.only:
            run.part(part)
    except KeyboardInterrupt:
        run.report.broken["interrupted"] = "by the keyboard"
    finally:
        shutil.rmtree(run.models, ignore_errors=True)
    return _deliver(run.report, out)


def _merge(paths: Sequence[str], out: Path) -> int:
    """Write one report of those at ``paths``; returns its exit status."""
    try:
        report = merged({path: read(Path(path)) for path in paths})
    except (OSError, ReportsDifferError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part in report.parts:
        _show_part(report, part)
    return _deliver(report, out)


def _deliver(report: Report, out: Path) -> int:
    pages = report.write(out)
    _show_summary(report)
    print("\nThe report, to attach to an issue: " + ", ".join(map(str, pages)))
    return report.exit_code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    head, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext validate",
        description=head,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernels", choices=("auto", "mate", "hopper", "reference"), default="auto"
    )
    parser.add_argument(
        "--device", default="auto", help="musa, cuda or cpu, with an index if there are several"
    )
    parser.add_argument("--only", type=_parts, metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--model", metavar="PATH", default="", help="your own model, for the part model"
    )
    parser.add_argument(
        "--modes", type=_modes, default=(), metavar="MODES", help="some of the part modes, by name"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N",
        help="engines of modes and cases of memcheck at a time (default: as many as processor and "
        "GPUs have room for)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="one dtype, and a short engine and benchmark"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where the report goes (default: ./musa-validation-<date>)"
    )
    parser.add_argument(
        "--merge", nargs="+", metavar="REPORT", default=(),
        help="run nothing, and make one report of several: folders, or their report.json",
    )  # fmt: skip
    for hidden in ("--child", "--fd", "--done", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = options.only or (PARTS if options.model else UNASKED)
    if "model" in options.only and not options.model:
        parser.error("the part model needs a model: --model PATH")
    return options


def _parts(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: expected some of {','.join(PARTS)}"
        )
    return tuple(part for part in PARTS if part in chosen)


def _modes(text: str) -> tuple[str, ...]:
    from sglang_musa_ext.validation.modes import MODES

    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(MODES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: expected some of {','.join(MODES)}"
        )
    return chosen


# --- in the process that the user started: the standard library alone -----------------------------


class Run:
    """One run of the kit."""

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options, self.out = options, out
        self.models = out / "models"
        self.models.mkdir(exist_ok=True)
        self.device = options.device
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        names = ("kernels", "device", "only", "modes", "model", "quick")
        settings = {name: _plain(getattr(options, name)) for name in names}
        settings |= {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("SGLANG_")
        }
        self.report = Report(started, settings)

    def probe(self) -> None:
        """Find the device, without which no part but the doctor can run."""
        for message in self._messages("probe", [], {}):
            if "device" in message:
                self.report.device = message["device"]
                self.device = str(message["device"]["device"])
            if "broken" in message:
                self.report.broken["device"] = message["broken"]
        if not self.report.device and "device" not in self.report.broken:
            self.report.broken["device"] = (
                f"the process that looks for it ended early: {self._last_words('probe')}"
            )

    def part(self, name: str) -> None:
        """Run one part, in as many processes as it kills."""
        if name == "doctor":
            self._doctor()
        elif "device" in self.report.broken:
            self.report.broken[name] = "there is no device to run it on"
        else:
            self._cases(name)
        _show_part(self.report, name)

    def _cases(self, part: str) -> None:
        for _ in range(DEATHS):
            state: dict[str, Any] = {"status": None}
            for message in self._messages(
                part, [outcome.name for outcome in self.report.of(part)], state
            ):
                self._note(part, message, state)
            if state["status"] == 0 or part in self.report.broken:
                return
            words = f"{_death(state['status'])} Its last words: {self._last_words(part)}"
            if not state.get("case"):
                self.report.broken[part] = words
                return
            self._add(Outcome(part, state["case"], FAIL, words), state)
        self.report.broken[part] = f"given up after {DEATHS} processes had died"

    def _note(self, part: str, message: Mapping[str, Any], state: dict[str, Any]) -> None:
        if "broken" in message:
            self.report.broken[part] = message["broken"]
        elif "total" in message:
            state["total"] = message["total"]
        elif "start" in message:
            state["case"] = message["start"]
            _show_progress(
                f"{part}: {len(self.report.of(part)) + 1} of {state.get('total', '?')}: "
                f"{message['start']}"
            )
        elif "progress" in message:
            _show_progress(f"{part}: {message['progress']}")
        elif "outcome" in message:
            state["case"] = None
            self._add(Outcome(**message["outcome"]), state)

    def _add(self, outcome: Outcome, state: Mapping[str, Any]) -> None:
        self.report.outcomes.append(outcome)
        if outcome.status == FAIL:
            _show_progress("")
            print(
                f"  FAIL  {outcome.part}: {outcome.name}: {outcome.reason} "
                f"{numbers(outcome.numbers)}"
            )
        # What was found so far must survive whatever comes next, the machine's end among it.
        self.report.write(self.out)

    def _messages(
        self, part: str, done: Sequence[str], state: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yield what a new process of ``part`` reports; ``state["status"]`` says how it ended."""
        reading, writing = os.pipe()
        finished = self.out / f"{part}.done.json"
        finished.write_text(json.dumps(list(done)))
        command = [
            sys.executable, *PROGRAM, "--child", part, "--fd", str(writing), "--done",
            str(finished),
            "--kernels", self.options.kernels, "--device", self.device, "--scratch",
            str(self.models.resolve()),
            "--out", str(self.out.resolve()), "--jobs", str(self.options.jobs),
            *(["--modes", ",".join(self.options.modes)] if self.options.modes else []),
            *(["--model", self.options.model] if self.options.model else []),
            *(["--quick"] if self.options.quick else []),
        ]  # fmt: skip
        with self._log(part).open("a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writing],
                start_new_session=True,
                env=self._environment(),
            )  # fmt: skip
        os.close(writing)
        try:
            yield from _lines(reading, SILENCE[part])
            state["status"] = process.wait(30)
        except (TimeoutError, subprocess.TimeoutExpired):
            state["status"] = f"It took more than {SILENCE[part]:.0f} s."
        finally:
            os.close(reading)
            # Whatever it started belongs to its group, and must not outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            finished.unlink()

    def _environment(self) -> dict[str, str]:
        """The environment of a part: this one's, and what makes the package act on this device."""
        environ = dict(os.environ) | {"SGLANG_MUSA_EXT_KERNELS": self.options.kernels}
        if self.device.startswith("cpu"):
            environ.setdefault("SGLANG_PLATFORM", "musa_reference")
        elif self.device != "auto":
            environ.setdefault("SGLANG_MUSA_EXT", "on")
        return environ

    def _log(self, part: str) -> Path:
        return self.out / f"{part}.log"

    def _last_words(self, part: str) -> str:
        lines = self._log(part).read_text(errors="replace").split("\n")
        return " / ".join([line.strip() for line in lines if line.strip()][-3:])[-600:]

    def _doctor(self) -> None:
        """Take each check of the doctor as a case; a warning passes, with its text."""
        command = [sys.executable, "-m", "sglang_musa_ext", "doctor", "--json"]
        try:
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                timeout=120,
                env=self._environment(),
            )
            self.report.doctor = json.loads(done.stdout)
        except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
            self.report.broken["doctor"] = f"{type(error).__name__}: {error}"
            return
        assert self.report.doctor is not None
        for check in self.report.doctor["checks"]:
            status = FAIL if check["status"] == "fail" else PASS
            prefix = "warning: " if check["status"] == "warn" else ""
            reason = " ".join(filter(None, (prefix + check["finding"], check["next_step"])))
            self.report.outcomes.append(Outcome("doctor", check["name"], status, reason))


def _plain(value: Any) -> Any:
    return ",".join(value) if isinstance(value, tuple) else value


def _lines(descriptor: int, silence: float) -> Iterator[dict[str, Any]]:
    """The JSON lines that come through a pipe.

    Raises:
        TimeoutError: none came for ``silence`` seconds.
    """
    unfinished = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(silence):
            received = os.read(descriptor, 1 << 16)
            if not received:
                return
            *whole, unfinished = (unfinished + received).split(b"\n")
            yield from map(json.loads, whole)
    raise TimeoutError


def _death(status: Any) -> str:
    if isinstance(status, int):
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"The process died with {how}."
    return str(status or "The process ended without a word.")


def _show_progress(text: str) -> None:
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}\r", end="", flush=True)


def _show_part(report: Report, part: str) -> None:
    _show_progress("")
    statuses = [outcome.status for outcome in report.of(part)]
    counts = ", ".join(
        f"{statuses.count(status)} {status}" for status in (PASS, FAIL, SKIP) if status in statuses
    )
    why = f"could not run: {report.broken[part]}" if part in report.broken else ""
    print(f"{part:<10}{'; '.join(filter(None, (counts, why)))}", flush=True)
    reasons = dict.fromkeys(outcome.reason for outcome in report.of(part) if outcome.status == SKIP)
    for reason in reasons:
        print(f"{'':<10}skipped: {reason}")


def _show_summary(report: Report) -> None:
    print(
        f"\n{report.verdict.upper()}: "
        + ", ".join(f"{n} {v}" for n, v in report.versions.items() if v != "absent")
    )
    for name, reason in report.broken.items():
        print(f"  could not run {name}: {reason}")
    for outcome in report.outcomes:
        if outcome.status == PASS and outcome.part == "bench":
            print(f"  {outcome.name}: {numbers(outcome.numbers)}")


# --- in the process of a part ---------------------------------------------------------------------


def _child(options: argparse.Namespace) -> int:
    """Run one part, and report each case as it starts and ends."""
    descriptor = int(options.fd)
    os.set_inheritable(descriptor, False)
    done = set(json.loads(Path(options.done).read_text()))

    one_at_a_time = threading.Lock()

    def emit(message: Mapping[str, Any]) -> None:
        with one_at_a_time:
            os.write(descriptor, json.dumps(message, default=str).encode() + b"\n")

    name = "device" if options.child == "probe" else options.child
    module = importlib.import_module(f"sglang_musa_ext.validation.{name}")
    try:
        module.run(options, done, emit)
    except ImportError as error:
        # The stack is not there, or not whole; the error says what is missing and what to do.
        emit({"broken": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
