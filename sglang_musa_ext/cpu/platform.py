"""The CPU reference platform: SGLang's own engine on a CPU, with FA3's semantics from PyTorch.

It is chosen by ``SGLANG_PLATFORM=musa_reference`` alone. SGLang sees an out-of-tree device whose
tensors live on the CPU; what it imports for accelerators is prepared by ``stand_ins``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import platform
from collections.abc import Callable
from typing import Any, cast

import psutil
import torch
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from sglang_musa_ext import patching
from sglang_musa_ext.cpu import trees
from sglang_musa_ext.cpu.host_memory import serve_host_pools, transfer_host_memory
from sglang_musa_ext.cpu.stand_ins import merge_state_v2, prepare_process

__all__ = ["CpuReferencePlatform", "prepare_process"]

logger = logging.getLogger(__name__)

# Defaults of the engine's arguments, applied where the value is one that SGLang gave.
DEFAULTS: dict[str, Any] = {
    "attention_backend": "fa3",
    "page_size": 64,
    "disable_cuda_graph": True,
    # Not all of the machine's memory: a pool for short conversations is enough.
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "lora_backend": "torch_native",
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "layer_first",
}
if not hasattr(SRTPlatform, "get_kv_pool_cls"):
    # Up to 0.5.21 an out-of-tree platform always gets the plain pool, where the prefix cache of
    # models with sliding windows expects the pool that frees what the windows have left behind.
    DEFAULTS["disable_hybrid_swa_memory"] = True

# SGLang has chosen these before it asks the platform, and none of them can serve here, so nobody
# can have meant them: the attention backend of a CPU that is not ARM, kernels of adapters, and
# kernels that copy between device and host, with the layout that they want.
UPSTREAM_CHOICES = ("intel_amx", "csgmv", "kernel", "page_first")
# For ARM it has chosen torch_native, which the user may have meant as well.
TORCH_NATIVE_ON_ARM = (
    "This server runs on torch_native, which is SGLang's own choice for ARM where no attention "
    "backend is named. Start it with --attention-backend fa3 to run on the composed FA3 backend."
)

# Modules of upstream that choose kernels of speculative decoding by flags of known devices, and
# know no way for another one. MUSA's way takes them from ``sgl_kernel`` and Triton, which both have
# stand-ins here.
MUSA_KERNEL_MODULES = (
    "sglang.srt.speculative.eagle_utils",
    "sglang.srt.speculative.triton_ops.cache_locs",
    "sglang.kernels.ops.speculative.cache_locs",
    "sglang.kernels.ops.speculative.spec_tree",
)

SPECULATIVE_ALGORITHMS = ("DFLASH", "EAGLE", "EAGLE3", "NEXTN", "NGRAM", "STANDALONE")

# Collectives that SGLang registers as operators of devices that it knows, and the methods of a
# group that they call.
GROUP_OPERATORS = {
    "reg_all_gather_into_tensor": "_all_gather_into_tensor",
    "reg_reduce_scatter_tensor": "_reduce_scatter_tensor",
}


class CpuReferencePlatform(SRTPlatform):  # type: ignore[misc]
    """The CPU as an out-of-tree device, for checking attention backends without an accelerator."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set what the user left open in a ``ServerArgs``, or in a recorder of its fields."""
        for name, value in DEFAULTS.items():
            if getattr(server_args, name) in (None, False, *UPSTREAM_CHOICES):
                setattr(server_args, name, value)
        if server_args.attention_backend == "torch_native" and platform.machine() in (
            "aarch64",
            "arm64",
        ):
            logger.warning("%s", TORCH_NATIVE_ON_ARM)

    def get_default_attention_backend(self) -> str:
        """Return the attention backend of a server that names none."""
        return "fa3"

    def init_backend(self) -> None:
        """Adjust SGLang in a worker, before its model is built."""
        from sglang.srt.layers.rotary_embedding import base

        # Up to 0.5.12, rotary embeddings do not know out-of-tree platforms and take vllm's kernel
        # on a device they do not know. The flag is read for that one choice, and leads to the
        # PyTorch implementation.
        if not hasattr(base, "current_platform"):
            base._is_mps = True
        _take_kernels_of_musa()
        _merge_states_in_pytorch()
        serve_host_pools(_exists)
        transfer_host_memory()
        _call_groups_directly()
        _rotate_nothing(base.RotaryEmbedding)
        patching.after_import("sglang.srt.models.dflash", _draft_in_the_model_s_dtype)

    # The device.

    def get_device(self, device_id: int | None = None) -> str:
        """Return the device of SGLang's tensors; a CPU has no index."""
        return "cpu"

    def set_device(self, device: Any) -> None:
        """Do nothing: there is one CPU."""

    def get_device_name(self, device_id: int = 0) -> str:
        """Return the processor's name as far as the operating system tells it."""
        return platform.processor() or platform.machine()

    def get_device_uuid(self, device_id: int = 0) -> str:
        """Return the same identifier for every index."""
        return "cpu"

    def get_device_capability(self, device_id: int = 0) -> None:
        """Return None: a CPU has no compute capability."""

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Return the machine's memory in bytes."""
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: Any = None) -> float:
        """Return the memory in use on the machine, in bytes."""
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """Return free and total memory in bytes."""
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """Return False: nothing is copied to another device."""
        return False

    def get_torch_distributed_backend_str(self) -> str:
        """Return PyTorch's collective library for CPU tensors."""
        return "gloo"

    def get_torch_profiler_activity_str(self) -> str:
        """Return the name of the activity that the profiler records."""
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        """Return the activity that the profiler records."""
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CPU

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Return whether drafts by ``algorithm`` were seen to give what plain decoding gives."""
        return algorithm in SPECULATIVE_ALGORITHMS

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        """Return the attention backend of a draft model for which none is named."""
        return "fa3"

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        """Return whether ``backend`` can serve a draft model of ``algorithm`` here."""
        return backend in ("fa3", "torch_native")

    # Memory pools: SGLang's own serve any torch device. Up to 0.5.21 an out-of-tree platform must
    # name them; from 0.5.22 on the first hook is asked instead, and None means SGLang's own.

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Return None: SGLang's own pool for keys and values of ``kind``."""
        return None

    def get_mha_kv_pool_cls(self) -> type:
        """Return the pool of models that keep keys and values apart."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return cast(type, MHATokenToKVPool)

    def get_mla_kv_pool_cls(self) -> Callable[..., Any]:
        """Return the pool of models with latent attention."""
        return _mla_pool

    def get_paged_allocator_cls(self) -> type:
        """Return the allocator of pages."""
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return cast(type, PagedTokenToKVPoolAllocator)


def _take_kernels_of_musa() -> None:
    """Lead speculative decoding to the kernels that it takes on a MUSA device."""
    for name in filter(_exists, MUSA_KERNEL_MODULES):
        module: Any = importlib.import_module(name)
        module._is_musa = True
        # What the module would have imported, had it been on a MUSA device.
        module.sgl_build_tree_kernel_efficient = trees.build_tree_kernel_efficient


def _merge_states_in_pytorch() -> None:
    """Let SGLang merge attention states in PyTorch, where its Triton kernel would be interpreted.

    Why: the interpreter runs a program for each token and head, one after the other.
    """
    from sglang.srt.layers.attention import merge_state

    merge_state.merge_state_triton = merge_state_v2


def _call_groups_directly() -> None:
    """Let ranks gather and scatter tensors by PyTorch's collectives.

    Why: SGLang goes through operators, so that compilers do not look inside, and these exist for
    the devices that it knows. Data-parallel attention calls them.
    """
    from sglang.srt.distributed import parallel_state

    for operator, method in GROUP_OPERATORS.items():
        setattr(parallel_state, operator, _call_of_group(parallel_state, method))


def _call_of_group(module: Any, method: str) -> Callable[..., None]:
    # SGLang passes them by these names.
    def call(output: torch.Tensor, input: torch.Tensor, group_name: str) -> None:  # noqa: A002
        getattr(module._groups[group_name](), method)(output, input)

    return call


def _rotate_nothing(embedding: Any) -> None:
    """Let rotary embeddings take no tokens, which an idle rank of data-parallel attention has.

    Why: the PyTorch implementation derives the number of heads from that of tokens.
    """
    rotate = embedding.forward_native

    @functools.wraps(rotate)
    def forward_native(
        self: Any, positions: Any, query: Any, key: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if positions.numel() == 0:
            return query, key
        return rotate(self, positions, query, key, *args, **kwargs)

    embedding.forward_native = forward_native


def _draft_in_the_model_s_dtype(module: Any) -> None:
    """Give a DFLASH draft the embeddings of its block in the dtype of its weights.

    Why: SGLang casts embeddings that a model is given to bfloat16, whatever the model is in. What
    that rounds off changes drafts alone, which the model itself verifies.
    """
    draft = module.DFlashDraftModel
    original = draft.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, input_embeds: Any = None, **kwargs: Any) -> Any:
        if input_embeds is not None:
            input_embeds = input_embeds.to(self.norm.weight.dtype)
        return original(self, *args, input_embeds=input_embeds, **kwargs)

    draft.forward = forward


def _exists(module: str) -> bool:
    """Return whether this release has ``module``; in an absent package, asking would raise."""
    package = module.rpartition(".")[0]
    return (not package or _exists(package)) and importlib.util.find_spec(module) is not None


def _mla_pool(*args: Any, index_head_dim: int | None = None, **kwargs: Any) -> Any:
    """Build SGLang's MLA pool, which does not take the ``index_head_dim`` that core passes."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    return MLATokenToKVPool(*args, **kwargs)
