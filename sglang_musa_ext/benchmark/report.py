"""The benchmark's report: tables in Markdown, plots, and a pass's cost as a model of few numbers.

Everything here is worked out from ``bench.json`` alone, so a report can be drawn again anywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_musa_ext.benchmark.probe import AGAIN, FORWARD_MODES, OURS, TRITON, UNPLANNED, UPSTREAM
from sglang_musa_ext.validation.report import table

PLANNER = "prepare_varlen_num_blocks"
"""A part of the name of FA3's kernel that computes scheduler metadata, in every release."""
GRAPHED = ("decode", "verify")
"""Kinds of points whose passes are graphs, where the host's time per call does not count."""


@dataclass(frozen=True)
class Ratio:
    """One peer's times over another's, round by round."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, ratios: Sequence[float]) -> Ratio | None:
        """Of the rounds' ratios; ``None`` where there are none."""
        return cls(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
        """``None`` where one of them has no times."""
        return cls.over([own / other for own, other in zip(ours, theirs, strict=False)])

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Place:
    """One place of the benchmark: model, kind, batch and tokens, with each peer's point."""

    model: str
    kind: str
    batch: int
    tokens: int
    points: Mapping[str, Mapping[str, Any]]
    baseline: str = UPSTREAM
    """The peer that the others' times are told as ratios to."""

    @property
    def what(self) -> str:
        """Return the field of its times: of the whole step if there are any, or of the pass."""
        return "step_ms" if self.kind in ("decode", "eager") else "forward_ms"

    def times(self, peer: str, what: str = "") -> list[float]:
        """A peer's times, round by round; none where its output was wrong."""
        times: list[float] = self.points.get(peer, {}).get(what or self.what, [])
        return times

    def ratio(self, peer: str, what: str = "") -> Ratio | None:
        """Return a peer's times over the baseline's; pass by pass if they took turns."""
        paired = self.points.get(peer, {}).get("over_upstream")
        if paired and not what:
            return Ratio.over(paired)
        return Ratio.of(self.times(peer, what), self.times(self.baseline, what))

    @property
    def label(self) -> str:
        """Where it is, in few words."""
        return f"batch {self.batch}, {self.tokens} tokens"


def places(result: Mapping[str, Any]) -> list[Place]:
    """Every place that was measured, in the order of measuring."""
    points_of: dict[tuple[Any, ...], dict[str, Any]] = {}
    for model, contest in result["models"].items():
        for point in contest["points"]:
            key = (model, point["kind"], point["batch"], point["tokens"])
            points_of.setdefault(key, {})[point["peer"]] = point
    return [
        Place(model, kind, batch, tokens, points, baseline_of(result))
        for (model, kind, batch, tokens), points in points_of.items()
    ]


def baseline_of(result: Mapping[str, Any]) -> str:
    """Return the peer that the others are compared with."""
    return str(result.get("baseline", UPSTREAM))


def compared(result: Mapping[str, Any]) -> list[str]:
    """Return the peers that have a ratio to the baseline, in the order of the report's columns."""
    return [peer for peer in result["peers"] if peer != baseline_of(result)]


# --- tables ---------------------------------------------------------------------------------------


def as_markdown(
    result: Mapping[str, Any],
    plots: Sequence[str] = (),
    planned: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The report for people."""
    every, baseline = places(result), baseline_of(result)
    device = ", ".join(
        f"{name} {value}" for name, value in result["device"].items() if name != "name"
    )
    stack = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if version != "absent"
    )
    missing = [f"* {what}" for what in _missing(every, planned or {})]
    notes = [
        f"* {name}: {contest['note']}"
        for name, contest in result["models"].items()
        if "note" in contest
    ]
    head = ("Model", "What it is", "Measured", "Rounds", "Tokens a request", "Load")
    lines = [
        f"# Benchmark on {result['device']['name']}", "", f"{device}; {stack}.", "",
        f"{INTRODUCTION[_kind(result)]} {READING}", "",
        *table(head, _runs(result)), "",
        *([*notes, ""] if notes else []),
        *(["Not measured:", "", *missing, ""] if missing else []),
        "## Thresholds", "", THRESHOLDS_SAY, "",
        *table(("Threshold", "Measured", "Met"), thresholds(every, result)), "",
        *(f"![{name}]({name})" for name in plots), "",
        "## Plans in a pass", "", PLANS_SAY, "", *table(PLANS, planners(result)), "",
    ]  # fmt: skip
    for kind, title in TITLES.items():
        beside = [] if kind in GRAPHED else _beside(result)
        columns = [*compared(result), *beside]
        rows = [row(place, columns) for place in every if place.kind == kind]
        lines += timed(title, BESIDE_SAY if beside else "", rows, columns, baseline)
    columns = compared(result)
    steps = [row(place, columns, "step_ms") for place in every if place.kind == "verify"]
    lines += timed("Whole step of speculative decoding", STEP_SAYS, steps, columns, baseline)
    if rows := hosts(result, every):
        lines += [
            "## Host time of an attention call, no graphs",
            "",
            HOSTS_SAY,
            "",
            *table(HOST, rows),
            "",
        ]
    if rows := memory(result):
        lines += ["## Memory", "", *table(MEMORY, rows), ""]
    lines += ["## What a pass costs", "", *cost_model(result, every), ""]
    if rows := [_kernel(kernel) for kernel in result.get("kernels", ())]:
        lines += ["## A call without any engine", "", KERNELS_SAY, "", *table(KERNELS, rows), ""]
    return "\n".join(lines)


def _kind(result: Mapping[str, Any]) -> str:
    """Return the kind of device that a result is of."""
    names = {UPSTREAM: "cuda", TRITON: "musa"}
    return "cpu" if result["device"]["name"].startswith("CPU") else names[baseline_of(result)]


def _kernel(kernel: Mapping[str, Any]) -> list[str]:
    cells = [kernel["call"]]
    for times in (kernel["graph"], kernel.get("host")):
        micros = times and (
            times["without"],
            times["with"],
            times["without"] - times["with"],
            times["plan"],
        )
        cells += [f"{time:.2f}" for time in micros] if micros else ["–"] * 4
    return cells


def _runs(result: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for name, contest in result["models"].items():
        load = f"{contest['load']:.1f}" if "load" in contest else "–"
        rows.append(
            [name, contest["title"], contest["started"], contest["rounds"], contest["steps"], load]
        )
    return rows


def _missing(every: Sequence[Place], planned: Mapping[str, Sequence[str]]) -> list[str]:
    measured = {(place.model, place.kind) for place in every}
    return [
        f"{model}: {kind}"
        for model, kinds in planned.items()
        for kind in kinds
        if (model, kind) not in measured
    ]


INTRODUCTION = {
    "cuda": (
        "Written by `sglang-musa-ext bench`. The kernels are NVIDIA's FA3, as SGLang ships them: "
        "the gain on a Moore "
        "Threads GPU was not measured, and depends on what MATE's metadata kernel costs there."
    ),
    "musa": (
        "Written by `sglang-musa-ext bench` on a MUSA device. The kernels of sglang-musa-ext and "
        "of SGLang's in-tree backend are MATE's; the baseline is SGLang's triton, which serves "
        "where nobody names a backend. Kernels that compute plans are counted by the name that "
        "they have in FlashAttention-3, and MATE may name them otherwise."
    ),
    "cpu": "Written by `sglang-musa-ext bench` on a CPU, where times say nothing.",
}
READING = (
    "A place has times only for peers whose log-probabilities are those of the first peer, but for "
    "what another number of splits changes in the last bits. Ratios are times over those of the "
    "first peer, and below 1 is faster: the median of the rounds, and in parentheses the least and "
    "the greatest. In each round the peers took turns. The load is that of the whole machine in "
    "the last minute of a model's turn: one engine works at a time, so above some 4 something else "
    "did too, and times in which the host is the limit say little."
)
THRESHOLDS_SAY = (
    "What could be had at most is told with each measurement: under graphs by the last column of "
    "*What a pass costs*, a pass with no plan at all; without graphs, where the host limits a "
    "short pass, by *ours without plans*."
)
TITLES = {
    "decode": "Decode step, CUDA graphs",
    "verify": "Verify pass of speculative decoding, CUDA graphs",
    "prefill": "Prefill of one prompt, no graphs",
    "eager": "Decode step, no graphs",
}
PLANS = (
    "Model", "Pass", "Peer", "Kernels that compute plans", "µs each", "Attention kernels",
    "All kernels, µs",
    "over upstream",
)  # fmt: skip
PLANS_SAY = (
    "From a profiler's trace of single passes: of a prompt of 2048 tokens, and after it. The last "
    "columns are what the device works in all kernels of the pass, so that what the host takes "
    "between them does not count. A call with a plan that is not split has a kernel of 1 µs that "
    "clears a counter, in place of one that plans. This package and the in-tree backend prefill a "
    "prompt without a prefix from keys and values as they were made, SGLang's own from the paged "
    "cache, and before version 0.2.0 this package too."
)
KERNELS = (
    "Call", "In a graph: µs without a plan", "with it", "spared", "a plan alone",
    "Host, no graph: µs without a plan", "with it", "spared", "a plan alone",
)  # fmt: skip
KERNELS_SAY = (
    "The library's own calls, without a line of this package in them. Without a plan a call "
    "computes its own, in a kernel that it launches first. With one, a call that is not split "
    "launches a kernel that clears a counter of the plan instead, so that the host spares little "
    "or nothing."
)
STEP_SAYS = (
    "From the end of one verify pass to the end of the next, with the draft's passes between, of "
    "which SGLang extends the draft without a graph. The host is the limit here, and each peer has "
    "an engine of its own: see how much the rounds of one peer differ by."
)
BESIDE_SAY = (
    "The peers' backends took turns in one engine, pass by pass, and a ratio is of two passes of "
    "one turn. *Upstream again* is a second backend of the first peer's: by as much two of the "
    "same differ. *Ours without plans* does all that this package does but plan: between it and "
    "ours lies what a planned call costs and spares in FA3 itself."
)
HOST = (
    "Model", "Pass", "upstream µs", "ours µs", "ours without plans µs", "ours / upstream",
    "Calls a pass",
    "Calls x difference, µs", "Pass longer by, µs",
)  # fmt: skip
HOSTS_SAY = (
    "Where the host is the limit, a pass is longer by what its calls take longer, so the last two "
    "columns agree; where the device is, it is not."
)
MEMORY = (
    "Model",
    "Peer",
    "KV cache",
    "Allocated",
    "Reserved",
    "more than upstream",
    "in KV tokens",
)


def _beside(result: Mapping[str, Any]) -> list[str]:
    """Return who took turns beside the peers, at any place."""
    names = {point["peer"] for model in result["models"].values() for point in model["points"]}
    return [name for name in (AGAIN, UNPLANNED) if name in names]


def timed(
    title: str, said: str, rows: Sequence[Sequence[str]], columns: Sequence[str], baseline: str
) -> list[str]:
    """Return the section of a kind of places from the :func:`row` of each; empty without any."""
    if not rows:
        return []
    ratios = [f"{peer} / {baseline}" for peer in columns]
    head = ("Model", "Place", f"{baseline} ms", "ours ms", *ratios)
    return [f"## {title}", "", *([said, ""] if said else []), *table(head, rows), ""]


def row(place: Place, columns: Sequence[str], what: str = "") -> list[str]:
    """Return the cells of one place; ``what`` are the times, by default the place's own."""
    cells = [place.model, place.label]
    for peer in (place.baseline, OURS):
        times = place.times(peer, what)
        cells.append(f"{statistics.median(times):.3f}" if times else _why(place, peer))
    for peer in columns:
        ratio = place.ratio(peer, what)
        cells.append(str(ratio) if ratio else _why(place, peer))
    return cells


def _why(place: Place, peer: str) -> str:
    verdict: str = place.points.get(peer, place.points.get(place.baseline, {})).get("verdict", "")
    return "–" if verdict in ("", "equal") else verdict


def planned(result: Mapping[str, Any], model: str, mode: str, peer: str) -> dict[str, float] | None:
    """Return a pass's planning kernels, µs of one, attention kernels, µs of all; None untraced."""
    traces = [
        trace["kernels"]
        for trace in result["models"][model]["traces"]
        if (trace["mode"], trace["peer"]) == (mode, peer)
    ]
    if not traces:
        return None
    plans, micros = zip(*(_sums(trace, _plans) for trace in traces), strict=True)
    calls = [_sums(trace, _attends)[0] for trace in traces]
    device = [_sums(trace, bool)[1] for trace in traces]
    return {
        "plans": statistics.median(plans),
        "each": sum(micros) / sum(plans) if sum(plans) else 0.0,
        "calls": statistics.median(calls),
        "device": statistics.median(device),
    }


def planned_by(
    result: Mapping[str, Any], model: str, mode: str
) -> dict[str, dict[str, float] | None]:
    """Return :func:`planned` of each peer."""
    return {peer: planned(result, model, mode, peer) for peer in result["peers"]}


def traced(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the models and modes whose kernels were traced."""
    pairs: dict[tuple[str, str], None] = {}
    for model, contest in result["models"].items():
        pairs.update(((model, trace["mode"]), None) for trace in contest["traces"])
    return list(pairs)


def _sums(
    trace: Mapping[str, Sequence[float]], chosen: Callable[[str], bool]
) -> tuple[float, float]:
    """Return how many kernels of chosen names a trace has, and their microseconds."""
    kernels = [kernel for name, kernel in trace.items() if chosen(name)]
    counts, micros = zip(*kernels, strict=True) if kernels else ((), ())
    return sum(counts), sum(micros)


def _plans(name: str) -> bool:
    return PLANNER in name


def _attends(name: str) -> bool:
    return "FlashAttnFwd" in name and "Combine" not in name and PLANNER not in name


def planners(result: Mapping[str, Any]) -> list[list[str]]:
    """The table of plans in a pass."""
    rows = []
    for model, mode in traced(result):
        sides = planned_by(result, model, mode)
        right = sides.get(baseline_of(result))
        for peer, kernels in sides.items():
            if kernels is None:
                continue
            counts = [f"{kernels['plans']:g}", f"{kernels['each']:.2f}", f"{kernels['calls']:g}"]
            device, over = kernels["device"], "–"
            if right and right["device"]:
                over = f"{device / right['device']:.3f}"
            rows.append([model, mode, peer, *counts, f"{device:.0f}", over])
    return rows


def hosts(result: Mapping[str, Any], every: Iterable[Place]) -> list[list[str]]:
    """The table of host times, and what they make of a pass."""
    rows = []
    for place in every:
        ratio = place.ratio(OURS, "call_us")
        if ratio and place.kind not in GRAPHED:
            theirs, ours = (
                statistics.median(place.times(peer, "call_us")) for peer in (place.baseline, OURS)
            )
            longer = 1e3 * (
                statistics.median(place.times(OURS))
                - statistics.median(place.times(place.baseline))
            )
            traced = planned(result, place.model, FORWARD_MODES[place.kind], OURS)
            said = (
                [f"{traced['calls']:g}", f"{traced['calls'] * (ours - theirs):+.0f}"]
                if traced
                else ["–", "–"]
            )
            where = f"{place.kind}, {place.label}"
            bare = place.times(UNPLANNED, "call_us")
            cells = [
                f"{theirs:.1f}",
                f"{ours:.1f}",
                f"{statistics.median(bare):.1f}" if bare else "–",
            ]
            rows.append([place.model, where, *cells, str(ratio), *said, f"{longer:+.0f}"])
    return rows


def memory(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of memory."""
    rows, baseline = [], baseline_of(result)
    for model, contest in result["models"].items():
        states = {
            peer: state for peer, state in contest["memory"].items() if state.get("allocator")
        }
        for peer, state in states.items():
            sglang, held = state["sglang"], state["allocator"]
            more = (
                held["reserved"] - states[baseline]["allocator"]["reserved"]
                if baseline in states
                else 0
            )
            token = 2**30 * sglang["kvcache"] / sglang["token_capacity"]
            rows.append(
                [
                    model, peer, f"{sglang['kvcache']:.2f} GiB, {sglang['token_capacity']} tokens",
                    _mebibytes(held["allocated"]), _mebibytes(held["reserved"]), _mebibytes(more),
                    f"{-more / token:+.0f}",
                ]
            )  # fmt: skip
    return rows


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


# --- thresholds -----------------------------------------------------------------------------------


def thresholds(every: Sequence[Place], result: Mapping[str, Any]) -> list[list[str]]:
    """Return each threshold, what was measured, and whether it was met."""
    baseline = baseline_of(result)
    wanted = [
        ("decode step at batch 1, dense: at most 1.00", 1.00, "decode", "dense"),
        ("decode step at batch 1, Gemma-2-like: at most 0.97", 0.97, "decode", "gemma2"),
        ("verify pass at batch 1: at most 0.98", 0.98, "verify", "verify"),
        ("prefill: at most 1.00", 1.00, "prefill", ""),
    ]
    rows = []
    for title, limit, kind, model in wanted:
        chosen = [
            p
            for p in every
            if p.kind == kind and p.model.startswith(model) and p.batch == 1 and p.ratio(OURS)
        ]
        for place in chosen:
            ratio = place.ratio(OURS)
            assert ratio is not None
            rows.append(
                [f"{title}; {place.model}, {place.tokens} tokens", str(ratio), _met(ratio, limit)]
            )
    ratios = [(place, place.ratio(OURS)) for place in every]
    slower = [(place, ratio) for place, ratio in ratios if ratio and ratio.low > 1.0]
    total = sum(ratio is not None for _, ratio in ratios)
    listed = ", ".join(f"{p.model} {p.kind} {p.label}: {r}" for p, r in slower)
    rows.append(
        [
            "nothing slower beyond the spread (every round slower)",
            f"{len(slower)} of {total}",
            listed or "yes",
        ]
    )
    for model in result["models"]:
        for mode in ("DECODE", "TARGET_VERIFY", "EXTEND"):
            sides = [planned(result, model, mode, peer) for peer in (OURS, baseline)]
            if all(sides):
                ours, theirs = (side["plans"] for side in sides if side)
                met = "yes" if ours <= GEOMETRIES.get(model, 1) else NO_PLANS.get(mode, "no")
                rows.append(
                    [f"a plan a geometry: {model}, {mode}", f"{ours:g}, {baseline} {theirs:g}", met]
                )
    return rows


GEOMETRIES = {"gemma2": 2}
"""Models whose layers differ in geometry, window layers from full ones, and the number."""


NO_PLANS = {
    "EXTEND": "none can be passed: a prompt attends to raw keys, and FA3 takes no plan for those"
}
"""Passes whose calls plan for themselves, and why."""


def _met(ratio: Ratio, limit: float) -> str:
    if ratio.median <= limit:
        return "yes"
    return "within the spread" if ratio.low <= limit else "no"


# --- a model of the costs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Saving:
    """One graphed place: how many plans fewer a pass computes, and how much shorter it is."""

    place: Place
    plans: float
    own_plans: float
    microseconds: float
    pass_microseconds: float


def savings(result: Mapping[str, Any], every: Iterable[Place]) -> list[Saving]:
    """Every graphed place that has both peers' times and traces."""
    results = []
    for place in every:
        if place.kind not in GRAPHED or not (
            place.times(place.baseline, "forward_ms") and place.times(OURS, "forward_ms")
        ):
            continue
        sides = [
            planned(result, place.model, FORWARD_MODES[place.kind], peer)
            for peer in (place.baseline, OURS)
        ]
        if all(sides):
            theirs, ours = (side["plans"] for side in sides if side)
            times = [
                1e3 * statistics.median(place.times(peer, "forward_ms"))
                for peer in (place.baseline, OURS)
            ]
            results.append(Saving(place, theirs - ours, ours, times[0] - times[1], times[1]))
    return results


def fit(results: Sequence[Saving]) -> tuple[float, float]:
    """Microseconds of one plan, and what a pass saves besides: least squares over the places."""
    from numpy.linalg import lstsq

    matrix = [[saving.plans, 1.0] for saving in results]
    (each, besides), *_ = lstsq(matrix, [saving.microseconds for saving in results], rcond=None)
    return float(each), float(besides)


def cost_model(result: Mapping[str, Any], every: Sequence[Place]) -> list[str]:
    """The fit, and how well it says what was measured."""
    results = savings(result, every)
    if len({saving.plans for saving in results}) < 2:
        return ["Too few places have both times and traces to fit anything."]
    each, besides = fit(results)
    rows = []
    for saving in results:
        said = each * saving.plans + besides
        theirs = saving.pass_microseconds + saving.microseconds
        limit = (saving.pass_microseconds - each * saving.own_plans) / theirs
        rows.append(
            [
                saving.place.model, saving.place.label, f"{saving.plans:g}",
                f"{saving.microseconds:.1f}",
                f"{said:.1f}", f"{saving.pass_microseconds / theirs:.3f}", f"{limit:.3f}",
            ]
        )  # fmt: skip
    head = (
        "Model",
        "Place",
        "Plans fewer",
        "µs saved",
        "The model says",
        "ours / upstream",
        "With no plan at all",
    )
    return [
        (f"A pass under graphs is shorter by **{each:.2f} µs for each plan that it does not "
        f"compute**, and by {besides:.1f} µs besides (SGLang's own pass plans outside of its graph "
        "where it plans once): least squares over the places below. So a model of L layers that "
        f"makes P plans a pass gains about {each:.2f} µs x (L - P) in verify, and in decode for "
        "its window or MLA layers alone. The last column is the limit: what would be left without "
        "any plan. Without graphs, the host's time per call comes on top for each layer."), "",
        *table(head, rows),
    ]  # fmt: skip
