"""The benchmark's engines and measurements, made up: no SGLang is started for them."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_musa_ext.benchmark.contest import Contest
from sglang_musa_ext.benchmark.models import KINDS, Model
from sglang_musa_ext.benchmark.peers import FIELDS, Field
from sglang_musa_ext.engines.process import EngineDied

MODEL = Model("small", "llama", {}, 1 << 20, {}, "", (1,), (64,), ())
RIGHT = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.0]]}
WRONG = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.5]]}


class FakeEngine:
    """An engine that gives a fixed answer, and whose every pass takes ``milliseconds``.

    ``others`` are answers and times of peers whose backends take turns in it.
    """

    def __init__(
        self, answer: Any, milliseconds: float = 1.0, dies_after: int = 1 << 30,
        others: Mapping[str, tuple[Any, float]] | None = None,
    ) -> None:  # fmt: skip
        self.own, self.left = "upstream", dies_after
        self.served = {**(others or {}), "": (answer, milliseconds)}
        self.peers: list[str] = []
        self.batch = 1
        self.closed = False

    def _work(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise EngineDied("CUDA error: an illegal memory access was encountered")

    def _of(self, peer: str) -> tuple[Any, float]:
        return self.served[peer if peer in self.served else ""]

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
        self._work()
        return self._of(self.peers[0] if self.peers else "")[0]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.batch = len(prompts)
        self._work()

    def scheduler(self, method: str, peers: list[str], mode: str | None) -> None:
        assert method == "bench_turns"
        assert (mode is None) == (len(peers) < 2), (
            "answers are of all passes, times of those of the place"
        )
        self.peers = peers

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def state(self) -> dict[str, Any]:
        rows = []
        for mode, turn, peer in itertools.product(
            ("DECODE", "EXTEND"), range(9), self.peers or [self.own]
        ):
            took = self._of(peer)[1]
            row = {
                "peer": peer,
                "turn": turn,
                "mode": mode,
                "batch": self.batch,
                "tokens": 1,
                "draft": False,
            }
            rows.append(
                row
                | {
                    "since": took,
                    "forward": took / 2,
                    "host_us": 1.0,
                    "calls": 2,
                    "attention_us": 8.0,
                }
            )
        return {"bench": json.dumps({"forwards": rows, "traces": [], "backend": "", "memory": {}})}


def entered(
    engines: Any,
    model: Model = MODEL,
    kinds: Sequence[str] = KINDS,
    contenders: Field = FIELDS["cuda"],
) -> Contest:
    """A contest of fake engines that has not begun."""
    options = argparse.Namespace(rounds=3, steps=8, kinds=kinds)
    for name, engine in engines.items():
        engine.own = name
    return Contest(model, engines, options, Path(), contenders)


def contest(**engines: Any) -> Contest:
    """A contest of fake engines, after one decode place."""
    made = entered(engines)
    made._decode("decode", 1, 64)
    return made


def verdicts(contest: Contest) -> dict[str, tuple[str, int]]:
    """Return each peer's verdict, and how many times it has."""
    return {point.peer: (point.verdict, len(point.step_ms)) for point in contest.points}


PLANNER = "void flash::prepare_varlen_num_blocks_kernel<1>"
ATTENTION = {
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...": [26, 260.0],
    "void flash::FlashAttnFwdCombine<...": [26, 52.0],
}


def result(each: float = 3.0, besides: float = 5.0) -> dict[str, Any]:
    """Measurements in which a plan costs ``each`` µs, and upstream's pass ``besides`` µs more."""
    models: dict[str, Any] = {}
    for name, (theirs, ours) in {"dense": (1, 1), "gemma2": (14, 2), "verify": (32, 1)}.items():
        kind, mode = ("verify", "TARGET_VERIFY") if name == "verify" else ("decode", "DECODE")
        traces = [
            {"peer": peer, "mode": mode, "kernels": {PLANNER: [plans, plans * each], **ATTENTION}}
            for peer, plans in (("upstream", theirs), ("ours", ours))
        ]
        points = []
        for batch in (1, 8):
            time = 1000.0 + 100 * batch
            slow = time + each * (theirs - ours) + besides
            points += [point(kind, batch, "upstream", slow), point(kind, batch, "ours", time)]
            wrong = point(kind, batch, "in-tree", 0.0) | {"step_ms": [], "forward_ms": []}
            points.append(wrong | {"verdict": "wrong output (off by 0.5)"})
        held = {
            "allocator": {"allocated": 1 << 30, "reserved": 2 << 30},
            "sglang": {"kvcache": 4.0, "token_capacity": 1 << 16, "graph": {"decode": 0.25}},
        }
        more = {**held, "allocator": {"allocated": 1 << 30, "reserved": (2 << 30) + (1 << 20)}}
        run = {
            "title": name,
            "started": "today",
            "rounds": 3,
            "steps": 48,
            "points": points,
            "traces": traces,
        }
        models[name] = run | {"memory": {"upstream": held, "ours": more}}
    peers = {"upstream": "SGLang's own fa3", "ours": "sglang-musa-ext", "in-tree": "in tree"}
    return {
        "models": models,
        "peers": peers,
        "device": {"name": "a GPU"},
        "versions": {"sglang": "0.5.17"},
    }


def point(kind: str, batch: int, peer: str, micros: float) -> dict[str, Any]:
    """A point whose every round took ``micros``."""
    times = [micros / 1e3] * 3
    return {"kind": kind, "batch": batch, "tokens": 1024, "peer": peer, "verdict": "equal",
            "step_ms": times, "forward_ms": times, "call_us": [], "difference": 0.0}  # fmt: skip
