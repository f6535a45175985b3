from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_musa_ext.kernels.mate_identity import MateIdentity, identify_mate

MODULES = ("mate", "flash_attn_interface", "flash_attn", "flash_attn_3")
VENDOR = "Author: MooreThreads GPU Computing Team\nSummary: MUSA AI Tensor Engine\n"
MATE = {"mate/__init__.py": "", "mate/mha_interface.py": "", "mate/jit/__init__.py": ""}
CURRENT = {
    "flash_attn_interface.py": "from flash_attn_3.interface import flash_attn_func\n",
    "flash_attn_3/__init__.py": "",
    "flash_attn_3/interface.py": "from mate.mha_interface import flash_attn_varlen_func\n",
}
LEGACY = {
    "flash_attn/__init__.py": "from .interface import flash_attn_varlen_func\n",
    "flash_attn/interface.py": "import mate\n",
}
NVIDIA = {
    "flash_attn_interface.py": "import torch\nimport flash_attn_3._C\n",
    "flash_attn_3/__init__.py": "",
}
FLASH_ATTENTION_2 = {
    "flash_attn/__init__.py": "from flash_attn.flash_attn_interface import flash_attn_func\n",
    "flash_attn/flash_attn_interface.py": "import torch\n",
}
MATCHERS = {"mate/__init__.py": "class Mate: ...\n", "mate/matchers.py": ""}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a folder of packages first on the path; the modules in question are nowhere else."""
    before = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] in MODULES
    }
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.update(before)


def install(site: Path, name: str, version: str, files: dict[str, str], metadata: str = "") -> None:
    """Put a distribution with these files where pip would put it."""
    folder = f"{name.replace('-', '_')}-{version}.dist-info"
    own = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"
    }
    record = "".join(f"{path},,\n" for path in (*files, *own, f"{folder}/RECORD"))
    for path, text in {**files, **own, f"{folder}/RECORD": record}.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    importlib.invalidate_caches()


def install_vendors(site: Path, version: str = "0.2.2", wrapper: str | None = None) -> None:
    """MATE and its wrapper of the same version, as Moore Threads release them."""
    install(site, "mate", version, MATE, VENDOR)
    install(site, "flash_attn_3", wrapper or f"{version}+musa", CURRENT, "Requires-Dist: mate\n")


def only_problem(identity: MateIdentity) -> str:
    assert len(identity.problems) == 1, identity.problems
    return str(identity.problems[0])


def only_warning(identity: MateIdentity) -> str:
    assert not identity.problems
    assert len(identity.warnings) == 1, identity.warnings
    return str(identity.warnings[0])


# What is Moore Threads' -------------------------------------------------------------------------


def test_the_vendors_packages_are_recognized(site: Path) -> None:
    """MATE and its wrapper are named with distribution, version and path, and nothing is wrong."""
    install_vendors(site)
    assert identify_mate() == MateIdentity(
        distribution="mate",
        version="0.2.2",
        location=str(site / "mate" / "__init__.py"),
        wrapper="flash_attn_3",
        wrapper_module="flash_attn_interface",
        wrapper_distribution="flash_attn_3",
        wrapper_version="0.2.2+musa",
        wrapper_location=str(site / "flash_attn_interface.py"),
    )


def test_the_wrapper_of_mate_0_1_is_recognized(site: Path) -> None:
    """Before 0.2 the wrapper was another distribution, imported as ``flash_attn``."""
    install(site, "mate", "0.1.3", MATE, VENDOR)
    install(site, "mate-flash-attention", "0.1.3", LEGACY)
    identity = identify_mate()
    assert not identity.problems
    assert not identity.warnings
    assert (identity.wrapper, identity.wrapper_module) == ("mate-flash-attention", "flash_attn")
    assert (identity.wrapper_distribution, identity.wrapper_version) == (
        "mate-flash-attention",
        "0.1.3",
    )


@pytest.mark.parametrize(
    "version", ["0.1.3", "0.2.0", "0.2.1", "0.2.2", "0.2.3", "0.2.7", "0.2.7.post1+musa5.2.0"]
)
def test_every_known_release_is_accepted(site: Path, version: str) -> None:
    """MATE 0.1.3 to 0.2.7 pass with their generation's wrapper, whatever the build is called."""
    install(site, "mate", version, MATE, VENDOR)
    if version == "0.1.3":
        install(site, "mate-flash-attention", version, LEGACY)
    else:
        install(
            site,
            "flash_attn_3",
            "0.1.4" if version == "0.2.0" else version.partition("+")[0],
            CURRENT,
        )
    identity = identify_mate()
    assert identity.version == version
    assert not identity.problems
    assert not identity.warnings


def test_a_mate_without_its_compiler_is_known_by_its_metadata(site: Path) -> None:
    """A build that leaves out what it compiles with still says whose it is."""
    install_vendors(site)
    (site / "mate" / "jit" / "__init__.py").unlink()
    (site / "mate" / "jit").rmdir()
    assert not identify_mate().problems


def test_a_checkout_is_recognized(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An editable installation has its files elsewhere; its distribution points there."""
    checkout = tmp_path_factory.mktemp("checkout")
    sys.path.insert(1, str(checkout))  # The fixture's monkeypatch puts the whole path back.
    install_vendors(site)
    for path in [*MATE]:
        (site / path).unlink()
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text("")
    for folder in ("mate/jit", "mate"):
        (site / folder).rmdir()
    origin = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    (site / "mate-0.2.2.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    importlib.invalidate_caches()
    identity = identify_mate()
    assert not identity.problems
    assert (identity.version, identity.location) == (
        "0.2.2",
        str(checkout / "mate" / "__init__.py"),
    )


def test_nothing_of_mate_is_imported(site: Path) -> None:
    """Code that may be a stranger's is looked at, not run."""
    install_vendors(site)
    for path in [*MATE, *CURRENT]:
        text = (site / path).read_text()
        (site / path).write_text(f"{text}raise SystemExit('this was imported')\n")
    before = set(sys.modules)
    assert not identify_mate().problems
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in MODULES}


def test_nothing_heavy_is_imported() -> None:
    """Asking costs neither torch nor SGLang."""
    code = (
        "import sys; from sglang_musa_ext.kernels.mate_identity import identify_mate; "
        "identify_mate();"
        "print([name for name in ('torch', 'sglang', 'mate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is not ------------------------------------------------------------------------------------


def test_nothing_installed_is_two_problems(site: Path) -> None:
    """Both packages are missed at once, each with where to get it."""
    identity = identify_mate()
    assert (identity.distribution, identity.version, identity.location, identity.wrapper) == (
        None,
    ) * 4
    assert [problem.seen.partition(":")[0] for problem in identity.problems] == [
        "MATE is not installed",
        "MATE's FlashAttention-3 wrapper is not installed",
    ]
    assert all(
        "Moore Threads' own package index" in problem.remedy for problem in identity.problems
    )


@pytest.mark.parametrize("name", ["mate", "some-other-project"])
def test_a_foreign_mate_is_named(site: Path, name: str) -> None:
    """The unrelated project is named with distribution, version and path, whatever its name."""
    install(site, "flash_attn_3", "0.2.7", CURRENT)
    install(site, name, "0.2.0", MATCHERS, "Summary: Matchers for unittest\n")
    problem = only_problem(identify_mate())
    for part in (
        f"'{name}', version '0.2.0'",
        str(site / "mate" / "__init__.py"),
        f"pip uninstall {name}",
        "--no-deps",
    ):
        assert part in problem


def test_a_foreign_mate_with_the_vendors_words_is_refused(site: Path) -> None:
    """Metadata alone prove nothing: the attention interface has to be there."""
    install(site, "mate", "0.2.7", MATCHERS, VENDOR)
    install(site, "flash_attn_3", "0.2.7", CURRENT)
    assert "it has no 'mate.mha_interface'" in only_problem(identify_mate())


def test_a_module_of_that_name_is_refused(site: Path) -> None:
    """A single file cannot contain the interface, and belongs to nobody."""
    (site / "mate.py").write_text("")
    install(site, "flash_attn_3", "0.2.7", CURRENT)
    problem = only_problem(identify_mate())
    assert str(site / "mate.py") in problem
    assert "No installed distribution claims it" in problem


def test_nvidias_flash_attention_3_is_refused(site: Path) -> None:
    """It has the wrapper's distribution and module names, and calls its own kernels."""
    install(site, "mate", "0.2.2", MATE, VENDOR)
    install(site, "flash_attn_3", "3.0.0", NVIDIA)
    problem = only_problem(identify_mate())
    for part in ("imports 'mate'", "'flash_attn_3', version '3.0.0'", "pip uninstall flash_attn_3"):
        assert part in problem


def test_flash_attention_2_is_not_taken_for_the_wrapper(site: Path) -> None:
    """``flash_attn`` is the name of another library; without MATE in it, the wrapper is missing."""
    install(site, "mate", "0.2.2", MATE, VENDOR)
    install(site, "flash-attn", "2.8.0", FLASH_ATTENTION_2)
    identity = identify_mate()
    assert identity.wrapper is None
    assert "there is no module 'flash_attn_interface'" in only_problem(identity)


def test_flash_attention_2_may_be_beside_the_wrapper(site: Path) -> None:
    """It has another module name than the wrapper of MATE 0.2."""
    install_vendors(site)
    install(site, "flash-attn", "2.8.0", FLASH_ATTENTION_2)
    identity = identify_mate()
    assert identity.wrapper == "flash_attn_3"
    assert not identity.problems
    assert not identity.warnings


def test_a_wrapper_that_does_not_parse_is_refused(site: Path) -> None:
    """A module that cannot be read is not shown to be over MATE."""
    install_vendors(site)
    (site / "flash_attn_interface.py").write_text("print 'Python 2'\n")
    assert "is not Moore Threads' wrapper" in only_problem(identify_mate())


# What does not fit, and what is odd -------------------------------------------------------------


def test_a_mate_before_the_range_is_refused(site: Path) -> None:
    """MATE 0.1.0 has no scheduler metadata to ask for."""
    install(site, "mate", "0.1.0", MATE, VENDOR)
    install(site, "mate-flash-attention", "0.1.0", LEGACY)
    assert "0.1.3 or newer" in only_problem(identify_mate())


def test_the_old_wrapper_on_a_new_mate_is_refused(site: Path) -> None:
    """It passes an argument that MATE 0.2 does not have any more."""
    install(site, "mate", "0.2.2", MATE, VENDOR)
    install(site, "mate-flash-attention", "0.1.3", LEGACY)
    problem = only_problem(identify_mate())
    assert "pip uninstall mate-flash-attention" in problem
    assert "0.2.2" in problem


def test_the_new_wrapper_on_an_old_mate_is_refused(site: Path) -> None:
    """It passes arguments that MATE 0.1.3 does not have yet."""
    install_vendors(site, "0.1.3", wrapper="0.1.4")
    assert "MATE 0.2 or newer" in only_problem(identify_mate())


def test_a_newer_mate_is_mentioned(site: Path) -> None:
    """A release that nobody has read may work; the warning says what is known."""
    install_vendors(site, "0.3.0")
    assert "0.1.3 to 0.2.7" in only_warning(identify_mate())


def test_versions_that_differ_are_mentioned(site: Path) -> None:
    """The wrapper asks for the MATE it was released with; ``--no-deps`` lets another pass."""
    install_vendors(site, "0.2.2", wrapper="0.2.7+musa")
    warning = only_warning(identify_mate())
    assert "0.2.2" in warning
    assert "0.2.7+musa" in warning


def test_both_wrappers_are_mentioned(site: Path) -> None:
    """The new one is used, and the old one should go."""
    install_vendors(site)
    install(site, "mate-flash-attention", "0.1.3", LEGACY)
    identity = identify_mate()
    assert identity.wrapper == "flash_attn_3"
    assert "pip uninstall mate-flash-attention" in only_warning(identity)


def test_a_mate_on_a_search_path_is_mentioned(site: Path) -> None:
    """Without a distribution its version is unknown."""
    for path, text in {**MATE, **CURRENT}.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    importlib.invalidate_caches()
    identity = identify_mate()
    assert identity.version is None
    assert "No distribution says" in only_warning(identity)
