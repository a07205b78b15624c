"""Scratch memory of one call: how much, and where each buffer lies in it."""

from __future__ import annotations

import torch

from ..dispatch.config import KernelConfig
from ..target import Target
from .experts import split_elements
from .launch import next_power_of_two
from .plan import plan_ints
from .schedule import LayerConfig, LayerProblem

ALIGNMENT = 256  # Bytes; keeps every buffer fit for a tensor descriptor.


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def num_counters(config: LayerConfig, target: Target) -> int:
    """int32 elements that count the programs of each shared reduction, in each product."""
    products = [c for c in (config.gate_up, config.down) if isinstance(c, KernelConfig)]
    return max(
        (next_power_of_two(target.num_sms * c.occupancy) for c in products if c.split_k > 1),
        default=0,
    )


def buffer_sizes(
    problem: LayerProblem, config: LayerConfig, target: Target
) -> tuple[int, int, int, int]:
    """Bytes of (plan and counters, activations, rows, partial sums), each aligned.

    Decode needs the activations alone.
    """
    rows = problem.num_tokens * problem.top_k
    act = _aligned(rows * problem.intermediate_size * problem.itemsize)
    if config.path == "decode":
        return 0, act, 0, 0
    assert isinstance(config.gate_up, KernelConfig) and isinstance(config.down, KernelConfig)
    counters = 2 * num_counters(config, target)
    plan = _aligned((plan_ints(rows, problem.num_experts) + counters) * 4)
    partials = max(
        split_elements(config.gate_up, 2 if problem.gated else 1, target.num_sms),
        split_elements(config.down, 1, target.num_sms),
    )
    return plan, act, _aligned(rows * problem.hidden_size * problem.itemsize), partials * 4


def carve(
    workspace: torch.Tensor, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat views of a uint8 workspace of `sum(sizes)` bytes: int32, dtype, dtype, fp32."""
    plan, act, rows, partials = workspace[: sum(sizes)].split(list(sizes))
    return plan.view(torch.int32), act.view(dtype), rows.view(dtype), partials.view(torch.float32)
