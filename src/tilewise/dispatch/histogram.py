"""Histograms of rows over experts: what a cost depends on, and the ones to expect of a batch.

`expected_sizes` stands in for routing that the host must not wait for. It is deterministic, so that
every rank and every run decides alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

FAMILIES = ("uniform", "zipf", "hot", "bimodal")
ZIPF = 1.2
SPREAD = 1 / 8  # Of the tokens of a bimodal batch.
GOLDEN = 0.6180339887498949  # Its multiples, modulo 1, are evenly spread: quantiles without a dice.
NORMAL_FROM = 30.0  # Rows from which a binomial is taken for a normal distribution.


@dataclass(frozen=True)
class Histogram:
    """Rows of each expert, and the sums that costs need.

    Attributes:
        sizes: rows of each active expert.
        rows: their sum. active: their number. largest: the most rows of an expert.
    """

    sizes: tuple[int, ...]
    rows: int
    active: int
    largest: int
    _tiles: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(sizes: Sequence[int]) -> Histogram:
        used = tuple(size for size in sizes if size > 0)
        return Histogram(used, sum(used), len(used), max(used, default=0))

    def tiles(self, block_m: int, tail_m: int = 0) -> tuple[int, int]:
        """Tall and short row tiles: an expert's last rows are short if `tail_m` or fewer."""
        known = self._tiles.get((block_m, tail_m))
        if known is None:
            tall = short = 0
            for size in self.sizes:
                full, left = divmod(size, block_m)
                tall += full
                if left > tail_m:
                    tall += 1
                elif left:
                    short += 1
            known = self._tiles[block_m, tail_m] = (tall, short)
        return known


def _quantile(count: int, p: float, u: float) -> int:
    """The smallest n with P(Binomial(count, p) <= n) >= u."""
    mean = count * p
    if p >= 1:
        return count
    if mean > NORMAL_FROM:
        value = NormalDist(mean, math.sqrt(mean * (1 - p))).inv_cdf(u)
        return min(count, max(0, round(value)))
    mass = math.exp(count * math.log1p(-p))
    below, n = mass, 0
    while below < u and n < count:
        mass *= (count - n) / (n + 1) * p / (1 - p)
        n += 1
        below += mass
    return n


def _chances(family: str, top_k: int, num_experts: int) -> list[float]:
    """The probability of each expert to be among a token's top_k."""
    if family == "uniform":
        return [top_k / num_experts] * num_experts
    if family == "hot":
        return [1.0] * top_k + [0.0] * (num_experts - top_k)
    if family == "bimodal":
        hot, spread = 1 - SPREAD, SPREAD * top_k / num_experts
        return [hot + spread] * top_k + [spread] * (num_experts - top_k)
    if family != "zipf":
        raise ValueError(f"family={family!r} must be one of {FAMILIES}")
    weights = [rank**-ZIPF for rank in range(1, num_experts + 1)]
    # Drawing k without replacement: 1 - exp(-rate * weight), at the rate that makes them sum to k.
    low, high = 0.0, 1.0
    while sum(-math.expm1(-high * w) for w in weights) < top_k and high < 1e12:
        high *= 2
    for _ in range(60):
        rate = (low + high) / 2
        if sum(-math.expm1(-rate * w) for w in weights) < top_k:
            low = rate
        else:
            high = rate
    return [-math.expm1(-high * w) for w in weights]


@functools.lru_cache(maxsize=4096)
def expected_sizes(family: str, num_tokens: int, top_k: int, num_experts: int) -> Histogram:
    """A typical histogram of a batch.

    Args:
        family: "uniform"; "zipf", p ~ rank^-1.2; "hot", every token to the same experts;
            "bimodal", an eighth of the tokens uniform and the rest hot.
    """
    chances = _chances(family, min(top_k, num_experts), num_experts)
    return Histogram.of(
        [
            _quantile(num_tokens, p, (0.5 + i * GOLDEN) % 1.0) if p > 0 else 0
            for i, p in enumerate(chances)
        ]
    )
