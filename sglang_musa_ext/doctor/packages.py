"""Checks of the vendor's packages: they belong together, and no public one took a place."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from sglang_musa_ext.doctor.results import CheckResult, failed, passed, warned
from sglang_musa_ext.doctor.surroundings import (
    INSTALL,
    Surroundings,
    first_three,
    installed_versions,
    join_sorted,
    not_needed,
    purpose,
    release_numbers,
)
from sglang_musa_ext.upstream import check, releases


def probe_torch(s: Surroundings) -> CheckResult:
    """Check that torch, torch_musa and torchada belong together."""
    versions = installed_versions("torch", "torch_musa", "torchada", "torchvision")
    if "torch" not in versions:
        return failed(
            "PyTorch is not installed.", INSTALL if s.has_musa_stack else "Install torch."
        )
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    if s.has_musa_stack:
        for problem in _problems_of_torch(versions):
            return replace(
                problem, finding=f"{problem.finding} Installed: {listed}.", details=versions
            )
    pinned = pinned_torch()
    if pinned is not None and release_numbers(versions["torch"]) != pinned:
        step = "Prefer a SGLang release of the same torch, or check with sglang-musa-ext validate."
        return warned(f"{listed}; this SGLang is released with torch {pinned}.", step, **versions)
    return passed(f"{listed}.", **versions)


def _problems_of_torch(versions: Mapping[str, str]) -> list[CheckResult]:
    """Return the problems of the packages around a MUSA build of torch, worst first."""
    problems = []
    theirs = versions.get("torch_musa", "")
    if theirs and release_numbers(theirs) != release_numbers(versions["torch"]):
        problems.append(failed("torch_musa and torch are of different releases.", INSTALL))
    if "torchada" not in versions:
        step = "pip install --no-deps torchada"
        problems.append(
            failed("torchada is missing: SGLang takes no device for MUSA without it.", step)
        )
    if "musa" in theirs and "musa" not in versions["torch"]:
        step = f"A public torch has probably replaced the vendor's. {INSTALL}"
        problems.append(failed("torch_musa is the vendor's build, and torch is not.", step))
    return problems


def pinned_torch() -> str | None:
    """Return the torch that the installed SGLang is released with; ``None``: not known."""
    package = check.find_package()
    if package is None:
        return None
    key = releases.version_key(check.read_version(package))
    pins = [x.torch for x in releases.SUPPORTED_RELEASES if releases.version_key(x.version) == key]
    return pins[0] if pins else None


def probe_mate(s: Surroundings) -> CheckResult:
    """Check that MATE is Moore Threads', and that its wrapper fits."""
    from sglang_musa_ext.kernels.mate_identity import identify_mate

    identity = identify_mate()
    details = {
        name: getattr(identity, name)
        for name in (
            "distribution",
            "version",
            "location",
            "wrapper",
            "wrapper_version",
            "wrapper_location",
        )
    }
    if s.kernels != "mate" and not s.has_musa_stack:
        if identity.location is None or not identity.problems:
            return passed(f"MATE is not needed for {purpose(s)}.", **details)
        harmless = f"It does no harm here, because MATE is not needed for {purpose(s)}."
        problem = identity.problems[0]
        return warned(f"{problem.seen} {harmless}", problem.remedy, **details)
    for problem in identity.problems:
        return failed(f"{problem.seen} Expected: {problem.expected}", problem.remedy, **details)
    for problem in identity.warnings:
        return warned(f"{problem.seen} Expected: {problem.expected}", problem.remedy, **details)
    wrapper = f"wrapper {identity.wrapper} {identity.wrapper_version}"
    return passed(f"MATE {identity.version} at {identity.location}, {wrapper}.", **details)


def probe_triton(s: Surroundings) -> CheckResult:
    """Check that Triton has a backend for MUSA."""
    if not s.has_musa_stack:
        return not_needed("triton")
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return failed("Triton is not installed; SGLang's page tables need it.", INSTALL)
    places = [Path(place, "backends") for place in spec.submodule_search_locations]
    backends = sorted(x.parent.name for place in places for x in place.glob("*/driver.py"))
    version = installed_versions("triton").get("triton", "?")
    text = f"Triton {version} has the backends {join_sorted(backends)}"
    if not {"mtgpu", "musa", "mthreads"} & set(backends):
        step = f"A public triton has probably replaced the vendor's. {INSTALL}"
        return failed(f"{text}, and none for MUSA.", step, backends=backends)
    return passed(f"{text}.", backends=backends)


def probe_collisions(s: Surroundings) -> CheckResult:
    """Check that no public package stands in the place of a vendor's."""
    if not s.has_musa_stack:
        return not_needed("vendor's builds of public names")
    versions = installed_versions(*COLLIDING)
    foreign = {name: version for name, version in versions.items() if not COLLIDING[name](version)}
    cuda = sorted(
        {x.name for x in importlib.metadata.distributions() if (x.name or "").startswith("nvidia-")}
    )
    if foreign:
        listed = ", ".join(f"{name} {version}" for name, version in foreign.items())
        step = f"pip uninstall {' '.join(foreign)}. {INSTALL}"
        return failed(
            f"Public builds stand in the place of the vendor's: {listed}.", step, foreign=foreign
        )
    if cuda:
        step = (
            "They show that pip resolved dependencies here; check 'torch' and 'triton', and use "
            "--no-deps."
        )
        return warned(
            f"CUDA packages are installed beside torch_musa: {first_three(cuda)}.", step, cuda=cuda
        )
    return passed(
        "None of the vendor's packages is shadowed by a public one of its name.", **versions
    )


def _of_musa(version: str) -> bool:
    return "musa" in version


def _of_mate(version: str) -> bool:
    """Return whether a wrapper's version is MATE's: ``musa`` from 0.2.7 on, before that 0.x."""
    return _of_musa(version) or version.startswith("0.")


COLLIDING: Mapping[str, Callable[[str], bool]] = {
    "torch": _of_musa,
    "torchvision": _of_musa,
    "apache-tvm-ffi": _of_musa,
    "deep-gemm": _of_mate,
    "flash_mla": _of_mate,
    "sageattention": _of_mate,
}
"""Names that the vendor shares with public packages, and how the vendor's versions look. MATE and
Triton have checks of their own, which look at contents."""
