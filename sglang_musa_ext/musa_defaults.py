"""What SGLang gets on a MUSA device without being asked: ``fa3`` where no backend was chosen.

The page size, 64 where none was given, is upstream's own default on MUSA and stays upstream's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang_musa_ext import patching, policy
from sglang_musa_ext.policy import Configuration

logger = logging.getLogger(__name__)

_SETTLED_WITH_US = "_musa_ext_present"
"""The attribute of a ``ServerArgs`` that was settled with this package in place; it goes along to
child processes.
"""


def install_defaults() -> patching.Undo:
    """Put the defaults in place, in this process; a second call changes nothing."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    with contextlib.ExitStack() as undo:
        for owner, name in _default_choosers():
            undo.callback(patching.wrap(owner, name, _preferring_fa3))
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


# --- the attention backend ------------------------------------------------------------------------


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
        reasons = policy.reasons_against_fa3(asked)
        if not reasons:
            return "fa3"
        logger.info(
            "sglang_musa_ext leaves the attention backend to SGLang (%s), because %s.",
            chosen,
            "; ".join(reasons),
        )
        return chosen

    return choose


def _configuration(server_args: Any, use_mla_backend: bool, model_config: Any) -> Configuration:
    from sglang.srt import platforms

    return Configuration(
        dtype=server_args.dtype,
        kv_cache_dtype=server_args.kv_cache_dtype,
        page_size=server_args.page_size,
        use_mla=use_mla_backend,
        topk=server_args.speculative_eagle_topk,
        architectures=tuple(model_config.hf_config.architectures or ()),
        capability=device_capability(),
        other_platform=platforms.current_platform.is_out_of_tree(),
    )


# --- what came too late ---------------------------------------------------------------------------


def _settling_method() -> tuple[Any, str]:
    """Return the method of ``ServerArgs`` that settles what was left open."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs, "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"


def _marking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def settle(self: Any, *args: Any, **kwargs: Any) -> Any:
        was_settled = getattr(self, "_resolution_finished", False)
        result = original(self, *args, **kwargs)
        if not was_settled:
            setattr(self, _SETTLED_WITH_US, True)
        return result

    return settle


def _watched(name: str, create: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``create``, with a warning where SGLang chose the backend before this package could."""

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
