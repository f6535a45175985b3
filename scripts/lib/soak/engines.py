"""The processes of a soak that run random engines."""

from __future__ import annotations

import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from sglang_musa_ext.engines.ports import with_other_ports
from tests.fuzzing.workloads import WrongTokens, random_workload, run_workload
from tests.support.engine import EngineFailed, EngineServer


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


def _run_seed(server: EngineServer, seed: int, folder: Path, messages: Any) -> None:
    workload = random_workload(seed)
    try:
        counts = with_other_ports(lambda: run_workload(server, workload), EngineFailed)
        messages.put(("counts", counts))
    except Exception as error:  # noqa: BLE001 - whatever a workload raises is what is looked for
        path = folder / f"workload-{seed}.txt"
        path.write_text(f"seed {seed}\n{workload}\n\n{traceback.format_exc()}")
        messages.put(("wrong", str(path)))
        if isinstance(error, WrongTokens):
            messages.put(("counts", {"engines": 1, "mismatches": 1}))
