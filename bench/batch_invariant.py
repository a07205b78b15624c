"""The cost of ``batch_invariant=True`` over the default, cell by cell, paired in one run.

Command: ``python -m bench.batch_invariant``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import machine, measure
from bench.peers import base
from bench.protocol import ROUTINGS, SHAPES, TOKENS
from bench.report import geomean, speedup
from bench.results import Results, Row

INVARIANT = "tilewise_invariant"
PEERS = ("tilewise", INVARIANT, "tilewise_again")
OUT = Path(__file__).parent / "results" / "h200_batch_invariant.json"


def cost(rows: list[Row]) -> dict[str, float]:
    """Returns the geometric mean of invariant over default time, by token count and of all."""
    groups: dict[str, list[Row]] = {"all": rows}
    for row in rows:
        groups.setdefault(str(row["T"]), []).append(row)
    return {
        name: geomean(r for row in group if (r := speedup(row, INVARIANT)) is not None)
        for name, group in groups.items()
    }


def main() -> None:
    """Measures, prints and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=["uniform", "hot"])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--time-limit", type=float, default=measure.Options.time_limit)
    chosen = parser.parse_args()
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
    main()
