"""Both products in one launch: a down tile starts as soon as its expert's gate+up tiles have stored.

Two launches meet at a barrier: while the last tiles of gate+up run, the other multiprocessors are idle, and
so again at the end of down. Here programs draw tickets: first all tiles of gate+up, expert by expert, then
all tiles of down in the same order. A program with a down tile waits for its expert alone, which is long
ready but at the seam.

Tickets, not program numbers: who waits for a tile waits for a program that already runs, so it ends
whatever else shares the device.
"""

import triton
import triton.language as tl

from .dependent import launch_early, launch_late, wait_for_previous
from .grouped import locate, one_tile, tile_ends


@triton.jit
def fence_async(FENCE: tl.constexpr):
    """Orders plain stores before another program's descriptor loads of the same global memory."""
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(
    do_not_specialize=["num_segments", "top_k", "stride_rt"],
    do_not_specialize_on_alignment=["row_weights_ptr"],
)
def fused_gemms_kernel(
    x_ptr,  # [num_tokens, H]
    gate_up,  # descriptor, [num_segments, 2, I, H], or [num_segments, I, H] if not GATED
    gate_bias_ptr,  # [num_segments, I]
    up_bias_ptr,  # [num_segments, I]
    act_ptr,  # [num_rows, I] in expert order, contiguous
    act_rows,  # ragged descriptor of the same, DOWN_M rows high
    act_tail,  # the same, DOWN_TAIL rows high
    down,  # descriptor, [num_segments, H, I]
    down_bias_ptr,  # [num_segments, H]
    out_ptr,  # [num_rows, H] in expert order, contiguous
    sizes_ptr,  # int32 [num_segments]
    gather_ptr,  # int32 [num_rows]
    row_weights_ptr,  # [num_tokens, top_k] by two strides
    ticket_ptr,  # int32, zero
    stored_ptr,  # int32 [num_segments], zero: gate+up tiles stored
    num_segments, inter, hidden, top_k,
    stride_xm, stride_xk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_dbe, stride_dbn, stride_rt, stride_rk,
    SEGMENTS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr, UP_FIRST: tl.constexpr, FENCE: tl.constexpr, OVERLAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, TAIL_M: tl.constexpr, NUM_STAGES: tl.constexpr,
    DOWN_M: tl.constexpr, DOWN_N: tl.constexpr, DOWN_K: tl.constexpr, DOWN_GROUP: tl.constexpr,
    DOWN_SWAP: tl.constexpr, DOWN_TAIL: tl.constexpr, DOWN_STAGES: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    launch_early(OVERLAP)
    tiles_i = tl.cdiv(inter, BLOCK_N)
    tiles_h = tl.cdiv(hidden, DOWN_N)
    sizes, ends = tile_ends(sizes_ptr, num_segments, tiles_i, BLOCK_M, SEGMENTS)
    first_down = tl.max(ends, 0)
    num_tickets = first_down + tl.sum((sizes + DOWN_M - 1) // DOWN_M, 0) * tiles_h
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while ticket < num_tickets:
        if ticket < first_down:
            sizes, ends = tile_ends(sizes_ptr, num_segments, tiles_i, BLOCK_M, SEGMENTS)
            segment, offset, size, tile_m, tile_n = locate(
                sizes, ends, ticket, tiles_i, GROUP_M, BLOCK_M, SEGMENTS
            )
            one_tile(
                segment, offset, size, tile_m, tile_n, ticket, 1, 0,
                x_ptr, x_ptr, gate_up, gate_up, gate_bias_ptr, up_bias_ptr, act_ptr, act_ptr,
                gather_ptr, row_weights_ptr, act_ptr, sizes_ptr, inter, hidden, top_k,
                stride_xm, stride_xk, 0, 0, 0, 0, 0, 0,
                stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, inter,
                GATED, True, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, True, True,
                True, False, 0, GATED, UP_FIRST, SWAP, 1, TAIL_M,
                UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
            fence_async(FENCE)
            tl.debug_barrier()  # All threads' stores before the one thread that announces them.
            tl.atomic_add(stored_ptr + segment, 1, sem="release")
        else:
            tile = ticket - first_down
            sizes, ends = tile_ends(sizes_ptr, num_segments, tiles_h, DOWN_M, SEGMENTS)
            segment, offset, size, tile_m, tile_n = locate(
                sizes, ends, tile, tiles_h, DOWN_GROUP, DOWN_M, SEGMENTS
            )
            need = (size + BLOCK_M - 1) // BLOCK_M * tiles_i
            while tl.atomic_add(stored_ptr + segment, 0, sem="acquire") < need:
                pass
            tl.debug_barrier()
            fence_async(FENCE)
            one_tile(
                segment, offset, size, tile_m, tile_n, tile, 1, 0,
                act_rows, act_tail, down, down, down_bias_ptr, down_bias_ptr, out_ptr, out_ptr,
                gather_ptr, row_weights_ptr, out_ptr, sizes_ptr, hidden, inter, 1,
                inter, 1, 0, 0, 0, 0, 0, 0,
                stride_dbe, stride_dbn, stride_dbe, stride_dbn, 0, 0, hidden,
                False, False, DOWN_BIAS, False, "none", 1.0, 0.0, None, True, True, True,
                True, True, 0, False, False, DOWN_SWAP, 1, DOWN_TAIL,
                UPCAST, PRECISION, DOWN_M, DOWN_N, DOWN_K, DOWN_STAGES,
            )  # fmt: skip
        # Not before the tile is done: the last ones go to who is free (docs/performance.md).
        ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    launch_late(OVERLAP)
