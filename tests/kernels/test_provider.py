from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels import provider as kernels
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
    hopper_kernels,
    mate_kernels,
    reference_kernels,
    select_kernels,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

# The parameters of the wrapper's functions, release by release, as read in its sources; those of
# 0.2.1 and 0.2.2 are the same. "later" is a state of the sources after 0.2.2 that no public release
# is known to be.
WITH_KVCACHE = (
    "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None "
    "cache_leftpad=None page_table=None cu_seqlens_q=None cu_seqlens_k_new=None max_seqlen_q=None "
    "rotary_seqlens=None "
    "q_descale=None k_descale=None v_descale=None softmax_scale=None causal=False "
    "window_size=(-1,-1) "
    "attention_chunk=0 softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=0 "
    "pack_gqa=None "
    "sm_margin=0 return_softmax_lse=False sinks=None s_aux=None cp_world_size=1 cp_rank=0 "
    "cp_tot_seqused_k=None"
)
VARLEN_HEAD = (
    "q k v cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
    "seqused_q=None seqused_k=None"
)
VARLEN_TAIL = (
    "q_descale=None k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 "
    "softcap=0.0 "
    "scheduler_metadata=None num_splits=0 pack_gqa=None deterministic=False sm_margin=0 "
    "return_attn_probs=False "
    "return_softmax_lse=False sinks=None s_aux=None cp_world_size=1 cp_rank=0 cp_tot_seqused_k=None"
)
PAGED = f"{VARLEN_HEAD} page_table=None block_table=None softmax_scale=None causal=False qv=None"
METADATA = (
    "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens "
    "qkv_dtype=None headdim_v=None "
    "cu_seqlens_q=None cu_seqlens_k_new=None cache_leftpad=None page_size=None max_seqlen_k_new=0 "
    "causal=False "
    "window_size=(-1,-1) attention_chunk=0 has_softcap=False num_splits=0 pack_gqa=None sm_margin=0"
)
SIGNATURES = {
    "0.1.3": {
        "flash_attn_with_kvcache": WITH_KVCACHE,
        "flash_attn_varlen_func": f"{VARLEN_HEAD} softmax_scale=None causal=False qv=None {VARLEN_TAIL}",
        "get_scheduler_metadata": METADATA,
    },
    "0.2.0": {
        "flash_attn_with_kvcache": WITH_KVCACHE,
        "flash_attn_varlen_func": f"{PAGED} q_v=None {VARLEN_TAIL} out=None",
        "get_scheduler_metadata": METADATA,
    },
    "0.2.2": {
        "flash_attn_with_kvcache": WITH_KVCACHE,
        "flash_attn_varlen_func": f"{PAGED} {VARLEN_TAIL} out=None",
        "get_scheduler_metadata": METADATA,
    },
    "later": {
        "flash_attn_with_kvcache": f"{WITH_KVCACHE} only_qv=False",
        "flash_attn_varlen_func": f"{PAGED} {VARLEN_TAIL} out=None",
        "get_scheduler_metadata": f"{METADATA} has_qv=False",
    },
}
SIGNATURES["0.2.1"] = SIGNATURES["0.2.2"]
RELEASES = {
    "0.1.3": "0.1.3",
    "0.2.0": "0.2.0",
    "0.2.1": "0.2.1",
    "0.2.2": "0.2.2",
    "later": "0.2.7",
}
"""The states of the sources, and the version that an installation of each has in these tests."""


def module_of(signatures: dict[str, str]) -> str:
    """A module with functions of these parameters; each returns what it was called with."""
    functions = (
        f"def {name}({parameters.replace(' ', ', ')}): return SimpleNamespace(**locals())\n"
        for name, parameters in signatures.items()
    )
    return "from types import SimpleNamespace\n" + "".join(functions)


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
        "cache_seqlens=None "
        "cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
        "cu_seqlens_k_new=None "
        "max_seqlen_q=None rotary_seqlens=None q_descale=None k_descale=None v_descale=None "
        "softmax_scale=None "
        "causal=False window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True "
        "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False"
    ),
    "flash_attn_varlen_func": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None "
        "softmax_scale=None "
        "causal=False qv=None q_descale=None k_descale=None v_descale=None window_size=(-1,-1) "
        "attention_chunk=0 "
        "softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 "
        "return_attn_probs=False"
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
    """What this package reads of a device; a torch without torch_musa does not know the name
    ``musa``.
    """

    type: str = "musa"
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


MUSA: Any = MusaDevice()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched first for modules; the libraries in question are found nowhere
    else.

    The GPU, if one is asked, is an H100.
    """
    set_gpu(monkeypatch)
    before = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES
    }
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]:
        del sys.modules[name]
    sys.modules.update(before)


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
    write(
        root,
        {
            f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        },
    )


def write_mate(root: Path, wrapper: str = WRAPPER) -> None:
    """A stand-in of Moore Threads' MATE and of its wrapper."""
    write(root, {"mate/__init__.py": "", "mate/mha_interface.py": "", "mate/jit/__init__.py": ""})
    write(root, {"flash_attn_interface.py": "import mate\n" + wrapper})


def adapted(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """``function`` as the provider's user calls it."""
    return kernels._adapt(function, **how)


def refusal(settings: Settings, device: Any) -> str:
    """The message with which ``select_kernels`` refuses."""
    with pytest.raises(KernelsUnavailable) as caught:
        select_kernels(settings, device)
    return str(caught.value)


# The choice --------------------------------------------------------------------------------------


def test_auto_on_a_cpu_is_the_reference() -> None:
    """A CPU gets the PyTorch kernels."""
    assert select_kernels(Settings(), CPU).name == "reference"


@pytest.mark.parametrize("name", ["auto", "mate"])
def test_a_musa_device_gets_mate(packages: Path, name: str) -> None:
    """MATE's wrapper is selected on a MUSA device, by default and by name."""
    write_mate(packages)
    assert select_kernels(Settings(kernels=name), MUSA).name == "mate"


@pytest.mark.parametrize("device", [CPU, CUDA, MUSA], ids=str)
def test_the_reference_serves_every_device(device: Any) -> None:
    """The reference kernels can be asked for by name anywhere."""
    assert select_kernels(Settings(kernels="reference"), device).name == "reference"


def test_auto_on_another_device_names_its_choices() -> None:
    """An NVIDIA GPU gets nothing unasked, and the error says what to set instead."""
    message = refusal(Settings(), CUDA)
    for part in (
        "SGLANG_MUSA_EXT_KERNELS=auto",
        "cuda:0",
        "mate on musa",
        "reference on cpu",
        "SGLANG_MUSA_EXT_KERNELS=hopper",
        "SGLANG_MUSA_EXT=off",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "device"), [("mate", CPU), ("mate", CUDA), ("hopper", CPU), ("hopper", MUSA)]
)
def test_kernels_for_another_device_are_refused(name: str, device: Any) -> None:
    """Asking by name for kernels of another device names both."""
    message = refusal(Settings(kernels=name), device)
    assert repr(name) in message
    assert str(device) in message


def test_every_refusal_is_an_import_error() -> None:
    """Whoever treats a missing library as an ImportError treats this as one."""
    assert issubclass(KernelsUnavailable, ImportError)
    assert issubclass(UnsupportedByKernels, ValueError)
    assert issubclass(UnsupportedKernelArgument, TypeError)


NO_FA3 = "raise ImportError('built without FA3')"
"""What SGLang's kernel package does where it was built without FA3."""


def test_hopper_with_its_library_is_selected(packages: Path) -> None:
    """SGLang's own FA3 is selected by name on an NVIDIA GPU."""
    write_sgl_kernel(packages)
    chosen = select_kernels(Settings(kernels="hopper"), CUDA)
    assert chosen.name == "hopper"
    assert chosen.metadata_uses_softcap
    assert chosen.mla_plan_bytes is None


def test_hopper_takes_sglangs_library_where_it_has_both(
    packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang's comes first, is named with its version, and there is nothing to warn of."""
    write_sgl_kernel(packages)
    write_flash_attention(packages)
    write_distribution(packages, "sglang_kernel", "0.4.5")
    write_distribution(packages, "flash_attn_3", "3.0.0")
    kernels = hopper_kernels(CUDA)
    assert dict(kernels.versions) == {"library": "sgl_kernel.flash_attn", "sglang-kernel": "0.4.5"}
    assert vars(kernels.get_scheduler_metadata(**PLAN))["num_heads"] == PLAN["num_heads_q"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (NO_FA3, "built without FA3"),
        (module_of({name: DAO[name] for name in list(DAO)[:2]}), "lacks get_scheduler_metadata"),
    ],
    ids=["no FA3", "no metadata"],
)
def test_hopper_takes_flash_attention_where_sglangs_has_no_fa3(
    packages: Path, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    """FlashAttention-3's own library serves, the record says so, and the log says why."""
    write_sgl_kernel(packages, text)
    write_flash_attention(packages)
    write_distribution(packages, "sglang_kernel", "0.4.5")
    write_distribution(packages, "flash_attn_3", "3.0.0")
    kernels = hopper_kernels(CUDA)
    assert dict(kernels.versions) == {"library": "flash_attn_interface", "flash_attn_3": "3.0.0"}
    assert vars(kernels.get_scheduler_metadata(**PLAN)).items() >= PLAN.items()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("'flash_attn_interface'", "'sgl_kernel.flash_attn'", why):
        assert part in record.getMessage()


def test_hopper_without_a_library_lists_both_with_their_reasons(packages: Path) -> None:
    """One error has why each library was rejected, and what to do about it."""
    write_sgl_kernel(packages, NO_FA3)
    lines = refusal(Settings(kernels="hopper"), CUDA).splitlines()
    assert len(lines) == 3
    for part in ("'sgl_kernel.flash_attn'", "built without FA3", "Install SGLang's kernel package"):
        assert part in lines[1]
    for part in ("'flash_attn_interface'", "ModuleNotFoundError", "Install FlashAttention-3"):
        assert part in lines[2]


def test_mates_wrapper_is_no_library_of_nvidias(packages: Path) -> None:
    """MATE's wrapper has the name of FlashAttention-3's module: on an NVIDIA GPU it is refused, and
    not imported.
    """
    write_mate(packages)
    message = refusal(Settings(kernels="hopper"), CUDA)
    for part in (
        "'flash_attn_interface' is Moore Threads' wrapper of MATE",
        "Uninstall",
        "flash_attn_3",
    ):
        assert part in message
    assert "flash_attn_interface" not in sys.modules


def test_flash_attention_that_cannot_be_asked_for_lse_is_refused(packages: Path) -> None:
    """Up to v2.8.3 one release returns two results and the next one, and no argument says which is
    wanted.
    """
    varlen = DAO["flash_attn_varlen_func"].removesuffix(" return_attn_probs=False")
    write_flash_attention(packages, DAO | {"flash_attn_varlen_func": varlen})
    message = refusal(Settings(kernels="hopper"), CUDA)
    for part in (
        str(packages / "flash_attn_interface.py"),
        "too old",
        "30 August 2025",
        "Install FlashAttention-3",
    ):
        assert part in message


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (8, 6), (8, 9)], ids=str)
def test_hopper_serves_the_gpus_of_fa3(
    packages: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """FA3 has kernels for Hopper, and for compute capability 8."""
    write_sgl_kernel(packages)
    set_gpu(monkeypatch, capability)
    assert hopper_kernels(CUDA).name == "hopper"


@pytest.mark.parametrize(
    ("capability", "hip"),
    [((7, 5), None), ((10, 0), None), ((12, 0), None), ((9, 4), "6.4")],
    ids=str,
)
def test_hopper_refuses_other_gpus(
    packages: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None
) -> None:
    """Older, newer and other vendors' GPUs are refused with what was seen, what is expected and
    what to do.
    """
    write_sgl_kernel(packages)
    set_gpu(monkeypatch, capability, hip)
    message = refusal(Settings(kernels="hopper"), CUDA)
    seen = f"cuda:0 is 'a stand-in of a GPU', capability {capability[0]}.{capability[1]}"
    for part in (
        seen,
        "NVIDIA GPUs of compute capability 9.0 (Hopper) or 8.x",
        "SGLANG_MUSA_EXT=off",
    ):
        assert part in message


# MATE, and what is not MATE ----------------------------------------------------------------------


def test_mate_comes_with_its_versions(packages: Path) -> None:
    """The distributions behind the kernels are reported; those that are absent are not."""
    write_mate(packages)
    write_distribution(packages, "mate", "0.2.2")
    write_distribution(packages, "flash_attn_3", "0.2.2+musa")
    assert dict(mate_kernels(MUSA).versions) == {"mate": "0.2.2", "flash_attn_3": "0.2.2+musa"}


def test_a_missing_mate_is_refused(packages: Path) -> None:
    """Without MATE, the error says so and where it comes from."""
    message = refusal(Settings(), MUSA)
    for part in (
        "MATE is not installed",
        "'mate'",
        "flash_attn_3",
        "Moore Threads",
        "SGLANG_MUSA_EXT=off",
    ):
        assert part in message


def test_a_foreign_mate_is_refused(packages: Path) -> None:
    """The unrelated project of the same name is named with distribution, version, location and
    remedy.
    """
    write(packages, {"mate/__init__.py": "class Mate: ...\n", "mate/matchers.py": ""})
    write(packages, {"flash_attn_interface.py": WRAPPER})
    write_distribution(packages, "mate", "0.2.0")
    message = refusal(Settings(), MUSA)
    for part in (
        "'mate', version '0.2.0'",
        str(packages / "mate" / "__init__.py"),
        "mate.mha_interface",
        "Uninstall",
        "public",
    ):
        assert part in message


@pytest.mark.parametrize(
    "files",
    [
        {"mate.py": ""},
        {"mate/__init__.py": "print 'Python 2'\n"},
        {"mate/__init__.py": "import no_such_module\n"},
    ],
    ids=["module", "syntax", "import"],
)
def test_a_foreign_mate_that_cannot_be_imported_is_refused(
    packages: Path, files: dict[str, str]
) -> None:
    """Whatever else is called ``mate`` is refused by name, not with the error that importing it
    raises.
    """
    write(packages, files)
    assert "Moore Threads" in refusal(Settings(), MUSA)


def test_a_wrapper_that_is_missing_is_refused(packages: Path) -> None:
    """MATE without its wrapper is named as that."""
    write_mate(packages)
    (packages / "flash_attn_interface.py").unlink()
    message = refusal(Settings(), MUSA)
    assert "'flash_attn_interface'" in message
    assert "not installed" in message
    assert "flash_attn_3" in message


def test_a_wrapper_that_cannot_be_imported_is_refused_with_the_reason(packages: Path) -> None:
    """An error inside the wrapper is part of the message and its cause."""
    write_mate(packages, "import no_such_library_of_the_vendor")
    with pytest.raises(KernelsUnavailable, match="no_such_library_of_the_vendor") as caught:
        mate_kernels(MUSA)
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(
    "absent", ["flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata"]
)
def test_a_wrapper_without_a_function_is_refused(packages: Path, absent: str) -> None:
    """A module of the wrapper's name that lacks a function is named with its file and what it
    lacks.
    """
    write_mate(packages, WRAPPER + f"\ndel {absent}\n")
    message = refusal(Settings(), MUSA)
    assert f"lacks {absent}" in message
    assert str(packages / "flash_attn_interface.py") in message


def test_a_wrapper_lists_everything_it_lacks(packages: Path) -> None:
    """A check reports all mismatches at once; a name that is no function counts as lacking."""
    write_mate(packages, "flash_attn_varlen_func = 1\ndef get_scheduler_metadata(): ...\n")
    assert "lacks flash_attn_with_kvcache, flash_attn_varlen_func," in refusal(Settings(), MUSA)


def test_mate_sizes_an_mla_plan_by_its_layout(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan has at most one 32-byte record a multiprocessor, and batch+1 split offsets of 4 bytes."""
    write_mate(packages)
    properties = SimpleNamespace(multi_processor_count=60)
    module = SimpleNamespace(get_device_properties=lambda device: {MUSA: properties}[device])
    monkeypatch.setattr(torch, "get_device_module", lambda device: {MUSA: module}[device])
    plan_bytes = mate_kernels(MUSA).mla_plan_bytes
    assert plan_bytes is not None
    assert plan_bytes(7, 1, 16, MUSA) >= 32 * 60 + 4 * 8


def test_mate_is_called_with_its_own_names(packages: Path) -> None:
    """Scheduler metadata is asked of MATE under FA3's names."""
    write_mate(packages)
    assert vars(mate_kernels(MUSA).get_scheduler_metadata(**PLAN)).items() >= PLAN.items()


def test_hopper_is_called_with_its_own_names(packages: Path) -> None:
    """SGLang's library gets its own names for the heads and the padding on the left, and FA3's for
    the rest.
    """
    write_sgl_kernel(packages)
    plan = PLAN | {"cache_leftpad": object()}
    given = vars(hopper_kernels(CUDA).get_scheduler_metadata(**plan))
    names = {
        "num_heads_q": "num_heads",
        "num_heads_kv": "num_heads_k",
        "cache_leftpad": "leftpad_k",
    }
    assert given.items() >= {names.get(name, name): value for name, value in plan.items()}.items()


def test_sglangs_build_plans_no_unequal_queries(packages: Path) -> None:
    """Its forward bounds splits by the average query where its plan goes by the longest; the others
    go by one rule.
    """
    write_flash_attention(packages)
    assert hopper_kernels(CUDA).plans_unequal_queries
    write_sgl_kernel(packages)
    assert not hopper_kernels(CUDA).plans_unequal_queries
    write_mate(packages)
    assert mate_kernels(MUSA).plans_unequal_queries
    assert reference_kernels().plans_unequal_queries


@pytest.fixture
def flash_attention(packages: Path) -> FA3Kernels:
    """The provider on FlashAttention-3's own library."""
    write_flash_attention(packages)
    return hopper_kernels(CUDA)


LENGTHS = {"cu_seqlens_q": 1, "cu_seqlens_k": 2, "max_seqlen_q": 3, "max_seqlen_k": 4}
"""What FlashAttention's varlen function has no defaults for."""


def test_flash_attention_is_asked_for_lse_by_its_name(flash_attention: FA3Kernels) -> None:
    """Its varlen function calls it otherwise than its function over a cache."""
    assert vars(flash_attention.flash_attn_varlen_func(**raw(return_softmax_lse=True, **LENGTHS)))[
        "return_attn_probs"
    ]
    given = vars(flash_attention.flash_attn_with_kvcache(**paged(return_softmax_lse=True)))
    assert given["return_softmax_lse"] is True


def test_flash_attention_refuses_sinks_by_name(flash_attention: FA3Kernels) -> None:
    """It has no attention sinks, which SGLang's build has; a model without them is served."""
    assert flash_attention.flash_attn_with_kvcache(**paged(sinks=None, only_qv=False, ver=3))
    with pytest.raises(
        UnsupportedKernelArgument, match=r"flash_attn_interface\.flash_attn_with_kvcache .*'sinks'"
    ):
        flash_attention.flash_attn_with_kvcache(**paged(sinks=half(8)))


def test_out_is_written_for_flash_attention(packages: Path) -> None:
    """It returns its output alone, which lands where upstream wants it."""
    body = module_of(DAO).replace("return SimpleNamespace(**locals())", "return q * 2")
    write(packages, {"flash_attn_interface.py": body})
    call = raw(**LENGTHS)
    out = torch.empty_like(call["q"])
    assert hopper_kernels(CUDA).flash_attn_varlen_func(**call, out=out) is out
    torch.testing.assert_close(out, call["q"] * 2)


# The adapter -------------------------------------------------------------------------------------


def echo(
    q: Any, k_cache: Any = None, page_table: Any = None, window_size: Any = (-1, -1)
) -> dict[str, Any]:
    """A kernel that returns its arguments."""
    return dict(locals())


def test_the_adapter_passes_known_arguments_unchanged() -> None:
    """What the kernels know is handed on as it is."""
    q, window = object(), (7, 0)
    given = adapted(echo)(q=q, window_size=window)
    assert given["q"] is q
    assert given["window_size"] is window


@pytest.mark.parametrize("version", [{}, {"ver": 3}])
def test_version_3_is_dropped(version: dict[str, int]) -> None:
    """``ver=3`` says what these kernels are, and reaches none of them."""
    assert adapted(lambda q: q)(q=1, **version) == 1


def test_version_3_is_dropped_where_the_kernel_has_it() -> None:
    """A library with several versions keeps its own default."""
    assert adapted(lambda q, ver=3: ver)(q=1, ver=3) == 3


@pytest.mark.parametrize("version", [4, 2, None])
def test_another_version_is_refused(version: int | None) -> None:
    """``ver=4`` asks for other kernels than these."""
    with pytest.raises(UnsupportedKernelArgument, match="FlashAttention-3"):
        adapted(echo)(q=1, ver=version)


@pytest.mark.parametrize("value", [None, False])
@pytest.mark.parametrize("name", ["score_mod", "mask_mod", "rel_bias", "only_qv", "max_seqlen_k"])
def test_an_unknown_argument_that_asks_for_nothing_is_dropped(name: str, value: object) -> None:
    """Upstream passes names that MATE does not have, with the value for "not used"."""
    assert "q" in adapted(echo)(q=1, **{name: value})


@pytest.mark.parametrize(
    "value",
    [pytest.param(object(), id="object"), True, 0, 1, torch.zeros(2), torch.tensor(False), [], ""],
    ids=repr,
)
@pytest.mark.parametrize(
    "name",
    [
        "aux_tensors", "mask_mod", "max_seqlen_k", "only_qv", "rel_bias", "rel_bias_prep_cache",
        "score_mod", "sfk", "sfq", "sfv",
    ],
)  # fmt: skip
def test_an_unknown_argument_with_a_value_is_refused_by_name(name: str, value: object) -> None:
    """A feature that the kernels do not have is an error and never a wrong number."""
    with pytest.raises(
        UnsupportedKernelArgument, match=rf"echo has no argument '{name}'.*--attention-backend"
    ):
        adapted(echo)(q=1, **{name: value})


def test_an_unknown_argument_is_refused_before_the_kernel_runs() -> None:
    """A refused call has computed nothing and written nowhere."""
    calls = []
    with pytest.raises(UnsupportedKernelArgument):
        adapted(lambda q: calls.append(q))(q=1, score_mod=abs)
    assert not calls


def test_out_is_handed_to_a_kernel_that_has_it() -> None:
    """Where the kernel writes its output itself, the adapter stays out of it."""
    out = torch.empty(2)
    assert adapted(lambda q, out=None: out)(q=1, out=out) is out


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 12)])
def test_out_is_written_for_a_kernel_that_lacks_it(shape: tuple[int, ...]) -> None:
    """The result lands in ``out``, in whatever shape the caller gave it, and ``out`` is returned."""
    result = torch.arange(24.0).view(2, 3, 4)
    out = torch.full(shape, torch.nan)
    returned = adapted(lambda q: result)(q=1, out=out)
    assert returned is out
    torch.testing.assert_close(out, result.reshape(shape), rtol=0, atol=0)


def test_out_is_written_when_the_kernel_returns_more() -> None:
    """With ``return_softmax_lse`` the output is the first of several, and the others pass through."""
    result, lse, extra = torch.arange(6.0), torch.zeros(1), object()
    out = torch.full((6,), torch.nan)
    returned = adapted(lambda q: (result, lse, extra))(q=1, out=out)
    assert isinstance(returned, tuple)
    assert returned[0] is out
    assert returned[1] is lse
    assert returned[2] is extra
    torch.testing.assert_close(out, result, rtol=0, atol=0)


def test_out_is_written_where_it_is_strided() -> None:
    """An ``out`` that is a slice of a larger tensor is filled there, and nothing beside it."""
    buffer = torch.full((4, 4), torch.nan)
    adapted(lambda q: torch.ones(4, 2))(q=1, out=buffer[:, :2])
    assert bool((buffer[:, :2] == 1).all())
    assert bool(buffer[:, 2:].isnan().all())


def test_a_call_that_needs_no_adapter_goes_to_the_library() -> None:
    """A library that has every name of a call gets it directly; with one more name, the adapter
    comes between.
    """

    def library(q: Any, window_size: Any = (-1, -1), ver: int = 3, out: Any = None) -> Any:
        return q

    record = dataclasses.replace(
        kernels.reference_kernels(), flash_attn_with_kvcache=adapted(library), unadapted=library
    )
    for _ in range(2):
        assert record.attention(("q", "ver", "out")) is library
        assert record.attention(("q", "ver", "score_mod")) is record.flash_attn_with_kvcache
    other = dataclasses.replace(record, unadapted=None)
    assert other.attention(("q", "ver", "out")) is other.flash_attn_with_kvcache


def test_no_out_returns_what_the_kernel_returns() -> None:
    """Without ``out`` the kernel's own result comes back, not a copy."""
    result = torch.ones(2)
    function = adapted(lambda q: result)
    assert function(q=1) is result
    assert function(q=1, out=None) is result


def test_a_strided_page_table_is_made_contiguous() -> None:
    """MATE reads the table as if it were dense: it gets the same pages, densely."""
    table = torch.arange(32, dtype=torch.int32).view(4, 8)[:, :3]
    assert not table.is_contiguous()
    given = adapted(echo, dense_page_table=True)(q=1, page_table=table)["page_table"]
    assert given.is_contiguous()
    torch.testing.assert_close(given, table, rtol=0, atol=0)
    # NVIDIA's kernels take rows with gaps, and a copy would cost them time.
    assert adapted(echo)(q=1, page_table=table)["page_table"] is table


def test_a_dense_page_table_is_not_copied() -> None:
    """What is dense already is handed on as the object it is."""
    table = torch.zeros(4, 8, dtype=torch.int32)
    assert adapted(echo, dense_page_table=True)(q=1, page_table=table)["page_table"] is table


def test_the_kv_cache_is_never_copied() -> None:
    """A cache that is a strided view goes to the kernel untouched: a copy would be as large as the
    pool.
    """
    pool = torch.zeros(4, 2, 64, 2, 16)
    cache = pool[:, 0]
    table = torch.zeros(4, 8, dtype=torch.int32)[:, :2]
    assert not cache.is_contiguous()
    given = adapted(echo, dense_page_table=True)(q=1, k_cache=cache, page_table=table)["k_cache"]
    assert given is cache
    assert given.data_ptr() == pool.data_ptr()


def test_the_caller_keeps_its_arguments() -> None:
    """The adapter drops and replaces in its own copy of the keywords."""
    arguments = {
        "q": 1,
        "ver": 3,
        "score_mod": None,
        "page_table": torch.zeros(4, 8, dtype=torch.int32)[:, :2],
    }
    before = dict(arguments)
    adapted(echo)(**arguments)
    assert arguments.keys() == before.keys()
    assert all(arguments[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("sinks", "s_aux"), ("s_aux", "sinks"), ("sinks", "learnable_sink"), ("page_table", "block_table"),
        ("cache_seqlens", "seqused_k"), ("num_heads_q", "num_heads"), ("num_heads_kv", "num_heads_k"),
        ("sm_margin", "mp_margin"), ("return_softmax_lse", "return_attn_probs"),
    ],
)  # fmt: skip
def test_an_argument_goes_under_the_name_that_the_kernel_has(given: str, own: str) -> None:
    """Interfaces of FA3 differ in names; the signature says which one is meant."""
    scope: dict[str, Any] = {}
    exec(f"def kernel({own}=None): return {own}", scope)
    value = torch.zeros(1)
    assert adapted(scope["kernel"])(**{given: value}) is value


def test_a_name_that_the_kernel_has_is_not_translated() -> None:
    """A kernel with both names gets each under its own."""
    assert adapted(lambda sinks=None, s_aux=None: (sinks, s_aux))(sinks=1, s_aux=2) == (1, 2)


def test_a_kernel_that_takes_anything_gets_everything_that_matters() -> None:
    """A function that hides its parameters is trusted with all arguments but those that say
    nothing.
    """
    assert adapted(lambda **given: given)(q=1, sinks=2, score_mod=None) == {"q": 1, "sinks": 2}


def test_the_reference_refuses_what_mate_lacks() -> None:
    """The reference has MATE's parameters, so a call that works here does not fail there for a
    keyword.
    """
    with pytest.raises(UnsupportedKernelArgument, match="'score_mod'"):
        reference_kernels().flash_attn_with_kvcache(q=1, score_mod=abs)


# MATE's releases ---------------------------------------------------------------------------------


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


@pytest.fixture(params=list(RELEASES))
def release(request: pytest.FixtureRequest, packages: Path) -> FA3Kernels:
    """The kernels of each release of MATE whose sources are known."""
    return install_mate(packages, request.param)


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


UPSTREAM = {
    "ver": 3, "score_mod": None, "mask_mod": None, "aux_tensors": None, "rel_bias": None, "sfq": None, "only_qv": False,
    "num_splits": 0, "softcap": 0.0, "window_size": (-1, -1), "return_softmax_lse": True, "k_descale": torch.ones(1),
}  # fmt: skip


def test_every_release_takes_what_upstream_passes(release: FA3Kernels) -> None:
    """Whatever the release, upstream's names and no-ops are understood by both functions."""
    given = vars(release.flash_attn_with_kvcache(**paged(**UPSTREAM)))
    assert given["return_softmax_lse"] is True
    assert vars(release.flash_attn_varlen_func(**raw(**UPSTREAM)))["return_softmax_lse"] is True


def test_every_release_plans_with_fa3s_names(release: FA3Kernels) -> None:
    """Scheduler metadata is asked for under FA3's names."""
    assert vars(release.get_scheduler_metadata(**PLAN)).items() >= PLAN.items()


def test_every_release_takes_mla(release: FA3Kernels) -> None:
    """The workspace and whether it holds this plan reach the kernel as they are."""
    workspace = torch.zeros(64, dtype=torch.uint8)
    given = vars(release.flash_attn_with_kvcache(**mla(scheduler_metadata=(workspace, True))))
    assert given["scheduler_metadata"][0] is workspace
    assert given["scheduler_metadata"][1] is True


@pytest.mark.parametrize("name", ["flash_attn_with_kvcache", "flash_attn_varlen_func"])
def test_every_release_writes_where_it_is_told(release: FA3Kernels, name: str) -> None:
    """``out`` is handed to a function that has it, and written for one that has not."""
    out = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
    function = getattr(release, name)
    call = paged() if name == "flash_attn_with_kvcache" else raw()
    if "out" in inspect.signature(function).parameters:
        assert vars(function(**call, out=out))["out"] is out
    else:
        with pytest.raises(
            AttributeError, match="view"
        ):  # What these stand-ins return is no tensor to be copied.
            function(**call, out=out)


@pytest.mark.parametrize(
    "name", ["score_mod", "mask_mod", "rel_bias", "aux_tensors", "sfq", "rel_bias_prep_cache"]
)
def test_every_release_refuses_what_none_has(release: FA3Kernels, name: str) -> None:
    """Features of other kernels are refused by name."""
    with pytest.raises(UnsupportedKernelArgument, match=f"'{name}'"):
        release.flash_attn_with_kvcache(**paged(**{name: object()}))


def test_every_release_refuses_version_4(release: FA3Kernels) -> None:
    """FlashAttention 4 is other kernels."""
    with pytest.raises(UnsupportedKernelArgument, match="ver=4"):
        release.flash_attn_varlen_func(**raw(ver=4))


def test_every_release_refuses_fp8(release: FA3Kernels) -> None:
    """A cache in fp8 is refused with what the call has and how to start the server."""
    cache = half(4, 64, 2, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(
        UnsupportedKernelArgument, match=r"k_cache float8_e4m3fn.*--kv-cache-dtype auto"
    ):
        release.flash_attn_with_kvcache(**paged(k_cache=cache, v_cache=cache))


def test_every_release_refuses_mixed_dtypes(release: FA3Kernels) -> None:
    """Queries of another dtype than the cache's are refused with both dtypes."""
    with pytest.raises(UnsupportedKernelArgument, match=r"q float16, .*k_cache bfloat16"):
        release.flash_attn_with_kvcache(**paged(q=half(2, 8, 128, dtype=torch.float16)))


def test_scales_of_fp8_are_dropped(release: FA3Kernels) -> None:
    """They scale nothing that is not fp8, and no kernel needs to look at them."""
    scales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), torch.full((2, 2), 0.5))
    given = vars(release.flash_attn_with_kvcache(**paged(**scales)))
    assert [given[name] for name in scales] == [None] * 3


@pytest.mark.parametrize("name", ["sinks", "s_aux"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sinks_of_another_dtype_are_refused(
    release: FA3Kernels, name: str, dtype: torch.dtype
) -> None:
    """MATE reads bfloat16, and rounding a model's weights is not for an adapter to do."""
    with pytest.raises(
        UnsupportedKernelArgument, match=f"{str(dtype).removeprefix('torch.')}.*bfloat16"
    ):
        release.flash_attn_with_kvcache(**paged(**{name: half(8, dtype=dtype)}))


def test_sinks_in_bfloat16_are_handed_on(release: FA3Kernels) -> None:
    """The tensor itself reaches the kernel."""
    sinks = half(8)
    assert vars(release.flash_attn_with_kvcache(**paged(sinks=sinks)))["sinks"] is sinks


def test_a_cache_that_would_have_to_be_copied_is_refused(release: FA3Kernels) -> None:
    """A cache whose rows are not dense is refused: no kernel reads it, and a copy is as large as
    the cache.
    """
    cache = half(4, 64, 128, 2).transpose(2, 3)
    with pytest.raises(UnsupportedKernelArgument, match="k_cache has stride 2"):
        release.flash_attn_with_kvcache(**paged(k_cache=cache))


def test_words_for_none_are_left_to_the_kernel(release: FA3Kernels) -> None:
    """What ``None`` asks for is what a kernel does by default; not every release takes the word."""
    words = dict.fromkeys(("window_size", "attention_chunk", "softcap", "num_splits"))
    given = vars(release.flash_attn_with_kvcache(**paged(**words)))
    assert [given[name] for name in words] == [(-1, -1), 0, 0.0, 0]


# MLA on MATE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_size", (127, 0)), ("softcap", 30.0), ("attention_chunk", 64),
        ("sinks", torch.zeros(16, dtype=torch.bfloat16)),
    ],
)  # fmt: skip
def test_mla_refuses_what_its_kernels_ignore(release: FA3Kernels, name: str, value: object) -> None:
    """An argument that would be left out without a word is refused by name."""
    with pytest.raises(UnsupportedKernelArgument, match=name):
        release.flash_attn_with_kvcache(**mla(**{name: value}))


@pytest.mark.parametrize("q", [half(2, 16, 128), None], ids=["128", "none"])
def test_qv_is_for_mla_alone(release: FA3Kernels, q: torch.Tensor | None) -> None:
    """Other head dimensions, or ``qv`` alone, are refused with what the kernels have."""
    with pytest.raises(UnsupportedKernelArgument, match="64 and 512"):
        release.flash_attn_with_kvcache(**mla(q=q))


@pytest.mark.parametrize(
    "metadata", [None, torch.zeros(8, dtype=torch.int32)], ids=["none", "tensor"]
)
def test_mla_refuses_to_run_without_a_workspace(release: FA3Kernels, metadata: object) -> None:
    """Later releases would take another kernel for it, and earlier ones fail inside."""
    with pytest.raises(UnsupportedKernelArgument, match="workspace"):
        release.flash_attn_with_kvcache(**mla(scheduler_metadata=metadata))


def with_lse(packages: Path, shape: tuple[int, ...]) -> FA3Kernels:
    """MATE whose kernel returns an output and a ``softmax_lse`` of this shape, counting up."""
    body = f"return (q, torch.arange(torch.Size({shape}).numel()).view({shape}))"
    text = "import torch\n" + WRAPPER.replace("return SimpleNamespace(**locals())", body, 1)
    write_mate(packages, text)
    return mate_kernels(MUSA)


def test_softmax_lse_of_padded_mla_is_laid_out_as_in_fa3(packages: Path) -> None:
    """MATE's MLA has the heads last, FA3 before the queries."""
    call = mla(q=half(2, 3, 16, 64), qv=half(2, 3, 16, 512), cu_seqlens_q=None)
    _, lse = with_lse(packages, (2, 3, 16)).flash_attn_with_kvcache(**call)
    assert lse.shape == (2, 16, 3)
    assert lse[1, 5, 2] == (1 * 3 + 2) * 16 + 5


def test_softmax_lse_of_packed_mla_is_fa3s_already(packages: Path) -> None:
    """With packed queries MATE's MLA has FA3's layout."""
    _, lse = with_lse(packages, (16, 2)).flash_attn_with_kvcache(**mla())
    torch.testing.assert_close(lse, torch.arange(32).view(16, 2))


def test_softmax_lse_of_other_attention_is_untouched(packages: Path) -> None:
    """Only MLA differs from FA3."""
    _, lse = with_lse(packages, (2, 8, 3)).flash_attn_with_kvcache(**paged(q=half(2, 3, 8, 128)))
    assert lse.shape == (2, 8, 3)


# What single releases lack


@pytest.mark.parametrize(
    ("state", "name"),
    [
        *(("0.1.3", name) for name in ("k", "v")),
        *((state, name) for state in ("0.1.3", "0.2.0") for name in
          ("cache_leftpad", "cache_batch_idx", "rotary_cos", "rotary_sin")),
    ],
)  # fmt: skip
def test_what_a_release_lacks_is_refused_by_name(packages: Path, state: str, name: str) -> None:
    """A parameter that is there but not read, or not yet served, is refused with the release that
    has it.
    """
    kernels = install_mate(packages, state)
    with pytest.raises(
        UnsupportedKernelArgument, match=rf"needs {name}, which MATE has from 0\.2\.[01] on"
    ):
        kernels.flash_attn_with_kvcache(**paged(**{name: half(2, 2, 128)}))


@pytest.mark.parametrize("name", ["k", "cache_leftpad", "rotary_cos", "cache_batch_idx"])
def test_what_a_release_has_is_handed_on(packages: Path, name: str) -> None:
    """From 0.2.1 on these reach the kernel."""
    value = half(2, 2, 128)
    assert (
        vars(install_mate(packages, "0.2.1").flash_attn_with_kvcache(**paged(**{name: value})))[
            name
        ]
        is value
    )


def test_raw_keys_are_no_new_keys(packages: Path) -> None:
    """The function over raw keys and values reads them in every release."""
    call = raw()
    assert vars(install_mate(packages, "0.1.3").flash_attn_varlen_func(**call))["k"] is call["k"]


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [
        (True, (127, 0), (False, (127, 0))),
        (True, (127, -1), (False, (127, 0))),
        (True, (127, 5), (False, (127, 0))),
        (False, (127, 9), (False, (127, 9))),
        (True, (-1, 0), (True, (-1, -1))),
        (False, (-1, 0), (True, (-1, -1))),
        (True, (-1, -1), (True, (-1, -1))),
        (False, (-1, -1), (False, (-1, -1))),
    ],
)
def test_mate_0_1_is_told_windows_its_own_way(
    packages: Path, causal: bool, window: tuple[int, int], expected: tuple[bool, tuple[int, int]]
) -> None:
    """It forgets the window of a causal call, so that the window says what causal means."""
    kernels = install_mate(packages, "0.1.3")
    for given in (
        kernels.flash_attn_with_kvcache(**paged(causal=causal, window_size=window)),
        kernels.flash_attn_varlen_func(**raw(causal=causal, window_size=window)),
    ):
        assert (given.causal, given.window_size) == expected


@pytest.mark.parametrize("window", [(127, -1), (-1, 9)])
def test_mate_0_1_refuses_a_window_with_one_side(packages: Path, window: tuple[int, int]) -> None:
    """It would forget such a window, too."""
    with pytest.raises(UnsupportedKernelArgument, match="two sides"):
        install_mate(packages, "0.1.3").flash_attn_with_kvcache(
            **paged(causal=False, window_size=window)
        )


@pytest.mark.parametrize("state", ["0.2.0", "0.2.1", "0.2.2", "later"])
def test_later_releases_get_windows_unchanged(packages: Path, state: str) -> None:
    """From 0.2 on a causal call keeps its window."""
    given = vars(
        install_mate(packages, state).flash_attn_with_kvcache(**paged(window_size=(127, 0)))
    )
    assert (given["causal"], given["window_size"]) == (True, (127, 0))


@pytest.mark.parametrize("state", ["0.1.3", "0.2.0"])
@pytest.mark.parametrize("headdims", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_softcap_that_a_release_forgets_is_refused(
    packages: Path, state: str, headdims: tuple[int, int]
) -> None:
    """Before 0.2.1 plain varlen attention goes to a kernel without softcap."""
    call = raw(
        q=half(2, 8, headdims[0]),
        k=half(2, 2, headdims[0]),
        v=half(2, 2, headdims[1]),
        softcap=30.0,
    )
    with pytest.raises(UnsupportedKernelArgument, match=r"softcap=30\.0"):
        install_mate(packages, state).flash_attn_varlen_func(**call)


@pytest.mark.parametrize(
    ("state", "more"),
    [
        ("0.2.0", {"window_size": (127, 0)}),
        ("0.2.0", {"q": half(2, 8, 256), "k": half(2, 2, 256), "v": half(2, 2, 256)}),
        ("0.2.0", {"seqused_k": torch.ones(1, dtype=torch.int32)}),
        ("0.2.1", {}),
        ("0.2.2", {}),
    ],
    ids=["window", "wide", "seqused", "0.2.1", "0.2.2"],
)
def test_softcap_that_a_release_reads_is_handed_on(
    packages: Path, state: str, more: dict[str, Any]
) -> None:
    """Other kernels of the same release, and later releases, have it."""
    given = vars(install_mate(packages, state).flash_attn_varlen_func(**raw(softcap=30.0, **more)))
    assert given["softcap"] == 30.0


def test_softcap_over_a_cache_is_handed_on(release: FA3Kernels) -> None:
    """Attention over a paged cache has softcap in every release."""
    assert vars(release.flash_attn_with_kvcache(**paged(softcap=30.0)))["softcap"] == 30.0


# What a configuration may ask --------------------------------------------------------------------


def provider(name: str, packages: Path) -> FA3Kernels:
    """The provider ``name`` on stand-in libraries."""
    write_mate(packages)
    write_sgl_kernel(packages)
    device = {"mate": MUSA, "hopper": CUDA, "reference": CPU}[name]
    return select_kernels(Settings(kernels=name), device)


PROVIDERS = ("mate", "hopper", "reference")


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.uint8], ids=str
)
def test_a_kv_cache_dtype_that_cannot_be_read_is_refused(
    packages: Path, name: str, dtype: torch.dtype
) -> None:
    """The error names the option, the dtype, the kernels and what they read."""
    with pytest.raises(UnsupportedByKernels) as caught:
        provider(name, packages).require(page_size=64, kv_cache_dtype=dtype, use_mla=False)
    for part in (
        "--kv-cache-dtype",
        str(dtype).removeprefix("torch."),
        repr(name),
        "bfloat16, float16",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["mate", "hopper"])
def test_float32_is_refused_where_kernels_cannot_read_it(packages: Path, name: str) -> None:
    """GPU kernels read half precision alone."""
    with pytest.raises(UnsupportedByKernels, match="float32"):
        provider(name, packages).require(page_size=64, kv_cache_dtype=torch.float32, use_mla=False)


def test_float32_is_accepted_by_the_reference() -> None:
    """The reference serves float32, to be compared exactly."""
    reference_kernels().require(page_size=64, kv_cache_dtype=torch.float32, use_mla=False)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_any_page_size_is_accepted_without_mla(
    packages: Path, name: str, dtype: torch.dtype, page_size: int
) -> None:
    """Multi-head attention takes pages of any size, in both half precisions."""
    provider(name, packages).require(page_size=page_size, kv_cache_dtype=dtype, use_mla=False)


@pytest.mark.parametrize("name", ["mate", "reference"])
@pytest.mark.parametrize("page_size", [1, 32, 128])
def test_mla_refuses_other_pages_than_64(packages: Path, name: str, page_size: int) -> None:
    """MATE's MLA kernels take pages of 64 tokens; the error names the option, its value and the
    choice.
    """
    with pytest.raises(UnsupportedByKernels) as caught:
        provider(name, packages).require(
            page_size=page_size, kv_cache_dtype=torch.bfloat16, use_mla=True
        )
    for part in (f"--page-size {page_size} ", repr(name), "Expected: 64", "--page-size 64"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", PROVIDERS)
def test_mla_accepts_pages_of_64(packages: Path, name: str) -> None:
    """The default page size serves MLA models with every provider."""
    provider(name, packages).require(page_size=64, kv_cache_dtype=torch.bfloat16, use_mla=True)


def test_hopper_takes_any_page_size_for_mla(packages: Path) -> None:
    """NVIDIA's kernels have no such limit, so none is imposed on them."""
    provider("hopper", packages).require(page_size=32, kv_cache_dtype=torch.bfloat16, use_mla=True)


def test_a_record_is_frozen() -> None:
    """What a backend was given does not change under it."""
    with pytest.raises(AttributeError):
        reference_kernels().name = "other"  # type: ignore[misc]


def test_a_hopper_plan_is_compared_without_padding_and_semaphore() -> None:
    """NVIDIA's FA3 leaves its vectors' padding unwritten and counts in the last value: neither says
    anything.
    """
    # Three vectors of one request, padded to four, then the semaphore; as two computations of one
    # plan came from a GPU.
    used = torch.tensor([1, 1, 2, 12, 1, 1, 1, 1, 0, 0, 1, 2, 0], dtype=torch.int32)
    fresh = torch.tensor([1, 1, 2, 3, 1, 0, 3, 0, 0, 0, 0, 0, 9], dtype=torch.int32)
    other = torch.tensor([2, 1, 2, 3, 1, 0, 3, 0, 0, 0, 0, 0, 9], dtype=torch.int32)
    contents = kernels._hopper_plan_contents
    assert contents(used, 1).flatten().tolist() == [1, 1, 0]
    assert torch.equal(contents(used, 1), contents(fresh, 1))
    assert not torch.equal(contents(used, 1), contents(other, 1))


def hopper_plan(batch: int, vectors: int, semaphore: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A plan, and which of its values the computation of a plan decides: the rest is padding and
    the semaphore.

    ``vectors`` is 0 for the earlier layout, whose semaphore, or the place where it would be, comes
    first.
    """
    if not vectors:
        decided = torch.ones(batch + semaphore, dtype=torch.bool)
        decided[:1] = False
        return torch.arange(batch + semaphore, dtype=torch.int32), decided
    rows = torch.zeros(vectors, (batch + 3) // 4 * 4, dtype=torch.bool)
    rows[:, :batch] = True
    decided = torch.cat([rows.flatten(), torch.zeros(int(semaphore), dtype=torch.bool)])
    return torch.arange(len(decided), dtype=torch.int32), decided


@pytest.mark.parametrize("semaphore", [False, True], ids=["no semaphore", "semaphore"])
@pytest.mark.parametrize("vectors", [0, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 31, 128, 992, 993])
def test_each_value_of_a_hopper_plan_that_counts_is_compared(
    batch: int, vectors: int, semaphore: bool
) -> None:
    """Two plans differ exactly if they differ in something that computing a plan decides, in either
    layout.
    """
    plan, decided = hopper_plan(batch, vectors, semaphore)
    seen = kernels._hopper_plan_contents(plan, batch).flatten()
    assert seen.tolist() == plan[decided].tolist()


@pytest.mark.parametrize(("size", "batch"), [(11, 1), (17 + 1, 1), (8, 4), (24, 4), (30, 5)])
def test_a_hopper_plan_of_an_unknown_layout_is_not_compared(size: int, batch: int) -> None:
    """What cannot be told apart is an error of the check, and neither a difference nor the lack of
    one.
    """
    with pytest.raises(
        UnsupportedByKernels,
        match=rf"{size} values for a batch of {batch}, .*SGLANG_MUSA_EXT_CHECK",
    ):
        kernels._hopper_plan_contents(torch.zeros(size, dtype=torch.int32), batch)
