"""A server of one engine or of several: one for each node, or prefill and decode apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sglang_musa_ext.engines.ports import LOOPBACK
from sglang_musa_ext.engines.process import Engine

# What the engines of a server listen on, beyond the first port of its block. SGLang derives those
# of data-parallel attention from the first two of these.
RENDEZVOUS, SECOND_ENGINE, BOOTSTRAP = 1, 10, 20
HALVES = ("prefill", "decode")


class Server:
    """One engine that is asked."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Hold the engines of a server; the first is asked."""
        self.engines = engines

    def wait(self) -> Server:
        """Return when the server is up."""
        self.engines[0].wait()
        return self

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """Tokens and log-probabilities of each prompt's greedy continuation."""
        return self.engines[0].ask(prompts, new_tokens, **options)

    def flush(self) -> None:
        """Empty the prefix cache."""
        self.engines[0].flush()

    def reports(self) -> list[dict[str, Any]]:
        """The state reports of backends of this package, of every engine that answers."""
        return self.engines[0].reports()

    def kill(self) -> None:
        """End all processes at once."""
        for engine in self.engines:
            engine.kill()

    def close(self) -> None:
        """End all of them, those that are not asked first."""
        for engine in reversed(self.engines):
            engine.close()


class Apart(Server):
    """One engine that prefills and one that decodes; both get every request, with its room."""

    def __init__(self, engines: Sequence[Engine], port: int) -> None:
        """Hold who prefills and who decodes; ``port`` is the first of the server's."""
        super().__init__(engines)
        self._port = port + BOOTSTRAP
        self._rooms = itertools.count(1)

    def wait(self) -> Server:
        """Return when both are up."""
        for engine in self.engines:
            engine.wait()
        return self

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """Return the answer of the decoding engine, which gets what the other has prefilled."""
        number = len(prompts)
        meeting = {
            "bootstrap_host": [LOOPBACK] * number,
            "bootstrap_port": [self._port] * number,
            "bootstrap_room": list(itertools.islice(self._rooms, number)),
        }
        with ThreadPoolExecutor(len(self.engines)) as threads:
            answers = [
                threads.submit(engine.ask, prompts, new_tokens, **options, **meeting)
                for engine in self.engines
            ]
        _, decoded = (answer.result() for answer in answers)
        return decoded

    def flush(self) -> None:
        """Empty the prefix cache of both."""
        for engine in self.engines:
            engine.flush()

    def reports(self) -> list[dict[str, Any]]:
        """The state reports of backends of this package, of both."""
        return [report for engine in self.engines for report in engine.reports()]


def parts(nodes: int, port: int, *, apart: bool) -> list[dict[str, Any]]:
    """Return what each engine of a server is told beside what all are.

    Args:
        nodes: how many engines serve together.
        port: the first of the server's ports.
        apart: whether one engine prefills and another one decodes instead.
    """
    own = [{"port": port + SECOND_ENGINE * rank} for rank in range(2 if apart else nodes)]
    if apart:
        return [each | _half(mode, port) for each, mode in zip(own, HALVES, strict=True)]
    if nodes == 1:
        return own
    address = f"{LOOPBACK}:{port + RENDEZVOUS}"
    return [
        each | {"nnodes": nodes, "node_rank": rank, "dist_init_addr": address}
        for rank, each in enumerate(own)
    ]


def _half(mode: str, port: int) -> dict[str, Any]:
    return {
        "disaggregation_mode": mode,
        "disaggregation_transfer_backend": "nixl",
        "disaggregation_bootstrap_port": port + BOOTSTRAP,
    }
