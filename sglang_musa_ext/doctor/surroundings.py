"""The environment, the devices and the distributions that the doctor's checks look at."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import Distribution
from typing import Any, NamedTuple

from sglang_musa_ext import envs, policy
from sglang_musa_ext.doctor.results import CheckResult, passed
from sglang_musa_ext.envs import Settings, SettingsError

DEVICE_TIMEOUT = 60
"""Seconds to wait for torch in a process of its own."""
INSTALL = "Install the vendor's stack with sglang-musa-ext install, into a new environment."


@dataclass(frozen=True)
class Surroundings:
    """The machine as probes see it; each part is read once, when a probe asks for it."""

    environ: Mapping[str, str]
    command: Sequence[str] | None = None
    """The arguments of a server, as given after ``--``; ``None``: none were given."""

    @cached_property
    def settings(self) -> Settings:
        """The settings of a process with this environment.

        Raises:
            SettingsError: a variable has a value it cannot have.
        """
        return Settings.from_environ(self.environ)

    @cached_property
    def has_musa_stack(self) -> bool:
        """Return whether PyTorch's MUSA backend is installed, which any MUSA device needs."""
        return (
            find_distribution("torch_musa") is not None
            or importlib.util.find_spec("torch_musa") is not None
        )

    @cached_property
    def kernels(self) -> str:
        """The kernels that a server would run on here; empty: this package would stay idle."""
        try:
            settings = self.settings
        except SettingsError:
            return "mate" if self.has_musa_stack else ""
        choice = policy.choose_service(settings, on_musa=self.has_musa_stack)
        return choice.kernels or ""

    @cached_property
    def serves_on_musa(self) -> bool:
        """Return whether a server would run on a MUSA device, where MATE's rules are asked."""
        return self.has_musa_stack and self.environ.get(envs.PLATFORM) != policy.REFERENCE_PLATFORM

    @cached_property
    def has_our_defaults(self) -> bool:
        """Return whether this package fills in options: on MUSA and on its own CPU platform."""
        return bool(self.kernels) and (
            self.has_musa_stack or self.settings.platform == policy.REFERENCE_PLATFORM
        )

    @cached_property
    def devices(self) -> dict[str, Any]:
        """Return what torch says of the devices; see :func:`print_devices`.

        Raises:
            RuntimeError: torch, its backend or the driver does not answer.
        """
        kind = "cuda" if self.kernels == "hopper" else "musa"
        code = f"from {__name__} import print_devices; print_devices({kind!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEVICE_TIMEOUT,
            env={**self.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(
                f"torch does not answer for {kind!r} (exit status {done.returncode}): {last}"
            )
        report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return report


class Check(NamedTuple):
    """One question of the doctor."""

    name: str
    question: str
    probe: Callable[[Surroundings], CheckResult]


def print_devices(kind: str) -> None:
    """Print, as one line of JSON, torch and its devices of ``kind`` (``musa`` or ``cuda``)."""
    import torch

    if kind == "musa":
        importlib.import_module("torch_musa")
        # SGLang sees MUSA only where this imports; it also maps torch.cuda to torch.musa.
        importlib.import_module("torchada")
    module: Any = getattr(torch, kind)
    devices = []
    for index in range(module.device_count()):
        free, total = module.mem_get_info(index)
        name, capability = module.get_device_name(index), module.get_device_capability(index)
        devices.append({"name": name, "capability": list(capability), "free": free, "total": total})
    print(json.dumps({"musa": getattr(torch.version, "musa", None), "devices": devices}))


def purpose(s: Surroundings) -> str:
    """Return what the machine is looked at for."""
    return f"{s.kernels} kernels" if s.kernels else "a package that stays idle"


def not_needed(what: str) -> CheckResult:
    """Return the result of a check of what only a MUSA machine has."""
    return passed(f"No torch_musa is installed, so there is no {what} to look at.")


def find_distribution(name: str) -> Distribution | None:
    """Return an installed distribution; ``None``: there is none of this name."""
    return next(iter(importlib.metadata.distributions(name=name)), None)


def installed_versions(*names: str) -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed."""
    return {
        name: distribution.version
        for name in names
        if (distribution := find_distribution(name)) is not None
    }


def release_numbers(version: str) -> str:
    """The release numbers of a version, without post-release and local label."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return numbers.group() if numbers else version


def dotted(numbers: Sequence[int]) -> str:
    """Return a version as text."""
    return ".".join(map(str, numbers))


def join_sorted(items: Sequence[str] | set[str]) -> str:
    """Return the items in order, separated by commas."""
    return ", ".join(sorted(items)) or "absent"


def first_three(items: Sequence[str]) -> str:
    """The first three of ``items``; all of them are in the details."""
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")
