"""The environment variables of this package, read once into a frozen record.

Nothing else in the package reads ``os.environ`` for its own toggles. This module imports the
standard library alone, so that ``SGLANG_MUSA_EXT=off`` costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MODE = "SGLANG_MUSA_EXT"
KERNELS = "SGLANG_MUSA_EXT_KERNELS"
MLA_WORKSPACE_MB = "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"
CHECK = "SGLANG_MUSA_EXT_CHECK"
FORCE_UPDATE_METADATA = "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA"
"""Upstream's own variable for its in-tree MUSA backend; it keeps its meaning here."""
PLATFORM = "SGLANG_PLATFORM"
"""Upstream's own variable that names the platform plugin to use."""

_TRUE = ("1", "true", "yes", "y")  # upstream's spellings (sglang.srt.environ.EnvBool)
_FALSE = ("0", "false", "no", "n")


class SettingsError(ValueError):
    """An environment variable of this package holds a value it cannot have."""

    def __init__(self, variable: str, value: str, choices: Sequence[str]) -> None:
        self.variable, self.value, self.choices = variable, value, tuple(choices)
        super().__init__(
            f"{variable}={value!r} is not a value this variable can have. Expected one of: "
            f"{', '.join(self.choices)}. Set it to one of these, or unset it for the default."
        )


@dataclass(frozen=True)
class Settings:
    """What the environment asks of this package; see the README for what each variable is for."""

    mode: str = "auto"
    """``auto``: act only beside a MUSA device. ``on``: its absence is an error. ``off``: do
    nothing.
    """

    kernels: str = "auto"
    """``auto`` (the device's own), ``mate``, ``hopper`` or ``reference``."""

    mla_workspace_mb: int = 1
    """MiB of device memory for MLA plans, one workspace a device."""

    check: str = "off"
    """``metadata``: recompute every reused plan and compare; ``output``: compare with the reference
    too.
    """

    force_update_metadata: bool = False
    """Compute a plan for every call instead of reusing one within a pass."""

    platform: str = ""
    """The platform plugin that SGLang was told to use; empty: none."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from ``environ`` (``None``: the process's own).

        Raises:
            SettingsError: naming the first variable with a value it cannot have.
        """
        source = os.environ if environ is None else environ
        mode = _choice(source, MODE, ("auto", "on", "off"))
        platform = named_platform(source)
        if mode == "off":  # Off means off: the other variables are not even looked at.
            return cls(mode=mode, platform=platform)
        return cls(
            mode=mode,
            kernels=_choice(source, KERNELS, ("auto", "mate", "hopper", "reference")),
            mla_workspace_mb=_positive_int(source, MLA_WORKSPACE_MB, cls.mla_workspace_mb),
            check=_choice(source, CHECK, ("off", "metadata", "output")),
            force_update_metadata=_flag(source, FORCE_UPDATE_METADATA),
            platform=platform,
        )


def named_platform(environ: Mapping[str, str] | None = None) -> str:
    """The platform plugin that ``environ`` (``None``: the process's own) tells SGLang to use;
    empty: none.
    """
    return (os.environ if environ is None else environ).get(PLATFORM, "")


def is_addressed(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``environ`` (``None``: the process's own) sets any variable that is this package's
    own.
    """
    return any(
        name == MODE or name.startswith(f"{MODE}_")
        for name in (os.environ if environ is None else environ)
    )


def _choice(environ: Mapping[str, str], variable: str, choices: Sequence[str]) -> str:
    """One of ``choices``, in any case; unset or empty means the first."""
    value = environ.get(variable, "").strip()
    if not value:
        return choices[0]
    if value.lower() not in choices:
        raise SettingsError(variable, value, choices)
    return value.lower()


def _positive_int(environ: Mapping[str, str], variable: str, default: int) -> int:
    value = environ.get(variable, "").strip()
    if not value:
        return default
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise SettingsError(variable, value, ("a whole number of MiB from 1 up",))
    return int(value)


def _flag(environ: Mapping[str, str], variable: str) -> bool:
    value = environ.get(variable, "").strip()
    if not value or value.lower() in _FALSE:
        return False
    if value.lower() not in _TRUE:
        raise SettingsError(variable, value, (*_TRUE, *_FALSE))
    return True
