"""Random cases: models of every kind that upstream serves, and what a server does."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzzing.passes import HAS_PAGED_CHUNKS, ON_GPU, Case, Lane, Operation
from tests.support import zigzag
from tests.support.backend import upstream

EDGES = (0, 1, 15, 16, 31, 61, 62, 63, 64, 65, 66, 125, 126, 127, 128, 129, 191, 192, 255)
"""Lengths around the borders of pages and of the kernels' tiles."""
KINDS = {
    "decode": 8, "prefill": 5, "extend": 4, "mixed": 3, "verify": 4, "draft": 3, "draft extend": 2,
    "padded": 1,
    "replay": 4, "interleaved": 3, "threads": 3, "again": 1, "fault": 1, "finish": 2, "idle": 1,
    "reload": 1, "one shot": 2, "prefix chunks": 2,
}  # fmt: skip
"""The actions of a server, and their shares."""
CHECKS = ("off", "off", "off", "off", "metadata", "output")


def random_case(seed: int, operations: int = 40, models: Sequence[str] = ()) -> Case:
    """The case of ``seed``, over the kinds of models that ``models`` names; empty: over all."""
    chance = random.Random(seed)
    lanes = [random_lane(chance, models) for _ in range(chance.choice((1, 2)))]
    if len(lanes) == 2:
        # Upstream reads its server arguments from one place of the process.
        lanes[1] = _beside(lanes[0], lanes[1])
    steps = [random_operation(chance) for _ in range(operations)]
    return Case(tuple(lanes), (Operation("prefill", 0, (0,), (70, 5)), *steps))


def _beside(first: Lane, second: Lane) -> Lane:
    if first.arguments() == second.arguments() and first.page_size == second.page_size:
        return second
    return Lane(layers=first.layers, **_fields(first) | {"seed": second.seed})


def _fields(lane: Lane) -> dict[str, Any]:
    return {name: value for name, value in vars(lane).items() if name != "layers"}


def random_operation(chance: random.Random) -> Operation:
    """One thing that a server does."""
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    picks = tuple(chance.randrange(8) for _ in range(chance.randint(1, 4)))
    counts = tuple(random_length(chance) for _ in range(chance.randint(1, 3)))
    cut = chance.randint(1, 3) if chance.random() < 0.06 else 0
    return Operation(kind, chance.randrange(2), picks, counts, cut)


def random_length(chance: random.Random) -> int:
    """A number of tokens: mostly few, often near a border."""
    kind = chance.random()
    if kind < 0.5:
        return chance.randrange(20)
    return chance.choice(EDGES) if kind < 0.85 else chance.randrange(300)


def random_lane(chance: random.Random, models: Sequence[str] = ()) -> Lane:
    """A model of any kind, or of those named, under any settings."""
    names = list(models or MODEL_NAMES)
    weights = [MODELS[MODEL_NAMES[name]] for name in names]
    make = MODEL_NAMES[chance.choices(names, weights)[0]]
    lane = make(chance)
    common = {
        "inference_mode": chance.random() < 0.3,
        "check": chance.choice(("off", "metadata") if ON_GPU else CHECKS),
        "plans": chance.choice(("auto", "always")),
        "raw_prefill": chance.choice(("on", "on", "off")),
        "force_update": chance.random() < 0.05,
        "seed": chance.randrange(1 << 16),
    }
    return Lane(**vars(lane) | common)


def _page_size(chance: random.Random) -> int:
    return chance.choice((1, 16, 64, 64, 64, 128))


def _heads(chance: random.Random) -> dict[str, Any]:
    heads, kv_heads = chance.choice(((4, 2), (4, 4), (4, 1), (8, 2)))
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": chance.choice((8, 16, 24))}


def _uniform(chance: random.Random) -> Lane:
    topk = chance.choice((0, 0, 1, 1, 2))
    heads = _heads(chance)
    layers = tuple(dict(heads) for _ in range(chance.choice((1, 2, 3, 4, 6, 8))))
    return Lane(layers, _page_size(chance), topk=topk, drafts=topk > 0 and chance.random() < 0.3)


def _softcap(chance: random.Random) -> Lane:
    heads = _heads(chance)
    layers = tuple(heads | {"logit_cap": chance.choice((0.0, 2.0, 30.0))} for _ in range(3))
    return Lane(layers, _page_size(chance))


def _windows(chance: random.Random) -> Lane:
    heads, window = _heads(chance), chance.choice((1, 31, 40, 63, 64, 100))
    layers = tuple(
        heads | {"sliding_window_size": chance.choice((-1, window))}
        for _ in range(chance.randint(2, 4))
    )
    pages = chance.random() < 0.5
    size = 64 if pages else _page_size(chance)
    return Lane(layers, size, window=window, window_pages=pages)


def _shapes(chance: random.Random) -> Lane:
    layers = []
    for _ in range(chance.randint(2, 4)):
        shape = _heads(chance)
        shape["head_dim"] = chance.choice((16, 80, 144, 200))
        layers.append(shape)
    return Lane(tuple(layers), 64)


def _sinks(chance: random.Random) -> Lane:
    heads, window = _heads(chance), chance.choice((-1, 40))
    layers = tuple(heads | {"sinks": True, "sliding_window_size": window} for _ in range(2))
    return Lane(layers, 64, window=None if window < 0 else window)


def _both_ways(chance: random.Random) -> Lane:
    heads = _heads(chance)
    kinds = ("decoder", "decoder_bidirectional") if HAS_BOTH_WAYS else ("decoder",)
    layers = tuple(heads | {"attn_type": chance.choice(kinds)} for _ in range(3))
    return Lane(layers, 64)


def _sharing(chance: random.Random) -> Lane:
    heads = _heads(chance)
    return Lane((heads, dict(heads), heads | {"shares": 1}, heads | {"shares": 3}), 64)


def _chunks(chance: random.Random) -> Lane:
    heads = _heads(chance)
    layers = tuple(heads | {"use_irope": index % 2 == 0} for index in range(3))
    return Lane(layers, 64 if HAS_PAGED_CHUNKS else 1, chunk=chance.choice((64, 128)))


def _latent(chance: random.Random) -> Lane:
    layers = tuple({"heads": chance.choice((2, 4))} for _ in range(chance.randint(1, 3)))
    topk = chance.choice((0, 1, 2))
    drafts = topk > 1 or (topk == 1 and chance.random() < 0.3)
    return Lane(layers, 64, context_len=384, mla=True, topk=topk, drafts=drafts)


def _embedding(chance: random.Random) -> Lane:
    heads, window = _heads(chance), chance.choice((-1, 40))
    layers = tuple(heads | {"sliding_window_size": window} for _ in range(2))
    return Lane(layers, 64, window=None if window < 0 else window, embedding=True)


def _deterministic(chance: random.Random) -> Lane:
    heads = _heads(chance)
    return Lane(tuple(dict(heads) for _ in range(2)), _page_size(chance), deterministic=True)


def _encoder(chance: random.Random) -> Lane:
    heads = _heads(chance)
    kinds = [chance.random() < 0.5 for _ in range(chance.randint(1, 3))]
    layers = tuple(heads | {"is_cross_attention": cross} for cross in (False, *kinds))
    # Upstream reads encoder pages of one token only.
    return Lane(layers, 1, context_len=256, encoder=True)


def _ranks(chance: random.Random) -> Lane:
    if zigzag.HAS_STRATEGIES and chance.random() < 0.4:
        return Lane(_latent(chance).layers, 64, context_len=384, mla=True, ranks=2)
    heads = _heads(chance)
    return Lane(tuple(dict(heads) for _ in range(chance.randint(1, 3))), 64, ranks=2)


def _fp8(chance: random.Random) -> Lane:
    lane = chance.choice((_uniform, _softcap, _windows))(chance)
    wanted = {"topk": min(lane.topk, 1), "drafts": False, "window_pages": False, "fp8": True}
    scales = chance.choice((None, (0.25, 4.0), (0.5, 2.0)))
    return Lane(**vars(lane) | wanted | {"scales": scales})


HAS_ENCODERS = "Only encoder size 1" not in inspect.getsource(upstream)
"""True if this SGLang serves several requests with encoders in one pass."""
HAS_BOTH_WAYS = "DECODER_BIDIRECTIONAL" in inspect.getsource(upstream)
MODELS: dict[Callable[[random.Random], Lane], int] = {
    _uniform: 4, _latent: 4, _windows: 3, _chunks: 2, _softcap: 1, _shapes: 1, _sinks: 1,
    _both_ways: 1,
    _sharing: 1, _embedding: 1, _deterministic: 1, _ranks: 1,
    **({_encoder: 1} if HAS_ENCODERS else {}),
    **({} if ON_GPU else {_fp8: 2}),
}  # fmt: skip
"""Kinds of models, by what their layers differ in, and how often each is taken."""
MODEL_NAMES = {make.__name__.strip("_").replace("_", "-"): make for make in MODELS}
