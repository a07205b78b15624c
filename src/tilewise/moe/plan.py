"""topk_ids -> Ragged, on the device: one launch, or two for more than 4,096 assignments."""

from __future__ import annotations

import torch

from ..ragged import Ragged
from .kernels.plan import plan_count_kernel, plan_kernel, plan_place_kernel
from .launch import Overlap, cdiv, launch, next_power_of_two

# Up to here a scan per expert is cheaper than a second launch; docs/performance.md has the times.
SCAN_ASSIGNMENTS = 4096
LONG_PLAN = 32768  # More ids than this are planned in chunks of twice the size.
STEP = 32
MAX_ASSIGNMENTS = 2**31 - 1024  # Kernels count rows in 32 bits, up to the end of a tile.


def _padded(size: int) -> int:
    """Elements up to the next 16 bytes: parts are aligned whatever the sizes are."""
    return -(-size // 4) * 4


def plan_ints(num_assignments: int, num_local_experts: int) -> int:
    """int32 elements of a plan's buffer: sizes, offsets, gather, scatter, and counts of chunks."""
    experts = _padded(num_local_experts) + _padded(num_local_experts + 1)
    counts = _padded(count_ints(num_assignments, num_local_experts))
    return experts + 2 * _padded(num_assignments) + counts


def chunk_of(num_assignments: int) -> int:
    """Ids of one program where two launches plan: more programs, or fewer counts to add up."""
    return 256 if num_assignments <= LONG_PLAN else 512


def count_ints(num_assignments: int, num_local_experts: int) -> int:
    """int32 elements of the counts that two launches pass on; 0 where one launch does."""
    if num_assignments <= SCAN_ASSIGNMENTS:
        return 0
    # Never fewer than a smaller call needs: scratch memory for the largest call serves all.
    chunks = max(
        cdiv(size, chunk_of(size)) for size in (num_assignments, min(num_assignments, LONG_PLAN))
    )
    return chunks * num_local_experts


def carve_counts(
    buffer: torch.Tensor, num_assignments: int, num_local_experts: int
) -> torch.Tensor:
    """The counts' part of the same buffer."""
    size = count_ints(num_assignments, num_local_experts)
    first = plan_ints(num_assignments, num_local_experts) - _padded(size)
    return buffer[first : first + size]


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


def plan_variant(num_assignments: int) -> int:
    """What of the number of ids decides the compiled kernels.

    One launch: the block that holds them all, a power of two. Two: minus the ids of a program.
    """
    if num_assignments > SCAN_ASSIGNMENTS:
        return -chunk_of(num_assignments)
    return max(256, next_power_of_two(num_assignments))


def plan_into(
    ragged: Ragged,
    counts: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None,
    counters: torch.Tensor | None = None,
    overlap: Overlap = Overlap.NONE,
) -> None:
    """Fills `ragged` from `topk_ids` [num_tokens, top_k]; see `tilewise.plan`.

    Args:
        counts: scratch of `count_ints` int32 elements.
        counters: int32, a power of two of elements, set to zero on the way.
        overlap: when the next kernel may start; it will wait for the plan.
    """
    top_k = topk_ids.shape[1]
    num_assignments = topk_ids.numel()
    if num_assignments > MAX_ASSIGNMENTS:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} has {num_assignments} elements, one call takes up "
            f"to {MAX_ASSIGNMENTS}: split the tokens"
        )
    num_local = ragged.num_segments
    ids_map = topk_ids if expert_map is None else expert_map
    strides = topk_ids.stride()
    options = {"HAS_MAP": expert_map is not None, "CONTIGUOUS": topk_ids.is_contiguous()}
    zeroed = ragged.sizes if counters is None else counters
    num_counters = 0 if counters is None else counters.numel()
    if num_assignments <= SCAN_ASSIGNMENTS:
        block = plan_variant(num_assignments)
        launch(
            plan_kernel,
            (num_local,),
            topk_ids,
            ids_map,
            ragged.sizes,
            ragged.offsets,
            ragged.gather,
            ragged.scatter,
            zeroed,
            num_assignments,
            num_experts,
            num_local,
            top_k,
            *strides,
            **options,
            COUNTERS=num_counters,
            OVERLAP=int(overlap),
            BLOCK=block,
            num_warps=4 if block <= 1024 else 8,
            first=True,
        )
        return
    chunk = chunk_of(num_assignments)
    num_chunks = cdiv(num_assignments, chunk)
    experts = next_power_of_two(num_local)
    launch(
        plan_count_kernel,
        (num_chunks,),
        topk_ids,
        ids_map,
        counts,
        zeroed,
        num_assignments,
        num_experts,
        num_local,
        top_k,
        *strides,
        **options,
        COUNTERS=num_counters,
        OVERLAP=int(overlap),
        CHUNK=chunk,
        EXPERTS=experts,
        num_warps=4,
        first=True,
    )
    launch(
        plan_place_kernel,
        (num_chunks,),
        topk_ids,
        ids_map,
        counts,
        ragged.sizes,
        ragged.offsets,
        ragged.gather,
        ragged.scatter,
        num_assignments,
        num_experts,
        num_local,
        num_chunks,
        top_k,
        *strides,
        **options,
        OVERLAP=int(overlap),
        CHUNK=chunk,
        EXPERTS=experts,
        ROWS=max(1, min(32, 8192 // experts)),
        STEP=STEP,
        num_warps=8,
    )
