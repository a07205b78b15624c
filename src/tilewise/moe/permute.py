"""Tokens -> rows in expert order, so that the first product can load them by descriptor."""

from __future__ import annotations

import torch

from .kernels.permute import permute_kernel
from .launch import Overlap, cdiv, launch, next_power_of_two


def permute_into(
    rows: torch.Tensor,
    x: torch.Tensor,
    scatter: torch.Tensor,
    *,
    overlap: Overlap = Overlap.NONE,
) -> None:
    """rows[scatter[a]] = x[a // top_k] for every assignment a that has a row.

    Args:
        rows: [num_rows, hidden_size], contiguous; rows past the plan's last are not written.
        x: [num_tokens, hidden_size].
        scatter: int32 [num_tokens * top_k], the row of each assignment, or -1.
        overlap: with the kernels before and after.
    """
    num_tokens, hidden_size = x.shape
    block = min(1024, next_power_of_two(hidden_size))
    launch(
        permute_kernel,
        (num_tokens, cdiv(hidden_size, block)),
        x,
        scatter,
        rows,
        hidden_size,
        scatter.shape[0] // num_tokens,
        *x.stride(),
        OVERLAP=int(overlap),
        BLOCK=block,
        num_warps=4,
    )
