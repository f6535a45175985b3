"""The processes of a soak that run random engines."""

from __future__ import annotations

import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzzing.workloads import Workload, WrongTokens, random_workload, run_workload
from tests.support.engine import EngineFailed, EngineServer

PORT_TAKEN = "EADDRINUSE"
"""In the log of an engine that could not listen, and so answered nothing."""


def engine_job(first: int, stride: int, deadline: float, folder: Path, messages: Any) -> None:
    """Run the workloads of every ``stride``-th seed until the time is over, and report each."""
    began, seed = time.monotonic(), first
    with tempfile.TemporaryDirectory(prefix="soak-engines-") as directory:
        server = EngineServer(Path(directory))
        try:
            while time.monotonic() < deadline:
                _run_seed(server, seed, folder, messages)
                seed += stride
        finally:
            server.close()
    messages.put(("ended", time.monotonic() - began))


def _started(server: EngineServer, workload: Workload) -> dict[str, int]:
    """Run a workload; once more if another process had the port of its engine."""
    try:
        return run_workload(server, workload)
    except EngineFailed as error:
        if PORT_TAKEN not in error.log:
            raise
    return run_workload(server, workload)


def _run_seed(server: EngineServer, seed: int, folder: Path, messages: Any) -> None:
    workload = random_workload(seed)
    try:
        messages.put(("counts", _started(server, workload)))
    except Exception as error:  # noqa: BLE001 - whatever a workload raises is what is looked for
        path = folder / f"workload-{seed}.txt"
        path.write_text(f"seed {seed}\n{workload}\n\n{traceback.format_exc()}")
        messages.put(("wrong", str(path)))
        if isinstance(error, WrongTokens):
            messages.put(("counts", {"engines": 1, "mismatches": 1}))
