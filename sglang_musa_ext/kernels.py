"""Providers of FA3 kernels, as one record with FlashAttention-3's own keyword names.

A provider is a :class:`FA3Kernels`: ``mate`` (Moore Threads), ``hopper`` (NVIDIA, to validate on) or
``reference`` (PyTorch, on any device). The attention backend does not know which one it has; whatever differs
between them is settled here, by an adapter that reads the functions' signatures once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from sglang_musa_ext import envs, mate
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.mate import identify_mate

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

    The functions take keywords only. They accept what upstream's forwards pass: ``ver=3`` and arguments that the
    library lacks are dropped where they ask for nothing, and refused by name otherwise; ``out=`` is honoured.
    """

    name: str
    flash_attn_with_kvcache: Callable[..., Any]
    flash_attn_varlen_func: Callable[..., Any]
    get_scheduler_metadata: Callable[..., torch.Tensor]
    dtypes: frozenset[torch.dtype]
    """What q, k and v can be."""
    mla_plan_bytes: Callable[[int, int, int, torch.device], int] | None = None
    """Bytes of workspace that a plan needs, from ``(batch_size, max_seqlen_q, num_heads_q, device)``.
    ``None``: MLA calls take ordinary scheduler metadata instead of ``(workspace, reuse)``."""
    mla_page_sizes: tuple[int, ...] | None = None
    """Page sizes that MLA calls take; ``None``: any. Other calls take any page size."""
    metadata_uses_softcap: bool = False
    """Whether scheduler metadata depends on ``has_softcap``."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Distribution names and versions behind the functions, for reports."""

    def require(self, *, page_size: int, kv_cache_dtype: torch.dtype, use_mla: bool) -> None:
        """Refuse a configuration that these kernels cannot serve, before the first request.

        Raises:
            UnsupportedByKernels: naming the option, its value and the choices.
        """
        if kv_cache_dtype not in self.dtypes:
            raise UnsupportedByKernels(
                f"The KV cache has dtype {_short(kv_cache_dtype)} (--kv-cache-dtype, or --dtype with it at 'auto'), "
                f"which the {self.name!r} kernels cannot read. Expected one of: {_names(self.dtypes)}. Start the "
                "server with --kv-cache-dtype auto and a --dtype from this list, or with another --attention-backend."
            )
        if use_mla and self.mla_page_sizes is not None and page_size not in self.mla_page_sizes:
            choices = ", ".join(map(str, self.mla_page_sizes))
            raise UnsupportedByKernels(
                f"--page-size {page_size} does not work with the MLA kernels of {self.name!r}. Expected: {choices}. "
                f"Start the server with --page-size {self.mla_page_sizes[0]}, or without the option."
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
    from sglang_musa_ext import reference

    return FA3Kernels(
        name="reference",
        flash_attn_with_kvcache=_adapt(reference.flash_attn_with_kvcache),
        flash_attn_varlen_func=_adapt(reference.flash_attn_varlen_func),
        get_scheduler_metadata=reference.get_scheduler_metadata,
        dtypes=_HALF | {torch.float32},
        mla_plan_bytes=lambda batch, seqlen, heads, _: reference.mla_plan_bytes(batch, seqlen, heads),
        mla_page_sizes=(64,),
        versions=_versions("torch"),
    )


def mate_kernels(device: torch.device) -> FA3Kernels:
    """MATE, through its FlashAttention-3 wrapper."""
    if device.type != "musa":
        raise KernelsUnavailable(
            f"The 'mate' kernels run on a MUSA device, and the KV cache is on {device}. Set {envs.KERNELS}=auto, or "
            "start the server on a machine with a Moore Threads GPU."
        )
    library = _import_mate()
    return FA3Kernels(
        name="mate",
        flash_attn_with_kvcache=_adapt(library.flash_attn_with_kvcache),
        flash_attn_varlen_func=_adapt(library.flash_attn_varlen_func),
        get_scheduler_metadata=library.get_scheduler_metadata,
        dtypes=_HALF,
        mla_plan_bytes=_mate_mla_plan_bytes,
        mla_page_sizes=(64,),
        versions=_versions("mate", "flash_attn_3", "mate-flash-attention", "torch_musa"),
    )


def hopper_kernels(device: torch.device) -> FA3Kernels:
    """NVIDIA's FA3 as SGLang ships it (``sgl_kernel.flash_attn``), to validate this package on a Hopper GPU."""
    if device.type != "cuda":
        raise KernelsUnavailable(
            f"The 'hopper' kernels run on an NVIDIA GPU, and the KV cache is on {device}. Set {envs.KERNELS}=auto, or "
            "start the server on a machine with a Hopper GPU."
        )
    library = _import_library(
        "sgl_kernel.flash_attn",
        "Install SGLang's kernel package for this GPU, built with FlashAttention-3, as this SGLang pins it.",
    )
    return FA3Kernels(
        name="hopper",
        flash_attn_with_kvcache=_adapt(library.flash_attn_with_kvcache),
        flash_attn_varlen_func=_adapt(library.flash_attn_varlen_func),
        get_scheduler_metadata=_rename(
            library.get_scheduler_metadata, {"num_heads_q": "num_heads", "num_heads_kv": "num_heads_k"}
        ),
        dtypes=_HALF,
        metadata_uses_softcap=True,
        versions=_versions("sglang-kernel", "sgl-kernel"),
    )


_PROVIDERS: Mapping[str, Callable[[torch.device], FA3Kernels]] = {
    "mate": mate_kernels,
    "hopper": hopper_kernels,
    "reference": reference_kernels,
}


def _import_mate() -> ModuleType:
    """MATE's FA3 wrapper, once what is installed has shown that it is the one.

    Raises:
        KernelsUnavailable: with everything that is wrong: what was found, where, whose, and the remedy.
    """
    identity = identify_mate()
    if identity.problems or identity.wrapper_module is None:
        raise KernelsUnavailable(
            "\n".join(map(str, identity.problems)) + f" Or set {envs.MODE}=off to leave SGLang as it is."
        )
    for warning in identity.warnings:
        logger.warning("%s", warning)
    return _import_library(identity.wrapper_module, mate.INSTALL)


def _import_library(name: str, remedy: str) -> ModuleType:
    """The module ``name``, with the three FA3 functions in it.

    Raises:
        KernelsUnavailable: it cannot be imported, for whatever reason its loading has, or lacks a function.
    """
    try:
        library = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise KernelsUnavailable(f"{name!r} cannot be imported: {type(error).__name__}: {error}. {remedy}") from error
    missing = [function for function in _FUNCTIONS if not callable(getattr(library, function, None))]
    if missing:
        raise KernelsUnavailable(
            f"{name!r} at {getattr(library, '__file__', None)} lacks {', '.join(missing)}, so it is not the library "
            f"that is needed here. {remedy}"
        )
    return library


def _mate_mla_plan_bytes(batch_size: int, max_seqlen_q: int, num_heads_q: int, device: torch.device) -> int:
    """Upper bound of an MLA plan: 32 bytes a tile-scheduler part, at most one part a multiprocessor; 4 a request."""
    multiprocessors: int = torch.get_device_module(device).get_device_properties(device).multi_processor_count
    return 32 * multiprocessors + 4 * (batch_size + 1)


def _adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, callable the way upstream's forwards call FA3; see :class:`FA3Kernels`."""
    accepted = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        if (version := arguments.pop("ver", 3)) != 3:
            raise UnsupportedKernelArgument(
                f"The call asks for FlashAttention {version} (ver={version}), and these kernels are FlashAttention-3. "
                "Start the server with --attention-backend fa3."
            )
        out = arguments.pop("out", None) if "out" not in accepted else None
        for name in arguments.keys() - accepted:
            if not _asks_for_nothing(arguments.pop(name)):
                raise UnsupportedKernelArgument(
                    f"{function.__module__}.{function.__name__} has no argument {name!r}, and the call needs it: the "
                    "model uses a feature that these kernels do not have. Serve it with another --attention-backend."
                )
        page_table = arguments.get("page_table")
        if page_table is not None and not page_table.is_contiguous():
            # MATE reads the table as if it were dense. Only the table is copied, never the KV cache.
            arguments["page_table"] = page_table.contiguous()
        result = function(**arguments)
        return result if out is None else _into(out, result)

    return call


def _rename(function: Callable[..., Any], names: Mapping[str, str]) -> Callable[..., Any]:
    """``function``, with keywords called as in ``names`` (FA3's name to the function's own)."""
    return lambda **arguments: function(**{names.get(name, name): value for name, value in arguments.items()})


def _asks_for_nothing(value: Any) -> bool:
    """Whether an argument's value is the one that stands for "not used" in FA3's interfaces."""
    return value is None or value is False


def _into(out: torch.Tensor, result: Any) -> Any:
    """``result`` with its output written to ``out``, for a kernel that cannot write there itself."""
    if isinstance(result, tuple):
        return (_into(out, result[0]), *result[1:])
    return out.copy_(result.view(out.shape))


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
