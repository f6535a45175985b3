"""The report: what is taken from the measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_musa_ext.benchmark import command as bench
from sglang_musa_ext.benchmark import report as bench_report
from tests.support.fake_bench import result


def test_the_cost_of_a_plan_is_found_again() -> None:
    """Measurements that were made of known costs give those costs."""
    data = result(3.0, 5.0)
    savings = bench_report.savings(data, bench_report.places(data))
    assert {saving.plans for saving in savings} == {0, 12, 31}
    assert bench_report.fit(savings) == pytest.approx((3.0, 5.0))
    assert "**3.00 µs for each plan" in bench_report.as_markdown(data)


def test_plans_are_counted_from_traces() -> None:
    """A trace tells the kernels that plan from those that attend and those that combine splits."""
    upstream = {"plans": 14, "each": 3.0, "calls": 26, "device": 14 * 3 + 260 + 52}
    assert bench_report.planned(result(), "gemma2", "DECODE", "upstream") == upstream
    row = f"| gemma2 | DECODE | ours | 2 | 3.00 | 26 | {2 * 3 + 260 + 52} | {318 / 354:.3f} |"
    assert row in bench_report.as_markdown(result())
    assert bench_report.planned(result(), "gemma2", "EXTEND", "upstream") is None


def test_a_wrong_peer_has_words_in_place_of_times() -> None:
    """Nowhere does a peer with wrong output have a ratio."""
    rows = [
        row
        for row in bench_report.as_markdown(result()).splitlines()
        if row.startswith("| gemma2 | batch 1,")
    ]
    assert rows[0].endswith("| wrong output (off by 0.5) |")


@pytest.mark.parametrize(
    ("ours", "met"),
    [([0.96] * 3, "yes"), ([0.98, 0.96, 0.99], "within the spread"), ([0.98, 0.98, 0.99], "no")],
)
def test_a_bar_is_met_missed_or_within_the_spread(ours: list[float], met: str) -> None:
    """A threshold compares the median; where only some rounds reach it, that is said."""
    data = result()
    first = data["models"]["gemma2"]["points"]
    first[0]["step_ms"], first[1]["step_ms"] = [1.0] * 3, ours
    rows = bench_report.thresholds(bench_report.places(data), data)
    [row] = [row for row in rows if row[0].startswith("decode step at batch 1, Gemma-2-like")]
    assert row[2] == met


def test_the_step_around_a_verify_pass_is_told_too() -> None:
    """A verify pass may be faster in a step that is not: each is shown under its own head."""
    data = result()
    theirs, ours, _ = data["models"]["verify"]["points"][:3]
    theirs |= {"step_ms": [4.0] * 3, "forward_ms": [2.0] * 3}
    ours |= {"step_ms": [4.1, 4.2, 4.0], "forward_ms": [1.9] * 3}
    passes, _, steps = bench_report.as_markdown(data).partition(
        "## Whole step of speculative decoding"
    )
    assert "| verify | batch 1, 1024 tokens | 2.000 | 1.900 | 0.950 (0.950 to 0.950) |" in passes
    assert "| verify | batch 1, 1024 tokens | 4.000 | 4.100 | 1.025 (1.000 to 1.050) |" in steps


def test_what_is_slower_in_every_round_is_listed() -> None:
    """A place where ours loses every round is named; one that loses some is not."""
    data = result()
    points = data["models"]["dense"]["points"]
    points[0]["step_ms"], points[1]["step_ms"] = [1.0, 1.0, 1.0], [1.1, 1.2, 1.01]
    points[3]["step_ms"], points[4]["step_ms"] = [1.0, 1.0, 1.0], [1.1, 0.9, 1.01]
    [row] = [
        row
        for row in bench_report.thresholds(bench_report.places(data), data)
        if row[0].startswith("nothing slower")
    ]
    assert row[1] == "1 of 6"
    assert row[2].startswith("dense decode batch 1, 1024 tokens: 1.100 (1.010 to 1.200)")


def test_calls_are_told_with_what_a_plan_spares() -> None:
    """A call's time with its plan is subtracted from its time without, on device and host."""
    graph, host = (
        {"without": 10.0, "with": 8.5, "plan": 2.5},
        {"without": 20.0, "with": 24.0, "plan": 9.0},
    )
    data = {**result(), "kernels": [{"call": "decode", "graph": graph, "host": host}]}
    row = "| decode | 10.00 | 8.50 | 1.50 | 2.50 | 20.00 | 24.00 | -4.00 | 9.00 |"
    assert row in bench_report.as_markdown(data)
    del data["kernels"][0]["host"]
    assert "| decode | 10.00 | 8.50 | 1.50 | 2.50 | – | – | – | – |" in bench_report.as_markdown(
        data
    )


def test_every_prefill_has_a_bar() -> None:
    """Prefill slower in every round is not met; slower in some is within the spread."""
    data = result()
    for tokens, ours in ((512, [1.1, 1.2, 1.3]), (2048, [0.9, 1.1, 1.2]), (8192, [0.9, 0.9, 1.1])):
        for peer, times in (("upstream", [1.0, 1.0, 1.0]), ("ours", ours)):
            point = {
                "kind": "prefill",
                "batch": 1,
                "tokens": tokens,
                "peer": peer,
                "verdict": "equal",
            }
            data["models"]["dense"]["points"].append(
                point | {"forward_ms": times, "step_ms": [], "call_us": []}
            )
    rows = [
        row
        for row in bench_report.thresholds(bench_report.places(data), data)
        if row[0].startswith("prefill")
    ]
    places = [row[0].rpartition("; ")[2] for row in rows]
    assert places == ["dense, 512 tokens", "dense, 2048 tokens", "dense, 8192 tokens"]
    assert [row[2] for row in rows] == ["no", "within the spread", "yes"]


def test_what_the_host_takes_is_laid_beside_the_pass() -> None:
    """Calls of 2 µs more, 26 times a pass, make 52 µs, beside the 60 by which a pass is longer."""
    data = result()
    for peer, times, calls in (
        ("upstream", [4.0] * 3, [20.0] * 3),
        ("ours", [4.06] * 3, [22.0] * 3),
    ):
        fields = {"kind": "eager", "batch": 10, "tokens": 64, "peer": peer, "verdict": "equal"}
        data["models"]["dense"]["points"].append(
            fields | {"forward_ms": [], "step_ms": times, "call_us": calls}
        )
    [row] = bench_report.hosts(data, bench_report.places(data))
    assert row[2:5] == ["20.0", "22.0", "–"]
    assert row[6:] == ["26", "+52", "+60"]
    assert " | ".join(row) in bench_report.as_markdown(data)


def test_ratios_of_turns_are_told_with_who_stood_beside() -> None:
    """Passes compared one by one give the ratio, told with what the same differs by."""
    data = result()
    paired = {
        "upstream": 1.0,
        "ours": 1.05,
        "in-tree": 0.9,
        "upstream again": 1.01,
        "ours without plans": 0.97,
    }
    for peer, ratio in paired.items():
        fields = {
            "kind": "eager",
            "batch": 10,
            "tokens": 64,
            "peer": peer,
            "verdict": "equal",
            "forward_ms": [],
        }
        fields |= {
            "step_ms": [2.0, 4.0],
            "call_us": [20.0, 20.0],
            "over_upstream": [ratio, ratio + 0.02],
        }
        data["models"]["dense"]["points"].append(fields)
    text = bench_report.as_markdown(data)
    cells = [
        f"{ratio + 0.01:.3f} ({ratio:.3f} to {ratio + 0.02:.3f})"
        for ratio in list(paired.values())[1:]
    ]
    assert f"| dense | batch 10, 64 tokens | 3.000 | 3.000 | {' | '.join(cells)} |" in text
    assert (
        "| dense | eager, batch 10, 64 tokens | 20.0 | 20.0 | 20.0 | 1.000 (1.000 to 1.000) |"
        in text
    )


def test_passes_whose_calls_take_no_plan_say_why() -> None:
    """A plan a layer is a threshold not met, unless no plan can be passed there."""
    kernels = {"prepare_varlen_num_blocks": [27, 80.0]}
    data = result()
    data["models"]["dense"]["traces"] = [
        {"peer": peer, "mode": mode, "kernels": kernels}
        for peer in ("ours", "upstream")
        for mode in ("DECODE", "EXTEND")
    ]
    rows = {row[0]: row for row in bench_report.thresholds(bench_report.places(data), data)}
    assert rows["a plan a geometry: dense, DECODE"][1:] == ["27, upstream 27", "no"]
    assert rows["a plan a geometry: dense, EXTEND"][2].startswith("none can be passed")


def test_memory_is_told_in_tokens() -> None:
    """A MiB more than upstream, at 64 KiB a token, is 16 tokens fewer."""
    rows = bench_report.memory(result())
    assert rows[1][-2:] == ["1.0 MiB", "-16"]


def test_what_a_reader_must_know_of_a_run_is_said() -> None:
    """A note and the machine's load stand beside the model that they are of."""
    data = result()
    data["models"]["dense"] |= {"note": "on a Sunday", "load": 17.25}
    text = bench_report.as_markdown(data)
    assert "| dense | dense | today | 3 | 48 | 17.2 |" in text
    assert "\n* dense: on a Sunday\n" in text


def test_a_report_has_its_plots(tmp_path: Path) -> None:
    """The page shows what is beside it, and names what was not measured."""
    planned = {"dense": ("decode", "prefill"), "mla": ("decode",)}
    pages = bench.write_report(result(), tmp_path, planned)
    assert {page.name for page in pages} == {"README.md", "ratios.png", "plans.png", "savings.png"}
    text = (tmp_path / "README.md").read_text()
    assert all(f"![{page.name}]({page.name})" in text for page in pages[1:])
    assert "Not measured:\n\n* dense: prefill\n* mla: decode\n" in text


def test_the_limit_is_a_pass_without_plans() -> None:
    """The last column is without our plans too: 1100 of 1141 µs, less two plans of 3."""
    data = result(3.0, 5.0)
    text = "\n".join(bench_report.cost_model(data, bench_report.places(data)))
    assert (
        f"| gemma2 | batch 1, 1024 tokens | 12 | 41.0 | 41.0 | {1100 / 1141:.3f} | "
        f"{1094 / 1141:.3f} |" in text
    )


def test_a_report_from_musa_compares_with_triton() -> None:
    """Columns and introduction are those of the peers that competed there."""
    data = result()
    renamed = {"upstream": "triton"}
    for model in data["models"].values():
        for point in model["points"]:
            point["peer"] = renamed.get(point["peer"], point["peer"])
        for trace in model["traces"]:
            trace["peer"] = renamed.get(trace["peer"], trace["peer"])
        model["memory"] = {
            renamed.get(peer, peer): state for peer, state in model["memory"].items()
        }
    data |= {"baseline": "triton", "peers": {"triton": "t", "ours": "o", "ours without reuse": "n"}}
    text = bench_report.as_markdown(data)
    assert (
        "| Model | Place | triton ms | ours ms | ours / triton | ours without reuse / triton |"
        in text
    )
    assert "on a MUSA device" in text
    assert "upstream" not in text.partition("## Plans in a pass")[0]
