"""Tokens -> rows in expert order: each token's row is read once and copied to its slots' rows."""

import triton
import triton.language as tl

from .dependent import launch_early, launch_late, wait_for_previous


@triton.jit
def permute_kernel(
    x_ptr,  # [num_tokens, hidden_size], strided
    scatter_ptr,  # int32 [num_tokens * top_k], row of an assignment or -1
    rows_ptr,  # [num_rows, hidden_size]
    hidden_size,
    top_k,
    stride_xm,
    stride_xk,
    OVERLAP: tl.constexpr,  # with the kernels before and after (dependent.py)
    BLOCK: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    launch_early(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < hidden_size
    values = tl.load(x_ptr + token * stride_xm + cols.to(tl.int64) * stride_xk, mask=mask)
    for slot in tl.range(0, top_k):
        row = tl.load(scatter_ptr + token * top_k + slot)
        tl.store(rows_ptr + row.to(tl.int64) * hidden_size + cols, values, mask=mask & (row >= 0))
    launch_late(OVERLAP)
