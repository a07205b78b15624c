"""Router logits -> the chosen experts and their weights, one program a token.

Keys are 64-bit: the score as an order-preserving integer above, the complement of the index below. One
integer maximum then picks the best score and, among equals, the lowest index; NaN sorts below all.
"""

import triton
import triton.language as tl

_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def sort_keys(score, index, valid):
    """int64 keys, distinct, larger for better scores and lower indices; the smallest if not valid."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0.
    # Negative floats order backwards as integers: flip all their bits but the sign.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(score != score, -2147483648, ordered)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(valid, key, -9223372036854775808)


@triton.jit
def key_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["stride_lt"])
def route_kernel(
    logits_ptr,  # [num_tokens, num_experts], strided
    bias_ptr,  # [num_experts] added to the scores for choosing only
    weights_ptr,  # fp32 [num_tokens, top_k]
    ids_ptr,  # int32 [num_tokens, top_k]
    num_experts, top_k, group_size, topk_group,
    stride_lt, stride_le,
    scale,
    SCORING: tl.constexpr,  # "softmax", "sigmoid" or "topk_softmax"
    RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, EXPERTS)
    real = index < num_experts
    logits = tl.load(
        logits_ptr + token * stride_lt + index * stride_le, mask=real, other=float("-inf")
    ).to(tl.float32)
    nan = logits != logits
    # An infinite logit must not turn into NaN by inf - inf.
    logits = tl.where(nan, float("-inf"), tl.minimum(logits, _FLOAT_MAX))
    if SCORING == "sigmoid":
        score = tl.sigmoid(logits)
    else:
        top = tl.max(logits, 0)
        exp = tl.where(logits == float("-inf"), 0.0, tl.exp(logits - top))
        total = tl.sum(exp, 0)
        score = exp / tl.where(total > 0.0, total, 1.0)

    # Scores are monotone in logits: without a bias, choosing by logits keeps apart what a score rounds.
    if HAS_BIAS:
        choice = score + tl.load(bias_ptr + index, mask=real, other=0.0).to(tl.float32)
    else:
        choice = logits
    choice = tl.where(nan, float("nan"), choice)
    keys = sort_keys(choice, index, real)

    if NUM_GROUPS > 1:
        group = index // group_size
        group_score = tl.full([EXPERTS], float("-inf"), dtype=tl.float32)
        for g in tl.static_range(NUM_GROUPS):
            inside = tl.where(real & (group == g) & (choice == choice), choice, float("-inf"))
            best = tl.max(inside, 0)
            if HAS_BIAS:
                # DeepSeek-V3 ranks a group by its two best experts, V2 by its best one.
                first = key_index(tl.max(sort_keys(inside, index, real & (group == g)), 0))
                second = tl.max(tl.where(index == first, float("-inf"), inside), 0)
                best = tl.where(group_size > 1, best + second, best)
            group_score = tl.where(group == g, best, group_score)
        open_keys = sort_keys(group_score, index, real)
        allowed = index < 0
        for _ in tl.range(0, topk_group):
            chosen = key_index(tl.max(open_keys, 0)) // group_size
            allowed = allowed | (group == chosen)
            open_keys = tl.where(group == chosen, -9223372036854775808, open_keys)
        keys = tl.where(allowed, keys, -9223372036854775808)

    slot_index = tl.arange(0, SLOTS)
    ids = tl.zeros([SLOTS], dtype=tl.int32)
    weights = tl.zeros([SLOTS], dtype=tl.float32)
    for slot in tl.range(0, top_k):
        best_key = tl.max(keys, 0)
        expert = key_index(best_key)
        weight = tl.sum(tl.where(index == expert, score, 0.0), 0)
        ids = tl.where(slot_index == slot, expert, ids)
        weights = tl.where(slot_index == slot, weight, weights)
        keys = tl.where(index == expert, -9223372036854775808, keys)
    if SCORING == "topk_softmax":
        chosen_total = tl.sum(weights, 0)
        weights = weights / tl.where(chosen_total > 0.0, chosen_total, 1.0)
    elif RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    weights *= scale
    out = token * top_k + slot_index
    tl.store(ids_ptr + out, ids, mask=slot_index < top_k)
    tl.store(weights_ptr + out, weights, mask=slot_index < top_k)
