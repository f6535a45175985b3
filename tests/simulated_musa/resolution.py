"""The backends that a release of SGLang resolves to on MUSA where none is named.

The releases compute it themselves: a configuration is written, the plugins are loaded as in a
server, and the release settles its arguments. ``python -m tests.simulated_musa.resolution`` makes
the table of docs/simulated-musa.md from all releases in a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_musa_ext.upstream.releases import version_key
from tests.simulated_musa import build, cases
from tests.support import tiny_models
from tests.support.engine import import_engine

ROOT = build.ROOT
MODULE = "tests.simulated_musa.resolution"
PAGE = ROOT / "docs" / "simulated-musa.md"
TABLE_BEGINS, TABLE_ENDS = "<!-- resolution: begin -->", "<!-- resolution: end -->"

PLUGIN_MODES = ("off", "auto")
"""Of this package: SGLang alone, and what a user gets."""
DRAFT = "DRAFT"
"""Stands for the path of the model itself, as a draft of it."""
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_draft_model_path": DRAFT,
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}
TREE = EAGLE | {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}


@dataclass(frozen=True)
class Kind:
    """A configuration of transformers', as SGLang reads it, and options."""

    name: str
    config: str
    fields: Mapping[str, Any]
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the text part, where a configuration has parts."""


def _text(name: str, model: tiny_models.TinyModel, architecture: str, **arguments: Any) -> Kind:
    return Kind(name, model.config, model.fields, architecture, arguments)


def _parts(name: str, config: str, family: str, text: Mapping[str, Any], **arguments: Any) -> Kind:
    """Return a model of several parts, such as text and images."""
    return Kind(name, config, {}, f"{family}ForConditionalGeneration", arguments, text=text)


_LLAMA, _MLA = cases.LLAMA, cases.MLA_DENSE
_CROSS = {**_LLAMA.fields, "cross_attention_layers": [1]}
_MLA_NAME, _NAME = "DeepseekV3ForCausalLM", "LlamaForCausalLM"
_NGRAM = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 8}
KINDS = [
    _text("Llama", _LLAMA, _NAME),
    _text("Qwen3-MoE", cases.QWEN_3_MOE, "Qwen3MoeForCausalLM"),
    _text("Gemma-2", cases.GEMMA_2, "Gemma2ForCausalLM"),
    _text("Gemma-3, text", cases.GEMMA_3, "Gemma3ForCausalLM"),
    _parts("Gemma-3, text and images", "Gemma3Config", "Gemma3", cases.GEMMA_3.fields),
    _parts(
        "Gemma-3, `--enable-multimodal`",
        "Gemma3Config",
        "Gemma3",
        cases.GEMMA_3.fields,
        enable_multimodal=True,
    ),
    _text("GPT-OSS", cases.GPT_OSS, "GptOssForCausalLM"),
    Kind("OLMo-2", "Olmo2Config", _LLAMA.fields, "Olmo2ForCausalLM"),
    _text("OLMo-3", cases.OLMO_3, "Olmo3ForCausalLM"),
    _parts("Gemma-4", "Gemma4Config", "Gemma4", cases.GEMMA_3.fields),
    _parts("Llama-4", "Llama4Config", "Llama4", _LLAMA.fields),
    _parts("Mllama (cross attention)", "MllamaConfig", "Mllama", _CROSS),
    Kind("Whisper", "WhisperConfig", {}, "WhisperForConditionalGeneration"),
    _parts("Qwen2.5-VL", "Qwen2_5_VLConfig", "Qwen2_5_VL", _LLAMA.fields),
    _text("MLA (DeepSeek-V3)", _MLA, _MLA_NAME),
    _text("MLA, `--dtype float16`", _MLA, _MLA_NAME, dtype="float16"),
    _text("MLA, `--page-size 1`", _MLA, _MLA_NAME, page_size=1),
    _text("MLA, EAGLE, topk 1", _MLA, _MLA_NAME, **EAGLE),
    _text("MLA, EAGLE, topk 4", _MLA, _MLA_NAME, **TREE),
    _text("Llama, EAGLE, topk 1", _LLAMA, _NAME, **EAGLE),
    _text("Llama, EAGLE, topk 4", _LLAMA, _NAME, **TREE),
    _text("Llama, `--page-size 16`", _LLAMA, _NAME, page_size=16),
    _text("Llama, `--kv-cache-dtype fp8_e4m3`", _LLAMA, _NAME, kv_cache_dtype="fp8_e4m3"),
    _text("Llama, `--dtype float32`", _LLAMA, _NAME, dtype="float32"),
    _text("Llama, NGRAM", _LLAMA, _NAME, **_NGRAM),
    _text("Llama, hierarchical cache", _LLAMA, _NAME, enable_hierarchical_cache=True),
    _text("Llama, deterministic inference", _LLAMA, _NAME, enable_deterministic_inference=True),
]


@dataclass(frozen=True)
class Resolution:
    """The choices of a release for a kind."""

    backend: str = ""
    """Attention backend, of decoding behind the one of prefill where they differ."""
    page_size: int = 0
    draft_backend: str = ""
    """Of draft models, where there is one."""
    graphs: str = ""
    """The graphs of decoding and of prefill; ``off``: none."""
    refusal: str = ""
    """The last line of what it raised."""

    def __str__(self) -> str:
        if self.refusal:
            return f"refused: {self.refusal}"
        drafts = f", drafts {self.draft_backend}" if self.draft_backend else ""
        return f"{self.backend}, {self.page_size}{drafts}"


def write_config(kind: Kind, directory: Path) -> None:
    """Write the configuration of ``kind`` as a checkpoint without weights."""
    import transformers

    maker = getattr(transformers, kind.config)
    fields = {**kind.fields}
    if kind.text:
        fields["text_config"] = {**kind.text}
    config = maker(**fields)
    config.architectures = [kind.architecture]
    config.dtype = "bfloat16"
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)


def resolve(kind: Kind, directory: Path) -> Resolution:
    """Return what this process's release settles on; for a process of its own."""
    from sglang.srt.plugins import load_plugins

    try:
        if not (directory / "config.json").exists():
            write_config(kind, directory)
        load_plugins()
        from sglang.srt.server_args import ServerArgs

        arguments = {
            name: str(directory) if value == DRAFT else value
            for name, value in kind.arguments.items()
        }
        settled = ServerArgs(model_path=str(directory), skip_tokenizer_init=True, **arguments)
        if hasattr(settled, "resolve_once"):
            settled.resolve_once()
        return _read(_settled_view(settled))
    except BaseException as error:
        traceback.print_exc()
        return Resolution(refusal=f"{type(error).__name__}: {error}".splitlines()[0][:160])


def _settled_view(server_args: Any) -> Any:
    """Return what the settled values are read from: from 0.5.19 on they lie over the given ones."""
    try:
        from sglang.srt.arg_groups.model_override_base import resolved_view
    except ImportError:
        return server_args
    return resolved_view(server_args)


def _read(settled: Any) -> Resolution:
    decode = settled.decode_attention_backend or settled.attention_backend
    prefill = settled.prefill_attention_backend or settled.attention_backend
    return Resolution(
        backend=prefill if decode == prefill else f"{prefill} / {decode}",
        page_size=settled.page_size,
        draft_backend=_drafts(settled, decode),
        graphs=_graphs(settled),
    )


def _drafts(settled: Any, backend: str) -> str:
    """Return the backend of the draft model, which is the model's where none is named."""
    if settled.speculative_draft_model_path is None:
        return ""
    return getattr(settled, "speculative_draft_attention_backend", None) or backend


def _graphs(settled: Any) -> str:
    config = getattr(settled, "cuda_graph_config", None)
    if config is None:  # up to 0.5.13
        decode = "off" if settled.disable_cuda_graph else "full"
        prefill = "off" if settled.disable_piecewise_cuda_graph else "tc_piecewise"
    else:
        decode, prefill = config.decode.backend, config.prefill.backend
    return f"decode {decode}, prefill {prefill}".replace("disabled", "off")


# --- all of them ----------------------------------------------------------------------------------


def resolve_all(directory: Path, names: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the resolution of these kinds by this process's release, each in a forked process: by
    this package's mode (``off``, ``auto``) and kind.
    """
    import_engine()
    resolved: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in PLUGIN_MODES}
    for mode, by_kind in resolved.items():
        for number, kind in enumerate(KINDS):
            if kind.name in names:
                by_kind[kind.name] = _in_a_fork(kind, directory / str(number), mode)
    return resolved


def _in_a_fork(kind: Kind, directory: Path, mode: str) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ["SGLANG_MUSA_EXT"] = mode
        with os.fdopen(writer, "w") as stream:
            json.dump(vars(resolve(kind, directory)), stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    resolution: dict[str, Any] = json.loads(text or '{"refusal": "the process died"}')
    return resolution


def of_release(
    sources: Path, directory: Path, names: Sequence[str]
) -> dict[str, dict[str, Resolution]]:
    """Return what the release in ``sources`` resolves to, by mode and kind.

    Kinds that ``names`` leaves out are those of a former call.
    """
    environment = build.environment(first=[sources])
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", MODULE, "--one", str(directory)]
    command += ["--kinds", *names]
    log = directory / "log"
    with log.open("w") as stream:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{sources} failed; see {log}")
    kept = directory / "resolution.json"
    former = json.loads(kept.read_text()) if kept.is_file() else {}
    new = json.loads(done.stdout.splitlines()[-1])
    merged = {mode: {**former.get(mode, {}), **new[mode]} for mode in PLUGIN_MODES}
    kept.write_text(json.dumps(merged))
    return read_kept(directory)


def read_kept(directory: Path) -> dict[str, dict[str, Resolution]]:
    """Return what a former call of :func:`of_release` found, by mode and kind."""
    answer = json.loads((directory / "resolution.json").read_text())
    resolved: dict[str, dict[str, Resolution]] = {}
    for mode, kinds in answer.items():
        resolved[mode] = {kind: Resolution(**values) for kind, values in kinds.items()}
    return resolved


def table(resolved: Mapping[str, Mapping[str, Mapping[str, Resolution]]]) -> list[str]:
    """Return a Markdown table of what releases resolve kinds to, without and with this package.

    Args:
        resolved: by mode (``off``, ``auto``), release and kind.
    """
    head = ["Kind", "SGLang alone", "with this package", "Graphs, with this package"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|"]
    for kind in KINDS:
        by_release = {}
        for release, alone in resolved["off"].items():
            by_release[release] = cells_of(alone[kind.name], resolved["auto"][release][kind.name])
        columns = zip(*by_release.values(), strict=True)
        cells = [_cell(dict(zip(by_release, column, strict=True))) for column in columns]
        lines.append(f"| {' | '.join([kind.name, *cells])} |")
    return lines


def cells_of(alone: Resolution, ours: Resolution) -> list[str]:
    """Return a release's part of a row: without and with this package, and the graphs with it."""
    # Where it refuses there is nothing to capture.
    texts = [str(alone), str(ours), ours.graphs or "–"]
    return [text.replace("|", "\\|") for text in texts]


def _cell(by_release: Mapping[str, str]) -> str:
    """Return the texts of all releases, those in a row that agree as one."""
    runs: list[tuple[str, list[str]]] = []
    for release, said in by_release.items():
        if runs and runs[-1][0] == said:
            runs[-1][1].append(release)
        else:
            runs.append((said, [release]))
    if len(runs) == 1:
        return runs[0][0]
    return "; ".join(f"{_span(releases)}: {text}" for text, releases in runs)


def _span(releases: Sequence[str]) -> str:
    return releases[0] if len(releases) == 1 else f"{releases[0]} to {releases[-1]}"


_SPAN = re.compile(r"(?:^|; )(\d[\w.]*)(?: to (\d[\w.]*))?: ")


def documented(kind: str, version: str) -> list[str]:
    """Return the cells behind ``kind`` in the page's table, as they are for release ``version``.

    Raises:
        LookupError: the table has no row of this kind, or a cell says nothing of this release.
    """
    lines = PAGE.read_text().partition(TABLE_BEGINS)[2].partition(TABLE_ENDS)[0].splitlines()
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        if name == kind:
            return [_said_of(version, cell) for cell in cells]
    raise LookupError(f"{PAGE} has no row {kind!r}; run python -m {MODULE}.")


def _said_of(version: str, cell: str) -> str:
    """Return what a cell says of a release."""
    _, *spans = _SPAN.split(cell)
    if not spans:
        return cell
    for first, last, text in zip(spans[::3], spans[1::3], spans[2::3], strict=True):
        if version_key(first) <= version_key(version) <= version_key(last or first):
            return str(text)
    raise LookupError(f"{PAGE} says nothing of SGLang {version}; run python -m {MODULE}.")


def main() -> None:
    """Write docs/simulated-musa.md's table from releases in a folder, or print one release's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--releases", type=Path, default=ROOT / ".cache" / "releases")
    parser.add_argument("--only", nargs="*", help="versions; all in the folder where none is named")
    names = [kind.name for kind in KINDS]
    parser.add_argument(
        "--kinds", nargs="*", choices=names, default=names, help="the others as in former runs"
    )
    parser.add_argument("--reuse", action="store_true", help="take results of former runs")
    parser.add_argument("--work", type=Path, default=build.CACHE / "resolution")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(resolve_all(options.one, options.kinds)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    versions = sorted((path.name for path in options.releases.iterdir()), key=version_key)
    resolved: dict[str, dict[str, dict[str, Resolution]]] = {mode: {} for mode in PLUGIN_MODES}
    for version in options.only or versions:
        kept = options.work / version
        reused = options.reuse and (kept / "resolution.json").is_file()
        sources = options.releases / version
        answer = read_kept(kept) if reused else of_release(sources, kept, options.kinds)
        for mode in PLUGIN_MODES:
            resolved[mode][version] = answer[mode]
        print(f"{version}: done", file=sys.stderr, flush=True)
    lines = table(resolved)
    print("\n".join(lines))
    if PAGE.is_file() and not options.only:
        before, begin, after_begin = PAGE.read_text().partition(TABLE_BEGINS)
        _, end, after = after_begin.partition(TABLE_ENDS)
        PAGE.write_text(f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}")


if __name__ == "__main__":
    main()
