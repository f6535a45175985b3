"""The simulated GPU against a CPU: fresh memory, strictness, graphs, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.engine import EngineServer


def torch_musa() -> Any:
    """Return ``torch.musa``."""
    import torch

    return torch.get_device_module("musa")


# Each of these runs in a process on the simulated GPU; a failure is raised here again.


def fresh_memory_is_not_a_number() -> None:
    """Memory that nobody wrote shows, and so does that of a graph when it is replayed."""
    import torch

    assert torch.empty(8, device="musa").isnan().all()
    graph = torch_musa().MUSAGraph()
    with torch_musa().graph(graph):
        unwritten = torch.empty(4, device="musa")
    unwritten.fill_(1.0)
    graph.replay()
    assert unwritten.isnan().all()


def host_and_device_do_not_mix() -> None:
    """An operator takes tensors of one device, single numbers aside."""
    import torch

    on_device = torch.ones(3, device="musa")
    assert (on_device * torch.tensor(2.0)).sum().item() == 6.0
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([on_device, torch.ones(3)])
    with pytest.raises(RuntimeError, match="same device"):
        on_device + torch.ones(3, device="musa:1")


def graphs_do_their_work_again() -> None:
    """A replay reads new contents of inputs, through views, in-place work and own results."""
    import torch

    given = torch.zeros(4, device="musa")
    graph = torch_musa().MUSAGraph()
    with torch_musa().graph(graph):
        doubled = given * 2
        doubled.view(2, 2)[1] += 1
        place = doubled.argmax()
    given.copy_(torch.tensor([1.0, 5.0, 2.0, 0.0]))
    graph.replay()
    assert doubled.tolist() == [2.0, 10.0, 5.0, 1.0]
    assert int(place) == 1


def a_capture_waits_for_nothing() -> None:
    """The host cannot ask for a value while a graph is captured."""
    import torch

    given = torch.ones(4, device="musa")
    for wait in (lambda: given.sum().item(), given.nonzero, given.cpu):
        with torch_musa().graph(torch_musa().MUSAGraph()):
            assert torch_musa().is_current_stream_capturing()
            with pytest.raises(RuntimeError, match="capturing"):
                wait()
    assert not torch_musa().is_current_stream_capturing()


def kernels_in_python_are_captured() -> None:
    """A Triton launch runs again at a replay, as operators do."""
    import torch

    from tests.simulated_musa.triton_kernels import add_one

    total = torch.zeros(4, device="musa")
    graph = torch_musa().MUSAGraph()
    with torch_musa().graph(graph):
        add_one[(1,)](total, 4)
    graph.replay()
    graph.replay()
    assert total.tolist() == [3.0] * 4


def triton_multiplies_in_every_type() -> None:
    """Triton's interpreter takes the bits of bfloat16 for integers where nothing helps it."""
    import torch

    from tests.simulated_musa.triton_kernels import multiply

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left, right = (torch.randn(16, 16).to(dtype) for _ in range(2))
        product = torch.zeros(16, 16, device="musa")
        multiply[(1,)](left.to("musa"), right.to("musa"), product, 16)
        exact = left.double() @ right.double()
        assert torch.allclose(product.cpu().double(), exact, atol=2e-2), dtype


def streams_are_told_apart() -> None:
    """Work can be issued on another stream for a while."""
    other = torch_musa().Stream()
    before = torch_musa().current_stream()
    with torch_musa().stream(other):
        assert torch_musa().current_stream().stream_id == other.stream_id != before.stream_id
    assert torch_musa().current_stream().stream_id == before.stream_id


def the_identity_check_is_passed_honestly() -> None:
    """The stand-in of MATE is found the way a real one is, by its files and metadata."""
    from sglang_musa_ext.kernels.mate_identity import identify_mate

    identity = identify_mate()
    assert identity.problems == ()
    assert (identity.distribution, identity.version, identity.wrapper_distribution) == (
        "mate",
        "0.2.7",
        "flash_attn_3",
    )


CHECKS = [
    fresh_memory_is_not_a_number,
    host_and_device_do_not_mix,
    graphs_do_their_work_again,
    a_capture_waits_for_nothing,
    kernels_in_python_are_captured,
    triton_multiplies_in_every_type,
    streams_are_told_apart,
    the_identity_check_is_passed_honestly,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_device(musa: EngineServer, check: Callable[[], None]) -> None:
    """The simulated GPU is one in what these tests rely on."""
    musa.call(check)
