"""Renew the locks of what developers install, or look up its known vulnerabilities.

Without an option, uv resolves what setup.cfg and scripts/dev-env ask for, for each Python and for
Linux on x86-64 and on ARM, and the SHA-256 of the wheels that fit go into scripts/lib/locks. It
asks PyPI, or the index that UV_DEFAULT_INDEX names, and takes the newest releases, or those before
the date in UV_EXCLUDE_NEWER.

--audit has pip-audit look every locked package up in PyPI's or in another database of known
vulnerabilities (--service osv), and fails if there is one, or if a package could not be looked up.
"""

from __future__ import annotations

import argparse
import configparser
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.lib.dev_env.__main__ import NIXL_WHEELS, TORCH, create_venv
from scripts.lib.dev_env.pip import Pip
from scripts.lib.locks.read import ALONE, FOLDER, TORCHADA, lock_of
from scripts.lib.matrix.data import read_toml
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES, Release

ROOT = Path(__file__).resolve().parents[3]
PYTHONS = ("3.10", "3.11", "3.12")
MACHINES = ("x86_64-manylinux_2_34", "aarch64-manylinux_2_34")
ENVIRONMENT = ROOT / ".cache" / "lock-tools"

Locked = dict[tuple[str, str], set[str]]
"""The SHA-256 of wheels, by name and version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/locks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--audit", action="store_true", help="look for known vulnerabilities")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="for --audit")
    options = parser.parse_args(arguments)
    make_tools()
    if options.audit:
        return audit(options.service)
    renew()
    return 0


def make_tools() -> None:
    """Make the environment of uv and pip-audit, of the releases that their lock has."""
    stamp, lock = ENVIRONMENT / "lock.txt", lock_of(part="tools-")
    if stamp.is_file() and stamp.read_bytes() == lock.read_bytes():
        return
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    create_venv(ENVIRONMENT)
    Pip(ENVIRONMENT).install_locked(lock)
    stamp.write_bytes(lock.read_bytes())


# --- locks ----------------------------------------------------------------------------------------


def renew() -> None:
    """Write every lock anew."""
    for python in PYTHONS:
        resolved = resolve(python, ("-",), asked_by_extras(), constraint=f"torch=={TORCH}")
        of_torch = {each for each in resolved if belongs_to_torch(each[0])}
        write(lock_of(python, "torch-"), {each: resolved[each] for each in of_torch})
        write(
            lock_of(python),
            {each: resolved[each] for each in resolved.keys() - of_torch}
            | resolve(python, ("-", "--no-deps"), NIXL_WHEELS),
        )
        write(lock_of(python, "tools-"), resolve(python, ("-",), ["uv", "pip-audit"]))
    alone: Locked = {}
    for python in PYTHONS:
        releases = [row.version for row in SUPPORTED_RELEASES if runs_on(row, python)]
        for requirement in (*(f"sglang=={version}" for version in releases), TORCHADA):
            for package, wheels in resolve(python, ("-", "--no-deps"), [requirement]).items():
                alone.setdefault(package, set()).update(wheels)
    write(ALONE, alone)


def asked_by_extras() -> list[str]:
    """Return the requirements of this package's extras, cpu and dev, with their markers.

    uv would build the package to know them, which it may not while it takes wheels alone.
    """
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = settings["options.extras_require"]
    lines = [*extras["cpu"].splitlines(), *extras["dev"].splitlines()]
    return [line for line in lines if line]


def runs_on(release: Release, python: str) -> bool:
    """Tell whether a release of SGLang is for a Python."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(release.requires_python).contains(python)


def belongs_to_torch(name: str) -> bool:
    """Tell whether a package comes with a build of PyTorch, and is another one with another."""
    return name == "torch" or name.startswith(("nvidia-", "cuda-"))


def resolve(
    python: str, what: Sequence[str], requirements: Iterable[str] = (), constraint: str = ""
) -> Locked:
    """Return what uv resolves for a Python, with the wheels for every machine.

    Args:
        python: such as ``3.11``.
        what: the source of requirements, and options; ``-`` stands for ``requirements``.
        requirements: what is asked for there.
        constraint: a version to keep to.
    """
    locked: Locked = {}
    with tempfile.TemporaryDirectory() as folder:
        constraints, output = Path(folder, "constraints.txt"), Path(folder, "pylock.toml")
        constraints.write_text(constraint)
        for machine in MACHINES:
            command: list[str | Path] = [
                ENVIRONMENT / "bin" / "uv", "pip", "compile", *what, "--quiet", "--system-certs",
                "--only-binary", ":all:", "--python-version", python, "--python-platform", machine,
                "--constraint", constraints, "--format", "pylock.toml", "--output-file", output,
            ]  # fmt: skip
            # Versions of the machine before stand in the output, and are taken again.
            text = "\n".join(requirements)
            subprocess.run(command, input=text, text=True, cwd=ROOT, check=True)
            for package in read_toml(output)["packages"]:
                wheels = locked.setdefault((package["name"], package["version"]), set())
                wheels.update(wheel["hashes"]["sha256"] for wheel in package["wheels"])
    return locked


def write(lock: Path, locked: Locked) -> None:
    """Write a lock, a line for each package."""
    lines = ["# Written by scripts/locks. The digests are of the wheels for Linux."]
    for (name, version), digests in sorted(locked.items()):
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in sorted(digests))
        lines.append(f"{name}=={version} {hashes}")
    lock.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"{lock.name}: {len(locked)} packages")


# --- known vulnerabilities ------------------------------------------------------------------------


def audit(service: str) -> int:
    """Ask a database about all locks; return 1 if a package is vulnerable or was not found."""
    status = 0
    for lock in sorted(FOLDER.glob("*.txt")):
        print(f"== {lock.name}", flush=True)
        # Without --strict a package that the database does not know passes for a sound one.
        options = ["--strict", "--no-deps", "--disable-pip", "--vulnerability-service", service]
        command = [str(ENVIRONMENT / "bin" / "pip-audit"), *options, "--requirement", str(lock)]
        status |= subprocess.run(command, check=False).returncode
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
