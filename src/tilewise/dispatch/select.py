"""Which configuration runs: the least expected cost over the routings a batch may have.

Decided once per process, shape and token bucket, on the host, from shapes, hardware facts and
fitted costs: no timing, no sync, no file that must be there. A user's profile counts if there is
one (profiles.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

from ..ragged import max_tiles
from ..target import Target
from .config import FewActive, GroupedGemm, KernelConfig
from .histogram import FAMILIES, expected_sizes
from .rules import rule
from .table import StageTable, stage_table

WORST = 0.2  # Weight of the worst family beside the mean over all of them.
MARGIN = 0.02  # A fitted choice replaces the rule's only if it is faster by more than costs err,
FEW_MARGIN = 0.1  # which is more below the fewest tokens that costs were fitted to,
MANY_MARGIN = 0.05  # and from this bucket on, where power bounds the clock of products alone.
MANY = 1024  # Tokens of the bucket, which begins at 897.
GAIN = 0.1  # A second launch must gain more than costs err where nothing was measured,
LOSS = 0.01  # and cost no family more than this.
IDLE_US, IDLE_US_PROGRAM = 1.2, 0.0055  # Of a launch whose programs leave, on an H200.
FITTED_FROM = 4  # Tokens.
FEWEST = 3  # Tokens; below, the rule decides alone.
STEPS = 4  # Buckets an octave of tokens.

FamilyCosts = Mapping[str, Mapping[KernelConfig, float]]


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


def costs_speak(gemm: GroupedGemm, target: Target) -> bool:
    """Whether costs have a say: fitted for such a product and machine, extrapolated to 3 tokens."""
    return gemm.max_segment_rows >= FEWEST and stage_table(gemm, target) is not None


def choose(gemm: GroupedGemm, target: Target) -> KernelConfig:
    """The configuration for a grouped GEMM when only host facts are known.

    The robust one where costs were fitted for such a machine, else the one by rule.

    Returns:
        A legal configuration for `target`. Depends on the arguments alone, where no profile was
        measured for this product.
    """
    if not costs_speak(gemm, target):
        return rule(gemm, target)
    return _robust(bucketed(gemm), target)


def bucketed(gemm: GroupedGemm) -> GroupedGemm:
    """The product at the token count that stands for this one's."""
    tokens = bucket(gemm.max_segment_rows)
    top_k = -(-gemm.max_rows // gemm.max_segment_rows)
    return replace(gemm, max_rows=tokens * top_k, max_segment_rows=tokens)


@functools.lru_cache(maxsize=16384)
def _robust(gemm: GroupedGemm, target: Target) -> KernelConfig:
    table = stage_table(gemm, target)
    assert table is not None
    return robust(table, gemm, target)


def robust(table: StageTable, gemm: GroupedGemm, target: Target) -> KernelConfig:
    """The least mean and worst relative cost over the families of routing, if it beats the rule."""
    return _robust_of(family_costs(table, gemm, target), gemm, target)


def _robust_of(costs: FamilyCosts, gemm: GroupedGemm, target: Target) -> KernelConfig:
    scores, ruled = robust_scores(costs), rule(gemm, target)
    if not scores:
        return ruled
    best = min(scores, key=scores.__getitem__)
    tokens = gemm.max_segment_rows
    # What costs say nothing of loses to them only where they were fitted.
    score = _score_of(ruled, scores, math.inf if tokens >= FITTED_FROM else 0.0)
    return ruled if score <= (1 + margin(tokens)) * scores[best] else best


def margin(num_tokens: int) -> float:
    """By how much a fitted choice must beat the rule's."""
    if num_tokens < FITTED_FROM:
        return FEW_MARGIN
    return MARGIN if num_tokens < MANY else MANY_MARGIN


def _score_of(config: KernelConfig, scores: Mapping[KernelConfig, float], unknown: float) -> float:
    """A configuration's score; that of a twin with other stages where it was not fitted itself."""
    if config in scores:
        return scores[config]
    twins = (s for c, s in scores.items() if replace(c, num_stages=config.num_stages) == config)
    return min(twins, default=unknown)


def fewest(top: int) -> int:
    """The fewest tokens that a bucket's largest count stands for."""
    size = 1 << (top.bit_length() - 1)
    return top - max(1, (size // 2 if top == size else size) // STEPS) + 1


def family_costs(table: StageTable, gemm: GroupedGemm, target: Target) -> FamilyCosts:
    """Microseconds of every configuration, by family of routing: mean of both ends of the bucket.

    The largest count alone misleads where it fills tiles that fewer tokens don't.
    """
    top_k = max(1, gemm.max_rows // gemm.max_segment_rows)
    tokens = gemm.max_segment_rows
    ends = {fewest(tokens), tokens}
    costs: dict[str, dict[KernelConfig, float]] = {}
    for family in FAMILIES:
        of_ends = [
            table.costs(
                replace(gemm, max_rows=end * top_k, max_segment_rows=end),
                target,
                expected_sizes(family, end, top_k, gemm.num_segments),
            )
            for end in ends
        ]
        costs[family] = {c: sum(one[c] for one in of_ends) / len(ends) for c in of_ends[0]}
    return costs


def robust_scores(costs: FamilyCosts) -> dict[KernelConfig, float]:
    """Mean over the families of the time over the best one's, plus `WORST` times the worst."""
    relative: dict[KernelConfig, list[float]] = {}
    for of_family in costs.values():
        best = min(of_family.values(), default=1.0)
        for config, cost in of_family.items():
            relative.setdefault(config, []).append(cost / best)
    return {
        config: sum(values) / len(values) + WORST * max(values)
        for config, values in relative.items()
    }


def idle_us(config: KernelConfig, gemm: GroupedGemm, target: Target, segments: int) -> float:
    """What a launch costs whose programs leave: 1.2 us, 10 more for 1,800 that fill an SM each.

    Measured in the layer on one H200; short programs that share multiprocessors leave faster.
    """
    tiles = max_tiles(gemm.max_rows, segments, config.block_m) * -(-gemm.n // config.block_n)
    resident = target.num_sms * config.occupancy
    programs = min(tiles, resident) if config.persistent else tiles
    return IDLE_US + IDLE_US_PROGRAM * programs


@functools.lru_cache(maxsize=16384)
def _pair(gemm: GroupedGemm, target: Target) -> tuple[KernelConfig, FewActive | None]:
    table = stage_table(gemm, target)
    assert table is not None
    return pair(table, gemm, target)


def pair(
    table: StageTable, gemm: GroupedGemm, target: Target
) -> tuple[KernelConfig, FewActive | None]:
    """The robust configuration, or two of them where the guard lets a second launch in.

    A rule's configuration that costs do not know stays alone: nothing says what a second one gains.
    """
    by_family = family_costs(table, gemm, target)
    static = _robust_of(by_family, gemm, target)
    tokens, experts = gemm.max_segment_rows, gemm.num_segments
    top_k = max(1, gemm.max_rows // tokens)
    hot = by_family["hot"]
    spread = [costs for family, costs in by_family.items() if family != "hot"]
    if 2 * top_k > experts or static not in hot:
        return static, None
    few = min(hot, key=hot.__getitem__)
    many = min(hot, key=lambda config: sum(cost[config] / cost[static] for cost in spread))
    gains = [hot[few] / hot[static], *(cost[many] / cost[static] for cost in spread)]
    if few == many or sum(gains) > (1 - GAIN) * len(gains):  # Too little, even if idling were free.
        return static, None
    # Uniform over some of the experts: up to where the other configuration is the better one.
    up_to = active = top_k
    while (active := active * 2) < experts:
        some = table.costs(gemm, target, expected_sizes("uniform", tokens, top_k, active))
        if some[few] > some[many]:
            break
        up_to = active
    changes = [(hot[few] + idle_us(many, gemm, target, experts)) / hot[static]]
    idle = idle_us(few, gemm, target, up_to)
    changes += [(cost[many] + idle) / cost[static] for cost in spread]
    if sum(changes) > (1 - GAIN) * len(changes) or max(changes) > 1 + LOSS:
        return static, None
    return many, FewActive(few, up_to)


def choose_pair(gemm: GroupedGemm, target: Target) -> tuple[KernelConfig, FewActive | None]:
    """A configuration, and a second one for few active experts where that is worth its launch.

    Both are launched, without a sync: the sizes choose on the device which of them works. A guard
    keeps the robust one alone unless the mean over the families gains `GAIN`, the idle launch paid,
    and none loses more than `LOSS`.
    """
    if not costs_speak(gemm, target):
        return choose(gemm, target), None
    return _pair(bucketed(gemm), target)
