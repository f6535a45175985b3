"""Engines in processes of their own: how they are asked, and what they say when they end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.engines.process import Engine, EngineDied, graph_arguments, last_error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"graphs": []}, {"disable_cuda_graph": True}),
        ({"graphs": [8]}, {"disable_cuda_graph": False, "cuda_graph_max_bs_decode": 8}),
        (
            {"graphs": [1, 8], "prefill_graphs": False},
            {"disable_cuda_graph": False, "cuda_graph_max_bs_decode": 8,
             "cuda_graph_bs_decode": [1, 8], "disable_prefill_cuda_graph": True},
        ),
    ],
)  # fmt: skip
def test_graphs_are_asked_for_in_the_words_of_the_release(arguments: Any, expected: Any) -> None:
    """The installed release's own names for batch sizes to capture take the values."""
    assert graph_arguments({"page_size": 64, **arguments}) == {"page_size": 64, **expected}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            (
                "loading\nTraceback:\n  x\ntorch.AcceleratorError: CUDA error: illegal\nSearch for "
                "it\n"
            ),
            "torch.AcceleratorError",
        ),
        ("RuntimeError: first\nValueError: second\nwarning: done\n", "ValueError: second"),
        ("loading\nKilled\n\n", "Killed"),
        ("", ""),
    ],
)
def test_an_engine_that_died_says_the_last_error_of_its_log(
    text: str, error: str, tmp_path: Path
) -> None:
    """The error that ended it is more than the status that it ended with."""
    log = tmp_path / "engine.log"
    log.write_text(text)
    assert last_error(log).startswith(error)
    assert last_error(tmp_path / "none.log") == ""


def test_an_engine_that_cannot_boot_says_why(tmp_path: Path) -> None:
    """The first question gets the error, with what the log says last."""
    log = tmp_path / "engine.log"
    engine = Engine({"model_path": str(tmp_path / "none"), "device": "cpu", "graphs": []}, {}, log)
    try:
        with pytest.raises(EngineDied, match=r"Its log: \w+"):
            engine.ask([[4]], 1)
    finally:
        engine.close()


LEFT = """
import multiprocessing, signal, sys, time
from sglang_musa_ext.engines.process import ending_with_its_processes
# A shell has what it starts in the background ignore it; SGLang has a handler.
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
multiprocessing.set_start_method("fork")
child = multiprocessing.Process(target=time.sleep, args=(float(sys.argv[1]),), daemon=True)
child.start()
with ending_with_its_processes():
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("child", "engine", "status"), [(0.1, 60, -signal.SIGQUIT), (60, 0.1, 0)], ids=["left", "kept"]
)
def test_an_engine_that_its_scheduler_has_left_ends(
    child: float, engine: float, status: int
) -> None:
    """Also where the scheduler ended without an error, and no signal came."""
    command = [sys.executable, "-c", LEFT, str(child), str(engine)]
    assert subprocess.run(command, check=False, timeout=50).returncode == status
