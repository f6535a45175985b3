"""A call after others like it is made as if it were the first, whatever changes between two.

What a pass has seen is recognised by a few comparisons, and nothing is compared after them. So each
thing that a kernel library can tell apart is changed here, alone, between two calls of a pass, and
what reaches the library, or the refusal, must be that of a backend that has seen no call before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext.attention.calls import ABSENT, OPTIONS
from sglang_musa_ext.kernels.adapter import CallAdapter
from sglang_musa_ext.kernels.hopper import hopper_record
from sglang_musa_ext.kernels.mate import mate_record
from sglang_musa_ext.kernels.record import FA3Kernels, UnsupportedKernelArgument
from tests.support.backend import Model, attention, dispatch, upstream
from tests.support.layers import uniform_layers

REQUESTS, ROWS, HEADS, KV_HEADS, DIM, PAGE = 3, 6, 8, 2, 64, 64


class Library:
    """FA3's functions with the parameters of a real library, which note what they get."""

    def __init__(self, *more: str) -> None:
        """``more`` are parameters beside those that all libraries have."""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.planned: dict[int, dict[str, Any]] = {}
        self._kept: list[torch.Tensor] = []
        shared = (
            "max_seqlen_q=None, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "softcap=0.0, return_softmax_lse=False, num_splits=0, qv=None, sinks=None, "
            f"k_descale=None, v_descale=None, attention_chunk=0, {', '.join(more)}"
        )
        self.flash_attn_with_kvcache = self._function(
            "flash_attn_with_kvcache",
            "q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, page_table=None, "
            f"cu_seqlens_q=None, cu_seqlens_k_new=None, scheduler_metadata=None, {shared}",
        )
        self.flash_attn_varlen_func = self._function(
            "flash_attn_varlen_func",
            "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_k=None, seqused_q=None, "
            f"seqused_k=None, page_table=None, {shared}",
        )

    def _function(self, name: str, parameters: str) -> Callable[..., Any]:
        """Return a function with these parameters, because an adapter reads a signature."""
        scope: dict[str, Any] = {"note": lambda call: self._note(name, call)}
        exec(f"def {name}({parameters}): return note(locals())", scope)
        function: Callable[..., Any] = scope[name]
        return function

    def _note(self, name: str, call: dict[str, Any]) -> torch.Tensor:
        self.calls.append((name, call))
        q: torch.Tensor = call["q"]
        return torch.full_like(q, len(self.calls))

    def get_scheduler_metadata(
        self, batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int,
        num_heads_kv: int, headdim: int, cache_seqlens: torch.Tensor, qkv_dtype: Any = None,
        headdim_v: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None,
        cache_leftpad: Any = None, page_size: Any = None, causal: Any = False,
        window_size: Any = (-1, -1), attention_chunk: Any = 0, has_softcap: Any = False,
        num_splits: Any = 0, pack_gqa: Any = None, sm_margin: Any = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Return a tensor that stands for these arguments."""
        call = locals()
        del call["self"]
        plan = torch.zeros(4 * batch_size, dtype=torch.int32)
        self._kept.append(plan)
        self.planned[id(plan)] = call
        return plan


def _mate() -> tuple[Library, FA3Kernels]:
    library = Library()
    record = mate_record(library, (0, 2, 7))
    # The number of splits is a matter of the device, and there is none here.
    object.__setattr__(record, "combines_unsplit", False)
    return library, record


def _hopper() -> tuple[Library, FA3Kernels]:
    library = Library("ver=3", "out=None", "score_mod=None")
    return library, hopper_record(library, plans_unequal_queries=True)


KERNELS = {"mate": _mate, "hopper": _hopper}


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def every_other(*shape: int) -> torch.Tensor:
    """A tensor of this shape whose last dimension has stride 2."""
    return zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


def with_gaps(*shape: int) -> torch.Tensor:
    """A tensor of this shape whose rows do not follow one another."""
    return zeros(*shape[:-2], 2 * shape[-2], shape[-1])[..., : shape[-2], :]


def others(*shape: int, head_dim: int = 128, more_rows: bool = False) -> dict[str, torch.Tensor]:
    """Tensors that differ from one of zeros of this shape in one thing each."""
    made = {
        "dtype": zeros(*shape, dtype=torch.float16),
        "stride 2": every_other(*shape),
        "gaps": with_gaps(*shape),
        "heads": zeros(*shape[:-2], 2 * shape[-2], shape[-1]),
        "head dim": zeros(*shape[:-1], head_dim),
    }
    return made | ({"rows": zeros(shape[0] + 1, *shape[1:])} if more_rows else {})


CACHE = (9, PAGE, KV_HEADS, DIM)
OWN = (ROWS, KV_HEADS, DIM)
Q = (ROWS, HEADS, DIM)
LENGTHS = torch.tensor([70, 5, 9], dtype=torch.int32)
OFFSETS = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
TABLE = torch.zeros(REQUESTS, 2, dtype=torch.int32)
BASE: dict[str, Any] = {
    "page_table": TABLE, "cache_seqlens": LENGTHS, "cu_seqlens_q": OFFSETS, "max_seqlen_q": 2,
    "softmax_scale": 0.125, "causal": True, "window_size": (-1, -1), "softcap": 0.0,
    "return_softmax_lse": False, "num_splits": 0, "out": None, "ver": 3, "qv": None,
    "sinks": None, "k_descale": None, "v_descale": None,
}  # fmt: skip
TENSORS = {"q": Q, "k_cache": CACHE, "v_cache": CACHE}

CHANGES: dict[str, dict[str, Any]] = {
    **{
        f"{name} {what}": {name: made}
        for name, shape in TENSORS.items()
        for what, made in others(*shape).items()
    },
    "rows": {"q": zeros(ROWS - 2, HEADS, DIM)},
    "pages": {"k_cache": zeros(8, *CACHE[1:]), "v_cache": zeros(8, *CACHE[1:])},
    "page table": {"page_table": torch.zeros(REQUESTS, 3, dtype=torch.int32)},
    "page table gaps": {"page_table": torch.zeros(REQUESTS, 4, dtype=torch.int32)[:, ::2]},
    "equal page table": {"page_table": TABLE.clone()},
    "lengths": {"cache_seqlens": LENGTHS.clone()},
    "offsets": {"cu_seqlens_q": OFFSETS.clone()},
    "longest query": {"max_seqlen_q": 3},
    "softmax_scale": {"softmax_scale": 0.5},
    "causal": {"causal": False},
    "window_size": {"window_size": (7, 0)},
    "softcap": {"softcap": 30.0},
    "return_softmax_lse": {"return_softmax_lse": True},
    "num_splits": {"num_splits": 1},
    "out": {"out": zeros(*Q)},
    "ver": {"ver": 4},
    "qv": {"qv": zeros(ROWS, HEADS, 512)},
    "sinks": {"sinks": zeros(HEADS)},
    "sinks dtype": {"sinks": zeros(HEADS, dtype=torch.float32)},
    "k_descale": {"k_descale": torch.ones(REQUESTS, KV_HEADS)},
    "v_descale": {"v_descale": torch.ones(REQUESTS, KV_HEADS)},
    "score_mod": {"score_mod": object()},
    "new keys": {"k": zeros(*OWN), "v": zeros(*OWN), "cu_seqlens_k_new": OFFSETS},
}
Own = tuple[torch.Tensor, torch.Tensor] | None
Made = tuple[dict[str, Any], Own]

OWN_CHANGES = others(*OWN, more_rows=True)
RAW_CHANGES: dict[str, Made] = {}
for _name, _change in CHANGES.items():
    RAW_CHANGES[_name] = (_change, (zeros(*OWN), zeros(*OWN)))
for _name, _tensor in OWN_CHANGES.items():
    RAW_CHANGES[f"own k {_name}"] = ({}, (_tensor, zeros(*OWN)))
    RAW_CHANGES[f"own v {_name}"] = ({}, (zeros(*OWN), _tensor))
RAW_CHANGES["none of its own"] = ({}, None)


def test_every_option_is_changed() -> None:
    """An option that is added to what is compared needs a change above."""
    assert set(OPTIONS) <= set(CHANGES)


def base(own_keys: bool) -> Made:
    """A call with tensors of its own, as each layer makes it, and its layer's keys."""
    tensors = {name: zeros(*shape) for name, shape in TENSORS.items()}
    return BASE | tensors, (zeros(*OWN), zeros(*OWN)) if own_keys else None


@functools.cache
def _runner() -> Any:
    return Model(uniform_layers(1)).runner()


def new_backend() -> Any:
    """A backend that has seen no call."""
    attention.install_kernel_dispatch()
    return attention.MusaFA3Backend(_runner())


@contextmanager
def running(backend: Any) -> Iterator[None]:
    """Have calls under upstream's names be of the layers of ``backend`` meanwhile."""
    dispatch.RUNNING.stack.append(backend)
    try:
        yield
    finally:
        dispatch.RUNNING.stack.pop()
        backend.own_keys = None


def outcomes(
    kernels: str,
    calls: Sequence[Made],
    lengths: Sequence[dict[str, Any]] | None = None,
    function: str = "flash_attn_with_kvcache",
) -> list[Any]:
    """Make ``calls`` as layers of one pass; return what each came to, as a library sees it.

    With ``lengths``, each is the only one of a pass over those lengths.
    """
    library, record = KERNELS[kernels]()
    backend = new_backend()
    backend._kernels, backend._new_rows = record, ROWS
    batch, layers = SimpleNamespace(), []
    seen: list[Any] = []
    with running(backend):
        for index, (arguments, own_keys) in enumerate(calls):
            layers.append(object())
            of_pass = BASE if lengths is None else lengths[index]
            if lengths is not None or not index:
                backend.forward_metadata = SimpleNamespace(
                    cu_seqlens_q=of_pass["cu_seqlens_q"],
                    cache_seqlens_int32=of_pass["cache_seqlens"],
                )
            backend._plans.begin_layer(layers[-1], batch, backend.forward_metadata)
            backend.own_keys = own_keys
            try:
                result = getattr(upstream, function)(**arguments)
            except (UnsupportedKernelArgument, KeyError) as refusal:
                seen.append(str(refusal))
                continue
            name, call = library.calls[-1]
            plan = call.pop("scheduler_metadata", None)
            planned = None if plan is None else _by_identity(library.planned[id(plan)])
            seen.append((name, _by_identity(call), planned, result is arguments.get("out")))
    return seen


def _by_identity(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call to compare with another: tensors by what they are over."""

    def seen(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.dtype, value.shape, value.stride(), _address(value)

    return {name: seen(value) for name, value in call.items()}


def _address(tensor: torch.Tensor) -> int | None:
    # What an adapter makes itself, such as a dense page table, is another tensor each time.
    return tensor.data_ptr() if tensor.numel() > TABLE.numel() * 2 else None


def require_each_as_if_first(
    kernels: str, calls: Sequence[Made], function: str = "flash_attn_with_kvcache"
) -> list[Any]:
    """Compare what comes of calls in one pass with what comes of each alone; return the former."""
    served = outcomes(kernels, calls, None, function)
    for each, made in zip(served, calls, strict=True):
        assert each == outcomes(kernels, [made], None, function)[0]
    return served


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_call_over_a_cache_is_made_as_if_it_were_the_first(
    kernels: str, change: str
) -> None:
    """Dtypes, layouts, shapes, options and lengths: each alone is noticed, and forgotten again."""
    first, second, last = (base(own_keys=False) for _ in range(3))
    changed = {**base(own_keys=False)[0], **CHANGES[change]}, None
    require_each_as_if_first(kernels, [first, second, changed, last])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("change", RAW_CHANGES)
def test_a_changed_call_over_raw_keys_is_made_as_if_it_were_the_first(
    kernels: str, change: str
) -> None:
    """The same where the layer's own keys serve, which may change as well."""
    first, second, last = (base(own_keys=True) for _ in range(3))
    more, own_keys = RAW_CHANGES[change]
    changed = {**base(own_keys=True)[0], **more}, own_keys
    served = require_each_as_if_first(kernels, [first, second, changed, last])
    assert [each[0] for each in served[:2]] == ["flash_attn_varlen_func"] * 2


REFUSED = {
    "q dtype": "one dtype", "k_cache dtype": "one dtype", "v_cache dtype": "one dtype",
    "k_cache stride 2": "last dimension of k_cache",
    "v_cache stride 2": "last dimension of v_cache",
    "ver": "FlashAttention 4", "qv": "qv without a workspace", "sinks dtype": "sinks",
    "score_mod": "score_mod",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_mate_refuses_a_change_by_name_between_two_calls(change: str) -> None:
    """A call that MATE cannot do is refused in the middle of a pass, and the pass goes on."""
    first, last = base(own_keys=False), base(own_keys=False)
    changed = {**base(own_keys=False)[0], **CHANGES[change]}, None
    served = outcomes("mate", [first, changed, last])
    assert REFUSED[change] in served[1]
    assert served[2][0] == "flash_attn_with_kvcache"


OPTION_TENSORS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": zeros(HEADS)},
    "qv": {"qv": zeros(ROWS, HEADS, 512)},
    "scales": {"k_descale": torch.ones(REQUESTS, KV_HEADS), "v_descale": torch.ones(1, KV_HEADS)},
}
OPTION_CHANGES: dict[str, dict[str, Any]] = {
    "none": {"sinks": None, "qv": None, "k_descale": None, "v_descale": None},
    "dtype": {"sinks": zeros(HEADS, dtype=torch.float32), "qv": zeros(*Q, dtype=torch.float16)},
    "size": {"sinks": zeros(2 * HEADS), "qv": zeros(ROWS, HEADS, 256)},
    "dims": {"sinks": zeros(1, HEADS), "qv": zeros(HEADS, 512)},
    "stride": {"sinks": every_other(HEADS), "qv": every_other(ROWS, HEADS, 512)},
    "scale of k alone": {"v_descale": None},
    "scale": {"softmax_scale": 0.5},
    "another tensor": {"out": zeros(*Q)},
}


def changed_options(tensors: str, change: str) -> dict[str, Any]:
    """Options with these tensors, of which those that the change names are others."""
    own = OPTION_TENSORS[tensors]
    return own | {
        name: value
        for name, value in OPTION_CHANGES[change].items()
        if name in own or name in ("softmax_scale", "out")
    }


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tensors", OPTION_TENSORS)
@pytest.mark.parametrize("change", OPTION_CHANGES)
def test_a_changed_call_with_tensors_of_its_layer_is_made_as_if_it_were_the_first(
    kernels: str, tensors: str, change: str
) -> None:
    """What each layer brings along is compared by type and layout, and handed on itself."""
    own = [{name: each.clone() for name, each in OPTION_TENSORS[tensors].items()} for _ in range(3)]
    calls = [({**base(False)[0], **each}, None) for each in own]
    changed = {**base(False)[0], **changed_options(tensors, change)}, None
    require_each_as_if_first(kernels, [*calls[:2], changed, calls[2]])


@pytest.mark.parametrize("change", [name for name in OPTION_CHANGES if name != "scale of k alone"])
def test_another_kind_of_tensor_is_a_call_of_its_own(change: str) -> None:
    """No library here tells all of them apart, but calls that are settled together are alike."""
    kind = OPTION_TENSORS["sinks"]
    backend, _ = first_calls_of([kind, changed_options("sinks", change), kind])
    assert [known.uses for known in backend._plans.current.known] == [1, 0]


def first_calls_of(changes: Sequence[dict[str, Any]]) -> tuple[Any, Library]:
    """Return a backend whose layers of one pass made these calls over a cache, and its library."""
    library, record = _hopper()
    backend = new_backend()
    backend._kernels = record
    batch = SimpleNamespace()
    with running(backend):
        for change in changes:
            backend._plans.begin_layer(object(), batch, backend.forward_metadata)
            upstream.flash_attn_with_kvcache(**base(False)[0] | change)
    return backend, library


@pytest.mark.parametrize("kernels", KERNELS)
def test_calls_like_one_before_are_known(kernels: str) -> None:
    """The tests above say something only if calls are recognised at all."""
    library, record = KERNELS[kernels]()
    backend = new_backend()
    backend._kernels = record
    batch, layers = SimpleNamespace(), [object() for _ in range(3)]
    with running(backend):
        for layer in layers:
            backend._plans.begin_layer(layer, batch, backend.forward_metadata)
            upstream.flash_attn_with_kvcache(**base(own_keys=False)[0])
    assert [known.uses for known in backend._plans.current.known] == [2]
    assert len(library.calls) == 3


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_layer_with_keys_of_its_own_goes_raw_after_one_without(kernels: str) -> None:
    """A call is not known by one that had no keys of its layer's own to be served from."""
    made = [base(own_keys=False), base(own_keys=True)]
    served = outcomes(kernels, made)
    assert [each[0] for each in served] == ["flash_attn_with_kvcache", "flash_attn_varlen_func"]
    assert served == [outcomes(kernels, [each])[0] for each in made]


@pytest.mark.parametrize("change", ["own k gaps", "own v gaps"])
def test_raw_keys_of_another_layout_are_a_call_of_their_own(change: str) -> None:
    """No rule of an adapter asks for it, but calls that are settled together have one layout."""
    library, record = _hopper()
    backend = new_backend()
    backend._kernels, backend._new_rows = record, ROWS
    backend.forward_metadata = SimpleNamespace(cu_seqlens_q=OFFSETS, cache_seqlens_int32=LENGTHS)
    batch, layers = SimpleNamespace(), [object(), object()]
    with running(backend):
        for layer, own_keys in zip(layers, (base(True)[1], RAW_CHANGES[change][1]), strict=True):
            backend._plans.begin_layer(layer, batch, backend.forward_metadata)
            backend.own_keys = own_keys
            upstream.flash_attn_with_kvcache(**base(True)[0])
    assert [known.uses for known in backend._plans.current.known] == [0, 0]
    assert [name for name, _ in library.calls] == ["flash_attn_varlen_func"] * 2


@pytest.mark.parametrize("change", ["k_cache dtype", "v_cache dtype", "own k dtype", "own v dtype"])
def test_keys_and_values_of_another_dtype_than_the_cache_read_the_cache(change: str) -> None:
    """Attention must not see in full what the cache rounds."""
    more, own_keys = RAW_CHANGES[change]
    (served,) = outcomes("hopper", [({**base(True)[0], **more}, own_keys)])
    assert served[0] == "flash_attn_with_kvcache"


# --- the first calls of passes --------------------------------------------------------------------

PASS_CHANGES: dict[str, dict[str, Any]] = {
    "requests": {
        "q": zeros(4, HEADS, DIM),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "cache_seqlens": LENGTHS[:2],
        "cu_seqlens_q": OFFSETS[:3],
    },
    "one request": {
        "page_table": torch.zeros(1, 2, dtype=torch.int32),
        "cache_seqlens": LENGTHS[:1],
        "cu_seqlens_q": torch.tensor([0, ROWS], dtype=torch.int32),
        "max_seqlen_q": ROWS,
    },
    "one request and padding": {
        "page_table": torch.zeros(1, 2, dtype=torch.int32),
        "cache_seqlens": LENGTHS[:1],
        "cu_seqlens_q": torch.tensor([0, 2], dtype=torch.int32),
    },
    "page table dtype": {"page_table": TABLE.long()},
    "lengths dtype": {"cache_seqlens": LENGTHS.long()},
    "offsets dtype": {"cu_seqlens_q": OFFSETS.long()},
    "no longest query": {"max_seqlen_q": ABSENT},
    "no page table": {"page_table": None},
}
"""Changes that come from one pass to the next, beside those within a pass."""
FIRST_CHANGES = {name: (change, None) for name, change in {**CHANGES, **PASS_CHANGES}.items()}
FIRST_RAW_CHANGES = RAW_CHANGES | {
    name: (change, (zeros(*OWN), zeros(*OWN))) for name, change in PASS_CHANGES.items()
}
_LENGTHS_OF_PASS = ("page_table", "cache_seqlens", "cu_seqlens_q")


def of_new_pass(own_keys: bool, change: Made | None = None) -> tuple[Made, dict[str, Any]]:
    """A call over lengths of its own, changed, and the lengths that its pass has."""
    arguments, keys = base(own_keys)
    lengths = {name: arguments[name].clone() for name in _LENGTHS_OF_PASS}
    more, keys = ({}, keys) if change is None else change
    # What replaces the lengths of a whole pass replaces them in what upstream says of it, too.
    if len(more) > 1:
        lengths |= {name: value for name, value in more.items() if name in lengths}
    made = {**arguments, **lengths, **more}
    return ({name: value for name, value in made.items() if value is not ABSENT}, keys), lengths


def require_passes_as_if_first(kernels: str, change: Made, own_keys: bool) -> list[Any]:
    """Compare what comes of four passes with what comes of each alone; return the former."""
    passes = [of_new_pass(own_keys), of_new_pass(own_keys)]
    passes += [of_new_pass(own_keys, change), of_new_pass(own_keys)]
    calls, lengths = [made for made, _ in passes], [each for _, each in passes]
    served = outcomes(kernels, calls, lengths)
    for index, each in enumerate(served):
        alone = outcomes(kernels, [calls[index]], [lengths[index]])
        assert each == alone[0]
    return served


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("change", FIRST_CHANGES)
def test_the_first_call_of_a_pass_is_made_as_if_there_had_been_none(
    kernels: str, change: str
) -> None:
    """It is known from the pass before, and all that a library can tell apart is compared."""
    require_passes_as_if_first(kernels, FIRST_CHANGES[change], own_keys=False)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("change", FIRST_RAW_CHANGES)
def test_the_first_call_over_raw_keys_is_made_as_if_there_had_been_none(
    kernels: str, change: str
) -> None:
    """The same where the layers' own keys serve."""
    served = require_passes_as_if_first(kernels, FIRST_RAW_CHANGES[change], own_keys=True)
    assert [each[0] for each in served[:2]] == ["flash_attn_varlen_func"] * 2


def first_calls(
    monkeypatch: pytest.MonkeyPatch, kernels: str, calls: Sequence[tuple[Made, dict[str, Any]]]
) -> tuple[Any, list[int]]:
    """Make each call in two layers of a pass; return the backend, and the passes that began anew.

    Those are the passes with a call that was described anew.
    """
    _, record = KERNELS[kernels]()
    backend = new_backend()
    backend._kernels = record
    described: list[int] = []
    anew = backend.call_unlike_others
    layers = [object(), object()]
    with running(backend):
        for index, ((arguments, own_keys), lengths) in enumerate(calls):

            def noted(call: dict[str, Any], index: int = index) -> Any:
                described.append(index)
                return anew(call)

            monkeypatch.setattr(backend, "call_unlike_others", noted)
            backend._new_rows = arguments["q"].shape[0]
            backend.forward_metadata = SimpleNamespace(
                cu_seqlens_q=lengths["cu_seqlens_q"], cache_seqlens_int32=lengths["cache_seqlens"]
            )
            for layer in layers:
                backend._plans.begin_layer(layer, None, backend.forward_metadata)
                backend.own_keys = own_keys
                upstream.flash_attn_with_kvcache(**arguments)
    return backend, described


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("own_keys", [False, True], ids=["paged", "raw"])
@pytest.mark.parametrize("size", ["as many", "other"])
def test_only_the_first_pass_describes_a_call_anew(
    monkeypatch: pytest.MonkeyPatch, kernels: str, own_keys: bool, size: str
) -> None:
    """The tests above say something only if first calls are recognised; the counts stay right."""
    change = {} if size == "as many" else PASS_CHANGES["requests"]
    rows = len(change["q"]) if change else ROWS
    keys = (zeros(rows, *OWN[1:]), zeros(rows, *OWN[1:])) if own_keys else None
    calls = [of_new_pass(own_keys), of_new_pass(own_keys, (change, keys)), of_new_pass(own_keys)]
    backend, described = first_calls(monkeypatch, kernels, calls)
    assert described == [0]
    report = backend.musa_fa3_report()["statistics"]
    assert (report["calls"], report["raw_calls"]) == (6, 6 if own_keys else 0)
    plans = 3 if kernels == "mate" and not own_keys else 0
    assert (report["plans"], report["reuses"]) == (plans, plans)


def test_a_pass_of_another_kind_between_two_keeps_what_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and decodes take turns in a server."""
    causal = ({"causal": False}, None)
    kinds = [({}, None), causal, ({}, None), causal, causal, ({}, None)]
    calls = [of_new_pass(False, kind) for kind in kinds]
    assert first_calls(monkeypatch, "mate", calls)[1] == [0, 1]


@pytest.mark.parametrize("change", ["causal", "page table dtype"])
def test_a_pass_that_is_over_holds_no_tensor(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """What is known of a pass that the running one is not like outlives its lengths and plan.

    Lengths of another type are never taken over, those of a call with other options are given back.
    """
    first, other = of_new_pass(False), of_new_pass(False, FIRST_CHANGES[change])
    backend, _ = first_calls(monkeypatch, "mate", [first, other])
    (known,) = backend._plans.current.earlier
    held = [known.page_table, known.cache_seqlens, known.cu_seqlens_q, known.plan]
    held += [known.keywords[name] for name in (*_LENGTHS_OF_PASS, "scheduler_metadata")]
    assert not any(isinstance(each, torch.Tensor) for each in held)


def test_few_calls_of_earlier_passes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that changes its options for ever holds no more than a few."""
    calls = [of_new_pass(False, ({"softmax_scale": index / 10}, None)) for index in range(7)]
    backend, _ = first_calls(monkeypatch, "mate", calls)
    assert len(backend._plans.current.earlier) == 4


def functions_called(rows: Sequence[int | None]) -> list[str]:
    """Make a call in a pass for each of these numbers of new rows; return the functions called."""
    library, record = _mate()
    backend = new_backend()
    backend._kernels = record
    with running(backend):
        for count in rows:
            (arguments, own_keys), lengths = of_new_pass(True)
            backend._new_rows, backend.own_keys = count, None if count is None else own_keys
            backend.forward_metadata = SimpleNamespace(
                cu_seqlens_q=lengths["cu_seqlens_q"], cache_seqlens_int32=lengths["cache_seqlens"]
            )
            backend._plans.begin_layer(object(), None, backend.forward_metadata)
            upstream.flash_attn_with_kvcache(**arguments)
    return [name for name, _ in library.calls]


@pytest.mark.parametrize("count", [ROWS - 1, None], ids=["padding", "a prefix"])
def test_raw_keys_of_another_pass_serve_no_pass_that_reads_the_cache(count: int | None) -> None:
    """Rows that only pad the batch, or a prefix, send a call to the cache, whatever is known."""
    names = functions_called([ROWS, count])
    assert names == ["flash_attn_varlen_func", "flash_attn_with_kvcache"]


def test_a_pass_after_one_over_padding_reads_raw_keys_again() -> None:
    """Its call is like that of the pass before, but for what the batch is said to be."""
    names = functions_called([ROWS - 1, ROWS])
    assert names == ["flash_attn_with_kvcache", "flash_attn_varlen_func"]


@pytest.mark.parametrize("passes", [1, 2], ids=["in a pass", "in the next one"])
def test_calls_by_position_are_served_as_well(passes: int) -> None:
    """Upstream names queries, keys and values; another caller may not."""
    library, record = _mate()
    backend = new_backend()
    backend._kernels = record
    with running(backend):
        arguments, _ = base(own_keys=False)
        tensors = [arguments.pop(name) for name in TENSORS]
        backend._plans.begin_layer(object(), None, None)
        upstream.flash_attn_with_kvcache(**dict(zip(TENSORS, tensors, strict=True)), **arguments)
        backend._plans.begin_layer(object(), None, object() if passes == 2 else None)
        upstream.flash_attn_with_kvcache(*tensors, **arguments)
    (_, named), (_, by_position) = library.calls
    assert [named[name] is by_position[name] for name in TENSORS] == [True] * 3


# --- upstream's own calls over raw keys, as in prefill of MLA -------------------------------------

VARLEN: dict[str, Any] = {
    "cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "max_seqlen_q": 2, "max_seqlen_k": 2,
    "softmax_scale": 0.125, "causal": True, "return_softmax_lse": False, "out": None, "ver": 3,
}  # fmt: skip
ONE_REQUEST = {
    "cu_seqlens_q": torch.tensor([0, ROWS], dtype=torch.int32), "max_seqlen_q": ROWS,
    "cu_seqlens_k": torch.tensor([0, ROWS], dtype=torch.int32), "max_seqlen_k": ROWS,
}  # fmt: skip
VARLEN_TENSORS = {"q": Q, "k": OWN, "v": OWN}
VARLEN_CHANGES: dict[str, dict[str, Any]] = {
    **{
        f"{name} {what}": {name: made}
        for name, shape in VARLEN_TENSORS.items()
        for what, made in others(*shape, head_dim=192, more_rows=True).items()
    },
    "offsets of queries": {"cu_seqlens_q": OFFSETS.clone()},
    "offsets of keys": {"cu_seqlens_k": OFFSETS.clone()},
    "longest query": {"max_seqlen_q": 3},
    "longest key": {"max_seqlen_k": 3},
    "softmax_scale": {"softmax_scale": 0.5},
    "causal": {"causal": False},
    "return_softmax_lse": {"return_softmax_lse": True},
    "out": {"out": zeros(*Q)},
    "ver": {"ver": 4},
    "no out": {"out": ABSENT},
    "softcap": {"softcap": 30.0},
    "window_size": {"window_size": (7, 0)},
    "sinks": {"sinks": zeros(HEADS)},
    "score_mod": {"score_mod": object()},
    "one request": ONE_REQUEST,
}


def varlen(change: dict[str, Any] | None = None) -> Made:
    """A call of a layer over keys that it has just computed."""
    tensors = {name: zeros(*shape) for name, shape in VARLEN_TENSORS.items()}
    made = VARLEN | tensors | (change or {})
    return {name: value for name, value in made.items() if value is not ABSENT}, None


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("change", VARLEN_CHANGES)
@pytest.mark.parametrize("requests", [{}, ONE_REQUEST], ids=["three requests", "one request"])
def test_a_changed_varlen_call_is_made_as_if_it_were_the_first(
    kernels: str, change: str, requests: dict[str, Any]
) -> None:
    """Dtypes, layouts, shapes, lengths and options, of one request and of several."""
    calls = [varlen(requests) for _ in range(2)]
    calls += [varlen({**requests, **VARLEN_CHANGES[change]}), varlen(requests)]
    require_each_as_if_first(kernels, calls, "flash_attn_varlen_func")


def backend_after_varlen_calls(
    calls: Sequence[Made], kernels: str = "mate", **attributes: Any
) -> tuple[Any, Library]:
    """Return a backend whose layers of one pass have made these calls, and their library."""
    library, record = KERNELS[kernels]()
    backend = new_backend()
    vars(backend).update(_kernels=record, **attributes)
    batch = SimpleNamespace()
    with running(backend):
        for arguments, _ in calls:
            backend._plans.begin_layer(object(), batch, backend.forward_metadata)
            upstream.flash_attn_varlen_func(**arguments)
    return backend, library


@pytest.mark.parametrize("kernels", KERNELS)
def test_varlen_calls_like_one_before_are_known_and_counted(kernels: str) -> None:
    """The test above says something only if calls are recognised at all."""
    backend, library = backend_after_varlen_calls([varlen() for _ in range(3)], kernels)
    assert [known.uses for known in backend._plans.current.known_varlen] == [2]
    assert len(library.calls) == backend.musa_fa3_report()["statistics"]["calls"] == 3


@pytest.mark.parametrize("change", ["q gaps", "k gaps", "v gaps", "v head dim"])
def test_a_varlen_call_of_another_layout_is_one_of_its_own(change: str) -> None:
    """No rule of an adapter asks for it, but calls that are settled together are alike."""
    calls = [varlen(), varlen(VARLEN_CHANGES[change]), varlen()]
    backend, _ = backend_after_varlen_calls(calls, "hopper")
    assert [known.uses for known in backend._plans.current.known_varlen] == [1, 0]


def test_chunks_of_a_prefix_are_served_and_not_kept() -> None:
    """Each has lengths of its own in every layer, and a pass may have hundreds of them."""
    chunks = [varlen({"cu_seqlens_k": OFFSETS.clone()}) for _ in range(9)]
    backend, library = backend_after_varlen_calls([varlen(), *chunks, varlen()])
    assert len(backend._plans.current.known_varlen) == 2
    assert backend._plans.current.known_varlen[0].uses == 1
    assert len(library.calls) == 11


@pytest.mark.parametrize("ends", ["metadata", "batch"])
def test_a_pass_of_varlen_calls_alone_is_let_go_of(ends: str) -> None:
    """What is known of raw keys ends with the pass, in which no call was over a cache."""
    backend, _ = backend_after_varlen_calls([varlen()])
    if ends == "metadata":
        backend._plans.end_pass()
    else:
        backend._plans.begin_layer(object(), SimpleNamespace(), backend.forward_metadata)
    assert backend._plans.current.known_varlen == []
    assert backend.musa_fa3_report()["statistics"]["calls"] == 1


def test_nothing_is_known_of_varlen_calls_where_every_call_is_looked_at() -> None:
    """A check of the outputs sees each call, and so does whoever samples them."""
    for attributes in ({"_remembers": False}, {"_sampler": SimpleNamespace(report=dict)}):
        backend, library = backend_after_varlen_calls([varlen(), varlen()], **attributes)
        assert backend._plans.current.known_varlen == []
        assert len(library.calls) == 2


VARLEN_PASS_CHANGES: dict[str, dict[str, Any]] = {
    "requests": {
        "q": zeros(4, HEADS, DIM), "k": zeros(4, *OWN[1:]), "v": zeros(4, *OWN[1:]),
        "cu_seqlens_q": OFFSETS[:3], "cu_seqlens_k": OFFSETS[:3],
    },
    "one request and padding": {
        "cu_seqlens_q": OFFSETS[:2], "cu_seqlens_k": OFFSETS[:2],
        "max_seqlen_q": 2, "max_seqlen_k": 2,
    },
    "offsets dtype": {"cu_seqlens_q": OFFSETS.long()},
    "offsets of keys dtype": {"cu_seqlens_k": OFFSETS.long()},
    "offsets gaps": {"cu_seqlens_k": torch.zeros(8, dtype=torch.int32)[::2]},
    "no longest key": {"max_seqlen_k": ABSENT},
    "no offsets": {"cu_seqlens_k": None},
}  # fmt: skip
"""Changes that come from one pass to the next, beside those within a pass."""
FIRST_VARLEN_CHANGES = VARLEN_CHANGES | VARLEN_PASS_CHANGES


def varlen_of_new_pass(change: dict[str, Any], requests: dict[str, Any]) -> Made:
    """A call over lengths of its own, changed."""
    made = VARLEN | requests
    lengths = {name: made[name].clone() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    return varlen({**requests, **lengths, **change})


def varlen_outcomes(kernels: str, calls: Sequence[Made]) -> list[Any]:
    """Make each call in two layers of a pass of its own; return what the library saw, or why not.

    The second layer of a pass is there to be served as the first.
    """
    library, record = KERNELS[kernels]()
    backend = new_backend()
    backend._kernels = record
    seen: list[Any] = []
    with running(backend):
        for arguments, _ in calls:
            for layer in (object(), object()):
                backend._plans.begin_layer(layer, None, arguments)
                try:
                    upstream.flash_attn_varlen_func(**arguments)
                except UnsupportedKernelArgument as refusal:
                    seen.append(str(refusal))
                else:
                    seen.append(_by_identity(library.calls[-1][1]))
    return seen


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("change", FIRST_VARLEN_CHANGES)
@pytest.mark.parametrize("requests", [{}, ONE_REQUEST], ids=["three requests", "one request"])
def test_the_first_varlen_call_of_a_pass_is_made_as_if_there_had_been_none(
    kernels: str, change: str, requests: dict[str, Any]
) -> None:
    """It is known from the pass before, and all that a library can tell apart is compared."""
    changes: list[dict[str, Any]] = [{}, {}, FIRST_VARLEN_CHANGES[change], {}]
    passes = [varlen_of_new_pass(each, requests) for each in changes]
    served = varlen_outcomes(kernels, passes)
    alone = [outcome for made in passes for outcome in varlen_outcomes(kernels, [made])]
    assert served == alone


@pytest.mark.parametrize("change", [{}, VARLEN_PASS_CHANGES["requests"]], ids=["equal", "other"])
def test_only_the_first_pass_describes_a_varlen_call_anew(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """The test above says something only if first calls are recognised; the counts stay right."""
    library, record = _mate()
    backend = new_backend()
    backend._kernels = record
    described: list[int] = []
    anew = backend.call_flash_attn_varlen_func
    with running(backend):
        for index, each in enumerate(({}, change, {})):

            def noted(call: dict[str, Any], index: int = index) -> Any:
                described.append(index)
                return anew(call)

            monkeypatch.setattr(backend, "call_flash_attn_varlen_func", noted)
            arguments, _ = varlen_of_new_pass(each, {})
            for layer in (object(), object()):
                backend._plans.begin_layer(layer, None, arguments)
                upstream.flash_attn_varlen_func(**arguments)
    assert described == [0]
    assert len(library.calls) == backend.musa_fa3_report()["statistics"]["calls"] == 6


def test_a_pass_without_padding_after_one_with_is_decided_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MATE's adapter looks at each call of a padded pass, and at no more than those."""
    looked: list[int] = []
    library, record = _mate()
    translation = CallAdapter._translation
    backend = new_backend()
    backend._kernels = record
    padding = VARLEN_PASS_CHANGES["one request and padding"]
    with running(backend):
        for index, each in enumerate((padding, ONE_REQUEST)):

            def noted(site: Any, call: dict[str, Any], index: int = index) -> Any:
                looked.append(index)
                return translation(site, call)

            monkeypatch.setattr(CallAdapter, "_translation", noted)
            arguments, _ = varlen_of_new_pass(each, ONE_REQUEST)
            for layer in [object() for _ in range(4)]:
                backend._plans.begin_layer(layer, None, arguments)
                upstream.flash_attn_varlen_func(**arguments)
    assert looked.count(0) >= 4
    assert looked.count(1) == 1
    assert [call["seqused_k"] is None for _, call in library.calls] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("taken_over", [False, True], ids=["left", "asked for another kind"])
def test_a_varlen_pass_that_is_over_holds_no_tensor(taken_over: bool) -> None:
    """What is known of it outlives its lengths, and so it does where the next one is another."""
    backend, _ = backend_after_varlen_calls([varlen()])
    backend._plans.end_pass()
    (known,) = backend._plans.current.earlier_varlen
    if taken_over:
        tensors = [zeros(*shape) for shape in (Q, OWN, OWN)]
        assert not known.begin(*tensors, OFFSETS, OFFSETS, (2, 2, 0.5, True, False, None, 3))
    held = [known._cu_seqlens_q, known._cu_seqlens_k, *known.keywords.values()]
    assert not any(isinstance(each, torch.Tensor) for each in held)


def test_few_varlen_calls_of_earlier_passes_are_kept() -> None:
    """A server that changes its options for ever holds no more than a few."""
    scales = [varlen_of_new_pass({"softmax_scale": index / 10}, {}) for index in range(9)]
    library, record = _mate()
    backend = new_backend()
    backend._kernels = record
    with running(backend):
        for arguments, _ in scales:
            backend._plans.begin_layer(object(), None, arguments)
            upstream.flash_attn_varlen_func(**arguments)
    assert len(library.calls) == 9
    assert len(backend._plans.current.earlier_varlen) == 4
