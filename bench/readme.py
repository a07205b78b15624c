"""Writes the README's speed section from the committed results: `python -m bench.readme`."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.protocol import SHAPES, TOKENS
from bench.results import Row, commits

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
    slower = [row for row in rows if (r := report._best_speedup(row)) is not None and r < 1]
    large = sum(row["T"] >= 2048 for row in slower)
    cost = invariant["meta"]["batch_invariant_over_default"]
    routings = list(dict.fromkeys(row["routing"] for row in invariant["rows"]))
    calls = ", ".join(dict.fromkeys(row["shape"] for row in host["rows"]))
    counts = ", ".join(dict.fromkeys(str(row["T"]) for row in host["rows"]))
    # Listed cells may stand beside, as neighbours of the same run.
    other = [r for r in unseen["rows"] if r["shape"] not in SHAPES or r["T"] not in TOKENS]
    costs = sorted(float(v["us"]) for v in _host_values(host, "tilewise"))
    vllm = sorted(float(v["us"]) for v in _host_values(host, "vllm"))
    lines += [
        "",
        "A whole vLLM 0.24 engine, random weights, CUDA graphs, ms a decode step with the "
        "plug-in and "
        "without:",
        f"{_engine_steps(engine)} (`{_command('vllm_engine', 'vllm_smoke')}`, "
        f"{' and '.join(sorted({document['meta']['commit'] for document in engine.values()}))}).",
        "",
        f"**Where we lose:** some peer is faster in {_losses(rows)}; {large} at 2048 "
        "tokens and more.",
        "By rounds is the median of each round's ratio, by time the ratio of the medians that "
        "the tables show. Each round starts with another library; the first, on a cold machine, "
        "with Tilewise, at an advantage.",
        f"Shapes outside the list: {_losses([r for r in other if r['shape'] not in SHAPES])}. "
        f"Other token counts: {_losses([r for r in other if r['shape'] in SHAPES])} "
        f"(`{_command('unseen', 'bf16_unseen')}`).",
        "Every cell: `python -m bench report bench/results/h200_bf16_moe.json`. What was "
        "tried: [docs/performance.md](docs/performance.md).",
        f"CPU time of a call alike to an earlier one, {calls} at {counts} tokens: {costs[0]:.0f} "
        f"to {costs[-1]:.0f} µs, vLLM's {vllm[0]:.0f} to {vllm[-1]:.0f} µs "
        f"(`{_command('host_cost')}`). `batch_invariant=True` costs {cost['all'] - 1:.0%} over "
        f"{len(invariant['rows'])} cells, {len(routings)} routings ({', '.join(routings)}), "
        f"{cost['1'] - 1:.0%} at one token (`{_command('batch_invariant')}`).",
        f"torch {meta['torch']}, Triton {meta['triton']}; commits: {commits(meta, rows)} "
        f"for the layer, {commits(unseen['meta'], other)} outside the list, "
        f"{host['meta']['commit']} for CPU time, {invariant['meta']['commit']} for "
        f"batch invariance. vLLM against itself differed by {_noise(meta)}.",
    ]
    return "\n".join(lines)


def _command(program: str, results: str = "") -> str:
    """What prints the numbers of a results file, without a GPU."""
    return f"python -m bench.{program} report bench/results/h200_{results or program}.json"


def _losses(rows: Sequence[Row]) -> str:
    """In how many cells some peer is faster, by how much at most, which ones, in which routing."""
    by_rounds, by_time = [], []
    winners: Counter[str] = Counter()
    hot = 0
    for row in rows:
        rival, speed = report.best_rival(row), report._best_speedup(row)
        if rival is None or speed is None:
            continue
        by_rounds.append(speed)
        by_time.append(rival[1] / row["peers"][report.OURS]["us"])
        if speed < 1:
            winners[NAMES.get(rival[0], rival[0]).partition(",")[0]] += 1
            hot += row["routing"] == "hot"
    lost = winners.total()
    named = ", ".join(f"{name} in {count}" for name, count in winners.most_common())
    return (
        f"{lost} of {len(by_rounds)} cells by rounds, by up to {1 / min(by_rounds) - 1:.0%} "
        f"({sum(ratio < 1 for ratio in by_time)} by time, by up to {1 / min(by_time) - 1:.0%}): "
        f"{named}; {hot} of the {lost} with few experts (`hot`)"
    )


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
