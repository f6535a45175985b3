"""Replacements in engines on the simulated GPU: collectives, for which SGLang calls the vendor's
``libmccl`` by raw addresses, and what is compiled.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


def collectives() -> None:
    """Let SGLang's tensor-parallel groups reduce through their own process groups.

    SGLang finds no ``libmccl`` here, and up to 0.5.23 takes its communicator for a working one all
    the same as soon as a graph is captured.
    """
    import torch.distributed as dist
    from sglang.srt.distributed.device_communicators import pynccl

    class Communicator:
        """Return what SGLang asks of its communicator for decode graphs."""

        def __init__(self, group: Any, device: Any, *_: Any, **__: Any) -> None:
            self.group, self.device = group, device
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
            self.available, self.disabled = self.world_size > 1, True

        @contextlib.contextmanager
        def change_state(self, enable: bool | None = None, **_: Any) -> Iterator[None]:
            """Be in use, or not, for a while."""
            before, self.disabled = self.disabled, not (self.available and bool(enable))
            try:
                yield
            finally:
                self.disabled = before

        def all_reduce(self, tensor: Any, *_: Any) -> None:
            """Add up ``tensor`` over all ranks, in place."""
            if not self.disabled:
                dist.all_reduce(tensor, group=self.group)

        def outplace_all_reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
            """Return the sum of ``tensor`` over all ranks."""
            total = tensor.clone()
            self.all_reduce(total)
            return total

        def reduce_scatter(self, output: Any, tensor: Any, *_: Any, **__: Any) -> None:
            """Write this rank's part of the sum of ``tensor`` over all ranks to ``output``."""
            total = self.outplace_all_reduce(tensor)
            output.copy_(total.chunk(self.world_size)[self.rank])

        def all_gather(self, output: Any, tensor: Any, *_: Any, **__: Any) -> None:
            """Write every rank's ``tensor`` to ``output``, one behind another."""
            dist.all_gather_into_tensor(output, tensor, group=self.group)

    pynccl.PyNcclCommunicator = Communicator


def collectives_and_transfers() -> None:
    """Let NIXL move this device's memory, which is the host's, between servers."""
    from sglang_musa_ext.cpu.host_memory import transfer_host_memory

    collectives()
    transfer_host_memory()


def collectives_and_compiled_prefill() -> None:
    """Let SGLang compile prefill into pieces, which it captures; what Inductor would compile, which
    has no code for this device, runs as it is.
    """
    import torch

    collectives()
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.disable = False
    original: Any = torch.compile

    def compile_pieces(model: Any = None, *, backend: Any = "inductor", **options: Any) -> Any:
        """Return ``model`` compiled for SGLang's own backend alone."""
        if backend == "inductor":
            return model if model is not None else lambda function: function
        return original(model, backend=backend, **options)

    vars(torch)["compile"] = compile_pieces


def collectives_and_noted_images() -> None:
    """Write a line to the log for each call of vision's attention that this package serves."""
    from sglang_musa_ext import musa_vision

    collectives()
    original = musa_vision._kernels_of

    def noting(device: Any) -> Any:
        """Return the kernels of ``device``."""
        kernels = original(device)
        print(f"vision attention on {kernels.name}, {device}", flush=True)
        return kernels

    vars(musa_vision)["_kernels_of"] = noting
