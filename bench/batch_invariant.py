"""The cost of ``batch_invariant=True`` over the default, cell by cell, paired in one run.

``python -m bench.batch_invariant`` measures; ``python -m bench.batch_invariant report FILE`` prints
the cost by token count.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import machine, measure
from bench.peers import base
from bench.protocol import ROUTINGS, SHAPES, TOKENS
from bench.report import Table, geomean, reported, speedup
from bench.results import CELL, Results, Row

INVARIANT = "tilewise_invariant"
PEERS = ("tilewise", INVARIANT, "tilewise_again")
OUT = Path(__file__).parent / "results" / "h200_batch_invariant.json"


def cost(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the geometric mean of invariant over default time, by token count and of all."""
    return {name: geomean(ratios) for name, ratios in ratios_of(rows).items()}


def ratios_of(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Returns invariant over default time of every cell, by token count and of all."""
    groups: dict[str, list[float]] = {"all": []}
    for row in rows:
        if (ratio := speedup(row, INVARIANT)) is not None:
            groups["all"].append(ratio)
            groups.setdefault(str(row["T"]), []).append(ratio)
    return groups


def table(rows: Sequence[Row]) -> Table:
    """The cost by token count and of all cells."""
    body = [
        [name, str(len(ratios)), f"{geomean(ratios):.3f}", f"{max(ratios, default=math.nan):.3f}"]
        for name, ratios in ratios_of(rows).items()
    ]
    routings = ", ".join(dict.fromkeys(row["routing"] for row in rows))
    title = (
        f"Time of batch_invariant=True over the default, {body[0][1]} cells, routings {routings}"
    )
    return Table(title, ["tokens", "cells", "geometric mean", "largest"], [*body[1:], body[0]])


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes the results file; or prints one."""
    if reported("batch_invariant", arguments, OUT, table, CELL, INVARIANT):
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench.batch_invariant", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=["uniform", "hot"])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--time-limit", type=float, default=measure.Options.time_limit)
    chosen = parser.parse_args(arguments)
    machine.require_gpu()
    options = measure.Options(
        shapes=tuple(chosen.shapes),
        tokens=tuple(chosen.tokens),
        routings=tuple(chosen.routings),
        peers=PEERS,
        time_limit=chosen.time_limit,
    )
    results = Results(chosen.out)
    peers, missing = base.load(PEERS)
    measure.describe_run(options, results, peers, missing)
    for row in measure.measure(options, results, peers):
        print(row["shape"], row["T"], row["routing"], speedup(row, INVARIANT), flush=True)
    results.meta["batch_invariant_over_default"] = cost(results.rows)
    results.save()
    print(results.meta["batch_invariant_over_default"], results.meta["noise"])


if __name__ == "__main__":
    main(sys.argv[1:])
