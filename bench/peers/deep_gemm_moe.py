"""Peers ``deep_gemm`` and ``deep_gemm_masked``: DeepGEMM's bf16 grouped products in a MoE layer.

vLLM calls DeepGEMM for fp8 and fp4 alone, so the layer around the two products is here: rows laid
out by expert, SwiGLU, weighted sum, each one small kernel. ``deep_gemm`` starts each expert's rows
at a multiple of 128, ``deep_gemm_masked`` gives each expert room for every token: for decoding.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.peers import deep_gemm_jit
from bench.peers.base import Layer, Peer
from bench.peers.torch_gmm import SORT_BLOCK, _combine, _count

MASKED_TOKENS = 256  # above, room for every token in each expert is gigabytes


@triton.jit
def _place(
    ids_ptr,
    counts_ptr,
    totals_ptr,
    expert_of_row_ptr,
    row_ptr,
    n,
    num_blocks,
    num_experts,
    room,
    ALIGN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Rows of assignments: experts start at multiples of ALIGN, or of `room` if ALIGN is 0."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    other = tl.arange(0, BLOCKS)
    counts = tl.load(
        counts_ptr + other[:, None] * EXPERTS + expert[None, :],
        mask=(other < num_blocks)[:, None],
        other=0,
    )
    total = tl.sum(counts, 0)
    before = tl.sum(tl.where((other < block)[:, None], counts, 0), 0)
    mine = tl.sum(tl.where((other == block)[:, None], counts, 0), 0)
    if ALIGN == 0:
        start = expert * room
        if block == 0:
            tl.store(totals_ptr + expert, total, mask=expert < num_experts)
    else:
        padded = (total + ALIGN - 1) // ALIGN * ALIGN
        start = tl.cumsum(padded, 0) - padded

    # A stable sort by expert: the id in the upper half of the key, the position in the lower.
    local = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + block * BLOCK + local, mask=block * BLOCK + local < n, other=0x7FFF)
    key = tl.sort((ids << 16) | local)
    source = block * BLOCK + (key & 0xFFFF)
    valid = source < n
    owner = tl.where(valid, key >> 16, 0)
    first = start + before - (tl.cumsum(mine, 0) - mine)
    row = tl.gather(first, owner, 0) + local
    tl.store(row_ptr + source, row, mask=valid)
    if ALIGN != 0:
        tl.store(expert_of_row_ptr + row, owner, mask=valid)


@triton.jit
def _spread(x_ptr, row_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Copies a token to its rows, reading it once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    values = tl.load(x_ptr + token * hidden + column, mask=mask)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + row * hidden + column, values, mask)


@triton.jit
def _silu_mul(h_ptr, row_ptr, out_ptr, inter, BLOCK: tl.constexpr):
    """SwiGLU of the rows that hold an assignment; padding is left alone."""
    row = tl.load(row_ptr + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inter
    gate = tl.load(h_ptr + row * 2 * inter + column, mask=mask).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * inter + inter + column, mask=mask).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * inter + column, out.to(out_ptr.dtype.element_ty), mask)


def rows_of(topk_ids: Tensor, num_experts: int, align: int, room: int) -> tuple[Tensor, Tensor]:
    """Lays assignments out by expert, stably.

    Args:
        topk_ids: int32 [T, k], contiguous, every id in [0, num_experts).
        align: experts start at multiples of this; 0 where each has `room` rows.
        room: rows of each expert, for `align` 0.

    Returns:
        What the products ask for, the expert of each row or -1 (`align` 0: the rows of each
        expert), and the row of each assignment [T * k]. All int32.
    """
    n, device = topk_ids.numel(), topk_ids.device
    experts = triton.next_power_of_2(num_experts)
    num_blocks = triton.cdiv(n, SORT_BLOCK)
    counts = torch.empty(num_blocks, experts, dtype=torch.int32, device=device)
    rows = torch.empty(n, dtype=torch.int32, device=device)
    if align:
        # -1: a block of rows that no assignment fills is skipped by the products.
        most = triton.cdiv(n + min(n, num_experts) * (align - 1), align) * align
        layout = torch.full((most,), -1, dtype=torch.int32, device=device)
    else:
        layout = torch.empty(num_experts, dtype=torch.int32, device=device)
    grid = (num_blocks,)
    _count[grid](topk_ids, counts, n, EXPERTS=experts, BLOCK=SORT_BLOCK)
    _place[grid](
        *(topk_ids, counts, layout, layout, rows, n, num_blocks, num_experts, room),
        ALIGN=align,
        EXPERTS=experts,
        BLOCK=SORT_BLOCK,
        BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )
    return layout, rows


def load() -> Peer:
    """Returns the layer on the contiguous layout."""
    return _load(masked=False)


def load_masked() -> Peer:
    """Returns the layer on the masked layout; it refuses more than `MASKED_TOKENS` tokens."""
    return _load(masked=True)


def _load(*, masked: bool) -> Peer:
    compiler = deep_gemm_jit.prepare()
    deep_gemm = importlib.import_module("deep_gemm")
    products = make_products(deep_gemm, masked=masked)
    # vLLM switches it on too: the second product's prologue overlaps the kernel before it.
    deep_gemm.set_pdl(True)
    align = 0 if masked else int(deep_gemm.get_mk_alignment_for_contiguous_layout())

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        return make_layer(w13, w2, products, align)

    notes = {"compiler": compiler, "around the products": "small Triton kernels of bench/peers"}
    version = f"DeepGEMM {deep_gemm.__version__}, as vendored in vLLM 0.24.0"
    return Peer(prepare, version, notes, MASKED_TOKENS if masked else math.inf)


# (rows [M, K], weights [E, N, K], out [M, N], layout, rows expected of an expert)
Product = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]


def make_products(deep_gemm: ModuleType, *, masked: bool) -> Product:
    """Returns DeepGEMM's grouped product for one of the two layouts."""

    def contiguous(a: Tensor, b: Tensor, out: Tensor, layout: Tensor, expected: int) -> None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, out, layout)

    def by_mask(a: Tensor, b: Tensor, out: Tensor, layout: Tensor, expected: int) -> None:
        by_expert = (b.shape[0], -1)
        a, out = a.view(*by_expert, a.shape[-1]), out.view(*by_expert, out.shape[-1])
        deep_gemm.m_grouped_bf16_gemm_nt_masked(a, b, out, layout, expected)

    return by_mask if masked else contiguous


def make_layer(w13: Tensor, w2: Tensor, product: Product, align: int) -> Layer:
    """Returns the layer around a grouped product; `align` 0 means the masked layout."""
    num_experts, hidden, inter = w2.shape

    def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        num_tokens, top_k = topk_ids.shape
        if not align and num_tokens > MASKED_TOKENS:
            raise ValueError(f"masked layout: {num_tokens} tokens, made for {MASKED_TOKENS}")
        room = triton.cdiv(num_tokens, 128) * 128  # no tile may reach into the next expert
        layout, rows = rows_of(topk_ids, num_experts, align, room)
        padded = layout.numel() if align else num_experts * room
        expected = triton.cdiv(num_tokens * top_k, num_experts)
        spread = x.new_empty(padded, hidden)
        grid = (num_tokens, triton.cdiv(hidden, 1024))
        _spread[grid](x, rows, spread, hidden, TOP_K=top_k, BLOCK=1024)
        h = x.new_empty(padded, 2 * inter)
        product(spread, w13, h, layout, expected)
        act = x.new_empty(padded, inter)
        _silu_mul[(rows.numel(), triton.cdiv(inter, 1024))](h, rows, act, inter, BLOCK=1024)
        y = spread  # its rows are read: the second product writes over them
        product(act, w2, y, layout, expected)
        out = torch.empty_like(x)
        _combine[grid](y, rows, topk_weights, out, hidden, TOP_K=top_k, BLOCK=1024)
        return out

    return layer
