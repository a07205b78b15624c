"""Closed-form configurations where no profile backs a choice: shape, row bounds, hardware facts.

Read off sweeps on one H200 for Hopper; elsewhere what fits, tuned on no machine.
"""

from __future__ import annotations

from dataclasses import replace

from ..target import Target
from .config import GroupedGemm, KernelConfig, StreamConfig, fit


def next_power_of_two(value: float) -> int:
    power = 1
    while power < value:
        power *= 2
    return power


def rule(gemm: GroupedGemm, target: Target) -> KernelConfig:
    """The configuration for a grouped GEMM by rule of thumb.

    The largest segment a call may have decides the tile height, not the mean: when few segments are
    active, short tiles re-read their weights many times, while tall tiles cost little when they are
    not.

    Returns:
        A legal configuration for `target`. Depends on nothing but the arguments.
    """
    wgmma = target.warpgroup_mma and gemm.itemsize == 2 and gemm.descriptors_possible
    wish = _wgmma(gemm, target) if wgmma else _portable(gemm, target)
    return fit(wish, gemm, target)


def _wgmma(gemm: GroupedGemm, target: Target) -> KernelConfig:
    return _wgmma_gathered(gemm, target) if gemm.gathered else _wgmma_in_order(gemm)


def idle_share(gemm: GroupedGemm, target: Target, block_m: int, block_n: int) -> float:
    """Last wave's waste when as few segments are active as can be: 1.5 is half again too long.

    Each token's rows go to different segments, so rows over the largest segment's are active.
    """
    active = -(-gemm.max_rows // max(1, gemm.max_segment_rows))
    tiles = active * -(-gemm.n // block_n) * -(-gemm.max_segment_rows // block_m)
    return -(-tiles // target.num_sms) * target.num_sms / tiles


def _wgmma_gathered(gemm: GroupedGemm, target: Target) -> KernelConfig:
    """Rows by pointer, weights by descriptor, often two of them: Hopper's gate and up."""
    rows, mean = gemm.max_segment_rows, gemm.max_rows / gemm.num_segments
    narrow, wide = gemm.n <= 256, gemm.n >= 1536

    def tile(m: int, n: int, k: int, warps: int, stages: int, tail: int = 0) -> KernelConfig:
        return KernelConfig(m, n, k, 8, warps, stages, descriptors=True, tail_m=tail)

    if rows <= 16:
        if narrow and rows > 2:  # Too few columns for all multiprocessors: share their reductions.
            return replace(tile(16, 64, 128, 4, 4), split_k=8 if rows <= 3 else 4)
        if gemm.n >= 2048:
            return replace(tile(16, 64, 128, 4, 5), swap_operands=True)
        return tile(16, 64, 256, 4, 3)
    if rows <= 32:
        if wide:
            even = idle_share(gemm, target, 32, 64) < 0.9 * idle_share(gemm, target, 32, 128)
            return tile(32, 64, 128, 4, 4, tail=16) if even else tile(32, 128, 128, 4, 3)
        return tile(16, 64, 256 if narrow else 128, 4, 4)
    if rows <= 64:
        return tile(64, 64, 128, 4, 4, tail=16)
    if rows <= 256:
        if narrow:
            return KernelConfig(32, 64, 128, 8, 4, 4, swap_operands=True)
        if wide:  # Few segments have more rows than 16 each, many of them have fewer.
            return tile(128, 128, 64, 8, 4, tail=64 if mean > 16 else 16)
        return tile(64, 128, 64, 4, 4)
    if narrow and rows <= 1024:
        return tile(64, 128, 64, 4, 4)
    if mean >= 512 and gemm.n >= 4096:  # Hardly a tail.
        return replace(tile(128, 128, 64, 8, 4), persistent=True, store_parts=1)
    if narrow or (mean >= 512 and gemm.k <= 2048):
        # Short: two programs hide each other's beginnings and ends. Longer reductions are 1 to 4%
        # slower so, in the layer.
        return replace(tile(128, 64, 64, 4, 3), persistent=True, occupancy=2, store_parts=1)
    # Columns that tiles of 128 would add: 320 become 384.
    if -(-gemm.n // 128) * 128 > 1.15 * -(-gemm.n // 64) * 64:
        return tile(128, 64, 64, 8, 3, tail=64)
    return tile(128, 128, 64, 8, 4, tail=64)


def _wgmma_in_order(gemm: GroupedGemm) -> KernelConfig:
    """Rows and weights by descriptor: Hopper's down."""
    rows = gemm.max_segment_rows
    persistent = KernelConfig(64, 128, 64, 8, 4, 4, descriptors=True, persistent=True, occupancy=2)
    if rows <= 32:
        # Few tokens ride on the narrow side of wgmma: weights take its 64 rows.
        if gemm.k > 2048:
            block_k = 256 if rows <= 3 and gemm.k > 8192 else 128
            long = KernelConfig(16, 64, block_k, 8, 4, 4, swap_operands=True, descriptors=True)
            return replace(long, block_m=32, tail_m=16) if rows > 16 and gemm.k <= 8192 else long
        if rows <= 3 and gemm.k < 1024:  # 1 to 2% of a layer, with few experts or many.
            width = 64 if gemm.k <= 256 else 128
            return KernelConfig(16, width, 64, 8, 4, 4, swap_operands=True, descriptors=True)
        if rows <= 8 and gemm.k >= 512:
            return KernelConfig(16, 128, 128, 8, 4, 3, swap_operands=True, descriptors=True)
        if rows > 16 and gemm.k < 512:
            return KernelConfig(32, 128, 64, 8, 4, 4, descriptors=True, tail_m=16)
        swap = rows <= 8 or gemm.k < 2048
        return KernelConfig(16, 128, 64, 8, 4, 4, swap_operands=swap, descriptors=True)
    if rows <= 1024 and gemm.max_rows < 64 * gemm.num_segments:
        return persistent
    if gemm.k <= 1024:  # Short reductions: two programs hide each other's beginnings and ends.
        return replace(persistent, block_m=128, num_stages=3, store_parts=2)
    mean = gemm.max_rows / gemm.num_segments
    if mean > 128 and mean + 2 * mean**0.5 <= 192:  # Not two tall tiles.
        if gemm.n % 256 == 0:
            # Three of 64 rows: 3 to 5% of a layer, 1% lost where few are active.
            return replace(persistent, block_n=256, occupancy=1, store_parts=2)
        # Those lose more where columns leave a part of a tile. One layer was measured: 2 to 4% with
        # uniform routing, 1% with Zipf, 2% lost where few are active.
        return KernelConfig(128, 256, 64, 8, 8, 4, descriptors=True, tail_m=64)
    return KernelConfig(128, 256, 64, 8, 8, 4, descriptors=True, persistent=True, store_parts=2)


def _portable(gemm: GroupedGemm, target: Target) -> KernelConfig:
    """Pointer loads and the target's ordinary matrix instruction; tuned on none of them."""
    rows = gemm.max_segment_rows
    if target.backend == "hip":
        return _wave32(gemm) if target.warp_size == 32 else _wave64(gemm)
    if gemm.itemsize == 4:  # Three TF32 products each: registers bound the tile, not bandwidth.
        return KernelConfig(16 if rows <= 16 else 32, 32, 32, 8, 4, 3)
    if rows <= 16:
        return KernelConfig(16, 64, 128, 1, 4, 4)
    if rows <= 128:
        return KernelConfig(32, 64, 64, 4, 4, 4)
    if rows <= 1024:
        return KernelConfig(64, 64, 64, 8, 4, 4)
    return KernelConfig(128, 64 if gemm.num_weights == 2 else 128, 64, 8, 8, 3)


def _wave64(gemm: GroupedGemm) -> KernelConfig:
    """AMD's CDNA."""
    rows = gemm.max_segment_rows
    if gemm.itemsize == 4:
        return KernelConfig(16 if rows <= 16 else 32, 32, 32, 8, 4, 2)
    if rows <= 16:
        return KernelConfig(16, 64, 64, 1, 4, 2)
    if rows <= 128:
        return KernelConfig(32, 64, 64, 4, 4, 2)
    if rows <= 1024:
        return KernelConfig(64, 64, 64, 8, 4, 2)
    return KernelConfig(128, 64 if gemm.num_weights == 2 else 128, 64, 8, 8, 2)


def _wave32(gemm: GroupedGemm) -> KernelConfig:
    """AMD's RDNA: half the lanes to hold a tile, so short steps with two weight tiles in flight."""
    rows, pair = gemm.max_segment_rows, gemm.num_weights == 2
    if gemm.itemsize == 4:
        return KernelConfig(16, 32, 16, 8, 4, 2)
    if rows <= 16:
        return KernelConfig(16, 32 if pair else 64, 64, 1, 4, 2)
    if rows <= 128:
        return KernelConfig(32, 64, 32, 4, 8, 2) if pair else KernelConfig(32, 64, 64, 4, 4, 2)
    if rows <= 1024:
        return KernelConfig(64, 64, 64, 8, 8 if pair else 4, 2)
    return KernelConfig(128, 64 if pair else 128, 32, 8, 8, 2)


def choose_stream(gemm: GroupedGemm, target: Target) -> StreamConfig:
    """The configuration of a matrix-vector product per row, bound by memory alone."""
    single = gemm.max_segment_rows <= 1
    # AMD stages loads through registers, which the accumulators need.
    stages = 1 if target.backend == "hip" else 3
    # A step covers all of K where it can: one and a half steps waste a third of their loads.
    if gemm.k <= 256:
        block_k = next_power_of_two(gemm.k)
    elif 512 < gemm.k <= 1024:
        block_k = 1024
    else:
        block_k = 512
    if gemm.num_weights == 2:
        return StreamConfig(4 if single else 8, min(block_k, 512), 4, stages)
    if single:
        return StreamConfig(8, block_k, 4 if block_k > 512 else 2, stages)
    return StreamConfig(8 if block_k > 512 else 16, block_k, 4, stages)
