"""Random weights under which answers depend on every token, for models that SGLang loads with ``load_format="dummy"``.

SGLang's own dummy weights are all within 0.001, the norms' too. What attention adds to the hidden states is then
below their rounding, and engines with different attention give equal answers: a comparison would see nothing.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "SGLANG_MUSA_EXT_SCRIPTS_WEIGHTS"
"""Set for the processes of an engine that is to have these weights."""
LOADER = "sglang.srt.model_loader.loader"


class LoaderFinder(MetaPathFinder):
    """Gives SGLang's module of model loaders these weights when it is imported, and not before."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that changes one name in it."""
        if name != LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        original = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            original(module)
            # A release that calls it otherwise must not go on with its own weights unseen.
            assert hasattr(module, "initialize_dummy_weights"), f"{LOADER} has no initialize_dummy_weights"
            vars(module)["initialize_dummy_weights"] = initialize

        vars(spec.loader)["exec_module"] = execute
        return spec


def initialize(model: Any) -> None:
    """Fill ``model``: each matrix keeps the size of what it multiplies, and norms are near 1."""
    import torch

    for name, weight in model.state_dict().items():
        if torch.is_floating_point(weight):
            generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(name.encode()))
            if weight.dim() > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            else:
                center = 1.0 if "norm" in name else 0.0
                weight.uniform_(center - 0.25, center + 0.25, generator=generator)
