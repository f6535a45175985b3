"""NVIDIA's compute-sanitizer over each way in which the backend calls the kernels.

Each case runs in a process of its own under ``compute-sanitizer --tool memcheck``, which sees what
no comparison of results does: reads and writes beside the tensors. The first case reads beside them
on purpose, and must be caught.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_musa_ext.validation.engine import guarded
from sglang_musa_ext.validation.report import FAIL, PASS, SKIP, Outcome

Emit = Callable[[Mapping[str, Any]], None]
PART = "memcheck"
CONTROL = "a page beside the cache is caught"
NUMERICS = (
    "prefill", "prefill, window and softcap", "chunked prefill with prefix",
    "chunked prefill with prefix, page size 1",
    "decode", "decode, page size 1", "decode, window", "decode, softcap",
    "decode, window and sinks", "verify of 4",
    "decode, one plan for two layers", "decode of an empty request", "long and short decode",
    "varlen, causal",
    "prefill of equal requests", "chunked prefill of equal requests",
    "prefix hits of unequal lengths",
    "cascade: prefix and suffix merged", "MLA decode, planned and reused", "MLA verify of 4",
    "MLA, two slots",
    "MLA cascade",
)  # fmt: skip
"""Cases of the numerics part, one for each way to call."""
GRAPHS = (
    "decode", "decode, window and full layers", "decode, softcap", "verify of 4", "MLA decode",
    "MLA verify of 4",
)  # fmt: skip
"""Every case of the graphs part."""
LENGTHS = ((1, 1, 1, 1), (700, 3, 64, 1024), (1024, 1, 1, 1024))
"""With which graphs are replayed here: the sanitizer takes its time."""
SECONDS = 300.0
ERRORS = 97
"""Exit status of the sanitizer where it found an error."""
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def names() -> list[str]:
    """Every case."""
    numerics = [f"numerics: {name}" for name in NUMERICS]
    graphs = [f"graphs: {name}" for name in GRAPHS]
    return [CONTROL, *numerics, *graphs]


def find_sanitizer() -> str | None:
    """The path of ``compute-sanitizer``, or ``None``."""
    roots = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = os.pathsep.join([os.environ.get("PATH", ""), *roots, *PLACES])
    return shutil.which("compute-sanitizer", path=places)


# --- in the part's process ------------------------------------------------------------------------


def check(name: str, sanitizer: str, options: SimpleNamespace) -> Outcome:
    """Run one case under the sanitizer, and judge both what it says and what the case says."""
    stem = Path(options.out) / PART / re.sub(r"\W+", "-", name)
    stem.parent.mkdir(parents=True, exist_ok=True)
    log, result = stem.with_suffix(".log"), stem.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [
        sanitizer, "--tool", "memcheck", "--error-exitcode", str(ERRORS),
        sys.executable, "-m", "sglang_musa_ext.validation.memcheck", name,
        "--kernels", options.kernels, "--device", options.device, "--result", str(result),
    ]  # fmt: skip
    environ = dict(os.environ)
    if not name.startswith("graphs"):
        # From PyTorch's own pool a tensor's neighbour is valid memory. Graphs cannot be captured
        # without the pool.
        environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                env=environ,
                timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome(PART, name, FAIL, f"it took more than {SECONDS:.0f} s")
    case = Outcome(**json.loads(result.read_text())) if result.is_file() else None
    return judged(name, done.returncode, log.read_text(errors="replace"), case)


def judged(name: str, status: int, log: str, case: Outcome | None) -> Outcome:
    """Return a case's outcome, from the sanitizer's exit status and log, and its own outcome."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    values = {"errors": int(counts[-1]) if counts else "unknown", "exit status": status}
    words = " / ".join([line.strip() for line in log.split("\n") if line.strip(" =")][-3:])[-600:]
    if not counts:
        return Outcome(PART, name, FAIL, f"compute-sanitizer gave no summary: {words}", values)
    first = next(
        (
            line.strip("= ")
            for line in log.split("\n")
            if re.match(r"=+ (Invalid|Program hit|Error)", line)
        ),
        "",
    )
    if name == CONTROL:
        if int(counts[-1]) > 0 and "Invalid" in first:
            return Outcome(PART, name, PASS, first, values)
        reason = "compute-sanitizer missed a page beside the cache, so its silence says nothing"
        return Outcome(PART, name, FAIL, reason, values)
    if int(counts[-1]) or status == ERRORS:
        return Outcome(PART, name, FAIL, f"compute-sanitizer: {first or words}", values)
    if case is None or status:
        return Outcome(PART, name, FAIL, f"the case died: {words}", values)
    return Outcome(PART, name, case.status, case.reason, values | dict(case.numbers))


def missing(device: str, sanitizer: str | None) -> str:
    """Return why this part cannot run; empty if it can."""
    if not device.startswith("cuda"):
        return f"compute-sanitizer is for NVIDIA GPUs, and this device is {device}"
    return "" if sanitizer else "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"


def run(options: argparse.Namespace, done: Collection[str], emit: Emit) -> None:
    """Run every case under the sanitizer, several at a time, or say why not."""
    from sglang_musa_ext.validation.device import find_device, run_cases
    from sglang_musa_ext.validation.modes import default_jobs

    device, sanitizer = str(find_device(options)), find_sanitizer()
    if (why := missing(device, sanitizer)) or sanitizer is None:
        skipped = [(name, functools.partial(Outcome, PART, name, SKIP, why)) for name in names()]
        run_cases(skipped, None, done, emit)
        return
    settings = SimpleNamespace(out=options.out, kernels=options.kernels, device=device)
    with ThreadPoolExecutor(options.jobs or default_jobs(1)) as pool:
        futures = {
            name: pool.submit(check, name, sanitizer, settings)
            for name in names()
            if name not in done
        }
        cases = [
            (name, functools.partial(guarded, PART, name, future.result))
            for name, future in futures.items()
        ]
        run_cases(cases, None, (), emit)


# --- in the process under the sanitizer -----------------------------------------------------------


def _case(name: str, options: argparse.Namespace) -> Outcome:
    from sglang_musa_ext.validation import graphs, numerics
    from sglang_musa_ext.validation.device import kernels_for

    kernels, device = kernels_for(options)
    setting = numerics.Setting(kernels, device, numerics.dtypes(kernels)[0])
    if name == CONTROL:
        return _read_beside(setting)
    kind, _, plain = name.partition(": ")
    if kind == "graphs":
        return graphs.run_case(plain, setting, graphs.DeviceGraphs(device), LENGTHS)
    [case] = [case for case in numerics.cases() if case.name == plain]
    return numerics.run_case(plain, case, setting)


def _read_beside(setting: Any) -> Outcome:
    """Decode with a page table that points far beside the cache."""
    import torch

    from sglang_musa_ext.validation import numerics

    # With pages this small the kernels follow pointers; the hardware that copies large ones masks
    # what is outside.
    shape = replace(numerics.DECODE, page=16)
    batch = numerics.Batch(shape, setting.dtype, setting.device)
    arguments = batch.arguments(causal=True) | {
        "page_table": torch.full_like(batch.page_table, 1 << 20)
    }
    setting.kernels.flash_attn_with_kvcache(
        **arguments, scheduler_metadata=batch.plan(setting.kernels, causal=True)
    )
    torch.get_device_module(setting.device).synchronize()
    return Outcome(PART, CONTROL, FAIL, "nothing stopped it")


def main() -> None:
    """Run the case that the command line names, and write its outcome."""
    parser = argparse.ArgumentParser(description="One case of the memcheck part.")
    parser.add_argument("name")
    for option in ("--kernels", "--device", "--result"):
        parser.add_argument(option, required=True)
    options = parser.parse_args()
    Path(options.result).write_text(json.dumps(asdict(_case(options.name, options)), default=str))


if __name__ == "__main__":
    main()
