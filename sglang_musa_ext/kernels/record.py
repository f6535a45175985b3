"""The record that a provider of FA3 kernels is, and the errors that providers raise."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sglang_musa_ext import policy

logger = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


FUNCTIONS = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata")


class KernelsUnavailable(ImportError):
    """The kernels that were asked for, or that the device needs, cannot be had."""


class UnsupportedByKernels(ValueError):
    """The server's configuration asks for something that the kernels cannot do."""


class UnsupportedKernelArgument(TypeError):
    """A call passes an argument that the kernels do not have, with a value that matters."""


FIRST_PARAMETERS = {
    "flash_attn_with_kvcache": ("q", "k_cache", "v_cache"),
    "flash_attn_varlen_func": ("q", "k", "v"),
}
"""FA3's names of queries, keys and values."""


class SettledCall(NamedTuple):
    """The function and arguments of calls that are alike, with nothing left to decide."""

    function: Callable[..., Any]
    """Takes queries, keys and values by position, the other arguments by keyword."""
    keywords: dict[str, Any]
    """The arguments that are the same in all of these calls, under the function's names."""
    varying: tuple[tuple[str, str], ...]
    """FA3's and the function's names of those that are not."""
    own_names: Mapping[str, str]
    """The function's names of ``keywords``, by FA3's."""
    is_changed_by_steps: Callable[[Mapping[str, Any]], bool] = lambda arguments: False
    """Tells of a call of another pass whether it needs a change that these did not need, or needs
    none where these did, from its queries, keys, values, page table and lengths under FA3's names.
    """


Settle = Callable[[Mapping[str, Any]], SettledCall]
"""Settles the calls that are like one, from its arguments."""


@dataclass(frozen=True)
class FA3Kernels:
    """The FA3 functions of one library, called with FA3's keyword names.

    The functions take keywords only. They accept what upstream's forwards pass: ``ver=3`` and
    arguments that the library lacks are dropped where they ask for nothing, and refused by name
    otherwise; ``out=`` is honoured.
    """

    name: str
    flash_attn_with_kvcache: Callable[..., Any]
    flash_attn_varlen_func: Callable[..., Any]
    get_scheduler_metadata: Callable[..., torch.Tensor]
    dtypes: frozenset[torch.dtype]
    """The types that the kernels read a KV cache in; fp8 ones take queries of the same type."""
    mla_plan_bytes: Callable[[int, int, int, torch.device], int] | None = None
    """Bytes of workspace that a plan needs, from
    ``(batch_size, max_seqlen_q, num_heads_q, device)``. ``None``: MLA calls take ordinary scheduler
    metadata instead of ``(workspace, reuse)``.
    """
    mla_page_sizes: tuple[int, ...] | None = None
    """Page sizes that MLA calls take; ``None``: any. Other calls take any page size."""
    mla_dtypes: frozenset[torch.dtype] | None = None
    """The types that MLA calls read a KV cache in; ``None``: all of ``dtypes``."""
    fastest_page_size: int | None = None
    """The page size that other calls than MLA are fastest with; ``None``: no size stands out."""
    serves_head_dims: Callable[[int, int], bool] = lambda headdim, headdim_v: True
    """True if there is a kernel for these head dimensions of keys and of values."""
    head_dims: str = "any"
    """The head dimensions that there are kernels for, for messages."""
    largest_batch: int | None = None
    """The most requests that can be planned for; ``None``: no limit is known."""
    metadata_uses_softcap: bool = False
    """True if scheduler metadata depends on ``has_softcap``."""
    plans_unequal_queries: bool = True
    """True if a plan is right for requests with different numbers of queries."""
    plans_for_itself: bool = False
    """True if a call without a plan makes it itself: then the first call of a pass needs none."""
    drops_plan: Callable[[Mapping[str, Any]], bool] = lambda arguments: False
    """True if a ``flash_attn_with_kvcache`` call with these arguments ignores its plan."""
    static_num_splits: Callable[..., int | None] = lambda **geometry: None
    """The number of splits that a call launches, from the keywords of ``get_scheduler_metadata``
    that are no tensors; ``None``: unknown. With 1, a plan settles the order of requests alone.
    """
    combines_unsplit: bool = False
    """True if a planned call combines even a single split, which costs a kernel for nothing."""
    serves_raw_keys: Callable[..., bool] = lambda **call: False
    """True if ``flash_attn_varlen_func`` over raw keys and values serves a call as exactly as
    ``flash_attn_with_kvcache`` over a cache of them, on kernels that are no slower, from ``dtype``,
    ``headdim``, ``headdim_v``, ``window_size``, ``softcap``, ``attention_chunk``, ``has_sinks``.
    """
    plan_contents: Callable[[torch.Tensor, int], torch.Tensor] = lambda plan, batch_size: plan
    """Takes from a plan's tensor and batch size what has meaning, for comparing two plans."""
    unadapted: Callable[..., Any] | None = None
    """The library's ``flash_attn_with_kvcache``, if its names mean the same as FA3's."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Distribution names and versions behind the functions, for reports; ``library`` is the module
    that they come from, where there is a choice."""

    def prepare(self, function: str, names: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
        """Return what serves calls that have exactly these argument names; it takes them as a dict.

        It may change the dict. What depends on the names is settled here, what depends on types and
        options by the first call that has them; a further call costs a few comparisons.

        Args:
            function: ``flash_attn_with_kvcache`` or ``flash_attn_varlen_func``.
            names: of a call's arguments.
        """
        adapted = getattr(self, function)
        if function == "flash_attn_with_kvcache" and self._has_all(names):
            return _Plain(self.unadapted)
        prepare = getattr(adapted, "prepare", None)
        if prepare is None:
            return _Plain(adapted)
        site: Callable[[dict[str, Any]], Any] = prepare(names)
        return site

    def settling(
        self, function: str, arguments: Mapping[str, Any], varying: tuple[str, ...] = ()
    ) -> Settle:
        """Return what settles calls of one kind, of which this is one.

        Calls of one kind have the same names and options, and tensors of equal dtypes, devices and
        layouts, whose last sizes are equal. Those that are settled together have besides tensors of
        equal sizes, and but for queries, keys, values and ``varying`` the very same ones. Whoever
        makes them sees to that: nothing compares them any more.

        Args:
            function: ``flash_attn_with_kvcache`` or ``flash_attn_varlen_func``.
            arguments: of the call.
            varying: names of arguments that may differ between calls that are settled together.
        """
        serve = self.prepare(function, tuple(arguments))
        settling = getattr(serve, "settling", None)
        first = FIRST_PARAMETERS[function]
        if settling is None:
            return functools.partial(settled_anew, serve, first, varying)
        settle: Settle = settling(arguments, first, varying)
        return settle

    def _has_all(self, names: Iterable[str]) -> bool:
        """Return whether the library's own function has arguments of all these names."""
        if self.unadapted is None:
            return False
        return set(names) <= _parameters(self.unadapted)

    def require(
        self,
        *,
        page_size: int,
        kv_cache_dtype: torch.dtype,
        use_mla: bool,
        dtype: torch.dtype | None = None,
        head_dims: Iterable[tuple[int, int]] = (),
        largest_batch: int | None = None,
    ) -> None:
        """Refuse a configuration that these kernels cannot serve, before the first request.

        A configuration that they serve on a slower path is warned of.

        Args:
            page_size: tokens in a page of the KV cache.
            kv_cache_dtype: of the KV cache.
            use_mla: whether the model has multi-head latent attention.
            dtype: the model's; ``None``: unknown.
            head_dims: of keys and of values, for each kind of layer whose attention goes over raw
                keys or an ordinary KV cache: not those of MLA's latent cache.
            largest_batch: the most requests that a batch can have; ``None``: unknown.

        Raises:
            UnsupportedByKernels: naming the option, its value and the choices.
        """
        self._require_dtype(kv_cache_dtype, use_mla)
        if kv_cache_dtype in FP8 and dtype not in (None, torch.bfloat16):
            raise UnsupportedByKernels(
                f"--kv-cache-dtype {short_name(kv_cache_dtype)} does not work with a model in "
                f"{short_name(dtype)}: the output of attention is bfloat16 then, which the model's "
                "next layer does not take. Start the server with --dtype bfloat16, or with "
                "--kv-cache-dtype auto."
            )
        self._require_page_size(page_size, use_mla)
        for headdim, headdim_v in head_dims:
            self._require_head_dims(headdim, headdim_v, kv_cache_dtype)
        if largest_batch is not None and not self._plans_for(largest_batch):
            raise UnsupportedByKernels(
                f"Batches of up to {largest_batch} requests do not work with the {self.name!r} "
                f"kernels, which plan for {self.largest_batch} at most. Start the server with "
                f"--max-running-requests {self.largest_batch}, or with a newer release of them."
            )

    def _plans_for(self, batch: int) -> bool:
        return self.largest_batch is None or batch <= self.largest_batch

    def _require_dtype(self, dtype: torch.dtype, use_mla: bool) -> None:
        if dtype not in self.dtypes:
            raise UnsupportedByKernels(
                f"The KV cache has dtype {short_name(dtype)} (--kv-cache-dtype, or --dtype with it "
                f"at 'auto'), which the {self.name!r} kernels cannot read. Expected one of: "
                f"{short_names(self.dtypes)}. Start the server with --kv-cache-dtype auto and a "
                "--dtype from this list, or with another --attention-backend."
            )
        if use_mla and self.mla_dtypes is not None and dtype not in self.mla_dtypes:
            raise UnsupportedByKernels(
                f"--kv-cache-dtype {short_name(dtype)} does not work with the MLA kernels of "
                f"{self.name!r}. Expected one of: {short_names(self.mla_dtypes)}. Start the server "
                "with --kv-cache-dtype auto, or with another --attention-backend."
            )

    def _require_page_size(self, page_size: int, use_mla: bool) -> None:
        if use_mla and self.mla_page_sizes is not None and page_size not in self.mla_page_sizes:
            choices = ", ".join(map(str, self.mla_page_sizes))
            raise UnsupportedByKernels(
                f"--page-size {page_size} does not work with the MLA kernels of {self.name!r}. "
                f"Expected: {choices}. Start the server with --page-size "
                f"{self.mla_page_sizes[0]}, or without the option."
            )
        if self.fastest_page_size not in (None, page_size) and is_first("page size", page_size):
            logger.warning(
                "--page-size %s works with the %r kernels, on a slower path: they are fastest with "
                "--page-size %s, which is the default.",
                page_size,
                self.name,
                self.fastest_page_size,
            )

    def _require_head_dims(self, headdim: int, headdim_v: int, dtype: torch.dtype) -> None:
        if not self.serves_head_dims(headdim, headdim_v):
            raise UnsupportedByKernels(
                f"The model has layers with head dimensions {headdim}/{headdim_v} of keys/values, "
                f"which the {self.name!r} kernels do not have. Expected {self.head_dims}. Start "
                "the server with another --attention-backend, such as triton."
            )
        if dtype not in FP8 or headdim <= policy.LARGEST_FP8_HEAD_DIM:
            return
        raise UnsupportedByKernels(
            f"--kv-cache-dtype {short_name(dtype)} does not work with head dimension {headdim}: "
            "SGLang casts queries to the type of the KV cache up to head dimension "
            f"{policy.LARGEST_FP8_HEAD_DIM}, and these kernels take both in one type. Start the "
            "server with --kv-cache-dtype auto."
        )


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


class _Plain:
    """Serves calls by a function that has FA3's names."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, arguments: dict[str, Any]) -> Any:
        return self._function(**arguments)

    def settling(
        self, arguments: Mapping[str, Any], first: tuple[str, ...], varying: tuple[str, ...]
    ) -> Settle:
        """Return what settles calls that have the names of this one."""
        if not takes_by_position(self._function, first):
            return functools.partial(settled_anew, self, first, varying)
        left_out = {*first, *varying}
        names = [name for name in arguments if name not in left_out]
        same, own = tuple(zip(varying, varying, strict=True)), {name: name for name in names}
        return lambda call: SettledCall(self._function, {n: call[n] for n in names}, same, own)


@functools.cache
def takes_by_position(function: Callable[..., Any], first: tuple[str, ...]) -> bool:
    """Tell whether the first parameters of a function are these, and may be passed by position."""
    parameters = list(inspect.signature(function).parameters.values())[: len(first)]
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    wanted = [(name, by_position) for name in first]
    return [(p.name, p.kind) for p in parameters] == wanted


def settled_anew(
    serve: Callable[[dict[str, Any]], Any],
    first: tuple[str, ...],
    varying: tuple[str, ...],
    arguments: Mapping[str, Any],
) -> SettledCall:
    """Return calls that ``serve``, which takes their arguments as a dict, decides one by one."""

    def function(*tensors: Any, **keywords: Any) -> Any:
        return serve(dict(zip(first, tensors, strict=True)) | keywords)

    left_out = {*first, *varying}
    keywords = {name: value for name, value in arguments.items() if name not in left_out}
    own = {name: name for name in keywords}
    return SettledCall(function, keywords, tuple(zip(varying, varying, strict=True)), own)


_SAID: set[tuple[object, ...]] = set()
"""The warnings that this process has given."""


def is_first(*subject: object) -> bool:
    """Tell whether this process warns of a subject for the first time.

    A server builds several backends: of a draft model, of its steps, of micro-batches.
    """
    if subject in _SAID:
        return False
    _SAID.add(subject)
    return True


def import_library(name: str, remedy: str) -> ModuleType:
    """Import the module ``name``, which has the three FA3 functions.

    Raises:
        KernelsUnavailable: it cannot be imported, for whatever reason, or lacks a function.
    """
    try:
        library = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise KernelsUnavailable(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}. {remedy}"
        ) from error
    missing = [function for function in FUNCTIONS if not callable(getattr(library, function, None))]
    if missing:
        raise KernelsUnavailable(
            f"{name!r} at {getattr(library, '__file__', None)} lacks {', '.join(missing)}, so it "
            f"is not the library that is needed here. {remedy}"
        )
    return library


def versions_of(*distributions: str) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def short_name(dtype: torch.dtype) -> str:
    """Name a dtype as messages do: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def short_names(dtypes: frozenset[torch.dtype]) -> str:
    """List dtypes as messages do."""
    return ", ".join(sorted(map(short_name, dtypes)))
