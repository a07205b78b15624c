"""The whole layer in two launches for a few tokens: no sort, no plan, no separate combine.

gate_up:  program (assignment, columns)  -> act[assignment, columns]
down:     program (token, columns)       -> out[token, columns], looping over the token's slots in order

Every weight element is read once per assignment, straight into registers, and multiplied there: at one
row per expert the layer is a memory stream, and a matrix instruction would only add latency.
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def one_expert(
    ids_ptr, map_ptr, token, slot, num_experts, num_local_experts, stride_t, stride_k,
    HAS_MAP: tl.constexpr,
):  # fmt: skip
    """Local expert of one assignment, -1 where it is to be skipped."""
    expert = tl.load(ids_ptr + token * stride_t + slot * stride_k)
    valid = (expert >= 0) & (expert < num_experts)
    if HAS_MAP:
        expert = tl.load(map_ptr + expert, mask=valid, other=-1)
        # A map that names an expert this device lacks must not reach past its weights.
        valid = valid & (expert < num_local_experts)
    return tl.where(valid, expert, -1).to(tl.int64)


@triton.jit(
    do_not_specialize=["num_experts", "num_local_experts", "top_k", "stride_it", "stride_rt"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr", "row_weights_ptr"],
)
def decode_gate_up_kernel(
    x_ptr,  # [num_tokens, K]
    gate_ptr,  # [num_local_experts, N, K] by three strides; `up_ptr` again if not GATED
    up_ptr,  # [num_local_experts, N, K] by three strides
    gate_bias_ptr,  # [num_local_experts, N]
    up_bias_ptr,  # [num_local_experts, N]
    act_ptr,  # [num_tokens * top_k, N]
    ids_ptr,  # int [num_tokens, top_k]
    map_ptr,  # int [num_experts]
    row_weights_ptr,  # [num_tokens, top_k]
    num_experts, num_local_experts, N, K, top_k,
    stride_xm, stride_xk, stride_ge, stride_gn, stride_gk, stride_ue, stride_un, stride_uk,
    stride_gbe, stride_gbn, stride_ube, stride_ubn, stride_it, stride_ik, stride_rt, stride_rk,
    HAS_MAP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    assignment = tl.program_id(1).to(tl.int64)
    token = assignment // top_k
    slot = assignment % top_k
    expert = one_expert(
        ids_ptr, map_ptr, token, slot, num_experts, num_local_experts, stride_it, stride_ik,
        HAS_MAP,
    )  # fmt: skip
    if expert >= 0:
        offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K)
        n_mask = offs_n < N
        x_ptrs = x_ptr + token * stride_xm + offs_k * stride_xk
        k64 = offs_k.to(tl.int64)[None, :]
        g_ptrs = gate_ptr + expert * stride_ge + offs_n[:, None] * stride_gn + k64 * stride_gk
        u_ptrs = up_ptr + expert * stride_ue + offs_n[:, None] * stride_un + k64 * stride_uk
        acc_g = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        acc_u = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
            k_mask = offs_k < K - k
            mask = n_mask[:, None] & k_mask[None, :]
            u = tl.load(u_ptrs, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptrs, mask=k_mask, other=0.0).to(tl.float32)
            acc_u += u * x[None, :]
            if GATED:
                g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
                acc_g += g * x[None, :]
            x_ptrs += BLOCK_K * stride_xk
            g_ptrs += BLOCK_K * stride_gk
            u_ptrs += BLOCK_K * stride_uk
        up = tl.sum(acc_u, 1)
        gate = up
        if GATED:
            gate = tl.sum(acc_g, 1)
        if ROW_WEIGHTS:
            weight = tl.load(row_weights_ptr + token * stride_rt + slot * stride_rk).to(tl.float32)
            up *= weight
            gate *= weight
        if BIAS:
            up += tl.load(
                up_bias_ptr + expert * stride_ube + offs_n * stride_ubn, mask=n_mask, other=0.0
            ).to(tl.float32)
            if GATED:
                gate += tl.load(
                    gate_bias_ptr + expert * stride_gbe + offs_n * stride_gbn,
                    mask=n_mask,
                    other=0.0,
                ).to(tl.float32)
        result = activate(gate, up, KIND, ALPHA, BETA, LIMIT)
        tl.store(
            act_ptr + assignment * N + offs_n, result.to(act_ptr.dtype.element_ty), mask=n_mask
        )


@triton.jit(
    do_not_specialize=["num_experts", "num_local_experts", "top_k", "stride_it", "stride_rt"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr", "row_weights_ptr"],
)
def decode_down_kernel(
    act_ptr,  # [num_tokens * top_k, K]
    down_ptr,  # [num_local_experts, N, K] by three strides
    bias_ptr,  # [num_local_experts, N]
    out_ptr,  # [num_tokens, N]
    ids_ptr,  # int [num_tokens, top_k]
    map_ptr,  # int [num_experts]
    row_weights_ptr,  # [num_tokens, top_k]
    num_experts, num_local_experts, N, K, top_k,
    stride_de, stride_dn, stride_dk, stride_be, stride_bn,
    stride_it, stride_ik, stride_rt, stride_rk, stride_om,
    HAS_MAP: tl.constexpr, BIAS: tl.constexpr, ROW_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    n_mask = offs_n < N
    k64 = offs_k.to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    # One flat loop over slots and K keeps loads in flight across the slots.
    for step in tl.range(0, top_k * steps, num_stages=NUM_STAGES):
        slot = step // steps
        first_k = (step % steps) * BLOCK_K
        expert = one_expert(
            ids_ptr, map_ptr, token, slot, num_experts, num_local_experts, stride_it, stride_ik,
            HAS_MAP,
        )  # fmt: skip
        keep = expert >= 0
        weight = 1.0
        if ROW_WEIGHTS:
            weight = tl.load(
                row_weights_ptr + token * stride_rt + slot * stride_rk, mask=keep, other=0.0
            ).to(tl.float32)
        k_mask = (offs_k < K - first_k) & keep
        row = act_ptr + (token * top_k + slot) * K + first_k
        a = tl.load(row + k64, mask=k_mask, other=0.0).to(tl.float32) * weight
        d = tl.load(
            down_ptr + expert * stride_de + offs_n[:, None] * stride_dn
            + (k64 + first_k)[None, :] * stride_dk,
            mask=n_mask[:, None] & k_mask[None, :],
            other=0.0,
        ).to(tl.float32)  # fmt: skip
        acc += d * a[None, :]
        if BIAS:
            bias = tl.load(
                bias_ptr + expert * stride_be + offs_n * stride_bn,
                mask=n_mask & keep & (first_k == 0),
                other=0.0,
            ).to(tl.float32)
            total += bias * weight
    total += tl.sum(acc, 1)
    tl.store(out_ptr + token * stride_om + offs_n, total.to(out_ptr.dtype.element_ty), mask=n_mask)
