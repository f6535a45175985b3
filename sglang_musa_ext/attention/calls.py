"""The values that a kernel call's plan depends on, and the test that two calls are alike.

Which keywords plans depend on is said by the contract with SGLang, ``upstream.rows.kernels``:
there, a new one is one row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from sglang_musa_ext.kernels.record import FA3Kernels
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

_OF_A_PASS = ("max_seqlen_q", "max_seqlen_k", "scheduler_metadata")
"""Arguments whose values say nothing of how a library is called."""


def _layout(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return size and stride of the last dimension."""
    return tuple(tensor.shape[-1:]), tensor.stride()[-1:]


_COMPARED = ("q", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_q")
"""The tensors of a paged call that are compared one by one."""
_get_compared = operator.itemgetter(*_COMPARED, "max_seqlen_q")


class CallSite:
    """The properties that upstream's paged calls of one kind share, whatever their pass.

    They have equal names and options, and tensors of equal dtypes, layouts and shapes, but for how
    many tokens, requests and pages there are. So one function serves them all, and the rest of
    their geometry is settled. Every comparison is of an attribute of the call itself.
    """

    __slots__ = (
        "_device",
        "_facts",
        "_options_of",
        "_others",
        "_q_tail",
        "_table_facts",
        "attention",
        "geometry",
        "keywords",
        "serves_raw_keys",
    )

    def __init__(
        self, arguments: Arguments, geometry: CallGeometry, attention: Callable[[Arguments], Any]
    ) -> None:
        """Describe a call that :func:`is_upstreams` accepts.

        Args:
            arguments: of the call, without a plan.
            geometry: of the call.
            attention: serves such calls, from all their arguments.
        """
        self.geometry, self.attention = geometry, attention
        self.serves_raw_keys = False
        """True if such a call was served over raw keys, so that names and options allow it."""
        self.keywords = geometry.keywords()
        """Those of ``get_scheduler_metadata`` for this call; others of its kind have some else."""
        q, k_cache, v_cache = arguments["q"], arguments["k_cache"], arguments["v_cache"]
        self._options_of = _options_getter(arguments)
        self._facts = (
            len(arguments), self._options_of(arguments), q.dtype, k_cache.dtype, v_cache.dtype,
            k_cache.shape, v_cache.shape, _is_dense(k_cache), _is_dense(v_cache),
        )  # fmt: skip
        self._others = tuple(
            (name, value.dtype, value.ndim, _layout(value))
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and name not in _COMPARED
        )
        self._q_tail, self._device = q.shape[1:], q.device
        self._table_facts = _table_facts(arguments)

    def has(self, arguments: Arguments, q: Any, k_cache: Any, v_cache: Any) -> bool:
        """Tell whether a call is of this kind; the shape of ``q`` is the caller's to compare.

        Raises:
            KeyError: the call lacks one of this kind's options.
        """
        count, options, q_dtype, k_dtype, v_dtype, k_shape, v_shape, k_dense, v_dense = self._facts
        return (
            len(arguments) == count
            and self._options_of(arguments) == options
            and k_cache.shape == k_shape
            and v_cache.shape == v_shape
            and q.dtype is q_dtype
            and k_cache.dtype is k_dtype
            and v_cache.dtype is v_dtype
            and (k_cache.is_contiguous() or k_cache.stride()) == k_dense
            and (v_cache.is_contiguous() or v_cache.stride()) == v_dense
            and q.device == self._device
            and (not self._others or self._has_others(arguments))
        )

    def is_of(self, arguments: Arguments) -> bool:
        """Tell whether a call with the names of this kind is of it, whatever its pass."""
        q = arguments["q"]
        try:
            return (
                q.shape[1:] == self._q_tail
                and _table_facts(arguments) == self._table_facts
                and self.has(arguments, q, arguments["k_cache"], arguments["v_cache"])
            )
        except KeyError:
            return False

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

    def _has_others(self, arguments: Arguments) -> bool:
        for name, dtype, dimensions, layout in self._others:
            value = arguments.get(name)
            if not isinstance(value, torch.Tensor) or value.dtype is not dtype:
                return False
            if (value.ndim, _layout(value)) != (dimensions, layout):
                return False
        return True


def is_upstreams(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a call is one of those that upstream makes for every layer."""
    if not all(isinstance(arguments.get(name), torch.Tensor) for name in _COMPARED):
        return False
    return all(arguments.get(name) is None for name in ("k", "cache_leftpad", "cu_seqlens_k_new"))


class KnownCall:
    """A call that the running pass has seen, and what calls like it get.

    Like it are calls of the same kind over the very same lengths, with equally many rows: their
    plans are equal.
    """

    __slots__ = (
        "_cache_seqlens",
        "_cu_seqlens_q",
        "_max_seqlen_q",
        "_own_keys",
        "_page_table",
        "_q_shape",
        "_table_facts",
        "_versions",
        "attention",
        "in_place",
        "plan",
        "raw",
        "role",
        "site",
    )

    def __init__(
        self,
        site: CallSite,
        arguments: Arguments,
        attention: Callable[[Arguments], Any],
        own_keys: OwnKeys | None,
        *,
        raw: bool = False,
    ) -> None:
        """Describe a call of the kind ``site``.

        Args:
            site: the kind of the call.
            arguments: of the call, without a plan.
            attention: serves the calls like it.
            own_keys: the layer's own keys and values, where such calls may use them.
            raw: whether ``attention`` takes these instead of the cache.
        """
        self.site, self.attention, self.raw = site, attention, raw
        self.plan: Any = None
        self.in_place: Any = None
        """For a plan in a workspace: what says that the workspace still holds it."""
        self.role = -1
        """For a plan in a workspace: the call role whose slot that is."""
        q, _, _, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q = _get_compared(arguments)
        self._q_shape, self._max_seqlen_q = q.shape, max_seqlen_q
        # Held, so that no other tensor can take their places.
        self._cache_seqlens, self._cu_seqlens_q = cache_seqlens, cu_seqlens_q
        self._page_table, self._table_facts = page_table, _table_facts(arguments)
        self._versions = _version(cache_seqlens), _version(cu_seqlens_q)
        self._own_keys = None if own_keys is None else own_key_facts(own_keys)

    def matches(self, arguments: Arguments, own_keys: OwnKeys | None) -> bool:
        """Tell whether a call is like this one."""
        try:
            (
                q,
                k_cache,
                v_cache,
                page_table,
                cache_seqlens,
                cu_seqlens_q,
                max_seqlen_q,
            ) = _get_compared(arguments)
            cache_version, cu_version = self._versions
            return (
                cache_seqlens is self._cache_seqlens
                and cu_seqlens_q is self._cu_seqlens_q
                and max_seqlen_q == self._max_seqlen_q
                and (cache_version is None or cache_seqlens._version == cache_version)
                and (cu_version is None or cu_seqlens_q._version == cu_version)
                and q.shape == self._q_shape
                and (page_table is self._page_table or self._has_table(arguments))
                and self.site.has(arguments, q, k_cache, v_cache)
                and (own_keys is self._own_keys or self._has_own_keys(own_keys))
            )
        except KeyError:
            return False

    def _has_table(self, arguments: Arguments) -> bool:
        return (
            _table_facts(arguments) == self._table_facts
            and arguments["page_table"].shape == self._page_table.shape
        )

    def _has_own_keys(self, own_keys: OwnKeys | None) -> bool:
        return own_keys is not None and own_key_facts(own_keys) == self._own_keys


def _options_getter(arguments: Arguments) -> Callable[[Arguments], Any]:
    """Return what gets the values of a call that are no tensors, in one step."""
    names = [
        name
        for name, value in arguments.items()
        if not isinstance(value, torch.Tensor) and name not in _OF_A_PASS
    ]
    return operator.itemgetter(*names) if names else lambda arguments: ()


def _is_dense(tensor: torch.Tensor) -> Any:
    """Return ``True``, or the strides of a tensor whose elements do not follow one another."""
    return tensor.is_contiguous() or tensor.stride()


def _table_facts(arguments: Arguments) -> tuple[Any, ...] | None:
    """Return what a library may ask of the page table and the lengths beside their shapes."""
    _, _, _, page_table, cache_seqlens, cu_seqlens_q, _ = _get_compared(arguments)
    if page_table is None or cache_seqlens is None or cu_seqlens_q is None:
        return None
    dense = page_table.is_contiguous()
    return page_table.dtype, dense, cache_seqlens.dtype, cu_seqlens_q.dtype


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often the contents changed; ``inference_mode`` does not count: ``None``."""
    return None if tensor.is_inference() else tensor._version


def own_key_facts(own_keys: OwnKeys) -> tuple[Any, ...]:
    """Return what is compared of a layer's own keys and values: shapes, dtypes and strides."""
    k, v = own_keys
    return k.shape, v.shape, k.dtype, v.dtype, k.stride(), v.stride()
