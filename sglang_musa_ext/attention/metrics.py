"""Counters of this package among SGLang's Prometheus metrics, where ``--enable-metrics`` is given.

They are read off the backends by a thread that wakes every few seconds: a call of a kernel is
counted as it is without metrics. ``prometheus_client`` adds up the processes of a server, as it
does for SGLang's own counters.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from typing import Any

SECONDS = 5.0
"""Between two readings."""
PREFIX = "sglang_musa_ext:"
COUNTERS = {
    "passes": "Forward passes in which at least one plan was computed.",
    "calls": "Attention kernel calls that were not replayed by a graph.",
    "raw_calls": "Calls that were served from a layer's own keys.",
    "unsplit_calls": "Calls without a plan, because the kernels would not split them.",
    "plans": "Plans computed.",
    "reuses": "Calls served by a plan computed earlier in the same pass.",
}
"""Of :class:`~sglang_musa_ext.attention.plans.PlanStatistics`, and what Prometheus says of them."""
OUTPUT_COUNTERS = {
    "compared": "Outputs compared with the reference kernels (SGLANG_MUSA_EXT_CHECK=output:SHARE).",
    "wrong": "Compared outputs beyond the tolerance of their dtype.",
}


class MetricsExport:
    """Prometheus metrics of the backends of this process."""

    def __init__(self) -> None:
        """Register the metrics with ``prometheus_client``, which SGLang needs for its own."""
        # With --enable-metrics SGLang has said where its processes write before it is imported.
        from prometheus_client import Counter, Gauge

        self._counters = {name: Counter(PREFIX + name, text) for name, text in COUNTERS.items()}
        self._outputs = {
            name: Counter(f"{PREFIX}outputs_{name}", text, ["mode"])
            for name, text in OUTPUT_COUNTERS.items()
        }
        self._largest_error = Gauge(
            f"{PREFIX}outputs_largest_error",
            "The largest absolute difference of a compared output from the reference.",
            ["mode"],
            multiprocess_mode="max",
        )
        self._backends: list[weakref.ref[Any]] = []
        self._seen: dict[tuple[int, str, str], float] = {}

    def add(self, backend: Any) -> None:
        """Have the metrics count what ``backend`` does from now on."""
        self._backends.append(weakref.ref(backend))

    def update(self) -> None:
        """Read all backends, and add what is new."""
        for number, reference in enumerate(tuple(self._backends)):
            backend = reference()
            if backend is not None:
                self._read(number, backend.musa_fa3_report())

    def start(self) -> None:
        """Update now and then, for as long as the process lives."""
        threading.Thread(target=self._run, name="sglang_musa_ext metrics", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(SECONDS):
            # A dictionary of counts may grow while it is read; the next reading has all of it.
            with contextlib.suppress(RuntimeError):
                self.update()

    def _read(self, number: int, report: dict[str, Any]) -> None:
        for name, counter in self._counters.items():
            counter.inc(self._new(number, name, "", report["statistics"][name]))
        modes = (report["output_check"] or {"modes": {}})["modes"]
        for mode, errors in modes.items():
            for name, labelled in self._outputs.items():
                labelled.labels(mode).inc(self._new(number, name, mode, errors[name]))
            self._largest_error.labels(mode).set(errors["largest_error"])

    def _new(self, number: int, name: str, mode: str, value: float) -> float:
        """Return by how much a count of a backend has grown since it was read last."""
        before = self._seen.get((number, name, mode), 0)
        self._seen[number, name, mode] = value
        return value - before


@functools.cache
def export() -> MetricsExport:
    """Return the export of this process, running."""
    made = MetricsExport()
    made.start()
    return made
