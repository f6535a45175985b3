"""Layers, models and helpers that the tests of attention share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.backend import (
    Model,
    attention,
    attention_layer,
    mla_layer,
    upstream,
)

WINDOW = 40
FORWARD_PARAMETERS = inspect.signature(upstream.FlashAttentionBackend.forward_extend).parameters


def needs_keyword(name: str) -> pytest.MarkDecorator:
    """Skip a test where this release's forwards have no such keyword."""
    return pytest.mark.skipif(
        name not in FORWARD_PARAMETERS, reason=f"this SGLang has no {name}= in its forwards"
    )


def uniform_layers(count: int = 3, **options: Any) -> list[Any]:
    """Layers that are all alike."""
    return [attention_layer(index, **options) for index in range(count)]


def mla_model(layers: int = 2, **options: Any) -> Model:
    """A small model with multi-head latent attention."""
    return Model([mla_layer(index) for index in range(layers)], mla=True, **options)


def draft_of(model: Model, steps: int = 4, topk: int = 1) -> Any:
    """Our multi-step draft backend over a one-layer draft model with the page size of ``model``."""
    layers = [mla_layer(0)] if model.mla else uniform_layers(1, heads=2, kv_heads=1)
    draft = Model(
        layers,
        mla=model.mla,
        draft_worker=True,
        arguments=model.arguments,
        context_len=model.context_len,
    )
    return draft, attention.MusaFA3MultiStepDraftBackend(draft.runner(), topk, steps)


SPEC = {
    "speculative_algorithm": "EAGLE",
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
TOPK = {**SPEC, "speculative_eagle_topk": 2}


def widen(backend: Any, model: Model) -> None:
    """Give the metadata a page table of the full context, as a graph's static one has."""
    metadata = backend.forward_metadata
    table = torch.zeros(
        metadata.page_table.shape[0], model.context_len // model.page_size, dtype=torch.int32
    )
    table[:, : metadata.page_table.shape[1]] = metadata.page_table
    metadata.page_table = table


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of ``jobs``, each run in a thread of its own; raises what one of them raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.result() for future in futures]
