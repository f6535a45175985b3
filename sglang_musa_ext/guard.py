"""The guard of FA3 attention: with ``SGLANG_MUSA_EXT=on`` it is ours, or a server does not start.

SGLang goes on without a plugin that ``SGLANG_PLUGINS`` or ``SGLANG_PLATFORM`` leaves out, that
cannot be imported, or that a process never looks for: then no code of a plugin runs, and none can
object. So the guard does not come through SGLang. Torch calls :func:`arm` at the end of its own
import, as it calls every entry point of the group ``torch.backends``, and SGLang imports torch
before any of its attention. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that off, and the guard with
it; the doctor says so.

Where this package serves, in any mode, it refuses other FA3 backends itself: :func:`refuse_others`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_musa_ext import envs, patching
from sglang_musa_ext.upstream.names import FLASH_ATTENTION, FLASH_ATTENTION_CLASS

_OURS = "sglang_musa_ext.attention."
"""The prefix of the modules whose classes are ours."""


class NotServedByUsError(RuntimeError):
    """Something else than this package was about to serve FA3 attention."""


def arm() -> None:
    """Guard this process and those forked from it, if ``SGLANG_MUSA_EXT=on``; otherwise do nothing.

    Raises nothing: an error would be one of ``import torch``, in every program of the environment.
    """
    # Any other value than "on" is judged where it is acted on, in the plugin.
    if os.environ.get(envs.MODE, "").strip().lower() == "on":
        patching.after_import(FLASH_ATTENTION, _guard_against_our_absence)


def refuse_others() -> patching.Undo:
    """Refuse every FA3 backend but ours in a process where this package serves.

    Upstream may build one in a way that this package does not know.
    """
    return patching.after_import(FLASH_ATTENTION, _guard_beside_ours)


def guard_class(backend: type, explain: Callable[[type], str]) -> patching.Undo:
    """Let ``backend`` be constructed as a base of our classes alone.

    Args:
        backend: upstream's class.
        explain: returns the text of the error for a class that is not ours.
    """
    return patching.wrap(
        backend, "__init__", functools.partial(_guarded, explain=explain), again=True
    )


def _guarded(original: Callable[..., None], explain: Callable[[type], str]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        if not any(cls.__module__.startswith(_OURS) for cls in type(self).__mro__):
            raise NotServedByUsError(explain(type(self)))
        original(self, *args, **kwargs)

    return init


def _guard_against_our_absence(module: ModuleType) -> None:
    guard_class(getattr(module, FLASH_ATTENTION_CLASS), _not_loaded)


def _guard_beside_ours(module: ModuleType) -> None:
    guard_class(getattr(module, FLASH_ATTENTION_CLASS), _another_way)


def _not_loaded(backend: type) -> str:
    return (
        f"{envs.MODE}=on, and {backend.__module__}.{backend.__qualname__} was about to serve FA3 "
        f"attention in process {os.getpid()}, where SGLang did not load sglang-musa-ext. "
        f"{_reason()} Ask sglang-musa-ext doctor, or set {envs.MODE}=auto to let SGLang serve "
        "without this package."
    )


def _another_way(backend: type) -> str:
    return (
        f"{backend.__module__}.{backend.__qualname__} was about to serve FA3 attention in place of "
        "MusaFA3Backend. sglang-musa-ext serves --attention-backend fa3 and its draft models; the "
        "option that led here is not supported with it. Choose --attention-backend fa3, or set "
        f"{envs.MODE}=off."
    )


def _reason() -> str:
    """Say why SGLang may not have loaded the plugin, as far as the environment tells."""
    for variable in ("SGLANG_PLUGINS", envs.PLATFORM):
        if value := os.environ.get(variable):
            return f"{variable}={value} may have left it out: SGLANG_PLUGINS must list musa_ext."
    return (
        "The log above may say 'Failed to load plugin musa_ext'; or this process loads no plugins "
        "at all."
    )
