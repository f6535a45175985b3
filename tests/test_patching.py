"""Names replaced, imports followed and modules put in another's place, and all of it undone."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sglang_musa_ext import patching

NAME = "module_of_test_patching"


@pytest.fixture(autouse=True)
def unchanged_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the import system as it was, with a module ``NAME`` to import."""
    (tmp_path / f"{NAME}.py").write_text("def answer():\n    return 42\n")
    others = [x for x in sys.meta_path if type(x).__module__ != patching.__name__]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop(NAME, None)


class Upstream:
    """A class whose methods are replaced."""

    def method(self) -> str:
        return "upstream"


class Child(Upstream):
    """A class that inherits what is replaced."""


def louder(original: Any) -> Any:
    def wrapper(*args: Any) -> str:
        return f"{original(*args)}!"

    return wrapper


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [SimpleNamespace(known=1), {"known": 1}], ids=["object", "dict"])
@pytest.mark.parametrize("name", ["known", "new"])
def test_a_replaced_name_comes_back(owner: Any, name: str) -> None:
    """A name holds the new value, and afterwards what it held, or nothing."""
    namespace = owner if isinstance(owner, dict) else vars(owner)
    before = dict(namespace)
    undo = patching.replace(owner, name, "replaced")
    assert namespace[name] == "replaced"
    undo()
    assert namespace == before


def test_a_name_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second wrapper changes nothing, and its undo leaves the first one alone."""
    monkeypatch.setattr(Upstream, "method", vars(Upstream)["method"])
    undo = patching.wrap(Upstream, "method", louder)
    undo_second = patching.wrap(Upstream, "method", louder)
    assert Upstream().method() == "upstream!"
    undo_second()
    assert Upstream().method() == "upstream!"
    undo()
    assert Upstream().method() == "upstream"


def test_a_name_can_be_wrapped_again_around_the_same_original() -> None:
    """Asked to, a second wrapper takes the first one's place and does not add to it."""
    owner = SimpleNamespace(function=lambda: "upstream")
    original = owner.function
    patching.wrap(owner, "function", louder)
    patching.wrap(owner, "function", lambda f: lambda: f"{f()}?", again=True)
    assert owner.function() == "upstream?"
    assert patching.original_of(owner.function) is original


def test_an_inherited_method_is_inherited_again_afterwards() -> None:
    """Undoing leaves no copy of the parent's method in the child."""
    undo = patching.wrap(Child, "method", louder)
    assert (Child().method(), Upstream().method()) == ("upstream!", "upstream")
    undo()
    assert "method" not in vars(Child)


def test_what_is_no_wrapper_is_its_own_original() -> None:
    """The mark tells wrappers from all else."""
    assert patching.original_of(louder) is louder
    assert not patching.is_wrapped(louder)
    assert patching.is_wrapped(patching.mark(louder(str), str))


# Imports ------------------------------------------------------------------------------------------


def test_an_action_follows_every_execution_of_a_module() -> None:
    """A module imported once more is a new one, and is acted upon like the first."""
    seen: list[ModuleType] = []
    undo = patching.after_import(NAME, seen.append)
    first = importlib.import_module(NAME)
    del sys.modules[NAME]
    second = importlib.import_module(NAME)
    assert first is not second
    assert seen == [first, second]
    undo()
    del sys.modules[NAME]
    importlib.import_module(NAME)
    assert seen == [first, second]


def test_a_module_that_is_there_is_acted_upon_at_once() -> None:
    """Whoever asks late misses nothing."""
    module = importlib.import_module(NAME)
    seen: list[ModuleType] = []
    patching.after_import(NAME, seen.append)
    assert seen == [module]


def test_one_finder_serves_all_and_leaves_with_the_last() -> None:
    """However many ask, one finder is in the way of others, and none when all have been undone."""
    before = list(sys.meta_path)
    seen: list[ModuleType] = []
    undo = [patching.after_import(NAME, seen.append) for _ in range(2)]
    undo.append(patching.after_import("another_module", print))
    assert len(sys.meta_path) == len(before) + 1
    importlib.import_module(NAME)
    assert len(seen) == 1
    for each in undo:
        each()
    assert sys.meta_path == before


def test_other_modules_are_left_to_python() -> None:
    """The finder answers for the named modules alone."""
    patching.after_import(NAME, print)
    assert sys.meta_path[0].find_spec("json.decoder", None) is None


def test_the_source_of_a_followed_module_can_still_be_read() -> None:
    """Triton and inspect read sources through the module's loader."""
    patching.after_import(NAME, lambda module: None)
    module = importlib.import_module(NAME)
    assert inspect.getsource(module.answer).startswith("def answer")


def test_an_error_of_an_action_is_an_error_of_the_import() -> None:
    """Nothing is swallowed, and the module is not there afterwards."""

    def refuse(module: ModuleType) -> None:
        raise ValueError(f"{module.__name__} is not as expected")

    patching.after_import(NAME, refuse)
    with pytest.raises(ValueError, match="is not as expected"):
        importlib.import_module(NAME)
    assert NAME not in sys.modules


class AnotherHook(MetaPathFinder):
    """Another package's import hook of the same kind: asks all finders, then changes the loader."""

    def __init__(self) -> None:
        self.executed: list[str] = []

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.executed.append(module.__name__)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_import_hook_works_beside_ours(ours_first: bool) -> None:
    """Whichever was installed first, both act, once."""
    other = AnotherHook()
    seen: list[str] = []
    sys.meta_path.insert(0, other)
    patching.after_import(NAME, lambda module: seen.append(module.__name__))
    if not ours_first:
        sys.meta_path.remove(other)
        sys.meta_path.insert(0, other)
    importlib.import_module(NAME)
    assert (seen, other.executed) == ([NAME], [NAME])


# Modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imported_before", [True, False])
def test_a_module_stands_in_until_it_is_undone(imported_before: bool) -> None:
    """``import`` finds the other module, also through its parent, and afterwards what it found."""
    name = "json.decoder" if imported_before else "json.no_such_module"
    before = sys.modules.get(name), getattr(sys.modules["json"], name.partition(".")[2], None)
    module = ModuleType(name)
    undo = patching.stand_in(name, module)
    assert importlib.import_module(name) is module
    assert getattr(sys.modules["json"], name.partition(".")[2]) is module
    undo()
    after = sys.modules.get(name), getattr(sys.modules["json"], name.partition(".")[2], None)
    assert after == before


def test_a_module_whose_parent_is_not_imported_can_stand_in() -> None:
    """Naming it is enough; nothing is imported for it."""
    name = "no_such_parent.child"
    module = ModuleType(name)
    undo = patching.stand_in(name, module)
    assert sys.modules[name] is module
    undo()
    assert name not in sys.modules
