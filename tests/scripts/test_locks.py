"""The locks of what developers install: complete, in step with what asks for it, and obeyed."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts.lib.dev_env.__main__ import NIXL_WHEELS, TORCH
from scripts.lib.locks import __main__ as locks
from scripts.lib.locks.read import (
    ALONE,
    FOLDER,
    OPTIONS,
    THIS_PYTHON,
    TORCHADA,
    lock_of,
    only,
    read_lines,
)
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES

PARTS = ("", "torch-", "tools-")
LOCKS = [lock_of(python, part) for python in locks.PYTHONS for part in PARTS]


def versions(*files: Path) -> dict[str, Version]:
    """The version of each package in some locks that name it once."""
    pinned = [each.split("==") for file in files for each in read_lines(file)]
    assert len({name for name, _ in pinned}) == len(pinned)
    return {name: Version(version) for name, version in pinned}


def extras(python: str) -> Iterator[Requirement]:
    """The requirements of both extras of this package under a Python."""
    for text in importlib.metadata.requires("sglang-musa-ext") or ():
        requirement = Requirement(text)
        assert requirement.marker is not None
        if any(applies(requirement.marker, python, extra) for extra in ("cpu", "dev")):
            yield requirement


def applies(marker: Marker, python: str, extra: str) -> bool:
    """Tell whether a marker is true on Linux under a Python."""
    facts = {"python_version": python, "python_full_version": f"{python}.1", "extra": extra}
    return marker.evaluate(facts | {"sys_platform": "linux", "platform_system": "Linux"})


def test_there_is_no_other_lock() -> None:
    """Each file is of a supported Python, and the Pythons are those of the metadata."""
    assert sorted(FOLDER.glob("*.txt")) == sorted([*LOCKS, ALONE])
    metadata = importlib.metadata.metadata("sglang-musa-ext")
    named = [text for text in metadata.get_all("Classifier") or () if ":: Python :: 3." in text]
    assert [text.rpartition(" ")[2] for text in named] == list(locks.PYTHONS)


@pytest.mark.parametrize("lock", [*LOCKS, ALONE], ids=lambda lock: lock.name)
def test_every_line_has_digests(lock: Path) -> None:
    """Nothing in a lock but packages of one version and the SHA-256 of their wheels."""
    line = re.compile(r"[a-z0-9-]+==[\w.+]+( --hash=sha256:[0-9a-f]{64})+")
    lines = [each for each in lock.read_text().splitlines() if not each.startswith("#")]
    assert [each for each in lines if not line.fullmatch(each)] == []
    assert len(lines) == len(read_lines(lock)) > 10


@pytest.mark.parametrize("python", locks.PYTHONS)
def test_what_the_extras_ask_for_is_locked(python: str) -> None:
    """Each requirement is met by the locked version; torch and NIXL are of dev-env's releases."""
    locked = versions(lock_of(python), lock_of(python, "torch-"))
    asked = [*extras(python), Requirement(f"torch=={TORCH}"), *map(Requirement, NIXL_WHEELS)]
    assert len(asked) > 30
    unmet = [
        str(each)
        for each in asked
        if canonicalize_name(each.name) not in locked
        or locked[canonicalize_name(each.name)] not in each.specifier
    ]
    assert unmet == []


def test_what_is_resolved_is_what_the_extras_ask_for() -> None:
    """With its marker, which uv reads for each Python; the metadata of an installation agrees."""
    asked = {Requirement(text) for text in locks.asked_by_extras()}
    for python in locks.PYTHONS:
        applying = {
            canonicalize_name(each.name): each.specifier
            for each in asked
            if each.marker is None or applies(each.marker, python, "")
        }
        assert applying == {canonicalize_name(each.name): each.specifier for each in extras(python)}


def test_every_release_of_sglang_is_locked() -> None:
    """The file of what is installed alone has them and torchada, and nothing else."""
    releases = {f"sglang=={row.version}" for row in SUPPORTED_RELEASES}
    assert set(read_lines(ALONE)) == releases | {TORCHADA}


def installed(lock: Path) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of a lock that are in this environment."""
    wanted = versions(lock)
    distributions = importlib.metadata.distributions()
    found = {str(canonicalize_name(each.name)): each for each in distributions}
    return {name: found[name] for name in wanted if name in found}


def test_this_environment_is_what_is_locked() -> None:
    """All of it is installed, in the locked version."""
    lock = lock_of()
    assert {name: Version(each.version) for name, each in installed(lock).items()} == versions(lock)


def test_a_lock_has_what_its_packages_require() -> None:
    """Pip follows no requirement when it installs a lock, so each one is a line of its own."""
    locked = versions(lock_of(), lock_of(part="torch-"))
    missing = [
        f"{name} requires {text}"
        for name, distribution in installed(lock_of()).items()
        for text in distribution.requires or ()
        if not is_met(Requirement(text), locked) and not name.startswith("nixl")
    ]
    assert missing == []


def is_met(requirement: Requirement, locked: dict[str, Version]) -> bool:
    """Tell whether a requirement is locked in a version that it allows, or is of an extra."""
    if requirement.marker and not applies(requirement.marker, THIS_PYTHON, ""):
        return True
    version = locked.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def test_one_package_of_a_lock() -> None:
    """A lock of a single package can be had by name or by release; what is not there is named."""
    with only(lock_of(), "setuptools") as lock:
        assert set(versions(lock)) == {"setuptools"}
    with only(ALONE, "sglang==0.5.21") as lock:
        assert list(read_lines(lock)) == ["sglang==0.5.21"]
    with pytest.raises(KeyError, match="sglang==9 is not in"), only(ALONE, "sglang==9"):
        pass


def test_another_file_under_a_locked_version_is_not_installed(tmp_path: Path) -> None:
    """With the options for locks, pip refuses a wheel whose SHA-256 is another."""
    (tmp_path / "index").mkdir()
    name, version = next(iter(read_lines(lock_of()))).split("==")
    wheel = tmp_path / "index" / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    wheel.write_bytes(b"another file")
    with only(lock_of(), name) as lock:
        pip = [sys.executable, "-m", "pip", "--isolated", "download", "--no-index"]
        places = ["--find-links", tmp_path / "index", "--dest", tmp_path / "out"]
        done = subprocess.run(
            [*pip, *map(str, places), *OPTIONS, str(lock)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_a_lock_is_written_as_it_is_read(tmp_path: Path) -> None:
    """Packages in their order, with all their digests in one line."""
    digests = "a" * 64, "b" * 64
    lock = tmp_path / "lock.txt"
    locks.write(lock, {("torch", "2"): {digests[1], digests[0]}, ("attrs", "1.0"): {digests[0]}})
    assert list(read_lines(lock).values()) == [
        f"attrs==1.0 --hash=sha256:{digests[0]}",
        f"torch==2 --hash=sha256:{digests[0]} --hash=sha256:{digests[1]}",
    ]


def test_every_lock_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each Python and machine, uv is asked by requirements alone: it builds nothing."""
    written: dict[Path, set[str]] = {}

    def run(command: list[str | Path], *, input: str, **_: object) -> None:  # noqa: A002
        asked = [Requirement(line) for line in input.splitlines()]
        digest = "a" * 64 if "x86_64-manylinux_2_34" in command else "b" * 64
        lines = [
            f'[[packages]]\nname = "{each.name}"\nversion = "1"\n'
            f'wheels = [{{hashes = {{sha256 = "{digest}"}}}}]'
            for each in asked
        ]
        Path(command[command.index("--output-file") + 1]).write_text("\n".join(lines))

    def write(lock: Path, locked: locks.Locked) -> None:
        assert all(len(digests) == len(locks.MACHINES) for digests in locked.values())
        written[lock] = {name for name, _ in locked}

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(locks, "write", write)
    locks.renew()
    assert set(written) == {*LOCKS, ALONE}
    assert written[ALONE] == {"sglang", "torchada"}
    assert written[lock_of()] >= {each.name for each in extras(THIS_PYTHON)} | {"nixl"}
    assert written[lock_of(part="tools-")] == {"uv", "pip-audit"}


@pytest.mark.parametrize(("statuses", "expected"), [((0, 0), 0), ((0, 1), 1), ((1, 0), 1)])
def test_an_audit_fails_where_one_lock_does(
    monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, ...], expected: int
) -> None:
    """What could not be looked up fails it too: pip-audit is asked to be strict."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, statuses[len(asked) % 2])

    monkeypatch.setattr(subprocess, "run", run)
    assert locks.audit("pypi") == expected
    assert len(asked) == len(LOCKS) + 1
    assert all("--strict" in command for command in asked)
