"""Refusals of the reference kernels: of what MATE refuses, with the argument and the remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sglang_musa_ext import policy


class KernelRefusal(Exception):
    """The kernels do not take this call; ``argument`` is wrong, and ``seen`` is what it was."""

    def __init__(self, argument: str, seen: object, expected: str, remedy: str) -> None:
        self.argument, self.seen = argument, seen
        super().__init__(f"{argument} is {seen}; expected {expected}. {remedy}")


class RefusedType(KernelRefusal, TypeError):
    """An argument has a dtype or type the kernels do not take."""


class RefusedValue(KernelRefusal, ValueError):
    """An argument has a shape, layout, device or value the kernels do not take."""


class RefusedFeature(KernelRefusal, NotImplementedError):
    """An argument asks for something the kernels, or this reference, cannot do."""


FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_release(
    release: policy.MateRelease,
    batch: int,
    headdim: int,
    headdim_v: int,
    arguments: Mapping[str, object],
) -> None:
    """Refuse what this release of MATE cannot do; an argument that is 0 or ``None`` is not used."""
    if not policy.mate_serves_head_dims(release, headdim, headdim_v):
        known = ", ".join(f"{qk}/{v}" for qk, v in policy.mate_head_dim_pairs(release))
        raise RefusedValue(
            "the pair of head dimensions",
            f"{headdim}/{headdim_v}",
            f"one that rounds up to one of {known}, at most 512",
            "Use another attention backend for this model.",
        )
    largest = policy.mate_largest_batch(release)
    if largest is not None and batch > largest:
        raise RefusedValue("batch_size", batch, f"at most {largest}", "Use a newer MATE.")
    for limit in policy.kernel_limits(release).values():
        refuse_set({name: arguments.get(name) for name in limit.arguments})


def head_ratio(heads_q: int, heads_kv: int) -> int:
    """Return how many query heads share a key head."""
    if heads_kv < 1 or heads_q % heads_kv:
        raise RefusedValue(
            "the number of query heads",
            f"{heads_q} for {heads_kv} key heads",
            "a multiple of the key heads",
            "Check the head counts and the tensor-parallel size.",
        )
    return heads_q // heads_kv


def check_index_vectors(vectors: dict[str, Tensor | None], length: int) -> None:
    """int32, contiguous, ``(length,)``: what MATE asks of every vector of lengths or offsets."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype != torch.int32:
            raise RefusedType(
                f"{name}.dtype", vector.dtype, "torch.int32", f"Pass {name}.to(torch.int32)."
            )
        if tuple(vector.shape) != (length,):
            raise RefusedValue(
                f"{name}.shape", tuple(vector.shape), f"({length},)", "It must fit the batch."
            )
        if not vector.is_contiguous():
            raise RefusedValue(
                f"{name}.stride()", vector.stride(), "(1,)", f"Pass {name}.contiguous()."
            )


def check_dtypes(q: Tensor, others: dict[str, Tensor | None], release: policy.MateRelease) -> None:
    """Refuse what is not of q's dtype, and any q that this release of MATE does not take."""
    names = policy.mate_dtypes(release)
    if q.dtype not in (torch.float32, *(getattr(torch, name) for name in names)):
        raise RefusedType(
            "q.dtype",
            q.dtype,
            f"one of {', '.join(names)} (and, in this reference, float32)",
            "Set the KV cache to auto or bf16 where it is fp8.",
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != q.dtype:
            raise RefusedType(
                f"{name}.dtype",
                tensor.dtype,
                f"q's own {q.dtype}",
                "Set the KV cache to auto or bf16.",
            )


def check_descales(
    q: Tensor, descales: dict[str, Tensor | None], shape: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Return the scales of an fp8 call, each float32 ``(batch, heads_kv)``; refuse any other.

    Half precision has none. ``None`` stands for 1.
    """
    if q.dtype not in FP8_DTYPES:
        refuse_set({**descales})
        return (None, None, None)
    for name, scale in descales.items():
        if scale is not None and (tuple(scale.shape) != shape or scale.dtype != torch.float32):
            seen = f"{tuple(scale.shape)} {scale.dtype}"
            raise RefusedValue(name, seen, f"{shape} torch.float32", "Expand the layer's scale.")
    return tuple(descales.values())


def check_devices(q: Tensor, others: dict[str, Tensor | None]) -> None:
    """Refuse what is on another device than q."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise RefusedValue(
                f"{name}.device", tensor.device, f"q's device {q.device}", "Move it there."
            )


def check_page_table(page_table: Tensor | None, batch: int | None) -> None:
    """``(batch, pages)`` int32; ``batch`` of ``None`` where ``cache_batch_idx`` picks the rows."""
    if page_table is None:
        return
    if page_table.dtype != torch.int32:
        raise RefusedType(
            "page_table.dtype", page_table.dtype, "torch.int32", "Pass page_table.to(torch.int32)."
        )
    if page_table.dim() != 2 or (batch is not None and page_table.shape[0] != batch):
        rows = "any" if batch is None else batch
        raise RefusedValue(
            "page_table.shape", tuple(page_table.shape), f"({rows}, pages)", "One row a request."
        )
    if not page_table.is_contiguous():
        raise RefusedValue(
            "page_table.stride()",
            page_table.stride(),
            "a contiguous page table",
            "Pass page_table.contiguous(); never copy the KV cache for it.",
        )


def check_cache_strides(k_cache: Tensor, v_cache: Tensor) -> None:
    """Refuse a cache whose head dimension is not contiguous."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise RefusedValue(
                f"{name}.stride(-1)", cache.stride(-1), "1", "Keep head dimensions contiguous."
            )


def check_keys(k: Tensor, v: Tensor, q: Tensor, dims: int) -> None:
    """Refuse keys and values that fit neither each other nor q."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise RefusedValue(
                f"{name}.dim()", tensor.dim(), f"{dims} dimensions", "See the docstring for shapes."
            )
    if k.shape[:-1] != v.shape[:-1]:
        raise RefusedValue(
            "v.shape",
            tuple(v.shape),
            f"k's {tuple(k.shape)} but for dim",
            "Pass one layer's tensors.",
        )
    if k.shape[-1] != q.shape[-1]:
        raise RefusedValue(
            "k's head dimension", k.shape[-1], f"q's {q.shape[-1]}", "Pass one layer's tensors."
        )


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Refuse sinks of another shape than ``(heads,)``, and another dtype than MATE's."""
    if sinks is None:
        return
    if tuple(sinks.shape) != (q.shape[-2],):
        raise RefusedValue(
            "sinks.shape",
            tuple(sinks.shape),
            f"({q.shape[-2]},)",
            "Shard the sinks like the heads.",
        )
    if sinks.dtype != torch.bfloat16 and not (sinks.dtype == q.dtype == torch.float32):
        raise RefusedType(
            "sinks.dtype",
            sinks.dtype,
            "torch.bfloat16 (or torch.float32 with float32 q)",
            "Convert them once, when the model loads.",
        )


def check_metadata(metadata: object, batch: int, release: policy.MateRelease) -> Tensor | None:
    """Return a plan that is long enough for the batch; refuse any other."""
    if metadata is None:
        return None
    if not isinstance(metadata, Tensor) or metadata.dtype != torch.int32:
        seen = metadata.dtype if isinstance(metadata, Tensor) else type(metadata).__name__
        raise RefusedType(
            "scheduler_metadata",
            seen,
            "an int32 tensor from get_scheduler_metadata",
            "(workspace, reuse) is for MLA.",
        )
    vector = policy.mate_plan_vector(release, batch)
    if metadata.dim() != 1 or metadata.shape[0] < 4 * vector:
        raise RefusedValue(
            "scheduler_metadata.shape",
            tuple(metadata.shape),
            f"a metadata buffer of at least 4 * {vector} values",
            "The metadata buffer is too small: it was computed for a smaller batch.",
        )
    return metadata


def check_capacity(name: str, counts: list[int], capacity: int) -> None:
    """Refuse lengths that the cache has no room for."""
    if any(not 0 <= count <= capacity for count in counts):
        raise RefusedValue(
            name, counts, f"lengths within the capacity {capacity}", "Check the page table's width."
        )


def refuse_set(arguments: dict[str, object]) -> None:
    """Refuse every argument that has a value."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value:
            raise RefusedFeature(name, "given", "None", f"The reference does not implement {name}.")


def refuse_context_parallelism(world_size: int, rank: int) -> None:
    """Refuse ranks of context parallelism."""
    if world_size != 1 or rank != 0:
        raise RefusedFeature(
            "cp_world_size",
            f"{world_size} (cp_rank {rank})",
            "1 (cp_rank 0)",
            "The reference does not implement interleaved context parallelism.",
        )
