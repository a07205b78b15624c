"""A few tokens, two launches: see kernels/decode.py."""

from __future__ import annotations

import torch

from ..dispatch.config import StreamConfig
from .activation import Activation
from .kernels.decode import decode_down_kernel, decode_gate_up_kernel
from .launch import cdiv, launch


def decode_gate_up_into(
    act: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    expert_map: torch.Tensor | None,
    num_experts: int,
    apply_router_weight_on_input: bool,
    config: StreamConfig,
) -> None:
    """Writes `act` [num_tokens * top_k, intermediate_size], but for rows of skipped slots."""
    num_tokens, top_k = topk_ids.shape
    _, intermediate_size, hidden_size = up.shape
    g = up if gate is None else gate
    ub = up if up_bias is None else up_bias
    gb = ub if gate_bias is None else gate_bias
    launch(
        decode_gate_up_kernel,
        (cdiv(intermediate_size, config.block_n), num_tokens * top_k),
        x,
        g,
        up,
        gb,
        ub,
        act,
        topk_ids,
        topk_ids if expert_map is None else expert_map,
        topk_weights,
        num_experts,
        up.shape[0],
        intermediate_size,
        hidden_size,
        top_k,
        *x.stride(),
        *g.stride(),
        *up.stride(),
        *(gb.stride() if up_bias is not None else (0, 0)),
        *(ub.stride() if up_bias is not None else (0, 0)),
        *topk_ids.stride(),
        *topk_weights.stride(),
        HAS_MAP=expert_map is not None,
        GATED=gate is not None,
        BIAS=up_bias is not None,
        ROW_WEIGHTS=apply_router_weight_on_input,
        KIND=activation.kind,
        ALPHA=activation.alpha,
        BETA=activation.beta,
        LIMIT=activation.limit,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def decode_down_into(
    out: torch.Tensor,
    act: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    apply_router_weight_on_input: bool,
    config: StreamConfig,
) -> None:
    """Writes `out` [num_tokens, hidden_size] from `act`, summing each token's slots in order."""
    num_tokens, top_k = topk_ids.shape
    _, hidden_size, intermediate_size = down.shape
    bias = down if down_bias is None else down_bias
    launch(
        decode_down_kernel,
        (cdiv(hidden_size, config.block_n), num_tokens),
        act,
        down,
        bias,
        out,
        topk_ids,
        topk_ids if expert_map is None else expert_map,
        topk_weights,
        num_experts,
        down.shape[0],
        hidden_size,
        intermediate_size,
        top_k,
        *down.stride(),
        *(bias.stride() if down_bias is not None else (0, 0)),
        *topk_ids.stride(),
        *topk_weights.stride(),
        out.stride(0),
        HAS_MAP=expert_map is not None,
        BIAS=down_bias is not None,
        ROW_WEIGHTS=not apply_router_weight_on_input,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
