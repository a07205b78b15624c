"""Performance regions against measured times: what was predicted to help, and what did.

``python -m bench.regions FILE --out FILE2``: for each optimisation and row of ``bench.regret``, the
fastest configuration with it over the fastest without. More than 2% either way contradicts the
opposite prediction; between them either is right. Nothing is fitted: "unseen" models are those that
were not looked at while the bounds were written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.regret import OUT, SHAPES, mean_us
from bench.regret_score import gemm_of
from bench.results import TIMED, load
from tilewise.dispatch.config import KernelConfig
from tilewise.dispatch.histogram import Histogram
from tilewise.dispatch.regions import regions
from tilewise.target import Target

UNSEEN = ("qwen2-moe-57b", "glm-4.5-air", "kimi-k2-ep8")
MATTERS = 0.02
HAS: dict[str, Callable[[KernelConfig], bool]] = {
    "swizzle": lambda c: c.group_m > 1,
    "split_k": lambda c: c.split_k > 1,
    "tall": lambda c: c.block_m == 128,
    "swap": lambda c: c.swap_operands,
    "persistent": lambda c: c.persistent,
    "tail": lambda c: c.tail_m > 0 and c.block_m == 128,
}
# Without it: the same kind of tiles, so that the comparison is of the optimisation alone.
AMONG: dict[str, Callable[[KernelConfig], bool]] = {
    "swizzle": lambda c: c.block_m == 128 and c.num_stages == 4 and c.tail_m == 0,
    "split_k": lambda c: c.block_m <= 64 and not c.persistent and c.tail_m == 0,
    "tall": lambda c: c.block_m >= 64,
    "swap": lambda c: c.block_m <= 64 and c.tail_m == 0 and c.split_k == 1,
    "persistent": lambda c: c.block_m == 128 and c.tail_m == 0,
    "tail": lambda c: c.block_m == 128,
}


def verdicts(rows: list[dict[str, Any]], target: Target) -> list[dict[str, Any]]:
    """One verdict for each row and optimisation that has configurations of both kinds."""
    out = []
    for row in rows:
        times = {KernelConfig.from_name(n): mean_us(row, n) for n in row["times_us"]}
        found = regions(gemm_of(row), target, Histogram.of(row["sizes"][0]))
        for name, has in HAS.items():
            group = {c: t for c, t in times.items() if AMONG[name](c)}
            with_it = [t for c, t in group.items() if has(c)]
            without = [t for c, t in group.items() if not has(c)]
            if not with_it or not without:
                continue
            gain = min(without) / min(with_it) - 1
            hit = gain >= -MATTERS if found[name].helps else gain <= MATTERS
            out.append(
                {key: row[key] for key in ("shape", "stage", "T", "routing")}
                | {"optimisation": name, "predicted": found[name].helps, "hit": hit}
                | {"ratio": round(found[name].ratio, 3), "gain": round(gain, 4)}
            )
    return out


def table(found: list[dict[str, Any]], key: str) -> dict[str, str]:
    """ "hits of all" by a key of the verdicts."""
    return {
        value: f"{sum(v['hit'] for v in found if v[key] == value)} of "
        f"{sum(v[key] == value for v in found)}"
        for value in dict.fromkeys(v[key] for v in found)
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.regions")
    parser.add_argument("file", type=Path, nargs="?", default=OUT)
    parser.add_argument("--out", type=Path, help="where to write hits and misses")
    options = parser.parse_args()
    data = load(parser, options.file, (*TIMED, "stage"))
    found = verdicts(data["rows"], Target.from_arch("sm_90"))
    result = {
        "meta": data["meta"],
        "unseen": UNSEEN,
        "by_model": table(found, "shape"),
        "by_optimisation": table(found, "optimisation"),
        "misses": [verdict for verdict in found if not verdict["hit"]],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("by_model", "by_optimisation"):
        for value, text in result[name].items():
            print(f"{value}: {text}{' (unseen)' if value in UNSEEN else ''}")
    assert set(result["by_model"]) <= set(SHAPES)


if __name__ == "__main__":
    main()
