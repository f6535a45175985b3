"""Commands under test in forks of a process that has imported what SGLang imports, but not SGLang.

A fresh Python takes some fourteen seconds of a core to import SGLang, ten of them for libraries
that have nothing to do with what is tested, and an engine has three such processes. Here SGLang and
this package are imported anew by each command, and its children are forks of it. What only a fresh
interpreter shows (its flags, ``site``, what has been imported, spawned children) is left to tests
that start one: a server in ``tests/engine/test_engine.py``, ``tests/test_isolation.py``,
``tests/test_startup.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import inspect
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Listener
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tests.support.forks import (
    ForkServer,
    fork_always,
    freeze_imports,
    kill_group,
    use_one_thread_in_forks,
)

LIBRARIES = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "openai.types.chat",
    "openai.types.responses",
    "IPython",
    "PIL.Image",
    "aiohttp",
    "einops",
    "fastapi",
    "httpx",
    "networkx",
    "requests",
    "uvicorn",
    "zmq.asyncio",
)
"""Without transformers, which remembers whether ``torchvision`` was there when it was imported."""
ENVIRONMENT = {
    # What was imported under them cannot be undone in a fork.
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "TRITON_INTERPRET": "1",
    "PYTHONWARNINGS": "ignore",
}
OURS = ("sglang_musa_ext", "tests")
"""Packages that a command imports anew, whatever this module has imported."""


class WarmPython(ForkServer):
    """A process that forks for each command, one at a time."""

    def __init__(self, directory: Path) -> None:
        """Start it; outputs go through files of ``directory``."""
        super().__init__(__name__, directory, {**os.environ, **ENVIRONMENT})

    def run(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 300.0,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command``, this Python's, as ``subprocess.run`` would.

        Args:
            command: ``sys.executable``, then ``-c`` and code, ``-m`` and a module, or the path of a
                script, then arguments.
            env: its whole environment; ``None``: this process's.
            cwd: its folder; ``None``: this process's.
            timeout: seconds after which it is killed, and ``subprocess.TimeoutExpired`` raised.
            check: raise ``subprocess.CalledProcessError`` for a status other than 0.
        """
        python, *words = map(str, command)
        assert python == sys.executable, command
        assert _can_fork(words), command
        outputs = tuple(str(self._directory / name) for name in ("stdout", "stderr"))
        asked = (words, dict(os.environ if env is None else env), str(cwd or Path.cwd()))
        with self._connect() as connection:
            connection.send((outputs, asked))
            task = connection.recv()
            expired = not connection.poll(timeout)
            # What it has started ends with it.
            kill_group(task)
            status = connection.recv()
        stdout, stderr = (Path(name).read_text(errors="replace") for name in outputs)
        if expired:
            raise subprocess.TimeoutExpired(list(command), timeout, stdout, stderr)
        done = subprocess.CompletedProcess(list(command), status, stdout, stderr)
        if check:
            done.check_returncode()
        return done


# --- in its process -------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Import the libraries, then fork for each command that comes to ``address``."""
    for name in LIBRARIES:
        importlib.import_module(name)
    use_one_thread_in_forks()
    freeze_imports()
    with Listener(address) as listener:
        while True:
            with listener.accept() as connection:
                outputs, (words, environ, folder) = connection.recv()
                task = os.fork()
                if task == 0:
                    os.setsid()
                    for descriptor, name in enumerate(outputs, 1):
                        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
                    be_command(words, environ, folder)
                connection.send(task)
                status = os.waitstatus_to_exitcode(os.waitpid(task, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    connection.send(status)


def be_command(words: Sequence[str], environ: Mapping[str, str], folder: str) -> NoReturn:
    """Be the process of ``python`` with these arguments, until its end."""
    # What the process that was forked would do at its end is not this one's.
    atexit._clear()
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.meta_path[:] = [each for each in sys.meta_path if not _is_ours(each)]
        # In place of the folder that this process was started in.
        given = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:] = [folder, *given, *_INSTALLED]
        sys.path_importer_cache.clear()
        sys.stdin = os.fdopen(0, closefd=False)
        fork_always()
        vars(subprocess)["Popen"] = ForkingPopen
        load_torchs_extensions()
        run_main(*words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)


def load_torchs_extensions() -> None:
    """Do what a command's first import of torch would do at its end."""
    import torch

    if torch._is_device_backend_autoload_enabled():
        torch._import_device_backends()  # type: ignore[no-untyped-call]


def run_main(*words: str) -> None:
    """Run a module (``-m``), code (``-c``) or a script as the main program."""
    match words:
        case "-m", module, *arguments:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case "-c", code, *arguments:
            sys.argv, sys.path[0] = ["-c", *arguments], ""
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        case script, *arguments:
            sys.argv = [script, *arguments]
            sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")


def _can_fork(words: Sequence[str]) -> bool:
    """Return whether these arguments of Python are those that :func:`run_main` takes."""
    return words[0] in ("-m", "-c") or not words[0].startswith("-")


class ForkingPopen(subprocess.Popen[Any]):
    """``subprocess.Popen`` whose ``python`` is a fork, as long as SGLang is not imported."""

    def _execute_child(self, *given: Any) -> None:
        """Start the process, as the method of Python's own class that this stands for."""
        call = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        python, *words = [str(word) for word in call["args"]]
        if python != sys.executable or not _can_fork(words) or "sglang" in sys.modules:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        pipes = [call[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        environ = dict(os.environ if call["env"] is None else call["env"])
        folder = str(call["cwd"] or Path.cwd())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if call["start_new_session"]:
                os.setsid()
            _take_descriptors(pipes, {0, 1, 2, *call["pass_fds"]})
            be_command(words, environ, folder)
        self._child_created = True
        self._close_pipe_fds(*(call[name] for name in _PIPES))  # type: ignore[attr-defined]


_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_INSTALLED: list[str] = sys.path[1:]
"""Where installed packages are, and Python's own; before them is the folder of this process."""


def _is_ours(finder: object) -> bool:
    return type(finder).__module__.partition(".")[0] in OURS


def _take_descriptors(pipes: Sequence[int], kept: set[int]) -> None:
    """Make ``pipes`` this process's standard streams, and close what is not ``kept``."""
    # Copies first: one may have the number that another is to get.
    copies = [descriptor if descriptor < 0 else os.dup(descriptor) for descriptor in pipes]
    for number, descriptor in enumerate(copies):
        if descriptor >= 0:
            os.dup2(descriptor, number)
    for descriptor in [int(link.name) for link in Path("/proc/self/fd").iterdir()]:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


if __name__ == "__main__":
    serve(sys.argv[1])
