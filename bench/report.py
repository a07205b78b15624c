"""The tables of a results file: over the floor, against each peer, cell by cell, and the losses."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from bench.peers import base
from bench.protocol import ROUTINGS
from bench.results import Results, Row, commits, read_named

OURS = "tilewise"
SHORT = {"triton_kernels": "tk", "torch_gmm": "torch"}
TRITONMOE = Path(__file__).parent / "baselines" / "tritonmoe_h200.json"


@dataclass(frozen=True)
class Table:
    """A table that prints as Markdown and on a terminal."""

    title: str
    header: list[str]
    body: list[list[str]]

    def markdown(self) -> str:
        """Returns the title and a Markdown table."""
        lines = [self.header, ["---"] * len(self.header), *self.body]
        return "\n".join([self.title, "", *(f"| {' | '.join(line)} |" for line in lines)])

    def rich(self) -> RichTable:
        """Returns the table for a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in self.body:
            table.add_row(*line)
        return table


def geomean(values: Iterable[float]) -> float:
    """Returns the geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Returns every peer with a time in some row, in order of appearance, without repeats."""
    names = (name for row in rows for name, entry in row["peers"].items() if "us" in entry)
    return list(dict.fromkeys(name for name in names if base.AGAIN not in name))


def rivals_of(rows: Sequence[Row]) -> list[str]:
    """Returns the peers that are not this library."""
    return [name for name in peers_of(rows) if not name.startswith(OURS)]


def best_rival(row: Row) -> tuple[str, float] | None:
    """Returns the fastest other peer of a cell and its time; None where there is none."""
    times = {name: row["peers"][name]["us"] for name in rivals_of([row])}
    return min(times.items(), key=lambda item: item[1]) if times else None


def speedup(row: Row, name: str, over: str = OURS) -> float | None:
    """Returns time of ``name`` over time of ``over``: above 1 where ``over`` is faster.

    The median of the ratios of each round, which both peers ran side by side.
    """
    a, b = row["peers"].get(name, {}), row["peers"].get(over, {})
    if "us" not in a or "us" not in b:
        return None
    return statistics.median(x / y for x, y in zip(a["us_rounds"], b["us_rounds"], strict=True))


def over_floor(rows: Sequence[Row]) -> Table:
    """Geometric mean of time over the floor, by token count."""
    header, groups = _by_tokens(rows)

    def line(label: str, ratio: Callable[[Row], float | None]) -> list[str]:
        return [label, *(_mean(ratio(row) for row in group) for group in groups)]

    def of(name: str) -> Callable[[Row], float | None]:
        def ratio(row: Row) -> float | None:
            us = row["peers"].get(name, {}).get("us")
            return us / row["floor_us"] if us else None

        return ratio

    def of_best(row: Row) -> float | None:
        best = best_rival(row)
        return best[1] / row["floor_us"] if best else None

    body = [line(name, of(name)) for name in peers_of(rows)]
    body.append(line("best of the others", of_best))
    return Table(f"Time over floor, geometric mean of {len(rows)} cells", ["peer", *header], body)


def against_peers(rows: Sequence[Row]) -> Table:
    """Geometric mean of each peer's time over ours, and how many cells we win."""
    header, groups = _by_tokens(rows)
    body = []
    for name in rivals_of(rows):
        ratios = [ratio for row in rows if (ratio := speedup(row, name)) is not None]
        wins = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
        means = [_mean(speedup(row, name) for row in group) for group in groups]
        body.append([name, *means, wins])
    bests = [[_best_speedup(row) for row in group] for group in groups]
    known = [ratio for ratio in bests[-1] if ratio is not None] if bests else []
    wins = f"{sum(ratio > 1 for ratio in known)} of {len(known)}"
    body.append(["best of the others", *(_mean(group) for group in bests), wins])
    title = f"Speed of {OURS} against each peer (above 1: {OURS} is faster)"
    return Table(title, ["peer", *header, "cells won"], body)


def cells(rows: Sequence[Row]) -> Table:
    """Per cell: the floor in us, the best other peer and its ratio to the floor, then ours."""
    tokens = sorted({row["T"] for row in rows})
    by_line: dict[tuple[str, str], dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: ROUTINGS.index(row["routing"])):
        shape = f"{row['shape']} ({row['E']}, {row['topk']}, {row['H']}, {row['I']})"
        by_line.setdefault((shape, row["routing"]), {})[row["T"]] = _cell(row)
    order = list(dict.fromkeys(row["shape"] for row in rows))
    lines = sorted(by_line, key=lambda line: order.index(line[0].partition(" ")[0]))
    body = [[*line, *(by_line[line].get(t, "") for t in tokens)] for line in lines]
    header = ["shape (E, top-k, H, I)", "routing", *(f"T={t}" for t in tokens)]
    title = f"Per cell: floor in us · best of the others over it · {OURS} over it"
    return Table(title, header, body)


def losses(rows: Sequence[Row]) -> Table:
    """The cells where another peer is faster, worst first."""
    found = []
    for row in rows:
        ratio, best = _best_speedup(row), best_rival(row)
        if ratio is not None and best is not None and ratio < 1:
            ours = row["peers"][OURS]["us"]
            found.append((ratio, [*_name(row), f"{ours:.1f}", best[0], f"{best[1]:.1f}"]))
    return _losses(f"Cells where another peer is faster: {len(found)} of {len(rows)}", found)


def losses_to_tritonmoe(rows: Sequence[Row], baseline: Path = TRITONMOE) -> Table:
    """The cells slower than TritonMoE's kernels, from times that were not measured beside ours."""
    document = json.loads(baseline.read_text())
    times = {(c["shape"], c["T"], c["routing"]): c["us"] for c in document["cells"]}
    found = []
    for row in rows:
        theirs = times.get((row["shape"], row["T"], row["routing"]))
        ours = row["peers"].get(OURS, {}).get("us")
        if theirs and ours and ours > theirs:
            line = [*_name(row), f"{ours:.1f}", "tritonmoe", f"{theirs:.1f}"]
            found.append((theirs / ours, line))
    meta = document["meta"]
    title = (
        f"Cells slower than TritonMoE's kernels: {len(found)} of {len(rows)} "
        f"(theirs measured {meta['measured']} on {meta['hardware']}; {meta['note']})"
    )
    return _losses(title, found, "speed")


def remarks(results: Results) -> list[str]:
    """Returns what a reader must know: provenance, noise, missing peers, flags and errors."""
    meta = results.meta
    lines = [
        f"{meta.get('hardware')}, driver {meta.get('driver')}, torch {meta.get('torch')}, "
        f"triton {meta.get('triton')}, commit {commits(meta, results.rows)}",
        *(f"noise, {name} against itself: {_percents(n)}" for name, n in _items(meta, "noise")),
        *(f"missing peer {name}: {reason}" for name, reason in _items(meta, "missing")),
    ]
    if "copy_GBs" in meta:
        rates = f"copy {meta['copy_GBs']:.0f} GB/s, bf16 product {meta['bf16_TFLOPs']:.0f} TFLOP/s"
        lines.insert(1, f"ceilings of this run: {rates}")
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows:
        shape, *where = _name(row)
        for name, entry in row["peers"].items():
            problems = [*entry.get("flags", []), *([entry["error"]] if "error" in entry else [])]
            for problem in problems:
                found.setdefault((shape, name, problem), []).append(" ".join(where))
    for (shape, name, problem), cells in found.items():
        named = ", ".join(cells[:4]) + (f" and {len(cells) - 4} more" if len(cells) > 4 else "")
        lines.append(f"{shape} {named}: {name}: {problem}")
    return lines


def reported(
    program: str,
    arguments: Sequence[str],
    default: Path,
    table: Callable[[Sequence[Row]], Table],
    keys: Sequence[str],
    entry: str = "",
) -> bool:
    """Prints a results file as one table, if these are the arguments of a report; whether so.

    Args:
        program: a module of `bench`. default: the file if none is named.
        keys, entry: as `results.load`.
    """
    if arguments[:1] != ["report"]:
        return False
    named = f"python -m bench.{program} report"
    results = read_named(named, arguments[1:], default, keys=keys, entry=entry)
    unit = [f"unit: {results.meta['unit']}"] if "unit" in results.meta else []
    show([table(results.rows)], [*unit, *remarks(results)])
    return True


def show(tables: Sequence[Table], lines: Sequence[str]) -> None:
    """Prints tables as Markdown, then a list. The reader may leave early, as `head` does."""
    text = [*(table.markdown() + "\n" for table in tables), *(f"- {line}" for line in lines)]
    try:
        print("\n".join(text), flush=True)
    except BrokenPipeError:  # What is left is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def summary(results: Results) -> list[Table]:
    """Returns the short tables, for the end of a run."""
    return [over_floor(results.rows), against_peers(results.rows)]


def full(results: Results) -> list[Table]:
    """Returns every table."""
    rows = results.rows
    return [*summary(results), cells(rows), losses(rows), losses_to_tritonmoe(rows)]


def _by_tokens(rows: Sequence[Row]) -> tuple[list[str], list[list[Row]]]:
    tokens = sorted({row["T"] for row in rows})
    groups = [[row for row in rows if row["T"] == t] for t in tokens]
    return [*map(str, tokens), "all"], [*groups, list(rows)]


def _best_speedup(row: Row) -> float | None:
    best = best_rival(row)
    return speedup(row, best[0]) if best else None


def _mean(values: Iterable[float | None]) -> str:
    mean = geomean(value for value in values if value is not None)
    return "-" if math.isnan(mean) else f"{mean:.2f}"


def _cell(row: Row) -> str:
    parts = [f"{row['floor_us']:.0f}"]
    if best := best_rival(row):
        parts.append(f"{SHORT.get(best[0], best[0])} {best[1] / row['floor_us']:.2f}")
    if us := row["peers"].get(OURS, {}).get("us"):
        parts.append(f"{us / row['floor_us']:.2f}")
    return " · ".join(parts)


def _name(row: Row) -> list[str]:
    return [row["shape"], f"T={row['T']}", row["routing"]]


def _losses(
    title: str, found: list[tuple[float, list[str]]], speed: str = "speed, by rounds"
) -> Table:
    header = ["shape", "T", "routing", f"{OURS} us", "peer", "us", speed]
    return Table(title, header, [[*line, f"{ratio:.2f}"] for ratio, line in sorted(found)])


def _items(meta: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    return sorted(meta.get(key, {}).items())


def _percents(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in values.items())
