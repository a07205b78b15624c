"""When rows are copied in expert order first (moe/permute.py), and what multiplies them then."""

from __future__ import annotations

from ..target import Target
from .config import GroupedGemm, KernelConfig, why_illegal
from .select import costs_speak
from .table import profile_of

# Both operands by descriptor, stored in halves: 1% of a layer in the mean, up to 4%, the copy paid.
# Where experts have fewer rows or columns, short tiles of gathered rows or no copy are worth more.
PERMUTED = KernelConfig(128, 128, 64, 8, 8, 4, descriptors=True, persistent=True, store_parts=2)
FEWEST_COLUMNS = 6144
FEWEST_ROWS = 512  # Of the mean expert: persistent programs have no short tiles.
FEWEST_TOKENS = 2048  # Fewer were not measured, and a shard's bound on rows counts other devices'.


def permuted(gate_up: GroupedGemm, target: Target) -> KernelConfig | None:
    """What multiplies rows in expert order with gate and up, or None where gathering is faster.

    None where no costs were fitted for the machine, and where a user's profile speaks.
    """
    if gate_up.n < FEWEST_COLUMNS or gate_up.max_segment_rows < FEWEST_TOKENS:
        return None
    if gate_up.max_rows < FEWEST_ROWS * gate_up.num_segments:
        return None
    if not costs_speak(gate_up, target) or profile_of(gate_up, target) is not None:
        return None
    return None if why_illegal(PERMUTED, gate_up, target) else PERMUTED
