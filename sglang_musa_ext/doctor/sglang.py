"""Checks of SGLang, of the contract with it, and of this plugin and its settings."""

from __future__ import annotations

import importlib.metadata

from sglang_musa_ext import envs, policy
from sglang_musa_ext.doctor.results import CheckResult, failed, passed, warned
from sglang_musa_ext.doctor.surroundings import Surroundings, first_three, join_sorted
from sglang_musa_ext.envs import SettingsError
from sglang_musa_ext.upstream import check, releases, rows

PLUGIN = "musa_ext"
"""The name of this package's plugin, as ``SGLANG_PLUGINS`` gives it."""


def probe_sglang(_: Surroundings) -> CheckResult:
    """Check that there is a SGLang release that this package works with."""
    tested = f"{releases.OLDEST} to {releases.NEWEST}"
    package = check.find_package()
    if package is None:
        return failed(
            "SGLang is not installed.",
            f"Install a release from {tested}, with --no-deps on a MUSA machine.",
        )
    try:
        version = check.read_version(package)
        support = releases.classify_version(version)
    except releases.UpstreamVersionError as error:
        return failed(str(error), f"Install a release from {tested}.", location=str(package))
    details = {"version": version, "location": str(package), "standing": support.standing.value}
    if support.standing is releases.Standing.TOO_OLD:
        step = f"Install a release from {tested}."
        return failed(
            f"SGLang {version} has no plugin loader: it never calls this package.", step, **details
        )
    if support.standing is releases.Standing.NEWER:
        step = f"Compare with SGLang {releases.NEWEST} if something is wrong."
        return warned(f"SGLang {version} is newer than what is tested ({tested}).", step, **details)
    return passed(f"SGLang {version} is {support.standing.value} ({tested}).", **details)


def probe_contract(_: Surroundings) -> CheckResult:
    """Check that SGLang has what this package relies on."""
    violations = check.check_upstream()
    serving = [str(x) for x in violations if x.requirement.used_by in check.SERVING]
    others = [str(x) for x in violations if x.requirement.used_by not in check.SERVING]
    step = (
        f"Install a SGLang from {releases.OLDEST} to {releases.NEWEST}, or a newer sglang-musa-ext."
    )
    if serving:
        text = f"SGLang lacks {len(serving)} things that serving needs: {first_three(serving)}"
        return failed(text, step, violations=serving + others)
    if others:
        text = (
            f"SGLang lacks {len(others)} things, none of which serving needs: {first_three(others)}"
        )
        return warned(text, step, violations=others)
    return passed(
        f"SGLang's sources have all that {len(rows.REQUIREMENTS)} rows of the contract ask for."
    )


def probe_settings(s: Surroundings) -> CheckResult:
    """Say which settings are effective, and where they come from."""
    try:
        settings = s.settings
    except SettingsError as error:
        return failed(str(error), error.remedy, variable=error.variable)
    effective = {
        variable: {
            "value": getattr(settings, name),
            "source": "environment" if s.environ.get(variable) else "default",
        }
        for name, variable in envs.VARIABLES.items()
    }
    chosen = [
        f"{variable}={s.environ[variable]}" for variable in effective if s.environ.get(variable)
    ]
    finding = f"From the environment: {', '.join(chosen) or 'nothing'}; the rest are defaults."
    return passed(finding, settings=effective)


def probe_plugin(s: Surroundings) -> CheckResult:
    """Check that SGLang will load this plugin."""
    entries = list(importlib.metadata.entry_points(group="sglang.srt.plugins"))
    ours = {x.value for x in entries if x.name == PLUGIN}
    if ours != {"sglang_musa_ext.plugin:register"}:
        return failed(
            f"SGLang cannot find this plugin: the entry point {PLUGIN!r} is {join_sorted(ours)} in "
            "this environment.",
            "Install it as a package (pip install --no-deps .): a search path alone brings no "
            "entry points.",
        )
    loaded = [x.strip() for x in s.environ.get("SGLANG_PLUGINS", "").split(",") if x.strip()]
    named = envs.named_platform(s.environ)
    needed = {PLUGIN, policy.REFERENCE_PLATFORM} if named == policy.REFERENCE_PLATFORM else {PLUGIN}
    if loaded and not needed <= set(loaded):
        wanted = ",".join(dict.fromkeys([*loaded, *sorted(needed)]))
        return failed(
            f"SGLANG_PLUGINS={','.join(loaded)} keeps SGLang from loading "
            f"{join_sorted(needed - set(loaded))}.",
            f"Set SGLANG_PLUGINS={wanted}, or unset it.",
        )
    if named and named != policy.REFERENCE_PLATFORM:
        return failed(
            f"{envs.PLATFORM}={named} names another package's platform, so SGLang loads nothing of "
            "this one.",
            f"Unset {envs.PLATFORM}, or set {envs.MODE}=off if that platform is meant to serve.",
        )
    mode = s.environ.get(envs.MODE, "").strip().lower()
    if mode == "off":
        return warned(
            f"{envs.MODE}=off: SGLang runs without this package.", f"Unset {envs.MODE} to use it."
        )
    if mode == "on" and s.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return warned(
            f"{envs.MODE}=on, and TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from arming its "
            "guard.",
            "Unset TORCH_DEVICE_BACKEND_AUTOLOAD.",
        )
    others = sorted(x.name for x in entries if x.name != PLUGIN)
    return passed(f"SGLang finds {PLUGIN!r} and nothing filters it.", other_plugins=others)
