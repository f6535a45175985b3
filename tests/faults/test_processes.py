"""Processes in odd states: what each does, and that FA3 is ours or refused in all of them.

Covered elsewhere: SGLang's loader leaving the plugin out (``SGLANG_PLUGINS``, ``SGLANG_PLATFORM``,
a broken import, no loading at all) in ``tests/test_guard.py``; registering twice in one process in
``tests/test_plugin.py``; a fork after the imports in every case of ``tests/engine``, whose engines
are forks; processes that differ in their settings in ``tests/engine/test_nodes.py``. Here the
plugin is imported twice, registered by many threads, and beside another plugin that claims ``fa3``;
the guard stands beside another import hook and ``torch.compile``; an engine is terminated while it
starts, and its scheduler is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import EngineCase, EngineServer, Request, booted
from tests.support.forks import fork_always
from tests.support.tiny_models import llama, tokens
from tests.support.warm import WarmPython

ON = {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "reference"}
# One process imports SGLang and forks for each case, so that each loads the plugin anew.
PROCESSES = """
import json, os, sys
from sglang_musa_ext.cpu.stand_ins import prepare_process
prepare_process()
import types
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention import flashattention_backend

# Reading SGLang's sources takes a second, and sixteen threads that read at once some minutes.
import functools
from sglang_musa_ext.upstream import check
check_upstream = functools.cache(check.check_upstream)
check_upstream(None, None, used_by=check.SERVING)
check_upstream(used_by=("ranks",))
check.check_upstream = check_upstream

runner = types.SimpleNamespace(
    use_mla_backend=False, spec_algorithm=types.SimpleNamespace(is_none=lambda: True)
)

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang_musa_ext"]:
        del sys.modules[name]

def tried(build):
    try:
        build()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"

def imported_twice():
    from sglang_musa_ext import plugin
    plugin.register()
    first = ATTENTION_BACKENDS["fa3"]
    forget()
    from sglang_musa_ext import plugin
    plugin.register()
    return {"again": ATTENTION_BACKENDS["fa3"] is plugin.create_musa_fa3_backend is not first}

def in_threads():
    import threading
    from sglang_musa_ext import plugin
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=plugin.register) for _ in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    depth, method = 0, DraftBackendFactory._create_fa_decode_backend
    while hasattr(method, "__wrapped__"):
        depth, method = depth + 1, method.__wrapped__
    return {"ours": ATTENTION_BACKENDS["fa3"] is plugin.create_musa_fa3_backend, "depth": depth}

def another_class():
    from sglang_musa_ext import plugin
    plugin.register()
    class Another(flashattention_backend.FlashAttentionBackend):
        pass
    Another.__module__ = "another_plugin"
    ATTENTION_BACKENDS["fa3"] = Another
    return {"fa3": tried(lambda: ATTENTION_BACKENDS["fa3"](runner))}

def claimed_before():
    from sglang_musa_ext import plugin
    def create_another(runner): return "another"
    create_another.__module__ = "another_plugin"
    ATTENTION_BACKENDS["fa3"] = create_another
    plugin.register()
    return {"fa3": tried(lambda: ATTENTION_BACKENDS["fa3"](runner))}

for name in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print("RESULT" + json.dumps([name, globals()[name]()]), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""
CASES = ("imported_twice", "in_threads", "another_class", "claimed_before")


def run_script(
    warm: WarmPython, script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script under these settings alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG")}
    return warm.run([sys.executable, "-c", script, *arguments], env=inherited | environment)


@pytest.fixture(scope="module")
def processes(warm: WarmPython) -> dict[str, dict[str, Any]]:
    """Return the answer of each case's process."""
    done = run_script(warm, PROCESSES, json.dumps(CASES), **ON)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(lines) == len(CASES), done.stdout + done.stderr
    return dict(json.loads(line.removeprefix("RESULT")) for line in lines)


def test_a_plugin_that_is_imported_twice_serves(processes: dict[str, dict[str, Any]]) -> None:
    """The module that was imported last does; nothing is built by a module that is gone."""
    assert processes["imported_twice"] == {"again": True}


def test_threads_that_register_at_once_register_once(
    processes: dict[str, dict[str, Any]],
) -> None:
    """Sixteen threads leave what one leaves: one factory, and one wrapper around upstream's."""
    assert processes["in_threads"] == {"ours": True, "depth": 1}


def test_another_plugins_backend_is_refused_by_its_class(
    processes: dict[str, dict[str, Any]],
) -> None:
    """A plugin that claims ``fa3`` after ours, with a class of upstream's: the guard names it."""
    assert processes["another_class"]["fa3"].startswith("NotServedByUsError: ")
    assert "another_plugin" in processes["another_class"]["fa3"]


def test_a_plugin_that_claimed_fa3_before_is_not_replaced_without_a_word(
    processes: dict[str, dict[str, Any]],
) -> None:
    """Both want to serve: the server does not start, and the error names the other."""
    answer = processes["claimed_before"]["fa3"]
    assert answer.startswith("PluginError: ")
    assert "another_plugin.create_another" in answer


GUARDED = """
import importlib.abc, sys

class Hook(importlib.abc.MetaPathFinder):
    seen = []
    def find_spec(self, name, path=None, target=None):
        self.seen.append(name)
        return None

import torch
ours = [finder for finder in sys.meta_path if type(finder).__module__ == "sglang_musa_ext.patching"]
hook, places = Hook(), [sys.meta_path.index(finder) for finder in ours]
sys.meta_path.insert(min(places) if sys.argv[1] == "ahead" else max(places) + 1, hook)
from sglang_musa_ext.cpu.stand_ins import prepare_process
prepare_process()
double = torch.compile(lambda x: x + x, backend="eager")
print("compiled", double(torch.ones(2)).tolist())
from sglang.srt.layers.attention import flashattention_backend as upstream
print("seen", upstream.__name__ in hook.seen)
try:
    upstream.FlashAttentionBackend(None)
except Exception as error:
    print("refused", type(error).__name__)
print("compiled", double(torch.ones(2)).tolist())
"""


@pytest.mark.parametrize("order", ["ahead", "behind"])
def test_the_guard_works_beside_another_import_hook_and_a_compiler(
    warm: WarmPython, order: str
) -> None:
    """The other hook sees every import, Dynamo compiles as ever, and FA3 is refused."""
    done = run_script(warm, GUARDED, order, **ON)
    assert done.stdout.splitlines() == [
        "compiled [2.0, 2.0]",
        "seen True",
        "refused NotServedByUsError",
        "compiled [2.0, 2.0]",
    ], done.stderr[-3000:]


# --- engines that are ended -----------------------------------------------------------------------


def ended(case: EngineCase, end: Callable[[int], None]) -> tuple[int, list[str]]:
    """Boot ``case`` in a fork that ``end`` ends; its exit status, and processes that outlive it."""
    from sglang.srt.utils import kill_itself_when_parent_died

    fork_always()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        # A group of its own outlives the task where that fails.
        kill_itself_when_parent_died()
        with booted(case) as engine:
            while True:
                engine.generate(
                    input_ids=list(tokens(20)),
                    sampling_params={"temperature": 0, "max_new_tokens": 4},
                )
    end(process)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    deadline = time.monotonic() + 20
    while (alive := _group(process)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for number in alive:
        os.kill(int(number), signal.SIGKILL)
    return status, alive


def _group(leader: int) -> list[str]:
    """The processes of a group that have not ended."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = folder.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            numbers.append(folder.name)
    return numbers


def _scheduler(leader: int) -> int:
    """Wait for the group's process that is called a scheduler, its first act."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for number in _group(leader):
            with contextlib.suppress(OSError):
                if "scheduler" in Path(f"/proc/{number}/cmdline").read_text(errors="replace"):
                    return int(number)
        time.sleep(0.01)
    raise TimeoutError("no scheduler started within 60 s")


def terminate_at_start(process: int) -> None:
    """When its scheduler has begun, and loads the model: a server that serves first answers."""
    _scheduler(process)
    os.kill(process, signal.SIGTERM)


def kill_scheduler(process: int) -> None:
    """While it serves."""
    number = _scheduler(process)
    time.sleep(3)
    os.kill(number, signal.SIGKILL)


@pytest.mark.engine
@pytest.mark.parametrize("end", [terminate_at_start, kill_scheduler])
def test_an_engine_that_is_ended_leaves_no_process_and_the_next_is_right(
    engines: EngineServer, end: Callable[[int], None]
) -> None:
    """Ended while it starts, or without its scheduler: another status than 0, no process is left,
    and an engine that is started again says what transformers says.
    """
    model, asked = engines.model(llama()), Request(tokens(40, seed=3))
    status, alive = engines.call(ended, EngineCase(model), end)
    assert (status != 0, alive) == (True, [])
    run = engines.run(EngineCase(model, ((asked,),)))
    assert run.tokens == [engines.greedy(model, asked)[0]]
