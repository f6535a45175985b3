"""Serve models without weights in every mode, with this package and with SGLang's own ``fa3``.

Both peers call the same kernels of the same GPU, so that their answers must be the same: where
SGLang's own are the same twice, ours must be equal to the last bit. Random weights do, because
answers depend on every token before them, which is checked too. One thing must be equal for that:
the plans. As shipped, SGLang's backend makes some for plain decode and leaves the others to the
kernels, which may split the keys into another number of parts than FA3's ``get_scheduler_metadata``
does. So it is compared with a plan of that function for every call, none of which is kept, and as
shipped with what those plans change in it allowed. SGLang's own ``fa3`` runs on NVIDIA GPUs alone:
on MUSA the peers are this package with a plan for every call, which must be equal, and the in-tree
backend, whose answers are told beside ours.

A mode takes five engines: both peers under graphs, both eager, ours with every reused plan
checked, and SGLang's own as shipped; some take more of ours. They share the GPUs, several at a
time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sglang_musa_ext.engines.changes import PLANS, UNTUNED, WEIGHTS
from sglang_musa_ext.engines.models import write_model
from sglang_musa_ext.engines.ports import LOOPBACK, held_block
from sglang_musa_ext.engines.process import FORCE_UPDATE, Engine, EngineDied
from sglang_musa_ext.validation import several
from sglang_musa_ext.validation.engine import (
    EngineAnswers,
    Missing,
    deviation,
    first_difference,
    first_divergence,
    guarded,
    joined,
)
from sglang_musa_ext.validation.refusals import why_not_on_musa
from sglang_musa_ext.validation.report import FAIL, PASS, SKIP, Outcome, total

Emit = Callable[[Mapping[str, Any]], None]
Case = tuple[str, Callable[[], Outcome]]
"""A case's name, and what gives its outcome."""
PART = "modes"


@dataclass(frozen=True)
class Mode:
    """A way to serve a model."""

    family: str
    """The model's, of ``model_configs``."""
    arguments: Mapping[str, Any]
    """Of ``sglang.Engine``, besides :data:`COMMON`."""
    plans: tuple[int, ...] = ()
    """Plans that a pass of its backends may compute, one a geometry; empty: counted, not judged."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields in which its model differs from its family."""
    draft: str = ""
    """The family of the draft model, where there is one."""
    gpus: int = 1
    output_checked: bool = False
    """True if ours serves once more, with every call's output beside the reference kernels."""
    raw_prefill: str = ""
    """If ours serves once more with prefill over raw keys allowed: whether it is ``used``, as each
    prompt without a prefix allows, or ``unused``, as the cache's type forbids.
    """
    nodes: int = 1
    """Engines that serve together, each with an equal part of the GPUs."""
    apart: bool = False
    """True if one engine prefills and another decodes, each on a GPU of its own."""
    singly: bool = False
    """True if requests come one at a time. Several would be batched by when they come, and batches
    decide last bits."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its engines."""


CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}
FP8 = {"page_size": 64, "kv_cache_dtype": "fp8_e4m3"}
EXPERTS = {"first_k_dense_replace": 1}
# SGLang turns this fusion on for some models over several GPUs, and it has nothing to do with
# attention. The first engine compiles it for minutes, while the others wait.
UNFUSED = {"enforce_disable_flashinfer_allreduce_fusion": True}
OVERLAP = {
    "tp_size": 2,
    "dp_size": 2,
    "enable_dp_attention": True,
    "enable_two_batch_overlap": True,
    **UNFUSED,
}
DP_ATTENTION = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, **UNFUSED}
EAGLE_CHAIN: Mapping[str, Any] = {"speculative_algorithm": "EAGLE", **CHAIN}
EAGLE_TREE: Mapping[str, Any] = {"speculative_algorithm": "EAGLE", **TREE}
MTP = dict(EAGLE_CHAIN)
"""The model's own layer drafts; ``WITH_MTP`` is what its configuration says of it."""
WITH_MTP = {"num_nextn_predict_layers": 1}
CONTEXT_PARALLEL = {"tp_size": 2, "attn_cp_size": 2, "enable_prefill_cp": True, **UNFUSED}
ZIGZAG = CONTEXT_PARALLEL | {"cp_strategy": "zigzag"}
INTERLEAVE = CONTEXT_PARALLEL | {"cp_strategy": "interleave"}
COMPILED = {"enable_torch_compile": True, "torch_compile_max_bs": 2}


def _on_two(family: str, arguments: Mapping[str, Any], **fields: Any) -> Mode:
    """Return a mode on two GPUs, at pages of 64 unless ``arguments`` say otherwise."""
    return Mode(family, {"page_size": 64, **arguments}, gpus=2, **fields)


MODES: Mapping[str, Mode] = {
    "dense-page1": Mode("llama", {"page_size": 1}, (1,)),
    "dense-page16": Mode("llama", {"page_size": 16}, (1,)),
    "dense-page64": Mode("llama", {"page_size": 64}, (1,), output_checked=True, raw_prefill="used"),
    "dense-page128": Mode("llama", {"page_size": 128}, (1,)),
    "dense-chunked": Mode("llama", {"page_size": 64, "chunked_prefill_size": 512}, (1,)),
    "deterministic": Mode("llama", {"page_size": 64, "enable_deterministic_inference": True}, (1,)),
    "window-softcap": Mode("gemma2", {"page_size": 64}, (2,), raw_prefill="used"),
    "window-sinks": Mode("gpt_oss", {"page_size": 64}, (2,)),
    "mla": Mode("deepseek_v3", {"page_size": 64}, (1,)),
    "mla-chunked": Mode("deepseek_v3", {"page_size": 64, "chunked_prefill_size": 1024}, (1,)),
    "fp8": Mode("llama", FP8, (1,), output_checked=True, raw_prefill="unused"),
    "fp8-chunked": Mode("llama", {**FP8, "chunked_prefill_size": 512}, (1,)),
    "fp8-window": Mode("gemma2", FP8, (2,), output_checked=True, raw_prefill="unused"),
    "eagle": Mode(
        "llama", {"page_size": 64, "speculative_algorithm": "EAGLE", **CHAIN}, (1,), draft="eagle"
    ),
    # Over a tree verify and draft are cascades of two calls with a plan each; prefill is one.
    "eagle-tree": Mode(
        "llama", {"page_size": 1, "speculative_algorithm": "EAGLE", **TREE}, (1, 2), draft="eagle"
    ),
    "standalone": Mode(
        "llama",
        {"page_size": 64, "speculative_algorithm": "STANDALONE", **CHAIN},
        (1,),
        draft="llama",
    ),
    # SGLang takes the search's breadth for a tree's width: verify is a cascade here too.
    "ngram": Mode(
        "llama",
        {"page_size": 1, "speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4},
        (1, 2),
    ),
    "tp2": Mode("llama", {"page_size": 64, "tp_size": 2}, (1,), gpus=2),
    "tp2-mla": Mode("deepseek_v3", {"page_size": 64, "tp_size": 2, **UNFUSED}, (1,), gpus=2),
    "pp2": Mode("llama", {"page_size": 64, "pp_size": 2}, (1,), gpus=2),
    "pp2-mla": Mode("deepseek_v3", {"page_size": 64, "pp_size": 2}, (1,), gpus=2),
    # With no other exchange between experts, SGLang overlaps only with data-parallel attention.
    "two-batch-overlap": Mode("deepseek_v3", {"page_size": 64, **OVERLAP}, changes=EXPERTS, gpus=2),
    "torch-compile": Mode("llama", {"page_size": 64, **COMPILED}, (1,), environ={UNTUNED: "1"}),
    "mla-mtp": Mode("deepseek_v3", {"page_size": 64, **MTP}, changes=WITH_MTP),
    "tp2-mla-mtp": _on_two("deepseek_v3", {"tp_size": 2, **UNFUSED, **MTP}, changes=WITH_MTP),
    "tp2-eagle": _on_two("llama", {"tp_size": 2, **EAGLE_CHAIN}, plans=(1,), draft="eagle"),
    "tp2-eagle-tree": _on_two(
        "llama", {"tp_size": 2, "page_size": 1, **EAGLE_TREE}, plans=(1, 2), draft="eagle"
    ),
    "tp2-window-softcap": _on_two("gemma2", {"tp_size": 2}, plans=(2,)),
    "tp2-window-sinks": _on_two("gpt_oss", {"tp_size": 2, **UNFUSED}, plans=(2,)),
    "dp2": _on_two("llama", {"dp_size": 2}, plans=(1,), singly=True),
    "dp-attention": _on_two("deepseek_v3", DP_ATTENTION, changes=EXPERTS, singly=True),
    "dp-attention-mtp": _on_two(
        "deepseek_v3", DP_ATTENTION | MTP, changes=EXPERTS | WITH_MTP, singly=True
    ),
    "cp-zigzag": _on_two("deepseek_v3", ZIGZAG),
    "cp-zigzag-window-sinks": _on_two("gpt_oss", ZIGZAG),
    "cp-interleave": _on_two("deepseek_v3", INTERLEAVE),
    "two-nodes": _on_two("llama", {"tp_size": 2}, plans=(1,), nodes=2),
    "two-nodes-mla": _on_two("deepseek_v3", {"tp_size": 2, **UNFUSED}, nodes=2),
    "apart": _on_two("llama", {}, plans=(1,), apart=True, singly=True),
    "apart-window-sinks": _on_two("gpt_oss", {}, plans=(2,), apart=True, singly=True),
    "apart-mla-mtp": _on_two("deepseek_v3", MTP, changes=WITH_MTP, apart=True, singly=True),
}
COMMON: Mapping[str, Any] = {
    "load_format": "dummy", "skip_tokenizer_init": True, "attention_backend": "fa3",
    "dtype": "bfloat16",
    "random_seed": 0, "log_level": "warning", "context_length": 8192, "max_running_requests": 8,
    "max_total_tokens": 16384, "prefill_graphs": False,
    # How much there is comes from max_total_tokens. SGLang takes what this leaves, of what was free
    # before loading, from what is free after; engines that load at the same time must not eat that
    # up.
    "mem_fraction_static": 0.9,
}  # fmt: skip
GRAPHS = [1, 2, 4, 8]
ENVIRON = {
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    "SGLANG_HOST_IP": LOOPBACK,
}
"""Defaults of the environment: FP8 in attention alone, GPUs shared with other engines, and servers
that are apart on this machine.
"""
BYTES = 6 << 30
"""Device memory that an engine is counted with."""
SECONDS = 600.0
"""The longest time from an engine's start to its end."""


class BackendChoice(NamedTuple):
    """A backend, and its options."""

    ours: bool
    graphs: bool
    check: str = "off"
    shipped: bool = False
    """For upstream's backend: True if it plans as it does by default, not before every call."""
    raw_prefill: str = "off"
    """For ours: ``on`` if prompts without a prefix may be prefilled over raw keys."""
    kernels: str = "hopper"
    """Ours, and the package's peer on their device: on MUSA, the in-tree backend."""
    fresh: bool = False
    """For ours: True if every call has a plan of its own, and none is used twice."""

    @property
    def name(self) -> str:
        """For a log's name and for progress."""
        words = ["ours" if self.ours else "upstream", "graphs" if self.graphs else "eager"]
        words += ["output"] if self.check == "output" else []
        words += ["raw"] if self.raw_prefill == "on" else []
        words += ["fresh"] if self.fresh else []
        return ".".join([*words, *(["shipped"] if self.shipped else [])])

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment that makes it so."""
        if self.ours and self.kernels == "mate":
            own = {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_CHECK": self.check}
            return own | ({FORCE_UPDATE: "1"} if self.fresh else {})
        if self.ours:
            return {
                "SGLANG_MUSA_EXT": "on",
                "SGLANG_MUSA_EXT_KERNELS": self.kernels,
                "SGLANG_MUSA_EXT_CHECK": self.check,
                # Upstream's backend prefills from the paged cache, and with a plan for every call.
                "SGLANG_MUSA_EXT_RAW_PREFILL": self.raw_prefill,
                "SGLANG_MUSA_EXT_PLANS": "always",
            }
        return {"SGLANG_MUSA_EXT": "off"} | ({} if self.shipped else {PLANS: "1"})


PEERS = {
    "graphs": (BackendChoice(False, True), BackendChoice(True, True)),
    "eager, plans checked": (BackendChoice(False, False), BackendChoice(True, False, "metadata")),
}
"""Upstream's and ours, equal to the last bit: each of their calls has FA3's plan for it."""
AS_SHIPPED = BackendChoice(False, True, shipped=True)
"""Upstream's as it is. Its calls may have other numbers of splits, and its answers other last bits.
"""
ON_MUSA = {
    "graphs": (
        BackendChoice(True, True, kernels="mate", fresh=True),
        BackendChoice(True, True, kernels="mate"),
    ),
    "eager, plans checked": (
        BackendChoice(True, False, kernels="mate", fresh=True),
        BackendChoice(True, False, "metadata", kernels="mate"),
    ),
}
"""Ours with a plan for every call and ours as it is, equal to the last bit."""
IN_TREE = BackendChoice(False, True, shipped=True, kernels="mate")
"""SGLang's in-tree MUSA backend, which is known to be wrong in some modes."""


@dataclass(frozen=True)
class Peers:
    """The choices that are compared on a kind of device."""

    kernels: str
    equal: Mapping[str, tuple[BackendChoice, BackendChoice]]
    """By how they serve: who is right, and ours."""
    shipped: BackendChoice
    visible: str
    """The variable that names the cards which a process sees."""


PEERS_ON = {
    "cuda": Peers("hopper", PEERS, AS_SHIPPED, "CUDA_VISIBLE_DEVICES"),
    "musa": Peers("mate", ON_MUSA, IN_TREE, "MUSA_VISIBLE_DEVICES"),
}
"""By the type of the device."""
UPSTREAM_TOLERANCE = 5e-2
"""The error of log-probabilities that upstream's tests allow its models beside Hugging Face's."""
OUTPUT = BackendChoice(True, False, "output")
RAW_PREFILL = BackendChoice(True, True, raw_prefill="on")


def phases(quick: bool) -> list[list[list[int]]]:
    """Return batches of requests; the last tells whether answers depend on attention."""
    lengths = (5, 70, 700) if quick else (5, 70, 700, 3000)
    batch = [_prompt(length, 7, 13 * row) for row, length in enumerate(lengths)]
    # What comes later finds what came first in the prefix cache: all of it, and all but a suffix.
    return [batch, [batch[0]], [batch[-1]], [[*prompt, 9, 8, 7] for prompt in batch], twins()]


def twins() -> list[list[int]]:
    """Return two prompts of one length and last token, which attention alone tells apart."""
    return [[*_prompt(99, step, 29), 17] for step in (11, 23)]


def _prompt(length: int, step: int, first: int) -> list[int]:
    return [(step * at + first) % 4000 + 3 for at in range(length)]


# --- the engines ----------------------------------------------------------------------------------


@dataclass
class Asked:
    """The answers of an engine to the same questions twice, the prefix cache emptied between."""

    answers: list[EngineAnswers]
    reports: list[dict[str, Any]]

    @property
    def both(self) -> tuple[EngineAnswers, EngineAnswers]:
        """Its two answers."""
        return self.answers[0], self.answers[1]


class Fleet:
    """Engines on the GPUs, several at once, started when there is room, ended when answered."""

    def __init__(
        self,
        options: argparse.Namespace,
        cards: Sequence[str],
        jobs: int,
        emit: Emit,
        visible: str = "CUDA_VISIBLE_DEVICES",
    ) -> None:
        """``cards`` are the GPUs as the variable ``visible`` names them."""
        self.options, self.cards, self._emit, self._visible = options, cards, emit, visible
        self._pool = ThreadPoolExecutor(jobs)
        self._numbers = itertools.count()
        self._asked: dict[tuple[str, BackendChoice], Future[Asked]] = {}
        self._up: list[str] = []
        self._down = 0
        self._lock = threading.Lock()

    def begin(self, name: str, choices: Sequence[BackendChoice]) -> None:
        """Have these engines of a mode started as soon as there is room, unless they have been."""
        for choice in choices:
            if (name, choice) not in self._asked:
                self._asked[name, choice] = self._pool.submit(
                    self._ask, name, choice, next(self._numbers)
                )

    def asked(self, name: str, choice: BackendChoice) -> Asked:
        """Return what an engine answered; wait for it.

        Raises:
            Missing: it is upstream's, and did not serve, so that there is nothing to compare with.
            EngineDied: it is ours.
        """
        try:
            return self._asked[name, choice].result()
        except EngineDied as error:
            if choice.ours and not choice.fresh:
                raise
            peer = "this package without reuse of plans" if choice.fresh else "SGLang's own fa3"
            raise Missing(f"{peer} does not serve this: {error}") from error

    def completed(self, names: Iterable[str]) -> Iterator[str]:
        """Yield each of these modes when all its engines have answered or ended."""
        waiting = dict.fromkeys(names)
        while waiting:
            going_on = [key for key, future in self._asked.items() if not future.done()]
            unfinished = {name for name, _ in going_on}
            for name in [name for name in waiting if name not in unfinished]:
                del waiting[name]
                yield name
            wait([self._asked[key] for key in going_on], return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """Start no more engines, and wait for those that are up."""
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, name: str, choice: BackendChoice, number: int) -> Asked:
        log = Path(self.options.out) / PART / f"{name}.{choice.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._shown(f"{name}.{choice.name}"),
            self._engine(name, choice, number, log) as served,
        ):
            asked = self._conversation(name, served, choice)
            log.with_suffix(".json").write_text(
                json.dumps([asdict(answer) for answer in asked.answers]) + "\n"
            )
            return asked

    @contextlib.contextmanager
    def _engine(
        self, name: str, choice: BackendChoice, number: int, log: Path
    ) -> Iterator[several.Server]:
        with held_block() as port:
            server = self._started(name, choice, number, log, port)
            # A server that hangs must not hang the others' cases.
            alarm = threading.Timer(SECONDS, server.kill)
            alarm.start()
            try:
                yield server.wait()
            finally:
                alarm.cancel()
                server.close()

    def _started(
        self, name: str, choice: BackendChoice, number: int, log: Path, port: int
    ) -> several.Server:
        """Start the engines of a server, each on its part of the mode's GPUs."""
        mode = MODES[name]
        cards = [self.cards[(number + index) % len(self.cards)] for index in range(mode.gpus)]
        environ = {key: os.environ.get(key, value) for key, value in ENVIRON.items()}
        environ |= {WEIGHTS: "1", **mode.environ} | choice.environ
        arguments = self._arguments(name, choice, number)
        parts = several.parts(mode.nodes, port, apart=mode.apart)
        share = mode.gpus // len(parts)
        engines = []
        for rank, own in enumerate(parts):
            visible = ",".join(cards[rank * share : (rank + 1) * share])
            output = log if rank == 0 else log.with_suffix(f".{rank}.log")
            engines.append(Engine(arguments | own, environ | {self._visible: visible}, output))
        return several.Apart(engines, port) if mode.apart else several.Server(engines)

    def _arguments(self, name: str, choice: BackendChoice, number: int) -> dict[str, Any]:
        mode, models = MODES[name], Path(self.options.scratch)
        arguments = {**COMMON, **mode.arguments, "graphs": GRAPHS if choice.graphs else []}
        # Each engine writes its own, because they start at the same time.
        arguments["model_path"] = str(
            write_model(models / f"{name}.{number}", mode.family, **mode.changes)
        )
        if mode.draft:
            draft = write_model(models / f"{name}.{number}.draft", mode.draft, num_hidden_layers=1)
            arguments["speculative_draft_model_path"] = str(draft)
        return arguments

    def _conversation(self, name: str, served: several.Server, choice: BackendChoice) -> Asked:
        if choice.check == "output":
            # The reference kernels take their time.
            answer = served.ask([prompt[:70] for prompt in phases(True)[0]], 4)
            return Asked(
                [EngineAnswers(answer["tokens"], answer["logprobs"], [])], served.reports()
            )
        count, answers = 8 if self.options.quick else 24, []
        for _ in range(2):
            replies = list(self._answers(MODES[name], served, count))
            answers.append(
                EngineAnswers(joined(replies, "tokens"), joined(replies, "logprobs"), [])
            )
            served.flush()
        return Asked(answers, served.reports())

    def _answers(
        self, mode: Mode, served: several.Server, count: int
    ) -> Iterator[dict[str, list[Any]]]:
        """Yield the answers to every batch of requests, or to every request by itself.

        Each request has its own of the ranks of data-parallel attention: the one with its prefix.
        """
        for batch in phases(self.options.quick):
            if not mode.singly:
                yield served.ask(batch, count)
                continue
            for prompt in batch:
                yield served.ask([prompt], count, **_placed(mode, prompt))

    @contextlib.contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        """Have an engine among those that are shown as up."""
        self._show(self._up.append, name)
        try:
            yield
        finally:
            self._show(self._up.remove, name, 1)

    def _show(self, change: Callable[[str], None], name: str, down: int = 0) -> None:
        with self._lock:
            change(name)
            self._down += down
            done = f"{self._down} of {len(self._asked)} engines done"
            self._emit({"progress": f"{done}; up: {', '.join(self._up)}"})


def _placed(mode: Mode, prompt: Sequence[int]) -> dict[str, int]:
    """Return the data-parallel rank of a prompt, which goes by its first token; or nothing."""
    ranks = mode.arguments.get("dp_size", 1)
    return {"dp_rank": prompt[0] % ranks} if ranks > 1 else {}


# --- cases ----------------------------------------------------------------------------------------


class ModeCases:
    """The cases of the modes that can run here."""

    def __init__(self, fleet: Fleet, peers: Peers = PEERS_ON["cuda"]) -> None:
        self.fleet, self.peers = fleet, peers

    def cases(self, names: Sequence[str], done: Collection[str]) -> dict[str, list[Case]]:
        """Return the cases of each mode. Their engines are all asked for at once, in this order."""
        judges = {name: self._of_mode(name) for name in names}
        for name, cases in judges.items():
            if set(cases) - set(done):
                self.fleet.begin(name, self._choices(name))
        return {
            name: [
                (case, functools.partial(guarded, PART, case, functools.partial(judge, name)))
                for case, judge in cases.items()
            ]
            for name, cases in judges.items()
        }

    def _choices(self, name: str) -> list[BackendChoice]:
        mode = MODES[name]
        choices = [*itertools.chain(*self.peers.equal.values()), self.peers.shipped]
        choices += [self._our(OUTPUT)] if mode.output_checked else []
        return choices + ([self._our(RAW_PREFILL)] if self._allows_raw(name) else [])

    def _our(self, choice: BackendChoice) -> BackendChoice:
        """Return one of our choices on the kernels of this device."""
        return choice._replace(kernels=self.peers.kernels)

    def _of_mode(self, name: str) -> dict[str, Callable[[str], Outcome]]:
        judges: dict[str, Callable[[str], Outcome]] = {
            f"{name}: {how}": functools.partial(self._equal, peers=peers)
            for how, peers in self.peers.equal.items()
        }
        if self.peers.kernels == "hopper":
            judges[f"{name}: graphs, upstream as shipped"] = self._as_shipped
        else:
            judges[f"{name}: graphs, beside the in-tree backend"] = self._beside_in_tree
        judges[f"{name}: who served, and plans a pass"] = self._plans
        judges[f"{name}: answers depend on attention"] = self._depends
        if MODES[name].output_checked:
            judges[f"{name}: every call's output beside the reference kernels'"] = self._output
        if self._allows_raw(name):
            judges[f"{name}: graphs, prefill over raw keys allowed"] = self._raw_prefill
        return judges

    def _allows_raw(self, name: str) -> bool:
        """Tell whether ours serves a mode once more; on MUSA it prefills over raw keys anyway."""
        wanted = MODES[name].raw_prefill
        return wanted == "unused" or (wanted == "used" and self.peers.kernels == "hopper")

    def _equal(self, name: str, peers: tuple[BackendChoice, BackendChoice]) -> Outcome:
        right, ours = (self.fleet.asked(name, choice) for choice in peers)
        outcome = judged_equal(ours, right)
        if peers[1].check != "metadata":
            return outcome
        reuses = sum(
            report["statistics"]["reuses"]
            for report in ours.reports
            if report["settings"]["check"] != "off"
        )
        values = {**outcome.numbers, "reused plans checked": reuses}
        if not reuses and self._takes_plans(name):
            return Outcome(PART, "", FAIL, f"no reused plan was checked; {outcome.reason}", values)
        return Outcome(PART, "", outcome.status, outcome.reason, values)

    def _takes_plans(self, name: str) -> bool:
        """Tell whether calls of a mode take plans, which MATE ignores where there are sinks."""
        return self.peers.kernels != "mate" or MODES[name].family != "gpt_oss"

    def _as_shipped(self, name: str) -> Outcome:
        planned, ours = (self.fleet.asked(name, choice) for choice in self.peers.equal["graphs"])
        return judged_equal(ours, self.fleet.asked(name, self.peers.shipped), planned)

    def _beside_in_tree(self, name: str) -> Outcome:
        """Tell how our answers differ from those of a backend that is no judge of them."""
        in_tree = self.fleet.asked(name, self.peers.shipped)
        outcome = judged_equal(self.fleet.asked(name, self.peers.equal["graphs"][1]), in_tree)
        if outcome.status == PASS:
            return outcome
        reason = (
            "the in-tree backend answers otherwise, which does not say who is right; "
            f"docs/from-in-tree.md lists where it is wrong: {outcome.reason}"
        )
        return Outcome(PART, "", PASS, reason, outcome.numbers)

    def _raw_prefill(self, name: str) -> Outcome:
        """Judge ours with prefill over raw keys allowed beside upstream's, which reads the cache.

        Where raw keys serve, sums have another order, and the tolerance is upstream's own; where
        the cache has a type that no layer's own keys have, answers are equal.
        """
        ours = self.fleet.asked(name, self._our(RAW_PREFILL))
        used = MODES[name].raw_prefill == "used"
        right = self.fleet.asked(name, self.peers.equal["graphs"][0])
        outcome = judged_equal(ours, right, tolerance=UPSTREAM_TOLERANCE if used else 0.0)
        raw = sum(report["statistics"]["raw_calls"] for report in ours.reports)
        values = {**outcome.numbers, "calls over raw keys": raw}
        if not ours.reports:
            return Outcome(PART, "", FAIL, "ours did not serve", values)
        if (raw > 0) != used:
            expected = "where prompts without a prefix" if used else "which this cache does not"
            reason = f"{raw} calls were served over raw keys, {expected} allow"
            return Outcome(PART, "", FAIL, reason, values)
        return Outcome(PART, "", outcome.status, outcome.reason, values)

    def _plans(self, name: str) -> Outcome:
        upstream, reports = [], []
        for theirs, ours in self.peers.equal.values():
            upstream += [] if theirs.ours else self.fleet.asked(name, theirs).reports
            reports += self.fleet.asked(name, ours).reports
        wanted = MODES[name].plans
        if self.peers.kernels == "mate" and wanted:
            # Calls over raw keys take no plan there, nor those that are known not to be split.
            wanted = tuple(range(1, max(wanted) + 1))
        return judged_plans(
            reports, upstream, wanted, self.peers.kernels, takes_plans=self._takes_plans(name)
        )

    def _depends(self, name: str) -> Outcome:
        answers = self.fleet.asked(name, self.peers.equal["graphs"][0]).answers[0]
        first, second = answers.logprobs[-2:]
        values = {
            "log-probability difference": max(
                abs(a - b) for a, b in zip(first, second, strict=True)
            )
        }
        if values["log-probability difference"] > 0:
            return Outcome(PART, "", PASS, "", values)
        reason = (
            "prompts that differ before their last token got the same answer: equality says nothing"
        )
        return Outcome(PART, "", FAIL, reason, values)

    def _output(self, name: str) -> Outcome:
        asked = self.fleet.asked(name, self._our(OUTPUT))
        calls = sum(
            report["statistics"]["calls"]
            for report in asked.reports
            if report["settings"]["check"] == "output"
        )
        good = calls > 0
        return Outcome(
            PART,
            "",
            PASS if good else FAIL,
            "" if good else "no call was compared",
            {"calls": calls},
        )


def judged_equal(
    ours: Asked, right: Asked, other: Asked | None = None, *, tolerance: float = 0.0
) -> Outcome:
    """Compare our answers with upstream's, as far as upstream's are the same twice.

    With a ``tolerance``, log-probabilities may be off by it in any case, and tokens that are as
    likely as each other may be others.
    """
    first, second = right.both
    own = [deviation(second, first)]
    own += [] if other is None else map(deviation, other.both, right.both)
    errors, equal = zip(*own, strict=True)
    allowed, repeated = max(2 * max(errors), tolerance), 0 if tolerance else min(equal)
    compared = [deviation(mine, theirs) for mine, theirs in zip(ours.both, right.both, strict=True)]
    errors, equal = zip(*compared, strict=True)
    error, same = max(errors), min(equal)
    total = sum(map(len, first.tokens))
    values = {
        "equal tokens": f"{same} of {total}",
        "log-probability error": error,
        "allowed": allowed,
    }
    good = same >= repeated and error <= allowed
    pairs = list(zip(ours.both, right.both, strict=True))
    tokens, logprobs = (
        "; ".join(filter(None, itertools.starmap(first, pairs)))
        for first in (first_divergence, first_difference)
    )
    beyond = (
        f"tokens are equal, and log-probabilities differ by more than upstream's own do: {logprobs}"
    )
    reason = "" if good else tokens or beyond
    if allowed and not tolerance:
        reason = f"upstream's own answers differ from one time or way to another; {reason}"
    return Outcome(PART, "", PASS if good else FAIL, reason, values)


def judged_plans(
    reports: Sequence[Mapping[str, Any]],
    upstream: Sequence[Mapping[str, Any]],
    wanted: Sequence[int],
    kernels: str,
    *,
    takes_plans: bool = True,
) -> Outcome:
    """Judge whether ours served where it should, with as many plans a pass as geometries."""
    counts: Counter[int] = Counter()
    for report in reports:
        counts.update(
            {
                int(plans): passes
                for plans, passes in report["statistics"]["passes_by_plans"].items()
            }
        )
    sums = {name: total(reports, name) for name in ("planned_calls", "plans", "reuses")}
    seen = sorted({f"{report['backend']} on {report['kernels']}" for report in reports})
    values = {"passes by plans": dict(sorted(counts.items())), **sums}
    wrong = []
    if upstream:
        wrong.append("this package served where SGLang's own fa3 should have")
    if seen != [f"MusaFA3Backend on {kernels}"]:
        wrong.append(
            f"served by {'; '.join(seen) or 'no backend of this package'}, expected MusaFA3Backend "
            f"on {kernels}"
        )
    if wanted and set(counts) - set(wanted):
        wrong.append(
            f"passes computed {sorted(counts)} plans, expected {' or '.join(map(str, wanted))}"
        )
    if takes_plans and not sums["plans"]:
        wrong.append("no call took a plan")
    return Outcome(PART, "", FAIL if wrong else PASS, "; ".join(wrong), values)


# --- the part -------------------------------------------------------------------------------------


def missing(kernels: str, device: str) -> str:
    """Return why this part cannot run; empty if it can."""
    if device.startswith("musa"):
        return "" if kernels in ("auto", "mate") else "on MUSA this part serves MATE's kernels"
    if not device.startswith("cuda"):
        return (
            "the peers of this part are SGLang's own fa3 on NVIDIA GPUs and its in-tree backend on "
            f"MUSA, and this device is {device}"
        )
    if kernels != "hopper":
        return "on an NVIDIA GPU this part compares the hopper kernels: --kernels hopper"
    return ""


def visible_cards(count: int, device: str, visible: str = "CUDA_VISIBLE_DEVICES") -> list[str]:
    """Return ``count`` cards as variable ``visible`` names them, or ``device``'s if it has one."""
    named = os.environ.get(visible, "")
    cards = named.split(",")[:count] if named else [str(index) for index in range(count)]
    _, _, index = device.partition(":")
    return [cards[int(index)]] if index else cards


def default_jobs(cards: int, each: int = 1, kind: str = "cuda") -> int:
    """Return how many engines of ``each`` cards processor and free memory have room for."""
    import torch

    free = torch.get_device_module(kind).mem_get_info
    memory = sum(int(free(index)[0]) // BYTES for index in range(cards)) // each
    return max(1, min(len(os.sched_getaffinity(0)) // 2, memory))


def run(options: argparse.Namespace, done: Collection[str], emit: Emit) -> None:
    """Run the cases of every mode that was asked for, or say why there are none."""
    from sglang_musa_ext.validation.device import find_device, run_cases

    device = str(find_device(options))
    names = list(dict.fromkeys(options.modes or MODES))
    cards: list[str] = []
    kind = device.partition(":")[0]
    peers = PEERS_ON.get(kind, PEERS_ON["cuda"])
    if not (why := missing(options.kernels, device)):
        import torch

        count = torch.get_device_module(kind).device_count()
        cards = visible_cards(count, device, peers.visible)
    reasons = {name: why or _lacking(name, len(cards)) for name in names}
    if kind == "musa" and not why:
        reasons = {name: reasons[name] or _refused_on_musa(name) for name in names}
    skipped = [name for name, reason in reasons.items() if reason]
    most = max((MODES[name].gpus for name in names if name not in skipped), default=1)
    jobs = 1 if why else options.jobs or default_jobs(len(cards), most, kind)
    fleet = Fleet(options, cards, jobs, emit, peers.visible)
    try:
        served = [name for name in names if name not in skipped]
        cases: list[Case] = [
            (name, functools.partial(Outcome, PART, name, SKIP, reasons[name])) for name in skipped
        ]
        by_mode = ModeCases(fleet, peers).cases(served, done)
        total = len(cases) + sum(map(len, by_mode.values()))
        # A mode that hangs must not keep back what is known of the others.
        answered = (case for name in fleet.completed(served) for case in by_mode[name])
        run_cases(itertools.chain(cases, answered), None, done, emit, total)
    finally:
        fleet.close()


def _refused_on_musa(name: str) -> str:
    """Return why SGLang or MATE does not serve a mode on MUSA; empty: it does."""
    from sglang_musa_ext.kernels.mate_identity import identify_mate
    from sglang_musa_ext.upstream.check import find_package, read_version

    package = find_package()
    version = read_version(package) if package else None
    return why_not_on_musa(MODES[name].arguments, version, identify_mate().known_release)


def _lacking(name: str, cards: int) -> str:
    """Return what this machine lacks for a mode; empty if it has all."""
    mode = MODES[name]
    if mode.gpus > cards:
        return f"it takes {mode.gpus} GPUs, and there are {cards}"
    if mode.apart and importlib.util.find_spec("nixl") is None:
        return "it takes NIXL to move keys and values between servers: pip install nixl"
    return ""
