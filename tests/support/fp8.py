"""A model over a KV cache in fp8, for upstream's backend on the reference kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support.backend import KVPool, Model, Step

E4M3 = torch.float8_e4m3fn
OF_OUTPUT, OF_SUMS = 2.0**-8, 2e-5
"""A unit in the last place of bfloat16, relative; and what sums in float32 are off by."""
LARGEST = 4.0
"""About the largest of the random values."""


class Fp8Pool(KVPool):
    """A pool as upstream's: it divides by the scales, and holds fp8."""

    def set_kv_buffer(
        self, layer: Any, loc: Any, k: Any, v: Any, k_scale: Any = None, v_scale: Any = None,
        **_options: Any,
    ) -> None:  # fmt: skip
        k, v = (x if scale is None else x / scale for x, scale in ((k, k_scale), (v, v_scale)))
        super().set_kv_buffer(layer, loc, k.to(self.dtype), v.to(self.dtype))


@dataclass
class Fp8Model(Model):
    """A bfloat16 model over a cache in fp8."""

    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = E4M3
    scales: tuple[float, float] | None = None
    """Of each layer's keys and values."""
    of_sums: float = OF_SUMS
    """The error that outputs may have, absolutely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arguments = {"kv_cache_dtype": "fp8_e4m3"} | self.arguments
        slots = next(iter(self.pool.k.values())).shape[0]
        self.pool = Fp8Pool(self.layers, slots, self.cache_dtype, self.mla, self.fill)
        for layer in self.layers if self.scales else ():
            for name, scale in zip(("k_scale", "v_scale"), self.scales or (), strict=True):
                setattr(layer, name, torch.nn.Parameter(torch.tensor(scale), requires_grad=False))

    def runner(self) -> Any:
        runner = super().runner()
        runner.kv_cache_dtype, runner.kv_cache_dtype_str = self.cache_dtype, "fp8_e4m3"
        return runner

    def hand_out(self, layer: Any, slots: Any, store: bool = False) -> tuple[Any, Any]:
        """Note for float64 what the cache can hold of new keys and values."""
        k, v = super().hand_out(layer, slots)
        k_scale, v_scale = (getattr(layer, name) for name in ("k_scale", "v_scale"))
        held = self.rounded(k, k_scale), self.rounded(v, v_scale)
        for buffer, values in zip(self.exact.get_kv_buffer(layer.layer_id), held, strict=True):
            buffer[slots] = values
        if store:
            self.pool.set_kv_buffer(layer, slots, k, v, k_scale, v_scale)
        return k, v

    def rounded(self, values: Any, scale: Any = None) -> Any:
        """Return float64 of what fp8 keeps of ``values``, which are divided by ``scale``."""
        scale = torch.tensor(1.0) if scale is None else scale
        return (values / scale).to(self.cache_dtype).double() * scale.double()

    def require(
        self, result: Any, step: Step, layer: Any, inputs: dict[str, Any], sinks: Any = None
    ) -> None:
        """Compare the output of a layer with attention in float64 over the dequantised cache."""
        exact, _ = self.expected(step, layer, self.rounded(inputs["q"]), sinks=sinks)
        out = result.view(exact.shape)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, rtol=OF_OUTPUT, atol=self.of_sums)
