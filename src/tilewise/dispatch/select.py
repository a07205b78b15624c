"""Which configuration runs: closed form in shape, row bounds and hardware facts; no timing or sync.

A cost model fitted on profiles will take the place of `choose`; its callers need not change. The
thresholds were read off a sweep of 89 configurations on one H200 (bench/sweep.py,
docs/performance.md).
"""

from __future__ import annotations

from ..target import Target
from .config import GroupedGemm, KernelConfig, StreamConfig, fit


def next_power_of_two(value: float) -> int:
    power = 1
    while power < value:
        power *= 2
    return power


def choose(gemm: GroupedGemm, target: Target) -> KernelConfig:
    """The configuration for a grouped GEMM when only host facts are known.

    The largest segment a call may have decides the tile height, not the mean: when few segments are
    active, short tiles re-read their weights many times, while tall tiles cost little when they are
    not.

    Returns:
        A legal configuration for `target`. Depends on nothing but the arguments.
    """
    wgmma = target.warpgroup_mma and gemm.itemsize == 2
    wish = _wgmma(gemm) if wgmma else _portable(gemm, target)
    return fit(wish, gemm, target)


def _wgmma(gemm: GroupedGemm) -> KernelConfig:
    rows = gemm.max_segment_rows
    wide = gemm.n >= 1024
    if rows <= 64:
        # Few tokens ride on the narrow side of wgmma: weights take its 64 rows.
        def swapped(m: int, n: int, k: int, stages: int) -> KernelConfig:
            return KernelConfig(m, n, k, 8, 4, stages, swap_operands=True, descriptors=True)

        block_m = 16 if rows <= 16 else 32
        if gemm.gathered:
            if wide and rows > 8:
                return swapped(block_m, 128, 128, 3)
            return swapped(16, 64, 256, 3) if rows <= 8 else swapped(16, 64, 64, 6)
        return swapped(block_m, 64, 128, 4) if gemm.k > 2048 else swapped(block_m, 128, 64, 4)
    if gemm.gathered:
        if rows > 1024:
            return KernelConfig(128, 128, 64, 8, 8, 4, descriptors=True)
        if wide:
            return KernelConfig(64, 256, 64, 8, 8, 3, descriptors=True)
        if gemm.n <= 256 and rows <= 128:
            return KernelConfig(32, 64, 128, 8, 4, 4, swap_operands=True, descriptors=True)
        return KernelConfig(64, 128, 64, 8, 4, 4, descriptors=True)
    if rows > 1024:
        return KernelConfig(128, 256, 64, 8, 8, 4, descriptors=True, persistent=True)
    return KernelConfig(64, 128, 64, 8, 4, 4, descriptors=True, persistent=True, occupancy=2)


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
