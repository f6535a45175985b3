"""The models of the benchmark, and the arguments of the engines that serve them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_musa_ext.engines.models import write_model

PAGE = 64
"""Tokens in a page of every peer's KV cache."""
KINDS = ("decode", "verify", "prefill", "eager")
"""The kinds of places that may be measured: see the help of the command."""
OWN_KV_TOKENS = 70_000
"""Size of each peer's KV cache for a model of the operator's, unless the command line says another.
"""


@dataclass(frozen=True)
class Model:
    """A model, and what is measured on it."""

    title: str
    family: str
    """A family of :mod:`sglang_musa_ext.engines.models`; empty if the model stands at ``path``."""
    shape: Mapping[str, Any]
    kv_tokens: int
    """Size of the KV cache of each peer: three of them must fit on the card."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    draft: str = ""
    """The draft model's family; with one, verify steps replace decode, prefill and eager."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    prefills: tuple[int, ...] = (512, 2048, 8192, 32768)
    path: str = ""
    """A model of the operator's, with its weights."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of places that it is for."""
        return ("verify",) if self.draft else ("decode", "prefill", "eager")

    @property
    def longest(self) -> int:
        """Return the most tokens of a prompt."""
        return max(*self.contexts, *self.prefills)


_DENSE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
_CHAIN = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 3, "speculative_eagle_topk": 1,
          "speculative_num_draft_tokens": 4}  # fmt: skip
MODELS: Mapping[str, Model] = {
    "dense-64": Model(
        "dense, 32 layers, head dim 64", "llama",
        {**_DENSE, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64}, 280_000,
    ),
    "dense-128": Model(
        "dense, 32 layers, head dim 128", "llama",
        {**_DENSE, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}, 280_000,
    ),
    "gemma2": Model(
        "like Gemma-2-2B: 13 window and 13 full layers, softcap", "gemma2",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "vocab_size": 32000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
         "query_pre_attn_scalar": 256, "sliding_window": 4096},
        150_000, {"swa_full_tokens_ratio": 1.0},
    ),
    "mla": Model(
        "like DeepSeek-V3's attention, 27 dense layers, 16 heads", "deepseek_v3",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 27,
         "vocab_size": 32000, "q_lora_rank": 512}, 280_000,
    ),
    "verify": Model(
        "dense, 32 layers, head dim 128, EAGLE", "llama",
        {**_DENSE, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}, 140_000,
        _CHAIN, "eagle", (1, 8, 32), (1024, 8192),
    ),
}  # fmt: skip
TINY = Model(
    "tiny, for a trial of the benchmark", "llama",
    {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512},
    4096, batches=(1, 2), contexts=(64, 128), prefills=(64, 128),
)  # fmt: skip


def own_model(path: str, kv_tokens: int | None = None) -> Model:
    """Return the operator's model at ``path``, with the places that its context has room for.

    Args:
        path: a folder with ``config.json``, or a name that SGLang knows how to fetch.
        kv_tokens: size of each peer's KV cache; ``None``: :data:`OWN_KV_TOKENS`.
    """
    limit = context_limit(Path(path))
    model = Model(path, "", {}, kv_tokens or OWN_KV_TOKENS, path=path)
    return model if limit is None else within(model, limit - ROOM)


ROOM = 128
"""Tokens that a request may be continued by."""


def context_limit(folder: Path) -> int | None:
    """Return the longest context that ``config.json`` in ``folder`` names, or ``None``."""
    page = folder / "config.json"
    if not page.is_file():
        return None
    config = json.loads(page.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    limit = text.get("max_position_embeddings")
    return None if limit is None else int(limit)


def within(model: Model, longest: int) -> Model:
    """Return ``model`` without the places of longer prompts than ``longest`` tokens."""
    contexts = tuple(length for length in model.contexts if length <= longest)
    prefills = tuple(length for length in model.prefills if length <= longest)
    return replace(model, contexts=contexts, prefills=prefills)


def quick(model: Model) -> Model:
    """Return ``model`` with two batches, one context and two prefills."""
    return replace(
        model, batches=model.batches[:2], contexts=model.contexts[:1], prefills=model.prefills[:2]
    )


def shared_among(model: Model, peers: int) -> Model:
    """Return ``model`` with KV caches of which this many fit where three of its own do."""
    if model.path or peers <= 3:
        return model
    return replace(model, kv_tokens=model.kv_tokens * 3 // peers)


def engine_arguments(model: Model, scratch: Path, device: str) -> dict[str, Any]:
    """Return the arguments of ``sglang.Engine`` that all peers share on this kind of device."""
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True, "random_seed": 0, "log_level": "info", "page_size": PAGE,
        "max_total_tokens": model.kv_tokens, "max_running_requests": max(model.batches) + 8,
        "chunked_prefill_size": 40960, "max_prefill_tokens": 40960, "sleep_on_idle": True,
        "sampling_backend": "pytorch", **_source(model, scratch), **model.arguments,
    }  # fmt: skip
    if model.draft:
        shape = {**model.shape, "num_hidden_layers": 1}
        arguments["speculative_draft_model_path"] = str(
            write_model(scratch / "draft", model.draft, **shape)
        )
    if device == "cpu":
        own = {"device": "cpu", "dtype": "float32", "graphs": [], "mem_fraction_static": 0.3}
        return {**arguments, **own}
    # What an engine takes is what max_total_tokens says: the fraction must only not be in its way
    # while others boot.
    graphs = {"graphs": list(model.batches), "prefill_graphs": False}
    return {**arguments, "mem_fraction_static": 0.9, **graphs}


def _source(model: Model, scratch: Path) -> dict[str, Any]:
    """Return where an engine finds the model, and how it loads it."""
    if model.path:
        return {"model_path": model.path}
    return {
        "model_path": str(write_model(scratch / "target", model.family, **model.shape)),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "context_length": model.longest + 4096,
    }


def planned_kinds(models: Mapping[str, Model]) -> dict[str, Sequence[str]]:
    """Return the kinds of places of each model, for a report that names what is missing."""
    return {name: model.kinds for name, model in models.items()}
