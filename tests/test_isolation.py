"""Off, or without a MUSA device, this package leaves every process of SGLang as it is.

Two environments differ in nothing but this package (:mod:`tests.support.isolation`). In each, a
server of SGLang's own starts on the CPU with SGLang's own attention and answers a request; then
each of its processes describes itself (:mod:`tests.support.process_state`): what it has imported,
and every attribute of every module of SGLang, down to the members of its classes. Without this
package and with it, the descriptions must be equal.

Servers take minutes, so ``scripts/test -m long`` starts them: of the installed SGLang, and of three
releases whose sources are where ``SGLANG_RELEASES`` says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.engines.ports import held_port
from tests.support import nvidia_state, process_state
from tests.support.engine import EngineFailed, post, started
from tests.support.isolation import NAME, differences, install_package, link_libraries
from tests.support.releases import require_release

INSTALLED = "installed"
RELEASES = (INSTALLED, "0.5.11", "0.5.17", "0.5.23")
WITHOUT = "without"
SETTINGS: dict[str, dict[str, str]] = {
    WITHOUT: {}, "off": {envs.MODE: "off"}, "auto": {envs.MODE: "auto"},
}  # fmt: skip
PROCESSES = ("main", "scheduler", "detokenizer")
SECONDS = 900.0
"""For a server to answer, on a machine that is busy with other work."""
CONFIG = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 64, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 512, "do_layer_norm_before": True, "bos_token_id": 2,
}  # fmt: skip
"""A model without rotary positions, which want another library on a CPU without AMX."""
OPTIONS = {
    "--device": "cpu", "--dtype": "float32", "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch", "--load-format": "dummy", "--max-total-tokens": 512,
    "--mem-fraction-static": 0.3, "--random-seed": 0,
}  # fmt: skip
SWITCHES = ("--skip-tokenizer-init", "--disable-cuda-graph")

State = dict[str, Any]


# --- servers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder with all libraries, this package, nothing, and a model."""
    folder = tmp_path_factory.mktemp("isolation")
    link_libraries(folder / "libraries", repository)
    install_package(folder / "ours", repository, tmp_path_factory.mktemp("sources"))
    for name in ("nothing", "model"):
        (folder / name).mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module", params=RELEASES)
def states(
    request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, State]]:
    """The processes of a server, by setting of this package and name."""
    sources = sources_of(request.param)

    def run(name: str) -> dict[str, State]:
        package = root / ("nothing" if name == WITHOUT else "ours")
        path = [*sources, package, root / "libraries"]
        return run_server(root / "model", path, SETTINGS[name], tmp_path_factory.mktemp(name))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SETTINGS, pool.map(run, SETTINGS), strict=True))


def sources_of(release: str) -> list[Path]:
    """The folder to import a release from; none for the installed one."""
    return [] if release == INSTALLED else [require_release(release)]


def run_server(
    model: Path, path: list[Path], settings: dict[str, str], scratch: Path
) -> dict[str, State]:
    """Start a server, have it answer a request, and return what its processes say."""
    log, request = scratch / "log", scratch / "request.json"
    with held_port() as port, held_port() as nccl_port:
        options = OPTIONS | {"--model-path": model, "--port": port, "--nccl-port": nccl_port}
        words = [str(word) for option in options.items() for word in option]
        asked = {
            "path": list(map(str, path)), "folder": str(scratch), "arguments": [*words, *SWITCHES]
        }  # fmt: skip
        request.write_text(json.dumps(asked))
        command = [sys.executable, "-s", "-S", process_state.__file__, str(request)]
        # SGLang makes lists of sets, whose order is by the hashes of strings.
        python = {"PYTHONHASHSEED": "0", "PYTHONPATH": ""}
        with started(command, log, python | settings) as process:
            wait_for(lambda: "ready to roll" in log.read_text(), process, log)
            ask(port)
            (scratch / "now").touch()
            files = [scratch / f"{name}.json" for name in PROCESSES]
            wait_for(lambda: all(file.exists() for file in files), process, log)
    return {name: json.loads((scratch / f"{name}.json").read_text()) for name in PROCESSES}


def wait_for(event: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it is true, or fail with the server's log."""
    deadline = time.monotonic() + SECONDS
    while not event():
        if process.poll() is not None or time.monotonic() > deadline:
            raise EngineFailed("The server did not get there.", log)
        time.sleep(0.2)


def ask(port: int) -> None:
    """Have the server answer a request."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    answer = post(f"http://127.0.0.1:{port}/generate", body, timeout=SECONDS)
    assert len(answer["output_ids"]) == 4


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize("setting", ["off", "auto"])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_is_as_without_the_package(
    states: dict[str, dict[str, State]], process: str, setting: str
) -> None:
    """It has the same imports, and the same classes, functions and values in SGLang's modules."""
    without, with_it = states[WITHOUT][process], states[setting][process]
    assert list(differences(compared(without), compared(with_it))) == []


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize("process", PROCESSES)
def test_the_environments_differ_by_the_package(
    states: dict[str, dict[str, State]], process: str
) -> None:
    """Without it nothing of it is loaded; with it torch at least has called its entry point."""
    assert states[WITHOUT][process]["ours"] == []
    for setting in ("off", "auto"):
        assert f"{NAME}.guard" in states[setting][process]["ours"]
    modules = states[WITHOUT][process]["modules"]
    assert len(modules) > 50
    assert "sglang.srt.server_args" in modules


def compared(state: State) -> State:
    """Leave out the only part of a state that differs rightly."""
    return {key: value for key, value in state.items() if key != "ours"}


# --- what the comparison sees ---------------------------------------------------------------------


class Kept:
    value = 1

    def method(self) -> int:
        return self.value


def kept() -> None: ...


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that is made on the spot, and described as SGLang's are."""
    made = ModuleType("made")
    cls = type("Kept", (Kept,), dict(vars(Kept)) | {"__module__": made.__name__})
    vars(made).update(kept=kept, Kept=cls, TABLE={"fa3": kept}, NUMBER=3)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def state() -> State:
    """Describe this process, but for SGLang, of which other tests may have loaded all."""
    return process_state.describe(nvidia_state.described, "made")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda module: setattr(module, "kept", state), "/modules/made/kept"),
        (lambda module: setattr(module, "NUMBER", 4), "/modules/made/NUMBER"),
        (lambda module: setattr(module, "more", 1), "/modules/made/more"),
        (lambda module: module.TABLE.update(fa3=state), "/modules/made/TABLE"),
        (
            lambda module: setattr(module.Kept, "method", state),
            "/modules/made/Kept/members/method",
        ),
        (lambda module: setattr(module.Kept, "more", 1), "/modules/made/Kept/members/more"),
        (lambda _: sys.modules.update({"another": ModuleType("another")}), "/imported"),
        (lambda _: sys.meta_path.append(nvidia_state._StandInFinder()), "/meta path"),
        (lambda _: os.environ.update(ANOTHER="1"), "/environment/ANOTHER"),
    ],
)
def test_the_comparison_sees_one_change(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    change: Callable[[ModuleType], object],
    place: str,
) -> None:
    """Each kind of change that a plugin could make is a difference, at its place alone."""
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    monkeypatch.delenv("ANOTHER", raising=False)
    before = state()
    try:
        change(module)
        seen = list(differences(before, state()))
    finally:
        sys.modules.pop("another", None)
        os.environ.pop("ANOTHER", None)
    assert [line.partition(":")[0] for line in seen] == [place]
