"""The rows of the contract, by theme."""

from __future__ import annotations

from sglang_musa_ext.upstream.rows import (
    backend,
    benchmark,
    configuration,
    cpu,
    defaults,
    kernels,
    passes,
    plugin,
    ranks,
    speculation,
    vision,
)
from sglang_musa_ext.upstream.rows.plugin import PLUGIN_SUPPORT

REQUIREMENTS = (
    *plugin.ROWS,
    *kernels.ROWS,
    *backend.ROWS,
    *passes.ROWS,
    *configuration.ROWS,
    *speculation.ROWS,
    *defaults.ROWS,
    *vision.ROWS,
    *ranks.ROWS,
    *cpu.ROWS,
    *benchmark.ROWS,
)
"""The whole contract."""

__all__ = ["PLUGIN_SUPPORT", "REQUIREMENTS"]
