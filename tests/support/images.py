"""Images for models that take some: their features are made here, so that no processor is needed.

Its length and the model's sizes decide what is in an image. ``prepare`` is called where an engine
boots.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import tiny_models

IMAGE = "an image"
"""What a request that has one gives in place of a file's name."""
TOKEN = 5
"""Stands for a part of an image in a prompt."""


def prepare() -> None:
    """Have SGLang's tokenizer manager take its images from here."""
    manager: Any = importlib.import_module("sglang.srt.managers.tokenizer_manager")
    for name in ("get_processor_wrapper", "_get_processor_wrapper", "import_processors"):
        if hasattr(manager, name):
            setattr(manager, name, lambda *_, **__: None)
    manager.get_mm_processor = lambda config, *_, **__: Processor(config)


class Processor:
    """Gives every request the one image of its model."""

    prefer_tokenized_input = True

    def __init__(self, config: Any) -> None:
        """Keep the configuration of transformers'."""
        self._config = config

    def shutdown(self) -> None:
        """Hold nothing that would have to end."""

    async def process_mm_data_async(self, input_text: Any, **_: Any) -> Any:
        """Return what the scheduler gets of an image, for a prompt that is token ids."""
        batch: Any = importlib.import_module("sglang.srt.managers.schedule_batch")
        ids = list(input_text)
        item = batch.MultimodalDataItem(modality=batch.Modality.IMAGE)
        if self._config.model_type == "mllama":
            pixels, ratios, tiles = mllama_pixels(self._config)
            item.feature = pixels
            item.model_specific_data.update(aspect_ratio_ids=ratios, aspect_ratio_mask=tiles)
        else:
            places = [place for place, token in enumerate(ids) if token == TOKEN]
            item.offsets = [(places[0], places[-1])]
            item.feature = embeddings(len(places), self._config.text_config.hidden_size)
        return batch.MultimodalProcessorOutput(
            mm_items=[item], input_ids=ids, im_start_id=TOKEN - 1, im_end_id=TOKEN + 1
        )


def embeddings(count: int, size: int) -> Any:
    """Return what a vision tower would give for an image: ``(1, count, size)``."""
    import torch

    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, count, size, generator=generator)


def mllama_pixels(config: Any) -> tuple[Any, Any, Any]:
    """Return an image of one tile, the number of its aspect ratio, and which tiles it has."""
    import torch

    size = config.vision_config.image_size
    tiles = config.vision_config.max_num_tiles
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(1, 1, tiles, 3, size, size, generator=generator)
    return pixels, torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, tiles, dtype=torch.long)


def greedy(
    model: Path, prompt: Sequence[int], new_tokens: int, both_ways: bool
) -> tuple[list[int], list[float]]:
    """Return transformers' greedy tokens and log-probabilities after a prompt with an image.

    Args:
        model: the checkpoint of a Gemma-3.
        prompt: token ids, with :data:`TOKEN` for each part of the image.
        new_tokens: how many.
        both_ways: whether the image's tokens attend to one another both ways.
    """
    import torch

    torch.set_num_threads(1)
    network = tiny_models.network_of(model)
    ids, logprobs = list(prompt), []
    with torch.inference_mode():
        for _ in range(new_tokens):
            read = torch.tensor([ids])
            is_image = read == TOKEN
            read_embeddings = network.get_input_embeddings()(read)
            count, size = int(is_image.sum()), read_embeddings.shape[-1]
            read_embeddings[is_image] = embeddings(count, size)[0]
            kinds = is_image.long() if both_ways else None
            logits = network(inputs_embeds=read_embeddings, token_type_ids=kinds, use_cache=False)
            scores = logits.logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs
