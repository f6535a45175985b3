"""MATE's kernels: what they cannot do, and what its releases do otherwise."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from sglang_musa_ext import envs
from sglang_musa_ext.kernels import mate_identity
from sglang_musa_ext.kernels.adapter import adapt
from sglang_musa_ext.kernels.record import (
    HALF,
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedKernelArgument,
    import_library,
    short_name,
    short_names,
    versions_of,
)

logger = logging.getLogger(__name__)


def mate_kernels(device: torch.device) -> FA3Kernels:
    """MATE, through its FlashAttention-3 wrapper."""
    if device.type != "musa":
        raise KernelsUnavailable(
            f"The 'mate' kernels run on a MUSA device, and the KV cache is on {device}. Set "
            f"{envs.KERNELS}=auto, or "
            "start the server on a machine with a Moore Threads GPU."
        )
    return mate_record(*_import_mate())


def mate_record(library: Any, release: tuple[int, ...]) -> FA3Kernels:
    """Return the record of a library with the functions of MATE's wrapper.

    Args:
        library: has the three functions of FA3.
        release: MATE's, as numbers: ``(0, 2, 7)``.
    """
    return FA3Kernels(
        name="mate",
        flash_attn_with_kvcache=mate_function(library.flash_attn_with_kvcache, release),
        flash_attn_varlen_func=mate_function(library.flash_attn_varlen_func, release),
        get_scheduler_metadata=adapt(library.get_scheduler_metadata),
        dtypes=HALF,
        mla_plan_bytes=_mate_mla_plan_bytes,
        mla_page_sizes=(64,),
        versions=versions_of(
            "mate", "mate-mubin", "flash_attn_3", "mate-flash-attention", "torch_musa"
        ),
    )


def _import_mate() -> tuple[ModuleType, tuple[int, ...]]:
    """MATE's FA3 wrapper and MATE's release, once what is installed has shown that it is the one.

    Raises:
        KernelsUnavailable: with everything that is wrong: what was found, where, whose, and the
            remedy.
    """
    identity = mate_identity.identify_mate()
    if identity.problems or identity.wrapper_module is None:
        raise KernelsUnavailable(
            "\n".join(map(str, identity.problems))
            + f" Or set {envs.MODE}=off to leave SGLang as it is."
        )
    for warning in identity.warnings:
        logger.warning("%s", warning)
    return import_library(identity.wrapper_module, mate_identity.INSTALL), identity.release


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


_Arguments = dict[str, Any]


_APPENDING = ("k", "v")


_SINCE_0_2_1 = ("cache_leftpad", "cache_batch_idx", "rotary_cos", "rotary_sin", "attention_chunk")


_IGNORED_BY_MLA = ("softcap", "attention_chunk", "sinks", "s_aux")


_INPUTS = ("q", "qv", "k", "v", "k_cache", "v_cache")


_SCALES = ("q_descale", "k_descale", "v_descale")


def mate_function(function: Callable[..., Any], release: tuple[int, ...]) -> Callable[..., Any]:
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
    adapted = adapt(function, dense_page_table=True)

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
    if len(dtypes) > 1 or not dtypes <= HALF:
        raise _not_half(arguments)
    for name in _SCALES:
        arguments.pop(name, None)
    return arguments


def _not_half(arguments: _Arguments) -> UnsupportedKernelArgument:
    found = {name: arguments[name].dtype for name in _INPUTS if arguments.get(name) is not None}
    seen = ", ".join(f"{name} {short_name(dtype)}" for name, dtype in found.items())
    return UnsupportedKernelArgument(
        "MATE's attention kernels take queries, keys and values of one dtype out of "
        f"{short_names(HALF)}, and fp8 not "
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
            f"The attention sinks have dtype {short_name(sinks.dtype)}, and MATE's kernels read "
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
            f"The call needs {', '.join(given)}, which MATE has from {release} on. {mate_identity.INSTALL}"
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
            f"of MATE before 0.2.1 ignores without a word. {mate_identity.INSTALL}"
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
            f"{mate_identity.INSTALL}"
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
