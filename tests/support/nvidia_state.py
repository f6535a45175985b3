"""The state of an SGLang process on an NVIDIA GPU: its FA3 backends and their code, as JSON.

``python -I -S nvidia_state.py REQUEST`` runs this alone, without site-packages: REQUEST is a JSON
file, see :func:`main`. Of this package it imports nothing: whether anything of it is loaded is for
SGLang and torch to decide.
"""

from __future__ import annotations

import builtins
import enum
import importlib
import inspect
import json
import logging
import os
import re
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

LIBRARIES = ("sgl_kernel", "flashinfer", "torchvision")
"""Imports of SGLang on an NVIDIA GPU, and those without a build beside a CPU's torch."""
PAGE_SIZE, SPECULATIVE_STEPS, TOPK = 64, 3, 1


# --- what stands in for the GPU and its libraries -------------------------------------------------


class _Anything(type):
    """A class whose attributes are such classes too, as modules need them at import."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _anything(name)


def _anything(name: str) -> type:
    return _Anything(name, (), {"__init__": lambda self, *_, **__: None})


class _InterpolationMode(enum.Enum):
    """torchvision's names of resampling methods; transformers makes a table of them at import."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _StandInModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _InterpolationMode if name == "InterpolationMode" else _anything(name)
        setattr(self, name, value)
        return value


class _StandInFinder(MetaPathFinder, Loader):
    """Finds every module of the libraries that are not here; asked last."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True)
            if fullname.partition(".")[0] in LIBRARIES
            else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__version__"] = "0.0.0"
        if module.__name__ == "sgl_kernel.flash_attn":
            for function in (
                flash_attn_with_kvcache,
                flash_attn_varlen_func,
                get_scheduler_metadata,
            ):
                setattr(module, function.__name__, function)


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, **arguments: Any) -> None:
    """Stands for FA3's function, which nothing here calls; so do the next two."""


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, return_softmax_lse: bool = False, **arguments: Any
) -> None: ...


def get_scheduler_metadata(batch_size: int, **arguments: Any) -> None: ...


def pretend_hopper(torch: Any) -> None:
    """Let this process's torch describe one H100 that it cannot use."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448, warp_size=32, L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name, "get_device_properties": properties,
        "synchronize": None,
    }  # fmt: skip
    torch.version.cuda = "12.8"
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


# --- what SGLang builds ---------------------------------------------------------------------------


def runner(torch: Any) -> Any:
    """A stand-in of upstream's model runner, as its FA3 backends read it when built."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    arguments = ServerArgs(
        model_path="dummy", device="cuda", page_size=PAGE_SIZE, attention_backend="fa3",
        speculative_algorithm="EAGLE", speculative_num_steps=SPECULATIVE_STEPS,
        speculative_eagle_topk=TOPK,
        speculative_num_draft_tokens=SPECULATIVE_STEPS + 1,
    )  # fmt: skip
    set_global_server_args_for_scheduler(arguments)
    config = SimpleNamespace(
        attention_arch=AttentionArch.MHA, dtype=torch.bfloat16, context_len=512, head_dim=128,
        is_encoder_decoder=False,
        is_local_attention_model=False, hf_config=SimpleNamespace(), get_num_kv_heads=lambda _: 2,
        hf_text_config=SimpleNamespace(num_attention_heads=8),
    )  # fmt: skip
    # Only its device is read: a CPU build of torch cannot make a tensor there.
    table = SimpleNamespace(device=torch.device("cuda", 0), shape=(4, 512))
    return SimpleNamespace(
        server_args=arguments, model_config=config, device="cuda", page_size=PAGE_SIZE,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=4),
        token_to_kv_pool=SimpleNamespace(), token_to_kv_pool_allocator=SimpleNamespace(),
        kv_index_translator=SimpleNamespace(is_translating=False, reads_are_translated=False),
        kv_cache_dtype=torch.bfloat16, kv_cache_dtype_str="auto", sliding_window_size=None,
        attention_chunk_size=None, is_draft_worker=False, use_mla_backend=False, attn_cp_size=1,
        tp_size=1,
        ps=SimpleNamespace(tp_size=1, attn_tp_size=1, attn_cp_size=1),
        spec_algorithm=SpeculativeAlgorithm.from_string("EAGLE"), draft_attention_backend=None,
    )  # fmt: skip


def build(torch: Any) -> dict[str, Any]:
    """Build what ``--attention-backend fa3`` and EAGLE's draft model build, as SGLang does."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    model_runner = runner(torch)
    factory: Any = object.__new__(DraftBackendFactory)
    vars(factory).update(
        draft_model_runner=model_runner, server_args=model_runner.server_args, topk=TOPK,
        speculative_num_steps=SPECULATIVE_STEPS, draft_attn_backend=None,
    )  # fmt: skip
    decode, extend = factory._create_fa3_decode_backend(), factory._create_fa3_prefill_backend()
    # From 0.5.18 on they come with a name.
    decode, extend = (made[-1] if isinstance(made, tuple) else made for made in (decode, extend))
    children = {
        f"draft decode, step {index}": child for index, child in enumerate(decode.attn_backends)
    }
    target = ATTENTION_BACKENDS["fa3"](model_runner)
    return {"target": target, "draft decode": decode, "draft extend": extend, **children}


# --- what is said of it ---------------------------------------------------------------------------


def described_object(thing: Any) -> dict[str, Any]:
    """The classes of an object, and its attributes with their types."""
    mro = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(thing).__mro__]
    return {
        "classes": mro,
        "attributes": {name: described(value) for name, value in sorted(vars(thing).items())},
    }


def described(value: Any, depth: int = 3) -> Any:
    """Describe a value across processes: functions by code, classes by name, data as it is."""
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        value = value.__func__
    if isinstance(value, str | int | float | None):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # Generated docstrings show addresses.
    if isinstance(value, tuple | list | set | frozenset | dict) and depth:
        items = value.items() if isinstance(value, dict) else value
        rows = [described(item, depth - 1) for item in items]
        return [
            type(value).__name__,
            rows if isinstance(value, tuple | list) else sorted(rows, key=json.dumps),
        ]
    # Lazy objects of libraries would make up whatever is asked of them.
    wrapped = inspect.getattr_static(value, "__wrapped__", None)
    code = value.__code__ if isinstance(value, types.FunctionType) else None
    names = [getattr(value, name, "") for name in ("__module__", "__qualname__")]
    names = [name for name in names if isinstance(name, str)]
    place = [code.co_filename, code.co_firstlineno] if isinstance(code, types.CodeType) else []
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return [kind, *names, *place, *([described(wrapped)] if wrapped is not None else [])]


def described_module(name: str) -> Any:
    """Every function, class and small value of a module, classes with their members."""
    try:
        module = importlib.import_module(name)
    except (
        Exception
    ) as error:  # What is not for this GPU does not import, and says so in both environments.
        return f"{type(error).__name__}: {error}"
    attributes: dict[str, Any] = {}
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("__"):
            continue
        attributes[attribute] = described(value)
        if isinstance(value, type):
            bases = [f"{cls.__module__}.{cls.__qualname__}" for cls in value.__mro__]
            members = {
                member: described(inner)
                for member, inner in sorted(vars(value).items())
                if not _is_volatile(inner)
            }
            attributes[attribute] = {"bases": bases, "members": members}
        elif isinstance(value, dict):
            attributes[attribute] = {
                json.dumps(described(key)): described(inner) for key, inner in value.items()
            }
    return attributes


def _is_volatile(value: Any) -> bool:
    """Return whether a value says nothing of SGLang: caches, and what Python keeps for itself."""
    return type(value).__name__ in ("getset_descriptor", "_abc_data", "member_descriptor")


def main(request: Path) -> None:
    """Answer a request, a JSON object.

    ``path``: folders to import from, after Python's own library. ``modules``: names of modules to
    describe. ``stand_ins``: whether there is no GPU, and one has to be pretended. ``output``: the
    file for the answer.
    """
    asked = json.loads(request.read_text(encoding="utf-8"))
    before = dict(os.environ)
    sys.path += asked["path"]
    if asked["stand_ins"]:
        sys.meta_path.append(_StandInFinder())
    torch: Any = importlib.import_module("torch")  # Here torch calls its entry points.
    if asked["stand_ins"]:
        pretend_hopper(torch)
    plugins: Any = importlib.import_module("sglang.srt.plugins")
    plugins.load_plugins()  # As in the engine and in the scheduler, before anything else of SGLang.
    backends = {name: described_object(backend) for name, backend in build(torch).items()}
    modules = {name: described_module(name) for name in asked["modules"]}
    finders = [getattr(each, "__qualname__", type(each).__qualname__) for each in sys.meta_path]
    ours = sorted(name for name in sys.modules if name.startswith("sglang_musa_ext"))
    changed = {
        name: os.environ.get(name)
        for name in sorted({*before, *os.environ})
        if os.environ.get(name) != before.get(name)
    }
    answer = {
        "backends": backends,
        "modules": modules,
        "meta path": finders,
        "imported": sorted(set(sys.modules).difference(ours)),
        "ours": ours,
        "environment": changed,
        "hooks": list(map(described, (sys.excepthook, sys.displayhook, builtins.__import__))),
        "log": [type(handler).__qualname__ for handler in logging.getLogger().handlers],
    }
    Path(asked["output"]).write_text(json.dumps(answer, indent=1, sort_keys=True), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
