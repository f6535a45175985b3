"""NVIDIA's libraries, and what of their plans can be compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sglang_musa_ext.envs import Settings
from sglang_musa_ext.kernels import hopper
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    UnsupportedByKernels,
    UnsupportedKernelArgument,
    hopper_kernels,
    mate_kernels,
    reference_kernels,
    select_kernels,
)
from tests.support.kernel_libraries import (
    CUDA,
    DAO,
    MUSA,
    PLAN,
    half,
    module_of,
    paged,
    raw,
    refusal,
    set_gpu,
    write,
    write_distribution,
    write_flash_attention,
    write_mate,
    write_sgl_kernel,
)

NO_FA3 = "raise ImportError('built without FA3')"
"""Behave as SGLang's kernel package where it was built without FA3."""


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
    """On an NVIDIA GPU, MATE's wrapper under FA3's name is refused and not imported."""
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
    """Up to v2.8.3 releases return two results or one, and no argument says which."""
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
    """Older, newer and other vendors' GPUs are refused: seen, expected, remedy."""
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


def test_hopper_is_called_with_its_own_names(packages: Path) -> None:
    """SGLang's library gets its own names of heads and left padding, and FA3's for the rest."""
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
    """Its forward bounds splits by the average query, its plan by the longest; others do not."""
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
"""Arguments of FlashAttention's varlen function that have no defaults."""


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


def test_a_hopper_plan_is_compared_without_padding_and_semaphore() -> None:
    """FA3's unwritten padding and its counter in the last value say nothing."""
    # Three vectors of one request, padded to four, then the semaphore; as two computations of one
    # plan came from a GPU.
    used = torch.tensor([1, 1, 2, 12, 1, 1, 1, 1, 0, 0, 1, 2, 0], dtype=torch.int32)
    fresh = torch.tensor([1, 1, 2, 3, 1, 0, 3, 0, 0, 0, 0, 0, 9], dtype=torch.int32)
    other = torch.tensor([2, 1, 2, 3, 1, 0, 3, 0, 0, 0, 0, 0, 9], dtype=torch.int32)
    contents = hopper._hopper_plan_contents
    assert contents(used, 1).flatten().tolist() == [1, 1, 0]
    assert torch.equal(contents(used, 1), contents(fresh, 1))
    assert not torch.equal(contents(used, 1), contents(other, 1))


def hopper_plan(batch: int, vectors: int, semaphore: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a plan and the mask of its meaningful values, not padding or semaphore.

    ``vectors`` is 0 for the earlier layout: its semaphore, or the place for it, comes first.
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
    """Two plans differ exactly if a computed value differs, in either layout."""
    plan, decided = hopper_plan(batch, vectors, semaphore)
    seen = hopper._hopper_plan_contents(plan, batch).flatten()
    assert seen.tolist() == plan[decided].tolist()


@pytest.mark.parametrize(("size", "batch"), [(11, 1), (17 + 1, 1), (8, 4), (24, 4), (30, 5)])
def test_a_hopper_plan_of_an_unknown_layout_is_not_compared(size: int, batch: int) -> None:
    """Plans that cannot be told apart are an error of the check, not a verdict about them."""
    with pytest.raises(
        UnsupportedByKernels,
        match=rf"{size} values for a batch of {batch}, .*SGLANG_MUSA_EXT_CHECK",
    ):
        hopper._hopper_plan_contents(torch.zeros(size, dtype=torch.int32), batch)
