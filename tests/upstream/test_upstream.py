"""The upstream contract against the installed SGLang, edited copies, and all releases.

The tests over all releases read sources only. They look for ``<version>/sglang`` below the
directory that ``SGLANG_RELEASES`` names, and are skipped for the releases that are not there.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_musa_ext
from scripts.lib.matrix.data import LEVELS, read_toml
from sglang_musa_ext.upstream import releases, source
from sglang_musa_ext.upstream.allowances import ALLOWANCES
from sglang_musa_ext.upstream.check import (
    SERVING,
    UpstreamContractError,
    check_rows,
    check_upstream,
    find_package,
    read_version,
    require_upstream,
)
from sglang_musa_ext.upstream.needs import NEEDS
from sglang_musa_ext.upstream.releases import (
    SUPPORTED_RELEASES,
    Standing,
    UpstreamVersionError,
    classify_version,
    version_key,
)
from sglang_musa_ext.upstream.requirement import NONE_KNOWN, Requirement
from sglang_musa_ext.upstream.rows import REQUIREMENTS
from sglang_musa_ext.upstream.rows.passes import PASS_METHODS
from sglang_musa_ext.upstream.source import SourceTree, collector_paused
from tests.support.releases import require_release

PACKAGE = Path(sglang_musa_ext.__file__).parent
RELEASES: list[dict[str, Any]] = read_toml(Path(__file__).parents[1] / "releases.toml")["release"]
VERSIONS = [row["version"] for row in RELEASES]

FA = "sglang.srt.layers.attention.flashattention_backend"
BACKEND = f"{FA}.FlashAttentionBackend"
REGISTRY = "sglang.srt.layers.attention.attention_registry"


def row_id(row: Requirement) -> str:
    """A row's name in the test report."""
    return f"{row.kind}-{row.symbol.rpartition('.')[2]}-{row.since or ''}-{row.until or ''}"


# --- the installed SGLang and edited copies of it -------------------------------------------------


@pytest.fixture(scope="session")
def installed() -> Path:
    """The package directory of the installed SGLang."""
    package = find_package()
    if package is None:
        pytest.skip("SGLang is not installed")
    return package


@pytest.fixture(scope="module")
def parsed_once() -> Iterator[None]:
    """Parse each text once for the tests that edit a copy: an edit leaves most files as they are.

    There is no garbage collection meanwhile, which would look at all that is kept each time.
    """
    with pytest.MonkeyPatch.context() as patch, collector_paused():
        patch.setattr(source, "_syntax_tree", functools.cache(source._syntax_tree))
        yield


@pytest.fixture
def copy(installed: Path, tmp_path: Path, parsed_once: None) -> SourceCopy:
    """A copy, to be edited, of the installed SGLang's files that the contract reads."""
    modules = {row.module for row in REQUIREMENTS}
    modules.update(name for row in REQUIREMENTS for name in constructors(row))
    for module in modules:
        for relative in (
            module.replace(".", "/") + ".py",
            module.replace(".", "/") + "/__init__.py",
        ):
            original = installed.parent / relative
            if original.is_file():
                target = tmp_path / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(original.read_bytes())
    return SourceCopy(tmp_path, read_version(installed))


def constructors(row: Requirement) -> tuple[str, ...]:
    """The modules that a row of kind ``constructors`` names."""
    return row.parameters if row.kind == "constructors" else ()


class SourceCopy:
    """Some files of a SGLang of the given version, below ``root``."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version

    def path(self, module: str) -> Path:
        """The file of ``module``."""
        plain = self.root / (module.replace(".", "/") + ".py")
        return plain if plain.is_file() else plain.with_suffix("") / "__init__.py"

    def edit(self, module: str, pattern: str, replacement: str, count: int = 1) -> None:
        """Replace ``pattern``, which must be there, so that no edit silently tests nothing."""
        path = self.path(module)
        text, made = re.subn(pattern, replacement, path.read_text(), count=count)
        assert made, f"{pattern!r} is not in {module}"
        path.write_text(text)

    def check(self) -> list[tuple[str, str]]:
        """Symbol and kind of each violation."""
        violations = check_upstream(self.root, self.version)
        return [(each.requirement.symbol, each.requirement.kind) for each in violations]


def test_installed_sglang_keeps_the_contract() -> None:
    """The SGLang of this environment has every symbol the package touches."""
    if find_package() is None:
        pytest.skip("SGLang is not installed")
    require_upstream()


def test_unedited_copy_keeps_the_contract(copy: SourceCopy) -> None:
    """The copies that the next tests edit start without violations."""
    assert copy.check() == []


def added_method(text: str) -> tuple[str, str, str]:
    """The edit that adds a method to upstream's backend class."""
    line = "class FlashAttentionBackend(AttentionBackend):\n"
    return (FA, re.escape(line), line + text)


EDITS = {
    "keyword added to a call": (
        (FA, r"ver=self\.fa_impl_ver,", "ver=self.fa_impl_ver, brand_new=1,"),
        (BACKEND, "kernel_keywords"),
        "also brand_new",
    ),
    "keyword added to kwargs": (
        (FA, r'kwargs\["sinks"\] = sinks', 'kwargs["brand_new"] = sinks'),
        (BACKEND, "kernel_keywords"),
        "also brand_new",
    ),
    "keywords that cannot be followed": (
        (FA, r"ver=self\.fa_impl_ver,", "ver=self.fa_impl_ver, **self.more(),"),
        (BACKEND, "kernel_keywords"),
        r"also \*\*self.more\(\)",
    ),
    "positional argument": (
        (FA, r"= flash_attn_with_kvcache\(", "= flash_attn_with_kvcache(layer,"),
        (BACKEND, "kernel_keywords"),
        "also 1 positional arguments",
    ),
    "kernel of another name": (
        (FA, r"= flash_attn_with_kvcache\(", "= another_kernel("),
        (BACKEND, "kernel_calls"),
        "also forward_extend: another_kernel",
    ),
    "kernel called outside the forwards": (
        added_method(
            "    def forward_new(self, q, k, v):\n        flash_attn_varlen_func(q=q, k=k, v=v)\n"
        ),
        (BACKEND, "kernel_calls"),
        "also forward_new: flash_attn_varlen_func",
    ),
    "constructor parameter renamed": (
        (FA, r"\bspeculative_step_id=0,", "step_id=0,"),
        (f"{BACKEND}.__init__", "method"),
        "skip_prefill, step_id, topk",
    ),
    "forward parameter renamed": (
        (FA, r"(def forward_decode\(\s+self,\s+)q:", r"\1query:"),
        (f"{BACKEND}.forward_decode", "method"),
        r"\(self, query, k, v",
    ),
    "method that assigns forward_metadata": (
        added_method("    def refresh(self):\n        self.forward_metadata = None\n"),
        (BACKEND, "metadata_writers"),
        "also refresh",
    ),
    "public caller of a private writer": (
        added_method(
            "    def go(self):\n        self._set()\n\n    def _set(self):\n        "
            "self.forward_metadata = 0\n"
        ),
        (BACKEND, "metadata_writers"),
        "also go$",
    ),
    "private writer that nobody calls": (
        added_method("    def _set(self):\n        self.forward_metadata = None\n"),
        (BACKEND, "metadata_writers"),
        "also _set",
    ),
    "registry entry missing": (
        (REGISTRY, r'@register_attention_backend\("fa3"\)', '@register_attention_backend("fa5")'),
        (REGISTRY + ".register_attention_backend", "registered"),
        "the entries .*fa5",
    ),
    "registry dictionary renamed": (
        (REGISTRY, r"(?m)^ATTENTION_BACKENDS\b", "BACKENDS"),
        (REGISTRY + ".ATTENTION_BACKENDS", "module_global"),
        "no ATTENTION_BACKENDS",
    ),
    "base class changed": (
        (
            FA,
            r"class FlashAttentionBackend\(AttentionBackend\)",
            "class FlashAttentionBackend(NewBase)",
        ),
        (BACKEND, "class"),
        "the bases NewBase",
    ),
    "model without head dimensions": (
        ("sglang.srt.configs.model_config", r"self\.swa_v_head_dim", "self.window_v_head_dim", 0),
        ("sglang.srt.configs.model_config.ModelConfig", "assigned"),
        "no swa_v_head_dim set by",
    ),
    "instance attribute gone": (
        (FA, r"self\.page_size = model_runner", "self.page_length = model_runner"),
        (f"{BACKEND}.page_size", "attribute"),
        "no page_size set by",
    ),
    "queries used in a new way": (
        (FA, r"(?m)^        metadata = self\.forward_metadata$", "        metadata = adjusted(q)"),
        (BACKEND, "query_uses"),
        r"also adjusted\(q\)",
    ),
    "name that the stand-in for sgl_kernel lacks": (
        (
            FA,
            r"from sgl_kernel\.flash_attn import \(",
            "from sgl_kernel.flash_attn import (brand_new,",
        ),
        (f"{FA}.sgl_kernel.flash_attn", "imports_from"),
        "also brand_new",
    ),
    "draft children no longer built through the global": (
        (FA, r"(attn_backends\.append\(\s+)FlashAttentionBackend\(", r"\1self.child_class("),
        (f"{FA}.FlashAttentionMultiStepBackend.__init__", "calls"),
        "no call of FlashAttentionBackend",
    ),
    "class name missing from DFlash's list": (
        ("sglang.srt.speculative.dflash_utils", r'"FlashAttentionBackend",', ""),
        ("sglang.srt.speculative.dflash_utils._DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS", "strings"),
        "the strings .*TritonAttnBackend",
    ),
    "vision repaired upstream": (
        (
            "sglang.srt.layers.attention.vision",
            r"(?m)^class VisionFlash3",
            "flash_attn_func = 0\n\n\nclass VisionFlash3",
        ),
        ("sglang.srt.layers.attention.vision.flash_attn_func", "bound_only_under"),
        "a binding of flash_attn_func elsewhere too",
    ),
}


@pytest.mark.parametrize(("edit", "expected", "seen"), EDITS.values(), ids=EDITS)
def test_one_upstream_change_is_one_violation(
    copy: SourceCopy, edit: tuple[str, str, str], expected: tuple[str, str], seen: str
) -> None:
    """Each kind of upstream change is one violation, which says what the source has."""
    copy.edit(*edit)
    (violation,) = check_upstream(copy.root, copy.version)
    assert (violation.requirement.symbol, violation.requirement.kind) == expected
    assert re.search(seen, violation.seen)


def test_kernel_imported_inside_a_forward_is_a_violation(copy: SourceCopy) -> None:
    """A local import that shadows the kernel's global name is reported as import and as call."""
    local = "        from elsewhere import flash_attn_with_kvcache\n        kwargs = {}\n"
    copy.edit(FA, r"        kwargs = \{\}\n", local)
    seen = {
        violation.requirement.kind: violation.seen
        for violation in check_upstream(copy.root, copy.version)
    }
    assert seen == {
        "kernel_calls": "also forward_extend: flash_attn_with_kvcache (a local name)",
        "forward_imports": "also forward_extend: elsewhere.flash_attn_with_kvcache",
    }


def test_new_place_that_constructs_the_backend_is_a_violation(copy: SourceCopy) -> None:
    """A module that builds FlashAttentionBackend past the known selection points is named."""
    (copy.root / "sglang/srt/new.py").write_text("backend = FlashAttentionBackend(runner)\n")
    (violation,) = check_upstream(copy.root, copy.version)
    assert violation.seen == "also sglang.srt.new"


def test_mention_of_the_backend_is_no_construction(copy: SourceCopy) -> None:
    """Comments and subclasses do not count as constructing the backend."""
    (copy.root / "sglang/srt/new.py").write_text(
        "# FlashAttentionBackend(runner)\nMyFlashAttentionBackend(1)\n"
    )
    assert copy.check() == []


def test_renamed_kernel_is_reported_everywhere_at_once(copy: SourceCopy) -> None:
    """One renamed kernel breaks four rows, and one error carries them all, each with both sides."""
    copy.edit(FA, r"\bflash_attn_with_kvcache\b", "fa_with_kvcache", count=0)
    with pytest.raises(UpstreamContractError) as caught:
        require_upstream(copy.root, copy.version)
    seen = {
        (violation.requirement.symbol, violation.requirement.kind)
        for violation in caught.value.violations
    }
    assert seen == {
        (f"{FA}.flash_attn_with_kvcache", "module_global"),
        (BACKEND, "kernel_calls"),
        (f"{FA}.sgl_kernel.flash_attn", "imports_from"),
        (f"{BACKEND}.flash_attn_with_kvcache", "attribute"),
    }
    for violation in caught.value.violations:
        assert violation.requirement.symbol in str(caught.value)
        assert violation.seen in str(caught.value)
    assert "SGLANG_MUSA_EXT=off" in str(caught.value)


def test_missing_module_violates_each_of_its_rows(copy: SourceCopy) -> None:
    """A module that is gone is named by every row about it."""
    copy.path(REGISTRY).unlink()
    violations = [
        v for v in check_upstream(copy.root, copy.version) if v.requirement.kind != "constructors"
    ]
    assert {violation.requirement.symbol for violation in violations} == {
        f"{REGISTRY}.ATTENTION_BACKENDS",
        f"{REGISTRY}.register_attention_backend",
    }
    assert {violation.seen for violation in violations} == {f"no module {REGISTRY}"}


def test_unparsable_module_is_a_violation(copy: SourceCopy) -> None:
    """Syntax that this Python cannot read is a violation, not a crash."""
    copy.path(REGISTRY).write_text("def (:\n")
    assert {v.seen.partition("(")[0] for v in check_upstream(copy.root, copy.version)} == {
        f"a module {REGISTRY} that this Python cannot parse "
    }


def test_draft_class_imported_from_elsewhere_violates_both_rows(copy: SourceCopy) -> None:
    """A factory of another class lacks the one needed and has one that is not provided."""
    copy.edit(
        "sglang.srt.speculative.draft_utils", r"MusaFlashAttentionBackend as", "MusaBackend as"
    )
    seen = {
        violation.requirement.kind: violation.seen
        for violation in check_upstream(copy.root, copy.version)
    }
    assert seen.keys() == {"imports", "imports_from"}
    assert re.search("no import of .*MusaFlashAttentionBackend", seen["imports"])
    assert seen["imports_from"] == "also MusaBackend"


@pytest.mark.parametrize("enabled", [True, False])
def test_reading_leaves_the_collector_as_it_was(enabled: bool) -> None:
    """The garbage collector rests while sources are read; a failure does not leave it resting."""
    with collector_paused():
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(UpstreamVersionError), collector_paused():
            assert not gc.isenabled()
            raise UpstreamVersionError("none")
        assert gc.isenabled() is enabled
        gc.enable()


def test_rows_of_other_users_are_left_out(copy: SourceCopy) -> None:
    """A broken row of the CPU platform does not stop a server that does not use it."""
    copy.edit("sglang.srt.platforms.interface", r"def get_default_attention_backend", "def gone")
    assert require_upstream(copy.root, copy.version).standing is Standing.TESTED
    assert len(check_upstream(copy.root, copy.version, used_by=("cpu",))) == 1


# --- finding SGLang and its version ---------------------------------------------------------------


def test_newer_sglang_runs_with_a_warning(
    copy: SourceCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer release that meets the contract is taken; the warning names the range."""
    monkeypatch.setattr(releases, "NEWEST", releases.OLDEST)
    support = require_upstream(copy.root, copy.version)
    assert support.standing is Standing.NEWER
    assert f"{releases.OLDEST} to {releases.OLDEST}" in support.message


def test_missing_sglang_is_a_violation(tmp_path: Path) -> None:
    """A directory without SGLang says so."""
    (violation,) = check_upstream(tmp_path)
    assert violation.seen == f"no package sglang below {tmp_path}"


def test_uninstalled_sglang_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without SGLang says so."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UpstreamContractError, match="no package sglang in this environment"):
        require_upstream()


def test_old_sglang_is_refused_by_its_version_alone(tmp_path: Path) -> None:
    """A SGLang without plugin support gets one violation that names both versions."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "_version.py").write_text("__version__ = version = '0.5.9'\n")
    (violation,) = check_upstream(tmp_path)
    assert violation.seen == "version 0.5.9, where 0.5.11 or newer is needed"


def test_checkout_is_found_below_python(tmp_path: Path) -> None:
    """SGLang's repository keeps the package below ``python/``."""
    (tmp_path / "python" / "sglang").mkdir(parents=True)
    assert find_package(tmp_path) == tmp_path / "python" / "sglang"


def test_version_comes_from_the_source_first(tmp_path: Path) -> None:
    """The version written beside the sources wins over the metadata of another copy."""
    (tmp_path / "_version.py").write_text("__version__ = version = '0.5.99'\n")
    assert read_version(tmp_path) == "0.5.99"


# --- versions -------------------------------------------------------------------------------------


def test_versions_are_ordered_as_pep_440_orders_them() -> None:
    """Development versions, candidates, releases and post-releases come in this order."""
    ordered = [
        "0.5.9",
        "0.5.11.dev4",
        "0.5.11rc1",
        "0.5.11",
        "0.5.12",
        "0.5.12.post1.dev2",
        "0.5.12.post1",
        "0.6.0",
    ]
    keys = [version_key(version) for version in ordered]
    assert all(earlier < later for earlier, later in itertools.pairwise(keys))
    assert version_key("0.5.21+musa5.2") == version_key("v0.5.21")


@pytest.mark.parametrize(
    ("version", "standing", "message"),
    [
        (
            "0.5.10.post1",
            Standing.TOO_OLD,
            r"0\.5\.10\.post1 is too old: expected 0\.5\.11 or newer.*0\.5\.11 to 0",
        ),
        ("0.5.11rc2", Standing.TOO_OLD, "too old"),
        ("0.0.0.dev0", Standing.TOO_OLD, "fetch its tags"),
        ("0.5.11", Standing.TESTED, "^$"),
        ("0.5.12", Standing.BETWEEN, "^$"),
        ("0.5.12.post1", Standing.TESTED, "^$"),
        ("0.5.23", Standing.TESTED, "^$"),
        ("0.5.23.post1", Standing.NEWER, r"newer than what.*0\.5\.11 to 0\.5\.23"),
        ("0.5.24.dev7+gabc123", Standing.NEWER, "newer than what"),
    ],
)
def test_version_is_classified(version: str, standing: Standing, message: str) -> None:
    """A version is too old, tested, between tested ones, or newer; the message names the range."""
    support = classify_version(version)
    assert support.standing is standing
    assert re.search(message, support.message)


@pytest.mark.parametrize("version", ["", "main", "0.5", "0.5.x"])
def test_unreadable_version_is_refused(version: str) -> None:
    """A version that cannot be ordered is an error that quotes it."""
    with pytest.raises(UpstreamVersionError, match=re.escape(repr(version))):
        version_key(version)


# --- the table itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", REQUIREMENTS, ids=row_id)
def test_row_is_complete(row: Requirement) -> None:
    """A row has a known kind, a reason, a removal condition in sentences, and bounds in order."""
    assert row.kind in NEEDS.keys() | ALLOWANCES.keys()
    assert row.why.endswith(".")
    assert row.remove_when.endswith(".")
    if row.since and row.until:
        assert version_key(row.since) <= version_key(row.until)


@pytest.mark.parametrize("row", [row for row in REQUIREMENTS if row.since], ids=row_id)
def test_row_begins_after_the_oldest_release(row: Requirement) -> None:
    """A row of every supported release has no beginning, and none that ended is left."""
    assert not row.holds_in(SUPPORTED_RELEASES[0].version)


@pytest.mark.parametrize("row", [row for row in REQUIREMENTS if row.until], ids=row_id)
def test_row_still_serves_a_supported_release(row: Requirement) -> None:
    """A row that ends before the oldest supported release can go."""
    assert any(row.holds_in(release.version) for release in SUPPORTED_RELEASES)


def test_rows_are_unique() -> None:
    """No row is stated twice."""
    assert len(set(REQUIREMENTS)) == len(REQUIREMENTS)


def test_every_allowance_has_a_row_without_bounds() -> None:
    """A behaviour allowed in some releases only must be looked for in all of them."""
    symbols = {(row.kind, row.symbol) for row in REQUIREMENTS if row.kind in ALLOWANCES}
    unbounded = {(row.kind, row.symbol) for row in REQUIREMENTS if not row.since and not row.until}
    assert symbols <= unbounded


def test_every_pass_method_is_in_the_contract() -> None:
    """A method that the mixin wraps where it exists would be missed in silence if upstream renamed
    it, without a row; and what may assign forward_metadata is wrapped.
    """
    writers: set[str] = set()
    named: set[str] = set()
    for row in REQUIREMENTS:
        if row.kind == "metadata_writers":
            writers.update(row.parameters)
        elif row.kind == "method":
            named.add(row.name.rpartition(".")[2])
    assert writers <= set(PASS_METHODS) <= writers | named


def test_a_row_names_a_module_of_this_package_as_its_user() -> None:
    """A user who asks what a broken row costs finds the code that touches the symbol."""
    for row in REQUIREMENTS:
        place = PACKAGE / row.used_by.partition(".")[0]
        assert place.is_dir() or place.with_suffix(".py").is_file(), row_id(row)
    assert set(SERVING) <= {row.used_by for row in REQUIREMENTS}


def test_a_fault_of_upstream_says_where_it_is_reported() -> None:
    """A row that stands for a fault names the issue or pull request, or says that none is known."""
    faults = [row.fault for row in REQUIREMENTS if row.fault is not None]
    assert faults
    for fault in faults:
        assert fault == NONE_KNOWN or re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", fault)


@functools.cache
def package_sources() -> list[ast.Module]:
    """The package's own modules, parsed."""
    with collector_paused():
        return [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def test_every_import_from_sglang_has_a_row() -> None:
    """A symbol of SGLang that the package imports is in the contract."""
    imported = {
        (node.module, alias.name)
        for tree in package_sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sglang"
        for alias in node.names
    }
    missing = {f"{module}.{name}" for module, name in imported if not has_a_row(module, name)}
    assert missing == set()


def has_a_row(module: str | None, name: str) -> bool:
    """Tell whether the contract has a symbol of SGLang, or something in it."""
    return any(
        row.symbol.startswith(f"{module}.{name}")
        or (row.module.startswith(f"{module}.") and row.name.partition(".")[0] == name)
        for row in REQUIREMENTS
    )


def test_every_platform_hook_has_a_row_and_every_row_a_hook() -> None:
    """The CPU platform's overrides are in the contract, which states no other hook."""
    (platform,) = (
        node
        for tree in package_sources()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "CpuReferencePlatform"
    )
    overridden = {node.name for node in platform.body if isinstance(node, ast.FunctionDef)}
    rows = {
        row.name.rpartition(".")[2]
        for row in REQUIREMENTS
        if (row.kind, row.used_by) == ("method", "cpu")
        and row.module.startswith("sglang.srt.platforms.")
    }
    assert overridden == rows


def test_every_release_has_expectations() -> None:
    """The matrix expects something of each release that the package names, in the same order."""
    assert [row.version for row in SUPPORTED_RELEASES] == VERSIONS


def test_every_exception_has_a_reason() -> None:
    """An exception in the matrix names its level and case, and says why."""
    for row in RELEASES:
        for exception in row.get("exceptions", ()):
            assert exception["level"] in LEVELS
            assert exception["case"]
            assert exception["reason"].endswith(".")


def test_importing_loads_neither_torch_nor_sglang() -> None:
    """Checking the contract imports nothing heavy, and comes before anything that does."""
    code = (
        "import sys; from sglang_musa_ext.upstream import check; check.check_upstream(); "
        "sys.exit(any(name.partition('.')[0] in ('torch', 'sglang') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- all releases ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """One release; the tests of one come before those of the next."""
    version: str = request.param
    return version


@pytest.fixture(scope="module")
def tree(version: str) -> Iterator[SourceTree]:
    """The sources of a release, each file parsed once for its tests."""
    root = require_release(version)
    with collector_paused():
        yield SourceTree(root)


def test_release_keeps_the_contract(version: str, tree: SourceTree) -> None:
    """The release has every symbol that the package touches in it."""
    assert read_version(tree.root / "sglang") == version
    rows = [row for row in REQUIREMENTS if row.holds_in(version)]
    assert [str(violation) for violation in check_rows(rows, tree, version)] == []


def test_need_is_absent_outside_its_bounds(version: str, tree: SourceTree) -> None:
    """A need that a release outside its bounds also meets has wrong bounds, or can go."""
    outside = [row for row in REQUIREMENTS if row.kind in NEEDS and not row.holds_in(version)]
    violated = [violation.requirement for violation in check_rows(outside, tree, version)]
    assert [row_id(row) for row in outside if row not in violated] == []


def test_allowance_is_used_inside_its_bounds_only(version: str, tree: SourceTree) -> None:
    """Upstream does what a row allows in each release within its bounds, and in no other."""

    @functools.cache
    def done(kind: str, module: str, name: str) -> set[str]:
        """Return all that a part of upstream does, of which several rows allow something."""
        return ALLOWANCES[kind](tree, module, name)

    for row in REQUIREMENTS:
        if row.kind in ALLOWANCES:
            used = done(row.kind, row.module, row.name) & set(row.parameters)
            assert used == (set(row.parameters) if row.holds_in(version) else set()), row_id(row)


def test_installed_release_is_known() -> None:
    """The environment's own SGLang is one that the matrix tests."""
    package = find_package()
    if package is None:
        pytest.skip("SGLang is not installed")
    assert classify_version(read_version(package)).standing is Standing.TESTED
