"""Rows in expert order -> tokens."""

from __future__ import annotations

import torch

from .kernels.combine import combine_kernel
from .launch import Overlap, cdiv, launch, next_power_of_two


def combine_into(
    out: torch.Tensor,
    rows: torch.Tensor,
    scatter: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    router_weight: bool,
    overlap: Overlap = Overlap.NONE,
) -> None:
    """Writes the weighted sum over slots, or with `out` [T, top_k, H] every weighted row.

    Args:
        out: [num_tokens, hidden_size], or [num_tokens, top_k, hidden_size] to leave the sum to the
            host.
        rows: [num_rows, hidden_size], contiguous, in expert order.
        scatter: int32 [num_tokens * top_k], the row of each assignment, -1 contributes exactly 0.
        topk_weights: [num_tokens, top_k].
        router_weight: multiply by `topk_weights`; False where the input was scaled already.
        overlap: with the kernel before.
    """
    num_tokens, top_k = topk_weights.shape
    hidden_size = out.shape[-1]
    reduce = out.dim() == 2
    block = min(1024, next_power_of_two(hidden_size))
    launch(
        combine_kernel,
        (num_tokens if reduce else num_tokens * top_k, cdiv(hidden_size, block)),
        rows,
        scatter,
        topk_weights,
        out,
        hidden_size,
        top_k,
        topk_weights.stride(0),
        topk_weights.stride(1),
        out.stride(0),
        0 if reduce else out.stride(1),
        ROUTER_WEIGHT=router_weight,
        REDUCE=reduce,
        OVERLAP=int(min(overlap, Overlap.EARLY)),  # Nothing follows: one kernel for both.
        BLOCK=block,
        num_warps=4,
    )
