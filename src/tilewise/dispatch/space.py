"""The configurations that a grouped GEMM may run with on a machine with warpgroup matrix products.

A configuration is here if it cuts the work into another grid, or feeds the same grid another way
(deeper loads, both operand orders, persistence, short tails, shared reductions). What a machine or
a shape cannot run is left out, so that a cost model never has to know why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..target import Target
from .config import GroupedGemm, KernelConfig, shared_memory, why_illegal
from .features import RESERVED

MAX_STAGES = 4
ACCUMULATORS = 128  # fp32 a lane; with more, Hopper's compiler spills around the epilogue.


def space(gemm: GroupedGemm, target: Target) -> list[KernelConfig]:
    """Every configuration worth a measurement, legal for `gemm` on `target`, in a fixed order.

    Returns:
        At least 134 on Hopper for bf16 (RaMP, arXiv 2604.26039, takes 134 to 268); empty where no
        measurement backs the space (no warpgroup matrix products, or no descriptors).
    """
    if not (target.warpgroup_mma and gemm.descriptors_possible and gemm.itemsize == 2):
        return []
    found = {
        config: None
        for config in (*_short(gemm, target), *_tall(gemm), *_shared(gemm))
        if why_illegal(config, gemm, target) is None and _differs(config, gemm)
    }
    return list(found)


def _differs(config: KernelConfig, gemm: GroupedGemm) -> bool:
    """Whether a smaller tile or a plainer loop would not do the very same work."""
    if config.block_k > gemm.k or config.block_n >= 2 * max(64, gemm.n):
        return False
    lanes = 32 * config.num_warps
    return config.block_m * config.block_n * gemm.num_weights <= ACCUMULATORS * lanes


def _deepest(config: KernelConfig, gemm: GroupedGemm, budget: int) -> KernelConfig | None:
    """`config` with as many stages as `budget` bytes hold, None if fewer than three."""
    for stages in range(MAX_STAGES, 2, -1):
        deep = replace(config, num_stages=stages)
        if shared_memory(deep, gemm) <= budget:
            return deep
    return None


def _short(gemm: GroupedGemm, target: Target) -> Iterator[KernelConfig]:
    """Tiles of up to 64 rows: bound by weights, so loads are deep, or two programs share an SM."""
    half = (target.shared_memory + RESERVED) // 2 - RESERVED
    for m in (16, 32, 64):
        for n in (32, 64, 128) if gemm.num_weights == 2 else (64, 128, 256):
            for k in (64, 128, 256):
                if k == 256 and (m > 32 or n * gemm.num_weights > 128):
                    continue
                for swap in (False, True):
                    if swap and gemm.num_weights == 2 and m == 32 and n == 128:
                        continue  # 256 columns of 32 tokens: Triton 3.9 spills.
                    for tail in (0, 16) if m > 16 else (0,):
                        if swap and tail and gemm.num_weights == 2:
                            continue  # A pair's short tile keeps its order: nothing is gained.
                        base = KernelConfig(m, n, k, 8, 4, 2, swap, descriptors=True, tail_m=tail)
                        deep = _deepest(base, gemm, target.shared_memory)
                        if deep is not None:
                            yield deep
                        pair = _deepest(base, gemm, half)
                        if pair is not None and not tail:
                            yield pair


def _tall(gemm: GroupedGemm) -> Iterator[KernelConfig]:
    """Tiles of 64 rows and more: bound by matrix products, or by reading weights again."""
    pair = gemm.num_weights == 2
    widths = (64, 128) if pair else (128, 256)
    for m in (64, 128):
        for n in widths:
            for warps in (4, 8):
                # A persistent pair without store_parts: 8 bytes, with Triton 3.9 and three stages.
                spills = pair and m == 128 and warps == 4
                for stages in (3, 4):
                    plain = KernelConfig(m, n, 64, 8, warps, stages, descriptors=True)
                    yield plain
                    for tail in (16, 32, 64):
                        if tail < m:
                            yield replace(plain, tail_m=tail)
                    for occupancy in (1, 2):
                        walk = replace(plain, persistent=True, occupancy=occupancy)
                        if not spills:
                            yield walk
                        yield replace(walk, store_parts=max(1, n // 128))
                        if m == 128 and n == 128:
                            yield replace(walk, store_parts=2)
                    if m == 128 and stages == 4:  # Weights read again rather than rows.
                        yield replace(plain, group_m=1)
                        if not spills:
                            yield replace(plain, group_m=1, persistent=True)


def _shared(gemm: GroupedGemm) -> Iterator[KernelConfig]:
    """Reductions that several programs share where tiles are too few for the machine."""
    for m, n, k, stages in ((16, 64, 128, 4), (16, 32, 128, 4), (32, 64, 128, 3), (64, 64, 64, 4)):
        for split in (2, 4, 8):
            for occupancy in (1, 2):
                yield KernelConfig(
                    m, n, k, 8, 4, stages, gemm.num_weights == 1 and m < 64, descriptors=True,
                    split_k=split, occupancy=occupancy,
                )  # fmt: skip
