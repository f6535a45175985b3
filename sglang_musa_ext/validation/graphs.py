"""Plans and kernels in a device's graphs: captured once, replayed with other lengths.

That is what a captured decode step of the backend is: the plan is computed in the graph from
lengths that the next replay changes, and every layer of one geometry uses it. The served model of
the engine part runs the backend itself under graphs.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sglang_musa_ext.kernels.provider import UnsupportedByKernels, UnsupportedKernelArgument
from sglang_musa_ext.validation.device import Emit, kernels_for, run_cases
from sglang_musa_ext.validation.numerics import (
    CAUSAL,
    SOFTCAP,
    WINDOW,
    Batch,
    Comparison,
    Latent,
    Setting,
    Shape,
    Slots,
    compare,
    dtypes,
    float64_options,
    judged,
)
from sglang_musa_ext.validation.report import FAIL, SKIP, Outcome

Tensor = torch.Tensor
PART = "graphs"


class Graphs(Protocol):
    """A device's way to capture graphs."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture ``function``; return its replay, and what it returned in the capture."""


class DeviceGraphs:
    """PyTorch's graphs of a device, whose module names them as ``torch.cuda`` does."""

    def __init__(self, device: torch.device) -> None:
        self.module: Any = torch.get_device_module(device)
        self.pool: Any = None

    @staticmethod
    def missing(device: torch.device) -> str:
        """Return why ``device`` captures no graphs; empty if it does."""
        if device.type == "cpu":
            return "a CPU captures no graphs"
        names = ("CUDAGraph", "graph", "Stream", "stream", "synchronize", "current_stream")
        lacking = [name for name in names if not hasattr(_names(device), name)]
        return (
            f"torch.{device.type} is without {', '.join(lacking)}: not available" if lacking else ""
        )

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Warm up twice on a stream of its own, then capture; graphs share a pool, as in SGLang.

        Returns the graph, and what ``function`` returned while it was captured.
        """
        names = _names_of(self.module)
        side = names.Stream()
        side.wait_stream(names.current_stream())
        with names.stream(side):
            for _ in range(2):
                function()
        names.current_stream().wait_stream(side)
        names.synchronize()
        graph = names.CUDAGraph()
        with names.graph(graph, pool=self.pool):
            result = function()
        self.pool = graph.pool()
        return graph, result

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a replay of ``function``'s graph that waits, and what the capture returned."""
        graph, result = self.captured(function)

        def replay() -> None:
            graph.replay()
            _names_of(self.module).synchronize()

        return replay, result


def _names(device: torch.device) -> Any:
    return _names_of(torch.get_device_module(device))


class _Alias:
    """A device's module under the names of ``torch.cuda``: ``torch.musa`` may say ``MUSAGraph``."""

    def __init__(self, module: Any, graph: Any) -> None:
        self._module, self.CUDAGraph = module, graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _names_of(module: Any) -> Any:
    if hasattr(module, "CUDAGraph") or not hasattr(module, "MUSAGraph"):
        return module
    return _Alias(module, module.MUSAGraph)


# --- cases ----------------------------------------------------------------------------------------


@dataclass
class CapturedLayer:
    """Static buffers of one captured layer, and the options of its calls."""

    batch: Batch
    arguments: dict[str, Any]
    options: dict[str, Any]

    def fill(self, batch: Batch) -> None:
        """Put another batch of the same size into the buffers that the graph reads."""
        fresh = batch.arguments(**self.options)
        for name, value in fresh.items():
            if isinstance(value, Tensor):
                self.arguments[name].copy_(value)
        self.batch = batch


Lengths = tuple[tuple[int, ...], ...]
LENGTHS: Lengths = ((1, 1, 1, 1), (5000, 3, 64, 700), (10, 8000, 65, 1), (8192, 1, 1, 8192))
"""Captured with the first, as SGLang captures with lengths of 1; then replayed with each."""


def _layer(
    kind: type[Batch], shape: Shape, setting: Setting, options: dict[str, Any], seed: int
) -> CapturedLayer:
    batch = kind(shape, setting.dtype, setting.device, seed)
    return CapturedLayer(batch, batch.arguments(**options), options)


def replayed(
    setting: Setting,
    graphs: Graphs,
    shape: Shape,
    kinds: list[dict[str, Any]],
    latent: bool,
    lengths: Lengths,
) -> list[Comparison]:
    """Capture layers, two of each of ``kinds``, from large batches to small; replay and compare."""
    comparisons: list[Comparison] = []
    shape = replace(shape, keys=lengths[0], capacity=max(map(max, lengths)))
    captured = {
        size: _Captured(setting, graphs, shape, kinds, size, latent)
        for size in (len(shape.rows), 1)
    }
    for replay in lengths:
        for size, graph in captured.items():
            comparisons += graph.replay(replay[:size])
    return comparisons


class _Captured:
    """The graph of one batch size."""

    def __init__(
        self,
        setting: Setting,
        graphs: Graphs,
        shape: Shape,
        kinds: list[dict[str, Any]],
        size: int,
        latent: bool,
    ) -> None:
        self.setting, self.kind = setting, Latent if latent else Batch
        self.shape = replace(shape, rows=shape.rows[:size])
        first = self._lengths(shape.keys[:size])
        self.layers = [
            _layer(self.kind, first, setting, options, seed)
            for seed, options in enumerate([*kinds, *kinds])
        ]
        self.slots = Slots(setting.kernels)
        # Layers share what says how long the requests are, as in SGLang, where they share a batch.
        for name in ("cache_seqlens", "cu_seqlens_q"):
            for layer in self.layers:
                layer.arguments[name] = self.layers[0].arguments[name]
        self._replay, self.outputs = graphs.capture(self._run)

    def _lengths(self, keys: tuple[int, ...]) -> Shape:
        rows = self.shape.rows[0]
        return replace(self.shape, keys=tuple(max(length, rows) for length in keys))

    def _run(self) -> list[Tensor]:
        """Every layer once; the first of each kind computes the plan of its kind."""
        plans: dict[int, Any] = {}
        outputs = []
        kinds = len(self.layers) // 2
        for index, layer in enumerate(self.layers):
            kind, again = index % kinds, index >= kinds
            if isinstance(layer.batch, Latent):
                metadata = self.slots.metadata(
                    layer.batch, kind, reuse=again, lengths=self._static(layer), **layer.options
                )
            else:
                if not again:
                    plans[kind] = layer.batch.plan(
                        self.setting.kernels, self._static(layer), **layer.options
                    )
                metadata = plans[kind]
            outputs.append(
                self.setting.kernels.flash_attn_with_kvcache(
                    **layer.arguments, scheduler_metadata=metadata
                )
            )
        return outputs

    @staticmethod
    def _static(layer: CapturedLayer) -> dict[str, Any]:
        return {name: layer.arguments[name] for name in ("cache_seqlens", "cu_seqlens_q")}

    def replay(self, lengths: tuple[int, ...]) -> list[Comparison]:
        """Replay with these lengths, and compare every layer."""
        shape = self._lengths(lengths)
        for seed, layer in enumerate(self.layers):
            layer.fill(self.kind(shape, self.setting.dtype, self.setting.device, 100 + seed))
        self._replay()
        comparisons = []
        for layer, output in zip(self.layers, self.outputs, strict=True):
            options = float64_options(layer.batch, layer.options)
            # The next replay writes there again.
            comparisons += compare(
                output.clone(), layer.batch.sequences, self.setting.dtype, **options
            )
        return comparisons


SHAPE = Shape((1, 1, 1, 1), (1, 1, 1, 1))
CASES: dict[str, tuple[Shape, list[dict[str, Any]], bool]] = {
    "decode": (SHAPE, [CAUSAL], False),
    "decode, window and full layers": (SHAPE, [WINDOW, CAUSAL], False),
    "decode, softcap": (SHAPE, [SOFTCAP], False),
    "verify of 4": (replace(SHAPE, rows=(4, 4, 4, 4)), [CAUSAL], False),
    "MLA decode": (replace(SHAPE, heads=16), [CAUSAL], True),
    "MLA verify of 4": (replace(SHAPE, rows=(4, 4, 4, 4), heads=16), [CAUSAL], True),
}


def run_case(name: str, setting: Setting, graphs: Graphs, lengths: Lengths = LENGTHS) -> Outcome:
    """Return the outcome of a case replayed with these lengths; an error is an outcome too."""
    started = time.perf_counter()
    shape, kinds, latent = CASES[name]
    try:
        comparisons = replayed(setting, graphs, shape, kinds, latent, lengths)
    except (UnsupportedKernelArgument, UnsupportedByKernels) as error:
        return Outcome(PART, name, SKIP, f"refused by name: {error}")
    except Exception as error:  # noqa: BLE001  # A case that raises is a result like any other.
        return Outcome(PART, name, FAIL, f"{type(error).__name__}: {error}"[:2000])
    return judged(PART, name, comparisons, time.perf_counter() - started)


def run(options: argparse.Namespace, done: Collection[str], emit: Emit) -> None:
    """Run every case under the device's own graphs, or say why there are none."""
    kernels, device = kernels_for(options)
    if missing := DeviceGraphs.missing(device):
        run_cases(
            [(name, functools.partial(Outcome, PART, name, SKIP, missing)) for name in CASES],
            None,
            done,
            emit,
        )
        return
    setting = Setting(kernels, device, dtypes(kernels)[0])
    cases = [
        (name, functools.partial(run_case, name, setting, DeviceGraphs(device))) for name in CASES
    ]
    run_cases(cases, device, done, emit)
