"""Peer ``torch_gmm``: torch's ``grouped_mm`` between four small Triton kernels, without a sync."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bench.peers.base import Layer, Peer

SORT_BLOCK = 1024


@triton.jit
def _count(ids_ptr, counts_ptr, n, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    ids = tl.load(ids_ptr + index, mask=mask, other=0)
    counts = tl.histogram(ids, EXPERTS, mask=mask)
    tl.store(counts_ptr + block * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit
def _sort(
    ids_ptr,
    counts_ptr,
    ends_ptr,
    order_ptr,
    inverse_ptr,
    n,
    num_blocks,
    num_experts,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    other = tl.arange(0, BLOCKS)
    counts = tl.load(
        counts_ptr + other[:, None] * EXPERTS + expert[None, :],
        mask=(other < num_blocks)[:, None],
        other=0,
    )  # [BLOCKS, EXPERTS]
    total = tl.sum(counts, 0)
    before = tl.sum(tl.where((other < block)[:, None], counts, 0), 0)
    mine = tl.sum(tl.where((other == block)[:, None], counts, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends_ptr + expert, ends, mask=expert < num_experts)

    # A stable sort by expert: the id in the upper half of the key, the position in the lower.
    local = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + block * BLOCK + local, mask=block * BLOCK + local < n, other=0x7FFF)
    key = tl.sort((ids << 16) | local)
    source = block * BLOCK + (key & 0xFFFF)
    valid = source < n
    first = ends - total + before - (tl.cumsum(mine, 0) - mine)  # [EXPERTS]
    target = tl.gather(first, tl.where(valid, key >> 16, 0), 0) + local
    tl.store(order_ptr + target, source, mask=valid)
    tl.store(inverse_ptr + source, target, mask=valid)


@triton.jit
def _gather_rows(x_ptr, order_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(order_ptr + row).to(tl.int64) // TOP_K
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < hidden
        tl.store(
            out_ptr + row * hidden + column,
            tl.load(x_ptr + token * hidden + column, mask=mask),
            mask,
        )


@triton.jit
def _silu_mul(h_ptr, out_ptr, inter, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, inter, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < inter
        gate = tl.load(h_ptr + row * 2 * inter + column, mask=mask).to(tl.float32)
        up = tl.load(h_ptr + row * 2 * inter + inter + column, mask=mask).to(tl.float32)
        out = gate / (1 + tl.exp(-gate)) * up
        tl.store(out_ptr + row * inter + column, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _combine(y_ptr, inverse_ptr, w_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + k).to(tl.int64)
        weight = tl.load(w_ptr + token * TOP_K + k)
        total += weight * tl.load(y_ptr + row * hidden + column, mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask)


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts assignments by expert, stably.

    Args:
        topk_ids: int32 [T, k], contiguous, every id in [0, num_experts).

    Returns:
        ``ends`` [E], the end of each expert's rows; ``order`` [T * k], the assignment at each row;
        and ``inverse`` [T * k], the row of each assignment. All int32.
    """
    n, device = topk_ids.numel(), topk_ids.device
    experts = triton.next_power_of_2(num_experts)
    num_blocks = triton.cdiv(n, SORT_BLOCK)
    counts = torch.empty(num_blocks, experts, dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    order, inverse = torch.empty(2, n, dtype=torch.int32, device=device)
    grid = (num_blocks,)
    _count[grid](topk_ids, counts, n, EXPERTS=experts, BLOCK=SORT_BLOCK)
    _sort[grid](
        *(topk_ids, counts, ends, order, inverse, n, num_blocks, num_experts),
        EXPERTS=experts,
        BLOCK=SORT_BLOCK,
        BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )
    return ends, order, inverse


def load() -> Peer:
    """Returns the layer; it takes the weights as they are."""
    grouped_mm = F.grouped_mm

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        gate_up, down = w13.mT, w2.mT

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            num_experts, hidden, inter = w2.shape
            num_tokens, top_k = topk_ids.shape
            n = num_tokens * top_k
            ends, order, inverse = sort_by_expert(topk_ids, num_experts)
            rows = x.new_empty(n, hidden)
            _gather_rows[(n,)](x, order, rows, hidden, TOP_K=top_k, BLOCK=1024)
            h = grouped_mm(rows, gate_up, offs=ends)
            act = x.new_empty(n, inter)
            _silu_mul[(n,)](h, act, inter, BLOCK=1024)
            y = grouped_mm(act, down, offs=ends)
            out = torch.empty_like(x)
            grid = (num_tokens, triton.cdiv(hidden, 1024))
            _combine[grid](y, inverse, topk_weights, out, hidden, TOP_K=top_k, BLOCK=1024)
            return out

        return layer

    return Peer(prepare, f"torch {torch.__version__}")
