"""Scratch memory of one call: how much, and where each buffer lies in it."""

from __future__ import annotations

import torch

from .plan import plan_ints
from .schedule import LayerConfig, LayerProblem

ALIGNMENT = 256  # Bytes; keeps every buffer fit for a tensor descriptor.


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def buffer_sizes(problem: LayerProblem, config: LayerConfig) -> tuple[int, int, int]:
    """Bytes of (plan, activations, rows), each aligned; decode needs the activations alone."""
    rows = problem.num_tokens * problem.top_k
    act = _aligned(rows * problem.intermediate_size * problem.itemsize)
    if config.path == "decode":
        return 0, act, 0
    plan = _aligned(plan_ints(rows, problem.num_experts) * 4)
    return plan, act, _aligned(rows * problem.hidden_size * problem.itemsize)


def carve(
    workspace: torch.Tensor, sizes: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat (int32, dtype, dtype) views of a uint8 workspace of at least `sum(sizes)` bytes."""
    plan, act, rows = sizes
    return (
        workspace[:plan].view(torch.int32),
        workspace[plan : plan + act].view(dtype),
        workspace[plan + act : plan + act + rows].view(dtype),
    )
