"""The command ``sglang-musa-ext``, also ``python -m sglang_musa_ext``.

Each of its commands is a module with a ``main`` of its own, imported when it is asked for:
``doctor`` and ``install`` run where no torch is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from sglang_musa_ext import __version__

COMMANDS: Mapping[str, tuple[str, str]] = {
    "doctor": (
        "sglang_musa_ext.doctor.command",
        "say what would serve here, and what stands in the way",
    ),
    "install": ("sglang_musa_ext.install", "install Moore Threads' packages that belong together"),
    "validate": (
        "sglang_musa_ext.validation.command",
        "check the installed stack on this device, and write one report",
    ),
    "bench": (
        "sglang_musa_ext.benchmark.command",
        "measure this package beside SGLang's own backends",
    ),
    "prewarm": (
        "sglang_musa_ext.prewarm",
        "have MATE compile a model's kernels before its first request",
    ),
}
"""By name: the module whose ``main(arguments)`` returns the exit status, and what it is for."""
STACK = ("torch", "numpy", "sglang")
"""Modules of the stack that is served on, which a command may find missing."""


class StackError(ModuleNotFoundError):
    """A command was run with a Python that lacks a part of the stack."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (None: the command line) name; return its exit status."""
    name, *options = sys.argv[1:] if arguments is None else arguments or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"{name!r} is no command of sglang-musa-ext.\n\n{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    try:
        return int(importlib.import_module(module).main(options))
    except ModuleNotFoundError as error:
        if error.name not in STACK:
            raise
        lacking = StackError(
            f"sglang-musa-ext {name} needs {error.name}, which {sys.executable} lacks. Run "
            "sglang-musa-ext doctor, which says what belongs there."
        )
        print(lacking, file=sys.stderr)
        return 2


def usage() -> str:
    """Return the help of the command as a whole."""
    rows = [f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sglang-musa-ext COMMAND [OPTIONS]",
            "",
            f"sglang-musa-ext {__version__}: Moore Threads FA3 attention for SGLang. Commands:",
            "",
            *rows,
            "",
            "sglang-musa-ext COMMAND --help says what a command does, takes and returns.",
            "On a new machine: install, then doctor, then validate; serve with sglang serve.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
