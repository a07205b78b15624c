"""Starting a kernel while the one before it still runs (CUDA's programmatic dependent launch).

A kernel launched so may do anything that does not depend on the kernel before it, then waits until that
has ended and its stores are visible. Every program waits, so that the end of a kernel means the end of
all before it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = tl.constexpr(64)  # Elements in a cache line, of two bytes each.


@triton.jit
def wait_for_previous():
    gdc_wait()


@triton.jit
def launch_dependents():
    """Lets the next kernel start once all programs have said so or ended."""
    gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    base, first_row, num_rows, length, stride, ROWS: tl.constexpr, LENGTH: tl.constexpr
):
    """Asks for the first LENGTH elements of ROWS rows to be brought into L2. Reads nothing."""
    rows = first_row + tl.arange(0, ROWS)
    cols = tl.arange(0, LENGTH // LINE) * LINE
    # Where there is nothing to fetch, fetch the first line again: a prefetch takes no mask.
    rows = tl.minimum(rows, num_rows - 1)
    cols = tl.minimum(cols, length - 1)
    ptrs = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
