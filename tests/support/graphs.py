"""Graph capture in tests: a stand-in that records on a CPU, and what upstream's graph runner does.

The cases are written against :class:`Graphs`, whose stand-in here records what a function runs on
the CPU and runs it again. A device's own graphs need ``serve``, ``capture`` and ``replay`` alone to
go through the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_musa_ext.attention.plans import StreamState
from tests.support.backend import Draft, ForwardMode, Model, Request, Step, replace_kernels

Tensor = torch.Tensor


class Graph(Protocol):
    """The captured operations."""

    def replay(self) -> None:
        """Run it again, on the same tensors."""


class Graphs(Protocol):
    """A device's way to capture graphs."""

    def serve(self, backend: Any) -> None:
        """Let ``backend`` know when it is being captured."""

    def capture(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        """A graph of what ``function`` runs, and what it returned."""


# --- the stand-in ---------------------------------------------------------------------------------


@dataclass
class Recorded:
    """One operation: a function of PyTorch or a kernel, its arguments and result tensors."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def run_again(self) -> None:
        """Run it on what its arguments hold now, and put the result where the first one is."""
        again = self.function(*self.args, **self.kwargs)
        for old, new in zip(tree_leaves(self.result), tree_leaves(again), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


@dataclass
class CpuGraph:
    """The operations of one capture, in order."""

    operations: list[Recorded] = field(default_factory=list)

    def replay(self) -> None:
        for operation in self.operations:
            operation.run_again()

    def kernels(self, name: str = "") -> list[Recorded]:
        """The kernel calls among the operations; of one name, if given."""
        known = ("get_scheduler_metadata", "flash_attn_with_kvcache", "flash_attn_varlen_func")
        return [each for each in self.operations if each.name in known and name in ("", each.name)]


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes PyTorch's operations, but those within a kernel, which is one operation itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = CpuGraph()
        self.inside_kernel = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.inside_kernel:
            return result
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError(
                "a value was read on the host, which a device forbids during a capture"
            )
        if not _is_view(args, result) and "empty" not in function.__name__:
            self.graph.operations.append(
                Recorded(function.__name__, function, args, kwargs or {}, result)
            )
        return result


def _is_view(args: Any, result: Any) -> bool:
    """Return whether ``result`` is storage of an argument, which needs no second run.

    An operation that writes in place returns its own argument, and does.
    """
    if not isinstance(result, Tensor):
        return False
    inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    written = any(leaf is result for leaf in inputs)
    return not written and result.untyped_storage().data_ptr() in [
        x.untyped_storage().data_ptr() for x in inputs
    ]


class CpuGraphs:
    """The stand-in for a device: a stream, a capture state, and tapes for graphs."""

    def __init__(self) -> None:
        self.stream = 0
        self._tape: _Tape | None = None

    def state(self) -> StreamState:
        return StreamState(self.stream, self._tape is not None)

    def serve(self, backend: Any) -> None:
        backend._plans._stream_state = self.state
        replace_kernels(backend, self._wrap)

    def capture(self, function: Callable[[], Any]) -> tuple[CpuGraph, Any]:
        with self._capturing() as tape:
            result = function()
        return tape.graph, result

    @contextmanager
    def _capturing(self) -> Iterator[_Tape]:
        self._tape = _Tape()
        try:
            with self._tape:
                yield self._tape
        finally:
            self._tape = None

    def as_kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, a kernel of another library, as one operation; it is called by keyword."""
        return self._wrap(name, function)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            if self._tape is None:
                return function(**arguments)
            self._tape.inside_kernel = True
            try:
                result = function(**arguments)
            finally:
                self._tape.inside_kernel = False
            self._tape.graph.operations.append(Recorded(name, function, (), arguments, result))
            return result

        return call


class DeviceGraphs:
    """A GPU's own graphs, under the names that ``torch.cuda`` has."""

    def __init__(self) -> None:
        self._pool: Any = None

    def serve(self, backend: Any) -> None:
        """Nothing: ``backend`` asks the device."""

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        self._pool = graph.pool()
        return graph, result


# --- what upstream's graph runner does ------------------------------------------------------------


def prepare(backend: Any, batch: Any, capturing: bool) -> None:
    """Call the method of this release that prepares metadata for a capture or a replay."""
    if hasattr(backend, "init_forward_metadata_out_graph"):
        backend.init_forward_metadata_out_graph(batch, in_capture=capturing)
        return
    rows, lengths, mode = batch.req_pool_indices, batch.seq_lens, batch.forward_mode
    if capturing:
        tokens = batch.out_cache_loc.shape[0]
        backend.init_forward_metadata_capture_cuda_graph(
            batch.batch_size, tokens, rows, lengths, None, mode, batch.spec_info
        )
    else:
        total, host = int(lengths.sum()), lengths.clone()
        backend.init_forward_metadata_replay_cuda_graph(
            batch.batch_size,
            rows,
            lengths,
            total,
            None,
            mode,
            batch.spec_info,
            host,
            batch.out_cache_loc,
        )


class GraphRunner:
    """Captures a model's pass for several batch sizes, as upstream does, and replays it.

    Two warm-up runs, then the capture, from the largest batch to the smallest, with all lengths 1
    and all static buffers shared by the graphs.
    """

    def __init__(
        self, model: Model, backend: Any, graphs: Graphs, sizes: Sequence[int], tokens: int = 1
    ) -> None:
        self.model, self.backend, self.tokens = model, backend, tokens
        largest = max(sizes)
        rows = largest * tokens
        self.lengths = torch.ones(largest, dtype=torch.int64)
        self.table_rows = torch.zeros(largest, dtype=torch.int64)
        self.loc = torch.zeros(rows, dtype=torch.int64)
        self.inputs: dict[int, dict[str, Tensor]] = {}
        for index, layer in enumerate(model.layers):
            self.inputs[index] = self._buffers(layer, rows)
        self.graphs: dict[int, Any] = {}
        self.batches: dict[int, Any] = {}
        self.outputs: dict[int, list[Tensor]] = {}
        backend.init_cuda_graph_state(largest, rows)
        for size in sorted(sizes, reverse=True):
            self._capture(size, graphs)

    def _buffers(self, layer: Any, rows: int) -> dict[str, Tensor]:
        shapes = {
            "q": (rows, layer.tp_q_head_num * layer.head_dim),
            "k": (rows, layer.tp_k_head_num, layer.head_dim),
        }
        shapes["v"] = (rows, layer.tp_v_head_num, layer.v_head_dim)
        if self.model.mla:
            shapes["k"] = (rows, 1, layer.v_head_dim)
            shapes["k_rope"] = (rows, 1, layer.head_dim - layer.v_head_dim)
        return {name: torch.zeros(shape, dtype=self.model.dtype) for name, shape in shapes.items()}

    def _batch(self, size: int) -> Any:
        """The batch of a graph: upstream's own class over the static buffers."""
        rows = size * self.tokens
        template = self.model.extend([Request(0, 0)], [1]).batch
        verify = self.tokens > 1
        draft = Draft(draft_token_num=self.tokens, num_tokens_per_req=self.tokens)
        fields = {
            "forward_mode": ForwardMode.TARGET_VERIFY if verify else ForwardMode.DECODE,
            "batch_size": size, "req_pool_indices": self.table_rows[:size],
            "seq_lens": self.lengths[:size],
            "seq_lens_cpu": self.lengths[:size].cpu().clone(), "out_cache_loc": self.loc[:rows],
            "positions": torch.zeros(rows, dtype=torch.int64),
            "spec_info": draft if verify else None,
        }  # fmt: skip
        for name, value in fields.items():
            setattr(template, name, value)
        return template

    def run(self, size: int) -> list[Tensor]:
        """Every layer's forward on the static buffers; what is captured."""
        batch, rows = self.batches[size], size * self.tokens
        forward = self.backend.forward_extend if self.tokens > 1 else self.backend.forward_decode
        outputs = []
        for index, layer in enumerate(self.model.layers):
            inputs = {name: buffer[:rows] for name, buffer in self.inputs[index].items()}
            q, k, v = (inputs.pop(name) for name in "qkv")
            outputs.append(forward(q, k, v, layer, batch, **inputs))
        return outputs

    def _capture(self, size: int, graphs: Graphs) -> None:
        self.batches[size] = self._batch(size)
        prepare(self.backend, self.batches[size], capturing=True)
        for _ in range(2):
            self.run(size)
            # From 0.5.12 on.
            getattr(self.backend, "on_after_cuda_graph_warmup", lambda: None)()
        self.graphs[size], self.outputs[size] = graphs.capture(lambda: self.run(size))

    def replay(self, step: Step, eagerly: bool = False) -> None:
        """Fill the static buffers for ``step``, replay its graph, and require every layer's output.

        ``eagerly``: run the layers over the graph's buffers instead, as upstream's breakable graphs
        do with attention.
        """
        size = step.batch.batch_size
        self.lengths[:size] = step.batch.seq_lens
        self.table_rows[:size] = step.batch.req_pool_indices
        self.loc[: step.rows] = step.batch.out_cache_loc
        fed = []
        for index, layer in enumerate(self.model.layers):
            inputs = self.model.inputs(step, layer)
            for name, value in inputs.items():
                assert value is not None
                self.inputs[index][name][: step.rows] = value
            fed.append(inputs)
        self.batches[size].seq_lens_cpu = self.lengths[:size].cpu().clone()
        prepare(self.backend, self.batches[size], capturing=False)
        outputs = self.outputs[size]
        if eagerly:
            outputs = self.run(size)
        else:
            self.graphs[size].replay()
        for layer, inputs, output in zip(self.model.layers, fed, outputs, strict=True):
            self.model.require(output, step, layer, inputs)
