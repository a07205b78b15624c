"""Writes the README's speed section from the committed results: `python -m bench.readme`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import report
from bench.protocol import SHAPES, TOKENS
from bench.results import commits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
NAMES = {
    "tilewise": "**Tilewise**",
    "vllm": "vLLM 0.24, tuned file where it has one",
    "vllm_dflt": "vLLM 0.24, default",
    "triton_kernels": "triton_kernels 3.5.1",
    "torch_gmm": "torch grouped_mm",
    "sonic": "sonic-moe 0.1.2, default tile",
    "deep_gemm": "DeepGEMM 2.5, bf16",
}


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def ratio(row: dict[str, Any], peer: str) -> float | None:
    """Time over floor of one peer in one cell; None where it has no time."""
    us = row["peers"].get(peer, {}).get("us")
    return None if us is None else us / row["floor_us"]


def section(
    layer: dict[str, Any],
    host: dict[str, Any],
    invariant: dict[str, Any],
    engine: dict[str, Any],
    unseen: dict[str, Any],
) -> str:
    """Markdown between the markers."""
    rows = layer["rows"]
    tokens = sorted({row["T"] for row in rows})
    meta = layer["meta"]
    least = min(r for row in rows for peer in row["peers"] if (r := ratio(row, peer)) is not None)
    lines = [
        f"One {meta['hardware']}, bf16, {len(rows)} cells: eight layers x token counts x three "
        "routings. Time over the floor, the larger of",
        "compulsory bytes over copy bandwidth and FLOPs over the matrix rate; geometric means, "
        "smaller is better. Reads alone",
        f"can beat a copy's bandwidth, so single cells reach {least:.2f}.",
        "",
        "| tokens | " + " | ".join(str(t) for t in tokens) + " | all |",
        "|---" * (len(tokens) + 2) + "|",
    ]
    for peer, title in NAMES.items():
        cells = []
        for group in [*([t] for t in tokens), tokens]:
            found = [r for row in rows if row["T"] in group and (r := ratio(row, peer)) is not None]
            cells.append(f"{geomean(found):.2f}" if found else "")
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    ratios = [(r, row["T"]) for row in rows if (r := report._best_speedup(row)) is not None]
    slower = [(r, t) for r, t in ratios if r < 1]
    large = sum(1 for _, t in slower if t >= 2048)
    worst = 1 / min(r for r, _ in ratios) - 1
    costs = sorted(float(v["us"]) for v in _host_values(host, "tilewise"))
    vllm = sorted(float(v["us"]) for v in _host_values(host, "vllm"))
    lines += [
        "",
        "A whole vLLM 0.24 engine, random weights, CUDA graphs, ms a decode step with the "
        "plug-in and "
        "without:",
        f"{_engine_steps(engine)} (`python -m bench.vllm_engine`, "
        f"{' and '.join(sorted({document['meta']['commit'] for document in engine.values()}))}).",
        "",
        f"**Where we lose:** some peer is faster in {len(slower)} of {len(rows)} cells, "
        f"{large} of them at 2048 tokens and more, by up to {worst:.0%}.",
        "Every cell: `python -m bench report bench/results/h200_bf16_moe.json`. "
        f"{_outside(unseen)} (`python -m bench.unseen report`).",
        f"CPU time of a call alike to an earlier one: {costs[0]:.0f} to {costs[-1]:.0f} µs, "
        f"vLLM's {vllm[0]:.0f} to "
        f"{vllm[-1]:.0f} µs (`python -m bench.host_cost`). `batch_invariant=True` costs "
        f"{invariant['meta']['batch_invariant_over_default']['all'] - 1:.0%} over all cells, "
        f"{invariant['meta']['batch_invariant_over_default']['1'] - 1:.0%} at one token "
        "(`python -m bench.batch_invariant`).",
        f"torch {meta['torch']}, Triton {meta['triton']}; commits: {commits(meta, rows)} "
        f"for the layer, {host['meta']['commit']} for CPU time, {invariant['meta']['commit']} for "
        "batch invariance. vLLM "
        f"against itself differed by {_noise(meta)}.",
    ]
    return "\n".join(lines)


def _outside(unseen: dict[str, Any]) -> str:
    """Losses at sizes outside the list: of shapes, and of token counts."""
    said = []
    # Listed cells may stand beside, as neighbours of the same run.
    cells = [r for r in unseen["rows"] if r["shape"] not in SHAPES or r["T"] not in TOKENS]
    for title, inside in (("shapes outside the list", False), ("other token counts", True)):
        rows = [row for row in cells if (row["shape"] in SHAPES) is inside]
        ratios = [r for row in rows if (r := report._best_speedup(row)) is not None]
        lost = [r for r in ratios if r < 1]
        said.append(
            f"{title}: {len(lost)} of {len(ratios)} cells, by up to {1 / min(ratios) - 1:.0%}"
        )
    return "; ".join(said).capitalize()


def _engine_steps(engine: dict[str, Any]) -> str:
    """ "model: batch 1 3.82 and 4.23, ..." for every model of the engine's results."""
    models = []
    for model, document in engine.items():
        ours, theirs = (document["runs"][mode]["step_ms"] for mode in ("on", "off"))
        steps = ", ".join(f"batch {b} {ours[b]:.2f} and {theirs[b]:.2f}" for b in ours)
        models.append(f"{model}: {steps}")
    return "; ".join(models)


def _noise(meta: dict[str, Any]) -> str:
    noise = meta["noise"]["vllm"]
    return f"{noise['median']:.1%} (median), {noise['p95']:.1%} (95%)"


def _host_values(host: dict[str, Any], peer: str) -> list[dict[str, float]]:
    return [{"us": row["peers"][peer]["host_us"]} for row in host["rows"] if peer in row["peers"]]


def updated(readme: str) -> str:
    """`readme` with the section written anew."""
    layer, host, invariant, engine, unseen = (
        json.loads((RESULTS / f"h200_{name}.json").read_text())
        for name in ("bf16_moe", "host_cost", "batch_invariant", "vllm_smoke", "bf16_unseen")
    )
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{section(layer, host, invariant, engine, unseen)}\n{END}{after}"


def main() -> None:
    """Rewrites the section in README.md."""
    argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__).parse_args()
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))


if __name__ == "__main__":
    main()
