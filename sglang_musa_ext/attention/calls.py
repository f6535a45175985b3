"""The values that a kernel call's plan depends on, and the test that two calls are alike.

Which keywords plans depend on is said by the contract with SGLang, ``upstream.rows.kernels``:
there, a new one is one row.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from sglang_musa_ext.kernels.record import FA3Kernels, Settle, SettledCall
from sglang_musa_ext.upstream.rows.kernels import PLANNED_TENSORS, PLANNED_VALUES

Arguments = dict[str, Any]
"""The keyword arguments of one kernel call."""
OwnKeys = tuple[torch.Tensor, torch.Tensor]
"""Keys and values that a layer has just computed, as its forward got them."""

_UNSET: Mapping[str, Any] = {
    "causal": False,
    "window_size": (-1, -1),
    "attention_chunk": 0,
    "num_splits": 0,
    "sm_margin": 0,
}
"""The values that ``None``, or no argument, stands for where that is not ``None``."""
_GEOMETRY = ("max_seqlen_q", "softcap")
"""Of the values that a plan depends on, those that a geometry has fields of its own for."""
PLANNED_OPTIONS: Mapping[str, Any] = {
    name: _UNSET.get(name) for name in PLANNED_VALUES if name not in _GEOMETRY
}
"""The other ones, each with what its absence stands for.

``get_scheduler_metadata`` has them under the same names.
"""


class CallGeometry(NamedTuple):
    """The geometry of a plan: all that it depends on but tensors' contents; names are FA3's."""

    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    """Capacity of the page table in tokens, by which the kernel too bounds its splits."""
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int
    qkv_dtype: torch.dtype
    page_size: int | None
    has_softcap: bool
    has_qv: bool
    device: torch.device
    options: tuple[Any, ...]
    """Values of :data:`PLANNED_OPTIONS`, in its order."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], kernels: FA3Kernels) -> CallGeometry:
        """Return the geometry of a ``flash_attn_with_kvcache`` call."""
        get = arguments.get
        q, k_cache, page_table = arguments["q"], arguments["k_cache"], get("page_table")
        cu_seqlens_q = get("cu_seqlens_q")
        _, page_size, num_heads_kv, _ = k_cache.shape
        pages = 1 if page_table is None else page_table.shape[1]
        return cls(
            batch_size=q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
            max_seqlen_q=q.shape[1] if cu_seqlens_q is None else arguments["max_seqlen_q"],
            max_seqlen_k=page_size * pages,
            num_heads_q=q.shape[-2],
            num_heads_kv=num_heads_kv,
            headdim=q.shape[-1],
            headdim_v=arguments["v_cache"].shape[-1],
            qkv_dtype=q.dtype,
            page_size=None if page_table is None else page_size,
            has_softcap=kernels.metadata_uses_softcap and get("softcap", 0.0) > 0.0,
            has_qv=get("qv") is not None,
            device=q.device,
            options=tuple(_option(get(name), none) for name, none in PLANNED_OPTIONS.items()),
        )

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of ``get_scheduler_metadata`` that are no tensors."""
        fields = self._asdict()
        for name in ("has_qv", "device", "options"):
            del fields[name]
        return fields | dict(zip(PLANNED_OPTIONS, self.options, strict=True))


def _option(value: Any, none: Any) -> Any:
    if value is None:
        return none
    return tuple(value) if isinstance(value, list) else value


def planned_tensors(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a call whose contents its plan depends on, by name."""
    tensors = {}
    for name in PLANNED_TENSORS:
        tensor = arguments.get(name)
        if tensor is not None:
            tensors[name] = tensor
    return tensors


def has_equal_queries(arguments: Mapping[str, Any]) -> bool:
    """Tell without the device whether all requests of a call have the same number of queries."""
    cu_seqlens_q = arguments.get("cu_seqlens_q")
    if cu_seqlens_q is None:
        return True
    return bool(arguments["q"].size(0) == (cu_seqlens_q.size(0) - 1) * arguments["max_seqlen_q"])


# --- calls that are alike -------------------------------------------------------------------------

ABSENT: Any = type("_Absent", (), {"__repr__": lambda self: "ABSENT"})()
"""Stands for an argument that a call does not have."""
OPTIONS = (
    "softmax_scale", "causal", "window_size", "softcap", "return_softmax_lse", "num_splits", "out",
    "ver", "qv", "sinks", "k_descale", "v_descale",
)  # fmt: skip
"""Arguments of a paged call that say how to attend; the last four are tensors of each layer."""
VARLEN_OPTIONS = (
    "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "return_softmax_lse", "out", "ver",
)  # fmt: skip
"""The arguments of upstream's calls over raw keys, beside :data:`VARLEN_TENSORS`."""
VARLEN_TENSORS = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
_TENSORS = ("q", "k_cache", "v_cache")
_LENGTHS = ("page_table", "cache_seqlens", "cu_seqlens_q")
_UPSTREAMS = {*OPTIONS, *_TENSORS, *_LENGTHS, "max_seqlen_q", "scheduler_metadata"}
_PLACES = range(len(OPTIONS))
_get_lengths = operator.itemgetter("page_table", "cache_seqlens", "cu_seqlens_q")


def is_upstreams(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a call is one of those that upstream makes for every layer.

    Those have nothing but the arguments above; another one may mean that the call appends keys.
    """
    tensors = [arguments.get(name) for name in (*_TENSORS, *_LENGTHS)]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    return "max_seqlen_q" in arguments and _UPSTREAMS.issuperset(arguments)


class CallSite:
    """The properties that upstream's paged calls of one kind share, whatever their pass.

    They have equal names and options, and tensors of equal dtypes, layouts and shapes, but for how
    many tokens and requests there are. What is settled by these facts is settled once: the geometry
    but for its counts, and how the kernels are called. Every comparison is of an attribute of the
    call itself, so that a call of another kind is served as one, or refused by name.
    """

    __slots__ = (
        "_others",
        "_others_of",
        "_tensors",
        "drops_plan",
        "geometry",
        "keywords",
        "options",
        "pass_facts",
        "raw_dims",
        "settle",
        "settle_raw",
        "tensor_facts",
        "tensor_options",
    )

    def __init__(self, arguments: Arguments, geometry: CallGeometry, *, drops_plan: bool) -> None:
        """Describe a call that :func:`is_upstreams` accepts.

        Args:
            arguments: of the call, without a plan.
            geometry: of the call.
            drops_plan: whether the kernels ignore the plans of such calls.
        """
        self.geometry = geometry
        self.drops_plan = drops_plan
        self.keywords = geometry.keywords()
        """Those of ``get_scheduler_metadata`` for this call; others of its kind have some else."""
        self.settle: Settle | None = None
        """Settles how the kernels are called for the calls of one pass."""
        self.settle_raw: Settle | None = None
        """Likewise over raw keys, once such a call was served, so that names and options allow it.
        """
        self.raw_dims: Any = None
        """The heads and head dimensions of the raw keys and values of that call."""
        self.tensor_facts = _tensor_facts(arguments)
        options = options_of(arguments)
        self.pass_facts = pass_facts(*_get_lengths(arguments))
        places = {index for index, value in enumerate(options) if isinstance(value, torch.Tensor)}
        self.tensor_options = tuple([OPTIONS[index] for index in sorted(places)])
        self._tensors = [(index, _layout(options[index])) for index in sorted(places)]
        """The places of tensors among the options, and what is compared of each."""
        self._others_of = operator.itemgetter(*(index for index in _PLACES if index not in places))
        self._others = self._others_of(options)
        """The other options."""
        self.options = None if places else options
        """``None``: there are tensors among them."""

    def is_of(self, arguments: Arguments) -> bool:
        """Tell whether a call with the names of this kind is of it, in any pass."""
        return (
            _tensor_facts(arguments) == self.tensor_facts
            and pass_facts(*_get_lengths(arguments)) == self.pass_facts
            and self.has_options(options_of(arguments))
        )

    def has_options(self, options: tuple[Any, ...]) -> bool:
        """Tell whether these are this kind's options, and tensors among them look alike."""
        if self.options is not None:
            return options == self.options
        if self._others_of(options) != self._others:
            return False
        for index, layout in self._tensors:
            value = options[index]
            if not isinstance(value, torch.Tensor) or _layout(value) != layout:
                return False
        return True

    def geometry_of(self, arguments: Arguments) -> tuple[CallGeometry, dict[str, Any]]:
        """Return the geometry of a call of this kind, and as keywords."""
        counts = (
            arguments["cu_seqlens_q"].shape[0] - 1,
            arguments["max_seqlen_q"],
            arguments["k_cache"].shape[1] * arguments["page_table"].shape[1],
        )
        geometry = tuple.__new__(CallGeometry, (*counts, *self.geometry[3:]))
        keywords = self.keywords.copy()
        keywords["batch_size"], keywords["max_seqlen_q"], keywords["max_seqlen_k"] = counts
        return geometry, keywords


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what is compared of a tensor among the options."""
    dims = tensor.dim()
    if dims == 0:
        return tensor.dtype, dims
    return tensor.dtype, dims, tensor.size(-1), tensor.stride(-1)


def options_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values of :data:`OPTIONS`, with :data:`ABSENT` for those that a call lacks."""
    get = arguments.get
    return tuple([get(name, ABSENT) for name in OPTIONS])


def _tensor_facts(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what is the same of the queries and the cache in all calls of a kind."""
    q, k, v = arguments["q"], arguments["k_cache"], arguments["v_cache"]
    facts = q.shape[1:], q.dtype, q.device, k.dtype, v.dtype
    return *facts, k.shape, v.shape, density(k), density(v)


def pass_facts(page_table: Any, cache_seqlens: Any, cu_seqlens_q: Any) -> Any:
    """Return what a library may ask of the page table and the lengths beside their shapes.

    ``None``: not all of them are tensors.
    """
    for tensor in (page_table, cache_seqlens, cu_seqlens_q):
        if not isinstance(tensor, torch.Tensor):
            return None
    dense = page_table.is_contiguous()
    return page_table.dtype, dense, cache_seqlens.dtype, cu_seqlens_q.dtype


def density(tensor: torch.Tensor) -> Any:
    """Return ``True``, or the strides of a tensor whose elements do not follow one another."""
    return tensor.is_contiguous() or tensor.stride()


class KnownCall:
    """A call over a paged cache that the running pass has seen, and what calls like it get.

    Like it are calls of the same kind over the very same lengths, with equally many rows: their
    plans are equal, and so is how the kernels are called. Nothing compares dtypes, layouts and
    options after :meth:`matches`; it is what keeps a call in which one of them changed from being
    served as the call before.

    Lifetime: a pass. When that is over, :meth:`release` takes its tensors away, and :meth:`begin`
    may give it those of a later pass, whose first call is then served without being described anew.
    """

    __slots__ = (
        "_nothing",
        "_own_facts",
        "_own_names",
        "_q_device",
        "_settled",
        "_varying",
        "_versions",
        "cache_seqlens",
        "cu_seqlens_q",
        "function",
        "in_place",
        "k_dense",
        "k_dtype",
        "k_shape",
        "keywords",
        "max_seqlen_q",
        "options",
        "page_table",
        "plan",
        "q_dtype",
        "q_shape",
        "role",
        "site",
        "unsplit",
        "uses",
        "v_dense",
        "v_dtype",
        "v_shape",
    )
    raw = False
    """True if such calls are served from the layer's own keys instead of the cache."""
    of_a_pass: ClassVar[tuple[str, ...]] = (*_LENGTHS, "max_seqlen_q", "scheduler_metadata")
    """FA3's names of the arguments that another pass has others of."""

    def __init__(
        self, site: CallSite, arguments: Arguments, settled: SettledCall, own_keys: OwnKeys | None
    ) -> None:
        """Describe a call of the kind ``site``.

        Args:
            site: the kind of the call.
            arguments: of the call.
            settled: how the kernels are called for it.
            own_keys: the layer's own keys and values, where such calls may use them.
        """
        self.site, self._settled = site, settled
        self.function, self.keywords = settled.function, settled.keywords
        own = settled.own_names
        self._own_names = [(name, own[name]) for name in self.of_a_pass if name in own]
        self._nothing = dict.fromkeys([own for _, own in self._own_names])
        self._varying = [(OPTIONS.index(name), own) for name, own in settled.varying]
        self.plan: Any = None
        self.in_place: Any = None
        """For a plan in a workspace: the entry that says that the workspace still holds it."""
        self.role = -1
        """For a plan in a workspace: the call role whose slot that is."""
        self.unsplit = False
        """True if the kernels would not split such calls, so that they have no plan."""
        self.uses = 0
        """Calls that were served as this one and are not in the statistics yet."""
        self.q_shape, self.max_seqlen_q = arguments["q"].shape, arguments["max_seqlen_q"]
        self._hold(*_get_lengths(arguments))
        self._own_facts = None if own_keys is None else own_key_facts(own_keys)
        (
            _, self.q_dtype, self._q_device, self.k_dtype, self.v_dtype, self.k_shape,
            self.v_shape, self.k_dense, self.v_dense,
        ) = site.tensor_facts  # fmt: skip
        self.options = site.options
        """``None``: there are tensors among them."""

    def _hold(self, page_table: Any, cache_seqlens: Any, cu_seqlens_q: Any) -> None:
        """Hold the tensors of a pass, so that no others can take their places."""
        self.page_table = page_table
        self.cache_seqlens, self.cu_seqlens_q = cache_seqlens, cu_seqlens_q
        versions = _version(cache_seqlens), _version(cu_seqlens_q)
        self._versions = None if versions == (None, None) else versions

    def release(self) -> None:
        """Let go of the tensors of a pass that is over; no call is like this one from here on."""
        self.page_table = self.cache_seqlens = self.cu_seqlens_q = ABSENT
        self.plan = None
        self.keywords.update(self._nothing)

    def begin(
        self, q: Any, page_table: Any, cache_seqlens: Any, cu_seqlens_q: Any, max_seqlen_q: Any
    ) -> bool:
        """Take over the lengths of another pass, if they are of the same kind.

        Whether the call that has them is like this one is for :meth:`matches` to say.
        """
        if max_seqlen_q is ABSENT or q.shape[1:] != self.q_shape[1:]:
            return False
        if pass_facts(page_table, cache_seqlens, cu_seqlens_q) != self.site.pass_facts:
            return False
        self._hold(page_table, cache_seqlens, cu_seqlens_q)
        self.q_shape, self.max_seqlen_q = q.shape, max_seqlen_q
        return True

    def continues(self, q: Any, k: Any, v: Any) -> dict[str, Any] | None:
        """Return the arguments of a call over the lengths that :meth:`begin` has taken over.

        They are those that a pass has of its own, under FA3's names. ``None``: the call needs a
        change that those before did not need, and is to be described anew.
        """
        arguments = self._arguments_of_pass(q, k, v)
        return None if self._settled.is_changed_by_steps(arguments) else arguments

    def settle(self, arguments: dict[str, Any]) -> None:
        """Have the kernels called with what a pass has of its own."""
        for name, own in self._own_names:
            self.keywords[own] = arguments[name]

    def _arguments_of_pass(self, q: Any, k: Any, v: Any) -> dict[str, Any]:
        return {
            "q": q,
            "k_cache": k,
            "v_cache": v,
            "page_table": self.page_table,
            "cache_seqlens": self.cache_seqlens,
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "scheduler_metadata": None,
        }

    def matches(
        self, q: Any, k_cache: Any, v_cache: Any, page_table: Any, cache_seqlens: Any,
        cu_seqlens_q: Any, max_seqlen_q: Any, options: tuple[Any, ...], own_keys: OwnKeys | None,
    ) -> bool:  # fmt: skip
        """Tell whether a call is like this one; ``options`` are the values of :data:`OPTIONS`."""
        return (
            cache_seqlens is self.cache_seqlens
            and cu_seqlens_q is self.cu_seqlens_q
            and max_seqlen_q == self.max_seqlen_q
            and (options == self.options or self._has_options(options))
            and q.shape == self.q_shape
            and q.dtype is self.q_dtype
            and k_cache.dtype is self.k_dtype
            and v_cache.dtype is self.v_dtype
            and k_cache.shape == self.k_shape
            and v_cache.shape == self.v_shape
            and (k_cache.is_contiguous() or k_cache.stride()) == self.k_dense
            and (v_cache.is_contiguous() or v_cache.stride()) == self.v_dense
            and q.device == self._q_device
            and (self._versions is None or self._has_versions(cache_seqlens, cu_seqlens_q))
            and (page_table is self.page_table or self._takes_table(page_table))
            and (own_keys is self._own_facts or self._has_own_keys(own_keys))
        )

    def _has_options(self, options: tuple[Any, ...]) -> bool:
        return self.options is None and self.site.has_options(options)

    def _has_versions(self, cache_seqlens: torch.Tensor, cu_seqlens_q: torch.Tensor) -> bool:
        return self._versions == (_version(cache_seqlens), _version(cu_seqlens_q))

    def _has_own_keys(self, own_keys: OwnKeys | None) -> bool:
        return own_keys is not None and own_key_facts(own_keys) == self._own_facts

    def keywords_with(self, options: tuple[Any, ...]) -> Arguments:
        """Return the keywords of a call like this one that has other tensors among its options."""
        keywords = self.keywords.copy()
        for index, own in self._varying:
            keywords[own] = options[index]
        return keywords

    def _takes_table(self, page_table: Any) -> bool:
        """Take another page table of the same shape for this and the calls after it."""
        if page_table is None or page_table is ABSENT or page_table.shape != self.page_table.shape:
            return False
        if _table_facts(page_table) != _table_facts(self.page_table):
            return False
        self.page_table = self.keywords[self._settled.own_names["page_table"]] = page_table
        return True


class KnownRawCall(KnownCall):
    """A call over a paged cache that is served from its layer's own keys."""

    __slots__ = ()
    raw = True
    of_a_pass = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

    def begin(
        self, q: Any, page_table: Any, cache_seqlens: Any, cu_seqlens_q: Any, max_seqlen_q: Any
    ) -> bool:
        """Take over the lengths of another pass, which has as many keys as queries."""
        if not super().begin(q, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q):
            return False
        rows = q.shape[:1]
        self.k_shape, self.v_shape = rows + self.k_shape[1:], rows + self.v_shape[1:]
        return True

    def __init__(
        self, site: CallSite, arguments: Arguments, settled: SettledCall, own_keys: OwnKeys
    ) -> None:
        """Describe a call of the kind ``site`` that ``own_keys`` serve."""
        super().__init__(site, arguments, settled, None)
        k, v = own_keys
        self.k_dtype, self.k_shape, self.k_dense = k.dtype, k.shape, density(k)
        self.v_dtype, self.v_shape, self.v_dense = v.dtype, v.shape, density(v)

    def _arguments_of_pass(self, q: Any, k: Any, v: Any) -> dict[str, Any]:
        return {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_q,
        }

    def matches(
        self, q: Any, k_cache: Any, v_cache: Any, page_table: Any, cache_seqlens: Any,
        cu_seqlens_q: Any, max_seqlen_q: Any, options: tuple[Any, ...], own_keys: OwnKeys | None,
    ) -> bool:  # fmt: skip
        """Tell whether a call is like this one. Of the cache it matters only what type it has."""
        if own_keys is None:
            return False
        k, v = own_keys
        return (
            self.cache_seqlens is cache_seqlens
            and self.cu_seqlens_q is cu_seqlens_q
            and self.max_seqlen_q == max_seqlen_q
            and (self.options == options or self._has_options(options))
            and self.q_shape == q.shape
            and self.k_shape == k.shape
            and self.v_shape == v.shape
            and self.q_dtype is q.dtype
            and self.k_dtype is k.dtype is k_cache.dtype
            and self.v_dtype is v.dtype is v_cache.dtype
            and self.k_dense == (k.is_contiguous() or k.stride())
            and self.v_dense == (v.is_contiguous() or v.stride())
            and self._q_device == q.device
            and (not self._versions or self._has_versions(cache_seqlens, cu_seqlens_q))
        )


def is_upstreams_varlen(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a call over raw keys has upstream's arguments, and tensors alone for tensors."""
    if not {*VARLEN_TENSORS, *VARLEN_OPTIONS}.issuperset(arguments):
        return False
    if not all(name in arguments for name in VARLEN_OPTIONS[:2]):
        return False
    tensors = {name for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return tensors == {*VARLEN_TENSORS}


class KnownVarlenCall:
    """A call over raw keys that the running pass has seen, and how calls like it are served.

    Like it are calls over the very same lengths, with the same options and with tensors of equal
    shapes, dtypes and layouts: nothing else decides how the kernels are called.

    Lifetime: a pass. When that is over, :meth:`release` takes its tensors away, and :meth:`begin`
    may give it those of a later pass.
    """

    __slots__ = (
        "_cu_seqlens_k",
        "_cu_seqlens_q",
        "_device",
        "_k_dense",
        "_k_dtype",
        "_k_shape",
        "_length_facts",
        "_options",
        "_own_names",
        "_q_dense",
        "_q_dtype",
        "_q_shape",
        "_settled",
        "_v_dense",
        "_v_dtype",
        "_v_shape",
        "function",
        "keywords",
        "uses",
    )
    _OF_A_PASS = (*VARLEN_TENSORS[3:], *VARLEN_OPTIONS[:2])

    def __init__(self, arguments: Arguments, settled: SettledCall) -> None:
        """Describe a call that :func:`is_upstreams_varlen` accepts."""
        self._settled = settled
        self.function, self.keywords = settled.function, settled.keywords
        own = settled.own_names
        self._own_names = [(name, own[name]) for name in self._OF_A_PASS if name in own]
        self.uses = 0
        """Calls that were served as this one and are not in the statistics yet."""
        q, k, v = arguments["q"], arguments["k"], arguments["v"]
        self._cu_seqlens_q = arguments["cu_seqlens_q"]
        self._cu_seqlens_k = arguments["cu_seqlens_k"]
        self._length_facts = _length_facts(self._cu_seqlens_q, self._cu_seqlens_k)
        self._options = tuple([arguments.get(name, ABSENT) for name in VARLEN_OPTIONS])
        self._device = q.device
        self._q_shape, self._q_dtype, self._q_dense = q.shape, q.dtype, density(q)
        self._k_shape, self._k_dtype, self._k_dense = k.shape, k.dtype, density(k)
        self._v_shape, self._v_dtype, self._v_dense = v.shape, v.dtype, density(v)

    def matches(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, options: tuple[Any, ...]
    ) -> bool:
        """Tell whether a call is like this one; ``options`` are those of :data:`VARLEN_OPTIONS`."""
        return (
            cu_seqlens_q is self._cu_seqlens_q
            and cu_seqlens_k is self._cu_seqlens_k
            and options == self._options
            and q.shape == self._q_shape
            and k.shape == self._k_shape
            and v.shape == self._v_shape
            and q.dtype is self._q_dtype
            and k.dtype is self._k_dtype
            and v.dtype is self._v_dtype
            and (q.is_contiguous() or q.stride()) == self._q_dense
            and (k.is_contiguous() or k.stride()) == self._k_dense
            and (v.is_contiguous() or v.stride()) == self._v_dense
            and q.device == self._device
        )

    def begin(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, options: tuple[Any, ...]
    ) -> bool:
        """Become a call of another pass, if that is like this one but for its lengths."""
        if ABSENT in options[:2]:
            return False
        if _length_facts(cu_seqlens_q, cu_seqlens_k) != self._length_facts:
            return False
        self._cu_seqlens_q, self._cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
        self._options = options[:2] + self._options[2:]
        self._q_shape = q.shape[:1] + self._q_shape[1:]
        self._k_shape = k.shape[:1] + self._k_shape[1:]
        self._v_shape = v.shape[:1] + self._v_shape[1:]
        if self.matches(q, k, v, cu_seqlens_q, cu_seqlens_k, options):
            call = dict(zip(VARLEN_TENSORS, (q, k, v, cu_seqlens_q, cu_seqlens_k), strict=True))
            call["max_seqlen_q"], call["max_seqlen_k"] = options[:2]
            if not self._settled.is_changed_by_steps(call):
                for name, own in self._own_names:
                    self.keywords[own] = call[name]
                return True
        self.release()
        return False

    def release(self) -> None:
        """Let go of the tensors of a pass that is over; no call is like this one from here on."""
        self._cu_seqlens_q = self._cu_seqlens_k = ABSENT
        for _, own in self._own_names:
            self.keywords[own] = None


def _length_facts(cu_seqlens_q: Any, cu_seqlens_k: Any) -> Any:
    """Return what a library may ask of the lengths of a call over raw keys beside their shapes.

    ``None``: not both are tensors.
    """
    if not (isinstance(cu_seqlens_q, torch.Tensor) and isinstance(cu_seqlens_k, torch.Tensor)):
        return None
    return cu_seqlens_q.dtype, density(cu_seqlens_q), cu_seqlens_k.dtype, density(cu_seqlens_k)


def _table_facts(page_table: torch.Tensor) -> tuple[Any, ...]:
    return page_table.dtype, page_table.is_contiguous(), page_table.device


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often the contents changed; ``inference_mode`` does not count: ``None``."""
    return None if tensor.is_inference() else tensor._version


def dims_of(own_keys: OwnKeys) -> tuple[Any, ...]:
    """Return the heads and head dimensions of a layer's own keys and values."""
    k, v = own_keys
    return k.shape[1:], v.shape[1:]


def own_key_facts(own_keys: OwnKeys) -> tuple[Any, ...]:
    """Return what is compared of a layer's own keys and values: shapes, dtypes and strides."""
    k, v = own_keys
    return k.shape, v.shape, k.dtype, v.dtype, k.stride(), v.stride()
