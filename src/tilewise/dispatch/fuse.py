"""When both products run in one launch (moe/kernels/fused.py), and with which tiles.

Read off whole layers of twelve shapes on one H200, three routings each (docs/performance.md): costs
are fitted to products alone and say nothing of the seam between them.
"""

from __future__ import annotations

from ..target import Target
from .config import GroupedGemm, KernelConfig, why_illegal
from .select import FITTED_FROM, costs_speak
from .table import profile_of

Pair = tuple[KernelConfig, KernelConfig]

# Up to 16 tokens, 0.98 of a layer's time: two programs a multiprocessor, of which one loads while
# the other ends.
SHORT = (
    KernelConfig(16, 32, 128, 8, 4, 4, descriptors=True, occupancy=2),
    KernelConfig(16, 64, 128, 8, 4, 4, swap_operands=True, descriptors=True),
)
# Up to 32 tokens, 0.97 with hundreds of experts (whose bound on tiles is far above what there is),
# nothing with fewer.
MEDIUM = (
    KernelConfig(32, 64, 128, 8, 4, 4, descriptors=True),
    KernelConfig(32, 256, 128, 8, 4, 3, swap_operands=True, descriptors=True),
)
# 0.97 at 96 and 128 tokens, 0.98 at 300. At 512 only with hundreds of experts (0.97): else 0.98
# with many active experts, 1.06 with few. From 1,024 on no gain.
TALL = (
    KernelConfig(128, 128, 64, 8, 8, 4, descriptors=True, tail_m=64),
    KernelConfig(128, 256, 64, 8, 8, 4, descriptors=True, tail_m=64),
)
FULL = 2 / 3  # Of the programs that fit must have a tile when the fewest experts are active.


def fuse(gate_up: GroupedGemm, down: GroupedGemm, target: Target) -> Pair | None:
    """The configurations of both products in one launch, or None where two launches are faster.

    None where no costs were fitted for the machine, and where a user's profile speaks: what it
    measured are products alone, and they run as it says.
    """
    gemms = (gate_up, down)
    pair = _by_size(gate_up)
    if pair is None or not all(costs_speak(gemm, target) for gemm in gemms):
        return None
    if any(profile_of(gemm, target) is not None for gemm in gemms):
        return None
    for config, gemm in zip(pair, gemms, strict=True):
        enough = FULL * target.num_sms * pair[0].occupancy
        if why_illegal(config, gemm, target) or _fewest_tiles(config, gemm) < enough:
            return None
    return pair


def _by_size(gate_up: GroupedGemm) -> Pair | None:
    tokens, inter, hidden = gate_up.max_segment_rows, gate_up.n, gate_up.k
    if tokens <= FITTED_FROM:
        return None
    if tokens <= 16:  # A reduction that does not divide by the step masks its loads: 1.03.
        return SHORT if hidden % SHORT[0].block_k == 0 else None
    hundreds = gate_up.num_segments >= 256
    if tokens <= 32:
        return MEDIUM if hundreds else None
    if tokens <= 64 or tokens > (640 if hundreds else 320) or inter < 1024:
        return None
    return TALL if tokens > 256 or hidden >= 3072 else None


def _fewest_tiles(config: KernelConfig, gemm: GroupedGemm) -> int:
    """Tiles if every token chooses the same segments, all of them here."""
    active = min(gemm.num_segments, -(-gemm.max_rows // max(1, gemm.max_segment_rows)))
    return active * -(-gemm.max_segment_rows // config.block_m) * -(-gemm.n // config.block_n)


def why_not_fused(gate_up: KernelConfig, down: KernelConfig) -> str | None:
    """The reason why these cannot share a launch, or None."""
    for name, config in (("gate_up", gate_up), ("down", down)):
        if not config.descriptors or config.persistent or config.split_k > 1 or config.store_parts:
            return (
                f"{name} must load by descriptors from a plain grid: descriptors=True, "
                "persistent=False, split_k=1, store_parts=0"
            )
    if gate_up.num_warps != down.num_warps:
        return f"num_warps differ: {gate_up.num_warps} and {down.num_warps}"
    return None
