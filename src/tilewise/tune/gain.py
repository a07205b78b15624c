"""What a profile is worth: its choices and the library's own, beside the best that was timed.

Choices are made by one half of the samples and scored by the other, so that noise flatters none.
The cases are those that were fitted: it says nothing of routings in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dispatch.config import GroupedGemm, KernelConfig
from ..dispatch.rules import rule
from ..dispatch.select import bucket, robust
from ..dispatch.table import Table, shipped
from ..target import Target
from . import store
from .measure import STAGES, product

CHOOSE, SCORE = slice(0, 1), slice(1, 2)


@dataclass(frozen=True)
class Gain:
    """Mean time of choices over the fastest configuration's: 1.02 is 2% slower.

    Attributes:
        before: without a profile. after: with it. cases: that it is a mean of.
    """

    before: float
    after: float
    cases: int


def gain(profile: store.Profile) -> Gain | None:
    """Both choices on every case that has times of both, None without a table."""
    pairs = choices(profile)
    if not pairs:
        return None
    means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    return Gain(means[0], means[1], len(pairs))


def choices(profile: store.Profile) -> list[tuple[float, float]]:
    """For each case the time over the fastest's: of the choice without the profile, and with it."""
    target = profile.target
    table = store.fitted(profile, target, CHOOSE)
    pairs: list[tuple[float, float]] = []
    if table is None:
        return pairs
    for stage in STAGES:
        chosen_by, scored_by = (store.cases(profile, stage, half) for half in (CHOOSE, SCORE))
        for seen, unseen in zip(chosen_by, scored_by, strict=True):
            gemm = product(profile.shape, stage, bucket(seen.gemm.max_segment_rows))
            best = min(seen.times_us, key=seen.times_us.__getitem__)
            before = _choice(shipped(target.arch), stage, gemm, target)
            after = _choice(table, stage, gemm, target)
            us = unseen.times_us
            if before in us and after in us:
                pairs.append((us[before] / us[best], us[after] / us[best]))
    return pairs


def _choice(table: Table | None, stage: str, gemm: GroupedGemm, target: Target) -> KernelConfig:
    if table is None:
        return rule(gemm, target)
    return robust(table.gate_up if stage == "gate_up" else table.down, gemm, target)
