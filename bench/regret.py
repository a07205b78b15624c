"""How far a choice of configuration is from the best one: exhaustive times, then policies.

``python -m bench.regret measure --out FILE`` compiles every configuration of the space and times
all of them on every named row; ``python -m bench.regret_score FILE`` fits the models on the rows
marked "fit", chooses by every policy and scores on halves of the samples that no choice has seen.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from bench.machine import commit, describe, require_gpu
from tilewise.dispatch.config import KernelConfig
from tilewise.dispatch.rules import rule
from tilewise.dispatch.space import space
from tilewise.models import MoEShape
from tilewise.target import Target
from tilewise.tune import measure
from tilewise.tune.routings import expert_ids, fingerprint, sizes_of

SHAPES = {
    "mixtral-8x7b": MoEShape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": MoEShape(128, 8, 2048, 768),
    "olmoe-1b-7b": MoEShape(64, 8, 2048, 1024),
    "qwen3-235b-tp8": MoEShape(128, 8, 4096, 192),
    "gpt-oss-120b-like": MoEShape(128, 4, 2880, 2880),
    "kimi-k2-ep8": MoEShape(48, 8, 7168, 2048),
    "qwen2-moe-57b": MoEShape(64, 8, 3584, 2560),
    "glm-4.5-air": MoEShape(128, 8, 4096, 1408),
}
UNSEEN_MODELS = ("qwen2-moe-57b", "glm-4.5-air")
# Costs are fitted to cases of these too, which are neither among the 200 rows nor held out.
ONLY_FITTED = {
    "grok-1-tp8": MoEShape(8, 2, 6144, 4096),
    "dbrx-tp4": MoEShape(16, 4, 6144, 2688),
    "granite-3b-a800m": MoEShape(40, 8, 1536, 512),
    "hunyuan-a13b": MoEShape(64, 8, 4096, 3072),
    "arctic-tp8": MoEShape(128, 2, 7168, 608),
    "qwen3-next-80b": MoEShape(512, 10, 2048, 512),
}
SHAPES |= ONLY_FITTED
FIT = [("uniform", t) for t in (8, 32, 128, 512, 2048, 8192)] + [
    ("hot", t) for t in (8, 32, 128, 512, 2048)
]
HELD_OUT = [("zipf1.2", 24), ("dirichlet3", 96), ("bimodal", 700)]
OF_UNSEEN = [
    ("uniform", 8), ("uniform", 128), ("uniform", 1024), ("hot", 32), ("hot", 300),
    ("zipf1.2", 48), ("zipf1.2", 2048), ("few0.25", 64),
]  # fmt: skip
# Further cases that costs are fitted to, and nothing is scored on.
MORE = [("uniform", t) for t in (4, 16, 64, 256, 1024, 4096)] + [
    *(("hot", t) for t in (4, 16, 64, 256, 1024)), ("zipf1.2", 64), ("zipf1.2", 1024),
]  # fmt: skip
OF_ONLY_FITTED = [
    *(("uniform", t) for t in (8, 40, 128, 200, 512, 1280, 6144)),
    *(("hot", t) for t in (8, 40, 128, 512)), ("zipf1.2", 64), ("zipf1.2", 400),
]  # fmt: skip
# What the robust choice was designed on (its families, weight of the worst, margins): scored apart.
DESIGN = [
    ("dirichlet3", 40), ("dirichlet3", 200), ("few0.25", 128), ("bimodal", 400), ("bimodal", 1280),
]  # fmt: skip
# Passes, then the times over the best beyond which a configuration is dropped (interleaved_us).
ROUNDS = ((2, 1.3), (4, 1.05), (12, 0.0))
OUT = Path(__file__).parent / "results" / "h200_regret.json"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One named row: a product of a layer under one routing."""

    shape: str
    stage: str
    T: int
    routing: str
    split: str


def cells(shapes: Sequence[str], more: bool = False) -> Iterator[Cell]:
    """The named rows, shape by shape; `more`: those that costs are only fitted to."""
    for shape in shapes:
        if more and shape not in UNSEEN_MODELS:
            wanted = [*OF_ONLY_FITTED, *DESIGN] if shape in ONLY_FITTED else MORE
            for (routing, tokens), stage in itertools.product(wanted, measure.STAGES):
                split = "design" if (routing, tokens) in DESIGN else "fit"
                yield Cell(shape, stage, tokens, routing, split)
        if more or shape in ONLY_FITTED:
            continue
        unseen = shape in UNSEEN_MODELS
        for routing, tokens in OF_UNSEEN if unseen else FIT + HELD_OUT:
            split = "held_out" if unseen or (routing, tokens) in HELD_OUT else "fit"
            for stage in measure.STAGES:
                yield Cell(shape, stage, tokens, routing, split)


def candidates(cell: Cell, target: Target) -> list[KernelConfig]:
    """The space, and what the rule of today would choose if that lies outside."""
    gemm = measure.product(SHAPES[cell.shape], cell.stage, cell.T)
    found, ruled = space(gemm, target), rule(gemm, target)
    return found if ruled in found else [*found, ruled]


def compile_all(wanted: Sequence[Cell], target: Target, processes: int) -> list[str]:
    """Compiles all candidates in parallel; what would not compile."""
    jobs: dict[Any, tuple[str, MoEShape, KernelConfig]] = {}
    for cell in wanted:
        shape = SHAPES[cell.shape]
        k = shape.hidden_size if cell.stage == "gate_up" else shape.intermediate_size
        for config in candidates(cell, target):
            # What of the sizes the compiler sees.
            even = cell.stage == "down" or k % config.block_k == 0
            shared = min(config.split_k, -(-k // (2 * config.block_k)))
            jobs.setdefault((cell.stage, config, even, shared), (cell.stage, shape, config))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = pool.map(measure.compile_one, jobs.values(), chunksize=2)
        return [bad for bad in track(results, "compiling", total=len(jobs)) if bad]


def measure_cell(
    cell: Cell, weights: measure.Weights, target: Target, stream: torch.cuda.Stream
) -> dict[str, Any]:
    """Times every candidate of one row."""
    shape = SHAPES[cell.shape]
    generator = torch.Generator(device="cuda").manual_seed(cell.T)
    first = expert_ids(cell.routing, cell.T, shape, generator)
    sets = measure.num_sets(shape, cell.stage, int(first.unique().numel()))
    ids = [first, *(expert_ids(cell.routing, cell.T, shape, generator) for _ in range(sets - 1))]
    inputs = measure.input_sets(shape, cell.stage, ids, weights)
    run = measure.launcher(shape, cell.stage, weights, target)
    graphs, failed, wanted = {}, {}, None
    for config in candidates(cell, target):
        inputs[0].out.fill_(float("nan"))
        try:
            graphs[config] = measure.capture(run, inputs, config, cell.stage, target, stream)
            torch.cuda.synchronize()
        except Exception as error:
            failed[config.name] = f"{type(error).__name__}: {error}"[:200]
            continue
        got = inputs[0].out.float()
        if wanted is None:
            wanted = got
        error_of = ((got - wanted).norm() / wanted.norm()).item()
        if not error_of < 0.01:
            failed[config.name] = f"wrong by {error_of}"
            del graphs[config]
    times = measure.interleaved_us(graphs, rounds=ROUNDS)
    sizes = [sizes_of(i, shape.num_experts) for i in ids]
    return {
        **asdict(cell),
        "sizes": sizes,
        "histogram": fingerprint(sizes[0]),
        "times_us": {c.name: [round(t, 3) for t in halves] for c, halves in times.items()},
        "failed": failed,
        "commit": commit(),
    }


def mean_us(row: Row, name: str) -> float:
    """Microseconds of a configuration, over both halves of its samples."""
    return statistics.fmean(row["times_us"][name])


def regret(row: Row, name: str) -> float:
    """Time over the best one's, picked on the other half of the samples."""
    times, both = row["times_us"], []
    for pick, judge in ((0, 1), (1, 0)):
        best = min(times, key=lambda n: times[n][pick])
        both.append(times[name][judge] / times[best][judge] - 1)
    return statistics.fmean(both)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, 95th and 99th percentile and the largest."""
    ranked = sorted(values)

    def at(share: float) -> float:
        return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)]

    found = {"mean": statistics.fmean(ranked), "median": statistics.median(ranked)}
    found |= {"p95": at(0.95), "p99": at(0.99), "max": ranked[-1], "rows": len(ranked)}
    return {key: round(value, 5) for key, value in found.items()}


def measure_all(options: argparse.Namespace) -> None:
    """Measures what is not in the file yet; saves after each row."""
    require_gpu()
    deadline = time.monotonic() + options.time_limit
    target = Target.probe("cuda")
    wanted = list(cells(options.shapes, options.more))
    data = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    done = {tuple(row[k] for k in ("shape", "stage", "T", "routing")) for row in data["rows"]}
    wanted = [c for c in wanted if (c.shape, c.stage, c.T, c.routing) not in done]
    began = time.monotonic()
    problems = compile_all(wanted, target, options.processes)
    data["meta"] = describe() | {"compile_s": time.monotonic() - began, "problems": problems}
    print(f"compiled in {time.monotonic() - began:.0f} s; {len(problems)} would not", flush=True)
    stream = torch.cuda.Stream()
    for name in options.shapes:
        of_shape = [cell for cell in wanted if cell.shape == name]
        if not of_shape or time.monotonic() > deadline:
            continue
        weights = measure.Weights.random(SHAPES[name], "cuda")
        for cell in of_shape:
            if time.monotonic() > deadline:
                break
            data["rows"].append(measure_cell(cell, weights, target, stream))
            gc.collect()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        del weights
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.regret")
    parser.add_argument("command", choices=["measure"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--more", action="store_true", help="cases that costs are only fitted to")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--time-limit", type=float, default=3600.0, metavar="S")
    measure_all(parser.parse_args())


if __name__ == "__main__":
    main()
