"""Stand-ins that let SGLang's engine be imported and run where there is no accelerator.

Everything here acts on the running process only, through environment variables and ``sys.modules``,
and only when the CPU reference platform asks for it by :func:`prepare_process`. A stand-in is used
only where the real library is absent or cannot work on a CPU. The module imports nothing of SGLang,
because SGLang's own imports need what it prepares.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from sglang_musa_ext import patching
from sglang_musa_ext.cpu import trees
from sglang_musa_ext.cpu.host_memory import pin_nothing

Array = npt.NDArray[Any]

# What every process of the engine needs in its environment; children inherit it.
ENVIRONMENT = {
    # Triton has no CPU compiler: SGLang's allocator and page-table kernels run in its interpreter.
    "TRITON_INTERPRET": "1",
    # A reference on the CPU must not be half on a GPU that happens to be there.
    "CUDA_VISIBLE_DEVICES": "",
    # A kernel that reads raw addresses moves accepted drafts in the KV cache, unless this is set.
    "SGLANG_NATIVE_MOVE_KV_CACHE": "1",
    # The library that SGLang loads NCCL from. A torch built for CUDA brings NCCL, and up to 0.5.22
    # SGLang gives ranks a communicator of it wherever it loads, which asks CUDA for a device "cpu".
    "SGLANG_NCCL_SO_PATH": "no NCCL for ranks on a CPU",
}


@functools.cache
def prepare_process() -> None:
    """Put all in place that SGLang's imports and kernels need on a CPU; repeating is harmless.

    SGLang reaches this through the platform entry point, early in its own import. Up to 0.5.20 it
    imports ``torchvision``, and up to 0.5.12 ``sgl_kernel``, before it looks for platforms: there,
    call this before the first import of SGLang, in every process that is not forked from this one.
    """
    os.environ.update(ENVIRONMENT)
    install_missing_modules()
    ignore_waits_for_cuda()
    pin_nothing()
    if importlib.util.find_spec("triton") is not None:
        interpret_triton()


# Modules -----------------------------------------------------------------------------------------


def install_missing_modules() -> None:
    """Install the stand-in of each library of which no real one can be imported."""
    if not _is_available("sgl_kernel"):
        _install("sgl_kernel", sgl_kernel_modules())
    if not _is_available("torchvision"):
        _install("torchvision", torchvision_modules())


def _is_available(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _install(name: str, contents: dict[str, dict[str, Any]]) -> None:
    """Create the modules of ``contents`` (dotted name -> attributes), parents first."""
    for dotted, attributes in contents.items():
        module = ModuleType(
            dotted, f"Stand-in of {name} for the CPU reference platform of sglang_musa_ext."
        )
        # Without a spec, importlib.util.find_spec raises for whoever probes for the library.
        module.__spec__ = ModuleSpec(dotted, loader=None, is_package=True)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[dotted] = module
        parent, _, child = dotted.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def ignore_waits_for_cuda() -> None:
    """Let ``torch.cuda.synchronize()`` return at once, where it would raise for want of CUDA.

    Why: models that share their embeddings with a draft model call it after that, whatever the
    device. Until: 0.5.15.
    """
    if not torch.cuda.is_available():
        torch.cuda.synchronize = _nothing_to_wait_for


def _nothing_to_wait_for(device: object = None) -> None:
    """Stand for ``torch.cuda.synchronize``: what the CPU was told to do is done."""


def torchvision_modules() -> dict[str, dict[str, Any]]:
    """Return a ``torchvision`` of the names that are imported on the way to a text model.

    Why: PyPI has only builds for CUDA, which do not load beside a CPU build of torch; and SGLang
    registers image processors with transformers, which transformers allows only where
    ``torchvision`` can be found. Since: transformers 5 and every SGLang (``io.decode_jpeg`` up to
    0.5.20; ``transforms`` from 0.5.16). Remove when: SGLang starts a text model without
    torchvision.
    """
    return {
        # transformers compares the version, for features that are not used here.
        "torchvision": {"__version__": "0.0.0"},
        "torchvision.io": {
            "ImageReadMode": object,
            **_absent("torchvision", "decode_image", "decode_jpeg"),
        },
        "torchvision.transforms": {"InterpolationMode": InterpolationMode},
        "torchvision.transforms.functional": {
            "InterpolationMode": InterpolationMode,
            **_absent("torchvision", "pil_to_tensor"),
        },
        "torchvision.transforms.v2": {},
        "torchvision.transforms.v2.functional": {},
    }


class InterpolationMode(enum.Enum):
    """torchvision's names of resampling methods; transformers makes a table of them at import."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _absent(library: str, *names: str) -> dict[str, Callable[..., Any]]:
    """Return functions that can be imported and say, when called, that there is only a stand-in."""
    return {name: functools.partial(_refuse, library, name) for name in names}


def _refuse(library: str, name: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{library}.{name} was called, and the CPU reference platform has only a stand-in of "
        f"{library} without it. Install a {library} that works on this machine, or serve a model "
        "that does not need it."
    )


def sgl_kernel_modules() -> dict[str, dict[str, Any]]:
    """Return the ``sgl_kernel`` of the CPU reference: dotted module name -> attributes.

    Why: ``sgl_kernel`` exists for CUDA, ROCm and MUSA; upstream's attention backend imports it at
    module level. No module answers to names it lacks: SGLang probes ``sgl_kernel`` for optional
    parts.
    """
    return {
        "sgl_kernel": {
            "merge_state_v2": merge_state_v2,
            "build_tree_kernel_efficient": trees.build_tree_kernel_efficient,
            "verify_tree_greedy": trees.verify_tree_greedy,
            # For sampling among drafts; up to 0.5.13 upstream imports it with the greedy one.
            **_absent(
                "sgl_kernel",
                "top_k_renorm_prob",
                "top_p_renorm_prob",
                "tree_speculative_sampling_target_only",
            ),
        },
        "sgl_kernel.speculative": {
            "reconstruct_indices_from_tree_mask": trees.reconstruct_indices_from_tree_mask
        },
        "sgl_kernel.flash_attn": {name: _reference_kernel(name) for name in _FLASH_ATTN},
        # Up to 0.5.12 the host pools import these unconditionally; they serve hierarchical caches
        # on a GPU.
        "sgl_kernel.kvcacheio": _absent("sgl_kernel", *_KVCACHEIO),
    }


_FLASH_ATTN = ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata")
_KVCACHEIO = (
    "transfer_kv_all_layer",
    "transfer_kv_all_layer_direct_lf_pf",
    "transfer_kv_all_layer_lf_pf",
    "transfer_kv_all_layer_lf_ph",
    "transfer_kv_all_layer_mla",
    "transfer_kv_all_layer_mla_lf_pf",
    "transfer_kv_direct",
    "transfer_kv_per_layer",
    "transfer_kv_per_layer_direct_pf_lf",
    "transfer_kv_per_layer_mla",
    "transfer_kv_per_layer_mla_pf_lf",
    "transfer_kv_per_layer_pf_lf",
    "transfer_kv_per_layer_ph_lf",
)


def _reference_kernel(name: str) -> Callable[..., Any]:
    """Return the reference kernel ``name``, whose module is imported at the first call."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        from sglang_musa_ext.kernels import reference

        return getattr(reference, name)(*args, **kwargs)

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def merge_state_v2(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attentions of the same queries over disjoint keys.

    Args:
        v_a, v_b: outputs, ``(tokens, heads, head_dim)``, any floating dtype.
        s_a, s_b: log-sum-exp of the scores, ``(tokens, heads)`` float32; ``-inf`` (or ``+inf``, as
        some
            kernels write) where there was no key.
        v_merged, s_merged: written in place when given, else allocated.

    Returns:
        The merged output (dtype of ``v_a``) and log-sum-exp (float32). A row without any key is
        zero and ``-inf``.
    """
    scores = torch.stack([s_a, s_b]).float()
    scores = scores.masked_fill(scores == torch.inf, -torch.inf)
    total = torch.logsumexp(scores, dim=0)
    weights = torch.exp(scores - total).nan_to_num(0.0).unsqueeze(-1)
    # Rows without keys may hold anything, NaN too: they are replaced, not multiplied by zero.
    values = torch.stack([v_a, v_b]).float().masked_fill(weights == 0, 0.0)
    merged = (weights * values).sum(dim=0).to(v_a.dtype)
    return _deliver(merged, v_merged), _deliver(total, s_merged)


def _deliver(value: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return value if out is None else out.copy_(value)


# Triton's interpreter ----------------------------------------------------------------------------


def interpret_triton() -> None:
    """Make every Triton kernel run in the interpreter, with what it lacks."""
    _reinterpret_standard_library()
    _install_libdevice()
    _take_first_config()
    _keep_language_patched()
    _compute_types_once()
    _skip_unread_checks()


def _reinterpret_standard_library() -> None:
    """Decorate Triton's device functions again if Triton came before ``TRITON_INTERPRET``.

    SGLang imports Triton shortly before it looks for platforms. Kernels are decorated later and see
    the variable, but ``tl.sum``, ``tl.cdiv`` and their like would remain functions for the
    compiler.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if isinstance(tl.standard.cdiv, InterpretedFunction):
        return
    for name in ("standard", "random"):
        importlib.reload(importlib.import_module(f"triton.language.{name}"))
    importlib.reload(tl)


def _keep_language_patched() -> None:
    """Let the interpreter put itself behind Triton's language once, and not at every call of a
    device function, which takes longer than most calls do. Nothing here compiles, so nobody misses
    the language as it was.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    behind: set[int] = set()
    nothing_to_restore = SimpleNamespace(restore=lambda: None)

    def patching_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def patch_once(function: Any) -> Any:
            """Patch what ``function`` sees of the language, unless that was done."""
            values = function.__globals__.values()
            seen = {id(value) for value in values if value is tl or value is tl.core}
            if not seen <= behind:
                patch(function)
                behind.update(seen)
            return nothing_to_restore

        return patch_once

    patching.wrap(interpreter, "_patch_lang", patching_once)


def _compute_types_once() -> None:
    """Let the interpreter remember what it works out of a type at every operation: NumPy's type of
    it, for which it makes a table each time, and the types of blocks.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patching.wrap(
        interpreter, "_get_np_dtype", lambda original: _once(original, attrgetter("name"))
    )
    patching.wrap(
        interpreter.InterpreterBuilder,
        "get_block_ty",
        lambda original: _once(original, lambda _, element, shape: (element.name, tuple(shape))),
    )
    if hasattr(tl.block_type, "with_element_ty"):  # Triton 3.2, MUSA's, has no such method.
        patching.wrap(
            tl.block_type,
            "with_element_ty",
            lambda original: _once(original, lambda block, type_: (type_.name, tuple(block.shape))),
        )


def _once(function: Callable[..., Any], key_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, called once for all arguments of which ``key_of`` returns the same."""
    known: dict[Any, Any] = {}

    def call(*args: Any) -> Any:
        key = key_of(*args)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return call


def _skip_unread_checks() -> None:
    """Ask for checks of integer overflow in debugging mode alone, as nothing else reads their
    results; they take a third of the interpreter's time.
    """
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)


# libdevice's names of what NumPy can compute. ``fast_*`` are approximations on a GPU.
LIBDEVICE: dict[str, Callable[..., Array]] = {
    "tanh": np.tanh,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rint": np.rint,
    # C's round takes halves away from zero, NumPy's to the even neighbour.
    "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
    "copysign": np.copysign,
    "fast_expf": np.exp,
    "fast_logf": np.log,
}


def _install_libdevice() -> None:
    """Give the interpreter libdevice's functions, which exist only as LLVM bitcode for a GPU."""
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as cuda_libdevice

    for name, function in LIBDEVICE.items():
        for module in (libdevice, cuda_libdevice):
            setattr(module, name, _elementwise(name, function))


def _elementwise(name: str, function: Callable[..., Array]) -> Callable[..., Any]:
    """Return ``function`` on NumPy arrays as a device function on interpreted tensors."""

    def device_function(*args: Any, **_semantic: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        first = args[0]
        # bfloat16 has no NumPy type: the interpreter keeps its bits in integers.
        if first.dtype == tl.bfloat16:
            raise TypeError(
                f"libdevice.{name} takes float32 or float64 under the interpreter, got bfloat16"
            )
        result = function(*(arg.handle.data for arg in args)).astype(first.handle.data.dtype)
        return tl.core.tensor(TensorHandle(result, first.handle.dtype), first.type)

    device_function.__name__ = device_function.__qualname__ = name
    return device_function


def _take_first_config() -> None:
    """Let the autotuner take its first configuration: on a CPU it has no clock to time with."""
    from triton.runtime.autotuner import Autotuner

    def first_config(self: Any, *_args: Any, config: Any, **_kwargs: Any) -> list[float]:
        return [0.0] if config is self.configs[0] else [1.0]

    Autotuner._bench = first_config
