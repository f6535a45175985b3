"""Engines in processes of their own: how they are asked, and what they say when they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
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


STAND_IN = """
import os, pathlib, socket

class Engine:
    'Looks for a free port if it is told of none, as SGLang does, and listens there later.'

    def __init__(self, nccl_port=None, fault=None, **_):
        counter = pathlib.Path(os.environ["STARTS"])
        starts = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(starts + 1))
        if fault:
            raise RuntimeError(fault)
        self.port = nccl_port or int(os.environ["FREE_PORTS"].split(",")[starts])
        self.server = socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind(("127.0.0.1", self.port))
        self.server.listen()

    def get_server_info(self):
        return {"internal_states": [{"port": self.port}]}

    def shutdown(self):
        self.server.close()
"""


class OfStandIn:
    """Engines of a stand-in for SGLang, which imports in no time; ``free`` are ports it finds."""

    def __init__(self, folder: Path, *free: int) -> None:
        self.folder, self.log, self.counter = folder, folder / "engine.log", folder / "starts"
        arguments = folder / "sglang" / "srt" / "server_args.py"
        arguments.parent.mkdir(parents=True)
        for module in (folder / "sglang" / "srt" / "__init__.py", arguments):
            module.write_text("class ServerArgs: pass\n")
        (folder / "sglang" / "__init__.py").write_text(STAND_IN)
        self.environ = {
            "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "STARTS": str(self.counter),
            "FREE_PORTS": ",".join(map(str, free)),
        }

    def engine(self, **arguments: Any) -> Engine:
        return Engine(arguments, self.environ, self.log)

    @property
    def starts(self) -> int:
        """How many processes were started."""
        return int(self.counter.read_text())


@pytest.fixture
def occupied() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_engines_do_not_meet_at_one_port(tmp_path: Path, occupied: int) -> None:
    """Also where both would find the same one free, which is in use when they listen; nobody else
    gets it while they live.
    """
    of_stand_in = OfStandIn(tmp_path, occupied, occupied, occupied, occupied)
    engines = [of_stand_in.engine(), of_stand_in.engine()]
    try:
        own = {engine.wait().state()["port"] for engine in engines}
        assert len(own) == 2
        for port in own:
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
    finally:
        for engine in engines:
            engine.close()
    assert of_stand_in.starts == 2
    for port in own:
        socket.create_server(("127.0.0.1", port)).close()


def test_an_engine_whose_port_was_taken_is_started_again(tmp_path: Path, occupied: int) -> None:
    """Replicas of data parallelism look for ports themselves; the log keeps both starts' words."""
    of_stand_in = OfStandIn(tmp_path, occupied, free_port())
    engine = of_stand_in.engine(dp_size=2)
    try:
        assert engine.wait().state()["port"] != occupied
    finally:
        engine.close()
    assert of_stand_in.starts == 2
    assert "Address already in use" in of_stand_in.log.read_text()
    assert "it is started again" in of_stand_in.log.read_text()


@pytest.mark.parametrize(("fault", "starts"), [(None, 2), ("CUDA error: out of memory", 1)])
def test_an_engine_is_started_again_once_and_for_a_port_alone(
    fault: str | None, starts: int, tmp_path: Path, occupied: int
) -> None:
    """A port that is taken twice, and anything else, is what the caller hears."""
    of_stand_in = OfStandIn(tmp_path, occupied, occupied)
    engine = of_stand_in.engine(dp_size=2, fault=fault)
    try:
        with pytest.raises(EngineDied, match=fault or "Address already in use"):
            engine.wait()
    finally:
        engine.close()
    assert of_stand_in.starts == starts


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
