"""Fitted costs of configurations, shipped for machines that were profiled, and those of users.

A table holds, for each product, the coefficients of `features.FEATURES` for each configuration, and
exemplars: how far a measured case was from that cost. Near an exemplar the cost is corrected by it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..target import Target
from .config import GroupedGemm, KernelConfig, why_illegal
from .features import features
from .histogram import Histogram

REACH = 0.5  # Octaves of rows, experts, columns and reduction over which an exemplar speaks.
DOUBT = 0.1  # Weight of the cost itself against exemplars: one at no distance counts 10 of 11.


@dataclass(frozen=True)
class Exemplar:
    """Logarithms of measured over modelled time, by configuration, at one place."""

    place: tuple[float, ...]
    residual: Mapping[KernelConfig, float]


@dataclass(frozen=True)
class StageTable:
    """The fitted costs of one product."""

    coefficients: Mapping[KernelConfig, tuple[float, ...]]
    exemplars: tuple[Exemplar, ...]

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> StageTable:
        coefficients = {
            KernelConfig.from_name(name): tuple(row) for name, row in values["coefficients"].items()
        }
        order = list(coefficients)
        exemplars = tuple(
            Exemplar(
                tuple(one["place"]),
                {c: r for c, r in zip(order, one["residual"], strict=True) if r is not None},
            )
            for one in values["exemplars"]
        )
        return StageTable(coefficients, exemplars)

    def to_json(self) -> dict[str, Any]:
        return {
            "coefficients": {
                config.name: [float(f"{value:.5g}") for value in row]
                for config, row in self.coefficients.items()
            },
            "exemplars": [
                {
                    "place": [round(value, 3) for value in one.place],
                    "residual": [
                        round(one.residual[c], 4) if c in one.residual else None
                        for c in self.coefficients
                    ],
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
        here = place(gemm, histogram)
        near = []
        for one in self.exemplars:
            distance = sum((a - b) ** 2 for a, b in zip(here, one.place, strict=True))
            weight = math.exp(-0.5 * distance / REACH**2)
            if weight > 1e-4:
                near.append((weight, one.residual))
        out = {}
        for config in self.coefficients:
            if why_illegal(config, gemm, target) is not None:
                continue
            total, weights = 0.0, DOUBT
            for weight, residual in near:
                if config in residual:
                    total += weight * residual[config]
                    weights += weight
            out[config] = self.modelled(config, gemm, target, histogram) * math.exp(total / weights)
        return out


def place(gemm: GroupedGemm, histogram: Histogram) -> tuple[float, ...]:
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


def stage_table(gemm: GroupedGemm, target: Target) -> StageTable | None:
    """The costs that speak for a product, or None: other element sizes, layouts and machines."""
    if not (target.warpgroup_mma and gemm.descriptors_possible and gemm.itemsize == 2):
        return None
    table = shipped(target.arch)
    if table is None:
        return None
    if gemm.gathered and gemm.num_weights == 2:
        return table.gate_up
    if not gemm.gathered and gemm.num_weights == 1:
        return table.down
    return None
