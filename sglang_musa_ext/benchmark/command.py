"""What reusing plans is worth: this package beside SGLang's own FA3 and its in-tree MUSA backend,
on one GPU.

For each model an engine of every peer is up at the same time, with random weights, and they take
turns, so that whatever the machine does meets all of them. Passes without graphs take turns in one
engine, because there two processes of the same code differ by more than the peers do. A peer's
answers are compared with those of SGLang's own FA3 first; where they differ, or the peer fails, the
report says so in place of a time. It measures

  decode    the step from one decode pass to the next, by batch and context, under CUDA graphs
  verify    the verify pass of speculative decoding (EAGLE, chains of 4), under CUDA graphs
  prefill   one prompt of 512 to 32768 tokens, without graphs
  eager     host time per attention call, in prefill and in decode without graphs
  plans     kernels that compute scheduler metadata per pass, from a profiler's trace
  memory    what PyTorch's allocator holds, graph pools and workspaces among it
  kernels   a call with its plan and without, in a graph and without an engine

and writes bench.json, from which `sglang-musa-ext bench --report bench.json` draws tables and
plots again; of several such files, one report. It needs a GPU of
the Hopper generation, SGLang with its FA3 kernels, and this package. With --device cpu it only
exercises itself: the reference kernels against torch_native, and times that say nothing.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_musa_ext.benchmark.probe import (
    AGAIN,
    GATE,
    IN_TREE,
    MODES,
    OURS,
    PEER,
    UNPLANNED,
    UPSTREAM,
    measurements,
)
from sglang_musa_ext.engines import changes
from sglang_musa_ext.engines.models import write_model
from sglang_musa_ext.engines.process import Engine, EngineDied
from sglang_musa_ext.validation.engine import Answer, deviation
from sglang_musa_ext.validation.report import versions

PAGE = 64
OCCUPIED = 4 << 30
"""Bytes of the GPU that may be in use before the benchmark starts: a context, and what a desktop
needs.
"""
PROMPTS, TOKENS = 9, 24576
"""Prompts that a peer prefills in one round: as many as have this many tokens together, and at most
so many.
"""


@dataclass(frozen=True)
class Peer:
    """One way to serve FA3."""

    name: str
    title: str
    backend: str
    """The class that must serve."""
    environ: Mapping[str, str]
    attention: str = "fa3"


HOPPER = (
    # With the kernels for our backend, which takes turns with its own in its engine.
    Peer(UPSTREAM, "SGLang's own fa3", "FlashAttentionBackend",
         {"SGLANG_MUSA_EXT": "off", "SGLANG_MUSA_EXT_KERNELS": "hopper"}),
    Peer(OURS, "sglang-musa-ext", "MusaFA3Backend",
         {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "hopper"}),
    Peer(IN_TREE, "SGLang's in-tree MUSA backend", "MusaFlashAttentionBackend", {"SGLANG_MUSA_EXT": "off"}),
)  # fmt: skip
REFERENCE = (
    Peer(
        UPSTREAM,
        "torch_native",
        "TorchNativeAttnBackend",
        {"SGLANG_PLATFORM": "musa_reference"},
        "torch_native",
    ),
    Peer(OURS, "sglang-musa-ext", "MusaFA3Backend", {"SGLANG_PLATFORM": "musa_reference"}),
)
"""On a CPU, where the times say nothing."""


@dataclass(frozen=True)
class Model:
    """A model without weights, and what is measured on it."""

    title: str
    family: str
    shape: Mapping[str, Any]
    kv_tokens: int
    """Size of the KV cache of each peer: three of them must fit on the card."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    draft: str = ""
    """The family of the draft model, with which verify steps are measured in place of decode,
    prefill and eager.
    """
    batches: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    prefills: tuple[int, ...] = (512, 2048, 8192, 32768)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of places that it is for."""
        return ("verify",) if self.draft else ("decode", "prefill", "eager")


KINDS = ("decode", "verify", "prefill", "eager")
IN_ONE_ENGINE = ("prefill", "eager")
"""Kinds of places whose passes the peers' backends serve in turn in upstream's engine."""
BESIDE = {UPSTREAM: AGAIN, OURS: UNPLANNED}
"""Who else takes turns there if a peer does."""
_DENSE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
_CHAIN = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 3, "speculative_eagle_topk": 1,
          "speculative_num_draft_tokens": 4}  # fmt: skip
MODELS: Mapping[str, Model] = {
    "dense-64": Model(
        "dense, 32 layers, head dim 64", "llama",
        {**_DENSE, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64}, 280_000,
    ),
    "dense-128": Model(
        "dense, 32 layers, head dim 128", "llama",
        {**_DENSE, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}, 280_000,
    ),
    "gemma2": Model(
        "like Gemma-2-2B: 13 window and 13 full layers, softcap", "gemma2",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 32000,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
         "sliding_window": 4096}, 150_000, {"swa_full_tokens_ratio": 1.0},
    ),
    "mla": Model(
        "like DeepSeek-V3's attention, 27 dense layers, 16 heads", "deepseek_v3",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 27, "vocab_size": 32000,
         "q_lora_rank": 512}, 280_000,
    ),
    "verify": Model(
        "dense, 32 layers, head dim 128, EAGLE", "llama",
        {**_DENSE, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}, 140_000, _CHAIN, "eagle",
        (1, 8, 32), (1024, 8192),
    ),
}  # fmt: skip
TINY = Model("tiny, for a trial of the benchmark", "llama",
             {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512}, 4096, {}, "", (1, 2), (64, 128),
             (64, 128))  # fmt: skip


@dataclass
class Point:
    """What was measured of one peer at one place."""

    kind: str
    batch: int
    tokens: int
    peer: str
    verdict: str
    """``equal``, or why there are no times."""
    difference: float | None = None
    """The largest difference of a log-probability from upstream's, up to the first other token;
    ``None``: no number.
    """
    allowed: float | None = None
    """What it may be: twice what upstream's own two answers differ by, and at least
    :data:`RESOLUTION`.
    """
    step_ms: list[float] = field(default_factory=list)
    """From the end of one pass to the end of the next: the median of each round."""
    forward_ms: list[float] = field(default_factory=list)
    """From a pass's first work to its last."""
    call_us: list[float] = field(default_factory=list)
    """The host's time per attention call; empty under graphs."""
    over_upstream: list[float] = field(default_factory=list)
    """Of passes that took turns in one engine, each over upstream's of the same turn: the median of
    each round.
    """

    @property
    def what(self) -> str:
        """Which of a pass's times stands for it; without graphs, prompts come one at a time."""
        return "forward" if self.kind == "prefill" else "since"

    def leave(self, verdict: str) -> None:
        """Go without times, for this reason."""
        self.verdict = verdict
        self.step_ms, self.forward_ms, self.call_us, self.over_upstream = [], [], [], []


Rows = Sequence[Mapping[str, Any]]
"""Passes of an engine, as the probe measured them."""
Measure = Callable[[Engine, Sequence[str]], Mapping[str, Rows]]
"""What has an engine work at a place, and gives the passes that count, by peer of those that serve
in it.
"""


# --- one model, all peers -------------------------------------------------------------------------


class Contest:
    """The engines of one model, and what is asked of them in turn."""

    def __init__(
        self, model: Model, engines: Mapping[str, Engine], options: argparse.Namespace, gate: Path
    ) -> None:
        """``gate`` is the file that the engines' schedulers wait for."""
        self.model, self.options, self.gate = model, options, gate
        self.engines = dict(engines)
        self.failed: dict[str, str] = {}
        self.points: list[Point] = []
        self.rounds = options.rounds
        self.steps = options.steps

    def run(self) -> Iterator[None]:
        """Everything that this model is for and that was asked for; goes on after each place."""
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
                Point(kind, batch, context, UPSTREAM, f"needs a KV cache of {needed} tokens")
            )
            return
        prompts = [prompt(context, row) for row in range(batch)]

        def measure(engine: Engine, peers: Sequence[str]) -> dict[str, Rows]:
            engine.run(prompts, self.steps)
            rows = rows_of(engine)
            return {peer: passes(rows, MODES[kind], batch, peer) for peer in peers}

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
            self._race_in_one_engine(points, MODES[kind], prompts, measure)
        else:
            self._race(points, measure)
        _say(
            f"  {kind:<8}batch {batch:>3}, {tokens:>5} tokens: "
            + "; ".join(map(in_short, points.values()))
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
                    found = measure(self.engines[name], [name])[name]
                    if index:  # The first round warms up.
                        record(points[name], found)

    def _race_in_one_engine(
        self,
        points: Mapping[str, Point],
        mode: str,
        prompts: Sequence[Sequence[int]],
        measure: Measure,
    ) -> None:
        """Time the peers as backends of upstream's engine, once they have given its answers there
        too.
        """
        if UPSTREAM not in racers(points):
            return
        engine = self.engines[UPSTREAM]
        with self.survives(UPSTREAM, points[UPSTREAM]):
            points = {**points, **self._points_beside(points)}
            answers = {name: self._answer_in_one_engine(name, prompts) for name in racers(points)}
            for name, answer in answers.items():
                judge(points[name], deviation(answer, answers[UPSTREAM])[0])
            racing = racers(points)
            engine.scheduler("bench_turns", peers=racing, mode=mode)
            for index in range(self.rounds + 1):
                found = measure(engine, racing)
                for name in racing if index else ():
                    record(points[name], found[name])
                    points[name].over_upstream.append(
                        paired(found[name], found[UPSTREAM], points[name].what)
                    )
            engine.scheduler("bench_turns", peers=[], mode=None)
        if UPSTREAM in self.failed:
            for name in racers(points):
                points[name].leave(self.failed[UPSTREAM])

    def _points_beside(self, points: Mapping[str, Point]) -> dict[str, Point]:
        """Points of those who take turns beside the peers, whose answers are still to be judged."""
        beside = {BESIDE[name]: points[name] for name in racers(points) if name in BESIDE}
        found = {
            name: Point(one.kind, one.batch, one.tokens, name, one.verdict, allowed=one.allowed)
            for name, one in beside.items()
        }
        self.points += found.values()
        return found

    def _answer_in_one_engine(self, name: str, prompts: Sequence[Sequence[int]]) -> Answer:
        engine = self.engines[UPSTREAM]
        engine.scheduler("bench_turns", peers=[name], mode=None)
        engine.flush()
        return answer_of(engine, prompts)

    def _judge(self, points: Mapping[str, Point], prompts: Sequence[Sequence[int]]) -> None:
        """Say of each point whether its peer's answers are those of upstream.

        Each peer answers twice. What upstream's two answers differ by, in batches that were put
        together otherwise, is what a peer may differ by.
        """
        answers: dict[str, list[Answer]] = {}
        for name, point in points.items():
            point.verdict = self.failed.get(name, "")
            if name in self.engines:
                with self.survives(name, point):
                    answers[name] = [answer_of(self.engines[name], prompts) for _ in range(2)]
        if UPSTREAM not in answers:
            for point in points.values():
                point.verdict = point.verdict or "upstream gave no answer to compare with"
            return
        first, right = answers[UPSTREAM]
        allowed = max(2 * deviation(first, right)[0], RESOLUTION)
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
        """Kernels by pass, traced at the end: a profiler that was there once slows what comes
        after.
        """
        found = []
        modes = {"EXTEND": 1} | ({"TARGET_VERIFY": 2} if self.model.draft else {"DECODE": 2})
        length = 2048 if self.options.device == "cuda" else 128
        for name, engine in list(self.engines.items()):
            for mode, count in modes.items():
                with self.survives(name, Point("trace", 1, length, name, "")):
                    engine.flush()
                    engine.scheduler("bench_trace", mode=mode, passes=count)
                    engine.run([prompt(length, 77)], 12 if mode != "EXTEND" else 1)
                    traces = measurements(engine.state())["traces"]
                    found += [{"peer": name, **trace} for trace in traces]
        return found


RESOLUTION = 2.0**-3
"""Two units in the last place of a logit between 8 and 16 in bfloat16: what another number of
splits may change.
"""


def rows_of(engine: Engine) -> list[dict[str, Any]]:
    """The forwards of the target model since they were last asked for."""
    rows = measurements(engine.state())["forwards"]
    return [row for row in rows if not row["draft"]]


def answer_of(engine: Engine, prompts: Sequence[Sequence[int]]) -> Answer:
    """The first tokens that an engine continues prompts by; the forwards that they took are no
    measurement.
    """
    found = engine.ask(prompts, 8)
    rows_of(engine)
    return Answer(found["tokens"], found["logprobs"], [])


def racers(points: Mapping[str, Point]) -> list[str]:
    """The peers whose answers are upstream's."""
    return [name for name, point in points.items() if point.verdict == "equal"]


def judge(point: Point, off: float) -> None:
    """Say whether a peer may differ from upstream by ``off``, which is no number where its answer
    has none.
    """
    assert point.allowed is not None
    point.difference = off if math.isfinite(off) else None
    point.verdict = (
        "equal"
        if off <= point.allowed
        else f"wrong output (off by {off:.2g}, not {point.allowed:.2g})"
    )


def passes(rows: Rows, mode: str, batch: int, peer: str) -> Rows:
    """The passes of this mode, batch and peer whose predecessor was one of this mode and batch,
    too.
    """
    chosen = [
        row for before, row in itertools.pairwise(rows)
        if all(one["mode"] == mode and one["batch"] == batch for one in (before, row))
    ]  # fmt: skip
    # The first ones still fill the pipeline of the scheduler.
    return [row for row in chosen[3:] if row["peer"] == peer]


def prefills(rows: Rows, peer: str) -> Rows:
    """A peer's passes that each prefill a prompt."""
    return [row for row in rows if (row["mode"], row["peer"]) == ("EXTEND", peer)]


def record(point: Point, rows: Rows) -> None:
    """Add the medians of one round's passes to a point, and of the host's time in a call where
    Python makes any.

    Raises:
        RuntimeError: there is none, so that later rounds would stand beside other peers' earlier
            ones.
    """
    if not rows:
        raise RuntimeError(f"No {point.kind} pass of {point.peer} in a round, batch {point.batch}.")
    if point.what == "since":
        point.step_ms.append(statistics.median(row["since"] for row in rows))
    point.forward_ms.append(statistics.median(row["forward"] for row in rows))
    calls = [row["attention_us"] / row["calls"] for row in rows if row["calls"]]
    point.call_us += [statistics.median(calls)] if calls else []


def paired(rows: Rows, upstreams: Rows, what: str) -> float:
    """The median of a peer's passes over upstream's, each pair of one turn, so that both meet the
    same machine.
    """
    theirs = {row["turn"]: row[what] for row in upstreams}
    return float(
        statistics.median(row[what] / theirs[row["turn"]] for row in rows if row["turn"] in theirs)
    )


def in_short(point: Point) -> str:
    """A point in a few words, for the progress."""
    if point.verdict != "equal":
        return f"{point.peer} {point.verdict}"
    shown = point.step_ms or point.forward_ms
    return (
        f"{point.peer} {statistics.median(shown):.3f} ms"
        if shown
        else f"{point.peer} without a time"
    )


def prompt(length: int, seed: int) -> list[int]:
    """Tokens that differ from seed to seed from the first one on."""
    return [
        (7 * position + 131 * seed + position * position % 101) % 500 + 4
        for position in range(length)
    ]


# --- the run --------------------------------------------------------------------------------------


@contextmanager
def entered(
    model: Model, name: str, peers: Sequence[Peer], options: argparse.Namespace, out: Path
) -> Iterator[Contest]:
    """The contest of a model, whose engines import what they need, and wait at its gate."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = engine_arguments(model, scratch, options)
        engines = {}
        for peer in peers:
            settings = {**arguments, "attention_backend": peer.attention}
            engines[peer.name] = Engine(
                settings, peer_environment(peer, scratch), out / f"{name}.{peer.name}.log", 400
            )
            stack.callback(engines[peer.name].close)
        yield Contest(model, engines, options, scratch / "gate")


def contend(contest: Contest, peers: Sequence[Peer]) -> Iterator[dict[str, Any]]:
    """Boot the engines of a contest, measure, and end them; gives what was found so far after each
    place.
    """
    began = time.monotonic()
    contest.gate.touch()
    found: dict[str, Any] = {
        "title": contest.model.title, "shape": dict(contest.model.shape), "kv_tokens": contest.model.kv_tokens,
        "failed": contest.failed, "points": [], "traces": [], "rounds": contest.rounds, "steps": contest.steps,
        "started": now(),
        "memory": {peer.name: _first_state(peer, contest) for peer in peers},
    }  # fmt: skip
    _say(f"  engines up after {time.monotonic() - began:.0f} s")
    for _ in contest.run():
        # The load tells a reader whether something else kept the processor busy.
        found["points"], found["load"] = (
            [asdict(point) for point in contest.points],
            os.getloadavg()[0],
        )
        yield found
    found["traces"] = contest.traces()
    # The next model's engines need the device's memory.
    for engine in contest.engines.values():
        engine.close()
    found["seconds"] = time.monotonic() - began
    yield found


def _first_state(peer: Peer, contest: Contest) -> dict[str, Any]:
    """What an engine holds before it has served anything, once it is the peer that it should be."""
    point = Point("boot", 0, 0, peer.name, "")
    with contest.survives(peer.name, point):
        # The class shows once a forward has run.
        contest.engines[peer.name].run([prompt(8, 5)], 2)
        state = contest.engines[peer.name].state()
        found = measurements(state)
        if found["backend"] != peer.backend:
            raise EngineDied(
                f"{found['backend']} serves in place of {peer.backend}: the log says why."
            )
        usage = state["memory_usage"]
        wanted = contest.model.kv_tokens // PAGE * PAGE
        if usage["token_capacity"] < wanted:
            # With a smaller cache it would serve the same requests in other batches, and more
            # slowly.
            raise EngineDied(
                f"Its KV cache holds {usage['token_capacity']} tokens and not {wanted}: the GPU "
                "has too little free "
                "memory for all peers. End what else uses it, or measure fewer --peers at a time."
            )
        return {"allocator": found["memory"], "sglang": usage}
    _say(f"  {peer.name} {point.verdict}")
    return {}


def engine_arguments(model: Model, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``sglang.Engine`` that all peers share."""
    found: dict[str, Any] = {
        "model_path": str(write_model(scratch / "target", model.family, **model.shape)), "load_format": "dummy",
        "skip_tokenizer_init": True, "random_seed": 0, "log_level": "info", "page_size": PAGE,
        "max_total_tokens": model.kv_tokens, "max_running_requests": max(model.batches) + 8,
        "context_length": max(*model.contexts, *model.prefills) + 4096, "chunked_prefill_size": 40960,
        "max_prefill_tokens": 40960, "sleep_on_idle": True, "sampling_backend": "pytorch", **model.arguments,
    }  # fmt: skip
    if model.draft:
        found["speculative_draft_model_path"] = str(
            write_model(scratch / "draft", model.draft, **{**model.shape, "num_hidden_layers": 1})
        )
    if options.device == "cpu":
        return {
            **found,
            "device": "cpu",
            "dtype": "float32",
            "graphs": [],
            "mem_fraction_static": 0.3,
        }
    # What an engine takes is what max_total_tokens says: the fraction must only not be in its way
    # while others boot.
    graphs = {"graphs": list(model.batches), "prefill_graphs": False}
    return {**found, "dtype": "bfloat16", "mem_fraction_static": 0.9, **graphs}


def peer_environment(peer: Peer, scratch: Path) -> dict[str, str]:
    """The environment of a peer: its settings, and the probe as a plugin of SGLang."""
    plugin = scratch / "plugin" / "sglang_musa_ext_bench-0.dist-info"
    plugin.mkdir(parents=True, exist_ok=True)
    (plugin / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang-musa-ext-bench\nVersion: 0\n"
    )
    (plugin / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nmusa_ext_bench = sglang_musa_ext.benchmark.probe:register\n"
    )
    paths = [str(plugin.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {
        "PYTHONPATH": os.pathsep.join(paths),
        PEER: peer.name,
        GATE: str(scratch / "gate"),
        "SGLANG_PLUGINS": "",
    }
    return found | {"SGLANG_ENABLE_JIT_DEEPGEMM": "0", changes.WEIGHTS: "1"} | dict(peer.environ)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, and write the report; returns the exit status."""
    options = _options(arguments)
    if options.report:
        earlier = merged([json.loads(page.read_text()) for page in options.report])
        return _draw(of_kinds(earlier, options.kinds), options.out or Path())
    out = options.out or Path(f"bench-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    peers = [
        peer
        for peer in (HOPPER if options.device == "cuda" else REFERENCE)
        if peer.name in options.peers
    ]
    models = (
        {"tiny": TINY}
        if options.device == "cpu"
        else {name: MODELS[name] for name in options.models}
    )
    result: dict[str, Any] = {
        "versions": versions(), "device": _device(options.device),
        "peers": {peer.name: peer.title for peer in peers}, "models": {},
    }  # fmt: skip
    result["kernels"] = (
        kernel_times() if options.device == "cuda" and not options.no_kernels else []
    )
    with ExitStack() as stack:
        contests = {
            name: stack.enter_context(
                entered(chosen_places(model, options), name, peers, options, out)
            )
            for name, model in models.items()
        }
        for name, contest in contests.items():
            _say(f"{name}: {contest.model.title}")
            for found in contend(contest, peers):
                result["models"][name] = found
                # What was measured so far must survive whatever comes next.
                (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    return _draw(result, out)


def kernel_times() -> list[dict[str, Any]]:
    """What a plan costs in a graph, without any engine.

    Raises:
        SystemExit: the kernels do not run there, so that nothing else would.
    """
    _say("kernels: a call with its plan and without, in a graph")
    command = [sys.executable, "-m", "sglang_musa_ext.benchmark.kernels"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command[-1]} ended with status {done.returncode}; its error is above.")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def chosen_places(model: Model, options: argparse.Namespace) -> Model:
    """``model`` with the places that were asked for."""
    if options.quick:
        return replace(
            model,
            batches=model.batches[:2],
            contexts=model.contexts[:1],
            prefills=model.prefills[:2],
        )
    longest = options.longest or max(*model.contexts, *model.prefills)
    contexts, prefills = (
        [length for length in lengths if length <= longest]
        for lengths in (model.contexts, model.prefills)
    )
    return replace(model, contexts=tuple(contexts), prefills=tuple(prefills))


def _draw(result: Mapping[str, Any], out: Path) -> int:
    from sglang_musa_ext.benchmark.report import write_report

    for page in write_report(result, out, {name: model.kinds for name, model in MODELS.items()}):
        print(page)
    return 0


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs on one device as one: of the kinds of places of a model that are in several, the
    last.

    Raises:
        SystemExit: they are of different devices or versions.
    """
    for name in ("device", "versions"):
        if any(one[name] != results[0][name] for one in results):
            sys.exit(
                f"These runs differ in their {name}, so that one report of them would compare what "
                "cannot be."
            )
    models: dict[str, Any] = {}
    for one in results:
        for name, model in one["models"].items():
            models[name] = _measured_again(models[name], model) if name in models else model
    kernels = [rows for one in results if (rows := one.get("kernels"))]
    return {**results[0], "models": models, "kernels": kernels[-1] if kernels else []}


def _measured_again(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """A model's two runs as one: what the later one did not measure is the earlier one's."""
    kinds = {point["kind"] for point in later["points"]}
    points = [point for point in earlier["points"] if point["kind"] not in kinds]
    return {
        **later,
        "points": points + later["points"],
        "traces": later["traces"] or earlier["traces"],
    }


def of_kinds(result: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """``result`` with the places of these kinds alone."""
    models = {
        name: model | {"points": [point for point in model["points"] if point["kind"] in kinds]}
        for name, model in result["models"].items()
    }
    return {**result, "models": models}


def now() -> str:
    """The time, for a report."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _device(kind: str) -> dict[str, Any]:
    import torch

    if kind == "cpu":
        return {"name": "CPU, where times say nothing", "count": os.cpu_count()}
    if not torch.cuda.is_available():
        sys.exit(
            f"PyTorch {torch.__version__} sees no NVIDIA GPU. --device cpu tries the benchmark "
            "without one."
        )
    found = torch.cuda.get_device_properties(0)
    free, _ = torch.cuda.mem_get_info(0)
    if found.total_memory - free > OCCUPIED:
        sys.exit(
            f"{(found.total_memory - free) / 2**30:.0f} GiB of {found.name} are in use: something "
            "else runs there, and "
            "times would say little. End it first."
        )
    if found.major != 9:
        sys.exit(
            f"{found.name} has compute capability {found.major}.{found.minor}: FA3's kernels are "
            "for 9.0 (Hopper)."
        )
    return {
        "name": found.name, "multiprocessors": found.multi_processor_count, "memory": found.total_memory,
        "cuda": torch.version.cuda,
    }  # fmt: skip


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext bench",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=_some_of(MODELS), default=tuple(MODELS), help=f"some of {','.join(MODELS)}"
    )
    names = [peer.name for peer in HOPPER]
    parser.add_argument(
        "--peers", type=_some_of(names), default=tuple(names), help=f"some of {','.join(names)}"
    )
    parser.add_argument(
        "--kinds", type=_some_of(KINDS), default=KINDS, help=f"some of {','.join(KINDS)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each peer at each point (default: 5)"
    )
    parser.add_argument(
        "--steps", type=int, default=48, help="tokens that a request is continued by (default: 48)"
    )
    parser.add_argument(
        "--longest", type=int, metavar="TOKENS", help="leave out longer contexts and prompts"
    )
    parser.add_argument(
        "--no-kernels", action="store_true", help="leave out the calls that need no engine"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two batches, one context, two prefills"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where results go (default: ./bench-<date>)"
    )
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="draw earlier runs' report again"
    )
    return parser.parse_args(arguments)


def _some_of(choices: Sequence[str] | Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(choices):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: expected some of {','.join(choices)}"
            )
        return tuple(dict.fromkeys(names))

    return chosen


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
