"""Fitted costs of configurations, shipped for machines that were profiled, and those of users.

A table holds, for each product, the coefficients of `features.FEATURES` for each configuration, and
exemplars: how far a measured case was from that cost. Near exemplars the cost is corrected twice:
by what many cases around have in common, then by what the nearest ones still differ by.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..target import Target
from . import profiles
from .config import GroupedGemm, KernelConfig, why_illegal
from .features import FEATURES, features
from .histogram import Histogram
from .smoothing import Corrections, Exemplar, Place, Residuals

PLACE = 5  # Numbers of a place.
LARGEST = 50.0  # Logarithm of any time over any other.


def _finite(values: Sequence[float], limit: float = math.inf) -> bool:
    return all(
        isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= limit
        for value in values
    )


@dataclass(frozen=True)
class StageTable:
    """The fitted costs of one product."""

    coefficients: Mapping[KernelConfig, tuple[float, ...]]
    exemplars: tuple[Exemplar, ...]

    @functools.cached_property
    def _corrections(self) -> Corrections:
        return Corrections(self.exemplars)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> StageTable:
        coefficients = {
            KernelConfig.from_name(name): tuple(row) for name, row in values["coefficients"].items()
        }
        exemplars = tuple(
            Exemplar(tuple(one["place"]), tuple(one["residual"]), tuple(one["rest"]))
            for one in values["exemplars"]
        )
        for one in exemplars:
            if len(one.place) != PLACE or not _finite(one.place):
                raise ValueError(f"an exemplar's place is {PLACE} numbers, not {one.place}")
            for row in (one.residual, one.rest):
                if len(row) != len(coefficients) or not _finite(
                    [0.0 if value is None else value for value in row], LARGEST
                ):
                    raise ValueError("an exemplar has not one residual for each configuration")
        if not all(map(_finite, coefficients.values())):
            raise ValueError("a coefficient is no finite number")
        return StageTable(coefficients, exemplars)

    def to_json(self) -> dict[str, Any]:
        def row(known: Residuals) -> list[float | None]:
            return [None if value is None else round(value, 4) for value in known]

        return {
            "coefficients": {
                config.name: [float(f"{value:.5g}") for value in row]
                for config, row in self.coefficients.items()
            },
            "exemplars": [
                {
                    "place": [round(value, 3) for value in one.place],
                    "residual": row(one.residual),
                    "rest": row(one.rest),
                }
                for one in self.exemplars
            ],
        }

    def modelled(
        self, config: KernelConfig, gemm: GroupedGemm, target: Target, histogram: Histogram
    ) -> float:
        """Microseconds by the fitted cost alone."""
        row = self.coefficients[config]
        values = features(config, gemm, target, histogram)
        return max(0.1, sum(a * b for a, b in zip(row, values, strict=True)))

    def costs(
        self, gemm: GroupedGemm, target: Target, histogram: Histogram
    ) -> dict[KernelConfig, float]:
        """Microseconds of every configuration that is legal here, corrected near exemplars."""
        shifts = self._corrections.at(place(gemm, histogram))
        shifts = shifts or [0.0] * len(self.coefficients)
        return {
            config: self.modelled(config, gemm, target, histogram) * math.exp(shift)
            for config, shift in zip(self.coefficients, shifts, strict=True)
            if why_illegal(config, gemm, target) is None
        }


def place(gemm: GroupedGemm, histogram: Histogram) -> Place:
    """Where a case lies: octaves of the largest and the mean segment, of active ones, N and K."""
    active = max(1, histogram.active)
    return (
        math.log2(max(1, histogram.largest)),
        math.log2(max(1, histogram.rows) / active),
        math.log2(active),
        math.log2(gemm.n),
        math.log2(gemm.k),
    )


@dataclass(frozen=True)
class Table:
    """Both products' costs on one kind of machine, and what they were fitted on."""

    meta: Mapping[str, Any]
    gate_up: StageTable
    down: StageTable

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Table:
        return Table(
            values["meta"],
            StageTable.from_json(values["gate_up"]),
            StageTable.from_json(values["down"]),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "meta": dict(self.meta),
            "gate_up": self.gate_up.to_json(),
            "down": self.down.to_json(),
        }


@functools.cache
def shipped(arch: str) -> Table | None:
    """The table that comes with the library for an architecture, or None."""
    file = resources.files(__package__).joinpath("tables").joinpath(f"{arch}.json")
    return Table.from_json(json.loads(file.read_text())) if file.is_file() else None


@functools.lru_cache(maxsize=1024)
def profiled(
    segments: int, hidden: int, intermediate: int, top_k: int, target: Target
) -> Table | None:
    """The table of a user's profile for these sizes on this machine, or None.

    A profile of other kernels or another Triton is a hint: it counts only where no table ships.
    Decided once per process, and logged once.
    """
    found = profiles.find(segments, hidden, intermediate, top_k, target)
    if found is None:
        return None
    stale = " and ".join(found.stale)
    if stale and shipped(target.arch) is not None:
        profiles.LOG.warning(
            "%s is not used: %s changed since; run `tilewise tune` again", found.path, stale
        )
        return None
    try:
        table = Table.from_json(found.table)
        for stage in (table.gate_up, table.down):
            if any(len(row) != len(FEATURES) for row in stage.coefficients.values()):
                raise ValueError("its costs are fitted on other features")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        profiles.LOG.warning("%s is not used: %r; run `tilewise tune` again", found.path, error)
        return None
    if stale:
        profiles.LOG.warning("%s is used as a hint: %s changed since", found.path, stale)
    return table


def stage_table(gemm: GroupedGemm, target: Target) -> StageTable | None:
    """The costs that speak for a product, or None: other element sizes, layouts and machines.

    A user's profile of this product, of whatever top_k, goes before the table that ships. Both are
    read once per process, and decisions made from them are kept: a new profile counts from the next
    start.
    """
    if not (target.warpgroup_mma and gemm.descriptors_possible and gemm.itemsize == 2):
        return None
    if (gemm.gathered, gemm.num_weights) not in ((True, 2), (False, 1)):
        return None
    table = profile_of(gemm, target) or shipped(target.arch)
    if table is None:
        return None
    return table.gate_up if gemm.gathered else table.down


def profile_of(gemm: GroupedGemm, target: Target) -> Table | None:
    """The table of a user's profile for gate+up (`gathered`) or down of these sizes, or None."""
    widths = (gemm.k, gemm.n) if gemm.gathered else (gemm.n, gemm.k)
    top_k = -(-gemm.max_rows // max(1, gemm.max_segment_rows))
    return profiled(gemm.num_segments, *widths, top_k, target)
