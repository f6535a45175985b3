"""The cost of a plan in a graph: times of FA3 calls with and without one, and of plans alone.

``command.py`` runs it in a process of its own. Calls stand between other kernels, as in a model:
there the device hides a part of what a call launches before its main kernel. Without a graph it is
the host's time that counts, so that of the same calls is measured too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sglang_musa_ext import policy
from sglang_musa_ext.engines.devices import import_vendor_modules
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import FA3Kernels, select_kernels
from sglang_musa_ext.validation.graphs import DeviceGraphs
from sglang_musa_ext.validation.numerics import Batch, Shape

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
    kernels: FA3Kernels,
    device: torch.device,
    timers: Mapping[str, Timer],
    shapes: Mapping[str, Shape],
) -> Iterator[dict[str, Any]]:
    """Return each shape's times, with a window and without, in µs a call, by timer.

    Raises:
        AssertionError: the output with a plan is not the output without.
    """
    for name, shape in shapes.items():
        batch = Batch(shape, torch.bfloat16, device)
        for window, size in WINDOWS.items():
            options: dict[str, Any] = {"causal": True, "window_size": size}
            arguments = batch.arguments(**options)
            lengths = {key: arguments[key] for key in ("cache_seqlens", "cu_seqlens_q")}
            yield {
                "call": f"{name}, {window}",
                **_times(kernels, batch, arguments, lengths, options, timers),
            }


def _times(
    kernels: FA3Kernels, batch: Batch, arguments: dict[str, Any], lengths: dict[str, Any],
    options: dict[str, Any],
    timers: Mapping[str, Timer],
) -> dict[str, dict[str, float]]:  # fmt: skip
    def plan() -> torch.Tensor | None:
        return batch.plan(kernels, lengths, **options)

    def call(metadata: torch.Tensor | None) -> Any:
        return kernels.flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata)

    ready = plan()
    assert torch.equal(call(ready), call(None)), (
        "a call gives another output with its plan than without"
    )
    functions = {"without": lambda: call(None), "with": lambda: call(ready), "plan": plan}
    times = {}
    for where, timer in timers.items():
        nothing = timer(lambda: None)
        times[where] = {what: timer(function) - nothing for what, function in functions.items()}
    return times


def graph_timer(device: torch.device) -> Timer:
    """Return a timer of a function captured many times between other kernels: median µs."""
    module: Any = torch.get_device_module(device)
    filler = torch.randn(256, 256, device=device, dtype=torch.bfloat16)

    def timer(function: Callable[[], Any]) -> float:
        def mixed() -> None:
            for _ in range(CALLS):
                torch.mm(filler, filler)
                function()

        graph, _ = DeviceGraphs(device).captured(mixed)
        times: list[float] = []
        for _ in range(REPLAYS):
            start, end = (module.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            module.synchronize()
            times.append(1e3 * start.elapsed_time(end) / CALLS)
        return statistics.median(times)

    return timer


def host_timer(device: torch.device) -> Timer:
    """Return a timer of the host's launch of a function on an idle device: median µs."""
    synchronize = torch.get_device_module(device).synchronize

    def timer(function: Callable[[], Any]) -> float:
        times: list[float] = []
        for _ in range(REPLAYS):
            synchronize()
            began = time.perf_counter()
            for _ in range(CALLS):
                function()
            times.append(1e6 * (time.perf_counter() - began) / CALLS)
        return statistics.median(times)

    return timer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on the first device of the kind that ``arguments`` name; print a line a call."""
    [kind] = sys.argv[1:] if arguments is None else arguments
    import_vendor_modules()
    device = torch.device(kind, 0)
    torch.get_device_module(device).set_device(device)
    [name] = [name for name, place in policy.DEVICE_OF_KERNELS.items() if place == kind]
    kernels = select_kernels(Settings(kernels=name), device)
    timers = {"graph": graph_timer(device), "host": host_timer(device)}
    with torch.inference_mode():
        for row in measure(kernels, device, timers, SHAPES):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
