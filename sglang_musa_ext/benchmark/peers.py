"""The peers of the benchmark: the ways to serve attention on a kind of device, as processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sglang_musa_ext.benchmark.probe import (
    AGAIN,
    DEVICE,
    GATE,
    IN_TREE,
    NO_REUSE,
    OURS,
    PEER,
    TRITON,
    UNPLANNED,
    UPSTREAM,
)
from sglang_musa_ext.engines import changes
from sglang_musa_ext.engines.process import FORCE_UPDATE


@dataclass(frozen=True)
class Peer:
    """One way to serve attention."""

    name: str
    title: str
    backend: str
    """The class that must serve."""
    environ: Mapping[str, str]
    attention: str = "fa3"
    beside: str = ""
    """The companion that takes turns in the baseline's engine beside this peer; may be empty."""


@dataclass(frozen=True)
class Field:
    """The peers that compete on one kind of device."""

    device: str
    """``cuda``, ``musa`` or ``cpu``."""
    peers: tuple[Peer, ...]
    """The peers; the first is the baseline, whose answers and times others are compared with."""
    resolution: float = 2.0**-3
    """The difference that log-probabilities may have in any case; see :data:`FIELDS`."""
    common: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every peer."""

    @property
    def baseline(self) -> Peer:
        """Return the peer that the others are compared with."""
        return self.peers[0]

    def of(self, names: Sequence[str]) -> Field:
        """Return the field with these peers alone.

        Raises:
            ValueError: the baseline is none of them.
        """
        if self.baseline.name not in names:
            raise ValueError(
                f"{self.baseline.name} is not among the peers, and every other peer is compared "
                "with it."
            )
        chosen = tuple(peer for peer in self.peers if peer.name in names)
        return Field(self.device, chosen, self.resolution, self.common)


FIELDS: Mapping[str, Field] = {
    # Two units in the last place of a logit between 8 and 16 in bfloat16 are 2**-3: as much as
    # another number of splits of the same kernels may change.
    "cuda": Field(
        "cuda",
        (
            # With the kernels for our backend, which takes turns with its own in its engine.
            Peer(
                UPSTREAM, "SGLang's own fa3", "FlashAttentionBackend",
                {"SGLANG_MUSA_EXT": "off", "SGLANG_MUSA_EXT_KERNELS": "hopper"}, beside=AGAIN,
            ),
            Peer(
                OURS, "sglang-musa-ext", "MusaFA3Backend",
                {"SGLANG_MUSA_EXT": "on", "SGLANG_MUSA_EXT_KERNELS": "hopper"}, beside=UNPLANNED,
            ),
            Peer(
                IN_TREE, "SGLang's in-tree MUSA backend", "MusaFlashAttentionBackend",
                {"SGLANG_MUSA_EXT": "off"},
            ),
        ),
    ),
    # Triton's kernels round otherwise in every layer, and attention that leaves keys out is off by
    # more than half.
    "musa": Field(
        "musa",
        (
            Peer(
                TRITON, "SGLang's triton, which serves where nobody names a backend",
                "TritonAttnBackend",
                {"SGLANG_MUSA_EXT": "off"}, "triton", beside=AGAIN,
            ),
            Peer(OURS, "sglang-musa-ext", "MusaFA3Backend", {"SGLANG_MUSA_EXT": "on"}),
            Peer(
                NO_REUSE, "sglang-musa-ext, a plan for every call", "MusaFA3Backend",
                {"SGLANG_MUSA_EXT": "on", FORCE_UPDATE: "1"},
            ),
            Peer(
                IN_TREE, "SGLang's in-tree MUSA backend", "MusaFlashAttentionBackend",
                {"SGLANG_MUSA_EXT": "off"},
            ),
        ),
        resolution=2.0**-1,
    ),
    # Times on a CPU say nothing: there the benchmark exercises itself.
    "cpu": Field(
        "cpu",
        (
            Peer(
                UPSTREAM, "torch_native", "TorchNativeAttnBackend", {}, "torch_native", beside=AGAIN
            ),
            Peer(OURS, "sglang-musa-ext", "MusaFA3Backend", {}, beside=UNPLANNED),
        ),
        common={"SGLANG_PLATFORM": "musa_reference"},
    ),
}  # fmt: skip
"""By kind of device."""


def peer_environment(peer: Peer, contenders: Field, scratch: Path) -> dict[str, str]:
    """Return the environment of a peer: its settings, and the probe as a plugin of SGLang."""
    plugin = scratch / "plugin" / "sglang_musa_ext_bench-0.dist-info"
    plugin.mkdir(parents=True, exist_ok=True)
    (plugin / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang-musa-ext-bench\nVersion: 0\n"
    )
    (plugin / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nmusa_ext_bench = sglang_musa_ext.benchmark.probe:register\n"
    )
    paths = filter(None, [str(plugin.parent), os.environ.get("PYTHONPATH")])
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        PEER: peer.name,
        GATE: str(scratch / "gate"),
        DEVICE: contenders.device,
        "SGLANG_PLUGINS": "",
        "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        changes.WEIGHTS: "1",
        **contenders.common,
        **peer.environ,
    }
