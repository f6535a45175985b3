"""What SGLang gets on a MUSA device without being asked: ``fa3`` where no backend was chosen, and
vision's FA3 mended.

The page size, 64 where none was given, is upstream's own default on MUSA and stays upstream's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sglang_musa_ext.envs import Settings

logger = logging.getLogger(__name__)

MINIMUM_CAPABILITY = (3, 1)
"""MATE's kernels are built for MP31 and up."""

_VISION = "sglang.srt.layers.attention.vision"
_MARK = "_musa_ext_present"
"""The attribute of a ``ServerArgs`` that was resolved with this package in place; it goes along to
child processes.
"""
_HALF = ("auto", "bf16", "bfloat16", "fp16", "float16", "half")


def install_defaults() -> Callable[[], None]:
    """Put the defaults in place, in this process; a second call changes nothing.

    Returns:
        What takes them out again.
    """
    undo = contextlib.ExitStack()
    for owner, name in _default_choosers():
        _wrap(undo, owner, name, _preferring_fa3)
    _wrap(undo, *_resolution(), _marking)
    _watch_other_backends(undo)
    _mend_vision(undo)
    return undo.close


def device_capability() -> tuple[int, int]:
    """The MP version of this process's device."""
    from sglang.srt.utils import get_device_capability

    major, minor = get_device_capability()
    return major, minor


# --- the attention backend ------------------------------------------------------------------------


def _default_choosers() -> list[tuple[Any, str]]:
    """Where upstream looks up the function that names a backend if nobody else did."""
    from sglang.srt.server_args import ServerArgs

    if hasattr(ServerArgs, "_get_default_attn_backend"):  # up to 0.5.18
        return [(ServerArgs, "_get_default_attn_backend")]
    from sglang.srt.arg_groups import model_override_base, overrides

    return [(module, "get_default_attn_backend") for module in (model_override_base, overrides)]


def _preferring_fa3(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def choose(server_args: Any, use_mla_backend: bool, model_config: Any) -> Any:
        chosen = original(server_args, use_mla_backend, model_config)
        if reason := _reason_against_fa3(server_args, use_mla_backend, model_config):
            logger.info(
                "sglang_musa_ext leaves the attention backend to SGLang (%s), because %s.",
                chosen,
                reason,
            )
            return chosen
        return "fa3"

    return choose


def _reason_against_fa3(server_args: Any, use_mla_backend: bool, model_config: Any) -> str | None:
    """Why ``fa3`` could not serve what was asked for; ``None``: it can."""
    from sglang.srt import platforms

    if platforms.current_platform.is_out_of_tree():
        return "another platform plugin chooses it"
    if "WhisperForConditionalGeneration" in (model_config.hf_config.architectures or ()):
        return "SGLang runs Whisper on one backend alone"
    for option in ("kv_cache_dtype", "dtype"):
        if getattr(server_args, option) not in _HALF:
            return f"MATE cannot read --{option.replace('_', '-')} {getattr(server_args, option)}"
    if use_mla_backend and server_args.page_size not in (None, 64):
        return f"MATE's MLA kernels cannot read --page-size {server_args.page_size}"
    capability = device_capability()
    if capability < MINIMUM_CAPABILITY:
        return f"MATE has no kernels for MP version {'.'.join(map(str, capability))}"
    return None


# --- what came too late ---------------------------------------------------------------------------


def _resolution() -> tuple[Any, str]:
    """The method of ``ServerArgs`` that settles what was left open."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs, "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"


def _marking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resolve(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(self, "_resolution_finished", False)
        result = original(self, *args, **kwargs)
        if not before:
            setattr(self, _MARK, True)
        return result

    return resolve


def _watch_other_backends(undo: contextlib.ExitStack) -> None:
    """Say so where SGLang builds a backend that it chose before this package could."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for name in ("triton", "flashinfer"):
        create = ATTENTION_BACKENDS[name]
        if not hasattr(create, "_musa_ext_original"):
            ATTENTION_BACKENDS[name] = _mark(_watched(name, create), create)
            undo.callback(ATTENTION_BACKENDS.__setitem__, name, create)


def _watched(name: str, create: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(create)
    def watched(runner: Any) -> Any:
        if not getattr(runner.server_args, _MARK, False):
            _warn_of_lateness(name)
        return create(runner)

    return watched


@functools.cache
def _warn_of_lateness(name: str) -> None:
    logger.warning(
        "sglang_musa_ext could not choose the attention backend: this server's arguments were "
        "settled before SGLang "
        "loaded its plugins, and it runs %r. Unless that was your choice, start it with "
        "--attention-backend fa3 (in "
        "Python: ServerArgs(attention_backend='fa3', page_size=64), or call "
        "sglang.srt.plugins.load_plugins() first).",
        name,
    )


# --- vision ---------------------------------------------------------------------------------------


def _mend_vision(undo: contextlib.ExitStack) -> None:
    """Give upstream's vision attention the function that it calls and does not have on MUSA, once
    it is imported.
    """
    if (module := sys.modules.get(_VISION)) is not None:
        _give_flash_attn_func(module)
        return
    if any(isinstance(finder, _AfterImport) and finder.name == _VISION for finder in sys.meta_path):
        return
    finder = _AfterImport(_VISION, _give_flash_attn_func)
    sys.meta_path.insert(0, finder)
    undo.callback(finder.withdraw)


def _give_flash_attn_func(vision: ModuleType) -> None:
    called = vision.VisionFlash3Attention.forward.__code__.co_names
    if "flash_attn_func" in called and not hasattr(vision, "flash_attn_func"):
        vision.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]


def flash_attn_func(q: Any, k: Any, v: Any, **arguments: Any) -> Any:
    """Varlen attention under the name, and with the arguments, that upstream's vision attention has
    for it.

    MATE has a function of this name too, over padded sequences; upstream passes cumulative lengths.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``.
        v: ``(total_k, nheads_k, headdim_v)``.
        arguments: further keywords of FA3's ``flash_attn_varlen_func``.
    """
    return _kernels_of(q.device).flash_attn_varlen_func(q=q, k=k, v=v, **arguments)


@functools.cache
def _kernels_of(device: Any) -> Any:
    from sglang_musa_ext.kernels import provider as kernels

    return kernels.select_kernels(Settings.from_environ(), device)


class _AfterImport(MetaPathFinder):
    """Calls back when a module has been imported, the first time."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name = name
        self._callback = callback

    def withdraw(self) -> None:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        self.withdraw()
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# --- replacing names ------------------------------------------------------------------------------


def _wrap(undo: contextlib.ExitStack, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap`` around the function ``owner.name``, once."""
    original = getattr(owner, name)
    if not hasattr(original, "_musa_ext_original"):
        setattr(owner, name, _mark(wrap(original), original))
        undo.callback(setattr, owner, name, original)


def _mark(wrapper: Any, original: Any) -> Any:
    wrapper._musa_ext_original = original
    return wrapper
