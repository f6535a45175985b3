"""The plots of the benchmark's report, drawn where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_musa_ext.benchmark.probe import OURS
from sglang_musa_ext.benchmark.report import (
    TITLES,
    Place,
    Saving,
    fit,
    places,
    planned_by,
    savings,
    traced,
)


def draw(result: Mapping[str, Any], out: Path) -> list[Path]:
    """The plots, as ``ratios.png`` and ``plans.png``; none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print(
            "matplotlib is not installed, so there are no plots: bench --report draws them where "
            "it is."
        )
        return []
    mpl.use("Agg")
    every = places(result)
    timed = any(place.ratio(OURS) for place in every)
    pages = [_draw_ratios(every, result, out / "ratios.png")] if timed else []
    pages += (
        [_draw_plans(result, out / "plans.png")]
        if any(m["traces"] for m in result["models"].values())
        else []
    )
    every_saving = savings(result, every)
    if len({saving.plans for saving in every_saving}) > 1:
        pages.append(_draw_savings(every_saving, out / "savings.png"))
    return pages


def _draw_ratios(every: Sequence[Place], result: Mapping[str, Any], page: Path) -> Path:
    """Ours over upstream at every place, with the spread; a row of axes for each kind of pass."""
    from matplotlib import pyplot

    chosen: dict[str, list[Place]] = {}
    for place in every:
        if place.ratio(OURS) is not None:
            chosen.setdefault(place.kind, []).append(place)
    kinds = [kind for kind in TITLES if kind in chosen]
    height = 1.2 + 0.22 * sum(map(len, chosen.values())) + 0.9 * len(kinds)
    figure, axes = pyplot.subplots(
        len(kinds), 1, figsize=(9, height), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [len(rows) + 1 for rows in chosen.values()]},
    )  # fmt: skip
    for axis, (kind, rows) in zip(axes[:, 0], chosen.items(), strict=True):
        for height_of, (place, peer) in enumerate((place, OURS) for place in reversed(rows)):
            ratio = place.ratio(peer)
            assert ratio is not None
            colour = "tab:green" if ratio.high < 1 else "tab:red" if ratio.low > 1 else "tab:gray"
            spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axis.errorbar(
                ratio.median, height_of, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5
            )
        axis.set_yticks(
            range(len(rows)),
            [f"{place.model}, {place.label}" for place in reversed(rows)],
            fontsize=8,
        )
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_title(TITLES[kind], fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel(
        "time of sglang-musa-ext over SGLang's own fa3: median and range of the rounds"
    )
    where = f"{result['device']['name']}, SGLang {result['versions'].get('sglang')}"
    axes[0, 0].set_title(where, fontsize=10, loc="right")
    return _saved(figure, page)


def _draw_plans(result: Mapping[str, Any], page: Path) -> Path:
    """Kernels in a pass that compute plans, by model and peer."""
    from matplotlib import pyplot

    rows = [(model, mode, planned_by(result, model, mode)) for model, mode in traced(result)]
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(rows)))
    width = 0.8 / max(len(result["peers"]), 1)
    for index, (peer, colour) in enumerate(
        zip(result["peers"], ("tab:orange", "tab:green", "tab:blue"), strict=False)
    ):
        heights = [position + index * width for position in range(len(rows))]
        counts = [peers[peer] for _, _, peers in rows]
        drawn = axis.barh(
            heights,
            [each["plans"] if each else 0 for each in counts],
            width,
            label=result["peers"][peer],
            color=colour,
        )
        axis.bar_label(
            drawn, [f"{each['plans']:g}" if each else "not traced" for each in counts], fontsize=8
        )
    middles = [position + 0.4 - width / 2 for position in range(len(rows))]
    axis.set_yticks(middles, [f"{model}, {mode}" for model, mode, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("kernels in a pass that compute scheduler metadata")
    axis.legend(fontsize=8)
    return _saved(figure, page)


def _draw_savings(results: Sequence[Saving], page: Path) -> Path:
    """Draw the costs that the model says against those that were measured."""
    from matplotlib import pyplot

    each, besides = fit(results)
    figure, axis = pyplot.subplots(figsize=(6.5, 5))
    for model in dict.fromkeys(saving.place.model for saving in results):
        points = [saving for saving in results if saving.place.model == model]
        fewer = [saving.plans for saving in points]
        saved = [saving.microseconds for saving in points]
        axis.plot(fewer, saved, "o", label=model, alpha=0.7)
    ends = [0.0, max(saving.plans for saving in results) + 1]
    line = [besides + each * end for end in ends]
    axis.plot(
        ends, line, color="black", linewidth=1, label=f"{each:.2f} µs a plan, {besides:+.1f} µs"
    )
    axis.set_xlabel("plans that a pass does not compute")
    axis.set_ylabel("µs that a pass under graphs is shorter")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _saved(figure, page)


def _saved(figure: Any, page: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(page, dpi=110)
    pyplot.close(figure)
    return page
