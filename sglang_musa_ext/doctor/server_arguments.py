"""The check of a server's arguments: which attention backend and page size they lead to."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_musa_ext import policy
from sglang_musa_ext.doctor.results import CheckResult, failed, passed, warned
from sglang_musa_ext.doctor.surroundings import Surroundings, installed_versions
from sglang_musa_ext.upstream.limits import Configuration, limits_of, skips_cache

SGLANGS_CHOICE = "SGLang's choice"
UNKNOWABLE = "Not known here: what SGLang sets for a model's architecture, and what --config holds."


def probe_command(s: Surroundings) -> CheckResult:
    """Say which attention backend and page size a command line leads to."""
    if s.command is None:
        return passed(
            "No command line was given; give a server's arguments after -- to see what they lead "
            "to."
        )
    options, unknown = _server_parser().parse_known_args(s.command)
    line = CommandLine(options, s.serves_on_musa)
    resolved = _resolve(line, s)
    words = [f"{name} {value} ({why})" for name, (value, why) in resolved.items()]
    finding = "; ".join(words) + f". {UNKNOWABLE}"
    details = {name: {"value": value, "because": why} for name, (value, why) in resolved.items()}
    details["not_looked_at"] = {"value": unknown, "because": UNKNOWABLE}
    for problem in _problems_of_command(line, resolved, s.kernels):
        return replace(problem, finding=f"{problem.finding} {finding}", details=details)
    return passed(finding, **details)


@dataclass(frozen=True)
class CommandLine:
    """The options of a server, and what they ask for."""

    options: argparse.Namespace
    on_musa: bool
    """True if the server would run on a MUSA device."""

    @functools.cached_property
    def asked(self) -> Configuration:
        """What the options ask for, beside the MATE that is installed here."""
        return _configuration(self.options, self.on_musa)


def _server_parser() -> argparse.ArgumentParser:
    """The options of a SGLang server that decide what this package is asked for."""
    parser = argparse.ArgumentParser(
        prog="sglang.launch_server", add_help=False, exit_on_error=False
    )
    parser.add_argument("--model-path", "--model", dest="model_path")
    parser.add_argument("--attention-backend")
    parser.add_argument("--prefill-attention-backend")
    parser.add_argument("--decode-attention-backend")
    parser.add_argument("--speculative-draft-attention-backend")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--speculative-eagle-topk", type=int)
    parser.add_argument("--speculative-algorithm")
    parser.add_argument("--enable-mixed-chunk", action="store_true")
    parser.add_argument("--max-running-requests", type=int)
    parser.add_argument("--enable-multimodal", action="store_true")
    parser.add_argument("--language-model-only", action="store_true")
    parser.add_argument("--model-impl")
    parser.add_argument("--is-embedding", action="store_true")
    parser.add_argument("--disable-radix-cache", action="store_true")
    parser.add_argument("--chunked-prefill-size", type=int)
    return parser


def _resolve(line: CommandLine, s: Surroundings) -> dict[str, tuple[Any, str]]:
    """The attention backends and the page size of a command line, each with the reason for it."""
    options, attention = line.options, _attention(line, s)
    resolved: dict[str, tuple[Any, str]] = {}
    for phase in ("prefill", "decode"):
        named = getattr(options, f"{phase}_attention_backend")
        resolved[f"{phase} attention"] = (
            (named, f"--{phase}-attention-backend") if named else attention
        )
    if named := options.speculative_draft_attention_backend:
        resolved["draft attention"] = named, "--speculative-draft-attention-backend"
    if options.page_size is not None:
        resolved["page size"] = options.page_size, "--page-size"
    elif s.has_our_defaults:
        resolved["page size"] = (
            policy.PAGE_SIZE,
            "the default on MUSA and on the CPU reference platform",
        )
    else:
        resolved["page size"] = SGLANGS_CHOICE, "no rule of this package"
    return resolved


def _attention(line: CommandLine, s: Surroundings) -> tuple[str, str]:
    """The attention backend of both phases where neither is named apart, and the reason for it."""
    if line.options.attention_backend:
        return line.options.attention_backend, "--attention-backend"
    if not s.kernels:
        return SGLANGS_CHOICE, "this package would stay idle"
    if not s.has_our_defaults:
        return SGLANGS_CHOICE, "this package has defaults on MUSA and on its CPU platform alone"
    reasons: tuple[str, ...] = ()
    if line.on_musa:
        reasons = policy.reasons_against_fa3(line.asked, _sglang_version())
    if reasons:
        return SGLANGS_CHOICE, "; ".join(reasons)
    return "fa3", "the default while this package serves"


def _configuration(options: argparse.Namespace, on_musa: bool) -> Configuration:
    """Return what a command line asks for, beside the MATE that is installed here."""
    from sglang_musa_ext.kernels.mate_identity import identify_mate

    config = _config(options.model_path)
    quantization = {"quantization": options.quantization} if options.quantization else {}
    return Configuration.of_config(
        config,
        dtype=_dtype(options, config),
        kv_cache_dtype=options.kv_cache_dtype,
        page_size=options.page_size,
        topk=options.speculative_eagle_topk,
        speculative_algorithm=options.speculative_algorithm,
        mixed_chunk=options.enable_mixed_chunk,
        max_running_requests=options.max_running_requests,
        takes_images=_takes_images(options),
        skips_cache=skips_cache(options),
        mate=identify_mate().known_release,
        on_musa=on_musa,
        **quantization,
    )


def _takes_images(options: argparse.Namespace) -> bool:
    """Tell whether a server looks at images, if its model is one for which SGLang must be asked
    to, as are those that this matters for.
    """
    is_asked = options.enable_multimodal or options.model_impl == "transformers"
    return is_asked and not options.language_model_only


def _dtype(options: argparse.Namespace, config: Mapping[str, Any]) -> str:
    """Return ``--dtype``; under ``auto`` a checkpoint in float16 stays in float16, and one in
    float32 is served in float16, or as bfloat16 if it is a Gemma.
    """
    text = config.get("text_config") or config
    stored = text.get("dtype") or text.get("torch_dtype")
    if options.dtype != "auto" or stored not in ("float16", "float32"):
        return str(options.dtype)
    is_gemma = str(text.get("model_type")).startswith("gemma")
    return "bfloat16" if stored == "float32" and is_gemma else "float16"


def _problems_of_command(
    line: CommandLine, resolved: Mapping[str, tuple[Any, str]], kernels: str
) -> list[CheckResult]:
    """Return the problems of a command line, worst first."""
    backends = {name: value for name, (value, _) in resolved.items() if name.endswith("attention")}
    problems = []
    if kernels and "fa4" in backends.values():
        problems.append(
            failed("fa4 is refused while this package serves.", "Use --attention-backend fa3.")
        )
    if not kernels or "fa3" not in backends.values():
        step = (
            "Use --attention-backend fa3 where this package serves."
            if kernels
            else "See the check 'device'."
        )
        return [*problems, warned("This package would not be used.", step)]
    page_size = resolved["page size"][0]
    problems += _problems_of_cache(line, kernels)
    problems += _limits_of_upstream(line.asked, page_size)
    if line.asked.use_mla and kernels != "hopper" and page_size != policy.PAGE_SIZE:
        step = "Leave --page-size unset, or set it to 64."
        problems.append(
            failed(f"--page-size {line.options.page_size}: MLA's kernels take 64 alone.", step)
        )
    return problems


def _problems_of_cache(line: CommandLine, kernels: str) -> list[CheckResult]:
    """Return what is wrong with a KV cache's type where ``fa3`` is named."""
    options = line.options
    if options.attention_backend == "fa3" and options.kv_cache_dtype == "fp8_e5m2":
        seen = "SGLang takes triton in place of fa3 with --kv-cache-dtype fp8_e5m2."
        return [warned(seen, "Use --kv-cache-dtype fp8_e4m3 where MATE serves it, or auto.")]
    if kernels != "mate":
        return []
    reasons = policy.reasons_against_cache(line.asked)
    step = "Leave --kv-cache-dtype at auto, or take another --attention-backend."
    return [failed(f"It is refused: {'; '.join(reasons)}.", step)] if reasons else []


def _limits_of_upstream(asked: Configuration, page_size: Any) -> list[CheckResult]:
    """Return what SGLang's own ``fa3`` cannot serve of a command line, what is refused first."""
    if isinstance(page_size, int):
        asked = replace(asked, page_size=page_size)
    limits = sorted(limits_of(asked, _sglang_version()), key=lambda limit: not limit.is_fatal)
    problems = []
    for limit in limits:
        say = failed if limit.is_fatal else warned
        seen = f"SGLang's fa3 does not serve {limit.condition}: {limit.happens}."
        problems.append(say(seen, f"{limit.instead}."))
    return problems


def _sglang_version() -> str | None:
    return installed_versions("sglang").get("sglang")


def _config(model_path: str | None) -> dict[str, Any]:
    """Return a model's ``config.json``; empty: it is not on this machine."""
    path = Path(model_path or "", "config.json")
    if not model_path or not path.is_file():
        return {}
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
