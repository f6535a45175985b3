"""MATE: every release does what was asked, or refuses it by name."""

from __future__ import annotations

import inspect
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels import mate
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    KernelsUnavailable,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
    mate_kernels,
)
from tests.support.kernel_libraries import (
    MUSA,
    PLAN,
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
from tests.support.mate_signatures import RELEASES


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
    """The unrelated project of that name is named with distribution, version, path and remedy."""
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
    """Anything else called ``mate`` is refused by name, not by the error of importing it."""
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
    """A module of the wrapper's name without a function is named with file and what it lacks."""
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
    """A plan has at most a 32-byte record a multiprocessor and batch+1 offsets of 4 bytes."""
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
    "ver": 3, "score_mod": None, "mask_mod": None, "aux_tensors": None, "rel_bias": None,
    "sfq": None, "only_qv": False,
    "num_splits": 0, "softcap": 0.0, "window_size": (-1, -1), "return_softmax_lse": True,
    "k_descale": torch.ones(1),
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


@pytest.mark.parametrize(("state", "warned"), [("0.2.2", False), ("later", True)])
def test_a_release_known_from_notes_alone_is_warned_of(
    packages: Path, state: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says what it is served by, and what to do, however many backends are built."""
    install_mate(packages, state)
    mate_kernels(MUSA)
    messages = [message for message in caplog.messages if "release notes" in message]
    assert len(messages) == warned
    assert all("sglang-musa-ext validate" in message for message in messages)


FP8_RELEASES = {
    torch.float8_e4m3fn: ((0, 2, 3), (0, 2, 2)),
    torch.float8_e5m2: ((0, 2, 5), (0, 2, 4)),
}
"""The first release that reads a cache of this type, and the last that does not."""


def record(release: tuple[int, ...]) -> FA3Kernels:
    """The kernels of a release, on functions that return what they were called with."""
    functions: dict[str, Any] = {}
    exec(WRAPPER, functions)
    return mate.mate_record(SimpleNamespace(**functions), release)


def fp8_call(dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    cache = half(4, 64, 2, 128, dtype=dtype)
    return paged(q=half(2, 8, 128, dtype=dtype), k_cache=cache, v_cache=cache) | more


@pytest.mark.parametrize("dtype", FP8_RELEASES, ids=str)
def test_fp8_is_refused_before_its_release(dtype: torch.dtype) -> None:
    """A cache in fp8 is refused in the call with what it has, and at start by the option."""
    kernels = record(FP8_RELEASES[dtype][1])
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UnsupportedKernelArgument, match=rf"k_cache {name}.*--kv-cache-dtype auto"):
        kernels.flash_attn_with_kvcache(**fp8_call(dtype))
    with pytest.raises(UnsupportedByKernels, match="--kv-cache-dtype"):
        kernels.require(page_size=64, kv_cache_dtype=dtype, use_mla=False)


@pytest.mark.parametrize("dtype", FP8_RELEASES, ids=str)
def test_fp8_has_all_its_scales(dtype: torch.dtype) -> None:
    """Each scale is float32 and of the call's batch and key heads; one that is not given is 1."""
    kernels = record(FP8_RELEASES[dtype][0])
    kernels.require(page_size=64, kv_cache_dtype=dtype, use_mla=False)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    # SGLang expands a layer's scale to the server's batch, here of another size.
    given = dict(k_descale=torch.tensor(0.5).expand(5, 2), v_descale=None)
    seen = vars(kernels.flash_attn_with_kvcache(**fp8_call(dtype, cu_seqlens_q=offsets, **given)))
    for name, value in (("q_descale", 1.0), ("k_descale", 0.5), ("v_descale", 1.0)):
        assert seen[name].dtype == torch.float32
        assert torch.equal(seen[name], torch.full((2, 2), value))
        assert seen[name].is_contiguous()


def test_scales_of_single_requests_are_kept() -> None:
    """Scales that differ between requests are handed on as they are."""
    scales = torch.tensor([[0.5, 1.0], [2.0, 3.0]])
    call = fp8_call(torch.float8_e4m3fn, k_descale=scales)
    assert torch.equal(vars(record((0, 2, 7)).flash_attn_with_kvcache(**call))["k_descale"], scales)


def test_scales_of_other_requests_are_refused() -> None:
    """A scale for each of three requests means nothing to a call of two."""
    call = fp8_call(torch.float8_e4m3fn, v_descale=torch.rand(3, 2))
    with pytest.raises(UnsupportedKernelArgument, match=r"v_descale of shape \(3, 2\).*\(2, 2\)"):
        record((0, 2, 7)).flash_attn_with_kvcache(**call)


def test_scales_of_1_are_made_once_but_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls share them; a captured call has its own, whose memory is the graph's."""
    kernels, call = record((0, 2, 7)), fp8_call(torch.float8_e4m3fn)

    def scales() -> set[int]:
        seen = vars(kernels.flash_attn_with_kvcache(**call))
        return {seen[name].data_ptr() for name in ("q_descale", "k_descale", "v_descale")}

    first = scales()
    assert scales() == first
    assert len(first) == 1
    monkeypatch.setattr(mate, "_is_capturing", lambda device: True)
    assert not scales() & first


def test_mla_refuses_fp8() -> None:
    """No source of MATE that could be read has an MLA kernel that reads fp8."""
    call = {
        name: value.to(torch.float8_e4m3fn) if name in ("q", "qv", "k_cache", "v_cache") else value
        for name, value in mla().items()
    }
    with pytest.raises(UnsupportedKernelArgument, match=r"MLA kernels.*qv float8_e4m3fn"):
        record((0, 2, 7)).flash_attn_with_kvcache(**call)


ONE = dict(
    cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
    cu_seqlens_k=torch.tensor([0, 3], dtype=torch.int32),
    max_seqlen_q=2, max_seqlen_k=3,
)  # fmt: skip
"""One request of two queries and three keys."""


def one_request(queries: int, keys: int, **more: Any) -> dict[str, Any]:
    """A call for :data:`ONE` with so many rows."""
    return raw(q=half(queries, 8, 128), k=half(keys, 2, 128), v=half(keys, 2, 128)) | ONE | more


@pytest.mark.parametrize("rows", [(2, 4), (5, 3), (5, 4)], ids=str)
def test_lengths_of_one_request_are_read_where_rows_are_padded(
    release: FA3Kernels, rows: tuple[int, int]
) -> None:
    """MATE takes all rows of one request for its own, unless ``seqused_k`` is there."""
    given = vars(release.flash_attn_varlen_func(**one_request(*rows)))
    assert given["seqused_k"].tolist() == [3]
    assert given["seqused_k"].data_ptr() == ONE["cu_seqlens_k"][1:].data_ptr()  # type: ignore[index]


def test_one_request_without_padding_goes_to_precompiled_kernels(release: FA3Kernels) -> None:
    """Where all rows are the request's, MATE's lengths are right, and its fast kernels serve."""
    assert vars(release.flash_attn_varlen_func(**one_request(2, 3)))["seqused_k"] is None


def test_one_request_in_a_graph_is_read_as_padded(
    release: FA3Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is replayed for requests of other lengths than those of its capture."""
    monkeypatch.setattr(mate, "_is_capturing", lambda device: True)
    given = vars(release.flash_attn_varlen_func(**one_request(2, 3)))
    assert given["seqused_k"].tolist() == [3]


@pytest.mark.parametrize(
    "more",
    [
        {"window_size": (7, 0)},
        {"sinks": half(8)},
        {"seqused_k": torch.tensor([1], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32),
         "cu_seqlens_k": torch.tensor([0, 1, 3], dtype=torch.int32)},
    ],
    ids=["window", "sinks", "lengths", "two"],
)  # fmt: skip
def test_calls_whose_lengths_mate_reads_are_left_alone(more: Any) -> None:
    """Only MATE's precompiled kernels, and only for one request, take rows for lengths."""
    given = vars(record((0, 2, 7)).flash_attn_varlen_func(**one_request(5, 4, **more)))
    assert given["seqused_k"] is more.get("seqused_k")


def test_a_window_that_is_causal_is_said_to_be() -> None:
    """From 0.2.0 on, MATE asserts that its precompiled kernels get no window of (-1, 0)."""
    kernels = record((0, 2, 2))
    call = one_request(2, 3, causal=False, window_size=(-1, 0))
    given = vars(kernels.flash_attn_varlen_func(**call))
    assert (given["causal"], given["window_size"]) == (True, (-1, -1))


def test_plans_of_large_batches_are_refused_where_none_can_be_made() -> None:
    """0.1.3 cannot compile a plan for more than 992 requests; the option is named."""
    old, new = record((0, 1, 3)), record((0, 2, 0))
    assert old.get_scheduler_metadata(**PLAN | {"batch_size": 992})
    with pytest.raises(UnsupportedKernelArgument, match="--max-running-requests 992"):
        old.get_scheduler_metadata(**PLAN | {"batch_size": 993})
    assert new.get_scheduler_metadata(**PLAN | {"batch_size": 993})
    start: dict[str, Any] = dict(page_size=64, kv_cache_dtype=torch.bfloat16, use_mla=False)
    old.require(**start, largest_batch=992)
    with pytest.raises(UnsupportedByKernels, match="--max-running-requests 992"):
        old.require(**start, largest_batch=993)
    new.require(**start, largest_batch=4096)


def test_head_dims_by_release() -> None:
    """192/192 is there from 0.2.0 on."""
    assert not record((0, 1, 3)).serves_head_dims(192, 192)
    assert record((0, 2, 0)).serves_head_dims(192, 192)
    assert record((0, 1, 3)).serves_head_dims(192, 128)


@pytest.mark.parametrize("name", ["sinks", "s_aux"])
def test_a_plan_for_sinks_is_known_to_be_dropped(release: FA3Kernels, name: str) -> None:
    """MATE ignores it, so that none should be computed."""
    assert release.drops_plan(paged(**{name: half(8)}))
    assert not release.drops_plan(paged(**{name: None}))
    assert not release.drops_plan(paged())


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 993])
@pytest.mark.parametrize("padded", [False, True])
def test_the_contents_of_a_plan_are_all_but_its_padding(batch: int, padded: bool) -> None:
    """Every value of a request counts, and no other; in the layouts before 0.2.4 and from it on."""
    length = -(-batch // 4) * 4 if padded else batch
    plan = torch.arange(4 * length, dtype=torch.int32)
    contents = mate.plan_contents(plan, batch)
    assert contents.flatten().tolist() == [
        vector * length + index for vector in range(4) for index in range(batch)
    ]


def test_a_plan_of_an_unknown_layout_is_not_compared() -> None:
    """Leaving parts out could hide a difference."""
    with pytest.raises(ValueError, match=r"17 values for a batch of 3.*Expected 12 or 16"):
        mate.plan_contents(torch.zeros(17), 3)


RAW: dict[str, Any] = dict(dtype=torch.bfloat16, headdim=128, headdim_v=128)


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"headdim": 192}, True),
        ({"headdim": 80, "headdim_v": 80}, True),
        ({"headdim": 192, "headdim_v": 192}, False),
        ({"headdim": 256, "headdim_v": 256}, False),
        ({"dtype": torch.float8_e4m3fn}, False),
        ({"window_size": (127, 0)}, False),
        ({"softcap": 30.0}, False),
        ({"attention_chunk": 8192}, False),
        ({"has_sinks": True}, False),
    ],
    ids=str,
)
def test_calls_over_raw_keys_on_precompiled_kernels(change: dict[str, Any], served: bool) -> None:
    """It is known before a call whether kernels that MATE compiled in advance serve it."""
    assert record((0, 2, 7)).serves_raw_keys(**RAW | change) is served


def test_the_number_of_splits_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode of one long request fills the multiprocessors; a full batch needs no splits."""
    properties = SimpleNamespace(multi_processor_count=60)
    module = SimpleNamespace(
        current_device=lambda: 0, get_device_properties=lambda device: {0: properties}[device]
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    decode = dict(max_seqlen_q=1, max_seqlen_k=8192, num_heads_q=32, num_heads_kv=8, headdim=128)
    kernels = record((0, 2, 7))
    splits = kernels.static_num_splits(batch_size=1, **decode)
    assert splits is not None
    assert 0.85 * 60 <= 8 * splits <= 60
    assert kernels.static_num_splits(batch_size=64, **decode) == 1
    assert kernels.static_num_splits(batch_size=64, **decode, num_splits=3) == 3


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
    """A cache with sparse rows is refused: no kernel reads it, and a copy is as large as it."""
    cache = half(4, 64, 128, 2).transpose(2, 3)
    with pytest.raises(UnsupportedKernelArgument, match="k_cache has stride 2"):
        release.flash_attn_with_kvcache(**paged(k_cache=cache))


def test_words_for_none_are_left_to_the_kernel(release: FA3Kernels) -> None:
    """``None`` asks for a kernel's default; not every release takes the word."""
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
        *product(("0.1.3",), ("k", "v", "cache_batch_idx")),
        *product(("0.1.3", "0.2.0"), ("cache_leftpad", "rotary_cos", "rotary_sin")),
        *product(("0.1.3", "0.2.0", "0.2.1"), ("attention_chunk",)),
    ],
)
def test_what_a_release_lacks_is_refused_by_name(packages: Path, state: str, name: str) -> None:
    """An argument not read, or not served yet, is refused with the release that has it."""
    kernels = install_mate(packages, state)
    value = 4096 if name == "attention_chunk" else half(2, 2, 128)
    with pytest.raises(
        UnsupportedKernelArgument, match=rf"needs {name}, which MATE has from 0\.2\.[012] on"
    ):
        kernels.flash_attn_with_kvcache(**paged(**{name: value}))


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
