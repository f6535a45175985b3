"""Allowances: each finder returns all that a part of upstream does."""

from __future__ import annotations

import ast
from collections.abc import Callable

from sglang_musa_ext.upstream.source import (
    SourceTree,
    calls,
    imports,
    locally_bound,
    methods,
    self_attributes,
)


def _kernel_calls(method: ast.FunctionDef) -> list[ast.Call]:
    """Return the calls of an FA3 function, known by name or by keywords for a query and keys."""
    return [call for call in calls(method) if _is_named(call) or _is_given_queries_and_keys(call)]


def _is_named(call: ast.Call) -> bool:
    return ast.unparse(call.func).rpartition(".")[2].startswith("flash_attn")


def _is_given_queries_and_keys(call: ast.Call) -> bool:
    keywords = {keyword.arg for keyword in call.keywords}
    return "q" in keywords and bool(keywords & {"k", "k_cache"})


def _find_kernel_calls(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return how the methods of a class reach a kernel: ``method: callee``."""
    ways: set[str] = set()
    for method in methods(tree.definition(module, name)):
        local = locally_bound(method)
        for call in _kernel_calls(method):
            callee = ast.unparse(call.func)
            ways.add(f"{method.name}: {callee}" + (" (a local name)" if callee in local else ""))
    return ways


def _find_kernel_keywords(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return the keywords that a class passes to FA3 functions, those in ``**kwargs`` included."""
    owner = tree.definition(module, name)
    keywords: set[str] = set()
    for method in methods(owner):
        for call in filter(_is_named, _kernel_calls(method)):
            if call.args:
                keywords.add(f"{len(call.args)} positional arguments")
            for keyword in call.keywords:
                keywords |= _keyword_item(keyword, method, owner)
    return keywords


def _expanded(value: ast.expr, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    """Return the keywords that ``**value`` may carry; what cannot be followed stands as written."""
    if isinstance(value, ast.Dict):
        items = zip(value.keys, value.values, strict=True)
        return set().union(*(_dict_item(key, item, method, owner) for key, item in items))
    if isinstance(value, ast.Name):
        return _variable_keys(value.id, method, owner)
    if isinstance(value, ast.Call):
        callee = ast.unparse(value.func)
        if callee == "dict" and not value.args:
            return set().union(*(_keyword_item(item, method, owner) for item in value.keywords))
        if callee.startswith("self."):
            return _returned_keys(callee, owner)
    return {f"**{ast.unparse(value)}"}


def _dict_item(
    key: ast.expr | None, item: ast.expr, method: ast.FunctionDef, owner: ast.AST
) -> set[str]:
    if key is None:
        return _expanded(item, method, owner)
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return {key.value}
    return {f"[{ast.unparse(key)}]"}


def _keyword_item(keyword: ast.keyword, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    return {keyword.arg} if keyword.arg else _expanded(keyword.value, method, owner)


def _returned_keys(callee: str, owner: ast.AST) -> set[str]:
    """Return the keys of the dictionaries that ``self.method`` returns."""
    for method in methods(owner):
        if f"self.{method.name}" == callee:
            returns = (node.value for node in ast.walk(method) if isinstance(node, ast.Return))
            values = [value for value in returns if value is not None]
            return set().union(*(_expanded(value, method, owner) for value in values))
    return {f"**{callee}()"}


def _variable_keys(variable: str, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    """Return the keys that ``method`` puts into its dictionary ``variable``."""
    keys: set[str] = set()
    is_assigned = False
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == variable:
                    is_assigned = True
                    keys |= _expanded(node.value, method, owner)
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == variable:
                    keys |= _dict_item(target.slice, node.value, method, owner)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{variable}.update":
            keys |= _updated_keys(node, method, owner)
    return keys if is_assigned else keys | {f"**{variable}"}


def _updated_keys(update: ast.Call, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    keys: set[str] = set()
    for argument in update.args:
        keys |= _expanded(argument, method, owner)
    for keyword in update.keywords:
        keys |= _keyword_item(keyword, method, owner)
    return keys


def _find_forward_imports(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return what the forwards of a class import when called: ``method: dotted name``."""
    lines: set[str] = set()
    for method in methods(tree.definition(module, name)):
        if method.name.startswith("forward"):
            lines.update(f"{method.name}: {imported}" for imported in imports(method))
    return lines


def _find_query_uses(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return what ``forward_extend`` of a class does with its queries ``q``.

    An attribute of them is ``q.name``, a call that is given them ``callee(q)``, and whatever else
    names them stands as written.
    """
    owner = tree.definition(module, name)
    forward = next(method for method in methods(owner) if method.name == "forward_extend")
    uses: set[str] = set()
    for node in ast.walk(forward):
        children = node.keywords if isinstance(node, ast.Call) else ()
        given = [*ast.iter_child_nodes(node), *(keyword.value for keyword in children)]
        if any(map(_is_query, given)) and not isinstance(node, ast.keyword):
            uses.add(_query_use(node))
    return uses


def _is_query(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "q" and isinstance(node.ctx, ast.Load)


def _query_use(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"q.{node.attr}"
    return f"{ast.unparse(node.func)}(q)" if isinstance(node, ast.Call) else ast.unparse(node)


def _find_imports_from(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return what ``module`` imports, anywhere in it, from the module ``name``."""
    parts = (imported.rpartition(".") for imported in imports(tree.module(module)))
    return {imported for origin, _, imported in parts if origin == name}


def _find_metadata_writers(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return the methods by which ``forward_metadata`` is assigned from outside the class.

    A private method that assigns it counts as the public methods it is called by; the constructor
    does not count, because nothing was planned before it.
    """
    members = {method.name: method for method in methods(tree.definition(module, name))}
    uses = {caller: self_attributes(method, ast.Load) for caller, method in members.items()}
    pending = []
    for member, method in members.items():
        if "forward_metadata" in self_attributes(method, ast.Store):
            pending.append(member)
    writers: set[str] = set()
    visited = {"__init__"}
    while pending:
        writer = pending.pop()
        if writer in visited:
            continue
        visited.add(writer)
        callers = [caller for caller in members if writer in uses[caller] and caller != writer]
        if writer.startswith("_") and callers:
            pending += callers
        else:
            writers.add(writer)
    return writers


def _find_constructors(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return the modules below the package ``module`` that call the class ``name``."""
    modules: set[str] = set()
    for candidate in tree.containing(module, f"{name}("):
        if any(ast.unparse(call.func) == name for call in calls(tree.module(candidate))):
            modules.add(candidate)
    return modules


ALLOWANCES: dict[str, Callable[[SourceTree, str, str], set[str]]] = {
    "kernel_calls": _find_kernel_calls,
    "kernel_keywords": _find_kernel_keywords,
    "forward_imports": _find_forward_imports,
    "query_uses": _find_query_uses,
    "imports_from": _find_imports_from,
    "metadata_writers": _find_metadata_writers,
    "constructors": _find_constructors,
}
"""By kind of row."""
