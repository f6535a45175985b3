"""The environment variables of this package, read once into a frozen record.

Nothing else in the package reads ``os.environ`` for its own toggles. This module imports the
standard library alone, so that ``SGLANG_MUSA_EXT=off`` costs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MODE = "SGLANG_MUSA_EXT"
KERNELS = "SGLANG_MUSA_EXT_KERNELS"
MLA_WORKSPACE_MB = "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"
CHECK = "SGLANG_MUSA_EXT_CHECK"
RAW_PREFILL = "SGLANG_MUSA_EXT_RAW_PREFILL"
PLANS = "SGLANG_MUSA_EXT_PLANS"
FORCE_UPDATE_METADATA = "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA"
"""Upstream's own variable for its in-tree MUSA backend; it keeps its meaning here."""
PLATFORM = "SGLANG_PLATFORM"
"""Upstream's own variable that names the platform plugin to use."""

VARIABLES = {
    "mode": MODE,
    "kernels": KERNELS,
    "mla_workspace_mb": MLA_WORKSPACE_MB,
    "check": CHECK,
    "raw_prefill": RAW_PREFILL,
    "plans": PLANS,
    "force_update_metadata": FORCE_UPDATE_METADATA,
    "platform": PLATFORM,
}
"""The fields of :class:`Settings`, and the variables that they come from."""

VENDOR_INDEX = "SGLANG_MUSA_EXT_VENDOR_INDEX"
"""URLs of the vendor's package indexes, for ``sglang-musa-ext install``."""
TORCH_INDEX = "SGLANG_MUSA_EXT_TORCH_INDEX"
"""URL of an index of CPU builds of PyTorch, for ``scripts/dev-env``."""
TORCH_BUILD = "SGLANG_MUSA_EXT_TORCH_BUILD"
"""The build of PyTorch that ``scripts/dev-env`` takes."""
TOOL_VARIABLES = (
    VENDOR_INDEX,
    TORCH_INDEX,
    TORCH_BUILD,
)
"""Variables of this project's own tools, which a server has no use for and does not mind."""

_TRUE = ("1", "true", "yes", "y")  # upstream's spellings (sglang.srt.environ.EnvBool)
_FALSE = ("0", "false", "no", "n")


class SettingsError(ValueError):
    """An environment variable of this package has a value, or a name, that means nothing."""

    def __init__(self, problem: str, remedy: str, *, variable: str, value: str) -> None:
        self.variable, self.value, self.remedy = variable, value, remedy
        super().__init__(f"{problem} {remedy}")


def _bad_value(variable: str, value: str, choices: Sequence[str]) -> SettingsError:
    return SettingsError(
        f"{variable}={value!r} is not a value this variable can have.",
        f"Set {variable} to one of: {', '.join(choices)}; or unset it for the default.",
        variable=variable,
        value=value,
    )


def _unknown_variable(variable: str, value: str) -> SettingsError:
    known = [name for name in (*VARIABLES.values(), *TOOL_VARIABLES) if name.startswith(MODE)]
    # The prefix that all share would make everything close to everything.
    endings = {name.removeprefix(MODE).strip("_"): name for name in known}
    ending = variable.removeprefix(MODE).strip("_")
    import difflib  # Only a mistake needs it.

    close = difflib.get_close_matches(ending, endings, n=1)
    meant = f"did you mean {endings[close[0]]}?" if close else f"there are {', '.join(known)}."
    return SettingsError(
        f"{variable}={value!r} is set, and sglang-musa-ext has no such variable.",
        f"Correct the name or unset it: {meant}",
        variable=variable,
        value=value,
    )


@dataclass(frozen=True)
class Settings:
    """The settings of a process, from its environment; docs/settings.md says what each is for."""

    mode: str = "auto"
    """``auto``: act beside a MUSA device; ``on``: its absence is an error; ``off``: do nothing."""

    kernels: str = "auto"
    """``auto`` (the device's own), ``mate``, ``hopper`` or ``reference``."""

    mla_workspace_mb: int = 1
    """MiB of device memory for MLA plans, one workspace a device."""

    check: str = "off"
    """``metadata``: compare every reused plan with a new one; ``output``: also every output with
    the reference kernels'; ``output:SHARE``: a share of them, reported and never raised.
    """

    raw_prefill: bool = True
    """Prefill prompts without a prefix over the layers' own keys instead of the paged cache."""

    plans: str = "auto"
    """``auto``: plan where the kernels would not do as well alone, which those that plan for
    themselves do outside of graphs; ``always``: plan every call that takes a plan.
    """

    force_update_metadata: bool = False
    """Compute a plan for every call instead of reusing one within a pass."""

    platform: str = ""
    """The platform plugin that SGLang was told to use; empty: none."""

    @property
    def check_share(self) -> float:
        """The share of outputs that is compared without raising; 0 unless the check says one."""
        return _share(self.check)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from ``environ`` (``None``: the process's own).

        Raises:
            SettingsError: naming the first variable with a value it cannot have, or with a name
                that is close to one of this package's and is none.
        """
        source = os.environ if environ is None else environ
        mode = _choice(source, MODE, ("auto", "on", "off"))
        platform = named_platform(source)
        if mode == "off":  # Off means off: the other variables are not even looked at.
            return cls(mode=mode, platform=platform)
        _refuse_unknown_variables(source)
        return cls(
            mode=mode,
            kernels=_choice(source, KERNELS, ("auto", "mate", "hopper", "reference")),
            mla_workspace_mb=_positive_int(source, MLA_WORKSPACE_MB, cls.mla_workspace_mb),
            check=_check(source),
            raw_prefill=_choice(source, RAW_PREFILL, ("on", "off")) == "on",
            plans=_choice(source, PLANS, ("auto", "always")),
            force_update_metadata=_flag(source, FORCE_UPDATE_METADATA),
            platform=platform,
        )


def named_platform(environ: Mapping[str, str] | None = None) -> str:
    """Return the platform plugin that SGLang is told to use; empty: none.

    Args:
        environ: ``None``: the process's own.
    """
    return (os.environ if environ is None else environ).get(PLATFORM, "")


def is_addressed(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether the environment sets any variable that is this package's own.

    Args:
        environ: ``None``: the process's own.
    """
    source = os.environ if environ is None else environ
    return any(_has_our_prefix(name) for name in source)


def _has_our_prefix(name: str) -> bool:
    return name == MODE or name.startswith(f"{MODE}_")


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """Refuse a name with this package's prefix that means nothing: a slip would pass in silence."""
    known = {*VARIABLES.values(), *TOOL_VARIABLES}
    for name, value in environ.items():
        if name.startswith(MODE) and name not in known:
            raise _unknown_variable(name, value)


def _choice(environ: Mapping[str, str], variable: str, choices: Sequence[str]) -> str:
    """Return one of ``choices``, in any case; unset or empty means the first."""
    value = environ.get(variable, "").strip()
    if not value:
        return choices[0]
    if value.lower() not in choices:
        raise _bad_value(variable, value, choices)
    return value.lower()


_CHECKS = ("off", "metadata", "output")


def _check(environ: Mapping[str, str]) -> str:
    value = environ.get(CHECK, "").strip().lower()
    if ":" not in value:
        return _choice(environ, CHECK, _CHECKS)
    if not 0.0 < _share(value) <= 1.0:
        choices = (*_CHECKS, "output:SHARE with a share above 0 and up to 1, as output:0.01")
        raise _bad_value(CHECK, environ[CHECK], choices)
    return value


def _share(check: str) -> float:
    """Return the share in ``output:SHARE``; 0 for a check of every call, NaN for no number."""
    kind, colon, share = check.partition(":")
    if not colon:
        return 0.0
    try:
        return float(share) if kind == "output" else math.nan
    except ValueError:
        return math.nan


def _positive_int(environ: Mapping[str, str], variable: str, default: int) -> int:
    value = environ.get(variable, "").strip()
    if not value:
        return default
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise _bad_value(variable, value, ("a whole number of MiB from 1 up",))
    return int(value)


def _flag(environ: Mapping[str, str], variable: str) -> bool:
    value = environ.get(variable, "").strip()
    if not value or value.lower() in _FALSE:
        return False
    if value.lower() not in _TRUE:
        raise _bad_value(variable, value, (*_TRUE, *_FALSE))
    return True
