"""SGLang engines, each in a process of its own that answers over a pipe.

The validation kit and the benchmark ask several engines the same questions and compare: other
settings, another attention backend, another plugin. In one process they would share SGLang's
globals.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_musa_ext.engines import changes, ports

GRAPH_SIZES = ("cuda_graph_bs_decode", "cuda_graph_bs")
LARGEST_GRAPH = ("cuda_graph_max_bs_decode", "cuda_graph_max_bs")
"""Releases' names of the batch sizes to capture and of the largest; one takes a list."""
NO_PREFILL_GRAPH = ("disable_prefill_cuda_graph", "disable_piecewise_cuda_graph")
"""Their names of the switch that keeps prefill out of graphs."""
DP_RANK = ("routed_dp_rank", "data_parallel_rank")
"""Their names of the data-parallel rank that is to answer a request."""
FORCE_UPDATE = "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA"
"""A plan for every call: a setting that an engine has only where it was asked for."""


class EngineDied(RuntimeError):
    """An engine's process ended, or said that it could not do what it was asked."""

    def __init__(self, what: str, log: str = "") -> None:
        """Say what; ``log`` is the output of an engine that ended by itself."""
        super().__init__(what)
        self.log = log


class Engine:
    """An engine in a process of its own, which boots on while others do; questions wait for it.

    Its ranks meet at a port that no other process gets while it lives.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        environ: Mapping[str, str],
        log: Path | None = None,
        patience: float | None = None,
    ) -> None:
        """Start the process of an ``sglang.Engine(**arguments)``.

        Args:
            arguments: see :func:`graph_arguments` for those that are ours.
            environ: variables on top of this process's.
            log: where its output goes; ``None``: where ours goes.
            patience: seconds that an answer may take; ``None``: any time.
        """
        self._held = contextlib.ExitStack()
        port = self._held.enter_context(ports.held_port())
        self._arguments = {**arguments, **ports.rendezvous(arguments, port)}
        inherited = {name: value for name, value in os.environ.items() if name != FORCE_UPDATE}
        self._environ = inherited | dict(environ)
        self._ready, self._killed, self._patience, self._log = False, False, patience, log
        if log is not None:
            log.write_text("")
        self._start()

    def _start(self) -> None:
        reading, writing = os.pipe()
        command = [
            sys.executable,
            "-m",
            "sglang_musa_ext.engines.process",
            json.dumps(self._arguments),
            str(writing),
        ]
        output = contextlib.nullcontext() if self._log is None else self._log.open("a")
        with output as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[writing], text=True,
                env=self._environ, stdout=stream, stderr=stream,
            )  # fmt: skip
        os.close(writing)
        self._answers = os.fdopen(reading)

    def _start_again(self) -> None:
        """Start a process in place of the one that could not listen on one of its ports."""
        self._end()
        note = "Another process had one of this engine's ports: it is started again.\n"
        if self._log is None:
            sys.stderr.write(note)
        else:
            with self._log.open("a") as stream:
                stream.write(note)
        self._start()

    def wait(self) -> Engine:
        """Return when the engine is up; it is started again if one of its ports was taken.

        Raises:
            EngineDied: with its error.
        """
        if not self._ready:
            ports.with_other_ports(self._read, EngineDied, self._start_again)
            self._ready = True
        return self

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """Tokens and log-probabilities of each prompt's greedy continuation.

        Args:
            prompts: token ids.
            new_tokens: how many to append to each.
            options: of ``sglang.Engine.generate``; ``dp_rank`` is the data-parallel rank that is to
                answer, whatever the release calls it.
        """
        return self._call(
            {"prompts": prompts, "new_tokens": new_tokens, "logprobs": True, "options": options}
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Continue these prompts as a server does that was asked for no log-probabilities."""
        self._call({"prompts": prompts, "new_tokens": new_tokens})

    def step_seconds(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds from one decode step to the next while these prompts are continued together."""
        return float(
            self._call({"prompts": prompts, "new_tokens": new_tokens, "steps": True})["seconds"]
        )

    def state(self) -> dict[str, Any]:
        """The internal state of the engine's first scheduler."""
        state: dict[str, Any] = self._call({"state": True})["states"][0]
        return state

    def reports(self) -> list[dict[str, Any]]:
        """The state reports of the engine's backends of this package."""
        states = self._call({"state": True})["states"]
        return [report for state in states for report in state.get("sglang_musa_ext", [])]

    def flush(self) -> None:
        """Empty the prefix cache."""
        self._call({"flush": True})

    def scheduler(self, method: str, **arguments: Any) -> None:
        """Call a method of every scheduler of the engine."""
        self._call({"method": method, "arguments": arguments})

    def kill(self) -> None:
        """End its process at once; whoever waits for an answer gets an :class:`EngineDied`."""
        # What it started ends with it: SGLang's processes watch their parent.
        self._killed = True
        self._process.kill()

    def close(self) -> None:
        """End it and wait: in order if it serves, at once if it still boots."""
        if not self._ready:
            self.kill()
        self._end()
        self._held.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _call(self, question: Mapping[str, Any]) -> dict[str, Any]:
        self.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        if not select.select([self._answers], [], [], self._patience)[0]:
            raise EngineDied(
                f"The engine gave no answer within {self._patience:.0f} s. {self._last_error()}"
            )
        line = self._answers.readline()
        if not line:
            raise EngineDied(
                f"The engine's process ended with status {self._process.wait()}. "
                f"{self._last_error()}",
                self._output(),
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineDied(f"{answer['error']} {self._last_error()}", self._output())
        return answer

    def _output(self) -> str:
        """Return what it wrote; nothing if it was killed, or if its output is ours."""
        if self._killed or self._log is None or not self._log.is_file():
            return ""
        return self._log.read_text(errors="replace")

    def _last_error(self) -> str:
        return "Its output says why." if self._log is None else f"Its log: {last_error(self._log)}"


@contextlib.contextmanager
def engine(
    arguments: Mapping[str, Any], environ: Mapping[str, str], log: Path | None = None
) -> Iterator[Engine]:
    """An engine that is up, while it is needed."""
    process = Engine(arguments, environ, log)
    try:
        yield process.wait()
    finally:
        process.close()


def last_error(log: Path) -> str:
    """The last line of a log that names an error, or its last line; empty if there is no log."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").split("\n")]
        if log.is_file()
        else []
    )
    said = [line for line in lines if line]
    errors = [
        line
        for line in said
        if re.match(r"[\w.]*(Error|Exception|Died|Mismatch|Exhausted|Unavailable)\b", line)
    ]
    return (errors or said or [""])[-1][:1000]


# --- in an engine's process -----------------------------------------------------------------------


def serve(arguments: dict[str, Any], descriptor: int) -> None:
    """Boot an engine, and answer questions from the standard input until it ends."""
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as stream:

        def reply(answer: Mapping[str, Any]) -> None:
            stream.write(json.dumps(answer, default=str) + "\n")
            stream.flush()

        try:
            served = _boot(arguments)
        # Whatever stops an engine is what the other side must hear.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})
            return
        reply({"ready": True})
        with ending_with_its_processes():
            for line in sys.stdin:
                try:
                    reply(_answer(served, SimpleNamespace(**json.loads(line))))
                except Exception as error:  # noqa: BLE001  # The same.
                    traceback.print_exc()
                    reply({"error": f"{type(error).__name__}: {error}"})
        served.shutdown()


@contextlib.contextmanager
def ending_with_its_processes() -> Iterator[None]:
    """End this process, an engine's, soon after one of its own processes.

    A scheduler that dies of an exception sends SIGQUIT, and SGLang's handler ends the engine; but
    uvloop, between two requests, when its loop does not run, forgets signals. An engine that missed
    it would wait for an answer without end. So the signal is sent again.
    """
    children = multiprocessing.active_children()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            if not all(child.is_alive() for child in children):
                os.kill(os.getpid(), signal.SIGQUIT)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        is_over.set()
        watching.join()


def _boot(arguments: dict[str, Any]) -> Any:
    import sglang

    return sglang.Engine(**graph_arguments(arguments))


def graph_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with what they say of graphs in the words of the installed release of SGLang.

    ``graphs`` holds the batch sizes to capture: none for no graphs, and one for every size up to it
    that SGLang chooses. ``prefill_graphs`` says whether prefill may be captured too; without it
    SGLang chooses.
    """
    from sglang.srt.server_args import ServerArgs

    known = {*inspect.signature(ServerArgs).parameters, *getattr(ServerArgs, "__annotations__", ())}
    settled = dict(arguments)
    sizes, prefill = settled.pop("graphs", ()), settled.pop("prefill_graphs", True)
    settled["disable_cuda_graph"] = not sizes
    wanted: list[tuple[tuple[str, str], Any]] = [] if prefill else [(NO_PREFILL_GRAPH, True)]
    wanted += [(LARGEST_GRAPH, max(sizes))] if sizes else []
    wanted += [(GRAPH_SIZES, list(sizes))] if len(sizes) > 1 else []
    for names, value in wanted:
        name = next((name for name in names if name in known), None)
        if name is not None:
            settled[name] = value
    return settled


def _answer(engine: Any, question: SimpleNamespace) -> dict[str, Any]:
    if hasattr(question, "state"):
        return {"states": engine.get_server_info()["internal_states"]}
    if hasattr(question, "flush"):
        _flush(engine)
        return {}
    if hasattr(question, "method"):
        engine.collective_rpc(question.method, **question.arguments)
        return {}
    sampling = {"temperature": 0, "max_new_tokens": question.new_tokens, "ignore_eos": True}
    if hasattr(question, "steps"):
        return {"seconds": _step_seconds(engine, question.prompts, sampling)}
    if not hasattr(question, "logprobs"):
        engine.generate(input_ids=question.prompts, sampling_params=sampling)
        return {}
    answers = engine.generate(
        input_ids=question.prompts, sampling_params=sampling, return_logprob=True,
        **_options(engine, question.options),
    )  # fmt: skip
    tokens, logprobs = [], []
    for answer in answers:
        chosen = answer["meta_info"]["output_token_logprobs"]
        tokens.append([entry[1] for entry in chosen])
        logprobs.append([entry[0] for entry in chosen])
    return {"tokens": tokens, "logprobs": logprobs}


def _options(engine: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` in the words of this release of SGLang."""
    settled = dict(options)
    rank = settled.pop("dp_rank", None)
    if rank is not None:
        known = inspect.signature(engine.generate).parameters
        settled[next(name for name in DP_RANK if name in known)] = rank
    return settled


def _flush(engine: Any, seconds: float = 30.0) -> None:
    """Empty the prefix cache, which a scheduler refuses for a moment after its last answer."""
    until = time.perf_counter() + seconds
    while not getattr(engine.flush_cache(), "success", True):
        if time.perf_counter() > until:
            raise EngineDied(f"the prefix cache could not be emptied for {seconds:.0f} s")
        time.sleep(0.05)


def _step_seconds(
    engine: Any, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]
) -> float:
    """Time from the first to the last token that the first request streams, without prefill."""
    seen: list[tuple[float, int]] = []
    for chunk in engine.generate(input_ids=prompts, sampling_params=sampling, stream=True):
        if chunk.get("index", 0) == 0:
            # Several tokens may come in one chunk where steps are faster than the stream.
            seen.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
    (first, tokens), (last, more) = seen[0], seen[-1]
    return (last - first) / (more - tokens)


def _prepare() -> None:
    """Make this process ready for an engine before SGLang is imported in it."""
    if os.environ.get("SGLANG_PLATFORM") == "musa_reference":
        # Up to 0.5.20 SGLang imports what a CPU lacks before it looks for platforms.
        from sglang_musa_ext.cpu.stand_ins import prepare_process

        prepare_process()
    changes.install()


# Processes that the engine spawns run this as well.
if __name__ in ("__main__", "__mp_main__"):
    _prepare()

if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), int(sys.argv[2]))
