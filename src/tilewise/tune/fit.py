"""Fits the cost table: non-negative coefficients for each configuration, then what is left of them.

RaMP (arXiv 2604.26039) fits by ordinary least squares. Here residuals are relative, as regret is;
coefficients are not negative, as nothing gets faster by more work; and a case counts for a
configuration as much as that is in the race there, since only near the fastest does an error choose
wrongly. Solver: scipy.optimize.nnls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dispatch.config import GroupedGemm, KernelConfig
from ..dispatch.features import features
from ..dispatch.histogram import Histogram
from ..dispatch.smoothing import exemplars
from ..dispatch.table import StageTable, place
from ..target import Target

RACE = 2.0  # A configuration twice as slow as the fastest counts 1/4 there, its square 1/16.
TIMED = 0.75  # Share of the cases that a configuration must have been timed on, not to extrapolate.
VARIANTS = 56  # Configurations of a shipped table: more change mean regret by less than 0.1%.
TAIL = 0.2  # Weight of the worst case beside the mean, as variants are picked.


@dataclass(frozen=True)
class Case:
    """One product under one routing, timed.

    Attributes:
        gemm: the product.
        histograms: of each input set that the times are means over.
        times_us: microseconds by configuration.
    """

    gemm: GroupedGemm
    histograms: tuple[Histogram, ...]
    times_us: Mapping[KernelConfig, float]

    @property
    def best_us(self) -> float:
        return min(self.times_us.values())

    def features(self, config: KernelConfig, target: Target) -> list[float]:
        """The mean of `features` over the input sets."""
        rows = [features(config, self.gemm, target, one) for one in self.histograms]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    @property
    def place(self) -> tuple[float, ...]:
        rows = [place(self.gemm, one) for one in self.histograms]
        return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def non_negative(
    rows: Sequence[Sequence[float]], times: Sequence[float], weights: Sequence[float]
) -> tuple[float, ...]:
    """Coefficients >= 0 with the least weighted squares of relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    matrix = np.array(rows) / np.array(times)[:, None] * np.array(weights)[:, None]
    scale = np.abs(matrix).max(axis=0) + 1e-12
    solution, _ = nnls(matrix / scale, np.array(weights))
    return tuple(float(value) for value in solution / scale)


def fit_stage(
    cases: Sequence[Case], target: Target, variants: Iterable[KernelConfig] | None = None
) -> StageTable:
    """The table of one product.

    Args:
        cases: timed cases of this product.
        variants: configurations to keep; by default all that were timed on nearly all cases.
    """
    kept = list(variants) if variants is not None else timed(cases)
    coefficients = {}
    for config in kept:
        have = [case for case in cases if config in case.times_us]
        times = [case.times_us[config] for case in have]
        race = [min(1.0, case.best_us / us) ** RACE for case, us in zip(have, times, strict=True)]
        coefficients[config] = non_negative(
            [case.features(config, target) for case in have], times, race
        )
    bare = StageTable(coefficients, ())
    residuals = [
        tuple(
            math.log(case.times_us[config] / modelled(bare, case, config, target))
            if config in case.times_us
            else None
            for config in kept
        )
        for case in cases
    ]
    return StageTable(coefficients, exemplars([case.place for case in cases], residuals))


def modelled(table: StageTable, case: Case, config: KernelConfig, target: Target) -> float:
    """Microseconds by the cost alone, as the mean over the input sets."""
    values = [table.modelled(config, case.gemm, target, one) for one in case.histograms]
    return sum(values) / len(values)


def predicted(table: StageTable, case: Case, target: Target) -> dict[KernelConfig, float]:
    """Microseconds of every configuration, as the mean over the input sets."""
    costs = [table.costs(case.gemm, target, one) for one in case.histograms]
    return {config: sum(cost[config] for cost in costs) / len(costs) for config in costs[0]}


def timed(cases: Sequence[Case]) -> list[KernelConfig]:
    """Configurations that were timed on nearly all cases, in the order they first appear."""
    counts: dict[KernelConfig, int] = {}
    for case in cases:
        for config in case.times_us:
            counts[config] = counts.get(config, 0) + 1
    return [config for config, count in counts.items() if count >= TIMED * len(cases)]


def portfolio(
    cases: Sequence[Case], size: int = VARIANTS, keep: Iterable[KernelConfig] = ()
) -> list[KernelConfig]:
    """The variants to ship: `keep`, then greedily those whose best is nearest to the best of all.

    Few variants compile sooner, and a cost model errs less among few.
    """
    pool = timed(cases)
    chosen = [config for config in dict.fromkeys(keep) if config in pool]
    pool = [config for config in pool if config not in chosen]
    reached = [
        min(
            (case.times_us[c] / case.best_us - 1 for c in chosen if c in case.times_us),
            default=math.inf,
        )
        for case in cases
    ]
    ratios = {
        config: [case.times_us.get(config, math.inf) / case.best_us - 1 for case in cases]
        for config in pool
    }

    def score(config: KernelConfig) -> float:
        values = [min(a, b, 5.0) for a, b in zip(reached, ratios[config], strict=True)]
        return sum(values) / len(values) + TAIL * max(values)

    while pool and len(chosen) < size:
        best = min(pool, key=score)
        pool.remove(best)
        chosen.append(best)
        reached = [min(a, b) for a, b in zip(reached, ratios[best], strict=True)]
    return chosen


def cases_of(
    rows: Iterable[Mapping[str, Any]], gemm_of: Any, halves: slice = slice(None)
) -> list[Case]:
    """Cases of measured rows ("sizes" of each input set, "times_us" of halves by name).

    Args:
        gemm_of: the `GroupedGemm` of a row.
        halves: which halves of the samples count.
    """
    return [
        Case(
            gemm_of(row),
            tuple(Histogram.of(sizes) for sizes in row["sizes"]),
            {
                KernelConfig.from_name(name): sum(times[halves]) / len(times[halves])
                for name, times in row["times_us"].items()
            },
        )
        for row in rows
    ]
