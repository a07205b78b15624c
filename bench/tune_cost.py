"""What `tilewise tune` takes, and what it is worth for layers that no shipped cost was fitted to.

``python -m bench.tune_cost`` measures: each layer is profiled by the command itself, in a process
of its own with an empty kernel cache; the seconds are those of the whole command. ``python -m
bench.tune_cost report FILE`` prints them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import machine
from bench.measure import PROVENANCE
from bench.protocol import SHAPES
from bench.regret import SHAPES as FITTED
from bench.report import Table, reported
from bench.results import CELL, Results, Row
from bench.unseen import UNSEEN_SHAPES
from tilewise.tune import store
from tilewise.tune.gain import choices

OUT = Path(__file__).parent / "results" / "h200_tune.json"
KEYS = (*CELL, "seconds", "cases", "judged", "shipped", "profiled", "shipped_over_profiled")
KNOWN = "qwen3-30b-a3b"  # Beside the others: a layer that shipped costs were fitted to.
LAYERS = {**SHAPES, **UNSEEN_SHAPES}


def profiled(sizes: str, limit: float, folder: Path) -> tuple[store.Profile, float]:
    """Runs the command for one layer; the profile, and the seconds it took."""
    path = folder / "profile.json"
    command = [sys.executable, "-m", "tilewise", "tune", sizes, "--out", str(path)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    began = time.perf_counter()
    run = subprocess.run(
        [*command, "--time-limit", str(limit)], env=environment, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"tune {sizes} ended with {run.returncode}: {run.stderr[-500:]}")
    return store.load(path), time.perf_counter() - began


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes the results file; or prints one."""
    if reported("tune_cost", arguments, OUT, table, KEYS):
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune_cost", description=__doc__.splitlines()[0]
    )
    usual = [KNOWN, *(name for name in LAYERS if name not in FITTED)]
    parser.add_argument("--shapes", nargs="+", choices=list(LAYERS), default=usual)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--time-limit", type=float, default=150.0, metavar="S", help="of a layer")
    options = parser.parse_args(arguments)
    machine.require_gpu()
    results = Results(options.out)
    results.rows = []
    results.meta = machine.describe() | {
        "unit": "time over the fastest of a case, chosen by one half of the samples, "
        "judged by the other; geometric means",
        "time_limit_s": options.time_limit,
    }
    for name in options.shapes:
        sizes = ",".join(map(str, LAYERS[name]))
        with tempfile.TemporaryDirectory() as folder:
            profile, seconds = profiled(sizes, options.time_limit, Path(folder))
        shipped, own = zip(*choices(profile), strict=True)
        ratio = statistics.geometric_mean(a / b for a, b in zip(shipped, own, strict=True))
        row = {
            "shape": name, "T": 8192, "routing": "all of tune's", "seconds": round(seconds, 1),
            "cases": len(profile.rows), "judged": len(own),
            "shipped": round(statistics.geometric_mean(shipped), 4),
            "profiled": round(statistics.geometric_mean(own), 4),
            "shipped_over_profiled": round(ratio, 4), "peers": {},
        }  # fmt: skip
        results.put(row | {key: results.meta[key] for key in PROVENANCE})
        results.save()
        print(
            f"{name}: {seconds:.0f} s, {len(profile.rows)} cases; shipped {row['shipped']}, "
            f"profiled {row['profiled']}, ratio {row['shipped_over_profiled']}",
            flush=True,
        )


def table(rows: Sequence[Row]) -> Table:
    """Seconds by layer, and how far choices are from the fastest."""
    body = []
    for row in rows:
        fitted = " (fitted)" if row["shape"] in FITTED else ""
        counts = [f"{row['seconds']:.0f}", str(row["cases"]), str(row["judged"])]
        ratios = [f"{row[key]:.4f}" for key in ("shipped", "profiled", "shipped_over_profiled")]
        body.append([row["shape"] + fitted, *counts, *ratios])
    header = ["layer", "seconds", "cases", "judged", "shipped costs", "own profile", "ratio"]
    return Table("What `tilewise tune` takes, and choices over the fastest", header, body)


if __name__ == "__main__":
    main(sys.argv[1:])
