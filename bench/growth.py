"""Time and memory against tokens, experts and top-k, one at a time, from one model's layer.

``python -m bench.growth`` measures; ``python -m bench.growth --from FILE --charts FOLDER`` draws
``growth.png`` of a file.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import growth_chart, machine, measure, protocol
from bench.growth_axes import AXES, all_cells, along, fixed, name_of, shape_of
from bench.peers import base
from bench.protocol import SHAPES, Shape
from bench.report import Table
from bench.results import Results, Row, read
from bench.unseen import described, known, make_options, make_parser, run, warm_all

PEERS = ("tilewise", "vllm")
TARGET_MS = 6.0
OUT = Path(__file__).parent / "results" / "h200_growth.json"


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    start = time.monotonic()
    cells = all_cells()
    shapes = {name_of(experts, top_k): shape_of(experts, top_k) for _, experts, top_k in cells}
    tokens = sorted({count for count, _, _ in cells})
    prog = "python -m bench.growth"
    parser = make_parser(prog, OUT, shapes, tokens, ("uniform",), PEERS, TARGET_MS)
    parser.add_argument("--from", type=Path, dest="source", help="measure nothing: read this file")
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="write growth.png there")
    chosen = parser.parse_args(arguments)
    if chosen.source is None:
        parts = split(make_options(chosen))
        if not parts:
            parser.error("no such cell: one of tokens, experts and top-k varies at a time")
        machine.require_gpu()
        with known(shapes):
            if chosen.warm_only:
                warm_all(parts)
                return
            for row in run(parts, chosen, "bench.growth"):
                print(described(row), flush=True)
            add_memory(Results(chosen.out), parts[0].peers, parts[0].device)
        print(f"{time.monotonic() - start:.0f} s")
    results = read(parser, chosen.source or chosen.out)
    for axis in AXES:
        print(table(axis, results.rows).markdown(), end="\n\n")
    if chosen.charts:
        print(f"wrote {growth_chart.draw(results, chosen.charts)}")


def split(options: measure.Options) -> list[measure.Options]:
    """Returns the cells asked for, each by itself: so each is compiled in a process of its own."""
    return [
        measure.Options(
            shapes=(name_of(experts, top_k),),
            tokens=(tokens,),
            routings=options.routings,
            peers=options.peers,
            target_ms=options.target_ms,
        )
        for tokens, experts, top_k in all_cells()
        if name_of(experts, top_k) in options.shapes and tokens in options.tokens
    ]


# Memory.


def add_memory(results: Results, names: Sequence[str], device: str) -> None:
    """Measures the memory of each timed cell again by one eager call, and writes it to its row."""
    peers, _ = base.load(names)
    for row in results.rows:
        if "output_bytes" in row:
            continue
        shape = SHAPES[row["shape"]]
        timed = {name: peer for name, peer in peers.items() if "us" in row["peers"].get(name, {})}
        row["output_bytes"] = row["T"] * shape.hidden_size * 2
        row["workspace_bytes"] = workspace_bytes(row["T"], shape)
        for name, peak in memory(row, shape, timed, device).items():
            row["peers"][name]["peak_bytes"] = peak
        results.save()


def memory(row: Row, shape: Shape, peers: Mapping[str, base.Peer], device: str) -> dict[str, int]:
    """Returns what a call of each peer allocates at most, its output counted."""
    w13, w2 = protocol.make_weights(shape, device=device)
    layers, _ = measure.prepare(peers, w13, w2)
    (inputs, *_), _ = protocol.build_sets(row["routing"], row["T"], shape, device=device)
    peaks = {name: peak_bytes(partial(layer, *inputs)) for name, layer in layers.items()}
    del layers, w13, w2, inputs
    gc.collect()
    return peaks


def peak_bytes(call: Callable[[], Any]) -> int:
    """Returns the bytes that a call allocates at most, beyond what is there before it."""
    call()  # what is allocated once, for all calls, is no part of one
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = call()
    torch.cuda.synchronize()
    del output
    return torch.cuda.max_memory_allocated() - before


def workspace_bytes(tokens: int, shape: Shape) -> int:
    """Returns the library's own answer: the scratch memory that a host has to reserve."""
    import tilewise
    from tilewise.models import MoEShape

    return tilewise.workspace_size(MoEShape(*shape), tokens)


# The report.


def table(axis: str, rows: Sequence[Row]) -> Table:
    """Time and memory along an axis."""
    points = along(axis, rows)
    names = list(dict.fromkeys(name for _, row in points for name in row["peers"]))
    body = []
    for value, row in points:
        entries = [row["peers"].get(name, {}) for name in names]
        times = [f"{entry['us']:.1f}" if "us" in entry else "-" for entry in entries]
        peaks = [_mb(entry.get("peak_bytes")) for entry in entries]
        sizes = [_mb(row.get("workspace_bytes")), _mb(row.get("output_bytes"))]
        body.append([f"{value:,}", f"{row['floor_us']:.1f}", *times, *peaks, *sizes])
    header = [axis, "floor us", *(f"{name} us" for name in names)]
    header += [*(f"{name} MB" for name in names), "workspace_size MB", "of these, output MB"]
    return Table(f"Growth with {axis}: {fixed(axis)}", header, body)


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
