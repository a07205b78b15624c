"""Rows in expert order -> tokens: the weighted sum over a token's slots, in slot order, in fp32."""

import triton
import triton.language as tl

from .dependent import wait_for_previous


@triton.jit(do_not_specialize=["stride_wt"], do_not_specialize_on_alignment=["weights_ptr"])
def combine_kernel(
    rows_ptr,  # [num_rows, hidden_size]
    scatter_ptr,  # int32 [num_tokens * top_k], row of an assignment or -1
    weights_ptr,  # [num_tokens, top_k], strided; unused without ROUTER_WEIGHT
    out_ptr,  # [num_tokens, hidden_size], or [num_tokens, top_k, hidden_size] without REDUCE
    hidden_size,
    top_k,
    stride_wt,
    stride_wk,
    stride_om,
    stride_os,
    ROUTER_WEIGHT: tl.constexpr,
    REDUCE: tl.constexpr,
    OVERLAP: tl.constexpr,  # with the kernel before (dependent.py)
    BLOCK: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    # Without REDUCE a program handles one assignment instead of one token.
    item = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col_mask = cols < hidden_size
    if REDUCE:
        first = item * top_k
        count = top_k
        out_ptr += item * stride_om
    else:
        first = item
        count = 1
        out_ptr += (item // top_k) * stride_om + (item % top_k) * stride_os

    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in tl.range(0, count, loop_unroll_factor=4):
        assignment = first + slot
        row = tl.load(scatter_ptr + assignment)
        keep = row >= 0
        values = tl.load(
            rows_ptr + row.to(tl.int64) * hidden_size + cols, mask=col_mask & keep, other=0.0
        ).to(tl.float32)
        if ROUTER_WEIGHT:
            token = assignment // top_k
            weight = tl.load(
                weights_ptr + token * stride_wt + (assignment % top_k) * stride_wk,
                mask=keep,
                other=0.0,
            )
            values *= weight.to(tl.float32)
        acc += values
    tl.store(out_ptr + cols, acc.to(out_ptr.dtype.element_ty), mask=col_mask)
