"""A tiny random model that sees images, with its processor, and transformers' answers about them.

Everything is made on the spot: configuration, weights, a tokenizer of single bytes, the processor,
and images of random patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import tiny_models
from tests.support.tiny_models import SMALL, WIDE, TinyModel

TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
FIRST = 3
"""The number of the first of ``TOKENS``, behind the tokenizer's own special ones."""
START, PAD, END, VIDEO = range(FIRST, FIRST + len(TOKENS))
PATCH = 28
"""Pixels in a row of those that one token of the text stands for: two patches of 14."""
_TEXT = {name: value for name, value in SMALL.items() if name != "head_dim"}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_VISION = {
    "depth": 2, "hidden_size": 160, "intermediate_size": 128, "num_heads": 2, "window_size": 112,
    "fullatt_block_indexes": [1], "out_hidden_size": SMALL["hidden_size"],
    "initializer_range": WIDE,
}  # fmt: skip
"""Two layers, one with windows and one without, of two heads of 80, as in the real model."""


def qwen_2_5_vl() -> ImageModel:
    """Return a Qwen2.5-VL."""
    fields = {
        "text_config": {**_TEXT, "rope_parameters": _ROTARY},
        "vision_config": _VISION,
        "image_token_id": PAD,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }
    return ImageModel("Qwen2_5_VLConfig", fields, "Qwen2_5_VLForConditionalGeneration")


@dataclass(frozen=True)
class ImageModel(TinyModel):
    """A model of text and images, and its processor."""

    processor: str = "Qwen2_5_VLProcessor"
    sizes: dict[str, int] = field(
        default_factory=lambda: {"shortest_edge": 4 * PATCH**2, "longest_edge": 400 * PATCH**2}
    )
    """The fewest and the most pixels of an image."""

    def build(self, directory: Path) -> None:
        """Write model and processor to ``directory``."""
        import transformers

        super().build(directory)
        tiny_models.add_tokenizer(directory, TOKENS)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as images
        from transformers.models.qwen2_vl import video_processing_qwen2_vl as videos

        processor = getattr(transformers, self.processor)(
            images.Qwen2VLImageProcessorPil(size=self.sizes),
            tokenizer,
            videos.Qwen2VLVideoProcessor(),
        )
        processor.save_pretrained(directory)


def write_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Write an image of random squares, ``width`` by ``height`` tokens of the text."""
    import numpy
    from PIL import Image

    squares = numpy.random.default_rng(seed).integers(0, 256, (2 * height, 2 * width, 3))
    picture = Image.fromarray(squares.astype(numpy.uint8))
    picture.resize((PATCH * width, PATCH * height), Image.Resampling.BILINEAR).save(path)
    return path


def prompt(text: str, images: int = 1) -> tuple[int, ...]:
    """Return the tokens of ``images`` images, each one placeholder, and of a text in ASCII."""
    alphabet = tiny_models.byte_tokens(len(TOKENS))
    return (START, PAD, END) * images + tuple(alphabet[letter] for letter in text)


Answer = tuple[Sequence[int], Sequence[str], Sequence[int]]
"""A prompt's tokens, with one placeholder for each image, the images' files, and the answer."""


def shortfalls(model: Path, answers: Sequence[Answer]) -> list[float]:
    """Return ``tiny_models.shortfalls`` of answers about images."""
    import torch
    import transformers

    torch.set_num_threads(1)
    processor = transformers.AutoProcessor.from_pretrained(model)
    pil = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    processor.image_processor = pil
    network = tiny_models.network_of(model)
    gaps: list[float] = []
    for answer in answers:
        gaps += _shortfalls(network, processor, answer)
    return gaps


def _shortfalls(network: Any, processor: Any, asked: Answer) -> list[float]:
    import torch
    from PIL import Image

    tokens, images, answer = asked
    inputs = processor(
        text=[processor.tokenizer.decode(list(tokens))],
        images=[Image.open(path).convert("RGB") for path in images] or None,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    more = {
        "input_ids": torch.tensor([list(answer)]),
        "attention_mask": torch.ones(1, len(answer)).long(),
        "mm_token_type_ids": torch.zeros(1, len(answer)).long(),
    }
    for name in more.keys() & inputs.keys():
        inputs[name] = torch.cat([inputs[name], more[name].to(inputs[name].dtype)], dim=1)
    with torch.inference_mode():
        logits = network(**inputs, use_cache=False).logits[0]
    scores = logits[length - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return [float(gap) for gap in scores.amax(-1) - chosen]
