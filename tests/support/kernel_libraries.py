"""Stand-ins of the libraries that have FA3's functions, and calls of these functions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    KernelsUnavailable,
    mate_kernels,
    select_kernels,
)
from tests.support.mate_signatures import METADATA, RELEASES, SIGNATURES

CPU = torch.device("cpu")


CUDA = torch.device("cuda", 0)


def module_of(signatures: dict[str, str]) -> str:
    """A module with functions of these parameters; each returns what it was called with."""
    functions = (
        f"def {name}({parameters.replace(' ', ', ')}): return SimpleNamespace(**locals())\n"
        for name, parameters in signatures.items()
    )
    return "import torch\nfrom types import SimpleNamespace\n" + "".join(functions)


def wrapper_of(state: str) -> str:
    """The wrapper of MATE in this state of the sources."""
    return module_of(SIGNATURES[state])


WRAPPER = wrapper_of("0.2.2")


# SGLang's function of this name calls the heads and the left padding otherwise.
NVIDIA = WRAPPER.replace("num_heads_q, num_heads_kv", "num_heads, num_heads_k").replace(
    "cu_seqlens_k_new=None, cache_leftpad=None, page_size",
    "cu_seqlens_k_new=None, leftpad_k=None, page_size",
)


# FlashAttention's own functions, as read in its sources of 15 August 2026.
DAO = {
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
        "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None "
        "cu_seqlens_q=None cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None "
        "q_descale=None k_descale=None v_descale=None softmax_scale=None causal=False "
        "window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True "
        "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False"
    ),
    "flash_attn_varlen_func": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None "
        "softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None "
        "window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None "
        "deterministic=False sm_margin=0 return_attn_probs=False"
    ),
    "get_scheduler_metadata": METADATA,
}


LIBRARIES = ("mate", "flash_attn_interface", "flash_attn", "sgl_kernel")


# What the attention backend gives a provider for one plan: FA3's own names.
PLAN = {
    "batch_size": 1,
    "max_seqlen_q": 2,
    "max_seqlen_k": 3,
    "num_heads_q": 4,
    "num_heads_kv": 5,
    "headdim": 6,
    "cache_seqlens": 7,
    "headdim_v": 8,
    "causal": True,
}


@dataclass(frozen=True)
class MusaDevice:
    """The properties of a device that this package reads, also of a ``musa`` unknown to torch."""

    type: str = "musa"
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


MUSA: Any = MusaDevice()


def set_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), hip: str | None = None
) -> None:
    """Let torch see a GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a stand-in of a GPU")
    monkeypatch.setattr(torch.version, "hip", hip)


def write_sgl_kernel(root: Path, text: str = NVIDIA) -> None:
    """A stand-in of SGLang's kernel package."""
    write(root, {"sgl_kernel/__init__.py": "", "sgl_kernel/flash_attn.py": text})


def write_flash_attention(root: Path, signatures: dict[str, str] = DAO) -> None:
    """A stand-in of FlashAttention-3's own library."""
    write(root, {"flash_attn_interface.py": module_of(signatures)})


def write(root: Path, files: dict[str, str]) -> None:
    """Write modules, given by their paths under ``root``."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    importlib.invalidate_caches()


def write_distribution(root: Path, name: str, version: str) -> None:
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write(root, {f"{name}-{version}.dist-info/METADATA": metadata})


def write_mate(root: Path, wrapper: str = WRAPPER) -> None:
    """A stand-in of Moore Threads' MATE and of its wrapper."""
    write(root, {"mate/__init__.py": "", "mate/mha_interface.py": "", "mate/jit/__init__.py": ""})
    write(root, {"flash_attn_interface.py": "import mate\n" + wrapper})


def refusal(settings: Settings, device: Any) -> str:
    """The message with which ``select_kernels`` refuses."""
    with pytest.raises(KernelsUnavailable) as caught:
        select_kernels(settings, device)
    return str(caught.value)


def install_mate(root: Path, state: str) -> FA3Kernels:
    """The kernels of an installation that has the signatures and the version of a release."""
    write_mate(root)
    write_distribution(root, "mate", RELEASES[state])
    if state == "0.1.3":
        (root / "flash_attn_interface.py").unlink()
        write(root, {"flash_attn/__init__.py": "from .interface import *\n"})
        write(root, {"flash_attn/interface.py": "import mate\n" + wrapper_of(state)})
    else:
        write(root, {"flash_attn_interface.py": "import mate\n" + wrapper_of(state)})
    return mate_kernels(MUSA)


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def paged(**more: Any) -> dict[str, Any]:
    """A call of paged decode the way upstream makes it."""
    cache = half(4, 64, 2, 128)
    table = torch.zeros(2, 2, dtype=torch.int32)
    return {
        "q": half(2, 8, 128),
        "k_cache": cache,
        "v_cache": cache,
        "page_table": table,
        "causal": True,
    } | more


def raw(**more: Any) -> dict[str, Any]:
    """A call of attention over raw keys and values."""
    return {"q": half(2, 8, 128), "k": half(2, 2, 128), "v": half(2, 2, 128), "causal": True} | more


def mla(**more: Any) -> dict[str, Any]:
    """A call of MLA decode with packed queries."""
    call = {
        "q": half(2, 16, 64),
        "qv": half(2, 16, 512),
        "k_cache": half(4, 64, 1, 64),
        "v_cache": half(4, 64, 1, 512),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32),
        "scheduler_metadata": (torch.zeros(64, dtype=torch.uint8), False),
        "causal": True,
    }
    return call | more
