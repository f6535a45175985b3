"""Commands of ``scripts/`` as modules, and the environment of processes that tests start."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_command(name: str) -> ModuleType:
    """Return ``scripts/NAME`` as a module; its ``main`` is not run."""
    module_name = f"command_{name.replace('-', '_')}"
    loader = SourceFileLoader(module_name, str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    loader.exec_module(module)
    return module


def clean_environment(**variables: str) -> dict[str, str]:
    """Return a process's environment with no setting of this package but ``variables``."""
    return {name: value for name, value in os.environ.items() if "MUSA" not in name} | variables
