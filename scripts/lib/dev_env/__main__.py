"""Make the virtual environment of scripts/test and scripts/demo: .venv, in the root.

It needs a Python from 3.10 to 3.12 and pip, and installs what SGLang's engine imports on a CPU, the
tools, torch, this package (editable) and SGLang itself: the very files that scripts/lib/locks names
by their SHA-256, whatever index they come from. Only torch is not among them where its CPU build is
taken, or where an index for it is named. A second run finds nothing to do, or goes on where the
first one failed.

Torch's CPU build is taken where a configured index offers one, else its default build, which may be
for CUDA and need some GB more. SGLANG_MUSA_EXT_TORCH_INDEX, the URL of an index, is used for torch
alone; PyTorch's installation page names one of CPU builds. SGLANG_MUSA_EXT_TORCH_BUILD=cpu accepts
no other build, and =default takes the default build even so.

The exit status is 2 for a Python or an option that does not serve, 3 for too little disk, 4 for an
index that does not answer, and 1 for anything else.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.lib.dev_env.pip import (
    InstallError,
    NoSuchVersionError,
    Pip,
    explain,
    require_room,
    run,
)
from scripts.lib.locks.read import ALONE, lock_of, only
from sglang_musa_ext.envs import TORCH_BUILD, TORCH_INDEX
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES

ROOT = Path(__file__).resolve().parents[3]
TORCH = "2.13.0"
SGLANG = "0.5.21"
NIXL = "1.5.1"
NIXL_WHEELS = (f"nixl=={NIXL}", f"nixl-cu13=={NIXL}")
"""They move keys and values between servers apart, and can be imported without CUDA."""
BUILDS = ("auto", "cpu", "default")
SMALL, LARGE = 3, 7
"""GB of an environment with the CPU build of torch and with the one for CUDA, rounded up."""
QUICK = ("--timeout", "30", "--retries", "1")
"""For the first and smallest installation: an index that does not answer shows here, and soon."""
PYTHON_VERSION = "{}.{}".format(*sys.version_info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment; return the exit status."""
    options = parse_options(arguments)
    release = release_for(options.sglang, sys.version_info[:2])
    if release != options.sglang:
        print(f"environment: SGLang {options.sglang} is not for Python {PYTHON_VERSION}")
    with Path(__file__).open() as lock:
        # scripts/test and scripts/demo may be started together; the second waits for the first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            Environment(ROOT / options.venv, release, options.build).ensure()
        except InstallError as error:
            print(f"failed\n\nscripts/dev-env: {error}", file=sys.stderr)
            return error.status
        except KeyboardInterrupt:
            print("interrupted\n\nscripts/dev-env: run it again to go on", file=sys.stderr)
            return 130
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and which build of torch is asked for."""
    parser = argparse.ArgumentParser(
        prog="scripts/dev-env",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sglang", default=SGLANG, help="the SGLang release to install (default: %(default)s)"
    )
    parser.add_argument(
        "--venv", default=".venv", help="the environment's folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.build = os.environ.get(TORCH_BUILD, "").strip().lower() or "auto"
    if options.build not in BUILDS:
        parser.error(f"{TORCH_BUILD}={options.build!r}; expected {', '.join(BUILDS)}")
    return options


def release_for(wanted: str, python: tuple[int, ...]) -> str:
    """Return the SGLang release ``wanted`` if it runs on ``python``, else the newest that does."""
    oldest_python = {row.version: oldest_of(row.requires_python) for row in SUPPORTED_RELEASES}
    if python >= oldest_python.get(wanted, (3, 0)):
        return wanted
    return [version for version, oldest in oldest_python.items() if python >= oldest][-1]


def oldest_of(requires_python: str) -> tuple[int, ...]:
    """Return the Python in ``>=3.10``, as a release states it."""
    return tuple(map(int, re.findall(r"\d+", requires_python)))


class Environment:
    """A virtual environment: what belongs in it, and how it gets there."""

    def __init__(self, folder: Path, release: str, build: str) -> None:
        self.folder, self.release, self.build = folder, release, build
        self.pip = Pip(folder)
        self.packages = folder / "lib" / f"python{PYTHON_VERSION}" / "site-packages"
        self.stamp = folder / "dev-env.stamp"
        """Says what was installed when all of it was."""

    def ensure(self) -> None:
        """Install everything, unless the last complete installation was of the same.

        Raises:
            InstallError: something could not be installed.
        """
        inputs = self.fingerprint()
        if self.stamp.is_file() and self.stamp.read_text() == inputs:
            print(f"environment: {self.folder.name} is up to date ({self.contents()})")
            return
        started = time.monotonic()
        self.stamp.unlink(missing_ok=True)
        step(f"virtual environment, Python {PYTHON_VERSION}", self.make_venv)
        step(f"tools, what SGLang imports, NIXL {NIXL}", self.install_lock)
        step(f"torch {TORCH}", self.install_torch)
        step(f"this package, SGLang {self.release}", self.install_sglang)
        self.stamp.write_text(inputs)
        seconds = time.monotonic() - started
        print(f"environment: {self.folder.name} is ready after {seconds:.0f} s ({self.contents()})")
        print(f"environment: {self.advice()}")

    def fingerprint(self) -> str:
        """Return what the environment is made from: another value means to make it again.

        The root is part of it, because the editable installation holds it.
        """
        sources = [*sorted(Path(__file__).parent.glob("*.py")), ROOT / "setup.cfg"]
        sources += [lock_of(), lock_of(part="torch-"), ALONE]
        sources.append(ROOT / "sglang_musa_ext" / "__init__.py")
        parts = [self.release, self.build, PYTHON_VERSION, str(ROOT), *torch_index()]
        parts += [path.read_text() for path in sources]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def contents(self) -> str:
        """Return the releases of SGLang and torch in it."""
        return f"SGLang {self.release}, torch {torch_facts(self.packages)['__version__']}"

    def advice(self) -> str:
        """Return which build of torch this is, and how to get the other."""
        again = f"remove {self.folder.name} and run this again with"
        facts = torch_facts(self.packages)
        if facts["cuda"] is None:
            return (
                f"this is torch's build for CPUs; for its default build {again} "
                f"{TORCH_BUILD}=default"
            )
        return (
            f"this is torch's build for CUDA {facts['cuda']}; for its build for CPUs, some 3 GB "
            f"smaller, {again} {TORCH_INDEX}=URL, an index of CPU builds (PyTorch's "
            "installation page names one)"
        )

    def make_venv(self) -> None:
        """Create the environment, unless there is one that is whole and of this Python."""
        if not (self.packages.is_dir() and self.pip.is_usable()):
            shutil.rmtree(self.folder, ignore_errors=True)
            require_room(self.folder.parent, SMALL)
            create_venv(self.folder)
        with only(lock_of(), "setuptools") as lock:
            self.pip.install_locked(lock, *QUICK)

    def install_lock(self) -> None:
        """Install the requirements of this package's extras, and of torch, as they are locked."""
        self.pip.install_locked(lock_of())

    def install_torch(self) -> None:
        """Install the CPU build if an index has one, else the default build; or as asked."""
        if self.build != "default":
            try:
                # It needs nothing but what is locked.
                self.pip.install(*torch_index(), "--no-deps", f"torch=={TORCH}+cpu")
            except NoSuchVersionError:
                if self.build == "cpu":
                    raise
            else:
                return
        if not (self.packages / "torch").is_dir():
            require_room(self.folder.parent, LARGE)
        if index := torch_index():
            self.pip.install(*index, f"torch=={TORCH},!={TORCH}+cpu")
        else:
            self.pip.install_locked(lock_of(part="torch-"))

    def install_sglang(self) -> None:
        """Install this package, editable, and SGLang, whose requirements bring a CUDA stack."""
        # Isolation would download a second setuptools for the build of an editable installation.
        self.pip.install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        requirement = f"sglang=={self.release}"
        try:
            with only(ALONE, requirement) as lock:
                self.pip.install_locked(lock)
        except KeyError:
            print(f"(unlocked: {requirement} is not in {ALONE.name}) ... ", end="")
            self.pip.install("--no-deps", requirement)


def create_venv(folder: Path) -> None:
    """Create a virtual environment with pip.

    Raises:
        InstallError: it could not be created.
    """
    # Debian packs ensurepip apart from Python; where it is missing, the pip of this Python serves.
    with_pip = importlib.util.find_spec("ensurepip") is not None
    try:
        venv.create(folder, with_pip=with_pip, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "output", None) or b""
        raise explain(f"{output.decode()}{error}", f"venv {folder}", folder) from error
    if not with_pip:
        python = str(folder / "bin" / "python")
        status, output = run([sys.executable, "-m", "pip", "--python", python, "install", "pip"])
        if status != 0:
            raise explain(output, "pip install pip", folder)


def torch_index() -> list[str]:
    """Return pip's option for the index of torch alone, if the user names one."""
    index = os.environ.get(TORCH_INDEX, "").strip()
    return ["--index-url", index] if index else []


def torch_facts(packages: Path) -> dict[str, str | None]:
    """Return ``__version__`` and ``cuda`` of the torch that is installed, without importing it."""
    return runpy.run_path(str(packages / "torch" / "version.py"))


def step(title: str, action: Callable[[], None]) -> None:
    """Do ``action``, and print its title and the seconds that it took."""
    print(f"environment: {title} ... ", end="", flush=True)
    started = time.monotonic()
    action()
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
