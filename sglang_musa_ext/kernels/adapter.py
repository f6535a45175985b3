"""Calls with FA3's keyword names on functions that differ in names: read off their signatures once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_musa_ext.kernels.record import UnsupportedKernelArgument

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


def adapt(function: Callable[..., Any], *, dense_page_table: bool = False) -> Callable[..., Any]:
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
