"""Shapes and token counts outside the listed ones, measured by the benchmark's own protocol.

``python -m bench.unseen`` measures the listed shapes between the listed token counts, and other
shapes at the listed token counts; ``python -m bench.unseen report FILE`` compares both with a file
of the listed cells. ``--beside`` measures the listed shapes at listed token counts too, so that
what lies between is compared with neighbours of the same run: where power bounds the clock, a
machine that has worked for minutes is slower than a cool one. Shipped costs are fitted to cases of
two of these shapes (glm-4.5-air and kimi-k2-ep8), and to listed shapes at some of these token
counts (24, 96): docs/performance.md says what holds without them.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import machine, measure, report, warm
from bench.peers import base
from bench.protocol import ROUTINGS, SHAPES, TOKENS, Shape
from bench.report import OURS, Table, best_rival, geomean, speedup
from bench.results import Cell, Results, Row, cell_of, read

UNSEEN_SHAPES = {
    "phi-3.5-moe": Shape(16, 2, 4096, 6400),
    "glm-4.5-air": Shape(128, 8, 4096, 1408),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
    "qwen3-coder-480b-tp8": Shape(160, 8, 6144, 320),
    "llama-4-scout-tp8": Shape(16, 1, 5120, 1024),
    "kimi-k2-ep8": Shape(48, 8, 7168, 2048),
}
UNSEEN_TOKENS = (3, 24, 96, 300, 1500, 5000)
PEERS = ("tilewise", "vllm", "triton_kernels")
TARGET_MS = 6.0  # half of the main benchmark's: these are 270 cells
BAR = 1.05  # most that a token count between two listed ones may lose to their interpolation
WORST = 12
RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "h200_bf16_unseen.json"
TUNED = RESULTS / "h200_bf16_moe.json"


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    if arguments[:1] == ["report"]:
        print_report(arguments[1:])
        return
    parser = make_parser(
        *("python -m bench.unseen", OUT, [*SHAPES, *UNSEEN_SHAPES], [*TOKENS, *UNSEEN_TOKENS]),
        *(ROUTINGS, PEERS, TARGET_MS),
    )
    beside = "listed shapes at the listed ones of these token counts too"
    parser.add_argument("--beside", action="store_true", help=beside)
    chosen = parser.parse_args(arguments)
    parts = split(make_options(chosen), chosen.beside)
    if not parts:
        parser.error("listed shapes need token counts outside the list, other shapes listed ones")
    machine.require_gpu()
    with known(UNSEEN_SHAPES):
        if chosen.warm_only:
            warm_all(parts)
            return
        flags = ["--beside"] if chosen.beside else []
        for row in run(parts, chosen, "bench.unseen", flags):
            print(described(row), flush=True)
    for table in report.summary(Results(chosen.out)):
        print(table.markdown(), end="\n\n")


def print_report(arguments: Sequence[str]) -> None:
    """Prints every table of a results file beside the listed cells, as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.unseen report")
    parser.add_argument("file", type=Path, nargs="?", default=OUT)
    parser.add_argument("--tuned", type=Path, default=TUNED, help="a file of the listed cells")
    chosen = parser.parse_args(arguments)
    results, tuned = read(parser, chosen.file, ROUTINGS), read(parser, chosen.tuned, ROUTINGS)
    tables = full(results.rows, tuned.rows)
    report.show(tables, [*report.remarks(results), *differences(results.rows, tuned.rows)])


# Measuring. `bench.skew` runs its cells by the same functions.


def make_parser(
    prog: str,
    out: Path,
    shapes: Iterable[str],
    tokens: Iterable[int],
    routings: Iterable[str],
    peers: Iterable[str],
    target_ms: float,
) -> argparse.ArgumentParser:
    """Returns the options of a program that measures cells of its own."""
    shapes, routings = list(shapes), list(routings)
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(tokens))
    parser.add_argument("--routings", nargs="+", choices=routings, default=routings)
    parser.add_argument("--peers", nargs="+", default=list(peers))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--target-ms", type=float, default=target_ms)
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S")
    parser.add_argument("--warm-jobs", type=int, default=0, help="compile in this many processes")
    parser.add_argument("--warm-only", action="store_true", help="compile, measure nothing")
    return parser


def make_options(chosen: argparse.Namespace) -> measure.Options:
    """Returns what the command line asks for; three rounds, as everywhere."""
    return measure.Options(
        shapes=tuple(chosen.shapes),
        tokens=tuple(chosen.tokens),
        routings=tuple(chosen.routings),
        peers=tuple(chosen.peers),
        target_ms=chosen.target_ms,
    )


def split(options: measure.Options, beside: bool = False) -> list[measure.Options]:
    """Returns the listed shapes at other token counts, and the other shapes at the listed ones.

    Args:
        options: What is asked for.
        beside: The listed shapes at the listed ones of these token counts too.
    """
    listed = replace(
        options,
        shapes=tuple(name for name in options.shapes if name not in UNSEEN_SHAPES),
        tokens=tuple(t for t in options.tokens if beside or t not in TOKENS),
    )
    unseen = replace(
        options,
        shapes=tuple(name for name in options.shapes if name in UNSEEN_SHAPES),
        tokens=tuple(t for t in options.tokens if t in TOKENS),
    )
    return [part for part in (listed, unseen) if part.shapes and part.tokens]


@contextmanager
def known(shapes: Mapping[str, Shape]) -> Iterator[None]:
    """Lets the benchmark find these shapes by name, here only: its own list stays what it is."""
    SHAPES.update(shapes)
    try:
        yield
    finally:
        for name in shapes:
            del SHAPES[name]


def run(
    parts: Sequence[measure.Options],
    chosen: argparse.Namespace,
    module: str,
    flags: Sequence[str] = (),
) -> Iterator[Row]:
    """Measures what is pending of all parts in one file, and yields each row once it is saved.

    Args:
        parts: What to measure, in this order, until the time limit.
        chosen: The command line; see `make_parser`.
        module: The program, which compiles one shape in a process of its own with `--warm-only`.
        flags: Of the command line, which say what the parts are.
    """
    deadline = time.monotonic() + chosen.time_limit
    results = Results(chosen.out)
    peers, missing = base.load(parts[0].peers)
    for name, reason in missing.items():
        print(f"missing peer {name}: {reason}")
    if chosen.warm_jobs:
        warm_pending(parts, results, peers, module, chosen.warm_jobs, flags)
    measure.describe_run(parts[0], results, peers, missing)
    for part in parts:
        left = deadline - time.monotonic()
        yield from measure.measure(replace(part, time_limit=left), results, peers)
    if left := sum(len(measure.pending(part, results, peers)) for part in parts):
        print(f"{left} cells are left: the same command resumes the file")


def warm_all(parts: Sequence[measure.Options]) -> None:
    """Compiles every cell in this process."""
    for part in parts:
        warm.warm(part)


def warm_pending(
    parts: Sequence[measure.Options],
    results: Results,
    peers: Iterable[str],
    module: str,
    jobs: int,
    flags: Sequence[str] = (),
) -> None:
    """Compiles each shape that has cells left in a process of its own, ``jobs`` at a time."""
    names = [name for name in peers if base.original(name) == name]
    commands = []
    for part in parts:
        left = {shape for shape, _, _ in measure.pending(part, results, peers)}
        for shape in (name for name in part.shapes if name in left):
            lists = {"--tokens": part.tokens, "--routings": part.routings, "--peers": names}
            command = [sys.executable, "-m", module, "--warm-only", "--shapes", shape, *flags]
            for option, values in lists.items():
                command += [option, *map(str, values)]
            commands.append(command)
    quiet = partial(subprocess.run, capture_output=True, text=True)
    with ThreadPoolExecutor(jobs) as pool:
        for command, done in zip(commands, pool.map(quiet, commands), strict=True):
            if done.returncode:
                print(f"warming {command[5]} failed: {done.stderr[-500:]}")


def described(row: Row) -> str:
    """Returns a cell as one line: each peer's time, and ours over the floor."""
    times = [f"{n} {e['us']:.1f}" if "us" in e else f"{n} -" for n, e in row["peers"].items()]
    ours = row["peers"].get(OURS, {}).get("us", math.nan) / row["floor_us"]
    name = f"{row['shape']} T={row['T']} {row['routing']}"
    return f"{name}: {ours:.2f} over the floor; us: {', '.join(times)}"


# The report.


def full(rows: Sequence[Row], tuned: Sequence[Row]) -> list[Table]:
    """Returns every table."""
    listed = [row for row in rows if row["shape"] not in UNSEEN_SHAPES]
    between = [row for row in listed if row["T"] not in TOKENS]
    beside = [row for row in listed if row["T"] in TOKENS]
    others = [row for row in rows if row["shape"] in UNSEEN_SHAPES]
    tables = []
    if between:
        tables.append(token_table(between, tuned))
        if beside:
            same_run = token_table(between, beside)
            tables.append(replace(same_run, title=f"{same_run.title}; neighbours of the same run"))
        tables.append(worst_table(between, tuned))
        tables += _titled("Listed shapes, token counts outside the list", between)
    if others:
        tables += [shape_table(others, tuned), each_shape_table(others, tuned)]
        tables += _titled("Shapes outside the list", others)
    return tables


def neighbours(tokens: int) -> tuple[int, int] | None:
    """Returns the listed token counts around one; None where it does not lie between two."""
    if tokens in TOKENS or not TOKENS[0] < tokens < TOKENS[-1]:
        return None
    return max(t for t in TOKENS if t < tokens), min(t for t in TOKENS if t > tokens)


def interpolate(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """Returns the geometric mean of two values weighted by where log2(tokens) lies between theirs.

    Args:
        tokens: A token count.
        low: A smaller token count and its value.
        high: A larger token count and its value.
    """
    weight = math.log2(tokens / low[0]) / math.log2(high[0] / low[0])
    return low[1] ** (1 - weight) * high[1] ** weight


def over_floor(rows: Iterable[Row]) -> dict[Cell, float]:
    """Returns our time over the floor, of every cell that has one."""
    return {
        cell_of(row): row["peers"][OURS]["us"] / row["floor_us"]
        for row in rows
        if "us" in row["peers"].get(OURS, {})
    }


def expected(rows: Sequence[Row], tuned: Sequence[Row]) -> dict[Cell, tuple[float, float, float]]:
    """Returns time over the floor of each unseen cell, and of its listed neighbours.

    A cell is left out where any of the three, same shape and routing, was not timed.
    """
    known_cells = over_floor(tuned)
    out = {}
    for (shape, tokens, routing), ratio in over_floor(rows).items():
        around = neighbours(tokens)
        if around is None:
            continue
        low, high = (known_cells.get((shape, t, routing)) for t in around)
        if low is not None and high is not None:
            out[shape, tokens, routing] = (ratio, low, high)
    return out


def token_table(rows: Sequence[Row], tuned: Sequence[Row]) -> Table:
    """Per unseen token count, time over the floor beside that of the listed counts around it."""
    cells = expected(rows, tuned)
    body = []
    for tokens in sorted({cell[1] for cell in cells}):
        of_tokens = [values for cell, values in cells.items() if cell[1] == tokens]
        measured, low, high = (geomean(values) for values in zip(*of_tokens, strict=True))
        below, above = neighbours(tokens) or (0, 0)
        wanted = interpolate(tokens, (below, low), (above, high))
        ratio = measured / wanted
        ends = [f"{below}: {low:.3f}", f"{above}: {high:.3f}"]
        verdict = "yes" if ratio <= BAR else "no"
        numbers = [f"{measured:.3f}", *ends, f"{wanted:.3f}", f"{ratio:.3f}", verdict]
        body.append([str(tokens), str(len(of_tokens)), *numbers])
    header = ["tokens", "cells", "time over floor", "listed below", "listed above"]
    header += ["interpolated", "ratio", f"at most {BAR}"]
    return Table(f"Token counts outside the list: {OURS}, geometric means", header, body)


def worst_table(rows: Sequence[Row], tuned: Sequence[Row], count: int = WORST) -> Table:
    """The cells furthest above the interpolation of the same shape and routing."""
    found = []
    for (shape, tokens, routing), (measured, low, high) in expected(rows, tuned).items():
        below, above = neighbours(tokens) or (0, 0)
        wanted = interpolate(tokens, (below, low), (above, high))
        if measured / wanted > BAR:
            name = [shape, f"T={tokens}", routing]
            numbers = [f"{v:.3f}" for v in (measured, wanted, measured / wanted)]
            found.append((measured / wanted, [*name, *numbers]))
    found.sort(reverse=True)
    title = f"Cells more than {BAR} times their own interpolation: {len(found)}"
    if len(found) > count:
        title += f", the worst {count}"
    header = ["shape", "T", "routing", "time over floor", "interpolated", "ratio"]
    return Table(title, header, [line for _, line in found[:count]])


def shape_table(rows: Sequence[Row], tuned: Sequence[Row]) -> Table:
    """Per listed token count, shapes outside the list beside the listed ones.

    The distance from the floor depends on a shape's size, so the speed against the best of the
    peers that both files hold is the fairer comparison.
    """
    rivals = [name for name in report.rivals_of(rows) if name in report.rivals_of(tuned)]
    routings = {row["routing"] for row in rows}
    counts = sorted({row["T"] for row in rows} & {row["T"] for row in tuned})
    groups = [
        ([row for row in rows if row["T"] in of], [row for row in tuned if row["T"] in of])
        for of in [*({t} for t in counts), set(counts)]
    ]
    body = []
    for label, (unseen, listed) in zip([*map(str, counts), "all"], groups, strict=True):
        listed = [row for row in listed if row["routing"] in routings]
        floors = [geomean(over_floor(group).values()) for group in (unseen, listed)]
        speeds = [geomean(best_speeds(group, rivals)) for group in (unseen, listed)]
        sizes = f"{len(unseen)}, {len(listed)}"
        body.append([label, sizes, *_pair(floors), *_pair(speeds)])
    header = ["tokens", "cells", "over floor, unseen", "listed", "ratio"]
    header += ["speed over the best, unseen", "listed", "ratio"]
    best = ", ".join(rivals) or "none"
    title = f"Shapes outside the list: {OURS}, geometric means; best of the peers in both: {best}"
    return Table(title, header, body)


def each_shape_table(rows: Sequence[Row], tuned: Sequence[Row]) -> Table:
    """Time over the floor of each shape outside the list beside all listed ones."""
    body = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        cells = {(row["T"], row["routing"]) for row in mine}
        listed = [row for row in tuned if (row["T"], row["routing"]) in cells]
        commits = ", ".join(sorted({str(row.get("commit")) for row in mine}))
        floors = [geomean(over_floor(group).values()) for group in (mine, listed)]
        body.append([shape, str(len(mine)), *_pair(floors), commits])
    header = ["shape", "cells", "over floor", "listed shapes", "ratio", "commit"]
    return Table("Shapes outside the list, each", header, body)


def best_speeds(rows: Iterable[Row], rivals: Iterable[str]) -> list[float]:
    """Returns the time of the fastest of these rivals over ours, of every cell that has both."""
    keep = {OURS, *rivals}
    out = []
    for row in rows:
        row = row | {"peers": {n: entry for n, entry in row["peers"].items() if n in keep}}
        best = best_rival(row)
        ratio = speedup(row, best[0]) if best else None
        if ratio is not None:
            out.append(ratio)
    return out


def differences(rows: Sequence[Row], tuned: Sequence[Row]) -> list[str]:
    """Returns in what, besides the cells, the two files differ."""
    out = []
    for key in measure.PROVENANCE:
        here, there = ({str(row.get(key)) for row in each} for each in (rows, tuned))
        if here != there:
            listed, unseen = (", ".join(sorted(values)) for values in (there, here))
            out.append(f"{key}: {unseen} here, {listed} in the listed cells")
    return out


def _titled(title: str, rows: Sequence[Row]) -> list[Table]:
    tables = [report.against_peers(rows), report.losses(rows)]
    return [replace(table, title=f"{title}. {table.title}") for table in tables]


def _pair(values: Sequence[float]) -> list[str]:
    unseen, listed = values
    numbers = (unseen, listed, unseen / listed)
    return ["-" if math.isnan(number) else f"{number:.3f}" for number in numbers]


if __name__ == "__main__":
    main(sys.argv[1:])
