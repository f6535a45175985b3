"""Checks of the device, its driver and toolkit, and of the interpreter."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_musa_ext import envs, policy
from sglang_musa_ext.doctor.results import CheckResult, failed, passed, warned
from sglang_musa_ext.doctor.surroundings import (
    INSTALL,
    Surroundings,
    dotted,
    find_distribution,
    join_sorted,
    not_needed,
)
from sglang_musa_ext.upstream import check, releases

OLDEST_TOOLKIT, TOOLKIT_OF_CHUNKS = (4, 3, 6), (5, 1, 0)
"""Toolkits that MATE needs, and that ``attention_chunk`` with a local window needs."""
_MIB = 1 << 20
TOOL_TIMEOUT = 5
"""Seconds to wait for the driver's tool."""
VENDOR = (
    "torch",
    "torch_musa",
    "mate",
    "mate-mubin",
    "flash_attn_3",
    "deep-gemm",
    "triton",
    "apache-tvm-ffi",
)


def probe_device(s: Surroundings) -> CheckResult:
    """Check that there is a device with the needed version and free memory."""
    if s.kernels == "reference" and not s.has_musa_stack:
        return passed("Reference kernels on the CPU: no device is needed.")
    if s.kernels != "hopper" and not s.has_musa_stack:
        return _no_musa(s)
    report = s.devices
    wanted = (9, 0) if s.kernels == "hopper" else policy.MINIMUM_CAPABILITY
    if not report["devices"]:
        step = (
            "Check the driver (mthreads-gmi), the permissions of its devices, and "
            "MUSA_VISIBLE_DEVICES."
        )
        return failed("torch sees no device.", step, **report)
    old = [x for x in report["devices"] if tuple(x["capability"]) < wanted]
    if old:
        text = f"{_device(old[0])} is older than version {dotted(wanted)}, which the kernels need."
        return failed(text, "Serve with --attention-backend triton on this device.", **report)
    text = f"Devices: {'; '.join(map(_device, report['devices']))}."
    if any(x["free"] < x["total"] / 2 for x in report["devices"]):
        step = "See which process holds it (mthreads-gmi), or lower --mem-fraction-static."
        return warned(f"{text} More than half of a device's memory is in use.", step, **report)
    return passed(text, **report)


def _no_musa(s: Surroundings) -> CheckResult:
    text = "There is no MUSA device here: torch_musa is not installed"
    without = (
        f"{envs.PLATFORM}={policy.REFERENCE_PLATFORM} serves on the CPU with reference kernels."
    )
    step = f"{INSTALL} Without such a device, {without}"
    if s.environ.get(envs.MODE, "").strip().lower() == "on":
        return failed(f"{text}, and {envs.MODE}=on demands one.", step)
    return warned(f"{text}. This package stays idle.", step)


def _device(device: Mapping[str, Any]) -> str:
    free, total = (f"{device[name] // _MIB} MiB" for name in ("free", "total"))
    return f"{device['name']}, MP {dotted(device['capability'])}, {free} of {total} free"


def probe_driver(s: Surroundings) -> CheckResult:
    """Check that the driver answers."""
    if not s.has_musa_stack:
        return not_needed("driver")
    tool = shutil.which("mthreads-gmi", path=s.environ.get("PATH"))
    if tool is None:
        return warned(
            "The driver's tool mthreads-gmi is not on PATH.",
            "Install the driver of this GPU, or add it.",
        )
    done = subprocess.run([tool], capture_output=True, text=True, check=False, timeout=TOOL_TIMEOUT)
    if done.returncode != 0:
        return failed(
            f"{tool} exits with status {done.returncode}.",
            "Run it, and repair the driver's installation.",
        )
    version = re.search(r"driver[ _]version\s*:?\s*([\w.+-]+)", done.stdout, re.IGNORECASE)
    return passed(f"Driver {version.group(1) if version else 'of unknown version'}.", tool=tool)


def probe_toolkit(s: Surroundings) -> CheckResult:
    """Check that the MUSA toolkit is new enough for MATE."""
    if not s.has_musa_stack:
        return not_needed("toolkit")
    home = Path(s.environ.get("MUSA_HOME") or s.environ.get("MUSA_PATH") or "/usr/local/musa")
    header = home / "include" / "musa.h"
    needed = f"MATE needs {dotted(OLDEST_TOOLKIT)} or newer"
    if not header.is_file():
        return warned(
            f"No MUSA toolkit at {home} ({needed}).", "Set MUSA_HOME to where the toolkit is."
        )
    define = re.search(
        r"#\s*define\s+MUSA_VERSION\s+(\d+)", header.read_text(encoding="utf-8", errors="replace")
    )
    if define is None:
        return warned(
            f"{header} does not say its version ({needed}).",
            "Compare it with the toolkit's release notes.",
        )
    number = int(define.group(1))
    version = (number // 10000, number // 100 % 100, number % 100)
    text = f"MUSA toolkit {dotted(version)} at {home}"
    if version < OLDEST_TOOLKIT:
        return failed(
            f"{text}; {needed}.", "Install a newer MUSA SDK, with the torch that belongs to it."
        )
    if version < TOOLKIT_OF_CHUNKS:
        step = f"Install {dotted(TOOLKIT_OF_CHUNKS)} or newer to serve models such as Llama-4."
        return warned(f"{text}: attention in chunks with a window does not work.", step)
    return passed(f"{text}.")


def probe_python(s: Surroundings) -> CheckResult:
    """Check that interpreter and wheels fit."""
    version, machine = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine()
    text = f"CPython {version} on {machine}"
    package = check.find_package()
    if package is not None and sys.version_info < (3, 11):
        release = check.read_version(package)
        if releases.version_key(release) >= releases.version_key("0.5.22"):
            return failed(
                f"{text}: SGLang {release} needs Python 3.11 or newer.", "Use CPython 3.12."
            )
    wrong = [name for name in VENDOR if _built_for_another_python(name)]
    if wrong:
        return failed(
            f"{text}, and these wheels are for another: {join_sorted(wrong)}.", INSTALL, wrong=wrong
        )
    if s.has_musa_stack and (version not in ("3.10", "3.12") or machine != "x86_64"):
        step = "Use CPython 3.10 or, from SGLang 0.5.22 on, 3.12."
        return warned(f"{text}; the vendor publishes wheels for 3.10 and 3.12 on x86_64.", step)
    return passed(f"{text}.")


def _built_for_another_python(name: str) -> bool:
    """Return whether the wheel of ``name`` has a binary interface of another interpreter."""
    distribution = find_distribution(name)
    lines = (distribution.read_text("WHEEL") or "").splitlines() if distribution else []
    tags = [line.partition(":")[2].strip().split("-") for line in lines if line.startswith("Tag:")]
    ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return bool(tags) and not any(
        abi in ("none", "abi3") or python == ours for python, abi, *_ in tags
    )
