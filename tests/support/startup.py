"""The seconds of a process of SGLang's from its start to its loaded plugins, and ours among them.

``python -m tests.support.startup`` prints them and the ratio to the same process without this
package, for the mode that ``SGLANG_MUSA_EXT`` names. The imports are those of every process of a
server; an engine goes on from there for some seconds more, in which nothing of this package runs
unless it serves.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import time

from tests.support.nvidia_state import _StandInFinder

PLUGINS = (("torch.backends", "musa_ext_guard"), ("sglang.srt.plugins", "musa_ext"))
"""The entry points of this package that processes of SGLang call: by torch, and by SGLang."""
IMPORTS = ("torch", "sglang.srt.plugins", "sglang.srt.server_args")


def measure() -> tuple[float, float]:
    """Return the seconds of SGLang's imports, and of finding and calling our entry points."""
    # Torch would call the guard within its own import.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # Up to 0.5.20 SGLang imports torchvision, which has no build beside a CPU's torch.
    sys.meta_path.append(_StandInFinder())
    began = time.perf_counter()
    for name in IMPORTS:
        importlib.import_module(name)
    upstream = time.perf_counter() - began
    ours = sum(_seconds(group, name) for group, name in PLUGINS)
    return upstream, ours


def _seconds(group: str, name: str) -> float:
    (entry_point,) = importlib.metadata.entry_points(group=group, name=name)
    began = time.perf_counter()
    entry_point.load()()
    return time.perf_counter() - began


def main() -> None:
    """Print the ratio, and what it is made of."""
    upstream, ours = measure()
    ratio = (upstream + ours) / upstream
    print(f"{ratio:.4f} of the start without it: {upstream:.2f} s, and {ours * 1000:.1f} ms")


if __name__ == "__main__":
    main()
