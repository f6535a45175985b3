"""Tests of scripts/matrix: expectations, resuming, tables, statuses; levels are fake."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from scripts.lib.matrix import __main__ as matrix
from scripts.lib.matrix import levels as matrix_levels
from scripts.lib.matrix.data import (
    LEVELS,
    CellStatus,
    ExpectedFailure,
    LevelResult,
    MatrixError,
    MatrixRow,
    judge,
    read_rows,
    select_levels,
    select_rows,
    split_by_python,
)
from scripts.lib.matrix.report import (
    Cell,
    Page,
    closing_line,
    details,
    markdown,
    terminal_table,
)
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES

ALL_PASS = dict.fromkeys(("contract", "backend", "engine", "musa", "limits"), "pass")
EXCEPTION = ExpectedFailure("backend", "test_old", "It cannot.")
GOOD = LevelResult(["test_new"])

ROW = """
[[release]]
version = "{version}"
contract = "pass"
backend = "{backend}"
engine = "pass"
musa = "pass"
limits = "pass"
exceptions = [{exceptions}]
"""


def release(*exceptions: ExpectedFailure, version: str = "0.5.21", **expected: str) -> MatrixRow:
    """A row of the matrix."""
    return MatrixRow(version, ">=3.10", "2.13.0", ALL_PASS | expected, exceptions)


# --- expectations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exceptions", "run", "status", "problem"),
    [
        pytest.param([], GOOD, CellStatus.PASS, None, id="all pass"),
        pytest.param(
            [],
            LevelResult(["a"], skipped={"b": "not here"}),
            CellStatus.PASS,
            None,
            id="not applicable",
        ),
        pytest.param(
            [],
            LevelResult(["a"], {"test_old": "no"}),
            CellStatus.FAIL,
            "test_old: no",
            id="a failure",
        ),
        pytest.param(
            [], LevelResult(["a"], error="died"), CellStatus.FAIL, "died", id="broken off"
        ),
        pytest.param(
            [],
            LevelResult(skipped={"a": "x"}),
            CellStatus.FAIL,
            "nothing was checked",
            id="all skipped",
        ),
        pytest.param(
            [EXCEPTION],
            LevelResult(["a"], {"test_old": "no"}),
            CellStatus.PASS,
            None,
            id="as excepted",
        ),
        pytest.param(
            [EXCEPTION],
            LevelResult(["a"], {"test_old[x]": "no"}),
            CellStatus.PASS,
            None,
            id="parameters are covered",
        ),
        pytest.param(
            [EXCEPTION],
            LevelResult(["a"], {"test_older": "no"}),
            CellStatus.FAIL,
            "test_older: no",
            id="names are whole",
        ),
        pytest.param(
            [EXCEPTION],
            LevelResult(["test_old"]),
            CellStatus.FAIL,
            "that row can go",
            id="excepted, but passes",
        ),
        pytest.param(
            [EXCEPTION],
            LevelResult(["test_old[x]"], {"test_old[y]": "no"}),
            CellStatus.FAIL,
            r"test_old\[x\] passes",
            id="half passes",
        ),
        pytest.param(
            [EXCEPTION],
            GOOD,
            CellStatus.FAIL,
            "no case that ran is called",
            id="excepted, but unknown",
        ),
        pytest.param(
            [EXCEPTION],
            LevelResult(["a"], skipped={"test_old": "x"}),
            CellStatus.FAIL,
            "can go",
            id="excepted, but skipped",
        ),
    ],
)
def test_a_run_is_judged_by_what_is_expected(
    exceptions: list[ExpectedFailure], run: LevelResult, status: CellStatus, problem: str | None
) -> None:
    """Unexpected failures and passes are problems, and so is a level that checked nothing."""
    verdict = judge(release(*exceptions), "backend", run)
    assert verdict.status is status
    assert verdict.as_expected is (status is CellStatus.PASS)
    assert (
        verdict.problems == ()
        if problem is None
        else re.search(problem, " ".join(verdict.problems))
    )
    assert list(verdict.excepted) == [
        exception for exception in exceptions if any(map(exception.covers, run.failed))
    ]


def test_an_exception_is_of_its_level_alone() -> None:
    """A case that is excepted at the backend level is none of the engine's."""
    assert (
        judge(release(EXCEPTION), "engine", LevelResult(["a"], {"test_old": "no"})).status
        is CellStatus.FAIL
    )


def test_nothing_is_claimed_where_a_level_is_pending() -> None:
    """A pending level shows what is wrong, and breaks no expectation."""
    verdict = judge(release(backend="pending"), "backend", LevelResult(["a"], {"test_old": "no"}))
    assert (verdict.status, verdict.as_expected, len(verdict.problems)) == (
        CellStatus.PENDING,
        True,
        1,
    )


# --- parsing --------------------------------------------------------------------------------------


def test_releases_are_read(tmp_path: Path) -> None:
    """Every field of a row arrives, its exceptions too."""
    exceptions = '{ level = "backend", case = "test_old", reason = "It cannot." }'
    path = tmp_path / "releases.toml"
    path.write_text(ROW.format(version="0.5.21", backend="pending", exceptions=exceptions))
    assert read_rows(path) == [release(EXCEPTION, backend="pending")]


@pytest.mark.parametrize(
    ("backend", "exceptions", "message"),
    [
        ("passes", "", "backend of 0.5.21 is 'passes'; expected 'pass' or 'pending'"),
        ("pass", '{ level = "egine", case = "a", reason = "b" }', "0.5.21 excepts level 'egine'"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, backend: str, exceptions: str, message: str) -> None:
    """A value that a row cannot have is named, with the choices."""
    path = tmp_path / "releases.toml"
    path.write_text(ROW.format(version="0.5.21", backend=backend, exceptions=exceptions))
    with pytest.raises(MatrixError, match=message):
        read_rows(path)


def test_a_release_that_the_package_does_not_name_is_refused(tmp_path: Path) -> None:
    """Version, Python and PyTorch of a release stand in the package, and nowhere else."""
    path = tmp_path / "releases.toml"
    path.write_text(ROW.format(version="0.5.99", backend="pass", exceptions=""))
    with pytest.raises(MatrixError, match=r"0\.5\.99 is no release of sglang_musa_ext"):
        read_rows(path)


def test_releases_and_levels_are_selected() -> None:
    """Lists keep the matrix's order, know its ends, and mean everything when they are empty."""
    rows = [release(version=version) for version in ("0.5.11", "0.5.17", "0.5.21")]
    chosen = [row.version for row in select_rows(rows, "newest, 0.5.17")]
    assert (chosen, select_rows(rows, ""), select_rows(rows, "oldest")) == (
        ["0.5.17", "0.5.21"],
        rows,
        rows[:1],
    )
    assert select_levels("engine,contract") == ["contract", "engine"]
    assert select_levels("") == list(ALL_PASS)


def test_releases_for_another_python_are_left_out() -> None:
    """SGLang's own metadata decides about Pythons, not a list here."""
    old, new = release(), replace(release(version="0.5.22"), requires_python=">=3.11")
    assert split_by_python([old, new], "3.10.14") == ([old], [new])
    assert split_by_python([old, new], "3.12.0") == ([old, new], [])


@pytest.mark.parametrize(
    ("choose", "wrong"), [(lambda x: select_rows([release()], x), "0.4"), (select_levels, "kernel")]
)
def test_unknown_names_are_refused(choose: Callable[[str], Any], wrong: str) -> None:
    """The message names what is unknown."""
    with pytest.raises(MatrixError, match=f"No such .*: {wrong}"):
        choose(wrong)


def test_a_report_of_pytest_is_read() -> None:
    """Passes, failures, errors and skips differ; a test whose teardown fails did not pass."""
    run = matrix_levels.parse_report(
        """<testsuites><testsuite>
        <testcase name="good"/>
        <testcase name="bad[1]"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
        <testcase name="broken"><error message="boom"/></testcase>
        <testcase name="other"><skipped message="not in this SGLang"/></testcase>
        <testcase name="late"/>
        <testcase name="late"><error message="teardown"/></testcase>
        </testsuite></testsuites>"""
    )
    assert run.passed == ["good"]
    assert run.failed == {"bad[1]": "assert 1 == 2", "broken": "boom", "late": "teardown"}
    assert run.skipped == {"other": "not in this SGLang"}


# --- running --------------------------------------------------------------------------------------


@dataclass
class FakeMatrix:
    """The command with fake levels, in a directory of its own."""

    directory: Path
    runs: dict[tuple[str, str], LevelResult] = field(default_factory=dict)
    """The results of cells; all others pass."""
    ran: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, *arguments: str) -> int:
        self.ran.clear()
        return matrix.main([*arguments, "--jobs", "1"])

    def run_level(self, row: MatrixRow, level: str, _sources: Path, _logs: Path) -> LevelResult:
        self.ran.append((row.version, level))
        run = self.runs.get((row.version, level), GOOD)
        if run.error == "interrupt":
            raise KeyboardInterrupt
        return run


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMatrix:
    """A matrix of two releases."""
    made = FakeMatrix(tmp_path)
    releases = tmp_path / "releases.toml"
    releases.write_text(
        "".join(ROW.format(version=v, backend="pass", exceptions="") for v in ("0.5.20", "0.5.21"))
    )
    monkeypatch.setattr(matrix, "RELEASES", releases)
    monkeypatch.setattr(matrix, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(matrix, "DOCS", tmp_path / "releases.md")
    monkeypatch.setattr(matrix, "sources_of", lambda version: tmp_path / version)
    monkeypatch.setattr(matrix, "run_level", made.run_level)
    monkeypatch.setattr(matrix, "fingerprint", lambda level: f"sources of {level}")
    return made


CELLS = [(version, level) for level in ALL_PASS for version in ("0.5.20", "0.5.21")]


def test_every_cell_runs_once(fake: FakeMatrix, capsys: pytest.CaptureFixture[str]) -> None:
    """All levels of all releases run; each has its line; the last line counts them."""
    assert fake() == 0
    assert sorted(fake.ran) == sorted(CELLS)
    lines = capsys.readouterr().out.splitlines()
    # Cells that run beside each other end in any order.
    pattern = r"\[ ?(\d+)/10\] (\S+) (\w+): pass \(1 passed\), 0 s"
    shown = [re.fullmatch(pattern, line) for line in lines[: len(CELLS)]]
    assert [line and int(line[1]) for line in shown] == list(range(1, 11))
    assert sorted(line.group(2, 3) for line in shown if line) == sorted(CELLS)
    assert lines[-1].startswith("matrix: 10 passed in ")


def test_a_second_run_repeats_nothing_unless_told_to(fake: FakeMatrix) -> None:
    """Results of the same sources are kept; --fresh and other sources run everything again."""
    fake()
    assert fake() == 0
    assert fake.ran == []
    assert fake("--fresh") == 0
    assert sorted(fake.ran) == sorted(CELLS)


def test_changed_sources_run_again(fake: FakeMatrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is one of the sources it was found with; the other levels' results still hold."""
    fake()
    monkeypatch.setattr(
        matrix,
        "fingerprint",
        lambda level: "changed" if level == "engine" else f"sources of {level}",
    )
    fake()
    assert sorted(fake.ran) == [("0.5.20", "engine"), ("0.5.21", "engine")]


def test_an_interrupted_run_goes_on_where_it_was(
    fake: FakeMatrix, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished results are kept, and what was interrupted is run."""
    fake.runs["0.5.20", "backend"] = LevelResult(error="interrupt")
    with pytest.raises(KeyboardInterrupt):
        fake()
    # Cells run beside each other, so how many of the others came before the interrupt is not given.
    finished = set(re.findall(r"\] (\S+) (\w+): pass", capsys.readouterr().out))
    fake.runs.clear()
    assert fake() == 0
    assert ("0.5.20", "backend") in fake.ran
    assert not finished & set(fake.ran)


def test_a_failure_is_shown_and_run_again(
    fake: FakeMatrix, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status says that an expectation broke; the next run tries that cell alone."""
    fake.runs["0.5.21", "engine"] = LevelResult(["a"], {"test_tokens": "other tokens"})
    assert fake() == 1
    out = capsys.readouterr().out
    assert "FAIL 0.5.21 engine: test_tokens: other tokens" in out
    assert out.splitlines()[-1].startswith("matrix: 1 failed, 9 passed in ")
    fake()
    assert sorted(fake.ran) == [("0.5.21", "engine")]


def test_an_unreadable_result_is_run_again(fake: FakeMatrix) -> None:
    """A result file that was cut short, or comes from another version, is no result."""
    fake()
    (fake.directory / "cache" / "results" / "0.5.20-contract.json").write_text(
        '{"run": {"surprise": 1}}'
    )
    assert fake() == 0
    assert sorted(fake.ran) == [("0.5.20", "contract")]


def test_a_selection_runs_alone(fake: FakeMatrix) -> None:
    """--releases and --level leave the rest out."""
    assert fake("--releases", "newest", "--level", "backend") == 0
    assert sorted(fake.ran) == [("0.5.21", "backend")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--releases", "0.4.0"], "No such release: 0.4.0"),
        (["--level", "kernels"], "No such level: kernels"),
        (["--write-docs", "--releases", "newest"], "--write-docs needs all releases"),
    ],
)
def test_what_cannot_be_run_has_a_status_of_its_own(
    fake: FakeMatrix, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """A mistake of the command line is neither a pass nor a failure of the matrix."""
    assert fake(*arguments) == 2
    assert message in capsys.readouterr().err
    assert fake.ran == []


def test_results_are_written_as_json_and_docs(fake: FakeMatrix) -> None:
    """matrix.json holds every cell; docs/releases.md a row for each release."""
    fake.runs["0.5.20", "engine"] = LevelResult(["a"], skipped={"test_new": "this SGLang has none"})
    assert fake("--write-docs") == 0
    cell = json.loads((fake.directory / "cache" / "matrix.json").read_text())["releases"]["0.5.20"][
        "engine"
    ]
    assert (cell["status"], cell["passed"], cell["not applicable"]) == (
        "pass",
        1,
        {"test_new": "this SGLang has none"},
    )
    page = (fake.directory / "releases.md").read_text()
    cells = [
        "pass (1 passed)",
        "pass (1 passed)",
        "pass (1 passed, 1 not applicable)",
        "pass (1 passed)",
        "pass (1 passed)",
    ]
    row = f"| 0.5.20 | >=3.10 | 2.13.0 | {' | '.join(cells)} |"
    assert row in page.splitlines()


def test_a_fingerprint_is_of_its_levels_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package and test helpers belong to every level, a test to the levels that run it."""
    monkeypatch.setattr(matrix_levels, "ROOT", tmp_path)
    files = [
        "sglang_musa_ext/envs.py",
        "tests/support/backend.py",
        "tests/attention/test_graphs.py",
        "tests/test_envs.py",
    ]
    changes = {}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in files:
        before = [matrix_levels.fingerprint(level) for level in ("backend", "engine")]
        (tmp_path / name).write_text("changed")
        after = [matrix_levels.fingerprint(level) for level in ("backend", "engine")]
        changes[name] = [old != new for old, new in zip(before, after, strict=True)]
    assert changes == dict(
        zip(files, [[True, True], [True, True], [True, False], [False, False]], strict=True)
    )


# --- tables ---------------------------------------------------------------------------------------


def table_with_an_exception() -> dict[str, dict[str, Cell]]:
    """One release, one level, one exception."""
    row, run = release(EXCEPTION), LevelResult(["a", "b"], {"test_old": "no"})
    return {"0.5.21": {"backend": Cell(row, "backend", run, judge(row, "backend", run))}}


def test_exceptions_are_shown_with_their_reasons() -> None:
    """In the terminal and in the docs alike."""
    table = table_with_an_exception()
    assert terminal_table(table, ["backend"])[-1] == "0.5.21 | pass (2 passed, 1 excepted)"
    assert details(table) == ["excepted 0.5.21 backend: test_old: It cannot."]
    others = Page("Python 3.11", {("0.5.21", level): "pass" for level in LEVELS})
    page = markdown(table, {"Python": "3.11"}, others)
    assert "* backend, 0.5.21: `test_old`. It cannot." in page.splitlines()
    assert closing_line(table, 61.2) == "matrix: 1 passed in 61s"


def test_some_levels_leave_the_others_of_the_page(fake: FakeMatrix) -> None:
    """--write-docs with --level replaces those columns and their exceptions, and keeps the rest."""
    page = fake.directory / "releases.md"
    fake.runs["0.5.20", "engine"] = LevelResult(["a", "b"])
    assert fake("--write-docs") == 0
    before = page.read_text()
    kept = before + "\n* engine, 0.5.20: `test_old`. Kept.\n* musa, 0.5.20: `test_old`. Gone.\n"
    page.write_text(kept)
    fake.runs["0.5.20", "musa"] = LevelResult(["a", "b", "c"])
    assert fake("--write-docs", "--fresh", "--level", "musa") == 0
    passed = "pass (1 passed)"
    cells = [passed, passed, "pass (2 passed)", "pass (3 passed)", passed]
    assert f"| 0.5.20 | >=3.10 | 2.13.0 | {' | '.join(cells)} |" in page.read_text().splitlines()
    exceptions = [line for line in page.read_text().splitlines() if "test_old" in line]
    assert exceptions == ["* engine, 0.5.20: `test_old`. Kept."]


def test_levels_that_are_nowhere_are_asked_for(
    fake: FakeMatrix, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page without the other levels, or with those of another environment, is not written."""
    assert fake("--write-docs", "--level", "contract") == 2
    assert "leave --level out" in capsys.readouterr().err.lower()
    assert not (fake.directory / "releases.md").exists()


def test_the_docs_state_the_releases_of_this_package(repository: Path) -> None:
    """docs/releases.md has a row for each supported release, with what is expected of it."""
    lines = (repository / "docs" / "releases.md").read_text().splitlines()
    cells = [page_cells(line) for line in lines]
    (levels,) = [row[3:] for row in cells if row[0] == "SGLang"]
    expected = {row.version: row.expected for row in read_rows(matrix.RELEASES)}
    assert levels == list(ALL_PASS)
    rows = {row[0]: row[1:] for row in cells if row[0].startswith("0.")}
    assert list(rows) == [release.version for release in SUPPORTED_RELEASES]
    for release in SUPPORTED_RELEASES:
        claims = [expected[release.version][level] for level in levels]
        assert rows[release.version] == [release.requires_python, release.torch, *claims]


def page_cells(line: str) -> list[str]:
    """Return the cells of a table's row, without the counts in parentheses."""
    return [cell.strip().partition(" (")[0] for cell in line.strip("|").split("|")]


# --- sources --------------------------------------------------------------------------------------


def test_a_release_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel goes, with its folder; its contents stay, and serve the next time."""
    downloads = []

    def download(version: str, directory: Path) -> Path:
        downloads.append(version)
        with zipfile.ZipFile(directory / "sglang.whl", "w") as archive:
            archive.writestr("sglang/__init__.py", "")
        return directory / "sglang.whl"

    monkeypatch.setattr(matrix_levels, "_download", download)
    for _ in range(2):
        assert matrix_levels.fetch("0.5.21", tmp_path) == tmp_path / "0.5.21"
    assert (tmp_path / "0.5.21" / "sglang" / "__init__.py").is_file()
    assert (downloads, [path.name for path in tmp_path.iterdir()]) == (["0.5.21"], ["0.5.21"])


def test_what_a_release_compiles_to_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level's tests import the release, and leave its bytecode for the next process, also where
    the environment says that none is to be written.
    """
    sources = tmp_path / "release"
    sources.mkdir()
    (sources / "unpacked.py").write_text("")
    (tmp_path / "test_level.py").write_text("import unpacked\ndef test_nothing(): pass\n")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(matrix_levels, "TESTS", {"backend": [str(tmp_path / "test_level.py")]})
    result = matrix_levels._run_tests(release(), "backend", sources, tmp_path / "logs")
    assert (result.error, len(result.passed)) == ("", 1)
    assert [path.name.partition(".")[0] for path in sources.rglob("*.pyc")] == ["unpacked"]


def test_a_release_without_a_lock_is_refused(tmp_path: Path) -> None:
    """Nothing is downloaded whose digest is not known; the message says which command adds it."""
    with pytest.raises(MatrixError, match=r"sglang==9\.9\.9 .* scripts/locks"):
        matrix_levels.fetch("9.9.9", tmp_path)


def test_the_tests_of_each_level_exist() -> None:
    """A test file that was moved or split would leave its level empty."""
    root = Path(matrix_levels.__file__).parents[3]
    paths = [name for tests in matrix_levels.TESTS.values() for name in tests if "/" in name]
    assert len(paths) >= 4
    assert [name for name in paths if not (root / name.partition("::")[0]).exists()] == []
    single = [name.partition("[")[0].split("::") for name in paths if "::" in name]
    assert [test for file, test in single if f"def {test}(" not in (root / file).read_text()] == []
