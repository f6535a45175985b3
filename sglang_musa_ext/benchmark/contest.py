"""One model of the benchmark: peers whose answers are equal are timed in turns."""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_musa_ext.benchmark.models import PAGE, Model, engine_arguments
from sglang_musa_ext.benchmark.peers import FIELDS, Field, Peer, peer_environment
from sglang_musa_ext.benchmark.probe import FORWARD_MODES, measurements
from sglang_musa_ext.engines.process import Engine, EngineDied
from sglang_musa_ext.validation.engine import EngineAnswers, deviation

PROMPTS, TOKENS = 9, 24576
"""Tokens of the prompts that a peer prefills in one round, and the most prompts of a round."""
IN_ONE_ENGINE = ("prefill", "eager")
"""Kinds of places whose passes the peers' backends serve in turn in the baseline's engine."""
STARTING = 3
"""Passes of a round that do not count: they still fill the pipeline of the scheduler."""


@dataclass
class Point:
    """The measurements of one peer at one place."""

    kind: str
    batch: int
    tokens: int
    peer: str
    verdict: str
    """``equal``, or why there are no times."""
    difference: float | None = None
    """The largest log-probability difference from the baseline's up to the first other token."""
    allowed: float | None = None
    """The limit: twice the difference of the baseline's two answers, at least the resolution."""
    step_ms: list[float] = field(default_factory=list)
    """From the end of one pass to the end of the next: the median of each round."""
    forward_ms: list[float] = field(default_factory=list)
    """From a pass's first work to its last."""
    call_us: list[float] = field(default_factory=list)
    """The host's time per attention call; empty under graphs."""
    over_upstream: list[float] = field(default_factory=list)
    """Ratios to the baseline of passes that took turns in one engine: each round's median."""

    @property
    def what(self) -> str:
        """Return the pass times that stand for it; without graphs, prompts come one at a time."""
        return "forward" if self.kind == "prefill" else "since"

    def leave(self, verdict: str) -> None:
        """Go without times, for this reason."""
        self.verdict = verdict
        self.step_ms, self.forward_ms, self.call_us, self.over_upstream = [], [], [], []


Rows = Sequence[Mapping[str, Any]]
"""Passes of an engine, as the probe measured them."""
Measure = Callable[[Engine, Sequence[str]], Mapping[str, Rows]]
"""A function that has an engine work at a place, and gives the passes that count, by peer."""


class Contest:
    """The engines of one model, and what is asked of them in turn."""

    def __init__(
        self,
        model: Model,
        engines: Mapping[str, Engine],
        options: argparse.Namespace,
        gate: Path,
        contenders: Field = FIELDS["cuda"],
    ) -> None:
        """``gate`` is the file that the engines' schedulers wait for."""
        self.contenders, self.baseline = contenders, contenders.baseline.name
        self.model, self.options, self.gate = model, options, gate
        self.engines = dict(engines)
        self.failed: dict[str, str] = {}
        self.points: list[Point] = []
        self.rounds = options.rounds
        self.steps = options.steps

    def run(self) -> Iterator[None]:
        """Measure all that this model is for and that was asked for; yield after each place."""
        kinds = set(self.model.kinds) & set(self.options.kinds)
        for kind in kinds & {"decode", "verify"}:
            for context in self.model.contexts:
                for batch in self.model.batches:
                    self._decode(kind, batch, context)
                    yield
        for tokens in self.model.prefills if "prefill" in kinds else ():
            self._prefill(tokens)
            yield
        if "eager" in kinds:
            # A batch that no graph was captured for runs without one.
            self._decode("eager", max(self.model.batches) + 2, PAGE)
            yield

    def _decode(self, kind: str, batch: int, context: int) -> None:
        needed = batch * (-(-(context + self.steps + 8) // PAGE) + 1) * PAGE
        if needed > self.model.kv_tokens:
            self.points.append(
                Point(kind, batch, context, self.baseline, f"needs a KV cache of {needed} tokens")
            )
            return
        prompts = [prompt(context, row) for row in range(batch)]

        def measure(engine: Engine, peers: Sequence[str]) -> dict[str, Rows]:
            engine.run(prompts, self.steps)
            rows = rows_of(engine)
            return {peer: passes(rows, FORWARD_MODES[kind], batch, peer) for peer in peers}

        self._compare(kind, batch, context, prompts, measure)

    def _prefill(self, tokens: int) -> None:
        fresh = iter(range(1000, 10_000))

        def measure(engine: Engine, peers: Sequence[str]) -> dict[str, Rows]:
            rows = []
            for _ in range(len(peers) * max(1, min(PROMPTS, TOKENS // tokens))):
                engine.flush()
                engine.run([prompt(tokens, next(fresh))], 1)
                rows += rows_of(engine)
            return {peer: prefills(rows, peer) for peer in peers}

        self._compare("prefill", 1, tokens, [prompt(tokens, 0)], measure)

    def _compare(
        self, kind: str, batch: int, tokens: int, prompts: Sequence[Sequence[int]], measure: Measure
    ) -> None:
        """Check that the peers give equal answers, and time those that do, in turns."""
        points = {
            name: Point(kind, batch, tokens, name, "") for name in [*self.engines, *self.failed]
        }
        self.points += points.values()
        self._judge(points, prompts)
        if kind in IN_ONE_ENGINE:
            self._race_in_one_engine(points, FORWARD_MODES[kind], prompts, measure)
        else:
            self._race(points, measure)
        print(
            f"  {kind:<8}batch {batch:>3}, {tokens:>5} tokens: "
            + "; ".join(map(in_short, points.values())),
            flush=True,
        )

    def _race(self, points: Mapping[str, Point], measure: Measure) -> None:
        """Time each peer in its own engine."""
        racing = racers(points)
        for index in range(self.rounds + 1):
            for name in (
                racing[index % len(racing) :] + racing[: index % len(racing)] if racing else ()
            ):
                if name in self.failed:
                    continue
                with self.survives(name, points[name]):
                    rows = measure(self.engines[name], [name])[name]
                    if index:  # The first round warms up.
                        record(points[name], rows)

    def _race_in_one_engine(
        self,
        points: Mapping[str, Point],
        mode: str,
        prompts: Sequence[Sequence[int]],
        measure: Measure,
    ) -> None:
        """Time the peers as backends of the baseline's engine, after comparing answers there."""
        if self.baseline not in racers(points):
            return
        engine = self.engines[self.baseline]
        with self.survives(self.baseline, points[self.baseline]):
            points = {**points, **self._points_beside(points)}
            answers = {name: self._answer_in_one_engine(name, prompts) for name in racers(points)}
            for name, answer in answers.items():
                judge(points[name], deviation(answer, answers[self.baseline])[0])
            racing = racers(points)
            engine.scheduler("bench_turns", peers=racing, mode=mode)
            for index in range(self.rounds + 1):
                rows = measure(engine, racing)
                for name in racing if index else ():
                    record(points[name], rows[name])
                    points[name].over_upstream.append(
                        paired(rows[name], rows[self.baseline], points[name].what)
                    )
            engine.scheduler("bench_turns", peers=[], mode=None)
        if self.baseline in self.failed:
            for name in racers(points):
                points[name].leave(self.failed[self.baseline])

    def _points_beside(self, points: Mapping[str, Point]) -> dict[str, Point]:
        """Return points of those who take turns beside the peers, before they are judged."""
        chosen = {peer.name: peer.beside for peer in self.contenders.peers if peer.beside}
        beside = {chosen[name]: points[name] for name in racers(points) if name in chosen}
        companions = {
            name: Point(
                point.kind, point.batch, point.tokens, name, point.verdict, allowed=point.allowed
            )
            for name, point in beside.items()
        }
        self.points += companions.values()
        return companions

    def _answer_in_one_engine(self, name: str, prompts: Sequence[Sequence[int]]) -> EngineAnswers:
        engine = self.engines[self.baseline]
        engine.scheduler("bench_turns", peers=[name], mode=None)
        engine.flush()
        return answer_of(engine, prompts)

    def _judge(self, points: Mapping[str, Point], prompts: Sequence[Sequence[int]]) -> None:
        """Say of each point whether its peer's answers are those of the baseline.

        Each peer answers twice. What the baseline's two answers differ by, in batches that were put
        together otherwise, is what a peer may differ by.
        """
        answers: dict[str, list[EngineAnswers]] = {}
        for name, point in points.items():
            point.verdict = self.failed.get(name, "")
            if name in self.engines:
                with self.survives(name, point):
                    answers[name] = [answer_of(self.engines[name], prompts) for _ in range(2)]
        if self.baseline not in answers:
            for point in points.values():
                point.verdict = point.verdict or f"{self.baseline} gave no answer to compare with"
            return
        first, right = answers[self.baseline]
        allowed = max(2 * deviation(first, right)[0], self.contenders.resolution)
        for name, (_, answer) in answers.items():
            points[name].allowed = allowed
            judge(points[name], deviation(answer, right)[0])

    @contextmanager
    def survives(self, name: str, point: Point) -> Iterator[None]:
        """Take an engine that dies out of the contest, with the reason."""
        try:
            yield
        except EngineDied as error:
            self.failed[name] = f"failed: {str(error).splitlines()[0][:300]}"
            point.leave(self.failed[name])
            self.engines.pop(name).close()

    def traces(self) -> list[dict[str, Any]]:
        """Return kernels by pass, traced at the end: a profiler slows all that comes after it."""
        every = []
        modes = {"EXTEND": 1} | ({"TARGET_VERIFY": 2} if self.model.draft else {"DECODE": 2})
        length = 128 if self.contenders.device == "cpu" else 2048
        for name, engine in list(self.engines.items()):
            for mode, count in modes.items():
                with self.survives(name, Point("trace", 1, length, name, "")):
                    engine.flush()
                    engine.scheduler("bench_trace", mode=mode, passes=count)
                    engine.run([prompt(length, 77)], 12 if mode != "EXTEND" else 1)
                    traces = measurements(engine.state())["traces"]
                    every += [{"peer": name, **trace} for trace in traces]
        return every


def rows_of(engine: Engine) -> list[dict[str, Any]]:
    """Return the forwards of the target model since they were last asked for."""
    rows = measurements(engine.state())["forwards"]
    return [row for row in rows if not row["draft"]]


def answer_of(engine: Engine, prompts: Sequence[Sequence[int]]) -> EngineAnswers:
    """Return the first tokens by which an engine continues prompts, without measuring."""
    reply = engine.ask(prompts, 8)
    rows_of(engine)
    return EngineAnswers(reply["tokens"], reply["logprobs"], [])


def racers(points: Mapping[str, Point]) -> list[str]:
    """Return the peers whose answers are the baseline's."""
    return [name for name, point in points.items() if point.verdict == "equal"]


def judge(point: Point, off: float) -> None:
    """Judge a difference ``off`` from the baseline; it is NaN where an answer has no number."""
    assert point.allowed is not None
    point.difference = off if math.isfinite(off) else None
    point.verdict = (
        "equal"
        if off <= point.allowed
        else f"wrong output (off by {off:.2g}, not {point.allowed:.2g})"
    )


def passes(rows: Rows, mode: str, batch: int, peer: str) -> Rows:
    """Return the passes of this mode, batch and peer that follow one of this mode and batch."""
    wanted = (mode, batch)
    kinds = [(row["mode"], row["batch"]) for row in rows]
    pairs = zip(rows[1:], itertools.pairwise(kinds), strict=False)
    chosen = [row for row, (before, own) in pairs if before == own == wanted]
    return [row for row in chosen[STARTING:] if row["peer"] == peer]


def fewest_steps(model: Model, kinds: Sequence[str], contenders: Field) -> int:
    """Return the fewest steps with which each round has a pass of each peer at each place."""
    racing = len(contenders.peers) + sum(bool(peer.beside) for peer in contenders.peers)
    # Each round of turns has another order: so many passes hold all turns of one at least.
    counted = {"decode": 1, "verify": 1, "eager": 2 * racing - 1}
    passes = [counted[kind] for kind in counted.keys() & {*model.kinds} & {*kinds}]
    if not passes:
        return 1
    # The prefill gives the first token, a verify pass all the drafted ones at most.
    tokens: int = model.arguments.get("speculative_num_draft_tokens", 1)
    return 1 + (STARTING + max(passes)) * tokens + 1


def prefills(rows: Rows, peer: str) -> Rows:
    """Return a peer's passes that each prefill a prompt."""
    return [row for row in rows if (row["mode"], row["peer"]) == ("EXTEND", peer)]


def record(point: Point, rows: Rows) -> None:
    """Add the medians of a round's passes to a point, and the host's time if Python makes calls.

    Raises:
        RuntimeError: there is none, so later rounds would stand beside other peers' earlier ones.
    """
    if not rows:
        raise RuntimeError(f"No {point.kind} pass of {point.peer} in a round, batch {point.batch}.")
    if point.what == "since":
        point.step_ms.append(statistics.median(row["since"] for row in rows))
    point.forward_ms.append(statistics.median(row["forward"] for row in rows))
    calls = [row["attention_us"] / row["calls"] for row in rows if row["calls"]]
    point.call_us += [statistics.median(calls)] if calls else []


def paired(rows: Rows, baselines: Rows, what: str) -> float:
    """Return the median ratio of a peer's passes to the baseline's, pair by pair of one turn."""
    theirs = {row["turn"]: row[what] for row in baselines}
    return float(
        statistics.median(row[what] / theirs[row["turn"]] for row in rows if row["turn"] in theirs)
    )


def in_short(point: Point) -> str:
    """Return a point in a few words, for the progress."""
    if point.verdict != "equal":
        return f"{point.peer} {point.verdict}"
    shown = point.step_ms or point.forward_ms
    return (
        f"{point.peer} {statistics.median(shown):.3f} ms"
        if shown
        else f"{point.peer} without a time"
    )


def prompt(length: int, seed: int) -> list[int]:
    """Return tokens that differ from seed to seed from the first one on."""
    return [
        (7 * position + 131 * seed + position * position % 101) % 500 + 4
        for position in range(length)
    ]


# --- from the start of the engines to their end ---------------------------------------------------


@contextmanager
def entered(
    model: Model, name: str, contenders: Field, options: argparse.Namespace, out: Path
) -> Iterator[Contest]:
    """Start the engines of a model, which import what they need and wait at its gate; ends them."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = engine_arguments(model, scratch, contenders.device)
        engines = {}
        for peer in contenders.peers:
            settings = {**arguments, "attention_backend": peer.attention}
            engines[peer.name] = Engine(
                settings,
                peer_environment(peer, contenders, scratch),
                out / f"{name}.{peer.name}.log",
                400,
            )
            stack.callback(engines[peer.name].close)
        yield Contest(model, engines, options, scratch / "gate", contenders)


def contend(contest: Contest) -> Iterator[dict[str, Any]]:
    """Boot the engines of a contest, measure, and end them; yield results after each place."""
    began = time.monotonic()
    contest.gate.touch()
    measured: dict[str, Any] = {
        "title": contest.model.title, "shape": dict(contest.model.shape),
        "kv_tokens": contest.model.kv_tokens,
        "failed": contest.failed, "points": [], "traces": [], "rounds": contest.rounds,
        "steps": contest.steps,
        "started": now(),
        "memory": {peer.name: _first_state(peer, contest) for peer in contest.contenders.peers},
    }  # fmt: skip
    _say(f"  engines up after {time.monotonic() - began:.0f} s")
    for _ in contest.run():
        # The load tells a reader whether something else kept the processor busy.
        measured["points"] = [asdict(point) for point in contest.points]
        measured["load"] = os.getloadavg()[0]
        yield measured
    measured["traces"] = contest.traces()
    # The next model's engines need the device's memory.
    for engine in contest.engines.values():
        engine.close()
    measured["seconds"] = time.monotonic() - began
    yield measured


def _first_state(peer: Peer, contest: Contest) -> dict[str, Any]:
    """Return the memory that an engine holds before it serves, if it is the peer it should be."""
    point = Point("boot", 0, 0, peer.name, "")
    with contest.survives(peer.name, point):
        # The class shows once a forward has run.
        contest.engines[peer.name].run([prompt(8, 5)], 2)
        state = contest.engines[peer.name].state()
        measured = measurements(state)
        if measured["backend"] != peer.backend:
            raise EngineDied(
                f"{measured['backend']} serves in place of {peer.backend}: the log says why."
            )
        usage = state["memory_usage"]
        wanted = contest.model.kv_tokens // PAGE * PAGE
        if usage["token_capacity"] < wanted:
            # With a smaller cache it would serve the same requests in other batches, slower.
            raise EngineDied(
                f"Its KV cache holds {usage['token_capacity']} tokens and not {wanted}: the device "
                "has too little free memory for all peers. End what else uses it, measure fewer "
                "--peers at a time, or, with --model, set --kv-tokens."
            )
        return {"allocator": measured["memory"], "sglang": usage}
    _say(f"  {peer.name} {point.verdict}")
    return {}


def now() -> str:
    """Return the time, for a report."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _say(text: str) -> None:
    print(text, flush=True)
