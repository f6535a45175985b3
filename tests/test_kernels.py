from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext import kernels
from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels import (
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

# The functions of MATE 0.2.2's wrapper, with its own parameters; each returns what it was called with.
WRAPPER = """
from types import SimpleNamespace

def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
    cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False, sinks=None,
    s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None):
    return SimpleNamespace(**locals())

def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(-1, -1),
    softcap=0.0, out=None, return_softmax_lse=False):
    return SimpleNamespace(**locals())

def get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype=None, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, page_size=None,
    max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0,
    pack_gqa=None, sm_margin=0):
    return SimpleNamespace(**locals())
"""
LIBRARIES = ("mate", "flash_attn_interface", "sgl_kernel")
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
    """What this package reads of a device; a torch without torch_musa does not know the name ``musa``."""

    type: str = "musa"
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


MUSA: Any = MusaDevice()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched first for modules; the libraries in question are found nowhere else."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]:
        del sys.modules[name]
    sys.modules.update(before)


def write(root: Path, files: dict[str, str]) -> None:
    """Write modules, given by their paths under ``root``."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    importlib.invalidate_caches()


def write_distribution(root: Path, name: str, version: str) -> None:
    write(root, {f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"})


def write_mate(root: Path, wrapper: str = WRAPPER) -> None:
    """A stand-in of Moore Threads' MATE and of its wrapper."""
    write(root, {"mate/__init__.py": "", "mate/mha_interface.py": "", "mate/jit/__init__.py": ""})
    write(root, {"flash_attn_interface.py": "import mate\n" + wrapper})


def adapted(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as the provider's user calls it."""
    return kernels._adapt(function)


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


@pytest.mark.parametrize(("name", "device"), [("mate", CPU), ("mate", CUDA), ("hopper", CPU), ("hopper", MUSA)])
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


def test_hopper_without_its_library_is_refused(packages: Path) -> None:
    """A GPU without SGLang's kernel package gets an error that names the package."""
    write(packages, {"sgl_kernel/__init__.py": ""})
    message = refusal(Settings(kernels="hopper"), CUDA)
    assert "sgl_kernel.flash_attn" in message
    assert "Install" in message


def test_hopper_with_its_library_is_selected(packages: Path) -> None:
    """SGLang's own FA3 is selected by name on an NVIDIA GPU."""
    write(packages, {"sgl_kernel/__init__.py": "", "sgl_kernel/flash_attn.py": WRAPPER})
    chosen = select_kernels(Settings(kernels="hopper"), CUDA)
    assert chosen.name == "hopper"
    assert chosen.metadata_uses_softcap
    assert chosen.mla_plan_bytes is None


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
    for part in ("MATE is not installed", "'mate'", "flash_attn_3", "Moore Threads", "SGLANG_MUSA_EXT=off"):
        assert part in message


def test_a_foreign_mate_is_refused(packages: Path) -> None:
    """The unrelated project of the same name is named with distribution, version, location and remedy."""
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
    [{"mate.py": ""}, {"mate/__init__.py": "print 'Python 2'\n"}, {"mate/__init__.py": "import no_such_module\n"}],
    ids=["module", "syntax", "import"],
)
def test_a_foreign_mate_that_cannot_be_imported_is_refused(packages: Path, files: dict[str, str]) -> None:
    """Whatever else is called ``mate`` is refused by name, not with the error that importing it raises."""
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


@pytest.mark.parametrize("absent", ["flash_attn_with_kvcache", "flash_attn_varlen_func", "get_scheduler_metadata"])
def test_a_wrapper_without_a_function_is_refused(packages: Path, absent: str) -> None:
    """A module of the wrapper's name that lacks a function is named with its file and what it lacks."""
    write_mate(packages, WRAPPER + f"\ndel {absent}\n")
    message = refusal(Settings(), MUSA)
    assert f"lacks {absent}" in message
    assert str(packages / "flash_attn_interface.py") in message


def test_a_wrapper_lists_everything_it_lacks(packages: Path) -> None:
    """A check reports all mismatches at once; a name that is no function counts as lacking."""
    write_mate(packages, "flash_attn_varlen_func = 1\ndef get_scheduler_metadata(): ...\n")
    assert "lacks flash_attn_with_kvcache, flash_attn_varlen_func," in refusal(Settings(), MUSA)


def test_mate_sizes_an_mla_plan_by_its_layout(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """The functions that NVIDIA's library names otherwise get its names for the heads, and FA3's for the rest."""
    library = "def get_scheduler_metadata(**given): return given\n"
    library += "flash_attn_with_kvcache = flash_attn_varlen_func = lambda q: q\n"
    write(packages, {"sgl_kernel/__init__.py": "", "sgl_kernel/flash_attn.py": library})
    given: Any = hopper_kernels(CUDA).get_scheduler_metadata(**PLAN)
    names = {"num_heads_q": "num_heads", "num_heads_kv": "num_heads_k"}
    assert given == {names.get(name, name): value for name, value in PLAN.items()}


# The adapter -------------------------------------------------------------------------------------


def echo(q: Any, k_cache: Any = None, page_table: Any = None, window_size: Any = (-1, -1)) -> dict[str, Any]:
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


@pytest.mark.parametrize("value", [object(), True, 0, 1, torch.zeros(2), torch.tensor(False), [], ""], ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        "aux_tensors", "mask_mod", "max_seqlen_k", "only_qv", "rel_bias", "rel_bias_prep_cache",
        "score_mod", "sfk", "sfq", "sfv",
    ],
)  # fmt: skip
def test_an_unknown_argument_with_a_value_is_refused_by_name(name: str, value: object) -> None:
    """A feature that the kernels do not have is an error and never a wrong number."""
    with pytest.raises(UnsupportedKernelArgument, match=rf"echo has no argument '{name}'.*--attention-backend"):
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
    given = adapted(echo)(q=1, page_table=table)["page_table"]
    assert given.is_contiguous()
    torch.testing.assert_close(given, table, rtol=0, atol=0)


def test_a_dense_page_table_is_not_copied() -> None:
    """What is dense already is handed on as the object it is."""
    table = torch.zeros(4, 8, dtype=torch.int32)
    assert adapted(echo)(q=1, page_table=table)["page_table"] is table


def test_the_kv_cache_is_never_copied() -> None:
    """A cache that is a strided view goes to the kernel untouched: a copy would be as large as the pool."""
    pool = torch.zeros(4, 2, 64, 2, 16)
    cache = pool[:, 0]
    table = torch.zeros(4, 8, dtype=torch.int32)[:, :2]
    assert not cache.is_contiguous()
    given = adapted(echo)(q=1, k_cache=cache, page_table=table)["k_cache"]
    assert given is cache
    assert given.data_ptr() == pool.data_ptr()


def test_the_caller_keeps_its_arguments() -> None:
    """The adapter drops and replaces in its own copy of the keywords."""
    arguments = {"q": 1, "ver": 3, "score_mod": None, "page_table": torch.zeros(4, 8, dtype=torch.int32)[:, :2]}
    before = dict(arguments)
    adapted(echo)(**arguments)
    assert arguments.keys() == before.keys()
    assert all(arguments[name] is value for name, value in before.items())


@pytest.mark.parametrize("name", ["flash_attn_with_kvcache", "flash_attn_varlen_func"])
def test_mate_gets_what_upstream_passes(packages: Path, name: str) -> None:
    """A provider's functions take upstream's spellings and know MATE's parameters by its signature."""
    write_mate(packages)
    function = getattr(mate_kernels(MUSA), name)
    values = ("k_cache", "v_cache") if name == "flash_attn_with_kvcache" else ("k", "v")
    given = vars(function(q=1, **dict.fromkeys(values, 2), ver=3, score_mod=None, aux_tensors=None, softcap=30.0))
    assert given["softcap"] == 30.0
    assert "ver" not in given
    with pytest.raises(UnsupportedKernelArgument, match="'sfq'"):
        function(q=1, **dict.fromkeys(values, 2), sfq=3)


def test_the_reference_refuses_what_mate_lacks() -> None:
    """The reference has MATE's parameters, so a call that works here does not fail there for a keyword."""
    with pytest.raises(UnsupportedKernelArgument, match="'score_mod'"):
        reference_kernels().flash_attn_with_kvcache(q=1, score_mod=abs)


# What a configuration may ask --------------------------------------------------------------------


def provider(name: str, packages: Path) -> FA3Kernels:
    """The provider ``name`` on stand-in libraries."""
    write_mate(packages)
    write(packages, {"sgl_kernel/__init__.py": "", "sgl_kernel/flash_attn.py": WRAPPER})
    device = {"mate": MUSA, "hopper": CUDA, "reference": CPU}[name]
    return select_kernels(Settings(kernels=name), device)


PROVIDERS = ("mate", "hopper", "reference")


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.uint8], ids=str)
def test_a_kv_cache_dtype_that_cannot_be_read_is_refused(packages: Path, name: str, dtype: torch.dtype) -> None:
    """The error names the option, the dtype, the kernels and what they read."""
    with pytest.raises(UnsupportedByKernels) as caught:
        provider(name, packages).require(page_size=64, kv_cache_dtype=dtype, use_mla=False)
    for part in ("--kv-cache-dtype", str(dtype).removeprefix("torch."), repr(name), "bfloat16, float16"):
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
def test_any_page_size_is_accepted_without_mla(packages: Path, name: str, dtype: torch.dtype, page_size: int) -> None:
    """Multi-head attention takes pages of any size, in both half precisions."""
    provider(name, packages).require(page_size=page_size, kv_cache_dtype=dtype, use_mla=False)


@pytest.mark.parametrize("name", ["mate", "reference"])
@pytest.mark.parametrize("page_size", [1, 32, 128])
def test_mla_refuses_other_pages_than_64(packages: Path, name: str, page_size: int) -> None:
    """MATE's MLA kernels take pages of 64 tokens; the error names the option, its value and the choice."""
    with pytest.raises(UnsupportedByKernels) as caught:
        provider(name, packages).require(page_size=page_size, kv_cache_dtype=torch.bfloat16, use_mla=True)
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
