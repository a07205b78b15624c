"""``python -m bench --quick``: a few cells within a minute, from the start of the program."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import bench
from bench import measure
from bench.protocol import ROUTINGS, SHAPES, TOKENS
from bench.results import Results

SECONDS = 58.0  # two more to print in
OUT = Path(tempfile.gettempdir()) / "tilewise-quick.json"
DEFAULTS: dict[str, Any] = {
    "shapes": ["qwen3-30b-a3b", "olmoe-1b-7b"],
    "tokens": [1, 32, 512, 8192],
    "routings": ["uniform"],
    "peers": ["tilewise", "vllm", "torch_gmm"],
    "target_ms": 4.0,
    "out": OUT,
}


@contextmanager
def limited(quick: bool) -> Iterator[None]:
    """Ends the block without a word when the minute is over; no limit where this is not quick."""
    if not quick:
        yield
        return
    from tilewise.cli.limit import OutOfTime, time_limit

    with suppress(OutOfTime), time_limit(SECONDS - (time.monotonic() - bench.STARTED)):
        OUT.unlink(missing_ok=True)  # of an earlier quick run, perhaps of other code
        yield


def remark(options: measure.Options, results: Results) -> str:
    """Says what was left out: by the limit, and by being quick at all."""
    cells = measure.pending(options, results, {})
    left = ", ".join(f"{shape} T={tokens} {routing}" for shape, tokens, routing in cells)
    lost = f"no time was left for {len(cells)} cells: {left}" if cells else "all its cells are done"
    whole = math.prod(map(len, (SHAPES, TOKENS, ROUTINGS)))
    return (
        f"--quick: {len(results.rows)} cells in {time.monotonic() - bench.STARTED:.0f} s, {lost}. "
        f"The whole run has {whole} cells and more peers; these are in {results.path}"
    )
