"""Time a served random Llama's decode step, with plans reused and with one for every layer.

Both engines are up at the same time, and take turns. They must give the same tokens before anything
is timed. A step's time is taken from the first streamed token to the last, so that prefill does not
count.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_musa_ext.engines.process import FORCE_UPDATE, Engine
from sglang_musa_ext.validation.engine import (
    VOCABULARY,
    Missing,
    Variant,
    booted,
    build_model,
    guarded,
)
from sglang_musa_ext.validation.report import FAIL, PASS, Outcome, total

PART = "bench"
PROMPT = 200


class Bench:
    """Two engines, and what is asked of them in turn."""

    def __init__(self, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.options, self._stack = options, stack
        self.on_device = not options.device.startswith("cpu")
        self.steps = 64 if self.on_device else 24
        self.rounds = 3 if options.quick else 6
        self.engines: tuple[Engine, Engine] | None = None

    def cases(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """First the engines and their equality, then the times."""
        cases: dict[str, Callable[[], Outcome]] = {
            "equal tokens with and without reuse": self._verify
        }
        for batch in (1, 4):
            cases[f"decode step at batch {batch}, reuse / no reuse"] = functools.partial(
                self._time, batch
            )
        return [
            (name, functools.partial(guarded, PART, name, case)) for name, case in cases.items()
        ]

    def _verify(self) -> Outcome:
        model = Path(self.options.scratch) / "bench-model"
        sizes = {"layers": 16, "hidden": 512} if self.on_device else {"layers": 4, "hidden": 128}
        build_model(model, **sizes)
        dtype = "bfloat16" if self.on_device else "float32"
        reuse = Variant("reuse", "fa3", dtype, graphs=self.on_device)
        each = replace(reuse, name="no reuse", environ={FORCE_UPDATE: "1"})
        engines = [
            self._stack.enter_context(booted(variant, model, self.options.device))
            for variant in (reuse, each)
        ]
        answers = [engine.ask(_prompts(4), self.steps) for engine in engines]
        reused = [total(engine.reports(), "reuses") for engine in engines]
        values = {"layers": sizes["layers"], "reuses": reused[0], "reuses without": reused[1]}
        if answers[0]["tokens"] != answers[1]["tokens"]:
            return Outcome(
                PART, "", FAIL, "the two give different tokens, so nothing is timed", values
            )
        if not reused[0] or reused[1]:
            return Outcome(
                PART, "", FAIL, "plans were not reused as asked, so nothing is timed", values
            )
        self.engines = (engines[0], engines[1])
        return Outcome(PART, "", PASS, "", values)

    def _time(self, batch: int) -> Outcome:
        if self.engines is None:
            raise Missing("there are no two engines that agree")
        reuse, each = self._rounds(batch)
        ratios = [a / b for a, b in zip(reuse, each, strict=True)]
        values = {
            "ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios),
            "ms with reuse": 1e3 * statistics.median(reuse),
            "ms without": 1e3 * statistics.median(each),
            "rounds": self.rounds,
        }  # fmt: skip
        return Outcome(PART, "", PASS, "", values)

    def _rounds(self, batch: int) -> tuple[list[float], list[float]]:
        """Return seconds a step of each engine, by round; which engine begins alternates."""
        assert self.engines is not None
        times: tuple[list[float], list[float]] = ([], [])
        for index in range(self.rounds + 1):
            for which in (0, 1) if index % 2 else (1, 0):
                seconds = self.engines[which].step_seconds(_prompts(batch), self.steps)
                if index:  # The first round warms up.
                    times[which].append(seconds)
        return times


def _prompts(batch: int) -> list[list[int]]:
    return [_prompt(row) for row in range(batch)]


def _prompt(row: int) -> list[int]:
    return [(5 * position + 17 * row) % (VOCABULARY - 8) + 4 for position in range(PROMPT)]


def run(
    options: argparse.Namespace, done: Collection[str], emit: Callable[[Mapping[str, Any]], None]
) -> None:
    """Run every case, and end the engines."""
    from sglang_musa_ext.validation.device import run_cases

    with contextlib.ExitStack() as stack:
        run_cases(Bench(options, stack).cases(), None, done, emit)
