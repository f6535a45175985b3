"""Prometheus counters of the backends of a process, with ``--enable-metrics`` and without."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.attention import metrics
from tests.support.backend import Model, attention_layer, environment

prometheus_client = pytest.importorskip("prometheus_client")


@pytest.fixture(autouse=True)
def own_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registers metrics in a registry of the test alone, and reads them only when asked."""
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge"):
        original = getattr(prometheus_client, kind)

        def make(*args: Any, original: Any = original, **options: Any) -> Any:
            return original(*args, registry=registry, **options)

        monkeypatch.setattr(prometheus_client, kind, make)
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(metrics, "SECONDS", 3600.0)
    metrics.export.cache_clear()
    yield
    metrics.export.cache_clear()


def sample(name: str, **labels: str) -> float | None:
    value: float | None = prometheus_client.REGISTRY.get_sample_value(metrics.PREFIX + name, labels)
    return value


def served(passes: int, **arguments: Any) -> Any:
    """A backend of two layers that has decoded for that many passes."""
    model = Model([attention_layer(0), attention_layer(1)], arguments=arguments)
    backend, requests = model.backend(), model.requests(70)
    for _ in range(passes):
        model.run_pass(backend, model.decode(requests))
    return backend


def test_calls_and_plans_are_counted_once() -> None:
    """Three passes of two layers: six calls, three plans, three reuses, however often read."""
    backend = served(3, enable_metrics=True)
    for _ in range(2):
        metrics.export().update()
    assert [sample(f"{name}_total") for name in ("calls", "plans", "reuses", "passes")] == [
        6, 3, 3, 3,
    ]  # fmt: skip
    assert backend.musa_fa3_report()["statistics"]["calls"] == 6


def test_backends_add_up_and_what_is_gone_stays_counted() -> None:
    """Counters never go down: a second backend adds its calls, the first one may have ended."""
    first = served(1, enable_metrics=True)
    metrics.export().update()
    del first
    second = served(2, enable_metrics=True)
    metrics.export().update()
    assert sample("calls_total") == 2 + 4
    assert second is not None


def test_compared_outputs_are_counted_by_mode() -> None:
    """With ``SGLANG_MUSA_EXT_CHECK=output:1`` every call of a decode is compared, none is wrong."""
    with environment(**{envs.CHECK: "output:1"}):
        backend = served(2, enable_metrics=True)
    metrics.export().update()
    assert sample("outputs_compared_total", mode="decode") == 4
    assert sample("outputs_wrong_total", mode="decode") == 0
    error = sample("outputs_largest_error", mode="decode")
    assert error is not None
    assert 0 <= error < 1e-4
    assert backend is not None


def test_nothing_is_there_without_metrics() -> None:
    """No export, no thread: the option costs those nothing who do not give it."""
    before = threading.active_count()
    served(1)
    assert metrics.export.cache_info().currsize == 0
    assert threading.active_count() == before


def test_a_thread_reads_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export of a process updates without being asked."""
    monkeypatch.setattr(metrics, "SECONDS", 0.01)
    updated = threading.Event()
    monkeypatch.setattr(metrics.MetricsExport, "update", lambda self: updated.set())
    served(1, enable_metrics=True)
    assert updated.wait(10)
    monkeypatch.setattr(metrics, "SECONDS", 3600.0)
