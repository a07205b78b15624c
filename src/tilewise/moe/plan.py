"""topk_ids -> Ragged, on the device, in one launch."""

from __future__ import annotations

import torch

from ..ragged import Ragged
from .kernels.plan import plan_kernel
from .launch import launch, next_power_of_two


def _padded(size: int) -> int:
    """Elements up to the next 16 bytes: parts are aligned whatever the sizes are."""
    return -(-size // 4) * 4


def plan_ints(num_assignments: int, num_local_experts: int) -> int:
    """int32 elements of a plan's buffer: sizes, offsets, gather, scatter."""
    experts = _padded(num_local_experts) + _padded(num_local_experts + 1)
    return experts + 2 * _padded(num_assignments)


def carve_plan(buffer: torch.Tensor, num_assignments: int, num_local_experts: int) -> Ragged:
    """Views of a flat int32 buffer of `plan_ints` elements."""
    n, e = num_assignments, num_local_experts
    offsets = _padded(e)
    gather = offsets + _padded(e + 1)
    scatter = gather + _padded(n)
    return Ragged(
        buffer[:e],
        buffer[offsets : offsets + e + 1],
        buffer[gather : gather + n],
        buffer[scatter : scatter + n],
    )


def plan_block(num_assignments: int) -> int:
    """Ids scanned per step: three sizes, so that few variants are compiled."""
    return min(4096, max(256, next_power_of_two(num_assignments)))


def plan_into(
    ragged: Ragged, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> None:
    """Fills `ragged` from `topk_ids` [num_tokens, top_k]; see `tilewise.plan`."""
    top_k = topk_ids.shape[1]
    num_assignments = topk_ids.numel()
    block = plan_block(num_assignments)
    launch(
        plan_kernel,
        (ragged.num_segments,),
        topk_ids,
        topk_ids if expert_map is None else expert_map,
        ragged.sizes,
        ragged.offsets,
        ragged.gather,
        ragged.scatter,
        num_assignments,
        num_experts,
        ragged.num_segments,
        top_k,
        topk_ids.stride(0),
        topk_ids.stride(1),
        HAS_MAP=expert_map is not None,
        CONTIGUOUS=topk_ids.is_contiguous(),
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )
