"""The choice of kernels, and what a configuration may ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
    reference_kernels,
    select_kernels,
)
from tests.support.kernel_libraries import (
    CPU,
    CUDA,
    MUSA,
    refusal,
    write_mate,
    write_sgl_kernel,
)


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


def provider(name: str, packages: Path) -> FA3Kernels:
    """The provider ``name`` on stand-in libraries."""
    write_mate(packages)
    write_sgl_kernel(packages)
    device = {"mate": MUSA, "hopper": CUDA, "reference": CPU}[name]
    return select_kernels(Settings(kernels=name), device)


PROVIDERS = ("mate", "hopper", "reference")


UNREADABLE = [(name, dtype) for name in PROVIDERS for dtype in (torch.float64, torch.uint8)]


@pytest.mark.parametrize(("name", "dtype"), [*UNREADABLE, ("hopper", torch.float8_e5m2)], ids=str)
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


@pytest.mark.parametrize("name", PROVIDERS)
def test_fp8_is_accepted_where_a_kernel_reads_it(packages: Path, name: str) -> None:
    """A cache in e4m3 is served, but not MLA's, and not with wider heads than SGLang casts."""
    kernels = provider(name, packages)
    fp8: dict[str, Any] = dict(page_size=64, kv_cache_dtype=torch.float8_e4m3fn)
    kernels.require(**fp8, use_mla=False, head_dims=[(256, 256)])
    with pytest.raises(UnsupportedByKernels, match=r"--kv-cache-dtype float8_e4m3fn .* MLA"):
        kernels.require(**fp8, use_mla=True)
    with pytest.raises(UnsupportedByKernels, match=r"head dimension 512.*--kv-cache-dtype auto"):
        kernels.require(**fp8, use_mla=False, head_dims=[(128, 128), (512, 512)])


@pytest.mark.parametrize("name", ["mate", "reference"])
@pytest.mark.parametrize("head_dims", [(64, 128), (576, 512), (128, 64)], ids=str)
def test_head_dims_without_a_kernel_are_refused(
    packages: Path, name: str, head_dims: tuple[int, int]
) -> None:
    """The error names the pair, the choices and the option."""
    with pytest.raises(UnsupportedByKernels) as caught:
        provider(name, packages).require(
            page_size=64, kv_cache_dtype=torch.bfloat16, use_mla=False, head_dims=[head_dims]
        )
    for part in (f"{head_dims[0]}/{head_dims[1]}", repr(name), "192/128", "--attention-backend"):
        assert part in str(caught.value)


def test_hopper_takes_any_head_dims(packages: Path) -> None:
    """NVIDIA's own library refuses what it lacks."""
    provider("hopper", packages).require(
        page_size=64, kv_cache_dtype=torch.bfloat16, use_mla=False, head_dims=[(64, 512)]
    )


@pytest.mark.parametrize("page_size", [1, 128])
def test_pages_that_mate_reads_slowly_are_warned_of(
    packages: Path, page_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning names the option and the better choice; pages of 64 have none."""
    kernels = provider("mate", packages)
    caplog.clear()
    kernels.require(page_size=64, kv_cache_dtype=torch.bfloat16, use_mla=False)
    assert not caplog.messages
    kernels.require(page_size=page_size, kv_cache_dtype=torch.bfloat16, use_mla=False)
    assert f"--page-size {page_size} works" in caplog.text
    assert "--page-size 64" in caplog.text
    # A draft model's backend has the same pages.
    kernels.require(page_size=page_size, kv_cache_dtype=torch.bfloat16, use_mla=False)
    assert len(caplog.messages) == 1


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
    """MATE's MLA kernels take pages of 64; the error names the option, its value and the choice."""
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
    """The record that a backend was given does not change under it."""
    with pytest.raises(AttributeError):
        reference_kernels().name = "other"  # type: ignore[misc]
