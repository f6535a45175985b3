"""Build the simulated GPU: a site folder of device, stand-ins and torchada, for PYTHONPATH.

``python -m tests.simulated_musa.build`` prints the folder. Everything is kept in
``.cache/simulated-musa`` of the checkout, by what it is made from; the device, which takes a
compiler about a minute, by the version of torch as well.
"""

from __future__ import annotations

import base64
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.lib.locks.read import ALONE, OPTIONS, TORCHADA, only

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "simulated-musa"
NEWEST_MATE = "0.2.7"
SOURCES = ("device.cpp", "graph.cpp", "operators.cpp", "module.cpp")
ENVIRONMENT: Mapping[str, str] = {
    # Triton has no compiler for this device.
    "TRITON_INTERPRET": "1",
    # SGLang compiles its rotary embedding on MUSA; Inductor has no code for this device.
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
"""The environment of every process on the simulated GPU, besides the site folder."""


class SimulationUnavailable(RuntimeError):
    """The simulated GPU cannot be had here; the message says why."""


@dataclass(frozen=True)
class _Distribution:
    """Write what ``pip`` would have noted of a stand-in."""

    name: str
    version: str
    files: Sequence[str]
    """Top-level folders and modules."""
    summary: str
    entry_points: str = ""
    author: str = "Moore Threads (stand-in)"
    metadata: Mapping[str, str] = field(default_factory=dict)


def environment(*, mate: str = NEWEST_MATE, first: Sequence[Path] = ()) -> dict[str, str]:
    """Return the variables of a process on the simulated GPU.

    Args:
        mate: the release of MATE that is stood in for.
        first: folders to import from before all others, as that of an unpacked SGLang.

    Raises:
        SimulationUnavailable: there is no compiler, or torchada cannot be installed.
    """
    paths = [*map(str, first), str(site_folder(mate))]
    if inherited := os.environ.get("PYTHONPATH"):
        paths.append(inherited)
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


@functools.cache
def site_folder(mate: str = NEWEST_MATE) -> Path:
    """Return the folder to put on PYTHONPATH, built at the first call."""
    library = _device_library()
    key = _digest([HERE / "site", HERE / "build.py", library], TORCHADA, mate)
    folder = CACHE / f"site-mate{mate}-{key}"
    with _lock():
        if not folder.is_dir():
            with _fresh(folder) as building:
                _fill_site(building, library, mate)
    return folder


# --- the device ----------------------------------------------------------------------------------


def _device_library() -> Path:
    """Return the compiled device of this torch and this Python."""
    torch_version = importlib.metadata.version("torch")
    key = _digest([HERE / "device"], torch_version, sys.version)
    folder = CACHE / f"device-torch{torch_version}-{key}"
    library = folder / "_MUSAC.so"
    with _lock():
        if not library.is_file():
            _require_compiler()
            with _fresh(folder) as building:
                _compile(building)
    return library


def _require_compiler() -> None:
    missing = [name for name in ("c++", "ninja") if shutil.which(name) is None]
    if missing:
        raise SimulationUnavailable(
            f"{' and '.join(missing)} cannot be found, and the simulated GPU is built with both."
        )


def _compile(folder: Path) -> None:
    """Compile in another process: loading the device would make this one a MUSA process."""
    sources = [str(HERE / "device" / name) for name in SOURCES]
    program = (
        "import sys; from torch.utils import cpp_extension as builder; "
        "builder.load('_MUSAC', sys.argv[2:], build_directory=sys.argv[1], extra_cflags=['-O1'])"
    )
    environ = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    _run([sys.executable, "-c", program, str(folder), *sources], environ)
    for left_over in folder.glob("*.o"):
        left_over.unlink()


# --- the site folder ------------------------------------------------------------------------------


def _fill_site(folder: Path, library: Path, mate: str) -> None:
    _install_torchada(folder)
    shutil.copytree(
        HERE / "site", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(library, folder / "torch_musa")
    release = folder / "mate" / "_release.py"
    release.write_text(release.read_text().replace(f'"{NEWEST_MATE}"', f'"{mate}"'))
    if _is_legacy(mate):
        (folder / "flash_attn").mkdir()
        shutil.move(folder / "flash_attn_interface.py", folder / "flash_attn" / "__init__.py")
    for distribution in _distributions(mate):
        _register(folder, distribution)


def _is_legacy(mate: str) -> bool:
    """Return whether the wrapper of this release is older than ``flash_attn_3``."""
    return mate.startswith("0.1.")


def _distributions(mate: str) -> list[_Distribution]:
    if _is_legacy(mate):
        wrapper = _Distribution(
            "mate-flash-attention", mate, ["flash_attn"], "FlashAttention-3 on MATE (stand-in)"
        )
    else:
        wrapper = _Distribution(
            "flash_attn_3",
            f"{mate}+musa",
            ["flash_attn_interface.py"],
            "FlashAttention-3 on MATE (stand-in)",
        )
    autoload = "[torch.backends]\ntorch_musa = torch_musa:_autoload\n"
    return [
        _Distribution("mate", mate, ["mate"], "MUSA AI Tensor Engine (stand-in)"),
        wrapper,
        _Distribution(
            "torch_musa",
            "2.11.0.post2+musa5.2.0",
            ["torch_musa"],
            "PyTorch on MUSA (stand-in)",
            autoload,
        ),
        _Distribution(
            "sgl-kernel", "0.4.5", ["sgl_kernel"], "SGLang's kernels (stand-in)", author=""
        ),
        _Distribution("torchvision", "0.0.0", ["torchvision"], "torchvision (stand-in)", author=""),
    ]


def _install_torchada(folder: Path) -> None:
    """Install torchada without kernels, which it would compile in every process."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        with only(ALONE, TORCHADA) as lock:
            _run([*command, "--target", str(folder), *OPTIONS, str(lock)], dict(os.environ))
    except SimulationUnavailable as error:
        raise SimulationUnavailable(f"{TORCHADA} cannot be installed: {error}") from error
    for source in (folder / "torchada" / "csrc").iterdir():
        if source.suffix in (".cpp", ".mu", ".cu"):
            source.unlink()


def _register(folder: Path, distribution: _Distribution) -> None:
    name = distribution.name.replace("-", "_")
    info = folder / f"{name}-{distribution.version}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {distribution.name}",
        f"Version: {distribution.version}",
    ]
    lines += [f"Summary: {distribution.summary}"]
    lines += [f"Author: {distribution.author}"] if distribution.author else []
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "top_level.txt").write_text(
        "\n".join(Path(file).stem for file in distribution.files) + "\n"
    )
    if distribution.entry_points:
        (info / "entry_points.txt").write_text(distribution.entry_points)
    records = []
    for root in [*distribution.files, info.name]:
        for file in _files(folder / root):
            digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(
                b"="
            )
            relative, size = file.relative_to(folder).as_posix(), file.stat().st_size
            records.append(f"{relative},sha256={digest.decode()},{size}")
    (info / "RECORD").write_text("\n".join([*records, f"{info.name}/RECORD,,"]) + "\n")


# --- files and processes --------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )


def _digest(paths: Sequence[Path], *texts: str) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for path in paths:
        for file in _files(path):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _lock() -> Iterator[None]:
    """Let one process at a time build."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "one-at-a-time").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A folder to build in, which becomes ``folder`` when all went well."""
    building = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        yield building
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _run(command: Sequence[str], environ: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise SimulationUnavailable(f"{command[0]} ended with {done.returncode}:\n{said}")


if __name__ == "__main__":
    print(site_folder(*sys.argv[1:]))
