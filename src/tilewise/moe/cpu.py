"""The layer without a GPU: one sort, then one matrix product per active expert and weight."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

from . import reference
from .activation import SWIGLU, Activation
from .checks import check_experts_args
from .weights import ExpertWeights

# BLAS picks its summation order by the number of rows: `batch_invariant` fixes it to this many.
INVARIANT_ROWS = 8

# The specification of routing is vectorised already.
route = reference.route


def plan(
    topk_ids: torch.Tensor, num_local_experts: int, *, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups assignments by local expert: a stable counting sort.

    Args:
        topk_ids: int32 or int64 [num_tokens, top_k], global ids.
        num_local_experts: experts on this device.
        expert_map: [num_experts], global -> local or -1; None where every expert is local.

    Returns:
        (sizes, offsets, gather, scatter) of `Ragged`, int32; unspecified entries are -1.
    """
    device = topk_ids.device
    key = local_ids(topk_ids, num_local_experts, expert_map).flatten()
    # Skipped assignments sort behind every expert.
    key = torch.where(key < 0, num_local_experts, key)
    order = torch.argsort(key, stable=True).to(torch.int32)
    sizes = torch.bincount(key, minlength=num_local_experts + 1)[:num_local_experts]
    offsets = torch.zeros(num_local_experts + 1, dtype=torch.int32, device=device)
    offsets[1:] = sizes.cumsum(0)
    rows = int(offsets[-1])
    gather = torch.full_like(order, -1)
    gather[:rows] = order[:rows]
    scatter = torch.full_like(order, -1)
    scatter[order[:rows].long()] = torch.arange(rows, dtype=torch.int32, device=device)
    return sizes.to(torch.int32), offsets, gather, scatter


def local_ids(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> torch.Tensor:
    """int64 local expert of each assignment, negative where it is to be skipped."""
    ids = topk_ids.long()
    if expert_map is None:
        return torch.where((ids >= 0) & (ids < num_local_experts), ids, -1)
    num_experts = expert_map.shape[0]
    if num_experts == 0:
        return torch.full_like(ids, -1)
    largest = int(expert_map.max())
    if largest >= num_local_experts:
        raise ValueError(
            f"expert_map names local expert {largest}, but there are {num_local_experts}: its "
            "values must be -1 or below that"
        )
    valid = (ids >= 0) & (ids < num_experts)
    return torch.where(valid, expert_map.long()[ids.clamp(0, num_experts - 1)], -1)


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

    `batch_invariant` multiplies `INVARIANT_ROWS` rows at a time, padded, and activates them one by
    one. It relies on BLAS treating all rows of one shape alike, which the tests check bit by bit.

    Args:
        out: written and returned if given; any strides.
        Others: as `tilewise.fused_experts`.

    Returns:
        [num_tokens, hidden_size], or [num_tokens, top_k, hidden_size] without `reduce`; dtype of
        `hidden_states`.

    Raises:
        ValueError: arguments that don't fit together.
    """
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
    shape = (num_tokens, weights.hidden_size)
    if not reduce:
        shape = (num_tokens * top_k, weights.hidden_size)
    _, offsets, gather, _ = plan(topk_ids, weights.num_local_experts, expert_map=expert_map)
    bounds = offsets.tolist()
    scale = topk_weights.flatten().float()
    result = torch.zeros(shape, dtype=torch.float32, device=hidden_states.device)
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        assignments = gather[first:last].long()
        tokens = assignments // top_k
        weight = scale[assignments, None]
        rows = _expert(
            hidden_states[tokens],
            weights,
            expert,
            weight if apply_router_weight_on_input else None,
            activation,
            batch_invariant,
        )
        if not apply_router_weight_on_input:
            rows *= weight
        # A token's experts are added in the order of their numbers, whatever the batch.
        result.index_add_(0, tokens if reduce else assignments, rows)
    if not reduce:
        result = result.view(num_tokens, top_k, weights.hidden_size)
    if out is None:
        return result.to(hidden_states.dtype)
    if out.shape != result.shape:
        raise ValueError(f"out must be {tuple(result.shape)}, got {tuple(out.shape)}")
    return out.copy_(result)


def _expert(
    x: torch.Tensor,
    weights: ExpertWeights,
    expert: int,
    input_weight: torch.Tensor | None,
    activation: Activation,
    batch_invariant: bool,
) -> torch.Tensor:
    """One expert on its rows: x [R, H], input_weight fp32 [R, 1] or None -> fp32 [R, H]."""

    def product(
        rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        result = _product(rows, matrix[expert], batch_invariant)
        if rows is x and input_weight is not None:
            # Scaling the product equals scaling the input row, without rounding that row.
            result *= input_weight
        return result if bias is None else result + bias[expert].float()

    gate = None if weights.gate is None else product(x, weights.gate, weights.gate_bias)
    up = product(x, weights.up, weights.up_bias)
    if batch_invariant:
        act = torch.empty_like(up)
        # A vectorised loop ends in scalar code with another exp: row by row, its end never moves.
        for row in range(len(up)):
            act[row] = activation.apply(None if gate is None else gate[row], up[row])
    else:
        act = activation.apply(gate, up)
    return product(act.to(x.dtype), weights.down, weights.down_bias)


def _product(x: torch.Tensor, matrix: torch.Tensor, batch_invariant: bool) -> torch.Tensor:
    """x [R, K] @ matrix [N, K].T in their dtype, then fp32."""
    if not batch_invariant:
        return F.linear(x, matrix).float()
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % INVARIANT_ROWS))
    parts = [F.linear(part, matrix) for part in padded.split(INVARIANT_ROWS)]
    return torch.cat(parts)[:rows].float()
