"""Rows of what the CPU reference platform overrides and adjusts."""

from __future__ import annotations

from sglang_musa_ext.upstream.requirement import NONE_KNOWN, Requirement

_USER = "cpu"
_PLATFORM = "sglang.srt.platforms.interface"
_DEVICE = "sglang.srt.platforms.device_mixin"
_SPECULATIVE = "sglang.srt.speculative"


def _hook(
    name: str,
    parameters: tuple[str, ...],
    purpose: str,
    since: str | None = None,
    until: str | None = None,
) -> Requirement:
    """Return the row of a method of SGLang's platform classes that the CPU platform overrides."""
    end = "is gone"
    if until is not None:
        end += f", or the oldest supported release is newer than {until}"
    return Requirement(
        "method",
        _PLATFORM if name.startswith("SRTPlatform.") else _DEVICE,
        name,
        parameters,
        since,
        until,
        used_by=_USER,
        why=f"The CPU reference platform {purpose} through this hook.",
        remove_when=f"The CPU reference platform {end}.",
    )


# An override of a hook that is gone is never called.
_HOOKS = (
    _hook(
        "SRTPlatform.apply_server_args_defaults",
        ("self", "server_args"),
        "sets page size and backend",
    ),
    _hook("SRTPlatform.get_default_attention_backend", ("self",), "names fa3"),
    _hook("SRTPlatform.get_paged_allocator_cls", ("self",), "names the page allocator"),
    _hook("SRTPlatform.get_mha_kv_pool_cls", ("self",), "names the KV pool", None, "0.5.21"),
    _hook("SRTPlatform.get_mla_kv_pool_cls", ("self",), "names the MLA pool", None, "0.5.21"),
    _hook("SRTPlatform.get_kv_pool_cls", ("self", "kind"), "names every KV pool", "0.5.22"),
    _hook("SRTPlatform.init_backend", ("self",), "adjusts SGLang in a worker"),
    _hook(
        "SRTPlatform.is_pin_memory_available",
        ("self",),
        "declines pinned memory",
        None,
        "0.5.15.post1",
    ),
    _hook(
        "DeviceMixin.is_pin_memory_available",
        ("self", "device"),
        "declines pinned memory",
        "0.5.16",
    ),
    _hook("DeviceMixin.get_device", ("self",), "names the device"),
    _hook("DeviceMixin.set_device", ("self", "device"), "leaves the one CPU alone"),
    _hook("DeviceMixin.get_device_name", ("self", "device_id"), "names the processor"),
    _hook("DeviceMixin.get_device_uuid", ("self", "device_id"), "identifies the device"),
    _hook(
        "DeviceMixin.get_device_capability",
        ("self", "device_id"),
        "says that there is no compute capability",
    ),
    _hook("DeviceMixin.get_available_memory", ("self", "device_id"), "reports memory"),
    _hook("DeviceMixin.get_torch_distributed_backend_str", ("self",), "names gloo"),
    _hook(
        "DeviceMixin.get_torch_profiler_activity_str", ("self",), "names what is profiled", "0.5.16"
    ),
    _hook("DeviceMixin.get_torch_profiler_activity", ("self",), "names what is profiled", "0.5.16"),
    _hook("DeviceMixin.get_device_total_memory", ("self", "device_id"), "reports memory"),
    _hook("DeviceMixin.get_current_memory_usage", ("self", "device"), "reports memory"),
    _hook(
        "SRTPlatform.supports_speculative_algorithm",
        ("self", "algorithm"),
        "says which algorithms it runs",
        "0.5.21",
    ),
    _hook(
        "SRTPlatform.supports_speculative_draft_attention_backend",
        ("self", "algorithm", "backend"),
        "says what serves drafts",
        "0.5.21",
    ),
    _hook(
        "SRTPlatform.get_default_speculative_draft_attention_backend",
        ("self", "algorithm"),
        "names what serves drafts",
        "0.5.21",
    ),
)

ROWS = (
    *_HOOKS,
    Requirement(
        "module_global",
        "sglang.srt.layers.rotary_embedding.base",
        "_is_mps",
        used_by=_USER,
        why=(
            "Up to 0.5.12 rotary embeddings want vllm on an unknown device; set, this flag leads "
            "them to PyTorch."
        ),
        remove_when=(
            "The oldest supported release is 0.5.13 or newer, with the assignment in platform."
        ),
        fault="sgl-project/sglang#14314",
    ),
    Requirement(
        "module_global",
        "sglang.srt.layers.rotary_embedding.base",
        "current_platform",
        (),
        "0.5.13",
        used_by=_USER,
        why=(
            "Where rotary embeddings know the platform, they need no help, which the CPU platform "
            "goes by."
        ),
        remove_when="The oldest supported release is 0.5.13 or newer, with the row above.",
    ),
    Requirement(
        "function",
        "sglang.srt.distributed.device_communicators.pynccl_wrapper",
        "find_nccl_library",
        (),
        used_by=_USER,
        why=(
            "It reads SGLANG_NCCL_SO_PATH, by which the CPU platform keeps NCCL away from ranks on "
            "a CPU."
        ),
        remove_when=(
            "The oldest supported release is 0.5.23 or newer, which asks "
            "capabilities.supports_pynccl."
        ),
        fault=NONE_KNOWN,
    ),
    *(
        Requirement(
            "module_global",
            module,
            name,
            used_by=_USER,
            why=f"The CPU reference platform {purpose}.",
            remove_when="The CPU reference platform is gone.",
        )
        for module, name, purpose in (
            (_PLATFORM, "SRTPlatform", "derives from it"),
            (_PLATFORM, "PlatformEnum", "says by it that it is out of tree"),
            (
                "sglang.srt.mem_cache.memory_pool",
                "MHATokenToKVPool",
                "names it as the KV pool up to 0.5.21",
            ),
            (
                "sglang.srt.mem_cache.memory_pool",
                "MLATokenToKVPool",
                "builds it as the MLA pool up to 0.5.21",
            ),
            (
                "sglang.srt.mem_cache.allocator",
                "PagedTokenToKVPoolAllocator",
                "names it as the page allocator",
            ),
            (
                "sglang.srt.layers.attention.merge_state",
                "merge_state_triton",
                "has PyTorch in place of it",
            ),
        )
    ),
    *(
        Requirement(
            "module_global",
            module,
            name,
            (),
            since,
            until,
            used_by=_USER,
            why=f"On a CPU, {purpose}.",
            remove_when="Upstream's host pools serve every out-of-tree device.",
            fault=NONE_KNOWN,
        )
        for module, name, since, until, purpose in (
            (
                "sglang.srt.mem_cache.memory_pool_host",
                "ALLOC_MEMORY_FUNCS",
                None,
                None,
                "the host's part of a hierarchical cache is ordinary memory",
            ),
            (
                "sglang.srt.mem_cache.pool_host.common",
                "ALLOC_MEMORY_FUNCS",
                "0.5.14",
                None,
                "the host's part of a hierarchical cache is ordinary memory",
            ),
            *(
                (module, "torch", None, None, "nothing is pinned that this module makes")
                for module in (
                    "sglang.srt.lora.backend.torch_backend",
                    "sglang.srt.lora.layers",
                    "sglang.srt.managers.overlap_utils",
                    "sglang.srt.model_executor.forward_batch_info",
                )
            ),
        )
    ),
    *(
        Requirement(
            "function",
            "sglang.srt.distributed.parallel_state",
            name,
            ("output", "input", "group_name"),
            used_by=_USER,
            why="This operator exists for known devices; a CPU's ranks call the group's method.",
            remove_when="Upstream registers its collectives for every device.",
            fault=NONE_KNOWN,
        )
        for name in ("reg_all_gather_into_tensor", "reg_reduce_scatter_tensor")
    ),
    *(
        Requirement(
            "method",
            "sglang.srt.distributed.parallel_state",
            f"GroupCoordinator.{name}",
            ("self", "output", "input"),
            used_by=_USER,
            why="The operator above is this call.",
            remove_when="The row above is gone.",
        )
        for name in ("_all_gather_into_tensor", "_reduce_scatter_tensor")
    ),
    Requirement(
        "method",
        "sglang.srt.layers.rotary_embedding.base",
        "RotaryEmbedding.forward_native",
        ("self", "positions", "query", "key"),
        used_by=_USER,
        why="It fails on no tokens, which idle ranks of data-parallel attention have.",
        remove_when="Upstream's PyTorch rotation takes no tokens.",
        fault=NONE_KNOWN,
    ),
    Requirement(
        "method",
        "sglang.srt.models.dflash",
        "DFlashDraftModel.forward",
        ("self", "input_ids", "positions", "forward_batch", "input_embeds"),
        used_by=_USER,
        why="SGLang casts the embeddings that it passes here to bfloat16, whatever the model's.",
        remove_when="Upstream passes them in the model's dtype.",
        fault=NONE_KNOWN,
    ),
    *(
        Requirement(
            "module_global",
            module,
            "_is_musa",
            (),
            since,
            until,
            used_by=_USER,
            why=(
                "Speculative decoding chooses kernels by this flag, and has none for a device it "
                "does not know."
            ),
            remove_when=(
                "Upstream speculates on every out-of-tree device, or the module is older than all "
                "releases."
            ),
            fault=NONE_KNOWN,
        )
        for module, since, until in (
            (f"{_SPECULATIVE}.eagle_utils", None, "0.5.22"),
            (f"{_SPECULATIVE}.triton_ops.cache_locs", "0.5.13.post1", "0.5.15.post1"),
            ("sglang.kernels.ops.speculative.cache_locs", "0.5.16", None),
            ("sglang.kernels.ops.speculative.spec_tree", "0.5.23", None),
        )
    ),
)
