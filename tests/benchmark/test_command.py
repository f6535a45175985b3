"""The command: which device and models it takes, and that it runs at all."""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_musa_ext.benchmark import command as bench
from sglang_musa_ext.benchmark.models import engine_arguments
from sglang_musa_ext.benchmark.peers import FIELDS
from tests.support.fake_bench import point, result
from tests.support.warm import WarmPython


def test_a_gpu_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times beside another program's would say little, so there are none."""
    properties = SimpleNamespace(
        name="a GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    for free, refused in ((60 << 30, True), (79 << 30, False)):
        answers = {
            "is_available": True,
            "get_device_properties": properties,
            "mem_get_info": (free, 80 << 30),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        if refused:
            with pytest.raises(SystemExit, match="20 GiB of a GPU are in use"):
                bench._device("cuda")
        else:
            assert bench._device("cuda")["name"] == "a GPU"


def test_runs_are_merged_if_they_are_of_one_device() -> None:
    """A model's kind of places comes from the last run that has it; two devices are an error."""
    first, second = result(), result()
    old, new = point("decode", 1, "upstream", 1.0), point("prefill", 1, "upstream", 2.0)
    first["models"] = {
        "dense": {**first["models"]["dense"], "points": [old, new]},
        "verify": {"title": "alone"},
    }
    again = new | {"forward_ms": [9.0]}
    second["models"] = {"dense": {"title": "again", "points": [again], "traces": []}}
    models = bench.merged([first, second])["models"]
    assert models["verify"] == {"title": "alone"}
    assert models["dense"] == {
        "title": "again",
        "points": [old, again],
        "traces": first["models"]["dense"]["traces"],
    }
    with pytest.raises(SystemExit, match="differ in their device"):
        bench.merged([first, {**second, "device": {"name": "another"}}])


@pytest.mark.parametrize("steps", [11, 12])
def test_too_few_steps_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int
) -> None:
    """Before an engine starts, the error names the fewest: two peers and two beside need 12."""
    monkeypatch.setattr(bench, "_device", lambda kind: sys.exit("past the check"))
    said = "past the check" if steps == 12 else "Give --steps 12 or more"
    with pytest.raises(SystemExit, match=said):
        bench.main(["--device", "cpu", "--steps", str(steps), "--out", str(tmp_path)])


def test_longest_acts_beside_quick() -> None:
    """A quick run leaves out longer contexts and prompts, too."""
    options = bench._options(["--quick", "--longest", "1024"])
    model = bench.chosen_models(options, FIELDS["cuda"])["dense-64"]
    assert (model.batches, model.contexts, model.prefills) == ((1, 8), (1024,), (512,))


@pytest.mark.engine
def test_the_benchmark_runs_without_a_gpu(warm: WarmPython, tmp_path: Path) -> None:
    """Both engines boot with the probe, agree, and give a report that can be drawn again."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    command = [
        sys.executable,
        "-m",
        "sglang_musa_ext",
        "bench",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--steps",
        "12",
        "--longest",
        "64",
    ]
    done = warm.run([*command, "--out", str(tmp_path)], env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "bench.json").read_text())["models"]["tiny"]
    assert not measured["failed"]
    kinds = {
        (point["kind"], point["peer"])
        for point in measured["points"]
        if point["verdict"] == "equal" and point["forward_ms"]
    }
    peers, beside = ("upstream", "ours"), ("upstream again", "ours without plans")
    prefills = ("prefill", "eager")
    assert kinds == {*product(("decode",), peers), *product(prefills, (*peers, *beside))}
    # Only where it attended has a peer a time of its calls.
    timed = {(point["kind"], point["peer"]) for point in measured["points"] if point["call_us"]}
    assert timed >= set(product(prefills, peers))
    assert {(trace["peer"], trace["mode"]) for trace in measured["traces"]} >= {
        ("ours", "DECODE"),
        ("ours", "EXTEND"),
    }
    assert "# Benchmark on CPU" in (tmp_path / "README.md").read_text()


class Device:
    """A stand-in for ``torch.musa`` with one idle MTT S5000."""

    capability = (3, 1)

    @staticmethod
    def is_available() -> bool:
        return True

    def get_device_properties(self, index: int) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(name="MTT S5000", major=major, minor=minor, multi_processor_count=56)

    @staticmethod
    def mem_get_info(index: int) -> tuple[int, int]:
        return (79 << 30, 80 << 30)


def test_a_musa_device_is_measured_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch sees one, its peers compete, and the report names the card."""
    monkeypatch.setattr(torch, "musa", Device(), raising=False)
    contenders = bench._contenders(bench._options([]))
    assert [peer.name for peer in contenders.peers] == [
        "triton", "ours", "ours without reuse", "in-tree",
    ]  # fmt: skip
    assert bench._device("musa")["name"] == "MTT S5000"
    old = Device()
    old.capability = (2, 2)
    monkeypatch.setattr(torch, "musa", old, raising=False)
    with pytest.raises(SystemExit, match=r"MTT S5000 cannot be measured: .*MP version 2\.2"):
        bench._device("musa")


def test_without_a_device_the_help_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times on a CPU say nothing, so that it is measured only where it is asked for."""
    monkeypatch.setattr(bench, "device_kind", lambda: "cpu")
    with pytest.raises(SystemExit, match="--device cpu tries the benchmark without one"):
        bench._contenders(bench._options([]))
    assert bench._contenders(bench._options(["--device", "cpu"])).device == "cpu"


def test_the_peer_that_others_are_compared_with_cannot_be_left_out() -> None:
    """Without it there would be no right answer, and no ratio."""
    with pytest.raises(SystemExit, match="upstream is not among the peers"):
        bench._contenders(bench._options(["--device", "cuda", "--peers", "ours,in-tree"]))


def test_ones_own_model_takes_the_place_of_the_others(tmp_path: Path) -> None:
    """It is served from its folder with its weights, with the contexts that it has room for."""
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 8400}}')
    options = bench._options(["--model", str(tmp_path), "--kv-tokens", "12345"])
    [model] = bench.chosen_models(options, FIELDS["musa"]).values()
    arguments = engine_arguments(model, tmp_path, "musa")
    assert (arguments["model_path"], arguments["max_total_tokens"]) == (str(tmp_path), 12345)
    assert {"load_format", "dtype", "context_length"} & arguments.keys() == set()
    assert (model.contexts, model.prefills) == ((1024, 8192), (512, 2048, 8192))


def test_four_peers_have_room_on_a_card_for_three() -> None:
    """Each has a smaller KV cache, the same for all."""
    chosen = [
        bench.chosen_models(bench._options(["--models", "mla"]), FIELDS[kind])["mla"].kv_tokens
        for kind in ("cuda", "musa")
    ]
    assert chosen == [280_000, 210_000]
