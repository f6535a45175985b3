"""Servers of several engines in the kit, and reports of several runs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch

from sglang_musa_ext.engines.process import FORCE_UPDATE, Engine, EngineDied
from sglang_musa_ext.validation import command, device, modes, several
from sglang_musa_ext.validation.modes import MODES, Mode, _placed, phases
from sglang_musa_ext.validation.refusals import why_not_on_musa
from sglang_musa_ext.validation.report import (
    ABSENT,
    FAIL,
    PASS,
    SKIP,
    Outcome,
    Report,
    ReportsDifferError,
    merged,
    read,
)
from tests.validation.test_validate import StandInEngine as MusaStandIn


class StandInEngine:
    """Notes what it is asked, and answers with its name."""

    def __init__(self, name: str) -> None:
        self.name, self.asked, self.events = name, [], []  # type: ignore[var-annotated]

    def wait(self) -> StandInEngine:
        self.events.append("wait")
        return self

    def ask(self, prompts: Any, new_tokens: int, **options: Any) -> dict[str, Any]:
        self.asked.append(options)
        return {"tokens": [self.name] * len(prompts)}

    def flush(self) -> None:
        self.events.append("flush")

    def reports(self) -> list[dict[str, Any]]:
        return [{"from": self.name}]


def stand_ins() -> tuple[list[StandInEngine], list[Engine]]:
    """Two stand-ins, and the same as engines."""
    engines = [StandInEngine("first"), StandInEngine("second")]
    return engines, cast(list[Engine], engines)


def test_of_two_nodes_the_first_is_asked() -> None:
    """The second node's engine never comes up as one that answers, and is not waited for."""
    (first, second), engines = stand_ins()
    server = several.Server(engines)
    assert server.wait().ask([[1]], 1)["tokens"] == ["first"]
    assert [report["from"] for report in server.reports()] == ["first"]
    assert (second.asked, second.events) == ([], [])
    assert first.events == ["wait"]


def test_prefill_and_decode_apart_get_the_same_rooms() -> None:
    """Both engines get each request, in a room never used twice; the second's answer counts."""
    (first, second), engines = stand_ins()
    server = several.Apart(engines, 21000)
    answers = [server.ask([[1], [2]], 1)["tokens"], server.ask([[3]], 1)["tokens"]]
    assert answers == [["second", "second"], ["second"]]
    assert first.asked == second.asked
    rooms = [room for asked in first.asked for room in asked["bootstrap_room"]]
    assert len(set(rooms)) == len(rooms) == 3
    server.flush()
    assert [engine.events for engine in (first, second)] == [["flush"], ["flush"]]
    assert [report["from"] for report in server.reports()] == ["first", "second"]


def test_parts_of_a_server_differ_in_rank_or_role() -> None:
    """Nodes share an address and differ in rank; the others share where they meet."""
    assert several.parts(1, 21000, apart=False) == [{"port": 21000}]
    nodes = several.parts(2, 21000, apart=False)
    assert [node["node_rank"] for node in nodes] == [0, 1]
    assert len({node["dist_init_addr"] for node in nodes}) == 1
    halves = several.parts(1, 21000, apart=True)
    assert [half["disaggregation_mode"] for half in halves] == ["prefill", "decode"]
    assert len({half["disaggregation_bootstrap_port"] for half in halves}) == 1
    for parts in (nodes, halves):
        assert len({part["port"] for part in parts}) == len(parts)


@pytest.mark.parametrize("quick", [True, False])
def test_a_request_goes_to_the_rank_that_has_its_prefix(quick: bool) -> None:
    """Under data-parallel attention both ranks get requests, and a later one with the same
    beginning goes where that is cached.
    """
    mode = MODES["dp-attention"]
    first, *later = phases(quick)
    ranks = {tuple(prompt[:5]): _placed(mode, prompt)["dp_rank"] for prompt in first}
    assert set(ranks.values()) == {0, 1}
    for batch in later[:-1]:
        for prompt in batch:
            assert _placed(mode, prompt)["dp_rank"] == ranks[tuple(prompt[:5])]
    assert _placed(Mode("llama", {}), first[0]) == {}


def test_every_mode_takes_as_many_cards_as_its_engines_need() -> None:
    """GPUs divide among the engines of a mode, and each has what its parallel options ask for."""
    for mode in MODES.values():
        engines = 2 if mode.apart else mode.nodes
        ranks = mode.arguments.get("tp_size", 1) * mode.arguments.get("pp_size", 1)
        if "enable_dp_attention" not in mode.arguments:
            ranks *= mode.arguments.get("dp_size", 1)
        assert mode.gpus == ranks * (2 if mode.apart else 1)
        assert mode.gpus % engines == 0


class HangingEngine(MusaStandIn):
    """An engine that does not come up, if it serves Gemma, before ``goes_on`` is set."""

    goes_on = threading.Event()
    modes: ClassVar[dict[int, str]] = {}
    """By the number of an engine, in the order in which they were to start."""

    def __init__(self, arguments: dict[str, Any], environ: dict[str, str], log: Path) -> None:
        super().__init__(arguments, environ, log)
        self.mode, number = Path(arguments["model_path"]).name.split(".")
        self.modes[int(number)] = self.mode

    def wait(self) -> MusaStandIn:
        if self.mode == "window-softcap" and not self.goes_on.wait(10):
            raise EngineDied("it hung")
        return super().wait()


def test_a_mode_that_hangs_keeps_no_other_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines start in the order in which modes were given; cases are reported as soon as all
    engines of a mode have answered.
    """
    monkeypatch.setattr(modes, "Engine", HangingEngine)
    monkeypatch.setattr(device, "find_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    HangingEngine.goes_on.clear()
    HangingEngine.modes.clear()
    reported: list[tuple[str, str]] = []

    def emit(message: Any) -> None:
        if outcome := message.get("outcome"):
            reported.append((outcome["name"].partition(":")[0], outcome["status"]))
            # The last of the mode that does not hang.
            if len(reported) == 5 + 1:
                HangingEngine.goes_on.set()

    names = ("window-softcap", "tp2", "dense-page1")
    options = SimpleNamespace(
        out=str(tmp_path), scratch=str(tmp_path / "models"), quick=True, modes=names, jobs=16,
        kernels="hopper",
    )  # fmt: skip
    modes.run(options, (), emit)  # type: ignore[arg-type]
    # One plan a pass is right for the model of one kind of layers alone.
    statuses = {name: [status for mode, status in reported if mode == name] for name in names}
    assert statuses["dense-page1"] == [PASS] * 5
    assert statuses["tp2"] == [SKIP]
    assert "it hung" not in str(statuses)
    assert [name for name, _ in reported[:6]] == ["tp2"] + ["dense-page1"] * 5
    assert len(statuses["window-softcap"]) == 6
    in_order = [HangingEngine.modes[number] for number in range(11)]
    assert in_order == ["window-softcap"] * 6 + ["dense-page1"] * 5


# On MUSA -----------------------------------------------------------------------------------------


class MusaEngine(MusaStandIn):
    """An engine on a MUSA device: ours on MATE's kernels, or the in-tree backend."""

    def reports(self) -> list[dict[str, Any]]:
        """Ours, on MATE's kernels."""
        plans = {"plans": 0, "reuses": 0, "passes_by_plans": {}} if self.fault == "no plans" else {}
        return [
            each | {"kernels": "mate", "statistics": each["statistics"] | plans}
            for each in super().reports()
        ]


def musa_outcomes(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "dense-page64"
) -> tuple[dict[str, str], dict[str, str]]:
    """Statuses and reasons of a mode's cases on MUSA, with this fault in the engines."""
    monkeypatch.setattr(modes, "Engine", MusaEngine)
    monkeypatch.setattr(MusaStandIn, "fault", fault)
    options = SimpleNamespace(out=str(tmp_path), scratch=str(tmp_path / "models"), quick=True)
    peers = modes.PEERS_ON["musa"]
    fleet = modes.Fleet(options, ["0"], 2, lambda _: None, peers.visible)  # type: ignore[arg-type]
    try:
        cases = modes.ModeCases(fleet, peers).cases([mode], ())[mode]
        outcomes = [case() for _, case in cases]
    finally:
        fleet.close()
    names = [outcome.name.removeprefix(f"{mode}: ") for outcome in outcomes]
    statuses = [outcome.status for outcome in outcomes]
    reasons = [outcome.reason for outcome in outcomes]
    return dict(zip(names, statuses, strict=True)), dict(zip(names, reasons, strict=True))


def test_on_musa_reuse_is_compared_with_a_plan_for_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peers are this package without reuse, under graphs and eager, and the in-tree backend."""
    statuses, _ = musa_outcomes("", tmp_path, monkeypatch)
    assert "graphs, beside the in-tree backend" in statuses
    assert set(statuses.values()) == {PASS}
    for right, ours in modes.PEERS_ON["musa"].equal.values():
        assert right.environ[FORCE_UPDATE] == "1"
        assert FORCE_UPDATE not in ours.environ
        assert right.graphs == ours.graphs


def test_a_reuse_that_changes_answers_fails_on_musa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that differ with reuse fail; those that differ from the in-tree ones are told."""
    statuses, reasons = musa_outcomes("reuse is stale", tmp_path, monkeypatch)
    assert (statuses["graphs"], statuses["eager, plans checked"]) == (FAIL, FAIL)
    beside = "graphs, beside the in-tree backend"
    assert statuses[beside] == PASS
    assert "from-in-tree.md" in reasons[beside]


def test_what_the_in_tree_backend_cannot_serve_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is no failure of ours."""
    statuses, reasons = musa_outcomes("upstream dies", tmp_path, monkeypatch)
    assert statuses["graphs, beside the in-tree backend"] == SKIP
    assert "the process ended" in reasons["graphs, beside the in-tree backend"]
    assert statuses["graphs"] == PASS


@pytest.mark.parametrize(
    ("mode", "fault", "status"),
    [
        ("window-sinks", "no plans", PASS),
        ("window-softcap", "no plans", FAIL),
        # A layer of two kinds whose calls are not split takes no plan on MATE.
        ("window-softcap", "", PASS),
        ("dense-page64", "two plans", FAIL),
    ],
)
def test_plans_that_mate_takes_are_asked_for(
    mode: str, fault: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sinks MATE ignores plans, and none is computed; elsewhere none is a failure, and so are
    more than there are geometries.
    """
    statuses, _ = musa_outcomes(fault, tmp_path, monkeypatch, mode)
    assert statuses["who served, and plans a pass"] == status
    if fault == "no plans":
        assert statuses["eager, plans checked"] == status


NEWEST_MATE = (0, 2, 7)


@pytest.mark.parametrize(
    ("mode", "version", "mate", "words"),
    [
        ("ngram", "0.5.11", NEWEST_MATE, "NGRAM"),
        ("deterministic", "0.5.23", NEWEST_MATE, "deterministic"),
        ("cp-zigzag", "0.5.13.post1", NEWEST_MATE, "context parallel"),
        ("cp-zigzag", "0.5.14", NEWEST_MATE, ""),
        ("cp-zigzag", "0.5.19", NEWEST_MATE, ""),
        ("cp-zigzag", "0.5.20", NEWEST_MATE, "context parallel"),
        ("cp-interleave", "0.5.23", NEWEST_MATE, "context parallel"),
        ("fp8", "0.5.21", NEWEST_MATE, ""),
        ("fp8", "0.5.21", (0, 2, 2), "--kv-cache-dtype fp8_e4m3: MATE"),
        ("dense-page64", "0.5.21", (0, 2, 2), ""),
        ("two-nodes", "0.5.21", NEWEST_MATE, ""),
        ("dp-attention-mtp", "0.5.21", NEWEST_MATE, ""),
    ],
)
def test_what_is_not_served_on_musa_is_skipped(
    mode: str, version: str, mate: tuple[int, ...], words: str
) -> None:
    """A mode that SGLang or MATE refuses there is no failure of ours; the others run."""
    why = why_not_on_musa(MODES[mode].arguments, version, mate)
    assert words in why
    assert bool(words) == bool(why)


def test_the_commands_for_two_gpus_run_every_mode_of_several_cards(repository: Path) -> None:
    """Each mode that takes two cards is in one of CONTRIBUTING's commands, once; all are merged."""
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = [line.split() for line in text.splitlines() if "validate --" in line]
    options = [command._options(words[2:]) for words in commands if words[0] != "-"]
    named = [name for each in options for name in each.modes]
    several_cards = {name for name, mode in MODES.items() if mode.gpus > 1}
    assert len(set(named)) == len(named)
    assert set(named) == several_cards | {"mla-mtp", "torch-compile"}
    (merge,) = (each for each in options if each.merge)
    assert [each.out for each in options if each.modes] == merge.merge


# Reports ------------------------------------------------------------------------------------------

DEVICE = {"device": "cuda", "name": "NVIDIA H100"}
VERSIONS = {"sglang": "0.5.17"}


def report(*outcomes: Outcome, **fields: Any) -> Report:
    known = {"device": DEVICE, "versions": VERSIONS} | fields
    return Report("now", {"modes": "some"}, list(outcomes), **known)


def test_reports_of_single_modes_become_one(tmp_path: Path) -> None:
    """Cases of both are there, a case that failed once has failed, and so says the exit status."""
    first = report(
        Outcome("modes", "eagle", PASS), Outcome("modes", "mla", PASS), broken={"bench": "no"}
    )
    second = report(Outcome("modes", "mla", FAIL, "another token"), Outcome("modes", "tp2", SKIP))
    first.write(tmp_path / "first")
    second.write(tmp_path / "second")
    paths = [str(tmp_path / "first"), str(tmp_path / "second" / "report.json")]
    assert command.main(["--merge", *paths, "--out", str(tmp_path / "both")]) == 1
    both = read(tmp_path / "both")
    statuses = {outcome.name: outcome.status for outcome in both.outcomes}
    assert statuses == {"eagle": PASS, "mla": FAIL, "tp2": SKIP}
    assert "another token" in (tmp_path / "both" / "report.md").read_text()
    assert list(both.broken) == ["bench"]


def test_a_part_that_could_not_run_is_not_lost() -> None:
    """Merging hides nothing: the verdict says that a part is missing."""
    reports = {
        "a": report(Outcome("modes", "mla", PASS)),
        "b": report(broken={"numerics": "it died"}),
    }
    both = merged(reports)
    assert (both.verdict, both.broken) == (ABSENT, {"numerics": "in b: it died"})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device": DEVICE | {"name": "NVIDIA H200"}}, "name: NVIDIA H100 in a, NVIDIA H200 in b"),
        ({"versions": {"sglang": "0.5.21"}}, "sglang: 0.5.17 in a, 0.5.21 in b"),
    ],
)
def test_reports_of_other_machines_are_not_merged(other: dict[str, Any], words: str) -> None:
    """The error names what differs, and where."""
    with pytest.raises(ReportsDifferError, match=words):
        merged({"a": report(), "b": report(**other)})


def test_a_report_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelled path ends the command with that path."""
    assert command.main(["--merge", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err
