"""The wheel, built and installed as a user would, without a network."""

from __future__ import annotations

import email
import re
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from tests.support.wheels import SOURCES, build_source_distribution, pip, run

FORBIDDEN = {
    "torch": "the vendor's build would be replaced",
    "torchvision": "it pins a torch of its own",
    "torch-musa": "not on public indexes",
    "torchada": "it belongs to the vendor's stack",
    "sglang": "its requirements bring a CUDA stack",
    "sgl-kernel": "a CUDA build",
    "mate": "another project on the public index",
    "mate-mubin": "not on public indexes",
    "mate-flash-attention": "not on public indexes",
    "flash-attn": "a CUDA build",
    "flash-attn-3": "not on public indexes",
    "flash-mla": "another project on the public index",
    "deep-gemm": "the public index has a higher version of a foreign build",
    "mate-deep-gemm": "not on public indexes",
    "sageattention": "a CUDA build",
}


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{dist_info(archive)}/METADATA"))


@pytest.fixture(scope="session")
def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture
def clean_python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that holds nothing at all, not even pip."""
    venv.create(tmp_path / "clean", symlinks=True)
    return tmp_path / "clean" / "bin" / "python"


def dist_info(archive: zipfile.ZipFile) -> str:
    (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    return folder


def requirements(metadata: Message) -> list[str]:
    return metadata.get_all("Requires-Dist") or []


def normal_name(requirement: str) -> str:
    """The name of a requirement as package indexes compare it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_nothing_is_required_at_run_time(metadata: Message) -> None:
    """Installing cannot replace a vendor's torch: only extras require anything."""
    assert [x for x in requirements(metadata) if "extra ==" not in x] == []


def test_no_extra_names_a_package_of_the_stack(metadata: Message) -> None:
    """No extra names a package of the vendor, or of somebody else on a public index."""
    assert {normal_name(x) for x in requirements(metadata)} & FORBIDDEN.keys() == set()


def test_the_extras_are_the_documented_ones(metadata: Message) -> None:
    """There are two extras, and both have something in them."""
    assert sorted(metadata.get_all("Provides-Extra") or []) == ["cpu", "dev"]
    for name in ("cpu", "dev"):
        assert any(f'extra == "{name}"' in x for x in requirements(metadata)), name


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("Name", "sglang-musa-ext"),
        ("Requires-Python", ">=3.10"),
        ("License-Expression", "Apache-2.0"),
        ("License-File", "LICENSE"),
        ("Description-Content-Type", "text/markdown"),
    ],
)
def test_metadata(metadata: Message, field: str, expected: str) -> None:
    """The fields that installers and indexes read."""
    assert metadata[field] == expected


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_supported_pythons_are_named(metadata: Message, version: str) -> None:
    """Each Python version that is supported is in the classifiers."""
    assert f"Programming Language :: Python :: {version}" in (metadata.get_all("Classifier") or [])


def test_the_wheel_holds_the_package_alone(contents: list[str], wheel: Path) -> None:
    """The wheel has every file of the package, its metadata, and nothing else."""
    assert package_files() == {name for name in contents if ".dist-info/" not in name}
    assert {name.partition("/")[2] for name in contents if ".dist-info/" in name} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip
    assert len({name.partition("/")[0] for name in contents}) == 2
    assert wheel.name.endswith("-py3-none-any.whl")


def package_files() -> set[str]:
    """Return the paths of the package's files, relative to the repository."""
    root = Path(__file__).resolve().parent.parent
    files = (path for path in (root / "sglang_musa_ext").rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in files if path.suffix != ".pyc"}


def test_the_source_distribution_holds_what_the_wheel_does(
    repository: Path, tmp_path: Path
) -> None:
    """It has the package, what builds it, and no part of the tests, which need the repository."""
    archive, output = build_source_distribution(repository, tmp_path)
    with tarfile.open(archive) as opened:
        files = {item.name.partition("/")[2] for item in opened if item.isfile()}
    generated = {name for name in files if ".egg-info/" in name} | {"PKG-INFO"}
    assert files - generated == package_files() | {name for name in SOURCES if "." in name} | {
        "LICENSE"
    }
    assert "absent from the `packages` configuration" not in output


def test_the_licence_is_whole(repository: Path) -> None:
    """The licence file is the full text of Apache-2.0, terms and appendix."""
    text = (repository / "LICENSE").read_text()
    assert all(
        part in text
        for part in ("Version 2.0, January 2004", "END OF TERMS AND CONDITIONS", "APPENDIX")
    )


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("sglang.srt.plugins", "musa_ext"),
        ("sglang.srt.platforms", "musa_reference"),
        ("torch.backends", "musa_ext_guard"),
        ("console_scripts", "sglang-musa-ext"),
    ],
)
def test_entry_points_load_where_nothing_else_is_installed(
    wheel: Path, clean_python: Path, group: str, name: str
) -> None:
    """Without torch and sglang, each entry point is found and leads to a callable."""
    pip("--python", clean_python, "install", "--no-index", "--no-deps", wheel)
    code = (
        "from importlib.metadata import entry_points\n"
        f"found, = entry_points(group={group!r}, name={name!r})\n"
        "print(found.dist.name, callable(found.load()))"
    )
    assert run(clean_python, "-c", code).split() == ["sglang-musa-ext", "True"]


def test_uninstalling_leaves_nothing(wheel: Path, clean_python: Path) -> None:
    """After pip uninstall the environment holds exactly what it held before pip install."""
    root = clean_python.parent.parent
    before = files_below(root)
    pip("--python", clean_python, "install", "--no-index", "--no-deps", wheel)
    run(clean_python, "-c", "import sglang_musa_ext.envs")
    installed = files_below(root)
    pip("--python", clean_python, "uninstall", "--yes", "sglang-musa-ext")
    assert installed > before
    assert files_below(root) == before
