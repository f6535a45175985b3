"""The CPU platform and its stand-ins, without an engine.

What changes a process (SGLang's platform, Triton's interpreter, ``sys.modules``) is tried in
processes of its own.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import os
import platform as system
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_musa_ext.cpu import host_memory, stand_ins
from tests.support.engine import EngineServer
from tests.support.warm import WarmPython

UNDER_THE_PLATFORM = {"SGLANG_PLATFORM": "musa_reference"}


def run_python(warm: WarmPython, code: str, environment: dict[str, str] | None = None) -> Any:
    """Run ``code`` in a process of its own; returns what its last line of output says in JSON."""
    dropped = (*stand_ins.ENVIRONMENT, "SGLANG_PLATFORM", "SGLANG_MUSA_EXT")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = warm.run(command, env=inherited | (environment or {}))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def exact_merge(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two softmax numerators over their common denominator, in float64."""
    weight_a, weight_b = s_a.double().exp(), s_b.double().exp()
    total = weight_a + weight_b
    merged = (v_a.double() * weight_a[..., None] + v_b.double() * weight_b[..., None]) / total[
        ..., None
    ]
    return merged, total.log()


def states(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs ``(5, 3, 8)`` and log-sum-exp ``(5, 3)`` of two attentions, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 3, 8, generator=generator).to(dtype)
    scores = torch.randn(2, 5, 3, generator=generator) * 3
    return outputs[0], scores[0], outputs[1], scores[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_states_are_the_attention_over_all_keys(dtype: torch.dtype) -> None:
    """Merging equals the weighted mean that float64 gives, within the output's own precision."""
    arguments = states(dtype)
    merged, scores = stand_ins.merge_state_v2(*arguments)
    expected, expected_scores = exact_merge(*arguments)
    torch.testing.assert_close(merged, expected.to(dtype))
    torch.testing.assert_close(scores, expected_scores.float())


@pytest.mark.parametrize("nothing", [-torch.inf, torch.inf])
def test_a_side_without_keys_does_not_count(nothing: float) -> None:
    """A row whose log-sum-exp says that there was no key is ignored, whatever its output holds."""
    v_a, s_a, v_b, s_b = states()
    v_a[1], s_a[1] = torch.nan, nothing
    merged, scores = stand_ins.merge_state_v2(v_a, s_a, v_b, s_b)
    torch.testing.assert_close(merged[1], v_b[1])
    torch.testing.assert_close(scores[1], s_b[1])
    assert merged.isfinite().all()


def test_rows_without_any_key_merge_to_zero() -> None:
    """Where neither side had a key, the output is zero and its log-sum-exp minus infinity."""
    v_a, s_a, v_b, s_b = states()
    s_a[0] = s_b[0] = -torch.inf
    merged, scores = stand_ins.merge_state_v2(v_a, s_a, v_b, s_b)
    assert (merged[0] == 0).all()
    assert (scores[0] == -torch.inf).all()


def test_merging_writes_where_it_is_told() -> None:
    """Buffers that are passed in are filled and returned."""
    arguments = states()
    merged, scores = torch.empty_like(arguments[0]), torch.empty_like(arguments[1])
    returned = stand_ins.merge_state_v2(*arguments, merged, scores)
    assert returned[0] is merged
    assert returned[1] is scores
    torch.testing.assert_close(merged, exact_merge(*arguments)[0].float())


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A copy of ``sys.modules`` without the libraries we stand in for; the original comes back."""
    libraries = ("sgl_kernel", "torchvision")
    kept = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] not in libraries
    }
    monkeypatch.setattr(sys, "modules", kept)
    return monkeypatch


def test_a_library_that_can_be_imported_is_left_alone(only_ours: pytest.MonkeyPatch) -> None:
    """No stand-in is installed for a library that is there."""
    only_ours.setattr(importlib.util, "find_spec", lambda name: object())
    stand_ins.install_missing_modules()
    assert "sgl_kernel" not in sys.modules
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("name", ["sgl_kernel", "torchvision"])
def test_a_missing_library_gets_modules_that_can_be_probed(
    only_ours: pytest.MonkeyPatch, name: str
) -> None:
    """The stand-in has a spec, so that looking for the library does not raise."""
    only_ours.setattr(importlib.util, "find_spec", lambda name: None)
    stand_ins.install_missing_modules()
    assert sys.modules[name].__spec__ is not None


@pytest.mark.parametrize(
    ("module", "name"), [("sgl_kernel", "scalar_type"), ("sgl_kernel.flash_attn", "flash_mla")]
)
def test_a_stand_in_has_only_what_it_provides(
    only_ours: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """SGLang probes for optional names, which must be missing."""
    only_ours.setattr(importlib.util, "find_spec", lambda name: None)
    stand_ins.install_missing_modules()
    assert not hasattr(sys.modules[module], name)


def test_an_absent_function_says_what_to_do() -> None:
    """A function that exists for its import alone refuses by name."""
    transfer = stand_ins.sgl_kernel_modules()["sgl_kernel.kvcacheio"]["transfer_kv_direct"]
    with pytest.raises(
        NotImplementedError, match=r"sgl_kernel\.transfer_kv_direct .* Install a sgl_kernel"
    ):
        transfer(1, page=2)


def test_nothing_is_replaced_unless_the_platform_is_asked_for(warm: WarmPython) -> None:
    """Importing SGLang with the package installed leaves the process as it was."""
    assert run_python(
        warm,
        """
        import json, os, sys
        import sglang_musa_ext.plugin
        sglang_musa_ext.plugin.activate_platform()
        print(json.dumps([
            "sglang_musa_ext.cpu.stand_ins" in sys.modules,
            "TRITON_INTERPRET" in os.environ,
            any("Stand-in" in (module.__doc__ or "") for module in list(sys.modules.values())),
        ]))
        """,
    ) == [False, False, False]


def test_preparing_twice_changes_nothing_more(warm: WarmPython) -> None:
    """The second call leaves every module and every patched function as the first one made it."""
    assert run_python(
        warm,
        """
        import json, sys
        from sglang_musa_ext.cpu.stand_ins import prepare_process

        def state():
            from triton.language.extra import libdevice
            from triton.runtime.autotuner import Autotuner
            return dict(sys.modules), dict(vars(libdevice)), dict(vars(Autotuner))

        prepare_process()
        first = state()
        prepare_process()
        print(json.dumps(first == state()))
        """,
    )


KERNELS = '''
import json, sys, tempfile, pathlib
import triton  # As SGLang does, before the platform is asked for.
from sglang_musa_ext.cpu.stand_ins import LIBDEVICE, prepare_process
prepare_process()
# The interpreter reads the source of a kernel, so it has to be in a file.
path = pathlib.Path(tempfile.mkdtemp()) / "kernels.py"
path.write_text("""
import triton, triton.language as tl
from triton.language.extra import libdevice

@triton.jit
def unary(x_ptr, out_ptr, name: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, getattr(libdevice, name)(tl.load(x_ptr + at)))

@triton.jit
def total(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + at)) + tl.cdiv(N, 3))

@triton.autotune(configs=[triton.Config({"BLOCK": 4}), triton.Config({"BLOCK": 8})], key=[])
@triton.jit
def block(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, BLOCK)
""")
sys.path.insert(0, str(path.parent))
import kernels, torch
'''


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", torch.tanh),
        ("exp", torch.exp),
        ("exp2", torch.exp2),
        ("log", torch.log),
        ("log1p", torch.log1p),
        ("sqrt", torch.sqrt),
        ("rint", torch.round),
        ("round", lambda x: torch.where(x >= 0, torch.floor(x + 0.5), torch.ceil(x - 0.5))),
        ("fast_expf", torch.exp),
        ("fast_logf", torch.log),
    ],
)
def test_libdevice_computes_what_torch_computes(
    interpreted: dict[str, Any], name: str, function: Any
) -> None:
    """Each function of libdevice that the interpreter lacks equals PyTorch's."""
    x = torch.tensor(interpreted["x"])
    positive = name in ("log", "fast_logf", "sqrt", "log1p")
    expected = function(x.abs() if positive else x)
    torch.testing.assert_close(torch.tensor(interpreted[name]), expected)


@pytest.fixture(scope="module")
def interpreted(warm: WarmPython) -> dict[str, Any]:
    """The results of interpreted kernels: libdevice's functions of eight ``x``, of which logs and
    roots take the magnitudes, ``total`` of 0 to 7, and the ``block`` of the autotuner.
    """
    code = """
    x = torch.tensor([-2.5, -1.5, -0.7, 0.5, 0.3, 1.5, 2.5, 3.25])
    results = {"x": x.tolist()}
    for name in set(LIBDEVICE) - {"copysign"}:
        argument = x.abs() if name in ("log", "fast_logf", "sqrt", "log1p") else x
        out = torch.empty(8)
        kernels.unary[(1,)](argument, out, name, 8)
        results[name] = out.tolist()
    out = torch.empty(1)
    kernels.total[(1,)](torch.arange(8.0), out, 8)
    results["total"] = out.item()
    kernels.block[(1,)](out)
    results["block"] = out.item()
    print(json.dumps(results))
    """
    results: dict[str, Any] = run_python(warm, KERNELS + textwrap.dedent(code))
    return results


def test_tritons_own_functions_are_interpreted(interpreted: dict[str, Any]) -> None:
    """``tl.sum`` and ``tl.cdiv`` work although Triton was imported before the platform."""
    assert interpreted["total"] == 28 + 3


def test_the_autotuner_takes_its_first_configuration(interpreted: dict[str, Any]) -> None:
    """Without a GPU's clock nothing is timed."""
    assert interpreted["block"] == 4


def test_what_is_remembered_of_types_is_what_triton_works_out(warm: WarmPython) -> None:
    """A scalar, a pointer and blocks of each type keep their own NumPy type, and a block of another
    element or shape is another; overflow is looked for in no kernel, and in debugging mode in all.
    """
    assert run_python(
        warm,
        """
        import dataclasses, itertools, json
        from sglang_musa_ext.cpu import stand_ins
        from sglang_musa_ext.patching import original_of
        stand_ins.prepare_process()
        import triton.language as tl
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        scalars = [tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.float16,
                   tl.bfloat16, tl.float32, tl.float64, tl.float8e5]
        elements = [*scalars, *map(tl.pointer_type, scalars)]
        wrong = []
        for _, element, shape in itertools.product("12", elements, [[4], [2, 4], [4, 2]]):
            fresh = tl.block_type(element, shape)
            for kept in (builder.get_block_ty(element, shape),
                         tl.block_type(tl.int16, shape).with_element_ty(element)):
                same = kept == fresh and kept.name == fresh.name and kept.numel == fresh.numel
                wrong += [] if same else [fresh.name]
            for each in (element, fresh):
                numpys = interpreter._get_np_dtype(each)
                if numpys != original_of(interpreter._get_np_dtype)(each):
                    wrong.append(each.name)
        checked = [builder.options.sanitize_overflow]
        builder.options = dataclasses.replace(builder.options, debug=True)
        stand_ins._skip_unread_checks()
        print(json.dumps([wrong, *checked, builder.options.sanitize_overflow]))
        """,
    ) == [[], False, True]


def test_triton_of_musas_stack_is_prepared(warm: WarmPython) -> None:
    """Triton 3.2 makes the types of blocks without the method that newer releases have for it."""
    assert run_python(
        warm,
        """
        import json
        import triton.language as tl
        for each in tl.block_type.__mro__:
            if "with_element_ty" in vars(each):
                del each.with_element_ty
        from sglang_musa_ext.cpu import stand_ins
        stand_ins.prepare_process()
        print(json.dumps(not hasattr(tl.block_type, "with_element_ty")))
        """,
    )


# Host and device memory
# ---------------------------------------------------------------------------


def test_pages_are_copied_slot_by_slot() -> None:
    """Each layer's slots arrive where they were sent, in any order, and no others change."""
    source = [torch.randn(8, 2, 3) for _ in range(2)]
    target = [torch.zeros(6, 2, 3) for _ in range(2)]
    there, here = torch.tensor([6, 7, 0, 1]), torch.tensor([2, 3, 4, 5])
    host_memory.transfer_kv_direct(source, target, there, here, page_size=2)
    for layer, copied in zip(source, target, strict=True):
        torch.testing.assert_close(copied[2:], layer[[6, 7, 0, 1]])
        assert not copied[:2].any()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory can be pinned here")
def test_a_module_that_asks_for_pinned_memory_gets_ordinary_memory() -> None:
    """A view of PyTorch gives the tensor that was asked for, unpinned; PyTorch's own functions stay
    the ones that its device contexts know.
    """
    of_pytorch = {name: getattr(torch, name) for name in host_memory.PINNING_FACTORIES}
    view = host_memory.UnpinnedTorch("torch")
    assert view.tensor([1, 2], dtype=torch.int32, pin_memory=True).tolist() == [1, 2]
    assert view.arange(3, pin_memory=True).tolist() == [0, 1, 2]
    assert view.float32 is torch.float32
    assert {name: getattr(torch, name) for name in host_memory.PINNING_FACTORIES} == of_pytorch
    with torch.device("meta"):
        assert view.empty(2, pin_memory=True).is_meta


PLATFORM = """
import json
import sys
from types import SimpleNamespace
from sglang.srt.platforms import current_platform as platform
"""


@pytest.fixture(scope="module")
def platform_facts(warm: WarmPython) -> dict[str, Any]:
    """The platform that SGLang finds under ``SGLANG_PLATFORM=musa_reference``."""
    code = """
    open_ = dict(attention_backend="intel_amx", page_size=None, disable_cuda_graph=False,
                 mem_fraction_static=None, max_total_tokens=None, disable_hybrid_swa_memory=False,
                 lora_backend="csgmv", hicache_io_backend="kernel", hicache_mem_layout="page_first")
    chosen = dict(attention_backend="torch_native", page_size=1, disable_cuda_graph=True,
                  mem_fraction_static=0.5, max_total_tokens=100, disable_hybrid_swa_memory=True,
                  lora_backend="triton", hicache_io_backend="direct",
                  hicache_mem_layout="page_first_direct")
    defaults = {}
    for name, values in (("open", open_), ("chosen", chosen)):
        arguments = SimpleNamespace(**values)
        platform.apply_server_args_defaults(arguments)
        defaults[name] = vars(arguments)
    import sgl_kernel
    from sglang.srt.platforms.interface import SRTPlatform
    from sglang.srt.utils import get_device
    from sglang_musa_ext.cpu import platform as cpu_platform
    platform.init_backend()
    names = cpu_platform.MUSA_KERNEL_MODULES
    modules = [sys.modules[name] for name in names if name in sys.modules]
    has_plain_pool = not hasattr(SRTPlatform, "get_kv_pool_cls")
    algorithms = ("EAGLE", "NGRAM", "UNHEARD_OF")
    free, total = platform.get_available_memory()
    print(json.dumps({
        "class": type(platform).__name__,
        "out_of_tree": platform.is_out_of_tree(),
        "device": get_device(),
        "collectives": platform.get_torch_distributed_backend_str(),
        "sgl_kernel": sgl_kernel.__doc__,
        "memory_adds_up": 0 < free < total == platform.get_device_total_memory(),
        "pools": [platform.get_kv_pool_cls(kind="mha"), platform.get_mha_kv_pool_cls().__name__,
                  platform.get_paged_allocator_cls().__name__],
        "defaults": defaults,
        "unchanged": defaults["chosen"] == chosen,
        "plain_pool": defaults["open"]["disable_hybrid_swa_memory"] == has_plain_pool,
        "algorithms": [platform.supports_speculative_algorithm(name) for name in algorithms],
        "kernels_of_musa": [module._is_musa for module in modules],
        "trees": [module.sgl_build_tree_kernel_efficient.__module__ for module in modules],
    }))
    """
    facts: dict[str, Any] = run_python(warm, PLATFORM + textwrap.dedent(code), UNDER_THE_PLATFORM)
    return facts


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("class", "CpuReferencePlatform"),
        ("out_of_tree", True),
        ("device", "cpu"),
        ("collectives", "gloo"),
        ("memory_adds_up", True),
        ("pools", [None, "MHATokenToKVPool", "PagedTokenToKVPoolAllocator"]),
        ("plain_pool", True),
        ("algorithms", [True, True, False]),
    ],
)
def test_sglang_finds_a_cpu_outside_its_tree(
    platform_facts: dict[str, Any], fact: str, expected: Any
) -> None:
    """The platform answers SGLang's questions with the CPU and SGLang's own pools."""
    assert platform_facts[fact] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attention_backend", "fa3"),
        ("page_size", 64),
        ("disable_cuda_graph", True),
        ("lora_backend", "torch_native"),
        ("hicache_io_backend", "direct"),
        ("hicache_mem_layout", "layer_first"),
    ],
)
def test_open_arguments_get_the_platforms_defaults(
    platform_facts: dict[str, Any], name: str, expected: Any
) -> None:
    """Options left to SGLang are chosen for FA3 on a CPU."""
    assert platform_facts["defaults"]["open"][name] == expected


def test_the_users_arguments_win(platform_facts: dict[str, Any]) -> None:
    """The user's choices stay, ``torch_native`` among them."""
    assert platform_facts["unchanged"]


def test_speculative_decoding_takes_the_kernels_of_musa(platform_facts: dict[str, Any]) -> None:
    """Every module that chooses among known devices takes the way to the stand-ins."""
    assert platform_facts["kernels_of_musa"]
    assert all(platform_facts["kernels_of_musa"])
    assert set(platform_facts["trees"]) == {"sglang_musa_ext.cpu.trees"}


# In forks of a process that has imported SGLang under the platform
# -----------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to wait for")
def test_a_wait_for_cuda_returns_at_once(engines: EngineServer) -> None:
    """Without a CUDA device, upstream's unconditional waits for one do not raise."""
    engines.call(torch.cuda.synchronize)


def rotate_no_tokens() -> tuple[list[list[int]], str]:
    """Rotate the queries and keys of no tokens: their shapes, and what SGLang's own method says."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.platforms import current_platform

    current_platform.init_backend()
    embedding = RotaryEmbedding(16, 16, 64, 10000, True, torch.float32)
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 64), torch.empty(0, 32)
    rotated = [list(each.shape) for each in embedding.forward_native(*nothing)]
    own: Any = RotaryEmbedding.forward_native
    while hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    try:
        own(embedding, *nothing)
    except RuntimeError as error:
        return rotated, str(error)
    return rotated, ""


def test_an_idle_rank_rotates_nothing(engines: EngineServer) -> None:
    """No tokens come back as they are, where SGLang's own method cannot tell how many heads."""
    rotated, said = engines.call(rotate_no_tokens)
    assert rotated == [[0, 64], [0, 32]]
    assert "0 elements" in said


def merge_in_both_ways() -> bool:
    """Compare SGLang's merge of states under the platform with its Triton kernel, interpreted.

    Rows of the first attention have no key by -inf, and rows of the second by +inf. Returns whether
    the two are different functions.
    """
    from sglang.kernels.ops.attention.merge_state import merge_state_triton
    from sglang.srt.layers.attention import merge_state as module
    from sglang.srt.platforms import current_platform

    current_platform.init_backend()
    generator = torch.Generator().manual_seed(0)
    lse = torch.randn(2, 5, 3, generator=generator) * 3
    lse[0, 1], lse[1, 2] = -torch.inf, torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.randn(2, 5, 3, 24, generator=generator).to(dtype)
        merged = module.merge_state(out[0], lse[0], out[1], lse[1])
        torch.testing.assert_close(merged, merge_state_triton(out[0], lse[0], out[1], lse[1]))
    return module.merge_state_triton is not merge_state_triton


def test_states_merge_as_sglangs_own_kernel_merges_them(engines: EngineServer) -> None:
    """SGLang merges with PyTorch, and gets what its Triton kernel gives in the interpreter."""
    assert engines.call(merge_in_both_ways)


def load_nccl() -> str:
    """Load NCCL as SGLang does beside a torch built for CUDA; return why that fails."""
    from sglang.srt.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    torch.version.cuda = "13.0"
    with pytest.raises(OSError) as error:  # noqa: PT011 (the words are the caller's)
        NCCLLibrary()
    return str(error.value)


def test_no_rank_on_a_cpu_loads_nccl(engines: EngineServer) -> None:
    """Beside a torch built for CUDA too, SGLang finds no library of NCCL that it could load."""
    assert stand_ins.ENVIRONMENT["SGLANG_NCCL_SO_PATH"] in engines.call(load_nccl)


def defaults_on(machine: str) -> tuple[str, list[str]]:
    """Apply the platform's defaults to torch_native on ``machine``; return backend and log."""
    from sglang.srt.platforms import current_platform

    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return True

    logging.getLogger("sglang_musa_ext.cpu.platform").addFilter(keep)
    system.machine = lambda: machine
    arguments = SimpleNamespace(
        attention_backend="torch_native",
        page_size=1,
        disable_cuda_graph=True,
        mem_fraction_static=0.5,
        max_total_tokens=100,
        disable_hybrid_swa_memory=True,
        lora_backend="csgmv",
        hicache_io_backend="kernel",
        hicache_mem_layout="layer_first",
    )
    current_platform.apply_server_args_defaults(arguments)
    return arguments.attention_backend, said


@pytest.mark.parametrize(("machine", "warned"), [("aarch64", True), ("x86_64", False)])
def test_sglangs_choice_for_arm_is_pointed_out(
    engines: EngineServer, machine: str, warned: bool
) -> None:
    """On ARM, torch_native may be SGLang's choice or the user's: it stays, with a word about it."""
    backend, said = engines.call(defaults_on, machine)
    assert backend == "torch_native"
    assert any("--attention-backend fa3" in line for line in said) is warned


# Not importlib.util's find_spec, which sees the stand-in that another test may have installed here.
@pytest.mark.skipif(
    importlib.machinery.PathFinder.find_spec("sgl_kernel") is not None,
    reason="sgl_kernel is installed",
)
def test_the_stand_in_of_sgl_kernel_is_what_sglang_imports(platform_facts: dict[str, Any]) -> None:
    """Under the platform, where ``sgl_kernel`` is missing, ours is imported."""
    assert "Stand-in" in platform_facts["sgl_kernel"]
