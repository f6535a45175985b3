"""The validation kit passes on the reference, fails on broken kernels, and always reports."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext import envs
from sglang_musa_ext.engines import changes as engine_changes
from sglang_musa_ext.engines.process import FORCE_UPDATE, EngineDied
from sglang_musa_ext.kernels.provider import FA3Kernels, reference_kernels
from sglang_musa_ext.validation import command as validate
from sglang_musa_ext.validation import engine as validate_engine
from sglang_musa_ext.validation import graphs as validate_graphs
from sglang_musa_ext.validation import memcheck as validate_memcheck
from sglang_musa_ext.validation import modes as validate_modes
from sglang_musa_ext.validation import numerics as validate_numerics
from sglang_musa_ext.validation.report import ABSENT, FAIL, PASS, SKIP, Outcome, Report
from tests.support.warm import WarmPython

CPU = torch.device("cpu")


def outcome_of(name: str, kernels: FA3Kernels, dtype: torch.dtype = torch.float32) -> Outcome:
    [case] = [case for case in validate_numerics.cases() if case.name == name]
    return validate_numerics.run_case(name, case, validate_numerics.Setting(kernels, CPU, dtype))


def without(*names: str) -> FA3Kernels:
    """Kernels that ignore these arguments without a word."""
    kernels = reference_kernels()

    def deaf(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **arguments: function(
            **{name: arguments[name] for name in arguments.keys() - set(names)}
        )

    return dataclasses.replace(
        kernels,
        flash_attn_with_kvcache=deaf(kernels.flash_attn_with_kvcache),
        flash_attn_varlen_func=deaf(kernels.flash_attn_varlen_func),
    )


@pytest.mark.parametrize(
    ("argument", "case"),
    [
        ("window_size", "decode, window"),
        ("window_size", "varlen, window"),
        ("softcap", "decode, softcap"),
        ("sinks", "verify of 4, sinks"),
        ("causal", "chunked prefill with prefix"),
        ("softmax_scale", "decode"),
        ("softmax_scale", "MLA decode, planned and reused"),
    ],
)
def test_kernels_that_ignore_an_argument_fail(argument: str, case: str) -> None:
    """Every argument that kernels could drop has a case that shows it, even in bfloat16."""
    torch.set_num_threads(1)
    assert outcome_of(case, reference_kernels(), torch.bfloat16).status == PASS
    outcome = outcome_of(case, without(argument), torch.bfloat16)
    assert outcome.status == FAIL
    assert outcome.numbers["error"] > outcome.numbers["allowed"]


FP8 = torch.float8_e4m3fn


def fp8_outcome_of(name: str, kernels: FA3Kernels) -> Outcome:
    [case] = [case for case in validate_numerics.fp8_cases() if case.name == name]
    return validate_numerics.run_case(name, case, validate_numerics.Setting(kernels, CPU, FP8))


@pytest.mark.parametrize(
    ("argument", "case"),
    [
        ("window_size", "decode, window"),
        ("softcap", "verify of 4, softcap"),
        ("causal", "chunked prefill with prefix"),
        ("softmax_scale", "decode"),
        ("k_descale", "decode, scales"),
        ("v_descale", "prefill, scales"),
    ],
)
def test_kernels_that_ignore_an_argument_over_an_fp8_cache_fail(argument: str, case: str) -> None:
    """Rounding to fp8 hides no argument that kernels drop."""
    torch.set_num_threads(1)
    assert fp8_outcome_of(case, reference_kernels()).status == PASS
    outcome = fp8_outcome_of(case, without(argument))
    assert outcome.status == FAIL
    assert outcome.numbers["error"] > outcome.numbers["allowed"]


@pytest.mark.parametrize(("release", "served"), [((0, 2, 2), False), ((0, 2, 3), True)])
def test_an_fp8_cache_is_checked_where_kernels_read_one(
    release: tuple[int, ...], served: bool
) -> None:
    """Older kernels have no such cases, so that nothing is reported as skipped."""
    names = validate_numerics.named_cases(reference_kernels(release=release), quick=True)
    assert any(name.startswith("float8_e4m3fn: ") for name in names) == served


def test_kernels_that_share_one_workspace_fail() -> None:
    """MLA plans that land in each other's slot show."""
    kernels = reference_kernels()
    shared = torch.full((1 << 18,), 255, dtype=torch.uint8)

    def call(**arguments: Any) -> Any:
        if isinstance(plan := arguments["scheduler_metadata"], tuple):
            arguments["scheduler_metadata"] = (shared, plan[1])
        return kernels.flash_attn_with_kvcache(**arguments)

    broken = dataclasses.replace(kernels, flash_attn_with_kvcache=call)
    assert outcome_of("MLA, two slots", kernels).status == PASS
    assert outcome_of("MLA, two slots", broken).status == FAIL


def test_a_refusal_by_name_is_no_failure() -> None:
    """A case that the provider cannot serve is skipped, with its words."""
    outcome = outcome_of(
        "varlen, softcap", dataclasses.replace(reference_kernels(), flash_attn_varlen_func=_refuse)
    )
    assert outcome.status == SKIP
    assert "no softcap here" in outcome.reason


def _refuse(**_: Any) -> Any:
    from sglang_musa_ext.kernels.provider import UnsupportedKernelArgument

    raise UnsupportedKernelArgument("no softcap here")


def test_an_error_is_a_failure() -> None:
    """An exception of the kernels is a result like a wrong number."""

    def call(**_: Any) -> Any:
        raise RuntimeError("MUSA error: an illegal memory access was encountered")

    outcome = outcome_of(
        "decode", dataclasses.replace(reference_kernels(), flash_attn_with_kvcache=call)
    )
    assert (outcome.status, outcome.reason.split(":")[0]) == (FAIL, "RuntimeError")


@pytest.mark.parametrize(
    ("statuses", "broken", "verdict", "exit_code"),
    [
        ([PASS, SKIP], {}, PASS, 0),
        ([PASS, FAIL], {}, FAIL, 1),
        ([PASS, FAIL], {"engine": "it died"}, FAIL, 1),
        ([PASS], {"engine": "it died"}, ABSENT, 2),
        ([SKIP], {}, ABSENT, 2),
        ([], {}, ABSENT, 2),
    ],
)
def test_verdict_and_exit_code(
    statuses: list[str], broken: dict[str, str], verdict: str, exit_code: int
) -> None:
    """A failure outweighs what could not run, and nothing but skipped cases is no success."""
    outcomes = [Outcome("numerics", str(index), status) for index, status in enumerate(statuses)]
    report = Report("now", {}, outcomes, broken)
    assert (report.verdict, report.exit_code) == (verdict, exit_code)


def test_the_report_says_what_was_never_seen_and_where_it_failed(tmp_path: Path) -> None:
    """Markdown and JSON have notice, versions, settings, and cases with reason and numbers."""
    outcome = Outcome(
        "numerics", "decode | window", FAIL, "rows\nare wrong", {"error": 0.5, "in": "output"}
    )
    report = Report("now", {"kernels": "mate"}, [outcome], {"bench": "no engine"})
    page, data = report.write(tmp_path / "out")
    text, content = page.read_text(), json.loads(data.read_text())
    for expected in (
        "Moore Threads GPU",
        "decode \\| window",
        "rows are wrong",
        "error 0.5",
        "no engine",
        "| torch |",
    ):
        assert expected in text
    assert content["outcomes"][0]["numbers"]["error"] == 0.5
    assert (content["exit_code"], content["settings"], content["verdict"]) == (
        1,
        {"kernels": "mate"},
        FAIL,
    )
    assert "Moore Threads GPU" in content["notice"]


def run_kit(
    warm: WarmPython,
    out: Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "sglang_musa_ext", "validate"),
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The kit as a user runs it, and its report."""
    command = [
        sys.executable,
        *program,
        "--kernels",
        "reference",
        "--out",
        str(out),
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "SGLANG_PLATFORM": "musa_reference"}
    done = warm.run([*command, *arguments], env=environ, timeout=600)
    assert (out / "report.md").is_file(), done.stderr
    return done, json.loads((out / "report.json").read_text())


def test_one_command_passes_on_the_reference_kernels(warm: WarmPython, tmp_path: Path) -> None:
    """Doctor and kernels pass, and a CPU says that it captures no graphs."""
    done, report = run_kit(warm, tmp_path, "--quick", "--only", "doctor,numerics,graphs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {
        outcome["status"] for outcome in report["outcomes"] if outcome["part"] == "numerics"
    } == {PASS}
    graphs = [outcome for outcome in report["outcomes"] if outcome["part"] == "graphs"]
    assert {
        (outcome["status"], "captures no graphs" in outcome["reason"]) for outcome in graphs
    } == {(SKIP, True)}
    assert report["device"]["kernels"] == "reference"


BROKEN = """
import os, sys
from sglang_musa_ext.validation import command
command.PROGRAM = (__file__,)

def cripple():
    import dataclasses
    from sglang_musa_ext.validation import device as validate_device, numerics as validate_numerics
    cases = [case for case in validate_numerics.cases() if case.name in {cases!r}]
    validate_numerics.cases = lambda: cases
    validate_numerics.fp8_cases = list
    select = validate_device.select_kernels
    def broken(*arguments):
        kernels = select(*arguments)
        def call(**options):
            {fault}
            return kernels.flash_attn_with_kvcache(**options)
        return dataclasses.replace(kernels, flash_attn_with_kvcache=call)
    validate_device.select_kernels = broken

if "--child" in sys.argv:
    cripple()
sys.exit(command.main())
"""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("options.pop('window_size', None)", "output is wrong"),
        ("if 'window_size' in options: os.abort()", "The process died with signal SIGABRT"),
    ],
    ids=["ignores windows", "dies of windows"],
)
def test_a_broken_provider_is_reported(
    warm: WarmPython, tmp_path: Path, fault: str, reason: str
) -> None:
    """Wrong numbers and a dead process fail their own case; the other cases still run."""
    program = tmp_path / "broken.py"
    names = ["prefill", "decode, window", "verify of 4"]
    program.write_text(textwrap.dedent(BROKEN).format(cases=names, fault=fault))
    done, report = run_kit(
        warm, tmp_path / "out", "--quick", "--only", "numerics", program=[str(program)]
    )
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {outcome["name"].split(": ")[1]: outcome for outcome in report["outcomes"]}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "prefill": PASS, "decode, window": FAIL, "verify of 4": PASS,
    }  # fmt: skip
    assert reason in outcomes["decode, window"]["reason"]
    assert "decode, window" in done.stdout


def test_missing_kernels_are_a_report_too(warm: WarmPython, tmp_path: Path) -> None:
    """Where the kernels cannot be had the kit says why, and its exit status is 2."""
    done, report = run_kit(warm, tmp_path, "--kernels", "mate", "--only", "numerics")
    assert done.returncode == 2
    assert "sees no musa device" in report["broken"]["device"]
    assert "numerics" in report["broken"]


def test_unknown_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled part is refused, with the parts there are."""
    with pytest.raises(SystemExit, match="2"):
        validate.main(["--only", "numeric"])
    assert "numeric: expected some of doctor,numerics" in capsys.readouterr().err


class RunAgain:
    """Stands for a device's graphs: a replay runs the function into the capture's tensors."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        function()
        with pytest.MonkeyPatch.context() as capturing:
            # A device forbids to bring values from the host while it captures.
            capturing.delattr(validate_numerics.Batch, "int32")
            results = function()

        def replay() -> None:
            for old, new in zip(results, function(), strict=True):
                old.copy_(new)

        return replay, results


def graph_case(name: str, kernels: FA3Kernels) -> Outcome:
    """A case at lengths that a CPU has time for."""
    torch.set_num_threads(1)
    setting = validate_numerics.Setting(kernels, CPU, torch.float32)
    lengths = ((1, 1, 1, 1), (700, 3, 64, 1024), (10, 1024, 65, 1))
    return validate_graphs.run_case(name, setting, RunAgain(), lengths)


@pytest.mark.parametrize("name", validate_graphs.CASES)
def test_graph_cases_are_right_where_graphs_are(name: str) -> None:
    """Attention over the new lengths is captured and replayed, without a device's graphs."""
    outcome = graph_case(name, reference_kernels())
    assert outcome.status == PASS, outcome


def test_a_graph_that_keeps_its_first_lengths_fails() -> None:
    """Kernels that read the lengths when they are captured, and never again, are seen."""
    kernels = reference_kernels()
    captured: dict[int, Any] = {}

    def call(**arguments: Any) -> Any:
        lengths = arguments["cache_seqlens"]
        arguments["cache_seqlens"] = captured.setdefault(lengths.data_ptr(), lengths.clone())
        return kernels.flash_attn_with_kvcache(**arguments)

    broken = dataclasses.replace(kernels, flash_attn_with_kvcache=call)
    assert graph_case("decode", broken).status == FAIL


@pytest.mark.engine
def test_a_served_model_is_compared_with_torch_native(warm: WarmPython, tmp_path: Path) -> None:
    """The engine part boots both engines, finds equal tokens, and one plan a pass."""
    done, report = run_kit(warm, tmp_path, "--quick", "--only", "engine")
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {outcome["name"]: outcome for outcome in report["outcomes"]}
    assert {outcome["status"] for outcome in outcomes.values()} == {PASS}
    assert "MusaFA3Backend on reference" in outcomes["fa3: served by this package"]["reason"]
    counts = outcomes["fa3: one plan a pass"]["numbers"]
    assert counts["plans"] == counts["passes"] == counts["reuses"] > 0
    assert outcomes["fa3: prompts over raw keys"]["numbers"]["calls over raw keys"] > 0


@pytest.mark.parametrize("device", ["cpu", "musa"])
def test_prompts_go_over_raw_keys_unless_that_is_off(device: str) -> None:
    """One engine has it off, and neither may do what the other does."""
    cases = validate_engine.EngineCases(SimpleNamespace(scratch="", device=device, quick=False))  # type: ignore[arg-type]
    *_, ours = validate_engine.variants(device, quick=False)
    paged = [each for each in ours if each.environ.get(envs.RAW_PREFILL) == "off"]
    assert (len(paged), paged) == (1, ours[-1:])
    for variant in ours:
        for raw in (0, 6):
            report = {"statistics": {"raw_calls": raw}}
            answers = validate_engine.EngineAnswers([], [], [report])
            cases.answers[variant.name] = answers
            expected = PASS if (raw > 0) != (variant in paged) else FAIL
            assert cases._raw(variant).status == expected


@pytest.mark.parametrize(
    ("tokens", "logprobs", "error", "equal"),
    [
        ([[4, 5, 6]], [[-1.0, -1.0, -1.0]], 0.0, 3),
        ([[4, 5, 6]], [[-1.0, -1.25, -1.0]], 0.25, 3),
        ([[4, 7, 9]], [[-1.0, -1.5, -9.0]], 0.5, 1),
        ([[7, 5, 6]], [[-3.0, -1.0, -1.0]], 2.0, 0),
        ([[4, 5, 6]], [[-1.0, float("nan"), -1.0]], float("inf"), 3),
    ],
)
def test_log_probabilities_count_up_to_the_first_other_token(
    tokens: list[list[int]], logprobs: list[list[float]], error: float, equal: int
) -> None:
    """A token after another token has another context, and says nothing."""
    right = validate_engine.EngineAnswers([[4, 5, 6]], [[-1.0, -1.0, -1.0]], [])
    ours = validate_engine.EngineAnswers(tokens, logprobs, [])
    assert validate_engine.deviation(ours, right) == (error, equal)
    assert bool(validate_engine.first_divergence(ours, right)) == (equal < 3)


@pytest.mark.parametrize("name", ["MLA, two slots", "MLA cascade"])
def test_mla_kernels_that_return_their_plans_are_called_their_way(name: str) -> None:
    """A plan without a workspace is a tensor, asked for with the call's head dimensions."""
    kernels = reference_kernels()
    asked: list[dict[str, Any]] = []

    def plan(**arguments: Any) -> Any:
        asked.append(arguments)
        return len(asked)

    def call(**arguments: Any) -> Any:
        assert arguments["scheduler_metadata"] in range(1, len(asked) + 1)
        workspace = torch.full((1 << 18,), 255, dtype=torch.uint8)
        return kernels.flash_attn_with_kvcache(
            **arguments | {"scheduler_metadata": (workspace, False)}
        )

    returning = dataclasses.replace(
        kernels, mla_plan_bytes=None, get_scheduler_metadata=plan, flash_attn_with_kvcache=call
    )
    outcome = outcome_of(name, returning)
    assert outcome.status == PASS, outcome
    assert [(call["headdim"], call["headdim_v"], call["num_heads_kv"]) for call in asked] == [
        (64, 512, 1)
    ] * 2


class StandInEngine:
    """Answers as an engine with one peer's fault; ``noise`` is between two answers of a peer."""

    fault, noise = "", 0.0

    def __init__(self, arguments: dict[str, Any], environ: dict[str, str], log: Path) -> None:
        self.ours = environ["SGLANG_MUSA_EXT"] == "on"
        self.check = environ.get("SGLANG_MUSA_EXT_CHECK", "off")
        self.raw_prefill = environ.get("SGLANG_MUSA_EXT_RAW_PREFILL") == "on"
        self.other_splits = (
            not self.ours and engine_changes.PLANS not in environ and self.fault == "other splits"
        )
        self.fresh = FORCE_UPDATE in environ
        self.tunes = self.fault == "tunes" and engine_changes.UNTUNED not in environ
        self.flushed = 0

    def wait(self) -> StandInEngine:
        if self.fault == ("ours dies" if self.ours else "upstream dies"):
            raise EngineDied("the process ended")
        return self

    def ask(self, prompts: list[list[int]], new_tokens: int, **_: Any) -> dict[str, Any]:
        blind = self.fault == "blind to attention"
        starts = [len(prompt) if blind else sum(prompt) for prompt in prompts]

        def tokens_from(start: int) -> list[int]:
            return [(start + at) % 97 for at in range(new_tokens)]

        tokens = [tokens_from(start) for start in starts]
        stale = self.fault == "reuse is stale" and not self.fresh
        if self.ours and (self.fault == "another token" or stale):
            tokens[-1][-1] += 1
        off = (
            self.noise * self.flushed
            if not self.ours
            else float(self.fault)
            if self.fault[:1] == "0"
            else 0.0
        )
        off += 0.03 if self.other_splits else 0.0
        off += 0.02 if self.tunes and self.ours else 0.0
        if self.raw_prefill and self.fault[:9] == "raw keys ":
            off += float(self.fault[9:])
        logprobs = [[-1.0 - start % 89 / 89 + off] * new_tokens for start in starts]
        return {"tokens": tokens, "logprobs": logprobs}

    def flush(self) -> None:
        self.flushed += 1

    def reports(self) -> list[dict[str, Any]]:
        if self.fault == "no report" or (not self.ours and self.fault != "ours everywhere"):
            return []
        plans = 2 if self.fault == "two plans" else 1
        reuses = 0 if self.fault == "no reuse" else 3
        statistics = {
            "calls": 40, "planned_calls": 10 * (plans + reuses), "plans": 10 * plans,
            "reuses": 10 * reuses,
            "raw_calls": 10 * (self.raw_prefill and self.fault.startswith("raw keys")),
            "passes_by_plans": {str(plans): 10},
        }  # fmt: skip
        kernels = "reference" if self.fault == "other kernels" else "hopper"
        settings = {"check": "off" if self.fault == "unchecked" else self.check}
        return [
            {
                "backend": "MusaFA3Backend",
                "kernels": kernels,
                "settings": settings,
                "statistics": statistics,
            }
        ]

    def kill(self) -> None:
        """There is no process."""

    def close(self) -> None:
        """There is no process."""


MODE_CASES = (
    "graphs", "eager, plans checked", "graphs, upstream as shipped", "who served, and plans a pass",
    "answers depend on attention",
)  # fmt: skip


def mode_outcomes(
    fault: str,
    noise: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str = "dense-page1",
) -> dict[str, Outcome]:
    """Return what the cases of one mode find in engines with this fault."""
    monkeypatch.setattr(validate_modes, "Engine", StandInEngine)
    monkeypatch.setattr(StandInEngine, "fault", fault)
    monkeypatch.setattr(StandInEngine, "noise", noise)
    options = SimpleNamespace(out=str(tmp_path), scratch=str(tmp_path / "models"), quick=True)
    emitted: list[Any] = []
    fleet = validate_modes.Fleet(options, ["0", "1"], 2, emitted.append)  # type: ignore[arg-type]
    try:
        outcomes = [case() for _, case in validate_modes.ModeCases(fleet).cases([mode], ())[mode]]
    finally:
        fleet.close()
    assert all("engines done" in message["progress"] for message in emitted)
    return {outcome.name.removeprefix(f"{mode}: "): outcome for outcome in outcomes}


@pytest.mark.parametrize(
    ("fault", "noise", "statuses"),
    [
        ("", 0.0, (PASS, PASS, PASS, PASS, PASS)),
        ("another token", 0.0, (FAIL, FAIL, FAIL, PASS, PASS)),
        ("0.0001", 0.0, (FAIL, FAIL, FAIL, PASS, PASS)),
        ("0.015", 0.01, (PASS, PASS, PASS, PASS, PASS)),
        ("0.04", 0.01, (FAIL, FAIL, FAIL, PASS, PASS)),
        ("other splits", 0.0, (PASS, PASS, PASS, PASS, PASS)),
        ("blind to attention", 0.0, (PASS, PASS, PASS, PASS, FAIL)),
        ("no reuse", 0.0, (PASS, FAIL, PASS, PASS, PASS)),
        ("unchecked", 0.0, (PASS, FAIL, PASS, PASS, PASS)),
        ("two plans", 0.0, (PASS, PASS, PASS, FAIL, PASS)),
        ("other kernels", 0.0, (PASS, PASS, PASS, FAIL, PASS)),
        ("ours everywhere", 0.0, (PASS, PASS, PASS, FAIL, PASS)),
        ("upstream dies", 0.0, (SKIP, SKIP, SKIP, SKIP, SKIP)),
        ("ours dies", 0.0, (FAIL, FAIL, FAIL, FAIL, PASS)),
    ],
)
def test_each_case_of_a_mode_sees_its_fault(
    fault: str,
    noise: float,
    statuses: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unequal answers, a dying engine and wrong plans fail the case that is for them."""
    outcomes = mode_outcomes(fault, noise, tmp_path, monkeypatch)
    assert tuple(outcomes[name].status for name in MODE_CASES) == statuses, outcomes
    if "dies" in fault:
        assert "the process ended" in outcomes["graphs"].reason


@pytest.mark.parametrize(
    ("fault", "status"), [("", PASS), ("unchecked", FAIL), ("ours dies", FAIL)]
)
def test_outputs_are_compared_where_they_were_asked_to_be(
    fault: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine with ``SGLANG_MUSA_EXT_CHECK=output`` must say that it compared."""
    outcomes = mode_outcomes(fault, 0.0, tmp_path, monkeypatch, "dense-page64")
    assert outcomes["every call's output beside the reference kernels'"].status == status


@pytest.mark.parametrize(
    ("fault", "status"),
    [("", PASS), ("raw keys", FAIL), ("0.0001", FAIL), ("ours dies", FAIL), ("no report", FAIL)],
)
def test_an_fp8_cache_is_prefilled_from(
    fault: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer's own keys are fp8, so that allowing raw keys changes nothing and uses none."""
    outcomes = mode_outcomes(fault, 0.0, tmp_path, monkeypatch, "fp8")
    assert outcomes["graphs, prefill over raw keys allowed"].status == status, outcomes


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("raw keys", PASS), ("raw keys 0.04", PASS), ("raw keys 0.06", FAIL), ("", FAIL),
        ("no report", FAIL), ("ours dies", FAIL),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["dense-page64", "window-softcap"])
def test_prefill_over_raw_keys_is_used_and_within_upstreams_tolerance(
    mode: str, fault: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums have another order there; the same mode without it is equal to the last bit."""
    outcomes = mode_outcomes(fault, 0.0, tmp_path, monkeypatch, mode)
    assert outcomes["graphs, prefill over raw keys allowed"].status == status, outcomes
    if fault.startswith("raw keys"):
        assert outcomes["graphs"].status == PASS
        assert outcomes["graphs"].numbers["allowed"] == 0


@pytest.mark.parametrize(("mode", "status"), [("torch-compile", PASS), ("dense-page1", FAIL)])
def test_compiled_engines_are_compared_as_one_compiles(
    mode: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each engine would choose kernels by timing them, they are told not to."""
    outcomes = mode_outcomes("tunes", 0.0, tmp_path, monkeypatch, mode)
    assert outcomes["graphs"].status == status, outcomes
    assert outcomes["graphs"].numbers["allowed"] == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_engine_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither matrix products nor launches are tuned, in the mode in which SGLang compiles."""
    inductor = importlib.import_module("torch._inductor")
    monkeypatch.setattr(inductor, "list_mode_options", inductor.list_mode_options)
    # SGLang does, before it compiles.
    monkeypatch.setattr(inductor.config, "coordinate_descent_tuning", True)

    def tuned() -> set[bool]:
        compiler: Any = vars(torch)["_TorchCompileInductorWrapper"]
        config = compiler("max-autotune-no-cudagraphs", None, None).get_compiler_config()
        return {config["max_autotune"], config["coordinate_descent_tuning"]}

    assert tuned() == {True}
    module, change = engine_changes.CHANGES[engine_changes.UNTUNED]
    change(importlib.import_module(module))
    assert tuned() == {False}


def test_modes_of_an_fp8_cache_ask_for_one() -> None:
    """Every engine of these modes has the option, a window model among them."""
    modes = {name: mode for name, mode in validate_modes.MODES.items() if name.startswith("fp8")}
    assert {mode.arguments.get("kv_cache_dtype") for mode in modes.values()} == {"fp8_e4m3"}
    assert {mode.family for mode in modes.values()} == {"llama", "gemma2"}


def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines get GPUs of those visible, and one alone if the device has an index."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert validate_modes.visible_cards(2, "cuda") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a,5")
    assert validate_modes.visible_cards(3, "cuda") == ["3", "GPU-a", "5"]
    assert validate_modes.visible_cards(3, "cuda:1") == ["GPU-a"]


def test_an_engine_is_changed_where_its_environment_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A module of SGLang gets its change when imported, and keeps its own code."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "upstream_stand_in.py").write_text(
        "def flash_attn_with_kvcache(**arguments): return arguments\n"
        "class FlashAttentionBackend:\n    def _compute_scheduler_metadata(self, *args): return 'a "
        "plan'\n"
        "    def other(self): return 'as it was'\n"
    )
    monkeypatch.setattr(engine_changes, "plan_of", lambda arguments: sorted(arguments))
    for variable, (_, change) in engine_changes.CHANGES.items():
        monkeypatch.setitem(engine_changes.CHANGES, variable, ("upstream_stand_in", change))
    monkeypatch.setenv(engine_changes.PLANS, "1")
    engine_changes.install()
    assert "upstream_stand_in" not in sys.modules
    upstream = importlib.import_module("upstream_stand_in")
    backend = upstream.FlashAttentionBackend()
    assert (backend._compute_scheduler_metadata(1), backend.other()) == (None, "as it was")
    expected = {"q": 1, "scheduler_metadata": ["q", "scheduler_metadata"]}
    assert upstream.flash_attn_with_kvcache(q=1, scheduler_metadata=None) == expected


def test_upstreams_calls_are_planned_as_fa3_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is asked for with the call's heads, dims, lengths, mask, and table's room."""
    library: Any = ModuleType("sgl_kernel.flash_attn")
    library.get_scheduler_metadata = lambda **arguments: arguments
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", library)
    lengths, offsets = (
        torch.tensor([70, 3], dtype=torch.int32),
        torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    call = {
        "q": torch.zeros(8, 8, 64), "k_cache": torch.zeros(9, 16, 2, 64),
        "v_cache": torch.zeros(9, 16, 2, 128),
        "page_table": torch.zeros(2, 5, dtype=torch.int32), "cache_seqlens": lengths,
        "cu_seqlens_q": offsets,
        "max_seqlen_q": 4, "causal": True, "window_size": (7, 0), "softcap": 30.0, "num_splits": 1,
        "ver": 3,
    }  # fmt: skip
    assert engine_changes.plan_of(call) == {
        "batch_size": 2, "max_seqlen_q": 4, "max_seqlen_k": 80, "num_heads": 8, "num_heads_k": 2,
        "headdim": 64,
        "headdim_v": 128, "qkv_dtype": torch.float32, "cache_seqlens": lengths,
        "cu_seqlens_q": offsets,
        "page_size": 16, "causal": True, "window_size": (7, 0), "has_softcap": True,
        "num_splits": 1,
    }  # fmt: skip
    assert engine_changes.plan_of(call | {"q": torch.zeros(5, 8, 64)}) is None


def test_the_kit_plans_where_the_backend_does() -> None:
    """Requests of unequal queries have no plan where the kernels can plan none for them."""
    kernels = dataclasses.replace(reference_kernels(), plans_unequal_queries=False)
    for rows, planned in (((4, 4), True), ((4, 3), False)):
        batch = validate_numerics.Batch(
            validate_numerics.Shape(rows, (70, 9)), torch.float32, torch.device("cpu")
        )
        assert (batch.plan(kernels) is not None, batch.plan(reference_kernels()) is not None) == (
            planned,
            True,
        )


def test_engine_changes_let_attention_show() -> None:
    """Matrices keep sizes, norms are near 1, and a name has the same weights every time."""
    models = [
        torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(256), "lin": torch.nn.Linear(256, 64)})
        for _ in range(2)
    ]
    for model in models:
        engine_changes.initialize(model)
    first, second = (model.state_dict() for model in models)
    product = first["lin.weight"] @ torch.randn(256, generator=torch.Generator().manual_seed(0))
    assert 0.7 < float(product.std()) < 1.4
    assert 0.75 <= float(first["norm.weight"].min()) <= float(first["norm.weight"].max()) <= 1.25
    assert first["lin.weight"].equal(second["lin.weight"])


def test_gemmas_norms_multiply_by_about_one_too() -> None:
    """They add 1 to their weight, which is therefore near 0."""

    class GemmaNorm(torch.nn.LayerNorm):
        pass

    model = torch.nn.ModuleDict({"norm": GemmaNorm(256, bias=False)})
    engine_changes.initialize(model)
    weight = model.state_dict()["norm.weight"]
    assert -0.25 <= float(weight.min()) < 0.0 < float(weight.max()) <= 0.25


SANITIZER = """#!{python}
import json, sys, time
print("========= COMPUTE-SANITIZER")
if {fault!r} == "slow":
    time.sleep(30)
if {fault!r} != "no result":
    outcome = dict(part="numerics", name="decode", status={status!r}, reason="because")
    open(sys.argv[-1], "w").write(json.dumps(outcome))
if {fault!r} == "errors":
    print("========= Invalid __global__ read of size 16 bytes")
if {fault!r} != "no summary":
    print("========= ERROR SUMMARY: " + ("2 errors" if {fault!r} == "errors" else "0 errors"))
sys.exit(97 if {fault!r} == "errors" else 0)
"""


@pytest.mark.parametrize(
    ("name", "fault", "status", "expected"),
    [
        ("numerics: decode", "", PASS, PASS),
        ("numerics: decode", "", SKIP, SKIP),
        ("numerics: decode", "", FAIL, FAIL),
        ("numerics: decode", "errors", PASS, FAIL),
        ("numerics: decode", "no summary", PASS, FAIL),
        ("numerics: decode", "no result", PASS, FAIL),
        ("numerics: decode", "slow", PASS, FAIL),
        (validate_memcheck.CONTROL, "errors", PASS, PASS),
        (validate_memcheck.CONTROL, "", PASS, FAIL),
    ],
)
def test_what_the_sanitizer_says_decides(
    name: str,
    fault: str,
    status: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A case passes if no error is reported, and the control if one is."""
    monkeypatch.setattr(validate_memcheck, "SECONDS", 1.0 if fault == "slow" else 60.0)
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER.format(python=sys.executable, fault=fault, status=status))
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert validate_memcheck.find_sanitizer() == str(sanitizer)
    options = SimpleNamespace(out=str(tmp_path), kernels="hopper", device="cuda")
    outcome = validate_memcheck.check(name, str(sanitizer), options)
    assert outcome.status == expected, outcome
    if fault == "errors":
        said = "" if name == validate_memcheck.CONTROL else "compute-sanitizer: "
        assert outcome.reason == f"{said}Invalid __global__ read of size 16 bytes"


def test_without_a_sanitizer_memcheck_says_so() -> None:
    """Where there is none, the reason names it and where it was looked for."""
    assert "PATH" in validate_memcheck.missing("cuda", None)
    assert "NVIDIA" in validate_memcheck.missing("musa", "/bin/compute-sanitizer")
    assert not validate_memcheck.missing("cuda:0", "/bin/compute-sanitizer")


def test_the_cases_of_memcheck_are_there() -> None:
    """The parts have each case that memcheck runs by name, and every graph is taken."""
    assert set(validate_memcheck.NUMERICS) <= {case.name for case in validate_numerics.cases()}
    assert set(validate_memcheck.GRAPHS) == set(validate_graphs.CASES)


def test_parts_for_nvidia_gpus_are_skipped_elsewhere(warm: WarmPython, tmp_path: Path) -> None:
    """A CPU has the reason in place of each mode, in the order in which they were asked for, and of
    each case under the sanitizer.
    """
    done, report = run_kit(warm, tmp_path, "--only", "memcheck,modes", "--modes", "eagle,mla")
    assert done.returncode == 2
    reasons = {
        (outcome["part"], outcome["status"], "NVIDIA" in outcome["reason"])
        for outcome in report["outcomes"]
    }
    assert reasons == {("memcheck", SKIP, True), ("modes", SKIP, True)}
    assert [outcome["name"] for outcome in report["outcomes"] if outcome["part"] == "modes"] == [
        "eagle",
        "mla",
    ]


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:0", "NVIDIA GPU"), ("cpu", "On a CPU"), ("musa", "is news")]
)
def test_the_notice_is_about_the_device(device: str, said: str) -> None:
    """A report's notice fits the device that it is from."""
    report = Report("now", {}, device={"device": device})
    assert said in report.notice
    assert report.notice in report.as_markdown()


def test_unknown_modes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled mode is refused, with the modes there are."""
    with pytest.raises(SystemExit, match="2"):
        validate.main(["--modes", "dens"])
    assert "dens: expected some of dense-page1" in capsys.readouterr().err
