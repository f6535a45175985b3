"""Tiny random models, made on the spot, and what they answer according to transformers alone."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 512
WIDE = 0.15
"""Standard deviation of weights: with the usual 0.02 tokens repeat, and tests see nothing."""
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "initializer_range": WIDE,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields of most configurations: two layers, four query heads on two key heads of 16."""


@dataclass(frozen=True)
class TinyModel:
    """A configuration of transformers' and the weights that seed 0 gives it."""

    config: str
    """Name of the configuration class."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    """Name of the model class; ``None``: the one that generates text with this configuration."""

    def build(self, directory: Path) -> None:
        """Write the model to ``directory`` as a checkpoint."""
        import torch
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.fields)
        if self.architecture is None:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(transformers, self.architecture)(config)
        _tell_apart(model)
        model.float().save_pretrained(directory)

    @property
    def name(self) -> str:
        """A directory's name: readable, and of this configuration alone."""
        content = json.dumps(
            [self.config, dict(self.fields), self.architecture], sort_keys=True, default=str
        )
        return f"{self.config}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class EagleDraft(TinyModel):
    """An EAGLE head of one random layer, for a Llama; ``architecture`` is SGLang's name."""

    def build(self, directory: Path) -> None:
        """Write the head to ``directory`` as a checkpoint."""
        import torch
        import transformers
        from safetensors.torch import save_file

        torch.manual_seed(1)
        fields = {**self.fields, "num_hidden_layers": 1, "architectures": [self.architecture]}
        config = transformers.LlamaConfig(**fields, draft_vocab_size=VOCABULARY)
        model = transformers.LlamaForCausalLM(config).float()
        weights = {
            name.removeprefix("model."): weight for name, weight in model.state_dict().items()
        }
        hidden = config.hidden_size
        if self.architecture == "LlamaForCausalLMEagle3":
            for name in (
                "q_proj",
                "k_proj",
                "v_proj",
            ):  # They see the embedding beside the hidden state.
                key = f"layers.0.self_attn.{name}.weight"
                weights[key] = torch.cat(
                    [weights[key], WIDE * torch.randn_like(weights[key])], dim=1
                )
            weights["layers.0.hidden_norm.weight"] = torch.ones(hidden)
            weights["fc.weight"] = WIDE * torch.randn(hidden, 3 * hidden)
        else:
            weights["fc.weight"] = WIDE * torch.randn(hidden, 2 * hidden)
            weights["fc.bias"] = torch.zeros(hidden)
        config.save_pretrained(directory)
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()},
            directory / "model.safetensors",
        )


@dataclass(frozen=True)
class WithoutVision(TinyModel):
    """A model of text and images whose checkpoint has no weights of the vision tower."""

    def build(self, directory: Path) -> None:
        """Write the model to ``directory`` as a checkpoint."""
        from safetensors.torch import load_file, save_file

        super().build(directory)
        checkpoint = directory / "model.safetensors"
        weights = load_file(checkpoint)
        text = {name: weight for name, weight in weights.items() if "vision" not in name}
        save_file(text, checkpoint, metadata={"format": "pt"})


@dataclass(frozen=True)
class DFlashDraft(TinyModel):
    """A DFLASH draft of one random layer, for a model of the same fields, which drafts blocks of
    four tokens from the hidden states of the model's first layer.
    """

    config: str = "Qwen3Config"
    architecture: str | None = "DFlashDraftModel"

    def build(self, directory: Path) -> None:
        """Write the draft to ``directory`` as a checkpoint."""
        import torch
        import transformers
        from safetensors.torch import save_file

        torch.manual_seed(1)
        own = {"num_hidden_layers": 1, "architectures": [self.architecture]}
        drafting = {
            "block_size": 4,
            "num_target_layers": self.fields["num_hidden_layers"],
            "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0]},
        }
        config = transformers.Qwen3Config(**{**self.fields, **own, **drafting})
        model = transformers.Qwen3ForCausalLM(config).float()
        _tell_apart(model)
        hidden = config.hidden_size
        weights = {
            name.removeprefix("model."): weight
            for name, weight in model.state_dict().items()
            if "embed_tokens" not in name and "lm_head" not in name
        }
        weights["fc.weight"] = WIDE * torch.randn(hidden, hidden)
        weights["hidden_norm.weight"] = torch.ones(hidden)
        config.save_pretrained(directory)
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()},
            directory / "model.safetensors",
        )


ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer that an adapter changes."""


@dataclass(frozen=True)
class AdaptedModel(TinyModel):
    """A model with a LoRA adapter merged into its weights, and the adapter beside it.

    The adapter is the folder ``adapter`` of the checkpoint, for the model without it.
    """

    seed: int = 0
    rank: int = 4
    alpha: int = 8

    def build(self, directory: Path) -> None:
        """Write the merged model to ``directory``, and the adapter to its folder ``adapter``."""
        import torch
        from safetensors.torch import load_file, save_file

        super().build(directory)
        checkpoint = directory / "model.safetensors"
        weights = load_file(checkpoint)
        torch.manual_seed(self.seed)
        adapter = {}
        for name in sorted(weights):
            if any(f".{adapted}." in name for adapted in ADAPTED):
                rows, columns = weights[name].shape
                down, up = torch.randn(self.rank, columns), torch.randn(rows, self.rank)
                down, up = 0.1 * down, 0.1 * up
                weights[name] += self.alpha / self.rank * up @ down
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                adapter[f"{prefix}.lora_A.weight"] = down
                adapter[f"{prefix}.lora_B.weight"] = up
        save_file(weights, checkpoint, metadata={"format": "pt"})
        (directory / "adapter").mkdir()
        save_file(adapter, directory / "adapter" / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(ADAPTED),
            "bias": "none",
        }
        (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    @property
    def name(self) -> str:
        """The model's, and which adapter is merged into it."""
        return f"{super().name}-adapter{self.seed}"


def _tell_apart(model: Any) -> None:
    """Make every part of the model count for what it answers.

    Parameters that start out constant (norms, biases) get values of their own. Embeddings that are
    the output layer as well are made small beside what the layers add, or every token would repeat
    itself.
    """
    import torch

    if model.config.tie_word_embeddings:
        model.get_input_embeddings().weight.data.mul_(0.2)
    for parameter in model.parameters():
        if parameter.numel() > 1 and torch.all(parameter == parameter.flatten()[0]):
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def greedy(
    model: Path, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Return transformers' greedy tokens and log-probabilities of each prompt, in float32."""
    return greedy_each(model, [(prompt, new_tokens) for prompt in prompts])


def greedy_each(
    model: Path, prompts: Sequence[tuple[Sequence[int], int]]
) -> list[tuple[list[int], list[float]]]:
    """Return ``greedy`` of prompts that each say how many new tokens they get."""
    import torch

    torch.set_num_threads(1)
    network = network_of(model)
    return [_greedy(network, list(prompt), new_tokens) for prompt, new_tokens in prompts]


def network_of(model: Path, attention: str = "eager") -> Any:
    """The model in transformers, of the very class that wrote the checkpoint."""
    import torch
    import transformers

    (architecture,) = json.loads((model / "config.json").read_text())["architectures"]
    network = getattr(transformers, architecture)
    loaded = network.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)
    return loaded.eval()


def embeddings(
    model: Path, prompts: Sequence[Sequence[int]], position: int | None
) -> list[list[float]]:
    """The normalized last hidden state of each prompt's token at ``position``, in float32.

    ``None``: the mean of all of its tokens'.
    """
    import torch

    torch.set_num_threads(1)
    network = network_of(model)
    with torch.inference_mode():
        states = [
            network.base_model(torch.tensor([list(prompt)])).last_hidden_state for prompt in prompts
        ]
    rows = [state[0].mean(0) if position is None else state[0, position] for state in states]
    return [(row / row.norm()).tolist() for row in rows]


def _greedy(network: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Every step computes the whole sequence anew, so that no cache can be at fault."""
    import torch

    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.inference_mode():
        for _ in range(new_tokens):
            scores = (
                network(torch.tensor([prompt + tokens]), use_cache=False)
                .logits[0, -1]
                .log_softmax(-1)
            )
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return tokens, logprobs


def shortfalls(
    model: Path,
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    attention: str = "eager",
) -> list[float]:
    """Return by how much less probable than the best one each token of the answers to prompts is
    according to transformers, in float32, after the same text: differences of log-probabilities, 0
    for the best.
    """
    import torch

    torch.set_num_threads(1)
    network = network_of(model, attention)
    gaps: list[float] = []
    for prompt, answer in answers:
        gaps += _shortfalls(network, prompt, answer)
    return gaps


def _shortfalls(network: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    import torch

    with torch.inference_mode():
        logits = network(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return [float(gap) for gap in scores.amax(-1) - chosen]


def llama(**fields: Any) -> TinyModel:
    """Two layers, four query heads on two key heads of 16, unless ``fields`` say otherwise."""
    return TinyModel("LlamaConfig", SMALL | fields)


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    """``count`` ordinary tokens, which ``seed`` decides."""
    import random

    return tuple(random.Random(seed).choices(range(3, VOCABULARY), k=count))


_SPECIALS = ("<unk>", "<s>", "</s>")


def byte_tokens(more: int = 0) -> dict[str, int]:
    """Return the number of each letter's token in :func:`add_tokenizer`'s vocabulary, where there
    are ``more`` special tokens. A letter of ASCII stands for itself, but a space is ``Ġ``.
    """
    tokenizers: Any = importlib.import_module("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return {letter: number for number, letter in enumerate(alphabet, len(_SPECIALS) + more)}


def add_tokenizer(directory: Path, more: Sequence[str] = ()) -> None:
    """Give the checkpoint in ``directory`` a tokenizer of single bytes, and a chat template.

    Args:
        directory: of the checkpoint.
        more: special tokens, from number 3 on.
    """
    import transformers

    tokenizers: Any = importlib.import_module("tokenizers")
    specials = [*_SPECIALS, *more]
    vocabulary = {token: number for number, token in enumerate(specials)} | byte_tokens(len(more))
    for number in range(VOCABULARY - len(vocabulary)):
        vocabulary[f"<{number}>"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=list(more),
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    fast.save_pretrained(directory)


def chat(model: Path, question: str, new_tokens: int) -> str:
    """Return transformers' answer to ``question``, with the model's tokenizer and chat template."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    ((answer, _),) = greedy(model, [tokenizer.encode(text)], new_tokens)
    return str(tokenizer.decode(answer))
