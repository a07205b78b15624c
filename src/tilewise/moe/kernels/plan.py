"""topk_ids -> ragged rows: a stable counting sort without communication between programs.

Up to 4,096 ids, one launch: program e owns local expert e and looks at all ids, to count those below e
(its offset) and equal to e (its size), and to write its rows.

Beyond that, experts times ids is too much to read, and two launches are cheaper: each program counts
the experts of one chunk of ids; then each adds up all counts before its own and places its chunk.
"""

import triton
import triton.language as tl

from .dependent import launch_early, launch_late, wait_for_previous


@triton.jit
def local_expert(
    ids_ptr, map_ptr, offs, mask, num_experts, num_local_experts, top_k, stride_t, stride_k,
    HAS_MAP: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Local expert of each assignment, -1 where it is to be skipped."""
    if CONTIGUOUS:  # Without the two divisions a scan takes a third of the time.
        ids = tl.load(ids_ptr + offs, mask=mask, other=-1)
    else:
        token = (offs // top_k).to(tl.int64)
        ids = tl.load(ids_ptr + token * stride_t + (offs % top_k) * stride_k, mask=mask, other=-1)
    valid = (ids >= 0) & (ids < num_experts)
    if HAS_MAP:
        local = tl.load(map_ptr + ids, mask=valid, other=-1)
        # A map that names an expert this device lacks must not reach past its weights.
        local = tl.where((local >= 0) & (local < num_local_experts), local, -1).to(tl.int32)
    else:
        local = tl.where(valid, ids, -1).to(tl.int32)
    return local


@triton.jit(
    do_not_specialize=["num_assignments", "num_experts", "num_local_experts", "top_k", "stride_t"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)
def plan_kernel(
    ids_ptr,  # int [num_tokens, top_k], strided
    map_ptr,  # int [num_experts], or unused
    sizes_ptr,  # int32 [num_local_experts]
    offsets_ptr,  # int32 [num_local_experts + 1]
    gather_ptr,  # int32 [num_assignments]
    scatter_ptr,  # int32 [num_assignments]
    counters_ptr,  # int32 [COUNTERS], set to zero
    num_assignments,
    num_experts,
    num_local_experts,
    top_k,
    stride_t,
    stride_k,
    HAS_MAP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COUNTERS: tl.constexpr,
    OVERLAP: tl.constexpr,  # with the kernel after (dependent.py)
    BLOCK: tl.constexpr,  # at least num_assignments
):
    launch_early(OVERLAP)
    expert = tl.program_id(0)
    if COUNTERS > 0:
        if expert == 0:
            tl.store(counters_ptr + tl.arange(0, COUNTERS), 0)
    offs = tl.arange(0, BLOCK)
    local = local_expert(
        ids_ptr, map_ptr, offs, offs < num_assignments, num_experts, num_local_experts, top_k,
        stride_t, stride_k, HAS_MAP, CONTIGUOUS,
    )  # fmt: skip
    mine = local == expert
    ones = mine.to(tl.int32)
    offset = tl.sum(((local >= 0) & (local < expert)).to(tl.int32), 0)
    size = tl.sum(ones, 0)
    tl.store(sizes_ptr + expert, size)
    tl.store(offsets_ptr + expert, offset)
    if expert == num_local_experts - 1:
        tl.store(offsets_ptr + num_local_experts, offset + size)
    if size > 0:
        rows = offset + tl.cumsum(ones, 0) - 1
        tl.store(gather_ptr + rows, offs, mask=mine)
        tl.store(scatter_ptr + offs, rows, mask=mine)
    if expert == 0:  # Program 0 also marks what no expert owns.
        tl.store(scatter_ptr + offs, -1, mask=(offs < num_assignments) & (local < 0))
    launch_late(OVERLAP)


@triton.jit(
    do_not_specialize=["num_assignments", "num_experts", "num_local_experts", "top_k", "stride_t"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)
def plan_count_kernel(
    ids_ptr,  # int [num_tokens, top_k], strided
    map_ptr,  # int [num_experts], or unused
    counts_ptr,  # int32 [num_chunks, num_local_experts]
    counters_ptr,  # int32 [COUNTERS], set to zero
    num_assignments,
    num_experts,
    num_local_experts,
    top_k,
    stride_t,
    stride_k,
    HAS_MAP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COUNTERS: tl.constexpr,
    OVERLAP: tl.constexpr,  # with the kernel after (dependent.py)
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two >= num_local_experts
):
    launch_early(OVERLAP)
    chunk = tl.program_id(0)
    if COUNTERS > 0:
        if chunk == 0:
            tl.store(counters_ptr + tl.arange(0, COUNTERS), 0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    local = local_expert(
        ids_ptr, map_ptr, offs, offs < num_assignments, num_experts, num_local_experts, top_k,
        stride_t, stride_k, HAS_MAP, CONTIGUOUS,
    )  # fmt: skip
    counts = tl.histogram(local, EXPERTS, mask=local >= 0)
    expert = tl.arange(0, EXPERTS)
    tl.store(
        counts_ptr + chunk.to(tl.int64) * num_local_experts + expert,
        counts,
        mask=expert < num_local_experts,
    )
    launch_late(OVERLAP)


@triton.jit(
    do_not_specialize=[
        "num_assignments", "num_experts", "num_local_experts", "num_chunks", "top_k", "stride_t",
    ],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)  # fmt: skip
def plan_place_kernel(
    ids_ptr,  # int [num_tokens, top_k], strided
    map_ptr,  # int [num_experts], or unused
    counts_ptr,  # int32 [num_chunks, num_local_experts]
    sizes_ptr,  # int32 [num_local_experts]
    offsets_ptr,  # int32 [num_local_experts + 1]
    gather_ptr,  # int32 [num_assignments]
    scatter_ptr,  # int32 [num_assignments]
    num_assignments,
    num_experts,
    num_local_experts,
    num_chunks,
    top_k,
    stride_t,
    stride_k,
    HAS_MAP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    OVERLAP: tl.constexpr,  # with the kernels before and after (dependent.py)
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,  # chunks added up per step
    STEP: tl.constexpr,  # ids compared with one another
):
    wait_for_previous(OVERLAP)
    launch_early(OVERLAP)
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    before = tl.zeros([EXPERTS], dtype=tl.int32)
    for first in tl.range(0, num_chunks, ROWS):
        row = first + tl.arange(0, ROWS)
        counts = tl.load(
            counts_ptr + row.to(tl.int64)[:, None] * num_local_experts + expert[None, :],
            mask=(row < num_chunks)[:, None] & (expert < num_local_experts)[None, :],
            other=0,
        )  # [ROWS, EXPERTS]
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((row < chunk)[:, None], counts, 0), 0)
    offsets = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(sizes_ptr + expert, total, mask=expert < num_local_experts)
        tl.store(offsets_ptr + expert, offsets, mask=expert < num_local_experts)
        tl.store(offsets_ptr + num_local_experts, tl.sum(total, 0))

    # Step by step through the chunk: a row's place is where its expert's rows have got to, plus the
    # equal ids that stand before it in the step.
    running = offsets + before
    lane = tl.arange(0, STEP)
    offs = chunk * CHUNK + lane
    local = local_expert(
        ids_ptr, map_ptr, offs, offs < num_assignments, num_experts, num_local_experts, top_k,
        stride_t, stride_k, HAS_MAP, CONTIGUOUS,
    )  # fmt: skip
    for start in tl.range(0, CHUNK, STEP):
        here = chunk * CHUNK + start + lane
        # The next step's ids are fetched before this step's stores, which would order them.
        following = here + STEP
        upcoming = local_expert(
            ids_ptr, map_ptr, following, following < num_assignments, num_experts,
            num_local_experts, top_k, stride_t, stride_k, HAS_MAP, CONTIGUOUS,
        )  # fmt: skip
        mine = local >= 0
        same = (local[:, None] == local[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(same.to(tl.int32), 1)
        rows = tl.gather(running, tl.where(mine, local, 0), 0) + rank
        tl.store(gather_ptr + rows, here, mask=mine)
        tl.store(scatter_ptr + here, tl.where(mine, rows, -1), mask=here < num_assignments)
        running += tl.histogram(local, EXPERTS, mask=mine)
        local = upcoming
    launch_late(OVERLAP)
