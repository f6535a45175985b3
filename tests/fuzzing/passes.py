"""Random sequences of forward passes on upstream's real backend, each output and plan judged.

A :class:`Case` is plain data: models, and operations on them. :class:`World` carries it out. Each
number of an :class:`Operation` is taken modulo what is there, so that any operation means something
in any state, and a failing case can be made smaller by leaving operations out.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from sglang_musa_ext import envs, patching
from tests.fuzzing.oracle import InjectedFault, JudgedFp8Model, JudgedModel, KernelWatch, Totals
from tests.support import zigzag
from tests.support.backend import (
    DEVICE,
    AttentionType,
    Draft,
    ForwardMode,
    Request,
    Step,
    attention,
    attention_layer,
    environment,
    mla_layer,
    upstream,
)
from tests.support.graphs import CpuGraphs, DeviceGraphs, GraphRunner

DRAFT_TOKENS = 4
DRAFT_STEPS = 4
GRAPH_SIZES = (2, 1)
ENCODER_TOKENS = 30
"""The most that a request begins with."""
TREES = tuple(
    torch.tensor(tree, dtype=torch.bool)
    for tree in (
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    )
)
"""The mask of four draft tokens among themselves."""
HOST_FREE_DRAFT_EXTEND = "GPU-only" in inspect.getsource(
    upstream.FlashAttentionBackend.init_forward_metadata
)
"""True if this SGLang reads draft-extend v2 without lengths on the host."""
_BACKEND_SOURCE = inspect.getsource(inspect.getmodule(upstream.FlashAttentionBackend) or upstream)
HAS_PAGED_CHUNKS = (
    "local_attn_builder" in _BACKEND_SOURCE
    or "[:, :: self.page_size] // self.page_size" in _BACKEND_SOURCE
)
"""Up to 0.5.19 upstream's virtual batches take token slots for pages, and its graphs see a table as
wide as the lengths of the capture: one page. FA3 reads on in the buffer behind it, where the rest
is; the reference kernels refuse to.
"""


ON_GPU = DEVICE != "cpu"
ON_DEVICE: dict[str, Any] = {"dtype": torch.bfloat16, "fill": 0.0} if ON_GPU else {}
"""A device's kernels read whole tiles, whose padding must not be NaN."""


@dataclass(frozen=True)
class Lane:
    """A model and the settings that its backends serve it under."""

    layers: tuple[dict[str, Any], ...]
    """Arguments of ``attention_layer`` for each layer, beside its id; ``sinks``: has them;
    ``shares``: reads what that many layers before it wrote.
    """
    page_size: int = 64
    context_len: int = 512
    mla: bool = False
    window: int | None = None
    window_pages: bool = False
    chunk: int | None = None
    topk: int = 0
    """Of speculative decoding; 0: none."""
    deterministic: bool = False
    embedding: bool = False
    """Serves prompts alone, over raw keys and values."""
    encoder: bool = False
    """Requests begin with an encoder's tokens, which layers of cross attention read."""
    ranks: int = 1
    """Of context parallelism; more than one: prompts are one at a time, and a part is ours."""
    fp8: bool = False
    """The KV cache is in fp8."""
    scales: tuple[float, float] | None = None
    """Of keys and values in it."""
    drafts: bool = False
    """Is a draft model."""
    inference_mode: bool = False
    check: str = "off"
    plans: str = "auto"
    """``always``: calls that kernels would not split get a plan too."""
    raw_prefill: str = "on"
    force_update: bool = False
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The fields of ``ServerArgs`` that upstream's backend reads."""
        if self.embedding:
            return {"is_embedding": True, "chunked_prefill_size": -1, "disable_radix_cache": True}
        if self.deterministic:
            return {"enable_deterministic_inference": True}
        if self.topk:
            return {
                "speculative_algorithm": "EAGLE",
                "speculative_eagle_topk": self.topk,
                "speculative_num_draft_tokens": DRAFT_TOKENS,
            }
        return {}


@dataclass(frozen=True)
class Operation:
    """Something that a server does with one of its models."""

    kind: str
    lane: int = 0
    picks: tuple[int, ...] = ()
    """The live requests that take part."""
    counts: tuple[int, ...] = ()
    """Tokens: of prompts, of prefixes, or accepted."""
    layers: int = 0
    """The pass ends after that many layers, as if an error had ended it; 0: none did."""


@dataclass(frozen=True)
class Case:
    """A case for :func:`run_case` to carry out."""

    lanes: tuple[Lane, ...]
    operations: tuple[Operation, ...]


def run_case(case: Case, totals: Totals | None = None) -> Totals:
    """Carry out ``case``; raise :class:`~tests.fuzzing.oracle.Mismatch` if something is wrong."""
    totals = Totals() if totals is None else totals
    with World(case.lanes, totals) as world:
        for operation in case.operations:
            world.apply(operation)
    totals.cases += 1
    return totals


class World:
    """The models of a case, their backends, and the requests that are being served."""

    def __init__(self, lanes: Sequence[Lane], totals: Totals) -> None:
        self.totals = totals
        attention.install_kernel_dispatch()
        self.served = [Served(lane, totals) for lane in lanes]
        self._threads = ThreadPoolExecutor(2)
        self._interval = sys.getswitchinterval()
        self._undo = ExitStack()
        if any(lane.ranks > 1 for lane in lanes):
            for name, value in zigzag.stand_ins().items():
                self._undo.callback(patching.replace(upstream, name, value))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._threads.shutdown()
        sys.setswitchinterval(self._interval)
        for served in self.served:
            served.count()

    def apply(self, operation: Operation) -> None:
        """Carry out one operation."""
        served = self.served[operation.lane % len(self.served)]
        if operation.kind == "threads":
            self._in_threads(operation)
        elif operation.kind == "interleaved":
            self._interleaved(operation)
        else:
            with served.mode():
                served.apply(operation)

    def _interleaved(self, operation: Operation) -> None:
        """Passes of two backends, layer by layer in turn."""
        first = self.served[operation.lane % len(self.served)]
        second = self.served[(operation.lane + 1) % len(self.served)]
        with first.mode():
            turns = [first.turns(operation, first.backend)]
            if second is first:
                turns += [first.turns(_mirrored(operation), first.twin())]
            elif second.lane.inference_mode == first.lane.inference_mode:
                turns += [second.turns(_mirrored(operation), second.backend)]
            for _ in _alternate(turns):
                pass

    def _in_threads(self, operation: Operation) -> None:
        """Passes of two models in two threads at once."""
        sys.setswitchinterval(1e-6)
        pair = {operation.lane % len(self.served), (operation.lane + 1) % len(self.served)}
        futures = [
            self._threads.submit(self._whole_pass, self.served[index], operation) for index in pair
        ]
        for future in futures:
            future.result()
        sys.setswitchinterval(self._interval)

    @staticmethod
    def _whole_pass(served: Served, operation: Operation) -> None:
        # The default device and the switch of inference mode are each thread's own.
        with torch.device(DEVICE) if ON_GPU else nullcontext(), served.mode():
            for _ in range(3):
                for _ in served.turns(operation, served.backend):
                    pass


def _mirrored(operation: Operation) -> Operation:
    """The same with other requests, so that two passes are of different batches."""
    return Operation(operation.kind, operation.lane, operation.picks[::-1], operation.counts[::-1])


def _alternate(turns: Sequence[Iterator[None]]) -> Iterator[None]:
    """Take a step of each in turn until all have ended."""
    waiting = list(turns)
    while waiting:
        for worker in list(waiting):
            if next(worker, StopIteration) is StopIteration:
                waiting.remove(worker)
            yield


@dataclass
class _Making:
    """A step that was made, its requests, and what the lengths of all requests were before."""

    step: Step
    requests: list[Request]
    lengths: dict[int, int]


@dataclass
class Served:
    """A model of a case with its backends and live requests."""

    lane: Lane
    totals: Totals
    live: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        lane = self.lane
        self._busy: list[Request] = []
        """Requests of passes that have not ended; no other pass takes them."""
        fp8 = {"scales": lane.scales} if lane.fp8 else ON_DEVICE
        self.model: JudgedModel = (JudgedFp8Model if lane.fp8 else JudgedModel)(
            _layers(lane), page_size=lane.page_size, context_len=lane.context_len, table_rows=8,
            mla=lane.mla, window=lane.window, window_pages=lane.window_pages, chunk=lane.chunk,
            encoder_decoder=lane.encoder,
            draft_worker=lane.drafts, seed=lane.seed, arguments=lane.arguments(), **fp8,
        )  # fmt: skip
        self._encoders: dict[int, int] = {}
        """Tokens of the encoder that a row of the table begins with."""
        self.model.totals = self.totals
        self.sinks = [
            self.model.normal(layer.tp_q_head_num) if options.get("sinks") else None
            for layer, options in zip(self.model.layers, lane.layers, strict=True)
        ]
        # A GPU's kernels have plans of their own; a graph is replayed without its kernels' names.
        self.watch = KernelWatch(self.totals, compares_plans=not ON_GPU)
        self._model_runner = self.model.runner()
        self._build()

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Under PyTorch's inference mode, if this model is served so, and its server arguments."""
        with ExitStack() as stack:
            if self.lane.inference_mode:
                stack.enter_context(torch.inference_mode())
            yield

    def apply(self, operation: Operation) -> None:
        """Carry out an operation on this model alone."""
        kinds: dict[str, Callable[[Operation], None]] = {
            "finish": self._finish, "reload": self._reload, "idle": self._idle,
            "fault": self._fault,
            "draft": self._draft, "replay": self._replay, "again": self._again,
            "one shot": self._decompressed, "prefix chunks": self._decompressed,
        }  # fmt: skip
        special = kinds.get(operation.kind)
        if special is not None:
            special(operation)
            return
        for _ in self.turns(operation, self.backend):
            pass

    def turns(self, operation: Operation, backend: Any) -> Iterator[None]:
        """A forward pass of ``backend``; comes back after each layer."""
        making = self._step(operation)
        if making is None:
            return
        self._busy += making.requests
        backend.init_forward_metadata(making.step.batch)
        for index in range(len(self.model.layers)):
            if operation.layers and index == operation.layers:
                self._take_back(making)
                break
            self._check(backend, making.step, index)
            yield
        self._busy = [each for each in self._busy if each not in making.requests]

    def count(self) -> None:
        """Add the statistics of the backends that end now."""
        for backend in self._backends:
            statistics = backend.musa_fa3_report()["statistics"]
            for name in ("passes", "plans", "reuses"):
                setattr(self.totals, name, getattr(self.totals, name) + statistics[name])
        self._backends.clear()

    # --- backends ---------------------------------------------------------------------------------

    def _build(self) -> None:
        self._backends: list[Any] = []
        self._twin: Any = None
        self._drafting: Any = None
        self._runner: GraphRunner | None = None
        self.backend = self._new_backend()

    def _new_backend(self) -> Any:
        with self._environment():
            backend = attention.MusaFA3Backend(self._model_runner)
        if self.lane.ranks > 1:
            backend.attn_cp_size = self.lane.ranks
        return self._watched(backend)

    def _watched(self, backend: Any) -> Any:
        self.watch.serve(backend)
        self._backends.append(backend)
        return backend

    @contextmanager
    def _environment(self) -> Iterator[None]:
        settings = {
            envs.CHECK: self.lane.check,
            envs.PLANS: self.lane.plans,
            envs.RAW_PREFILL: self.lane.raw_prefill,
        }
        if self.lane.force_update:
            settings[envs.FORCE_UPDATE_METADATA] = "1"
        with environment(**settings):
            yield

    def twin(self) -> Any:
        """A second backend of this model, as two-batch overlap has it."""
        if self._twin is None:
            self._twin = self._new_backend()
        return self._twin

    def _draft_backend(self) -> Any:
        if self._drafting is None:
            with self._environment():
                self._drafting = attention.MusaFA3MultiStepDraftBackend(
                    self._model_runner, self.lane.topk, DRAFT_STEPS
                )
            for child in self._drafting.attn_backends:
                self._watched(child)
        return self._drafting

    # --- layers and requests ----------------------------------------------------------------------

    def _check(self, backend: Any, step: Step, index: int) -> None:
        options = {} if self.sinks[index] is None else {"sinks": self.sinks[index]}
        layer = self.model.layers[index]
        has_no_keys = layer.is_cross_attention and step.batch.encoder_out_cache_loc is None
        share = "shares" in self.lane.layers[index] or has_no_keys
        self.model.check(backend, step, layer, share_kv=share, **options)

    def _picked(self, picks: Sequence[int], room: int = 1) -> list[Request]:
        """The live requests that ``picks`` names, each once, that have room for more tokens."""
        self._drop_full(room)
        free = [request for request in self.live if request not in self._busy]
        chosen: list[Request] = []
        for pick in picks:
            if free and free[pick % len(free)] not in chosen:
                chosen.append(free[pick % len(free)])
        return chosen

    def _drop_full(self, room: int) -> None:
        for request in list(self.live):
            if request not in self._busy and request.length + room > self._most(request):
                self._drop(request)

    def _drop(self, request: Request) -> None:
        self.live.remove(request)
        self.model.release(request)

    def _new(self, prefix: int) -> Request | None:
        """A new request with ``prefix`` tokens in the cache, if the table has a row for it."""
        if len(self.model._free_rows) <= 4:
            # Drafts of trees need rows for their branches.
            return None
        written = [
            layer
            for layer, options in zip(self.model.layers, self.lane.layers, strict=True)
            if "shares" not in options
        ]
        encoder = 1 + (7 * self.lane.seed + 11 * len(self._encoders)) % ENCODER_TOKENS
        encoder = encoder if self.lane.encoder else 0
        request = self.model.request(encoder + prefix, written)
        self._encoders[request.row] = encoder
        self.live.append(request)
        return request

    # --- steps ------------------------------------------------------------------------------------

    def _step(self, operation: Operation) -> _Making | None:
        """The step of an operation; ``None`` if it is empty."""
        lengths = {request.row: request.length for request in self.live}
        kind = "prefill" if self.lane.embedding else operation.kind
        if self.lane.ranks > 1 and kind in ("prefill", "extend", "mixed", "draft extend"):
            kind = "zigzag"
        makers = {
            "zigzag": self._zigzag,
            "prefill": self._prefill, "extend": self._extend, "mixed": self._mixed,
            "verify": self._verify,
            "draft extend": self._draft_extend, "padded": self._padded,
        }  # fmt: skip
        step = makers.get(kind, self._decode)(operation)
        if step is None:
            return None
        rows = step.batch.req_pool_indices.tolist()
        if self.lane.encoder:
            self._begin_with_encoders(step, rows, runs=kind == "prefill")
        requests = [request for request in self.live if request.row in rows]
        return _Making(step, requests, lengths)

    def _begin_with_encoders(self, step: Step, rows: Sequence[int], *, runs: bool) -> None:
        """Have each request's first tokens be its encoder's, as upstream's batch has them.

        Where the encoder ``runs`` in this pass, layers of cross attention have keys to write.
        """
        lengths = [self._encoders[row] for row in rows]
        batch = step.batch
        for queries, length in zip(step.queries, lengths, strict=True):
            queries.encoder_slots, queries.slots = queries.slots[:length], queries.slots[length:]
            queries.positions = queries.positions - length
        batch.encoder_lens = torch.tensor(lengths)
        if runs:
            slots = [queries.encoder_slots for queries in step.queries]
            batch.encoder_out_cache_loc = torch.cat([each for each in slots if each is not None])
        batch.seq_lens = batch.seq_lens - batch.encoder_lens
        batch.seq_lens_cpu = batch.seq_lens.cpu()
        batch.seq_lens_sum -= sum(lengths)
        if batch.extend_prefix_lens_cpu is not None:
            batch.extend_prefix_lens -= batch.encoder_lens.to(torch.int32)
            batch.extend_prefix_lens_cpu = batch.extend_prefix_lens.tolist()

    def _zigzag(self, operation: Operation) -> Step | None:
        """More tokens of one request, of which a rank attends with two of four pieces."""
        counts, picks = list(operation.counts) or [1], list(operation.picks) or [0]
        piece = 1 + counts[0] % 40
        chosen = self._picked(picks[:1], 4 * piece) if operation.kind != "prefill" else []
        request = chosen[0] if chosen else self._new(picks[0] * 37 % self._room(4 * piece))
        if request is None:
            return None
        step = self.model.extend([request], [4 * piece])
        zigzag.take_part(step, piece, picks[-1] % 2)
        return step

    def _take_back(self, making: _Making) -> None:
        """Have the requests of a pass that did not end be what they were before it."""
        for request in making.requests:
            if request.row in making.lengths:
                request.length = making.lengths[request.row]
            else:
                self._drop(request)

    def _decode(self, operation: Operation) -> Step | None:
        chosen = [each for each in self._picked(operation.picks) if each.length]
        return self.model.decode(chosen) if chosen else None

    def _padded(self, operation: Operation) -> Step | None:
        """Decode with requests of one token behind the real ones, as data parallelism pads."""
        chosen = [each for each in self._picked(operation.picks) if each.length]
        added = [self._new(0) for _ in range(2)]
        batch = chosen + [request for request in added if request is not None]
        return self.model.decode(batch) if batch else None

    def _prefill(self, operation: Operation) -> Step | None:
        """Prompts of new requests; every second one has a prefix in the cache."""
        requests, new = [], []
        if self.lane.embedding:
            for request in [each for each in self.live if each not in self._busy]:
                self._drop(request)
        for index, count in enumerate(operation.counts):
            length = 1 + count % (self._capacity - 2)
            pick = operation.picks[index % len(operation.picks)] if operation.picks else 0
            prefix = 0 if self.lane.embedding or pick % 2 == 0 else pick * 37 % self._room(length)
            made = self._new(prefix)
            if made is not None:
                requests.append(made)
                new.append(length)
        if self.lane.encoder and operation.picks and operation.picks[0] % 2 == 0:
            # As many rows as the encoders have tokens, but not request by request.
            new = [self._encoders[request.row] for request in reversed(requests)]
        return self.model.extend(requests, new) if requests else None

    def _room(self, length: int) -> int:
        return max(self._capacity - length - 1, 1)

    @property
    def _capacity(self) -> int:
        """The most tokens that a request may have beside its encoder's.

        Upstream reads the table from the longest encoder's end on, whatever the request's own is.
        """
        return self.lane.context_len - (ENCODER_TOKENS if self.lane.encoder else 0)

    def _most(self, request: Request) -> int:
        return self._capacity + self._encoders[request.row]

    def _extend(self, operation: Operation) -> Step | None:
        """More tokens of live requests: the next chunk of a prompt, or another turn."""
        chosen = self._picked(operation.picks)
        new = self._counts_for(chosen, operation.counts)
        return self.model.extend(chosen, new) if chosen else None

    def _mixed(self, operation: Operation) -> Step | None:
        """A chunk of one prompt and single tokens of others in one pass."""
        chosen = self._picked(operation.picks)
        new = self._counts_for(chosen, operation.counts)
        new = [new[0], *[1] * (len(new) - 1)] if new else []
        # Upstream forgets its local layers where a pass is mixed.
        plain = self.lane.chunk is None and not self.lane.encoder
        mode = ForwardMode.MIXED if plain else ForwardMode.EXTEND
        return self.model.extend(chosen, new, mode) if chosen else None

    def _counts_for(self, requests: Sequence[Request], counts: Sequence[int]) -> list[int]:
        wanted = list(counts) or [1]
        return [
            1 + wanted[index % len(wanted)] % (self._most(request) - request.length)
            for index, request in enumerate(requests)
        ]

    def _verify(self, operation: Operation) -> Step | None:
        if not self.lane.topk or self.lane.drafts:
            return self._decode(operation)
        chosen = [each for each in self._picked(operation.picks, DRAFT_TOKENS) if each.length]
        if not chosen:
            return None
        if self.lane.topk > 1:
            counts = list(operation.counts) or [0]
            trees = [TREES[counts[i % len(counts)] % len(TREES)] for i in range(len(chosen))]
            return self.model.verify(chosen, DRAFT_TOKENS, trees)
        step = self.model.verify(chosen, DRAFT_TOKENS)
        if operation.counts and not operation.layers:
            # The tokens that the target accepts stay.
            for index, request in enumerate(chosen):
                request.length += operation.counts[index % len(operation.counts)] % DRAFT_TOKENS
        return step

    def _draft_extend(self, operation: Operation) -> Step | None:
        """A draft model reads the tokens that its target accepted."""
        if self.lane.topk != 1:
            return self._extend(operation)
        chosen = self._picked(operation.picks, DRAFT_TOKENS)
        if not chosen:
            return None
        new = [DRAFT_TOKENS] * len(chosen)
        step = self.model.extend(chosen, new, ForwardMode.DRAFT_EXTEND_V2)
        step.batch.spec_info = Draft(
            num_tokens_per_req=DRAFT_TOKENS, num_accepted_tokens=None, num_accepted_tokens_cpu=None
        )
        if HOST_FREE_DRAFT_EXTEND and operation.counts and operation.counts[0] % 2:
            step.batch.extend_prefix_lens_cpu = step.batch.extend_seq_lens_cpu = None
        return step

    # --- operations that are no single pass -------------------------------------------------------

    def _finish(self, operation: Operation) -> None:
        for request in self._picked(operation.picks):
            self._drop(request)

    def _reload(self, _: Operation) -> None:
        """Another backend, as after new weights or a memory release; graphs are captured anew."""
        self.count()
        self._build()

    def _idle(self, _: Operation) -> None:
        """A pass of a rank that has no requests: its layers run without attention."""
        batch = SimpleNamespace(forward_mode=ForwardMode.IDLE, batch_size=0)
        for layer in self.model.layers:
            q = self.model.normal(0, layer.tp_q_head_num * layer.head_dim)
            self.backend.forward(q, None, None, layer, batch)

    def _decompressed(self, operation: Operation) -> None:
        """A prefill of an MLA model over decompressed keys, with absorbed layers among others."""
        kind = "extend" if operation.picks and operation.picks[0] % 3 else "prefill"
        making = self._step(replace(operation, kind=kind))
        if making is None:
            return
        self.backend.init_forward_metadata(making.step.batch)
        chunk = None if operation.kind == "one shot" else 16 + 31 * len(operation.counts)
        for index, layer in enumerate(self.model.layers):
            if not self.lane.mla or self.lane.ranks > 1 or (index + operation.layers) % 3 == 2:
                self._check(self.backend, making.step, index)
            else:
                self.model.check_decompressed(self.backend, making.step, layer, chunk)

    def _again(self, operation: Operation) -> None:
        """The same pass twice over one metadata object, as before a graph's capture."""
        making = self._step(operation)
        if making is None:
            return
        self.backend.init_forward_metadata(making.step.batch)
        for _ in range(2):
            for index in range(len(self.model.layers)):
                self._check(self.backend, making.step, index)

    def _fault(self, operation: Operation) -> None:
        """A kernel fails in the middle of a pass; the requests of the pass are as before."""
        making = self._step(operation)
        if making is None:
            return
        self.watch.fails_in = 1 + operation.layers % len(self.model.layers)
        try:
            self.backend.init_forward_metadata(making.step.batch)
            for index in range(len(self.model.layers)):
                self._check(self.backend, making.step, index)
        except InjectedFault:
            self._take_back(making)
        self.watch.fails_in = None

    def _draft(self, operation: Operation) -> None:
        """The steps of drafting, each on a backend of its own."""
        if not self.lane.topk:
            return
        chosen = [each for each in self._picked(operation.picks, DRAFT_STEPS + 1) if each.length]
        if self.lane.topk > 1:
            self._draft_tree(chosen[:1], operation)
        elif chosen:
            self._draft_chain(chosen)

    def _draft_chain(self, chosen: list[Request]) -> None:
        draft = self._draft_backend()
        draft.init_forward_metadata(self.model.draft_decode(chosen, 0).batch)
        for number, child in enumerate(draft.attn_backends):
            step = self.model.draft_decode(chosen, number)
            for index in range(len(self.model.layers)):
                self._check(child, step, index)

    def _draft_tree(self, chosen: list[Request], operation: Operation) -> None:
        free = len(self.model._free_rows)
        if not chosen or free < self.lane.topk:
            return
        draft, rows = self._draft_backend(), list(self.model._free_rows)
        number = (operation.counts or (0,))[0] % len(draft.attn_backends)
        step = self.model.draft_tree(chosen, self.lane.topk, DRAFT_STEPS, number)
        draft.init_forward_metadata(step.batch)
        self.model.enter_step(step)
        for index in range(len(self.model.layers)):
            self._check(draft.attn_backends[number], step, index)
        self.model._free_rows = rows

    def _replay(self, operation: Operation) -> None:
        """Decode or verify in a graph that was captured for its batch size."""
        if not self._can_capture():
            self.apply(Operation("decode", 0, operation.picks, operation.counts))
            return
        runner = self._captured()
        tokens = runner.tokens
        chosen = [each for each in self._picked(operation.picks, tokens) if each.length]
        chosen = chosen[: max(GRAPH_SIZES)]
        if not chosen:
            return
        eagerly = bool(operation.counts) and operation.counts[0] % 2 == 1
        step = self.model.verify(chosen, tokens) if tokens > 1 else self.model.decode(chosen)
        runner.replay(step, eagerly)
        self.totals.replays += not eagerly

    def _can_capture(self) -> bool:
        """Return whether the stand-in for upstream's graph runner serves this model."""
        lane = self.lane
        special = any("sinks" in options or "shares" in options for options in lane.layers)
        narrow = lane.chunk is not None and not (HAS_PAGED_CHUNKS or ON_GPU)
        return not (special or narrow or lane.embedding or lane.encoder or lane.topk > 1)

    def _captured(self) -> GraphRunner:
        if self._runner is None:
            backend = self._new_backend()
            graphs = DeviceGraphs() if ON_GPU else CpuGraphs()
            graphs.serve(backend)
            verifies = self.lane.topk == 1 and not self.lane.drafts
            tokens = DRAFT_TOKENS if verifies else 1
            self._runner = GraphRunner(self.model, backend, graphs, GRAPH_SIZES, tokens)
        return self._runner


def _layers(lane: Lane) -> list[Any]:
    layers: list[Any] = []
    for index, options in enumerate(lane.layers):
        own = {name: value for name, value in options.items() if name not in ("sinks", "shares")}
        if "attn_type" in own:
            own["attn_type"] = AttentionType(own["attn_type"])
        number = index - options.get("shares", 0)
        made = mla_layer(number, **own) if lane.mla else attention_layer(number, **own)
        layers.append(made)
    return layers


def case_from(data: dict[str, Any]) -> Case:
    """The case that was written as JSON."""
    lanes = [Lane(**lane | {"layers": tuple(lane["layers"])}) for lane in data["lanes"]]
    operations = [
        Operation(**fields | {"picks": tuple(fields["picks"]), "counts": tuple(fields["counts"])})
        for fields in data["operations"]
    ]
    return Case(tuple(lanes), tuple(operations))
