"""What measured cases say of costs around them: residuals smoothed over places, at two reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Smoothing(NamedTuple):
    """How far exemplars speak, and how much of them it takes.

    Attributes:
        reach: octaves of rows, experts, columns and reduction.
        doubt: weight of no correction; an exemplar at no distance weighs 1.
    """

    reach: float
    doubt: float


# By `bench.cross_validate`, over cases marked "fit" alone: narrow (0.5, 0.3) is as good, one reach
# of half an octave loses more.
WIDE, NARROW = Smoothing(1.5, 1.0), Smoothing(0.7, 0.1)
NEGLIGIBLE = 1e-3  # Weight of an exemplar that is left out.

Place = tuple[float, ...]
Residuals = tuple[float | None, ...]  # In the order of the table's configurations.


@dataclass(frozen=True)
class Exemplar:
    """What a measured case says of costs near it.

    Attributes:
        place: where it lies (`table.place`).
        residual: logarithms of measured over modelled time; None for what was not timed.
        rest: what the wide correction leaves of it.
    """

    place: Place
    residual: Residuals
    rest: Residuals


class Surface:
    """Residuals at places: their mean around any place, for each configuration."""

    def __init__(self, places: Sequence[Place], residuals: Sequence[Residuals]) -> None:
        self.configs = len(residuals[0]) if residuals else 0
        # Nearly all is known: what is not is kept apart, so that the sums need no question.
        self.cases = [
            (
                there,
                [0.0 if value is None else value for value in row],
                [i for i, value in enumerate(row) if value is None],
            )
            for there, row in zip(places, residuals, strict=True)
        ]

    def at(self, here: Place, by: Smoothing) -> list[float]:
        """The mean around a place, drawn to 0 by doubt."""
        scale = -0.5 / by.reach**2
        totals, weights, all_of_it = [0.0] * self.configs, [by.doubt] * self.configs, 0.0
        for there, values, unknown in self.cases:
            weight = math.exp(scale * math.dist(here, there) ** 2)
            if weight < NEGLIGIBLE:
                continue
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
            all_of_it += weight
            for i in unknown:
                weights[i] -= weight
        return [t / (w + all_of_it) for t, w in zip(totals, weights, strict=True)]


class Corrections:
    """By what many cases around have in common, then by what the nearest ones still differ by."""

    def __init__(self, exemplars: Sequence[Exemplar]) -> None:
        places = [one.place for one in exemplars]
        self.wide = Surface(places, [one.residual for one in exemplars])
        self.narrow = Surface(places, [one.rest for one in exemplars])

    def at(self, here: Place) -> list[float]:
        """Logarithms that the costs at a place are corrected by; none without exemplars."""
        both = zip(self.wide.at(here, WIDE), self.narrow.at(here, NARROW), strict=True)
        return [a + b for a, b in both]


def exemplars(places: Sequence[Place], residuals: Sequence[Residuals]) -> tuple[Exemplar, ...]:
    """Exemplars of measured cases: what the wide correction leaves is kept beside the residuals."""
    surface, made = Surface(places, residuals), []
    for here, mine in zip(places, residuals, strict=True):
        wide = surface.at(here, WIDE)
        rest = (None if r is None else r - w for r, w in zip(mine, wide, strict=True))
        made.append(Exemplar(here, mine, tuple(rest)))
    return tuple(made)
