"""Rows -> rows: each expert's two products over the rows that were planned for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch.config import KernelConfig
from ..ragged import Ragged, max_tiles
from ..target import Target
from .activation import Activation
from .kernels.grouped import grouped_gemm_kernel
from .launch import Overlap, cdiv, dot_precision, launch, next_power_of_two, upcast_dot

MAX_RAGGED_ROWS = 2**30  # More than that, a ragged descriptor's wrap-around does not address.
_IDENTITY = Activation("silu")  # Only its fields' defaults are read, under KIND="none".


@dataclass(frozen=True)
class SplitScratch:
    """Memory of reductions shared by several programs.

    Attributes:
        partials: fp32, at least `split_elements` of both products.
        counters: int32, at least the programs of the grid, zero before the launch and not after.
    """

    partials: torch.Tensor
    counters: torch.Tensor


def split_elements(config: KernelConfig, num_weights: int, num_sms: int) -> int:
    """fp32 elements that a product with this configuration needs for partial sums."""
    if config.split_k == 1:
        return 0
    return num_sms * config.occupancy * config.block_m * config.block_n * num_weights


def suits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether an [E, N, K] view can be a descriptor: unit last stride, all else 16-byte aligned."""
    size = tensor.element_size()
    e, n, k = tensor.stride()
    return k == 1 and (n * size) % 16 == 0 and (e * size) % 16 == 0 and tensor.data_ptr() % 16 == 0


def pair_distance(gate: torch.Tensor, up: torch.Tensor) -> int:
    """Elements from a gate row to its up row if one descriptor can hold both, else 0.

    Halves in either order and interleaved rows can: the same storage and strides, a distance of a
    multiple of 16 bytes.
    """
    if gate.stride() != up.stride() or (
        gate.untyped_storage()._cdata != up.untyped_storage()._cdata
    ):
        return 0
    distance = int(up.storage_offset() - gate.storage_offset())
    return 0 if (distance * up.element_size()) % 16 else distance


def pair_argument(
    gate: torch.Tensor, up: torch.Tensor, distance: int, config: KernelConfig
) -> TensorDescriptor:
    """Gate and up, `distance` elements apart, of which one load takes a tile each."""
    experts, n, k = up.shape
    stride_e, stride_n, _ = up.stride()
    return TensorDescriptor(
        gate if distance > 0 else up,
        [experts, 2, n, k],
        [stride_e, abs(distance), stride_n, 1],
        [1, 2, config.block_n, config.block_k],
    )


def rows_argument(rows: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """[R, K] rows of which tiles are read or written, clipped to one segment each."""
    return create_ragged_descriptor(rows, [height, width])


def weight_argument(weight: torch.Tensor, config: KernelConfig) -> Any:
    """[E, N, K] weights as the kernel takes them: a descriptor of tiles, or the tensor."""
    if not config.descriptors:
        return weight
    block = [1, config.block_n, config.block_k]
    return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), block)


def grouped_gemm_into(
    out: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    ragged: Ragged,
    config: KernelConfig,
    target: Target,
    *,
    gathered: bool,
    top_k: int = 1,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    activation: Activation | None = None,
    scratch: SplitScratch | None = None,
    overlap: Overlap = Overlap.NONE,
    active: tuple[int, int] | None = None,
) -> None:
    """out[r] = act(x[source(r)] @ gate[e].T, x[source(r)] @ up[e].T) for every planned row r.

    Args:
        out: [num_rows bound, N], contiguous; rows past the plan's last are not written.
        x: [num_tokens, K] if `gathered` (source(r) = gather[r] // top_k), else [num_rows bound, K].
        gate: [E, N, K] view, or None for a single product.
        up: [E, N, K] view.
        ragged: the plan.
        config: legal for `target`.
        row_weights: [num_tokens, top_k], scales the products before bias and activation; row r's is
            at [gather[r] // top_k, gather[r] % top_k], gathered or not.
        activation: None stores the plain product.
        scratch: for `config.split_k`; without it nothing is split.
        overlap: with the kernels before and after.
        active: (more than, at most) experts with rows, else nothing is done; read on the device.
    """
    num_experts, n, k = up.shape
    for weight in (up,) if gate is None else (gate, up):
        _, stride_n, stride_k = weight.stride()
        if config.block_n * stride_n + config.block_k * stride_k >= 2**31:
            raise ValueError(
                f"weight strides {weight.stride()} put one tile over 2^31 elements: the kernels "
                "address inside a tile with 32 bits. Store experts outermost, or call .contiguous()"
            )
    act = activation or _IDENTITY
    gated = gate is not None
    g = up if gate is None else gate
    more_than, at_most = active or (0, num_experts)
    row_tiles = max_tiles(ragged.max_rows, min(num_experts, at_most), config.block_m)
    tiles = row_tiles * cdiv(n, config.block_n)
    resident = target.num_sms * config.occupancy
    programs = min(tiles, resident) if config.persistent else tiles
    x_descriptor = config.descriptors and not gathered and suits_rows(x)
    distance = pair_distance(g, up) if gated and config.descriptors else 0
    split = config.split_k > 1 and scratch is not None and (distance != 0 or not gated)
    if split:
        programs = max(programs, resident)
        strides = [] if config.descriptors else [up.stride(2), g.stride(2)]
        if max([0 if x_descriptor else x.stride(1), *strides]) * k >= 2**31:
            raise ValueError(
                f"K={k} columns at strides {x.stride(1)}, {up.stride(2)}, {g.stride(2)} reach past "
                "2^31 elements, which split_k > 1 does not address: use split_k=1"
            )
    parts = config.store_parts if not split and suits_rows(out) else 0
    bias = up_bias is not None
    ub = up if up_bias is None else up_bias
    gb = ub if gate_bias is None else gate_bias
    weights = up if row_weights is None else row_weights
    launch(
        grouped_gemm_kernel,
        (programs,),
        rows_argument(x, config.block_m, config.block_k) if x_descriptor else x,
        rows_argument(x, config.tail_m, config.block_k) if x_descriptor and config.tail_m else x,
        pair_argument(g, up, distance, config) if distance else weight_argument(g, config),
        weight_argument(up, config),
        gb,
        ub,
        rows_argument(out, config.block_m, config.block_n // parts) if parts else out,
        rows_argument(out, config.tail_m, config.block_n // parts)
        if parts and config.tail_m
        else out,
        ragged.sizes,
        ragged.gather,
        weights,
        scratch.partials if split and scratch is not None else out,
        scratch.counters if split and scratch is not None else ragged.sizes,
        num_experts,
        resident if split else programs,
        n,
        k,
        top_k,
        more_than,
        at_most,
        *x.stride(),
        *g.stride(),
        *up.stride(),
        *(gb.stride() if bias else (0, 0)),
        *(ub.stride() if bias else (0, 0)),
        *(weights.stride() if row_weights is not None else (0, 0)),
        out.stride(0),
        SEGMENTS=max(256, next_power_of_two(num_experts)),
        GATED=gated,
        GATHER=gathered,
        BIAS=bias,
        ROW_WEIGHTS=row_weights is not None,
        KIND="none" if activation is None else act.kind,
        ALPHA=act.alpha,
        BETA=act.beta,
        LIMIT=act.limit,
        # Descriptors clip by themselves: one compiled kernel for even and uneven sizes.
        EVEN_K=k % config.block_k == 0 or x_descriptor,
        EVEN_N=n % config.block_n == 0 or config.descriptors,
        SAME_STRIDES=g.stride()[1:] == up.stride()[1:],
        DESCRIPTORS=config.descriptors,
        X_DESCRIPTOR=x_descriptor,
        OUT_PARTS=parts,
        PAIR=distance != 0,
        UP_FIRST=distance < 0,
        SWAP=config.swap_operands,
        SPLIT_K=min(config.split_k, cdiv(k, 2 * config.block_k)) if split else 1,
        TAIL_M=config.tail_m,
        OVERLAP=int(overlap),
        BOUNDED=active is not None,
        PERSISTENT=config.persistent,
        UPCAST=upcast_dot(x.dtype),
        PRECISION=dot_precision(x.dtype, target),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def suits_rows(x: torch.Tensor) -> bool:
    """Whether rows [R, K] can be a descriptor."""
    return (
        x.stride(1) == 1
        and (x.stride(0) * x.element_size()) % 16 == 0
        and x.data_ptr() % 16 == 0
        and 0 < x.shape[0] <= MAX_RAGGED_ROWS
    )
