"""Tests of scripts/advance-warning, on small trees and on the installed SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_musa_ext.upstream.check import find_package
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES
from tests.support.commands import load_command

advance_warning = load_command("advance-warning")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has nothing of what the contract needs."""
    (tmp_path / "python" / "sglang").mkdir(parents=True)
    return tmp_path


def test_a_broken_tree_is_warned_of(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every broken row is printed with what breaks, and the exit status is 1."""
    assert advance_warning.main([str(checkout)]) == 1
    out = capsys.readouterr().out
    assert (
        "sglang.srt.layers.attention.flashattention_backend.flash_attn_with_kvcache: needed as "
        "module_global" in out
    )
    assert "fa3 is refused" in out
    assert "only cpu is affected" in out


def test_a_checkout_without_version_is_taken_for_the_newest(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metadata of an installed SGLang says nothing about a checkout, and is not asked."""
    advance_warning.main([str(checkout)])
    assert (
        f"taken for {SUPPORTED_RELEASES[-1].version} (it names no version"
        in capsys.readouterr().out
    )


def test_a_tree_that_keeps_the_contract_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """The installed SGLang, read as a tree, breaks nothing."""
    package = find_package()
    if package is None:
        pytest.skip("SGLang is not installed")
    assert advance_warning.main([str(package.parent)]) == 0
    assert "0 broken rows" in capsys.readouterr().out


def test_a_tree_without_sglang_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty folder is no SGLang that keeps the contract."""
    assert advance_warning.main([str(tmp_path)]) == 2
    assert "no sglang/ or python/sglang/" in capsys.readouterr().err
