"""Rows -> rows through both products in one launch: no barrier between gate+up and down."""

from __future__ import annotations

import torch

from ..dispatch.config import KernelConfig
from ..ragged import Ragged, max_tiles
from ..target import Target
from .activation import Activation
from .experts import pair_argument, pair_distance, rows_argument, weight_argument
from .kernels.fused import fused_gemms_kernel
from .launch import INTERPRETED, Overlap, cdiv, dot_precision, launch, next_power_of_two, upcast_dot
from .schedule import LayerConfig


def fused_gemms_into(
    out: torch.Tensor,
    act: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    ragged: Ragged,
    layer: LayerConfig,
    target: Target,
    counters: torch.Tensor,
    *,
    top_k: int,
    activation: Activation,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    overlap: Overlap = Overlap.NONE,
) -> None:
    """act[r] = activation(x[source(r)]), out[r] = act[r] @ down[e].T for every planned row r.

    Args:
        out: [num_rows bound, H]; act: [num_rows bound, I]: contiguous, rows past the plan's last
            are not written.
        x: [num_tokens, H], source(r) = gather[r] // top_k.
        gate: [E, I, H] view that shares a descriptor with `up`, or None. up: likewise.
        down: [E, H, I] view.
        ragged: the plan.
        layer: with `fused`, legal for `target`.
        counters: int32, at least 1 + E, zero before the launch and not after.
        row_weights: [num_tokens, top_k], scales gate and up before bias and activation.
        overlap: with the kernels before and after.
    """
    first, second = layer.gate_up, layer.down
    assert isinstance(first, KernelConfig) and isinstance(second, KernelConfig)
    num_experts, inter, hidden = up.shape
    distance = 0 if gate is None else pair_distance(gate, up)
    assert gate is None or distance != 0
    tiles = max_tiles(ragged.max_rows, num_experts, first.block_m) * cdiv(inter, first.block_n)
    tiles += max_tiles(ragged.max_rows, num_experts, second.block_m) * cdiv(hidden, second.block_n)
    assert tiles < 2**31  # Tickets are 32 bits; a tile has at least 256 results.
    ub = up if up_bias is None else up_bias
    gb = ub if gate_bias is None else gate_bias
    db = down if down_bias is None else down_bias
    weights = up if row_weights is None else row_weights
    launch(
        fused_gemms_kernel,
        # Programs more than fit find no ticket left.
        (min(tiles, target.num_sms * first.occupancy),),
        x,
        weight_argument(up, first) if gate is None else pair_argument(gate, up, distance, first),
        gb,
        ub,
        act,
        rows_argument(act, second.block_m, second.block_k),
        rows_argument(act, second.tail_m, second.block_k) if second.tail_m else act,
        weight_argument(down, second),
        db,
        out,
        ragged.sizes,
        ragged.gather,
        weights,
        counters,
        counters[1:],
        num_experts,
        inter,
        hidden,
        top_k,
        *x.stride(),
        *((0, 0) if up_bias is None else gb.stride()),
        *((0, 0) if up_bias is None else ub.stride()),
        *((0, 0) if down_bias is None else db.stride()),
        *((0, 0) if row_weights is None else weights.stride()),
        SEGMENTS=max(256, next_power_of_two(num_experts)),
        GATED=gate is not None,
        BIAS=up_bias is not None,
        DOWN_BIAS=down_bias is not None,
        ROW_WEIGHTS=row_weights is not None,
        KIND=activation.kind,
        ALPHA=activation.alpha,
        BETA=activation.beta,
        LIMIT=activation.limit,
        EVEN_K=hidden % first.block_k == 0,
        UP_FIRST=distance < 0,
        FENCE=not INTERPRETED,
        OVERLAP=int(overlap),
        UPCAST=upcast_dot(x.dtype),
        PRECISION=dot_precision(x.dtype, target),
        BLOCK_M=first.block_m,
        BLOCK_N=first.block_n,
        BLOCK_K=first.block_k,
        GROUP_M=first.group_m,
        SWAP=first.swap_operands,
        TAIL_M=first.tail_m,
        NUM_STAGES=first.num_stages,
        DOWN_M=second.block_m,
        DOWN_N=second.block_n,
        DOWN_K=second.block_k,
        DOWN_GROUP=second.group_m,
        DOWN_SWAP=second.swap_operands,
        DOWN_TAIL=second.tail_m,
        DOWN_STAGES=second.num_stages,
        num_warps=first.num_warps,
        num_stages=first.num_stages,
    )
