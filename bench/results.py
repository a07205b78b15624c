"""The results file: written after every cell, resumed where it stopped."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Cell = tuple[str, int, str]


def cell_of(row: Row) -> Cell:
    """Returns what a row measures: shape name, number of tokens, routing."""
    return row["shape"], row["T"], row["routing"]


def commits(meta: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The commit of the last run, and those of rows that it did not measure again."""
    last = str(meta.get("commit"))
    counts = Counter(str(row.get("commit", last)) for row in rows)
    rest = [
        f"{count} of its rows at {name}" for name, count in counts.most_common() if name != last
    ]
    return f"{last} ({', '.join(rest)})" if rest else last


class Results:
    """``{"meta": ..., "rows": [...]}`` on disk.

    Args:
        path: The JSON file; read if it exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        document: dict[str, Any] = {}
        if self.path.exists():
            document = json.loads(self.path.read_text())
        self.meta: dict[str, Any] = document.get("meta", {})
        self.rows: list[Row] = document.get("rows", [])

    def is_done(self, cell: Cell, peers: Iterable[str]) -> bool:
        """Whether the cell was measured with all these peers, each by a time or an error."""
        return any(cell_of(row) == cell and set(peers) <= set(row["peers"]) for row in self.rows)

    def put(self, row: Row) -> None:
        """Replaces the row of the same cell.

        A cell is re-measured whole: peers of different runs are not paired.
        """
        self.rows = [old for old in self.rows if cell_of(old) != cell_of(row)] + [row]

    def save(self) -> None:
        """Writes the file in one step, so that a killed run leaves the last whole version."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        os.replace(partial, self.path)


CELL = ("shape", "T", "routing", "peers")  # Keys of every row that `report.remarks` may name.
LAYER = (*CELL, "E", "floor_us")  # Of whole layers.
TIMED = ("shape", "T", "routing", "split", "sizes", "times_us")  # Of configurations' times.


def load(
    parser: argparse.ArgumentParser,
    path: Path,
    keys: Sequence[str],
    routings: Iterable[str] | None = None,
    entry: str = "",
) -> dict[str, Any]:
    """Returns a results file; ends the program with the reason where its rows are no such ones.

    Args:
        keys: what every row must have.
        routings: the names a row's routing may have; any if None.
        entry: what some row's peer must have or be, where other files have the same keys.
    """
    if not path.exists():
        parser.error(f"{path} does not exist")
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except ValueError as error:
        parser.error(f"{path} is no JSON: {error}")
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        parser.error(f"{path} holds no rows")
    lacking = [key for key in keys if any(key not in row for row in rows)]
    peers = (one for row in rows for one in row.get("peers", {}).items())
    if entry and not any(entry == name or entry in peer for name, peer in peers):
        lacking.append(f"{entry} among the peers")
    if lacking:
        parser.error(
            f"{path} holds other rows, without {', '.join(lacking)}: bench/README.md lists the "
            "files and the commands behind them"
        )
    strange = {row["routing"] for row in rows} - set(routings) if routings is not None else ()
    if strange:
        parser.error(
            f"{path} holds routings {', '.join(sorted(strange))}, which this command does not "
            "know: bench/README.md lists the files and the commands behind them"
        )
    return {"meta": {}, **document}


def read(
    parser: argparse.ArgumentParser,
    path: Path,
    routings: Iterable[str] | None = None,
    keys: Sequence[str] = LAYER,
    entry: str = "",
) -> Results:
    """Returns a results file, of whole layers if no `keys` say otherwise, checked by `load`."""
    load(parser, path, keys, routings, entry)
    return Results(path)


def read_named(
    prog: str,
    arguments: Sequence[str],
    default: Path,
    routings: Iterable[str] | None = None,
    keys: Sequence[str] = LAYER,
    entry: str = "",
) -> Results:
    """Returns the results file named on the command line of a report."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("file", type=Path, nargs="?", default=default)
    return read(parser, parser.parse_args(arguments).file, routings, keys, entry)
