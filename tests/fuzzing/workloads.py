"""Random workloads of the real engine: the tokens must be those of SGLang's torch_native attention.

A :class:`Workload` is an engine and the talks that it has at once. A talk has turns, each with all
that was said before as its prompt, or as a session of SGLang's; some begin late, some are aborted.
The engine is put under pressure: small pools, forced retraction, chunked and mixed prefill, drafts.
The other engine has room for everything and takes one talk after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.engine import (
    TORCH_NATIVE,
    EngineCase,
    EngineServer,
    booted,
    reports_of,
)
from tests.support.forks import fork_always
from tests.support.tiny_models import SMALL, VOCABULARY, EagleDraft, TinyModel, llama

NEAR_TIE = 1e-3
"""Where two tokens are this close in log-probability, either is right, and the talk goes on apart.
"""


@dataclass(frozen=True)
class Turn:
    """Tokens that are said, and how many are answered."""

    said: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Talk:
    """Turns of one conversation."""

    turns: tuple[Turn, ...]
    begins_after: int = 0
    """Tokens that other talks have been answered by then."""
    aborted_after: int = 0
    """Tokens of its last turn, after which it is aborted; 0: it is not."""
    session: bool = False
    """Each turn says only what is new, and SGLang keeps what was."""


@dataclass(frozen=True)
class Workload:
    """An engine and its talks."""

    model: TinyModel
    talks: tuple[Talk, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    retracts: bool = False
    """Requests are taken back out of the batch every few passes, as if memory had run out."""
    draft: TinyModel | None = None


@dataclass
class TalkAnswers:
    """The answers to the turns of a talk."""

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


class WrongTokens(AssertionError):
    """An engine said another token than torch_native."""


# --- generation -----------------------------------------------------------------------------------

FOUR = {**SMALL, "num_hidden_layers": 4, "sliding_window": 64}
WINDOW, FULL = "sliding_attention", "full_attention"
MODELS: tuple[TinyModel, ...] = (
    llama(),
    llama(num_hidden_layers=3, num_key_value_heads=4),
    TinyModel("Qwen3Config", SMALL),
    TinyModel("Olmo3Config", {**FOUR, "layer_types": [FULL, WINDOW, FULL, WINDOW]}),
)
EAGLE = EagleDraft("LlamaConfig", SMALL, "LlamaForCausalLMEagle")
EAGLE_3 = EagleDraft("LlamaConfig", SMALL, "LlamaForCausalLMEagle3")
DRAFTS: Mapping[str, TinyModel] = {"EAGLE": EAGLE, "EAGLE3": EAGLE_3, "STANDALONE": llama()}


def random_workload(seed: int) -> Workload:
    """The workload of ``seed``."""
    chance = random.Random(seed)
    talks = tuple(_talk(chance) for _ in range(chance.randint(2, 7)))
    arguments: dict[str, Any] = {
        "page_size": chance.choice((64, 64, 16, 1)),
        "disable_overlap_schedule": chance.random() < 0.5,
        "chunked_prefill_size": chance.choice((64, 128, 2048)),
        "enable_mixed_chunk": chance.random() < 0.3,
        "disable_radix_cache": chance.random() < 0.2,
        "max_total_tokens": chance.choice((512, 1024, 2048, 8192)),
    }
    retracts = chance.random() < 0.3
    if chance.random() < 0.3:
        return _drafting(chance, talks, arguments)
    return Workload(chance.choice(MODELS), talks, arguments, retracts)


def _drafting(chance: random.Random, talks: Sequence[Talk], arguments: dict[str, Any]) -> Workload:
    algorithm = chance.choice(tuple(DRAFTS))
    topk = chance.choice((1, 1, 4))
    arguments |= {
        "speculative_algorithm": algorithm, "speculative_num_steps": 3,
        "speculative_eagle_topk": topk, "speculative_num_draft_tokens": 4 if topk == 1 else 8,
        "enable_mixed_chunk": False, "max_total_tokens": 8192, "page_size": 64,
    }  # fmt: skip
    plain = tuple(Talk(talk.turns, talk.begins_after, talk.aborted_after) for talk in talks)
    return Workload(llama(), plain, arguments, draft=DRAFTS[algorithm])


SHARED = tuple(random.Random(0).choices(range(3, VOCABULARY), k=200))
"""The beginning of many talks, so that they share pages."""


def _talk(chance: random.Random) -> Talk:
    said = tuple(chance.choices(range(3, VOCABULARY), k=_length(chance)))
    if chance.random() < 0.5:
        said = SHARED[: chance.choice((64, 65, 127, 128, 200))] + said
    turns = [Turn(said, chance.randint(1, 16))]
    if chance.random() < 0.3:
        more = tuple(chance.choices(range(3, VOCABULARY), k=chance.randint(1, 40)))
        turns.append(Turn(more, chance.randint(1, 10)))
    begins = chance.choice((0, 0, 0, 5, 20))
    aborted = chance.randint(1, 6) if chance.random() < 0.2 else 0
    session = len(turns) > 1 and chance.random() < 0.5
    return Talk(tuple(turns), begins, aborted, session)


def _length(chance: random.Random) -> int:
    return chance.choice((1, 2, 5, 63, 64, 65, 128, chance.randint(1, 150)))


# --- in the process of an engine ------------------------------------------------------------------


def answers(
    case: EngineCase, talks: Sequence[Talk], at_once: bool
) -> tuple[list[TalkAnswers], list[dict[str, Any]], int]:
    """Boot the engine of ``case`` and have its talks; in turn where they are not ``at_once``.

    Returns what they got, the backends' reports, and how many times SGLang retracted requests.
    """
    fork_always()
    with booted(case) as engine:
        hall = _Hall(engine)
        if at_once:
            opened = [_opened(engine, talk) for talk in talks]
            work = [hall.talk(talk, session) for talk, session in zip(talks, opened, strict=True)]
            told = engine.loop.run_until_complete(_gathered(work))
        else:
            told = [
                engine.loop.run_until_complete(hall.talk(Talk(talk.turns), None)) for talk in talks
            ]
        return told, reports_of(engine), _retractions()


def force_retraction() -> None:
    """Have SGLang retract requests every few passes, which its scheduler decides when imported."""
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT = True


def _retractions() -> int:
    """Counted in the log, where the process of a task writes."""
    log = Path("/proc/self/fd/1").resolve()
    return log.read_text(errors="replace").count("#retracted_reqs")


async def _gathered(work: Sequence[Any]) -> list[TalkAnswers]:
    return list(await asyncio.gather(*work))


def _opened(engine: Any, talk: Talk) -> str | None:
    if not talk.session:
        return None
    opened: str = engine.open_session(capacity_of_str_len=4096)
    return opened


class _Hall:
    """An engine with the talks that are going on."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.said = 0
        self.progress = asyncio.Condition()

    async def talk(self, talk: Talk, session: str | None) -> TalkAnswers:
        """Have one talk, and give what it got."""
        if talk.begins_after:
            with_others = self.progress.wait_for(lambda: self.said >= talk.begins_after)
            async with self.progress:
                # The others may say less than that.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(with_others, 2.0)
        answer, prompt, before = TalkAnswers(), list[int](), None
        for number, turn in enumerate(talk.turns):
            last = number == len(talk.turns) - 1
            prompt = [*turn.said] if session else prompt + list(turn.said)
            options = {} if session is None else {"session_params": {"id": session, "rid": before}}
            tokens, before = await self._turn(
                prompt, turn.new_tokens, talk.aborted_after if last else 0, answer, options
            )
            prompt = prompt + tokens
        return answer

    async def _turn(
        self, prompt: list[int], new: int, abort: int, answer: TalkAnswers, options: dict[str, Any]
    ) -> tuple[list[int], str]:
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        stream = await self.engine.async_generate(
            input_ids=prompt, sampling_params=sampling, return_logprob=True, stream=True, **options
        )
        seen, about, aborted = 0, dict[str, Any](), False
        async for part in stream:
            about = part["meta_info"]
            async with self.progress:
                self.said += about["completion_tokens"] - seen
                seen = about["completion_tokens"]
                self.progress.notify_all()
            if abort and seen >= abort and not aborted:
                aborted = True
                self.engine.tokenizer_manager.abort_request(rid=about["id"])
        chosen = about["output_token_logprobs"]
        answer.tokens.append([token for _, token, *_ in chosen])
        answer.logprobs.append([logprob for logprob, *_ in chosen])
        return answer.tokens[-1], about["id"]


# --- comparison -----------------------------------------------------------------------------------


def run_workload(
    server: EngineServer, workload: Workload, timeout: float = 240.0
) -> dict[str, int]:
    """Run ``workload`` on both engines; gives counts, raises :class:`WrongTokens`."""
    model = server.model(workload.model)
    arguments = dict(workload.arguments)
    if workload.draft is not None:
        arguments["speculative_draft_model_path"] = str(server.model(workload.draft))
    before = force_retraction if workload.retracts else None
    case = EngineCase(model, arguments=arguments, before_boot=before)
    got, reports, retracted = server.call(answers, case, workload.talks, True, timeout=timeout)
    native = EngineCase(model, arguments={**TORCH_NATIVE, "max_total_tokens": 8192})
    wanted, _, _ = server.call(answers, native, workload.talks, False, timeout=timeout)
    counts = _compared(workload, got, wanted)
    counts["retracted"] = retracted
    for report in reports:
        statistics = report["statistics"]
        counts["engine_calls"] += statistics["calls"]
        counts["engine_plans"] += statistics["plans"]
        counts["engine_reuses"] += statistics["reuses"]
    return counts


def _compared(
    workload: Workload, got: Sequence[TalkAnswers], wanted: Sequence[TalkAnswers]
) -> dict[str, int]:
    counts = dict.fromkeys(
        ("engine_tokens", "engine_calls", "engine_plans", "engine_reuses", "aborted", "near_ties"),
        0,
    )
    counts |= {"engines": 1, "engine_requests": sum(len(talk.turns) for talk in workload.talks)}
    for talk, ours, native in zip(workload.talks, got, wanted, strict=True):
        counts["aborted"] += talk.aborted_after > 0
        for number in range(len(talk.turns)):
            same = _same_tokens(ours, native, number)
            counts["engine_tokens"] += same
            if same < len(ours.tokens[number]):
                # What comes after a near tie has another text before it.
                counts["near_ties"] += 1
                break
    return counts


def _same_tokens(ours: TalkAnswers, native: TalkAnswers, number: int) -> int:
    """Return how many tokens of a turn are the same: all, or those before a near tie."""
    pairs = zip(
        ours.tokens[number], native.tokens[number], ours.logprobs[number], native.logprobs[number],
        strict=False,
    )  # fmt: skip
    for index, (token, expected, logprob, wanted) in enumerate(pairs):
        if token != expected and abs(logprob - wanted) < NEAR_TIE:
            return index
        if token != expected or abs(logprob - wanted) > NEAR_TIE:
            raise WrongTokens(
                f"turn {number}, token {index}: {token} with log-probability {logprob:.5f}, where "
                f"torch_native says {expected} with {wanted:.5f}"
            )
    return len(ours.tokens[number])
