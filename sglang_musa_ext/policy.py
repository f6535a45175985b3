"""The rules of which kernels serve which device and configuration, and why not.

The plugin, the defaults on MUSA, the doctor and the validation kit all ask here, so that they give
one answer. Dtypes, devices and releases come in by name: this module imports neither torch nor
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sglang_musa_ext import envs
from sglang_musa_ext.envs import Settings

if TYPE_CHECKING:
    from sglang_musa_ext.upstream.limits import Configuration

PAGE_SIZE = 64
"""Tokens in a page of the KV cache: MATE's MLA kernels need 64, others are fastest with it."""
MINIMUM_CAPABILITY = (3, 1)
"""The oldest MP version that MATE's kernels are built for."""
HALF_DTYPES = ("bfloat16", "float16")
"""The names of the types that MATE's kernels read and compute in, as PyTorch spells them."""
HALF_OPTIONS = ("auto", "bf16", "bfloat16", "fp16", "float16", "half")
"""The spellings of these types in SGLang's options; ``auto`` is the model's own type."""
FP8_OPTIONS = ("fp8_e4m3", "fp8_e5m2")
"""The spellings of fp8 in ``--kv-cache-dtype``."""
REFERENCE_PLATFORM = "musa_reference"
"""The name of this package's CPU platform, as ``SGLANG_PLATFORM`` gives it."""

DEVICE_OF_KERNELS = {"mate": "musa", "hopper": "cuda", "reference": "cpu"}
"""The kind of device that kernels are for; ``reference`` runs on any other too."""
KERNELS_OF_DEVICE = {"musa": "mate", "cpu": "reference"}
"""The kernels that ``SGLANG_MUSA_EXT_KERNELS=auto`` takes on a kind of device."""

NO_MUSA = "no MUSA device was found (torchada is missing, or torch is not built for MUSA)"


# --- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelChoice:
    """The answer of :func:`choose_kernels` and :func:`choose_service`."""

    kernels: str | None
    """``mate``, ``hopper`` or ``reference``; ``None``: no kernels serve."""
    reasons: tuple[str, ...] = ()
    """Reasons that no kernels serve."""


def choose_service(settings: Settings, *, on_musa: bool) -> KernelChoice:
    """Return the kernels that this package serves on in this process, or why it stays idle.

    Where ``settings.mode`` is ``on`` and no kernels are returned, that is an error.

    Args:
        settings: of this process.
        on_musa: whether a MUSA device was found.
    """
    if settings.mode == "off":
        return KernelChoice(None, (f"{envs.MODE}=off",))
    if settings.platform == REFERENCE_PLATFORM:
        return choose_kernels(settings, "cpu")
    if on_musa:
        return choose_kernels(settings, "musa")
    if settings.mode == "on" and settings.kernels in ("hopper", "reference"):
        return KernelChoice(settings.kernels)
    if settings.mode == "auto" and settings.kernels != "auto":
        named = f"{envs.KERNELS}={settings.kernels} takes effect with {envs.MODE}=on"
        return KernelChoice(None, (NO_MUSA, named))
    return KernelChoice(None, (NO_MUSA,))


def choose_kernels(settings: Settings, device: str) -> KernelChoice:
    """Return the kernels that ``settings`` name, or with ``auto`` those of the kind of device.

    Args:
        settings: ``kernels`` is ``auto``, ``mate``, ``hopper`` or ``reference``.
        device: ``torch.device.type`` of the KV cache.
    """
    if settings.kernels != "auto":
        return KernelChoice(settings.kernels)
    if device in KERNELS_OF_DEVICE:
        return KernelChoice(KERNELS_OF_DEVICE[device])
    known = ", ".join(f"{kernels} on {kind}" for kind, kernels in KERNELS_OF_DEVICE.items())
    reason = f"{envs.KERNELS}=auto has no kernels for the device {device}: it chooses {known}"
    return KernelChoice(None, (reason,))


def device_for(kernels: str, is_available: Callable[[str], bool]) -> str:
    """Return the kind of device to run ``kernels`` on; with ``auto`` the first that has some.

    Args:
        kernels: ``auto``, ``mate``, ``hopper`` or ``reference``.
        is_available: whether PyTorch sees a kind of device; a CPU is always there.
    """
    if kernels != "auto":
        return DEVICE_OF_KERNELS[kernels]
    return next(kind for kind in KERNELS_OF_DEVICE if kind == "cpu" or is_available(kind))


def reason_against_capability(capability: tuple[int, int]) -> str | None:
    """Return why MATE cannot serve a device of this MP version; ``None``: it can."""
    if capability >= MINIMUM_CAPABILITY:
        return None
    needed = ".".join(map(str, MINIMUM_CAPABILITY))
    seen = ".".join(map(str, capability))
    return f"MATE has no kernels for MP version {seen}; they need {needed} or newer"


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DefaultRule:
    """A condition under which ``fa3`` is not chosen where nobody named a backend."""

    applies: Callable[[Configuration], bool]
    reason: str
    """The reason; fields of the configuration stand in braces."""


DEFAULT_RULES = (
    DefaultRule(lambda asked: asked.other_platform, "another platform plugin chooses it"),
    DefaultRule(
        lambda asked: "WhisperForConditionalGeneration" in asked.architectures,
        "SGLang runs Whisper on one backend alone",
    ),
    DefaultRule(
        lambda asked: asked.has_sinks,
        "with attention sinks MATE does not split a long context among multiprocessors",
    ),
    DefaultRule(
        lambda asked: asked.kv_cache_dtype == "fp8_e5m2",
        "SGLang serves --kv-cache-dtype fp8_e5m2 with triton in place of fa3",
    ),
    DefaultRule(
        lambda asked: asked.dtype not in HALF_OPTIONS, "MATE cannot read --dtype {0.dtype}"
    ),
    DefaultRule(
        lambda asked: asked.use_mla and asked.page_size not in (None, PAGE_SIZE),
        "MATE's MLA kernels cannot read --page-size {0.page_size}",
    ),
)
"""Every rule against ``fa3`` by default that is no limit of upstream's, each a row."""

FA3_ON_OTHER_DEVICES = frozenset(
    {
        "Olmo2ForCausalLM",
        "Llama4ForConditionalGeneration",
        "Llama4ForCausalLM",
        "Exaone4ForCausalLM",
        "ExaoneMoEForCausalLM",
        "ExaoneMoeForCausalLM",
    }
)
"""Models that SGLang puts on ``fa3`` where it has it, else, as on MUSA, on ``triton``."""


def reasons_against_fa3(asked: Configuration, version: str | None = None) -> tuple[str, ...]:
    """Return why ``fa3`` is no default for ``asked``; empty: it is.

    Args:
        asked: a server's configuration; an unset page size is the default one.
        version: SGLang's; ``None``: unknown, and every limit of upstream's counts.
    """
    # Loaded when needed: most processes never ask, and all of them import this module.
    from sglang_musa_ext.upstream.limits import limits_of

    reasons = [rule.reason.format(asked) for rule in DEFAULT_RULES if rule.applies(asked)]
    reasons += reasons_against_cache(asked)
    if asked.capability is not None and (old := reason_against_capability(asked.capability)):
        reasons.append(old)
    for headdim, headdim_v in sorted(asked.head_dims):
        if not mate_serves_head_dims(asked.mate or NEWEST_MATE, headdim, headdim_v):
            reasons.append(f"MATE has no kernels for head dimensions {headdim}/{headdim_v}")
    paged = replace(asked, page_size=asked.page_size or PAGE_SIZE)
    limits = [limit for limit in limits_of(paged, version) if not limit.is_best]
    reasons += [f"fa3 does not serve {limit.condition}" for limit in limits]
    return tuple(reasons)


def reasons_against_cache(asked: Configuration) -> list[str]:
    """Return why MATE cannot serve the KV cache of ``asked``; empty: it can.

    Where MATE's release is not known, a limit of any release counts.
    """
    release = asked.mate
    reasons = []
    for limit in KERNEL_LIMITS:
        if limit.stops is None or not limit.stops(asked):
            continue
        if release is None or limit.holds(release):
            seen = "its release is not known" if release is None else f"this is {dotted(release)}"
            before = "" if limit.until is None else f" before {dotted(limit.until)}, and {seen}"
            reasons.append(f"--kv-cache-dtype {asked.kv_cache_dtype}: MATE {limit.why}{before}")
    return reasons


def dotted(release: MateRelease) -> str:
    """Write a release as people do: ``0.2.7``."""
    return ".".join(map(str, release))


def reasons_against_fa3_in_place_of(
    named: str, asked: Configuration, version: str | None = None
) -> tuple[str, ...]:
    """Return why a backend that SGLang names for a model stays; empty: ``fa3`` takes its place.

    Args:
        named: the backend that SGLang's own rule for the model names.
        asked: the server's configuration.
        version: SGLang's; ``None``: unknown.
    """
    reasons = reasons_against_fa3(asked, version)
    if reasons:
        return reasons
    if named != "triton" or not set(asked.architectures) & FA3_ON_OTHER_DEVICES:
        return (f"SGLang itself names {named} for {', '.join(asked.architectures)}",)
    return ()


# --- limits of MATE's releases --------------------------------------------------------------------

MateRelease = tuple[int, ...]
"""MATE's release as numbers: ``(0, 2, 7)``."""

OLDEST_MATE = (0, 1, 3)
"""The first MATE whose wrapper has all functions of FA3 that are needed."""
NEWEST_MATE = (0, 2, 7)
"""The newest MATE that is known to be in use; newer ones are served with a warning."""
NEWEST_READ_MATE = (0, 2, 2)
"""The newest MATE whose source could be read; what is said of later ones is from release notes."""
MATE_RELEASES = (
    (0, 1, 3), (0, 2, 0), (0, 2, 1), (0, 2, 2), (0, 2, 3), (0, 2, 4), (0, 2, 5), (0, 2, 6),
    (0, 2, 7),
)  # fmt: skip
"""The releases that the table in ``docs/mate.md`` has columns for."""


@dataclass(frozen=True)
class KernelLimit:
    """Something that MATE does not do, or does otherwise than FA3, from one release to another."""

    name: str
    feature: str
    """The subject, for people."""
    effect: str
    """One of :data:`EFFECTS`: what happens where the limit holds."""
    why: str
    """MATE's behaviour or need there, in words."""
    since: MateRelease = (0,)
    """The first release that it holds for."""
    until: MateRelease | None = None
    """The first release that it holds for no more; ``None``: it holds for all that are known."""
    arguments: tuple[str, ...] = ()
    """Arguments of the kernels that no call may use where it holds."""
    function: str | None = None
    """The function that ``arguments`` are of; ``None``: of both."""
    stops: Callable[[Configuration], bool] | None = None
    """For limits of KV caches: whether a configuration meets it, as far as that is known before a
    server starts.
    """

    def holds(self, release: MateRelease) -> bool:
        """Return whether this is a limit of ``release``."""
        return self.since <= release and (self.until is None or release < self.until)


def _has_fp8_cache(asked: Configuration) -> bool:
    return asked.kv_cache_dtype in FP8_OPTIONS


def _has_wide_heads(asked: Configuration) -> bool:
    return any(headdim > LARGEST_FP8_HEAD_DIM for headdim, _ in asked.head_dims)


EFFECTS = {
    "refused at start": "the server does not start; the error names the option and the choices",
    "refused": "the call raises, with the argument's name",
    "adapted": "the call is made in another way, with the same result",
    "no plan": "calls are made without scheduler metadata",
    "slower": "it works, on a slower path; one warning says so",
}

KERNEL_LIMITS = (
    KernelLimit(
        "new_keys", "new keys appended by the kernel (`k`, `v`)", "refused",
        "takes them and drops them", until=(0, 2, 0),
        arguments=("k", "v"), function="flash_attn_with_kvcache",
    ),
    KernelLimit(
        "cache_batch_idx", "`cache_batch_idx`", "refused", "asserts that it is None",
        until=(0, 2, 0), arguments=("cache_batch_idx",),
    ),
    KernelLimit(
        "cache_leftpad", "`cache_leftpad`", "refused", "asserts that it is None",
        until=(0, 2, 1), arguments=("cache_leftpad",),
    ),
    KernelLimit(
        "rotary", "`rotary_cos`, `rotary_sin`", "refused", "asserts that they are None",
        until=(0, 2, 1), arguments=("rotary_cos", "rotary_sin"),
    ),
    KernelLimit(
        "attention_chunk", "`attention_chunk` (Llama 4)", "refused", "asserts that it is 0",
        until=(0, 2, 2), arguments=("attention_chunk",),
    ),
    KernelLimit(
        "raw_softcap", "softcap over raw keys, head dimensions up to 128 and 192/128", "refused",
        "gives the call to a kernel that knows no softcap", until=(0, 2, 1),
    ),
    KernelLimit(
        "old_window", "`window_size` beside `causal`", "adapted",
        "forgets the window of a causal call, and reads windows with two sides or none; those with "
        "one side are refused", until=(0, 2, 0),
    ),
    KernelLimit(
        "causal_window", "`window_size=(-1, 0)` over raw keys", "adapted",
        "asserts that there is no window, though it takes this one for none: the call is made with "
        "`causal`, which means the same", since=(0, 2, 0),
    ),
    KernelLimit(
        "uncapped_windows", "splits of sliding windows", "adapted",
        "counts keys beyond the window when it splits: whether a call is split at all is predicted "
        "alike", until=(0, 2, 1),
    ),
    KernelLimit(
        "padded_plans", "plans of batches that are no multiple of 4", "adapted",
        "pads them and leaves the padding unwritten: `SGLANG_MUSA_EXT_CHECK` compares the rest",
        since=(0, 2, 4),
    ),
    KernelLimit(
        "one_request", "one request over raw keys, with padded rows", "adapted",
        "takes the lengths of the tensors for those of the request: the call passes `seqused_k`, "
        "which MATE gives to kernels that read lengths",
    ),
    KernelLimit(
        "batch_size", "batches above 992 requests", "refused at start",
        "cannot compile a plan for them", until=(0, 2, 0),
    ),
    KernelLimit(
        "head_dims_192", "head dimensions 192/192", "refused at start", "has no kernel for them",
        until=(0, 2, 0),
    ),
    KernelLimit(
        "head_dims", "head dimensions beside 64/64, 128/128, 192/128, 192/192, 256/256, 384/384, "
        "512/512 (each rounded up)", "refused at start", "has no kernel for them",
    ),
    KernelLimit(
        "fp8_e4m3", "`--kv-cache-dtype fp8_e4m3`", "refused at start",
        "has no kernel that reads fp8",
        until=(0, 2, 3), stops=lambda asked: asked.kv_cache_dtype == "fp8_e4m3",
    ),
    KernelLimit(
        "fp8_e5m2", "`--kv-cache-dtype fp8_e5m2`", "refused at start",
        "has no kernel that reads it",
        until=(0, 2, 5), stops=lambda asked: asked.kv_cache_dtype == "fp8_e5m2",
    ),
    KernelLimit(
        "fp8_head_dims", "fp8 KV cache with head dimensions above 256", "refused at start",
        "needs queries in fp8 too, and SGLang casts none of head dimensions above 256",
        stops=lambda asked: _has_fp8_cache(asked) and _has_wide_heads(asked),
    ),
    KernelLimit(
        "fp8_dtype", "fp8 KV cache of a model in float16", "refused at start",
        "gives the output in bfloat16, which the next layer of a float16 model does not take",
        stops=lambda asked: _has_fp8_cache(asked) and asked.dtype in ("float16", "fp16", "half"),
    ),
    KernelLimit(
        "fp8_mla", "fp8 KV cache in MLA", "refused at start",
        "has no MLA kernel that reads fp8 in any source that could be read",
        stops=lambda asked: _has_fp8_cache(asked) and asked.use_mla,
    ),
    KernelLimit(
        "cache_dtype", "`--kv-cache-dtype` beside `auto`, `bf16`, `fp8_e4m3`, `fp8_e5m2`",
        "refused at start", "has no kernel that reads it",
        stops=lambda asked: asked.kv_cache_dtype not in (*HALF_OPTIONS, *FP8_OPTIONS),
    ),
    KernelLimit(
        "mla_page_size", "MLA with pages other than 64", "refused at start",
        "has MLA kernels for pages of 64 alone",
    ),
    KernelLimit(
        "page_size", "pages other than 64", "slower", "loads such pages without its copy engine",
    ),
    KernelLimit(
        "sinks_dtype", "attention sinks in another type than bfloat16", "refused",
        "reads bfloat16 alone",
    ),
    KernelLimit(
        "sinks_plan", "scheduler metadata with attention sinks (GPT-OSS)", "no plan",
        "ignores it, so that computing it would be in vain",
    ),
    KernelLimit(
        "mla_options", "window, softcap, chunks and sinks in MLA", "refused",
        "leaves them out without a word",
    ),
    KernelLimit(
        "strided_rows", "a KV cache whose head dimension is strided", "refused",
        "would need a copy of the whole cache",
    ),
)  # fmt: skip
"""Every known limit of MATE, each a row: adapter, checks at start and docs read them from here."""

MATE_HEAD_DIMS = (64, 128, 192, 256, 384, 512)
"""Head dimensions that MATE rounds up to."""
_HEAD_DIM_PAIRS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (384, 384), (512, 512))
LARGEST_OLD_BATCH = 992
"""Requests that MATE can plan for where the limit ``batch_size`` holds."""
LARGEST_FP8_HEAD_DIM = 256
"""The largest head dimension whose queries SGLang casts to the type of an fp8 KV cache."""


def kernel_limits(release: MateRelease) -> dict[str, KernelLimit]:
    """Return the limits of a release of MATE, by name."""
    return {limit.name: limit for limit in KERNEL_LIMITS if limit.holds(release)}


def mate_dtypes(release: MateRelease) -> tuple[str, ...]:
    """Return the names of the types that a release of MATE reads a KV cache in."""
    limits = kernel_limits(release)
    fp8 = dict(zip(FP8_OPTIONS, ("float8_e4m3fn", "float8_e5m2"), strict=True))
    return (*HALF_DTYPES, *(dtype for name, dtype in fp8.items() if name not in limits))


def mate_head_dim_pairs(release: MateRelease) -> tuple[tuple[int, int], ...]:
    """Return the pairs of key and value head dimensions that a release has kernels for."""
    absent = {(192, 192)} if "head_dims_192" in kernel_limits(release) else set()
    return tuple(pair for pair in _HEAD_DIM_PAIRS if pair not in absent)


def mate_serves_head_dims(release: MateRelease, headdim: int, headdim_v: int) -> bool:
    """Return whether a release has a kernel for these head dimensions of keys and of values."""
    if max(headdim, headdim_v) > MATE_HEAD_DIMS[-1]:
        return False
    return rounded_head_dims(headdim, headdim_v) in mate_head_dim_pairs(release)


def rounded_head_dims(headdim: int, headdim_v: int) -> tuple[int, int]:
    """Return the pair of head dimensions whose kernel MATE takes for these, up to 512 each."""
    return _rounded_head_dim(headdim), _rounded_head_dim(headdim_v)


def mate_plan_vector(release: MateRelease, batch_size: int) -> int:
    """Return the length of each of the four vectors that a plan consists of.

    From 0.2.4 on it is the batch size rounded up to 4; the padding is never written.
    """
    return -(-batch_size // 4) * 4 if "padded_plans" in kernel_limits(release) else batch_size


def mate_largest_batch(release: MateRelease) -> int | None:
    """Return the most requests that a release can plan for; ``None``: there is no such limit."""
    return LARGEST_OLD_BATCH if "batch_size" in kernel_limits(release) else None


def _rounded_head_dim(size: int) -> int:
    return next(rounded for rounded in MATE_HEAD_DIMS if size <= rounded)
