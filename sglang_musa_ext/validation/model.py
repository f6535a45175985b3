"""The operator's own model, served with this package, beside another attention backend of SGLang's.

The other backend is SGLang's own ``fa3`` on an NVIDIA GPU, ``triton`` on a MUSA device and
``torch_native`` on a CPU. It answers twice, all requests together and one at a time: what the two
differ by is what batches decide of the last bits, and twice that is allowed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_musa_ext.engines.process import Engine, engine
from sglang_musa_ext.validation.engine import (
    FLOAT32_TOLERANCE,
    EngineAnswers,
    Missing,
    deviation,
    first_divergence,
    guarded,
    prompts,
)
from sglang_musa_ext.validation.report import FAIL, PASS, SKIP, Outcome, total

PART = "model"
TOKENS = 16
"""Tokens that a request is continued by."""
ARGUMENTS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "sampling_backend": "pytorch",
    "page_size": 64,
    "max_total_tokens": 16384,
    "max_running_requests": 8,
    "chunked_prefill_size": 256,
    "log_level": "info",
    "prefill_graphs": False,
}


@dataclass(frozen=True)
class ComparedBackend:
    """The backend to compare with on one kind of device."""

    backend: str
    environ: Mapping[str, str]
    allowed: float
    """The error that log-probabilities may have in any case."""
    dtype: str = "auto"
    memory: float = 0.8
    """``mem_fraction_static`` of an engine; they are up one after another."""


COMPARED_BACKENDS: Mapping[str, ComparedBackend] = {
    # Another number of splits changes the last bits, as it does in the benchmark.
    "cuda": ComparedBackend("fa3", {"SGLANG_MUSA_EXT": "off"}, 2.0**-3),
    # Kernels of another kind round otherwise in every layer.
    "musa": ComparedBackend("triton", {"SGLANG_MUSA_EXT": "off"}, 2.0**-1),
    "cpu": ComparedBackend("torch_native", {}, FLOAT32_TOLERANCE, "float32", 0.3),
}
"""By kind of device."""


def our_environments(kind: str) -> dict[str, dict[str, str]]:
    """Return the environments in which this package serves the model, by the name of the case."""
    checked = {"SGLANG_MUSA_EXT_CHECK": "metadata"}
    if kind == "cpu":
        return {"plans checked": checked}
    return {"graphs": {}, "eager, plans checked": checked}


class OwnModel:
    """The cases of one model, and the answers that they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.kind = options.device.partition(":")[0]
        self.comparison = COMPARED_BACKENDS[self.kind]
        self.together: EngineAnswers | None = None
        self.apart: EngineAnswers | None = None

    def cases(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """Return every case; those of this package need the answers of the first."""
        named: dict[str, Callable[[], Outcome]] = {
            f"SGLang's {self.comparison.backend} answers": self._reference
        }
        for name, environ in our_environments(self.kind).items():
            named[f"fa3, {name}: served, and the same answers"] = functools.partial(
                self._ours, environ, name == "graphs"
            )
        return [
            (name, functools.partial(guarded, PART, name, case)) for name, case in named.items()
        ]

    def _engine(self, backend: str, environ: Mapping[str, str], *, graphs: bool) -> Any:
        arguments = {
            **ARGUMENTS,
            "model_path": str(Path(self.options.model).resolve())
            if Path(self.options.model).exists()
            else self.options.model,
            "attention_backend": backend,
            "device": self.kind,
            "dtype": self.comparison.dtype,
            "mem_fraction_static": self.comparison.memory,
            "graphs": [8] if graphs else [],
        }
        return engine(arguments, environ)

    def _reference(self) -> Outcome:
        comparison = self.comparison
        with self._engine(comparison.backend, comparison.environ, graphs=False) as served:
            together = answered(served, self.options.quick)
            served.flush()
            self.apart = answered(served, self.options.quick, apart=True)
        self.together = together
        own, _ = deviation(self.apart, together)
        values = {"requests": len(together.tokens), "differ by": own}
        return Outcome(PART, "", PASS, "", values)

    def _ours(self, environ: Mapping[str, str], graphs: bool) -> Outcome:
        if self.together is None or self.apart is None:
            raise Missing(f"SGLang's {self.comparison.backend} gave no answer to compare with")
        with self._engine("fa3", environ, graphs=graphs) as served:
            ours = answered(served, self.options.quick)
            reports = served.reports()
        own, _ = deviation(self.apart, self.together)
        return judged(ours, self.together, max(2 * own, self.comparison.allowed), reports)


def answered(served: Engine, quick: bool, *, apart: bool = False) -> EngineAnswers:
    """Return the greedy continuations of all requests, asked together or one at a time."""
    answer = EngineAnswers([], [], [])
    for phase in prompts(quick):
        for batch in [[prompt] for prompt in phase] if apart else [phase]:
            reply = served.ask(batch, TOKENS)
            answer.tokens.extend(reply["tokens"])
            answer.logprobs.extend(reply["logprobs"])
    return answer


def judged(
    ours: EngineAnswers, right: EngineAnswers, allowed: float, reports: list[dict[str, Any]]
) -> Outcome:
    """Return the outcome for our answers: who served, and how far they are from the right ones."""
    error, same = deviation(ours, right)
    seen = sorted({f"{report['backend']} on {report['kernels']}" for report in reports})

    values = {
        "log-probability error": error,
        "allowed": allowed,
        "equal tokens": f"{same} of {sum(map(len, right.tokens))}",
        "plans": total(reports, "plans"),
        "reuses": total(reports, "reuses"),
    }
    if not reports or any(report["backend"] != "MusaFA3Backend" for report in reports):
        served_by = "; ".join(seen) or "no backend of this package"
        return Outcome(PART, "", FAIL, f"served by {served_by}, expected MusaFA3Backend", values)
    status = PASS if error <= allowed else FAIL
    return Outcome(PART, "", status, first_divergence(ours, right), values)


def run(
    options: argparse.Namespace, done: Collection[str], emit: Callable[[Mapping[str, Any]], None]
) -> None:
    """Run every case, or say that no model was named."""
    from sglang_musa_ext.validation.device import run_cases

    if not options.model:
        why = "no model was named: --model PATH"
        cases = [(PART, functools.partial(Outcome, PART, PART, SKIP, why))]
        run_cases(cases, None, done, emit)
        return
    run_cases(OwnModel(options).cases(), None, done, emit)
