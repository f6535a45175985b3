"""Serve a tiny random Llama with this package and with SGLang's ``torch_native`` attention.

On a CPU both compute in float32, and tokens must be equal. On a device they compute in bfloat16,
where near ties fall either way: there ``torch_native`` in float32 is the reference, and
log-probabilities may be off by twice what ``torch_native`` in bfloat16 is off by, up to the first
token that differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_musa_ext import envs
from sglang_musa_ext.engines.process import Engine, EngineDied, engine
from sglang_musa_ext.validation.report import FAIL, PASS, SKIP, Outcome, total

PART = "engine"
VOCABULARY = 512
FLOAT32_TOLERANCE = 1e-3
FLOOR = 1e-2
"""The error that log-probabilities in bfloat16 may have in any case."""
ARGUMENTS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "chunked_prefill_size": 128,
    "log_level": "info",
    # Some releases capture prefill by default, in sizes that take longer than all the rest.
    "prefill_graphs": False,
}


@dataclass(frozen=True)
class Variant:
    """One engine."""

    name: str
    backend: str
    dtype: str
    environ: Mapping[str, str] = field(default_factory=dict)
    graphs: bool = False

    def arguments(self, model: Path, device: str) -> dict[str, Any]:
        """Arguments of ``sglang.Engine``."""
        own = {
            "attention_backend": self.backend,
            "dtype": self.dtype,
            "device": device.split(":", maxsplit=1)[0],
        }
        pages = {"page_size": 64 if self.backend == "fa3" else 1}
        # The tiny model never has more requests than that.
        graphs = {"graphs": [8] if self.graphs else []}
        return {**ARGUMENTS, **own, **pages, **graphs, "model_path": str(model)}


def variants(device: str, quick: bool) -> tuple[Variant, list[Variant], list[Variant]]:
    """Return the reference, those whose own error sets the limit, and ours."""
    checked = {"SGLANG_MUSA_EXT_CHECK": "metadata"}
    paged = {**checked, envs.RAW_PREFILL: "off"}
    reference = Variant("torch_native float32", "torch_native", "float32")
    if device.startswith("cpu"):
        fair: list[Variant] = []
        ours = [Variant("fa3", "fa3", "float32", checked)]
        more = [Variant("fa3, prompts read the cache", "fa3", "float32", paged)]
    else:
        fair = [Variant("torch_native bfloat16", "torch_native", "bfloat16")]
        ours = [Variant("fa3, eager, plans checked", "fa3", "bfloat16", checked)]
        ours += [Variant("fa3, graphs", "fa3", "bfloat16", graphs=True)]
        more = [Variant("fa3, eager, prompts read the cache", "fa3", "bfloat16", paged)]
    return reference, fair, ours if quick else ours + more


def prompts(quick: bool) -> list[list[list[int]]]:
    """Return requests in two phases; the second finds the first's tokens in the prefix cache.

    One is longer than 256 tokens: up to that MATE splits nothing, so that no call has a plan.
    """
    lengths = (5, 70, 300) if quick else (5, 63, 64, 70, 200, 400)
    first = [_prompt(length) for length in lengths]
    return [first, [[*prompt, 9, 8, 7] for prompt in first]]


def _prompt(length: int) -> list[int]:
    return [(7 * position + 31 * length) % (VOCABULARY - 8) + 4 for position in range(length)]


@contextmanager
def booted(variant: Variant, model: Path, device: str) -> Iterator[Engine]:
    """The engine of ``variant``, while it is needed."""
    with engine(variant.arguments(model, device), variant.environ) as process:
        yield process


# --- cases ----------------------------------------------------------------------------------------


@dataclass
class EngineAnswers:
    """The answers of one engine."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    reports: list[dict[str, Any]]


class EngineCases:
    """The engines' answers, as far as they have been asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = Path(options.scratch) / "model"
        self.answers: dict[str, EngineAnswers] = {}

    def cases(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """Every case, in an order in which each finds what it needs."""
        reference, fair, ours = variants(self.options.device, self.options.quick)
        cases = {"a tiny random Llama": self._build}
        for variant in (reference, *fair, *ours):
            cases[f"{variant.name} answers"] = functools.partial(self._ask, variant)
        for variant in ours:
            compare = self._equal if variant.dtype == "float32" else self._close
            cases[f"{variant.name}: served by this package"] = functools.partial(
                self._served, variant
            )
            cases[f"{variant.name}: tokens and log-probabilities"] = functools.partial(
                compare, variant, reference, fair
            )
            cases[f"{variant.name}: one plan a pass"] = functools.partial(self._plans, variant)
            cases[f"{variant.name}: prompts over raw keys"] = functools.partial(self._raw, variant)
        return [
            (name, functools.partial(guarded, PART, name, case)) for name, case in cases.items()
        ]

    def _build(self) -> Outcome:
        device = self.options.device
        sizes = (
            {"layers": 2, "hidden": 128}
            if device.startswith("cpu")
            else {"layers": 4, "hidden": 256}
        )
        build_model(self.model, **sizes)
        return Outcome(PART, "", PASS, "", sizes)

    def _ask(self, variant: Variant) -> Outcome:
        count = 8 if self.options.quick else 24
        with booted(variant, self.model, self.options.device) as served:
            answers = [served.ask(phase, count) for phase in prompts(self.options.quick)]
            reports = served.reports()
        tokens = joined(answers, "tokens")
        self.answers[variant.name] = EngineAnswers(tokens, joined(answers, "logprobs"), reports)
        counts = {"requests": len(tokens), "tokens": sum(map(len, tokens))}
        return Outcome(PART, "", PASS, "", counts)

    def _served(self, variant: Variant) -> Outcome:
        reports = self._answer(variant).reports
        seen = sorted(
            {
                f"{report['backend']} on {report['kernels']} {report['versions']}"
                for report in reports
            }
        )
        right = reports and all(report["backend"] == "MusaFA3Backend" for report in reports)
        return Outcome(
            PART,
            "",
            PASS if right else FAIL,
            "; ".join(seen) or "no backend of this package reported",
        )

    def _equal(self, variant: Variant, reference: Variant, _: Sequence[Variant]) -> Outcome:
        ours, right = self._answer(variant), self._answer(reference)
        error, same = deviation(ours, right)
        total = sum(map(len, right.tokens))
        values = {
            "equal tokens": f"{same} of {total}",
            "log-probability error": error,
            "allowed": FLOAT32_TOLERANCE,
        }
        good = same == total and error <= FLOAT32_TOLERANCE
        return Outcome(
            PART, "", PASS if good else FAIL, "" if good else first_divergence(ours, right), values
        )

    def _close(self, variant: Variant, reference: Variant, fair: Sequence[Variant]) -> Outcome:
        ours, right = self._answer(variant), self._answer(reference)
        own = max(deviation(self._answer(each), right)[0] for each in fair)
        error, same = deviation(ours, right)
        allowed = 2 * own + FLOOR
        values: dict[str, Any] = {
            "log-probability error": error,
            "allowed": allowed,
            "torch_native's own": own,
        }
        values["equal tokens"] = f"{same} of {sum(map(len, right.tokens))}"
        return Outcome(
            PART, "", PASS if error <= allowed else FAIL, first_divergence(ours, right), values
        )

    def _plans(self, variant: Variant) -> Outcome:
        reports = self._answer(variant).reports
        names = ("passes", "planned_calls", "plans", "reuses")
        sums = {name: total(reports, name) for name in names}
        good = sums["plans"] == sums["passes"] > 0
        reason = "" if good else "layers of one geometry need one plan a pass"
        return Outcome(PART, "", PASS if good else FAIL, reason, sums)

    def _raw(self, variant: Variant) -> Outcome:
        """Judge that prompts without a prefix went over raw keys, unless that is off."""
        raw = total(self._answer(variant).reports, "raw_calls")
        wanted = variant.environ.get(envs.RAW_PREFILL) != "off"
        reason = "" if (raw > 0) == wanted else f"expected {'some' if wanted else 'none'}"
        return Outcome(PART, "", FAIL if reason else PASS, reason, {"calls over raw keys": raw})

    def _answer(self, variant: Variant) -> EngineAnswers:
        if variant.name not in self.answers:
            raise Missing(f"{variant.name} gave no answer")
        return self.answers[variant.name]


def joined(replies: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return what an engine's replies hold under ``name``, request after request."""
    return [row for reply in replies for row in reply[name]]


class Missing(LookupError):
    """Another case failed, so that what this one compares is not there."""


def guarded(part: str, name: str, case: Callable[[], Outcome]) -> Outcome:
    """Return the outcome of one case; whatever it raises is an outcome too."""
    started = time.perf_counter()
    try:
        outcome = case()
    except Missing as error:
        outcome = Outcome(part, name, SKIP, str(error))
    except Exception as error:  # noqa: BLE001  # A case that raises is a result like any other.
        outcome = Outcome(part, name, FAIL, f"{type(error).__name__}: {error}"[:4000])
    return Outcome(
        part, name, outcome.status, outcome.reason, outcome.numbers, time.perf_counter() - started
    )


def deviation(ours: EngineAnswers, right: EngineAnswers) -> tuple[float, int]:
    """Return the largest log-probability error, and the number of tokens before answers differ.

    That other token is compared too: where two tokens tie, they are as likely as each other. A
    log-probability that is no number is infinitely wrong.
    """
    error, same = 0.0, 0
    for index, tokens in enumerate(right.tokens):
        equal = _equal_length(ours.tokens[index], tokens)
        same += equal
        pairs = zip(
            ours.logprobs[index][: equal + 1], right.logprobs[index][: equal + 1], strict=True
        )
        differences = [abs(seen - expected) for seen, expected in pairs]
        error = max(
            [
                error,
                *(math.inf if math.isnan(difference) else difference for difference in differences),
            ]
        )
    return error, same


def first_divergence(ours: EngineAnswers, right: EngineAnswers) -> str:
    """Where each request's tokens first differ, with both log-probabilities."""
    lines = []
    for index, tokens in enumerate(right.tokens):
        at = _equal_length(ours.tokens[index], tokens)
        if at < len(tokens):
            sides = (
                f"{side.tokens[index][at]} ({side.logprobs[index][at]:.4f})"
                for side in (ours, right)
            )
            lines.append(f"request {index} at token {at}: " + " for ".join(sides))
    return "; ".join(lines)


def first_difference(ours: EngineAnswers, right: EngineAnswers) -> str:
    """From which token on the log-probabilities of each request differ, however little."""
    lines = []
    for index, sides in enumerate(zip(ours.logprobs, right.logprobs, strict=True)):
        at = _equal_length(*sides)
        if at < len(sides[1]):
            lines.append(
                f"request {index} at token {at}: {sides[0][at]:.6f} for {sides[1][at]:.6f}"
            )
    return "; ".join(lines)


def _equal_length(ours: Sequence[float], right: Sequence[float]) -> int:
    unequal = (index for index, (a, b) in enumerate(zip(ours, right, strict=True)) if a != b)
    return next(unequal, len(right))


def build_model(directory: Path, layers: int, hidden: int) -> None:
    """Write a random Llama to ``directory``, in a process that imports PyTorch and transformers."""
    fields = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        # With the usual 0.02 every token repeats, and a comparison sees nothing.
        "initializer_range": 0.15 * (128 / hidden) ** 0.5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    program = (
        "import json, sys, torch, transformers\n"
        "torch.manual_seed(0)\n"
        "model = "
        "transformers.LlamaForCausalLM(transformers.LlamaConfig(**json.loads(sys.argv[1])))\n"
        "model.float().save_pretrained(sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(fields), str(directory)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise EngineDied(f"transformers could not make a Llama: {done.stderr[-1000:]}")


def run(
    options: argparse.Namespace, done: Collection[str], emit: Callable[[Mapping[str, Any]], None]
) -> None:
    """Run every case; the engines have devices of their own, and this process has none."""
    from sglang_musa_ext.validation.device import run_cases

    run_cases(EngineCases(options).cases(), None, done, emit)
