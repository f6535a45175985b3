"""Reading Python sources as syntax trees, without importing them."""

from __future__ import annotations

import ast
import contextlib
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPE = (ast.Module, ast.ClassDef)


class Unreadable(Exception):
    """A module that is absent, or that this Python cannot parse; the text says which."""


class SourceTree:
    """The Python sources below ``root``; each file is parsed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module] = {}

    def module(self, name: str) -> ast.Module:
        """Return the syntax tree of the module ``name``."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> ast.Module:
        base = self.root.joinpath(*name.split("."))
        candidates = (base.with_suffix(".py"), base / "__init__.py")
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise Unreadable(f"no module {name}")
        try:
            return _syntax_tree(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise Unreadable(f"a module {name} that this Python cannot parse ({error})") from error

    def definition(self, module: str, name: str) -> ast.AST:
        """Return the node that binds ``name`` in ``module``.

        Args:
            module: its dotted name.
            name: dotted for a member of a class; empty: the module itself.
        """
        node: ast.AST = self.module(module)
        for part in filter(None, name.split(".")):
            members = dict(bindings(node.body)) if isinstance(node, _SCOPE) else {}
            if part not in members:
                raise Unreadable(f"no {part}" + (f" in {name}" if part != name else ""))
            node = members[part]
        return node

    def containing(self, prefix: str, text: str) -> Iterator[str]:
        """Yield the names of the modules below the package ``prefix`` that contain ``text``."""
        needle = text.encode()
        for path in sorted(self.root.joinpath(*prefix.split(".")).rglob("*.py")):
            if needle in path.read_bytes():
                parts = path.relative_to(self.root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _syntax_tree(text: str) -> ast.Module:
    return ast.parse(text)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from running.

    Syntax trees are so many objects that it would take longer than reading them, and it would find
    nothing, because they have no cycles.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def bindings(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the names that statements bind, under conditions too, each with its node."""
    for node in body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from _assigned(node)
        else:
            yield from bindings(_nested_statements(node))


def _assigned(node: ast.Assign | ast.AnnAssign) -> Iterator[tuple[str, ast.AST]]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id, node


def _nested_statements(node: ast.stmt) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            yield from child.body
        elif isinstance(child, ast.stmt):
            yield child


def methods(node: ast.AST) -> list[ast.FunctionDef]:
    """Return the methods in the body of a class."""
    return [item for item in getattr(node, "body", ()) if isinstance(item, ast.FunctionDef)]


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls anywhere inside ``node``."""
    return (item for item in ast.walk(node) if isinstance(item, ast.Call))


def imports(node: ast.AST) -> set[str]:
    """Return the dotted names of everything imported anywhere inside ``node``."""
    names: set[str] = set()
    for item in ast.walk(node):
        if isinstance(item, ast.ImportFrom):
            origin = f"{'.' * item.level}{item.module or ''}"
            names.update(f"{origin}.{alias.name}" for alias in item.names)
        elif isinstance(item, ast.Import):
            names.update(alias.name for alias in item.names)
    return names


def locally_bound(function: ast.AST) -> set[str]:
    """Return the names local to ``function``: a call of one does not reach the module's global."""
    names = {imported.rpartition(".")[2] for imported in imports(function)}
    for item in ast.walk(function):
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
            names.add(item.id)
        elif isinstance(item, ast.arg):
            names.add(item.arg)
    return names


def self_attributes(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Return the attributes of ``self`` that ``node`` stores (``ast.Store``) or loads."""
    attributes = (item for item in ast.walk(node) if isinstance(item, ast.Attribute))
    return {
        item.attr
        for item in attributes
        if isinstance(item.ctx, context) and ast.unparse(item.value) == "self"
    }


def strings(node: ast.AST) -> set[str]:
    """Return the string constants anywhere inside ``node``."""
    constants = (item.value for item in ast.walk(node) if isinstance(item, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def listed(items: Iterable[str]) -> str:
    """Return ``items`` sorted, in one line of text."""
    return ", ".join(sorted(items)) or "nothing"
