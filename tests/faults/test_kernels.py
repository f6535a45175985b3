"""Kernels that fail: what is said, and that neither this request nor the next gets a wrong answer.

Faults of the library itself have their tests elsewhere: missing, foreign, too old or incomplete in
``tests/kernels/test_mate.py`` and ``test_mate_identity.py``; settings that are wrong, or bad for
these kernels, with message and exit status of a server, in ``tests/test_plugin_processes.py``; an
exhausted workspace in ``tests/attention``. Failing kernels in random places are among what
``tests/fuzzing`` does. Here a kernel fails in the middle of a pass, a plan has another shape than
it should, the memory for plans cannot be had, and an engine loses its scheduler by that.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_musa_ext import patching
from sglang_musa_ext.kernels.reference import RefusedType, RefusedValue
from tests.support.backend import Model, attention_layer, mla_layer, replace_kernels
from tests.support.engine import EngineCase, EngineServer, Request, ask_engine
from tests.support.forks import fork_always
from tests.support.tiny_models import llama, tokens

FAULTS = {
    "out of memory": torch.OutOfMemoryError("MUSA out of memory. Tried to allocate 2.00 GiB"),
    "assertion": AssertionError("Add config for headdim 72, headdim_v 72"),
    "device error": RuntimeError("MUSA error: an illegal memory access was encountered"),
}


def model_of(mla: bool) -> Model:
    """Three like layers."""
    layers = [mla_layer(i) if mla else attention_layer(i) for i in range(3)]
    return Model(layers, mla=mla)


def failing(backend: Any, name: str, at: int, error: Exception) -> None:
    """Let the ``at``-th call of a kernel function raise ``error``, once."""
    calls = 0

    def wrap(function_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            nonlocal calls
            if function_name == name:
                calls += 1
                if calls == at:
                    raise error
            return function(**arguments)

        return call

    replace_kernels(backend, wrap)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [1, 2])
def test_a_kernel_that_fails_in_a_pass_leaves_the_next_one_right(
    at: int, fault: str, mla: bool
) -> None:
    """The error comes out as it is, from the first layer or a later one; the next passes are right,
    of the same requests and of others.
    """
    model = model_of(mla)
    backend, requests = model.backend(), model.requests(100, 5, 300)
    failing(backend, "flash_attn_with_kvcache", at, FAULTS[fault])
    step = model.decode(requests)
    with pytest.raises(type(FAULTS[fault])) as raised:
        model.run_pass(backend, step)
    assert raised.value is FAULTS[fault]
    model.run_pass(backend, step)
    model.run_pass(backend, model.decode(requests[1:]))
    model.run_pass(backend, model.extend(model.requests(0, 64), [70, 9]))


@pytest.mark.parametrize("at", [1, 2])
def test_a_plan_that_cannot_be_computed_leaves_the_next_pass_right(at: int) -> None:
    """Nothing is remembered of it: the same step plans anew."""
    layers = [attention_layer(0), attention_layer(1, heads=8), attention_layer(2)]
    model = Model(layers)
    backend, requests = model.backend(), model.requests(400, 5)
    failing(backend, "get_scheduler_metadata", at, FAULTS["out of memory"])
    step = model.decode(requests)
    with pytest.raises(torch.OutOfMemoryError, match="MUSA out of memory"):
        model.run_pass(backend, step)
    model.run_pass(backend, step)
    model.run_pass(backend, model.decode(requests[:1]))


@pytest.mark.parametrize(
    ("bend", "error", "message"),
    [
        (lambda plan: plan[:-1], RefusedValue, "metadata buffer is too small"),
        (lambda plan: plan.view(4, -1), RefusedValue, r"scheduler_metadata.shape is \(4, \d\)"),
        (lambda plan: plan.long(), RefusedType, "scheduler_metadata is torch.int64"),
    ],
    ids=["short", "two dimensions", "dtype"],
)
def test_a_plan_of_another_shape_is_refused(
    bend: Callable[[torch.Tensor], torch.Tensor], error: type[Exception], message: str
) -> None:
    """By name, before anything is computed with it."""
    model = model_of(mla=False)
    backend = model.backend()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name != "get_scheduler_metadata":
            return function
        return lambda **arguments: bend(function(**arguments))

    replace_kernels(backend, wrap)
    with pytest.raises(error, match=message):
        model.run_pass(backend, model.decode(model.requests(400, 5)))


def test_a_workspace_that_cannot_be_had_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is not built; the next one, with memory, is, and is right."""
    model = model_of(mla=True)
    zeros = torch.zeros

    def without_memory(*shape: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            raise torch.OutOfMemoryError("MUSA out of memory. Tried to allocate 77.00 MiB")
        return zeros(*shape, **options)

    # Of a size that no living backend of another test has.
    monkeypatch.setenv("SGLANG_MUSA_EXT_MLA_WORKSPACE_MB", "77")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", without_memory)
        with pytest.raises(torch.OutOfMemoryError, match=r"77\.00 MiB"):
            model.backend()
    model.run_pass(model.backend(), model.decode(model.requests(100, 5)))


# --- a whole engine -------------------------------------------------------------------------------

LAST_CALL = 30


def kernels_fail_later() -> None:
    """Let the reference kernels raise from their 30th call on, in whatever process."""
    from sglang_musa_ext.kernels import reference

    function, calls = reference.flash_attn_with_kvcache, 0

    @functools.wraps(function)
    def call(*tensors: Any, **arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= LAST_CALL:
            raise RuntimeError("MUSA error: an illegal memory access was encountered")
        return function(*tensors, **arguments)

    patching.replace(reference, "flash_attn_with_kvcache", call)


def status_of(case: EngineCase) -> int:
    """The exit status of a process that runs ``case``; 0 if it got its answers."""
    fork_always()
    process = os.fork()
    if process == 0:
        ask_engine(case)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.engine
def test_an_engine_whose_kernel_fails_ends_and_the_next_one_is_right(
    engines: EngineServer,
) -> None:
    """A device error in the middle of an answer: the engine ends with a status of its own and says
    why, and nobody gets an answer; started again it says what transformers says.
    """
    model, asked = engines.model(llama()), Request(tokens(40, seed=3), new_tokens=40)
    dying = EngineCase(model, ((asked,),), before_boot=kernels_fail_later)
    assert engines.call(status_of, dying) != 0
    log = max(engines._directory.glob("*-status_of.log"), key=lambda path: path.stat().st_mtime)
    assert "MUSA error: an illegal memory access was encountered" in log.read_text()
    run = engines.run(EngineCase(model, ((asked,),)))
    assert run.tokens == [engines.greedy(model, asked)[0]]
