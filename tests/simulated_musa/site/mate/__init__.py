"""A stand-in of MATE: its names and rules, in PyTorch, on the simulated device."""

from __future__ import annotations

from mate._release import RELEASE as RELEASE
from mate._release import __version__ as __version__
from mate.moe import moe_fused_gate as moe_fused_gate
