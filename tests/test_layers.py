"""The layering of the package, read off its sources.

docs/design.md says why each module may import what; ``LAYERS`` is that table as data.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "sglang_musa_ext"
SOURCES = Path(__file__).resolve().parent.parent / PACKAGE
ANYTHING = frozenset({"*"})
ENTRANCES = frozenset({"plugin", "doctor", "__main__"})
"""SGLang and people come in through these; no module of ours may need one."""


@dataclass(frozen=True)
class AllowedImports:
    """Imports that a module may have beside the standard library; other packages by their root."""

    eager: frozenset[str] = frozenset()
    """While it is imported itself."""

    lazy: frozenset[str] = frozenset()
    """Besides those, inside a function or for annotations alone."""


def layer(eager: str = "", lazy: str = "") -> AllowedImports:
    return AllowedImports(frozenset(eager.split()), frozenset(lazy.split()))


LAYERS = {
    "__init__": layer(),
    "envs": layer(),
    "announce": layer(),
    "policy": layer("envs", lazy="upstream"),
    "patching": layer(),
    "upstream": layer(),
    "kernels": layer("envs policy torch", lazy="*"),
    "attention": layer(
        "torch sglang envs policy kernels patching upstream", lazy="prometheus_client"
    ),
    "cpu": layer(
        "sglang torch numpy psutil patching", lazy="policy kernels upstream transformers triton"
    ),
    "musa_defaults": layer("announce policy patching upstream", lazy="kernels sglang"),
    "musa_vision": layer("envs patching upstream", lazy="kernels"),
    "plugin": layer(
        "envs",
        lazy="announce policy patching attention cpu guard musa_defaults musa_vision ranks sglang "
        "upstream",
    ),
    "guard": layer("envs patching upstream"),
    "ranks": layer("envs policy patching upstream", lazy="kernels torch"),
    "doctor": layer("envs policy upstream", lazy="*"),
    "install": layer("envs"),
    "engines": layer("patching", lazy="cpu sglang torch sgl_kernel"),
    "validation": layer("engines policy kernels envs torch upstream", lazy="*"),
    "benchmark": layer("engines validation policy envs kernels torch", lazy="*"),
    "prewarm": layer("policy", lazy="envs kernels torch"),
    "__main__": layer(),
}
"""By folder, or by module where one stands beside the folders."""
LIGHT = (
    *("", "envs", "policy", "patching", "upstream", "plugin", "guard", "doctor.command"),
    *("install", "validation.command", "benchmark.command"),
    "kernels.mate_identity",
)
"""Modules that load neither torch nor sglang while they are imported."""
MAY_TOUCH_THE_ENVIRONMENT = {
    ("envs", "from_environ"): "the one reader of our variables",
    ("envs", "named_platform"): "the same for the platform, before the settings are judged",
    (
        "envs",
        "is_addressed",
    ): "whether anything of ours is set at all, which no setting can tell from its default",
    (
        "guard",
        "arm",
    ): "torch calls it in every process, where a bad value of ours must not be an error",
    ("guard", "_reason"): "names SGLang's own variables in an error",
    ("doctor.command", "main"): "hands what it is to judge to the probes",
    (
        "cpu.stand_ins",
        "prepare_process",
    ): "sets what the CPU engine needs before SGLang's modules read it",
}
BUILD_ENVIRONMENTS = frozenset({"install", "engines", "validation", "benchmark"})
"""Layers that start processes, and build the environments of these from their own."""
PATHS = sorted(SOURCES.rglob("*.py"))
MODULES = [".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in PATHS]
TREES = {module: ast.parse(path.read_text()) for module, path in zip(MODULES, PATHS, strict=True)}


@dataclass(frozen=True)
class Import:
    """One name that an import statement brings in."""

    target: str
    line: int
    lazy: bool

    @property
    def is_ours(self) -> bool:
        return self.target.partition(".")[0] == PACKAGE

    @property
    def name(self) -> str:
        """A layer of ours (the package itself: ``__init__``), or the root of another's module."""
        parts = self.target.split(".")
        return (parts[1] if len(parts) > 1 else "__init__") if self.is_ours else parts[0]

    @property
    def module(self) -> str:
        """Our module, as :data:`MODULES` names it."""
        name = self.target.partition(".")[2]
        return f"{name}.__init__" if f"{name}.__init__" in MODULES else name or "__init__"


def imports_of(tree: ast.Module) -> Iterator[Import]:
    for node, lazy in walk(tree, lazy=False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(from_import(node, alias.name), node.lineno, lazy)


def from_import(node: ast.ImportFrom, name: str) -> str:
    """The module that ``from ... import name`` needs."""
    assert node.level == 0, "imports inside the package are absolute"
    origin = node.module or ""
    parts = [*origin.split("."), name][1:]
    is_module = {".".join(parts), ".".join([*parts, "__init__"])} & set(MODULES)
    return f"{origin}.{name}" if origin.partition(".")[0] == PACKAGE and is_module else origin


def walk(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below ``node``, and whether it runs later than the import, or never."""
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from walk(child, lazy=lazy or is_deferred(child))


def is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def layer_of(module: str) -> str:
    """The folder of a module, or the module itself beside the folders."""
    return module.partition(".")[0]


def is_allowed(imported: Import, own: str) -> bool:
    allowed = LAYERS[own]
    if imported.is_ours and imported.name == own:
        return True
    if imported.target == PACKAGE or (
        not imported.is_ours and imported.name in sys.stdlib_module_names
    ):
        return True
    if imported.name in ENTRANCES:
        return False
    granted = allowed.eager | allowed.lazy if imported.lazy else allowed.eager
    return imported.name in granted or granted >= ANYTHING


def where(module: str, node: ast.AST | Import) -> str:
    line = node.line if isinstance(node, Import) else getattr(node, "lineno", 0)
    return f"{module.replace('.', '/')}.py:{line}"


def test_every_module_has_its_layer() -> None:
    """A new module needs a row in the table, and so a reason to exist."""
    assert sorted({layer_of(module) for module in MODULES} - set(LAYERS)) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_layer(module: str) -> None:
    """A module's imports, while it is imported and later, are in its row of the table."""
    wrong = [x for x in imports_of(TREES[module]) if not is_allowed(x, layer_of(module))]
    assert [f"{where(module, x)} imports {x.target}" for x in wrong] == []


def test_imports_are_acyclic() -> None:
    """No module needs itself, not even through an import inside a function."""
    graph = {}
    for module, tree in TREES.items():
        graph[module] = {x.module for x in imports_of(tree) if x.is_ours} - {"__init__"}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert graph == {}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_sglang(module: str) -> None:
    """The imports by which SGLang finds the plugin cost a process nothing that it may not want."""
    name = f"{PACKAGE}.{module}".rstrip(".")
    code = f"import sys, {name}; print(*sorted({{'torch', 'sglang'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_no_global_statement(module: str) -> None:
    """State lives on objects that somebody owns."""
    assert [
        where(module, node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Global)
    ] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed(module: str) -> None:
    """No handler catches everything and does nothing."""
    assert [where(module, node) for node in ast.walk(TREES[module]) if swallows(node)] == []


def swallows(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    caught = (
        {x.id for x in ast.walk(node.type) if isinstance(x, ast.Name)}
        if node.type
        else {"Exception"}
    )
    idle = all(isinstance(x, ast.Pass | ast.Continue) or is_ellipsis(x) for x in node.body)
    return bool(caught & {"Exception", "BaseException"}) and idle


def is_ellipsis(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and node.value.value is ...
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_environment_is_touched_in_one_place(module: str) -> None:
    """Only the named functions read or set environment variables or start processes."""
    if layer_of(module) in BUILD_ENVIRONMENTS:
        return
    granted = {function for place, function in MAY_TOUCH_THE_ENVIRONMENT if place == module}
    assert [
        where(module, node) for node in outside(TREES[module], granted) if touches_environment(node)
    ] == []


def outside(node: ast.AST, functions: set[str]) -> Iterator[ast.AST]:
    """Every node below ``node`` that is in none of the named functions."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name in functions):
            yield child
            yield from outside(child, functions)


def touches_environment(node: ast.AST) -> bool:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and bool(names & {alias.name for alias in node.names})
    is_of_os = (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    )
    return is_of_os and isinstance(node, ast.Attribute) and node.attr in names


WRONG_IMPORTS = {
    "eager": ("import torch", "envs"),
    "eager submodule": ("import sglang.srt.server_args", "kernels"),
    "eager in class body": ("class A:\n    import torch", "envs"),
    "lazy elsewhere": ("def f():\n    from sglang_musa_ext.attention import mixin", "upstream"),
    "of a folder": ("from sglang_musa_ext.kernels import provider", "upstream"),
    "of a module": ("from sglang_musa_ext.kernels.provider import select_kernels", "upstream"),
    "entrance": ("def f():\n    from sglang_musa_ext.plugin import register", "kernels"),
    "entrance by name": ("def f():\n    from sglang_musa_ext import doctor", "kernels"),
}


@pytest.mark.parametrize(("source", "module"), WRONG_IMPORTS.values(), ids=WRONG_IMPORTS)
def test_the_check_sees_a_wrong_import(source: str, module: str) -> None:
    """The layering test can fail: each way to write an import is seen."""
    assert [x for x in imports_of(ast.parse(source)) if not is_allowed(x, module)] != []


@pytest.mark.parametrize(
    ("source", "check"),
    [
        ("try:\n    f()\nexcept Exception:\n    pass", swallows),
        ("try:\n    f()\nexcept:\n    ...", swallows),
        (
            (
                "for x in y:\n    try:\n        f()\n    except (OSError, BaseException):\n        "
                "continue"
            ),
            swallows,
        ),
        ("import os\nos.environ['A']", touches_environment),
        ("import os\nos.getenv('A')", touches_environment),
        ("from os import environ", touches_environment),
    ],
)
def test_the_checks_see_what_they_forbid(source: str, check: object) -> None:
    """The tests of swallowed errors and of the environment can fail."""
    assert callable(check)
    assert any(check(node) for node in ast.walk(ast.parse(source)))
