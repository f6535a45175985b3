"""Install Moore Threads' packages that belong together, each step from one index.

1. Download the pinned wheels of a cohort from the vendor's index, without their dependencies.
2. Look into them: ``mate`` and its wrapper must be Moore Threads', whatever an index calls so.
3. Download what only a public index has, without its dependencies.
4. Compare the SHA-256 of every wheel with the lock that ``--lock`` names, or write a lock.
5. Install exactly these wheels, without any index.

Nothing is installed before the last step, and nothing at all over a torch of another release. pip's
configuration files and variables are left out, because one more index in them would be one more
answer to ``mate``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_musa_ext.envs import VENDOR_INDEX

PACKAGE = Path(__file__).resolve().parent
CONSTRAINTS = PACKAGE / "constraints"
TORCH_GROUP = frozenset({"torch", "torch-musa", "torchvision", "torchaudio"})
"""Left alone where installed, once torch is seen to be the vendor's of the same release."""
SUPERSEDED = "mate-flash-attention"
"""MATE 0.1's wrapper, whose module the newer one shares."""

LOCK = "lock.txt"
"""The file among the wheels that says what they are, in the form of pip's requirement files."""

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
    """The commands, in order; after a download the wheels are inspected."""

    download: list[str]
    public: list[str]
    install: list[str]
    pins: Mapping[str, str]
    """The versions that they install, by normal name."""
    wheels: Path
    notes: tuple[str, ...] = ()

    @property
    def commands(self) -> tuple[list[str], ...]:
        """All of it."""
        return self.download, self.public, self.install


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
    public_pins = read_pins(CONSTRAINTS / "public.txt")
    wheels = Path(options.wheels)
    pip = [options.python, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    download = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
    public_index = ("--index-url", options.public_index) if options.public_index else ()
    # Reinstalling matters where another project's package of this name and version is there.
    install = [*pip, "install", "--no-deps", "--force-reinstall", "--no-index"]
    return Plan(
        download=[*download, "--index-url", options.index, *_requirements(pins)],
        public=[*download, *public_index, *_requirements(public_pins)],
        install=[*install, "--find-links", str(wheels), *_requirements(pins | public_pins)],
        pins=pins | public_pins,
        wheels=wheels,
        notes=tuple(notes),
    )


def _requirements(pins: Mapping[str, str]) -> list[str]:
    return [f"{name}=={version}" for name, version in pins.items()]


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
        for name, path in pinned_wheels(wheels, pins):
            if name in ("mate", "flash-attn-3"):
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


def pinned_wheels(wheels: Path, pins: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Yield every wheel in a folder that a pin may install, with its normal name."""
    for path in sorted(wheels.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        # A pin without a local label stands for any, to pip too.
        if pins.get(normal(name)) in (version, version.partition("+")[0]):
            yield normal(name), path


def settle_lock(plan: Plan, lock: Path | None) -> None:
    """Compare the wheels with a lock, or write one beside them if none is given.

    Raises:
        InstallError: the lock cannot be read, or a wheel is not in it; nothing was installed.
    """
    seen = [(name, path, _sha256(path)) for name, path in pinned_wheels(plan.wheels, plan.pins)]
    if lock is None:
        _write_lock(plan, seen)
        return
    locked = read_lock(lock)
    changed = [
        f"  {path.name}: seen sha256 {digest}, expected {_expected(locked.get(name, ()))}\n"
        for name, path, digest in seen
        if digest not in locked.get(name, ())
    ]
    if changed:
        raise InstallError(
            f"Wheels in {plan.wheels} are not those of {lock}, so none was installed:\n"
            f"{''.join(changed)}Ask whoever runs the index what changed there. If the new wheels "
            "are right, install without --lock, and keep the lock that this writes; otherwise "
            "delete them, and take those that were locked."
        )


def _write_lock(plan: Plan, seen: Sequence[tuple[str, Path, str]]) -> None:
    lines = {name: f"{name}=={plan.pins[name]}" for name, _, _ in seen}
    for name, _, digest in seen:
        lines[name] += f" --hash=sha256:{digest}"
    written = plan.wheels / LOCK
    head = f"# What sglang-musa-ext install --lock {LOCK} compares.\n"
    written.write_text(head + "".join(f"{line}\n" for line in lines.values()), encoding="utf-8")
    print(f"# The SHA-256 of {len(seen)} wheels stand in {written}, for --lock.")


def read_lock(path: Path) -> dict[str, set[str]]:
    """The SHA-256 that a lock has for each package, by normal name.

    Raises:
        InstallError: there is no such file, or it has no line of a lock.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InstallError(f"--lock {path} cannot be read: {error}.") from error
    lines = re.findall(r"^([\w.-]+)==(\S+ .+)", text.replace("\\\n", " "), re.MULTILINE)
    locked = {normal(name): set(re.findall(r"sha256:(\w{64})\b", rest)) for name, rest in lines}
    if not any(locked.values()):
        raise InstallError(
            f"--lock {path} has no line such as NAME==VERSION --hash=sha256:DIGEST; expected the "
            f"{LOCK} that an earlier install has written among its wheels."
        )
    return locked


def _expected(digests: Iterable[str]) -> str:
    return " or ".join(sorted(digests)) or "none, as the lock lacks this package"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    parser.add_argument(
        "--lock",
        type=Path,
        help=f"refuse wheels whose SHA-256 are not in this file, the {LOCK} of an earlier install",
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
        require_moore_threads(plan.wheels, plan.pins)
        run(plan.public)
        settle_lock(plan, options.lock)
        run(plan.install)
    except InstallError as error:
        print(f"sglang-musa-ext install: {error}", file=sys.stderr)
        return 1
    print(f"Installed. Next: {options.python} -m sglang_musa_ext doctor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
