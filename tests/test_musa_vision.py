"""Vision's FA3 on MUSA, repaired where upstream calls a function that it does not have there."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext import musa_vision, patching
from sglang_musa_ext.musa_vision import install_vision
from sglang_musa_ext.upstream.names import VISION

# How upstream's vision attention reaches FA3, by release: 0.5.11-0.5.15 by a name that MUSA has,
# later by one that CUDA alone has.
SOURCE = """
class VisionFlash3Attention:
    def forward(self, q, k, v, **given):
        lengths = given["cu_seqlens"]
        return {callee}(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths)
"""


def vision(callee: str, **contents: Any) -> str:
    """The source of upstream's module, with what its own imports bind."""
    bound = "".join(f"{name} = {value!r}\n" for name, value in contents.items())
    return bound + SOURCE.format(callee=callee)


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package of upstream's that holds the module, and no finder of ours."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    parts = VISION.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(tmp_path)]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    others = [x for x in sys.meta_path if type(x).__module__ != patching.__name__]
    monkeypatch.setattr(sys, "meta_path", others)


def import_vision(tmp_path: Path, source: str) -> ModuleType:
    """Import upstream's vision module, made of ``source``, as an import statement does."""
    sys.modules.pop(VISION, None)
    (tmp_path / "vision.py").write_text(source)
    return importlib.import_module(VISION)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reach the provider's function for raw keys and values."""
    recorded: list[dict[str, Any]] = []

    def attention(**given: Any) -> str:
        recorded.append(given)
        return "output"

    provider = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setattr(musa_vision, "_kernels_of", functools.cache(lambda device: provider))
    return recorded


def attend(module: ModuleType) -> Any:
    q, k, v = torch.zeros(3, 2, 1, 8)
    return module.VisionFlash3Attention().forward(q, k, v, cu_seqlens=torch.tensor([0, 2]))


def test_vision_without_the_function_fails(tmp_path: Path) -> None:
    """This is upstream's mistake: the name is bound for CUDA alone."""
    with pytest.raises(NameError, match="flash_attn_func"):
        attend(import_vision(tmp_path, vision("flash_attn_func")))


@pytest.mark.parametrize("first", ["plugin", "vision"])
def test_vision_is_repaired(tmp_path: Path, calls: list[dict[str, Any]], first: str) -> None:
    """Vision reaches the provider with its cumulative lengths, whichever was imported first."""
    if first == "plugin":
        install_vision()
    module = import_vision(tmp_path, vision("flash_attn_func"))
    if first == "vision":
        install_vision()
    assert attend(module) == "output"
    (given,) = calls
    assert given.keys() == {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"}
    assert given["cu_seqlens_q"].tolist() == [0, 2]


def test_vision_imported_again_is_repaired_again(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    """A module that is executed once more lacks the function once more."""
    install_vision()
    import_vision(tmp_path, vision("flash_attn_func"))
    assert attend(import_vision(tmp_path, vision("flash_attn_func"))) == "output"
    assert len(calls) == 1


def test_vision_is_not_imported_for_it() -> None:
    """A process without vision does not pay for it."""
    install_vision()
    assert VISION not in sys.modules


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            vision("flash_attn_varlen_func", flash_attn_varlen_func=None), id="up to 0.5.15"
        ),
        pytest.param(
            vision("flash_attn_func", flash_attn_func="upstream's"), id="repaired upstream"
        ),
    ],
)
def test_vision_that_needs_nothing_is_left_alone(tmp_path: Path, source: str) -> None:
    """A release without the mistake keeps what it has."""
    install_vision()
    module = import_vision(tmp_path, source)
    assert getattr(module, "flash_attn_func", "upstream's") == "upstream's"


def test_the_repair_can_be_taken_out_again(tmp_path: Path) -> None:
    """Undone before the import, it leaves nothing of ours in the way of others."""
    before = list(sys.meta_path)
    undo = install_vision()
    assert sys.meta_path != before
    undo()
    assert sys.meta_path == before
    with pytest.raises(NameError, match="flash_attn_func"):
        attend(import_vision(tmp_path, vision("flash_attn_func")))
