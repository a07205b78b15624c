"""``python -m bench`` measures; ``python -m bench report FILE`` prints the tables of a file.

``python -m bench --quick`` measures a few cells within a minute.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import machine, measure, quick, report, warm
from bench.peers import base
from bench.protocol import ROUTINGS, SHAPES, TOKENS
from bench.results import Results, read_named

OUT = Path(__file__).parent / "results" / "h200_bf16_moe.json"


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    if arguments[:1] == ["report"]:
        print_report(arguments[1:])
    else:
        run(arguments)


def run(arguments: Sequence[str]) -> None:
    """Measures what is pending, resuming the file where it stopped, and prints a summary."""
    start = time.monotonic()
    parser = _parser()
    if "--quick" in arguments:
        parser.set_defaults(**quick.DEFAULTS)
    namespace = parser.parse_args(arguments)
    if namespace.quick and namespace.warm_jobs:
        parser.error("--quick waits for no other processes: leave --warm-jobs out")
    machine.require_gpu()
    if namespace.peers_dir:
        os.environ["TILEWISE_PEERS"] = str(namespace.peers_dir)
    options = measure.Options(
        shapes=tuple(namespace.shapes),
        tokens=tuple(namespace.tokens),
        routings=tuple(namespace.routings),
        peers=tuple(namespace.peers),
        rounds=namespace.rounds,
        target_ms=namespace.target_ms,
        max_replays=namespace.max_replays,
    )
    if namespace.warm_only:
        warm.warm(options)
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    with quick.limited(namespace.quick):
        if namespace.warm_jobs:
            warm.in_parallel(options, namespace.warm_jobs)
        peers, missing = base.load(options.peers)
        for name, reason in missing.items():
            console.print(f"[yellow]missing peer {name}: {reason}", highlight=False)
        results = Results(namespace.out)
        measure.describe_run(options, results, peers, missing)
        left = namespace.time_limit - (time.monotonic() - start)
        _measure(replace(options, time_limit=left), results, peers, console)
    results = Results(namespace.out)  # as saved, wherever a quick run was stopped
    for table in report.summary(results):
        console.print(table.rich())
    for line in report.remarks(results):
        console.print(line, highlight=False, markup=False)
    if namespace.quick:
        console.print(quick.remark(options, results), highlight=False, markup=False)


def print_report(arguments: Sequence[str]) -> None:
    """Prints every table of a results file as Markdown."""
    results = read_named("python -m bench report", arguments, OUT, ROUTINGS)
    report.show(report.full(results), report.remarks(results))


def _measure(
    options: measure.Options,
    results: Results,
    peers: dict[str, base.Peer],
    console: Console,
) -> None:
    total = len(measure.pending(options, results, peers))
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[cell]}"), console=console) as progress:
        task = progress.add_task("cells", total=total, cell="")
        shape, start = "", time.monotonic()
        for row in measure.measure(options, results, peers):
            progress.update(task, advance=1, cell=f"{row['shape']} T={row['T']} {row['routing']}")
            if row["shape"] != shape and shape:
                console.print(f"{shape}: {time.monotonic() - start:.0f} s")
                start = time.monotonic()
            shape = row["shape"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument(
        "--peers", nargs="+", default=list(base.DEFAULT), help="X_again times X twice"
    )
    parser.add_argument("--peers-dir", type=Path, help="unpacked peers; default $TILEWISE_PEERS")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=measure.Options.rounds)
    parser.add_argument("--target-ms", type=float, default=measure.Options.target_ms)
    parser.add_argument("--max-replays", type=int, default=measure.Options.max_replays)
    parser.add_argument("--time-limit", type=float, default=measure.Options.time_limit, metavar="S")
    parser.add_argument("--quick", action="store_true", help="a few cells within 60 s, all told")
    parser.add_argument("--warm-jobs", type=int, default=0, help="compile in this many processes")
    parser.add_argument("--warm-only", action="store_true", help="compile, measure nothing")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
