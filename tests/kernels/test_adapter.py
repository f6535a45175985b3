"""The adapter: FA3's keyword names on functions that differ in names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_musa_ext.kernels.adapter import DENSE_PAGE_TABLE, AdaptedFunction
from sglang_musa_ext.kernels.provider import (
    FA3Kernels,
    UnsupportedKernelArgument,
    reference_kernels,
)


def adapted(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """``function`` as the provider's user calls it."""
    return AdaptedFunction(function, **how)


def echo(
    q: Any, k_cache: Any = None, page_table: Any = None, window_size: Any = (-1, -1)
) -> dict[str, Any]:
    """A kernel that returns its arguments."""
    return dict(locals())


def test_the_adapter_passes_known_arguments_unchanged() -> None:
    """Arguments that the kernels know are handed on as they are."""
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
    """The result lands in ``out``, in the shape that the caller gave it, and is returned."""
    result = torch.arange(24.0).view(2, 3, 4)
    out = torch.full(shape, torch.nan)
    returned = adapted(lambda q: result)(q=1, out=out)
    assert returned is out
    torch.testing.assert_close(out, result.reshape(shape), rtol=0, atol=0)


def test_out_is_written_when_the_kernel_returns_more() -> None:
    """With ``return_softmax_lse`` the output is the first of several; the others pass through."""
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
    """A library with every name of a call gets it directly, one that lacks one by the adapter."""

    def library(q: Any, window_size: Any = (-1, -1), ver: int = 3, out: Any = None) -> str:
        return "library"

    def served(kernels: FA3Kernels, *names: str) -> Any:
        call = kernels.prepare("flash_attn_with_kvcache", names)
        return call(dict.fromkeys(names))

    record = dataclasses.replace(
        reference_kernels(),
        flash_attn_with_kvcache=lambda **arguments: "adapter",
        unadapted=library,
    )
    for _ in range(2):
        assert served(record, "q", "ver", "out") == "library"
        assert served(record, "q", "ver", "score_mod") == "adapter"
    other = dataclasses.replace(record, unadapted=None)
    assert served(other, "q", "ver", "out") == "adapter"


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
    given = adapted(echo, steps=[DENSE_PAGE_TABLE])(q=1, page_table=table)["page_table"]
    assert given.is_contiguous()
    torch.testing.assert_close(given, table, rtol=0, atol=0)
    # NVIDIA's kernels take rows with gaps, and a copy would cost them time.
    assert adapted(echo)(q=1, page_table=table)["page_table"] is table


def test_a_dense_page_table_is_not_copied() -> None:
    """A dense tensor is handed on as the object it is."""
    table = torch.zeros(4, 8, dtype=torch.int32)
    assert adapted(echo, steps=[DENSE_PAGE_TABLE])(q=1, page_table=table)["page_table"] is table


def test_the_kv_cache_is_never_copied() -> None:
    """A cache that is a strided view goes on untouched: a copy would be as large as the pool."""
    pool = torch.zeros(4, 2, 64, 2, 16)
    cache = pool[:, 0]
    table = torch.zeros(4, 8, dtype=torch.int32)[:, :2]
    assert not cache.is_contiguous()
    given = adapted(echo, steps=[DENSE_PAGE_TABLE])(q=1, k_cache=cache, page_table=table)["k_cache"]
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
        ("sinks", "s_aux"), ("s_aux", "sinks"), ("sinks", "learnable_sink"),
        ("page_table", "block_table"),
        ("cache_seqlens", "seqused_k"), ("num_heads_q", "num_heads"),
        ("num_heads_kv", "num_heads_k"),
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
    """A function with hidden parameters gets all arguments but those that say nothing."""
    assert adapted(lambda **given: given)(q=1, sinks=2, score_mod=None) == {"q": 1, "sinks": 2}


def test_the_reference_refuses_what_mate_lacks() -> None:
    """The reference has MATE's parameters: no call works here and fails there for a keyword."""
    with pytest.raises(UnsupportedKernelArgument, match="'score_mod'"):
        reference_kernels().flash_attn_with_kvcache(q=torch.zeros(1, 1, 64), score_mod=abs)
