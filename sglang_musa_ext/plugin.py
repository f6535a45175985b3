"""SGLang's entry points: :func:`register` in every process, :func:`activate_platform`.

Nothing heavy is imported until a server asks for ``fa3``. SGLang logs what a plugin raises and then
serves without it, so a problem is not raised here: it is kept, and raised when a server asks for
what the plugin should have given.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from sglang_musa_ext import envs
from sglang_musa_ext.envs import Settings

logger = logging.getLogger(__name__)


class PluginError(RuntimeError):
    """This package was to serve attention, and cannot. The message says why and what to do."""


def register() -> None:
    """Put this package under ``--attention-backend fa3``, if environment and device ask for it.

    Called by SGLang in each of its processes; calling it again changes nothing. Raises nothing: a
    problem becomes an error of every attempt to build an FA3 backend, which stops the server.
    """
    try:
        settings = Settings.from_environ()
        if settings.mode != "off":
            _register(settings)
    except Exception as error:
        logger.error("sglang_musa_ext cannot serve, and fa3 will refuse to: %s", error)
        refuse = functools.partial(_refuse, error)
        _take_over(refuse)
        # What upstream does not have builds nothing: there is nothing to refuse.
        with contextlib.suppress(ImportError, AttributeError):
            _take_over_drafts(refuse)


def _register(settings: Settings) -> None:
    if idle := _reason_to_stay_idle(settings):
        # Who has no MUSA device and asked for nothing must not notice that this is installed.
        say = _announce if envs.is_addressed() else logger.info
        say(f"sglang_musa_ext stays idle in process {os.getpid()}: {idle}")
        return
    from sglang_musa_ext.upstream import check

    support = check.require_upstream()
    if support.message:
        logger.warning("%s", support.message)
    _require_unclaimed()
    _take_over(create_musa_fa3_backend)
    _take_over_drafts(_draft_backend_of_ours)
    _have_ranks_agree(settings)
    if _on_musa():
        _take_defaults()
        _repair_vision()
    _announce(
        f"sglang_musa_ext is active in process {os.getpid()}: --attention-backend fa3 is "
        f"MusaFA3Backend (SGLang {support.version})"
    )


def _require_unclaimed() -> None:
    """Refuse to replace what another plugin has put under ``fa3``: one of the two serves."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    create = ATTENTION_BACKENDS.get("fa3")
    # A refusal of ours is a function with an argument filled in.
    create = getattr(create, "func", create)
    owner = getattr(create, "__module__", "")
    if create is None or owner.split(".")[0] in ("sglang", __name__.split(".")[0]):
        return
    raise PluginError(
        f"another plugin serves --attention-backend fa3 in this process: {owner}."
        f"{getattr(create, '__name__', create)}. Uninstall one of the two, or name the plugins "
        f"to load in SGLANG_PLUGINS, or set {envs.MODE}=off."
    )


def _announce(line: str) -> None:
    from sglang_musa_ext.announce import announce

    announce(logger, line)


def activate_platform() -> str | None:
    """Return the CPU platform's class name if ``SGLANG_PLATFORM`` asks for it, else ``None``.

    Raises:
        PluginError: it is asked for while ``SGLANG_MUSA_EXT=off``.
    """
    if not (named := envs.named_platform()):
        return None
    from sglang_musa_ext import policy

    if named != policy.REFERENCE_PLATFORM:
        return None
    if Settings.from_environ().mode == "off":
        raise PluginError(
            f"{envs.PLATFORM}={policy.REFERENCE_PLATFORM} asks for the CPU platform of "
            f"sglang-musa-ext, and {envs.MODE}=off turns the package off. Unset one of the two."
        )
    from sglang_musa_ext.cpu import stand_ins

    stand_ins.prepare_process()
    return "sglang_musa_ext.cpu.platform.CpuReferencePlatform"


def create_musa_fa3_backend(runner: Any) -> Any:
    """Build the FA3 backend of ``runner``; the attention registry calls this for ``fa3``."""
    attention = _ready_attention()
    if not runner.spec_algorithm.is_none():
        attention.install_class_names()
    backend = attention.MusaFA3Backend(runner)
    _require_upstream_serves(backend, runner)
    return backend


def _require_upstream_serves(backend: Any, runner: Any) -> None:
    """Refuse, or warn of, a configuration that upstream's own code cannot serve with ``fa3``.

    Raises:
        PluginError: naming what is seen, what would happen, and what to set instead.
    """
    from sglang_musa_ext.upstream import check
    from sglang_musa_ext.upstream.limits import Configuration, limits_of

    package = check.find_package()
    assert package is not None  # it is what called this
    asked = Configuration.of_backend(backend, runner, on_musa=_on_musa())
    limits = limits_of(asked, check.read_version(package))
    for limit in limits:
        if not limit.is_fatal:
            logger.warning("SGLang's %s", limit)
    if fatal := [limit for limit in limits if limit.is_fatal]:
        raise PluginError("\n".join(f"SGLang's {limit.refusal(asked)}" for limit in fatal))


def _reason_to_stay_idle(settings: Settings) -> str | None:
    """Return why there is nothing to do here, or ``None`` if there is.

    Raises:
        PluginError: ``SGLANG_MUSA_EXT=on`` where there is nothing it could be on for.
    """
    from sglang_musa_ext import policy

    choice = policy.choose_service(settings, on_musa=_on_musa())
    if choice.kernels is not None:
        return None
    reasons = "; ".join(choice.reasons)
    if settings.mode == "on":
        raise PluginError(
            f"{envs.MODE}=on, and {reasons}. Install torch_musa and torchada, or set "
            f"{envs.KERNELS}=hopper or =reference to run without a MUSA device, or "
            f"{envs.MODE}=auto."
        )
    return reasons


def _on_musa() -> bool:
    from sglang.srt.utils import is_musa

    return bool(is_musa())


def _have_ranks_agree(settings: Settings) -> None:
    """Have the ranks of a server compare themselves. What upstream has changed about that costs
    nothing else, unless the comparison was asked for.

    Raises:
        PluginError: ``SGLANG_MUSA_EXT=on``, and ranks cannot be compared on this SGLang.
    """
    from sglang_musa_ext import ranks
    from sglang_musa_ext.upstream import check

    if not (violations := check.check_upstream(used_by=("ranks",))):
        ranks.install_agreement()
        return
    listed = "; ".join(map(str, violations))
    if settings.mode == "on":
        raise PluginError(
            f"{envs.MODE}=on, and the ranks of a server cannot be compared on this SGLang: "
            f"{listed} Install a tested release, or set {envs.MODE}=auto."
        )
    logger.warning("sglang_musa_ext cannot compare the ranks of a server. %s", listed)


def _take_defaults() -> None:
    """Put the defaults of MUSA in place; if upstream has changed, they are lost, not ``fa3``."""
    from sglang_musa_ext import musa_defaults
    from sglang_musa_ext.upstream import check

    if violations := check.check_upstream(used_by=("musa_defaults",)):
        listing = "; ".join(map(str, violations))
        logger.warning(
            "sglang_musa_ext cannot choose defaults; start with --attention-backend fa3. %s",
            listing,
        )
        return
    musa_defaults.install_defaults()


def _repair_vision() -> None:
    """Repair vision's FA3 where upstream still needs it."""
    from sglang_musa_ext import musa_vision
    from sglang_musa_ext.upstream import check

    if violations := check.check_upstream(used_by=("musa_vision",)):
        listing = "; ".join(map(str, violations))
        logger.info("sglang_musa_ext leaves the vision tower's FA3 as it is. %s", listing)
        return
    musa_vision.install_vision()


def _require_capability() -> None:
    """Refuse a MUSA device that MATE has no kernels for; says nothing of other devices."""
    if not _on_musa():
        return
    from sglang.srt.utils import get_device_capability

    from sglang_musa_ext import policy

    if reason := policy.reason_against_capability(get_device_capability()):
        raise PluginError(
            f"{reason}, so fa3 cannot be served here. Start the server with --attention-backend "
            "triton."
        )


def _take_over(create: Callable[[Any], Any]) -> None:
    """Let ``create`` build the backends that the attention registry has for FlashAttention."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from sglang_musa_ext import patching

    patching.replace(ATTENTION_BACKENDS, "fa3", create)
    patching.replace(ATTENTION_BACKENDS, "fa4", _refuse_fa4)


def _take_over_drafts(create: Callable[..., Any]) -> None:
    """Let ``create`` build draft models' FA3 backends, which upstream builds without registry.

    It is called with the method it replaces, then with that method's arguments.
    """
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    from sglang_musa_ext import patching
    from sglang_musa_ext.upstream.names import DRAFT_METHODS

    wrapper = functools.partial(_draft_method, create=create)
    for name in DRAFT_METHODS:
        patching.wrap(DraftBackendFactory, name, wrapper, again=True)


def _draft_method(original: Callable[..., Any], create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return create(original, self, *args, **kwargs)

    return method


def _draft_backend_of_ours(
    original: Callable[..., Any], factory: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return what upstream's factory method ``original`` returns, built from our classes.

    The return value stays upstream's: a backend up to 0.5.17, a name and a backend from 0.5.18 on.
    """
    with _ready_attention().upstream_builds_ours():
        return original(factory, *args, **kwargs)


def _ready_attention() -> Any:
    """Import the attention module and install it upstream, in a process that runs a model."""
    _require_capability()
    from sglang_musa_ext import guard
    from sglang_musa_ext.attention import selection as attention

    attention.install_kernel_dispatch()
    guard.refuse_others()
    attention.install_state_report()
    return attention


def _refuse(error: Exception, *_: Any, **__: Any) -> Any:
    raise PluginError(
        "sglang-musa-ext is installed and could not be loaded, so FA3 attention is not served: "
        f"{error}\nFix the problem above, or set {envs.MODE}=off to run without this package."
    ) from error


def _refuse_fa4(_: Any) -> Any:
    raise PluginError(
        "--attention-backend fa4 was asked for, and sglang-musa-ext serves FlashAttention 3 alone. "
        f"Start the server with --attention-backend fa3, or set {envs.MODE}=off to run without "
        "this package."
    )
