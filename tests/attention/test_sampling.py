"""The output check of a serving backend: it counts, it reports, and it never raises."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.attention import sampling
from tests.support.backend import Model, attention_layer, mla_layer, replace_kernels


def served(monkeypatch: pytest.MonkeyPatch, share: str, mla: bool = False) -> tuple[Model, Any]:
    """A model of two layers, and its backend under this check."""
    monkeypatch.setenv(envs.CHECK, f"output:{share}")
    layers = [mla_layer(i) if mla else attention_layer(i) for i in range(2)]
    model = Model(layers, mla=mla)
    return model, model.backend()


def modes(backend: Any) -> dict[str, tuple[int, int]]:
    """Compared and wrong calls by mode."""
    report = backend.musa_fa3_report()["output_check"]["modes"]
    return {mode: (errors["compared"], errors["wrong"]) for mode, errors in report.items()}


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_every_mode_is_compared_and_right(mla: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of 1 compares each call of prefill, which may read raw keys, and decode."""
    model, backend = served(monkeypatch, "1", mla)
    requests = model.requests(0, 0)
    model.run_pass(backend, model.extend(requests, [70, 9]))
    model.run_pass(backend, model.decode(requests))
    assert modes(backend) == {"extend": (2, 0), "decode": (2, 0)}
    report = backend.musa_fa3_report()["output_check"]
    assert report["unchecked"] == {}
    assert all(errors["largest_error"] < 1e-4 for errors in report["modes"].values())
    assert json.loads(json.dumps(report)) == report


def test_raw_calls_of_upstream_are_a_mode_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding model without a cache calls the varlen function."""
    monkeypatch.setenv(envs.CHECK, "output:1.0")
    arguments = {"is_embedding": True, "chunked_prefill_size": -1, "disable_radix_cache": True}
    model = Model([attention_layer(0)], arguments=arguments)
    backend = model.backend()
    model.run_pass(backend, model.extend(model.requests(0, 0), [100, 30]))
    assert modes(backend) == {"extend, raw keys": (1, 0)}


def test_a_share_compares_about_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of eighty calls, within what chance allows."""
    model, backend = served(monkeypatch, "0.25")
    requests = model.requests(5, 9)
    for _ in range(40):
        model.run_pass(backend, model.decode(requests))
    compared, wrong = modes(backend)["decode"]
    assert 8 <= compared <= 34
    assert wrong == 0


def test_a_wrong_output_is_reported_and_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request gets what the kernels gave; the log and the report say how far off it was."""
    model, backend = served(monkeypatch, "1")

    def wrap(name: str, function: Any) -> Any:
        def call(**arguments: Any) -> Any:
            out = function(**arguments)
            return out if name == "get_scheduler_metadata" else out + 0.25

        return call

    replace_kernels(backend, wrap)
    step = model.decode(model.requests(100, 5))
    backend.init_forward_metadata(step.batch)
    with caplog.at_level(logging.WARNING):
        model.forward(backend, step, model.layers[0], model.inputs(step, model.layers[0]))
    assert modes(backend) == {"decode": (1, 1)}
    errors = backend.musa_fa3_report()["output_check"]["modes"]["decode"]
    assert errors["largest_error"] == pytest.approx(0.25, abs=1e-3)
    assert "differs from the reference by up to 0.25" in caplog.text


def test_what_cannot_be_compared_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context, and a reference that fails: both are served, and right."""
    model, backend = served(monkeypatch, "1")
    requests = model.requests(300, 5)
    monkeypatch.setattr(sampling, "MOST_KEYS", 200)
    model.run_pass(backend, model.decode(requests))
    model.run_pass(backend, model.decode(requests[1:]))

    def fail() -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(sampling, "reference_kernels", fail)
    model.run_pass(backend, model.decode(requests[1:]))
    report = backend.musa_fa3_report()["output_check"]
    assert report["unchecked"] == {"long": 2, "OutOfMemoryError": 2}
    assert modes(backend) == {"decode": (2, 0)}


@pytest.mark.parametrize("longest", [32768, 0], ids=["compared", "too long to compare"])
def test_the_log_says_now_and_then_what_was_seen(
    longest: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole report, after so many calls: also where none of them could be compared."""
    model, backend = served(monkeypatch, "1")
    monkeypatch.setattr(sampling, "MOST_KEYS", longest)
    monkeypatch.setattr(sampling, "CALLS_A_LINE", 4)
    requests = model.requests(5)
    with caplog.at_level(logging.INFO, logger=sampling.logger.name):
        for _ in range(4):
            model.run_pass(backend, model.decode(requests))
    lines = [line for line in caplog.messages if "compared outputs" in line]
    assert len(lines) == 2
    assert lines[-1].endswith(str(backend.musa_fa3_report()["output_check"]))


@pytest.mark.parametrize(
    "value", ["output:0", "output:1.5", "output:", "output:few", "metadata:0.1"]
)
def test_a_share_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable, the value and what it can be."""
    with pytest.raises(envs.SettingsError, match=rf"{envs.CHECK}='{value}'.*output:0\.01"):
        envs.Settings.from_environ({envs.CHECK: value})


def test_off_wraps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a share the object has no method of its own in the way of a call."""
    monkeypatch.delenv(envs.CHECK, raising=False)
    backend = Model([attention_layer(0)]).backend()
    assert not [name for name in vars(backend) if name.startswith("call_")]
    assert backend.musa_fa3_report()["output_check"] is None


def code_that_runs(backend: Any, model: Model, requests: Any) -> list[CodeType]:
    """The functions of this package that one decode calls, in their order."""
    root = Path(sampling.__file__).parents[1]
    seen: list[CodeType] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(root):
            seen.append(frame.f_code)

    step = model.decode(requests)
    sys.setprofile(note)
    try:
        model.run_pass(backend, step)
    finally:
        sys.setprofile(None)
    return [code for code in seen if "kernels" not in Path(code.co_filename).parts]


@pytest.mark.parametrize("check", ["off", "output:0.01"])
def test_a_check_that_is_off_costs_a_call_nothing(
    monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """No function on the way of a call is of the check's module or asks for the check."""
    monkeypatch.setenv(envs.CHECK, check)
    model = Model([attention_layer(index) for index in range(3)])
    backend, requests = model.backend(), model.requests(5, 9)
    model.run_pass(backend, model.decode(requests))
    codes = code_that_runs(backend, model, requests)
    assert {"forward_decode", "begin_layer", "matches"} <= {code.co_name for code in codes}
    of_check = [
        code.co_name
        for code in codes
        if code.co_filename == sampling.__file__ or "_sampler" in code.co_names
    ]
    assert bool(of_check) == (check != "off")
