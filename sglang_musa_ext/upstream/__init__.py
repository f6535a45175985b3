"""The upstream contract: everything of SGLang that this package touches, as data, and its check.

SGLang's sources are read with :mod:`ast` and never imported, so every release can be checked in any
environment, and the installed one before anything heavy is loaded. There are two families of rows:

* *Needs* (:data:`NEEDS`): a symbol must be there, with the parameters relied on.
* *Allowances* (:data:`ALLOWANCES`): what a part of upstream may do, because this package knows how
  to follow it there. The rows of one symbol add up; whatever upstream does beyond them is a
  violation.

A row holds from ``since`` to ``until``, both included. Outside these bounds a need is absent and an
allowance unused, which the tests verify over all releases: a row that can go cannot stay unnoticed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

# --- versions -------------------------------------------------------------------------------------


class UpstreamVersionError(ValueError):
    """A SGLang version that cannot be ordered among the releases."""

    def __init__(self, version: str) -> None:
        self.version = version
        super().__init__(
            f"SGLang's version {version!r} cannot be read. Expected something like 0.5.21, "
            "0.5.15.post1 or "
            "0.5.24.dev3+g1a2b3c4. Install a released SGLang, or name the version to check against."
        )


_VERSION = re.compile(
    r"v?(\d+)\.(\d+)\.(\d+)(?:\.?(a|b|rc)(\d+))?(?:\.post(\d+))?(?:\.dev(\d+))?(?:\+[a-z0-9.]+)?",
    re.IGNORECASE,
)
_NO_SUFFIX = "~"  # sorts after "a", "b" and "rc": a release comes after its candidates
_NOT_DEV = 2**31

_VersionKey = tuple[tuple[int, int, int], tuple[str, int], int, int]


def version_key(version: str) -> _VersionKey:
    """A key that orders SGLang's versions as PEP 440 does, local suffixes ignored.

    Raises:
        UpstreamVersionError: if ``version`` has none of the forms SGLang uses.
    """
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise UpstreamVersionError(version)
    major, minor, patch, letter, candidate, post, dev = match.groups()
    # 0.5.24.dev3 comes before 0.5.24rc1, which is why an otherwise bare dev version sorts as "".
    stage = (
        (letter.lower(), int(candidate)) if letter else ("" if dev and not post else _NO_SUFFIX, 0)
    )
    return (
        (int(major), int(minor), int(patch)),
        stage,
        int(post) if post else -1,
        int(dev) if dev else _NOT_DEV,
    )


@dataclass(frozen=True)
class Release:
    """A SGLang release this package is tested with."""

    version: str
    requires_python: str
    torch: str
    """The PyTorch that the release pins; the vendor's build of it may carry a local suffix."""
    levels: tuple[str, ...]
    """The levels of the release matrix that pass with it: ``contract``, ``backend``, ``engine``."""


_ALL_LEVELS = ("contract", "backend", "engine")

SUPPORTED_RELEASES = (
    Release("0.5.11", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.12.post1", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.13.post1", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.14", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.15.post1", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.16", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.17", ">=3.10", "2.11.0", _ALL_LEVELS),
    Release("0.5.18", ">=3.10", "2.13.0", _ALL_LEVELS),
    Release("0.5.19", ">=3.10", "2.13.0", _ALL_LEVELS),
    Release("0.5.20", ">=3.10", "2.13.0", _ALL_LEVELS),
    Release("0.5.21", ">=3.10", "2.13.0", _ALL_LEVELS),
    Release("0.5.22", ">=3.11", "2.14.1", _ALL_LEVELS),
    Release("0.5.23", ">=3.11", "2.14.1", _ALL_LEVELS),
)
"""One row for each minor release, oldest first."""

OLDEST, NEWEST = SUPPORTED_RELEASES[0].version, SUPPORTED_RELEASES[-1].version


class Standing(Enum):
    """Where a SGLang version stands against :data:`SUPPORTED_RELEASES`."""

    TOO_OLD = "too old"
    TESTED = "tested"
    BETWEEN = "inside the tested range"
    NEWER = "newer than tested"


@dataclass(frozen=True)
class Support:
    """The answer of :func:`classify_version`; ``message`` is empty where there is nothing to say."""

    version: str
    standing: Standing
    message: str = ""


def classify_version(version: str) -> Support:
    """Say whether ``version`` is too old, tested, inside the tested range, or newer than tested."""
    key = version_key(version)
    if key < version_key(OLDEST):
        return Support(version, Standing.TOO_OLD, _too_old(version))
    if key > version_key(NEWEST):
        return Support(version, Standing.NEWER, _newer(version))
    tested = any(key == version_key(release.version) for release in SUPPORTED_RELEASES)
    return Support(version, Standing.TESTED if tested else Standing.BETWEEN)


def _too_old(version: str) -> str:
    unknown = (
        "0.0.0 is what a checkout without tags calls itself: fetch its tags and reinstall it, or "
    )
    return (
        f"SGLang {version} is too old: expected {OLDEST} or newer, the first with a plugin loader. "
        f"To go on, {unknown if version.startswith('0.0.0') else ''}install a release from "
        f"{OLDEST} to {NEWEST}."
    )


def _newer(version: str) -> str:
    return (
        f"SGLang {version} is newer than what sglang-musa-ext is tested with ({OLDEST} to "
        f"{NEWEST}). Every symbol "
        "it relies on was found, so it goes on; if something is wrong, compare with SGLang "
        f"{NEWEST}."
    )


# --- the contract ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requirement:
    """One row of the contract. What ``parameters`` means is said by the kind's check."""

    kind: str
    module: str
    name: str
    parameters: tuple[str, ...] = ()
    since: str | None = None
    """The first release in which the row holds; ``None``: the oldest supported."""
    until: str | None = None
    """The last release in which the row holds; ``None``: still."""
    used_by: str = field(kw_only=True, default="attention")
    """The module of this package that touches the symbol, or the defect it works around."""
    why: str = field(kw_only=True)
    remove_when: str = field(kw_only=True)

    @property
    def symbol(self) -> str:
        """The dotted path of what the row is about."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def holds_in(self, version: str) -> bool:
        """Whether ``version`` lies between ``since`` and ``until``."""
        key = version_key(version)
        if self.since is not None and key < version_key(self.since):
            return False
        return self.until is None or key <= version_key(self.until)


_FA = "sglang.srt.layers.attention.flashattention_backend"
_BASE = "sglang.srt.layers.attention.base_attn_backend"
_REGISTRY = "sglang.srt.layers.attention.attention_registry"
_DRAFT = "sglang.srt.speculative.draft_utils"
_DFLASH = "sglang.srt.speculative.dflash_utils"
_MUSA = "sglang.srt.hardware_backend.musa.attention.flashattention_backend"
_VISION = "sglang.srt.layers.attention.vision"
_PLUGINS = "sglang.srt.plugins"
_PLATFORM = "sglang.srt.platforms.interface"
_DEVICE = "sglang.srt.platforms.device_mixin"
_SCHEDULER = "sglang.srt.managers.scheduler"
_SPECULATIVE = "sglang.srt.speculative"

_NEVER = "Never: composition rests on it; adapt the mixin if upstream renames it."
_OLD_GRAPH_HOOKS = "The oldest supported release is 0.5.13 or newer."
_KERNEL_PLUGIN = (
    "Upstream offers a registry for FA3 kernel providers, so that no name needs replacing."
)

_FORWARD_PARAMETERS = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")
_KERNELS = ("flash_attn_with_kvcache", "flash_attn_varlen_func")


def _hook(
    name: str,
    parameters: tuple[str, ...],
    purpose: str,
    since: str | None = None,
    until: str | None = None,
) -> Requirement:
    """A row about a method of SGLang's platform classes that the CPU reference platform overrides."""
    going = (
        "is gone"
        if until is None
        else f"is gone, or the oldest supported release is newer than {until}"
    )
    return Requirement(
        "method",
        _PLATFORM if name.startswith("SRTPlatform.") else _DEVICE,
        name,
        parameters,
        since,
        until,
        used_by="cpu_platform",
        why=f"The CPU reference platform {purpose} through this hook.",
        remove_when=f"The CPU reference platform {going}.",
    )


PLUGIN_SUPPORT = Requirement(
    "function",
    _PLUGINS,
    "load_plugins",
    used_by="plugin",
    why="Without a plugin loader SGLang never calls this package.",
    remove_when="Never: it is how this package is loaded.",
)

REQUIREMENTS: tuple[Requirement, ...] = (
    PLUGIN_SUPPORT,
    Requirement(
        "strings",
        _PLUGINS,
        "GENERAL_PLUGINS_GROUP",
        ("sglang.srt.plugins",),
        used_by="plugin",
        why="The entry point that registers fa3 is declared in this group.",
        remove_when="Never: it is how this package is loaded.",
    ),
    Requirement(
        "strings",
        _PLUGINS,
        "PLATFORM_PLUGINS_GROUP",
        ("sglang.srt.platforms",),
        used_by="plugin",
        why="The entry point of the CPU reference platform is declared in this group.",
        remove_when="The CPU reference platform is gone.",
    ),
    Requirement(
        "module_global",
        _REGISTRY,
        "ATTENTION_BACKENDS",
        used_by="plugin",
        why="The factory behind --attention-backend fa3 is replaced in this dictionary.",
        remove_when="Upstream lets a platform name its attention backend class.",
    ),
    Requirement(
        "registered",
        _REGISTRY,
        "register_attention_backend",
        ("fa3", "fa4"),
        used_by="plugin",
        why="fa3 becomes ours and fa4 is refused; entries that upstream does not have are options nobody can choose.",
        remove_when="Upstream lets a platform name its attention backend class.",
    ),
    *(
        Requirement(
            "function",
            "sglang.srt.utils.common",
            function,
            used_by="plugin",
            why=why,
            remove_when="Upstream's platform interface says the same without importing a device's library.",
        )
        for function, why in (
            ("is_musa", "It decides whether there is anything to do under SGLANG_MUSA_EXT=auto."),
            ("get_device_capability", "A device below MP 3.1 is refused by what it returns."),
        )
    ),
    # The kernel names, and how the forwards reach them.
    *(
        Requirement(
            "module_global",
            _FA,
            kernel,
            why="The dispatcher replaces this name, through which upstream's forwards call the kernel.",
            remove_when=_KERNEL_PLUGIN,
        )
        for kernel in _KERNELS
    ),
    Requirement(
        "kernel_calls",
        _FA,
        "FlashAttentionBackend",
        (
            "forward_extend: flash_attn_with_kvcache",
            "forward_extend: flash_attn_varlen_func",
            "forward_decode: flash_attn_with_kvcache",
        ),
        why="A kernel reached any other way, or outside the two forwards, would bypass the dispatcher.",
        remove_when=_KERNEL_PLUGIN,
    ),
    Requirement(
        "kernel_calls",
        _FA,
        "FlashAttentionBackend",
        ("forward_extend: merge_suffix_attention_in_place",),
        "0.5.20",
        why="UNO's fused suffix attention is upstream's own Triton kernel; it needs no FA3 provider.",
        remove_when="Upstream drops the fused suffix attention of UNO.",
    ),
    Requirement(
        "kernel_calls",
        _FA,
        "FlashAttentionBackend",
        ("forward_extend: self.flash_attn_varlen_func",),
        "0.5.23",
        why="Attention without a KV cache calls the instance attribute, under whose name the mixin has a method.",
        remove_when="Upstream calls the module global again, and the mixin's methods may have any name.",
    ),
    Requirement(
        "kernel_keywords",
        _FA,
        "FlashAttentionBackend",
        (
            *(
                "q",
                "k",
                "v",
                "k_cache",
                "v_cache",
                "qv",
                "page_table",
                "cache_seqlens",
                "cu_seqlens_q",
                "cu_seqlens_k",
            ),
            *(
                "cu_seqlens_k_new",
                "max_seqlen_q",
                "max_seqlen_k",
                "softmax_scale",
                "causal",
                "window_size",
                "softcap",
            ),
            *(
                "k_descale",
                "v_descale",
                "return_softmax_lse",
                "num_splits",
                "sinks",
                "scheduler_metadata",
                "out",
            ),
            "ver",
        ),
        why="Plans depend on what a call asks for, so a new keyword must be understood before it is served.",
        remove_when=_KERNEL_PLUGIN,
    ),
    Requirement(
        "kernel_keywords",
        _FA,
        "FlashAttentionBackend",
        ("score_mod", "aux_tensors", "rel_bias", "rel_bias_prep_cache", "sfq", "sfk", "sfv"),
        "0.5.16",
        why="These belong to FlashAttention 4 alone, and the adapters refuse them by name.",
        remove_when="Upstream no longer passes them.",
    ),
    Requirement(
        "kernel_keywords",
        _FA,
        "FlashAttentionBackend",
        ("mask_mod",),
        "0.5.22",
        why="The mask callback for images belongs to FlashAttention 4 alone, and the adapters refuse it by name.",
        remove_when="Upstream no longer passes it.",
    ),
    Requirement(
        "forward_imports",
        _FA,
        "FlashAttentionBackend",
        why="A local import inside a forward could bring a kernel past the dispatcher.",
        remove_when=_KERNEL_PLUGIN,
    ),
    Requirement(
        "forward_imports",
        _FA,
        "FlashAttentionBackend",
        ("forward_extend: sglang.kernels.ops.attention.flash_attention_v4.make_image_mask_mod",),
        "0.5.22",
        why="This local import inside a forward is the mask callback of FlashAttention 4, not a kernel.",
        remove_when="Upstream no longer imports it there.",
    ),
    # The backend class.
    Requirement(
        "method",
        _FA,
        "FlashAttentionBackend.__init__",
        (
            *(
                "self",
                "model_runner",
                "skip_prefill",
                "speculative_step_id",
                "topk",
                "speculative_num_steps",
            ),
            "fa_impl_ver",
        ),
        why="The mixin's constructor has the same parameters and refuses fa_impl_ver 4.",
        remove_when=_NEVER,
    ),
    Requirement(
        "imports_from",
        _FA,
        "sgl_kernel.flash_attn",
        (*_KERNELS, "get_scheduler_metadata"),
        why="sgl_kernel may be built without it, so a stand-in with these names serves while the constructor runs.",
        remove_when="Upstream's constructor no longer imports sgl_kernel.flash_attn.",
    ),
    Requirement(
        "imports_from",
        _FA,
        "sgl_kernel",
        ("merge_state_v2",),
        used_by="cpu_platform",
        why="Cascade attention merges its parts with it; the CPU platform's stand-in for sgl_kernel has this name.",
        remove_when="Upstream merges states without sgl_kernel.",
    ),
    *(
        Requirement(
            "method",
            _FA,
            f"FlashAttentionBackend.{forward}",
            _FORWARD_PARAMETERS,
            why="The mixin opens its scope around this forward, and reads the layer and the batch.",
            remove_when=_NEVER,
        )
        for forward in ("forward_extend", "forward_decode")
    ),
    Requirement(
        "method",
        _BASE,
        "AttentionBackend.forward",
        _FORWARD_PARAMETERS,
        why="It dispatches to the two forwards that the mixin overrides.",
        remove_when=_NEVER,
    ),
    Requirement(
        "class",
        _FA,
        "FlashAttentionBackend",
        ("AttentionBackend",),
        why="MusaFA3Backend derives from it, and AttentionBackend.forward dispatches for it.",
        remove_when=_NEVER,
    ),
    *(
        Requirement(
            "attribute",
            _FA,
            f"FlashAttentionBackend.{attribute}",
            why=why,
            remove_when=_NEVER,
        )
        for attribute, why in (
            ("forward_metadata", "A new object in it begins a new pass."),
            (
                "page_size",
                (
                    "The kernels bound the key length by the page table's capacity, in pages of this "
                    "size."
                ),
            ),
            ("use_mla", "MLA plans live in a workspace, others in a tensor of their own."),
            ("kv_cache_dtype", "The kernels refuse an fp8 KV cache by its name."),
            (
                "flash_attn_with_kvcache",
                "The instance attribute is removed, so that the mixin's method is found.",
            ),
            (
                "flash_attn_varlen_func",
                "The instance attribute is removed, so that the mixin's method is found.",
            ),
        )
    ),
    Requirement(
        "attribute",
        _FA,
        "FlashAttentionBackend._get_scheduler_metadata",
        why="Set to None, it turns off upstream's own precomputation, which serves plain decode only.",
        remove_when="Upstream no longer precomputes scheduler metadata.",
    ),
    # When a pass begins.
    Requirement(
        "metadata_writers",
        _FA,
        "FlashAttentionBackend",
        ("init_forward_metadata",),
        why="Each method through which forward_metadata is assigned begins a new pass, and is wrapped.",
        remove_when=_NEVER,
    ),
    Requirement(
        "metadata_writers",
        _FA,
        "FlashAttentionBackend",
        ("init_forward_metadata_capture_cuda_graph", "init_forward_metadata_replay_cuda_graph"),
        None,
        "0.5.12.post1",
        why="Up to 0.5.12 graphs are captured and replayed through these two; both are wrapped.",
        remove_when=_OLD_GRAPH_HOOKS,
    ),
    Requirement(
        "metadata_writers",
        _FA,
        "FlashAttentionBackend",
        ("init_forward_metadata_out_graph",),
        "0.5.13",
        why="From 0.5.13 it prepares both capture and replay; it is wrapped.",
        remove_when="Upstream prepares graphs through another method.",
    ),
    Requirement(
        "metadata_writers",
        _FA,
        "FlashAttentionBackend",
        ("stage_draft_extend_metadata",),
        "0.5.20",
        why="It prepares draft-extend metadata ahead of a graph; it is wrapped.",
        remove_when="Upstream no longer stages draft-extend metadata.",
    ),
    Requirement(
        "method",
        _FA,
        "FlashAttentionBackend.init_forward_metadata",
        ("self", "forward_batch"),
        why="Its call begins a new pass.",
        remove_when=_NEVER,
    ),
    Requirement(
        "method",
        _FA,
        "FlashAttentionBackend.init_forward_metadata_out_graph",
        ("self", "forward_batch", "in_capture"),
        "0.5.13",
        why="Its call begins a new pass, and says whether a graph is being captured.",
        remove_when="Upstream prepares graphs through another method.",
    ),
    Requirement(
        "method",
        _FA,
        "FlashAttentionBackend.init_forward_metadata_in_graph",
        ("self", "forward_batch"),
        "0.5.16",
        why="It rewrites metadata in place inside a graph, so its call begins a new pass although no object changes.",
        remove_when="Upstream no longer writes metadata inside graphs.",
    ),
    Requirement(
        "method",
        _BASE,
        "AttentionBackend.on_after_cuda_graph_warmup",
        ("self",),
        "0.5.12.post1",
        why="Called between a graph's warm-up runs and its capture: what the warm-up planned must not leak in.",
        remove_when="Upstream no longer announces the end of the warm-up.",
    ),
    *(
        Requirement(
            "method",
            _BASE,
            f"AttentionBackend.{method}",
            ("self", *parameters),
            since,
            why="Its call prepares metadata for a graph, and begins a new pass.",
            remove_when="Upstream prepares graphs through another method.",
        )
        for method, parameters, since in (
            (
                "init_forward_metadata_for_breakable_cuda_graph_capture",
                ("forward_batch",),
                "0.5.13",
            ),
            (
                "prepare_forward_metadata_for_breakable_cuda_graph_replay",
                ("capture_metadata",),
                "0.5.13",
            ),
            ("prepare_full_cuda_graph_chunked_prefix", ("forward_batch",), "0.5.17"),
        )
    ),
    Requirement(
        "attribute",
        "sglang.srt.mem_cache.memory_pool",
        "ReqToTokenPool.req_to_token",
        why="The device of the kernels is read off this tensor, because the runner's device name has no index.",
        remove_when="The runner's device names its index in every release.",
    ),
    # Where upstream constructs the backend: each place is a selection point, or known not to be
    # one.
    Requirement(
        "constructors",
        "sglang.srt",
        "FlashAttentionBackend",
        (_REGISTRY, _FA, _DRAFT),
        used_by="selection",
        why="A backend constructed elsewhere would not be ours; these places are covered.",
        remove_when="Upstream lets a platform name its attention backend class.",
    ),
    Requirement(
        "constructors",
        "sglang.srt",
        "FlashAttentionBackend",
        ("sglang.srt.layers.attention.minicpm.backend",),
        "0.5.19",
        used_by="selection",
        why="MiniCPM's sparse backend calls its kernels itself; it is not served, and refused when constructed.",
        remove_when="MiniCPM's sparse backend is served too, or gone.",
    ),
    # Speculative decoding.
    Requirement(
        "method",
        _FA,
        "FlashAttentionMultiStepBackend.__init__",
        ("self", "model_runner", "topk", "speculative_num_steps", "fa_impl_ver"),
        why="The multi-step draft backend runs this constructor while our child class stands for upstream's.",
        remove_when="Upstream lets a platform name its attention backend class.",
    ),
    Requirement(
        "calls",
        _FA,
        "FlashAttentionMultiStepBackend.__init__",
        ("FlashAttentionBackend",),
        why="Its children become ours because it constructs them through the module global.",
        remove_when="Upstream lets the child class be named.",
    ),
    *(
        Requirement(
            "method",
            _DRAFT,
            f"DraftBackendFactory.{method}",
            ("self", "fa_impl_ver"),
            why="It picks the FA3 class of the draft worker.",
            remove_when="Upstream asks the attention registry for draft backends too.",
        )
        for method in ("_create_fa_decode_backend", "_create_fa_prefill_backend")
    ),
    Requirement(
        "imports",
        _DRAFT,
        "DraftBackendFactory._create_fa_decode_backend",
        (f"{_FA}.FlashAttentionMultiStepBackend", f"{_MUSA}.MusaFlashAttentionMultiStepBackend"),
        why="It imports the class when called, from one of these two modules, so the class can be ours.",
        remove_when="Upstream asks the attention registry for draft backends too.",
    ),
    Requirement(
        "imports",
        _DRAFT,
        "DraftBackendFactory._create_fa_prefill_backend",
        (f"{_FA}.FlashAttentionBackend", f"{_MUSA}.MusaFlashAttentionBackend"),
        why="It imports the class when called, from one of these two modules, so the class can be ours.",
        remove_when="Upstream asks the attention registry for draft backends too.",
    ),
    Requirement(
        "imports_from",
        _DRAFT,
        _MUSA,
        ("MusaFlashAttentionBackend", "MusaFlashAttentionMultiStepBackend"),
        why="A stand-in with these two names takes the in-tree MUSA module's place while a draft factory runs.",
        remove_when="Upstream asks the attention registry for draft backends too.",
    ),
    Requirement(
        "strings",
        _DFLASH,
        "_DFLASH_VERIFY_SKIP_CUSTOM_MASK_BACKENDS",
        ("FlashAttentionBackend",),
        why="DFlash goes by class name to skip a mask that FA3 ignores; our class's name is added to this set.",
        remove_when="Upstream asks the backend instead of its name.",
    ),
    # What the process reports about itself.
    Requirement(
        "method",
        _SCHEDULER,
        "Scheduler.get_internal_state",
        ("self", "recv_req"),
        used_by="report",
        why="The effective configuration and the plan counters are added to the state it returns.",
        remove_when="Upstream lets plugins add to the server's state.",
    ),
    Requirement(
        "attribute",
        "sglang.srt.managers.io_struct",
        "GetInternalStateReqOutput.internal_state",
        used_by="report",
        why="The report goes into this dictionary of the reply.",
        remove_when="Upstream lets plugins add to the server's state.",
    ),
    # What SGLang gets on MUSA without being asked.
    Requirement(
        "method",
        "sglang.srt.server_args",
        "ServerArgs._get_default_attn_backend",
        ("self", "use_mla_backend", "model_config"),
        None,
        "0.5.18",
        used_by="defaults",
        why="It names the attention backend where none was chosen; fa3 is put in its place on MUSA.",
        remove_when="The oldest supported release is 0.5.19 or newer.",
    ),
    *(
        Requirement(
            "module_global" if module.endswith("overrides") else "function",
            module,
            "get_default_attn_backend",
            ()
            if module.endswith("overrides")
            else ("server_args", "use_mla_backend", "model_config"),
            "0.5.19",
            used_by="defaults",
            why="It names the attention backend where none was chosen; fa3 is put in its place on MUSA.",
            remove_when="Upstream chooses fa3 on MUSA by itself.",
        )
        for module in (
            "sglang.srt.arg_groups.model_override_base",
            "sglang.srt.arg_groups.overrides",
        )
    ),
    Requirement(
        "method",
        "sglang.srt.server_args",
        "ServerArgs.__post_init__",
        ("self",),
        None,
        "0.5.19",
        used_by="defaults",
        why="Up to 0.5.18 arguments are settled here; those settled with this package in place are marked.",
        remove_when="The oldest supported release is 0.5.19 or newer.",
    ),
    Requirement(
        "calls",
        "sglang.srt.entrypoints.engine",
        "Engine._launch_subprocesses",
        ("server_args.resolve_once",),
        "0.5.19",
        used_by="defaults",
        why="Arguments are settled by this method, once; those settled with this package in place are marked.",
        remove_when="Upstream loads plugins before it settles arguments, in every way of starting a server.",
    ),
    Requirement(
        "registered",
        _REGISTRY,
        "register_attention_backend",
        ("triton", "flashinfer"),
        used_by="defaults",
        why="These are upstream's own choices on MUSA; building one says if it was chosen before this package could.",
        remove_when="Upstream loads plugins before it settles arguments, in every way of starting a server.",
    ),
    Requirement(
        "calls",
        "sglang.srt.layers.attention.vision",
        "VisionFlash3Attention.forward",
        ("flash_attn_func",),
        "0.5.16",
        used_by="defaults",
        why="Vision on MUSA calls a function that its module defines for CUDA alone; it is given one.",
        remove_when="Upstream defines the function on MUSA, or asks its attention registry.",
    ),
    Requirement(
        "strings",
        "sglang.srt.platforms",
        "__getattr__",
        ("current_platform",),
        used_by="defaults",
        why="The platform in use is looked up under this name, which the module makes up when asked.",
        remove_when="Upstream chooses fa3 on MUSA by itself.",
    ),
    Requirement(
        "method",
        _DEVICE,
        "DeviceMixin.is_out_of_tree",
        ("self",),
        used_by="defaults",
        why="A platform plugin names its own default attention backend, which is left to it.",
        remove_when="Upstream chooses fa3 on MUSA by itself.",
    ),
    # Page size.
    Requirement(
        "method",
        "sglang.srt.server_args",
        "ServerArgs._handle_page_size",
        ("self",),
        None,
        "0.5.18",
        used_by="defaults",
        why="It gives an unset page size its default, 64 on MUSA.",
        remove_when="The oldest supported release is 0.5.19 or newer.",
    ),
    Requirement(
        "function",
        "sglang.srt.arg_groups.overrides",
        "_page_size_default",
        ("view",),
        "0.5.15",
        used_by="defaults",
        why="It gives an unset page size its default, 64 on MUSA.",
        remove_when="Upstream asks the platform for the default page size.",
    ),
    # Vision on MUSA: a defect of upstream's, not a need.
    Requirement(
        "bound_only_under",
        _VISION,
        "flash_attn_func",
        ("_is_cuda",),
        "0.5.16",
        used_by="vision",
        why="VisionFlash3Attention calls it on MUSA too, where it is a NameError; it is defined for MUSA instead.",
        remove_when="Upstream defines it on MUSA: this row is violated then, and the repair is not applied.",
    ),
    Requirement(
        "calls",
        _VISION,
        "VisionFlash3Attention",
        ("flash_attn_func",),
        "0.5.16",
        used_by="vision",
        why="The vision tower's FA3 reaches its kernel through this module global.",
        remove_when="Upstream's vision attention runs on MUSA unaided.",
    ),
    # The CPU reference platform overrides these; an override of a hook that is gone is never
    # called.
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
    Requirement(
        "module_global",
        "sglang.srt.layers.rotary_embedding.base",
        "_is_mps",
        used_by="cpu_platform",
        why="Up to 0.5.12 rotary embeddings want vllm on an unknown device; set, this flag leads them to PyTorch.",
        remove_when="The oldest supported release is 0.5.13 or newer, with the assignment in platform.",
    ),
    Requirement(
        "module_global",
        "sglang.srt.layers.rotary_embedding.base",
        "current_platform",
        (),
        "0.5.13",
        used_by="cpu_platform",
        why="Where rotary embeddings know the platform, they need no help, which the CPU platform goes by.",
        remove_when="The oldest supported release is 0.5.13 or newer, with the row above.",
    ),
    Requirement(
        "function",
        "sglang.srt.distributed.device_communicators.pynccl_wrapper",
        "find_nccl_library",
        (),
        used_by="cpu_platform",
        why="It reads SGLANG_NCCL_SO_PATH, by which the CPU platform keeps NCCL away from ranks on a CPU.",
        remove_when="The oldest supported release is 0.5.23 or newer, which asks capabilities.supports_pynccl.",
    ),
    *(
        Requirement(
            "module_global",
            module,
            name,
            used_by="cpu_platform",
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
            "_is_musa",
            (),
            since,
            until,
            used_by="cpu_platform",
            why="Speculative decoding chooses kernels by this flag, and has none for a device it does not know.",
            remove_when="Upstream speculates on every out-of-tree device, or the module is older than all releases.",
        )
        for module, since, until in (
            (f"{_SPECULATIVE}.eagle_utils", None, "0.5.22"),
            (f"{_SPECULATIVE}.triton_ops.cache_locs", "0.5.13.post1", "0.5.15.post1"),
            ("sglang.kernels.ops.speculative.cache_locs", "0.5.16", None),
            ("sglang.kernels.ops.speculative.spec_tree", "0.5.23", None),
        )
    ),
)


SERVING = ("plugin", "attention", "report")
"""The users of those rows without which ``fa3`` cannot be served; a broken row of another user
concerns it alone.
"""


@dataclass(frozen=True)
class Violation:
    """One difference between the contract and a SGLang source."""

    requirement: Requirement
    version: str
    seen: str

    def __str__(self) -> str:
        row = self.requirement
        return (
            f"{row.symbol}: needed {_needed(row)}; SGLang {self.version} has {self.seen}. {row.why}"
        )


def _needed(row: Requirement) -> str:
    listed = ", ".join(row.parameters)
    only = "nothing but" if row.kind in ALLOWANCES else "with"
    return f"as {row.kind}" + (f" {only} {listed}" if listed else "")


class UpstreamContractError(RuntimeError):
    """The SGLang at hand is not one this package can compose with; carries every violation."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        listed = "\n".join(
            f"  {number}. {violation}" for number, violation in enumerate(violations, 1)
        )
        super().__init__(
            f"SGLang does not have what sglang-musa-ext relies on ({len(self.violations)} "
            f"differences):\n{listed}\n"
            f"Install a SGLang from {OLDEST} to {NEWEST}, or a newer sglang-musa-ext, or set "
            "SGLANG_MUSA_EXT=off."
        )


def check_upstream(
    source_root: Path | None = None,
    version: str | None = None,
    *,
    used_by: Iterable[str] | None = None,
) -> list[Violation]:
    """Compare a SGLang source with the contract, and return every difference.

    Args:
        source_root: The directory that holds ``sglang/`` (or ``python/sglang/``, as a checkout
            does); ``None``: the installed SGLang, which is found but not imported.
        version: The version the source is taken for; ``None``: what the source or its metadata
            says.
        used_by: Check only the rows of these users; ``None``: all of them.
    """
    package = find_package(source_root)
    if package is None:
        where = "in this environment" if source_root is None else f"below {source_root}"
        return [Violation(PLUGIN_SUPPORT, "?", f"no package sglang {where}")]
    version = read_version(package) if version is None else version
    if classify_version(version).standing is Standing.TOO_OLD:
        # Every row would differ; the version alone says what is wrong.
        return [
            Violation(
                PLUGIN_SUPPORT, version, f"version {version}, where {OLDEST} or newer is needed"
            )
        ]
    users = None if used_by is None else frozenset(used_by)
    rows = [
        row
        for row in REQUIREMENTS
        if row.holds_in(version) and (users is None or row.used_by in users)
    ]
    return check_rows(rows, SourceTree(package.parent), version)


def require_upstream(
    source_root: Path | None = None, version: str | None = None, *, used_by: Iterable[str] = SERVING
) -> Support:
    """Raise what :func:`check_upstream` finds, all of it at once; else say where the version
    stands.

    Returns:
        The version's standing; its ``message``, if any, is a warning to be logged.

    Raises:
        UpstreamContractError: carrying every violation.
    """
    violations = check_upstream(source_root, version, used_by=used_by)
    if violations:
        raise UpstreamContractError(violations)
    package = find_package(source_root)
    assert package is not None  # its absence is a violation
    return classify_version(version or read_version(package))


def find_package(source_root: Path | None = None) -> Path | None:
    """The directory of the package ``sglang`` below ``source_root`` or, without one, as installed."""
    if source_root is not None:
        candidates = (source_root / "sglang", source_root / "python" / "sglang")
        return next((path for path in candidates if path.is_dir()), None)
    spec = importlib.util.find_spec("sglang")  # a top-level name: finding it imports nothing
    locations = spec.submodule_search_locations if spec is not None else None
    return next((Path(location) for location in locations or ()), None)


def read_version(package: Path) -> str:
    """The version of the SGLang in ``package``, from the source itself before any metadata.

    Metadata may belong to another copy than the one that is imported, for example under
    ``PYTHONPATH``.

    Raises:
        UpstreamVersionError: if neither source nor metadata names one.
    """
    written = package / "_version.py"
    if written.is_file():
        for node in ast.parse(written.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = {ast.unparse(target) for target in node.targets}
                if "__version__" in names and isinstance(node.value.value, str):
                    return node.value.value
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise UpstreamVersionError("none found") from None


# --- reading sources ------------------------------------------------------------------------------

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_Scope = (ast.Module, ast.ClassDef)


class _Unreadable(Exception):
    """A module that is absent, or that this Python cannot parse; the text says which."""


class SourceTree:
    """The Python sources below ``root``; each file is parsed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module] = {}

    def module(self, name: str) -> ast.Module:
        """The syntax tree of the module ``name``."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> ast.Module:
        base = self.root.joinpath(*name.split("."))
        path = next(
            (path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()),
            None,
        )
        if path is None:
            raise _Unreadable(f"no module {name}")
        try:
            return ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise _Unreadable(f"a module {name} that this Python cannot parse ({error})") from error

    def definition(self, module: str, name: str) -> ast.AST:
        """The node that ``name`` (dotted: a member of a class) is bound by; the module itself if
        empty.
        """
        node: ast.AST = self.module(module)
        for part in filter(None, name.split(".")):
            found = dict(_bindings(node.body)).get(part) if isinstance(node, _Scope) else None
            if found is None:
                raise _Unreadable(f"no {part}" + (f" in {name}" if part != name else ""))
            node = found
        return node

    def containing(self, prefix: str, text: str) -> Iterator[str]:
        """The names of the modules below the package ``prefix`` whose source contains ``text``."""
        needle = text.encode()
        for path in sorted(self.root.joinpath(*prefix.split(".")).rglob("*.py")):
            if needle in path.read_bytes():
                parts = path.relative_to(self.root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _bindings(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """The names that the statements of ``body`` bind, under conditions too, each with its node."""
    for node in body:
        if isinstance(node, (*_Function, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        else:
            yield from _bindings(_nested_statements(node))


def _nested_statements(node: ast.stmt) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            yield from child.body
        elif isinstance(child, ast.stmt):
            yield child


def _methods(node: ast.AST) -> list[ast.FunctionDef]:
    return [item for item in getattr(node, "body", ()) if isinstance(item, ast.FunctionDef)]


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (item for item in ast.walk(node) if isinstance(item, ast.Call))


def _imports(node: ast.AST) -> set[str]:
    """Dotted names of everything imported anywhere inside ``node``."""
    found: set[str] = set()
    for item in ast.walk(node):
        if isinstance(item, ast.ImportFrom):
            found.update(
                f"{'.' * item.level}{item.module or ''}.{alias.name}" for alias in item.names
            )
        elif isinstance(item, ast.Import):
            found.update(alias.name for alias in item.names)
    return found


def _locally_bound(function: ast.AST) -> set[str]:
    """Names that are local to ``function``: a call of one does not reach the module's global."""
    stored = {
        item.id
        for item in ast.walk(function)
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)
    }
    parameters = {item.arg for item in ast.walk(function) if isinstance(item, ast.arg)}
    imported = {name.rpartition(".")[2] for name in _imports(function)}
    return stored | parameters | imported


def _self_attributes(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Attributes of ``self`` that ``node`` stores or loads."""
    return {
        item.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Attribute)
        and isinstance(item.ctx, context)
        and isinstance(item.value, ast.Name)
        and item.value.id == "self"
    }


def _strings(node: ast.AST) -> set[str]:
    return {
        item.value
        for item in ast.walk(node)
        if isinstance(item, ast.Constant) and isinstance(item.value, str)
    }


def _listed(items: Iterable[str]) -> str:
    return ", ".join(sorted(items)) or "nothing"


# --- needs: each check says what is seen where that is not what the row needs ---------------------


def _check_global(tree: SourceTree, row: Requirement) -> str | None:
    """The module binds ``name`` at its top level."""
    tree.definition(row.module, row.name)
    return None


def _check_callable(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is a function whose parameters begin with ``parameters``, in this order."""
    node = tree.definition(row.module, row.name)
    if not isinstance(node, _Function):
        return f"a {type(node).__name__}, not a function"
    arguments = node.args
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if tuple(names[: len(row.parameters)]) != row.parameters:
        return f"the parameters ({', '.join(names)})"
    return None


def _check_class(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is a class; ``parameters`` are among its bases."""
    node = tree.definition(row.module, row.name)
    if not isinstance(node, ast.ClassDef):
        return f"a {type(node).__name__}, not a class"
    bases = {ast.unparse(base) for base in node.bases}
    return None if bases.issuperset(row.parameters) else f"the bases {_listed(bases)}"


def _check_attribute(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` is ``Class.attribute``, set in the class body or by its constructor."""
    owner, _, attribute = row.name.rpartition(".")
    node = tree.definition(row.module, owner)
    body = {name for name, _ in _bindings(getattr(node, "body", ()))}
    constructors = [method for method in _methods(node) if method.name == "__init__"]
    stored = {name for method in constructors for name in _self_attributes(method, ast.Store)}
    return (
        None if attribute in body | stored else f"no {attribute} set by {owner} or its constructor"
    )


def _check_strings(tree: SourceTree, row: Requirement) -> str | None:
    """The value of ``name`` contains the strings ``parameters``."""
    strings = _strings(tree.definition(row.module, row.name))
    return None if strings.issuperset(row.parameters) else f"the strings {_listed(strings)}"


def _check_registered(tree: SourceTree, row: Requirement) -> str | None:
    """A function is decorated with ``name("entry")`` for each entry of ``parameters``."""
    entries: set[str] = set()
    for node in tree.module(row.module).body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == row.name:
                entries |= _strings(decorator)
    return None if entries.issuperset(row.parameters) else f"the entries {_listed(entries)}"


def _check_imports(tree: SourceTree, row: Requirement) -> str | None:
    """Somewhere inside ``name`` each dotted name of ``parameters`` is imported."""
    imports = _imports(tree.definition(row.module, row.name))
    missing = set(row.parameters) - imports
    if not missing:
        return None
    wanted = tuple({name.rpartition(".")[2] for name in row.parameters})
    related = {name for name in imports if name.rpartition(".")[2] in wanted}
    return f"no import of {_listed(missing)} (related: {_listed(related)})"


def _check_calls(tree: SourceTree, row: Requirement) -> str | None:
    """``name`` calls each of ``parameters``, and by its global name, not by a local one."""
    node = tree.definition(row.module, row.name)
    called = {ast.unparse(call.func) for call in _calls(node)}
    missing = set(row.parameters) - called
    if missing:
        return f"no call of {_listed(missing)}"
    local = set(row.parameters) & _locally_bound(node)
    return f"a local binding of {_listed(local)}" if local else None


def _check_bound_only_under(tree: SourceTree, row: Requirement) -> str | None:
    """The module binds ``name`` nowhere but under ``if`` with the condition ``parameters[0]``."""
    (condition,) = row.parameters
    tree.definition(row.module, row.name)
    for node in tree.module(row.module).body:
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == condition
        body = node.orelse if isinstance(node, ast.If) and guarded else [node]
        if row.name in dict(_bindings(body)):
            return f"a binding of {row.name} elsewhere too"
    return None


NEEDS: dict[str, Callable[[SourceTree, Requirement], str | None]] = {
    "module_global": _check_global,
    "function": _check_callable,
    "method": _check_callable,
    "class": _check_class,
    "attribute": _check_attribute,
    "strings": _check_strings,
    "registered": _check_registered,
    "imports": _check_imports,
    "calls": _check_calls,
    "bound_only_under": _check_bound_only_under,
}


# --- allowances: each finder returns all that upstream does ---------------------------------------


def _kernel_calls(method: ast.FunctionDef) -> list[ast.Call]:
    """Calls of an FA3 function, known by name or by being given a query and keys by keyword."""
    found = []
    for call in _calls(method):
        keywords = {keyword.arg for keyword in call.keywords}
        named = ast.unparse(call.func).rpartition(".")[2].startswith("flash_attn")
        if named or ("q" in keywords and keywords & {"k", "k_cache"}):
            found.append(call)
    return found


def _find_kernel_calls(tree: SourceTree, module: str, name: str) -> set[str]:
    """How the methods of a class reach a kernel: ``method: callee``."""
    found: set[str] = set()
    for method in _methods(tree.definition(module, name)):
        local = _locally_bound(method)
        for call in _kernel_calls(method):
            callee = ast.unparse(call.func)
            found.add(f"{method.name}: {callee}" + (" (a local name)" if callee in local else ""))
    return found


def _find_kernel_keywords(tree: SourceTree, module: str, name: str) -> set[str]:
    """The keywords that the methods of a class pass to FA3 functions, those in ``**kwargs``
    included.
    """
    owner = tree.definition(module, name)
    found: set[str] = set()
    for method in _methods(owner):
        for call in _kernel_calls(method):
            if not ast.unparse(call.func).rpartition(".")[2].startswith("flash_attn"):
                continue
            if call.args:
                found.add(f"{len(call.args)} positional arguments")
            for keyword in call.keywords:
                found |= {keyword.arg} if keyword.arg else _expanded(keyword.value, method, owner)
    return found


def _expanded(value: ast.expr, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    """The keywords that ``**value`` may carry; what cannot be followed is named as it is written."""
    if isinstance(value, ast.Dict):
        items = zip(value.keys, value.values, strict=True)
        return set().union(*(_dict_item(key, item, method, owner) for key, item in items))
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict" and not value.args:
        return set().union(*(_keyword_item(keyword, method, owner) for keyword in value.keywords))
    if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("self."):
        return _returned_keys(ast.unparse(value.func), owner)
    if isinstance(value, ast.Name):
        return _variable_keys(value.id, method, owner)
    return {f"**{ast.unparse(value)}"}


def _dict_item(
    key: ast.expr | None, item: ast.expr, method: ast.FunctionDef, owner: ast.AST
) -> set[str]:
    if key is None:
        return _expanded(item, method, owner)
    return {
        key.value
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
        else f"[{ast.unparse(key)}]"
    }


def _keyword_item(keyword: ast.keyword, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    return {keyword.arg} if keyword.arg else _expanded(keyword.value, method, owner)


def _returned_keys(callee: str, owner: ast.AST) -> set[str]:
    """The keys of the dictionaries that ``self.method`` returns."""
    for method in _methods(owner):
        if f"self.{method.name}" == callee:
            returns = (node.value for node in ast.walk(method) if isinstance(node, ast.Return))
            return set().union(
                *(_expanded(value, method, owner) for value in returns if value is not None)
            )
    return {f"**{callee}()"}


def _variable_keys(variable: str, method: ast.FunctionDef, owner: ast.AST) -> set[str]:
    """The keys that ``method`` puts into its dictionary ``variable``."""
    found: set[str] = set()
    known = False
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == variable:
                    known = True
                    found |= _expanded(node.value, method, owner)
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == variable:
                    found |= _dict_item(target.slice, node.value, method, owner)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{variable}.update":
            for argument in node.args:
                found |= _expanded(argument, method, owner)
            for keyword in node.keywords:
                found |= _keyword_item(keyword, method, owner)
    return found if known else found | {f"**{variable}"}


def _find_forward_imports(tree: SourceTree, module: str, name: str) -> set[str]:
    """What the forwards of a class import when called: ``method: dotted name``."""
    forwards = (
        method
        for method in _methods(tree.definition(module, name))
        if method.name.startswith("forward")
    )
    return {f"{method.name}: {imported}" for method in forwards for imported in _imports(method)}


def _find_imports_from(tree: SourceTree, module: str, name: str) -> set[str]:
    """What ``module`` imports, anywhere in it, from the module ``name``."""
    imports = (imported.rpartition(".") for imported in _imports(tree.module(module)))
    return {imported for origin, _, imported in imports if origin == name}


def _find_metadata_writers(tree: SourceTree, module: str, name: str) -> set[str]:
    """The methods by which ``forward_metadata`` is assigned from outside the class.

    A private method that assigns it counts as the public methods it is called by; the constructor
    does not count, because nothing was planned before it.
    """
    methods = {method.name: method for method in _methods(tree.definition(module, name))}
    uses = {caller: _self_attributes(method, ast.Load) for caller, method in methods.items()}
    found: set[str] = set()
    pending = [
        name
        for name, method in methods.items()
        if "forward_metadata" in _self_attributes(method, ast.Store)
    ]
    seen: set[str] = set()
    while pending:
        writer = pending.pop()
        if writer in seen or writer == "__init__":
            continue
        seen.add(writer)
        callers = [caller for caller in methods if writer in uses[caller] and caller != writer]
        if writer.startswith("_") and callers:
            pending += callers
        else:
            found.add(writer)
    return found


def _find_constructors(tree: SourceTree, module: str, name: str) -> set[str]:
    """The modules below the package ``module`` that call the class ``name``."""
    return {
        candidate
        for candidate in tree.containing(module, f"{name}(")
        if any(ast.unparse(call.func) == name for call in _calls(tree.module(candidate)))
    }


ALLOWANCES: dict[str, Callable[[SourceTree, str, str], set[str]]] = {
    "kernel_calls": _find_kernel_calls,
    "kernel_keywords": _find_kernel_keywords,
    "forward_imports": _find_forward_imports,
    "imports_from": _find_imports_from,
    "metadata_writers": _find_metadata_writers,
    "constructors": _find_constructors,
}


def check_rows(rows: Iterable[Requirement], tree: SourceTree, version: str) -> list[Violation]:
    """Compare ``rows``, all of which are taken to hold in ``version``, with the sources in
    ``tree``.
    """
    checked = ((row, _seen(row, tree)) for row in _joined(rows))
    return [Violation(row, version, seen) for row, seen in checked if seen is not None]


def _joined(rows: Iterable[Requirement]) -> list[Requirement]:
    """The rows, with the allowances of one symbol added up into its first row."""
    joined: dict[object, Requirement] = {}
    for row in rows:
        key = (row.kind, row.module, row.name) if row.kind in ALLOWANCES else row
        first = joined.get(key)
        joined[key] = (
            row if first is None else replace(first, parameters=first.parameters + row.parameters)
        )
    return list(joined.values())


def _seen(row: Requirement, tree: SourceTree) -> str | None:
    """What the source has instead of what ``row`` says; ``None`` if they agree."""
    try:
        if row.kind in NEEDS:
            return NEEDS[row.kind](tree, row)
        excess = ALLOWANCES[row.kind](tree, row.module, row.name) - set(row.parameters)
    except _Unreadable as error:
        return str(error)
    return f"also {_listed(excess)}" if excess else None
