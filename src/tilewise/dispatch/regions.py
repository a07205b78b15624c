"""Which optimisation helps where, from hardware constants alone: no measurement, no fit.

RaMP (arXiv 2604.26039) states such regions with constants of its tiles; here each bound is derived
from the machine's numbers. `bench.regions` compares them with measured times; nothing on the launch
path reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..target import Target
from .config import GroupedGemm
from .histogram import Histogram

CACHE = 0.9  # Share of L2 that a slab may fill before what is read again comes from memory.
WGMMA_ROWS = 64  # Rows that the first operand of Hopper's instruction has.
TALL, SHORT, WIDTH, STEP = 128, 16, 128, 64  # A tall tile, a short one, their columns and step.


@dataclass(frozen=True)
class Region:
    """One optimisation's verdict, and the ratio behind it: it helps where that exceeds 1."""

    helps: bool
    ratio: float


def regions(gemm: GroupedGemm, target: Target, histogram: Histogram) -> dict[str, Region]:
    """The optimisations that should help one product under one histogram.

    Returns:
        "swizzle": sharing a column of weights among the row tiles of a segment. Without it, row
        tiles far apart read weights again: from memory, once a segment's slab of them exceeds L2.
        "split_k": sharing reductions. Tiles that fill less than half of the multiprocessors leave
        the rest idle; each part must keep four steps.
        "tall": tiles of 128 rows. Weights that a tile of 64 rows reads twice cost bandwidth; a
        segment's rows must fill more than one such tile.
        "swap": weights on the instruction's 64 rows. Fewer rows than that waste it.
        "persistent": programs that stay. With two full waves and more, starts and ends overlap.
        "tail": a short tile for a segment's last rows. What padding a tall tile adds, as a share of
        all rows, exceeds a tenth.
    """
    active = max(1, histogram.active)
    mean = histogram.rows / active
    slab = gemm.n * gemm.k * gemm.itemsize * gemm.num_weights
    columns = -(-gemm.n // WIDTH)
    height = TALL if mean > WGMMA_ROWS else WGMMA_ROWS if mean > SHORT else SHORT
    tall, _ = histogram.tiles(height)
    tiles = tall * columns
    steps = -(-gemm.k // STEP)
    padded = histogram.tiles(TALL)[0] * TALL / max(1, histogram.rows) - 1
    ratios = {
        "swizzle": slab / (CACHE * target.l2_bytes) if mean > TALL else 0.0,
        "split_k": target.num_sms / (2 * max(1, tiles)) if steps >= 8 else 0.0,
        "tall": mean / WGMMA_ROWS,
        "swap": WGMMA_ROWS / (2 * max(1.0, mean)) if target.warpgroup_mma else 0.0,
        "persistent": tiles / (2 * target.num_sms) if mean > WGMMA_ROWS else 0.0,
        "tail": padded / 0.1,
    }
    return {name: Region(ratio > 1, ratio) for name, ratio in ratios.items()}
