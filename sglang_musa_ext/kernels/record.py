"""The record that a provider of FA3 kernels is, and the errors that providers raise."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

HALF = frozenset({torch.float16, torch.bfloat16})


FUNCTIONS = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata")


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
                f"The KV cache has dtype {short_name(kv_cache_dtype)} (--kv-cache-dtype, or --dtype "
                "with it at 'auto'), "
                f"which the {self.name!r} kernels cannot read. Expected one of: "
                f"{short_names(self.dtypes)}. Start the "
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


def import_library(name: str, remedy: str) -> ModuleType:
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
    missing = [function for function in FUNCTIONS if not callable(getattr(library, function, None))]
    if missing:
        raise KernelsUnavailable(
            f"{name!r} at {getattr(library, '__file__', None)} lacks {', '.join(missing)}, so it "
            "is not the library "
            f"that is needed here. {remedy}"
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
