"""Needs: each check returns what is seen where that is not what the row needs."""

from __future__ import annotations

import ast
from collections.abc import Callable

from sglang_musa_ext.upstream.requirement import Requirement
from sglang_musa_ext.upstream.source import (
    FUNCTION,
    SourceTree,
    bindings,
    calls,
    imports,
    listed,
    locally_bound,
    methods,
    self_attributes,
    strings,
)


def _check_global(tree: SourceTree, row: Requirement) -> str | None:
    """The module binds ``name`` at its top level."""
    tree.definition(row.module, row.name)
    return None


def _check_callable(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is a function whose parameters begin with ``parameters``, in this order."""
    node = tree.definition(row.module, row.name)
    if not isinstance(node, FUNCTION):
        return f"a {type(node).__name__}, not a function"
    arguments = node.args
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if tuple(names[: len(row.parameters)]) != row.parameters:
        return f"the parameters ({', '.join(names)})"
    return None


def _check_class(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is a class; ``parameters`` are among its bases."""
    node = tree.definition(row.module, row.name)
    if not isinstance(node, ast.ClassDef):
        return f"a {type(node).__name__}, not a class"
    bases = {ast.unparse(base) for base in node.bases}
    return None if bases.issuperset(row.parameters) else f"the bases {listed(bases)}"


def _check_attribute(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is ``Class.attribute``, set in the class body or by its constructor."""
    owner, _, attribute = row.name.rpartition(".")
    node = tree.definition(row.module, owner)
    names = {name for name, _ in bindings(getattr(node, "body", ()))}
    for method in methods(node):
        if method.name == "__init__":
            names |= self_attributes(method, ast.Store)
    return None if attribute in names else f"no {attribute} set by {owner} or its constructor"


def _check_assigned(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is a class whose methods set each attribute of ``parameters``."""
    node = tree.definition(row.module, row.name)
    names: set[str] = set()
    for method in methods(node):
        names |= self_attributes(method, ast.Store)
    missing = set(row.parameters) - names
    return f"no {listed(missing)} set by its methods" if missing else None


def _check_strings(tree: SourceTree, row: Requirement) -> str | None:
    """The value of ``name`` contains the strings ``parameters``."""
    values = strings(tree.definition(row.module, row.name))
    return None if values.issuperset(row.parameters) else f"the strings {listed(values)}"


def _check_registered(tree: SourceTree, row: Requirement) -> str | None:
    """A function is decorated with ``name("entry")`` for each entry of ``parameters``."""
    entries: set[str] = set()
    for node in tree.module(row.module).body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == row.name:
                entries |= strings(decorator)
    return None if entries.issuperset(row.parameters) else f"the entries {listed(entries)}"


def _check_imports(tree: SourceTree, row: Requirement) -> str | None:
    """Somewhere inside ``name`` each dotted name of ``parameters`` is imported."""
    imported = imports(tree.definition(row.module, row.name))
    missing = set(row.parameters) - imported
    if not missing:
        return None
    wanted = {name.rpartition(".")[2] for name in row.parameters}
    related = {name for name in imported if name.rpartition(".")[2] in wanted}
    return f"no import of {listed(missing)} (related: {listed(related)})"


def _check_calls(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` calls each of ``parameters``, and by its global name, not by a local one."""
    node = tree.definition(row.module, row.name)
    called = {ast.unparse(call.func) for call in calls(node)}
    missing = set(row.parameters) - called
    if missing:
        return f"no call of {listed(missing)}"
    local = set(row.parameters) & locally_bound(node)
    return f"a local binding of {listed(local)}" if local else None


def _check_bound_only_under(tree: SourceTree, row: Requirement) -> str | None:
    """The module binds ``name`` nowhere but under ``if`` with the condition ``parameters[0]``."""
    (condition,) = row.parameters
    tree.definition(row.module, row.name)
    for node in tree.module(row.module).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == condition:
            unguarded: list[ast.stmt] = node.orelse
        else:
            unguarded = [node]
        if row.name in dict(bindings(unguarded)):
            return f"a binding of {row.name} elsewhere too"
    return None


NEEDS: dict[str, Callable[[SourceTree, Requirement], str | None]] = {
    "module_global": _check_global,
    "function": _check_callable,
    "method": _check_callable,
    "class": _check_class,
    "attribute": _check_attribute,
    "assigned": _check_assigned,
    "strings": _check_strings,
    "registered": _check_registered,
    "imports": _check_imports,
    "calls": _check_calls,
    "bound_only_under": _check_bound_only_under,
}
"""By kind of row."""
