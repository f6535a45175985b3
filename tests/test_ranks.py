"""Ranks of one server, each a thread over a store of PyTorch's: alike, different, silent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDoneError
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from sglang_musa_ext import envs, ranks
from sglang_musa_ext.ranks import Note, RankPlace, RanksDisagreeError
from sglang_musa_ext.upstream.names import MODEL_RUNNER

FACTS = {
    "sglang-musa-ext": "0.2.0",
    "SGLang": "0.5.21",
    "MATE": "0.2.7",
    "--page-size": "64",
    "setting check": "off",
}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SECONDS", {"on": 1.0, "auto": 1.0})
    monkeypatch.setattr(ranks, "_READING_SECONDS", 5.0)


def place(rank: int, world_size: int = 2) -> RankPlace:
    return RankPlace(rank, world_size, lambda rank: 10 + rank)


def serve(mode: str, notes: dict[int, Note], world_size: int = 2) -> dict[int, str]:
    """Let the ranks that have a note agree at the same time; returns their errors."""
    store = HashStore()

    def agree(rank: int) -> str:
        at = place(rank, world_size)
        try:
            ranks.judge(mode, at, ranks.exchange(store, at, notes[rank], mode))
        except RanksDisagreeError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(notes)) as threads:
        return dict(zip(notes, threads.map(agree, notes), strict=True))


def test_ranks_that_are_alike_load() -> None:
    """Nobody objects, and the hosts may differ."""
    notes = {rank: Note(f"host-{rank}", FACTS) for rank in range(4)}
    assert serve("on", notes, 4) == dict.fromkeys(range(4), "")


@pytest.mark.parametrize("name", FACTS)
def test_a_difference_stops_every_rank(name: str) -> None:
    """All ranks name the fact, both values, and the ranks and hosts that have them."""
    notes = {0: Note("host-a", FACTS), 1: Note("host-b", FACTS | {name: "other"})}
    errors = serve("on", notes)
    for error in errors.values():
        expected = f"{name}: {FACTS[name]} (rank 0 on host-a); other (rank 1 on host-b)"
        assert expected in error
        assert f"{envs.MODE}=on" in error


def test_a_fact_that_only_some_know_is_a_difference() -> None:
    """Two versions of this package may compare different things."""
    notes = {0: Note("a", FACTS), 1: Note("b", FACTS | {"new": "1"})}
    assert "new: not known (rank 0 on a); 1 (rank 1 on b)" in serve("on", notes)[0]


def test_a_silent_rank_stops_the_others() -> None:
    """Ranks without this package are found out within the time that is given, by their nodes."""
    errors = serve("on", {0: Note("a", FACTS), 2: Note("b", FACTS)}, 3)
    for error in errors.values():
        assert "rank 1 (--node-rank 11" in error
        assert "not installed there" in error


def test_auto_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """One rank of those that speak warns, and all of them go on."""
    notes = {1: Note("a", FACTS), 2: Note("b", FACTS | {"MATE": "0.2.5"})}
    with caplog.at_level(logging.WARNING):
        assert serve("auto", notes, 3) == {1: "", 2: ""}
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "MATE: 0.2.7 (rank 1 on a); 0.2.5 (rank 2 on b)" in warning
    assert "rank 0 (--node-rank 10" in warning


def test_rank_0_stays_until_the_others_have_read() -> None:
    """The store dies with rank 0, which must not raise while another rank still reads."""
    store = HashStore()
    with ThreadPoolExecutor(1) as threads:
        store.set(ranks._NOTE.format(1), '{"host": "b", "facts": {}}')
        first = threads.submit(ranks.exchange, store, place(0), Note("a", FACTS), "on")
        with pytest.raises(NotDoneError):
            first.result(timeout=0.5)
        store.set(ranks._HAS_READ.format(1), "")
        assert first.result(timeout=5).keys() == {0, 1}


def test_other_ranks_ask_nothing_of_the_store_once_they_have_read() -> None:
    """Rank 0 may be gone by then, and the store with it."""
    store = HashStore()
    store.set(ranks._NOTE.format(0), '{"host": "a", "facts": {}}')
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(ranks.exchange, store, place(1), Note("b", FACTS), "on")
        assert second.result(timeout=5).keys() == {0, 1}


def test_a_late_rank_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that takes its time is not taken for a silent one."""
    monkeypatch.setattr(ranks, "SECONDS", {"on": 30.0})
    store = HashStore()
    with ThreadPoolExecutor(1) as threads:
        early = threads.submit(ranks.exchange, store, place(0), Note("a", FACTS), "on")
        with pytest.raises(NotDoneError):
            early.result(timeout=0.5)
        ranks.exchange(store, place(1), Note("b", FACTS), "on")
        assert early.result(timeout=5).keys() == {0, 1}


@pytest.mark.parametrize(
    ("nnodes", "pp_size", "tp_size", "nodes"),
    [
        (1, 1, 4, [0, 0, 0, 0]),
        (2, 1, 4, [0, 0, 1, 1]),
        (2, 2, 2, [0, 0, 1, 1]),
        (4, 2, 4, [0, 0, 1, 1, 2, 2, 3, 3]),
        (2, 4, 1, [0, 0, 1, 1]),
    ],
)
def test_a_rank_is_on_the_node_that_sglang_gives_it(
    nnodes: int, pp_size: int, tp_size: int, nodes: list[int]
) -> None:
    """By hand, from SGLang's ranges of pipeline and tensor ranks on a node."""
    assert [ranks.node_of(nnodes, pp_size, tp_size, rank) for rank in range(len(nodes))] == nodes


def runner(**attributes: Any) -> SimpleNamespace:
    arguments = SimpleNamespace(
        page_size=64, attention_backend="fa3", nnodes=1, pp_size=1, tp_size=2
    )
    usual = {"device": "musa", "is_draft_worker": False, "server_args": arguments}
    return SimpleNamespace(**usual | attributes)


def test_a_note_says_what_must_be_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Package, SGLang, kernels, MATE, page size, backend and every setting."""
    monkeypatch.setattr(ranks, "_mate_release", lambda: "0.2.7")
    facts = ranks.own_note(runner(), envs.Settings(check="metadata")).facts
    assert (facts["kernels"], facts["MATE"], facts["--page-size"]) == ("mate", "0.2.7", "64")
    assert facts["setting check"] == "metadata"
    settings = {name for name in facts if name.startswith("setting ")}
    assert settings == {f"setting {name}" for name in vars(envs.Settings())}


@pytest.fixture
def model_runner(monkeypatch: pytest.MonkeyPatch) -> tuple[type, list[str]]:
    """Stand-in of SGLang's class, and what its instances did, in order."""
    done: list[str] = []

    class ModelRunner(SimpleNamespace):
        def load_model(self) -> None:
            done.append("load")

    monkeypatch.setattr(ranks, "require_agreement", lambda runner: done.append("agree"))
    module: Any = ModuleType(MODEL_RUNNER)
    module.ModelRunner = ModelRunner
    ranks._wrap_loading(module)
    ranks._wrap_loading(module)
    return ModelRunner, done


@pytest.mark.parametrize(("draft", "expected"), [(False, ["agree", "load"]), (True, ["load"])])
def test_ranks_agree_once_before_they_load(
    model_runner: tuple[Callable[..., Any], list[str]], draft: bool, expected: list[str]
) -> None:
    """The draft model of a rank needs no agreement of its own."""
    create, done = model_runner
    create(is_draft_worker=draft).load_model()
    assert done == expected


def test_a_rank_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group there is no store to read."""
    monkeypatch.setattr(ranks, "exchange", lambda *_: pytest.fail("asked"))
    ranks.require_agreement(runner())
