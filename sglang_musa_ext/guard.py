"""The guard of ``SGLANG_MUSA_EXT=on``: FA3 attention is ours, or a server does not start.

SGLang goes on without a plugin that ``SGLANG_PLUGINS`` or ``SGLANG_PLATFORM`` leaves out, that
cannot be imported, or that a process never looks for: then no code of a plugin runs, and none can
object. So the guard does not come through SGLang. Torch calls :func:`arm` at the end of its own
import, as it calls every entry point of the group ``torch.backends``, and SGLang imports torch
before any of its attention. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that off, and the guard with
it; the doctor says so.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from sglang_musa_ext import envs

GUARDED_MODULE, GUARDED_CLASS = (
    "sglang.srt.layers.attention.flashattention_backend",
    "FlashAttentionBackend",
)
"""Upstream's FA3 backend, which the in-tree MUSA one and ours are made from."""
_OURS = "sglang_musa_ext.attention.mixin"


class NotServedByUsError(RuntimeError):
    """``SGLANG_MUSA_EXT=on``, and something else was about to serve FA3 attention."""


def arm() -> None:
    """Guard this process and those forked from it, if ``SGLANG_MUSA_EXT=on``; otherwise do nothing.

    Raises nothing: what escaped would be an error of ``import torch``, in every program of the
    environment.
    """
    # Any other value than "on" is judged where it is acted on, in the plugin.
    if os.environ.get(envs.MODE, "").strip().lower() == "on" and not any(
        isinstance(x, _Finder) for x in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the guarded module as Python would, and guards it once it has run; has nothing to say
    of others.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != GUARDED_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            # On the loader at hand, so that it stays the kind that inspect and Triton read sources
            # from.
            spec.loader.exec_module = functools.partial(  # type: ignore[method-assign]
                _execute_and_guard, spec.loader.exec_module
            )
        return spec


def _execute_and_guard(execute: Any, module: ModuleType) -> None:
    execute(module)
    guard_class(getattr(module, GUARDED_CLASS))


def guard_class(backend: type) -> None:
    """Let ``backend`` be constructed as a part of ours alone."""
    original = backend.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def guarded(self: object, *args: Any, **kwargs: Any) -> None:
        if not any(cls.__module__ == _OURS for cls in type(self).__mro__):
            raise NotServedByUsError(
                f"{envs.MODE}=on, and {type(self).__module__}.{type(self).__qualname__} was about "
                "to serve FA3 "
                f"attention in process {os.getpid()}, where SGLang did not load sglang-musa-ext. "
                f"{_reason()} "
                f"Ask sglang-musa-ext doctor, or set {envs.MODE}=auto to let SGLang "
                "serve without it."
            )
        original(self, *args, **kwargs)

    backend.__init__ = guarded  # type: ignore[misc]


def _reason() -> str:
    """Why SGLang may not have loaded the plugin, as far as the environment tells."""
    for variable in ("SGLANG_PLUGINS", envs.PLATFORM):
        if value := os.environ.get(variable):
            return f"{variable}={value} may have left it out: SGLANG_PLUGINS must list musa_ext."
    return "The log above may say 'Failed to load plugin musa_ext'; or this process loads no plugins at all."
