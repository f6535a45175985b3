"""A stand-in of SGLang's kernel library as built for MUSA, with the names imported there.

No attribute is made up on demand: SGLang probes for optional parts.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch_musa._launch import launch

from sglang_musa_ext.cpu import trees

Tensor = torch.Tensor

# --- normalization, activation -------------------------------------------------------------------


def rmsnorm(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """Divide each row by its root mean square and scale it."""
    return _delivered(_normalized(input, weight.float(), eps), out)


def gemma_rmsnorm(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """Divide each row by its root mean square and scale it by one plus ``weight``."""
    return _delivered(_normalized(input, 1.0 + weight.float(), eps), out)


def fused_add_rmsnorm(
    input: Tensor,  # noqa: A002
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Add ``input`` to ``residual`` in place, and write the normalized sum to ``input``."""
    residual.copy_((input.float() + residual.float()).to(residual.dtype))
    input.copy_(_normalized(residual, weight.float(), eps))


def gemma_fused_add_rmsnorm(
    input: Tensor,  # noqa: A002
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Do the same with one plus ``weight``."""
    residual.copy_((input.float() + residual.float()).to(residual.dtype))
    input.copy_(_normalized(residual, 1.0 + weight.float(), eps))


def _normalized(rows: Tensor, scale: Tensor, eps: float) -> Tensor:
    exact = rows.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * scale).to(rows.dtype)


def silu_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: A002
    """Multiply SiLU of the first half of the last dimension by the second half."""
    gate, up = input.float().chunk(2, dim=-1)
    return _delivered((torch.nn.functional.silu(gate) * up).to(input.dtype), out)


def gelu_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: A002
    """Multiply GELU of the first half of the last dimension by the second half."""
    gate, up = input.float().chunk(2, dim=-1)
    return _delivered((torch.nn.functional.gelu(gate) * up).to(input.dtype), out)


def _delivered(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.copy_(value)


# --- attention ------------------------------------------------------------------------------------


def merge_state_v2(
    v_a: Tensor,
    s_a: Tensor,
    v_b: Tensor,
    s_b: Tensor,
    v_merged: Tensor | None = None,
    s_merged: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys: outputs ``(rows, heads, headdim)``, log-sum-exp
    ``(rows, heads)``.
    """
    first, second = (
        score.float().masked_fill(score == torch.inf, -torch.inf) for score in (s_a, s_b)
    )
    total = torch.logaddexp(first, second)
    shares = [torch.exp(score - total).nan_to_num(0.0).unsqueeze(-1) for score in (first, second)]
    parts = [
        value.float().masked_fill(share == 0, 0.0) * share
        for value, share in zip((v_a, v_b), shares, strict=True)
    ]
    return _delivered((parts[0] + parts[1]).to(v_a.dtype), v_merged), _delivered(total, s_merged)


def concat_mla_k(k: Tensor, k_nope: Tensor, k_rope: Tensor) -> None:
    """Write both parts of MLA's keys to ``k``; all heads share the rotated part."""
    k[..., : k_nope.shape[-1]].copy_(k_nope)
    k[..., k_nope.shape[-1] :].copy_(k_rope.expand(*k.shape[:-1], k_rope.shape[-1]))


def dsv3_fused_a_gemm(input: Tensor, weight: Tensor, output: Tensor | None = None) -> Tensor:  # noqa: A002
    """Multiply rows by a matrix."""
    return _delivered(input @ weight, output)


def dsv3_router_gemm(
    hidden_states: Tensor, router_weights: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multiply rows by the transposed router."""
    return (hidden_states.float() @ router_weights.float().t()).to(out_dtype)


# --- mixtures of experts --------------------------------------------------------------------------


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    cumsum_buffer: Tensor,
    pad_sorted_token_ids: bool = False,
    *_: Any,
) -> None:
    """Sort the tokens' choices by expert, each expert's padded to whole blocks."""
    launch(
        _align,
        topk_ids,
        num_experts,
        block_size,
        sorted_token_ids,
        experts_ids,
        num_tokens_post_pad,
    )


def _align(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
) -> None:
    chosen = topk_ids.flatten().long()
    padding = chosen.numel()
    sorted_token_ids.fill_(padding)
    place = block = 0
    # SGLang counts one expert more than there are: -1 stands for choices that another rank serves.
    for expert in range(-1, num_experts - 1):
        mine = (chosen == expert).nonzero().flatten()
        blocks = -(-mine.numel() // block_size)
        sorted_token_ids[place : place + mine.numel()] = mine.to(sorted_token_ids.dtype)
        experts_ids[block : block + blocks] = expert
        place, block = place + blocks * block_size, block + blocks
    num_tokens_post_pad.fill_(place)


def moe_sum_reduce(
    input_tensor: Tensor, output_tensor: Tensor, routed_scaling_factor: float = 0.0
) -> None:
    """Add up what a token's experts gave it, and scale the sum."""
    output_tensor.copy_(
        (input_tensor.float().sum(1) * routed_scaling_factor).to(output_tensor.dtype)
    )


def moe_sum(input_tensor: Tensor, output_tensor: Tensor) -> None:
    """Add up what a token's experts gave it."""
    output_tensor.copy_(input_tensor.float().sum(1).to(output_tensor.dtype))


# --- drafts ---------------------------------------------------------------------------------------


def build_tree_kernel_efficient(*args: Any, **kwargs: Any) -> None:
    """Write the trees that a draft model's beam search selected."""
    launch(trees.build_tree_kernel_efficient, *args, **kwargs)


def verify_tree_greedy(*args: Any, **kwargs: Any) -> None:
    """Follow each tree along the tokens that the target model would have chosen."""
    launch(trees.verify_tree_greedy, *args, **kwargs)


def weak_ref_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory, and keep that memory, which the real one does not."""
    return tensor.detach()


# --- what has names alone -------------------------------------------------------------------------


def _absent(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("the stand-in of sgl_kernel has this name for SGLang's imports alone")


top_k_renorm_prob = top_p_renorm_prob = tree_speculative_sampling_target_only = _absent
min_p_sampling_from_probs = top_k_top_p_sampling_from_probs = rotary_embedding = _absent
sgl_per_token_quant_fp8 = sgl_per_token_group_quant_8bit = sgl_per_token_group_quant_fp8 = _absent
