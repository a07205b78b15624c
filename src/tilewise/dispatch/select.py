"""Which configuration runs: the least expected cost over the routings a batch may have.

Decided once per process, shape and token bucket, on the host, from shapes, hardware facts and
fitted costs: no timing, no sync, no file that must be there. A user's profile counts if there is
one (profiles.py).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from ..target import Target
from .config import GroupedGemm, KernelConfig
from .histogram import FAMILIES, expected_sizes
from .rules import rule
from .table import StageTable, stage_table

WORST = 0.2  # Weight of the worst family beside the mean over all of them.
MARGIN = 0.02  # A fitted choice replaces the rule's only if it is faster by more than costs err.
FEWEST = 4  # Tokens; costs were fitted from here on.
STEPS = 4  # Buckets an octave of tokens.


def bucket(num_tokens: int) -> int:
    """The token count that stands for this one: the next of four steps an octave.

    1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, ...
    """
    size = 1
    while size * 2 <= num_tokens:
        size *= 2
    step = max(1, size // STEPS)
    return -(-num_tokens // step) * step


def buckets(num_tokens: int) -> list[int]:
    """Every token count up to this one that stands for others."""
    tops, size = [], 0
    while (size := bucket(size + 1)) <= num_tokens:
        tops.append(size)
    return tops


def choose(gemm: GroupedGemm, target: Target) -> KernelConfig:
    """The configuration for a grouped GEMM when only host facts are known.

    The robust one where costs were fitted for such a machine, else the one by rule.

    Returns:
        A legal configuration for `target`. Depends on the arguments alone, where no profile was
        measured for this product.
    """
    if stage_table(gemm, target) is None or gemm.max_segment_rows < FEWEST:
        return rule(gemm, target)
    tokens = bucket(gemm.max_segment_rows)
    top_k = -(-gemm.max_rows // gemm.max_segment_rows)
    return _robust(replace(gemm, max_rows=tokens * top_k, max_segment_rows=tokens), target)


@functools.lru_cache(maxsize=16384)
def _robust(gemm: GroupedGemm, target: Target) -> KernelConfig:
    table = stage_table(gemm, target)
    assert table is not None
    return robust(table, gemm, target)


def robust(table: StageTable, gemm: GroupedGemm, target: Target) -> KernelConfig:
    """The least mean and worst relative cost over the families of routing, if it beats the rule."""
    scores, ruled = robust_scores(table, gemm, target), rule(gemm, target)
    if not scores:
        return ruled
    best = min(scores, key=scores.__getitem__)
    return ruled if scores.get(ruled, math.inf) <= (1 + MARGIN) * scores[best] else best


def robust_scores(
    table: StageTable, gemm: GroupedGemm, target: Target
) -> dict[KernelConfig, float]:
    """Mean over the families of the time over the best one's, plus `WORST` times the worst."""
    tokens = gemm.max_segment_rows
    relative: dict[KernelConfig, list[float]] = {}
    for family in FAMILIES:
        histogram = expected_sizes(
            family, tokens, max(1, gemm.max_rows // tokens), gemm.num_segments
        )
        costs = table.costs(gemm, target, histogram)
        if not costs:
            return {}
        best = min(costs.values())
        for config, cost in costs.items():
            relative.setdefault(config, []).append(cost / best)
    return {
        config: sum(values) / len(values) + WORST * max(values)
        for config, values in relative.items()
    }
