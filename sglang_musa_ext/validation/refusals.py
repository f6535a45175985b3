"""The modes that a release of SGLang, or of MATE, does not serve on MUSA, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_musa_ext import policy
from sglang_musa_ext.upstream.limits import Configuration
from sglang_musa_ext.upstream.releases import version_key

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A way to serve that SGLang does not have on MUSA."""

    asks_for: Callable[[Arguments], bool]
    why: str
    served: tuple[str, str] | None = None
    """The first and the last release that serve it all the same."""

    def holds_for(self, arguments: Arguments, version: str) -> bool:
        """Tell whether SGLang ``version`` refuses an engine's ``arguments``."""
        if not self.asks_for(arguments):
            return False
        if self.served is None:
            return True
        first, last = map(version_key, self.served)
        return not first <= version_key(version) <= last


REFUSALS = (
    Refusal(
        lambda arguments: arguments.get("speculative_algorithm") == "NGRAM",
        "SGLang does not serve NGRAM on MUSA",
    ),
    Refusal(
        lambda arguments: "enable_deterministic_inference" in arguments,
        "SGLang's deterministic inference does not know MUSA",
    ),
    Refusal(
        lambda arguments: "enable_prefill_cp" in arguments,
        "SGLang serves context parallel prefill on MUSA from 0.5.14 to 0.5.19 alone",
        served=("0.5.14", "0.5.19"),
    ),
    Refusal(
        lambda arguments: (
            "enable_two_batch_overlap" in arguments and importlib.util.find_spec("deep_ep") is None
        ),
        "SGLang overlaps two batches through DeepEP, which is not installed",
    ),
)


def why_not_on_musa(
    arguments: Arguments, version: str | None, mate: policy.MateRelease | None
) -> str:
    """Return why an engine of these ``arguments`` does not start on MUSA; empty: it does.

    Args:
        arguments: of ``sglang.Engine``, of a model in bfloat16.
        version: SGLang's; ``None``: unknown, and taken for one that refuses nothing.
        mate: MATE's release; ``None``: unknown.
    """
    for refusal in REFUSALS:
        if version is not None and refusal.holds_for(arguments, version):
            return refusal.why
    cache = arguments.get("kv_cache_dtype", "auto")
    asked = Configuration(dtype="bfloat16", kv_cache_dtype=cache, mate=mate)
    return "; ".join(policy.reasons_against_cache(asked))
