"""What a plan costs in a graph: the time of an FA3 call with its plan and without, and of a plan alone.

``bench.py`` runs it in a process of its own. Calls stand between other kernels, as in a model: there the device hides
a part of what a call launches before its main kernel.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from validate_graphs import DeviceGraphs
from validate_numerics import Batch, Shape

from sglang_musa_ext.kernels import FA3Kernels, hopper_kernels

CALLS, REPLAYS = 32, 40
SHAPES = {
    "decode, head dim 64, batch 1, 1024 keys": Shape((1,), (1024,), 32, 4, 64, 64),
    "decode, head dim 128, batch 1, 1024 keys": Shape((1,), (1024,), 16, 2),
    "decode, head dim 128, batch 1, 8192 keys": Shape((1,), (8192,), 16, 2),
    "decode, head dim 128, batch 8, 1024 keys": Shape((1,) * 8, (1024,) * 8, 16, 2),
    "decode, head dim 128, batch 32, 1024 keys": Shape((1,) * 32, (1024,) * 32, 16, 2),
    "decode, head dim 256, batch 1, 1024 keys": Shape((1,), (1024,), 8, 4, 256, 256),
    "verify of 4, head dim 128, batch 1, 1024 keys": Shape((4,), (1024,), 16, 2),
    "verify of 4, head dim 128, batch 8, 1024 keys": Shape((4,) * 8, (1024,) * 8, 16, 2),
    "prefill of 512, head dim 128": Shape((512,), (512,), 16, 2),
}
WINDOWS = {"full": (-1, -1), "window of 512": (512, 0)}
Timer = Callable[[Callable[[], Any]], float]


def measure(
    kernels: FA3Kernels, device: torch.device, timer: Timer, shapes: dict[str, Shape]
) -> Iterator[dict[str, Any]]:
    """The times of each shape, with a window and without, in microseconds a call.

    Raises:
        AssertionError: the output with a plan is not the output without.
    """
    for name, shape in shapes.items():
        batch = Batch(shape, torch.bfloat16, device)
        for window, size in WINDOWS.items():
            options: dict[str, Any] = {"causal": True, "window_size": size}
            arguments = batch.arguments(**options)
            lengths = {key: arguments[key] for key in ("cache_seqlens", "cu_seqlens_q")}
            yield {"call": f"{name}, {window}", **_times(kernels, batch, arguments, lengths, options, timer)}


def _times(
    kernels: FA3Kernels, batch: Batch, arguments: dict[str, Any], lengths: dict[str, Any], options: dict[str, Any],
    timer: Timer,
) -> dict[str, float]:  # fmt: skip
    def plan() -> torch.Tensor:
        return batch.plan(kernels, lengths, **options)

    def call(metadata: torch.Tensor | None) -> Any:
        return kernels.flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata)

    ready = plan()
    assert torch.equal(call(ready), call(None)), "a call gives another output with its plan than without"
    nothing = timer(lambda: None)
    found = {"without": timer(lambda: call(None)), "with": timer(lambda: call(ready)), "plan": timer(plan)}
    return {what: time - nothing for what, time in found.items()}


def graph_timer(device: torch.device) -> Timer:
    """Microseconds of a function that is captured many times, between other kernels: the median of replays."""
    cuda: Any = torch.cuda
    filler = torch.randn(256, 256, device=device, dtype=torch.bfloat16)

    def timer(function: Callable[[], Any]) -> float:
        def mixed() -> None:
            for _ in range(CALLS):
                torch.mm(filler, filler)
                function()

        graph, _ = DeviceGraphs(device).captured(mixed)
        times: list[float] = []
        for _ in range(REPLAYS):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            cuda.synchronize()
            times.append(1e3 * start.elapsed_time(end) / CALLS)
        return statistics.median(times)

    return timer


def main() -> None:
    """Measure on the first GPU, and write the results to the standard output, a line each."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    with torch.inference_mode():
        for found in measure(hopper_kernels(device), device, graph_timer(device), SHAPES):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
