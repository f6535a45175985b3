"""SGLang's HTTP server with this backend under many requests: its answers and what it keeps.

``python -m tests.load.server`` runs the long version, ``scripts/load``. A wave is many streaming
requests at once, of which some are aborted, beside requests that are malformed. Every answer that
was finished must be the one that the same server gave the request alone. After each wave the server
must hold no request, no token of the KV cache, and no more open files, plans, known calls and slots
of the MLA workspace than before the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from sglang_musa_ext.attention import metrics
from sglang_musa_ext.engines.ports import held_port
from tests.support import tiny_models
from tests.support.engine import EngineServer
from tests.support.forks import fork_always
from tests.support.tiny_models import VOCABULARY, llama

HOST = "127.0.0.1"
CONTEXT = 512
LARGEST_GROWTH = 1.05
"""Resident memory after the third wave, as a share of that after the second."""
COUNTER = f"{metrics.PREFIX}calls_total"
SECONDS_TO_SETTLE = 60.0
"""For a server to notice that its clients have gone."""


@dataclass(frozen=True)
class Ask:
    """A greedy request that streams its answer."""

    prompt: tuple[int, ...]
    new_tokens: int
    leaves_after: int = 0
    """Parts of the answer after which the client is gone; 0: it stays."""
    aborts: bool = False
    """Says so to the server before it goes."""


@dataclass
class Kept:
    """The memory that a server holds when it has nothing to do."""

    requests: int
    tokens: int
    open_files: int
    resident: int
    """Bytes, of all its processes."""
    backend: dict[str, int] = field(default_factory=dict)
    """The plans and the like that this package's backends keep, as their reports say."""

    def more_than(self, before: Kept) -> Iterator[str]:
        """Say what is kept that should not be, or more of than before the first wave."""
        if self.requests or self.tokens:
            yield f"{self.requests} requests, {self.tokens} tokens"
        if self.open_files > before.open_files:
            yield f"{self.open_files} files open: {before}"
        for name, count in self.backend.items():
            if count > before.backend[name]:
                yield f"{count} {name}: {before}"


@dataclass
class LoadReport:
    """The requests, and the observations."""

    asked: int = 0
    finished: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers unlike those that the same requests got alone."""
    statuses: dict[str, str] = field(default_factory=dict)
    """What each kind of malformed request was answered with."""
    before: Kept | None = None
    after: list[Kept] = field(default_factory=list)
    """One of each wave."""
    counted_calls: float = 0.0
    """Attention calls by this package's counter among SGLang's Prometheus metrics."""

    def require_nothing_lost(self) -> None:
        """Raise with everything that is wrong."""
        assert self.before is not None
        faults = list(self.wrong)
        for number, kept in enumerate(self.after, 1):
            faults += [f"wave {number} left {more}" for more in kept.more_than(self.before)]
        if len(self.after) > 2:
            second, third = self.after[1].resident, self.after[2].resident
            if third > second * LARGEST_GROWTH:
                faults.append(f"resident memory grew from {second:,} to {third:,} bytes")
        if not self.counted_calls:
            faults.append(f"/metrics has no {COUNTER} above 0")
        for kind, status in self.statuses.items():
            if not status.startswith("4") and kind != "unknown model":
                faults.append(f"{kind}: the answer was {status}, expected a status from 400 to 499")
        assert not faults, "\n".join(faults)


def random_asks(count: int, seed: int) -> list[Ask]:
    """Requests of many lengths; one in four goes away early, half of these with a word."""
    chance = random.Random(seed)
    asks = []
    for _ in range(count):
        length = chance.choice((1, 5, 63, 64, 65, 130, chance.randint(1, 200)))
        prompt = tuple(chance.choices(range(3, VOCABULARY), k=length))
        leaves = chance.randint(1, 4) if chance.random() < 0.25 else 0
        asks.append(Ask(prompt, chance.randint(4, 12), leaves, chance.random() < 0.5))
    return asks


# --- the server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(engines: EngineServer, model: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the URL and the process of a server of ``model`` that is ready."""
    with held_port() as port, held_port() as nccl_port:
        options = {
            "--attention-backend": "fa3", "--page-size": 64, "--dtype": "float32",
            "--model-path": model, "--host": HOST, "--port": port, "--nccl-port": nccl_port,
            "--context-length": CONTEXT, "--max-total-tokens": 8192, "--random-seed": 0,
        }  # fmt: skip
        words = [str(word) for option in options.items() for word in option]
        with engines.running(launch_server, [*words, "--enable-metrics"]) as server:
            while "ready to roll" not in server.log.read_text(errors="replace"):
                server.require_running("The server")
                time.sleep(0.2)
            yield f"http://{HOST}:{port}", psutil.Process(server.pid)
            server.require_running("The server")


def launch_server(options: Sequence[str]) -> None:
    """Do what ``python -m sglang.launch_server`` does with these options, in forks of this process.

    What only fresh ones show is left to ``tests/engine/test_engine.py::test_http_server``.
    """
    fork_always()
    sys.argv = ["sglang.launch_server", *options]
    runpy.run_module("sglang.launch_server", run_name="__main__")


# --- requests -------------------------------------------------------------------------------------


async def answer(session: aiohttp.ClientSession, url: str, ask: Ask, rid: str) -> list[int] | None:
    """Return the tokens of the whole answer; ``None`` if the client went before its end."""
    sampling = {"temperature": 0, "max_new_tokens": ask.new_tokens, "ignore_eos": True}
    body = {"input_ids": ask.prompt, "sampling_params": sampling, "stream": True, "rid": rid}
    tokens: list[int] = []
    parts = 0
    async with session.post(f"{url}/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            tokens = json.loads(line[5:])["output_ids"]
            parts += 1
            if ask.leaves_after and parts >= min(ask.leaves_after, ask.new_tokens - 1):
                if ask.aborts:
                    await session.post(f"{url}/abort_request", json={"rid": rid})
                return None
    return tokens


async def malformed(session: aiohttp.ClientSession, url: str) -> dict[str, str]:
    """Send what no server should trip over; return what each kind was answered with."""
    huge = {"input_ids": [5] * (8 * CONTEXT)}
    negative = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": -3}}
    unknown = {"model": "no such model", "prompt": "hello", "max_tokens": 2}
    kinds: dict[str, tuple[str, bytes]] = {
        "bad JSON": ("/generate", b'{"input_ids": [1, 2'),
        "broken UTF-8": ("/generate", b'{"text": "\xff\xfe\xc3("}'),
        "huge prompt": ("/generate", json.dumps(huge).encode()),
        "negative length": ("/generate", json.dumps(negative).encode()),
        "unknown model": ("/v1/completions", json.dumps(unknown).encode()),
    }
    statuses = {}
    for kind, (path, body) in kinds.items():
        headers = {"Content-Type": "application/json"}
        async with session.post(url + path, data=body, headers=headers) as response:
            await response.read()
            statuses[kind] = str(response.status)
    return statuses


@contextlib.asynccontextmanager
async def half_open(url: str, count: int) -> Any:
    """Hold connections on which half a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.close()


# --- a run ----------------------------------------------------------------------------------------


async def run_load(
    url: str, process: psutil.Process, asks: Sequence[Ask], waves: int
) -> LoadReport:
    """Ask each request alone, then all at once in ``waves`` waves."""
    report = LoadReport()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        alone = [
            await answer(session, url, Ask(ask.prompt, ask.new_tokens), f"alone-{index}")
            for index, ask in enumerate(asks)
        ]
        await malformed(session, url)
    # Threads of SGLang's and ours open their files of metrics with the first reading, seconds after
    # the start; ours begins last.
    await counted(url)
    report.before = await settled(url, process)
    for wave in range(waves):
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            half_open(url, 8),
        ):
            # SGLang aborts every request whose id begins with the one that is said.
            work = [
                answer(session, url, ask, f"wave-{wave}-{index:05}")
                for index, ask in enumerate(asks)
            ]
            answers, report.statuses = await asyncio.gather(
                asyncio.gather(*work), malformed(session, url)
            )
        _compare(report, asks, alone, answers, wave)
        report.after.append(await settled(url, process))
    report.counted_calls = await counted(url)
    return report


async def counted(url: str) -> float:
    """Return the value of :data:`COUNTER`, as soon as its thread has read one that is no zero."""
    value, deadline = 0.0, time.monotonic() + 4 * metrics.SECONDS
    while not value and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
        samples = [line.rpartition(" ")[2] for line in lines if line.startswith(COUNTER)]
        value = sum(map(float, samples))
    return value


def _compare(
    report: LoadReport, asks: Sequence[Ask], alone: Sequence[Any], answers: Sequence[Any], wave: int
) -> None:
    report.asked += len(asks)
    for index, (ask, expected, seen) in enumerate(zip(asks, alone, answers, strict=True)):
        if seen is None:
            report.left += 1
            continue
        report.finished += 1
        if seen != expected or len(seen) != ask.new_tokens:
            report.wrong.append(f"wave {wave + 1}, request {index}: {seen}, alone {expected}")


async def settled(url: str, process: psutil.Process) -> Kept:
    """Return what the server keeps, as soon as it keeps nothing or the time for that is over."""
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    fewest_files = sys.maxsize
    while True:
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/flush_cache") as response:
                await response.read()
            async with session.get(f"{url}/v1/loads") as response:
                (load,) = (await response.json())["loads"]
        requests = load["num_running_reqs"] + load["num_waiting_reqs"]
        await asyncio.sleep(1.0)
        tree = [process, *process.children(recursive=True)]
        files = sum(each.num_fds() for each in tree)
        idle = not requests and not load["num_used_tokens"] and files >= fewest_files
        fewest_files = min(files, fewest_files)
        if idle or time.monotonic() > deadline:
            resident = sum(each.memory_info().rss for each in tree)
            held = await held_by_backends(url)
            return Kept(requests, load["num_used_tokens"], fewest_files, resident, held)


async def held_by_backends(url: str) -> dict[str, int]:
    """Return what the backends of all schedulers hold together."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/server_info") as response:
        states = (await response.json())["internal_states"]
    held = [report["held"] for state in states for report in state["sglang_musa_ext"]]
    assert held, "no scheduler has a backend of this package"
    return {name: sum(each[name] for each in held) for name in held[0]}


def load_server(engines: EngineServer, requests: int, waves: int) -> LoadReport:
    """Serve a tiny model, and run ``waves`` waves of ``requests`` requests."""
    model = engines.model(llama())
    engines.call(tiny_models.add_tokenizer, model)
    with serving(engines, model) as (url, process):
        return asyncio.run(run_load(url, process, random_asks(requests, seed=1), waves))


def main() -> int:
    """Run the command line; the exit status is 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="scripts/load", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="of a wave (%(default)s)")
    parser.add_argument("--waves", type=int, default=3, help="alike (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        engines = EngineServer(Path(folder))
        try:
            report = load_server(engines, options.requests, options.waves)
        finally:
            engines.close()
    print(f"{report.asked} requests, {report.finished} finished, {report.left} left early")
    print(f"malformed ones: {report.statuses}; {COUNTER} {report.counted_calls:,.0f}")
    for name, kept in [("before", report.before), *enumerate(report.after, 1)]:
        print(f"{name}: {kept}")
    try:
        report.require_nothing_lost()
    except AssertionError as error:
        print(f"wrong:\n{error}")
        return 1
    print("nothing was lost")
    return 0


if __name__ == "__main__":
    # Another process runs a function of this module, which it looks for under the module's name.
    from tests.load import server

    sys.exit(server.main())
