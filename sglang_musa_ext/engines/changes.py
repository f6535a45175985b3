"""Changes to engines of the kit and the benchmark, where a variable asks for them.

Each is made to one module, of SGLang or PyTorch, right after its import, in every process of an
engine.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WEIGHTS = "MUSA_EXT_ENGINE_WEIGHTS"
"""Set for engines whose dummy-loaded models get weights of :func:`initialize`."""
PLANS = "MUSA_EXT_ENGINE_PLANS"
"""Set for engines whose upstream backend asks FA3 for a new plan before every call."""
UNTUNED = "MUSA_EXT_ENGINE_UNTUNED"
"""Set for engines in which ``torch.compile`` chooses nothing by timing it."""


def initialize(model: Any) -> None:
    """Fill ``model`` with random weights under which answers depend on every token.

    Each matrix keeps the size of what it multiplies, and norms multiply by about 1. SGLang's own
    dummy weights are all within 0.001, the norms' too: what attention adds to the hidden states is
    then below their rounding, and engines with different attention give equal answers. With norms
    far above 1 each layer would make a difference in the last bit larger, and after some twenty of
    them answers would differ by as much as those of another attention.
    """
    import torch

    # Gemma's norms multiply by their weight and 1.
    added = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__.startswith("Gemma")
    }
    for name, weight in model.state_dict().items():
        if torch.is_floating_point(weight):
            generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(name.encode()))
            if weight.dim() > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            else:
                center = 1.0 if "norm" in name and name not in added else 0.0
                weight.uniform_(center - 0.25, center + 0.25, generator=generator)


def _give_weights(module: Any) -> None:
    # A release that calls it otherwise must not go on with its own weights unseen.
    assert hasattr(module, "initialize_dummy_weights"), (
        f"{module.__name__} has no initialize_dummy_weights"
    )
    module.initialize_dummy_weights = initialize


def _plan_calls(module: Any) -> None:
    """Give every FA3 call of upstream's backend a plan of its own, not those it precomputes.

    As shipped, it precomputes plans for plain decode alone, for the longest request of the batch,
    and leaves others to the kernels. So numbers of splits may differ, and the last bits of the
    outputs with them. Nothing of this is the package's: no plan is kept, and the arguments are
    worked out anew from FA3's documentation.
    """
    backend = module.FlashAttentionBackend
    assert hasattr(backend, "_compute_scheduler_metadata"), (
        f"{backend} has no _compute_scheduler_metadata"
    )
    backend._compute_scheduler_metadata = lambda *_args, **_kwargs: None
    original = module.flash_attn_with_kvcache

    @functools.wraps(original)
    def planned(**arguments: Any) -> Any:
        return original(**arguments | {"scheduler_metadata": plan_of(arguments)})

    module.flash_attn_with_kvcache = planned


def _choose_by_rule(module: Any) -> None:
    """Have ``torch.compile`` choose each kernel, and how it is launched, by rule in all its modes.

    SGLang compiles models in a mode in which every process times kernels for its matrix products,
    and how the others are launched, and takes the quickest, so that two engines of one and the same
    backend differ in the last bits.
    """
    assert hasattr(module, "list_mode_options"), f"{module.__name__} has no list_mode_options"
    module.list_mode_options = lambda *_args, **_kwargs: {"coordinate_descent_tuning": False}


def plan_of(arguments: Mapping[str, Any]) -> Any:
    """Return FA3's plan for a ``flash_attn_with_kvcache`` call over a paged cache.

    ``None`` for requests with different numbers of queries: SGLang's build bounds splits by the
    longest query where it plans, and by the average one where it attends, so that a plan may have
    more splits than there are accumulators.
    """
    from sgl_kernel.flash_attn import get_scheduler_metadata

    q, k_cache = arguments["q"], arguments["k_cache"]
    if q.shape[0] != (arguments["cu_seqlens_q"].numel() - 1) * arguments["max_seqlen_q"]:
        return None
    page_size, capacity = k_cache.shape[1], k_cache.shape[1] * arguments["page_table"].shape[1]
    return get_scheduler_metadata(
        batch_size=arguments["cu_seqlens_q"].numel() - 1, max_seqlen_q=arguments["max_seqlen_q"],
        max_seqlen_k=capacity, num_heads=q.shape[-2], num_heads_k=k_cache.shape[-2],
        headdim=q.shape[-1],
        cache_seqlens=arguments["cache_seqlens"], qkv_dtype=q.dtype,
        headdim_v=arguments["v_cache"].shape[-1],
        cu_seqlens_q=arguments["cu_seqlens_q"], page_size=page_size,
        causal=arguments.get("causal", False),
        window_size=arguments.get("window_size", (-1, -1)),
        has_softcap=arguments.get("softcap", 0.0) > 0.0,
        num_splits=arguments.get("num_splits", 0),
    )  # fmt: skip


CHANGES: Mapping[str, tuple[str, Callable[[Any], None]]] = {
    WEIGHTS: ("sglang.srt.model_loader.loader", _give_weights),
    PLANS: ("sglang.srt.layers.attention.flashattention_backend", _plan_calls),
    UNTUNED: ("torch._inductor", _choose_by_rule),
}
"""By variable: the module, and what is done to it."""


class AfterImport(MetaPathFinder):
    """Changes one module when it has been imported, and does not import it before."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that goes on to the change."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        original = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            original(module)
            self._change(module)

        vars(spec.loader)["exec_module"] = execute
        return spec


def install() -> None:
    """Have the changes that this process's environment asks for made."""
    for variable, (name, change) in CHANGES.items():
        if variable in os.environ:
            sys.meta_path.insert(0, AfterImport(name, change))
