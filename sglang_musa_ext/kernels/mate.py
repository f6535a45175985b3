"""MATE's kernels, with FA3's meaning whatever the release.

Where MATE would leave out an argument without a word, the call is refused: a wrong number looks
like any other. What a release lacks or does otherwise stands in ``policy.KERNEL_LIMITS``; here is
how each of these limits is met.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from sglang_musa_ext import envs, policy
from sglang_musa_ext.kernels import mate_identity
from sglang_musa_ext.kernels.adapter import (
    DENSE_PAGE_TABLE,
    AdaptedFunction,
    Arguments,
    FinishRule,
    Rule,
    StepRule,
)
from sglang_musa_ext.kernels.record import (
    FP8,
    HALF,
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedKernelArgument,
    import_library,
    is_first,
    short_name,
    short_names,
    versions_of,
)

logger = logging.getLogger(__name__)


def mate_kernels(device: torch.device) -> FA3Kernels:
    """Return MATE, through its FlashAttention-3 wrapper.

    Raises:
        KernelsUnavailable: the device is no MUSA device, or what is installed is not MATE.
    """
    if device.type != "musa":
        raise KernelsUnavailable(
            f"The 'mate' kernels run on a MUSA device, and the KV cache is on {device}. Set "
            f"{envs.KERNELS}=auto, or start the server on a machine with a Moore Threads GPU."
        )
    return mate_record(*_import_mate())


def mate_record(library: Any, release: policy.MateRelease) -> FA3Kernels:
    """Return the record of a library with the functions of MATE's wrapper.

    Args:
        library: has the three functions of FA3.
        release: MATE's, as numbers: ``(0, 2, 7)``.
    """
    dtypes = frozenset(getattr(torch, name) for name in policy.mate_dtypes(release))
    limits = policy.kernel_limits(release)
    return FA3Kernels(
        name="mate",
        flash_attn_with_kvcache=_attention(library, "flash_attn_with_kvcache", release),
        flash_attn_varlen_func=_attention(library, "flash_attn_varlen_func", release),
        get_scheduler_metadata=_planning(library.get_scheduler_metadata, release),
        dtypes=dtypes,
        mla_dtypes=HALF if "fp8_mla" in limits else None,
        mla_plan_bytes=_mla_plan_bytes,
        mla_page_sizes=(policy.PAGE_SIZE,) if "mla_page_size" in limits else None,
        fastest_page_size=policy.PAGE_SIZE if "page_size" in limits else None,
        serves_head_dims=functools.partial(policy.mate_serves_head_dims, release),
        head_dims=head_dims_in_words(release),
        largest_batch=policy.mate_largest_batch(release),
        drops_plan=has_sinks if "sinks_plan" in limits else lambda arguments: False,
        static_num_splits=functools.partial(_static_num_splits, release),
        combines_unsplit=True,
        serves_raw_keys=functools.partial(serves_raw_keys, release),
        plan_contents=plan_contents,
        versions=versions_of(
            "mate", "mate-mubin", "flash_attn_3", "mate-flash-attention", "torch_musa"
        ),
    )


def _import_mate() -> tuple[ModuleType, policy.MateRelease]:
    """Import MATE's FA3 wrapper, once what is installed has shown that it is the one.

    Raises:
        KernelsUnavailable: with all that is wrong: what was seen, where, whose, and the remedy.
    """
    identity = mate_identity.identify_mate()
    if identity.problems or identity.wrapper_module is None:
        raise KernelsUnavailable(
            "\n".join(map(str, identity.problems))
            + f" Or set {envs.MODE}=off to leave SGLang as it is."
        )
    for warning in identity.warnings:
        if is_first(str(warning)):
            logger.warning("%s", warning)
    _warn_of_unread(identity.release)
    return import_library(identity.wrapper_module, mate_identity.INSTALL), identity.release


def _warn_of_unread(release: policy.MateRelease) -> None:
    is_unread = policy.NEWEST_READ_MATE < release[:3] <= policy.NEWEST_MATE
    if is_unread and is_first("unread", release):
        logger.warning(
            "MATE %s is served by what its release notes say: its source could not be read, as "
            "those of %s were. Check its numbers with sglang-musa-ext validate before you rely on "
            "it.",
            ".".join(map(str, release)),
            mate_identity.sources_read(),
        )


# --- what every caller may know before a call -----------------------------------------------------


def head_dims_in_words(release: policy.MateRelease) -> str:
    """List the head dimensions that a release has kernels for, for messages."""
    pairs = ", ".join(f"{qk}/{v}" for qk, v in policy.mate_head_dim_pairs(release))
    return f"a pair that rounds up to one of {pairs}"


def has_sinks(arguments: Mapping[str, Any]) -> bool:
    """Return whether a call has attention sinks, with which MATE ignores its plan."""
    return arguments.get("sinks") is not None or arguments.get("s_aux") is not None


def serves_raw_keys(
    release: policy.MateRelease,
    *,
    dtype: torch.dtype,
    headdim: int,
    headdim_v: int,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    attention_chunk: int = 0,
    has_sinks: bool = False,
) -> bool:
    """Return whether MATE's kernels that are compiled in advance serve a call over raw keys.

    All other calls are exact too, but run on the kernels that calls over a cache run on.
    """
    del release  # It has been the same in all of them.
    plain = not (softcap or attention_chunk or has_sinks or _bounded(window_size))
    return plain and dtype in HALF and _is_precompiled(headdim, headdim_v)


def _is_precompiled(headdim: int, headdim_v: int) -> bool:
    return (headdim, headdim_v) == (192, 128) or headdim == headdim_v <= 128


def plan_contents(plan: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return what two computations of one plan have in common: ``(4, batch_size)``, of int32.

    Up to 0.2.3 a plan is four vectors of the batch size. From 0.2.4 on they are of the batch size
    rounded up to 4, and the padding is never written.

    Args:
        plan: int32, ``(n,)``.
        batch_size: number of requests.

    Raises:
        ValueError: for a length that neither layout has.
    """
    padded = -(-batch_size // 4) * 4
    for length in (batch_size, padded):
        if plan.numel() == 4 * length:
            return plan.view(4, length)[:, :batch_size]
    raise ValueError(
        f"A plan of MATE has {plan.numel()} values for a batch of {batch_size}, which "
        f"{envs.CHECK} cannot compare. Expected {4 * batch_size} or {4 * padded}. Unset "
        f"{envs.CHECK}, and report this with the version of MATE."
    )


def _static_num_splits(release: policy.MateRelease, **geometry: Any) -> int | None:
    """Return the number of splits that MATE launches on the current device."""
    from sglang_musa_ext.kernels.reference.planning import launched_splits

    module = torch.get_device_module("musa")
    properties = module.get_device_properties(module.current_device())
    caps_windows = "uncapped_windows" not in policy.kernel_limits(release)
    return launched_splits(
        multiprocessors=properties.multi_processor_count, caps_windows=caps_windows, **geometry
    )


def _mla_plan_bytes(
    batch_size: int, max_seqlen_q: int, num_heads_q: int, device: torch.device
) -> int:
    """Bound an MLA plan: 32 bytes for each multiprocessor's part, and 4 a request."""
    multiprocessors: int = (
        torch.get_device_module(device).get_device_properties(device).multi_processor_count
    )
    return 32 * multiprocessors + 4 * (batch_size + 1)


# --- the functions --------------------------------------------------------------------------------


def _attention(library: Any, own: str, release: policy.MateRelease) -> AdaptedFunction:
    """Adapt the attention function of MATE's wrapper that is called ``own``."""
    over_cache = own == "flash_attn_with_kvcache"
    limits = policy.kernel_limits(release)
    rules: list[Rule] = [
        functools.partial(_require_dtypes, release),
        _require_bfloat16_sinks,
        _require_dense_rows,
        _require_mla_decode,
        _drop_unset,
    ]
    for limit in limits.values():
        if limit.arguments and limit.function in (None, own):
            rules.append(functools.partial(_refuse, limit))
    by_limit = _RULES_OVER_CACHE if over_cache else _RULES_OVER_RAW_KEYS
    rules += [rule for name, rule in by_limit.items() if name in limits]
    steps = [DENSE_PAGE_TABLE, DESCALES, *([] if over_cache else [ONE_REQUEST])]
    return AdaptedFunction(
        getattr(library, own), rules=rules, steps=steps, finishes=[_PADDED_MLA], traits=call_traits
    )


def _planning(function: Callable[..., Any], release: policy.MateRelease) -> AdaptedFunction:
    """Adapt ``get_scheduler_metadata``."""
    largest = policy.mate_largest_batch(release)
    if largest is None:
        return AdaptedFunction(function)
    return AdaptedFunction(
        function,
        rules=[functools.partial(_refuse_large_batch, largest)],
        traits=lambda names: lambda call: call.get("batch_size", 0) > largest,
    )


_INPUTS = ("q", "qv", "k", "v", "k_cache", "v_cache")
_SINKS = ("sinks", "s_aux")
_CACHES = ("k", "v", "k_cache", "v_cache")
_SCALES = ("q_descale", "k_descale", "v_descale")
_OPTIONS = ("causal", "window_size", "softcap", "attention_chunk", "num_splits")
_PRESENCES = (
    "page_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "cache_batch_idx",
    "cache_leftpad", "rotary_cos", "rotary_sin",
)  # fmt: skip
"""Arguments of which only matters whether a call has them."""
_DECIDED_BY_NAME = ("page_table", "cu_seqlens_q")
"""Those of which not even that matters to calls over a cache without ``qv``."""


def call_traits(names: tuple[str, ...]) -> Callable[[Arguments], Any]:
    """Return what reads off a call all that the rules, steps and finishes here decide by.

    It runs in every call, so it reads no more than these names can make a difference by.
    """
    is_plain = "k_cache" in names and "qv" not in names
    tensors = [name for name in (*_INPUTS, *_SINKS) if name in names]
    caches = [name for name in _CACHES if name in names]
    options = [name for name in _OPTIONS if name in names]
    presences = [n for n in _PRESENCES if n in names and not (is_plain and n in _DECIDED_BY_NAME)]
    measured = [] if is_plain else [name for name in ("q", "qv", "v") if name in names]

    def plain(arguments: Arguments) -> Any:
        dtypes = [None if (t := arguments[name]) is None else t.dtype for name in tensors]
        strides = [None if (t := arguments[name]) is None else t.stride(-1) for name in caches]
        return dtypes, strides, [arguments[name] for name in options]

    def traits(arguments: Arguments) -> Any:
        is_absent = [arguments[name] is None for name in presences]
        dims = [_head_dim(arguments[name]) for name in measured]
        has_workspace = type(arguments.get("scheduler_metadata")) is tuple
        return plain(arguments), is_absent, dims, has_workspace

    return plain if is_plain and not presences else traits


def _head_dim(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.size(-1)


# --- rules: arguments as MATE wants them, or a refusal --------------------------------------------


def _require_dtypes(release: policy.MateRelease, arguments: Arguments) -> Arguments:
    """Refuse what MATE does not read, or not together; drop scales that half precision lacks."""
    dtypes = {tensor.dtype for name in _INPUTS if (tensor := arguments.get(name)) is not None}
    known = frozenset(getattr(torch, name) for name in policy.mate_dtypes(release))
    if len(dtypes) > 1 or not dtypes <= known:
        raise _unreadable(arguments, known)
    if dtypes <= HALF:
        return {name: value for name, value in arguments.items() if name not in _SCALES}
    if arguments.get("qv") is not None:
        raise _unreadable(arguments, HALF)
    return arguments


def _unreadable(arguments: Arguments, known: frozenset[torch.dtype]) -> UnsupportedKernelArgument:
    dtypes = {name: arguments[name].dtype for name in _INPUTS if arguments.get(name) is not None}
    seen = ", ".join(f"{name} {short_name(dtype)}" for name, dtype in dtypes.items())
    kind = "MLA" if arguments.get("qv") is not None else "attention"
    return UnsupportedKernelArgument(
        f"MATE's {kind} kernels of this release take queries, keys and values of one dtype out of "
        f"{short_names(known)}, and no fp8 besides; the call has {seen}. Start the server with "
        "--kv-cache-dtype auto and --dtype bfloat16."
    )


def _require_bfloat16_sinks(arguments: Arguments) -> Arguments:
    sinks = arguments.get("sinks")
    if sinks is None:
        sinks = arguments.get("s_aux")
    if sinks is not None and sinks.dtype != torch.bfloat16:
        # Rounding them here would be a choice about the model's weights, made anew in every call.
        raise UnsupportedKernelArgument(
            f"The attention sinks have dtype {short_name(sinks.dtype)}, and MATE's kernels read "
            "bfloat16. Load the model's sinks as bfloat16, as SGLang does for FA3, or serve it "
            "with another --attention-backend."
        )
    return arguments


def _require_dense_rows(arguments: Arguments) -> Arguments:
    """Refuse a cache that a kernel could only read from a copy as large as the cache."""
    paged = ("k", "v") if arguments.get("page_table") is not None else ()
    for name in ("k_cache", "v_cache", *paged):
        cache = arguments.get(name)
        if cache is not None and cache.stride(-1) != 1:
            raise UnsupportedKernelArgument(
                f"The last dimension of {name} has stride {cache.stride(-1)}, and MATE's kernels "
                "need 1. Start the server with the default layout of its KV cache."
            )
    return arguments


_IGNORED_BY_MLA = ("softcap", "attention_chunk", "sinks", "s_aux")


def _require_mla_decode(arguments: Arguments) -> Arguments:
    """Refuse ``qv`` but as MLA has it, and in MLA what its kernels leave out without a word.

    Later sources of MATE take ``qv`` without a workspace, or ``only_qv``, and give such a call to
    kernels that compile at first use. The workspace works in every release and runs on kernels
    compiled in advance, so there is one way for all.
    """
    qv = arguments.get("qv")
    if qv is None:
        return arguments
    head_dims = [_head_dim(arguments.get("q")), _head_dim(qv)]
    if head_dims != [64, 512]:
        raise UnsupportedKernelArgument(
            f"The call has q and qv with head dimensions {head_dims[0]} and {head_dims[1]}, and "
            "MATE's MLA kernels have 64 and 512. Serve the model with another --attention-backend."
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
            "without a word. Serve the model with another --attention-backend."
        )
    return arguments


def _drop_unset(arguments: Arguments) -> Arguments:
    """Leave out a ``None`` for which FA3 has another word: not every MATE takes both."""
    words = ("window_size", "attention_chunk", "softcap", "num_splits")
    unset = {name for name in words if name in arguments and arguments[name] is None}
    return {name: value for name, value in arguments.items() if name not in unset}


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, int | float) and value == 0)


def _bounded(window: Any) -> bool:
    return window is not None and max(window) >= 0


def _refuse(limit: policy.KernelLimit, arguments: Arguments) -> Arguments:
    """Refuse a call that uses an argument of ``limit``."""
    given = [name for name in limit.arguments if _is_given(arguments.get(name))]
    if given:
        assert limit.until is not None
        release = ".".join(map(str, limit.until))
        raise UnsupportedKernelArgument(
            f"The call needs {', '.join(given)}, which MATE has from {release} on; before, MATE "
            f"{limit.why}. {mate_identity.INSTALL}"
        )
    return arguments


def _refuse_unread_softcap(arguments: Arguments) -> Arguments:
    """Refuse the calls that MATE before 0.2.1 gives to a kernel that knows no softcap."""
    if not arguments.get("softcap") or not _goes_to_precompiled(arguments | {"softcap": 0.0}):
        return arguments
    raise UnsupportedKernelArgument(
        f"The call has softcap={arguments['softcap']} with head dimension "
        f"{_head_dim(arguments['q'])}, which varlen attention of MATE before 0.2.1 ignores without "
        f"a word. {mate_identity.INSTALL}"
    )


def _refuse_large_batch(largest: int, arguments: Arguments) -> Arguments:
    batch = arguments.get("batch_size", 0)
    if batch > largest:
        raise UnsupportedKernelArgument(
            f"A plan for batch_size={batch} was asked for, and this release of MATE plans for "
            f"{largest} requests at most. Start the server with --max-running-requests {largest}. "
            f"{mate_identity.INSTALL}"
        )
    return arguments


def _window_of_mate_0_1(arguments: Arguments) -> Arguments:
    """Say a window as MATE 0.1 reads it: by both sides, without ``causal``, which drops it."""
    left, right = arguments.get("window_size", (-1, -1))
    if left < 0 and right < 0:
        return arguments
    if arguments.get("causal"):
        right = 0  # That is what causal means in FA3: nothing to the right, the window to the left.
    if left < 0 < right or right < 0:
        raise UnsupportedKernelArgument(
            f"The call has window_size={(left, right)}, and MATE 0.1 reads windows with two sides "
            f"or none. {mate_identity.INSTALL}"
        )
    if left < 0:
        return arguments | {"causal": True, "window_size": (-1, -1)}
    return arguments | {"causal": False, "window_size": (left, right)}


def _causal_for_its_window(arguments: Arguments) -> Arguments:
    """Say ``causal`` for a window that ends at a row's own key and has no other side."""
    left, right = arguments.get("window_size", (-1, -1))
    if left >= 0 or right != 0:
        return arguments
    return arguments | {"causal": True, "window_size": (-1, -1)}


_RULES_OVER_CACHE: Mapping[str, Rule] = {"old_window": _window_of_mate_0_1}
_RULES_OVER_RAW_KEYS: Mapping[str, Rule] = {
    "raw_softcap": _refuse_unread_softcap,
    "old_window": _window_of_mate_0_1,
    "causal_window": _causal_for_its_window,
}
"""Handlers of limits of ``policy.KERNEL_LIMITS`` by name, where refusing is not enough."""


# --- steps: what every call needs -----------------------------------------------------------------


def _goes_to_precompiled(arguments: Arguments) -> bool:
    """Return whether MATE gives a call over raw keys to kernels that it compiled in advance."""
    others = ("page_table", "block_table", "seqused_q", "seqused_k", "qv", *_SINKS)
    if any(arguments.get(name) is not None for name in others):
        return False
    if any(_is_given(arguments.get(name)) for name in ("softcap", "attention_chunk")):
        return False
    q, v = arguments.get("q"), arguments.get("v")
    if q is None or v is None or q.dtype in FP8 or _bounded(arguments.get("window_size")):
        return False
    return _is_precompiled(q.size(-1), v.size(-1))


def _is_over_one_run(arguments: Arguments) -> bool:
    offsets = (arguments.get("cu_seqlens_q"), arguments.get("cu_seqlens_k"))
    return None not in offsets and _goes_to_precompiled(arguments)


def _read_lengths_of_one_request(arguments: Arguments) -> None:
    """Have MATE read the lengths of one request where rows of the tensors may be padding.

    For a batch of one its precompiled kernels take the tensors' lengths for the request's. These
    are the same where ``max_seqlen_q`` and ``max_seqlen_k`` are, because for one request they are
    its lengths; but not in a graph, which is replayed for others. ``seqused_k`` is a view, and
    nothing waits for the device.
    """
    ends = arguments["cu_seqlens_k"]
    if ends.size(0) != 2:
        return
    q, k = arguments["q"], arguments["k"]
    lengths = (arguments.get("max_seqlen_q"), arguments.get("max_seqlen_k"))
    if (q.size(0), k.size(0)) != lengths or _is_capturing(q.device):
        arguments["seqused_k"] = ends[1:]


ONE_REQUEST = StepRule(_is_over_one_run, _read_lengths_of_one_request)


def _is_capturing(device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return False
    return bool(torch.get_device_module(device).is_current_stream_capturing())


def _is_fp8(arguments: Arguments) -> bool:
    return getattr(arguments.get("q"), "dtype", None) in FP8


def _complete_descales(arguments: Arguments) -> None:
    """Give every scale of an fp8 call, dense ``(batch, heads_kv)`` float32; those it lacks are 1.

    SGLang expands a layer's scale to the batch of the server, which is not the batch of the call
    where a request is cut into several, as in chunked attention. They are dense because no source
    that could be read says that MATE heeds their strides.
    """
    q, offsets = arguments["q"], arguments.get("cu_seqlens_q")
    keys = arguments["k_cache"] if "k_cache" in arguments else arguments["k"]
    shape = (q.size(0) if offsets is None else offsets.size(0) - 1, keys.size(-2))
    for name in _SCALES:
        scale = arguments.get(name)
        if scale is None:
            arguments[name] = _unit_scales(*shape, q.device)
        else:
            arguments[name] = _fitting_scale(name, scale, shape)


def _fitting_scale(name: str, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return a scale in this shape; refuse one that is for other requests or heads."""
    if tuple(scale.shape) != shape:
        is_of_layer = scale.dim() == 2 and scale.stride(0) == 0
        scale = scale[:1] if is_of_layer else scale
        fits = all(size in (1, wanted) for size, wanted in zip(scale.shape, shape, strict=False))
        if scale.dim() > 2 or not fits:
            raise UnsupportedKernelArgument(
                f"The call has {name} of shape {tuple(scale.shape)}, and MATE's kernels take "
                f"{shape}: one for each request and key head. Start the server with "
                "--kv-cache-dtype auto."
            )
    return scale.float().expand(shape).contiguous()


def _unit_scales(batch: int, heads: int, device: torch.device) -> torch.Tensor:
    """Return scales of 1, which are made once for many calls, but in a graph for it alone."""
    if _is_capturing(device):
        return torch.ones((batch, heads), dtype=torch.float32, device=device)
    return _kept_unit_scales(1 << (batch - 1).bit_length(), heads, device)[:batch]


@functools.cache
def _kept_unit_scales(batch: int, heads: int, device: torch.device) -> torch.Tensor:
    # Copied from the host, which waits: a stream other than this one may read them next.
    return torch.ones((batch, heads), dtype=torch.float32).to(device)


DESCALES = StepRule(_is_fp8, _complete_descales)


# --- finishes: results as FA3 has them ------------------------------------------------------------


def _is_padded_mla(arguments: Arguments) -> bool:
    return arguments.get("qv") is not None and arguments.get("cu_seqlens_q") is None


def _with_fa3_layout(result: Any) -> Any:
    """Lay ``softmax_lse`` of an MLA call of padded queries out as FA3 does.

    That is ``(batch, nheads, seqlen_q)``; MATE's MLA kernels give ``(batch, seqlen_q, nheads)``,
    and FA3's own ``(nheads, total_q)`` for packed queries alone.
    """
    if not isinstance(result, tuple):
        return result
    out, lse, *others = result
    return (out, lse.transpose(1, 2), *others)


_PADDED_MLA = FinishRule(_is_padded_mla, _with_fa3_layout)
