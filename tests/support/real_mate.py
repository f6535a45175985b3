"""Calls through MATE's own Python layer, of a source tree that is at hand, without a MUSA device.

``python -m tests.support.real_mate FOLDER RELEASE`` imports MATE and its wrapper from FOLDER, a
source tree of MATE 0.2 or newer, with its compiled functions stood in for. It makes calls through
this package's adapter and prints, as JSON, which compiled function each reached and what of the
call arrived there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sglang_musa_ext.kernels.mate import mate_record
from sglang_musa_ext.kernels.provider import FA3Kernels, UnsupportedKernelArgument

REACHED: list[dict[str, Any]] = []
"""The compiled functions that were called, and what was passed."""


def main(folder: str, release: str) -> None:
    """Make all calls, and print what became of each."""
    os.environ["MATE_MUSA_ARCH_LIST"] = "3.1"
    os.environ["MATE_WORKSPACE_BASE"] = tempfile.mkdtemp()
    sys.path[:0] = [folder, str(Path(folder) / "wrappers" / "flash-attention")]
    # MATE asks every tensor for it.
    torch.Tensor.is_musa = property(lambda tensor: True)  # type: ignore[attr-defined]
    library = importlib.import_module("flash_attn_interface")
    stand_in_for_compiled_functions()
    kernels = mate_record(library, tuple(map(int, release.split("."))))
    print(json.dumps({name: outcome(call, kernels) for name, call in CALLS.items()}))


def stand_in_for_compiled_functions() -> None:
    """Record what MATE passes to the functions that it compiles or loads."""
    interface: Any = importlib.import_module("mate.mha_interface")
    forward: Any = importlib.import_module("mate.jit.attention.fmha.fmha_fwd")
    planning: Any = importlib.import_module("mate.jit.attention.fmha.fmha_get_metadata")
    forward._fmha_fwd_module = lambda config: ("fmha", functions(fmha=lambda *a: ((None, None), 1)))
    forward._fmha_fwd_combine = lambda *args, **kwargs: None
    planning._fmha_metadata_module = lambda config: ("plan", functions(plan=lambda *a: None))
    planning.torch = SimpleNamespace(
        empty=lambda shape, dtype, device: torch.zeros(shape, dtype=dtype), int32=torch.int32
    )
    attention = functions(flash_atten_varlen_asm=lambda *a: None)
    interface._get_flash_attention_ops = lambda: attention
    mla = functions(dispatch_mla_impl_for_fa_interface=lambda *a: None)
    interface._get_mla_ops = lambda: mla


def functions(**by_name: Callable[..., Any]) -> Any:
    """A compiled module of MATE's that records the calls of its functions."""

    def get_function(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            REACHED.append({"function": name, "arguments": [plain(value) for value in arguments]})
            return by_name[name](*arguments)

        return call

    return SimpleNamespace(get_function=get_function)


def plain(value: Any) -> Any:
    """Something that JSON can carry: a tensor by its shape, and by its values if it is short."""
    if isinstance(value, torch.Tensor):
        held = value.tolist() if value.dim() == 1 and value.numel() <= 4 else None
        return {"shape": list(value.shape), "values": held}
    return value


def outcome(call: Callable[[FA3Kernels], Any], kernels: FA3Kernels) -> dict[str, Any]:
    """The outcome of a call; ``refused``: this package's own error; ``error``: anything else."""
    REACHED.clear()
    try:
        call(kernels)
    except UnsupportedKernelArgument as refusal:
        return {"refused": str(refusal)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"reached": list(REACHED)}


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode(kernels: FA3Kernels, **more: Any) -> None:
    """Decode of two requests as upstream makes it, with its plan unless the kernels drop one."""
    lengths, offsets = int32(5, 70), int32(0, 1, 2)
    call: dict[str, Any] = dict(
        q=half(2, 8, 128), k_cache=half(4, 64, 2, 128), v_cache=half(4, 64, 2, 128),
        page_table=torch.zeros(2, 2, dtype=torch.int32), cache_seqlens=lengths,
        cu_seqlens_q=offsets,
        max_seqlen_q=1, softmax_scale=0.1, causal=True, window_size=(-1, -1), softcap=0.0,
        num_splits=0,
        k_descale=None, v_descale=None, return_softmax_lse=True, ver=3, out=None,
    )  # fmt: skip
    call |= more
    if not kernels.drops_plan(call):
        call["scheduler_metadata"] = kernels.get_scheduler_metadata(
            batch_size=2, max_seqlen_q=1, max_seqlen_k=128, num_heads_q=8, num_heads_kv=2,
            headdim=128,
            headdim_v=128, cache_seqlens=lengths, cu_seqlens_q=offsets, causal=True,
        )  # fmt: skip
    kernels.flash_attn_with_kvcache(**call)


def raw(kernels: FA3Kernels, rows: tuple[int, int], **more: Any) -> None:
    """One request of two queries and three keys, in tensors of so many rows."""
    call: dict[str, Any] = dict(
        q=half(rows[0], 8, 128), k=half(rows[1], 2, 128), v=half(rows[1], 2, 128),
        cu_seqlens_q=int32(0, 2),
        cu_seqlens_k=int32(0, 3), max_seqlen_q=2, max_seqlen_k=3, softmax_scale=0.1, causal=True,
        return_softmax_lse=True, ver=3, out=None,
    )  # fmt: skip
    kernels.flash_attn_varlen_func(**call | more)


def mla(kernels: FA3Kernels) -> None:
    """MLA decode of two requests."""
    kernels.flash_attn_with_kvcache(
        q=half(2, 16, 64), qv=half(2, 16, 512), k_cache=half(4, 64, 1, 64),
        v_cache=half(4, 64, 1, 512),
        page_table=torch.zeros(2, 2, dtype=torch.int32), cache_seqlens=int32(5, 70),
        cu_seqlens_q=int32(0, 1, 2), max_seqlen_q=1, causal=True, ver=3, out=None,
        scheduler_metadata=(torch.zeros(4096, dtype=torch.uint8), False),
    )  # fmt: skip


CALLS: dict[str, Callable[[FA3Kernels], None]] = {
    "decode": decode,
    "sinks": lambda kernels: decode(kernels, sinks=half(8)),
    "chunk": lambda kernels: decode(kernels, attention_chunk=64),
    "strided page table": lambda kernels: decode(
        kernels, page_table=torch.zeros(2, 8, dtype=torch.int32)[:, ::4]
    ),
    "raw": lambda kernels: raw(kernels, (2, 3)),
    "padded raw": lambda kernels: raw(kernels, (5, 8)),
    "raw with a causal window": lambda kernels: raw(kernels, (2, 3), window_size=(-1, 0)),
    "raw with a window": lambda kernels: raw(kernels, (2, 3), window_size=(1, 0)),
    "mla": mla,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
