"""The default attention backend on MUSA: ``fa3`` where nobody chose one and it can serve.

The page size, 64 where none was given, is upstream's own default on MUSA and stays upstream's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from sglang_musa_ext import patching, policy
from sglang_musa_ext.announce import announce
from sglang_musa_ext.upstream.check import installed_version
from sglang_musa_ext.upstream.limits import Configuration

logger = logging.getLogger(__name__)

_SETTLED_WITH_US = "_musa_ext_present"
"""The attribute of a ``ServerArgs`` settled with this package; child processes get it too."""


def install_defaults() -> patching.Undo:
    """Put the defaults in place, in this process; a second call changes nothing."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    with contextlib.ExitStack() as undo:
        for owner, name in _default_choosers():
            undo.callback(patching.wrap(owner, name, _preferring_fa3))
        undo.callback(_follow_models())
        undo.callback(patching.wrap(*_settling_method(), _marking))
        for name in ("triton", "flashinfer"):
            watched = functools.partial(_watched, name)
            undo.callback(patching.wrap(ATTENTION_BACKENDS, name, watched))
        return undo.pop_all().close


def device_capability() -> tuple[int, int]:
    """Return the MP version of this process's device."""
    from sglang.srt.utils import get_device_capability

    major, minor = get_device_capability()
    return major, minor


# --- the default ----------------------------------------------------------------------------------


def _default_choosers() -> list[tuple[Any, str]]:
    """Return where upstream looks up the function that names a backend if nobody else did."""
    from sglang.srt.server_args import ServerArgs

    if hasattr(ServerArgs, "_get_default_attn_backend"):  # up to 0.5.18
        return [(ServerArgs, "_get_default_attn_backend")]
    from sglang.srt.arg_groups import model_override_base, overrides

    return [(module, "get_default_attn_backend") for module in (model_override_base, overrides)]


def _preferring_fa3(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def choose(server_args: Any, use_mla_backend: bool, model_config: Any) -> Any:
        chosen = original(server_args, use_mla_backend, model_config)
        asked = _configuration(server_args, use_mla_backend, model_config)
        return _settle(chosen, asked, policy.reasons_against_fa3(asked, _sglang_version()))

    return choose


def _configuration(server_args: Any, use_mla_backend: bool, model_config: Any) -> Configuration:
    from sglang.srt import platforms

    return Configuration.of(
        server_args,
        model_config,
        use_mla=use_mla_backend,
        capability=device_capability(),
        mate=_mate_release(),
        on_musa=True,
        other_platform=platforms.current_platform.is_out_of_tree(),
    )


@functools.cache
def _sglang_version() -> str | None:
    return installed_version()


@functools.cache
def _mate_release() -> tuple[int, ...] | None:
    from sglang_musa_ext.kernels.mate_identity import identify_mate

    return identify_mate().known_release


def _settle(named: str, asked: Configuration, reasons: Sequence[str]) -> str:
    """Return the backend that serves where SGLang names ``named``, and say why, once."""
    model = ", ".join(asked.architectures)
    if named == "fa3":
        return named
    if reasons:
        _say_once(
            f"sglang_musa_ext leaves the attention backend of {model} to SGLang ({named}), because "
            f"{'; '.join(reasons)}."
        )
        return named
    _say_once(
        f"sglang_musa_ext chooses the attention backend fa3 for {model}, because none was named; "
        f"without this package SGLang takes {named}."
    )
    return "fa3"


@functools.cache
def _say_once(line: str) -> None:
    announce(logger, line)


# --- models whose backend upstream names before it asks for the default ---------------------------


_COLLECT = "collect_model_override_declarations"
_DECLARING = ("sglang.srt.arg_groups.overrides", "sglang.srt.arg_groups.model_hook")
"""The modules that have this name, from 0.5.15 and from 0.5.19 on."""


def _follow_models() -> patching.Undo:
    """Take ``fa3`` for the models that upstream puts on Triton on devices it does not know."""
    from sglang.srt.server_args import ServerArgs

    with contextlib.ExitStack() as undo:
        if hasattr(ServerArgs, "_handle_model_specific_adjustments"):  # up to 0.5.18
            method = "_handle_model_specific_adjustments"
            undo.callback(patching.wrap(ServerArgs, method, _adjusting_models))
        for name in _DECLARING:
            undo.callback(_unwrap_declarations, name)
            undo.callback(patching.after_import(name, _wrap_declarations))
        return undo.pop_all().close


def _adjusting_models(original: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 0.5.14 a method settles what depends on the model, in the arguments themselves."""

    @functools.wraps(original)
    def adjust(self: Any) -> Any:
        was_open = _is_open(self)
        result = original(self)
        if was_open and self.attention_backend is not None:
            self.attention_backend = _in_place_of(self.attention_backend, self)
        return result

    return adjust


def _wrap_declarations(module: ModuleType) -> None:
    if hasattr(module, _COLLECT):
        patching.wrap(module, _COLLECT, _declaring_models)


def _unwrap_declarations(name: str) -> None:
    module = sys.modules.get(name)
    if hasattr(module, _COLLECT):
        patching.replace(module, _COLLECT, patching.original_of(getattr(module, _COLLECT)))


def _declaring_models(original: Callable[..., Any]) -> Callable[..., Any]:
    """From 0.5.15 on models declare what they want, and arguments are not changed."""

    @functools.wraps(original)
    def collect(architecture: str, server_args: Any, hf_config: Any) -> Any:
        declarations = original(architecture, server_args, hf_config)
        if _is_open(server_args):
            for _, declared in declarations:
                if declared.get("attention_backend") is not None:
                    named = declared["attention_backend"]
                    declared["attention_backend"] = _in_place_of(named, server_args)
        return declarations

    return collect


def _is_open(server_args: Any) -> bool:
    """Tell whether nobody has named a backend."""
    options = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return all(getattr(server_args, option) is None for option in options)


def _in_place_of(named: str, server_args: Any) -> str:
    """Return the backend for a model for which upstream names ``named`` by itself."""
    if hasattr(server_args, "get_model_config"):  # up to 0.5.18
        use_mla, model_config = server_args.use_mla_backend(), server_args.get_model_config()
    else:
        from sglang.srt.arg_groups.model_override_base import model_config_of, use_mla_backend

        use_mla, model_config = use_mla_backend(server_args), model_config_of(server_args)
    asked = _configuration(server_args, use_mla, model_config)
    reasons = policy.reasons_against_fa3_in_place_of(named, asked, _sglang_version())
    return _settle(named, asked, reasons)


# --- what came too late ---------------------------------------------------------------------------


def _settling_method() -> tuple[Any, str]:
    """Return the method of ``ServerArgs`` that settles what was left open."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs, "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"


def _marking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def settle(self: Any, *args: Any, **kwargs: Any) -> Any:
        was_settled = getattr(self, "_resolution_finished", False)
        if self.attention_backend == "fa3" and self.kv_cache_dtype == "fp8_e5m2":
            _say_once(
                "sglang_musa_ext will not serve: SGLang itself takes triton in place of "
                "--attention-backend fa3 with --kv-cache-dtype fp8_e5m2. MATE 0.2.3 and newer "
                "serve fp8_e4m3."
            )
        result = original(self, *args, **kwargs)
        if not was_settled:
            setattr(self, _SETTLED_WITH_US, True)
        return result

    return settle


def _watched(name: str, create: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``create``, with a warning where SGLang chose a backend before this package could."""

    @functools.wraps(create)
    def watched(runner: Any) -> Any:
        if not getattr(runner.server_args, _SETTLED_WITH_US, False):
            _warn_of_lateness(name)
        return create(runner)

    return watched


@functools.cache
def _warn_of_lateness(name: str) -> None:
    logger.warning(
        "sglang_musa_ext could not choose the attention backend: this server's arguments were "
        "settled before SGLang loaded its plugins, and it runs %r. Unless that was your choice, "
        "start it with --attention-backend fa3 (in Python: "
        "ServerArgs(attention_backend='fa3', page_size=%d), or call "
        "sglang.srt.plugins.load_plugins() first).",
        name,
        policy.PAGE_SIZE,
    )
