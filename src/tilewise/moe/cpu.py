"""The layer without a GPU: one sort, then one matrix product per active expert and weight."""

from __future__ import annotations

import torch

from . import reference
from .activation import SWIGLU, Activation
from .weights import ExpertWeights

# A product of this many rows at a time makes a row's bits independent of how many rows there are.
INVARIANT_ROWS = 32


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
    """As `tilewise.route`; the specification is already vectorised."""
    return reference.route(
        router_logits,
        top_k,
        scoring_func=scoring_func,
        renormalize=renormalize,
        e_score_correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
    )


def plan(
    topk_ids: torch.Tensor, num_local_experts: int, *, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sizes, offsets, gather, scatter) of `Ragged`, int32."""
    local = local_ids(topk_ids, num_local_experts, expert_map).flatten()
    n = local.numel()
    # Skipped assignments sort behind every expert.
    key = torch.where(local < 0, num_local_experts, local)
    order = torch.argsort(key, stable=True)
    sizes = torch.bincount(key, minlength=num_local_experts + 1)[:num_local_experts]
    offsets = torch.zeros(num_local_experts + 1, dtype=torch.int32)
    offsets[1:] = sizes.cumsum(0)
    rows = int(offsets[-1])
    gather = torch.full((n,), -1, dtype=torch.int32)
    gather[:rows] = order[:rows].to(torch.int32)
    scatter = torch.full((n,), -1, dtype=torch.int32)
    scatter[order[:rows]] = torch.arange(rows, dtype=torch.int32)
    return sizes.to(torch.int32), offsets, gather, scatter


def local_ids(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> torch.Tensor:
    """int64 local expert of each assignment, -1 where it is to be skipped."""
    ids = topk_ids.long()
    num_experts = num_local_experts if expert_map is None else expert_map.shape[0]
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map is not None and num_experts:
        ids = expert_map.long()[ids.clamp(0, num_experts - 1)]
    return torch.where(valid, ids, -1)


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
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `tilewise.fused_experts`. Products run in the weights' dtype, everything else in fp32.

    `batch_invariant` multiplies a fixed number of rows at a time, padded, since BLAS picks its summation
    order by the number of rows.
    """
    num_tokens, top_k = topk_ids.shape
    hidden_size = weights.hidden_size
    _, offsets, gather, _ = plan(topk_ids, weights.num_local_experts, expert_map=expert_map)
    bounds = offsets.tolist()
    slots = torch.zeros((num_tokens * top_k, hidden_size), dtype=torch.float32)
    scale = topk_weights.reshape(-1).float()
    for expert in range(weights.num_local_experts):
        first, last = bounds[expert], bounds[expert + 1]
        if first == last:
            continue
        assignments = gather[first:last].long()
        x = hidden_states[assignments // top_k]
        weight = scale[assignments][:, None]
        gate = None
        up = _product(x, weights.up[expert], batch_invariant)
        if weights.gate is not None:
            gate = _product(x, weights.gate[expert], batch_invariant)
        if apply_router_weight_on_input:
            up = up * weight
            gate = None if gate is None else gate * weight
        if weights.up_bias is not None:
            up = up + weights.up_bias[expert].float()
        if gate is not None and weights.gate_bias is not None:
            gate = gate + weights.gate_bias[expert].float()
        act = activation.apply(gate, up).to(hidden_states.dtype)
        rows = _product(act, weights.down[expert], batch_invariant)
        if weights.down_bias is not None:
            rows = rows + weights.down_bias[expert].float()
        slots[assignments] = rows if apply_router_weight_on_input else rows * weight
    result = slots.view(num_tokens, top_k, hidden_size)
    if reduce:
        # One slot after another: the same order for every batch.
        total = torch.zeros((num_tokens, hidden_size), dtype=torch.float32)
        for slot in range(top_k):
            total += result[:, slot]
        result = total
    if out is None:
        return result.to(hidden_states.dtype)
    return out.copy_(result)


def _product(x: torch.Tensor, weight: torch.Tensor, batch_invariant: bool) -> torch.Tensor:
    """x [R, K] @ weight [N, K].T in fp32."""
    if not batch_invariant:
        return torch.nn.functional.linear(x, weight).float()
    rows = x.shape[0]
    padded = x.new_zeros((-(-rows // INVARIANT_ROWS) * INVARIANT_ROWS, x.shape[1]))
    padded[:rows] = x
    parts = [torch.nn.functional.linear(part, weight) for part in padded.split(INVARIANT_ROWS)]
    return torch.cat(parts)[:rows].float()
