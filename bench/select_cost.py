"""What a choice on the device costs inside a captured graph: two launches, one of which leaves.

``python -m bench.select_cost`` measures whole layers, replayed from graphs in turns: the first
product's configuration alone, and launched beside another one that the device does not choose.
``python -m bench.select_cost report FILE`` prints what the second launch cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import machine, protocol
from bench.measure import PROVENANCE
from bench.protocol import SHAPES
from bench.report import Table, reported
from bench.results import CELL, Results, Row
from tilewise.dispatch.config import FewActive
from tilewise.dispatch.histogram import expected_sizes
from tilewise.dispatch.select import stage_table
from tilewise.moe.activation import SWIGLU
from tilewise.moe.forward import forward_into
from tilewise.moe.schedule import LayerConfig, LayerProblem, schedule
from tilewise.moe.workspace import buffer_sizes
from tilewise.target import Target
from tilewise.tune import measure

CELLS = [
    (shape, tokens)
    for shape in ("qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b")
    for tokens in (32, 128, 512)
]
OUT = Path(__file__).parent / "results" / "h200_select_cost.json"
KEYS = (*CELL, "us", "select_us", "many", "few")


def plans(problem: LayerProblem, target: Target) -> dict[str, LayerConfig]:
    """The chosen configuration alone, and with the fastest for few experts launched beside it."""
    # Both products in one launch take no second configuration.
    alone = schedule(replace(problem, fusable=False), target)
    gemm, _ = problem.gemms()
    table = stage_table(gemm, target)
    assert table is not None
    hot = expected_sizes("hot", problem.num_tokens, problem.top_k, problem.num_experts)
    costs = table.costs(gemm, target, hot)
    few = min((c for c in costs if c != alone.gate_up), key=costs.__getitem__)
    both = replace(alone, gate_up_few=FewActive(few, problem.top_k))
    return {"many": alone, "few": replace(alone, gate_up=few), "both": both}


def times_us(
    shape: protocol.Shape, tokens: int, routing: str, layers: dict[str, LayerConfig], target: Target
) -> dict[str, float]:
    """Microseconds of the layer by plan."""
    e, k, h, i = shape
    w13, w2 = protocol.make_weights(shape)
    sets, _ = protocol.build_sets(routing, tokens, shape)
    stream = torch.cuda.Stream()
    graphs: dict[Any, measure.Captured] = {}
    for name, config in layers.items():
        problem = LayerProblem(tokens, k, e, h, i, 2, True, True)
        size = sum(buffer_sizes(problem, config, target))
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        out = torch.empty(tokens, h, dtype=torch.bfloat16, device="cuda")

        def call(
            one: Any, out: Any = out, workspace: Any = workspace, text: str = config.to_json()
        ) -> None:
            x, ids, weights = one
            forward_into(
                out, workspace, x, w13[:, :i], w13[:, i:], w2, None, None, None, weights, ids,
                SWIGLU, None, False, True, False, text,
            )  # fmt: skip

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(sets[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for one in sets:
                call(one)
        graphs[name] = measure.Captured(graph, len(sets), [out, workspace])
    times = measure.interleaved_us(graphs, rounds=((12, 0.0),))
    return {str(name): sum(halves) / 2 for name, halves in times.items()}


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes the results file; or prints one."""
    if reported("select_cost", arguments, OUT, table, KEYS):
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench.select_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    machine.require_gpu()
    target = Target.probe("cuda")
    results = Results(options.out)
    results.rows = []
    results.meta = machine.describe() | {"unit": "us of a layer, replayed from a graph"}
    for name, tokens in CELLS:
        e, k, h, i = SHAPES[name]
        layers = plans(LayerProblem(tokens, k, e, h, i, 2, True, True), target)
        for routing, used in (("uniform", "many"), ("hot", "few")):
            us = times_us(SHAPES[name], tokens, routing, layers, target)
            row = {
                "shape": name, "T": tokens, "routing": routing, "us": us, "peers": {},
                "select_us": round(us["both"] - us[used], 2),
                "many": layers["many"].gate_up.name, "few": layers["few"].gate_up.name,
            }  # fmt: skip
            results.put(row | {key: results.meta[key] for key in PROVENANCE})
            print(f"{name} {tokens} {routing}: {row['select_us']} us", flush=True)
    results.save()


def table(rows: Sequence[Row]) -> Table:
    """Microseconds of the layer by what is launched, and what the second launch adds."""
    body = []
    for row in rows:
        times = [f"{row['us'][name]:.1f}" for name in ("many", "few", "both")]
        share = row["select_us"] / (row["us"]["both"] - row["select_us"])
        cost = [f"{row['select_us']:.1f}", f"{share:.1%}"]
        cell = [row["shape"], str(row["T"]), row["routing"]]
        body.append([*cell, row["many"], row["few"], *times, *cost])
    header = ["shape", "T", "routing", "for many", "for few experts", "many us", "few us"]
    title = "Two launches of the first product, one of which leaves, against the other one alone"
    return Table(title, [*header, "both us", "cost us", "cost"], body)


if __name__ == "__main__":
    main(sys.argv[1:])
