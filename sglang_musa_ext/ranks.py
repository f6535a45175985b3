"""Agreement of the ranks of a server: all of them serve with this package alike, or none does.

A rank whose machine lacks the package, or has it off, serves SGLang's own MUSA backend beside ours
and says nothing. So each rank that has it leaves a note in the store of its process group before it
loads weights, and reads the others' notes. Polling the store, where a collective would wait for
ever, is what a rank that knows nothing of this can be found out by.

Replicas of data parallelism, and servers that prefill and decode apart, have no group in common and
are not compared.
"""

from __future__ import annotations

import functools
import json
import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from sglang_musa_ext import __version__, envs, patching, policy
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.upstream.names import MODEL_RUNNER

logger = logging.getLogger(__name__)

SECONDS = {"on": 45.0, "auto": 10.0}
"""Seconds that a rank waits for others' notes, by ``SGLANG_MUSA_EXT``: with ``auto`` a difference
is no error, so a start waits less for one. All ranks have joined the group by then.
"""
_POLL_SECONDS = 0.1
_READING_SECONDS = 10.0
_NOTE, _HAS_READ = "sglang_musa_ext/note/{}", "sglang_musa_ext/has_read/{}"


class RanksDisagreeError(RuntimeError):
    """``SGLANG_MUSA_EXT=on``, and the ranks of this server would not serve alike."""


@dataclass(frozen=True)
class Note:
    """A rank's account of itself."""

    host: str
    facts: Mapping[str, str]
    """Values that must be the same on all ranks, by name."""


@dataclass(frozen=True)
class RankPlace:
    """A rank of this process, and where SGLang put the others."""

    rank: int
    world_size: int
    node_of: Callable[[int], int]
    """Gives the ``--node-rank`` of a rank."""


def install_agreement() -> patching.Undo:
    """Have each rank of this process's server agree with the others before it loads weights."""
    return patching.after_import(MODEL_RUNNER, _wrap_loading)


def _wrap_loading(module: ModuleType) -> None:
    patching.wrap(module.ModelRunner, "load_model", _after_agreement)


def _after_agreement(load_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_model)
    def agree_and_load(runner: Any, *args: Any, **kwargs: Any) -> Any:
        if not runner.is_draft_worker:
            require_agreement(runner)
        return load_model(runner, *args, **kwargs)

    return agree_and_load


def require_agreement(runner: Any) -> None:
    """Compare this rank with the others of its process group.

    Args:
        runner: SGLang's ``ModelRunner``, which has joined its process group.

    Raises:
        RanksDisagreeError: ranks differ, or say nothing, and ``SGLANG_MUSA_EXT=on``.
    """
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    settings = Settings.from_environ()
    arguments = runner.server_args
    place = RankPlace(
        distributed.get_rank(),
        distributed.get_world_size(),
        functools.partial(node_of, arguments.nnodes, arguments.pp_size, arguments.tp_size),
    )
    store = distributed.distributed_c10d._get_default_store()
    judge(settings.mode, place, exchange(store, place, own_note(runner, settings), settings.mode))


def own_note(runner: Any, settings: Settings) -> Note:
    """Return what the rank of ``runner`` says of itself; imports no kernels."""
    from sglang_musa_ext.upstream.check import find_package, read_version

    package = find_package()
    kernels = policy.choose_kernels(settings, runner.device).kernels
    facts = {
        "sglang-musa-ext": __version__,
        "SGLang": read_version(package) if package else "unknown",
        "kernels": str(kernels),
        "MATE": _mate_release() if kernels == "mate" else "none",
        "--page-size": str(runner.server_args.page_size),
        "--attention-backend": str(runner.server_args.attention_backend),
    }
    named = {name: str(value) for name, value in asdict(settings).items()}
    return Note(socket.gethostname(), facts | {f"setting {name}": named[name] for name in named})


def _mate_release() -> str:
    from sglang_musa_ext.kernels.mate_identity import identify_mate

    return str(identify_mate().version)


def node_of(nnodes: int, pp_size: int, tp_size: int, rank: int) -> int:
    """Return the ``--node-rank`` of a rank: SGLang gives each node the next ranks in order."""
    return rank * nnodes // (pp_size * tp_size)


def exchange(store: Any, place: RankPlace, own: Note, mode: str) -> dict[int, Note]:
    """Leave ``own`` for the other ranks, and return the notes that are there in time, by rank.

    Args:
        store: of the process group; ``set``, ``get`` and ``check`` as PyTorch's stores have them.
        place: of this rank.
        own: the note of this rank.
        mode: of this rank; decides how long it waits.
    """
    store.set(_NOTE.format(place.rank), json.dumps(asdict(own)))
    speaking = _wait_for(store, _NOTE, set(range(place.world_size)), SECONDS[mode])
    notes = {rank: Note(**json.loads(store.get(_NOTE.format(rank)))) for rank in sorted(speaking)}
    store.set(_HAS_READ.format(place.rank), "")
    if place.rank == 0:
        # The store is in this process: were it to end first, others could not read why. They ask
        # nothing of the store from here on.
        _wait_for(store, _HAS_READ, speaking, _READING_SECONDS)
    return notes


def _wait_for(store: Any, key: str, wanted: set[int], seconds: float) -> set[int]:
    """Return the ranks out of ``wanted`` whose ``key`` is in the store: all, or those in time."""
    deadline = time.monotonic() + seconds
    there: set[int] = set()
    while True:
        there |= {rank for rank in wanted - there if store.check([key.format(rank)])}
        if there == wanted or time.monotonic() > deadline:
            return there
        time.sleep(_POLL_SECONDS)


def judge(mode: str, place: RankPlace, notes: Mapping[int, Note]) -> None:
    """Raise, or with ``auto`` have the first rank warn, if the notes of all ranks are not alike.

    Raises:
        RanksDisagreeError: they are not, and ``mode`` is ``on``.
    """
    differences = [*silent_ranks(place, notes), *different_facts(notes)]
    if not differences:
        return
    listed = "\n".join(f"* {difference}" for difference in differences)
    if mode == "on":
        raise RanksDisagreeError(
            f"{envs.MODE}=on, and the {place.world_size} ranks of this server would not serve "
            f"alike:\n{listed}\nInstall the same sglang-musa-ext and MATE on every node, and start "
            f"every node with the same options and variables; or set {envs.MODE}=auto on all of "
            "them to be warned only."
        )
    if place.rank == min(notes):
        logger.warning(
            "The ranks of this server do not serve alike, and their answers may differ:\n%s\n"
            "Start every node alike; SGLANG_MUSA_EXT=on makes this an error.",
            listed,
        )


def silent_ranks(place: RankPlace, notes: Mapping[int, Note]) -> list[str]:
    """Return a line for each rank without a note: the package is missing there, off or broken."""
    return [
        f"rank {rank} (--node-rank {place.node_of(rank)}; its host is not known here) says "
        "nothing: sglang-musa-ext is not installed there, is off, is kept from loading, or did "
        "not load"
        for rank in range(place.world_size)
        if rank not in notes
    ]


def different_facts(notes: Mapping[int, Note]) -> list[str]:
    """Return a line for each fact that is not the same on all ranks, with each rank and host."""
    names = sorted({name for note in notes.values() for name in note.facts})
    lines = []
    for name in names:
        ranks_by_value: dict[str, list[str]] = defaultdict(list)
        for rank, note in sorted(notes.items()):
            value = note.facts.get(name, "not known")
            ranks_by_value[value].append(f"rank {rank} on {note.host}")
        if len(ranks_by_value) > 1:
            values = (f"{value} ({', '.join(who)})" for value, who in ranks_by_value.items())
            lines.append(f"{name}: {'; '.join(values)}")
    return lines
