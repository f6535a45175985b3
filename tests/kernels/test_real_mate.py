"""MATE's own Python layer takes the adapter's calls, where a source tree of MATE is at hand.

``MATE_SOURCES`` names a folder that has MATE's source trees by release: ``0.2.2/mate``,
``0.2.2/wrappers``, ``0.2.2/csrc``. Nothing is fetched; without it these tests are skipped, and the
signatures that ``tests/support/mate_signatures.py`` has serve.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.mate_signatures import SIGNATURES

SOURCES = Path(os.environ.get("MATE_SOURCES", "/nonexistent"))
READ = [name for name in SIGNATURES if name != "later" and (SOURCES / name / "mate").is_dir()]
RUNNABLE = [name for name in READ if name != "0.1.3"]
"""0.1.3 compiles its functions in the place that calls them, where nothing can stand in for them.
"""
WRAPPERS = ("flash_attn_3/interface.py", "flash_attn/interface.py")


def needs_sources(releases: list[str]) -> pytest.MarkDecorator:
    without = pytest.param("", marks=pytest.mark.skip(reason="MATE_SOURCES names no source tree"))
    return pytest.mark.parametrize("release", releases or [without])


@needs_sources(READ)
def test_the_recorded_signatures_are_those_of_the_source(release: str) -> None:
    """Names, order and defaults of the wrapper's functions; every parameter goes by name too."""
    folder = SOURCES / release / "wrappers" / "flash-attention"
    [path] = [folder / name for name in WRAPPERS if (folder / name).is_file()]
    read = {
        node.name: signature(node.args)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in SIGNATURES[release]
    }
    assert read == SIGNATURES[release]


def signature(arguments: ast.arguments) -> str:
    others = [*arguments.posonlyargs, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    assert not any(others)
    plain = len(arguments.args) - len(arguments.defaults)
    words = [argument.arg for argument in arguments.args[:plain]]
    for argument, default in zip(arguments.args[plain:], arguments.defaults, strict=True):
        words.append(f"{argument.arg}={ast.unparse(default).replace(' ', '')}")
    return " ".join(words)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """By release and call: what it reached of MATE."""
    return {release: run(release) for release in RUNNABLE}


def run(release: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.real_mate", str(SOURCES / release), release]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@needs_sources(RUNNABLE)
def test_mate_takes_every_call(outcomes: dict[str, Any], release: str) -> None:
    """No call ends in an error of MATE's; what a release lacks is refused by this package."""
    errors = {name: seen["error"] for name, seen in outcomes[release].items() if "error" in seen}
    assert not errors
    refused = [name for name, seen in outcomes[release].items() if "refused" in seen]
    assert refused == (["chunk"] if release < "0.2.2" else [])


@needs_sources(RUNNABLE)
def test_calls_reach_the_kernels_that_they_are_for(outcomes: dict[str, Any], release: str) -> None:
    """Precompiled kernels serve raw keys without padding and MLA; others read lengths."""
    reached: dict[str, list[str]] = {}
    for name, seen in outcomes[release].items():
        reached[name] = [step["function"] for step in seen.get("reached", ())]
    assert reached["decode"] == ["plan", "fmha"]
    assert reached["sinks"] == ["fmha"]
    assert reached["raw"] == reached["raw with a causal window"] == ["flash_atten_varlen_asm"]
    assert reached["padded raw"] == reached["raw with a window"] == ["fmha"]
    assert reached["mla"] == ["dispatch_mla_impl_for_fa_interface"]


@needs_sources(RUNNABLE)
def test_padded_rows_come_with_the_length_of_the_request(
    outcomes: dict[str, Any], release: str
) -> None:
    """The kernel gets the three keys of the request as ``seqused_k``, beside eight rows of keys."""
    [step] = outcomes[release]["padded raw"]["reached"]
    assert {"shape": [1], "values": [3]} in step["arguments"]
    assert {"shape": [8, 2, 128], "values": None} in step["arguments"]


@needs_sources(RUNNABLE)
def test_a_plan_reaches_the_forward_in_its_parts(outcomes: dict[str, Any], release: str) -> None:
    """MATE cuts a plan into vectors of the batch; without a plan, as with sinks, it has none."""
    *_, forward = outcomes[release]["decode"]["reached"]
    *_, without = outcomes[release]["sinks"]["reached"]
    vector = {"shape": [2], "values": [0, 0]}
    assert forward["arguments"].count(vector) == 3
    assert without["arguments"].count(vector) == 0
