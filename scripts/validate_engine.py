"""A tiny random Llama served by SGLang with this package, beside SGLang's ``torch_native`` attention.

Each engine runs in a process of its own, ``validate_engine.py --serve``, which answers over a pipe. On a CPU both
compute in float32, and tokens must be equal. On a device they compute in bfloat16, where near ties fall either way:
there ``torch_native`` in float32 is the truth, and log-probabilities may be off by twice what ``torch_native`` in
bfloat16 is off by, up to the first token that differs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from validate_report import FAIL, PASS, SKIP, Outcome

PART = "engine"
VOCABULARY = 512
FLOAT32_TOLERANCE = 1e-3
FLOOR = 1e-2
"""What log-probabilities in bfloat16 may be off by in any case."""
FORCE_UPDATE = "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA"
ARGUMENTS: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "chunked_prefill_size": 128,
    "log_level": "info",
}
GRAPH_SIZES = ("cuda_graph_max_bs", "cuda_graph_max_bs_decode")
"""What releases of SGLang call the largest batch to capture; the tiny model never has more requests than that."""


@dataclass(frozen=True)
class Variant:
    """One engine."""

    name: str
    backend: str
    dtype: str
    environ: Mapping[str, str] = field(default_factory=dict)
    graphs: bool = False

    def arguments(self, model: Path, device: str) -> dict[str, Any]:
        """Arguments of ``sglang.Engine``."""
        own = {"attention_backend": self.backend, "dtype": self.dtype, "device": device.split(":", maxsplit=1)[0]}
        pages = {"page_size": 64 if self.backend == "fa3" else 1}
        return {**ARGUMENTS, **own, **pages, "model_path": str(model), "disable_cuda_graph": not self.graphs}


def variants(device: str) -> tuple[Variant, list[Variant], list[Variant]]:
    """The truth, those whose own error says what is fair, and ours."""
    checked = {"SGLANG_MUSA_EXT_CHECK": "metadata"}
    truth = Variant("torch_native float32", "torch_native", "float32")
    if device.startswith("cpu"):
        return truth, [], [Variant("fa3", "fa3", "float32", checked)]
    ours = [Variant("fa3, eager, plans checked", "fa3", "bfloat16", checked)]
    ours += [Variant("fa3, graphs", "fa3", "bfloat16", graphs=True)]
    return truth, [Variant("torch_native bfloat16", "torch_native", "bfloat16")], ours


def prompts(quick: bool) -> list[list[list[int]]]:
    """Requests in two phases; those of the second find the first one's tokens in the prefix cache."""
    lengths = (5, 70, 200) if quick else (5, 63, 64, 70, 200, 400)
    first = [[(7 * position + 31 * length) % (VOCABULARY - 8) + 4 for position in range(length)] for length in lengths]
    return [first, [[*prompt, 9, 8, 7] for prompt in first]]


class EngineDied(RuntimeError):
    """An engine's process ended, or said that it could not do what it was asked."""


class Engine:
    """An engine in a process of its own."""

    def __init__(self, arguments: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(arguments), str(writing)]
        inherited = {name: value for name, value in os.environ.items() if name != FORCE_UPDATE}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[writing], text=True, env=inherited | dict(environ)
        )
        os.close(writing)
        self._answers = os.fdopen(reading)
        self._read()

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """Tokens and log-probabilities of each prompt's greedy continuation."""
        return self._call({"prompts": prompts, "new_tokens": new_tokens})

    def step_seconds(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds from one decode step to the next while these prompts are continued together."""
        return float(self._call({"prompts": prompts, "new_tokens": new_tokens, "steps": True})["seconds"])

    def reports(self) -> list[dict[str, Any]]:
        """The state reports of the engine's backends."""
        found: list[dict[str, Any]] = self._call({"reports": True})["reports"]
        return found

    def close(self) -> None:
        """End it, and wait for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _call(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise EngineDied(f"The engine's process ended with status {self._process.wait()}; the log says why.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineDied(answer["error"])
        return answer


@contextlib.contextmanager
def booted(variant: Variant, model: Path, device: str) -> Iterator[Engine]:
    """The engine of ``variant``, while it is needed."""
    engine = Engine(variant.arguments(model, device), variant.environ)
    try:
        yield engine
    finally:
        engine.close()


# --- cases --------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What one engine gave."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    reports: list[dict[str, Any]]


class Session:
    """The engines' answers, as far as they have been asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = Path(options.scratch) / "model"
        self.answers: dict[str, Answer] = {}

    def cases(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """Every case, in an order in which each finds what it needs."""
        truth, fair, ours = variants(self.options.device)
        found = {"a tiny random Llama": self._build}
        for variant in (truth, *fair, *ours):
            found[f"{variant.name} answers"] = functools.partial(self._ask, variant)
        for variant in ours:
            compare = self._equal if variant.dtype == "float32" else self._close
            found[f"{variant.name}: served by this package"] = functools.partial(self._served, variant)
            found[f"{variant.name}: tokens and log-probabilities"] = functools.partial(compare, variant, truth, fair)
            found[f"{variant.name}: one plan a pass"] = functools.partial(self._plans, variant)
        return [(name, functools.partial(guarded, PART, name, case)) for name, case in found.items()]

    def _build(self) -> Outcome:
        device = self.options.device
        sizes = {"layers": 2, "hidden": 128} if device.startswith("cpu") else {"layers": 4, "hidden": 256}
        build_model(self.model, **sizes)
        return Outcome(PART, "", PASS, "", sizes)

    def _ask(self, variant: Variant) -> Outcome:
        count = 8 if self.options.quick else 24
        with booted(variant, self.model, self.options.device) as engine:
            answers = [engine.ask(phase, count) for phase in prompts(self.options.quick)]
            reports = engine.reports()
        tokens, logprobs = ([row for answer in answers for row in answer[what]] for what in ("tokens", "logprobs"))
        self.answers[variant.name] = Answer(tokens, logprobs, reports)
        return Outcome(PART, "", PASS, "", {"requests": len(tokens), "tokens": sum(map(len, tokens))})

    def _served(self, variant: Variant) -> Outcome:
        reports = self._answer(variant).reports
        seen = sorted({f"{report['backend']} on {report['kernels']} {report['versions']}" for report in reports})
        right = reports and all(report["backend"] == "MusaFA3Backend" for report in reports)
        return Outcome(PART, "", PASS if right else FAIL, "; ".join(seen) or "no backend of this package reported")

    def _equal(self, variant: Variant, truth: Variant, _: Sequence[Variant]) -> Outcome:
        ours, right = self._answer(variant), self._answer(truth)
        error, same = deviation(ours, right)
        total = sum(map(len, right.tokens))
        values = {"equal tokens": f"{same} of {total}", "log-probability error": error, "allowed": FLOAT32_TOLERANCE}
        good = same == total and error <= FLOAT32_TOLERANCE
        return Outcome(PART, "", PASS if good else FAIL, "" if good else first_divergence(ours, right), values)

    def _close(self, variant: Variant, truth: Variant, fair: Sequence[Variant]) -> Outcome:
        ours, right = self._answer(variant), self._answer(truth)
        own = max(deviation(self._answer(one), right)[0] for one in fair)
        error, same = deviation(ours, right)
        allowed = 2 * own + FLOOR
        values: dict[str, Any] = {"log-probability error": error, "allowed": allowed, "torch_native's own": own}
        values["equal tokens"] = f"{same} of {sum(map(len, right.tokens))}"
        return Outcome(PART, "", PASS if error <= allowed else FAIL, first_divergence(ours, right), values)

    def _plans(self, variant: Variant) -> Outcome:
        counts = [report["statistics"] for report in self._answer(variant).reports]
        names = ("passes", "planned_calls", "plans", "reuses")
        sums = {name: sum(count[name] for count in counts) for name in names}
        good = sums["plans"] == sums["passes"] > 0 and sums["plans"] + sums["reuses"] == sums["planned_calls"]
        reason = "" if good else "layers of one geometry need one plan a pass"
        return Outcome(PART, "", PASS if good else FAIL, reason, sums)

    def _answer(self, variant: Variant) -> Answer:
        if variant.name not in self.answers:
            raise Missing(f"{variant.name} gave no answer")
        return self.answers[variant.name]


class Missing(LookupError):
    """What a case compares is not there, because another case failed."""


def guarded(part: str, name: str, case: Callable[[], Outcome]) -> Outcome:
    """What becomes of one case; whatever it raises is a result too."""
    started = time.perf_counter()
    try:
        found = case()
    except Missing as error:
        found = Outcome(part, name, SKIP, str(error))
    except Exception as error:  # noqa: BLE001  # A case that raises is a result like any other.
        found = Outcome(part, name, FAIL, f"{type(error).__name__}: {error}"[:4000])
    return Outcome(part, name, found.status, found.reason, found.numbers, time.perf_counter() - started)


def deviation(ours: Answer, right: Answer) -> tuple[float, int]:
    """The largest error of a log-probability, and how many tokens are equal, up to each request's first other one.

    That other token is compared too: where two tokens tie, they are as likely as each other.
    """
    error, same = 0.0, 0
    for index, tokens in enumerate(right.tokens):
        equal = _equal_length(ours.tokens[index], tokens)
        same += equal
        pairs = zip(ours.logprobs[index][: equal + 1], right.logprobs[index][: equal + 1], strict=True)
        error = max([error, *(abs(seen - expected) for seen, expected in pairs)])
    return error, same


def first_divergence(ours: Answer, right: Answer) -> str:
    """Where each request's tokens first differ, with both log-probabilities."""
    found = []
    for index, tokens in enumerate(right.tokens):
        at = _equal_length(ours.tokens[index], tokens)
        if at < len(tokens):
            sides = (f"{side.tokens[index][at]} ({side.logprobs[index][at]:.4f})" for side in (ours, right))
            found.append(f"request {index} at token {at}: " + " for ".join(sides))
    return "; ".join(found)


def _equal_length(ours: Sequence[int], right: Sequence[int]) -> int:
    unequal = (index for index, (a, b) in enumerate(zip(ours, right, strict=True)) if a != b)
    return next(unequal, len(right))


def build_model(directory: Path, layers: int, hidden: int) -> None:
    """Write a random Llama to ``directory``, in a process of its own, because it takes PyTorch and transformers."""
    fields = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 8192,
        # With the usual 0.02 every token repeats, and a comparison sees nothing.
        "initializer_range": 0.15 * (128 / hidden) ** 0.5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    program = (
        "import json, sys, torch, transformers\n"
        "torch.manual_seed(0)\n"
        "model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**json.loads(sys.argv[1])))\n"
        "model.float().save_pretrained(sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(fields), str(directory)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise EngineDied(f"transformers could not make a Llama: {done.stderr[-1000:]}")


def run(options: argparse.Namespace, done: Collection[str], emit: Callable[[Mapping[str, Any]], None]) -> None:
    """Run every case; the engines have devices of their own, and this process has none."""
    from validate_device import run_cases

    run_cases(Session(options).cases(), None, done, emit)


# --- in an engine's process ---------------------------------------------------------------------------


def serve(arguments: dict[str, Any], descriptor: int) -> None:
    """Boot an engine, and answer questions from the standard input until it ends."""
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as stream:

        def reply(answer: Mapping[str, Any]) -> None:
            stream.write(json.dumps(answer) + "\n")
            stream.flush()

        try:
            engine = _boot(arguments)
        except Exception as error:  # noqa: BLE001  # Whatever stops an engine is what the other side must hear.
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})
            return
        reply({"ready": True})
        for line in sys.stdin:
            reply(_answer(engine, SimpleNamespace(**json.loads(line))))
        engine.shutdown()


def _boot(arguments: dict[str, Any]) -> Any:
    import sglang

    if not arguments["disable_cuda_graph"]:
        arguments |= _largest_graph(8)
    return sglang.Engine(**arguments)


def _largest_graph(size: int) -> dict[str, int]:
    """The argument of this release that bounds the batch sizes to capture, if it has one that is known here."""
    import inspect

    from sglang.srt.server_args import ServerArgs

    known = {*inspect.signature(ServerArgs).parameters, *getattr(ServerArgs, "__annotations__", ())}
    name = next((name for name in GRAPH_SIZES if name in known), None)
    return {} if name is None else {name: size}


def _answer(engine: Any, question: SimpleNamespace) -> dict[str, Any]:
    if hasattr(question, "reports"):
        states = engine.get_server_info()["internal_states"]
        return {"reports": [report for state in states for report in state.get("sglang_musa_ext", [])]}
    sampling = {"temperature": 0, "max_new_tokens": question.new_tokens, "ignore_eos": True}
    if hasattr(question, "steps"):
        return {"seconds": _step_seconds(engine, question.prompts, sampling)}
    answers = engine.generate(input_ids=question.prompts, sampling_params=sampling, return_logprob=True)
    chosen = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    tokens, logprobs = ([[entry[index] for entry in row] for row in chosen] for index in (1, 0))
    return {"tokens": tokens, "logprobs": logprobs}


def _step_seconds(engine: Any, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]) -> float:
    """Between the first and the last token that the first request streams, so that prefill does not count."""
    seen: list[tuple[float, int]] = []
    for chunk in engine.generate(input_ids=prompts, sampling_params=sampling, stream=True):
        if chunk.get("index", 0) == 0:
            # Several tokens may come in one chunk where steps are faster than the stream.
            seen.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
    (first, tokens), (last, more) = seen[0], seen[-1]
    return (last - first) / (more - tokens)


if __name__ in ("__main__", "__mp_main__") and os.environ.get("SGLANG_PLATFORM") == "musa_reference":
    # Up to 0.5.20 SGLang imports what a CPU lacks before it looks for platforms. Processes that the engine spawns run
    # this as well.
    from sglang_musa_ext.cpu_stand_ins import prepare_process

    prepare_process()

if __name__ == "__main__":
    serve(json.loads(sys.argv[2]), int(sys.argv[3]))
