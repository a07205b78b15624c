"""Times candidates of each kernel: decode, plan, combine and route beside the two products.

`python -m bench.sweep` compiles the candidates in parallel and then times the two products, the
decode kernels, plan, combine and route one by one, over rotating inputs as the benchmark does. It
is a sweep of kernels for people; costs are fitted to `bench.regret`, which knows tails, shared
reductions and stores by descriptor too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.progress import track

from bench import protocol
from bench.machine import describe, require_gpu
from tilewise.dispatch.config import GroupedGemm, KernelConfig, StreamConfig, why_illegal
from tilewise.moe import launch as launching
from tilewise.moe.activation import SWIGLU
from tilewise.moe.combine import combine_into
from tilewise.moe.decode import decode_down_into, decode_gate_up_into
from tilewise.moe.experts import grouped_gemm_into
from tilewise.moe.plan import carve_counts, carve_plan, plan_into, plan_ints
from tilewise.moe.route import route_into
from tilewise.target import Target

Shape = tuple[int, int, int, int]


def small_tiles() -> list[KernelConfig]:
    """Candidates for up to 128 rows an expert."""
    tiles = ((32, 128, 5), (64, 64, 6), (64, 128, 4), (128, 64, 4), (128, 128, 3), (64, 256, 3))
    out = []
    for block_m, (n, k, stages), swap, descriptors in itertools.product(
        (16, 32, 64), tiles, (False, True), (False, True)
    ):
        if n >= 64 or not swap:  # wgmma needs 64 rows of weights.
            out.append(KernelConfig(block_m, n, k, 8, 4, stages, swap, descriptors))
    return out


def large_tiles() -> list[KernelConfig]:
    """Candidates from 128 rows up."""
    tiles = (
        (64, 64, 4, 5), (64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 8, 3), (128, 64, 4, 4),
        (128, 64, 8, 4), (128, 128, 8, 4), (128, 128, 8, 3), (128, 128, 4, 3), (128, 256, 8, 3),
        (128, 256, 8, 4), (256, 128, 8, 3),
    )  # fmt: skip
    modes = ((False, False), (True, False), (True, True))
    return [
        KernelConfig(m, n, 64, 8, warps, stages, False, descriptors, persistent,
                     2 if m * n <= 64 * 128 else 1)
        for (m, n, warps, stages), (descriptors, persistent) in itertools.product(tiles, modes)
    ]  # fmt: skip


def candidates(num_tokens: int) -> list[KernelConfig]:
    return (small_tiles() if num_tokens <= 128 else []) + (
        large_tiles() if num_tokens >= 128 else []
    )


def streams() -> list[StreamConfig]:
    """Candidates of the decode kernels: 8 to 64 accumulators a lane."""
    grid = itertools.product((4, 8, 16, 32), (128, 256, 512, 1024), (2, 4, 8), (1, 2, 3))
    return [StreamConfig(n, k, w, s) for n, k, w, s in grid if 8 <= n * k // (32 * w) <= 64]


def products(shape: Shape, num_tokens: int) -> tuple[GroupedGemm, GroupedGemm]:
    experts, top_k, hidden, inter = shape
    rows = num_tokens * top_k
    return (
        GroupedGemm(rows, num_tokens, experts, inter, hidden, 2, 2, True),
        GroupedGemm(rows, num_tokens, experts, hidden, inter, 1, 2, False),
    )


def compile_product(job: tuple[str, Shape, KernelConfig]) -> str | None:
    """Compiles one candidate in a worker process; the reason if it does not compile."""
    stage, (experts, top_k, hidden, inter), config = job
    rows = 64 * top_k

    def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    plan = carve_plan(meta(plan_ints(rows, experts), dtype=torch.int32), rows, experts)
    target = Target.probe("cuda")
    try:
        with launching.compile_only():
            if stage == "gate_up":
                both = meta(experts, 2 * inter, hidden)
                grouped_gemm_into(
                    meta(rows, inter), meta(64, hidden), both[:, :inter], both[:, inter:], plan,
                    config, target, gathered=True, top_k=top_k, activation=SWIGLU,
                )  # fmt: skip
            else:
                grouped_gemm_into(
                    meta(rows, hidden), meta(rows, inter), None, meta(experts, hidden, inter),
                    plan, config, target, gathered=False,
                )  # fmt: skip
    except Exception as error:
        return f"{stage} {name(config)}: {error}"
    return None


def name(config: KernelConfig | StreamConfig) -> str:
    """A short name: tile, warps, stages, then Swapped, Descriptors, Persistent."""
    if isinstance(config, StreamConfig):
        return f"{config.block_n}x{config.block_k}w{config.num_warps}s{config.num_stages}"
    flags = "S" * config.swap_operands + "D" * config.descriptors + "P" * config.persistent
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile}w{config.num_warps}s{config.num_stages}{flags}"


def median_us(calls: Sequence[Callable[[], object]], target_ms: float = 6.0) -> float:
    """Microseconds per call, by replay of one graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    replays = int(min(20, max(3, target_ms / max(start.elapsed_time(end), 1e-3))))
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times) * 1e3 / len(calls), 2)


def sweep_shape(shape_name: str, tokens: Sequence[int], deadline: float) -> list[dict[str, object]]:
    """Rows {shape, T, routing, kernel, floor_us, us: {candidate: microseconds}} of one shape."""
    experts, top_k, hidden, inter = shape = protocol.SHAPES[shape_name]
    target = Target.probe("cuda")
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    both = torch.empty(experts, 2 * inter, hidden, **bf16).normal_(std=hidden**-0.5)
    down = torch.empty(experts, hidden, inter, **bf16).normal_(std=inter**-0.5)
    gate, up = both[:, :inter], both[:, inter:]
    rows_out: list[dict[str, object]] = []

    def add(
        num_tokens: int, routing: str, kernel: str, active: float, us: dict[str, float]
    ) -> None:
        floor = protocol.floors_us(num_tokens, shape, active)[0]
        rows_out.append({"shape": shape_name, "T": num_tokens, "routing": routing,
                         "kernel": kernel, "floor_us": floor, "us": us})  # fmt: skip

    for num_tokens, routing in itertools.product(tokens, ("uniform", "hot")):
        if time.time() > deadline:
            break
        sets, active = protocol.build_sets(routing, num_tokens, shape)
        n = num_tokens * top_k
        calls = []
        for x, ids, weights in sets:
            ints = torch.empty(plan_ints(n, experts), dtype=torch.int32, device="cuda")
            plan = carve_plan(ints, n, experts)
            counts = carve_counts(ints, n, experts)
            plan_into(plan, counts, ids, experts, None)
            act, rows = torch.randn(n, inter, **bf16), torch.randn(n, hidden, **bf16)
            calls.append((x, ids, weights, plan, act, rows, torch.empty_like(x), counts))
        gate_up, second = products(shape, num_tokens)
        times: dict[str, dict[str, float]] = {"gate_up": {}, "down": {}}
        for config in candidates(num_tokens):
            if why_illegal(config, gate_up, target) is None:
                times["gate_up"][name(config)] = median_us([
                    lambda c=c, config=config: grouped_gemm_into(
                        c[4], c[0], gate, up, c[3], config, target, gathered=True, top_k=top_k,
                        activation=SWIGLU)
                    for c in calls
                ])  # fmt: skip
            if why_illegal(config, second, target) is None:
                times["down"][name(config)] = median_us([
                    lambda c=c, config=config: grouped_gemm_into(
                        c[5], c[4], None, down, c[3], config, target, gathered=False)
                    for c in calls
                ])  # fmt: skip
        for kernel, us in times.items():
            if us:
                add(num_tokens, routing, kernel, active, us)
        if num_tokens <= 4:
            for half, run in (("decode_gate_up", decode_gate_up_into), ("decode_down", None)):
                us = {}
                for config in streams():
                    if run is not None:
                        us[name(config)] = median_us([
                            lambda c=c, config=config: decode_gate_up_into(
                                c[4], c[0], gate, up, None, None, c[2], c[1], SWIGLU, None,
                                experts, False, config)
                            for c in calls
                        ], 3.0)  # fmt: skip
                    else:
                        us[name(config)] = median_us([
                            lambda c=c, config=config: decode_down_into(
                                c[6], c[4], down, None, c[2], c[1], None, experts, False, config)
                            for c in calls
                        ], 3.0)  # fmt: skip
                add(num_tokens, routing, half, active, us)
        logits = torch.randn(num_tokens, experts, **bf16)
        add(num_tokens, routing, "others", active, time_others(calls[0], logits, experts))
    return rows_out


def time_others(call: tuple, logits: torch.Tensor, experts: int) -> dict[str, float]:
    """Microseconds of plan, combine and route on one input set."""
    _, ids, weights, plan, _, rows, out, counts = call
    chosen, scores = torch.empty_like(ids), torch.empty_like(weights)
    top_k = ids.shape[1]
    return {
        "plan": median_us([lambda: plan_into(plan, counts, ids, experts, None)] * 4),
        "combine": median_us(
            [lambda: combine_into(out, rows, plan.scatter, weights, router_weight=True)] * 4
        ),
        "route": median_us(
            [lambda: route_into(scores, chosen, logits, top_k, "softmax", True, None, 0, 0, 1.0)]
            * 4
        ),
        "route_and_plan": median_us(
            [
                lambda: (
                    route_into(scores, chosen, logits, top_k, "softmax", True, None, 0, 0, 1.0),
                    plan_into(plan, counts, chosen, experts, None),
                )
            ]
            * 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(protocol.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=protocol.TOKENS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/h200_sweep.json"))
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds")
    options = parser.parse_args()
    require_gpu()
    deadline = time.time() + options.time_limit

    target = Target.probe("cuda")
    jobs = {}
    for shape_name in options.shapes:
        shape = protocol.SHAPES[shape_name]
        for config in dict.fromkeys(c for t in options.tokens for c in candidates(t)):
            for stage, gemm in zip(("gate_up", "down"), products(shape, 64), strict=True):
                if why_illegal(config, gemm, target) is None:
                    even = (gemm.k % config.block_k == 0, gemm.n % config.block_n == 0)
                    jobs.setdefault((stage, config, even), (stage, shape, config))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        results = pool.map(compile_product, jobs.values(), chunksize=2)
        for problem in track(results, "compiling", total=len(jobs)):
            if problem:
                print(problem)

    rows: list[dict[str, object]] = []
    for shape_name in track(options.shapes, "timing"):
        rows += sweep_shape(shape_name, options.tokens, deadline)
        torch.cuda.empty_cache()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"meta": describe(), "rows": rows}))


if __name__ == "__main__":
    main()
