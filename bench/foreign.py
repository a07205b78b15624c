"""A kernel that is not ours, chosen by our costs: vLLM's ``fused_moe_kernel``, source untouched.

``python -m bench.foreign measure --out FILE`` times 60 configurations of vLLM's layer, and what it
would itself choose, on every row; ``python -m bench.foreign score FILE`` fits costs to the rows
marked "fit", described by the grids of both launches alone, and scores choices on the others;
``python -m bench.foreign cross_validate FILE`` fits and scores among the rows marked "fit" alone.
RaMP (arXiv 2604.26039) did this with Alpha-MoE's kernels.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.peers import base
from bench.regret import SHAPES, Row, mean_us, quantiles, regret
from bench.results import TIMED, load
from tilewise.dispatch.config import GroupedGemm, KernelConfig
from tilewise.dispatch.features import FEATURES, RESERVED, features
from tilewise.dispatch.histogram import FAMILIES, Histogram, expected_sizes
from tilewise.dispatch.select import robust_scores
from tilewise.dispatch.smoothing import Corrections, exemplars
from tilewise.dispatch.table import place
from tilewise.models import MoEShape
from tilewise.target import Target
from tilewise.tune import fit, measure
from tilewise.tune.routings import expert_ids, fingerprint, sizes_of

FITTED = ("qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b")
UNSEEN = "qwen2-moe-57b"
TOKENS = (8, 64, 512, 4096)
ROUTINGS = ("uniform", "zipf1.2", "hot")
OUT = Path(__file__).parent / "results" / "h200_foreign.json"
# Weight of a shared coefficient; 1: as much as the row in which its term weighs most. By
DOUBT = 1.0  # cross-validation, where 0.3 to 2 do nearly as well.
ITEMSIZE = 2  # Bytes: bf16.
L2_SHARE = 0.9  # Of L2, that weights may fill and still be there when they are read again.
# Rows that are left out together.
FOLDS: dict[str, Callable[[Row], Hashable]] = {
    "shapes": lambda row: row["shape"],
    "routings and token counts": lambda row: (row["routing"], row["T"]),
    "token counts": lambda row: row["T"],
    "routings": lambda row: row["routing"],
    "rows": lambda row: (row["shape"], row["routing"], row["T"]),
}
Values = tuple[float, ...]


def configurations() -> list[KernelConfig]:
    """60 configurations over what vLLM's tuned files use; its six fields are six of ours."""
    shared = ((32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3))
    out = [
        KernelConfig(m, n, k, group, warps, stages)
        for m, (n, k, warps, stages), group in itertools.product((16, 32), shared, (1, 16))
    ]
    out += [
        KernelConfig(m, n, k, group, warps, stages)
        for m in (64, 128)
        for n, k, warps, stages in (
            (64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (128, 128, 8, 3),
        )
        for group in (1, 16)
    ]  # fmt: skip
    out += [KernelConfig(m, 128, 64, 16, warps, 3) for m in (16, 32, 64, 128) for warps in (4, 8)]
    out += [KernelConfig(m, 64, 128, 1, 4, 3) for m in (16, 32, 64, 128)]
    out += [KernelConfig(m, 256, 64, 16, 8, 4) for m in (16, 32, 64, 128)]
    out += [KernelConfig(m, 64, 256, 1, 4, 3) for m in (16, 32)]
    out += [KernelConfig(m, 32, 128, 1, 4, 4) for m in (16, 32)]
    assert len(set(out)) == len(out) == 60
    return out


def as_vllm(config: KernelConfig) -> dict[str, int]:
    """vLLM's names."""
    return {
        "BLOCK_SIZE_M": config.block_m, "BLOCK_SIZE_N": config.block_n,
        "BLOCK_SIZE_K": config.block_k, "GROUP_SIZE_M": config.group_m,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def cells() -> Iterator[tuple[str, int, str, str]]:
    """(shape, tokens, routing, split)."""
    for shape in FITTED:
        yield from ((shape, t, routing, "fit") for t in TOKENS for routing in ROUTINGS)
        yield from ((shape, t, "zipf1.2", "held_out") for t in (24, 200))
        yield (shape, 200, "few0.25", "held_out")
    yield from ((UNSEEN, t, routing, "held_out") for t in (8, 64, 512) for routing in ROUTINGS)


def compile_some(configs: Sequence[KernelConfig]) -> str:
    """Runs each configuration on small layers, which compiles it; for a pool of processes."""
    base.use_folder()
    fused_moe = importlib.import_module("bench.peers.vllm_moe")._import()[0]
    package = importlib.import_module("vllm.model_executor.layers.fused_moe")
    failed = ""
    for name in (*FITTED, UNSEEN):
        s = SHAPES[name]
        shape = MoEShape(min(16, s.num_experts), s.top_k, s.hidden_size, s.intermediate_size)
        weights = measure.Weights.random(shape, "cuda")
        for tokens in (8, 24, 200, 512):
            generator = torch.Generator(device="cuda").manual_seed(0)
            ids = expert_ids("uniform", tokens, shape, generator)
            x = torch.randn(tokens, s.hidden_size, device="cuda", dtype=torch.bfloat16)
            for config in configs:
                package._config = as_vllm(config)
                try:
                    fused_moe.fused_experts(
                        x, weights.gate_up, weights.down, torch.rand(ids.shape, device="cuda"), ids
                    )
                except Exception as error:
                    failed = f"{config.name}: {error}"
        torch.cuda.synchronize()
    return failed


def measure_all(options: argparse.Namespace) -> None:
    """Times every cell that the time limit allows; saves after each shape."""
    machine.require_gpu()
    base.use_folder()
    began, configs = time.monotonic(), configurations()
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        chunks = [configs[i :: options.processes] for i in range(options.processes)]
        problems = [bad for bad in pool.map(compile_some, chunks) if bad]
    print(f"compiled in {time.monotonic() - began:.0f} s", problems[:2], flush=True)
    fused_moe = importlib.import_module("bench.peers.vllm_moe")._import()[0]
    package = importlib.import_module("vllm.model_executor.layers.fused_moe")
    rows: list[dict[str, Any]] = []
    meta = machine.describe() | {"vllm": importlib.import_module("vllm").__version__}
    stream = torch.cuda.Stream()
    for name in (*FITTED, UNSEEN):
        shape = SHAPES[name]
        weights = measure.Weights.random(shape, "cuda")
        for cell in [cell for cell in cells() if cell[0] == name]:
            if time.monotonic() - began > options.time_limit:
                break
            rows.append(_measure(cell, shape, weights, configs, fused_moe, package, stream))
        options.out.write_text(json.dumps({"meta": meta, "rows": rows}))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        del weights
        torch.cuda.empty_cache()


def _measure(
    cell: tuple[str, int, str, str], shape: MoEShape, weights: measure.Weights,
    configs: Sequence[KernelConfig], fused_moe: Any, package: Any, stream: torch.cuda.Stream,
) -> dict[str, Any]:  # fmt: skip
    name, tokens, routing, split = cell
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    first = expert_ids(routing, tokens, shape, generator)
    count = min(3, measure.num_sets(shape, "gate_up", int(first.unique().numel())))
    ids = [first, *(expert_ids(routing, tokens, shape, generator) for _ in range(count - 1))]
    sets = [
        (
            torch.randn(tokens, shape.hidden_size, device="cuda", dtype=torch.bfloat16),
            torch.rand(one.shape, device="cuda"),
            one,
        )
        for one in ids
    ]
    package._config = None
    own = fused_moe.try_get_optimal_moe_config(
        tuple(weights.gate_up.shape), tuple(weights.down.shape), shape.top_k, None, tokens
    )
    wanted = KernelConfig(
        own["BLOCK_SIZE_M"], own["BLOCK_SIZE_N"], own["BLOCK_SIZE_K"], own["GROUP_SIZE_M"],
        own.get("num_warps", 4), own.get("num_stages", 3),
    )  # fmt: skip
    graphs: dict[KernelConfig, measure.Captured] = {}
    failed = {}
    for config in dict.fromkeys([*configs, wanted]):
        package._config = as_vllm(config)
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                fused_moe.fused_experts(sets[0][0], weights.gate_up, weights.down, *sets[0][1:])
            torch.cuda.synchronize()
            graph, outs = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph, stream=stream):
                for x, weight, one in sets:
                    outs.append(
                        fused_moe.fused_experts(x, weights.gate_up, weights.down, weight, one)
                    )
            graphs[config] = measure.Captured(graph, len(sets), [outs])
        except Exception as error:
            failed[config.name] = f"{type(error).__name__}: {error}"[:120]
    package._config = None
    times = measure.interleaved_us(graphs, rounds=((2, 1.3), (4, 0.0)), sample_ms=0.5)
    sizes = [sizes_of(one, shape.num_experts) for one in ids]
    return {
        "shape": name, "T": tokens, "routing": routing, "split": split, "sizes": sizes,
        "histogram": fingerprint(sizes[0]), "vllm": wanted.name, "failed": failed,
        "times_us": {c.name: [round(t, 2) for t in halves] for c, halves in times.items()},
    }  # fmt: skip


# Scoring.


def products(shape: MoEShape, tokens: int) -> tuple[GroupedGemm, GroupedGemm]:
    """Both launches: gate and up are one plain product of 2 I columns there."""
    e, k, h, i = shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size
    rows = tokens * k
    return GroupedGemm(rows, tokens, e, 2 * i, h), GroupedGemm(rows, tokens, e, h, i)


def programs_per_sm(config: KernelConfig, target: Target) -> int:
    """Programs that one multiprocessor holds; 58 of the 60 as Triton 3.6 compiles them for sm_90.

    Products of fewer than 64 rows pass through registers: one stage less waits in shared memory.
    """
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    through_registers = config.block_m < 64
    registers = 40 + 2 * accumulators if through_registers else 24 + 3 * accumulators // 2
    stages = config.num_stages - through_registers
    shared = stages * (config.block_m + config.block_n) * config.block_k * ITEMSIZE
    by_memory = (target.shared_memory + RESERVED) // (shared + RESERVED)
    return max(1, min(by_memory, 65536 // (32 * config.num_warps * registers)))


def weight_reads(
    config: KernelConfig, gemm: GroupedGemm, target: Target, histogram: Histogram
) -> int:
    """How often an expert's weights come from memory, summed over experts.

    Groups of row tiles follow each other, each over all columns. Weights that exceed L2 are read
    again by every group of their expert that does not run at the same time.
    """
    if gemm.n * gemm.k * ITEMSIZE <= L2_SHARE * target.l2_bytes:
        return histogram.active
    resident = target.num_sms * programs_per_sm(config, target)
    columns = -(-gemm.n // config.block_n)
    reads = 0
    for size in histogram.sizes:
        tiles = -(-size // config.block_m)
        together = max(1, resident // (columns * min(config.group_m, tiles)))
        reads += -(-tiles // (config.group_m * together))
    return reads


def launch(config: KernelConfig, gemm: GroupedGemm, target: Target, histogram: Histogram) -> Values:
    """The grid of one launch: `features` but those of short tiles, weights read, bytes of steps.

    Costs that configurations share need what a step loads, not only how many steps there are.
    """
    # Of a persistent configuration the features take the occupancy that it names.
    held = replace(config, persistent=True, occupancy=programs_per_sm(config, target))
    values = features(held, gemm, target, histogram)[: FEATURES.index("work_steps")]
    weights = weight_reads(config, gemm, target, histogram) * gemm.n * gemm.k * ITEMSIZE
    step = (config.block_m + config.block_n) * config.block_k * ITEMSIZE / 1e4
    loads = (values[FEATURES.index(name)] * step for name in ("wave_steps", "sm_steps"))
    return (*values, weights / (target.memory_gbs * 1e3), *loads)


@functools.cache
def described(
    config: KernelConfig, shape: MoEShape, tokens: int, histogram: Histogram, target: Target
) -> Values:
    """The grids of both launches, added up."""
    both = [launch(config, gemm, target, histogram) for gemm in products(shape, tokens)]
    return tuple(a + b for a, b in zip(*both, strict=True))


def mean(rows: Sequence[Values]) -> Values:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def histograms(row: Row) -> list[Histogram]:
    """Of each input set that the row's times are means over."""
    return [Histogram.of(sizes) for sizes in row["sizes"]]


def near(
    common: Values, rows: Sequence[Values], times: Sequence[float], weights: Sequence[float]
) -> Values:
    """Coefficients as by `fit.non_negative`, drawn to those that all configurations share.

    A configuration has few rows where it is in the race: fewer than it has coefficients.
    """
    import numpy as np
    from scipy.optimize import nnls

    matrix = np.array(rows) / np.array(times)[:, None] * np.array(weights)[:, None]
    scale = np.abs(matrix).max(axis=0) + 1e-12
    pull = math.sqrt(DOUBT)
    solution, _ = nnls(
        np.vstack([matrix / scale, pull * np.eye(len(scale))]),
        np.concatenate([weights, pull * np.array(common) * scale]),
    )
    return tuple(float(value) for value in solution / scale)


class Costs:
    """Fitted costs of the foreign layer, corrected near the rows they were fitted to."""

    def __init__(self, rows: Sequence[Row], target: Target) -> None:
        self.target = target
        names = {name: None for row in rows for name in row["times_us"]}
        self.configs = [
            KernelConfig.from_name(name)
            for name in names
            if sum(name in row["times_us"] for row in rows) >= fit.TIMED * len(rows)
        ]
        best = [min(mean_us(row, name) for name in row["times_us"]) for row in rows]
        cases: dict[KernelConfig, list[tuple[Values, float, float]]] = {}
        for config in self.configs:
            for row, fastest in zip(rows, best, strict=True):
                if config.name in row["times_us"]:
                    us = mean_us(row, config.name)
                    race = min(1.0, fastest / us) ** fit.RACE
                    cases.setdefault(config, []).append((self._row_values(config, row), us, race))
        common = fit.non_negative(*zip(*itertools.chain.from_iterable(cases.values()), strict=True))
        self.coefficients = {
            config: near(common, *zip(*mine, strict=True)) for config, mine in cases.items()
        }
        known = exemplars(
            [self._place(SHAPES[row["shape"]], row["T"], histograms(row)) for row in rows],
            [
                tuple(
                    math.log(mean_us(row, c.name) / self._bare(c, self._row_values(c, row)))
                    if c.name in row["times_us"]
                    else None
                    for c in self.configs
                )
                for row in rows
            ],
        )
        self.corrections = Corrections(known)

    def _row_values(self, config: KernelConfig, row: Row) -> Values:
        return self._values(config, SHAPES[row["shape"]], row["T"], histograms(row))

    def _values(
        self, config: KernelConfig, shape: MoEShape, tokens: int, sets: Sequence[Histogram]
    ) -> Values:
        return mean([described(config, shape, tokens, one, self.target) for one in sets])

    def _place(self, shape: MoEShape, tokens: int, sets: Sequence[Histogram]) -> Values:
        return mean([place(products(shape, tokens)[0], one) for one in sets])

    def _bare(self, config: KernelConfig, values: Values) -> float:
        row = self.coefficients[config]
        return max(0.1, sum(a * b for a, b in zip(row, values, strict=True)))

    def of(
        self, shape: MoEShape, tokens: int, sets: Sequence[Histogram]
    ) -> dict[KernelConfig, float]:
        """Microseconds by configuration, as the mean over input sets."""
        shifts = self.corrections.at(self._place(shape, tokens, sets))
        return {
            c: self._bare(c, self._values(c, shape, tokens, sets)) * math.exp(shift)
            for c, shift in zip(self.configs, shifts, strict=True)
        }

    def static(self, shape: MoEShape, tokens: int) -> KernelConfig:
        """Robust over the families, by the score that our own kernels are chosen by."""
        scores = robust_scores(
            {
                family: self.of(
                    shape, tokens, [expected_sizes(family, tokens, shape.top_k, shape.num_experts)]
                )
                for family in FAMILIES
            }
        )
        return min(scores, key=scores.__getitem__)


def score(rows: Sequence[Row], target: Target) -> dict[str, Any]:
    """Regret of each policy, fitted rows and others apart, and speed over vLLM's choice on both."""
    costs = Costs([row for row in rows if row["split"] == "fit"], target)
    found: dict[str, dict[str, list[float]]] = {}
    speed: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        shape = SHAPES[row["shape"]]
        predicted = costs.of(shape, row["T"], histograms(row))
        chosen = {
            "by histogram": min(predicted, key=predicted.__getitem__).name,
            "static": costs.static(shape, row["T"]).name,
            "vllm": row["vllm"],
        }
        for policy, name in chosen.items():
            if name not in row["times_us"]:
                continue
            found.setdefault(policy, {}).setdefault(row["split"], []).append(regret(row, name))
            gain = mean_us(row, row["vllm"]) / mean_us(row, name)
            speed.setdefault(policy, {}).setdefault(row["routing"], []).append(gain)
    return {
        "configurations": len(costs.configs),
        "regret": {
            policy: {split: quantiles(values) for split, values in splits.items()}
            for policy, splits in found.items()
        },
        "speed_over_vllm_choice": {
            policy: {routing: statistics.geometric_mean(v) for routing, v in by.items()}
            for policy, by in speed.items()
        },
    }


def cross_validate(rows: Sequence[Row], target: Target) -> dict[str, dict[str, float]]:
    """Regret by the histogram on rows marked "fit" that costs were not fitted to, by their fold."""
    fitted = [row for row in rows if row["split"] == "fit"]
    found: dict[str, list[float]] = {name: [] for name in FOLDS}
    for name, fold_of in FOLDS.items():
        for fold in dict.fromkeys(map(fold_of, fitted)):
            costs = Costs([row for row in fitted if fold_of(row) != fold], target)
            for row in (row for row in fitted if fold_of(row) == fold):
                predicted = costs.of(SHAPES[row["shape"]], row["T"], histograms(row))
                found[name].append(regret(row, min(predicted, key=predicted.__getitem__).name))
    return {name: quantiles(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.foreign")
    parser.add_argument("command", choices=["measure", "score", "cross_validate"])
    parser.add_argument("file", type=Path, nargs="?", default=OUT)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S")
    options = parser.parse_args()
    if options.command == "measure":
        measure_all(options)
        return
    data = load(parser, options.file, (*TIMED, "vllm"))
    judge = score if options.command == "score" else cross_validate
    print(json.dumps(judge(data["rows"], Target.from_arch("sm_90")), indent=1))


if __name__ == "__main__":
    main()
