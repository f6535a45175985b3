"""``sglang-musa-ext install`` with indexes and wheels made on the spot, without a network."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pip
import pytest

from sglang_musa_ext import install as install_musa
from sglang_musa_ext.doctor.packages import COLLIDING
from sglang_musa_ext.install import CONSTRAINTS, cohorts, normal, read_pins

COHORT = "torch2.11"
PINS = read_pins(CONSTRAINTS / f"musa-{COHORT}.txt")
TORCHADA = read_pins(CONSTRAINTS / "public.txt")["torchada"]
MATE = {"mate/__init__.py": "", "mate/mha_interface.py": "", "mate/jit/__init__.py": ""}
CONTENTS = {"mate": MATE, "flash-attn-3": {"flash_attn_interface.py": "import mate\n"}}
UNRELATED = {"mate/__init__.py": "", "mate/matchers.py": ""}
"""The contents of the public index's ``mate``: matchers for unittest."""


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str] | None = None) -> Path:
    """A wheel of a package that requires the whole stack, as the vendor's do."""
    stem = f"{name.replace('-', '_')}-{version}"
    contents = files or {f"{name.replace('-', '_')}_stand_in.py": ""}
    requires = "Requires-Dist: torch==9\nRequires-Dist: evil\n"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    contents |= {
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{stem}.dist-info/RECORD"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for place, text in contents.items():
            archive.writestr(place, text)
        archive.writestr(record, "".join(f"{place},,\n" for place in [*contents, record]))
    return path


class Index:
    """A package index in a folder, as PEP 503 says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = folder.as_uri()

    def add(self, name: str, version: str, files: dict[str, str] | None = None) -> None:
        """Offer one more wheel, in place of others of its name."""
        page = self.folder / normal(name)
        wheel = make_wheel(page, name, version, files)
        (page / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')


@pytest.fixture
def vendor(tmp_path: Path) -> Index:
    """The vendor's index, with the packages of the cohort."""
    index = Index(tmp_path / "vendor")
    for name, version in PINS.items():
        index.add(name, version, dict(CONTENTS.get(name, {})))
    return index


@pytest.fixture
def public(tmp_path: Path) -> Index:
    """A public index, with what belongs there and with what must never come from there."""
    index = Index(tmp_path / "public")
    index.add("torchada", TORCHADA)
    index.add("evil", "1.0")
    index.add("torch", "99")
    index.add("mate", "0.2.0", dict(UNRELATED))
    return index


class Environment:
    """A virtual environment with pip and nothing else."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        # Copying pip into each would take longer than the tests.
        (self.packages / "pip").symlink_to(Path(pip.__file__).parent)

    def has(self, name: str, version: str, files: dict[str, str] | None = None) -> None:
        """Have a package installed already."""
        with zipfile.ZipFile(make_wheel(self.packages.parent, name, version, files)) as archive:
            archive.extractall(self.packages)

    def installed(self) -> dict[str, str]:
        """The packages that the environment holds."""
        return install_musa.look_at(str(self.python))[0]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment of one's own."""
    return Environment(tmp_path / "environment")


def install(
    environment: Environment, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command on ``environment`` as a person would, from that folder."""
    command = [sys.executable, "-m", "sglang_musa_ext", "install"]
    return subprocess.run(
        [*command, "--python", environment.python, "--cohort", COHORT, *options],
        cwd=environment.python.parent,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_cohort_is_installed_and_nothing_else(
    vendor: Index, public: Index, environment: Environment
) -> None:
    """Pinned packages replace squatters, without dependencies, whatever pip's variables say."""
    environment.has("mate", PINS["mate"], dict(UNRELATED))
    done = install(
        environment,
        *("--index", vendor.url, "--public-index", public.url),
        PIP_NO_INDEX="1",
        PIP_EXTRA_INDEX_URL=public.url,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.installed() == PINS | {"torchada": TORCHADA}
    assert (environment.packages / "mate/mha_interface.py").is_file()
    assert not (environment.packages / "mate/matchers.py").exists()
    lock = environment.python.parent / "musa-wheels" / "lock.txt"
    assert set(lock.read_text().splitlines()[1:]) == set(lock_lines(vendor, public))


def test_an_index_that_only_has_the_unrelated_mate(vendor: Index, environment: Environment) -> None:
    """The public mate is no version of a cohort, so pip finds none, and nothing is installed."""
    vendor.add("mate", "0.2.0", dict(UNRELATED))
    done = install(environment, "--index", vendor.url)
    assert done.returncode == 1
    assert "mate==" in done.stderr
    assert environment.installed() == {}


@pytest.mark.parametrize(
    ("name", "files", "part"),
    [
        ("mate", UNRELATED, "'mate.mha_interface'"),
        (
            "flash-attn-3",
            {"flash_attn_interface.py": "import torch\n"},
            "nothing in it imports 'mate'",
        ),
    ],
)
def test_a_wheel_of_the_right_version_that_is_another_project(
    vendor: Index, environment: Environment, name: str, files: dict[str, str], part: str
) -> None:
    """A wheel's contents count: one that is not Moore Threads' keeps all others out too."""
    vendor.add(name, PINS[name], dict(files))
    done = install(environment, "--index", vendor.url)
    assert done.returncode == 1
    assert part in done.stderr
    assert environment.installed() == {}


def test_the_vendors_torch_is_kept(vendor: Index, public: Index, environment: Environment) -> None:
    """A torch of the same release is left alone, and the rest is installed around it."""
    before = {"torch": "2.11.0+musa5.2.0", "torch-musa": "2.11.0+musa5.2.0"}
    for name, version in before.items():
        environment.has(name, version)
    done = install(environment, "--index", vendor.url, "--public-index", public.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.installed() == PINS | {"torchada": TORCHADA} | before


@pytest.mark.parametrize(
    ("name", "version", "parts"),
    [
        (
            "torch",
            "2.9.1+musa5.2.0",
            ["the vendor's torch, 2.9.1+musa5.2.0", "torch2.9", "new environment"],
        ),
        ("torch", "2.11.0", ["not the vendor's, 2.11.0", "new environment"]),
        ("torch", "2.11.0+cu130", ["not the vendor's, 2.11.0+cu130"]),
        (
            "mate-flash-attention",
            "0.1.3",
            ["mate-flash-attention 0.1.3", "pip uninstall mate-flash-attention"],
        ),
    ],
)
def test_an_environment_that_would_be_spoilt(
    vendor: Index, environment: Environment, name: str, version: str, parts: list[str]
) -> None:
    """An environment with another torch, or an older wrapper, is refused and stays as it is."""
    environment.has(name, version)
    done = install(environment, "--index", vendor.url)
    assert done.returncode == 1
    for part in parts:
        assert part in done.stderr
    assert environment.installed() == {name: version}


def test_a_dry_run_prints_the_commands_and_runs_none(environment: Environment) -> None:
    """Three commands of pip, of one index or none and without dependencies; no file is written."""
    before = sorted(environment.python.parent.iterdir())
    done = install(
        environment,
        "--dry-run",
        "--public-index",
        "URL-OF-B",
        SGLANG_MUSA_EXT_VENDOR_INDEX="URL-OF-A",
    )
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert done.returncode == 0, done.stderr
    assert [re.findall(r"--index-url (\S+)|(--no-index)", line) for line in commands] == [
        [("URL-OF-A", "")],
        [("URL-OF-B", "")],
        [("", "--no-index")],
    ]
    assert all(
        "--no-deps" in line and "--isolated" in line and "PIP_CONFIG_FILE=" in line
        for line in commands
    )
    assert sorted(environment.python.parent.iterdir()) == before


def test_a_wheel_that_changed_under_its_version_is_refused(
    vendor: Index, public: Index, environment: Environment
) -> None:
    """Given what an index had, another build of Moore Threads' own keeps all wheels out."""
    lock = environment.python.parent / "given.txt"
    lock.write_text("\n".join(lock_lines(vendor, public)))
    before = digest_of(vendor, "mate")
    vendor.add("mate", PINS["mate"], MATE | {"mate/more.py": ""})
    indexes = ("--index", vendor.url, "--public-index", public.url)
    done = install(environment, *indexes, "--lock", str(lock))
    assert done.returncode == 1
    assert f"seen sha256 {digest_of(vendor, 'mate')}, expected {before}\n" in done.stderr
    assert done.stderr.count("seen sha256") == 1
    assert environment.installed() == {}


def lock_lines(vendor: Index, public: Index) -> list[str]:
    """The lines of a lock of all wheels that belong on a MUSA machine."""
    places = [(vendor, name, version) for name, version in PINS.items()]
    places.append((public, "torchada", TORCHADA))
    return [
        f"{name}=={version} --hash=sha256:{digest_of(index, name)}"
        for index, name, version in places
    ]


def digest_of(index: Index, name: str) -> str:
    """The SHA-256 of the only wheel that an index has of a package."""
    (wheel,) = (index.folder / name).glob("*.whl")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def plan(tmp_path: Path) -> install_musa.Plan:
    """The plan to install two wheels, which are in its folder beside another release of one."""
    pins = {"mate": "1.0", "torch-musa": "2.0+musa"}
    for name, version in [*pins.items(), ("mate", "0.9")]:
        make_wheel(tmp_path / "wheels", name, version)
    return install_musa.Plan([], [], [], pins, tmp_path / "wheels")


def test_a_lock_holds_what_is_installed(plan: install_musa.Plan) -> None:
    """It names each package once, with its version and the SHA-256 of its wheels, as pip does."""
    other = plan.wheels / "mate-1.0-py2-none-any.whl"
    other.write_bytes(b"another build")
    install_musa.settle_lock(plan, None)
    digests = {
        path.name.partition("-")[0]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in plan.wheels.glob("*-py3-*.whl")
        if "0.9" not in path.name
    }
    second = hashlib.sha256(b"another build").hexdigest()
    assert (plan.wheels / "lock.txt").read_text().splitlines()[1:] == [
        f"mate==1.0 --hash=sha256:{second} --hash=sha256:{digests['mate']}",
        f"torch-musa==2.0+musa --hash=sha256:{digests['torch_musa']}",
    ]


def test_wheels_of_the_lock_are_installed(plan: install_musa.Plan) -> None:
    """Any of a package's digests serves, on one line or as pip-compile breaks it."""
    install_musa.settle_lock(plan, None)
    lock = plan.wheels / "lock.txt"
    lock.write_text(
        lock.read_text().replace(" --hash", f" --hash=sha256:{'0' * 64} \\\n    --hash")
    )
    install_musa.settle_lock(plan, lock)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (f"mate==1.0 --hash=sha256:{'0' * 64}\n", f"expected {'0' * 64}\n"),
        (f"mate==1.0 --hash=sha256:{'0' * 64}\n", "expected none, as the lock lacks this package"),
        ("mate==1.0\n", "has no line such as NAME==VERSION --hash=sha256:DIGEST"),
        (None, "cannot be read"),
    ],
)
def test_a_lock_that_does_not_hold(plan: install_musa.Plan, text: str | None, part: str) -> None:
    """What is seen and expected is named, also where the lock says nothing or is none."""
    lock = plan.wheels / "given.txt"
    if text is not None:
        lock.write_text(text)
    with pytest.raises(install_musa.InstallError, match=re.escape(part)):
        install_musa.settle_lock(plan, lock)
    assert not (plan.wheels / "lock.txt").exists()


def test_the_vendors_index_must_be_named(environment: Environment) -> None:
    """There is no default index: the error names the option and the variable."""
    done = install(environment, SGLANG_MUSA_EXT_VENDOR_INDEX="")
    assert done.returncode == 2
    assert "--index" in done.stderr
    assert "SGLANG_MUSA_EXT_VENDOR_INDEX" in done.stderr


def test_a_python_without_vendor_wheels_is_mentioned(
    environment: Environment, vendor: Index
) -> None:
    """For an interpreter that the vendor does not build for, the command says so before pip."""
    done = install(environment, "--index", vendor.url, "--dry-run")
    assert ("The vendor publishes wheels for" in done.stdout) == (
        sys.version_info[:2] not in ((3, 10), (3, 12))
    )


def test_a_python_that_is_none(environment: Environment, vendor: Index, tmp_path: Path) -> None:
    """An interpreter that does not run is named."""
    done = install(environment, "--index", vendor.url, "--python", str(tmp_path / "python"))
    assert done.returncode == 1
    assert f"--python {tmp_path / 'python'}" in done.stderr


@pytest.mark.parametrize("cohort", cohorts())
def test_a_cohort_is_complete_and_says_where_it_is_from(cohort: str) -> None:
    """Each cohort pins the same packages, and its comments name source and date."""
    path = CONSTRAINTS / f"musa-{cohort}.txt"
    assert read_pins(path).keys() == PINS.keys()
    assert re.search(r"^# Source: .*commit [0-9a-f]{40}", path.read_text(), re.MULTILINE)
    assert re.search(r"\b20\d\d\b", path.read_text())


def test_the_newest_cohort_is_the_default() -> None:
    """Torch 2.11 comes after 2.9."""
    assert cohorts()[0] == "torch2.11"
    assert install_musa.parse(["--index", "URL"]).cohort == "torch2.11"


def test_no_file_names_an_index(repository: Path) -> None:
    """An index's URL is the user's to give, and stands in no constraints or scripts."""
    paths = [*CONSTRAINTS.iterdir(), repository / "sglang_musa_ext/install.py"]
    assert [path.name for path in paths if "://" in path.read_text()] == []


@pytest.mark.parametrize("cohort", cohorts())
def test_the_doctor_takes_a_cohort_for_the_vendors(cohort: str) -> None:
    """No version that a cohort pins looks like a public build to the doctor."""
    judges = {normal(name): judge for name, judge in COLLIDING.items()}
    pins = read_pins(CONSTRAINTS / f"musa-{cohort}.txt")
    assert [
        name for name, version in pins.items() if name in judges and not judges[name](version)
    ] == []
