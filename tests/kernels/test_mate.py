"""MATE: every release does what was asked, or refuses it by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedKernelArgument,
    mate_kernels,
)
from tests.support.kernel_libraries import (
    MUSA,
    PLAN,
    RELEASES,
    WRAPPER,
    half,
    install_mate,
    mla,
    paged,
    raw,
    refusal,
    write,
    write_distribution,
    write_mate,
)


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


@pytest.fixture(params=list(RELEASES))
def release(request: pytest.FixtureRequest, packages: Path) -> FA3Kernels:
    """The kernels of each release of MATE whose sources are known."""
    return install_mate(packages, request.param)


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
