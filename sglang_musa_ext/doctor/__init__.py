"""``sglang-musa-ext doctor``: what this environment would serve, and what stands in its
way.

Each check is a row of :data:`CHECKS`; its probe answers with a :class:`CheckResult`, and a probe
that fails is an answer too. Nothing is changed, no port is opened, and torch is imported only to
ask a device, in a process of its own: a driver that hangs or crashes takes no more than that
process with it.
"""

from __future__ import annotations

import argparse
import enum
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, NamedTuple

from sglang_musa_ext import __version__, envs, policy
from sglang_musa_ext.envs import Settings, SettingsError
from sglang_musa_ext.upstream import check, releases, rows
from sglang_musa_ext.upstream.limits import Configuration

PLUGIN = "musa_ext"
"""The name of this package's plugin, as ``SGLANG_PLUGINS`` gives it."""
OLDEST_TOOLKIT, TOOLKIT_OF_CHUNKS = (4, 3, 6), (5, 1, 0)
"""What MATE needs, and what ``attention_chunk`` with a local window needs."""
DEVICE_TIMEOUT, TOOL_TIMEOUT = 60, 5
"""Seconds to wait for torch in a process of its own, and for the driver's tool."""

_MIB = 1 << 20
_INSTALL = "Install the vendor's stack with sglang-musa-ext install, into a new environment."


class Status(enum.Enum):
    """How a check came out, from best to worst."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


EXIT_CODES = {Status.PASS: 0, Status.WARN: 1, Status.FAIL: 2}


@dataclass(frozen=True)
class CheckResult:
    """What a probe found."""

    status: Status
    finding: str
    """What was seen, and what was expected where that differs."""
    next_step: str = ""
    """What to do about it; empty: nothing."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The same as plain data, for ``--json``."""
    name: str = ""
    """The check's, set when it ran."""


class Check(NamedTuple):
    """One question of the doctor."""

    name: str
    question: str
    probe: Callable[[Surroundings], CheckResult]


@dataclass(frozen=True)
class Surroundings:
    """What the probes look at; found out when a probe asks for it, and once."""

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
        """Whether PyTorch's MUSA backend is installed: there is no MUSA device without it."""
        return (
            _distribution("torch_musa") is not None
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
    def has_our_defaults(self) -> bool:
        """Whether this package chooses what a command line leaves open: on MUSA and on its own CPU
        platform.
        """
        return bool(self.kernels) and (
            self.has_musa_stack or self.settings.platform == policy.REFERENCE_PLATFORM
        )

    @cached_property
    def devices(self) -> dict[str, Any]:
        """What torch says of the devices; see :func:`print_devices`.

        Raises:
            RuntimeError: torch, its backend or the driver does not answer.
        """
        kind = "cuda" if self.kernels == "hopper" else "musa"
        code = f"from sglang_musa_ext.doctor import print_devices; print_devices({kind!r})"
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


def print_devices(kind: str) -> None:
    """Print, as one line of JSON, what torch says of itself and of the devices of ``kind``
    (``musa`` or ``cuda``).
    """
    import torch

    if kind == "musa":
        importlib.import_module("torch_musa")
        # SGLang takes a device for MUSA only where this imports; it also maps torch.cuda to
        # torch.musa.
        importlib.import_module("torchada")
    module: Any = getattr(torch, kind)
    devices = []
    for index in range(module.device_count()):
        free, total = module.mem_get_info(index)
        name, capability = module.get_device_name(index), module.get_device_capability(index)
        devices.append({"name": name, "capability": list(capability), "free": free, "total": total})
    print(json.dumps({"musa": getattr(torch.version, "musa", None), "devices": devices}))


def passed(finding: str, **details: Any) -> CheckResult:
    """All is well."""
    return CheckResult(Status.PASS, finding, details=details)


def warned(finding: str, next_step: str, **details: Any) -> CheckResult:
    """It may work, or not as meant."""
    return CheckResult(Status.WARN, finding, next_step, details)


def failed(finding: str, next_step: str, **details: Any) -> CheckResult:
    """It cannot work."""
    return CheckResult(Status.FAIL, finding, next_step, details)


# --- SGLang and this plugin -----------------------------------------------------------------------


def _probe_sglang(_: Surroundings) -> CheckResult:
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


def _probe_contract(_: Surroundings) -> CheckResult:
    violations = check.check_upstream()
    serving = [str(x) for x in violations if x.requirement.used_by in check.SERVING]
    others = [str(x) for x in violations if x.requirement.used_by not in check.SERVING]
    step = (
        f"Install a SGLang from {releases.OLDEST} to {releases.NEWEST}, or a newer sglang-musa-ext."
    )
    if serving:
        text = f"SGLang lacks {len(serving)} things that serving needs: {_some(serving)}"
        return failed(text, step, violations=serving + others)
    if others:
        text = f"SGLang lacks {len(others)} things, none of which serving needs: {_some(others)}"
        return warned(text, step, violations=others)
    return passed(
        f"SGLang's sources have all that {len(rows.REQUIREMENTS)} rows of the contract ask for."
    )


def _probe_settings(s: Surroundings) -> CheckResult:
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


def _probe_plugin(s: Surroundings) -> CheckResult:
    entries = list(importlib.metadata.entry_points(group="sglang.srt.plugins"))
    ours = {x.value for x in entries if x.name == PLUGIN}
    if ours != {"sglang_musa_ext.plugin:register"}:
        return failed(
            f"SGLang cannot find this plugin: the entry point {PLUGIN!r} is {_listed(ours)} in "
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
            f"{_listed(needed - set(loaded))}.",
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


def _probe_command(s: Surroundings) -> CheckResult:
    if s.command is None:
        return passed(
            "No command line was given; give a server's arguments after -- to see what they lead "
            "to."
        )
    options, rest = _server_parser().parse_known_args(s.command)
    resolved = _resolve(options, s)
    words = [f"{name} {value} ({why})" for name, (value, why) in resolved.items()]
    finding = "; ".join(words) + f". {UNKNOWABLE}"
    details = {name: {"value": value, "because": why} for name, (value, why) in resolved.items()}
    details["not_looked_at"] = {"value": rest, "because": UNKNOWABLE}
    for problem in _problems_of_command(options, resolved, s.kernels):
        return replace(problem, finding=f"{problem.finding} {finding}", details=details)
    return passed(finding, **details)


SGLANGS_CHOICE = "SGLang's choice"
UNKNOWABLE = "Not known here: what SGLang sets for a model's architecture, and what --config holds."


def _server_parser() -> argparse.ArgumentParser:
    """The options of a SGLang server that decide what this package is asked for."""
    parser = argparse.ArgumentParser(
        prog="sglang.launch_server", add_help=False, exit_on_error=False
    )
    parser.add_argument("--model-path", "--model", dest="model_path")
    parser.add_argument("--attention-backend")
    parser.add_argument("--prefill-attention-backend")
    parser.add_argument("--decode-attention-backend")
    parser.add_argument("--speculative-draft-attention-backend")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--speculative-eagle-topk", type=int)
    return parser


def _resolve(options: argparse.Namespace, s: Surroundings) -> dict[str, tuple[Any, str]]:
    """The attention backends and the page size of a command line, each with the reason for it."""
    attention = _attention(options, s)
    resolved: dict[str, tuple[Any, str]] = {}
    for phase in ("prefill", "decode"):
        named = getattr(options, f"{phase}_attention_backend")
        resolved[f"{phase} attention"] = (
            (named, f"--{phase}-attention-backend") if named else attention
        )
    if named := options.speculative_draft_attention_backend:
        resolved["draft attention"] = named, "--speculative-draft-attention-backend"
    if options.page_size is not None:
        resolved["page size"] = options.page_size, "--page-size"
    elif s.has_our_defaults:
        resolved["page size"] = (
            policy.PAGE_SIZE,
            "the default on MUSA and on the CPU reference platform",
        )
    else:
        resolved["page size"] = SGLANGS_CHOICE, "no rule of this package"
    return resolved


def _attention(options: argparse.Namespace, s: Surroundings) -> tuple[str, str]:
    """The attention backend of both phases where neither is named apart, and the reason for it."""
    if options.attention_backend:
        return options.attention_backend, "--attention-backend"
    if not s.kernels:
        return SGLANGS_CHOICE, "this package would stay idle"
    if not s.has_our_defaults:
        return SGLANGS_CHOICE, "this package has defaults on MUSA and on its CPU platform alone"
    if s.kernels == "mate":
        asked = Configuration(
            dtype=options.dtype,
            kv_cache_dtype=options.kv_cache_dtype,
            page_size=options.page_size,
            use_mla=_is_mla(options.model_path),
            topk=options.speculative_eagle_topk,
        )
        if reasons := policy.reasons_against_fa3(asked):
            return SGLANGS_CHOICE, "; ".join(reasons)
    return "fa3", "the default while this package serves"


def _problems_of_command(
    options: argparse.Namespace, resolved: Mapping[str, tuple[Any, str]], kernels: str
) -> list[CheckResult]:
    """What is wrong with a command line, worst first."""
    backends = {name: value for name, (value, _) in resolved.items() if name.endswith("attention")}
    found = []
    if kernels and "fa4" in backends.values():
        found.append(
            failed("fa4 is refused while this package serves.", "Use --attention-backend fa3.")
        )
    if not kernels or "fa3" not in backends.values():
        step = (
            "Use --attention-backend fa3 where this package serves."
            if kernels
            else "See the check 'device'."
        )
        return [*found, warned("This package would not be used.", step)]
    if kernels != "reference" and "fp8" in options.kv_cache_dtype:
        step = "Leave --kv-cache-dtype at auto, or take another --attention-backend."
        found.append(
            failed(f"--kv-cache-dtype {options.kv_cache_dtype}: these kernels take no fp8.", step)
        )
    if (
        _is_mla(options.model_path)
        and kernels != "hopper"
        and resolved["page size"][0] != policy.PAGE_SIZE
    ):
        step = "Leave --page-size unset, or set it to 64."
        found.append(failed(f"--page-size {options.page_size}: MLA's kernels take 64 alone.", step))
    return found


def _is_mla(model_path: str | None) -> bool:
    """Whether a model's own configuration names MLA's latent rank; False where it is not on this
    machine.
    """
    path = Path(model_path or "", "config.json")
    if not model_path or not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8")).get("kv_lora_rank"))


# --- the machine ----------------------------------------------------------------------------------


def _probe_device(s: Surroundings) -> CheckResult:
    if s.kernels == "reference" and not s.has_musa_stack:
        return passed("Reference kernels on the CPU: no device is needed.")
    if s.kernels != "hopper" and not s.has_musa_stack:
        return _no_musa(s)
    report = s.devices
    wanted = (9, 0) if s.kernels == "hopper" else policy.MINIMUM_CAPABILITY
    if not report["devices"]:
        step = "Check the driver (mthreads-gmi), the permissions of its devices, and MUSA_VISIBLE_DEVICES."
        return failed("torch sees no device.", step, **report)
    old = [x for x in report["devices"] if tuple(x["capability"]) < wanted]
    if old:
        text = f"{_device(old[0])} is older than version {_dotted(wanted)}, which the kernels need."
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
    step = f"{_INSTALL} Without such a device, {without}"
    if s.environ.get(envs.MODE, "").strip().lower() == "on":
        return failed(f"{text}, and {envs.MODE}=on demands one.", step)
    return warned(f"{text}. This package stays idle.", step)


def _device(device: Mapping[str, Any]) -> str:
    free, total = (f"{device[name] // _MIB} MiB" for name in ("free", "total"))
    return f"{device['name']}, MP {_dotted(device['capability'])}, {free} of {total} free"


def _probe_driver(s: Surroundings) -> CheckResult:
    if not s.has_musa_stack:
        return _not_needed("driver")
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
            "Run it, and mend the driver's installation.",
        )
    found = re.search(r"driver[ _]version\s*:?\s*([\w.+-]+)", done.stdout, re.IGNORECASE)
    return passed(f"Driver {found.group(1) if found else 'of unknown version'}.", tool=tool)


def _probe_toolkit(s: Surroundings) -> CheckResult:
    if not s.has_musa_stack:
        return _not_needed("toolkit")
    home = Path(s.environ.get("MUSA_HOME") or s.environ.get("MUSA_PATH") or "/usr/local/musa")
    header = home / "include" / "musa.h"
    needed = f"MATE needs {_dotted(OLDEST_TOOLKIT)} or newer"
    if not header.is_file():
        return warned(
            f"No MUSA toolkit at {home} ({needed}).", "Set MUSA_HOME to where the toolkit is."
        )
    found = re.search(
        r"#\s*define\s+MUSA_VERSION\s+(\d+)", header.read_text(encoding="utf-8", errors="replace")
    )
    if found is None:
        return warned(
            f"{header} does not say its version ({needed}).",
            "Compare it with the toolkit's release notes.",
        )
    number = int(found.group(1))
    version = (number // 10000, number // 100 % 100, number % 100)
    text = f"MUSA toolkit {_dotted(version)} at {home}"
    if version < OLDEST_TOOLKIT:
        return failed(
            f"{text}; {needed}.", "Install a newer MUSA SDK, with the torch that belongs to it."
        )
    if version < TOOLKIT_OF_CHUNKS:
        step = f"Install {_dotted(TOOLKIT_OF_CHUNKS)} or newer to serve models such as Llama-4."
        return warned(f"{text}: attention in chunks with a window does not work.", step)
    return passed(f"{text}.")


def _probe_python(s: Surroundings) -> CheckResult:
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
            f"{text}, and these wheels are for another: {_listed(wrong)}.", _INSTALL, wrong=wrong
        )
    if s.has_musa_stack and (version not in ("3.10", "3.12") or machine != "x86_64"):
        step = "Use CPython 3.10 or, from SGLang 0.5.22 on, 3.12."
        return warned(f"{text}; the vendor publishes wheels for 3.10 and 3.12 on x86_64.", step)
    return passed(f"{text}.")


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


def _built_for_another_python(name: str) -> bool:
    """Whether the installed wheel of ``name`` has a binary interface, and not the one of this
    interpreter.
    """
    distribution = _distribution(name)
    lines = (distribution.read_text("WHEEL") or "").splitlines() if distribution else []
    tags = [line.partition(":")[2].strip().split("-") for line in lines if line.startswith("Tag:")]
    ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return bool(tags) and not any(
        abi in ("none", "abi3") or python == ours for python, abi, *_ in tags
    )


# --- the vendor's packages ------------------------------------------------------------------------


def _probe_torch(s: Surroundings) -> CheckResult:
    versions = _versions("torch", "torch_musa", "torchada", "torchvision")
    if "torch" not in versions:
        return failed(
            "PyTorch is not installed.", _INSTALL if s.has_musa_stack else "Install torch."
        )
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    if s.has_musa_stack:
        for problem in _problems_of_torch(versions):
            return replace(
                problem, finding=f"{problem.finding} Installed: {listed}.", details=versions
            )
    pinned = _pinned_torch()
    if pinned is not None and _release(versions["torch"]) != pinned:
        step = "Prefer a SGLang release of the same torch, or check with sglang-musa-ext validate."
        return warned(f"{listed}; this SGLang is released with torch {pinned}.", step, **versions)
    return passed(f"{listed}.", **versions)


def _problems_of_torch(versions: Mapping[str, str]) -> list[CheckResult]:
    """What is wrong with the packages around a MUSA build of torch, worst first."""
    found = []
    theirs = versions.get("torch_musa", "")
    if theirs and _release(theirs) != _release(versions["torch"]):
        found.append(failed("torch_musa and torch are of different releases.", _INSTALL))
    if "torchada" not in versions:
        step = "pip install --no-deps torchada"
        found.append(
            failed("torchada is missing: SGLang takes no device for MUSA without it.", step)
        )
    if "musa" in theirs and "musa" not in versions["torch"]:
        step = f"A public torch has probably replaced the vendor's. {_INSTALL}"
        found.append(failed("torch_musa is the vendor's build, and torch is not.", step))
    return found


def _pinned_torch() -> str | None:
    package = check.find_package()
    if package is None:
        return None
    key = releases.version_key(check.read_version(package))
    pins = [x.torch for x in releases.SUPPORTED_RELEASES if releases.version_key(x.version) == key]
    return pins[0] if pins else None


def _probe_mate(s: Surroundings) -> CheckResult:
    from sglang_musa_ext.kernels.mate_identity import identify_mate

    found = identify_mate()
    details = {
        name: getattr(found, name)
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
        if found.location is None or not found.problems:
            return passed(f"MATE is not needed for {_purpose(s)}.", **details)
        text = f"{found.problems[0].seen} It does no harm here, because MATE is not needed for {_purpose(s)}."
        return warned(text, found.problems[0].remedy, **details)
    for problem in found.problems:
        return failed(f"{problem.seen} Expected: {problem.expected}", problem.remedy, **details)
    for problem in found.warnings:
        return warned(f"{problem.seen} Expected: {problem.expected}", problem.remedy, **details)
    wrapper = f"wrapper {found.wrapper} {found.wrapper_version}"
    return passed(f"MATE {found.version} at {found.location}, {wrapper}.", **details)


def _probe_triton(s: Surroundings) -> CheckResult:
    if not s.has_musa_stack:
        return _not_needed("triton")
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return failed("Triton is not installed; SGLang's page tables need it.", _INSTALL)
    places = [Path(place, "backends") for place in spec.submodule_search_locations]
    backends = sorted(x.parent.name for place in places for x in place.glob("*/driver.py"))
    text = f"Triton {_versions('triton').get('triton', '?')} has the backends {_listed(backends)}"
    if not {"mtgpu", "musa", "mthreads"} & set(backends):
        step = f"A public triton has probably replaced the vendor's. {_INSTALL}"
        return failed(f"{text}, and none for MUSA.", step, backends=backends)
    return passed(f"{text}.", backends=backends)


def _probe_collisions(s: Surroundings) -> CheckResult:
    if not s.has_musa_stack:
        return _not_needed("vendor's builds of public names")
    versions = _versions(*COLLIDING)
    foreign = {name: version for name, version in versions.items() if not COLLIDING[name](version)}
    cuda = sorted(
        {x.name for x in importlib.metadata.distributions() if (x.name or "").startswith("nvidia-")}
    )
    if foreign:
        listed = ", ".join(f"{name} {version}" for name, version in foreign.items())
        step = f"pip uninstall {' '.join(foreign)}. {_INSTALL}"
        return failed(
            f"Public builds stand in the place of the vendor's: {listed}.", step, foreign=foreign
        )
    if cuda:
        step = "They show that pip resolved dependencies here; check 'torch' and 'triton', and use --no-deps."
        return warned(
            f"CUDA packages are installed beside torch_musa: {_some(cuda)}.", step, cuda=cuda
        )
    return passed(
        "None of the vendor's packages is shadowed by a public one of its name.", **versions
    )


def _of_musa(version: str) -> bool:
    return "musa" in version


def _of_mate(version: str) -> bool:
    """Whether a wrapper's version is one of MATE's: from 0.2.7 on they say musa, before that they
    are 0.x.
    """
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


# --- the whole ------------------------------------------------------------------------------------

CHECKS = (
    Check("sglang", "Is there a SGLang release that this package works with?", _probe_sglang),
    Check("contract", "Does SGLang have what this package relies on?", _probe_contract),
    Check(
        "settings", "Which settings are effective, and where do they come from?", _probe_settings
    ),
    Check("plugin", "Will SGLang load this plugin?", _probe_plugin),
    Check(
        "command",
        "What attention backend and page size does a command line lead to?",
        _probe_command,
    ),
    Check("python", "Do interpreter and wheels fit?", _probe_python),
    Check("device", "Is there a device with the needed version and free memory?", _probe_device),
    Check("driver", "Does the driver answer?", _probe_driver),
    Check("toolkit", "Is the MUSA toolkit new enough for MATE?", _probe_toolkit),
    Check("torch", "Do torch, torch_musa and torchada belong together?", _probe_torch),
    Check("triton", "Does Triton have a backend for MUSA?", _probe_triton),
    Check("mate", "Is MATE Moore Threads', and does its wrapper fit?", _probe_mate),
    Check(
        "collisions", "Does a public package stand in the place of a vendor's?", _probe_collisions
    ),
)


def run_checks(surroundings: Surroundings, checks: Sequence[Check] = CHECKS) -> list[CheckResult]:
    """The answers to ``checks``, in their order; none of them raises."""
    return [replace(_guarded(check, surroundings), name=check.name) for check in checks]


def _guarded(check: Check, surroundings: Surroundings) -> CheckResult:
    try:
        return check.probe(surroundings)
    except (Exception, SystemExit) as error:
        finding = f"This could not be found out: {type(error).__name__}: {error}"
        return failed(
            finding, "Mend what it names; if it names nothing of yours, please report it."
        )


def worst(results: Sequence[CheckResult]) -> Status:
    """The worst status among ``results``."""
    order = list(Status)
    return max((result.status for result in results), key=order.index, default=Status.PASS)


def as_json(results: Sequence[CheckResult]) -> str:
    """The report for programs."""
    checks = [
        {
            "name": result.name,
            "status": result.status.value,
            "finding": result.finding,
            "next_step": result.next_step,
            "details": dict(result.details),
        }
        for result in results
    ]
    report = {
        "sglang_musa_ext": __version__,
        "status": worst(results).value,
        "supported_sglang": [release.version for release in releases.SUPPORTED_RELEASES],
        "checks": checks,
    }
    return json.dumps(report, indent=2, ensure_ascii=False, default=str)


def as_text(results: Sequence[CheckResult], width: int = 110) -> str:
    """The report for people: a row for each check, with the next step below what needs one."""
    counts = {status: sum(result.status is status for result in results) for status in Status}
    supported = ", ".join(release.version for release in releases.SUPPORTED_RELEASES)
    lines = [
        f"sglang-musa-ext {__version__}: "
        + ", ".join(f"{count} {status.value}" for status, count in counts.items()),
        *textwrap.wrap(
            f"SGLang releases it is tested with: {supported}", width, break_on_hyphens=False
        ),
        "",
    ]
    for result in results:
        lines += _row(f"{result.status.value.upper():<5}{result.name:<11}", result.finding, width)
        if result.next_step:
            lines += _row(" " * 16 + "-> ", result.next_step, width)
    return "\n".join(lines)


def _row(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _purpose(s: Surroundings) -> str:
    return f"{s.kernels} kernels" if s.kernels else "a package that stays idle"


def _not_needed(what: str) -> CheckResult:
    return passed(f"No torch_musa is installed, so there is no {what} to look at.")


def _distribution(name: str) -> Distribution | None:
    return next(iter(importlib.metadata.distributions(name=name)), None)


def _versions(*names: str) -> dict[str, str]:
    return {name: found.version for name in names if (found := _distribution(name)) is not None}


def _release(version: str) -> str:
    """The release numbers of a version, without post-release and local label."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found.group() if found else version


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _listed(items: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(items)) or "absent"


def _some(items: Sequence[str]) -> str:
    """The first three of ``items``; all of them are in the details."""
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print them; returns the exit code: 0 all passed, 1 a warning, 2 a failure."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext doctor",
        usage="%(prog)s [--json] [-- SERVER ARGUMENTS]",
        description="What this environment would serve, and what stands in its way.",
        epilog="Exit status: 0 all passed, 1 there is a warning, 2 there is a failure. Example: "
        "sglang-musa-ext doctor -- --model-path Qwen/Qwen3-8B --attention-backend fa3",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(given[:split])
    command = given[split + 1 :] if split < len(given) else None
    results = run_checks(Surroundings(dict(os.environ), command))
    print(
        as_json(results)
        if options.json
        else as_text(results, min(shutil.get_terminal_size().columns, 120))
    )
    return EXIT_CODES[worst(results)]
