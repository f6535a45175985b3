"""Replace names of other modules, act after an import, put a module in another's place.

Everything here returns a function that undoes it. A wrapper carries what it wraps under one mark,
so that installing it twice is installing it once.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, MutableMapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Undo = Callable[[], None]
"""Takes back what the call that returned it has done."""

_MARK = "_musa_ext_original"
"""The attribute of a wrapper that holds what it wraps."""
_ABSENT = object()


# --- names ----------------------------------------------------------------------------------------


def replace(owner: Any, name: str, value: Any) -> Undo:
    """Bind ``name`` to ``value``.

    Args:
        owner: a module, a class, an instance, or a dictionary with the key ``name``.
        name: need not be bound yet.
        value: what it is bound to from now on.
    """
    namespace = owner if isinstance(owner, MutableMapping) else vars(owner)
    before = namespace.get(name, _ABSENT)
    _bind(owner, name, value)
    return functools.partial(_bind, owner, name, before)


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any], *, again: bool = False) -> Undo:
    """Bind ``name`` to ``wrapper(original)``, unless a wrapper of this package is there already.

    Args:
        owner: a module, a class, an instance, or a dictionary with the key ``name``.
        name: of the function to wrap.
        wrapper: takes the original, returns what stands in its place.
        again: replace a wrapper that is there already, around the same original.
    """
    current = owner[name] if isinstance(owner, MutableMapping) else getattr(owner, name)
    if is_wrapped(current) and not again:
        return _nothing
    original = original_of(current)
    return replace(owner, name, mark(wrapper(original), original))


def mark(wrapper: Any, original: Any) -> Any:
    """Return ``wrapper``, marked as standing for ``original``."""
    setattr(wrapper, _MARK, original)
    return wrapper


def is_wrapped(value: Any) -> bool:
    """Tell whether ``value`` is a wrapper of this package."""
    return hasattr(value, _MARK)


def original_of(value: Any) -> Any:
    """Return what ``value`` wraps, or ``value`` if it is no wrapper of this package."""
    return getattr(value, _MARK, value)


def _bind(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, MutableMapping):
        _bind_item(owner, name, value)
    elif value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _bind_item(owner: MutableMapping[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        owner.pop(name, None)
    else:
        owner[name] = value


def _nothing() -> None:
    """Undo nothing."""


# --- imports --------------------------------------------------------------------------------------


def after_import(name: str, act: Callable[[ModuleType], None]) -> Undo:
    """Call ``act`` with the module ``name`` each time it has been executed, and now if it is there.

    An error of ``act`` is an error of the import. Asking twice for the same ``act`` is asking once.
    """
    finder = _the_finder()
    actions = finder.actions.setdefault(name, [])
    if act in actions:
        return _nothing
    actions.append(act)
    if (module := sys.modules.get(name)) is not None:
        act(module)
    return functools.partial(finder.forget, name, act)


def _the_finder() -> _AfterImport:
    """Return the finder of this process, put in front of all others if it is not there yet."""
    for finder in sys.meta_path:
        if isinstance(finder, _AfterImport):
            return finder
    finder = _AfterImport()
    sys.meta_path.insert(0, finder)
    return finder


class _AfterImport(MetaPathFinder):
    """Lets the other finders find a module, and has its loader call back; silent on all others."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._asking = threading.local()

    def forget(self, name: str, act: Callable[[ModuleType], None]) -> None:
        """Stop calling ``act``; leave ``sys.meta_path`` with the last of all actions."""
        remaining = self.actions.get(name, [])
        with contextlib.suppress(ValueError):
            remaining.remove(act)
        if not remaining:
            self.actions.pop(name, None)
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions or getattr(self._asking, "name", None) == fullname:
            return None
        self._asking.name = fullname  # Another finder of this kind asks all finders again.
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._asking.name = None
        if spec is not None and spec.loader is not None:
            self._observe(spec.loader, fullname)
        return spec

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None

    def _observe(self, loader: Loader, fullname: str) -> None:
        """Have ``loader`` call back; its kind stays: inspect and Triton read sources from it."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for act in list(self.actions.get(fullname, ())):
                act(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


# --- modules --------------------------------------------------------------------------------------


def stand_in(name: str, module: ModuleType) -> Undo:
    """Have ``import name`` find ``module``, also as an attribute of an imported parent."""
    with contextlib.ExitStack() as undo:
        undo.callback(replace(sys.modules, name, module))
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            undo.callback(replace(sys.modules[parent], child, module))
        return undo.pop_all().close
