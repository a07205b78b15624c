"""router_logits -> topk_weights, topk_ids."""

from __future__ import annotations

import torch

from .kernels.topk import route_kernel
from .launch import launch, next_power_of_two


def route_into(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    router_logits: torch.Tensor,
    top_k: int,
    scoring_func: str,
    renormalize: bool,
    e_score_correction_bias: torch.Tensor | None,
    num_expert_group: int,
    topk_group: int,
    routed_scaling_factor: float,
) -> None:
    """Fills `topk_weights` fp32 and `topk_ids` int32, [num_tokens, top_k]; see `tilewise.route`."""
    num_tokens, num_experts = router_logits.shape
    if num_tokens == 0:
        return
    groups = max(1, num_expert_group)
    block = next_power_of_two(num_experts)
    bias = e_score_correction_bias
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    launch(
        route_kernel,
        (num_tokens,),
        router_logits,
        router_logits if bias is None else bias,
        topk_weights,
        topk_ids,
        num_experts,
        top_k,
        num_experts // groups,
        topk_group if groups > 1 else 1,
        router_logits.stride(0),
        router_logits.stride(1),
        float(routed_scaling_factor),
        SCORING=scoring_func,
        RENORMALIZE=renormalize,
        HAS_BIAS=bias is not None,
        NUM_GROUPS=groups,
        EXPERTS=block,
        SLOTS=next_power_of_two(top_k),
        num_warps=1 if block <= 256 else min(8, block // 256),
    )
