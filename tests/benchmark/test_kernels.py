"""Calls timed with their plan and without, where no engine is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_musa_ext.benchmark import kernels as bench_kernels
from sglang_musa_ext.kernels.provider import reference_kernels
from sglang_musa_ext.validation.numerics import Shape


def test_a_call_is_timed_with_its_plan_and_without() -> None:
    """Each shape and window has three times of each timer, less what the timer itself takes."""
    plans: list[Any] = []

    def timer(function: Callable[[], Any]) -> float:
        before = len(plans)
        result = function()
        return 1.0 if result is None else 2.0 + 3.0 * (len(plans) - before)

    def plan(**arguments: Any) -> torch.Tensor:
        plans.append(arguments)
        return torch.zeros(4, dtype=torch.int32)

    def call(**arguments: Any) -> torch.Tensor:
        return torch.ones(2)

    kernels = dataclasses.replace(
        reference_kernels(), get_scheduler_metadata=plan, flash_attn_with_kvcache=call
    )
    shapes = {"decode": Shape((1,), (70,)), "verify": Shape((4,), (70,))}
    timers = {"graph": timer, "host": lambda function: 10.0 * timer(function)}
    measured = list(bench_kernels.measure(kernels, torch.device("cpu"), timers, shapes))
    calls = [f"{name}, {window}" for name in shapes for window in bench_kernels.WINDOWS]
    assert [each["call"] for each in measured] == calls
    assert [each["graph"] for each in measured] == [{"without": 1.0, "with": 1.0, "plan": 4.0}] * 4
    assert [each["host"] for each in measured] == [
        {"without": 10.0, "with": 10.0, "plan": 40.0}
    ] * 4
    # One that is reused, and one for each timer.
    assert [each["window_size"] for each in plans[::3]] == [(-1, -1), (512, 0)] * 2
    assert [each["max_seqlen_q"] for each in plans[::6]] == [1, 4]


def test_the_host_is_timed_for_a_call() -> None:
    """A function that keeps the host for half a millisecond takes that long; another, less."""
    timer = bench_kernels.host_timer(torch.device("cpu"))
    assert timer(lambda: time.sleep(5e-4)) >= 500.0 > timer(lambda: None) > 0.0


def test_a_plan_that_changes_the_output_is_not_timed() -> None:
    """A call with its plan must give what it gives without, before either is timed."""

    def call(**arguments: Any) -> torch.Tensor:
        return torch.ones(2) if arguments["scheduler_metadata"] is None else torch.zeros(2)

    kernels = dataclasses.replace(reference_kernels(), flash_attn_with_kvcache=call)
    with pytest.raises(AssertionError, match="another output with its plan"):
        next(
            bench_kernels.measure(
                kernels, torch.device("cpu"), {"graph": lambda _: 1.0}, {"one": Shape((1,), (70,))}
            )
        )
