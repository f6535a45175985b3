"""``nn.SwishGLU``, which the vendor's PyTorch has."""

from __future__ import annotations

import torch


class SwishGLU(torch.nn.Module):
    """SiLU of the first half of the last dimension, times the second half."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Return a tensor half as wide."""
        gate, up = input.chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(input.dtype)
