"""Scratch memory of one call: how much, and where each buffer lies in it."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ..dispatch.select import buckets
from ..target import Target
from .experts import split_elements
from .launch import next_power_of_two
from .plan import plan_ints
from .schedule import LayerConfig, LayerProblem, schedule

ALIGNMENT = 256  # Bytes; keeps every buffer fit for a tensor descriptor.


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def num_counters(config: LayerConfig, num_experts: int, target: Target) -> int:
    """int32 elements, a power of two or 0, that are zero when the first product starts.

    Both products in one launch: a ticket, and the tiles stored of each expert. Else the programs of
    each shared reduction, in either product.
    """
    if config.fused:
        return next_power_of_two(num_experts + 1)
    products = (*config.kernels("gate_up"), *config.kernels("down"))
    return 2 * max(
        (next_power_of_two(target.num_sms * c.occupancy) for c in products if c.split_k > 1),
        default=0,
    )


def split_sizes(problem: LayerProblem, config: LayerConfig, target: Target) -> tuple[int, int]:
    """(counters, fp32 partial sums), in elements."""
    partials = max(
        (
            split_elements(kernel, weights, target.num_sms)
            for product, weights in (("gate_up", 2 if problem.gated else 1), ("down", 1))
            for kernel in config.kernels(product)
        ),
        default=0,
    )
    return num_counters(config, problem.num_experts, target), partials


@functools.lru_cache(maxsize=4096)
def reserve(problem: LayerProblem, target: Target) -> tuple[int, int]:
    """The most of `split_sizes` that a call up to this needs: scratch for the largest serves all.

    Whatever the weights' strides, which decide on descriptors, and with them on sharing.
    """
    needs = [(0, 0)]
    for tokens in {*buckets(problem.num_tokens), problem.num_tokens}:
        call = replace(problem, num_tokens=tokens, descriptors_possible=True, fusable=True)
        layer = schedule(call, target)
        if layer.path == "grouped":
            needs.append(split_sizes(call, layer, target))
    return max(n[0] for n in needs), max(n[1] for n in needs)


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
    own, least = split_sizes(problem, config, target), reserve(problem, target)
    counters, partials = (max(pair) for pair in zip(own, least, strict=True))
    plan = _aligned((plan_ints(rows, problem.num_experts) + counters) * 4)
    return plan, act, _aligned(rows * problem.hidden_size * problem.itemsize), partials * 4


def carve(
    workspace: torch.Tensor, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat views of a uint8 workspace of `sum(sizes)` bytes: int32, dtype, dtype, fp32."""
    plan, act, rows, partials = workspace[: sum(sizes)].split(list(sizes))
    return plan.view(torch.int32), act.view(dtype), rows.view(dtype), partials.view(torch.float32)
