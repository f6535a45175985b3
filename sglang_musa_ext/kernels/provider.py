"""Providers of FA3 kernels, as one record with FlashAttention-3's own keyword names.

A provider is a :class:`FA3Kernels`: ``mate`` (Moore Threads), ``hopper`` (NVIDIA, to validate on)
or ``reference`` (PyTorch, on any device). The attention backend does not know which one it has;
whatever differs between them is settled here, by an adapter that reads the functions' signatures
once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sglang_musa_ext import envs
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels import mate_identity as mate
from sglang_musa_ext.kernels.mate_identity import identify_mate

logger = logging.getLogger(__name__)

_FUNCTIONS = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata")
_HALF = frozenset({torch.float16, torch.bfloat16})


class KernelsUnavailable(ImportError):
    """The kernels that were asked for, or that the device needs, cannot be had."""


class UnsupportedByKernels(ValueError):
    """The server's configuration asks for something that the kernels cannot do."""


class UnsupportedKernelArgument(TypeError):
    """A call passes an argument that the kernels do not have, with a value that matters."""


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
    """What q, k and v can be."""
    mla_plan_bytes: Callable[[int, int, int, torch.device], int] | None = None
    """Bytes of workspace that a plan needs, from
    ``(batch_size, max_seqlen_q, num_heads_q, device)``. ``None``: MLA calls take ordinary scheduler
    metadata instead of ``(workspace, reuse)``.
    """
    mla_page_sizes: tuple[int, ...] | None = None
    """Page sizes that MLA calls take; ``None``: any. Other calls take any page size."""
    metadata_uses_softcap: bool = False
    """Whether scheduler metadata depends on ``has_softcap``."""
    plans_unequal_queries: bool = True
    """Whether a plan is right for a call whose requests have different numbers of queries."""
    plans_for_itself: bool = False
    """Whether a call without a plan makes the same one, so that a plan is worth its time from the
    second call on.
    """
    plan_contents: Callable[[torch.Tensor, int], torch.Tensor] = lambda plan, batch_size: plan
    """What of a plan's tensor says something, from it and the batch size; for comparing two plans.
    """
    unadapted: Callable[..., Any] | None = None
    """The library's own ``flash_attn_with_kvcache``, where it means the same by each name that it
    has.
    """
    versions: Mapping[str, str] = field(default_factory=dict)
    """Distribution names and versions behind the functions, for reports; ``library`` is the module
    that they come from, where there is a choice."""

    def attention(self, names: Iterable[str]) -> Callable[..., Any]:
        """What serves ``flash_attn_with_kvcache`` calls with these names: the library itself, if it
        has them all.

        Adapting a call takes a quarter of the host's time that this package adds to one, and most
        calls need none.
        """
        if self.unadapted is None or not set(names) <= set(
            inspect.signature(self.unadapted).parameters
        ):
            return self.flash_attn_with_kvcache
        return self.unadapted

    def require(self, *, page_size: int, kv_cache_dtype: torch.dtype, use_mla: bool) -> None:
        """Refuse a configuration that these kernels cannot serve, before the first request.

        Raises:
            UnsupportedByKernels: naming the option, its value and the choices.
        """
        if kv_cache_dtype not in self.dtypes:
            raise UnsupportedByKernels(
                f"The KV cache has dtype {_short(kv_cache_dtype)} (--kv-cache-dtype, or --dtype "
                "with it at 'auto'), "
                f"which the {self.name!r} kernels cannot read. Expected one of: "
                f"{_names(self.dtypes)}. Start the "
                "server with --kv-cache-dtype auto and a --dtype from this list, or with another "
                "--attention-backend."
            )
        if use_mla and self.mla_page_sizes is not None and page_size not in self.mla_page_sizes:
            choices = ", ".join(map(str, self.mla_page_sizes))
            raise UnsupportedByKernels(
                f"--page-size {page_size} does not work with the MLA kernels of {self.name!r}. "
                f"Expected: {choices}. "
                f"Start the server with --page-size {self.mla_page_sizes[0]}, or without the "
                "option."
            )


def select_kernels(settings: Settings, device: torch.device) -> FA3Kernels:
    """The kernels that ``settings`` name, or with ``auto`` those of ``device``.

    Args:
        settings: ``kernels`` is ``auto``, ``mate``, ``hopper`` or ``reference``.
        device: where the KV cache is.

    Raises:
        KernelsUnavailable: the library is missing, is another one, or does not serve ``device``.
    """
    by_device = {"musa": "mate", "cpu": "reference"}
    name = settings.kernels if settings.kernels != "auto" else by_device.get(device.type)
    if name is None:
        raise KernelsUnavailable(
            f"{envs.KERNELS}=auto has no kernels for the device {device}: it chooses "
            + ", ".join(f"{kernels} on {kind}" for kind, kernels in by_device.items())
            + f". Set {envs.KERNELS}=hopper to run on an NVIDIA Hopper GPU, or {envs.MODE}=off to leave SGLang alone."
        )
    return _PROVIDERS[name](device)


def reference_kernels(device: torch.device | None = None) -> FA3Kernels:
    """PyTorch kernels that behave like MATE, on any device; slow, and exact enough to compare with."""
    from sglang_musa_ext.kernels import reference

    return FA3Kernels(
        name="reference",
        flash_attn_with_kvcache=_adapt(reference.flash_attn_with_kvcache, dense_page_table=True),
        flash_attn_varlen_func=_adapt(reference.flash_attn_varlen_func),
        get_scheduler_metadata=reference.get_scheduler_metadata,
        dtypes=_HALF | {torch.float32},
        mla_plan_bytes=lambda batch, seqlen, heads, _: reference.mla_plan_bytes(
            batch, seqlen, heads
        ),
        mla_page_sizes=(64,),
        versions=_versions("torch"),
    )


def mate_kernels(device: torch.device) -> FA3Kernels:
    """MATE, through its FlashAttention-3 wrapper."""
    if device.type != "musa":
        raise KernelsUnavailable(
            f"The 'mate' kernels run on a MUSA device, and the KV cache is on {device}. Set "
            f"{envs.KERNELS}=auto, or "
            "start the server on a machine with a Moore Threads GPU."
        )
    library, release = _import_mate()
    return FA3Kernels(
        name="mate",
        flash_attn_with_kvcache=_mate_function(library.flash_attn_with_kvcache, release),
        flash_attn_varlen_func=_mate_function(library.flash_attn_varlen_func, release),
        get_scheduler_metadata=_adapt(library.get_scheduler_metadata),
        dtypes=_HALF,
        mla_plan_bytes=_mate_mla_plan_bytes,
        mla_page_sizes=(64,),
        versions=_versions(
            "mate", "mate-mubin", "flash_attn_3", "mate-flash-attention", "torch_musa"
        ),
    )


def hopper_kernels(device: torch.device) -> FA3Kernels:
    """NVIDIA's FA3, to validate this package on a Hopper GPU.

    It is SGLang's build, ``sgl_kernel.flash_attn``; where that cannot be had, FlashAttention's own,
    ``flash_attn_interface``. ``versions`` says which library serves.

    MLA calls (``qv``) take scheduler metadata like any other call, computed for head dimensions 64
    and 512. Read in FlashAttention's ``hopper/flash_api.cpp`` and ``flash_fwd_launch_template.h``
    (v2.8.3, and 0251105a of 2026-08-15): the forward settles paging by TMA, the number of splits,
    GQA packing and the size of the plan before it looks at ``qv``, and tile sizes depend on head
    dimensions, mask, dtype, paging and softcap. So ``get_scheduler_metadata``, which has no ``qv``,
    decides as the forward does.

    SGLang's build plans no calls whose requests have different numbers of queries. Seen on an H100
    with sglang-kernel 0.4.5: ``get_scheduler_metadata`` bounds the number of splits by the longest
    query, the forward by the average one. A plan can then have more splits than the forward has
    accumulators for, and another last bit where it has fewer.

    Raises:
        KernelsUnavailable: the device is none that FA3 serves, or both libraries were rejected,
            with each one's reason.
    """
    if device.type != "cuda":
        raise KernelsUnavailable(
            f"The 'hopper' kernels run on an NVIDIA GPU, and the KV cache is on {device}. Set "
            f"{envs.KERNELS}=auto, or "
            "start the server on a machine with a Hopper GPU."
        )
    _require_fa3_device(device)
    candidate, library = _import_hopper_library()
    return FA3Kernels(
        name="hopper",
        flash_attn_with_kvcache=_adapt(library.flash_attn_with_kvcache),
        flash_attn_varlen_func=_adapt(library.flash_attn_varlen_func),
        get_scheduler_metadata=_adapt(library.get_scheduler_metadata),
        dtypes=_HALF,
        metadata_uses_softcap=True,
        plans_unequal_queries=candidate.plans_unequal_queries,
        plans_for_itself=True,
        plan_contents=_hopper_plan_contents,
        unadapted=library.flash_attn_with_kvcache,
        versions={"library": candidate.module, **_versions(*candidate.distributions)},
    )


_PROVIDERS: Mapping[str, Callable[[torch.device], FA3Kernels]] = {
    "mate": mate_kernels,
    "hopper": hopper_kernels,
    "reference": reference_kernels,
}


def _import_mate() -> tuple[ModuleType, tuple[int, ...]]:
    """MATE's FA3 wrapper and MATE's release, once what is installed has shown that it is the one.

    Raises:
        KernelsUnavailable: with everything that is wrong: what was found, where, whose, and the
            remedy.
    """
    identity = identify_mate()
    if identity.problems or identity.wrapper_module is None:
        raise KernelsUnavailable(
            "\n".join(map(str, identity.problems))
            + f" Or set {envs.MODE}=off to leave SGLang as it is."
        )
    for warning in identity.warnings:
        logger.warning("%s", warning)
    return _import_library(identity.wrapper_module, mate.INSTALL), identity.release


def _import_library(name: str, remedy: str) -> ModuleType:
    """The module ``name``, with the three FA3 functions in it.

    Raises:
        KernelsUnavailable: it cannot be imported, for whatever reason its loading has, or lacks a
            function.
    """
    try:
        library = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise KernelsUnavailable(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}. {remedy}"
        ) from error
    missing = [
        function for function in _FUNCTIONS if not callable(getattr(library, function, None))
    ]
    if missing:
        raise KernelsUnavailable(
            f"{name!r} at {getattr(library, '__file__', None)} lacks {', '.join(missing)}, so it "
            "is not the library "
            f"that is needed here. {remedy}"
        )
    return library


class _Library(NamedTuple):
    """A library that has the functions of FA3."""

    module: str
    distributions: tuple[str, ...]
    """The names that it was released under."""
    plans_unequal_queries: bool
    """See :class:`FA3Kernels`."""
    remedy: str


_HOPPER_LIBRARIES = (
    _Library(
        "sgl_kernel.flash_attn",
        ("sglang-kernel", "sgl-kernel"),
        False,
        "Install SGLang's kernel package for this GPU, built with FlashAttention-3, as this SGLang "
        "pins it.",
    ),
    _Library(
        mate.CURRENT.module,
        ("flash_attn_3",),
        True,
        "Install FlashAttention-3 from the folder 'hopper' of Dao-AILab/flash-attention, for this "
        "torch.",
    ),
)
"""The libraries of the ``hopper`` kernels, in the order in which they are tried."""

_FA3_CAPABILITIES = (8, 9)
"""Major compute capabilities that FA3 has kernels for; SGLang's ``is_fa3_supported`` has the same
ones.
"""


def _require_fa3_device(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability[0] not in _FA3_CAPABILITIES:
        raise KernelsUnavailable(
            f"{device} is {torch.cuda.get_device_name(device)!r}, capability "
            f"{'.'.join(map(str, capability))}, and the "
            "'hopper' kernels run on NVIDIA GPUs of compute capability 9.0 (Hopper) or 8.x. Set "
            f"{envs.MODE}=off, and start the server with another --attention-backend."
        )


def _import_hopper_library() -> tuple[_Library, ModuleType]:
    """The first of :data:`_HOPPER_LIBRARIES` that can be had; a warning says why the ones before it
    cannot.

    Raises:
        KernelsUnavailable: none can be had; with the reason and the remedy of each.
    """
    rejected: list[KernelsUnavailable] = []
    for candidate in _HOPPER_LIBRARIES:
        try:
            library = _import_hopper_candidate(candidate)
        except KernelsUnavailable as reason:
            rejected.append(reason)
            continue
        if rejected:
            reasons = "; ".join(map(str, rejected))
            logger.warning(
                "The 'hopper' kernels come from %r, since SGLang's own: %s",
                candidate.module,
                reasons,
            )
        return candidate, library
    raise KernelsUnavailable(
        "No library has the 'hopper' kernels. Each of these was tried, and one is enough:\n"
        + "\n".join(f"* {reason}" for reason in rejected)
    ) from rejected[0]


def _import_hopper_candidate(candidate: _Library) -> ModuleType:
    if candidate.module == mate.CURRENT.module and mate.is_wrapper(candidate.module):
        raise KernelsUnavailable(
            f"{candidate.module!r} is Moore Threads' wrapper of MATE, whose kernels run on MUSA "
            "alone. Uninstall its "
            f"distribution, {mate.CURRENT.distribution}. {candidate.remedy}"
        )
    library = _import_library(candidate.module, candidate.remedy)
    parameters = inspect.signature(library.flash_attn_varlen_func).parameters
    if not {"return_softmax_lse", "return_attn_probs"} & set(parameters):
        # Up to v2.8.2 of FlashAttention it returned two results, in v2.8.3 one, and nothing tells
        # these apart.
        raise KernelsUnavailable(
            f"{candidate.module!r} at {library.__file__} is too old: expected a "
            "flash_attn_varlen_func that can be "
            "asked for softmax_lse, as in FlashAttention-3 from 30 August 2025 on. "
            f"{candidate.remedy}"
        )
    return library


def _hopper_plan_contents(plan: torch.Tensor, batch_size: int) -> torch.Tensor:
    """What two computations of one plan have in common: all but what is never written, and the
    forward's counter.

    Read in ``hopper/flash_api.cpp`` and ``flash_prepare_scheduler.cu`` of
    Dao-AILab/flash-attention:

    * from 199401d3 (2025-08-21) to 0251105a (2026-08-15), and in sgl-project/sgl-attn, the origin
      of SGLang's: three vectors, four under a causal mask, of the batch size rounded up to 4, whose
      padding is not written. Then, always on compute capability 9.0 and with several splits on 8.x,
      the counter that each forward uses up and clears.
    * before, as in v2.8.3: the place of that counter, and one value a request; from 993 requests
      on, none.

    Args:
        plan: int32 ``(n,)``. Neither layout has a length of the other: the later one is three times
            the batch size at least, the earlier one is one more than the batch size at most.
        batch_size: number of requests.

    Raises:
        UnsupportedByKernels: for a length that neither layout has. Comparing it as it is could
            report a difference where there is none, and leaving parts out could hide one.
    """
    padded = max(-(-batch_size // 4) * 4, 4)
    vectors, rest = divmod(plan.numel(), padded)
    if vectors in (3, 4) and rest <= 1:
        return plan[: vectors * padded].view(vectors, padded)[:, :batch_size]
    if plan.numel() <= batch_size + 1:
        return plan[1:]
    raise UnsupportedByKernels(
        f"A plan of FA3 has {plan.numel()} values for a batch of {batch_size}, which {envs.CHECK} "
        "cannot compare. "
        f"Expected 3 or 4 vectors of {padded} and a counter, or at most {batch_size + 1} values. "
        f"Unset {envs.CHECK}, "
        "and report this with the version of the kernels."
    )


def _mate_mla_plan_bytes(
    batch_size: int, max_seqlen_q: int, num_heads_q: int, device: torch.device
) -> int:
    """Upper bound of an MLA plan: 32 bytes a tile-scheduler part, at most one part a
    multiprocessor; 4 a request.
    """
    multiprocessors: int = (
        torch.get_device_module(device).get_device_properties(device).multi_processor_count
    )
    return 32 * multiprocessors + 4 * (batch_size + 1)


_SYNONYMS = (
    ("sinks", "s_aux", "learnable_sink"),
    ("page_table", "block_table"),
    ("cache_seqlens", "seqused_k"),
    ("cache_leftpad", "leftpad_k"),
    ("num_heads_q", "num_heads"),
    ("num_heads_kv", "num_heads_k"),
    ("sm_margin", "mp_margin"),
    ("return_softmax_lse", "return_attn_probs"),
)
"""Names that FA3's interfaces have for one and the same argument."""


def _adapt(function: Callable[..., Any], *, dense_page_table: bool = False) -> Callable[..., Any]:
    """``function``, callable the way upstream's forwards call FA3; see :class:`FA3Kernels`.

    Args:
        function: of a library with FA3's interface.
        dense_page_table: whether it reads a page table as if its rows followed one another, as MATE
            does. The table is copied then where they do not; never the KV cache.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own_names = _own_names(parameters)
    writes_out = "out" in parameters

    @functools.lru_cache(maxsize=64)
    def differences(names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
        """The function's own names for some of ``names``, and those that it lacks: worked out once
        a call site.
        """
        renamed = {name: own_names[name] for name in names if name in own_names}
        return renamed, [name for name in names if name not in parameters and name not in renamed]

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        _require_version_3(arguments.pop("ver", 3))
        out = None if writes_out else arguments.pop("out", None)
        renamed, lacking = differences(tuple(arguments))
        for name, own in renamed.items():
            arguments[own] = arguments.pop(name)
        for name in lacking:
            if _asks_for_nothing(arguments[name]):
                del arguments[name]
            elif not takes_any:
                raise UnsupportedKernelArgument(
                    f"{function.__module__}.{function.__name__} has no argument {name!r}, and the "
                    "call needs it: the "
                    "model uses a feature that these kernels do not have. Serve it with another "
                    "--attention-backend."
                )
        if dense_page_table and arguments.get("page_table") is not None:
            arguments["page_table"] = arguments["page_table"].contiguous()
        result = function(**arguments)
        return result if out is None else _into(out, result)

    return call


def _own_names(parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """What the function with these parameters calls the arguments that it has under another name."""
    own = {}
    for names in _SYNONYMS:
        known = [name for name in names if name in parameters]
        own.update({name: known[0] for name in names if known and name not in parameters})
    return own


def _require_version_3(version: Any) -> None:
    if version != 3:
        raise UnsupportedKernelArgument(
            f"The call asks for FlashAttention {version} (ver={version}), and these kernels are "
            "FlashAttention-3. "
            "Start the server with --attention-backend fa3."
        )


def _asks_for_nothing(value: Any) -> bool:
    """Whether an argument's value is the one that stands for "not used" in FA3's interfaces."""
    return value is None or value is False


def _into(out: torch.Tensor, result: Any) -> Any:
    """``result`` with its output written to ``out``, for a kernel that cannot write there itself."""
    if isinstance(result, tuple):
        return (_into(out, result[0]), *result[1:])
    return out.copy_(result.view(out.shape))


# --- what MATE's kernels cannot do, and what its releases do otherwise ----------------------------

_Arguments = dict[str, Any]
_APPENDING = ("k", "v")
_SINCE_0_2_1 = ("cache_leftpad", "cache_batch_idx", "rotary_cos", "rotary_sin", "attention_chunk")
_IGNORED_BY_MLA = ("softcap", "attention_chunk", "sinks", "s_aux")


def _mate_function(function: Callable[..., Any], release: tuple[int, ...]) -> Callable[..., Any]:
    """An attention function of MATE's wrapper with FA3's meaning, whatever the release.

    Where MATE would leave out an argument without a word, the call is refused: a wrong number looks
    like any other.
    """
    rules = [
        _require_half,
        _require_bfloat16_sinks,
        _require_dense_rows,
        _require_mla_decode,
        _drop_unset,
    ]
    if release < (0, 2, 1):
        rules += [functools.partial(_refuse_until, "0.2.1", _SINCE_0_2_1), _refuse_unread_softcap]
    if release < (0, 2):
        # MATE 0.1.3's function of a paged cache takes new keys and drops them; its varlen function
        # has others by these names, which it reads.
        appends = "k_cache" in inspect.signature(function).parameters
        rules += [functools.partial(_refuse_until, "0.2.0", _APPENDING)] if appends else []
        rules += [_window_of_mate_0_1]
    adapted = _adapt(function, dense_page_table=True)

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        for rule in rules:
            arguments = rule(arguments)
        result = adapted(**arguments)
        padded_mla = arguments.get("qv") is not None and arguments.get("cu_seqlens_q") is None
        return _with_fa3_layout(result) if padded_mla else result

    return call


def _require_half(arguments: _Arguments) -> _Arguments:
    """Refuse fp8, and drop its scales, which mean nothing to other dtypes."""
    dtypes = {tensor.dtype for name in _INPUTS if (tensor := arguments.get(name)) is not None}
    if len(dtypes) > 1 or not dtypes <= _HALF:
        raise _not_half(arguments)
    for name in _SCALES:
        arguments.pop(name, None)
    return arguments


_INPUTS = ("q", "qv", "k", "v", "k_cache", "v_cache")
_SCALES = ("q_descale", "k_descale", "v_descale")


def _not_half(arguments: _Arguments) -> UnsupportedKernelArgument:
    found = {name: arguments[name].dtype for name in _INPUTS if arguments.get(name) is not None}
    seen = ", ".join(f"{name} {_short(dtype)}" for name, dtype in found.items())
    return UnsupportedKernelArgument(
        "MATE's attention kernels take queries, keys and values of one dtype out of "
        f"{_names(_HALF)}, and fp8 not "
        f"at all; the call has {seen}. Start the server with --kv-cache-dtype auto and --dtype "
        "bfloat16."
    )


def _require_bfloat16_sinks(arguments: _Arguments) -> _Arguments:
    sinks = arguments.get("sinks")
    if sinks is None:
        sinks = arguments.get("s_aux")
    if sinks is not None and sinks.dtype != torch.bfloat16:
        # Rounding them here would be a choice about the model's weights, made anew in every call.
        raise UnsupportedKernelArgument(
            f"The attention sinks have dtype {_short(sinks.dtype)}, and MATE's kernels read "
            "bfloat16. Load the model's "
            "sinks as bfloat16, as SGLang does for FA3, or serve it with another "
            "--attention-backend."
        )
    return arguments


def _require_dense_rows(arguments: _Arguments) -> _Arguments:
    """Refuse a cache that a kernel could only read from a copy: the copy would be as large as the
    cache.
    """
    paged = ("k", "v") if arguments.get("page_table") is not None else ()
    for name in ("k_cache", "v_cache", *paged):
        cache = arguments.get(name)
        if cache is not None and cache.stride(-1) != 1:
            raise UnsupportedKernelArgument(
                f"The last dimension of {name} has stride {cache.stride(-1)}, and MATE's kernels "
                "need 1. Start the "
                "server with the default layout of its KV cache."
            )
    return arguments


def _require_mla_decode(arguments: _Arguments) -> _Arguments:
    """Refuse ``qv`` but as MLA has it, and in MLA what its kernels leave out without a word."""
    qv = arguments.get("qv")
    if qv is None:
        return arguments
    headdims = [None if tensor is None else tensor.shape[-1] for tensor in (arguments.get("q"), qv)]
    if headdims != [64, 512]:
        raise UnsupportedKernelArgument(
            f"The call has q and qv with head dimensions {headdims[0]} and {headdims[1]}, and "
            "MATE's MLA kernels "
            "have 64 and 512. Serve the model with another --attention-backend."
        )
    if not isinstance(arguments.get("scheduler_metadata"), tuple):
        raise UnsupportedKernelArgument(
            "The call has qv without a workspace. MATE's MLA kernels need "
            "scheduler_metadata=(workspace, reuse)."
        )
    ignored = [name for name in _IGNORED_BY_MLA if _is_given(arguments.get(name))]
    ignored += ["window_size"] if _bounded(arguments.get("window_size")) else []
    if ignored:
        raise UnsupportedKernelArgument(
            f"The call has {', '.join(ignored)} in MLA, which MATE's MLA kernels would ignore "
            "without a word. Serve "
            "the model with another --attention-backend."
        )
    return arguments


def _drop_unset(arguments: _Arguments) -> _Arguments:
    """Leave out what is ``None`` where FA3 has another word for "none": not every release of MATE
    takes both.
    """
    for name in ("window_size", "attention_chunk", "softcap", "num_splits"):
        if name in arguments and arguments[name] is None:
            del arguments[name]
    return arguments


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, int | float) and value == 0)


def _bounded(window: Any) -> bool:
    return window is not None and max(window) >= 0


def _refuse_until(release: str, names: Sequence[str], arguments: _Arguments) -> _Arguments:
    given = [name for name in names if _is_given(arguments.get(name))]
    if given:
        raise UnsupportedKernelArgument(
            f"The call needs {', '.join(given)}, which MATE has from {release} on. {mate.INSTALL}"
        )
    return arguments


def _refuse_unread_softcap(arguments: _Arguments) -> _Arguments:
    """Refuse the calls that MATE before 0.2.1 gives to a kernel that knows no softcap."""
    q, v = arguments["q"], arguments.get("v")
    if v is None or not arguments.get("softcap") or "k_cache" in arguments:
        return arguments
    by_others = _bounded(arguments.get("window_size")) or any(
        arguments.get(name) is not None
        for name in ("sinks", "s_aux", "seqused_q", "seqused_k", "page_table")
    )
    headdims = (q.shape[-1], v.shape[-1])
    if not by_others and (headdims == (192, 128) or (headdims[0] == headdims[1] <= 128)):
        raise UnsupportedKernelArgument(
            f"The call has softcap={arguments['softcap']} with head dimension {headdims[0]}, which "
            "varlen attention "
            f"of MATE before 0.2.1 ignores without a word. {mate.INSTALL}"
        )
    return arguments


def _window_of_mate_0_1(arguments: _Arguments) -> _Arguments:
    """Say a window the way MATE 0.1 reads it: both sides, and not ``causal``, with which it forgets
    the window.
    """
    left, right = arguments.get("window_size", (-1, -1))
    if left < 0 and right < 0:
        return arguments
    if arguments.get("causal"):
        right = 0  # That is what causal means in FA3: nothing to the right, the window to the left.
    if left < 0 < right or right < 0:
        raise UnsupportedKernelArgument(
            f"The call has window_size={(left, right)}, and MATE 0.1 reads windows with two sides "
            "or none. "
            f"{mate.INSTALL}"
        )
    if left < 0:
        return arguments | {"causal": True, "window_size": (-1, -1)}
    return arguments | {"causal": False, "window_size": (left, right)}


def _with_fa3_layout(result: Any) -> Any:
    """The result of an MLA call of padded queries, with ``softmax_lse`` as FA3 has it.

    That is ``(batch, nheads, seqlen_q)``; MATE's MLA kernels give ``(batch, seqlen_q, nheads)``,
    and FA3's own ``(nheads, total_q)`` for packed queries alone.
    """
    if not isinstance(result, tuple):
        return result
    out, lse, *rest = result
    return (out, lse.transpose(1, 2), *rest)


def _versions(*distributions: str) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(map(_short, dtypes)))
