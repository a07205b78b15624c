"""The grouped GEMM: each expert's rows times that expert's weights, for both halves of the layer.

gate+up:  out[r] = act(x[token(r)] @ gate[e].T, x[token(r)] @ up[e].T)    rows gathered by pointer
down:     out[r] = x[r] @ down[e].T                                       rows already in order

Programs walk a list of tiles that only the device knows: expert-major, and inside an expert GROUP_M row
tiles share a column of weight tiles so that these are read once from memory and then from L2.
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def tile_ends(sizes_ptr, num_segments, tiles_n, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):
    """Inclusive running count of tiles over the segments, [SEGMENTS]."""
    seg = tl.arange(0, SEGMENTS)
    sizes = tl.load(sizes_ptr + seg, mask=seg < num_segments, other=0)
    return tl.cumsum((sizes + BLOCK_M - 1) // BLOCK_M, 0) * tiles_n


@triton.jit
def locate(ends, tile, tiles_n, sizes_ptr, offsets_ptr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Tile number -> (segment, first row, rows in the segment, row tile, column tile)."""
    past = ends <= tile
    segment = tl.sum(past.to(tl.int32), 0)
    local = tile - tl.max(tl.where(past, ends, 0), 0)
    size = tl.load(sizes_ptr + segment)
    offset = tl.load(offsets_ptr + segment)
    tiles_m = (size + BLOCK_M - 1) // BLOCK_M
    group = local // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    inside = local - group * (GROUP_M * tiles_n)
    return segment, offset, size, first_m + inside % height, inside // height


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
def grouped_tile(
    tile, ends, tiles_n,
    x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr,
    sizes_ptr, offsets_ptr, gather_ptr, row_weights_ptr,
    N, K, top_k,
    stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
    GATED: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SAME_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_DESCRIPTOR: tl.constexpr, PAIR: tl.constexpr,
    UP_FIRST: tl.constexpr, SWAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    segment, offset, size, tile_m, tile_n = locate(
        ends, tile, tiles_n, sizes_ptr, offsets_ptr, GROUP_M, BLOCK_M
    )
    n0 = tile_n * BLOCK_N
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    m_mask = offs_m < size
    n_mask = offs_n < N
    # Rows past the segment repeat its first row: no mask in the loop, and nothing unwritten is read.
    rows = offset + tl.where(m_mask, offs_m, 0)
    if GATHER:
        assignments = tl.load(gather_ptr + rows)
        source = assignments // top_k
    else:
        assignments = rows
        source = rows
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
    # Two products, two accumulators: sharing one miscompiles on Blackwell (triton#10821).
    acc_g = acc_u

    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        k_mask = offs_k < K - k
        if X_DESCRIPTOR:
            x = x_ptr.load([offset + tile_m * BLOCK_M, k])
        elif EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k_mask[None, :], other=0.0)
        if PAIR:
            w = load_pair(gate, segment, n0, k, BLOCK_N, BLOCK_K)
            acc_u = multiply(x, w, acc_u, SWAP, UPCAST, PRECISION)
        elif GATED:
            g = load_weights(
                gate, g_base, g_offsets, k_mask, segment, n0, k,
                DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc_g = multiply(x, g, acc_g, SWAP, UPCAST, PRECISION)
        if not PAIR:
            u = load_weights(
                up, u_base, u_offsets, k_mask, segment, n0, k,
                DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc_u = multiply(x, u, acc_u, SWAP, UPCAST, PRECISION)
        if not X_DESCRIPTOR:
            x_ptrs += BLOCK_K * stride_xk
        if not DESCRIPTORS:
            u_base += BLOCK_K * stride_uk
            if GATED:
                g_base += BLOCK_K * stride_gk

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

    out_rows = (offset + offs_m).to(tl.int64)
    out_ptrs = out_ptr + out_rows[:, None] * stride_om + offs_n[None, :]
    tl.store(
        out_ptrs, result.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :]
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_segments", "num_programs", "top_k", "stride_rt"],
    do_not_specialize_on_alignment=["row_weights_ptr"],
)
def grouped_gemm_kernel(
    x_ptr,  # [num_tokens, K] gathered, or [num_rows, K] in order; a descriptor if X_DESCRIPTOR
    gate,  # [num_segments, N, K] by three strides, or a descriptor; `up` again if not GATED; a
    # descriptor of both, [num_segments, 2, N, K], if PAIR
    up,  # [num_segments, N, K] likewise
    gate_bias_ptr,  # [num_segments, N]
    up_bias_ptr,  # [num_segments, N]
    out_ptr,  # [num_rows, N] in expert order
    sizes_ptr,  # int32 [num_segments]
    offsets_ptr,  # int32 [num_segments + 1]
    gather_ptr,  # int32 [num_rows]
    row_weights_ptr,  # [num_tokens, top_k] by two strides
    num_segments, num_programs, N, K, top_k,
    stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
    SEGMENTS: tl.constexpr,  # power of two >= num_segments
    GATED: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SAME_STRIDES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, X_DESCRIPTOR: tl.constexpr, PAIR: tl.constexpr,
    UP_FIRST: tl.constexpr, SWAP: tl.constexpr,
    PERSISTENT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    ends = tile_ends(sizes_ptr, num_segments, tiles_n, BLOCK_M, SEGMENTS)
    num_tiles = tl.max(ends, 0)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=True):
            grouped_tile(
                tile, ends, tiles_n,
                x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr,
                sizes_ptr, offsets_ptr, gather_ptr, row_weights_ptr,
                N, K, top_k,
                stride_xm, stride_xk, stride_ge, stride_gn, stride_gk,
                stride_ue, stride_un, stride_uk,
                stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
                GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
                DESCRIPTORS, X_DESCRIPTOR, PAIR, UP_FIRST, SWAP, UPCAST, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, NUM_STAGES,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        # The grid is a host-side bound; programs past the last tile have nothing to do.
        if tile < num_tiles:
            grouped_tile(
                tile, ends, tiles_n,
                x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, out_ptr,
                sizes_ptr, offsets_ptr, gather_ptr, row_weights_ptr,
                N, K, top_k,
                stride_xm, stride_xk, stride_ge, stride_gn, stride_gk,
                stride_ue, stride_un, stride_uk,
                stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_rt, stride_rk, stride_om,
                GATED, GATHER, BIAS, ROW_WEIGHTS, KIND, ALPHA, BETA, LIMIT, EVEN_K, EVEN_N, SAME_STRIDES,
                DESCRIPTORS, X_DESCRIPTOR, PAIR, UP_FIRST, SWAP, UPCAST, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, NUM_STAGES,
            )  # fmt: skip
