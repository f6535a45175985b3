"""The gate of mixtures of experts."""

from __future__ import annotations

import torch


def moe_fused_gate(
    input: torch.Tensor,  # noqa: A002
    bias: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    renormalize: bool = True,
    apply_routed_scaling_factor_on_output: bool = False,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by biased sigmoid scores, at first groups of them by their two best.

    Args:
        input: router logits, ``(tokens, experts)``.
        bias: added to the scores for the choice alone, ``(experts,)``.
        num_expert_group: groups of equal size.
        topk_group: groups that a token may choose from.
        topk: experts a token gets, fused shared ones included.
        num_fused_shared_experts: experts behind the routed ones that every token gets.
        routed_scaling_factor: the share of a shared expert is the routed ones' sum over it.
        renormalize: whether the routed weights add up to 1.
        apply_routed_scaling_factor_on_output: whether weights are multiplied by it.

    Returns:
        Weights float32 and experts int32, both ``(tokens, topk)``.
    """
    tokens, experts = input.shape
    routed = topk - num_fused_shared_experts
    scores = input.float().sigmoid()
    biased = scores + bias.float()
    groups = biased.view(tokens, num_expert_group, -1)
    best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
    allowed = torch.zeros_like(best).scatter_(1, best.topk(topk_group, dim=-1).indices, 1.0)
    masked = groups.masked_fill(allowed.unsqueeze(-1) == 0, float("-inf")).view(tokens, experts)
    chosen = masked.topk(routed, dim=-1).indices
    weights = scores.gather(1, chosen)
    total = weights.sum(-1, keepdim=True)
    if num_fused_shared_experts:
        shared = torch.arange(experts, experts + num_fused_shared_experts, device=input.device)
        chosen = torch.cat([chosen, shared.expand(tokens, -1)], dim=1)
        weights = torch.cat(
            [weights, (total / routed_scaling_factor).expand(tokens, len(shared))], dim=1
        )
    if renormalize:
        weights = weights / total
    if apply_routed_scaling_factor_on_output:
        weights = weights * routed_scaling_factor
    return weights, chosen.int()
