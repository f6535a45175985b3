"""Install Moore Threads' packages that belong together, each step from one index.

1. Download the pinned wheels of a cohort from the vendor's index, without their dependencies.
2. Look into them: ``mate`` and its wrapper must be Moore Threads', whatever an index calls so.
3. Install exactly these wheels, without any index.
4. Install what only a public index has, without its dependencies.

Nothing is installed before the second step is passed, and nothing at all over a torch of another
release. pip's configuration files and variables are left out, because one more index in them would
be one more answer to ``mate``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_musa_ext.envs import VENDOR_INDEX

PACKAGE = Path(__file__).resolve().parent
CONSTRAINTS = PACKAGE / "constraints"
TORCH_GROUP = frozenset({"torch", "torch-musa", "torchvision", "torchaudio"})
"""Left alone where installed, once torch is seen to be the vendor's of the same release."""
SUPERSEDED = "mate-flash-attention"
"""MATE 0.1's wrapper, whose module the newer one shares."""

CONFIGURATION = {"PIP_CONFIG_FILE": os.devnull}

INSTALLED = """
import importlib.metadata, json, sys
distributions = [x for x in importlib.metadata.distributions() if x.metadata["Name"]]
installed = {x.metadata["Name"]: x.version for x in distributions}
print(json.dumps({"python": list(sys.version_info[:2]), "installed": installed}))
"""
IDENTIFY = """
import sys
sys.path[:0] = sys.argv[1:]
from sglang_musa_ext.kernels.mate_identity import identify_mate
for problem in identify_mate().problems:
    print(f"  {problem.seen} Expected: {problem.expected}")
"""


class InstallError(RuntimeError):
    """Nothing was installed, or not all; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """The commands, in order; between download and install the wheels are inspected."""

    download: list[str]
    install: list[str]
    public: list[str]
    wheels: Path
    notes: tuple[str, ...] = ()

    @property
    def commands(self) -> tuple[list[str], ...]:
        """All of it."""
        return self.download, self.install, self.public


def cohorts() -> list[str]:
    """The names of the sets of packages that belong together, newest torch first."""
    names = (path.stem.removeprefix("musa-") for path in CONSTRAINTS.glob("musa-*.txt"))
    return sorted(names, key=lambda name: [int(x) for x in re.findall(r"\d+", name)], reverse=True)


def read_pins(path: Path) -> dict[str, str]:
    """The pinned versions in a constraints file, by normal name."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, _, version in pins}


def normal(name: str) -> str:
    """A name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def make_plan(
    options: argparse.Namespace, installed: Mapping[str, str], python_version: Sequence[int]
) -> Plan:
    """The commands for an environment with these packages (normal name to version).

    Raises:
        InstallError: they would replace a torch, or leave two generations of MATE's wrapper.
    """
    pins = read_pins(CONSTRAINTS / f"musa-{options.cohort}.txt")
    notes = []
    if tuple(python_version) not in ((3, 10), (3, 12)):
        dotted = ".".join(map(str, python_version))
        notes.append(
            f"The vendor publishes wheels for CPython 3.10 and 3.12, and {options.python} is "
            f"{dotted}."
        )
    if SUPERSEDED in installed:
        raise InstallError(
            f"{SUPERSEDED} {installed[SUPERSEDED]} is installed, MATE 0.1's wrapper, whose modules "
            "the new one would "
            f"share. Uninstall it first: {options.python} -m pip uninstall {SUPERSEDED}"
        )
    if "torch" in installed:
        require_same_torch(installed["torch"], pins["torch"], options)
        kept = sorted(TORCH_GROUP & installed.keys())
        notes.append("Left alone: " + ", ".join(f"{name} {installed[name]}" for name in kept) + ".")
        pins = {name: version for name, version in pins.items() if name not in kept}
    pinned = [f"{name}=={version}" for name, version in pins.items()]
    pip = [options.python, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    wheels = Path(options.wheels)
    download = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
    # Reinstalling matters where another project's package of this name and version is there.
    install = [
        *pip,
        "install",
        "--no-deps",
        "--force-reinstall",
        "--no-index",
        "--find-links",
        str(wheels),
    ]
    public = [
        *pip,
        "install",
        "--no-deps",
        *(("--index-url", options.public_index) if options.public_index else ()),
    ]
    return Plan(
        download=[*download, "--index-url", options.index, *pinned],
        install=[*install, *pinned],
        public=[
            *public,
            *(
                f"{name}=={version}"
                for name, version in read_pins(CONSTRAINTS / "public.txt").items()
            ),
        ],
        wheels=wheels,
        notes=tuple(notes),
    )


def require_same_torch(installed: str, pinned: str, options: argparse.Namespace) -> None:
    """Refuse to replace a torch: a vendor's may be the only one that fits its driver.

    Raises:
        InstallError: the installed one is not the vendor's, or not of the cohort's release.
    """
    if "musa" in installed and release(installed) == release(pinned):
        return
    whose = "the vendor's torch" if "musa" in installed else "a torch that is not the vendor's"
    raise InstallError(
        f"{options.python} has {whose}, {installed}, and the cohort {options.cohort} has {pinned}. "
        f"It is not replaced. Take another cohort ({', '.join(cohorts())}), or a new environment: "
        "python3.12 -m venv NAME"
    )


def release(version: str) -> str:
    """The numbers of a version, without post-release and local label."""
    return re.match(r"[\d.]*\d", version).group()  # type: ignore[union-attr]


def require_moore_threads(wheels: Path, pins: Mapping[str, str]) -> None:
    """Refuse wheels called ``mate`` or ``flash_attn_3`` that are not Moore Threads'.

    Raises:
        InstallError: naming the wheel and what it lacks.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as alone:
        for path in wheels.glob("*.whl"):
            name, version = path.name.split("-")[:2]
            # A pin without a local label stands for any, to pip too.
            if normal(name) in ("mate", "flash-attn-3") and pins[normal(name)] in (
                version,
                version.partition("+")[0],
            ):
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(folder)
        # Without site-packages, which may have this package: only the wheels can answer.
        Path(alone, PACKAGE.name).symlink_to(PACKAGE)
        command = [sys.executable, "-I", "-S", "-c", IDENTIFY, folder, alone]
        problems = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if problems:
        raise InstallError(
            f"The wheels in {wheels} are not Moore Threads' MATE, so none was installed:\n"
            f"{problems}Delete them, and give the vendor's own index with --index: a public one "
            "has other projects of these names."
        )


def look_at(python: str) -> tuple[dict[str, str], list[int]]:
    """The packages of an environment (normal name to version), and the version of its Python.

    Raises:
        InstallError: there is no such interpreter.
    """
    try:
        done = subprocess.run(
            [python, "-I", "-c", INSTALLED], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(f"--python {python} is no interpreter that runs: {error}.") from error
    answer = json.loads(done.stdout)
    return {normal(name): version for name, version in answer["installed"].items()}, answer[
        "python"
    ]


def run(command: Sequence[str]) -> None:
    """Run one pip command, with nobody else's configuration.

    Raises:
        InstallError: it failed; pip has said why.
    """
    print(f"+ {shown(command)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(command, env=environment | CONFIGURATION, check=False)
    if done.returncode != 0:
        raise InstallError(f"pip failed with exit status {done.returncode}: {shown(command)}")


def shown(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(
        ["env", *(f"{name}={value}" for name, value in CONFIGURATION.items()), *command]
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options.

    Raises:
        SystemExit: by argparse, for bad ones.
    """
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext install", description="Install the vendor's stack for MUSA."
    )
    parser.add_argument(
        "--index",
        default=os.environ.get(VENDOR_INDEX),
        help=f"URL of Moore Threads' package index (default: {VENDOR_INDEX})",
    )
    parser.add_argument(
        "--public-index", help="URL of a public index for the last step (default: pip's own)"
    )
    parser.add_argument(
        "--cohort", choices=cohorts(), default=cohorts()[0], help="packages that belong together"
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter of the environment (default: this one)",
    )
    parser.add_argument(
        "--wheels",
        default="musa-wheels",
        help="folder for the vendor's wheels (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    options = parser.parse_args(arguments)
    if not options.index:
        parser.error(
            f"give the URL of Moore Threads' package index with --index, or in {VENDOR_INDEX}"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it, or say why not; returns the exit code."""
    options = parse(arguments)
    try:
        plan = make_plan(options, *look_at(options.python))
        for note in plan.notes:
            print(f"# {note}")
        if options.dry_run:
            print("\n".join(map(shown, plan.commands)))
            return 0
        run(plan.download)
        require_moore_threads(plan.wheels, read_pins(CONSTRAINTS / f"musa-{options.cohort}.txt"))
        run(plan.install)
        run(plan.public)
    except InstallError as error:
        print(f"sglang-musa-ext install: {error}", file=sys.stderr)
        return 1
    print(f"Installed. Next: {options.python} -m sglang_musa_ext doctor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
