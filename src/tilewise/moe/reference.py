"""The specification: plain torch in fp32, obviously right, slow. Kernels are tested against it."""

from __future__ import annotations

import torch

from .activation import SWIGLU, Activation
from .checks import check_experts_args, check_route_args
from .weights import ExpertWeights

_FLOAT_MAX = torch.finfo(torch.float32).max


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    e_score_correction_bias: torch.Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tilewise.route`: fp32 weights and int32 ids, both [num_tokens, top_k].

    The choice goes by logit, or where there is a bias by score plus bias; the score of
    "topk_softmax" is then the softmax over all logits. NaN ranks below -inf and scores like it;
    +inf counts as the largest fp32. Weights are unbiased scores, and never NaN.
    """
    if router_logits.dim() != 2:
        raise ValueError(
            f"router_logits must be [num_tokens, num_experts], got {tuple(router_logits.shape)}"
        )
    num_tokens, num_experts = router_logits.shape
    bias = e_score_correction_bias
    check_route_args(
        num_experts,
        top_k,
        scoring_func,
        num_expert_group,
        topk_group,
        None if bias is None else bias.shape,
    )
    logits = router_logits.float()
    nan = logits.isnan()
    logits = logits.masked_fill(nan, -torch.inf).clamp(max=_FLOAT_MAX)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else _softmax(logits)

    # Scores grow with logits: without a bias, choosing by logits keeps apart what a score rounds.
    choice = logits if bias is None else scores + bias.float()
    lowest = nan | choice.isnan()
    choice = choice.masked_fill(lowest, -torch.inf)
    allowed = torch.ones_like(nan)
    if num_expert_group is not None and num_expert_group > 1:
        assert topk_group is not None
        group_size = num_experts // num_expert_group
        grouped = choice.view(num_tokens, num_expert_group, group_size)
        if bias is None:
            group_scores = grouped.amax(-1)
        else:
            group_scores = grouped.topk(min(2, group_size), dim=-1).values.sum(-1)
            group_scores = group_scores.masked_fill(group_scores.isnan(), -torch.inf)
        best = _descending(group_scores)[:, :topk_group]
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        allowed = open_groups.repeat_interleave(group_size, dim=1)
    # Below every number: NaN, then what the groups exclude. Ties go to the lower index throughout.
    rank = torch.zeros_like(choice)
    rank[lowest] = -1.0
    rank[~allowed] = -2.0
    order = _descending(choice)
    ids = order.gather(1, _descending(rank.gather(1, order)))[:, :top_k]

    if scoring_func == "topk_softmax":
        weights = _softmax(logits.gather(1, ids))
    else:
        weights = scores.gather(1, ids)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.to(torch.int32)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; rows of -inf give zeros instead of NaN."""
    top = logits.amax(-1, keepdim=True)
    exp = torch.where(logits == -torch.inf, 0.0, (logits - top).exp())
    total = exp.sum(-1, keepdim=True)
    return exp / torch.where(total > 0, total, 1.0)


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Indices from the largest value down, ties in index order."""
    return torch.argsort(values, dim=-1, descending=True, stable=True)


def plan(
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sizes, offsets, gather, scatter) of `Ragged`, int32; unspecified entries are -1."""
    local_experts = num_experts if num_local_experts is None else num_local_experts
    mapping = _local_experts(num_experts, local_experts, expert_map)
    rows: list[list[int]] = [[] for _ in range(local_experts)]
    for assignment, expert in enumerate(topk_ids.flatten().tolist()):
        local = mapping[expert] if 0 <= expert < num_experts else -1
        if local >= 0:
            rows[local].append(assignment)
    sizes = [len(r) for r in rows]
    offsets = [sum(sizes[:e]) for e in range(local_experts + 1)]
    gather = [assignment for r in rows for assignment in r]
    scatter = [-1] * topk_ids.numel()
    for row, assignment in enumerate(gather):
        scatter[assignment] = row
    gather += [-1] * (topk_ids.numel() - len(gather))
    lists = (sizes, offsets, gather, scatter)
    result = [torch.tensor(x, dtype=torch.int32, device=topk_ids.device) for x in lists]
    return result[0], result[1], result[2], result[3]


def _local_experts(
    num_experts: int, num_local_experts: int, expert_map: torch.Tensor | None
) -> list[int]:
    """Local expert of each global one, negative for those held elsewhere."""
    mapping = list(range(num_experts)) if expert_map is None else expert_map.tolist()
    if len(mapping) != num_experts or max(mapping, default=-1) >= num_local_experts:
        raise ValueError(
            f"expert_map must map num_experts={num_experts} experts to -1 or to one of "
            f"num_local_experts={num_local_experts}, got {len(mapping)} entries up to "
            f"{max(mapping, default=-1)}"
        )
    return mapping


def fused_experts(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: Activation = SWIGLU,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    reduce: bool = True,
) -> torch.Tensor:
    """As `tilewise.fused_experts`, fp32 throughout: [T, H], or [T, top_k, H] without `reduce`."""
    check_experts_args(
        hidden_states,
        weights,
        topk_weights,
        topk_ids,
        activation=activation,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
    num_tokens, top_k = topk_ids.shape
    num_experts = weights.num_local_experts if expert_map is None else expert_map.shape[0]
    out = torch.zeros(
        (num_tokens, top_k, weights.hidden_size), dtype=torch.float32, device=hidden_states.device
    )
    mapping = _local_experts(num_experts, weights.num_local_experts, expert_map)
    for token, ids in enumerate(topk_ids.tolist()):
        for slot, expert_id in enumerate(ids):
            expert = mapping[expert_id] if 0 <= expert_id < num_experts else -1
            if expert < 0:
                continue
            x = hidden_states[token].float()
            weight = topk_weights[token, slot].float()
            if apply_router_weight_on_input:
                x = x * weight
            up = weights.up[expert].float() @ x
            if weights.up_bias is not None:
                up = up + weights.up_bias[expert].float()
            gate = None
            if weights.gate is not None:
                gate = weights.gate[expert].float() @ x
                if weights.gate_bias is not None:
                    gate = gate + weights.gate_bias[expert].float()
            row = weights.down[expert].float() @ activation.apply(gate, up)
            if weights.down_bias is not None:
                row = row + weights.down_bias[expert].float()
            out[token, slot] = row if apply_router_weight_on_input else row * weight
    return out.sum(1) if reduce else out
