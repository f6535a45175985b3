"""The limits of SGLang's own ``fa3``, whoever's kernels it has, one row for each.

Such a configuration ends a server in the middle of serving, or answers wrongly, with upstream's
class as with ours. The defaults on MUSA do not choose ``fa3`` for it, and a server that names
``fa3`` stops at start, or is warned where the model still serves much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sglang_musa_ext.upstream.releases import version_key
from sglang_musa_ext.upstream.requirement import NONE_KNOWN

_ENCODER_DECODERS = frozenset(
    {
        "WhisperForConditionalGeneration",
        "MllamaForConditionalGeneration",
        "MossVLForConditionalGeneration",
    }
)
_WITH_SINKS = frozenset(
    {
        "GptOssForCausalLM",
        "GraniteSWAForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "IQuestQ1ForCausalLM",
        "IQuestQ1MTP",
    }
)
_SINK_FLAGS = ("learnable_sink", "add_swa_attention_sink_bias", "add_full_attention_sink_bias")
"""Facts that SGLang tells by a model's class, where only its ``config.json`` is at hand."""


@dataclass(frozen=True)
class Configuration:
    """A server's request, as far as it decides about its attention backend.

    Each field has the value that leaves the choice open, so that callers give what they know.
    """

    dtype: str = "auto"
    """Of the model, in SGLang's or PyTorch's spelling."""
    kv_cache_dtype: str = "auto"
    page_size: int | None = None
    """Tokens in a page; ``None``: what SGLang chooses."""
    use_mla: bool = False
    topk: int | None = None
    """``--speculative-eagle-topk``: branches of a draft tree; ``None`` or 1: a chain, or none."""
    speculative_algorithm: str | None = None
    architectures: tuple[str, ...] = ()
    """Class names from the model's ``config.json``."""
    is_encoder_decoder: bool = False
    has_sliding_windows: bool = False
    has_sinks: bool = False
    """True if attention has sinks."""
    head_dims: frozenset[tuple[int, int]] = frozenset()
    """Head dimensions of keys and of values, as far as they are known."""
    mate: tuple[int, ...] | None = None
    """MATE's release as numbers; ``None``: not known."""
    device: str = ""
    """SGLang's ``--device``."""
    expert_columns: int | None = None
    """Columns of an expert's matrices on one rank; ``None``: no experts, or not known."""
    attention_chunk: int | None = None
    """Tokens in a chunk of attention, for models that attend in chunks."""
    max_running_requests: int | None = None
    """``--max-running-requests``; ``None``: what SGLang chooses."""
    mixed_chunk: bool = False
    """``--enable-mixed-chunk``."""
    takes_images: bool = False
    """True if the server looks at images, as far as its model can; see :func:`takes_images`."""
    skips_cache: bool = False
    """True if prompts are embedded without a KV cache; see :func:`skips_cache`."""
    capability: tuple[int, int] | None = None
    """MP version of the device; ``None``: unknown."""
    on_musa: bool = False
    """True if SGLang takes the device for a MUSA one, by whatever name."""
    quantization: str | None = None
    """The method by which the model is quantised; ``None``: it is not, or not known."""
    other_platform: bool = False
    """True if another platform plugin serves this process."""

    @classmethod
    def of(cls, server_args: Any, model_config: Any, **known: Any) -> Configuration:
        """Return the configuration of a server.

        Args:
            server_args: SGLang's ``ServerArgs``, or a view of it.
            model_config: SGLang's ``ModelConfig``.
            known: fields from who knows them better.
        """
        text = getattr(model_config, "hf_text_config", model_config.hf_config)
        fields = {
            "dtype": _name(getattr(model_config, "dtype", server_args.dtype)),
            "kv_cache_dtype": server_args.kv_cache_dtype,
            "page_size": server_args.page_size,
            "topk": server_args.speculative_eagle_topk,
            "speculative_algorithm": server_args.speculative_algorithm,
            "architectures": tuple(getattr(model_config.hf_config, "architectures", None) or ()),
            "is_encoder_decoder": getattr(model_config, "is_encoder_decoder", False),
            "has_sliding_windows": _has_sliding_windows(text),
            "has_sinks": getattr(model_config, "has_attention_sinks", False),
            "head_dims": frozenset(head_dims_of(model_config, known.get("use_mla", False))),
            "mixed_chunk": server_args.enable_mixed_chunk,
            "takes_images": takes_images(server_args, model_config),
            "skips_cache": skips_cache(server_args),
            "device": getattr(server_args, "device", None) or "",
            "expert_columns": expert_columns(server_args, text),
            "attention_chunk": getattr(text, "attention_chunk_size", None),
            "max_running_requests": getattr(server_args, "max_running_requests", None),
            "quantization": getattr(model_config, "quantization", None),
        }
        return cls(**(fields | known))

    @classmethod
    def of_config(cls, config: Mapping[str, Any], **known: Any) -> Configuration:
        """Return the configuration of a model, as far as its ``config.json`` alone says it.

        Args:
            config: its contents; a model of several modalities has its text part in
                ``text_config``.
            known: fields from who knows them better.
        """
        text = config.get("text_config") or config
        names = tuple(config.get("architectures") or ())
        windows = text.get("use_sliding_window") is not False and text.get("sliding_window")
        fields: dict[str, Any] = {
            "architectures": names,
            "use_mla": bool(text.get("kv_lora_rank")),
            "is_encoder_decoder": bool(_ENCODER_DECODERS.intersection(names)),
            "has_sliding_windows": bool(windows),
            "has_sinks": bool(_WITH_SINKS.intersection(names)) or any(map(text.get, _SINK_FLAGS)),
            "head_dims": _written_head_dims(text),
            "attention_chunk": text.get("attention_chunk_size"),
            "quantization": (config.get("quantization_config") or {}).get("quant_method"),
        }
        return cls(**(fields | known))

    @classmethod
    def of_backend(cls, backend: Any, runner: Any, **known: Any) -> Configuration:
        """Return the configuration that a backend has been built with.

        Args:
            backend: upstream's backend, or one that derives from it.
            runner: SGLang's ``ModelRunner`` that it was built for.
            known: fields from who knows them better.
        """
        window = getattr(runner, "sliding_window_size", None)
        return cls.of(
            runner.server_args,
            runner.model_config,
            kv_cache_dtype=_name(backend.kv_cache_dtype),
            page_size=backend.page_size,
            topk=backend.topk,
            use_mla=backend.use_mla,
            has_sliding_windows=window is not None and window > -1,
            **known,
        )

    @property
    def is_tree(self) -> bool:
        """Return whether drafts are trees and not chains."""
        return self.topk is not None and self.topk > 1

    @property
    def has_large_pages(self) -> bool:
        """Return whether a page has more than one token, as far as is known."""
        return self.page_size is not None and self.page_size > 1


def skips_cache(server_args: Any) -> bool:
    """Tell whether SGLang's ``fa3`` neither writes nor reads a KV cache, as it does to embed whole
    prompts of which no prefix is kept.

    Args:
        server_args: SGLang's ``ServerArgs``, or a view of it.
    """
    embeds = getattr(server_args, "is_embedding", False)
    keeps_none = getattr(server_args, "disable_radix_cache", False)
    return bool(embeds and keeps_none and server_args.chunked_prefill_size == -1)


def takes_images(server_args: Any, model_config: Any) -> bool:
    """Tell whether a server looks at images.

    For some models, Gemma-3 among them, SGLang does so only under ``--enable-multimodal``. A server
    that gets its images from an encoder's (``--language-only``) looks at them, too.

    Args:
        server_args: SGLang's ``ServerArgs``, or a view of it.
        model_config: SGLang's ``ModelConfig``, which settles what is said by the arguments.
    """
    is_text_only = getattr(server_args, "language_model_only", False)  # from 0.5.18 on
    return bool(getattr(model_config, "is_multimodal", False) and not is_text_only)


def expert_columns(server_args: Any, text_config: Any) -> int | None:
    """Return the columns of an expert's matrices on one rank, before SGLang pads them for a CPU.

    Args:
        server_args: SGLang's ``ServerArgs``, or a view of it.
        text_config: the configuration of the text model.
    """
    columns = getattr(text_config, "original_moe_intermediate_size", None)
    columns = columns or getattr(text_config, "moe_intermediate_size", None)
    if not isinstance(columns, int):
        return None
    ranks = getattr(server_args, "tp_size", None) or 1
    whole = getattr(server_args, "ep_size", None) or 1
    return columns // max(1, ranks // whole)


def head_dims_of(config: Any, use_mla: bool) -> set[tuple[int, int]]:
    """Read the head dimensions of keys and of values off upstream's ``ModelConfig``.

    Those of MLA's latent cache are not among them. ``ModelConfig.head_dim`` is a placeholder for
    models with latent attention, and some have no other word for what their prefill has.
    """
    if use_mla:
        parts = [getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
        headdim = None if None in parts else sum(parts)  # type: ignore[arg-type]
        pairs = {(headdim, getattr(config, "v_head_dim", None))}
    elif getattr(config, "kv_lora_rank", None):
        return set()
    else:
        headdim = getattr(config, "head_dim", None)
        window_headdim = getattr(config, "swa_head_dim", None)
        pairs = {
            (headdim, getattr(config, "v_head_dim", headdim)),
            (window_headdim, getattr(config, "swa_v_head_dim", window_headdim)),
        }
    return {(qk, v) for qk, v in pairs if qk and v}


def _written_head_dims(text: Mapping[str, Any]) -> frozenset[tuple[int, int]]:
    """Return the head dimensions that the text part of a ``config.json`` leads to."""
    plain, rotary = text.get("qk_nope_head_dim"), text.get("qk_rope_head_dim")
    heads, columns = text.get("num_attention_heads"), text.get("hidden_size")
    if text.get("kv_lora_rank"):
        headdim = plain + rotary if plain and rotary else None
    elif text.get("head_dim"):
        headdim = text["head_dim"]
    else:
        headdim = columns // heads if columns and heads else None
    headdim_v = text.get("v_head_dim") or headdim
    return frozenset({(headdim, headdim_v)} if headdim and headdim_v else ())


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _has_sliding_windows(text_config: Any) -> bool:
    is_used = getattr(text_config, "use_sliding_window", True)
    return is_used and getattr(text_config, "sliding_window", None) is not None


_OPEN = Configuration()
"""Nothing is chosen."""
_OPTIONS: Mapping[str, str] = {
    "page_size": "--page-size {}",
    "topk": "--speculative-eagle-topk {}",
    "speculative_algorithm": "--speculative-algorithm {}",
    "dtype": "--dtype {}",
    "kv_cache_dtype": "--kv-cache-dtype {}",
    "mixed_chunk": "--enable-mixed-chunk",
    "device": "--device {}",
}
"""The options that fields of a configuration come from."""


@dataclass(frozen=True)
class UpstreamLimit:
    """A configuration that SGLang's ``fa3`` cannot serve, or not rightly."""

    condition: str
    """The configuration, in words that follow "fa3 does not serve"."""
    applies: Callable[[Configuration], bool]
    happens: str
    """The behaviour of a server that is started all the same."""
    instead: str
    """The setting to use in its place."""
    is_fatal: bool = True
    """True if nothing useful is served, so that a server is stopped at start, not warned."""
    is_best: bool = False
    """True if ``fa3`` serves more than what SGLang would choose on MUSA, so that it stays the
    default there."""
    since: str | None = None
    until: str | None = None
    """The releases that have it, both included; ``None``: the oldest, and still."""
    reported: str = NONE_KNOWN
    """The issue or pull request of SGLang about it."""

    def holds_in(self, version: str | None) -> bool:
        """Tell whether SGLang ``version`` has the limit; ``None``: any version."""
        if version is None:
            return True
        key = version_key(version)
        if self.since is not None and key < version_key(self.since):
            return False
        return self.until is None or key <= version_key(self.until)

    def __str__(self) -> str:
        return f"fa3 does not serve {self.condition}: {self.happens}. {self.instead}."

    def refusal(self, asked: Configuration) -> str:
        """Return this text, with the options of ``asked`` without which it would not be met."""
        options = " ".join(
            option.format(getattr(asked, name))
            for name, option in _OPTIONS.items()
            if not self.applies(replace(asked, **{name: getattr(_OPEN, name)}))
        )
        return f"{self} This server has {options}." if options else str(self)


_TWO_WAY_IMAGES = frozenset({"Gemma3ForConditionalGeneration"})
"""Models whose tokens of an image attend to one another both ways."""
_BIASED = frozenset({"InklingForConditionalGeneration", "InklingForConditionalGenerationMTP"})
"""Models whose scores have a bias by the distance of a query from a key."""
_DRAFTING = frozenset({"EAGLE", "EAGLE3", "NEXTN", "STANDALONE"})
"""Algorithms in which a model drafts."""
_PREFILL_AWARE = frozenset({"UnlimitedOCRForCausalLM"})
"""Models whose windows keep what was prefilled."""
_GEMMA_4 = frozenset(
    {
        "Gemma4ForConditionalGeneration",
        "Gemma4ForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    }
)
"""Models for which SGLang itself has a list of backends."""
_CHUNKED = frozenset({"Llama4ForConditionalGeneration"})
"""Models whose attention in chunks SGLang turns on."""
_LATENT_LIKE_DEEPSEEK = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV3ForCausalLMNextN",
        "DeepseekVL2ForCausalLM",
        "DotsVLMForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "KimiK25ForConditionalGeneration",
        "KimiLinearForCausalLM",
        "KimiVLForConditionalGeneration",
        "LongcatFlashForCausalLM",
        "LongcatFlashForCausalLMNextN",
        "MistralLarge3ForCausalLM",
    }
)
"""Models whose latent attention is SGLang's ``DeepseekV2AttentionMLA``."""
_FLOAT16 = frozenset({"float16", "fp16", "half"})
_BFLOAT16 = frozenset({"bfloat16", "bf16"})
_FP8 = frozenset({"fp8_e4m3", "float8_e4m3fn"})


def _is_one_of(asked: Configuration, architectures: Iterable[str]) -> bool:
    return bool(set(asked.architectures) & set(architectures))


def _is_latent_float16(asked: Configuration) -> bool:
    is_plain = asked.dtype in _FLOAT16 and not asked.quantization
    return is_plain and asked.use_mla and _is_one_of(asked, _LATENT_LIKE_DEEPSEEK)


def _is_mtp(asked: Configuration) -> bool:
    return any(name.endswith(("NextN", "MTP")) for name in asked.architectures)


UPSTREAM_LIMITS = (
    UpstreamLimit(
        "an encoder-decoder model at pages of more than one token",
        lambda asked: asked.is_encoder_decoder and asked.has_large_pages,
        "its cross-attention has a table of tokens where kernels read one of pages, which ends in "
        "an IndexError or in wrong text",
        "Start the server with --page-size 1, or with another --attention-backend",
    ),
    UpstreamLimit(
        "a draft tree (--speculative-eagle-topk above 1) over sliding windows at pages of more "
        "than one token",
        lambda asked: asked.is_tree and asked.has_sliding_windows and asked.has_large_pages,
        "the first draft ends in an AssertionError",
        "Start the server with --speculative-eagle-topk 1, or with --page-size 1",
    ),
    UpstreamLimit(
        "a draft tree (--speculative-eagle-topk above 1) of an MLA model at pages of more than one "
        "token",
        lambda asked: asked.is_tree and asked.use_mla and asked.has_large_pages,
        "to verify a tree, SGLang passes a table of tokens for one of pages, and kernels then read "
        "elsewhere: tokens are wrong, or the server ends",
        "Start the server with --speculative-eagle-topk 1",
    ),
    UpstreamLimit(
        "a layer for multi-token prediction (MTP) as the draft under --speculative-algorithm "
        "STANDALONE",
        lambda asked: asked.speculative_algorithm == "STANDALONE" and _is_mtp(asked),
        "the layer asks for hidden states that STANDALONE does not pass, and the first draft ends "
        "in an AttributeError; SGLang takes any DeepSeek-V3 that drafts for such a layer",
        "Start the server with --speculative-algorithm EAGLE, or with another draft model",
    ),
    UpstreamLimit(
        "a float16 model with a bfloat16 KV cache",
        lambda asked: asked.dtype in _FLOAT16 and asked.kv_cache_dtype in _BFLOAT16,
        "the first forward ends in an error about dtypes",
        "Start the server with --kv-cache-dtype auto, or with --dtype bfloat16",
    ),
    UpstreamLimit(
        "embeddings without a KV cache (--is-embedding, --disable-radix-cache, "
        "--chunked-prefill-size -1) with --kv-cache-dtype fp8_e4m3",
        lambda asked: asked.skips_cache and asked.kv_cache_dtype in _FP8 and not asked.use_mla,
        "queries are cast to fp8 and keys are not, and the first request ends in an error about "
        "dtypes",
        "Start the server with --kv-cache-dtype auto",
    ),
    UpstreamLimit(
        "MLA like DeepSeek's in float16 on MUSA, with weights that are not quantised",
        lambda asked: asked.on_musa and _is_latent_float16(asked),
        "SGLang casts what attention returns to bfloat16 there, on any backend, and the first "
        "decode ends in an error about dtypes",
        "Start the server with --dtype bfloat16",
    ),
    UpstreamLimit(
        "attention in chunks (Llama-4) with --enable-mixed-chunk",
        lambda asked: asked.mixed_chunk and _is_one_of(asked, _CHUNKED),
        "a pass of prefills and decodes together attends to the whole context in its layers with "
        "chunks",
        "Start the server without --enable-mixed-chunk",
        until="0.5.18",
    ),
    UpstreamLimit(
        "attention in chunks (Llama-4) at pages of more than one token",
        lambda asked: _is_one_of(asked, _CHUNKED) and asked.has_large_pages,
        "its layers with chunks have a table of tokens where kernels read one of pages, which ends "
        "in an error of an index or of memory, or in wrong text",
        "Start the server with --page-size 1, or with another --attention-backend",
        until="0.5.19",
        reported="sgl-project/sglang#32902",
    ),
    UpstreamLimit(
        "attention in chunks (Llama-4) whose chunk is no multiple of the page size",
        lambda asked: bool(
            _is_one_of(asked, _CHUNKED)
            and asked.attention_chunk
            and asked.page_size
            and asked.attention_chunk % asked.page_size
        ),
        "the first prefill ends in an AssertionError",
        "Start the server with a --page-size that divides the model's attention_chunk_size",
        # Before, the row above has every page size but 1.
        since="0.5.20",
        until="0.5.21",
    ),
    UpstreamLimit(
        "several requests at once of an encoder-decoder model",
        lambda asked: asked.is_encoder_decoder and asked.max_running_requests != 1,
        "the first batch of two requests ends in an AssertionError",
        "Start the server with --max-running-requests 1",
        until="0.5.12.post1",
    ),
    UpstreamLimit(
        "Unlimited-OCR at pages of more than one token",
        lambda asked: _is_one_of(asked, _PREFILL_AWARE) and asked.has_large_pages,
        "its windows, which keep what was prefilled, are made for single tokens, and an "
        "AssertionError says so",
        "Start the server with --page-size 1",
        since="0.5.15.post1",
    ),
    UpstreamLimit(
        "Gemma-4",
        lambda asked: _is_one_of(asked, _GEMMA_4),
        "SGLang's own list of its attention backends lacks fa3, and an AssertionError says so",
        "Leave --attention-backend unset, or set it to triton",
        since="0.5.13.post1",
    ),
    UpstreamLimit(
        "Inkling",
        lambda asked: _is_one_of(asked, _BIASED),
        "SGLang passes the bias of its scores (score_mod, rel_bias) to fa4 and triton alone, and "
        "the first forward ends in an AssertionError",
        "Leave --attention-backend unset, or set it to triton",
        since="0.5.16",
    ),
    UpstreamLimit(
        "experts whose columns on a rank are no multiple of 32 on --device cpu",
        lambda asked: asked.device == "cpu" and (asked.expert_columns or 0) % 32 != 0,
        "SGLang pads them there and leaves what it pads unwritten: log-probabilities are wrong or "
        "NaN, and no error says so",
        "Start the server with a --tp-size that leaves a multiple of 32 to each rank, such as 1",
        # Before, the weights of the last rank do not load.
        since="0.5.17",
        until="0.5.22",
    ),
    UpstreamLimit(
        "images whose tokens attend to one another both ways (Gemma-3 with --enable-multimodal)",
        lambda asked: asked.takes_images and _is_one_of(asked, _TWO_WAY_IMAGES),
        "they attend one way only, and answers about images are worse; text alone is right",
        "Start the server with --attention-backend triton to ask about images, or without "
        "--enable-multimodal to ask about text alone",
        is_fatal=False,
    ),
    UpstreamLimit(
        "chains of drafts under graphs up to the end of the context",
        lambda asked: asked.speculative_algorithm in _DRAFTING and not asked.is_tree,
        "a request that reaches it ends the server with an AssertionError about a page table",
        "Keep requests shorter than the context by --speculative-num-steps",
        is_fatal=False,
        # SGLang's triton ends at the first draft there: it takes the wrong runner for its graphs.
        is_best=True,
        since="0.5.13.post1",
        until="0.5.14",
        reported="sgl-project/sglang#29516",
    ),
    UpstreamLimit(
        "--speculative-algorithm NGRAM up to the end of the context",
        lambda asked: asked.speculative_algorithm == "NGRAM",
        "a request that reaches it may end the server with a leak of its pool",
        "Keep requests shorter than the context by --speculative-num-draft-tokens",
        is_fatal=False,
    ),
)
"""Every limit of upstream's that is known; defaults, start-up and doctor read it from here."""


def limits_of(asked: Configuration, version: str | None = None) -> list[UpstreamLimit]:
    """Return the limits that ``asked`` meets in SGLang ``version`` (``None``: in any)."""
    return [limit for limit in UPSTREAM_LIMITS if limit.holds_in(version) and limit.applies(asked)]
