"""The grouped GEMM: each expert's rows times that expert's weights, for both halves of the layer.

gate+up:  out[r] = act(x[token(r)] @ gate[e].T, x[token(r)] @ up[e].T)    rows gathered by pointer, or
                                                                in order already (permute.py)
down:     out[r] = x[r] @ down[e].T                                       rows already in order

Programs walk a list of tiles that only the device knows: expert-major, and inside an expert GROUP_M row
tiles share a column of weight tiles so that these are read once from memory and then from L2.

Made on the device, from the sizes that no host has seen:
- an expert's last rows, if TAIL_M or fewer, take a short tile instead of a tall one mostly empty;
- with SPLIT_K, where tiles are too few for the machine, several programs share a tile's reduction.
  They leave partial sums in memory, and the last to arrive adds them up, always in the same order;
- programs past the last tile leave.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged, to_ragged_indices

from .activation import activate
from .dependent import launch_early, launch_late, wait_for_previous


@triton.jit
def tile_ends(sizes_ptr, num_segments, tiles_n, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):
    """Sizes, and the inclusive running count of tiles over the segments, [SEGMENTS] both."""
    seg = tl.arange(0, SEGMENTS)
    sizes = tl.load(sizes_ptr + seg, mask=seg < num_segments, other=0)
    return sizes, tl.cumsum((sizes + BLOCK_M - 1) // BLOCK_M, 0) * tiles_n


@triton.jit
def locate(sizes, ends, tile, tiles_n, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Tile number -> (segment, first row, rows in the segment, row tile, column tile)."""
    past = ends <= tile
    segment = tl.sum(past.to(tl.int32), 0)
    local = tile - tl.max(tl.where(past, ends, 0), 0)
    # From registers: two more loads would wait for memory before the first tile can.
    offset = tl.sum(tl.where(past, sizes, 0), 0)
    size = tl.sum(tl.where(tl.arange(0, SEGMENTS) == segment, sizes, 0), 0)
    tiles_m = (size + BLOCK_M - 1) // BLOCK_M
    group = local // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    inside = local - group * (GROUP_M * tiles_n)
    return segment, offset, size, first_m + inside % height, inside // height


@triton.jit
def load_rows(
    x, ptrs, m_mask, k_mask, offset, size, first_row, k0,
    X_DESCRIPTOR: tl.constexpr, EVEN_K: tl.constexpr, ZERO_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of rows, [BLOCK_M, BLOCK_K]."""
    if X_DESCRIPTOR:
        tile = load_ragged(x, offset, size, [first_row, k0])  # Zeros past the segment.
    elif ZERO_ROWS:
        if EVEN_K:
            tile = tl.load(ptrs, mask=m_mask[:, None], other=0.0)
        else:
            tile = tl.load(ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
    elif EVEN_K:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=k_mask[None, :], other=0.0)
    return tile


@triton.jit
def load_weights(
    w, base, offsets, k_mask, segment, n0, k0,
    DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One weight tile, [BLOCK_N, BLOCK_K]."""
    if DESCRIPTORS:
        tile = w.load([segment, n0, k0]).reshape(BLOCK_N, BLOCK_K)
    elif EVEN_K:
        tile = tl.load(base + offsets)
    else:
        tile = tl.load(base + offsets, mask=k_mask[None, :], other=0.0)
    return tile


@triton.jit
def load_pair(pair, segment, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A gate tile above an up tile, [2 * BLOCK_N, BLOCK_K], by one descriptor load."""
    return pair.load([segment, 0, n0, k0]).reshape(2 * BLOCK_N, BLOCK_K)


@triton.jit
def split_pair(acc, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The accumulator of a pair -> both halves, [BLOCK_M, BLOCK_N] each. Stays in registers."""
    if SWAP:
        first, second = acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0).split()
        first = first.T
        second = second.T
    else:
        first, second = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    return first, second


@triton.jit
def multiply(x, w, acc, SWAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc += x @ w.T; with SWAP the accumulator is transposed, [BLOCK_N, BLOCK_M]."""
    if UPCAST:  # The interpreter multiplies bf16 as integers.
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_up(acc, partials_ptr, counters_ptr, tile, split, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Leaves a partial sum, [ROWS, COLUMNS]; the last of `split` programs gets the whole sum.

    Returns: the sum, and whether this program is the last.
    """
    arrived = 0
    if split > 1:
        inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        first = partials_ptr + (tile * split).to(tl.int64) * (ROWS * COLUMNS)
        tl.store(first + part * (ROWS * COLUMNS) + inside, acc)
        tl.debug_barrier()  # All threads' stores before the one thread that announces them.
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived == split - 1:
            tl.debug_barrier()
            acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for other in tl.range(0, split):
                # Past L1, which other multiprocessors' stores don't reach.
                acc += tl.load(first + other * (ROWS * COLUMNS) + inside, cache_modifier=".cg")
    return acc, arrived == split - 1


@triton.jit
def grouped_tile(
    segment, offset, size, first_row, tile_n, tile, split, part,
    x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr,
    gather_ptr, row_weights_ptr, partials_ptr, counters_ptr,
    N, K, top_k,
    stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
    GATED: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SAME_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_DESCRIPTOR: tl.constexpr, OUT_PARTS: tl.constexpr,
    PAIR: tl.constexpr, UP_FIRST: tl.constexpr, SPLIT_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n0 = tile_n * BLOCK_N
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    m_mask = offs_m < size
    n_mask = offs_n < N
    # Rows past the segment: its first row again in short tiles, without a mask in the loop; zeros in
    # tall ones, as products with zeros draw less power where power bounds the clock (docs/performance.md).
    ZERO_ROWS: tl.constexpr = GATHER and DESCRIPTORS and BLOCK_M >= 64
    rows = offset + tl.where(m_mask, offs_m, 0)
    assignments = rows
    source = rows
    if GATHER or ROW_WEIGHTS:
        assignments = tl.load(gather_ptr + rows)
    if GATHER:
        source = assignments // top_k
    segment64 = segment.to(tl.int64)

    x_ptrs = offs_k  # Stands in where a descriptor replaces pointers.
    u_base = up
    g_base = gate
    u_offsets = offs_k
    g_offsets = offs_k
    if not X_DESCRIPTOR:
        x_ptrs = (
            x_ptr + source.to(tl.int64)[:, None] * stride_xm + offs_k[None, :] * stride_xk
        )  # [BLOCK_M, BLOCK_K]
    if not DESCRIPTORS:
        # 64-bit to the tile's corner, 32-bit inside it: the host checked that a tile spans less.
        n_local = tl.arange(0, BLOCK_N)
        if not EVEN_N:  # Columns past the last repeat it; they are never stored.
            n_local = tl.minimum(n_local, N - 1 - n0)
        n0_64 = n0.to(tl.int64)
        u_base = up + segment64 * stride_ue + n0_64 * stride_un
        u_offsets = n_local[:, None] * stride_un + offs_k[None, :] * stride_uk  # [BLOCK_N, BLOCK_K]
        if GATED:
            g_base = gate + segment64 * stride_ge + n0_64 * stride_gn
            g_offsets = u_offsets
            if not SAME_STRIDES:
                g_offsets = n_local[:, None] * stride_gn + offs_k[None, :] * stride_gk

    COLUMNS: tl.constexpr = 2 * BLOCK_N if PAIR else BLOCK_N
    if SWAP:
        acc_u = tl.zeros([COLUMNS, BLOCK_M], dtype=tl.float32)
    else:
        acc_u = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
    # Two products, two accumulators: sharing one miscompiles on Blackwell
    # (https://github.com/triton-lang/triton/issues/10821).
    acc_g = acc_u

    first_k = 0
    end_k = K
    if SPLIT_K > 1:
        length = tl.cdiv(tl.cdiv(K, BLOCK_K), split) * BLOCK_K
        first_k = part * length
        end_k = tl.minimum(K, first_k + length)
        if not X_DESCRIPTOR:
            x_ptrs += first_k * stride_xk
        if not DESCRIPTORS:
            u_base += first_k * stride_uk
            if GATED:
                g_base += first_k * stride_gk
    for k in tl.range(first_k, end_k, BLOCK_K, num_stages=NUM_STAGES):
        k_mask = offs_k < K - k
        if not DESCRIPTORS:
            x = load_rows(
                x_ptr, x_ptrs, m_mask, k_mask, offset, size, first_row, k,
                X_DESCRIPTOR, EVEN_K, ZERO_ROWS,
            )  # fmt: skip
        if PAIR:
            w = load_pair(gate, segment, n0, k, BLOCK_N, BLOCK_K)
        else:
            w = load_weights(
                up, u_base, u_offsets, k_mask, segment, n0, k,
                DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if GATED and not PAIR:
            g = load_weights(
                gate, g_base, g_offsets, k_mask, segment, n0, k,
                DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if DESCRIPTORS:  # After the weights, whose copies need not wait for the gather index.
            x = load_rows(
                x_ptr, x_ptrs, m_mask, k_mask, offset, size, first_row, k,
                X_DESCRIPTOR, EVEN_K, ZERO_ROWS,
            )  # fmt: skip
        if GATED and not PAIR:
            acc_g = multiply(x, g, acc_g, SWAP, UPCAST, PRECISION)
        acc_u = multiply(x, w, acc_u, SWAP, UPCAST, PRECISION)
        if not X_DESCRIPTOR:
            x_ptrs += BLOCK_K * stride_xk
        if not DESCRIPTORS:
            u_base += BLOCK_K * stride_uk
            if GATED:
                g_base += BLOCK_K * stride_gk

    if SPLIT_K > 1:  # One accumulator: the host splits pairs and single products only.
        ROWS: tl.constexpr = COLUMNS if SWAP else BLOCK_M
        WIDTH: tl.constexpr = BLOCK_M if SWAP else COLUMNS
        acc_u, complete = add_up(acc_u, partials_ptr, counters_ptr, tile, split, part, ROWS, WIDTH)
        m_mask = m_mask & complete
    if PAIR:
        acc_g, acc_u = split_pair(acc_u, SWAP, BLOCK_M, BLOCK_N)
        if UP_FIRST:
            acc_g, acc_u = acc_u, acc_g
    elif SWAP:
        acc_u = acc_u.T
        acc_g = acc_g.T
    if ROW_WEIGHTS:
        token = (assignments // top_k).to(tl.int64)
        weight = tl.load(
            row_weights_ptr + token * stride_rt + (assignments % top_k) * stride_rk
        ).to(tl.float32)  # [BLOCK_M]
        # Scaling the product equals scaling the input row, without rounding that row.
        acc_u *= weight[:, None]
        if GATED:
            acc_g *= weight[:, None]
    if BIAS:
        acc_u += tl.load(
            up_bias_ptr + segment64 * stride_ube + offs_n * stride_ubn, mask=n_mask, other=0.0
        ).to(tl.float32)[None, :]
        if GATED:
            acc_g += tl.load(
                gate_bias_ptr + segment64 * stride_gbe + offs_n * stride_gbn, mask=n_mask, other=0.0
            ).to(tl.float32)[None, :]
    result = activate(acc_g, acc_u, KIND, ALPHA, BETA, LIMIT)

    if OUT_PARTS > 0:
        store_parts(out_ptr, result, offset, size, first_row, n0, OUT_PARTS)
    else:
        store_rows(out_ptr, result, offset + offs_m, offs_n, m_mask, n_mask, stride_om)


@triton.jit
def store_rows(out_ptr, result, rows, cols, m_mask, n_mask, stride_om):
    """Stores a tile by pointers."""
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    tl.store(
        out_ptrs, result.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :]
    )  # fmt: skip


@triton.jit
def store_parts(out, result, offset, size, first_row, n0, PARTS: tl.constexpr):
    """Stores a tile by descriptor, clipped to the segment; in parts where staging it all is too much."""
    value = result.to(out.dtype)
    ROWS: tl.constexpr = result.shape[0]
    COLUMNS: tl.constexpr = result.shape[1]
    if PARTS == 1:
        outer, end, row = to_ragged_indices(offset, size, first_row)
        out.store([outer, end, row, n0], value.reshape(1, 1, ROWS, COLUMNS))
    else:
        HALF: tl.constexpr = COLUMNS // 2
        first, second = value.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        store_parts(out, first, offset, size, first_row, n0, PARTS // 2)
        store_parts(out, second, offset, size, first_row, n0 + HALF, PARTS // 2)


@triton.jit
def one_tile(
    segment, offset, size, tile_m, tile_n, tile, split, part,
    x_ptr, x_tail_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr, out_tail_ptr,
    gather_ptr, row_weights_ptr, partials_ptr, counters_ptr,
    N, K, top_k,
    stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
    GATED: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SAME_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_DESCRIPTOR: tl.constexpr, OUT_PARTS: tl.constexpr,
    PAIR: tl.constexpr, UP_FIRST: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
    TAIL_M: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M rows, or of TAIL_M where that holds what is left of the segment."""
    first_row = tile_m * BLOCK_M
    place = (segment, offset, size, first_row, tile_n, tile, split, part)
    weights = (gate, up, gate_bias_ptr, up_bias_ptr)
    rest = (
        gather_ptr, row_weights_ptr, partials_ptr, counters_ptr, N, K, top_k,
        stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
        stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
    )  # fmt: skip
    if TAIL_M == 0:
        grouped_tile(
            *place, x_ptr, *weights, out_ptr, *rest,
            GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
            DESCRIPTORS, X_DESCRIPTOR, OUT_PARTS, PAIR, UP_FIRST, SPLIT_K, UPCAST, PRECISION,
            BLOCK_N, BLOCK_K, NUM_STAGES, SWAP, BLOCK_M,
        )  # fmt: skip
    else:
        if size - first_row <= TAIL_M:
            # wgmma's 64 rows are the weights' where the tile has fewer; a pair is faster in order.
            grouped_tile(
                *place, x_tail_ptr, *weights, out_tail_ptr, *rest,
                GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
                DESCRIPTORS, X_DESCRIPTOR, OUT_PARTS, PAIR, UP_FIRST, SPLIT_K, UPCAST, PRECISION,
                BLOCK_N, BLOCK_K, NUM_STAGES, TAIL_M < 64 and not PAIR, TAIL_M,
            )  # fmt: skip
        else:
            grouped_tile(
                *place, x_ptr, *weights, out_ptr, *rest,
                GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
                DESCRIPTORS, X_DESCRIPTOR, OUT_PARTS, PAIR, UP_FIRST, SPLIT_K, UPCAST, PRECISION,
                BLOCK_N, BLOCK_K, NUM_STAGES, SWAP, BLOCK_M,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_segments",
        "num_programs",
        "top_k",
        "more_than",
        "at_most",
        "stride_rt",
    ],
    do_not_specialize_on_alignment=["row_weights_ptr"],
)
def grouped_gemm_kernel(
    x_ptr,  # [num_tokens, K] gathered, or [num_rows, K] in order; a ragged descriptor if X_DESCRIPTOR
    x_tail_ptr,  # the same, its descriptor TAIL_M rows high
    gate,  # [num_segments, N, K] by three strides, or a descriptor; `up` again if not GATED; a
    # descriptor of both, [num_segments, 2, N, K], if PAIR
    up,  # [num_segments, N, K] likewise
    gate_bias_ptr,  # [num_segments, N]
    up_bias_ptr,  # [num_segments, N]
    out_ptr,  # [num_rows, N] in expert order; a descriptor if OUT_PARTS
    out_tail_ptr,  # the same, its descriptor TAIL_M rows high
    sizes_ptr,  # int32 [num_segments]
    gather_ptr,  # int32 [num_rows]
    row_weights_ptr,  # [num_tokens, top_k] by two strides
    partials_ptr,  # fp32, a tile for each of num_programs programs, if SPLIT_K > 1
    counters_ptr,  # int32 [num_programs], zero, if SPLIT_K > 1
    num_segments, num_programs, N, K, top_k,
    more_than, at_most,  # active segments, without which BOUNDED programs leave
    stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
    SEGMENTS: tl.constexpr,  # power of two >= num_segments
    GATED: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SAME_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_DESCRIPTOR: tl.constexpr, OUT_PARTS: tl.constexpr,
    PAIR: tl.constexpr, UP_FIRST: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
    TAIL_M: tl.constexpr,
    OVERLAP: tl.constexpr,  # with the kernels before and after (dependent.py)
    BOUNDED: tl.constexpr,  # one of two launches, of which the sizes choose
    PERSISTENT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    launch_early(OVERLAP)
    tiles_n = tl.cdiv(N, BLOCK_N)
    sizes, ends = tile_ends(sizes_ptr, num_segments, tiles_n, BLOCK_M, SEGMENTS)
    num_tiles = tl.max(ends, 0)
    if BOUNDED:
        active = tl.sum((sizes > 0).to(tl.int32), 0)
        num_tiles = tl.where((active > more_than) & (active <= at_most), num_tiles, 0)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=True):
            segment, offset, size, tile_m, tile_n = locate(
                sizes, ends, tile, tiles_n, GROUP_M, BLOCK_M, SEGMENTS
            )
            one_tile(
                segment, offset, size, tile_m, tile_n, tile, 1, 0,
                x_ptr, x_tail_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr, out_tail_ptr,
                gather_ptr, row_weights_ptr, partials_ptr, counters_ptr, N, K, top_k,
                stride_xm, stride_xk, stride_ge, stride_gn, stride_gk,
                stride_ue, stride_un, stride_uk,
                stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
                GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
                DESCRIPTORS, X_DESCRIPTOR, OUT_PARTS, PAIR, UP_FIRST, SWAP, SPLIT_K, TAIL_M,
                UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
    else:
        program = tl.program_id(0)
        split = 1
        if SPLIT_K > 1:
            split = tl.minimum(tl.maximum(num_programs // tl.maximum(num_tiles, 1), 1), SPLIT_K)
        tile = program // split
        # The grid is a host-side bound; programs past the last tile have nothing to do.
        if tile < num_tiles:
            segment, offset, size, tile_m, tile_n = locate(
                sizes, ends, tile, tiles_n, GROUP_M, BLOCK_M, SEGMENTS
            )
            one_tile(
                segment, offset, size, tile_m, tile_n, tile, split, program % split,
                x_ptr, x_tail_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr, out_tail_ptr,
                gather_ptr, row_weights_ptr, partials_ptr, counters_ptr, N, K, top_k,
                stride_xm, stride_xk, stride_ge, stride_gn, stride_gk,
                stride_ue, stride_un, stride_uk,
                stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
                GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
                DESCRIPTORS, X_DESCRIPTOR, OUT_PARTS, PAIR, UP_FIRST, SWAP, SPLIT_K, TAIL_M,
                UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
    launch_late(OVERLAP)
