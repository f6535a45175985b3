"""The state of every process of an SGLang server on a CPU, as JSON.

``python -s -S process_state.py REQUEST`` serves as ``python -m sglang.launch_server`` does. REQUEST
is a JSON file: ``path``, the folders to import from, after Python's own library; ``arguments`` of
the server; ``folder``, for the answers. Each process that the server spawns runs the top of this
file before anything of torch or SGLang, as multiprocessing has it. When a file ``now`` is in the
folder, a thread of each process describes it there. Of this package nothing is imported: whether
anything of it is loaded is for SGLang and torch to decide.
"""

from __future__ import annotations

import builtins
import importlib
import json
import logging
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "PROCESS_STATE_FOLDER"
"""The variable that names the folder of the answers to the processes that are spawned."""
OURS = "sglang_musa_ext"
VARIABLES = (FOLDER, "SGLANG_RUN_ID")
"""What each server has of its own in the environment, beside the settings of this package."""
MADE_ANEW = ("__pydantic_core_schema__", "global_diff_realtime_monotonic", "_parallel_pid")
"""Names of values that hold an address, a time or a process: no two servers have the same."""
ROLES = ("scheduler", "detokenizer")
"""The names that SGLang gives to the processes that it spawns."""


def helpers() -> Any:
    """Return the module beside this one, whose folder holds names that no import must find."""
    sys.path.append(str(Path(__file__).parent))
    try:
        return importlib.import_module("nvidia_state")
    finally:
        sys.path.pop()


def describe(described: Any, package: str = "sglang") -> dict[str, Any]:
    """Describe this process: what it has imported, and everything in the modules of a package."""
    modules = dict(sys.modules)
    return {
        "imported": sorted(name for name in modules if not name.startswith(OURS)),
        "ours": sorted(name for name in modules if name.startswith(OURS)),
        "modules": {
            name: describe_module(module, described)
            for name, module in modules.items()
            if name.partition(".")[0] == package
        },
        "meta path": [getattr(each, "__qualname__", type(each).__name__) for each in sys.meta_path],
        "hooks": list(map(described, (sys.excepthook, sys.displayhook, builtins.__import__))),
        "signals": {str(number): described(signal.getsignal(number)) for number in signal.Signals},
        "threads": sorted(re.sub(r"\d+", "N", each.name) for each in threading.enumerate()),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name not in VARIABLES and not name.startswith("SGLANG_MUSA")
        },
        "log": [type(handler).__qualname__ for handler in logging.getLogger().handlers],
    }  # fmt: skip


def describe_module(module: ModuleType, described: Any) -> dict[str, Any]:
    """Describe every attribute of a module, and the members of the classes that it defines."""
    attributes = {}
    for name, value in dict(vars(module)).items():
        if name.startswith("__") or name in MADE_ANEW:
            continue
        attributes[name] = described(value)
        if isinstance(value, type) and value.__module__ == module.__name__:
            attributes[name] = describe_class(value, described)
    return attributes


def describe_class(cls: type, described: Any) -> dict[str, Any]:
    """Describe a class by its bases and everything in its dictionary."""
    volatile = ("getset_descriptor", "_abc_data", "member_descriptor")
    members = {
        name: described(value)
        for name, value in dict(vars(cls)).items()
        if type(value).__name__ not in volatile and name not in MADE_ANEW
    }
    bases = [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]
    return {"bases": bases, "members": members}


def role() -> str:
    """Return the name of this process among those of the server."""
    titles: Any = sys.modules.get("setproctitle")
    title = titles.getproctitle() if titles else ""
    return next((name for name in ROLES if name in title), "main")


def answer_when_asked(folder: Path, described: Any) -> None:
    """Wait for the file ``now``, and write what this process is by then."""
    while not (folder / "now").exists():
        time.sleep(0.1)
    written = folder / f"{role()}.part"
    written.write_text(json.dumps(describe(described), sort_keys=True), encoding="utf-8")
    written.rename(written.with_suffix(".json"))


def start_answering() -> None:
    """Begin to wait in a thread, in this process of a server."""
    nvidia_state = helpers()
    sys.meta_path.append(nvidia_state._StandInFinder())
    arguments = Path(os.environ[FOLDER]), nvidia_state.described
    threading.Thread(target=answer_when_asked, args=arguments, daemon=True).start()


def serve(request: Path) -> None:
    """Run the server that a request asks for."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    os.environ[FOLDER] = asked["folder"]
    # The first entry is this file's folder, whose names are for tests alone.
    sys.path[:] = [*sys.path[1:], *asked["path"]]
    start_answering()
    sys.argv = ["sglang.launch_server", *asked["arguments"]]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)


if __name__ == "__mp_main__":
    start_answering()
if __name__ == "__main__":
    serve(Path(sys.argv[1]))
