"""Two runs of the same cells: our time over the peers' times, the newer run against the older.

``python -m bench.compare OLD NEW`` prints a table by tokens and layer. Units differ by 2% and runs
by the minute: what changed for every peer alike is taken out. Rows of one commit are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.protocol import ROUTINGS
from bench.report import OURS, Table, geomean
from bench.results import Row, cell_of, commits, read

RIVALS = ("vllm", "triton_kernels")  # In the files of listed layers and of others.
EVERY = "all of these"


def change(old: Row, new: Row) -> float | None:
    """Our new time over the old one, over the same of the rivals in both; None without any."""
    ratios = {
        name: new["peers"][name]["us"] / old["peers"][name]["us"]
        for name in (OURS, *RIVALS)
        if all("us" in row["peers"].get(name, {}) for row in (old, new))
    }
    ours = ratios.pop(OURS, None)
    return ours / geomean(ratios.values()) if ours and ratios else None


def changes(old: Sequence[Row], new: Sequence[Row]) -> dict[tuple[str, int, str], float]:
    """The change of every cell that the two runs have and that was measured anew."""
    before = {cell_of(row): row for row in old}
    found = {}
    for row in new:
        other = before.get(cell_of(row))
        if other is not None and other.get("commit") != row.get("commit"):
            value = change(other, row)
            if value is not None:
                found[cell_of(row)] = value
    return found


def table(found: dict[tuple[str, int, str], float]) -> Table:
    """A line for each layer and token count, and one for all layers of a token count."""
    body = []
    for tokens in sorted({t for _, t, _ in found}):
        layers = list(dict.fromkeys(shape for shape, t, _ in found if t == tokens))
        for name in [*layers, EVERY] if len(layers) > 1 else layers:
            cells = {
                cell: value
                for cell, value in found.items()
                if cell[1] == tokens and name in (cell[0], EVERY)
            }
            means = [[v for cell, v in cells.items() if cell[2] == r] for r in ROUTINGS]
            texts = [f"{geomean(values):.3f}" if values else "" for values in means]
            body.append([str(tokens), name, *texts, f"{geomean(cells.values()):.3f}"])
    title = f"{OURS}'s time over that of {' and '.join(RIVALS)}, the newer run over the older"
    return Table(title, ["tokens", "layer", *ROUTINGS, "mean"], body)


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--shapes", nargs="+", help="these layers only")
    parser.add_argument("--tokens", nargs="+", type=int, help="these token counts only")
    options = parser.parse_args(arguments)
    old, new = (read(parser, path, ROUTINGS) for path in (options.old, options.new))
    found = {
        cell: value
        for cell, value in changes(old.rows, new.rows).items()
        if (not options.shapes or cell[0] in options.shapes)
        and (not options.tokens or cell[1] in options.tokens)
    }
    if not found:
        parser.error("no cell of these was measured at another commit")
    print(table(found).markdown() + "\n")
    print(f"- {len(found)} cells; old {commits(old.meta, old.rows)}")
    print(f"- new {commits(new.meta, new.rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
