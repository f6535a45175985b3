"""The wheel of this checkout, and pip, without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = (
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "sglang_musa_ext",
)


def build_wheel(repository: Path, source: Path, target: Path) -> Path:
    """Build the wheel from a copy of the sources, without left-overs of earlier builds."""
    for name in SOURCES:
        copy(repository / name, source / name)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target, source)
    (built,) = target.glob("*.whl")
    return built


def build_source_distribution(repository: Path, source: Path) -> tuple[Path, str]:
    """Return the archive, built from a copy that has tests too, and what the build printed."""
    for name in (*SOURCES, "tests"):
        copy(repository / name, source / name)
    code = "import setuptools.build_meta as b; b.build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    (built,) = (source / "dist").glob("*.tar.gz")
    return built, done.stdout + done.stderr


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def pip(*arguments: str | Path) -> None:
    run(Path(sys.executable), "-m", "pip", *arguments)


def run(python: Path, *arguments: str | Path) -> str:
    """Return what ``python`` prints in isolated mode, which sees nothing but its environment."""
    done = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
