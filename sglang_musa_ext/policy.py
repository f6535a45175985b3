"""Which kernels serve which device and configuration, and why not.

The plugin, the defaults on MUSA, the doctor and the validation kit all ask here, so that they give
one answer. Dtypes, devices and releases come in by name: this module imports neither torch nor
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_musa_ext import envs
from sglang_musa_ext.envs import Settings

PAGE_SIZE = 64
"""Tokens in a page of the KV cache: what MATE's MLA kernels take, and what all others are fastest
with.
"""
MINIMUM_CAPABILITY = (3, 1)
"""The oldest MP version that MATE's kernels are built for."""
HALF_DTYPES = ("bfloat16", "float16")
"""The names of the types that MATE's kernels read and compute in, as PyTorch spells them."""
HALF_OPTIONS = ("auto", "bf16", "bfloat16", "fp16", "float16", "half")
"""The spellings of these types in SGLang's options; ``auto`` is the model's own type."""
REFERENCE_PLATFORM = "musa_reference"
"""The name of this package's CPU platform, as ``SGLANG_PLATFORM`` gives it."""

DEVICE_OF_KERNELS = {"mate": "musa", "hopper": "cuda", "reference": "cpu"}
"""The kind of device that kernels are for; ``reference`` runs on any other too."""
KERNELS_OF_DEVICE = {"musa": "mate", "cpu": "reference"}
"""The kernels that ``SGLANG_MUSA_EXT_KERNELS=auto`` takes on a kind of device."""

NO_MUSA = "no MUSA device was found (torchada is missing, or torch is not built for MUSA)"


# --- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelChoice:
    """The answer of :func:`choose_kernels` and :func:`choose_service`."""

    kernels: str | None
    """``mate``, ``hopper`` or ``reference``; ``None``: no kernels serve."""
    reasons: tuple[str, ...] = ()
    """Why no kernels serve."""


def choose_service(settings: Settings, *, on_musa: bool) -> KernelChoice:
    """Return the kernels that this package serves on in this process, or why it stays idle.

    Where ``settings.mode`` is ``on`` and no kernels are returned, that is an error.

    Args:
        settings: of this process.
        on_musa: whether a MUSA device was found.
    """
    if settings.mode == "off":
        return KernelChoice(None, (f"{envs.MODE}=off",))
    if settings.platform == REFERENCE_PLATFORM:
        return choose_kernels(settings, "cpu")
    if on_musa:
        return choose_kernels(settings, "musa")
    if settings.mode == "on" and settings.kernels in ("hopper", "reference"):
        return KernelChoice(settings.kernels)
    if settings.mode == "auto" and settings.kernels != "auto":
        named = f"{envs.KERNELS}={settings.kernels} takes effect with {envs.MODE}=on"
        return KernelChoice(None, (NO_MUSA, named))
    return KernelChoice(None, (NO_MUSA,))


def choose_kernels(settings: Settings, device: str) -> KernelChoice:
    """Return the kernels that ``settings`` name, or with ``auto`` those of the kind of device.

    Args:
        settings: ``kernels`` is ``auto``, ``mate``, ``hopper`` or ``reference``.
        device: ``torch.device.type`` of the KV cache.
    """
    if settings.kernels != "auto":
        return KernelChoice(settings.kernels)
    if device in KERNELS_OF_DEVICE:
        return KernelChoice(KERNELS_OF_DEVICE[device])
    known = ", ".join(f"{kernels} on {kind}" for kind, kernels in KERNELS_OF_DEVICE.items())
    reason = f"{envs.KERNELS}=auto has no kernels for the device {device}: it chooses {known}"
    return KernelChoice(None, (reason,))


def reason_against_capability(capability: tuple[int, int]) -> str | None:
    """Return why MATE cannot serve a device of this MP version; ``None``: it can."""
    if capability >= MINIMUM_CAPABILITY:
        return None
    needed = ".".join(map(str, MINIMUM_CAPABILITY))
    seen = ".".join(map(str, capability))
    return f"MATE has no kernels for MP version {seen}; they need {needed} or newer"


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """What a server is asked for, as far as it decides about its attention backend.

    Each field has the value that leaves the choice open, so that callers give what they know.
    """

    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    page_size: int | None = None
    use_mla: bool = False
    topk: int | None = None
    """``--speculative-eagle-topk``: branches of a draft tree; ``None`` or 1: a chain, or none."""
    architectures: tuple[str, ...] = ()
    """Class names from the model's ``config.json``."""
    capability: tuple[int, int] | None = None
    """MP version of the device; ``None``: unknown."""
    other_platform: bool = False
    """Whether another platform plugin serves this process."""


@dataclass(frozen=True)
class DefaultRule:
    """A condition under which ``fa3`` is not chosen where nobody named a backend."""

    reason: Callable[[Configuration], str | None]
    """Returns why ``fa3`` could not serve the configuration; ``None``: the rule does not apply."""


def reasons_against_fa3(configuration: Configuration) -> tuple[str, ...]:
    """Return why ``fa3`` is no default for ``configuration``; empty: it is."""
    reasons = (rule.reason(configuration) for rule in DEFAULT_RULES)
    return tuple(reason for reason in reasons if reason is not None)


def _another_platform(asked: Configuration) -> str | None:
    return "another platform plugin chooses it" if asked.other_platform else None


def _whisper(asked: Configuration) -> str | None:
    if "WhisperForConditionalGeneration" in asked.architectures:
        return "SGLang runs Whisper on one backend alone"
    return None


def _kv_cache_dtype(asked: Configuration) -> str | None:
    if asked.kv_cache_dtype in HALF_OPTIONS:
        return None
    return f"MATE cannot read --kv-cache-dtype {asked.kv_cache_dtype}"


def _dtype(asked: Configuration) -> str | None:
    return None if asked.dtype in HALF_OPTIONS else f"MATE cannot read --dtype {asked.dtype}"


def _mla_page_size(asked: Configuration) -> str | None:
    if not asked.use_mla or asked.page_size in (None, PAGE_SIZE):
        return None
    return f"MATE's MLA kernels cannot read --page-size {asked.page_size}"


def _mla_tree(asked: Configuration) -> str | None:
    if not asked.use_mla or (asked.topk or 1) == 1:
        return None
    return (
        f"an MLA model with --speculative-eagle-topk {asked.topk} is not served by fa3 at page "
        f"size {PAGE_SIZE}"
    )


def _capability(asked: Configuration) -> str | None:
    return None if asked.capability is None else reason_against_capability(asked.capability)


DEFAULT_RULES = tuple(
    DefaultRule(reason)
    for reason in (
        _another_platform,
        _whisper,
        _kv_cache_dtype,
        _dtype,
        _mla_page_size,
        _mla_tree,
        _capability,
    )
)
"""Every rule against ``fa3`` by default, each a row."""
