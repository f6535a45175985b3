"""Measure what this package is worth on one device, beside SGLang's own attention backends.

For each model an engine of every peer is up at the same time, and they take turns, so that whatever
the machine does meets all of them. Passes without graphs take turns in one engine, because there
two processes of the same code differ by more than the peers do. A peer's answers are compared with
those of the first peer before it is timed; where they differ, or the peer fails, the report says so
in place of a time. The peers are

  on an NVIDIA Hopper GPU   SGLang's own fa3, this package, SGLang's in-tree MUSA backend
  on a MUSA device          SGLang's triton, this package, the same with a plan for every call,
                            SGLang's in-tree MUSA backend on the same MATE
  with --device cpu         torch_native and this package, on reference kernels: times that
                            say nothing

It measures

  decode    the step from one decode pass to the next, by batch and context, under graphs
  verify    the verify pass of speculative decoding (EAGLE, chains of 4), under graphs
  prefill   one prompt of 512 to 32768 tokens, without graphs
  eager     host time per attention call, in prefill and in decode without graphs
  plans     kernels that compute scheduler metadata per pass, from a profiler's trace
  memory    what PyTorch's allocator holds, graph pools and workspaces among it
  kernels   a call with its plan and without, in a graph and without an engine

on models without weights, or with --model on your own, and writes bench.json, tables, and, where
matplotlib is installed, plots. "bench --report FILE..." draws them again from one or more such
files. "bench host" measures the host's time of a call on any machine; see its own --help.

Exit status: 0 it was measured, 1 the device is not there or in use.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang_musa_ext import policy
from sglang_musa_ext.benchmark.contest import contend, entered, fewest_steps
from sglang_musa_ext.benchmark.models import (
    KINDS,
    MODELS,
    TINY,
    Model,
    own_model,
    planned_kinds,
    quick,
    shared_among,
    within,
)
from sglang_musa_ext.benchmark.peers import FIELDS, Field
from sglang_musa_ext.benchmark.plots import draw
from sglang_musa_ext.benchmark.report import as_markdown
from sglang_musa_ext.engines.devices import device_kind
from sglang_musa_ext.validation.report import versions

OCCUPIED = 4 << 30
"""Bytes of the device that may be in use at the start: a context, and what a desktop needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, and write the report; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["host"]:
        host = importlib.import_module("sglang_musa_ext.benchmark.host")
        return int(host.main(given[1:]))
    options = _options(given)
    if options.report:
        earlier = merged([json.loads(page.read_text()) for page in options.report])
        return _draw(of_kinds(earlier, options.kinds), options.out or Path())
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    contenders = _contenders(options)
    models = chosen_models(options, contenders)
    try:
        _require_steps(options, models, contenders)
    except ValueError as error:
        sys.exit(str(error))
    out = options.out or Path(f"bench-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "versions": versions(), "device": _device(contenders.device),
        "baseline": contenders.baseline.name,
        "peers": {peer.name: peer.title for peer in contenders.peers}, "models": {},
    }  # fmt: skip
    with_kernels = contenders.device != "cpu" and not options.no_kernels
    result["kernels"] = kernel_times(contenders.device) if with_kernels else []
    with ExitStack() as stack:
        contests = {
            name: stack.enter_context(entered(model, name, contenders, options, out))
            for name, model in models.items()
        }
        for name, contest in contests.items():
            print(f"{name}: {contest.model.title}", flush=True)
            for measured in contend(contest):
                result["models"][name] = measured
                # What was measured so far must survive whatever comes next.
                (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    return _draw(result, out)


def _contenders(options: argparse.Namespace) -> Field:
    """Return the peers that were asked for on the device that was asked for, or is there."""
    kind = device_kind() if options.device == "auto" else options.device
    if kind == "cpu" and options.device == "auto":
        sys.exit(
            "PyTorch sees neither a MUSA device nor an NVIDIA GPU. Ask sglang-musa-ext doctor what "
            "is missing; --device cpu tries the benchmark without one."
        )
    contenders = FIELDS[kind]
    names = options.peers or tuple(peer.name for peer in contenders.peers)
    try:
        return contenders.of(names)
    except ValueError as error:
        sys.exit(str(error))


def chosen_models(options: argparse.Namespace, contenders: Field) -> dict[str, Model]:
    """Return the models that were asked for, with the places that were asked for."""
    if options.model:
        models = {Path(options.model).name: own_model(options.model, options.kv_tokens)}
    elif contenders.device == "cpu":
        models = {"tiny": TINY}
    else:
        models = {name: MODELS[name] for name in options.models}
    return {name: _places(model, options, contenders) for name, model in models.items()}


def _require_steps(
    options: argparse.Namespace, models: Mapping[str, Model], contenders: Field
) -> None:
    """Raise ValueError unless every round will have a pass of each peer at each place."""
    for name, model in models.items():
        fewest = fewest_steps(model, options.kinds, contenders)
        if options.steps < fewest:
            raise ValueError(
                f"--steps {options.steps} is too few for {name}: with fewer than {fewest}, a round "
                f"may have no pass of a peer to time. Give --steps {fewest} or more."
            )


def _places(model: Model, options: argparse.Namespace, contenders: Field) -> Model:
    model = shared_among(model, len(contenders.peers))
    if options.quick:
        model = quick(model)
    return within(model, options.longest) if options.longest else model


def kernel_times(kind: str) -> list[dict[str, Any]]:
    """Return what a plan costs on this kind of device, in a graph and without any engine.

    Raises:
        SystemExit: the kernels do not run there, so that nothing else would.
    """
    print("kernels: a call with its plan and without, in a graph", flush=True)
    command = [sys.executable, "-m", "sglang_musa_ext.benchmark.kernels", kind]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(command[1:])} ended with status {done.returncode}; its error is above."
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _draw(result: Mapping[str, Any], out: Path) -> int:
    # A report of other models than the benchmark's misses none of these.
    planned = planned_kinds(MODELS) if result["models"].keys() & MODELS.keys() else {}
    for page in write_report(result, out, planned):
        print(page)
    return 0


def write_report(
    result: Mapping[str, Any], out: Path, planned: Mapping[str, Sequence[str]]
) -> list[Path]:
    """Write ``README.md`` and, with matplotlib, the plots into ``out``; returns their paths.

    ``planned`` are the kinds of places that each model should have; missing ones are named.
    """
    out.mkdir(parents=True, exist_ok=True)
    plots = draw(result, out)
    page = out / "README.md"
    page.write_text(as_markdown(result, [plot.name for plot in plots], planned), encoding="utf-8")
    return [page, *plots]


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge runs on one device: a model's kind of places comes from the last run that has it.

    Raises:
        SystemExit: they are of different devices or versions.
    """
    for name in ("device", "versions"):
        if any(result[name] != results[0][name] for result in results):
            sys.exit(
                f"These runs differ in their {name}, so that one report of them would compare what "
                "cannot be."
            )
    models: dict[str, Any] = {}
    for result in results:
        for name, model in result["models"].items():
            models[name] = _measured_again(models[name], model) if name in models else model
    kernels = [result["kernels"] for result in results if result.get("kernels")]
    return {**results[0], "models": models, "kernels": kernels[-1] if kernels else []}


def _measured_again(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's two runs as one: what the later one did not measure is the earlier one's."""
    kinds = {point["kind"] for point in later["points"]}
    points = [point for point in earlier["points"] if point["kind"] not in kinds]
    return {
        **later,
        "points": points + later["points"],
        "traces": later["traces"] or earlier["traces"],
    }


def of_kinds(result: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Return ``result`` with the places of these kinds alone."""
    models = {}
    for name, model in result["models"].items():
        points = [point for point in model["points"] if point["kind"] in kinds]
        models[name] = {**model, "points": points}
    return {**result, "models": models}


def _device(kind: str) -> dict[str, Any]:
    """Return what a report says of the device.

    Raises:
        SystemExit: it is not there, in use, or none that the kernels are for.
    """
    if kind == "cpu":
        return {"name": "CPU, where times say nothing", "count": os.cpu_count()}
    import torch

    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        sys.exit(
            f"PyTorch {torch.__version__} sees no {kind} device. Ask sglang-musa-ext doctor what "
            "is missing; --device cpu tries the benchmark without one."
        )
    properties = module.get_device_properties(0)
    free, total = module.mem_get_info(0)
    _require_idle(properties.name, total - free)
    if refusal := _unfit(kind, (properties.major, properties.minor)):
        sys.exit(f"{properties.name} cannot be measured: {refusal}.")
    return {
        "name": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory": total,
        kind: getattr(torch.version, kind, None),
    }  # fmt: skip


def _require_idle(name: str, used: int) -> None:
    if used > OCCUPIED:
        sys.exit(
            f"{used / 2**30:.0f} GiB of {name} are in use: something else runs there, and times "
            "would say little. End it first."
        )


def _unfit(kind: str, capability: tuple[int, int]) -> str | None:
    """Return why FA3's kernels of this kind of device are not for this one; ``None``: they are."""
    if kind == "musa":
        return policy.reason_against_capability(capability)
    if capability[0] == 9:
        return None
    version = f"{capability[0]}.{capability[1]}"
    return f"it has compute capability {version}, and FA3's kernels are for 9.0 (Hopper)"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    head, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="sglang-musa-ext bench",
        description=head,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys(peer.name for field in FIELDS.values() for peer in field.peers))
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model",
        metavar="PATH",
        help="your own model, with its weights, in place of those without",
    )
    what.add_argument(
        "--kv-tokens", type=int, metavar="N", help="KV cache of each peer, in tokens, with --model"
    )
    what.add_argument(
        "--models", type=_some_of(MODELS), default=tuple(MODELS), metavar="NAMES",
        help=f"some of {','.join(MODELS)}",
    )  # fmt: skip
    what.add_argument(
        "--peers", type=_some_of(names), metavar="NAMES",
        help=f"some of {','.join(names)}, the first of the device's among them",
    )  # fmt: skip
    what.add_argument(
        "--kinds",
        type=_some_of(KINDS),
        default=KINDS,
        metavar="KINDS",
        help=f"some of {','.join(KINDS)}",
    )
    what.add_argument("--device", choices=("auto", *FIELDS), default="auto")
    what.add_argument(
        "--no-kernels", action="store_true", help="leave out the calls that need no engine"
    )
    how = parser.add_argument_group("how long it takes")
    how.add_argument(
        "--rounds", type=int, default=5, help="turns of each peer at each point (default: 5)"
    )
    how.add_argument(
        "--steps", type=int, default=48, help="tokens that a request is continued by (default: 48)"
    )
    how.add_argument(
        "--longest", type=int, metavar="TOKENS", help="leave out longer contexts and prompts"
    )
    how.add_argument("--quick", action="store_true", help="two batches, one context, two prefills")
    report = parser.add_argument_group("the report")
    report.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where results go (default: ./bench-<date>)"
    )
    report.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="draw the report of these earlier runs",
    )
    return parser.parse_args(arguments)


def _some_of(choices: Sequence[str] | Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(choices):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: expected some of {','.join(choices)}"
            )
        return tuple(dict.fromkeys(names))

    return chosen


if __name__ == "__main__":
    sys.exit(main())
