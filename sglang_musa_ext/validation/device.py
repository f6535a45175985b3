"""The device that the validation kit runs on, and how its parts report their cases."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from sglang_musa_ext import policy
from sglang_musa_ext.engines.devices import import_vendor_modules, is_available
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import FA3Kernels, KernelsUnavailable, select_kernels
from sglang_musa_ext.validation.report import FAIL, Outcome

Emit = Callable[[Mapping[str, Any]], None]


def find_device(options: argparse.Namespace) -> torch.device:
    """Return the device that was asked for, or with ``auto`` the one that the kernels are for.

    Raises:
        KernelsUnavailable: it is not there.
    """
    import_vendor_modules()
    if options.device != "auto":
        return torch.device(options.device)
    kind = policy.device_for(options.kernels, is_available)
    if kind != "cpu" and not is_available(kind):
        raise KernelsUnavailable(
            f"PyTorch {torch.__version__} sees no {kind} device, which --kernels {options.kernels} "
            "needs. Run `sglang-musa-ext doctor`, which says what is missing."
        )
    return torch.device(kind)


def kernels_for(options: argparse.Namespace) -> tuple[FA3Kernels, torch.device]:
    """Return the provider that was asked for, and its device."""
    device = find_device(options)
    if device.type == "cpu":
        # The tensors are small, and threads that wait for one another take longer than the work.
        torch.set_num_threads(1)
    return select_kernels(Settings(kernels=options.kernels), device), device


def run(options: argparse.Namespace, done: Collection[str], emit: Emit) -> None:
    """Report the device and the kernels on it."""
    kernels, device = kernels_for(options)
    facts = {"device": str(device), "kernels": kernels.name} | dict(kernels.versions)
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory")
        facts |= {name: str(getattr(properties, name, "unknown")) for name in names}
        facts["version"] = str(getattr(torch.version, device.type, "unknown"))
    emit({"device": facts})


def run_cases(
    cases: Iterable[tuple[str, Callable[[], Outcome]]],
    device: torch.device | None,
    done: Collection[str],
    emit: Emit,
    total: int | None = None,
) -> None:
    """Run and report each case that is not done yet.

    After a case that hurt the device, nothing of this process can be believed: it ends, and another
    one goes on.

    Args:
        cases: names, and what gives their outcomes.
        device: the one that a case may hurt.
        done: names of those that another process ran.
        emit: takes the messages.
        total: how many cases there are, if each comes when it can be run.
    """
    if total is None:
        cases = list(cases)
        total = len(cases)
    emit({"total": total})
    for name, case in cases:
        if name in done:
            continue
        emit({"start": name})
        outcome = case()
        emit({"outcome": asdict(outcome)})
        if outcome.status == FAIL and device is not None and not _healthy(device):
            os._exit(3)


def _healthy(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    with contextlib.suppress(RuntimeError):
        torch.get_device_module(device).synchronize()
        return bool(torch.ones(1, device=device).item() == 1)
    return False
