"""The pages of the project: links and names resolve, sizes hold, translations follow."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES
from tests.engine.test_engine_modes import NOT_ON_A_CPU

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md"))
)
TRANSLATED = sorted(name for name in PAGES if name.replace(".md", ".zh-CN.md") in PAGES)
USERS_PAGES = (
    "README.md",
    "docs/cluster.md",
    "docs/from-in-tree.md",
    "docs/installing.md",
    "docs/mate.md",
    "docs/limits.md",
    "docs/settings.md",
    "docs/status.md",
    "docs/troubleshooting.md",
    "docs/validation.md",
)
SETTINGS_PAGES = ("docs/settings.md", "docs/settings.zh-CN.md")
PLACEHOLDER = "NAME"
"""Stands in a page for the name of any command."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def translation(name: str) -> str:
    return name.replace(".md", ".zh-CN.md")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> list[str]:
    """The blocks of code of a page, without comments, which a translation translates."""
    blocks = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"(?:^|[ \t]+)#.*$", "", block, flags=re.MULTILINE) for block in blocks]


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", without_code(text), re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The fragments that the headings of a page can be linked by."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in words}


def table_rows(text: str) -> list[list[str]]:
    """Return what each row of a page's tables has in every language: code and marks."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"`[^`]+`|✓|–", row)) for row in rows]


# --- every page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Each relative link of a page names a file that is there, and its heading if it names one."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (fragment and fragment not in anchors(file.read_text())):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    """A path of the repository in a page is there, commands in its examples too."""
    paths = re.findall(
        r"(?<![\w/.:-])((?:tests|scripts|docs|sglang_musa_ext|\.ci)/[\w./*-]*\w)", read(name)
    )
    named = {path.partition(f"/{PLACEHOLDER}")[0] for path in paths}
    missing = {path for path in named if not list(ROOT.glob(path))}
    assert sorted(missing) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_speaks_of_nothing_private(name: str) -> None:
    """No path of one machine stands in a page."""
    assert re.findall(r"(?<![\w.])/(?:work|tmp/team|home)/\S*", read(name)) == []


# --- languages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USERS_PAGES)
def test_users_pages_have_a_translation(name: str) -> None:
    """Users can read in Chinese about the package."""
    assert name in TRANSLATED


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translation_has_the_same_parts(name: str) -> None:
    """Headings, examples and table rows are the same in both languages, in the same order."""
    original, translated = read(name), read(translation(name))
    assert headings(translated) == headings(original)
    assert code_blocks(translated) == code_blocks(original)
    assert table_rows(translated) == table_rows(original)


@pytest.mark.parametrize("name", TRANSLATED)
def test_languages_lead_to_each_other(name: str) -> None:
    """Each page links to its translation, and other translated pages in its own language."""
    base = Path(name).name
    assert f"({base})" in read(translation(name))
    assert f"({Path(translation(name)).name})" in read(name)
    english_links = re.findall(r"\]\(([^):]+\.md)\)", read(translation(name)))
    folder = Path(name).parent
    targets = {(folder / target).as_posix() for target in english_links} - {name}
    assert sorted(targets & set(TRANSLATED)) == []


# --- single pages ---------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    """At most 700 words in all, tables and examples included."""
    assert len(read("README.md").split()) <= 700


def test_the_readme_has_a_status_of_five_rows() -> None:
    """One for each place where something was checked, and one for speed."""
    status = read("README.md").partition("## Status")[2].partition("\n## ")[0]
    rows = [line for line in status.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    oldest, newest = SUPPORTED_RELEASES[0].version, SUPPORTED_RELEASES[-1].version
    assert f"{len(SUPPORTED_RELEASES)} SGLang releases from {oldest} to {newest}" in status


@pytest.mark.parametrize("name", SETTINGS_PAGES)
def test_every_variable_is_documented(name: str) -> None:
    """Each variable that the package reads has a row in the table of settings."""
    variables = {*envs.VARIABLES.values(), *envs.TOOL_VARIABLES}
    assert len(variables) >= 6
    page = read(name)
    assert [variable for variable in sorted(variables) if f"| `{variable}` |" not in page] == []


def test_the_status_says_what_no_engine_runs_on_a_cpu() -> None:
    """Cases that the engine's tests leave out stand there, with what covers them instead."""
    assert [what for what in NOT_ON_A_CPU if f"| {what} |" not in read("docs/status.md")] == []


def test_installing_names_the_pinned_versions() -> None:
    """The torch and the MATE of each set of packages that belong together stand in the table."""
    page = read("docs/installing.md")
    for path in ROOT.rglob("musa-torch*.txt"):
        cohort = path.stem.removeprefix("musa-")
        pins = dict(re.findall(r"^(torch|mate)==(\S+)$", path.read_text(), re.MULTILINE))
        (row,) = [line for line in page.splitlines() if f"--cohort {cohort}`" in line]
        assert all(version in row for version in pins.values()), (cohort, pins)


def test_the_changelog_has_an_entry_for_this_version() -> None:
    """A released version says what it changes for users."""
    version = re.search(
        r'^__version__ = "(.+)"$', read("sglang_musa_ext/__init__.py"), re.MULTILINE
    )
    assert version is not None
    assert re.search(rf"^## \[{re.escape(version[1])}\]", read("CHANGELOG.md"), re.MULTILINE)


def test_tracked_files_alone_are_pages() -> None:
    """The list of pages is that of the repository: nothing untracked hides a broken link."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no checkout")
    assert set(listed.stdout.split()) <= set(PAGES)


def test_the_design_has_a_row_for_each_layer() -> None:
    """Every folder and module of the package is explained, and nothing else is."""
    table = read("docs/design.md").partition("\n## Folders")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = {name.strip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    entries = [path for path in (ROOT / "sglang_musa_ext").iterdir() if path.name[0] != "."]
    folders = {path.name for path in entries if list(path.glob("*.py"))}
    modules = {path.stem for path in entries if path.suffix == ".py"}
    assert explained == folders | modules


@pytest.mark.parametrize("name", PAGES)
def test_tests_that_a_page_names_exist(name: str) -> None:
    """A page that points at a test by name points at one that is there."""
    named = set(re.findall(r"`(test_\w+)", read(name)))
    defined = {
        test
        for path in (ROOT / "tests").rglob("test_*.py")
        for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert sorted(named - defined) == []
