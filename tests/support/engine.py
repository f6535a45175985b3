"""The SGLang engine for tests: imported once, with each case in a process forked from there.

``EngineServer`` starts ``python -m tests.support.engine``, which imports SGLang under the CPU
platform and then forks a process for every task it is sent; the engine's own processes are forked
too. An engine boots in about two seconds that way, instead of the half minute that three imports of
SGLang take. What a fork hides (the order in which a fresh process imports things) is left to the
cases that say ``spawn=True``.

The server process computes nothing itself: PyTorch's threads do not survive a fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from sglang_musa_ext import envs
from sglang_musa_ext.engines.ports import held_port, rendezvous
from sglang_musa_ext.engines.process import ending_with_its_processes
from tests.support import tiny_models
from tests.support.forks import (
    ForkServer,
    TaskFailed,
    fork_always,
    freeze_imports,
    kill_group,
    start,
    use_one_thread_in_forks,
)
from tests.support.tiny_models import TinyModel

THIS_MODULE = "tests.support.engine"
ENVIRONMENT = {
    "SGLANG_PLATFORM": "musa_reference",
    # A tiny model gains nothing from threads, and two engines run at once.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
ENDS_AT_ONCE = {
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}
"""From 0.5.17 on, an engine whose scheduler died waits for five seconds before it looks what the
GPU was doing; here that finds nothing."""
ENGINE_ARGUMENTS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "random_seed": 0,
    "device": "cpu",
    "disable_cuda_graph": True,
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "log_level": "info",
}
OURS: Mapping[str, Any] = {"attention_backend": "fa3", "page_size": 64}
TORCH_NATIVE: Mapping[str, Any] = {"attention_backend": "torch_native", "page_size": 1}


@dataclass(frozen=True)
class Request:
    """One greedy request."""

    prompt: tuple[int, ...]
    new_tokens: int = 8
    """0: the request does not say, and gets SGLang's 128, or as many as its context has room for.
    """
    adapter: str | None = None
    """The name of a LoRA adapter that the engine knows."""
    room: int | None = None
    """Where servers that prefill and decode apart meet for it, at the case's ``meeting_port``."""
    image: str | tuple[str, ...] | None = None
    """An image that goes with the prompt, or several files; see ``images`` and ``image_models``."""
    after: int = 0
    """Sent when the first request of its phase has produced this many tokens; 0: at once."""


@dataclass(frozen=True)
class EngineCase:
    """An engine to boot and what to ask of it."""

    model: Path
    phases: tuple[tuple[Request, ...], ...] = ()
    """Each phase begins when the one before it has ended."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Over ``usual``."""
    environ: Mapping[str, str] = field(default_factory=dict)
    before_boot: Callable[[], None] | None = None
    """Called where the engine boots, and so inherited by all forks; a module-level function."""
    meeting_port: int = 0
    """Of the server that prefills, where one prefills and another decodes."""
    usual: Mapping[str, Any] = field(default_factory=lambda: {**ENGINE_ARGUMENTS, **OURS})
    """Arguments of every engine on this kind of device; ``arguments`` go over them."""
    logprobs: bool = True
    """True if requests ask for log-probabilities, which keep SGLang from graphs of some kinds."""


@dataclass(frozen=True)
class Output:
    """The answer to one request."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token in ``tokens``."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the prefix cache."""
    verified: int
    """Rounds of speculative decoding: drafts that the model itself checked."""


@dataclass(frozen=True)
class EngineRun:
    """The answers to a case."""

    phases: list[list[Output]]
    reports: list[list[dict[str, Any]]]
    """Every scheduler's backends' ``musa_fa3_report``, before the first phase and after each."""

    @property
    def outputs(self) -> list[Output]:
        """Of all phases."""
        return [output for phase in self.phases for output in phase]

    @property
    def tokens(self) -> list[list[int]]:
        """Of all requests of all phases."""
        return [output.tokens for output in self.outputs]

    def report(self) -> dict[str, Any]:
        """The final report of the one backend of this engine."""
        (report,) = self.reports[-1]
        return report

    def statistics(self) -> dict[str, Any]:
        """The final counts of the one backend of this engine."""
        statistics: dict[str, Any] = self.report()["statistics"]
        return statistics


class EngineFailed(TaskFailed):
    """A task of an :class:`EngineServer` raised, died or took too long."""


@dataclass(frozen=True)
class RunningTask:
    """A function that runs in a forked process while its caller does something else."""

    pid: int
    log: Path
    connection: Connection[Any, Any]

    def require_running(self, what: str) -> None:
        """Fail if the function has returned or raised, or its process died."""
        if self.connection.poll():
            raise EngineFailed(f"{what} ended.", self.log)


class EngineServer(ForkServer):
    """A process that has imported SGLang, and forks one for each task."""

    failure = EngineFailed

    def __init__(self, directory: Path, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        """Start it; models and logs go to ``directory``, ``environment`` over this process's."""
        super().__init__(THIS_MODULE, directory, _environ(environment))
        self._environment = environment
        self.last_log = self._log
        """Of the task that was sent last."""
        self._tasks = 0
        self._models: dict[str, Path] = {}
        self._known: dict[tuple[str, tuple[int, ...], int], Any] = {}

    def run(self, case: EngineCase, *, timeout: float = 120.0) -> EngineRun:
        """Boot the engine of ``case`` in a forked process, and get what it answers.

        Raises:
            EngineFailed: it refused to start, died, or took longer than ``timeout`` seconds.
        """
        run: EngineRun = self.call(run_engine, case, timeout=timeout)
        return run

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> Any:
        """The result of ``function(*arguments)`` in a forked process; both must pickle."""
        with self.running(function, *arguments) as task:
            return self._reply(task.connection, function.__name__, task.log, timeout)

    @contextlib.contextmanager
    def running(self, function: Callable[..., Any], *arguments: Any) -> Iterator[RunningTask]:
        """Run ``function(*arguments)`` in a forked process that ends at the end of the context."""
        self._tasks += 1
        log = self.last_log = self._directory / f"{self._tasks}-{function.__name__}.log"
        log.touch()
        with self._connect() as connection:
            connection.send((log, function, arguments))
            task: int = connection.recv()
            try:
                yield RunningTask(task, log, connection)
            finally:
                kill_group(task)

    def spawn(self, case: EngineCase, *, timeout: float = 300.0) -> EngineRun:
        """Run in a fresh Python whose engine spawns its processes, as outside of tests."""
        self._tasks += 1
        question, answer = (
            self._directory / f"{self._tasks}-spawned.{what}" for what in ("case", "run")
        )
        question.write_bytes(pickle.dumps(case))
        log = self._directory / f"{self._tasks}-spawned.log"
        command = [sys.executable, "-m", THIS_MODULE, "--spawn", str(question), str(answer)]
        with started(command, log, self._environment) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            if process.returncode != 0:
                raise EngineFailed(
                    f"The spawned engine ended with status {process.returncode} (None: too slow).",
                    log,
                )
        run: EngineRun = pickle.loads(answer.read_bytes())
        return run

    def model(self, tiny: TinyModel) -> Path:
        """The directory of the checkpoint of ``tiny``, built at the first call."""
        if tiny.name not in self._models:
            directory = self._directory / tiny.name
            self.call(tiny.build, directory)
            self._models[tiny.name] = directory
        return self._models[tiny.name]

    def greedy(self, model: Path, request: Request) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities that transformers gives ``request``, computed once."""
        (answer,) = self.greedy_all(model, [request])
        return answer

    def greedy_all(
        self, model: Path, requests: Sequence[Request]
    ) -> list[tuple[list[int], list[float]]]:
        """Return ``greedy`` of each request; those that are not known yet take one process."""
        asked = [(str(model), request.prompt, request.new_tokens) for request in requests]
        new = [key for key in dict.fromkeys(asked) if key not in self._known]
        if new:
            prompts = [(prompt, new_tokens) for _, prompt, new_tokens in new]
            answers = self.call(tiny_models.greedy_each, model, prompts)
            self._known.update(zip(new, answers, strict=True))
        return [self._known[key] for key in asked]

    def _reply(self, connection: Connection[Any, Any], name: str, log: Path, timeout: float) -> Any:
        if not connection.poll(timeout):
            raise EngineFailed(f"{name} took more than {timeout:.0f} s.", log)
        try:
            error, result = connection.recv()
        except EOFError:
            raise EngineFailed(f"The process of {name} died.", log) from None
        if error is not None:
            raise EngineFailed(f"{name} raised:\n{error}", log)
        return result


def post(url: str, body: Mapping[str, Any], *, timeout: float = 120.0) -> Any:
    """Return what a server answers to ``body``, both as JSON; ``timeout`` is in seconds."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = ENVIRONMENT
) -> Iterator[subprocess.Popen[bytes]]:
    """``command`` running under the CPU reference platform, or in another ``environment``, its
    output in ``log``; ended with its children.
    """
    process = start(command, log, _environ(environment))
    try:
        yield process
    finally:
        kill_group(process.pid)
        process.wait()


def _environ(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of a process that has ``environment`` over this one's."""
    return {**os.environ, **ENDS_AT_ONCE, **environment}


# In the server's process
# ---------------------------------------------------------------------------


def serve(address: str) -> None:
    """Import SGLang, then fork a process for each connection to ``address``."""
    import_engine()
    freeze_imports()
    # Finished tasks are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with Listener(address) as listener:
        while True:
            with listener.accept() as connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _do_task(connection)


def import_engine() -> None:
    """Import everything that an engine's processes import, so that forked ones need not."""
    if os.environ.get("SGLANG_PLATFORM") == ENVIRONMENT["SGLANG_PLATFORM"]:
        from sglang_musa_ext.cpu.stand_ins import prepare_process

        prepare_process()
    for name in (
        "sglang",
        "sglang.srt.entrypoints.engine",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.detokenizer_manager",
        "sglang.srt.managers.data_parallel_controller",
        "sglang.srt.layers.attention.attention_registry",
        "sglang_musa_ext.attention.selection",
        "sglang_musa_ext.kernels.reference",
        "transformers",
        # For what forks call in test modules.
        "pytest",
        "tests.support.engine",
        "tests.support.tiny_models",
    ):
        importlib.import_module(name)
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()
    remember_contract()
    use_one_thread_in_forks()


def remember_contract() -> None:
    """Compare this process's SGLang with the contract here, a second's work for each fork else."""
    from sglang_musa_ext.upstream import check

    remembered: Any = functools.cache(check.check_upstream)
    vars(check)["check_upstream"] = remembered
    # As the plugin asks, of which each question has its own answer.
    remembered(None, None, used_by=check.SERVING)
    for module in ("ranks", "musa_defaults", "musa_vision"):
        remembered(used_by=(module,))


def _do_task(connection: Connection[Any, Any]) -> None:
    """Do the one task of this forked process, and end it."""
    os.setsid()
    connection.send(os.getpid())
    log, function, arguments = connection.recv()
    with log.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    reply: tuple[str | None, Any]
    try:
        reply = (None, function(*arguments))
    except BaseException:
        reply = (traceback.format_exc(), None)
    connection.send(reply)
    os._exit(0)


# In a task's process
# -------------------------------------------------------------------------------


def run_engine(case: EngineCase) -> EngineRun:
    """Boot the engine of ``case`` with forked processes, and ask it."""
    fork_always()
    return ask_engine(case)


def ask_engine(case: EngineCase) -> EngineRun:
    """Boot the engine of ``case`` and ask it, in this process."""
    with booted(case) as engine:
        return ask_booted(engine, case)


def ask_booted(engine: Any, case: EngineCase) -> EngineRun:
    """Ask the ``engine`` of ``case``."""
    reports = [reports_of(engine)]
    phases = []
    for requests in case.phases:
        phases.append(engine.loop.run_until_complete(_phase(engine, case, requests)))
        reports.append(reports_of(engine))
    return EngineRun(phases, reports)


def embed(case: EngineCase) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Return the embeddings of the prompts of ``case``'s only phase, and backends' reports."""
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    fork_always()
    (requests,) = case.phases
    with booted(case) as engine:
        request = EmbeddingReqInput(input_ids=[list(request.prompt) for request in requests])
        answers = engine.loop.run_until_complete(
            anext(engine.tokenizer_manager.generate_request(request, None))
        )
        return [answer["embedding"] for answer in answers], reports_of(engine)


@contextlib.contextmanager
def booted(case: EngineCase) -> Iterator[Any]:
    """The engine of ``case`` in this process, shut down at the end."""
    # Most tests count plans, which prefill over raw keys takes none of.
    os.environ.update({envs.RAW_PREFILL: "off"} | dict(case.environ))
    import sglang
    import torch

    torch.set_num_threads(1)
    if case.before_boot is not None:
        case.before_boot()
    arguments = {**case.usual, **case.arguments}
    with held_port() as port:
        arguments |= rendezvous(arguments, port)
        engine = sglang.Engine(model_path=str(case.model), **arguments)
        try:
            with ending_with_its_processes():
                yield engine
        finally:
            engine.shutdown()


def reports_of(engine: Any) -> list[dict[str, Any]]:
    """``musa_fa3_report`` of every backend in every scheduler of ``engine``."""
    states = engine.get_server_info()["internal_states"]
    return [report for state in states for report in state.get("sglang_musa_ext", [])]


async def _phase(engine: Any, case: EngineCase, requests: Sequence[Request]) -> list[Output]:
    """The outputs of ``requests``; those with ``after`` wait for the first one."""
    progress = asyncio.Condition()
    produced = 0

    async def first(request: Request) -> Output:
        nonlocal produced
        stream = await engine.async_generate(**_arguments_of(request, case.logprobs), stream=True)
        async for answer in stream:
            async with progress:
                produced = answer["meta_info"]["completion_tokens"]
                progress.notify_all()
        return _output(answer)

    async def later(request: Request) -> Output:
        async with progress:
            await progress.wait_for(lambda: produced >= request.after)
        return _output(await engine.async_generate(**_arguments_of(request, case.logprobs)))

    if any(request.after for request in requests):
        return list(await asyncio.gather(first(requests[0]), *map(later, requests[1:])))
    arguments = [
        _arguments_of(request, case.logprobs) | _meeting(case, request) for request in requests
    ]
    names = {name for each in arguments for name in each} - {"return_logprob"}
    batch: dict[str, list[Any]] = {}
    for name in names:
        batch[name] = [each.get(name) for each in arguments]
    answers = await engine.async_generate(**batch, return_logprob=case.logprobs)
    return [_output(answer) for answer in answers]


def _arguments_of(request: Request, logprobs: bool) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    if request.new_tokens:
        sampling["max_new_tokens"] = request.new_tokens
    arguments = {"input_ids": list(request.prompt), "sampling_params": sampling}
    image = list(request.image) if isinstance(request.image, tuple) else request.image
    more = {"lora_path": request.adapter, "image_data": image}
    given = {name: value for name, value in more.items() if value is not None}
    return arguments | given | {"return_logprob": logprobs}


def _meeting(case: EngineCase, request: Request) -> dict[str, Any]:
    """Return what a request says to servers that prefill and decode apart."""
    if request.room is None:
        return {}
    return {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": case.meeting_port,
        "bootstrap_room": request.room,
    }


def _output(answer: dict[str, Any]) -> Output:
    about = answer["meta_info"]
    chosen = about.get("output_token_logprobs", ())
    return Output(
        tokens=list(answer["output_ids"]),
        logprobs=[logprob for logprob, *_ in chosen],
        prompt_tokens=about["prompt_tokens"],
        cached_tokens=about["cached_tokens"],
        verified=about.get("spec_verify_ct", 0),
    )


def main(arguments: Sequence[str]) -> None:
    """Serve at an address, or with ``--spawn`` run one file's case and write the result."""
    if arguments[0] == "--spawn":
        question, answer = map(Path, arguments[1:])
        answer.write_bytes(pickle.dumps(ask_engine(pickle.loads(question.read_bytes()))))
    else:
        serve(arguments[0])


if __name__ == "__main__":
    # What travels between processes is named by the module's own name, so that module must be the
    # one that runs.
    importlib.import_module("tests.support.engine").main(sys.argv[1:])
