"""Seconds until a layer is compiled from a cold cache, and that nothing compiles after that.

``python -m bench.warmup_cost`` measures: each layer is warmed up in a process of its own with an
empty kernel cache, then called from 1 to 8,192 tokens with two routings. ``python -m
bench.warmup_cost report FILE`` prints the seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton import knobs

import tilewise
from bench import machine, protocol
from bench.measure import PROVENANCE, prepare
from bench.peers import base
from bench.protocol import SHAPES
from bench.report import Table, reported
from bench.results import CELL, Results, Row
from tilewise.models import MoEShape

MAX_TOKENS = 8192
CALLS = (1, 2, 3, 5, 8, 17, 32, 60, 128, 300, 512, 1500, 2048, 5000, 8192)
OUT = Path(__file__).parent / "results" / "h200_warmup.json"
KEYS = (*CELL, "variants", "seconds", "compiled_by_calls")


def compiled() -> int:
    """Kernels in the process's cache folder."""
    folder = Path(knobs.cache.dir)
    return sum(1 for _ in folder.rglob("*.cubin"))


def measure_one(name: str, out: Path) -> None:
    """Warms one layer up in this process, calls it, and writes one row."""
    s = SHAPES[name]
    torch.zeros(1, device="cuda")  # The context is not the library's.
    began = time.perf_counter()
    variants = tilewise.warmup(MoEShape(*s), max_tokens=MAX_TOKENS)
    seconds = time.perf_counter() - began
    before = compiled()
    peers, _ = base.load(["tilewise"])
    layers, errors = prepare(peers, *protocol.make_weights(s))
    assert not errors, errors
    for tokens in CALLS:
        for routing in ("uniform", "hot"):
            sets, _ = protocol.build_sets(routing, tokens, s)
            layers["tilewise"](*sets[0])
    torch.cuda.synchronize()
    row: dict[str, Any] = {
        "shape": name, "T": MAX_TOKENS, "routing": "uniform, hot", "variants": len(variants),
        "seconds": round(seconds, 2), "compiled_by_calls": compiled() - before, "peers": {},
    }  # fmt: skip
    described = machine.describe()
    results = Results(out)
    results.put(row | {key: described[key] for key in PROVENANCE})
    results.save()


def run_one(shape: str, folder: Path) -> Path:
    """Measures one layer in a fresh process with an empty cache."""
    out = folder / f"{shape}.json"
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / shape)}
    command = [sys.executable, "-m", "bench.warmup_cost", "--one", shape, "--out", str(out)]
    subprocess.run(command, env=environment, check=True)
    return out


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes the results file; or prints one."""
    if reported("warmup_cost", arguments, OUT, table, KEYS):
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench.warmup_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--jobs", type=int, default=1, help="layers at a time")
    parser.add_argument("--one", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    machine.require_gpu()
    if options.one:
        measure_one(options.one, options.out)
        return
    results = Results(options.out)
    results.rows = []
    results.meta = machine.describe() | {
        "unit": "seconds of one process and one thread, kernel cache empty",
        "at_a_time": options.jobs,
        "calls_after": list(CALLS),
    }
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for out in pool.map(partial(run_one, folder=Path(folder)), options.shapes):
            (row,) = Results(out).rows
            results.put(row)
            print(
                f"{row['shape']}: {row['variants']} variants in {row['seconds']} s, "
                f"{row['compiled_by_calls']} compiled by calls after that",
                flush=True,
            )
    results.save()


def table(rows: Sequence[Row]) -> Table:
    """Kernels and seconds by layer."""
    body = []
    for row in rows:
        counts = [str(row["T"]), str(row["variants"]), f"{row['seconds']:.1f}"]
        body.append([row["shape"], *counts, str(row["compiled_by_calls"])])
    header = ["layer", "tokens up to", "variants", "seconds", "compiled by calls after that"]
    return Table("A warm-up from an empty kernel cache", header, body)


if __name__ == "__main__":
    main(sys.argv[1:])
