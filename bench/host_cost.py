"""CPU time of one eager call after warm-up, where the GPU never holds the host back.

``python -m bench.host_cost`` measures; ``python -m bench.host_cost report FILE`` prints the times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine, protocol
from bench.measure import PROVENANCE, prepare
from bench.peers import base
from bench.report import Table, reported
from bench.results import CELL, Results, Row

SHAPE = "qwen3-30b-a3b"
TOKENS = (1, 2, 4, 8)
PEERS = ("tilewise", "vllm")
CALLS, BATCHES = 50, 20  # 50 calls queue fewer launches than the driver takes before it blocks
OUT = Path(__file__).parent / "results" / "h200_host_cost.json"


def host_us(call: Callable[[], object], calls: int = CALLS) -> float:
    """Returns the mean microseconds until a call returns, over one batch from an empty queue."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes the results file; or prints one."""
    if reported("host_cost", arguments, OUT, table, CELL, "host_us"):
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    options = parser.parse_args(arguments)
    machine.require_gpu()
    peers, missing = base.load(options.peers)
    results = Results(options.out)
    results.rows = []
    results.meta = machine.describe() | {
        "unit": f"microseconds of host time per eager call, median of {BATCHES} batches of {CALLS}",
        "peers": {name: peer.version for name, peer in peers.items()},
        "missing": missing,
    }
    shape = protocol.SHAPES[SHAPE]
    layers, errors = prepare(peers, *protocol.make_weights(shape))
    for num_tokens in TOKENS:
        (inputs, *_), _ = protocol.build_sets("uniform", num_tokens, shape)
        calls = {name: partial(layer, *inputs) for name, layer in layers.items()}
        for call in calls.values():
            host_us(call)
        batches = [{n: host_us(call) for n, call in calls.items()} for _ in range(BATCHES)]
        entries: dict[str, dict[str, Any]] = {n: {"error": e} for n, e in errors.items()}
        entries |= {n: {"host_us": statistics.median(b[n] for b in batches)} for n in calls}
        row = {"shape": SHAPE, "T": num_tokens, "routing": "uniform", "peers": entries}
        results.put(row | {key: results.meta[key] for key in PROVENANCE})
        results.save()
        print(num_tokens, entries, flush=True)
    for name, reason in missing.items():
        print(f"missing peer {name}: {reason}")


def table(rows: Sequence[Row]) -> Table:
    """Microseconds of each peer by cell."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    body = []
    for row in rows:
        entries = [row["peers"].get(name, {}) for name in names]
        times = [f"{entry['host_us']:.1f}" if "host_us" in entry else "-" for entry in entries]
        body.append([row["shape"], str(row["T"]), row["routing"], *times])
    return Table("CPU time of an eager call", ["shape", "T", "routing", *names], body)


if __name__ == "__main__":
    main(sys.argv[1:])
