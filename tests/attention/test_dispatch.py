"""Upstream's kernel names, and who is served under them."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_musa_ext.upstream.names import KERNEL_PARAMETERS
from tests.support.backend import (
    Model,
    attention,
    dispatch,
    upstream,
)
from tests.support.layers import (
    in_threads,
    uniform_layers,
)


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Put recorders under upstream's kernel names, without a dispatcher; return calls by name."""
    calls: dict[str, list[Any]] = {name: [] for name in KERNEL_PARAMETERS}
    for name, seen in calls.items():
        monkeypatch.setattr(
            upstream, name, lambda *args, seen=seen, **kwargs: seen.append((args, kwargs))
        )
    return calls


@pytest.mark.parametrize("name", KERNEL_PARAMETERS)
def test_other_users_of_upstreams_module_are_untouched(
    name: str, originals: dict[str, list[Any]]
) -> None:
    """With no layer of ours running, a kernel name is upstream's function."""
    undo = attention.install_kernel_dispatch()
    getattr(upstream, name)(1, causal=True)
    undo()
    assert originals[name] == [((1,), {"causal": True})]


def test_installing_twice_is_installing_once(originals: dict[str, list[Any]]) -> None:
    """A second installation finds the first; undoing the first alone restores upstream."""
    before = upstream.flash_attn_with_kvcache
    undo = attention.install_kernel_dispatch()
    installed = upstream.flash_attn_with_kvcache
    again = attention.install_kernel_dispatch()
    assert upstream.flash_attn_with_kvcache is installed
    again()
    assert upstream.flash_attn_with_kvcache is installed
    undo()
    assert upstream.flash_attn_with_kvcache is before


def test_another_thread_reaches_upstream_while_a_layer_runs(
    originals: dict[str, list[Any]],
) -> None:
    """The running backend is known per thread."""
    undo = attention.install_kernel_dispatch()
    dispatch.RUNNING.stack.append(Model(uniform_layers(1)).backend())
    try:
        in_threads([lambda: upstream.flash_attn_varlen_func(1)])
    finally:
        dispatch.RUNNING.stack.pop()
        undo()
    assert originals["flash_attn_varlen_func"] == [((1,), {})]
